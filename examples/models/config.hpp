// SPDX-License-Identifier: Apache-2.0
#pragma once

// config.json: which architecture, in which size. Every field of the file has a rule below; a field
// without one is an error, because it may change what the model computes.

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>

#include "checkpoint.hpp"
#include "gpt_neo.hpp"
#include "gpt_neox.hpp"
#include "mamba.hpp"
#include "mamba2.hpp"

namespace models {

using architecture = std::variant<gpt_neo::config, gpt_neox::config, mamba::config, mamba2::config>;

// ---- what happens to each field -----------------------------------------------------------------

namespace detail {

enum class effect {
  read,     // it is read
  none,     // the forward pass in fp32 is the same, whatever it says
  fixed,    // only the values given are supported
  repeats,  // it says again what another field says, and has to agree
};

struct rule {
  effect what;
  std::string_view fields;       // names, between spaces
  std::string_view detail = "";  // fixed: a JSON list of values; repeats: the field that counts
};

/// The rules of one object in a file.
struct dictionary {
  std::string_view name;
  std::span<rule const> own;
  std::span<rule const> shared = {};

  rule const* find(std::string_view field) const {
    for (std::span<rule const> const rules : {own, shared})
      for (rule const& r : rules)
        for (std::size_t at = 0; (at = r.fields.find(field, at)) != std::string_view::npos; ++at) {
          std::size_t const end = at + field.size();
          if (!field.empty() && (at == 0 || r.fields[at - 1] == ' ') &&
              (end == r.fields.size() || r.fields[end] == ' '))
            return &r;
        }
    return nullptr;
  }
};

// Sources: the configuration and model classes of transformers 4.44 to 5.24, and mamba_ssm at
// e9594ce.

/// What every model of transformers may have.
inline constexpr rule common_rules[] = {
    {effect::read, "model_type"},
    // how the file came to be, and in which type its tensors are (they say so themselves)
    {effect::none,
     "_name_or_path name_or_path _commit_hash architectures transformers_version dtype torch_dtype "
     "use_bfloat16 torchscript tokenizer_class prefix bos_token_id eos_token_id pad_token_id "
     "sep_token_id decoder_start_token_id"},
    // heads, training, initialisation
    {effect::none,
     "tie_word_embeddings tie_encoder_decoder id2label label2id num_labels problem_type "
     "finetuning_task task_specific_params initializer_range gradient_checkpointing "
     "classifier_dropout tf_legacy_loss"},
    // how the same is computed, and what is returned
    {effect::none,
     "return_dict output_hidden_states output_attentions output_past tie_last_hidden_states "
     "use_cache is_decoder chunk_size_feed_forward attn_implementation _attn_implementation "
     "_attn_implementation_autoset"},
    // generation
    {effect::none,
     "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
     "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
     "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
     "forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length "
     "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups "
     "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
     "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p"},
    {effect::fixed, "is_causal", "[true]"},
    {effect::fixed, "is_encoder_decoder add_cross_attention", "[false]"},
    {effect::fixed, "cross_attention_hidden_size quantization_config", "[null]"},
    {effect::fixed, "pruned_heads per_layer_config auto_map", "[null, {}]"},
};

inline constexpr rule gpt_neo_rules[] = {
    {effect::read,
     "num_layers hidden_size num_heads intermediate_size vocab_size max_position_embeddings "
     "window_size attention_types attention_layers activation_function layer_norm_epsilon"},
    {effect::repeats, "num_hidden_layers", "num_layers"},
    {effect::repeats, "num_attention_heads", "num_heads"},
    {effect::none,
     "attention_dropout embed_dropout resid_dropout summary_activation summary_first_dropout "
     "summary_proj_to_labels summary_type summary_use_proj"},
};

inline constexpr rule gpt_neox_rules[] = {
    {effect::read,
     "num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size "
     "max_position_embeddings use_parallel_residual attention_bias hidden_act layer_norm_eps "
     "rotary_pct rotary_emb_base rope_parameters rope_scaling"},
    {effect::repeats, "num_key_value_heads", "num_attention_heads"},
    {effect::repeats, "head_dim", "hidden_size / num_attention_heads"},
    // Versions of transformers differ in whether these two count.
    {effect::repeats, "partial_rotary_factor", "rotary_pct"},
    {effect::repeats, "rope_theta", "rotary_emb_base"},
    {effect::none,
     "attention_dropout hidden_dropout attention_probs_dropout_prob hidden_dropout_prob"},
};

/// rope_parameters, or the older rope_scaling.
inline constexpr rule rope_rules[] = {
    {effect::read, "rope_type type rope_theta partial_rotary_factor factor"},
    {effect::none, "original_max_position_embeddings"},  // for types that are not supported
};

inline constexpr rule mamba_rules[] = {
    {effect::read,
     "num_hidden_layers hidden_size intermediate_size expand state_size time_step_rank conv_kernel "
     "vocab_size use_conv_bias use_bias layer_norm_epsilon hidden_act"},
    {effect::none,
     "time_step_scale time_step_min time_step_max time_step_floor time_step_init_scheme "
     "residual_in_fp32 use_mambapy use_associative_scan"},
    // An initialisation, but transformers 5 divides weights that it loads by it, too.
    {effect::fixed, "rescale_prenorm_residual", "[false]"},
    // Converted files keep some of the original package's fields.
    {effect::repeats, "d_model", "hidden_size"},
    {effect::repeats, "n_layer", "num_hidden_layers"},
    {effect::repeats, "d_inner", "intermediate_size"},
    {effect::fixed, "rms_norm", "[true]"},
    {effect::fixed, "ssm_cfg", R"([{}, {"layer": "Mamba1"}])"},
    {effect::none, "fused_add_norm pad_vocab_size_multiple tie_embeddings"},
};

inline constexpr rule mamba2_rules[] = {
    {effect::read,
     "num_hidden_layers hidden_size num_heads head_dim expand state_size n_groups conv_kernel "
     "vocab_size use_conv_bias use_bias layer_norm_epsilon time_step_limit hidden_act"},
    {effect::none,
     "time_step_rank time_step_scale time_step_min time_step_max time_step_floor "
     "time_step_init_scheme residual_in_fp32 chunk_size"},
    {effect::fixed, "rescale_prenorm_residual", "[false]"},  // as above
    {effect::none, "norm_before_gate"},  // transformers writes it, and gates first all the same
    {effect::repeats, "d_model", "hidden_size"},
    {effect::repeats, "n_layer", "num_hidden_layers"},
    {effect::repeats, "intermediate_size d_inner", "expand x hidden_size"},
    {effect::fixed, "rms_norm", "[true]"},
    {effect::fixed, "ssm_cfg", R"([{}, {"layer": "Mamba2"}])"},
    {effect::none, "fused_add_norm pad_vocab_size_multiple tie_embeddings"},
};

/// The original package's own configuration.
inline constexpr rule mamba_ssm_rules[] = {
    {effect::read, "d_model n_layer vocab_size pad_vocab_size_multiple ssm_cfg"},
    {effect::fixed, "rms_norm", "[true]"},
    {effect::fixed, "d_intermediate", "[0]"},
    {effect::fixed, "attn_layer_idx", "[[], null]"},
    {effect::none, "attn_cfg"},  // of the layers that attn_layer_idx names
    {effect::none, "residual_in_fp32 fused_add_norm tie_embeddings"},
};

inline constexpr rule ssm_cfg_rules[] = {
    {effect::read, "layer d_state d_conv expand dt_rank conv_bias bias"},
    {effect::fixed, "activation", R"(["silu", "swish"])"},
    {effect::none, "dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path"},
};

inline constexpr rule ssm_cfg2_rules[] = {
    {effect::read, "layer d_state d_conv expand headdim ngroups dt_limit conv_bias bias"},
    {effect::repeats, "d_ssm", "expand x d_model"},
    {effect::fixed, "activation", R"(["silu", "swish"])"},
    {effect::fixed, "rmsnorm", "[true]"},
    {effect::fixed, "norm_before_gate D_has_hdim learnable_init_states", "[false]"},
    {effect::fixed, "process_group", "[null]"},
    {effect::none,
     "conv_init A_init_range dt_min dt_max dt_init_floor chunk_size use_mem_eff_path "
     "sequence_parallel"},
};

inline constexpr dictionary gpt_neo_fields{"gpt_neo", gpt_neo_rules, common_rules},
    gpt_neox_fields{"gpt_neox", gpt_neox_rules, common_rules},
    rope_fields{"the rotation", rope_rules}, mamba_fields{"mamba", mamba_rules, common_rules},
    mamba2_fields{"mamba2", mamba2_rules, common_rules},
    mamba_ssm_fields{"mamba_ssm", mamba_ssm_rules, common_rules},
    ssm_cfg_fields{"Mamba1", ssm_cfg_rules}, ssm_cfg2_fields{"Mamba2", ssm_cfg2_rules};

// ---- reading fields -----------------------------------------------------------------------------

/// Python's JSON has Infinity and NaN; here they become objects, as newer versions of transformers
/// write them: {"__float__": "Infinity"}.
inline std::string without_bare_floats(std::string_view text) {
  std::string out;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (quoted && text[i] == '\\' && i + 1 < text.size()) {
      out += text[i++];
    } else if (text[i] == '"') {
      quoted = !quoted;
    } else if (!quoted) {
      bool found = false;
      for (std::string_view const word : {"Infinity", "-Infinity", "NaN"})
        if (!found && text.substr(i, word.size()) == word) {
          out += R"({"__float__": ")" + std::string(word) + "\"}";
          i += word.size() - 1;
          found = true;
        }
      if (found) continue;
    }
    out += text[i];
  }
  return out;
}

