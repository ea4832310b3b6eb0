// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a caller of the Gram pass may choose, and what its two paths cost.

#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include <rflow/detail/cpu/memory.hpp>
#include <rflow/moments.hpp>
#include <rflow/threads.hpp>

namespace rflow::detail {

struct gram_options {
  crew workers{};
  std::size_t memory_bound = std::size_t{256} << 20;  ///< bytes beyond input and result
  gram_path path = gram_path::automatic;
  bool significance = false;  ///< what p-values over shuffled tokens need, too
  work_share share{};
  bool shifts = false;  ///< what p-values over shifted tokens need, too; and the other ones
};

/// Multiply-adds of the two paths.
struct gram_cost {
  double gram, feature;
};

/// @param widths  d of each site
inline gram_cost count_operations(integer tokens, std::vector<integer> const& widths) {
  double const n = static_cast<double>(tokens), sites = static_cast<double>(widths.size());
  double total = 0;
  for (integer const d : widths) total += static_cast<double>(d);
  return {n * n / 2 * (total + sites * (sites + 1) / 2), total * total / 2 * n};
}

[[noreturn]] inline void reject_bound(double bound, double smallest) {
  throw std::invalid_argument("rflow: a memory bound of " + std::to_string(std::llround(bound)) +
                              " bytes is below the " + std::to_string(std::llround(smallest)) +
                              " bytes of the smallest tile");
}

}  // namespace rflow::detail
