// expect: rflow: the other model is to be a stack as well. Wrap it: rflow::layer_stack(v)
// SPDX-License-Identifier: Apache-2.0
// One model wrapped, the other not: it would be taken for a kernel.
#include <rflow/cka.hpp>

#include <vector>

double misuse(rflow::layer_stack<float> const& s, std::vector<Eigen::MatrixXf> const& v) {
#ifdef RFLOW_POSITIVE_CONTROL
  return rflow::cka_matrix(s, rflow::layer_stack(v))(0, 0);
#else
  return rflow::cka_matrix(s, v)(0, 0);
#endif
}
