// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <models/model.hpp>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
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

namespace {

/// What read_config says about a text, or nothing; keeps what it read.
class config_file {
 public:
  explicit config_file(std::string const& text)
      : path_(fs::temp_directory_path() / ("rflow-config-" + std::to_string(::getpid()))) {
    std::ofstream(path_) << text;
    try {
      model = models::read_config(path_);
    } catch (models::unusable_checkpoint const& error) {
      complaint = error.what();
    }
    fs::remove(path_);
  }
  explicit config_file(nlohmann::json const& values) : config_file(values.dump()) {}

  std::string complaint;
  models::architecture model;

 private:
  fs::path path_;
};

using models::detail::effect;
using nlohmann::json;

/// A configuration, and the object in it to which a dictionary belongs.
struct documented {
  models::detail::dictionary const& fields;
  char const* text;
  char const* inside = "";
};

documented const dictionaries[] = {
    {models::detail::gpt_neo_fields,
     R"({"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["local"], 2]]})"},
    {models::detail::gpt_neox_fields, R"({"model_type": "gpt_neox"})"},
    {models::detail::rope_fields,
     R"({"model_type": "gpt_neox", "rope_parameters": {"type": "linear", "factor": 2}})",
     "/rope_parameters"},
    {models::detail::rope_fields,
     R"({"model_type": "gpt_neox", "rope_scaling": {"rope_type": "linear", "factor": 2}})",
     "/rope_scaling"},
    {models::detail::mamba_fields, R"({"model_type": "mamba"})"},
    {models::detail::mamba2_fields, R"({"model_type": "mamba2"})"},
    {models::detail::mamba_ssm_fields, R"({"d_model": 16})"},
    {models::detail::ssm_cfg_fields, R"({"d_model": 16, "ssm_cfg": {}})", "/ssm_cfg"},
    {models::detail::ssm_cfg2_fields, R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2"}})",
     "/ssm_cfg"},
};

std::vector<std::string> words(std::string_view text) {
  std::istringstream in{std::string(text)};
  return {std::istream_iterator<std::string>(in), {}};
}

}  // namespace

TEST_CASE("what is said of each field of a config.json holds") {
  for (documented const& d : dictionaries) {
    json const good = json::parse(d.text);
    json::json_pointer const at(d.inside);
    auto const with = [&](std::string const& field, json const& value) {
      json changed = good;
      changed[at][field] = value;
      return config_file(changed).complaint;
    };
    CHECK(config_file(good).complaint == "");
    std::map<std::string, int> seen;
    for (auto const& rules : {d.fields.own, d.fields.shared})
      for (models::detail::rule const& r : rules)
        for (std::string const& field : words(r.fields)) {
          CAPTURE(d.text);
          CAPTURE(field);
          CHECK(++seen[field] == 1);
          CHECK(d.fields.find(field) == &r);
          json const nonsense = {{"nonsense", {1, 2}}};
          if (r.what == effect::none)
            CHECK(with(field, nonsense) == "");
          else  // a field that nobody looked at would pass
            CHECK(holds(with(field, nonsense), field));
          if (r.what != effect::fixed) continue;
          CHECK(holds(with(field, nonsense), "is not supported, only "));
          for (json const& value : json::parse(r.detail)) CHECK(with(field, value) == "");
        }
    CHECK(holds(with("unheard_of", 1), "unheard_of' is not a field known for"));
    for (char const* const part : {"hidden", "_size", "", " ", "d_conv bias"})
      CHECK(d.fields.find(part) == nullptr);
  }
}

