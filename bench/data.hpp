// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the benches measure on: cheap to draw, since only sizes matter to a time, with an offset where
// an error is measured too.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include <Eigen/Core>

namespace rflow::bench {

inline int threads() {
  return (std::max)(1, static_cast<int>(std::thread::hardware_concurrency()));
}

/// Aligned to 64 bytes as the tensors of runtimes are.
template <class T>
using tensor = std::vector<T, Eigen::aligned_allocator<T>>;

inline std::uint32_t next_bits() {
  static std::uint32_t bits = 1;
  return bits = bits * 1664525u + 1013904223u;
}

/// Uniform in ±2 about the offset.
template <class T>
tensor<T> activations(std::ptrdiff_t count, float offset = 0) {
  tensor<T> out(static_cast<std::size_t>(count));
  for (T& v : out) {
    float const x = offset + static_cast<float>(static_cast<std::int32_t>(next_bits())) * 0x1p-30f;
    if constexpr (sizeof(T) == 2)
      v = T::nearest(x);
    else
      v = static_cast<T>(x);
  }
  return out;
}

}  // namespace rflow::bench
