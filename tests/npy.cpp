// SPDX-License-Identifier: Apache-2.0
// .npy: every rule of the format against a file that breaks it, files that NumPy wrote, round trips.
// tests/reference/files.py writes the fixtures.
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <rflow/npy.hpp>

#include <rflow/file.hpp>
#include <string>
#include <vector>

#include "files.hpp"

namespace {

using files::contains;
using files::error_of;
using rflow::dtype;
using rflow::npy_file;
using rflow::reinterpret;
using bytes = std::string;

bytes little(std::size_t n, int width) {
  bytes out;
  for (; width > 0; --width, n >>= 8) out += static_cast<char>(n & 0xff);
  return out;
}

bytes const magic = "\x93NUMPY";

/// A version 1.0 file with that dictionary, a newline and that many zeros.
bytes file_of(std::string const& dictionary, std::size_t data) {
  return magic + bytes("\1\0", 2) + little(dictionary.size() + 1, 2) + dictionary + "\n" +
         bytes(data, '\0');
}

bytes shaped(std::string const& shape, std::size_t data, std::string const& descr = "<f4") {
  return file_of("{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }",
                 data);
}

std::string open_error(bytes const& content) {
  files::memory const memory(content);
  return error_of<rflow::format_error>([&] { npy_file const file(memory.file()); });
}

}  // namespace

