// SPDX-License-Identifier: Apache-2.0
#include <rflow/jackknife.hpp>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <doctest/doctest.h>

using doctest::Approx;
using rflow::status;

namespace {

/// n rows of d independent normals.
Eigen::MatrixXd normals(std::mt19937& bits, Eigen::Index n, Eigen::Index d) {
  std::normal_distribution<double> normal;
  return Eigen::MatrixXd::NullaryExpr(n, d, [&] { return normal(bits); });
}

}  // namespace

TEST_CASE("the standard error is that of tables made without each block") {
  std::mt19937 bits(21);
  std::vector<Eigen::MatrixXd> layers{normals(bits, 53, 4), normals(bits, 53, 6)};
  layers[1].leftCols(4) += layers[0];
  rflow::layer_stack const stack(layers);
  rflow::cka_intervals const found = rflow::cka_jackknife(stack, 7);
  double sum = 0, squares = 0;
  for (Eigen::Index b = 0; b < 7; ++b) {
    std::vector<int> rows;
    for (int i = 0; i < 53; ++i)
      if (i < 53 * b / 7 || i >= 53 * (b + 1) / 7) rows.push_back(i);
    Eigen::MatrixXd const x = layers[0](rows, Eigen::all), y = layers[1](rows, Eigen::all);
    double const theta = rflow::cka(x, y);
    sum += theta;
    squares += theta * theta;
  }
  double const expected = std::sqrt(6.0 / 7 * (squares - sum * sum / 7));
  CHECK(found.table(0, 1) == Approx(rflow::cka(layers[0], layers[1])).epsilon(1e-12));
  CHECK(found.standard_error(0, 1) == Approx(expected).epsilon(1e-9));
  CHECK(found.standard_error(1, 0) == Approx(expected).epsilon(1e-9));
  CHECK(found.standard_error(0, 0) == 0);
  CHECK(found.high(0, 1) - found.table(0, 1) == Approx(2.4469 * expected).epsilon(2e-3));
  CHECK(found.table(0, 1) - found.low(0, 1) == Approx(2.4469 * expected).epsilon(2e-3));

  rflow::layer_stack<double> const first{rflow::as_view(layers[0])};
  rflow::layer_stack<double> const second{rflow::as_view(layers[1])};
  CHECK(rflow::cka_jackknife(first, second, 7).standard_error(0, 0) ==
        Approx(expected).epsilon(1e-9));
}

TEST_CASE("intervals hold the value of the whole population about as often as they say") {
  // y = x A + noise: with linear kernels the population has CKA ‖Σxy‖² / (‖Σx‖ ‖Σy‖).
  unsigned const seed = 4;
  CAPTURE(seed);
  std::mt19937 bits(seed);
  Eigen::MatrixXd const a = normals(bits, 5, 6) * 0.5;
  Eigen::MatrixXd const cov_y = a.transpose() * a + Eigen::MatrixXd::Identity(6, 6);
  double const truth = a.squaredNorm() / (std::sqrt(5.0) * cov_y.norm());
  int const trials = 300;
  int inside = 0;
  for (int t = 0; t < trials; ++t) {
    Eigen::MatrixXd const x = normals(bits, 160, 5), y = x * a + normals(bits, 160, 6);
    rflow::layer_stack<double> const first{rflow::as_view(x)}, second{rflow::as_view(y)};
    rflow::cka_intervals const found = rflow::cka_jackknife(
        first, second, 16, rflow::linear{}, rflow::debiased{}, rflow::on_cpu{.threads = 1});
    inside += found.low(0, 0) <= truth && truth <= found.high(0, 0);
  }
  CAPTURE(inside);
  CHECK(inside >= trials * 90 / 100);  // 4 standard deviations of a true 95 % would be 5 %
  CHECK(inside <= trials * 99 / 100);
}

TEST_CASE("blocks of dependent tokens: too short ones understate the error, long ones do not") {
  // Each row is repeated 8 times, so 320 tokens are worth 40.
  unsigned const seed = 6;
  CAPTURE(seed);
  std::mt19937 bits(seed);
  double by_token = 0, by_run = 0, m2 = 0;
  rflow::running_stat values;
  for (int t = 0; t < 60; ++t) {
    Eigen::MatrixXd const base = normals(bits, 40, 3);
    Eigen::MatrixXd const other = base * 0.7 + normals(bits, 40, 3);
    Eigen::MatrixXd x(320, 3), y(320, 3);
    for (Eigen::Index i = 0; i < 320; ++i) x.row(i) = base.row(i / 8), y.row(i) = other.row(i / 8);
    rflow::layer_stack<double> const first{rflow::as_view(x)}, second{rflow::as_view(y)};
    auto const error = [&](std::ptrdiff_t blocks) {
      return rflow::cka_jackknife(first, second, blocks, rflow::linear{}, rflow::debiased{},
                                  rflow::on_cpu{.threads = 1})
          .standard_error(0, 0)
          .value;
    };
    by_token += error(160) / 60;
    by_run += error(20) / 60;
    values.add(rflow::cka(x, y));
  }
  m2 = values.stddev();
  CHECK(by_token < 0.7 * m2);
  CHECK(by_run > 0.75 * m2);
  CHECK(by_run < 1.5 * m2);
}

TEST_CASE("no value without a reason") {
  std::mt19937 bits(3);
  std::vector<Eigen::MatrixXf> layers;
  for (int l = 0; l < 3; ++l) layers.push_back(normals(bits, 30, 4).cast<float>());
  layers[1](7, 2) = std::numeric_limits<float>::quiet_NaN();
  layers[2].setConstant(3);
  rflow::cka_intervals const found = rflow::cka_jackknife(rflow::layer_stack(layers), 5);
  CHECK(found.standard_error(0, 1).why == status::non_finite);
  CHECK(found.low(1, 0).why == status::non_finite);
  CHECK(found.high(0, 2).why == status::constant_layer);
  // a NaN of a masked token is none
  std::vector<int> keep(30, 1);
  keep[7] = 0;
  CHECK(rflow::cka_jackknife(rflow::layer_stack(layers).tokens(keep), 5).standard_error(0, 1).ok());
}

TEST_CASE("blocks that there cannot be") {
  std::vector<Eigen::MatrixXd> const layers(2, Eigen::MatrixXd::Random(12, 3));
  rflow::layer_stack const stack(layers);
  CHECK_THROWS_WITH_AS(rflow::cka_jackknife(stack, 4),
                       "rflow::cka_jackknife: 4 blocks of 12 tokens; it takes at least 5, and a "
                       "token in each",
                       std::invalid_argument);
  CHECK_THROWS_AS(rflow::cka_jackknife(stack, 13), std::invalid_argument);
  Eigen::MatrixXd const longer = Eigen::MatrixXd::Random(13, 3);
  CHECK_THROWS_WITH_AS(
      rflow::cka_jackknife(stack, rflow::layer_stack<double>{rflow::as_view(longer)}),
      "rflow::cka_jackknife: the stacks have 12 and 13 tokens", std::invalid_argument);
}
