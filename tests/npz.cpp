// SPDX-License-Identifier: Apache-2.0
// .npz: archives that NumPy wrote, archives built here byte by byte, and every rule broken.
// tests/inflate.cpp has the compressed ones.
#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <rflow/npz.hpp>
#include <rflow/sites.hpp>
#include <string>
#include <vector>

#include "files.hpp"

namespace {

using files::contains;
using files::error_of;
using rflow::npz_file;

std::string little(std::uint64_t n, int bytes) {
  std::string out;
  for (; bytes > 0; --bytes, n >>= 8) out += static_cast<char>(n & 0xff);
  return out;
}

/// Bit by bit, from the definition.
std::uint32_t crc_of(std::string const& text) {
  std::uint32_t c = 0xffffffffu;
  for (char const byte : text) {
    c ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) c = (c & 1) != 0 ? c >> 1 ^ 0xedb88320u : c >> 1;
  }
  return ~c;
}

/// A .npy of 2 x 3 f32: first, first + 1, …
std::string array(float first) {
  std::string const dictionary = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  std::string header = dictionary + std::string(117 - dictionary.size(), ' ') + "\n";
  std::string out = "\x93NUMPY\1" + std::string(1, '\0') + little(header.size(), 2) + header;
  for (int i = 0; i < 6; ++i) {
    float const value = first + static_cast<float>(i);
    char bytes[4];
    std::memcpy(bytes, &value, 4);
    out.append(bytes, 4);
  }
  return out;
}

struct member {
  std::string name, data;
  std::uint16_t flags = 0, method = 0;
  std::uint64_t size = ~std::uint64_t{0};  // as told; else that of data
  std::string extra = {};                  // of the local header
  bool wide = false;                       // zip64
  std::string behind = {};                 // a data descriptor
};

/// A zip archive, put together by the book; `mend` may change the directory or the end.
std::string zip(std::vector<member> const& members,
                std::function<void(std::string& directory, std::string& end)> const& mend = {}) {
  std::string out, directory;
  for (member const& m : members) {
    std::uint64_t const size = m.size == ~std::uint64_t{0} ? m.data.size() : m.size;
    std::uint64_t const at = out.size();
    std::string const facts = little(20, 2) + little(m.flags, 2) + little(m.method, 2) +
                              little(0, 4) + little(crc_of(m.data), 4);
    std::string const sizes = m.wide ? little(0xffffffff, 4) + little(0xffffffff, 4)
                                     : little(m.data.size(), 4) + little(size, 4);
    out += "PK\3\4" + facts + sizes + little(m.name.size(), 2) + little(m.extra.size(), 2) +
           m.name + m.extra + m.data + m.behind;
    std::string const fields = m.wide ? little(0x7777, 2) + little(2, 2) + "zz" + little(1, 2) +
                                            little(24, 2) + little(size, 8) +
                                            little(m.data.size(), 8) + little(at, 8)
                                      : "";
    directory += "PK\1\2" + little(20, 2) + facts + sizes + little(m.name.size(), 2) +
                 little(fields.size(), 2) + little(0, 2) + little(0, 2) + little(0, 2) +
                 little(0, 4) + (m.wide ? little(0xffffffff, 4) : little(at, 4)) + m.name + fields;
  }
  std::uint64_t const begin = out.size();
  std::string end = "PK\5\6" + little(0, 4) + little(members.size(), 2) +
                    little(members.size(), 2) + little(directory.size(), 4) + little(begin, 4) +
                    little(0, 2);
  if (mend) mend(directory, end);
  return out + directory + end;
}

/// What opening such a file, and asking for all arrays, ends in.
std::string error(std::string const& content) {
  files::memory const memory(content);
  try {
    npz_file file(memory.file());
    for (std::string const& name : file.names()) file[name];
  } catch (std::exception const& e) {
    return e.what();
  }
  return "nothing thrown";
}

}  // namespace

