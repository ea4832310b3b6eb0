// SPDX-License-Identifier: Apache-2.0
// The closed forms against expansions that are exact but slow: a linear layer is known from what it
// makes of basis vectors, a quadratic one from pairs of them. examples/theory_validation holds the
// same forms against simulation.
#include <doctest/doctest.h>
#include <rflow/eigen.hpp>
#include <rflow/poincare.hpp>
#include <rflow/theory.hpp>
#include <rflow/variance.hpp>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace {

using doctest::Approx;
using rflow::as_view;
using rflow::expected_update;
using rflow::update_moments;
using matrix = Eigen::MatrixXd;

struct generator {
  std::mt19937_64 bits;
  double normal() { return std::normal_distribution<double>()(bits); }
  std::ptrdiff_t upto(int most) {
    return 1 + static_cast<std::ptrdiff_t>(bits() % static_cast<unsigned>(most));
  }
  matrix matrix_of(std::ptrdiff_t rows, std::ptrdiff_t cols, double scale = 1) {
    return matrix::NullaryExpr(rows, cols, [&] { return scale * normal(); });
  }
};

constexpr int sets = 24;

/// tokens × d normal inputs are z · root, Σ = rootᵀ root.
struct inputs {
  std::ptrdiff_t tokens, d;
  matrix root, covariance;

  inputs(generator& g, std::ptrdiff_t most_tokens, int most_features)
      : tokens(g.upto(static_cast<int>(most_tokens))),
        d(g.upto(most_features)),
        root(g.matrix_of(d, d)) {
    if (d > 1 && g.bits() % 4 == 0) root.row(0).setZero();  // a singular Σ is one too
    covariance = root.transpose() * root;
  }
  /// What X is when element p of z is 1 and the others are 0.
  matrix basis(std::ptrdiff_t p) const {
    matrix x = matrix::Zero(tokens, d);
    x.row(p / d) = root.row(p % d);
    return x;
  }
};

struct transformer {
  matrix value, up, down, up_bias, down_bias;
  bool causal;

  transformer(generator& g, std::ptrdiff_t d, bool is_causal) : causal(is_causal) {
    std::ptrdiff_t const m = g.upto(7);
    value = g.matrix_of(d, d), up = g.matrix_of(d, m), down = g.matrix_of(m, d);
    up_bias = g.matrix_of(m, 1), down_bias = g.matrix_of(1, d);
  }
  rflow::transformer_layer parameters() const {
    return {as_view(value),   as_view(up),        as_view(down),
            as_view(up_bias), as_view(down_bias), causal};
  }
  matrix operator()(matrix const& x) const {
    matrix a(x.rows(), x.cols());
    for (std::ptrdiff_t t = 0; t < x.rows(); ++t) {
      std::ptrdiff_t const seen = causal ? t + 1 : x.rows();
      a.row(t) = x.topRows(seen).colwise().mean() * value;
    }
    matrix const hidden = ((x + a) * up).rowwise() + up_bias.col(0).transpose();
    return a + ((0.5 * hidden * down).rowwise() + down_bias.row(0));
  }
};

struct mamba {
  matrix in, gate, taps, decay, input, output, skip, out;
  std::vector<double> impulse;
  std::ptrdiff_t e, tokens;

  mamba(generator& g, std::ptrdiff_t d, std::ptrdiff_t n, double most_decay = 1)
      : e(g.upto(5)), tokens(n) {
    std::ptrdiff_t const states = g.upto(4);
    in = g.matrix_of(d, e), gate = g.matrix_of(d, e), taps = g.matrix_of(g.upto(4), e);
    decay = g.matrix_of(e, states).array().tanh() * most_decay;
    input = g.matrix_of(e, states), output = g.matrix_of(e, states), skip = g.matrix_of(1, e);
    out = g.matrix_of(e, d);
    impulse =
        rflow::impulse_response(as_view(decay), as_view(input), as_view(output), as_view(skip), n);
  }
  rflow::mamba_layer parameters() const {
    return {as_view(in), as_view(gate), as_view(taps), rflow::view(impulse, tokens, e),
            as_view(out)};
  }
  /// Token by token, with states.
  matrix operator()(matrix const& x) const {
    matrix const entered = x * in, gates = 0.5 * x * gate;
    matrix state = matrix::Zero(e, decay.cols()), y(x.rows(), e);
    for (std::ptrdiff_t t = 0; t < x.rows(); ++t) {
      Eigen::VectorXd u = Eigen::VectorXd::Zero(e);
      for (std::ptrdiff_t j = 0; j < taps.rows() && j <= t; ++j)
        u += 0.5 * taps.row(j).transpose().cwiseProduct(entered.row(t - j).transpose());
      for (std::ptrdiff_t i = 0; i < e; ++i) {
        state.row(i) = decay.row(i).cwiseProduct(state.row(i)) + input.row(i) * u(i);
        y(t, i) = output.row(i).dot(state.row(i)) + skip(0, i) * u(i);
      }
    }
    return y.cwiseProduct(gates) * out;
  }
};

