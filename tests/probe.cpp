// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <Eigen/Core>
#include <nlohmann/json.hpp>

#include <rflow/detail/cpu/softmax.hpp>
#include <rflow/probe.hpp>
#include <rflow/probe_options.hpp>
#include <rflow/probe_result.hpp>
#include <rflow/softmax_problem.hpp>

#include "reference.hpp"

namespace {

using doctest::Approx;
using reference::matrix;
using rflow::probe_options;
using rflow::status;
using labels = std::vector<int>;

template <class T>
using dense = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// ---- the definition, as slowly as it reads ------------------------------------------------------

struct slow_probe {
  matrix weight;             // classes × d
  std::vector<double> bias;  // classes
  std::vector<double> train_loss, validation_loss, train_accuracy, validation_accuracy;
};

std::vector<double> logits_of(slow_probe const& p, std::vector<double> const& x) {
  std::vector<double> z = p.bias;
  for (std::size_t c = 0; c < z.size(); ++c)
    for (std::size_t j = 0; j < x.size(); ++j) z[c] += p.weight[c][j] * x[j];
  return z;
}

std::vector<double> softmax(std::vector<double> z) {
  double const largest = *std::max_element(z.begin(), z.end());
  double total = 0;
  for (double& v : z) total += v = std::exp(v - largest);
  for (double& v : z) v /= total;
  return z;
}

/// Adam from the weights of `p` on the tokens with part 1; looks at those with part 2 as well.
slow_probe train(matrix const& x, labels const& y, std::vector<int> const& part, slow_probe p,
                 probe_options const& o) {
  std::size_t const classes = p.bias.size(), d = x[0].size();
  matrix m(classes, std::vector<double>(d + 1)), v = m;
  for (int e = 0;; ++e) {
    matrix g(classes, std::vector<double>(d + 1));
    double loss[2] = {}, right[2] = {}, count[2] = {};
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (part[i] == 0) continue;
      auto const z = logits_of(p, x[i]), q = softmax(z);
      auto const k = static_cast<std::size_t>(part[i] - 1);
      auto const label = static_cast<std::size_t>(y[i]);
      loss[k] -= std::log(q[label]);
      right[k] += std::max_element(z.begin(), z.end()) - z.begin() == y[i];
      count[k] += 1;
      for (std::size_t c = 0; c < classes && k == 0; ++c) {
        double const r = q[c] - (c == label);
        for (std::size_t j = 0; j < d; ++j) g[c][j] += r * x[i][j];
        g[c][d] += r;
      }
    }
    p.train_loss.push_back(loss[0] / count[0]);
    p.train_accuracy.push_back(right[0] / count[0]);
    p.validation_loss.push_back(loss[1] / count[1]);
    p.validation_accuracy.push_back(right[1] / count[1]);
    if (e == o.epochs) return p;
    for (std::size_t c = 0; c < classes; ++c)
      for (std::size_t j = 0; j <= d; ++j) {
        double& w = j < d ? p.weight[c][j] : p.bias[c];
        double const s = g[c][j] / count[0] + (j < d ? o.weight_decay * w : 0);
        m[c][j] = o.beta1 * m[c][j] + (1 - o.beta1) * s;
        v[c][j] = o.beta2 * v[c][j] + (1 - o.beta2) * s * s;
        double const first = m[c][j] / (1 - std::pow(o.beta1, e + 1));
        double const second = v[c][j] / (1 - std::pow(o.beta2, e + 1));
        w -= o.learning_rate * first / (std::sqrt(second) + o.epsilon);
      }
  }
}

/// Columns to mean 0 and deviation 1 over the tokens with part 1; constant ones to 0.
matrix standardized(matrix x, std::vector<int> const& part) {
  for (std::size_t j = 0; j < x[0].size(); ++j) {
    double n = 0, mean = 0, square = 0;
    for (std::size_t i = 0; i < x.size(); ++i)
      if (part[i] == 1) n += 1, mean += x[i][j];
    mean /= n;
    for (std::size_t i = 0; i < x.size(); ++i)
      if (part[i] == 1) square += (x[i][j] - mean) * (x[i][j] - mean);
    double const deviation = std::sqrt(square / n);
    for (auto& row : x) row[j] = deviation > 0 ? (row[j] - mean) / deviation : 0;
  }
  return x;
}

// ---- data ---------------------------------------------------------------------------------------

/// Noisy clusters, one a class, off the origin.
struct clusters {
  matrix x;
  labels y;

  clusters(unsigned seed, std::size_t tokens, std::size_t width, int classes, double noise = 1) {
    std::mt19937 bits(seed);
    std::normal_distribution<double> normal;
    matrix centre(static_cast<std::size_t>(classes), std::vector<double>(width));
    for (auto& row : centre)
      for (double& v : row) v = normal(bits);
    for (std::size_t i = 0; i < tokens; ++i) {
      y.push_back(static_cast<int>(i) % classes);
      x.emplace_back(centre[static_cast<std::size_t>(y.back())]);
      for (double& v : x.back()) v += noise * normal(bits) + 2;
    }
  }

  template <class T>
  std::vector<T> packed() {
    return reference::pack<T>(x);
  }
};

template <class T>
rflow::view<T> view_of(std::vector<T> const& values, matrix const& x) {
  return {values.data(), static_cast<std::ptrdiff_t>(x.size()),
          static_cast<std::ptrdiff_t>(x[0].size())};
}

slow_probe start(std::mt19937& bits, std::size_t classes, std::size_t width) {
  std::normal_distribution<double> normal(0, 0.2);
  slow_probe p;
  p.weight.assign(classes, std::vector<double>(width));
  for (auto& row : p.weight)
    for (double& v : row) v = normal(bits);
  for (std::size_t c = 0; c < classes; ++c) p.bias.push_back(normal(bits));
  return p;
}

rflow::weights::given given(slow_probe const& p) {
  std::vector<double> values;
  for (auto const& row : p.weight) values.insert(values.end(), row.begin(), row.end());
  return {values, p.bias};
}

