// SPDX-License-Identifier: Apache-2.0
#pragma once

// Groups of tokens whose norms stand far beyond the others': what they hold of the kernel matrices,
// and what the headline numbers are without them. A single share says little of a group: twelve tokens
// may hold a twelfth each, and all of it together.

#include <rflow/moments.hpp>
#include <rflow/view.hpp>

#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "options.hpp"

namespace report {

/// CKA that a headline shows, under one estimator.
struct headline_cka {
  rflow::measured first_to_last;
  std::vector<rflow::measured> adjacent;  // of a site with the next
};

/// Headline numbers of a choice of tokens.
struct headline {
  std::ptrdiff_t tokens = 0;
  std::vector<rflow::measured> inter_token;  // of the chain
  rflow::measured st1, st2;
  std::string kernel;  // of the CKA
  headline_cka debiased, biased;

  headline_cka const& cka(estimator e) const {
    return e == estimator::debiased ? debiased : biased;
  }
};

struct outlier {
  std::ptrdiff_t token;  // in a group among those that count, in the result as in the file
  double ratio;          // its norm over the median; of several sites, the greatest
};

struct outlier_facts {
  static constexpr double factor = 5;         // times the median norm of a site
  static constexpr std::ptrdiff_t least = 8;  // tokens; of fewer, none is an outlier
  static constexpr double most = 0.25;      // of the tokens; more are no outliers but a wide spread
  static constexpr double looked_at = 0.1;  // share from which on a site's group is left out
  static constexpr double large = 0.5;      // share that matters

  std::vector<std::vector<outlier>> groups;   // a site of the chain
  std::vector<rflow::measured> norm_share;    // a site: of Σ‖x‖²
  std::vector<rflow::measured> kernel_share;  // of the linear kernel matrix, as top_share
  std::vector<outlier> tokens;                // of all sites whose share is looked at
  std::vector<std::size_t> sites;             // those sites
  std::optional<headline> with, without;      // if there are such tokens, and not too many
  bool matter = false;                        // a share or a change is large
};

/// The groups of each site, by norms.
/// @param norms  sites × tokens that count
outlier_facts find_outliers(std::vector<std::vector<double>> const& norms);

/// Adds to the group of a site what is far out from the mean token, which a large mean hides from norms.
/// @param norms  as they are, of that site
/// @param site   in the moments, of the linear kernel
void add_far_from_mean(outlier_facts& o, std::size_t l, std::vector<double> const& norms,
                       rflow::gram_moments const& m, std::ptrdiff_t site);

/// Which tokens are to be left out for comparison: fills sites and tokens (with `token` counted among
/// those that count) from the groups and their shares.
void choose_outliers(outlier_facts& o);

/// Whether any headline number changes much between with and without.
bool changes_much(outlier_facts const& o);

/// The share of ‖K̃‖² of a site, K̃ the linear kernel matrix of centred features without its diagonal,
/// that pairs with a token of the group make up. Exact: rows of the kernel from the moments where they
/// hold all of them, else from a pass; pairs within the group, which two rows have, from a pass.
/// @param stack  with the tokens that count
/// @param l      the site in it
/// @param group  among the tokens that count
/// @param site   in the moments
template <class T>
rflow::measured kernel_share(rflow::layer_stack<T> const& stack, std::ptrdiff_t l,
                             std::vector<outlier> const& group, rflow::gram_moments const& m,
                             std::ptrdiff_t site) {
  auto const p = static_cast<std::size_t>(site);
  if (m.why[p] != rflow::status::ok) return m.why[p];
  double const total = m.square_sum[p];
  if (!(total > 0)) return rflow::status::constant_layer;
  if (group.empty()) return 0.0;
  rflow::view<T> const x = stack[l];
  std::ptrdiff_t const n = stack.size(), d = x.cols;
  std::vector<double> mean(static_cast<std::size_t>(d));
  auto const at = [&](std::ptrdiff_t i, std::ptrdiff_t j) {
    return static_cast<double>(x(stack.token(i), j));
  };
  for (std::ptrdiff_t i = 0; i < n; ++i)
    for (std::ptrdiff_t j = 0; j < d; ++j) mean[static_cast<std::size_t>(j)] += at(i, j);
  for (double& sum : mean) sum /= static_cast<double>(n);

  bool const has_rows =
      m.path == rflow::gram_path::gram && !m.squares.empty();  // else only of the largest norms
  std::vector<double> row(static_cast<std::size_t>(d));
  auto const unit = [&](double square) { return std::ldexp(square, -2 * m.exponent[p]); };
  auto const square_with = [&](std::ptrdiff_t i) {
    double sum = 0;
    for (std::ptrdiff_t j = 0; j < d; ++j) {
      auto const k = static_cast<std::size_t>(j);
      sum += row[k] * (at(i, j) - mean[k]);
    }
    return sum * sum;
  };
  double pairs = 0;
  for (auto const& [g, ratio] : group) {
    for (std::ptrdiff_t j = 0; j < d; ++j) {
      auto const k = static_cast<std::size_t>(j);
      row[k] = at(g, j) - mean[k];
    }
    double with_all = 0, within = 0;
    for (std::ptrdiff_t i = 0; i < n && !has_rows; ++i)
      if (i != g) with_all += square_with(i);
    for (outlier const& h : group)
      if (h.token != g) within += square_with(h.token);
    pairs +=
        (has_rows ? 2 * m.squares[p * static_cast<std::size_t>(n) + static_cast<std::size_t>(g)]
                  : unit(2 * with_all)) -
        unit(within);
  }
  return pairs / total;
}

}  // namespace report
