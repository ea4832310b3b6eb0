// SPDX-License-Identifier: Apache-2.0
#pragma once

// The flow pass and the Gram pass for a device of many small threads: functors, and the order in which
// they run. Not a public interface: on_cuda in cuda.cuh gives it a device, a class with
//
//     group                       some threads (lanes) that share an item: lane(), sum(), max(), sync()
//     each_index(count, f)        f(i) for every i, in any order
//     each_group(count, f)        f(i, group) for every i, in any order
//     allocate(bytes)             an owner of memory, with data()
//     upload, download, zero      copies between host and device, wait() ends them all
//     source(stack, arena, bound) where the rows of a stack are read from
//     product, pair_products      inner products, column-major as BLAS has them
//
// and some sizes. Work is cut by the shape of the data and these sizes alone, and every sum has an
// owner: results do not depend on how many threads there are.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <rflow/detail/numerics.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

using integer = std::ptrdiff_t;

__host__ __device__ constexpr integer ceil_div(integer a, integer b) { return (a + b - 1) / b; }
__host__ __device__ constexpr integer round_up(integer a, integer b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr integer smaller(integer a, integer b) { return a < b ? a : b; }

// Functions of the standard library are not for device code; their values are.
inline constexpr double missing = std::numeric_limits<double>::quiet_NaN();

inline std::size_t size_of(integer count) { return static_cast<std::size_t>(count); }

// ---- memory, asked for once ---------------------------------------------------------------------

/// Places in memory that is yet to be asked for.
class arena {
  static constexpr integer alignment = 256;

 public:
  template <class V>
  struct place {
    std::size_t at = 0;
  };

  template <class V>
  place<V> reserve(integer count) {
    std::size_t const at = bytes_;
    bytes_ += size_of(round_up(std::max<integer>(count, 1) * integer{sizeof(V)}, alignment));
    return {at};
  }

  std::size_t bytes() const { return bytes_; }
  void settle(std::byte* base) { base_ = base; }

  template <class V>
  V* operator[](place<V> where) const {
    return reinterpret_cast<V*>(base_ + where.at);
  }

 private:
  std::size_t bytes_ = 0;
  std::byte* base_ = nullptr;
};

// ---- reading rows -------------------------------------------------------------------------------

/// Rows of one site, seen through a list of selected rows if there is one.
template <class T>
struct token_rows {
  T const* data = nullptr;
  integer row_stride = 0, col_stride = 1, cols = 0;
  integer const* selected = nullptr;

  __host__ __device__ T const* row(integer i) const {
    return data + (selected != nullptr ? selected[i] : i) * row_stride;
  }
  token_rows from(integer first) const {
    token_rows out = *this;
    if (selected != nullptr)
      out.selected += first;
    else
      out.data += first * row_stride;
    return out;
  }
};

/// The rows of all sites; token t of a slab is row first + t.
template <class T>
struct slab_rows {
  token_rows<T> const* sites;
  integer first;
};

/// Tokens whose distances give a median.
inline integer sample_size(integer tokens) { return std::min<integer>(tokens, 512); }

/// Reads rows where they lie.
template <class T>
class direct_source {
 public:
  using scalar = T;

  template <class Memory>
  direct_source(layer_stack<T, Memory> const& stack, arena& memory)
      : selection_(stack.selection().begin(), stack.selection().end()) {
    for (integer l = 0; l < stack.sites(); ++l) {
      auto const& x = stack[l];
      rows_.push_back({x.data, x.row_stride, x.col_stride, x.cols, nullptr});
    }
    for (integer i = 0; i < sample_size(stack.size()); ++i)
      sample_.push_back(stack.token(i * stack.size() / sample_size(stack.size())));
    rows_at_ = memory.reserve<token_rows<T>>(sites());
    selection_at_ = memory.reserve<integer>(static_cast<integer>(selection_.size()));
    sample_at_ = memory.reserve<integer>(static_cast<integer>(sample_.size()));
    masked_ = stack.masked();
  }

  template <class Device>
  void start(Device& on, arena const& memory) {
    if (masked_)
      for (auto& site : rows_) site.selected = memory[selection_at_];
    on.upload(selection_.data(), static_cast<integer>(selection_.size()), memory[selection_at_]);
    on.upload(rows_.data(), sites(), memory[rows_at_]);
    on.upload(sample_.data(), static_cast<integer>(sample_.size()), memory[sample_at_]);
    on_device_ = memory[rows_at_];
    sample_on_device_ = memory[sample_at_];
  }

  integer sites() const { return static_cast<integer>(rows_.size()); }
  integer cols(integer site) const { return rows_[size_of(site)].cols; }

  /// How many rows of a site, or of all of them, may be asked for at once.
  integer most_rows(integer tokens) const { return tokens; }
  integer most_slab(integer tokens) const { return tokens; }

  /// Rows first … first + count − 1 of all sites, or of one.
  slab_rows<T> slab(integer first, integer) { return {on_device_, first}; }
  token_rows<T> rows(integer site, integer first, integer) {
    return rows_[size_of(site)].from(first);
  }
  /// Up to 512 evenly strided rows, for a median.
  token_rows<T> sample(integer site) {
    token_rows<T> out = rows_[size_of(site)];
    out.selected = sample_on_device_;
    return out;
  }
  /// What was asked for last is no longer needed once the work enqueued so far is done.
  void release() {}

 private:
  std::vector<token_rows<T>> rows_;
  std::vector<integer> selection_, sample_;
  bool masked_ = false;
  arena::place<token_rows<T>> rows_at_;
  arena::place<integer> selection_at_, sample_at_;
  token_rows<T> const* on_device_ = nullptr;
  integer const* sample_on_device_ = nullptr;
};

/// Widens up to Count · Group::size features of a row: a lane's k-th is from + k · size + lane. What
/// there is not is zero, and is looked at too, so that all stay in registers.
template <class C, int Count, class Group, class T>
__host__ __device__ void load(token_rows<T> const& x, T const* row, integer from, Group g,
                              C (&to)[Count]) {
  integer const left = x.cols - from - g.lane();
  integer const here = smaller(Count, left > 0 ? ceil_div(left, Group::size) : 0);
  T const* const at = row + (from + g.lane()) * x.col_stride;
  for (integer k = 0; k < Count; ++k)
    to[k] = k < here ? static_cast<C>(at[k * Group::size * x.col_stride]) : C(0);
}

// ---- flow: one token through the chain ----------------------------------------------------------

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

// ---- flow: sums over tokens ---------------------------------------------------------------------

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

// ---- flow: the pass -----------------------------------------------------------------------------

/// Tokens that go through the pass together, and the sequences that end among them.
struct slab {
  integer first, count, first_end, end_count, first_slice;
};

inline constexpr integer slice_tokens = 128;
inline constexpr integer slab_ends = 1024;

/// Cuts tokens into slabs of at most `most` tokens and slab_ends ends of sequences.
inline std::vector<slab> cut(integer tokens, integer most, std::vector<integer> const& ends) {
  std::vector<slab> out;
  integer first = 0, end = 0, slice = 0;
  while (first < tokens) {
    integer last = std::min(tokens, first + most), past = end;
    while (past < static_cast<integer>(ends.size()) && ends[size_of(past)] <= last) ++past;
    if (past - end > slab_ends) {
      past = end + slab_ends;
      last = ends[size_of(past - 1)];
    }
    out.push_back({first, last - first, end, past - end, slice});
    slice += ceil_div(last - first, slice_tokens);
    first = last;
    end = past;
  }
  return out;
}

/// Where the ends of sequences are that have tokens.
template <class T, class Memory>
std::vector<integer> sequence_ends(layer_stack<T, Memory> const& stack) {
  std::vector<integer> out;
  for (integer const b : stack.boundaries())
    if (b > 0 && (out.empty() || b > out.back())) out.push_back(b);
  return out;
}

template <class Device, class Stack>
using source_of = decltype(std::declval<Device&>().source(std::declval<Stack const&>(),
                                                          std::declval<arena&>(), std::size_t{}));

template <class Device, class T, class Memory>
class flow_pass {
  using group = typename Device::group;

 public:
  flow_pass(char const* where, Device& on, layer_stack<T, Memory> const& stack,
            std::size_t memory_bound)
      : on_(on),
        source_(on.source(stack, memory_, memory_bound)),
        sites_(stack.sites()),
        width_(stack.width()),
        tokens_(stack.size()),
        chunks_(ceil_div(width_, integer{group::size})),
        ends_(sequence_ends(stack)) {
    integer const table = sites_ * integer{9 * sizeof(double)};
    integer const bound = static_cast<integer>(memory_bound) / 2;
    slab_tokens_ = std::min(source_.most_slab(tokens_), std::max<integer>(bound / table, 1));
    slabs_ = cut(tokens_, slab_tokens_, ends_);
    reserve();
    if (memory_.bytes() > memory_bound)
      reject(where, "a memory bound of " + std::to_string(memory_bound) + " bytes is below the " +
                        std::to_string(memory_.bytes()) + " that " + std::to_string(sites_) +
                        " sites x " + std::to_string(width_) + " take");
  }

  flow_moments operator()(flow_sink const& sink) {
    auto const owner = on_.allocate(memory_.bytes());
    memory_.settle(owner.data());
    source_.start(on_, memory_);
    on_.zero(memory_[open_], sites_ * width_ + sites_);
    std::vector<integer> relative = ends_;
    for (slab const& s : slabs_)
      for (integer e = 0; e < s.end_count; ++e) relative[size_of(s.first_end + e)] -= s.first;
    on_.upload(relative.data(), static_cast<integer>(relative.size()), memory_[ends_at_]);
    for (slab const& s : slabs_) add(s, sink);

    std::vector<slice_sums> sums(size_of(slices() * sites_));
    std::vector<double> norms(ends_.size() * size_of(sites_)), counts(norms.size());
    on_.download(memory_[sums_], static_cast<integer>(sums.size()), sums.data());
    on_.download(memory_[norms_], static_cast<integer>(norms.size()), norms.data());
    on_.download(memory_[counts_], static_cast<integer>(counts.size()), counts.data());
    on_.wait();
    return collect(sums, norms, counts);
  }

 private:
  integer slices() const {
    return slabs_.back().first_slice + ceil_div(slabs_.back().count, slice_tokens);
  }

  void reserve() {
    integer most_ends = 0;
    for (slab const& s : slabs_) most_ends = std::max(most_ends, s.end_count);
    for (auto& field : fields_) field = memory_.reserve<double>(sites_ * slab_tokens_);
    units_ = memory_.reserve<token_units>(sites_ * slab_tokens_);
    bad_ = memory_.reserve<integer>(sites_ * slab_tokens_);
    open_ = memory_.reserve<double>(sites_ * width_ + sites_);
    ends_at_ = memory_.reserve<integer>(static_cast<integer>(ends_.size()));
    norms_ = memory_.reserve<double>(static_cast<integer>(ends_.size()) * sites_);
    counts_ = memory_.reserve<double>(static_cast<integer>(ends_.size()) * sites_);
    parts_ = memory_.reserve<double>(most_ends * sites_ * chunks_);
    sums_ = memory_.reserve<slice_sums>(slices() * sites_);
  }

  void add(slab const& s, flow_sink const& sink) {
    double* f[7];
    for (std::size_t k = 0; k < 7; ++k) f[k] = memory_[fields_[k]];
    token_table const table{sites_, s.count,         f[0],         f[1], f[2], f[3], f[4], f[5],
                            f[6],   memory_[units_], memory_[bad_]};
    slab_rows<T> const x = source_.slab(s.first, s.count);
    integer const at = s.first_end * sites_;
    on_.each_group(s.count, walk_chain<T>{x, table});
    on_.each_group(
        sites_ * chunks_,
        add_units<T>{x, table, memory_[ends_at_] + s.first_end, s.end_count, memory_[open_],
                     memory_[open_] + sites_ * width_, memory_[parts_], memory_[counts_] + at});
    source_.release();
    if (s.end_count > 0)
      on_.each_index(s.end_count * sites_,
                     fold_norms{memory_[parts_], chunks_, memory_[norms_] + at});
    on_.each_group(ceil_div(s.count, slice_tokens) * sites_,
                   sum_tokens{table, slice_tokens, memory_[sums_] + s.first_slice * sites_});
    for (integer l = 0; l < sites_; ++l) {
      if (sink.norm != nullptr)
        on_.download(table.norm + l * s.count, s.count, sink.norm + l * tokens_ + s.first);
      if (sink.cosine != nullptr && l > 0)
        on_.download(table.cosine + l * s.count, s.count,
                     sink.cosine + (l - 1) * tokens_ + s.first);
    }
  }

  flow_moments collect(std::vector<slice_sums> const& sums, std::vector<double> const& norms,
                       std::vector<double> const& counts) const {
    flow_moments m(sites_, width_);
    m.tokens = static_cast<double>(tokens_);
    for (slab const& s : slabs_)
      for (integer k = 0; k < ceil_div(s.count, slice_tokens); ++k)
        for (integer l = 0; l < sites_; ++l)
          collect(sums[size_of((s.first_slice + k) * sites_ + l)], s.first, size_of(l), m);
    for (std::size_t i = 0; i < norms.size(); ++i)
      m.end_sequence(i % size_of(sites_), norms[i], counts[i]);
    return m;
  }

  static void collect(slice_sums const& s, integer first, std::size_t l, flow_moments& m) {
    m.squares[l] += square_sum::of(s.square, s.unit.square);
    m.zero_rows[l] += s.zero_rows;
    m.spread += square_sum::of(s.spread, s.unit.spread);
    if (s.bad_token >= 0 && !m.non_finite[l].found())
      m.non_finite[l] = {first + s.bad_token, s.bad_feature};
    if (l == 0) return;
    m.steps[l - 1] += square_sum::of(s.step2, s.unit.step);
    m.cosine[l - 1].merge({s.cosines, s.mean_cosine, s.m2_cosine});
    if (l > 1)
      m.turns[l - 2].merge({s.turn_weight, s.turn_mean, s.turn_away2, s.before_unit, s.unit.step});
  }

  Device& on_;
  arena memory_;
  source_of<Device, layer_stack<T, Memory>> source_;
  integer sites_, width_, tokens_, slab_tokens_ = 0, chunks_;
  std::vector<integer> ends_;
  std::vector<slab> slabs_;
  arena::place<double> fields_[7], open_, norms_, counts_, parts_;
  arena::place<token_units> units_;
  arena::place<integer> bad_, ends_at_;
  arena::place<slice_sums> sums_;
};

/// The flow moments of a stack. Asks for memory once; the number of launches does not depend on the
/// number of tokens as long as 72 bytes a token and site are within half the memory bound.
/// @throws std::invalid_argument if the memory bound is too small for the sites and their sequences
template <class Device, class T, class Memory>
flow_moments flow(char const* where, Device& on, layer_stack<T, Memory> const& stack,
                  flow_sink const& sink, std::size_t memory_bound) {
  if (stack.size() == 0) return flow_moments(stack.sites(), stack.width());
  flow_moments m = flow_pass<Device, T, Memory>(where, on, stack, memory_bound)(sink);
  for (position& at : m.non_finite)
    if (at.found()) at.token = stack.token(at.token);
  return m;
}

// ---- Gram: means, norms, panels -----------------------------------------------------------------

/// Column sums of x · pre over slices of tokens. An item is a column a lane over one slice.
template <class T, class C>
struct sum_columns {
  token_rows<T> x;
  integer tokens, slice;
  double pre;
  double* sums;     // slices × cols
  double* largest;  // slices × chunks: largest finite |x|

  template <class Group>
  __host__ __device__ void operator()(integer item, Group g) const {
    integer const chunks = ceil_div(x.cols, integer{Group::size});
    integer const s = item / chunks, j = item % chunks * Group::size + g.lane();
    integer const last = smaller(tokens, (s + 1) * slice);
    bool const counts = j < x.cols;
    double sum = 0;
    C most = 0;
    for (integer t = s * slice; counts && t < last; t += Group::tokens) {
      C here[Group::tokens];  // read before the first is used
      for (int u = 0; u < Group::tokens; ++u)
        here[u] = t + u < last ? static_cast<C>(x.row(t + u)[j * x.col_stride]) : C(0);
      for (int u = 0; u < Group::tokens; ++u) {
        C const size = here[u] < 0 ? -here[u] : here[u];
        most = most < size ? size : most;
        sum += pre * static_cast<double>(here[u]);
      }
    }
    if (counts) sums[s * x.cols + j] = sum;
    double const all = g.max(static_cast<double>(most));
    if (g.lane() == 0) largest[item] = all;
  }
};

/// What is known of a block of columns after sum_columns.
struct column_facts {
  double largest;
  bool finite;
};

/// Adds the sums over slices to those of the whole site. An item is a column a lane.
struct fold_columns {
  integer cols, slices, chunks;
  double const *sums, *largest;
  double* total;        // cols
  column_facts* facts;  // chunks

  template <class Group>
  __host__ __device__ void operator()(integer chunk, Group g) const {
    double bad = 0, most = facts[chunk].largest;
    integer const j = chunk * Group::size + g.lane();
    if (j < cols) {
      double sum = total[j];
      for (integer s = 0; s < slices; ++s) sum += sums[s * cols + j];
      if (!is_finite(sum)) bad = 1;
      total[j] = sum;
    }
    for (integer s = g.lane(); s < slices; s += Group::size)
      most = most < largest[s * chunks + chunk] ? largest[s * chunks + chunk] : most;
    bad = g.max(bad);
    most = g.max(most);
    if (g.lane() == 0) facts[chunk] = {most, bad == 0 && facts[chunk].finite};
  }
};

/// First feature of every token that is NaN or infinite, −1 if there is none.
template <class T>
struct find_bad {
  token_rows<T> x;
  integer* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    T const* const row = x.row(t);
    double first = 0;  // counted from the end
    for (integer j = g.lane(); j < x.cols && first == 0; j += Group::size)
      if (!is_finite(static_cast<double>(row[j * x.col_stride])))
        first = static_cast<double>(x.cols - j);
    first = g.max(first);
    if (g.lane() == 0) out[t] = first > 0 ? x.cols - static_cast<integer>(first) : -1;
  }
};

