// SPDX-License-Identifier: Apache-2.0

// The monitor against the least that it must move: every pushed row read once, the row of the site
// before and the running mean read and written once. That floor is measured by loops which do just
// that, on the same arrays, in the same run. An engine's pattern: all sites of one micro-batch of
// tokens, then of the next.

#include <cstdio>
#include <ctime>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include <Eigen/Core>

#include <rflow/monitor.hpp>

#include "data.hpp"
#include "floor.hpp"

namespace {

constexpr std::ptrdiff_t sites = 33, tokens = 2048, width = 2560;

using rflow::bench::tensor;

template <class T>
tensor<T> const& activations() {
  static auto const values = rflow::bench::activations<T>(sites * tokens * width);
  return values;
}

/// Of all threads of this program.
double processor_seconds() {
  return static_cast<double>(std::clock()) / static_cast<double>(CLOCKS_PER_SEC);
}

/// previous = rows, mean += weight · previous: what must move, and no more.
template <class T>
void move_rows(T const* rows, T* previous, float* mean, std::ptrdiff_t count, float weight) {
  using words = Eigen::Array<std::uint32_t, Eigen::Dynamic, 1>;
  std::ptrdiff_t const n = count * static_cast<std::ptrdiff_t>(sizeof(T)) / 4;
  constexpr std::ptrdiff_t block = 4096;
  for (std::ptrdiff_t i = 0; i < n; i += block) {
    std::ptrdiff_t const here = std::min(block, n - i);
    Eigen::Map<words> kept(reinterpret_cast<std::uint32_t*>(previous) + i, here);
    Eigen::Map<words const> row(reinterpret_cast<std::uint32_t const*>(rows) + i, here);
    kept += row;
    std::ptrdiff_t const each = static_cast<std::ptrdiff_t>(4 / sizeof(T));
    Eigen::Map<Eigen::ArrayXf>(mean + i * each, here * each) *= weight;
  }
}

/// @param batch  tokens of a micro-batch
template <class T>
void monitor(benchmark::State& state) {
  std::ptrdiff_t const batch = state.range(0);
  int const threads = static_cast<int>(state.range(1));
  auto const& values = activations<T>();
  auto const rows = [&](std::ptrdiff_t l, std::ptrdiff_t first) {
    return values.data() + (l * tokens + first) * width;
  };
  rflow::flow_monitor<T> watch(sites, width, {}, rflow::on_cpu{.threads = threads});
  watch.reserve(batch);
  rflow::detail::team team(threads);
  tensor<T> previous(static_cast<std::size_t>(batch * width));
  tensor<float> mean(previous.size(), 1.f);
  double best = 1e30, floor = 1e30, best_cpu = 1e30, floor_cpu = 1e30;
  for (auto _ : state) {
    double t0 = rflow::bench::seconds(), c0 = processor_seconds();
    for (std::ptrdiff_t first = 0; first < tokens; first += batch)
      for (std::ptrdiff_t l = 0; l < sites; ++l)
        watch.push(l, first, rflow::view<T>(rows(l, first), batch, width));
    watch.end_sequence();
    double const elapsed = rflow::bench::seconds() - t0;
    best = std::min(best, elapsed);
    best_cpu = std::min(best_cpu, processor_seconds() - c0);
    state.SetIterationTime(elapsed);

    t0 = rflow::bench::seconds(), c0 = processor_seconds();
    for (std::ptrdiff_t first = 0; first < tokens; first += batch)
      for (std::ptrdiff_t l = 0; l < sites; ++l) {
        std::ptrdiff_t const slices = std::clamp<std::ptrdiff_t>(batch / 32, 1, 16);
        team.run(slices, [&](std::ptrdiff_t s) {
          std::ptrdiff_t const i = batch * s / slices, end = batch * (s + 1) / slices;
          move_rows(rows(l, first) + i * width, previous.data() + i * width,
                    mean.data() + i * width, (end - i) * width, 0.999f);
        });
      }
    floor = std::min(floor, rflow::bench::seconds() - t0);
    floor_cpu = std::min(floor_cpu, processor_seconds() - c0);
  }
  if (!watch.error().empty()) state.SkipWithError(watch.error().data());
  double const bytes = static_cast<double>(sites * tokens * width);
  state.counters["read_GB/s"] = bytes * static_cast<double>(sizeof(T)) / best * 1e-9;
  state.counters["floor_ms"] = floor * 1e3;
  state.counters["times_floor"] = best / floor;
  state.counters["by_cpu_time"] = best_cpu / floor_cpu;  // less disturbed by other jobs
}

/// With CKA: beside the multiply-adds of half a 256 × 256 kernel a batch and site.
void monitor_cka(benchmark::State& state) {
  int const threads = static_cast<int>(state.range(0));
  auto const& values = activations<float>();
  rflow::detail::team team(threads);
  double best = 1e30, peak = 0;
  for (auto _ : state) {
    rflow::flow_monitor<float> watch(sites, width, {.cka = true},
                                     rflow::on_cpu{.threads = threads});
    watch.reserve(512);
    double const t0 = rflow::bench::seconds();
    for (std::ptrdiff_t first = 0; first < tokens; first += 512)
      for (std::ptrdiff_t l = 0; l < sites; ++l)
        watch.push(l, first,
                   rflow::view<float>(values.data() + (l * tokens + first) * width, 512, width));
    watch.end_sequence();
    double const elapsed = rflow::bench::seconds() - t0;
    best = std::min(best, elapsed);
    state.SetIterationTime(elapsed);
    peak = std::max(peak, rflow::bench::fma_peak(team, 1));
  }
  double const flops = static_cast<double>(sites * tokens * width) * 256;  // lower halves
  state.counters["of_peak"] = flops / best / peak;
}

BENCHMARK(monitor<float>)
    ->Args({512, 1})
    ->Args({512, 2})
    ->Args({2048, 1})
    ->Args({1, 1})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(7);
BENCHMARK(monitor<rflow::bf16>)
    ->Args({512, 1})
    ->Args({512, 2})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(7);
BENCHMARK(monitor_cka)
    ->Arg(1)
    ->Arg(2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(3);

}  // namespace

BENCHMARK_MAIN();