/// Reads fields of an object, each with the value that its absence means.
class fields {
 public:
  fields(std::filesystem::path const& file, nlohmann::json const& values, dictionary const& known,
         std::string const& prefix = "")
      : file_(file), values_(values), known_(known), prefix_(prefix) {}

  [[noreturn]] void fail(std::string const& why) const { throw unusable_checkpoint(file_, why); }
  std::string name(std::string_view key) const { return prefix_ + std::string(key); }

  /// The field, or null where it is absent.
  nlohmann::json const* find(std::string_view key) const {
    rule const* const r = known_.find(key);
    if (r == nullptr || (r->what != effect::read && r->what != effect::repeats))
      throw std::logic_error("no rule says that " + name(key) + " is read");
    auto const found = values_.find(key);
    return found == values_.end() ? nullptr : &*found;
  }
  /// The same, but a JSON null is as good as none.
  nlohmann::json const* given(std::string_view key) const {
    nlohmann::json const* const x = find(key);
    return x == nullptr || x->is_null() ? nullptr : x;
  }

  integer count(std::string_view key, integer absent, double most = 1e9) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_number_integer() || x->get<double>() < 1) fail(name(key) + ": " + whole);
    if (x->get<double>() > most) fail(name(key) + " is too large: " + show(*x));
    return x->get<integer>();
  }
  double real(std::string_view key, double absent) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_number()) fail(name(key) + ": a number expected");
    return x->get<double>();
  }
  float epsilon(std::string_view key) const {
    double const x = real(key, 1e-5);
    if (!(x >= 0)) fail(name(key) + ": a number that is not negative expected");
    return static_cast<float>(x);
  }
  double positive(std::string_view key, double absent) const {
    double const x = real(key, absent);
    if (!(x > 0)) fail(name(key) + ": a number above 0 expected");
    return x;
  }
  bool flag(std::string_view key, bool absent) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_boolean()) fail(name(key) + ": true or false expected");
    return x->get<bool>();
  }
  std::string word(std::string_view key, std::string const& absent) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return absent;
    if (!x->is_string()) fail(name(key) + ": a string expected");
    return x->get<std::string>();
  }
  /// The object under the key; empty where there is none.
  fields inside(std::string_view key, dictionary const& known) const {
    nlohmann::json const* const x = given(key);
    static nlohmann::json const empty = nlohmann::json::object();
    if (x != nullptr && !x->is_object()) fail(name(key) + ": an object expected");
    return fields(file_, x == nullptr ? empty : *x, known, name(key) + ".");
  }
  [[noreturn]] void unsupported(std::string_view key, std::string const& value) const {
    fail(name(key) + " '" + rflow::detail::printable(value) + "' is not supported");
  }
  activation act(std::string_view key, std::string const& absent) const {
    std::string const f = word(key, absent);
    if (f == "gelu" || f == "gelu_python") return activation::gelu_erf;
    for (char const* const same :
         {"gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"})
      if (f == same) return activation::gelu_tanh;
    unsupported(key, f);
  }
  void silu(std::string_view key) const {
    if (std::string const f = word(key, "silu"); f != "silu" && f != "swish") unsupported(key, f);
  }
  /// Bounds of a step: two numbers, of which Python may have written the infinite ones by name.
  void bounds(std::string_view key, float& least, float& most) const {
    nlohmann::json const* const x = find(key);
    if (x == nullptr) return;
    auto const bound = [](nlohmann::json const& b) {
      if (b.is_number()) return b.get<double>();
      bool const tagged = b.is_object() && b.size() == 1 && b.contains("__float__");
      nlohmann::json const& text = tagged ? b["__float__"] : b;
      constexpr double infinity = std::numeric_limits<double>::infinity();
      return text == "Infinity"    ? infinity
             : text == "-Infinity" ? -infinity
                                   : std::numeric_limits<double>::quiet_NaN();
    };
    if (x->is_array() && x->size() == 2) {
      double const low = bound((*x)[0]), high = bound((*x)[1]);
      if (low <= high) {
        least = static_cast<float>(low), most = static_cast<float>(high);
        return;
      }
    }
    fail(name(key) + ": two numbers expected, the smaller one first");
  }
  /// Width of a block that is `expand` times as wide as the residual stream.
  integer expanded(std::string_view key, integer hidden) const {
    double const width = std::floor(real(key, 2) * static_cast<double>(hidden));
    if (!(width >= 1 && width <= 1e9)) fail(name(key) + ": no width from 1 to 1e9");
    return static_cast<integer>(width);
  }
  void divides(integer part, integer whole_number, std::string_view key) const {
    if (whole_number % part != 0)
      fail(name(key) + ": " + std::to_string(part) + " does not divide " +
           std::to_string(whole_number));
  }
  /// Checks a field that says again what `used` says.
  void repeats(std::string_view key, double used) const {
    nlohmann::json const* const x = given(key);
    if (x == nullptr || (x->is_number() && x->get<double>() == used)) return;
    fail(name(key) + " is " + show(*x) + ", but " + std::string(known_.find(key)->detail) +
         ", which counts in " + std::string(known_.name) + ", is " + show(used));
  }
  void repeats(std::string_view key, integer used) const {
    repeats(key, static_cast<double>(used));
  }

  /// Checks the fields that are not read. To be called last: what is wrong with a field that is
  /// read says more.
  void check() const {
    for (auto const& entry : values_.items()) {  // clang 14 captures no structured binding
      std::string const& key = entry.key();
      nlohmann::json const& value = entry.value();
      rule const* const r = known_.find(key);
      if (r == nullptr)
        fail("'" + rflow::detail::printable(name(key)) + "' is not a field known for " +
             std::string(known_.name) +
             "; it may change what the model computes (if it does not, remove it)");
      if (r->what != effect::fixed) continue;
      nlohmann::json const supported = nlohmann::json::parse(r->detail);
      if (std::none_of(supported.begin(), supported.end(),
                       [&](nlohmann::json const& x) { return x == value; }))
        fail(name(key) + ": " + show(value) + " is not supported, only " +
             std::string(r->detail.substr(1, r->detail.size() - 2)));
    }
  }

 private:
  static constexpr char const* whole = "a whole number above 0 expected";
  static std::string show(nlohmann::json const& x) {
    if (x.is_number_float() && x.get<double>() == std::floor(x.get<double>()) &&
        std::abs(x.get<double>()) < 1e15)
      return std::to_string(static_cast<std::int64_t>(x.get<double>()));
    return rflow::detail::printable(
        x.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }

  std::filesystem::path file_;
  nlohmann::json const& values_;
  dictionary const& known_;
  std::string prefix_;
};

