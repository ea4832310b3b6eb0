// SPDX-License-Identifier: Apache-2.0
// The sites of a model, found in what a file holds.
#include <rflow/sites.hpp>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/npy.hpp>

#include "files.hpp"

namespace {

using files::contains;
using files::error_of;
using rflow::dtype;

struct in_memory {
  std::map<std::string, rflow::tensor, std::less<>> tensors;

  std::string path() const { return "model"; }
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (auto const& [name, x] : tensors) out.push_back(name);
    return out;
  }
  rflow::tensor const& operator[](std::string_view name) const {
    return tensors.find(name)->second;
  }
  bool contains(std::string_view name) const { return tensors.contains(name); }
};

std::vector<float> const zeros(12);

in_memory model(std::vector<std::string> const& names) {
  in_memory out;
  for (std::string const& name : names) out.tensors[name] = rflow::as_tensor(name, zeros, {4, 3});
  return out;
}

std::string site_error(in_memory const& file, rflow::site_pattern const& pattern = {}) {
  return error_of<std::invalid_argument>([&] { rflow::find_sites(file, pattern); });
}

/// The kind of the error, and what a remedy would name.
std::string fault_of(std::vector<std::string> const& names,
                     rflow::site_pattern const& pattern = {}) {
  try {
    auto const file = model(names);
    rflow::find_sites(file, pattern);
  } catch (rflow::site_error const& error) {
    return std::to_string(static_cast<int>(error.kind)) + " " + error.subject;
  }
  return "none";
}
std::string fault(rflow::site_fault kind, std::string const& subject) {
  return std::to_string(static_cast<int>(kind)) + " " + subject;
}

/// "0 embed, 1 block.1 | final_norm": the chain with its layers, and the final norm.
std::string told(rflow::site_set const& sites) {
  std::string out;
  for (std::size_t i = 0; i < sites.chain.size(); ++i)
    out += (i == 0 ? "" : ", ") + std::to_string(sites.layer(i)) + " " + sites.chain[i].name;
  return out + (sites.final_norm ? " | " + sites.final_norm->name : "");
}
std::string told(std::vector<std::string> const& names, rflow::site_pattern const& pattern = {}) {
  auto const file = model(names);
  return told(rflow::find_sites(file, pattern));
}
bool noted(rflow::site_set const& sites, rflow::site_remark kind) {
  return std::any_of(sites.notes.begin(), sites.notes.end(),
                     [&](rflow::site_note const& note) { return note.kind == kind; });
}

}  // namespace

TEST_CASE("sites are found in the order of the stream") {
  std::vector<std::string> names = {"embed", "final_norm", "tokens", "block.x", "block."};
  for (int i = 1; i <= 12; ++i) names.push_back("block." + std::to_string(i));
  auto const file = model(names);
  auto const sites = rflow::find_sites(file);
  REQUIRE(sites.chain.size() == 13);
  CHECK(sites.names()[0] == "embed");
  CHECK(sites.names()[1] == "block.1");
  CHECK(sites.names()[2] == "block.2");
  CHECK(sites.names()[12] == "block.12");
  CHECK(sites.final_norm.value().name == "final_norm");
  CHECK(sites.tokens() == 4);
  CHECK(sites.width() == 3);
  CHECK(sites.stack<float>().sites() == 13);
  CHECK(sites.stack<float>().name(12) == "block.12");
  CHECK(rflow::visit(sites, [](auto const& stack) { return stack.all_tokens(); }) == 4);
  auto const plain = model({"embed", "block.1"});
  CHECK_FALSE(rflow::find_sites(plain).final_norm);
}

