// SPDX-License-Identifier: Apache-2.0
#pragma once

// What turns inner products into entries of a kernel matrix.
//
// kernel.bind<C>(p, site) returns what turns inner products of site p into G:
//
//     C token(i), C removed(i)   two numbers per token: G_ij + removed(i) + removed(j) is k(x_i, x_j) of features
//                                centred at their mean
//     P operator()(P k, P ti, P tj, P removed)   G from the inner product, the tokens' numbers and the sum
//                                of their removed ones
//     double diagonal(i)         G_ii
//     double rounding, floor     what rounding makes of ‖G‖_F, and of ‖U‖²_F beyond that
//     int exponent               G · 2^exponent is in units of the data
//     static constexpr bool row_sums   false if they vanish
//     double rounding_of(Σ k²)         that of ‖G‖_F once the entries are known, where it depends on them
//     static constexpr bool repairs    whether it has, for entries that inner products lose,
//     bool outlying(), bool lost(k, ti, tj), double repair(i, j)

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include <rflow/detail/cpu/centre.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/numerics.hpp>
#include <rflow/statistics.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

template <class C>
inline constexpr double unit_roundoff = static_cast<double>(std::numeric_limits<C>::epsilon()) / 2;

/// U_ij = K_ij − u_i − u_j, the U-centred linear kernel: its row sums without the diagonal are 0.
struct linear_kernel {
  static constexpr bool about_mean = false;

  template <class C>
  struct bound {
    static constexpr bool row_sums = false, repairs = false;
    int exponent;
    double rounding, floor;
    std::vector<double> const* norms;
    u_centring by;

    C token(integer i) const { return static_cast<C>(by.shift.data()[i]); }
    C removed(integer i) const { return static_cast<C>(by.removed.data()[i]); }
    double diagonal(integer i) const { return norms->data()[i] - 2 * by.shift.data()[i]; }
    template <class P>
    P operator()(P const& k, P const& ti, P const& tj, P const&) const {
      return packet::psub(k, packet::padd(ti, tj));
    }
  };

  template <class C>
  bound<C> bind(integer, prepared_site<C> const& site) const {
    u_centring by;
    by.fit(site.norms, site.row_sums, site.source.cols, unit_roundoff<C>);
    double const rounding = by.rounding, floor = by.floor;
    return {site.exponent(), rounding, floor, &site.norms, std::move(by)};
  }
};

/// exp(−‖x_i − x_j‖² / 2σ²) − c_i − c_j, with c_i + c_j near the mean of a row: little cancels later.
struct rbf_kernel {
  static constexpr bool about_mean = false;
  std::vector<double> sigma;  // one a site

  template <class C>
  struct bound {
    static constexpr bool row_sums = true, repairs = true;
    static constexpr int exponent = 0;
    prepared_site<C> const* site;
    double sigma, rate, typical = 0, rounding = 0, floor = 0, furthest = 0;

    /// The exponent is a difference of sums: what they may be, times the kernel's value.
    static constexpr double limit = std::is_same_v<C, double> ? 4096 : 4;

    double number(integer i) const { return site->norms.data()[i] * rate / 2; }
    C token(integer i) const { return static_cast<C>(number(i)); }
    /// Half of the kernel of two typical tokens apart; 0 − that for one that is far from all.
    double common_part(integer i) const {
      return std::exp(-number(i) - typical) - std::exp(-2 * typical) / 2;
    }
    C removed(integer i) const { return static_cast<C>(common_part(i)); }
    double diagonal(integer i) const { return 1 - 2 * static_cast<double>(removed(i)); }