/// Relative agreement, where neither is tiny for the wrong reason.
void check_close(double x, double expected) { CHECK(x == Approx(expected).epsilon(1e-10)); }

void check_mean(update_moments const& m, matrix const& mean) {
  check_close(m.mean_square, mean.squaredNorm());
  Eigen::Map<Eigen::RowVectorXd const> const row(m.mean.data(), mean.cols());
  CHECK((mean.rowwise() - row).norm() <= 1e-10 * mean.norm());
}

}  // namespace

TEST_CASE("theorems 1 and 2: the transformer layer's moments, from its basis") {
  for (unsigned seed = 0; seed < sets; ++seed)
    for (bool const causal : {false, true}) {
      CAPTURE(seed);
      CAPTURE(causal);
      generator g{std::mt19937_64(seed)};
      inputs const x(g, 7, 6);
      transformer const f(g, x.d, causal);
      update_moments const m = expected_update(f.parameters(), as_view(x.covariance), x.tokens);
      matrix const at_zero = f(matrix::Zero(x.tokens, x.d));
      double trace = 0;
      for (std::ptrdiff_t p = 0; p < x.tokens * x.d; ++p)
        trace += (f(x.basis(p)) - at_zero).squaredNorm();
      check_mean(m, at_zero);
      check_close(m.trace, trace);
    }
}

TEST_CASE("theorems 3 and 4: the Mamba layer's moments, from pairs of basis vectors") {
  for (unsigned seed = 100; seed < 100 + sets; ++seed) {
    CAPTURE(seed);
    generator g{std::mt19937_64(seed)};
    inputs const x(g, 6, 4);
    mamba const f(g, x.d, x.tokens);
    update_moments const m = expected_update(f.parameters(), as_view(x.covariance), x.tokens);
    // f = Σ_pq z_p z_q B(p, q): mean Σ_p B(p, p), covariance trace 2 Σ_pq ‖B(p, q)‖².
    matrix mean = matrix::Zero(x.tokens, x.d);
    double trace = 0;
    for (std::ptrdiff_t p = 0; p < x.tokens * x.d; ++p) {
      matrix const a = x.basis(p), at_a = f(a);
      mean += at_a;
      trace += 2 * at_a.squaredNorm();
      for (std::ptrdiff_t q = 0; q < p; ++q) {
        matrix const b = x.basis(q);
        trace += 4 * (0.5 * (f(a + b) - at_a - f(b))).squaredNorm();
      }
    }
    check_mean(m, mean);
    check_close(m.trace, trace);
  }
}

TEST_CASE("proposition 1: St2² of X, X + f(X) is a quarter of the update's square") {
  for (unsigned seed = 200; seed < 200 + sets; ++seed) {
    CAPTURE(seed);
    generator g{std::mt19937_64(seed)};
    inputs const x(g, 9, 8);
    transformer const f(g, x.d, seed % 2 == 0);
    matrix const at = g.matrix_of(x.tokens, x.d), update = f(at);
    std::vector<matrix> const chain{at, at + update};
    rflow::measured const st2 = rflow::variance(rflow::layer_stack(chain)).st2;
    CHECK(st2 * st2 == Approx(update.squaredNorm() / 4).epsilon(1e-10));
  }
  CHECK(update_moments{{}, 3, 5}.expected_st2_square() == 2);
}

