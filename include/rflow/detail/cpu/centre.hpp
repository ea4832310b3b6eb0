// SPDX-License-Identifier: Apache-2.0
#pragma once

// The preparation of a site: its centre, the norms of its rows, its scale.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/rows.hpp>
#include <rflow/detail/numerics.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// A site, ready for its tiles. Centred, scaled values are (x·scale + minus_high) + minus_low: the
/// centre in two parts, so that subtracting it is as exact as C allows. The scale is a power of two
/// that brings the largest norm to about 1, so that nothing over- or underflows later on.
template <class C>
struct prepared_site {
  panel_source<C> source;
  C scale = 1;                  // 0 if the site is constant
  aligned_array<C> minus_high;  // d, padded with zeros to whole packets
  aligned_array<C> minus_low;
  double trace = 0, furthest = 0;  // Σ a_i and the largest
  std::vector<double> norms;       // n: a_i = ‖x_i − centre‖² · scale²
  std::vector<double> row_sums;  // n: Σ_{j≠i} ⟨x_i − c, x_j − c⟩ · scale²; empty about the mean
  position non_finite;
  bool unclear = false;  // constant as far as means in C tell; double may tell more

  /// Kernel values of scaled data times 2^exponent() are those of the data.
  int exponent() const { return scale > 0 ? -2 * std::ilogb(static_cast<double>(scale)) : 0; }
  /// The scale, or 1 of a site that has none.
  double some_scale() const { return scale > 0 ? static_cast<double>(scale) : 1; }

  /// ‖x_i − x_j‖² · scale² from the values themselves: exact where two tokens are close to each
  /// other and far from the centre.
  double distance(integer i, integer j) const {
    constexpr integer chunk = 256;
    C x[chunk], y[chunk];
    double sum = 0;
    for (integer k = 0; k < source.cols; k += chunk) {
      integer const cols = (std::min)(chunk, source.cols - k);
      source(i, 1, k, cols, x, chunk);
      source(j, 1, k, cols, y, chunk);
      for (integer c = 0; c < cols; ++c) {
        double const s = static_cast<double>(scale);
        double const apart = static_cast<double>(x[c]) * s - static_cast<double>(y[c]) * s;
        sum += apart * apart;
      }
    }
    return sum;
  }

  /// Centred, scaled values of a block of rows, filled up with zeros to whole packets of columns.
  void fetch(integer row, integer rows, integer col, integer cols, C* to, integer ld) const {
    using namespace packet;
    using P = packet_t<C>;
    source(row, rows, col, cols, to, ld);
    integer const padded = round_up(cols, lanes_v<C>);
    P const s = pset1<P>(scale);
    for (integer i = 0; i < rows; ++i) {
      C* const x = to + i * ld;
      for (integer k = cols; k < padded; ++k) x[k] = C(0);
      for (integer k = 0; k < padded; k += lanes_v<C>) {
        P const high = ploadu<P>(minus_high.data() + col + k);
        P const low = ploadu<P>(minus_low.data() + col + k);
        pstoreu(x + k, padd(pmadd(ploadu<P>(x + k), s, high), low));
      }
    }
  }
};

template <class C>
void load_zeros(void const*, integer, integer rows, integer, integer cols, C* to, integer ld) {
  for (integer i = 0; i < rows; ++i) std::fill_n(to + i * ld, cols, C(0));
}

/// Columns that are summed together: more than a compiler unrolls, so that it vectorises instead, and a
/// fixed number, so that it does at -O2.
inline constexpr integer sum_step = 32;

/// Adds four rows, `ld` apart, times 2^exponent to sums in double; `count` is a multiple of sum_step. An
/// exponent is for doubles whose sum is too large: applied by a function call, which -ffast-math
/// cannot put behind the sum.
template <class C>
void add_rows(C const* x, integer ld, integer count, int exponent, double* sums) {
  auto const add = [&](auto const& widen) {
    for (integer k = 0; k < count; k += sum_step) {
      double four[sum_step];  // sums may lie where a compiler thinks x does
      for (integer m = 0; m < sum_step; ++m) {
        C const* const at = x + k + m;
        four[m] = (widen(at[0]) + widen(at[ld])) + (widen(at[2 * ld]) + widen(at[3 * ld]));
      }
      for (integer m = 0; m < sum_step; ++m) sums[k + m] += four[m];
    }
  };
  if (exponent == 0)
    add([](C value) { return static_cast<double>(value); });
  else
    add([&](C value) { return std::ldexp(static_cast<double>(value), exponent); });
}

