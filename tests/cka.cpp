// SPDX-License-Identifier: Apache-2.0
// The CKA of whatever backend RFLOW_BACKEND names: tested, unless another test program says so before
// it includes this file.
#include <rflow/cka.hpp>
#include <rflow/cka_accumulator.hpp>
#include <rflow/cka_estimators.hpp>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include <doctest/doctest.h>

#include <Eigen/QR>

#include "reference.hpp"

using doctest::Approx;
using rflow::biased;
using rflow::debiased;
using rflow::layer_stack;
using rflow::linear;
using rflow::measured;
using rflow::rbf;
using rflow::status;
using rflow::view;

#ifndef RFLOW_BACKEND
#define RFLOW_BACKEND rflow::on_cpu
#endif

namespace {

using tested = RFLOW_BACKEND;

// Called by their plain names, these run on the backend under test.
constexpr auto cka = []<class X, class Y, class Kernel = linear, class Estimator = debiased>(
    X const& x, Y const& y, Kernel const& kernel = {}, Estimator by = {}, tested const& on = {}) {
  return rflow::cka(x, y, kernel, by, on);
};

constexpr struct {
  template <class T, class Kernel = linear, class Estimator = debiased>
  rflow::cka_table operator()(layer_stack<T> const& stack, Kernel const& kernel = {},
                              Estimator by = {}, tested const& on = {}) const {
    return rflow::cka_matrix(stack, kernel, by, on);
  }
  template <class T, class U, class Kernel = linear, class Estimator = debiased>
  rflow::cka_table operator()(layer_stack<T> const& a, layer_stack<U> const& b,
                              Kernel const& kernel = {}, Estimator by = {},
                              tested const& on = {}) const {
    return rflow::cka_matrix(a, b, kernel, by, on);
  }
} cka_matrix;

// BLAS has larger tiles.
constexpr std::size_t smallest_bound = std::size_t{200}
                                       << (std::same_as<tested, rflow::on_cpu> ? 10 : 14);

using Eigen::MatrixXd;
using Eigen::MatrixXf;
using layers = std::vector<MatrixXd>;

template <class Scalar = double>
Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic> to_eigen(reference::matrix const& x) {
  Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic> out(static_cast<Eigen::Index>(x.size()),
                                                            static_cast<Eigen::Index>(x[0].size()));
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < x[i].size(); ++j)
      out(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) =
          static_cast<Scalar>(x[i][j]);
  return out;
}

template <class X>
reference::matrix rows_of(X const& x) {
  reference::matrix out(static_cast<std::size_t>(x.rows()),
                        std::vector<double>(static_cast<std::size_t>(x.cols())));
  for (Eigen::Index i = 0; i < x.rows(); ++i)
    for (Eigen::Index j = 0; j < x.cols(); ++j)
      out[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] = static_cast<double>(x(i, j));
  return out;
}

MatrixXd normal_matrix(std::mt19937& bits, Eigen::Index n, Eigen::Index d) {
  std::normal_distribution<double> normal;
  return MatrixXd::NullaryExpr(n, d, [&] { return normal(bits); });
}

/// Related layers of different widths.
layers related_layers(std::mt19937& bits, Eigen::Index n, std::vector<Eigen::Index> const& widths) {
  MatrixXd const common = normal_matrix(bits, n, 12);
  layers out;
  for (Eigen::Index const d : widths)
    out.push_back(common * normal_matrix(bits, 12, d) + 2 * normal_matrix(bits, n, d));
  return out;
}

/// The linear kernel of features centred in double: HSIC does not change with the centre, and the
/// brute force keeps its digits.
template <class X>
reference::matrix gram_of(X const& x) {
  MatrixXd centred = x.template cast<double>();
  centred.rowwise() -= centred.colwise().mean().eval();
  return rows_of(MatrixXd(centred * centred.transpose()));
}

template <class X, class Y>
double brute_biased(X const& x, Y const& y) {
  return reference::cka(gram_of(x), gram_of(y), reference::hsic_biased);
}
template <class X, class Y>
double brute_debiased(X const& x, Y const& y) {
  return reference::cka(gram_of(x), gram_of(y), reference::hsic_debiased);
}

/// chance by its formula: tr(HK) tr(HL) / ((n − 1) ‖HKH‖ ‖HLH‖).
double brute_chance(reference::matrix const& k, reference::matrix const& l) {
  reference::matrix const kc = reference::centred(k), lc = reference::centred(l);
  double tk = 0, tl = 0;
  for (std::size_t i = 0; i < k.size(); ++i) {
    tk += kc[i][i];
    tl += lc[i][i];
  }
  return tk * tl / (static_cast<double>(k.size()) - 1) /
         std::sqrt(reference::inner(kc, kc) * reference::inner(lc, lc));
}

bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0; }

bool same_bits(rflow::cka_table const& a, rflow::cka_table const& b) {
  bool same = a.rows() == b.rows() && a.cols() == b.cols();
  for (std::ptrdiff_t i = 0; same && i < a.rows(); ++i)
    for (std::ptrdiff_t j = 0; same && j < a.cols(); ++j)
      same =
          a.status(i, j) == b.status(i, j) &&
          (a.status(i, j) != status::ok || (same_bits(a(i, j).value, b(i, j).value) &&
                                            same_bits(a.chance(i, j).value, b.chance(i, j).value)));
  return same;
}

struct fixture {
  MatrixXd x, y;

  fixture() {
    auto const [a, b] = reference::kornblith();
    x = to_eigen(a);
    y = to_eigen(b);
  }
  layers stack() const { return {x, y}; }
};

layers rows_between(layers const& x, Eigen::Index first, Eigen::Index count) {
  layers out;
  for (MatrixXd const& layer : x) out.push_back(layer.middleRows(first, count));
  return out;
}

template <class Kernel = linear>
rflow::cka_accumulator<Kernel> minibatches(layers const& x, std::vector<Eigen::Index> const& sizes,
                                           Kernel const& kernel = {},
                                           rflow::batch_weight weight = {}) {
  rflow::cka_accumulator<Kernel> out(kernel, weight);
  Eigen::Index first = 0;
  for (Eigen::Index const size : sizes) {
    layers const batch = rows_between(x, first, size);
    out.add(layer_stack(batch), tested{});
    first += size;
  }
  return out;
}

}  // namespace

// ---- published and recomputed numbers -----------------------------------------------------------

TEST_CASE("the fixture is numpy's") {
  fixture const f;
  CHECK(f.x(0, 0) == Approx(-0.7031873098624105).epsilon(1e-15));
  CHECK(f.x(0, 1) == Approx(-0.4902823627877146).epsilon(1e-15));
  CHECK(f.x(0, 2) == Approx(-0.3218143296501526).epsilon(1e-15));
}

TEST_CASE("linear CKA of the published example") {
  fixture const f;
  CHECK(std::abs(cka(f.x, f.y, linear{}, biased{}) - 0.5576132566117589) < 1e-12);
  CHECK(std::abs(cka(f.x, f.y, linear{}, debiased{}) - 0.5134564895055259) < 1e-12);
  CHECK(std::abs(cka(f.x, f.y) - 0.5134564895055259) < 1e-12);
  MatrixXf const x = f.x.cast<float>(), y = f.y.cast<float>();
  CHECK(std::abs(cka(x, y, linear{}, biased{}) - 0.5576132566117589) < 1e-5);
  CHECK(std::abs(cka(x, y) - 0.5134564895055259) < 1e-5);
}

TEST_CASE("HSIC of the published example, from moments and an estimator") {
  fixture const f;
  layers const both = f.stack();
  for (tested const& on : {tested{}, tested{.path = rflow::gram_path::gram},
                           tested{.path = rflow::gram_path::feature}}) {
    rflow::gram_moments const m = on.gram(linear{}, layer_stack(both));
    REQUIRE(m.tokens == 100);
    double const unbiased = 100 * 97;
    CHECK(biased::hsic(m, 0, 1) / (99 * 99) == Approx(11.87835726918598).epsilon(1e-12));
    CHECK(debiased::hsic(m, 0, 1) / unbiased == Approx(9.895955787045914).epsilon(1e-12));
    CHECK(debiased::hsic(m, 0, 0) / unbiased == Approx(9.246603703545466).epsilon(1e-12));
    CHECK(debiased::hsic(m, 1, 1) / unbiased == Approx(40.172231189885025).epsilon(1e-12));
  }
}

TEST_CASE("minibatch CKA of the published example") {
  fixture const f;
  auto const in_batches = [&](Eigen::Index size) {
    auto const sizes = std::vector<Eigen::Index>(static_cast<std::size_t>(100 / size), size);
    return minibatches(f.stack(), sizes)(0, 1);
  };
  CHECK(std::abs(in_batches(5) - 0.5238237007309) < 1e-12);
  CHECK(std::abs(in_batches(10) - 0.5437308119619) < 1e-12);
  CHECK(std::abs(in_batches(20) - 0.5337183633654) < 1e-12);
  CHECK(std::abs(in_batches(25) - 0.5132675063591) < 1e-12);
  CHECK(std::abs(in_batches(50) - 0.5308439528322) < 1e-12);

  using rflow::batch_weight;
  auto const uneven = [&](batch_weight weight) {
    return minibatches(f.stack(), {40, 40, 20}, linear{}, weight)(0, 1);
  };
  CHECK(std::abs(uneven(batch_weight::equal) - 0.5257639694225) < 1e-12);
  CHECK(std::abs(uneven(batch_weight::pairs) - 0.5270472455922) < 1e-12);
  CHECK(std::abs(uneven(batch_weight::rows) - 0.5260562343109) < 1e-12);
  CHECK(same_bits(minibatches(f.stack(), {40, 40, 20})(0, 1), uneven(batch_weight::pairs)));
}

TEST_CASE("closed forms: a line against its square") {
  MatrixXd x(5, 1), y(5, 1);
  x << 0, 1, 2, 3, 4;
  y << 0, 1, 4, 9, 16;
  CHECK(std::abs(cka(x, y, linear{}, biased{}) - 1600.0 / 1740.0) < 1e-12);
  CHECK(std::abs(cka(x, y) - 0.9623608058031811) < 1e-12);
  MatrixXf const xf = x.cast<float>(), yf = y.cast<float>();
  CHECK(std::abs(cka(xf, yf, linear{}, biased{}) - 1600.0 / 1740.0) < 1e-5);
  CHECK(std::abs(cka(xf, yf) - 0.9623608058031811) < 1e-5);
}

TEST_CASE("with one feature each, biased CKA is the squared correlation") {
  std::mt19937 bits(5);
  MatrixXd const x = normal_matrix(bits, 40, 1);
  MatrixXd const y = 0.5 * x + normal_matrix(bits, 40, 1);
  Eigen::VectorXd const a = x.array() - x.mean(), b = y.array() - y.mean();
  double const r = a.dot(b) / a.norm() / b.norm();
  CHECK(std::abs(cka(x, y, linear{}, biased{}) - r * r) < 1e-12);
}

