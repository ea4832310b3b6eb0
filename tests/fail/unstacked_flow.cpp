// expect: rflow: a metric of many layers takes a stack of them. Wrap it: rflow::layer_stack(v)
// SPDX-License-Identifier: Apache-2.0
// A vector of matrices is not a stack yet.
#include <rflow/flow.hpp>

#include <vector>

double misuse(std::vector<Eigen::MatrixXf> const& v) {
#ifdef RFLOW_POSITIVE_CONTROL
  return rflow::flow(rflow::layer_stack(v)).variance.st1;
#else
  return rflow::flow(v).variance.st1;
#endif
}
