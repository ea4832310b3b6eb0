// SPDX-License-Identifier: Apache-2.0

// The layer × layer CKA matrix against the rate of fp32 multiply-adds out of registers, measured in
// the same run. Useful operations are n² d a site: the lower half of its Gram matrix. Beside it, what
// a user would write by hand with Eigen: each Gram matrix once, and a sum for each pair.

#include <algorithm>
#include <cmath>
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

}  // namespace

BENCHMARK_MAIN();
