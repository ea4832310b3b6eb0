// SPDX-License-Identifier: Apache-2.0
#pragma once

// The oracle: random activations through the library and through the definitions in 32 digits
// (definitions.hpp), every answer with status ok within its ceiling, every status right.
//
//     rflow_oracle [--seed S] [--first K] [--cases N] [--case K] [--quantity Q] [--markdown] [--verbose]
//
// Case K of seed S depends on (S, K) alone, so a run can be cut into parts and a failure run by itself.
//
// The mix. Topics: flow 27 %, linear CKA 38 %, RBF 12 % (a polynomial one in places), minibatches 9 %, flow_monitor 6 %, probes
// 4 %, jackknife 4 %. Types: float 40 %, double 30 %, bf16 15 %, f16 15 %; CKA of two models also float with
// bf16. Tokens: 1 to 5 in 17 % of cases, 6 to 64 in 62 %, 65 to 511 in 9 %, 512 and more in 12.5 % (RBF: in
// 3 %). Features:
// 1 in 12 %, up to 6000 where tokens are few, up to 48 where they are many. Of the data, a quarter each has massive
// tokens (one to three, 10 to 10^7 times) and an offset (1 to 10^13 in double, to 10^5 in float); a fifth each
// is scaled (to 10^±300 in double, 10^±34 in float, where rows or sites may differ as much) and
// degenerate (constant, all alike but one, rank one, copies, zero rows, unit vectors, …). One in five
// has tokens masked out that hold NaN, infinity or anything; layouts are row-major, column-major, padded,
// reversed along either axis, interleaved and broadcast.
//
// A CKA is well-conditioned where a Gram path in double could give it: where 16 ε ‖E‖ / ‖U‖ is within the ceiling
// for both sites, with ε = 2^−53 and E_ij what products of centred rows leave of an entry. For the linear kernel
// that is ‖x_i‖ ‖x_j‖, and ‖E‖ is tr(HKH); for RBF k (1 + (‖x_i‖² + ‖x_j‖²)/2σ²) + 1; for a kernel of
// one's own ‖E‖ is tr K. Biased CKA: the same with HKH for U. Elsewhere it may have a status. Where U is 0 to
// the 29th digit there is no value, and it must have one.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <rflow/cka.hpp>
#include <rflow/cosine.hpp>
#include <rflow/flow.hpp>
#include <rflow/jackknife.hpp>
#include <rflow/monitor.hpp>
#include <rflow/probe.hpp>

#include "cases.hpp"
#include "record.hpp"

