// SPDX-License-Identifier: Apache-2.0
#pragma once

// The definitions of docs/metrics.md in numbers of 32 digits. Nothing here is shared with include/.

#include <cstddef>
#include <vector>

#include "twofold.hpp"

namespace oracle {

/// n × d values of one site, row-major: exactly those that the library is given.
struct site {
  std::size_t n = 0, d = 0;
  std::vector<double> x;

  double const* row(std::size_t i) const { return x.data() + i * d; }
};

/// mantissa · 2^exponent: results may lie outside the range of double.
struct number {
  double mantissa = 0;
  int exponent = 0;

  double value() const { return std::ldexp(mantissa, exponent); }
  /// log2 of the magnitude; −1e9 of zero.
  double log2() const { return mantissa == 0 ? -1e9 : std::log2(std::abs(mantissa)) + exponent; }
};

// ---- CKA ----------------------------------------------------------------------------------------

/// HSIC of all pairs of sites, in units of each site's own.
struct alignment {
  std::size_t sites = 0, n = 0;
  std::vector<twofold> biased, debiased;  // S × S
  std::vector<twofold> trace;             // S: tr(HKH)
  std::vector<double> debiased_noise;  // S: what this reference itself may be off in ‖U‖², of tr²
  std::vector<double> gram_error;      // S: ‖E‖/‖U‖ for E what a Gram path in double leaves
  std::vector<double> biased_gram_error;  // S: the same for HKH
  std::vector<double> share;  // S × n: of ‖K̃‖² in pairs with a token; empty if K̃ = 0
  std::vector<double> off_diagonal;  // S: ‖K̃‖
  std::vector<double> share_error;   // S: as gram_error, for K̃
  std::vector<int> unit;             // S: x = scaled · 2^unit

  twofold const& at(std::vector<twofold> const& m, std::size_t p, std::size_t q) const {
    return m[p * sites + q];
  }
  double cka(std::vector<twofold> const& m, std::size_t p, std::size_t q) const;
  /// The mean of biased CKA over all pairings.
  double chance(std::size_t p, std::size_t q) const;
};

enum class form { cheapest, gram, feature };

alignment linear_alignment(std::vector<site> const& sites, form by = form::cheapest);
/// @param sigma2  squares of the bandwidths in units of the data, mantissa and exponent
alignment rbf_alignment(std::vector<site> const& sites, std::vector<number> const& sigma2);
/// k(x, y) = (1 + by ⟨x, y⟩)² on centred features: a kernel of one's own.
alignment polynomial_alignment(std::vector<site> const& sites, double by);
/// Median of squared distances: of all n² or of each pair once; over at most 512 tokens.
number median_distance(site const& x, bool all_pairs);

// ---- flow ---------------------------------------------------------------------------------------

struct flow_result {
  std::vector<double> inter_token, sequence_count, sequence_mean, sequence_stddev;  // S
  std::vector<double> pairs;                                                        // S
  std::vector<std::size_t> zero_rows;                                               // S
  std::vector<double> least_row, greatest_row;  // S: log2 of squared norms of rows that are not 0
  std::vector<std::vector<number>> norms;       // S × n
  std::vector<number> squares;                  // S: ‖X‖²
  std::vector<double> adjacent, adjacent_stddev, adjacent_count;  // S − 1
  std::vector<std::vector<double>> cosines;  // S − 1 × n; NaN where left out
  std::vector<number> steps;                 // S − 1: ‖Δ‖²
  std::vector<double> curvature;             // S − 2; NaN without direction
  number spread, energy, length;
};

/// @param bounds  where sequences begin and end: 0, …, n
flow_result flow_by_definition(std::vector<site> const& sites,
                               std::vector<std::size_t> const& bounds);

/// Eigenvalues 1 and S − 1 of the path graph's Laplacian.
void path_eigenvalues(std::size_t sites, double& smallest, double& largest);

// ---- softmax ------------------------------------------------------------------------------------

struct softmax_case {
  std::size_t classes = 2;
  std::vector<int> labels;
  std::vector<char> trains;  // else it validates
  std::vector<double> weight, bias;
  int epochs = 3;
  double rate = 0.05, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, decay = 0;
  bool standardize = false;
};
struct softmax_losses {
  std::vector<double> train, validation;  // epochs + 1
};
softmax_losses softmax_by_definition(site const& x, softmax_case const& c);

}  // namespace oracle
