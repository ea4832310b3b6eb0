// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the tests of the file formats share.

#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <rflow/file.hpp>
#include <span>
#include <string>
#include <vector>

namespace files {

/// A directory that is gone when the test ends.
class scratch {
 public:
  scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "rflow-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary directory");
    path_ = name;
  }
  scratch(scratch const&) = delete;
  scratch& operator=(scratch const&) = delete;
  ~scratch() { std::filesystem::remove_all(path_); }

  std::filesystem::path operator/(std::string const& name) const { return path_ / name; }
  std::filesystem::path const& path() const { return path_; }
  std::size_t count() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

inline std::filesystem::path fixture(std::string const& name) {
  return std::filesystem::path(RFLOW_SOURCE_DIR) / "tests" / "reference" / "files" / name;
}

inline std::string read(std::filesystem::path const& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write(std::filesystem::path const& path, std::string const& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// The bytes of a string as a file. A copy of exactly that size, so that the address sanitizer sees
/// a read past the end.
struct memory {
  std::vector<std::byte> bytes;
  explicit memory(std::string const& text) : bytes(text.size()) {
    if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  }
  rflow::mapped_file file(std::string name = "file") const {
    return rflow::mapped_file::borrow(bytes, std::move(name));
  }
};

/// The text of the E that f throws; "nothing thrown" if it returns.
template <class E, class Function>
std::string error_of(Function&& f) {
  try {
    f();
  } catch (E const& error) {
    return error.what();
  }
  return "nothing thrown";
}

inline bool contains(std::string const& text, std::string const& part) {
  return text.find(part) != std::string::npos;
}

/// All elements in row-major order.
template <class T>
std::vector<T> values(rflow::tensor const& x) {
  std::vector<T> out;
  T const* const data = x.elements<T>();
  std::vector<std::ptrdiff_t> index(x.shape.size(), 0);
  for (std::ptrdiff_t i = 0; i < x.size(); ++i) {
    std::ptrdiff_t offset = 0, rest = i;
    for (std::size_t axis = x.shape.size(); axis-- > 0; rest /= x.shape[axis])
      offset += rest % x.shape[axis] * x.strides[axis];
    out.push_back(data[offset]);
  }
  return out;
}

}  // namespace files