// ---- the families -------------------------------------------------------------------------------

inline constexpr double most_layers = 100000;

/// Which layers have a window: [[["global", "local"], 16]] is a list of kinds and how often it
/// repeats; attention_layers is the same, written out.
inline std::vector<bool> read_windows(fields const& f, integer layers) {
  std::vector<bool> out;
  auto const add = [&](std::string_view key, nlohmann::json const& kinds) {
    if (!kinds.is_array()) f.fail(f.name(key) + ": a list of kinds expected");
    for (auto const& kind : kinds) {
      if (kind != "global" && kind != "local") f.fail(f.name(key) + ": global or local expected");
      out.push_back(kind == "local");
    }
  };
  auto const complete = [&](std::string_view key) {
    if (static_cast<integer>(out.size()) != layers)
      f.fail(f.name(key) + " does not describe " + std::to_string(layers) + " layers");
  };
  nlohmann::json const *const types = f.given("attention_types"), *const list =
                                                                      f.given("attention_layers");
  if (types != nullptr) {
    if (!types->is_array()) f.fail("attention_types: a list expected");
    for (auto const& group : *types) {
      if (!group.is_array() || group.size() != 2 || !group[1].is_number_unsigned() ||
          group[1] > most_layers)
        f.fail("attention_types: pairs of kinds and a number expected");
      for (int i = 0; i < group[1].get<int>() && static_cast<integer>(out.size()) <= layers; ++i)
        add("attention_types", group[0]);
    }
    complete("attention_types");
  }
  if (list != nullptr) {
    std::vector<bool> const before = std::exchange(out, {});
    add("attention_layers", *list);
    complete("attention_layers");
    if (types != nullptr && out != before) f.fail("attention_layers and attention_types disagree");
  }
  if (types == nullptr && list == nullptr) {
    if (layers != 24)
      f.fail("attention_types: missing (the default describes 24 layers, not " +
             std::to_string(layers) + ")");
    for (integer i = 0; i < layers; ++i) out.push_back(i % 2 == 1);
  }
  return out;
}

