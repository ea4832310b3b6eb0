// SPDX-License-Identifier: Apache-2.0
#pragma once

// The engine of the Gram pass: tiles of tokens, all sites to a tile, products of all pairs of them.

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include <rflow/detail/cpu/kernels.hpp>
#include <rflow/detail/cpu/options.hpp>
#include <rflow/detail/cpu/pairs.hpp>
#include <rflow/detail/cpu/product.hpp>
#include <rflow/detail/cpu/tile.hpp>
#include <rflow/moments.hpp>
#include <rflow/statistics.hpp>
#include <rflow/threads.hpp>

namespace rflow::detail {

/// Sizes, from the shape and the memory bound alone.
struct gram_sizes {
  integer side;         // tokens along a macro tile
  integer depth;        // features of a step
  integer depth_block;  // features of a block
  integer slices;       // of the tile buffer, for the product of all pairs
};

template <class Product, class C>
class gram_engine {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  using tiles = tiling<Product, C>;

 public:
  gram_engine(team& threads, std::vector<prepared_site<C>> const& sites, integer tokens,
              std::size_t memory_bound, work_share share = {})
      : threads_(threads),
        tokens_(tokens),
        site_count_(static_cast<integer>(sites.size())),
        sites_(sites),
        share_(share),
        sizes_(choose_sizes(static_cast<double>(memory_bound))) {}

  gram_sizes const& sizes() const { return sizes_; }

  /// @param  shifts  S × n: what is subtracted from the entries of each token besides; or nothing
  template <class Kernel>
  gram_moments operator()(Kernel const& kernel, std::vector<double> const& shifts = {}) {
    using bound = decltype(kernel.template bind<C>(0, sites_[0]));
    std::vector<bound> kernels;
    std::vector<per_token> token;
    gram_moments m(site_count_, tokens_);
    m.squares.resize(m.diagonal.size());
    for (integer p = 0; p < site_count_; ++p) {
      kernels.push_back(kernel.template bind<C>(p, sites_[static_cast<std::size_t>(p)]));
      bound const& k = kernels.back();
      m.entry_rounding.data()[p] = k.rounding;
      m.sum_rounding.data()[p] = k.floor;
      integer const room = round_up(tokens_, R) + R + N;
      token.push_back({aligned_array<C>(room, C(0)), aligned_array<C>(room, C(0))});
      for (integer i = 0; i < tokens_; ++i) {
        token.back().number[i] = k.token(i);
        C const removed = k.removed(i);
        double diagonal = k.diagonal(i);
        token.back().removed[i] = removed;
        if (!shifts.empty()) {
          C const more =
              static_cast<C>(static_cast<double>(removed) + shifts.data()[p * tokens_ + i]);
          token.back().removed[i] = more;
          diagonal -= 2 * (static_cast<double>(more) - static_cast<double>(removed));
        }
        m.diagonal.data()[p * tokens_ + i] = diagonal;
      }
    }
    allocate<bound::row_sums>();
    auto const tiles_of_all = [&](auto const& f) {
      integer const side = sizes_.side;
      for (integer row = 0; row < tokens_; row += side)
        for (integer col = 0; col <= row; col += side)
          f(plan<bound::row_sums>(row, (std::min)(side, tokens_ - row), col,
                                  (std::min)(side, tokens_ - col)));
    };
    each_of_share(share_, tiles_of_all, [&](tile const& t) {
      fill(t, kernels, token);
      reduce<bound::row_sums>(t, m);
    });
    for (double& x : m.products) x *= 2;
    for (integer p = 0; p < site_count_; ++p)
      for (integer i = 0; i < tokens_; ++i)
        m.square_sum.data()[p] += m.squares.data()[p * tokens_ + i];
    if constexpr (requires(bound const& k) { k.rounding_of(0.); })
      for (integer p = 0; p < site_count_ && share_.of == 1; ++p)
        m.entry_rounding.data()[p] =
            kernels[static_cast<std::size_t>(p)].rounding_of(m.square_sum.data()[p]);
    std::vector<int> exponents;
    for (auto const& k : kernels) exponents.push_back(k.exponent);
    deliver(sites_, exponents, m);
    return m;
  }

 private:
  struct per_token {
    aligned_array<C> number, removed;
  };
  struct step {
    integer site;
    depth_range k;
    bool first, last;
  };

