// SPDX-License-Identifier: Apache-2.0
#include <rflow/blas.hpp>
#include <rflow/cka.hpp>

int main() {
  Eigen::MatrixXf const x = Eigen::MatrixXf::Random(32, 8);
  return rflow::cka(x, x, rflow::linear{}, rflow::debiased{}, rflow::on_blas{}).ok() ? 0 : 1;
}
