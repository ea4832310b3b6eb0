// SPDX-License-Identifier: Apache-2.0
#include <rflow/statistics.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <Eigen/Core>

using doctest::Approx;
using Eigen::MatrixXd;
namespace detail = rflow::detail;

namespace {

/// A symmetric matrix with zero diagonal, zero row sums and norm 1: of the products of rows.
MatrixXd centred_products(MatrixXd x) {
  x.rowwise() -= x.colwise().mean().eval();
  MatrixXd u = x * x.transpose();
  u.diagonal().setZero();
  double const count = static_cast<double>(x.rows());
  Eigen::VectorXd const rows = u.rowwise().sum() / (count - 2);
  double const offset = u.sum() / (count - 1) / (count - 2);
  u = (u.colwise() - rows).rowwise() - rows.transpose();
  u.array() += offset;
  u.diagonal().setZero();
  return u / u.norm();
}

/// The same of normals, row 2 and 7 `times` as large.
MatrixXd drawn(std::mt19937& bits, Eigen::Index n, Eigen::Index d, double times) {
  std::normal_distribution<double> normal;
  MatrixXd x = MatrixXd::NullaryExpr(n, d, [&] { return normal(bits); });
  x.row(2) *= times;
  x.row(7) *= times / 2;
  return centred_products(x);
}

struct prepared {
  detail::shuffle_moments moments;
  std::vector<double> rows;

  explicit prepared(MatrixXd const& u) : rows(static_cast<std::size_t>(4 * u.rows())) {
    Eigen::Index const n = u.rows();
    Eigen::VectorXd const squares = u.array().square().rowwise().sum();

    moments = detail::find_shuffle_moments(
        n, squares.data(), u.array().cube().sum(), (u * u * u).trace(),
        [&](std::ptrdiff_t a, double* to) {
          for (Eigen::Index i = 0; i < n; ++i) to[i] = u(a, i);
        },
        [&](double const* x, double* to) {
          Eigen::Map<Eigen::VectorXd>(to, n) = u * Eigen::Map<Eigen::VectorXd const>(x, n);
        },
        rows.data());
  }
  int token(std::size_t r) const { return static_cast<int>(moments.token[r]); }
  detail::shuffled_site site() const {
    return {reinterpret_cast<double const*>(&moments), rows.data(),
            static_cast<std::ptrdiff_t>(rows.size() / 4)};
  }
};

double paired(MatrixXd const& u, MatrixXd const& v, std::vector<int> const& order) {
  double sum = 0;
  for (Eigen::Index i = 1; i < u.rows(); ++i)
    for (Eigen::Index j = 0; j < i; ++j)
      sum += u(j, i) * v(order[static_cast<std::size_t>(j)], order[static_cast<std::size_t>(i)]);
  return 2 * sum;
}

std::vector<int> first_order(Eigen::Index n) {
  std::vector<int> order;
  for (int i = 0; i < n; ++i) order.push_back(i);
  return order;
}

/// T of so many orders drawn, the largest first.
std::vector<double> drawn_sums(MatrixXd const& u, MatrixXd const& v, int trials, unsigned seed) {
  int const n = static_cast<int>(u.rows());
  std::vector<double> below, all;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      if (j < i) below.push_back(2 * u(i, j));
      all.push_back(v(i, j));
    }
  std::vector<int> order = first_order(n);
  std::vector<double> t(static_cast<std::size_t>(trials));
  std::mt19937 g(seed);
  for (double& sum : t) {
    for (std::uint64_t i = static_cast<std::uint64_t>(n) - 1; i > 0; --i)
      std::swap(order[i], order[g() * (i + 1) >> 32]);
    double const* of_u = below.data();
    for (int i = 0; i < n; ++i) {
      double const* const row = all.data() + order[static_cast<std::size_t>(i)] * n;
      for (int const* j = order.data(); j < order.data() + i; ++j) sum += *of_u++ * row[*j];
    }
  }
  std::sort(t.rbegin(), t.rend());
  return t;
}

