// SPDX-License-Identifier: Apache-2.0

// St1 and St2 of a stack against the rate at which this machine reads memory, measured in the same
// run, and against what a user would write by hand with Eigen. Each with its largest relative error
// against the same in double.

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <Eigen/Core>

#include <rflow/variance.hpp>

#include "beside.hpp"
#include "data.hpp"

namespace {

constexpr std::ptrdiff_t sites = 33, tokens = 2048, width = 2560;

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct roots {
  double st1 = 0, st2 = 0;
};

/// Far from zero, as a residual stream is: what St2 loses when it is a difference of squares.
template <class T>
rflow::bench::tensor<T> const& activations() {
  static auto const values = rflow::bench::activations<T>(sites * tokens * width, 8);
  return values;
}

template <class T>
roots in_double() {
  auto const& x = activations<T>();
  std::size_t const layer = static_cast<std::size_t>(tokens * width);
  std::vector<double> mean(layer);
  roots out;
  for (std::size_t i = 0; i < x.size(); ++i) {
    double const here = static_cast<double>(x[i]);
    mean[i % layer] += here / sites;
    if (i >= layer) out.st1 += std::pow(here - static_cast<double>(x[i - layer]), 2);
  }
  for (std::size_t i = 0; i < x.size(); ++i)
    out.st2 += std::pow(static_cast<double>(x[i]) - mean[i % layer], 2);
  return {std::sqrt(out.st1 / (sites - 1)), std::sqrt(out.st2 / sites)};
}

template <class T, class Work>
void beside_the_floor(benchmark::State& state, Work&& work) {
  double const bytes = static_cast<double>(sites * tokens * width) * static_cast<double>(sizeof(T));
  static roots const exact = in_double<T>();
  roots found;
  rflow::bench::beside_the_floor(state, bytes, [&] { found = work(); });
  state.counters["error"] =
      (std::max)(std::abs(found.st1 / exact.st1 - 1), std::abs(found.st2 / exact.st2 - 1));
}

template <class T>
void variance(benchmark::State& state) {
  rflow::layer_stack<T> const stack(activations<T>().data(), {sites, tokens, width});
  rflow::on_cpu const on{.threads = rflow::bench::threads()};
  beside_the_floor<T>(state, [&] {
    auto const v = rflow::variance(stack, rflow::normalization::none, on);
    return roots{v.st1, v.st2};
  });
}

void by_hand(benchmark::State& state) {
  auto const x = [](std::ptrdiff_t l) {
    return Eigen::Map<matrix const>(activations<float>().data() + l * tokens * width, tokens,
                                    width);
  };
  beside_the_floor<float>(state, [&] {
    float st1 = 0, st2 = 0;
    matrix mean = x(0);
    for (std::ptrdiff_t l = 1; l < sites; ++l) {
      st1 += (x(l) - x(l - 1)).squaredNorm();
      mean += x(l);
    }
    mean /= static_cast<float>(sites);
    for (std::ptrdiff_t l = 0; l < sites; ++l) st2 += (x(l) - mean).squaredNorm();
    return roots{std::sqrt(st1 / (sites - 1)), std::sqrt(st2 / sites)};
  });
}

void settings(benchmark::internal::Benchmark* b) {
  b->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(9);
}

BENCHMARK(variance<float>)->Apply(settings);
BENCHMARK(variance<rflow::bf16>)->Apply(settings);
BENCHMARK(by_hand)->Apply(settings)->Iterations(3);

}  // namespace

BENCHMARK_MAIN();