/// The parts that listed tokens make: 1 train, 2 validation.
std::vector<int> parts_of(probe_options const& o, std::size_t tokens) {
  std::vector<int> part(tokens, 1);
  for (std::ptrdiff_t const i : o.validation) part[static_cast<std::size_t>(i)] = 2;
  return part;
}

void check_curve(std::vector<rflow::measured> const& a, std::vector<double> const& b,
                 double within) {
  REQUIRE(a.size() == b.size());
  for (std::size_t e = 0; e < a.size(); ++e) {
    CAPTURE(e);
    REQUIRE(a[e].ok());
    CHECK(std::abs(a[e].value - b[e]) <= within);
  }
}

bool same_bits(std::vector<rflow::measured> const& a, std::vector<rflow::measured> const& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i].why != b[i].why || (a[i].ok() && a[i].value != b[i].value)) return false;
  return true;
}

void check_same(rflow::probe_seed const& a, rflow::probe_seed const& b) {
  CHECK(same_bits(a.train_loss, b.train_loss));
  CHECK(same_bits(a.validation_loss, b.validation_loss));
  CHECK(same_bits(a.train_accuracy, b.train_accuracy));
  CHECK(same_bits(a.validation_accuracy, b.validation_accuracy));
  CHECK(a.confusion == b.confusion);
  CHECK(a.weight == b.weight);
  CHECK(a.bias == b.bias);
}

}  // namespace

// ---- fixed numbers ------------------------------------------------------------------------------

TEST_CASE("probe: the fixed numbers of sixty tokens in three classes") {
  dense<double> x(60, 5);
  labels y;
  for (int i = 0; i < 60; ++i) {
    for (int j = 0; j < 5; ++j) x(i, j) = std::sin(0.7 * i + 1.3 * j) + 0.5 * (j == i % 3);
    y.push_back(i % 3);
  }
  probe_options const o{
      .seeds = 1, .validation_fraction = 0, .initial_weights = rflow::weights::zero{}};
  auto const r = rflow::probe(x, y, o);
  auto const& seed = r.seeds[0];
  REQUIRE(seed.train_loss.size() == 151);
  auto const is = [](double value) { return Approx(value).epsilon(1e-12); };
  CHECK(seed.train_loss[0] == is(std::log(3.0)));
  CHECK(seed.train_loss[1] == is(1.066733330030238));
  CHECK(seed.train_accuracy[1] == is(0.6));
  CHECK(seed.train_loss[2] == is(1.037776126787171));
  CHECK(seed.train_loss[10] == is(0.829377698147987));
  CHECK(seed.train_loss[150] == is(0.0627086483675041));
  CHECK(r.train_accuracy.mean == 1.0);
  CHECK(r.train_accuracy.spread.why == status::too_few_rows);
  CHECK(r.chance == is(1 / 3.0));
  CHECK(r.validation_accuracy.mean.why == status::not_requested);
  CHECK(seed.validation_loss[7].why == status::not_requested);
  CHECK(seed.class_accuracy[1].why == status::not_requested);
  CHECK(seed.mean_distance.why == status::not_requested);
}

// tests/reference/probe_reference.py makes the same data and writes what PyTorch finds.
TEST_CASE("probe: PyTorch's Linear and Adam, epoch by epoch") {
  constexpr std::ptrdiff_t n = 120, d = 17, classes = 4;
  dense<double> x(n, d), w(classes, d);
  labels y;
  std::vector<double> b;
  probe_options o{.seeds = 1};
  for (std::ptrdiff_t i = 0; i < n; ++i) {
    auto const u = static_cast<double>(i);
    for (std::ptrdiff_t j = 0; j < d; ++j) {
      auto const v = static_cast<double>(j);
      x(i, j) = 3 + std::sin(0.7 * u + 1.3 * v) + 0.5 * std::cos(0.37 * u * (v + 1)) +
                0.3 * (j % classes == i % classes);
    }
    y.push_back(static_cast<int>(i % 7 == 0 ? i / 7 % classes : i % classes));
    if (i % 5 == 2) o.validation.push_back(i);
  }
  for (std::ptrdiff_t c = 0; c < classes; ++c) {
    for (std::ptrdiff_t j = 0; j < d; ++j)
      w(c, j) = 0.2 * std::sin(1 + 3 * static_cast<double>(c) + 0.7 * static_cast<double>(j));
    b.push_back(0.1 * std::cos(static_cast<double>(c)));
  }
  std::ifstream file(std::string(RFLOW_SOURCE_DIR) + "/tests/reference/probe_reference.json");
  REQUIRE(file);
  auto const reference = nlohmann::json::parse(file);
  auto const check = [&](char const* name, rflow::probe_result const& r, double within) {
    CAPTURE(name);
    auto const& of = reference.at(name);
    check_curve(r.seeds[0].train_loss, of.at("train_loss"), within);
    check_curve(r.seeds[0].validation_loss, of.at("validation_loss"), within);
    auto const& correct = of.at("validation_correct");
    for (std::size_t e = 0; e < correct.size(); ++e)
      CHECK(r.seeds[0].validation_accuracy[e] == Approx(correct[e].get<double>() / 24));
    return of;
  };
  o.initial_weights = rflow::weights::given(w, b);
  auto const plain = rflow::probe(x, y, o);
  auto const of = check("double", plain, 1e-9);
  for (std::size_t c = 0; c < classes; ++c) {
    CHECK(plain.seeds[0].bias[c] == Approx(of.at("bias")[c].get<double>()).epsilon(1e-8));
    for (std::size_t j = 0; j < d; ++j)
      CHECK(std::abs(plain.seeds[0].weight[c * d + j] - of.at("weight")[c][j].get<double>()) <
            1e-8);
  }
  // In float both sides round: they differ by 3.4e-7 at most here (SSE 2.3e-7, AVX-512 3.4e-7).
  Eigen::MatrixXf const narrow = x.cast<float>();
  check("float", rflow::probe(narrow, y, o), 2e-6);

  o.weight_decay = 0.01;
  check("double_decay", rflow::probe(x, y, o), 1e-9);
  o.weight_decay = 0;

  // Initial weights act on features as given; PyTorch's started on the standardised ones.
  dense<double> weight = w;
  auto bias = b;
  for (std::ptrdiff_t j = 0; j < d; ++j) {
    double mean = 0, square = 0, count = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i)
      if (i % 5 != 2) mean += x(i, j), count += 1;
    mean /= count;
    for (std::ptrdiff_t i = 0; i < n; ++i)
      if (i % 5 != 2) square += (x(i, j) - mean) * (x(i, j) - mean);
    for (std::ptrdiff_t c = 0; c < classes; ++c) {
      weight(c, j) /= std::sqrt(square / count);
      bias[static_cast<std::size_t>(c)] -= weight(c, j) * mean;
    }
  }
  o.standardize = true;
  o.initial_weights = rflow::weights::given(weight, bias);
  check("double_standardized", rflow::probe(x, y, o), 1e-9);
}

