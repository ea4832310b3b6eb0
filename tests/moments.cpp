// SPDX-License-Identifier: Apache-2.0
#include <rflow/backend.hpp>
#include <rflow/moments.hpp>

#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/flow.hpp>

#include "reference.hpp"

using doctest::Approx;

TEST_CASE("a running mean and spread, in any order of merging, without cancellation") {
  unsigned const seed = 9;
  CAPTURE(seed);
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal(1e9, 1);
  std::vector<double> values(500);
  for (double& v : values) v = normal(bits);
  long double mean = 0, m2 = 0;
  for (double const v : values) mean += v / 500.0L;
  for (double const v : values) m2 += (v - mean) * (v - mean);
  rflow::running_stat parts[3], empty;
  for (std::size_t i = 0; i < 500; ++i) parts[i < 7 ? 0 : i < 300 ? 1 : 2].add(values[i]);
  for (auto const& order : {std::vector{0, 1, 2}, std::vector{2, 0, 1}, std::vector{1, 2, 0}}) {
    rflow::running_stat all;
    for (int const k : order) all.merge(parts[k]), all.merge(empty);
    CHECK(all.count == 500);
    CHECK(all.mean == Approx(static_cast<double>(mean)).epsilon(1e-15));
    CHECK(all.stddev() == Approx(static_cast<double>(std::sqrt(m2 / 500))).epsilon(1e-7));
  }
  CHECK(empty.stddev() == 0);
}

TEST_CASE("spread of values whose squares have no double") {
  double const values[] = {1, 3, 5, 4, 2, 9};
  rflow::running_stat plain;
  for (double const v : values) plain.add(v);
  for (double const scale : {1e-300, 1e-170, 1e160, 1e300}) {
    CAPTURE(scale);
    rflow::running_stat all, parts[2];
    for (std::size_t i = 0; i < 6; ++i) {
      all.add(values[i] * scale);
      parts[i % 2].add(values[i] * scale);
    }
    parts[0].merge(parts[1]);
    CHECK(all.stddev() / scale == Approx(plain.stddev()).epsilon(1e-14));
    CHECK(parts[0].stddev() / scale == Approx(plain.stddev()).epsilon(1e-14));
    rflow::running_stat sent = all, got;
    rflow::from_numbers(got, rflow::to_numbers(sent));
    CHECK(got.stddev() == all.stddev());
  }
}

TEST_CASE("turns of tokens of any size add in any order") {
  // a = (c, r) · size · pace, b = (1, 0) · size: angles and sums are known.
  struct token {
    double size, pace, c, r;
  };
  auto const moment = [](token const& t) {
    rflow::turn_sum one;
    int size = 0, pace = 0;
    double const s = std::frexp(t.size, &size), p = std::frexp(t.pace, &pace);
    one.add(s * s, t.c * p, t.r * p * s * (t.r * p * s));
    one.before = size;
    one.after = size + pace;
    one.settle();
    return one;
  };
  std::mt19937 bits(3);
  std::normal_distribution<double> normal;
  for (int repeat = 0; repeat < 50; ++repeat) {
    double const pace = std::pow(10, normal(bits) * 40), all = std::pow(10, normal(bits) * 60);
    double const range = repeat % 2 == 0 ? 0.3 : 30;
    std::vector<token> tokens(7);
    for (token& t : tokens)
      t = {all * std::pow(10, normal(bits) * range), pace, 1 + 1e-3 * normal(bits),
           1e-6 * normal(bits)};
    long double aa = 0, ab = 0, bb = 0, across = 0;
    for (token const& t : tokens) {
      long double const b = t.size;
      bb += b * b;
      ab += b * b * t.c;
    }
    for (token const& t : tokens) {
      long double const b = t.size, away = t.c - ab / bb;
      across += b * b * (away * away + static_cast<long double>(t.r) * t.r);
    }
    aa = ab / bb * std::sqrt(bb);
    double const want = static_cast<double>(std::atan2(std::sqrt(across), aa));
    rflow::turn_sum forth, back;
    for (std::size_t i = 0; i < 7; ++i) forth.merge(moment(tokens[i]));
    for (std::size_t i = 7; i-- > 0;) back.merge(moment(tokens[i]));
    CHECK(std::abs(forth.angle() - want) < 1e-14);
    CHECK(std::abs(back.angle() - want) < 1e-14);
  }
}

