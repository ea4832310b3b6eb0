// expect: rflow: this takes one layer. Write layers[i]
// expect: rflow: this takes one layer. Write stack[site]
// errors: 2
// SPDX-License-Identifier: Apache-2.0
// All layers where one is meant.
#include <rflow/cka.hpp>
#include <rflow/cosine.hpp>

#include <vector>

double misuse(std::vector<Eigen::MatrixXf> const& layers, rflow::layer_stack<float> const& stack) {
#ifdef RFLOW_POSITIVE_CONTROL
  return rflow::cka(layers[0], layers[1]) + rflow::inter_token_cosine(stack[0]);
#else
  return rflow::cka(layers, layers) + rflow::inter_token_cosine(stack);
#endif
}
