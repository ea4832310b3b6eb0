// SPDX-License-Identifier: Apache-2.0
#pragma once

// Centred kernel alignment: how similar the geometry of the same tokens is in two layers or two
// models. It sees neither rotations nor scale, and is not a distance. With few tokens and many
// features the biased estimator is near 1 for unrelated data: the debiased one is the default, and
// every cell comes with what chance alone gives.

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <iterator>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/statistics.hpp>
#include <rflow/view.hpp>

namespace rflow {

// ---- estimators ---------------------------------------------------------------------------------

/// HSIC with the diagonal and its bias: ⟨HKH, HLH⟩. Needs 2 tokens.
/// @see Gretton, Bousquet, Smola, Schölkopf, ALT 2005
struct biased {
  static constexpr std::ptrdiff_t minimum_tokens = 2;  ///< fewer have no answer
  static constexpr char const* name = "biased";        ///< in reports

  /// ⟨HK_pH, HK_qH⟩ of sites p and q, (n − 1)² times HSIC₀, in the moments' units.
  static double hsic(gram_moments const& m, std::ptrdiff_t p, std::ptrdiff_t q) {
    return m.h_product(p, q);
  }

  /// The mean of hsic over all permutations of the tokens of q.
  static double chance(gram_moments const& m, std::ptrdiff_t p, std::ptrdiff_t q) {
    return m.centred_trace(p) * m.centred_trace(q) / static_cast<double>(m.tokens - 1);
  }
};

/// Unbiased HSIC: ⟨U(K), U(L)⟩. Needs 4 tokens. About 0 for independent data; may be negative.
/// @see Song, Smola, Gretton, Bedo, Borgwardt, JMLR 2012, equation 5
struct debiased {
  static constexpr std::ptrdiff_t minimum_tokens = 4;  ///< fewer have no answer
  static constexpr char const* name = "debiased";      ///< in reports

  /// ⟨U(K_p), U(K_q)⟩ of sites p and q, n(n − 3) times HSIC₁, in the moments' units.
  static double hsic(gram_moments const& m, std::ptrdiff_t p, std::ptrdiff_t q) {
    return m.u_product(p, q);
  }

  /// The mean of hsic over all permutations of the tokens of q: the rows of U sum to 0.
  static double chance(gram_moments const&, std::ptrdiff_t, std::ptrdiff_t) { return 0; }
};

namespace detail {

/// Why a site has no answer that takes some number of tokens. Too few of them comes before what
/// they happen to be; NaN, infinity comes first.
inline status why_none(gram_moments const& m, std::ptrdiff_t p, std::ptrdiff_t minimum_tokens) {
  status const why = m.why[static_cast<std::size_t>(p)];
  return m.tokens < minimum_tokens && why != status::non_finite ? status::too_few_rows : why;
}

/// Sums that lack shares are no moments yet.
inline void require_whole(char const* where, gram_moments const& m) {
  if (!m.whole())
    reject(where, "moments of " + std::to_string(std::count(m.shares.begin(), m.shares.end(), 1)) +
                      " of " + std::to_string(m.shares.size()) +
                      " shares of the work: merge the others first");
}

/// Whether a site has a CKA at all, and with what self term.
template <class Estimator>
measured self_term(gram_moments const& m, std::ptrdiff_t p) {
  status const why = why_none(m, p, Estimator::minimum_tokens);
  if (why != status::ok) return why;
  double const self = Estimator::hsic(m, p, p);
  status const known = m.resolved(p, self);
  return known == status::ok ? measured(self) : measured(known);
}

}  // namespace detail

/// biased, debiased, or one of yours with the same three members.
template <class E>
concept estimator = requires(gram_moments const& m, std::ptrdiff_t p) {
  { E::minimum_tokens } -> std::convertible_to<std::ptrdiff_t>;
  { E::hsic(m, p, p) } -> std::convertible_to<double>;
  { E::chance(m, p, p) } -> std::convertible_to<double>;
};

// ---- the table ----------------------------------------------------------------------------------

/// CKA of every pair of sites, each cell with its status.
class cka_table {
 public:
  cka_table() = default;