// ---- brute force --------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("tables agree with brute force for random shapes", T, float, double, rflow::f16,
                   rflow::bf16) {
  for (unsigned seed = 1; seed <= 16; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const sites = 2 + bits() % 4, tokens = 4 + bits() % 130, width = 1 + bits() % 160;
    CAPTURE(sites);
    CAPTURE(tokens);
    CAPTURE(width);
    reference::stack x = reference::random_stack(bits, sites, tokens, width);
    std::vector<T> const values = reference::pack<T>(x);
    auto const stack = reference::stack_of(values, x);
    std::vector<reference::matrix> kernels;
    for (auto const& site : x) kernels.push_back(gram_of(to_eigen(site)));
    // So few tokens that the debiased terms are differences of what is nearly equal.
    double const within = reference::tolerance<T> * (tokens < 12 ? 100 : 1);
    for (rflow::gram_path const path :
         {rflow::gram_path::automatic, rflow::gram_path::gram, rflow::gram_path::feature}) {
      tested const on{.path = path};
      rflow::cka_table const d = cka_matrix(stack, linear{}, debiased{}, on);
      rflow::cka_table const b = cka_matrix(stack, linear{}, biased{}, on);
      REQUIRE(d.rows() == static_cast<std::ptrdiff_t>(sites));
      REQUIRE(d.cols() == d.rows());
      CHECK(d.tokens() == static_cast<std::ptrdiff_t>(tokens));
      for (std::size_t i = 0; i < sites; ++i)
        for (std::size_t j = 0; j < sites; ++j) {
          auto const p = static_cast<std::ptrdiff_t>(i), q = static_cast<std::ptrdiff_t>(j);
          REQUIRE(d.status(p, q) == status::ok);
          CHECK(std::abs(d(p, q) - reference::cka(kernels[i], kernels[j],
                                                  reference::hsic_debiased)) < within);
          CHECK(std::abs(b(p, q) - reference::cka(kernels[i], kernels[j], reference::hsic_biased)) <
                within);
          CHECK(std::abs(b.chance(p, q) - brute_chance(kernels[i], kernels[j])) < within);
          CHECK(same_bits(d(p, q).value, d(q, p).value));
        }
      for (std::ptrdiff_t p = 0; p < d.rows(); ++p) CHECK(d(p, p) == 1.0);
    }
  }
}

TEST_CASE("the fewest tokens that an estimator takes") {
  std::mt19937 bits(3);
  for (Eigen::Index const n : {2, 3, 4, 5}) {
    CAPTURE(n);
    layers const x = related_layers(bits, n, {7, 5});
    for (rflow::gram_path const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
      CAPTURE(static_cast<int>(path));
      tested const on{.path = path};
      rflow::cka_table const b = cka_matrix(layer_stack(x), linear{}, biased{}, on);
      REQUIRE(b.status(0, 1) == status::ok);
      CHECK(std::abs(b(0, 1) - brute_biased(x[0], x[1])) < 1e-12);
      CHECK(std::abs(b.chance(0, 1) - brute_chance(gram_of(x[0]), gram_of(x[1]))) < 1e-12);
      rflow::gram_moments const m = on.gram(linear{}, layer_stack(x));
      CHECK(biased::hsic(m, 0, 1) ==
            Approx(reference::hsic_biased(gram_of(x[0]), gram_of(x[1]))).epsilon(1e-12));
      if (n < 4) continue;
      CHECK(debiased::hsic(m, 0, 1) ==
            Approx(reference::hsic_debiased(gram_of(x[0]), gram_of(x[1]))).epsilon(1e-10));
    }
  }
}

TEST_CASE("two models of different depth, width and type over the same tokens") {
  std::mt19937 bits(9);
  std::vector<MatrixXf> a;
  layers const wide = related_layers(bits, 50, {13, 40, 7});
  for (MatrixXd const& m : wide) a.push_back(m.cast<float>());
  layers const b = related_layers(bits, 50, {21, 90});
  layers const mixed{wide[0] + wide[0], b[1]};
  rflow::cka_table const t = cka_matrix(layer_stack(a), layer_stack(b));
  REQUIRE(t.rows() == 3);
  REQUIRE(t.cols() == 2);
  for (std::size_t i = 0; i < 3; ++i)
    for (std::size_t j = 0; j < 2; ++j) {
      auto const p = static_cast<std::ptrdiff_t>(i), q = static_cast<std::ptrdiff_t>(j);
      CHECK(std::abs(t(p, q) - brute_debiased(a[i], b[j])) < 1e-12);
      CHECK(std::abs(cka(a[i], b[j]) - t(p, q)) < 1e-12);
    }
  CHECK(cka_matrix(layer_stack(a), layer_stack(mixed))(0, 0) == Approx(1).epsilon(1e-6));

  layers const fewer = rows_between(b, 0, 49);
  CHECK_THROWS_WITH_AS(cka_matrix(layer_stack(a), layer_stack(fewer)),
                       "rflow::cka_matrix: the stacks have 50 and 49 tokens",
                       std::invalid_argument);
  // Masks count: 49 of 50 on one side, 49 on the other.
  std::vector<int> mask(50, 1);
  mask[49] = 0;
  CHECK(cka_matrix(layer_stack(a).tokens(mask), layer_stack(fewer))(0, 0) ==
        Approx(brute_debiased(a[0].topRows(49), fewer[0])).epsilon(1e-11));
}

namespace {

struct polynomial {
  double operator()(double inner, double, double) const { return (inner + 1) * (inner + 1); }
};

struct rational {
  double operator()(double inner, double a, double b) const {
    return 1 / (1 + 0.01 * std::max(0.0, a + b - 2 * inner));
  }
};

template <class Kernel>
reference::matrix kernel_of(MatrixXd x, Kernel const& kernel) {
  x.rowwise() -= x.colwise().mean().eval();
  MatrixXd k(x.rows(), x.rows());
  for (Eigen::Index i = 0; i < k.rows(); ++i)
    for (Eigen::Index j = 0; j < k.cols(); ++j)
      k(i, j) = kernel(x.row(i).dot(x.row(j)), x.row(i).squaredNorm(), x.row(j).squaredNorm());
  return rows_of(k);
}

template <class Kernel>
void check_kernel(Kernel const& kernel) {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    layers const x = related_layers(bits, 5 + 11 * seed, {17, 30});
    reference::matrix const k = kernel_of(x[0], kernel), l = kernel_of(x[1], kernel);
    CHECK(std::abs(cka(x[0], x[1], kernel) - reference::cka(k, l, reference::hsic_debiased)) <
          1e-11);
    CHECK(std::abs(cka(x[0], x[1], kernel, biased{}) -
                   reference::cka(k, l, reference::hsic_biased)) < 1e-11);
  }
}

}  // namespace

TEST_CASE("kernels of the user's own") {
  check_kernel(polynomial{});
  check_kernel(rational{});
  check_kernel([](double inner, double, double) { return inner; });
  fixture const f;
  CHECK(std::abs(cka(f.x, f.y, [](double inner, double, double) { return 3 * inner + 5; }) -
                 cka(f.x, f.y)) < 1e-12);
}

// ---- mistakes that have been made ---------------------------------------------------------------

TEST_CASE("mistake: only the last batch is kept") {
  fixture const f;
  double const all = minibatches(f.stack(), {50, 50})(0, 1);
  layers const last = rows_between(f.stack(), 50, 50);
  CHECK(std::abs(all - cka(last[0], last[1])) > 1e-3);
  // Two times the same batch is that batch.
  rflow::cka_accumulator<> twice;
  twice.add(layer_stack(last), tested{});
  twice.add(layer_stack(last), tested{});
  CHECK(twice(0, 1) == Approx(cka(last[0], last[1])).epsilon(1e-12));
  CHECK(twice.batches() == 2);
  CHECK(twice.tokens() == 100);
}

TEST_CASE("mistake: rows labelled in another order") {
  std::mt19937 bits(31);
  layers const a = related_layers(bits, 40, {5, 9, 14, 20}), b = related_layers(bits, 40, {6, 11});
  rflow::cka_table const self = cka_matrix(layer_stack(a));
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t j = 0; j < 4; ++j)
      CHECK(std::abs(self(static_cast<std::ptrdiff_t>(i), static_cast<std::ptrdiff_t>(j)) -
                     cka(a[i], a[j])) < 1e-12);
  layers c = b;
  c.push_back(3 * a[2]);  // the third column is the third row, scaled
  rflow::cka_table const cross = cka_matrix(layer_stack(a), layer_stack(c));
  for (std::ptrdiff_t i = 0; i < 4; ++i) CHECK((cross(i, 2) > 1 - 1e-12) == (i == 2));
}

TEST_CASE("mistake: one NaN discards the table") {
  for (double const poison :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    std::mt19937 bits(41);
    layers good = related_layers(bits, 30, {8, 12, 10, 6});
    layers bad = good;
    bad[2](17, 3) = poison;
    for (rflow::gram_path const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
      tested const on{.path = path};
      rflow::cka_table const expected = cka_matrix(layer_stack(good), linear{}, debiased{}, on);
      rflow::cka_table const t = cka_matrix(layer_stack(bad), linear{}, debiased{}, on);
      for (std::ptrdiff_t i = 0; i < 4; ++i)
        for (std::ptrdiff_t j = 0; j < 4; ++j) {
          if (i == 2 || j == 2) {
            CHECK(t.status(i, j) == status::non_finite);
            CHECK(std::isnan(t(i, j).value));
            CHECK(t.chance(i, j).why == status::non_finite);
          } else {
            CHECK(same_bits(t(i, j).value, expected(i, j).value));
          }
        }
      if (path == rflow::gram_path::gram) {
        CHECK(t.top_token_share(2).why == status::non_finite);
        CHECK(t.top_token_share(1).ok());
      }
    }
  }
}

TEST_CASE("mistake: a debiased numerator over a biased denominator") {
  fixture const f;
  double const mixed = 0.4645521269187;
  CHECK(std::abs(cka(f.x, f.y) - mixed) > 0.04);
  layers const both = f.stack();
  rflow::gram_moments const m = tested{}.gram(linear{}, layer_stack(both));
  double const same_mistake = debiased::hsic(m, 0, 1) / (100 * 97) * (99 * 99) /
                              std::sqrt(biased::hsic(m, 0, 0) * biased::hsic(m, 1, 1));
  CHECK(std::abs(same_mistake - mixed) < 1e-10);  // the parts are right, so is the mistake
}

TEST_CASE("mistake: the diagonal is subtracted from every row") {
  std::mt19937 bits(43);
  MatrixXd x = normal_matrix(bits, 25, 6), y = x + normal_matrix(bits, 25, 6);
  for (Eigen::Index i = 0; i < 25; ++i) x.row(i) *= 1 + 0.3 * static_cast<double>(i);
  reference::matrix k = gram_of(x), l = gram_of(y);
  for (reference::matrix* m : {&k, &l}) {
    std::vector<double> diagonal;
    for (std::size_t i = 0; i < 25; ++i) diagonal.push_back((*m)[i][i]);
    for (auto& row : *m)
      for (std::size_t j = 0; j < 25; ++j) row[j] -= diagonal[j];
  }
  CHECK(std::abs(cka(x, y) - brute_debiased(x, y)) < 1e-12);
  CHECK(std::abs(cka(x, y) - reference::cka(k, l, reference::hsic_debiased)) > 1e-3);
}

TEST_CASE("mistake: divided by the number of layers instead of batches") {
  fixture const f;
  layers const two = f.stack(), five{f.x, f.y, f.x, f.y, f.x};
  for (auto const weight :
       {rflow::batch_weight::pairs, rflow::batch_weight::equal, rflow::batch_weight::rows})
    CHECK(std::abs(minibatches(two, {40, 40, 20}, linear{}, weight)(0, 1) -
                   minibatches(five, {40, 40, 20}, linear{}, weight)(2, 3)) < 1e-12);
}

