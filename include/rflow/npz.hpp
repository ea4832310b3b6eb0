// SPDX-License-Identifier: Apache-2.0
#pragma once

// From NumPy's .npz: a zip archive of .npy files, mapped, validated and viewed in place where it is not
// compressed (numpy.savez). What numpy.savez_compressed writes needs an inflater: inflate.hpp has
// one.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <rflow/container.hpp>
#include <rflow/file.hpp>
#include <rflow/npy.hpp>

namespace rflow {

/// Makes compressed bytes plain (RFC 1951): fills `out` from `in`. False if the stream is broken, or
/// does not end with both.
using inflater = bool (*)(std::span<std::byte const> in, std::span<std::byte> out);

namespace detail {

struct zip_member {
  std::string name;  // without .npy
  std::uint16_t flags = 0, method = 0;
  std::uint32_t crc = 0;
  std::uint64_t packed = 0, size = 0;  // bytes in the archive, and plain
  std::uint64_t header = 0;            // where its local header begins
  std::uint64_t data = 0, end = 0;     // where its bytes begin and end
};

}  // namespace detail

/// One .npz file.
///
/// Reads zip archives as NumPy writes them, zip64 and data descriptors included, and is stricter than
/// it where an archive could mean two things: names that appear twice, members that overlap, local
/// headers that contradict the directory, bytes after the archive, archives in parts. Each member's
/// checksum is verified when it is first asked for. Members that are no .npy files are left alone.
class npz_file {
 public:
  /// Opens an archive and validates its directory; reads none of the arrays.
  /// @param  path     the file
  /// @param  inflate  for compressed members, such as zlib_inflate of inflate.hpp; without one they
  ///                  are refused
  /// @param  bits     says what integers or nameless bytes are, where a member holds such
  /// @throws std::system_error if it cannot be opened; format_error if it is malformed
  explicit npz_file(std::filesystem::path const& path, inflater inflate = nullptr,
                    reinterpret bits = reinterpret::nothing)
      : npz_file(mapped_file(path), inflate, bits) {}

  /// The same for a file that is mapped already, or bytes in memory (mapped_file::borrow).
  explicit npz_file(mapped_file file, inflater inflate = nullptr,
                    reinterpret bits = reinterpret::nothing);

  /// Names of the arrays, without .npy, in alphabetical order.
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (auto const& [name, member] : entries_) out.push_back(name);
    return out;
  }
  /// Whether there is an array of that name.
  bool contains(std::string_view name) const { return entries_.find(name) != entries_.end(); }
  /// Number of arrays.
  std::size_t size() const { return entries_.size(); }
  /// Number of members that are no .npy files.
  std::size_t others() const { return others_; }

  /// An array; valid as long as this object. Looks at the mapping where the archive stores and
  /// aligns it, else at a copy made on first use and kept. Cost of the first use: one pass over the
  /// member for its checksum, and inflating.
  /// @throws std::invalid_argument if there is no such array, if it is compressed and there is no
  ///         inflater, or if it is encrypted; format_error if it is malformed or its checksum is of
  ///         other bytes; what npy_file throws
  tensor const& operator[](std::string_view name);

  /// The path it was opened by.
  std::string const& path() const { return file_.path(); }

 private:
  struct entry {
    detail::zip_member member;
    std::unique_ptr<std::byte[]> plain;  // if it was compressed
    std::optional<npy_file> file;
    tensor array;
  };
  void open(entry& e);

  mapped_file file_;
  inflater inflate_;
  reinterpret bits_;
  std::map<std::string, entry, std::less<>> entries_;
  std::size_t others_ = 0;
};

// ---- implementation -----------------------------------------------------------------------------

namespace detail {

/// CRC-32 as zip has it (ISO 3309, reflected polynomial 0xedb88320), eight bytes at a time: table k
/// carries a byte over k further bytes of zeros.
inline constexpr auto crc_tables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> out{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1) != 0 ? 0xedb88320u ^ (c >> 1) : c >> 1;
    out[0][i] = c;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t i = 0; i < 256; ++i)
      out[k][i] = out[0][out[k - 1][i] & 0xff] ^ (out[k - 1][i] >> 8);
  return out;
}();

inline std::uint32_t crc32(std::span<std::byte const> bytes) {
  std::uint32_t c = 0xffffffffu;
  std::size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, 8);
    word ^= c;
    c = 0;
    for (std::size_t k = 0; k < 8; ++k) c ^= crc_tables[7 - k][word >> (8 * k) & 0xff];
  }
  for (; i < bytes.size(); ++i)
    c = crc_tables[0][(c ^ std::to_integer<std::uint32_t>(bytes[i])) & 0xff] ^ (c >> 8);
  return ~c;
}

