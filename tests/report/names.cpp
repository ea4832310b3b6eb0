// SPDX-License-Identifier: Apache-2.0
// What files call their sites, from outside: each layout that tools write gives the same report as
// rflow's own names, and what may mean two things is asked. Each remedy in a message is followed.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <rflow/npy.hpp>
#include <rflow/safetensors.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../program.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using program::folder;
using program::outcome;
using strings = std::vector<std::string>;

constexpr std::ptrdiff_t n = 12, d = 6;

/// Site l of a residual stream: what was before, and a tenth of noise.
std::vector<std::vector<float>> stream(int sites, unsigned seed = 1, std::ptrdiff_t tokens = n) {
  std::uint32_t state = seed * 2654435761u + 1u;
  auto const draw = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 16777216.0f - 0.5f;
  };
  std::vector<std::vector<float>> out(static_cast<std::size_t>(sites));
  for (std::size_t l = 0; l < out.size(); ++l)
    for (std::size_t i = 0; i < static_cast<std::size_t>(tokens * d); ++i)
      out[l].push_back((l == 0 ? 0.0f : out[l - 1][i]) + draw() * (l == 0 ? 1.0f : 0.3f));
  return out;
}

using named = std::vector<std::pair<std::string, std::vector<float>>>;

void write(std::string const& path, named const& sites,
           std::map<std::string, std::string> const& metadata = {},
           std::vector<std::ptrdiff_t> const& shape = {n, d},
           std::vector<std::int64_t> const& ids = {}) {
  std::vector<rflow::tensor> tensors;
  for (auto const& [name, x] : sites) tensors.push_back(rflow::as_tensor(name, x, shape));
  if (!ids.empty())
    tensors.push_back(
        rflow::as_tensor("token_ids", ids, {static_cast<std::ptrdiff_t>(ids.size())}));
  rflow::write_safetensors(path, tensors, metadata);
}

/// The sites under the names; the first name is site 0.
named under(strings const& names, std::vector<std::vector<float>> const& sites) {
  named out;
  for (std::size_t l = 0; l < names.size(); ++l) out.emplace_back(names[l], sites[l]);
  return out;
}

strings numbered(std::string const& before, int first, int last, std::string const& after = "") {
  strings out;
  for (int i = first; i <= last; ++i) out.push_back(before + std::to_string(i) + after);
  return out;
}
strings joined(strings a, strings const& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

std::vector<float> concatenated(std::vector<std::vector<float>> const& sites) {
  std::vector<float> out;
  for (auto const& x : sites) out.insert(out.end(), x.begin(), x.end());
  return out;
}

outcome run(folder const& where, strings arguments) {
  for (char const* word : {"--no-plots", "--force", "--output", "report"})
    arguments.emplace_back(word);
  return program::run(RFLOW_REPORT, where, arguments);
}

/// The report of a run that has to succeed.
json report_of(folder const& where, strings const& arguments) {
  outcome const o = run(where, arguments);
  CAPTURE(o.err);
  REQUIRE(o.status == 0);
  return json::parse(program::read(where / "report" + "/metrics.json"));
}
json model_of(folder const& where, strings const& arguments) {
  return report_of(where, arguments).at("models").at(0);
}

/// The one line of a run that has to be refused.
std::string refusal(folder const& where, strings const& arguments) {
  outcome const o = run(where, arguments);
  CAPTURE(o.err);
  CHECK(o.status == 1);
  CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
  return o.err;
}

bool says(std::string const& text, std::string const& part) {
  return text.find(part) != std::string::npos;
}

bool noted(json const& model, std::string const& part) {
  return says(model.at("warnings").dump(), part);
}

/// The same numbers, whatever the names.
void check_same(json const& a, json const& b) {
  for (char const* field : {"inter_token_cosine", "adjacent_cosine", "rms_norm", "variance"})
    CHECK(a.at(field) == b.at(field));
  CHECK(a.at("cka").at(0).at("debiased") == b.at("cka").at(0).at("debiased"));
}

strings own(int blocks) { return joined({"embed"}, numbered("block.", 1, blocks)); }

}  // namespace

