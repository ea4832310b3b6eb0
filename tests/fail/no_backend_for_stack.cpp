// expect: rflow: no backend is included for this memory space
// expect: <rflow/cuda.cuh>
// SPDX-License-Identifier: Apache-2.0
// A stack on the device, and no header that could read it.
#include <rflow/flow.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using memory = rflow::host_memory;
#else
using memory = rflow::device_memory;
#endif

double misuse(rflow::layer_stack<float, memory> const& stack) {
  return rflow::flow(stack).variance.st2;
}
