// SPDX-License-Identifier: Apache-2.0
#pragma once

// The flow pass of a chain that arrives site by site.

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include <rflow/detail/cpu/chain.hpp>
#include <rflow/detail/cpu/chunk.hpp>
#include <rflow/detail/cpu/memory.hpp>
#include <rflow/detail/cpu/own_units.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/moments.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

// Packets are builtin vector types, whose attributes g++ reports as lost in template arguments.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

/// A chain that arrives site by site: keeps of each token under way its last two rows and how far
/// the last is off the mean of all so far, in numbered slots, and adds to the flow moments as rows
/// come.
template <class T>
class chain_stream {
 public:
  using C = compute_t<T>;
  using P = packet_t<C>;

  chain_stream(std::ptrdiff_t width, int threads)
      : width_(width),
        body_(width / chunk<T>::width * chunk<T>::width),
        padded_(body_ + (body_ < width ? chunk<T>::width : 0)),
        team_(std::make_unique<team>(threads)) {
    for (part& p : parts_) {
      p.units.resize(count(padded_));
      p.tails.resize(count(together * chunk<T>::width));
      p.gathered.resize(count(together * width_));
    }
  }

  /// Places in a row of unit sums: features in their places, up to whole chunks.
  std::ptrdiff_t padded() const { return padded_; }
  std::ptrdiff_t capacity() const { return static_cast<std::ptrdiff_t>(slots_.size()); }
  team& threads() { return *team_; }

  /// Room for this many tokens under way. Those in slots first, first + 1, … (`live` of them, modulo
  /// the old capacity) go to the slots 0, 1, …
  void resize(std::ptrdiff_t tokens, std::ptrdiff_t first = 0, std::ptrdiff_t live = 0) {
    aligned_array<T> rows[2] = {aligned_array<T>(tokens * padded_),
                                aligned_array<T>(tokens * padded_)};
    aligned_array<C> off(tokens * padded_);
    aligned_array<double> steps(tokens * blocks());
    std::vector<slot> fresh(count(tokens));
    for (std::ptrdiff_t i = 0; i < live; ++i) {
      std::ptrdiff_t const from = (first + i) % capacity();
      for (int k = 0; k < 2; ++k)
        std::copy_n(rows_[k].data() + from * padded_, padded_, rows[k].data() + i * padded_);
      std::copy_n(off_.data() + from * padded_, padded_, off.data() + i * padded_);
      std::copy_n(steps_.data() + from * blocks(), blocks(), steps.data() + i * blocks());
      fresh[count(i)] = slots_[count(from)];
    }
    for (int k = 0; k < 2; ++k) rows_[k] = std::move(rows[k]);
    off_ = std::move(off);
    steps_ = std::move(steps);
    slots_ = std::move(fresh);
  }

  /// Whether the token in a slot counts; to be said before its first row comes.
  void set_counts(std::ptrdiff_t at, bool counts) {
    slots_[count(at)] = slot{};
    slots_[count(at)].counts = counts;
  }
  bool counts(std::ptrdiff_t at) const { return slots_[count(at)].counts; }