inline gpt_neo::config read_gpt_neo(fields const& f) {
  gpt_neo::config c;
  c.layers = f.count("num_layers", 24, most_layers);
  c.hidden = f.count("hidden_size", 2048);
  c.heads = f.count("num_heads", 16);
  f.repeats("num_hidden_layers", c.layers);
  f.repeats("num_attention_heads", c.heads);
  c.inner = f.given("intermediate_size") ? f.count("intermediate_size", 0) : 4 * c.hidden;
  c.vocabulary = f.count("vocab_size", 50257);
  c.positions = f.count("max_position_embeddings", 2048);
  c.window = f.count("window_size", 256);
  c.act = f.act("activation_function", "gelu_new");
  c.epsilon = f.epsilon("layer_norm_epsilon");
  f.divides(c.heads, c.hidden, "num_heads");
  c.local = read_windows(f, c.layers);
  f.check();
  return c;
}

/// The rotation: a fraction of each head, a base, and a factor by which positions are closer.
inline void read_rotation(fields const& f, gpt_neox::config& c) {
  auto const filled = [&](char const* key) {
    nlohmann::json const* const x = f.given(key);
    return x != nullptr && !x->empty() ? x : nullptr;
  };
  nlohmann::json const *const older = filled("rope_scaling"), *const newer =
                                                                  filled("rope_parameters");
  if (older != nullptr && newer != nullptr && *older != *newer)
    f.fail("rope_scaling and rope_parameters disagree");
  fields const rope = f.inside(older != nullptr ? "rope_scaling" : "rope_parameters", rope_fields);
  if (older != nullptr) f.inside("rope_parameters", rope_fields);

  double const fraction = f.real("rotary_pct", 0.25), base = f.real("rotary_emb_base", 10000);
  c.rotary_fraction = rope.real("partial_rotary_factor", fraction);
  double const used = rope.real("rope_theta", base);
  c.rotary_base = static_cast<float>(used);
  f.repeats("partial_rotary_factor", c.rotary_fraction);
  f.repeats("rope_theta", used);

  std::string const type = rope.word("type", "default"), kind = rope.word("rope_type", type);
  if (rope.find("type") != nullptr && type != kind)
    rope.fail(rope.name("rope_type") + " and " + rope.name("type") + " disagree");
  if (kind == "linear") {
    if (rope.find("factor") == nullptr) rope.fail(rope.name("factor") + " is missing");
    c.rotary_factor = static_cast<float>(rope.positive("factor", 1));
  } else if (kind != "default") {
    rope.unsupported("rope_type", kind);
  } else if (rope.find("factor") != nullptr) {
    rope.fail(rope.name("factor") + " without a rope_type that has one");
  }
  rope.check();
  if (!(c.rotary_fraction >= 0 && c.rotary_fraction <= 1) ||
      !(c.rotary_base > 0 && std::isfinite(c.rotary_base)))
    f.fail("the rotary fraction or base is out of range");
  if (2 * c.rotary_pairs() > c.width())
    f.fail("an odd number of features of a head, " + std::to_string(c.rotary_count()) +
           ", has no pair for the last one to turn with");
}

