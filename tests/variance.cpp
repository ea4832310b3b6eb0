// SPDX-License-Identifier: Apache-2.0
#include <rflow/variance.hpp>

#include <cmath>
#include <limits>
#include <numbers>
#include <random>

#include <doctest/doctest.h>

#include <Eigen/QR>

#include <rflow/flow.hpp>

#include "reference.hpp"

using doctest::Approx;
using rflow::layer_variance;
using rflow::normalization;
using rflow::status;

namespace {

using chain = std::vector<Eigen::MatrixXd>;

constexpr normalization all_normalizations[] = {normalization::none, normalization::per_token,
                                                normalization::per_element,
                                                normalization::relative};

layer_variance variance_of(chain const& x, normalization by = normalization::none) {
  return rflow::variance(rflow::layer_stack(x), by);
}

chain random_chain(unsigned seed, std::size_t sites, Eigen::Index n, Eigen::Index d) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal;
  chain out(sites);
  for (std::size_t l = 0; l < sites; ++l) {
    out[l] = Eigen::MatrixXd::NullaryExpr(n, d, [&] { return normal(bits); });
    if (l > 0) out[l] = out[l - 1] + 0.4 * out[l];
  }
  return out;
}

template <class F>
chain mapped(chain const& x, F const& f) {
  chain out;
  for (auto const& layer : x) out.push_back(f(layer));
  return out;
}

void check_same(layer_variance const& a, layer_variance const& b, double factor = 1) {
  CHECK(a.st1 == Approx(b.st1 * factor).epsilon(1e-11));
  CHECK(a.st2 == Approx(b.st2 * factor).epsilon(1e-11));
  CHECK(a.path_energy == Approx(b.path_energy * factor * factor).epsilon(1e-11));
  CHECK(a.path_length == Approx(b.path_length * factor).epsilon(1e-11));
  REQUIRE(a.steps.size() == b.steps.size());
  for (std::size_t l = 0; l < a.steps.size(); ++l)
    CHECK(a.steps[l] == Approx(b.steps[l] * factor).epsilon(1e-11));
  REQUIRE(a.curvature.size() == b.curvature.size());
  for (std::size_t l = 0; l < a.curvature.size(); ++l)
    CHECK(a.curvature[l] == Approx(b.curvature[l]).epsilon(1e-9));
}

}  // namespace

TEST_CASE_TEMPLATE("variance agrees with its definitions under every normalisation", T, float,
                   double, rflow::f16, rflow::bf16) {
  for (unsigned seed = 1; seed <= 16; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const sites = 2 + bits() % 9, tokens = 1 + bits() % 30, width = 1 + bits() % 90;
    reference::stack x = reference::random_stack(bits, sites, tokens, width);
    std::vector<T> const values = reference::pack<T>(x);
    double energy = 0, squares = 0;
    std::vector<double> steps;
    for (std::size_t l = 0; l < sites; ++l) {
      squares += reference::inner(x[l], x[l]);
      if (l == 0) continue;
      reference::matrix const step = reference::minus(x[l], x[l - 1]);
      steps.push_back(reference::inner(step, step));
      energy += steps.back();
    }
    double const spread = reference::spread(x), within = reference::tolerance<T>;
    double const n = static_cast<double>(tokens), d = static_cast<double>(width);
    double const s = static_cast<double>(sites);
    double const factors[] = {1, 1 / n, 1 / (n * d), s / squares};
    for (std::size_t k = 0; k < 4; ++k) {
      layer_variance const v =
          rflow::variance(reference::stack_of(values, x), all_normalizations[k]);
      double const f = factors[k];
      CAPTURE(k);
      CHECK(v.by == all_normalizations[k]);
      CHECK(v.factor == Approx(f).epsilon(within));
      CHECK(v.st1 == Approx(std::sqrt(f * energy / (s - 1))).epsilon(within));
      CHECK(v.st2 == Approx(std::sqrt(f * spread / s)).epsilon(within));
      CHECK(v.path_energy == Approx(f * energy).epsilon(within));
      double length = 0;
      REQUIRE(v.steps.size() == steps.size());
      for (std::size_t l = 0; l < steps.size(); ++l) {
        CHECK(v.steps[l] == Approx(std::sqrt(f * steps[l])).epsilon(within));
        length += std::sqrt(f * steps[l]);
      }
      CHECK(v.path_length == Approx(length).epsilon(within));
    }
  }
}

