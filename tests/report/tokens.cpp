// SPDX-License-Identifier: Apache-2.0
// Which tokens count and where sequences are, in every mode of the report program: padding changes no
// number, shards change none, and groups of outliers are found and set apart.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <rflow/npy.hpp>
#include <rflow/safetensors.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "../../examples/report/tokens.hpp"
#include "../program.hpp"

namespace {

using nlohmann::json;
using program::folder;
using program::outcome;
using program::read;

using integers = std::vector<std::int64_t>;
using arguments = std::vector<std::string>;

/// A chain of sites with what tools write beside them.
struct capture {
  std::ptrdiff_t tokens, width;
  std::ptrdiff_t batch = 0;  // rows of a batch axis; 0: none
  std::map<std::string, std::vector<float>> sites;
  std::map<std::string, integers> beside;
  std::map<std::string, std::vector<std::ptrdiff_t>> shapes;  // of those; else one axis
  std::map<std::string, std::string> metadata;

  capture(int blocks, std::ptrdiff_t n, std::ptrdiff_t d, unsigned seed, bool final_norm = false)
      : tokens(n), width(d) {
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<std::size_t>(n * d));
    for (float& v : x) v = normal(bits);
    for (int l = 0; l <= blocks + (final_norm ? 1 : 0); ++l) {
      sites[l == 0        ? std::string("embed")
            : l <= blocks ? "block." + std::to_string(l)
                          : std::string("final_norm")] = x;
      for (float& v : x) v += 0.3f * normal(bits);
    }
  }

  float& at(std::string const& site, std::ptrdiff_t token, std::ptrdiff_t feature) {
    return sites[site][static_cast<std::size_t>(token * width + feature)];
  }
  /// The same capture with only some tokens, in an order of their own; −1 stands for padding.
  capture rows(std::vector<std::ptrdiff_t> const& which, float padding) const {
    capture out = *this;
    out.beside.clear();
    out.tokens = std::ssize(which);
    for (auto& [name, x] : out.sites) {
      x.clear();
      for (std::ptrdiff_t const i : which)
        for (std::ptrdiff_t j = 0; j < width; ++j)
          x.push_back(i < 0 ? padding : sites.at(name)[static_cast<std::size_t>(i * width + j)]);
    }
    return out;
  }
  void write(std::string const& path, rflow::dtype type = rflow::dtype::i64) const {
    std::map<std::string, std::vector<std::int32_t>> narrow;
    std::map<std::string, std::vector<std::uint8_t>> bytes;
    std::vector<rflow::tensor> tensors;
    for (auto const& [name, x] : sites)
      tensors.push_back(
          rflow::as_tensor(name, x,
                           batch > 0 ? std::vector<std::ptrdiff_t>{batch, tokens / batch, width}
                                     : std::vector<std::ptrdiff_t>{tokens, width}));
    for (auto const& [name, x] : beside) {
      std::vector<std::ptrdiff_t> shape{std::ssize(x)};
      if (shapes.contains(name)) shape = shapes.at(name);
      auto& n = narrow[name];
      n.assign(x.begin(), x.end());
      auto& b = bytes[name];
      b.assign(x.begin(), x.end());
      bool const mask = name.find("mask") != std::string::npos;
      if (mask && (type == rflow::dtype::boolean || type == rflow::dtype::u8)) {
        tensors.push_back(rflow::as_tensor(name, b, shape));
        tensors.back().type = type;
      } else if (mask && type == rflow::dtype::i32) {
        tensors.push_back(rflow::as_tensor(name, n, shape));
      } else {
        tensors.push_back(rflow::as_tensor(name, x, shape));
      }
    }
    rflow::write_safetensors(path, tensors, metadata);
  }
};

outcome run(folder const& where, arguments more) {
  more.insert(more.begin(), "--no-plots");
  return program::run(RFLOW_REPORT, where, more);
}
void check_refused(folder const& where, arguments more, arguments const& texts) {
  more.insert(more.begin(), "--no-plots");
  program::check_refused(RFLOW_REPORT, where, more, texts);
}

/// metrics.json of a run into a folder of that name.
json metrics(folder const& where, std::string const& name, arguments more) {
  more.insert(more.end(), {"-o", name});
  outcome const o = run(where, more);
  CAPTURE(o.err);
  REQUIRE(o.status == 0);
  return json::parse(read(where.path / name / "metrics.json"));
}
json model(folder const& where, std::string const& name, arguments const& more) {
  return metrics(where, name, more).at("models").at(0);
}

/// Every number of two reports, to `within` absolutely or relatively. What counts tokens of the file,
/// and names files, is not looked at.
struct comparison {
  double within;
  std::size_t numbers = 0;

  void all(json const& a, json const& b, std::string const& where = "") {
    for (char const* const name :
         {"/token", "/stored", "/probe/labels", "/left_out", "/file", "/name", "/from",
          "/tokens/tokens", "/outliers/tokens", "/text", "/files"})
      if (where.ends_with(name)) return;
    CAPTURE(where);
    REQUIRE(a.type() == b.type());
    if (a.is_number()) {
      ++numbers;
      CHECK(std::abs(a.get<double>() - b.get<double>()) <=
            within * std::max(1.0, std::abs(b.get<double>())));
    } else if (a.is_structured()) {
      REQUIRE(a.size() == b.size());
      for (auto const& [key, value] : a.items())
        all(value, a.is_array() ? b.at(std::stoul(key)) : b.at(key), where + "/" + key);
    } else {
      CHECK(a == b);
    }
  }
};

/// Sequences of these lengths in a batch as long as the longest, every other padded on the left.
struct batch {
  capture alone, padded;
  integers labels, padded_labels;