TEST_CASE("every rule of the .npy format") {
  struct bad {
    bytes content;
    std::size_t byte;
    std::string rule;
  };
  bytes const good = shaped("(2, 3)", 24);
  REQUIRE(open_error(good) == "nothing thrown");
  std::string const rest = "'fortran_order': False, 'shape': (2, 3)";

  std::vector<bad> const cases = {
      {"", 0, "the file is empty"},
      {"\x93NUMP", 0, "wrong magic"},
      {"PK\3\4" + bytes(100, '\0'), 0, "wrong magic"},
      {bytes("\x92NUMPY\1\0\0\0", 10), 0, "wrong magic"},
      {magic, 6, "the file ends within its header"},
      {magic + "\1", 7, "the file ends within its header"},
      {magic + bytes("\0\0\2\0{}", 6), 6, "version 0.0"},
      {magic + bytes("\4\0\2\0{}", 6), 6, "version 4.0"},
      {magic + bytes("\1\1\2\0{}", 6), 6, "version 1.1"},
      {magic + bytes("\1\0\2", 3), 9, "the file ends within its header"},
      {magic + bytes("\2\0\2\0", 4), 10, "the file ends within its header"},
      {magic + bytes("\1\0", 2) + little(9999, 2) + "{", 11, "the file ends within its header"},
      {magic + bytes("\1\0", 2) + little(10001, 2) + bytes(20000, ' '), 8, "10001 bytes (at most"},
      {magic + bytes("\2\0", 2) + little(0xffffffffu, 4) + bytes(99, ' '), 8, "4294967295 bytes"},
      {good.substr(0, 60), 60, "the file ends within its header"},
      // the dictionary
      {magic + bytes("\1\0\0\0", 4), 10, "the header ends within its dictionary"},
      {file_of("", 0), 11, "the header ends within its dictionary"},
      {file_of("[]", 0), 10, "not a dictionary"},
      {file_of("{", 0), 12, "the header ends within its dictionary"},
      {file_of("{descr: 1}", 0), 11, "a quoted string expected"},
      {file_of("{'descr", 0), 17, "unfinished or escaped string"},
      {file_of("{'desc\\x72': '<f4', " + rest + "}", 24), 16, "unfinished or escaped string"},
      {file_of("{'descr' '<f4', " + rest + "}", 24), 19, "':' expected"},
      {file_of("{'descr': '<f4' " + rest + "}", 24), 26, "',' or '}' expected"},
      {file_of("{'descr': '<f4',, " + rest + "}", 24), 26, "a quoted string expected"},
      {file_of("{'descr': '<f4', " + rest, 24), 67, "the header ends within its dictionary"},
      {file_of("{" + rest + "}", 24), 50, "descr is missing"},
      {file_of("{'descr': '<f4', 'shape': (2, 3)}", 24), 42, "fortran_order is missing"},
      {file_of("{'descr': '<f4', 'fortran_order': False}", 24), 49, "shape is missing"},
      {file_of("{'descr': '<f4', 'descr': '<f4', " + rest + "}", 24), 27, "repeated key"},
      {file_of("{'descr': '<f4', 'x': 1, " + rest + "}", 24), 27, "unknown key"},
      {file_of("{'descr': '<f4', " + rest + "} + 1", 24), 68, "text after"},
      {file_of("{'descr': '<f4', " + rest + "}{}", 24), 67, "text after"},
      {file_of("{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}", 24), 44, "True or False"},
      {file_of("{'descr': '<f4', 'fortran_order': false, 'shape': (2, 3)}", 24), 44, "True or Fal"},
      {file_of("{'descr': '<f4', 'fortran_order': 'a', 'shape': (2, 3)}", 24), 44, "True or Fals"},
      // types
      {shaped("(2, 3)", 24, ">f4"), 20, "'>f4': big endian"},
      {shaped("(2, 3)", 48, "|O"), 20, "Python objects (pickle)"},
      {shaped("(2, 3)", 24, "f 4"), 20, "not a type that is read"},
      {shaped("(2, 3)", 24, "F4"), 20, "not a type that is read"},
      {shaped("(2, 3)", 24, "!f4"), 20, "not a type that is read"},
      {shaped("(2, 3)", 24, "<<f4"), 20, "not a type that is read"},
      {shaped("(2, 3)", 24, "<float32"), 20, "not a type that is read"},
      {shaped("(2, 3)", 12, ">V2"), 20, "'>V2': big endian"},
      {shaped("(2, 3)", 24, ">f"), 20, "'>f': big endian"},
      {shaped("(2, 3)", 6, "float8_e4m3"), 20, "not a type that is read"},
      {shaped("(2, 3)", 96, "<f16"), 20, "not a type that is read"},
      {shaped("(2, 3)", 24, "<U1"), 20, "not a type that is read"},
      {shaped("(2, 3)", 6, "|S1"), 20, "not a type that is read"},
      {shaped("(2, 3)", 48, "<M8[ns]"), 20, "not a type that is read"},
      {shaped("(2, 3)", 18, "|V3"), 20, "not a type that is read"},
      {shaped("(2, 3)", 0, ""), 20, "not a type that is read"},
      {file_of("{'descr': [('a', '<f4')], " + rest + "}", 24), 20, "structured types"},
      {file_of("{'descr': ('<f4', (2,)), " + rest + "}", 48), 20, "structured types"},
      {file_of("{'descr': None, " + rest + "}", 24), 20, "a quoted string expected"},
      // shape
      {shaped("[2, 3]", 24), 60, "shape is not a tuple"},
      {shaped("6", 24), 60, "shape is not a tuple"},
      {shaped("(6)", 24), 62, "a tuple of one extent needs a comma"},
      {shaped("(,)", 4), 61, "an extent is not a plain number"},
      {shaped("(2,,3)", 24), 63, "an extent is not a plain number"},
      {shaped("(2 3)", 24), 63, "',' or ')' expected"},
      {shaped("(-2, 3)", 24), 61, "an extent is not a plain number"},
      {shaped("(-2, -3)", 24), 61, "an extent is not a plain number"},
      {shaped("(+2, 3)", 24), 61, "an extent is not a plain number"},
      {shaped("(02, 3)", 24), 61, "an extent is not a plain number"},
      {shaped("(2.0, 3)", 24), 62, "',' or ')' expected"},
      {shaped("(2l, 3)", 24), 62, "',' or ')' expected"},
      {shaped("(2LL, 3)", 24), 63, "',' or ')' expected"},
      {shaped("(L, 3)", 24), 61, "an extent is not a plain number"},
      {shaped("(1e1,)", 40), 62, "',' or ')' expected"},
      {shaped("(9223372036854775808,)", 0), 61, "extent too large"},
      {shaped("(99999999999999999999999,)", 0), 61, "extent too large"},
      {shaped("(9223372036854775807,)", 0), 10, "overflows"},
      {shaped("(4294967296, 4294967296)", 0), 10, "overflows"},
      {shaped("(0, 4294967296, 4294967296)", 0), 10, "overflows"},
      {shaped("(2305843009213693952, 4)", 0), 10, "overflows"},
      {shaped(
           "(" +
               [] {
                 std::string s;
                 for (int i = 0; i < 65; ++i) s += "1,";
                 return s;
               }() +
               ")",
           4),
       61 + 128, "more than 64 axes"},
      // length of the data
      {shaped("(2, 3)", 23), 70 + 23, "23 bytes of data, but f32 [2, 3] takes 24"},
      {shaped("(2, 3)", 0), 70, "0 bytes of data"},
      {shaped("(2, 3)", 25), 70 + 24, "25 bytes of data"},
      {shaped("(0, 3)", 1), 70, "1 bytes of data"},
      {shaped("(2, 3)", 24) + shaped("(2, 3)", 24), 70 + 24, "another array follows"},
      {shaped("(100000000, 1000000000)", 24), 87 + 24, "takes 400000000000000000"},
  };
  for (bad const& c : cases) {
    CAPTURE(c.content);
    std::string const text = open_error(c.content);
    CAPTURE(text);
    CHECK(text.starts_with("file: byte " + std::to_string(c.byte) + ": "));
    CHECK(contains(text, c.rule));
  }
}

