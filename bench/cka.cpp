// SPDX-License-Identifier: Apache-2.0

// The layer × layer CKA matrix against the rate of fp32 multiply-adds out of registers, measured in
// the same run. Useful operations are n² d a site: the lower half of its Gram matrix. Beside it, what
// a user would write by hand with Eigen: each Gram matrix once, and a sum for each pair.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include <benchmark/benchmark.h>

#include <Eigen/Core>

#include <rflow/cka.hpp>

#include "beside.hpp"
#include "data.hpp"

#ifndef RFLOW_BENCH_BACKEND  // blas.cpp names another
#define RFLOW_BENCH_BACKEND rflow::on_cpu
#endif

namespace {

struct shape {
  std::ptrdiff_t sites, tokens, width;
};

using rflow::bench::threads;

template <class T>
auto activations(shape const& s) {
  return rflow::bench::activations<T>(s.sites * s.tokens * s.width);
}

/// The median time over the iterations, beside the peak taken around each of them.
template <class Work>
void beside_the_peak(benchmark::State& state, shape const& s, Work&& work) {
  double const useful =
      static_cast<double>(s.sites * s.tokens * s.tokens) * static_cast<double>(s.width);
  state.counters["median_s"] = rflow::bench::beside_the_peak(state, useful, work);
}

template <class T, class Kernel>
void cka(benchmark::State& state) {
  shape const s{state.range(0), state.range(1), state.range(2)};
  auto const values = activations<T>(s);
  rflow::layer_stack<T> const stack(values.data(), {s.sites, s.tokens, s.width});
  RFLOW_BENCH_BACKEND const on{.threads = threads(), .path = rflow::gram_path::gram};
  beside_the_peak(state, s, [&] {
    benchmark::DoNotOptimize(rflow::cka_matrix(stack, Kernel{}, rflow::debiased{}, on));
  });
}

void by_hand(benchmark::State& state) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  shape const s{state.range(0), state.range(1), state.range(2)};
  auto const values = activations<float>(s);
  beside_the_peak(state, s, [&] {
    std::vector<matrix> grams;
    for (std::ptrdiff_t l = 0; l < s.sites; ++l) {
      Eigen::Map<matrix const> const raw(values.data() + l * s.tokens * s.width, s.tokens, s.width);
      matrix const x = raw.rowwise() - raw.colwise().mean();
      grams.push_back(x * x.transpose());
    }
    matrix table(s.sites, s.sites);
    for (std::ptrdiff_t p = 0; p < s.sites; ++p)
      for (std::ptrdiff_t q = 0; q < s.sites; ++q)
        table(p, q) = grams[static_cast<std::size_t>(p)]
                          .cwiseProduct(grams[static_cast<std::size_t>(q)])
                          .sum();
    benchmark::DoNotOptimize(table.data());
  });
}

/// HSIC₁(K, K) of a Gram matrix from sums of its entries, as the textbook has it.
template <class Matrix>
double self_term(Matrix gram) {
  using scalar = typename Matrix::Scalar;
  scalar const n = static_cast<scalar>(gram.rows());
  gram.diagonal().setZero();
  Eigen::Array<scalar, Eigen::Dynamic, 1> const rows = gram.rowwise().sum();
  scalar const all = rows.sum();
  return static_cast<double>(gram.squaredNorm() + all * all / ((n - 1) * (n - 2)) -
                             2 / (n - 2) * rows.square().sum());
}

/// Relative errors of the debiased self term of 32 tokens × 1024 features, N(c, 1), over 20 draws: no
/// timing, but what centring is worth.
void far_from_the_origin(benchmark::State& state) {
  std::vector<double> textbook, ours;
  double negative = 0;
  for ([[maybe_unused]] auto _ : state)
    for (unsigned seed = 1; seed <= 20; ++seed) {
      std::mt19937 bits(seed);
      std::normal_distribution<double> normal(static_cast<double>(state.range(0)));
      Eigen::MatrixXf const x =
          Eigen::MatrixXf::NullaryExpr(32, 1024, [&] { return static_cast<float>(normal(bits)); });
      Eigen::MatrixXd const wide = x.cast<double>();
      Eigen::MatrixXd const centred = wide.rowwise() - wide.colwise().mean();
      double const exact = self_term<Eigen::MatrixXd>(centred * centred.transpose());
      double const plain = self_term<Eigen::MatrixXf>(x * x.transpose());
      rflow::gram_moments const m =
          RFLOW_BENCH_BACKEND{}.gram(rflow::linear{}, rflow::layer_stack<float>{rflow::as_view(x)});
      textbook.push_back(std::abs(plain / exact - 1));
      ours.push_back(std::abs(rflow::debiased::hsic(m, 0, 0) / exact - 1));
      negative += plain < 0;
    }
  std::nth_element(textbook.begin(), textbook.begin() + 10, textbook.end());
  state.counters["textbook_median"] = textbook[10];
  state.counters["negative"] = negative;
  state.counters["largest"] = *std::max_element(ours.begin(), ours.end());
}

void sizes(benchmark::internal::Benchmark* b) {
  b->Args({33, 2048, 2560})->Args({13, 4096, 768})->UseManualTime()->Iterations(3);
  b->Unit(benchmark::kMillisecond);
}

BENCHMARK(cka<float, rflow::linear>)->Apply(sizes)->Args({65, 2048, 2560});
BENCHMARK(cka<float, rflow::rbf>)->Apply(sizes);
BENCHMARK(cka<rflow::bf16, rflow::linear>)->Apply(sizes);
BENCHMARK(by_hand)
    ->Args({33, 2048, 2560})
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);
BENCHMARK(far_from_the_origin)->Arg(0)->Arg(1)->Arg(3)->Arg(10)->Arg(30)->Arg(300)->Iterations(1);

}  // namespace

BENCHMARK_MAIN();
