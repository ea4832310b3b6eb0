// SPDX-License-Identifier: Apache-2.0
#pragma once

// From NumPy's .npy: one array per file, mapped, validated and viewed in place; and back. For many
// named arrays in one file, or bfloat16, use safetensors.hpp; npz.hpp reads .npz archives; pickled
// objects are not read.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <rflow/container.hpp>
#include <rflow/file.hpp>

namespace rflow {

/// What integers or NumPy's nameless bytes really are: 16-bit integers or |V2 may be halves, 8-bit
/// integers or |V1 the 8-bit floats (f8_e4m3 without infinity, which ml_dtypes calls float8_e4m3fn).
/// NumPy knows none but f16, so people store their bits under those names, and so does numpy.save
/// with arrays of ml_dtypes (but for float8_e5m2, which it writes as <f1). Nothing in the file tells,
/// so nothing is guessed.
enum class reinterpret : std::uint8_t { nothing, as_f16, as_bf16, as_f8_e4m3, as_f8_e5m2 };

/// One .npy file, versions 1.0, 2.0 and 3.0.
///
/// Reads the types as NumPy does: <f4, =f4, |f4, f4, f and float32 are one; bfloat16, float8_e4m3fn
/// and float8_e5m2 by name too. So it is with the 5L and the u'' of Python 2. Stricter than NumPy
/// where a file could mean two things: the header is a dictionary of exactly descr, fortran_order
/// and shape, each once, of at most 10,000 bytes; the data end where the file ends. Extents are plain
/// decimal numbers, and nothing is escaped or commented. Fortran order becomes strides.
class npy_file {
 public:
  /// Opens and validates a file. The array takes its name from the file: "block.1" for
  /// "block.1.npy".
  /// @param  path  the file
  /// @param  bits  says what integers or nameless bytes are
  /// @throws std::system_error if it cannot be opened; format_error if it is malformed, big endian,
  ///         structured, or holds Python objects, strings or dates; std::invalid_argument if bits
  ///         is given and the elements are neither integers nor nameless bytes of that size
  explicit npy_file(std::filesystem::path const& path, reinterpret bits = reinterpret::nothing)
      : npy_file(mapped_file(path), bits) {}

  /// The same for a file that is mapped already, or bytes in memory (mapped_file::borrow).
  explicit npy_file(mapped_file file, reinterpret bits = reinterpret::nothing);

  /// The array; valid as long as this object. Data that are not aligned in the file (no common
  /// writer leaves them so) are copied once, on opening.
  tensor const& array() const { return array_; }

  /// The path it was opened by.
  std::string const& path() const { return file_.path(); }

 private:
  mapped_file file_;
  tensor array_;
};

/// The .npy files of one directory, each under its name without the extension. Files are opened on
/// demand and stay mapped. Has the same members as safetensors_file, for find_sites.
class npy_directory {
 public:
  /// Lists the directory; opens none of its files. bits holds for those files whose elements are
  /// integers or nameless bytes of that size.
  /// @throws std::system_error if it cannot be listed
  explicit npy_directory(std::filesystem::path const& path,
                         reinterpret bits = reinterpret::nothing);

  /// Names in alphabetical order.
  std::vector<std::string> names() const;
  /// Whether there is a file of that name.
  bool contains(std::string_view name) const { return files_.find(name) != files_.end(); }

  /// The array of one file; valid as long as this object.
  /// @throws what npy_file throws; std::invalid_argument if there is no such file
  tensor const& operator[](std::string_view name);

  /// The directory.
  std::string const& path() const { return path_; }