  /// Arithmetic on moments, so that both estimators cost one pass.
  /// @param  m      moments of all sites
  /// @param  split  0: every site against every site. Else the first `split` sites are rows, the
  ///                others columns
  /// @throws std::invalid_argument if shares of the work are missing
  template <class Estimator>
  cka_table(gram_moments const& m, Estimator, std::ptrdiff_t split = 0)
      : rows_(split > 0 ? split : m.sites),
        cols_(m.sites - split),
        first_col_(split),
        tokens_(m.tokens),
        values_(static_cast<std::size_t>(rows_ * cols_)),
        chance_(values_.size()) {
    detail::require_whole("rflow::cka_table", m);
    std::vector<measured> self;
    for (std::ptrdiff_t p = 0; p < m.sites; ++p) self.push_back(detail::self_term<Estimator>(m, p));
    for (std::ptrdiff_t i = 0; i < rows_; ++i)
      for (std::ptrdiff_t j = 0; j < cols_; ++j) {
        std::ptrdiff_t const q = first_col_ + j;
        measured const a = self[static_cast<std::size_t>(i)], b = self[static_cast<std::size_t>(q)];
        if (!a.ok() || !b.ok()) {
          // The first site's reason, so that the table is symmetric.
          measured const& first = i <= q ? a : b;
          measured const& second = i <= q ? b : a;
          values_[cell(i, j)] = chance_[cell(i, j)] = first.ok() ? second.why : first.why;
          continue;
        }
        double const norms = std::sqrt(a.value) * std::sqrt(b.value);
        values_[cell(i, j)] = i == q ? 1.0 : Estimator::hsic(m, i, q) / norms;
        chance_[cell(i, j)] = Estimator::chance(m, i, q) / norms;
      }
    for (std::size_t p = 0; p < m.sigma.size(); ++p) {
      rflow::status const why = detail::why_none(m, static_cast<std::ptrdiff_t>(p), 2);
      sigma_.push_back(why == rflow::status::ok ? measured(m.sigma[p]) : measured(why));
    }
    non_finite_ = m.non_finite;
    path_ = m.path;
    if (!m.cubes.empty()) find_significance(m);
    if (!m.shifts.empty()) find_shift_significance(m);
    if (!m.squares.empty()) find_top_tokens(m);
  }

  /// Sites of the first stack.
  std::ptrdiff_t rows() const { return rows_; }
  /// Sites of the second, or of the same.
  std::ptrdiff_t cols() const { return cols_; }
  /// Tokens that counted.
  std::ptrdiff_t tokens() const { return tokens_; }

  /// Site i of the first stack against site j of the second (or of the same).
  measured operator()(std::ptrdiff_t i, std::ptrdiff_t j) const { return values_[cell(i, j)]; }
  /// Why a cell has no value, or ok.
  rflow::status status(std::ptrdiff_t i, std::ptrdiff_t j) const { return values_[cell(i, j)].why; }

  /// What this estimator gives on average if the tokens of one side are shuffled: the exact mean
  /// over all permutations. 0 for debiased.
  measured chance(std::ptrdiff_t i, std::ptrdiff_t j) const { return chance_[cell(i, j)]; }

  /// How surprising a cell is if the tokens of one side had been shuffled: the debiased numerator in
  /// standard deviations of that (its mean is 0, its variance 2/(n(n−3)) of the product of the self
  /// terms, exactly). The same for either estimator. not_requested unless the backend was told to
  /// (`on_cpu{.significance = true}`).
  measured score(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return score_.empty() ? measured(rflow::status::not_requested) : score_[cell(i, j)];
  }
  /// The probability of a score no less than this one under such shuffles: up to 8 tokens by going
  /// through all of them. Beyond, the three heaviest tokens of either side are followed; for each way
  /// in which they land on one another the probability and three moments are exact, and the tail
  /// is that of a Pearson III (shifted gamma) distribution. At least 1/n!, or the least normal double
  /// where that is larger: never 0. not_requested as score.
  ///
  /// ill_conditioned where too many tokens outweigh the others for that, by an estimate of what those
  /// not followed do: nearly always with four or more in both layers, often with two or three. Score
  /// and CKA stand. What is given was within a factor of 2 of resampling down to 1e-4 in all simulated
  /// cases; deeper tails are an extrapolation (docs/numerics.md).
  ///
  /// Tokens of one text are not exchangeable: neighbours resemble each other, and then this is too
  /// small. Compare it with other cells rather than with 0.05, or see shift_p_value.
  ///
  /// @see Kazi-Aoual, Hitier, Sabatier, Lebreton, Computational Statistics & Data Analysis 20, 1995
  measured p_value(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return p_value_.empty() ? measured(rflow::status::not_requested) : p_value_[cell(i, j)];
  }

