// SPDX-License-Identifier: Apache-2.0
#pragma once

// Distributions that several metrics need: gamma, Pearson III, Student, and how a sum over pairs of
// tokens is distributed when the tokens of one side are shuffled. Tails are absolute probabilities,
// so that small ones keep their digits.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace rflow::detail {

// ---- gamma, Pearson III, Student ----------------------------------------------------------------

/// Q(a, x) = Γ(a, x) / Γ(a), or P = 1 − Q if `lower`: whichever is asked for is computed where it is
/// small without cancellation.
inline double incomplete_gamma(double a, double x, bool lower) {
  if (!(x > 0)) return lower ? 0 : 1;
  double const front = std::exp(a * std::log(x) - x - std::lgamma(a));
  if (x < a + 1) {  // the series of P
    double term = 1 / a, sum = term;
    for (double k = a + 1; term > 1e-17 * sum; ++k) sum += term *= x / k;
    return lower ? front * sum : 1 - front * sum;
  }
  double const tiny = 1e-300;  // the continued fraction of Q, by Lentz's method
  double b = x + 1 - a, c = 1 / tiny, d = 1 / b, product = d;
  for (double k = 1, factor = 0; std::abs(factor - 1) > 1e-16 && k < 1e6; ++k) {
    double const numerator = k * (a - k);
    b += 2;
    d = numerator * d + b;
    c = b + numerator / c;
    d = 1 / (std::abs(d) < tiny ? tiny : d);
    c = std::abs(c) < tiny ? tiny : c;
    product *= factor = c * d;
  }
  return lower ? 1 - front * product : front * product;
}

/// P(Z ≥ z) of a Pearson III distribution of mean 0, variance 1 and the given skewness.
inline double pearson_tail(double z, double skewness) {
  if (std::abs(skewness) < 1e-2) {  // a normal one, corrected: the next term is of second order
    double const density = std::exp(-z * z / 2) * 0.3989422804014327;
    double const tail = std::erfc(z / std::sqrt(2.0)) / 2 + density * skewness / 6 * (z * z - 1);
    return (std::max)(tail, 0.0);
  }
  double const shape = 4 / (skewness * skewness), root = std::sqrt(shape);
  return skewness > 0 ? incomplete_gamma(shape, shape + root * z, false)
                      : incomplete_gamma(shape, shape - root * z, true);
}

/// I_x(a, 1/2), the regularised incomplete beta function, for a ≤ 1000: its continued fraction, by
/// Lentz's method.
/// @see Abramowitz, Stegun, 26.5.8
inline double incomplete_beta_half(double a, double x) {
  constexpr double b = 0.5;
  if (!(x > 0)) return 0;
  if (!(x < 1)) return 1;
  auto const fraction = [](double p, double q, double y) {
    double const tiny = 1e-300;
    double c = 1, d = 1 - (p + q) * y / (p + 1), product;
    d = 1 / (std::abs(d) < tiny ? tiny : d);
    product = d;
    for (double k = 1; k < 1e4; ++k) {
      double factor = 1;
      for (double const numerator :
           {k * (q - k) * y / ((p + 2 * k - 1) * (p + 2 * k)),
            -(p + k) * (p + q + k) * y / ((p + 2 * k) * (p + 2 * k + 1))}) {
        d = 1 + numerator * d;
        d = 1 / (std::abs(d) < tiny ? tiny : d);
        c = 1 + numerator / c;
        c = std::abs(c) < tiny ? tiny : c;
        factor *= c * d;
        product *= c * d;
      }
      if (std::abs(factor - 1) < 1e-16) break;
    }
    return product;
  };
  double const front = std::exp(std::lgamma(a + b) - std::lgamma(a) - std::lgamma(b) +
                                a * std::log(x) + b * std::log1p(-x));
  return x < (a + 1) / (a + b + 2) ? front * fraction(a, b, x) / a
                                   : 1 - front * fraction(b, a, 1 - x) / b;
}

/// The 97.5 % point of Student's t, to 1e-11 of itself, for 1 degree of freedom and more (there may
/// be fractions of them).
/// @see Abramowitz, Stegun, 26.7.1 and, above 1000 degrees, 26.7.5
inline double student_975(double degrees) {
  double const x = 1.959963984540054, x2 = x * x, nu = degrees;
  if (nu > 1000)
    return x * (1 + (x2 + 1) / (4 * nu) + ((5 * x2 + 16) * x2 + 3) / (96 * nu * nu) +
                (((3 * x2 + 19) * x2 + 17) * x2 - 15) / (384 * nu * nu * nu));
  double low = x, high = 13;  // 12.7 of one degree
  for (int k = 0; k < 60; ++k) {
    double const middle = (low + high) / 2;
    (incomplete_beta_half(nu / 2, nu / (nu + middle * middle)) > 0.05 ? low : high) = middle;
  }
  return (low + high) / 2;
}

