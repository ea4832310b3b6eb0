// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the sites of a model are called in files: a table of the names that tools write, and the
// rules that give each tensor one role. It looks at names only; sites.hpp opens what they name.

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <rflow/file.hpp>

namespace rflow {

/// What a list of states ends with.
enum class list_end : std::uint8_t { unsaid, block, norm };

/// How sites are called in a file, as far as the user says; what is left out is recognised.
struct site_pattern {
  std::optional<std::string> embed = {};  ///< output of the embedding; empty text: there is none
  std::string block = {};                 ///< raw output of a block; "{}" is its number
  std::optional<std::string> final_norm = {};      ///< output of the last norm; empty text: none
  std::optional<std::ptrdiff_t> first_block = {};  ///< number of the first block
  list_end last = list_end::unsaid;  ///< norm: the last of a list is taken for the final norm
  /// Order of the axes, a letter each: s sites, b batch, t tokens, h hidden. With s one array holds
  /// all sites. Empty: (b)th for an array a site, s(b)th for one array.
  std::string axes = {};
  std::string array = {};  ///< the array of all sites, where a file has several
  bool subset = false;     ///< blocks may be left out, in any way
  bool own_names = false;  ///< only rflow's own names and what is said above are taken
};

/// What is wrong with the names or axes of a file, or unclear.
enum class site_fault : std::uint8_t {
  bad_pattern,     ///< a block pattern without one "{}", letters of axes that make no sense
  not_recognised,  ///< no names of the table; subject: the axes that no array has, or empty
  several_sets,    ///< two models or two sides of one; subject: the pattern of the first
  embed_unclear,   ///< number 0 may be the embedding or a block; subject: its name
  embed_missing,   ///< what was said to be the embedding is not there
  norm_missing,    ///< what was said to be the final norm is not there
  block_missing,   ///< no block, or a hole in the numbers; subject: the name in the hole
  counted_from,    ///< a number below that of the first block; subject: that number, if it may be
  left_over,       ///< names that match, but whose numbers are written in two ways
  two_roles,       ///< one tensor, or one place, for two roles
  axes_unclear,  ///< one array that may be read in several ways; subject: letters of the usual one
  several_arrays,  ///< which may hold all sites; subject: the first. None of that name: empty
  not_activations  ///< a type or rank that no site has; subject: a type whose bits may be floats'
};

/// Sites that cannot be told; says why, in words and by kind.
class site_error : public std::invalid_argument {
 public:
  /// @param fault  its kind
  /// @param what   one line that begins with the function
  /// @param of     what a remedy would name, by kind
  site_error(site_fault fault, std::string const& what, std::string of = "")
      : std::invalid_argument(what), kind(fault), subject(std::move(of)) {}

