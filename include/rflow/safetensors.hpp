// SPDX-License-Identifier: Apache-2.0
#pragma once

// From safetensors: named tensors in one file, mapped, validated and viewed in place; and back. It
// needs nlohmann-json (CMake target rflow::safetensors). For single arrays from NumPy npy.hpp
// needs less; PyTorch's .pt files are pickles and are not read.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <rflow/container.hpp>
#include <rflow/file.hpp>

namespace rflow {

namespace detail {

struct safetensors_entry {
  dtype type = dtype::f32;
  std::vector<std::ptrdiff_t> shape;
  std::uint64_t begin = 0, end = 0;  // relative to the data
  std::size_t at = 0;                // where the file describes it
};
using safetensors_entries = std::map<std::string, safetensors_entry, std::less<>>;

/// The format's own limit, for reading and for writing.
inline constexpr std::size_t safetensors_header_limit = 100'000'000;

}  // namespace detail

/// One safetensors file.
///
/// Checks what the reference implementation checks: a header of at most 100 MB inside the file;
/// UTF-8 JSON of the format's schema; data offsets without holes, overlaps or bytes left over at
/// the end; sizes that agree with type and shape, multiplied with checks. As there, __metadata__ may
/// be null, and fields that the format does not have are left alone. Stricter than it where a file
/// could mean two things: keys that appear twice, and more than 64 axes, are errors.
class safetensors_file {
 public:
  /// Opens and validates a file; reads none of the data.
  /// @throws std::system_error if it cannot be opened; format_error if it is malformed
  explicit safetensors_file(std::filesystem::path const& path)
      : safetensors_file(mapped_file(path)) {}

  /// The same for a file that is mapped already, or bytes in memory (mapped_file::borrow).
  explicit safetensors_file(mapped_file file);

  /// Names of the tensors in alphabetical order.
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    out.reserve(entries_.size());
    for (auto const& [name, entry] : entries_) out.push_back(name);
    return out;
  }
  /// Whether there is a tensor of that name.
  bool contains(std::string_view name) const { return entries_.find(name) != entries_.end(); }
  /// Number of tensors.
  std::size_t size() const { return entries_.size(); }

  /// A tensor, of any type; valid as long as this object. Looks at the mapping where the file
  /// aligns the data for their type (the reference writer does); else at a copy made on first use
  /// and kept. May be called from several threads.
  /// @throws std::invalid_argument naming the file and what it has, if there is no such tensor
  tensor operator[](std::string_view name) const;

  /// The free-form strings of the header ("__metadata__").
  std::map<std::string, std::string, std::less<>> const& metadata() const { return metadata_; }

  /// The path it was opened by.
  std::string const& path() const { return file_.path(); }

 private:
  mapped_file file_;
  std::size_t data_ = 0;  // where the tensors' bytes begin
  detail::safetensors_entries entries_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

/// Writes tensors (see as_tensor) as one file, row-major whatever their strides, in the reference
/// writer's order: widest type first, then by name, with the header padded so that all data are
/// aligned. The file appears complete or not at all; a file of that name may be mapped meanwhile.
/// @throws std::invalid_argument if a name appears twice, is "__metadata__" or is not UTF-8, if a
///         type is raw16 or c128, or if the header would exceed 100 MB; std::system_error with the
///         path if writing fails
inline void write_safetensors(std::filesystem::path const& path, std::span<tensor const> tensors,
                              std::map<std::string, std::string> const& metadata = {});

// ---- implementation -----------------------------------------------------------------------------

namespace detail {

struct safetensors_type {
  std::string_view name;
  dtype type;
};
// In the reference implementation's order: its writer puts later types first.
inline constexpr safetensors_type safetensors_types[] = {
    {"BOOL", dtype::boolean},
    {"F4", dtype::f4},
    {"F6_E2M3", dtype::f6_e2m3},
    {"F6_E3M2", dtype::f6_e3m2},
    {"U8", dtype::u8},
    {"I8", dtype::i8},
    {"F8_E5M2", dtype::f8_e5m2},
    {"F8_E4M3", dtype::f8_e4m3},
    {"F8_E8M0", dtype::f8_e8m0},
    {"F8_E4M3FNUZ", dtype::f8_e4m3fnuz},
    {"F8_E5M2FNUZ", dtype::f8_e5m2fnuz},
    {"I16", dtype::i16},
    {"U16", dtype::u16},
    {"F16", dtype::f16},
    {"BF16", dtype::bf16},
    {"I32", dtype::i32},
    {"U32", dtype::u32},
    {"F32", dtype::f32},
    {"C64", dtype::c64},
    {"F64", dtype::f64},
    {"I64", dtype::i64},
    {"U64", dtype::u64},
};

/// Characters of the header, counted as the JSON library takes them.
struct counted_characters {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = char const*;
  using reference = char const&;

