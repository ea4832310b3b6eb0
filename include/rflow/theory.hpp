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

// Before anything that an older Eigen does not have.
static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0),
              "rflow: Eigen 3.4 or newer is needed: put its directory first among the include "
              "directories, or set Eigen3_DIR for CMake");

#include <algorithm>
#include <cmath>
#include <concepts>
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

/// First two moments of an N × d update f(X) over random X. What no double holds is out_of_range.
struct update_moments {
  std::vector<double> mean;  ///< d: every row of E[f(X)]; empty where a value is beyond double
  measured mean_square = 0;  ///< ‖E[f(X)]‖²_F, over all N rows
  measured trace = 0;        ///< tr Cov(f(X)), over all N rows

  /// E[St2²] of the chain X, X + f(X), without normalisation: ¼ (‖μ‖²_F + tr Σ_f), proposition 1.
  measured expected_st2_square() const {
    if (!mean_square.ok()) return mean_square;
    return trace.ok() ? measured(mean_square / 4 + trace / 4) : trace;
  }
};

namespace detail {

/// value · 2^exponent, if a double holds it.
inline measured scaled_back(double value, int exponent) {
  double const x = std::ldexp(value, exponent);
  return is_finite(x) ? measured(x) : measured(status::out_of_range);
}

inline void require_tokens(char const* where, std::ptrdiff_t tokens) {
  if (tokens < 1) reject(where, std::to_string(tokens) + " tokens");
}

inline void require_square(char const* where, double x) {
  if (!(x >= 0) || !is_finite(x)) reject(where, "the first step's square is " + std::to_string(x));
}

/// The algebra of all that follows. A template, so that who includes this header and calls none of it
/// does not wait for Eigen's solvers to be compiled.
/// @tparam Real  double
template <class Real>
struct theory_algebra {
  using matrix = Eigen::Matrix<Real, Eigen::Dynamic, Eigen::Dynamic>;
  using vector = Eigen::Matrix<Real, Eigen::Dynamic, 1>;

  /// A named parameter, checked and as a matrix.
  static matrix parameter(char const* where, char const* name, view<double> const& x,
                          std::ptrdiff_t rows, std::ptrdiff_t cols) {
    std::string const extent = std::to_string(x.rows) + " x " + std::to_string(x.cols);
    if (x.rows <= 0 || x.cols <= 0 || x.data == nullptr)
      reject(where, std::string(name) + " is empty: " + extent);
    if (x.rows != rows || x.cols != cols)
      reject(where, std::string(name) + " is " + extent + ", expected " + std::to_string(rows) +
                        " x " + std::to_string(cols));
    matrix out(rows, cols);
    for (std::ptrdiff_t j = 0; j < cols; ++j)
      for (std::ptrdiff_t i = 0; i < rows; ++i) out(i, j) = x(i, j);
    if (!out.allFinite())
      throw std::domain_error(std::string(where) + ": " + name + " holds a NaN or an infinity");
    return out;
  }

  /// The same for a vector, in a row or in a column; zeros for an empty view.
  static vector parameter_vector(char const* where, char const* name, view<double> const& x,
                                 std::ptrdiff_t size) {
    if (x.data == nullptr && x.rows == 0) return vector::Zero(size);
    if (x.rows == 1) return parameter(where, name, x, 1, size).transpose();
    return parameter(where, name, x, size, 1);
  }

  /// value · 2^exponent.
  struct scaled_matrix {
    matrix value;  ///< entries below 2, one of them at least 1; or all 0
    int exponent;
  };

  /// The same matrix by a power of two, so that no product of matrices leaves the range of double.
  static scaled_matrix scaled(matrix x) {
    double const largest = x.size() > 0 ? x.cwiseAbs().maxCoeff() : 0;
    int const exponent = largest > 0 ? std::ilogb(largest) : 0;
    x = x.unaryExpr([&](double v) { return std::ldexp(v, -exponent); });
    return {std::move(x), exponent};
  }

  /// The sum of matrices of any sizes.
  static scaled_matrix sum_of(scaled_matrix const& a, scaled_matrix const& b) {
    if (a.value.isZero(0)) return b;
    if (b.value.isZero(0)) return a;
    int const exponent = (std::max)(a.exponent, b.exponent);
    auto const moved = [&](scaled_matrix const& x) {
      return x.value.unaryExpr([&](double v) { return std::ldexp(v, x.exponent - exponent); });
    };
    scaled_matrix out = scaled(moved(a) + moved(b));
    out.exponent += exponent;
    return out;
  }
  static scaled_matrix product_of(scaled_matrix const& a, scaled_matrix const& b) {
    scaled_matrix out = scaled(a.value * b.value);
    out.exponent += a.exponent + b.exponent;
    return out;
  }

