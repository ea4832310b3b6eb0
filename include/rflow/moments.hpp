// SPDX-License-Identifier: Apache-2.0
#pragma once

// The moments: small host-side sums over tokens, all in double, to which a backend reduces
// activations and from which every metric is plain arithmetic. Each kind of moment carries the
// merges that are exact for it; the types keep apart what does not add.

#include <algorithm>
#include <cmath>  // std::sqrt, std::ldexp, std::atan2
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <rflow/view.hpp>

namespace rflow {

/// A sum of squares that may leave the range of double: value · 4^exponent. The exponent is 0 as long
/// as the sum is in range. Reads as a double: 0 or infinity where it has none.
struct square_sum {
  double value = 0;  ///< at least 0
  int exponent = 0;  ///< of 4

  constexpr square_sum() = default;
  /// @param v, e  v · 4^e
  constexpr square_sum(double v, int e = 0) : value(v), exponent(e) {}

  /// v · 4^e with exponent 0 if that is well within the range of double.
  static square_sum of(double v, int e) {
    if (!(v > 0) || !detail::is_finite(v)) return v;
    int const part = std::ilogb(v) / 2;
    if (std::abs(part + e) < 450) return std::ldexp(v, 2 * e);
    return {std::ldexp(v, -2 * part), e + part};
  }
  /// a · b, at least 0, of any finite factors.
  static square_sum product(double a, double b) {
    int i = 0, j = 0;
    double const v = std::frexp(a, &i) * std::frexp(b, &j);
    bool const odd = (i + j) % 2 != 0;
    return of(odd ? v / 2 : v, (i + j + (odd ? 1 : 0)) / 2);
  }

  /// Adds another sum.
  void operator+=(square_sum more) {
    if (exponent != more.exponent && more.value > 0) {
      int const top = value > 0 ? (std::max)(exponent, more.exponent) : more.exponent;
      value = value > 0 ? std::ldexp(value, 2 * (exponent - top)) : 0;
      more.value = std::ldexp(more.value, 2 * (more.exponent - top));
      exponent = top;
    }
    value += more.value;
  }

  /// As a double.
  operator double() const { return exponent == 0 ? value : std::ldexp(value, 2 * exponent); }
};

/// a · b.
inline square_sum times(square_sum a, square_sum b) {
  square_sum const mantissas = square_sum::product(a.value, b.value);
  return square_sum::of(mantissas.value, mantissas.exponent + a.exponent + b.exponent);
}

/// Count, mean and centred second moment of a stream; merges without cancellation.
/// @see Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, equation 1.5
struct running_stat {
  double count = 0;   ///< values seen
  double mean = 0;    ///< of them
  square_sum m2 = 0;  ///< sum of their squared distances from the mean

  /// One more value.
  void add(double x) {
    count += 1;
    double const delta = x - mean;
    mean += delta / count;
    m2 += product(delta, x - mean);
  }
  /// The values of another stream.
  void merge(running_stat const& other) {
    if (other.count == 0) return;
    double const total = count + other.count;
    double const delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2;
    m2 += product(delta, delta * (count * (other.count / total)));
    count = total;
  }
  /// Standard deviation of the values seen (divided by their number), at least 0.
  double stddev() const {
    return count > 0 ? std::ldexp(std::sqrt(m2.value / count), m2.exponent) : 0;
  }

 private:
  static square_sum product(double a, double b) {
    double const ab = a * b;
    return ab > 1e-290 && ab < 1e290 ? square_sum(ab) : square_sum::product(a, b);
  }
};

/// How two steps a and b of n tokens lie to each other, as sums that keep small angles: with
/// a_t = c_t b_t + r_t, r_t orthogonal to b_t, all of a is mean · b and what is orthogonal to it.
struct turn_sum {
  double weight = 0;  ///< Σ‖b_t‖², times 4^before
  double mean = 0;    ///< Σ⟨a_t, b_t⟩ / Σ‖b_t‖², times 2^(after − before)
  double away2 = 0;   ///< ‖a − mean · b‖², times 4^after
  int before = 0;     ///< exponent of b; 0 but for steps far from 1
  int after = 0;      ///< exponent of a

