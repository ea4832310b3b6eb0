// expect: keep them in a variable
// expect: deleted
// expect: layer_stack
// SPDX-License-Identifier: Apache-2.0
// A stack holds views: matrices that die at the end of the statement would leave them dangling.
#include <rflow/eigen.hpp>

#include <vector>

std::vector<Eigen::MatrixXf> capture();

std::ptrdiff_t misuse() {
#ifdef RFLOW_POSITIVE_CONTROL
  std::vector<Eigen::MatrixXf> const layers = capture();
  rflow::layer_stack const stack(layers);
#else
  rflow::layer_stack const stack(capture());
#endif
  return stack.sites();
}