TEST_CASE("mistake: a square root is missing") {
  fixture const f;
  CHECK(cka(f.x, MatrixXd(7 * f.x)) == Approx(1).epsilon(1e-12));
  CHECK(cka(f.x, MatrixXd(7 * f.y)) == Approx(cka(f.x, f.y)).epsilon(1e-12));
  CHECK(cka(f.x, MatrixXd(7 * f.x), linear{}, biased{}) == Approx(1).epsilon(1e-12));
}

TEST_CASE("mistake: a small number is added to the denominator") {
  fixture const f;
  double const small = 1e-5;
  MatrixXd const x = small * f.x, y = small * f.y;
  CHECK(std::abs(cka(x, x) - 1) < 1e-12);
  CHECK(std::abs(cka(x, MatrixXd(2 * x)) - 1) < 1e-12);
  CHECK(std::abs(cka(x, y) - 0.5134564895055259) < 1e-12);
  CHECK(std::abs(cka(x, y, linear{}, biased{}) - 0.5576132566117589) < 1e-12);
}

TEST_CASE("mistake: negative values are clamped") {
  int negative = 0;
  for (unsigned seed = 1; seed <= 20; ++seed) {
    std::mt19937 bits(seed);
    MatrixXd const x = normal_matrix(bits, 12, 20), y = normal_matrix(bits, 12, 20);
    double const value = cka(x, y);
    CHECK(std::abs(value - brute_debiased(x, y)) < 1e-12);
    negative += value < -1e-3;
  }
  CHECK(negative >= 4);
}

TEST_CASE("mistake: the estimator is ignored") {
  fixture const f;
  CHECK(cka(f.x, f.y, linear{}, biased{}) - cka(f.x, f.y, linear{}, debiased{}) > 0.04);
  layers const both = f.stack();
  CHECK(cka_matrix(layer_stack(both), linear{}, biased{})(0, 1) -
            cka_matrix(layer_stack(both))(0, 1) >
        0.04);
}

TEST_CASE_TEMPLATE("mistake: Gram matrices in half precision", T, rflow::f16, rflow::bf16) {
  // Sums far above 256, where bf16 loses units, and a Gram beyond the largest binary16.
  std::mt19937 bits(47);
  reference::stack x = reference::random_stack(bits, 2, 60, 3000);
  for (auto& site : x)
    for (auto& row : site)
      for (double& v : row) v = std::clamp(4 * v, -200.0, 200.0);
  std::vector<T> const values = reference::pack<T>(x);
  auto const stack = reference::stack_of(values, x);
  MatrixXd const a = to_eigen(x[0]), b = to_eigen(x[1]);
  CHECK(std::abs(cka(stack[0], stack[1]) - brute_debiased(a, b)) < 1e-5);
  CHECK(std::abs(cka(stack[0], stack[1], linear{}, biased{}) - brute_biased(a, b)) < 1e-5);
}

TEST_CASE("mistake: fewer tokens than features are refused") {
  std::mt19937 bits(53);
  MatrixXd const x = normal_matrix(bits, 10, 300), y = x + 0.5 * normal_matrix(bits, 10, 300);
  CHECK(cka(x, y).ok());
  CHECK(std::abs(cka(x, y) - brute_debiased(x, y)) < 1e-12);
}

TEST_CASE("mistake: too few tokens switch silently to the biased estimator") {
  std::mt19937 bits(59);
  for (Eigen::Index n = 1; n <= 4; ++n) {
    layers const x = related_layers(bits, n, {6, 7});
    rflow::measured const d = cka(x[0], x[1]), b = cka(x[0], x[1], linear{}, biased{});
    CHECK(d.ok() == (n >= 4));
    CHECK(b.ok() == (n >= 2));
    if (!d.ok()) CHECK(d.why == status::too_few_rows);
    if (!b.ok()) CHECK(b.why == status::too_few_rows);
  }
}

// ---- cancellation -------------------------------------------------------------------------------

TEST_CASE("self terms keep their digits far from the origin") {
  for (float const offset : {0.0f, 1.0f, 3.0f, 10.0f, 30.0f, 300.0f})
    for (unsigned seed = 1; seed <= 5; ++seed) {
      CAPTURE(offset);
      CAPTURE(seed);
      std::mt19937 bits(seed);
      std::vector<MatrixXf> x;
      for (int l = 0; l < 2; ++l)
        x.push_back((normal_matrix(bits, 32, 1024).array() + static_cast<double>(offset))
                        .matrix()
                        .cast<float>());
      rflow::gram_moments const m = tested{}.gram(linear{}, layer_stack(x));
      for (std::ptrdiff_t p = 0; p < 2; ++p) {
        reference::matrix const k = gram_of(x[static_cast<std::size_t>(p)]);
        double const self = debiased::hsic(m, p, p), expected = reference::hsic_debiased(k, k);
        CHECK(self > 0);
        CHECK(std::abs(self / expected - 1) < 1e-5);
      }
      CHECK(std::abs(cka(x[0], x[1]) - brute_debiased(x[0], x[1])) < 1e-5);
    }
}

TEST_CASE("one feature with a massive activation does not take the digits of the rest") {
  for (unsigned seed = 1; seed <= 5; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::vector<MatrixXf> x;
    for (int l = 0; l < 2; ++l) {
      x.push_back(normal_matrix(bits, 32, 1024).cast<float>());
      x.back().col(77).array() += 300;
    }
    rflow::gram_moments const m = tested{}.gram(linear{}, layer_stack(x));
    reference::matrix const k = gram_of(x[0]);
    double const self = debiased::hsic(m, 0, 0);
    CHECK(self > 0);
    CHECK(std::abs(self / reference::hsic_debiased(k, k) - 1) < 1e-5);
    CHECK(std::abs(cka(x[0], x[1]) - brute_debiased(x[0], x[1])) < 1e-5);
  }
}

// ---- properties ---------------------------------------------------------------------------------

TEST_CASE("CKA sees neither rotation, scale, origin nor the order of tokens") {
  for (unsigned seed = 1; seed <= 16; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    auto const n = static_cast<Eigen::Index>(5 + bits() % 60);
    auto const p = static_cast<Eigen::Index>(1 + bits() % 40);
    auto const q = static_cast<Eigen::Index>(2 + bits() % 40);
    CAPTURE(n);
    CAPTURE(p);
    CAPTURE(q);
    layers const s = related_layers(bits, n, {p, q});
    MatrixXd const &x = s[0], &y = s[1];
    double const d = cka(x, y), b = cka(x, y, linear{}, biased{});
    auto const same = [&](MatrixXd const& u, MatrixXd const& v) {
      CHECK(std::abs(cka(u, v) - d) < 1e-11);
      CHECK(std::abs(cka(u, v, linear{}, biased{}) - b) < 1e-11);
    };
    CHECK(b >= 0);
    CHECK(b <= 1 + 1e-12);
    CHECK(std::abs(d) <= 1 + 1e-12);
    same(y, x);
    CHECK(std::abs(cka(x, x) - 1) < 1e-12);
    MatrixXd const rotation =
        Eigen::HouseholderQR<MatrixXd>(normal_matrix(bits, q, q)).householderQ();
    same(x, y * rotation);
    CHECK(std::abs(cka(y, MatrixXd(y * rotation)) - 1) < 1e-11);
    for (double const scale : {1e-6, 1e-3, -1.0, 1e3, 1e6}) same(scale * x, y / scale);
    same(x.rowwise() + normal_matrix(bits, 1, p).row(0), y);
    same((x.array() + 100).matrix(), (y.array() - 30).matrix());
    Eigen::PermutationMatrix<Eigen::Dynamic> order(n);
    order.setIdentity();
    std::shuffle(order.indices().data(), order.indices().data() + n, bits);
    same(order * x, order * y);
    MatrixXd padded = MatrixXd::Zero(n, p + 9);
    padded.middleCols(4, p) = x;
    same(padded, y);
    same(x.replicate(1, 3), y.replicate(1, 2));
  }
}

TEST_CASE("a map that is invertible but no rotation changes CKA") {
  std::mt19937 bits(61);
  layers const s = related_layers(bits, 50, {10, 10});
  Eigen::VectorXd const stretch = Eigen::VectorXd::LinSpaced(10, 0.1, 5);
  CHECK(std::abs(cka(MatrixXd(s[0] * stretch.asDiagonal()), s[1]) - cka(s[0], s[1])) > 1e-3);
  CHECK(cka(MatrixXd(s[0] * stretch.asDiagonal()), s[0]) < 0.99);
}

TEST_CASE("chance is the mean over pairings of tokens") {
  std::mt19937 bits(67);
  std::size_t const n = 24;
  layers const x = related_layers(bits, static_cast<Eigen::Index>(n), {30, 17});
  reference::matrix const k = reference::centred(gram_of(x[0])),
                          l = reference::centred(gram_of(x[1]));
  // The debiased estimator on U-centred matrices is their inner product.
  auto const u_centred = [&](reference::matrix m) {
    double total = 0;
    std::vector<double> rows(n);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j) {
        if (i == j) m[i][i] = 0;
        rows[i] += m[i][j];
        total += m[i][j];
      }
    auto const c = static_cast<double>(n);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j)
        if (i != j) m[i][j] += total / ((c - 1) * (c - 2)) - (rows[i] + rows[j]) / (c - 2);
    return m;
  };
  reference::matrix const ku = u_centred(k), lu = u_centred(l);
  auto const check = [&](reference::matrix const& a, reference::matrix const& b, double chance) {
    int const count = 20'000;
    double const norms = std::sqrt(reference::inner(a, a) * reference::inner(b, b));
    std::vector<std::size_t> order(n);
    std::iota(order.begin(), order.end(), std::size_t{0});
    rflow::running_stat values;
    for (int trial = 0; trial < count; ++trial) {
      std::shuffle(order.begin(), order.end(), bits);
      double sum = 0;
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j) sum += a[i][j] * b[order[i]][order[j]];
      values.add(sum / norms);
    }
    double const standard_error = values.stddev() / std::sqrt(static_cast<double>(count));
    CHECK(std::abs(values.mean - chance) < 5 * standard_error);
  };
  rflow::cka_table const biased_table = cka_matrix(layer_stack(x), linear{}, biased{});
  rflow::cka_table const debiased_table = cka_matrix(layer_stack(x));
  CHECK(biased_table(0, 1) == Approx(reference::inner(k, l) /
                                     std::sqrt(reference::inner(k, k) * reference::inner(l, l))));
  CHECK(debiased_table(0, 1) ==
        Approx(reference::inner(ku, lu) /
               std::sqrt(reference::inner(ku, ku) * reference::inner(lu, lu))));
  check(k, l, biased_table.chance(0, 1));
  check(ku, lu, debiased_table.chance(0, 1));
}

TEST_CASE("chance for isotropic data: near 1 when features outnumber tokens") {
  std::mt19937 bits(71);
  layers const x{normal_matrix(bits, 64, 512), normal_matrix(bits, 64, 512)};
  rflow::cka_table const t = cka_matrix(layer_stack(x), linear{}, biased{});
  CHECK(t(0, 1) == Approx(t.chance(0, 1)).epsilon(0.01));
  CHECK(t.chance(0, 1) == Approx(512.0 / (64 + 512)).epsilon(0.02));
  CHECK(std::abs(cka(x[0], x[1])) < 0.1);
}