  /// The share of the n circular shifts of one side's tokens that give a debiased numerator no less
  /// than this one: at least 1/n, that of no shift. Neighbours stay neighbours, so it holds where
  /// tokens depend on one another as those of a text do. dependent_tokens where 12 of the tokens'
  /// correlation lengths, as measured, exceed n: the seam of a shift would show, and few shifts are
  /// independent. not_requested unless the backend was told to (`on_cpu{.shifts = true}`).
  ///
  /// @note  a site: n² (d + n) operations as for p_value, and n/4 complex Fourier transforms of
  ///        length n (fast where n has small prime factors); a pair of sites: n²/4 complex
  ///        multiply-adds. Memory: 2 n² bytes a site and 16 n a pair, within the memory bound
  measured shift_p_value(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return shift_p_value_.empty() ? measured(rflow::status::not_requested)
                                  : shift_p_value_[cell(i, j)];
  }

  /// The path that linear moments took: gram or feature, whichever counted fewer operations or was
  /// asked for.
  gram_path path() const { return path_; }

  /// The first NaN or infinity of a site; its found() is false where all is finite.
  position non_finite(std::ptrdiff_t row) const {
    return non_finite_[static_cast<std::size_t>(row)];
  }
  /// The same of a site of the second stack.
  position col_non_finite(std::ptrdiff_t col) const {
    return non_finite_[static_cast<std::size_t>(first_col_ + col)];
  }

  /// The RBF bandwidth of a site, in units of the data. NaN with the status of a site that has no
  /// answer; not_requested for kernels without a bandwidth.
  measured sigma(std::ptrdiff_t row) const { return at(sigma_, row); }
  /// The same of a site of the second stack.
  measured col_sigma(std::ptrdiff_t col) const { return at(sigma_, first_col_ + col); }

  /// The share of ‖K̃‖² (the kernel matrix of centred features without its diagonal) that pairs with its
  /// most extreme token make up, in [0, 1] to rounding; top_token says which (an index among the tokens that
  /// count). Near 1, one token decides the whole row of the table. On the feature path only the token
  /// with the largest norm is looked at, and those that are ten times as far out as others.
  measured top_token_share(std::ptrdiff_t row) const { return at(top_share_, row); }
  /// That token; −1 if there is none.
  std::ptrdiff_t top_token(std::ptrdiff_t row) const {
    return top_token_.empty() ? -1 : top_token_[static_cast<std::size_t>(row)];
  }

 private:
  std::size_t cell(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return static_cast<std::size_t>(i * cols_ + j);
  }
  static measured at(std::vector<measured> const& values, std::ptrdiff_t i) {
    return values.empty() ? measured(rflow::status::not_requested)
                          : values[static_cast<std::size_t>(i)];
  }

  void find_significance(gram_moments const& m) {
    std::vector<measured> self;
    for (std::ptrdiff_t p = 0; p < m.sites; ++p) self.push_back(detail::self_term<debiased>(m, p));
    double const n = static_cast<double>(m.tokens), deviation = std::sqrt(2 / (n * (n - 3)));
    double const rounding = 64 * m.epsilon;
    std::size_t const rows = m.heavy_rows.size() / self.size();
    bool const few = m.tokens <= detail::few_tokens;
    std::vector<detail::shuffled_site> sites;
    for (std::size_t p = 0; p < self.size() && !few; ++p)
      sites.emplace_back(m.shuffles.data() + p * detail::shuffle_numbers,
                         m.heavy_rows.data() + p * rows, m.tokens);
    for (std::ptrdiff_t i = 0; i < rows_; ++i)
      for (std::ptrdiff_t q = first_col_; q < first_col_ + cols_; ++q) {
        auto const a = static_cast<std::size_t>(i), b = static_cast<std::size_t>(q);
        if (!self[a].ok() || !self[b].ok()) {
          score_.push_back(self[a].ok() ? self[b].why : self[a].why);
          p_value_.push_back(score_.back());
          continue;
        }
        if (q < i) {  // the same to the last bit, however the compiler contracts what follows
          score_.push_back(score_[cell(q, i)]);
          p_value_.push_back(p_value_[cell(q, i)]);
          continue;
        }
        double const t =
            debiased::hsic(m, i, q) / (std::sqrt(self[a].value) * std::sqrt(self[b].value));
        score_.push_back(t / deviation);
        if (few) {
          p_value_.push_back(detail::all_orders_tail(
              m.tokens, rounding, m.heavy_rows.data() + a * rows, m.heavy_rows.data() + b * rows));
          continue;
        }
        detail::doubtful const p = detail::shuffled_tail(n, t, rounding, sites[a], sites[b]);
        p_value_.push_back(p.doubt <= 1 ? measured(p.value)
                                        : measured(rflow::status::ill_conditioned));
      }
  }

