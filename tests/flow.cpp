// SPDX-License-Identifier: Apache-2.0
#include <rflow/flow.hpp>

#include <cstring>
#include <limits>
#include <random>

#include <doctest/doctest.h>

#include "reference.hpp"

using doctest::Approx;
using rflow::status;

namespace {

template <class T>
void compare_with_definitions(reference::stack x, std::vector<T> const& values,
                              rflow::layer_stack<T> const& stack,
                              std::vector<std::size_t> const& sequence = {}) {
  static_cast<void>(values);
  double const within = reference::tolerance<T>;
  rflow::flow_report const r = rflow::flow(stack, {.per_token = true});
  std::size_t const sites = x.size(), tokens = x[0].size();
  REQUIRE(r.sites == static_cast<std::ptrdiff_t>(sites));
  REQUIRE(r.tokens == static_cast<std::ptrdiff_t>(tokens));

  double energy = 0, length = 0, squares = 0;
  for (std::size_t l = 0; l < sites; ++l) {
    CHECK(std::abs(r.inter_token[l] - reference::inter_token(x[l], sequence)) < within);
    double const square = reference::inner(x[l], x[l]);
    squares += square;
    CHECK(r.rms_norm[l] == Approx(std::sqrt(square / static_cast<double>(tokens))).epsilon(within));
    for (std::size_t i = 0; i < tokens; ++i)
      CHECK(r.norms[l][i] == Approx(std::sqrt(reference::dot(x[l][i], x[l][i]))).epsilon(within));
    if (l == 0) continue;
    double mean = 0, square_mean = 0;
    for (std::size_t i = 0; i < tokens; ++i) {
      double const c = reference::cosine(x[l - 1][i], x[l][i]);
      CHECK(std::abs(r.adjacent[l - 1].per_token[i] - c) < within);
      mean += c / static_cast<double>(tokens);
      square_mean += c * c / static_cast<double>(tokens);
    }
    CHECK(std::abs(r.adjacent[l - 1].mean - mean) < within);
    CHECK(std::abs(r.adjacent[l - 1].stddev - std::sqrt(std::max(0.0, square_mean - mean * mean))) <
          std::sqrt(within) / 10);
    reference::matrix const step = reference::minus(x[l], x[l - 1]);
    double const step2 = reference::inner(step, step);
    energy += step2;
    length += std::sqrt(step2);
    CHECK(r.variance.steps[l - 1] == Approx(std::sqrt(step2)).epsilon(within));
    if (l < 2) continue;
    reference::matrix const before = reference::minus(x[l - 1], x[l - 2]);
    double const angle = std::acos(reference::inner(before, step) /
                                   std::sqrt(reference::inner(before, before) * step2));
    CHECK(std::abs(r.variance.curvature[l - 2] - angle) < 10 * within);
  }
  if (sites < 2) {
    CHECK(r.variance.st1.why == status::too_few_sites);
    return;
  }
  double const spread = reference::spread(x);
  CHECK(r.variance.path_energy == Approx(energy).epsilon(within));
  CHECK(r.variance.path_length == Approx(length).epsilon(within));
  CHECK(r.variance.st1 ==
        Approx(std::sqrt(energy / static_cast<double>(sites - 1))).epsilon(within));
  CHECK(r.variance.st2 == Approx(std::sqrt(spread / static_cast<double>(sites))).epsilon(within));
  CHECK(r.spread_bounds.lower <= spread * (1 + within));
  CHECK(r.spread_bounds.upper >= spread * (1 - within));

  using rflow::normalization;
  double const n = static_cast<double>(tokens), d = static_cast<double>(x[0][0].size());
  for (auto const& [by, factor] :
       {std::pair{normalization::per_token, 1 / n},
        std::pair{normalization::per_element, 1 / n / d},
        std::pair{normalization::relative, static_cast<double>(sites) / squares}}) {
    rflow::layer_variance const v = rflow::variance(stack, by);
    CHECK(v.factor == Approx(factor).epsilon(within));
    CHECK(v.st1 == Approx(r.variance.st1 * std::sqrt(factor)).epsilon(within));
    CHECK(v.st2 == Approx(r.variance.st2 * std::sqrt(factor)).epsilon(within));
    CHECK(v.path_energy == Approx(energy * factor).epsilon(within));
    CHECK(v.path_length == Approx(length * std::sqrt(factor)).epsilon(within));
    CHECK(v.curvature.size() == r.variance.curvature.size());
  }
}

}  // namespace

