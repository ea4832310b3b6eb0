// SPDX-License-Identifier: Apache-2.0
#pragma once

// Vectors of values as the processor has them: Eigen's packets, under names of ours. Of the rooms only this
// one names Eigen's internals or an instruction.

#include <Eigen/Core>

#include <algorithm>
#include <cstddef>
#include <utility>

#include <rflow/detail/cpu/memory.hpp>

namespace rflow::detail {

/// The operations on packets that the rooms use.
namespace packet {
using Eigen::internal::pabs;
using Eigen::internal::padd;
using Eigen::internal::pand;
using Eigen::internal::pcmp_eq;
using Eigen::internal::pcmp_le;
using Eigen::internal::pcmp_lt;
using Eigen::internal::pdiv;
using Eigen::internal::pexp;
using Eigen::internal::pload;
using Eigen::internal::ploadu;
using Eigen::internal::plogical_shift_left;
using Eigen::internal::plogical_shift_right;
using Eigen::internal::pmadd;
using Eigen::internal::pmax;
using Eigen::internal::pmin;
using Eigen::internal::pmul;
using Eigen::internal::por;
using Eigen::internal::predux;
using Eigen::internal::predux_max;
using Eigen::internal::prefetch;
using Eigen::internal::preinterpret;
using Eigen::internal::pselect;
using Eigen::internal::pset1;
using Eigen::internal::psqrt;
using Eigen::internal::pstore;
using Eigen::internal::pstoreu;
using Eigen::internal::psub;
using Eigen::internal::ptranspose;
}  // namespace packet

/// The vector type of a scalar type.
template <class C>
using packet_t = typename Eigen::internal::packet_traits<C>::type;
template <class C>
inline constexpr integer lanes_v = Eigen::internal::packet_traits<C>::size;
/// Lanes of a vector type.
template <class P>
inline constexpr integer lanes_in = Eigen::internal::unpacket_traits<P>::size;
/// As many integers as P has floats.
template <class P>
using integer_packet_t = typename Eigen::internal::unpacket_traits<P>::integer_packet;

/// How many vectors the machine's registers hold.
inline constexpr integer vector_registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;

/// f(0), …, f(Count − 1) written out, so that arrays indexed by them stay in registers at any -O.
template <integer Count, class F>
EIGEN_ALWAYS_INLINE void unrolled(F const& f) {
  [&]<integer... Each>(std::integer_sequence<integer, Each...>) __attribute__((always_inline)) {
    (f(Each), ...);
  }
  (std::make_integer_sequence<integer, Count>{});
}

/// A store past the caches, where the instruction set has one. Threads share panels: storing into
/// lines that another core has read, an ordinary store waits for that core (ten times slower where
/// cores do not share a cache).
template <class C, class P>
EIGEN_ALWAYS_INLINE void stream(C* to, P const& x) {
  if constexpr (requires { _mm512_stream_ps(to, x); })
    _mm512_stream_ps(to, x);
  else if constexpr (requires { _mm512_stream_pd(to, x); })
    _mm512_stream_pd(to, x);
  else if constexpr (requires { _mm256_stream_ps(to, x); })
    _mm256_stream_ps(to, x);
  else if constexpr (requires { _mm256_stream_pd(to, x); })
    _mm256_stream_pd(to, x);
  else if constexpr (requires { _mm_stream_ps(to, x); })
    _mm_stream_ps(to, x);
  else if constexpr (requires { _mm_stream_pd(to, x); })
    _mm_stream_pd(to, x);
  else
    packet::pstore(to, x);
}

/// Whether the instruction set widens a packet of f16 by itself.
template <class P>
inline constexpr bool widens_halves = requires(P const& x) {
  _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_castps_si512(x)));
};
/// The lower (0) or upper (1) half of a packet full of f16, widened.
template <int Half, class P>
EIGEN_ALWAYS_INLINE P widened_halves(P const& x) {
  if constexpr (Half == 0)
    return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_castps_si512(x)));
  else
    return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(x), 1));
}

/// Copies whole packets, past the caches if others will read them.
template <class C>
void copy_packets(C const* from, integer count, bool shared, C* to) {
  using namespace packet;
  using P = packet_t<C>;
  if (shared)
    for (integer k = 0; k < count; k += lanes_v<C>) stream(to + k, P(pload<P>(from + k)));
  else
    for (integer k = 0; k < count; k += lanes_v<C>) pstore(to + k, pload<P>(from + k));
}

/// At most four lanes: larger transposes gain nothing here.
template <class C>
using small_packet_t = typename Eigen::internal::find_best_packet<C, 4>::type;
template <class C>
inline constexpr integer small_lanes = (std::min<integer>)(4, lanes_v<C>);

/// to = fromᵀ, a square of packets of the type of the first argument.
template <class P, class C>
void transpose(P const&, C const* from, integer from_ld, C* to, integer to_ld) {
  using namespace packet;
  constexpr int W = Eigen::internal::unpacket_traits<P>::size;
  Eigen::internal::PacketBlock<P, W> square;
  for (int w = 0; w < W; ++w) square.packet[w] = pload<P>(from + w * from_ld);
  if constexpr (W > 1) ptranspose(square);
  for (int w = 0; w < W; ++w) pstore(to + w * to_ld, square.packet[w]);
}

}  // namespace rflow::detail
