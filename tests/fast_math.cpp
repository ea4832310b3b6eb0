// SPDX-License-Identifier: Apache-2.0
// Compiled with -ffast-math, where the compiler may take every NaN test for false: what is not
// finite must be found on bits, here and in the library.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/cka.hpp>
#include <rflow/cosine.hpp>
#include <rflow/flow.hpp>

#include "reference.hpp"

using rflow::bf16;
using rflow::f16;
using rflow::status;

namespace {

constexpr std::uint64_t exponent = 0x7ff0000000000000u;

bool is_nan(double x) {
  return (std::bit_cast<std::uint64_t>(x) & ~(std::uint64_t{1} << 63)) > exponent;
}

template <class T>
using bits_of =
    std::conditional_t<sizeof(T) == 8, std::uint64_t,
                       std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>>;

/// Infinity, a quiet NaN, and a NaN whose payload is in its lowest bit; each with both signs.
template <class T>
std::vector<T> poisons() {
  constexpr int mantissa = std::is_same_v<T, double>  ? 52
                           : std::is_same_v<T, float> ? 23
                           : std::is_same_v<T, f16>   ? 10
                                                      : 7;
  using bits = bits_of<T>;
  constexpr auto sign = static_cast<bits>(bits{1} << (8 * sizeof(T) - 1));
  constexpr auto infinity = static_cast<bits>((sign - 1) >> mantissa << mantissa);
  std::vector<T> out;
  for (bits const s : {bits{0}, sign})
    for (bits const payload : {bits{0}, static_cast<bits>(bits{1} << (mantissa - 1)), bits{1}})
      out.push_back(std::bit_cast<T>(static_cast<bits>(s | infinity | payload)));
  return out;
}

template <class T>
struct stack_with_values {
  reference::stack x;
  std::vector<T> values;
  std::ptrdiff_t sites, tokens, width;

  stack_with_values(unsigned seed, std::size_t s, std::size_t n, std::size_t d)
      : sites(static_cast<std::ptrdiff_t>(s)),
        tokens(static_cast<std::ptrdiff_t>(n)),
        width(static_cast<std::ptrdiff_t>(d)) {
    std::mt19937 bits(seed);
    x = reference::random_stack(bits, s, n, d);
    values = reference::pack<T>(x);
  }
  T& at(std::ptrdiff_t l, std::ptrdiff_t i, std::ptrdiff_t j) {
    return values[static_cast<std::size_t>((l * tokens + i) * width + j)];
  }
  rflow::layer_stack<T> stack() const { return reference::stack_of(values, x); }
};

}  // namespace

TEST_CASE("the test on bits") {
  for (double const x : poisons<double>()) CHECK_FALSE(rflow::detail::is_finite(x));
  for (float const x : poisons<float>()) CHECK_FALSE(rflow::detail::is_finite(x));
  for (f16 const x : poisons<f16>()) CHECK_FALSE(rflow::detail::is_finite(static_cast<float>(x)));
  for (bf16 const x : poisons<bf16>()) CHECK_FALSE(rflow::detail::is_finite(static_cast<float>(x)));
  CHECK(rflow::detail::is_finite(1.0));
  CHECK(rflow::detail::is_finite(-0.0f));
}

TEST_CASE("a reason comes with a NaN") {
  CHECK(is_nan(rflow::measured().value));
  CHECK(is_nan(rflow::measured(status::non_finite).value));
  CHECK_FALSE(is_nan(rflow::measured(0.5).value));
}

TEST_CASE_TEMPLATE("a flow finds what is not finite, wherever it stands", T, float, double, f16,
                   bf16) {
  for (T const poison : poisons<T>())
    for (std::ptrdiff_t const feature : {0, 1, 15, 16, 31, 32, 36}) {
      stack_with_values<T> s(1, 4, 9, 37);
      s.at(2, 5, feature) = poison;
      rflow::flow_report const r = rflow::flow(s.stack(), {.per_token = true});
      REQUIRE(r.non_finite[2].token == 5);
      REQUIRE(r.non_finite[2].feature == feature);
      CHECK(r.inter_token[2].why == status::non_finite);
      CHECK(is_nan(r.inter_token[2].value));
      CHECK(is_nan(r.norms[2][5]));
      CHECK(is_nan(r.adjacent[1].per_token[5]));
      CHECK(r.variance.st2.why == status::non_finite);
      CHECK(is_nan(r.variance.st1.value));
      CHECK(is_nan(r.spread_bounds.upper));
      for (std::size_t const l : {0u, 1u, 3u}) {
        CHECK_FALSE(r.non_finite[l].found());
        CHECK(std::abs(r.inter_token[l] - reference::inter_token(s.x[l])) <
              reference::tolerance<T>);
      }
      CHECK(r.adjacent[0].mean.ok());
    }
}

TEST_CASE_TEMPLATE("pairs throw", T, float, double, f16, bf16) {
  for (T const poison : poisons<T>()) {
    stack_with_values<T> s(2, 2, 12, 35);
    s.at(1, 7, 33) = poison;
    auto const stack = s.stack();
    CHECK_THROWS_WITH_AS(
        rflow::inter_token_cosine(stack[1]),
        "rflow::inter_token_cosine: NaN or infinity in layer x, token 7, feature 33",
        std::domain_error);
    CHECK_THROWS_WITH_AS(rflow::adjacent_cosine(stack[0], stack[1]),
                         "rflow::adjacent_cosine: NaN or infinity in layer y, token 7, feature 33",
                         std::domain_error);
    CHECK_THROWS_WITH_AS(rflow::cka(stack[0], stack[1]),
                         "rflow::cka: NaN or infinity in layer y, token 7, feature 33",
                         std::domain_error);
  }
}