TEST_CASE("one outlier token: the biased estimator sees nothing else") {
  std::mt19937 bits(73);
  std::vector<MatrixXf> x{normal_matrix(bits, 256, 512).cast<float>(),
                          normal_matrix(bits, 256, 512).cast<float>()};
  rflow::cka_table const before = cka_matrix(layer_stack(x));
  CHECK(before.top_token_share(0) < 0.05);
  for (MatrixXf& m : x) m.row(101) *= 30;
  rflow::cka_table const b = cka_matrix(layer_stack(x), linear{}, biased{});
  rflow::cka_table const d = cka_matrix(layer_stack(x));
  CHECK(b(0, 1) > 0.99);
  CHECK(std::abs(d(0, 1)) < 0.1);
  for (std::ptrdiff_t p = 0; p < 2; ++p) {
    CHECK(d.top_token(p) == 101);
    CHECK(d.top_token_share(p) > 0.5);
    CHECK(d.top_token_share(p) <= 1);
    CHECK(same_bits(d.top_token_share(p).value, b.top_token_share(p).value));
  }
}

TEST_CASE("both ways to the Gram moments agree") {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    layers const x = related_layers(bits, static_cast<Eigen::Index>(4 + bits() % 300), {3, 17, 40});
    tested const tiles{.path = rflow::gram_path::gram}, features{.path = rflow::gram_path::feature};
    for (bool const debias : {false, true}) {
      auto const table = [&](tested const& on) {
        return debias ? cka_matrix(layer_stack(x), linear{}, debiased{}, on)
                      : cka_matrix(layer_stack(x), linear{}, biased{}, on);
      };
      rflow::cka_table const a = table(tiles), b = table(features), any = table(tested{});
      for (std::ptrdiff_t i = 0; i < 3; ++i)
        for (std::ptrdiff_t j = 0; j < 3; ++j) {
          CHECK(std::abs(a(i, j) - b(i, j)) < 1e-11);
          CHECK(std::abs(a.chance(i, j) - b.chance(i, j)) < 1e-11);
          CHECK(std::abs(any(i, j) - b(i, j)) < 1e-11);
        }
    }
  }
}

TEST_CASE_TEMPLATE("the same bits for any number of threads", T, float, double, rflow::bf16) {
  std::mt19937 bits(79);
  reference::stack x = reference::random_stack(bits, 3, 517, 70);
  std::vector<T> const values = reference::pack<T>(x);
  auto const stack = reference::stack_of(values, x);
  for (rflow::gram_path const path : {rflow::gram_path::gram, rflow::gram_path::feature})
    for (std::size_t const bound : {10 * smallest_bound, std::size_t{256} << 20}) {
      auto const run = [&](int threads) {
        return cka_matrix(stack, linear{}, biased{},
                          tested{.threads = threads, .memory_bound = bound, .path = path});
      };
      rflow::cka_table const one = run(1);
      for (int const threads : {2, 3, 7, 16}) CHECK(same_bits(one, run(threads)));
    }
}

TEST_CASE("a memory bound changes tiles, not results; one that holds no tile is refused") {
  std::mt19937 bits(83);
  layers const x = related_layers(bits, 700, {30, 20});
  tested const roomy{.path = rflow::gram_path::gram};
  rflow::cka_table const whole = cka_matrix(layer_stack(x), linear{}, debiased{}, roomy);
  for (std::size_t const bound : {smallest_bound, 5 * smallest_bound}) {
    tested const tight{.memory_bound = bound, .path = rflow::gram_path::gram};
    CHECK(std::abs(cka_matrix(layer_stack(x), linear{}, debiased{}, tight)(0, 1) - whole(0, 1)) <
          1e-12);
  }
  tested const none{.memory_bound = 100, .path = rflow::gram_path::gram};
  CHECK_THROWS_AS(cka_matrix(layer_stack(x), linear{}, debiased{}, none), std::invalid_argument);
}

TEST_CASE("one precision against the other") {
  for (unsigned seed = 1; seed <= 8; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    layers const s = related_layers(bits, 100, {33, 64});
    MatrixXf const x = s[0].cast<float>(), y = s[1].cast<float>();
    MatrixXd const xd = x.cast<double>(), yd = y.cast<double>();
    CHECK(std::abs(cka(x, y) - cka(xd, yd)) < 1e-6);
    CHECK(std::abs(cka(x, yd) - cka(xd, yd)) < 1e-12);  // mixed: in double
  }
}

TEST_CASE_TEMPLATE("layouts and strides", T, float, double, rflow::f16, rflow::bf16) {
  std::mt19937 bits(89);
  std::ptrdiff_t const s = 3, n = 29, d = 37;
  reference::stack x = reference::random_stack(bits, 3, 29, 37);
  std::vector<T> const dense = reference::pack<T>(x);
  rflow::cka_table const expected = cka_matrix(reference::stack_of(dense, x));
  auto const same = [&](layer_stack<T> const& stack) {
    rflow::cka_table const t = cka_matrix(stack);
    for (std::ptrdiff_t i = 0; i < s; ++i)
      for (std::ptrdiff_t j = 0; j < s; ++j)
        CHECK(std::abs(t(i, j) - expected(i, j)) < reference::tolerance<T>);
  };
  using rflow::axes;
  struct layout {
    axes order;
    rflow::stack_strides strides;
  };
  for (layout const& l : {layout{axes::sites_hidden_tokens, {n * d, 1, n}},
                          layout{axes::tokens_sites_hidden, {d, s * d, 1}},
                          layout{axes::tokens_hidden_sites, {1, s * d, s}},
                          layout{axes::hidden_sites_tokens, {n, 1, s * n}},
                          layout{axes::hidden_tokens_sites, {1, s, s * n}}}) {
    std::vector<T> other(dense.size());
    for (std::ptrdiff_t a = 0; a < s; ++a)
      for (std::ptrdiff_t b = 0; b < n; ++b)
        for (std::ptrdiff_t c = 0; c < d; ++c)
          other[static_cast<std::size_t>(a * l.strides.site + b * l.strides.token +
                                         c * l.strides.hidden)] =
              dense[static_cast<std::size_t>((a * n + b) * d + c)];
    same(layer_stack<T>(other.data(), {s, n, d}, l.order));
  }
  same(layer_stack<T>(dense.data() + n * d - 1, {s, n, d}, {n * d, -d, -1}));
  // Tokens backwards in all sites: a joint permutation.
  same(layer_stack<T>(dense.data() + (n - 1) * d, {s, n, d}, {n * d, -d, 1}));
  // Stride 0: every token is the same, so there is nothing to align.
  layer_stack<T> const constant(dense.data(), {s, n, d}, {n * d, 0, 1});
  CHECK(cka_matrix(constant).status(0, 1) == status::constant_layer);
  // Every feature is the same: one feature, scaled.
  view<T> const one(dense.data(), n, 1, d), many(dense.data(), n, 9, d, 0);
  CHECK(std::abs(cka(one, many) - 1) < reference::tolerance<T>);
}

TEST_CASE("masked tokens might as well not be there") {
  for (unsigned seed = 1; seed <= 8; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    layers const x = related_layers(bits, 60, {20, 31, 9});
    std::vector<int> mask(60), kept;
    for (int i = 0; i < 60; ++i) {
      mask[static_cast<std::size_t>(i)] = bits() % 3 != 0;
      if (mask[static_cast<std::size_t>(i)] != 0) kept.push_back(i);
    }
    layers gathered, poisoned = x;
    for (MatrixXd const& m : x) gathered.push_back(m(kept, Eigen::all));
    // What is left out may hold anything.
    for (MatrixXd& m : poisoned)
      for (Eigen::Index i = 0; i < 60; ++i)
        if (mask[static_cast<std::size_t>(i)] == 0)
          m.row(i).setConstant(std::numeric_limits<double>::quiet_NaN());
    rflow::cka_table const expected = cka_matrix(layer_stack(gathered));
    rflow::cka_table const t = cka_matrix(layer_stack(poisoned).tokens(mask));
    CHECK(t.tokens() == static_cast<std::ptrdiff_t>(kept.size()));
    for (std::ptrdiff_t i = 0; i < 3; ++i)
      for (std::ptrdiff_t j = 0; j < 3; ++j) CHECK(std::abs(t(i, j) - expected(i, j)) < 1e-13);
  }
}

TEST_CASE("one batch is full CKA, and batches add in any order") {
  fixture const f;
  CHECK(minibatches(f.stack(), {100})(0, 1) == Approx(0.5134564895055259).epsilon(1e-12));
  for (auto const weight :
       {rflow::batch_weight::pairs, rflow::batch_weight::equal, rflow::batch_weight::rows}) {
    layers const first = rows_between(f.stack(), 0, 30), rest = rows_between(f.stack(), 30, 70);
    rflow::cka_accumulator<> a({}, weight), b({}, weight), both({}, weight), none({}, weight);
    a.add(layer_stack(first), tested{});
    b.add(layer_stack(rest), tested{});
    both.add(layer_stack(first), tested{});
    both.add(layer_stack(rest), tested{});
    rflow::cka_accumulator<> ab = a, ba = b;
    ab.merge(b);
    ba.merge(a);
    CHECK(same_bits(ab(0, 1).value, ba(0, 1).value));
    CHECK(same_bits(ab(0, 1).value, both(0, 1).value));
    CHECK(ab.tokens() == 100);
    CHECK(ab.batches() == 2);
    ab.merge(none);
    CHECK(same_bits(ab(0, 1).value, both(0, 1).value));
    none.merge(ba);
    CHECK(same_bits(none(0, 1).value, both(0, 1).value));
    CHECK(none.sites() == 2);
    CHECK(same_bits(none(0, 1).value, none(1, 0).value));
    CHECK(none(1, 1) == 1.0);
  }
}

TEST_CASE("batches of fewer than four tokens are left out and counted") {
  fixture const f;
  rflow::cka_accumulator<> const a = minibatches(f.stack(), {48, 3, 46, 2, 1});
  CHECK(a.left_out() == 3);
  CHECK(a.batches() == 2);
  CHECK(a.tokens() == 94);
  rflow::cka_accumulator<> b = minibatches(f.stack(), {3, 3});
  CHECK(b(0, 1).why == status::too_few_rows);
  CHECK(b.left_out() == 2);
  CHECK(rflow::cka_accumulator<>()(0, 1).why == status::too_few_rows);
  b.merge(a);
  CHECK(b.left_out() == 5);
  CHECK(same_bits(b(0, 1).value, a(0, 1).value));
}

TEST_CASE("accumulators that do not belong together") {
  fixture const f;
  layers const two = f.stack(), three{f.x, f.y, f.x};
  rflow::cka_accumulator<> a, b, c({}, rflow::batch_weight::equal);
  a.add(layer_stack(two), tested{});
  CHECK_THROWS_WITH_AS(a.add(layer_stack(three), tested{}),
                       "rflow::cka_accumulator: this batch has 3 sites, earlier ones had 2",
                       std::invalid_argument);
  b.add(layer_stack(three), tested{});
  CHECK_THROWS_AS(a.merge(b), std::invalid_argument);
  c.add(layer_stack(two), tested{});
  CHECK_THROWS_WITH_AS(a.merge(c),
                       "rflow::minibatch_moments::merge: batches are weighted differently",
                       std::invalid_argument);
  // A refused batch leaves no trace.
  CHECK(a.batches() == 1);
  CHECK(a(0, 1) == Approx(0.5134564895055259).epsilon(1e-12));
}

TEST_CASE("a batch with a NaN spoils its site, and no other") {
  fixture const f;
  layers x{f.x, f.y, MatrixXd(f.x + f.y)};
  double const expected = minibatches(x, {50, 50})(0, 2);
  x[1](60, 2) = std::numeric_limits<double>::quiet_NaN();
  rflow::cka_accumulator<> const a = minibatches(x, {50, 50});
  CHECK(a(0, 1).why == status::non_finite);
  CHECK(a(1, 1).why == status::non_finite);
  CHECK(a(0, 2) == Approx(expected).epsilon(1e-13));
}

