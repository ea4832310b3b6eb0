// SPDX-License-Identifier: Apache-2.0
// Compressed .npz files.
#include <doctest/doctest.h>

#include <zlib.h>

#include <cstdint>
#include <rflow/inflate.hpp>
#include <rflow/npz.hpp>
#include <string>
#include <vector>

#include "files.hpp"

namespace {

using files::contains;
using files::error_of;
using rflow::npz_file;

std::vector<std::byte> bytes_of(std::string const& text) { return files::memory(text).bytes; }

/// A raw deflate stream.
std::vector<std::byte> deflated(std::string const& text) {
  ::z_stream stream{};
  REQUIRE(deflateInit2(&stream, 9, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  std::vector<std::byte> out(text.size() + 100);
  std::vector<std::byte> in = bytes_of(text);
  stream.next_in = reinterpret_cast<::Bytef*>(in.data());
  stream.avail_in = static_cast<::uInt>(in.size());
  stream.next_out = reinterpret_cast<::Bytef*>(out.data());
  stream.avail_out = static_cast<::uInt>(out.size());
  REQUIRE(::deflate(&stream, Z_FINISH) == Z_STREAM_END);
  out.resize(out.size() - stream.avail_out);
  ::deflateEnd(&stream);
  return out;
}

/// Where the directory's entry of the first member begins.
std::size_t directory_of(std::string const& archive) { return archive.find("PK\1\2"); }

std::string error(std::string const& content) {
  files::memory const memory(content);
  try {
    npz_file file(memory.file(), rflow::zlib_inflate);
    for (std::string const& name : file.names()) file[name];
  } catch (std::exception const& e) {
    return e.what();
  }
  return "nothing thrown";
}

}  // namespace

TEST_CASE("a stream fills exactly what it is asked to fill") {
  for (std::string const& text :
       {std::string(), std::string("a"), std::string(100000, 'x'), std::string("hello, hello")}) {
    auto const in = deflated(text);
    std::vector<std::byte> out(text.size());
    CHECK(rflow::zlib_inflate(in, out));
    CHECK(out == bytes_of(text));
    std::vector<std::byte> more(text.size() + 1), less(text.size() / 2);
    CHECK_FALSE(rflow::zlib_inflate(in, more));
    if (less.size() < text.size()) CHECK_FALSE(rflow::zlib_inflate(in, less));
    auto longer = in, shorter = in, wrong = in;
    longer.push_back(std::byte{});
    shorter.pop_back();
    wrong[0] = std::byte{7};  // a block of a kind that does not exist
    CHECK_FALSE(rflow::zlib_inflate(longer, out));
    CHECK_FALSE(rflow::zlib_inflate(shorter, out));
    CHECK_FALSE(rflow::zlib_inflate(wrong, out));
  }
}

TEST_CASE("what numpy.savez_compressed wrote is read") {
  npz_file file(files::fixture("deflated.npz"), rflow::zlib_inflate);
  CHECK(file.names() == std::vector<std::string>{"block.1", "embed", "empty"});
  CHECK(file["embed"].as<float>()(1, 2) == 5);
  CHECK(file["block.1"].as<double>()(1, 0) == 3);
  CHECK(file["empty"].as<float>().cols == 5);
  auto const* const data = file["embed"].data;
  npz_file moved = std::move(file);
  CHECK(moved["embed"].data == data);
  npz_file without(files::fixture("deflated.npz"));
  CHECK(contains(error_of<std::invalid_argument>([&] { without["embed"]; }),
                 "'embed' is compressed, and there is no inflater"));
}

TEST_CASE("a damaged stream, and sizes that cannot be") {
  std::string const whole = files::read(files::fixture("deflated.npz"));
  REQUIRE(error(whole) == "nothing thrown");
  std::size_t const entry = directory_of(whole);
  auto const with = [&](std::size_t at, std::uint32_t value) {
    std::string out = whole;
    std::memcpy(out.data() + at, &value, 4);
    return error(out);
  };
  // More than deflate can make of so few bytes is refused before anything is allocated.
  CHECK(contains(with(entry + 24, 0x7fffffff), "cannot have 2147483647 bytes in"));
  CHECK(contains(with(entry + 24, 200), "do not inflate to 200"));
  CHECK(contains(with(entry + 24, 10), "do not inflate to 10"));
  CHECK(contains(with(entry + 16, 7), "its checksum is of other bytes"));
  std::string damaged = whole;
  std::size_t const data = 30 + static_cast<unsigned char>(whole[26]) +
                           static_cast<std::size_t>(static_cast<unsigned char>(whole[28]));
  damaged[data + 20] = static_cast<char>(damaged[data + 20] ^ 0x10);
  CHECK(contains(error(damaged), "is damaged"));
}
