// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every backend has to compute, against definitions in double and against on_cpu. A test
// program names its backends and includes this file once:
//
//     #define RFLOW_BACKENDS rflow::on_cpu, my_backend
//     #include "backends.hpp"

#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/cka.hpp>
#include <rflow/flow.hpp>
#include <rflow/probe.hpp>

#include "exact.hpp"
#include "reference.hpp"

// Bytes that hold a tile or a few of them, but not all of 151 tokens.
#ifndef RFLOW_TIGHT_BOUND
#define RFLOW_TIGHT_BOUND 1600 << 10
#endif

namespace backends {

using doctest::Approx;
using reference::matrix;
using rflow::status;

inline constexpr double missing = std::numeric_limits<double>::quiet_NaN();

inline bool near(double a, double b, double within) {
  return std::isnan(b) ? std::isnan(a) : std::abs(a - b) <= within;
}

/// Flow figures of two reports, relative to their own scale.
inline void check_same(rflow::flow_report const& a, rflow::flow_report const& b, double within) {
  REQUIRE(a.sites == b.sites);
  CHECK(a.tokens == b.tokens);
  CHECK(a.zero_rows == b.zero_rows);
  auto const same = [&](rflow::measured x, rflow::measured y, double scale) {
    CHECK(x.why == y.why);
    CHECK(near(x, y, within * scale));
  };
  same(a.variance.st1, b.variance.st1, b.variance.st1);
  same(a.variance.st2, b.variance.st2, b.variance.st2);
  same(a.variance.path_length, b.variance.path_length, b.variance.path_length);
  for (std::size_t l = 0; l < a.inter_token.size(); ++l) {
    CAPTURE(l);
    same(a.inter_token[l], b.inter_token[l], 1);
    same(a.rms_norm[l], b.rms_norm[l], b.rms_norm[l]);
    CHECK(a.non_finite[l].token == b.non_finite[l].token);
    CHECK(a.non_finite[l].feature == b.non_finite[l].feature);
    CHECK(near(a.per_sequence[l].count, b.per_sequence[l].count, 0));
    CHECK(near(a.per_sequence[l].mean, b.per_sequence[l].mean, within));
    std::size_t const tokens = a.norms.empty() ? 0 : a.norms[l].size();
    for (std::size_t i = 0; i < tokens; ++i)
      CHECK(near(a.norms[l][i], b.norms[l][i], within * b.norms[l][i]));
    if (l == 0) continue;
    same(a.adjacent[l - 1].mean, b.adjacent[l - 1].mean, 1);
    CHECK(a.adjacent[l - 1].left_out == b.adjacent[l - 1].left_out);
    CHECK(near(a.adjacent[l - 1].stddev, b.adjacent[l - 1].stddev, std::sqrt(within)));
    for (std::size_t i = 0; i < tokens; ++i)
      CHECK(near(a.adjacent[l - 1].per_token[i], b.adjacent[l - 1].per_token[i], within));
    same(a.variance.steps[l - 1], b.variance.steps[l - 1], b.variance.steps[l - 1]);
    if (l > 1) same(a.variance.curvature[l - 2], b.variance.curvature[l - 2], 10);
  }
}

/// Gram moments, through both estimators: relative to √(self · self).
inline void check_same(rflow::gram_moments const& a, rflow::gram_moments const& b, double within) {
  REQUIRE(a.sites == b.sites);
  REQUIRE(a.tokens == b.tokens);
  CHECK(a.why == b.why);
  auto const same = [&](auto estimator) {
    using estimate = decltype(estimator);
    for (std::ptrdiff_t p = 0; p < a.sites; ++p)
      for (std::ptrdiff_t q = 0; q < a.sites; ++q) {
        double const selves = estimate::hsic(b, p, p) * estimate::hsic(b, q, q);
        CHECK(near(estimate::hsic(a, p, q), estimate::hsic(b, p, q), within * std::sqrt(selves)));
      }
  };
  if (a.tokens >= 2) same(rflow::biased{});
  if (a.tokens >= 4) same(rflow::debiased{});
  for (std::size_t p = 0; p < a.sigma.size(); ++p)
    CHECK(a.sigma[p] == Approx(b.sigma[p]).epsilon(std::sqrt(within)));
}

struct polynomial {
  double operator()(double xy, double, double) const { return (1 + xy) * (1 + xy); }
};

/// Random data of some shape; its values live here.
template <class T>
struct sample {
  reference::stack x;
  std::vector<T> values;
  rflow::layer_stack<T> stack;

