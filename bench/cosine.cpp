// SPDX-License-Identifier: Apache-2.0

// Cosines of one layer and of two against the rate at which this machine reads memory, measured in the
// same run, and against what a user would write by hand: a double loop over tokens, a line or two of Eigen.
// Each with its error against the same in double.

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <Eigen/Core>

#include <rflow/cosine.hpp>

#include "beside.hpp"
#include "data.hpp"

namespace {

constexpr std::ptrdiff_t width = 2560;

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Two layers of so many tokens; the second is the first and something on top.
template <class T>
struct layers {
  rflow::bench::tensor<T> first, second;
  std::ptrdiff_t tokens;

  explicit layers(std::ptrdiff_t n)
      : first(rflow::bench::activations<T>(n * width, 0.5f)), second(first), tokens(n) {
    for (T& v : second) {
      float const x =
          static_cast<float>(v) + static_cast<float>(rflow::bench::next_bits() >> 8) * 0x1p-25f;
      if constexpr (sizeof(T) == 2)
        v = T::nearest(x);
      else
        v = x;
    }
  }

  rflow::view<T> x() const { return {first.data(), tokens, width}; }
  rflow::view<T> y() const { return {second.data(), tokens, width}; }
};

template <class T>
double dot(T const* a, T const* b) {
  double sum = 0;
  for (std::ptrdiff_t j = 0; j < width; ++j)
    sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  return sum;
}

template <class T>
double inter_token_in_double(layers<T> const& data) {
  std::vector<double> sum(static_cast<std::size_t>(width));
  double const n = static_cast<double>(data.tokens);
  for (std::ptrdiff_t i = 0; i < data.tokens; ++i) {
    T const* const row = data.first.data() + i * width;
    double const norm = std::sqrt(dot(row, row));
    for (std::size_t j = 0; j < sum.size(); ++j) sum[j] += static_cast<double>(row[j]) / norm;
  }
  return (dot(sum.data(), sum.data()) - n) / (n * (n - 1));
}

template <class T>
double adjacent_in_double(layers<T> const& data) {
  double sum = 0;
  for (std::ptrdiff_t i = 0; i < data.tokens; ++i) {
    T const *const a = data.first.data() + i * width, *const b = data.second.data() + i * width;
    sum += dot(a, b) / std::sqrt(dot(a, a) * dot(b, b));
  }
  return sum / static_cast<double>(data.tokens);
}

/// @param reads  how many layers are read
template <class T, class Work>
void beside_the_floor(benchmark::State& state, int reads, double exact, Work&& work) {
  double const bytes =
      static_cast<double>(reads * state.range(0) * width) * static_cast<double>(sizeof(T));
  double value = 0;
  rflow::bench::beside_the_floor(state, bytes, [&] { value = work(); });
  state.counters["error"] = std::abs(value - exact);
}

template <class T>
void inter_token(benchmark::State& state) {
  layers<T> const data(state.range(0));
  rflow::on_cpu const on{.threads = rflow::bench::threads()};
  beside_the_floor<T>(state, 1, inter_token_in_double(data),
                      [&] { return rflow::inter_token_cosine(data.x(), on).value; });
}

void inter_token_by_hand(benchmark::State& state) {
  layers<float> const data(state.range(0));
  Eigen::Map<matrix const> const x(data.first.data(), data.tokens, width);
  float const n = static_cast<float>(data.tokens);
  beside_the_floor<float>(state, 1, inter_token_in_double(data), [&] {
    matrix const unit = x.rowwise().normalized();  // within the next line, once for every column
    return (unit.colwise().sum().squaredNorm() - n) / (n * (n - 1));
  });
}

void inter_token_double_loop(benchmark::State& state) {
  layers<float> const data(state.range(0));
  Eigen::Map<matrix const> const x(data.first.data(), data.tokens, width);
  beside_the_floor<float>(state, 1, inter_token_in_double(data), [&] {
    float sum = 0;
    for (std::ptrdiff_t i = 0; i < data.tokens; ++i)
      for (std::ptrdiff_t k = i + 1; k < data.tokens; ++k)
        sum += x.row(i).dot(x.row(k)) / (x.row(i).norm() * x.row(k).norm());
    return 2 * sum / static_cast<float>(data.tokens * (data.tokens - 1));
  });
}

template <class T>
void adjacent(benchmark::State& state) {
  layers<T> const data(state.range(0));
  rflow::on_cpu const on{.threads = rflow::bench::threads()};
  beside_the_floor<T>(state, 2, adjacent_in_double(data),
                      [&] { return rflow::adjacent_cosine(data.x(), data.y(), on).mean.value; });
}

void adjacent_by_hand(benchmark::State& state) {
  layers<float> const data(state.range(0));
  Eigen::Map<matrix const> const x(data.first.data(), data.tokens, width);
  Eigen::Map<matrix const> const y(data.second.data(), data.tokens, width);
  beside_the_floor<float>(state, 2, adjacent_in_double(data), [&] {
    return (x.cwiseProduct(y).rowwise().sum().array() /
            (x.rowwise().norm().array() * y.rowwise().norm().array()))
        .mean();
  });
}

/// 2048 tokens fit into a large cache, 16384 do not.
void sizes(benchmark::internal::Benchmark* b) {
  b->Arg(2048)->Arg(16384)->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(9);
}

BENCHMARK(inter_token<float>)->Apply(sizes);
BENCHMARK(inter_token<rflow::bf16>)->Apply(sizes);
BENCHMARK(inter_token_by_hand)->Apply(sizes);
BENCHMARK(inter_token_double_loop)
    ->Arg(2048)
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(adjacent<float>)->Apply(sizes);
BENCHMARK(adjacent<rflow::bf16>)->Apply(sizes);
BENCHMARK(adjacent_by_hand)->Apply(sizes);

}  // namespace

BENCHMARK_MAIN();