 private:
  struct opened {
    npy_file file;
    tensor array;
  };
  std::string path_;
  reinterpret bits_;
  std::map<std::string, std::optional<opened>, std::less<>> files_;  // opened on demand
};

/// Writes a tensor (see as_tensor) as version 1.0 in C order, data on a 64-byte boundary. The file
/// appears complete or not at all.
/// @throws std::invalid_argument if NumPy has no such type (bf16, the 8-bit floats);
///         std::system_error with the path if writing fails
inline void write_npy(std::filesystem::path const& path, tensor const& x);

/// Writes n × d activations: a view, an Eigen matrix, whatever has an adapt<>.
template <activations X>
void write_npy(std::filesystem::path const& path, X const& x) {
  static_assert(!std::same_as<scalar_of<X>, bf16>,
                "rflow: NumPy has no bfloat16; use write_safetensors, or widen to float");
  write_npy(path, as_tensor("", x));
}

/// Writes contiguous row-major values (std::vector, std::span) of any shape.
/// @throws std::invalid_argument if the values do not make that shape
template <class Container>
void write_npy(std::filesystem::path const& path, Container const& values,
               std::vector<std::ptrdiff_t> shape) {
  write_npy(path, as_tensor("", values, std::move(shape)));
}

// ---- implementation -----------------------------------------------------------------------------

namespace detail {

struct npy_type {
  std::string_view descr;
  dtype type;
};
/// As they are written.
inline constexpr npy_type npy_types[] = {
    {"|b1", dtype::boolean}, {"|u1", dtype::u8},    {"|i1", dtype::i8},    {"<u2", dtype::u16},
    {"<i2", dtype::i16},     {"<u4", dtype::u32},   {"<i4", dtype::i32},   {"<u8", dtype::u64},
    {"<i8", dtype::i64},     {"<f2", dtype::f16},   {"<f4", dtype::f32},   {"<f8", dtype::f64},
    {"<c8", dtype::c64},     {"<c16", dtype::c128}, {"|V2", dtype::raw16}, {"|V1", dtype::raw8},
};
/// What else NumPy's reader takes for them, after the mark of byte order if there is one; and f1, by
/// which numpy.save calls ml_dtypes' float8_e5m2. As on Linux with 64 bits.
inline constexpr npy_type npy_codes[] = {
    {"?", dtype::boolean}, {"B", dtype::u8},       {"b", dtype::i8},  {"H", dtype::u16},
    {"h", dtype::i16},     {"I", dtype::u32},      {"i", dtype::i32}, {"L", dtype::u64},
    {"Q", dtype::u64},     {"l", dtype::i64},      {"q", dtype::i64}, {"p", dtype::i64},
    {"e", dtype::f16},     {"f", dtype::f32},      {"d", dtype::f64}, {"F", dtype::c64},
    {"D", dtype::c128},    {"f1", dtype::f8_e5m2},
};
/// Names without a mark: NumPy's own, and those that ml_dtypes gives it.
inline constexpr npy_type npy_names[] = {
    {"bool", dtype::boolean},
    {"uint8", dtype::u8},
    {"ubyte", dtype::u8},
    {"int8", dtype::i8},
    {"byte", dtype::i8},
    {"uint16", dtype::u16},
    {"ushort", dtype::u16},
    {"int16", dtype::i16},
    {"short", dtype::i16},
    {"uint32", dtype::u32},
    {"int32", dtype::i32},
    {"uint64", dtype::u64},
    {"uint", dtype::u64},
    {"int64", dtype::i64},
    {"int", dtype::i64},
    {"long", dtype::i64},
    {"float16", dtype::f16},
    {"half", dtype::f16},
    {"float32", dtype::f32},
    {"single", dtype::f32},
    {"float64", dtype::f64},
    {"double", dtype::f64},
    {"float", dtype::f64},
    {"complex64", dtype::c64},
    {"complex128", dtype::c128},
    {"bfloat16", dtype::bf16},
    {"float8_e4m3fn", dtype::f8_e4m3},
    {"float8_e5m2", dtype::f8_e5m2},
    {"float8_e4m3fnuz", dtype::f8_e4m3fnuz},
    {"float8_e5m2fnuz", dtype::f8_e5m2fnuz},
    {"float8_e8m0fnu", dtype::f8_e8m0},
};

/// The type of that name, little endian; none if it is no type that is read.
inline std::optional<dtype> npy_type_of(std::string_view descr) {
  for (npy_type const& named : npy_names)
    if (named.descr == descr) return named.type;
  bool const big = descr.starts_with('>');
  if (big || descr.starts_with('<') || descr.starts_with('=') || descr.starts_with('|'))
    descr.remove_prefix(1);
  std::optional<dtype> out;
  for (npy_type const& written : npy_types)
    if (written.descr.substr(1) == descr) out = written.type;
  for (npy_type const& code : npy_codes)
    if (code.descr == descr) out = code.type;
  return big && out && bits(*out) > 8 ? std::nullopt : out;  // a byte has no order
}

/// Says of x what its bits are, if it has elements of that size without another meaning.
inline bool apply(reinterpret bits, tensor& x) {
  bool const halves = x.type == dtype::raw16 || x.type == dtype::u16 || x.type == dtype::i16;
  bool const bytes = x.type == dtype::raw8 || x.type == dtype::u8 || x.type == dtype::i8;
  switch (bits) {
    case reinterpret::as_f16: return halves && (x.type = dtype::f16, true);
    case reinterpret::as_bf16: return halves && (x.type = dtype::bf16, true);
    case reinterpret::as_f8_e4m3: return bytes && (x.type = dtype::f8_e4m3, true);
    case reinterpret::as_f8_e5m2: return bytes && (x.type = dtype::f8_e5m2, true);
    default: return false;
  }
}

/// The Python dictionary of a .npy header, and nothing else that Python could say there.
class npy_header {
 public:
  dtype type = dtype::f32;
  bool fortran_order = false;
  std::vector<std::ptrdiff_t> shape;