TEST_CASE("a straight line, a zigzag and a polygon have known paths") {
  Eigen::MatrixXd const a = Eigen::MatrixXd::Random(4, 6), b = Eigen::MatrixXd::Random(4, 6);
  chain line, zigzag;
  for (int l = 0; l < 6; ++l) {
    line.push_back(a + l * b);
    zigzag.push_back(l % 2 == 0 ? a : Eigen::MatrixXd(a + b));
  }
  layer_variance const straight = variance_of(line);
  double const step = b.norm();
  CHECK(straight.path_length == Approx((line.back() - line.front()).norm()));
  CHECK(straight.st1 == Approx(step));
  CHECK(straight.st2 == Approx(step * std::sqrt(35.0 / 12)));  // variance of 0 … 5
  for (auto const& c : straight.curvature) CHECK(std::abs(c) < 1e-6);
  layer_variance const back_and_forth = variance_of(zigzag);
  CHECK(back_and_forth.st2 == Approx(step / 2));
  for (auto const& c : back_and_forth.curvature) CHECK(c == Approx(std::numbers::pi).epsilon(1e-6));

  chain polygon;
  int const corners = 7;
  for (int l = 0; l < corners; ++l) {
    double const angle = 2 * std::numbers::pi * l / corners;
    polygon.push_back((Eigen::MatrixXd(1, 2) << std::cos(angle), std::sin(angle)).finished());
  }
  layer_variance const round = variance_of(polygon);
  CHECK(round.st2 == Approx(1));
  CHECK(round.st1 == Approx(2 * std::sin(std::numbers::pi / corners)));
  REQUIRE(round.curvature.size() == 5);
  for (auto const& c : round.curvature) CHECK(c == Approx(2 * std::numbers::pi / corners));
}

TEST_CASE("paths do not change with origin, rotation or order of tokens, and scale with the data") {
  for (unsigned seed = 1; seed <= 8; ++seed) {
    CAPTURE(seed);
    Eigen::Index const n = 3 + seed, d = 2 * seed + 1;
    chain const x = random_chain(seed, 6, n, d);
    Eigen::MatrixXd const offset = 5 * Eigen::MatrixXd::Random(n, d);
    Eigen::MatrixXd const q =
        Eigen::HouseholderQR<Eigen::MatrixXd>(Eigen::MatrixXd::Random(d, d)).householderQ();
    for (normalization const by :
         {normalization::none, normalization::per_token, normalization::per_element}) {
      layer_variance const base = variance_of(x, by);
      check_same(variance_of(mapped(x, [&](auto const& m) { return m + offset; }), by), base);
      check_same(variance_of(mapped(x, [&](auto const& m) { return m * q; }), by), base);
      check_same(variance_of(mapped(x, [&](auto const& m) { return m.colwise().reverse(); }), by),
                 base);
      for (double const scale : {1e-6, 1e-3, 1e3, 1e6})
        check_same(variance_of(mapped(x, [&](auto const& m) { return scale * m; }), by), base,
                   scale);
      // Each token twice: twice the squares, the same per token.
      check_same(variance_of(mapped(x, [&](auto const& m) { return m.replicate(2, 1); }), by), base,
                 by == normalization::none ? std::sqrt(2.0) : 1);
      check_same(variance_of(mapped(x, [&](auto const& m) { return m.replicate(1, 2); }), by), base,
                 by == normalization::per_element ? 1 : std::sqrt(2.0));
    }
    layer_variance const base = variance_of(x, normalization::relative);
    for (double const scale : {1e-6, 1e6})
      check_same(
          variance_of(mapped(x, [&](auto const& m) { return scale * m; }), normalization::relative),
          base);
    chain const reversed(x.rbegin(), x.rend());
    CHECK(variance_of(reversed).st2 == Approx(variance_of(x).st2).epsilon(1e-12));
    CHECK(variance_of(reversed).path_length == Approx(variance_of(x).path_length).epsilon(1e-12));
  }
}

TEST_CASE("a large common offset does not cancel the spread") {
  chain const x = random_chain(3, 5, 16, 64);
  std::vector<Eigen::MatrixXf> near, exact;
  for (auto const& m : x) near.push_back((m.array() + 1000).matrix().cast<float>());
  chain rounded;
  for (auto const& m : near) rounded.push_back(m.cast<double>());
  layer_variance const single = rflow::variance(rflow::layer_stack(near));
  CHECK(single.st2 == Approx(variance_of(rounded).st2).epsilon(1e-5));
  CHECK(single.st1 == Approx(variance_of(rounded).st1).epsilon(1e-5));
}

TEST_CASE("chains too short for a path say so") {
  chain const one = random_chain(1, 1, 4, 3);
  layer_variance const v = variance_of(one);
  CHECK(v.st1.why == status::too_few_sites);
  CHECK(v.path_energy.why == status::too_few_sites);
  CHECK(v.path_length.why == status::too_few_sites);
  CHECK(v.st2.ok());
  CHECK(v.st2 == 0);
  CHECK(v.steps.empty());
  CHECK(v.curvature.empty());
  layer_variance const two = variance_of(random_chain(1, 2, 4, 3));
  CHECK(two.st1.ok());
  CHECK(two.steps.size() == 1);
  CHECK(two.curvature.empty());
  CHECK(two.st2 == Approx(two.st1 / 2));
}