TEST_CASE("files of many tools give the report of the same sites under rflow's names") {
  folder const work;
  auto const sites = stream(5);
  write(work / "own.safetensors", under(own(4), sites));
  json const expected = model_of(work, {"own.safetensors"});
  CHECK(expected.at("warnings").empty());

  struct row {
    strings names;
    std::string who;
  };
  row const rows[] = {
      {numbered("hidden_states.", 0, 4), "Hugging Face"},
      {numbered("hidden_states_", 0, 4), "Hugging Face"},
      {numbered("decoder_hidden_states.", 0, 4), "Hugging Face"},
      {joined({"blocks.0.hook_resid_pre"}, numbered("blocks.", 0, 3, ".hook_resid_post")),
       "TransformerLens"},
      {joined({"L0_resid_pre"}, numbered("L", 0, 3, "_resid_post")), "resid_post"},
      {joined({"model.embed_tokens"}, numbered("model.layers.", 0, 3)), "module paths"},
      {joined({"model.embed_tokens.output"}, numbered("model.layers.", 0, 3, ".output.0")),
       "module paths"},
      {joined({"transformer.drop"}, numbered("transformer.h.", 0, 3, ".output")), "module paths"},
      {joined({"gpt_neox.embed_in"}, numbered("gpt_neox.layers.", 0, 3)), "module paths"},
      {joined({"backbone.embeddings"}, numbered("backbone.layers.", 0, 3)), "module paths"},
      {joined({"inp_embd"}, numbered("l_out-", 0, 3)), "llama.cpp"},
      {numbered("arr_", 0, 4), "savez"},
  };
  for (row const& r : rows) {
    CAPTURE(r.names[1]);
    write(work / "x.safetensors", under(r.names, sites));
    json const found = model_of(work, {"x.safetensors"});
    check_same(found, expected);
    CHECK(found.at("sites") == json(r.names));
    CHECK(found.at("positions") == expected.at("positions"));
    CHECK(found.at("blocks") == 4);
    CHECK(noted(found, r.who));
    CHECK(says(refusal(work, {"x.safetensors", "--names", "rflow"}), "no sites by a known name"));
  }
}

TEST_CASE("a family from 0 without an embedding is asked; both answers work") {
  folder const work;
  auto const sites = stream(13);
  write(work / "own.safetensors", under(own(12), sites));
  json const expected = model_of(work, {"own.safetensors"});
  std::string path;
  strings names = numbered("layer_", 0, 12);
  SUBCASE("numbers") { write(work / (path = "x.safetensors"), under(names, sites)); }
  SUBCASE("numbers with leading zeros") {
    for (std::size_t i = 0; i < 10; ++i) names[i].insert(6, "0");
    write(work / (path = "x.safetensors"), under(names, sites));
  }
  SUBCASE("a folder") {
    fs::create_directory(work / (path = "x"));
    for (std::size_t l = 0; l < sites.size(); ++l)
      rflow::write_npy(work.path / "x" / (names[l] + ".npy"), sites[l], {n, d});
  }
  std::string const why = refusal(work, {path});
  CHECK(says(why, names[0] + " may be the embedding or the first block; --embed " + names[0] +
                      " says the embedding, --embed none the first block"));
  for (strings const& options :
       {strings{"--embed", names[0]},
        strings{"--pattern-embed", names[0], "--pattern-block", "layer_{}"},
        strings{"--pattern-embed", names[0], "--pattern-block", "layer_{}", "--first-block", "0"},
        strings{"--pattern-embed", names[0], "--first-block", "10"}}) {
    json const found = model_of(work, joined({path}, options));
    check_same(found, expected);
    CHECK(found.at("sites") == json(names));
    CHECK(found.at("blocks") == 12);
    CHECK(noted(found, "blocks count from 1") == (options.back() == "10"));
  }
  json const blocks = model_of(work, {path, "--embed", "none"});
  check_same(blocks, expected);
  CHECK(blocks.at("blocks") == 13);
  CHECK(blocks.at("positions").at(0) == doctest::Approx(1.0 / 13));
  CHECK(blocks.at("positions").at(12) == 1);
}

TEST_CASE("one tensor, one role") {
  folder const work;
  auto const sites = stream(7);
  write(work / "own.safetensors", under(own(5), sites));
  json const five = model_of(work, {"own.safetensors"});
  write(work / "x.safetensors", under(own(6), sites));
  json const norm = model_of(work, {"x.safetensors", "--pattern-final-norm", "block.6"});
  for (char const* field : {"inter_token_cosine", "adjacent_cosine", "variance", "sites"})
    CHECK(norm.at(field) == five.at(field));
  CHECK(norm.at("final_norm").at("site") == "block.6");
  // The end of a list, by --last.
  write(work / "y.safetensors", under(numbered("hidden_states.", 0, 6), sites));
  json const last = model_of(work, {"y.safetensors", "--last", "norm"});
  CHECK(last.at("variance") == five.at("variance"));
  CHECK(last.at("final_norm").at("site") == "hidden_states.6");
  CHECK_FALSE(noted(last, "--last"));
  CHECK(model_of(work, {"y.safetensors", "--last", "block"}).at("blocks") == 6);
  CHECK(says(
      refusal(work, {"x.safetensors", "--embed", "block.2", "--pattern-final-norm", "block.2"}),
      "block.2 cannot be embedding and final norm"));
}