TEST_CASE("a site that is constant in one batch only still counts") {
  fixture const f;
  layers x = f.stack();
  x[1].topRows(50).setConstant(3);
  layers const last = rows_between(x, 50, 50);
  rflow::cka_accumulator<> const a = minibatches(x, {50, 50});
  // The constant batch adds nothing to the cross term and to its own self term.
  layers const first = rows_between(x, 0, 50);
  reference::matrix const k1 = gram_of(first[0]), k2 = gram_of(last[0]), l2 = gram_of(last[1]);
  double const self = reference::hsic_debiased(k1, k1) + reference::hsic_debiased(k2, k2);
  CHECK(a(0, 1) == Approx(reference::hsic_debiased(k2, l2) /
                          std::sqrt(self * reference::hsic_debiased(l2, l2)))
                       .epsilon(1e-11));
  x[1].setConstant(3);
  CHECK(minibatches(x, {50, 50})(0, 1).why == status::constant_layer);
}

// ---- statuses and errors ------------------------------------------------------------------------

TEST_CASE_TEMPLATE("a layer whose tokens are all the same has a status, and the rest its values", T,
                   float, double) {
  // 0.1 is no binary fraction, and its mean over 50 rounds.
  for (double const value : {0.0, 1.0, 0.1, 1e6 / 3, 1e-20}) {
    CAPTURE(value);
    std::mt19937 bits(97);
    reference::stack x = reference::random_stack(bits, 4, 50, 33);
    for (auto& row : x[2]) row.assign(33, value);
    for (std::size_t i = 0; i < 50; ++i) x[2][i][5] = 3 * value;
    std::vector<T> const values = reference::pack<T>(x);
    auto const stack = reference::stack_of(values, x);
    for (rflow::gram_path const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
      tested const on{.path = path};
      rflow::cka_table const d = cka_matrix(stack, linear{}, debiased{}, on);
      rflow::cka_table const b = cka_matrix(stack, linear{}, biased{}, on);
      for (std::ptrdiff_t i = 0; i < 4; ++i)
        for (std::ptrdiff_t j = 0; j < 4; ++j) {
          status const expected = i == 2 || j == 2 ? status::constant_layer : status::ok;
          CHECK(d.status(i, j) == expected);
          CHECK(b.status(i, j) == expected);
          if (expected == status::ok)
            CHECK(std::abs(d(i, j) - brute_debiased(to_eigen(x[static_cast<std::size_t>(i)]),
                                                    to_eigen(x[static_cast<std::size_t>(j)]))) <
                  reference::tolerance<T>);
        }
    }
    CHECK(cka(stack[0], stack[2]).why == status::constant_layer);
  }
}

TEST_CASE("a layer that moves little about a large mean is not constant") {
  std::mt19937 bits(101);
  MatrixXd const x = normal_matrix(bits, 30, 40), y = x + normal_matrix(bits, 30, 40);
  MatrixXd const far = (1e6 + x.array()).matrix();
  CHECK(cka(far, y).ok());
  CHECK(cka(far, y) == Approx(cka(x, y)).epsilon(1e-6));
  // Rank one, in a single token: small, but there.
  MatrixXd spike = MatrixXd::Zero(30, 40);
  spike(3, 4) = 1e-9;
  CHECK(cka(spike, y, linear{}, biased{}).ok());
}

TEST_CASE("too few tokens") {
  std::mt19937 bits(103);
  for (Eigen::Index const n : {2, 3}) {
    layers const x = related_layers(bits, n, {6, 7});
    rflow::cka_table const d = cka_matrix(layer_stack(x));
    CHECK(d.status(0, 1) == status::too_few_rows);
    CHECK(d.status(0, 0) == status::too_few_rows);
    CHECK(d.chance(0, 1).why == status::too_few_rows);
    CHECK(cka_matrix(layer_stack(x), linear{}, biased{}).status(0, 1) == status::ok);
  }
  // Whatever the few are: one token is constant, and of bandwidth 0; NaN is still NaN.
  layers one = related_layers(bits, 1, {6, 7});
  for (auto const& table :
       {cka_matrix(layer_stack(one)), cka_matrix(layer_stack(one), linear{}, biased{}),
        cka_matrix(layer_stack(one), rflow::rbf{}),
        cka_matrix(layer_stack(one), rflow::rbf{}, biased{})}) {
    CHECK(table.status(0, 1) == status::too_few_rows);
    CHECK(table.status(1, 1) == status::too_few_rows);
    CHECK_FALSE(table.top_token_share(0).ok());
    CHECK(table.top_token(0) == -1);
  }
  one[1](0, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK(cka_matrix(layer_stack(one)).status(0, 0) == status::too_few_rows);
  CHECK(cka_matrix(layer_stack(one)).status(1, 1) == status::non_finite);
  layers const constant(2, MatrixXd::Ones(3, 4));
  CHECK(cka_matrix(layer_stack(constant)).status(0, 1) == status::too_few_rows);
  CHECK(cka_matrix(layer_stack(constant), linear{}, biased{}).status(0, 1) ==
        status::constant_layer);

  layers const x = related_layers(bits, 9, {6, 7});
  auto const none = layer_stack(x).tokens(std::vector<int>(9));
  CHECK(cka_matrix(none).status(0, 1) == status::too_few_rows);
  CHECK(cka_matrix(none, linear{}, biased{}).status(0, 0) == status::too_few_rows);
}

TEST_CASE("one pair: errors name sizes and places") {
  std::mt19937 bits(107);
  MatrixXd const x = normal_matrix(bits, 10, 5), y = normal_matrix(bits, 9, 5);
  CHECK_THROWS_WITH_AS(cka(x, y), "rflow::cka: x has 10 tokens, y has 9", std::invalid_argument);
  CHECK_THROWS_WITH_AS(cka(x, MatrixXd(10, 0)),
                       "rflow::cka: activations are empty: 10 tokens x 0 features",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(cka(MatrixXd(0, 3), MatrixXd(0, 3)),
                       "rflow::cka: activations are empty: 0 tokens x 3 features",
                       std::invalid_argument);
  for (double const poison :
       {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::infinity()}) {
    MatrixXd bad = x;
    bad(7, 2) = bad(8, 0) = poison;
    CHECK_THROWS_WITH_AS(cka(x, bad), "rflow::cka: NaN or infinity in layer y, token 7, feature 2",
                         std::domain_error);
    CHECK_THROWS_WITH_AS(cka(bad, x, linear{}, biased{}),
                         "rflow::cka: NaN or infinity in layer x, token 7, feature 2",
                         std::domain_error);
  }
}

TEST_CASE("positions are those of the data, masked or not") {
  std::mt19937 bits(109);
  layers x = related_layers(bits, 12, {5, 6});
  x[1](9, 4) = std::numeric_limits<double>::infinity();
  std::vector<int> mask(12, 1);
  mask[2] = mask[3] = 0;
  for (rflow::gram_path const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
    tested const on{.path = path};
    CHECK(on.gram(linear{}, layer_stack(x)).non_finite[1].token == 9);
    rflow::position const at = on.gram(linear{}, layer_stack(x).tokens(mask)).non_finite[1];
    CHECK(at.token == 9);
    CHECK(at.feature == 4);
    mask[9] = 0;
    CHECK_FALSE(on.gram(linear{}, layer_stack(x).tokens(mask)).non_finite[1].found());
    mask[9] = 1;
  }
}

TEST_CASE("a table says where a site is not finite") {
  std::mt19937 bits(109);
  layers a = related_layers(bits, 12, {5, 6, 4}), b = related_layers(bits, 12, {3, 8});
  a[1](9, 4) = std::numeric_limits<double>::infinity();
  b[1](2, 7) = std::numeric_limits<double>::quiet_NaN();
  std::vector<int> mask(12, 1);
  mask[0] = mask[5] = 0;
  rflow::cka_table const t = cka_matrix(layer_stack(a).tokens(mask), layer_stack(b).tokens(mask));
  CHECK(t.non_finite(1).token == 9);
  CHECK(t.non_finite(1).feature == 4);
  CHECK(t.col_non_finite(1).token == 2);
  CHECK(t.col_non_finite(1).feature == 7);
  for (std::ptrdiff_t const row : {0, 2}) CHECK_FALSE(t.non_finite(row).found());
  CHECK_FALSE(t.col_non_finite(0).found());
  rflow::cka_table const self = cka_matrix(layer_stack(a));
  CHECK(self.col_non_finite(1).token == 9);
  CHECK_FALSE(self.col_non_finite(2).found());
}

TEST_CASE("values near the ends of their type") {
  std::mt19937 bits(113);
  layers const s = related_layers(bits, 40, {16, 24});
  double const expected = cka(s[0], s[1]);
  for (float const scale : {1e-35f, 1e-20f, 1e15f, 1e30f, 1e36f}) {
    CAPTURE(scale);
    MatrixXf const x = scale * s[0].cast<float>(), y = s[1].cast<float>();
    CHECK(std::abs(cka(x, y) - expected) < 1e-5);
    CHECK(std::abs(cka(x, x) - 1) < 1e-6);
  }
  for (double const scale : {1e-70, 1e-40, 1e40, 1e70}) {
    CAPTURE(scale);
    CHECK(std::abs(cka(MatrixXd(scale * s[0]), s[1]) - expected) < 1e-12);
  }
}

TEST_CASE("sums of fourth powers of the data stay in range") {
  std::mt19937 bits(113);
  layers const s = related_layers(bits, 40, {16, 24});
  double const expected = cka(s[0], s[1]);
  for (double const scale : {1e-150, 1e-100, 1e100, 1e150}) {
    CAPTURE(scale);
    CHECK(std::abs(cka(MatrixXd(scale * s[0]), s[1]) - expected) < 1e-12);
  }
}

TEST_CASE("the largest doubles, and minibatches of them") {
  std::mt19937 bits(113);
  layers const s = related_layers(bits, 40, {16, 24});
  double const expected = cka(s[0], s[1]), batches = minibatches(s, {20, 20})(0, 1);
  for (double const scale : {1e-300, 1e-150, 1e150, 1e250, 1e306}) {
    CAPTURE(scale);
    MatrixXd const x = scale * s[0];
    for (rflow::gram_path const path : {rflow::gram_path::gram, rflow::gram_path::feature})
      CHECK(std::abs(cka(x, s[1], linear{}, debiased{}, tested{.path = path}) - expected) < 1e-12);
    CHECK(std::abs(minibatches({x, s[1]}, {20, 20})(0, 1) - batches) < 1e-12);
    CHECK(std::abs(minibatches({x, x}, {20, 20})(0, 1) - 1) < 1e-12);
    // Batches of very different size: the larger one decides.
    layers uneven{s[0], s[1]};
    for (MatrixXd& m : uneven) m.topRows(20) *= scale;
    layers const larger = rows_between(s, scale < 1 ? 20 : 0, 20);
    double const alone = cka(larger[0], larger[1]);
    CHECK(std::abs(minibatches(uneven, {20, 20})(0, 1) - alone) < 1e-12);
    rflow::cka_accumulator<> first = minibatches(rows_between(uneven, 0, 20), {20});
    first.merge(minibatches(rows_between(uneven, 20, 20), {20}));
    CHECK(std::abs(first(0, 1) - alone) < 1e-12);
  }
}

TEST_CASE("far from the origin, both ways to the Gram moments keep the same digits") {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    layers s = related_layers(bits, 12 + 40 * seed, {5, 7});
    for (MatrixXd& x : s) x = (1e8 + x.array()).matrix();
    tested const tiles{.path = rflow::gram_path::gram}, features{.path = rflow::gram_path::feature};
    rflow::gram_moments const a = tiles.gram(linear{}, layer_stack(s)),
                              b = features.gram(linear{}, layer_stack(s));
    for (std::ptrdiff_t p = 0; p < 2; ++p)
      for (std::ptrdiff_t q = 0; q < 2; ++q) {
        double const scale = std::sqrt(biased::hsic(a, p, p) * biased::hsic(a, q, q));
        CHECK(std::abs(biased::hsic(a, p, q) - biased::hsic(b, p, q)) < 1e-13 * scale);
        CHECK(std::abs(debiased::hsic(a, p, q) - debiased::hsic(b, p, q)) < 1e-13 * scale);
      }
  }
}

// ---- significance -------------------------------------------------------------------------------

namespace {

/// U(K).
MatrixXd u_centred_kernel(MatrixXd u) {
  u.diagonal().setZero();
  double const n = static_cast<double>(u.rows());
  Eigen::VectorXd const rows = u.rowwise().sum() / (n - 2);
  double const offset = u.sum() / (n - 1) / (n - 2);
  u = (u.colwise() - rows).rowwise() - rows.transpose();
  u.array() += offset;
  u.diagonal().setZero();
  return u;
}

/// U(K) of the linear kernel.
MatrixXd u_centred(MatrixXd x) {
  x.rowwise() -= x.colwise().mean().eval();
  return u_centred_kernel(x * x.transpose());
}

/// U(K) of the RBF kernel.
MatrixXd u_centred(MatrixXd const& x, double sigma) {
  MatrixXd k(x.rows(), x.rows());
  for (Eigen::Index i = 0; i < x.rows(); ++i)
    for (Eigen::Index j = 0; j < x.rows(); ++j)
      k(i, j) = std::exp(-(x.row(i) - x.row(j)).squaredNorm() / (2 * sigma * sigma));
  return u_centred_kernel(k);
}

/// Layers with a common part; token 1 of the one and token 2 of the other, or the same token of both,
/// `times` as large.
layers with_massive_token(unsigned seed, Eigen::Index n, double common, double times, bool same) {
  std::mt19937 bits(seed);
  MatrixXd const shared = normal_matrix(bits, n, 4);
  MatrixXd x = normal_matrix(bits, n, 4) + common * shared;
  MatrixXd y = normal_matrix(bits, n, 5);
  y.leftCols(4) += common * shared;
  x.row(1) *= times;
  y.row(same ? 1 : 2) *= times;
  return {x, y};
}

/// ⟨U, P V Pᵀ⟩ / (‖U‖ ‖V‖).
double paired(MatrixXd const& u, MatrixXd const& v, std::vector<int> const& order) {
  double sum = 0;
  for (Eigen::Index i = 0; i < u.rows(); ++i)
    for (Eigen::Index j = 0; j < i; ++j)
      sum +=
          2 * u(i, j) * v(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(j)]);
  return sum / u.norm() / v.norm();
}

double skewness_by_formula(MatrixXd const& u, MatrixXd const& v) {
  auto const cubes = [](MatrixXd const& m) {
    return m.array().cube().sum() / std::pow(m.norm(), 3);
  };
  auto const triangles = [](MatrixXd const& m) {
    return (m * m * m).trace() / std::pow(m.norm(), 3);
  };
  double const n = static_cast<double>(u.rows());
  return rflow::detail::third_moment(n, cubes(u), triangles(u), cubes(v), triangles(v)) /
         std::pow(2 / (n * (n - 3)), 1.5);
}

}  // namespace

