// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the user asked for.

#include <rflow/npy.hpp>
#include <rflow/sites.hpp>
#include <rflow/variance.hpp>

#include <cstddef>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace report {

enum class estimator { debiased, biased };

struct options {
  std::vector<std::string> inputs;  // one or two; any number of shards
  std::vector<std::string> names;   // of the models, one each; else they name themselves
  std::string output;               // directory; made from the inputs' names if not given
  bool force = false;

  static constexpr std::ptrdiff_t to_the_end = std::numeric_limits<std::ptrdiff_t>::max();
  std::ptrdiff_t skip_first = 0, skip_last = 0;                   // of each sequence
  std::vector<std::pair<std::ptrdiff_t, std::ptrdiff_t>> tokens;  // half-open; all if empty
  std::string tokens_text;                                        // as given
  std::vector<std::string> masks;  // tensors or files, besides the file's own
  bool own_masks = true;           // attention_mask and special_tokens_mask of the file
  std::string sequences;           // a tensor's name, or none; empty: what the file says
  rflow::normalization normalize = rflow::normalization::per_element;
  estimator main_estimator = estimator::debiased;
  bool linear = true, rbf = true;
  double rbf_fraction = 1;
  bool cross_cka = false;
  bool significance = false;
  bool shifts = false;

  bool shards = false;               // inputs are shards of one model, any number of them
  std::vector<std::string> against;  // shards of a second model
  bool minibatch_cka = false;        // of shards, instead of CKA over all tokens at once
  std::ptrdiff_t cka_batch = 256;    // tokens of a batch of it
  std::string checkpoint;            // file to go on from
  double checkpoint_seconds = 30;
  std::ptrdiff_t memory_limit = 0;  // MiB; 0: none

  // Files or tensors with a label or group for each token, one for all captures or one each; no probes
  // without labels.
  std::vector<std::string> labels, label_groups;
  std::string label_column, group_column;
  std::vector<std::string> ignore_labels;
  int probe_seeds = 5, probe_epochs = 150;
  bool probe_standardize = false;

  rflow::site_pattern pattern;
  bool same_tokens = false;  // two captures: by the user's word
  rflow::reinterpret bits = rflow::reinterpret::nothing;

  int threads = 0;
  bool plots = true;
  bool strict = false;
  bool quiet = false;

  /// What must stay where it is.
  std::vector<std::string> files_read() const {
    std::vector<std::string> out = inputs;
    out.insert(out.end(), against.begin(), against.end());
    out.insert(out.end(), labels.begin(), labels.end());
    out.insert(out.end(), label_groups.begin(), label_groups.end());
    if (!checkpoint.empty()) out.push_back(checkpoint);
    std::error_code ignored;
    for (std::string const& mask : masks)
      if (std::filesystem::is_regular_file(mask, ignored)) out.push_back(mask);
    return out;
  }

  /// Labels of tokens that the probes leave out. −100 is what the losses of PyTorch leave out.
  std::vector<std::string> ignored_labels() const {
    std::vector<std::string> out = ignore_labels;
    out.push_back("-100");
    return out;
  }
};

inline std::string_view to_string(estimator e) {
  return e == estimator::debiased ? "debiased" : "biased";
}

/// The options on the command line; none if help or the version was asked for and printed.
/// @throws std::invalid_argument with one line of text if they make no sense
std::optional<options> parse(int argc, char const* const* argv);

}  // namespace report