TEST_CASE("blocks without an embedding are a chain of their own") {
  folder const work;
  auto const sites = stream(4);
  strings const names = numbered("model.layers.", 0, 3);
  write(work / "x.safetensors", under(names, sites));
  json const found = model_of(work, {"x.safetensors"});
  CHECK(found.at("blocks") == 4);
  CHECK(found.at("sites") == json(names));
  CHECK(found.at("positions") == json({0.25, 0.5, 0.75, 1.0}));
  CHECK(noted(found, "no embedding: the chain begins with block 1 (model.layers.0)"));
  CHECK_FALSE(noted(model_of(work, {"x.safetensors", "--embed", "none"}), "no embedding"));
  std::string const page = program::read(work / "report" + "/report.html");
  CHECK(says(page, "first block → last block"));
  CHECK_FALSE(says(page, "0: embedding"));
  // What lacks positions is named, and taken when asked for.
  write(work / "y.safetensors", under({"hook_embed", "blocks.0.hook_resid_post",
                                       "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"},
                                      sites));
  json const without = model_of(work, {"y.safetensors"});
  CHECK(without.at("sites").at(0) == "blocks.0.hook_resid_post");
  CHECK(noted(without, "--embed hook_embed"));
  CHECK(model_of(work, {"y.safetensors", "--embed", "hook_embed"}).at("sites").at(0) ==
        "hook_embed");
}

TEST_CASE("subsets of layers keep their l/L, and a hole needs --subset") {
  folder const work;
  auto const sites = stream(5);
  write(work / "x.safetensors",
        under({"embed", "block.3", "block.6", "block.9", "block.12"}, sites));
  json const third = model_of(work, {"x.safetensors"});
  CHECK(third.at("positions") == json({0.0, 0.25, 0.5, 0.75, 1.0}));
  CHECK(noted(third, "blocks 3, 6, 9, 12"));
  write(work / "y.safetensors",
        under({"embed", "block.1", "block.2", "block.4", "block.5"}, sites));
  CHECK(says(refusal(work, {"y.safetensors"}),
             "block.3 is missing: block.2 and block.4 are there; --subset"));
  json const hole = model_of(work, {"y.safetensors", "--subset"});
  CHECK(hole.at("positions") == json({0.0, 0.2, 0.4, 0.8, 1.0}));
}

TEST_CASE("two sets of sites are asked, and the remedy works") {
  folder const work;
  named sites = under(numbered("encoder_hidden_states.", 0, 2), stream(3, 1));
  for (auto const& site : under(numbered("decoder_hidden_states.", 0, 2), stream(3, 2)))
    sites.push_back(site);
  write(work / "x.safetensors", sites);
  CHECK(says(refusal(work, {"x.safetensors"}),
             "2 sets of sites are there, decoder_hidden_states.{}, encoder_hidden_states.{}; "
             "--pattern-block 'decoder_hidden_states.{}' takes the first"));
  for (std::string const side : {"decoder", "encoder"}) {
    json const found =
        model_of(work, {"x.safetensors", "--pattern-block", side + "_hidden_states.{}"});
    CHECK(found.at("sites") == json(numbered(side + "_hidden_states.", 0, 2)));
    CHECK(found.at("blocks") == 2);
  }
}

TEST_CASE("other messages, and what they advise") {
  folder const work;
  auto const sites = stream(3);
  write(work / "x.safetensors", under({"a", "b.7.c", "b.8.c"}, sites));
  CHECK(says(refusal(work, {"x.safetensors"}),
             "no sites by a known name: a, b.7.c, b.8.c are there; --pattern-block"));
  json const all = model_of(
      work, {"x.safetensors", "--pattern-block", "b.{}.c", "--embed", "a", "--first-block", "7"});
  CHECK(all.at("sites") == json({"a", "b.7.c", "b.8.c"}));
  CHECK(says(refusal(work, {"x.safetensors", "--pattern-block", "b.{}.c", "--first-block", "8"}),
             "b.7.c is there, but blocks count from 8; --first-block 7"));
  CHECK(model_of(work, {"x.safetensors", "--pattern-block", "b.{}.c", "--first-block", "7"})
            .at("blocks") == 2);
  CHECK(says(refusal(work, {"x.safetensors", "--pattern-block", "b.{}.c", "--embed", "e"}),
             "e is missing: a, b.7.c, b.8.c are there; --embed none"));
  CHECK(model_of(work, {"x.safetensors", "--pattern-block", "b.{}.c", "--embed", "none"})
            .at("positions") == json({0.875, 1.0}));
  CHECK(says(
      refusal(work, {"x.safetensors", "--pattern-block", "b.{}.c", "--pattern-final-norm", "e"}),
      "e is missing: a, b.7.c, b.8.c are there; --pattern-final-norm none"));
  CHECK(
      model_of(work, {"x.safetensors", "--pattern-block", "b.{}.c", "--pattern-final-norm", "none"})
          .at("final_norm")
          .is_null());
  write(work / "y.safetensors", under({"layer_1", "layer_01", "layer_02"}, sites));
  CHECK(says(refusal(work, {"y.safetensors"}), "numbers of one width"));
  CHECK(says(refusal(work, {"x.safetensors", "--axes", "sites,tokens"}), "--axes"));
  CHECK(says(refusal(work, {"x.safetensors", "--axes", "sttb"}), "--axes"));
  CHECK(says(refusal(work, {"x.safetensors", "--array", "a"}), "--array needs --axes"));
  CHECK(says(refusal(work, {"x.safetensors", "--last", "first"}), "--last"));
}

