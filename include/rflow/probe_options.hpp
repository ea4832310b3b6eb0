// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a caller of a probe may choose.

#include <cstddef>
#include <cstdint>
#include <utility>
#include <variant>
#include <vector>

#include <rflow/view.hpp>

namespace rflow {

/// Where probes start from.
namespace weights {

/// Independent values in ±1/√d, weights and biases, as PyTorch's Linear; other ones for each seed.
struct uniform {};

/// All zero.
struct zero {};

/// The same ones for every seed; they act on the features as given, standardised or not.
struct given {
  std::vector<double> values;  ///< classes × d, row-major, as the weight of PyTorch's Linear
  std::vector<double> bias;    ///< classes, or none for zeros

  /// @param row_major  classes × d
  /// @param biases     classes, or none
  given(std::vector<double> row_major, std::vector<double> biases)
      : values(std::move(row_major)), bias(std::move(biases)) {}

  /// @param matrix  classes × d: an Eigen matrix, a view, …
  /// @param biases  classes, or none
  template <activations X>
  explicit given(X const& matrix, std::vector<double> biases = {}) : bias(std::move(biases)) {
    auto const x = as_view(matrix);
    for (std::ptrdiff_t c = 0; c < x.rows; ++c)
      for (std::ptrdiff_t j = 0; j < x.cols; ++j) values.push_back(static_cast<double>(x(c, j)));
  }
};

}  // namespace weights

/// How tokens are drawn for validation.
enum class split {
  stratified,  ///< from each class its share, by largest remainders; one is always trained on. What
               ///< small classes cannot give the others do, from each as large a part
  shuffled,    ///< from all tokens alike
};

/// What a probe does. The default is full-batch Adam on the mean cross-entropy, 150 epochs, five
/// seeds; a seed sets the split and the initial weights.
struct probe_options {
  std::ptrdiff_t classes = 0;        ///< 0: the largest label and one more
  int epochs = 150;                  ///< updates, each from all training tokens
  double learning_rate = 0.05;       ///< of Adam
  double beta1 = 0.9;                ///< of Adam
  double beta2 = 0.999;              ///< of Adam
  double epsilon = 1e-8;             ///< of Adam
  double weight_decay = 0;           ///< times the weights (not the biases), added to the gradient
  int seeds = 5;                     ///< splits and starts
  std::uint64_t first_seed = 0;      ///< the others follow it
  double validation_fraction = 0.2;  ///< 0: train on all, no validation
  rflow::split split = rflow::split::stratified;  ///< how validation tokens are drawn
  std::vector<std::int64_t> groups =
      {};  ///< one a token (a document, a context): tokens of a group
           ///< are never on both sides of a split; split is then
           ///< over whole groups, without regard to classes
  /// Tokens to train and to validate on, for every seed, instead of a fraction; if only one is given,
  /// all other tokens are the other part.
  std::vector<std::ptrdiff_t> training = {};
  std::vector<std::ptrdiff_t> validation = {};  ///< see training
  bool standardize = false;   ///< features to mean 0 and deviation 1 over the training part
  bool keep_weights = false;  ///< probe_layers: keep classes · d weights a seed and layer
  /// Where a seed starts.
  std::variant<weights::uniform, weights::zero, weights::given> initial_weights =
      weights::uniform{};
};

}  // namespace rflow
