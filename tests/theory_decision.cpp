// SPDX-License-Identifier: Apache-2.0
// The rule by which rflow_theory_validation decides, on estimates of known laws: what is right does not
// fail by luck, what is wrong is found, and what too few draws leave open is not decided.
#include <cmath>
#include <cstddef>
#include <random>

#include <doctest/doctest.h>

#include "../examples/theory_validation/decision.hpp"

namespace {

using doctest::Approx;
using validation::decision_rule;
using validation::estimate;
using validation::verdict;

constexpr std::ptrdiff_t batches = 256;

struct simulation {
  std::mt19937_64 bits;
  std::normal_distribution<double> normal;

  /// Mean and standard error of batches N(mean, deviation²).
  estimate operator()(double mean, double deviation) {
    double sum = 0, squares = 0;
    for (std::ptrdiff_t b = 0; b < batches; ++b) {
      double const x = deviation * normal(bits);
      sum += x;
      squares += x * x;
    }
    auto const n = static_cast<double>(batches);
    return {mean + sum / n, std::sqrt((squares - sum * sum / n) / (n - 1) / n)};
  }
};

}  // namespace

TEST_CASE("the quantiles of the decision rule") {
  CHECK(validation::two_sided_quantile(0.05) == Approx(1.959963984540054).epsilon(1e-12));
  CHECK(validation::two_sided_quantile(1e-6) == Approx(4.891638475699).epsilon(1e-10));
  decision_rule const one(1, 1000000), many(1000, 1000000);
  CHECK(one.bound == Approx(4.891638).epsilon(1e-4));
  CHECK(many.bound == Approx(validation::two_sided_quantile(1e-9)).epsilon(1e-4));
  CHECK(many.reach - many.bound == Approx(4.753424).epsilon(1e-4));  // one-sided, 1e-6
  CHECK(decision_rule(1000, 20).bound > many.bound);                 // few batches: Student's t
}

TEST_CASE("right constants are held, wrong ones are not, whatever the seed") {
  decision_rule const rule(1000, batches);
  for (unsigned seed = 1; seed <= 30; ++seed) {
    CAPTURE(seed);
    simulation draw{std::mt19937_64(seed), {}};
    for (int i = 0; i < 200; ++i) {
      // A standard error of nine tenths of what decides, of a constant of any size and sign.
      double const constant = std::ldexp(i % 2 == 0 ? 3. : -3., i % 50 - 25);
      double const deviation =
          0.8 * rule.enough() * std::abs(constant) * std::sqrt(double(batches));
      CHECK(rule.equal(draw(constant, deviation), constant, constant) == verdict::held);
      for (double const wrong : {-0.05, 0.05, 0.2, -0.5})
        CHECK(rule.equal(draw(constant, deviation), constant * (1 + wrong), constant) ==
              verdict::not_held);
    }
  }
}

TEST_CASE("too few draws decide nothing, and find what is far off all the same") {
  decision_rule const rule(1000, batches);
  simulation draw{std::mt19937_64(5), {}};
  double const deviation = 3 * rule.enough() * std::sqrt(double(batches));
  for (int i = 0; i < 500; ++i) {
    CHECK(rule.equal(draw(1, deviation), 1, 1) == verdict::not_decided);
    CHECK(rule.equal(draw(1, deviation), 1.05, 1) != verdict::held);
    CHECK(rule.equal(draw(1, deviation), 1.4, 1) == verdict::not_held);
    CHECK(rule.positive(draw(0, deviation)) == verdict::not_decided);
    CHECK(rule.positive(draw(1, deviation)) == verdict::held);
    CHECK(rule.positive(draw(-1, deviation)) == verdict::not_held);
  }
  // Nothing is no evidence, and NaN is no agreement.
  CHECK(rule.equal({std::nan(""), 1}, 1, 1) == verdict::not_held);
  CHECK(rule.equal({1, std::nan("")}, 1, 1) == verdict::not_held);
  CHECK(rule.positive({1, std::nan("")}) == verdict::not_decided);
}

TEST_CASE("false alarms are as rare as the rule says, seen where they are common") {
  // The same rule for false alarms of one in a hundred instead of one in a million.
  double const bound = validation::two_sided_quantile(0.01);
  simulation draw{std::mt19937_64(11), {}};
  int alarms = 0;
  constexpr int trials = 40000;
  for (int i = 0; i < trials; ++i) {
    estimate const e = draw(2, 1);
    double const student = bound + (bound * bound * bound + bound) / (4 * double(batches - 1));
    alarms += std::abs(e.mean - 2) >= student * e.error;
  }
  CHECK(alarms > 300);  // 400 expected, a deviation of 20
  CHECK(alarms < 500);
}

TEST_CASE("a verdict of several is the worst") {
  using validation::worse_of;
  CHECK(worse_of(verdict::held, verdict::not_decided) == verdict::not_decided);
  CHECK(worse_of(verdict::not_held, verdict::not_decided) == verdict::not_held);
  CHECK(worse_of(verdict::held, verdict::held) == verdict::held);
}