// ---- shuffled tokens: moments -------------------------------------------------------------------
//
// T = Σ_{i≠j} U_ij V_{σ(i)σ(j)} for U and V symmetric, with zero diagonals, zero row sums and norm
// 1, and σ one of the n! orders of the tokens, all alike likely. Its mean is 0, its variance
// 2/(n(n − 3)), its third moment that below. Where a few tokens outweigh the others T is a mixture
// that no smooth curve with these moments resembles: see shuffled_tail.

/// The mean of T³. Triples of edges fall into eight patterns; zero row sums bring the sum over each
/// down to Σ U_ij³ and tr U³.
inline double third_moment(double n, double cubes_u, double triangles_u, double cubes_v,
                           double triangles_v) {
  struct pattern {
    double vertices, count, cubes, triangles;  // its sum is cubes · ΣU³ + triangles · tr U³
  };
  double mean = 0;
  for (pattern const& p : {pattern{2, 4, 1, 0},     // one edge three times
                           pattern{3, 24, -1, 0},   // an edge twice, and one that meets it
                           pattern{4, 6, 2, 0},     // an edge twice, and one apart
                           pattern{3, 8, 0, 1},     // a triangle
                           pattern{4, 24, 1, -1},   // a path
                           pattern{4, 8, 2, 0},     // a star
                           pattern{5, 12, -4, 2},   // two that meet, and one apart
                           pattern{6, 1, 16, -8}})  // all apart
    if (p.vertices <= n) {
      double injections = 1;
      for (double k = 0; k < p.vertices; ++k) injections *= n - k;
      mean += p.count * (p.cubes * cubes_u + p.triangles * triangles_u) *
              (p.cubes * cubes_v + p.triangles * triangles_v) / injections;
    }
  return mean;
}

/// So many tokens of a site are followed one by one.
inline constexpr std::size_t pins = 3;
/// Up to so many tokens all orders are gone through.
inline constexpr std::ptrdiff_t few_tokens = 8;

/// What U and some of its tokens, a_0, a_1, … ("pinned"), tell of T where it is known where these
/// land. I are the other tokens, N of them; U'' is U on I, its row sums made 0 again, and u_r the
/// row of a_r on I, with its mean taken off.
struct pinned_moments {
  double squares = 0, cubes = 0, triangles = 0;  // Σ U''², Σ U''³, tr U''³
  double sum[pins] = {};                         // Σ_I U_{a_r i}
  double between[pins][pins] = {};               // U_{a_r a_s}
  double inner[pins][pins] = {};                 // ⟨u_r, u_s⟩
  double form[pins][pins] = {};                  // ⟨u_r, U'' u_s⟩
  double triple[pins][pins][pins] = {};          // Σ_I u_r u_s u_t
  double with_squares[pins] = {};                // Σ_{i,j ∈ I} u_r(i) U''_ij²
};

/// Of one site: its heaviest tokens, and what each choice of them as pinned ones tells. Nothing but
/// doubles, so that they can be sent and added up like any other moments.
struct shuffle_moments {
  double token[pins] = {};            // the heaviest first
  pinned_moments of[1 << pins] = {};  // by the set of pinned tokens, a bit each
};
static_assert(sizeof(shuffle_moments) % sizeof(double) == 0);

/// Numbers in a shuffle_moments.
inline constexpr std::size_t shuffle_numbers = sizeof(shuffle_moments) / sizeof(double);