TEST_CASE("other names by pattern") {
  auto const file = model({"wte", "h.0.out", "h.1.out", "ln_f", "h.out"});
  auto const sites = rflow::find_sites(
      file, {.embed = "wte", .block = "h.{}.out", .final_norm = "ln_f", .first_block = 0});
  CHECK(sites.names() == std::vector<std::string>{"wte", "h.0.out", "h.1.out"});
  CHECK(sites.final_norm);
  CHECK(contains(site_error(file, {.embed = "wte", .block = "h.{}.out", .first_block = 1}),
                 "h.0.out is there, but blocks count from 1"));
  CHECK(contains(site_error(file, {.block = "h"}), "does not hold {} once"));
  CHECK(contains(site_error(file, {.block = "{}{}"}), "does not hold {} once"));
  CHECK(contains(site_error(file, {.embed = "wpe", .block = "h.{}.out"}), "wpe is missing"));
  CHECK(contains(site_error(file, {.embed = "wte", .block = "h.{}.out", .final_norm = "ln"}),
                 "ln is missing"));
}

TEST_CASE("a missing site is named") {
  CHECK(site_error(model({"embed", "block.1", "block.2", "block.4", "block.5"})) ==
        "rflow::find_sites: model: block.3 is missing: block.2 and block.4 are there");
  CHECK(contains(site_error(model({"embed", "block.2", "block.3"})), "nothing thrown"));
  CHECK(contains(site_error(model({"embed", "block.2", "block.3", "block.4"})),
                 "block.1 is missing: embed and block.2 are there"));
  CHECK(contains(site_error(model({"embed", "block.1", "block.99999999999999999999"})),
                 "nothing thrown"));  // no number: another tensor
  CHECK(contains(site_error(model({"embed"})), "no sites by a known name: embed is there"));
  CHECK(contains(site_error(model({"embed", "block.-1"})), "no sites by a known name"));
  CHECK(contains(site_error(model({})), "no sites by a known name: nothing is there"));
  CHECK(contains(site_error(model({"wte", "x.0", "x.1", "x.2", "x.3", "x.4"})),
                 "no sites by a known name: wte, x.0, x.1, x.2 and 2 more are there"));
  CHECK(contains(site_error(model({"embed", "block.1"}), {.block = "h.{}"}),
                 "h.1 is missing: block.1, embed are there"));
  // By the user's word they were left out.
  auto const file = model({"embed", "block.1", "block.2", "block.4", "block.5"});
  CHECK(rflow::find_sites(file, {.subset = true}).layers ==
        std::vector<std::ptrdiff_t>{0, 1, 2, 4, 5});
}

TEST_CASE("sites that do not fit together are named") {
  auto const changed = [&](auto&& change, char const* name = "block.1") {
    auto file = model({"embed", "block.1", "block.2", "final_norm"});
    change(file.tensors[name]);
    return site_error(file);
  };
  CHECK(contains(changed([](auto& x) {
                   x.shape = {3, 3};
                 }),
                 "sites disagree: 'embed', f32 [4, 3], but 'block.1', f32 [3, 3]"));
  CHECK(changed([](auto& x) { x.shape = {4, 2}; }) == "nothing thrown");  // a model with stages
  CHECK(contains(changed([](auto& x) { x.type = dtype::bf16; }), "'block.1', bf16 [4, 3]"));
  CHECK(contains(changed([](auto& x) { x.shape = {3, 3}; }, "final_norm"), "but 'final_norm'"));
  CHECK(contains(changed([](auto& x) { x.type = dtype::i32; }, "embed"),
                 "tokens, hidden expected, found 'embed', i32 [4, 3] (integers have no scale"));
  CHECK(contains(changed([](auto& x) { x.shape = {12}; }, "block.2"),
                 "the axes tokens, hidden expected, found 'block.2', f32 [12]"));
}

