// expect: rflow: rows in containers of their own are not one array
// first: rflow: rows in containers of their own are not one array
// errors: 1
// SPDX-License-Identifier: Apache-2.0
// A vector of vectors is not one array.
#include <rflow/cosine.hpp>

#include <vector>

using rows = std::vector<std::vector<float>>;

double misuse(rows const& x) {
#ifdef RFLOW_POSITIVE_CONTROL
  std::vector<float> values;
  for (std::vector<float> const& row : x) values.insert(values.end(), row.begin(), row.end());
  return rflow::inter_token_cosine(rflow::view(values, x.size(), x.front().size()));
#else
  return rflow::inter_token_cosine(x);
#endif
}
