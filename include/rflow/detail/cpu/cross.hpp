// SPDX-License-Identifier: Apache-2.0
#pragma once

// The feature path: linear moments from d × d cross-covariances.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <vector>

#include <rflow/detail/cpu/kernels.hpp>
#include <rflow/detail/cpu/options.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/pairs.hpp>
#include <rflow/detail/cpu/product.hpp>
#include <rflow/detail/cpu/tile.hpp>
#include <rflow/detail/numerics.hpp>
#include <rflow/moments.hpp>
#include <rflow/threads.hpp>

namespace rflow::detail {

/// Linear moments from d × d cross-covariances, for many tokens and few features:
/// Σ_{i≠j} K^p_ij K^q_ij = ‖X_pᵀ X_q‖² − Σ_i a_i b_i. The rows of a tile are features of all sites,
/// one after the other; the depth of the products is tokens.
///
/// A token far out would be most of both terms and cancel: such tokens are left out of the
/// cross-covariances, and their pairs are added one by one, in double.
template <class Product, class C>
class feature_engine {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static constexpr integer W = lanes_v<C>;
  using tiles = tiling<Product, C>;

 public:
  feature_engine(team& threads, std::vector<prepared_site<C>> const& sites, integer tokens,
                 std::size_t memory_bound, work_share share = {})
      : threads_(threads), sites_(sites), tokens_(tokens), share_(share) {
    starts_.push_back(0);
    for (integer p = 0; p < static_cast<integer>(sites.size()); ++p) {
      integer const d = sites[static_cast<std::size_t>(p)].source.cols;
      starts_.push_back(starts_.back() + d);
      owner_.insert(owner_.end(), static_cast<std::size_t>(d), p);
    }
    depth_ = depth_of_block<C>(tokens, Product::depth_lines);
    side_ = round_up((std::min<integer>)(features(), 1536), R);
    double const bound = static_cast<double>(memory_bound);
    auto const bytes = [&] {
      return static_cast<double>((side_ + 4 * depth_) * side_ * integer{sizeof(C)});
    };
    while (side_ > R && bytes() > bound) side_ = (std::max)(R, side_ / 2 / R * R);
    if (bytes() > bound) reject_bound(bound, bytes());
    find_far();
  }

  gram_moments operator()() {
    gram_moments m(static_cast<integer>(sites_.size()), tokens_);
    m.path = rflow::gram_path::feature;
    buffer_ = aligned_array<C>(side_ * round_up(side_, N));
    for (int k = 0; k < 2; ++k) {
      rows_[k] = {aligned_array<C>(side_ * depth_), side_};
      cols_[k] = {aligned_array<C>(side_ * depth_), side_};
    }
    auto const tiles_of_all = [&](auto const& f) {
      for (integer row = 0; row < features(); row += side_)
        for (integer col = 0; col <= row; col += side_)
          f(tiles::plan(row, (std::min)(side_, features() - row), col,
                        (std::min)(side_, features() - col), true, [&](block const& b) {
                          return 2 * sites_of(b.row, b.rows).count * sites_of(b.col, b.cols).count;
                        }));
    };
    bool const first = share_.index == 0;
    find_furthest();
    bool const plain =
        far_.empty() && candidates_ == 1 &&
        std::all_of(sites_.begin(), sites_.end(), [](auto const& x) { return x.row_sums.empty(); });
    each_of_share(share_, tiles_of_all, [&](tile const& t) { add_tile(t, m); });
    m.squares.resize(m.diagonal.size());
    if (first && !plain) add_far(m);
    std::vector<int> exponents;
    for (integer p = 0; p < m.sites; ++p) {
      auto const& site = sites_[static_cast<std::size_t>(p)];
      auto const& a = site.norms;
      std::copy(a.begin(), a.end(), m.diagonal.begin() + p * tokens_);
      if (first) {  // what the tiles have too much, once
        for (integer q = 0; q <= p; ++q) m.products.data()[p * m.sites + q] -= diagonals(p, q);
        for (integer i = 0; i < tokens_; ++i)
          if (!is_far(i)) m.row_sums.data()[p * tokens_ + i] = row_sum(p, i);
      }
      if (plain) {  // Σ_j K_mj² = x_mᵀ(XᵀX)x_m − a_m² of the furthest token
        integer const token = furthest(p, 0);
        double const of_it = a.data()[token];
        m.squares.data()[p * tokens_ + token] = quadratic_.data()[p] - (first ? of_it * of_it : 0);
      }
      m.square_sum.data()[p] = m.products.data()[p * m.sites + p] + (first ? about_the_mean(p) : 0);
      double const growth = 1 + std::sqrt(static_cast<double>(tokens_) / (1 << 18));
      m.entry_rounding.data()[p] = unit_roundoff<C> / 2 * std::sqrt(sum_of_pairs(a));
      m.sum_rounding.data()[p] = 4 * unit_roundoff<C> * growth * diagonals(p, p) +
                                 u_centring::floor_of(site.trace, a.size());
      exponents.push_back(site.exponent());
    }
    deliver(sites_, exponents, m);
    return m;
  }