  void find_shift_significance(gram_moments const& m) {
    std::vector<measured> dependence;
    for (std::ptrdiff_t p = 0; p < m.sites; ++p) {
      measured const self = detail::self_term<debiased>(m, p);
      double const* const own = m.shifts.data() + (p * m.sites + p) * m.tokens;
      dependence.push_back(self.ok() ? measured(detail::shift_dependence(own, m.tokens))
                                     : measured(self.why));
    }
    double const n = static_cast<double>(m.tokens);
    for (std::ptrdiff_t i = 0; i < rows_; ++i)
      for (std::ptrdiff_t q = first_col_; q < first_col_ + cols_; ++q) {
        measured const a = dependence[static_cast<std::size_t>(i)];
        measured const b = dependence[static_cast<std::size_t>(q)];
        double const* const t = m.shifts.data() + (i * m.sites + q) * m.tokens;
        double const least = *t - 1e-5;  // products in float
        if (!a.ok() || !b.ok())
          shift_p_value_.push_back(a.ok() ? b.why : a.why);
        else if (12 * (std::max)(a.value, b.value) > n)
          shift_p_value_.push_back(rflow::status::dependent_tokens);
        else
          shift_p_value_.push_back(static_cast<double>(std::count_if(
                                       t, t + m.tokens, [&](double x) { return x >= least; })) /
                                   n);
      }
  }

  void find_top_tokens(gram_moments const& m) {
    for (std::ptrdiff_t p = 0; p < m.sites; ++p) {
      auto const begin = m.squares.begin() + p * m.tokens, end = begin + m.tokens;
      auto const top = std::max_element(begin, end);
      double const total = m.square_sum[static_cast<std::size_t>(p)];
      rflow::status why = detail::why_none(m, p, 2);
      if (why == rflow::status::ok && !(total > 0)) why = rflow::status::constant_layer;
      if (why == rflow::status::ok && !m.known(p, std::sqrt(total)))
        why = rflow::status::ill_conditioned;
      bool const ok = why == rflow::status::ok;
      // A pair stands in the rows of both its tokens.
      top_share_.push_back(ok ? measured(2 * *top / total) : measured(why));
      top_token_.push_back(ok ? top - begin : -1);
    }
  }