TEST_CASE("axes of arrays: asked where they are not clear, read where they are said") {
  folder const work;
  auto const sites = stream(5);
  write(work / "own.safetensors", under(own(4), sites));
  json const expected = model_of(work, {"own.safetensors"});
  std::vector<float> const all = concatenated(sites);
  std::vector<float> swapped;  // tokens × sites × hidden
  for (std::size_t t = 0; t < n; ++t)
    for (auto const& site : sites)
      swapped.insert(swapped.end(), site.begin() + static_cast<std::ptrdiff_t>(t * d),
                     site.begin() + static_cast<std::ptrdiff_t>((t + 1) * d));
  rflow::write_npy(work / "tsh.npy", swapped, {n, 5, d});
  CHECK(says(refusal(work, {"tsh.npy"}),
             "more sites than tokens, if the axes are sites, tokens, hidden; --axes "
             "tokens,sites,hidden or --axes sites,tokens,hidden says so"));
  for (char const* order : {"tokens,sites,hidden", "tsh", "t,s,h"})
    check_same(model_of(work, {"tsh.npy", "--axes", order}), expected);
  CHECK(model_of(work, {"tsh.npy", "--axes", "sites,tokens,hidden"}).at("sites").size() == n);

  // The same in a safetensors file: never guessed, but for what vLLM writes.
  write(work / "tsh.safetensors", {{"states", swapped}}, {}, {n, 5, d});
  CHECK(says(refusal(work, {"tsh.safetensors"}),
             "one array, 'states', f32 [12, 5, 6], and "
             "nothing says what its axes are; --axes"));
  check_same(model_of(work, {"tsh.safetensors", "--axes", "tsh"}), expected);
  write(work / "sbth.safetensors", {{"states", swapped}}, {}, {3, 4, 5, d});  // and the cure works
  CHECK(says(refusal(work, {"sbth.safetensors"}), "; --axes sites,batch,tokens,hidden says so"));
  CHECK(model_of(work, {"sbth.safetensors", "--axes", "sites,batch,tokens,hidden"})
            .at("sites")
            .size() == 3);
  write(work / "two.safetensors", {{"states", swapped}, {"others", swapped}}, {}, {n, 5, d});
  CHECK(
      says(refusal(work, {"two.safetensors", "--axes", "tsh"}), "--array others takes the first"));
  check_same(model_of(work, {"two.safetensors", "--axes", "tsh", "--array", "states"}), expected);
  std::vector<std::int64_t> const ids(n, 7);
  write(work / "vllm.safetensors", {{"hidden_states", swapped}}, {}, {n, 5, d}, ids);
  json const vllm = model_of(work, {"vllm.safetensors"});
  check_same(vllm, expected);
  CHECK(vllm.at("blocks") == 5);
  CHECK(noted(vllm, "--embed embed says that the first is the embedding"));
  CHECK(model_of(work, {"vllm.safetensors", "--embed", "embed"}).at("blocks") == 4);

  // One layer of many is no stack of sites.
  rflow::write_npy(work / "layer_3.npy", all, {5, n, d});
  CHECK(says(refusal(work, {"layer_3.npy"}), "named like one layer of many"));
  CHECK(model_of(work, {"layer_3.npy", "--axes", "batch,tokens,hidden"}).at("sites").size() == 1);
  check_same(model_of(work, {"layer_3.npy", "--axes", "sites,tokens,hidden"}), expected);

  rflow::write_npy(work / "last_hidden_state.npy", all, {5, n, d});
  CHECK(says(refusal(work, {"last_hidden_state.npy"}), "it may hold a batch or all sites"));

  // Fewer sites than tokens, but neighbours along the second axis are like layers.
  auto const few = stream(9, 3, 4);
  std::vector<float> prompts;
  for (std::size_t t = 0; t < 4; ++t)
    for (auto const& site : few)
      prompts.insert(prompts.end(), site.begin() + static_cast<std::ptrdiff_t>(t * d),
                     site.begin() + static_cast<std::ptrdiff_t>((t + 1) * d));
  rflow::write_npy(work / "prompts.npy", prompts, {4, 9, d});
  CHECK(noted(model_of(work, {"prompts.npy"}), "compare with --axes tokens,sites,hidden"));
  CHECK_FALSE(noted(model_of(work, {"prompts.npy", "--axes", "tsh"}), "--axes"));
}

