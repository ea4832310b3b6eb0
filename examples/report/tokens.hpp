// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which tokens of a capture count, and where its sequences are: from the file's own masks and
// offsets, and from the options. All that measures asks here.

#include <rflow/view.hpp>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "load.hpp"
#include "options.hpp"

namespace report {

/// Tokens left out, and by what: each is counted at the first reason that leaves it out.
struct left_out {
  std::string why;  // a mask's name or an option
  std::ptrdiff_t tokens;
};

/// Tokens begin … end − 1.
struct token_run {
  std::ptrdiff_t begin, end;
  std::ptrdiff_t before;  // tokens that count before it
};

struct token_choice {
  std::ptrdiff_t stored = 0, used = 0;
  std::vector<token_run> runs;          // of those that count, ascending, apart from each other
  std::vector<std::ptrdiff_t> offsets;  // of sequences: 0 … stored
  std::string sequences_from;  // what says so: a tensor's name, "batch"; empty if nothing does
  std::vector<left_out> reasons;
  std::vector<std::string> notes;  // advice

  bool all() const { return used == stored; }
  /// Sequences with a token that counts.
  std::ptrdiff_t sequences() const;
  /// Where the i-th token that counts stands in the file.
  std::ptrdiff_t stored_token(std::ptrdiff_t i) const;
  /// Whether a token of the file is the first of its sequence that counts.
  bool begins_sequence(std::ptrdiff_t token) const;
  /// One value a token.
  std::vector<bool> mask() const;
  bool same_tokens(token_choice const& other) const;
  /// Appends those of the next file of the same model.
  void append(token_choice const& next);
};

/// What the options say of tokens, for the files of one model in their order.
class token_rules {
 public:
  explicit token_rules(options const& asked) : asked_(&asked) {}

  /// The tokens of the next file. Option and file of --mask count the tokens of all files.
  /// @throws unusable
  token_choice next(capture const& c);
  /// After the last file: whether something is left, and options fit the number of all tokens.
  /// @param all  of all files
  /// @throws unusable
  void finish(std::string const& path, token_choice const& all) const;

 private:
  options const* asked_;
  std::ptrdiff_t before_ = 0;                               // tokens of the files so far
  std::map<std::string, std::vector<std::int64_t>> files_;  // of --mask, read once
};

/// The choice for a capture alone.
/// @throws unusable
token_choice choose_tokens(capture const& c, options const& asked);

/// The tokens that count, in their sequences.
template <class T>
rflow::layer_stack<T> counted(rflow::layer_stack<T> const& stack, token_choice const& chosen) {
  rflow::layer_stack<T> out = chosen.all() ? stack : stack.tokens(chosen.mask());
  return chosen.offsets.size() > 2 ? out.sequences(chosen.offsets) : out;
}

/// "8 by attention_mask, 1 by --skip-first 1"; empty if none is left out.
std::string list_of(std::vector<left_out> const& reasons);

}  // namespace report