  /// One token, in units of 1.
  /// @param b2     ‖b_t‖²
  /// @param c      ⟨a_t, b_t⟩ / ‖b_t‖², or anything if b_t is 0
  /// @param rest2  ‖a_t − c b_t‖², or ‖a_t‖²
  void add(double b2, double c, double rest2) {
    if (before != 0 || after != 0) return merge({b2, b2 > 0 ? c : 0, rest2});
    if (b2 > 0) add_along(b2, c);
    away2 += rest2;
  }
  /// Other tokens. What is too small beside the others to count is dropped.
  void merge(turn_sum other) {
    if (other.before != before || other.after != after) {
      int const b = common(before, weight, other.before, other.weight);
      int const a = common(after, size2(), other.after, other.size2());
      move_to(b, a);
      other.move_to(b, a);
    }
    if (other.weight > 0) add_along(other.weight, other.mean);
    away2 += other.away2;
  }
  /// Goes back to units of 1 where the sums are well within the range of double.
  void settle() {
    if (std::abs(before) < 400 && std::abs(after) < 400) move_to(0, 0);
  }
  /// The angle between a and b, in [0, π]. Neither may be 0.
  double angle() const { return std::atan2(std::sqrt(away2), mean * std::sqrt(weight)); }

 private:
  double size2() const { return away2 + mean * (mean * weight); }

  static int common(int mine, double value, int its, double its_value) {
    if (!(its_value > 0)) return mine;
    return value > 0 ? (std::max)(mine, its) : its;
  }
  void move_to(int b, int a) {
    if (before - b < -500) {  // b is nothing beside the others': all of a is across
      away2 = size2();
      weight = mean = 0;
    }
    weight = weight > 0 ? std::ldexp(weight, 2 * (before - b)) : 0;
    mean = weight > 0 ? std::ldexp(mean, after - a - (before - b)) : 0;
    away2 = std::ldexp(away2, 2 * (after - a));
    before = b;
    after = a;
  }
  void add_along(double b2, double c) {
    double const total = weight + b2, delta = c - mean;
    // From the heavier side: the mean of a light one may be out of all proportion.
    mean = b2 > weight ? c - delta * (weight / total) : mean + delta * (b2 / total);
    // Grouped so as not to leave the range: the light one may be 1e-300 of the heavy one.
    away2 += delta * (delta * ((std::min)(weight, b2) * ((std::max)(weight, b2) / total)));
    weight = total;
  }
};

/// Everything that flow() knows about a chain of S sites, from one read. Adds over tokens.
///
/// Inter-token sums live in the open sequence until end_sequence() closes it, because the unit
/// vectors of one sequence add but their squared norm does not.
struct flow_moments {
  std::ptrdiff_t sites = 0;  ///< S
  std::ptrdiff_t width = 0;  ///< d
  double tokens = 0;         ///< n, those that count

  std::vector<square_sum> squares;            ///< S: Σ_t ‖x_t‖²
  std::vector<double> zero_rows;              ///< S: tokens with x_t = 0
  std::vector<double> unit_sum;               ///< S × d: Σ x_t/‖x_t‖ over the open sequence
  std::vector<double> units;                  ///< S: number of terms in it
  std::vector<double> pair_cosines;           ///< S: Σ_{i≠j} cos(x_i, x_j) over closed sequences
  std::vector<double> pairs;                  ///< S: number of those ordered pairs
  std::vector<running_stat> sequence_cosine;  ///< S: mean pair cosine of each closed sequence
  std::vector<running_stat> cosine;           ///< S − 1: cos(x_l,t , x_l+1,t)
  std::vector<square_sum> steps;              ///< S − 1: Σ_t ‖Δ_l,t‖²
  std::vector<turn_sum> turns;                ///< S − 2: Δ_l+1 against Δ_l
  square_sum spread = 0;                      ///< Σ_t Σ_l ‖x_l,t − x̄_t‖²
  std::vector<position> non_finite;           ///< S: first NaN or infinity