  double bytes(integer side, integer depth) const {
    double const s = static_cast<double>(site_count_), c = sizeof(C);
    double const b = static_cast<double>(round_up(side, R));
    double const area = side < tokens_ ? b * (b + N) : b * (b + R + N) / 2;
    double const blocks = 1 / static_cast<double>(Product::block_cols) +
                          1 / static_cast<double>(Product::block_strips * R);
    double const sums = s * 2 * (b * b * blocks + 2 * b) * sizeof(double);
    return s * area * c + 4 * b * static_cast<double>(depth) * c + sums;
  }

  /// Rough nanoseconds that depend on the side of a tile. Larger tiles pack each row less often,
  /// but each page of the buffer has to be had from the system once.
  double overhead(integer side, double features) const {
    double const n = static_cast<double>(tokens_), b = static_cast<double>(side);
    double const bytes = static_cast<double>(site_count_) * b * b * sizeof(C);
    return 0.5 * bytes * (side < tokens_ ? 1 : 0.5) + 0.7 * features * n * n / b;
  }

  gram_sizes choose_sizes(double memory_bound) const {
    integer widest = 1;
    double features = 0;
    for (auto const& site : sites_) {
      widest = (std::max)(widest, site.source.cols);
      features += static_cast<double>(site.source.cols);
    }
    gram_sizes z{};
    z.depth_block = depth_of_block<C>(widest, Product::depth_lines);
    integer const blocks = ceil_div(widest, z.depth_block);
    double best = (std::numeric_limits<double>::max)(), needed = 0;
    for (integer count = 1, last = 0; last != R; ++count) {
      integer const side = round_up(ceil_div(tokens_, count), R);
      if (side == last) continue;
      last = side;
      integer const strip = side * z.depth_block * integer{sizeof(C)};
      integer const depth = z.depth_block * std::clamp<integer>(panel_bytes / strip, 1, blocks);
      needed = bytes(side, depth);
      if (needed > memory_bound || overhead(side, features) > best) continue;
      best = overhead(side, features);
      z.side = side;
      z.depth = depth;
    }
    if (z.side == 0) reject_bound(memory_bound, needed);
    integer const pairs = site_count_ * site_count_ * integer{sizeof(double)};
    z.slices = std::clamp<integer>((integer{4} << 20) / pairs, 8, 64);
    return z;
  }

  template <bool RowSums>
  static tile plan(integer row, integer rows, integer col, integer cols) {
    return tiles::plan(row, rows, col, cols, true, [](block const& b) {
      return (RowSums ? 2 : 1) * (round_up(b.rows, R) + round_up(b.cols, N));
    });
  }

  template <bool RowSums>
  void allocate() {
    integer const side = sizes_.side;
    tile const whole =
        side < tokens_ ? plan<RowSums>(side, side, 0, side) : plan<RowSums>(0, tokens_, 0, tokens_);
    stride_ = whole.area;
    sums_stride_ = whole.sums;
    buffer_ = aligned_array<C>(site_count_ * stride_);
    sums_ = aligned_array<double>(site_count_ * sums_stride_);
    for (int k = 0; k < 2; ++k) {
      rows_[k].values = aligned_array<C>(side * (sizes_.depth + depth_unit<C>));
      cols_[k].values = aligned_array<C>(side * (sizes_.depth + depth_unit<C>));
      rows_[k].rows = cols_[k].rows = side;
    }
    slice_products_ = aligned_array<double>(sizes_.slices * site_count_ * site_count_);
  }

  std::vector<step> steps() const {
    std::vector<step> all;
    for (integer p = 0; p < site_count_; ++p) {
      integer const d = sites_[static_cast<std::size_t>(p)].source.cols;
      for (integer k = 0; k < d; k += sizes_.depth) {
        integer const count = (std::min)(sizes_.depth, d - k);
        all.push_back({p, {k, count, sizes_.depth_block}, k == 0, k + count == d});
      }
    }
    return all;
  }

