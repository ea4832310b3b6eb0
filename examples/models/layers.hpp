// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the architectures share: tokens of several sequences, norms, activations, attention,
// the causal convolution.

#include <unsupported/Eigen/SpecialFunctions>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "product.hpp"

namespace models {

/// Token ids of one or more sequences, one after the other. No padding: sequence s has the tokens
/// [offsets[s], offsets[s + 1]).
struct batch {
  std::vector<std::int64_t> ids;
  std::vector<integer> offsets;

  static batch one(std::vector<std::int64_t> ids) {
    auto const n = static_cast<integer>(ids.size());
    return {std::move(ids), {0, n}};
  }
  integer tokens() const { return static_cast<integer>(ids.size()); }
  integer sequences() const { return static_cast<integer>(offsets.size()) - 1; }
  integer first(integer s) const { return offsets[static_cast<std::size_t>(s)]; }
  integer length(integer s) const { return first(s + 1) - first(s); }
  integer longest() const {
    integer most = 0;
    for (integer s = 0; s < sequences(); ++s) most = std::max(most, length(s));
    return most;
  }
  /// Of each token: its place in its sequence.
  std::vector<integer> positions() const {
    std::vector<integer> out;
    out.reserve(ids.size());
    for (integer s = 0; s < sequences(); ++s)
      for (integer i = 0; i < length(s); ++i) out.push_back(i);
    return out;
  }
};

/// Changes to a model that the random-initialisation study asks for.
struct controls {
  bool normalise = true;      ///< false: every norm passes its input on
  float embedding_scale = 1;  ///< factor on the embedding output
};

/// What a forward pass works with.
struct run {
  team& threads;
  batch const& tokens;
  std::vector<integer> positions;
  controls control;
};

/// Calls f(first, last) for blocks of rows.
template <class F>
void over_rows(team& threads, integer rows, F const& f) {
  constexpr integer block = 16;
  threads.run((rows + block - 1) / block,
              [&](integer i) { f(i * block, std::min(rows, (i + 1) * block)); });
}

// ---- norms --------------------------------------------------------------------------------------

/// LayerNorm, or RMSNorm where there is no shift.
struct norm {
  vector gain, shift;
  float epsilon = 1e-5f;

  void operator()(run const& r, matrix const& x, matrix& y) const {
    y.resize(x.rows(), x.cols());
    over_rows(r.threads, x.rows(), [&](integer first, integer last) {
      for (integer t = first; t < last; ++t) {
        if (!r.control.normalise) {
          y.row(t) = x.row(t);
          continue;
        }
        auto const row = x.row(t).array();
        if (shift.size() > 0) {
          float const mean = row.mean();
          float const variance = (row - mean).square().mean();
          y.row(t) = (row - mean) * (1 / std::sqrt(variance + epsilon)) * gain.array().transpose() +
                     shift.array().transpose();
        } else {
          float const scale = 1 / std::sqrt(row.square().mean() + epsilon);
          y.row(t) = row * scale * gain.array().transpose();
        }
      }
    });
  }
};

// ---- activations --------------------------------------------------------------------------------

enum class activation { gelu_erf, gelu_tanh };

template <class Row>
void activate(activation f, Row&& row) {
  constexpr float half_root = 0.70710678118654752f, root_2_pi = 0.79788456080286536f;
  if (f == activation::gelu_erf)
    row = 0.5f * row * (1 + (row * half_root).erf());
  else
    row = 0.5f * row * (1 + (root_2_pi * (row + 0.044715f * row.cube())).tanh());
}

inline void activate(run const& r, activation f, matrix& x) {
  over_rows(r.threads, x.rows(), [&](integer first, integer last) {
    for (integer t = first; t < last; ++t) activate(f, x.row(t).array());
  });
}

template <class X>
auto silu(X const& x) {
  return x * x.logistic();
}

/// log(1 + exp(x)); x itself where the difference is below rounding.
template <class X>
auto softplus(X const& x) {
  return (x > 20.f).select(x, x.min(20.f).exp().log1p());
}

// ---- attention ----------------------------------------------------------------------------------

/// Queries, keys and values of all heads: token t of head h begins at data + t · row + h · head.
struct heads {
  float const* q;
  float const* k;
  float const* v;
  integer row, head;
  integer count, width;
};

/// Causal softmax attention, sequence by sequence; each token sees itself and the window − 1 before.
/// @param out  tokens × (count · width)
inline void attend(run const& r, heads const& in, float scale, integer window, matrix& out) {
  constexpr integer block = 64;
  out.resize(r.tokens.tokens(), in.count * in.width);
  struct piece {
    integer first, begin, end;  // tokens [begin, end) of the sequence that begins at `first`
  };
  std::vector<piece> pieces;
  for (integer s = 0; s < r.tokens.sequences(); ++s)
    for (integer q = 0; q < r.tokens.length(s); q += block)
      pieces.push_back({r.tokens.first(s), q, std::min(q + block, r.tokens.length(s))});
  auto const count = static_cast<integer>(pieces.size());

  r.threads.run(count * in.count, [&](integer task) {
    thread_local matrix scores;
    piece const p = pieces[static_cast<std::size_t>(task % count)];
    integer const h = task / count, rows = p.end - p.begin;
    integer const oldest = std::max<integer>(0, p.begin - window + 1);  // the first key of use
    integer const keys = p.end - oldest;
    auto const map = [&](float const* data, integer token, integer n) {
      return row_map(data + (p.first + token) * in.row + h * in.head, n, in.width,
                     Eigen::OuterStride<>(in.row));
    };
    scores.resize(rows, keys);
    scores.noalias() = scale * map(in.q, p.begin, rows) * map(in.k, oldest, keys).transpose();
    for (integer i = 0; i < rows; ++i) {
      integer const at = p.begin + i - oldest;  // the key that is the token itself
      integer const from = std::max<integer>(0, at - window + 1);
      auto seen = scores.row(i).segment(from, at + 1 - from).array();
      float const most = seen.maxCoeff();
      seen = (seen - most).exp();
      seen *= 1 / seen.sum();
      scores.row(i).head(from).setZero();
      scores.row(i).tail(keys - 1 - at).setZero();
    }
    out.block(p.first + p.begin, h * in.width, rows, in.width).noalias() =
        scores * map(in.v, oldest, keys);
  });
}

// ---- the convolution of state-space blocks ------------------------------------------------------

/// Causal depthwise convolution and SiLU of the first channels of x: y_t = Σ_j w_j x_{t−k+1+j} + b.
/// @param weight  channels × kernel;  bias  channels, or empty
inline void convolve(run const& r, Eigen::Ref<matrix const> x, matrix const& weight,
                     vector const& bias, matrix& y) {
  integer const kernel = weight.cols(), channels = weight.rows();
  matrix const taps = weight.transpose();
  y.resize(x.rows(), channels);
  over_rows(r.threads, x.rows(), [&](integer first, integer last) {
    thread_local Eigen::ArrayXf sum;
    for (integer t = first; t < last; ++t) {
      sum = Eigen::ArrayXf::Zero(channels);
      if (bias.size() > 0) sum = bias.array();
      for (integer j = 0; j < kernel; ++j) {
        integer const back = kernel - 1 - j;
        if (back > r.positions[static_cast<std::size_t>(t)]) continue;
        sum += taps.row(j).array().transpose() * x.row(t - back).head(channels).array().transpose();
      }
      y.row(t) = silu(sum).transpose().matrix();
    }
  });
}

}  // namespace models