  /// @param  suffixed  Python 2 wrote it, perhaps, and ended extents with L
  npy_header(std::string const& file, std::string_view text, std::size_t offset, bool suffixed)
      : file_(file), text_(text), offset_(offset), suffixed_(suffixed) {
    bool seen[3] = {};
    skip();
    expect('{', "the header is not a dictionary");
    for (skip(); peek() != '}'; skip()) {
      std::size_t const start = at_;
      std::string_view const key = string();
      std::size_t const which = key == "descr" ? 0 : key == "fortran_order" ? 1 : 2;
      if (which == 2 && key != "shape") fail(start, "unknown key in the header");
      if (std::exchange(seen[which], true)) fail(start, "repeated key in the header");
      skip();
      expect(':', "':' expected");
      skip();
      if (which == 0)
        read_type();
      else if (which == 1)
        read_order();
      else
        read_shape();
      skip();
      if (peek() != '}') expect(',', "',' or '}' expected");
    }
    std::size_t const end = at_++;
    for (std::size_t i = 0; i < 3; ++i) {
      char const* const keys[] = {"descr", "fortran_order", "shape"};
      if (!seen[i]) fail(end, std::string(keys[i]) + " is missing from the header");
    }
    skip();
    if (at_ != text_.size()) fail(at_, "text after the header's dictionary");
  }

 private:
  [[noreturn]] void fail(std::size_t at, std::string const& rule) const {
    throw format_error(file_, offset_ + at, rule);
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }
  void expect(char c, char const* rule) {
    if (at_ >= text_.size()) fail(at_, "the header ends within its dictionary");
    if (text_[at_] != c) fail(at_, rule);
    ++at_;
  }
  bool word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) return false;
    at_ += w.size();
    return true;
  }

  std::string_view string() {
    if (peek() == 'u') ++at_;
    char const quote = peek();
    if (quote != '\'' && quote != '"') {
      if (at_ >= text_.size()) fail(at_, "the header ends within its dictionary");
      fail(at_, "a quoted string expected");
    }
    std::size_t const start = ++at_;
    while (peek() != quote) {
      if (peek() < ' ' || peek() > '~' || peek() == '\\') fail(at_, "unfinished or escaped string");
      ++at_;
    }
    return text_.substr(start, at_++ - start);
  }

  void read_type() {
    std::size_t const start = at_;
    if (peek() == '[' || peek() == '(') fail(start, "structured types are not read");
    std::string_view const descr = string();
    if (auto const known = npy_type_of(descr)) {
      type = *known;
      return;
    }
    std::string const name = "'" + std::string(descr) + "'";
    if (descr.size() > 1 && descr[1] == 'O')
      fail(start, name + ": Python objects (pickle) are not read");
    if (!descr.empty() && descr[0] == '>')
      fail(start,
           name + ": big endian is not read (in Python: x.astype(x.dtype.newbyteorder('<')))");
    fail(start, name + ": not a type that is read (<f2 <f4 <f8, integers, |b1, |V1, |V2)");
  }

  void read_order() {
    if (word("True"))
      fortran_order = true;
    else if (!word("False"))
      fail(at_, "True or False expected");
  }

  void read_shape() {
    expect('(', "shape is not a tuple");
    for (skip(); peek() != ')'; skip()) {
      std::size_t const start = at_;
      if (shape.size() == most_axes) fail(start, "more than 64 axes");
      std::ptrdiff_t n = 0;
      for (; peek() >= '0' && peek() <= '9'; ++at_) {
        std::ptrdiff_t const digit = peek() - '0';
        if (!multiply(n, 10, n) || n > PTRDIFF_MAX - digit) fail(start, "extent too large");
        n += digit;
      }
      if (at_ == start || (text_[start] == '0' && at_ != start + 1))
        fail(start, "an extent is not a plain number");
      if (suffixed_ && peek() == 'L') ++at_;
      shape.push_back(n);
      skip();
      if (peek() == ')' && shape.size() == 1) fail(at_, "a tuple of one extent needs a comma");
      if (peek() != ')') expect(',', "',' or ')' expected in shape");
    }
    ++at_;
  }

  std::string const& file_;
  std::string_view text_;
  std::size_t offset_, at_ = 0;
  bool suffixed_;
};

}  // namespace detail

