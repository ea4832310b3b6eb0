// SPDX-License-Identifier: Apache-2.0

// The flow pass against the rate at which this machine reads memory, measured in the same run, and
// against what a user would write by hand with Eigen.

#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include <benchmark/benchmark.h>

#include <Eigen/Core>

#include <rflow/flow.hpp>

#include "data.hpp"
#include "floor.hpp"

namespace {

constexpr std::ptrdiff_t sites = 33, tokens = 2048, width = 2560;

using rflow::bench::threads;

template <class T>
rflow::bench::tensor<T> const& activations() {
  static auto const values = rflow::bench::activations<T>(sites * tokens * width);
  return values;
}

/// Time per iteration, and the floor taken in between, so that both see the same machine.
template <class T, class Work>
void beside_the_floor(benchmark::State& state, Work&& work) {
  double const bytes = static_cast<double>(sites * tokens * width) * static_cast<double>(sizeof(T));
  rflow::detail::team team(threads());
  double best = 1e30, floor = 0;
  for (auto _ : state) {
    double const t0 = rflow::bench::seconds();
    work();
    double const elapsed = rflow::bench::seconds() - t0;
    best = std::min(best, elapsed);
    state.SetIterationTime(elapsed);
    floor = std::max(floor, rflow::bench::read_bandwidth(team, 1));
  }
  state.counters["GB/s"] = bytes / best * 1e-9;
  state.counters["floor_GB/s"] = floor * 1e-9;
  state.counters["of_floor"] = bytes / best / floor;
}

template <class T>
void flow(benchmark::State& state) {
  rflow::layer_stack<T> const stack(activations<T>().data(), {sites, tokens, width});
  rflow::on_cpu const on{.threads = threads()};
  beside_the_floor<T>(state, [&] { benchmark::DoNotOptimize(rflow::flow(stack, {}, on)); });
}

/// Three quantities only (St1, St2, inter-token), a line of Eigen each.
void by_hand(benchmark::State& state) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  std::vector<Eigen::Map<matrix const>> x;
  for (std::ptrdiff_t l = 0; l < sites; ++l)
    x.emplace_back(activations<float>().data() + l * tokens * width, tokens, width);
  beside_the_floor<float>(state, [&] {
    float st1 = 0, st2 = 0, cosines = 0;
    matrix mean = x[0];
    for (std::size_t l = 1; l < x.size(); ++l) {
      st1 += (x[l] - x[l - 1]).squaredNorm();
      mean += x[l];
    }
    mean /= static_cast<float>(sites);
    for (auto const& layer : x) {
      st2 += (layer - mean).squaredNorm();
      matrix const unit = layer.rowwise().normalized();
      cosines += unit.colwise().sum().squaredNorm();
    }
    benchmark::DoNotOptimize(st1 + st2 + cosines);
  });
}

BENCHMARK(flow<float>)->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(9);
BENCHMARK(flow<rflow::bf16>)->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(9);
BENCHMARK(flow<rflow::f16>)->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(9);
BENCHMARK(by_hand)->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(3);

}  // namespace

BENCHMARK_MAIN();