  flow_moments() = default;
  /// Of no tokens.
  flow_moments(std::ptrdiff_t site_count, std::ptrdiff_t hidden)
      : sites(site_count), width(hidden) {
    auto const s = static_cast<std::size_t>(site_count);
    squares.resize(s);
    zero_rows.resize(s);
    unit_sum.resize(s * static_cast<std::size_t>(hidden));
    units.resize(s);
    pair_cosines.resize(s);
    pairs.resize(s);
    sequence_cosine.resize(s);
    cosine.resize(s - 1);
    steps.resize(s - 1);
    turns.resize(s > 2 ? s - 2 : 0);
    non_finite.resize(s);
  }

  /// Closes the open sequence: its tokens pair with none that come later.
  void end_sequence() {
    for (std::size_t l = 0; l < units.size(); ++l) {
      double const m = units[l];
      double norm2 = 0;
      for (std::ptrdiff_t j = 0; j < width; ++j) {
        double& u = unit_sum[l * static_cast<std::size_t>(width) + static_cast<std::size_t>(j)];
        norm2 += u * u;
        u = 0;
      }
      end_sequence(l, norm2, m);
      units[l] = 0;
    }
  }

  /// The same for one site of a sequence that was summed elsewhere.
  /// @param site   which
  /// @param norm2  ‖Σ x_t/‖x_t‖‖² over its tokens
  /// @param m      how many of them are not zero
  void end_sequence(std::size_t site, double norm2, double m) {
    pair_cosines[site] += norm2 - m;
    pairs[site] += m * (m - 1);
    if (m >= 2) sequence_cosine[site].add((norm2 - m) / (m * (m - 1)));
  }

  /// Adds the moments of other tokens of the same chain. Open sequences are taken to be parts of
  /// one sequence; close one first if they are not. `first_token` shifts the positions of `other`.
  /// @throws std::invalid_argument if sites or width disagree
  void merge(flow_moments const& other, std::ptrdiff_t first_token = 0) {
    if (sites != other.sites || width != other.width)
      detail::reject("rflow::flow_moments::merge",
                     std::to_string(sites) + " sites x " + std::to_string(width) + " and " +
                         std::to_string(other.sites) + " sites x " + std::to_string(other.width));
    auto const add = [](auto& to, auto const& from) {
      for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
    };
    tokens += other.tokens;
    spread += other.spread;
    add(squares, other.squares);
    add(zero_rows, other.zero_rows);
    add(unit_sum, other.unit_sum);
    add(units, other.units);
    add(pair_cosines, other.pair_cosines);
    add(pairs, other.pairs);
    add(steps, other.steps);
    for (std::size_t l = 0; l < turns.size(); ++l) turns[l].merge(other.turns[l]);
    for (std::size_t l = 0; l < cosine.size(); ++l) cosine[l].merge(other.cosine[l]);
    for (std::size_t l = 0; l < non_finite.size(); ++l) {
      sequence_cosine[l].merge(other.sequence_cosine[l]);
      position at = other.non_finite[l];
      if (!at.found()) continue;
      at.token += first_token;
      if (!non_finite[l].found() || at.token < non_finite[l].token) non_finite[l] = at;
    }
  }
};

/// What of the flow moments is asked for. A backend may leave the rest at 0, and need not: moments of
/// a part are not to be merged with those of all.
enum class flow_part {
  all,          ///< everything
  inter_token,  ///< cosines between the tokens of a site, and what says why there are none; no
                ///< cosines in the sink
  adjacent,     ///< cosines between neighbouring sites, and what says why there are none
};

/// What is wanted of flow(), and where it leaves its per-token values, each S × n or S − 1 × n in row-major
/// order; null where not wanted. Per-token values are concatenated over shards, not added.
struct flow_sink {
  double* cosine = nullptr;  ///< (S − 1) × n: cos(x_l,t , x_l+1,t); NaN if either row is 0
  double* norm = nullptr;    ///< S × n: ‖x_l,t‖
  flow_part part = flow_part::all;  ///< which moments
};

// ---- Gram moments -------------------------------------------------------------------------------

/// k(x, y) = ⟨x, y⟩ on centred features.
struct linear {
  /// All are alike.
  bool operator==(linear const&) const = default;
};

/// k(x, y) = exp(−‖x − y‖² / 2σ²) with σ² = fraction² · median of the squared distances.
///
/// The median is taken over all tokens if there are at most 512, else over 512 evenly strided ones.
struct rbf {
  /// Which squared distances: every (i, j) with the zeros of the diagonal (Kornblith's code, and
  /// the published numbers), or each pair once.
  enum class median { all_pairs, upper_triangle };

