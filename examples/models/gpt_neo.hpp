// SPDX-License-Identifier: Apache-2.0
#pragma once

// GPT-Neo: learned positions, two residual additions per block, attention without 1/√d, and blocks
// whose attention sees a window only.

#include <string>
#include <vector>

#include "layers.hpp"
#include "weights.hpp"

namespace models {

class gpt_neo {
 public:
  struct config {
    integer layers = 32, hidden = 2560, heads = 20, inner = 10240;
    integer vocabulary = 50257, positions = 2048, window = 256;
    std::vector<bool> local{};  // per layer: a window; empty: every second one
    activation act = activation::gelu_tanh;
    float epsilon = 1e-5f;
  };

  explicit gpt_neo(config const& c) : c_(c) {
    if (c_.local.empty())
      for (integer i = 0; i < c_.layers; ++i) c_.local.push_back(i % 2 == 1);
    for (norm* n : {&first_, &second_, &last_}) n->epsilon = c_.epsilon;
  }

  static constexpr char const* name = "gpt_neo";
  integer layers() const { return c_.layers; }
  integer hidden() const { return c_.hidden; }
  integer vocabulary() const { return c_.vocabulary; }
  integer positions() const { return c_.positions; }

  parameter embedding() const {
    return {"transformer.wte.weight", {c_.vocabulary, c_.hidden}, role::embedding};
  }
  parameter position_embedding() const {
    return {"transformer.wpe.weight", {c_.positions, c_.hidden}, role::embedding};
  }

  template <class Visit>
  void outer(Visit const& visit) {
    integer const d = c_.hidden;
    visit(embedding(), unloaded{});
    visit(position_embedding(), unloaded{});
    visit({"transformer.ln_f.weight", {d}, role::gain}, last_.gain);
    visit({"transformer.ln_f.bias", {d}, role::shift}, last_.shift);
    visit({"lm_head.weight", {c_.vocabulary, d}, role::embedding, true}, unloaded{});
  }

  template <class Visit>
  void block(integer i, Visit const& visit) {
    integer const d = c_.hidden;
    std::string const at = "transformer.h." + std::to_string(i) + ".";
    visit({at + "ln_1.weight", {d}, role::gain}, first_.gain);
    visit({at + "ln_1.bias", {d}, role::shift}, first_.shift);
    visit({at + "attn.attention.q_proj.weight", {d, d}, role::linear}, q_.weight);
    visit({at + "attn.attention.k_proj.weight", {d, d}, role::linear}, k_.weight);
    visit({at + "attn.attention.v_proj.weight", {d, d}, role::linear}, v_.weight);
    visit({at + "attn.attention.out_proj.weight", {d, d}, role::residual_linear}, out_.weight);
    visit({at + "attn.attention.out_proj.bias", {d}, role::bias}, out_.bias);
    visit({at + "ln_2.weight", {d}, role::gain}, second_.gain);
    visit({at + "ln_2.bias", {d}, role::shift}, second_.shift);
    visit({at + "mlp.c_fc.weight", {c_.inner, d}, role::linear}, up_.weight);
    visit({at + "mlp.c_fc.bias", {c_.inner}, role::bias}, up_.bias);
    visit({at + "mlp.c_proj.weight", {d, c_.inner}, role::residual_linear}, down_.weight);
    visit({at + "mlp.c_proj.bias", {d}, role::bias}, down_.bias);
  }

  /// Tensors that older files carry and nobody needs.
  static bool ignored(std::string const& tensor) {
    return tensor.ends_with(".attn.attention.bias") || tensor.ends_with(".attention.masked_bias");
  }

  void embed(run const& r, weight_source const& source, matrix& h) const {
    integer const d = c_.hidden;
    over_rows(r.threads, h.rows(), [&](integer first, integer last) {
      thread_local vector place;
      place.resize(d);
      for (integer t = first; t < last; ++t) {
        auto const k = static_cast<std::size_t>(t);
        source.read(embedding(), r.tokens.ids[k] * d, d, h.row(t).data());
        source.read(position_embedding(), r.positions[k] * d, d, place.data());
        h.row(t) += place.transpose();
      }
    });
  }

  void apply(integer i, run const& r, matrix& h) {
    integer const d = c_.hidden, width = d / c_.heads;
    first_(r, h, normed_);
    packed_.pack(r.threads, row_map(normed_.data(), h.rows(), d, Eigen::OuterStride<>(d)));
    qkv_.resize(h.rows(), 3 * d);
    q_(r.threads, packed_, qkv_.leftCols(d));
    k_(r.threads, packed_, qkv_.middleCols(d, d));
    v_(r.threads, packed_, qkv_.rightCols(d));
    integer const window =
        c_.local[static_cast<std::size_t>(i)] ? c_.window : std::numeric_limits<int>::max();
    heads const all{qkv_.data(), qkv_.data() + d, qkv_.data() + 2 * d, 3 * d, width, c_.heads,
                    width};
    attend(r, all, 1.f, window, attended_);
    packed_.pack(r.threads, row_map(attended_.data(), h.rows(), d, Eigen::OuterStride<>(d)));
    out_(r.threads, packed_, h, true);

    second_(r, h, normed_);
    packed_.pack(r.threads, row_map(normed_.data(), h.rows(), d, Eigen::OuterStride<>(d)));
    inner_.resize(h.rows(), c_.inner);
    up_(r.threads, packed_, inner_);
    activate(r, c_.act, inner_);
    packed_.pack(r.threads,
                 row_map(inner_.data(), h.rows(), c_.inner, Eigen::OuterStride<>(c_.inner)));
    down_(r.threads, packed_, h, true);
  }

  void final_norm(run const& r, matrix const& h, matrix& out) const { last_(r, h, out); }

 private:
  config c_;
  norm first_, second_, last_;
  linear q_, k_, v_, out_, up_, down_;
  packed_rows packed_;
  matrix normed_, qkv_, attended_, inner_;
};

}  // namespace models
