// SPDX-License-Identifier: Apache-2.0
#pragma once

// GPT-NeoX, the architecture of Pythia: rotary positions on a part of each head, and attention and
// MLP side by side on the same residual stream.

#include <rflow/view.hpp>

#include <cmath>
#include <string>
#include <vector>

#include "layers.hpp"
#include "weights.hpp"

namespace models {

class gpt_neox {
 public:
  struct config {
    integer layers = 32, hidden = 2560, heads = 32, inner = 10240;
    integer vocabulary = 50304, positions = 2048;
    double rotary_fraction = 0.25;                 // of each head; Python counts in double
    float rotary_base = 10000, rotary_factor = 1;  // the factor makes positions closer
    bool parallel = true;        // attention and MLP read the same residual stream
    bool attention_bias = true;  // of the two linear layers of attention
    activation act = activation::gelu_erf;
    float epsilon = 1e-5f;

    integer width() const { return hidden / heads; }
    integer rotary_count() const {
      return static_cast<integer>(static_cast<double>(width()) * rotary_fraction);
    }
    /// An odd count is rounded up: the last feature turns with one more.
    integer rotary_pairs() const { return (rotary_count() + 1) / 2; }
  };

  /// @throws std::invalid_argument if more features turn than a head has
  explicit gpt_neox(config const& c) : c_(c) {
    if (2 * c.rotary_pairs() > c.width())
      rflow::detail::reject("models::gpt_neox", "more features turn than a head has");
    for (norm* n : {&first_, &second_, &last_}) n->epsilon = c_.epsilon;
  }

  static constexpr char const* name = "gpt_neox";
  integer layers() const { return c_.layers; }
  integer hidden() const { return c_.hidden; }
  integer vocabulary() const { return c_.vocabulary; }
  integer positions() const { return c_.positions; }

  parameter embedding() const {
    return {"gpt_neox.embed_in.weight", {c_.vocabulary, c_.hidden}, role::embedding};
  }

  template <class Visit>
  void outer(Visit const& visit) {
    integer const d = c_.hidden;
    visit(embedding(), unloaded{});
    visit({"gpt_neox.final_layer_norm.weight", {d}, role::gain}, last_.gain);
    visit({"gpt_neox.final_layer_norm.bias", {d}, role::shift}, last_.shift);
    visit({"embed_out.weight", {c_.vocabulary, d}, role::linear, true}, unloaded{});
  }

  template <class Visit>
  void block(integer i, Visit const& visit) {
    integer const d = c_.hidden;
    std::string const at = "gpt_neox.layers." + std::to_string(i) + ".";
    visit({at + "input_layernorm.weight", {d}, role::gain}, first_.gain);
    visit({at + "input_layernorm.bias", {d}, role::shift}, first_.shift);
    visit({at + "post_attention_layernorm.weight", {d}, role::gain}, second_.gain);
    visit({at + "post_attention_layernorm.bias", {d}, role::shift}, second_.shift);
    visit({at + "attention.query_key_value.weight", {3 * d, d}, role::linear}, qkv_.weight);
    visit({at + "attention.dense.weight", {d, d}, role::residual_linear}, out_.weight);
    if (c_.attention_bias) {
      visit({at + "attention.query_key_value.bias", {3 * d}, role::bias}, qkv_.bias);
      visit({at + "attention.dense.bias", {d}, role::bias}, out_.bias);
    }
    visit({at + "mlp.dense_h_to_4h.weight", {c_.inner, d}, role::linear}, up_.weight);
    visit({at + "mlp.dense_h_to_4h.bias", {c_.inner}, role::bias}, up_.bias);
    visit({at + "mlp.dense_4h_to_h.weight", {d, c_.inner}, role::residual_linear}, down_.weight);
    visit({at + "mlp.dense_4h_to_h.bias", {d}, role::bias}, down_.bias);
  }

  static bool ignored(std::string const& tensor) {
    return tensor.ends_with(".attention.bias") || tensor.ends_with(".attention.masked_bias") ||
           tensor.ends_with(".rotary_emb.inv_freq");
  }

  void embed(run const& r, weight_source const& source, matrix& h) const {
    integer const d = c_.hidden;
    over_rows(r.threads, h.rows(), [&](integer first, integer last) {
      for (integer t = first; t < last; ++t)
        source.read(embedding(), r.tokens.ids[static_cast<std::size_t>(t)] * d, d, h.row(t).data());
    });
  }

  void apply(integer, run const& r, matrix& h) {
    integer const d = c_.hidden, width = c_.width(), rows = h.rows();
    first_(r, h, normed_);
    if (c_.parallel) second_(r, h, also_normed_);

    packed_.pack(r.threads, row_map(normed_.data(), rows, d, Eigen::OuterStride<>(d)));
    projected_.resize(rows, 3 * d);
    qkv_(r.threads, packed_, projected_);
    rotate(r);
    float const* const at = projected_.data();
    attend(r, {at, at + width, at + 2 * width, 3 * d, 3 * width, c_.heads, width},
           1 / std::sqrt(static_cast<float>(width)), std::numeric_limits<int>::max(), attended_);
    packed_.pack(r.threads, row_map(attended_.data(), rows, d, Eigen::OuterStride<>(d)));
    out_(r.threads, packed_, h, true);

    if (!c_.parallel) second_(r, h, also_normed_);
    packed_.pack(r.threads, row_map(also_normed_.data(), rows, d, Eigen::OuterStride<>(d)));
    inner_.resize(rows, c_.inner);
    up_(r.threads, packed_, inner_);
    activate(r, c_.act, inner_);
    packed_.pack(r.threads, row_map(inner_.data(), rows, c_.inner, Eigen::OuterStride<>(c_.inner)));
    down_(r.threads, packed_, h, true);
  }

  void final_norm(run const& r, matrix const& h, matrix& out) const { last_(r, h, out); }

 private:
  /// Turns the first part of each query and key; feature j is paired with j + half.
  void rotate(run const& r) {
    integer const width = c_.width(), half = c_.rotary_pairs();
    Eigen::ArrayXf frequency(half);  // exponents go by the count, also where it is odd
    for (integer j = 0; j < half; ++j) {
      float const exponent = static_cast<float>(2 * j) / static_cast<float>(c_.rotary_count());
      frequency[j] = 1 / std::pow(c_.rotary_base, exponent) / c_.rotary_factor;
    }
    over_rows(r.threads, projected_.rows(), [&](integer first, integer last) {
      thread_local Eigen::ArrayXf cosine, sine, a;
      cosine.resize(half), sine.resize(half);
      for (integer t = first; t < last; ++t) {
        auto const place = static_cast<float>(r.positions[static_cast<std::size_t>(t)]);
        for (integer j = 0; j < half; ++j) {
          float const angle = place * frequency[j];
          cosine[j] = std::cos(angle), sine[j] = std::sin(angle);
        }
        for (integer h = 0; h < c_.heads; ++h)
          for (integer part = 0; part < 2; ++part) {  // query, key
            float* const x = projected_.row(t).data() + (3 * h + part) * width;
            Eigen::Map<Eigen::ArrayXf> low(x, half), high(x + half, half);
            a = low;
            low = low * cosine - high * sine;
            high = high * cosine + a * sine;
          }
      }
    });
  }

  config c_;
  norm first_, second_, last_;
  linear qkv_, out_, up_, down_;
  packed_rows packed_;
  matrix normed_, also_normed_, projected_, attended_, inner_;
};

}  // namespace models
