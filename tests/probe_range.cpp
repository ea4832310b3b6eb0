// SPDX-License-Identifier: Apache-2.0
// Probes of features of any size, of tokens far larger than the others, and of classes too small to
// share out: against the training loop in long double.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/detail/cpu/softmax.hpp>
#include <rflow/eigen.hpp>
#include <rflow/probe.hpp>

#include "reference.hpp"

namespace {

using doctest::Approx;
using rflow::probe_options;
using rflow::status;
using labels = std::vector<int>;
using real = long double;
using rows = std::vector<std::vector<real>>;

// ---- the training loop ---------------------------------------------------------------------------

struct curves {
  std::vector<real> train_loss, validation_loss;
};

/// Adam on the mean loss of the tokens with part 1, from `weight` and `bias`; validated on part 2.
/// Where asked for, on features of mean 0 and deviation 1 over part 1, which the weights then act on.
curves train(rows x, labels const& y, std::vector<std::uint8_t> const& part, rows weight,
             std::vector<real> bias, probe_options const& o) {
  std::size_t const n = x.size(), d = x[0].size(), classes = bias.size();
  real trained = 0, validated = 0;
  for (std::uint8_t const p : part) trained += p == 1, validated += p == 2;
  if (o.standardize)
    for (std::size_t j = 0; j < d; ++j) {
      real mean = 0, square = 0, first = 0;
      bool varies = false, any = false;
      for (std::size_t i = 0; i < n; ++i)
        if (part[i] == 1) {
          if (!any) first = x[i][j];
          any = true;
          varies = varies || x[i][j] != first;
        }
      for (std::size_t i = 0; i < n; ++i)
        if (part[i] == 1) mean += x[i][j] / trained;
      for (std::size_t i = 0; i < n; ++i)
        if (part[i] == 1) square += (x[i][j] - mean) * (x[i][j] - mean) / trained;
      if (!varies) square = 0;
      for (std::size_t c = 0; c < classes; ++c) {  // the same start, for features as seen
        bias[c] += weight[c][j] * mean;
        weight[c][j] *= std::sqrt(square);
      }
      for (std::size_t i = 0; i < n; ++i)
        x[i][j] = square > 0 ? (x[i][j] - mean) / std::sqrt(square) : 0;
    }
  for (std::size_t c = 0; c < classes; ++c) weight[c].push_back(bias[c]);
  for (auto& row : x) row.push_back(1);
  rows m(classes, std::vector<real>(d + 1)), v = m;
  curves out;
  for (int e = 0;; ++e) {
    rows g(classes, std::vector<real>(d + 1));
    real loss[3] = {};
    for (std::size_t i = 0; i < n; ++i) {
      if (part[i] == 0) continue;
      std::vector<real> z(classes);
      for (std::size_t c = 0; c < classes; ++c)
        for (std::size_t j = 0; j <= d; ++j) z[c] += weight[c][j] * x[i][j];
      real const largest = *std::max_element(z.begin(), z.end());
      auto const label = static_cast<std::size_t>(y[i]);
      real const picked = z[label];
      real total = 0;
      for (real& value : z) total += value = std::exp(value - largest);
      loss[part[i]] += std::log(total) + largest - picked;
      for (std::size_t c = 0; c < classes && part[i] == 1; ++c)
        for (std::size_t j = 0; j <= d; ++j)
          g[c][j] += (z[c] / total - (c == label)) * x[i][j] / trained;
    }
    out.train_loss.push_back(loss[1] / trained);
    if (validated > 0) out.validation_loss.push_back(loss[2] / validated);
    if (e == o.epochs) return out;
    for (std::size_t c = 0; c < classes; ++c)
      for (std::size_t j = 0; j <= d; ++j) {
        real& w = weight[c][j];
        real const s = g[c][j] + (j < d ? real(o.weight_decay) * w : 0);
        m[c][j] = real(o.beta1) * m[c][j] + (1 - real(o.beta1)) * s;
        v[c][j] = real(o.beta2) * v[c][j] + (1 - real(o.beta2)) * s * s;
        real const first = m[c][j] / (1 - std::pow(real(o.beta1), e + 1));
        real const second = v[c][j] / (1 - std::pow(real(o.beta2), e + 1));
        w -= real(o.learning_rate) * first / (std::sqrt(second) + real(o.epsilon));
      }
  }
}

// ---- data ---------------------------------------------------------------------------------------

/// Clusters, one a class; element by element what the type holds.
template <class T>
struct tokens {
  std::size_t n, d;
  std::vector<T> values;
  labels y;

