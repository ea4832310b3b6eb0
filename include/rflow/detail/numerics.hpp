// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every backend decides alike about the numbers of a kernel matrix: where features are centred, how
// a linear kernel is U-centred, and what the rounding of its entries may be. Plain C++ on the host.

static_assert(
    __cplusplus >= 202002L,
    "rflow: C++20 is needed: compile with -std=c++20, or in CMake link rflow::rflow, which "
    "asks for it");

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace rflow::detail {

/// How far a self term may be off, relative to itself, and still make a CKA.
inline constexpr double narrow_accuracy = 1e-5;  ///< of float, f16 and bf16 data
inline constexpr double wide_accuracy = 1e-10;   ///< if any data are double

/// What rounding leaves of means of C, relative to the largest value. Those of doubles are corrected once.
template <class C>
double rounding_of_means(std::ptrdiff_t tokens) {
  double const epsilon = std::numeric_limits<double>::epsilon();
  double const once = (64 + static_cast<double>(tokens) / 128) * epsilon;
  return std::numeric_limits<C>::epsilon() > epsilon ? once : once * epsilon * 64;
}

/// The lower median; 0 of nothing.
inline double median_of(std::span<double const> values, std::vector<double>& scratch) {
  if (values.empty()) return 0;
  scratch.assign(values.begin(), values.end());
  auto const middle = scratch.begin() + static_cast<std::ptrdiff_t>((values.size() - 1) / 2);
  std::nth_element(scratch.begin(), middle, scratch.end());
  return *middle;
}
inline double median_of(std::span<double const> values) {
  std::vector<double> scratch;
  return median_of(values, scratch);
}

/// Whether one of n tokens may be far out, by the sum of their norms and the largest.
inline bool has_outlier(double trace, double largest, std::size_t tokens) {
  double const n = static_cast<double>(tokens);
  return largest * n > (std::min)(8., n / 4) * trace;
}

/// Squared distances from the mean up to which tokens make the centre: infinity if all of them do.
///
/// U-centring removes whatever the centre adds to the entries, but their rounding stays. A token at M
/// pulls the mean by M/n, and then all entries hold M²/n² that means nothing. So, if a token is
/// that far out, features are centred at the mean of the closer half.
inline double centre_limit(std::span<double const> norms, double trace, double largest,
                           std::vector<double>& scratch) {
  double const everywhere = std::numeric_limits<double>::infinity();
  if (norms.size() < 4 || !has_outlier(trace, largest, norms.size())) return everywhere;
  double const middle = median_of(norms, scratch);
  double const outlying = (std::min)(64., static_cast<double>(norms.size()) / 2);
  return largest > outlying * middle ? middle : everywhere;
}

/// Σ_{i≠j} a_i a_j, without losing what stands beside one huge a.
inline double sum_of_pairs(std::span<double const> a) {
  if (a.empty()) return 0;
  auto const top = std::max_element(a.begin(), a.end());
  double rest = 0, squares = 0;
  for (auto i = a.begin(); i != a.end(); ++i)
    if (i != top) rest += *i, squares += *i * *i;
  return 2 * *top * rest + (std::max)(rest * rest - squares, 0.);
}

/// The linear kernel K_ij = ⟨x_i − c, x_j − c⟩ of n tokens, by token: U_ij = K_ij − shift_i − shift_j
/// has no row sums, and U_ij + removed_i + removed_j is the kernel of features centred at their mean.
struct u_centring {
  std::vector<double> shift, removed;
  double rounding = 0;  ///< what rounding makes of ‖U‖_F, roughly
  double floor = 0;  ///< what the rounding of the shifts makes of ‖U‖²_F, where it is nothing else

  /// The floor of tokens whose ‖x_i − c‖² have this sum.
  static double floor_of(double trace, std::size_t tokens) {
    double const lost = 8 * std::numeric_limits<double>::epsilon() * trace;
    return lost * lost / static_cast<double>(tokens);
  }

  /// @param  norms  ‖x_i − c‖²
  /// @param  rows   Σ_{j≠i} K_ij; empty if c is the mean: then −‖x_i − c‖²
  /// @param  width  d
  /// @param  unit   unit roundoff of the products
  void fit(std::span<double const> norms, std::span<double const> rows, std::ptrdiff_t width,
           double unit) {
    shift.assign(norms.size(), 0.);
    removed.assign(norms.size(), 0.);
    rounding = floor = 0;
    double const n = static_cast<double>(norms.size());
    if (n < 3) return;
    auto const row = [&](std::size_t i) { return rows.empty() ? -norms[i] : rows[i]; };
    double total = 0, leaning = 0, trace = 0, sum = 0, squares = 0;
    for (std::size_t i = 0; i < norms.size(); ++i) {
      total += row(i);
      leaning += row(i) + norms[i];
    }
    auto const about_mean = [&](std::size_t i) {
      return norms[i] - 2 * (row(i) + norms[i]) / n + leaning / n / n;
    };
    for (std::size_t i = 0; i < norms.size(); ++i) trace += about_mean(i);
    double const share = 1 / (2 * (n - 1) * (n - 2));
    for (std::size_t i = 0; i < norms.size(); ++i) {
      shift[i] = row(i) / (n - 2) - total * share;
      removed[i] = trace * share - about_mean(i) / (n - 2);
      sum += shift[i];
      squares += shift[i] * shift[i];
    }
    double const taken = 2 * (n - 2) * squares + 2 * sum * sum;  // Σ_{i≠j} (shift_i + shift_j)²
    double const depth = (std::min)(static_cast<double>(width), 528.);
    rounding = unit / 2 * std::sqrt(depth * taken + sum_of_pairs(norms));
    floor = floor_of(leaning / n + trace, norms.size());
  }
};

}  // namespace rflow::detail