TEST_CASE_TEMPLATE("flow agrees with the definitions for random shapes", T, float, double,
                   rflow::f16, rflow::bf16) {
  for (unsigned seed = 1; seed <= 24; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const sites = 1 + bits() % 11, tokens = 2 + bits() % 40, width = 1 + bits() % 150;
    CAPTURE(sites);
    CAPTURE(tokens);
    CAPTURE(width);
    reference::stack x = reference::random_stack(bits, sites, tokens, width);
    std::vector<T> const values = reference::pack<T>(x);
    compare_with_definitions(x, values, reference::stack_of(values, x));
  }
}

TEST_CASE("flow sums long rows in double") {
  std::mt19937 bits(5);
  reference::stack x = reference::random_stack(bits, 3, 3, 20011);
  std::vector<float> const values = reference::pack<float>(x);
  compare_with_definitions(x, values, reference::stack_of(values, x));
}

TEST_CASE_TEMPLATE("flow does not care how activations lie in memory", T, float, double,
                   rflow::bf16) {
  std::mt19937 bits(7);
  std::ptrdiff_t const s = 6, n = 13, d = 37;
  reference::stack x = reference::random_stack(bits, 6, 13, 37);
  std::vector<T> const dense = reference::pack<T>(x);
  auto const at = [&](std::ptrdiff_t l, std::ptrdiff_t i, std::ptrdiff_t j) {
    return dense[static_cast<std::size_t>((l * n + i) * d + j)];
  };
  using rflow::axes;
  struct layout {
    axes order;
    rflow::stack_strides strides;
  };
  for (layout const& l : {layout{axes::sites_tokens_hidden, {n * d, d, 1}},
                          layout{axes::sites_hidden_tokens, {n * d, 1, n}},
                          layout{axes::tokens_sites_hidden, {d, s * d, 1}},
                          layout{axes::tokens_hidden_sites, {1, s * d, s}},
                          layout{axes::hidden_sites_tokens, {n, 1, s * n}},
                          layout{axes::hidden_tokens_sites, {1, s, s * n}}}) {
    std::vector<T> other(dense.size());
    for (std::ptrdiff_t a = 0; a < s; ++a)
      for (std::ptrdiff_t b = 0; b < n; ++b)
        for (std::ptrdiff_t c = 0; c < d; ++c)
          other[static_cast<std::size_t>(a * l.strides.site + b * l.strides.token +
                                         c * l.strides.hidden)] = at(a, b, c);
    compare_with_definitions(x, other, rflow::layer_stack<T>(other.data(), {s, n, d}, l.order));
    compare_with_definitions(x, other, rflow::layer_stack<T>(other.data(), {s, n, d}, l.strides));
  }
  // Tokens and features backwards: negative strides, the same figures.
  reference::stack reversed = x;
  for (auto& site : reversed) {
    std::reverse(site.begin(), site.end());
    for (auto& row : site) std::reverse(row.begin(), row.end());
  }
  compare_with_definitions(
      reversed, dense, rflow::layer_stack<T>(dense.data() + n * d - 1, {s, n, d}, {n * d, -d, -1}));
  // Stride 0: every token is the same token.
  reference::stack repeated = x;
  for (auto& site : repeated)
    for (auto& row : site) row = site[0];
  compare_with_definitions(repeated, dense,
                           rflow::layer_stack<T>(dense.data(), {s, n, d}, {n * d, 0, 1}));
}

TEST_CASE("masked tokens are left out and sequences never pair with one another") {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const tokens = 30 + bits() % 80;
    reference::stack x = reference::random_stack(bits, 4, tokens, 19);
    std::vector<float> const values = reference::pack<float>(x);
    std::vector<std::ptrdiff_t> offsets{0};
    std::vector<std::size_t> sequence(tokens);
    while (offsets.back() < static_cast<std::ptrdiff_t>(tokens)) {
      auto const length = static_cast<std::ptrdiff_t>(bits() % 30);  // 0: an empty sequence
      offsets.push_back(std::min(offsets.back() + length, static_cast<std::ptrdiff_t>(tokens)));
    }
    for (std::size_t q = 0; q + 1 < offsets.size(); ++q)
      for (auto i = offsets[q]; i < offsets[q + 1]; ++i) sequence[static_cast<std::size_t>(i)] = q;
    std::vector<int> mask(tokens);
    for (int& m : mask) m = bits() % 4 != 0;

    compare_with_definitions(x, values, reference::stack_of(values, x).sequences(offsets),
                             sequence);

    reference::stack kept(x.size());
    std::vector<std::size_t> kept_sequence;
    for (std::size_t i = 0; i < tokens; ++i) {
      if (mask[i] == 0) continue;
      kept_sequence.push_back(sequence[i]);
      for (std::size_t l = 0; l < x.size(); ++l) kept[l].push_back(x[l][i]);
    }
    compare_with_definitions(kept, values,
                             reference::stack_of(values, x).tokens(mask).sequences(offsets),
                             kept_sequence);
    compare_with_definitions(kept, values,
                             reference::stack_of(values, x).sequences(offsets).tokens(mask),
                             kept_sequence);
  }
}