inline gpt_neox::config read_gpt_neox(fields const& f) {
  gpt_neox::config c;
  c.layers = f.count("num_hidden_layers", 44, most_layers);
  c.hidden = f.count("hidden_size", 6144);
  c.heads = f.count("num_attention_heads", 64);
  f.divides(c.heads, c.hidden, "num_attention_heads");
  f.repeats("num_key_value_heads", c.heads);
  f.repeats("head_dim", c.width());
  c.inner = f.count("intermediate_size", 24576);
  c.vocabulary = f.count("vocab_size", 50432);
  c.positions = f.count("max_position_embeddings", 2048);
  read_rotation(f, c);
  c.parallel = f.flag("use_parallel_residual", true);
  c.attention_bias = f.flag("attention_bias", true);
  c.act = f.act("hidden_act", "gelu");
  c.epsilon = f.epsilon("layer_norm_eps");
  f.check();
  return c;
}

/// Mamba's rank of Δ: a number, or "auto".
inline integer read_rank(fields const& f, std::string_view key, integer hidden) {
  nlohmann::json const* const rank = f.find(key);
  return rank != nullptr && *rank != "auto" ? f.count(key, 1) : (hidden + 15) / 16;
}

inline mamba::config read_mamba(fields const& f) {
  mamba::config c;
  c.layers = f.count("num_hidden_layers", 32, most_layers);
  c.hidden = f.count("hidden_size", 768);
  c.inner = f.expanded("expand", c.hidden);
  c.inner = f.count("intermediate_size", c.inner);
  c.state = f.count("state_size", 16);
  c.rank = read_rank(f, "time_step_rank", c.hidden);
  c.kernel = f.count("conv_kernel", 4);
  c.vocabulary = f.count("vocab_size", 50280);
  c.convolution_bias = f.flag("use_conv_bias", true);
  c.bias = f.flag("use_bias", false);
  c.epsilon = f.epsilon("layer_norm_epsilon");
  f.silu("hidden_act");
  f.repeats("d_model", c.hidden);
  f.repeats("n_layer", c.layers);
  f.repeats("d_inner", c.inner);
  f.check();
  return c;
}

