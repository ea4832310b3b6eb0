// SPDX-License-Identifier: Apache-2.0
#include <rflow/cka.hpp>

#include <cmath>

int main() {
  Eigen::MatrixXf const x = Eigen::MatrixXf::Random(32, 8);
  return std::abs(rflow::cka(x, x) - 1.0) < 1e-5 ? 0 : 1;
}