TEST_CASE("archives that NumPy wrote are read") {
  for (auto const* name : {"stored.npz", "streamed.npz"}) {
    CAPTURE(name);
    npz_file file(files::fixture(name));
    CHECK(file.names() == std::vector<std::string>{"block.1", "embed", "empty"});
    CHECK(file.size() == 3);
    CHECK(file.others() == 0);
    CHECK(file.contains("embed"));
    CHECK_FALSE(file.contains("embed.npy"));
    CHECK(file["embed"].name == "embed");
    CHECK(file["embed"].as<float>()(1, 2) == 5);
    CHECK(file["block.1"].as<double>()(1, 0) == 3);  // Fortran order
    CHECK(file["block.1"].strides == std::vector<std::ptrdiff_t>{1, 2});
    CHECK(file["empty"].as<float>().cols == 5);
    CHECK(file["embed"].data == file["embed"].data);
    CHECK(contains(error_of<std::invalid_argument>([&] { file["x"]; }), "has no array 'x'"));
    npz_file const moved = std::move(file);
    CHECK(moved.size() == 3);
  }
}

TEST_CASE("what is aligned is viewed in place, the rest is copied") {
  std::string const inner = array(1);
  for (std::size_t pad = 0; pad < 8; ++pad) {
    CAPTURE(pad);
    // The local header has 30 bytes and the name 5; an extra field moves the data.
    std::string const content =
        zip({{.name = "a.npy", .data = inner, .extra = std::string(pad, '\0')}});
    files::scratch const dir;
    files::write(dir / "x.npz", content);
    rflow::mapped_file mapped(dir / "x.npz");
    auto const bytes = mapped.bytes();
    npz_file file(std::move(mapped));
    auto const x = file["a"].as<float>();
    CHECK(x(0, 0) == 1);
    CHECK(x(1, 2) == 6);
    auto const* const at = reinterpret_cast<std::byte const*>(x.data);
    bool const inside = at >= bytes.data() && at < bytes.data() + bytes.size();
    CHECK(inside == ((35 + pad) % 4 == 0));
  }
}

TEST_CASE("zip64, data descriptors, comments, other members") {
  SUBCASE("zip64 sizes and offsets") {
    files::memory const memory(zip({{.name = "a.npy", .data = array(1), .wide = true},
                                    {.name = "b.npy", .data = array(7), .wide = true}}));
    npz_file file(memory.file());
    CHECK(file["b"].as<float>()(0, 0) == 7);
  }
  SUBCASE("a zip64 record at the end") {
    auto const wide_end = [](std::uint64_t more_at, std::uint32_t disks = 1) {
      return zip(
          {{.name = "a.npy", .data = array(1)}}, [=](std::string& directory, std::string& end) {
            std::string const size = little(directory.size(), 8);
            std::uint64_t begin = 0;
            std::memcpy(&begin, end.data() + 16, 4);
            std::uint64_t const at = begin + directory.size();
            directory += "PK\6\6" + little(44, 8) + little(45, 2) + little(45, 2) + little(0, 8) +
                         little(1, 8) + little(1, 8) + size + little(begin, 8);
            directory += "PK\6\7" + little(0, 4) + little(at + more_at, 8) + little(disks, 4);
            end = "PK\5\6" + little(0, 4) + little(0xffff, 2) + little(0xffff, 2) +
                  little(0xffffffff, 4) + little(0xffffffff, 4) + little(0, 2);
          });
    };
    files::memory const memory(wide_end(0));
    npz_file file(memory.file());
    CHECK(file["a"].as<float>()(0, 0) == 1);
    CHECK(contains(error(wide_end(1)), "not where it should be"));
    CHECK(contains(error(wide_end(1000)), "not where it should be"));
    CHECK(contains(error(wide_end(~std::uint64_t{0} - 300)), "not where it should be"));
    CHECK(contains(error(wide_end(0, 2)), "in parts"));
    CHECK(contains(error(zip({},
                             [](std::string&, std::string& end) {
                               end.replace(8, 2, "\xff\xff").replace(10, 2, "\xff\xff");
                             })),
                   "the record of a zip64 archive is missing"));
  }
  SUBCASE("data descriptors stand behind the data") {
    files::memory const memory(
        zip({{.name = "a.npy", .data = array(1), .flags = 8, .behind = "PK\7\10" + little(0, 12)},
             {.name = "b.npy", .data = array(7)}}));
    npz_file file(memory.file());
    CHECK(file["a"].as<float>()(0, 0) == 1);
    CHECK(file["b"].as<float>()(0, 0) == 7);
  }
  SUBCASE("a comment, which may look like an end") {
    std::string const comment = "PK\5\6 and more";
    files::memory const memory(
        zip({{.name = "a.npy", .data = array(1)}}, [&](std::string&, std::string& end) {
          end.replace(20, 2, little(comment.size(), 2));
          end += comment;
        }));
    CHECK(npz_file(memory.file()).names() == std::vector<std::string>{"a"});
  }
  SUBCASE("what is no array is left alone") {
    files::memory const memory(zip({{.name = "readme.txt", .data = "hello"},
                                    {.name = "folder/", .data = ""},
                                    {.name = "folder/a.npy", .data = array(1)}}));
    npz_file file(memory.file());
    CHECK(file.names() == std::vector<std::string>{"folder/a"});
    CHECK(file.others() == 2);
  }
  SUBCASE("an archive of nothing") {
    files::memory const memory(zip({}));
    CHECK(npz_file(memory.file()).size() == 0);
  }
}