  sample(unsigned seed, std::size_t sites, std::size_t tokens, std::size_t width)
      : x(make(seed, sites, tokens, width)),
        values(reference::pack<T>(x)),
        stack(reference::stack_of(values, x)) {}
  sample(sample const&) = delete;

  static reference::stack make(unsigned seed, std::size_t sites, std::size_t tokens,
                               std::size_t width) {
    std::mt19937 bits(seed);
    return reference::random_stack(bits, sites, tokens, width);
  }
};

template <class T>
inline constexpr double scalar_tolerance = std::same_as<T, double> ? 1e-12 : 1e-5;

}  // namespace backends

TEST_CASE_TEMPLATE("a backend is one", On, RFLOW_BACKENDS) {
  CHECK(rflow::backend_for<On, rflow::host_memory>);
}

TEST_CASE_TEMPLATE("flow by its definitions", On, RFLOW_BACKENDS) {
  using namespace backends;
  for (unsigned seed = 1; seed <= 6; ++seed) {
    CAPTURE(seed);
    sample<float> const s(seed, 1 + seed % 4 * 2, 2 + 17 * seed, 1 + 31 * seed);
    rflow::flow_report const r = rflow::flow(s.stack, {.per_token = true}, On{});
    for (std::size_t l = 0; l < s.x.size(); ++l) {
      CHECK(std::abs(r.inter_token[l] - reference::inter_token(s.x[l])) < 1e-5);
      if (l == 0) continue;
      matrix const step = reference::minus(s.x[l], s.x[l - 1]);
      CHECK(r.variance.steps[l - 1] ==
            Approx(std::sqrt(reference::inner(step, step))).epsilon(1e-5));
      for (std::size_t i = 0; i < s.x[l].size(); ++i)
        CHECK(std::abs(r.adjacent[l - 1].per_token[i] -
                       reference::cosine(s.x[l - 1][i], s.x[l][i])) < 1e-5);
    }
    if (s.x.size() > 1)
      CHECK(r.variance.st2 ==
            Approx(std::sqrt(reference::spread(s.x) / static_cast<double>(s.x.size())))
                .epsilon(1e-5));
  }
}

template <class On, class T>
void flow_agrees() {
  using namespace backends;
  for (unsigned seed = 1; seed <= 3; ++seed) {
    CAPTURE(seed);
    sample<T> const s(seed, 2 + seed, 300, 40 + 531 * (seed - 1));
    std::vector<int> mask(300);
    std::mt19937 bits(seed);
    for (int& m : mask) m = bits() % 4 != 0;
    std::vector<std::ptrdiff_t> const offsets{0, 0, 1, 40, 40, 256, 299, 300};
    for (auto const& stack : {s.stack, s.stack.sequences(offsets), s.stack.tokens(mask),
                              s.stack.tokens(mask).sequences(offsets)})
      check_same(rflow::flow(stack, {.per_token = true}, On{}),
                 rflow::flow(stack, {.per_token = true}), scalar_tolerance<T>);
  }
}
TEST_CASE_TEMPLATE("flow agrees with on_cpu: masks, sequences, types", On, RFLOW_BACKENDS) {
  flow_agrees<On, float>();
  flow_agrees<On, double>();
  flow_agrees<On, rflow::f16>();
  flow_agrees<On, rflow::bf16>();
}