 private:
  struct site_range {
    integer first, count;
  };

  integer features() const { return starts_.back(); }
  std::vector<double> const& norms(integer p) const {
    return sites_[static_cast<std::size_t>(p)].norms;
  }
  double row_sum(integer p, integer i) const {
    auto const& site = sites_[static_cast<std::size_t>(p)];
    return site.row_sums.empty() ? -site.norms.data()[i] : site.row_sums.data()[i];
  }
  /// ⟨x_i − centre, Σ_j (x_j − centre)⟩: 0 about the mean.
  double lean(integer p, integer i) const { return row_sum(p, i) + norms(p).data()[i]; }

  /// Tokens ten times as far out as others, in any site: the furthest, as many as cost little.
  void find_far() {
    std::vector<double> how_far(static_cast<std::size_t>(tokens_));
    for (auto const& site : sites_) {
      if (!has_outlier(site.trace, site.furthest, how_far.size())) continue;
      double const middle = median_of(site.norms);
      for (std::size_t i = 0; i < how_far.size(); ++i)
        if (site.norms[i] > 100 * middle)
          how_far[i] = (std::max)(how_far[i], site.norms[i] / (std::max)(middle, 1e-300));
    }
    for (integer i = 0; i < tokens_; ++i)
      if (how_far.data()[i] > 0) far_.push_back(i);
    integer const most = std::clamp<integer>(features() / 32, 16, 64);
    if (static_cast<integer>(far_.size()) > most) {
      std::nth_element(far_.begin(), far_.begin() + most, far_.end(), [&](integer i, integer j) {
        double const a = how_far.data()[i], b = how_far.data()[j];
        return a > b || (a == b && i < j);
      });
      far_.resize(static_cast<std::size_t>(most));
      std::sort(far_.begin(), far_.end());
    }
  }
  /// The tokens whose share of the kernel matrix is looked at, by site: that with the largest norm, and its
  /// features; where tokens are far out the largest few, for one of those may pair better with the others.
  void find_furthest() {
    constexpr integer most = 16;
    furthest_.clear();
    candidates_ = 1;
    features_of_it_ = aligned_array<double>(features());
    quadratic_.assign(sites_.size(), 0.);
    std::vector<integer> order(static_cast<std::size_t>(tokens_));
    for (integer p = 0; p < static_cast<integer>(sites_.size()); ++p) {
      auto const& site = sites_[static_cast<std::size_t>(p)];
      double const* const a = site.norms.data();
      integer const wanted =
          has_outlier(site.trace, site.furthest, order.size()) ? (std::min)(most, tokens_) : 1;
      std::iota(order.begin(), order.end(), integer{0});
      std::partial_sort(
          order.begin(), order.begin() + wanted, order.end(),
          [&](integer i, integer j) { return a[i] > a[j] || (a[i] == a[j] && i < j); });
      furthest_.emplace_back(order.begin(), order.begin() + wanted);
      candidates_ = (std::max)(candidates_, wanted);
      constexpr integer chunk = 1024;
      alignas(128) C x[chunk + W];
      integer const d = starts_.data()[p + 1] - starts_.data()[p];
      for (integer k = 0; k < d; k += chunk) {
        integer const cols = (std::min)(chunk, d - k);
        site.fetch(furthest(p, 0), 1, k, cols, x, chunk);
        for (integer c = 0; c < cols; ++c)
          features_of_it_[starts_.data()[p] + k + c] = static_cast<double>(x[c]);
      }
    }
  }
  /// The r-th of them; −1 if the site has fewer.
  integer furthest(integer p, integer r) const {
    auto const& of = furthest_[static_cast<std::size_t>(p)];
    return r < static_cast<integer>(of.size()) ? of.data()[r] : -1;
  }
  bool is_far(integer token) const { return std::binary_search(far_.begin(), far_.end(), token); }