  char const* at;
  std::size_t* taken;

  char const& operator*() const { return *at; }
  counted_characters& operator++() {
    ++at;
    ++*taken;
    return *this;
  }
  counted_characters operator++(int) {
    counted_characters const before = *this;
    ++*this;
    return before;
  }
  bool operator==(counted_characters const& other) const { return at == other.at; }
};

/// Takes the header event by event, so that repeated keys are seen and nothing is stored but what
/// the format has. The members are those of nlohmann's SAX interface.
class safetensors_header {
 public:
  safetensors_entries entries;
  std::map<std::string, std::string, std::less<>> metadata;
  std::size_t taken = 0;

  safetensors_header(std::string const& file, std::size_t offset) : file_(file), offset_(offset) {}

  bool null() {
    if (inside_ == place::file_metadata) {  // as MLX writes it
      inside_ = place::file;
      return true;
    }
    return ignored() || unexpected("null");
  }
  bool boolean(bool) { return ignored() || unexpected("a boolean"); }
  bool number_integer(std::int64_t) { return ignored() || unexpected("a negative number"); }
  bool number_float(double, std::string const&) {
    return ignored() || unexpected("a number that is not an integer below 2^64");
  }
  bool binary(std::vector<std::uint8_t>&) { return unexpected("binary data"); }

  bool number_unsigned(std::uint64_t n) {
    if (ignored()) return true;
    if (inside_ == place::shape) {
      if (n > static_cast<std::uint64_t>(PTRDIFF_MAX)) fail("extent too large");
      if (current_->shape.size() == most_axes) fail("more than 64 axes");
      current_->shape.push_back(static_cast<std::ptrdiff_t>(n));
      return true;
    }
    if (inside_ != place::offsets) return unexpected("a number");
    if (offsets_ == 2) fail("data_offsets has more than two numbers");
    (offsets_ == 0 ? current_->begin : current_->end) = n;
    ++offsets_;
    return true;
  }

  bool string(std::string& text) {
    if (ignored()) return true;
    if (inside_ == place::metadata) {
      metadata_value_->second = std::move(text);
      return true;
    }
    if (inside_ != place::type) return unexpected("a string");
    auto const known = std::find_if(std::begin(safetensors_types), std::end(safetensors_types),
                                    [&](safetensors_type const& t) { return t.name == text; });
    if (known == std::end(safetensors_types)) fail("unknown dtype '" + printable(text) + "'");
    current_->type = known->type;
    inside_ = place::tensor;
    return true;
  }

  bool start_object(std::size_t) {
    if (inside_ == place::unknown)
      ++depth_;
    else if (inside_ == place::outside)
      inside_ = place::file;
    else if (inside_ == place::file_value)
      inside_ = place::tensor;
    else if (inside_ == place::file_metadata)
      inside_ = place::metadata;
    else
      return unexpected("an object");
    return true;
  }

