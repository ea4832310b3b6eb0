// expect: rflow: this backend cannot read where the stack lives
// SPDX-License-Identifier: Apache-2.0
// The CPU asked for by name, for a stack that it cannot read.
#include <rflow/variance.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using memory = rflow::host_memory;
#else
using memory = rflow::device_memory;
#endif

double misuse(rflow::layer_stack<float, memory> const& stack) {
  return rflow::variance(stack, rflow::normalization::none, rflow::on_cpu{}).st2;
}