TEST_CASE("an impulse response longer than the sequence changes nothing") {
  generator g{std::mt19937_64(7)};
  inputs const x(g, 5, 4);
  mamba const f(g, x.d, x.tokens), longer(f);
  auto const impulse = rflow::impulse_response(as_view(f.decay), as_view(f.input),
                                               as_view(f.output), as_view(f.skip), x.tokens + 20);
  rflow::mamba_layer layer = f.parameters();
  double const trace = expected_update(layer, as_view(x.covariance), x.tokens).trace;
  layer.impulse = rflow::view(impulse, x.tokens + 20, f.e);
  CHECK(expected_update(layer, as_view(x.covariance), x.tokens).trace == trace);
}

TEST_CASE("the contractive bound holds, and is attained in the limit") {
  for (unsigned seed = 300; seed < 300 + sets; ++seed) {
    CAPTURE(seed);
    generator g{std::mt19937_64(seed)};
    inputs const x(g, 12, 6);
    double const rho = 0.9;
    mamba const f(g, x.d, x.tokens, rho);
    matrix const eta =
        f.input.cwiseProduct(f.output).cwiseAbs().rowwise().sum() + f.skip.cwiseAbs().transpose();
    double const bound = rflow::contractive_trace_bound(f.parameters(), as_view(x.covariance),
                                                        x.tokens, as_view(eta), rho);
    CHECK(bound >= expected_update(f.parameters(), as_view(x.covariance), x.tokens).trace);
    matrix const too_low = eta * 1e-3;
    CHECK_THROWS_AS(rflow::contractive_trace_bound(f.parameters(), as_view(x.covariance), x.tokens,
                                                   as_view(too_low), rho),
                    std::invalid_argument);
  }
  // One feature, one channel, a geometric impulse response, many tokens.
  std::ptrdiff_t const n = 20000;
  matrix const one = matrix::Constant(1, 1, 1), in = one * 3, gate = one * 2, taps = one * -5,
               out = one * 7, covariance = one * 0.5, eta = one * 0.25, decay = one * 0.8;
  auto const impulse = rflow::impulse_response(as_view(decay), as_view(one), as_view(eta), {}, n);
  rflow::mamba_layer const layer{as_view(in), as_view(gate), as_view(taps),
                                 rflow::view(impulse, n, 1), as_view(out)};
  double const bound =
      rflow::contractive_trace_bound(layer, as_view(covariance), n, as_view(eta), 0.8);
  double const trace = expected_update(layer, as_view(covariance), n).trace;
  CHECK(bound > trace);
  CHECK(bound == Approx(trace).epsilon(1e-3));
}

TEST_CASE("theorem 5: the layers' St2 meet at the threshold and part on either side") {
  for (unsigned seed = 400; seed < 400 + sets; ++seed) {
    CAPTURE(seed);
    generator g{std::mt19937_64(seed)};
    inputs const x(g, 7, 6);
    transformer const f(g, x.d, seed % 2 == 0);
    mamba const h(g, x.d, x.tokens);
    auto const st2 = [&](auto const& layer, double s) {
      matrix const scaled = s * x.covariance;
      return expected_update(layer.parameters(), as_view(scaled), x.tokens).expected_st2_square();
    };
    double const s =
        rflow::threshold(expected_update(f.parameters(), as_view(x.covariance), x.tokens),
                         expected_update(h.parameters(), as_view(x.covariance), x.tokens));
    CHECK(st2(f, s) == Approx(st2(h, s)).epsilon(1e-9));
    for (double const factor : {0.01, 0.5, 0.99}) CHECK(st2(f, factor * s) > st2(h, factor * s));
    for (double const factor : {1.01, 2.0, 100.0}) CHECK(st2(f, factor * s) < st2(h, factor * s));
  }
  update_moments const nothing, something{{}, 1, 2};
  CHECK(rflow::threshold(something, nothing) == std::numeric_limits<double>::infinity());
  CHECK(rflow::threshold(nothing, something) == 0);
  CHECK(rflow::threshold(nothing, nothing) == 0);
  CHECK(rflow::threshold({{}, 0, 6}, {{}, 1, 2}) == 2);
  CHECK(rflow::threshold({{}, 1e-200, 0}, {{}, 0, 1e200}) == Approx(1e-200));
  CHECK_THROWS_AS(rflow::threshold({{}, -1, 6}, {{}, 1, 2}), std::invalid_argument);
}

// ---- parameters of any size ---------------------------------------------------------------------

