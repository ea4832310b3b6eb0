// SPDX-License-Identifier: Apache-2.0
#pragma once

// The one-layer blocks of the theory on many independent sequences at once, with random parameters:
// linearised, as the closed forms take them, and with softmax, GELU, SiLU and selection in place.
// Rows [i N, (i + 1) N) of a batch are sequence i. Buffers are kept from call to call.

#include <rflow/eigen.hpp>
#include <rflow/init.hpp>
#include <rflow/theory.hpp>

#include <unsupported/Eigen/SpecialFunctions>

#include <cmath>
#include <cstdint>
#include <vector>

namespace validation {

using integer = std::ptrdiff_t;
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using row = Eigen::RowVectorXf;
using wide = Eigen::MatrixXd;

/// linear: GELU(z) = SiLU(z) = z/2 and equal attention weights. real: neither.
enum class form { linear, real };

struct extent {
  integer tokens = 16, features = 16;
  integer hidden = 64;                          // of the MLP
  integer channels = 32, taps = 4, states = 8;  // of the Mamba layer
};

/// How a matrix of given fans is drawn; by default normal, so that an output has the variance of an
/// input.
using scheme = rflow::initializer (*)(rflow::fans const&);
inline rflow::initializer keep_variance(rflow::fans const& f) {
  return rflow::gaussian(1 / std::sqrt(f.in));
}

/// Matrices drawn one after the other: each is another matrix of the same seed.
class drawer {
 public:
  explicit drawer(std::uint64_t seed, scheme how = keep_variance) : seed_(seed), how_(how) {}
  matrix operator()(integer rows, integer cols, rflow::initializer const& how) {
    matrix out(rows, cols);
    rflow::draw(how, {seed_, next_++, 0, 0}, out, 1);
    return out;
  }
  matrix weight(integer in, integer out) {
    return (*this)(in, out, how_({static_cast<double>(in), static_cast<double>(out)}));
  }
  /// A whole number in [low, high].
  integer whole(integer low, integer high) {
    return std::min(high, low + static_cast<integer>((*this)(1, 1, rflow::uniform(0, 1))(0, 0) *
                                                     static_cast<float>(high - low + 1)));
  }

 private:
  std::uint64_t seed_;
  scheme how_;
  std::uint32_t next_ = 0;
};

/// The same parameters in double, for the closed forms.
class widened {
 public:
  rflow::view<double> operator()(matrix const& x) {
    kept_.push_back(x.cast<double>());
    return rflow::as_view(kept_.back());
  }
  explicit widened(std::size_t most) { kept_.reserve(most); }

 private:
  std::vector<wide> kept_;
};

// ---- the transformer layer ----------------------------------------------------------------------

struct transformer {
  matrix query, key, value, up, down, up_bias, down_bias;
  bool causal;
  integer tokens;

  transformer(drawer& draw, extent const& n, bool is_causal, double bias = 0.5)
      : query(draw.weight(n.features, n.features)),
        key(draw.weight(n.features, n.features)),
        value(draw.weight(n.features, n.features)),
        up(draw.weight(n.features, n.hidden)),
        down(draw.weight(n.hidden, n.features)),
        causal(is_causal),
        tokens(n.tokens) {
    up_bias = bias > 0 ? draw(1, n.hidden, rflow::gaussian(bias)) : matrix::Zero(1, n.hidden);
    down_bias = bias > 0 ? draw(1, n.features, rflow::gaussian(bias)) : matrix::Zero(1, n.features);
  }

  rflow::update_moments closed_form(wide const& covariance) const {
    widened w(5);
    return rflow::expected_update(
        rflow::transformer_layer{w(value), w(up), w(down), w(up_bias), w(down_bias), causal},
        rflow::as_view(covariance), tokens);
  }

  struct buffers {
    matrix q, k, v, a, hidden, scores;
  };