  batch(std::vector<std::ptrdiff_t> const& lengths, float padding, unsigned seed)
      : alone(3, 0, 1, seed), padded(alone) {
    std::ptrdiff_t n = 0;
    for (std::ptrdiff_t const length : lengths) n += length;
    std::ptrdiff_t const longest = *std::max_element(lengths.begin(), lengths.end());
    alone = capture(3, n, 6, seed, true);
    std::vector<std::ptrdiff_t> which;
    integers mask, offsets{0}, padded_offsets{0};
    std::ptrdiff_t token = 0;
    for (std::size_t q = 0; q < lengths.size(); ++q) {
      std::ptrdiff_t const before = q % 2 == 0 ? 0 : longest - lengths[q];
      for (std::ptrdiff_t i = 0; i < longest; ++i) {
        bool const counts = i >= before && i < before + lengths[q];
        which.push_back(counts ? token++ : -1);
        mask.push_back(counts ? 1 : 0);
        padded_labels.push_back(counts ? which.back() % 3 : 1);
        if (counts) labels.push_back(which.back() % 3);
      }
      offsets.push_back(token);
      padded_offsets.push_back(std::ssize(which));
    }
    padded = alone.rows(which, padding);
    alone.beside["sequences"] = offsets;
    padded.beside["sequences"] = padded_offsets;
    padded.beside["attention_mask"] = mask;
    padded.shapes["attention_mask"] = {std::ssize(lengths), longest};
  }
};

constexpr float missing = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("padding that a mask leaves out changes no number, in no mode") {
  folder const work;
  batch const b({9, 5, 30, 7, 12}, missing, 3);
  b.alone.write(work / "alone.safetensors");
  b.padded.write(work / "padded.safetensors");
  rflow::write_npy(work / "labels.npy", b.labels, {std::ssize(b.labels)});
  rflow::write_npy(work / "padded-labels.npy", b.padded_labels, {std::ssize(b.padded_labels)});
  std::vector<arguments> const modes{
      {},
      {"--skip-first", "1"},
      {"--skip-first", "2", "--skip-last", "1", "--significance", "--shifts"},
      {"--normalization", "relative", "--kernel", "linear"},
      {"--shards", "--cka-batch", "4"},
      {"--shards", "--cka-batch", "8", "--skip-first", "1"},
      {"--shards", "--cka", "full", "--kernel", "both", "--skip-last", "2", "--significance"},
      {"--labels"}};
  int run = 0;
  for (arguments mode : modes) {
    CAPTURE(run);
    bool const labels = mode == arguments{"--labels"};
    arguments one = mode, two = mode;
    if (labels) {
      one = {"--labels", "labels.npy", "--probe-epochs", "20"};
      two = {"--labels", "padded-labels.npy", "--probe-epochs", "20"};
    }
    one.push_back("alone.safetensors"), two.push_back("padded.safetensors");
    json const alone = model(work, "alone-" + std::to_string(run), one);
    json const padded = model(work, "padded-" + std::to_string(run), two);
    comparison c{1e-6};
    c.all(padded, alone);
    CHECK(c.numbers > 100);
    CHECK(padded.at("tokens").at("stored") == 150);
    CHECK(padded.at("tokens").at("left_out").at(0) ==
          json{{"why", "attention_mask"}, {"tokens", 87}});
    CHECK(padded.at("sequences").at("count") == 5);
    ++run;
  }
}

TEST_CASE("masks of every type, by every road") {
  folder const work;
  batch const b({9, 5, 12}, missing, 4);
  b.alone.write(work / "alone.safetensors");
  json const right = model(work, "right", {"alone.safetensors"});
  auto const same = [&](std::string const& name, arguments const& more) {
    CAPTURE(name);
    json const found = model(work, name, more);
    comparison c{1e-6};
    c.all(found, right);
    CHECK(c.numbers > 100);
  };
  for (rflow::dtype const type :
       {rflow::dtype::boolean, rflow::dtype::u8, rflow::dtype::i32, rflow::dtype::i64}) {
    b.padded.write(work / "typed.safetensors", type);
    same("typed-" + std::string(to_string(type)), {"typed.safetensors"});
  }
  capture other = b.padded;
  integers const mask = other.beside["attention_mask"];
  integers inverse;
  for (std::int64_t const x : mask) inverse.push_back(1 - x);
  other.beside.erase("attention_mask");
  other.beside["special_tokens_mask"] = inverse;
  other.write(work / "special.safetensors");
  same("special", {"special.safetensors"});

  other.beside.erase("special_tokens_mask");
  other.beside["keep"] = mask;
  other.write(work / "named.safetensors");
  same("named", {"named.safetensors", "--mask", "keep"});
  rflow::write_npy(work / "mask.npy", mask, {3, 12});
  other.beside.erase("keep");
  other.write(work / "bare.safetensors");
  same("file", {"bare.safetensors", "--mask", "mask.npy"});
  same("file-of-shards", {"bare.safetensors", "--mask", "mask.npy"});

  // Both of a file's masks hold, and --mask besides.
  capture both = b.padded;
  both.beside["special_tokens_mask"] = integers(mask.size());
  both.beside["special_tokens_mask"][0] = 1;
  both.beside["also"] = integers(mask.size(), 1);
  both.beside["also"][1] = 0;
  both.write(work / "both.safetensors");
  json const tokens = model(work, "both", {"both.safetensors", "--mask", "also"}).at("tokens");
  CHECK(tokens.at("used") == 24);
  CHECK(tokens.at("left_out").at(1) == json{{"why", "special_tokens_mask"}, {"tokens", 1}});
  CHECK(tokens.at("left_out").at(2) == json{{"why", "also"}, {"tokens", 1}});

  // A folder of .npy files has its mask as a file, too.
  std::filesystem::create_directory(work.path / "folder");
  for (auto const& [name, x] : b.padded.sites)
    rflow::write_npy(work / ("folder/" + name + ".npy"), x, {b.padded.tokens, b.padded.width});
  rflow::write_npy(work / "folder/attention_mask.npy", mask, {3, 12});
  rflow::write_npy(work / "folder/sequences.npy", b.padded.beside.at("sequences"), {4});
  same("folder-report", {"folder"});
}