  site_fault kind;      ///< for who knows a remedy
  std::string subject;  ///< see site_fault
};

/// What to know about how names and axes were read.
enum class site_remark : std::uint8_t {
  recognised,          ///< whose names they are
  no_embedding,        ///< the chain begins with a block
  embedding_offered,   ///< subject: an input of the first block, which may be the embedding
  embedding_left_out,  ///< subject: a tensor that lacks what is added to it before the first block
  layers_unsaid,       ///< an array that does not say which layers it holds
  subset,              ///< blocks were left out
  first_block_unused,  ///< what was said of the first block's number contradicts the embedding's
  batch                ///< an axis was taken for the batch
};

/// One such remark.
struct site_note {
  site_remark kind;     ///< which
  std::string text;     ///< a sentence without an end
  std::string subject;  ///< see site_remark
};

/// The output of a block.
struct numbered_site {
  std::ptrdiff_t layer;  ///< l, from 1
  std::string name;      ///< as in the file
};

/// Which tensor is which site. No name is there twice.
struct site_names {
  std::string who;                    ///< whose names: "Hugging Face's list"; "" for rflow's own
  std::string pattern;                ///< of the blocks
  std::string embed;                  ///< empty if there is none
  std::vector<numbered_site> blocks;  ///< ascending
  std::string final_norm;             ///< empty if there is none
  bool is_list = false;               ///< of states, whose last may be the final norm
  std::vector<site_note> notes;       ///< on how names were read
};

namespace detail {

/// What the number in a name counts.
enum class numbering : std::uint8_t {
  blocks,   ///< blocks, the first is 0
  states,   ///< states, 0 is the embedding
  unclear,  ///< from 0 either; from 1 on blocks
};

/// One way to name sites. In patterns a leading * stands for any beginning that ends with a
/// separator, or none; lists are separated by blanks, the best first, and * is the same beginning.
struct naming_family {
  std::string_view who;
  std::string_view block;
  numbering counts;
  std::string_view embeds;   // the state before the first block
  std::string_view partial;  // lacks what is added before the first block in some models
  std::string_view norms;    // the final norm
  bool modules = false;      // names of modules: ".output" and the like may follow
  bool list = false;         // of Hugging Face's states: the last may be the final norm
  bool a_layer = true;       // a file of that name holds one layer
};

inline constexpr std::string_view usual_embeds = "embed embedding embeddings";
inline constexpr std::string_view usual_norms = "final_norm ln_f";

/// Names that tools write. Sources: transformers 5.24 (modeling_*.py: output_hidden_states and the
/// modules' names); TransformerLens (docs of ActivationCache: names of hooks); nnsight and baukit
/// trace modules by path; nnterp (README: layers_output, token_embeddings); llama.cpp
/// (llama-graph.cpp: names of nodes); NumPy (savez: arr_0, arr_1, …).
/// A name belongs to the first row that fits.
inline constexpr naming_family naming_table[] = {
    {"", "block.{}", numbering::unclear, usual_embeds, "", usual_norms},
    // Lists of states.
    {"Hugging Face's list", "*hidden_states.{}", numbering::states, "", "", usual_norms, false,
     true},
    {"Hugging Face's list", "*hidden_states_{}", numbering::states, "", "", usual_norms, false,
     true},
    {"Hugging Face's list", "*hidden_states[{}]", numbering::states, "", "", usual_norms, false,
     true},
    {"Hugging Face's list", "*hidden_state_{}", numbering::states, "", "", usual_norms, false,
     true},
    {"NumPy's savez", "arr_{}", numbering::states, "", "", "", false, false, false},
    // Names of hooks and of nodes. The state before block 0 has all that is added to tokens.
    {"TransformerLens", "*blocks.{}.hook_resid_post", numbering::blocks, "*blocks.0.hook_resid_pre",
     "*hook_embed", "*ln_final.hook_normalized *ln_final.hook_out"},
    {"TransformerLens", "*blocks.{}.hook_resid_pre", numbering::states, "", "",
     "*ln_final.hook_normalized *ln_final.hook_out"},
    {"resid_post", "*L{}_resid_post", numbering::blocks, "*L0_resid_pre *L00_resid_pre", "*embed",
     "*final_norm"},
    {"resid_post", "*layer_{}_resid_post", numbering::blocks,
     "*layer_0_resid_pre *layer_00_resid_pre", "*embed", "*final_norm"},
    {"resid_post", "*resid_post_{}", numbering::blocks, "*resid_pre_0 *resid_pre_00", "*embed",
     "*final_norm"},
    {"resid_post", "*resid_post.{}", numbering::blocks, "*resid_pre.0", "*embed", "*final_norm"},
    {"llama.cpp", "l_out-{}", numbering::blocks, "inpL embd inp_embd", "", "result_norm"},
    {"nnterp", "*layers_output.{}", numbering::blocks, "", "*token_embeddings", "", true},
    {"nnterp", "*layers_output_{}", numbering::blocks, "", "*token_embeddings", ""},
    {"nnterp", "*layers_output[{}]", numbering::blocks, "", "*token_embeddings", ""},
    // Paths of modules. GPT-2 adds positions after wte and drops out after that; models with rotary
    // positions add nothing.
    {"module paths", "*transformer.h.{}", numbering::blocks,
     "*transformer.drop *transformer.word_embeddings_layernorm",
     "*transformer.wte *transformer.word_embeddings", "*transformer.ln_f", true},
    {"module paths", "*gpt_neox.layers.{}", numbering::blocks,
     "*gpt_neox.emb_dropout *gpt_neox.embed_in", "", "*gpt_neox.final_layer_norm", true},
    {"module paths", "*backbone.layers.{}", numbering::blocks, "*backbone.embeddings", "",
     "*backbone.norm_f", true},
    {"module paths", "*decoder.layers.{}", numbering::blocks, "", "*decoder.embed_tokens",
     "*decoder.final_layer_norm *decoder.layer_norm", true},
    {"module paths", "*encoder.layers.{}", numbering::blocks, "", "*encoder.embed_tokens",
     "*encoder.layer_norm", true},
    {"module paths", "*encoder.layer.{}", numbering::blocks, "*embeddings", "", "*layernorm", true},
    {"module paths", "*model.layers.{}", numbering::blocks, "*model.embed_tokens", "",
     "*model.norm *model.final_layernorm", true},
    {"module paths", "*layers.{}", numbering::blocks, "*embed_tokens *tok_embeddings", "", "*norm",
     true},
    {"module paths", "*block.{}", numbering::blocks, "*embed_tokens", "", "*final_layer_norm",
     true},
    {"module paths", "*blocks.{}", numbering::blocks, "*pos_drop", "*patch_embed", "*norm", true},
    {"module paths", "*h.{}", numbering::blocks, "*drop *word_embeddings_layernorm",
     "*wte *word_embeddings", "*ln_f", true},
    // Names that loops give.
    {"numbered layers", "layer_{}", numbering::unclear, usual_embeds, "", usual_norms},
    {"numbered layers", "layer.{}", numbering::unclear, usual_embeds, "", usual_norms},
    {"numbered layers", "layer-{}", numbering::unclear, usual_embeds, "", usual_norms},
    {"numbered layers", "layer{}", numbering::unclear, usual_embeds, "", usual_norms},
    {"numbered layers", "layers_{}", numbering::unclear, usual_embeds, "", usual_norms},
    {"numbered layers", "block_{}", numbering::unclear, usual_embeds, "", usual_norms},
    {"numbered layers", "L{}", numbering::unclear, usual_embeds, "", usual_norms},
    {"numbered layers", "{}", numbering::unclear, usual_embeds, "", usual_norms, false, false,
     false},
};

/// What a module's input is called, where its output is called by the path or as below.
inline constexpr std::string_view input_endings[] = {".input", ".input.0", ".input[0]", "_input",
                                                     ".in"};
inline constexpr std::string_view module_endings[] = {"",           ".output", ".output.0",
                                                      ".output[0]", "_output", ".out"};

/// A name taken apart: before + number + after. The beginning is what * stands for.
struct numbered_name {
  std::string_view beginning, before, digits, after;
  std::string_view ending;  // of names of modules; part of after
};

inline bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// The name by a row of the table; none if it does not fit. Numbers have at most 9 digits.
inline std::optional<numbered_name> taken_apart(naming_family const& family,
                                                std::string_view name) {
  std::string_view pattern = family.block;
  bool const any = pattern.starts_with('*');
  if (any) pattern.remove_prefix(1);
  std::size_t const mark = pattern.find("{}");
  std::string_view const left = pattern.substr(0, mark), right = pattern.substr(mark + 2);
  for (std::string_view const ending :
       std::span(module_endings).first(family.modules ? std::size(module_endings) : 1)) {
    if (name.size() <= ending.size() + right.size() || !name.ends_with(ending)) continue;
    std::string_view core = name.substr(0, name.size() - ending.size());
    if (!core.ends_with(right)) continue;
    core.remove_suffix(right.size());
    std::size_t first = core.size();
    while (first > 0 && is_digit(core[first - 1])) --first;
    if (first == core.size() || core.size() - first > 9) continue;
    std::string_view const before = core.substr(0, first);
    if (!before.ends_with(left)) continue;
    std::string_view const beginning = before.substr(0, before.size() - left.size());
    if (!beginning.empty() &&
        (!any || std::string_view("._/-").find(beginning.back()) == std::string_view::npos))
      continue;
    return numbered_name{beginning, before, core.substr(first), name.substr(core.size()), ending};
  }
  return std::nullopt;
}

/// Names of one pattern, with their numbers.
struct naming_set {
  naming_family const* family = nullptr;  // none for a pattern that is not in the table
  std::string beginning, before, after, ending;
  std::vector<std::pair<std::string, std::string>> names;  // digits, name

