// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows whose squares are not for C: in double, each in units of its own.

#include <algorithm>
#include <cmath>
#include <cstddef>

#include <rflow/detail/cpu/chain.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// Σ f(j) over j < n, in sums that do not wait for each other.
template <class F>
double sum_over(std::ptrdiff_t n, F const& f) {
  constexpr std::ptrdiff_t lanes = 8;
  double part[lanes] = {};
  std::ptrdiff_t j = 0;
  for (; j + lanes <= n; j += lanes)
    for (std::ptrdiff_t k = 0; k < lanes; ++k) part[k] += f(j + k);
  for (; j < n; ++j) part[0] += f(j);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

/// The largest |f(j)|.
template <class F>
double largest_of(std::ptrdiff_t n, F const& f) {
  double most = 0;
  for (std::ptrdiff_t j = 0; j < n; ++j) most = (std::max)(most, std::abs(f(j)));
  return most;
}

/// The features of a row.
template <class T>
struct row_values {
  T const* at;
  std::ptrdiff_t stride = 1;

  double operator()(std::ptrdiff_t j) const { return static_cast<double>(at[j * stride]); }
};

/// x − p, or half of it.
template <class X, class P>
struct row_difference {
  X x;
  P p;
  double part = 1;

  double operator()(std::ptrdiff_t j) const { return x(j) * part - p(j) * part; }
};

/// Values in units of 2^exponent.
template <class F>
struct in_units {
  F values;
  std::ptrdiff_t size;
  int exponent = 0;
  double power = 1, rest = 1;  // 2^−exponent in two factors: one may be out of range

  double operator()(std::ptrdiff_t j) const { return values(j) * power * rest; }
  double square() const {
    return sum_over(size, [&](std::ptrdiff_t j) {
      double const x = (*this)(j);
      return x * x;
    });
  }
  void set(int e) {
    exponent = e;
    power = std::ldexp(1., -(e / 2));
    rest = std::ldexp(1., e / 2 - e);
  }
};

/// In units in which the largest of n values, of this size, is between 1 and 2.
template <class F>
in_units<F> in_units_of(double most, std::ptrdiff_t n, F const& f) {
  in_units<F> out{f, n};
  out.set(most > 0 ? std::ilogb(most) : 0);
  return out;
}
template <class F>
in_units<F> in_own_units(std::ptrdiff_t n, F const& f) {
  return in_units_of(largest_of(n, f), n, f);
}
/// x − p in such units, also where the difference itself has no double.
template <class X, class P>
in_units<row_difference<X, P>> step_in_own_units(std::ptrdiff_t n, X const& x, P const& p) {
  row_difference<X, P> const whole{x, p}, by_half{x, p, 0.5};
  double const most = largest_of(n, whole);
  if (is_finite(most)) return in_units_of(most, n, whole);
  auto out = in_own_units(n, by_half);
  out.exponent += 1;
  return out;
}

template <class A, class B>
double inner_product(A const& a, B const& b) {
  return sum_over(a.size, [&](std::ptrdiff_t j) { return a(j) * b(j); });
}

/// How the steps b and a of one token lie to each other, by a second look at them: what is across b
/// is measured, not left over from squares that nearly cancel.
template <class A, class B>
turn_sum turn_of(A const& a, B const& b) {
  double const b2 = b.square(), c = b2 > 0 ? inner_product(a, b) / b2 : 0;
  turn_sum out;
  out.add(b2, c, sum_over(a.size, [&](std::ptrdiff_t j) {
            double const rest = a(j) - c * b(j);
            return rest * rest;
          }));
  out.before = b.exponent;
  out.after = a.exponent;
  out.settle();
  return out;
}

/// Adds one token to a turn_sum by its products ‖a‖², ⟨a, b⟩ and ‖b‖² in C. Where the steps are so
/// nearly parallel that the part of a across b is a small difference of those, by again().
template <class Again>
void add_turn(turn_sum& to, double a2, double ab, double b2, Again const& again) {
  double const c = b2 > 0 ? ab / b2 : 0;
  if (c * ab > 0.75 * a2)
    to.merge(again());
  else
    to.add(b2, c, a2 - c * ab);
}

}  // namespace rflow::detail
