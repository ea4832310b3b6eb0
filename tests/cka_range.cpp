// SPDX-License-Identifier: Apache-2.0

// CKA where tokens, offsets and bandwidths are far from 1, against the definition in long double.

#include <rflow/cka.hpp>
#include <rflow/monitor.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <doctest/doctest.h>

using doctest::Approx;
using rflow::biased;
using rflow::debiased;
using rflow::gram_path;
using rflow::layer_stack;
using rflow::linear;
using rflow::rbf;
using rflow::status;

namespace {

using real = long double;
using wide = Eigen::Matrix<real, Eigen::Dynamic, Eigen::Dynamic>;
using Eigen::MatrixXd;

/// Rows about one of them, so that little is lost to a common offset or to a token far out.
wide near_one(MatrixXd const& x) {
  wide z = x.cast<real>();
  Eigen::Matrix<real, 1, Eigen::Dynamic> const origin = z.row(z.rows() - 1);
  z.rowwise() -= origin;
  return z;
}

wide linear_kernel(MatrixXd const& x) {
  wide const z = near_one(x);
  return z * z.transpose();
}

wide distances(MatrixXd const& x) {
  wide const z = near_one(x);
  wide d(z.rows(), z.rows());
  for (Eigen::Index i = 0; i < z.rows(); ++i)
    for (Eigen::Index j = 0; j < z.rows(); ++j) d(i, j) = (z.row(i) - z.row(j)).squaredNorm();
  return d;
}

/// σ of the all-pairs median, times a fraction.
real sigma_of(MatrixXd const& x, real fraction) {
  wide const d = distances(x);
  std::vector<real> all(d.data(), d.data() + d.size());
  std::sort(all.begin(), all.end());
  return fraction * std::sqrt((all[(all.size() - 1) / 2] + all[all.size() / 2]) / 2);
}
wide rbf_kernel(MatrixXd const& x, real sigma) {
  return (-distances(x).array() / (2 * sigma * sigma)).exp().matrix();
}

real debiased_hsic(wide k, wide l) {
  real const n = static_cast<real>(k.rows());
  k.diagonal().setZero();
  l.diagonal().setZero();
  auto const centred = [&](wide const& m) {
    Eigen::Matrix<real, Eigen::Dynamic, 1> const r = m.rowwise().sum() / (n - 2);
    real const s = m.sum() / ((n - 1) * (n - 2));
    wide u(m);
    for (Eigen::Index i = 0; i < m.rows(); ++i)
      for (Eigen::Index j = 0; j < m.rows(); ++j) u(i, j) = i == j ? 0 : m(i, j) - r(i) - r(j) + s;
    return u;
  };
  return centred(k).cwiseProduct(centred(l)).sum();
}
double debiased_cka(wide const& k, wide const& l) {
  return static_cast<double>(debiased_hsic(k, l) /
                             std::sqrt(debiased_hsic(k, k) * debiased_hsic(l, l)));
}

/// Random rows, correlated between the two, with one token `far` times the others.
struct pair {
  Eigen::MatrixXf x, y;

  pair(unsigned seed, Eigen::Index n, Eigen::Index d, float far, bool both = true)
      : x(n, d), y(n, d) {
    std::mt19937 g(seed);
    std::normal_distribution<float> normal;
    for (Eigen::Index i = 0; i < n; ++i)
      for (Eigen::Index j = 0; j < d; ++j) {
        x(i, j) = normal(g);
        y(i, j) = normal(g) + 0.3f * x(i, j);
      }
    x.row(n / 3) *= far;
    if (both) y.row(n / 3) *= far;
  }
};

}  // namespace