  double fraction = 1;                    ///< of the median distance: positive, finite
  median convention = median::all_pairs;  ///< which distances
  std::vector<double> sigma = {};         ///< one σ a site, to use instead of the median's
};

namespace detail {

/// @throws std::invalid_argument if the kernel has bandwidths for another number of sites, or none and
///         a fraction that is no factor. A given σ that is no width leaves its site without a value
inline void require_bandwidths(char const* where, rbf const& kernel, std::ptrdiff_t sites) {
  auto const given = static_cast<std::ptrdiff_t>(kernel.sigma.size());
  if (given != 0 && given != sites)
    reject(where, std::to_string(given) + " bandwidths for " + std::to_string(sites) + " sites");
  if (given == 0 && !(kernel.fraction > 0 && is_finite(kernel.fraction)))
    reject(where, "an RBF fraction of " + std::to_string(kernel.fraction) +
                      ", not a positive finite number");
}

}  // namespace detail

/// A kernel of your own: k(⟨x, y⟩, ‖x‖², ‖y‖²) on centred features, in double. Called for every pair
/// of tokens of every site, so it decides the speed.
template <class F>
concept pair_kernel = requires(F const& k, double x) {
  { k(x, x, x) } -> std::convertible_to<double>;
};

/// How a backend forms the Gram moments of a linear kernel.
enum class gram_path {
  automatic,  ///< whichever takes fewer operations
  gram,       ///< n × n kernel matrices, in tiles
  feature,    ///< d × d cross-covariances; no squares per token
};

/// One of several parts of the same work: the `index`-th (from 0) of `of`.
struct work_share {
  int index = 0;  ///< which part
  int of = 1;     ///< how many there are
};

/// Sums over pairs of tokens of the kernel matrices G^0 … G^{S−1} of S sites over the same n tokens.
///
/// G^p is the kernel matrix of site p up to a matrix u_i + u_j, which centring removes: backends
/// subtract what makes the sums exact (row means for linear, a constant for RBF).
///
/// Shares of the same tokens' work add to these sums, by merge(); other tokens do not (see
/// minibatch_moments). In a share products, row_sums, squares, square_sum and what p-values need are
/// parts of the whole, everything else is as in the whole.
struct gram_moments {
  std::ptrdiff_t sites = 0;      ///< S
  std::ptrdiff_t tokens = 0;     ///< n
  std::vector<double> products;  ///< S × S: Σ_{i≠j} G^p_ij G^q_ij
  std::vector<double> row_sums;  ///< S × n: Σ_{j≠i} G^p_ij
  std::vector<double> diagonal;  ///< S × n: G^p_ii
  std::vector<double>
      squares;  ///< S × n: Σ_{j≠i} k(x_i, x_j)² of centred features; where the path has no
                ///< tiles, of the tokens with the largest norms, else 0
  std::vector<double> square_sum;  ///< S: Σ of all of those, of tokens that squares leaves out, too
  std::vector<double> entry_rounding;  ///< S: what rounding makes of ‖G^p‖_F without its diagonal
  std::vector<double> sum_rounding;    ///< S: what rounding makes of a product beyond that
  std::vector<int>
      exponent;         ///< S: G^p · 2^exponent is in units of the data. 0, but for data whose
                        ///< fourth powers would leave the range of double
  double epsilon = 0;   ///< unit roundoff of the products
  double accuracy = 0;  ///< how far a self term may be off, relative to itself, and still count
  std::vector<double> sigma;      ///< S, for kernels with a bandwidth
  std::vector<double> cubes;      ///< S: Σ U_ij³ / ‖U‖³, U = U(G^p); empty unless asked for
  std::vector<double> triangles;  ///< S: tr U³ / ‖U‖³; the same
  std::vector<double>
      shuffles;  ///< S × what of U/‖U‖ p-values need (see statistics.hpp); the same,
                 ///< and empty for at most 8 tokens
  std::vector<double>
      heavy_rows;  ///< S × 4 × n: the rows of U/‖U‖ of its three heaviest tokens, and the squares of the
                   ///< others' rows; S × n × n, U/‖U‖, for at most 8 tokens; the same
  std::vector<double> shifts;  ///< S × S × n: Σ_ij U^p_ij U^q_{i+s,j+s}, indices modulo n, over
                               ///< ‖U^p‖ ‖U^q‖; empty unless asked for, and not in shares
  gram_path path = gram_path::gram;  ///< how they came about
  std::vector<std::uint8_t> shares{
      1};                   ///< one a share of the work: whether the sums have it (else 0)
  std::vector<status> why;  ///< S: ok, constant_layer, zero_bandwidth or non_finite; in shares
                            ///< ill_conditioned where float cannot tell whether it is constant
  std::vector<position> non_finite;  ///< S: first NaN or infinity

