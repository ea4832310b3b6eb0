// expect: rflow: no backend is included for this memory space
// expect: <rflow/cuda.cuh>
// SPDX-License-Identifier: Apache-2.0
// Device memory without cuda.cuh: there is no default backend for it.
#include <rflow/cka.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using memory = rflow::host_memory;
#else
using memory = rflow::device_memory;
#endif

double misuse(rflow::view<float, memory> x) { return rflow::cka(x, x); }