TEST_CASE("a massive token spoils no path and no type") {
  for (float const far : {240.f, 3e3f, 1e4f, 1e6f, 1e7f})
    for (auto const& shape : {std::pair<Eigen::Index, Eigen::Index>{7, 20}, {16, 64}, {300, 32}})
      for (bool const both : {true, false}) {
        Eigen::Index const n = shape.first, d = shape.second;
        CAPTURE(far);
        CAPTURE(n);
        CAPTURE(both);
        pair const data(static_cast<unsigned>(n), n, d, far, both);
        MatrixXd const x = data.x.cast<double>(), y = data.y.cast<double>();
        double const right = debiased_cka(linear_kernel(x), linear_kernel(y));
        for (auto const path : {gram_path::automatic, gram_path::gram, gram_path::feature}) {
          CAPTURE(static_cast<int>(path));
          rflow::on_cpu const on{.path = path};
          CHECK(std::abs(rflow::cka(data.x, data.y, linear{}, debiased{}, on) - right) <= 1e-5);
          CHECK(std::abs(rflow::cka(x, y, linear{}, debiased{}, on) - right) <= 1e-10);
        }
      }
}

TEST_CASE("a massive token of doubles, further out than floats are, and of 16-bit data") {
  for (double const far : {1e8, 1e9})
    for (Eigen::Index const n : {16, 512}) {
      CAPTURE(far);
      CAPTURE(n);
      pair const data(static_cast<unsigned>(n), n, 64, 1);
      MatrixXd x = data.x.cast<double>(), y = data.y.cast<double>();
      x.row(n / 3) *= far;
      y.row(n / 3) *= far;
      double const right = debiased_cka(linear_kernel(x), linear_kernel(y));
      for (auto const path : {gram_path::automatic, gram_path::gram, gram_path::feature}) {
        CAPTURE(static_cast<int>(path));
        rflow::on_cpu const on{.path = path};
        CHECK(std::abs(rflow::cka(x, y, linear{}, debiased{}, on) - right) <= 1e-10);
      }
    }
  auto const narrow = [](auto as, float far) {
    using T = decltype(as);
    pair const data(12, 512, 64, far);
    std::vector<std::vector<T>> values(2);
    MatrixXd exact[2] = {MatrixXd(512, 64), MatrixXd(512, 64)};
    for (std::size_t l = 0; l < 2; ++l)
      for (Eigen::Index i = 0; i < 512; ++i)
        for (Eigen::Index j = 0; j < 64; ++j) {
          values[l].push_back(T::nearest(l == 0 ? data.x(i, j) : data.y(i, j)));
          exact[l](i, j) = static_cast<double>(static_cast<float>(values[l].back()));
        }
    rflow::view<T> const x(values[0].data(), 512, 64), y(values[1].data(), 512, 64);
    double const right = debiased_cka(linear_kernel(exact[0]), linear_kernel(exact[1]));
    for (auto const path : {gram_path::automatic, gram_path::gram, gram_path::feature}) {
      CAPTURE(static_cast<int>(path));
      CHECK(std::abs(rflow::cka(x, y, linear{}, debiased{}, rflow::on_cpu{.path = path}) - right) <=
            1e-5);
    }
  };
  narrow(rflow::f16{}, 1e4f);
  narrow(rflow::bf16{}, 1e6f);
}

TEST_CASE("a fraction that is no factor is refused, and no bandwidth gives a number of its own") {
  pair const data(13, 20, 6, 1);
  std::vector<Eigen::MatrixXf> const both{data.x, data.y};
  layer_stack<float> const stack(both);
  double const infinity = std::numeric_limits<double>::infinity(),
               nan = std::numeric_limits<double>::quiet_NaN();
  for (double const bad : {infinity, nan, -infinity, -1., 0.}) {
    CAPTURE(bad);
    rbf const kernel{.fraction = bad};
    CHECK_THROWS_AS(rflow::cka(data.x, data.y, kernel), std::invalid_argument);
    CHECK_THROWS_AS(rflow::cka_matrix(stack, kernel), std::invalid_argument);
    CHECK_THROWS_AS(rflow::cka_matrix(stack, kernel, biased{}), std::invalid_argument);
    // One that is not used says nothing.
    rbf const given{.fraction = bad, .sigma = {2, 3}};
    CHECK(rflow::cka(data.x, data.y, given).value ==
          rflow::cka(data.x, data.y, rbf{.sigma = {2, 3}}).value);
  }
  CHECK_THROWS_WITH_AS(rflow::cka(data.x, data.y, rbf{.fraction = infinity}),
                       "rflow::on_cpu::gram: an RBF fraction of inf, not a positive finite number",
                       std::invalid_argument);
  for (double const bad : {infinity, nan, -1., 0.}) {
    CAPTURE(bad);
    rbf const kernel{.sigma = {bad, 2}};
    for (auto const& table :
         {rflow::cka_matrix(stack, kernel), rflow::cka_matrix(stack, kernel, biased{})}) {
      CHECK_FALSE(table(0, 1).ok());
      CHECK_FALSE(table(0, 0).ok());
      CHECK(table(1, 1).ok());
    }
  }
  // σ of a fraction that double does not hold.
  MatrixXd const wide_rows = 1e300 * data.x.cast<double>();
  CHECK_FALSE(rflow::cka(wide_rows, wide_rows, rbf{.fraction = 1e300}).ok());
}