TEST_CASE("a field that changes the function is read or refused") {
  struct expectation {
    char const* config;
    char const* complaint;
  };
  for (
      expectation const& e : {
          // the rotation
          expectation{
              R"({"model_type": "gpt_neox", "rope_parameters": {"type": "yarn", "factor": 2}})",
              "rope_parameters.rope_type 'yarn' is not supported"},
          {R"({"model_type": "gpt_neox", "rope_scaling": {"type": "dynamic", "factor": 2}})",
           "rope_scaling.rope_type 'dynamic' is not supported"},
          {R"({"model_type": "gpt_neox", "rope_scaling": {"type": "linear"}})",
           "rope_scaling.factor is missing"},
          {R"({"model_type": "gpt_neox", "rope_scaling": {"type": "linear", "factor": 0}})",
           "rope_scaling.factor: a number above 0"},
          {R"({"model_type": "gpt_neox", "rope_scaling": {"factor": 2}})",
           "rope_scaling.factor without"},
          {R"({"model_type": "gpt_neox", "rope_scaling": {"type": "linear", "rope_type": "default"}})",
           "disagree"},
          {R"({"model_type": "gpt_neox", "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"type": "linear", "factor": 3}})",
           "rope_scaling and rope_parameters disagree"},
          {R"({"model_type": "gpt_neox", "rope_parameters": {"full_attention": {}}})",
           "rope_parameters.full_attention' is not a field known"},
          {R"({"model_type": "gpt_neox", "rope_theta": 500})",
           "rope_theta is 500, but rotary_emb_base, which counts in gpt_neox, is 10000"},
          {R"({"model_type": "gpt_neox", "partial_rotary_factor": 0.5})",
           "partial_rotary_factor is 0.5"},
          {R"({"model_type": "gpt_neox", "head_dim": 64})", "head_dim is 64"},
          {R"({"model_type": "gpt_neox", "hidden_size": 27, "num_attention_heads": 3, "rotary_pct": 1})",
           "an odd number of features of a head, 9,"},
          {R"({"model_type": "gpt_neox", "is_causal": false})",
           "is_causal: false is not supported, only true"},
          {R"({"model_type": "gpt_neox", "layer_norm_eps": null})",
           "layer_norm_eps: a number expected"},
          {R"({"model_type": "gpt_neox", "layer_norm_eps": -1})", "not negative"},
          {R"({"model_type": "gpt_neox", "layer_norm_eps": NaN})", "a number expected"},
          // GPT-Neo
          {R"({"model_type": "gpt_neo", "num_attention_heads": 8})",
           "num_attention_heads is 8, but num_heads, which counts in gpt_neo, is 16"},
          {R"({"model_type": "gpt_neo", "num_heads": 8, "num_hidden_layers": 12})",
           "num_hidden_layers is 12, but num_layers, which counts in gpt_neo, is 24"},
          {R"({"model_type": "gpt_neo", "num_layers": 12})", "attention_types: missing"},
          {R"({"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global"], 2]],
                "attention_layers": ["global", "local"]})",
           "attention_layers and attention_types disagree"},
          {R"({"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global"], 3]]})",
           "attention_types does not describe 2 layers"},
          {R"({"model_type": "gpt_neo", "num_layers": 1, "attention_layers": ["dense"]})",
           "attention_layers: global or local expected"},
          {R"({"model_type": "gpt_neo", "activation_function": "quick_gelu"})",
           "activation_function 'quick_gelu' is not supported"},
          {R"({"model_type": "gpt_neo", "num_layers": 100001})", "num_layers is too large"},
          // Mamba
          {R"({"model_type": "mamba", "d_model": 64})",
           "d_model is 64, but hidden_size, which counts in mamba, is 768"},
          {R"({"model_type": "mamba", "time_step_rank": "some"})",
           "time_step_rank: a whole number"},
          {R"({"model_type": "mamba", "expand": 1e300})", "expand: no width from 1 to 1e9"},
          {R"({"model_type": "mamba2", "time_step_limit": [0.2, 0.1]})",
           "time_step_limit: two numbers"},
          {R"({"model_type": "mamba2", "time_step_limit": [0, NaN]})",
           "time_step_limit: two numbers"},
          {R"({"model_type": "mamba2", "time_step_limit": null})", "time_step_limit: two numbers"},
          {R"({"model_type": "mamba2", "rms_norm": false})", "rms_norm: false is not supported"},
          // the original package
          {R"({"d_model": 64, "ssm_cfg": {"dt_limit": [0.1, 0.2]}})",
           "ssm_cfg.dt_limit' is not a field known for Mamba1"},
          {R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.1]}})",
           "ssm_cfg.dt_limit: two numbers"},
          {R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "norm_before_gate": true}})",
           "ssm_cfg.norm_before_gate: true is not supported, only false"},
          {R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "rmsnorm": false}})",
           "ssm_cfg.rmsnorm: false is not supported"},
          {R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "activation": "relu"}})",
           R"(ssm_cfg.activation: "relu" is not supported, only "silu", "swish")"},
          {R"({"d_model": 64, "ssm_cfg": {"activation": "relu"}})", "ssm_cfg.activation"},
          {R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}})",
           "ssm_cfg.d_ssm is 64, but expand x d_model, which counts in Mamba2, is 128"},
          {R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba3"}})",
           "ssm_cfg.layer 'Mamba3' is not supported"},
          {R"({"d_model": 64, "d_intermediate": 128})", "d_intermediate: 128 is not supported"},
          {R"({"d_model": 64, "attn_layer_idx": [1]})", "attn_layer_idx: [1] is not supported"},
          {R"({"d_model": 64, "rms_norm": false})", "rms_norm: false is not supported"},
      }) {
    CAPTURE(e.config);
    CHECK(holds(config_file(std::string(e.config)).complaint, e.complaint));
  }
}