TEST_CASE("a mask that cannot be one is one line, and its cure works") {
  folder const work;
  capture x(2, 12, 4, 5);
  auto const refused = [&](std::string const& name, integers const& mask,
                           std::vector<std::ptrdiff_t> const& shape, arguments const& texts) {
    CAPTURE(name);
    x.beside = {{name, mask}};
    x.shapes = {{name, shape}};
    x.write(work / "x.safetensors");
    check_refused(work, {"x.safetensors", "-o", "out"}, texts);
    check_refused(work, {"--shards", "x.safetensors", "-o", "out"}, texts);
    std::filesystem::remove_all(work.path / "cured");
    CHECK(model(work, "cured", {"x.safetensors", "--no-mask"}).at("tokens").at("used") == 12);
  };
  integers values(12, 1);
  values[7] = 2;
  refused("attention_mask", values, {12},
          {"x.safetensors: ", "'attention_mask' holds 2 at token 7", "--no-mask"});
  values[7] = -1;
  refused("special_tokens_mask", values, {12}, {"'special_tokens_mask' holds -1", "--no-mask"});
  refused("attention_mask", integers(12), {12},
          {"attention_mask leaves none of its 12 tokens", "--no-mask"});
  refused("special_tokens_mask", integers(12, 1), {12}, {"none of its 12 tokens", "--no-mask"});
  refused("attention_mask", integers(11, 1), {11},
          {"one value a token expected, 12, found 'attention_mask'", "--no-mask"});
  refused("attention_mask", integers(12, 1), {1, 3, 4}, {"one value a token", "--no-mask"});

  x.beside.clear();
  x.write(work / "x.safetensors");
  integers const mask(11, 1);
  rflow::write_npy(work / "short.npy", mask, {11});
  check_refused(work, {"x.safetensors", "--mask", "short.npy", "-o", "out"},
                {"short.npy: ", "11 values for 12 tokens"});
  integers const none(12);
  rflow::write_npy(work / "none.npy", none, {12});
  check_refused(work, {"x.safetensors", "--mask", "none.npy", "-o", "out"},
                {"--mask none.npy leaves none of its 12 tokens"});
  integers const more(13, 1);
  rflow::write_npy(work / "long.npy", more, {13});
  check_refused(work, {"x.safetensors", "--mask", "long.npy", "-o", "out"},
                {"long.npy: ", "13 values for 12 tokens"});
  std::vector<float> floats(12, 1.0f);
  floats[3] = 0.5f;
  rflow::write_npy(work / "floats.npy", floats, {12});
  check_refused(work, {"x.safetensors", "--mask", "floats.npy", "-o", "out"},
                {"floats.npy: ", "holds 0.5 at token 3; 0 or 1 expected, where 1 keeps a token"});
  check_refused(work, {"x.safetensors", "--mask", "nothing", "-o", "out"},
                {"--mask: no tensor 'nothing'"});
  // A mask is an input: no report takes its place.
  std::filesystem::create_directory(work.path / "in");
  rflow::write_npy(work / "in/cka.npy", integers(12, 1) = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0},
                   {12});
  check_refused(work, {"x.safetensors", "--mask", "in/cka.npy", "-o", "in", "--force"}, {"in"});
}

TEST_CASE("first, last and named tokens") {
  folder const work;
  capture x(2, 20, 4, 6);
  x.beside["sequences"] = {0, 8, 8, 9, 20};
  x.write(work / "x.safetensors");
  // What is left is what a file of those tokens says.
  auto const same = [&](arguments more, std::vector<std::ptrdiff_t> const& which,
                        integers const& offsets) {
    CAPTURE(more);
    capture part = x.rows(which, 0);
    part.beside["sequences"] = offsets;
    part.write(work / "part.safetensors");
    std::filesystem::remove_all(work.path / "found");
    std::filesystem::remove_all(work.path / "part");
    more.push_back("x.safetensors");
    comparison c{1e-6};
    c.all(model(work, "found", more), model(work, "part", {"part.safetensors"}));
    CHECK(c.numbers > 50);
  };
  json const right = model(work, "right", {"x.safetensors"});
  CHECK(right.at("sequences").at("count") == 3);
  CHECK(right.at("sequences").at("from") == "sequences");
  std::vector<std::ptrdiff_t> which;
  for (std::ptrdiff_t const i : {2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 16, 17, 18, 19})
    which.push_back(i);
  {  // what was asked is in the model, too, so that two reports differ there
    json const found = model(work, "first", {"x.safetensors", "--skip-first", "2"});
    CHECK(found.at("tokens").at("used") == 15);
    CHECK(found.at("tokens").at("left_out").at(0) ==
          json{{"why", "--skip-first 2"}, {"tokens", 5}});
    CHECK(found.at("sequences").at("count") == 2);
  }
  same({"--tokens", "2:8,11:20"}, which, {0, 6, 15});
  same({"--skip-last", "3"}, {0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15, 16}, {0, 5, 13});
  same({"--tokens", "4:,0"}, {0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19},
       {0, 5, 6, 17});
  same({"--tokens", ":12", "--skip-last", "1"}, {0, 1, 2, 3, 4, 5, 6, 9, 10, 11}, {0, 7, 10});

  check_refused(work, {"x.safetensors", "--tokens", "3:21", "-o", "out"},
                {"--tokens 3:21", "20 tokens"});
  check_refused(work, {"x.safetensors", "--tokens", "20", "-o", "out"},
                {"--tokens 20", "20 tokens"});
  for (char const* const text :
       {"", "a", "3:3", "5:3", "1,,2", "-1", "0x1", "1:2:3", "99999999999999999999"}) {
    CAPTURE(text);
    check_refused(work, {"x.safetensors", std::string("--tokens=") + text, "-o", "out"},
                  {"--tokens: "});
  }
  check_refused(work, {"x.safetensors", "--skip-first", "6", "--skip-last", "6", "-o", "out"},
                {"--skip-first 6, --skip-last 6 leave none of its 20 tokens"});
}

