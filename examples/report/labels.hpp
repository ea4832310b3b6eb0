// SPDX-License-Identifier: Apache-2.0
#pragma once

// Classes and groups of tokens, for the probes: what the words in a file mean, and which tokens they
// leave out.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cells.hpp"
#include "load.hpp"
#include "options.hpp"
#include "tokens.hpp"

namespace report {

enum class role { classes, groups };

/// What a file says of each token, understood.
struct labelling {
  static constexpr std::int64_t left_out = -1, missing = -2;

  cells read;
  std::vector<std::string> names;      // in order: numbers by value, words by bytes
  std::vector<std::int64_t> of_token;  // places in names, or one of the above
  std::vector<std::string> notes;      // on what could have been meant otherwise
};

/// Classes: whole numbers, however written (1, 01, 1.0, 1e0 are one), or words, not both; −100 and what
/// --ignore-label says are left out. Groups may be both, then each as it is written.
/// @param named  a file, or a tensor of the capture
/// @throws unusable, naming the line
labelling read_labels(std::string const& named, capture const& c, options const& asked, role what);

/// The same of the tokens of all shards: one name a shard, or one file for all tokens, or the name of a
/// tensor that every shard has.
/// @param chosen  of each shard
labelling read_labels(std::vector<std::string> const& named, std::vector<capture> const& shards,
                      std::vector<token_choice> const& chosen, options const& asked, role what);

/// What the probes of one capture are trained on. Classes are 0 … C − 1 in the order of their names.
struct probe_labels {
  std::string from;                        // file or tensor, and the column's name
  std::vector<std::int64_t> label, group;  // one a token of the file; group may be empty
  std::vector<bool> mask;                  // which of them take part
  std::vector<std::string> names;          // of the classes that occur
  std::vector<std::ptrdiff_t> tokens;      // of each class
  std::ptrdiff_t left_out = 0;             // tokens that count elsewhere, but not here
  std::vector<std::string> notes;
};

/// @param model   its file, for messages
/// @param groups  may be null
/// @throws unusable if labels and tokens do not fit together, or classes cannot be told apart
probe_labels labels_of(std::string const& model, token_choice const& chosen,
                       labelling const& labels, labelling const* groups);

/// A bound on what the probes take, in bytes.
double bytes_of_probes(probe_labels const& labels, std::size_t sites, std::ptrdiff_t width,
                       options const& asked, int threads);

/// What the library says of the labels, with classes by name; on the file that it is about.
unusable blame(std::exception const& error, probe_labels const& labels, std::string const& file,
               std::string const& groups);

}  // namespace report