TEST_CASE("sites of a directory of .npy files and of one array") {
  files::scratch const dir;
  std::vector<double> data(24);
  for (std::size_t i = 0; i < 24; ++i) data[i] = static_cast<double>(i);
  rflow::write_npy(dir / "embed.npy", rflow::view(data.data(), 4, 3));
  rflow::write_npy(dir / "block.1.npy", rflow::view(data.data() + 12, 4, 3));
  rflow::npy_directory all(dir.path());
  auto const found = rflow::find_sites(all).stack<double>();
  rflow::write_npy(dir / "all.npy", data, {2, 4, 3});
  rflow::npy_file const file(dir / "all.npy");
  auto const split = rflow::split_sites(file.array());
  CHECK(split.names() == std::vector<std::string>{"embed", "block.1"});
  CHECK_FALSE(split.final_norm);
  auto const stack = split.stack<double>();
  for (std::ptrdiff_t l = 0; l < 2; ++l)
    for (std::ptrdiff_t i = 0; i < 4; ++i)
      for (std::ptrdiff_t j = 0; j < 3; ++j) {
        CHECK(stack[l](i, j) == static_cast<double>(12 * l + 3 * i + j));
        CHECK(found[l](i, j) == stack[l](i, j));
      }
  CHECK(rflow::split_sites(file.array(), {.block = "h.{}", .first_block = 0}).names()[1] == "h.0");

  auto const error = [](rflow::tensor const& x, rflow::site_pattern const& pattern = {}) {
    return error_of<std::invalid_argument>([&] { rflow::split_sites(x, pattern); });
  };
  CHECK(contains(error(all["embed"]),
                 "the axes sites, tokens, hidden expected, found 'embed', f64 [4, 3]"));
  CHECK(contains(error(file.array(), {.block = "h"}), "does not hold {}"));
  auto x = file.array();
  x.type = dtype::i64;
  CHECK(contains(error(x), "(integers have no scale: store activations as float)"));
  x.type = dtype::raw16;
  CHECK(contains(error(x), "reinterpret::as_bf16"));
  x = file.array();
  x.shape = {1000000000000000, 0, 3};  // nothing bounds the number of sites
  CHECK(contains(error(x), "empty axis"));
}