/// Centred, scaled values: (x · scale + minus_high) + minus_low. The mean is in two parts, so that
/// subtracting it is as exact as C allows; the scale is a power of two.
template <class C>
struct centring {
  C scale;
  C const *minus_high, *minus_low;

  __host__ __device__ C operator()(C x, integer j) const {
    return (x * scale + minus_high[j]) + minus_low[j];
  }
};

template <class C>
struct set_means {
  double const* total;
  double factor;  // from a column's sum to its scaled mean
  C *minus_high, *minus_low;

  __host__ __device__ void operator()(integer j) const {
    double const mean = total[j] * factor;
    C const high = static_cast<C>(-mean);
    minus_high[j] = high;
    minus_low[j] = static_cast<C>(-mean - static_cast<double>(high));
  }
};

/// Moves centres by `factor` times sums of centred values.
template <class C>
struct move_centres {
  double const* total;
  double factor;
  C *minus_high, *minus_low;

  __host__ __device__ void operator()(integer j) const {
    double const high = static_cast<double>(minus_high[j]);
    double const low = static_cast<double>(minus_low[j]) - total[j] * factor;
    C const moved = static_cast<C>(high + low);
    minus_high[j] = moved;
    minus_low[j] = static_cast<C>((high - static_cast<double>(moved)) + low);
  }
};

