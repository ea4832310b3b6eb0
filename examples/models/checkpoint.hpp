// SPDX-License-Identifier: Apache-2.0
#pragma once

// A checkpoint in Hugging Face's layout: config.json beside model.safetensors, or beside
// model.safetensors.index.json and its shards. Files stay mapped; values are widened as they are
// read.

#include <rflow/safetensors.hpp>

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "weights.hpp"

namespace models {

/// What is wrong with a checkpoint: "FILE: reason", one line.
class unusable_checkpoint : public std::runtime_error {
 public:
  unusable_checkpoint(std::filesystem::path const& file, std::string const& reason)
      : std::runtime_error(file.string() + ": " + reason) {}
};

/// @throws unusable_checkpoint
inline nlohmann::json read_json(std::filesystem::path const& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw unusable_checkpoint(path, "cannot be opened");
  nlohmann::json out = nlohmann::json::parse(in, nullptr, false);
  if (!out.is_object()) throw unusable_checkpoint(path, "not a JSON object");
  return out;
}

class checkpoint : public weight_source {
 public:
  /// Opens and validates every file of the folder; reads no weights.
  explicit checkpoint(std::filesystem::path const& folder) : folder_(folder) {
    auto const single = folder / "model.safetensors",
               index = folder / "model.safetensors.index.json";
    if (std::filesystem::exists(single)) {
      open(single);
    } else if (std::filesystem::exists(index)) {
      nlohmann::json const list = read_json(index);
      auto const map = list.find("weight_map");
      if (map == list.end() || !map->is_object())
        throw unusable_checkpoint(index, "no weight_map in it");
      std::map<std::string, std::vector<std::string>> shards;
      for (auto const& [tensor, file] : map->items()) {
        std::string const name = file.is_string() ? file.get<std::string>() : "";
        if (name.empty() || std::filesystem::path(name).filename() != name)
          throw unusable_checkpoint(
              index, "'" + rflow::detail::printable(tensor) + "' is in no file of this folder");
        shards[name].push_back(tensor);
      }
      for (auto const& [file, tensors] : shards) {
        rflow::safetensors_file const& shard = open(folder / file);
        for (std::string const& tensor : tensors)
          if (!shard.contains(tensor))
            throw unusable_checkpoint(folder / file, "lacks '" + rflow::detail::printable(tensor) +
                                                         "', which the index says it has");
      }
    } else {
      bool const pickled = std::filesystem::exists(folder / "pytorch_model.bin") ||
                           std::filesystem::exists(folder / "pytorch_model.bin.index.json");
      throw unusable_checkpoint(
          folder, std::string("neither model.safetensors nor model.safetensors.index.json in it") +
                      (pickled ? ", only pytorch_model.bin; to convert it: "
                                 "python3 examples/models/to_safetensors.py FOLDER "
                                 "(with torch and safetensors installed)"
                               : ""));
    }
  }

  /// Checks that the checkpoint has these parameters in these shapes, and no other tensor.
  /// @param ignored  says of a name whether it may be there without a use
  /// @throws unusable_checkpoint naming the tensor
  template <class Ignored>
  void require(std::vector<parameter> const& wanted, Ignored const& ignored) {
    std::map<std::string, bool, std::less<>> used;
    for (parameter const& p : wanted) {
      std::string const name = name_of(p);
      if (name.empty()) {
        if (p.optional) continue;
        throw unusable_checkpoint(folder_, "tensor '" + p.name + "' is missing");
      }
      used[name] = true;
      rflow::tensor const x = tensors_.at(name);
      if (!rflow::is_viewable(x.type))
        throw unusable_checkpoint(folder_,
                                  "f16, bf16, f32 or f64 expected, found " + x.description());
      if (x.shape != p.shape)
        throw unusable_checkpoint(folder_, "shape " + rflow::detail::shape_text(p.shape) +
                                               " expected, found " + x.description());
      if (name != p.name) renamed_[p.name] = name;
    }
    for (auto const& [name, tensor] : tensors_)
      if (used.find(name) == used.end() && !ignored(name))
        throw unusable_checkpoint(folder_, "tensor '" + rflow::detail::printable(name) +
                                               "' is not part of this architecture");
  }

  void read(parameter const& p, integer first, integer count, float* to) const override {
    auto const other = renamed_.find(p.name);
    rflow::tensor const& x = tensors_.at(other == renamed_.end() ? p.name : other->second);
    auto const copy = [&](auto const* from) {
      for (integer i = 0; i < count; ++i) to[i] = static_cast<float>(from[first + i]);
    };
    switch (x.type) {
      case rflow::dtype::f16: return copy(x.elements<rflow::f16>());
      case rflow::dtype::bf16: return copy(x.elements<rflow::bf16>());
      case rflow::dtype::f64: return copy(x.elements<double>());
      default: return copy(x.elements<float>());
    }
  }

 private:
  rflow::safetensors_file const& open(std::filesystem::path const& path) {
    files_.push_back(std::make_unique<rflow::safetensors_file>(path));
    for (std::string const& name : files_.back()->names())
      if (!tensors_.emplace(name, (*files_.back())[name]).second)
        throw unusable_checkpoint(
            path, "tensor '" + rflow::detail::printable(name) + "' is in another file, too");
    return *files_.back();
  }

  /// The name that a parameter has here, or "": as it is, as the original Mamba package calls it,
  /// or without the model's prefix.
  std::string name_of(parameter const& p) const {
    std::vector<std::string> names{p.name};
    if (p.name == "backbone.embeddings.weight") names.push_back("backbone.embedding.weight");
    names.push_back(p.name.substr(p.name.find('.') + 1));
    if (p.optional) names.pop_back();
    for (std::string const& name : names)
      if (tensors_.contains(name)) return name;
    return "";
  }

  std::filesystem::path folder_;
  std::vector<std::unique_ptr<rflow::safetensors_file>> files_;
  std::map<std::string, rflow::tensor, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> renamed_;
};

}  // namespace models