/// The largest |x|, lane by lane.
template <class P, class C>
P largest_of(C const* x, integer count, P largest) {
  using namespace packet;
  for (integer k = 0; k < count; k += lanes_v<C>) largest = pmax(largest, pabs(ploadu<P>(x + k)));
  return largest;
}

/// sums = the column sums of x · 2^exponent over a slice of rows; returns the largest |x|. There is room for
/// a few sums more than columns.
template <class C>
double add_columns(panel_source<C> const& x, integer row, integer rows, int exponent,
                   double* sums) {
  constexpr integer chunk = 1024;
  alignas(128) C raw[4 * chunk];
  auto largest = packet::pset1<packet_t<C>>(C(0));
  std::fill_n(sums, round_up(x.cols, sum_step), 0.);
  for (integer i = row; i < row + rows; i += 4) {
    integer const count = (std::min<integer>)(4, row + rows - i);
    if (count < 4 || i == row) std::fill_n(raw, 4 * chunk, C(0));
    for (integer k = 0; k < x.cols; k += chunk) {
      integer const cols = (std::min)(chunk, x.cols - k), padded = round_up(cols, sum_step);
      x(i, count, k, cols, raw, chunk);
      for (integer r = 0; r < 4; ++r)
        std::fill(raw + r * chunk + cols, raw + r * chunk + padded, C(0));
      add_rows(raw, chunk, padded, exponent, sums + k);
      for (integer r = 0; r < 4; ++r) largest = largest_of(raw + r * chunk, padded, largest);
    }
  }
  return static_cast<double>(packet::predux_max(largest));
}

/// ‖·‖² of the rows of a block: packets in C over a few terms, double beyond.
template <class C>
void add_norms(C const* x, integer rows, integer cols, integer ld, double* norms) {
  using namespace packet;
  using P = packet_t<C>;
  constexpr integer W = lanes_v<C>;
  for (integer i = 0; i < rows; ++i, x += ld) {
    double wide[W] = {};
    alignas(128) C narrow[W];
    for (integer k = 0; k < cols; k += 8 * W) {
      P sum = pset1<P>(C(0));
      for (integer m = k; m < (std::min)(cols, k + 8 * W); m += W) {
        P const y = ploadu<P>(x + m);
        sum = pmadd(y, y, sum);
      }
      pstore(narrow, sum);
      for (integer w = 0; w < W; ++w) wide[w] += static_cast<double>(narrow[w]);
    }
    for (double const w : wide) norms[i] += w;
  }
}

/// The first NaN or infinity of a site, if there is one.
template <class C>
position find_non_finite(panel_source<C> const& x, integer tokens) {
  constexpr integer chunk = 512;
  C raw[chunk];
  for (integer i = 0; i < tokens; ++i)
    for (integer k0 = 0; k0 < x.cols; k0 += chunk) {
      integer const cols = (std::min)(chunk, x.cols - k0);
      x(i, 1, k0, cols, raw, chunk);
      for (integer k = 0; k < cols; ++k)
        if (!is_finite(raw[k])) return {i, k0 + k};
    }
  return {};
}

/// Column means of x · 2^exponent (false if one is not finite) and the largest |x|.
template <class C>
bool find_means(team& threads, panel_source<C> const& x, integer tokens, int exponent,
                std::vector<double>& means, double& largest) {
  integer const slice = (std::max<integer>)(16, round_up(ceil_div(tokens, 32), 4));
  integer const slices = ceil_div(tokens, slice), d = x.cols, ld = round_up(d, sum_step);
  aligned_array<double> sums(slices * ld), most(slices);
  threads.run(slices, [&](integer s) {
    integer const row = s * slice;
    most[s] = add_columns(x, row, (std::min)(slice, tokens - row), exponent, sums.data() + s * ld);
  });
  means.assign(static_cast<std::size_t>(d), 0.);
  for (integer s = 0; s < slices; ++s)
    for (integer k = 0; k < d; ++k) means.data()[k] += sums[s * ld + k];
  bool finite = true;
  for (double& mean : means) {
    finite = finite && is_finite(mean);
    mean /= static_cast<double>(tokens);
  }
  largest = *std::max_element(most.data(), most.data() + slices);
  return finite;
}

/// 2^e with e kept where C has normal numbers to spare.
template <class C>
double power_of_two(int e) {
  constexpr int limit = std::numeric_limits<C>::max_exponent - 8;
  return std::ldexp(1., std::clamp(e, -limit, limit));
}

/// x times a power of two, in this order even with -ffast-math: x may be the largest of numbers.
inline double scaled(double x, double power) { return std::ldexp(x, std::ilogb(power)); }