  /// Sets the mean row and ‖1 mᵀ‖²_F of N rows.
  static void set_mean(scaled_matrix const& m, double tokens, update_moments& out) {
    out.mean_square = scaled_back(tokens * m.value.squaredNorm(), 2 * m.exponent);
    out.mean.clear();
    for (std::ptrdiff_t j = 0; j < m.value.size(); ++j)
      out.mean.push_back(std::ldexp(m.value.data()[j], m.exponent));
    for (double const x : out.mean)
      if (!is_finite(x)) return out.mean.clear();
  }

  struct covariance_matrix {
    scaled_matrix scaled;
    double largest;  ///< eigenvalue of the scaled one
  };

  /// Σ, symmetric and positive semidefinite to rounding.
  static covariance_matrix covariance_parameter(char const* where, view<double> const& x,
                                                std::ptrdiff_t d) {
    scaled_matrix const scaled_value = scaled(parameter(where, "covariance", x, d, d));
    matrix const& value = scaled_value.value;
    double const size = value.cwiseAbs().maxCoeff(), rounding = 1e-10 * size;
    if ((value - value.transpose()).cwiseAbs().maxCoeff() > rounding)
      reject(where, "the " + std::to_string(d) + " x " + std::to_string(d) +
                        " covariance is not symmetric");
    Eigen::SelfAdjointEigenSolver<matrix> const spectrum(value, Eigen::EigenvaluesOnly);
    double const least = spectrum.eigenvalues()(0), largest = spectrum.eigenvalues()(d - 1);
    if (least < -rounding * static_cast<double>(d))
      reject(where, "the " + std::to_string(d) + " x " + std::to_string(d) +
                        " covariance is not positive semidefinite: it has the eigenvalue " +
                        std::to_string(std::ldexp(least, scaled_value.exponent)));
    return {scaled_value, largest};
  }

  /// tr(Aᵀ B).
  static double trace_of(matrix const& a, matrix const& b) { return a.cwiseProduct(b).sum(); }

  /// What theorems 3 and 4 and the contractive bound look at, of scaled parameters. All of the layer's
  /// moments are in proportion to them: in that of the squares (for μ of the values) of W_u, W_g, the
  /// taps, the impulse response, W_o and Σ.
  struct mamba_statistics {
    std::ptrdiff_t d, e;
    covariance_matrix sigma;
    scaled_matrix in, gate, taps, impulse, out;
    matrix response;  ///< Σ_{j+k=τ} c_j ⊙ h_k in row τ < N
    matrix r, t;      ///< R = QᵀΣQ, T = P_0ᵀΣQ

    /// What μ of the scaled parameters carries.
    int exponent() const {
      return in.exponent + gate.exponent + taps.exponent + impulse.exponent + out.exponent +
             sigma.scaled.exponent;
    }
  };

