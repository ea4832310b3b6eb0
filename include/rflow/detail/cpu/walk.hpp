// SPDX-License-Identifier: Apache-2.0
#pragma once

// The flow pass: walks tokens through the chain.

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include <rflow/detail/cpu/chain.hpp>
#include <rflow/detail/cpu/chunk.hpp>
#include <rflow/detail/cpu/own_units.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

// Packets are builtin vector types, whose attributes g++ reports as lost in template arguments.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

/// Walks tokens through the chain, for the part of the moments that is asked for. What each row of
/// activations needs of the rows before it (two of them, and how far the last is off the mean so
/// far, which unlike that mean is no larger than the steps) is fetched from cache
/// once for several sites: with the sums of `Sites` sites in registers, four sites cost little more
/// than the read of their rows from memory.
template <class T>
class flow_walker {
 public:
  using C = compute_t<T>;
  using P = packet_t<C>;

  /// Tokens that walk together, so that unit sums are touched once for all of them.
  static constexpr std::ptrdiff_t group = 4;

  /// Places in a row: the width, rounded up to whole chunks.
  std::ptrdiff_t padded() const { return padded_; }

  flow_walker(layer_stack<T> const& stack, flow_sink const& sink)
      : stack_(stack),
        sink_(sink),
        sites_(stack.sites()),
        width_(stack.width()),
        body_(width_ / chunk<T>::width * chunk<T>::width),
        padded_(body_ + (body_ < width_ ? chunk<T>::width : 0)),
        rows_(count(group * sites_)),
        tails_(count(group * sites_ * chunk<T>::width)),
        gathered_(needs_gather() ? count(group * ring * width_) : 0),
        absent_(count(padded_)),
        off_(group * padded_),
        units_(sites_ * padded_),
        zeros_(Eigen::Array<C, Eigen::Dynamic, 1>::Zero(padded_)),
        products_(count(group * sites_)),
        sequence_(sites_, padded_),
        head_(0, 0) {
    units_.setZero();
  }

  /// Walks tokens begin … end of those that count. `boundaries` are the ends of sequences.
  void walk(std::ptrdiff_t begin, std::ptrdiff_t end,
            std::vector<std::ptrdiff_t> const& boundaries) {
    auto boundary = std::lower_bound(boundaries.begin(), boundaries.end(), begin + 1);
    for (std::ptrdiff_t i = begin; i < end;) {
      std::ptrdiff_t const tokens = (std::min)({group, end - i, *boundary - i});
      walk_group(i, tokens);
      i += tokens;
      for (; boundary != boundaries.end() && *boundary == i; ++boundary) end_sequence();
    }
    flush();
  }

  /// Appends what walk() has seen to the tokens before it, of which `open` is the last sequence, and
  /// forgets it.
  void append_to(flow_moments& total, open_sequence& open) {
    if (has_boundary_) {
      open.add(head_);
      open.close(total);
    }
    open.add(sequence_);
    total.merge(moments_);
    moments_ = flow_moments(sites_, 0);
    sequence_.clear();
    has_boundary_ = false;
  }

 private:
  static constexpr std::ptrdiff_t ring = 8;  // gathered rows kept of a token: more than four + two

  static std::size_t count(std::ptrdiff_t n) { return static_cast<std::size_t>(n); }

  void walk_group(std::ptrdiff_t first, std::ptrdiff_t tokens) {
    first_ = first;
    tokens_ = tokens;
    // Sums of four sites fit 32 vector registers, unless two packets go side by side.
    constexpr bool many = vector_registers >= 32 && chunk<T>::packets == 1;
    constexpr std::ptrdiff_t most = many ? 4 : 2;
    std::ptrdiff_t l = 0;
    if (sink_.part == flow_part::inter_token) {
      for (; l < sites_; ++l) walk_sites<flow_part::inter_token, 1>(l);
    } else if (sink_.part == flow_part::adjacent) {
      for (; l + 2 <= sites_; l += 2) walk_sites<flow_part::adjacent, 2>(l);
      if (l < sites_) walk_sites<flow_part::adjacent, 1>(l);
    } else {
      if constexpr (most == 4)
        for (; l + 4 <= sites_; l += 4) walk_sites<flow_part::all, 4>(l);
      for (; l + 2 <= sites_; l += 2) walk_sites<flow_part::all, 2>(l);
      if (l < sites_) walk_sites<flow_part::all, 1>(l);
    }
    for (std::ptrdiff_t k = 0; k < tokens; ++k) {
      bool ordinary = true;
      for (l = 0; l < sites_; ++l) ordinary = ordinary && is_ordinary(k, l);
      if (ordinary)
        add_products(k, moments_);
      else
        rescue(k, moments_);
    }
    moments_.tokens += static_cast<double>(tokens);
    pending_ += tokens;
    if (pending_ >= 64) flush();
  }