  /// Σ a_i b_i over the tokens that the cross-covariances have.
  double diagonals(integer p, integer q) const {
    double sum = 0;
    if (far_.empty()) {
      double const *const a = norms(p).data(), *const b = norms(q).data();
      for (integer i = 0; i < tokens_; ++i) sum += a[i] * b[i];
      return sum;
    }
    for (integer i = 0, next = 0; i < tokens_; ++i)
      if (next < static_cast<integer>(far_.size()) && far_.data()[next] == i)
        ++next;
      else
        sum += norms(p).data()[i] * norms(q).data()[i];
    return sum;
  }

  /// What ‖K̃‖² has more if features are centred at their mean.
  double about_the_mean(integer p) const {
    double const n = static_cast<double>(tokens_);
    if (sites_[static_cast<std::size_t>(p)].row_sums.empty()) return 0;
    double leaning = 0, squares = 0, more = 0;
    for (integer i = 0; i < tokens_; ++i) {
      leaning += lean(p, i);
      squares += lean(p, i) * lean(p, i);
    }
    for (integer i = 0; i < tokens_; ++i) {
      double const a = norms(p).data()[i];
      double const b = a - 2 * lean(p, i) / n + leaning / n / n;
      more += (a - b) * (a + b);
    }
    return more - 2 * squares / n + leaning / n * (leaning / n);
  }

  /// ⟨x, y⟩ of `count` values, a multiple of four packets.
  template <class D>
  static D inner_product(D const* x, D const* y, integer count) {
    using namespace packet;
    using P = packet_t<D>;
    constexpr integer L = lanes_v<D>;
    P sum[2] = {pset1<P>(D(0)), pset1<P>(D(0))};
    for (integer k = 0; k < count; k += 2 * L)
      for (integer u = 0; u < 2; ++u)
        sum[u] = pmadd(pload<P>(x + k + u * L), pload<P>(y + k + u * L), sum[u]);
    return predux(padd(sum[0], sum[1]));
  }

