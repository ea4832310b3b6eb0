// SPDX-License-Identifier: Apache-2.0
#pragma once

// Opens captures and finds their sites.

#include <rflow/npy.hpp>
#include <rflow/safetensors.hpp>
#include <rflow/sites.hpp>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "options.hpp"

namespace report {

/// What is wrong with an input: "FILE: reason", one line.
class unusable : public std::runtime_error {
 public:
  unusable(std::string const& file, std::string const& reason)
      : std::runtime_error(file + ": " + reason) {}
};

/// One model's activations. The file stays mapped as long as this lives.
struct capture {
  std::string path, label;
  std::map<std::string, std::string> metadata;
  std::variant<std::unique_ptr<rflow::safetensors_file>, std::unique_ptr<rflow::npy_directory>,
               std::unique_ptr<rflow::npy_file>>
      file;
  rflow::site_set sites;

  /// Identifies the tokens that the model saw; empty if the file does not say.
  std::string token_hash() const {
    auto const found = metadata.find("token_hash");
    return found == metadata.end() ? "" : found->second;
  }
};

/// Opens the inputs. No two models have the same name afterwards.
/// @throws unusable
std::vector<capture> load_all(options const& asked);

/// @throws unusable
capture load(std::string const& path, options const& asked);

/// What an exception from the library says about a file, without what the user knows already.
std::string reason_of(std::exception const& error, std::string const& path);

}  // namespace report
