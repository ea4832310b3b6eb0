// SPDX-License-Identifier: Apache-2.0
// Labels as people's tools write them: what they mean, what is refused, and that the remedy that a
// refusal names works.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <rflow/npy.hpp>
#include <rflow/probe.hpp>
#include <rflow/safetensors.hpp>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../../examples/report/labels.hpp"
#include "../program.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using program::folder;
using program::outcome;
using report::role;

using texts = std::vector<std::string>;

constexpr std::ptrdiff_t tokens = 12, width = 4;

/// A capture of two blocks, perhaps with more tensors.
void write_capture(folder const& where, std::vector<rflow::tensor> more = {},
                   std::string const& name = "x.safetensors") {
  std::vector<std::vector<float>> values(3, std::vector<float>(tokens * width));
  std::uint32_t state = 7;
  for (auto& site : values)
    for (float& v : site) {
      state = state * 1664525u + 1013904223u;
      v = static_cast<float>(state >> 8) / 16777216.0f - 0.5f;
    }
  char const* const names[] = {"embed", "block.1", "block.2"};
  for (std::size_t l = 0; l < 3; ++l)
    more.push_back(rflow::as_tensor(names[l], values[l], {tokens, width}));
  rflow::write_safetensors(where / name, more);
}

void put(folder const& where, std::string const& name, std::string const& text) {
  std::ofstream(where.path / name, std::ios::binary) << text;
}

/// Every line twice, then once more: labels for all tokens out of four.
std::string three_times(std::string const& lines) { return lines + lines + lines; }

/// A .npy of strings as NumPy writes it.
std::string npy_strings(std::string const& descr, std::string const& shape,
                        std::string const& data) {
  std::string header =
      "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  out += static_cast<char>(header.size() & 0xff);
  out += static_cast<char>(header.size() >> 8);
  return out + header + data;
}

std::string code_points(std::vector<std::u32string> const& strings, std::size_t length) {
  std::string out;
  for (std::u32string const& s : strings)
    for (std::size_t k = 0; k < length; ++k) {
      char32_t const c = k < s.size() ? s[k] : U'\0';
      for (int byte = 0; byte < 4; ++byte) out += static_cast<char>(c >> 8 * byte & 0xff);
    }
  return out;
}

/// What reading says, by the parts of the program.
class reading {
 public:
  folder work;
  report::options asked;

  explicit reading(std::vector<rflow::tensor> const& more = {}) { write_capture(work, more); }

  report::labelling read(std::string const& name, role what = role::classes) const {
    return report::read_labels(work / name, capture(), asked, what);
  }
  report::labelling of_text(std::string const& text, std::string const& name = "y.csv",
                            role what = role::classes) const {
    put(work, name, text);
    return read(name, what);
  }
  report::probe_labels used(report::labelling const& labels,
                            report::labelling const* groups = nullptr,
                            std::ptrdiff_t skip = 0) const {
    report::options by;
    by.skip_first = skip;
    report::capture const c = capture();
    return report::labels_of("x.safetensors", report::choose_tokens(c, by), labels, groups);
  }
  report::capture capture() const { return report::load(work / "x.safetensors", {}); }

  /// The error, without the folder.
  template <class F>
  std::string error(F const& f) const {
    try {
      f();
    } catch (report::unusable const& why) {
      std::string text = why.what();
      std::string const here = work / "";
      for (std::size_t at; (at = text.find(here)) != std::string::npos;)
        text.erase(at, here.size());
      return text;
    }
    return "no error";
  }
  std::string refused(std::string const& text, std::string const& name = "y.csv",
                      role what = role::classes) const {
    return error([&] { used(of_text(text, name, what)); });
  }
};

void check_holds(std::string const& text, texts const& parts) {
  CAPTURE(text);
  CHECK(text.find('\n') == std::string::npos);
  for (std::string const& part : parts) {
    CAPTURE(part);
    CHECK(text.find(part) != std::string::npos);
  }
}

}  // namespace

// ---- classes ------------------------------------------------------------------------------------

TEST_CASE("whole numbers are classes in the order of their values, however they are written") {
  reading const r;
  using values = std::vector<std::int64_t>;
  struct {
    char const *lines, *name0, *name1;
    values places;
  } const cases[] = {
      {"1\n2\n2\n1\n", "1", "2", {0, 1, 1, 0}},
      {"7\n-3\n-3\n7\n", "-3", "7", {1, 0, 0, 1}},
      {"+1\n-1\n1\n-1\n", "-1", "1", {1, 0, 1, 0}},
      {"10\n9\n10\n9\n", "9", "10", {1, 0, 1, 0}},
      {"0.0\n1.0\n1.0\n0.0\n", "0", "1", {0, 1, 1, 0}},
      {"1.000000000000000000e+00\n0.000000000000000000e+00\n0e0\n1e0\n", "0", "1", {1, 0, 0, 1}},
      {"1.50e1\n-2000e-3\n15\n-2.\n", "-2", "15", {1, 0, 1, 0}},
      {"9223372036854775807\n-9223372036854775808\n9223372036854775807.0\n-9223372036854775808\n",
       "-9223372036854775808",
       "9223372036854775807",
       {1, 0, 1, 0}},
      {"9007199254740993.0\n9007199254740992.0\n9007199254740993\n9007199254740992\n",
       "9007199254740992",
       "9007199254740993",
       {1, 0, 1, 0}},
  };
  for (auto const& c : cases) {
    CAPTURE(c.lines);
    report::labelling const l = r.of_text(three_times(c.lines));
    CHECK(l.names == texts{c.name0, c.name1});
    REQUIRE(std::ssize(l.of_token) == tokens);
    CHECK(values(l.of_token.begin(), l.of_token.begin() + 4) == c.places);
  }
}