template <class On, class T>
void parts_agree() {
  using namespace backends;
  using rflow::flow_part;
  for (unsigned seed = 1; seed <= 4; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    reference::stack x = reference::random_stack(bits, 1 + seed, 90, 1 + 83 * (seed - 1));
    for (double& value : x[0][7]) value = 0;                    // no direction
    x[1][11].back() = std::numeric_limits<double>::infinity();  // no value
    for (auto& site : x)
      for (double& value : site[20]) value *= 1e-12;  // squares that float flushes
    std::vector<T> const values = reference::pack<T>(x);
    rflow::layer_stack<T> const whole = reference::stack_of(values, x);
    auto const d = static_cast<std::ptrdiff_t>(x[0][0].size());
    rflow::layer_stack<T> const reversed(values.data() + d - 1, {whole.sites(), 90, d},
                                         {90 * d, d, -1});
    std::vector<int> mask(90);
    for (std::size_t i = 0; i < 90; ++i) mask[i] = i % 3 != 0;
    std::vector<std::ptrdiff_t> const offsets{0, 1, 40, 90};
    for (auto const& stack :
         {whole, whole.sequences(offsets), whole.tokens(mask).sequences(offsets), reversed}) {
      auto const n = static_cast<std::size_t>(stack.size());
      std::vector<double> cosine(x.size() * n), cosine_again(x.size() * n);
      rflow::flow_moments const all = On{}.flow(stack, {.cosine = cosine.data()});
      rflow::flow_moments const tokens = On{}.flow(stack, {.part = flow_part::inter_token});
      rflow::flow_moments const neighbours =
          On{}.flow(stack, {.cosine = cosine_again.data(), .part = flow_part::adjacent});
      double const within = scalar_tolerance<T>;
      for (std::size_t i = 0; i < cosine.size(); ++i)
        CHECK(near(cosine_again[i], cosine[i], within));
      for (std::size_t l = 0; l < all.squares.size(); ++l) {
        CAPTURE(l);
        for (auto const* m : {&tokens, &neighbours}) {
          CHECK(m->tokens == all.tokens);
          CHECK(m->zero_rows[l] == all.zero_rows[l]);
          CHECK(m->non_finite[l].token == all.non_finite[l].token);
          CHECK(m->non_finite[l].feature == all.non_finite[l].feature);
        }
        CHECK(tokens.pairs[l] == all.pairs[l]);
        CHECK(near(tokens.pair_cosines[l], all.pair_cosines[l], within * (1 + all.pairs[l])));
        CHECK(near(tokens.sequence_cosine[l].mean, all.sequence_cosine[l].mean, within));
        if (l == 0) continue;
        CHECK(neighbours.cosine[l - 1].count == all.cosine[l - 1].count);
        CHECK(near(neighbours.cosine[l - 1].mean, all.cosine[l - 1].mean, within));
        CHECK(near(neighbours.cosine[l - 1].m2, all.cosine[l - 1].m2, within * all.tokens));
        // What is left out is 0, not a part of it.
        if (tokens.cosine[l - 1].count != 0)
          CHECK(tokens.cosine[l - 1].count == all.cosine[l - 1].count);
        for (auto const* m : {&tokens, &neighbours})
          if (m->steps[l - 1] != 0) CHECK(near(m->steps[l - 1] / all.steps[l - 1], 1, within));
      }
      for (auto const* m : {&tokens, &neighbours})
        if (m->spread != 0) CHECK(near(m->spread / all.spread, 1, within));
    }
  }
}
TEST_CASE_TEMPLATE("a part of the flow moments is as good as all of them", On, RFLOW_BACKENDS) {
  parts_agree<On, float>();
  parts_agree<On, double>();
  parts_agree<On, rflow::f16>();
  parts_agree<On, rflow::bf16>();
}

template <class On, class T>
void flow_is_exact(unsigned cases) {
  constexpr bool wide = std::same_as<T, double>, midway = std::same_as<T, rflow::f16>;
  double const decades = wide     ? 290
                         : midway ? 1.5
                                  : 30,
               most_offset = wide     ? 1e13
                             : midway ? 10
                                      : 1e4;
  for (unsigned seed = 1; seed <= cases; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    reference::stack x = reference::hard_stack(bits, decades, most_offset);
    std::vector<T> const values = reference::pack<T>(x);
    reference::check_exact<T>(
        rflow::flow(reference::stack_of(values, x), {.per_token = true}, On{}),
        reference::exact_chain(x));
  }
}
TEST_CASE_TEMPLATE("flow is exact however far its data are from 1", On, RFLOW_BACKENDS) {
  flow_is_exact<On, float>(80);
  flow_is_exact<On, double>(80);
  flow_is_exact<On, rflow::f16>(30);
  flow_is_exact<On, rflow::bf16>(30);
}

TEST_CASE_TEMPLATE("more sequences than a slab ends", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<float> const s(3, 3, 3000, 5);
  std::vector<std::ptrdiff_t> offsets;
  for (std::ptrdiff_t i = 0; i <= 3000; i += 2) offsets.push_back(i);
  auto const stack = s.stack.sequences(offsets);
  check_same(rflow::flow(stack, {.per_token = true}, On{}), rflow::flow(stack, {.per_token = true}),
             1e-5);
}

