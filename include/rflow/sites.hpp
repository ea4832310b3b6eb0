// SPDX-License-Identifier: Apache-2.0
#pragma once

// Finds the sites of a model (embed, block.1 … block.L, final_norm) in a file of named tensors,
// or in one 3-D array, and makes a layer_stack of them. For activations that are in memory already,
// build the layer_stack directly.

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <rflow/file.hpp>
#include <rflow/widen.hpp>

namespace rflow {

/// How sites are called in a file. "{}" stands for the number of the block, without leading zeros.
struct site_pattern {
  std::string embed = "embed";            ///< output of the embedding
  std::string block = "block.{}";         ///< raw output of a block
  std::string final_norm = "final_norm";  ///< output of the last norm
  std::ptrdiff_t first_block = 1;         ///< 0 for files that count from 0
};

/// The sites of one model, in the order of the residual stream. All have the same type, rank 2,
/// number of tokens and width. Valid as long as the file they came from; copies of widened sites
/// are shared by all copies of the set.
struct site_set {
  std::vector<tensor> chain;         ///< embed, then the raw output of each block
  std::optional<tensor> final_norm;  ///< not part of the chain
  /// Where each sequence begins among the tokens, then n; empty if there is but one. A batch axis
  /// becomes this.
  std::vector<std::ptrdiff_t> sequences;
  /// What the file stores in several types, or in 8-bit floats, is widened exactly, into copies.
  widening widened;

  /// What all are stored as.
  dtype type() const { return chain.front().type; }
  /// n.
  std::ptrdiff_t tokens() const { return chain.front().shape[0]; }
  /// d.
  std::ptrdiff_t width() const { return chain.front().shape[1]; }

  /// The names of the chain, as in the file.
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (tensor const& site : chain) out.push_back(site.name);
    return out;
  }

  /// The chain as a stack with names.
  /// @throws std::invalid_argument if the sites are of another type than T, or empty
  template <scalar T>
  layer_stack<T> stack() const {
    std::vector<view<T>> views;
    for (tensor const& site : chain) views.push_back(site.as<T>());
    return layer_stack<T>(views, names());
  }
};

/// Calls f with the layer_stack of the chain, in whatever type it is stored: layer_stack<f16>,
/// <bf16>, <float> or <double>. All four calls must return the same type.
template <class Function>
auto visit(site_set const& sites, Function&& f) {
  switch (sites.type()) {
    case dtype::f16: return f(sites.stack<f16>());
    case dtype::bf16: return f(sites.stack<bf16>());
    case dtype::f64: return f(sites.stack<double>());
    default: return f(sites.stack<float>());
  }
}

namespace detail {

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

}  // namespace detail

/// Brings all sites of a set to one type that views exist of (see widen_to_one) and says so in the
/// set. Cost: none where they have one already; else the copies that widen_to_one states.
/// @throws std::invalid_argument naming the site if one is not of a floating type
inline void widen_sites(site_set& sites) {
  std::vector<tensor*> all;
  for (tensor& site : sites.chain) all.push_back(&site);
  if (sites.final_norm) all.push_back(&*sites.final_norm);
  sites.widened = widen_to_one(all);
}