TEST_CASE("all tokens but one equal have no debiased CKA, on any path") {
  for (unsigned seed = 1; seed <= 40; ++seed) {
    CAPTURE(seed);
    std::mt19937 g(seed);
    std::normal_distribution<float> normal;
    Eigen::Index const n = 4 + g() % 60, d = 1 + g() % 40;
    Eigen::MatrixXf x(n, d), y(n, d);
    for (Eigen::Index j = 0; j < d; ++j) {
      x.col(j).setConstant(normal(g));
      x(n / 2, j) = normal(g) * 100;
      for (Eigen::Index i = 0; i < n; ++i) y(i, j) = normal(g);
    }
    for (auto const path : {gram_path::gram, gram_path::feature}) {
      rflow::on_cpu const on{.path = path};
      CHECK(rflow::cka(x, y, linear{}, debiased{}, on).why == status::constant_layer);
      CHECK(rflow::cka(MatrixXd(x.cast<double>()), MatrixXd(y.cast<double>()), linear{}, debiased{},
                       on)
                .why == status::constant_layer);
      CHECK(rflow::cka(x, y, linear{}, biased{}, on).ok());
    }
  }
}

TEST_CASE("the share of the top token is that of the kernel matrix, on both paths") {
  for (float const far : {1.f, 8.f, 300.f, 3e4f}) {
    CAPTURE(far);
    pair const data(5, 900, 12, far);
    MatrixXd const x = data.x.cast<double>();
    wide z = x.cast<real>();
    Eigen::Matrix<real, 1, Eigen::Dynamic> const mean = z.colwise().mean();
    z.rowwise() -= mean;
    wide k = z * z.transpose();
    k.diagonal().setZero();
    Eigen::Index top = 0;
    Eigen::Matrix<real, Eigen::Dynamic, 1> const rows = k.rowwise().squaredNorm();
    rows.maxCoeff(&top);
    std::vector<Eigen::MatrixXf> const one{data.x};
    for (auto const path : {gram_path::gram, gram_path::feature}) {
      CAPTURE(static_cast<int>(path));
      rflow::on_cpu const on{.path = path};
      auto const t = rflow::cka_matrix(layer_stack<float>(one), linear{}, debiased{}, on);
      if (path == gram_path::gram || far > 100) CHECK(t.top_token(0) == top);
      double const share = static_cast<double>(2 * rows(t.top_token(0)) / rows.sum());
      CHECK(t.top_token_share(0) == Approx(share).epsilon(1e-5));
    }
  }
}

TEST_CASE("the share of the top token of an RBF kernel is that of its values") {
  pair const data(6, 60, 10, 40);
  MatrixXd const x = data.x.cast<double>();
  double const sigma = 3;
  wide k = rbf_kernel(x, sigma);
  k.diagonal().setZero();
  Eigen::Matrix<real, Eigen::Dynamic, 1> const rows = k.rowwise().squaredNorm();
  Eigen::Index top = 0;
  rows.maxCoeff(&top);
  std::vector<Eigen::MatrixXf> const one{data.x};
  for (double const unused : {0.2, 1., 30.}) {
    rbf kernel{.fraction = unused, .sigma = {sigma}};
    auto const t = rflow::cka_matrix(layer_stack<float>(one), kernel);
    CHECK(t.top_token(0) == top);
    CHECK(t.top_token_share(0) ==
          Approx(static_cast<double>(2 * rows(top) / rows.sum())).epsilon(1e-5));
  }
}

