// SPDX-License-Identifier: Apache-2.0
#pragma once

// Third moments and shifts of the kernel matrices, one site at a time: what p-values need.

#include <Eigen/Core>
#include <unsupported/Eigen/FFT>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <rflow/detail/cpu/inner.hpp>
#include <rflow/detail/cpu/kernels.hpp>
#include <rflow/detail/cpu/options.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/product.hpp>
#include <rflow/moments.hpp>
#include <rflow/statistics.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

struct third_moments {
  double cubes, triangles;  // Σ U_ij³ and tr U³, over ‖U‖³
};

/// What shuffled_tail and all_orders_tail need of U, n × n, in units of its norm.
/// @param squares          n: Σ_j U_ij²
/// @param numbers, heavy    shuffle_numbers and (pins + 1) × n are written; n × n and no numbers for
///                         at most few_tokens
template <class C>
void find_shuffles(integer n, C const* u, double norm, double const* squares,
                   third_moments const& third, double* numbers, double* heavy) {
  if (!(norm > 0) || !is_finite(norm)) return;  // a site without an answer
  auto const row = [&](integer a, double* out) {
    for (integer i = 0; i < n; ++i) out[i] = static_cast<double>(u[a * n + i]) / norm;
  };
  if (n <= few_tokens) {
    for (integer i = 0; i < n; ++i) row(i, heavy + i * n);
    return;
  }
  auto const times = [&](double const* x, double* out) {
    std::fill_n(out, n, 0.);
    for (integer j = 0; j < n; ++j)  // symmetric: columns are rows
      for (integer i = 0; i < n; ++i) out[i] += x[j] / norm * static_cast<double>(u[j * n + i]);
  };
  std::vector<double> relative(squares, squares + n);
  for (double& x : relative) x = x / norm / norm;
  shuffle_moments const found =
      find_shuffle_moments(n, relative.data(), third.cubes, third.triangles, row, times, heavy);
  std::memcpy(numbers, &found, sizeof found);
}

/// Shifted products of all pairs of sites, Σ_ij U_ij V_{i+s,j+s} modulo n for all s: correlations
/// along the diagonals of U and V, which are products of their Fourier transforms.
class shifted_products {
 public:
  shifted_products(integer n, integer sites)
      : n_(n),
        sites_(sites),
        signals_((n / 2 + 1) / 2),
        spectra_(static_cast<std::size_t>(n * sites * signals_)) {}

  /// What that takes of memory.
  static double bytes(integer n, integer sites) {
    double const tokens = static_cast<double>(n), s = static_cast<double>(sites);
    return 8 * tokens * (s * (tokens / 4 + 1) + s * s) + 8 * tokens * s * s;
  }

  /// Takes over a site's U / norm. Diagonals k and n − k of U hold the same numbers: half of them
  /// do, two in one complex signal.
  template <class C>
  void add(integer site, C const* u, double norm) {
    using complex = std::complex<double>;
    Eigen::FFT<double> transform;
    std::vector<complex> in(static_cast<std::size_t>(n_)), out(in.size());
    for (integer m = 0; m < signals_; ++m) {
      auto const entry = [&](integer k, integer i) {
        if (2 * k > n_) return 0.;
        double const weight = 2 * k == n_ ? 1 : 1.4142135623730951;
        return weight * static_cast<double>(u[i * n_ + (i + k) % n_]) / norm;
      };
      for (integer i = 0; i < n_; ++i)
        in.data()[i] = complex(entry(2 * m + 1, i), entry(2 * m + 2, i));
      transform.fwd(out.data(), in.data(), static_cast<int>(n_));
      for (integer f = 0; f < n_; ++f)
        spectra_.data()[(site * n_ + f) * signals_ + m] = std::complex<float>(out.data()[f]);
    }
  }

