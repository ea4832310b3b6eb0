// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <models/model.hpp>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using models::integer;
using models::matrix;

namespace {

/// What tests/reference/models.py wrote; it can draw others, and name their folder.
fs::path const references = [] {
  char const* const drawn = std::getenv("RFLOW_TEST_MODELS");
  return drawn != nullptr ? fs::path(drawn) : fs::path(RFLOW_SOURCE_DIR) / "tests/reference/models";
}();

std::vector<std::string> cases() {
  std::vector<std::string> out;
  for (auto const& entry : fs::directory_iterator(references))
    if (entry.is_directory()) out.push_back(entry.path().filename().string());
  return out;
}

std::map<std::string, matrix> run(fs::path const& folder, models::batch const& tokens,
                                  int threads = 2) {
  models::architecture const model = models::read_config(folder / "config.json");
  models::checkpoint weights(folder);
  models::require(model, weights);
  models::team team(threads);
  std::map<std::string, matrix> out;
  models::forward(model, weights, tokens, {team}, [&](models::site const& s, auto const& x) {
    out[s.name()] = Eigen::Map<matrix const>(x.data, x.rows, x.cols);
  });
  return out;
}

models::batch tokens_of(rflow::safetensors_file const& file) {
  return models::batch::one(file["ids"].integers());
}

double relative(matrix const& a, matrix const& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  return (a.cast<double>() - b.cast<double>()).norm() / b.cast<double>().norm();
}

/// A copy of a reference model, to be damaged.
class copy_of {
 public:
  explicit copy_of(std::string const& name)
      : path_(fs::temp_directory_path() / ("rflow-models-" + std::to_string(::getpid()))) {
    fs::remove_all(path_);
    fs::copy(references / name, path_);
  }
  ~copy_of() { fs::remove_all(path_); }
  copy_of(copy_of const&) = delete;
  copy_of& operator=(copy_of const&) = delete;
  fs::path const& path() const { return path_; }

  /// Rewrites config.json.
  void configure(std::function<void(nlohmann::json&)> const& change) const {
    nlohmann::json config = nlohmann::json::parse(std::ifstream(path_ / "config.json"));
    change(config);
    std::ofstream(path_ / "config.json") << config;
  }
  /// Rewrites model.safetensors.
  void weigh(std::function<void(std::vector<rflow::tensor>&)> const& change) const {
    fs::path const file = path_ / "model.safetensors", old = path_ / "old";
    fs::rename(file, old);
    rflow::safetensors_file const source(old);
    std::vector<rflow::tensor> tensors;
    for (std::string const& name : source.names()) tensors.push_back(source[name]);
    change(tensors);
    rflow::write_safetensors(file, tensors);
    fs::remove(old);
  }
  /// What is said about it.
  std::string complaint() const {
    try {
      models::architecture const model = models::read_config(path_ / "config.json");
      models::checkpoint weights(path_);
      models::require(model, weights);
    } catch (std::exception const& error) {
      return error.what();
    }
    return "";
  }

 private:
  fs::path path_;
};

bool holds(std::string const& text, std::string const& part) {
  INFO(text);
  CHECK(text.find('\n') == std::string::npos);
  return text.find(part) != std::string::npos;
}

void drop(std::vector<rflow::tensor>& tensors, std::string const& name) {
  auto const before = tensors.size();
  std::erase_if(tensors, [&](rflow::tensor const& x) { return x.name == name; });
  REQUIRE(tensors.size() + 1 == before);
}

rflow::tensor& find(std::vector<rflow::tensor>& tensors, std::string const& name) {
  for (rflow::tensor& x : tensors)
    if (x.name == name) return x;
  FAIL("no tensor ", name);
  return tensors.front();
}

}  // namespace

TEST_CASE("models compute what Hugging Face computes") {
  std::map<std::string, int> per_architecture;
  std::map<std::string, double> most;
  for (std::string const& name : cases()) {
    CAPTURE(name);
    rflow::safetensors_file const file(references / name / "sites.safetensors");
    std::string const architecture =
        models::name_of(models::read_config(references / name / "config.json"));
    auto const sites = run(references / name, tokens_of(file));
    CHECK(sites.size() + 1 == file.size());
    for (auto const& site : sites) {
      rflow::view<float> const x = file[site.first].as<float>();
      double const error = relative(site.second, Eigen::Map<matrix const>(x.data, x.rows, x.cols));
      INFO(site.first, " differs by ", error);
      CHECK(error < 2e-5);
      most[architecture] = std::max(most[architecture], error);
    }
    ++per_architecture[architecture];
  }
  for (auto const& [architecture, count] : per_architecture)
    MESSAGE(architecture << ": " << count << " models, they differ by at most "
                         << most[architecture]);
  CHECK(per_architecture.size() == 4);
  for (auto const& [architecture, count] : per_architecture) CHECK(count >= 3);
}