TEST_CASE("a given bandwidth is all that counts") {
  pair const data(7, 120, 30, 1);
  MatrixXd const x = data.x.cast<double>(), y = data.y.cast<double>();
  for (double const width : {0.5, 1., 4., 40.}) {
    CAPTURE(width);
    std::vector<double> const sigma{width * 7.5, width * 8};
    double const right = debiased_cka(rbf_kernel(x, sigma[0]), rbf_kernel(y, sigma[1]));
    double first = 0;
    for (double const unused : {0.2, 1., 10., 30.}) {
      rbf const kernel{.fraction = unused, .sigma = sigma};
      double const found = rflow::cka(data.x, data.y, kernel);
      CHECK(std::abs(found - right) <= 1e-5);
      CHECK(std::abs(rflow::cka(x, y, kernel) - right) <= 1e-10);
      if (unused < 1) first = found;
      CHECK(found == first);
    }
  }
}

TEST_CASE("RBF with one massive token among few") {
  for (float const far : {1e2f, 1e4f, 1e5f, 1e7f})
    for (Eigen::Index const n : {5, 16, 40}) {
      CAPTURE(far);
      CAPTURE(n);
      pair const data(static_cast<unsigned>(n), n, 24, far);
      MatrixXd const x = data.x.cast<double>(), y = data.y.cast<double>();
      double const right =
          debiased_cka(rbf_kernel(x, sigma_of(x, 1)), rbf_kernel(y, sigma_of(y, 1)));
      CHECK(std::abs(rflow::cka(data.x, data.y, rbf{}) - right) <= 1e-5);
      CHECK(std::abs(rflow::cka(x, y, rbf{}) - right) <= 1e-10);
    }
}

TEST_CASE("RBF of two groups of tokens, each far from the other") {
  for (float const apart : {1e2f, 1e4f, 1e6f}) {
    CAPTURE(apart);
    pair data(8, 30, 12, 1);
    data.x.topRows(11).array() += apart;
    data.y.bottomRows(13).array() -= apart;
    MatrixXd const x = data.x.cast<double>(), y = data.y.cast<double>();
    rbf const kernel{.sigma = {5, 5}};
    double const right = debiased_cka(rbf_kernel(x, 5), rbf_kernel(y, 5));
    CHECK(std::abs(rflow::cka(data.x, data.y, kernel) - right) <= 1e-5);
    CHECK(std::abs(rflow::cka(x, y, kernel) - right) <= 1e-10);
  }
}

TEST_CASE("doubles far from the origin, in one piece, in batches and while they arrive") {
  for (double const offset : {1e6, 1e9, 1e12, 1e13}) {
    CAPTURE(offset);
    std::mt19937 g(9);
    std::normal_distribution<double> normal;
    std::vector<MatrixXd> far(2, MatrixXd(200, 40));
    for (Eigen::Index i = 0; i < far[0].size(); ++i) {
      far[0].data()[i] = normal(g) * 50 + offset;
      far[1].data()[i] = far[0].data()[i] * 0.25 + normal(g) * 20 + offset / 2;
    }
    layer_stack<double> const stack(far);
    double const right = debiased_cka(linear_kernel(far[0]), linear_kernel(far[1]));
    CHECK(std::abs(rflow::cka_matrix(stack)(0, 1) - right) <= 1e-12);
    CHECK(std::abs(rflow::cka_matrix(stack, linear{}, debiased{},
                                     rflow::on_cpu{.path = gram_path::feature})(0, 1) -
                   right) <= 1e-10);
    rflow::cka_accumulator<> batches;
    rflow::flow_monitor<double> monitor(2, 40, {.cka = true, .cka_batch = 200});
    batches.add(stack);
    for (std::ptrdiff_t l = 0; l < 2; ++l) monitor.push(l, 0, stack[l]);
    monitor.end_sequence();
    CHECK(std::abs(batches(0, 1) - right) <= 1e-12);
    CHECK(std::abs(monitor.report().cka(0, 1) - right) <= 1e-12);
  }
}

