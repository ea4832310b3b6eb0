// SPDX-License-Identifier: Apache-2.0
#pragma once

// The four architectures behind one function: a configuration, a weight source, tokens, and a
// listener that is called with each site.
//
//     models::architecture model = models::read_config("pythia-2.8b/config.json");
//     models::checkpoint weights("pythia-2.8b");
//     models::require(model, weights);
//     models::forward(model, weights, tokens, {.threads = 2}, [](models::site const& s, auto x) {…});
//
// One block's weights are in memory at a time.

#include <rflow/view.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "checkpoint.hpp"
#include "gpt_neo.hpp"
#include "gpt_neox.hpp"
#include "layers.hpp"
#include "mamba.hpp"
#include "mamba2.hpp"
#include "weights.hpp"

namespace models {

using architecture = std::variant<gpt_neo::config, gpt_neox::config, mamba::config, mamba2::config>;

namespace detail {

inline gpt_neo build(gpt_neo::config const& c) { return gpt_neo(c); }
inline gpt_neox build(gpt_neox::config const& c) { return gpt_neox(c); }
inline mamba build(mamba::config const& c) { return mamba(c); }
inline mamba2 build(mamba2::config const& c) { return mamba2(c); }

}  // namespace detail

/// Calls f with a model of this architecture.
template <class F>
auto with_model(architecture const& a, F&& f) {
  return std::visit(
      [&](auto const& config) {
        auto model = detail::build(config);
        return f(model);
      },
      a);
}

inline std::string name_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return std::string(m.name); });
}
inline integer blocks_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return m.layers(); });
}
inline integer hidden_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return m.hidden(); });
}
inline integer vocabulary_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return m.vocabulary(); });
}

/// Every parameter, in the order in which a forward pass needs them; the head last but optional.
inline std::vector<parameter> parameters(architecture const& a) {
  return with_model(a, [](auto& m) {
    std::vector<parameter> out;
    m.outer(lister(out));
    for (integer i = 0; i < m.layers(); ++i) m.block(i, lister(out));
    return out;
  });
}

/// Weights of all blocks: what every token is multiplied with.
inline double block_parameters(architecture const& a) {
  return with_model(a, [](auto& m) {
    std::vector<parameter> all;
    for (integer i = 0; i < m.layers(); ++i) m.block(i, lister(all));
    double count = 0;
    for (parameter const& p : all) count += static_cast<double>(p.size());
    return count;
  });
}

/// Checks a checkpoint against an architecture.
/// @throws unusable_checkpoint naming the tensor that is missing, extra, misshaped or of another type
inline void require(architecture const& a, checkpoint& weights) {
  with_model(a, [&](auto const& m) {
    weights.require(parameters(a), [&](std::string const& name) { return m.ignored(name); });
  });
}

// ---- config.json --------------------------------------------------------------------------------

namespace detail {

/// Reads fields of a config.json, each with the value that its absence means.
class fields {
 public:
  fields(std::filesystem::path const& file, nlohmann::json const& values)
      : file_(file), values_(values) {}

  [[noreturn]] void fail(std::string const& why) const { throw unusable_checkpoint(file_, why); }
  nlohmann::json const* find(char const* key) const {
    auto const found = values_.find(key);
    return found == values_.end() || found->is_null() ? nullptr : &*found;
  }
  integer count(char const* key, integer absent) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_number_integer() || x->get<double>() < 1 || x->get<double>() > 1e9)
      fail(std::string(key) + ": a whole number above 0 expected");
    return x->get<integer>();
  }
  float real(char const* key, float absent) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_number()) fail(std::string(key) + ": a number expected");
    return x->get<float>();
  }
  bool flag(char const* key, bool absent) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_boolean()) fail(std::string(key) + ": true or false expected");
    return x->get<bool>();
  }
  std::string word(char const* key, std::string const& absent) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_string()) fail(std::string(key) + ": a string expected");
    return x->get<std::string>();
  }
  fields inside(char const* key) const {
    nlohmann::json const* const x = find(key);
    static nlohmann::json const empty = nlohmann::json::object();
    if (x != nullptr && !x->is_object()) fail(std::string(key) + ": an object expected");
    return fields(file_, x == nullptr ? empty : *x);
  }
  activation act(char const* key, std::string const& absent) const {
    std::string const name = word(key, absent);
    if (name == "gelu") return activation::gelu_erf;
    if (name == "gelu_new" || name == "gelu_pytorch_tanh") return activation::gelu_tanh;
    fail(std::string(key) + " '" + rflow::detail::printable(name) + "' is not supported");
  }
  void divides(integer part, integer whole, char const* what) const {
    if (whole % part != 0)
      fail(std::string(what) + ": " + std::to_string(part) + " does not divide " +
           std::to_string(whole));
  }

 private:
  std::filesystem::path file_;
  nlohmann::json const& values_;
};