/// Calls f(row, rows, col, cols, x, ld) with blocks of the centred values of a site, a task a group of
/// rows; columns are filled up to whole packets.
template <class C, class F>
void each_block(team& threads, prepared_site<C> const& site, integer tokens, F const& f) {
  constexpr integer group = 16, rows_at_once = 4, chunk = 1024;
  threads.run(ceil_div(tokens, group), [&](integer g) {
    alignas(128) C x[rows_at_once * chunk];
    integer const end = (std::min)((g + 1) * group, tokens), d = site.source.cols;
    for (integer row = g * group; row < end; row += rows_at_once)
      for (integer k = 0; k < d; k += chunk) {
        integer const rows = (std::min)(rows_at_once, end - row), cols = (std::min)(chunk, d - k);
        site.fetch(row, rows, k, cols, x, chunk);
        f(row, rows, k, round_up(cols, lanes_v<C>), x, chunk);
      }
  });
}

/// The centred values of a site, which must outlive it.
template <class C>
panel_source<C> centred_source(prepared_site<C> const& site) {
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& of = *static_cast<prepared_site<C> const*>(self);
    constexpr integer chunk = 1024;
    alignas(128) C x[chunk + lanes_v<C>];  // fetch() fills up whole packets
    for (integer i = 0; i < rows; ++i)
      for (integer k = 0; k < cols; k += chunk) {
        integer const count = (std::min)(chunk, cols - k);
        of.fetch(row + i, 1, col + k, count, x, chunk);
        std::copy_n(x, count, to + i * ld + k);
      }
  };
  return {&site, load, site.source.cols};
}

/// high + low += x, as if exact. With -ffast-math low stays 0.
/// @see Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B
inline void add_in_two(double x, double& high, double& low) {
  double const sum = high + x, part = sum - high;
  low += (high - (sum - part)) + (x - part);
  high = sum;
}

/// Moves the centre of a site from the mean to the mean of the tokens whose norms are at most `limit`.
template <class C>
void centre_among(team& threads, prepared_site<C>& site, integer tokens, double limit) {
  struct part {  // the closer tokens alone, centred at the mean so far
    prepared_site<C> const* site;
    std::vector<integer> closer;
  };
  part const from{&site, [&] {
                    std::vector<integer> closer;
                    for (integer i = 0; i < tokens; ++i)
                      if (site.norms.data()[i] <= limit) closer.push_back(i);
                    return closer;
                  }()};
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& p = *static_cast<part const*>(self);
    constexpr integer chunk = 1024;
    alignas(128) C x[chunk + lanes_v<C>];  // fetch() fills up whole packets
    for (integer i = 0; i < rows; ++i)
      for (integer k = 0; k < cols; k += chunk) {
        integer const count = (std::min)(chunk, cols - k);
        p.site->fetch(p.closer.data()[row + i], 1, col + k, count, x, chunk);
        std::copy_n(x, count, to + i * ld + k);
      }
  };
  integer const d = site.source.cols, closer = static_cast<integer>(from.closer.size());
  std::vector<double> moved;
  double ignored;
  find_means(threads, panel_source<C>{&from, load, d}, closer, 0, moved, ignored);
  for (integer k = 0; k < d; ++k) {
    double const high = static_cast<double>(site.minus_high[k]);
    double const low = static_cast<double>(site.minus_low[k]) - moved.data()[k];
    site.minus_high[k] = static_cast<C>(high + low);
    site.minus_low[k] = static_cast<C>((high - static_cast<double>(site.minus_high[k])) + low);
  }
  // The sums of the values as they are rounded now: what the rows of the kernel matrix add up to. In two
  // parts, for of a token far out only the others' are left.
  constexpr integer columns = 256;
  std::vector<double> high(static_cast<std::size_t>(d)), low(high.size());
  threads.run(ceil_div(d, columns), [&](integer part) {
    alignas(128) C x[columns + lanes_v<C>];
    integer const k = part * columns, count = (std::min)(columns, d - k);
    for (integer i = 0; i < tokens; ++i) {
      site.fetch(i, 1, k, count, x, columns);
      for (integer c = 0; c < count; ++c)
        add_in_two(static_cast<double>(x[c]), high.data()[k + c], low.data()[k + c]);
    }
  });
  std::fill(site.norms.begin(), site.norms.end(), 0.);
  site.row_sums.assign(static_cast<std::size_t>(tokens), 0.);
  each_block(threads, site, tokens,
             [&](integer row, integer rows, integer k, integer cols, C const* x, integer ld) {
               add_norms(x, rows, cols, ld, site.norms.data() + row);
               for (integer i = 0; i < rows; ++i) {
                 double sum = 0;
                 for (integer c = 0; c < (std::min)(cols, d - k); ++c) {
                   double const value = static_cast<double>(x[i * ld + c]);
                   sum += value * ((high.data()[k + c] - value) + low.data()[k + c]);
                 }
                 site.row_sums.data()[row + i] += sum;
               }
             });
}

