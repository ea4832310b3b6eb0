// SPDX-License-Identifier: Apache-2.0
#pragma once

// Centred kernel alignment: how similar the geometry of the same tokens is in two layers or two
// models. It sees neither rotations nor scale, and is not a distance. With few tokens and many
// features the biased estimator is near 1 for unrelated data: the debiased one is the default, and
// every cell comes with what chance alone gives.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <string>
#include <vector>

#include <rflow/backend.hpp>
#include <rflow/cka_accumulator.hpp>
#include <rflow/cka_estimators.hpp>
#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/statistics.hpp>
#include <rflow/view.hpp>

namespace rflow {

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

}  // namespace rflow
