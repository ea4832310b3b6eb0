// expect: rflow: this backend cannot read where the activations live
// SPDX-License-Identifier: Apache-2.0
// The CPU asked for by name, for memory that it cannot read.
#include <rflow/cosine.hpp>

#ifdef RFLOW_POSITIVE_CONTROL
using memory = rflow::host_memory;
#else
using memory = rflow::device_memory;
#endif

double misuse(rflow::view<float, memory> x) {
  return rflow::inter_token_cosine(x, rflow::on_cpu{.threads = 1});
}
