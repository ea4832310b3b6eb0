// SPDX-License-Identifier: Apache-2.0

// The tile engine against sums written out in double, over random shapes, layouts and bounds.

#include <rflow/detail/cpu/gram.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

namespace {

using namespace rflow;
namespace engine = rflow::detail;
using std::ptrdiff_t;
using matrix = std::vector<double>;  // row-major

std::size_t at(ptrdiff_t i) { return static_cast<std::size_t>(i); }

template <class T>
T stored(double x) {
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(x);
  else
    return T::nearest(static_cast<float>(x));
}
template <class T>
double read(T x) {
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<double>(x);
  else
    return static_cast<double>(static_cast<float>(x));
}

/// One site in some layout, with rows that a mask leaves out.
template <class T>
struct site {
  ptrdiff_t n, d;
  std::vector<ptrdiff_t> selected;
  std::vector<T> data;
  engine::site_rows<T> rows;

  site(std::mt19937& g, ptrdiff_t tokens, ptrdiff_t width, int layout, bool masked, double offset,
       double scale = 1)
      : n(tokens), d(width) {
    std::normal_distribution<double> normal;
    ptrdiff_t const all = masked ? 2 * n : n;
    for (ptrdiff_t i = 0; i < n; ++i) selected.push_back(masked ? 2 * i + (i % 2) : i);
    ptrdiff_t row_stride = d, col_stride = 1;
    if (layout == 1) row_stride = d + 3;
    if (layout == 2) row_stride = 1, col_stride = all;
    if (layout == 3) row_stride = 2 * d, col_stride = 2;
    data.resize(at(all * d * 2 + 3 * all));
    for (T& x : data) x = stored<T>(scale * (normal(g) + offset));
    rows = {view<T>(data.data(), all, d, row_stride, col_stride),
            masked ? selected.data() : nullptr};
  }
  site(site&&) = default;

