// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything but CKA that rflow knows about a chain of representations, from one read: cosines
// between tokens and between layers, St1, St2, the path and its Poincaré interval.

#include <cstddef>
#include <vector>

#include <rflow/cosine.hpp>
#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/poincare.hpp>
#include <rflow/variance.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// What flow() should compute besides.
struct flow_options {
  normalization normalize = normalization::none;  ///< of St1, St2 and the path
  bool per_token = false;  ///< keep each token's adjacent cosines and norms: S · n doubles
};

/// The flow of S sites over n tokens.
struct flow_report {
  std::ptrdiff_t sites = 0;                ///< S
  std::ptrdiff_t tokens = 0;               ///< n, those that count
  std::ptrdiff_t width = 0;                ///< d
  std::vector<measured> inter_token;       ///< S: mean cosine between tokens (of one sequence)
  std::vector<running_stat> per_sequence;  ///< S: the same of each sequence: mean and spread
  std::vector<adjacent_cosines> adjacent;  ///< S − 1: between a site and the next
  layer_variance variance;                 ///< St1, St2, path, curvature
  bounds spread_bounds;                    ///< on S · st2², same normalisation; as the path
  std::vector<measured> rms_norm;          ///< S: √(mean over tokens of ‖x‖²)
  std::vector<std::ptrdiff_t> zero_rows;   ///< S: tokens whose row is zero
  std::vector<position> non_finite;        ///< S: first NaN or infinity, if found()
  std::vector<std::vector<double>> norms;  ///< S × n: ‖x‖, if per_token; infinite where
                                           ///< double has no such number
};

/// Reports on moments, wherever they came from.
inline flow_report report_of(flow_moments const& m, normalization by = normalization::none) {
  flow_report out;
  out.sites = m.sites;
  out.tokens = static_cast<std::ptrdiff_t>(m.tokens);
  out.width = m.width;
  out.per_sequence = m.sequence_cosine;
  out.non_finite = m.non_finite;
  for (std::ptrdiff_t l = 0; l < m.sites; ++l) {
    auto const s = static_cast<std::size_t>(l);
    out.inter_token.push_back(detail::mean_pair_cosine(m, l));
    out.zero_rows.push_back(static_cast<std::ptrdiff_t>(m.zero_rows[s]));
    if (l + 1 < m.sites) out.adjacent.push_back(detail::cosines_of_pair(m, l));
    out.rms_norm.push_back(detail::rms_norm(m, s));
  }
  out.variance = detail::variance_of(m, by);
  measured const energy = out.variance.path_energy;
  out.spread_bounds =
      energy.ok() ? poincare_bounds(energy, m.sites) : bounds{energy.why, energy.why};
  return out;
}

/// The flow report of a chain of representations.
///
/// @param  stack    S sites of n × d activations: embedding and raw blocks, without the final norm.
///                  Masks and sequences of the stack hold for every figure
/// @param  options  normalisation; per-token values
/// @param  on       where to run; by default where the stack lives
/// @return every value with its status: a layer with a NaN or infinity spoils only what it takes
///         part in, and its first position is given
/// @throws std::invalid_argument if sites differ in width
/// @note   O(S n d), each activation read once from memory; 16·S·d doubles, and S·n if per_token
template <class T, class Memory, class On = default_backend_t<Memory>>
flow_report flow(layer_stack<T, Memory> const& stack, flow_options const& options = {},
                 On const& on = {}) {
  static_assert(backend_for<On, Memory>, "rflow: this backend cannot read where the stack lives");
  detail::require_one_width("rflow::flow", stack);
  auto const n = static_cast<std::size_t>(options.per_token ? stack.size() : 0);
  auto const sites = static_cast<std::size_t>(stack.sites());
  std::vector<double> cosine(n * (sites - 1)), norm(n * sites);
  flow_sink const sink{.cosine = n > 0 ? cosine.data() : nullptr,
                       .norm = n > 0 ? norm.data() : nullptr};
  flow_report out = report_of(on.flow(stack, sink), options.normalize);
  if (n > 0) {
    auto const row = [n](std::vector<double> const& table, std::size_t l) {
      auto const begin = table.begin() + static_cast<std::ptrdiff_t>(l * n);
      return std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(n));
    };
    for (std::size_t l = 0; l < sites; ++l) {
      out.norms.push_back(row(norm, l));
      if (l + 1 < sites) out.adjacent[l].per_token = row(cosine, l);
    }
  }
  return out;
}

template <detail::no_stack X, class... More>
flow_report flow(X const&, More const&...) {
  static_cast<void>(sizeof(detail::refuse_stackless<X>));
  return {};
}

}  // namespace rflow