  gram_moments() = default;
  /// All sums zero.
  gram_moments(std::ptrdiff_t site_count, std::ptrdiff_t token_count)
      : sites(site_count), tokens(token_count) {
    auto const s = static_cast<std::size_t>(site_count);
    auto const n = static_cast<std::size_t>(token_count);
    products.resize(s * s);
    row_sums.resize(s * n);
    diagonal.resize(s * n);
    square_sum.resize(s);
    entry_rounding.resize(s);
    sum_rounding.resize(s);
    exponent.resize(s);
    why.resize(s, status::ok);
    non_finite.resize(s);
  }

  /// Adds other shares of the work on the same tokens.
  /// @throws std::invalid_argument if it is other work as far as sizes, units, bandwidths and the
  ///         diagonals of the kernel matrices tell, or if both have the same share
  void merge(gram_moments const& other) {
    constexpr char const* where = "rflow::gram_moments::merge";
    auto const what = [](gram_moments const& m) {
      return std::to_string(m.sites) + " sites x " + std::to_string(m.tokens) + " tokens, in " +
             std::to_string(m.shares.size()) + " shares";
    };
    bool same = sites == other.sites && tokens == other.tokens && path == other.path &&
                shares.size() == other.shares.size() && squares.size() == other.squares.size() &&
                cubes.size() == other.cubes.size() && sigma == other.sigma &&
                exponent == other.exponent && epsilon == other.epsilon &&
                accuracy == other.accuracy && why == other.why;
    for (std::size_t i = 0; same && i < diagonal.size(); ++i)  // a NaN is unequal to itself
      same = !(diagonal[i] < other.diagonal[i]) && !(diagonal[i] > other.diagonal[i]);
    if (!same)
      detail::reject(where, "not shares of the same work: " + what(*this) + ", and " + what(other));
    for (std::size_t k = 0; k < shares.size(); ++k)
      if (shares[k] != 0 && other.shares[k] != 0)
        detail::reject(where, "share " + std::to_string(k) + " of " +
                                  std::to_string(shares.size()) + " is in both");
    for (std::size_t k = 0; k < shares.size(); ++k) shares[k] |= other.shares[k];
    for (auto const of : {&gram_moments::products, &gram_moments::row_sums, &gram_moments::squares,
                          &gram_moments::square_sum, &gram_moments::cubes, &gram_moments::triangles,
                          &gram_moments::shuffles, &gram_moments::heavy_rows})
      for (std::size_t i = 0; i < (this->*of).size(); ++i) (this->*of)[i] += (other.*of)[i];
  }

  /// Whether no share of the work is missing.
  bool whole() const { return std::find(shares.begin(), shares.end(), 0) == shares.end(); }

  /// Σ_{i≠j} G^p_ij G^q_ij.
  double product(std::ptrdiff_t p, std::ptrdiff_t q) const {
    return products[static_cast<std::size_t>(p * sites + q)];
  }

