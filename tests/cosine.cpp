// SPDX-License-Identifier: Apache-2.0
#include <rflow/cosine.hpp>

#include <cmath>
#include <limits>
#include <random>

#include <doctest/doctest.h>

#include <Eigen/QR>

#include "reference.hpp"

using doctest::Approx;
using rflow::status;
using rflow::view;

namespace {

template <class T>
view<T> view_of(std::vector<T> const& values, reference::matrix const& x) {
  return view<T>(values, static_cast<std::ptrdiff_t>(x.size()),
                 static_cast<std::ptrdiff_t>(x[0].size()));
}

Eigen::MatrixXd random_matrix(std::mt19937& bits, Eigen::Index n, Eigen::Index d) {
  std::normal_distribution<double> normal;
  return Eigen::MatrixXd::NullaryExpr(n, d, [&] { return normal(bits) + 0.3; });
}

Eigen::MatrixXd random_rotation(std::mt19937& bits, Eigen::Index d) {
  return Eigen::HouseholderQR<Eigen::MatrixXd>(random_matrix(bits, d, d)).householderQ();
}

}  // namespace

TEST_CASE_TEMPLATE("inter-token and adjacent cosines agree with their definitions", T, float,
                   double, rflow::f16, rflow::bf16) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const tokens = 2 + bits() % 50, width = 1 + bits() % 200;
    reference::stack s = reference::random_stack(bits, 2, tokens, width);
    std::vector<T> const a = reference::pack<T>(s[0]), b = reference::pack<T>(s[1]);
    double const within = reference::tolerance<T>;
    CHECK(std::abs(rflow::inter_token_cosine(view_of(a, s[0])) - reference::inter_token(s[0])) <
          within);

    rflow::adjacent_cosines const r = rflow::adjacent_cosine(view_of(a, s[0]), view_of(b, s[1]));
    REQUIRE(r.per_token.size() == tokens);
    CHECK(r.left_out == 0);
    double mean = 0, square = 0;
    for (std::size_t i = 0; i < tokens; ++i) {
      double const c = reference::cosine(s[0][i], s[1][i]);
      CHECK(std::abs(r.per_token[i] - c) < within);
      mean += c / static_cast<double>(tokens);
    }
    for (std::size_t i = 0; i < tokens; ++i) {
      double const away = reference::cosine(s[0][i], s[1][i]) - mean;
      square += away * away / static_cast<double>(tokens);
    }
    CHECK(std::abs(r.mean - mean) < within);
    CHECK(std::abs(r.stddev - std::sqrt(square)) < 10 * within);
  }
}

TEST_CASE("cosines of simple sets are known") {
  Eigen::MatrixXf const basis = Eigen::MatrixXf::Identity(6, 6);
  CHECK(rflow::inter_token_cosine(basis) == Approx(0).epsilon(1e-7));
  // The corners of a simplex are as far apart as m directions can be: −1/(m − 1).
  for (Eigen::Index const m : {2, 3, 6, 11}) {
    Eigen::MatrixXd simplex = Eigen::MatrixXd::Identity(m, m);
    simplex.rowwise() -= simplex.colwise().mean().eval();
    CHECK(rflow::inter_token_cosine(simplex) ==
          Approx(-1 / static_cast<double>(m - 1)).epsilon(1e-13));
  }
  Eigen::MatrixXd same(5, 3);
  same.rowwise() = Eigen::RowVector3d(1, -2, 3);
  CHECK(rflow::inter_token_cosine(same) == Approx(1).epsilon(1e-14));
  Eigen::MatrixXd const opposite = -same;
  rflow::adjacent_cosines const r = rflow::adjacent_cosine(same, opposite);
  CHECK(r.mean == Approx(-1).epsilon(1e-14));
  CHECK(r.stddev < 1e-7);
  Eigen::MatrixXd x(2, 2), y(2, 2);
  x << 1, 0, 1, 0;
  y << 1, 0, 0, 1;
  CHECK(rflow::adjacent_cosine(x, y).mean == Approx(0.5));
  CHECK(rflow::adjacent_cosine(x, y).stddev == Approx(0.5));
}