TEST_CASE_TEMPLATE("any strides", On, RFLOW_BACKENDS) {
  using namespace backends;
  std::ptrdiff_t const n = 37, d = 70;
  sample<double> const s(5, 4, 37, 70);
  for (rflow::stack_strides const strides : {rflow::stack_strides{n * d, 1, n},
                                             {d, 4 * d, 1},
                                             {1, 4 * d, 4},
                                             {n * d, 0, 1},
                                             {0, d, 1}}) {
    rflow::layer_stack<double> const stack(s.values.data(), {4, n, d}, strides);
    check_same(rflow::flow(stack, {.per_token = true}, On{}),
               rflow::flow(stack, {.per_token = true}), 1e-12);
    if (strides.token != 0)
      check_same(On{}.gram(rflow::linear{}, stack), rflow::on_cpu{}.gram(rflow::linear{}, stack),
                 1e-12);
  }
  rflow::layer_stack<double> const backwards(s.values.data() + n * d - 1, {4, n, d},
                                             {n * d, -d, -1});
  check_same(rflow::flow(backwards, {.per_token = true}, On{}),
             rflow::flow(backwards, {.per_token = true}), 1e-12);
  check_same(On{}.gram(rflow::linear{}, backwards),
             rflow::on_cpu{}.gram(rflow::linear{}, backwards), 1e-12);
}

TEST_CASE_TEMPLATE("zero rows, extremes and data that are not finite", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<float> s(7, 5, 40, 33);
  auto const at = [&](std::size_t l, std::size_t t, std::size_t j) -> float& {
    return s.values[(l * 40 + t) * 33 + j];
  };
  for (std::size_t j = 0; j < 33; ++j) {
    at(1, 4, j) = at(1, 39, j) = 0;
    at(2, 8, j) *= 1e-30f;
    at(3, 9, j) *= 1e30f;
  }
  check_same(rflow::flow(s.stack, {.per_token = true}, On{}),
             rflow::flow(s.stack, {.per_token = true}), 1e-5);
  at(2, 7, 32) = std::numeric_limits<float>::infinity();
  at(2, 13, 0) = std::numeric_limits<float>::quiet_NaN();
  auto const masked = s.stack.tokens(std::vector<bool>([&] {
    std::vector<bool> keep(40, true);
    keep[0] = keep[3] = false;
    return keep;
  }()));
  for (auto const& stack : {s.stack, masked}) {
    check_same(rflow::flow(stack, {.per_token = true}, On{}),
               rflow::flow(stack, {.per_token = true}), 1e-5);
    rflow::gram_moments const m = On{}.gram(rflow::linear{}, stack);
    CHECK(m.why[2] == status::non_finite);
    CHECK(m.non_finite[2].token == 7);
    CHECK(m.non_finite[2].feature == 32);
    rflow::cka_table const table = rflow::cka_matrix(m);
    CHECK(table.status(1, 2) == status::non_finite);
    CHECK(table(0, 1).ok());
  }
}

TEST_CASE_TEMPLATE("finite doubles whose sum is not", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<double> s(8, 2, 12, 5);
  for (double& v : s.values) v = 1e308 + v * 1e306;
  rflow::on_cpu const cpu{.path = rflow::gram_path::gram};
  check_same(On{}.gram(rflow::linear{}, s.stack), cpu.gram(rflow::linear{}, s.stack), 1e-10);
}

TEST_CASE_TEMPLATE("no tokens, one token", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<float> const s(9, 3, 2, 4);
  for (std::vector<bool> const& mask : {std::vector<bool>{false, false}, {true, false}}) {
    auto const stack = s.stack.tokens(mask);
    check_same(rflow::flow(stack, {.per_token = true}, On{}),
               rflow::flow(stack, {.per_token = true}), 1e-5);
    check_same(On{}.gram(rflow::linear{}, stack), rflow::on_cpu{}.gram(rflow::linear{}, stack),
               1e-5);
  }
}

TEST_CASE_TEMPLATE("CKA of the published fixture", On, RFLOW_BACKENDS) {
  using namespace backends;
  auto [x, y] = reference::kornblith();
  auto const a = reference::pack<double>(x), b = reference::pack<double>(y);
  rflow::view<double> const u(a.data(), 100, 10), v(b.data(), 100, 10);
  using rflow::biased, rflow::debiased, rflow::linear, rflow::rbf;
  auto const is = [](double value) { return Approx(value).epsilon(1e-11); };
  CHECK(rflow::cka(u, v, linear{}, biased{}, On{}) == is(0.5576132566117589));
  CHECK(rflow::cka(u, v, linear{}, debiased{}, On{}) == is(0.5134564895055259));
  CHECK(rflow::cka(u, v, rbf{}, biased{}, On{}) == is(0.5758322230135366));
  CHECK(rflow::cka(u, v, rbf{}, debiased{}, On{}) == is(0.5016102703531156));
  CHECK(rflow::cka(u, v, rbf{0.5}, debiased{}, On{}) == is(0.4192767510220518));
  CHECK(rflow::cka(u, v, rbf{.convention = rbf::median::upper_triangle}, biased{}, On{}) ==
        Approx(0.5757367).epsilon(1e-6));
}

