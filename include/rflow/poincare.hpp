// SPDX-License-Identifier: Apache-2.0
#pragma once

// Discrete Poincaré bounds: how far a chain of representations can be spread about its mean, given
// the energy of its steps. The bounds are exact and attained, but wide for long chains: use measured
// St2 to compare two models, and the certificate only where it decides.

#include <cmath>
#include <cstddef>
#include <numbers>
#include <string>

#include <rflow/view.hpp>

namespace rflow {

/// Lower and upper bound on Σ_l ‖X_l − X̄‖², in the units of the path energy given.
struct bounds {
  double lower;  ///< at least 0
  double upper;  ///< at least lower
};

namespace detail {

/// Smallest and largest non-zero eigenvalue of the path graph's Laplacian on n vertices.
inline bounds path_spectrum(std::ptrdiff_t n) {
  double const angle = std::numbers::pi / (2.0 * static_cast<double>(n));
  double const sine = std::sin(angle), cosine = std::cos(angle);
  return {4 * sine * sine, 4 * cosine * cosine};
}

inline void require_chain(char const* where, double path_energy, std::ptrdiff_t sites) {
  if (sites < 2) reject(where, "a chain needs at least 2 sites, not " + std::to_string(sites));
  if (path_energy < 0) reject(where, "path energy is negative: " + std::to_string(path_energy));
}

}  // namespace detail

/// Bounds on the spread of a chain X_0 … X_{S−1} about its mean layer.
///
///     E / λ_{S−1}  ≤  Σ_l ‖X_l − X̄‖²_F  ≤  E / λ_1,     λ_k = 4 sin²(π k / 2S)
///
/// @param  path_energy  E = Σ_l ‖X_{l+1} − X_l‖²_F, at least 0
/// @param  sites        S, the number of representations (blocks + 1)
/// @return both bounds; equal for S = 2; NaN if E is. Attained by X_l ∝ cos(π(l + ½)/S) (upper) and
///         X_l ∝ (−1)^l sin(π(l + ½)/S) (lower)
/// @throws std::invalid_argument if S < 2 or E < 0
/// @see    arXiv 2510.06640, appendix A.3, lemma 1. The paper leaves the constant open; this is the
///         exact one
inline bounds poincare_bounds(double path_energy, std::ptrdiff_t sites) {
  detail::require_chain("rflow::poincare_bounds", path_energy, sites);
  bounds const lambda = detail::path_spectrum(sites);
  return {path_energy / lambda.upper, path_energy / lambda.lower};
}

/// What two path energies alone can say about two St2.
enum class ordering { certified_greater, certified_less, undecided };

/// Whether St2² of chain a is certainly greater or less than that of chain b, whatever the chains.
///
/// Certain when E_a/(S_a λ_max) > E_b/(S_b λ_1), or the reverse. The gap that takes is wide: an
/// energy ratio above cot²(π/2S), 441 for two chains of 33 sites. It usually stays undecided.
///
/// @param  path_energy_a, path_energy_b  Σ_l ‖Δ_l‖²_F of each chain, under the same normalisation
/// @param  sites_a, sites_b              number of representations in each
/// @return undecided also if either energy is NaN
/// @throws std::invalid_argument if a chain has fewer than 2 sites or a negative energy
/// @see    arXiv 2510.06640, theorem 6
inline ordering order(double path_energy_a, std::ptrdiff_t sites_a, double path_energy_b,
                      std::ptrdiff_t sites_b) {
  detail::require_chain("rflow::order", path_energy_a, sites_a);
  detail::require_chain("rflow::order", path_energy_b, sites_b);
  auto const st2_bounds = [](double energy, std::ptrdiff_t sites) {
    bounds const spread = poincare_bounds(energy, sites);
    auto const n = static_cast<double>(sites);
    return bounds{spread.lower / n, spread.upper / n};
  };
  bounds const a = st2_bounds(path_energy_a, sites_a), b = st2_bounds(path_energy_b, sites_b);
  if (a.lower > b.upper) return ordering::certified_greater;
  if (a.upper < b.lower) return ordering::certified_less;
  return ordering::undecided;
}

}  // namespace rflow