TEST_CASE("a batch is read as sequences, however it is laid out") {
  folder const work;
  auto const sites = stream(3);
  std::vector<float> const all = concatenated(sites);
  rflow::write_npy(work / "sbth.npy", all, {3, 2, n / 2, d});
  json const first = model_of(work, {"sbth.npy"});
  CHECK(first.at("tokens").at("stored") == n);
  CHECK(noted(first, "2 sequences of 6 tokens"));
  std::vector<float> other;  // batch × sites × tokens × hidden
  for (std::size_t b = 0; b < 2; ++b)
    for (auto const& site : sites)
      other.insert(other.end(), site.begin() + static_cast<std::ptrdiff_t>(b * n / 2 * d),
                   site.begin() + static_cast<std::ptrdiff_t>((b + 1) * n / 2 * d));
  rflow::write_npy(work / "bsth.npy", other, {2, 3, n / 2, d});
  check_same(model_of(work, {"bsth.npy", "--axes", "batch,sites,tokens,hidden"}), first);
  write(work / "named.safetensors", under(own(2), sites), {}, {2, n / 2, d});
  check_same(model_of(work, {"named.safetensors"}), first);
  // A batch of one is no batch.
  write(work / "own.safetensors", under(own(2), sites));
  json const expected = model_of(work, {"own.safetensors"});
  write(work / "one.safetensors", under(own(2), sites), {}, {1, n, d});
  check_same(model_of(work, {"one.safetensors"}), expected);
  rflow::write_npy(work / "s1th.npy", all, {3, 1, n, d});
  check_same(model_of(work, {"s1th.npy"}), expected);
  rflow::write_npy(work / "1sth.npy", all, {1, 3, n, d});
  CHECK(says(refusal(work, {"1sth.npy"}),
             "the first axis may be the batch or the sites; --axes batch,sites,tokens,hidden"));
  check_same(model_of(work, {"1sth.npy", "--axes", "bsth"}), expected);
  CHECK(model_of(work, {"1sth.npy", "--axes", "sites,batch,tokens,hidden"}).at("sites").size() ==
        1);
}

TEST_CASE("files numbered like layers are no shards") {
  folder const work;
  auto const sites = stream(4);
  fs::create_directory(work / "x");
  strings files;
  for (int l = 0; l < 4; ++l) {
    files.push_back("x/layer_" + std::to_string(l) + ".npy");
    rflow::write_npy(work / files.back(), sites[static_cast<std::size_t>(l)], {1, n, d});
  }
  CHECK(says(refusal(work, joined({"--shards"}, files)), "layers, not shards"));
  CHECK(model_of(work, {"x", "--embed", "layer_0"}).at("blocks") == 3);
  // Parts are shards, whatever their shape.
  for (std::string& file : files) {
    std::string const part = "x/part-" + file.substr(8);
    fs::rename(work / file, work / part);
    file = part;
  }
  CHECK(run(work, joined({"--shards"}, files)).status == 0);
}

TEST_CASE("what a list ends with is noted") {
  folder const work;
  auto sites = stream(4);
  strings const names = numbered("hidden_states.", 0, 3);
  auto const note = [&](std::map<std::string, std::string> const& metadata) {
    write(work / "x.safetensors", under(names, sites), metadata);
    return model_of(work, {"x.safetensors"}).at("warnings").dump();
  };
  CHECK(says(note({{"architecture", "GPT2LMHeadModel"}}), "final norm in GPT2LMHeadModel"));
  CHECK_FALSE(says(note({{"architecture", "BertModel"}}), "--last"));
  CHECK(says(note({}), "in most models"));
  // Rows of one norm, as behind a norm without weights.
  for (std::size_t t = 0; t < n; ++t) {
    double square = 0;
    for (std::size_t k = 0; k < d; ++k) square += std::pow(sites[3][t * d + k], 2);
    for (std::size_t k = 0; k < d; ++k)
      sites[3][t * d + k] /= static_cast<float>(std::sqrt(square / d));
  }
  CHECK(says(note({}), "all rows have the same norm"));
  rflow::write_npy(work / "x.npy", concatenated(sites), {4, n, d});
  CHECK(noted(model_of(work, {"x.npy"}), "--last norm takes it out of the chain"));
  json const apart = model_of(work, {"x.npy", "--last", "norm"});
  CHECK(apart.at("sites").size() == 3);
  CHECK(apart.at("final_norm").at("site") == "final_norm");
  CHECK_FALSE(noted(apart, "--last"));
  CHECK_FALSE(noted(model_of(work, {"x.npy", "--last", "block"}), "--last"));
}

TEST_CASE("what a file says of itself is held against its tensors") {
  folder const work;
  auto const with = [&](std::map<std::string, std::string> metadata) {
    metadata["rflow_capture"] = metadata.contains("version") ? metadata.at("version") : "1";
    write(work / "x.safetensors", under(own(4), stream(5)), metadata);
  };
  with({{"layers", "4"}, {"tokens", "12"}, {"hidden", "6"}});
  CHECK(model_of(work, {"x.safetensors"}).at("warnings").empty());
  with({{"layers", "12"}});
  json const cut = model_of(work, {"x.safetensors"});
  CHECK(noted(cut, "its metadata say 12 layers, the last that is there is block.4"));
  CHECK(cut.at("positions").at(3) == 0.25);
  with({{"layers", "3"}});
  CHECK(says(refusal(work, {"x.safetensors"}), "its metadata say 3 layers, but block.4 is there"));
  with({{"tokens", "13"}});
  CHECK(says(refusal(work, {"x.safetensors"}), "13 for 'tokens', its tensors 12"));
  with({{"hidden", "7"}});
  CHECK(says(refusal(work, {"x.safetensors"}), "7 for 'hidden', its tensors 6"));
  with({{"hidden", "six"}});
  CHECK(noted(model_of(work, {"x.safetensors"}), "metadata 'hidden' is no whole number"));
  with({{"version", "9"}});
  CHECK(noted(model_of(work, {"x.safetensors"}), "version 9"));
  write(work / "x.safetensors", under(own(4), stream(5)), {}, {n, d},
        std::vector<std::int64_t>(n - 1, 3));
  CHECK(says(refusal(work, {"x.safetensors"}), "'token_ids' has 11 values for 12 tokens"));
}

