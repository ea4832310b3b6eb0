// SPDX-License-Identifier: Apache-2.0
// A shared library that uses on_cuda and exports one function: nothing of on_cuda may leak from it.
#include <rflow/cka.hpp>
#include <rflow/cuda.cuh>
#include <rflow/flow.hpp>

extern "C" double rflow_test_shared(float const* values) {
  rflow::layer_stack<float, rflow::device_memory> const stack(values, {2, 8, 4});
  return rflow::flow(stack).variance.st1 + rflow::cka_matrix(stack)(0, 1);
}