TEST_CASE("massive tokens in minibatches, at once and while they arrive") {
  for (float const far : {1e3f, 1e5f, 1e7f}) {
    CAPTURE(far);
    pair const data(10, 90, 30, far);
    real over = 0, x2 = 0, y2 = 0;
    for (Eigen::Index from = 0; from < 90; from += 30) {
      wide const k = linear_kernel(data.x.middleRows(from, 30).cast<double>()),
                 l = linear_kernel(data.y.middleRows(from, 30).cast<double>());
      over += debiased_hsic(k, l);
      x2 += debiased_hsic(k, k);
      y2 += debiased_hsic(l, l);
    }
    double const right = static_cast<double>(over / std::sqrt(x2 * y2));
    rflow::flow_monitor<float> monitor(2, 30, {.cka = true, .cka_batch = 30});
    for (std::ptrdiff_t l = 0; l < 2; ++l) monitor.push(l, 0, rflow::as_view(l ? data.y : data.x));
    monitor.end_sequence();
    CHECK(std::abs(monitor.report().cka(0, 1) - right) <= 1e-5);
    rflow::cka_accumulator<> batches;
    for (Eigen::Index from = 0; from < 90; from += 30) {
      std::vector<Eigen::MatrixXf> const part{data.x.middleRows(from, 30),
                                              data.y.middleRows(from, 30)};
      batches.add(layer_stack<float>(part));
    }
    CHECK(std::abs(batches(0, 1) - right) <= 1e-5);
  }
}

TEST_CASE("digits that not even double has are no value") {
  MatrixXd x(12, 6), y(12, 6);
  std::mt19937 g(11);
  std::normal_distribution<double> normal;
  for (Eigen::Index i = 0; i < x.size(); ++i) x.data()[i] = normal(g), y.data()[i] = normal(g);
  rbf const wide_kernel{.sigma = {1e9, 1e9}};  // all values 1 − 1e-17
  auto const found = rflow::cka(x, y, wide_kernel);
  CHECK(!found.ok());
  CHECK((found.why == status::ill_conditioned || found.why == status::constant_layer));
}

TEST_CASE("the feature path counts what floats lose of two tokens far out") {
  // In one site they are orthogonal: next to nothing is left of products as large as their norms.
  pair data(45, 45, 2, 1);
  data.x /= 30;
  data.y /= 30;
  data.x.row(0) << -30000, 11176;
  data.x.row(42) << -23424, -28400;
  data.y.row(0) << -30000, 15000;
  data.y.row(42) << -15000, -30000;
  double const expected =
      debiased_cka(linear_kernel(data.x.cast<double>()), linear_kernel(data.y.cast<double>()));
  for (gram_path const path : {gram_path::feature, gram_path::gram, gram_path::automatic})
    CHECK(rflow::cka(data.x, data.y, linear{}, debiased{}, rflow::on_cpu{.path = path}).value ==
          Approx(expected).epsilon(1e-5));
}

TEST_CASE("a bandwidth far below all distances leaves tokens alike only to themselves") {
  for (double const scale : {1e-70, 1., 1e150, 5e218}) {
    MatrixXd x = scale * MatrixXd::Random(9, 4);
    x.row(3) = x.row(5);  // these two are alike
    rflow::on_cpu const on;
    double const sigma = 1e-155 * scale;
    auto const m = on.gram(rbf{.sigma = {sigma}}, layer_stack<double>({rflow::as_view(x)}));
    CHECK(m.h_product(0, 0) > 0);
    wide k = wide::Identity(9, 9);
    k(3, 5) = k(5, 3) = 1;
    wide const h = wide::Identity(9, 9) - wide::Constant(9, 9, 1.0L / 9);
    CAPTURE(scale);
    CHECK(m.h_product(0, 0) ==
          Approx(static_cast<double>((h * k * h).squaredNorm())).epsilon(1e-12));
    CHECK(m.u_product(0, 0) == Approx(static_cast<double>(debiased_hsic(k, k))).epsilon(1e-12));
    CHECK(rflow::cka_matrix(m, debiased{})(0, 0).ok());
    CHECK(rflow::cka_matrix(m, biased{})(0, 0).ok());
  }
}