TEST_CASE("every prefix of a file is refused") {
  for (auto const* name : {"f4.npy", "version2.npy", "version3.npy"}) {
    bytes const whole = files::read(files::fixture(name));
    REQUIRE(open_error(whole) == "nothing thrown");
    for (std::size_t n = 0; n < whole.size(); ++n)
      CHECK(open_error(whole.substr(0, n)) != "nothing thrown");
  }
}

TEST_CASE("headers that other writers make are read") {
  for (std::string const& dictionary :
       {std::string("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"),
        std::string("{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}"),
        std::string("{\"descr\":\"<f4\",\"fortran_order\":False,\"shape\":(2,3)}"),
        std::string("  {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3 , ) }   ")}) {
    files::memory const memory(file_of(dictionary, 24));
    npy_file const file(memory.file());
    CHECK(file.array().shape == std::vector<std::ptrdiff_t>{2, 3});
  }
}

TEST_CASE("types are named as NumPy's reader has them") {
  struct named {
    dtype type;
    std::vector<std::string> descr;
  };
  for (named const& n : std::vector<named>{
           {dtype::f32, {"<f4", "=f4", "|f4", "f4", "f", "<f", "float32", "single"}},
           {dtype::f64, {"<f8", "=f8", "|f8", "f8", "d", "=d", "float64", "double", "float"}},
           {dtype::f16, {"<f2", "=f2", "|f2", "f2", "e", "|e", "float16", "half"}},
           {dtype::bf16, {"bfloat16"}},
           {dtype::f8_e4m3, {"float8_e4m3fn"}},
           {dtype::f8_e5m2, {"float8_e5m2", "<f1", "|f1", "f1"}},
           {dtype::f8_e4m3fnuz, {"float8_e4m3fnuz"}},
           {dtype::f8_e5m2fnuz, {"float8_e5m2fnuz"}},
           {dtype::raw16, {"|V2", "<V2", "=V2", "V2"}},
           {dtype::raw8, {"|V1", "<V1", "=V1", ">V1", "V1"}},
           {dtype::boolean, {"|b1", "<b1", ">b1", "?", "=?", "bool"}},
           {dtype::u8, {"|u1", ">u1", "u1", "B", "uint8", "ubyte"}},
           {dtype::i8, {"|i1", ">i1", "i1", "b", "int8", "byte"}},
           {dtype::u16, {"<u2", "u2", "H", "uint16", "ushort"}},
           {dtype::i16, {"<i2", "i2", "h", "int16", "short"}},
           {dtype::u32, {"<u4", "u4", "I", "uint32"}},
           {dtype::i32, {"<i4", "=i4", "i4", "i", "<i", "int32"}},
           {dtype::u64, {"<u8", "u8", "L", "Q", "uint64", "uint"}},
           {dtype::i64, {"<i8", "i8", "l", "q", "<q", "p", "int64", "int", "long"}},
           {dtype::c64, {"<c8", "c8", "F", "complex64"}},
           {dtype::c128, {"<c16", "c16", "D", "complex128"}},
       })
    for (std::string const& descr : n.descr) {
      CAPTURE(descr);
      files::memory const memory(shaped("(2, 3)", 6 * bits(n.type) / 8, descr));
      npy_file const file(memory.file());
      CHECK(file.array().type == n.type);
    }
}