TEST_CASE("sequences count without shards as they do with them") {
  folder const work;
  capture x(3, 40, 8, 7);
  x.beside["sequences"] = {0, 11, 12, 26, 40};
  x.write(work / "x.safetensors");
  capture flat = x;
  flat.beside["cu_seqlens"] = flat.beside["sequences"];
  flat.beside.erase("sequences");
  flat.write(work / "flat.safetensors", rflow::dtype::i32);
  json const file = model(work, "file", {"x.safetensors"});
  json const shards = model(work, "shards", {"--shards", "x.safetensors"});
  comparison c{1e-8};  // unit vectors are summed in float
  for (char const* const name : {"tokens", "inter_token_cosine", "adjacent_cosine", "rms_norm",
                                 "zero_rows", "variance", "sequences"})
    c.all(file.at(name), shards.at(name), name);
  CHECK(c.numbers > 90);
  CHECK(file.at("sequences").at("per_sequence").at("st1").at("sequences") == 4);
  // One token pairs with none.
  CHECK(file.at("sequences").at("per_sequence").at("inter_token_cosine").at("sequences").at(0) ==
        3);
  json const unpaired = model(work, "none", {"x.safetensors", "--sequences", "none"});
  CHECK(unpaired.at("sequences").at("count") == 1);
  CHECK(unpaired.at("sequences").at("per_sequence").is_null());
  CHECK(unpaired.at("inter_token_cosine") != file.at("inter_token_cosine"));
  CHECK(model(work, "flat", {"flat.safetensors"}).at("inter_token_cosine") ==
        file.at("inter_token_cosine"));
  // Full CKA knows of no sequences, and is the same.
  json const full = model(work, "full", {"--shards", "x.safetensors", "--cka", "full"});
  comparison cka{1e-6};
  cka.all(full.at("cka"), file.at("cka"));
  CHECK(cka.numbers > 50);

  // The same numbers over any number of threads, and of sequences in any number of files.
  capture first = x.rows({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, 0);
  first.beside["sequences"] = {0, 11, 12};
  first.write(work / "first.safetensors");
  std::vector<std::ptrdiff_t> rest;
  for (std::ptrdiff_t i = 12; i < 40; ++i) rest.push_back(i);
  capture second = x.rows(rest, 0);
  second.beside["sequences"] = {0, 14, 28};
  second.write(work / "second.safetensors");
  json const two = model(work, "two", {"--shards", "first.safetensors", "second.safetensors"});
  for (char const* const name :
       {"tokens", "inter_token_cosine", "adjacent_cosine", "variance", "sequences"})
    c.all(two.at(name), shards.at(name), name);
}

TEST_CASE("where sequences begin: offsets, positions, numbers of documents") {
  folder const work;
  capture x(2, 12, 5, 8);
  x.beside["sequences"] = {0, 5, 12};
  x.write(work / "right.safetensors");
  json const right = model(work, "right", {"right.safetensors"}).at("inter_token_cosine");

  x.beside = {{"position_ids", {0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6}},
              {"document", {7, 7, 7, 7, 7, 3, 3, 3, 3, 3, 3, 3}},
              {"cuts", {0, 5, 12}}};
  x.write(work / "x.safetensors");
  // Noticed and offered; both cures work, and neither says it again.
  json const noticed = model(work, "noticed", {"x.safetensors"});
  CHECK(noticed.at("sequences").at("count") == 1);
  std::string const notes = noticed.at("warnings").dump();
  CHECK(notes.find("--sequences position_ids") != std::string::npos);
  CHECK(notes.find("--sequences none") != std::string::npos);
  for (char const* const name : {"position_ids", "document", "cuts"}) {
    CAPTURE(name);
    json const m = model(work, name, {"x.safetensors", "--sequences", name});
    CHECK(m.at("inter_token_cosine") == right);
    CHECK(m.at("sequences").at("from") == name);
    CHECK(m.at("warnings").dump().find("--sequences") == std::string::npos);
    json const s = model(work, std::string(name) + "-shards",
                         {"--shards", "x.safetensors", "--sequences", name});
    CHECK(s.at("sequences").at("count") == 2);
  }
  json const none = model(work, "none", {"x.safetensors", "--sequences", "none"});
  CHECK(none.at("warnings").dump().find("--sequences") == std::string::npos);
  CHECK(none.at("inter_token_cosine") == noticed.at("inter_token_cosine"));

  // Padding has positions, too: they are not looked at.
  x.beside["attention_mask"] = {0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  x.beside["position_ids"] = {1, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  x.write(work / "padded.safetensors");
  json const padded = model(work, "padded", {"padded.safetensors"});
  CHECK(padded.at("warnings").dump().find("position_ids") == std::string::npos);

  // Two that say different things; offsets that are none.
  x.beside = {{"sequences", {0, 5, 12}}, {"cu_seqlens", {0, 6, 12}}};
  x.write(work / "two.safetensors");
  check_refused(work, {"two.safetensors", "-o", "out"},
                {"'sequences' and 'cu_seqlens' differ", "--sequences cu_seqlens"});
  CHECK(model(work, "one", {"two.safetensors", "--sequences", "sequences"})
            .at("inter_token_cosine") == right);
  CHECK(model(work, "other", {"two.safetensors", "--sequences", "cu_seqlens"})
            .at("sequences")
            .at("count") == 2);
  for (integers const& wrong : {integers{0, 5}, integers{1, 12}, integers{0, 7, 5, 12},
                                integers{12}, integers{0, -3, 12}}) {
    x.beside = {{"cu_seqlens", wrong}};
    x.write(work / "wrong.safetensors");
    for (arguments const& mode : {arguments{}, arguments{"--shards"}}) {
      arguments more = mode;
      more.insert(more.end(), {"wrong.safetensors", "-o", "out"});
      check_refused(work, more,
                    {"'cu_seqlens' does not ascend from 0 to its 12 tokens", "--sequences none"});
    }
    std::filesystem::remove_all(work.path / "cured");
    CHECK(model(work, "cured", {"wrong.safetensors", "--sequences", "none"})
              .at("sequences")
              .at("count") == 1);
  }
  check_refused(work, {"right.safetensors", "--sequences", "nothing", "-o", "out"},
                {"--sequences: no tensor 'nothing'"});
}

TEST_CASE("an attention sink of each sequence is left out by the note's advice") {
  folder const work;
  batch b({9, 8, 12}, 0, 9);
  for (std::string const site : {"block.1", "block.2"})
    for (std::ptrdiff_t j = 0; j < 6; ++j) b.alone.at(site, 0, j) *= 300;
  b.alone.write(work / "x.safetensors");
  std::string const notes = model(work, "x", {"x.safetensors"}).at("warnings").dump();
  REQUIRE(notes.find("compare with --skip-first 1") != std::string::npos);
  json const cured = model(work, "cured", {"x.safetensors", "--skip-first", "1"});
  CHECK(cured.at("tokens").at("used") == 26);
  CHECK(cured.at("warnings").dump().find("more than half") == std::string::npos);
  CHECK(cured.at("outliers").at("tokens").empty());
}

TEST_CASE("two models are compared over the tokens that count in both") {
  folder const work;
  capture a(2, 16, 4, 10), b(3, 16, 5, 11);
  a.metadata = b.metadata = {{"token_hash", "same"}};
  integers mask(16, 1);
  mask[3] = mask[15] = 0;
  a.beside["attention_mask"] = b.beside["attention_mask"] = mask;
  for (std::ptrdiff_t j = 0; j < 4; ++j) a.at("block.1", 3, j) = missing;
  a.write(work / "a.safetensors"), b.write(work / "b.safetensors");
  json const masked = metrics(work, "masked", {"a.safetensors", "b.safetensors", "--cross-cka"});
  std::vector<std::ptrdiff_t> which;
  for (std::ptrdiff_t i = 0; i < 16; ++i)
    if (mask[static_cast<std::size_t>(i)] != 0) which.push_back(i);
  a.rows(which, 0).write(work / "c.safetensors"), b.rows(which, 0).write(work / "d.safetensors");
  json const alone = metrics(work, "alone", {"c.safetensors", "d.safetensors", "--cross-cka"});
  comparison c{1e-6};
  c.all(masked.at("comparison"), alone.at("comparison"));
  CHECK(c.numbers > 40);

  mask[4] = 0;
  b.beside["attention_mask"] = mask;
  b.write(work / "e.safetensors");
  check_refused(work, {"a.safetensors", "e.safetensors", "--cross-cka", "-o", "out"},
                {"--cross-cka: masks leave out other tokens"});
  json const apart = metrics(work, "apart", {"a.safetensors", "e.safetensors"});
  CHECK(apart.at("comparison").at("same_tokens") == false);
}

TEST_CASE("shards: a mask of all tokens, positions in the file, ranks") {
  folder const work;
  capture x(2, 30, 4, 12);
  x.at("block.1", 25, 2) = missing;
  x.at("block.1", 4, 0) = missing;
  x.write(work / "x.safetensors");
  std::vector<std::ptrdiff_t> low, high;
  for (std::ptrdiff_t i = 0; i < 30; ++i) (i < 17 ? low : high).push_back(i);
  x.rows(low, 0).write(work / "low.safetensors"), x.rows(high, 0).write(work / "high.safetensors");
  integers mask(30, 1);
  for (std::size_t const i : {1u, 2u, 4u, 20u}) mask[i] = 0;
  rflow::write_npy(work / "mask.npy", mask, {30});
  arguments const both{"--shards", "low.safetensors", "high.safetensors", "--mask", "mask.npy"};
  json const m = model(work, "both", both);
  CHECK(m.at("tokens").at("used") == 26);
  CHECK(m.at("tokens").at("left_out").at(0) == json{{"why", "--mask mask.npy"}, {"tokens", 4}});
  CHECK(m.at("warnings").dump().find("first at token 25, feature 2") != std::string::npos);
  json const file = model(work, "file", {"x.safetensors", "--mask", "mask.npy"});
  CHECK(file.at("warnings").dump().find("first at token 25, feature 2") != std::string::npos);
  comparison c{1e-12};
  c.all(m.at("variance"), file.at("variance"));
  // The second file alone may be left out.
  CHECK(model(work, "first",
              {"--shards", "low.safetensors", "high.safetensors", "--tokens", "5:17", "--cka",
               "full"})
            .at("tokens")
            .at("used") == 12);
  integers const few(29, 1);
  rflow::write_npy(work / "few.npy", few, {29});
  check_refused(
      work, {"--shards", "low.safetensors", "high.safetensors", "--mask", "few.npy", "-o", "out"},
      {"few.npy: ", "29 values for 30 tokens"});
#ifdef RFLOW_REPORT_MPI
  ::setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
  ::setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
  ::setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 1);
  ::setenv("ASAN_OPTIONS", "detect_leaks=0", 1);  // MPI keeps memory to its end
  for (arguments const& cka : {arguments{"--cka", "minibatch"}, arguments{"--cka", "full"}}) {
    std::string const name = "ranks-" + cka[1];
    arguments more{"-n", "2", RFLOW_REPORT_MPI, "--no-plots", "--quiet", "-o", name};
    more.insert(more.end(), both.begin(), both.end());
    more.insert(more.end(), cka.begin(), cka.end());
    outcome const o = program::run(RFLOW_MPIRUN, work, more);
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    json const ranks = json::parse(read(work.path / name / "metrics.json")).at("models").at(0);
    arguments one = both;
    one.insert(one.end(), cka.begin(), cka.end());
    comparison all{1e-6};
    all.all(ranks, model(work, name + "-one", one));
    CHECK(all.numbers > 50);
  }
#endif
}

TEST_CASE("a group of outliers is found, summed, and set apart") {
  folder const work;
  // Few tokens for their width take the way over kernel matrices, many the other.
  struct extents {
    std::ptrdiff_t tokens, width;
  };
  for (extents const size : {extents{60, 24}, extents{700, 3}}) {
    std::ptrdiff_t const n = size.tokens, d = size.width;
    CAPTURE(n);
    capture x(3, n, d, 13);
    std::vector<std::ptrdiff_t> const group{2, 9, 17, 23, 31, 38, 44, 59};
    for (std::string const site : {"block.2", "block.3"})
      for (std::ptrdiff_t const i : group)
        for (std::ptrdiff_t j = 0; j < d; ++j) {
          float& v = x.at(site, i, j);
          v = (v < 0 ? -1.0f : 1.0f) * (1 + std::abs(v)) * 12;
        }
    std::string const name = "x" + std::to_string(n);
    x.write(work / (name + ".safetensors"));
    json const m = model(work, name, {name + ".safetensors"});
    json const& o = m.at("outliers");
    CHECK(o.at("count") == json{0, 0, 8, 8});
    CHECK(o.at("tokens") == json(group));
    CHECK(o.at("sites") == json{"block.2", "block.3"});
    CHECK(o.at("matter") == true);
    for (json const& ratio : o.at("ratio")) CHECK(ratio > 5);

    // The share by its definition.
    std::vector<double> mean(static_cast<std::size_t>(d));
    auto const value = [&](std::ptrdiff_t i, std::ptrdiff_t j) {
      return static_cast<double>(x.at("block.2", i, j));
    };
    for (std::ptrdiff_t i = 0; i < n; ++i)
      for (std::ptrdiff_t j = 0; j < d; ++j)
        mean[static_cast<std::size_t>(j)] += value(i, j) / static_cast<double>(n);
    double total = 0, of_group = 0;
    auto const in_group = [&](std::ptrdiff_t i) {
      return std::find(group.begin(), group.end(), i) != group.end();
    };
    for (std::ptrdiff_t i = 0; i < n; ++i)
      for (std::ptrdiff_t k = 0; k < n; ++k) {
        if (i == k) continue;
        double product = 0;
        for (std::ptrdiff_t j = 0; j < d; ++j)
          product += (value(i, j) - mean[static_cast<std::size_t>(j)]) *
                     (value(k, j) - mean[static_cast<std::size_t>(j)]);
        total += product * product;
        if (in_group(i) || in_group(k)) of_group += product * product;
      }
    double const share = o.at("kernel_share").at("values").at(2);
    CHECK(std::abs(share - of_group / total) < 1e-5);

    // Without them: what a report of the other tokens says, and the note's advice leads to it.
    std::string const note = m.at("warnings").dump();
    auto const at = note.find("--tokens ");
    REQUIRE(at != std::string::npos);
    std::string const ranges = note.substr(at + 9, note.find(' ', at + 9) - at - 9);
    json const rest = model(work, name + "-rest", {name + ".safetensors", "--tokens", ranges});
    CHECK(rest.at("tokens").at("used") == n - 8);
    CHECK(rest.at("outliers").at("tokens").empty());
    CHECK(rest.at("outliers").at("without").is_null());
    json const &with = o.at("with"), &without = o.at("without");
    auto const headline = [&](json const& h, json const& of) {
      comparison c{1e-9};
      c.all(h.at("inter_token_cosine"), of.at("inter_token_cosine"));
      c.all(h.at("st1"), of.at("variance").at("st1"));
      c.all(h.at("st2"), of.at("variance").at("st2"));
      for (char const* const by : {"debiased", "biased"}) {
        json const& cka = h.at("cka").at(by);
        json const& table = of.at("cka").at(0).at(by).at("values");
        c.all(cka.at("first_to_last").at("value"), table.at(0).at(3));
        for (std::size_t l = 0; l < 3; ++l)
          c.all(cka.at("adjacent").at("values").at(l), table.at(l).at(l + 1));
      }
      CHECK(c.numbers == 14);
    };
    headline(with, m);
    headline(without, rest);
    CHECK(read(work.path / name / "report.html").find("With and without outlying tokens") !=
          std::string::npos);
    // RBF alone has no kernel share; the norms say enough.
    json const rbf = model(work, name + "-rbf", {name + ".safetensors", "--kernel", "rbf"});
    CHECK(rbf.at("outliers").at("kernel_share").at("status").at(2) == "not_requested");
    CHECK(rbf.at("outliers").at("tokens") == json(group));
    CHECK(rbf.at("outliers").at("without").at("cka").at("kernel") == "rbf");
    // The same bytes for every number of threads.
    for (char const* const threads : {"1", "3"})
      CHECK(model(work, name + "-" + threads, {name + ".safetensors", "--threads", threads}) == m);
  }
}

TEST_CASE("one token that decides everything is told of, whichever way the products are formed") {
  folder const work;
  struct extents {
    std::ptrdiff_t tokens, width;
  };
  // The first goes over kernel matrices, the second over features.
  for (extents const size : {extents{40, 64}, extents{700, 3}})
    for (bool const massive : {true, false}) {
      CAPTURE(size.tokens);
      CAPTURE(massive);
      capture x(2, size.tokens, size.width, 15);
      for (std::ptrdiff_t j = 0; massive && j < size.width; ++j) x.at("block.2", 17, j) *= 3000;
      x.write(work / "x.safetensors");
      std::string const name = "r" + std::to_string(size.tokens) + (massive ? "m" : "");
      json const m = model(work, name, {"x.safetensors", "--kernel", "linear"});
      json const& share = m.at("cka").at(0).at("top_token_share");
      std::string const said = m.at("warnings").dump();
      CHECK(share.at("status").at(2) == "ok");
      CHECK((said.find("block.2: token 17 makes up more than half of the linear kernel matrix") !=
             std::string::npos) == massive);
      if (!massive) continue;
      CHECK(share.at("token").at(2) == 17);
      CHECK(share.at("values").at(2) > 0.9);
    }
}

TEST_CASE("outliers beside masks, and where there are none") {
  folder const work;
  capture plain(3, 80, 16, 14);
  plain.write(work / "plain.safetensors");
  json const ordinary = model(work, "plain", {"plain.safetensors"}).at("outliers");
  CHECK(ordinary.at("count") == json{0, 0, 0, 0});
  CHECK(ordinary.at("tokens").empty());
  CHECK(ordinary.at("without").is_null());
  CHECK(ordinary.at("matter") == false);

  // Those that a mask leaves out are none, and token numbers are the file's.
  integers mask(80, 1);
  for (std::ptrdiff_t const i : {0, 1, 20, 30, 70}) {
    for (std::ptrdiff_t j = 0; j < 16; ++j) plain.at("block.2", i, j) *= 40;
    if (i < 20) mask[static_cast<std::size_t>(i)] = 0;
  }
  plain.beside["attention_mask"] = mask;
  plain.write(work / "masked.safetensors");
  json const m = model(work, "masked", {"masked.safetensors"});
  CHECK(m.at("outliers").at("tokens") == json{20, 30, 70});
  CHECK(m.at("warnings").dump().find(": 20, 30, 70; ") != std::string::npos);
  json const shards = model(work, "shards", {"--shards", "masked.safetensors"});
  CHECK(shards.at("outliers").is_null());

  // A large mean does not hide what is far from it.
  capture shifted(3, 80, 16, 16);
  for (std::ptrdiff_t i = 0; i < 80; ++i)
    for (std::ptrdiff_t j = 0; j < 16; ++j) {
      float& v = shifted.at("block.2", i, j);
      v = 50 + (i % 16 == 3 ? 20 : 1) * v;
    }
  shifted.write(work / "shifted.safetensors");
  json const far_out = model(work, "shifted", {"shifted.safetensors"}).at("outliers");
  CHECK(far_out.at("count") == json{0, 0, 5, 0});
  CHECK(far_out.at("tokens") == json{3, 19, 35, 51, 67});
  CHECK(far_out.at("kernel_share").at("values").at(2) > 0.5);

  // All tokens alike but for rounding: none is far out.
  for (std::ptrdiff_t i = 0; i < 80; ++i)
    for (std::ptrdiff_t j = 0; j < 16; ++j) shifted.at("block.2", i, j) = 50.3f;
  shifted.write(work / "constant.safetensors");
  json const constant = model(work, "constant", {"constant.safetensors"}).at("outliers");
  CHECK(constant.at("count") == json{0, 0, 0, 0});
  CHECK(constant.at("kernel_share").at("status").at(2) == "constant_layer");

  // A quarter of the tokens and more are no outliers.
  for (std::ptrdiff_t i = 0; i < 30; ++i)
    for (std::ptrdiff_t j = 0; j < 16; ++j) plain.at("block.3", i, j) *= 40;
  plain.beside.clear();
  plain.write(work / "wide.safetensors");
  json const wide = model(work, "wide", {"wide.safetensors"}).at("outliers");
  CHECK(wide.at("count").at(3) == 0);
  CHECK(wide.at("count").at(2) == 5);
}

TEST_CASE("a batch axis is sequences, and so are the rows of a mask") {
  folder const work;
  batch const b({4, 6, 5}, missing, 15);
  capture x = b.padded;
  x.beside.erase("sequences");
  x.write(work / "rows.safetensors");
  b.alone.write(work / "alone.safetensors");
  comparison c{1e-6};
  json const rows = model(work, "rows", {"rows.safetensors"});
  c.all(rows, model(work, "alone", {"alone.safetensors"}));
  CHECK(c.numbers > 100);
  CHECK(rows.at("sequences").at("from") == "attention_mask");
  CHECK(model(work, "none", {"rows.safetensors", "--sequences", "none"})
            .at("sequences")
            .at("count") == 1);

  x.batch = 3;
  x.write(work / "batch.safetensors");
  integers const some(18, 1);
  rflow::write_npy(work / "turned.npy", some, {6, 3});
  check_refused(work, {"batch.safetensors", "--mask", "turned.npy", "-o", "out"},
                {"one value a token expected, 3 x 6", "[6, 3]"});
  rflow::write_npy(work / "as-it-is.npy", some, {3, 6});
  CHECK(run(work, {"batch.safetensors", "--mask", "as-it-is.npy", "-o", "as-it-is"}).status == 0);
  for (arguments const& mode : {arguments{}, arguments{"--shards", "--cka-batch", "4"},
                                arguments{"--skip-first", "1", "--skip-last", "1"}}) {
    arguments one = mode, two = mode;
    one.push_back("batch.safetensors"), two.push_back("alone.safetensors");
    std::string const name = "batch-" + std::to_string(mode.size());
    json with_axis = model(work, name, one), without = model(work, name + "-alone", two);
    CHECK(with_axis.at("sequences").at("from") == "batch");
    with_axis.erase("warnings"), without.erase("warnings");  // one says that a batch was read
    c.all(with_axis, without);
  }
  x.batch = 0;

  report::options asked;
  report::capture file = report::load(work / "rows.safetensors", asked);
  file.sites.sequences = {0, 6, 12, 18};  // as the reading side says it
  report::token_choice const chosen = report::choose_tokens(file, asked);
  CHECK(chosen.sequences_from == "batch");
  CHECK(chosen.offsets == file.sites.sequences);
  CHECK(chosen.used == 15);
  CHECK(chosen.sequences() == 3);
  CHECK(chosen.begins_sequence(0));
  CHECK(chosen.begins_sequence(6));
  CHECK_FALSE(chosen.begins_sequence(7));
  CHECK(chosen.stored_token(3) == 3);
  CHECK(chosen.stored_token(4) == 6);
  CHECK(chosen.stored_token(14) == 16);
  asked.sequences = "none";
  CHECK(report::choose_tokens(file, asked).offsets == std::vector<std::ptrdiff_t>{0, 18});
  asked.sequences = "";
  file.sites.sequences = {0, 9, 18};  // another batch than the mask's
  CHECK_THROWS_WITH_AS(report::choose_tokens(file, asked),
                       doctest::Contains("2 x 9, found 'attention_mask'"), report::unusable);
}

TEST_CASE("masks of floats: exactly 0 and 1") {
  folder const work;
  capture x(2, 12, 4, 31);
  x.beside["attention_mask"] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0};
  x.write(work / "right.safetensors");
  json const right = model(work, "right", {"right.safetensors"});
  x.beside.clear();
  x.write(work / "bare.safetensors");

  std::vector<float> floats{1, 1, 1, 1, 1, 1, 1, 1, 1, 0, -0.0f, 0};
  std::vector<double> const doubles(floats.begin(), floats.end());
  std::vector<std::uint16_t> f16, bf16;
  for (float const v : floats) {
    f16.push_back(v == 1 ? 0x3c00 : 0);
    bf16.push_back(v == 1 ? 0x3f80 : 0);
  }
  auto const write = [&](auto const& values, rflow::dtype type) {
    std::vector<rflow::tensor> tensors;
    for (auto const& [name, site] : x.sites)
      tensors.push_back(rflow::as_tensor(name, site, {12, 4}));
    tensors.push_back(rflow::as_tensor("attention_mask", values, {12}));
    tensors.back().type = type;
    rflow::write_safetensors(work / "x.safetensors", tensors);
  };
  auto const check = [&](std::string const& name) {
    CAPTURE(name);
    comparison same{0};
    same.all(model(work, name, {"x.safetensors"}), right);
    CHECK(same.numbers > 20);
    CHECK(model(work, name + "-shards", {"--shards", "x.safetensors"}).at("tokens").at("used") ==
          9);
  };
  write(floats, rflow::dtype::f32), check("f32");
  write(doubles, rflow::dtype::f64), check("f64");
  write(f16, rflow::dtype::f16), check("f16");
  write(bf16, rflow::dtype::bf16), check("bf16");
  rflow::write_npy(work / "mask.npy", floats, {12});
  CHECK(model(work, "npy", {"bare.safetensors", "--mask", "mask.npy"}).at("tokens").at("used") ==
        9);

  // A mask to be added to scores is none.
  for (float const v : {0.5f, -1e9f, missing, std::numeric_limits<float>::infinity()}) {
    floats[4] = v;
    write(floats, rflow::dtype::f32);
    check_refused(work, {"x.safetensors", "-o", "out"},
                  {"'attention_mask' holds ", " at token 4; 0 or 1 expected, where 1 keeps a token",
                   "--no-mask"});
  }
}

TEST_CASE("a tensor called mask is offered, not taken") {
  folder const work;
  capture x(2, 12, 4, 32);
  integers const mask{1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0};
  auto const notes = [&](arguments more) {
    more.insert(more.begin(), "x.safetensors");
    x.write(work / "x.safetensors");
    std::filesystem::remove_all(work.path / "r");
    json const m = model(work, "r", more);
    CHECK(m.at("tokens").at("used") ==
          (std::find(more.begin(), more.end(), "--mask") == more.end() ? 12 : 9));
    return m.at("warnings").dump();
  };
  auto const offered = [](std::string const& all) {
    return all.find("--mask mask leaves the tokens out where it is 0") != std::string::npos;
  };
  x.beside["mask"] = mask;
  CHECK(offered(notes({})));
  CHECK(offered(notes({"--shards"})));
  CHECK_FALSE(offered(notes({"--mask", "mask"})));
  CHECK_FALSE(offered(notes({"--no-mask"})));
  x.shapes["mask"] = {3, 4};
  CHECK(offered(notes({})));
  x.shapes.clear();
  // Of other sizes, values or without a 0 it is no mask that leaves out a part of the tokens.
  for (integers const& other : {integers(12, 1), integers(12), integers(11, 1), integers(24),
                                integers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}}) {
    x.beside["mask"] = other;
    CHECK_FALSE(offered(notes({})));
  }
  // Nor where another mask has left out the same tokens.
  x.beside = {{"mask", mask}, {"attention_mask", mask}};
  x.write(work / "both.safetensors");
  json const both = model(work, "both", {"both.safetensors"});
  CHECK(both.at("tokens").at("used") == 9);
  CHECK_FALSE(offered(both.at("warnings").dump()));
}