  std::ptrdiff_t rows_ = 0, cols_ = 0, first_col_ = 0, tokens_ = 0;
  std::vector<measured> values_, chance_, sigma_, top_share_;
  std::vector<std::ptrdiff_t> top_token_;
  std::vector<position> non_finite_;
  std::vector<measured> score_, p_value_, shift_p_value_;
  gram_path path_ = gram_path::gram;
};

// ---- the metrics --------------------------------------------------------------------------------

/// The table of moments already at hand.
template <estimator Estimator = debiased>
cka_table cka_matrix(gram_moments const& moments, Estimator by = {}) {
  return cka_table(moments, by);
}

/// CKA of every pair of sites of one model.
///
/// @param  stack      S sites of n tokens; widths may differ
/// @param  kernel     linear{}, rbf{}, or a kernel of yours
/// @param  by         debiased{} (default) or biased{}
/// @param  on         where to run; by default where the stack lives
/// @return S × S cells, symmetric, exactly 1 on the diagonal, the others within rounding of their
///         range (see cka); a site without an answer (constant, not
///         finite, too few tokens) has its status in its row and column, the rest stays right
/// @throws std::invalid_argument if the memory bound is too small for one tile
/// @note   S·n²·d multiply-adds or, when cheaper, (S·d)²·n/2; each Gram tile is formed once. Products
///         in fp32 (fp64 for double), all sums in fp64
/// @see    Kornblith, Norouzi, Lee, Hinton, ICML 2019, section 3
template <class T, class Memory, class Kernel = linear, estimator Estimator = debiased,
          class On = default_backend_t<Memory>>
cka_table cka_matrix(layer_stack<T, Memory> const& stack, Kernel const& kernel = {},
                     Estimator by = {}, On const& on = {}) {
  static_assert(!activations<Kernel> && !activations<detail::held_t<Kernel>>,
                "rflow: the other model is to be a stack as well. Wrap it: rflow::layer_stack(v), "
                "where v is the range of layers");
  static_assert(backend_for<On, Memory>, "rflow: this backend cannot read where the stack lives");
  return cka_table(on.gram(kernel, stack), by);
}

/// The same for tokens in several stacks, one after the other: files too large for one. All tokens
/// are paired with all others, over stacks as well.
///
/// @throws std::invalid_argument if the stacks differ in sites or widths
template <class T, class Memory, class Kernel = linear, estimator Estimator = debiased,
          class On = default_backend_t<Memory>>
cka_table cka_matrix(std::vector<layer_stack<T, Memory>> const& stacks, Kernel const& kernel = {},
                     Estimator by = {}, On const& on = {}) requires requires {
  on.gram(kernel, stacks);
}  // on_cpu does
{ return cka_table(on.gram(kernel, stacks), by); }

/// CKA of every site of one model with every site of another, over the same tokens in the same
/// order. Depth, width and element type may differ.
///
/// @throws std::invalid_argument if the stacks have different numbers of tokens
template <class T, class U, class Memory, class MemoryOfB, class Kernel = linear,
          estimator Estimator = debiased, class On = default_backend_t<Memory>>
cka_table cka_matrix(layer_stack<T, Memory> const& a, layer_stack<U, MemoryOfB> const& b,
                     Kernel const& kernel = {}, Estimator by = {}, On const& on = {}) {
  static_assert(std::same_as<Memory, MemoryOfB>,
                "rflow: the two stacks live in different memory spaces. Copy one of them to where "
                "the other lives");
  static_assert(backend_for<On, Memory>, "rflow: this backend cannot read where the stacks live");
  if (a.size() != b.size())
    detail::reject("rflow::cka_matrix", "the stacks have " + std::to_string(a.size()) + " and " +
                                            std::to_string(b.size()) + " tokens");
  return cka_table(on.gram(kernel, a, b), by, a.sites());
}

template <detail::no_stack X, class... More>
cka_table cka_matrix(X const&, More const&...) {
  static_cast<void>(sizeof(detail::refuse_stackless<X>));
  return {};
}

/// Centred kernel alignment of two sets of activations.
///
///     CKA(X, Y) = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)),   K = k(X, X), L = k(Y, Y)
///
/// @param  x          n × p activations, tokens in rows
/// @param  y          n × q activations of the same n tokens
/// @param  kernel     linear{} (default), rbf{}, or a kernel of yours
/// @param  by         biased: in [0, 1]; debiased (default): in [−1, 1], about 0 for independent data; either
///                    may pass its ends by rounding, and is not clamped: 1 + 1e-6 in fp32
/// @param  on         where to run; by default where x lives
/// @return 1 if X and Y agree up to rotation, scale and translation; NaN with status constant_layer,
///         zero_bandwidth or too_few_rows (n < 4 debiased, n < 2 biased)
/// @throws std::invalid_argument if x.rows != y.rows or either is empty; std::domain_error on NaN or
///         infinity
/// @note   n²(p + q) multiply-adds or, when cheaper, n(p + q)²/2; scratch within the backend's memory
///         bound; products in fp32 (fp64 if either is double), sums in fp64
/// @see    Kornblith, Norouzi, Lee, Hinton, ICML 2019, section 3; Song et al., JMLR 2012, equation 5
template <class X, class Y, class Kernel = linear, estimator Estimator = debiased,
          class On = default_backend_t<memory_of<X>>>
measured cka(X const& x, Y const& y, Kernel const& kernel = {}, Estimator by = {},
             On const& on = {}) {
  detail::require_readable<On, X, Y>();
  detail::require_same_memory<X, Y>();
  constexpr char const* where = "rflow::cka";
  auto const a = as_view(x);
  auto const b = as_view(y);  // perhaps of another type
  detail::require_shape(where, a);
  detail::require_shape(where, b);
  if (a.rows != b.rows)
    detail::reject(where,
                   "x has " + std::to_string(a.rows) + " tokens, y has " + std::to_string(b.rows));
  gram_moments const m = on.gram(kernel, layer_stack{a}, layer_stack{b});
  for (std::size_t p = 0; p < 2; ++p)
    if (m.non_finite[p].found())
      detail::throw_non_finite(where, p == 0 ? "x" : "y", m.non_finite[p]);
  return cka_table(m, by, 1)(0, 0);
}

// ---- minibatches --------------------------------------------------------------------------------

namespace detail {

/// "rbf with sigma 1.5, 2", each number so that it reads back as the same double.
inline std::string name_of(rbf const& kernel) {
  std::string name = "rbf with sigma";
  for (double const& sigma : kernel.sigma) {
    char digits[32];
    auto const end = std::to_chars(std::begin(digits), std::end(digits), sigma).ptr;
    name += (&sigma == &kernel.sigma.front() ? " " : ", ") + std::string(digits, end);
  }
  return name;
}

}  // namespace detail

/// Minibatch CKA of sites p and q from its sums: 1 if p = q; too_few_rows without a batch.
inline measured minibatch_cka(minibatch_moments const& m, std::ptrdiff_t p, std::ptrdiff_t q) {
  if (m.batches == 0) return status::too_few_rows;
  auto const sum = [&](std::ptrdiff_t i, std::ptrdiff_t j) {
    return m.sums[static_cast<std::size_t>(i * m.sites + j)];
  };
  for (std::ptrdiff_t const site : {p, q}) {
    auto const s = static_cast<std::size_t>(site);
    if (m.why[s] != status::ok) return m.why[s];
    if (!(sum(site, site) > 16 * m.rounding[s])) return status::constant_layer;
    if (m.error[s] > m.accuracy * sum(site, site)) return status::ill_conditioned;
  }
  return p == q ? 1.0 : sum(p, q) / (std::sqrt(sum(p, p)) * std::sqrt(sum(q, q)));
}

/// Minibatch CKA: sums of debiased HSIC over batches, then one ratio.
///
///     Σ_b w_b HSIC₁(K_b, L_b) / √(Σ_b w_b HSIC₁(K_b, K_b) · Σ_b w_b HSIC₁(L_b, L_b))
///
/// Another estimator than CKA over all tokens at once, though close to it. The sums add exactly over
/// batches, threads, shards and ranks. The biased estimator is not consistent here and not offered.
///
/// @see Nguyen, Raghu, Kornblith, ICLR 2021, section 3.1
template <class Kernel = linear>
class cka_accumulator {
 public:
  /// @param  kernel  with RBF, one σ a site must be given: a median per batch would compare different
  ///                 kernels
  /// @param  weight  how batches of different size count
  /// @throws std::invalid_argument if it is not
  explicit cka_accumulator(Kernel kernel = {}, batch_weight weight = batch_weight::pairs)
      : kernel_(std::move(kernel)), sums_(0, weight) {
    if constexpr (std::same_as<Kernel, rbf>)
      if (kernel_.sigma.empty())
        detail::reject("rflow::cka_accumulator", "an RBF kernel needs its σ per site here");
  }