/// Finds the sites among the tensors of a file. Tensors of other names are left alone; final_norm
/// may be absent. Sites of different types, and of 8-bit floats, are widened (widen_sites).
/// @param  file  a safetensors_file, an npy_directory, or anything with path(), names() and
///               operator[](name) → tensor
/// @throws std::invalid_argument naming the file and the site if the embedding or a block is
///         missing, if a site is not of rank 2 or not a floating type, or if sites disagree in
///         tokens or width; and if pattern.block does not hold "{}" once. Also what the file
///         throws.
template <class File>
site_set find_sites(File& file, site_pattern const& pattern = {}) {
  char const* const where = "rflow::find_sites";
  auto const mark = pattern.block.find("{}");
  if (mark == std::string::npos || pattern.block.find("{}", mark + 2) != std::string::npos)
    detail::reject(where, "the block pattern '" + pattern.block + "' does not hold {} once");
  std::string_view const before = std::string_view(pattern.block).substr(0, mark);
  std::string_view const after = std::string_view(pattern.block).substr(mark + 2);

  bool has_embed = false, has_final_norm = false;
  std::map<std::ptrdiff_t, std::string> blocks;
  for (std::string const& name : file.names()) {
    has_embed = has_embed || name == pattern.embed;
    has_final_norm = has_final_norm || name == pattern.final_norm;
    if (name.size() <= before.size() + after.size() || !name.starts_with(before) ||
        !name.ends_with(after))
      continue;
    char const* const first = name.data() + before.size();
    char const* const last = name.data() + name.size() - after.size();
    std::ptrdiff_t number = -1;
    auto const [stop, error] = std::from_chars(first, last, number);
    bool const leading_zero = *first == '0' && last - first > 1;
    if (error == std::errc{} && stop == last && number >= 0 && !leading_zero && *first != '-')
      blocks.emplace(number, name);
  }

  auto const block_name = [&](std::ptrdiff_t number) {
    return std::string(before) + std::to_string(number) + std::string(after);
  };
  std::string const path = file.path();
  auto const refuse_without = [&](std::string const& name) {
    detail::reject(where, path + ": " + name + " is missing: " + detail::some_of(file.names()));
  };
  if (!has_embed) refuse_without(pattern.embed);
  if (blocks.empty()) refuse_without(block_name(pattern.first_block));
  if (blocks.begin()->first < pattern.first_block)
    detail::reject(where, path + ": " + blocks.begin()->second +
                              " is there, but blocks count from " +
                              std::to_string(pattern.first_block));
  std::ptrdiff_t expected = pattern.first_block;
  std::string previous = pattern.embed;
  for (auto const& [number, name] : blocks) {
    if (number != expected)
      detail::reject(where, path + ": " + block_name(expected) + " is missing: " + previous +
                                " and " + name + " are there");
    previous = name;
    ++expected;
  }

  site_set out{};
  out.chain.push_back(file[pattern.embed]);
  for (auto const& [number, name] : blocks) out.chain.push_back(file[name]);
  if (has_final_norm) out.final_norm = file[pattern.final_norm];

  tensor const& reference = out.chain.front();
  auto const compare = [&](tensor const& site) {
    if (!is_activation(site.type) || site.rank() != 2)
      detail::reject(where, path +
                                ": floating-point with the axes tokens, hidden expected, found " +
                                site.description() + detail::cure_of(site.type));
    if (site.shape != reference.shape)
      detail::reject(where, path + ": sites disagree: " + reference.description() + ", but " +
                                site.description());
  };
  for (tensor const& site : out.chain) compare(site);
  if (out.final_norm) compare(*out.final_norm);
  widen_sites(out);
  return out;
}

/// The sites of one array, axes sites × tokens × hidden. Index 0 is the embedding, the others are
/// the raw outputs of blocks; the array must hold no final norm (Hugging Face's hidden_states end
/// with one: leave that out).
/// @throws std::invalid_argument if x is not of rank 3, not a floating type, or an axis is empty
inline site_set split_sites(tensor const& x, site_pattern const& pattern = {}) {
  char const* const where = "rflow::split_sites";
  auto const mark = pattern.block.find("{}");
  if (mark == std::string::npos) detail::reject(where, "the block pattern does not hold {}");
  if (!is_activation(x.type) || x.rank() != 3)
    detail::reject(where, "floating-point with the axes sites, tokens, hidden expected, found " +
                              x.description() + detail::cure_of(x.type));
  if (x.size() == 0) detail::reject(where, "an empty axis in " + x.description());
  site_set out;
  auto const item = static_cast<std::ptrdiff_t>(bits(x.type) / 8);
  for (std::ptrdiff_t l = 0; l < x.shape[0]; ++l) {
    std::string name = pattern.embed;
    if (l > 0)
      name =
          std::string(pattern.block).replace(mark, 2, std::to_string(l - 1 + pattern.first_block));
    out.chain.push_back({std::move(name),
                         x.type,
                         {x.shape[1], x.shape[2]},
                         {x.strides[1], x.strides[2]},
                         x.data + l * x.strides[0] * item});
  }
  widen_sites(out);
  return out;
}

}  // namespace rflow