/// The directory of a zip archive (PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3).
class zip_directory {
 public:
  std::vector<zip_member> members;  // in the order of their bytes

  explicit zip_directory(mapped_file const& file) : path_(file.path()), all_(file.bytes()) {
    std::uint64_t const end = end_record();
    std::uint64_t count = number(end + 10, 2), size = number(end + 12, 4),
                  begin = number(end + 16, 4), limit = end;
    if (number(end + 4, 2) != number(end + 6, 2) || number(end + 8, 2) != count)
      fail(end + 4, "an archive in parts");
    if (count == 0xffff || size == 0xffffffff || begin == 0xffffffff) {
      if (end < 20 || number(end - 20, 4) != 0x07064b50)
        fail(end, "the record of a zip64 archive is missing");
      limit = number(end - 12, 8);
      if (limit > end - 20 || end - 20 - limit < 56 || number(limit, 4) != 0x06064b50)
        fail(end - 12, "the record of a zip64 archive is not where it should be");
      if (number(end - 4, 4) > 1 || number(limit + 24, 8) != number(limit + 32, 8))
        fail(limit + 16, "an archive in parts");
      count = number(limit + 32, 8);
      size = number(limit + 40, 8);
      begin = number(limit + 48, 8);
    }
    if (begin > limit || size != limit - begin)
      fail(end + 12, "the directory is not where it should be");
    std::uint64_t at = begin;
    for (; at < limit; --count) {
      if (count == 0) fail(at, "the directory has more members than it says");
      at = read_member(at, limit);
    }
    if (count != 0) fail(at, "the directory has fewer members than it says");
    std::sort(members.begin(), members.end(),
              [](zip_member const& a, zip_member const& b) { return a.header < b.header; });
    std::uint64_t previous = 0;
    for (zip_member& m : members) {
      if (m.header < previous) fail(m.header, "members overlap");
      locate(m, begin);
      previous = m.end;
    }
  }

 private:
  [[noreturn]] void fail(std::uint64_t at, std::string const& rule) const {
    throw format_error(path_, at, rule);
  }
  std::uint64_t number(std::uint64_t at, int bytes) const {
    if (at > all_.size() || all_.size() - at < static_cast<std::size_t>(bytes))
      fail(all_.size(), "the file ends within a record");
    std::uint64_t out = 0;
    for (int i = bytes; i-- > 0;)
      out = out << 8 | std::to_integer<std::uint64_t>(all_[at + static_cast<std::size_t>(i)]);
    return out;
  }
  std::string_view text(std::uint64_t at, std::uint64_t length) const {
    return {reinterpret_cast<char const*>(all_.data()) + at, static_cast<std::size_t>(length)};
  }

  /// Where the record at the end begins: a comment of up to 65,535 bytes may follow it.
  std::uint64_t end_record() const {
    if (all_.empty()) fail(0, "the file is empty");
    if (all_.size() < 4 || text(0, 2) != "PK")
      fail(0, "wrong magic: not a .npz file" + but(all_, path_));
    std::size_t const most = 22 + 65535;
    for (std::size_t back = 22; back <= (std::min)(most, all_.size()); ++back) {
      std::size_t const at = all_.size() - back;
      if (text(at, 4) == "PK\5\6" && number(at + 20, 2) == back - 22) return at;
    }
    fail(all_.size(), "no record of an archive at the end: the file is cut short or longer");
  }

  /// Reads the entry at that place; returns where the next one begins.
  std::uint64_t read_member(std::uint64_t at, std::uint64_t limit) {
    if (limit - at < 46 || number(at, 4) != 0x02014b50) fail(at, "not an entry of a directory");
    zip_member m;
    m.flags = static_cast<std::uint16_t>(number(at + 8, 2));
    m.method = static_cast<std::uint16_t>(number(at + 10, 2));
    m.crc = static_cast<std::uint32_t>(number(at + 16, 4));
    m.packed = number(at + 20, 4);
    m.size = number(at + 24, 4);
    m.header = number(at + 42, 4);
    std::uint64_t const name = number(at + 28, 2), extra = number(at + 30, 2),
                        comment = number(at + 32, 2);
    if (limit - at - 46 < name + extra + comment) fail(at, "an entry beyond the directory");
    m.name = text(at + 46, name);
    std::uint64_t field = at + 46 + name;
    std::uint64_t const fields_end = field + extra;
    for (bool seen = false; fields_end - field >= 4;) {
      std::uint64_t const id = number(field, 2), length = number(field + 2, 2);
      field += 4;
      if (length > fields_end - field) fail(field - 2, "an extra field beyond its entry");
      if (id == 1 && !std::exchange(seen, true)) {  // zip64: in this order, where 32 bits are full
        std::uint64_t value = field;
        for (std::uint64_t* const wide : {&m.size, &m.packed, &m.header}) {
          if (*wide != 0xffffffff) continue;
          if (field + length - value < 8) fail(field, "a zip64 field that is too short");
          *wide = number(value, 8);
          value += 8;
        }
      }
      field += length;
    }
    members.push_back(std::move(m));
    return at + 46 + name + extra + comment;
  }