  /// sites × sites × n.
  std::vector<double> operator()(team& threads) const {
    using matrix = Eigen::Matrix<std::complex<float>, Eigen::Dynamic, Eigen::Dynamic>;
    std::vector<std::complex<float>> products(static_cast<std::size_t>(n_ * sites_ * sites_));
    threads.run(n_, [&](integer f) {
      Eigen::Map<matrix const, 0, Eigen::OuterStride<>> const x(
          spectra_.data() + f * signals_, signals_, sites_, Eigen::OuterStride<>(n_ * signals_));
      for (integer p = 0; p < sites_; ++p)
        for (integer q = 0; q <= p; ++q)
          products.data()[(p * sites_ + q) * n_ + f] = x.col(p).dot(x.col(q));
    });
    std::vector<double> out(static_cast<std::size_t>(n_ * sites_ * sites_));
    threads.run(sites_, [&](integer p) {
      Eigen::FFT<double> transform;
      std::vector<std::complex<double>> in(static_cast<std::size_t>(n_)), back(in.size());
      for (integer q = 0; q <= p; ++q) {
        std::copy_n(products.data() + (p * sites_ + q) * n_, n_, in.data());
        transform.inv(back.data(), in.data(), static_cast<int>(n_));
        for (integer s = 0; s < n_; ++s) {
          double const t = back.data()[s].real();
          out.data()[(p * sites_ + q) * n_ + s] = t;
          out.data()[(q * sites_ + p) * n_ + (n_ - s) % n_] = t;
        }
      }
    });
    return out;
  }

 private:
  integer n_, sites_, signals_;
  std::vector<std::complex<float>> spectra_;
};

/// Of the U-centred kernel matrix of one site, which is formed whole.
/// @param numbers, heavy  as find_shuffles writes them
template <class Product, class C, class Bound>
third_moments find_third_moments(integer index, prepared_site<C> const& site, Bound const& kernel,
                                 double* numbers, double* heavy, shifted_products* shifted) {
  using namespace packet;
  using P = packet_t<C>;
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>, W = lanes_v<C>;
  integer const n = static_cast<integer>(site.norms.size());
  aligned_array<C> u(n * n, C(0)), token(round_up(n, R) + R + N, C(0));
  aligned_array<C> removed(round_up(n, R) + R + N, C(0));
  for (integer i = 0; i < n; ++i) token[i] = kernel.token(i), removed[i] = kernel.removed(i);
  std::vector<double> shift(static_cast<std::size_t>(n));
  double total = 0;
  auto const form = [&](integer i0, integer j0, C const* g) {
    alignas(128) C column[R];
    for (integer j = j0; j < (std::min)(j0 + N, n); ++j, g += R) {
      for (integer r = 0; r < R; r += W)
        pstore(
            column + r,
            kernel(P(pload<P>(g + r)), P(ploadu<P>(token.data() + i0 + r)), P(pset1<P>(token[j])),
                   P(padd(ploadu<P>(removed.data() + i0 + r), pset1<P>(removed[j])))));
      if constexpr (Bound::repairs)
        for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n) && kernel.outlying(); ++i)
          if (kernel.lost(static_cast<double>(g[i - i0]), kernel.number(i), kernel.number(j)))
            column[i - i0] =
                static_cast<C>(kernel.repair(i, j) -
                               (static_cast<double>(removed[i]) + static_cast<double>(removed[j])));
      for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i) {
        u[i * n + j] = column[i - i0];
        shift.data()[i] += static_cast<double>(column[i - i0]);
        shift.data()[j] += static_cast<double>(column[i - i0]);
      }
    }
  };
  inner_products<Product, C>([&](auto... where) { site.fetch(where...); }, n, site.source.cols,
                             form);
  double const count = static_cast<double>(n);
  for (double& s : shift) {
    total += s;
    s /= count - 2;
  }
  double const offset = total / ((count - 1) * (count - 2));
  double squares = 0, cubes = 0, triangles = 0;
  std::vector<double> row_squares(static_cast<std::size_t>(n));
  for (integer i = 0; i < n; ++i)
    for (integer j = 0; j < i; ++j) {
      double const x =
          static_cast<double>(u[i * n + j]) - shift.data()[i] - shift.data()[j] + offset;
      squares += 2 * x * x;
      row_squares.data()[i] += x * x;
      row_squares.data()[j] += x * x;
      cubes += 2 * x * x * x;
      u[i * n + j] = u[j * n + i] = static_cast<C>(x);
    }
  auto const rows_of_u = [&](integer row, integer rows, integer col, integer cols, C* to,
                             integer ld) {
    for (integer i = 0; i < rows; ++i)
      std::copy_n(u.data() + (row + i) * n + col, cols, to + i * ld);
  };
  inner_products<Product, C>(rows_of_u, n, n, [&](integer i0, integer j0, C const* g) {
    for (integer j = j0; j < (std::min)(j0 + N, n); ++j, g += R)
      for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i)
        triangles += 2 * static_cast<double>(u[i * n + j]) * static_cast<double>(g[i - i0]);
  });
  double const norm = std::sqrt(squares);
  third_moments const found{cubes / norm / norm / norm, triangles / norm / norm / norm};
  find_shuffles(n, u.data(), norm, row_squares.data(), found, numbers, heavy);
  if (shifted) shifted->add(index, u.data(), norm > 0 && is_finite(norm) ? norm : 1);
  return found;
}