/// Finds the heaviest tokens of U, each by Σ_j U''_ij² without those before it, and the moments of
/// every choice of them. O(n) beside the products of U with `pins` of its rows.
/// @param  n              tokens, more than few_tokens
/// @param  squares        n: Σ_j U_ij²
/// @param  cubes, triangles  Σ U³, tr U³
/// @param  row            row(a, u) writes n values: row a of U
/// @param  times          times(u, w) writes n values: w = U u
/// @param  rows           (pins + 1) × n, written: the rows of the heaviest tokens, then
///                        Σ_j U''_ij² where all of these are pinned
template <class Row, class Times>
shuffle_moments find_shuffle_moments(std::ptrdiff_t n, double const* squares, double cubes,
                                     double triangles, Row const& row, Times const& times,
                                     double* rows) {
  auto const size = static_cast<std::size_t>(n);
  shuffle_moments out;
  std::array<std::size_t, pins> at{};
  std::vector<double> products(pins * size), left(size), shift(size), applied(size), rest(size);
  std::vector<double> g(size);
  auto const u = [&](std::size_t r, std::size_t i) { return rows[r * size + i]; };
  // The moments of a set of pinned tokens; leaves Σ_j U''_ij² in `rest`.
  auto const find = [&](unsigned set) {
    pinned_moments m;
    std::vector<std::size_t> chosen;
    for (std::size_t r = 0; r < pins; ++r)
      if (set >> r & 1) chosen.push_back(r);
    std::size_t const k = chosen.size();
    double const count = static_cast<double>(n) - static_cast<double>(k);
    std::vector<char> inside(size, 1);
    for (std::size_t const r : chosen) inside[at[r]] = 0;

    for (std::size_t r = 0; r < k; ++r)
      for (std::size_t s = 0; s < k; ++s) m.between[r][s] = u(chosen[r], at[chosen[s]]);
    double total = 0;  // Σ over I of U
    for (std::size_t i = 0; i < size; ++i) {
      left[i] = squares[i], g[i] = 0;
      for (std::size_t r = 0; r < k; ++r) {
        double const x = u(chosen[r], i);
        g[i] += x;
        left[i] -= x * x;
        if (inside[i]) m.sum[r] += x;
      }
      if (inside[i]) total -= g[i];
    }
    // U''_ij = U_ij + shift_i + shift_j
    double const level = total / (2 * (count - 1) * (count - 2));
    double first = 0, second = 0, third = 0;
    double with_left = 0, with_g = 0, square_with_g = 0, along = 0, twice = 0;
    auto const applied_to = [&](std::size_t r, std::size_t i) {  // U on I times row r on I
      double w = products[chosen[r] * size + i];
      for (std::size_t s = 0; s < k; ++s) w -= m.between[r][s] * u(chosen[s], i);
      return w;
    };
    for (std::size_t i = 0; i < size; ++i) {
      if (!inside[i]) continue;
      shift[i] = g[i] / (count - 2) + level;
      double of_g = 0;
      for (std::size_t r = 0; r < k; ++r) of_g += applied_to(r, i);
      applied[i] = of_g / (count - 2) - level * g[i];  // U on I times shift
      first += shift[i], second += shift[i] * shift[i], third += shift[i] * shift[i] * shift[i];
      with_left += shift[i] * left[i];
      with_g += shift[i] * g[i];
      square_with_g += shift[i] * shift[i] * g[i];
      along += shift[i] * applied[i];
      twice += shift[i] * -of_g;
    }
    for (std::size_t i = 0; i < size; ++i) {
      double const s = shift[i];
      rest[i] = inside[i] ? left[i] - 2 * s * g[i] + 2 * applied[i] + (count - 1) * s * s +
                                2 * s * (first - s) + (second - s * s)
                          : -1;
      if (inside[i]) m.squares += rest[i];
    }
    double removed_cubes = 0, removed_triangles = 0;
    for (std::size_t const r : chosen)
      for (std::size_t i = 0; i < size; ++i) {
        double const x = u(r, i);
        removed_cubes += 2 * x * x * x;
        removed_triangles += 3 * x * products[r * size + i];
      }
    for (std::size_t r = 0; r < k; ++r)
      for (std::size_t s = 0; s < k; ++s) {
        double const x = m.between[r][s];
        removed_cubes -= x * x * x;
        double both = 0;
        for (std::size_t i = 0; i < size; ++i) both += u(chosen[r], i) * u(chosen[s], i);
        if (r != s) removed_triangles -= 3 * x * both;
        for (std::size_t t = 0; t < k; ++t)
          removed_triangles += x * m.between[s][t] * m.between[t][r];
      }
    m.cubes = cubes - removed_cubes + 6 * with_left + 6 * (along - square_with_g) +
              (2 * count - 8) * third + 6 * second * first;
    double const distinct = first * first * first - 3 * first * second + 2 * third;
    m.triangles =
        triangles - removed_triangles + 6 * (twice - with_left) +
        3 * ((count - 4) * along - 2 * first * with_g + 4 * square_with_g + second * total) +
        2 * distinct + 6 * (count - 2) * (second * first - third);

    for (std::size_t r = 0; r < k; ++r) {
      double const mean = m.sum[r] / count;
      for (std::size_t i = 0; i < size; ++i)
        if (inside[i]) m.with_squares[r] += (u(chosen[r], i) - mean) * rest[i];
      for (std::size_t s = 0; s < k; ++s) {
        double const other = m.sum[s] / count;
        double of_g = 0, of_other_g = 0;
        for (std::size_t i = 0; i < size; ++i) {
          if (!inside[i]) continue;
          double const x = u(chosen[r], i), y = u(chosen[s], i);
          double const both = (x - mean) * (y - other);
          m.inner[r][s] += both;
          m.form[r][s] += x * applied_to(s, i) - 2 * both * shift[i];
          of_g += x * g[i], of_other_g += y * g[i];
          for (std::size_t t = 0; t < k; ++t)
            m.triple[r][s][t] += both * (u(chosen[t], i) - m.sum[t] / count);
        }
        m.form[r][s] += other * of_g + mean * of_other_g + mean * other * total;
      }
    }
    return m;
  };
  for (std::size_t r = 0; r < pins; ++r) {
    find((1U << r) - 1);
    at[r] = static_cast<std::size_t>(std::max_element(rest.begin(), rest.end()) - rest.begin());
    out.token[r] = static_cast<double>(at[r]);
    row(static_cast<std::ptrdiff_t>(at[r]), rows + r * size);
    times(rows + r * size, products.data() + r * size);
  }
  for (unsigned set = 0; set < 1U << pins; ++set) out.of[set] = find(set);
  for (std::size_t i = 0; i < size; ++i) rows[pins * size + i] = (std::max)(rest[i], 0.0);
  return out;
}

