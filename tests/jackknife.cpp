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

/// n rows of d independent chains of lag-1 correlation `phi` and variance 1.
Eigen::MatrixXd chains(std::mt19937& bits, Eigen::Index n, Eigen::Index d, double phi) {
  Eigen::MatrixXd x = normals(bits, n, d);
  for (Eigen::Index i = 1; i < n; ++i)
    x.row(i) = phi * x.row(i - 1) + std::sqrt(1 - phi * phi) * x.row(i);
  return x;
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
  double const centre = 7 * found.table(0, 1) - 6 * sum / 7;
  CHECK(found.centre(0, 1) == Approx(centre).epsilon(1e-9));
  CHECK(found.centre(1, 1) == 1);
  CHECK(found.high(0, 1) - centre == Approx(2.446911851 * expected).epsilon(1e-8));
  CHECK(centre - found.low(0, 1) == Approx(2.446911851 * expected).epsilon(1e-8));

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

TEST_CASE("intervals of dependent tokens hold the value of ever more of them, or are not given") {
  // Chains of lag-1 correlation φ, y = x A + noise, or unrelated: CKA of the process is that of
  // independent tokens. At 0.95 and 200 tokens no block is long enough.
  unsigned const seed = 12;
  CAPTURE(seed);
  std::mt19937 bits(seed);
  Eigen::MatrixXd const a = normals(bits, 5, 6) * 0.5;
  Eigen::MatrixXd const cov_y = a.transpose() * a + Eigen::MatrixXd::Identity(6, 6);
  double const related = a.squaredNorm() / (std::sqrt(5.0) * cov_y.norm());
  int const trials = 120;
  struct setting {
    double phi;
    Eigen::Index n;
    bool given;
  };
  for (setting const& of : {setting{0, 100, true}, setting{0.5, 200, true}, setting{0.8, 600, true},
                            setting{0.95, 200, false}})
    for (double const truth : {related, 0.0}) {
      CAPTURE(of.phi);
      CAPTURE(truth);
      int given = 0, inside = 0;
      for (int t = 0; t < trials; ++t) {
        Eigen::MatrixXd const x = chains(bits, of.n, 5, of.phi);
        Eigen::MatrixXd y = chains(bits, of.n, 6, of.phi);
        if (truth > 0) y += x * a;
        rflow::layer_stack<double> const first{rflow::as_view(x)}, second{rflow::as_view(y)};
        rflow::cka_intervals const found = rflow::cka_jackknife(
            first, second, 0, rflow::linear{}, rflow::debiased{}, rflow::on_cpu{.threads = 1});
        CHECK(found.blocks >= 5);
        CHECK(found.table(0, 0).ok());
        if (!found.low(0, 0).ok()) {
          CHECK(found.low(0, 0).why == status::dependent_tokens);
          CHECK(found.standard_error(0, 0).why == status::dependent_tokens);
          continue;
        }
        ++given;
        inside += found.low(0, 0) <= truth && truth <= found.high(0, 0);
      }
      CAPTURE(given);
      CAPTURE(inside);
      if (!of.given) {
        CHECK(given <= trials / 20);
        continue;
      }
      CHECK(given >= trials * 9 / 10);
      // Four standard deviations below 95 %. More is no fault: of unrelated layers the jackknife
      // overstates the error.
      double const n = given;
      CHECK(inside >= 0.95 * n - 4 * std::sqrt(n * 0.05 * 0.95));
    }
}

TEST_CASE("how long tokens depend on one another is measured, and blocks follow") {
  std::mt19937 bits(6);
  auto const measured_of = [&](double phi, Eigen::Index n) {
    std::vector<Eigen::MatrixXd> const layers{chains(bits, n, 8, phi), chains(bits, n, 8, 0)};
    return rflow::cka_jackknife(rflow::layer_stack(layers));
  };
  rflow::cka_intervals const none = measured_of(0, 400), some = measured_of(0.7, 1200);
  CHECK(none.dependence(0) < 1.5);
  CHECK(none.blocks == 10);
  // (1 + φ) / (1 − φ) = 5.7; the tail that is lost in noise is missing
  CHECK(some.dependence(0) > 3.5);
  CHECK(some.dependence(0) < 7);
  CHECK(some.dependence(1) < 1.5);
  // Each row repeated 8 times: blocks of 2 are too short, of 40 long enough.
  Eigen::MatrixXd const base = normals(bits, 60, 3);
  Eigen::MatrixXd x(480, 3);
  for (Eigen::Index i = 0; i < 480; ++i) x.row(i) = base.row(i / 8);
  std::vector<Eigen::MatrixXd> const layers{x, normals(bits, 480, 3) + x};
  rflow::layer_stack const stack(layers);
  CHECK(rflow::cka_jackknife(stack, 240).standard_error(0, 1).why == status::dependent_tokens);
  CHECK(rflow::cka_jackknife(stack, 12).standard_error(0, 1).ok());
}

TEST_CASE("no value without a reason") {
  std::mt19937 bits(3);
  std::vector<Eigen::MatrixXf> layers;
  for (int l = 0; l < 3; ++l) layers.push_back(normals(bits, 30, 4).cast<float>());
  layers[1](7, 2) = std::numeric_limits<float>::quiet_NaN();
  layers[2].setConstant(3);
  rflow::cka_intervals const found = rflow::cka_jackknife(rflow::layer_stack(layers), 5);
  CHECK(found.centre(0, 1).why == status::non_finite);
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