  std::string pattern() const { return before + "{}" + after; }
};

/// What is written with {} for the number, as a row of the table reads it.
inline naming_set set_of_pattern(std::string const& pattern, char const* where) {
  std::size_t const mark = pattern.find("{}");
  if (mark == std::string::npos || pattern.find("{}", mark + 2) != std::string::npos)
    throw site_error(site_fault::bad_pattern, std::string(where) + ": the block pattern '" +
                                                  printable(pattern) + "' does not hold {} once");
  naming_set out;
  out.before = pattern.substr(0, mark);
  out.after = pattern.substr(mark + 2);
  std::string const example = out.before + "0" + out.after;
  for (naming_family const& family : naming_table)
    if (auto const parts = taken_apart(family, example); parts && parts->before == out.before) {
      out.family = &family;
      out.beginning = parts->beginning;
      out.ending = parts->ending;
      break;
    }
  return out;
}

/// The blanks of a list, with * and the ending filled in: the first that is there.
template <class There>
std::string first_there(std::string_view list, naming_set const& set, There const& there) {
  while (!list.empty()) {
    std::size_t const end = list.find(' ');
    std::string_view word = list.substr(0, end);
    list.remove_prefix(end == std::string_view::npos ? list.size() : end + 1);
    std::string name;
    if (word.starts_with('*')) {
      name = set.beginning;
      word.remove_prefix(1);
    }
    name += word;
    if (there(name + set.ending)) return name + set.ending;
    if (set.family != nullptr && set.family->modules)
      for (std::string_view const ending : module_endings)
        if (there(name + std::string(ending))) return name + std::string(ending);
    if (there(name)) return name;
  }
  return "";
}

/// "wte, h.0, h.1, h.2 and 9 more are there", for messages.
inline std::string some_of(std::vector<std::string> const& names) {
  constexpr std::size_t most = 4;
  std::string text;
  for (std::size_t i = 0; i < (std::min)(most, names.size()); ++i)
    text += (i == 0 ? "" : ", ") + printable(names[i]);
  if (names.empty()) return "nothing is there";
  if (names.size() > most) text += " and " + std::to_string(names.size() - most) + " more";
  return text + (names.size() == 1 ? " is there" : " are there");
}

/// The sets that the names make, those of later rows left out where an earlier row of the same
/// origin has the same beginning.
inline std::vector<naming_set> sets_of(std::vector<std::string> const& names, bool own_only) {
  std::map<std::pair<std::string, std::string>, std::size_t> known;  // before, after
  std::vector<naming_set> out;
  for (std::string const& name : names)
    for (naming_family const& family : naming_table) {
      if (own_only && !family.who.empty()) break;
      auto const parts = taken_apart(family, name);
      if (!parts) continue;
      auto const [at, is_new] =
          known.try_emplace({std::string(parts->before), std::string(parts->after)}, out.size());
      if (is_new)
        out.push_back({&family,
                       std::string(parts->beginning),
                       std::string(parts->before),
                       std::string(parts->after),
                       std::string(parts->ending),
                       {}});
      out[at->second].names.emplace_back(parts->digits, name);
      break;
    }
  std::map<std::pair<std::string_view, std::string>, naming_family const*> first;
  for (naming_set const& set : out) {
    auto& row = first.try_emplace({set.family->who, set.beginning}, set.family).first->second;
    row = (std::min)(row, set.family);
  }
  std::erase_if(out, [&](naming_set const& set) {
    return first.at({set.family->who, set.beginning}) != set.family;
  });
  return out;
}

/// Numbers of a set. With leading zeros all are as wide as those, or wider for want of room.
inline std::map<std::ptrdiff_t, std::string> numbers_of(naming_set const& set, char const* where,
                                                        std::string const& path) {
  std::size_t width = 0;
  std::string padded;
  for (auto const& [digits, name] : set.names)
    if (digits.size() > 1 && digits[0] == '0') {
      width = digits.size();
      padded = name;
    }
  std::map<std::ptrdiff_t, std::string> out;
  for (auto const& [digits, name] : set.names) {
    bool const zero_first = digits.size() > 1 && digits[0] == '0';
    if (width > 0 && (digits.size() < width || (zero_first && digits.size() != width)))
      throw site_error(site_fault::left_over,
                       std::string(where) + ": " + path + ": " + printable(name) + " and " +
                           printable(padded) + " are both there: numbers of one width expected",
                       name);
    std::ptrdiff_t number = 0;
    std::from_chars(digits.data(), digits.data() + digits.size(), number);
    out.emplace(number, name);
  }
  return out;
}

}  // namespace detail

/// Whether a file of that name (without its extension) holds one layer of many, by its number:
/// "layer_03", "hidden_states.7".
/// @return the pattern, "layer_{}"; none for other names
inline std::optional<std::string> numbered_like_a_layer(std::string_view name) {
  for (detail::naming_family const& family : detail::naming_table)
    if (auto const parts = detail::taken_apart(family, name)) {
      if (!family.a_layer) return std::nullopt;
      return std::string(parts->before) + "{}" + std::string(parts->after);
    }
  return std::nullopt;
}

/// What the list of hidden states of a Hugging Face model ends with.
/// @param model  its type, class or name in any case: "GPT2LMHeadModel", "EleutherAI/pythia-70m"
/// @return unsaid for models that are not in the list. Source: transformers 5.24, run with
///         drawn weights: the last of hidden_states against last_hidden_state, and where the code
///         of each model has its norm
inline list_end hugging_face_list_end(std::string_view model) {
  std::string low(model);
  for (char& c : low)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  constexpr std::string_view with_block[] = {"bert", "vit", "clip", "electra", "deit"};
  constexpr std::string_view with_norm[] = {
      "gpt2",  "gpt_neo", "gptneo", "gpt-neo", "gptj",   "pythia",  "llama", "mistral", "qwen",
      "gemma", "opt",     "phi",    "bloom",   "falcon", "whisper", "esm",   "t5",      "mamba"};
  auto const says = [&](auto const& words) {
    return std::any_of(std::begin(words), std::end(words),
                       [&](std::string_view word) { return low.find(word) != std::string::npos; });
  };
  if (says(with_block)) return list_end::block;
  return says(with_norm) ? list_end::norm : list_end::unsaid;
}

/// Gives each site its tensor. Explicit parts of the pattern win; the rest is recognised by the
/// table. A tensor gets one role: what is the embedding or the final norm is no block.
/// @param  path   for messages
/// @param  names  of all tensors, in any order
/// @return none if no block was found and no pattern was given
/// @throws site_error as its kinds say
inline std::optional<site_names> name_sites(std::string const& path,
                                            std::vector<std::string> const& names,
                                            site_pattern const& pattern = {}) {
  using detail::naming_set;
  using detail::numbering;
  using detail::printable;
  char const* const where = "rflow::find_sites";
  auto const fail = [&](site_fault kind, std::string const& what, std::string subject = "") {
    throw site_error(kind, std::string(where) + ": " + path + ": " + what, std::move(subject));
  };
  std::set<std::string_view> const all(names.begin(), names.end());
  auto const there = [&](std::string const& name) { return all.contains(name); };

  // The blocks.
  naming_set set;
  if (!pattern.block.empty()) {
    set = detail::set_of_pattern(pattern.block, where);
    detail::naming_family const exact{"", pattern.block, numbering::unclear, "", "", ""};
    for (std::string const& name : names)
      if (auto const parts = detail::taken_apart(exact, name))
        set.names.emplace_back(parts->digits, name);
    if (set.names.empty())
      fail(site_fault::block_missing, set.before + std::to_string(pattern.first_block.value_or(1)) +
                                          set.after + " is missing: " + detail::some_of(names));
  } else {
    std::vector<naming_set> sets = detail::sets_of(names, pattern.own_names);
    if (sets.empty()) return std::nullopt;
    auto const own = std::find_if(sets.begin(), sets.end(),
                                  [](naming_set const& s) { return s.family->who.empty(); });
    if (own == sets.end() && sets.size() > 1)
      fail(site_fault::several_sets,
           std::to_string(sets.size()) + " sets of sites are there, " +
               printable(sets[0].pattern()) + ", " + printable(sets[1].pattern()) +
               (sets.size() > 2 ? " and others" : ""),
           sets[0].pattern());
    set = std::move(own == sets.end() ? sets.front() : *own);
  }
  static constexpr detail::naming_family given{
      "", "", numbering::unclear, detail::usual_embeds, "", detail::usual_norms};
  detail::naming_family const& family = set.family == nullptr ? given : *set.family;
  std::map<std::ptrdiff_t, std::string> numbers = detail::numbers_of(set, where, path);

  // The embedding and the norm, each a tensor of its own.
  site_names out;
  out.who = family.who;
  out.pattern = set.pattern();
  out.is_list = family.list;
  auto const number_of = [&](std::string const& name) {
    for (auto const& [number, known] : numbers)
      if (known == name) return number;
    return std::ptrdiff_t{-1};
  };
  if (pattern.embed && !pattern.embed->empty() && !there(*pattern.embed))
    fail(site_fault::embed_missing,
         printable(*pattern.embed) + " is missing: " + detail::some_of(names), *pattern.embed);
  if (pattern.final_norm && !pattern.final_norm->empty() && !there(*pattern.final_norm))
    fail(site_fault::norm_missing,
         printable(*pattern.final_norm) + " is missing: " + detail::some_of(names),
         *pattern.final_norm);
  out.final_norm =
      pattern.final_norm ? *pattern.final_norm : detail::first_there(family.norms, set, there);
  if (pattern.embed)
    out.embed = *pattern.embed;
  else if (family.counts == numbering::states && numbers.contains(0) &&
           pattern.first_block.value_or(1) == 1)
    out.embed = numbers.at(0);
  else
    out.embed = detail::first_there(family.embeds, set, there);
  if (!out.embed.empty() && out.embed == out.final_norm)
    fail(site_fault::two_roles, printable(out.embed) + " cannot be embedding and final norm");
  std::ptrdiff_t const embed_number = number_of(out.embed);
  if (embed_number >= 0) numbers.erase(embed_number);
  if (std::ptrdiff_t const number = number_of(out.final_norm); number >= 0) numbers.erase(number);
  if (pattern.last == list_end::norm) {
    if (!out.final_norm.empty())
      fail(site_fault::two_roles,
           printable(out.final_norm) + " is the final norm, so the list cannot end with it");
    if (numbers.empty())
      fail(site_fault::two_roles, "one site cannot be the chain and the final norm");
    out.final_norm = numbers.rbegin()->second;
    numbers.erase(std::prev(numbers.end()));
  }
  if (numbers.empty() && (out.embed.empty() || pattern.last != list_end::norm))
    fail(site_fault::block_missing,
         "no block is left beside " + printable(out.embed.empty() ? out.final_norm : out.embed));

  // From which number on.
  std::ptrdiff_t const lowest = numbers.empty() ? 1 : numbers.begin()->first;
  std::ptrdiff_t before_first = 0;
  if (embed_number >= 0) {  // its number says where blocks begin
    before_first = embed_number;
    if (pattern.first_block && *pattern.first_block != embed_number &&
        *pattern.first_block != embed_number + 1)
      out.notes.push_back({site_remark::first_block_unused,
                           "blocks count from " + std::to_string(embed_number + 1) +
                               ", after the embedding " + printable(out.embed) + ", not from " +
                               std::to_string(*pattern.first_block),
                           ""});
  } else if (pattern.first_block) {
    before_first = *pattern.first_block - 1;
  } else if (family.counts == numbering::blocks) {
    before_first = -1;
  } else if (lowest == 0) {
    if (family.counts == numbering::unclear && out.embed.empty() && !pattern.embed)
      fail(site_fault::embed_unclear,
           printable(numbers.at(0)) + " may be the embedding or the first block", numbers.at(0));
    before_first = -1;
  }
  if (!numbers.empty() && lowest <= before_first)
    fail(site_fault::counted_from,
         printable(numbers.begin()->second) + " is there, but blocks count from " +
             std::to_string(before_first + 1),
         embed_number < 0 ? std::to_string(lowest) : "");
  for (auto& [number, name] : numbers) out.blocks.push_back({number - before_first, name});

  // Blocks left out: a hole in a row of them is a mistake, a few of many are a choice.
  if (!out.blocks.empty()) {
    std::ptrdiff_t const first = out.embed.empty() ? out.blocks.front().layer : 1;
    std::ptrdiff_t const last = out.blocks.back().layer, span = last - first + 1;
    auto const count = static_cast<std::ptrdiff_t>(out.blocks.size());
    if (count < span && !pattern.subset && 3 * count >= 2 * span) {
      std::size_t i = 0;
      while (out.blocks[i].layer == first + static_cast<std::ptrdiff_t>(i)) ++i;
      std::string number = std::to_string(first + static_cast<std::ptrdiff_t>(i) + before_first);
      for (auto const& [digits, name] : set.names)
        if (digits.size() > 1 && digits[0] == '0' && number.size() < digits.size())
          number.insert(0, digits.size() - number.size(), '0');
      fail(site_fault::block_missing,
           printable(set.before + number + set.after) +
               " is missing: " + printable(i == 0 ? out.embed : out.blocks[i - 1].name) + " and " +
               printable(out.blocks[i].name) + " are there",
           set.before + number + set.after);
    }
    if (count < span || first > 1) {
      std::string list;
      constexpr std::size_t most = 8;
      for (std::size_t i = 0; i < (std::min)(most, out.blocks.size()); ++i)
        list += (i == 0 ? "" : ", ") + std::to_string(out.blocks[i].layer);
      if (out.blocks.size() > most) list += ", …";
      out.notes.push_back({site_remark::subset,
                           "not every block is there: blocks " + list +
                               "; adjacent cosines, steps and curvature go from one to the next "
                               "that is there",
                           ""});
    }
  }
  if (!out.who.empty())
    out.notes.push_back(
        {site_remark::recognised,
         "names were recognised (" + out.who + "): blocks " + printable(out.pattern) +
             (out.embed.empty() ? "" : ", embedding " + printable(out.embed)) +
             (out.final_norm.empty() ? "" : ", final norm " + printable(out.final_norm)),
         ""});
  if (out.embed.empty() && !pattern.embed) {
    out.notes.push_back({site_remark::no_embedding,
                         "no embedding: the chain begins with block " +
                             std::to_string(out.blocks.front().layer) + " (" +
                             printable(out.blocks.front().name) + ")",
                         ""});
    // The input of block 1 has all that is added before it.
    std::string input;
    if (std::string first = out.blocks.front().name; out.blocks.front().layer == 1) {
      first.resize(first.size() - set.after.size());
      for (std::string_view const ending : detail::input_endings)
        if (input.empty() && there(first + std::string(ending)))
          input = first + std::string(ending);
    }
    if (!input.empty())
      out.notes.push_back({site_remark::embedding_offered,
                           printable(input) + " may be the state before block 1", input});
    else if (std::string const partial = detail::first_there(family.partial, set, there);
             !partial.empty())
      out.notes.push_back({site_remark::embedding_left_out,
                           printable(partial) +
                               " is not taken for the embedding: where positions are learned "
                               "(GPT-2), they are added after it",
                           partial});
  }
  return out;
}

}  // namespace rflow