  /// ⟨HK_pH, HK_qH⟩, H = I − 11ᵀ/n.
  double h_product(std::ptrdiff_t p, std::ptrdiff_t q) const {
    auto const n = static_cast<std::size_t>(tokens);
    double diagonals = 0, rows = 0, total_p = 0, total_q = 0;
    for (std::size_t i = 0; i < n; ++i) {
      double const dp = diagonal[static_cast<std::size_t>(p) * n + i];
      double const dq = diagonal[static_cast<std::size_t>(q) * n + i];
      double const rp = row_sums[static_cast<std::size_t>(p) * n + i] + dp;
      double const rq = row_sums[static_cast<std::size_t>(q) * n + i] + dq;
      diagonals += dp * dq;
      rows += rp * rq;
      total_p += rp;
      total_q += rq;
    }
    double const count = static_cast<double>(n);
    return product(p, q) + diagonals - 2 / count * rows + total_p * total_q / (count * count);
  }

  /// ⟨U(K_p), U(K_q)⟩ of the U-centred kernel matrices, for n ≥ 4.
  double u_product(std::ptrdiff_t p, std::ptrdiff_t q) const {
    auto const n = static_cast<std::size_t>(tokens);
    double rows = 0, total_p = 0, total_q = 0;
    for (std::size_t i = 0; i < n; ++i) {
      double const rp = row_sums[static_cast<std::size_t>(p) * n + i];
      double const rq = row_sums[static_cast<std::size_t>(q) * n + i];
      rows += rp * rq;
      total_p += rp;
      total_q += rq;
    }
    double const count = static_cast<double>(n);
    return product(p, q) + total_p * total_q / ((count - 1) * (count - 2)) - 2 / (count - 2) * rows;
  }

  /// Whether a self term of site p, in the moments' units, is known to `accuracy`: ok, ill_conditioned, or
  /// constant_layer if it is no more than rounding.
  status resolved(std::ptrdiff_t p, double self) const {
    auto const s = static_cast<std::size_t>(p);
    double const norm = std::sqrt((std::max)(self, 0.)), entries = entry_rounding[s];
    double const sums = sum_rounding[s] + 2 * epsilon * std::abs(product(p, p));
    if (!(norm > 4 * entries && self > sums)) return status::constant_layer;
    return known(p, norm) && sums <= accuracy * self ? status::ok : status::ill_conditioned;
  }

  /// Whether rounding leaves entries of this norm known to `accuracy`.
  bool known(std::ptrdiff_t p, double norm) const {
    return entry_rounding[static_cast<std::size_t>(p)] <= accuracy * norm;
  }

  /// Whether every site has a debiased self term to `accuracy`, with fewer than 4 tokens a biased one, and the
  /// tokens' shares of its kernel matrix.
  bool resolved() const {
    bool all = true;
    for (std::ptrdiff_t p = 0; p < sites && tokens >= 2; ++p) {
      all = all && why[static_cast<std::size_t>(p)] != status::ill_conditioned;
      if (why[static_cast<std::size_t>(p)] != status::ok) continue;
      double const squares_of_all = square_sum[static_cast<std::size_t>(p)];
      all = all && resolved(p, tokens < 4 ? h_product(p, p) : u_product(p, p)) == status::ok &&
            (squares_of_all == 0 || known(p, std::sqrt(squares_of_all)));
    }
    return all;
  }

