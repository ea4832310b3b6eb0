// SPDX-License-Identifier: Apache-2.0
#pragma once

// Softmax regressions as a backend is asked for them: the tokens and their labels, weights, one step of Adam.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rflow {

/// Softmax regressions side by side on the same features: one problem a seed, each with a split of
/// its own. Column problem · classes + class of the weights belongs to one class of one problem.
struct softmax_problem {
  static constexpr std::uint8_t neither = 0;   ///< a token that takes no part
  static constexpr std::uint8_t train = 1;     ///< one to train on
  static constexpr std::uint8_t validate = 2;  ///< one to validate on

  std::ptrdiff_t classes = 0;             ///< C
  std::ptrdiff_t problems = 0;            ///< one a seed
  std::vector<std::int32_t> labels = {};  ///< n, each in [0, classes)
  std::vector<std::uint8_t> parts = {};   ///< problems × n: neither, train or validate
  bool standardize = false;  ///< by mean and deviation over the problem's training part
  bool in_double = false;    ///< products in double even for narrower data

  /// What a token is to a problem.
  std::uint8_t part(std::ptrdiff_t problem, std::ptrdiff_t token) const {
    return parts[static_cast<std::size_t>(problem) * labels.size() +
                 static_cast<std::size_t>(token)];
  }
};

/// Weights of all problems. They act on the features as each problem sees them, that is standardised
/// if asked for.
struct softmax_weights {
  std::vector<double> values;  ///< columns × d
  std::vector<double> bias;    ///< columns
};

/// What one look at all tokens finds, for each problem; [0] is the training part, [1] validation.
struct softmax_sums {
  std::vector<double> loss[2];     ///< Σ −log p(label); NaN if a logit is not finite
  std::vector<double> correct[2];  ///< tokens whose largest logit is their label's
  std::vector<double> count[2];    ///< tokens

  /// All zero.
  explicit softmax_sums(std::ptrdiff_t problems) {
    auto const size = static_cast<std::size_t>(problems);
    for (std::size_t part = 0; part < 2; ++part) {
      loss[part].resize(size);
      correct[part].resize(size);
      count[part].resize(size);
    }
  }
};

/// One step of Adam on the mean training loss of each problem.
/// @see Kingma, Ba, ICLR 2015, algorithm 1
struct adam {
  double learning_rate = 0.05;  ///< α
  double beta1 = 0.9;           ///< decay of the first moment
  double beta2 = 0.999;         ///< decay of the second
  double epsilon = 1e-8;        ///< added to its root
  double weight_decay = 0;      ///< times the weights, not the biases, added to the gradient
};

}  // namespace rflow
