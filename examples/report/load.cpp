// SPDX-License-Identifier: Apache-2.0
#include "load.hpp"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <iterator>
#include <new>
#include <optional>
#include <string_view>
#include <system_error>

#include "facts.hpp"
#include "text.hpp"

namespace report {
namespace {

std::vector<std::string_view> cells_of(std::string_view line) {
  std::vector<std::string_view> out;
  for (;;) {
    std::size_t const comma = line.find(',');
    std::string_view cell = line.substr(0, comma);
    auto const blank = [](char c) { return c == ' ' || c == '\t' || c == '\r' || c == '"'; };
    while (!cell.empty() && blank(cell.front())) cell.remove_prefix(1);
    while (!cell.empty() && blank(cell.back())) cell.remove_suffix(1);
    out.push_back(cell);
    if (comma == std::string_view::npos) return out;
    line.remove_prefix(comma + 1);
  }
}

std::optional<std::int64_t> integer_of(std::string_view cell) {
  std::int64_t value = 0;
  auto const [end, error] = std::from_chars(cell.data(), cell.data() + cell.size(), value);
  if (error != std::errc{} || end != cell.data() + cell.size()) return std::nullopt;
  return value;
}

/// Whether a cell that is no integer can be the name of a column. A missing value cannot, nor a number
/// of another kind.
bool is_header(std::string_view cell) {
  auto const letter = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           static_cast<unsigned char>(c) >= 0x80;
  };
  std::string low(cell);
  for (char& c : low)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  constexpr std::string_view values[] = {"nan", "na",   "n/a",      "none",  "null",    "nil",
                                         "inf", "true", "infinity", "false", "unknown", "missing"};
  return std::count_if(cell.begin(), cell.end(), letter) > 1 && letter(cell.front()) &&
         std::find(std::begin(values), std::end(values), low) == std::end(values);
}

std::vector<std::int64_t> integers_of_text(std::string const& path, std::string_view text,
                                           std::string const& column) {
  std::vector<std::int64_t> out;
  std::size_t which = 0, columns = 0;
  if (constexpr std::string_view mark = "\xef\xbb\xbf"; text.starts_with(mark))
    text.remove_prefix(mark.size());  // some editors begin UTF-8 so
  for (std::ptrdiff_t number = 1; !text.empty(); ++number) {
    std::size_t const end = text.find('\n');
    std::string_view const line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    auto const cells = cells_of(line);
    if (cells.size() == 1 && cells[0].empty() && text.empty()) break;
    std::string const where = "line " + std::to_string(number) + ": ";
    if (number == 1) {
      columns = cells.size();
      auto const named = std::find(cells.begin(), cells.end(), column);
      if (named != cells.end())
        which = static_cast<std::size_t>(named - cells.begin());
      else if (columns > 1)
        throw unusable(path, where + std::to_string(columns) + " columns, none called " + column);
      if (named != cells.end() || is_header(cells[0])) continue;
    }
    if (cells.size() != columns)
      throw unusable(path, where + plural(static_cast<std::ptrdiff_t>(cells.size()), "value") +
                               " where there were " + std::to_string(columns));
    auto const value = integer_of(cells[which]);
    if (!value) throw unusable(path, where + "an integer expected");
    out.push_back(*value);
  }
  return out;
}

}  // namespace

std::vector<std::int64_t> load_integers(std::string const& path, std::string const& column) {
  try {
    rflow::mapped_file file(path);
    if (std::filesystem::path(path).extension() != ".npy")
      return integers_of_text(
          path, {reinterpret_cast<char const*>(file.bytes().data()), file.bytes().size()}, column);
    rflow::npy_file const array(std::move(file));
    if (array.array().rank() != 1)
      throw unusable(path, "one integer a token expected, found " + array.array().description());
    return array.array().integers();
  } catch (unusable const&) {
    throw;
  } catch (std::bad_alloc const&) {
    throw;
  } catch (std::exception const& error) {
    throw unusable(path, reason_of(error, path));
  }
}

namespace {

/// What the user can do about it; empty if nothing is known to help.
std::string cure_of(rflow::site_error const& error, bool npy) {
  using rflow::site_fault;
  std::string const& of = error.subject;
  switch (error.kind) {
    case site_fault::not_recognised:
      return of.empty() ? "; --pattern-block says how blocks are called ({} is their number), "
                          "--embed how the embedding is"
                        : "";
    case site_fault::several_sets:
      return "; --pattern-block '" + one_line(of) + "' takes the first";
    case site_fault::embed_unclear:
      return "; --embed " + one_line(of) + " says the embedding, --embed none the first block";
    case site_fault::embed_missing: return "; --embed none takes the blocks alone";
    case site_fault::norm_missing: return "; --pattern-final-norm none does without";
    case site_fault::block_missing:
      return of.empty() ? "; --pattern-block says how blocks are called"
                        : "; --subset if it was left out on purpose";
    case site_fault::counted_from:
      return of.empty() ? "" : "; --first-block " + of + " counts from there";
    case site_fault::axes_unclear: return "; --axes sites,tokens,hidden says so, or another order";
    case site_fault::several_arrays:
      return of.empty() ? "" : "; --array " + one_line(of) + " takes the first";
    case site_fault::not_activations:
      return npy && (of == "raw16" || of == "u16" || of == "i16") ? "; --npy-bits says so" : "";
    default: return "";
  }
}

/// The tensor of a file that says which tokens it holds, and its facts.
template <class File>
void read_token_ids(File& file, capture& c) {
  if (file.contains("token_ids")) {
    c.token_ids = file["token_ids"].integers();
  } else if (file.contains("input_ids")) {  // it may be of a prompt only
    rflow::tensor const x = file["input_ids"];
    if (x.size() == c.sites.tokens()) c.token_ids = x.integers();
  }
}

/// What there is to know about how names and axes were read, with what the user can do.
void add_notes(capture& c) {
  for (rflow::site_note const& note : c.sites.notes) {
    std::string text = note.text;
    if (note.kind == rflow::site_remark::embedding_left_out)
      text += ". --embed " + one_line(note.subject) + " takes it nonetheless";
    if (note.kind == rflow::site_remark::layers_unsaid)
      text += ". --embed embed says that the first is the embedding";
    c.notes.push_back(std::move(text));
  }
}

}  // namespace