    bool outlying() const { return 2 * furthest > limit; }
    bool lost(double k, double ti, double tj) const {
      double const sum = ti + tj;
      return sum > limit &&
             k * rate - sum + 64 * unit_roundoff<C> * sum > std::log(limit) - std::log(sum);
    }
    double repair(integer i, integer j) const {
      return std::exp(-site->distance(i, j) / sigma / sigma / 2);
    }
    /// With the entries known: ‖K‖² without the diagonal. The exponent's rounding is relative to them.
    double rounding_of(double square_sum) const {
      double const n = static_cast<double>(site->norms.size());
      double const lost = (std::min)(2 * typical, limit);
      return unit_roundoff<C> / 2 * std::sqrt(n * (n - 1) + lost * lost * square_sum);
    }
    template <class P>
    P operator()(P const& k, P const& ti, P const& tj, P const& removed) const {
      using namespace packet;
      P const power = psub(pmul(k, pset1<P>(static_cast<C>(rate))), padd(ti, tj));
      return psub(pexp(pmin(power, pset1<P>(C(0)))), removed);
    }
  };

  template <class C>
  bound<C> bind(integer p, prepared_site<C> const& site) const {
    double const s = sigma[static_cast<std::size_t>(p)] * site.some_scale();
    // a_i ≤ 4: exponents are finite. With a σ for which this is too little they are below that of 0
    // all the same, but for pairs that are repaired.
    constexpr double most = std::is_same_v<C, double> ? 1e300 : 1e36;
    bound<C> b{&site, s > 0 ? s : 1, (std::min)(1 / s / s, most)};
    double const n = static_cast<double>(site.norms.size());
    b.typical = median_of(site.norms) * b.rate / 2;
    b.furthest = *std::max_element(site.norms.begin(), site.norms.end()) * b.rate / 2;
    double const lost = (std::min)(2 * b.typical, b.limit);
    b.rounding = unit_roundoff<C> / 2 * std::sqrt(n * (n - 1) * (1 + lost * lost));
    return b;
  }
};

/// Any function f(⟨x, y⟩, ‖x‖², ‖y‖²) of centred features, in double, value by value.
template <class F>
struct function_kernel {
  static constexpr bool about_mean = true;
  F f;

  template <class C>
  struct bound {
    static constexpr bool row_sums = true, repairs = false;
    static constexpr int exponent = 0;
    F const& f;
    std::vector<double> const* norms;
    double factor, centre, rounding = 0, floor = 0;

    double value(double k, double a, double b) const {
      return static_cast<double>(f(k * factor, a * factor, b * factor));
    }
    C token(integer i) const { return static_cast<C>(norms->data()[i]); }
    C removed(integer) const { return static_cast<C>(centre / 2); }
    double diagonal(integer i) const {
      double const a = norms->data()[i];
      return value(a, a, a) - 2 * static_cast<double>(removed(0));
    }
    template <class P>
    P operator()(P const& k, P const& ti, P const& tj, P const& removed) const {
      using namespace packet;
      C x[4][lanes_v<C>];
      pstoreu(x[0], k), pstoreu(x[1], ti), pstoreu(x[2], tj), pstoreu(x[3], removed);
      for (integer w = 0; w < lanes_v<C>; ++w)
        x[0][w] = static_cast<C>(value(static_cast<double>(x[0][w]), static_cast<double>(x[1][w]),
                                       static_cast<double>(x[2][w])) -
                                 static_cast<double>(x[3][w]));
      return ploadu<P>(x[0]);
    }
  };

  template <class C>
  bound<C> bind(integer, prepared_site<C> const& site) const {
    double trace = 0;
    std::vector<double> values;
    for (double const a : site.norms) trace += a;
    double const unit = std::ldexp(1., site.exponent());
    double const typical = trace / static_cast<double>(site.norms.size()) * unit;
    double const centre = static_cast<double>(f(0., typical, typical));
    bound<C> b{f, &site.norms, unit, is_finite(centre) ? centre : 0};
    for (double const a : site.norms) values.push_back(std::abs(b.value(a, a, a)));
    b.rounding =
        unit_roundoff<C> * std::sqrt(sum_of_pairs(values));  // |k(x, y)|² ≤ k(x, x) k(y, y)
    return b;
  }
};

}  // namespace rflow::detail