template <class C>
struct scale_centres {
  C factor;
  C *minus_high, *minus_low;

  __host__ __device__ void operator()(integer j) const {
    minus_high[j] *= factor;
    minus_low[j] *= factor;
  }
};

/// Column sums of centred values over slices of tokens, of those whose norms are at most `limit`. An item
/// is a column a lane over one slice.
template <class T, class C>
struct sum_centred {
  token_rows<T> x;
  integer tokens, slice;
  centring<C> centre;
  double const* norms;
  double limit;
  double* sums;  // slices × cols

  template <class Group>
  __host__ __device__ void operator()(integer item, Group g) const {
    integer const chunks = ceil_div(x.cols, integer{Group::size});
    integer const s = item / chunks, j = item % chunks * Group::size + g.lane();
    integer const last = smaller(tokens, (s + 1) * slice);
    double sum = 0;
    for (integer t = s * slice; j < x.cols && t < last; ++t)
      if (norms[t] <= limit)
        sum += static_cast<double>(centre(static_cast<C>(x.row(t)[j * x.col_stride]), j));
    if (j < x.cols) sums[s * x.cols + j] = sum;
  }
};

/// Adds sums over slices to those of all.
struct fold_sums {
  integer cols, slices;
  double const* sums;
  double* total;

  __host__ __device__ void operator()(integer j) const {
    for (integer s = 0; s < slices; ++s) total[j] += sums[s * cols + j];
  }
};

