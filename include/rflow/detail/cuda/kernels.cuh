// SPDX-License-Identifier: Apache-2.0
#pragma once

// What turns inner products of one site into entries of its kernel matrix, on a device:
// C operator()(C k, C ti, C tj, C removed), from the inner product, a number of both tokens and the sum of
// what was removed for both; see cpu/kernels.hpp. The host fills in a kernel_facts for every site.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

#include <cuda_runtime.h>

#include <rflow/detail/cuda/memory.cuh>
#include <rflow/detail/numerics.hpp>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

/// What the host knows of a site.
struct site_facts {
  integer cols, first_col;
  double largest = 0, pre = 1, scale = 0;  // scale 0: nothing to compare
  bool about_mean = true;                  // else row sums count
  position bad = {};

  /// Kernel values of scaled data times 2^exponent() are those of the data.
  int exponent() const { return scale > 0 ? -2 * std::ilogb(scale) : 0; }
};

/// A site's kernel, by token: what entries need, and what rounding makes of them.
struct kernel_facts {
  std::vector<double> number, removed, diagonal;
  double rounding = 0, floor = 0;
  int exponent = 0;  // G · 2^exponent is in units of the data
};

/// U_ij = K_ij − u_i − u_j, the U-centred linear kernel: its row sums without the diagonal are 0.
template <class C>
struct linear_entry {
  static constexpr bool row_sums = false;

  __host__ __device__ C operator()(C k, C ti, C tj, C) const { return k - (ti + tj); }
};

/// exp(−‖x_i − x_j‖² / 2σ²) − c_i − c_j, with c_i + c_j near the mean of a row: little cancels later.
template <class C>
struct rbf_entry {
  static constexpr bool row_sums = true;
  C rate;

  __host__ __device__ C operator()(C k, C ti, C tj, C removed) const {
    using std::exp;
    C const power = k * rate - (ti + tj);
    return exp(power < 0 ? power : C(0)) - removed;
  }
};

template <class C>
struct make_linear {
  linear_entry<C> operator()(site_facts const&, double) const { return {}; }
  kernel_facts operator()(site_facts const& s, std::span<double const> norms,
                          std::span<double const> rows, double) const {
    u_centring by;
    by.fit(norms, rows, s.cols, static_cast<double>(std::numeric_limits<C>::epsilon()) / 2);
    kernel_facts k{by.shift, by.removed, {}, by.rounding, by.floor, s.exponent()};
    for (std::size_t i = 0; i < norms.size(); ++i) k.diagonal.push_back(norms[i] - 2 * by.shift[i]);
    return k;
  }
};

template <class C>
struct make_rbf {
  static double rate(site_facts const& s, double sigma) {
    constexpr double most =
        std::same_as<C, double> ? 1e300 : 1e36;  // a_i ≤ 4: exponents are finite
    double const width = sigma * (s.scale > 0 ? s.scale : 1);
    return static_cast<double>(static_cast<C>(std::min(1 / width / width, most)));
  }
  rbf_entry<C> operator()(site_facts const& s, double sigma) const {
    return {static_cast<C>(rate(s, sigma))};
  }
  kernel_facts operator()(site_facts const& s, std::span<double const> norms,
                          std::span<double const>, double sigma) const {
    double const slope = rate(s, sigma) / 2, n = static_cast<double>(norms.size());
    double const typical = median_of(norms) * slope;
    double const limit = std::same_as<C, double> ? 4096 : 4;
    double const cancels = std::min(2 * typical, limit);
    kernel_facts k;
    k.rounding = static_cast<double>(std::numeric_limits<C>::epsilon()) / 4 *
                 std::sqrt(n * (n - 1) * (1 + cancels * cancels));
    double const width = sigma * (s.scale > 0 ? s.scale : 1);
    if (sigma > 0 && 1 / width / width > rate(s, sigma) * 1.01) k.rounding = n;  // C has no such σ
    std::vector<double> outlying;
    for (double const a : norms) {
      k.number.push_back(a * slope);
      double const c = std::exp(-a * slope - typical) - std::exp(-2 * typical) / 2;
      k.removed.push_back(static_cast<double>(static_cast<C>(c)));
      k.diagonal.push_back(1 - 2 * k.removed.back());
      if (2 * a * slope > limit) outlying.push_back(std::sqrt(a * slope));
    }
    // Two tokens far from the centre and at the same distance from it may be close to each other, and
    // then C has lost their entry.
    std::sort(outlying.begin(), outlying.end());
    double lost = 0;
    for (std::size_t i = 1; i < outlying.size(); ++i) lost += outlying[i] - outlying[i - 1] < 5;
    if (lost > 0)
      k.rounding = std::hypot(k.rounding, 16 * std::numeric_limits<C>::epsilon() * outlying.back() *
                                              outlying.back() * std::sqrt(lost));
    return k;
  }
};

}  // namespace rflow::detail::passes