TEST_CASE("the same model in other words computes the same") {
  struct spelling {
    char const* model;
    std::function<void(json&)> change;
  };
  auto const rope = [](json const& parameters, char const* key) {
    return [=](json& c) {
      c.erase("rope_parameters");
      c[key] = parameters;
    };
  };
  json const old = {{"type", "linear"}, {"factor", 2.5}},
             newer = {{"rope_type", "linear"}, {"factor", 2.5}};
  json full = newer;
  full["partial_rotary_factor"] = 0.5, full["rope_theta"] = 10000;
  for (spelling const& s : {
           spelling{"neox_linear", rope(full, "rope_parameters")},
           {"neox_linear",
            [&](json& c) { rope(old, "rope_parameters")(c), c["rotary_pct"] = 0.5; }},
           {"neox_linear", [&](json& c) { rope(old, "rope_scaling")(c), c["rotary_pct"] = 0.5; }},
           {"neox_linear", [&](json& c) { rope(newer, "rope_scaling")(c), c["rotary_pct"] = 0.5; }},
           {"neox_parallel", [](json& c) { c.erase("rope_parameters"), c["rotary_pct"] = 0.5; }},
           {"neox_parallel", [](json& c) { c["rope_scaling"] = nullptr, c["head_dim"] = 8; }},
           {"neo_windows", [](json& c) { c.erase("attention_types"); }},
           {"neo_windows",
            [](json& c) { c.erase("attention_layers"), c["num_attention_heads"] = 3; }},
           {"mamba_plain",
            [](json& c) { c.erase("intermediate_size"), c["time_step_rank"] = "auto"; }},
           {"mamba2_one_group", [](json& c) { c.erase("time_step_limit"); }},
           {"mamba2_one_group",
            [](json& c) {
              c["time_step_limit"] = {0, "Infinity"};
            }},
       }) {
    CAPTURE(s.model);
    copy_of const model(s.model);
    model.configure(s.change);
    rflow::safetensors_file const file(model.path() / "sites.safetensors");
    auto const meant = run(references / s.model, tokens_of(file));
    for (auto const& [site, x] : run(model.path(), tokens_of(file))) CHECK(x == meant.at(site));
  }
}