TEST_CASE("one number written in two ways is one class, and is told") {
  reading const r;
  report::labelling const l = r.of_text(three_times("1\n01\n2\n1.0\n"));
  CHECK(l.names == texts{"1", "2"});
  REQUIRE(l.notes.size() == 1);
  check_holds(l.notes[0], {"y.csv", "'1' (line 1)", "'01' (line 2)", "same class"});
  CHECK(r.of_text(three_times("1\n2\n2\n1\n")).notes.empty());
  // As words they are two.
  CHECK(r.of_text(three_times("a1\na01\na2\na1.0\n")).names == texts{"a01", "a1", "a1.0", "a2"});
}

TEST_CASE("words are classes in the order of their bytes") {
  reading const r;
  report::labelling const l = r.of_text(three_times("VERB\n noun \nNOUN\n\xc3\xa4\n"));
  CHECK(l.names == texts{"NOUN", "VERB", "noun", "\xc3\xa4"});
  CHECK(std::vector<std::int64_t>(l.of_token.begin(), l.of_token.begin() + 4) ==
        std::vector<std::int64_t>{1, 2, 0, 3});
  CHECK(r.of_text(three_times("True\nFalse\nFalse\nTrue\n")).names == texts{"False", "True"});
}

TEST_CASE("only classes that occur among the tokens that count have a place") {
  reading const r;
  report::labelling const l = r.of_text("z\nz\n" + std::string("c\na\nc\na\nc\na\nc\na\nc\na\n"));
  report::probe_labels const p = r.used(l, nullptr, 2);
  CHECK(p.names == texts{"a", "c"});
  CHECK(p.tokens == std::vector<std::ptrdiff_t>{5, 5});
  CHECK(p.left_out == 0);
  CHECK(p.label == std::vector<std::int64_t>{0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0});
  CHECK(p.mask[1] == false);
  CHECK(p.mask[2] == true);
}

// ---- left out -----------------------------------------------------------------------------------

TEST_CASE("-100 and the ignored labels are left out, by value or by word") {
  reading r;
  auto const left_out = [&](std::string const& lines) {
    return r.used(r.of_text(three_times(lines))).left_out;
  };
  CHECK(left_out("0\n1\n0\n-100\n") == 3);
  CHECK(left_out("0\n1\n-100\n-1.00e2\n") == 6);
  CHECK(left_out("B\nI\nB\n-100\n") == 3);
  r.asked.ignore_labels = {"-1", "PAD", "nan", ""};
  CHECK(left_out("0\n1\n0\n-1.0\n") == 3);
  CHECK(left_out("B\nI\nB\nPAD\n") == 3);
  CHECK(left_out("B\nI\nB\nNaN\n") == 3);
  CHECK(left_out("B\nI\nB\n\"\"\n") == 3);
  CHECK(left_out("B\nI\nPAD\n-100\n") == 6);
  report::labelling const l = r.of_text(three_times("B\nI\nB\nPAD\n"));
  REQUIRE(l.notes.size() == 3);  // -1, nan and "" are nobody's
  check_holds(l.notes[0], {"y.csv", "no token has the label '-1'"});
  r.asked.ignore_labels = {"B", "I"};
  check_holds(r.refused(three_times("B\nI\nB\nI\n")), {"y.csv: no token is left", "12 labels"});
}

TEST_CASE("a missing value is refused with the remedy, where its token counts") {
  reading r;
  std::pair<char const*, char const*> const cases[] = {
      {"NaN", "--ignore-label NaN"},     {"nan", "--ignore-label nan"},
      {"NA", "--ignore-label NA"},       {"None", "--ignore-label None"},
      {"<NA>", "--ignore-label '<NA>'"}, {"\"\"", "--ignore-label ''"},
      {"-nan", "--ignore-label=-nan"},   {"null", "--ignore-label null"}};
  for (auto const& one : cases) {
    std::string const cell = one.first, remedy = one.second;
    CAPTURE(cell);
    for (std::string const other : {"0\n1\n0\n", "B\nI\nB\n"}) {
      r.asked.ignore_labels.clear();
      std::string const text = three_times(other + cell + "\n");
      check_holds(r.refused(text), {"y.csv: line 4: ", "missing value", remedy});
      r.asked.ignore_labels = {cell == "\"\"" ? "" : cell};
      CHECK(r.used(r.of_text(text)).left_out == 3);
    }
  }
  r.asked.ignore_labels.clear();
  CHECK(r.used(r.of_text("NaN\nNaN\n0\n1\n0\n1\n0\n1\n0\n1\n0\n1\n"), nullptr, 2).left_out == 0);
}

// ---- text ---------------------------------------------------------------------------------------