  /// Adds the pairs of the tokens far out, and sums of squares of these and of the furthest of a site.
  void add_far(gram_moments& m) {
    integer const count = m.sites, outlying = static_cast<integer>(far_.size()),
                  rows = outlying + candidates_;
    integer widest = 0;
    for (auto const& site : sites_) widest = (std::max)(widest, site.source.cols);
    integer const ld = round_up(widest, 4 * W);
    auto const fetch_rows = [&](integer p, integer token, integer tokens, C* to) {
      constexpr integer chunk = 1024;
      auto const& site = sites_[static_cast<std::size_t>(p)];
      for (integer k = 0; k < site.source.cols; k += chunk)
        site.fetch(token, tokens, k, (std::min)(chunk, site.source.cols - k), to + k, ld);
    };

    aligned_array<C> outer(count * candidates_ * ld, C(0));  // of each site: its furthest tokens
    aligned_array<double> outer_far(count * outlying * ld, 0.);  // and those far out
    auto const token_of = [&](integer p, integer r) {
      return r < outlying ? far_.data()[r] : furthest(p, r - outlying);
    };
    std::vector<double> leaning(sites_.size());
    threads_.run(count, [&](integer p) {
      for (integer i = 0; i < tokens_ && !sites_[static_cast<std::size_t>(p)].row_sums.empty(); ++i)
        leaning.data()[p] += lean(p, i);
      aligned_array<C> row(ld, C(0));
      for (integer r = 0; r < outlying; ++r) {
        fetch_rows(p, far_.data()[r], 1, row.data());
        for (integer k = 0; k < ld; ++k)
          outer_far[(p * outlying + r) * ld + k] = static_cast<double>(row[k]);
      }
      for (integer r = 0; r < candidates_ && furthest(p, r) >= 0; ++r)
        fetch_rows(p, furthest(p, r), 1, outer.data() + (p * candidates_ + r) * ld);
    });

    // Fixed slices of tokens, added up in order.
    constexpr integer group = 8;
    integer const slices = std::clamp<integer>(tokens_ / 64, 1, 64);
    integer const sums = count * count + 2 * count * rows;
    aligned_array<double> parts(slices * sums, 0.);
    double const n = static_cast<double>(tokens_);
    threads_.run(slices, [&](integer s) {
      aligned_array<C> x(group * ld, C(0));
      aligned_array<double> wide(ld), k(group * count * rows);
      double* const products = parts.data() + s * sums;
      double* const squares = products + count * count;
      double* const plain = squares + count * rows;
      integer const end = (s + 1) * tokens_ / slices;
      for (integer from = s * tokens_ / slices; from < end; from += group) {
        integer const here = (std::min)(group, end - from);
        for (integer p = 0; p < count; ++p) {
          fetch_rows(p, from, here, x.data());
          bool const about_mean = sites_[static_cast<std::size_t>(p)].row_sums.empty();
          integer const used = round_up(sites_[static_cast<std::size_t>(p)].source.cols, 4 * W);
          for (integer g = 0; g < here; ++g) {
            C const* const row = x.data() + g * ld;
            std::fill(
                x.data() + g * ld + round_up(sites_[static_cast<std::size_t>(p)].source.cols, W),
                x.data() + g * ld + used, C(0));
            for (integer k0 = 0; k0 < used && outlying > 0; ++k0)
              wide[k0] = static_cast<double>(row[k0]);
            for (integer r = 0; r < rows; ++r) {
              integer const i = from + g, token = token_of(p, r);
              if (token < 0) break;
              double const inner =
                  token == i ? 0
                  : r < outlying
                      ? inner_product(wide.data(), outer_far.data() + (p * outlying + r) * ld, used)
                      : static_cast<double>(inner_product(
                            row, outer.data() + (p * candidates_ + r - outlying) * ld, used));
              double const centred = about_mean ? inner
                                                : inner - (lean(p, i) + lean(p, token)) / n +
                                                      leaning.data()[p] / n / n;
              k[(g * count + p) * rows + r] = inner;
              plain[p * rows + r] += inner;
              squares[p * rows + r] += token == i ? 0 : centred * centred;
            }
          }
        }
        for (integer g = 0; g < here && outlying > 0; ++g) {
          double const weight = is_far(from + g) ? 1 : 2;
          double const* const of = k.data() + g * count * rows;
          for (integer p = 0; p < count; ++p)
            for (integer q = 0; q <= p; ++q) {
              double sum = 0;
              for (integer r = 0; r < outlying; ++r) sum += of[p * rows + r] * of[q * rows + r];
              products[p * count + q] += weight * sum;
            }
        }
      }
    });
    for (integer s = 0; s < slices; ++s) {
      double const* const part = parts.data() + s * sums;
      for (integer k = 0; k < count * count; ++k) m.products.data()[k] += part[k];
      for (integer p = 0; p < count; ++p)
        for (integer r = 0; r < rows; ++r) {
          integer const token = token_of(p, r);
          if (token < 0) break;
          integer const at = p * tokens_ + token, from = count * count + p * rows + r;
          if (r < outlying || !is_far(token)) m.squares.data()[at] += part[from];
          if (r < outlying) m.row_sums.data()[at] += part[from + count * rows];
        }
    }
  }

  site_range sites_of(integer feature, integer count) const {
    integer const first = owner_.data()[feature];
    return {first, owner_.data()[feature + count - 1] - first + 1};
  }

  /// Features in rows, tokens in columns.
  void fetch(integer feature, integer count, integer token, integer tokens, C* to,
             integer ld) const {
    constexpr integer S = small_lanes<C>, chunk = 64;
    alignas(128) C x[chunk * W];
    std::fill_n(x, chunk * W, C(0));
    for (integer f = feature; f < feature + count;) {
      integer const p = owner_.data()[f];
      integer const end = (std::min)((std::min)(f + W, feature + count), starts_.data()[p + 1]);
      for (integer t = 0; t < tokens; t += chunk) {
        integer const here = (std::min)(chunk, tokens - t);
        std::fill(x + here * W, x + chunk * W, C(0));
        sites_[static_cast<std::size_t>(p)].fetch(token + t, here, f - starts_.data()[p], end - f,
                                                  x, W);
        for (auto at = std::lower_bound(far_.begin(), far_.end(), token + t);
             at != far_.end() && *at < token + t + here; ++at)
          std::fill_n(x + (*at - token - t) * W, W, C(0));
        C* const row = to + (f - feature) * ld + t;
        if (end - f == W) {
          for (integer i = 0; i < W; i += S)
            for (integer k = 0; k < round_up(here, S); k += S)
              transpose(packet::pset1<small_packet_t<C>>(C(0)), x + k * W + i, W, row + i * ld + k,
                        ld);
        } else {
          for (integer i = 0; i < end - f; ++i)
            for (integer k = 0; k < here; ++k) row[i * ld + k] = x[k * W + i];
        }
        for (integer i = 0; i < end - f; ++i)
          for (integer k = here; t + k < round_up(tokens, W); ++k) row[i * ld + k] = C(0);
      }
      f = end;
    }
  }