  /// Finds a member's bytes behind its local header, which has to agree with the directory.
  void locate(zip_member& m, std::uint64_t limit) const {
    std::uint64_t const at = m.header;
    if (at > limit || limit - at < 30 || number(at, 4) != 0x04034b50)
      fail((std::min)(at, limit), "no local header of '" + printable(m.name) + "'");
    std::uint64_t const name = number(at + 26, 2), extra = number(at + 28, 2);
    if (limit - at - 30 < name + extra || text(at + 30, name) != m.name ||
        number(at + 8, 2) != m.method)
      fail(at, "the local header of '" + printable(m.name) + "' contradicts the directory");
    m.data = at + 30 + name + extra;
    if (m.packed > limit - m.data)
      fail(at, "'" + printable(m.name) + "' has " + std::to_string(m.packed) +
                   " bytes, which are not there");
    m.end = m.data + m.packed;
  }

  std::string const& path_;
  std::span<std::byte const> all_;
};

}  // namespace detail

inline npz_file::npz_file(mapped_file file, inflater inflate, reinterpret bits)
    : file_(std::move(file)), inflate_(inflate), bits_(bits) {
  detail::zip_directory directory(file_);
  constexpr std::string_view suffix = ".npy";
  for (detail::zip_member& m : directory.members) {
    if (!m.name.ends_with(suffix)) {
      ++others_;
      continue;
    }
    m.name.resize(m.name.size() - suffix.size());
    std::uint64_t const at = m.header;
    auto const [found, is_new] = entries_.try_emplace(m.name);
    if (!is_new)
      throw format_error(file_.path(), at,
                         "'" + detail::printable(found->first) + ".npy' appears twice");
    found->second.member = std::move(m);
  }
}

inline void npz_file::open(entry& e) {
  char const* const where = "rflow::npz_file";
  detail::zip_member const& m = e.member;
  std::string const name = "'" + detail::printable(m.name) + "'";
  if ((m.flags & 1) != 0) detail::reject(where, path() + ": " + name + " is encrypted");
  constexpr std::uint16_t stored = 0, deflated = 8;
  if (m.method != stored && m.method != deflated)
    throw format_error(path(), m.header,
                       name + " is compressed by method " + std::to_string(m.method) +
                           ", which numpy.savez does not use");
  std::span<std::byte const> bytes =
      file_.bytes().subspan(static_cast<std::size_t>(m.data), static_cast<std::size_t>(m.packed));
  if (m.method == deflated) {
    if (inflate_ == nullptr)
      detail::reject(where, path() + ": " + name + " is compressed, and there is no inflater");
    // A stream gives at most 258 bytes for two bits of it, which bounds what is allocated.
    if (m.size / 1032 > m.packed)
      throw format_error(path(), m.header,
                         name + " cannot have " + std::to_string(m.size) + " bytes in " +
                             std::to_string(m.packed) + " compressed ones");
    auto const size = static_cast<std::size_t>(m.size);
    e.plain = std::unique_ptr<std::byte[]>(new std::byte[(std::max<std::size_t>)(size, 1)]);
    std::span<std::byte> const plain(e.plain.get(), size);
    if (!inflate_(bytes, plain))
      throw format_error(path(), m.data,
                         name + " is damaged: its bytes do not inflate to " + std::to_string(size));
    bytes = plain;
  } else if (m.size != m.packed) {
    throw format_error(path(), m.header, name + " is stored, but in another number of bytes");
  }
  if (detail::crc32(bytes) != m.crc)
    throw format_error(path(), m.data, name + " is damaged: its checksum is of other bytes");
  npy_file file(mapped_file::borrow(bytes, path() + ": " + detail::printable(m.name) + ".npy"));
  e.array = file.array();
  e.array.name = m.name;
  detail::apply(bits_, e.array);
  e.file.emplace(std::move(file));
}

inline tensor const& npz_file::operator[](std::string_view name) {
  auto const found = entries_.find(name);
  if (found == entries_.end())
    detail::reject("rflow::npz_file", path() + " has no array '" + detail::printable(name) + "'");
  if (!found->second.file) open(found->second);
  return found->second.array;
}

}  // namespace rflow
