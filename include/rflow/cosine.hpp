// SPDX-License-Identifier: Apache-2.0
#pragma once

// Cosines between tokens of one layer (do they all point the same way?) and between the same token
// in two layers (does the layer turn it?). Both are blind to norms, and a few tokens with massive
// activations dominate neither; leave attention sinks out with layer_stack::tokens() all the same,
// because a causal model's first token points elsewhere than the rest.

#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// Cosines between the same tokens of two layers.
struct adjacent_cosines {
  measured mean;                  ///< over tokens, in [−1, 1] to rounding: 1 + 1e-7 in fp32
  measured stddev;                ///< over tokens, at least 0 (divided by their number)
  std::ptrdiff_t left_out = 0;    ///< tokens whose row is zero in either layer
  std::vector<double> per_token;  ///< n values; NaN where left out. Empty unless asked for
};

namespace detail {

/// Mean cosine of ordered pairs, from the moments of one site.
inline measured mean_pair_cosine(flow_moments const& m, std::ptrdiff_t site) {
  auto const l = static_cast<std::size_t>(site);
  if (m.non_finite[l].found()) return status::non_finite;
  if (m.pairs[l] > 0) return m.pair_cosines[l] / m.pairs[l];
  return m.tokens < 2 || m.zero_rows[l] == 0 ? status::too_few_rows : status::zero_rows;
}

inline adjacent_cosines cosines_of_pair(flow_moments const& m, std::ptrdiff_t pair) {
  auto const l = static_cast<std::size_t>(pair);
  adjacent_cosines out;
  if (m.non_finite[l].found() || m.non_finite[l + 1].found()) {
    out.mean = out.stddev = status::non_finite;
    return out;
  }
  running_stat const& cosine = m.cosine[l];
  out.left_out = static_cast<std::ptrdiff_t>(m.tokens - cosine.count);
  if (cosine.count > 0) {
    out.mean = cosine.mean;
    out.stddev = cosine.stddev();
  } else {
    out.mean = out.stddev = m.tokens > 0 ? status::zero_rows : status::too_few_rows;
  }
  return out;
}

}  // namespace detail

/// Mean cosine between two different tokens of a layer.
///
///     InterSim(X) = 2/(n(n−1)) Σ_{i<j} cos(x_i, x_j) = (‖Σ u_i‖² − m)/(m(m−1)),   u_i = x_i/‖x_i‖
///
/// over the m rows that are not zero.
///
/// @param  x   n × d activations, tokens in rows
/// @param  on  where to run; by default where x lives
/// @return a number in [−1/(m−1), 1] to rounding; NaN with status too_few_rows (n < 2) or zero_rows (m < 2)
/// @throws std::invalid_argument if x is empty; std::domain_error on NaN or infinity
/// @note   O(n d), not O(n² d); norms in fp32 (fp64 for double), sums over tokens in fp64
/// @see    arXiv 2510.06640, equation 2
template <class X, class On = default_backend_t<memory_of<X>>>
measured inter_token_cosine(X const& x, On const& on = {}) {
  detail::require_readable<On, X>();
  auto const v = as_view(x);
  detail::require_shape("rflow::inter_token_cosine", v);
  flow_moments const m = on.flow(layer_stack{v}, flow_sink{.part = flow_part::inter_token});
  if (m.non_finite[0].found())
    detail::throw_non_finite("rflow::inter_token_cosine", "x", m.non_finite[0]);
  return detail::mean_pair_cosine(m, 0);
}

/// Cosine of each token's representation in one layer with its representation in the next.
///
/// This is the mean of per-token cosines. The cosine of token-averaged activations, which some tools
/// print, is another number.
///
/// @param  x, y  n × d activations of the same n tokens, of the same type
/// @param  on    where to run; by default where x lives
/// @return mean and standard deviation over tokens, and each token's value; tokens with a zero row
///         in either layer are left out and counted; NaN with status zero_rows if none is left
/// @throws std::invalid_argument if shapes disagree or are empty; std::domain_error on NaN or
///         infinity
/// @note   O(n d), one read
/// @see    arXiv 2510.06640, section 3.2
template <class X, class Y, class On = default_backend_t<memory_of<X>>>
adjacent_cosines adjacent_cosine(X const& x, Y const& y, On const& on = {}) {
  detail::require_readable<On, X, Y>();
  detail::require_same_memory<X, Y>();
  constexpr char const* where = "rflow::adjacent_cosine";
  auto const a = as_view(x);
  auto const b = as_view(y);
  static_assert(std::same_as<decltype(a), decltype(b)>,
                "rflow: adjacent layers of one model have one element type");
  detail::require_shape(where, a);
  detail::require_shape(where, b);
  if (a.rows != b.rows || a.cols != b.cols)
    detail::reject(where, "x is " + std::to_string(a.rows) + " x " + std::to_string(a.cols) +
                              ", y is " + std::to_string(b.rows) + " x " + std::to_string(b.cols));
  std::vector<double> per_token(static_cast<std::size_t>(a.rows));
  flow_moments const m = on.flow(
      layer_stack{a, b}, flow_sink{.cosine = per_token.data(), .part = flow_part::adjacent});
  for (std::size_t l = 0; l < 2; ++l)
    if (m.non_finite[l].found())
      detail::throw_non_finite(where, l == 0 ? "x" : "y", m.non_finite[l]);
  adjacent_cosines out = detail::cosines_of_pair(m, 0);
  out.per_token = std::move(per_token);
  return out;
}

}  // namespace rflow