TEST_CASE("rows of zeros name the mask, and the mask takes them out") {
  folder const work;
  capture x(2, 12, 4, 33);
  for (char const* const site : {"embed", "block.1", "block.2"})
    for (std::ptrdiff_t token = 9; token < 12; ++token)
      for (std::ptrdiff_t k = 0; k < 4; ++k) x.at(site, token, k) = 0;
  x.beside["keep"] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0};
  x.write(work / "x.safetensors");
  for (arguments const& mode : {arguments{}, arguments{"--shards"}}) {
    arguments more = mode;
    more.push_back("x.safetensors");
    std::string const notes =
        model(work, "r" + std::to_string(mode.size()), more).at("warnings").dump();
    CHECK(notes.find("3 tokens of zeros, left out of the cosines; St1, St2 and CKA count them. If "
                     "they are padding, a mask (--mask)") != std::string::npos);
    more.insert(more.end(), {"--mask", "keep"});
    std::string const masked =
        model(work, "m" + std::to_string(mode.size()), more).at("warnings").dump();
    CHECK(masked.find("of zeros") == std::string::npos);
  }
}

TEST_CASE("a tensor of sequences with a number a token: what is expected, and the cure") {
  folder const work;
  capture x(2, 12, 5, 34);
  x.beside["sequences"] = {0, 5, 12};
  x.write(work / "right.safetensors");
  json const right = model(work, "right", {"right.safetensors"}).at("inter_token_cosine");
  for (char const* const name : {"sequences", "cu_seqlens"}) {
    CAPTURE(name);
    x.beside = {{name, {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1}}};
    x.write(work / "x.safetensors");
    std::string const cure =
        std::string("--sequences ") + name + " takes it for the number of each token's sequence";
    check_refused(work, {"x.safetensors", "-o", "out"},
                  {"as offsets of sequences do (0 … 12)", cure, "--sequences none"});
    check_refused(work, {"--shards", "x.safetensors", "-o", "out"}, {cure});
    CHECK(model(work, name, {"x.safetensors", "--sequences", name}).at("inter_token_cosine") ==
          right);
    // It has a number for each token only if there are as many.
    x.beside = {{name, {0, 0, 0, 1, 1}}};
    x.write(work / "few.safetensors");
    outcome const o = run(work, {"few.safetensors", "-o", "out"});
    CHECK(o.status == 1);
    CHECK(o.err.find(cure) == std::string::npos);
    CHECK(o.err.find("--sequences none") != std::string::npos);
  }
}

