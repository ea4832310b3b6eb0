// SPDX-License-Identifier: Apache-2.0
#pragma once

// Sums of the flow moments over the tokens of a slab.

#include <cmath>
#include <limits>

#include <cuda_runtime.h>

#include <rflow/detail/cuda/chain.cuh>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

/// Sums of unit vectors over sequences. An item is a column a lane of one site; it walks all tokens
/// of a slab. What is open at its end is kept for the next slab.
template <class T>
struct add_units {
  using C = compute_t<T>;

  slab_rows<T> x;
  token_table table;
  integer const* ends;  // tokens at which a sequence ends, counted from the slab's first
  integer end_count;
  double* open;        // S × width
  double* open_count;  // S
  double* norms;       // ends × S × chunks: ‖·‖² of the closed sums
  double* counts;      // ends × S

  template <class Group>
  __host__ __device__ void operator()(integer item, Group g) const {
    integer const width = x.sites[0].cols, chunks = ceil_div(width, integer{Group::size});
    integer const l = item / chunks, chunk = item % chunks;
    integer const j = chunk * Group::size + g.lane();
    bool const counts_tokens = chunk == 0 && g.lane() == 0;

    double sum = j < width ? open[l * width + j] : 0;
    double count = counts_tokens ? open_count[l] : 0;
    integer t = 0;
    for (integer e = 0; e < end_count; ++e) {
      count += add<Group::tokens>(l, t, ends[e], j, sum);
      t = ends[e];
      double const square = g.sum(sum * sum);
      if (g.lane() == 0) norms[(e * table.sites + l) * chunks + chunk] = square;
      if (counts_tokens) counts[e * table.sites + l] = count;
      sum = 0;
      count = 0;
    }
    count += add<Group::tokens>(l, t, table.tokens, j, sum);
    if (j < width) open[l * width + j] = sum;
    if (counts_tokens) open_count[l] = count;
  }

 private:
  /// Adds feature j of tokens begin … end − 1, in C over four of them; returns how many rows are not
  /// zero. `Ahead` tokens are read before the first is used.
  template <int Ahead>
  __host__ __device__ double add(integer l, integer begin, integer end, integer j,
                                 double& sum) const {
    using std::ldexp, std::sqrt;
    token_rows<T> const& site = x.sites[l];
    C part = 0;
    int pending = 0;
    double count = 0;
    for (integer t = begin; t < end; t += Ahead) {
      C here[Ahead];
      double norm[Ahead];
      for (int u = 0; u < Ahead; ++u) {
        norm[u] = t + u < end ? table.norm[table.at(l, t + u)] : missing;
        here[u] = t + u < end ? value(site, t + u, j) : C(0);
      }
      for (int u = 0; u < Ahead; ++u) {
        if (!(norm[u] > 0)) continue;
        count += 1;
        if (!in_range<C>(norm[u] * norm[u])) {
          integer const at = table.at(l, t + u);
          sum +=
              ldexp(static_cast<double>(here[u]), -table.unit[at].square) / sqrt(table.square[at]);
          continue;
        }
        part += here[u] * static_cast<C>(1 / norm[u]);
        if (++pending < 4) continue;
        sum += static_cast<double>(part);
        part = 0;
        pending = 0;
      }
    }
    sum += static_cast<double>(part);
    return count;
  }

  __host__ __device__ C value(token_rows<T> const& site, integer t, integer j) const {
    return j < site.cols ? static_cast<C>(site.row(x.first + t)[j * site.col_stride]) : C(0);
  }
};

/// Adds up the parts of each closed sequence's norm.
struct fold_norms {
  double const* parts;
  integer chunks;
  double* out;

  __host__ __device__ void operator()(integer i) const {
    double sum = 0;
    for (integer c = 0; c < chunks; ++c) sum += parts[i * chunks + c];
    out[i] = sum;
  }
};

/// One site over one slice of tokens. Squares are in units of 4^unit; turns in those of the step
/// before, and of the step.
struct slice_sums {
  double square, zero_rows, step2, spread;
  double turn_weight, turn_mean, turn_away2;
  double cosines, mean_cosine, m2_cosine;
  token_units unit;
  int before_unit;
  integer bad_token, bad_feature;  // −1 if there is none
};

/// Sums the token table over a slice. An item is a site of a slice.
struct sum_tokens {
  token_table table;
  integer slice;
  slice_sums* out;

