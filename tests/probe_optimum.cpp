// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstddef>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <Eigen/Core>
#include <nlohmann/json.hpp>

#include <rflow/probe_optimum.hpp>

namespace {

using doctest::Approx;
using rflow::status;
using labels = std::vector<int>;

/// Three overlapping clusters.
template <class T>
Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic> overlapping(labels& y, int tokens, int width) {
  std::mt19937 bits(3);
  std::normal_distribution<double> normal;
  Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic> x(tokens, width);
  for (int i = 0; i < tokens; ++i) {
    y.push_back(i % 3);
    for (int j = 0; j < width; ++j) x(i, j) = static_cast<T>(normal(bits) + 1.5 * (j == i % 3));
  }
  return x;
}

}  // namespace

// tests/reference/probe_reference.py makes the same data and writes what scikit-learn finds.
TEST_CASE("probe_optimum: scikit-learn's LogisticRegression") {
  constexpr std::ptrdiff_t n = 120, d = 17, classes = 4;
  Eigen::MatrixXd x(n, d);
  labels y;
  rflow::probe_options o{.seeds = 1};
  for (std::ptrdiff_t i = 0; i < n; ++i) {
    auto const u = static_cast<double>(i);
    for (std::ptrdiff_t j = 0; j < d; ++j) {
      auto const v = static_cast<double>(j);
      x(i, j) = 3 + std::sin(0.7 * u + 1.3 * v) + 0.5 * std::cos(0.37 * u * (v + 1)) +
                0.3 * (j % classes == i % classes);
    }
    y.push_back(static_cast<int>(i % 7 == 0 ? i / 7 % classes : i % classes));
    if (i % 5 == 2) o.validation.push_back(i);
  }
  std::ifstream file(std::string(RFLOW_SOURCE_DIR) + "/tests/reference/probe_reference.json");
  REQUIRE(file);
  auto const found = rflow::probe(x, y, o);
  auto const reference = nlohmann::json::parse(file);
  for (auto const& of : reference.at("optimum")) {
    CAPTURE(of.at("ridge").get<double>());
    // A gradient of 1e-6 is about what rounding of the loss lets a line search find, and leaves at
    // most its square over twice the ridge in the objective, itself over the ridge in the weights.
    double const ridge = of.at("ridge");
    auto const best = rflow::optimum_of(x, y, o, found, {.ridge = ridge, .tolerance = 1e-6});
    CHECK(best.converged);
    auto const& seed = best.seeds[0];
    CHECK(seed.objective == Approx(of.at("objective").get<double>()).epsilon(1e-8));
    CHECK(seed.train_loss == Approx(of.at("mean_loss").get<double>()).epsilon(1e-5));
    CHECK(seed.validation_accuracy == Approx(of.at("validation_accuracy").get<double>()));
    for (std::size_t c = 0; c < classes; ++c)
      for (std::size_t j = 0; j < d; ++j)
        CHECK(std::abs(seed.weight[c * d + j] - of.at("weight")[c][j].get<double>()) <
              1e-5 + 1e-6 / ridge);
  }
}

TEST_CASE("probe_optimum: a short run is far, a long one near, both ends are the same") {
  labels y;
  auto const x = overlapping<float>(y, 300, 10);
  double objective = 0, gap = 1e9;
  for (int const epochs : {3, 30, 1000}) {
    CAPTURE(epochs);
    rflow::probe_options const o{.epochs = epochs, .weight_decay = 0.01, .seeds = 3};
    auto const found = rflow::probe(x, y, o);
    auto const best = rflow::optimum_of(x, y, o, found, {.ridge = 0.01});
    CHECK(best.converged);
    CHECK(best.gradient_norm <= 1e-6);
    if (epochs <= 30) CHECK(best.evaluations > 1);
    CHECK(best.objective_gap.mean >= -1e-6);
    CHECK(best.objective_gap.mean < 0.7 * gap);
    gap = best.objective_gap.mean;
    if (epochs > 3) CHECK(best.seeds[0].objective == Approx(objective).epsilon(1e-8));
    objective = best.seeds[0].objective;
    CHECK(best.loss_gap.mean ==
          Approx(found.train_loss.mean -
                 (best.seeds[0].train_loss + best.seeds[1].train_loss + best.seeds[2].train_loss) /
                     3));
  }
  CHECK(gap < 1e-5);  // Adam with this decay minimises the same objective
}