/// Σ_{j≠i} ⟨x_i, x_j⟩ of centred rows, from their sum. An item is a token.
template <class T, class C>
struct centred_row_sums {
  token_rows<T> x;
  centring<C> centre;
  double const* total;
  double* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    T const* const row = x.row(t);
    double sum = 0;
    for (integer j = g.lane(); j < x.cols; j += Group::size) {
      double const value = static_cast<double>(centre(static_cast<C>(row[j * x.col_stride]), j));
      sum += value * (total[j] - value);
    }
    sum = g.sum(sum);
    if (g.lane() == 0) out[t] = sum;
  }
};

/// ‖·‖² of centred rows: in C over a few terms, in double beyond. An item is a token.
template <class T, class C>
struct centred_norms {
  token_rows<T> x;
  centring<C> centre;
  double* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    constexpr integer block = Group::size * Group::held;
    double sum = 0;
    for (integer from = 0; from < x.cols; from += block) {
      C here[Group::held];
      load(x, x.row(t), from, g, here);
      C part = 0;
      for (integer k = 0; k < Group::held; ++k) {
        C const value = centre(here[k], from + k * Group::size + g.lane());
        part += value * value;
      }
      sum += static_cast<double>(part);
    }
    sum = g.sum(sum);
    if (g.lane() == 0) out[t] = sum;
  }
};

/// Features first … first + depth − 1 of some tokens, centred, row after row. What there is not is
/// zero. An item is a token.
template <class T, class C>
struct fill_panel {
  token_rows<T> x;
  integer tokens, first, depth;
  centring<C> centre;
  C* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    C* const to = out + t * depth;
    integer const here = t < tokens ? smaller(depth, x.cols - first) : 0;
    T const* const row = x.row(t < tokens ? t : 0) + first * x.col_stride;
    if (x.col_stride == 1)
      for (integer k = g.lane(); k < here; k += Group::size)
        to[k] = centre(static_cast<C>(row[k]), first + k);
    else
      for (integer k = g.lane(); k < here; k += Group::size)
        to[k] = centre(static_cast<C>(row[k * x.col_stride]), first + k);
    for (integer k = here + g.lane(); k < depth; k += Group::size) to[k] = C(0);
  }
};

// ---- Gram: kernels ------------------------------------------------------------------------------
//
// What turns inner products of one site into G: C operator()(C k, C ti, C tj, C removed), from the inner
// product, a number of both tokens and the sum of what was removed for both; see kernels.hpp. The host fills
// in a kernel_facts for every site.

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

// ---- Gram: tiles --------------------------------------------------------------------------------

/// A square of tokens: rows row …, columns col …; row ≥ col. Entry (i, j) of its buffer is at
/// j · side + i: column-major, as BLAS has it.
struct tile {
  integer row, rows, col, cols, side;

  __host__ __device__ bool diagonal() const { return row == col; }
};

inline constexpr integer tile_columns = 64;  // columns of one item of finish_tile

/// Turns inner products into G, zeroes what is not below the diagonal, and leaves sums over parts of
/// rows and columns. An item is a strip of rows, one a lane, over some columns.
template <class Entry, class C>
struct finish_tile {
  tile at;
  Entry entry;
  C const *ti, *tj;  // the numbers of the tile's row and column tokens
  C const *ri, *rj;  // and what was removed for them
  C* g;
  double *row_parts, *col_parts;  // column blocks × side; strips × side: squares, then plain sums

  template <class Group>
  __host__ __device__ void operator()(integer item, Group group) const {
    integer const strips = ceil_div(at.side, integer{Group::size});
    integer const blocks = ceil_div(at.side, tile_columns);
    integer const s = item % strips, b = item / strips;
    integer const i = s * Group::size + group.lane(), first = b * tile_columns;
    bool const held = i < at.side;
    C square = 0, sum = 0;
    for (integer j = first; j < smaller(at.side, first + tile_columns); ++j) {
      C* const here = g + j * at.side + i;
      bool const counts = i < at.rows && j < at.cols && (!at.diagonal() || i > j);
      C const removed = counts ? ri[i] + rj[j] : C(0);
      C const value = counts ? entry(*here, ti[i], tj[j], removed) : C(0);
      if (held) *here = value;
      C const of_kernel = (value + removed) * (value + removed);
      square += of_kernel;
      C const col_square = group.sum(of_kernel);
      if (group.lane() == 0) col_parts[s * at.side + j] = static_cast<double>(col_square);
      if constexpr (Entry::row_sums) {
        sum += value;
        C const col_sum = group.sum(value);
        if (group.lane() == 0) col_parts[(strips + s) * at.side + j] = static_cast<double>(col_sum);
      }
    }
    if (!held) return;
    row_parts[b * at.side + i] = static_cast<double>(square);
    if constexpr (Entry::row_sums) row_parts[(blocks + b) * at.side + i] = static_cast<double>(sum);
  }
};

/// Adds the parts that finish_tile left to the sums of each token. An item is a token of the tile,
/// first as a row, then as a column.
template <bool RowSums>
struct fold_tile {
  tile at;
  integer strips, blocks;
  double const *row_parts, *col_parts;
  double *squares, *row_sums;  // of all tokens

  __host__ __device__ void operator()(integer k) const {
    add(k, at.rows, at.row, blocks, row_parts);
    add(k, at.cols, at.col, strips, col_parts);
  }

 private:
  __host__ __device__ void add(integer k, integer count, integer first, integer parts,
                               double const* from) const {
    if (k >= count) return;
    double square = 0, sum = 0;
    for (integer p = 0; p < parts; ++p) {
      square += from[p * at.side + k];
      if constexpr (RowSums) sum += from[(parts + p) * at.side + k];
    }
    squares[first + k] += square;
    if constexpr (RowSums) row_sums[first + k] += sum;
  }
};

/// Adds the products of slices to those of all pairs of sites.
template <class C>
struct fold_pairs {
  C const* slices;
  integer count, pairs;
  double* out;

  __host__ __device__ void operator()(integer k) const {
    double sum = 0;
    for (integer s = 0; s < count; ++s) sum += static_cast<double>(slices[s * pairs + k]);
    out[k] += sum;
  }
};

// ---- Gram: the pass -----------------------------------------------------------------------------

/// 2^e with e kept where C has normal numbers to spare.
template <class C>
double power_of_two(int e) {
  constexpr int limit = std::numeric_limits<C>::max_exponent - 8;
  return std::ldexp(1., std::clamp(e, -limit, limit));
}