/// Mean, mean square and mean cube.
struct raw_moments {
  double first = 0, second = 0, third = 0;
};

/// Of T where k tokens of U land on k tokens of V, the r-th on the to[r]-th, and the others anywhere.
/// With N others T is a constant, a sum over tokens Σ_rs c_rs ⟨u_r, v_s∘σ⟩ and a sum over pairs of
/// U'' and V''; the sums over patterns of distinct tokens come down to the moments at hand, as in
/// third_moment.
inline raw_moments moments_where(double tokens, std::size_t k, std::size_t const* to,
                                 pinned_moments const& u, pinned_moments const& v) {
  double const n = tokens - static_cast<double>(k);
  double const two = n * (n - 1), three = two * (n - 2), four = three * (n - 3),
               five = four * (n - 4);
  double constant = 0, total_u = 0, total_v = 0;
  for (std::size_t r = 0; r < k; ++r) {
    for (std::size_t s = 0; s < k; ++s) constant += u.between[r][s] * v.between[to[r]][to[s]];
    constant += 2 * u.sum[r] * v.sum[to[r]] / n;
    total_u += u.sum[r];
    total_v += v.sum[to[r]];
  }
  constant += total_u * total_v / two;
  auto const weight = [&](std::size_t r, std::size_t s) {
    return 2 * ((r == s ? 1 : 0) + 1 / (n - 2));
  };
  double second = 2 * u.squares * v.squares / (n * (n - 3));
  double third = third_moment(n, u.cubes, u.triangles, v.cubes, v.triangles);
  for (std::size_t r = 0; r < k; ++r)
    for (std::size_t s = 0; s < k; ++s) {
      double const w = weight(r, s);
      third += 3 * w * u.with_squares[r] * v.with_squares[to[s]] *
               (4 / two + 20 / three + 52 / four + 64 / five);
      for (std::size_t a = 0; a < k; ++a)
        for (std::size_t b = 0; b < k; ++b) {
          double const ww = w * weight(a, b);
          second += ww * u.inner[r][a] * v.inner[to[s]][to[b]] / (n - 1);
          third += 3 * ww * u.form[r][a] * v.form[to[s]][to[b]] * (2 / two + 4 / three + 4 / four);
          for (std::size_t c = 0; c < k; ++c)
            for (std::size_t d = 0; d < k; ++d)
              third += ww * weight(c, d) * u.triple[r][a][c] * v.triple[to[s]][to[b]][to[d]] * n /
                       ((n - 1) * (n - 2));
        }
    }
  return {constant, constant * constant + second,
          constant * constant * constant + 3 * constant * second + third};
}

// ---- shuffled tokens: tails ---------------------------------------------------------------------

/// P(Z ≥ z) as pearson_tail has it, to a few percent of itself for skewness up to 0.6 and at a tenth
/// of the time: the cube root of a gamma variable is nearly normal.
/// @see Wilson, Hilferty, PNAS 17, 1931
inline double quick_pearson_tail(double z, double skewness) {
  double const size = std::abs(skewness);
  if (size > 0.6) return pearson_tail(z, skewness);
  if (size < 1e-4) return std::erfc(z / std::sqrt(2.0)) / 2;
  double const shape = 4 / (skewness * skewness), root = std::sqrt(shape);
  double const x = 1 + (skewness > 0 ? z : -z) / root;
  if (x <= 0) return skewness > 0 ? 1 : 0;
  double const normal = (std::cbrt(x) - 1 + 1 / (9 * shape)) * 3 * root;
  return std::erfc((skewness > 0 ? normal : -normal) / std::sqrt(2.0)) / 2;
}

/// A distribution on a few values: those of a row, the extreme ones one by one, those between in
/// groups of neighbours.
struct grouped_row {
  struct group {
    double value, share;
  };
  std::vector<group> groups;     // of mean 0
  double second = 0, third = 0;  // moments of the groups
};

