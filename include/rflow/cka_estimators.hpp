// SPDX-License-Identifier: Apache-2.0
#pragma once

// The estimators of HSIC that CKA is a ratio of: biased, debiased.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <string>

#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

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

}  // namespace rflow