  bool key(std::string& name) {
    if (inside_ == place::file) {
      if (name == "__metadata__") {
        if (std::exchange(has_metadata_, true)) fail("__metadata__ appears twice");
        inside_ = place::file_metadata;
        return true;
      }
      auto const [found, is_new] = entries.try_emplace(std::move(name));
      if (!is_new) fail("tensor '" + printable(found->first) + "' appears twice");
      current_ = &found->second;
      current_->at = here();
      has_type_ = has_shape_ = has_offsets_ = false;
      inside_ = place::file_value;
      return true;
    }
    if (inside_ == place::metadata) {
      auto const [found, is_new] = metadata.try_emplace(std::move(name));
      if (!is_new) fail("metadata '" + printable(found->first) + "' appears twice");
      metadata_value_ = &*found;
      return true;
    }
    if (inside_ == place::unknown) return true;
    if (inside_ != place::tensor) return unexpected("a key");
    if (name == "dtype")
      field(has_type_, place::type, name);
    else if (name == "shape")
      field(has_shape_, place::shape_value, name);
    else if (name == "data_offsets")
      field(has_offsets_, place::offsets_value, name);
    else
      inside_ = place::unknown;
    return true;
  }

  bool end_object() {
    if (inside_ == place::unknown) {
      --depth_;
      return ignored();
    }
    if (inside_ == place::tensor) {
      if (!has_type_) fail("a tensor without dtype");
      if (!has_shape_) fail("a tensor without shape");
      if (!has_offsets_) fail("a tensor without data_offsets");
    }
    inside_ = inside_ == place::file ? place::outside : place::file;
    return true;
  }

  bool start_array(std::size_t) {
    if (inside_ == place::unknown) {
      ++depth_;
      return true;
    }
    if (inside_ == place::shape_value) {
      inside_ = place::shape;
      return true;
    }
    if (inside_ != place::offsets_value) return unexpected("an array");
    inside_ = place::offsets;
    offsets_ = 0;
    return true;
  }

  bool end_array() {
    if (inside_ == place::unknown) {
      --depth_;
      return ignored();
    }
    if (inside_ == place::offsets && offsets_ != 2) fail("data_offsets needs two numbers");
    inside_ = place::tensor;
    return true;
  }

  bool parse_error(std::size_t, std::string const&, nlohmann::json::exception const& error) {
    // The library's text repeats its own position; the rule follows the last ": ".
    std::string const text = error.what();
    auto const rule = text.find("; last read: ");
    auto const start = text.find(": ");
    fail("the header is not UTF-8 JSON" +
         (start == std::string::npos ? "" : text.substr(start, rule - start)));
  }

 private:
  enum class place {
    outside,
    file,
    file_value,
    file_metadata,
    metadata,
    tensor,
    type,
    shape_value,
    shape,
    offsets_value,
    offsets,
    unknown,  // in the value of a field that the format does not have
  };

  std::size_t here() const { return offset_ + (taken == 0 ? 0 : taken - 1); }
  [[noreturn]] void fail(std::string const& rule) const { throw format_error(file_, here(), rule); }
  bool unexpected(char const* what) const {
    switch (inside_) {
      case place::outside: fail(std::string("the header is ") + what + ", not an object");
      case place::file_value: fail(std::string("a tensor is ") + what + ", not an object");
      case place::file_metadata: fail(std::string("__metadata__ is ") + what + ", not an object");
      case place::metadata: fail(std::string("a metadata value is ") + what + ", not a string");
      case place::type: fail(std::string("dtype is ") + what + ", not a string");
      case place::shape_value: fail(std::string("shape is ") + what + ", not an array");
      case place::shape: fail(std::string("an extent is ") + what);
      case place::offsets_value: fail(std::string("data_offsets is ") + what + ", not an array");
      case place::offsets: fail(std::string("an offset is ") + what);
      default: fail(std::string(what) + " is out of place");
    }
  }
  /// Whether this was part of an unknown field's value, which may end here.
  bool ignored() {
    if (inside_ != place::unknown) return false;
    if (depth_ == 0) inside_ = place::tensor;
    return true;
  }
  void field(bool& seen, place next, std::string const& name) {
    if (std::exchange(seen, true)) fail("field '" + name + "' appears twice");
    inside_ = next;
  }

