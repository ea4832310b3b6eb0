// SPDX-License-Identifier: Apache-2.0
#pragma once

// The micro-kernel: inner products of a strip of rows with a strip of columns, in registers.

#include <Eigen/Core>

#include <cstddef>
#include <numeric>

#include <rflow/detail/cpu/packet.hpp>

namespace rflow::detail {

/// Inner products of a strip of rows with a strip of columns, in registers.
///
/// Rows are packed side by side, depth by depth, and loaded as packets. Columns lie one after the
/// other and are read value by value: broadcasting costs nothing, so they need no interleaving.
///
/// A template over what machines differ in, so that the tile of each can be tested on any of them.
/// @tparam Packet     the vector type of a scalar type
/// @tparam Registers  how many of them fit the machine's registers
template <template <class> class Packet, integer Registers>
struct register_product {
  static constexpr bool many_registers = Registers >= 32;

  static constexpr bool wide(std::size_t bytes) { return bytes > 16; }

  /// Row packets × columns of the register tile: 3 × 8 accumulators where there are 32 registers,
  /// 3 × 4 of 16; with packets of 16 bytes 4 × 4 and 2 × 4. Whole column strips fit a row strip.
  template <class C>
  static constexpr integer packets = wide(sizeof(Packet<C>)) ? 3
                                     : many_registers        ? 4
                                                             : 2;
  template <class C>
  static constexpr integer lanes = lanes_in<Packet<C>>;
  template <class C>
  static constexpr integer rows = packets<C>* lanes<C>;
  template <class C>
  static constexpr integer cols = std::gcd(rows<C>,
                                           many_registers&& wide(sizeof(Packet<C>)) ? 8 : 4);

  /// Depth of a block in cache lines: a column strip of it stays in L1, a few row strips in L2.
  /// Odd, for columns that are a power of two apart fight for the same few sets of L1.
  static constexpr integer depth_lines = 33;
  /// Row strips and columns of one task.
  static constexpr integer block_strips = 4, block_cols = 256;

  /// out = (accumulate ? out : 0) + rows · colsᵀ, a column after the other, without the first
  /// `above` rows: those are not needed. `next`, the columns of the call to come, is prefetched.
  template <class C>
  static void multiply(C const* a, C const* b, integer depth, bool accumulate, integer above,
                       C const* next, C* out) {
    skip<0>(a, b, depth, accumulate, above, next, out);
  }

 private:
  /// Leaves out the packets that are wholly among the first `above` rows, First of them at least and
  /// all but one at most: a case for each number of packets, however many there are.
  template <integer First, class C>
  EIGEN_ALWAYS_INLINE static void skip(C const* a, C const* b, integer depth, bool accumulate,
                                       integer above, C const* next, C* out) {
    if constexpr (First + 1 < packets<C>)
      if (above >= (First + 1) * lanes<C>)
        return skip<First + 1>(a, b, depth, accumulate, above, next, out);
    strip<First>(a, b, depth, accumulate, next, out);
  }

  /// Without the first First packets of rows.
  template <integer First, class C>
  static void strip(C const* a, C const* b, integer depth, bool accumulate, C const* next, C* out) {
    using namespace packet;
    using P = Packet<C>;
    constexpr integer N = cols<C>, W = lanes<C>, all = packets<C>, R = all - First;
    if (!accumulate)
      unrolled<N>([&](integer j) __attribute__((always_inline)) {
        unrolled<First>([&](integer r) __attribute__((always_inline)) {
          pstore(out + (j * all + r) * W, pset1<P>(C(0)));
        });
      });
    a += First * W;
    out += First * W;
    P sum[R * N];
    unrolled<N>([&](integer j) __attribute__((always_inline)) {
      unrolled<R>([&](integer r) __attribute__((always_inline)) {
        sum[j * R + r] = pset1<P>(C(0));
        prefetch(out + (j * all + r) * W);
      });
    });
    for (integer k = 0; k < depth; ++k, a += all * W) {
      P x[R];
      prefetch(next + k * N);
      unrolled<R>([&](integer r) __attribute__((always_inline)) {
        x[r] = pload<P>(a + r * W);
        prefetch(a + (32 * all + r) * W);
      });
      unrolled<N>([&](integer j) __attribute__((always_inline)) {
        P const y = pset1<P>(b[j * depth + k]);
        unrolled<R>([&](integer r) __attribute__((always_inline)) {
          sum[j * R + r] = pmadd(x[r], y, sum[j * R + r]);
        });
      });
    }
    unrolled<N>([&](integer j) __attribute__((always_inline)) {
      unrolled<R>([&](integer r) __attribute__((always_inline)) {
        C* const o = out + (j * all + r) * W;
        pstore(o, accumulate ? padd(pload<P>(o), sum[j * R + r]) : sum[j * R + r]);
      });
    });
  }
};

/// The product for this machine.
using packed_product = register_product<packet_t, vector_registers>;

}  // namespace rflow::detail