  /// Takes rows row … row + tokens of x as the rows of `site` for the slots from `at` on. `token` is
  /// the number of the first, for positions. Unit sums in m have padded() places a site.
  void walk(view<T> const& x, std::ptrdiff_t row, std::ptrdiff_t tokens, std::ptrdiff_t site,
            std::ptrdiff_t at, std::ptrdiff_t token, flow_moments& m) {
    // As many slices as the shape gives, not as there are threads: sums stay the same.
    std::ptrdiff_t const slices = std::clamp<std::ptrdiff_t>(tokens / 32, 1, most_slices);
    double* const units = m.unit_sum.data() + site * padded_;
    team_->run(slices, [&](std::ptrdiff_t s) {
      part& mine = parts_[count(s)];
      mine.sums = {};
      if (slices > 1) std::fill(mine.units.begin(), mine.units.end(), 0.0);
      std::ptrdiff_t const begin = tokens * s / slices, end = tokens * (s + 1) / slices;
      for (std::ptrdiff_t i = begin; i < end; ++i)
        take_row(mine, x, row + i, end - i, site, at + i, token + i,
                 slices > 1 ? mine.units.data() : units);
      advance_all(mine, slices > 1 ? mine.units.data() : units);
    });
    auto const l = count(site);
    for (std::ptrdiff_t s = 0; s < slices; ++s) {
      site_sums const& sums = parts_[count(s)].sums;
      m.squares[l] += sums.squares;
      m.zero_rows[l] += sums.zero_rows;
      m.units[l] += sums.units;
      m.spread += sums.spread;
      if (site == 0) m.tokens += sums.tokens;
      if (site > 0) {
        m.steps[l - 1] += sums.steps;
        m.cosine[l - 1].merge(sums.cosine);
      }
      if (site > 1) m.turns[l - 2].merge(sums.turns);
      if (!m.non_finite[l].found()) m.non_finite[l] = sums.non_finite;
      if (slices > 1)
        for (std::ptrdiff_t j = 0; j < padded_; ++j) units[j] += parts_[count(s)].units[count(j)];
    }
  }

 private:
  // Rows that advance together: as many as have their sums in registers.
  static constexpr std::ptrdiff_t together = vector_registers >= 32 ? 4 : 2;
  static constexpr std::ptrdiff_t most_slices = 16;

  /// A token under way.
  struct slot {
    double norm2 = 0;  // of its last row
    int unit = 0;      // how far it is off its mean is in units of 2^unit
    bool counts = true;
    bool ordinary = true;                    // every row so far can be squared in C
    bool has_last = false, has_two = false;  // whether the last row, and the one before, are finite
  };

  struct site_sums {
    double tokens = 0, zero_rows = 0, units = 0;
    square_sum squares, steps, spread;
    turn_sum turns;
    running_stat cosine;
    position non_finite;
  };

  /// A row on its way: where it is and what it is measured against.
  struct moving_row {
    T const *x, *last;  // features in one piece; the row of the site before
    T* to;              // the row of the site before that, whose place this one takes
    C* off;
    double* steps;  // ‖·‖² of the last step over each block of features
    C scale;        // 1 / ‖x‖
  };

  /// Products of a row with those before it. Blocks of features whose products in C will not do are
  /// looked at again, and kept apart.
  struct row_products {
    double dot = 0, away2 = 0;
    double step2 = 0, turn = 0, before2 = 0;  // ‖a‖², ⟨a, b⟩, ‖b‖² of this step and the one before
    square_sum step_again;
    turn_sum turn_again;
  };

  /// What one slice of a push works with.
  struct part {
    site_sums sums;
    std::vector<double> units;
    std::vector<T> tails, gathered;
    // Rows that wait until there are enough of them.
    moving_row waiting[together];
    slot* whose[together];
    double norm2[together];
    std::ptrdiff_t waiting_count = 0, site = 0;
    std::ptrdiff_t next_x = 0, next_row = 0;  // from those to the rows that will be wanted next
  };

  static std::size_t count(std::ptrdiff_t n) { return static_cast<std::size_t>(n); }

  /// Where the row of a site is kept, as long as that is one of the last two.
  T* place(std::ptrdiff_t site, std::ptrdiff_t at) {
    return rows_[(site + 2) % 2].data() + at * padded_;
  }