// ---- the definition on random shapes ------------------------------------------------------------

template <class T>
void agrees_with_definition(double within) {
  for (unsigned seed = 1; seed <= 8; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const width = 1 + bits() % (seed % 4 == 0 ? 900 : 60);
    int const classes = 2 + static_cast<int>(bits() % 7);
    std::size_t const tokens = static_cast<std::size_t>(classes) * 3 + bits() % 300;
    CAPTURE(tokens);
    CAPTURE(width);
    CAPTURE(classes);
    clusters data(seed, tokens, width, classes);
    auto const values = data.packed<T>();
    slow_probe const from = start(bits, static_cast<std::size_t>(classes), width);
    probe_options o{.epochs = 12,
                    .weight_decay = seed % 3 == 0 ? 0.1 : 0,
                    .seeds = 1 + static_cast<int>(seed % 2),
                    .standardize = seed % 2 == 0,
                    .initial_weights = given(from)};
    for (std::size_t i = tokens / 2; i < tokens; i += 2)
      o.validation.push_back(static_cast<std::ptrdiff_t>(i));
    auto const part = parts_of(o, tokens);
    slow_probe first = from;
    matrix x = data.x;
    if (o.standardize) {  // the same start, for what the definition sees
      x = standardized(data.x, part);
      for (std::size_t c = 0; c < first.bias.size(); ++c)
        for (std::size_t j = 0; j < width; ++j) {
          double mean = 0, square = 0, n = 0;
          for (std::size_t i = 0; i < tokens; ++i)
            if (part[i] == 1) n += 1, mean += data.x[i][j];
          mean /= n;
          for (std::size_t i = 0; i < tokens; ++i)
            if (part[i] == 1) square += std::pow(data.x[i][j] - mean, 2) / n;
          first.bias[c] += first.weight[c][j] * mean;
          first.weight[c][j] *= std::sqrt(square);
        }
    }
    slow_probe const slow = train(x, data.y, part, first, o);
    auto const r = rflow::probe(view_of(values, data.x), data.y, o);
    for (auto const& s : r.seeds) {
      check_curve(s.train_loss, slow.train_loss, within);
      check_curve(s.validation_loss, slow.validation_loss, within);
      if (!std::same_as<T, double>) continue;
      check_curve(s.train_accuracy, slow.train_accuracy, 1e-12);
      check_curve(s.validation_accuracy, slow.validation_accuracy, 1e-12);
    }
  }
}
TEST_CASE("probe: the definition on random shapes, in double") {
  agrees_with_definition<double>(1e-10);
}
TEST_CASE("probe: the definition on random shapes, in narrower types") {
  agrees_with_definition<float>(2e-4);
  agrees_with_definition<rflow::f16>(2e-4);
  agrees_with_definition<rflow::bf16>(2e-4);
}

TEST_CASE("probe: 16-bit features give the bits of the same features in float") {
  clusters data(5, 300, 70, 5);
  auto const halves = data.packed<rflow::bf16>();
  std::vector<float> const floats(halves.begin(), halves.end());
  probe_options const o{.epochs = 20, .seeds = 2};
  auto const a = rflow::probe(view_of(halves, data.x), data.y, o);
  auto const b = rflow::probe(view_of(floats, data.x), data.y, o);
  for (std::size_t p = 0; p < 2; ++p) check_same(a.seeds[p], b.seeds[p]);
}

TEST_CASE("probe: any strides give the same bits") {
  clusters data(6, 130, 37, 3);
  auto const values = data.packed<double>();
  std::ptrdiff_t const n = 130, d = 37;
  auto const row_major = Eigen::Map<dense<double> const>(values.data(), n, d);
  Eigen::MatrixXd const column_major = row_major;
  dense<double> wide(n, 3 * d);
  for (std::ptrdiff_t j = 0; j < d; ++j) wide.col(3 * j) = row_major.col(j);
  dense<double> const backwards = row_major.rowwise().reverse();
  probe_options const o{.epochs = 10, .seeds = 2};
  auto const a = rflow::probe(row_major, data.y, o);
  for (auto const& r :
       {rflow::probe(column_major, data.y, o),
        rflow::probe(rflow::view<double>(wide.data(), n, d, 3 * d, 3), data.y, o),
        rflow::probe(rflow::view<double>(backwards.data() + d - 1, n, d, d, -1), data.y, o)})
    for (std::size_t p = 0; p < 2; ++p) check_same(a.seeds[p], r.seeds[p]);
}

TEST_CASE("probe: the same bits for any number of threads") {
  for (unsigned seed = 1; seed <= 3; ++seed) {
    CAPTURE(seed);
    clusters data(seed, 211 * seed, 90 + 600 * (seed == 3), 3 + static_cast<int>(seed));
    auto const values = data.packed<float>();
    probe_options const o{.epochs = 8, .seeds = 3, .standardize = seed == 2};
    auto const one = rflow::probe(view_of(values, data.x), data.y, o, rflow::on_cpu{.threads = 1});
    for (int const threads : {2, 3, 7}) {
      auto const many =
          rflow::probe(view_of(values, data.x), data.y, o, rflow::on_cpu{.threads = threads});
      for (std::size_t p = 0; p < 3; ++p) check_same(one.seeds[p], many.seeds[p]);
    }
  }
}

