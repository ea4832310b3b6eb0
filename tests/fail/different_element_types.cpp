// expect: rflow: adjacent layers of one model have one element type
// SPDX-License-Identifier: Apache-2.0
// Half of the model in another precision: most likely a mistake, and never one read.
#include <rflow/cosine.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using scalar = float;
#else
using scalar = double;
#endif

double misuse(rflow::view<float> x, rflow::view<scalar> y) {
  return rflow::adjacent_cosine(x, y).mean;
}
