// SPDX-License-Identifier: Apache-2.0
#pragma once

// Discrete Poincaré bounds: how far a chain of representations can be spread about its mean, given
// the energy of its steps. The bounds are exact and attained, but wide for long chains: use measured
// St2 to compare two models, and the certificate only where it decides.

#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <string>

#include <rflow/view.hpp>

namespace rflow {

/// Lower and upper bound on Σ_l ‖X_l − X̄‖², in the units of the path energy given.
struct bounds {
  measured lower;  ///< at least 0
  measured upper;  ///< at least lower; out_of_range above the largest double
};

namespace detail {

/// Eigenvalues of the path graph's Laplacian.
struct path_eigenvalues {
  double smallest, largest;  // of those that are not 0
};
inline path_eigenvalues path_spectrum(std::ptrdiff_t n) {
  double const angle = std::numbers::pi / (2.0 * static_cast<double>(n));
  double const sine = std::sin(angle), cosine = std::cos(angle);
  return {4 * sine * sine, 4 * cosine * cosine};
}

inline void require_chain(char const* where, double path_energy, std::ptrdiff_t sites) {
  if (sites < 2) reject(where, "a chain needs at least 2 sites, not " + std::to_string(sites));
  if (path_energy < 0) reject(where, "path energy is negative: " + std::to_string(path_energy));
  if (path_energy > (std::numeric_limits<double>::max)()) reject(where, "path energy is infinite");
}

}  // namespace detail

/// Bounds on the spread of a chain X_0 … X_{S−1} about its mean layer.
///
///     E / λ_{S−1}  ≤  Σ_l ‖X_l − X̄‖²_F  ≤  E / λ_1,     λ_k = 4 sin²(π k / 2S)
///
/// @param  path_energy  E = Σ_l ‖X_{l+1} − X_l‖²_F, at least 0
/// @param  sites        S, the number of representations (blocks + 1)
/// @return both bounds; equal for S = 2. Attained by X_l ∝ cos(π(l + ½)/S) (upper) and
///         X_l ∝ (−1)^l sin(π(l + ½)/S) (lower). An upper bound that no double holds is out_of_range;
///         both are non_finite if E is NaN
/// @throws std::invalid_argument if S < 2, E < 0 or E is infinite
/// @see    arXiv 2510.06640, appendix A.3, lemma 1. The paper leaves the constant open; this is the
///         exact one
inline bounds poincare_bounds(double path_energy, std::ptrdiff_t sites) {
  detail::require_chain("rflow::poincare_bounds", path_energy, sites);
  auto const lambda = detail::path_spectrum(sites);
  auto const bound = [&](double eigenvalue) {
    if (!detail::is_finite(path_energy)) return measured(status::non_finite);
    double const value = path_energy / eigenvalue;
    return detail::is_finite(value) ? measured(value) : measured(status::out_of_range);
  };
  return {bound(lambda.largest), bound(lambda.smallest)};
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
/// @throws std::invalid_argument if a chain has fewer than 2 sites, or an energy that is negative or
///         infinite
/// @see    arXiv 2510.06640, theorem 6
inline ordering order(double path_energy_a, std::ptrdiff_t sites_a, double path_energy_b,
                      std::ptrdiff_t sites_b) {
  detail::require_chain("rflow::order", path_energy_a, sites_a);
  detail::require_chain("rflow::order", path_energy_b, sites_b);
  // An upper bound beyond the largest double is infinite here, which no lower one exceeds.
  auto const certain = [](double more, std::ptrdiff_t its_sites, double less,
                          std::ptrdiff_t other_sites) {
    double const lower = more / static_cast<double>(its_sites);
    double const upper = less / static_cast<double>(other_sites);
    return lower / detail::path_spectrum(its_sites).largest >
           upper / detail::path_spectrum(other_sites).smallest;
  };
  if (certain(path_energy_a, sites_a, path_energy_b, sites_b)) return ordering::certified_greater;
  if (certain(path_energy_b, sites_b, path_energy_a, sites_a)) return ordering::certified_less;
  return ordering::undecided;
}

}  // namespace rflow