  /// a ← A(X)
  void attend(form as, matrix const& x, buffers& b, matrix& a) const {
    integer const d = x.cols(), sequences = x.rows() / tokens;
    b.v.resize(x.rows(), d), a.resize(x.rows(), d);
    b.v.noalias() = x * value;
    if (as == form::real) {
      b.q.resize(x.rows(), d), b.k.resize(x.rows(), d), b.scores.resize(tokens, tokens);
      b.q.noalias() = x * query;
      b.k.noalias() = x * key;
    }
    for (integer s = 0; s < sequences; ++s) {
      auto const v = b.v.middleRows(s * tokens, tokens);
      auto out = a.middleRows(s * tokens, tokens);
      if (as == form::real) {
        b.scores.noalias() =
            b.q.middleRows(s * tokens, tokens) * b.k.middleRows(s * tokens, tokens).transpose();
        b.scores *= 1 / std::sqrt(static_cast<float>(d));
        for (integer t = 0; t < tokens; ++t) {
          integer const seen = causal ? t + 1 : tokens;
          auto weights = b.scores.row(t).head(seen).array();
          float const most = weights.maxCoeff();
          weights = (weights - most).exp();
          weights *= 1 / weights.sum();
          b.scores.row(t).tail(tokens - seen).setZero();
        }
        out.noalias() = b.scores * v;
      } else if (causal) {
        out.row(0) = v.row(0);
        for (integer t = 1; t < tokens; ++t) out.row(t) = out.row(t - 1) + v.row(t);
        for (integer t = 1; t < tokens; ++t) out.row(t) *= 1 / static_cast<float>(t + 1);
      } else {
        out.row(0).noalias() = v.colwise().mean();
        out.bottomRows(tokens - 1).rowwise() = row(out.row(0));
      }
    }
  }

  /// y ← f(X)
  void operator()(form as, matrix const& x, buffers& b, matrix& y) const {
    attend(as, x, b, b.a);
    y.resize(x.rows(), x.cols()), b.hidden.resize(x.rows(), up.cols());
    y = x + b.a;
    b.hidden.noalias() = y * up;
    b.hidden.rowwise() += up_bias.row(0);
    constexpr float half_root = 0.70710678118654752f;
    if (as == form::real)
      b.hidden = 0.5f * b.hidden.array() * (1 + (half_root * b.hidden.array()).erf());
    else
      b.hidden *= 0.5f;
    y = b.a;
    y.noalias() += b.hidden * down;
    y.rowwise() += down_bias.row(0);
  }

  /// Multiply-adds for one sequence, linearised.
  double cost() const {
    auto const n = static_cast<double>(tokens), d = static_cast<double>(value.rows());
    return n * d * (d + 2 * static_cast<double>(up.cols()));
  }
};

// ---- the Mamba layer ----------------------------------------------------------------------------

struct mamba {
  matrix in, gate, taps, out;          // taps: row j is j steps back
  matrix decay, input, output, skip;   // states × channels; skip in one row
  matrix select_input, select_output;  // channels × states: what selection makes of B and C
  row select_step;                     // of Δ
  integer tokens;

  mamba(drawer& draw, extent const& n)
      : in(draw.weight(n.features, n.channels)),
        gate(draw.weight(n.features, n.channels)),
        taps(draw.weight(n.taps, n.channels)),
        out(draw.weight(n.channels, n.features)),
        decay(draw(n.states, n.channels, rflow::uniform(0.1, 0.95))),
        input(draw.weight(n.states, n.channels)),
        output(draw(n.states, n.channels, rflow::gaussian(1))),
        skip(draw(1, n.channels, rflow::gaussian(1))),
        select_input(draw.weight(n.channels, n.states)),
        select_output(draw.weight(n.channels, n.states)),
        select_step(draw(1, n.channels, rflow::gaussian(0.5)).row(0)),
        tokens(n.tokens) {}

  rflow::mamba_layer parameters(widened& w, std::vector<double>& impulse) const {
    impulse = rflow::impulse_response(w(decay.transpose()), w(input.transpose()),
                                      w(output.transpose()), w(skip), tokens);
    return {w(in), w(gate), w(taps), rflow::view(impulse, tokens, in.cols()), w(out)};
  }
  rflow::update_moments closed_form(wide const& covariance) const {
    widened w(8);
    std::vector<double> impulse;
    return rflow::expected_update(parameters(w, impulse), rflow::as_view(covariance), tokens);
  }
  double bound(wide const& covariance) const {
    widened w(9);
    std::vector<double> impulse;
    matrix const eta =
        (input.cwiseProduct(output).cwiseAbs().colwise().sum() + skip.cwiseAbs()) * 1.00001f;
    rflow::mamba_layer const layer = parameters(w, impulse);
    return rflow::contractive_trace_bound(layer, rflow::as_view(covariance), tokens, w(eta),
                                          static_cast<double>(decay.maxCoeff()));
  }

