// SPDX-License-Identifier: Apache-2.0
#pragma once

// How much representations change from layer to layer (St1, the path) and how far they spread about
// their mean over layers (St2). Both are sums of squares, so a token with massive activations can
// be most of them: look at the same figures without the first token.

#include <cmath>
#include <cstddef>
#include <limits>
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

/// A value, if double has it with all its digits.
inline measured in_range(double x) {
  bool const has = is_finite(x) && (x == 0 || std::abs(x) >= (std::numeric_limits<double>::min)());
  return has ? measured(x) : measured(status::out_of_range);
}
inline measured in_range(square_sum x) {
  double const value = x;
  return value == 0 && x.value > 0 ? measured(status::out_of_range) : in_range(value);
}

/// √(x / n), which a double has more often than x itself.
inline measured root(square_sum x, double n = 1) {
  double const value = std::ldexp(std::sqrt(x.value / n), x.exponent);
  return value == 0 && x.value > 0 ? measured(status::out_of_range) : in_range(value);
}

/// What squares are multiplied by, and why not if there is no such number.
struct square_factor {
  square_sum by = 1;
  status why = status::ok;

  measured of(square_sum x) const {
    return why == status::ok ? in_range(times(x, by)) : measured(why);
  }
  measured root_of(square_sum x, double n = 1) const {
    return why == status::ok ? root(times(x, by), n) : measured(why);
  }
};

inline square_factor variance_factor(flow_moments const& m, normalization by) {
  double const d = static_cast<double>(m.width);
  if (!(m.tokens > 0)) return {0, status::too_few_rows};
  switch (by) {
    case normalization::none: return {};
    case normalization::per_token: return {1 / m.tokens};
    case normalization::per_element: return {1 / (m.tokens * d)};
    case normalization::relative: break;
  }
  square_sum total;
  for (std::size_t l = 0; l < m.squares.size(); ++l) {
    if (m.non_finite[l].found()) return {0, status::non_finite};
    total += m.squares[l];
  }
  if (!(total.value > 0)) return {0, status::zero_rows};
  return {square_sum::of(static_cast<double>(m.sites) / total.value, -total.exponent)};
}

/// Whether every site of first … last is finite.
inline bool finite_sites(flow_moments const& m, std::size_t first, std::size_t last) {
  for (std::size_t l = first; l <= last; ++l)
    if (m.non_finite[l].found()) return false;
  return true;
}

/// √(mean over tokens of ‖x‖²) of a site.
inline measured rms_norm(flow_moments const& m, std::size_t site) {
  if (m.non_finite[site].found()) return status::non_finite;
  return m.tokens > 0 ? root(m.squares[site], m.tokens) : measured(status::too_few_rows);
}

inline measured step_of(flow_moments const& m, std::size_t l, square_factor const& factor) {
  return finite_sites(m, l, l + 1) ? factor.root_of(m.steps[l]) : measured(status::non_finite);
}

/// The angle between steps l and l + 1.
inline measured curvature_of(flow_moments const& m, std::size_t l) {
  if (!finite_sites(m, l, l + 2)) return status::non_finite;
  if (!(m.tokens > 0)) return status::too_few_rows;
  if (!(m.steps[l].value > 0 && m.steps[l + 1].value > 0)) return status::zero_step;
  double const angle = m.turns[l].angle();
  return is_finite(angle) ? measured(angle) : measured(status::out_of_range);
}

/// The figures of a whole chain but for its single steps.
struct chain_figures {
  measured st1, st2, path_energy, path_length;
};

/// Does not allocate.
inline chain_figures chain_of(flow_moments const& m, square_factor const& factor) {
  auto const all = [](status why) { return chain_figures{why, why, why, why}; };
  if (!finite_sites(m, 0, m.squares.size() - 1)) return all(status::non_finite);
  auto const sites = static_cast<double>(m.sites);
  chain_figures out = all(status::too_few_sites);
  out.st2 = factor.root_of(m.spread, sites);
  if (m.sites < 2) return out;
  square_sum energy;
  double length = 0;
  bool still = true;  // no step moves
  for (square_sum const& step : m.steps) {
    energy += step;
    if (factor.why != status::ok) continue;
    square_sum const square = times(step, factor.by);
    length += std::ldexp(std::sqrt(square.value), square.exponent);
    still = still && !(step.value > 0);
  }
  out.path_energy = factor.of(energy);
  out.st1 = factor.root_of(energy, sites - 1);
  if (factor.why != status::ok)
    out.path_length = factor.why;
  else
    out.path_length = length == 0 && !still ? measured(status::out_of_range) : in_range(length);
  return out;
}

inline layer_variance variance_of(flow_moments const& m, normalization by) {
  square_factor const factor = variance_factor(m, by);
  chain_figures const whole = chain_of(m, factor);
  layer_variance out{.st1 = whole.st1,
                     .st2 = whole.st2,
                     .path_energy = whole.path_energy,
                     .path_length = whole.path_length,
                     .steps = {},
                     .curvature = {},
                     .by = by,
                     .factor = factor.of(1)};
  for (std::size_t l = 0; l < m.steps.size(); ++l) out.steps.push_back(step_of(m, l, factor));
  for (std::size_t l = 0; l < m.turns.size(); ++l) out.curvature.push_back(curvature_of(m, l));
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
///         non_finite to what it takes part in; one site alone has no path: too_few_sites; a figure
///         that double does not have, such as a square of 1e160: out_of_range
/// @throws std::invalid_argument if sites differ in width
/// @note   O(S n d), one read; St2 from how far each row is off the mean so far, without
///         cancellation; angles from both legs of a triangle, so that small ones keep their digits
/// @see    arXiv 2510.06640, equations 3 and 4
template <class T, class Memory, class On = default_backend_t<Memory>>
layer_variance variance(layer_stack<T, Memory> const& stack,
                        normalization normalize = normalization::none, On const& on = {}) {
  static_assert(backend_for<On, Memory>, "rflow: this backend cannot read where the stack lives");
  detail::require_one_width("rflow::variance", stack);
  return detail::variance_of(on.flow(stack), normalize);
}

template <detail::no_stack X, class... More>
layer_variance variance(X const&, More const&...) {
  static_cast<void>(sizeof(detail::refuse_stackless<X>));
  return {};
}

}  // namespace rflow