  tokens(std::mt19937& bits, std::size_t count, std::size_t width, int classes, double scale,
         double offset = 0)
      : n(count), d(width) {
    std::normal_distribution<double> normal;
    std::vector<double> centre(static_cast<std::size_t>(classes) * d);
    for (double& c : centre) c = normal(bits);
    for (std::size_t i = 0; i < n; ++i) {
      y.push_back(static_cast<int>(i) % classes);
      for (std::size_t j = 0; j < d; ++j)
        values.push_back(static_cast<T>(
            scale * (centre[static_cast<std::size_t>(y.back()) * d + j] + normal(bits) + offset)));
    }
  }
  rows wide() const {
    rows out(n, std::vector<real>(d));
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < d; ++j) out[i][j] = static_cast<real>(values[i * d + j]);
    return out;
  }
  rflow::view<T> view() const {
    return {values.data(), static_cast<std::ptrdiff_t>(n), static_cast<std::ptrdiff_t>(d)};
  }
  void multiply(std::size_t token, double factor) {
    for (std::size_t j = 0; j < d; ++j)
      values[token * d + j] = static_cast<T>(static_cast<double>(values[token * d + j]) * factor);
  }
};

/// To a share of the largest loss of the curve: what logits of that size leave of the others.
void check_curve(std::vector<rflow::measured> const& seen, std::vector<real> const& right,
                 double within) {
  REQUIRE(seen.size() == right.size());
  real const largest = *std::max_element(right.begin(), right.end());
  for (std::size_t e = 0; e < seen.size(); ++e) {
    CAPTURE(e);
    REQUIRE(seen[e].ok());
    auto const off = static_cast<double>((static_cast<real>(seen[e].value) - right[e]) / largest);
    CHECK(std::abs(off) <= within);
  }
}

/// Trains on x with the splits of the options and holds every seed against the loop.
template <class T>
void check_probe(tokens<T> const& x, int classes, std::mt19937& bits, probe_options o,
                 double within, double start = 0.3) {
  std::normal_distribution<double> normal(0, start);
  std::vector<double> flat;
  std::vector<double> bias;
  rows weight;
  for (int c = 0; c < classes; ++c) {
    weight.emplace_back();
    for (std::size_t j = 0; j < x.d; ++j) weight.back().push_back(flat.emplace_back(normal(bits)));
    bias.push_back(normal(bits));
  }
  o.initial_weights = rflow::weights::given(flat, bias);
  rflow::detail::probe_plan const plan("here", rflow::layer_stack<T>{x.view()}, x.y, o);
  auto const found = rflow::probe(x.view(), x.y, o);
  REQUIRE(found.why == status::ok);
  for (std::size_t p = 0; p < found.seeds.size(); ++p) {
    CAPTURE(p);
    std::vector<std::uint8_t> part;
    for (std::size_t i = 0; i < x.n; ++i)
      part.push_back(
          plan.problem.part(static_cast<std::ptrdiff_t>(p), static_cast<std::ptrdiff_t>(i)));
    curves const right = train(x.wide(), x.y, part, weight, {bias.begin(), bias.end()}, o);
    check_curve(found.seeds[p].train_loss, right.train_loss, within);
    if (!right.validation_loss.empty())
      check_curve(found.seeds[p].validation_loss, right.validation_loss, within);
  }
}