/// The median of squared distances; 0 of none. All pairs have m zeros of the diagonal among them,
/// and every other distance twice.
template <class C>
double median(std::vector<C>& distances, integer m, rbf::median convention) {
  bool const all = convention == rbf::median::all_pairs;
  integer const size = all ? m * m : static_cast<integer>(distances.size());
  if (m < 2) return 0;
  auto const at = [&](integer k) {
    if (all) k = k < m ? -1 : (k - m) / 2;
    if (k < 0) return 0.;
    std::nth_element(distances.begin(), distances.begin() + k, distances.end());
    return static_cast<double>(distances[size_of(k)]);
  };
  double const low = at((size - 1) / 2);
  return (low + at(size / 2)) / 2;
}

/// What the host knows of a site.
struct site_facts {
  integer cols, first_col;
  double largest = 0, pre = 1, scale = 0;  // scale 0: nothing to compare
  bool about_mean = true;                  // else row sums count
  position bad = {};

  /// Kernel values of scaled data times 2^exponent() are those of the data.
  int exponent() const { return scale > 0 ? -2 * std::ilogb(scale) : 0; }
};

/// The Gram moments of the sites of several sources, with C for products.
template <class Device, class C, class... Sources>
class gram_pass {
  using group = typename Device::group;

  struct places {
    integer side, slice_columns;
    arena::place<double> totals, sums, largest, norms, squares, row_sums, row_parts, col_parts,
        pairs;
    arena::place<column_facts> facts;
    arena::place<integer> bad;
    arena::place<double> kernel_rows;
    arena::place<C> high, low, token, removed, rows, cols, tiles, slices, sample;
  };

 public:
  template <class... Stacks>
  gram_pass(char const* where, Device& on, std::size_t memory_bound, bool sampled,
            Stacks const&... stacks)
      : on_(on),
        sources_(on.source(stacks, memory_, memory_bound / sizeof...(stacks))...),
        tokens_(std::get<0>(std::tie(stacks...)).size()) {
    auto const add = [&](auto const& source) {
      for (integer l = 0; l < source.sites(); ++l) {
        sites_.push_back({source.cols(l), total_cols_});
        total_cols_ += padded(source.cols(l));
        widest_ = std::max(widest_, source.cols(l));
      }
    };
    std::apply([&](auto const&... source) { (add(source), ...); }, sources_);
    chunks_ = ceil_div(widest_, integer{group::size});
    depth_ = round_up(std::min<integer>(widest_, Device::panel_bytes / integer{sizeof(C)}),
                      Device::template depth_multiple<C>);
    choose_side(where, memory_bound, sampled);
  }

  /// Runs everything. make_facts(site, norms, row sums, sigma) gives the kernel of a site once its norms are
  /// known, make_entry(site, sigma) what devices need of it.
  template <class MakeFacts, class MakeEntry>
  gram_moments operator()(MakeFacts const& make_facts, MakeEntry const& make_entry,
                          rbf const* bandwidth = nullptr) {
    auto const owner = on_.allocate(memory_.bytes());
    memory_.settle(owner.data());
    std::apply([&](auto&... source) { (source.start(on_, memory_), ...); }, sources_);
    prepare();

    gram_moments m(count(), tokens_);
    if (bandwidth != nullptr) m.sigma = sigmas(*bandwidth);
    using entry = decltype(make_entry(site_facts{}, 0.));
    std::vector<entry> entries;
    std::vector<kernel_facts> kernels;
    std::vector<C> token(size_of(count() * padded_tokens())), removed(token.size());
    for (integer p = 0; p < count(); ++p) {
      site_facts const& s = sites_[size_of(p)];
      double const sigma = m.sigma.empty() ? 0 : m.sigma[size_of(p)];
      auto const of = [&](std::vector<double> const& all) {
        return std::span<double const>(all).subspan(size_of(p * tokens_), size_of(tokens_));
      };
      entries.push_back(make_entry(s, sigma));
      kernels.push_back(make_facts(
          s, of(norms_), s.about_mean ? std::span<double const>{} : of(kernel_rows_), sigma));
      kernel_facts const& k = kernels.back();
      m.entry_rounding[size_of(p)] = k.rounding;
      m.sum_rounding[size_of(p)] = k.floor;
      for (integer i = 0; i < tokens_; ++i) {
        token[size_of(p * padded_tokens() + i)] = static_cast<C>(k.number[size_of(i)]);
        removed[size_of(p * padded_tokens() + i)] = static_cast<C>(k.removed[size_of(i)]);
        m.diagonal[size_of(p * tokens_ + i)] = k.diagonal[size_of(i)];
      }
    }
    on_.upload(token.data(), static_cast<integer>(token.size()), memory_[at_.token]);
    on_.upload(removed.data(), static_cast<integer>(removed.size()), memory_[at_.removed]);
    on_.zero(memory_[at_.pairs], count() * count());
    on_.zero(memory_[at_.squares], count() * tokens_);
    on_.zero(memory_[at_.row_sums], count() * tokens_);
    for (integer row = 0; row < tokens_; row += at_.side)
      for (integer col = 0; col <= row; col += at_.side)
        add({row, std::min(at_.side, tokens_ - row), col, std::min(at_.side, tokens_ - col),
             at_.side},
            entries);
    m.squares.resize(m.diagonal.size());
    on_.download(memory_[at_.pairs], count() * count(), m.products.data());
    on_.download(memory_[at_.squares], count() * tokens_, m.squares.data());
    on_.download(memory_[at_.row_sums], count() * tokens_, m.row_sums.data());
    on_.wait();
    m.epsilon = static_cast<double>(std::numeric_limits<C>::epsilon()) / 2;
    deliver(kernels, m);
    return m;
  }

  /// Whether products of C may have lost entries that the moments do not tell of.
  bool lost() const { return lost_; }

 private:
  integer count() const { return static_cast<integer>(sites_.size()); }
  /// Columns that a group may look at: the mean of those that are not there is zero.
  static integer padded(integer cols) { return round_up(cols, integer{group::size} * group::held); }
  integer padded_tokens() const { return round_up(tokens_, at_.side); }
  static integer slice_columns(integer side) {
    integer columns = 1;
    while (2 * columns * side <= 4096 && side % (2 * columns) == 0) columns *= 2;
    return columns;
  }

  // ---- memory

