// SPDX-License-Identifier: Apache-2.0
#pragma once

// A benchmark's work beside what the machine can do, both measured in the same run.

#include <algorithm>
#include <vector>

#include <benchmark/benchmark.h>

#include "data.hpp"
#include "floor.hpp"

namespace rflow::bench {

/// Share of the multiply-add peak, measured around every repetition: counter of_peak, the median.
/// @param  flops  useful operations of work(), a multiply-add being two
/// @return median seconds
template <class Work>
double beside_the_peak(benchmark::State& state, double flops, Work&& work) {
  rflow::detail::team team(threads());
  std::vector<double> shares, times;
  for (auto _ : state) {
    double const before = fma_peak(team, 3);
    double const t0 = seconds();
    work();
    double const elapsed = seconds() - t0;
    double const peak = (std::max)(before, fma_peak(team, 3));
    state.SetIterationTime(elapsed);
    times.push_back(elapsed);
    shares.push_back(flops / elapsed / peak);
  }
  std::sort(times.begin(), times.end());
  std::sort(shares.begin(), shares.end());
  state.counters["of_peak"] = shares[shares.size() / 2];
  return times[times.size() / 2];
}

/// Share of the rate at which memory is read: counters GB/s and of_floor, of the best repetition.
/// @param bytes  that work() has to read
template <class Work>
void beside_the_floor(benchmark::State& state, double bytes, Work&& work) {
  rflow::detail::team team(threads());
  double best = 1e30, floor = read_bandwidth(team, 3);
  for (auto _ : state) {
    double const t0 = seconds();
    work();
    double const elapsed = seconds() - t0;
    best = (std::min)(best, elapsed);
    state.SetIterationTime(elapsed);
  }
  floor = (std::max)(floor, read_bandwidth(team, 3));
  state.counters["GB/s"] = bytes / best * 1e-9;
  state.counters["of_floor"] = bytes / best / floor;
}

}  // namespace rflow::bench
