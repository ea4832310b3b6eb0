// SPDX-License-Identifier: Apache-2.0
#include <rflow/poincare.hpp>

#include <cmath>
#include <limits>
#include <numbers>
#include <random>

#include <doctest/doctest.h>

#include <rflow/variance.hpp>

using doctest::Approx;
using rflow::order;
using rflow::ordering;
using rflow::poincare_bounds;

namespace {

constexpr double pi = std::numbers::pi;

using chain = std::vector<Eigen::MatrixXd>;

/// cot²(π/2n): λ_max / λ_1 of the path graph on n vertices.
double energy_ratio(int n) { return 1 / std::pow(std::tan(pi / (2.0 * n)), 2); }

chain random_chain(std::mt19937& bits, std::size_t sites, double smoothness) {
  std::normal_distribution<double> normal;
  chain out(sites);
  for (std::size_t l = 0; l < sites; ++l) {
    out[l] = Eigen::MatrixXd::NullaryExpr(3, 4, [&] { return normal(bits); });
    if (l > 0) out[l] += smoothness * out[l - 1];
  }
  return out;
}

}  // namespace

TEST_CASE("the smallest eigenvalue of the path graph") {
  CHECK(1 / poincare_bounds(1, 5).upper == Approx(0.3819660112501052).epsilon(1e-14));
  CHECK(1 / poincare_bounds(1, 16).upper == Approx(0.03842943919353943).epsilon(1e-14));
  // The largest is 4 minus the smallest; for two sites they are one.
  for (std::ptrdiff_t const n : {2, 3, 5, 16, 33, 1000})
    CHECK(1 / poincare_bounds(1, n).lower + 1 / poincare_bounds(1, n).upper ==
          Approx(4).epsilon(1e-14));
  CHECK(poincare_bounds(1, 2).lower == Approx(0.5).epsilon(1e-15));
  CHECK(poincare_bounds(1, 2).upper == Approx(0.5).epsilon(1e-15));
  CHECK(poincare_bounds(1, 3).upper == Approx(1).epsilon(1e-15));
  CHECK(poincare_bounds(1, 3).lower == Approx(1.0 / 3).epsilon(1e-15));
}

TEST_CASE("the bounds are the extreme eigenvalues of the Laplacian") {
  for (Eigen::Index const n : {2, 3, 7, 20}) {
    Eigen::MatrixXd laplacian = Eigen::MatrixXd::Zero(n, n);
    for (Eigen::Index l = 0; l + 1 < n; ++l) {
      laplacian(l, l) += 1;
      laplacian(l + 1, l + 1) += 1;
      laplacian(l, l + 1) = laplacian(l + 1, l) = -1;
    }
    // Eigenvectors by their closed form: checked here, not assumed.
    for (Eigen::Index const k : {Eigen::Index{1}, n - 1}) {
      Eigen::VectorXd v(n);
      for (Eigen::Index l = 0; l < n; ++l)
        v(l) = std::cos(pi * static_cast<double>(k) * (static_cast<double>(l) + 0.5) /
                        static_cast<double>(n));
      double const lambda = v.dot(laplacian * v) / v.squaredNorm();
      CHECK((laplacian * v - lambda * v).norm() < 1e-13 * v.norm() * static_cast<double>(n));
      rflow::bounds const b = poincare_bounds(1, n);
      CHECK(lambda == Approx(1 / (k == 1 ? b.upper : b.lower)).epsilon(1e-12));
    }
  }
}

TEST_CASE("extremal chains attain the bounds") {
  Eigen::MatrixXd const direction = Eigen::MatrixXd::Random(6, 10);
  Eigen::MatrixXd const offset = Eigen::MatrixXd::Random(6, 10);
  for (int const n : {2, 3, 5, 16, 33}) {
    CAPTURE(n);
    chain smooth, rough;
    for (int l = 0; l < n; ++l) {
      double const angle = pi * (l + 0.5) / n;
      smooth.push_back(offset + std::cos(angle) * direction);
      rough.push_back(offset + (l % 2 == 0 ? 1 : -1) * std::sin(angle) * direction);
    }
    for (auto const by : {rflow::normalization::none, rflow::normalization::per_token,
                          rflow::normalization::per_element, rflow::normalization::relative}) {
      rflow::layer_variance const s = rflow::variance(rflow::layer_stack(smooth), by);
      rflow::layer_variance const r = rflow::variance(rflow::layer_stack(rough), by);
      CHECK(poincare_bounds(s.path_energy, n).upper == Approx(n * s.st2 * s.st2).epsilon(1e-12));
      CHECK(poincare_bounds(r.path_energy, n).lower == Approx(n * r.st2 * r.st2).epsilon(1e-12));
    }
  }
}

