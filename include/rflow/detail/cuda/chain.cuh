// SPDX-License-Identifier: Apache-2.0
#pragma once

// One token through the chain, on a group of lanes: what the flow moments need of it.

#include <cmath>
#include <concepts>
#include <limits>

#include <cuda_runtime.h>

#include <rflow/detail/cuda/source.cuh>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

/// Squares of C neither overflow nor lose their last bits in this range.
template <class C>
__host__ __device__ bool in_range(double square) {
  if constexpr (std::same_as<C, float>)
    return square > 1e-18 && square < 1e30;
  else
    return square > 1e-270 && square < 1e290;
}

/// Squares of a token are in units of 4^these: 0 but for data far from 1.
struct token_units {
  short square, step, spread;
};

/// What is kept of every token of a slab at every site, at site · tokens + token. A turn is a share
/// of the step before, and rest2 the square of what is across it.
struct token_table {
  integer sites, tokens;
  double *square, *step2, *turn, *rest2, *spread, *cosine, *norm;
  token_units* unit;
  integer* bad;  // first feature that is NaN or infinite, −1 if there is none

  __host__ __device__ integer at(integer site, integer token) const {
    return site * tokens + token;
  }
};

/// Sums of a lane over its features.
template <class A>
struct chain_sums {
  A square = 0, dot = 0, step2 = 0, turn = 0, away2 = 0;
};

/// The features of a row.
template <class T>
struct row_values {
  T const* at;
  integer stride;

  __host__ __device__ double operator()(integer j) const {
    return static_cast<double>(at[j * stride]);
  }
};

/// x − p, or half of it.
template <class T>
struct row_difference {
  row_values<T> x, p;
  double part;

  __host__ __device__ double operator()(integer j) const { return x(j) * part - p(j) * part; }
};

/// Values in units of 2^exponent.
template <class F>
struct in_units {
  F values;
  int exponent;
  double power, rest;  // 2^−exponent in two factors: one may be out of range

  __host__ __device__ double operator()(integer j) const { return values(j) * power * rest; }
};

/// Sums of f(j) over j < n.
template <class Group, class F>
__host__ __device__ double sum_over(integer n, Group g, F const& f) {
  double sum = 0;
  for (integer j = g.lane(); j < n; j += Group::size) sum += f(j);
  return g.sum(sum);
}
/// The largest |f(j)|.
template <class Group, class F>
__host__ __device__ double largest_of(integer n, Group g, F const& f) {
  using std::abs;
  double most = 0;
  for (integer j = g.lane(); j < n; j += Group::size) {
    double const value = abs(f(j));
    most = most < value ? value : most;
  }
  return g.max(most);
}
/// Σ a(j) b(j).
template <class Group, class A, class B>
__host__ __device__ double inner(integer n, Group g, A const& a, B const& b) {
  return sum_over(n, g, [&](integer j) { return a(j) * b(j); });
}
/// Units in which a largest value of `most` is between 1 and 2.
template <class F>
__host__ __device__ in_units<F> in_units_of(double most, F const& f) {
  using std::ilogb, std::ldexp;
  int const e = most > 0 ? ilogb(most) : 0;
  return {f, e, ldexp(1.0, -(e / 2)), ldexp(1.0, e / 2 - e)};
}

/// Walks one token through all sites: norms, products with the site before, distance from the mean
/// of the sites before, by how far the site before is off it. In C, and once more in double for a
/// token with a row that is zero, not finite, or too large or small to be squared in C, or such a
/// step, or steps that are nearly parallel.
template <class T>
struct walk_chain {
  using C = compute_t<T>;
  using step = row_difference<T>;