  matrix centred() const {
    matrix x(at(n * d));
    for (ptrdiff_t k = 0; k < d; ++k) {
      double mean = 0;
      for (ptrdiff_t i = 0; i < n; ++i) mean += read(rows.x(selected[at(i)], k));
      mean /= static_cast<double>(n);
      for (ptrdiff_t i = 0; i < n; ++i) x[at(i * d + k)] = read(rows.x(selected[at(i)], k)) - mean;
    }
    return x;
  }
};

matrix inner_products(matrix const& x, ptrdiff_t n) {
  ptrdiff_t const d = static_cast<ptrdiff_t>(x.size()) / n;
  matrix k(at(n * n));
  for (ptrdiff_t i = 0; i < n; ++i)
    for (ptrdiff_t j = 0; j < n; ++j)
      for (ptrdiff_t f = 0; f < d; ++f) k[at(i * n + j)] += x[at(i * d + f)] * x[at(j * d + f)];
  return k;
}

/// U(K) for any kernel matrix, from its row sums without the diagonal; its diagonal is 0.
matrix u_centred(matrix const& k, ptrdiff_t n) {
  matrix u(k), rows(at(n));
  double const m = static_cast<double>(n);
  double total = 0;
  for (ptrdiff_t i = 0; i < n; ++i) {
    for (ptrdiff_t j = 0; j < n; ++j) rows[at(i)] += i == j ? 0 : k[at(i * n + j)];
    total += rows[at(i)];
  }
  for (ptrdiff_t i = 0; i < n; ++i)
    for (ptrdiff_t j = 0; j < n; ++j)
      u[at(i * n + j)] = i == j ? 0
                                : u[at(i * n + j)] - (rows[at(i)] + rows[at(j)]) / (m - 2) +
                                      total / ((m - 1) * (m - 2));
  return u;
}

/// HKH.
matrix h_centred(matrix const& k, ptrdiff_t n) {
  matrix h(k), rows(at(n));
  double const m = static_cast<double>(n);
  double total = 0;
  for (ptrdiff_t i = 0; i < n; ++i) {
    for (ptrdiff_t j = 0; j < n; ++j) rows[at(i)] += k[at(i * n + j)] / m;
    total += rows[at(i)] / m;
  }
  for (ptrdiff_t i = 0; i < n; ++i)
    for (ptrdiff_t j = 0; j < n; ++j) h[at(i * n + j)] += total - rows[at(i)] - rows[at(j)];
  return h;
}

double dot(matrix const& a, matrix const& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

template <class F>
matrix transformed(matrix const& k, ptrdiff_t n, F f) {
  matrix g(k.size());
  for (ptrdiff_t i = 0; i < n; ++i)
    for (ptrdiff_t j = 0; j < n; ++j)
      g[at(i * n + j)] = f(k[at(i * n + j)], k[at(i * n + i)], k[at(j * n + j)]);
  return g;
}

/// Compares moments with kernel matrices, by what metrics read of them.
void check(gram_moments const& m, std::vector<matrix> const& kernels, double tolerance) {
  ptrdiff_t const sites = static_cast<ptrdiff_t>(kernels.size()), n = m.tokens;
  REQUIRE(m.sites == sites);
  std::vector<matrix> u, h;
  for (matrix const& k : kernels) u.push_back(u_centred(k, n)), h.push_back(h_centred(k, n));
  for (ptrdiff_t p = 0; p < sites; ++p) {
    matrix const& k = kernels[at(p)];
    double const norm = std::sqrt(dot(h[at(p)], h[at(p)]));
    for (ptrdiff_t q = 0; q < sites; ++q) {
      double const within = tolerance * norm * std::sqrt(dot(h[at(q)], h[at(q)])) + 1e-300;
      CHECK(std::abs(m.u_product(p, q) - dot(u[at(p)], u[at(q)])) <= within);
      CHECK(std::abs(m.h_product(p, q) - dot(h[at(p)], h[at(q)])) <= within);
      CHECK(m.product(p, q) == m.product(q, p));
    }
    double trace = 0, all = 0;
    for (ptrdiff_t i = 0; i < n; ++i) trace += h[at(p)][at(i * (n + 1))];
    CHECK(std::abs(m.centred_trace(p) - trace) <= tolerance * (std::abs(trace) + norm));
    for (ptrdiff_t i = 0; i < n; ++i) {
      double squares = 0;
      for (ptrdiff_t j = 0; j < n; ++j)
        if (i != j) squares += k[at(i * n + j)] * k[at(i * n + j)];
      all += squares;
      double const found = m.squares[at(p * n + i)];
      if (m.path == gram_path::gram || found > 0)
        CHECK(std::abs(found - squares) <=
              4 * tolerance * (squares + norm * norm / static_cast<double>(n)));
    }
    CHECK(std::abs(m.square_sum[at(p)] - all) <= 4 * tolerance * (all + norm * norm));
  }
}

ptrdiff_t between(std::mt19937& g, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(g);
}

/// A memory bound that fits the smallest tile and not much more, or the default.
std::size_t some_bound(std::mt19937& g) {
  return g() % 2 ? std::size_t{256} << 20 : std::size_t{1200} << 10;
}

template <class T>
void random_shapes(unsigned seed) {
  using C = compute_t<T>;
  double const tolerance = std::is_same_v<C, double> ? 1e-12 : 4e-6;
  INFO("seed " << seed);
  std::mt19937 g(seed);
  ptrdiff_t const n = between(g, 4, 300), count = between(g, 1, 7);
  INFO("n = " << n << ", S = " << count);
  std::vector<site<T>> sites;
  std::vector<engine::panel_source<C>> sources;
  std::vector<matrix> k;
  sites.reserve(at(count));
  for (ptrdiff_t p = 0; p < count; ++p) {
    sites.emplace_back(g, n, g() % 4 ? between(g, 1, 60) : between(g, 1, 700),
                       static_cast<int>(g() % 4), g() % 2 == 0,
                       std::is_floating_point_v<T> ? 3. : 0.5);
    sources.push_back(engine::source_of<C>(sites.back().rows));
    k.push_back(inner_products(sites.back().centred(), n));
  }
  engine::gram_options options{{1}, some_bound(g), gram_path::gram};
  gram_moments const one = engine::gram<C>(sources, n, engine::linear_kernel{}, options);
  check(one, k, tolerance);
  for (int threads : {2, 5}) {
    options.workers.threads = threads;
    gram_moments const more = engine::gram<C>(sources, n, engine::linear_kernel{}, options);
    CHECK(more.products == one.products);
    CHECK(more.squares == one.squares);
    CHECK(more.diagonal == one.diagonal);
  }

  options.path = gram_path::feature;
  gram_moments const by_feature = engine::gram<C>(sources, n, engine::linear_kernel{}, options);
  CHECK(by_feature.path == gram_path::feature);
  check(by_feature, k, 4 * tolerance);
  options.workers.threads = 1;
  CHECK(engine::gram<C>(sources, n, engine::linear_kernel{}, options).products ==
        by_feature.products);

  // RBF with given and with found bandwidths, and a kernel of the user's own.
  engine::rbf_kernel kernel;
  std::vector<matrix> rbf_matrices, own_matrices;
  for (matrix const& x : k) {
    double trace = 0;
    for (ptrdiff_t i = 0; i < n; ++i) trace += x[at(i * n + i)] / static_cast<double>(n);
    double const sigma = std::sqrt(2 * trace);
    kernel.sigma.push_back(sigma);
    rbf_matrices.push_back(transformed(x, n, [&](double xy, double xx, double yy) {
      return std::exp(-(xx + yy - 2 * xy) / (2 * sigma * sigma));
    }));
    own_matrices.push_back(transformed(x, n, [&](double xy, double xx, double yy) {
      return 1 / (1 + std::sqrt(xx * yy)) + 0.01 * xy / (1 + std::sqrt(xx * yy));
    }));
  }
  options.path = gram_path::automatic;
  gram_moments const rbf_one = engine::gram<C>(sources, n, kernel, options);
  check(rbf_one, rbf_matrices, 10 * tolerance);
  auto const own = [](double xy, double xx, double yy) {
    return 1 / (1 + std::sqrt(xx * yy)) + 0.01 * xy / (1 + std::sqrt(xx * yy));
  };
  engine::function_kernel<decltype(own)> const function{own};
  check(engine::gram<C>(sources, n, function, options), own_matrices, 20 * tolerance);
  options.workers.threads = 3;
  gram_moments const rbf_three = engine::gram<C>(sources, n, kernel, options);
  CHECK(rbf_three.products == rbf_one.products);
  CHECK(rbf_three.row_sums == rbf_one.row_sums);
}

}  // namespace

TEST_CASE("gram: random shapes, layouts and bounds agree with sums in double") {
  for (unsigned seed = 1; seed <= 12; ++seed) {
    random_shapes<float>(seed);
    random_shapes<double>(seed + 100);
    random_shapes<bf16>(seed + 200);
    random_shapes<f16>(seed + 300);
  }
}

TEST_CASE("gram: an offset of 30 does not spoil the self term in float") {
  for (unsigned seed = 1; seed <= 5; ++seed) {
    INFO("seed " << seed);
    std::mt19937 g(seed);
    site<float> const x(g, 32, 1024, 0, false, 30);
    matrix const u = u_centred(inner_products(x.centred(), 32), 32);
    double const expected = dot(u, u);
    gram_moments const m = engine::gram<float>({engine::source_of<float>(x.rows)}, 32,
                                               engine::linear_kernel{}, engine::gram_options{});
    CHECK(std::abs(m.product(0, 0) / expected - 1) < 1e-5);
  }
}

TEST_CASE("gram: the scale of the data does not matter") {
  for (double const scale : {1e-30, 1e-20, 1e-6, 1e6, 1e18, 1e30}) {
    INFO("scale " << scale);
    std::mt19937 g(7), h(7);
    site<float> const x(g, 50, 40, 0, false, 1);
    site<float> const y(h, 50, 40, 0, false, 1, scale);
    engine::gram_options const options{{2}, std::size_t{256} << 20, gram_path::gram};
    gram_moments const m = engine::gram<float>({engine::source_of<float>(x.rows)}, 50,
                                               engine::linear_kernel{}, options);
    gram_moments const s = engine::gram<float>({engine::source_of<float>(y.rows)}, 50,
                                               engine::linear_kernel{}, options);
    double const unit = std::ldexp(1., s.exponent[0]) / (scale * scale);
    CHECK(s.product(0, 0) * unit * unit == doctest::Approx(m.product(0, 0)).epsilon(1e-5));
    CHECK(s.diagonal[3] * unit == doctest::Approx(m.diagonal[3]).epsilon(1e-5));
  }
  engine::gram_options by_tiles;
  by_tiles.path = gram_path::gram;
  for (double const scale : {1e-70, 1e70}) {
    std::mt19937 g(7);
    site<double> const x(g, 50, 40, 0, false, 1, scale);
    gram_moments const m = engine::gram<double>({engine::source_of<double>(x.rows)}, 50,
                                                engine::linear_kernel{}, by_tiles);
    matrix y = x.centred();
    for (double& v : y) v /= scale;
    matrix const u = u_centred(inner_products(y, 50), 50);
    double const expected = dot(u, u);
    double const unit = std::ldexp(1., m.exponent[0]) / (scale * scale);
    CHECK(m.product(0, 0) * unit * unit == doctest::Approx(expected).epsilon(1e-12));
  }
}

TEST_CASE("gram: a NaN in one site leaves the others as they are") {
  for (auto const path : {gram_path::gram, gram_path::feature}) {
    std::mt19937 g(3);
    std::vector<site<float>> sites;
    for (int p = 0; p < 3; ++p) sites.emplace_back(g, 70, 33, 0, false, 1);
    std::vector<engine::panel_source<float>> sources;
    for (auto const& s : sites) sources.push_back(engine::source_of<float>(s.rows));
    engine::gram_options const options{{2}, std::size_t{256} << 20, path};
    gram_moments const good = engine::gram<float>(sources, 70, engine::linear_kernel{}, options);
    sites[1].data[at(12 * 33 + 5)] = std::numeric_limits<float>::quiet_NaN();
    sites[1].data[at(40 * 33 + 1)] = std::numeric_limits<float>::infinity();
    gram_moments const m = engine::gram<float>(sources, 70, engine::linear_kernel{}, options);
    CHECK(m.why[1] == status::non_finite);
    CHECK(m.non_finite[1].token == 12);
    CHECK(m.non_finite[1].feature == 5);
    CHECK(!m.non_finite[0].found());
    for (ptrdiff_t p : {0, 2})
      for (ptrdiff_t q : {0, 2}) CHECK(m.product(p, q) == good.product(p, q));
    for (ptrdiff_t q : {0, 1, 2}) {
      CHECK(!engine::is_finite(m.product(1, q)));
      CHECK(!engine::is_finite(m.product(q, 1)));
    }
  }
}

TEST_CASE("gram: a constant site is constant, whatever its value") {
  for (double const value : {0., 0.1, 12345.678})
    for (auto const path : {gram_path::gram, gram_path::feature}) {
      std::vector<float> const x(101 * 7, static_cast<float>(value));
      std::vector<double> const y(101 * 7, value);
      engine::site_rows<float> const rows{view<float>(x.data(), 101, 7), nullptr};
      engine::site_rows<double> const wide{view<double>(y.data(), 101, 7), nullptr};
      engine::gram_options const options{{1}, std::size_t{256} << 20, path};
      auto const one = engine::gram<float>({engine::source_of<float>(rows)}, 101,
                                           engine::linear_kernel{}, options);
      auto const two = engine::gram<double>({engine::source_of<double>(wide)}, 101,
                                            engine::linear_kernel{}, options);
      CHECK(one.why[0] == status::constant_layer);
      CHECK(two.why[0] == status::constant_layer);
      CHECK(one.product(0, 0) == 0);
      CHECK(two.product(0, 0) == 0);
    }
}

TEST_CASE("gram: bandwidths are medians of squared distances, in both conventions") {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    INFO("seed " << seed);
    std::mt19937 g(seed);
    ptrdiff_t const n = between(g, 2, 200);
    site<double> const x(g, n, between(g, 1, 50), 0, false, 2);
    matrix const k = inner_products(x.centred(), n);
    for (auto const convention : {rbf::median::all_pairs, rbf::median::upper_triangle}) {
      matrix distances;
      for (ptrdiff_t i = 0; i < n; ++i)
        for (ptrdiff_t j = 0; j < n; ++j)
          if (convention == rbf::median::all_pairs || i < j)
            distances.push_back(
                i == j ? 0 : k[at(i * n + i)] + k[at(j * n + j)] - 2 * k[at(i * n + j)]);
      std::sort(distances.begin(), distances.end());
      double const median =
          (distances[(distances.size() - 1) / 2] + distances[distances.size() / 2]) / 2;
      gram_moments const m = engine::gram_rbf<double>({engine::source_of<double>(x.rows)}, n,
                                                      rbf{0.5, convention}, engine::gram_options{});
      CHECK(m.sigma[0] * m.sigma[0] == doctest::Approx(0.25 * median).epsilon(1e-12));
    }
  }
}