TEST_CASE("headers of Python 2, and without a newline, are read") {
  for (std::string const& dictionary :
       {std::string("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }"),
        std::string("{u'descr': u'<f4', u'fortran_order': False, u'shape': (2, 3L)}")}) {
    CAPTURE(dictionary);
    bytes const content = file_of(dictionary, 24);
    files::memory const memory(content);
    npy_file const file(memory.file());
    CHECK(file.array().shape == std::vector<std::ptrdiff_t>{2, 3});
    bytes three = magic + bytes("\3\0", 2) + little(dictionary.size() + 1, 4) + dictionary + "\n" +
                  bytes(24, '\0');  // no Python 2 wrote version 3.0
    CHECK(contains(open_error(three), "',' or ')' expected"));
  }
  bytes const good = shaped("(2, 3)", 24);
  std::size_t const header = good.size() - 10 - 24 - 1;
  files::memory const memory(magic + bytes("\1\0", 2) + little(header, 2) +
                             good.substr(10, header) + bytes(24, '\0'));
  npy_file const file(memory.file());
  CHECK(file.array().shape == std::vector<std::ptrdiff_t>{2, 3});
  files::memory const vector(shaped("(6L,)", 24));
  CHECK(npy_file(vector.file()).array().shape == std::vector<std::ptrdiff_t>{6});
}

TEST_CASE("what NumPy wrote is read") {
  auto const range = [](auto zero) {
    std::vector<decltype(zero)> out;
    for (int i = 0; i < 6; ++i) out.push_back(static_cast<decltype(zero)>(i));
    return out;
  };
  std::vector<std::ptrdiff_t> const shape = {2, 3};
  SUBCASE("floats") {
    npy_file const single(files::fixture("f4.npy")), twice(files::fixture("f8.npy"));
    CHECK(single.array().name == "f4");
    CHECK(single.array().shape == shape);
    CHECK(files::values<float>(single.array()) == range(0.f));
    CHECK(files::values<double>(twice.array()) == range(0.));
    npy_file const half(files::fixture("f2.npy"));
    std::vector<rflow::f16> const found = files::values<rflow::f16>(half.array());
    CHECK(std::vector<float>(found.begin(), found.end()) == range(0.f));
    CHECK(float(half.array().as<rflow::f16>()(1, 2)) == 5);
  }
  SUBCASE("integers and booleans are labels") {
    for (auto const* name : {"i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"}) {
      npy_file const file(files::fixture(std::string(name) + ".npy"));
      CHECK(file.array().integers() == range(std::int64_t{}));
    }
    npy_file const truth(files::fixture("b1.npy"));
    CHECK(truth.array().type == dtype::boolean);
    CHECK(truth.array().integers() == std::vector<std::int64_t>{0, 1, 1, 1, 1, 1});
    npy_file const vector(files::fixture("vector.npy"));
    CHECK(vector.array().integers() == std::vector<std::int64_t>{0, 1, 2, 3});
  }
  SUBCASE("complex numbers have a type but no view") {
    npy_file const a(files::fixture("c8.npy")), b(files::fixture("c16.npy"));
    CHECK(a.array().type == dtype::c64);
    CHECK(b.array().type == dtype::c128);
    CHECK(contains(error_of<std::invalid_argument>([&] { a.array().as<float>(); }), "c64 [2, 3]"));
  }
  SUBCASE("versions 2.0 and 3.0") {
    for (auto const* name : {"version2.npy", "version3.npy"})
      CHECK(files::values<float>(npy_file(files::fixture(name)).array()) == range(0.f));
  }
  SUBCASE("Fortran order becomes strides") {
    npy_file const file(files::fixture("fortran.npy"));
    CHECK(file.array().strides == std::vector<std::ptrdiff_t>{1, 2});
    CHECK(file.array().as<float>()(0, 1) == 1);
    CHECK(file.array().as<float>()(1, 0) == 3);
    CHECK(files::values<float>(file.array()) == range(0.f));
  }
  SUBCASE("rank 0, rank 3, no elements") {
    npy_file const scalar(files::fixture("scalar.npy"));
    CHECK(scalar.array().rank() == 0);
    CHECK(*scalar.array().elements<float>() == 7);
    npy_file const three(files::fixture("three.npy"));
    auto const stack = three.array().as_stack<float>();
    CHECK(stack.sites() == 2);
    CHECK(stack[1](2, 3) == 23);
    npy_file const empty(files::fixture("empty.npy"));
    CHECK(empty.array().as<float>().rows == 0);
    CHECK(empty.array().as<float>().cols == 5);
  }
  SUBCASE("bfloat16 only when asked for") {
    npy_file const raw(files::fixture("bfloat16.npy"));
    CHECK(raw.array().type == dtype::raw16);
    CHECK(contains(error_of<std::invalid_argument>([&] { raw.array().as<rflow::bf16>(); }),
                   "reinterpret::as_bf16"));
    npy_file const file(files::fixture("bfloat16.npy"), reinterpret::as_bf16);
    CHECK(float(file.array().as<rflow::bf16>()(1, 2)) == 5);
    npy_file const integers(files::fixture("u2.npy"), reinterpret::as_f16);
    CHECK(integers.array().as<rflow::f16>()(1, 2).bits == 5);
    npy_file const also(files::fixture("i2.npy"), reinterpret::as_bf16);
    CHECK(also.array().type == dtype::bf16);
    for (auto const* name : {"f4.npy", "f2.npy", "i4.npy", "c8.npy"})
      CHECK(contains(error_of<std::invalid_argument>(
                         [&] { npy_file(files::fixture(name), reinterpret::as_bf16); }),
                     "only 16-bit integers"));
  }
  SUBCASE("8-bit floats: e5m2 by its name, e4m3 when asked for") {
    npy_file const raw(files::fixture("float8_e4m3fn.npy")),
        e5m2(files::fixture("float8_e5m2.npy"));
    CHECK(raw.array().type == dtype::raw8);
    CHECK(e5m2.array().type == dtype::f8_e5m2);
    CHECK(contains(error_of<std::invalid_argument>([&] { raw.array().as<float>(); }),
                   "reinterpret::as_f8_e4m3 or reinterpret::as_f8_e5m2"));
    npy_file const file(files::fixture("float8_e4m3fn.npy"), reinterpret::as_f8_e4m3);
    CHECK(file.array().type == dtype::f8_e4m3);
    npy_file const integers(files::fixture("u1.npy"), reinterpret::as_f8_e5m2);
    CHECK(integers.array().type == dtype::f8_e5m2);
    npy_file const also(files::fixture("i1.npy"), reinterpret::as_f8_e4m3);
    CHECK(also.array().type == dtype::f8_e4m3);
    for (auto const* name : {"f4.npy", "u2.npy", "bfloat16.npy", "float8_e5m2.npy"})
      CHECK(contains(error_of<std::invalid_argument>(
                         [&] { npy_file(files::fixture(name), reinterpret::as_f8_e4m3); }),
                     "only 8-bit integers"));
    CHECK_THROWS_AS(npy_file(files::fixture("u1.npy"), reinterpret::as_bf16),
                    std::invalid_argument);
  }
  SUBCASE("refused by name") {
    auto const error = [](char const* name) {
      return error_of<rflow::format_error>([&] { npy_file(files::fixture(name)); });
    };
    CHECK(contains(error("big_endian.npy"), "'>f4': big endian"));
    CHECK(contains(error("structured.npy"), "structured"));
    CHECK(contains(error("object.npy"), "pickle"));
    CHECK(contains(error("text.npy"), "'<U3'"));
    CHECK(contains(error("void.npy"), "'|V3'"));
    CHECK(contains(error("all.safetensors"), "magic"));
  }
}