TEST_CASE("probe_optimum: the ridge is on what each seed sees") {
  labels y;
  Eigen::MatrixXd x = overlapping<double>(y, 150, 6);
  rflow::probe_options const o{.epochs = 10, .seeds = 2, .standardize = true};
  auto const a = rflow::optimum_of(x, y, o, rflow::probe(x, y, o));
  x.col(1) *= 1000;
  x.array() += 5;
  auto const b = rflow::optimum_of(x, y, o, rflow::probe(x, y, o));
  CHECK(a.converged);
  CHECK(b.converged);
  for (std::size_t p = 0; p < 2; ++p)
    CHECK(a.seeds[p].objective == Approx(b.seeds[p].objective.value).epsilon(1e-8));
}

TEST_CASE("probe_optima: sites without an answer, and probes that do not belong") {
  labels y;
  auto const x = overlapping<float>(y, 60, 5);
  std::vector<Eigen::MatrixXf> const sites{x, Eigen::MatrixXf::Constant(60, 5, 2)};
  rflow::layer_stack const stack(sites);
  rflow::probe_options o{.epochs = 5, .seeds = 2, .keep_weights = true};
  auto const found = rflow::probe_layers(stack, y, o);
  auto const best = rflow::probe_optima(stack, y, o, found);
  CHECK(best[0].loss_gap.mean.ok());
  CHECK(best[1].why == status::constant_layer);
  CHECK(best[1].loss_gap.mean.why == status::constant_layer);
  o.seeds = 3;
  CHECK_THROWS_WITH_AS(rflow::probe_optima(stack, y, o, found),
                       "rflow::probe_optima: the probe has 2 seeds, 3 classes x 5 features, the "
                       "options and activations say 3, 3 x 5",
                       std::invalid_argument);
  o.seeds = 2;
  o.keep_weights = false;
  CHECK_THROWS_WITH_AS(rflow::probe_optima(stack, y, o, rflow::probe_layers(stack, y, o)),
                       "rflow::probe_optima: the probe has 2 seeds, 3 classes x 5 features and no "
                       "weights (keep_weights), the options and activations say 2, 3 x 5",
                       std::invalid_argument);
  CHECK_THROWS_AS(rflow::probe_optima(stack, y, o, rflow::layer_probes{}), std::invalid_argument);
}

TEST_CASE("probe_optimum: features of any size give numbers or a reason") {
  for (double const size : {1e-160, 1e100, 1e160, 1e200, 1e300}) {
    CAPTURE(size);
    labels y;
    Eigen::MatrixXd const x = size * overlapping<double>(y, 60, 4);
    for (bool const standardize : {false, true}) {
      rflow::probe_options const o{.epochs = 5, .seeds = 2, .standardize = standardize};
      auto const found = rflow::probe(x, y, o);
      auto const best = rflow::optimum_of(x, y, o, found, {.max_iterations = 20});
      auto const is_number_or_reason = [](rflow::measured const& v) {
        CHECK(v.ok() == std::isfinite(v.value));
      };
      is_number_or_reason(best.gradient_norm);
      for (auto const* gap : {&best.objective_gap, &best.loss_gap, &best.train_accuracy_gap,
                              &best.validation_accuracy_gap}) {
        is_number_or_reason(gap->mean);
        is_number_or_reason(gap->spread);
      }
      for (auto const& seed : best.seeds) {
        is_number_or_reason(seed.objective);
        is_number_or_reason(seed.train_loss);
        is_number_or_reason(seed.validation_loss);
      }
      if (standardize) CHECK(best.objective_gap.mean > -1e-9);
    }
  }
  labels y;
  auto const x = overlapping<double>(y, 60, 4);
  rflow::probe_options const o{.epochs = 2, .seeds = 1};
  auto const found = rflow::probe(x, y, o);
  for (double const bad : {std::nan(""), HUGE_VAL, -1.}) {
    CHECK_THROWS_AS(rflow::optimum_of(x, y, o, found, {.ridge = bad}), std::invalid_argument);
    CHECK_THROWS_AS(rflow::optimum_of(x, y, o, found, {.tolerance = bad}), std::invalid_argument);
  }
}