TEST_CASE("gram: copies of one token have bandwidth 0") {
  std::mt19937 g(5);
  std::normal_distribution<float> normal;
  std::vector<float> x(40 * 300);
  for (float& v : x) v = normal(g);
  for (std::size_t i = 3 * 300; i < x.size(); ++i) x[i] = x[i - 300];
  engine::site_rows<float> const rows{view<float>(x.data(), 40, 300), nullptr};
  gram_moments const m =
      engine::gram_rbf<float>({engine::source_of<float>(rows)}, 40, rbf{}, engine::gram_options{});
  CHECK(m.sigma[0] == 0);
  CHECK(m.why[0] == status::zero_bandwidth);
}

TEST_CASE("gram: a memory bound too small for one tile is an error that names both") {
  std::mt19937 g(5);
  site<float> const x(g, 100, 10, 0, false, 2);
  engine::gram_options const options{{1}, 1000};
  CHECK_THROWS_AS(engine::gram<float>({engine::source_of<float>(x.rows)}, 100,
                                      engine::linear_kernel{}, options),
                  std::invalid_argument);
}

TEST_CASE("gram: the cheaper path is found by counting") {
  auto const few_tokens = engine::count_operations(1000, {768, 768, 768});
  auto const many_tokens = engine::count_operations(100000, {64, 64, 64});
  CHECK(few_tokens.gram < few_tokens.feature);
  CHECK(many_tokens.feature < many_tokens.gram);
}