  places reserve(arena& memory, integer side, bool sampled) const {
    places at{};
    integer const n = tokens_, s = count(), columns = slice_columns(side);
    integer const strips = ceil_div(side, integer{group::size});
    at.side = side;
    at.slice_columns = columns;
    at.totals = memory.reserve<double>(total_cols_);
    at.facts = memory.reserve<column_facts>(s * chunks_);
    at.sums = memory.reserve<double>(Device::column_slices * widest_);
    at.largest = memory.reserve<double>(Device::column_slices * chunks_);
    at.bad = memory.reserve<integer>(n);
    at.norms = memory.reserve<double>(s * n);
    at.kernel_rows = memory.reserve<double>(s * n);
    at.squares = memory.reserve<double>(s * n);
    at.row_sums = memory.reserve<double>(s * n);
    at.row_parts = memory.reserve<double>(2 * ceil_div(side, tile_columns) * side);
    at.col_parts = memory.reserve<double>(2 * strips * side);
    at.pairs = memory.reserve<double>(s * s);
    at.high = memory.reserve<C>(total_cols_);
    at.low = memory.reserve<C>(total_cols_);
    at.token = memory.reserve<C>(s * round_up(n, side));
    at.removed = memory.reserve<C>(s * round_up(n, side));
    integer const widest_side =  // the rows' panel holds the sample, too
        sampled ? std::max(side, sample_side()) : side;
    at.rows = memory.reserve<C>(widest_side * depth_);
    at.cols = memory.reserve<C>(side * depth_);
    at.tiles = memory.reserve<C>(s * side * side);
    at.slices = memory.reserve<C>(side / columns * s * s);
    at.sample = memory.reserve<C>(sampled ? sample_side() * sample_side() : 0);
    return at;
  }

  integer sample_side() const {
    return round_up(sample_size(tokens_), Device::template side_multiple<C>);
  }

  void choose_side(char const* where, std::size_t memory_bound, bool sampled) {
    constexpr integer multiple = Device::template side_multiple<C>;
    for (integer cuts = 1;; ++cuts) {
      integer const side = round_up(ceil_div(tokens_, cuts), multiple);
      arena trial = memory_;
      places const at = reserve(trial, side, sampled);
      if (side <= round_up(most_rows(), multiple) && side <= Device::most_side &&
          trial.bytes() <= memory_bound) {
        memory_ = trial;
        at_ = at;
        return;
      }
      if (side == multiple)
        reject(where, "a memory bound of " + std::to_string(memory_bound) + " bytes is below the " +
                          std::to_string(trial.bytes()) + " bytes of the smallest tile");
    }
  }

  integer most_rows() const {
    integer most = tokens_;
    std::apply(
        [&](auto const&... source) { ((most = std::min(most, source.most_rows(tokens_))), ...); },
        sources_);
    return most;
  }

  // ---- preparation

  template <class F>
  void with_source(integer p, F const& f) {
    auto const visit = [&](auto& source) {
      if (p >= 0 && p < source.sites()) f(source, p);
      p -= source.sites();
    };
    std::apply([&](auto&... source) { (visit(source), ...); }, sources_);
  }

  /// f(rows, first, count) over all tokens of a site, in as many parts as its source needs.
  template <class F>
  void each_part(integer p, F const& f) {
    with_source(p, [&](auto& source, integer local) {
      integer const most = source.most_rows(tokens_);
      for (integer first = 0; first < tokens_; first += most) {
        integer const count = std::min(most, tokens_ - first);
        f(source.rows(local, first, count), first, count);
        source.release();
      }
    });
  }

  void add_columns(integer p) {
    site_facts const& s = sites_[size_of(p)];
    integer const chunks = ceil_div(s.cols, integer{group::size});
    on_.zero(memory_[at_.totals] + s.first_col, padded(s.cols));
    column_facts* const facts = memory_[at_.facts] + p * chunks_;
    std::vector<column_facts> const none(size_of(chunks_), {0, true});
    on_.upload(none.data(), chunks_, facts);
    each_part(p, [&]<class T>(token_rows<T> const& x, integer, integer rows) {
      integer const slice = round_up(ceil_div(rows, Device::column_slices), 4);
      integer const slices = ceil_div(rows, slice);
      on_.each_group(slices * chunks, sum_columns<T, C>{x, rows, slice, s.pre, memory_[at_.sums],
                                                        memory_[at_.largest]});
      on_.each_group(chunks,
                     fold_columns{s.cols, slices, chunks, memory_[at_.sums], memory_[at_.largest],
                                  memory_[at_.totals] + s.first_col, facts});
    });
  }

  /// Reads back what is known of the columns; returns whether all their sums are finite.
  std::vector<bool> read_facts() {
    std::vector<column_facts> facts(size_of(count() * chunks_));
    on_.download(memory_[at_.facts], static_cast<integer>(facts.size()), facts.data());
    on_.wait();
    std::vector<bool> finite(sites_.size(), true);
    for (std::size_t i = 0; i < facts.size(); ++i) {
      std::size_t const p = i / size_of(chunks_);
      sites_[p].largest = std::max(sites_[p].largest, facts[i].largest);
      finite[p] = finite[p] && facts[i].finite;
    }
    return finite;
  }

