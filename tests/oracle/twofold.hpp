// SPDX-License-Identifier: Apache-2.0
#pragma once

// Numbers of twice the digits of double: the unevaluated sum of two, some 32 decimal digits. The same
// on every machine, whatever its long double is. Range is that of double, so callers scale first.
// See Dekker, Numerische Mathematik 18, 1971; Ogita, Rump, Oishi, SIAM J. Sci. Comput. 26, 2005.

#include <cmath>
#include <cstddef>

namespace oracle {

struct twofold {
  double hi = 0, lo = 0;

  constexpr twofold() = default;
  constexpr twofold(double x) : hi(x) {}
  constexpr twofold(double h, double l) : hi(h), lo(l) {}
  explicit constexpr operator double() const { return hi + lo; }
};

/// a + b exactly.
inline twofold sum_of(double a, double b) {
  double const s = a + b, part = s - a;
  return {s, (a - (s - part)) + (b - part)};
}
/// The same where |a| ≥ |b|, or a is 0.
inline twofold ordered_sum(double a, double b) {
  double const s = a + b;
  return {s, b - (s - a)};
}
/// What a · b lost by rounding to p.
inline double lost(double a, double b, double p) {
#if defined(__FP_FAST_FMA) || defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, -p);
#else
  constexpr double split = 134217729;  // 2^27 + 1
  double const ca = split * a, ah = ca - (ca - a), al = a - ah;
  double const cb = split * b, bh = cb - (cb - b), bl = b - bh;
  return ((ah * bh - p) + ah * bl + al * bh) + al * bl;
#endif
}

inline twofold operator-(twofold a) { return {-a.hi, -a.lo}; }
inline twofold operator+(twofold a, twofold b) {
  twofold s = sum_of(a.hi, b.hi);
  twofold const t = sum_of(a.lo, b.lo);
  s = ordered_sum(s.hi, s.lo + t.hi);
  return ordered_sum(s.hi, s.lo + t.lo);
}
inline twofold operator-(twofold a, twofold b) { return a + -b; }
inline twofold operator*(twofold a, twofold b) {
  double const p = a.hi * b.hi;
  return ordered_sum(p, lost(a.hi, b.hi, p) + (a.hi * b.lo + a.lo * b.hi));
}
inline twofold operator/(twofold a, twofold b) {
  double const q = a.hi / b.hi;
  twofold const r = a - b * q;
  double const q2 = r.hi / b.hi;
  twofold const r2 = r - b * q2;
  return ordered_sum(q, q2) + twofold(r2.hi / b.hi);
}
inline twofold& operator+=(twofold& a, twofold b) { return a = a + b; }
inline twofold& operator-=(twofold& a, twofold b) { return a = a - b; }
inline bool operator<(twofold a, twofold b) { return a.hi < b.hi || (a.hi == b.hi && a.lo < b.lo); }
inline bool operator>(twofold a, twofold b) { return b < a; }

inline twofold root(twofold a) {
  if (!(a.hi > 0)) return {};
  double const x = std::sqrt(a.hi);
  twofold const rest = a - twofold(x) * x;
  return ordered_sum(x, rest.hi / (2 * x));
}
/// x · 2^e.
inline twofold scaled(twofold x, int e) { return {std::ldexp(x.hi, e), std::ldexp(x.lo, e)}; }

/// e^x − 1 for x ≤ 0, to 1e-27 of itself: a table over 1/64, and a series.
twofold expm1(twofold x);

/// Many twofold numbers, so that loops over them can be vectorised.
struct array {
  double *hi, *lo;
};

/// Σ a_i b_i.
inline twofold dot(double const* ah, double const* al, double const* bh, double const* bl,
                   std::size_t n) {
  constexpr std::size_t lanes = 8;
  double sh[lanes] = {}, sl[lanes] = {};
  std::size_t i = 0;
  auto const step = [&](std::size_t k) {
    double const a = ah[i + k], b = bh[i + k], p = a * b;
    double const e = lost(a, b, p) + (a * bl[i + k] + al[i + k] * b);
    double const s = sh[k] + p, part = s - sh[k];
    sl[k] += ((sh[k] - (s - part)) + (p - part)) + e;
    sh[k] = s;
  };
  for (; i + lanes <= n; i += lanes)
    for (std::size_t k = 0; k < lanes; ++k) step(k);
  for (; i < n; ++i) step(0);
  twofold total;
  for (std::size_t k = 0; k < lanes; ++k) total += sum_of(sh[k], sl[k]);
  return total;
}

/// Σ (a_i − b_i)², a and b exact doubles.
inline twofold squared_distance(double const* a, double const* b, std::size_t n) {
  constexpr std::size_t lanes = 8;
  double sh[lanes] = {}, sl[lanes] = {};
  std::size_t i = 0;
  auto const step = [&](std::size_t k) {
    twofold const x = sum_of(a[i + k], -b[i + k]);
    double const p = x.hi * x.hi, e = lost(x.hi, x.hi, p) + 2 * x.hi * x.lo;
    double const s = sh[k] + p, part = s - sh[k];
    sl[k] += ((sh[k] - (s - part)) + (p - part)) + e;
    sh[k] = s;
  };
  for (; i + lanes <= n; i += lanes)
    for (std::size_t k = 0; k < lanes; ++k) step(k);
  for (; i < n; ++i) step(0);
  twofold total;
  for (std::size_t k = 0; k < lanes; ++k) total += sum_of(sh[k], sl[k]);
  return total;
}

}  // namespace oracle