TEST_CASE("two captures of the same tokens: by ids, or by the user's word") {
  folder const work;
  std::vector<std::int64_t> ids(n, 5);
  write(work / "a.safetensors", under(own(2), stream(3, 1)), {}, {n, d}, ids);
  write(work / "b.safetensors", under(own(3), stream(4, 2)), {}, {n, d}, ids);
  ids[3] = 6;
  write(work / "c.safetensors", under(own(2), stream(3, 3)), {}, {n, d}, ids);
  CHECK(report_of(work, {"a.safetensors", "b.safetensors", "--cross-cka"})
            .at("comparison")
            .at("same_tokens") == true);
  CHECK(says(refusal(work, {"a.safetensors", "c.safetensors", "--cross-cka"}), "token ids differ"));
  json const against = report_of(work, {"a.safetensors", "c.safetensors", "--same-tokens"});
  CHECK(noted(against.at("models").at(1),
              "the token ids differ; compared on the word of --same-tokens"));
  rflow::write_npy(work / "a.npy", concatenated(stream(3, 1)), {3, n, d});
  rflow::write_npy(work / "b.npy", concatenated(stream(3, 2)), {3, n, d});
  CHECK(says(refusal(work, {"a.npy", "b.npy", "--cross-cka"}),
             "a.npy does not say which tokens it saw"));
  CHECK(says(refusal(work, {"a.npy", "b.npy", "--cross-cka"}), "--same-tokens says so"));
  json const said = report_of(work, {"a.npy", "b.npy", "--cross-cka", "--same-tokens"});
  CHECK(said.at("comparison").at("same_tokens") == true);
  rflow::write_npy(work / "c.npy", concatenated(stream(3, 2, 8)), {3, 8, d});
  std::string const why = refusal(work, {"a.npy", "c.npy", "--cross-cka"});
  CHECK_FALSE(says(why, "--same-tokens"));
  CHECK(says(refusal(work, {"a.npy", "c.npy", "--cross-cka", "--same-tokens"}),
             "not the same tokens: a.npy holds 12 tokens and c.npy 8"));
  CHECK(says(refusal(work, {"a.npy", "--same-tokens"}), "--same-tokens needs two captures"));
}

TEST_CASE("sites of several widths: what exists is computed, the rest has a status") {
  folder const work;
  auto const sites = stream(4);
  std::vector<std::vector<float>> wide(2, std::vector<float>(n * 2 * d));
  for (std::size_t l = 0; l < 2; ++l)
    for (std::size_t i = 0; i < wide[l].size(); ++i)
      wide[l][i] = sites[l + 2][i / 2] + 0.01f * static_cast<float>(i % 7);
  auto const tensor = [](char const* name, std::vector<float> const& x, std::ptrdiff_t width) {
    return rflow::as_tensor(name, x, {n, width});
  };
  rflow::tensor const all[] = {tensor("embed", sites[0], d), tensor("block.1", sites[1], d),
                               tensor("block.2", wide[0], 2 * d),
                               tensor("block.3", wide[1], 2 * d)};
  rflow::write_safetensors(work / "x.safetensors", all);
  rflow::tensor const front[] = {all[0], all[1]};
  rflow::write_safetensors(work / "front.safetensors", front);
  for (strings const& options : {strings{}, strings{"--skip-first", "2"}}) {
    json const found = model_of(work, joined({"x.safetensors"}, options));
    json const two = model_of(work, joined({"front.safetensors"}, options));
    json const status = found.at("adjacent_cosine").at("mean").at("status");
    CHECK(status == json({"ok", "different_widths", "ok"}));
    for (std::size_t l = 0; l < 2; ++l) {
      CHECK(found.at("inter_token_cosine").at("values").at(l) ==
            two.at("inter_token_cosine").at("values").at(l));
      CHECK(found.at("rms_norm").at("values").at(l) == two.at("rms_norm").at("values").at(l));
    }
    CHECK(found.at("adjacent_cosine").at("mean").at("values").at(0) ==
          two.at("adjacent_cosine").at("mean").at("values").at(0));
    for (char const* name : {"st1", "st2", "path_energy"})
      CHECK(found.at("variance").at(name).at("status") == "different_widths");
    json const cka = found.at("cka").at(0).at("debiased");
    for (json const& cells : cka.at("status"))
      for (json const& cell : cells) CHECK(cell == "ok");
    CHECK(noted(found, "different_widths"));
  }
  CHECK(run(work, {"x.safetensors", "--strict"}).status == 2);
  CHECK(says(refusal(work, {"--shards", "x.safetensors"}), "its sites differ in width"));
}

