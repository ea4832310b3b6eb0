// SPDX-License-Identifier: Apache-2.0
#pragma once

// Loads as many features as one load brings, widened.

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <rflow/detail/cpu/packet.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

// Packets are builtin vector types, whose attributes g++ reports as lost in template arguments.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

/// As many features as one load brings: 16-bit features come two to a lane, hence two packets.
template <class T>
struct chunk {
  static constexpr std::ptrdiff_t lanes = lanes_v<compute_t<T>>;
  static constexpr std::ptrdiff_t packets = sizeof(T) == 2 && lanes > 1 ? 2 : 1;
  static constexpr std::ptrdiff_t width = packets * lanes;

  packet_t<compute_t<T>> at[packets];
};

/// Lanes whose upper half holds a 16-bit value, as float.
template <class T, class P, class Int>
P widened_lanes(Int const& upper_half) {
  if constexpr (std::same_as<T, bf16>) {
    return packet::preinterpret<P>(upper_half);
  } else {
    // As f16 does it: sign apart, rebias the exponent as an integer. A subnormal becomes normal by
    // one exact subtraction of normal floats, so that it survives flush-to-zero; what was infinite
    // or NaN then stands at 2^16 or above and gets its exponent bits back.
    auto const constant = [](std::int32_t x) { return packet::pset1<Int>(x); };
    auto const number = [](float x) { return packet::pset1<P>(x); };
    Int const sign = packet::pand(upper_half, constant((std::numeric_limits<int>::min)()));
    Int const magnitude =
        packet::plogical_shift_right<3>(packet::pand(upper_half, constant(0x7fff0000)));
    P const normal = packet::preinterpret<P>(packet::padd(magnitude, constant(112 << 23)));
    P const subnormal = packet::psub(
        packet::preinterpret<P>(packet::padd(magnitude, constant(113 << 23))), number(0x1p-14f));
    P const value = packet::pselect(packet::pcmp_lt(normal, number(0x1p-14f)), subnormal, normal);
    P const special = packet::pand(packet::pcmp_le(number(65536.0f), value),
                                   number(std::numeric_limits<float>::infinity()));
    return packet::por(packet::por(value, special), packet::preinterpret<P>(sign));
  }
}

/// Whether the instruction set widens f16 by itself. It does so exactly, subnormals too, whatever is
/// flushed to zero.
template <class T, class P>
inline constexpr bool widens = std::same_as<T, f16>&& widens_halves<P>;

/// A chunk widened to compute_t<T>. 16-bit features may come out permuted, the same way for every
/// row: inner products do not care, and place_of() says which is which.
template <class T>
chunk<T> load_chunk(T const* from) {
  using P = packet_t<compute_t<T>>;
  if constexpr (widens<T, P>) {
    P const both = packet::ploadu<P>(reinterpret_cast<float const*>(from));
    return {{widened_halves<0>(both), widened_halves<1>(both)}};
  } else if constexpr (chunk<T>::packets == 2) {
    using Int = integer_packet_t<P>;
    Int const both = packet::ploadu<Int>(reinterpret_cast<std::int32_t const*>(from));
    Int const upper = packet::pset1<Int>(static_cast<std::int32_t>(0xffff0000u));
    P const low = widened_lanes<T, P, Int>(packet::plogical_shift_left<16>(both));
    P const high = widened_lanes<T, P, Int>(packet::pand(both, upper));
    constexpr bool low_first = std::endian::native == std::endian::little;
    return {{low_first ? low : high, low_first ? high : low}};
  } else if constexpr (std::same_as<T, compute_t<T>>) {
    return {{packet::ploadu<P>(from)}};
  } else {
    return {{static_cast<P>(*from)}};
  }
}

/// Where feature j stands in a row read by load_chunk.
template <class T>
std::ptrdiff_t place_of(std::ptrdiff_t j) {
  if constexpr (chunk<T>::packets == 1 || widens<T, packet_t<compute_t<T>>>) return j;
  std::ptrdiff_t const within = j % chunk<T>::width;
  return j - within + within % 2 * chunk<T>::lanes + within / 2;
}

#pragma GCC diagnostic pop

}  // namespace rflow::detail
