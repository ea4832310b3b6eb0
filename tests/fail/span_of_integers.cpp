// expect: rflow: activations are float, double, rflow::f16 or rflow::bf16
// first: integers have no scale
// errors: 1
// SPDX-License-Identifier: Apache-2.0
// A span of the wrong kind: bits of 16-bit floats have a bridge.
#include <rflow/cosine.hpp>

#include <span>

double misuse(std::span<std::uint16_t const> x) {
#ifdef RFLOW_POSITIVE_CONTROL
  return rflow::inter_token_cosine(rflow::view(rflow::as_f16(x.data()), 4, x.size() / 4));
#else
  return rflow::inter_token_cosine(x);
#endif
}