  void add_tile(tile const& t, gram_moments& m) {
    integer const blocks = static_cast<integer>(t.blocks.size());
    integer const steps = ceil_div(tokens_, depth_);
    aligned_array<double> sums(t.sums, 0.);
    auto const range = [&](integer s) {
      return depth_range{s * depth_, (std::min)(depth_, tokens_ - s * depth_), depth_};
    };
    packing<Product, C> const panels{t, features(), threads_.size() > 1};
    auto const pack = [&](integer s, integer task) {
      panels(
          task, [&](auto... where) { fetch(where...); }, range(s), rows_[s % 2], cols_[s % 2]);
    };
    auto const multiply = [&](integer s, block const& b) {
      multiply_block<Product>(
          t, b, rows_[s % 2], cols_[s % 2], range(s), s == 0, s + 1 == steps, buffer_.data(),
          [&](integer i, integer j, C const* g) { add_squares(b, i, j, g, sums.data() + b.sums); });
    };
    threads_.run(panels.tasks(), [&](integer i) { pack(0, i); });
    for (integer s = 0; s < steps; ++s) {
      integer const ahead = s + 1 < steps ? panels.tasks() : 0;
      threads_.run(blocks + ahead, [&](integer i) {
        if (i < blocks)
          multiply(s, t.blocks[static_cast<std::size_t>(i)]);
        else
          pack(s + 1, i - blocks);
      });
    }
    for (block const& b : t.blocks) {
      site_range const p = sites_of(b.row, b.rows), q = sites_of(b.col, b.cols);
      for (integer i = 0; i < p.count; ++i)
        for (integer j = 0; j < q.count; ++j)
          if (p.first + i >= q.first + j)
            m.products.data()[(p.first + i) * m.sites + q.first + j] +=
                sums[b.sums + i * q.count + j];
      for (integer i = 0; i < p.count; ++i)
        if (integer const j = p.first + i - q.first; j >= 0 && j < q.count)
          quadratic_.data()[p.first + i] += sums[b.sums + (p.count + i) * q.count + j];
    }
  }

  /// Squares of a micro tile, by the sites of its row and column, and then x_mᵀ(XᵀX)x_m of the furthest
  /// token of a site. Entries above the diagonal are left out; within one site the others count twice.
  void add_squares(block const& b, integer i0, integer j0, C const* g, double* sums) const {
    site_range const p = sites_of(b.row, b.rows), q = sites_of(b.col, b.cols);
    integer const last = b.row + b.rows;
    for (integer j = j0; j < (std::min)(j0 + N, b.col + b.cols); ++j, g += R) {
      integer const of_col = owner_.data()[j];
      for (integer i = (std::max)(i0, j); i < (std::min)(i0 + R, last);) {
        integer const of_row = owner_.data()[i];
        integer const end = (std::min)((std::min)(i0 + R, last), starts_.data()[of_row + 1]);
        double sum = 0, diagonal = 0, along = 0;
        double const* const furthest = features_of_it_.data();
        if (i == j) {
          double const x = static_cast<double>(g[i - i0]);
          diagonal = x * x;
          along = x * furthest[i] / 2;
          ++i;
        }
        if (of_row == of_col)
          for (integer k = i; k < end; ++k) along += static_cast<double>(g[k - i0]) * furthest[k];
        for (; i < end; ++i) {
          double const x = static_cast<double>(g[i - i0]);
          sum += x * x;
        }
        integer const at = (of_row - p.first) * q.count + of_col - q.first;
        sums[at] += (of_row == of_col ? 2 : 1) * sum + diagonal;
        sums[p.count * q.count + at] += 2 * along * furthest[j];
      }
    }
  }

  team& threads_;
  std::vector<prepared_site<C>> const& sites_;
  integer tokens_, depth_ = 0, side_ = 0;
  work_share share_;
  std::vector<integer> starts_, owner_;  // first feature of each site; site of each feature
  std::vector<integer> far_;             // tokens left out of the cross-covariances, in order
  std::vector<std::vector<integer>> furthest_;  // S: the tokens with the largest norms
  integer candidates_ = 1;                      // most of them at a site
  std::vector<double> quadratic_;               // S: x_mᵀ(XᵀX)x_m of it
  aligned_array<double> features_of_it_;
  aligned_array<C> buffer_;
  panel<C> rows_[2], cols_[2];
};

}  // namespace rflow::detail