template <class On, class T>
void gram_agrees(std::size_t memory_bound) {
  using namespace backends;
  double const within = scalar_tolerance<T>;
  sample<T> const s(11, 4, 151, 83);
  std::vector<int> mask(151);
  for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 5 != 0;
  On on;
  on.memory_bound = memory_bound;
  rflow::on_cpu const cpu{.path = rflow::gram_path::gram};
  for (auto const& stack : {s.stack, s.stack.tokens(mask)}) {
    check_same(on.gram(rflow::linear{}, stack), cpu.gram(rflow::linear{}, stack), within);
    check_same(on.gram(rflow::rbf{}, stack), cpu.gram(rflow::rbf{}, stack), within);
    rflow::gram_moments const a = on.gram(rflow::linear{}, stack),
                              b = cpu.gram(rflow::linear{}, stack);
    for (std::size_t i = 0; i < a.squares.size(); ++i)
      CHECK(a.squares[i] == Approx(b.squares[i]).epsilon(100 * within));
    CHECK(a.square_sum[1] == Approx(b.square_sum[1]).epsilon(100 * within));
    CHECK(a.accuracy == b.accuracy);
    CHECK(a.epsilon == b.epsilon);
  }
}
TEST_CASE_TEMPLATE("Gram moments agree with on_cpu", On, RFLOW_BACKENDS) {
  for (std::size_t const bound : {std::size_t{64} << 20, std::size_t{RFLOW_TIGHT_BOUND}}) {
    CAPTURE(bound);
    gram_agrees<On, float>(bound);
    gram_agrees<On, double>(bound);
    gram_agrees<On, rflow::f16>(bound);
    gram_agrees<On, rflow::bf16>(bound);
  }
  CHECK_THROWS_AS((gram_agrees<On, float>(1000)), std::invalid_argument);
}

TEST_CASE_TEMPLATE("two models of different type and width", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<float> const a(1, 3, 60, 20);
  sample<rflow::bf16> const b(2, 2, 60, 45);
  check_same(On{}.gram(rflow::linear{}, a.stack, b.stack),
             rflow::on_cpu{.path = rflow::gram_path::gram}.gram(rflow::linear{}, a.stack, b.stack),
             1e-5);
  sample<float> const c(1, 1, 61, 20);
  CHECK_THROWS_AS(On{}.gram(rflow::linear{}, a.stack, c.stack), std::invalid_argument);
}

TEST_CASE_TEMPLATE("positions of two stacks are those of each one's data", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<float> a(1, 2, 30, 20), b(2, 2, 40, 45);
  a.values[static_cast<std::size_t>((1 * 30 + 17) * 20 + 3)] = static_cast<float>(missing);
  b.values[static_cast<std::size_t>((0 * 40 + 31) * 45 + 7)] = static_cast<float>(missing);
  std::vector<int> of_a(30, 1), of_b(40, 1);  // 26 tokens are left of either
  for (std::size_t i = 0; i < 4; ++i) of_a[4 * i + 2] = 0;
  for (std::size_t i = 0; i < 14; ++i) of_b[2 * i] = 0;
  rflow::gram_moments const m =
      On{}.gram(rflow::linear{}, a.stack.tokens(of_a), b.stack.tokens(of_b));
  CHECK_FALSE(m.non_finite[0].found());
  CHECK(m.non_finite[1].token == 17);
  CHECK(m.non_finite[1].feature == 3);
  CHECK(m.non_finite[2].token == 31);
  CHECK(m.non_finite[2].feature == 7);
  CHECK_FALSE(m.non_finite[3].found());
  CHECK(m.why[2] == status::non_finite);
}