TEST_CASE("the writer writes what NumPy writes") {
  files::scratch const dir;
  auto const same = [&](char const* name) {
    npy_file const file(files::fixture(name));
    write_npy(dir / name, file.array());
    CHECK(files::read(dir / name) == files::read(files::fixture(name)));
  };
  for (auto const* name : {"f2.npy", "f4.npy", "f8.npy", "i1.npy", "u1.npy", "i2.npy", "u2.npy",
                           "i4.npy", "u4.npy", "i8.npy", "u8.npy", "b1.npy", "c8.npy", "c16.npy",
                           "three.npy", "vector.npy", "scalar.npy", "empty.npy"})
    same(name);
  npy_file const fortran(files::fixture("fortran.npy"));
  rflow::write_npy(dir / "c_order.npy", fortran.array());
  CHECK(files::read(dir / "c_order.npy") == files::read(files::fixture("f4.npy")));
}

TEST_CASE_TEMPLATE("round trips keep every value and layout", T, float, double, rflow::f16) {
  files::scratch const dir;
  std::vector<T> data(5 * 2100);
  for (std::size_t i = 0; i < data.size(); ++i)
    if constexpr (std::same_as<T, rflow::f16>)
      data[i] = {static_cast<std::uint16_t>(i * 17)};
    else
      data[i] = static_cast<T>(i) / 7;
  std::vector<rflow::view<T>> const layouts = {
      {data.data(), 5, 2100},                      // dense; rows longer than a block
      {data.data(), 2100, 5},                      //
      {data.data(), 2100, 5, 1, 2100},             // column-major
      {data.data(), 3, 1000, 2100},                // padded rows
      {data.data() + 4 * 2100, 5, 100, -2100, 2},  // backwards, gaps
      {data.data(), 4, 3, 0, 1},                   // one row, repeated
      {data.data(), 1, 1},
      {data.data(), 0, 3},  //
      {data.data(), 3, 0},
  };
  for (auto const& x : layouts) {
    rflow::write_npy(dir / "x.npy", x);
    npy_file const file(dir / "x.npy");
    auto const y = file.array().template as<T>();
    REQUIRE(y.rows == x.rows);
    REQUIRE(y.cols == x.cols);
    CHECK(reinterpret_cast<std::uintptr_t>(y.data) % 64 == 0);
    bool same = true;
    for (std::ptrdiff_t i = 0; i < x.rows; ++i)
      for (std::ptrdiff_t j = 0; j < x.cols; ++j)
        same = same && std::memcmp(&x(i, j), &y(i, j), sizeof(T)) == 0;
    CHECK(same);
  }
}