inline mamba2::config read_mamba2(fields const& f) {
  mamba2::config c;
  c.layers = f.count("num_hidden_layers", 64, most_layers);
  c.hidden = f.count("hidden_size", 4096);
  c.heads = f.count("num_heads", 128);
  c.width = f.count("head_dim", 64);
  c.state = f.count("state_size", 128);
  c.groups = f.count("n_groups", 8);
  c.kernel = f.count("conv_kernel", 4);
  c.vocabulary = f.count("vocab_size", 32768);
  c.convolution_bias = f.flag("use_conv_bias", true);
  c.bias = f.flag("use_bias", false);
  c.epsilon = f.epsilon("layer_norm_epsilon");
  f.bounds("time_step_limit", c.least_step, c.most_step);
  f.silu("hidden_act");
  f.divides(c.groups, c.heads, "n_groups");
  if (c.inner() != f.expanded("expand", c.hidden))
    f.fail("num_heads x head_dim is not expand x hidden_size");
  f.repeats("d_model", c.hidden);
  f.repeats("n_layer", c.layers);
  f.repeats("intermediate_size", c.inner());
  f.repeats("d_inner", c.inner());
  f.check();
  return c;
}

/// The configuration that the original Mamba package writes.
inline architecture read_mamba_ssm(fields const& f) {
  integer const multiple = f.count("pad_vocab_size_multiple", 8);
  integer const vocabulary = (f.count("vocab_size", 50277) + multiple - 1) / multiple * multiple;
  integer const hidden = f.count("d_model", 2560), layers = f.count("n_layer", 64, most_layers);
  std::string const layer = f.inside("ssm_cfg", ssm_cfg_fields).word("layer", "Mamba1");
  if (layer == "Mamba1") {
    fields const inner = f.inside("ssm_cfg", ssm_cfg_fields);
    mamba::config c;
    c.layers = layers;
    c.hidden = hidden;
    c.inner = inner.expanded("expand", hidden);
    c.state = inner.count("d_state", 16);
    c.rank = read_rank(inner, "dt_rank", hidden);
    c.kernel = inner.count("d_conv", 4);
    c.vocabulary = vocabulary;
    c.convolution_bias = inner.flag("conv_bias", true);
    c.bias = inner.flag("bias", false);
    inner.check();
    f.check();
    return c;
  }
  fields const inner = f.inside("ssm_cfg", ssm_cfg2_fields);
  if (layer != "Mamba2") inner.unsupported("layer", layer);
  mamba2::config c;
  c.layers = layers;
  c.hidden = hidden;
  c.width = inner.count("headdim", 64);
  integer const width = inner.expanded("expand", hidden);
  inner.divides(c.width, width, "headdim");
  inner.repeats("d_ssm", width);
  c.heads = width / c.width;
  c.state = inner.count("d_state", 128);
  c.groups = inner.count("ngroups", 1);
  c.kernel = inner.count("d_conv", 4);
  c.vocabulary = vocabulary;
  c.convolution_bias = inner.flag("conv_bias", true);
  c.bias = inner.flag("bias", false);
  inner.bounds("dt_limit", c.least_step, c.most_step);
  inner.divides(c.groups, c.heads, "ngroups");
  inner.check();
  f.check();
  return c;
}

}  // namespace detail

