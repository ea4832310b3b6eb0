// expect: rflow: a view owns nothing, and this temporary dies at the end of the statement. Keep it in a variable
// first: rflow: a view owns nothing
// errors: 4
// SPDX-License-Identifier: Apache-2.0
// Views of what is gone when the next line runs. A span or a map may go: its elements stay.
#include <rflow/eigen.hpp>

#include <array>
#include <span>
#include <vector>

std::vector<float> capture();
std::array<float, 6> captured_array();
std::vector<double> const captured_const();
Eigen::MatrixXf captured_matrix();

double misuse(std::vector<float> const& kept) {
#ifdef RFLOW_POSITIVE_CONTROL
  auto const a = rflow::view(std::span(kept), 2, 3);
  auto const b = rflow::as_view(Eigen::Map<Eigen::MatrixXf const>(kept.data(), 2, 3));
  return a(0, 0) + b(0, 0) + rflow::as_view(rflow::view(kept, 2, 3))(0, 0);
#else
  auto const a = rflow::view(capture(), kept.size() / 3, 3);
  auto const b = rflow::as_view(captured_matrix());
  rflow::view<float> const c(captured_array(), 2, 3);
  auto const d = rflow::view(captured_const(), 2, 3);
  return a(0, 0) + b(0, 0) + c(0, 0) + static_cast<float>(d(0, 0));
#endif
}
