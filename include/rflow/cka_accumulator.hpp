// SPDX-License-Identifier: Apache-2.0
#pragma once

// Minibatch CKA: the ratio of sums over batches. For tokens that do not fit memory at once; it is another
// estimator than CKA over all of them.

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <iterator>
#include <string>
#include <utility>

#include <rflow/backend.hpp>
#include <rflow/cka_estimators.hpp>
#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

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