TEST_CASE("sites are found in an archive, and told what their bits are") {
  std::string raw = array(0);
  raw.replace(raw.find("<f4"), 3, "|V2").replace(raw.find("(2, 3)"), 6, "(4, 3)");
  raw.resize(128);
  for (int i = 0; i < 12; ++i) raw += little(0x3f80, 2);
  std::string single = array(1);
  files::memory const memory(
      zip({{.name = "embed.npy", .data = raw}, {.name = "block.1.npy", .data = raw}}));
  npz_file told(memory.file(), nullptr, rflow::reinterpret::as_bf16);
  auto const sites = rflow::find_sites(told);
  CHECK(sites.type() == rflow::dtype::bf16);
  CHECK(float(sites.stack<rflow::bf16>()[1](3, 2)) == 1);
  npz_file untold(memory.file());
  CHECK(contains(error_of<std::invalid_argument>([&] { rflow::find_sites(untold); }),
                 "reinterpret::as_bf16"));
}

TEST_CASE("every rule of an archive") {
  std::string const a = array(1);
  std::string const good = zip({{.name = "a.npy", .data = a}});
  REQUIRE(error(good) == "nothing thrown");
  auto const changed = [&](std::function<void(std::string&, std::string&)> const& mend) {
    return error(zip({{.name = "a.npy", .data = a}}, mend));
  };
  auto const in_directory = [&](std::size_t at, std::string const& bytes) {
    return changed([&](std::string& d, std::string&) { d.replace(at, bytes.size(), bytes); });
  };
  auto const in_end = [&](std::size_t at, std::string const& bytes) {
    return changed([&](std::string&, std::string& e) { e.replace(at, bytes.size(), bytes); });
  };
  auto const in_file = [&](std::size_t at, std::string const& bytes) {
    return error(std::string(good).replace(at, bytes.size(), bytes));
  };
  // the end
  CHECK(contains(error(""), "the file is empty"));
  CHECK(contains(error("hello, hello, hello, hello"), "wrong magic: not a .npz file, but text"));
  CHECK(contains(error("PK"), "magic"));
  CHECK(contains(error("PK\3\4"), "no record of an archive at the end"));
  CHECK(contains(error(good + "x"), "no record of an archive at the end"));
  CHECK(contains(error(good.substr(0, good.size() - 1)), "no record of an archive at the end"));
  CHECK(contains(in_end(4, little(1, 2)), "in parts"));
  CHECK(contains(in_end(8, little(2, 2)), "in parts"));
  CHECK(contains(in_end(8, little(2, 2) + little(2, 2)), "fewer members than it says"));
  CHECK(contains(in_end(8, little(0, 2) + little(0, 2)), "more members than it says"));
  CHECK(contains(in_end(12, little(1, 4)), "the directory is not where it should be"));
  CHECK(contains(in_end(16, little(1, 4)), "the directory is not where it should be"));
  CHECK(contains(in_end(16, little(0x7fffffff, 4)), "the directory is not where it should be"));
  CHECK(contains(error("PK" + good), "the directory is not where it should be"));
  // an entry of the directory
  CHECK(contains(in_directory(0, "X"), "not an entry of a directory"));
  CHECK(contains(in_directory(28, little(600, 2)), "an entry beyond the directory"));
  CHECK(contains(in_directory(30, little(1, 2)), "an entry beyond the directory"));
  CHECK(contains(changed([](std::string& d, std::string& e) {
                   d.replace(30, 2, little(4, 2));
                   d += little(1, 2) + little(9, 2);
                   e.replace(12, 4, little(d.size(), 4));
                 }),
                 "an extra field beyond its entry"));
  CHECK(contains(changed([](std::string& d, std::string& e) {
                   d.replace(24, 4, little(0xffffffff, 4)).replace(30, 2, little(4, 2));
                   d += little(1, 2) + little(0, 2);
                   e.replace(12, 4, little(d.size(), 4));
                 }),
                 "a zip64 field that is too short"));
  CHECK(contains(in_directory(42, little(1, 4)), "no local header of 'a.npy'"));
  CHECK(contains(in_directory(42, little(0x7fffffff, 4)), "no local header"));
  CHECK(contains(in_directory(46, "b"), "contradicts the directory"));
  CHECK(contains(in_directory(10, little(8, 2)), "contradicts the directory"));
  CHECK(contains(in_directory(20, little(a.size() + 1, 4)), "which are not there"));
  CHECK(contains(in_directory(20, little(0x7fffffff, 4)), "which are not there"));
  CHECK(contains(in_directory(20, little(a.size() - 1, 4)), "stored, but in another number of"));
  CHECK(contains(in_directory(16, little(7, 4)), "'a' is damaged: its checksum is of other bytes"));
  // the local header and the data
  CHECK(contains(in_file(26, little(4, 2)), "contradicts the directory"));
  CHECK(contains(in_file(28, little(1, 2)), "which are not there"));
  CHECK(contains(in_file(8, little(8, 2)), "contradicts the directory"));
  CHECK(contains(in_file(35 + 130, "x"), "its checksum is of other bytes"));
  // members
  CHECK(contains(error(zip({{.name = "a.npy", .data = a, .flags = 1}})), "'a' is encrypted"));
  CHECK(contains(error(zip({{.name = "a.npy", .data = a, .method = 12}})),
                 "compressed by method 12"));
  CHECK(contains(error(zip({{.name = "a.npy", .data = a, .method = 8}})),
                 "'a' is compressed, and there is no inflater"));
  CHECK(contains(error(zip({{.name = "a.npy", .data = a}, {.name = "a.npy", .data = a}})),
                 "'a.npy' appears twice"));
  CHECK(contains(error(zip({{.name = "a.npy", .data = "no array"}})),
                 "a.npy: byte 0: wrong magic: not a .npy file, but text"));
  CHECK(contains(error(zip({{.name = "a.npy", .data = a + "x"}})), "a.npy: byte 152: 25 bytes"));
  CHECK(contains(error(zip({{.name = "a.npy", .data = a.substr(0, 140)}})), "12 bytes of data"));
  // Two entries for the same bytes: how a small archive becomes a large one.
  std::string const twice = zip({{.name = "a.npy", .data = a}}, [](std::string& d, std::string& e) {
    d += d;
    e.replace(8, 4, little(2, 2) + little(2, 2)).replace(12, 4, little(d.size(), 4));
  });
  CHECK(contains(error(twice), "members overlap"));
}

