// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a file says of each token, as it is spelt there: a column of text, a .npy, or a tensor of the
// capture. What the words mean is the business of labels.hpp.

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "load.hpp"

namespace report {

/// Which column of text to take, or which tensor of a safetensors file.
struct column {
  std::string asked;                    // a name, a number from 1 on, or nothing
  std::vector<std::string_view> usual;  // names that are looked for otherwise, the first before all
  std::string option;                   // that sets it, for messages
};

/// One cell a token, from one file or from several in a row. Cells have neither white space around them nor quotes, and are valid UTF-8.
struct cells {
  std::string source;                 // file, or file and tensor
  std::vector<std::string> distinct;  // in order of appearance
  std::vector<std::size_t> of_token;  // places in distinct
  std::vector<std::size_t> lines;     // of the tokens, from 1 on; empty for an array
  std::string heading;                // line 1, where it was taken for the column's name
  std::ptrdiff_t blank_lines = 0;     // between others
  std::string shape;                  // of an array of more than one axis: "4 x 6 = "

  struct part {
    std::string source;
    std::size_t begin;  // token
  };
  std::vector<part> parts = {};  // of several files; then an array's lines are 0

  /// "line 7", "token 6", "b.csv, line 7": where a token's cell stands.
  std::string place(std::size_t token) const;
};

/// The cells of several files, one after the other.
cells joined(std::vector<cells> const& files);

/// A cell or a name in a message: in quotes, short, on one line.
std::string in_quotes(std::string_view cell);

/// Whether there is a tensor of that name in the capture's file.
bool is_tensor(std::string const& named, capture const& c);

/// Reads `named`: a file (text, .npy, .safetensors), or else a tensor of the capture. A .npy or a tensor
/// has one value a token, in whatever axes, or as its last axis one 1 among zeros for the class.
/// @param tokens  how many are expected; arrays of more than one axis are understood by it
/// @throws unusable, naming the line
cells read_cells(std::string const& named, capture const& c, std::ptrdiff_t tokens,
                 column const& which);

}  // namespace report
