// SPDX-License-Identifier: Apache-2.0
#pragma once

// What one random transformer or Mamba layer does to St2 in expectation, in closed form; when the one
// spreads representations more than the other; and how far a chain can move when its steps contract.
//
// The layers are the linearised ones of arXiv 2510.06640, section 4: rows x_t ~ N(0, Σ), independent;
// parameters fixed; GELU(z) and SiLU(z) taken as z/2; attention weights taken as equal; the state
// space time-invariant. The source's displayed formulas were not at hand: those below are derived
// again from its assumptions and held against simulation (docs/theory.md says which, and what could
// not be recovered). They speak of real models only as far as these assumptions do.
//
// Matrices act on rows: X W. Nothing here keeps or changes the parameters it looks at.

#include <Eigen/Core>
#include <Eigen/Eigenvalues>  // λ_max(Σ), ‖W_o‖

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <rflow/view.hpp>

namespace rflow {

// ---- the layers ---------------------------------------------------------------------------------

/// f(X) = A + F(X + A), A the attention over X, F(Y) = GELU(Y W_1 + b_1) W_2 + b_2, of d features and
/// m hidden ones. The matrices of queries and keys are not here: they leave the closed form when
/// attention weights are equal.
struct transformer_layer {
  view<double> value;      ///< d × d: W_V, an output projection multiplied in
  view<double> up;         ///< d × m: W_1
  view<double> down;       ///< m × d: W_2
  view<double> up_bias;    ///< m values in one row or column, or an empty view for zeros: b_1
  view<double> down_bias;  ///< d values, likewise: b_2
  bool causal = false;     ///< token t attends to tokens up to t, each by 1/t; else to all, by 1/N
};

/// f(X)_t = W_oᵀ (y_t ⊙ g_t), of d features and e channels: u = SiLU(conv(X W_u)) by a causal
/// depthwise convolution, y_t = Σ_k h_k ⊙ u_{t−k}, g = SiLU(X W_g).
struct mamba_layer {
  view<double> in;       ///< d × e: W_u
  view<double> gate;     ///< d × e: W_g
  view<double> taps;     ///< K × e: row j multiplies the token j steps back
  view<double> impulse;  ///< k × e: row k is h_k; zero beyond the last row. See impulse_response
  view<double> out;      ///< e × d: W_o
};

/// First two moments of an N × d update f(X) over random X.
struct update_moments {
  std::vector<double> mean;  ///< d: every row of E[f(X)]
  double mean_square = 0;    ///< ‖E[f(X)]‖²_F, over all N rows
  double trace = 0;          ///< tr Cov(f(X)), over all N rows

