// SPDX-License-Identifier: Apache-2.0
#pragma once

// How much representations change from layer to layer (St1, the path) and how far they spread about
// their mean over layers (St2). Both are sums of squares, so a token with massive activations can
// be most of them: look at the same figures without the first token.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string_view>
#include <vector>

#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// By what squared quantities are divided. The paper's tables use one that its text does not state.
enum class normalization {
  none,         ///< 1: the theory's
  per_token,    ///< n
  per_element,  ///< n d: a mean square per coordinate
  relative,     ///< mean_l ‖X_l‖²_F: no units
};

constexpr std::string_view to_string(normalization by) {
  switch (by) {
    case normalization::none: return "none";
    case normalization::per_token: return "per_token";
    case normalization::per_element: return "per_element";
    case normalization::relative: return "relative";
  }
  return "unknown";
}

/// Change along a chain of S sites. Squares carry `factor`, lengths its root, so that
/// poincare_bounds(path_energy, S) contains S · st2² under every normalisation.
struct layer_variance {
  measured st1;                            ///< √(path_energy / (S − 1)), layer-local
  measured st2;                            ///< √(Σ_l ‖X_l − X̄‖² / S), layer-global
  measured path_energy;                    ///< Σ_l ‖X_{l+1} − X_l‖²
  measured path_length;                    ///< Σ_l ‖X_{l+1} − X_l‖
  std::vector<measured> steps;             ///< S − 1: ‖X_{l+1} − X_l‖
  std::vector<measured> curvature;         ///< S − 2: angle between consecutive steps, in [0, π]
  normalization by = normalization::none;  ///< what was asked for
  measured factor;                         ///< what squares were multiplied by
};

namespace detail {

/// A value made of squares, if they stayed in the range of double.
inline measured in_range(double x) {
  return is_finite(x) ? measured(x) : measured(status::out_of_range);
}

inline measured root(measured x) { return x.ok() ? measured(std::sqrt(x.value)) : x; }

/// Whether rows that are not zero have squares that are, or nearly: too small for double.
inline bool squares_underflow(flow_moments const& m, std::size_t site) {
  return m.zero_rows[site] < m.tokens && m.squares[site] < 1e-290;
}

inline measured variance_factor(flow_moments const& m, normalization by) {
  double const d = static_cast<double>(m.width);
  if (!(m.tokens > 0)) return status::too_few_rows;
  switch (by) {
    case normalization::none: return 1;
    case normalization::per_token: return 1 / m.tokens;
    case normalization::per_element: return 1 / (m.tokens * d);
    case normalization::relative: break;
  }
  double total = 0;
  for (std::size_t l = 0; l < m.squares.size(); ++l) {
    if (m.non_finite[l].found()) return status::non_finite;
    total += m.squares[l];
  }
  if (!(total > 0)) return status::zero_rows;
  if (!is_finite(total)) return status::out_of_range;
  return in_range(static_cast<double>(m.sites) / total);
}

inline layer_variance variance_of(flow_moments const& m, normalization by) {
  layer_variance out;
  out.by = by;
  out.factor = variance_factor(m, by);
  auto const scaled = [&](double square) -> measured {
    return out.factor.ok() ? in_range(square * out.factor.value) : measured(out.factor.why);
  };
  auto const finite = [&](std::size_t site) { return !m.non_finite[site].found(); };

  bool tiny = true;
  for (std::size_t l = 0; l < m.squares.size(); ++l) tiny = tiny && squares_underflow(m, l);
  if (tiny) out.factor = status::out_of_range;

  double energy = 0;
  bool chain_finite = finite(0);
  for (std::size_t l = 0; l < m.steps.size(); ++l) {
    bool const both = finite(l) && finite(l + 1);
    chain_finite = chain_finite && both;
    energy += m.steps[l];
    out.steps.push_back(both ? root(scaled(m.steps[l])) : measured(status::non_finite));
  }
  for (std::size_t l = 0; l < m.turns.size(); ++l) {
    double const norms = std::sqrt(m.steps[l]) * std::sqrt(m.steps[l + 1]);
    if (!(finite(l) && finite(l + 1) && finite(l + 2)))
      out.curvature.push_back(status::non_finite);
    else if (!(m.tokens > 0))
      out.curvature.push_back(status::too_few_rows);
    else if (tiny || !is_finite(norms) || !is_finite(m.turns[l]))
      out.curvature.push_back(status::out_of_range);
    else if (!(norms > 0))
      out.curvature.push_back(status::zero_step);
    else  // rounding may leave a cosine just outside
      out.curvature.push_back(std::acos(std::clamp(m.turns[l] / norms, -1.0, 1.0)));
  }

  auto const sites = static_cast<double>(m.sites);
  if (!chain_finite) {
    out.st1 = out.st2 = out.path_energy = out.path_length = status::non_finite;
    return out;
  }
  out.st2 = root(scaled(m.spread / sites));
  if (m.sites < 2) {
    out.st1 = out.path_energy = out.path_length = status::too_few_sites;
    return out;
  }
  out.path_energy = scaled(energy);
  out.st1 = root(scaled(energy / (sites - 1)));
  out.path_length = out.path_energy;
  if (out.path_length.ok()) {
    out.path_length.value = 0;
    for (measured const& step : out.steps) out.path_length.value += step.value;
    out.path_length = in_range(out.path_length.value);
  }
  return out;
}

}  // namespace detail

/// St1, St2 and the path of a chain of representations.
///
///     St1² = 1/L Σ_l ‖X_{l+1} − X_l‖²_F,   St2² = 1/S Σ_l ‖X_l − X̄‖²_F,   L = S − 1
///
/// @param  stack      S sites of n × d activations: embedding and raw blocks, without the final norm
/// @param  normalize  by what squares are divided
/// @param  on         where to run; by default where the stack lives
/// @return roots and squares under that normalisation; a site with a NaN or infinity gives status
///         non_finite to what it takes part in; one site alone has no path: too_few_sites; doubles
///         beyond 1e±145 or so, whose squares have no double: out_of_range
/// @throws std::invalid_argument if sites differ in width
/// @note   O(S n d), one read; St2 by a running mean, without cancellation
/// @see    arXiv 2510.06640, equations 3 and 4
template <class T, class Memory, class On = default_backend_t<Memory>>
layer_variance variance(layer_stack<T, Memory> const& stack,
                        normalization normalize = normalization::none, On const& on = {}) {
  static_assert(backend_for<On, Memory>, "rflow: this backend cannot read where the stack lives");
  detail::require_one_width("rflow::variance", stack);
  return detail::variance_of(on.flow(stack), normalize);
}

template <detail::loose_layers Layers, class... More>
layer_variance variance(Layers const&, More const&...) {
  detail::refuse_loose<Layers>();
  return {};
}

}  // namespace rflow
