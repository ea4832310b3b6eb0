// SPDX-License-Identifier: Apache-2.0
// The sites of a model, found in what a file holds.
#include <rflow/sites.hpp>

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

}  // namespace

TEST_CASE("sites are found in the order of the stream") {
  std::vector<std::string> names = {"embed",   "final_norm", "tokens",
                                    "block.x", "block.",     "block.01"};
  for (int i = 1; i <= 12; ++i) names.push_back("block." + std::to_string(i));
  auto const file = model(names);
  auto const sites = rflow::find_sites(file);
  REQUIRE(sites.chain.size() == 13);
  CHECK(sites.names()[0] == "embed");
  CHECK(sites.names()[1] == "block.1");  // not block.01
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
  CHECK(contains(site_error(file, {.embed = "wte", .block = "h.{}.out"}),
                 "h.0.out is there, but blocks count from 1"));
  CHECK(contains(site_error(file, {.block = "h"}), "does not hold {} once"));
  CHECK(contains(site_error(file, {.block = "{}{}"}), "does not hold {} once"));
}

TEST_CASE("a missing site is named") {
  CHECK(site_error(model({"embed", "block.1", "block.2", "block.4", "block.5"})) ==
        "rflow::find_sites: model: block.3 is missing: block.2 and block.4 are there");
  CHECK(contains(site_error(model({"embed", "block.2"})),
                 "block.1 is missing: embed and block.2 are there"));
  CHECK(contains(site_error(model({"embed", "block.1", "block.9223372036854775807"})),
                 "block.2 is missing"));
  CHECK(contains(site_error(model({"embed", "block.1", "block.99999999999999999999"})),
                 "nothing thrown"));  // no number: another tensor
  CHECK(contains(site_error(model({"block.1"})), "model: embed is missing: block.1 is there"));
  CHECK(contains(site_error(model({"embed"})), "model: block.1 is missing: embed is there"));
  CHECK(contains(site_error(model({"embed", "block.-1"})), "block.1 is missing"));
  CHECK(contains(site_error(model({})), "embed is missing: nothing is there"));
  CHECK(contains(site_error(model({"wte", "h.0", "h.1", "h.2", "h.3", "h.4"})),
                 "embed is missing: h.0, h.1, h.2, h.3 and 2 more are there"));
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
  CHECK(contains(changed([](auto& x) { x.shape = {4, 2}; }), "sites disagree"));
  CHECK(changed([](auto& x) { x.type = dtype::bf16; }) == "nothing thrown");  // it is widened
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
