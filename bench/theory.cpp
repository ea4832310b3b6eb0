// SPDX-License-Identifier: Apache-2.0

// The simulation that holds the closed forms to account, at N = 64, d = 256: sequences per second
// through input, layer and St2, and the share of the fp32 multiply-add peak measured in the same run.
// And the closed forms themselves.

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include "../examples/theory_validation/statements.hpp"
#include "floor.hpp"

namespace {

using namespace validation;

extent const shape{
    .tokens = 64, .features = 256, .hidden = 1024, .channels = 512, .taps = 4, .states = 16};

template <class Layer, class... More>
void simulate(benchmark::State& state, More... more) {
  drawer draw(1);
  inputs const x(draw, shape.features, 1, 1u << 20);
  Layer const f(draw, shape, more...);
  rflow::detail::team team(std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  double const peak = rflow::bench::fma_peak(team);
  sampling const sample{team, 64, 8};
  std::vector<work> works(static_cast<std::size_t>(team.size()));
  double seconds = 0;
  for (auto _ : state) {
    double const start = rflow::bench::seconds();
    auto const seen = sample.run(1, [&](integer b, int thread, double* values) {
      work& w = works[static_cast<std::size_t>(thread)];
      integer const rows = sample.per_batch * shape.tokens;
      x.draw(b * rows, rows, 1, w.z, w.x);
      update_of(f, form::linear, w.x, w, w.update);
      values[0] = st2_square(w.x, w.update, w.after);
    });
    benchmark::DoNotOptimize(seen.data());
    seconds += rflow::bench::seconds() - start;
  }
  double const draws =
      static_cast<double>(sample.draws()) * static_cast<double>(state.iterations());
  state.counters["draws/s"] = draws / seconds;
  state.counters["share_of_peak"] = 2 * draws * (f.cost() + x.cost(shape.tokens)) / seconds / peak;
}

template <class Layer, class... More>
void closed_form(benchmark::State& state, More... more) {
  drawer draw(1);
  inputs const x(draw, shape.features, 1, 1u << 20);
  Layer const f(draw, shape, more...);
  wide const covariance = x.covariance();
  for (auto _ : state) benchmark::DoNotOptimize(f.closed_form(covariance).trace);
}

void register_all() {
  auto const add = [](char const* name, auto f) {
    benchmark::RegisterBenchmark(name, f)->UseRealTime()->Unit(benchmark::kMillisecond);
  };
  add("simulate/transformer", [](benchmark::State& s) { simulate<transformer>(s, false); });
  add("simulate/causal_transformer", [](benchmark::State& s) { simulate<transformer>(s, true); });
  add("simulate/mamba", [](benchmark::State& s) { simulate<mamba>(s); });
  add("closed_form/transformer", [](benchmark::State& s) { closed_form<transformer>(s, false); });
  add("closed_form/mamba", [](benchmark::State& s) { closed_form<mamba>(s); });
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  register_all();
  benchmark::RunSpecifiedBenchmarks();
}
