// expect: rflow: a metric of many layers takes a stack of them. Wrap it: rflow::layer_stack(v)
// SPDX-License-Identifier: Apache-2.0
// The same.
#include <rflow/variance.hpp>

#include <vector>

double misuse(std::vector<Eigen::MatrixXf> const& v) {
#ifdef RFLOW_POSITIVE_CONTROL
  return rflow::variance(rflow::layer_stack(v)).st1;
#else
  return rflow::variance(v).st1;
#endif
}
