// SPDX-License-Identifier: Apache-2.0
#pragma once

// Where the weights of a model come from: a parameter has a name, a shape and a part to play, and a
// weight_source fills in its values, whether it reads them from a file or draws them.

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "product.hpp"

namespace models {

/// What a parameter does; initialisers treat each kind in its own way.
enum class role {
  embedding,         // vocabulary or positions × hidden
  linear,            // out × in
  residual_linear,   // the same, writing to the residual stream
  bias,              // of a linear layer
  gain,              // of a norm
  shift,             // of a norm
  convolution,       // channels × 1 × kernel
  convolution_bias,  // channels
  step_weight,       // Mamba's dt_proj, out × in
  step_bias,         // of Δ before the softplus
  log_decay,         // A_log: channels × state, or heads
  skip,              // D
};

struct parameter {
  std::string name;
  std::vector<integer> shape;
  role part = role::linear;
  bool optional = false;  // a checkpoint may lack it: nothing here computes with it

  integer size() const {
    integer n = 1;
    for (integer const axis : shape) n *= axis;
    return n;
  }
};

/// Fills in weights. read() may be called from several threads at once.
class weight_source {
 public:
  weight_source() = default;
  weight_source(weight_source const&) = delete;
  weight_source& operator=(weight_source const&) = delete;
  virtual ~weight_source() = default;

  /// Values [first, first + count) of the parameter, row-major.
  virtual void read(parameter const& p, integer first, integer count, float* to) const = 0;
};

/// For parameters of which only some rows are read, or none.
struct unloaded {};

/// Loads parameters with all threads. Models hand it to the function that names their parameters.
class loader {
 public:
  loader(team& threads, weight_source const& source) : threads_(threads), source_(source) {}

  void operator()(parameter const& p, packed_weight& to) const {
    integer const out = p.shape[0], in = p.shape[1];
    to.resize(out, in);
    integer const groups = (out + packed_weight::group - 1) / packed_weight::group;
    threads_.run(groups, [&](integer g) {
      thread_local detail::buffer rows;
      integer const first = g * packed_weight::group;
      integer const count = std::min(packed_weight::group, out - first);
      float* const values = rows.reserve(count * in);
      source_.read(p, first * in, count * in, values);
      to.pack(first, count, values);
    });
  }
  void operator()(parameter const& p, vector& to) const {
    to.resize(p.size());
    source_.read(p, 0, p.size(), to.data());
  }
  /// Row-major; axes after the first are one.
  void operator()(parameter const& p, matrix& to) const {
    to.resize(p.shape[0], p.size() / p.shape[0]);
    source_.read(p, 0, p.size(), to.data());
  }

  void operator()(parameter const&, unloaded) const {}

 private:
  team& threads_;
  weight_source const& source_;
};

/// Collects parameters instead of loading them.
class lister {
 public:
  explicit lister(std::vector<parameter>& out) : out_(out) {}
  template <class To>
  void operator()(parameter const& p, To const&) const {
    out_.push_back(p);
  }

 private:
  std::vector<parameter>& out_;
};

}  // namespace models