TEST_CASE_TEMPLATE("a CKA table keeps what is finite", T, float, double, f16, bf16) {
  for (T const poison : poisons<T>())
    for (auto const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
      stack_with_values<T> s(3, 4, 40, 21);
      rflow::on_cpu const on{.path = path};
      rflow::cka_table const good =
          rflow::cka_matrix(s.stack(), rflow::linear{}, rflow::debiased{}, on);
      s.at(1, 39, 20) = poison;
      rflow::cka_table const t =
          rflow::cka_matrix(s.stack(), rflow::linear{}, rflow::debiased{}, on);
      for (std::ptrdiff_t i = 0; i < 4; ++i)
        for (std::ptrdiff_t j = 0; j < 4; ++j)
          if (i == 1 || j == 1) {
            CHECK(t.status(i, j) == status::non_finite);
            CHECK(is_nan(t(i, j).value));
          } else {
            CHECK(t(i, j).value == good(i, j).value);
          }
    }
}

TEST_CASE_TEMPLATE("an RBF table keeps what is finite", T, float, double, bf16) {
  for (T const poison : poisons<T>()) {
    stack_with_values<T> s(4, 3, 40, 21);
    s.at(1, 0, 0) = poison;
    rflow::cka_table const t = rflow::cka_matrix(s.stack(), rflow::rbf{});
    CHECK(t.status(0, 1) == status::non_finite);
    CHECK(t.status(1, 1) == status::non_finite);
    CHECK(t.status(0, 2) == status::ok);
    CHECK_FALSE(is_nan(t(0, 2).value));
  }
}

TEST_CASE_TEMPLATE("answers that do not exist have their reason", T, float, double) {
  stack_with_values<T> s(5, 3, 20, 13);
  for (std::ptrdiff_t i = 0; i < 20; ++i)
    for (std::ptrdiff_t j = 0; j < 13; ++j) s.at(1, i, j) = T(0.1);
  rflow::cka_table const t = rflow::cka_matrix(s.stack());
  CHECK(t.status(0, 1) == status::constant_layer);
  CHECK(is_nan(t(0, 1).value));
  CHECK(t.status(0, 2) == status::ok);
  CHECK(rflow::cka_matrix(s.stack(), rflow::rbf{}).status(0, 1) == status::constant_layer);

  for (std::ptrdiff_t i = 0; i < 20; ++i)
    for (std::ptrdiff_t j = 0; j < 13; ++j) s.at(1, i, j) = T(0);
  auto const stack = s.stack();
  CHECK(rflow::inter_token_cosine(stack[1]).why == status::zero_rows);
  rflow::adjacent_cosines const r = rflow::adjacent_cosine(stack[0], stack[1]);
  CHECK(r.mean.why == status::zero_rows);
  CHECK(r.left_out == 20);
  for (double const c : r.per_token) CHECK(is_nan(c));
}

// -ffast-math also makes the processor take numbers below the smallest normal one for 0.
TEST_CASE_TEMPLATE("the largest values have a CKA", T, float, double) {
  constexpr bool narrow = std::is_same_v<T, float>;
  stack_with_values<T> s(7, 2, 12, 5);
  T const largest = *std::max_element(s.values.begin(), s.values.end(),
                                      [](T a, T b) { return std::abs(a) < std::abs(b); });
  for (auto const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
    rflow::on_cpu const on{.path = path};
    auto const value = [&](stack_with_values<T> const& x) {
      return rflow::cka_matrix(x.stack(), rflow::linear{}, rflow::debiased{}, on)(0, 1);
    };
    stack_with_values<T> large = s;
    // By way of memory, or the compiler multiplies by the largest number first.
    T const most = std::numeric_limits<T>::max() * T(0.9);
    T const volatile factor = most / std::abs(largest);
    for (T& v : large.values) v *= factor;
    CAPTURE(rflow::to_string(value(large).why));
    CHECK(std::abs(value(large) - value(s)) < (narrow ? 1e-6 : 1e-12));
  }
}

TEST_CASE_TEMPLATE("the figures are the same to rounding", T, float, double) {
  stack_with_values<T> s(6, 3, 30, 50);
  auto const stack = s.stack();
  reference::matrix const k = reference::linear_kernel(s.x[0]),
                          l = reference::linear_kernel(s.x[2]);
  double const within = std::is_same_v<T, double> ? 1e-10 : 1e-5;
  CHECK(std::abs(rflow::cka(stack[0], stack[2]) - reference::cka(k, l, reference::hsic_debiased)) <
        within);
  CHECK(std::abs(rflow::cka(stack[0], stack[2], rflow::linear{}, rflow::biased{}) -
                 reference::cka(k, l, reference::hsic_biased)) < within);
  rflow::flow_report const r = rflow::flow(stack);
  CHECK(std::abs(r.variance.st2 / std::sqrt(reference::spread(s.x) / 3) - 1) < within);
}