TEST_CASE("text: marks, ends of lines, blank lines, white space") {
  reading const r;
  texts const expected{"0", "1"};
  for (std::string const four :
       {"0\n1\n0\n1\n", "0\r\n1\r\n0\r\n1\r\n", "0\r1\r0\r1\r", " 0\n1 \n\t0\n1\t\n",
        "\n0\n\n1\n0\n  \n1\n\n\n", "\"0\"\n\"1\"\n0\n1\n"}) {
    for (std::string const start : {"", "\xef\xbb\xbf"}) {
      std::string const text = start + three_times(four);
      CAPTURE(text);
      report::labelling const l = r.of_text(text);
      CHECK(l.names == expected);
      CHECK(std::ssize(l.of_token) == tokens);
    }
  }
  CHECK(std::ssize(r.of_text("0\n1\n0\n1\n0\n1\n0\n1\n0\n1\n0\n1").of_token) == tokens);
  check_holds(r.refused("0\n1\n\n0\n1\n"),
              {"y.csv: 4 labels for 12 tokens in x.safetensors", "1 blank line between"});
  check_holds(r.refused(""), {"y.csv: 0 labels for 12 tokens"});
  check_holds(r.refused(std::string("\xff\xfe\x30\x00", 4)), {"y.csv: ", "UTF-16", "UTF-8"});
  check_holds(r.refused(std::string("0\n1\x00\n", 5)), {"y.csv: neither text nor .npy"});
  check_holds(r.refused(three_times("A\nB\nM\xfcnchen\nB\n")), {"y.csv: line 3: 'M", "UTF-8"});
  check_holds(r.refused("[0, 1]", "y.json"), {"y.json: JSON is not read", "one a line"});
}

TEST_CASE("text: columns, their separators and quotes") {
  reading const r;
  auto const four = [](std::string const& s, std::string const& a, std::string const& b) {
    return three_times("x" + s + a + "\n" + "y" + s + b + "\n" + "x" + s + a + "\n" + "z" + s + b +
                       "\n");
  };
  for (std::string const s : {",", ";", "\t", " , ", "\t "}) {
    CAPTURE(s);
    CHECK(r.of_text("token" + s + "label\n" + four(s, "0", "1")).names == texts{"0", "1"});
    CHECK(r.of_text("token" + s + "\"LABEL\"\r\n" + four(s, "A B", "C")).names ==
          texts{"A B", "C"});
  }
  CHECK(r.of_text("to,ken\tlabel\n" + four("\t", "a,b", "c;d")).names == texts{"a,b", "c;d"});
  CHECK(r.of_text("label\n" + three_times("a,b\nc\na,b\nc\n"), "y.tsv").names == texts{"a,b", "c"});
  CHECK(r.of_text("token,label\n" + four(",", "\"a,\"\"b\"\"\"", "\"c\nd\"")).names ==
        texts{"a,\"b\"", "c\nd"});
  CHECK(r.of_text("token,label\n" + four(",", "5\" disk", "c")).names == texts{"5\" disk", "c"});
  check_holds(r.refused("a;b,c\n0;1\n"), {"y.csv: line 1: commas and semicolons"});
  check_holds(r.refused("token,label\nx,0\nx\n"), {"y.csv: line 3: 1 value where there were 2"});
  check_holds(r.refused("0\n1,2\n"), {"y.csv: line 2: 2 values where there was 1", "quotes"});
  check_holds(r.refused("0\n\"1\n2\n"), {"y.csv: line 2: a quote that is not closed"});
  check_holds(r.refused("0\n\"1\"2\n"), {"y.csv: line 2: text after a closing quote"});
  // A line's number counts lines within quotes.
  check_holds(r.refused("token,label\n\"a\nb\",0\nx\n"), {"y.csv: line 4: 1 value"});
  check_holds(r.refused("0 1 0 1\n"), {"y.csv: line 1: '0 1 0 1': several numbers"});
}

TEST_CASE("text: which column, and what is a heading") {
  reading r;
  std::string const numbers = three_times("0\n1\n0\n1\n"), words = three_times("B\nI\nB\nI\n");
  for (std::string const name : {"label", "LABEL", "Labels", "class", "Target", "\"category\""}) {
    CAPTURE(name);
    CHECK(r.of_text(name + "\n" + numbers).names == texts{"0", "1"});
    CHECK(r.of_text(name + "\n" + words).names == texts{"B", "I"});
    CHECK(!r.of_text(name + "\n" + words).read.heading.empty());
  }
  // Another word is never taken for a heading without a word about it.
  for (std::string const name : {"Klasse", "O", "#", "--", "0x1", "1_000", "# label"}) {
    CAPTURE(name);
    r.asked.label_column.clear();
    std::string const why = r.refused(name + "\n" + numbers);
    check_holds(why, {"y.csv: line 1: '" + name + "' is a word", "--label-column"});
    r.asked.label_column = name;
    CHECK(r.of_text(name + "\n" + numbers).names == texts{"0", "1"});
  }
  r.asked.label_column.clear();
  check_holds(r.refused("0\nO\n0\n"),
              {"y.csv: line 2: 'O' is a word, '0' in line 1 a number", "--ignore-label O"});
  r.asked.ignore_labels = {"O"};
  CHECK(r.used(r.of_text(three_times("0\nO\n1\n0\n"))).left_out == 3);
  r.asked.ignore_labels.clear();
  check_holds(r.refused("Wort\n" + words), {"13 labels for 12 tokens", "--label-column Wort"});
  r.asked.label_column = "wort";
  CHECK(std::ssize(r.of_text("Wort\n" + words).of_token) == tokens);
  r.asked.label_column.clear();
  check_holds(r.refused("0\n" + numbers), {"13 labels for 12 tokens", "line 1", "call it label"});
  check_holds(r.refused("class\nI\n" + words.substr(4)),
              {"11 labels for 12 tokens", "line 1 ('class')"});
  CHECK(std::ssize(r.of_text("label\nclass\nI\n" + words.substr(4)).of_token) == tokens);

  std::string const table = three_times("0,x,5\n1,y,6\n0,z,5\n1,x,6\n");
  check_holds(r.refused("a,b,c\n" + table),
              {"y.csv: line 1: 3 columns, none called label", "--label-column"});
  check_holds(r.refused(table), {"y.csv: line 1: 3 columns"});
  check_holds(r.refused("class,b,target\n" + table), {"'class', 'target'", "--label-column"});
  CHECK(r.of_text("class,b,label\n" + table).names == texts{"5", "6"});
  for (auto const& [column, first] : {std::pair{"1", "0"}, std::pair{"3", "5"}}) {
    r.asked.label_column = column;
    CHECK(r.of_text(table).names.front() == first);
    CHECK(r.of_text("label,label,label\n" + table).names.front() == first);
  }
  r.asked.label_column = "C";
  CHECK(r.of_text("a,b,c\n" + table).names == texts{"5", "6"});
  CHECK(r.of_text("c,b,C\n" + table).names == texts{"5", "6"});
  check_holds(r.refused("a,b,d\n" + table), {"no column called 'C'", "'a', 'b', 'd'"});
  r.asked.label_column = "4";
  check_holds(r.refused(table), {"no column 4, there are 3"});
  r.asked.label_column = "0";
  check_holds(r.refused(table), {"no column 0"});
}