namespace {

/// x · 2^exponent, exactly.
matrix shifted(matrix const& x, int exponent) {
  return x.unaryExpr([&](double v) { return std::ldexp(v, exponent); });
}

/// Either the value times 2^exponent, or out_of_range where that is no double.
void check_shifted(rflow::measured const& x, double value, int exponent) {
  long double const right = std::ldexp(static_cast<long double>(value), exponent);
  CAPTURE(value);
  CAPTURE(exponent);
  if (right > static_cast<long double>(std::numeric_limits<double>::max())) {
    CHECK(x.why == rflow::status::out_of_range);
    CHECK(std::isnan(x.value));
  } else {
    REQUIRE(x.ok());
    CHECK(x.value == Approx(static_cast<double>(right)).epsilon(1e-12));
  }
}

}  // namespace

TEST_CASE("moments of parameters of any size are those of small ones, or out of range") {
  int beyond = 0;
  for (unsigned seed = 600; seed < 700; ++seed) {
    CAPTURE(seed);
    generator g{std::mt19937_64(seed)};
    inputs const x(g, 6, 5);
    auto const draw = [&] { return static_cast<int>(g.bits() % 1201) - 600; };
    int const a = draw(), b = draw() / 2, c = draw() / 2;
    // Any Mamba layer is in proportion to its parameters.
    mamba h(g, x.d, x.tokens);
    update_moments const plain = expected_update(h.parameters(), as_view(x.covariance), x.tokens);
    double const eta_one = 1e3;
    matrix const eta = matrix::Constant(h.e, 1, eta_one), far_eta = shifted(eta, b);
    double const bound = rflow::contractive_trace_bound(h.parameters(), as_view(x.covariance),
                                                        x.tokens, as_view(eta), 0.999);
    h.in = shifted(h.in, a), h.gate = shifted(h.gate, c), h.out = shifted(h.out, -c);
    for (double& v : h.impulse) v = std::ldexp(v, b);
    matrix const covariance = shifted(x.covariance, c);
    update_moments const far = expected_update(h.parameters(), as_view(covariance), x.tokens);
    int const exponent = a + b + c;
    check_shifted(far.mean_square, plain.mean_square, 2 * exponent);
    check_shifted(far.trace, plain.trace, 2 * exponent);
    check_shifted(rflow::contractive_trace_bound(h.parameters(), as_view(covariance), x.tokens,
                                                 as_view(far_eta), 0.999),
                  bound, 2 * exponent);
    beyond += !far.trace.ok();
    if (!far.mean.empty())
      for (std::size_t j = 0; j < far.mean.size(); ++j)
        CHECK(far.mean[j] == Approx(std::ldexp(plain.mean[j], exponent)).epsilon(1e-12));

    // The transformer layer is in proportion to Σ, and up, down and the bias make it up together.
    transformer f(g, x.d, seed % 2 == 0);
    update_moments const near = expected_update(f.parameters(), as_view(x.covariance), x.tokens);
    f.up = shifted(f.up, a), f.down = shifted(f.down, -a), f.up_bias = shifted(f.up_bias, a);
    update_moments const moved = expected_update(f.parameters(), as_view(covariance), x.tokens);
    check_shifted(moved.trace, near.trace, c);
    check_shifted(moved.mean_square, near.mean_square, 0);
  }
  CHECK(beyond > 10);
  CHECK(beyond < 90);
}

