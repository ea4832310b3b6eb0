// SPDX-License-Identifier: Apache-2.0
#pragma once

// The products of all pairs of sites, from the tiles.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <rflow/detail/cpu/centre.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/product.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// The products of all pairs of rows of a buffer: inner products along contiguous rows, in register
/// blocks of 4 × 4 or 4 × 2 packets of partial sums. No packing: the rows are used as they lie.
template <class C>
class row_products {
  static constexpr integer W = lanes_v<C>, R = 4, N = packed_product::many_registers ? 4 : 2;
  // Terms before partial sums go over to double, 512 a lane of floats: beside one large term, equal
  // small ones are all rounded the same way.
  static constexpr integer longest = 512 * static_cast<integer>(lanes_v<float>);

 public:
  /// @param most  terms before partial sums go over to double, a multiple of W
  explicit row_products(integer rows, integer most = longest)
      : rows_(rows),
        flush_((std::min)(most, longest)),
        chunk_(std::clamp<integer>(8192 / rows / 64 * 64, 64, 1024)),
        partial_(ceil_div(rows, R) * ceil_div(rows, N) * R * N * W) {}

  /// out[p · rows + q] = Σ x_p x_q for q ≤ p over `count` columns, a multiple of W.
  void operator()(C const* x, integer ld, integer count, double* out) {
    std::fill_n(out, rows_ * rows_, 0.);
    for (integer c = 0; c < count; c += flush_) {
      integer const part = (std::min)(flush_, count - c);
      for (integer k = 0; k < part; k += chunk_)
        each_block([&](integer p, integer q, C* sums) {
          multiply(x + c + k, ld, p, q, (std::min)(chunk_, part - k), k > 0, sums);
        });
      each_block([&](integer p, integer q, C const* sums) {
        for (integer r = 0; r < R; ++r)
          for (integer s = 0; s < N; ++s, sums += W)
            if (p + r < rows_ && q + s < rows_) {
              double total = 0;
              for (integer w = 0; w < W; ++w) total += static_cast<double>(sums[w]);
              out[(p + r) * rows_ + q + s] += total;
            }
      });
    }
  }

 private:
  template <class F>
  void each_block(F const& f) {
    C* sums = partial_.data();
    for (integer p = 0; p < rows_; p += R)
      for (integer q = 0; q < (std::min)(rows_, p + R); q += N, sums += R * N * W) f(p, q, sums);
  }

  void multiply(C const* x, integer ld, integer p, integer q, integer count, bool accumulate,
                C* sums) const {
    using namespace packet;
    using P = packet_t<C>;
    C const *a[R], *b[N];
    for (integer r = 0; r < R; ++r) a[r] = x + (std::min)(p + r, rows_ - 1) * ld;
    for (integer s = 0; s < N; ++s) b[s] = x + (std::min)(q + s, rows_ - 1) * ld;
    P sum[R][N];
    for (integer r = 0; r < R; ++r)
      for (integer s = 0; s < N; ++s)
        sum[r][s] = accumulate ? pload<P>(sums + (r * N + s) * W) : pset1<P>(C(0));
    for (integer k = 0; k < count; k += W) {
      P y[N];
      for (integer s = 0; s < N; ++s) y[s] = pload<P>(b[s] + k);
      for (integer r = 0; r < R; ++r) {
        P const v = pload<P>(a[r] + k);
        for (integer s = 0; s < N; ++s) sum[r][s] = pmadd(v, y[s], sum[r][s]);
      }
    }
    for (integer r = 0; r < R; ++r)
      for (integer s = 0; s < N; ++s) pstore(sums + (r * N + s) * W, sum[r][s]);
  }

  integer rows_, flush_, chunk_;
  aligned_array<C> partial_;
};

/// Fills in the other half of the products, goes over to units of the data, and writes NaN where
/// the data are not finite.
template <class C>
void deliver(std::vector<prepared_site<C>> const& sites, std::vector<int> const& exponents,
             gram_moments& m) {
  std::vector<double> units(sites.size());
  for (integer p = 0; p < m.sites; ++p) {
    auto const& site = sites[static_cast<std::size_t>(p)];
    m.non_finite.data()[p] = site.non_finite;
    if (!(site.scale > 0))
      m.why.data()[p] = site.unclear ? status::ill_conditioned : status::constant_layer;
    if (site.non_finite.found()) {
      m.why.data()[p] = status::non_finite;
    }
    int const exponent = exponents.data()[p];
    if (std::abs(exponent) > 200) m.exponent.data()[p] = exponent;  // else products leave the range
    double const unit = site.non_finite.found() ? std::numeric_limits<double>::quiet_NaN()
                                                : std::ldexp(1., exponent - m.exponent.data()[p]);
    units.data()[p] = unit;
    for (integer q = 0; q <= p; ++q) {
      double const product = m.products.data()[p * m.sites + q] * unit * units.data()[q];
      m.products.data()[p * m.sites + q] = m.products.data()[q * m.sites + p] = product;
    }
    for (integer i = p * m.tokens; i < (p + 1) * m.tokens; ++i) {
      m.row_sums.data()[i] *= unit;
      m.diagonal.data()[i] *= unit;
      if (!m.squares.empty()) m.squares.data()[i] *= unit * unit;
    }
    m.square_sum.data()[p] *= unit * unit;
    m.entry_rounding.data()[p] *=
        site.scale > 0 ? std::abs(unit) : 0;  // equal tokens: nothing is lost
    m.sum_rounding.data()[p] *= site.scale > 0 ? unit * unit : 0;
  }
}

}  // namespace rflow::detail
