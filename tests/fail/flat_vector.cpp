// expect: rflow: numbers alone do not say how many tokens they make. Write rflow::view(x, tokens, hidden)
// first: rflow: numbers alone do not say
// errors: 1
// SPDX-License-Identifier: Apache-2.0
// Flat vectors do not say how many tokens they hold.
#include <rflow/cka.hpp>

#include <vector>

#ifdef RFLOW_POSITIVE_CONTROL
double misuse(std::vector<float> const& x, std::vector<float> const& y) {
  return rflow::cka(rflow::view(x, 4, x.size() / 4), rflow::view(y, 4, y.size() / 4));
}
#else
double misuse(std::vector<float> const& x, std::vector<float> const& y) { return rflow::cka(x, y); }
#endif