  /// Takes one row in, the first of `left` of a slice.
  void take_row(part& mine, view<T> const& x, std::ptrdiff_t row, std::ptrdiff_t left,
                std::ptrdiff_t site, std::ptrdiff_t at, std::ptrdiff_t token, double* units) {
    slot& s = slots_[count(at)];
    if (!s.counts) return;
    std::ptrdiff_t const k = mine.waiting_count;
    T const* from = x.data + row * x.row_stride;
    if (x.col_stride != 1) {
      T* const dense = mine.gathered.data() + k * width_;
      for (std::ptrdiff_t j = 0; j < width_; ++j) dense[j] = from[j * x.col_stride];
      from = dense;
    }
    T* const tail = mine.tails.data() + k * chunk<T>::width;
    std::copy(from + body_, from + width_, tail);
    mine.sums.tokens += 1;
    double const norm2 = add_squares(from, body_) + add_squares(tail, padded_ - body_);
    s.ordinary = s.ordinary && in_range<C>(norm2);
    if (!s.ordinary) return rescue(s, from, site, at, token, units, mine.sums);

    mine.waiting[k] = {from,
                       place(site - 1, at),
                       place(site, at),
                       off_.data() + at * padded_,
                       steps_.data() + at * blocks(),
                       static_cast<C>(1 / std::sqrt(norm2))};
    std::ptrdiff_t const ahead = left > together ? together : 0;
    mine.next_x = x.col_stride == 1 ? ahead * x.row_stride : 0;
    mine.next_row = ahead * padded_;
    mine.whose[k] = &s;
    mine.norm2[k] = norm2;
    mine.site = site;
    if (++mine.waiting_count < together) return;
    mine.waiting_count = 0;
    advance<together>(mine, 0, units);
  }

  /// The rows that still wait.
  void advance_all(part& mine, double* units) {
    for (std::ptrdiff_t k = 0; k < mine.waiting_count; ++k) advance<1>(mine, k, units);
    mine.waiting_count = 0;
  }

  /// Moves ordinary rows on by one site.
  template <std::ptrdiff_t Rows>
  void advance(part& mine, std::ptrdiff_t first, double* units) {
    moving_row const* const rows = mine.waiting + first;
    row_products r[Rows];
    auto const go = [&]<int Before>(std::integral_constant<int, Before>) {
      advance_places<Rows, Before>(rows, body_, mine.next_x, mine.next_row, mine.site, units, r);
      if (body_ == padded_) return;
      moving_row tails[Rows];
      for (std::ptrdiff_t k = 0; k < Rows; ++k)
        tails[k] = {mine.tails.data() + (first + k) * chunk<T>::width,
                    rows[k].last + body_,
                    rows[k].to + body_,
                    rows[k].off + body_,
                    rows[k].steps + ceil_div(body_, block),
                    rows[k].scale};
      advance_places<Rows, Before>(tails, padded_ - body_, 0, 0, mine.site, units + body_, r);
    };
    if (mine.site == 0)
      go(std::integral_constant<int, 0>{});
    else if (mine.site == 1)
      go(std::integral_constant<int, 1>{});
    else
      go(std::integral_constant<int, 2>{});
    for (std::ptrdiff_t k = 0; k < Rows; ++k)
      add_products(*mine.whose[first + k], rows[k], r[k], mine.norm2[first + k], mine.site,
                   mine.sums);
  }

  void add_products(slot& s, moving_row const& row, row_products const& r, double norm2,
                    std::ptrdiff_t site, site_sums& sums) {
    sums.squares += norm2;
    sums.units += 1;
    if (site > 0) {
      double const cosine = r.dot / (std::sqrt(norm2) * std::sqrt(s.norm2));
      if (is_finite(cosine)) sums.cosine.add(cosine);
      double const share = share_off<double>(site);
      if (in_range<C>(r.away2)) {
        sums.spread += r.away2 * share;
      } else {
        auto const off = in_own_units(
            width_, [&](std::ptrdiff_t j) { return static_cast<double>(row.off[place_of<T>(j)]); });
        sums.spread += square_sum::of(off.square() / share, off.exponent);
      }
      sums.steps += r.step2;
      sums.steps += r.step_again;
    }
    if (site > 1) {
      double const c = r.before2 > 0 ? r.turn / r.before2 : 0;
      sums.turns.add(r.before2, c, r.step2 - c * r.turn);
      sums.turns.merge(r.turn_again);
    }
    s.norm2 = norm2;
    s.has_two = s.has_last;
    s.has_last = true;
  }