  slab_rows<T> x;
  token_table out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    for (integer l = g.lane(); l < out.sites; l += Group::size) out.bad[out.at(l, t)] = -1;
    g.sync();
    walk(t, g);
    g.sync();
    double odd = 0;
    for (integer l = g.lane(); l < out.sites; l += Group::size) {
      bool const good =
          in_range<C>(out.square[out.at(l, t)]) && (l == 0 || in_range<C>(out.step2[out.at(l, t)]));
      if (!good) odd = 1;
    }
    if (g.max(odd) > 0)
      careful(t, g);
    else
      finish(t, g);
  }

 private:
  __host__ __device__ row_values<T> values(integer l, integer t) const {
    return {x.sites[l].row(x.first + t), x.sites[l].col_stride};
  }

  template <class Group>
  __host__ __device__ void walk(integer t, Group g) const {
    constexpr integer block = Group::size * Group::held;
    integer const width = x.sites[0].cols;
    for (integer from = 0; from < width; from += block) {
      C off[Group::held] = {}, before[Group::held] = {}, move[Group::held] = {};
      for (integer l = 0; l < out.sites; ++l) {
        C here[Group::held];
        load(x.sites[l], x.sites[l].row(x.first + t), from, g, here);
        C const share = static_cast<C>(l) / static_cast<C>(l + 1);
        chain_sums<C> s;
        add_features(here, share, off, before, move, s);
        double const square = static_cast<double>(g.sum(s.square)),
                     dot = static_cast<double>(g.sum(s.dot)),
                     step2 = static_cast<double>(g.sum(s.step2)),
                     turn = static_cast<double>(g.sum(s.turn)),
                     away2 = static_cast<double>(g.sum(s.away2)) * static_cast<double>(l) /
                             static_cast<double>(l + 1);
        if (g.lane() == 0) {
          integer const at = out.at(l, t);
          if (from == 0) store(at, 0, l > 0 ? 0 : missing, 0, 0, 0);
          out.square[at] += square;
          out.spread[at] += away2;
          if (l > 0) out.cosine[at] += dot, out.step2[at] += step2;
          if (l > 1) out.turn[at] += turn;
        }
      }
    }
  }

  template <int Held>
  __host__ __device__ static void add_features(C const (&here)[Held], C share, C (&off)[Held],
                                               C (&before)[Held], C (&step_before)[Held],
                                               chain_sums<C>& s) {
    for (int k = 0; k < Held; ++k) {
      C const v = here[k], move = v - before[k], away = move + off[k];
      s.square += v * v;
      s.dot += v * before[k];
      s.step2 += move * move;
      s.turn += move * step_before[k];
      s.away2 += away * away;
      off[k] = away * share;
      before[k] = v;
      step_before[k] = move;
    }
  }

  __host__ __device__ void store(integer at, double square, double cosine, double step2,
                                 double turn, double spread) const {
    out.square[at] = square;
    out.cosine[at] = cosine;
    out.step2[at] = step2;
    out.turn[at] = turn;
    out.rest2[at] = 0;
    out.spread[at] = spread;
    out.unit[at] = {0, 0, 0};
  }

  /// Norms, cosines and turns of a token from its products in C.
  template <class Group>
  __host__ __device__ void finish(integer t, Group g) const {
    using std::sqrt;
    double straight = 0;
    for (integer l = g.lane(); l < out.sites; l += Group::size) {
      integer const at = out.at(l, t);
      double const square = out.square[at];
      out.norm[at] = sqrt(square);
      if (l == 0) continue;
      out.cosine[at] = out.cosine[at] / sqrt(square) / sqrt(out.square[out.at(l - 1, t)]);
      if (l == 1) continue;
      double const a2 = out.step2[at], ab = out.turn[at], c = ab / out.step2[out.at(l - 1, t)];
      out.turn[at] = c;
      out.rest2[at] = a2 - c * ab;
      if (c * ab > 0.75 * a2) straight = 1;
    }
    if (!(g.max(straight) > 0)) return;
    g.sync();
    for (integer l = 2; l < out.sites; ++l) {
      integer const at = out.at(l, t);
      double const rest2 = out.rest2[at], a2 = out.step2[at];
      g.sync();
      if (!(rest2 < 0.25 * a2)) continue;
      turn_again(at, x.sites[l].cols, g,
                 in_units<step>{{values(l, t), values(l - 1, t), 1}, 0, 1, 1},
                 in_units<step>{{values(l - 1, t), values(l - 2, t), 1}, 0, 1, 1});
    }
  }

  /// What is across the step before is measured, not left over from squares that nearly cancel.
  template <class Group, class A, class B>
  __host__ __device__ void turn_again(integer at, integer width, Group g, A const& a,
                                      B const& b) const {
    double const b2 = inner(width, g, b, b), ab = inner(width, g, a, b), c = b2 > 0 ? ab / b2 : 0;
    double const rest2 = sum_over(width, g, [&](integer j) {
      double const rest = a(j) - c * b(j);
      return rest * rest;
    });
    if (g.lane() != 0) return;
    out.turn[at] = c;
    out.rest2[at] = rest2;
  }

  /// Goes back to units of 1 where a square is well within the range of double.
  __host__ __device__ static short settled(int exponent) {
    return static_cast<short>(exponent > -400 && exponent < 400 ? 0 : exponent);
  }

  template <class Group>
  __host__ __device__ in_units<step> step_in_own_units(integer width, Group g, step move) const {
    double most = largest_of(width, g, move);
    if (is_finite(most)) return in_units_of(most, move);
    move.part = 0.5;
    most = largest_of(width, g, move);
    in_units<step> halved = in_units_of(most, move);
    halved.exponent += 1;
    return halved;
  }

  /// Everything about a token in double, each row and step in units of its own, and each site kept
  /// apart from one that has no value.
  template <class Group>
  __host__ __device__ void careful(integer t, Group g) const {
    using std::ldexp, std::sqrt;
    integer const width = x.sites[0].cols;
    integer run = 0;  // finite rows just before this one
    bool finite = true;
    double square_before = 0, most_before = 0;
    for (integer l = 0; l < out.sites; ++l) {
      integer const at = out.at(l, t);
      row_values<T> const row = values(l, t);
      integer const bad = first_bad(row, width, g);
      if (bad >= 0) {
        if (g.lane() == 0) {
          store(at, 0, missing, 0, 0, 0);
          out.norm[at] = missing;
          out.bad[at] = bad;
        }
        run = 0;
        finite = false;
        continue;
      }
      double const most = largest_of(width, g, row);
      auto const here = in_units_of(most, row);
      double const square = inner(width, g, here, here);
      double cosine = missing;
      if (run > 0 && square > 0 && square_before > 0)
        cosine = inner(width, g, here, in_units_of(most_before, values(l - 1, t))) / sqrt(square) /
                 sqrt(square_before);
      short const unit = settled(here.exponent);
      if (g.lane() == 0) {
        store(at, ldexp(square, 2 * (here.exponent - unit)), cosine, 0, 0, 0);
        out.norm[at] = ldexp(sqrt(square), here.exponent);
        out.unit[at].square = unit;
      }
      if (run > 0) careful_step(l, t, run > 1, g);
      square_before = square;
      most_before = most;
      ++run;
    }
    g.sync();
    if (finite) careful_spread(t, g);
  }

  template <class Group>
  __host__ __device__ integer first_bad(row_values<T> const& row, integer width, Group g) const {
    double bad = 0;  // counted from the end, so that the first is the largest
    for (integer j = g.lane(); j < width && bad == 0; j += Group::size)
      if (!is_finite(row(j))) bad = static_cast<double>(width - j);
    bad = g.max(bad);
    return bad > 0 ? width - static_cast<integer>(bad) : -1;
  }

  template <class Group>
  __host__ __device__ void careful_step(integer l, integer t, bool turns, Group g) const {
    using std::ldexp;
    integer const width = x.sites[0].cols, at = out.at(l, t);
    auto const a = step_in_own_units(width, g, step{values(l, t), values(l - 1, t), 1});
    double const a2 = inner(width, g, a, a);
    short const unit = settled(a.exponent);
    int const up = a.exponent - unit;
    g.sync();
    if (g.lane() == 0) {
      out.step2[at] = ldexp(a2, 2 * up);
      out.unit[at].step = unit;
    }
    if (!turns) return;
    auto const b = step_in_own_units(width, g, step{values(l - 1, t), values(l - 2, t), 1});
    turn_again(at, width, g, a, b);
    if (g.lane() != 0) return;
    out.turn[at] = ldexp(out.turn[at], up - (b.exponent - settled(b.exponent)));
    out.rest2[at] = ldexp(out.rest2[at], 2 * up);
  }

  /// The spread of all sites, kept at the first: from differences to its row.
  template <class Group>
  __host__ __device__ void careful_spread(integer t, Group g) const {
    using std::ilogb, std::ldexp;
    integer const width = x.sites[0].cols;
    double part = 1, most = farthest(t, part, g);
    if (!is_finite(most)) {
      part = 0.5;
      most = farthest(t, part, g);
    }
    if (!(most > 0)) return;
    double const sum = sum_over(width, g, [&](integer j) {
      double mean = 0, square = 0;
      for (integer l = 0; l < out.sites; ++l) {
        auto const move = in_units_of(most, step{values(l, t), values(0, t), part});
        double const seen = static_cast<double>(l), away = move(j) - mean;
        square += away * away * (seen / (seen + 1));
        mean += away / (seen + 1);
      }
      return square;
    });
    if (g.lane() != 0) return;
    int const exponent = ilogb(most) + (part < 1 ? 1 : 0);
    short const unit = settled(exponent);
    out.spread[out.at(0, t)] = ldexp(sum, 2 * (exponent - unit));
    out.unit[out.at(0, t)].spread = unit;
  }

  /// The largest difference of a feature to the first site's.
  template <class Group>
  __host__ __device__ double farthest(integer t, double part, Group g) const {
    double most = 0;
    for (integer l = 1; l < out.sites; ++l) {
      double const here = largest_of(x.sites[0].cols, g, step{values(l, t), values(0, t), part});
      most = most < here ? here : most;
    }
    return most;
  }
};

}  // namespace rflow::detail::passes