TEST_CASE("random chains keep within the bounds, and a certificate is never wrong") {
  std::mt19937 bits(21);
  int decided = 0;
  for (int trial = 0; trial < 300; ++trial) {
    CAPTURE(trial);
    std::size_t const n_a = 2 + bits() % 20, n_b = 2 + bits() % 20;
    double const scale = std::exp(static_cast<double>(bits() % 800) / 100 - 4);
    chain const a = random_chain(bits, n_a, static_cast<double>(bits() % 3) / 2);
    chain b = random_chain(bits, n_b, static_cast<double>(bits() % 3) / 2);
    for (auto& layer : b) layer *= scale;
    auto const va = rflow::variance(rflow::layer_stack(a)),
               vb = rflow::variance(rflow::layer_stack(b));
    auto const sites_a = static_cast<std::ptrdiff_t>(n_a),
               sites_b = static_cast<std::ptrdiff_t>(n_b);
    double const spread = static_cast<double>(n_a) * va.st2 * va.st2;
    CHECK(poincare_bounds(va.path_energy, sites_a).lower <= spread * (1 + 1e-12));
    CHECK(poincare_bounds(va.path_energy, sites_a).upper >= spread * (1 - 1e-12));
    ordering const verdict = order(va.path_energy, sites_a, vb.path_energy, sites_b);
    ordering const reverse = order(vb.path_energy, sites_b, va.path_energy, sites_a);
    if (verdict == ordering::certified_greater) {
      ++decided;
      CHECK(va.st2 > vb.st2);
      CHECK(reverse == ordering::certified_less);
    } else if (verdict == ordering::certified_less) {
      ++decided;
      CHECK(va.st2 < vb.st2);
      CHECK(reverse == ordering::certified_greater);
    } else {
      CHECK(reverse == ordering::undecided);
    }
  }
  CHECK(decided > 20);
  CHECK(decided < 280);
}

TEST_CASE("two chains of one length need an energy ratio above cot²(π/2n)") {
  for (int const n : {3, 5, 16, 33, 100}) {
    CAPTURE(n);
    double const ratio = energy_ratio(n);
    CHECK(order(ratio * (1 + 1e-9), n, 1, n) == ordering::certified_greater);
    CHECK(order(1, n, ratio * (1 + 1e-9), n) == ordering::certified_less);
    CHECK(order(ratio * (1 - 1e-9), n, 1, n) == ordering::undecided);
    CHECK(order(1, n, ratio * (1 - 1e-9), n) == ordering::undecided);
  }
  // Both bounds coincide for two sites: the larger energy decides.
  CHECK(order(1, 2, 1 - 1e-9, 2) == ordering::certified_greater);
  CHECK(energy_ratio(33) == Approx(441).epsilon(1e-3));
  CHECK(order(440, 33, 1, 33) == ordering::undecided);
  CHECK(order(442, 33, 1, 33) == ordering::certified_greater);
}

TEST_CASE("chains of different length are compared per site") {
  // E_a / (n_a λ_max(n_a)) against E_b / (n_b λ_1(n_b)).
  auto const lambda_1 = [](int n) { return 4 * std::pow(std::sin(pi / (2.0 * n)), 2); };
  auto const lambda_max = [](int n) { return 4 * std::pow(std::cos(pi / (2.0 * n)), 2); };
  struct lengths {
    int a, b;
  };
  for (lengths const& n : {lengths{5, 16}, lengths{16, 5}, lengths{2, 33}}) {
    int const a = n.a, b = n.b;
    CAPTURE(a);
    CAPTURE(b);
    double const border = a * lambda_max(a) / (b * lambda_1(b));
    CHECK(order(border * (1 + 1e-9), a, 1, b) == ordering::certified_greater);
    CHECK(order(border * (1 - 1e-9), a, 1, b) == ordering::undecided);
    CHECK(order(1, b, border * (1 + 1e-9), a) == ordering::certified_less);
  }
}