TEST_CASE("values no double holds are out of range, never infinite and never NaN") {
  using rflow::status;
  generator g{std::mt19937_64(3)};
  matrix const covariance = matrix::Identity(3, 3);
  for (double const size : {1e100, 1e200, 1e300}) {
    CAPTURE(size);
    transformer f(g, 3, false);
    f.up *= size, f.down *= size, f.value *= size;
    update_moments const m = expected_update(f.parameters(), as_view(covariance), 4);
    CHECK(m.trace.why == status::out_of_range);
    CHECK(m.mean_square.ok() == (size < 1e150));
    CHECK(m.expected_st2_square().why == status::out_of_range);
    for (double const x : m.mean) CHECK(std::isfinite(x));
    CHECK(rflow::threshold(m, {{}, 1, 1}).why == status::out_of_range);
    CHECK(rflow::threshold({{}, 1, 1}, m).why == status::out_of_range);
  }
  double const most = std::numeric_limits<double>::max(), infinity = 1 / std::sin(0.);
  // κ = 2 · 1.8e308 has no double, s* has.
  double const s = rflow::threshold({{}, 0, most}, {{}, most, most});
  CHECK(s == Approx(0.5).epsilon(1e-15));
  CHECK(rflow::threshold({{}, most, 0}, {{}, most, 0}) == Approx(1).epsilon(1e-15));
  CHECK(rflow::threshold({{}, 0, 1e200}, {{}, 0, 1e-200}).why == status::out_of_range);
  CHECK(rflow::threshold({{}, 0, 1e-200}, {{}, 0, 1e-300}) == Approx(1e100));
  CHECK_THROWS_AS(rflow::threshold({{}, 0, 1}, {{}, 0, infinity}), std::invalid_argument);
  CHECK_THROWS_AS(rflow::threshold({{}, infinity, 1}, {{}, 0, 1}), std::invalid_argument);

  std::vector<double> const there_and_back{1e-200, 1e200}, up{1e200, 0};
  CHECK(rflow::propagation_bound(3, there_and_back) == Approx(6));
  CHECK(rflow::propagation_bound(1e-300, up) == Approx(1e100));
  CHECK(rflow::propagation_bound(0, up) == 0);
  CHECK(rflow::propagation_bound(1, up).why == status::out_of_range);
  CHECK(rflow::propagation_bound(1e308, 1 - 1e-12, 1000).why == status::out_of_range);
  CHECK(rflow::propagation_bound(1e300, 0.5, 3) == Approx(1e300 * (1 + 0.25 + 0.0625)));
  CHECK_THROWS_AS(rflow::propagation_bound(infinity, 0.5, 3), std::invalid_argument);
  CHECK_THROWS_AS(rflow::propagation_bound(1, std::vector<double>{infinity}),
                  std::invalid_argument);

  matrix const one = matrix::Constant(1, 1, 1), grows = matrix::Constant(1, 1, 1e10);
  CHECK_THROWS_WITH_AS(
      rflow::impulse_response(as_view(grows), as_view(one), as_view(one), {}, 100),
      "rflow::impulse_response: the response leaves the range of double at step 31",
      std::invalid_argument);
}

TEST_CASE("lemma 2: chains of tied blocks keep within the propagation bound") {
  for (unsigned seed = 500; seed < 500 + sets; ++seed) {
    CAPTURE(seed);
    generator g{std::mt19937_64(seed)};
    std::ptrdiff_t const n = g.upto(5), d = g.upto(8), blocks = g.upto(12);
    matrix map = g.matrix_of(d, d);
    double const rho =
        0.3 + 0.65 * std::tanh(std::abs(g.normal()));  // of the norm, not of what is seen
    map *= rho / map.norm();                           // the Frobenius norm bounds the operator's
    matrix const shift = g.matrix_of(1, d);
    bool const curved = seed % 2 == 0;  // tanh is 1-Lipschitz
    std::vector<matrix> chain{g.matrix_of(n, d, 3)};
    for (std::ptrdiff_t l = 0; l < blocks; ++l) {
      matrix next = (chain.back() * map).rowwise() + shift.row(0);
      if (curved) next = next.array().tanh();
      chain.push_back(next);
    }
    auto const v = rflow::variance(rflow::layer_stack(chain));
    double const first = v.steps[0] * v.steps[0];
    double const bound = rflow::propagation_bound(first, rho, blocks);
    CHECK(v.path_energy <= bound * (1 + 1e-12));
    std::vector<double> const factors(static_cast<std::size_t>(blocks - 1), rho);
    CHECK(rflow::propagation_bound(first, factors) == Approx(bound).epsilon(1e-12));
    CHECK(static_cast<double>(blocks + 1) * v.st2 * v.st2 <=
          rflow::poincare_bounds(bound, blocks + 1).upper * (1 + 1e-12));
  }
  // Attained by a map that scales.
  std::vector<matrix> chain{matrix::Constant(2, 3, 1)};
  for (int l = 0; l < 9; ++l) chain.push_back(0.7 * chain.back());
  auto const v = rflow::variance(rflow::layer_stack(chain));
  CHECK(v.path_energy ==
        Approx(rflow::propagation_bound(v.steps[0] * v.steps[0], 0.7, 9)).epsilon(1e-12));
  CHECK(rflow::propagation_bound(2, 0, 5) == 2);
  CHECK(rflow::propagation_bound(2, std::vector<double>{}) == 2);
  CHECK(rflow::propagation_bound(1, std::vector<double>{2, 3}) == 1 + 4 + 36);
  CHECK(rflow::propagation_bound(1, 1 - 1e-12, 1000) == Approx(1000).epsilon(1e-6));
}

