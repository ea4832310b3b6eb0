// SPDX-License-Identifier: Apache-2.0
#pragma once

// Entries of a kernel about their own means: where constants that U-centring removes are so large that
// sums of squares lose what they stand for.

#include <cstddef>
#include <type_traits>
#include <vector>

#include <rflow/detail/cpu/kernels.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// Moments of a kernel whose entries hold constants that U-centring removes. Where these are so large that
/// sums of squares in double lose what they stand for, the entries are formed once more without them.
/// @tparam Engine  a gram_engine
template <class C, class Engine, class Kernel>
gram_moments about_row_means(Engine& engine, Kernel const& kernel, work_share share) {
  gram_moments m = engine(kernel);
  if constexpr (std::is_same_v<C, double> && !std::is_same_v<Kernel, linear_kernel>) {
    // With fewer than 4 tokens there is only biased CKA, which has the diagonal, too.
    double const n = static_cast<double>(m.tokens);
    bool const whole = m.tokens < 4;
    auto const row = [&](integer at) {
      return m.row_sums.data()[at] + (whole ? m.diagonal.data()[at] : 0);
    };
    bool lost = false;
    for (integer p = 0; p < m.sites && m.tokens >= 2 && share.of == 1; ++p) {
      double sum = m.product(p, p);
      for (integer i = p * m.tokens; i < (p + 1) * m.tokens && whole; ++i)
        sum += m.diagonal.data()[i] * m.diagonal.data()[i];
      double const self = whole ? m.h_product(p, p) : m.u_product(p, p);
      lost = lost || (m.why.data()[p] == status::ok && sum > 1e4 * self);
    }
    if (!lost) return m;
    double const rows = whole ? n : n - 2, all = whole ? n * n : (n - 1) * (n - 2);
    std::vector<double> shifts(m.row_sums.size());
    for (integer p = 0; p < m.sites; ++p) {
      double total = 0;
      for (integer i = p * m.tokens; i < (p + 1) * m.tokens; ++i) total += row(i);
      for (integer i = p * m.tokens; i < (p + 1) * m.tokens && is_finite(total); ++i)
        shifts.data()[i] = row(i) / rows - total / (2 * all);
    }
    m = engine(kernel, shifts);
  }
  return m;
}

}  // namespace rflow::detail