  /// Adds one batch of tokens. A batch of fewer than 4 is left out and counted.
  /// @throws std::invalid_argument if the number of sites differs from earlier batches
  template <class T, class Memory, class On = default_backend_t<Memory>>
  void add(layer_stack<T, Memory> const& batch, On const& on = {}) {
    require_sites(batch.sites());
    if (batch.size() < debiased::minimum_tokens)
      ++sums_.left_out;
    else
      add(on.gram(kernel_, batch));
  }

  /// Of what is no batch: does not compile, and says what to write.
  template <detail::no_stack X>
  void add(X const&) {
    static_cast<void>(sizeof(detail::refuse_stackless<X>));
  }

  /// Adds the moments of one batch.
  /// @throws std::invalid_argument if the number of sites differs from earlier batches, or shares of
  ///         the work are missing
  void add(gram_moments const& m) {
    detail::require_whole("rflow::cka_accumulator", m);
    require_sites(m.sites);
    if (m.tokens < debiased::minimum_tokens) {
      ++sums_.left_out;
      return;
    }
    for (std::ptrdiff_t p = 0; p < m.sites; ++p)  // a constant batch has sums of 0 in any units
      if (auto const s = static_cast<std::size_t>(p);
          debiased::hsic(m, p, p) != 0 || m.entry_rounding[s] != 0 || m.sum_rounding[s] != 0)
        sums_.raise(p, m.exponent[s]);
    double const n = static_cast<double>(m.tokens);
    double const scale = sums_.weight == batch_weight::pairs   ? 1
                         : sums_.weight == batch_weight::equal ? 1 / (n * (n - 3))
                                                               : 1 / (n - 3);
    for (std::ptrdiff_t p = 0; p < m.sites; ++p) {
      auto const s = static_cast<std::size_t>(p);
      status& why = sums_.why[s];
      if (why == status::ok && m.why[s] != status::constant_layer) why = m.why[s];
      int const raised = m.exponent[s] - sums_.exponent[s];
      double const self = (std::max)(debiased::hsic(m, p, p), 0.), entries = m.entry_rounding[s];
      double const sums = m.sum_rounding[s] + 2 * m.epsilon * m.product(p, p);
      sums_.rounding[s] += std::ldexp(scale * (square(entries) + sums / 16), 2 * raised);
      sums_.error[s] += std::ldexp(scale * (std::max)(entries * std::sqrt(self), sums), 2 * raised);
      for (std::ptrdiff_t q = 0; q < m.sites; ++q) {
        auto const r = static_cast<std::size_t>(q);
        sums_.sums[static_cast<std::size_t>(p * m.sites + q)] +=
            std::ldexp(scale * debiased::hsic(m, p, q), raised + m.exponent[r] - sums_.exponent[r]);
      }
    }
    sums_.accuracy = (std::max)(sums_.accuracy, m.accuracy);
    sums_.tokens += m.tokens;
    ++sums_.batches;
  }

