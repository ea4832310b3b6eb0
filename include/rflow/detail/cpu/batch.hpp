// SPDX-License-Identifier: Apache-2.0
#pragma once

// The U-centred kernel of one batch of one site, for those who see sites one after the other.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <type_traits>
#include <vector>

#include <rflow/detail/cpu/centre.hpp>
#include <rflow/detail/cpu/kernels.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/product.hpp>
#include <rflow/detail/cpu/tile.hpp>
#include <rflow/detail/numerics.hpp>
#include <rflow/statistics.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// The U-centred linear kernel of one batch of one site, for those who see sites one after the other
/// (see batch_stream). All memory is had at construction.
template <class Product, class C>
class batch_engine {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static constexpr integer W = lanes_v<C>;

 public:
  /// What is left of a site's batch, beside the kernel's entries.
  struct summary {
    double rounding = 0;  // what rounding makes of ‖U‖_F, in the entries' units
    double floor = 0;     // and of ‖U‖²_F beyond that
    int exponent = 0;     // entries times 2^exponent are in units of the data
    status why = status::ok;
  };

  /// Entries below the diagonal of n tokens, and room for them in whole packets.
  static integer entries(integer n) { return n * (n - 1) / 2; }
  static integer room(integer n) { return round_up(entries(n), 8 * W); }

  batch_engine(integer width, integer most)
      : width_(width),
        ld_(round_up(width, sum_step)),
        block_(depth_of_block<C>(width, Product::depth_lines)),
        tile_(tiling<Product, C>::plan(0, most, 0, most, true, [](block const&) { return 0; })),
        x_(round_up(most, 4) * ld_),
        high_(ld_),
        low_(ld_),
        products_(tile_.area),
        rows_{aligned_array<C>(round_up(most, R) * block_, C(0)), round_up(most, R)},
        cols_{aligned_array<C>(round_up(most, R) * block_, C(0)), round_up(most, R)},
        means_(static_cast<std::size_t>(ld_)),
        norms_(static_cast<std::size_t>(round_up(most, R) + R)),
        row_sums_(norms_.size()),
        scratch_(norms_.size()),
        wide_(ld_) {
    by_.shift.reserve(norms_.size());
    by_.removed.reserve(norms_.size());
  }

  /// Writes U_ij of the first n rows, i > j, row after row, and zeros up to room(n).
  /// @param n  from 4 to the number of tokens given at construction
  summary operator()(panel_source<C> const& source, integer n, C* out) {
    summary s = centre(source, n);
    if (s.why != status::ok) {
      std::fill_n(out, room(n), C(0));
      return s;
    }
    fit(n, unit_roundoff<C>);
    multiply(n, out);
    std::fill(out + entries(n), out + room(n), C(0));
    if constexpr (!std::is_same_v<C, double>)
      if (double const norm = norm_of(out, n); by_.rounding > narrow_accuracy * norm)
        multiply_in_double(source, n, out);
    s.rounding = by_.rounding;
    s.floor = by_.floor;
    return s;
  }

 private:
  std::span<double const> first(std::vector<double> const& values, integer n) const {
    return {values.data(), static_cast<std::size_t>(n)};
  }
  void fit(integer n, double unit) {
    by_.fit(first(norms_, n), robust_ ? first(row_sums_, n) : std::span<double const>{}, width_,
            unit);
  }
  static double norm_of(C const* u, integer n) {
    double sum = 0;
    for (integer k = 0; k < entries(n); ++k)
      sum += 2 * static_cast<double>(u[k]) * static_cast<double>(u[k]);
    return std::sqrt(sum);
  }