TEST_CASE("what the order of four axes looks like") {
  folder const work;
  constexpr std::size_t batch = 4, length = 7, count = 5;
  auto const sites = stream(static_cast<int>(count), 7, batch * length);
  // The array in any order of the axes.
  auto const array = [&](std::string const& letters) {
    std::map<char, std::size_t> const sizes{{'s', count}, {'b', batch}, {'t', length}};
    std::map<char, std::size_t> at;
    std::vector<float> out;
    for (std::size_t i = 0; i < count * batch * length; ++i) {
      std::size_t rest = i;
      for (std::size_t a = 3; a-- > 0; rest /= sizes.at(letters[a]))
        at[letters[a]] = rest % sizes.at(letters[a]);
      auto const from =
          sites[at['s']].begin() + static_cast<std::ptrdiff_t>((at['b'] * length + at['t']) * d);
      out.insert(out.end(), from, from + d);
    }
    std::vector<std::ptrdiff_t> shape;
    for (char const axis : letters.substr(0, 3))
      shape.push_back(static_cast<std::ptrdiff_t>(sizes.at(axis)));
    shape.push_back(d);
    rflow::write_npy(work / (letters + ".npy"), out, shape);
    write(work / (letters + ".safetensors"), {{"states", out}}, {}, shape);
  };
  for (char const* letters : {"sbth", "bsth", "btsh"}) array(letters);
  json const right = model_of(work, {"sbth.npy"});
  CHECK_FALSE(noted(right, "--axes"));
  CHECK_FALSE(noted(model_of(work, {"sbth.npy", "--axes", "sbth"}), "--axes"));

  json const wrong = model_of(work, {"bsth.npy"});
  CHECK(noted(wrong, "was read as sites,batch,tokens,hidden"));
  CHECK(noted(wrong, "compare with --axes batch,sites,tokens,hidden"));
  json const cured = model_of(work, {"bsth.npy", "--axes", "batch,sites,tokens,hidden"});
  check_same(cured, right);
  CHECK_FALSE(noted(cured, "--axes"));
  json const last = model_of(work, {"btsh.npy"});
  CHECK(noted(last, "compare with --axes batch,tokens,sites,hidden"));
  check_same(model_of(work, {"btsh.npy", "--axes", "batch,tokens,sites,hidden"}), right);

  // Said, but contradicted: a note that names what was said, in files of names as well.
  for (char const* file : {"bsth.npy", "bsth.safetensors"}) {
    json const said = model_of(work, {file, "--axes", "sites,batch,tokens,hidden"});
    CHECK(
        noted(said, "--axes sites,batch,tokens,hidden, but neighbours resemble each other more "));
    CHECK(noted(said, "compare with --axes batch,sites,tokens,hidden"));
    check_same(model_of(work, {file, "--axes", "batch,sites,tokens,hidden"}), right);
  }
  json const other = model_of(work, {"sbth.npy", "--axes", "bsth"});
  CHECK(noted(other, "compare with --axes sites,batch,tokens,hidden"));

  // Nothing tells sites from texts where all are alike.
  std::vector<float> alike;
  for (std::size_t i = 0; i < count * batch * length * d; ++i)
    alike.push_back(1 + 0.01f * static_cast<float>(i * i % 17));
  rflow::write_npy(work / "alike.npy", alike, {count, batch, length, d});
  CHECK(noted(model_of(work, {"alike.npy"}), "nothing tells the sites from the batch"));
  json const said = model_of(work, {"alike.npy", "--axes", "batch,sites,tokens,hidden"});
  CHECK_FALSE(noted(said, "--axes"));
}

TEST_CASE("the final norm at the end of a stack, by its norms") {
  folder const work;
  auto sites = stream(6, 9);
  strings const names = numbered("arr_", 0, 5);
  auto const notes = [&] {
    rflow::write_npy(work / "x.npy", concatenated(sites), {6, n, d});
    write(work / "x.safetensors", under(names, sites));
    std::vector<json> out;
    for (char const* file : {"x.npy", "x.safetensors"}) out.push_back(model_of(work, {file}));
    return out;
  };
  for (json const& m : notes()) CHECK_FALSE(noted(m, "--last"));
  auto const scale = [&](std::size_t l, float by) {
    for (std::size_t i = 0; i < sites[l].size(); ++i)
      sites[l][i] *= by * (1 + 0.3f * static_cast<float>(i % d));  // weights, so that rows differ
  };
  // The embedding may differ from all others, a block by a factor of 4.
  scale(0, 0.01f);
  scale(5, 0.2f);
  for (json const& m : notes()) CHECK_FALSE(noted(m, "--last"));
  for (float const by : {0.1f, 400.0f}) {
    scale(5, by);
    for (json const& m : notes())
      CHECK(noted(m,
                  "may be the final norm's output: --last norm takes it out of the chain, "
                  "--last block keeps it"));
    for (char const* file : {"x.npy", "x.safetensors"}) {
      json const norm = model_of(work, {file, "--last", "norm"});
      CHECK(norm.at("sites").size() == 5);
      CHECK_FALSE(noted(norm, "--last"));
      json const block = model_of(work, {file, "--last", "block"});
      CHECK(block.at("sites").size() == 6);
      CHECK_FALSE(noted(block, "--last"));
    }
  }
  // Norms that jump all the time say nothing.
  scale(2, 30.0f);
  for (json const& m : notes()) CHECK_FALSE(noted(m, "--last"));
}

