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

#include "text.hpp"

namespace report {
namespace {

/// What the library says, ending with what the program can do about it.
std::string with_cure(std::string text) {
  constexpr char const* cures[][2] = {
      {" is missing: ",
       "; --pattern-embed, --pattern-block and --first-block say how sites are called"},
      {", but blocks count from ", "; --first-block says from what"},
      {"open the .npy with reinterpret::as_f16", "; --npy-bits says so"}};
  for (auto const& [said, cure] : cures)
    if (text.find(said) != std::string::npos) return text + cure;
  return text;
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
      out.file = std::move(folder);
    } else if (name.extension() == ".npy") {
      auto array = std::make_unique<rflow::npy_file>(path, asked.bits);
      out.sites = rflow::split_sites(array->array(), asked.pattern);
      out.file = std::move(array);
    } else {
      auto tensors = std::make_unique<rflow::safetensors_file>(path);
      for (auto const& [key, value] : tensors->metadata()) out.metadata[key] = value;
      if (auto const model = out.metadata.find("model");
          model != out.metadata.end() && !model->second.empty())
        out.label = model->second;
      out.sites = rflow::find_sites(*tensors, asked.pattern);
      out.file = std::move(tensors);
    }
    if (out.sites.tokens() == 0 || out.sites.width() == 0)
      throw unusable(path, "no activations in " + out.sites.chain.front().description());
    if (asked.skip_first >= out.sites.tokens())
      throw unusable(path, "--skip-first " + std::to_string(asked.skip_first) +
                               " leaves none of its " + plural(out.sites.tokens(), "token"));
    return out;
  } catch (unusable const&) {
    throw;
  } catch (std::bad_alloc const&) {
    throw;
  } catch (std::filesystem::filesystem_error const& error) {
    throw unusable(path, error.code().message());
  } catch (std::exception const& error) {
    throw unusable(path, with_cure(reason_of(error, path)));
  }
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