TEST_CASE("names of tools are recognised, each tensor in one role") {
  using rflow::site_remark;
  struct row {
    std::vector<std::string> names;
    std::string expected;
  };
  row const rows[] = {
      {{"embed", "block.1", "final_norm", "hidden_states.4"}, "0 embed, 1 block.1 | final_norm"},
      {{"embed", "block.0", "block.1"}, "0 embed, 1 block.0, 2 block.1"},
      {{"block.1", "block.2"}, "1 block.1, 2 block.2"},
      {{"hidden_states.0", "hidden_states.1", "hidden_states.2"},
       "0 hidden_states.0, 1 hidden_states.1, 2 hidden_states.2"},
      {{"encoder_hidden_states_0", "encoder_hidden_states_1"},
       "0 encoder_hidden_states_0, 1 encoder_hidden_states_1"},
      {{"hidden_states[0]", "hidden_states[1]"}, "0 hidden_states[0], 1 hidden_states[1]"},
      {{"hidden_states.3", "hidden_states.4"}, "3 hidden_states.3, 4 hidden_states.4"},
      {{"blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "hook_embed", "hook_pos_embed",
        "blocks.0.attn.hook_pattern", "ln_final.hook_normalized"},
       "0 blocks.0.hook_resid_pre, 1 blocks.0.hook_resid_post, 2 blocks.1.hook_resid_post | "
       "ln_final.hook_normalized"},
      {{"blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "hook_embed"},
       "1 blocks.0.hook_resid_post, 2 blocks.1.hook_resid_post"},
      {{"blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"},
       "0 blocks.0.hook_resid_pre, 1 blocks.1.hook_resid_pre"},
      {{"L00_resid_pre", "L00_resid_post", "L01_resid_post"},
       "0 L00_resid_pre, 1 L00_resid_post, 2 L01_resid_post"},
      {{"L11_resid_post", "L12_resid_post"}, "12 L11_resid_post, 13 L12_resid_post"},
      {{"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head",
        "model.layers.0.mlp"},
       "0 model.embed_tokens, 1 model.layers.0, 2 model.layers.1 | model.norm"},
      {{"model.embed_tokens.output", "model.layers.0.output.0", "model.layers.1.output.0",
        "model.norm.output"},
       "0 model.embed_tokens.output, 1 model.layers.0.output.0, 2 model.layers.1.output.0 | "
       "model.norm.output"},
      {{"model.language_model.embed_tokens", "model.language_model.layers.0"},
       "0 model.language_model.embed_tokens, 1 model.language_model.layers.0"},
      {{"transformer.wte", "transformer.drop", "transformer.h.0", "transformer.ln_f"},
       "0 transformer.drop, 1 transformer.h.0 | transformer.ln_f"},
      {{"transformer.wte", "transformer.h.0"}, "1 transformer.h.0"},
      {{"gpt_neox.embed_in", "gpt_neox.layers.0", "gpt_neox.final_layer_norm"},
       "0 gpt_neox.embed_in, 1 gpt_neox.layers.0 | gpt_neox.final_layer_norm"},
      {{"backbone.embeddings", "backbone.layers.0.output", "backbone.norm_f"},
       "0 backbone.embeddings, 1 backbone.layers.0.output | backbone.norm_f"},
      {{"bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"},
       "0 bert.embeddings, 1 bert.encoder.layer.0, 2 bert.encoder.layer.1"},
      {{"token_embeddings", "layers_output.0", "layers_output.1"},
       "1 layers_output.0, 2 layers_output.1"},
      {{"inp_embd", "l_out-0", "l_out-1", "result_norm", "attn_out-0"},
       "0 inp_embd, 1 l_out-0, 2 l_out-1 | result_norm"},
      {{"arr_0", "arr_1", "arr_2"}, "0 arr_0, 1 arr_1, 2 arr_2"},
      {{"embed", "layer_0", "layer_1"}, "0 embed, 1 layer_0, 2 layer_1"},
      {{"embed", "layer_1", "layer_2"}, "0 embed, 1 layer_1, 2 layer_2"},
      {{"layer_1", "layer_2"}, "1 layer_1, 2 layer_2"},
  };
  for (row const& r : rows) {
    CAPTURE(r.expected);
    CHECK(told(r.names) == r.expected);
  }
  auto const cache = model({"blocks.0.hook_resid_post", "hook_embed"});
  auto const sites = rflow::find_sites(cache);
  CHECK(noted(sites, site_remark::recognised));
  CHECK(noted(sites, site_remark::no_embedding));
  CHECK(noted(sites, site_remark::embedding_left_out));
  CHECK(told(cache.names(), {.embed = "hook_embed"}) == "0 hook_embed, 1 blocks.0.hook_resid_post");
  auto const plain = model({"embed", "block.1"});
  CHECK(rflow::find_sites(plain).notes.empty());
}

TEST_CASE("what is said wins, and takes its tensor out of the blocks") {
  CHECK(told({"s.0", "s.1", "s.2"}, {.embed = "s.0", .block = "s.{}"}) == "0 s.0, 1 s.1, 2 s.2");
  CHECK(told({"s.0", "s.1", "s.2"}, {.embed = "s.0", .block = "s.{}", .first_block = 0}) ==
        "0 s.0, 1 s.1, 2 s.2");
  CHECK(told({"s.0", "s.1", "s.2"}, {.embed = "", .block = "s.{}"}) == "1 s.0, 2 s.1, 3 s.2");
  CHECK(told({"s.0", "s.1"}, {.block = "s.{}", .first_block = 0}) == "1 s.0, 2 s.1");
  CHECK(told({"embed", "block.1", "block.2", "block.3"}, {.final_norm = "block.3"}) ==
        "0 embed, 1 block.1, 2 block.2 | block.3");
  CHECK(told({"hidden_states.0", "hidden_states.1", "hidden_states.2"},
             {.last = rflow::list_end::norm}) ==
        "0 hidden_states.0, 1 hidden_states.1 | hidden_states.2");
  CHECK(told({"hidden_states.0", "hidden_states.1"}, {.embed = ""}) ==
        "1 hidden_states.0, 2 hidden_states.1");
  CHECK(told({"embed", "block.1", "final_norm"}, {.embed = "", .final_norm = ""}) == "1 block.1");
  CHECK(told({"layer_00", "layer_01", "layer_02"},
             {.embed = "layer_00", .block = "layer_{}", .first_block = 10}) ==
        "0 layer_00, 1 layer_01, 2 layer_02");
  CHECK(told({"a.layers.0", "a.embed_tokens", "b.layers.0"}, {.block = "a.layers.{}"}) ==
        "0 a.embed_tokens, 1 a.layers.0");
}

TEST_CASE("what may mean two things is asked") {
  using rflow::site_fault;
  CHECK(fault_of({"layer_0", "layer_1"}) == fault(site_fault::embed_unclear, "layer_0"));
  CHECK(fault_of({"s.0", "s.1"}, {.block = "s.{}"}) == fault(site_fault::embed_unclear, "s.0"));
  CHECK(fault_of({"0", "1", "2"}) == fault(site_fault::embed_unclear, "0"));
  CHECK(fault_of({"decoder_hidden_states.0", "encoder_hidden_states.0"}) ==
        fault(site_fault::several_sets, "decoder_hidden_states.{}"));
  CHECK(fault_of({"layer_1", "layer_01", "layer_02"}) == fault(site_fault::left_over, "layer_1"));
  CHECK(fault_of({"layer_001", "layer_02"}) == fault(site_fault::left_over, "layer_001"));
  CHECK(fault_of({"embed", "block.01", "block.2"}) == fault(site_fault::left_over, "block.2"));
  CHECK(told({"layer_08", "layer_09", "layer_10", "layer_100"}, {.subset = true}) ==
        "8 layer_08, 9 layer_09, 10 layer_10, 100 layer_100");
  CHECK(fault_of({"x"}) == fault(site_fault::not_recognised, ""));
  CHECK(fault_of({"layer_1", "layer_2"}, {.own_names = true}) ==
        fault(site_fault::not_recognised, ""));
  CHECK(fault_of({"embed", "block.1", "final_norm"}, {.last = rflow::list_end::norm}) ==
        fault(site_fault::two_roles, ""));
  CHECK(fault_of({"embed", "block.1"}, {.embed = "embed", .final_norm = "embed"}) ==
        fault(site_fault::two_roles, ""));
  CHECK(fault_of({"s.0", "s.1"}, {.embed = "s.0", .block = "s.0{}"}) ==
        fault(site_fault::block_missing, ""));
  CHECK(fault_of({"s.0"}, {.embed = "s.0", .block = "s.{}"}) ==
        fault(site_fault::block_missing, ""));
  CHECK(fault_of({"s.0", "s.1", "s.2"}, {.embed = "s.1", .block = "s.{}"}) ==
        fault(site_fault::counted_from, ""));
  CHECK(fault_of({"s.3", "s.4"}, {.block = "s.{}", .first_block = 4}) ==
        fault(site_fault::counted_from, "3"));
}

TEST_CASE("subsets of layers keep their numbers; a hole in a row of them is a mistake") {
  CHECK(told({"embed", "block.3", "block.6", "block.9"}) ==
        "0 embed, 3 block.3, 6 block.6, 9 block.9");
  CHECK(told({"model.layers.2", "model.layers.16", "model.layers.29"}) ==
        "3 model.layers.2, 17 model.layers.16, 30 model.layers.29");
  auto const file = model({"embed", "block.3", "block.6"});
  CHECK(noted(rflow::find_sites(file), rflow::site_remark::subset));
  CHECK(fault_of({"embed", "block.1", "block.2", "block.4"}) ==
        fault(rflow::site_fault::block_missing, "block.3"));
  CHECK(fault_of({"layer_01", "layer_02", "layer_03", "layer_05"}) ==
        fault(rflow::site_fault::block_missing, "layer_04"));
}

TEST_CASE("a batch becomes sequences; axes of 1 are dropped") {
  std::vector<float> data(2 * 3 * 4 * 5);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  auto const at = [&](rflow::site_set const& sites, std::size_t site, std::ptrdiff_t token,
                      std::ptrdiff_t feature) {
    rflow::tensor const& x = sites.chain[site];
    return x.elements<float>()[token * x.strides[0] + feature * x.strides[1]];
  };
  in_memory file;
  file.tensors["embed"] = rflow::as_tensor("embed", data, {6, 4, 5});
  file.tensors["block.1"] = rflow::as_tensor("block.1", data, {6, 4, 5});
  auto sites = rflow::find_sites(file);
  CHECK(sites.sequences == std::vector<std::ptrdiff_t>{0, 4, 8, 12, 16, 20, 24});
  CHECK(sites.tokens() == 24);
  CHECK(sites.storage == nullptr);  // viewed in place
  CHECK(at(sites, 1, 5, 3) == 28);
  CHECK(noted(sites, rflow::site_remark::batch));
  CHECK(contains(site_error(file, {.axes = "th"}), "the axes of 'th' expected"));
  CHECK(contains(site_error(file, {.axes = "tt"}), "axes 'tt'"));

  // Tokens first, then the batch: no strides say that.
  sites = rflow::find_sites(file, {.axes = "tbh"});
  CHECK(sites.sequences == std::vector<std::ptrdiff_t>{0, 6, 12, 18, 24});
  rflow::site_set const copy = sites;
  sites = {};
  for (std::ptrdiff_t b = 0; b < 4; ++b)
    for (std::ptrdiff_t t = 0; t < 6; ++t)
      for (std::ptrdiff_t h = 0; h < 5; ++h)
        CHECK(at(copy, 1, b * 6 + t, h) == static_cast<float>((t * 4 + b) * 5 + h));

  // Of one sequence, and of one token each.
  file.tensors["embed"] = rflow::as_tensor("embed", data, {1, 24, 5});
  file.tensors["block.1"] = rflow::as_tensor("block.1", data, {24, 5});
  sites = rflow::find_sites(file);
  CHECK(sites.sequences.empty());
  CHECK(sites.tokens() == 24);
  file.tensors["embed"] = rflow::as_tensor("embed", data, {24, 1, 5});
  sites = rflow::find_sites(file);
  CHECK(sites.sequences.empty());
  CHECK(at(sites, 0, 7, 2) == 37);
  file.tensors["embed"] = rflow::as_tensor("embed", data, {4, 6, 5});
  CHECK(contains(site_error(file), "sites disagree"));
  file.tensors["block.1"] = rflow::as_tensor("block.1", data, {6, 4, 5});
  CHECK(contains(site_error(file), "sites disagree"));
  file.tensors["block.1"] = rflow::as_tensor("block.1", data, {2, 3, 4, 5});
  CHECK(contains(site_error(file), "the axes tokens, hidden expected"));
}

TEST_CASE("one array: its axes, its batch, what it begins and ends with") {
  std::vector<double> data(2 * 3 * 4 * 5);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<double>(i);
  auto const array = [&](std::vector<std::ptrdiff_t> shape) {
    return rflow::as_tensor("x", data, std::move(shape));
  };
  auto const at = [&](rflow::tensor const& x, std::ptrdiff_t token, std::ptrdiff_t feature) {
    return x.elements<double>()[token * x.strides[0] + feature * x.strides[1]];
  };
  // sites × batch × tokens × hidden
  auto sites = rflow::split_sites(array({2, 3, 4, 5}));
  CHECK(sites.sequences == std::vector<std::ptrdiff_t>{0, 4, 8, 12});
  CHECK(at(sites.chain[1], 5, 2) == 60 + 5 * 5 + 2);
  CHECK(told(rflow::split_sites(array({6, 1, 4, 5}))) ==
        "0 embed, 1 block.1, 2 block.2, 3 block.3, 4 block.4, 5 block.5");
  CHECK(rflow::split_sites(array({6, 1, 4, 5})).sequences.empty());
  // batch × sites × tokens × hidden
  sites = rflow::split_sites(array({3, 2, 4, 5}), {.axes = "bsth"});
  CHECK(sites.sequences == std::vector<std::ptrdiff_t>{0, 4, 8, 12});
  CHECK(at(sites.chain[1], 5, 2) == (1 * 2 + 1) * 20 + 1 * 5 + 2);
  // tokens × sites × hidden, and all are blocks
  sites = rflow::split_sites(array({12, 2, 5}), {.embed = "", .axes = "tsh"});
  CHECK(told(sites) == "1 block.1, 2 block.2");
  CHECK(at(sites.chain[1], 7, 2) == 7 * 10 + 5 + 2);
  // the last is the norm
  sites = rflow::split_sites(array({3, 8, 5}), {.last = rflow::list_end::norm});
  CHECK(told(sites) == "0 embed, 1 block.1 | final_norm");
  CHECK(at(*sites.final_norm, 3, 1) == 80 + 16);
  // a batch of one layer
  sites = rflow::split_sites(array({6, 4, 5}), {.axes = "bth"});
  CHECK(told(sites) == "0 embed");
  CHECK(sites.sequences.size() == 7);
  auto const error = [&](rflow::tensor const& x, rflow::site_pattern const& pattern) {
    return error_of<rflow::site_error>([&] { rflow::split_sites(x, pattern); });
  };
  CHECK(contains(error(array({2, 12, 5}), {.axes = "sbth"}), "the axes of 'sbth' expected"));
  CHECK(contains(error(array({2, 12, 5}), {.axes = "xyz"}), "axes 'xyz'"));
  CHECK(contains(error(array({1, 24, 5}), {.last = rflow::list_end::norm}), "one site"));
}

TEST_CASE("one array in a file of tensors") {
  std::vector<float> data(6 * 4 * 5);
  std::vector<std::int64_t> const ids(6);
  in_memory file;
  file.tensors["hidden_states"] = rflow::as_tensor("hidden_states", data, {6, 4, 5});
  CHECK(contains(site_error(file), "one array, 'hidden_states', f32 [6, 4, 5], and nothing says"));
  CHECK(rflow::find_sites(file, {.axes = "sth"}).chain.size() == 6);
  // What vLLM's connector writes.
  file.tensors["token_ids"] = rflow::as_tensor("token_ids", ids, {6});
  auto const sites = rflow::find_sites(file);
  CHECK(told(sites) == "1 block.1, 2 block.2, 3 block.3, 4 block.4");
  CHECK(sites.tokens() == 6);
  CHECK(noted(sites, rflow::site_remark::layers_unsaid));
  CHECK(told(rflow::find_sites(file, {.embed = "embed"})) ==
        "0 embed, 1 block.1, 2 block.2, 3 block.3");
  // Two arrays.
  file.tensors["other"] = rflow::as_tensor("other", data, {4, 6, 5});
  CHECK(contains(site_error(file, {.axes = "sth"}), "several arrays have that many axes"));
  CHECK(rflow::find_sites(file, {.axes = "sth", .array = "other"}).chain.size() == 4);
  CHECK(contains(site_error(file, {.axes = "sth", .array = "none"}), "none is no array"));
  CHECK(contains(site_error(file, {.axes = "sbth"}), "no array has the axes 'sbth'"));
  file.tensors["other"] = rflow::as_tensor("other", data, {1, 4, 6, 5});
  CHECK(rflow::find_sites(file, {.axes = "sth", .array = "other"}).chain.size() == 4);
  file.tensors.erase("hidden_states");
  CHECK(rflow::find_sites(file, {.axes = "sth"}).chain.size() == 4);
  CHECK(told(rflow::find_sites(file, {.axes = "bth"})) == "0 embed");
}

TEST_CASE("files that are named like a layer") {
  CHECK(rflow::numbered_like_a_layer("layer_03").value() == "layer_{}");
  CHECK(rflow::numbered_like_a_layer("hidden_states.7").value() == "hidden_states.{}");
  CHECK(rflow::numbered_like_a_layer("model.layers.7").value() == "model.layers.{}");
  CHECK_FALSE(rflow::numbered_like_a_layer("part-00003"));
  CHECK_FALSE(rflow::numbered_like_a_layer("arr_0"));
  CHECK_FALSE(rflow::numbered_like_a_layer("3"));
  CHECK_FALSE(rflow::numbered_like_a_layer("hidden_states"));
}

TEST_CASE("what Hugging Face's list ends with, by model") {
  using rflow::list_end;
  CHECK(rflow::hugging_face_list_end("GPT2LMHeadModel") == list_end::norm);
  CHECK(rflow::hugging_face_list_end("EleutherAI/pythia-70m") == list_end::norm);
  CHECK(rflow::hugging_face_list_end("BertModel") == list_end::block);
  CHECK(rflow::hugging_face_list_end("ViTModel") == list_end::block);
  CHECK(rflow::hugging_face_list_end("MyModel") == list_end::unsaid);
}
