// expect: rflow::layer_stack(pointer, rflow::stack_shape{sites, tokens, hidden}) for one array
// expect: rflow: a metric of many layers takes a stack of them, not one layer
// expect: rflow: the extents of an array of layers have names
// first: static
// errors: 9
// SPDX-License-Identifier: Apache-2.0
// Every metric of many layers, each with something else that is no stack: one error a kind.
#include <rflow/rflow.hpp>

#include <array>
#include <span>
#include <vector>

void misuse(float const* pointer, std::vector<float> const& vector, std::vector<int> const& labels,
            std::vector<std::vector<float>> const& rows, Eigen::MatrixXf const& matrix) {
  rflow::cka_accumulator<> sums;
#ifdef RFLOW_POSITIVE_CONTROL
  rflow::layer_stack const stack(pointer, rflow::stack_shape{vector.size() / 6, 2, rows.size()});
  rflow::variance(stack), rflow::flow(stack), rflow::cka_matrix(stack), sums.add(stack);
  rflow::cka_jackknife(stack), rflow::probe_layers(stack, labels), rflow::cka(matrix, matrix);
#else
  rflow::variance(pointer);
  rflow::flow(vector);
  rflow::cka_matrix(rows);
  rflow::cka_jackknife(std::span<float const>(vector));
  rflow::probe_layers(std::array<float, 6>{}, labels);
  sums.add(std::vector<double>(6));
  rflow::flow(matrix);
  rflow::layer_stack const extents(pointer, 1, 2, 3);
  rflow::layer_stack const no_layers(rows);  // each row is "numbers alone"
#endif
}