TEST_CASE("what U-centring removes is not what digits go to, whatever the kernel") {
  MatrixXd const x = MatrixXd::Random(40, 7),
                 y = MatrixXd::Random(40, 12) + MatrixXd::Random(40, 1).replicate(1, 12);
  double const expected = debiased_cka(linear_kernel(x), linear_kernel(y));
  for (double const constant : {0., 1e3, 1e5}) {
    auto const kernel = [constant](double xy, double xx, double yy) {
      return xy + constant * (1 + xx + yy);
    };
    CAPTURE(constant);
    CHECK(rflow::cka(x, y, kernel).value == Approx(expected).epsilon(1e-10));
  }
  // Four tokens as far from each other as they can be: all kernel values are nearly the same.
  MatrixXd z = MatrixXd::Identity(4, 4);
  z(0, 0) += 1e-3, z(1, 2) += 2e-3, z(3, 0) -= 1e-3;
  MatrixXd const w = MatrixXd::Random(4, 3);
  double const near = debiased_cka(rbf_kernel(z, 3), rbf_kernel(w, 1));
  rflow::measured const got = rflow::cka(z, w, rbf{.sigma = {3, 1}});
  REQUIRE(got.ok());
  CHECK(got.value == Approx(near).epsilon(1e-10));
}

TEST_CASE("a batch of equal tokens takes nothing from the others") {
  Eigen::MatrixXf all = Eigen::MatrixXf::Constant(12, 1, -2.38654582e-11f);
  all(6, 0) = all(8, 0) = -0.000225821917f;
  rflow::cka_accumulator<rbf> sum(rbf{.sigma = {1}});
  for (Eigen::Index b : {0, 6}) {
    Eigen::MatrixXf const batch = all.middleRows(b, 6);
    sum.add(layer_stack<float>({rflow::as_view(batch)}));
  }
  REQUIRE(sum(0, 0).ok());
  CHECK(sum(0, 0).value == 1);
}

TEST_CASE("the top token is the one that pairs most, not the furthest, on both paths") {
  pair data(40, 40, 3, 1);
  Eigen::MatrixXf x = 0.4f * data.x;
  x.row(5) << 5, 0, 0;     // the furthest, by itself
  x.row(9) << 0, 4.9f, 0;  // the next, with another beside it
  x.row(20) << 0, 4, 0;
  for (gram_path const path : {gram_path::gram, gram_path::feature}) {
    auto const m =
        rflow::on_cpu{.path = path}.gram(linear{}, layer_stack<float>({rflow::as_view(x)}));
    wide const k = linear_kernel(x.cast<double>());
    wide const h = wide::Identity(40, 40) - wide::Constant(40, 40, 1.0L / 40);
    wide centred = h * k * h;
    centred.diagonal().setZero();
    CHECK(rflow::cka_matrix(m).top_token(0) == 9);
    CHECK(rflow::cka_matrix(m).top_token_share(0).value ==
          Approx(static_cast<double>(2 * centred.row(9).squaredNorm() / centred.squaredNorm()))
              .epsilon(1e-5));
  }
}

TEST_CASE("floats that differ in the last bit of a small feature, beside large ones") {
  pair const data(6, 6, 4, 1);
  Eigen::MatrixXf x = Eigen::MatrixXf::Constant(6, 3, 16708.8965f);
  x.col(2).setConstant(-0.00225729705f);
  x(1, 2) = x(4, 2) = std::nextafter(x(1, 2), -1.f);
  double const expected =
      debiased_cka(linear_kernel(x.cast<double>()), linear_kernel(data.y.cast<double>()));
  rflow::measured const got = rflow::cka(x, data.y);
  REQUIRE(got.ok());
  CHECK(got.value == Approx(expected).epsilon(1e-5));
  CHECK(rflow::cka(Eigen::MatrixXf::Constant(6, 3, 16708.8965f).eval(), data.y).why ==
        status::constant_layer);
}
