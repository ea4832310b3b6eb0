// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random weights: every value is a function of the seed, the parameter and its place, drawn when it
// is needed and dropped again, so that a model of billions of parameters takes the memory of a block.

#include <rflow/init.hpp>

#include <cmath>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "model.hpp"
#include "weights.hpp"

namespace models {

/// How matrices are drawn.
enum class scheme {
  gaussian,       // N(0, stddev²)
  xavier_normal,  // embeddings: fans of their shape, as PyTorch takes it
  xavier_uniform,
  kaiming_normal,  // fan in, gain √2
  kaiming_uniform,
  transformers,  // what Hugging Face's transformers 5 gives a new model
  mamba_ssm,     // what the original package gives a new Mamba; for the others transformers
};

inline constexpr std::pair<std::string_view, scheme> scheme_names[] = {
    {"gaussian", scheme::gaussian},
    {"xavier", scheme::xavier_normal},
    {"xavier_uniform", scheme::xavier_uniform},
    {"kaiming", scheme::kaiming_normal},
    {"kaiming_uniform", scheme::kaiming_uniform},
    {"transformers", scheme::transformers},
    {"mamba_ssm", scheme::mamba_ssm},
};

struct drawing {
  scheme how = scheme::gaussian;
  std::uint64_t seed = 0;
  double stddev = 0.02;  ///< of the Gaussian scheme
  double affine = 0;     ///< norms: gain N(1, affine²) and shift N(0, affine²) instead of 1 and 0
};

/// Draws the parameters of one architecture.
///
/// A scheme decides on matrices: embeddings, linear layers, the convolution and dt_proj. Under the
/// first five, biases are 0 and what a state-space model starts from on purpose (A_log, D, the bias
/// of Δ) is as transformers has it.
class drawn_weights : public weight_source {
 public:
  drawn_weights(architecture const& a, drawing const& how)
      : how_(how), state_space_(name_of(a).starts_with("mamba")), second_(name_of(a) == "mamba2") {
    blocks_ = blocks_of(a);
    for (parameter const& p : parameters(a))
      places_.emplace(p.name, static_cast<std::uint32_t>(places_.size()));
  }

  void read(parameter const& p, integer first, integer count, float* to) const override {
    bool const is_matrix = p.shape.size() > 1;
    integer const cols = is_matrix ? p.size() / p.shape[0] : p.shape[0];
    integer const rows = is_matrix ? count / cols : 1, width = is_matrix ? cols : count;
    if (is_matrix && (first % cols != 0 || count % cols != 0))
      throw std::logic_error("models::drawn_weights: whole rows expected");
    rflow::random_origin const from{how_.seed, places_.at(p.name), is_matrix ? first / cols : 0,
                                    is_matrix ? 0 : first};
    auto const draw = [&](rflow::initializer const& law) {
      rflow::draw(law, from, to, rows, width, width, 1, 1);
    };
    auto const fill = [&](float value) { std::fill_n(to, count, value); };

    switch (p.part) {
      case role::bias: return fill(0);
      case role::gain:
        if (how_.affine > 0) {
          draw(rflow::gaussian(how_.affine));
          for (integer i = 0; i < count; ++i) to[i] += 1;
        } else {
          fill(1);
        }
        return;
      case role::shift: return how_.affine > 0 ? draw(rflow::gaussian(how_.affine)) : fill(0);
      case role::skip: return fill(1);
      case role::convolution_bias: return original() ? draw(rflow::pytorch_default(4)) : fill(0);
      case role::step_bias:  // softplus⁻¹ of a step between 0.001 and 0.1, even in its logarithm
        draw(rflow::uniform(std::log(0.001), std::log(0.1)));
        for (integer i = 0; i < count; ++i) {
          double const step = std::max(std::exp(static_cast<double>(to[i])), 1e-4);
          to[i] = static_cast<float>(step + std::log(-std::expm1(-step)));
        }
        return;
      case role::log_decay:
        if (second_ && original()) {
          draw(rflow::uniform(1, 16));
          for (integer i = 0; i < count; ++i) to[i] = std::log(to[i]);
        } else {
          for (integer i = 0; i < count; ++i)
            to[i] = std::log(static_cast<float>((first + i) % cols + 1));
        }
        return;
      default: return draw(law_of(p));
    }
  }

 private:
  bool original() const { return how_.how == scheme::mamba_ssm && state_space_; }

  rflow::initializer law_of(parameter const& p) const {
    integer field = 1;  // taps of a convolution
    for (std::size_t axis = 2; axis < p.shape.size(); ++axis) field *= p.shape[axis];
    auto const out = static_cast<double>(p.shape[0] * field),
               in = static_cast<double>(p.shape[1] * field);
    rflow::fans const fans{in, out};
    switch (how_.how) {
      case scheme::gaussian: return rflow::gaussian(how_.stddev);
      case scheme::xavier_normal: return rflow::xavier_normal(fans);
      case scheme::xavier_uniform: return rflow::xavier_uniform(fans);
      case scheme::kaiming_normal: return rflow::kaiming_normal(fans);
      case scheme::kaiming_uniform: return rflow::kaiming_uniform(fans);
      default: break;
    }
    if (!state_space_) return rflow::gaussian(0.02);
    switch (p.part) {
      case role::embedding: return rflow::gaussian(original() ? 0.02 : 0.1);
      case role::step_weight: return rflow::uniform(-1 / std::sqrt(in), 1 / std::sqrt(in));
      case role::convolution: return rflow::pytorch_default(in);
      case role::residual_linear:  // PyTorch's default; the original divides by √blocks
        return rflow::kaiming_uniform(
            fans, rflow::fan_mode::in,
            std::sqrt(1 / (original() ? 3 * static_cast<double>(blocks_) : 3.0)));
      default: return original() ? rflow::pytorch_default(in) : rflow::gaussian(0.1);
    }
  }

  drawing how_;
  bool state_space_, second_;
  integer blocks_ = 0;
  std::map<std::string, std::uint32_t, std::less<>> places_;
};

/// The weights of another source with the affine parameters of norms at 1 and 0.
class plain_norms : public weight_source {
 public:
  explicit plain_norms(weight_source const& other) : other_(other) {}
  void read(parameter const& p, integer first, integer count, float* to) const override {
    if (p.part == role::gain || p.part == role::shift)
      std::fill_n(to, count, p.part == role::gain ? 1.f : 0.f);
    else
      other_.read(p, first, count, to);
  }

 private:
  weight_source const& other_;
};

}  // namespace models