  /// Moves the unit sums of the last tokens on. Sums in C are short; those of a sequence are double.
  void flush() {
    if (pending_ == 0) return;
    double* const to = sequence_.sum.data();
    C* const from = units_.data();
    for (std::ptrdiff_t j = 0; j < units_.size(); ++j) to[j] += static_cast<double>(from[j]);
    units_.setZero();
    pending_ = 0;
  }

  /// The first sequence to end may have begun before these tokens: kept for append_to.
  void end_sequence() {
    flush();
    if (has_boundary_) return sequence_.close(moments_);
    has_boundary_ = true;
    head_ = sequence_;
    sequence_.clear();
  }

  /// Whether the products in C of a row are good ones.
  bool is_ordinary(std::ptrdiff_t k, std::ptrdiff_t l) {
    chain_products const& r = product(k, l);
    if (!in_range<C>(r.norm2)) return false;
    if (l == 0 || !with_chain() || in_range<C>(r.step2)) return true;
    auto const x = values(k, l), p = values(k, l - 1);
    return x.stride == 1 && p.stride == 1 &&
           std::memcmp(x.at, p.at, count(width_) * sizeof(T)) == 0;
  }

  bool with_units() const { return sink_.part != flow_part::adjacent; }
  bool with_chain() const { return sink_.part == flow_part::all; }

  bool needs_gather() const {
    for (std::ptrdiff_t l = 0; l < sites_; ++l)
      if (stack_[l].col_stride != 1) return true;
    return false;
  }

  /// A row where it lies.
  row_values<T> values(std::ptrdiff_t k, std::ptrdiff_t site) const {
    view<T> const& x = stack_[site];
    return {x.data + stack_.token(first_ + k) * x.row_stride, x.col_stride};
  }
  T const*& row(std::ptrdiff_t k, std::ptrdiff_t site) { return rows_[count(k * sites_ + site)]; }
  T* tail(std::ptrdiff_t k, std::ptrdiff_t site) {
    return tails_.data() + (k * sites_ + site) * chunk<T>::width;
  }
  chain_products& product(std::ptrdiff_t k, std::ptrdiff_t site) {
    return products_[count(k * sites_ + site)];
  }

  /// Finds the dense row of a token at a site and its zero-padded tail.
  void take_row(std::ptrdiff_t k, std::ptrdiff_t site) {
    view<T> const& x = stack_[site];
    T const* from = x.data + stack_.token(first_ + k) * x.row_stride;
    if (x.col_stride != 1) {
      T* const dense = gathered_.data() + (k * ring + site % ring) * width_;
      for (std::ptrdiff_t j = 0; j < width_; ++j) dense[j] = from[j * x.col_stride];
      from = dense;
    }
    row(k, site) = from;
    std::copy(from + body_, from + width_, tail(k, site));
  }

  template <flow_part Part, std::ptrdiff_t Sites>
  void walk_sites(std::ptrdiff_t site) {
    for (std::ptrdiff_t k = 0; k < tokens_; ++k) {
      for (std::ptrdiff_t s = 0; s < Sites; ++s) {
        take_row(k, site + s);
        product(k, site + s) = {};
      }
      std::ptrdiff_t const p = (std::max<std::ptrdiff_t>)(site - 1, 0);
      std::ptrdiff_t const q = (std::max<std::ptrdiff_t>)(site - 2, 0);
      chain_products* const to = &product(k, site);
      C* const off = off_.data() + k * padded_;
      C const* const off_before = site == 0 ? zeros_.data() : off;
      constexpr std::ptrdiff_t block =
          64 * chunk<T>::width;  // features summed in C, then in double
      T const* next[Sites];
      for (std::ptrdiff_t s = 0; s < Sites; ++s) next[s] = wanted_next(k, site + Sites + s);
      for (std::ptrdiff_t j = 0; j < body_; j += block)
        add_chunks<Part, Sites>(&row(k, site), next, row(k, p), row(k, q), j,
                                (std::min)(body_, j + block), off_before, off, site, to);
      if (body_ < padded_) {
        T const* tails[Sites];
        for (std::ptrdiff_t s = 0; s < Sites; ++s) tails[s] = tail(k, site + s);
        add_chunks<Part, Sites>(tails, tails, tail(k, p), tail(k, q), 0, chunk<T>::width,
                                off_before + body_, off + body_, site, to);
      }
    }
    if constexpr (Part != flow_part::adjacent)
      for (std::ptrdiff_t s = 0; s < Sites; ++s) add_units(site + s);
  }