/// Reads a config.json of transformers, or of the package mamba_ssm.
/// @throws unusable_checkpoint naming the field that is wrong, unsupported or not known
inline architecture read_config(std::filesystem::path const& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw unusable_checkpoint(path, "cannot be opened");
  std::string const text{std::istreambuf_iterator<char>(in), {}};
  nlohmann::json const values =
      nlohmann::json::parse(detail::without_bare_floats(text), nullptr, false);
  if (!values.is_object()) throw unusable_checkpoint(path, "not a JSON object");
  auto const as = [&](detail::dictionary const& known) {
    return detail::fields(path, values, known);
  };
  detail::fields const f = as(detail::mamba_ssm_fields);
  std::string const type = f.word("model_type", "");
  if (type == "gpt_neo") return detail::read_gpt_neo(as(detail::gpt_neo_fields));
  if (type == "gpt_neox") return detail::read_gpt_neox(as(detail::gpt_neox_fields));
  if (type == "mamba") return detail::read_mamba(as(detail::mamba_fields));
  if (type == "mamba2") return detail::read_mamba2(as(detail::mamba2_fields));
  if (type.empty() && f.find("d_model") != nullptr) return detail::read_mamba_ssm(f);
  f.fail(type.empty() ? "no model_type in it"
                      : "model_type '" + rflow::detail::printable(type) +
                            "' is not gpt_neo, gpt_neox, mamba or mamba2");
}

}  // namespace models