  /// E[St2²] of the chain X, X + f(X), without normalisation: ¼ (‖μ‖²_F + tr Σ_f), proposition 1.
  double expected_st2_square() const { return (mean_square + trace) / 4; }
};

namespace detail {

using theory_matrix = Eigen::MatrixXd;

/// A named parameter, checked and as a matrix.
inline theory_matrix parameter(char const* where, char const* name, view<double> const& x,
                               std::ptrdiff_t rows, std::ptrdiff_t cols) {
  std::string const extent = std::to_string(x.rows) + " x " + std::to_string(x.cols);
  if (x.rows <= 0 || x.cols <= 0 || x.data == nullptr)
    reject(where, std::string(name) + " is empty: " + extent);
  if (x.rows != rows || x.cols != cols)
    reject(where, std::string(name) + " is " + extent + ", expected " + std::to_string(rows) +
                      " x " + std::to_string(cols));
  theory_matrix out(rows, cols);
  for (std::ptrdiff_t j = 0; j < cols; ++j)
    for (std::ptrdiff_t i = 0; i < rows; ++i) out(i, j) = x(i, j);
  if (!out.allFinite())
    throw std::domain_error(std::string(where) + ": " + name + " holds a NaN or an infinity");
  return out;
}

/// The same for a vector, in a row or in a column; zeros for an empty view.
inline Eigen::VectorXd parameter_vector(char const* where, char const* name, view<double> const& x,
                                        std::ptrdiff_t size) {
  if (x.data == nullptr && x.rows == 0) return Eigen::VectorXd::Zero(size);
  if (x.rows == 1) return parameter(where, name, x, 1, size).transpose();
  return parameter(where, name, x, size, 1);
}

inline void require_tokens(char const* where, std::ptrdiff_t tokens) {
  if (tokens < 1) reject(where, std::to_string(tokens) + " tokens");
}

struct covariance_matrix {
  theory_matrix value;
  double largest;  ///< eigenvalue
};

/// Σ, symmetric and positive semidefinite to rounding.
inline covariance_matrix covariance_parameter(char const* where, view<double> const& x,
                                              std::ptrdiff_t d) {
  theory_matrix const value = parameter(where, "covariance", x, d, d);
  double const size = value.cwiseAbs().maxCoeff(), rounding = 1e-10 * size;
  if ((value - value.transpose()).cwiseAbs().maxCoeff() > rounding)
    reject(where,
           "the " + std::to_string(d) + " x " + std::to_string(d) + " covariance is not symmetric");
  Eigen::SelfAdjointEigenSolver<theory_matrix> const spectrum(value, Eigen::EigenvaluesOnly);
  double const least = spectrum.eigenvalues()(0), largest = spectrum.eigenvalues()(d - 1);
  if (least < -rounding * static_cast<double>(d))
    reject(where, "the " + std::to_string(d) + " x " + std::to_string(d) +
                      " covariance is not positive semidefinite: it has the eigenvalue " +
                      std::to_string(least));
  return {value, largest};
}

/// tr(Aᵀ B).
inline double trace_of(theory_matrix const& a, theory_matrix const& b) {
  return a.cwiseProduct(b).sum();
}

/// What theorems 3 and 4 and the contractive bound look at.
struct mamba_statistics {
  std::ptrdiff_t d, e;
  covariance_matrix sigma;
  theory_matrix in, gate, taps, impulse, out;
  theory_matrix response;  ///< Σ_{j+k=τ} c_j ⊙ h_k in row τ < N
  theory_matrix r, t;      ///< R = QᵀΣQ, T = P_0ᵀΣQ
};

inline mamba_statistics statistics_of(char const* where, mamba_layer const& layer,
                                      view<double> const& covariance, std::ptrdiff_t tokens) {
  require_tokens(where, tokens);
  std::ptrdiff_t const d = layer.in.rows, e = layer.in.cols;
  mamba_statistics m{d, e, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  m.in = parameter(where, "in", layer.in, d, e);
  m.gate = parameter(where, "gate", layer.gate, d, e);
  m.taps = parameter(where, "taps", layer.taps, layer.taps.rows, e);
  m.impulse = parameter(where, "impulse", layer.impulse, layer.impulse.rows, e);
  m.out = parameter(where, "out", layer.out, e, d);
  m.sigma = covariance_parameter(where, covariance, d);
  m.response = theory_matrix::Zero(tokens, e);
  for (std::ptrdiff_t j = 0; j < m.taps.rows(); ++j)
    for (std::ptrdiff_t k = 0; k < m.impulse.rows() && j + k < tokens; ++k)
      m.response.row(j + k) += m.taps.row(j).cwiseProduct(m.impulse.row(k));
  theory_matrix const seen = m.sigma.value * m.gate;  // Σ W_g
  m.r = 0.25 * m.gate.transpose() * seen;
  m.t = 0.25 * m.response.row(0).transpose().asDiagonal() * (m.in.transpose() * seen);
  return m;
}

}  // namespace detail

// ---- theorems 1 to 4 ----------------------------------------------------------------------------

/// Mean and covariance trace of a transformer layer's update.
///
///     μ = 1 mᵀ,   m = ½ W_2ᵀ b_1 + b_2
///     tr Σ = N tr(WᵀΣW) + h [ tr((I+W)ᵀ W_VᵀΣW_V (I+W)) + 2 tr(WᵀΣW_V(I+W)) ],   W = ½ W_1 W_2
///
/// h = 1 for full attention, H_N = 1 + ½ + … + 1/N for causal attention. That attention itself has
/// mean zero (propositions 2 and 3) holds with the softmax in place: it is odd in X, whose law is even.
///
/// @param  layer       parameters of d features; views stay the caller's
/// @param  covariance  d × d: Σ of a row of X
/// @param  tokens      N, at least 1
/// @throws std::invalid_argument if shapes disagree, N < 1, or Σ is not positive semidefinite;
///         std::domain_error on NaN or infinity
/// @note   O(d² (d + m)); equal attention weights are the mean-field step of the source's proof
/// @see    arXiv 2510.06640, theorems 1 and 2; derived again
inline update_moments expected_update(transformer_layer const& layer,
                                      view<double> const& covariance, std::ptrdiff_t tokens) {
  constexpr char const* where = "rflow::expected_update";
  using detail::trace_of;
  detail::require_tokens(where, tokens);
  std::ptrdiff_t const d = layer.value.rows, hidden = layer.up.cols;
  auto const value = detail::parameter(where, "value", layer.value, d, d);
  auto const up = detail::parameter(where, "up", layer.up, d, hidden);
  auto const down = detail::parameter(where, "down", layer.down, hidden, d);
  auto const up_bias = detail::parameter_vector(where, "up_bias", layer.up_bias, hidden);
  auto const down_bias = detail::parameter_vector(where, "down_bias", layer.down_bias, d);
  auto const sigma = detail::covariance_parameter(where, covariance, d).value;

  auto const n = static_cast<double>(tokens);
  double shares = layer.causal ? 0 : 1;
  for (std::ptrdiff_t t = tokens; layer.causal && t > 0; --t) shares += 1 / static_cast<double>(t);
  detail::theory_matrix const w = 0.5 * up * down;
  detail::theory_matrix const passed =
      value * (w + detail::theory_matrix::Identity(d, d));  // W_V (I + W)
  Eigen::VectorXd const mean = 0.5 * down.transpose() * up_bias + down_bias;

  update_moments out;
  out.mean.assign(mean.data(), mean.data() + d);
  out.mean_square = n * mean.squaredNorm();
  // The sum of the docstring, gathered so that every term is at least 0.
  detail::theory_matrix const both = w + passed;
  out.trace = (n - shares) * trace_of(w, sigma * w) + shares * trace_of(both, sigma * both);
  return out;
}

/// Mean and covariance trace of a Mamba layer's update.
///
///     μ = 1 (W_oᵀ m_0)ᵀ,   tr Σ = Σ_t tr((S_t ⊙ R + T ⊙ Tᵀ) W_o W_oᵀ),   t = 1 … N
///     P_τ = ½ W_u diag(Σ_{j+k=τ} c_j ⊙ h_k),   Q = ½ W_g,   R = QᵀΣQ,   T = P_0ᵀΣQ
///     m_0 = diag(T),   S_t = Σ_{τ<t} P_τᵀΣP_τ
///
/// by Isserlis' theorem for products of two linear forms of Gaussians.
///
/// @param  layer       parameters of d features and e channels; views stay the caller's
/// @param  covariance  d × d: Σ of a row of X
/// @param  tokens      N, at least 1
/// @throws std::invalid_argument if shapes disagree, N < 1, or Σ is not positive semidefinite;
///         std::domain_error on NaN or infinity
/// @note   O(N e² + d e (d + e)). The state space must not depend on the input: with the selective B
///         and C of the real Mamba the update is cubic in X, and this formula is another layer's
/// @see    arXiv 2510.06640, theorems 3 and 4; derived again
inline update_moments expected_update(mamba_layer const& layer, view<double> const& covariance,
                                      std::ptrdiff_t tokens) {
  auto const m = detail::statistics_of("rflow::expected_update", layer, covariance, tokens);
  auto const n = static_cast<double>(tokens);
  // Σ_t S_t: what reaches a token from τ back is there N − τ times.
  Eigen::VectorXd times(tokens);
  for (std::ptrdiff_t tau = 0; tau < tokens; ++tau) times(tau) = static_cast<double>(tokens - tau);
  detail::theory_matrix const passed = m.response.transpose() * times.asDiagonal() * m.response;
  detail::theory_matrix const s =
      0.25 * (m.in.transpose() * m.sigma.value * m.in).cwiseProduct(passed);
  detail::theory_matrix const covariances =
      s.cwiseProduct(m.r) + n * m.t.cwiseProduct(m.t.transpose());
  Eigen::VectorXd const mean = m.out.transpose() * m.t.diagonal();

  update_moments out;
  out.mean.assign(mean.data(), mean.data() + m.d);
  out.mean_square = n * mean.squaredNorm();
  out.trace = detail::trace_of(m.out, covariances * m.out);
  return out;
}

/// h_k = C Ā^k B̄ (+ D at k = 0) of a diagonal state space, for mamba_layer::impulse.
///
/// @param  decay   e × s: Ā, per channel and state
/// @param  input   e × s: B̄
/// @param  output  e × s: C
/// @param  skip    e values in one row or column, or an empty view for zeros: D
/// @param  steps   how many h_k, at least 1; N of them are all that matters to N tokens
/// @return steps × e values, row-major: rflow::view(result, steps, e)
/// @throws std::invalid_argument if shapes disagree or steps < 1; std::domain_error on NaN or infinity
inline std::vector<double> impulse_response(view<double> const& decay, view<double> const& input,
                                            view<double> const& output, view<double> const& skip,
                                            std::ptrdiff_t steps) {
  constexpr char const* where = "rflow::impulse_response";
  if (steps < 1) detail::reject(where, std::to_string(steps) + " steps");
  std::ptrdiff_t const e = decay.rows, states = decay.cols;
  auto const a = detail::parameter(where, "decay", decay, e, states);
  auto const b = detail::parameter(where, "input", input, e, states);
  auto const c = detail::parameter(where, "output", output, e, states);
  auto const direct = detail::parameter_vector(where, "skip", skip, e);
  std::vector<double> out;
  detail::theory_matrix state = b;
  for (std::ptrdiff_t k = 0; k < steps; ++k) {
    Eigen::VectorXd h = c.cwiseProduct(state).rowwise().sum();
    if (k == 0) h += direct;
    out.insert(out.end(), h.data(), h.data() + e);
    state = state.cwiseProduct(a);
  }
  return out;
}

/// Upper bound on the covariance trace of a Mamba layer whose state space contracts.
///
///     tr Σ ≤ N ‖W_o‖²_op Σ_i [ ¼ λ_max(Σ) ‖w_i‖² ‖c_i‖²_1 η_i² / (1 − ρ²) · R_ii + T_ii² ]
///
/// whenever |h_{k,i}| ≤ η_i ρ^k, with w_i and c_i the columns i of W_u and of the taps.
///
/// @param  eta  e values in one row or column, at least 0: Σ|C_i B̄_i| + |D_i| will do
/// @param  rho  at least 0, below 1: the largest |Ā|
/// @throws std::invalid_argument if ρ ≥ 1, a shape disagrees, or the impulse response breaks the
///         condition; std::domain_error on NaN or infinity
/// @note   a bound for every N; not tight
/// @see    arXiv 2510.06640, section 4; the constant is ours, the source's is lost
inline double contractive_trace_bound(mamba_layer const& layer, view<double> const& covariance,
                                      std::ptrdiff_t tokens, view<double> const& eta, double rho) {
  constexpr char const* where = "rflow::contractive_trace_bound";
  if (!(rho >= 0 && rho < 1))
    detail::reject(where, "rho is " + std::to_string(rho) + ", not in [0, 1)");
  auto const m = detail::statistics_of(where, layer, covariance, tokens);
  auto const envelope = detail::parameter_vector(where, "eta", eta, m.e);
  double power = 1;
  for (std::ptrdiff_t k = 0; k < m.impulse.rows(); ++k, power *= rho)
    for (std::ptrdiff_t i = 0; i < m.e; ++i)
      if (!(std::abs(m.impulse(k, i)) <= envelope(i) * power * (1 + 1e-12)))
        detail::reject(where, "the impulse response of channel " + std::to_string(i) + " at step " +
                                  std::to_string(k) + " is " + std::to_string(m.impulse(k, i)) +
                                  ", above eta rho^k = " + std::to_string(envelope(i) * power));
  double sum = 0;
  for (std::ptrdiff_t i = 0; i < m.e; ++i) {
    double const reach = m.taps.col(i).cwiseAbs().sum() * envelope(i);
    sum += 0.25 * m.sigma.largest * m.in.col(i).squaredNorm() * reach * reach / (1 - rho * rho) *
               m.r(i, i) +
           m.t(i, i) * m.t(i, i);
  }
  // ‖W_o‖²_op is the largest eigenvalue of the smaller of W_oᵀW_o and W_oW_oᵀ.
  detail::theory_matrix const gram = m.e < m.d ? detail::theory_matrix(m.out * m.out.transpose())
                                               : detail::theory_matrix(m.out.transpose() * m.out);
  Eigen::SelfAdjointEigenSolver<detail::theory_matrix> const spectrum(gram, Eigen::EigenvaluesOnly);
  return static_cast<double>(tokens) * spectrum.eigenvalues()(gram.rows() - 1) * sum;
}

// ---- theorem 5 ----------------------------------------------------------------------------------

/// The input variance below which the transformer layer spreads representations more.
///
///     E[St2²_T] > E[St2²_M]  exactly when  0 < s < s* = (τ + √(τ² + 4 N‖m‖² κ)) / (2κ)
///
/// where Σ = s Σ_0, τ = tr Σ_T and κ = ‖μ_M‖²_F + tr Σ_M, both at s = 1: with s the transformer's
/// trace grows in proportion and all of the Mamba layer's moments as the square.
///
/// @param  transformer, mamba  expected_update of each under Σ_0 (s = 1) and the same N
/// @return s*; infinity if the Mamba layer does nothing (κ = 0) and the transformer layer something;
///         0 if neither does anything
/// @throws std::invalid_argument if a moment is negative or NaN
/// @see    arXiv 2510.06640, theorem 5. Its general case is a cubic whose coefficients are lost: not here
inline double threshold(update_moments const& transformer, update_moments const& mamba) {
  double const constant = transformer.mean_square, tau = transformer.trace;
  double const kappa = mamba.mean_square + mamba.trace;
  if (!(constant >= 0 && tau >= 0 && mamba.mean_square >= 0 && mamba.trace >= 0))
    detail::reject("rflow::threshold", "moments are squares, not " + std::to_string(constant) +
                                           ", " + std::to_string(tau) + ", " +
                                           std::to_string(mamba.mean_square) + ", " +
                                           std::to_string(mamba.trace));
  if (tau == 0 && constant == 0) return 0;
  if (kappa == 0) return std::numeric_limits<double>::infinity();
  return (tau + std::hypot(tau, 2 * std::sqrt(constant) * std::sqrt(kappa))) / (2 * kappa);
}

// ---- chains of many layers ----------------------------------------------------------------------

/// Upper bound on the path energy of a chain whose steps shrink or grow by given factors at most.
///
///     ‖Δ_l‖ ≤ ℓ_l ‖Δ_{l−1}‖ for l = 1 … L−1   implies   Σ_l ‖Δ_l‖² ≤ ‖Δ_0‖² Σ_l Π_{j≤l} ℓ_j²
///
/// The condition is one on the chain. Lipschitz blocks imply it when all are the same block, with
/// ℓ = Lip(id + f); different blocks do not: after the identity, a constant shift moves a chain that
/// stood still. For bounds on St2 give the result to poincare_bounds, and two of them to order
/// (theorem 6), which is in <rflow/poincare.hpp>.
///
/// @param  first_step_square  ‖Δ_0‖²
/// @param  factors            ℓ_1 … ℓ_{L−1}; empty for a chain of one step
/// @throws std::invalid_argument if anything is negative or NaN
/// @see    arXiv 2510.06640, appendix A.3, lemma 2
inline double propagation_bound(double first_step_square, std::span<double const> factors) {
  constexpr char const* where = "rflow::propagation_bound";
  if (!(first_step_square >= 0))
    detail::reject(where, "the first step's square is " + std::to_string(first_step_square));
  double product = 1, sum = 1;
  for (std::size_t l = 0; l < factors.size(); ++l) {
    if (!(factors[l] >= 0))
      detail::reject(where, "factor " + std::to_string(l + 1) + " of " +
                                std::to_string(factors.size()) + " is " +
                                std::to_string(factors[l]));
    product *= factors[l] * factors[l];
    sum += product;
  }
  return first_step_square * sum;
}

/// The same with one factor ρ < 1 for every step: ‖Δ_0‖² (1 − ρ^{2L}) / (1 − ρ²), L the number of
/// blocks.
/// @throws std::invalid_argument if ρ is not in [0, 1), L < 1, or the square is negative or NaN
inline double propagation_bound(double first_step_square, double rho, std::ptrdiff_t blocks) {
  constexpr char const* where = "rflow::propagation_bound";
  if (!(first_step_square >= 0))
    detail::reject(where, "the first step's square is " + std::to_string(first_step_square));
  if (!(rho >= 0 && rho < 1))
    detail::reject(where, "rho is " + std::to_string(rho) + ", not in [0, 1)");
  if (blocks < 1) detail::reject(where, std::to_string(blocks) + " blocks");
  if (rho == 0) return first_step_square;
  // expm1 keeps digits where ρ is close to 1.
  double const log_square = 2 * std::log(rho);
  return first_step_square * std::expm1(static_cast<double>(blocks) * log_square) /
         std::expm1(log_square);
}

}  // namespace rflow
