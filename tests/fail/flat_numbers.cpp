// expect: rflow: numbers alone do not say how many tokens they make. Write rflow::view(x, tokens, hidden)
// first: rflow: numbers alone do not say
// errors: 8
// SPDX-License-Identifier: Apache-2.0
// Every metric of one or two layers, each with numbers of another kind: one error a kind.
#include <rflow/rflow.hpp>

#include <array>
#include <span>
#include <vector>

void misuse(double const* pointer, std::vector<int> const& labels) {
  float c_array[6] = {}, c_rows[2][3] = {};
  std::array<float, 6> const array{};
  std::vector<float> const vector(6);
  std::span<float const> const span(vector);
  std::vector<double> const doubles(6);
#ifdef RFLOW_POSITIVE_CONTROL
  rflow::cka(rflow::view(c_array, 2, 3), rflow::view(array, 2, 3));
  rflow::adjacent_cosine(rflow::view(&c_rows[0][0], 2, 3), rflow::view(span, 2, 3));
  rflow::inter_token_cosine(rflow::view(vector, 2, 3));
  rflow::probe(rflow::view(doubles, 2, 3), labels);
  rflow::flow_monitor<double>(3, 10).push(0, 0, rflow::view(pointer, 2, 3));
#else
  rflow::cka(c_array, array);
  rflow::adjacent_cosine(c_rows, span);
  rflow::inter_token_cosine(vector);
  rflow::probe(doubles, labels);
  rflow::flow_monitor<double>(3, 10).push(0, 0, pointer);
  rflow::flow_monitor<float>(3, 10).push(0, 0, c_array + 0, 2);
#endif
}