TEST_CASE("the same bits for any number of threads") {
  std::mt19937 bits(11);
  reference::stack x = reference::random_stack(bits, 5, 333, 70);
  std::vector<float> const values = reference::pack<float>(x);
  auto const stack = reference::stack_of(values, x).sequences({0, 100, 333});
  using rflow::flow_part;
  for (auto const part : {flow_part::all, flow_part::inter_token, flow_part::adjacent})
    for (int const threads : {2, 3, 7, 32}) {
      rflow::flow_moments const one = rflow::on_cpu{.threads = 1}.flow(stack, {.part = part});
      rflow::flow_moments const many =
          rflow::on_cpu{.threads = threads}.flow(stack, {.part = part});
      std::vector<double> const a = rflow::to_numbers(one), b = rflow::to_numbers(many);
      REQUIRE(a.size() == b.size());
      CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
    }
}

TEST_CASE_TEMPLATE("zero rows are left out and counted", T, float, double) {
  std::mt19937 bits(3);
  reference::stack x = reference::random_stack(bits, 3, 20, 33);
  std::fill(x[1][4].begin(), x[1][4].end(), 0.0);
  std::fill(x[1][19].begin(), x[1][19].end(), 0.0);
  std::vector<T> const values = reference::pack<T>(x);
  rflow::flow_report const r = rflow::flow(reference::stack_of(values, x), {.per_token = true});
  CHECK(r.zero_rows == std::vector<std::ptrdiff_t>{0, 2, 0});
  CHECK(r.adjacent[0].left_out == 2);
  CHECK(std::isnan(r.adjacent[1].per_token[4]));
  CHECK(std::abs(r.inter_token[1] - reference::inter_token(x[1])) < reference::tolerance<T>);
  CHECK(std::abs(r.inter_token[2] - reference::inter_token(x[2])) < reference::tolerance<T>);
  double const spread = reference::spread(x);
  CHECK(r.variance.st2 == Approx(std::sqrt(spread / 3)).epsilon(reference::tolerance<T>));

  for (auto& row : x[1]) std::fill(row.begin(), row.end(), 0.0);
  std::vector<T> const none = reference::pack<T>(x);
  rflow::flow_report const z = rflow::flow(reference::stack_of(none, x));
  CHECK(z.inter_token[1].why == status::zero_rows);
  CHECK(z.adjacent[0].mean.why == status::zero_rows);
  CHECK(z.inter_token[0].ok());
}

TEST_CASE_TEMPLATE("a NaN or infinity spoils only what it takes part in", T, float, double,
                   rflow::f16, rflow::bf16) {
  for (double const poison :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity()}) {
    std::mt19937 bits(9);
    reference::stack x = reference::random_stack(bits, 5, 21, 40);
    reference::stack const good = x;
    x[2][7][39] = poison;
    x[2][13][0] = poison;
    std::vector<T> const values = reference::pack<T>(x);
    rflow::flow_report const r = rflow::flow(reference::stack_of(values, x), {.per_token = true});
    CHECK(r.non_finite[2].token == 7);
    CHECK(r.non_finite[2].feature == 39);
    CHECK_FALSE(r.non_finite[1].found());
    CHECK(r.inter_token[2].why == status::non_finite);
    CHECK(r.rms_norm[2].why == status::non_finite);
    CHECK(r.adjacent[1].mean.why == status::non_finite);
    CHECK(r.adjacent[2].mean.why == status::non_finite);
    CHECK(r.variance.st1.why == status::non_finite);
    CHECK(r.variance.st2.why == status::non_finite);
    CHECK(std::isnan(r.spread_bounds.lower));
    CHECK(r.variance.steps[1].why == status::non_finite);
    CHECK(r.variance.curvature[0].why == status::non_finite);
    double const within = std::same_as<T, rflow::bf16> ? 0.01 : 1e-3;  // `good` is not rounded
    CHECK(r.inter_token[1] == Approx(reference::inter_token(good[1])).epsilon(within));
    CHECK(r.inter_token[3] == Approx(reference::inter_token(good[3])).epsilon(within));
    reference::matrix const step = reference::minus(good[4], good[3]);
    CHECK(r.variance.steps[3] == Approx(std::sqrt(reference::inner(step, step))).epsilon(within));
    CHECK(r.adjacent[3].mean.ok());
    CHECK(r.adjacent[3].left_out == 0);
  }
}

