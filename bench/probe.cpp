// SPDX-License-Identifier: Apache-2.0

// Softmax probes against the rate of fp32 multiply-adds out of registers, measured in the same run.
// Useful operations are those of the two products: 4 · tokens · features · classes · seeds an epoch.
// Beside it, what a user would write by hand with Eigen: one product each way for all seeds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include <Eigen/Core>

#include <rflow/probe.hpp>

#include "beside.hpp"
#include "data.hpp"

namespace {

struct shape {
  std::ptrdiff_t sites, tokens, width, classes, seeds;
};

using rflow::bench::next_bits;
using rflow::bench::threads;

template <class T>
rflow::bench::tensor<T> activations(shape const& s) {
  return rflow::bench::activations<T>(s.sites * s.tokens * s.width);
}

std::vector<int> labels(shape const& s) {
  std::vector<int> out;
  for (std::ptrdiff_t i = 0; i < s.tokens; ++i)
    out.push_back(static_cast<int>((i + (next_bits() >> 30)) % s.classes));
  return out;
}

shape shape_of(benchmark::State const& state) {
  return {state.range(0), state.range(1), state.range(2), state.range(3), state.range(4)};
}

/// The median time over the iterations, beside the peak taken around each of them.
template <class Work>
void beside_the_peak(benchmark::State& state, shape const& s, int epochs, Work&& work) {
  double const useful = 4 * static_cast<double>(s.sites * s.tokens * s.width) *
                        static_cast<double>(s.classes * s.seeds) * epochs;
  state.counters["epoch_s"] = rflow::bench::beside_the_peak(state, useful, work) / epochs;
}

/// The whole of probe_layers: splits, initial weights and the preparation of the features included.
template <class T, int Epochs>
void probe(benchmark::State& state) {
  shape const s = shape_of(state);
  rflow::bench::tensor<T> const values = activations<T>(s);
  std::vector<int> const y = labels(s);
  rflow::layer_stack<T> const stack(values.data(), {s.sites, s.tokens, s.width});
  rflow::probe_options const options{.epochs = Epochs, .seeds = static_cast<int>(s.seeds)};
  beside_the_peak(state, s, Epochs, [&] {
    benchmark::DoNotOptimize(
        rflow::probe_layers(stack, y, options, rflow::on_cpu{.threads = threads()}));
  });
}

void by_hand(benchmark::State& state) {
  using matrix = Eigen::MatrixXf;
  shape const s = shape_of(state);
  rflow::bench::tensor<float> const values = activations<float>(s);
  std::vector<int> const y = labels(s);
  Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> const> const x(
      values.data(), s.tokens, s.width);
  constexpr int epochs = 3;
  beside_the_peak(state, s, epochs, [&] {
    matrix w = matrix::Zero(s.width, s.classes * s.seeds), m = w, v = w;
    for (int e = 1; e <= epochs; ++e) {
      matrix z = x * w;
      for (std::ptrdiff_t p = 0; p < s.seeds; ++p) {
        auto mine = z.middleCols(p * s.classes, s.classes);
        mine.colwise() -= mine.rowwise().maxCoeff().eval();
        mine = mine.array().exp();
        mine.array().colwise() /= mine.rowwise().sum().eval().array();
        for (std::ptrdiff_t i = 0; i < s.tokens; ++i) mine(i, y[static_cast<std::size_t>(i)]) -= 1;
      }
      matrix const g = x.transpose() * z / static_cast<float>(s.tokens);
      m = 0.9f * m + 0.1f * g;
      v = 0.999f * v + 0.001f * g.cwiseAbs2();
      float const rate = 0.05f / (1 - std::pow(0.9f, static_cast<float>(e)));
      float const root = std::sqrt(1 - std::pow(0.999f, static_cast<float>(e)));
      w.array() -= rate * m.array() / (v.array().sqrt() / root + 1e-8f);
    }
    benchmark::DoNotOptimize(w.data());
  });
}

void settings(benchmark::internal::Benchmark* b) {
  b->UseManualTime()->Iterations(3)->Unit(benchmark::kMillisecond);
}

// sites, tokens, features, classes, seeds
BENCHMARK(probe<float, 20>)->Args({1, 4096, 2560, 100, 5})->Apply(settings);
BENCHMARK(probe<rflow::bf16, 20>)->Args({1, 4096, 2560, 100, 5})->Apply(settings);
BENCHMARK(probe<rflow::f16, 20>)->Args({1, 4096, 2560, 100, 5})->Apply(settings);
BENCHMARK(probe<float, 150>)->Args({1, 4096, 2560, 10, 5})->Apply(settings);
BENCHMARK(probe<float, 150>)->Args({13, 512, 768, 10, 5})->Apply(settings);
BENCHMARK(by_hand)->Args({1, 4096, 2560, 100, 5})->Apply(settings)->Iterations(1);

}  // namespace

BENCHMARK_MAIN();