TEST_CASE("any number of threads gives the same bits") {
  for (std::string const& name : cases()) {
    CAPTURE(name);
    rflow::safetensors_file const file(references / name / "sites.safetensors");
    auto const one = run(references / name, tokens_of(file), 1);
    for (int const threads : {2, 5})
      for (auto const& [site, x] : run(references / name, tokens_of(file), threads))
        CHECK(std::memcmp(x.data(), one.at(site).data(),
                          static_cast<std::size_t>(x.size()) * sizeof(float)) == 0);
  }
}

TEST_CASE("sequences of a batch do not see each other") {
  std::mt19937_64 random(7);
  for (std::string const& name : cases()) {
    CAPTURE(name);
    auto const model = models::read_config(references / name / "config.json");
    models::batch together{{}, {0}};
    for (int const length : {3, 1, 11, 8}) {
      for (int i = 0; i < length; ++i)
        together.ids.push_back(static_cast<std::int64_t>(random() % 37));
      together.offsets.push_back(together.tokens());
    }
    auto const all = run(references / name, together);
    for (integer s = 0; s < together.sequences(); ++s) {
      auto const begin = together.ids.begin() + together.first(s);
      auto const alone =
          run(references / name, models::batch::one({begin, begin + together.length(s)}));
      for (auto const& [site, x] : alone)
        CHECK(relative(all.at(site).middleRows(together.first(s), together.length(s)), x) < 1e-6);
    }
  }
}

TEST_CASE("a token does not see later ones") {
  for (std::string const& name : cases()) {
    CAPTURE(name);
    rflow::safetensors_file const file(references / name / "sites.safetensors");
    models::batch tokens = tokens_of(file);
    auto const full = run(references / name, tokens);
    tokens.ids.resize(7);
    tokens.offsets.back() = 7;
    for (auto const& [site, x] : run(references / name, tokens))
      CHECK(relative(full.at(site).topRows(7), x) < 1e-6);
  }
}

TEST_CASE("products of odd shapes") {
  std::mt19937_64 random(3);
  models::team team(2);
  auto const draw = [&](integer most) {
    return 1 + static_cast<integer>(random() % static_cast<std::uint64_t>(most));
  };
  for (int round = 0; round < 40; ++round) {
    integer const tokens = draw(600), in = draw(round % 4 == 0 ? 1300 : 40), out = draw(300);
    CAPTURE(tokens);
    CAPTURE(in);
    CAPTURE(out);
    std::srand(static_cast<unsigned>(round));
    matrix const x = matrix::Random(tokens, in), w = matrix::Random(out, in);
    models::linear layer;
    layer.weight.resize(out, in);
    for (integer first = 0; first < out; first += models::packed_weight::group)
      layer.weight.pack(first, std::min(models::packed_weight::group, out - first),
                        w.data() + first * in);
    layer.bias = models::vector::Random(out);
    models::packed_rows packed;
    packed.pack(team, models::row_map(x.data(), tokens, in, Eigen::OuterStride<>(in)));
    matrix y = matrix::Random(tokens, out);
    matrix const before = y;
    Eigen::MatrixXd const expected = (x.cast<double>() * w.cast<double>().transpose()).rowwise() +
                                     layer.bias.cast<double>().transpose();
    layer(team, packed, y, round % 2 == 1);
    if (round % 2 == 1) y -= before;
    CHECK((y.cast<double>() - expected).cwiseAbs().maxCoeff() <
          3e-6 * (4 + std::sqrt(static_cast<double>(in))));
  }
}

TEST_CASE("norms can be switched off, the embedding scaled") {
  fs::path const folder = references / "neox_parallel";
  models::architecture const model = models::read_config(folder / "config.json");
  models::checkpoint weights(folder);
  models::require(model, weights);
  models::team team(2);
  rflow::safetensors_file const file(folder / "sites.safetensors");
  std::vector<matrix> seen[3];
  for (int k = 0; k < 3; ++k)
    models::forward(model, weights, tokens_of(file),
                    {team, {.normalise = k != 1, .embedding_scale = k == 2 ? 4.f : 1.f}},
                    [&](models::site const&, auto const& x) {
                      seen[k].push_back(Eigen::Map<matrix const>(x.data, x.rows, x.cols));
                    });
  CHECK(seen[0].front() == seen[1].front());
  CHECK(seen[1].back() == seen[1][seen[1].size() - 2]);  // the final norm passes its input on
  CHECK(relative(seen[1][1], seen[0][1]) > 1e-2);
  CHECK(seen[2].front() == 4 * seen[0].front());
}