inline gpt_neo::config read_gpt_neo(fields const& f) {
  gpt_neo::config c;
  c.layers = f.count("num_layers", 24);
  c.hidden = f.count("hidden_size", 2048);
  c.heads = f.count("num_heads", 16);
  c.inner = f.count("intermediate_size", 4 * c.hidden);
  c.vocabulary = f.count("vocab_size", 50257);
  c.positions = f.count("max_position_embeddings", 2048);
  c.window = f.count("window_size", 256);
  c.act = f.act("activation_function", "gelu_new");
  c.epsilon = f.real("layer_norm_epsilon", 1e-5f);
  f.divides(c.heads, c.hidden, "num_heads");
  nlohmann::json const* const types = f.find("attention_types");
  if (types == nullptr) return c;
  // [[["global", "local"], 16]]: a list of kinds, and how often it repeats
  bool good = types->is_array();
  for (auto const& group : *types) {
    good = good && group.is_array() && group.size() == 2 && group[0].is_array() &&
           group[1].is_number_unsigned() && group[1] <= 100000;
    if (!good) break;
    for (int i = 0; i < group[1].get<int>(); ++i)
      for (auto const& kind : group[0]) {
        if (kind != "global" && kind != "local")
          f.fail("attention_types: global or local expected");
        c.local.push_back(kind == "local");
      }
  }
  if (!good || static_cast<integer>(c.local.size()) != c.layers)
    f.fail("attention_types do not describe " + std::to_string(c.layers) + " layers");
  return c;
}

inline gpt_neox::config read_gpt_neox(fields const& f) {
  gpt_neox::config c;
  c.layers = f.count("num_hidden_layers", 44);
  c.hidden = f.count("hidden_size", 6144);
  c.heads = f.count("num_attention_heads", 64);
  c.inner = f.count("intermediate_size", 24576);
  c.vocabulary = f.count("vocab_size", 50432);
  c.positions = f.count("max_position_embeddings", 2048);
  // Newer files keep the rotation's parameters together.
  fields const rope = f.inside("rope_parameters");
  c.rotary_fraction = rope.real("partial_rotary_factor", f.real("rotary_pct", 0.25f));
  c.rotary_base = rope.real("rope_theta", f.real("rotary_emb_base", 10000));
  if (std::string const type = rope.word("rope_type", "default"); type != "default")
    f.fail("rope_type '" + rflow::detail::printable(type) + "' is not supported");
  if (f.find("rope_scaling") != nullptr) f.fail("rope_scaling is not supported");
  if (!(c.rotary_fraction >= 0 && c.rotary_fraction <= 1) || !(c.rotary_base > 0))
    f.fail("the rotary fraction or base is out of range");
  c.parallel = f.flag("use_parallel_residual", true);
  c.attention_bias = f.flag("attention_bias", true);
  c.act = f.act("hidden_act", "gelu");
  c.epsilon = f.real("layer_norm_eps", 1e-5f);
  f.divides(c.heads, c.hidden, "num_attention_heads");
  return c;
}

inline void require_silu(fields const& f) {
  if (std::string const name = f.word("hidden_act", "silu"); name != "silu" && name != "swish")
    f.fail("hidden_act '" + rflow::detail::printable(name) + "' is not supported");
}

