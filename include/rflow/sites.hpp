// SPDX-License-Identifier: Apache-2.0
#pragma once

// Finds the sites of a model (embed, block.1 … block.L, final_norm; or by the names of other tools,
// names.hpp) in a file of named tensors, or in one array, and makes a layer_stack of them. For
// activations that are in memory already, build the layer_stack directly.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <rflow/file.hpp>
#include <rflow/names.hpp>
#include <rflow/widen.hpp>

namespace rflow {

/// The sites of one model, in the order of the residual stream. All have the same type, rank 2
/// and number of tokens; from a file they may differ in width (models with stages). Valid as long as the file they came from (copies share what was
/// copied).
struct site_set {
  std::vector<tensor> chain;         ///< embed if there is one, then the raw output of each block
  std::optional<tensor> final_norm;  ///< not part of the chain
  /// Where each sequence begins among the tokens, then n; empty if there is but one. A batch axis
  /// becomes this.
  std::vector<std::ptrdiff_t> sequences;
  /// l of each site of the chain: 0 the embedding, l the output of block l. Ascending; it may have
  /// holes. Empty: 0, 1, 2, …
  std::vector<std::ptrdiff_t> layers;
  std::vector<site_note> notes;  ///< how names and axes were read
  bool is_list = false;          ///< by its names a list whose last may be the final norm
  std::shared_ptr<void const> storage = {};  ///< of sites that had to be copied
  std::size_t storage_bytes = 0;             ///< what that takes
  /// What the file stores in several types, or in 8-bit floats, is widened exactly, into copies.
  widening widened;

  /// What all are stored as.
  dtype type() const { return chain.front().type; }
  /// n.
  std::ptrdiff_t tokens() const { return chain.front().shape[0]; }
  /// d of the first site.
  std::ptrdiff_t width() const { return chain.front().shape[1]; }
  /// Whether all sites of the chain have that width.
  bool one_width() const {
    return std::all_of(chain.begin(), chain.end(),
                       [&](tensor const& site) { return site.shape[1] == width(); });
  }