template <class T>
void any_size(std::vector<double> const& scales, double within) {
  unsigned seed = 1;
  for (double const scale : scales)
    for (bool const standardize : {false, true}) {
      CAPTURE(seed);
      CAPTURE(scale);
      CAPTURE(standardize);
      std::mt19937 bits(seed++);
      int const classes = 2 + static_cast<int>(bits() % 4);
      std::size_t const count = 40 + bits() % 60, width = 3 + bits() % 20;
      tokens<T> const x(bits, count, width, classes, scale, standardize ? 1 : 0);
      // Where features are as given, the weights make logits of a size that moves.
      double const start = standardize ? 0 : (std::min)(0.3 / scale, 0.3);
      // From zero weights Adam's first step is nearly the sign of a gradient, which rounding may decide.
      double const epsilon = standardize ? 1e-3 : 1e-8;
      check_probe(x, classes, bits,
                  {.epochs = 6, .epsilon = epsilon, .seeds = 2, .standardize = standardize}, within,
                  start);
    }
}

bool const far_reference = std::numeric_limits<real>::max_exponent > 4000;

}  // namespace

TEST_CASE("probe: features of any size give the loop's losses, in float") {
  any_size<float>({1e-36, 1e-25, 1e-10, 1, 1e10, 1e17, 1e19, 1e20, 1e22, 1e25, 1e30, 1e35}, 1e-3);
}
TEST_CASE("probe: features of any size give the loop's losses, in double") {
  any_size<double>({1e-100, 1, 1e100, 1e140}, 1e-9);
  if (far_reference) any_size<double>({1e-300, 1e-200, 1e155, 1e170, 1e250, 1e300}, 1e-9);
}

TEST_CASE("probe: an epsilon below the squares of gradients") {
  for (double const scale : {1e-22, 1e-12, 1.}) {
    CAPTURE(scale);
    std::mt19937 bits(3);
    tokens<float> const x(bits, 80, 6, 3, scale);
    check_probe(x, 3, bits, {.epochs = 5, .epsilon = 1e-40, .weight_decay = 0.01, .seeds = 2},
                2e-3);
  }
}

TEST_CASE("probe: features of sizes that differ, each by itself") {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    tokens<float> x(bits, 90, 8, 3, 1, 2);
    for (std::size_t i = 0; i < x.n; ++i)
      for (std::size_t j = 0; j < x.d; ++j)
        x.values[i * x.d + j] *= std::ldexp(1.f, static_cast<int>(j) * 30 - 110);
    check_probe(x, 3, bits, {.epochs = 8, .seeds = 2, .standardize = true}, 1e-4, 0);
  }
}

TEST_CASE("probe: a token to validate on, however large, costs the others no digit") {
  for (double const factor : {1e3, 1e6, 1e9, 1e12, 1e20})
    for (bool const standardize : {false, true}) {
      CAPTURE(factor);
      CAPTURE(standardize);
      std::mt19937 bits(7);
      auto const run = [&](auto x, double within) {
        probe_options o{.epochs = 10, .seeds = 2, .standardize = standardize};
        for (std::ptrdiff_t i = 1; i < 120; i += 5) o.validation.push_back(i);
        x.multiply(11, factor);
        check_probe(x, 3, bits, o, within);
      };
      run(tokens<float>(bits, 120, 9, 3, 1, 1), 1e-4);
      run(tokens<double>(bits, 120, 9, 3, 1, 1), 1e-10);
      run(tokens<float>(bits, 120, 9, 3, 1e-15, 1), 1e-4);
    }
}

TEST_CASE("probe: a token that some seeds train on and others validate on, however large") {
  // With 40 seeds there is no token that all of them train on.
  for (int const seeds : {3, 40})
    for (double const factor : {1e4, 1e8})
      for (bool const standardize : {false, true}) {
        CAPTURE(seeds);
        CAPTURE(factor);
        CAPTURE(standardize);
        std::mt19937 bits(8);
        tokens<float> x(bits, 60, 7, 3, 1, 1);
        x.multiply(11, factor);
        check_probe(x, 3, bits, {.epochs = 6, .seeds = seeds, .standardize = standardize}, 2e-4,
                    standardize ? 0 : 0.3);
      }
}