TEST_CASE("a layer equal to the one before has no direction") {
  chain x = random_chain(2, 5, 4, 3);
  x[2] = x[1];
  layer_variance const v = variance_of(x);
  CHECK(v.steps[1].ok());
  CHECK(v.steps[1] == 0);
  CHECK(v.curvature[0].why == status::zero_step);
  CHECK(v.curvature[1].why == status::zero_step);
  CHECK(v.curvature[2].ok());
  CHECK(v.st1.ok());
}

TEST_CASE("nothing to be relative to, and no tokens") {
  chain const zeros(3, Eigen::MatrixXd::Zero(4, 5));
  layer_variance const v = variance_of(zeros, normalization::relative);
  CHECK(v.factor.why == status::zero_rows);
  CHECK(v.st1.why == status::zero_rows);
  CHECK(v.st2.why == status::zero_rows);
  CHECK(v.path_length.why == status::zero_rows);
  CHECK(variance_of(zeros).st2 == 0);

  chain const x = random_chain(4, 3, 4, 5);
  auto const none = rflow::layer_stack(x).tokens(std::vector<int>(4));
  for (normalization const by : all_normalizations)
    CHECK(rflow::variance(none, by).st1.why == status::too_few_rows);
  CHECK(rflow::variance(none).curvature[0].why == status::too_few_rows);
}

TEST_CASE("figures of doubles whose squares have no double") {
  chain const x = random_chain(8, 4, 6, 5);
  rflow::flow_report const good = rflow::flow(rflow::layer_stack(x));
  for (double const scale : {1e160, 1e-170}) {
    CAPTURE(scale);
    chain const y = mapped(x, [&](auto const& m) { return (m * scale).eval(); });
    for (normalization const by :
         {normalization::none, normalization::per_token, normalization::per_element}) {
      layer_variance const v = variance_of(y, by), u = variance_of(x, by);
      CHECK(v.path_energy.why == status::out_of_range);
      CHECK(v.st1 / (u.st1 * scale) == Approx(1).epsilon(1e-12));
      CHECK(v.st2 / (u.st2 * scale) == Approx(1).epsilon(1e-12));
      CHECK(v.path_length / (u.path_length * scale) == Approx(1).epsilon(1e-12));
      CHECK(v.steps[1] / (u.steps[1] * scale) == Approx(1).epsilon(1e-12));
      CHECK(v.curvature[0] / u.curvature[0] == Approx(1).epsilon(1e-12));
    }
    layer_variance const v = variance_of(y, normalization::relative),
                         u = variance_of(x, normalization::relative);
    CHECK(v.factor.why == status::out_of_range);
    check_same(v, u);
    rflow::flow_report const r = rflow::flow(rflow::layer_stack(y));
    CHECK(r.rms_norm[2] / (good.rms_norm[2] * scale) == Approx(1).epsilon(1e-12));
    CHECK(r.inter_token[2] == Approx(good.inter_token[2]).epsilon(1e-12));
    CHECK(r.adjacent[1].mean == Approx(good.adjacent[1].mean).epsilon(1e-12));
    CHECK(std::isnan(r.spread_bounds.lower));
  }
}

TEST_CASE("a bound on the spread that double does not have is out of range") {
  chain x(5, Eigen::MatrixXd::Zero(1, 1));
  x[1](0, 0) = 8e153;
  rflow::flow_report const r = rflow::flow(rflow::layer_stack(x));
  CHECK(r.variance.path_energy.ok());
  CHECK(r.spread_bounds.lower.ok());
  CHECK(r.spread_bounds.upper.why == status::out_of_range);
  CHECK(r.variance.st2 / (0.4 * 8e153) == Approx(1).epsilon(1e-12));
}

TEST_CASE("rows a long way from the origin leave the spread of small steps exact") {
  for (double const step : {1e-2, 1e-3, 1e-4}) {
    CAPTURE(step);
    std::mt19937 bits(5);
    std::normal_distribution<double> normal;
    reference::stack x(33, reference::matrix(20, std::vector<double>(50)));
    for (std::size_t i = 0; i < 20; ++i)
      for (std::size_t j = 0; j < 50; ++j) {
        double value = 1000 + normal(bits);
        for (auto& site : x) site[i][j] = value += step * normal(bits);
      }
    std::vector<float> const values = reference::pack<float>(x);
    reference::chain_figures const exact = reference::exact_chain(x);
    layer_variance const v = rflow::variance(reference::stack_of(values, x));
    CHECK(v.st1 / static_cast<double>(exact.st1) == Approx(1).epsilon(1e-5));
    CHECK(v.st2 / static_cast<double>(exact.st2) == Approx(1).epsilon(1e-5));
  }
}

