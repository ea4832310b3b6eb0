// expect: rflow: a metric of many layers takes a stack of them. Wrap it: rflow::layer_stack(v)
// SPDX-License-Identifier: Apache-2.0
// The same, with what else the metric takes.
#include <rflow/cka.hpp>

#include <vector>

double misuse(std::vector<Eigen::MatrixXf> const& v) {
#ifdef RFLOW_POSITIVE_CONTROL
  return rflow::cka_matrix(rflow::layer_stack(v), rflow::rbf{})(0, 1);
#else
  return rflow::cka_matrix(v, rflow::rbf{})(0, 1);
#endif
}