/// Of normals, the first `count` rows `times` as large.
MatrixXd with_massive(std::mt19937& bits, Eigen::Index n, Eigen::Index d, Eigen::Index count,
                      double times) {
  std::normal_distribution<double> normal;
  MatrixXd x = MatrixXd::NullaryExpr(n, d, [&] { return normal(bits); });
  x.topRows(count) *= times;
  return centred_products(x);
}

}  // namespace

TEST_CASE("the 97.5 % points of Student's t are those of tables") {
  // Published to ten digits; 1, 2 and 4 degrees have closed forms.
  using detail::student_975;
  CHECK(student_975(1) == Approx(std::tan(0.475 * 3.14159265358979323846)).epsilon(1e-11));
  CHECK(student_975(2) == Approx(0.95 * std::sqrt(2 / (1 - 0.95 * 0.95))).epsilon(1e-11));
  CHECK(student_975(3) == Approx(3.182446305284263).epsilon(1e-11));
  CHECK(student_975(4) == Approx(2.776445105197793).epsilon(1e-11));
  CHECK(student_975(5) == Approx(2.570581835636314).epsilon(1e-11));
  CHECK(student_975(10) == Approx(2.228138851986274).epsilon(1e-11));
  CHECK(student_975(30) == Approx(2.042272456301238).epsilon(1e-11));
  CHECK(student_975(100) == Approx(1.983971518523552).epsilon(1e-11));
  CHECK(student_975(1e6) == Approx(1.9599663568).epsilon(1e-10));
  // where one formula takes over from the other
  CHECK(student_975(1000) == Approx(student_975(1000.0000001)).epsilon(1e-11));
}

TEST_CASE("tails of Pearson III distributions") {
  using detail::pearson_tail;
  CHECK(pearson_tail(1.6448536269514722, 0) == Approx(0.05).epsilon(1e-12));
  CHECK(pearson_tail(0, 2) == Approx(std::exp(-1.0)).epsilon(1e-13));  // an exponential one
  CHECK(pearson_tail(5, 2) == Approx(std::exp(-6.0)).epsilon(1e-12));
  CHECK(pearson_tail(-1, 2) == 1);
  CHECK(pearson_tail(0, -2) == Approx(1 - std::exp(-1.0)).epsilon(1e-13));
  CHECK(pearson_tail(1, -2) == 0);
  for (double const z : {-3.0, -0.5, 0.0, 1.0, 4.0})
    CHECK(pearson_tail(z, 0.0101) == Approx(pearson_tail(z, 0.0099)).epsilon(1e-2));
}

TEST_CASE("the quick tail is near the exact one") {
  for (double const skewness : {-0.6, -0.3, -0.05, 0.0, 0.02, 0.3, 0.6})
    for (double const z : {-2.0, 0.0, 1.0, 2.0, 3.0, 4.0}) {
      double const exact = detail::pearson_tail(z, skewness);
      CHECK(std::abs(detail::quick_pearson_tail(z, skewness) - exact) < 0.06 * exact + 1e-7);
    }
}