inline mamba::config read_mamba(fields const& f) {
  mamba::config c;
  c.layers = f.count("num_hidden_layers", 32);
  c.hidden = f.count("hidden_size", 768);
  c.inner = f.count("intermediate_size", f.count("expand", 2) * c.hidden);
  c.state = f.count("state_size", 16);
  nlohmann::json const* const rank = f.find("time_step_rank");
  c.rank = rank == nullptr || *rank == "auto" ? (c.hidden + 15) / 16 : f.count("time_step_rank", 1);
  c.kernel = f.count("conv_kernel", 4);
  c.vocabulary = f.count("vocab_size", 50280);
  c.convolution_bias = f.flag("use_conv_bias", true);
  c.bias = f.flag("use_bias", false);
  c.epsilon = f.real("layer_norm_epsilon", 1e-5f);
  require_silu(f);
  return c;
}

inline mamba2::config read_mamba2(fields const& f) {
  mamba2::config c;
  c.layers = f.count("num_hidden_layers", 64);
  c.hidden = f.count("hidden_size", 4096);
  c.heads = f.count("num_heads", 128);
  c.width = f.count("head_dim", 64);
  c.state = f.count("state_size", 128);
  c.groups = f.count("n_groups", 8);
  c.kernel = f.count("conv_kernel", 4);
  c.vocabulary = f.count("vocab_size", 32768);
  c.convolution_bias = f.flag("use_conv_bias", true);
  c.bias = f.flag("use_bias", false);
  c.epsilon = f.real("layer_norm_epsilon", 1e-5f);
  // Infinity is no JSON; Python writes it all the same, or as a string.
  if (nlohmann::json const* const limit = f.find("time_step_limit");
      limit != nullptr && limit->is_array() && limit->size() == 2) {
    if ((*limit)[0].is_number()) c.least_step = (*limit)[0].get<float>();
    if ((*limit)[1].is_number()) c.most_step = (*limit)[1].get<float>();
  }
  require_silu(f);
  f.divides(c.groups, c.heads, "n_groups");
  if (c.inner() != f.count("expand", 2) * c.hidden)
    f.fail("num_heads x head_dim is not expand x hidden_size");
  return c;
}

/// The configuration that the original Mamba package writes.
inline architecture read_mamba_ssm(fields const& f) {
  fields const inner = f.inside("ssm_cfg");
  integer const multiple = f.count("pad_vocab_size_multiple", 8);
  integer const vocabulary = (f.count("vocab_size", 50277) + multiple - 1) / multiple * multiple;
  integer const hidden = f.count("d_model", 2560);
  if (!f.flag("rms_norm", true)) f.fail("rms_norm false is not supported");
  std::string const layer = inner.word("layer", "Mamba1");
  if (layer == "Mamba1") {
    mamba::config c;
    c.layers = f.count("n_layer", 64);
    c.hidden = hidden;
    c.inner = inner.count("expand", 2) * hidden;
    c.state = inner.count("d_state", 16);
    c.rank = (hidden + 15) / 16;
    if (nlohmann::json const* const rank = inner.find("dt_rank"); rank && *rank != "auto")
      c.rank = inner.count("dt_rank", 1);
    c.kernel = inner.count("d_conv", 4);
    c.vocabulary = vocabulary;
    return c;
  }
  if (layer != "Mamba2")
    f.fail("ssm_cfg.layer '" + rflow::detail::printable(layer) + "' is not supported");
  mamba2::config c;
  c.layers = f.count("n_layer", 64);
  c.hidden = hidden;
  c.width = inner.count("headdim", 64);
  f.divides(c.width, inner.count("expand", 2) * hidden, "ssm_cfg.headdim");
  c.heads = inner.count("expand", 2) * hidden / c.width;
  c.state = inner.count("d_state", 128);
  c.groups = inner.count("ngroups", 1);
  c.kernel = inner.count("d_conv", 4);
  c.vocabulary = vocabulary;
  f.divides(c.groups, c.heads, "ssm_cfg.ngroups");
  return c;
}

}  // namespace detail