  static bool far_from_straight(double a2, double ab, double b2) {
    if constexpr (std::same_as<C, float>) return ab * ab < 0.75 * (a2 * b2);
    return ab * (ab / b2) < 0.75 * a2;  // squares of squares may leave the range of double
  }

  /// Adds the step of a row, and how it lies to the one before, over some features, from products in
  /// C if they are good. What is across a step adds up over features as it does over tokens.
  static void add_step(moving_row const& row, std::ptrdiff_t begin, std::ptrdiff_t end,
                       bool has_two, double a2, double ab, row_products& to) {
    double const b2 = std::exchange(row.steps[begin / block], a2);
    if (in_range<C>(a2) && (!has_two || (in_range<C>(b2) && far_from_straight(a2, ab, b2)))) {
      to.step2 += a2;
      if (has_two) to.turn += ab, to.before2 += b2;
      return;
    }
    look_again(row, begin, end, has_two, to);
  }

  /// Kept out of the loop that calls it, whose registers it would take.
  [[gnu::noinline]] static void look_again(moving_row const& row, std::ptrdiff_t begin,
                                           std::ptrdiff_t end, bool has_two, row_products& to) {
    row_values<T> const x{row.x + begin}, p{row.last + begin}, q{row.to + begin};
    auto const a = step_in_own_units(end - begin, x, p);
    to.step_again += square_sum::of(a.square(), a.exponent);
    if (has_two) to.turn_again.merge(turn_of(a, step_in_own_units(end - begin, p, q)));
  }

  static constexpr std::ptrdiff_t block = 64 * chunk<T>::width;  // summed in C, then in double
  std::ptrdiff_t blocks() const { return ceil_div(body_, block) + 1; }

  [[gnu::noinline]] static double add_squares(T const* x, std::ptrdiff_t places) {
    constexpr std::ptrdiff_t chains = 4;  // sums that do not wait for each other
    double total = 0;
    for (std::ptrdiff_t j = 0; j < places; j += block) {
      P sums[chains];
      for (P& sum : sums) sum = packet::pset1<P>(C(0));
      std::ptrdiff_t const end = (std::min)(places, j + block);
      std::ptrdiff_t i = j;
      auto const add = [&](P& sum) {
        chunk<T> const here = load_chunk(x + i);
        for (std::ptrdiff_t c = 0; c < chunk<T>::packets; ++c)
          sum = packet::pmadd(here.at[c], here.at[c], sum);
        i += chunk<T>::width;
      };
      while (i + chains * chunk<T>::width <= end)
        add(sums[0]), add(sums[1]), add(sums[2]), add(sums[3]);
      while (i < end) add(sums[0]);
      for (P const& sum : sums) total += static_cast<double>(packet::predux(sum));
    }
    return total;
  }

  /// Sums over a block of features, as the loop keeps them.
  template <std::ptrdiff_t Rows>
  struct loop_sums {
    P dot[Rows], step2[Rows], turn[Rows], away2[Rows];
  };