inline grouped_row group_row(std::vector<double> values) {
  constexpr std::size_t single = 8, between = 12;
  std::sort(values.begin(), values.end());
  std::size_t const n = values.size();
  double const count = static_cast<double>(n);
  double const mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  grouped_row out;
  auto const add = [&](std::size_t begin, std::size_t end) {
    if (begin == end) return;
    double sum = 0;
    for (std::size_t i = begin; i < end; ++i) sum += values[i] - mean;
    double const size = static_cast<double>(end - begin), value = sum / size;
    out.groups.push_back({value, size / count});
    out.second += value * value * size / count;
    out.third += value * value * value * size / count;
  };
  if (n <= 2 * single + between) {
    for (std::size_t i = 0; i < n; ++i) add(i, i + 1);
    return out;
  }
  std::size_t const middle = n - 2 * single;
  for (std::size_t i = 0; i < single; ++i) add(i, i + 1);
  for (std::size_t b = 0; b < between; ++b)
    add(single + middle * b / between, single + middle * (b + 1) / between);
  for (std::size_t i = n - single; i < n; ++i) add(i, i + 1);
  return out;
}

/// A site as shuffled_tail sees it.
struct shuffled_site {
  shuffle_moments moments;
  std::array<grouped_row, (1 << pins) - 1> row;  // by set: of the heaviest token that is not pinned
  grouped_row squares;     // Σ_j U''_ij² over its mean, less 1, where all heavy tokens are pinned
  double mean_square = 0;  // that mean
  /// Of a token: squares of its row on light tokens, and what it has with the heaviest.
  struct row_parts {
    double light, heavy[pins];
  };
  std::vector<row_parts> outer;  // the heaviest tokens, then the next of them
  double fourths[pins] = {};     // Σ U_ai⁴ over light tokens

  /// @param numbers  shuffle_numbers of them, from find_shuffle_moments
  /// @param rows     (pins + 1) × n, likewise
  shuffled_site(double const* numbers, double const* rows, std::ptrdiff_t n) {
    std::memcpy(static_cast<void*>(&moments), numbers, sizeof moments);
    auto const size = static_cast<std::size_t>(n);
    auto const heavy = [&](std::size_t i) {
      return std::find(moments.token, moments.token + pins, static_cast<double>(i)) !=
             moments.token + pins;
    };
    std::vector<double> light;
    for (std::size_t i = 0; i < size; ++i)
      if (!heavy(i)) light.push_back(rows[pins * size + i]);
    double const mean =
        std::accumulate(light.begin(), light.end(), 0.0) / static_cast<double>(light.size());
    for (double& x : light) x = mean > 0 ? x / mean : 1;
    squares = group_row(std::move(light));
    mean_square = mean;
    find_outer(rows, size, heavy);
    for (unsigned set = 0; set < row.size(); ++set) {
      std::size_t pinned = 0;
      for (std::size_t r = 0; r < pins; ++r) pinned += set >> r & 1;
      for (std::size_t a = 0; a < pins; ++a) {
        if (set >> a & 1) continue;
        std::vector<double> values;
        for (std::size_t i = 0; i < size; ++i) {
          double x = rows[a * size + i];
          for (std::size_t r = 0; r < pins; ++r)
            if (set >> r & 1) x += rows[r * size + i] / (static_cast<double>(size - pinned) - 2);
          if (!heavy(i)) values.push_back(x);
        }
        grouped_row found = group_row(std::move(values));
        if (row[set].groups.empty() || found.second > row[set].second) row[set] = std::move(found);
      }
    }
  }

 private:
  template <class Heavy>
  void find_outer(double const* rows, std::size_t size, Heavy const& heavy) {
    constexpr std::size_t next = 9;
    double mean[pins] = {};  // of light entries: what all of them have moves no T
    for (std::size_t r = 0; r < pins; ++r)
      for (std::size_t i = 0; i < size; ++i)
        if (!heavy(i)) mean[r] += rows[r * size + i] / static_cast<double>(size - pins);
    std::vector<std::pair<double, std::size_t>> by_square;  // largest first, then by index
    for (std::size_t i = 0; i < size; ++i) {
      if (heavy(i)) continue;
      double sum = rows[pins * size + i];
      for (std::size_t r = 0; r < pins; ++r) {
        double const x = rows[r * size + i] - mean[r];
        sum += x * x;
      }
      by_square.emplace_back(-sum, i);
    }
    std::size_t const count = (std::min)(next, by_square.size());
    std::partial_sort(by_square.begin(), by_square.begin() + static_cast<std::ptrdiff_t>(count),
                      by_square.end());
    for (std::size_t r = 0; r < pins; ++r) {
      row_parts parts{};
      for (std::size_t s = 0; s < pins; ++s)
        parts.heavy[s] = r == s ? 0 : moments.of[(1U << pins) - 1].between[r][s] - mean[s];
      for (std::size_t i = 0; i < size; ++i) {
        if (heavy(i)) continue;
        double const x = rows[r * size + i] - mean[r];
        parts.light += x * x;
        fourths[r] += x * x * x * x;
      }
      outer.push_back(parts);
    }
    for (std::size_t k = 0; k < count; ++k) {
      std::size_t const i = by_square[k].second;
      row_parts parts{rows[pins * size + i], {}};
      for (std::size_t r = 0; r < pins; ++r) parts.heavy[r] = rows[r * size + i] - mean[r];
      outer.push_back(parts);
    }
  }
};