inline npy_file::npy_file(mapped_file file, reinterpret bits) : file_(std::move(file)) {
  std::string const& path = file_.path();
  std::string_view const all(reinterpret_cast<char const*>(file_.bytes().data()),
                             file_.bytes().size());
  constexpr std::string_view magic = "\x93NUMPY";
  if (all.substr(0, magic.size()) != magic)
    throw format_error(path, 0,
                       all.empty()
                           ? "the file is empty"
                           : "wrong magic: not a .npy file" + detail::but(file_.bytes(), path));
  auto const byte = [&](std::size_t i) {
    if (i >= all.size()) throw format_error(path, all.size(), "the file ends within its header");
    return std::size_t{static_cast<unsigned char>(all[i])};
  };
  std::size_t const major_version = byte(6), minor_version = byte(7);
  if (major_version < 1 || major_version > 3 || minor_version != 0)
    throw format_error(path, 6,
                       "version " + std::to_string(major_version) + "." +
                           std::to_string(minor_version) + " is none of 1.0, 2.0, 3.0");
  std::size_t const begin = major_version == 1 ? 10 : 12;
  std::size_t size = 0;
  for (std::size_t i = begin; i-- > 8;) size = size << 8 | byte(i);
  if (size > 10000)
    throw format_error(path, 8, "a header of " + std::to_string(size) + " bytes (at most 10000)");
  if (size > all.size() - begin)
    throw format_error(path, all.size(), "the file ends within its header");

  detail::npy_header header(path, all.substr(begin, size), begin, major_version < 3);
  std::size_t const start = begin + size;
  auto const extent = detail::extent_of(header.shape, rflow::bits(header.type));
  if (!extent.ok)
    throw format_error(path, begin, "shape " + detail::shape_text(header.shape) + " overflows");
  auto const needed = static_cast<std::size_t>(extent.bits / 8);
  if (all.size() - start > needed && all.substr(start + needed).starts_with(magic))
    throw format_error(path, start + needed,
                       "another array follows: save each in a file of its own, or all with "
                       "numpy.savez");
  if (all.size() - start != needed)
    throw format_error(path, std::min<std::size_t>(all.size(), start + needed),
                       std::to_string(all.size() - start) + " bytes of data, but " +
                           std::string(to_string(header.type)) + " " +
                           detail::shape_text(header.shape) + " takes " + std::to_string(needed));

  array_.name = std::filesystem::path(path).stem().string();
  array_.type = header.type;
  array_.shape = std::move(header.shape);
  array_.strides = detail::dense_strides(array_.shape, header.fortran_order);
  if (bits != reinterpret::nothing && !detail::apply(bits, array_))
    detail::reject("rflow::npy_file",
                   path +
                       ": only 16-bit integers and |V2 are reinterpreted as halves, only 8-bit "
                       "integers and |V1 as 8-bit floats, found " +
                       array_.description());
  array_.data = file_.aligned(start, needed, detail::alignment(array_.type));
}

inline npy_directory::npy_directory(std::filesystem::path const& path, reinterpret bits)
    : path_(path.string()), bits_(bits) {
  for (auto const& entry : std::filesystem::directory_iterator(path))
    if (entry.path().extension() == ".npy") files_[entry.path().stem().string()];
}

inline std::vector<std::string> npy_directory::names() const {
  std::vector<std::string> out;
  for (auto const& [name, file] : files_) out.push_back(name);
  return out;
}

inline tensor const& npy_directory::operator[](std::string_view name) {
  auto const found = files_.find(name);
  if (found == files_.end())
    detail::reject("rflow::npy_directory", path_ + " has no file " + std::string(name) + ".npy");
  if (!found->second) {
    npy_file file(std::filesystem::path(path_) / (found->first + ".npy"));
    tensor array = file.array();
    detail::apply(bits_, array);
    found->second.emplace(opened{std::move(file), std::move(array)});
  }
  return found->second->array;
}

inline void write_npy(std::filesystem::path const& path, tensor const& x) {
  detail::require_writable("rflow::write_npy", x);
  auto const known = std::find_if(std::begin(detail::npy_types), std::end(detail::npy_types),
                                  [&](detail::npy_type const& t) { return t.type == x.type; });
  if (known == std::end(detail::npy_types))
    detail::reject("rflow::write_npy", "NumPy has no type for " + x.description());
  std::string header =
      "{'descr': '" + std::string(known->descr) + "', 'fortran_order': False, 'shape': (";
  for (std::size_t i = 0; i < x.shape.size(); ++i)
    header += (i == 0 ? "" : ", ") + std::to_string(x.shape[i]);
  header += x.shape.size() == 1 ? ",), }" : "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  std::string start = "\x93NUMPY\x01";
  start += '\0';
  start += static_cast<char>(header.size() & 0xff);
  start += static_cast<char>(header.size() >> 8);

  atomic_writer out(path);
  out.write(start + header);
  detail::write_elements(out, x);
  out.commit();
}

}  // namespace rflow
