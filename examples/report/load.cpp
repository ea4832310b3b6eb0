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

/// What the user can do about it; empty if nothing is known to help.
std::string cure_of(rflow::site_error const& error, bool numpy) {
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
    case site_fault::axes_unclear:
      return of.empty() ? ""
                        : std::string("; --axes sites,") + (of == "sbth" ? "batch," : "") +
                              "tokens,hidden says so, or another order";
    case site_fault::several_arrays:
      return of.empty() ? "" : "; --array " + one_line(of) + " takes the first";
    case site_fault::not_activations: return of.empty() || !numpy ? "" : "; --npy-bits says so";
    default: return "";
  }
}

/// The tensor of a file that says which tokens it holds, and its facts.
void read_token_ids(opened& file, capture& c) {
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
    if (note.kind == rflow::site_remark::embedding_offered)
      text += ": --embed " + one_line(note.subject) + " takes it for the embedding";
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
  bool numpy = false;
  try {
    capture out;
    out.path = path;
    std::filesystem::path name = std::filesystem::path(path).lexically_normal();
    if (!name.has_filename()) name = name.parent_path();
    out.label = name.stem().string();
    std::error_code ignored;
    if (std::filesystem::is_directory(path, ignored)) out.label = name.filename().string();
    out.file = open_input(path, asked.bits, asked.shards);
    numpy = out.file->is_numpy();
    out.metadata = out.file->metadata();
    if (auto const model = out.metadata.find("model");
        model != out.metadata.end() && !model->second.empty())
      out.label = model->second;
    out.notes = out.file->notes;
    if (out.file->is_single_array()) {
      rflow::tensor const array = (*out.file)[out.file->names().front()];
      require_clear_axes(path, name.stem().string(), array, asked);
      out.sites = rflow::split_sites(array, asked.pattern);
      if (std::string hint = axes_hint(out.sites, &array, asked.pattern.axes); !hint.empty())
        out.notes.push_back(std::move(hint));
    } else {
      out.sites = rflow::find_sites(*out.file, asked.pattern);
      if (asked.pattern.axes.find('s') != std::string::npos)
        if (std::string hint = axes_hint(out.sites, nullptr, asked.pattern.axes); !hint.empty())
          out.notes.push_back(std::move(hint));
      read_token_ids(*out.file, out);
    }
    if (out.sites.widened.happened())
      out.notes.push_back("the file stores its sites as " + out.sites.widened.description());
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
    throw unusable(path, reason_of(error, path) + cure_of(error, numpy));
  } catch (std::exception const& error) {
    // What the readers cannot know: what this program can do.
    constexpr char const* cures[][2] = {
        {"these are not parts of one file",
         "; if they are shards of one model's tokens, give all of them with --shards"},
        {"and there is no inflater",
         " in this program: build it where zlib is installed (Debian: zlib1g-dev), or save the "
         "file "
         "with numpy.savez, which does not compress"}};
    std::string text = reason_of(error, path);
    for (auto const& [said, cure] : cures)
      if (text.find(said) != std::string::npos) text += cure;
    throw unusable(path, text);
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
  if (asked.inputs.size() == 2 && are_parts_of_one(asked.inputs[0], asked.inputs[1]))
    throw unusable(asked.inputs[1], "a part of the same file as " + asked.inputs[0] +
                                        ": give one of them; or --shards with all of them, if they "
                                        "are shards of one model's tokens");
  for (std::string const& input : asked.inputs) {
    out.push_back(load(input, asked));
    if (!asked.names.empty()) out.back().label = asked.names[out.size() - 1];
  }
  if (out.size() == 2 && out[0].label == out[1].label)
    for (std::size_t k = 0; k < 2; ++k) out[k].label += " (" + std::to_string(k + 1) + ")";
  return out;
}

}  // namespace report
