// SPDX-License-Identifier: Apache-2.0
#pragma once

// Macro tiles: how a square of tokens is cut into blocks and micro tiles, and how these are formed.

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/panel.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// One task: strips of rows times strips of columns. Micro tiles wholly above the diagonal are left
/// out; the others follow each other in the tile buffer, from `first` on.
struct block {
  integer row, rows, col, cols, first, sums;
};

/// A macro tile and its blocks; `area` values of the buffer, `sums` doubles of sums per token.
struct tile {
  integer row, rows, col, cols;
  bool lower;
  std::vector<block> blocks = {};
  integer area = 0, sums = 0;

  bool diagonal() const { return row == col; }

  /// The blocks whose middle is in a range of the area, moved together.
  tile part(integer low, integer high) const {
    tile out{row, rows, col, cols, lower};
    for (std::size_t k = 0; k < blocks.size(); ++k) {
      bool const last = k + 1 == blocks.size();
      integer const end = last ? area : blocks[k + 1].first;
      integer const middle = blocks[k].first + (end - blocks[k].first) / 2;
      if (middle < low || middle >= high) continue;
      block b = blocks[k];
      b.first = out.area;
      b.sums = out.sums;
      out.area += end - blocks[k].first;
      out.sums += (last ? sums : blocks[k + 1].sums) - blocks[k].sums;
      out.blocks.push_back(b);
    }
    return out;
  }
};

template <class Product, class C>
struct tiling {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static_assert(R % N == 0 && R % lanes_v<C> == 0);

  /// Whether a micro tile has an entry below the diagonal.
  static bool below(integer i, integer j) { return i + R - 1 > j; }

  /// Calls f(i, j, position in the buffer) for the micro tiles of a block, column strips outermost.
  template <class F>
  static integer each(block const& b, bool lower, F const& f) {
    integer at = b.first;
    for (integer j = b.col; j < b.col + b.cols; j += N)
      for (integer i = b.row; i < b.row + b.rows; i += R)
        if (!lower || below(i, j)) {
          f(i, j, at);
          at += R * N;
        }
    return at;
  }

  /// @param sums_of  how many doubles of sums a block needs
  template <class F>
  static tile plan(integer row, integer rows, integer col, integer cols, bool lower,
                   F const& sums_of) {
    tile t{row, rows, col, cols, lower};
    integer const height = Product::block_strips * R, width = Product::block_cols;
    for (integer i = 0; i < rows; i += height)
      for (integer j = 0; j < cols; j += width) {
        block b{row + i, (std::min)(height, rows - i), col + j, (std::min)(width, cols - j), t.area,
                t.sums};
        integer const end = each(b, lower, [](integer, integer, integer) {});
        if (end == t.area) continue;
        t.area = end;
        t.sums += sums_of(b);
        t.blocks.push_back(b);
      }
    return t;
  }
};

/// Calls f(tile) for this share of all tiles in plan(f), of which there may be many: one range of
/// their blocks, so that most tiles are whole and shares differ by a block at most.
template <class Plan, class F>
void each_of_share(work_share share, Plan const& plan, F const& f) {
  if (share.of == 1) return plan(f);
  integer total = 0, before = 0;
  plan([&](tile const& t) { total += t.area; });
  integer const low = total / share.of * share.index + total % share.of * share.index / share.of;
  integer const next = share.index + 1;
  integer const high = total / share.of * next + total % share.of * next / share.of;
  plan([&](tile const& t) {
    if (before < high && before + t.area > low) {
      tile const mine = t.part(low - before, high - before);
      if (!mine.blocks.empty()) f(mine);
    }
    before += t.area;
  });
}

/// Packing of a tile's panels as tasks: a few strips in a row, first of rows, then of columns (on
/// the diagonal the same strips serve both). Few enough tasks that a thread's prefetches pay off.
/// Strips that no block of the tile needs are left out.
template <class Product, class C>
class packing {
  static constexpr integer R = Product::template rows<C>, group = Product::block_strips * R;

 public:
  /// @param end     rows that exist
  /// @param shared  with other threads
  packing(tile const& t, integer end, bool shared) : t_(t), end_(end), shared_(shared) {
    auto const needed = [&](integer block::*first, integer block::*count, integer from) {
      return std::any_of(t.blocks.begin(), t.blocks.end(), [&](block const& b) {
        return b.*first < from + group && from < b.*first + b.*count;
      });
    };
    for (integer at = 0; at < t.rows; at += group)
      if (needed(&block::row, &block::rows, t.row + at) ||
          (t.diagonal() && needed(&block::col, &block::cols, t.row + at)))
        tasks_.push_back({true, at});
    for (integer at = 0; at < t.cols && !t.diagonal(); at += group)
      if (needed(&block::col, &block::cols, t.col + at)) tasks_.push_back({false, at});
  }

  integer tasks() const { return static_cast<integer>(tasks_.size()); }

  template <class Fetch>
  void operator()(integer task, Fetch const& fetch, depth_range const& k, panel<C>& rows,
                  panel<C>& cols) const {
    auto const [of_rows, from] = tasks_[static_cast<std::size_t>(task)];
    integer const origin = of_rows ? t_.row : t_.col, count = of_rows ? t_.rows : t_.cols;
    for (integer at = from; at < (std::min)(count, from + group); at += R)
      pack_strip<Product, C>(fetch, origin + at, (std::min)(R, end_ - origin - at), at / R, k,
                             shared_, of_rows ? &rows : nullptr,
                             !of_rows || t_.diagonal() ? &cols : nullptr);
  }

 private:
  struct strips {
    bool of_rows;
    integer from;
  };

  tile const& t_;
  integer end_;
  bool shared_;
  std::vector<strips> tasks_;
};