TEST_CASE("every beginning of an archive is refused") {
  for (auto const* name : {"stored.npz", "streamed.npz"}) {
    std::string const whole = files::read(files::fixture(name));
    REQUIRE(error(whole) == "nothing thrown");
    for (std::size_t n = 0; n < whole.size(); ++n)
      CHECK(error(whole.substr(0, n)) != "nothing thrown");
  }
}

TEST_CASE("every byte of the data counts in the checksum, whatever their number") {
  REQUIRE(crc_of("123456789") == 0xcbf43926u);  // as catalogues of checksums give it
  for (std::size_t n = 0; n < 20; ++n) {
    std::string const header =
        "{'descr': '|u1', 'fortran_order': False, 'shape': (" + std::to_string(n) + ",), }\n";
    std::string data = "\x93NUMPY\1" + std::string(1, '\0') + little(header.size(), 2) + header;
    for (std::size_t i = 0; i < n; ++i) data += static_cast<char>(7 * i + 200);
    std::string const whole = zip({{.name = "a.npy", .data = data}});
    CHECK(error(whole) == "nothing thrown");
    for (std::size_t i = 0; i < n; ++i) {
      std::string changed = whole;
      changed[35 + data.size() - n + i] ^= 0x40;
      CHECK(contains(error(changed), "its checksum is of other bytes"));
    }
  }
}
