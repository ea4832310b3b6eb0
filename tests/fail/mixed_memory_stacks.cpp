// expect: rflow: the two stacks live in different memory spaces. Copy one of them to where the other lives
// SPDX-License-Identifier: Apache-2.0
// Two models, one of them still on the device.
#include <rflow/cka.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using memory = rflow::host_memory;
#else
using memory = rflow::device_memory;
#endif

double misuse(rflow::layer_stack<float> const& a, rflow::layer_stack<float, memory> const& b) {
  return rflow::cka_matrix(a, b)(0, 0);
}
