// expect: rflow: activations are float, double, rflow::f16 or rflow::bf16
// SPDX-License-Identifier: Apache-2.0
// An Eigen matrix of quantised values.
#include <rflow/cosine.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
double misuse(Eigen::MatrixXf const& x) { return rflow::inter_token_cosine(x); }
#else
double misuse(Eigen::MatrixXi const& x) { return rflow::inter_token_cosine(x); }
#endif