TEST_CASE("text: what is no label") {
  reading const r;
  for (std::string const cell : {"1.5", "1e-1", "0.1e0", "-0.5"}) {
    CAPTURE(cell);
    check_holds(r.refused("0\n" + cell + "\n"), {"y.csv: line 2: '" + cell + "'", "integer"});
  }
  for (std::string const cell : {"99999999999999999999", "-9223372036854775809"})
    check_holds(r.refused("0\n" + cell + "\n"), {"y.csv: line 2: '" + cell + "'", "64 bits"});
  check_holds(r.refused("0\n1e999999999999\n"), {"y.csv: line 2", "integer"});
  check_holds(r.refused(std::string(1000, 'a') + "\nb\n"),
              {"line 1: 'aaaa", "aa…'", "1000 bytes, more than 256"});
  std::string different, hostile;
  for (int i = 0; i < tokens; ++i) different += std::to_string(i * 7) + "\n";
  check_holds(r.refused(different), {"12 classes of the 12 tokens", "bins"});
  check_holds(r.refused(three_times("3\n3\n3\n3\n")), {"1 class ('3')", "at least 2"});
  check_holds(r.refused(three_times("a\x1b[31m\na\x1b[31m\na\x1b[31m\na\x1b[31m\n")),
              {"1 class ('a?[31m')"});
}

// ---- arrays -------------------------------------------------------------------------------------

TEST_CASE("arrays: integers, booleans and whole floats") {
  reading const r;
  auto const names = [&](auto const& values, std::vector<std::ptrdiff_t> shape = {tokens}) {
    rflow::write_npy(r.work.path / "y.npy", values, std::move(shape));
    return r.read("y.npy").names;
  };
  std::vector<std::int64_t> const four{3, -3, 7, 3, 3, -3, 7, 3, 3, -3, 7, 3};
  auto const as = [&]<class T>(T) { return std::vector<T>(four.begin(), four.end()); };
  CHECK(names(four) == texts{"-3", "3", "7"});
  CHECK(names(as(std::int8_t{})) == texts{"-3", "3", "7"});
  CHECK(names(as(0.0)) == texts{"-3", "3", "7"});
  CHECK(names(as(0.f)) == texts{"-3", "3", "7"});
  for (std::vector<std::ptrdiff_t> shape :
       {std::vector<std::ptrdiff_t>{tokens, 1}, {1, tokens}, {3, 4}, {4, 3}, {2, 3, 2}}) {
    CAPTURE(shape.size());
    CHECK(names(four, shape) == texts{"-3", "3", "7"});
    CHECK(r.read("y.npy").of_token ==
          r.of_text("3\n-3\n7\n3\n3\n-3\n7\n3\n3\n-3\n7\n3\n").of_token);
  }
  put(r.work, "b.npy", npy_strings("|b1", "12,", std::string("\0\1\0\1\0\1\0\1\0\1\0\1", 12)));
  CHECK(r.read("b.npy").names == texts{"False", "True"});
  std::vector<std::uint64_t> large(tokens, 1);
  large[3] = 18446744073709551615u;
  rflow::write_npy(r.work.path / "y.npy", large, {tokens});
  check_holds(r.error([&] { r.read("y.npy"); }), {"y.npy: token 3", "64 bits"});
  std::vector<float> real(tokens, 1);
  real[2] = 0.5f;
  rflow::write_npy(r.work.path / "y.npy", real, {tokens});
  check_holds(r.error([&] { r.read("y.npy"); }), {"y.npy: token 2: '0.5'", "integer expected"});
  real[2] = 16777218.f;
  rflow::write_npy(r.work.path / "y.npy", real, {tokens});
  check_holds(r.error([&] { r.read("y.npy"); }), {"y.npy: token 2: ", "f32", "integers"});
  real[2] = std::numeric_limits<float>::infinity();
  rflow::write_npy(r.work.path / "y.npy", real, {tokens});
  check_holds(r.error([&] { r.read("y.npy"); }), {"y.npy: token 2: "});
  real[2] = std::numeric_limits<float>::quiet_NaN();
  real[5] = 2;
  rflow::write_npy(r.work.path / "y.npy", real, {tokens});
  check_holds(r.error([&] { r.used(r.read("y.npy")); }),
              {"y.npy: token 2: ", "missing", "--ignore-label nan"});
  put(r.work, "o.npy", npy_strings("|O", "12,", "xyz"));
  check_holds(r.error([&] { r.read("o.npy"); }), {"o.npy: ", "pickle", "astype(str)"});
}

