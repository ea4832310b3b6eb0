// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>
#include <rflow/eigen.hpp>
#include <rflow/init.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>
#include <vector>

namespace {

using doctest::Approx;
using rflow::draw;
using rflow::initializer;
using rflow::random_origin;
using words = std::array<std::uint32_t, 4>;

std::vector<float> drawn(initializer const& how, random_origin const& from, std::ptrdiff_t rows,
                         std::ptrdiff_t cols, int threads = 1) {
  std::vector<float> out(static_cast<std::size_t>(rows * cols));
  draw(how, from, out.data(), rows, cols, cols, 1, threads);
  return out;
}

/// Box and Muller's transform as init.hpp documents it, with libm in long double.
long double normal_of(std::uint32_t radius, std::uint32_t angle, bool second) {
  long double const u = (static_cast<long double>(radius) + 0.5L) * 0x1p-32L;
  // ln u loses nothing near u = 1 when taken as log1p(u − 1), u − 1 being exact.
  long double const r = std::sqrt(-2 * std::log1p(u - 1));
  long double const theta =
      2 * std::numbers::pi_v<long double> * (static_cast<long double>(angle) + 0.5L) * 0x1p-32L -
      std::numbers::pi_v<long double> / 4;
  return r * (second ? std::sin(theta) : std::cos(theta));
}

/// How many units in the last place of `exact`, as a float, lie between the two.
double ulps(float x, long double exact) {
  float const near = std::abs(static_cast<float>(exact));
  float const unit = std::nextafter(near, std::numeric_limits<float>::infinity()) - near;
  return static_cast<double>(std::abs(static_cast<long double>(x) - exact) / unit);
}

struct moments {
  double mean = 0, variance = 0, kurtosis = 0, low = 0, high = 0;
};
moments moments_of(std::vector<float> const& x) {
  moments m;
  auto const n = static_cast<double>(x.size());
  for (float const v : x) m.mean += static_cast<double>(v) / n;
  for (float const v : x) {
    double const d = static_cast<double>(v) - m.mean;
    m.variance += d * d / n, m.kurtosis += d * d * d * d / n;
  }
  m.kurtosis /= m.variance * m.variance;
  m.low = *std::min_element(x.begin(), x.end());
  m.high = *std::max_element(x.begin(), x.end());
  return m;
}

/// The statistical checks below are far fewer than 1000; |z| < 6 fails one such run in 10⁶.
constexpr double family_bound = 6;

double normal_cdf(double x) { return std::erfc(-x / std::numbers::sqrt2) / 2; }
double normal_density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }

}  // namespace