TEST_CASE("figures scale with the data down to the edge of its type") {
  std::mt19937 bits(13);
  reference::stack x = reference::random_stack(bits, 4, 12, 50);
  std::vector<float> const values = reference::pack<float>(x);
  rflow::flow_report const base = rflow::flow(reference::stack_of(values, x));
  for (float const scale : {1e-30f, 1e-12f, 1e-6f, 1e6f, 1e18f, 1e30f}) {
    CAPTURE(scale);
    std::vector<float> scaled = values;
    for (float& v : scaled) v *= scale;
    rflow::flow_report const r = rflow::flow(reference::stack_of(scaled, x));
    for (std::size_t l = 0; l < 4; ++l)
      CHECK(std::abs(r.inter_token[l] - base.inter_token[l]) < 1e-5);
    CHECK(r.variance.st2 == Approx(base.variance.st2 * static_cast<double>(scale)).epsilon(1e-5));
    CHECK(r.variance.path_length ==
          Approx(base.variance.path_length * static_cast<double>(scale)).epsilon(1e-5));
    CHECK(r.variance.curvature[1] == Approx(base.variance.curvature[1]).epsilon(1e-4));
  }
  std::vector<double> huge(values.begin(), values.end());
  for (double& v : huge) v *= 1e150;
  rflow::flow_report const r = rflow::flow(reference::stack_of(huge, x));
  CHECK(r.inter_token[2] == Approx(base.inter_token[2]).epsilon(1e-5));
}

TEST_CASE("one site far larger than another, and rows of subnormals, spoil nothing") {
  std::vector<double> const far{1e150, 1, 1, 1e-13, 1e-13, 1e-13};
  rflow::flow_report const r = rflow::flow(rflow::layer_stack<double>(far.data(), {2, 3, 1}));
  CHECK(r.inter_token[1] == Approx(1.0));
  CHECK(r.zero_rows[1] == 0);
  std::vector<double> const tiny{1e-310, 0, 1, 2, 0, 1e-310, 3, 4};
  rflow::flow_report const s = rflow::flow(rflow::layer_stack<double>(tiny.data(), {2, 2, 2}));
  CHECK(s.inter_token[0] == Approx(1 / std::sqrt(5.0)));
  CHECK(std::isfinite(s.variance.st2.value));
  CHECK(s.variance.path_energy == Approx(8.0));
}

TEST_CASE("sites of different width do not make a chain") {
  std::vector<float> const a(12, 1.0f);
  rflow::layer_stack<float> const stack{rflow::view(a, 2, 6), rflow::view<float>(a.data(), 2, 5)};
  CHECK_THROWS_WITH_AS(rflow::flow(stack), "rflow::flow: site 1 has 5 features, site 0 has 6",
                       std::invalid_argument);
  CHECK_THROWS_AS(rflow::variance(stack), std::invalid_argument);
  CHECK_THROWS_AS(rflow::on_cpu{}.flow(stack), std::invalid_argument);
}

TEST_CASE("one token, or none, has no pairs") {
  std::vector<float> const a{1, 2, 3, 4, 5, 6};
  rflow::layer_stack<float> const stack(a.data(), {2, 1, 3});
  rflow::flow_report const r = rflow::flow(stack);
  CHECK(r.inter_token[0].why == status::too_few_rows);
  CHECK(r.adjacent[0].mean.ok());
  CHECK(r.variance.st1.ok());
  rflow::flow_report const none =
      rflow::flow(stack.tokens(std::vector<bool>{false}), {rflow::normalization::per_token});
  CHECK(none.tokens == 0);
  CHECK(none.inter_token[1].why == status::too_few_rows);
  CHECK(none.adjacent[0].mean.why == status::too_few_rows);
  CHECK(none.variance.st1.why == status::too_few_rows);
}
