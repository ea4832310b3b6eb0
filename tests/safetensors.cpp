// SPDX-License-Identifier: Apache-2.0
// safetensors: every rule of the format against a file that breaks it, a file that the reference
// implementation wrote, round trips. tests/reference/files.py writes the fixtures.
#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <rflow/safetensors.hpp>
#include <rflow/sharded_safetensors.hpp>
#include <string>
#include <vector>

#include "files.hpp"

namespace {

using files::contains;
using files::error_of;
using rflow::dtype;
using rflow::safetensors_file;
using bytes = std::string;

/// A file with that header and that many zeros as data.
bytes file_of(std::string const& header, std::size_t data) {
  std::uint64_t const size = header.size();
  bytes out(8, '\0');
  std::memcpy(out.data(), &size, 8);
  return out + header + bytes(data, '\0');
}

bytes declares(std::uint64_t size, bytes const& rest) {
  bytes out(8, '\0');
  std::memcpy(out.data(), &size, 8);
  return out + rest;
}

std::string entry(std::string const& name, std::string const& type, std::string const& shape,
                  std::string const& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + type + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}
std::string f32(std::string const& shape, std::string const& offsets) {
  return "{" + entry("x", "F32", shape, offsets) + "}";
}

std::string open_error(bytes const& content) {
  files::memory const memory(content);
  return error_of<rflow::format_error>([&] { safetensors_file const file(memory.file()); });
}

std::string const good = f32("[2,2]", "[0,16]");

}  // namespace