TEST_CASE_TEMPLATE("straight chains and chains that turn back have exact angles", T, float,
                   double) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::normal_distribution<double> normal;
    std::size_t const tokens = 1 + seed % 5, width = 1 + 37 * (seed % 7);
    reference::stack x(6, reference::matrix(tokens, std::vector<double>(width)));
    double const from = seed % 2 == 0 ? 0 : 100, pace[] = {0, 1, 3, 2, 2.5, 10};
    for (std::size_t i = 0; i < tokens; ++i)
      for (std::size_t j = 0; j < width; ++j) {
        double const direction = seed % 3 == 0 ? 0.1 : normal(bits);
        for (std::size_t l = 0; l < 6; ++l) x[l][i][j] = from + pace[l] * direction;
      }
    std::vector<T> const values = reference::pack<T>(x);
    reference::chain_figures const exact = reference::exact_chain(x);
    layer_variance const v = rflow::variance(reference::stack_of(values, x));
    for (std::size_t l = 0; l < 4; ++l)
      CHECK(std::abs(v.curvature[l] - static_cast<double>(exact.curvature[l])) <
            (std::same_as<T, double> ? 1e-13 : 1e-6));
  }
}

TEST_CASE("steps whose squares have no float or double are steps") {
  float const a[] = {1, 1e-23f, 1, 2e-23f, 1, 4e-23f};
  layer_variance const v = rflow::variance(rflow::layer_stack<float>(a, {3, 1, 2}));
  CHECK(v.steps[0] / 1e-23 == Approx(1).epsilon(1e-5));
  CHECK(v.steps[1] / 2e-23 == Approx(1).epsilon(1e-5));
  CHECK(v.curvature[0].ok());
  CHECK(v.curvature[0] == 0);
  double const b[] = {1, 1e-170, 1, 2e-170, 1, 1e-170};
  layer_variance const w = rflow::variance(rflow::layer_stack<double>(b, {3, 1, 2}));
  CHECK(w.steps[0] / 1e-170 == Approx(1).epsilon(1e-12));
  CHECK(w.st2 / (std::sqrt(2.0) / 3 * 1e-170) == Approx(1).epsilon(1e-12));
  CHECK(w.path_energy.why == status::out_of_range);
  CHECK(w.curvature[0] == Approx(std::numbers::pi).epsilon(1e-15));
}

TEST_CASE("a NaN takes its steps and the sums, and leaves the other steps") {
  chain x = random_chain(5, 6, 4, 5);
  layer_variance const good = variance_of(x);
  x[2](3, 4) = std::numeric_limits<double>::quiet_NaN();
  for (normalization const by : all_normalizations) {
    layer_variance const v = variance_of(x, by);
    CHECK(v.st1.why == status::non_finite);
    CHECK(v.st2.why == status::non_finite);
    CHECK(v.path_energy.why == status::non_finite);
    CHECK(v.path_length.why == status::non_finite);
    CHECK(v.steps[1].why == status::non_finite);
    CHECK(v.steps[2].why == status::non_finite);
  }
  layer_variance const v = variance_of(x);
  for (std::size_t const l : {0u, 3u, 4u})
    CHECK(v.steps[l] == Approx(good.steps[l]).epsilon(1e-12));
  for (std::size_t const l : {0u, 1u, 2u}) CHECK(v.curvature[l].why == status::non_finite);
  CHECK(v.curvature[3] == Approx(good.curvature[3]).epsilon(1e-9));
}

TEST_CASE("masked tokens count in no sum") {
  chain const x = random_chain(6, 4, 7, 5);
  std::vector<int> const mask{0, 1, 1, 0, 1, 1, 0};
  chain const kept = mapped(x, [](auto const& m) {
    return m(std::vector<int>{1, 2, 4, 5}, Eigen::all).eval();
  });
  for (normalization const by : all_normalizations)
    check_same(rflow::variance(rflow::layer_stack(x).tokens(mask), by), variance_of(kept, by));
}

TEST_CASE("sites of different width are refused with both widths") {
  chain x = random_chain(7, 3, 4, 5);
  x[2] = Eigen::MatrixXd::Zero(4, 6);
  CHECK_THROWS_WITH_AS(variance_of(x), "rflow::variance: site 2 has 6 features, site 0 has 5",
                       std::invalid_argument);
}

TEST_CASE("every normalisation has its name") {
  CHECK(to_string(normalization::none) == "none");
  CHECK(to_string(normalization::per_token) == "per_token");
  CHECK(to_string(normalization::per_element) == "per_element");
  CHECK(to_string(normalization::relative) == "relative");
}