  /// Products of features begin … end of rows with those of the row before (at Before ≥ 1) and of the
  /// one before that (at Before = 2); and their unit vectors, added in double, so that it
  /// hardly matters how tokens were grouped. All in one loop: a row comes from memory, and what it
  /// meets from the outer caches, while others are worked on. Without calls, and by itself, or sums would not stay in registers.
  template <std::ptrdiff_t Rows, int Before>
  [[gnu::noinline]] static void advance_block(moving_row const* rows, std::ptrdiff_t begin,
                                              std::ptrdiff_t end, std::ptrdiff_t next_x,
                                              std::ptrdiff_t next_row, C share, double* units,
                                              loop_sums<Rows>& sums) {
    constexpr std::ptrdiff_t width = chunk<T>::width, lanes = chunk<T>::lanes;
    // Vectors of the compiler's: Eigen cannot widen packets, and as a loop this is not vectorised.
    typedef C narrow __attribute__((vector_size(lanes * sizeof(C))));
    typedef double wide __attribute__((vector_size(lanes * sizeof(double))));
    P const weight = packet::pset1<P>(share);
    moving_row row[Rows];
    std::copy_n(rows, Rows, row);
    P dot[Rows], step2[Rows], turn[Rows], away2[Rows];
    unrolled<Rows>([&](std::ptrdiff_t k) __attribute__((always_inline)) {
      dot[k] = step2[k] = turn[k] = away2[k] = packet::pset1<P>(C(0));
    });
    for (std::ptrdiff_t i = begin; i < end; i += width) {
      wide sum[chunk<T>::packets];
      std::memcpy(sum, units + i, sizeof(sum));
      unrolled<Rows>([&](std::ptrdiff_t k) __attribute__((always_inline)) {
        chunk<T> const here = load_chunk(row[k].x + i);
        chunk<T> before{}, two_before{};
        if constexpr (Before > 0) before = load_chunk(row[k].last + i);
        if constexpr (Before > 1) two_before = load_chunk(static_cast<T const*>(row[k].to + i));
        __builtin_prefetch(row[k].x + (i + next_x), 0, 2);
        if constexpr (Before > 0) __builtin_prefetch(row[k].last + (i + next_row), 0, 2);
        if constexpr (Before > 1) __builtin_prefetch(row[k].to + (i + next_row), 0, 2);
        P const scale = packet::pset1<P>(row[k].scale);
        for (std::ptrdiff_t c = 0; c < chunk<T>::packets; ++c) {
          C* const off = row[k].off + i + c * lanes;
          if constexpr (Before == 0) {
            packet::pstore(off, packet::pset1<P>(C(0)));
          } else {
            __builtin_prefetch(off + next_row, 0, 2);
            P const change = packet::psub(here.at[c], before.at[c]);
            P const away = packet::padd(change, packet::pload<P>(off));
            dot[k] = packet::pmadd(here.at[c], before.at[c], dot[k]);
            step2[k] = packet::pmadd(change, change, step2[k]);
            away2[k] = packet::pmadd(away, away, away2[k]);
            packet::pstore(off, packet::pmul(away, weight));
            if constexpr (Before > 1)
              turn[k] =
                  packet::pmadd(change, packet::psub(before.at[c], two_before.at[c]), turn[k]);
          }
          P const unit = packet::pmul(here.at[c], scale);
          sum[c] += __builtin_convertvector(std::bit_cast<narrow>(unit), wide);
        }
      });
      std::memcpy(units + i, sum, sizeof(sum));
    }
    unrolled<Rows>([&](std::ptrdiff_t k) __attribute__((always_inline)) {
      sums.dot[k] = dot[k];
      sums.step2[k] = step2[k];
      sums.turn[k] = turn[k];
      sums.away2[k] = away2[k];
    });
  }

  /// Moves `places` features of rows on, block by block. Each row then takes the place of the one two
  /// sites before.
  template <std::ptrdiff_t Rows, int Before>
  static void advance_places(moving_row const* rows, std::ptrdiff_t places, std::ptrdiff_t next_x,
                             std::ptrdiff_t next_row, std::ptrdiff_t site, double* units,
                             row_products* r) {
    for (std::ptrdiff_t j = 0; j < places; j += block) {
      loop_sums<Rows> sums;
      std::ptrdiff_t const end = (std::min)(places, j + block);
      advance_block<Rows, Before>(rows, j, end, next_x, next_row, share_off<C>(site), units, sums);
      for (std::ptrdiff_t k = 0; k < Rows; ++k) {
        r[k].dot += static_cast<double>(packet::predux(sums.dot[k]));
        r[k].away2 += static_cast<double>(packet::predux(sums.away2[k]));
        if constexpr (Before > 0)
          add_step(rows[k], j, end, Before > 1, static_cast<double>(packet::predux(sums.step2[k])),
                   static_cast<double>(packet::predux(sums.turn[k])), r[k]);
        std::memcpy(rows[k].to + j, rows[k].x + j, count(end - j) * sizeof(T));
      }
    }
  }

