// SPDX-License-Identifier: Apache-2.0
#include <rflow/rflow.hpp>

#include <cstdio>

// All layers of a model: one matrix a site, tokens in rows.
void print_flow(std::vector<Eigen::MatrixXf> const& v) {
  rflow::layer_stack<float> const s(v);  // copies none of them: v has to outlive it
  rflow::flow_report const f = rflow::flow(s);
  std::printf("St1 %.4g, St2 %.4g, path %.4g\n", f.variance.st1.value, f.variance.st2.value,
              f.variance.path_length.value);
  for (rflow::measured const& alike : f.inter_token)
    std::printf("tokens alike: %.4g\n", alike.value);
  for (auto const& pair : f.adjacent)
    std::printf("cosine with the layer before: %.4g ± %.2g\n", pair.mean.value, pair.stddev.value);
}

// One array, sites × tokens × hidden, the last varying fastest; strides and other orders work too.
void print_cka(float const* data, rflow::stack_shape shape) {
  rflow::cka_table const t = rflow::cka_matrix(rflow::layer_stack(data, shape), rflow::rbf{});
  for (std::ptrdiff_t i = 0; i < t.rows(); ++i)
    if (rflow::measured const x = t(0, i); x.ok())
      std::printf("like the first layer: %.4g\n", x.value);
    else  // NaN, and why
      std::printf("no answer: %s\n", std::string(to_string(x.why)).c_str());
}

// One pair of layers needs no stack.
double alignment(Eigen::MatrixXf const& x, Eigen::MatrixXf const& y) { return rflow::cka(x, y); }

int main() {
  std::vector<Eigen::MatrixXf> v(4, Eigen::MatrixXf::Random(50, 16));
  for (std::size_t l = 1; l < v.size(); ++l)
    v[l] = v[l - 1] + 0.3f * Eigen::MatrixXf::Random(50, 16);
  print_flow(v);
  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> all(4 * 50, 16);
  for (Eigen::Index l = 0; l < 4; ++l) all.middleRows(50 * l, 50) = v[static_cast<std::size_t>(l)];
  all.middleRows(150, 50).setConstant(1);  // a layer without an answer
  print_cka(all.data(), {4, 50, 16});
  std::printf("linear, first and last: %.4g\n", alignment(v.front(), v.back()));
}