/// Adds third moments, if asked for. Sites run side by side, as many as memory holds.
/// @throws std::invalid_argument if the bound does not hold one kernel matrix and a half
template <class Product, class C, class Kernel>
gram_moments with_third_moments(team& threads, std::vector<prepared_site<C>> const& sites,
                                Kernel const& kernel, gram_options const& options, gram_moments m) {
  if (!(options.significance || options.shifts) || m.tokens < 4) return m;
  if (options.shifts && options.share.of > 1)
    throw std::invalid_argument("rflow: shifted tokens are not compared in shares of the work");
  double const n = static_cast<double>(m.tokens), bound = static_cast<double>(options.memory_bound);
  double const bytes = sizeof(C) * n * (1.5 * n + 2 * 128 + Product::template rows<C>);
  double const spectra = options.shifts ? shifted_products::bytes(m.tokens, m.sites) : 0;
  if (bytes + spectra > bound)
    throw std::invalid_argument("rflow: a memory bound of " + std::to_string(options.memory_bound) +
                                " bytes is below the " +
                                std::to_string(std::llround(bytes + spectra)) + " bytes that " +
                                (options.shifts ? "shifts take" : "significance takes") + " for " +
                                std::to_string(m.tokens) + " tokens");
  std::optional<shifted_products> shifted;
  if (options.shifts) shifted.emplace(m.tokens, m.sites);
  integer const at_once = static_cast<integer>((std::min)((bound - spectra) / bytes, 1e6));
  m.cubes.resize(sites.size());
  m.triangles.resize(sites.size());
  bool const few = m.tokens <= few_tokens;
  integer const numbers = few ? 0 : static_cast<integer>(shuffle_numbers);
  integer const rows = m.tokens * (few ? m.tokens : static_cast<integer>(pins) + 1);
  m.shuffles.resize(sites.size() * static_cast<std::size_t>(numbers));
  m.heavy_rows.resize(sites.size() * static_cast<std::size_t>(rows));
  integer const first = options.share.index, step = options.share.of;
  integer const mine = first < m.sites ? ceil_div(m.sites - first, step) : 0;
  for (integer done = 0; done < mine; done += at_once)
    threads.run((std::min)(at_once, mine - done), [&](integer i) {
      integer const site = first + (done + i) * step;
      auto const p = static_cast<std::size_t>(site);
      third_moments const t = find_third_moments<Product>(
          site, sites[p], kernel.template bind<C>(site, sites[p]),
          m.shuffles.data() + site * numbers, m.heavy_rows.data() + site * rows,
          shifted ? &*shifted : nullptr);
      m.cubes[p] = t.cubes;
      m.triangles[p] = t.triangles;
    });
  if (shifted) m.shifts = (*shifted)(threads);
  return m;
}

}  // namespace rflow::detail
