// SPDX-License-Identifier: Apache-2.0
#pragma once

// Opens captures and finds their sites.

#include <rflow/sites.hpp>

#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "open.hpp"
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
  std::unique_ptr<opened> file;  // none of a model that was run here
  rflow::site_set sites;
  std::vector<std::int64_t> token_ids = {};  // one a token; empty if the file does not say
  std::ptrdiff_t depth = 0;                  // L, of the positions l/L; 0: the last l
  std::vector<std::string> notes = {};       // on how it was read; they become warnings

  /// Bytes of its sites that are copies in memory.
  double copied() const {
    double out = static_cast<double>(sites.widened.bytes + sites.storage_bytes);
    if (file && file->copies())
      for (rflow::tensor const& site : sites.chain)
        out += static_cast<double>(site.size()) * rflow::bits(site.type) / 8;
    return out;
  }

  /// The tensor of that name that came with the sites, if there is one.
  std::optional<rflow::tensor> tensor(std::string const& name) const {
    if (!file || file->is_single_array() || !file->contains(name)) return std::nullopt;
    return (*file)[name];
  }

  /// Identifies the tokens that the model saw; empty if the file does not say.
  std::string token_hash() const {
    auto const found = metadata.find("token_hash");
    return found == metadata.end() ? "" : found->second;
  }

  /// l/L of each site of the chain; 0 for a chain of one embedding.
  std::vector<double> positions() const {
    std::ptrdiff_t const all = depth > 0 ? depth : sites.layer(sites.chain.size() - 1);
    std::vector<double> out;
    for (std::size_t site = 0; site < sites.chain.size(); ++site)
      out.push_back(all > 0 ? static_cast<double>(sites.layer(site)) / static_cast<double>(all)
                            : 0);
    return out;
  }
};

/// Refuses inputs that are layers and no shards: .npy files of one site each, numbered like layers.
/// @param sites  of each
/// @param alike  all have as many tokens
/// @throws unusable
void require_no_layers(std::vector<std::string> const& inputs, std::size_t sites, bool alike);

/// Opens the inputs. No two models have the same name afterwards.
/// @throws unusable
std::vector<capture> load_all(options const& asked);

/// @throws unusable
capture load(std::string const& path, options const& asked);

/// What an exception from the library says about a file, without what the user knows already.
std::string reason_of(std::exception const& error, std::string const& path);

}  // namespace report
