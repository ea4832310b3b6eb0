// SPDX-License-Identifier: Apache-2.0
// Weights from a seed: the distributions that a scheme promises, the same values however they are
// drawn, and a model that runs on them.

#include <doctest/doctest.h>

#include <models/drawn.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

using models::integer;

namespace {

std::vector<float> values(models::weight_source const& source, models::parameter const& p) {
  std::vector<float> out(static_cast<std::size_t>(p.size()));
  source.read(p, 0, p.size(), out.data());
  return out;
}

models::parameter find(models::architecture const& a, std::string const& ending) {
  for (models::parameter const& p : models::parameters(a))
    if (p.name.ends_with(ending)) return p;
  FAIL("no parameter ", ending);
  return {};
}

struct spread {
  double mean = 0, stddev = 0, most = 0;
  explicit spread(std::vector<float> const& x) {
    for (float const v : x) mean += v, most = std::max(most, std::abs(static_cast<double>(v)));
    mean /= static_cast<double>(x.size());
    for (float const v : x) stddev += (v - mean) * (v - mean);
    stddev = std::sqrt(stddev / static_cast<double>(x.size()));
  }
};

models::architecture const neox = models::gpt_neox::config{
    .layers = 2, .hidden = 96, .heads = 3, .inner = 384, .vocabulary = 500};
models::architecture const mamba = models::mamba::config{
    .layers = 4, .hidden = 64, .inner = 128, .state = 16, .rank = 4, .vocabulary = 500};
models::architecture const mamba2 = models::mamba2::config{
    .layers = 4, .hidden = 64, .heads = 32, .width = 4, .state = 32, .vocabulary = 500};

}  // namespace

TEST_CASE("schemes draw what they promise") {
  using models::scheme;
  struct expectation {
    models::architecture const& model;
    scheme how;
    char const* parameter;
    double stddev, most;  // most: 0 for normal laws
  };
  double const third = std::sqrt(1.0 / 3);
  for (auto const& [model, how, name, stddev, most] : {
           expectation{neox, scheme::gaussian, "embed_in.weight", 0.03, 0},
           {neox, scheme::gaussian, "0.mlp.dense_4h_to_h.weight", 0.03, 0},
           {neox, scheme::xavier_normal, "1.mlp.dense_h_to_4h.weight", std::sqrt(2. / 480), 0},
           {neox, scheme::xavier_uniform, "1.attention.query_key_value.weight", std::sqrt(2. / 384),
            std::sqrt(6. / 384)},
           {neox, scheme::kaiming_normal, "1.mlp.dense_4h_to_h.weight", std::sqrt(2. / 384), 0},
           {neox, scheme::kaiming_uniform, "1.attention.dense.weight", std::sqrt(2. / 96),
            std::sqrt(6. / 96)},
           {neox, scheme::transformers, "1.attention.dense.weight", 0.02, 0},
           {neox, scheme::mamba_ssm, "1.attention.dense.weight", 0.02, 0},
           {mamba, scheme::gaussian, "0.mixer.conv1d.weight", 0.03, 0},
           {mamba, scheme::kaiming_normal, "0.mixer.conv1d.weight", std::sqrt(2. / 4), 0},
           {mamba, scheme::transformers, "0.mixer.in_proj.weight", 0.1, 0},
           {mamba, scheme::transformers, "0.mixer.out_proj.weight", third / std::sqrt(128),
            1 / std::sqrt(128)},
           {mamba, scheme::transformers, "0.mixer.dt_proj.weight", third / 2, 0.5},
           {mamba, scheme::transformers, "0.mixer.conv1d.weight", third / 2, 0.5},
           {mamba, scheme::transformers, "embeddings.weight", 0.1, 0},
           {mamba, scheme::mamba_ssm, "embeddings.weight", 0.02, 0},
           {mamba, scheme::mamba_ssm, "0.mixer.in_proj.weight", third / 8, 0.125},
           {mamba, scheme::mamba_ssm, "0.mixer.out_proj.weight", third / std::sqrt(128) / 2,
            1 / std::sqrt(128) / 2},
       }) {
    std::string const context =
        std::string(name) + ", scheme " + std::to_string(static_cast<int>(how));
    CAPTURE(context);  // clang 14 captures no structured binding
    models::drawn_weights const source(model, {how, 5, 0.03});
    auto const x = values(source, find(model, name));
    spread const s(x);
    double const n = static_cast<double>(x.size());
    CHECK(std::abs(s.mean) < 5 * stddev / std::sqrt(n));
    CHECK(s.stddev == doctest::Approx(stddev).epsilon(5 / std::sqrt(2 * n)));
    if (most > 0) CHECK(s.most <= most * 1.00001);
    if (most > 0) CHECK(s.most > most * (1 - 20 / n));
  }
}