/// The least probability that n! orders have, or the smallest normal double where that is larger.
inline double least_probability(double tokens) {
  return (std::max)(std::exp(-std::lgamma(tokens + 1)), (std::numeric_limits<double>::min)());
}

/// What shuffled_tail does not follow where heavy tokens land in one way.
struct loose_parts {
  double kurtosis = 0;  // about what it adds to T's excess kurtosis
  double pair = 0;      // the largest share of the variance that one pair of heavy tokens has
  double chance = 0;    // of a row that adds half the variance or more
  double largest = 0;   // the most that one adds, in variances
};

/// Of rows of U that land on rows of V, not both heavy: while a is on b, T varies by about
/// 4/N |u_a|² |v_b|² more. Where either is long, three moments do not tell.
/// @param  left       N, tokens that may land anywhere
/// @param  to         where heavy tokens of U land, or -1
/// @param  variance   of T there
/// @param  product    whether the product of the longest rows is followed
/// @param  along_u, along_v  whether the longest row is followed over those of the other side
inline loose_parts find_loose_parts(double left, int const* to, double variance, bool product,
                                    bool along_u, bool along_v, shuffled_site const& u,
                                    shuffled_site const& v) {
  struct row {
    bool open;            // not pinned
    double light, heavy;  // squares with light tokens, with heavy ones that are not pinned
  };
  auto const square = [](double x) { return x * x; };
  bool pinned_u[pins] = {}, pinned_v[pins] = {};
  for (std::size_t r = 0; r < pins; ++r)
    if (to[r] >= 0) pinned_u[r] = pinned_v[to[r]] = true;
  auto const rows_of = [](shuffled_site const& site, bool const* pinned) {
    std::vector<row> rows;
    for (std::size_t k = 0; k < site.outer.size(); ++k) {
      row now{k >= pins || !pinned[k], site.outer[k].light, 0};
      for (std::size_t r = 0; r < pins; ++r)
        if (!pinned[r]) now.heavy += site.outer[k].heavy[r] * site.outer[k].heavy[r];
      rows.push_back(now);
    }
    return rows;
  };
  auto const longest = [](std::vector<row> const& rows) {
    std::size_t best = pins;
    for (std::size_t r = pins; r-- > 0;)
      if (rows[r].open &&
          (best == pins || rows[r].light + rows[r].heavy >= rows[best].light + rows[best].heavy))
        best = r;
    return best;
  };
  std::vector<row> const of_u = rows_of(u, pinned_u), of_v = rows_of(v, pinned_v);
  std::size_t const top_u = longest(of_u), top_v = longest(of_v);

  loose_parts out;
  for (std::size_t a = 0; a < of_u.size(); ++a)
    for (std::size_t b = 0; b < of_v.size(); ++b) {
      if (!of_u[a].open || !of_v[b].open || (a < pins && b < pins)) continue;
      double heavy_u = of_u[a].heavy, heavy_v = of_v[b].heavy;
      if (product && a == top_u) heavy_v -= square(v.outer[b].heavy[top_v]);
      if (product && b == top_v) heavy_u -= square(u.outer[a].heavy[top_u]);
      double more = heavy_u * of_v[b].light + of_u[a].light * (heavy_v + of_v[b].light);
      // A light row of the usual length is no surprise.
      if (a < pins) more -= (of_u[a].heavy + of_u[a].light) * v.mean_square;
      if (b < pins) more -= (of_v[b].heavy + of_v[b].light) * u.mean_square;
      if ((along_u && a == top_u) || (along_v && b == top_v)) more = 0;
      more = 4 / left * (std::max)(more, 0.0) / variance;
      double shift = 0;  // by pairs with a pinned token
      for (std::size_t r = 0; r < pins; ++r)
        if (to[r] >= 0) shift += 2 * u.outer[a].heavy[r] * v.outer[b].heavy[to[r]];
      shift *= shift / variance;
      out.kurtosis += (3 * more * more + 6 * more * shift + shift * shift) / left;
      if (more + shift < 0.5) continue;
      out.chance += 1 / left;
      out.largest = (std::max)(out.largest, more + shift);
    }
  // A pair of tokens lands on a pair, one of each heavy.
  for (std::size_t a = 0; a < pins; ++a)
    for (std::size_t b = 0; b < pins; ++b)
      if (of_u[a].open && of_v[b].open && !(product && a == top_u && b == top_v))
        out.kurtosis += 16 * u.fourths[a] * v.fourths[b] / (left * left * variance * variance);
  // A pair of heavy tokens lands on any pair.
  for (auto const& [site, rows, other] : {std::tuple(&u, &of_u, &v), std::tuple(&v, &of_v, &u)})
    for (std::size_t a = 0; a < pins; ++a)
      for (std::size_t b = 0; b < a; ++b)
        if ((*rows)[a].open && (*rows)[b].open)
          out.pair = (std::max)(out.pair, 4 * square(site->outer[a].heavy[b]) *
                                              other->moments.of[(1U << pins) - 1].squares /
                                              (left * left * variance));
  return out;
}