TEST_CASE("probe: a seed does not depend on the seeds beside it") {
  clusters data(9, 150, 30, 4, 3);
  auto const values = data.packed<float>();
  probe_options o{.epochs = 15, .seeds = 4, .first_seed = 11};
  auto const together = rflow::probe(view_of(values, data.x), data.y, o);
  o.seeds = 1;
  std::set<double> different;
  for (std::size_t p = 0; p < 4; ++p) {
    o.first_seed = 11 + p;
    auto const alone = rflow::probe(view_of(values, data.x), data.y, o);
    check_same(together.seeds[p], alone.seeds[0]);
    different.insert(alone.seeds[0].train_loss.back());
  }
  CHECK(different.size() == 4);
}

TEST_CASE("probe: sites of a stack are probes of their own, side by side or not") {
  clusters data(4, 260, 20, 4, 2);
  std::vector<dense<float>> sites;
  for (int l = 0; l < 7; ++l) {
    dense<float> x(260, 10 + 3 * l);
    for (std::ptrdiff_t i = 0; i < x.rows(); ++i)
      for (std::ptrdiff_t j = 0; j < x.cols(); ++j)
        x(i, j) = static_cast<float>(
                      data.x[static_cast<std::size_t>(i)][static_cast<std::size_t>(j % 20)]) +
                  static_cast<float>((i * 7 + j * l) % 5);
    sites.push_back(x);
  }
  rflow::layer_stack const stack(sites);
  probe_options const o{.epochs = 10, .seeds = 2, .keep_weights = true};
  for (int const threads : {1, 3}) {
    auto const all = rflow::probe_layers(stack, data.y, o, rflow::on_cpu{.threads = threads});
    REQUIRE(all.layers.size() == 7);
    for (std::size_t l = 0; l < 7; ++l) {
      auto const one = rflow::probe(sites[l], data.y, o);
      CHECK(all.layers[l].width == one.width);
      for (std::size_t p = 0; p < 2; ++p) check_same(all.layers[l].seeds[p], one.seeds[p]);
      CHECK(all.layers[l].validation_accuracy.mean.value == one.validation_accuracy.mean.value);
    }
  }
  auto const without = rflow::probe_layers(stack, data.y, {.epochs = 1, .seeds = 1});
  CHECK(without.layers[0].seeds[0].weight.empty());
}

TEST_CASE("probe: a backend's gradient is the slope of its loss") {
  clusters data(14, 70, 9, 3);
  auto const values = data.packed<float>();
  rflow::layer_stack<float> const stack{view_of(values, data.x)};
  for (bool const standardize : {false, true}) {
    CAPTURE(standardize);
    auto plan =
        rflow::detail::probe_plan("here", stack, data.y, {.seeds = 2, .standardize = standardize});
    plan.problem.in_double = true;
    rflow::on_cpu{}.softmax(stack, plan.problem, [&](std::ptrdiff_t, auto& regression) {
      rflow::softmax_weights w = plan.initial(9, {}, {}), slope, unused;
      auto const loss = [&](std::size_t p) {
        regression.load(w);
        auto const sums = regression.evaluate();
        return sums.loss[0][p] / sums.count[0][p];
      };
      regression.load(w);
      regression.gradient(slope);
      double const h = 1e-5;
      for (std::size_t i = 0; i < w.values.size() + w.bias.size(); ++i) {
        bool const of_bias = i >= w.values.size();
        std::size_t const k = of_bias ? i - w.values.size() : i;
        std::size_t const p = k / (of_bias ? 3 : 27);
        double& x = of_bias ? w.bias[k] : w.values[k];
        double const at = x;
        x = at + h;
        double const above = loss(p);
        x = at - h;
        double const below = loss(p);
        x = at;
        CHECK(std::abs((above - below) / (2 * h) - (of_bias ? slope.bias : slope.values)[k]) <
              1e-8);
      }
      regression.load(w);
      regression.store(unused);
      for (std::size_t i = 0; i < w.values.size(); ++i)
        CHECK(unused.values[i] == Approx(w.values[i]).epsilon(1e-12));
    });
  }
  rflow::softmax_problem short_of_labels{.classes = 2, .problems = 1};
  CHECK_THROWS_AS(rflow::on_cpu{}.softmax(stack, short_of_labels, rflow::detail::any_visit{}),
                  std::invalid_argument);
}

namespace {

/// The plainest product, of tiles whose height is no divisor of a cache line: as packets of 32 bytes
/// make them.
struct odd_tiles {
  template <class C>
  static constexpr std::ptrdiff_t rows = 3 * rflow::detail::lanes_v<C>;
  template <class C>
  static constexpr std::ptrdiff_t cols = rflow::detail::lanes_v<C> % 4 == 0 ? 4 : 2;
  static constexpr std::ptrdiff_t depth_lines = 3;

  template <class C>
  static void multiply(C const* a, C const* b, std::ptrdiff_t depth, bool accumulate,
                       std::ptrdiff_t, C const*, C* out) {
    for (std::ptrdiff_t j = 0; j < cols<C>; ++j)
      for (std::ptrdiff_t i = 0; i < rows<C>; ++i) {
        C sum = accumulate ? out[j * rows<C> + i] : C(0);
        for (std::ptrdiff_t k = 0; k < depth; ++k) sum += a[k * rows<C> + i] * b[j * depth + k];
        out[j * rows<C> + i] = sum;
      }
  }
};

}  // namespace

TEST_CASE("probe: the same from register tiles of another height, over many blocks") {
  for (std::size_t const width : {1u, 15u, 26u, 49u, 120u}) {
    CAPTURE(width);
    clusters data(15, 30 + 3 * width, width, 3);
    auto const values = data.packed<double>();
    rflow::layer_stack<double> const stack{view_of(values, data.x)};
    auto const plan = rflow::detail::probe_plan("here", stack, data.y, {.seeds = 2});
    rflow::detail::site_rows<double> const rows{stack[0], nullptr};
    auto const source = rflow::detail::source_of<double>(rows);
    std::vector<double> losses[2];
    auto const run = [&](auto& regression, std::vector<double>& out) {
      regression.load(plan.initial(stack.width(), {}, {}));
      for (int e = 0; e < 10; ++e)
        for (auto const& part : regression.step({}).loss)
          out.insert(out.end(), part.begin(), part.end());
    };
    rflow::detail::softmax_engine<double> usual({2}, source, stack.size(), plan.problem);
    rflow::detail::softmax_engine<double, odd_tiles> odd({2}, source, stack.size(), plan.problem);
    run(usual, losses[0]);
    run(odd, losses[1]);
    for (std::size_t i = 0; i < losses[0].size(); ++i)
      CHECK(losses[1][i] == Approx(losses[0][i]).epsilon(1e-10));
  }
}

