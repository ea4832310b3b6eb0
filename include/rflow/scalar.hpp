// SPDX-License-Identifier: Apache-2.0
#pragma once

// What activations may be stored as: float, double, and the 16-bit types of other libraries by their bits.

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

// Functors shared by g++ and nvcc need the annotation; it is gone again at the end of the file.
#ifdef __CUDACC__
#define RFLOW_HD __host__ __device__
#else
#define RFLOW_HD
#endif

namespace rflow {

/// IEEE 754 binary16, as stored. Converts to float exactly; every metric widens it first.
struct f16 {
  std::uint16_t bits;  ///< sign, 5 bits of exponent, 10 of fraction

  /// The exact value as float; NaN and infinity are kept. Integer steps and one exact subtraction,
  /// so that it vectorises and subnormals survive flush-to-zero.
  RFLOW_HD constexpr operator float() const {
    std::uint32_t const magnitude = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
    std::uint32_t const sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    std::uint32_t const normal = magnitude + (112u << 23);
    std::uint32_t const special = magnitude + (224u << 23);
    std::uint32_t const subnormal = __builtin_bit_cast(
        std::uint32_t, __builtin_bit_cast(float, magnitude + (113u << 23)) - 0x1p-14f);
    std::uint32_t const value = magnitude < (1u << 23)       ? subnormal
                                : magnitude >= (0x1fu << 23) ? special
                                                             : normal;
    return __builtin_bit_cast(float, value | sign);
  }

  /// The nearest binary16, ties to even; too large becomes infinity.
  static constexpr f16 nearest(float x) {
    std::uint32_t const in = std::bit_cast<std::uint32_t>(x);
    auto const sign = static_cast<std::uint16_t>((in >> 16) & 0x8000u);
    std::uint32_t const magnitude = in & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {
      // Below 2^-14 the spacing is 2^-24: adding 2^-1 rounds to it in float arithmetic.
      float const rounded = std::bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(rounded) & 0x7ffu))};
    }
    std::uint32_t const odd = (magnitude >> 13) & 1u;
    std::uint32_t const rounded = magnitude - (112u << 23) + 0xfffu + odd;
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
  }
};

/// bfloat16: the upper half of a float, as stored.
struct bf16 {
  std::uint16_t bits;  ///< sign, 8 bits of exponent, 7 of fraction

  /// The exact value as float.
  RFLOW_HD constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }

  /// The nearest bfloat16, ties to even.
  static constexpr bf16 nearest(float x) {
    std::uint32_t const in = std::bit_cast<std::uint32_t>(x);
    if ((in & 0x7fffffffu) > 0x7f800000u)
      return {static_cast<std::uint16_t>((in >> 16) | 0x40u)};  // keep it a NaN
    return {static_cast<std::uint16_t>((in + 0x7fffu + ((in >> 16) & 1u)) >> 16)};
  }
};

namespace detail {

/// A type of another library that may hold the bits of a 16-bit float.
template <class Other>
concept sixteen_bits = sizeof(Other) == 2 && std::is_trivially_copyable_v<Other> &&
                       (!std::is_integral_v<Other> || std::same_as<Other, std::uint16_t>);

}  // namespace detail

/// Another library's binary16 where it lies, without a copy: _Float16, __half, Eigen::half, or bits in
/// std::uint16_t.
///
///     rflow::view(rflow::as_f16(pointer), tokens, hidden)
template <detail::sixteen_bits Other>
requires(!std::same_as<Other, bf16>) f16 const* as_f16(Other const* values) noexcept {
  return reinterpret_cast<f16 const*>(values);
}

/// The same for bfloat16: __bf16, __nv_bfloat16, Eigen::bfloat16, or bits in std::uint16_t.
template <detail::sixteen_bits Other>
requires(!std::same_as<Other, f16>) bf16 const* as_bf16(Other const* values) noexcept {
  return reinterpret_cast<bf16 const*>(values);
}

/// What activations may be stored as.
template <class T>
concept scalar = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, f16> ||
    std::same_as<T, bf16>;

/// What products of T are formed in: double for double, float for the rest. Sums over tokens and
/// every statistic are double whatever T is.
template <scalar T>
using compute_t = std::conditional_t<std::same_as<T, double>, double, float>;

namespace detail {

/// A NaN test on bits, so that it also holds in a translation unit built with -ffast-math.
RFLOW_HD constexpr bool is_finite(double x) {
  return (__builtin_bit_cast(std::uint64_t, x) & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}
RFLOW_HD constexpr bool is_finite(float x) {
  return (__builtin_bit_cast(std::uint32_t, x) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace detail

}  // namespace rflow

#undef RFLOW_HD