  /// A row of a token that cannot do with squares in C: this row or an earlier one is zero, not
  /// finite, or too large or too small. In double, in units of its own.
  void rescue(slot& s, T const* x, std::ptrdiff_t site, std::ptrdiff_t at, std::ptrdiff_t token,
              double* units, site_sums& sums) {
    row_values<T> const here{x}, last{place(site - 1, at)}, two_before{place(site - 2, at)};
    for (std::ptrdiff_t j = 0; j < width_; ++j)
      if (!is_finite(here(j))) {
        if (!sums.non_finite.found()) sums.non_finite = {token, j};
        s.has_two = s.has_last;
        s.has_last = false;
        return;
      }
    auto const own = in_own_units(width_, here);
    double const square = own.square(), norm = std::sqrt(square);
    sums.squares += square_sum::of(square, own.exponent);
    if (square > 0) {
      sums.units += 1;
      for (std::ptrdiff_t j = 0; j < width_; ++j) units[place_of<T>(j)] += own(j) / norm;
    } else {
      sums.zero_rows += 1;
    }
    if (s.has_last) {
      auto const its = in_own_units(width_, last);
      double const square_before = its.square();
      if (square > 0 && square_before > 0)
        sums.cosine.add(inner_product(own, its) / norm / std::sqrt(square_before));
      auto const a = step_in_own_units(width_, here, last);
      sums.steps += square_sum::of(a.square(), a.exponent);
      if (s.has_two) sums.turns.merge(turn_of(a, step_in_own_units(width_, last, two_before)));
    }
    move_off(s, here, last, off_.data() + at * padded_, site, sums);
    std::copy_n(x, width_, place(site, at));
    s.has_two = s.has_last;
    s.has_last = true;
  }

  /// Adds a row to the spread, and moves on how far its token is off the mean, in units of its own.
  /// Without a row before there is no such mean: it is the first, or no St2 is to come.
  void move_off(slot& s, row_values<T> const& x, row_values<T> const& last, C* off,
                std::ptrdiff_t site, site_sums& sums) const {
    if (!s.has_last) {
      std::fill_n(off, padded_, C(0));
      s.unit = 0;
      return;
    }
    double whole = 1;  // or half of everything, where the whole has no double
    auto const away = [&](std::ptrdiff_t j) {
      return x(j) * whole - last(j) * whole +
             static_cast<double>(off[place_of<T>(j)]) * std::ldexp(whole, s.unit);
    };
    double most =
        s.unit < 1000 ? largest_of(width_, away) : std::numeric_limits<double>::infinity();
    if (!is_finite(most)) whole = 0.5, most = largest_of(width_, away);
    int const unit = most > 0 ? std::ilogb(most) : 0;
    double const share = share_off<double>(site);
    double square = 0;
    for (std::ptrdiff_t j = 0; j < width_; ++j) {
      double const value = std::ldexp(away(j), -unit);
      square += value * value;
      off[place_of<T>(j)] = static_cast<C>(value * share);
    }
    s.unit = unit + (whole < 1 ? 1 : 0);
    sums.spread += square_sum::of(square * share, s.unit);
  }

  std::ptrdiff_t width_, body_, padded_;
  std::unique_ptr<team> team_;
  aligned_array<T> rows_[2];     // capacity × padded: rows of the last even and the last odd site
  aligned_array<C> off_;         // capacity × padded, features in their places
  aligned_array<double> steps_;  // capacity × blocks
  std::vector<slot> slots_;      // capacity
  part parts_[most_slices];
};

#pragma GCC diagnostic pop

}  // namespace rflow::detail