TEST_CASE("containers of any shape are written") {
  files::scratch const dir;
  std::vector<std::int32_t> const labels = {3, 1, -2, 0};
  rflow::write_npy(dir / "labels.npy", labels, {4});
  CHECK(npy_file(dir / "labels.npy").array().integers() == std::vector<std::int64_t>{3, 1, -2, 0});
  rflow::write_npy(dir / "square.npy", labels, {2, 1, 2});
  CHECK(npy_file(dir / "square.npy").array().shape == std::vector<std::ptrdiff_t>{2, 1, 2});
  std::vector<std::ptrdiff_t> const ones(64, 1);
  rflow::write_npy(dir / "deep.npy", std::vector<float>{1}, ones);
  CHECK(npy_file(dir / "deep.npy").array().rank() == 64);
  for (std::vector<std::ptrdiff_t> const& shape :
       {std::vector<std::ptrdiff_t>{5}, {-2, -2}, {}, {4611686018427387904, 4}})
    CHECK(contains(
        error_of<std::invalid_argument>([&] { rflow::write_npy(dir / "bad.npy", labels, shape); }),
        "4 values do not make"));
  CHECK_FALSE(std::filesystem::exists(dir / "bad.npy"));
}

TEST_CASE("what cannot be written is refused before a file appears") {
  files::scratch const dir;
  std::vector<rflow::bf16> const x(6);
  auto const error = [&](rflow::tensor const& t) {
    return error_of<std::invalid_argument>([&] { rflow::write_npy(dir / "x.npy", t); });
  };
  std::vector<float> const values(6);
  auto const good = rflow::as_tensor("x", values, {2, 3});
  CHECK(contains(error(rflow::as_tensor("x", x, {2, 3})), "NumPy has no type for 'x', bf16"));
  auto bad = good;
  bad.strides.pop_back();
  CHECK(contains(error(bad), "2 extents and 1 strides"));
  bad = good;
  bad.shape = {-2, -3};
  CHECK(contains(error(bad), "impossible shape"));
  bad = good;
  bad.data = nullptr;
  CHECK(contains(error(bad), "no data"));
  bad = good;
  bad.shape.assign(65, 1);
  bad.strides.assign(65, 1);
  CHECK(contains(error(bad), "64 axes"));
  CHECK(dir.count() == 0);
}

TEST_CASE("data that are not aligned are copied, once") {
  bytes content = file_of("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3)}", 48);
  for (std::size_t i = 0; i < 6; ++i) {
    double const value = static_cast<double>(i) + 0.5;
    std::memcpy(content.data() + content.size() - 48 + i * 8, &value, 8);
  }
  REQUIRE((content.size() - 48) % 8 != 0);
  files::scratch const dir;
  files::write(dir / "odd.npy", content);
  npy_file file(dir / "odd.npy");
  auto const x = file.array().as<double>();
  CHECK(reinterpret_cast<std::uintptr_t>(x.data) % alignof(double) == 0);
  CHECK(x(1, 2) == 5.5);
  npy_file const moved = std::move(file);
  CHECK(moved.array().as<double>().data == x.data);
  CHECK(x(1, 1) == 4.5);
}

