// expect: rflow: numbers alone do not say how many tokens they make
// SPDX-License-Identifier: Apache-2.0
// A list has no strides, and nobody specialised adapt<> for it.
#include <rflow/cka.hpp>

#include <list>

#ifdef RFLOW_POSITIVE_CONTROL
double misuse(Eigen::MatrixXf const& x) { return rflow::cka(x, x); }
#else
double misuse(std::list<float> const& x) { return rflow::cka(x, x); }
#endif
