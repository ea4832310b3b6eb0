// SPDX-License-Identifier: Apache-2.0

// What backends decide alike about kernel matrices, against sums written out.

#include <rflow/detail/numerics.hpp>

#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include <doctest/doctest.h>

namespace {

using rflow::detail::centre_limit;
using rflow::detail::u_centring;

double limit_of(std::vector<double> const& norms) {
  double trace = 0, largest = 0;
  for (double const a : norms) trace += a, largest = std::max(largest, a);
  std::vector<double> scratch;
  return centre_limit(norms, trace, largest, scratch);
}

}  // namespace

TEST_CASE("numerics: the mean is the centre unless a token is far out") {
  std::vector<double> norms(100, 1.);
  CHECK(std::isinf(limit_of(norms)));
  norms[7] = 9;
  CHECK(std::isinf(limit_of(norms)));
  norms[7] = 1e4;
  CHECK(limit_of(norms) == 1);
  CHECK(std::isinf(limit_of({1, 1, 1e9})));  // too few to tell
  CHECK(limit_of({1, 1, 1, 1, 16}) == 1);    // one of five tokens at M: 16 times the others
  CHECK(std::isinf(limit_of(std::vector<double>(5))));  // all equal
}

TEST_CASE("numerics: sums of pairs keep what stands beside a huge one") {
  std::vector<double> const a{1e20, 1, 2, 3};
  CHECK(rflow::detail::sum_of_pairs(a) == doctest::Approx(2e20 * 6 + 36 - 14).epsilon(1e-15));
  CHECK(rflow::detail::sum_of_pairs(std::vector<double>{5}) == 0);
  CHECK(rflow::detail::sum_of_pairs({}) == 0);
  CHECK(rflow::detail::median_of(std::vector<double>{5, 1, 4, 2}) == 2);
  CHECK(rflow::detail::median_of({}) == 0);
}

TEST_CASE("numerics: a linear kernel about any centre is U-centred by its norms and row sums") {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    INFO("seed " << seed);
    std::mt19937 g(seed);
    std::normal_distribution<double> normal;
    std::size_t const n = 3 + g() % 20, d = 1 + g() % 6;
    std::vector<double> x(n * d), mean(d);
    for (double& v : x) v = normal(g) + 0.7;  // about 0: not their mean
    for (std::size_t i = 0; i < n * d; ++i) mean[i % d] += x[i] / static_cast<double>(n);
    auto const kernel = [&](std::size_t i, std::size_t j, bool centred) {
      double sum = 0;
      for (std::size_t k = 0; k < d; ++k)
        sum += (x[i * d + k] - centred * mean[k]) * (x[j * d + k] - centred * mean[k]);
      return sum;
    };
    std::vector<double> norms(n), rows(n), centred_norms(n);
    for (std::size_t i = 0; i < n; ++i) {
      norms[i] = kernel(i, i, false);
      centred_norms[i] = kernel(i, i, true);
      for (std::size_t j = 0; j < n; ++j) rows[i] += i == j ? 0 : kernel(i, j, false);
    }
    u_centring any, about_mean;
    any.fit(norms, rows, static_cast<std::ptrdiff_t>(d), 0x1p-53);
    about_mean.fit(centred_norms, {}, static_cast<std::ptrdiff_t>(d), 0x1p-53);
    for (std::size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (std::size_t j = 0; j < n; ++j) {
        if (i == j) continue;
        double const u = kernel(i, j, false) - any.shift[i] - any.shift[j];
        sum += u;
        CHECK(u == doctest::Approx(kernel(i, j, true) - about_mean.shift[i] - about_mean.shift[j])
                       .epsilon(1e-10));
        CHECK(u + any.removed[i] + any.removed[j] ==
              doctest::Approx(kernel(i, j, true)).epsilon(1e-10));
      }
      CHECK(std::abs(sum) < 1e-11 * (1 + norms[i]) * static_cast<double>(n * d));
    }
  }
}