TEST_CASE("arrays: rows with one 1 name a class, and nothing else does") {
  reading const r;
  std::vector<float> x(tokens * 3);
  for (std::size_t i = 0; i < tokens; ++i) x[3 * i + (i % 2 == 0 ? 0 : 2)] = 1;
  auto const write = [&] { rflow::write_npy(r.work.path / "y.npy", x, {tokens, 3}); };
  write();
  report::probe_labels const p = r.used(r.read("y.npy"));
  CHECK(p.names == texts{"0", "2"});
  CHECK(p.tokens == std::vector<std::ptrdiff_t>{6, 6});
  x[3 * 4 + 1] = 1;
  write();
  check_holds(r.error([&] { r.read("y.npy"); }), {"y.npy: token 4: 2 ones among its 3 values"});
  x[3 * 4 + 1] = 0.25f;
  write();
  check_holds(r.error([&] { r.read("y.npy"); }), {"y.npy: token 4: 0.25", "argmax"});
  x[3 * 4 + 1] = x[3 * 4] = 0;
  write();
  check_holds(r.error([&] { r.used(r.read("y.npy")); }),
              {"y.npy: token 4: ''", "--ignore-label ''"});
}

TEST_CASE("arrays of a batch have the axes of the capture's") {
  reading r;
  std::vector<float> const site(tokens * width, 0.5f);
  std::vector<rflow::tensor> sites;
  for (char const* const name : {"embed", "block.1"})
    sites.push_back(rflow::as_tensor(name, site, {2, tokens / 2, width}));
  rflow::write_safetensors(r.work.path / "x.safetensors", sites);
  std::vector<std::int64_t> y(tokens);
  for (std::size_t i = 0; i < tokens; ++i) y[i] = i % 3 == 0 ? 1 : 0;
  rflow::write_npy(r.work.path / "y.npy", y, {2, tokens / 2});
  CHECK(r.used(r.read("y.npy")).tokens == std::vector<std::ptrdiff_t>{8, 4});
  rflow::write_npy(r.work.path / "y.npy", y, {tokens});
  CHECK(r.used(r.read("y.npy")).tokens == std::vector<std::ptrdiff_t>{8, 4});
  rflow::write_npy(r.work.path / "y.npy", y, {tokens / 2, 2});
  check_holds(r.error([&] { r.read("y.npy"); }),
              {"the axes 2 x 6 of the capture expected", "[6, 2]"});
  std::vector<float> one_hot(tokens * 2);
  for (std::size_t i = 0; i < tokens; ++i) one_hot[2 * i + i % 2] = 1;
  rflow::write_npy(r.work.path / "y.npy", one_hot, {2, tokens / 2, 2});
  CHECK(r.used(r.read("y.npy")).tokens == std::vector<std::ptrdiff_t>{6, 6});
  rflow::write_npy(r.work.path / "y.npy", one_hot, {tokens / 2, 2, 2});
  check_holds(r.error([&] { r.read("y.npy"); }), {"2 x 6 of the capture", "[6, 2, 2]"});
}

TEST_CASE("arrays: NumPy's strings") {
  reading const r;
  std::vector<std::u32string> words;
  std::string bytes;
  for (std::size_t i = 0; i < tokens; ++i) {
    words.push_back(i % 2 == 0 ? U"VERB" : U"\u00e4\U0001f600");
    bytes += i % 2 == 0 ? std::string("one", 3) : std::string("no\0", 3);
  }
  put(r.work, "u.npy", npy_strings("<U5", "12,", code_points(words, 5)));
  CHECK(r.read("u.npy").names == texts{"VERB", "\xc3\xa4\xf0\x9f\x98\x80"});
  put(r.work, "s.npy", npy_strings("|S3", "3, 4", bytes));
  CHECK(r.read("s.npy").names == texts{"no", "one"});
  words[3] = U"a\xd800";
  put(r.work, "u.npy", npy_strings("<U5", "12,", code_points(words, 5)));
  check_holds(r.error([&] { r.read("u.npy"); }), {"u.npy: token 3", "UTF-8"});
  // What a hostile header says is believed no further than the file reaches.
  for (std::string const shape :
       {"13,", "4611686018427387904, 4", "99999999999999999999,", "-1,"}) {
    put(r.work, "u.npy", npy_strings("<U5", shape, code_points(words, 5)));
    check_holds(r.error([&] { r.read("u.npy"); }), {"u.npy: "});
  }
  put(r.work, "u.npy", npy_strings("<U0", "9000000000000000000,", ""));
  check_holds(r.error([&] { r.read("u.npy"); }), {"u.npy: "});
  put(r.work, "u.npy", npy_strings(">U5", "12,", code_points(words, 5)));
  check_holds(r.error([&] { r.read("u.npy"); }), {"u.npy: ", "newbyteorder"});
}

