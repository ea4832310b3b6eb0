// SPDX-License-Identifier: Apache-2.0
#pragma once

// What one row of the chain leaves: inner products with the rows before it, sums of unit vectors.

#include <Eigen/Core>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <vector>

#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// Sums of unit vectors of a sequence that is not over yet, S × padded, features in their places.
struct open_sequence {
  // padded × S, site after site, whatever EIGEN_DEFAULT_TO_ROW_MAJOR says
  Eigen::Array<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor> sum;
  std::vector<double> units;  // S: number of terms

  open_sequence(std::ptrdiff_t sites, std::ptrdiff_t padded)
      : sum(decltype(sum)::Zero(padded, sites)), units(static_cast<std::size_t>(sites)) {}

  void clear() {
    sum.setZero();
    std::fill(units.begin(), units.end(), 0.0);
  }
  void add(open_sequence const& more) {
    sum += more.sum;
    for (std::size_t l = 0; l < units.size(); ++l) units[l] += more.units[l];
  }
  void close(flow_moments& m) {
    for (std::size_t l = 0; l < units.size(); ++l)
      m.end_sequence(l, sum.col(static_cast<Eigen::Index>(l)).square().sum(), units[l]);
    clear();
  }
};

/// Inner products of one row of the chain with the rows before it.
struct chain_products {
  double norm2 = 0;  // ‖x‖²
  double dot = 0;    // ⟨x, p⟩, p the row before
  double step2 = 0;  // ‖x − p‖²
  double turn = 0;   // ⟨x − p, p − q⟩, q the row before p
  double away2 = 0;  // ‖x − mean of the rows before‖²; that mean is p less what p is off it
};

/// A row as far as it is off the mean of those before it is off the new mean by this share.
template <class C>
C share_off(std::ptrdiff_t rows_before) {
  return static_cast<C>(rows_before) / static_cast<C>(rows_before + 1);
}

/// Whether squares of C neither overflow nor lose their last bits in a row of this squared norm.
template <class C>
bool in_range(double norm2) {
  constexpr bool narrow = std::same_as<C, float>;
  // Through memory: with -ffast-math a compiler may believe that no sum is a NaN.
  double const volatile kept = norm2;
  double const x = kept;
  return is_finite(x) && x > (narrow ? 1e-18 : 1e-270) && x < (narrow ? 1e30 : 1e290);
}

}  // namespace rflow::detail
