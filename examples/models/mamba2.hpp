// SPDX-License-Identifier: Apache-2.0
#pragma once

// Mamba-2: one decay per head, B and C shared by the heads of a group, a gated norm before the
// output. Computed by its recurrence; chunks would change the order of the sums, not the result.

#include <cmath>
#include <limits>
#include <string>

#include "layers.hpp"
#include "weights.hpp"

namespace models {

class mamba2 {
 public:
  struct config {
    integer layers = 64, hidden = 2560, heads = 80, width = 64, state = 128, groups = 1, kernel = 4;
    integer vocabulary = 50288;
    bool convolution_bias = true, bias = false;
    float epsilon = 1e-5f;
    float least_step = 0, most_step = std::numeric_limits<float>::infinity();

    integer inner() const { return heads * width; }
    integer channels() const { return inner() + 2 * groups * state; }
  };

  explicit mamba2(config const& c) : c_(c) { norm_.epsilon = last_.epsilon = c_.epsilon; }

  static constexpr char const* name = "mamba2";
  integer layers() const { return c_.layers; }
  integer hidden() const { return c_.hidden; }
  integer vocabulary() const { return c_.vocabulary; }
  integer positions() const { return 0; }

  parameter embedding() const {
    return {"backbone.embeddings.weight", {c_.vocabulary, c_.hidden}, role::embedding};
  }

  template <class Visit>
  void outer(Visit const& visit) {
    visit(embedding(), unloaded{});
    visit({"backbone.norm_f.weight", {c_.hidden}, role::gain}, last_.gain);
    visit({"lm_head.weight", {c_.vocabulary, c_.hidden}, role::embedding, true}, unloaded{});
  }

  template <class Visit>
  void block(integer i, Visit const& visit) {
    integer const d = c_.hidden, e = c_.inner(), all = e + c_.channels() + c_.heads;
    std::string const at = "backbone.layers." + std::to_string(i) + ".", in = at + "mixer.";
    visit({at + "norm.weight", {d}, role::gain}, norm_.gain);
    visit({in + "in_proj.weight", {all, d}, role::linear}, in_.weight);
    if (c_.bias) visit({in + "in_proj.bias", {all}, role::bias}, in_.bias);
    visit({in + "conv1d.weight", {c_.channels(), 1, c_.kernel}, role::convolution}, taps_);
    if (c_.convolution_bias)
      visit({in + "conv1d.bias", {c_.channels()}, role::convolution_bias}, taps_bias_);
    visit({in + "dt_bias", {c_.heads}, role::step_bias}, step_bias_);
    visit({in + "A_log", {c_.heads}, role::log_decay}, log_decay_);
    visit({in + "D", {c_.heads}, role::skip}, skip_);
    visit({in + "norm.weight", {e}, role::gain}, gate_gain_);
    visit({in + "out_proj.weight", {d, e}, role::residual_linear}, out_.weight);
    if (c_.bias) visit({in + "out_proj.bias", {d}, role::bias}, out_.bias);
  }

  static bool ignored(std::string const&) { return false; }

  void embed(run const& r, weight_source const& source, matrix& h) const {
    integer const d = c_.hidden;
    over_rows(r.threads, h.rows(), [&](integer first, integer last) {
      for (integer t = first; t < last; ++t)
        source.read(embedding(), r.tokens.ids[static_cast<std::size_t>(t)] * d, d, h.row(t).data());
    });
  }

  void apply(integer, run const& r, matrix& h) {
    integer const d = c_.hidden, e = c_.inner(), rows = h.rows();
    norm_(r, h, normed_);
    packed_.pack(r.threads, row_map(normed_.data(), rows, d, Eigen::OuterStride<>(d)));
    projected_.resize(rows, e + c_.channels() + c_.heads);
    in_(r.threads, packed_, projected_);
    convolve(r, projected_.middleCols(e, c_.channels()), taps_, taps_bias_, mixed_);
    scan(r);
    gate(r);
    packed_.pack(r.threads, row_map(y_.data(), rows, e, Eigen::OuterStride<>(e)));
    out_(r.threads, packed_, h, true);
  }

  void final_norm(run const& r, matrix const& h, matrix& out) const { last_(r, h, out); }

 private:
  void scan(run const& r) {
    integer const p = c_.width, n = c_.state, e = c_.inner();
    y_.resize(projected_.rows(), e);
    r.threads.run(r.tokens.sequences() * c_.heads, [&](integer task) {
      integer const s = task / c_.heads, h = task % c_.heads;
      integer const group = h / (c_.heads / c_.groups);
      float const decay = -std::exp(log_decay_[h]);
      thread_local Eigen::ArrayXXf state;  // n × p
      state.setZero(n, p);
      for (integer t = r.tokens.first(s); t < r.tokens.first(s + 1); ++t) {
        float const raw = projected_(t, e + c_.channels() + h) + step_bias_[h];
        float const step =
            std::clamp(raw > 20 ? raw : std::log1p(std::exp(raw)), c_.least_step, c_.most_step);
        float const kept = std::exp(step * decay);
        float const* const row = mixed_.row(t).data();
        Eigen::Map<Eigen::ArrayXf const> const b(row + e + group * n, n);
        Eigen::Map<Eigen::ArrayXf const> const c(row + e + (c_.groups + group) * n, n);
        float* const y = y_.row(t).data() + h * p;
        for (integer k = 0; k < p; ++k) {
          float const x = row[h * p + k];
          state.col(k) = kept * state.col(k) + (step * x) * b;
          y[k] = (state.col(k) * c).sum() + skip_[h] * x;
        }
      }
    });
  }

  /// y ← rms(y · SiLU(z)) · gain, each group by itself.
  void gate(run const& r) {
    integer const e = c_.inner(), part = e / c_.groups;
    over_rows(r.threads, y_.rows(), [&](integer first, integer last) {
      for (integer t = first; t < last; ++t) {
        auto y = y_.row(t).array();
        y *= silu(projected_.row(t).head(e).array());
        if (!r.control.normalise) continue;
        for (integer g = 0; g < c_.groups; ++g) {
          auto const piece = y.segment(g * part, part);
          y.segment(g * part, part) *= 1 / std::sqrt(piece.square().mean() + c_.epsilon);
        }
        y *= gate_gain_.array().transpose();
      }
    });
  }

  config c_;
  norm norm_, last_;
  linear in_, out_;
  matrix taps_;
  vector taps_bias_, step_bias_, log_decay_, skip_, gate_gain_;
  packed_rows packed_;
  matrix normed_, projected_, mixed_, y_;
};

}  // namespace models