std::string reason_of(std::exception const& error, std::string const& path) {
  std::string text = error.what();
  if (text.starts_with("rflow::"))
    if (auto const end = text.find(": "); end != std::string::npos) text.erase(0, end + 2);
  if (text.starts_with(path + ": ")) text.erase(0, path.size() + 2);
  return text;
}

capture load(std::string const& path, options const& asked) {
  bool npy = false;
  try {
    capture out;
    out.path = path;
    std::filesystem::path name = std::filesystem::path(path).lexically_normal();
    if (!name.has_filename()) name = name.parent_path();
    out.label = name.stem().string();
    std::error_code ignored;
    if (std::filesystem::is_directory(path, ignored)) {
      out.label = name.filename().string();
      auto folder = std::make_unique<rflow::npy_directory>(path, asked.bits);
      if (folder->names().empty()) throw unusable(path, "no .npy file in this folder");
      out.sites = rflow::find_sites(*folder, asked.pattern);
      read_token_ids(*folder, out);
      out.file = std::move(folder);
    } else if (name.extension() == ".npy") {
      npy = true;
      auto array = std::make_unique<rflow::npy_file>(path, asked.bits);
      require_clear_axes(path, name.stem().string(), array->array(), asked);
      out.sites = rflow::split_sites(array->array(), asked.pattern);
      if (asked.pattern.axes.empty())
        if (std::string hint = axes_hint(array->array()); !hint.empty())
          out.notes.push_back(std::move(hint));
      out.file = std::move(array);
    } else {
      auto tensors = std::make_unique<rflow::safetensors_file>(path);
      for (auto const& [key, value] : tensors->metadata()) out.metadata[key] = value;
      if (auto const model = out.metadata.find("model");
          model != out.metadata.end() && !model->second.empty())
        out.label = model->second;
      out.sites = rflow::find_sites(*tensors, asked.pattern);
      read_token_ids(*tensors, out);
      out.file = std::move(tensors);
    }
    if (out.sites.tokens() == 0 || out.sites.width() == 0)
      throw unusable(path, "no activations in " + out.sites.chain.front().description());
    if (asked.skip_first >= out.sites.tokens())
      throw unusable(path, "--skip-first " + std::to_string(asked.skip_first) +
                               " leaves none of its " + plural(out.sites.tokens(), "token"));
    add_notes(out);
    compare_facts(out);
    note_list_end(out, asked);
    return out;
  } catch (unusable const&) {
    throw;
  } catch (std::bad_alloc const&) {
    throw;
  } catch (std::filesystem::filesystem_error const& error) {
    throw unusable(path, error.code().message());
  } catch (rflow::site_error const& error) {
    throw unusable(path, reason_of(error, path) + cure_of(error, npy));
  } catch (std::exception const& error) {
    throw unusable(path, reason_of(error, path));
  }
}

void require_no_layers(std::vector<std::string> const& inputs, std::size_t sites, bool alike) {
  if (inputs.size() < 2 || sites != 1 || !alike) return;
  std::optional<std::string> pattern;
  for (std::string const& input : inputs) {
    std::filesystem::path const name = std::filesystem::path(input).lexically_normal();
    auto const found = rflow::numbered_like_a_layer(name.stem().string());
    if (name.extension() != ".npy" || !found || (pattern && *found != *pattern)) return;
    pattern = found;
  }
  std::string const folder = std::filesystem::path(inputs.front()).parent_path().string();
  throw unusable(inputs.front(),
                 "numbered like one layer of many (" + *pattern +
                     ".npy), each of one site with as many tokens: layers, not shards. Their " +
                     "folder is read as one model: " + (folder.empty() ? "." : folder));
}

std::vector<capture> load_all(options const& asked) {
  std::vector<capture> out;
  for (std::string const& input : asked.inputs) {
    out.push_back(load(input, asked));
    if (!asked.names.empty()) out.back().label = asked.names[out.size() - 1];
  }
  if (out.size() == 2 && out[0].label == out[1].label)
    for (std::size_t k = 0; k < 2; ++k) out[k].label += " (" + std::to_string(k + 1) + ")";
  return out;
}

}  // namespace report
