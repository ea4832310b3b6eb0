// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the examples on runtimes share: a flow report as a table, and how far it is from that of a
// capture of the same model and text.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <rflow/flow.hpp>
#include <rflow/safetensors.hpp>
#include <rflow/sites.hpp>
#include <rflow/view.hpp>
#include <string>
#include <vector>

namespace runtimes {

inline void print(rflow::flow_report const& r) {
  std::printf("%td sites, %td tokens, width %td\n", r.sites, r.tokens, r.width);
  std::printf("%6s %12s %18s %18s\n", "site", "rms norm", "between tokens", "to the next site");
  for (std::size_t l = 0; l < r.rms_norm.size(); ++l) {
    std::printf("%6zu %12.4f %18.6f", l, r.rms_norm[l].value, r.inter_token[l].value);
    if (l < r.adjacent.size())
      std::printf(" %18.6f\n", r.adjacent[l].mean.value);
    else
      std::printf("\n");
    if (r.non_finite[l].found())
      std::printf("       NaN or infinity at token %td, feature %td\n", r.non_finite[l].token,
                  r.non_finite[l].feature);
  }
  std::printf("St1 %.6g, St2 %.6g, path length %.6g\n", r.variance.st1.value, r.variance.st2.value,
              r.variance.path_length.value);
}

/// Compares with the first tokens of a capture; prints the largest differences.
/// @return whether cosines differ by at most tolerance, and norms and steps by that share
/// @throws what opening a capture throws; std::invalid_argument if the shapes disagree
inline bool agrees(rflow::flow_report const& r, std::string const& capture, double tolerance) {
  rflow::safetensors_file const file(capture);
  rflow::flow_report const want = rflow::visit(rflow::find_sites(file), [&](auto const& stack) {
    std::vector<bool> first(static_cast<std::size_t>(stack.all_tokens()), false);
    std::fill_n(first.begin(), std::min<std::ptrdiff_t>(r.tokens, stack.all_tokens()), true);
    return rflow::flow(stack.tokens(first));
  });
  if (want.sites != r.sites || want.tokens != r.tokens || want.width != r.width)
    throw std::invalid_argument(capture + " has another number of sites, tokens or features");

  double cosines = 0, norms = 0, steps = 0;
  auto const difference = [](double a, double b) {
    return std::isnan(a) || std::isnan(b) ? HUGE_VAL : std::abs(a - b);
  };
  for (std::size_t l = 0; l < r.rms_norm.size(); ++l) {
    cosines = std::max(cosines, difference(r.inter_token[l].value, want.inter_token[l].value));
    norms = std::max(
        norms, difference(r.rms_norm[l].value, want.rms_norm[l].value) / want.rms_norm[l].value);
    if (l == r.adjacent.size()) continue;
    cosines = std::max(cosines, difference(r.adjacent[l].mean.value, want.adjacent[l].mean.value));
    steps = std::max(steps, difference(r.variance.steps[l].value, want.variance.steps[l].value) /
                                want.variance.steps[l].value);
  }
  double const st1 =
      difference(r.variance.st1.value, want.variance.st1.value) / want.variance.st1.value;
  bool const agree = std::max({cosines, norms, steps, st1}) <= tolerance;
  std::printf("against %s: cosines within %.2g, norms %.2g, steps %.2g, St1 %.2g: %s %g\n",
              capture.c_str(), cosines, norms, steps, st1, agree ? "within" : "NOT within",
              tolerance);
  return agree;
}

}  // namespace runtimes
