// SPDX-License-Identifier: Apache-2.0
#pragma once

// Mamba: a selective scan per channel, with a state of its own for each.

#include <string>

#include "layers.hpp"
#include "weights.hpp"

namespace models {

class mamba {
 public:
  struct config {
    integer layers = 64, hidden = 2560, inner = 5120, state = 16, rank = 160, kernel = 4;
    integer vocabulary = 50280;
    bool convolution_bias = true, bias = false;
    float epsilon = 1e-5f;
  };

  explicit mamba(config const& c) : c_(c) { norm_.epsilon = last_.epsilon = c_.epsilon; }

  static constexpr char const* name = "mamba";
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
    integer const d = c_.hidden, e = c_.inner, n = c_.state, k = c_.rank;
    std::string const at = "backbone.layers." + std::to_string(i) + ".", in = at + "mixer.";
    visit({at + "norm.weight", {d}, role::gain}, norm_.gain);
    visit({in + "in_proj.weight", {2 * e, d}, role::linear}, in_.weight);
    if (c_.bias) visit({in + "in_proj.bias", {2 * e}, role::bias}, in_.bias);
    visit({in + "conv1d.weight", {e, 1, c_.kernel}, role::convolution}, taps_);
    if (c_.convolution_bias) visit({in + "conv1d.bias", {e}, role::convolution_bias}, taps_bias_);
    visit({in + "x_proj.weight", {k + 2 * n, e}, role::linear}, select_.weight);
    visit({in + "dt_proj.weight", {e, k}, role::step_weight}, step_.weight);
    visit({in + "dt_proj.bias", {e}, role::step_bias}, step_.bias);
    visit({in + "A_log", {e, n}, role::log_decay}, log_decay_);
    visit({in + "D", {e}, role::skip}, skip_);
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
    integer const d = c_.hidden, e = c_.inner, rows = h.rows();
    norm_(r, h, normed_);
    packed_.pack(r.threads, row_map(normed_.data(), rows, d, Eigen::OuterStride<>(d)));
    xz_.resize(rows, 2 * e);
    in_(r.threads, packed_, xz_);

    convolve(r, xz_.leftCols(e), taps_, taps_bias_, x_);
    packed_.pack(r.threads, row_map(x_.data(), rows, e, Eigen::OuterStride<>(e)));
    selected_.resize(rows, c_.rank + 2 * c_.state);
    select_(r.threads, packed_, selected_);
    packed_.pack(r.threads,
                 row_map(selected_.data(), rows, c_.rank, Eigen::OuterStride<>(selected_.cols())));
    steps_.resize(rows, e);
    step_(r.threads, packed_, steps_);

    scan(r);
    packed_.pack(r.threads, row_map(x_.data(), rows, e, Eigen::OuterStride<>(e)));
    out_(r.threads, packed_, h, true);
  }

  void final_norm(run const& r, matrix const& h, matrix& out) const { last_(r, h, out); }

 private:
  /// x ← (scan(x) + D x) · SiLU(z), in place.
  void scan(run const& r) {
    constexpr integer lanes = 64;  // channels of a task: their state stays in L1
    using lane = Eigen::Array<float, lanes, 1>;
    integer const n = c_.state, e = c_.inner;
    integer const blocks = (e + lanes - 1) / lanes;
    r.threads.run(r.tokens.sequences() * blocks, [&](integer task) {
      integer const s = task / blocks, c0 = task % blocks * lanes;
      integer const count = std::min(lanes, e - c0);
      Eigen::Array<float, lanes, Eigen::Dynamic> decay(lanes, n), state(lanes, n);
      decay.setZero(), state.setZero();
      decay.topRows(count) = -log_decay_.middleRows(c0, count).array().exp();
      lane skip = lane::Zero();
      skip.head(count) = skip_.segment(c0, count).array();
      lane step = lane::Zero(), x = lane::Zero(), gate = lane::Zero();
      for (integer t = r.tokens.first(s); t < r.tokens.first(s + 1); ++t) {
        step.head(count) = steps_.row(t).segment(c0, count).array().transpose();
        x.head(count) = x_.row(t).segment(c0, count).array().transpose();
        gate.head(count) = xz_.row(t).segment(e + c0, count).array().transpose();
        step = softplus(step).eval();
        float const* const b = selected_.row(t).data() + c_.rank;
        float const* const c = b + n;
        lane const entry = step * x;
        lane y = skip * x;
        for (integer k = 0; k < n; ++k) {
          lane const next = (decay.col(k) * step).exp() * state.col(k) + entry * b[k];
          state.col(k) = next;
          y += next * c[k];
        }
        y *= silu(gate);
        x_.row(t).segment(c0, count) = y.head(count).transpose().matrix();
      }
    });
  }

  config c_;
  norm norm_, last_;
  linear in_, select_, step_, out_;
  matrix taps_, log_decay_;
  vector taps_bias_, skip_;
  packed_rows packed_;
  matrix normed_, xz_, x_, selected_, steps_;
};

}  // namespace models