  std::string const& file_;
  std::size_t offset_;
  place inside_ = place::outside;
  bool has_metadata_ = false, has_type_ = false, has_shape_ = false, has_offsets_ = false;
  int offsets_ = 0;
  std::size_t depth_ = 0;
  safetensors_entry* current_ = nullptr;
  std::pair<std::string const, std::string>* metadata_value_ = nullptr;
};

/// The rule that a tensor breaks, where the data before it end at previous_end; empty if none.
inline std::string broken_rule(safetensors_entry const& x, std::uint64_t previous_end) {
  auto const range = [&] {
    return "data_offsets [" + std::to_string(x.begin) + ", " + std::to_string(x.end) + "]";
  };
  auto const array = [&] { return std::string(to_string(x.type)) + " " + shape_text(x.shape); };
  if (x.end < x.begin) return range() + " end before they begin";
  if (x.begin != previous_end)
    return range() + (x.begin < previous_end ? " overlap" : " leave a hole after") +
           " the data before, which end at " + std::to_string(previous_end);
  extent const e = extent_of(x.shape, bits(x.type));
  if (!e.ok) return array() + " overflows";
  if (e.bits % 8 != 0) return array() + " does not fill whole bytes";
  if (x.end - x.begin != static_cast<std::uint64_t>(e.bits / 8))
    return range() + " hold " + std::to_string(x.end - x.begin) + " bytes, but " + array() +
           " takes " + std::to_string(e.bits / 8);
  return "";
}

}  // namespace detail

inline safetensors_file::safetensors_file(mapped_file file) : file_(std::move(file)) {
  std::string const& path = file_.path();
  std::span<std::byte const> const all = file_.bytes();
  if (all.size() < 8)
    throw format_error(
        path, all.size(),
        all.empty() ? "the file is empty" : "the file ends within the header's length");
  std::uint64_t declared = 0;
  std::memcpy(&declared, all.data(), sizeof declared);
  if (declared > detail::safetensors_header_limit)
    throw format_error(path, 0,
                       "a header of " + std::to_string(declared) +
                           " bytes (at most 100000000): not a safetensors file" +
                           detail::but(all, path));
  auto const size = static_cast<std::size_t>(declared);
  if (size > all.size() - 8)
    throw format_error(path, all.size(),
                       "the file ends within its header of " + std::to_string(size) + " bytes");
  data_ = 8 + size;

  std::string_view const text(reinterpret_cast<char const*>(all.data()) + 8, size);
  // The JSON library takes a NUL for the end of its input.
  if (auto const nul = text.find('\0'); nul != std::string_view::npos)
    throw format_error(path, 8 + nul, "a NUL byte in the header");
  // And it skips a byte order mark.
  auto const first = text.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos || text[first] != '{')
    throw format_error(path, 8 + (first == std::string_view::npos ? 0 : first),
                       "the header does not begin with {");
  detail::safetensors_header header(path, 8);
  nlohmann::json::sax_parse(detail::counted_characters{text.data(), &header.taken},
                            detail::counted_characters{text.data() + size, &header.taken}, &header);
  entries_ = std::move(header.entries);
  metadata_ = std::move(header.metadata);