TEST_CASE("the mean of cosines is not the cosine of means") {
  Eigen::MatrixXd x(2, 2), y(2, 2);
  x << 10, 0, 0, 1;
  y << 10, 0, 0, -1;
  double const of_means = x.colwise().mean().normalized().dot(y.colwise().mean().normalized());
  CHECK(of_means > 0.9);
  CHECK(rflow::adjacent_cosine(x, y).mean == Approx(0).epsilon(1e-14));
}

TEST_CASE("cosines do not change with rotations, token norms, order or layout") {
  for (unsigned seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    auto const n = static_cast<Eigen::Index>(2 + bits() % 30);
    auto const d = static_cast<Eigen::Index>(1 + bits() % 40);
    CAPTURE(n);
    CAPTURE(d);
    Eigen::MatrixXd const x = random_matrix(bits, n, d), y = random_matrix(bits, n, d);
    double const inter = rflow::inter_token_cosine(x);
    double const adjacent = rflow::adjacent_cosine(x, y).mean;
    auto const same = [&](Eigen::MatrixXd const& a, Eigen::MatrixXd const& b) {
      CHECK(std::abs(rflow::inter_token_cosine(a) - inter) < 1e-12);
      CHECK(std::abs(rflow::adjacent_cosine(a, b).mean - adjacent) < 1e-12);
    };
    Eigen::MatrixXd const q = random_rotation(bits, d);
    same(x * q, y * q);
    for (double const scale : {1e-6, 1e-3, 1e3, 1e6}) same(scale * x, y / scale);
    Eigen::VectorXd const norms = random_matrix(bits, n, 1).array().exp();
    same(norms.asDiagonal() * x, y);
    Eigen::PermutationMatrix<Eigen::Dynamic> p(n);
    p.setIdentity();
    std::shuffle(p.indices().data(), p.indices().data() + n, bits);
    same(p * x, p * y);
    Eigen::MatrixXd wide_x = Eigen::MatrixXd::Zero(n, d + 5), wide_y = wide_x;
    wide_x.leftCols(d) = x;
    wide_y.leftCols(d) = y;
    same(wide_x, wide_y);
    Eigen::MatrixXd twice_x(n, 2 * d), twice_y(n, 2 * d);
    twice_x << x, x;
    twice_y << y, y;
    same(twice_x, twice_y);
    // Last token and feature first, by negative strides.
    view<double> const back_x(x.data() + n * d - 1, n, d, -1, -n);
    view<double> const back_y(y.data() + n * d - 1, n, d, -1, -n);
    CHECK(std::abs(rflow::inter_token_cosine(back_x) - inter) < 1e-12);
    CHECK(std::abs(rflow::adjacent_cosine(back_x, back_y).mean - adjacent) < 1e-12);
    CHECK(rflow::adjacent_cosine(x, y).mean == rflow::adjacent_cosine(y, x).mean);
  }
  // Stride 0: the same token over and over.
  std::vector<float> const token{1, 2, 3};
  CHECK(rflow::inter_token_cosine(view<float>(token.data(), 9, 3, 0, 1)) ==
        Approx(1).epsilon(1e-6));
}

TEST_CASE("a common offset is not removed: cosines depend on the origin") {
  std::mt19937 bits(3);
  Eigen::MatrixXd const x = random_matrix(bits, 20, 30);
  CHECK(rflow::inter_token_cosine(x) < 0.5);
  CHECK(rflow::inter_token_cosine(Eigen::MatrixXd(x.array() + 10)) > 0.9);
}

TEST_CASE_TEMPLATE("rows of zeros are left out and counted", T, float, double, rflow::f16,
                   rflow::bf16) {
  std::mt19937 bits(2);
  reference::stack s = reference::random_stack(bits, 2, 11, 20);
  s[0][3].assign(20, 0.0);
  s[1][3].assign(20, 0.0);
  s[1][7].assign(20, 0.0);
  std::vector<T> const a = reference::pack<T>(s[0]), b = reference::pack<T>(s[1]);
  CHECK(std::abs(rflow::inter_token_cosine(view_of(b, s[1])) - reference::inter_token(s[1])) <
        reference::tolerance<T>);
  rflow::adjacent_cosines const r = rflow::adjacent_cosine(view_of(a, s[0]), view_of(b, s[1]));
  CHECK(r.left_out == 2);
  CHECK(r.mean.ok());
  for (std::size_t i = 0; i < 11; ++i) CHECK(std::isnan(r.per_token[i]) == (i == 3 || i == 7));
}