TEST_CASE("a tensor of the capture, or of another file, by its name") {
  std::vector<std::int64_t> const y{5, 6, 5, 6, 5, 6, 5, 6, 5, 6, 5, -100};
  std::vector<std::int32_t> const z{1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4};
  rflow::tensor const labels = rflow::as_tensor("labels", y, {tokens}),
                      other = rflow::as_tensor("other", z, {3, 4});
  reading const r({labels, other});
  report::options asked;
  auto const read = [&](std::string const& name) {
    return report::read_labels(name, r.capture(), asked, role::classes);
  };
  CHECK(read("labels").names == texts{"5", "6"});
  CHECK(read("other").names == texts{"1", "2", "3", "4"});
  check_holds(r.error([&] { read("nobody"); }), {"nobody: ", "no tensor of that name"});

  rflow::write_safetensors(r.work / "y.safetensors", std::vector{labels, other});
  CHECK(read(r.work / "y.safetensors").names == texts{"5", "6"});
  asked.label_column = "other";
  CHECK(read(r.work / "y.safetensors").names == texts{"1", "2", "3", "4"});
  asked.label_column = "third";
  check_holds(r.error([&] { read(r.work / "y.safetensors"); }),
              {"y.safetensors: no tensor called 'third'", "--label-column", "'labels', 'other'"});
}

TEST_CASE("labels as many as the tokens that count are told from those of all tokens") {
  reading const r;
  std::string const ten = "0\n1\n0\n1\n0\n1\n0\n1\n0\n1\n";
  report::labelling const l = r.of_text(ten);
  check_holds(r.error([&] { r.used(l, nullptr, 2); }),
              {"y.csv: 10 labels for 12 tokens", "as many as count", "those left out too"});
  CHECK(r.error([&] { r.used(l); }).find("as many as count") == std::string::npos);
  rflow::write_npy(r.work.path / "y.npy", std::vector<int>(10), {5, 2});
  check_holds(r.error([&] { r.used(r.read("y.npy")); }), {"y.npy: 5 x 2 = 10 labels for 12"});
}

// ---- groups -------------------------------------------------------------------------------------

TEST_CASE("groups are read as labels are, but may be words and numbers at once") {
  reading r;
  report::labelling const y = r.of_text(three_times("0\n1\n0\n1\n"));
  auto const groups = [&](std::string const& text) {
    return r.of_text(text, "g.csv", role::groups);
  };
  CHECK(groups(three_times("doc-b\ndoc-a\n1e5\n12\n")).names.size() == 4);
  CHECK(groups(three_times("7\n7.0\n8\n8\n")).names == texts{"7", "8"});
  CHECK(groups("x,Group\n" + three_times("a,1\na,1\nb,2\nb,2\n")).names == texts{"1", "2"});
  CHECK(groups(three_times(std::string(1000, 'a') + "\nb\na\nb\n")).names.size() == 3);
  CHECK(groups(three_times("99999999999999999999\n1\n1\n1.5\n")).names.size() == 3);
  r.asked.group_column = "doc id";
  CHECK(groups("doc id,y\n" + three_times("a,1\na,1\nb,2\nb,2\n")).names == texts{"a", "b"});
  r.asked.group_column.clear();
  check_holds(r.error([&] { groups("x,y\n1,2\n"); }), {"g.csv: line 1", "--group-column"});
  report::labelling const good = groups(three_times("a\nb\nc\nd\n"));
  CHECK(r.used(y, &good).group.size() == tokens);
  report::labelling const hole = groups(three_times("a\nb\n\"\"\nd\n"));
  check_holds(r.error([&] { r.used(y, &hole); }), {"g.csv: line 3: ''", "missing"});
  report::labelling const partly = r.of_text(three_times("0\n1\n-100\n1\n"));
  CHECK(r.used(partly, &hole).left_out == 3);  // what is left out needs no group
  report::labelling const few = groups("a\nb\n");
  check_holds(r.error([&] { r.used(y, &few); }), {"g.csv: 2 groups for 12 tokens"});
}

// ---- the program --------------------------------------------------------------------------------

