// expect: rflow: a kernel is linear, rbf, or a function object k(inner product, squared norm, squared norm)
// SPDX-License-Identifier: Apache-2.0
// A function of the inner product alone: RBF and its kin need the norms as well.
#include <rflow/cka.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
double square(double k, double, double) { return k * k; }
#else
double square(double k) { return k * k; }
#endif

double misuse(rflow::view<float> x, rflow::view<float> y) { return rflow::cka(x, y, &square); }