/// @throws unusable_checkpoint if the file says nothing, or nothing that is known here
inline architecture read_config(std::filesystem::path const& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw unusable_checkpoint(path, "cannot be opened");
  std::string text{std::istreambuf_iterator<char>(in), {}};
  for (std::size_t at = 0; (at = text.find("Infinity", at)) != std::string::npos;)
    if (at > 0 && text[at - 1] != '"' && text[at - 1] != '-')
      text.replace(at, 8, "null");  // Python's JSON has it
    else
      at += 8;
  nlohmann::json const values = nlohmann::json::parse(text, nullptr, false);
  if (!values.is_object()) throw unusable_checkpoint(path, "not a JSON object");
  detail::fields const f(path, values);
  std::string const type = f.word("model_type", "");
  if (type == "gpt_neo") return detail::read_gpt_neo(f);
  if (type == "gpt_neox") return detail::read_gpt_neox(f);
  if (type == "mamba") return detail::read_mamba(f);
  if (type == "mamba2") return detail::read_mamba2(f);
  if (type.empty() && f.find("d_model") != nullptr) return detail::read_mamba_ssm(f);
  f.fail(type.empty() ? "no model_type in it"
                      : "model_type '" + rflow::detail::printable(type) +
                            "' is not gpt_neo, gpt_neox, mamba or mamba2");
}

// ---- the forward pass ---------------------------------------------------------------------------

struct site {
  integer index;   // 0: embed; 1 … blocks: block.i, raw; blocks + 1: final_norm
  integer blocks;  // of the model

  bool is_final_norm() const { return index > blocks; }
  std::string name() const {
    return index == 0 ? "embed" : is_final_norm() ? "final_norm" : "block." + std::to_string(index);
  }
};

struct forward_options {
  team& threads;
  controls control{};
};

/// Where the time of a forward pass went, in seconds.
struct timing {
  double weights = 0, blocks = 0;
};

/// Runs the model and calls listen(site, view<float>) with the residual stream of all tokens; the
/// view is valid during the call.
/// @throws std::invalid_argument naming the token if an id is not in the vocabulary or a sequence
///         is longer than the model has positions; what the source throws
template <class Listen>
timing forward(architecture const& a, weight_source const& source, batch const& tokens,
               forward_options const& how, Listen&& listen) {
  timing spent;
  with_model(a, [&](auto& model) {
    if (tokens.tokens() == 0) rflow::detail::reject("models::forward", "no tokens");
    for (integer t = 0; t < tokens.tokens(); ++t)
      if (std::int64_t const id = tokens.ids[static_cast<std::size_t>(t)];
          id < 0 || id >= model.vocabulary())
        rflow::detail::reject("models::forward", "token " + std::to_string(t) + " has the id " +
                                                     std::to_string(id) + "; the vocabulary has " +
                                                     std::to_string(model.vocabulary()));
    if (model.positions() > 0 && tokens.longest() > model.positions())
      rflow::detail::reject("models::forward", "a sequence of " + std::to_string(tokens.longest()) +
                                                   " tokens; the model has " +
                                                   std::to_string(model.positions()) +
                                                   " positions");

    auto const now = [] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
          .count();
    };
    run const r{how.threads, tokens, tokens.positions(), how.control};
    loader const load(how.threads, source);
    integer const blocks = model.layers();
    matrix h(tokens.tokens(), model.hidden());
    auto const tell = [&](integer index, matrix const& x) {
      listen(site{index, blocks}, rflow::view<float>(x.data(), x.rows(), x.cols()));
    };
    model.embed(r, source, h);
    if (how.control.embedding_scale != 1) h *= how.control.embedding_scale;
    tell(0, h);
    for (integer i = 0; i < blocks; ++i) {
      double const t0 = now();
      model.block(i, load);
      double const t1 = now();
      model.apply(i, r, h);
      spent.weights += t1 - t0;
      spent.blocks += now() - t1;
      tell(i + 1, h);
    }
    model.outer(load);
    matrix last;
    model.final_norm(r, h, last);
    tell(blocks + 1, last);
  });
  return spent;
}

}  // namespace models