// ---- results ------------------------------------------------------------------------------------

TEST_CASE("probe: returned weights give the returned predictions on features as given") {
  for (bool const standardize : {false, true}) {
    CAPTURE(standardize);
    clusters data(3, 240, 25, 4, 4);
    auto const values = data.packed<double>();
    probe_options o{.epochs = 40, .seeds = 3, .standardize = standardize};
    auto const r = rflow::probe(view_of(values, data.x), data.y, o);
    for (auto const& seed : r.seeds) {
      slow_probe p;
      for (std::size_t c = 0; c < 4; ++c)
        p.weight.emplace_back(seed.weight.begin() + static_cast<std::ptrdiff_t>(c * 25),
                              seed.weight.begin() + static_cast<std::ptrdiff_t>((c + 1) * 25));
      p.bias = seed.bias;
      // The tokens of the two parts together: the split itself is not told.
      double loss = 0;
      for (std::size_t i = 0; i < 240; ++i)
        loss -= std::log(softmax(logits_of(p, data.x[i]))[static_cast<std::size_t>(data.y[i])]);
      CHECK(loss ==
            Approx(192 * seed.train_loss.back() + 48 * seed.validation_loss.back()).epsilon(1e-10));
      // The same weights as a start are the same probe.
      probe_options again = o;
      again.epochs = 0;
      again.initial_weights = rflow::weights::given(seed.weight, seed.bias);
      auto const s = rflow::probe(view_of(values, data.x), data.y, again);
      auto const k = static_cast<std::size_t>(&seed - r.seeds.data());
      CHECK(s.seeds[k].validation_loss[0] == Approx(seed.validation_loss.back()).epsilon(1e-10));
      CHECK(s.seeds[k].confusion == seed.confusion);
    }
  }
}

TEST_CASE("probe: accuracy per class, confusion and distance say the same") {
  clusters data(8, 400, 6, 5, 2);
  auto const values = data.packed<float>();
  auto const r = rflow::probe(view_of(values, data.x), data.y, {.epochs = 30});
  double mean = 0;
  for (auto const& seed : r.seeds) {
    std::ptrdiff_t right = 0, all = 0, distance = 0;
    for (std::ptrdiff_t c = 0; c < 5; ++c) {
      std::ptrdiff_t row = 0;
      for (std::ptrdiff_t k = 0; k < 5; ++k) {
        auto const count = seed.confusion[static_cast<std::size_t>(5 * c + k)];
        row += count;
        distance += count * std::abs(c - k);
        if (c == k) right += count;
      }
      all += row;
      CHECK(row == 16);  // a fifth of eighty
      CHECK(seed.class_accuracy[static_cast<std::size_t>(c)] ==
            Approx(static_cast<double>(seed.confusion[static_cast<std::size_t>(6 * c)]) / 16));
    }
    CHECK(all == 80);
    CHECK(seed.validation_accuracy.back() == Approx(static_cast<double>(right) / 80));
    CHECK(seed.mean_distance == Approx(static_cast<double>(distance) / 80));
    mean += seed.validation_accuracy.back() / 5;
  }
  CHECK(r.validation_accuracy.mean == Approx(mean));
  double square = 0;
  for (auto const& seed : r.seeds)
    square += std::pow(seed.validation_accuracy.back() - mean, 2) / 4;
  CHECK(r.validation_accuracy.spread == Approx(std::sqrt(square)));
}

TEST_CASE("probe_layers: finds the site where the label was put, and what the last has lost") {
  std::mt19937 bits(2);
  std::normal_distribution<float> normal;
  std::vector<Eigen::MatrixXf> sites(5, Eigen::MatrixXf(300, 12));
  labels y;
  for (int i = 0; i < 300; ++i) y.push_back(static_cast<int>(bits() % 3));
  float const signal[5] = {0, 1, 6, 2, 0};
  for (std::size_t l = 0; l < 5; ++l)
    for (int i = 0; i < 300; ++i)
      for (int j = 0; j < 12; ++j)
        sites[l](i, j) = normal(bits) + signal[l] * static_cast<float>(y[std::size_t(i)] == j);
  rflow::layer_stack const stack(sites, {"embed", "block.1", "block.2", "block.3", "block.4"});
  auto const r = rflow::probe_layers(stack, y);
  CHECK(r.best == 2);
  CHECK(r.accuracy(2).mean > 0.97);
  CHECK(r.accuracy(0).mean < 0.5);
  CHECK(r.drop.value == r.accuracy(2).mean - r.accuracy(4).mean);
  double const most = static_cast<double>(
      (std::max)({std::count(y.begin(), y.end(), 0), std::count(y.begin(), y.end(), 1),
                  std::count(y.begin(), y.end(), 2)}));
  CHECK(r.chance == Approx(most / 300));
  std::string const table = r.table();
  CHECK(std::count(table.begin(), table.end(), '\n') == 8);
  CHECK(table.find("best: block.2") != std::string::npos);
  CHECK(table.find("block.4") != std::string::npos);
}

TEST_CASE("probe_layers: a mask leaves tokens out, labels and all") {
  clusters data(12, 200, 15, 4);
  auto const values = data.packed<float>();
  std::vector<bool> keep(200);
  matrix left;
  labels left_labels, y = data.y;
  for (std::size_t i = 0; i < 200; ++i) {
    keep[i] = i % 3 != 1;
    if (keep[i])
      left.push_back(data.x[i]), left_labels.push_back(y[i]);
    else
      y[i] = -100;  // as PyTorch marks what it should ignore
  }
  rflow::layer_stack<float> const stack(values.data(), {1, 200, 15});
  probe_options const o{.epochs = 10, .seeds = 2, .keep_weights = true};
  auto const a = rflow::probe_layers(stack.tokens(keep), y, o);
  auto const dense_values = reference::pack<float>(left);
  auto const b = rflow::probe(view_of(dense_values, left), left_labels, o);
  for (std::size_t p = 0; p < 2; ++p) check_same(a.layers[0].seeds[p], b.seeds[p]);
}

