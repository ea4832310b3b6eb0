// expect: rflow: this Eigen expression has no storage to look at
// SPDX-License-Identifier: Apache-2.0
// An Eigen expression would have to be evaluated into a hidden copy.
#include <rflow/cka.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
double misuse(Eigen::MatrixXf const& x) { return rflow::cka((x + x).eval(), x); }
#else
double misuse(Eigen::MatrixXf const& x) { return rflow::cka(x + x, x); }
#endif