  /// The row that will be read after this one, as far as it can be told: the same token some sites
  /// on, or the next group's at the first sites.
  T const* wanted_next(std::ptrdiff_t k, std::ptrdiff_t site) const {
    std::ptrdiff_t i = first_ + k;
    if (site >= sites_) {
      site -= sites_;
      i += group;
    }
    if (site >= sites_ || i >= stack_.size()) return stack_[0].data;
    return stack_[site].data + stack_.token(i) * stack_[site].row_stride;
  }

  /// Features begin … end of `Sites` rows x[0], x[1], … whose predecessors are p and q. The same
  /// features of the rows in `next` are asked for from memory, where many rows go side by side.
  template <flow_part Part, std::ptrdiff_t Sites>
  static void add_chunks(T const* const* x, T const* const* next, T const* p, T const* q,
                         std::ptrdiff_t begin, std::ptrdiff_t end, C const* off_before, C* off,
                         std::ptrdiff_t site, chain_products* to) {
    constexpr bool chain = Part == flow_part::all, pairs = Part != flow_part::inter_token;
    struct site_sums {
      P norm2, dot, step2, turn, away2, weight;
      T const *x, *next;
    };
    site_sums sums[Sites];
    P const zero = packet::pset1<P>(C(0));
    for (std::ptrdiff_t s = 0; s < Sites; ++s)
      sums[s] = {zero, zero,   zero, zero, zero, packet::pset1<P>(share_off<C>(site + s)),
                 x[s], next[s]};
    for (std::ptrdiff_t j = begin; j < end; j += chunk<T>::width) {
      chunk<T> before, step_before, off_mean;
      if constexpr (pairs) before = load_chunk(p + j);
      if constexpr (chain) {
        step_before = load_chunk(q + j);
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i) {
          step_before.at[i] = packet::psub(before.at[i], step_before.at[i]);
          off_mean.at[i] = packet::ploadu<P>(off_before + j + i * chunk<T>::lanes);
        }
      }
      auto const add = [&](site_sums& sum) {
        chunk<T> const here = load_chunk(sum.x + j);
        if constexpr (chain) __builtin_prefetch(sum.next + j, 0, 2);  // into L2: L1 is full
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i) {
          sum.norm2 = packet::pmadd(here.at[i], here.at[i], sum.norm2);
          if constexpr (pairs) sum.dot = packet::pmadd(here.at[i], before.at[i], sum.dot);
          if constexpr (chain) {
            P const step = packet::psub(here.at[i], before.at[i]);
            P const away = packet::padd(step, off_mean.at[i]);
            sum.step2 = packet::pmadd(step, step, sum.step2);
            sum.turn = packet::pmadd(step, step_before.at[i], sum.turn);
            sum.away2 = packet::pmadd(away, away, sum.away2);
            off_mean.at[i] = packet::pmul(away, sum.weight);
            step_before.at[i] = step;
          }
          if constexpr (pairs) before.at[i] = here.at[i];
        }
      };
      // Written out, because a loop over sites may leave the sums in memory.
      add(sums[0]);
      if constexpr (Sites > 1) add(sums[1]);
      if constexpr (Sites > 2) add(sums[2]), add(sums[3]);
      if constexpr (chain)
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
          packet::pstoreu(off + j + i * chunk<T>::lanes, off_mean.at[i]);
    }
    for (std::ptrdiff_t s = 0; s < Sites; ++s) {
      to[s].norm2 += static_cast<double>(packet::predux(sums[s].norm2));
      if constexpr (pairs) to[s].dot += static_cast<double>(packet::predux(sums[s].dot));
      if constexpr (!chain) continue;
      to[s].step2 += static_cast<double>(packet::predux(sums[s].step2));
      to[s].turn += static_cast<double>(packet::predux(sums[s].turn));
      to[s].away2 += static_cast<double>(packet::predux(sums[s].away2));
    }
  }

  /// Adds the unit vectors of the group's rows at one site.
  void add_units(std::ptrdiff_t site) {
    T const *rows[group], *tails[group];
    P scale[group];
    for (std::ptrdiff_t k = 0; k < group; ++k) {
      bool const counts = k < tokens_ && in_range<C>(product(k, site).norm2);
      rows[k] = counts ? row(k, site) : absent_.data();
      tails[k] = counts ? tail(k, site) : absent_.data();
      scale[k] =
          packet::pset1<P>(counts ? static_cast<C>(1 / std::sqrt(product(k, site).norm2)) : 0);
    }
    C* const units = units_.data() + site * padded_;
    add_scaled(rows, scale, 0, body_, units);
    if (body_ < padded_) add_scaled(tails, scale, 0, chunk<T>::width, units + body_);
  }

  static void add_scaled(T const* const (&rows)[group], P const (&scale)[group],
                         std::ptrdiff_t begin, std::ptrdiff_t end, C* to) {
    for (std::ptrdiff_t j = begin; j < end; j += chunk<T>::width) {
      chunk<T> sum;
      for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
        sum.at[i] = packet::ploadu<P>(to + j + i * chunk<T>::lanes);
      for (std::ptrdiff_t k = 0; k < group; ++k) {
        chunk<T> const x = load_chunk(rows[k] + j);
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
          sum.at[i] = packet::pmadd(x.at[i], scale[k], sum.at[i]);
      }
      for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
        packet::pstoreu(to + j + i * chunk<T>::lanes, sum.at[i]);
    }
  }

  void add_products(std::ptrdiff_t k, flow_moments& m) {
    double norm = 0;
    for (std::ptrdiff_t l = 0; l < sites_; ++l) {
      auto const s = count(l);
      chain_products const& r = product(k, l);
      double const norm_before = norm;
      norm = std::sqrt(r.norm2);
      m.squares[s] += r.norm2;
      sequence_.units[s] += with_units() ? 1 : 0;
      note_norm(l, first_ + k, norm);
      if (l == 0) continue;
      note_cosine(l - 1, first_ + k, r.dot / (norm * norm_before), m);
      if (!with_chain()) continue;
      m.spread += r.away2 * (static_cast<double>(l) / static_cast<double>(l + 1));
      m.steps[s - 1] += r.step2;
      if (l > 1)
        add_turn(m.turns[s - 2], r.step2, r.turn, product(k, l - 1).step2,
                 [&] { return turn_again(k, l); });
    }
  }

  /// How steps l − 1 and l of a token lie to each other, from the rows themselves.
  turn_sum turn_again(std::ptrdiff_t k, std::ptrdiff_t l) const {
    using step = row_difference<row_values<T>, row_values<T>>;
    row_values<T> const x = values(k, l), p = values(k, l - 1), q = values(k, l - 2);
    return turn_of(in_units<step>{{x, p}, width_}, in_units<step>{{p, q}, width_});
  }

  /// A row in units of its own.
  struct careful_row {
    in_units<row_values<T>> x;
    double square = 0;
    std::ptrdiff_t bad = 0;  // first feature that is not finite, or the width

    careful_row(row_values<T> const& values, std::ptrdiff_t width) : x{values, width} {
      while (bad < width && is_finite(values(bad))) ++bad;
      if (!finite()) return;
      x = in_own_units(width, values);
      square = x.square();
    }
    bool finite() const { return bad == x.size; }
  };

  /// The same for a token with a row that is zero, not finite, or too large or small to be squared
  /// in C, or such a step: in double, in units of its own, and each site kept apart from one that
  /// has no value.
  void rescue(std::ptrdiff_t k, flow_moments& m) {
    std::ptrdiff_t const i = first_ + k;
    double const missing = std::numeric_limits<double>::quiet_NaN();
    std::vector<careful_row> rows;
    for (std::ptrdiff_t l = 0; l < sites_; ++l) rows.emplace_back(values(k, l), width_);
    auto const step = [&](std::size_t s) {
      return step_in_own_units(width_, rows[s].x.values, rows[s - 1].x.values);
    };
    for (std::ptrdiff_t l = 0; l < sites_; ++l) {
      auto const s = count(l);
      careful_row const& here = rows[s];
      if (!here.finite()) {
        if (!m.non_finite[s].found()) m.non_finite[s] = {stack_.token(i), here.bad};
        note_norm(l, i, missing);
        if (l > 0) note_cosine(l - 1, i, missing, m);
        continue;
      }
      double const norm = std::sqrt(here.square);
      m.squares[s] += square_sum::of(here.square, here.x.exponent);
      note_norm(l, i, std::ldexp(norm, here.x.exponent));
      bool const added = in_range<C>(product(k, l).norm2);  // by add_units
      if (here.square > 0 || added) {
        sequence_.units[s] += with_units() ? 1 : 0;
        for (std::ptrdiff_t j = 0; with_units() && !added && j < width_; ++j)
          sequence_.sum(place_of<T>(j), l) += here.x(j) / norm;
      } else {
        m.zero_rows[s] += 1;
      }
      if (l == 0) continue;
      careful_row const& before = rows[s - 1];
      bool const both = before.finite() && here.square > 0 && before.square > 0;
      note_cosine(
          l - 1, i,
          both ? inner_product(here.x, before.x) / norm / std::sqrt(before.square) : missing, m);
      if (!with_chain() || !before.finite()) continue;
      auto const a = step(s);
      m.steps[s - 1] += square_sum::of(a.square(), a.exponent);
      if (l > 1 && rows[s - 2].finite()) m.turns[s - 2].merge(turn_of(a, step(s - 1)));
    }
    if (with_chain()) m.spread += spread_of(rows);
  }

  /// Σ_l ‖x_l − mean‖² of a token, from differences to its first row.
  square_sum spread_of(std::vector<careful_row> const& rows) const {
    for (careful_row const& r : rows)
      if (!r.finite()) return 0;  // there is no St2
    using difference = row_difference<row_values<T>, row_values<T>>;
    auto const largest = [&](double part) {
      double most = 0;
      for (careful_row const& r : rows)
        most = (std::max)(most, largest_of(width_, difference{r.x.values, rows[0].x.values, part}));
      return most;
    };
    double part = 1, most = largest(part);
    if (!is_finite(most)) part = 0.5, most = largest(part);
    if (!(most > 0)) return 0;
    std::vector<double> mean(count(width_));
    double sum = 0;
    for (std::size_t l = 0; l < rows.size(); ++l) {
      in_units<difference> move{{rows[l].x.values, rows[0].x.values, part}, width_};
      move.set(std::ilogb(most));
      auto const seen = static_cast<double>(l);
      double away2 = 0;
      for (std::ptrdiff_t j = 0; j < width_; ++j) {
        double const away = move(j) - mean[count(j)];
        away2 += away * away;
        mean[count(j)] += away / (seen + 1);
      }
      sum += away2 * (seen / (seen + 1));
    }
    return square_sum::of(sum, std::ilogb(most) + (part < 1 ? 1 : 0));
  }

  void note_norm(std::ptrdiff_t site, std::ptrdiff_t i, double value) const {
    if (sink_.norm != nullptr) sink_.norm[site * stack_.size() + i] = value;
  }

  /// Pairs with a zero row have no cosine: NaN for the token, left out of the mean.
  void note_cosine(std::ptrdiff_t pair, std::ptrdiff_t i, double value, flow_moments& m) const {
    if (sink_.part == flow_part::inter_token) return;
    if (sink_.cosine != nullptr) sink_.cosine[pair * stack_.size() + i] = value;
    if (is_finite(value)) m.cosine[count(pair)].add(value);
  }

  layer_stack<T> const& stack_;
  flow_sink const& sink_;
  std::ptrdiff_t sites_, width_;
  std::ptrdiff_t body_, padded_;  // features in whole chunks; the same with the tail's chunk
  std::ptrdiff_t first_ = 0, tokens_ = 0;  // the present group
  std::ptrdiff_t pending_ = 0;             // tokens in units_
  std::vector<T const*> rows_;             // group × S: dense rows of the group
  std::vector<T> tails_;                   // group × S × chunk: what is left of each, zero-padded
  std::vector<T> gathered_;                // group × ring × d, where features are strided
  std::vector<T> absent_;                  // zeros, for rows that do not take part
  Eigen::Array<C, Eigen::Dynamic, 1> off_;  // group × padded: how far the last row is off the mean
  Eigen::Array<C, Eigen::Dynamic, 1> units_;  // S × padded: unit vectors of the pending tokens
  Eigen::Array<C, Eigen::Dynamic, 1> zeros_;  // padded: the same before the first row
  std::vector<chain_products> products_;      // group × S
  flow_moments moments_{sites_, 0};           // of width 0: unit sums are kept below
  open_sequence sequence_;                    // the sequence under way
  open_sequence head_;                        // the one under way before these tokens
  bool has_boundary_ = false;
};

#pragma GCC diagnostic pop

}  // namespace rflow::detail