  using entry = detail::safetensors_entries::value_type;
  std::vector<entry const*> order;
  order.reserve(entries_.size());
  for (entry const& e : entries_) order.push_back(&e);
  std::sort(order.begin(), order.end(), [](entry const* a, entry const* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::uint64_t end = 0;
  for (entry const* const e : order) {
    std::string const broken = detail::broken_rule(e->second, end);
    if (!broken.empty()) throw format_error(path, e->second.at, broken);
    end = e->second.end;
  }
  std::uint64_t const present = all.size() - data_;
  if (end != present)
    throw format_error(path, data_ + std::min<std::uint64_t>(end, present),
                       end > present
                           ? "the file ends " + std::to_string(end - present) +
                                 " bytes before its last tensor does"
                           : std::to_string(present - end) + " bytes after the last tensor");
}

inline tensor safetensors_file::operator[](std::string_view name) const {
  auto const found = entries_.find(name);
  if (found == entries_.end()) {
    std::string text = path() + " has no tensor '" + detail::printable(name) + "'; it has ";
    std::size_t listed = 0;
    for (auto const& [present, unused] : entries_) {
      if (++listed > 8) break;
      text += (listed == 1 ? "" : ", ") + detail::printable(present);
    }
    if (entries_.size() > 8) text += " and " + std::to_string(entries_.size() - 8) + " more";
    detail::reject("rflow::safetensors_file", text + (entries_.empty() ? "none" : ""));
  }
  detail::safetensors_entry const& x = found->second;
  auto const begin = static_cast<std::size_t>(x.begin), end = static_cast<std::size_t>(x.end);
  return {found->first, x.type, x.shape, detail::dense_strides(x.shape),
          file_.aligned(data_ + begin, end - begin, detail::alignment(x.type))};
}

inline void write_safetensors(std::filesystem::path const& path, std::span<tensor const> tensors,
                              std::map<std::string, std::string> const& metadata) {
  char const* const where = "rflow::write_safetensors";
  std::vector<std::pair<std::ptrdiff_t, tensor const*>> order;  // place of the type in the table
  for (tensor const& x : tensors) {
    detail::require_writable(where, x);
    auto const begin = std::begin(detail::safetensors_types);
    auto const end = std::end(detail::safetensors_types);
    auto const known = std::find_if(
        begin, end, [&](detail::safetensors_type const& t) { return t.type == x.type; });
    if (known == end) detail::reject(where, "safetensors has no type for " + x.description());
    order.emplace_back(known - begin, &x);
  }
  std::sort(order.begin(), order.end(), [](auto const& a, auto const& b) {
    return a.first != b.first ? a.first > b.first : a.second->name < b.second->name;
  });
  auto const quoted = [&](std::string const& text) {
    try {
      return nlohmann::json(text).dump();
    } catch (nlohmann::json::type_error const&) {
      detail::reject(where, "a name or metadata that is not UTF-8");
    }
  };

  std::string header = "{";
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (auto const& [key, value] : metadata)
      header += (header.back() == '{' ? "" : ",") + quoted(key) + ":" + quoted(value);
    header += "}";
  }
  std::map<std::string_view, int> names;
  std::ptrdiff_t begin = 0;
  for (auto const& [place, x] : order) {
    if (x->name == "__metadata__" || ++names[x->name] > 1)
      detail::reject(where,
                     "the name '" + detail::printable(x->name) + "' is reserved or appears twice");
    std::ptrdiff_t const bytes = detail::extent_of(x->shape, bits(x->type)).bits / 8;
    if (bytes > PTRDIFF_MAX - begin) detail::reject(where, "more than 2^63 bytes");
    std::string shape;
    for (std::ptrdiff_t const n : x->shape)
      (shape += shape.empty() ? "" : ",") += std::to_string(n);
    header += header.size() == 1 ? "" : ",";
    header += quoted(x->name) + R"(:{"dtype":")" +
              std::string(detail::safetensors_types[place].name) + R"(","shape":[)" + shape +
              R"(],"data_offsets":[)" + std::to_string(begin) + "," +
              std::to_string(begin + bytes) + "]}";
    begin += bytes;
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');
  if (header.size() > detail::safetensors_header_limit)
    detail::reject(where,
                   "a header of " + std::to_string(header.size()) + " bytes (at most 100000000)");

  atomic_writer out(path);
  std::uint64_t const size = header.size();
  out.write(std::as_bytes(std::span(&size, 1)));
  out.write(header);
  for (auto const& [place, x] : order) detail::write_elements(out, *x);
  out.commit();
}

}  // namespace rflow
