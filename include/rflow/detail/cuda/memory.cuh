// SPDX-License-Identifier: Apache-2.0
#pragma once

// Memory of a device, asked for once: places that are counted first and looked up later.

#include <algorithm>
#include <cstddef>
#include <limits>

#include <cuda_runtime.h>

namespace rflow::detail::passes {

using integer = std::ptrdiff_t;

__host__ __device__ constexpr integer ceil_div(integer a, integer b) { return (a + b - 1) / b; }
__host__ __device__ constexpr integer round_up(integer a, integer b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr integer smaller(integer a, integer b) { return a < b ? a : b; }

// Functions of the standard library are not for device code; their values are.
inline constexpr double missing = std::numeric_limits<double>::quiet_NaN();

inline std::size_t size_of(integer count) { return static_cast<std::size_t>(count); }

/// Places in memory that is yet to be asked for.
class arena {
  static constexpr integer alignment = 256;

 public:
  template <class V>
  struct place {
    std::size_t at = 0;
  };

  template <class V>
  place<V> reserve(integer count) {
    std::size_t const at = bytes_;
    bytes_ += size_of(round_up(std::max<integer>(count, 1) * integer{sizeof(V)}, alignment));
    return {at};
  }

  std::size_t bytes() const { return bytes_; }
  void settle(std::byte* base) { base_ = base; }

  template <class V>
  V* operator[](place<V> where) const {
    return reinterpret_cast<V*>(base_ + where.at);
  }

 private:
  std::size_t bytes_ = 0;
  std::byte* base_ = nullptr;
};

}  // namespace rflow::detail::passes