/// A probability, and how far it may be off: known to a factor of 2 where `doubt` is at most 1.
struct doubtful {
  double value, doubt;
};

/// Excess kurtosis κ changes the logarithm of a tail p by about κ (ln 1/p)² / 6 (an Edgeworth series
/// with z² ≈ 2 ln 1/p); below 1e-3 no more is asked for than there. What a pair of heavy tokens lands
/// on is not known, so the square of its share counts, too. Few tokens have few orders, so less is let
/// through: of 9 nothing. With these constants simulated p were within a factor of 2 down to 1e-4
/// (docs/numerics.md).
/// @param  skewness  of T
/// @param  evenness  how the light rows vary on that side where they vary less: alike, with a skew T,
///                   tokens are two groups on both sides, and T takes few values
inline double find_doubt(double tokens, double p, double kurtosis, double pair, double skewness,
                         double evenness) {
  if (skewness > 2 && evenness < 1) return std::numeric_limits<double>::infinity();
  double const depth = -std::log(std::clamp(p, 1e-3, 5e-3));
  return (kurtosis + 40 * pair * pair) * depth * depth / (26 * (1 - 9 / tokens));
}

/// P(T ≥ t), for more than few_tokens. The heaviest tokens of both sides are followed: for each way
/// in which some of those of U land on those of V, the probability and the first three moments of T
/// are exact, and T is taken for Pearson III with them. Where heavy tokens land on light ones, T is
/// about a product of two entries of their rows: that product goes over the rows, and the rest of T
/// is taken for Pearson III.
/// @param  rounding  of t
inline doubtful shuffled_tail(double tokens, double t, double rounding, shuffled_site const& u,
                              shuffled_site const& v) {
  struct placement {
    int to[pins];
    std::size_t count = 0, order[pins] = {};
    unsigned of_u = 0, of_v = 0;
    double probability = 1;  // that at least these land so; then times the moments
    raw_moments moments;
  };
  std::vector<placement> all;
  static_assert(pins == 3);
  for (int a = -1; a < 3; ++a)
    for (int b = -1; b < 3; ++b)
      for (int c = -1; c < 3; ++c) {
        if ((a >= 0 && (a == b || a == c)) || (b >= 0 && b == c)) continue;
        placement p{.to = {a, b, c}, .moments = {}};
        for (std::size_t r = 0; r < pins; ++r)
          if (p.to[r] >= 0) p.of_u |= 1U << r, p.of_v |= 1U << p.to[r];
        for (std::size_t r = 0; r < pins; ++r) {
          if (p.to[r] < 0) continue;
          for (int s = 0; s < p.to[r]; ++s) p.order[p.count] += p.of_v >> s & 1;
          p.probability /= tokens - static_cast<double>(p.count++);
        }
        raw_moments const m =
            moments_where(tokens, p.count, p.order, u.moments.of[p.of_u], v.moments.of[p.of_v]);
        p.moments = {p.probability * m.first, p.probability * m.second, p.probability * m.third};
        all.push_back(p);
      }
  std::stable_sort(all.begin(), all.end(),
                   [](placement const& a, placement const& b) { return a.count < b.count; });

  double total = 0, weights = 0, kurtosis = 0, pair = 0, skewnesses = 0;
  double const least = t - rounding;
  for (placement const& p : all) {
    // These and no others: inclusion and exclusion.
    double probability = 0;
    raw_moments m;
    for (placement const& q : all) {
      bool includes = true;
      for (std::size_t r = 0; r < pins; ++r)
        includes = includes && (p.to[r] < 0 || p.to[r] == q.to[r]);
      if (!includes) continue;
      double const sign = (q.count - p.count) % 2 == 0 ? 1 : -1;
      probability += sign * q.probability;
      m.first += sign * q.moments.first;
      m.second += sign * q.moments.second;
      m.third += sign * q.moments.third;
    }
    double const mean = m.first / probability;
    double const variance = m.second / probability - mean * mean;
    double const third = m.third / probability - 3 * mean * variance - mean * mean * mean;
    double const before = total;
    if (!(variance > rounding * rounding)) {
      total += mean >= least ? probability : 0;
      weights += total - before;
      continue;
    }
    // What is not followed counts as far as this placement does, or would if a long row landed.
    auto const count_loose = [&](bool product, bool along_u, bool along_v) {
      double const left = tokens - static_cast<double>(p.count);
      loose_parts const loose =
          find_loose_parts(left, p.to, variance, product, along_u, along_v, u, v);
      double const wide = std::sqrt(2 * variance * (1 + loose.largest));
      double const landing = (std::min)(loose.chance, 1.0) * std::erfc((least - mean) / wide) / 2;
      // Where all tails are 0, as far as placements are likely.
      double const weight = (std::max)(total - before, probability * (std::max)(landing, 1e-290));
      weights += weight;
      kurtosis += weight * loose.kurtosis;
      pair += weight * loose.pair;
      skewnesses += weight * third / (variance * std::sqrt(variance));
    };
    double const skewness = third / (variance * std::sqrt(variance));
    if (p.count < pins && probability > 1e-3 * total) {
      double const n = tokens - static_cast<double>(p.count) - 2;
      double const factor = 2 + 4 / n + 4 / (n * (n - 1));
      grouped_row const &a = u.row[p.of_u], &b = v.row[p.of_v];
      double const product = factor * factor * a.second * b.second;
      if (product > 0.03 * variance) {
        double const rest = (std::max)(variance - product, 1e-3 * variance);
        double const deviation = std::sqrt(rest);
        double const rest_skewness =
            (third - factor * factor * factor * a.third * b.third) / (rest * deviation);
        double sum = 0;
        for (grouped_row::group const& x : a.groups)
          for (grouped_row::group const& y : b.groups)
            sum += x.share * y.share *
                   quick_pearson_tail((least - mean - factor * x.value * y.value) / deviation,
                                      rest_skewness);
        total += probability * sum;
        count_loose(true, false, false);
        continue;
      }
      // A heavy row of one side meets rows of the other that vary in length: so does the variance.
      double const of_u = 4 * a.second * v.mean_square / variance;
      double const of_v = 4 * b.second * u.mean_square / variance;
      double const share = (std::min)((std::max)(of_u, of_v), 1.0);
      if (share > 0.05) {
        double sum = 0;
        for (grouped_row::group const& g : (of_u > of_v ? v : u).squares.groups) {
          double const here = variance * (std::max)(1 + share * g.value, 1e-3);
          sum += g.share * quick_pearson_tail((least - mean) / std::sqrt(here),
                                              third / (here * std::sqrt(here)));
        }
        total += probability * sum;
        count_loose(false, of_u > of_v, !(of_u > of_v));
        continue;
      }
    }
    total += probability * pearson_tail((least - mean) / std::sqrt(variance), skewness);
    count_loose(false, false, false);
  }
  double const found = std::clamp(total, least_probability(tokens), 1.0);
  if (!(weights > 0)) return {found, 0};
  return {found, find_doubt(tokens, found, kurtosis / weights, pair / weights, skewnesses / weights,
                            (std::min)(u.squares.second, v.squares.second))};
}