  position first_bad(integer p) {
    position out;
    std::vector<integer> bad(size_of(tokens_));
    each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
      on_.each_group(rows, find_bad<T>{x, memory_[at_.bad] + first});
    });
    on_.download(memory_[at_.bad], tokens_, bad.data());
    on_.wait();
    for (integer t = 0; t < tokens_ && !out.found(); ++t)
      if (bad[size_of(t)] >= 0) out = {t, bad[size_of(t)]};
    return out;
  }

  centring<C> centre(integer p) const {
    site_facts const& s = sites_[size_of(p)];
    return {static_cast<C>(s.scale), memory_[at_.high] + s.first_col,
            memory_[at_.low] + s.first_col};
  }

  void write_means(integer p) {
    site_facts const& s = sites_[size_of(p)];
    on_.each_index(padded(s.cols),
                   set_means<C>{memory_[at_.totals] + s.first_col,
                                s.scale / s.pre / static_cast<double>(tokens_),
                                memory_[at_.high] + s.first_col, memory_[at_.low] + s.first_col});
  }

  /// Column sums of centred values, of the tokens whose norms are at most `limit`, into totals.
  void sum_columns_of(integer p, double limit) {
    site_facts const& s = sites_[size_of(p)];
    double* const total = memory_[at_.totals] + s.first_col;
    on_.zero(total, padded(s.cols));
    each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
      integer const slice = round_up(ceil_div(rows, Device::column_slices), 4);
      integer const slices = ceil_div(rows, slice);
      on_.each_group(
          slices * ceil_div(s.cols, integer{group::size}),
          sum_centred<T, C>{x, rows, slice, centre(p), memory_[at_.norms] + p * tokens_ + first,
                            limit, memory_[at_.sums]});
      on_.each_index(s.cols, fold_sums{s.cols, slices, memory_[at_.sums], total});
    });
  }
  void move(integer p, double factor) {
    site_facts const& s = sites_[size_of(p)];
    on_.each_index(padded(s.cols), move_centres<C>{memory_[at_.totals] + s.first_col, factor,
                                                   memory_[at_.high] + s.first_col,
                                                   memory_[at_.low] + s.first_col});
  }
  void measure_norms(integer p) {
    each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
      on_.each_group(rows,
                     centred_norms<T, C>{x, centre(p), memory_[at_.norms] + p * tokens_ + first});
    });
  }
  void read_norms() {
    norms_.resize(size_of(count() * tokens_));
    kernel_rows_.resize(norms_.size());
    on_.download(memory_[at_.norms], static_cast<integer>(norms_.size()), norms_.data());
    on_.download(memory_[at_.kernel_rows], static_cast<integer>(norms_.size()),
                 kernel_rows_.data());
    on_.wait();
  }

  /// Centres sites with tokens far out at the mean of the closer ones; see centre_limit.
  void centre_among_closer() {
    bool any = false;
    std::vector<double> scratch;
    for (integer p = 0; p < count(); ++p) {
      site_facts& s = sites_[size_of(p)];
      auto const norms =
          std::span<double const>(norms_).subspan(size_of(p * tokens_), size_of(tokens_));
      double trace = 0, largest = 0;
      for (double const a : norms) trace += a, largest = std::max(largest, a);
      double const limit = centre_limit(norms, trace, largest, scratch);
      if (!(s.scale > 0) || constant(s, largest) || !is_finite(limit)) continue;
      double closer = 0;
      for (double const a : norms) closer += a <= limit;
      sum_columns_of(p, limit);
      move(p, 1 / closer);
      sum_columns_of(p, std::numeric_limits<double>::infinity());
      each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
        on_.each_group(rows,
                       centred_row_sums<T, C>{x, centre(p), memory_[at_.totals] + s.first_col,
                                              memory_[at_.kernel_rows] + p * tokens_ + first});
      });
      measure_norms(p);
      s.about_mean = false;
      any = true;
    }
    if (any) read_norms();
  }

  /// What the rounding of the means alone may leave is a constant site, not a signal.
  bool constant(site_facts const& s, double norm) const {
    double const rounding = rounding_of_means<C>(tokens_) * s.largest * s.scale;
    return norm <= rounding * rounding * static_cast<double>(s.cols);
  }

  void prepare() {
    for (integer p = 0; p < count(); ++p) add_columns(p);
    std::vector<bool> finite = read_facts();
    bool again = false;
    for (integer p = 0; p < count(); ++p) {
      if (finite[size_of(p)]) continue;
      sites_[size_of(p)].bad = first_bad(p);
      if (sites_[size_of(p)].bad.found()) continue;
      sites_[size_of(p)].pre = std::ldexp(1., -64);  // finite doubles whose sum is not
      add_columns(p);
      again = true;
    }
    if (again) read_facts();

    // A first scale, by which centred values are at most 2 or so: their norms are safe in C.
    on_.zero(memory_[at_.norms], count() * tokens_);
    for (integer p = 0; p < count(); ++p) {
      site_facts& s = sites_[size_of(p)];
      if (s.bad.found() || !(s.largest > 0)) continue;
      s.scale = power_of_two<C>(-std::ilogb(s.largest) - 1);
      write_means(p);
      if constexpr (std::same_as<C, double>) {  // what is left of the means goes, too
        sum_columns_of(p, std::numeric_limits<double>::infinity());
        move(p, 1 / static_cast<double>(tokens_));
      }
      measure_norms(p);
    }
    on_.zero(memory_[at_.kernel_rows], count() * tokens_);
    read_norms();
    centre_among_closer();
    for (integer p = 0; p < count(); ++p) rescale(p);
  }

  /// Chooses the scale that brings the largest norm to about 1, and tells what is constant.
  void rescale(integer p) {
    site_facts& s = sites_[size_of(p)];
    if (!(s.scale > 0)) return;
    auto const norms = norms_.begin() + p * tokens_;
    double const norm = *std::max_element(norms, norms + tokens_);
    if (constant(s, norm)) {
      std::fill(norms, norms + tokens_, 0.);
      s.scale = 0;
      return;
    }
    double const wanted = s.scale * std::ldexp(1., -std::ilogb(norm) / 2);
    double const most =
        power_of_two<C>(std::numeric_limits<C>::max_exponent - std::ilogb(s.largest));
    double const scale = std::max(std::min(std::min(wanted, most), power_of_two<C>(1 << 20)),
                                  power_of_two<C>(-(1 << 20)));
    double const change = scale / s.scale;
    s.scale = scale;
    for (integer i = 0; i < tokens_; ++i) {
      norms[i] *= change * change;
      kernel_rows_[size_of(p * tokens_ + i)] *= change * change;
    }
    on_.each_index(padded(s.cols),
                   scale_centres<C>{static_cast<C>(change), memory_[at_.high] + s.first_col,
                                    memory_[at_.low] + s.first_col});
  }

  // ---- the bandwidth

  std::vector<double> sigmas(rbf const& kernel) {
    if (!kernel.sigma.empty()) return kernel.sigma;
    std::vector<double> out;
    for (integer p = 0; p < count(); ++p)
      out.push_back(kernel.fraction * std::sqrt(median_distance(p, kernel.convention)) /
                    (sites_[size_of(p)].scale > 0 ? sites_[size_of(p)].scale : 1));
    return out;
  }

  /// Of scaled data.
  double median_distance(integer p, rbf::median convention) {
    site_facts const& s = sites_[size_of(p)];
    integer const m = sample_size(tokens_), side = sample_side();
    if (!(s.scale > 0)) return 0;
    with_source(p, [&](auto& source, integer local) {
      multiply(s, source.sample(local), m, centre(p), memory_[at_.rows], side, true,
               memory_[at_.sample]);
      source.release();
    });
    std::vector<C> products(size_of(side * side)), distances;
    on_.download(memory_[at_.sample], side * side, products.data());
    on_.wait();
    // Below this share of the norms a distance is rounding: copies of a token are at distance 0.
    double const rounding = (8 + std::sqrt(static_cast<double>(s.cols))) *
                            static_cast<double>(std::numeric_limits<C>::epsilon());
    auto const norm = [&](integer i) { return norms_[size_of(p * tokens_ + i * tokens_ / m)]; };
    for (integer j = 0; j < m; ++j)
      for (integer i = j + 1; i < m; ++i) {
        double const both = norm(i) + norm(j);
        double const distance = both - 2 * static_cast<double>(products[size_of(j * side + i)]);
        constexpr double limit = std::same_as<C, double> ? 4096 : 8;
        lost_ = lost_ || !(limit * distance > both);  // far closer to each other than to the centre
        distances.push_back(distance > rounding * both ? static_cast<C>(distance) : C(0));
      }
    return median(distances, m, convention);
  }

  // ---- tiles

  /// Inner products of some rows with themselves, panel after panel.
  template <class T>
  void multiply(site_facts const& s, token_rows<T> const& x, integer rows,
                centring<C> const& centre, C* panel, integer side, bool lower, C* out) {
    for (integer k = 0; k < s.cols; k += depth_) {
      on_.each_group(side, fill_panel<T, C>{x, rows, k, depth_, centre, panel});
      on_.product(panel, panel, side, depth_, k > 0, lower, out);
    }
  }

  void multiply(integer p, tile const& t, C* out) {
    site_facts const& s = sites_[size_of(p)];
    if (!(s.scale > 0)) return on_.zero(out, t.side * t.side);
    with_source(p, [&](auto& source, integer local) {
      auto const x = source.rows(local, t.row, t.rows);
      if (t.diagonal()) {
        multiply(s, x, t.rows, centre(p), memory_[at_.rows], t.side, true, out);
        return source.release();
      }
      auto const y = source.rows(local, t.col, t.cols);
      using fill = fill_panel<typename std::remove_reference_t<decltype(source)>::scalar, C>;
      for (integer k = 0; k < s.cols; k += depth_) {
        on_.each_group(t.side, fill{x, t.rows, k, depth_, centre(p), memory_[at_.rows]});
        on_.each_group(t.side, fill{y, t.cols, k, depth_, centre(p), memory_[at_.cols]});
        on_.product(memory_[at_.rows], memory_[at_.cols], t.side, depth_, k > 0, false, out);
      }
      source.release();
    });
  }

  template <class Entry>
  void add(tile const& t, std::vector<Entry> const& entries) {
    integer const area = t.side * t.side, blocks = ceil_div(t.side, tile_columns);
    integer const strips = ceil_div(t.side, integer{group::size});
    for (integer p = 0; p < count(); ++p) {
      C* const g = memory_[at_.tiles] + p * area;
      C const* const token = memory_[at_.token] + p * padded_tokens();
      C const* const removed = memory_[at_.removed] + p * padded_tokens();
      multiply(p, t, g);
      on_.each_group(strips * blocks,
                     finish_tile<Entry, C>{t, entries[size_of(p)], token + t.row, token + t.col,
                                           removed + t.row, removed + t.col, g,
                                           memory_[at_.row_parts], memory_[at_.col_parts]});
      on_.each_index(t.side, fold_tile<Entry::row_sums>{t, strips, blocks, memory_[at_.row_parts],
                                                        memory_[at_.col_parts],
                                                        memory_[at_.squares] + p * tokens_,
                                                        memory_[at_.row_sums] + p * tokens_});
    }
    integer const slice = at_.slice_columns * t.side;
    on_.pair_products(memory_[at_.tiles], count(), area, slice, memory_[at_.slices]);
    on_.each_index(count() * count(), fold_pairs<C>{memory_[at_.slices], area / slice,
                                                    count() * count(), memory_[at_.pairs]});
  }

  /// Both halves, in units of the data; NaN where the data are not finite.
  void deliver(std::vector<kernel_facts> const& entries, gram_moments& m) const {
    std::vector<double> unit(sites_.size());
    for (std::size_t p = 0; p < unit.size(); ++p) {
      site_facts const& s = sites_[p];
      if (std::abs(entries[p].exponent) > 200) m.exponent[p] = entries[p].exponent;
      unit[p] = s.bad.found() ? missing : std::ldexp(1., entries[p].exponent - m.exponent[p]);
      m.non_finite[p] = s.bad;
      if (!(s.scale > 0)) m.why[p] = status::constant_layer;
      if (s.bad.found()) m.why[p] = status::non_finite;
      if (m.why[p] == status::ok && !m.sigma.empty() && !(m.sigma[p] > 0))
        m.why[p] = status::zero_bandwidth;
      for (std::size_t i = p * size_of(tokens_); i < (p + 1) * size_of(tokens_); ++i) {
        m.row_sums[i] *= unit[p];
        m.diagonal[i] *= unit[p];
        m.squares[i] *= unit[p] * unit[p];
        m.square_sum[p] += m.squares[i];
      }
      m.entry_rounding[p] *= unit[p];
      m.sum_rounding[p] *= unit[p] * unit[p];
      for (std::size_t q = 0; q <= p; ++q) {
        double const product = 2 * m.products[p * unit.size() + q] * unit[p] * unit[q];
        m.products[p * unit.size() + q] = m.products[q * unit.size() + p] = product;
      }
    }
  }

  Device& on_;
  arena memory_;
  std::tuple<Sources...> sources_;
  integer tokens_, total_cols_ = 0, widest_ = 1, chunks_ = 1, depth_ = 1;
  std::vector<site_facts> sites_;
  std::vector<double> norms_, kernel_rows_;
  bool lost_ = false;
  places at_{};
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