TEST_CASE("published files are read") {
  // Field names and values as the hub has them, also those that nobody reads any more.
  for (
      char const* const config : {
          R"({"_name_or_path": "x/Infinity-NaN \" -Infinity", "architectures": ["GPTNeoXForCausalLM"],
               "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 2560,
               "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05,
               "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 32,
               "num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 0.25,
               "tie_word_embeddings": false, "torch_dtype": "float16",
               "transformers_version": "4.24.0", "use_cache": true, "use_parallel_residual": true,
               "vocab_size": 50304, "rope_scaling": null})",
          R"({"architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0,
               "hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "model_type": "gpt_neox"})",
          R"({"activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"],
               "attention_dropout": 0, "attention_layers": ["global", "local"],
               "attention_types": [[["global", "local"], 1]], "embed_dropout": 0,
               "gradient_checkpointing": false, "intermediate_size": null, "model_type": "gpt_neo",
               "num_heads": 16, "num_layers": 2, "resid_dropout": 0, "summary_activation": null,
               "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
               "summary_type": "cls_index", "summary_use_proj": true,
               "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
               "tokenizer_class": "GPT2Tokenizer", "window_size": 256})",
          R"({"conv_kernel": 4, "d_inner": 1536, "d_model": 768, "expand": 2,
               "fused_add_norm": true, "hidden_act": "silu", "hidden_size": 768,
               "intermediate_size": 1536, "model_type": "mamba", "n_layer": 24,
               "num_hidden_layers": 24, "pad_vocab_size_multiple": 8,
               "rescale_prenorm_residual": false, "residual_in_fp32": true, "rms_norm": true,
               "ssm_cfg": {}, "state_size": 16, "time_step_rank": 48, "time_step_scale": 1.0})",
          R"({"chunk_size": 256, "head_dim": 64, "hidden_size": 768, "intermediate_size": 1536,
               "model_type": "mamba2", "n_groups": 1, "norm_before_gate": true, "num_heads": 24,
               "rms_norm": true, "time_step_limit": [0.0, Infinity], "time_step_rank": 48})",
          R"({"d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277,
               "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {},
               "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true,
               "pad_vocab_size_multiple": 16, "tie_embeddings": true})",
          R"({"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": true,
               "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 8})",
          R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, Infinity],
               "d_ssm": null, "conv_init": null, "A_init_range": [1, 16]}})",
      }) {
    CAPTURE(config);
    CHECK(config_file(std::string(config)).complaint == "");
  }
}

TEST_CASE("features of a head that turn") {
  auto const count = [](integer width, double fraction) {
    models::gpt_neox::config const c{.hidden = width, .heads = 1, .rotary_fraction = fraction};
    return std::pair(c.rotary_count(), c.rotary_pairs());
  };
  CHECK(count(10, 0.3) == std::pair<integer, integer>(3, 2));
  CHECK(count(12, 0.25) == std::pair<integer, integer>(3, 2));
  CHECK(count(20, 0.25) == std::pair<integer, integer>(5, 3));
  CHECK(count(100, 0.29) == std::pair<integer, integer>(28, 14));
  CHECK(count(50, 0.58) == std::pair<integer, integer>(28, 14));
  CHECK(count(80, 0.25) == std::pair<integer, integer>(20, 10));
  CHECK(count(7, 0) == std::pair<integer, integer>(0, 0));
  CHECK_THROWS_AS(models::gpt_neox({.hidden = 9, .heads = 1, .rotary_fraction = 1}),
                  std::invalid_argument);
}

TEST_CASE("pickled weights: the message says how to convert them") {
  for (char const* const file : {"pytorch_model.bin", "pytorch_model.bin.index.json"}) {
    copy_of const model("mamba_plain");
    fs::rename(model.path() / "model.safetensors", model.path() / file);
    CHECK(holds(model.complaint(), "only pytorch_model.bin; to convert it"));
    std::string const script = "examples/models/to_safetensors.py";
    CHECK(holds(model.complaint(), script));
    CHECK(fs::exists(fs::path(RFLOW_SOURCE_DIR) / script));
  }
}

TEST_CASE("the original package's vocabulary is padded") {
  auto const rows = [](integer vocabulary, integer multiple) {
    return models::vocabulary_of(config_file(json{{"d_model", 16},
                                                  {"vocab_size", vocabulary},
                                                  {"pad_vocab_size_multiple", multiple}})
                                     .model);
  };
  CHECK(rows(36, 37) == 37);
  CHECK(rows(37, 37) == 37);
  CHECK(rows(38, 37) == 74);
  CHECK(rows(50277, 8) == 50280);
  CHECK(rows(50277, 16) == 50288);
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