  void multiply(integer n, C* out) {
    auto const fetch = [&](integer row, integer rows, integer col, integer cols, C* to,
                           integer ld) {
      for (integer i = 0; i < rows; ++i)
        std::copy_n(x_.data() + (row + i) * ld_ + col, cols, to + i * ld);
    };
    auto const finish = [&](integer i0, integer j0, C const* g) {
      for (integer j = j0; j < (std::min)(j0 + N, n); ++j) {
        double const tj = by_.shift.data()[j];
        for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i)
          out[entries(i) + j] = static_cast<C>(static_cast<double>(g[(j - j0) * R + i - i0]) -
                                               (by_.shift.data()[i] + tj));
      }
    };
    for (integer k = 0; k < width_; k += block_) {
      depth_range const range{k, (std::min)(block_, width_ - k), block_};
      for (integer strip = 0; strip * R < n; ++strip)
        pack_strip<Product, C>(fetch, strip * R, (std::min)(R, n - strip * R), strip, range, false,
                               &rows_, &cols_);
      for (block const& b : tile_.blocks)
        if (b.row < n && b.col < n)
          multiply_block<Product>(tile_, b, rows_, cols_, range, k == 0, k + block_ >= width_,
                                  products_.data(), finish);
    }
  }

  /// The same with products in double, for what float cannot tell: without panels, and slow.
  void multiply_in_double(panel_source<C> const& source, integer n, C* out) {
    source(0, n, 0, width_, x_.data(), ld_);
    auto const value = [&](integer i, integer k) {
      return (static_cast<double>(x_[i * ld_ + k]) * scale_ + static_cast<double>(high_[k]) +
              static_cast<double>(low_[k])) *
             rescale_;
    };
    std::fill(means_.begin(), means_.end(), 0.);
    for (integer i = 0; i < n; ++i)
      for (integer k = 0; k < width_; ++k) means_.data()[k] += value(i, k);
    for (integer i = 0; i < n; ++i) {
      norms_.data()[i] = row_sums_.data()[i] = 0;
      for (integer k = 0; k < width_; ++k) {
        double const x = value(i, k);
        norms_.data()[i] += x * x;
        row_sums_.data()[i] += x * (means_.data()[k] - x);
      }
    }
    robust_ = true;
    fit(n, unit_roundoff<double>);
    for (integer i = 1; i < n; ++i) {
      for (integer k = 0; k < width_; ++k) wide_[k] = value(i, k);
      for (integer j = 0; j < i; ++j) {
        double sum[4] = {};
        for (integer k = 0; k < width_; ++k) sum[k % 4] += wide_[k] * value(j, k);
        out[entries(i) + j] = static_cast<C>((sum[0] + sum[1]) + (sum[2] + sum[3]) -
                                             (by_.shift.data()[i] + by_.shift.data()[j]));
      }
    }
  }
  /// Column means of the rows at hand, summed times 2^exponent; false if a sum is not finite.
  bool find_means(integer n, int exponent) {
    std::fill(means_.begin(), means_.end(), 0.);
    for (integer i = 0; i < n; i += 4)
      add_rows(x_.data() + i * ld_, ld_, ld_, exponent, means_.data());
    bool finite = true;
    for (double& mean : means_) {
      finite = finite && is_finite(mean);
      mean = std::ldexp(mean / static_cast<double>(n), -exponent);
    }
    return finite;
  }

  void load(panel_source<C> const& source, integer n) {
    source(0, n, 0, width_, x_.data(), ld_);
    for (integer i = 0; i < round_up(n, 4); ++i)
      std::fill(x_.data() + i * ld_ + (i < n ? width_ : 0), x_.data() + (i + 1) * ld_, C(0));
  }
  void subtract_centre(integer n) {
    using namespace packet;
    using P = packet_t<C>;
    std::fill(norms_.begin(), norms_.end(), 0.);
    each_packet(n, [&](C* x, integer k) {
      P const s = pset1<P>(static_cast<C>(scale_));
      pstore(x,
             P(padd(pmadd(pload<P>(x), s, pload<P>(high_.data() + k)), pload<P>(low_.data() + k))));
    });
    add_norms(x_.data(), n, ld_, ld_, norms_.data());
  }
  /// Moves the centre to the mean of the tokens that are closer; see centre_among.
  void centre_among_closer(panel_source<C> const& source, integer n, double limit) {
    std::fill(means_.begin(), means_.end(), 0.);
    double closer = 0;
    for (integer i = 0; i < n; ++i)
      if (norms_.data()[i] <= limit) {
        ++closer;
        for (integer k = 0; k < width_; ++k)
          means_.data()[k] += static_cast<double>(x_[i * ld_ + k]);
      }
    for (integer k = 0; k < width_; ++k) {
      double const high = static_cast<double>(high_[k]);
      double const low = static_cast<double>(low_[k]) - means_.data()[k] / closer;
      high_[k] = static_cast<C>(high + low);
      low_[k] = static_cast<C>((high - static_cast<double>(high_[k])) + low);
    }
    load(source, n);
    subtract_centre(n);
    std::fill(means_.begin(), means_.end(), 0.);
    std::fill_n(wide_.data(), width_, 0.);
    for (integer i = 0; i < n; ++i)
      for (integer k = 0; k < width_; ++k)
        add_in_two(static_cast<double>(x_[i * ld_ + k]), means_.data()[k], wide_[k]);
    for (integer i = 0; i < n; ++i) {
      double sum = 0;
      for (integer k = 0; k < width_; ++k) {
        double const x = static_cast<double>(x_[i * ld_ + k]);
        sum += x * ((means_.data()[k] - x) + wide_[k]);
      }
      row_sums_.data()[i] = sum;
    }
  }

  /// Fills x_ with centred, scaled rows and norms_ with their squared norms; as prepare() does.
  summary centre(panel_source<C> const& source, integer n) {
    using namespace packet;
    using P = packet_t<C>;
    robust_ = false;
    load(source, n);
    if (!find_means(n, 0)) {
      for (integer i = 0; i < n * ld_; ++i)
        if (!is_finite(x_[i])) return {0, 0, 0, status::non_finite};
      find_means(n, -64);  // finite doubles whose sum is not
    }
    double const largest =
        static_cast<double>(predux_max(largest_of(x_.data(), n * ld_, pset1<P>(C(0)))));
    if (!(largest > 0)) return {0, 0, 0, status::constant_layer};
    scale_ = power_of_two<C>(-std::ilogb(largest) - 1);
    for (integer k = 0; k < ld_; ++k) {
      double const mean = k < width_ ? means_.data()[k] * scale_ : 0;
      high_[k] = static_cast<C>(-mean);
      low_[k] = static_cast<C>(-mean - static_cast<double>(high_[k]));
    }
    if constexpr (std::is_same_v<C, double>) {  // what is left of the means goes, too
      subtract_centre(n);
      find_means(n, 0);
      for (integer k = 0; k < width_; ++k) low_[k] -= means_.data()[k];
      load(source, n);
    }
    subtract_centre(n);
    double const rounding = rounding_of_means<C>(n) * scaled(largest, scale_);
    double norm = *std::max_element(norms_.begin(), norms_.end());
    if (norm <= rounding * rounding * static_cast<double>(width_))
      return {0, 0, 0, status::constant_layer};
    double trace = 0;
    for (integer i = 0; i < n; ++i) trace += norms_.data()[i];
    if (double const limit = centre_limit(first(norms_, n), trace, norm, scratch_);
        is_finite(limit)) {
      centre_among_closer(source, n, limit);
      norm = *std::max_element(norms_.begin(), norms_.end());
      robust_ = true;
    }
    rescale_ = std::ldexp(1., -std::ilogb(norm) / 2);
    each_packet(n, [&](C* x, integer) {
      pstore(x, P(pmul(pload<P>(x), pset1<P>(static_cast<C>(rescale_)))));
    });
    for (auto* const of : {&norms_, &row_sums_})
      for (double& a : *of) a *= rescale_ * rescale_;
    return {0, 0, -2 * (std::ilogb(scale_) + std::ilogb(rescale_)), status::ok};
  }

  template <class F>
  void each_packet(integer n, F const& f) {
    for (integer i = 0; i < n; ++i)
      for (integer k = 0; k < ld_; k += W) f(x_.data() + i * ld_ + k, k);
  }

  integer width_, ld_, block_;
  tile tile_;
  aligned_array<C> x_, high_, low_, products_;
  panel<C> rows_, cols_;
  std::vector<double> means_, norms_, row_sums_, scratch_;
  aligned_array<double> wide_;  // a row, or what means_ has lost
  u_centring by_;
  double scale_ = 1, rescale_ = 1;
  bool robust_ = false;  // centred among the closer tokens: row_sums_ counts
};

}  // namespace rflow::detail