namespace oracle {

template <class T>
inline constexpr bool wide = std::same_as<T, double>;
template <class T>
inline constexpr double cka_ceiling = wide<T> ? 1e-10 : 1e-5;
template <class T>
inline constexpr double flow_ceiling = wide<T> ? 1e-12 : 1e-5;

inline std::string at(std::size_t i) { return "[" + std::to_string(i) + "]"; }
inline std::string at(std::size_t i, std::size_t j) {
  return "[" + std::to_string(i) + "," + std::to_string(j) + "]";
}

// ---- data in memory -----------------------------------------------------------------------------

template <class T>
T exactly(double x) {
  if constexpr (std::same_as<T, rflow::f16> || std::same_as<T, rflow::bf16>)
    return T::nearest(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

/// A model as the library gets it: in some layout, perhaps among tokens that are masked out.
template <class T>
class placed {
 public:
  std::vector<rflow::view<T>> views;
  std::vector<char> keep;           // one a row of the views
  std::vector<std::size_t> bounds;  // of sequences, among the tokens that count
  std::string text;

  placed(chance_source& r, model const& m, bool may_mask, bool may_cut) {
    std::size_t const n = m.sites[0].n;
    bool const masked = may_mask && r.happens(0.2);
    for (std::size_t i = 0; i < n; ++i) {
      while (masked && r.happens(0.25)) keep.push_back(0);
      keep.push_back(1);
    }
    while (masked && r.happens(0.25)) keep.push_back(0);
    if (masked) text += ", masked";
    bool const same = r.happens(0.6);
    std::size_t kind = r.below(10);
    for (std::size_t l = 0; l < m.sites.size(); ++l) {
      if (!same) kind = r.below(10);
      place(r, m.sites[l], kind);
      if (l == 0) text += same ? ", layout " + std::to_string(kind) : ", mixed layouts";
    }
    bounds = {0, n};
    if (!may_cut || !r.happens(0.4)) return;
    text += ", sequences";
    offsets_.push_back(0);
    bounds = {0};
    std::size_t const longest = 1 + r.below(n);
    for (std::size_t a = 0, kept = 0; a < keep.size();) {
      std::size_t const end = r.happens(0.1) ? a : std::min(keep.size(), a + 1 + r.below(longest));
      for (; a < end; ++a) kept += static_cast<std::size_t>(keep[a]);
      offsets_.push_back(static_cast<std::ptrdiff_t>(end));
      bounds.push_back(kept);
    }
  }
  placed(placed const&) = delete;

  bool masked() const { return std::count(keep.begin(), keep.end(), 0) > 0; }
  rflow::layer_stack<T> stack() const {
    rflow::layer_stack<T> out(views);
    if (masked()) out = out.tokens(keep);
    if (!offsets_.empty()) out = out.sequences(offsets_);
    return out;
  }
  std::vector<std::ptrdiff_t> const& offsets() const { return offsets_; }
  /// Spoils one value of a token that counts.
  void spoil(chance_source& r, std::size_t site) {
    auto const& v = views[site];
    std::size_t row = 0;
    for (std::size_t left =
             1 + r.below(static_cast<std::size_t>(std::count(keep.begin(), keep.end(), 1)));
         row < keep.size(); ++row)
      if (keep[row] != 0 && --left == 0) break;
    auto const feature = static_cast<std::ptrdiff_t>(r.below(static_cast<std::size_t>(v.cols)));
    double const bad = r.happens(0.5) ? std::numeric_limits<double>::quiet_NaN()
                                      : -std::numeric_limits<double>::infinity();
    std::ptrdiff_t const at = &v(static_cast<std::ptrdiff_t>(row), feature) - buffers_[site].data();
    buffers_[site][static_cast<std::size_t>(at)] = exactly<T>(bad);
    text += ", site " + std::to_string(site) + " spoilt";
  }
  /// The same tokens as several stacks.
  std::vector<rflow::layer_stack<T>> cut(chance_source& r) const {
    std::vector<rflow::layer_stack<T>> out;
    auto const all = static_cast<std::ptrdiff_t>(keep.size());
    for (std::ptrdiff_t a = 0; a < all;) {
      std::ptrdiff_t const b =
          std::min(all, a + 1 + static_cast<std::ptrdiff_t>(r.below(keep.size())));
      std::vector<rflow::view<T>> part;
      for (auto const& v : views)
        part.emplace_back(v.data + a * v.row_stride, b - a, v.cols, v.row_stride, v.col_stride);
      out.emplace_back(part);
      if (masked())
        out.back() = out.back().tokens(std::vector<char>(keep.begin() + a, keep.begin() + b));
      a = b;
    }
    return out;
  }

 private:
  void place(chance_source& r, site const& s, std::size_t kind) {
    auto const n = static_cast<std::ptrdiff_t>(keep.size()), d = static_cast<std::ptrdiff_t>(s.d);
    std::ptrdiff_t rows = d, cols = 1;
    switch (kind) {
      case 0:
      case 1:
      case 2: break;
      case 3: rows = 1, cols = n; break;
      case 4: rows = d + r.of<std::ptrdiff_t>({1, 3, 8}); break;
      case 5: rows = 2 * d, cols = 2; break;
      case 6: rows = -d; break;
      case 7: cols = -1; break;
      case 8: rows = -1, cols = -n; break;
      default: rows = alike_rows(s) ? 0 : 3 * d, cols = rows != 0 && alike_cols(s) ? 0 : 1;
    }
    if (rows == 0 && n != static_cast<std::ptrdiff_t>(s.n)) rows = d;
    if (cols == 0 && n != static_cast<std::ptrdiff_t>(s.n)) cols = 1;
    std::ptrdiff_t const base = (rows < 0 ? -rows * (n - 1) : 0) +
                                (cols < 0 ? -cols * (d - 1) : 0) +
                                static_cast<std::ptrdiff_t>(r.below(4));
    std::ptrdiff_t const span = std::abs(rows) * (n - 1) + std::abs(cols) * (d - 1) + 1;
    T const nothing = exactly<T>(std::numeric_limits<double>::quiet_NaN());
    buffers_.emplace_back(static_cast<std::size_t>(base + span + 3), nothing);
    T* const data = buffers_.back().data() + base;
    double const junk[] = {std::numeric_limits<double>::quiet_NaN(),
                           std::numeric_limits<double>::infinity(), 3e4, 0};
    for (std::ptrdiff_t i = 0, k = 0; i < n; ++i) {
      bool const counts = keep[static_cast<std::size_t>(i)] != 0;
      double const other = counts ? 0 : junk[r.below(4)];
      for (std::ptrdiff_t j = 0; j < d; ++j)
        data[i * rows + j * cols] =
            exactly<T>(counts ? s.x[static_cast<std::size_t>(k * d + j)] : other);
      k += counts;
    }
    views.emplace_back(data, n, d, rows, cols);
  }
  static bool alike_rows(site const& s) {
    for (std::size_t i = s.d; i < s.x.size(); ++i)
      if (s.x[i] != s.x[i - s.d]) return false;
    return true;
  }
  static bool alike_cols(site const& s) {
    for (std::size_t i = 0; i < s.x.size(); ++i)
      if (s.x[i] != s.x[i / s.d * s.d]) return false;
    return true;
  }

  std::vector<std::vector<T>> buffers_;
  std::vector<std::ptrdiff_t> offsets_;
};

// ---- the comparison -----------------------------------------------------------------------------

inline statuses site_statuses(alignment const& a, bool debiased, std::size_t p, double ceiling,
                              bool zero_bandwidth, bool by_fraction) {
  if (a.n < (debiased ? 4u : 2u)) return bit(status::too_few_rows);
  statuses const none =
      bit(status::constant_layer) | ill | (by_fraction ? bit(status::zero_bandwidth) : 0);
  if (zero_bandwidth) return bit(status::zero_bandwidth) | bit(status::constant_layer);
  twofold const self = a.at(debiased ? a.debiased : a.biased, p, p);
  if (!(self.hi > a.debiased_noise[p])) return none;
  double const error = debiased ? a.gram_error[p] : a.biased_gram_error[p];
  return 16 * error <= ceiling ? ok : ok | none;
}
/// Of a cell: a value only where both sites have one.
inline statuses cell_statuses(statuses a, statuses b) {
  statuses const both = a & b & ok;
  return both | ((a | b) & ~ok);
}

/// A kernel of one's own.
struct polynomial {
  double by;
  double operator()(double xy, double, double) const { return (1 + by * xy) * (1 + by * xy); }
};

/// @tparam any_pair  whether the backend takes two stacks of any type and kernels of any kind
template <class On, bool any_pair = true>
class comparison {
 public:
  record& log;
  bool in_shares = false;
  std::string only;  // one topic, or all

  explicit comparison(record& r) : log(r) {}

  void run(std::uint64_t seed, std::uint64_t k) {
    chance_source r(seed, k);
    double const u = r.uniform();
    std::string topic = u < 0.27   ? "flow"
                        : u < 0.65 ? "linear"
                        : u < 0.77 ? "rbf"
                        : u < 0.86 ? "minibatch"
                        : u < 0.92 ? "monitor"
                        : u < 0.96 ? "probe"
                                   : "jackknife";
    if (topic == "monitor" && !has_monitor) topic = "minibatch";
    if (topic == "probe" && !rflow::softmax_backend_for<On, rflow::host_memory>) topic = "flow";
    if (!only.empty() && only != topic) return;
    log.begin(k);
    ++log.topics[topic];
    topic_ = topic;
    double const v = r.uniform();
    if (v < 0.40)
      by_type<float>(r);
    else if (v < 0.70)
      by_type<double>(r);
    else if (v < 0.85)
      by_type<rflow::bf16>(r);
    else
      by_type<rflow::f16>(r);
    log.end();
  }

 private:
  static constexpr bool has_monitor = requires { typename On::template chain_stream<float>; };
  std::string topic_;

  template <class T>
  void by_type(chance_source& r) {
    log.type = name_of(dtype_of<T>);
    log.story.clear();
    log.condition = "plain";
    log.large = false;
    try {
      if (topic_ == "flow")
        flow<T>(r);
      else if (topic_ == "linear")
        linear<T>(r);
      else if (topic_ == "rbf")
        rbf<T>(r);
      else if (topic_ == "minibatch")
        minibatch<T>(r);
      else if (topic_ == "monitor")
        monitor<T>(r);
      else if (topic_ == "probe")
        probe<T>(r);
      else
        jackknife<T>(r);
    } catch (std::exception const& error) {
      log.require("no exception", false, topic_, error.what());
    }
  }

  // ---- what a case is made of

  On draw_backend(chance_source& r) {
    On on;
    std::string text;
    int const threads = r.happens(0.85) ? 1 : r.of({2, 3, 5});
    auto const path = r.of({rflow::gram_path::automatic, rflow::gram_path::automatic,
                            rflow::gram_path::gram, rflow::gram_path::feature});
    bool const tight = r.happens(0.1);
    if constexpr (requires { on.threads; })
      on.threads = threads, text += std::to_string(threads) + " threads";
    if constexpr (requires { on.path; }) {
      on.path = path;
      text += path == rflow::gram_path::gram      ? ", path gram"
              : path == rflow::gram_path::feature ? ", path feature"
                                                  : "";
    }
    if (tight) on.memory_bound = std::size_t{16} << 20;
    log.story += text;
    return on;
  }
  template <class T>
  model draw(chance_source& r, std::size_t n, std::size_t sites, bool chain, cause const& shared,
             bool extreme = true) {
    recipe by{dtype_of<T>, n, {}, chain, extreme};
    std::size_t const d = draw_width(r, n);
    bool const same = chain || r.happens(0.6);
    for (std::size_t l = 0; l < sites; ++l) by.widths.push_back(same ? d : draw_width(r, n));
    model out = draw_model(r, by, shared);
    log.large = n >= 512;
    log.story += "; " + std::string(name_of(dtype_of<T>)) + ", " + std::to_string(sites) +
                 " sites, " + std::to_string(n) + " x " + std::to_string(by.widths[0]);
    for (std::size_t l = 1; l < sites && !same; ++l)
      log.story += "," + std::to_string(by.widths[l]);
    if (!out.text.empty()) log.story += ", " + out.text;
    log.condition = out.odd.name();
    return out;
  }
  void join(model& a, model const& b) {
    a.odd.massive |= b.odd.massive, a.odd.offset |= b.odd.offset;
    a.odd.scale |= b.odd.scale, a.odd.degenerate |= b.odd.degenerate;
    log.condition = a.odd.name();
  }

  // ---- flow

  struct range {
    bool double_only;
    bool outside(double log2_square) const {
      return double_only && log2_square > -1e8 && (log2_square > 960 || log2_square < -960);
    }
  };

  static number times(number a, number b) {
    return {a.mantissa * b.mantissa, a.exponent + b.exponent};
  }
  static number over(number a, double b) { return {a.mantissa / b, a.exponent}; }
  static number root(number a) {
    if (a.exponent % 2 != 0) a.mantissa *= 2, a.exponent -= 1;
    return {std::sqrt(a.mantissa), a.exponent / 2};
  }

  template <class T>
  void check_flow(rflow::flow_report const& got, std::vector<site> const& sites,
                  flow_result const& want, rflow::normalization by, bool per_token,
                  std::size_t spoilt = ~std::size_t{0}) {
    constexpr double ceiling = flow_ceiling<T>;
    range const span{wide<T>};
    std::size_t const s = sites.size(), n = sites[0].n, d = sites[0].d;
    auto const count = static_cast<double>(n);
    std::vector<bool> rows_out(s), square_out(s);
    bool tiny = wide<T>, huge = false, all_zero = true;
    for (std::size_t l = 0; l < s; ++l) {
      rows_out[l] = want.zero_rows[l] < n &&
                    (span.outside(want.least_row[l]) || span.outside(want.greatest_row[l]));
      square_out[l] = span.outside(want.squares[l].log2());
      tiny = tiny && want.squares[l].log2() < -960;
      huge = huge || (square_out[l] && want.squares[l].log2() > 0);
      all_zero = all_zero && want.zero_rows[l] == n;
    }
    statuses const off = bit(status::out_of_range);
    if (spoilt < s) {  // one site has no value, and spoils what it takes part in alone
      statuses const none = bit(status::non_finite);
      for (std::size_t l = 0; l < s; ++l) {
        bool const here = l == spoilt, next = here || l + 1 == spoilt;
        if (here)
          log.check("inter-token", got.inter_token[l], 0, 1, ceiling, none, at(l));
        else if (want.pairs[l] > 0 && !rows_out[l])
          log.check("inter-token", got.inter_token[l], want.inter_token[l], 1, ceiling, ok, at(l));
        if (here) log.check("rms norm", got.rms_norm[l], 0, 1, ceiling, none, at(l));
        if (l + 1 == s) continue;
        if (next) {
          log.check("adjacent", got.adjacent[l].mean, 0, 1, ceiling, none, at(l));
          log.check("step", got.variance.steps[l], 0, 1, ceiling, none, at(l));
        } else if (want.adjacent_count[l] > 0 && !rows_out[l] && !rows_out[l + 1]) {
          log.check("adjacent", got.adjacent[l].mean, want.adjacent[l], 1, ceiling, ok, at(l));
        }
      }
      log.check("St2", got.variance.st2, 0, 1, ceiling, none, "");
      if (s > 1) log.check("St1", got.variance.st1, 0, 1, ceiling, none, "");
      return;
    }
    for (std::size_t l = 0; l < s; ++l) {
      std::string const where = at(l);
      statuses allowed = want.pairs[l] > 0 ? ok
                         : n < 2 || want.zero_rows[l] == 0
                             ? bit(status::too_few_rows)
                             : bit(status::zero_rows) | bit(status::too_few_rows);
      if (rows_out[l]) allowed |= off;
      log.check("inter-token", got.inter_token[l], want.inter_token[l], 1, ceiling, allowed, where);
      log.require("zero rows", got.zero_rows[l] == static_cast<std::ptrdiff_t>(want.zero_rows[l]),
                  where,
                  std::to_string(got.zero_rows[l]) + " for " + std::to_string(want.zero_rows[l]));
      rflow::running_stat const& seq = got.per_sequence[l];
      if (!rows_out[l]) {
        log.require("per sequence", seq.count == want.sequence_count[l], where, "another count");
        if (seq.count > 0 && seq.count == want.sequence_count[l]) {
          log.check("per sequence", seq.mean, want.sequence_mean[l], 1, ceiling, ok, where);
          log.check("per sequence", seq.stddev(), want.sequence_stddev[l], 1, 2 * ceiling, ok,
                    where + " stddev");
        }
      } else {
        log.require(
            "per sequence",
            seq.count == 0 || (std::isfinite(seq.mean) && std::abs(seq.mean) <= 1 + ceiling &&
                               (seq.count != want.sequence_count[l] ||
                                std::abs(seq.mean - want.sequence_mean[l]) <= ceiling)),
            where, "counts what is out of range: mean " + std::to_string(seq.mean));
      }
      number const rms = root(over(want.squares[l], count));
      double const rms_value = want.squares[l].mantissa == 0 ? 0 : rms.value();
      log.check("rms norm", got.rms_norm[l], rms_value, rms_value, ceiling,
                ok | (square_out[l] ? off : 0), where);
      if (per_token)
        for (std::size_t i = 0; i < n; ++i) {
          if (span.outside(2 * want.norms[l][i].log2())) continue;
          double const norm = want.norms[l][i].value();
          log.check("norm of a token", got.norms[l][i], norm, norm, ceiling, ok, at(l, i));
        }
      if (l + 1 == s) continue;
      auto const& adjacent = got.adjacent[l];
      bool const out = rows_out[l] || rows_out[l + 1];
      allowed = want.adjacent_count[l] > 0 ? ok : bit(status::zero_rows);
      if (out) allowed |= off;
      log.check("adjacent", adjacent.mean, want.adjacent[l], 1, ceiling, allowed, where);
      log.check("adjacent stddev", adjacent.stddev, want.adjacent_stddev[l], 1, 2 * ceiling,
                allowed, where);
      if (!out)
        log.require("adjacent",
                    adjacent.left_out == static_cast<std::ptrdiff_t>(n) -
                                             static_cast<std::ptrdiff_t>(want.adjacent_count[l]),
                    where, "left out " + std::to_string(adjacent.left_out));
      if (per_token)
        for (std::size_t i = 0; i < n; ++i) {
          double const c = want.cosines[l][i], mine = adjacent.per_token[i];
          bool const far = span.outside(2 * want.norms[l][i].log2()) ||
                           span.outside(2 * want.norms[l + 1][i].log2());
          if (std::isnan(c))
            log.require("adjacent of a token", std::isnan(mine), at(l, i), "a value of a zero row");
          else if (!(far && std::isnan(mine)))
            log.check("adjacent of a token", mine, c, 1, ceiling, ok, at(l, i));
        }
    }

    // Squares, under a normalisation.
    number factor{1, 0};
    auto const sites_count = static_cast<double>(s);
    if (by == rflow::normalization::per_token) factor = {1 / count, 0};
    if (by == rflow::normalization::per_element) factor = {1 / (count * static_cast<double>(d)), 0};
    if (by == rflow::normalization::relative && !all_zero) {
      int top = -1000000;
      for (number const& q : want.squares)
        if (q.mantissa != 0) top = std::max(top, q.exponent);
      double total = 0;
      for (number const& q : want.squares)
        if (q.mantissa != 0) total += std::ldexp(q.mantissa, q.exponent - top);
      factor = {sites_count / total, -top};
    }
    rflow::layer_variance const& v = got.variance;
    statuses common = 0;
    if (tiny || huge) common |= off;
    if (by == rflow::normalization::relative && all_zero) common |= bit(status::zero_rows);
    statuses const unless = by == rflow::normalization::relative && all_zero ? 0 : ok;
    auto const length_check = [&](char const* quantity, measured const& m, number square,
                                  bool squared, std::string const& where) {
      number const scaled = times(square, factor);
      double const value = square.mantissa == 0 ? 0
                           : squared            ? scaled.value()
                                                : root(scaled).value();
      bool const out = span.outside(square.log2()) || span.outside(scaled.log2());
      log.check(quantity, m, value, value > 0 ? value : 1, ceiling,
                unless | common | (out ? off : 0), where);
    };
    if (s < 2) {
      for (measured const* m : {&v.st1, &v.path_energy, &v.path_length})
        log.check("St1", *m, 0, 1, ceiling, bit(status::too_few_sites), "one site");
      return;
    }
    length_check("path energy", v.path_energy, want.energy, true, "");
    length_check("St1", v.st1, over(want.energy, sites_count - 1), false, "");
    length_check("St2", v.st2, over(want.spread, sites_count), false, "");
    {
      number const square = times(want.length, want.length);
      length_check("path length", v.path_length, square, false, "");
    }
    for (std::size_t l = 0; l + 1 < s; ++l)
      length_check("step", v.steps[l], want.steps[l], false, at(l));
    for (std::size_t l = 0; l + 2 < s; ++l) {
      bool const none = std::isnan(want.curvature[l]);
      bool const out = span.outside(want.steps[l].log2()) || span.outside(want.steps[l + 1].log2());
      statuses const allowed =
          (none ? bit(status::zero_step) : ok) | (out ? off : 0) | (common & off);
      log.check("curvature", v.curvature[l], want.curvature[l], 1, none ? 1 : ceiling, allowed,
                at(l));
    }
    if (v.path_energy.ok()) {
      double smallest = 0, largest = 0;
      path_eigenvalues(s, smallest, largest);
      number const energy = times(want.energy, factor);
      double const low = want.energy.mantissa == 0 ? 0 : over(energy, largest).value();
      double const high = want.energy.mantissa == 0 ? 0 : over(energy, smallest).value();
      log.check("Poincare bounds", got.spread_bounds.lower, low, low > 0 ? low : 1, ceiling, ok,
                "lower");
      if (std::isfinite(high))
        log.check("Poincare bounds", got.spread_bounds.upper, high, high > 0 ? high : 1, ceiling,
                  ok, "upper");
    }
  }

  static rflow::normalization draw_normalization(chance_source& r) {
    return r.of({rflow::normalization::none, rflow::normalization::none,
                 rflow::normalization::per_token, rflow::normalization::per_element,
                 rflow::normalization::relative});
  }

  template <class T>
  void flow(chance_source& r) {
    On const on = draw_backend(r);
    std::size_t const n = draw_tokens(r);
    std::size_t const sites = r.happens(0.05) ? r.from(7, 33) : r.from(1, n >= 512 ? 3 : 6);
    model const m = draw<T>(r, n, sites, true, draw_cause(r, n));
    bool const whole = r.happens(0.9);
    placed<T> p(r, m, whole, whole);
    std::size_t spoilt = ~std::size_t{0};
    if ((whole || sites < 2) && r.happens(0.03)) p.spoil(r, spoilt = r.below(sites));
    log.story += p.text;
    flow_result const want = flow_by_definition(m.sites, p.bounds);
    if (whole || sites < 2) {
      rflow::flow_options const options{.normalize = draw_normalization(r),
                                        .per_token = r.happens(0.5)};
      log.story += ", normalised by " + std::string(to_string(options.normalize));
      check_flow<T>(rflow::flow(p.stack(), options, on), m.sites, want, options.normalize,
                    options.per_token, spoilt);
      return;
    }
    // The functions of one layer and of a pair.
    constexpr double ceiling = flow_ceiling<T>;
    log.story += ", by themselves";
    range const span{wide<T>};
    auto const out = [&](std::size_t l) {
      return want.zero_rows[l] < n &&
             (span.outside(want.least_row[l]) || span.outside(want.greatest_row[l]));
    };
    statuses allowed = want.pairs[0] > 0 ? ok
                       : n < 2           ? bit(status::too_few_rows)
                                         : bit(status::zero_rows);
    log.check("inter-token", rflow::inter_token_cosine(p.views[0], on), want.inter_token[0], 1,
              ceiling, allowed | (out(0) ? bit(status::out_of_range) : 0), "");
    auto const pair = rflow::adjacent_cosine(p.views[0], p.views[1], on);
    allowed = want.adjacent_count[0] > 0 ? ok : bit(status::zero_rows);
    log.check("adjacent", pair.mean, want.adjacent[0], 1, ceiling,
              allowed | (out(0) || out(1) ? bit(status::out_of_range) : 0), "");
  }

  // ---- CKA

  struct expected_cka {
    alignment a;
    std::vector<bool> zero_bandwidth;
    bool by_fraction = false;
    std::size_t spoilt = ~std::size_t{0};  // a site with a NaN or an infinity
  };

  static expected_cka by_linear(std::vector<site> const& sites) {
    return {linear_alignment(sites), std::vector<bool>(sites.size())};
  }

  void check_table(rflow::cka_table const& table, expected_cka const& want, bool debiased,
                   double ceiling, std::size_t rows, std::size_t first_col, char const* quantity) {
    alignment const& a = want.a;
    std::size_t const cols = first_col == 0 ? rows : a.sites - first_col;
    std::vector<statuses> by_site;
    for (std::size_t p = 0; p < a.sites; ++p)
      by_site.push_back(p == want.spoilt ? bit(status::non_finite)
                                         : site_statuses(a, debiased, p, ceiling,
                                                         want.zero_bandwidth[p], want.by_fraction));
    auto const& hsic = debiased ? a.debiased : a.biased;
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t j = 0; j < cols; ++j) {
        std::size_t const q = first_col + j;
        auto const x = static_cast<std::ptrdiff_t>(i), y = static_cast<std::ptrdiff_t>(j);
        statuses const allowed = cell_statuses(by_site[i], by_site[q]) | (in_shares ? ill : 0);
        double const value = (allowed & ok) == 0 ? missing() : i == q ? 1 : a.cka(hsic, i, q);
        log.check(quantity, table(x, y), value, 1, ceiling, allowed, at(i, j));
        double const chance = (allowed & ok) == 0 ? missing() : debiased ? 0 : a.chance(i, q);
        log.check("chance", table.chance(x, y), chance, 1, ceiling, allowed, at(i, j));
        if (first_col == 0 && j > i)
          log.require(quantity,
                      table.status(y, x) == table.status(x, y) &&
                          (!table(x, y).ok() || table(x, y).value == table(y, x).value),
                      at(i, j), "not symmetric");
      }
  }

  /// The token that pairs with the others make up most of K̃.
  void check_top(rflow::cka_table const& table, expected_cka const& want, double ceiling,
                 std::size_t rows, std::vector<site> const& features = {}) {
    alignment const& a = want.a;
    for (std::size_t p = 0; p < rows; ++p) {
      auto const row = static_cast<std::ptrdiff_t>(p);
      double const* const share = a.share.data() + p * a.n;
      double most = a.n > 0 ? *std::max_element(share, share + a.n) : missing();
      auto const found = table.top_token(row);
      // The path over features looks at the tokens furthest out: enough where one holds much.
      if (!features.empty() && found >= 0 && static_cast<std::size_t>(found) < a.n &&
          most <= 0.25 + 8 * static_cast<double>(features[p].d) / static_cast<double>(a.n))
        most = share[found];
      statuses allowed = ok;
      if (p == want.spoilt)
        allowed = bit(status::non_finite);
      else if (a.n < 2)
        allowed = bit(status::too_few_rows);
      else if (want.zero_bandwidth[p])
        allowed = bit(status::zero_bandwidth) | bit(status::constant_layer);
      else if (!(a.off_diagonal[p] > 0))
        allowed = bit(status::constant_layer);
      else if (!(a.at(a.biased, p, p).hi > a.debiased_noise[p]))
        allowed |= bit(status::constant_layer);  // equal tokens, whose RBF kernel is all ones
      else if (!(16 * a.share_error[p] <= ceiling))
        allowed |= bit(status::constant_layer) | ill;
      log.check("top token", table.top_token_share(row), most, 1, ceiling, allowed, at(p));
      if (!table.top_token_share(row).ok() || (allowed & ok) == 0) continue;
      auto const token = table.top_token(row);
      log.require(
          "top token",
          token >= 0 && static_cast<std::size_t>(token) < a.n && share[token] >= most - ceiling,
          at(p), "token " + std::to_string(token) + " is another");
    }
  }

  static double missing() { return std::numeric_limits<double>::quiet_NaN(); }

  /// As one call, of several stacks, or in shares.
  template <class T>
  rflow::gram_moments gram_of(chance_source& r, On on, placed<T> const& p) {
    double const u = r.uniform();
    in_shares = false;
    if constexpr (requires { on.share; }) {
      if (u < 0.08) {
        log.story += ", in several stacks";
        return on.gram(rflow::linear{}, p.cut(r));
      }
      if (u < 0.16) {
        log.story += ", in shares";
        in_shares = true;  // products stay in float, whatever the sums show
        int const shares = r.of({2, 3, 5});
        on.share = {0, shares};
        rflow::gram_moments out = on.gram(rflow::linear{}, p.stack());
        for (int k = 1; k < shares; ++k) {
          on.share = {k, shares};
          out.merge(on.gram(rflow::linear{}, p.stack()));
        }
        return out;
      }
    }
    return on.gram(rflow::linear{}, p.stack());
  }

  template <class T>
  void linear(chance_source& r) {
    On on = draw_backend(r);
    bool scored = false;
    std::size_t const n = draw_tokens(r);
    if constexpr (requires { on.significance; })
      scored = on.significance = n <= 64 && r.happens(0.1);
    cause const shared = draw_cause(r, n);
    std::size_t kind = r.below(10);
    if (!wide<T> && !std::same_as<T, float> && (kind < 8 || !any_pair)) kind = 0;
    if (kind < 5) {
      std::size_t const most = n >= 512 ? 3 : n <= 40 && r.happens(0.04) ? 24 : 4;
      std::size_t const count = r.from(1, most);
      model const m = draw<T>(r, n, count, r.happens(0.3), shared);
      placed<T> p(r, m, true, false);
      expected_cka want = by_linear(m.sites);
      if (r.happens(0.03)) p.spoil(r, want.spoilt = r.below(m.sites.size()));
      log.story += p.text;
      rflow::gram_moments const moments = gram_of(r, on, p);
      log.story += moments.path == rflow::gram_path::feature ? " (feature)" : " (gram)";
      rflow::cka_table const d(moments, rflow::debiased{}), b(moments, rflow::biased{});
      check_table(d, want, true, cka_ceiling<T>, m.sites.size(), 0, "CKA debiased");
      check_table(b, want, false, cka_ceiling<T>, m.sites.size(), 0, "CKA biased");
      check_top(d, want, cka_ceiling<T>, m.sites.size(),
                moments.path == rflow::gram_path::feature ? m.sites : std::vector<site>());
      if (scored && n >= 4 && want.spoilt == expected_cka{}.spoilt)
        check_scores(d, want, cka_ceiling<T>);
      return;
    }
    if (kind < 7) return of_two<T, T>(r, on, n, shared);
    if (kind < 8) {
      if constexpr (std::same_as<T, float>)
        return of_two<float, rflow::bf16>(r, on, n, shared);
      else
        return of_two<T, T>(r, on, n, shared);
    }
    model m = draw<T>(r, n, 2, false, shared);  // one pair, by itself
    placed<T> const p(r, m, false, false);
    log.story += p.text + ", one pair";
    expected_cka const want = by_linear(m.sites);
    bool const debiased = r.happens(0.6);
    statuses const allowed =
        cell_statuses(site_statuses(want.a, debiased, 0, cka_ceiling<T>, false, false),
                      site_statuses(want.a, debiased, 1, cka_ceiling<T>, false, false));
    double const value = (allowed & ok) == 0
                             ? missing()
                             : want.a.cka(debiased ? want.a.debiased : want.a.biased, 0, 1);
    if (debiased)
      log.check("CKA debiased",
                rflow::cka(p.views[0], p.views[1], rflow::linear{}, rflow::debiased{}, on), value,
                1, cka_ceiling<T>, allowed, "pair");
    else
      log.check("CKA biased",
                rflow::cka(p.views[0], p.views[1], rflow::linear{}, rflow::biased{}, on), value, 1,
                cka_ceiling<T>, allowed, "pair");
  }

  template <class T, class U>
  void of_two(chance_source& r, On const& on, std::size_t n, cause const& shared) {
    if constexpr (requires(On b, rflow::layer_stack<T> x, rflow::layer_stack<U> y) {
                    b.gram(rflow::linear{}, x, y);
                  } &&
                  (std::same_as<T, float> || std::same_as<T, double>)) {
      std::size_t const s = r.from(1, 2);
      model m = draw<T>(r, n, s, false, shared);
      model const other = draw<U>(r, n, r.from(1, 2), false, shared);
      join(m, other);
      placed<T> const p(r, m, true, false);
      placed<U> const q(r, other, true, false);
      log.story += p.text + " and" + q.text;
      std::vector<site> sites = m.sites;
      sites.insert(sites.end(), other.sites.begin(), other.sites.end());
      expected_cka const want = by_linear(sites);
      rflow::gram_moments const moments = on.gram(rflow::linear{}, p.stack(), q.stack());
      log.story += moments.path == rflow::gram_path::feature ? " (feature)" : " (gram)";
      auto const split = static_cast<std::ptrdiff_t>(s);
      check_table(rflow::cka_table(moments, rflow::debiased{}, split), want, true, cka_ceiling<T>,
                  s, s, "CKA debiased");
      check_table(rflow::cka_table(moments, rflow::biased{}, split), want, false, cka_ceiling<T>, s,
                  s, "CKA biased");
    } else {
      static_cast<void>(r), static_cast<void>(on), static_cast<void>(n), static_cast<void>(shared);
    }
  }

  void check_scores(rflow::cka_table const& table, expected_cka const& want, double ceiling) {
    alignment const& a = want.a;
    auto const n = static_cast<double>(a.n);
    double const deviation = std::sqrt(2 / (n * (n - 3)));
    for (std::size_t p = 0; p < a.sites; ++p)
      for (std::size_t q = 0; q < a.sites; ++q) {
        statuses const allowed = cell_statuses(site_statuses(a, true, p, ceiling, false, false),
                                               site_statuses(a, true, q, ceiling, false, false)) |
                                 (in_shares ? ill : 0);
        double const value = (allowed & ok) == 0 ? missing() : a.cka(a.debiased, p, q) / deviation;
        log.check("score",
                  table.score(static_cast<std::ptrdiff_t>(p), static_cast<std::ptrdiff_t>(q)),
                  value, 1 / deviation, ceiling, allowed, at(p, q));
      }
  }

  template <class T>
  void rbf(chance_source& r) {
    On const on = draw_backend(r);
    std::size_t n = draw_tokens(r);
    if (n > 160) n = r.happens(0.25) ? 512 + n % 48 : 20 + n % 80;  // a kernel value takes long
    std::size_t const s = n >= 512 ? r.from(1, 2) : r.from(1, 3);
    bool const chain = r.happens(0.3);
    model const m = draw<T>(r, n, s, chain, draw_cause(r, n));
    placed<T> const p(r, m, true, false);
    log.story += p.text;
    expected_cka want;
    if (any_pair && !m.odd.scale && r.happens(0.15)) {
      double total = 0;
      for (double const v : m.sites[0].x) total += v * v;
      polynomial const kernel{total > 0 ? r.decade(-1, 1) * static_cast<double>(n) / total : 1};
      log.story += ", polynomial kernel";
      want.a = polynomial_alignment(m.sites, kernel.by);
      want.zero_bandwidth.resize(s);
      if constexpr (any_pair) {
        rflow::gram_moments const moments = on.gram(kernel, p.stack());
        check_table(rflow::cka_table(moments, rflow::debiased{}), want, true, cka_ceiling<T>, s, 0,
                    "kernel debiased");
        check_table(rflow::cka_table(moments, rflow::biased{}), want, false, cka_ceiling<T>, s, 0,
                    "kernel biased");
      }
      return;
    }
    rflow::rbf kernel;
    bool const given = r.happens(0.45);
    kernel.fraction = r.of({0.2, 0.5, 1.0, 1.0, 2.0, 10.0, 30.0});
    kernel.convention =
        r.happens(0.7) ? rflow::rbf::median::all_pairs : rflow::rbf::median::upper_triangle;
    std::vector<number> sigma2;
    char text[80];
    for (site const& x : m.sites) {
      number const median = median_distance(x, kernel.convention == rflow::rbf::median::all_pairs);
      if (given) {
        double sigma = root(median).value() * r.decade(-1, 1.5);
        if (!(sigma > 0) || !std::isfinite(sigma)) sigma = 1;
        kernel.sigma.push_back(sigma);
        int e = 0;
        double const mantissa = std::frexp(sigma, &e);
        sigma2.push_back({mantissa * mantissa, 2 * e});
        want.zero_bandwidth.push_back(false);
      } else {
        sigma2.push_back({median.mantissa * kernel.fraction * kernel.fraction, median.exponent});
        want.zero_bandwidth.push_back(n >= 2 && median.mantissa == 0);
        if (median.mantissa == 0) sigma2.back() = {1, 0};
      }
    }
    want.by_fraction = !given;
    if (given)
      std::snprintf(text, sizeof text, ", sigma %.3g (unused fraction %g)", kernel.sigma[0],
                    kernel.fraction);
    else
      std::snprintf(text, sizeof text, ", fraction %g", kernel.fraction);
    log.story += text;
    want.a = rbf_alignment(m.sites, sigma2);
    rflow::gram_moments const moments = on.gram(kernel, p.stack());
    rflow::cka_table const d(moments, rflow::debiased{}), b(moments, rflow::biased{});
    check_table(d, want, true, cka_ceiling<T>, s, 0, "RBF debiased");
    check_table(b, want, false, cka_ceiling<T>, s, 0, "RBF biased");
    check_top(d, want, cka_ceiling<T>, s);
    for (std::size_t l = 0; l < s; ++l) {
      measured const sigma = d.sigma(static_cast<std::ptrdiff_t>(l));
      double const value = root(sigma2[l]).value();
      if (sigma.ok() && !want.zero_bandwidth[l])
        log.check("RBF sigma", sigma, value, value, wide<T> ? 1e-9 : 1e-4, ok, at(l));
    }
  }

  // ---- minibatches

  /// Sums over batches, in common units.
  struct batch_sums {
    std::size_t sites;
    std::vector<twofold> sums;
    std::vector<int> unit;
    std::vector<double> error, noise;  // ‖E‖², and what this reference may be off
    bool any = false;

    explicit batch_sums(std::size_t s)
        : sites(s), sums(s * s), unit(s, -1000000), error(s), noise(s) {}

    void add(alignment const& a, double weight) {
      any = true;
      for (std::size_t p = 0; p < sites; ++p) {
        if (a.trace[p].hi == 0 || a.unit[p] <= unit[p]) continue;
        int const up = std::max(-4000, unit[p] - a.unit[p]);
        unit[p] = a.unit[p];
        for (std::size_t q = 0; q < sites; ++q) {
          sums[p * sites + q] = scaled(sums[p * sites + q], 2 * up);
          if (p != q)
            sums[q * sites + p] = scaled(sums[q * sites + p], 2 * up);
          else
            sums[p * sites + p] = scaled(sums[p * sites + p], 2 * up);
        }
        error[p] = std::ldexp(error[p], 4 * up);
        noise[p] = std::ldexp(noise[p], 4 * up);
      }
      for (std::size_t p = 0; p < sites; ++p) {
        if (a.trace[p].hi == 0) continue;
        int const mine = a.unit[p] - unit[p];
        double const u2 = std::max(0.0, a.at(a.debiased, p, p).hi);
        double const e = u2 > 0 ? a.gram_error[p] * a.gram_error[p] * u2
                                : a.trace[p].hi * a.trace[p].hi * 1.3e-32;
        error[p] += std::ldexp(weight * e, 4 * mine);
        noise[p] += std::ldexp(weight * a.debiased_noise[p], 4 * mine);
        for (std::size_t q = 0; q < sites; ++q)
          if (a.trace[q].hi != 0)
            sums[p * sites + q] +=
                twofold(weight) * scaled(a.at(a.debiased, p, q), 2 * (mine + a.unit[q] - unit[q]));
      }
    }
    statuses allowed(std::size_t p, double ceiling) const {
      if (!any) return bit(status::too_few_rows);
      statuses const none = bit(status::constant_layer) | ill;
      double const self = sums[p * sites + p].hi;
      if (!(self > noise[p])) return none;
      return 16 * std::sqrt(error[p] / self) <= ceiling ? ok : ok | none;
    }
    double cka(std::size_t p, std::size_t q) const {
      return static_cast<double>(sums[p * sites + q] / (oracle::root(sums[p * sites + p]) *
                                                        oracle::root(sums[q * sites + q])));
    }
  };

  template <class T, class Cka>
  void check_batches(batch_sums const& want, Cka const& got, char const* quantity) {
    for (std::size_t p = 0; p < want.sites; ++p)
      for (std::size_t q = 0; q < want.sites; ++q) {
        statuses const allowed =
            cell_statuses(want.allowed(p, cka_ceiling<T>), want.allowed(q, cka_ceiling<T>));
        double const value = (allowed & ok) == 0 ? missing() : p == q ? 1 : want.cka(p, q);
        log.check(quantity, got(static_cast<std::ptrdiff_t>(p), static_cast<std::ptrdiff_t>(q)),
                  value, 1, cka_ceiling<T>, allowed, at(p, q));
      }
  }
  static std::vector<site> part_of(std::vector<site> const& sites, std::size_t begin,
                                   std::size_t end) {
    std::vector<site> out;
    for (site const& s : sites)
      out.push_back({end - begin, s.d,
                     std::vector<double>(s.x.begin() + static_cast<std::ptrdiff_t>(begin * s.d),
                                         s.x.begin() + static_cast<std::ptrdiff_t>(end * s.d))});
    return out;
  }

  template <class T>
  void minibatch(chance_source& r) {
    On const on = draw_backend(r);
    std::size_t const n = std::min<std::size_t>(draw_tokens(r), 640);
    std::size_t const s = r.from(1, 3);
    bool const chain = r.happens(0.3);
    model m = draw<T>(r, n, s, chain, draw_cause(r, n));
    bool const is_rbf = r.happens(0.3);
    if (wide<T> && !is_rbf && r.happens(0.1)) {  // batches in other units
      log.story += ", the second half far smaller";
      for (site& x : m.sites)
        for (std::size_t i = x.x.size() / 2; i < x.x.size(); ++i) x.x[i] *= 1e-90;
    }
    placed<T> const p(r, m, false, false);
    auto const weight =
        r.of({rflow::batch_weight::pairs, rflow::batch_weight::equal, rflow::batch_weight::rows});
    std::size_t const size = is_rbf ? r.from(3, 40) : n >= 512 ? r.from(30, 300) : r.from(3, 60);
    log.story += p.text + ", batches of " + std::to_string(size);
    batch_sums want(s);
    std::vector<double> sigma;
    std::vector<number> sigma2;
    if (is_rbf) {
      log.story += ", rbf";
      for (site const& x : m.sites) {
        double bandwidth = root(median_distance(x, false)).value() * r.decade(-0.7, 1);
        if (!(bandwidth > 0) || !std::isfinite(bandwidth)) bandwidth = 1;
        sigma.push_back(bandwidth);
        int e = 0;
        double const mantissa = std::frexp(bandwidth, &e);
        sigma2.push_back({mantissa * mantissa, 2 * e});
      }
    }
    auto const each = [&](auto& accumulator) {
      for (std::size_t begin = 0; begin < n; begin += size) {
        std::size_t const end = std::min(n, begin + size), count = end - begin;
        std::vector<rflow::view<T>> views;
        for (auto const& v : p.views)
          views.emplace_back(v.data + static_cast<std::ptrdiff_t>(begin) * v.row_stride,
                             static_cast<std::ptrdiff_t>(count), v.cols, v.row_stride,
                             v.col_stride);
        accumulator.add(rflow::layer_stack<T>(views), on);
        if (count < 4) continue;
        auto const b = static_cast<double>(count);
        double const w = weight == rflow::batch_weight::pairs   ? 1
                         : weight == rflow::batch_weight::equal ? 1 / (b * (b - 3))
                                                                : 1 / (b - 3);
        std::vector<site> const part = part_of(m.sites, begin, end);
        want.add(is_rbf ? rbf_alignment(part, sigma2) : linear_alignment(part), w);
      }
      check_batches<T>(want, accumulator, is_rbf ? "minibatch RBF" : "minibatch CKA");
    };
    if (is_rbf) {
      rflow::cka_accumulator<rflow::rbf> accumulator(
          rflow::rbf{.fraction = r.of({0.2, 1.0, 10.0}), .sigma = sigma}, weight);
      each(accumulator);
    } else {
      rflow::cka_accumulator<rflow::linear> accumulator({}, weight);
      each(accumulator);
    }
  }

  // ---- a monitor

  /// Figures of each sequence by itself: their means.
  template <class T>
  void check_each_sequence(rflow::sequence_figures const& got, std::vector<site> const& sites,
                           std::vector<std::size_t> const& bounds, bool in_units) {
    std::size_t const s = sites.size();
    struct mean {
      double sum = 0, count = 0;
      void add(double x) { sum += x, count += 1; }
    };
    mean st1, st2;
    std::vector<mean> inter_token(s), rms(s), adjacent(s - 1), steps(s - 1);
    for (std::size_t q = 0; q + 1 < bounds.size(); ++q) {
      if (bounds[q] == bounds[q + 1]) continue;
      std::vector<site> const part = part_of(sites, bounds[q], bounds[q + 1]);
      flow_result const f = flow_by_definition(part, {0, part[0].n});
      // Out of range, or nearly: what counts then is checked elsewhere.
      for (number const& x : f.steps)
        if (wide<T> && x.mantissa != 0 && std::abs(x.log2()) > 900) return;
      for (std::size_t l = 0; l < s; ++l) {
        if (wide<T> && f.zero_rows[l] < part[0].n &&
            (f.least_row[l] < -900 || f.greatest_row[l] > 900))
          return;
        if (f.pairs[l] > 0) inter_token[l].add(f.inter_token[l]);
        rms[l].add(f.squares[l].mantissa == 0
                       ? 0
                       : root(over(f.squares[l], static_cast<double>(part[0].n))).value());
        if (l + 1 == s) continue;
        if (f.adjacent_count[l] > 0) adjacent[l].add(f.adjacent[l]);
        steps[l].add(f.steps[l].mantissa == 0 ? 0 : root(f.steps[l]).value());
      }
      st2.add(f.spread.mantissa == 0 ? 0 : root(over(f.spread, static_cast<double>(s))).value());
      if (s < 2) continue;
      st1.add(f.energy.mantissa == 0 ? 0
                                     : root(over(f.energy, static_cast<double>(s - 1))).value());
    }
    auto const same = [&](char const* quantity, rflow::running_stat const& mine, mean const& want,
                          bool relative, std::string const& where) {
      log.require(quantity, mine.count == want.count, where, "another count");
      if (want.count == 0 || mine.count != want.count) return;
      double const value = want.sum / want.count;
      log.check(quantity, mine.mean, value, relative && value > 0 ? value : 1, flow_ceiling<T>, ok,
                where);
    };
    for (std::size_t l = 0; l < s; ++l) {
      same("sequences' tokens", got.inter_token[l], inter_token[l], false, at(l));
      same("sequences' norms", got.rms_norm[l], rms[l], true, at(l));
      if (l + 1 < s) same("sequences' adjacent", got.adjacent[l], adjacent[l], false, at(l));
      if (l + 1 < s && in_units) same("sequences' steps", got.steps[l], steps[l], true, at(l));
    }
    if (!in_units) return;
    same("sequences' St1", got.st1, st1, true, "");
    same("sequences' St2", got.st2, st2, true, "");
  }

  template <class T>
  void monitor(chance_source& r) {
    if constexpr (has_monitor) {
      On const on = draw_backend(r);
      std::size_t const n = std::min<std::size_t>(draw_tokens(r), 640);
      std::size_t const s = r.from(1, 4);
      model const m = draw<T>(r, n, s, true, draw_cause(r, n));
      placed<T> const p(r, m, true, true);
      std::size_t const skip = r.happens(0.3) ? r.from(1, 2) : 0;
      rflow::monitor_options options;
      options.normalize = draw_normalization(r);
      options.skip_first = static_cast<std::ptrdiff_t>(skip);
      options.cka = r.happens(0.7);
      options.cka_batch = static_cast<std::ptrdiff_t>(n >= 512 ? r.from(32, 256) : r.from(4, 40));
      log.story += p.text + ", skip " + std::to_string(skip) + ", batch " +
                   std::to_string(options.cka ? options.cka_batch : 0) + ", normalised by " +
                   std::string(to_string(options.normalize));
      std::size_t const all = p.keep.size();
      rflow::flow_monitor<T, On> it(static_cast<std::ptrdiff_t>(s), p.views[0].cols, options, on);
      std::vector<std::ptrdiff_t> offsets = p.offsets();
      if (offsets.empty()) offsets = {0, static_cast<std::ptrdiff_t>(all)};
      std::size_t const chunk = r.happens(0.5) ? all : r.from(1, 50);
      std::vector<std::uint8_t> const keep(p.keep.begin(), p.keep.end());
      // The tokens that count, and where sequences and batches end among them.
      std::vector<char> counted(all, 0);
      std::vector<std::size_t> bounds{0};
      batch_sums sums(s);
      std::vector<std::size_t> index(all);
      for (std::size_t i = 0, k = 0; i < all; ++i)
        index[i] = k, k += static_cast<std::size_t>(p.keep[i]);
      std::vector<site> chosen;
      for (site const& x : m.sites) chosen.push_back({0, x.d, {}});
      for (std::size_t q = 0; q + 1 < offsets.size(); ++q) {
        auto const begin = static_cast<std::size_t>(offsets[q]),
                   end = static_cast<std::size_t>(offsets[q + 1]);
        for (std::size_t a = begin; a < end; a += chunk) {
          std::size_t const b = std::min(end, a + chunk);
          for (std::size_t l = 0; l < s; ++l) {
            auto const& v = p.views[l];
            rflow::view<T> const rows(v.data + static_cast<std::ptrdiff_t>(a) * v.row_stride,
                                      static_cast<std::ptrdiff_t>(b - a), v.cols, v.row_stride,
                                      v.col_stride);
            it.push(static_cast<std::ptrdiff_t>(l), static_cast<std::ptrdiff_t>(a - begin), rows,
                    p.masked() ? std::span<std::uint8_t const>(keep.data() + a, b - a)
                               : std::span<std::uint8_t const>());
          }
        }
        it.end_sequence();
        for (std::size_t i = begin; i < end; ++i) {
          if (p.keep[i] == 0 || i - begin < skip) continue;
          for (std::size_t l = 0; l < s; ++l) {
            auto const row =
                m.sites[l].x.begin() + static_cast<std::ptrdiff_t>(index[i] * m.sites[l].d);
            chosen[l].x.insert(chosen[l].x.end(), row,
                               row + static_cast<std::ptrdiff_t>(m.sites[l].d));
            ++chosen[l].n;
          }
        }
        // Batches are cut by position; of a batch those tokens count that do elsewhere.
        auto const size = static_cast<std::size_t>(options.cka_batch);
        for (std::size_t first = begin, kept = bounds.back(); options.cka && first < end;
             first += size) {
          std::size_t const last = std::min(end, first + size), from = kept;
          for (std::size_t i = first; i < last; ++i) kept += p.keep[i] != 0 && i - begin >= skip;
          if (kept - from >= 4) sums.add(linear_alignment(part_of(chosen, from, kept)), 1);
        }
        bounds.push_back(chosen[0].n);
      }
      rflow::monitor_report const got = it.report();
      if (chosen[0].n == 0) return;
      check_flow<T>(got.pooled, chosen, flow_by_definition(chosen, bounds), options.normalize,
                    false);
      check_each_sequence<T>(got.per_sequence, chosen, bounds,
                             options.normalize == rflow::normalization::none);
      if (options.cka) check_batches<T>(sums, got.cka, "monitor CKA");
    } else {
      static_cast<void>(r);
    }
  }

  // ---- probes, jackknife

  template <class T>
  void probe(chance_source& r) {
    if constexpr (rflow::softmax_backend_for<On, rflow::host_memory>) {
      On const on = draw_backend(r);
      std::size_t const n = r.from(8, 60), d = r.happens(0.2) ? 1 : r.from(2, 40),
                        classes = r.from(2, 5);
      recipe const by{dtype_of<T>, n, {d}, false, false};
      model m = draw_model(r, by, draw_cause(r, n));
      softmax_case c;
      c.classes = classes;
      c.epochs = static_cast<int>(r.from(1, 4));
      c.standardize = r.happens(0.5);
      c.epsilon = 0.05;  // so that a gradient of 0 has no sign
      c.decay = r.happens(0.3) ? 0.01 : 0;
      if (c.standardize && r.happens(0.5)) {
        double const offset = r.decade(0, wide<T> ? 8 : 2);
        m.odd.offset = true;
        for (double& v : m.sites[0].x) {
          v += offset;
          if constexpr (!wide<T>) v = static_cast<double>(static_cast<float>(exactly<T>(v)));
        }
      }
      log.condition = m.odd.name();
      for (std::size_t i = 0; i < n; ++i) {
        c.labels.push_back(static_cast<int>(i < classes ? i : r.below(classes)));
        c.trains.push_back(i < classes + 1 || (i + 1 < n && r.happens(0.7)));
      }
      for (std::size_t i = 0; i < classes * d; ++i) c.weight.push_back(0.3 * r.bell());
      for (std::size_t i = 0; i < classes; ++i) c.bias.push_back(0.3 * r.bell());
      placed<T> const p(r, m, false, false);
      log.story += "; " + std::string(name_of(dtype_of<T>)) + " " + std::to_string(n) + " x " +
                   std::to_string(d) + p.text + (c.standardize ? ", standardised" : "");
      softmax_losses const want = softmax_by_definition(m.sites[0], c);
      rflow::probe_options options;
      options.classes = static_cast<std::ptrdiff_t>(classes);
      options.epochs = c.epochs;
      options.epsilon = c.epsilon;
      options.weight_decay = c.decay;
      options.seeds = 1;
      options.standardize = c.standardize;
      options.initial_weights = rflow::weights::given(c.weight, c.bias);
      for (std::size_t i = 0; i < n; ++i)
        (c.trains[i] ? options.training : options.validation)
            .push_back(static_cast<std::ptrdiff_t>(i));
      rflow::layer_probes const got = rflow::probe_layers(p.stack(), c.labels, options, on);
      auto const& seed = got.layers[0].seeds.at(0);
      // An error of weights is in the next gradient too, so a whole curve shares one scale.
      double const within = wide<T> ? 1e-10 : 1e-4;
      auto const hold = [&](auto const& losses, std::vector<double> const& right,
                            char const* part) {
        double const largest = *std::max_element(right.begin(), right.end());
        for (std::size_t e = 0; e < right.size(); ++e)
          log.check("probe loss", losses[e], right[e], 1 + largest, within, ok, part + at(e));
      };
      hold(seed.train_loss, want.train, "train");
      hold(seed.validation_loss, want.validation, "validation");
    } else {
      static_cast<void>(r);
    }
  }

  template <class T>
  void jackknife(chance_source& r) {
    On const on = draw_backend(r);
    std::size_t const n = r.from(9, 30);
    model const m = draw<T>(r, n, 2, false, draw_cause(r, n));
    placed<T> const p(r, m, true, false);
    std::size_t const blocks = r.from(5, std::min<std::size_t>(n / 2 + 2, 9));
    log.story += p.text + ", " + std::to_string(blocks) + " blocks";
    rflow::cka_intervals const got = rflow::cka_jackknife(
        p.stack(), static_cast<std::ptrdiff_t>(blocks), rflow::linear{}, rflow::debiased{}, on);
    expected_cka const whole = by_linear(m.sites);
    statuses allowed = cell_statuses(site_statuses(whole.a, true, 0, cka_ceiling<T>, false, false),
                                     site_statuses(whole.a, true, 1, cka_ceiling<T>, false, false));
    rflow::running_stat values;
    for (std::size_t b = 0; b < blocks; ++b) {
      std::vector<site> rest;
      std::size_t const begin = n * b / blocks, end = n * (b + 1) / blocks;
      for (site const& s : m.sites) {
        site x{n - (end - begin), s.d, {}};
        for (std::size_t i = 0; i < n; ++i)
          if (i < begin || i >= end) x.x.insert(x.x.end(), s.row(i), s.row(i) + s.d);
        rest.push_back(std::move(x));
      }
      alignment const a = linear_alignment(rest);
      for (std::size_t l = 0; l < 2; ++l) {
        statuses const of_part = site_statuses(a, true, l, cka_ceiling<T>, false, false);
        allowed = cell_statuses(allowed, of_part);
      }
      if ((allowed & ok) != 0) values.add(a.cka(a.debiased, 0, 1));
    }
    auto const count = static_cast<double>(blocks);
    log.check("jackknife", got.standard_error(0, 1), std::sqrt((count - 1) / count * values.m2),
              std::sqrt(count), cka_ceiling<T>, allowed | bit(status::dependent_tokens),
              "standard error");
  }
};

// ---- the program --------------------------------------------------------------------------------

template <class On, bool any_pair = true>
int run(int argc, char** argv, char const* backend) {
  record log;
  comparison<On, any_pair> compare(log);
  std::uint64_t first = 0, count = 10000, seed = 1;
  bool single = false, markdown = false;
  for (int i = 1; i < argc; ++i) {
    std::string const option = argv[i];
    auto const value = [&]() -> char const* {
      if (i + 1 < argc) return argv[++i];
      std::fprintf(stderr, "%s needs a value\n", option.c_str());
      std::exit(2);
    };
    auto const number = [&] {
      char const* const text = value();
      char* end = nullptr;
      unsigned long long const n = std::strtoull(text, &end, 10);
      if (end == text || *end != 0 || *text == '-') {
        std::fprintf(stderr, "%s %s: not a number\n", option.c_str(), text);
        std::exit(2);
      }
      return static_cast<std::uint64_t>(n);
    };
    if (option == "--seed")
      seed = number();
    else if (option == "--first")
      first = number();
    else if (option == "--cases")
      count = number();
    else if (option == "--case")
      first = number(), count = 1, single = true;
    else if (option == "--quantity")
      compare.only = value();
    else if (option == "--markdown")
      markdown = true;
    else if (option == "--verbose")
      log.verbose = true;
    else {
      std::fprintf(
          stderr,
          "usage: %s [--seed S] [--first K] [--cases N] [--case K] [--quantity flow|linear|rbf|"
          "minibatch|monitor|probe|jackknife] [--verbose]\n",
          argv[0]);
      return 2;
    }
  }
  log.seed = seed;
  log.program = argv[0];
  auto const begin = std::chrono::steady_clock::now();
  for (std::uint64_t k = first; k < first + count; ++k) {
    compare.run(seed, k);
    if (single && log.verbose) std::printf("  %s\n", log.story.c_str());
  }
  double const seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (markdown)
    log.print_markdown();
  else
    log.print();
  auto const share = [&](std::uint64_t part) {
    return 100.0 * static_cast<double>(part) /
           static_cast<double>(std::max<std::uint64_t>(1, log.cases));
  };
  std::printf(
      "%s, seed %llu, cases %llu to %llu: %llu run, %.1f %% of them with 512 tokens or more;",
      backend, static_cast<unsigned long long>(seed), static_cast<unsigned long long>(first),
      static_cast<unsigned long long>(first + count - 1),
      static_cast<unsigned long long>(log.cases), share(log.large_cases));
  for (auto const& [topic, n] : log.topics) std::printf(" %s %.1f %%", topic.c_str(), share(n));
  std::printf(
      "\n%llu results, %.1f s; a value withheld for lack of digits in %.3f %% of cases (at most 1 "
      "%%)\n",
      static_cast<unsigned long long>(log.cells), seconds, share(log.ill_cases));
  std::printf("%llu failures in %llu cases (%.3f %%)\n",
              static_cast<unsigned long long>(log.failures),
              static_cast<unsigned long long>(log.failed_cases), share(log.failed_cases));
  bool const too_many = log.cases >= 2000 && share(log.ill_cases) > 1;
  return log.failures == 0 && !too_many ? 0 : 1;
}

}  // namespace oracle