TEST_CASE("no pair of directions: a status, not a number") {
  Eigen::MatrixXf const one = Eigen::MatrixXf::Ones(1, 4);
  CHECK(rflow::inter_token_cosine(one).why == status::too_few_rows);
  CHECK(std::isnan(rflow::inter_token_cosine(one).value));
  CHECK(rflow::adjacent_cosine(one, one).mean == Approx(1));
  Eigen::MatrixXf zeros = Eigen::MatrixXf::Zero(5, 4);
  CHECK(rflow::inter_token_cosine(zeros).why == status::zero_rows);
  zeros(2, 1) = 3;  // one direction makes no pair
  CHECK(rflow::inter_token_cosine(zeros).why == status::zero_rows);
  Eigen::MatrixXf const none = Eigen::MatrixXf::Zero(5, 4);
  rflow::adjacent_cosines const r = rflow::adjacent_cosine(zeros, none);
  CHECK(r.mean.why == status::zero_rows);
  CHECK(r.stddev.why == status::zero_rows);
  CHECK(r.left_out == 5);
}

TEST_CASE("shapes that disagree are refused with both sizes") {
  std::vector<float> const values(20, 1.0f);
  view<float> const x(values.data(), 4, 5), y(values.data(), 5, 4), narrow(values.data(), 4, 3);
  CHECK_THROWS_WITH_AS(rflow::adjacent_cosine(x, y),
                       "rflow::adjacent_cosine: x is 4 x 5, y is 5 x 4", std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::adjacent_cosine(x, narrow),
                       "rflow::adjacent_cosine: x is 4 x 5, y is 4 x 3", std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::adjacent_cosine(x, view<float>(values.data(), 0, 5)),
                       "rflow::adjacent_cosine: activations are empty: 0 tokens x 5 features",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::inter_token_cosine(view<float>(values.data(), 3, 0)),
                       "rflow::inter_token_cosine: activations are empty: 3 tokens x 0 features",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::inter_token_cosine(view<float>(nullptr, 3, 2)),
                       "rflow::inter_token_cosine: activations have no data (null pointer)",
                       std::invalid_argument);
}

TEST_CASE_TEMPLATE("a NaN or infinity is thrown with layer, token and feature", T, float, double,
                   rflow::f16, rflow::bf16) {
  for (double const poison :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity()}) {
    std::mt19937 bits(1);
    reference::stack s = reference::random_stack(bits, 2, 10, 21);
    std::vector<T> const good = reference::pack<T>(s[0]);
    s[1][6][17] = poison;
    s[1][6][20] = poison;
    s[1][9][0] = poison;
    std::vector<T> const bad = reference::pack<T>(s[1]);
    view<T> const x = view_of(good, s[0]), y = view_of(bad, s[1]);
    CHECK_THROWS_WITH_AS(
        rflow::inter_token_cosine(y),
        "rflow::inter_token_cosine: NaN or infinity in layer x, token 6, feature 17",
        std::domain_error);
    CHECK_THROWS_WITH_AS(rflow::adjacent_cosine(x, y),
                         "rflow::adjacent_cosine: NaN or infinity in layer y, token 6, feature 17",
                         std::domain_error);
    CHECK_THROWS_WITH_AS(rflow::adjacent_cosine(y, x),
                         "rflow::adjacent_cosine: NaN or infinity in layer x, token 6, feature 17",
                         std::domain_error);
  }
}

TEST_CASE("cosines of values near the ends of their type") {
  std::mt19937 bits(17);
  Eigen::MatrixXf const x = random_matrix(bits, 9, 33).cast<float>();
  double const expected = rflow::inter_token_cosine(Eigen::MatrixXd(x.cast<double>()));
  for (float const scale : {1e-36f, 1e-20f, 1e18f, 1e30f, 1e37f})
    CHECK(std::abs(rflow::inter_token_cosine(Eigen::MatrixXf(scale * x)) - expected) < 1e-5);
  // Norms of this row overflow binary16, the values do not.
  std::vector<rflow::f16> const large(2 * 4096, rflow::f16::nearest(60000));
  CHECK(rflow::inter_token_cosine(view(large, 2, 4096)) == Approx(1).epsilon(1e-6));
}