TEST_CASE("nothing is certain of equal, zero or unknown energies") {
  double const nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(order(1, 8, 1, 8) == ordering::undecided);
  CHECK(order(1, 2, 1, 2) == ordering::undecided);
  CHECK(order(0, 8, 0, 5) == ordering::undecided);
  CHECK(order(1e-300, 8, 0, 8) == ordering::certified_greater);
  CHECK(order(0, 8, 1e-300, 8) == ordering::certified_less);
  CHECK(order(nan, 8, 1, 8) == ordering::undecided);
  CHECK(order(1, 8, nan, 8) == ordering::undecided);
  CHECK(std::isnan(poincare_bounds(nan, 8).lower));
  CHECK(std::isnan(poincare_bounds(nan, 8).upper));
  CHECK(poincare_bounds(0, 8).lower == 0);
  CHECK(poincare_bounds(0, 8).upper == 0);
}

TEST_CASE("a bound no double holds is out of range, and an order is still decided") {
  double const most = std::numeric_limits<double>::max();
  rflow::bounds const far = poincare_bounds(1e308, 33);
  CHECK(far.lower == Approx(1e308 / (4 * std::pow(std::cos(pi / 66), 2))).epsilon(1e-14));
  CHECK(far.upper.why == rflow::status::out_of_range);
  CHECK(std::isnan(far.upper.value));
  CHECK(poincare_bounds(std::nan(""), 8).upper.why == rflow::status::non_finite);
  for (int const n : {2, 5, 33, 1000})
    for (double const energy : {most, 1e300, 1e-300, 5e-324}) {
      rflow::bounds const b = poincare_bounds(energy, n);
      CHECK(b.lower.ok());
      CHECK(std::isfinite(b.lower.value));
      CHECK(b.upper.ok() == std::isfinite(b.upper.value));
      CHECK((b.upper.ok() || b.upper.why == rflow::status::out_of_range));
    }
  CHECK(order(most, 33, 1e300, 33) == ordering::certified_greater);
  CHECK(order(1e300, 33, most, 33) == ordering::certified_less);
  CHECK(order(most, 33, most, 33) == ordering::undecided);
  CHECK(order(most, 33, most / 440, 33) == ordering::undecided);
  CHECK(order(most, 33, most / 442, 33) == ordering::certified_greater);
}

TEST_CASE("a chain of one site and a negative energy are refused") {
  double const infinity = std::numeric_limits<double>::infinity();
  CHECK_THROWS_WITH_AS(poincare_bounds(infinity, 5),
                       "rflow::poincare_bounds: path energy is infinite", std::invalid_argument);
  CHECK_THROWS_AS(order(1, 5, infinity, 5), std::invalid_argument);

  CHECK_THROWS_WITH_AS(poincare_bounds(1, 1),
                       "rflow::poincare_bounds: a chain needs at least 2 sites, not 1",
                       std::invalid_argument);
  CHECK_THROWS_AS(poincare_bounds(1, 0), std::invalid_argument);
  CHECK_THROWS_AS(poincare_bounds(1, -3), std::invalid_argument);
  CHECK_THROWS_WITH_AS(poincare_bounds(-2, 5),
                       "rflow::poincare_bounds: path energy is negative: -2.000000",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(order(1, 5, 1, 1), "rflow::order: a chain needs at least 2 sites, not 1",
                       std::invalid_argument);
  CHECK_THROWS_AS(order(1, 1, 1, 5), std::invalid_argument);
  CHECK_THROWS_AS(order(-1, 5, 1, 5), std::invalid_argument);
  CHECK_THROWS_WITH_AS(order(1, 5, -1, 5), "rflow::order: path energy is negative: -1.000000",
                       std::invalid_argument);
}
