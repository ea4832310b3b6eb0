// SPDX-License-Identifier: Apache-2.0
#pragma once

// Opens an input by what it contains, whatever it is called.

#include <rflow/file.hpp>
#include <rflow/npy.hpp>
#include <rflow/npz.hpp>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace report {

/// Named tensors: a safetensors file, one in parts, a .npz, a folder of .npy files, or one .npy. Stays
/// mapped as long as this lives.
class opened {
 public:
  virtual ~opened() = default;
  virtual std::string const& path() const = 0;
  /// In alphabetical order.
  virtual std::vector<std::string> names() const = 0;
  virtual bool contains(std::string_view name) const = 0;
  /// @throws what the reader of that kind throws
  virtual rflow::tensor operator[](std::string_view name) = 0;
  /// What the file says of itself; empty for NumPy's.
  virtual std::map<std::string, std::string> metadata() const { return {}; }
  /// Whether it is NumPy's, so that `bits` can say what integers are.
  virtual bool is_numpy() const = 0;
  /// Whether it is a .npy, which has one array without a name of its own.
  virtual bool is_single_array() const { return false; }
  /// Whether tensors are copies in memory, as a rule, and not views of the mapped file.
  virtual bool copies() const { return false; }

  /// What the reader of a report should know about how it was read, such as that the file is not
  /// what its name says. Sentences without a full stop.
  std::vector<std::string> notes;
};

/// Opens a file or a folder.
/// @param  bits   for what NumPy's files do not say
/// @param  alone  whether a part of a safetensors file (-00001-of-00002) is read by itself
/// @throws std::runtime_error, in one line with the cure, if it is of a kind that is not read; else
///         what the readers throw
std::unique_ptr<opened> open_input(std::string const& path, rflow::reinterpret bits, bool alone);

/// Whether both are parts (-00001-of-00002) of one safetensors file.
bool are_parts_of_one(std::string const& a, std::string const& b);

/// zlib's, or none if this program was built without it.
rflow::inflater inflater_here();

}  // namespace report