TEST_CASE("open sequences add, closed ones do not") {
  // Two tokens at right angles in two parts: one sequence if open, two of one token if closed.
  float const x[] = {1, 0}, y[] = {0, 1};
  auto const open = [](float const* row) {
    rflow::flow_moments m(1, 2);
    m.tokens = 1;
    m.unit_sum = {static_cast<double>(row[0]), static_cast<double>(row[1])};
    m.units = {1};
    return m;
  };
  rflow::flow_moments one = open(x);
  one.merge(open(y));
  one.end_sequence();
  CHECK(one.pairs[0] == 2);
  CHECK(one.pair_cosines[0] == 0);
  CHECK(one.sequence_cosine[0].count == 1);
  rflow::flow_moments a = open(x), b = open(y);
  a.end_sequence();
  b.end_sequence();
  a.merge(b);
  CHECK(a.pairs[0] == 0);
  CHECK(a.tokens == 2);
}

TEST_CASE("the first NaN of merged parts is the earliest token's") {
  rflow::flow_moments a(2, 3), b(2, 3);
  a.non_finite[0] = {5, 1};
  b.non_finite[0] = {2, 0};
  b.non_finite[1] = {4, 2};
  a.merge(b, 1);  // b's tokens begin at 1
  CHECK(a.non_finite[0].token == 3);
  CHECK(a.non_finite[0].feature == 0);
  CHECK(a.non_finite[1].token == 5);
}

TEST_CASE("moments of parts merge to the moments of the whole") {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    reference::stack x = reference::random_stack(bits, 4, 50, 23);
    std::vector<double> const values = reference::pack<double>(x);
    auto const stack = reference::stack_of(values, x);
    auto const cut = static_cast<std::ptrdiff_t>(1 + bits() % 48);
    std::vector<int> first(50), second(50);
    for (std::size_t i = 0; i < 50; ++i) {
      first[i] = static_cast<std::ptrdiff_t>(i) < cut;
      second[i] = !first[i];
    }
    rflow::on_cpu const on;
    rflow::flow_moments whole = on.flow(stack.sequences({0, cut, 50}));
    rflow::flow_moments a = on.flow(stack.tokens(first)), b = on.flow(stack.tokens(second));
    rflow::flow_moments ab = a, ba = b;
    ab.merge(b);
    ba.merge(a);
    for (rflow::flow_moments const& merged : {ab, ba}) {
      rflow::flow_report const m = rflow::report_of(merged), w = rflow::report_of(whole);
      CHECK(m.tokens == 50);
      CHECK(m.variance.st1 == Approx(w.variance.st1).epsilon(1e-13));
      CHECK(m.variance.st2 == Approx(w.variance.st2).epsilon(1e-13));
      for (std::size_t l = 0; l < 4; ++l) {
        CHECK(m.inter_token[l] == Approx(w.inter_token[l]).epsilon(1e-12));
        CHECK(m.per_sequence[l].stddev() == Approx(w.per_sequence[l].stddev()).epsilon(1e-12));
      }
      for (std::size_t l = 0; l < 3; ++l) {
        CHECK(m.adjacent[l].mean == Approx(w.adjacent[l].mean).epsilon(1e-13));
        CHECK(m.adjacent[l].stddev == Approx(w.adjacent[l].stddev).epsilon(1e-12));
      }
    }
  }
  CHECK_THROWS_WITH_AS(rflow::flow_moments(2, 3).merge(rflow::flow_moments(3, 3)),
                       "rflow::flow_moments::merge: 2 sites x 3 and 3 sites x 3",
                       std::invalid_argument);
}