TEST_CASE_TEMPLATE("features far from the origin are centred first", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<float> s(4, 2, 32, 1024);
  for (float& v : s.values) v += 30;
  for (std::size_t l = 0; l < 2; ++l)
    for (std::size_t i = 0; i < 32; ++i)
      for (std::size_t j = 0; j < 1024; ++j)
        s.x[l][i][j] = static_cast<double>(s.values[(l * 32 + i) * 1024 + j]);
  rflow::gram_moments const m = On{}.gram(rflow::linear{}, s.stack);
  for (std::size_t l = 0; l < 2; ++l) {
    matrix const k = reference::linear_kernel(s.x[l]);
    double const self =
        rflow::debiased::hsic(m, static_cast<std::ptrdiff_t>(l), static_cast<std::ptrdiff_t>(l));
    CHECK(self > 0);
    CHECK(self == Approx(reference::hsic_debiased(k, k)).epsilon(1e-5));
  }
}

TEST_CASE_TEMPLATE("doubles far from the origin are centred to their last digits", On,
                   RFLOW_BACKENDS) {
  using namespace backends;
  // The same tokens at the origin are exact: offset and values are multiples of a small power of two.
  for (double const offset : {0x1p40, 0x1p43})  // 1e12, 9e12
    for (double const size : {1., 50.}) {
      CAPTURE(offset);
      CAPTURE(size);
      sample<double> here(8, 2, 200, 40), far(8, 2, 200, 40);
      for (std::size_t i = 0; i < here.values.size(); ++i) {
        here.values[i] = std::ldexp(std::round(std::ldexp(here.values[i] * size, 9)), -9);
        far.values[i] = here.values[i] + offset;
      }
      for (bool const by_rbf : {false, true}) {
        CAPTURE(by_rbf);
        auto const table = [&](auto const& stack, auto const& on) {
          rflow::rbf const kernel{.sigma = {10 * size, 8 * size}};
          return by_rbf ? rflow::cka_matrix(stack, kernel, rflow::debiased{}, on)(0, 1)
                        : rflow::cka_matrix(stack, rflow::linear{}, rflow::debiased{}, on)(0, 1);
        };
        rflow::measured const right = table(here.stack, rflow::on_cpu{}),
                              found = table(far.stack, On{});
        REQUIRE(right.ok());
        REQUIRE(found.ok());
        CHECK(std::abs(found - right) <= (by_rbf ? 1e-10 : 1e-12));
      }
    }
}

TEST_CASE_TEMPLATE("constant layers and copies of one token have a status", On, RFLOW_BACKENDS) {
  using namespace backends;
  sample<float> s(6, 3, 20, 8);
  for (std::size_t i = 0; i < 20 * 8; ++i) s.values[20 * 8 + i] = 0.1f;
  rflow::cka_table const table =
      rflow::cka_matrix(s.stack, rflow::linear{}, rflow::debiased{}, On{});
  CHECK(table.status(0, 1) == status::constant_layer);
  CHECK(table(0, 2).ok());
  for (std::size_t i = 2; i < 20; ++i)
    for (std::size_t j = 0; j < 8; ++j) s.values[(40 + i) * 8 + j] = s.values[41 * 8 + j];
  CHECK(rflow::cka_matrix(s.stack, rflow::rbf{}, rflow::debiased{}, On{}).status(0, 2) ==
        status::zero_bandwidth);
}

template <class On, class T>
void probes_agree() {
  using namespace backends;
  if constexpr (rflow::softmax_backend_for<On, rflow::host_memory>) {
    sample<T> const s(13, 3, 130, 61);
    std::vector<int> labels, mask;
    for (int i = 0; i < 130; ++i) {
      labels.push_back(i * i % 7 % 3);
      mask.push_back(i % 11 != 0);
    }
    for (bool const standardize : {false, true})
      for (auto const& stack : {s.stack, s.stack.tokens(mask)}) {
        rflow::probe_options const options{.epochs = 10, .seeds = 2, .standardize = standardize};
        rflow::layer_probes const a = rflow::probe_layers(stack, labels, options, On{});
        rflow::layer_probes const b = rflow::probe_layers(stack, labels, options);
        for (std::size_t l = 0; l < 3; ++l)
          for (std::size_t p = 0; p < 2; ++p)
            for (std::size_t e = 0; e <= 10; ++e) {
              auto const &x = a.layers[l].seeds[p], &y = b.layers[l].seeds[p];
              CHECK(near(x.train_loss[e], y.train_loss[e], 100 * scalar_tolerance<T>));
              CHECK(near(x.validation_loss[e], y.validation_loss[e], 100 * scalar_tolerance<T>));
            }
      }
  }
}
TEST_CASE_TEMPLATE("probes agree with on_cpu", On, RFLOW_BACKENDS) {
  probes_agree<On, float>();
  probes_agree<On, double>();
  probes_agree<On, rflow::bf16>();
}