  struct buffers {
    matrix u, g, state, decayed, b, c;
    row v;
  };

  /// y ← f(X); where `selective`, B, C and the step Δ depend on the input, as in Mamba proper.
  void operator()(form as, matrix const& x, buffers& b, matrix& y, bool selective = false) const {
    integer const e = in.cols(), sequences = x.rows() / tokens;
    b.u.resize(x.rows(), e), b.g.resize(x.rows(), e), y.resize(x.rows(), x.cols());
    b.u.noalias() = x * in;
    b.g.noalias() = x * gate;
    auto const pass = [&](auto values) {
      if (as == form::real)
        values = values * values.logistic();
      else
        values *= 0.5f;
    };
    pass(b.g.array());
    // The convolution in place, from the last token back.
    for (integer s = 0; s < sequences; ++s)
      for (integer t = tokens; t-- > 0;) {
        auto at = b.u.row(s * tokens + t);
        at.array() *= taps.row(0).array();
        for (integer j = 1; j < std::min(taps.rows(), t + 1); ++j)
          at += b.u.row(s * tokens + t - j).cwiseProduct(taps.row(j));
      }
    pass(b.u.array());
    if (selective) {
      b.b.resize(x.rows(), decay.rows()), b.c.resize(x.rows(), decay.rows());
      b.b.noalias() = b.u * select_input;
      b.c.noalias() = b.u * select_output;
    }
    for (integer s = 0; s < sequences; ++s) {
      b.state.setZero(decay.rows(), e);
      for (integer r = s * tokens; r < (s + 1) * tokens; ++r) {
        auto u = b.u.row(r), g = b.g.row(r);
        if (selective) {  // the step scales what decays and what enters; 1 for an input of zero
          b.v = (u.array() * select_step.array() + 0.54132485f).exp().log1p();
          b.decayed = (decay.array().log().rowwise() * b.v.array()).exp();
          b.state = b.decayed.cwiseProduct(b.state);
          b.state.noalias() += b.b.row(r).transpose() * b.v.cwiseProduct(u);
          u.array() = b.c.row(r).array().matrix() * b.state + u.cwiseProduct(skip.row(0));
        } else {
          b.v = u.cwiseProduct(skip.row(0));
          for (integer k = 0; k < decay.rows(); ++k) {
            auto state = b.state.row(k);
            state = state.cwiseProduct(decay.row(k)) + input.row(k).cwiseProduct(u);
            b.v += state.cwiseProduct(output.row(k));
          }
          u = b.v;
        }
        g = g.cwiseProduct(u);
      }
    }
    y.noalias() = b.g * out;
  }

  /// Multiply-adds for one sequence, linearised.
  double cost() const {
    auto const n = static_cast<double>(tokens), e = static_cast<double>(in.cols());
    return n * e *
           (3 * static_cast<double>(in.rows()) + static_cast<double>(taps.rows()) +
            3 * static_cast<double>(decay.rows()));
  }
};

// ---- inputs -------------------------------------------------------------------------------------

/// Rows ~ N(0, s Σ_0), Σ_0 = rootᵀ root.
struct inputs {
  matrix root;
  std::uint64_t seed;
  std::uint32_t stream;

  inputs(drawer& draw, integer features, std::uint64_t of_seed, std::uint32_t of_stream)
      : root(draw.weight(features, features)), seed(of_seed), stream(of_stream) {
    root.diagonal().array() += 0.5f;
  }
  wide covariance(double s = 1) const {
    wide const r = root.cast<double>();
    return s * (r.transpose() * r);
  }
  double cost(integer tokens) const {
    return static_cast<double>(tokens) * static_cast<double>(root.size());
  }
  /// Rows [first, first + rows) of the stream.
  void draw(integer first, integer rows, double s, matrix& z, matrix& x) const {
    z.resize(rows, root.rows()), x.resize(rows, root.cols());
    rflow::draw(rflow::gaussian(std::sqrt(s)), {seed, stream, first, 0}, z, 1);
    x.noalias() = z * root;
  }
};

}  // namespace validation