TEST_CASE("Philox4x32-10 gives the published answers") {
  CHECK(rflow::philox({0, 0, 0, 0}, 0) == words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(rflow::philox({~0u, ~0u, ~0u, ~0u}, ~std::uint64_t{0}) ==
        words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(rflow::philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822u) ==
        words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("an element is a function of its counter: uniform values to the bit, normals to 4 ulp") {
  random_origin const from{0x0123456789abcdef, 77, 5, 10};
  std::ptrdiff_t const rows = 300, cols = 1001;
  auto const u = drawn(rflow::uniform(-0.3, 0.3), from, rows, cols);
  auto const shifted = drawn(rflow::uniform(1, 4), from, rows, cols);
  auto const z = drawn(rflow::gaussian(1), from, rows, cols);
  double worst = 0;
  std::ptrdiff_t different = 0;
  for (std::ptrdiff_t i = 0; i < rows; ++i)
    for (std::ptrdiff_t j = 0; j < cols; ++j) {
      auto const at = static_cast<std::size_t>(i * cols + j);
      auto const column = static_cast<std::uint32_t>(from.col + j), word = column % 4;
      words const w = rflow::philox(
          {column / 4, static_cast<std::uint32_t>(from.row + i), from.matrix, 0}, from.seed);
      double const centred =
          (2 * std::floor(static_cast<std::int32_t>(w[word]) / 256.0) + 1) / 0x1p24;
      different += u[at] != static_cast<float>(static_cast<double>(0.3f) * centred);
      different += shifted[at] != static_cast<float>(2.5 + 1.5 * centred);
      worst = std::max(worst, ulps(z[at], normal_of(w[word & 2], w[(word & 2) + 1], word & 1)));
    }
  CHECK(different == 0);
  CHECK(worst < 0.51);  // rounded once: 4 would do
}

TEST_CASE("normals hold their precision where logarithms and sines are small or large") {
  std::vector<std::uint32_t> radii{0,          1,          2,          3,         1000,
                                   0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
  auto const root = static_cast<std::uint32_t>(0x1p32 * std::sqrt(0.5));
  for (std::uint32_t const bit : {0u, 1u, 2u, 3u, 7u, 15u})
    for (std::uint32_t const near : {root - 1, root, root + 1}) radii.push_back(near >> bit);
  std::vector<std::uint32_t> angles;
  for (std::uint32_t quarter = 0; quarter < 4; ++quarter)
    for (std::uint32_t const offset : {0u, 1u, 0x1fffffffu, 0x20000000u, 0x20000001u, 0x3fffffffu})
      angles.push_back((quarter << 30) + offset);
  std::mt19937 bits(5);
  auto const word = [&] { return static_cast<std::uint32_t>(bits()); };
  for (int i = 0; i < 200; ++i) radii.push_back(word() >> (word() % 32)), angles.push_back(word());
  double worst = 0;
  for (std::uint32_t const r : radii)
    for (std::uint32_t const a : angles) {
      auto const pair = rflow::detail::standard_normals(r, a);
      worst = std::max(worst, ulps(static_cast<float>(pair.first), normal_of(r, a, false)));
      worst = std::max(worst, ulps(static_cast<float>(pair.second), normal_of(r, a, true)));
    }
  CHECK(worst < 0.51);
  CHECK(rflow::detail::standard_normals(0, 0x20000000).first == Approx(6.7637).epsilon(1e-4));
}

TEST_CASE("first values stay what they are") {
  auto const u = drawn(rflow::uniform(-1, 1), {42, 0, 0, 0}, 1, 4);
  CHECK((u == std::vector<float>{-0x1.8c543ep-1f, 0x1.dfd526p-1f, 0x1.2bf508p-3f, 0x1.5d0acep-1f}));
  auto const z = drawn(rflow::gaussian(1), {42, 0, 0, 0}, 1, 4);
  float const expected[] = {-0.548835635f, 0.823219895f, 0.48670584f, 2.23413754f};
  for (std::size_t i = 0; i < 4; ++i) CHECK(ulps(z[i], expected[i]) <= 4);
}

TEST_CASE("any block, any order, any number of threads, any memory: the same values") {
  initializer const laws[] = {rflow::gaussian(0.02), rflow::uniform(-2, 3),
                              rflow::truncated_normal(1, -1.5, 2)};
  random_origin const whole{99, 3, 0, 0};
  std::ptrdiff_t const rows = 70, cols = 601;
  std::mt19937 bits(17);
  for (initializer const& how : laws) {
    CAPTURE(static_cast<int>(how.shape));
    auto const all = drawn(how, whole, rows, cols);
    for (int const threads : {0, 2, 3, 7}) CHECK(drawn(how, whole, rows, cols, threads) == all);

    int different = 0;
    for (int trial = 0; trial < 100; ++trial) {
      auto const r = static_cast<std::ptrdiff_t>(bits() % 70),
                 c = static_cast<std::ptrdiff_t>(bits() % 601);
      auto const m = 1 + static_cast<std::ptrdiff_t>(bits()) % (rows - r);
      auto const n = 1 + static_cast<std::ptrdiff_t>(bits()) % (cols - c);
      auto const block = drawn(how, {99, 3, r, c}, m, n);
      for (std::ptrdiff_t i = 0; i < m; ++i)
        different += std::memcmp(&block[static_cast<std::size_t>(i * n)],
                                 &all[static_cast<std::size_t>((r + i) * cols + c)],
                                 static_cast<std::size_t>(n) * sizeof(float)) != 0;
    }
    CHECK(different == 0);

    Eigen::MatrixXf by_columns(rows, cols);
    draw(how, whole, by_columns);
    Eigen::Matrix<double, -1, -1, Eigen::RowMajor> wide(rows, cols);
    draw(how, whole, wide, 2);
    std::vector<rflow::bf16> brain(all.size());
    draw(how, whole, brain.data(), rows, cols, cols);
    std::vector<rflow::f16> half(all.size());  // upside down, every second place of a larger array
    draw(how, whole, half.data() + (rows - 1) * cols, rows, cols, -cols);
    for (std::ptrdiff_t i = 0; i < rows; ++i)
      for (std::ptrdiff_t j = 0; j < cols; ++j) {
        auto const at = static_cast<std::size_t>(i * cols + j);
        auto const mirrored = static_cast<std::size_t>((rows - 1 - i) * cols + j);
        different += by_columns(i, j) != all[at];
        different += wide(i, j) != static_cast<double>(all[at]);
        different += brain[at].bits != rflow::bf16::nearest(all[at]).bits;
        different += half[mirrored].bits != rflow::f16::nearest(all[at]).bits;
      }
    CHECK(different == 0);
  }
}

TEST_CASE("nothing is written outside of the block") {
  Eigen::MatrixXf x = Eigen::MatrixXf::Constant(20, 30, 7);
  auto block = x.block(3, 5, 10, 11);
  draw(rflow::gaussian(1), {1}, block);
  CHECK((x.array() == 7.f).count() == 20 * 30 - 10 * 11);
  CHECK((block.array() == 7.f).count() == 0);
  draw(rflow::gaussian(1), {1}, x.data(), 0, 5, 5);
  draw(rflow::gaussian(1), {1}, static_cast<float*>(nullptr), 5, 0, 0);
}

TEST_CASE("each initialiser has the mean, the variance and the bounds of its name") {
  struct named {
    char const* name;
    initializer how;
    double mean, variance, kurtosis, low, high;
  };
  double const inf = std::numeric_limits<double>::infinity();
  rflow::fans const f{300, 500};
  auto const normal = [&](char const* name, initializer const& how, double std) {
    return named{name, how, 0, std * std, 3, -inf, inf};
  };
  auto const flat = [](char const* name, initializer const& how, double bound) {
    return named{name, how, 0, bound * bound / 3, 1.8, -bound, bound};
  };
  auto const truncated = [](double std, double low, double high) {
    // Raw moments of a standard normal between a and b, then about the mean.
    double const a = low / std, b = high / std, mass = normal_cdf(b) - normal_cdf(a);
    double raw[5] = {1};
    for (int k = 1; k < 5; ++k)
      raw[k] =
          (k > 1 ? (k - 1) * raw[k - 2] : 0) -
          (std::pow(b, k - 1) * normal_density(b) - std::pow(a, k - 1) * normal_density(a)) / mass;
    double const m = raw[1], v = raw[2] - m * m;
    double const fourth = raw[4] - 4 * m * raw[3] + 6 * m * m * raw[2] - 3 * m * m * m * m;
    return named{"truncated normal",
                 rflow::truncated_normal(std, low, high),
                 std * m,
                 std * std * v,
                 fourth / (v * v),
                 low,
                 high};
  };
  named const all[] = {
      normal("gaussian", rflow::gaussian(0.02), 0.02),
      flat("uniform", rflow::uniform(-0.25, 0.25), 0.25),
      {"uniform, off centre", rflow::uniform(2, 10), 6, 64 / 12.0, 1.8, 2, 10},
      flat("xavier_uniform", rflow::xavier_uniform(f), std::sqrt(6 / 800.0)),
      flat("xavier_uniform, gain", rflow::xavier_uniform(f, 5 / 3.0),
           5 / 3.0 * std::sqrt(6 / 800.0)),
      normal("xavier_normal", rflow::xavier_normal(f), std::sqrt(2 / 800.0)),
      flat("kaiming_uniform", rflow::kaiming_uniform(f), std::sqrt(6 / 300.0)),
      flat("kaiming_uniform, out", rflow::kaiming_uniform(f, rflow::fan_mode::out),
           std::sqrt(6 / 500.0)),
      normal("kaiming_normal", rflow::kaiming_normal(f), std::sqrt(2 / 300.0)),
      normal("kaiming_normal, gain", rflow::kaiming_normal(f, rflow::fan_mode::out, 1),
             std::sqrt(1 / 500.0)),
      flat("pytorch_default", rflow::pytorch_default(300), 1 / std::sqrt(300.0)),
      normal("depth_scaled_normal", rflow::depth_scaled_normal(0.02, 32), 0.02 / 8),
      truncated(0.02, -0.04, 0.04),
      truncated(1, -0.5, 3),
      truncated(1, 0.8, 1.2),
  };
  std::uint64_t const seed = 2024;
  MESSAGE("seed ", seed);
  std::uint32_t matrix = 0;
  for (named const& c : all) {
    CAPTURE(c.name);
    std::ptrdiff_t const n = 1 << 10;
    auto const x = drawn(c.how, {seed, matrix++, 0, 0}, n, n, 2);
    auto const count = static_cast<double>(n * n);
    moments const m = moments_of(x);
    CHECK(std::abs(m.mean - c.mean) < family_bound * std::sqrt(c.variance / count));
    double const spread = std::sqrt((c.kurtosis - 1) / count);  // of the variance, relative
    CHECK(std::abs(m.variance / c.variance - 1) < family_bound * spread);
    CHECK(family_bound * spread < 0.02);  // so that a constant wrong by 5 % shows
    CHECK(m.kurtosis == Approx(c.kurtosis).epsilon(0.03));
    CHECK(m.low >= static_cast<float>(c.low));
    CHECK(m.high <= static_cast<float>(c.high));
    if (c.how.shape == initializer::law::uniform) {
      CHECK(m.low < c.mean - 0.9999 * (c.high - c.mean));
      CHECK(m.high > c.mean + 0.9999 * (c.high - c.mean));
    }
  }
}

TEST_CASE("values are spread as their law says, tails included") {
  std::ptrdiff_t const n = 1 << 11;
  auto const count = static_cast<double>(n * n);
  int const bins = 1000;
  auto const chi_square = [&](auto const& bin_of) {
    std::vector<double> seen(static_cast<std::size_t>(bins));
    for (double const b : bin_of) seen[static_cast<std::size_t>(b)] += 1;
    double sum = 0;
    for (double const s : seen) sum += (s - count / bins) * (s - count / bins) / (count / bins);
    return (sum - (bins - 1)) / std::sqrt(2.0 * (bins - 1));  // nearly standard normal
  };
  std::vector<double> bin;
  for (float const u : drawn(rflow::uniform(0, 1), {8, 1, 0, 0}, n, n))
    bin.push_back(std::min(std::floor(static_cast<double>(u) * bins), bins - 1.0));
  CHECK(std::abs(chi_square(bin)) < family_bound);
  bin.clear();
  double beyond_4 = 0;
  for (float const z : drawn(rflow::gaussian(1), {8, 2, 0, 0}, n, n)) {
    bin.push_back(std::floor(normal_cdf(static_cast<double>(z)) * bins));
    beyond_4 += std::abs(z) > 4;
  }
  CHECK(std::abs(chi_square(bin)) < family_bound);
  double const expected = count * 2 * normal_cdf(-4);
  CHECK(std::abs(beyond_4 - expected) < family_bound * std::sqrt(expected));
}

TEST_CASE("neighbours, words of one counter, rows, matrices and seeds are independent") {
  std::ptrdiff_t const n = 512;
  auto const count = static_cast<double>(n * n);
  auto const x = drawn(rflow::gaussian(1), {5, 0, 0, 0}, n, n);
  // Correlations of values, and of squares, which Box and Muller's shared radius would show.
  auto const check = [&](char const* what, std::vector<float> const& a,
                         std::vector<float> const& b) {
    CAPTURE(what);
    double plain = 0, squares = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      double const p = static_cast<double>(a[i]), q = static_cast<double>(b[i]);
      plain += p * q / std::sqrt(count);
      squares += (p * p - 1) * (q * q - 1) / 2 / std::sqrt(count);
    }
    CHECK(std::abs(plain) < family_bound);
    CHECK(std::abs(squares) < family_bound);
  };
  for (std::ptrdiff_t const lag : {1, 2, 3, 4, 5, 8, 64, 256})
    check("columns", x, drawn(rflow::gaussian(1), {5, 0, 0, lag}, n, n));
  for (std::ptrdiff_t const lag : {1, 2, 16, 64})
    check("rows", x, drawn(rflow::gaussian(1), {5, 0, lag, 0}, n, n));
  check("matrices", x, drawn(rflow::gaussian(1), {5, 1, 0, 0}, n, n));
  check("matrix and row", x, drawn(rflow::gaussian(1), {5, 1, 1, 4}, n, n));
  check("seeds", x, drawn(rflow::gaussian(1), {6, 0, 0, 0}, n, n));
  check("far seeds", x, drawn(rflow::gaussian(1), {5 + (std::uint64_t{1} << 32), 0, 0, 0}, n, n));
  CHECK(drawn(rflow::gaussian(1), {5, 0, 0, 4}, 1, 1)[0] == x[4]);  // a lag is a shift of the same
}

TEST_CASE("nothing that is drawn is infinite: a law too wide is refused") {
  for (double const wide : {5.1e37, 1e38, 3e38})
    CHECK_THROWS_AS(rflow::gaussian(wide), std::invalid_argument);
  double const infinity = std::numeric_limits<double>::infinity(), most = 3.4028234663852886e38;
  CHECK_THROWS_AS(rflow::gaussian(infinity), std::invalid_argument);
  CHECK_THROWS_AS(rflow::truncated_normal(1e38, -1e38, 1e38), std::invalid_argument);
  CHECK_THROWS_AS(rflow::uniform(-infinity, infinity), std::invalid_argument);
  CHECK_THROWS_AS(rflow::uniform(0, 4e38), std::invalid_argument);
  CHECK_THROWS_AS(rflow::xavier_normal({1, 1}, infinity), std::invalid_argument);
  CHECK_THROWS_AS(rflow::kaiming_normal({1, 1}, rflow::fan_mode::in, 1e38), std::invalid_argument);
  // The widest that are allowed, where a normal is largest: the word that lies next to 0.
  auto const z = rflow::detail::standard_normals(0, 0);
  CHECK(std::hypot(z.first, z.second) < rflow::detail::largest_normal);
  CHECK(std::hypot(z.first, z.second) > 6.76);
  for (auto const& how : {rflow::gaussian(5e37), rflow::uniform(-most, most),
                          rflow::truncated_normal(5e37, -infinity, 1e300)}) {
    for (float const x : drawn(how, {3, 0, 0, 0}, 300, 300)) CHECK(std::isfinite(x));
    rflow::f16 narrow{};
    CHECK_THROWS_AS(draw(how, {}, &narrow, 1, 1, 1), std::invalid_argument);
  }
  rflow::f16 x[16];
  CHECK_THROWS_AS(draw(rflow::gaussian(1e4), {}, x, 1, 16, 16), std::invalid_argument);
  CHECK_NOTHROW(draw(rflow::gaussian(9e3), {}, x, 1, 16, 16));
  CHECK_NOTHROW(draw(rflow::truncated_normal(1e5, -6e4, 6e4), {}, x, 1, 16, 16));
  for (rflow::f16 const v : x) CHECK(std::isfinite(static_cast<float>(v)));
}

TEST_CASE("misuse is refused") {
  CHECK_THROWS_WITH_AS(rflow::gaussian(0),
                       "rflow::gaussian: stddev is 0.000000, not a positive float",
                       std::invalid_argument);
  CHECK_THROWS_AS(rflow::gaussian(std::nan("")), std::invalid_argument);
  CHECK_THROWS_AS(rflow::gaussian(1e300), std::invalid_argument);
  CHECK_THROWS_AS(rflow::uniform(1, 1), std::invalid_argument);
  CHECK_THROWS_AS(rflow::truncated_normal(1, 5, 6), std::invalid_argument);
  CHECK_THROWS_AS(rflow::truncated_normal(1, 2, -2), std::invalid_argument);
  CHECK_THROWS_AS(rflow::xavier_uniform({0, 5}), std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::kaiming_normal({0, 5}),
                       "rflow::kaiming_normal: a fan of 0.000000 (in 0.000000, out 5.000000)",
                       std::invalid_argument);
  CHECK_NOTHROW(rflow::kaiming_normal({0, 5}, rflow::fan_mode::out));
  CHECK_THROWS_AS(rflow::depth_scaled_normal(0.02, 0), std::invalid_argument);
  float x[4];
  CHECK_THROWS_AS(draw(rflow::gaussian(1), {}, x, -1, 2, 2), std::invalid_argument);
  CHECK_THROWS_AS(draw(rflow::gaussian(1), {1, 0, -1, 0}, x, 1, 2, 2), std::invalid_argument);
  CHECK_THROWS_AS(draw(rflow::gaussian(1), {1, 0, std::ptrdiff_t{1} << 32, 0}, x, 1, 2, 2),
                  std::invalid_argument);
  CHECK_THROWS_AS(draw(rflow::gaussian(1), {1, 0, 0, (std::ptrdiff_t{1} << 34) - 1}, x, 1, 2, 2),
                  std::invalid_argument);
  CHECK_NOTHROW(draw(rflow::gaussian(1), {1, 0, 0, (std::ptrdiff_t{1} << 34) - 2}, x, 1, 2, 2));
  CHECK_THROWS_AS(draw(rflow::gaussian(1), {}, static_cast<float*>(nullptr), 1, 2, 2),
                  std::invalid_argument);
}