inline void require_tiles(char const* where, rflow::gram_path path) {
  if (path == rflow::gram_path::feature)
    reject(where, "gram_path::feature is for on_cpu; here moments come from kernel matrices");
}

/// The Gram moments of the sites of several stacks. Products are in float unless a stack is double; where
/// rounding would be seen in a CKA, everything is done again in double.
/// @param  rounded  products are rounded on purpose (TF32): they stay as they are
/// @throws std::invalid_argument if the stacks differ in tokens, bandwidths in number from sites, or
///         the memory bound is below the smallest tile
template <class Device, class Kernel, class... T, class... Memory>
gram_moments gram(char const* where, Device& on, std::size_t memory_bound, bool rounded,
                  Kernel const& kernel, layer_stack<T, Memory> const&... stacks) {
  integer const tokens = std::get<0>(std::tie(stacks...)).size();
  integer sites = 0;
  auto const check = [&](auto const& stack) {
    sites += stack.sites();
    if (stack.size() != tokens)
      reject(where, "the stacks have " + std::to_string(tokens) + " and " +
                        std::to_string(stack.size()) + " tokens");
  };
  (check(stacks), ...);
  if (tokens == 0) return gram_moments(sites, 0);

  if constexpr (std::same_as<Kernel, rbf>)
    if (!kernel.sigma.empty() && static_cast<integer>(kernel.sigma.size()) != sites)
      reject(where, std::to_string(kernel.sigma.size()) + " bandwidths for " +
                        std::to_string(sites) + " sites");
  constexpr bool wide = (std::same_as<T, double> || ...);
  gram_moments m;
  bool lost = false;
  auto const run = [&]<class C>(C) {
    gram_pass<Device, C, source_of<Device, layer_stack<T, Memory>>...> pass(
        where, on, memory_bound, std::same_as<Kernel, rbf>, stacks...);
    if constexpr (std::same_as<Kernel, linear>) {
      m = pass(make_linear<C>{}, make_linear<C>{});
      if (tokens < 3)  // too few to U-centre: G = K, whose rows sum to 0
        for (std::size_t i = 0; i < m.diagonal.size(); ++i) m.row_sums[i] = -m.diagonal[i];
    } else {
      static_assert(std::same_as<Kernel, rbf>);
      m = pass(make_rbf<C>{}, make_rbf<C>{}, &kernel);
    }
    m.accuracy = wide ? wide_accuracy : narrow_accuracy;
    lost = pass.lost();
  };
  if constexpr (!wide) run(float{});
  if (wide || (!rounded && (lost || !m.resolved()))) run(double{});
  auto at = m.non_finite.begin();
  auto const in_the_data = [&](auto const& stack) {
    for (integer l = 0; l < stack.sites(); ++l, ++at)
      if (at->found()) at->token = stack.token(at->token);
  };
  (in_the_data(stacks), ...);
  return m;
}

}  // namespace rflow::detail::passes
