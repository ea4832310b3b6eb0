// expect: rflow: the two sets of activations live in different memory spaces
// SPDX-License-Identifier: Apache-2.0
// Adjacent layers of one model, one of them still on the device.
#include <rflow/cosine.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using memory = rflow::host_memory;
#else
using memory = rflow::device_memory;
#endif

double misuse(rflow::view<float> x, rflow::view<float, memory> y) {
  return rflow::adjacent_cosine(x, y).mean;
}
