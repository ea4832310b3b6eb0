// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a flow report is held to: the definitions in long double, for data of any size.

#include <cmath>
#include <cstddef>
#include <limits>

#include <doctest/doctest.h>

#include <rflow/flow.hpp>

#include "reference.hpp"

namespace reference {

/// Whether a value is the exact one, or says rightly that double does not have it.
inline bool is_exactly(rflow::measured got, long double exact, long double within) {
  if (std::isnan(exact)) return !got.ok();
  bool const has = exact == 0 || (std::abs(exact) >= std::numeric_limits<double>::min() &&
                                  std::abs(exact) <= std::numeric_limits<double>::max());
  if (!got.ok()) return !has && got.why == rflow::status::out_of_range;
  return std::abs(static_cast<long double>(got.value) - exact) <= within * std::abs(exact);
}

/// What is asked of every backend and of the monitor: cosines and angles absolute, the rest relative.
template <class T>
void check_exact(rflow::flow_report const& r, chain_figures const& exact) {
  long double const within = tolerance<T>;
  auto const absolute = [&](rflow::measured got, long double want) {
    if (std::isnan(want))
      CHECK_FALSE(got.ok());
    else
      CHECK(std::abs(got - want) <= within);
  };
  auto const absolute_or_nan = [&](double got, long double want) {
    CHECK((std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= within));
  };
  auto const relative = [&](rflow::measured got, long double want) {
    CAPTURE(got.value);
    CAPTURE(want);
    CHECK(is_exactly(got, want, within));
  };
  std::size_t const sites = exact.rms_norm.size();
  for (std::size_t l = 0; l < sites; ++l) {
    CAPTURE(l);
    absolute(r.inter_token[l], exact.inter_token[l]);
    relative(r.rms_norm[l], exact.rms_norm[l]);
    std::size_t const kept = r.norms.empty() ? 0 : r.norms[l].size();
    for (std::size_t t = 0; t < kept; ++t)
      if (exact.norms[l][t] < std::numeric_limits<double>::max())
        CHECK(std::abs(r.norms[l][t] - exact.norms[l][t]) <=
              within * exact.norms[l][t] + std::numeric_limits<double>::denorm_min());
    if (l + 1 == sites) break;
    long double sum = 0, count = 0;
    for (long double const c : exact.adjacent[l])
      if (!std::isnan(c)) sum += c, count += 1;
    absolute(r.adjacent[l].mean, count > 0 ? sum / count : count / count);
    for (std::size_t t = 0; t < r.adjacent[l].per_token.size(); ++t) {
      absolute_or_nan(r.adjacent[l].per_token[t], exact.adjacent[l][t]);
    }
    relative(r.variance.steps[l], exact.steps[l]);
    if (l + 2 == sites) continue;
    if (exact.steps[l] > 0 && exact.steps[l + 1] > 0)
      absolute(r.variance.curvature[l], exact.curvature[l]);
    else
      CHECK(r.variance.curvature[l].why == rflow::status::zero_step);
  }
  relative(r.variance.st2, exact.st2);
  if (sites < 2) return;
  relative(r.variance.st1, exact.st1);
  relative(r.variance.path_energy, exact.path_energy);
  relative(r.variance.path_length, exact.path_length);
}

}  // namespace reference