  /// tr(HK_pH), H = I − 11ᵀ/n.
  double centred_trace(std::ptrdiff_t p) const {
    double diagonals = 0, total = 0;
    for (auto i = static_cast<std::size_t>(p * tokens);
         i < static_cast<std::size_t>((p + 1) * tokens); ++i) {
      diagonals += diagonal[i];
      total += row_sums[i] + diagonal[i];
    }
    return diagonals - total / static_cast<double>(tokens);
  }
};

/// How batches of different size count in minibatch CKA.
enum class batch_weight {
  pairs,  ///< by n(n − 3): the unnormalised sums
  equal,  ///< each batch the same
  rows,   ///< by n
};

/// Weighted sums over batches of ⟨U(K_p), U(K_q)⟩ of linear or other kernels.
/// They add over batches, shards and ranks; their ratio is minibatch CKA (see cka_accumulator).
struct minibatch_moments {
  std::ptrdiff_t sites = 0;                   ///< S
  std::ptrdiff_t tokens = 0;                  ///< in all batches that count
  std::ptrdiff_t batches = 0;                 ///< that count
  std::ptrdiff_t left_out = 0;                ///< batches of fewer than 4 tokens
  batch_weight weight = batch_weight::pairs;  ///< how batches of different size count
  std::vector<double> sums;  ///< S × S: times 2^(exponent_p + exponent_q), in units of the data
  std::vector<double> rounding;  ///< S: what rounding alone may make of a sum of a site with itself
  std::vector<double> error;     ///< S: how far that sum may be off
  double accuracy = 0;           ///< how far it may be off, relative to itself, and still count
  std::vector<int> exponent;  ///< S: 0, but for data whose fourth powers leave the range of double
  std::vector<status> why;    ///< S: ok, zero_bandwidth or non_finite

  minibatch_moments() = default;
  /// Of no batches.
  explicit minibatch_moments(std::ptrdiff_t site_count, batch_weight by = batch_weight::pairs)
      : sites(site_count), weight(by) {
    auto const s = static_cast<std::size_t>(site_count);
    sums.resize(s * s);
    rounding.resize(s);
    error.resize(s);
    exponent.resize(s);
    why.resize(s, status::ok);
  }

  /// Adds what was seen elsewhere. Moments of no sites yet take up those of the other.
  /// @throws std::invalid_argument if sites or weights differ
  void merge(minibatch_moments const& other) {
    constexpr char const* where = "rflow::minibatch_moments::merge";
    if (weight != other.weight) detail::reject(where, "batches are weighted differently");
    left_out += other.left_out;
    if (other.sites == 0) return;
    if (sites == 0) {
      std::ptrdiff_t const short_ones = left_out;
      *this = other;
      left_out = short_ones;
      return;
    }
    if (sites != other.sites)
      detail::reject(where,
                     std::to_string(sites) + " and " + std::to_string(other.sites) + " sites");
    for (std::ptrdiff_t p = 0; p < sites; ++p)
      if (other.holds(p)) raise(p, other.exponent[static_cast<std::size_t>(p)]);
    auto const raised = [&](std::size_t p) { return other.exponent[p] - exponent[p]; };
    std::size_t const s = why.size();
    for (std::size_t p = 0; p < s; ++p) {
      for (std::size_t q = 0; q < s; ++q)
        sums[p * s + q] += std::ldexp(other.sums[p * s + q], raised(p) + raised(q));
      rounding[p] += std::ldexp(other.rounding[p], 2 * raised(p));
      error[p] += std::ldexp(other.error[p], 2 * raised(p));
      if (why[p] == status::ok) why[p] = other.why[p];
    }
    accuracy = (std::max)(accuracy, other.accuracy);
    tokens += other.tokens;
    batches += other.batches;
  }

  /// The sum of a site with itself.
  double self(std::ptrdiff_t p) const { return sums[static_cast<std::size_t>(p * (sites + 1))]; }

  /// Whether there is a sum of site p, or what rounding may make of one, in its units.
  bool holds(std::ptrdiff_t p) const {
    return self(p) != 0 || rounding[static_cast<std::size_t>(p)] != 0;
  }