// ---- splits -------------------------------------------------------------------------------------

namespace {

rflow::detail::probe_plan plan_of(labels const& y, probe_options const& o) {
  static std::vector<float> const zeros(100000);
  rflow::layer_stack<float> const stack(zeros.data(),
                                        {1, static_cast<std::ptrdiff_t>(y.size()), 1});
  return {"here", stack, y, o};
}

constexpr auto validate = rflow::softmax_problem::validate;

}  // namespace

TEST_CASE("probe: stratified splits take from each class its share, other tokens each time") {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    labels y;
    int const classes = 2 + static_cast<int>(bits() % 9);
    for (int c = 0; c < classes; ++c) y.insert(y.end(), 1 + bits() % 40, c);
    y.insert(y.end(), 5, 0);
    double const fraction = 0.05 + 0.1 * static_cast<double>(bits() % 6);
    probe_options const o{.seeds = 3, .first_seed = seed, .validation_fraction = fraction};
    auto const wanted =
        static_cast<std::ptrdiff_t>(std::llround(fraction * static_cast<double>(y.size())));
    auto const plan = plan_of(y, o);
    for (std::ptrdiff_t p = 0; p < 3; ++p) {
      std::vector<double> of(static_cast<std::size_t>(classes)), all = of;
      std::ptrdiff_t held = 0;
      for (std::size_t i = 0; i < y.size(); ++i) {
        bool const is = plan.problem.part(p, static_cast<std::ptrdiff_t>(i)) == validate;
        held += is;
        of[static_cast<std::size_t>(y[i])] += is;
        all[static_cast<std::size_t>(y[i])] += 1;
      }
      CHECK(held == wanted);
      for (std::size_t c = 0; c < of.size(); ++c) {
        double const share = static_cast<double>(wanted) * all[c] / static_cast<double>(y.size());
        CHECK(of[c] <= share + 1);
        CHECK(of[c] >= std::floor((std::min)(share, all[c] - 1)));
        CHECK(of[c] < all[c]);
      }
    }
    if (y.size() > 40)
      CHECK(!std::equal(plan.problem.parts.begin(),
                        plan.problem.parts.begin() + static_cast<std::ptrdiff_t>(y.size()),
                        plan.problem.parts.begin() + static_cast<std::ptrdiff_t>(y.size())));
  }
}

TEST_CASE("probe: data sorted by class are shuffled first") {
  labels y;
  for (int i = 0; i < 500; ++i) y.push_back(i / 100);
  probe_options o{.split = rflow::split::shuffled};
  auto const plan = plan_of(y, o);
  for (std::ptrdiff_t p = 0; p < 5; ++p) {
    int of[5] = {};
    for (std::ptrdiff_t i = 0; i < 500; ++i) of[i / 100] += plan.problem.part(p, i) == validate;
    CHECK(of[0] + of[1] + of[2] + of[3] + of[4] == 100);
    for (int const count : of) CHECK((count > 5 && count < 40));
  }
}

TEST_CASE("probe: a group is never on both sides") {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    labels y;
    probe_options o{.seeds = 4, .first_seed = seed};
    for (int i = 0; i < 400; ++i) {
      y.push_back(static_cast<int>(bits() % 3));
      o.groups.push_back(static_cast<std::int64_t>(bits() % 23) - 7);
    }
    auto const plan = plan_of(y, o);
    for (std::ptrdiff_t p = 0; p < 4; ++p) {
      std::set<std::int64_t> sides[2];
      std::ptrdiff_t held = 0;
      for (std::ptrdiff_t i = 0; i < 400; ++i) {
        bool const is = plan.problem.part(p, i) == validate;
        held += is;
        sides[is].insert(o.groups[static_cast<std::size_t>(i)]);
      }
      for (std::int64_t const g : sides[0]) CHECK(sides[1].count(g) == 0);
      CHECK(std::abs(held - 80) < 20);
    }
  }
}

// Platforms must agree on these: a seed in a paper names one split.
TEST_CASE("probe: a seed is the same split and start everywhere") {
  labels y;
  for (int i = 0; i < 20; ++i) y.push_back(i % 2);
  probe_options o{.seeds = 1, .first_seed = 7, .validation_fraction = 0.3};
  auto const held = [&] {
    auto const plan = plan_of(y, o);
    std::vector<int> out;
    for (int i = 0; i < 20; ++i)
      if (plan.problem.part(0, i) == validate) out.push_back(i);
    return out;
  };
  CHECK(held() == std::vector<int>{1, 6, 10, 16, 17, 19});
  o.split = rflow::split::shuffled;
  CHECK(held() == std::vector<int>{1, 6, 9, 10, 17, 19});
  for (int i = 0; i < 20; ++i) o.groups.push_back(i / 3);
  CHECK(held() == std::vector<int>{3, 4, 5, 18, 19});
  auto const w = plan_of(y, o).initial(4, {}, {});
  CHECK(w.values[0] == Approx(-0.0454028547).epsilon(1e-8));
  CHECK(w.values[7] == Approx(-0.498132318).epsilon(1e-8));
  CHECK(w.bias[1] == Approx(0.171735376).epsilon(1e-8));
}

TEST_CASE("probe: initial weights fill ±1/√d evenly") {
  labels const y{0, 1, 2, 0, 1, 2};
  auto const plan = plan_of(y, {.seeds = 3, .validation_fraction = 0});
  auto const w = plan.initial(5000, {}, {});
  double sum = 0, square = 0, largest = 0;
  for (double const v : w.values) {
    sum += v;
    square += v * v;
    largest = (std::max)(largest, std::abs(v));
  }
  auto const n = static_cast<double>(w.values.size());
  double const bound = 1 / std::sqrt(5000.0);
  CHECK(std::abs(sum / n) < 4 * bound / std::sqrt(3 * n));
  CHECK(square / n == Approx(bound * bound / 3).epsilon(0.02));
  CHECK(largest <= bound);
  CHECK(largest > 0.999 * bound);
  CHECK(w.values[0] != w.values[15000]);  // another seed
}