  /// Adds what another accumulator has seen, or sums that came about elsewhere.
  /// @throws std::invalid_argument if sites, weights or kernels differ. A kernel of yours is compared
  ///         if it has an operator==, moments alone cannot be
  void merge(cka_accumulator const& other) {
    require_kernel(other.kernel_);
    sums_.merge(other.sums_);
  }
  /// The same for sums alone.
  void merge(minibatch_moments const& other) { sums_.merge(other); }

  /// The sums so far.
  minibatch_moments const& moments() const { return sums_; }
  /// S.
  std::ptrdiff_t sites() const { return sums_.sites; }
  /// Tokens of the batches that count.
  std::ptrdiff_t tokens() const { return sums_.tokens; }
  /// Batches that count.
  std::ptrdiff_t batches() const { return sums_.batches; }
  /// Batches of fewer than 4 tokens.
  std::ptrdiff_t left_out() const { return sums_.left_out; }

  /// Minibatch CKA of sites p and q.
  measured operator()(std::ptrdiff_t p, std::ptrdiff_t q) const {
    return minibatch_cka(sums_, p, q);
  }

 private:
  static double square(double x) { return x * x; }

  void require_kernel(Kernel const& other) const {
    constexpr char const* where = "rflow::cka_accumulator::merge";
    if constexpr (std::same_as<Kernel, rbf>) {
      if (kernel_.sigma != other.sigma)
        detail::reject(where, "different kernels, " + detail::name_of(kernel_) + " and " +
                                  detail::name_of(other));
    } else if constexpr (std::equality_comparable<Kernel>) {
      if (!(kernel_ == other)) detail::reject(where, "different kernels of one type");
    }
  }

  void require_sites(std::ptrdiff_t sites) {
    if (sums_.sites == 0) {
      minibatch_moments fresh(sites, sums_.weight);
      fresh.left_out = sums_.left_out;
      sums_ = std::move(fresh);
    } else if (sites != sums_.sites) {
      detail::reject("rflow::cka_accumulator", "this batch has " + std::to_string(sites) +
                                                   " sites, earlier ones had " +
                                                   std::to_string(sums_.sites));
    }
  }

  Kernel kernel_;
  minibatch_moments sums_;
};

}  // namespace rflow