TEST_CASE("mean, variance and skewness over permutations are those of all permutations") {
  for (int const n : {4, 5, 6, 7, 8}) {
    CAPTURE(n);
    std::mt19937 bits(static_cast<unsigned>(n));
    layers const x = related_layers(bits, n, {2, 5});
    MatrixXd const u = u_centred(x[0]), v = u_centred(x[1]);
    std::vector<int> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    double count = 0, first = 0, second = 0, third = 0;
    do {
      double const value = paired(u, v, order);
      count += 1;
      first += value;
      second += value * value;
      third += value * value * value;
    } while (std::next_permutation(order.begin(), order.end()));
    CHECK(std::abs(first / count) < 1e-12);
    double const variance = 2.0 / (n * (n - 3));
    CHECK(second / count == Approx(variance).epsilon(1e-11));
    CHECK(std::abs(third / count / std::pow(variance, 1.5) - skewness_by_formula(u, v)) < 1e-10);
  }
}

TEST_CASE("p-values are those of resampling") {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    Eigen::Index const n = 25 + 5 * seed;
    // A weak relation, with a spectrum that makes the distribution skew.
    MatrixXd const common = normal_matrix(bits, n, 1);
    MatrixXd x = normal_matrix(bits, n, 4), y = normal_matrix(bits, n, 3);
    x.col(0) = 2 * x.col(0) + 0.7 * common;
    y.col(0) = 2 * y.col(0) + 0.7 * common;
    layers const both{x, y};
    rflow::cka_table const t =
        cka_matrix(layer_stack(both), linear{}, debiased{}, tested{.significance = true});
    MatrixXd const u = u_centred(x), v = u_centred(y);
    std::vector<int> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    double const observed = paired(u, v, order);
    CHECK(std::abs(t(0, 1) - observed) < 1e-10);
    CHECK(t.score(0, 1) ==
          Approx(observed / std::sqrt(2.0 / static_cast<double>(n * (n - 3)))).epsilon(1e-9));
    int const trials = 20'000;
    int no_less = 0;
    for (int trial = 0; trial < trials; ++trial) {
      std::shuffle(order.begin(), order.end(), bits);
      no_less += paired(u, v, order) >= observed;
    }
    double const p = static_cast<double>(no_less) / trials;
    CHECK(std::abs(t.p_value(0, 1) - p) < 0.015 + 0.1 * p);
    CHECK(t.p_value(0, 0) < 1e-6);
    CHECK(t.p_value(0, 1).value == t.p_value(1, 0).value);
  }
}

TEST_CASE("up to 8 tokens, p-values are those of all orders") {
  for (Eigen::Index n = 4; n <= 8; ++n)
    for (double const times : {1.0, 100.0})
      for (bool const same : {true, false})
        for (bool const by_rbf : {false, true}) {
          CAPTURE(n);
          CAPTURE(times);
          CAPTURE(by_rbf);
          layers const both =
              with_massive_token(static_cast<unsigned>(77 + n), n, 0.7, times, same);
          std::vector<MatrixXf> const narrow{both[0].cast<float>(), both[1].cast<float>()};
          // the values as floats have them, so that both types measure the same
          layers const wide{narrow[0].cast<double>(), narrow[1].cast<double>()};
          rbf const kernel{.sigma = {2.0, 2.5}};
          auto const p_of = [&](auto const& stack) {
            tested const on{.significance = true};
            return by_rbf ? cka_matrix(layer_stack(stack), kernel, debiased{}, on).p_value(0, 1)
                          : cka_matrix(layer_stack(stack), linear{}, debiased{}, on).p_value(0, 1);
          };
          MatrixXd const u = by_rbf ? u_centred(wide[0], 2.0) : u_centred(wide[0]);
          MatrixXd const v = by_rbf ? u_centred(wide[1], 2.5) : u_centred(wide[1]);
          std::vector<int> order(static_cast<std::size_t>(n));
          std::iota(order.begin(), order.end(), 0);
          double const observed = paired(u, v, order);
          double count = 0, no_less = 0, surely = 0;
          do {
            double const t = paired(u, v, order);
            count += 1;
            no_less += t >= observed - 1e-5;
            surely += t >= observed + 1e-5;
          } while (std::next_permutation(order.begin(), order.end()));
          for (double const p : {p_of(wide).value, p_of(narrow).value}) {
            CHECK(p <= no_less / count * (1 + 1e-12));
            CHECK(p >= surely / count * (1 - 1e-12));
            CHECK(p >= 1 / count);
          }
          if (n > 4 && times == 1)  // 4 tokens have ties
            CHECK(no_less - surely <= 0.01 * count + 1);
        }
}

TEST_CASE("p-values with a massive token in both layers are those of resampling") {
  // Of all orders 1 in n puts the one on the other: a lump that three moments do not show.
  for (unsigned seed = 1; seed <= 6; ++seed)
    for (bool const by_rbf : {false, true}) {
      CAPTURE(seed);
      CAPTURE(by_rbf);
      Eigen::Index const n = seed % 2 == 0 ? 60 : 90;
      layers const both = with_massive_token(seed, n, 0.1 * seed, seed < 4 ? 1000 : 12, seed != 3);
      MatrixXd const u = by_rbf ? u_centred(both[0], 3.0) : u_centred(both[0]);
      MatrixXd const v = by_rbf ? u_centred(both[1], 3.0) : u_centred(both[1]);
      std::vector<int> order(static_cast<std::size_t>(n));
      std::iota(order.begin(), order.end(), 0);
      double const observed = paired(u, v, order);
      std::mt19937 bits(seed);
      double const trials = 40'000;
      double no_less = 1;
      for (int trial = 1; trial < trials; ++trial) {
        std::shuffle(order.begin(), order.end(), bits);
        no_less += paired(u, v, order) >= observed;
      }
      double const p = no_less / trials, error = 4 * std::sqrt(no_less) / trials;
      std::vector<MatrixXf> const narrow{both[0].cast<float>(), both[1].cast<float>()};
      auto const check = [&](auto const& stack) {
        tested const on{.significance = true};
        double const found =
            by_rbf ? cka_matrix(layer_stack(stack), rbf{.sigma = {3.0, 3.0}}, debiased{}, on)
                         .p_value(0, 1)
                   : cka_matrix(layer_stack(stack), linear{}, debiased{}, on).p_value(0, 1);
        CAPTURE(p);
        CHECK(found > 0);
        CHECK(found < 2 * (p + error));
        if (no_less > 20) CHECK(found > (p - error) / 2);
      };
      check(both);
      check(narrow);
    }
}