TEST_CASE("what is not a matrix has its own start") {
  models::drawn_weights const plain(mamba, {models::scheme::xavier_normal, 1});
  auto const logs = values(plain, find(mamba, "1.mixer.A_log"));
  for (std::size_t i = 0; i < logs.size(); ++i)
    CHECK(logs[i] == doctest::Approx(std::log(static_cast<double>(i % 16 + 1))));
  for (float const x : values(plain, find(mamba, "1.mixer.D"))) CHECK(x == 1);
  for (float const x : values(plain, find(mamba, "1.mixer.conv1d.bias"))) CHECK(x == 0);
  for (float const x : values(plain, find(mamba, "1.norm.weight"))) CHECK(x == 1);
  double least = 1, most = 0;
  for (float const x : values(plain, find(mamba, "1.mixer.dt_proj.bias"))) {
    double const step = std::log1p(std::exp(static_cast<double>(x)));
    least = std::min(least, step), most = std::max(most, step);
    CHECK(step > 0.00099);
    CHECK(step < 0.101);
  }
  CHECK(least < 0.005);
  CHECK(most > 0.03);

  models::drawn_weights const original(mamba2, {models::scheme::mamba_ssm, 1});
  spread const decay(values(original, find(mamba2, "2.mixer.A_log")));
  CHECK(decay.most <= std::log(16.0));
  CHECK(decay.stddev > 0.3);
  auto const heads = values(models::drawn_weights(mamba2, {}), find(mamba2, "2.mixer.A_log"));
  for (std::size_t i = 0; i < heads.size(); ++i)
    CHECK(heads[i] == doctest::Approx(std::log(static_cast<double>(i + 1))));

  models::drawing drawing;
  drawing.affine = 0.5;
  models::drawn_weights const affine(neox, drawing);
  spread const gain(values(affine, find(neox, "0.input_layernorm.weight")));
  CHECK(gain.mean == doctest::Approx(1).epsilon(0.3));
  CHECK(gain.stddev == doctest::Approx(0.5).epsilon(0.4));
  models::plain_norms const reset(affine);
  for (float const x : values(reset, find(neox, "0.input_layernorm.weight"))) CHECK(x == 1);
  for (float const x : values(reset, find(neox, "0.input_layernorm.bias"))) CHECK(x == 0);
  CHECK(values(reset, find(neox, "0.attention.dense.weight")) ==
        values(affine, find(neox, "0.attention.dense.weight")));
}

TEST_CASE("values depend on seed, parameter and place alone") {
  models::drawn_weights const one(neox, {models::scheme::gaussian, 1}),
      again(neox, {models::scheme::gaussian, 1}), two(neox, {models::scheme::gaussian, 2});
  models::parameter const p = find(neox, "0.attention.dense.weight"),
                          q = find(neox, "1.attention.dense.weight");
  auto const x = values(one, p);
  CHECK(x == values(again, p));
  CHECK(x != values(two, p));
  CHECK(x != values(one, q));
  for (integer row = 0; row < 96; row += 7) {  // row by row, as embeddings are looked up
    std::vector<float> part(96);
    one.read(p, row * 96, 96, part.data());
    CHECK(std::equal(part.begin(), part.end(), x.begin() + row * 96));
  }
}

TEST_CASE("a drawn model runs, the same with any number of threads") {
  for (models::architecture const& a : {neox, mamba, mamba2}) {
    models::drawn_weights const source(a, {models::scheme::transformers, 3});
    std::vector<models::matrix> seen[2];
    for (int const threads : {1, 3}) {
      models::team team(threads);
      models::forward(
          a, source, models::batch::one({5, 499, 0, 7, 7, 31}), {team},
          [&](models::site const&, auto const& x) {
            seen[threads > 1].push_back(Eigen::Map<models::matrix const>(x.data, x.rows, x.cols));
          });
    }
    CHECK(seen[0].size() == static_cast<std::size_t>(models::blocks_of(a) + 2));
    for (std::size_t k = 0; k < seen[0].size(); ++k) {
      CHECK(seen[0][k].allFinite());
      CHECK(seen[0][k] == seen[1][k]);
      if (k > 0) CHECK(seen[0][k] != seen[0][k - 1]);
    }
  }
}