TEST_CASE("the program: what is left out of the probes is in every other metric") {
  folder const work;
  write_capture(work);
  std::vector<std::int64_t> y{0, 1, -100, 1, 0, 1, 0, -1, 0, 1, 0, 1};
  rflow::write_npy(work.path / "y.npy", y, {tokens});
  auto const run = [&](texts more) {
    texts arguments{"x.safetensors", "--no-plots", "-o", "r", "--force"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    outcome const o = program::run(RFLOW_REPORT, work, arguments);
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    return std::pair{json::parse(program::read(work.path / "r/metrics.json")).at("models").at(0),
                     o.out};
  };
  json const plain = run({}).first;
  CHECK(plain.at("probe").is_null());
  auto const [some, said] = run({"--labels", "y.npy", "--ignore-label", "-1"});
  json const probe = some.at("probe");
  CHECK(probe.at("class_names") == json({"0", "1"}));
  CHECK(probe.at("class_tokens") == json({5, 5}));
  CHECK(probe.at("left_out") == 2);
  CHECK(probe.at("labels") == "y.npy");
  CHECK(said.find("2, 10 (2 left out)") != std::string::npos);
  for (auto const& one : plain.items())
    if (one.key() != "probe") CHECK_MESSAGE(some.at(one.key()) == one.value(), one.key());
  std::string const page = program::read(work.path / "r/report.html");
  CHECK(page.find("<b>0</b> 5, <b>1</b> 5") != std::string::npos);
  CHECK(page.find("2 tokens with a label of −100 or of <code>--ignore-label</code> are left out of "
                  "the probes, and only of them") != std::string::npos);

  // The same as probes of the tokens that are left, by themselves.
  rflow::safetensors_file const file(work / "x.safetensors");
  std::vector<std::vector<float>> left(3);
  std::vector<int> classes;
  for (std::size_t i = 0; i < tokens; ++i) {
    if (y[i] < 0) continue;
    classes.push_back(static_cast<int>(y[i]));
    for (std::size_t l = 0; l < 3; ++l) {
      float const* const row =
          file[l == 0 ? "embed" : "block." + std::to_string(l)].elements<float>() + i * width;
      left[l].insert(left[l].end(), row, row + width);
    }
  }
  std::vector<rflow::view<float>> views;
  for (auto const& site : left) views.emplace_back(site.data(), 10, width);
  rflow::layer_probes const expected =
      rflow::probe_layers(rflow::layer_stack<float>(views), classes);
  for (std::size_t l = 0; l < 3; ++l) {
    CHECK(probe.at("loss").at("mean").at("values").at(l).get<double>() ==
          doctest::Approx(expected.layers[l].validation_loss.mean.value).epsilon(1e-5));
    CHECK(probe.at("train_loss").at("mean").at("values").at(l).get<double>() ==
          doctest::Approx(expected.layers[l].train_loss.mean.value).epsilon(1e-5));
  }
  // −1 is a class of its own where it is not named.
  CHECK(run({"--labels", "y.npy", "--probe-epochs", "1"}).first.at("probe").at("class_names") ==
        json({"-1", "0", "1"}));
}

TEST_CASE("the program: labels on the command line, as messages name them") {
  folder const work;
  write_capture(work);
  auto const status = [&](texts more) {
    texts arguments{"x.safetensors",  "--no-plots", "-o",       "r",    "--force", "-q",
                    "--probe-epochs", "1",          "--labels", "y.csv"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    outcome const o = program::run(RFLOW_REPORT, work, arguments);
    CAPTURE(o.err);
    return o.status;
  };
  auto const left_out = [&](texts more) {
    REQUIRE(status(more) == 0);
    json const m = json::parse(program::read(work.path / "r/metrics.json"));
    return m.at("models").at(0).at("probe").at("left_out").get<int>();
  };
  put(work, "y.csv", three_times("\"\"\nb\nb\na\n"));
  CHECK(status({}) == 1);
  CHECK(left_out({"--ignore-label", ""}) == 3);
  put(work, "y.csv", three_times("[CLS]\n--\nb\na\n"));
  CHECK(left_out({"--ignore-label", "[CLS]"}) == 3);
  CHECK(left_out({"--ignore-label=--"}) == 3);
  CHECK(left_out({"--ignore-label=--", "--ignore-label", "[CLS]"}) == 6);
  put(work, "y.csv", "--\n" + three_times("1\n-1\n2\n2\n"));
  CHECK(left_out({"--label-column=--", "--ignore-label", "-1"}) == 3);
  CHECK(left_out({"--label-column=--", "--ignore-label=-1.0"}) == 3);
  put(work, "y.csv", three_times("<b>&\n<b>&\na\"\x1b\na\"\x1b\n"));
  CHECK(left_out({}) == 0);
  std::string const page = program::read(work.path / "r/report.html");
  CHECK(page.find("<b>&lt;b&gt;&amp;</b> 6") != std::string::npos);
  CHECK(page.find("<b>a&quot; </b> 6") != std::string::npos);
  CHECK(page.find('\x1b') == std::string::npos);
}

TEST_CASE("the program: options that need another, and one file for each capture") {
  folder const work;
  write_capture(work);
  put(work, "y.csv", three_times("0\n1\n0\n1\n"));
  put(work, "z.csv", three_times("a\nb\nc\nc\n"));
  auto const refused = [&](texts const& arguments, texts const& why) {
    program::check_refused(RFLOW_REPORT, work, arguments, why);
  };
  for (std::string const option : {"--label-column", "--ignore-label", "--label-groups"})
    refused({"x.safetensors", option, "a"}, {option, "need --labels"});
  refused({"x.safetensors", "--labels", "y.csv", "--group-column", "a"},
          {"--group-column needs --label-groups"});
  refused({"x.safetensors", "--labels", ""}, {"--labels: a name expected"});
  refused({"x.safetensors", "--labels", "y.csv", "--labels", "z.csv"},
          {"--labels: one for all, or one for each", "found 2"});
  auto const names = [&](texts more) {
    texts arguments{"x.safetensors", "x.safetensors", "--no-plots", "-o", "r", "--force", "-q"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    outcome const o = program::run(RFLOW_REPORT, work, arguments);
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    json const m = json::parse(program::read(work.path / "r/metrics.json")).at("models");
    return m.at(0).at("probe").at("class_names").dump() +
           m.at(1).at("probe").at("class_names").dump();
  };
  CHECK(names({"--labels", "y.csv"}) == R"(["0","1"]["0","1"])");
  CHECK(names({"--labels", "y.csv", "--labels", "z.csv"}) == R"(["0","1"]["a","b","c"])");
  // A class that no split can train on is called by its name.
  put(work, "n.csv", "x\nx\ny\ny\nx\nx\ny\ny\nx\nx\nz\nz\n");
  put(work, "g.csv", "1\n1\n2\n2\n3\n3\n4\n4\n5\n5\n6\n6\n");
  refused({"x.safetensors", "--labels", "n.csv", "--label-groups", "g.csv", "--probe-seeds", "40",
           "-o", "s"},
          {"n.csv: class 'z' of 3 has no token to train on", "all are held out"});
}

// ---- shards -------------------------------------------------------------------------------------

TEST_CASE("shards: probes over the tokens of all of them, as over one file") {
  folder const work;
  std::vector<std::ptrdiff_t> const cuts{0, 10, 17, 30};
  std::vector<std::vector<float>> values(3, std::vector<float>(30 * width));
  std::vector<std::int64_t> y, document;
  std::uint32_t state = 3;
  for (std::size_t i = 0; i < 30; ++i) {
    y.push_back(i % 7 == 4 ? -100 : static_cast<std::int64_t>(i % 3) * 5 - 5);
    document.push_back(static_cast<std::int64_t>(i / 3));
    for (auto& site : values)
      for (std::size_t j = 0; j < width; ++j) {
        state = state * 1664525u + 1013904223u;
        site[i * width + j] = static_cast<float>(state >> 8) / 16777216.0f - 0.5f +
                              (j == 0 ? static_cast<float>(i % 3) : 0.f);
      }
  }
  char const* const names[] = {"embed", "block.1", "block.2"};
  auto const write = [&](std::string const& name, std::ptrdiff_t begin, std::ptrdiff_t end,
                         std::vector<rflow::tensor> more = {}) {
    std::vector<std::vector<float>> part;
    for (auto const& site : values)
      part.emplace_back(site.begin() + begin * width, site.begin() + end * width);
    for (std::size_t l = 0; l < 3; ++l)
      more.push_back(rflow::as_tensor(names[l], part[l], {end - begin, width}));
    rflow::write_safetensors(work / name, more);
  };
  write("all.safetensors", 0, 30, {rflow::as_tensor("sequences", cuts, {4})});
  std::string lines, groups;
  for (std::size_t k = 0; k < 3; ++k) {
    std::vector<std::int64_t> const own(y.begin() + cuts[k], y.begin() + cuts[k + 1]);
    std::string const number = std::to_string(k + 1);
    std::string text = "label\n";
    for (std::int64_t const label : own) text += std::to_string(label) + "\n";
    if (k == 1)  // of another kind
      rflow::write_npy(work.path / "y2.npy", own, {7});
    else
      put(work, "y" + number + ".csv", text);
    rflow::tensor const labels = rflow::as_tensor("y", own, {cuts[k + 1] - cuts[k]});
    write("part" + number + ".safetensors", cuts[k], cuts[k + 1], {labels});
  }
  for (std::size_t i = 0; i < 30; ++i) {
    lines += std::to_string(y[i]) + "\n";
    groups += "d" + std::to_string(document[i]) + "\n";
  }
  put(work, "y.csv", lines);
  put(work, "g.csv", groups);

  auto const probe = [&](texts arguments) {
    arguments.insert(arguments.end(),
                     {"--no-plots", "-o", "r", "--force", "-q", "--probe-epochs", "9"});
    outcome const o = program::run(RFLOW_REPORT, work, arguments);
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    json const m = json::parse(program::read(work.path / "r/metrics.json")).at("models").at(0);
    if (!m.at("shards").is_null()) CHECK(m.at("shards").at("files").size() == 3);
    json out = m.at("probe");
    out.erase("labels");
    return out;
  };
  texts const shards{"--shards", "part1.safetensors", "part2.safetensors", "part3.safetensors"};
  auto const in_shards = [&](texts const& more) {
    texts arguments = shards;
    arguments.insert(arguments.end(), more.begin(), more.end());
    return probe(arguments);
  };
  json const one = probe({"all.safetensors", "--labels", "y.csv"});
  CHECK(one.at("class_names") == json({"-5", "0", "5"}));
  CHECK(one.at("left_out") == 4);
  CHECK(in_shards({"--labels", "y.csv"}) == one);
  CHECK(in_shards({"--labels", "y.csv", "--cka", "full"}) == one);
  CHECK(in_shards({"--labels", "y1.csv", "--labels", "y2.npy", "--labels", "y3.csv"}) == one);
  CHECK(in_shards({"--labels", "y"}) == one);
  json const more = probe(
      {"all.safetensors", "--labels", "y.csv", "--label-groups", "g.csv", "--skip-first", "2"});
  CHECK(more != one);
  CHECK(in_shards({"--labels", "y", "--label-groups", "g.csv", "--skip-first", "2"}) == more);

  auto const refused = [&](texts const& more_arguments, texts const& why) {
    texts arguments = shards;
    arguments.insert(arguments.end(), more_arguments.begin(), more_arguments.end());
    fs::remove_all(work.path / "r");
    program::check_refused(RFLOW_REPORT, work, arguments, why);
  };
  refused({"--labels", "y1.csv"}, {"y1.csv: 10 labels for 30 tokens in 3 shards"});
  refused({"--labels", "y1.csv", "--labels", "y3.csv", "--labels", "y3.csv"},
          {"y3.csv: 13 labels for 7 tokens in part2.safetensors"});
  refused({"--labels", "y1.csv", "--labels", "y2.npy"}, {"--labels: one for all", "found 2"});
  put(work, "y3.csv", "label\n0\nNaN\n5\n0\n5\n0\n5\n0\n5\n0\n5\n0\n5\n");
  refused({"--labels", "y1.csv", "--labels", "y2.npy", "--labels", "y3.csv"},
          {"y1.csv and 2 more: y3.csv, line 3: 'NaN'", "--ignore-label NaN"});
}