TEST_CASE("shifted products are CKA with the tokens of one side shifted") {
  for (Eigen::Index const n : {4, 5, 13, 64, 90}) {
    CAPTURE(n);
    std::mt19937 bits(static_cast<unsigned>(n));
    layers const x = related_layers(bits, n, {3, 7, 2});
    rflow::gram_moments const m = tested{.shifts = true}.gram(linear{}, layer_stack(x));
    REQUIRE(m.shifts.size() == static_cast<std::size_t>(9 * n));
    for (std::ptrdiff_t p = 0; p < 3; ++p)
      for (std::ptrdiff_t q = 0; q < 3; ++q)
        for (Eigen::Index s = 0; s < n; s += 1 + n / 7) {
          MatrixXd const& y = x[static_cast<std::size_t>(q)];
          MatrixXd shifted(n, y.cols());
          for (Eigen::Index i = 0; i < n; ++i) shifted.row(i) = y.row((i + s) % n);
          double const expected = cka(x[static_cast<std::size_t>(p)], shifted);
          CHECK(std::abs(m.shifts[static_cast<std::size_t>((3 * p + q) * n + s)] - expected) <
                1e-6);
        }
  }
  std::mt19937 bits(4);
  layers const x = related_layers(bits, 40, {3, 7});
  tested const on{.shifts = true};
  rflow::cka_table const t = cka_matrix(layer_stack(x), rbf{}, debiased{}, on);
  CHECK(t.shift_p_value(0, 0) == 1 / 40.0);
  CHECK(t.shift_p_value(0, 1).value == t.shift_p_value(1, 0).value);
  CHECK(t.p_value(0, 1).ok());
  CHECK(cka_matrix(layer_stack(x)).shift_p_value(0, 1).why == status::not_requested);
  CHECK_THROWS_AS(cka_matrix(layer_stack(x), linear{}, debiased{},
                             tested{.memory_bound = 40'000, .shifts = true}),
                  std::invalid_argument);
}

TEST_CASE("p-values over shifts hold their level for dependent tokens, or are not given") {
  // Unrelated chains of lag-1 correlation φ: at most 8 in 100 and at least 3 below 0.05, within the
  // error of so many trials; at 0.97 few values are given at all.
  Eigen::Index const n = 200;
  for (double const phi : {0.0, 0.5, 0.97}) {
    CAPTURE(phi);
    unsigned const seed = 8;
    std::mt19937 bits(seed);
    int given = 0, below = 0, naive = 0;
    int const trials = 250;
    for (int t = 0; t < trials; ++t) {
      layers x{normal_matrix(bits, n, 6), normal_matrix(bits, n, 6)};
      for (MatrixXd& layer : x)
        for (Eigen::Index i = 1; i < n; ++i)
          layer.row(i) = phi * layer.row(i - 1) + std::sqrt(1 - phi * phi) * layer.row(i);
      rflow::cka_table const table =
          cka_matrix(layer_stack(x), linear{}, debiased{}, tested{.threads = 1, .shifts = true});
      measured const p = table.shift_p_value(0, 1);
      CHECK((p.ok() || p.why == status::dependent_tokens));
      given += p.ok();
      below += p.ok() && p <= 0.05;
      naive += table.p_value(0, 1) <= 0.05;
    }
    CAPTURE(given);
    CAPTURE(below);
    if (phi < 0.9) {
      CHECK(given == trials);
      double const error = 2.5 * std::sqrt(0.05 * 0.95 * trials);
      CHECK(std::abs(below - 0.05 * trials) < error);
      CHECK((phi == 0 || naive > trials / 2));  // shuffling does not hold
    } else {
      CHECK(given < trials / 10);
    }
  }
}

TEST_CASE("no p-value is 0") {
  std::mt19937 bits(5);
  MatrixXd const x = normal_matrix(bits, 200, 8);
  layers const same{x, 2 * x};
  rflow::cka_table const t =
      cka_matrix(layer_stack(same), linear{}, debiased{}, tested{.significance = true});
  CHECK(t.p_value(0, 1) >= std::numeric_limits<double>::min());
  layers const forty{x.topRows(40), 2 * x.topRows(40)};
  rflow::cka_table const few =
      cka_matrix(layer_stack(forty), linear{}, debiased{}, tested{.significance = true});
  CHECK(few.p_value(0, 1) >= std::exp(-std::lgamma(41)) * (1 - 1e-12));
}

TEST_CASE("no p-value where too many massive tokens are in both layers; score and CKA stand") {
  for (Eigen::Index const count : {1, 6}) {
    CAPTURE(count);
    std::mt19937 bits(9);
    MatrixXd x = normal_matrix(bits, 60, 8), y = normal_matrix(bits, 60, 6);
    x.topRows(count) *= 100;
    y.topRows(count) *= 100;
    layers const both{x, y};
    rflow::cka_table const t =
        cka_matrix(layer_stack(both), linear{}, debiased{}, tested{.significance = true});
    CHECK(t.p_value(0, 1).ok() == (count == 1));
    CHECK(t.p_value(0, 1).why == (count == 1 ? status::ok : status::ill_conditioned));
    CHECK(t.p_value(1, 0).why == t.p_value(0, 1).why);
    CHECK(t.score(0, 1).ok());
    CHECK(t(0, 1).ok());
  }
}

TEST_CASE("of unrelated layers, a share of p-values lies below that share") {
  int below[3] = {};
  double const shares[3] = {0.05, 0.25, 0.75};
  int const trials = 400;
  for (unsigned seed = 1; seed <= trials; ++seed) {
    std::mt19937 bits(seed);
    layers const x{normal_matrix(bits, 40, 3), normal_matrix(bits, 40, 6)};
    rflow::cka_table const t =
        cka_matrix(layer_stack(x), linear{}, biased{}, tested{.threads = 1, .significance = true});
    for (int k = 0; k < 3; ++k) below[k] += t.p_value(0, 1) < shares[k];
  }
  for (int k = 0; k < 3; ++k) {
    CAPTURE(k);
    double const error = std::sqrt(shares[k] * (1 - shares[k]) / trials);
    CHECK(std::abs(below[k] / static_cast<double>(trials) - shares[k]) < 4 * error);
  }
}

TEST_CASE("significance: paths, kernels, types, threads and bad sites") {
  std::mt19937 bits(151);
  layers x = related_layers(bits, 90, {4, 30, 7, 5});
  auto const table = [&](auto const& kernel, rflow::gram_path path, int threads) {
    return cka_matrix(layer_stack(x), kernel, debiased{},
                      tested{.threads = threads, .path = path, .significance = true});
  };
  auto const tiles = table(linear{}, rflow::gram_path::gram, 1);
  auto const features = table(linear{}, rflow::gram_path::feature, 1);
  auto const more = table(linear{}, rflow::gram_path::gram, 3);
  auto const own =
      table([](double xy, double, double) { return 5 * xy + 2; }, rflow::gram_path::gram, 2);
  for (std::ptrdiff_t i = 0; i < 4; ++i)
    for (std::ptrdiff_t j = 0; j < 4; ++j) {
      CHECK(tiles.p_value(i, j) == Approx(features.p_value(i, j)).epsilon(1e-6));
      CHECK(tiles.p_value(i, j) == Approx(own.p_value(i, j)).epsilon(1e-6));
      CHECK(same_bits(tiles.p_value(i, j).value, more.p_value(i, j).value));
    }
  std::vector<MatrixXf> narrow;
  for (MatrixXd const& m : x) narrow.push_back(m.cast<float>());
  auto const in_float = cka_matrix(layer_stack(narrow), linear{}, debiased{},
                                   tested{.path = rflow::gram_path::gram, .significance = true});
  CHECK(in_float.p_value(0, 1) == Approx(tiles.p_value(0, 1)).epsilon(1e-3));
  CHECK(table(rbf{}, rflow::gram_path::automatic, 2).p_value(0, 1) < 0.05);

  CHECK(cka_matrix(layer_stack(x)).p_value(0, 1).why == status::not_requested);
  CHECK(cka_matrix(layer_stack(x)).score(0, 1).why == status::not_requested);
  x[2](3, 3) = std::numeric_limits<double>::quiet_NaN();
  x[3].setConstant(4);
  auto const bad = table(linear{}, rflow::gram_path::automatic, 2);
  CHECK(bad.p_value(0, 2).why == status::non_finite);
  CHECK(bad.score(3, 0).why == status::constant_layer);
  CHECK(same_bits(bad.score(0, 1).value, bad.score(1, 0).value));
  CHECK(bad.p_value(0, 1).ok());
  layers const three = rows_between(x, 10, 3);
  CHECK(cka_matrix(layer_stack(three), linear{}, biased{}, tested{.significance = true})
            .p_value(0, 1)
            .why == status::not_requested);
  CHECK_THROWS_AS(
      cka_matrix(
          layer_stack(x), linear{}, debiased{},
          tested{.memory_bound = 60'000, .path = rflow::gram_path::feature, .significance = true}),
      std::invalid_argument);
}

TEST_CASE("the path is the cheaper one, or the one asked for, and the table says which") {
  using rflow::gram_path;
  std::mt19937 bits(157);
  layers const few = related_layers(bits, 40, {60, 70}), many = related_layers(bits, 900, {6, 7});
  auto const path = [](layers const& x, auto const& kernel, gram_path asked) {
    return cka_matrix(layer_stack(x), kernel, debiased{}, tested{.path = asked}).path();
  };
  CHECK(path(few, linear{}, gram_path::automatic) == gram_path::gram);
  CHECK(path(many, linear{}, gram_path::automatic) == gram_path::feature);
  for (layers const* x : {&few, &many})
    for (gram_path const asked : {gram_path::gram, gram_path::feature})
      CHECK(path(*x, linear{}, asked) == asked);
  CHECK(path(many, rbf{}, gram_path::automatic) == gram_path::gram);
}

TEST_CASE("what a table does not know is not requested") {
  fixture const f;
  layers const both = f.stack();
  rflow::cka_table const t = cka_matrix(layer_stack(both));
  CHECK(t.sigma(0).why == status::not_requested);
  CHECK(t.col_sigma(1).why == status::not_requested);
  rflow::cka_table const features = cka_matrix(layer_stack(both), linear{}, debiased{},
                                               tested{.path = rflow::gram_path::feature});
  CHECK(features.top_token_share(0).ok());  // of the token with the largest norm
  CHECK(features.top_token_share(0) <= t.top_token_share(0) * (1 + 1e-12));
}

// ---- RBF ----------------------------------------------------------------------------------------

namespace {

double median_sigma(MatrixXd const& x, double fraction, bool all_pairs = true) {
  return fraction * std::sqrt(reference::median_distance(rows_of(x), all_pairs));
}

}  // namespace

TEST_CASE("RBF CKA of the published example") {
  fixture const f;
  MatrixXf const x = f.x.cast<float>(), y = f.y.cast<float>();
  struct row {
    double fraction, biased, debiased, digits;
  };
  for (row const& r : {row{1.0, 0.5758322230135366, 0.5016102703531156, 1e-12},
                       row{0.5, 0.6548311822614982, 0.4192767510220518, 1e-12},
                       row{0.8, 0.5858570893287, 0.4894709767093, 1e-12},
                       row{0.4, 0.7481998075979, 0.3497610964655, 1e-12},
                       row{0.2, 0.9898069302769, 0.0495356306561, 1e-12}}) {
    CAPTURE(r.fraction);
    rbf const kernel{.fraction = r.fraction};
    CHECK(std::abs(cka(f.x, f.y, kernel, biased{}) - r.biased) < r.digits);
    CHECK(std::abs(cka(f.x, f.y, kernel) - r.debiased) < r.digits);
    CHECK(std::abs(cka(x, y, kernel, biased{}) - r.biased) < 1e-5);
    CHECK(std::abs(cka(x, y, kernel) - r.debiased) < 1e-5);
  }
  rbf const triangle{.convention = rbf::median::upper_triangle};
  CHECK(std::abs(cka(f.x, f.y, triangle, biased{}) - 0.5757367) < 5e-8);
}

TEST_CASE("HSIC with Gaussian kernels, as Shogun's test has it") {
  MatrixXd p(4, 3), q(4, 3);
  for (Eigen::Index i = 0; i < 12; ++i) {
    p(i / 3, i % 3) = static_cast<double>(i);
    q(i / 3, i % 3) = static_cast<double>(i + 10);
  }
  rbf const kernel{.sigma = {2, 3}};
  layers const both{p, q};
  rflow::gram_moments const m = tested{}.gram(kernel, layer_stack(both));
  CHECK(biased::hsic(m, 0, 1) / 16 == Approx(0.164761446385339).epsilon(1e-12));
  CHECK(debiased::hsic(m, 0, 1) / 4 == Approx(0.0037749873058451).epsilon(1e-11));
  CHECK(std::abs(cka(p, q, kernel, biased{}) - 0.98164847077362) < 1e-12);
  CHECK(std::abs(cka(p, q, kernel) - 0.99997914058604) < 1e-12);
}

TEST_CASE_TEMPLATE("RBF tables agree with brute force", T, float, double, rflow::bf16) {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const tokens = 8 + bits() % 120, width = 1 + bits() % 90;
    CAPTURE(tokens);
    CAPTURE(width);
    reference::stack x = reference::random_stack(bits, 3, tokens, width);
    std::vector<T> const values = reference::pack<T>(x);
    auto const stack = reference::stack_of(values, x);
    for (bool const all_pairs : {true, false}) {
      double const fraction = 0.3 + 0.1 * static_cast<double>(seed);
      rbf const kernel{
          .fraction = fraction,
          .convention = all_pairs ? rbf::median::all_pairs : rbf::median::upper_triangle};
      rflow::cka_table const d = cka_matrix(stack, kernel), b = cka_matrix(stack, kernel, biased{});
      std::vector<reference::matrix> k;
      for (std::size_t l = 0; l < 3; ++l) {
        double const sigma = median_sigma(to_eigen(x[l]), fraction, all_pairs);
        double const within = std::same_as<T, double> ? 1e-12 : 1e-5;
        CHECK(d.sigma(static_cast<std::ptrdiff_t>(l)) == Approx(sigma).epsilon(within));
        k.push_back(reference::rbf_kernel(x[l], sigma));
      }
      double const within = std::same_as<T, double> ? 1e-11 : 2e-5;
      for (std::size_t i = 0; i < 3; ++i)
        for (std::size_t j = 0; j < 3; ++j) {
          auto const p = static_cast<std::ptrdiff_t>(i), q = static_cast<std::ptrdiff_t>(j);
          CHECK(std::abs(d(p, q) - reference::cka(k[i], k[j], reference::hsic_debiased)) < within);
          CHECK(std::abs(b(p, q) - reference::cka(k[i], k[j], reference::hsic_biased)) < within);
          CHECK(std::abs(b.chance(p, q) - brute_chance(k[i], k[j])) < within);
        }
    }
  }
}

TEST_CASE("mistake: sigma is ignored") {
  fixture const f;
  layers const both = f.stack();
  CHECK(std::abs(cka(f.x, f.y, rbf{.fraction = 0.4}) - cka(f.x, f.y, rbf{})) > 0.1);
  CHECK(std::abs(cka(f.x, f.y, rbf{.sigma = {1, 1}}) - cka(f.x, f.y, rbf{.sigma = {5, 5}})) > 0.1);
  rflow::cka_table const t = cka_matrix(layer_stack(both), rbf{.fraction = 0.4});
  CHECK(t.sigma(0) == Approx(median_sigma(f.x, 0.4)).epsilon(1e-12));
  CHECK(t.sigma(1) == Approx(median_sigma(f.y, 0.4)).epsilon(1e-12));
  rflow::cka_table const given = cka_matrix(layer_stack(both), rbf{.sigma = {1.5, 2.5}});
  CHECK(given.sigma(0) == 1.5);
  CHECK(given.sigma(1) == 2.5);
  rflow::cka_table const cross =
      cka_matrix(layer_stack(both), layer_stack(both), rbf{.sigma = {1, 2, 3, 4}});
  CHECK(cross.sigma(1) == 2);
  CHECK(cross.col_sigma(0) == 3);
  CHECK(cross.col_sigma(1) == 4);
  CHECK_THROWS_AS(cka_matrix(layer_stack(both), rbf{.sigma = {1}}), std::invalid_argument);
}

TEST_CASE("RBF CKA sees neither rotation, scale, origin nor the order of tokens") {
  for (unsigned seed = 1; seed <= 8; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    auto const n = static_cast<Eigen::Index>(8 + bits() % 50);
    layers const s = related_layers(bits, n, {11, 23});
    MatrixXd const &x = s[0], &y = s[1];
    rbf const kernel{.fraction = 0.7};
    double const d = cka(x, y, kernel), b = cka(x, y, kernel, biased{});
    auto const same = [&](MatrixXd const& u, MatrixXd const& v) {
      CHECK(std::abs(cka(u, v, kernel) - d) < 1e-9);
      CHECK(std::abs(cka(u, v, kernel, biased{}) - b) < 1e-10);
    };
    MatrixXd const rotation =
        Eigen::HouseholderQR<MatrixXd>(normal_matrix(bits, 23, 23)).householderQ();
    same(y, x);
    same(x, y * rotation);
    for (double const scale : {1e-6, 1e6}) same(scale * x, y / scale);
    same((x.array() + 10).matrix(), y);
    same(x.colwise().reverse(), y.colwise().reverse());
    MatrixXd padded = MatrixXd::Zero(n, 20);
    padded.leftCols(11) = x;
    same(padded, y);
    CHECK(std::abs(cka(x, x, kernel) - 1) < 1e-12);
    for (int const threads : {2, 5})
      CHECK(same_bits(cka(x, y, kernel, debiased{}, tested{.threads = threads}).value,
                      cka(x, y, kernel, debiased{}, tested{.threads = 1}).value));
  }
}

TEST_CASE("a wide RBF kernel is linear, and keeps its digits") {
  // exp(−t) ≈ 1 − t: everything is in the last digits of the kernel.
  fixture const f;
  CHECK(cka(f.x, f.y, rbf{.fraction = 300}) == Approx(cka(f.x, f.y)).epsilon(1e-3));
  CHECK(cka(f.x, f.y, rbf{.fraction = 300}, biased{}) ==
        Approx(cka(f.x, f.y, linear{}, biased{})).epsilon(1e-3));
}

TEST_CASE("an RBF kernel without a scale") {
  std::mt19937 bits(127);
  layers x = related_layers(bits, 40, {10, 12, 9});
  for (Eigen::Index i = 0; i < 36; ++i) x[1].row(i) = x[1].row(0);  // most distances are 0
  rflow::cka_table const t = cka_matrix(layer_stack(x), rbf{});
  CHECK(t.status(0, 1) == status::zero_bandwidth);
  CHECK(t.status(1, 1) == status::zero_bandwidth);
  CHECK(t.status(0, 2) == status::ok);
  CHECK(cka(x[0], x[1], rbf{}).why == status::zero_bandwidth);
  x[2](3, 3) = std::numeric_limits<double>::quiet_NaN();
  rflow::cka_table const u = cka_matrix(layer_stack(x), rbf{});
  CHECK(u.status(0, 2) == status::non_finite);
  CHECK(u.status(0, 0) == status::ok);
  // A bandwidth is a number only where the site has an answer.
  CHECK(u.sigma(0) == Approx(median_sigma(x[0], 1)).epsilon(1e-12));
  CHECK(u.sigma(1).why == status::zero_bandwidth);
  CHECK(u.sigma(2).why == status::non_finite);
  CHECK(std::isnan(u.sigma(2).value));
  CHECK(u.col_sigma(1).why == status::zero_bandwidth);
  x[1].setConstant(7);
  CHECK(cka_matrix(layer_stack(x), rbf{}).sigma(1).why == status::constant_layer);
  CHECK(cka_matrix(layer_stack(x), rbf{.sigma = {1, 2, 3}}).sigma(1).why == status::constant_layer);
  CHECK_THROWS_WITH_AS(cka(x[0], x[2], rbf{}),
                       "rflow::cka: NaN or infinity in layer y, token 3, feature 3",
                       std::domain_error);
}

TEST_CASE("the median of more than 512 tokens comes from 512 of them") {
  std::mt19937 bits(131);
  layers const x{normal_matrix(bits, 1500, 20)};
  double const sigma = cka_matrix(layer_stack(x), rbf{}).sigma(0);
  CHECK(sigma == Approx(median_sigma(x[0].topRows(700), 1)).epsilon(0.02));
}

TEST_CASE("minibatches with an RBF kernel take one bandwidth a site") {
  CHECK_THROWS_AS(rflow::cka_accumulator<rbf>(rbf{}), std::invalid_argument);
  fixture const f;
  rbf const kernel{.sigma = {median_sigma(f.x, 1), median_sigma(f.y, 1)}};
  CHECK(minibatches(f.stack(), {100}, kernel)(0, 1) == Approx(0.5016102703531156).epsilon(1e-11));
  double cross = 0, self_x = 0, self_y = 0;
  for (Eigen::Index first = 0; first < 100; first += 25) {
    layers const batch = rows_between(f.stack(), first, 25);
    reference::matrix const k = reference::rbf_kernel(rows_of(batch[0]), kernel.sigma[0]);
    reference::matrix const l = reference::rbf_kernel(rows_of(batch[1]), kernel.sigma[1]);
    cross += reference::hsic_debiased(k, l);
    self_x += reference::hsic_debiased(k, k);
    self_y += reference::hsic_debiased(l, l);
  }
  CHECK(minibatches(f.stack(), {25, 25, 25, 25}, kernel)(0, 1) ==
        Approx(cross / std::sqrt(self_x * self_y)).epsilon(1e-11));
}

namespace {

struct power_kernel {
  double power;

  double operator()(double inner, double, double) const { return std::pow(1 + inner, power); }
  bool operator==(power_kernel const&) const = default;
};

}  // namespace

TEST_CASE("accumulators of different kernels do not merge") {
  fixture const f;
  layers const both = f.stack();
  rflow::cka_accumulator<rbf> a(rbf{.sigma = {1.5, 2}}), b(rbf{.sigma = {1.5, 2.25}}),
      same(rbf{.fraction = 0.5, .sigma = {1.5, 2}});
  for (auto* x : {&a, &b, &same}) x->add(layer_stack(both), tested{});
  double const before = a(0, 1);
  CHECK_THROWS_WITH_AS(a.merge(b),
                       "rflow::cka_accumulator::merge: different kernels, rbf with sigma 1.5, 2 "
                       "and rbf with sigma 1.5, 2.25",
                       std::invalid_argument);
  CHECK(same_bits(a(0, 1), before));
  CHECK_THROWS_AS(rflow::cka_accumulator<rbf>(rbf{.sigma = {1, 2}}).merge(a),
                  std::invalid_argument);
  a.merge(same);  // with σ given, the fraction says nothing
  CHECK(a.batches() == 2);

  rflow::cka_accumulator<power_kernel> two({2}), three({3}), again({2});
  for (auto* x : {&two, &three, &again}) x->add(layer_stack(both), tested{});
  CHECK_THROWS_WITH_AS(two.merge(three),
                       "rflow::cka_accumulator::merge: different kernels of one type",
                       std::invalid_argument);
  two.merge(again);
  CHECK(two.batches() == 2);
  // An accumulator that has seen nothing still has a kernel.
  CHECK_THROWS_AS(two.merge(rflow::cka_accumulator<power_kernel>({3})), std::invalid_argument);
}

TEST_CASE("chance of RBF kernels, beside what few tokens give") {
  std::mt19937 bits(137);
  layers const x{normal_matrix(bits, 30, 200), normal_matrix(bits, 30, 200)};
  rflow::cka_table const t = cka_matrix(layer_stack(x), rbf{.fraction = 0.2}, biased{});
  CHECK(t(0, 1) > 0.95);
  CHECK(t.chance(0, 1) > 0.95);
  CHECK(std::abs(cka_matrix(layer_stack(x), rbf{.fraction = 1})(0, 1)) < 0.2);
}