  static mamba_statistics statistics_of(char const* where, mamba_layer const& layer,
                                        view<double> const& covariance, std::ptrdiff_t tokens) {
    require_tokens(where, tokens);
    std::ptrdiff_t const d = layer.in.rows, e = layer.in.cols;
    auto const read = [&](char const* name, view<double> const& x, std::ptrdiff_t rows,
                          std::ptrdiff_t cols) {
      return scaled(parameter(where, name, x, rows, cols));
    };
    mamba_statistics m{d, e, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    m.in = read("in", layer.in, d, e);
    m.gate = read("gate", layer.gate, d, e);
    m.taps = read("taps", layer.taps, layer.taps.rows, e);
    m.impulse = read("impulse", layer.impulse, layer.impulse.rows, e);
    m.out = read("out", layer.out, e, d);
    m.sigma = covariance_parameter(where, covariance, d);
    m.response = matrix::Zero(tokens, e);
    for (std::ptrdiff_t j = 0; j < m.taps.value.rows(); ++j)
      for (std::ptrdiff_t k = 0; k < m.impulse.value.rows() && j + k < tokens; ++k)
        m.response.row(j + k) += m.taps.value.row(j).cwiseProduct(m.impulse.value.row(k));
    matrix const seen = m.sigma.scaled.value * m.gate.value;  // Σ W_g
    m.r = 0.25 * m.gate.value.transpose() * seen;
    m.t = 0.25 * m.response.row(0).transpose().asDiagonal() * (m.in.value.transpose() * seen);
    return m;
  }
};

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
/// @return moments; out_of_range where no double holds one
/// @note   O(d² (d + m)); equal attention weights are the mean-field step of the source's proof
/// @see    arXiv 2510.06640, theorems 1 and 2; derived again
template <std::same_as<double> Real = double>
update_moments expected_update(transformer_layer const& layer, view<double> const& covariance,
                               std::ptrdiff_t tokens) {
  using algebra = detail::theory_algebra<Real>;
  constexpr char const* where = "rflow::expected_update";
  detail::require_tokens(where, tokens);
  std::ptrdiff_t const d = layer.value.rows, hidden = layer.up.cols;
  auto const value = algebra::scaled(algebra::parameter(where, "value", layer.value, d, d));
  auto const up = algebra::scaled(algebra::parameter(where, "up", layer.up, d, hidden));
  auto const down = algebra::scaled(algebra::parameter(where, "down", layer.down, hidden, d));
  auto const up_bias =
      algebra::scaled(algebra::parameter_vector(where, "up_bias", layer.up_bias, hidden));
  auto const down_bias =
      algebra::scaled(algebra::parameter_vector(where, "down_bias", layer.down_bias, d));
  auto const sigma = algebra::covariance_parameter(where, covariance, d).scaled;

  auto const n = static_cast<double>(tokens);
  double shares = layer.causal ? 0 : 1;
  for (std::ptrdiff_t t = tokens; layer.causal && t > 0; --t) shares += 1 / static_cast<double>(t);
  typename algebra::scaled_matrix w = algebra::product_of(up, down), lifted = down;
  w.exponent -= 1;
  lifted.value.transposeInPlace();
  lifted.exponent -= 1;

  update_moments out;
  algebra::set_mean(algebra::sum_of(algebra::product_of(lifted, up_bias), down_bias), n, out);
  // The sum of the docstring, gathered so that every term is at least 0: W + W_V (I + W).
  typename algebra::scaled_matrix const both =
      algebra::sum_of(algebra::sum_of(w, value), algebra::product_of(value, w));
  auto const part = [&](double weight, typename algebra::scaled_matrix const& x) {
    return detail::scaled_back(weight * algebra::trace_of(x.value, sigma.value * x.value),
                               2 * x.exponent + sigma.exponent);
  };
  measured const own = part(n - shares, w), mixed = part(shares, both);
  out.trace =
      own.ok() && mixed.ok() ? detail::scaled_back(own + mixed, 0) : measured(status::out_of_range);
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
/// @return moments; out_of_range where no double holds one
/// @note   O(N e² + d e (d + e)). The state space must not depend on the input: with the selective B
///         and C of the real Mamba the update is cubic in X, and this formula is another layer's
/// @see    arXiv 2510.06640, theorems 3 and 4; derived again
template <std::same_as<double> Real = double>
update_moments expected_update(mamba_layer const& layer, view<double> const& covariance,
                               std::ptrdiff_t tokens) {
  using algebra = detail::theory_algebra<Real>;
  auto const m = algebra::statistics_of("rflow::expected_update", layer, covariance, tokens);
  auto const n = static_cast<double>(tokens);
  // Σ_t S_t: what reaches a token from τ back is there N − τ times.
  typename algebra::vector times(tokens);
  for (std::ptrdiff_t tau = 0; tau < tokens; ++tau) times(tau) = static_cast<double>(tokens - tau);
  typename algebra::matrix const passed = m.response.transpose() * times.asDiagonal() * m.response;
  typename algebra::matrix const s =
      0.25 * (m.in.value.transpose() * m.sigma.scaled.value * m.in.value).cwiseProduct(passed);
  typename algebra::matrix const covariances =
      s.cwiseProduct(m.r) + n * m.t.cwiseProduct(m.t.transpose());

  update_moments out;
  typename algebra::scaled_matrix mean = algebra::scaled(m.out.value.transpose() * m.t.diagonal());
  mean.exponent += m.exponent();
  algebra::set_mean(mean, n, out);
  out.trace = detail::scaled_back(algebra::trace_of(m.out.value, covariances * m.out.value),
                                  2 * m.exponent());
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
/// @throws std::invalid_argument if shapes disagree, steps < 1, or a value is beyond double;
///         std::domain_error on NaN or infinity
template <std::same_as<double> Real = double>
std::vector<double> impulse_response(view<double> const& decay, view<double> const& input,
                                     view<double> const& output, view<double> const& skip,
                                     std::ptrdiff_t steps) {
  using algebra = detail::theory_algebra<Real>;
  constexpr char const* where = "rflow::impulse_response";
  if (steps < 1) detail::reject(where, std::to_string(steps) + " steps");
  std::ptrdiff_t const e = decay.rows, states = decay.cols;
  auto const a = algebra::parameter(where, "decay", decay, e, states);
  auto const b = algebra::parameter(where, "input", input, e, states);
  auto const c = algebra::parameter(where, "output", output, e, states);
  auto const direct = algebra::parameter_vector(where, "skip", skip, e);
  std::vector<double> out;
  typename algebra::matrix state = b;
  for (std::ptrdiff_t k = 0; k < steps; ++k) {
    typename algebra::vector h = c.cwiseProduct(state).rowwise().sum();
    if (k == 0) h += direct;
    if (!h.allFinite())
      detail::reject(where, "the response leaves the range of double at step " + std::to_string(k));
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
/// @return the bound; out_of_range above the largest double
/// @note   a bound for every N; not tight
/// @see    arXiv 2510.06640, section 4; the constant is ours, the source's is lost
template <std::same_as<double> Real = double>
measured contractive_trace_bound(mamba_layer const& layer, view<double> const& covariance,
                                 std::ptrdiff_t tokens, view<double> const& eta, double rho) {
  using algebra = detail::theory_algebra<Real>;
  constexpr char const* where = "rflow::contractive_trace_bound";
  if (!(rho >= 0 && rho < 1))
    detail::reject(where, "rho is " + std::to_string(rho) + ", not in [0, 1)");
  auto const m = algebra::statistics_of(where, layer, covariance, tokens);
  auto const envelope = algebra::parameter_vector(where, "eta", eta, m.e);
  double power = 1;
  for (std::ptrdiff_t k = 0; k < m.impulse.value.rows(); ++k, power *= rho)
    for (std::ptrdiff_t i = 0; i < m.e; ++i) {
      double const response = std::ldexp(m.impulse.value(k, i), m.impulse.exponent);
      if (!(std::abs(response) <= envelope(i) * power * (1 + 1e-12)))
        detail::reject(where, "the impulse response of channel " + std::to_string(i) + " at step " +
                                  std::to_string(k) + " is " + std::to_string(response) +
                                  ", above eta rho^k = " + std::to_string(envelope(i) * power));
    }
  // The terms in η² and T², each in units of its own.
  auto const eta_scaled = algebra::scaled(envelope);
  double reached = 0, squares = 0;
  for (std::ptrdiff_t i = 0; i < m.e; ++i) {
    double const reach = m.taps.value.col(i).cwiseAbs().sum() * eta_scaled.value(i);
    reached += 0.25 * m.sigma.largest * m.in.value.col(i).squaredNorm() * reach * reach /
               ((1 - rho) * (1 + rho)) * m.r(i, i);
    squares += m.t(i, i) * m.t(i, i);
  }
  // ‖W_o‖²_op is the largest eigenvalue of the smaller of W_oᵀW_o and W_oW_oᵀ.
  typename algebra::matrix const& out = m.out.value;
  typename algebra::matrix const gram = m.e < m.d ? typename algebra::matrix(out * out.transpose())
                                                  : typename algebra::matrix(out.transpose() * out);
  Eigen::SelfAdjointEigenSolver<typename algebra::matrix> const spectrum(gram,
                                                                         Eigen::EigenvaluesOnly);
  double const factor = static_cast<double>(tokens) * spectrum.eigenvalues()(gram.rows() - 1);
  int const exponent = 2 * m.exponent();
  measured const first = detail::scaled_back(
                     factor * reached, exponent + 2 * (eta_scaled.exponent - m.impulse.exponent)),
                 second = detail::scaled_back(factor * squares, exponent);
  if (!first.ok() || !second.ok()) return status::out_of_range;
  return detail::scaled_back(first + second, 0);
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
///         0 if neither does anything; out_of_range if a moment is, or if no double holds s*
/// @throws std::invalid_argument if a moment is negative, NaN or infinite
/// @see    arXiv 2510.06640, theorem 5. Its general case is a cubic whose coefficients are lost: not here
inline measured threshold(update_moments const& transformer, update_moments const& mamba) {
  for (measured const& x :
       {transformer.mean_square, transformer.trace, mamba.mean_square, mamba.trace})
    if (!x.ok()) return x.why;
  double const constant = transformer.mean_square, tau = transformer.trace;
  for (double const x : {constant, tau, mamba.mean_square.value, mamba.trace.value})
    if (!(x >= 0) || !detail::is_finite(x))
      detail::reject("rflow::threshold", "moments are squares, not " + std::to_string(constant) +
                                             ", " + std::to_string(tau) + ", " +
                                             std::to_string(mamba.mean_square.value) + ", " +
                                             std::to_string(mamba.trace.value));
  double const quarter = mamba.mean_square / 4 + mamba.trace / 4;  // of κ, which may be too large
  if (tau == 0 && constant == 0) return 0;
  if (quarter == 0 && mamba.mean_square == 0 && mamba.trace == 0)
    return std::numeric_limits<double>::infinity();
  // (τ + √(τ² + 4 N‖m‖² κ)) / 2κ with moments and κ near 1, and the rest in exponents: s has the
  // larger of the units τ/κ and √(N‖m‖²/κ).
  auto const parts = [](double x, int& exponent) {  // x = value · 4^exponent
    exponent = x > 0 ? static_cast<int>(std::floor(std::ilogb(x) / 2.)) : 0;
    return std::ldexp(x, -2 * exponent);
  };
  int of_tau, of_constant, of_kappa;
  double const t = parts(tau, of_tau), c = parts(constant, of_constant),
               k = parts(quarter, of_kappa);
  // In units of 2^(of_constant − of_kappa) and 4^(of_tau − of_kappa).
  int const linear = 2 * (of_tau - of_kappa), root = of_constant - of_kappa;
  int const unit = tau == 0 ? root : constant == 0 ? linear : (std::max)(linear, root);
  double const a = std::ldexp(t / (8 * k), linear - unit),
               b = std::ldexp(std::sqrt(c / (4 * k)), root - unit);
  return detail::scaled_back(a + std::hypot(a, b), unit);
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
/// @return the bound; out_of_range above the largest double
/// @throws std::invalid_argument if anything is negative, NaN or infinite
/// @see    arXiv 2510.06640, appendix A.3, lemma 2
inline measured propagation_bound(double first_step_square, std::span<double const> factors) {
  constexpr char const* where = "rflow::propagation_bound";
  detail::require_square(where, first_step_square);
  // A term is product · 2^exponent: it may leave the range of double and come back.
  int exponent = 0;
  double product = std::frexp(first_step_square, &exponent), sum = first_step_square;
  for (std::size_t l = 0; l < factors.size(); ++l) {
    if (!(factors[l] >= 0) || !detail::is_finite(factors[l]))
      detail::reject(where, "factor " + std::to_string(l + 1) + " of " +
                                std::to_string(factors.size()) + " is " +
                                std::to_string(factors[l]));
    int more = 0, carried = 0;
    double const factor = std::frexp(factors[l], &more);
    product = std::frexp(product * factor * factor, &carried);
    constexpr int limit = 1 << 29;  // far beyond what a double holds
    exponent = std::clamp(exponent + 2 * more + carried, -limit, limit);
    sum += std::ldexp(product, exponent);
  }
  return detail::scaled_back(sum, 0);
}

/// The same with one factor ρ < 1 for every step: ‖Δ_0‖² (1 − ρ^{2L}) / (1 − ρ²), L the number of
/// blocks.
/// @throws std::invalid_argument if ρ is not in [0, 1), L < 1, or the square is negative, NaN or
///         infinite
inline measured propagation_bound(double first_step_square, double rho, std::ptrdiff_t blocks) {
  constexpr char const* where = "rflow::propagation_bound";
  detail::require_square(where, first_step_square);
  if (!(rho >= 0 && rho < 1))
    detail::reject(where, "rho is " + std::to_string(rho) + ", not in [0, 1)");
  if (blocks < 1) detail::reject(where, std::to_string(blocks) + " blocks");
  if (rho == 0) return first_step_square;
  // expm1 keeps digits where ρ is close to 1.
  double const log_square = 2 * std::log(rho);
  return detail::scaled_back(
      first_step_square *
          (std::expm1(static_cast<double>(blocks) * log_square) / std::expm1(log_square)),
      0);
}

}  // namespace rflow