TEST_CASE("probe: constant is what the tokens trained on are, whatever the others are") {
  std::mt19937 bits(9);
  tokens<float> x(bits, 60, 5, 3, 1);
  probe_options o{.epochs = 4, .seeds = 2};
  for (std::ptrdiff_t i = 0; i < 60; i += 7) o.validation.push_back(i);
  for (std::size_t i = 0; i < 60; ++i)
    for (std::size_t j = 0; i % 7 != 0 && j < 5; ++j) x.values[i * 5 + j] = 0.1f;
  for (bool const standardize : {false, true}) {
    o.standardize = standardize;
    CHECK(rflow::probe(x.view(), x.y, o).why == status::constant_layer);
  }
  // One step in the last place of one token is no constant.
  x.values[3 * 5 + 2] = std::nextafter(0.1f, 1.f);
  for (bool const standardize : {false, true}) {
    o.standardize = standardize;
    check_probe(x, 3, bits, o, 1e-4);
  }
  // What lies 10¹⁸ deviations away is told apart by the last digits of weights: as given only.
  x.multiply(7, 1e9);
  o.standardize = false;
  check_probe(x, 3, bits, o, 1e-4);
}

// ---- losses over seeds --------------------------------------------------------------------------

TEST_CASE("probe: mean and spread of losses of any size, or out of range") {
  for (double const size : {1e-200, 1e-160, 1., 1e160, 1e200, 1e307}) {
    CAPTURE(size);
    std::vector<rflow::measured> const values{2 * size, 3 * size, 7 * size};
    auto const s = rflow::detail::summary(values);
    CHECK(s.mean == Approx(4 * size).epsilon(1e-14));
    CHECK(s.spread == Approx(std::sqrt(7.0) * size).epsilon(1e-14));
  }
  double const most = std::numeric_limits<double>::max();
  auto const far = rflow::detail::summary({most, -most});
  CHECK(far.mean == 0);
  CHECK(far.spread.why == status::out_of_range);
  CHECK(rflow::detail::summary({0., 0.}).spread == 0);

  std::mt19937 bits(4);
  tokens<double> const x(bits, 50, 4, 3, 1e160);
  auto const r = rflow::probe(x.view(), x.y, {.epochs = 3});
  double largest = 0, mean = 0, square = 0;
  for (auto const& seed : r.seeds) largest = (std::max)(largest, seed.train_loss.back().value);
  CHECK(largest > 1e158);
  for (auto const& seed : r.seeds) mean += seed.train_loss.back() / largest / 5;
  for (auto const& seed : r.seeds)
    square += std::pow(seed.train_loss.back() / largest - mean, 2) / 4;
  CHECK(r.train_loss.mean == Approx(mean * largest));
  CHECK(r.train_loss.spread == Approx(std::sqrt(square) * largest));
}

// ---- splits -------------------------------------------------------------------------------------

namespace {

/// Tokens of each class that a seed validates on.
std::vector<std::ptrdiff_t> held_out(labels const& y, probe_options const& o, std::ptrdiff_t p) {
  std::vector<float> const zeros(y.size());
  rflow::layer_stack<float> const stack(zeros.data(),
                                        {1, static_cast<std::ptrdiff_t>(y.size()), 1});
  rflow::detail::probe_plan const plan("here", stack, y, o);
  std::vector<std::ptrdiff_t> out(static_cast<std::size_t>(plan.problem.classes));
  for (std::size_t i = 0; i < y.size(); ++i)
    out[static_cast<std::size_t>(y[i])] +=
        plan.problem.part(p, static_cast<std::ptrdiff_t>(i)) == rflow::softmax_problem::validate;
  return out;
}

}  // namespace

TEST_CASE("probe: large classes stand in for those too small for their share") {
  labels y;
  for (int c = 0; c < 50; ++c) y.push_back(c);
  y.insert(y.end(), 50, 50);
  for (std::ptrdiff_t p = 0; p < 5; ++p) {
    auto const held = held_out(y, {}, p);
    CHECK(held[50] == 20);
    CHECK(std::accumulate(held.begin(), held.end(), std::ptrdiff_t{0}) == 20);
  }
  // Of several, each in proportion.
  y.insert(y.end(), 100, 51);  // 200 tokens, 40 asked for, 150 in two classes
  auto const two = held_out(y, {}, 2);
  CHECK(two[50] + two[51] == 40);
  CHECK(std::abs(2 * two[50] - two[51]) <= 2);
}

