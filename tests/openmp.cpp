// SPDX-License-Identifier: Apache-2.0
// Compiled with -fopenmp, as many consumers are: Eigen's own products would then start threads
// inside ours. The library must start none but its own, and give the same bits.
#include <omp.h>

#include <bit>
#include <cstdint>
#include <filesystem>
#include <random>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/cka.hpp>
#include <rflow/flow.hpp>

#include "reference.hpp"

namespace {

/// Threads of this process; 0 where the system does not say. OpenMP keeps its threads once started.
std::ptrdiff_t threads_alive() {
  std::error_code error;
  std::filesystem::directory_iterator const tasks("/proc/self/task", error);
  return error ? 0 : std::distance(begin(tasks), end(tasks));
}

struct figures {
  std::vector<std::uint64_t> bits;

  void add(double x) { bits.push_back(std::bit_cast<std::uint64_t>(x)); }
  void add(rflow::cka_table const& t) {
    for (std::ptrdiff_t i = 0; i < t.rows(); ++i)
      for (std::ptrdiff_t j = 0; j < t.cols(); ++j) {
        add(t(i, j));
        add(t.chance(i, j));
      }
  }
  bool operator==(figures const&) const = default;
};

template <class T>
figures measure(rflow::layer_stack<T> const& stack, int threads) {
  figures out;
  for (auto const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
    rflow::on_cpu const on{.threads = threads, .path = path};
    out.add(rflow::cka_matrix(stack, rflow::linear{}, rflow::debiased{}, on));
    out.add(rflow::cka_matrix(stack, rflow::linear{}, rflow::biased{}, on));
  }
  rflow::on_cpu const on{.threads = threads};
  out.add(rflow::cka_matrix(stack, rflow::rbf{}, rflow::debiased{}, on));
  rflow::flow_report const r = rflow::flow(stack, {}, on);
  for (auto const& x : r.inter_token) out.add(x);
  for (auto const& x : r.adjacent) out.add(x.mean);
  out.add(r.variance.st1);
  out.add(r.variance.st2);
  return out;
}

struct data {
  reference::stack x;
  std::vector<float> values;

  data() {
    std::mt19937 bits(1);
    x = reference::random_stack(bits, 3, 600, 96);
    values = reference::pack<float>(x);
  }
  rflow::layer_stack<float> stack() const { return reference::stack_of(values, x); }
};

}  // namespace

// In one case, in this order: the control leaves OpenMP's threads behind.
TEST_CASE("no thread is OpenMP's") {
  omp_set_num_threads(4);
  data const d;
  std::ptrdiff_t const before = threads_alive();
  static_cast<void>(measure(d.stack(), 1));
  CHECK(threads_alive() == before);
  static_cast<void>(measure(d.stack(), 3));
  CHECK(threads_alive() == before);  // ours are joined

  // The control: a plain product in this translation unit does start them.
  Eigen::MatrixXf const a = Eigen::MatrixXf::Random(700, 700);
  Eigen::MatrixXf const product = a * a;
  CHECK(product.allFinite());
  if (before > 0) CHECK(threads_alive() == before + 3);
}

TEST_CASE("the same bits, whatever OpenMP is told and wherever the call comes from") {
  data const d;
  omp_set_num_threads(1);
  figures const expected = measure(d.stack(), 1);
  for (int const openmp : {1, 4})
    for (int const threads : {1, 2, 5}) {
      omp_set_num_threads(openmp);
      CHECK(measure(d.stack(), threads) == expected);
    }

  omp_set_num_threads(3);
  std::vector<figures> inside(3);
#pragma omp parallel for
  for (int i = 0; i < 3; ++i) inside[static_cast<std::size_t>(i)] = measure(d.stack(), 2);
  for (figures const& f : inside) CHECK(f == expected);
}

TEST_CASE("published numbers hold") {
  auto const [x, y] = reference::kornblith();
  reference::stack both{x, y};
  std::vector<double> const values = reference::pack<double>(both);
  auto const stack = reference::stack_of(values, both);
  omp_set_num_threads(4);
  CHECK(std::abs(rflow::cka(stack[0], stack[1]) - 0.5134564895055259) < 1e-12);
  CHECK(std::abs(rflow::cka(stack[0], stack[1], rflow::linear{}, rflow::biased{}) -
                 0.5576132566117589) < 1e-12);
  CHECK(std::abs(rflow::cka(stack[0], stack[1], rflow::rbf{}) - 0.5016102703531156) < 1e-12);
}
