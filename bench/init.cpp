// SPDX-License-Identifier: Apache-2.0

// Drawing a 4096 × 4096 matrix with all threads, beside writing the same memory with a constant: the
// least that filling it can take.

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include <rflow/init.hpp>

namespace {

constexpr std::ptrdiff_t side = 4096;

template <class T>
void draw(benchmark::State& state, rflow::initializer const& how) {
  std::vector<T> x(static_cast<std::size_t>(side * side));
  for (auto _ : state) {
    rflow::draw(how, {1}, x.data(), side, side, side);
    benchmark::DoNotOptimize(x.data());
  }
  state.counters["values/s"] =
      benchmark::Counter(static_cast<double>(side * side) * static_cast<double>(state.iterations()),
                         benchmark::Counter::kIsRate);
}

void fill(benchmark::State& state) {
  std::vector<float> x(static_cast<std::size_t>(side * side));
  rflow::detail::team team(std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  float value = 0;
  for (auto _ : state) {
    value += 1;
    team.run(side / 16,
             [&](std::ptrdiff_t i) { std::fill_n(x.data() + i * 16 * side, 16 * side, value); });
    benchmark::DoNotOptimize(x.data());
  }
  state.counters["values/s"] =
      benchmark::Counter(static_cast<double>(side * side) * static_cast<double>(state.iterations()),
                         benchmark::Counter::kIsRate);
}

void register_all() {
  auto const add = [](char const* name, auto f) {
    benchmark::RegisterBenchmark(name, f)->UseRealTime()->Unit(benchmark::kMillisecond);
  };
  add("fill", fill);
  add("uniform/float", [](benchmark::State& s) { draw<float>(s, rflow::uniform(-1, 1)); });
  add("normal/float", [](benchmark::State& s) { draw<float>(s, rflow::gaussian(1)); });
  add("normal/double", [](benchmark::State& s) { draw<double>(s, rflow::gaussian(1)); });
  add("normal/bf16", [](benchmark::State& s) { draw<rflow::bf16>(s, rflow::gaussian(1)); });
  add("truncated_normal/float",
      [](benchmark::State& s) { draw<float>(s, rflow::truncated_normal(1, -2, 2)); });
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  register_all();
  benchmark::RunSpecifiedBenchmarks();
}