TEST_CASE("probe: listed tokens are the split of every seed") {
  clusters data(1, 60, 5, 3);
  auto const values = data.packed<double>();
  probe_options o{.epochs = 3, .seeds = 2, .initial_weights = rflow::weights::zero{}};
  for (std::ptrdiff_t i = 0; i < 60; ++i) (i % 4 == 0 ? o.validation : o.training).push_back(i);
  probe_options only_training = o, only_validation = o;
  only_training.validation.clear();
  only_validation.training.clear();
  auto const a = rflow::probe(view_of(values, data.x), data.y, o);
  CHECK(same_bits(a.seeds[0].validation_loss, a.seeds[1].validation_loss));
  for (auto const& other : {only_training, only_validation})
    check_same(a.seeds[0], rflow::probe(view_of(values, data.x), data.y, other).seeds[0]);
  // Tokens in neither list take no part.
  o.training.resize(20);
  auto const some = rflow::probe(view_of(values, data.x), data.y, o);
  auto broken = values;
  broken[59 * 5] = 1e3;  // token 59 is in neither
  auto const same = rflow::probe(view_of(broken, data.x), data.y, o);
  check_curve(
      some.seeds[0].train_loss,
      [&] {
        std::vector<double> v(same.seeds[0].train_loss.begin(), same.seeds[0].train_loss.end());
        return v;
      }(),
      1e-10);
}

TEST_CASE("probe: standardisation sees the training part only") {
  clusters data(21, 90, 8, 3);
  auto values = data.packed<double>();
  probe_options o{.epochs = 5, .seeds = 1, .standardize = true};
  for (std::ptrdiff_t i = 0; i < 90; i += 4) o.validation.push_back(i);
  auto const before = rflow::probe(view_of(values, data.x), data.y, o);
  for (std::size_t i = 0; i < 90; i += 4) values[i * 8 + 2] += 1000;
  auto const after = rflow::probe(view_of(values, data.x), data.y, o);
  for (std::size_t e = 0; e <= 5; ++e)
    CHECK(after.seeds[0].train_loss[e] ==
          Approx(before.seeds[0].train_loss[e].value).epsilon(1e-9));
  CHECK(after.seeds[0].validation_loss[5] > before.seeds[0].validation_loss[5] + 1);
  // A feature that is constant where it is trained on says nothing anywhere.
  for (std::size_t i = 0; i < 90; ++i) values[i * 8 + 2] = i % 4 == 0 ? 50. + double(i) : 0.1;
  auto const constant = rflow::probe(view_of(values, data.x), data.y, o);
  CHECK(constant.validation_loss.mean.ok());
  CHECK(constant.validation_loss.mean < 10);
  for (std::size_t c = 0; c < 3; ++c) CHECK(constant.seeds[0].weight[c * 8 + 2] == 0);
}

TEST_CASE("probe: features of any size, standardised") {
  for (double const scale : {1e-30, 1e30}) {
    CAPTURE(scale);
    clusters data(31, 150, 20, 3);
    auto plain = data.packed<float>();
    std::vector<float> scaled;
    for (float const v : plain) scaled.push_back(static_cast<float>(v * scale));
    probe_options const o{.epochs = 20, .seeds = 2, .standardize = true};
    auto const a = rflow::probe(view_of(plain, data.x), data.y, o);
    auto const b = rflow::probe(view_of(scaled, data.x), data.y, o);
    CHECK(b.train_loss.mean == Approx(a.train_loss.mean.value).epsilon(1e-4));
  }
}

// ---- no answer ----------------------------------------------------------------------------------

TEST_CASE("probe: constant features have a status, one site does not spoil another") {
  clusters data(2, 60, 4, 3);
  auto values = data.packed<float>();
  std::vector<float> const constant(values.size(), 0.1f);
  auto const r = rflow::probe(view_of(constant, data.x), data.y);
  CHECK(r.why == status::constant_layer);
  CHECK(r.validation_accuracy.mean.why == status::constant_layer);
  CHECK(r.seeds.empty());

  std::vector<float> broken = values;
  broken[17 * 4 + 3] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> three = values;
  three.insert(three.end(), broken.begin(), broken.end());
  three.insert(three.end(), constant.begin(), constant.end());
  rflow::layer_stack<float> const stack(three.data(), {3, 60, 4});
  auto const all = rflow::probe_layers(stack, data.y);
  CHECK(all.layers[0].validation_accuracy.mean.ok());
  CHECK(all.layers[1].why == status::non_finite);
  CHECK(all.layers[1].non_finite.token == 17);
  CHECK(all.layers[1].non_finite.feature == 3);
  CHECK(all.layers[2].why == status::constant_layer);
  CHECK(all.best == 0);
  CHECK(all.drop.why == status::constant_layer);
  CHECK(all.table().find("non_finite") != std::string::npos);
  // Where the token is masked, the position still counts all of them.
  std::vector<bool> keep(60, true);
  keep[0] = keep[5] = false;
  CHECK(rflow::probe_layers(stack.tokens(keep), data.y).layers[1].non_finite.token == 17);

  CHECK_THROWS_WITH_AS(rflow::probe(view_of(broken, data.x), data.y),
                       "rflow::probe: NaN or infinity in layer x, token 17, feature 3",
                       std::domain_error);
}

TEST_CASE("probe: a run that leaves the range of numbers says so") {
  clusters data(2, 60, 4, 3);
  auto const values = data.packed<float>();
  auto const r = rflow::probe(view_of(values, data.x), data.y,
                              {.epochs = 30, .learning_rate = 1e38, .seeds = 2});
  CHECK(r.seeds[0].train_loss[0].ok());
  CHECK(r.train_loss.mean.why == status::diverged);
  CHECK(r.validation_accuracy.mean.why == status::diverged);
  CHECK(r.seeds[1].class_accuracy[0].why == status::diverged);
  CHECK(r.seeds[1].mean_distance.why == status::diverged);
}

