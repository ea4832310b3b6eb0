// SPDX-License-Identifier: Apache-2.0
#pragma once

// The flow of sites that differ in width (models with stages): what exists without a common space.

#include <rflow/flow.hpp>
#include <rflow/monitor.hpp>

#include <limits>
#include <utility>
#include <vector>

namespace report {

/// The figures of a chain: all tokens pooled, and each sequence by itself.
struct chain_flow {
  rflow::flow_report pooled;
  rflow::sequence_figures per_sequence;
};

/// measure(stack), also where sites differ in width. Then each run of sites of one width is measured by
/// itself: inter-token cosine, norms and the like of every site, adjacent cosines within a run. What
/// needs a difference of all sites (St1, St2, the path) is different_widths, and so are cosines
/// from one width to another. Masks and sequences of the stack hold.
/// @param measure  the chain_flow of a stack of one width
template <class T, class Measure>
chain_flow flow_of_widths(rflow::layer_stack<T> const& stack, rflow::normalization by,
                          bool per_token, Measure const& measure) {
  using rflow::status;
  std::ptrdiff_t const sites = stack.sites();
  std::vector<std::ptrdiff_t> ends;  // of runs of one width
  for (std::ptrdiff_t l = 1; l <= sites; ++l)
    if (l == sites || stack[l].cols != stack[l - 1].cols) ends.push_back(l);
  if (ends.size() == 1) return measure(stack);

  std::vector<bool> mask(static_cast<std::size_t>(stack.all_tokens()));
  for (std::ptrdiff_t i = 0; i < stack.size(); ++i)
    mask[static_cast<std::size_t>(stack.token(i))] = true;
  std::vector<std::ptrdiff_t> offsets = stack.boundaries();  // among tokens that count
  for (std::ptrdiff_t& offset : offsets)
    offset = offset < stack.size() ? stack.token(offset) : stack.all_tokens();
  offsets.front() = 0;

  chain_flow whole{{}, rflow::sequence_figures(sites)};
  rflow::flow_report& out = whole.pooled;
  out.sites = sites;
  out.tokens = stack.size();
  out.width = stack.width();
  auto const append = [](auto& to, auto& from) {
    for (auto& x : from) to.push_back(std::move(x));
  };
  for (std::ptrdiff_t first = 0; std::ptrdiff_t const end : ends) {
    std::vector<rflow::view<T>> views;
    for (std::ptrdiff_t l = first; l < end; ++l) views.push_back(stack[l]);
    rflow::layer_stack<T> run(views);
    if (stack.masked()) run = run.tokens(mask);
    chain_flow measured = measure(run.sequences(offsets));
    rflow::flow_report& part = measured.pooled;
    if (first > 0) {
      rflow::adjacent_cosines none{status::different_widths, status::different_widths, 0, {}};
      if (per_token)
        none.per_token.assign(static_cast<std::size_t>(stack.size()),
                              std::numeric_limits<double>::quiet_NaN());
      out.adjacent.push_back(std::move(none));
    }
    append(out.inter_token, part.inter_token);
    append(out.per_sequence, part.per_sequence);
    append(out.adjacent, part.adjacent);
    append(out.rms_norm, part.rms_norm);
    append(out.zero_rows, part.zero_rows);
    append(out.non_finite, part.non_finite);
    append(out.norms, part.norms);
    for (std::ptrdiff_t l = first; l < end; ++l) {
      auto const at = static_cast<std::size_t>(l), its = static_cast<std::size_t>(l - first);
      whole.per_sequence.inter_token[at] = measured.per_sequence.inter_token[its];
      whole.per_sequence.rms_norm[at] = measured.per_sequence.rms_norm[its];
      if (l + 1 < end) whole.per_sequence.adjacent[at] = measured.per_sequence.adjacent[its];
    }
    first = end;
  }
  rflow::measured const no = status::different_widths;
  rflow::layer_variance& v = out.variance;
  v.by = by;
  v.st1 = v.st2 = v.path_energy = v.path_length = v.factor = no;
  v.steps.assign(static_cast<std::size_t>(sites - 1), no);
  v.curvature.assign(static_cast<std::size_t>(sites > 2 ? sites - 2 : 0), no);
  out.spread_bounds = {no, no};
  return whole;
}

}  // namespace report