TEST_CASE("three moments of T, where heavy tokens land as they are told, are those of all orders") {
  int const n = 9;
  std::mt19937 bits(1);
  for (double const times : {1.0, 30.0}) {
    CAPTURE(times);
    MatrixXd const u = drawn(bits, n, 3, times), v = drawn(bits, n, 4, times);
    prepared const a(u), b(v);
    struct placement {
      std::vector<std::size_t> from, to;
      double count = 0, first = 0, second = 0, third = 0;
    };
    std::vector<placement> all{{{}, {}},
                               {{0}, {0}},
                               {{1}, {0}},
                               {{2}, {1}},
                               {{0, 1}, {0, 1}},
                               {{0, 1}, {1, 0}},
                               {{0, 2}, {2, 1}},
                               {{0, 1, 2}, {0, 1, 2}},
                               {{0, 1, 2}, {2, 0, 1}}};
    std::vector<int> order = first_order(n);
    do {
      double const t = paired(u, v, order);
      for (placement& p : all) {
        bool so = true;
        for (std::size_t r = 0; r < p.from.size(); ++r)
          so = so && order[static_cast<std::size_t>(a.token(p.from[r]))] == b.token(p.to[r]);
        if (so) p.count += 1, p.first += t, p.second += t * t, p.third += t * t * t;
      }
    } while (std::next_permutation(order.begin(), order.end()));
    for (placement const& p : all) {
      unsigned of_u = 0, of_v = 0;
      for (std::size_t const r : p.from) of_u |= 1U << r;
      for (std::size_t const r : p.to) of_v |= 1U << r;
      std::vector<std::size_t> rank;
      for (std::size_t const r : p.to)
        rank.push_back(static_cast<std::size_t>(
            std::count_if(p.to.begin(), p.to.end(), [&](std::size_t s) { return s < r; })));
      detail::raw_moments const m = detail::moments_where(n, rank.size(), rank.data(),
                                                          a.moments.of[of_u], b.moments.of[of_v]);
      CHECK(std::abs(m.first - p.first / p.count) < 1e-12);
      CHECK(std::abs(m.second - p.second / p.count) < 1e-12);
      CHECK(std::abs(m.third - p.third / p.count) < 1e-12);
    }
  }
}