TEST_CASE("probe: the tokens asked for are held out wherever one of each class can stay") {
  for (unsigned seed = 1; seed <= 200; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    labels y;
    int const classes = 2 + static_cast<int>(bits() % 30);
    for (int c = 0; c < classes; ++c)
      y.insert(y.end(), bits() % 3 == 0 ? 1 + bits() % 40 : 1 + bits() % 2, c);
    double const fraction = 0.05 + 0.1 * static_cast<double>(bits() % 9);
    auto const n = static_cast<std::ptrdiff_t>(y.size());
    auto const wanted = static_cast<std::ptrdiff_t>(std::llround(fraction * double(n)));
    if (wanted < 1) continue;
    probe_options const o{.seeds = 2, .first_seed = seed, .validation_fraction = fraction};
    for (std::ptrdiff_t p = 0; p < 2; ++p) {
      auto const held = held_out(y, o, p);
      CHECK(std::accumulate(held.begin(), held.end(), std::ptrdiff_t{0}) ==
            (std::min)(wanted, n - classes));
      for (int c = 0; c < classes; ++c)
        CHECK(held[static_cast<std::size_t>(c)] < std::count(y.begin(), y.end(), c));
    }
  }
}

TEST_CASE("probe: fewer tokens to validate on than asked for are told") {
  std::mt19937 bits(5);
  tokens<float> const x(bits, 24, 3, 20, 1);  // 20 classes, four of them of two tokens
  auto const r =
      rflow::probe_layers(rflow::layer_stack<float>{x.view()}, x.y, {.epochs = 2, .seeds = 3});
  CHECK(r.validation_asked == 5);
  CHECK(r.validation_tokens == 4);
  CHECK(r.layers[0].validation_asked == 5);
  for (auto const& seed : r.layers[0].seeds) {
    CHECK(seed.validation_tokens == 4);
    CHECK(seed.training_tokens == 20);
  }
  CHECK(r.table().find("validated on 4 tokens where 5 were asked for") != std::string::npos);
  tokens<float> const one(bits, 20, 3, 20, 1);  // one token a class: none can be spared
  auto const none =
      rflow::probe_layers(rflow::layer_stack<float>{one.view()}, one.y, {.epochs = 2, .seeds = 1});
  CHECK(none.validation_asked == 4);
  CHECK(none.validation_tokens == 0);
  CHECK(none.layers[0].validation_accuracy.mean.why == status::too_few_rows);
  CHECK(none.layers[0].train_accuracy.mean.ok());
  CHECK(none.best == -1);
  CHECK(none.table().find("validated on 0 tokens where 4 were asked for") != std::string::npos);
  // All there are: nothing to tell.
  tokens<float> const even(bits, 40, 3, 2, 1);
  auto const all = rflow::probe_layers(rflow::layer_stack<float>{even.view()}, even.y,
                                       {.epochs = 2, .seeds = 1});
  CHECK(all.validation_asked == 8);
  CHECK(all.validation_tokens == 8);
  CHECK(all.table().find("asked for") == std::string::npos);
}

TEST_CASE("probe: options and weights that are not finite are refused") {
  std::mt19937 bits(6);
  tokens<float> const x(bits, 30, 2, 3, 1);
  double const infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  for (double const bad : {infinity, nan}) {
    CHECK_THROWS_AS(rflow::probe(x.view(), x.y, {.learning_rate = bad}), std::invalid_argument);
    CHECK_THROWS_AS(rflow::probe(x.view(), x.y, {.epsilon = bad}), std::invalid_argument);
    CHECK_THROWS_AS(rflow::probe(x.view(), x.y, {.weight_decay = bad}), std::invalid_argument);
    CHECK_THROWS_AS(rflow::probe(x.view(), x.y, {.validation_fraction = bad}),
                    std::invalid_argument);
    CHECK_THROWS_AS(rflow::probe(x.view(), x.y, {.beta1 = bad}), std::invalid_argument);
    CHECK_THROWS_WITH_AS(
        rflow::probe(x.view(), x.y,
                     {.initial_weights = rflow::weights::given({0, 0, 0, 0, bad, 0}, {})}),
        "rflow::probe: an initial weight or bias is NaN or infinite", std::invalid_argument);
  }
}