TEST_CASE("every rule of the safetensors format") {
  struct bad {
    bytes content;
    std::size_t byte;
    std::string rule;
  };
  std::string const x = entry("x", "F32", "[2,2]", "[0,16]");
  std::vector<bad> const cases = {
      // the header's length
      {"", 0, "the file is empty"},
      {"1234567", 7, "ends within the header's length"},
      {declares(1000, "{}"), 10, "the file ends within its header of 1000 bytes"},
      {declares(3, "{}"), 10, "the file ends within its header of 3 bytes"},
      {declares(0, ""), 8, "does not begin with {"},
      {declares(0, "{}"), 8, "does not begin with {"},
      {declares(~std::uint64_t{0}, "{}"), 0, "a header of 18446744073709551615 bytes"},
      {declares(~std::uint64_t{0} - 7, "{}"), 0, "a header of 18446744073709551608 bytes"},
      {declares(100000001, "{}"), 0, "a header of 100000001 bytes (at most 100000000)"},
      {declares(100000000, "{}"), 10, "the file ends within its header of 100000000 bytes"},
      // JSON
      {file_of("   ", 0), 8, "does not begin with {"},
      {file_of("[]", 0), 8, "does not begin with {"},
      {file_of("1", 0), 8, "does not begin with {"},
      {file_of("\xef\xbb\xbf{}", 0), 8, "does not begin with {"},
      {file_of("{", 0), 8, "not UTF-8 JSON"},
      {file_of("{}}", 0), 10, "not UTF-8 JSON"},
      {file_of("{}{}", 0), 10, "not UTF-8 JSON"},
      {file_of(bytes("{}\0", 3), 0), 10, "a NUL byte"},
      {file_of(bytes("{}\0garbage", 10), 0), 10, "a NUL byte"},
      {file_of("{,}", 0), 9, "not UTF-8 JSON"},
      {file_of("{" + x + ",}", 16), 65, "not UTF-8 JSON"},
      {file_of("{/**/}", 0), 9, "not UTF-8 JSON"},
      {file_of("{\"\xff\":1}", 0), 10, "not UTF-8 JSON"},
      {file_of("{\"\xc0\xaf\":1}", 0), 10, "not UTF-8 JSON"},
      {file_of("{\"\\ud800\":1}", 0), 16, "not UTF-8 JSON"},
      {file_of("{'x':1}", 0), 9, "not UTF-8 JSON"},
      {file_of("{\"x\":" + bytes(100000, '['), 0), 13, "a tensor is an array, not an object"},
      // the schema
      {file_of("{\"x\":1}", 0), 14, "a tensor is a number, not an object"},
      {file_of("{\"x\":null}", 0), 16, "a tensor is null, not an object"},
      {file_of("{\"x\":\"F32\"}", 0), 17, "a tensor is a string, not an object"},
      {file_of("{\"x\":{}}", 0), 14, "a tensor without dtype"},
      {file_of("{\"x\":{\"dtype\":\"F32\"}}", 0), 27, "a tensor without shape"},
      {file_of("{\"x\":{\"dtype\":\"F32\",\"shape\":[]}}", 0), 38, "without data_offsets"},
      {file_of("{\"x\":{\"shape\":[],\"data_offsets\":[0,4]}}", 4), 45, "a tensor without dtype"},
      {file_of("{\"x\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4), 48, "without shape"},
      {file_of("{\"x\":{\"dtype\":1}}", 0), 23, "dtype is a number"},
      {file_of("{\"x\":{\"dtype\":{}}}", 0), 22, "dtype is an object"},
      {file_of("{" + entry("x", "FLOAT", "[1]", "[0,4]") + "}", 4), 28, "unknown dtype 'FLOAT'"},
      {file_of("{" + entry("x", "f32", "[1]", "[0,4]") + "}", 4), 26, "unknown dtype 'f32'"},
      {file_of("{" + entry("x", "\\u001b[31m", "[1]", "[0,4]") + "}", 4), 33, "dtype '?[31m'"},
      {file_of(f32("4", "[0,16]"), 16), 37, "shape is a number, not an array"},
      {file_of(f32("null", "[0,16]"), 16), 39, "shape is null, not an array"},
      {file_of(f32("[[4]]", "[0,16]"), 16), 37, "an extent is an array"},
      {file_of(f32("[\"4\"]", "[0,16]"), 16), 39, "an extent is a string"},
      {file_of(f32("[true]", "[0,16]"), 16), 40, "an extent is a boolean"},
      {file_of(f32("[4.0]", "[0,16]"), 16), 40, "an extent is a number that is not an integer"},
      {file_of(f32("[4e0]", "[0,16]"), 16), 40, "an extent is a number that is not an integer"},
      {file_of(f32("[-4]", "[0,16]"), 16), 39, "an extent is a negative number"},
      {file_of(f32("[-0]", "[0,0]"), 0), 39, "an extent is a negative number"},
      {file_of(f32("[18446744073709551616]", "[0,16]"), 16), 57, "an extent is a number that"},
      {file_of(f32("[9223372036854775808]", "[0,16]"), 16), 56, "extent too large"},
      {file_of(f32("[2,2]", "{}"), 16), 57, "data_offsets is an object, not an array"},
      {file_of(f32("[2,2]", "16"), 16), 59, "data_offsets is a number, not an array"},
      {file_of(f32("[2,2]", "[]"), 16), 58, "data_offsets needs two numbers"},
      {file_of(f32("[2,2]", "[16]"), 16), 60, "data_offsets needs two numbers"},
      {file_of(f32("[2,2]", "[0,16,16]"), 16), 65, "data_offsets has more than two numbers"},
      {file_of(f32("[2,2]", "[0,1.6e1]"), 16), 65, "an offset is a number that is not"},
      {file_of(f32("[2,2]", "[-1,16]"), 16), 60, "an offset is a negative number"},
      {file_of(f32("[2,2]", "[0,18446744073709551616]"), 16), 80, "an offset is a number that"},
      {file_of("{\"x\":{\"device\":{\"a\":[[1]]},\"dtype\":\"F32\"}}", 0), 48, "without shape"},
      {file_of("{\"x\":{\"device\":[", 0), 23, "not UTF-8 JSON"},
      {file_of("{\"x\":{\"device\":" + bytes(100000, '[') + "}", 0), 100023, "not UTF-8 JSON"},
      {file_of("{\"x\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 0), 34, "'dtype' appears twice"},
      {file_of("{\"x\":{\"shape\":[1],\"shape\":[1]}}", 0), 32, "'shape' appears twice"},
      {file_of("{\"x\":{\"data_offsets\":[0,4],\"data_offsets\":[0,4]}}", 0), 48,
       "'data_offsets' appears twice"},
      {file_of("{" + x + "," + x + "}", 16), 67, "tensor 'x' appears twice"},
      {file_of("{" + x + "," + entry("\\u0078", "F32", "[2,2]", "[0,16]") + "}", 16), 72,
       "tensor 'x' appears twice"},
      // metadata
      {file_of("{\"__metadata__\":1}", 0), 25, "__metadata__ is a number, not an object"},
      {file_of("{\"__metadata__\":[]}", 0), 24, "__metadata__ is an array, not an object"},
      {file_of("{\"__metadata__\":{\"a\":null}}", 0), 32, "a metadata value is null, not a"},
      {file_of("{\"__metadata__\":null,\"__metadata__\":{}}", 0), 42, "__metadata__ appears twice"},
      {file_of("{\"__metadata__\":{\"a\":1}}", 0), 30, "a metadata value is a number, not a"},
      {file_of("{\"__metadata__\":{\"a\":{}}}", 0), 29, "a metadata value is an object, not a"},
      {file_of("{\"__metadata__\":{\"a\":[]}}", 0), 29, "a metadata value is an array, not a"},
      {file_of("{\"__metadata__\":{\"a\":\"1\",\"a\":\"1\"}}", 0), 35,
       "metadata 'a' appears twice"},
      {file_of("{\"__metadata__\":{},\"__metadata__\":{}}", 0), 40, "__metadata__ appears twice"},
      // offsets and sizes
      {file_of(f32("[2,2]", "[4,20]"), 20), 11, "leave a hole after the data before"},
      {file_of(f32("[2,2]", "[16,0]"), 16), 11, "end before they begin"},
      {file_of(f32("[2,2]", "[0,4]"), 4), 11, "hold 4 bytes, but f32 [2, 2] takes 16"},
      {file_of(f32("[2,2]", "[0,4]"), 16), 11, "hold 4 bytes, but f32 [2, 2] takes 16"},
      {file_of(f32("[2,2]", "[0,20]"), 20), 11, "hold 20 bytes, but f32 [2, 2] takes 16"},
      {file_of(f32("[]", "[0,0]"), 0), 11, "hold 0 bytes, but f32 [] takes 4"},
      {file_of("{" + x + "," + entry("y", "F32", "[1]", "[20,24]") + "}", 24), 67, "leave a hole"},
      {file_of("{" + x + "," + entry("y", "F32", "[1]", "[12,16]") + "}", 16), 67, "overlap"},
      {file_of("{" + x + "," + entry("y", "F32", "[2,2]", "[0,16]") + "}", 16), 67, "overlap"},
      {file_of("{" + x + "," + entry("y", "F32", "[0]", "[4,4]") + "}", 16), 67, "overlap"},
      {file_of(f32("[2,18446744073709551614]", "[0,16]"), 16), 59, "extent too large"},
      {file_of(f32("[2,9223372036854775807]", "[0,16]"), 16), 11, "overflows"},
      {file_of(f32("[4294967296,4294967296]", "[0,0]"), 0), 11, "overflows"},
      {file_of(f32("[2305843009213693952,4]", "[0,0]"), 0), 11, "overflows"},
      {file_of(f32("[0,4294967296,4294967296]", "[0,0]"), 0), 11, "overflows"},
      {file_of("{" + entry("x", "F4", "[3]", "[0,1]") + "}", 1), 11, "does not fill whole bytes"},
      {file_of("{" + entry("x", "F4", "[3]", "[0,2]") + "}", 2), 11, "does not fill whole bytes"},
      {file_of("{" + entry("x", "F6_E2M3", "[2]", "[0,2]") + "}", 2), 11, "not fill whole bytes"},
      {file_of("{" + entry("x", "F6_E3M2", "[3]", "[0,2]") + "}", 2), 11, "not fill whole bytes"},
      {file_of(good, 14), 65 + 14, "the file ends 2 bytes before its last tensor does"},
      {file_of(good, 17), 65 + 16, "1 bytes after the last tensor"},
      {file_of("{}", 1), 10, "1 bytes after the last tensor"},
      {file_of(f32("[0]", "[0,0]"), 8), 62, "8 bytes after the last tensor"},
      {file_of(f32(
                   "[" +
                       [] {
                         std::string s;
                         for (int i = 0; i < 64; ++i) s += "1,";
                         return s;
                       }() +
                       "1]",
                   "[0,4]"),
               4),
       166, "more than 64 axes"},
  };
  REQUIRE(open_error(file_of(good, 16)) == "nothing thrown");
  for (bad const& c : cases) {
    bytes const shown = c.content.substr(0, 200);
    CAPTURE(shown.substr(shown.size() < 8 ? 0 : 8));
    std::string const text = open_error(c.content);
    CAPTURE(text);
    CHECK(text.starts_with("file: byte " + std::to_string(c.byte) + ": "));
    CHECK(contains(text, c.rule));
  }
}

TEST_CASE("unusual files that the format allows") {
  auto const opens = [](bytes const& content) {
    files::memory const memory(content);
    return safetensors_file(memory.file()).size();
  };
  CHECK(opens(file_of("{}", 0)) == 0);
  CHECK(opens(file_of(" \t\r\n{} \t\r\n", 0)) == 0);
  CHECK(opens(file_of("{\"__metadata__\":{}}", 0)) == 0);
  CHECK(opens(file_of(f32("[2,0]", "[0,0]"), 0)) == 1);
  CHECK(opens(file_of(f32("[]", "[0,4]"), 4)) == 1);
  CHECK(opens(file_of("{" + entry("", "U8", "[1]", "[0,1]") + "}", 1)) == 1);
  CHECK(opens(file_of("{" + entry("x", "F4", "[4]", "[0,2]") + "}", 2)) == 1);
  CHECK(opens(file_of("{" + entry("x", "F6_E2M3", "[4]", "[0,3]") + "}", 3)) == 1);
  // Offsets in any order in the header, empty tensors anywhere.
  CHECK(
      opens(file_of(
          "{" + entry("a", "F32", "[1]", "[4,8]") + "," + entry("b", "F32", "[1]", "[0,4]") + "," +
              entry("c", "F64", "[0]", "[4,4]") + "," + entry("d", "F64", "[0]", "[8,8]") + "}",
          8)) == 4);
  for (auto const* type :
       {"BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
    CHECK(opens(file_of("{" + entry("x", type, "[3]", "[0,3]") + "}", 3)) == 1);
  for (auto const* type : {"I16", "U16", "F16", "BF16"})
    CHECK(opens(file_of("{" + entry("x", type, "[3]", "[0,6]") + "}", 6)) == 1);
  for (auto const* type : {"I32", "U32", "F32"})
    CHECK(opens(file_of("{" + entry("x", type, "[3]", "[0,12]") + "}", 12)) == 1);
  for (auto const* type : {"C64", "F64", "I64", "U64"})
    CHECK(opens(file_of("{" + entry("x", type, "[3]", "[0,24]") + "}", 24)) == 1);
}

TEST_CASE("every prefix of a file is refused") {
  bytes const whole = files::read(files::fixture("all.safetensors"));
  REQUIRE(open_error(whole) == "nothing thrown");
  for (std::size_t n = 0; n < whole.size(); ++n)
    CHECK(open_error(whole.substr(0, n)) != "nothing thrown");
}

TEST_CASE("a million overlapping tensors are refused at once") {
  std::string header = "{";
  for (int i = 0; i < 1'000'000; ++i)
    header += (i == 0 ? "" : ",") + entry(std::to_string(i), "F32", "[2,2]", "[0,16]");
  CHECK(contains(open_error(file_of(header + "}", 16)), "overlap"));
}

TEST_CASE("what the reference implementation wrote is read") {
  safetensors_file const file(files::fixture("all.safetensors"));
  CHECK(file.metadata().size() == 1);
  CHECK(file.metadata().at("model") == "none, \u00e4");
  CHECK(file.size() == 18);
  std::vector<std::int64_t> const range = {0, 1, 2, 3, 4, 5};
  for (auto const* name : {"i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"})
    CHECK(file[name].integers() == range);
  CHECK(file["b1"].integers() == std::vector<std::int64_t>{0, 1, 1, 1, 1, 1});
  auto const last = [](auto const& x) { return double(x(1, 2)); };
  for (auto const* name : {"f2", "f4", "f8", "bf16", "n\u00e4me \"quoted\""})
    CHECK(rflow::visit(file[name], last) == 5);
  CHECK(file["bf16"].type == dtype::bf16);
  CHECK(file["f2"].type == dtype::f16);
  CHECK(file["c8"].type == dtype::c64);
  CHECK(file["f8_e4m3"].type == dtype::f8_e4m3);
  CHECK(*file["scalar"].elements<float>() == 7);
  CHECK(file["scalar"].rank() == 0);
  CHECK(file["empty"].shape == std::vector<std::ptrdiff_t>{0, 5});
  CHECK(file.contains("f4"));
  CHECK_FALSE(file.contains("f5"));
  CHECK(contains(error_of<std::invalid_argument>([&] { file["f5"]; }),
                 "all.safetensors has no tensor 'f5'; it has b1, bf16, c8, "));
  CHECK(contains(error_of<std::invalid_argument>([&] { file["f5"]; }), " and 10 more"));
  CHECK(contains(error_of<std::invalid_argument>([&] { file["f4"].as<rflow::f16>(); }),
                 "f16 of rank 2 expected, found 'f4', f32 [2, 3]"));
  files::memory const rude(
      file_of("{" + entry("\\u001b[2J\\n" + std::string(99, 'a'), "U8", "[1]", "[0,1]") + "}", 1));
  std::string const listed =
      error_of<std::invalid_argument>([&] { safetensors_file(rude.file())["x"]; });
  CHECK(contains(listed, "'x'; it has ?[2J?aaa"));
  CHECK(listed.ends_with("a..."));
  files::memory const none(file_of("{}", 0));
  CHECK(contains(error_of<std::invalid_argument>([&] { safetensors_file(none.file())["x"]; }),
                 "it has none"));
}

TEST_CASE("the writer writes what the reference implementation writes") {
  files::scratch const dir;
  safetensors_file const file(files::fixture("all.safetensors"));
  std::vector<rflow::tensor> tensors;
  for (std::string const& name : file.names()) tensors.push_back(file[name]);
  rflow::write_safetensors(dir / "all.safetensors", tensors,
                           {{"model", file.metadata().at("model")}});
  CHECK(files::read(dir / "all.safetensors") == files::read(files::fixture("all.safetensors")));
  CHECK(dir.count() == 1);
}

TEST_CASE("a file may be rewritten while it is read") {
  files::scratch const dir;
  std::vector<float> const values = {1, 2, 3, 4};
  rflow::write_safetensors(dir / "x", std::vector{rflow::as_tensor("x", values, {2, 2})});
  safetensors_file const file(dir / "x");
  auto turned = file["x"];
  std::swap(turned.strides[0], turned.strides[1]);
  rflow::write_safetensors(dir / "x", std::vector{turned});
  CHECK(file["x"].as<float>()(0, 1) == 2);
  CHECK(safetensors_file(dir / "x")["x"].as<float>()(0, 1) == 3);
}

TEST_CASE_TEMPLATE("layouts become row-major", T, float, double, rflow::f16, rflow::bf16) {
  files::scratch const dir;
  std::vector<T> data(24);
  for (std::size_t i = 0; i < data.size(); ++i)
    if constexpr (sizeof(T) == 2)
      data[i] = T::nearest(static_cast<float>(i));
    else
      data[i] = static_cast<T>(i);
  std::vector<rflow::view<T>> const layouts = {{data.data(), 4, 6},
                                               {data.data(), 6, 4, 1, 6},
                                               {data.data() + 23, 4, 3, -6, -2},
                                               {data.data(), 3, 2, 0, 1},
                                               {data.data(), 0, 6}};
  std::vector<rflow::tensor> tensors;
  for (std::size_t i = 0; i < layouts.size(); ++i)
    tensors.push_back(rflow::as_tensor(std::to_string(i), layouts[i]));
  rflow::write_safetensors(dir / "x", tensors);
  safetensors_file const file(dir / "x");
  for (std::size_t i = 0; i < layouts.size(); ++i) {
    auto const y = file[std::to_string(i)].template as<T>();
    REQUIRE(y.rows == layouts[i].rows);
    REQUIRE(y.cols == layouts[i].cols);
    for (std::ptrdiff_t r = 0; r < y.rows; ++r)
      for (std::ptrdiff_t c = 0; c < y.cols; ++c) CHECK(float(y(r, c)) == float(layouts[i](r, c)));
  }
}

TEST_CASE("every offset of the data is viewed, copied where it is not aligned") {
  for (std::size_t pad = 0; pad < 8; ++pad) {
    bytes content = file_of("{" + entry("a", "U8", "[1]", "[0,1]") + "," +
                                entry("x", "F64", "[1,2]", "[1,17]") + "}" + bytes(pad, ' '),
                            17);
    double const values[] = {1.5, 2.5};
    std::memcpy(content.data() + content.size() - 16, values, 16);
    files::memory const memory(content);
    safetensors_file const file(memory.file());
    auto const x = file["x"].as<double>();
    CHECK(reinterpret_cast<std::uintptr_t>(x.data) % alignof(double) == 0);
    CHECK(x(0, 0) == 1.5);
    CHECK(x(0, 1) == 2.5);
    CHECK(file["x"].as<double>().data == x.data);
  }
}

TEST_CASE("what cannot be written is refused before a file appears") {
  files::scratch const dir;
  std::vector<float> const values(4);
  auto const x = rflow::as_tensor("x", values, {2, 2});
  auto const error = [&](std::vector<rflow::tensor> const& tensors,
                         std::map<std::string, std::string> const& metadata = {}) {
    return error_of<std::invalid_argument>(
        [&] { rflow::write_safetensors(dir / "x", tensors, metadata); });
  };
  auto const with = [&](auto&& change) {
    auto y = x;
    change(y);
    return y;
  };
  CHECK(contains(error({x, x}), "'x' is reserved or appears twice"));
  CHECK(contains(error({with([](auto& y) { y.name = "__metadata__"; })}), "is reserved"));
  CHECK(contains(error({with([](auto& y) { y.name = "\xff"; })}), "not UTF-8"));
  CHECK(contains(error({x}, {{"a", "\xc0\xaf"}}), "not UTF-8"));
  CHECK(contains(error({with([](auto& y) { y.type = dtype::raw16; })}), "has no type for"));
  CHECK(contains(error({with([](auto& y) { y.type = dtype::c128; })}), "has no type for"));
  CHECK(contains(error({with([](auto& y) { y.data = nullptr; })}), "no data"));
  CHECK(contains(error({with([](auto& y) { y.strides = {}; })}), "2 extents and 0 strides"));
  CHECK(contains(error({with([](auto& y) { y.shape = {-1, -4}; })}), "impossible shape"));
  CHECK(contains(error({with([](auto& y) { y.type = dtype::f4, y.strides = {1, 2}; })}), "packed"));
  CHECK(contains(error({with([](auto& y) {
                   y.type = dtype::f4;
                   y.shape = {1, 3};
                   y.strides = {3, 1};
                 })}),
                 "packed"));
  CHECK(contains(error({}, {{"a", std::string(std::size_t{100'000'000}, 'a')}}),
                 "at most 100000000"));
  CHECK(dir.count() == 0);
  CHECK(contains(error_of<std::system_error>([&] {
                   rflow::write_safetensors(dir / "no/x", {&x, 1});
                 }),
                 "no/x: No such file"));
  CHECK(error({}) == "nothing thrown");
  CHECK(safetensors_file(dir / "x").size() == 0);
}

// What as_tensor looks at must outlive it.
template <class... Arguments>
concept describable = requires(Arguments&&... arguments) {
  rflow::as_tensor("x", std::forward<Arguments>(arguments)..., {1});
};
static_assert(describable<std::vector<float>&>);
static_assert(describable<std::span<float>>);
static_assert(!describable<std::vector<float>>);

TEST_CASE("files that MLX writes, and fields of later versions, are read") {
  for (std::string const& header :
       {"{\"__metadata__\":null," + entry("x", "F32", "[2,2]", "[0,16]") + "}",
        "{" + entry("x", "F32", "[2,2]", "[0,16]") + ",\"__metadata__\":null}",
        std::string("{\"x\":{\"device\":\"cpu\",\"dtype\":\"F32\",\"strides\":null,\"shape\":[2,2],"
                    "\"more\":{\"a\":[1,{\"b\":[]}],\"dtype\":-1.5},\"l\":[[],[true]],\"n\":1,"
                    "\"data_offsets\":[0,16],\"z\":-1}}")}) {
    CAPTURE(header);
    files::memory const memory(file_of(header, 16));
    safetensors_file const file(memory.file());
    CHECK(file.metadata().empty());
    CHECK(file["x"].description() == "'x', f32 [2, 2]");
  }
  files::memory const nothing(file_of("{\"__metadata__\":null}", 0));
  CHECK(safetensors_file(nothing.file()).size() == 0);
}

namespace {

std::string sharded_error(std::filesystem::path const& path) {
  try {
    rflow::sharded_safetensors const file(path);
  } catch (std::exception const& error) {
    return error.what();
  }
  return "nothing thrown";
}

/// One file with those tensors, each of one number.
void write_part(std::filesystem::path const& path, std::vector<std::string> const& names,
                float first, std::map<std::string, std::string> const& metadata = {}) {
  std::vector<float> values;
  for (std::size_t i = 0; i < names.size(); ++i) values.push_back(first + static_cast<float>(i));
  std::vector<rflow::tensor> tensors;
  for (std::size_t i = 0; i < names.size(); ++i) {
    auto x = rflow::as_tensor(names[i], values, {static_cast<std::ptrdiff_t>(values.size())});
    x.shape = x.strides = {1};
    x.data += 4 * i;
    tensors.push_back(x);
  }
  rflow::write_safetensors(path, tensors, metadata);
}

}  // namespace

TEST_CASE("a file in parts is read as one") {
  using rflow::sharded_safetensors;
  files::scratch const dir;
  auto const first = dir / "model-00001-of-00002.safetensors",
             second = dir / "model-00002-of-00002.safetensors",
             index = dir / "model.safetensors.index.json";
  write_part(first, {"block.1", "embed"}, 1, {{"model", "m"}, {"part", "1"}});
  write_part(second, {"block.2", "left"}, 10, {{"model", "m"}, {"part", "2"}, {"only", "here"}});
  files::write(index,
               "{\"metadata\": {\"total_size\": 16, \"a\": [{\"weight_map\": 1}]}, \"weight_map\": "
               "{\"embed\": \"model-00001-of-00002.safetensors\", \"block.1\": "
               "\"model-00001-of-00002.safetensors\", \"block.2\": "
               "\"./model-00002-of-00002.safetensors\"}, \"more\": null}\n");
  for (auto const& path : {first, second, index, dir.path()}) {
    CAPTURE(path);
    REQUIRE(sharded_safetensors::is_one(path));
    sharded_safetensors const file(path);
    CHECK(file.path() == path.string());
    CHECK(file.contains("block.2"));
    CHECK(*file["embed"].elements<float>() == 2);
    CHECK(*file["block.2"].elements<float>() == 10);
    CHECK(file["block.2"].name == "block.2");
    CHECK(file.metadata() ==
          std::map<std::string, std::string, std::less<>>{{"model", "m"}, {"only", "here"}});
    bool const by_names = path == first || path == second;
    CHECK(file.names() == (by_names
                               ? std::vector<std::string>{"block.1", "block.2", "embed", "left"}
                               : std::vector<std::string>{"block.1", "block.2", "embed"}));
    CHECK(file.size() == file.names().size());
    CHECK(file.parts() == 2);
    CHECK(contains(error_of<std::invalid_argument>([&] { file["x"]; }), "has no tensor 'x'"));
  }
  SUBCASE("a part that is missing is named") {
    std::filesystem::remove(second);
    for (auto const& path : {first, index, dir.path()})
      CHECK(contains(sharded_error(path), "model-00002-of-00002.safetensors: No such file"));
  }
  SUBCASE("parts that are shards of something else") {
    write_part(second, {"block.1", "embed"}, 10);
    CHECK(contains(sharded_error(first), "'block.1' is in"));
    CHECK(contains(sharded_error(first), "these are not parts of one file"));
    CHECK(contains(sharded_error(index), "'block.2' is not in ./model-00002-of"));
  }
}

TEST_CASE("names of parts") {
  using rflow::sharded_safetensors;
  for (auto const* name : {"x-1-of-1.safetensors", "-00001-of-00001.safetensors",
                           "a-b-00002-of-00003.safetensors", "x-01-of-99.safetensors"})
    CHECK(sharded_safetensors::is_one(name));
  for (auto const* name :
       {"x.safetensors", "x-of-2.safetensors", "x-00001-of-2.safetensors", "x-0-of-1.safetensors",
        "x-2-of-1.safetensors", "x-00001-of-00002.npy", "x-00001-of-.safetensors", "",
        "x-00001-of-00002.safetensors.tmp", "x-0000001-of-0000002.safetensors"})
    CHECK_FALSE(sharded_safetensors::is_one(name));
  CHECK(contains(sharded_error("x.safetensors"), "an index (.safetensors.index.json), a folder"));
  files::scratch const dir;
  CHECK_FALSE(sharded_safetensors::is_one(dir.path()));
  CHECK(
      contains(sharded_error(dir / "x-1-of-9.safetensors"), "x-1-of-9.safetensors: No such file"));
}

TEST_CASE("every rule of an index") {
  files::scratch const dir;
  write_part(dir / "a.safetensors", {"x"}, 1);
  std::filesystem::create_directory(dir / "below");
  write_part(dir / "below/b.safetensors", {"y"}, 2);
  auto const error = [&](std::string const& text) {
    files::write(dir / "below/i.safetensors.index.json", text);
    return sharded_error(dir / "below/i.safetensors.index.json");
  };
  REQUIRE(error("{\"weight_map\":{\"y\":\"b.safetensors\"}}") == "nothing thrown");
  CHECK(error("{\"weight_map\":{}}") == "nothing thrown");
  for (auto const* outside :
       {"../a.safetensors", "", "/a.safetensors", "x/../../a.safetensors", "b\\u0000.safetensors"})
    CHECK(contains(error(std::string("{\"weight_map\":{\"x\":\"") + outside + "\"}}"),
                   "not a file below the index's folder"));
  CHECK(contains(error("{\"weight_map\":{\"y\":\"b.safetensors\",\"y\":\"b.safetensors\"}}"),
                 "'y' appears twice"));
  CHECK(contains(error("{\"weight_map\":{},\"weight_map\":{}}"), "weight_map appears twice"));
  CHECK(
      contains(error("{\"weight_map\":{\"z\":\"b.safetensors\"}}"), "'z' is not in b.safetensors"));
  CHECK(
      contains(error("{\"weight_map\":{\"y\":\"c.safetensors\"}}"), "c.safetensors: No such file"));
  for (auto const* value : {"1", "-1", "1.5", "null", "true", "{}", "[]"}) {
    CHECK(contains(error(std::string("{\"weight_map\":{\"y\":") + value + "}}"),
                   "names something else than a file"));
    if (*value != '{')
      CHECK(error(std::string("{\"weight_map\":") + value + "}") != "nothing thrown");
  }
  CHECK(contains(error("{\"weight_map\":\"x\"}"), "weight_map is no object"));
  for (auto const* text : {"{}", "[]", "1", "[{\"weight_map\":{}}]", "{\"a\":{\"weight_map\":{}}}"})
    CHECK(contains(error(text), "the index has no weight_map"));
  CHECK(contains(error(""), "the file is empty"));
  for (auto const* text : {" ", "{", "{\"weight_map\":{\"y\":\"b\xff\"}}", "{}x"})
    CHECK(contains(error(text), "not UTF-8 JSON"));
}
