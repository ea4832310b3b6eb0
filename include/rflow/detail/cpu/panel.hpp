// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows of a site, packed for the micro-kernel.
//
// Two costs that are easy to miss shape the code. Panels are written past the caches: storing to a
// line that another core has read is ten times slower where cores do not share a cache. And the
// columns of a panel are an odd number of cache lines apart, or L1 could not hold a strip of them.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>

#include <rflow/detail/cpu/packet.hpp>

namespace rflow::detail {

/// Depths of a block are filled up to whole packets and whole cache lines.
template <class C>
inline constexpr integer depth_unit = (std::max<integer>)(lanes_v<C>, 64 / sizeof(C));

/// Cuts `depth` into blocks of about the same size, of an odd number of lines, at most `most`.
template <class C>
integer depth_of_block(integer depth, integer most) {
  integer const line = 64 / sizeof(C), lines = ceil_div(depth, line);
  for (integer blocks = ceil_div(lines, most);; ++blocks) {
    integer const block = ceil_div(lines, blocks) | 1;
    integer const last = lines - (blocks - 1) * block;
    if (last > 0 && last % 32 != 0) return round_up(block * line, depth_unit<C>);
    if (block == 1) return depth_unit<C>;
  }
}

/// Depths of one step of work, in blocks of `block`; the last block is shorter.
struct depth_range {
  integer first, count, block;

  integer blocks() const { return ceil_div(count, block); }
  integer size(integer b) const { return (std::min)(block, count - b * block); }
};

/// Part of a site's rows, packed. Block b of the depths starts at b · block · rows.
template <class C>
struct panel {
  aligned_array<C> values;
  integer rows = 0;

  C* block(integer b, depth_range const& k) { return values.data() + b * k.block * rows; }
  C const* block(integer b, depth_range const& k) const {
    return values.data() + b * k.block * rows;
  }
};

/// Packs one strip of rows (strip · R to (strip + 1) · R of the panels), the first `available` of
/// which exist: side by side for `rows`, one after the other for `cols`. Either may be absent.
/// Missing rows are zeros, and so are depths beyond the end.
///
/// Goes along a few rows at a time, as many as fill cache lines of the panel: long runs of input
/// for the hardware to prefetch, whole lines for the stores.
template <class Product, class C, class Fetch>
void pack_strip(Fetch const& fetch, integer row, integer available, integer strip,
                depth_range const& k, bool shared, panel<C>* rows, panel<C>* cols) {
  constexpr integer R = Product::template rows<C>, W = lanes_v<C>, S = small_lanes<C>;
  constexpr integer line = 64 / sizeof(C), chunk = 1024 / sizeof(C);
  constexpr integer G = R % line == 0 && line % W == 0 ? line : R;
  alignas(128) C x[G * chunk], side_by_side[G * chunk];
  for (integer i = 0; i < R; i += G) {
    integer const here = std::clamp<integer>(available - i, 0, G);
    std::fill(x + here * chunk, x + G * chunk, C(0));
    for (integer b = 0; b < k.blocks(); ++b) {
      integer const size = k.size(b), depth = round_up(size, depth_unit<C>);
      for (integer c = 0; c < size; c += chunk) {
        integer const count = (std::min)(chunk, size - c), padded = round_up(count, depth_unit<C>);
        if (here > 0) fetch(row + i, here, k.first + b * k.block + c, count, x, chunk);
        for (integer r = 0; r < here && padded > count; ++r)
          std::fill(x + r * chunk + count, x + r * chunk + padded, C(0));
        for (integer r = 0; r < G && cols; ++r)
          copy_packets(x + r * chunk, padded, shared,
                       cols->block(b, k) + (strip * R + i + r) * depth + c);
        if (!rows) continue;
        for (integer m = 0; m < padded; m += S)
          for (integer r = 0; r < G; r += S)
            transpose(packet::pset1<small_packet_t<C>>(C(0)), x + r * chunk + m, chunk,
                      side_by_side + m * G + r, G);
        C* const to = rows->block(b, k) + strip * R * depth + c * R + i;
        if constexpr (G == R)
          copy_packets(side_by_side, padded * R, shared, to);
        else
          for (integer m = 0; m < padded; ++m)
            copy_packets(side_by_side + m * G, G, shared, to + m * R);
      }
    }
  }
  if (shared) std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores need one
}

}  // namespace rflow::detail