/// The same for at most few_tokens, by going through all orders; t is that of the order at hand.
/// @param  u, v  n × n
inline double all_orders_tail(std::ptrdiff_t n, double rounding, double const* u, double const* v) {
  std::vector<std::ptrdiff_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  double count = 0, no_less = 0, observed = 0;
  do {
    double t = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i)
      for (std::ptrdiff_t j = 0; j < i; ++j)
        t += 2 * u[i * n + j] *
             v[order[static_cast<std::size_t>(i)] * n + order[static_cast<std::size_t>(j)]];
    if (count == 0) observed = t;
    count += 1;
    no_less += t >= observed - rounding ? 1 : 0;
  } while (std::next_permutation(order.begin(), order.end()));
  return no_less / count;
}

// ---- shifted tokens -----------------------------------------------------------------------------

/// How many tokens are worth one independent one: 1 + 2 Σ_k √a_k up to where a_k is lost in noise,
/// infinity if that is not within n/4 shifts or the level far from 0 is above a half. a_k is about the
/// square of the tokens' correlation.
/// @param  own  n: Σ_ij U_ij U_{i+k,j+k}, own[0] = ‖U‖². Its level far from 0 is taken off: dependent
///              tokens have one
inline double shift_dependence(double const* own, std::ptrdiff_t n) {
  std::vector<double> outlying(own + n / 4, own + n / 2 + 1);
  auto const middle = outlying.begin() + static_cast<std::ptrdiff_t>(outlying.size() / 2);
  std::nth_element(outlying.begin(), middle, outlying.end());
  double const level = std::clamp(*middle / own[0], 0.0, 0.9);
  if (level > 0.5) return std::numeric_limits<double>::infinity();
  // Of independent tokens a_k has the standard deviation √2/n.
  double const noise = 0.05 + 3 * std::sqrt(2.0) / static_cast<double>(n);
  double sum = 1;
  for (std::ptrdiff_t k = 1; k <= (std::max)(n / 4, std::ptrdiff_t{1}); ++k) {
    double const a = (own[k] / own[0] - level) / (1 - level);
    if (!(a > noise)) return sum;
    sum += 2 * std::sqrt(a);
  }
  return std::numeric_limits<double>::infinity();
}

}  // namespace rflow::detail