  /// l of a site of the chain.
  std::ptrdiff_t layer(std::size_t site) const {
    return layers.empty() ? static_cast<std::ptrdiff_t>(site) : layers[site];
  }

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

/// An array of one site as tokens × hidden, and how many sequences it holds.
struct flat_site {
  tensor x;
  std::ptrdiff_t batch = 1;
};

/// The letters of axes, each at most once, with t and h.
inline void require_axes(char const* where, std::string const& letters) {
  std::string sorted = letters;
  std::sort(sorted.begin(), sorted.end());
  if (sorted != "ht" && sorted != "bht" && sorted != "hst" && sorted != "bhst")
    throw site_error(site_fault::bad_pattern,
                     std::string(where) + ": axes '" + printable(letters) +
                         "': t and h, and perhaps s and b, each once, expected");
}

/// Drops axes of 1, but the last, until as many are left.
inline void drop_ones(tensor& x, std::size_t axes) {
  for (std::size_t i = 0; x.shape.size() > axes && i + 1 < x.shape.size();) {
    if (x.shape[i] != 1) {
      ++i;
      continue;
    }
    auto const at = static_cast<std::ptrdiff_t>(i);
    x.shape.erase(x.shape.begin() + at);
    x.strides.erase(x.strides.begin() + at);
  }
}

/// Memory of arrays that were copied; shared, since their tensors look at it.
using copies = std::vector<std::shared_ptr<std::vector<std::byte> const>>;

inline void keep(copies all, site_set& sites) {
  for (auto const& bytes : all) sites.storage_bytes += bytes->size();
  if (!all.empty()) sites.storage = std::make_shared<copies>(std::move(all));
}

/// b × t × h as (b t) × h. Copied if no strides say that.
inline flat_site flattened(tensor x, std::string const& letters, copies& kept) {
  auto const axis = [&](char c) { return letters.find(c); };
  std::size_t const t = axis('t'), h = axis('h'), b = axis('b');
  std::ptrdiff_t const batch = b == std::string::npos ? 1 : x.shape[b];
  std::ptrdiff_t const step = b == std::string::npos ? 0 : x.strides[b];
  std::ptrdiff_t const tokens = x.shape[t], hidden = x.shape[h];
  std::ptrdiff_t row = x.strides[t], col = x.strides[h];
  if (batch > 1 && tokens == 1) row = step;
  if (batch > 1 && tokens > 1 && step != tokens * row) {
    std::size_t const item = bits(x.type) / 8;
    auto copy = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(x.size()) * item);
    std::byte* to = copy->data();
    for (std::ptrdiff_t i = 0; i < batch; ++i)
      for (std::ptrdiff_t j = 0; j < tokens; ++j)
        for (std::ptrdiff_t k = 0; k < hidden; ++k, to += item)
          std::memcpy(to,
                      x.data + (i * step + j * row + k * col) * static_cast<std::ptrdiff_t>(item),
                      item);
    row = hidden, col = 1;
    x.data = copy->data();
    kept.push_back(std::move(copy));
  }
  x.shape = {batch * tokens, hidden};
  x.strides = {row, col};
  return {std::move(x), tokens == 1 ? 1 : batch};
}

/// Where the sequences of a batch begin, then n; empty for one sequence.
inline std::vector<std::ptrdiff_t> offsets_of(std::ptrdiff_t batch, std::ptrdiff_t tokens) {
  std::vector<std::ptrdiff_t> out;
  if (batch > 1)
    for (std::ptrdiff_t i = 0; i <= batch; ++i) out.push_back(i * (tokens / batch));
  return out;
}

inline site_note batch_note(tensor const& x, std::ptrdiff_t batch, std::ptrdiff_t tokens) {
  return {site_remark::batch,
          x.description() + " was read as " + std::to_string(batch) + " sequences of " +
              std::to_string(tokens / batch) + " tokens",
          ""};
}

[[noreturn]] inline void refuse_type(char const* where, std::string const& path,
                                     std::string const& axes, tensor const& x) {
  throw site_error(site_fault::not_activations,
                   std::string(where) + ": " + path + (path.empty() ? "" : ": ") +
                       "floating-point with the axes " + axes + " expected, found " +
                       x.description() + cure_of(x.type),
                   cure_of(x.type).find("open the .npy") == std::string::npos
                       ? ""
                       : std::string(to_string(x.type)));
}

/// The array of one site as tokens × hidden; by the letters, if there are some.
inline flat_site one_site(char const* where, std::string const& path, tensor x,
                          std::string const& axes, copies& kept) {
  if (!is_activation(x.type)) refuse_type(where, path, "tokens, hidden", x);
  tensor const stored = x;
  std::string letters = axes;
  if (letters.empty()) {
    drop_ones(x, 2);
    letters = x.rank() == 3 ? "bth" : "th";
  } else {
    drop_ones(x, letters.size());
    if (auto const b = letters.find('b'); b != std::string::npos && x.shape.size() < letters.size())
      letters.erase(b, 1);  // dropped, or never there
  }
  if (x.shape.size() != letters.size())
    refuse_type(where, path, axes.empty() ? "tokens, hidden" : "of '" + axes + "'", stored);
  if (x.size() == 0) {  // nothing bounds the other axes
    x.shape = {0, x.shape[letters.find('h')]};
    x.strides = {1, 1};
    return {std::move(x)};
  }
  return flattened(std::move(x), letters, kept);
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

/// The sites of one array. Index 0 is the embedding, the others are the raw outputs of blocks;
/// pattern.embed = "" says that all are blocks, pattern.last that the last is the final norm
/// (Hugging Face's hidden_states often end with it).
/// @param  x        axes as pattern.axes says (without s it is one site); else sites × tokens × hidden, or sites × batch ×
///                  tokens × hidden. A batch becomes sequences
/// @param  pattern  how to call the sites, besides
/// @throws site_error (std::invalid_argument) if x has other axes, is not of a floating type, or
///         an axis is empty
inline site_set split_sites(tensor x, site_pattern const& pattern = {}) {
  char const* const where = "rflow::split_sites";
  std::string const block = pattern.block.empty() ? "block.{}" : pattern.block;
  auto const mark = block.find("{}");
  if (mark == std::string::npos)
    throw site_error(site_fault::bad_pattern,
                     std::string(where) + ": the block pattern does not hold {}");
  std::string letters = pattern.axes;
  tensor const stored = x;
  if (letters.empty()) {
    detail::drop_ones(x, 4);
    letters = x.rank() == 3 ? "sth" : "sbth";
  } else {
    detail::require_axes(where, letters);
    detail::drop_ones(x, letters.size());
  }
  if (letters.find('s') == std::string::npos && x.shape.size() == letters.size()) {
    letters.insert(0, 1, 's');  // one site
    x.shape.insert(x.shape.begin(), 1);
    x.strides.insert(x.strides.begin(), 0);
  }
  std::size_t const sites = letters.find('s');
  if (!is_activation(x.type) || x.shape.size() != letters.size())
    detail::refuse_type(
        where, "", pattern.axes.empty() ? "sites, tokens, hidden" : "of '" + pattern.axes + "'",
        stored);
  if (x.size() == 0) detail::reject(where, "an empty axis in " + stored.description());
  bool const embedding = !pattern.embed || !pattern.embed->empty();
  std::ptrdiff_t count = x.shape[sites];
  bool const norm = pattern.last == list_end::norm;
  if (norm && count == 1)
    throw site_error(site_fault::two_roles,
                     std::string(where) + ": one site cannot be the chain and the final norm");

  site_set out;
  auto const item = static_cast<std::ptrdiff_t>(bits(x.type) / 8);
  std::ptrdiff_t const step = x.strides[sites] * item;
  x.shape.erase(x.shape.begin() + static_cast<std::ptrdiff_t>(sites));
  x.strides.erase(x.strides.begin() + static_cast<std::ptrdiff_t>(sites));
  letters.erase(sites, 1);
  detail::copies kept;
  std::ptrdiff_t batch = 1;
  for (std::ptrdiff_t l = 0; l < count; ++l, x.data += step) {
    bool const last = norm && l + 1 == count;
    std::ptrdiff_t const layer = l + (embedding ? 0 : 1);
    if (last)
      x.name =
          pattern.final_norm && !pattern.final_norm->empty() ? *pattern.final_norm : "final_norm";
    else if (layer == 0)
      x.name = pattern.embed.value_or("embed");
    else
      x.name = std::string(block).replace(
          mark, 2, std::to_string(layer - 1 + pattern.first_block.value_or(1)));
    detail::flat_site site = detail::flattened(x, letters, kept);
    batch = site.batch;
    if (last) {
      out.final_norm = std::move(site.x);
      continue;
    }
    out.layers.push_back(layer);
    out.chain.push_back(std::move(site.x));
  }
  detail::keep(std::move(kept), out);
  out.sequences = detail::offsets_of(batch, out.tokens());
  if (batch > 1) out.notes.push_back(detail::batch_note(stored, batch, out.tokens()));
  widen_sites(out);
  return out;
}

namespace detail {

/// The array of all sites of a file that has no names of sites: of as many axes as were said, or
/// what vLLM's connector writes, which is read without being told.
template <class File>
site_set sites_of_array(File& file, std::vector<std::string> const& names, site_pattern pattern) {
  char const* const where = "rflow::find_sites";
  std::string const path = file.path();
  auto const there = [&](char const* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  bool const said = !pattern.axes.empty();
  std::vector<site_note> notes;
  std::vector<tensor> found;
  if (!said && there("hidden_states") && there("token_ids")) {
    tensor const& x = file["hidden_states"];
    tensor const& ids = file["token_ids"];
    if (x.rank() == 3 && ids.rank() == 1 && ids.shape[0] == x.shape[0]) {
      found.push_back(x);
      pattern.axes = "tsh";
      std::string const count = std::to_string(x.shape[1]);
      notes.push_back({site_remark::recognised,
                       "names were recognised (vLLM's connector): 'hidden_states' is tokens x "
                       "layers x hidden",
                       ""});
      if (!pattern.embed) {
        pattern.embed = "";
        notes.push_back({site_remark::layers_unsaid,
                         "the file does not say which layers its " + count +
                             " are: taken for the outputs of blocks 1 to " + count,
                         ""});
      }
    }
  }
  if (found.empty())
    for (std::string const& name : names) {
      if (!pattern.array.empty() && name != pattern.array) continue;
      try {
        tensor const& x = file[name];
        if (!is_activation(x.type) || x.rank() < 3) continue;
        tensor fewer = x;
        if (said) drop_ones(fewer, pattern.axes.size());
        if (!pattern.array.empty() || !said || fewer.shape.size() == pattern.axes.size())
          found.push_back(x);
      } catch (format_error const&) {
        if (!pattern.array.empty()) throw;  // else a file of a folder that nobody asked for
      }
    }
  if (!pattern.array.empty() && found.empty())
    throw site_error(site_fault::several_arrays,
                     std::string(where) + ": " + path + ": " + printable(pattern.array) +
                         " is no array of three axes or more: " + some_of(names));
  if (said && found.size() > 1) {
    std::vector<std::string> which;
    for (tensor const& x : found) which.push_back(x.name);
    throw site_error(site_fault::several_arrays,
                     std::string(where) + ": " + path +
                         ": several arrays have that many axes: " + some_of(which),
                     found.front().name);
  }
  if (found.size() != 1)
    throw site_error(site_fault::not_recognised,
                     std::string(where) + ": " + path +
                         (said ? ": no array has the axes '" + pattern.axes + "': "
                               : ": no sites by a known name: ") +
                         some_of(names),
                     pattern.axes);
  if (!said && notes.empty())
    throw site_error(site_fault::axes_unclear,
                     std::string(where) + ": " + path + ": one array, " +
                         found.front().description() + ", and nothing says what its axes are",
                     found.front().rank() == 3   ? "sth"
                     : found.front().rank() == 4 ? "sbth"
                                                 : "");
  site_set out = split_sites(found.front(), pattern);
  out.is_list = notes.empty() && found.front().name.find("hidden_states") != std::string::npos;
  out.notes.insert(out.notes.begin(), notes.begin(), notes.end());
  return out;
}

}  // namespace detail

/// Finds the sites among the tensors of a file: by the pattern, and what it leaves out by the names
/// that tools write (names.hpp). Tensors of other names are left alone. Sites of more axes than
/// two are batch × tokens × hidden (or as pattern.axes says), and become sequences; axes of 1 are
/// dropped. If pattern.axes has sites, one array holds all of them. Sites of different types, and of
/// 8-bit floats, are widened (widen_sites).
/// @param  file  a safetensors_file, an npy_directory, or anything with path(), names() and
///               operator[](name) → tensor
/// @throws site_error (std::invalid_argument) naming the file and the site, of the kinds of
///         site_fault; std::invalid_argument if sites disagree in tokens. Also what the
///         file throws.
template <class File>
site_set find_sites(File& file, site_pattern const& pattern = {}) {
  char const* const where = "rflow::find_sites";
  std::vector<std::string> const names = file.names();
  std::string const path = file.path();
  if (!pattern.axes.empty()) detail::require_axes(where, pattern.axes);
  bool const array = pattern.axes.find('s') != std::string::npos;
  std::optional<site_names> const named = array ? std::nullopt : name_sites(path, names, pattern);
  if (!named) return detail::sites_of_array(file, names, pattern);

  site_set out;
  detail::copies kept;
  std::ptrdiff_t batch = 0;
  std::optional<tensor> reference;
  auto const open = [&](std::string const& name) {
    detail::flat_site site = detail::one_site(where, path, file[name], pattern.axes, kept);
    if (!reference) {
      reference = site.x;
      batch = site.batch;
    }
    if (site.x.shape[0] != reference->shape[0] || site.batch != batch)
      detail::reject(where, path + ": sites disagree: " + file[reference->name].description() +
                                ", but " + file[name].description());
    return site.x;
  };
  if (!named->embed.empty()) {
    out.chain.push_back(open(named->embed));
    out.layers.push_back(0);
  }
  for (numbered_site const& block : named->blocks) {
    out.chain.push_back(open(block.name));
    out.layers.push_back(block.layer);
  }
  if (!named->final_norm.empty()) out.final_norm = open(named->final_norm);
  detail::keep(std::move(kept), out);
  out.sequences = detail::offsets_of(batch, out.tokens());
  out.notes = named->notes;
  if (batch > 1)
    out.notes.push_back(detail::batch_note(file[out.chain.front().name], batch, out.tokens()));
  out.is_list = named->is_list;
  widen_sites(out);
  return out;
}

}  // namespace rflow