TEST_CASE("tails over shuffled tokens are those of resampling, with massive tokens or without") {
  unsigned const seed = 11;
  CAPTURE(seed);
  std::mt19937 bits(seed);
  int const n = 70, trials = 60'000;
  for (double const of_u : {1.0, 10.0, 1000.0})
    for (double const of_v : {1.0, 1000.0}) {
      CAPTURE(of_u);
      CAPTURE(of_v);
      MatrixXd const u = drawn(bits, n, 12, of_u), v = drawn(bits, n, 12, of_v);
      detail::shuffled_site const a = prepared(u).site(), b = prepared(v).site();
      std::vector<int> order = first_order(n);
      std::vector<double> t;
      for (int k = 0; k < trials; ++k) {
        std::shuffle(order.begin(), order.end(), bits);
        t.push_back(paired(u, v, order));
      }
      std::sort(t.rbegin(), t.rend());
      for (int const rank : {40, 120, 600, 6000, 30'000}) {
        CAPTURE(rank);
        double const p = static_cast<double>(rank) / trials;
        double const found =
            detail::shuffled_tail(n, t[static_cast<std::size_t>(rank - 1)], 1e-12, a, b).value;
        CHECK(found < 1.8 * p * (1 + 4 / std::sqrt(rank)));
        CHECK(found > p / 1.8 * (1 - 3 / std::sqrt(rank)));
      }
    }
}

TEST_CASE("tails down to 1e-5 are within a factor 2 of a million orders") {
  // Ten orders are counted at 1e-5, so the bound is wider there by what a count of ten is off.
  int const n = 40, trials = 1'000'000;
  for (double const times : {1.0, 1000.0}) {
    CAPTURE(times);
    unsigned const seed = 11;
    CAPTURE(seed);
    std::mt19937 bits(seed);
    // One token alone is heavy: drawn() makes two of them.
    auto const site = [&] {
      std::normal_distribution<double> normal;
      MatrixXd x = MatrixXd::NullaryExpr(n, 16, [&] { return normal(bits); });
      x.row(2) *= times;
      return centred_products(x);
    };
    MatrixXd const u = site(), v = site();
    std::vector<double> const t = drawn_sums(u, v, trials, seed);
    detail::shuffled_site const a = prepared(u).site(), b = prepared(v).site();
    for (int const rank : {10, 30, 100, 300, 1000, 5000, 100'000}) {
      CAPTURE(rank);
      double const p = static_cast<double>(rank) / trials, off = 1 / std::sqrt(rank);
      double const found =
          detail::shuffled_tail(n, t[static_cast<std::size_t>(rank - 1)], 1e-12, a, b).value;
      CHECK(found < 2 * p * (1 + 4 * off));
      CHECK(found > p / 2 * (1 - 3 * off));
      CHECK(found > 0);
    }
  }
}

TEST_CASE("a tail is doubtful where more tokens outweigh the others than are followed") {
  int const n = 60, trials = 60'000;
  unsigned const seed = 3;
  CAPTURE(seed);
  // Of more than three massive tokens no p is known.
  for (int const count : {4, 6, 8})
    for (double const times : {10.0, 100.0, 1000.0}) {
      CAPTURE(count);
      CAPTURE(times);
      std::mt19937 bits(seed);
      MatrixXd const u = with_massive(bits, n, 16, count, times);
      MatrixXd const v = with_massive(bits, n, 16, count, times);
      detail::shuffled_site const a = prepared(u).site(), b = prepared(v).site();
      double const deviation = std::sqrt(2.0 / n / (n - 3));
      for (double const z : {-0.5, 0.0, 0.5, 2.0, 4.0, 8.0, 16.0}) {
        CAPTURE(z);
        CHECK(detail::shuffled_tail(n, z * deviation, 1e-12, a, b).doubt > 1);
        CHECK(detail::shuffled_tail(n, z * deviation, 1e-12, b, a).doubt > 1);
      }
    }
  // With none or one all are known, with three those that are not small.
  for (int const count : {0, 1, 3}) {
    CAPTURE(count);
    std::mt19937 bits(seed);
    MatrixXd const u = with_massive(bits, n, 16, count, 100);
    MatrixXd const v = with_massive(bits, n, 16, count, 100);
    std::vector<double> const t = drawn_sums(u, v, trials, seed);
    detail::shuffled_site const a = prepared(u).site(), b = prepared(v).site();
    for (int const rank : {30, 120, 600, 6000, 30'000}) {
      if (count == 3 && rank < 6000) continue;
      CAPTURE(rank);
      double const p = static_cast<double>(rank) / trials, off = 1 / std::sqrt(rank);
      detail::doubtful const found =
          detail::shuffled_tail(n, t[static_cast<std::size_t>(rank - 1)], 1e-12, a, b);
      CHECK(found.doubt <= 1);
      CHECK(found.value < 2 * p * (1 + 4 * off));
      CHECK(found.value > p / 2 * (1 - 3 * off));
    }
  }
}

TEST_CASE("a tail is doubtful where massive tokens of one side meet any pair of the other") {
  // Two alike in one layer: T is about one entry of the other's matrix, and whose entries are as
  // they happen to be.
  int const n = 60;
  std::mt19937 bits(5);
  MatrixXd const u = with_massive(bits, n, 16, 2, 1000), v = with_massive(bits, n, 16, 0, 1);
  detail::shuffled_site const a = prepared(u).site(), b = prepared(v).site();
  double const deviation = std::sqrt(2.0 / n / (n - 3));
  for (double const z : {1.0, 3.0, 5.0}) {
    CAPTURE(z);
    CHECK(detail::shuffled_tail(n, z * deviation, 1e-12, a, b).doubt > 1);
    CHECK(detail::shuffled_tail(n, z * deviation, 1e-12, b, b).doubt < 1);
  }
}

TEST_CASE("a tail is doubtful where tokens of both sides are two groups") {
  int const n = 20;
  std::mt19937 bits(7);
  std::normal_distribution<double> normal;
  auto const groups = [&] {
    MatrixXd x = MatrixXd::NullaryExpr(n, 4, [&] { return normal(bits); });
    x.topRows(n / 2).col(0).array() += 100;
    return centred_products(x);
  };
  detail::shuffled_site const a = prepared(groups()).site(), b = prepared(groups()).site();
  CHECK(detail::shuffled_tail(n, 0.3, 1e-12, a, b).doubt > 1);
}