TEST_CASE("a bad checkpoint is refused by name") {
  SUBCASE("missing tensor") {
    copy_of const model("mamba_plain");
    model.weigh([](auto& tensors) { drop(tensors, "backbone.layers.1.mixer.D"); });
    CHECK(holds(model.complaint(), "tensor 'backbone.layers.1.mixer.D' is missing"));
  }
  SUBCASE("extra tensor") {
    copy_of const model("neox_sequential");
    model.configure([](auto& config) { config["num_hidden_layers"] = 1; });
    CHECK(holds(model.complaint(), "'gpt_neox.layers.1."));
    CHECK(holds(model.complaint(), "is not part of this architecture"));
  }
  SUBCASE("misshaped tensor") {
    copy_of const model("neo_all_local");
    model.configure([](auto& config) { config["vocab_size"] = 38; });
    CHECK(holds(model.complaint(), "shape [38, 24] expected, found"));
    CHECK(holds(model.complaint(), "transformer.wte.weight"));
  }
  SUBCASE("tensor of a wrong type") {
    copy_of const model("mamba2_one_group");
    model.weigh([](auto& tensors) {
      find(tensors, "backbone.layers.0.mixer.A_log").type = rflow::dtype::i32;
    });
    CHECK(holds(model.complaint(), "backbone.layers.0.mixer.A_log"));
    CHECK(holds(model.complaint(), "i32"));
  }
  SUBCASE("the head is checked though nothing uses it") {
    copy_of const model("neox_sequential");
    model.weigh([](auto& tensors) {
      std::swap(find(tensors, "embed_out.weight").shape[0],
                find(tensors, "embed_out.weight").shape[1]);
    });
    CHECK(holds(model.complaint(), "embed_out.weight"));
  }
  SUBCASE("a shard that is not there") {
    copy_of const model("neox_parallel");
    fs::path shard;
    for (auto const& entry : fs::directory_iterator(model.path()))
      if (entry.path().filename().string().starts_with("model-00002")) shard = entry.path();
    fs::remove(shard);
    CHECK(holds(model.complaint(), shard.filename().string()));
  }
  SUBCASE("a shard outside of the folder") {
    copy_of const model("neox_parallel");
    fs::path const index = model.path() / "model.safetensors.index.json";
    nlohmann::json list = nlohmann::json::parse(std::ifstream(index));
    list["weight_map"].begin().value() = "../elsewhere.safetensors";
    std::ofstream(index) << list;
    CHECK(holds(model.complaint(), "is in no file of this folder"));
  }
  SUBCASE("no weights") {
    copy_of const model("mamba_plain");
    fs::remove(model.path() / "model.safetensors");
    CHECK(holds(model.complaint(), "neither model.safetensors nor"));
  }
  SUBCASE("unknown architecture") {
    copy_of const model("mamba_plain");
    model.configure([](auto& config) { config["model_type"] = "llama"; });
    CHECK(holds(model.complaint(), "model_type 'llama' is not"));
    model.configure([](auto& config) { config.erase("model_type"); });
    CHECK(holds(model.complaint(), "no model_type"));
    std::ofstream(model.path() / "config.json") << "[1, 2";
    CHECK(holds(model.complaint(), "not a JSON object"));
  }
  SUBCASE("settings that make no model") {
    copy_of const model("neox_sequential");
    model.configure([](auto& config) { config["num_attention_heads"] = 5; });
    CHECK(holds(model.complaint(), "5 does not divide 32"));
    model.configure([](auto& config) { config["num_attention_heads"] = -2; });
    CHECK(holds(model.complaint(), "num_attention_heads: a whole number above 0"));
    model.configure(
        [](auto& config) { config["num_attention_heads"] = 2, config["hidden_act"] = "relu"; });
    CHECK(holds(model.complaint(), "'relu' is not supported"));
  }
}

TEST_CASE("bad tokens are refused by number") {
  auto const complaint = [](std::string const& name, models::batch const& tokens) -> std::string {
    try {
      run(references / name, tokens);
    } catch (std::invalid_argument const& error) {
      return error.what();
    }
    return "";
  };
  CHECK(holds(complaint("mamba_plain", models::batch::one({1, 2, 37})),
              "token 2 has the id 37; the vocabulary has 37"));
  CHECK(holds(complaint("neo_all_local", models::batch::one({-1})), "token 0 has the id -1"));
  CHECK(holds(complaint("neo_all_local", models::batch::one({})), "no tokens"));
  CHECK(holds(complaint("neox_sequential", models::batch::one(std::vector<std::int64_t>(33, 1))),
              "a sequence of 33 tokens; the model has 32 positions"));
  CHECK(complaint("mamba_plain", models::batch::one(std::vector<std::int64_t>(200, 1))).empty());
}

TEST_CASE("the original package's configuration is read, too") {
  copy_of const model("mamba2_four_groups");
  std::ofstream(model.path() / "config.json")
      << R"({"d_model": 16, "n_layer": 2, "vocab_size": 36, "pad_vocab_size_multiple": 37,
             "rms_norm": true, "ssm_cfg": {"layer": "Mamba2", "headdim": 4, "d_state": 6, "ngroups": 4}})";
  CHECK(model.complaint().empty());
}

TEST_CASE("the five models of the paper have the parameters that are published") {
  auto const count = [](models::architecture const& a) {
    double sum = 0;
    for (models::parameter const& p : models::parameters(a))
      if (!p.optional || p.name == "embed_out.weight") sum += static_cast<double>(p.size());
    return sum;
  };
  CHECK(count(models::gpt_neo::config{}) == 2651307520);
  CHECK(count(models::gpt_neox::config{}) == 2775208960);
  CHECK(count(models::mamba::config{}) == 2768345600);
  CHECK(count(models::mamba2::config{}) == 2702599680);
  CHECK(count(models::mamba2::config{.layers = 24, .hidden = 768, .heads = 24}) == 128989632);
}
