// expect: rflow: a view takes extents: write rflow::view(x, tokens, hidden)
// first: rflow: a view takes extents
// errors: 2
// SPDX-License-Identifier: Apache-2.0
// A view of values without extents, and of a matrix that has its own.
#include <rflow/eigen.hpp>

#include <vector>

double misuse(std::vector<float> const& x, Eigen::MatrixXf const& y) {
#ifdef RFLOW_POSITIVE_CONTROL
  return rflow::view(x, 1, x.size())(0, 0) + rflow::as_view(y)(0, 0);
#else
  return rflow::view(x)(0, 0) + rflow::view(y)(0, 0);
#endif
}