TEST_CASE("the input of the first block is offered as the embedding") {
  folder const work;
  auto const sites = stream(4);
  write(work / "own.safetensors", under(own(3), sites));
  json const expected = model_of(work, {"own.safetensors"});
  for (auto const& row : std::vector<std::array<std::string, 3>>{
           {"model.layers.0.input", "model.layers.", ""},
           {"model.layers.0.input", "model.layers.", ".output"},
           {"transformer.h.0.input[0]", "transformer.h.", ".output.0"},
           {"gpt_neox.layers.0.input.0", "gpt_neox.layers.", ""}}) {
    std::string const &input = row[0], &before = row[1], &after = row[2];
    CAPTURE(input);
    write(work / "x.safetensors", under(joined({input}, numbered(before, 0, 2, after)), sites));
    json const without = model_of(work, {"x.safetensors"});
    CHECK(without.at("blocks") == 3);
    CHECK(without.at("sites").size() == 3);
    CHECK(noted(without, "--embed " + input + " takes it for the embedding"));
    json const with = model_of(work, {"x.safetensors", "--embed", input});
    check_same(with, expected);
    CHECK_FALSE(noted(with, "--embed"));
  }
  // A file with an embedding has no need of it.
  named both = under(joined({"model.embed_tokens"}, numbered("model.layers.", 0, 2)), sites);
  both.emplace_back("model.layers.0.input", sites[0]);
  write(work / "x.safetensors", both);
  CHECK_FALSE(noted(model_of(work, {"x.safetensors"}), "--embed"));
}

TEST_CASE("one site in a .npy: what the message says works") {
  folder const work;
  auto const sites = stream(3);
  write(work / "own.safetensors", under(own(2), sites));
  json const expected = model_of(work, {"own.safetensors"});
  rflow::write_npy(work / "x.npy", sites[0], {n, d});
  std::string const why = refusal(work, {"x.npy"});
  CHECK(says(why, "one site, tokens x hidden"));
  CHECK(says(refusal(work, {"--shards", "x.npy"}), "one site, tokens x hidden"));
  CHECK(says(why, "(sites x tokens x hidden)"));
  rflow::write_npy(work / "all.npy", concatenated(sites), {3, n, d});
  check_same(model_of(work, {"all.npy"}), expected);
  CHECK(says(why, "in a folder (embed.npy, block.1.npy, …)"));
  fs::create_directory(work / "folder");
  for (std::size_t l = 0; l < 3; ++l)
    rflow::write_npy(work / ("folder/" + own(2)[l] + ".npy"), sites[l], {n, d});
  check_same(model_of(work, {"folder"}), expected);
  CHECK(says(why, "--axes tokens,hidden reads this site alone"));
  CHECK(model_of(work, {"x.npy", "--axes", "tokens,hidden"}).at("sites").size() == 1);
}

TEST_CASE("options that are none, and values that are one too many") {
  folder const work;
  write(work / "a.safetensors", under(own(2), stream(3)));
  write(work / "b.safetensors", under(own(2), stream(3, 2)));
  for (auto const& pair : std::map<std::string, std::string>{{"--nmae", "--name"},
                                                             {"--skip-frist", "--skip-first"},
                                                             {"--sequence=none", "--sequences"},
                                                             {"--normalisation", "--normalization"},
                                                             {"--norm", "--normalization"}}) {
    std::string const &wrong = pair.first, &right = pair.second;
    CAPTURE(wrong);
    CHECK(says(refusal(work, {"a.safetensors", wrong, "x"}), "; did you mean " + right + "?"));
  }
  CHECK_FALSE(says(refusal(work, {"a.safetensors", "--entirely-else"}), "did you mean"));
  CHECK_FALSE(says(refusal(work, {"a.safetensors", "--kernel", "none"}), "did you mean"));

  CHECK(says(refusal(work, {"a.safetensors", "b.safetensors", "--name", "A", "B"}),
             "--name takes one value at a time, and 'B' is no file: --name A --name B"));
  CHECK(report_of(work, {"a.safetensors", "b.safetensors", "--name", "A", "--name", "B"})
            .at("models")
            .at(1)
            .at("name") == "B");
  CHECK(says(refusal(work, {"a.safetensors", "--labels", "x", "--ignore-label", "-1", "5"}),
             "--ignore-label -1 --ignore-label 5"));
  // One model has one name.
  CHECK(says(refusal(work, {"a.safetensors", "--name", "A", "B"}), "is no file: --name 'A B'"));
  CHECK(model_of(work, {"a.safetensors", "--name", "A B"}).at("name") == "A B");
  CHECK_FALSE(says(refusal(work, {"--mask", "m", "missing"}), "takes one value"));
}