  /// Fills the buffer with G of every site. Panels of the next step are packed along with the
  /// products of this one: no thread waits while another packs.
  template <class Bound>
  void fill(tile const& t, std::vector<Bound> const& kernels, std::vector<per_token> const& token) {
    std::vector<step> const all = steps();
    integer const blocks = static_cast<integer>(t.blocks.size());
    packing<Product, C> const panels{t, tokens_, threads_.size() > 1};
    auto const pack = [&](integer s, integer task) {
      step const& now = all[static_cast<std::size_t>(s)];
      auto const& site = sites_[static_cast<std::size_t>(now.site)];
      panels(
          task, [&](auto... where) { site.fetch(where...); }, now.k, rows_[s % 2], cols_[s % 2]);
    };
    auto const multiply = [&](integer s, integer which) {
      step const& now = all[static_cast<std::size_t>(s)];
      auto const p = static_cast<std::size_t>(now.site);
      block const& b = t.blocks[static_cast<std::size_t>(which)];
      integer const height = round_up(b.rows, R), width = round_up(b.cols, N);
      double* const sums = sums_.data() + now.site * sums_stride_ + b.sums;
      if (now.first) std::fill_n(sums, (Bound::row_sums ? 2 : 1) * (height + width), 0.);
      multiply_block<Product>(t, b, rows_[s % 2], cols_[s % 2], now.k, now.first, now.last,
                              buffer_.data() + now.site * stride_, [&](integer i, integer j, C* g) {
                                double* const r = sums + (i - b.row);
                                double* const c = sums + height + (j - b.col);
                                integer const plain = Bound::row_sums ? height + width : 0;
                                finish_tile<Product>(kernels[p], token[p].number.data(),
                                                     token[p].removed.data(), i, j, tokens_, g,
                                                     block_sums{r, c, r + plain, c + plain});
                              });
    };
    integer const count = static_cast<integer>(all.size());
    threads_.run(panels.tasks(), [&](integer i) { pack(0, i); });
    for (integer s = 0; s < count; ++s) {
      integer const ahead = s + 1 < count ? panels.tasks() : 0;
      threads_.run(blocks + ahead, [&](integer i) {  // the short tasks last
        if (i < blocks)
          multiply(s, i);
        else
          pack(s + 1, i - blocks);
      });
    }
  }

  /// Adds the tile's products of all pairs and its sums per token to the moments.
  template <bool RowSums>
  void reduce(tile const& t, gram_moments& m) {
    integer const part = ceil_div(t.area, sizes_.slices), slice = round_up(part, R * N);
    // As short as with the smallest micro tiles, however large the product's are.
    constexpr integer tile_area = packed_product::rows<C> * packed_product::cols<C>;
    integer const most = round_up(part, tile_area);
    integer const slices = ceil_div(t.area, slice), pairs = site_count_ * site_count_;
    threads_.run(slices + site_count_, [&](integer i) {
      if (i < slices) {
        row_products<C> multiply(site_count_, most);
        multiply(buffer_.data() + i * slice, stride_, (std::min)(slice, t.area - i * slice),
                 slice_products_.data() + i * pairs);
      } else {
        add_sums<RowSums>(t, i - slices, m);
      }
    });
    for (integer s = 0; s < slices; ++s)
      for (integer k = 0; k < pairs; ++k) m.products.data()[k] += slice_products_[s * pairs + k];
  }

  template <bool RowSums>
  void add_sums(tile const& t, integer p, gram_moments& m) const {
    double* const squares = m.squares.data() + p * tokens_;
    double* const row_sums = m.row_sums.data() + p * tokens_;
    for (block const& b : t.blocks) {
      double const* from = sums_.data() + p * sums_stride_ + b.sums;
      auto const add = [&](double* to, integer count, integer padded) {
        for (integer i = 0; i < count; ++i) to[i] += from[i];
        from += padded;
      };
      add(squares + b.row, b.rows, round_up(b.rows, R));
      add(squares + b.col, b.cols, round_up(b.cols, N));
      if constexpr (RowSums) {
        add(row_sums + b.row, b.rows, round_up(b.rows, R));
        add(row_sums + b.col, b.cols, round_up(b.cols, N));
      }
    }
  }

  static constexpr integer panel_bytes = integer{6} << 20;  // of one of four panels

  team& threads_;
  integer tokens_, site_count_;
  std::vector<prepared_site<C>> const& sites_;
  work_share share_;
  gram_sizes sizes_;
  integer stride_ = 0, sums_stride_ = 0;
  aligned_array<C> buffer_;
  aligned_array<double> sums_, slice_products_;
  panel<C> rows_[2], cols_[2];
};

}  // namespace rflow::detail