  /// Makes room for sums of site p in units of 2^exponent: goes over to the larger units.
  void raise(std::ptrdiff_t p, int to) {
    int& now = exponent[static_cast<std::size_t>(p)];
    if (to <= now && holds(p)) return;
    auto const rescale = [&](std::ptrdiff_t i) {
      double& x = sums[static_cast<std::size_t>(i)];
      x = std::ldexp(x, now - to);
    };
    for (std::ptrdiff_t q = 0; q < sites; ++q) {
      rescale(p * sites + q);
      rescale(q * sites + p);  // the self term has both
    }
    for (auto* const known : {&rounding, &error}) {
      double& x = (*known)[static_cast<std::size_t>(p)];
      x = std::ldexp(x, 2 * (now - to));
    }
    now = to;
  }
};

// ---- as numbers ---------------------------------------------------------------------------------

namespace detail {

/// f(double&) on something that is no double.
template <class Whole, class F>
void as_number(Whole& x, F const& f) {
  auto number = static_cast<double>(x);
  f(number);
  x = static_cast<Whole>(number);
}

}  // namespace detail

/// Calls f(double&) for every number of moments in a fixed order, and takes over what f writes. What
/// to_numbers and from_numbers need of a type; sizes of vectors are not among the numbers.
template <class F>
void each_number(square_sum& s, F const& f) {
  f(s.value);
  detail::as_number(s.exponent, f);
}
template <class F>
void each_number(turn_sum& s, F const& f) {
  f(s.weight), f(s.mean), f(s.away2);
  detail::as_number(s.before, f);
  detail::as_number(s.after, f);
}
template <class F>
void each_number(running_stat& s, F const& f) {
  f(s.count), f(s.mean);
  each_number(s.m2, f);
}
template <class F>
void each_number(position& at, F const& f) {
  detail::as_number(at.token, f);
  detail::as_number(at.feature, f);
}
template <class F>
void each_number(std::vector<running_stat>& stats, F const& f) {
  for (running_stat& s : stats) each_number(s, f);
}
template <class F>
void each_number(flow_moments& m, F const& f) {
  f(m.tokens);
  each_number(m.spread, f);
  for (auto* const values : {&m.zero_rows, &m.unit_sum, &m.units, &m.pair_cosines, &m.pairs})
    for (double& x : *values) f(x);
  for (auto* const values : {&m.squares, &m.steps})
    for (square_sum& x : *values) each_number(x, f);
  for (turn_sum& x : m.turns) each_number(x, f);
  each_number(m.sequence_cosine, f);
  each_number(m.cosine, f);
  for (position& at : m.non_finite) each_number(at, f);
}
template <class F>
void each_number(gram_moments& m, F const& f) {
  f(m.epsilon), f(m.accuracy);
  for (std::uint8_t& x : m.shares) detail::as_number(x, f);
  for (auto* const values :
       {&m.products, &m.row_sums, &m.diagonal, &m.squares, &m.square_sum, &m.entry_rounding,
        &m.sum_rounding, &m.sigma, &m.cubes, &m.triangles, &m.shuffles, &m.heavy_rows, &m.shifts})
    for (double& x : *values) f(x);
  for (int& x : m.exponent) detail::as_number(x, f);
  for (status& why : m.why) detail::as_number(why, f);
  for (position& at : m.non_finite) each_number(at, f);
}
template <class F>
void each_number(minibatch_moments& m, F const& f) {
  for (std::ptrdiff_t* const x : {&m.tokens, &m.batches, &m.left_out}) detail::as_number(*x, f);
  f(m.accuracy);
  for (auto* const values : {&m.sums, &m.rounding, &m.error})
    for (double& x : *values) f(x);
  for (int& x : m.exponent) detail::as_number(x, f);
  for (status& why : m.why) detail::as_number(why, f);
}

/// All numbers of moments, to be sent or stored.
template <class Moments>
std::vector<double> to_numbers(Moments m) {
  std::vector<double> out;
  std::size_t count = 0;
  each_number(m, [&](double&) { ++count; });
  out.reserve(count);
  each_number(m, [&](double& x) { out.push_back(x); });
  return out;
}

/// Takes over numbers that to_numbers made of moments of the same shape.
/// @throws std::invalid_argument if there are more or fewer than m holds
template <class Moments>
void from_numbers(Moments& m, std::span<double const> numbers) {
  std::size_t count = 0;
  each_number(m, [&](double&) { ++count; });
  if (count != numbers.size())
    detail::reject("rflow::from_numbers", std::to_string(numbers.size()) + " numbers for " +
                                              std::to_string(count) + " places");
  double const* from = numbers.data();
  each_number(m, [&](double& x) { x = *from++; });
}

}  // namespace rflow