// ---- misuse -------------------------------------------------------------------------------------

TEST_CASE("probe: what it refuses") {
  clusters data(2, 30, 4, 3);
  auto const values = data.packed<float>();
  auto const x = view_of(values, data.x);
  auto const refuses = [&](labels const& y, probe_options const& o, char const* text) {
    CAPTURE(text);
    try {
      rflow::probe(x, y, o);
      FAIL("accepted");
    } catch (std::invalid_argument const& error) {
      CHECK(std::string(error.what()) == std::string("rflow::probe: ") + text);
    }
  };
  auto with = [&](std::size_t i, int label) {
    labels y = data.y;
    y[i] = label;
    return y;
  };
  refuses({0, 1}, {}, "2 labels for 30 tokens");
  refuses(with(4, -1), {}, "label -1 of token 4 is not in [0, 3)");
  refuses(with(4, 3), {.classes = 3}, "label 3 of token 4 is not in [0, 3)");
  refuses(with(4, 4), {}, "class 3 of 5 has no token to train on with seed 0, nor any at all");
  refuses(labels(30, 0), {}, "1 classes; a probe tells at least 2 apart");
  refuses(data.y, {.classes = 31}, "31 classes for 30 tokens");
  refuses(data.y, {.epochs = -1}, "-1 epochs");
  refuses(data.y, {.seeds = 0}, "0 seeds");
  refuses(data.y, {.validation_fraction = 1}, "a validation fraction of 1.000000 is not in [0, 1)");
  refuses(data.y, {.validation_fraction = 0.01},
          "a validation fraction of 0.010000 of 30 tokens leaves one part empty");
  refuses(data.y, {.groups = {1, 2}}, "2 groups for 30 tokens");
  refuses(data.y, {.groups = std::vector<std::int64_t>(30, 1)},
          "no group of 1 fits into 6 tokens to validate on");
  refuses(data.y, {.validation = {30}}, "token 30 is listed for a part, there are 30");
  refuses(data.y, {.validation = {3, 3}}, "token 3 is listed twice in the split");
  refuses(data.y, {.training = {3}, .validation = {3}}, "token 3 is listed twice in the split");
  std::vector<std::int64_t> pairs;
  for (int i = 0; i < 30; ++i) pairs.push_back(i / 2);
  refuses(data.y, {.groups = pairs, .validation = {3}}, "group 1 is on both sides of the split");
  std::vector<std::ptrdiff_t> third;
  for (std::ptrdiff_t i = 0; i < 30; i += 3) third.push_back(i);
  refuses(data.y, {.validation = third},
          "class 0 of 3 has no token to train on with seed 0, all are held out");
  refuses(data.y, {.initial_weights = rflow::weights::given(std::vector<double>(11), {})},
          "11 initial weights and 0 biases for 3 classes x 4 features");
  refuses(data.y, {.learning_rate = 0},
          "the learning rate and epsilon must be above 0, weight decay at least 0, both betas in "
          "[0, 1)");
  CHECK_THROWS_AS(rflow::probe(rflow::view<float>(), data.y), std::invalid_argument);
  CHECK_THROWS_AS(rflow::probe_layers(rflow::layer_stack<float>{x}, labels{0, 1}),
                  std::invalid_argument);
}

TEST_CASE("tokens in several stacks, one after the other, are as those of one") {
  std::mt19937 bits(4);
  std::normal_distribution<float> normal;
  constexpr std::ptrdiff_t n = 157, d = 23;
  std::vector<dense<float>> sites(3, dense<float>(n, d));
  for (auto& x : sites)
    for (std::ptrdiff_t i = 0; i < x.size(); ++i) x.data()[i] = normal(bits);
  labels y;
  std::vector<bool> counts;
  for (std::ptrdiff_t i = 0; i < n; ++i) {
    y.push_back(static_cast<int>(bits() % 3));
    sites[1](i, y.back()) += 2;
    counts.push_back(bits() % 5 != 0);
  }
  sites[2](140, 3) = std::numeric_limits<float>::quiet_NaN();
  counts[140] = true;
  auto const part = [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
    std::vector<rflow::view<float>> views;
    for (auto const& x : sites) views.emplace_back(x.data() + begin * d, end - begin, d);
    return rflow::layer_stack<float>(views, {"a", "b", "c"})
        .tokens(std::vector<bool>(counts.begin() + begin, counts.begin() + end));
  };
  for (bool const by_group : {false, true}) {
    probe_options o{.epochs = 20, .seeds = 2, .keep_weights = true};
    if (by_group)
      for (std::ptrdiff_t i = 0; i < n; ++i) o.groups.push_back(i / 10);
    rflow::layer_probes const one = rflow::probe_layers(part(0, n), y, o);
    rflow::layer_probes const many = rflow::probe_layers(
        std::vector{part(0, 1), part(1, 64), part(64, 65), part(65, 150), part(150, n)}, y, o);
    CHECK(many.table() == one.table());
    CHECK(many.best == 1);
    for (std::size_t l = 0; l < 2; ++l)
      for (std::size_t p = 0; p < 2; ++p) {
        CHECK(many.layers[l].seeds[p].weight == one.layers[l].seeds[p].weight);
        CHECK(many.layers[l].seeds[p].confusion == one.layers[l].seeds[p].confusion);
      }
    CHECK(many.layers[2].why == status::non_finite);
    CHECK(many.layers[2].non_finite.token == 140);
    CHECK(many.layers[2].non_finite.feature == 3);
  }
  using stacks = std::vector<rflow::layer_stack<float>>;
  CHECK_THROWS_WITH_AS(rflow::probe_layers(stacks{}, y), "rflow::probe_layers: no stacks",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::probe_layers(stacks{part(0, 10), part(10, 20)}, y),
                       "rflow::probe_layers: 157 labels for 20 tokens", std::invalid_argument);
  std::vector<rflow::view<float>> const narrow(3, {sites[0].data(), 10, d - 1, d});
  CHECK_THROWS_AS(
      rflow::probe_layers(stacks{part(0, n - 10), rflow::layer_stack<float>(narrow)}, y),
      std::invalid_argument);
}