  template <class Group>
  __host__ __device__ void operator()(integer item, Group g) const {
    integer const l = item % table.sites, first = item / table.sites * slice;
    integer const last = smaller(table.tokens, first + slice);
    slice_sums s{};
    find_units(l, first, last, g, s);
    double first_bad = 0, cosine = 0;
    for (integer t = first + g.lane(); t < last; t += Group::size) {
      integer const at = table.at(l, t);
      s.square += moved(table.square[at], 2 * (table.unit[at].square - s.unit.square));
      s.step2 += moved(table.step2[at], 2 * (table.unit[at].step - s.unit.step));
      s.spread += moved(table.spread[at], 2 * (table.unit[at].spread - s.unit.spread));
      if (table.norm[at] == 0) s.zero_rows += 1;
      if (table.bad[at] >= 0 && first_bad == 0) first_bad = static_cast<double>(last - t);
      if (l > 0 && is_finite(table.cosine[at])) s.cosines += 1, cosine += table.cosine[at];
    }
    for (double* const value : {&s.square, &s.step2, &s.spread, &s.zero_rows, &s.cosines})
      *value = g.sum(*value);
    if (l > 1) sum_turns(l, first, last, g, s);
    s.mean_cosine = s.cosines > 0 ? g.sum(cosine) / s.cosines : 0;
    for (integer t = first + g.lane(); l > 0 && t < last; t += Group::size) {
      double const away = table.cosine[table.at(l, t)] - s.mean_cosine;
      if (is_finite(away)) s.m2_cosine += away * away;
    }
    s.m2_cosine = g.sum(s.m2_cosine);
    first_bad = g.max(first_bad);
    s.bad_token = first_bad > 0 ? last - static_cast<integer>(first_bad) : -1;
    s.bad_feature = first_bad > 0 ? table.bad[table.at(l, s.bad_token)] : -1;
    if (g.lane() == 0) out[item] = s;
  }

 private:
  __host__ __device__ static double moved(double value, int by) {
    using std::ldexp;
    return by == 0 ? value : ldexp(value, by);
  }

  /// The largest units of what is not 0.
  template <class Group>
  __host__ __device__ void find_units(integer l, integer first, integer last, Group g,
                                      slice_sums& s) const {
    double most[4] = {};  // above `least`, which is below any
    constexpr int least = -4096;
    auto const raise = [](double value, int unit, double& to) {
      double const above = value > 0 ? unit - least : 0;
      to = to < above ? above : to;
    };
    for (integer t = first + g.lane(); t < last; t += Group::size) {
      integer const at = table.at(l, t);
      raise(table.square[at], table.unit[at].square, most[0]);
      raise(table.step2[at], table.unit[at].step, most[1]);
      raise(table.spread[at], table.unit[at].spread, most[2]);
      if (l == 0) continue;
      integer const before = table.at(l - 1, t);
      raise(table.step2[before], table.unit[before].step, most[3]);
    }
    auto const unit = [&](double above) {
      above = g.max(above);
      return above > 0 ? static_cast<int>(above) + least : 0;
    };
    s.unit.square = static_cast<short>(unit(most[0]));
    s.unit.step = static_cast<short>(unit(most[1]));
    s.unit.spread = static_cast<short>(unit(most[2]));
    s.before_unit = unit(most[3]);
  }

  /// The step of one token into a site and how it goes on, in the units of a slice.
  struct turn_parts {
    double b2, c, rest2;
  };
  __host__ __device__ turn_parts turn_of(integer l, integer t, slice_sums const& s) const {
    integer const at = table.at(l, t), before = table.at(l - 1, t);
    double const b2 = table.step2[before], c = table.turn[at];
    int const down = table.unit[before].step - s.before_unit;
    int const by = table.unit[at].step - s.unit.step;
    // b is nothing beside the others': all of a is across.
    if (down < -500 || !(b2 > 0)) return {0, 0, moved(table.rest2[at] + c * (c * b2), 2 * by)};
    return {moved(b2, 2 * down), moved(c, by - down), moved(table.rest2[at], 2 * by)};
  }

  template <class Group>
  __host__ __device__ void sum_turns(integer l, integer first, integer last, Group g,
                                     slice_sums& s) const {
    double weight = 0, along = 0, away2 = 0;
    for (integer t = first + g.lane(); t < last; t += Group::size) {
      turn_parts const p = turn_of(l, t, s);
      weight += p.b2;
      along += p.c * p.b2;
    }
    s.turn_weight = g.sum(weight);
    along = g.sum(along);
    s.turn_mean = s.turn_weight > 0 ? along / s.turn_weight : 0;
    for (integer t = first + g.lane(); t < last; t += Group::size) {
      turn_parts const p = turn_of(l, t, s);
      double const apart = p.c - s.turn_mean;
      away2 += p.rest2;
      if (p.b2 > 0) away2 += apart * (apart * p.b2);
    }
    s.turn_away2 = g.sum(away2);
  }
};

}  // namespace rflow::detail::passes
