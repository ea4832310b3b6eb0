// expect: rflow: the two sets of activations live in different memory spaces
// SPDX-License-Identifier: Apache-2.0
// One operand on the host and the other on a device.
#include <rflow/cka.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using memory = rflow::host_memory;
#else
using memory = rflow::device_memory;
#endif

double misuse(rflow::view<float> x, rflow::view<float, memory> y) { return rflow::cka(x, y); }