TEST_CASE("lemma 2 needs tied blocks: the identity, then a shift") {
  matrix const x = matrix::Constant(1, 2, 1);
  std::vector<matrix> const chain{x, x, x.array() + 5};
  auto const v = rflow::variance(rflow::layer_stack(chain));
  CHECK(v.path_energy > rflow::propagation_bound(v.steps[0] * v.steps[0], std::vector<double>{1}));
}

TEST_CASE("misuse is refused, with sizes") {
  generator g{std::mt19937_64(1)};
  matrix const covariance = matrix::Identity(3, 3);
  transformer const f(g, 3, false);
  mamba const h(g, 3, 4);
  auto const layer = f.parameters();
  auto const other = h.parameters();

  CHECK_THROWS_WITH_AS(expected_update(layer, as_view(covariance), 0),
                       "rflow::expected_update: 0 tokens", std::invalid_argument);
  matrix const small_covariance = matrix::Identity(2, 2);
  CHECK_THROWS_WITH_AS(expected_update(layer, as_view(small_covariance), 4),
                       "rflow::expected_update: covariance is 2 x 2, expected 3 x 3",
                       std::invalid_argument);
  matrix indefinite = covariance;
  indefinite(1, 1) = -0.25;
  CHECK_THROWS_WITH_AS(
      expected_update(other, as_view(indefinite), 4),
      "rflow::expected_update: the 3 x 3 covariance is not positive semidefinite: it has the "
      "eigenvalue -0.250000",
      std::invalid_argument);
  matrix lopsided = covariance;
  lopsided(0, 1) = 0.5;
  CHECK_THROWS_AS(expected_update(layer, as_view(lopsided), 4), std::invalid_argument);

  rflow::transformer_layer bad = layer;
  matrix const wide = matrix::Zero(3, 4);
  bad.value = as_view(wide);
  CHECK_THROWS_WITH_AS(expected_update(bad, as_view(covariance), 4),
                       "rflow::expected_update: value is 3 x 4, expected 3 x 3",
                       std::invalid_argument);
  bad = layer;
  bad.down_bias = as_view(wide);
  CHECK_THROWS_AS(expected_update(bad, as_view(covariance), 4), std::invalid_argument);
  bad = layer;
  bad.up_bias = {}, bad.down_bias = {};
  CHECK(expected_update(bad, as_view(covariance), 4).mean_square == 0);
  bad.value = {};
  CHECK_THROWS_AS(expected_update(bad, as_view(covariance), 4), std::invalid_argument);

  rflow::mamba_layer worse = other;
  worse.taps = as_view(wide);
  matrix const one_more = matrix::Zero(2, h.e + 1);
  worse.taps = as_view(one_more);
  CHECK_THROWS_AS(expected_update(worse, as_view(covariance), 4), std::invalid_argument);
  matrix nan = f.value;
  nan(2, 1) = std::nan("");
  bad = layer;
  bad.value = as_view(nan);
  CHECK_THROWS_WITH_AS(expected_update(bad, as_view(covariance), 4),
                       "rflow::expected_update: value holds a NaN or an infinity",
                       std::domain_error);

  matrix const eta = matrix::Constant(h.e, 1, 1e6);
  CHECK_THROWS_WITH_AS(
      rflow::contractive_trace_bound(other, as_view(covariance), 4, as_view(eta), 1),
      "rflow::contractive_trace_bound: rho is 1.000000, not in [0, 1)", std::invalid_argument);
  CHECK_THROWS_AS(rflow::impulse_response(as_view(wide), as_view(wide), as_view(covariance), {}, 4),
                  std::invalid_argument);
  CHECK_THROWS_AS(rflow::impulse_response(as_view(wide), as_view(wide), as_view(wide), {}, 0),
                  std::invalid_argument);
  CHECK_THROWS_AS(rflow::propagation_bound(1, 1.0, 5), std::invalid_argument);
  CHECK_THROWS_AS(rflow::propagation_bound(1, 0.5, 0), std::invalid_argument);
  CHECK_THROWS_AS(rflow::propagation_bound(-1, 0.5, 5), std::invalid_argument);
  CHECK_THROWS_AS(rflow::propagation_bound(1, std::vector<double>{1, -2}), std::invalid_argument);
}