/// All micro tiles of a block over the depths of one step; `finish` sees each at the last depth.
template <class Product, class C, class Finish>
void multiply_block(tile const& t, block const& b, panel<C> const& rows, panel<C> const& cols,
                    depth_range const& k, bool first, bool last, C* buffer, Finish const& finish) {
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  for (integer d = 0; d < k.blocks(); ++d) {
    integer const depth = round_up(k.size(d), depth_unit<C>);
    C const* const x = rows.block(d, k) - t.row * depth;
    C const* const y = cols.block(d, k) - t.col * depth;
    bool const start = first && d == 0, end = last && d + 1 == k.blocks();
    tiling<Product, C>::each(b, t.lower, [&](integer i, integer j, integer at) {
      bool const turn = i + R >= b.row + b.rows;  // the next one is of the next strip of columns
      Product::multiply(x + i * depth, y + j * depth, depth, !start, t.lower ? j - i : 0,
                        y + (turn ? j + N : j) * depth, buffer + at);
      if (end) finish(i, j, buffer + at);
    });
  }
}

/// Where the sums of one block go: squares of its rows and columns, then their plain sums.
struct block_sums {
  double *row_squares, *col_squares, *row_sums, *col_sums;
};

/// The entries of a tile whose inner products have lost them, NaN elsewhere: pairs of tokens that are close
/// to each other and far from the centre. Returns whether there are any.
template <class Product, class C, class Bound>
bool repairs_of(Bound const& kernel, C const* token, C const* removed, integer i0, integer j0,
                integer n, C const* g, C* entries) {
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  bool any = false;
  for (integer j = j0; j < (std::min)(j0 + N, n); ++j)
    for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i) {
      integer const at = (j - j0) * R + i - i0;
      if (!kernel.lost(static_cast<double>(g[at]), static_cast<double>(token[i]),
                       static_cast<double>(token[j])))
        continue;
      if (!any) std::fill_n(entries, R * N, std::numeric_limits<C>::quiet_NaN());
      any = true;
      entries[at] = static_cast<C>(kernel.repair(i, j) - (static_cast<double>(removed[i]) +
                                                          static_cast<double>(removed[j])));
    }
  return any;
}

/// Turns inner products into G, zeroes what is not below the diagonal, adds up sums per token: of G, and
/// squares of the kernel matrix.
template <class Product, class C, class Bound>
void finish_tile(Bound const& kernel, C const* token, C const* removed, integer i0, integer j0,
                 integer n, C* g, block_sums const& to) {
  using namespace packet;
  using P = packet_t<C>;
  constexpr integer W = lanes_v<C>, R = Product::template rows<C>, N = Product::template cols<C>;
  constexpr integer packets = R / W;
  std::vector<C> repaired;
  if constexpr (Bound::repairs)
    if (kernel.outlying()) {
      repaired.resize(R * N);
      if (!repairs_of<Product>(kernel, token, removed, i0, j0, n, g, repaired.data()))
        repaired.clear();
    }
  for (integer j = 0; j < N; ++j) {
    P const tj = pset1<P>(token[j0 + j]), of_col = pset1<P>(removed[j0 + j]);
    for (integer r = 0; r < packets; ++r) {
      C* const x = g + j * R + r * W;
      pstore(x, kernel(P(pload<P>(x)), P(ploadu<P>(token + i0 + r * W)), tj,
                       P(padd(ploadu<P>(removed + i0 + r * W), of_col))));
    }
  }
  for (std::size_t k = 0; k < repaired.size(); ++k)
    if (is_finite(repaired[k])) g[k] = repaired[k];
  if (i0 < j0 + N || i0 + R > n)
    for (integer j = 0; j < N; ++j)
      for (integer i = 0; i < R; ++i)
        if (i0 + i <= j0 + j || i0 + i >= n) g[j * R + i] = C(0);

  P squares[packets], sums[packets];
  for (integer r = 0; r < packets; ++r) squares[r] = sums[r] = pset1<P>(C(0));
  bool const whole = i0 >= j0 + N && i0 + R <= n;
  alignas(128) C kept[R];  // of a column, without what is not there
  for (integer j = 0; j < N; ++j) {
    P square = pset1<P>(C(0)), sum = square;
    P const of_col = pset1<P>(removed[j0 + j]);
    if (!whole)
      for (integer i = 0; i < R; ++i) {
        C const k = g[j * R + i] + (removed[i0 + i] + removed[j0 + j]);
        kept[i] = i0 + i > j0 + j && i0 + i < n ? k : C(0);
      }
    for (integer r = 0; r < packets; ++r) {
      P const x = pload<P>(g + j * R + r * W);
      P const k =
          whole ? padd(x, padd(ploadu<P>(removed + i0 + r * W), of_col)) : pload<P>(kept + r * W);
      square = pmadd(k, k, square);
      squares[r] = pmadd(k, k, squares[r]);
      if constexpr (Bound::row_sums) sum = padd(sum, x), sums[r] = padd(sums[r], x);
    }
    to.col_squares[j] += static_cast<double>(predux(square));
    if constexpr (Bound::row_sums) to.col_sums[j] += static_cast<double>(predux(sum));
  }
  alignas(128) C narrow[R];
  for (integer r = 0; r < packets; ++r) pstore(narrow + r * W, squares[r]);
  for (integer i = 0; i < R; ++i) to.row_squares[i] += static_cast<double>(narrow[i]);
  if constexpr (Bound::row_sums) {
    for (integer r = 0; r < packets; ++r) pstore(narrow + r * W, sums[r]);
    for (integer i = 0; i < R; ++i) to.row_sums[i] += static_cast<double>(narrow[i]);
  }
}

}  // namespace rflow::detail
