// expect: constraints not satisfied
// SPDX-License-Identifier: Apache-2.0
// A flat vector does not say how many tokens it holds.
#include <rflow/cosine.hpp>

#include <vector>

#ifdef RFLOW_POSITIVE_CONTROL
double misuse(std::vector<float> const& x) {
  return rflow::inter_token_cosine(rflow::view(x, 2, static_cast<std::ptrdiff_t>(x.size() / 2)));
}
#else
double misuse(std::vector<float> const& x) { return rflow::inter_token_cosine(x); }
#endif
