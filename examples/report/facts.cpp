// SPDX-License-Identifier: Apache-2.0
#include "facts.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <optional>

#include "text.hpp"

namespace report {
namespace {

/// Element i of a tensor of activations.
double element(rflow::tensor const& x, std::ptrdiff_t i) {
  switch (x.type) {
    case rflow::dtype::f16: return x.elements<rflow::f16>()[i];
    case rflow::dtype::bf16: return x.elements<rflow::bf16>()[i];
    case rflow::dtype::f64: return x.elements<double>()[i];
    default: return static_cast<double>(x.elements<float>()[i]);
  }
}

/// Rows to look at: all of a few, else every so many.
std::ptrdiff_t stride_of(std::ptrdiff_t rows, std::ptrdiff_t most) {
  return std::max<std::ptrdiff_t>(1, rows / most);
}

/// (greatest − least) / mean of the norms of up to 256 rows; none with fewer than 4 rows, or where
/// the norms are 0 or not finite.
std::optional<double> spread_of_norms(rflow::tensor const& x) {
  std::ptrdiff_t const rows = x.shape[0], step = stride_of(rows, 256);
  if (rows < 4) return std::nullopt;
  double least = HUGE_VAL, most = 0, sum = 0;
  int count = 0;
  for (std::ptrdiff_t i = 0; i < rows; i += step, ++count) {
    double square = 0;
    for (std::ptrdiff_t k = 0; k < x.shape[1]; ++k) {
      double const v = element(x, i * x.strides[0] + k * x.strides[1]);
      square += v * v;
    }
    double const norm = std::sqrt(square);
    least = std::min(least, norm);
    most = std::max(most, norm);
    sum += norm;
  }
  if (!(sum > 0) || !std::isfinite(sum)) return std::nullopt;
  return (most - least) / (sum / count);
}

/// The median of the norms of up to 256 rows that are finite; none if it is not above 0.
std::optional<double> median_norm(rflow::tensor const& x) {
  std::vector<double> norms;
  for (std::ptrdiff_t i = 0; i < x.shape[0]; i += stride_of(x.shape[0], 256)) {
    double square = 0;
    for (std::ptrdiff_t k = 0; k < x.shape[1]; ++k) {
      double const v = element(x, i * x.strides[0] + k * x.strides[1]);
      square += v * v;
    }
    if (std::isfinite(square)) norms.push_back(std::sqrt(square));
  }
  if (norms.empty()) return std::nullopt;
  auto const middle = norms.begin() + std::ssize(norms) / 2;
  std::nth_element(norms.begin(), middle, norms.end());
  return *middle > 0 ? std::optional(*middle) : std::nullopt;
}

/// Cosine of a row of one site with a row of another.
double cosine_of(rflow::tensor const& x, std::ptrdiff_t i, rflow::tensor const& y,
                 std::ptrdiff_t j) {
  double ab = 0, aa = 0, bb = 0;
  for (std::ptrdiff_t k = 0; k < x.shape[1]; ++k) {
    double const a = element(x, i * x.strides[0] + k * x.strides[1]);
    double const b = element(y, j * y.strides[0] + k * y.strides[1]);
    ab += a * b, aa += a * a, bb += b * b;
  }
  return ab / std::sqrt(aa * bb);
}

/// Mean cosine of neighbours along an axis (s, b or t) of what was read, over up to 64 pairs in each
/// of up to 16 places; none if there is no pair.
std::optional<double> neighbours(rflow::site_set const& sites, char along) {
  std::ptrdiff_t const batch = sites.sequences.empty() ? 1 : std::ssize(sites.sequences) - 1;
  std::ptrdiff_t const sizes[] = {std::ssize(sites.chain), batch, sites.tokens() / batch};
  std::size_t const axis = along == 's' ? 0 : along == 'b' ? 1 : 2;
  std::size_t const second = (axis + 1) % 3, third = (axis + 2) % 3;
  std::ptrdiff_t const places = sizes[second] * sizes[third];
  double sum = 0;
  int count = 0;
  for (std::ptrdiff_t place = 0; place < places; place += stride_of(places, 16))
    for (std::ptrdiff_t i = 0; i + 1 < sizes[axis]; i += stride_of(sizes[axis], 64)) {
      std::ptrdiff_t at[3];
      at[axis] = i, at[second] = place / sizes[third], at[third] = place % sizes[third];
      std::ptrdiff_t const row = at[1] * sizes[2] + at[2];
      rflow::tensor const& x = sites.chain[static_cast<std::size_t>(at[0])];
      ++at[axis];
      double const cosine =
          cosine_of(x, row, sites.chain[static_cast<std::size_t>(at[0])], at[1] * sizes[2] + at[2]);
      if (std::isfinite(cosine)) sum += cosine, ++count;
    }
  return count > 0 ? std::optional(sum / count) : std::nullopt;
}

char const* word_of(char axis) {
  return axis == 's' ? "sites" : axis == 'b' ? "batch" : axis == 't' ? "tokens" : "hidden";
}
std::string words_of(std::string const& letters) {
  std::string out;
  for (char const axis : letters) join(out, ",", word_of(axis));
  return out;
}

/// The order in which the sites are where another axis was. Of the others the batch comes first.
std::string with_sites_at(std::string letters, char where) {
  std::size_t const there = letters.find(where);
  std::string rest;
  for (char const axis : {'b', 't'})
    if (letters.find(axis) != std::string::npos) rest += axis;
  for (std::size_t i = 0, k = 0; i < letters.size(); ++i)
    if (i == there)
      letters[i] = 's';
    else if (letters[i] != 'h')
      letters[i] = rest[k++];
  return letters;
}

/// How often the norms of the last site are those of the one before, or the reverse, where that is far
/// more than any step before it but the embedding's; 0 else. A block may change norms by a factor of 4
/// (post-norm models); behind a norm with weights they can have any scale, and mostly another.
double jump_at_the_end(std::vector<rflow::tensor> const& chain) {
  constexpr std::size_t least_sites = 5;
  constexpr double least_factor = 8, times_the_others = 3;
  if (chain.size() < least_sites) return 0;
  double largest = 0, last = 0;
  std::optional<double> before;
  for (std::size_t l = 1; l < chain.size(); ++l) {
    std::optional<double> const norm = median_norm(chain[l]);
    if (!norm) return 0;
    if (before) {
      largest = std::max(largest, std::abs(last));
      last = std::log(*norm / *before);
    }
    before = norm;
  }
  bool const jumps =
      std::abs(last) >= std::log(least_factor) && std::abs(last) >= times_the_others * largest;
  return jumps ? std::exp(last) : 0;
}

std::optional<std::ptrdiff_t> whole(std::string const& text) {
  std::ptrdiff_t value = 0;
  auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

void require_clear_axes(std::string const& path, std::string const& stem, rflow::tensor const& x,
                        options const& asked) {
  if (!asked.pattern.axes.empty() || !rflow::is_activation(x.type)) return;
  auto const refuse = [&](std::string const& why, char const* orders) {
    throw unusable(path, x.description() + ": " + why + "; --axes " + orders + " says so");
  };
  std::vector<std::ptrdiff_t> const& n = x.shape;
  if (n.size() == 2)
    throw unusable(path, x.description() +
                             ": one site, tokens x hidden. Save all in one array, "
                             "numpy.stack(states) with the embedding first (sites x tokens x "
                             "hidden), or one file each in a folder (embed.npy, block.1.npy, …) "
                             "and give the folder; --axes tokens,hidden reads this site alone");
  if (n.size() == 3) {
    // Hugging Face's last_hidden_state is batch, tokens, hidden.
    if (n[0] > 1 && (rflow::numbered_like_a_layer(stem) || stem == "last_hidden_state"))
      refuse("named like one layer of many, it may hold a batch or all sites",
             "batch,tokens,hidden or --axes sites,tokens,hidden");
    if (n[0] > n[1])
      refuse("more sites than tokens, if the axes are sites, tokens, hidden",
             "tokens,sites,hidden or --axes sites,tokens,hidden");
  } else if (n.size() == 4) {
    if (n[0] == 1 && n[1] > 1)
      refuse("the first axis may be the batch or the sites",
             "batch,sites,tokens,hidden or --axes sites,batch,tokens,hidden");
    if (n[0] > n[2])
      refuse("more sites than tokens, if the axes are sites, batch, tokens, hidden",
             "batch,tokens,sites,hidden, --axes sites,batch,tokens,hidden or another order");
  }
}

std::string axes_hint(rflow::site_set const& sites, rflow::tensor const* guessed,
                      std::string const& said) {
  std::string const letters = !said.empty() ? said : guessed->rank() == 3 ? "sth" : "sbth";
  if (letters.find('s') == std::string::npos) return "";
  auto const along = neighbours(sites, 's');
  if (!along) return "";
  // Tokens of one text may resemble each other as sites do; who says the order is believed longer.
  double const clearly = said.empty() ? 0.2 : 0.3;
  char better = 's';
  double most = *along;
  std::optional<double> const batch = neighbours(sites, 'b');
  for (char const axis : {'t', 'b'})
    if (auto const other = axis == 'b' ? batch : neighbours(sites, axis);
        other && *other >= *along + clearly && *other > most)
      better = axis, most = *other;
  std::string const read =
      (said.empty() ? guessed->description() + " was read as " : "--axes ") + words_of(letters);
  if (better != 's')
    return read + ", but neighbours resemble each other more along the " + word_of(better) +
           " (mean cosine " + number(most) + ") than along the sites (" + number(*along) +
           "), as sites do: compare with --axes " + words_of(with_sites_at(letters, better));
  // Two texts are rarely as alike as one token in two neighbouring sites.
  if (said.empty() && batch && *along < *batch + clearly)
    return read + ", and nothing tells the sites from the batch (neighbours have mean cosines of " +
           number(*along) + " and " + number(*batch) + "): the other order is --axes " +
           words_of(with_sites_at(letters, 'b'));
  return "";
}

void compare_facts(capture& c) {
  std::ptrdiff_t const last = c.sites.layer(c.sites.chain.size() - 1);
  c.depth = last;
  auto const said = [&](char const* key) -> std::optional<std::ptrdiff_t> {
    auto const found = c.metadata.find(key);
    if (found == c.metadata.end()) return std::nullopt;
    auto const value = whole(found->second);
    if (!value) c.notes.push_back("metadata '" + std::string(key) + "' is no whole number");
    return value;
  };
  if (c.metadata.contains("rflow_capture")) {
    if (auto const& version = c.metadata.at("rflow_capture"); version != "1")
      c.notes.push_back("written as version " + version +
                        " of captures, which this program does not know (it knows 1)");
    auto const differ = [&](char const* key, std::ptrdiff_t there) {
      if (auto const value = said(key); value && *value != there)
        throw unusable(c.path, "its metadata say " + std::to_string(*value) + " for '" + key +
                                   "', its tensors " + std::to_string(there));
    };
    differ("tokens", c.sites.tokens());
    differ("hidden", c.sites.width());
    if (auto const layers = said("layers")) {
      if (*layers < last)
        throw unusable(c.path, "its metadata say " + plural(*layers, "layer") + ", but " +
                                   c.sites.chain.back().name + " is there");
      if (*layers > last)
        c.notes.push_back("its metadata say " + plural(*layers, "layer") + ", the last that is " +
                          "there is " + c.sites.chain.back().name +
                          ": is the file complete? Positions l/L are by the metadata");
      c.depth = *layers;
    }
  }
  if (!c.token_ids.empty() && std::ssize(c.token_ids) != c.sites.tokens())
    throw unusable(c.path, "'token_ids' has " + plural(std::ssize(c.token_ids), "value") + " for " +
                               plural(c.sites.tokens(), "token"));
}

void note_list_end(capture& c, options const& asked) {
  if (asked.pattern.last != rflow::list_end::unsaid || c.sites.final_norm ||
      c.sites.chain.size() < 2)
    return;
  rflow::tensor const& last = c.sites.chain.back();
  // Behind a norm without weights all rows have one norm, up to the rounding of bfloat16; where
  // all sites are so, the file was normalised as a whole.
  constexpr double alike = 0.01;
  auto const spread = spread_of_norms(last);
  auto const before = spread_of_norms(c.sites.chain[c.sites.chain.size() - 2]);
  if (spread && before && *spread<alike&& * before> 4 * alike) {
    c.notes.push_back(last.name +
                      ": all rows have the same norm, as behind a norm without weights. If it is "
                      "the final norm's output, --last norm takes it out of the chain");
    return;
  }
  if (!c.sites.is_list) {
    bool const is_stack = (c.file && c.file->is_single_array()) || last.name.starts_with("arr_") ||
                          asked.pattern.axes.find('s') != std::string::npos;
    if (double const jump = is_stack ? jump_at_the_end(c.sites.chain) : 0; jump > 0)
      c.notes.push_back(last.name + ": its norms are " + number(jump) +
                        " times those of the site before, a greater step than any before it. It "
                        "may be the final norm's output: --last norm takes it out of the chain, "
                        "--last block keeps it");
    return;
  }
  rflow::list_end end = rflow::list_end::unsaid;
  std::string model;
  for (char const* key : {"model_type", "architecture", "architectures", "model", "model_name"})
    if (auto const found = c.metadata.find(key);
        found != c.metadata.end() && end == rflow::list_end::unsaid) {
      end = rflow::hugging_face_list_end(found->second);
      model = found->second;
    }
  if (end == rflow::list_end::norm)
    c.notes.push_back(last.name + ": Hugging Face's list of states ends with the final norm in " +
                      model + ". --last norm takes it out of the chain, --last block keeps it");
  else if (end == rflow::list_end::unsaid)
    c.notes.push_back(last.name +
                      ": Hugging Face's lists of states end with the final norm in most models "
                      "(GPT-2, Llama, T5; not BERT, ViT). --last norm takes it out of the chain, "
                      "--last block keeps it");
}

}  // namespace report