TEST_CASE("tables and summary say what they are") {
  folder const work;
  capture x(3, 12, 4, 35);
  x.write(work / "x.safetensors");
  for (arguments const& mode : {arguments{}, arguments{"--shards"}}) {
    arguments more = mode;
    std::string const name = "r" + std::to_string(mode.size());
    more.insert(more.end(), {"x.safetensors", "-o", name, "--normalization", "per_token"});
    outcome const o = run(work, more);
    REQUIRE(o.status == 0);
    CHECK(o.out.find("path energy (per_token)") != std::string::npos);
    CHECK((o.out.find("groups of outlying tokens are looked for in single files only") !=
           std::string::npos) == (mode.size() == 1));
    std::string const blocks = read(work.path / name / "blocks.csv");
    std::size_t at = blocks.find('\n');
    CHECK(blocks.substr(0, at).ends_with(",curvature,status,curvature_status"));
    for (int l = 0; l < 3; ++l) {
      std::size_t const end = blocks.find('\n', at + 1);
      std::string const line = blocks.substr(at + 1, end - at - 1);
      CAPTURE(line);
      CHECK(line.ends_with(",,ok,too_few_sites") == (l == 0));
      CHECK(line.ends_with(",ok,ok") == (l > 0));
      at = end;
    }
  }
}