/// @param  about_mean  centre at the mean even if tokens far out drag it along
template <class C>
prepared_site<C> prepare(team& threads, panel_source<C> const& source, integer tokens,
                         bool about_mean = true) {
  prepared_site<C> site;
  site.source = source;
  integer const d = source.cols;
  site.norms.assign(static_cast<std::size_t>(tokens), 0.);
  site.minus_high = aligned_array<C>(round_up(d, lanes_v<C>) + lanes_v<C>, C(0));
  site.minus_low = aligned_array<C>(round_up(d, lanes_v<C>) + lanes_v<C>, C(0));
  auto const drop = [&] {  // a site of zeros
    site.scale = 0;
    site.source.load = load_zeros<C>;
    std::fill_n(site.minus_high.data(), d, C(0));
    std::fill_n(site.minus_low.data(), d, C(0));
  };

  std::vector<double> means;
  double largest = 0;
  int down = 0;
  if (!find_means(threads, source, tokens, down, means, largest)) {
    site.non_finite = find_non_finite(source, tokens);
    if (site.non_finite.found()) {
      drop();
      return site;
    }
    down = -64;  // finite doubles whose sum is not
    find_means(threads, source, tokens, down, means, largest);
  }

  // A first scale, by which the centred values are at most 2 or so: their norms are safe in C.
  if (!(largest > 0)) {
    drop();
    return site;
  }
  double scale = power_of_two<C>(-std::ilogb(largest) - 1);
  for (integer k = 0; k < d; ++k) {
    double const mean = std::ldexp(means.data()[k], std::ilogb(scale) - down);
    site.minus_high[k] = static_cast<C>(-mean);
    site.minus_low[k] = static_cast<C>(-mean - static_cast<double>(site.minus_high[k]));
  }
  site.scale = static_cast<C>(scale);
  if constexpr (std::is_same_v<C, double>) {
    // Sums of values far from the origin have lost digits: what is left of the means goes, too.
    double ignored;
    find_means(threads, centred_source(site), tokens, 0, means, ignored);
    for (integer k = 0; k < d; ++k) site.minus_low[k] -= means.data()[k];
  }
  each_block(threads, site, tokens,
             [&](integer row, integer rows, integer, integer cols, C const* x, integer ld) {
               add_norms(x, rows, cols, ld, site.norms.data() + row);
             });

  // What the rounding of the means alone may leave is a constant site, not a signal.
  double const rounding = rounding_of_means<C>(tokens) * scaled(largest, scale);
  double norm = 0;
  for (double const a : site.norms) site.trace += a, norm = (std::max)(norm, a);
  if (norm <= rounding * rounding * static_cast<double>(d)) {
    site.unclear = !std::is_same_v<C, double> && norm > 0;
    std::fill(site.norms.begin(), site.norms.end(), 0.);
    drop();
    return site;
  }
  std::vector<double> scratch;
  if (double const limit = centre_limit(site.norms, site.trace, norm, scratch);
      !about_mean && is_finite(limit)) {
    centre_among(threads, site, tokens, limit);
    norm = *std::max_element(site.norms.begin(), site.norms.end());
  }
  double const wanted = scale * std::ldexp(1., -std::ilogb(norm) / 2);
  double const most = power_of_two<C>(std::numeric_limits<C>::max_exponent - std::ilogb(largest));
  double const final_scale = (std::max)(
      (std::min)((std::min)(wanted, most), power_of_two<C>(1 << 20)), power_of_two<C>(-(1 << 20)));
  double const rescale = final_scale / scale;
  for (integer k = 0; k < d; ++k) {
    site.minus_high[k] = static_cast<C>(static_cast<double>(site.minus_high[k]) * rescale);
    site.minus_low[k] = static_cast<C>(static_cast<double>(site.minus_low[k]) * rescale);
  }
  site.trace = 0;
  for (double& a : site.norms) site.trace += a *= rescale * rescale;
  site.furthest = norm * rescale * rescale;
  for (double& r : site.row_sums) r *= rescale * rescale;
  site.scale = static_cast<C>(final_scale);
  return site;
}

template <class C>
std::vector<prepared_site<C>> prepare_all(team& threads,
                                          std::vector<panel_source<C>> const& sources,
                                          integer tokens, bool about_mean) {
  std::vector<prepared_site<C>> sites;
  for (auto const& source : sources) sites.push_back(prepare(threads, source, tokens, about_mean));
  return sites;
}

}  // namespace rflow::detail