TEST_CASE("conversions state what was expected and what is there") {
  npy_file const matrix(files::fixture("f4.npy")), cube(files::fixture("three.npy")),
      empty(files::fixture("empty.npy"));
  auto const error = [](auto&& f) { return error_of<std::invalid_argument>(f); };
  CHECK(error([&] { matrix.array().as<double>(); }) ==
        "rflow::tensor::as: f64 of rank 2 expected, found 'f4', f32 [2, 3]");
  CHECK(
      contains(error([&] { cube.array().as<float>(); }), "rank 2 expected, found 'three', f32 ["));
  CHECK(contains(error([&] { matrix.array().as_stack<float>(); }), "f32 of rank 3 expected"));
  CHECK(contains(error([&] { cube.array().as_stack<rflow::bf16>(); }), "bf16 of rank 3 expected"));
  CHECK(contains(error([&] { matrix.array().elements<double>(); }), "f64 expected"));
  CHECK(contains(error([&] { matrix.array().integers(); }), "booleans or integers expected"));
  auto off = matrix.array();
  ++off.data;
  CHECK(contains(error([&] { off.as<float>(); }), "not aligned to 4 bytes"));

  auto const rows = [](auto const& x) { return x.rows; };
  CHECK(rflow::visit(matrix.array(), rows) == 2);
  CHECK(contains(error([&] { rflow::visit(cube.array(), rows); }), "rank 2"));
  CHECK(contains(error([&] { rflow::visit(npy_file(files::fixture("i4.npy")).array(), rows); }),
                 "found 'i4', i32 [2, 3]"));
  for (auto const* name : {"f2.npy", "f8.npy"})
    CHECK(rflow::visit(npy_file(files::fixture(name)).array(), rows) == 2);

  // No data bound the number of sites here.
  files::memory const hostile(shaped("(1000000000000000, 0, 1)", 0));
  npy_file const endless(hostile.file());
  CHECK(contains(error([&] { endless.array().as_stack<float>(); }), "empty axis"));
}

TEST_CASE("labels out of range are refused") {
  std::vector<std::uint64_t> const large = {1, std::numeric_limits<std::uint64_t>::max()};
  CHECK(contains(
      error_of<std::invalid_argument>([&] { rflow::as_tensor("y", large, {2}).integers(); }),
      "element 1 is 18446744073709551615"));
  std::vector<std::uint8_t> const two = {0, 1, 2};
  auto truth = rflow::as_tensor("y", two, {3});
  truth.type = dtype::boolean;
  CHECK(contains(error_of<std::invalid_argument>([&] { truth.integers(); }), "element 2 is 2"));
}

TEST_CASE("a directory of .npy files") {
  files::scratch const dir;
  rflow::write_npy(dir / "embed.npy", std::vector<float>(6), {2, 3});
  rflow::write_npy(dir / "block.1.npy", std::vector<float>(6, 1.f), {2, 3});
  files::write(dir / "notes.txt", "not an array");
  files::write(dir / "broken.npy", "not an array");
  rflow::npy_directory all(dir.path());
  CHECK(all.names() == std::vector<std::string>{"block.1", "broken", "embed"});
  CHECK(all.contains("embed"));
  CHECK_FALSE(all.contains("notes"));
  auto const* const first = all["block.1"].data;
  CHECK(all["block.1"].as<float>()(1, 2) == 1);
  CHECK(all["block.1"].data == first);
  CHECK(contains(error_of<rflow::format_error>([&] { all["broken"]; }), "broken.npy: byte 0"));
  // What a word about the bits does not concern is as it was.
  rflow::write_npy(dir / "block.2.npy", std::vector<std::uint16_t>(6, 0x3f80), {2, 3});
  rflow::npy_directory told(dir.path(), reinterpret::as_bf16);
  CHECK(told["embed"].type == dtype::f32);
  CHECK(float(told["block.2"].as<rflow::bf16>()(1, 2)) == 1);
  CHECK(contains(error_of<std::invalid_argument>([&] { all["x"]; }), "has no file x.npy"));
  CHECK(contains(error_of<std::system_error>([&] { rflow::npy_directory{dir / "nowhere"}; }),
                 "nowhere"));
}
