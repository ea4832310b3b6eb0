// SPDX-License-Identifier: Apache-2.0
#include "cells.hpp"

#include <rflow/safetensors.hpp>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <new>
#include <optional>
#include <system_error>
#include <utility>

#include "text.hpp"

namespace report {
namespace {

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

std::string_view trimmed(std::string_view text) {
  auto const blank = [](char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; };
  while (!text.empty() && blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && blank(text.back())) text.remove_suffix(1);
  return text;
}

/// Collects cells, each distinct one once.
class collector {
 public:
  explicit collector(cells& to) : to_(to) {}

  void add(std::string_view cell) {
    cell = trimmed(cell);
    auto found = places_.find(cell);
    if (found == places_.end()) {
      if (utf8(cell) != cell)
        throw unusable(to_.source, at() + in_quotes(cell) + " is not UTF-8: save it as UTF-8");
      found = places_.emplace(std::string(cell), to_.distinct.size()).first;
      to_.distinct.emplace_back(cell);
    }
    to_.of_token.push_back(found->second);
  }

 private:
  std::string at() const { return to_.place(to_.of_token.size()) + ": "; }

  cells& to_;
  std::map<std::string, std::size_t, std::less<>> places_;
};

// ---- text ---------------------------------------------------------------------------------------

/// Lines of text with cells, which may stand in quotes (RFC 4180). Blank lines are passed over.
class records {
 public:
  records(std::string const& file, std::string_view text, char separator)
      : file_(file), text_(text), separator_(separator) {}

  bool next(std::vector<std::string>& to) {
    for (std::ptrdiff_t blank = 0; at_ < text_.size(); ++blank) {
      begin_ = line_;
      to.clear();
      bool quoted = false;
      while (read_cell(to, quoted)) continue;
      if (to.size() > 1 || quoted || !to.front().empty()) {
        blank_ += blank;
        return true;
      }
    }
    return false;
  }

  std::size_t line() const { return begin_; }  ///< where the last one began
  std::ptrdiff_t blank() const { return blank_; }

 private:
  bool is_blank(char c) const { return c == ' ' || (c == '\t' && separator_ != '\t'); }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\n'; }
  bool at_end() const { return peek() == '\n' || peek() == '\r'; }

  void end_line() {
    if (at_ < text_.size() && text_[at_] == '\r') ++at_;
    if (at_ < text_.size() && text_[at_] == '\n') ++at_;
    ++line_;
  }

  /// Whether there is another cell in this line.
  bool read_cell(std::vector<std::string>& to, bool& quoted) {
    while (is_blank(peek())) ++at_;
    std::string cell;
    if (peek() == '"') {
      quoted = true;
      read_quoted(cell);
      while (is_blank(peek())) ++at_;
      if (!at_end() && peek() != separator_)
        throw unusable(file_, "line " + std::to_string(line_) +
                                  ": text after a closing quote (a quote within quotes is "
                                  "written twice)");
    } else {
      std::size_t const start = at_;
      while (!at_end() && peek() != separator_) ++at_;
      cell = text_.substr(start, at_ - start);
    }
    to.emplace_back(trimmed(cell));
    if (at_end()) {
      end_line();
      return false;
    }
    ++at_;
    return true;
  }

  void read_quoted(std::string& cell) {
    std::size_t const opened = line_;
    for (++at_;; ++at_) {
      if (at_ >= text_.size())
        throw unusable(file_, "line " + std::to_string(opened) +
                                  ": a quote that is not closed (a quote that is meant as such is "
                                  "written \"\"\"\")");
      if (text_[at_] == '"') {
        if (at_ + 1 >= text_.size() || text_[at_ + 1] != '"') break;
        ++at_;
      } else if (text_[at_] == '\n') {
        ++line_;
      }
      cell += text_[at_];
    }
    ++at_;
  }

  std::string const& file_;
  std::string_view text_;
  char separator_;
  std::size_t at_ = 0, line_ = 1, begin_ = 1;
  std::ptrdiff_t blank_ = 0;
};

/// What stands between columns: tab, comma or semicolon, whichever the first line has.
char separator_of(std::string const& file, std::string_view text) {
  if (lower(std::filesystem::path(file).extension().string()) == ".tsv") return '\t';
  bool tab = false, comma = false, semicolon = false, quoted = false, anything = false;
  for (char const c : text) {
    if (c == '"') quoted = !quoted;
    if (quoted) continue;
    if ((c == '\n' || c == '\r') && anything) break;
    anything = anything || (c != '\n' && c != '\r' && c != ' ');
    tab = tab || c == '\t';
    comma = comma || c == ',';
    semicolon = semicolon || c == ';';
  }
  if (tab) return '\t';
  if (comma && semicolon)
    throw unusable(file,
                   "line 1: commas and semicolons; quote cells (\"…\") that hold the one that does "
                   "not separate columns");
  return semicolon ? ';' : ',';
}

std::string listed(std::vector<std::string> const& names) {
  std::string out;
  for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 8); ++i)
    join(out, ", ", in_quotes(names[i]));
  return out + (names.size() > 8 ? ", …" : "");
}

bool is_usual(column const& which, std::string const& name) {
  return std::find(which.usual.begin(), which.usual.end(), lower(name)) != which.usual.end();
}

/// The place of the column, given line 1, and whether that line holds names.
std::pair<std::size_t, bool> column_of(std::string const& file, std::string const& line,
                                       std::vector<std::string> const& first, column const& which) {
  std::string const& asked = which.asked;
  auto const matching = [&](auto const& matches) {
    std::vector<std::size_t> out;
    for (std::size_t k = 0; k < first.size(); ++k)
      if (matches(first[k])) out.push_back(k);
    return out;
  };
  auto const several = [&](std::vector<std::size_t> const& found) {
    std::vector<std::string> names, numbers;
    for (std::size_t const k : found) names.push_back(first[k]);
    return unusable(file, line + "columns " + listed(names) + " may be meant; " + which.option +
                              " says which, by a name of its own or a number such as " +
                              std::to_string(found[0] + 1));
  };
  if (!asked.empty() && asked.find_first_not_of("0123456789") == std::string::npos) {
    std::size_t number = 0;
    auto const [end, error] = std::from_chars(asked.data(), asked.data() + asked.size(), number);
    if (error != std::errc{} || number < 1 || number > first.size())
      throw unusable(file, line + "no column " + asked + ", there " +
                               (first.size() == 1 ? "is 1" : "are ") +
                               (first.size() == 1 ? "" : std::to_string(first.size())));
    return {number - 1, is_usual(which, first[number - 1])};
  }
  if (!asked.empty()) {
    auto found = matching([&](std::string const& name) { return name == asked; });
    if (found.empty())
      found = matching([&](std::string const& name) { return lower(name) == lower(asked); });
    if (found.empty())
      throw unusable(file, line + "no column called " + in_quotes(asked) + ", there " +
                               (first.size() == 1 ? "is " : "are ") + listed(first));
    if (found.size() > 1) throw several(found);
    return {found[0], true};
  }
  auto found =
      matching([&](std::string const& name) { return lower(name) == which.usual.front(); });
  if (found.empty())
    found = matching([&](std::string const& name) { return is_usual(which, name); });
  if (found.size() > 1) throw several(found);
  if (found.size() == 1) return {found[0], true};
  if (first.size() > 1)
    throw unusable(file, line + plural(std::ssize(first), "column") + ", none called " +
                             std::string(which.usual.front()) + "; " + which.option +
                             " says which, by its name in this line or by its number");
  return {0, false};
}

void read_text(std::string_view text, column const& which, cells& out) {
  std::string const& file = out.source;
  if (constexpr std::string_view mark = "\xef\xbb\xbf"; text.starts_with(mark))
    text.remove_prefix(mark.size());  // some editors begin UTF-8 so
  if (text.starts_with("\xff\xfe") || text.starts_with("\xfe\xff"))
    throw unusable(file, "text in UTF-16: save it as UTF-8");
  if (text.find('\0') != std::string_view::npos)
    throw unusable(file,
                   "neither text nor .npy: save labels with numpy.save, or as text, one a line");
  if (std::string const kind = lower(std::filesystem::path(file).extension().string());
      kind == ".json" || kind == ".jsonl")
    throw unusable(file, "JSON is not read: save labels as text, one a line");

  records lines(file, text, separator_of(file, text));
  std::vector<std::string> row;
  collector to(out);
  std::size_t columns = 0, chosen = 0;
  while (lines.next(row)) {
    std::string const where = "line " + std::to_string(lines.line()) + ": ";
    if (columns == 0) {
      columns = row.size();
      bool heading = false;
      std::tie(chosen, heading) = column_of(file, where, row, which);
      if (heading) {
        out.heading = row[chosen];
        continue;
      }
    }
    if (row.size() != columns)
      throw unusable(file, where + plural(std::ssize(row), "value") + " where there " +
                               (columns == 1 ? "was 1 (a cell with a separator in it needs quotes)"
                                             : "were " + std::to_string(columns)));
    out.lines.push_back(lines.line());
    to.add(row[chosen]);
  }
  out.blank_lines = lines.blank();
}

// ---- arrays -------------------------------------------------------------------------------------

/// Where the i-th element in row-major order lies, in elements.
std::ptrdiff_t offset_of(rflow::tensor const& x, std::ptrdiff_t i) {
  std::ptrdiff_t out = 0;
  for (std::size_t axis = x.shape.size(); axis-- > 0; i /= x.shape[axis])
    out += i % x.shape[axis] * x.strides[axis];
  return out;
}

double real_at(rflow::tensor const& x, std::ptrdiff_t at) {
  switch (x.type) {
    case rflow::dtype::f16:
      return static_cast<double>(static_cast<float>(x.elements<rflow::f16>()[at]));
    case rflow::dtype::bf16:
      return static_cast<double>(static_cast<float>(x.elements<rflow::bf16>()[at]));
    case rflow::dtype::f32: return static_cast<double>(x.elements<float>()[at]);
    default: return x.elements<double>()[at];
  }
}

/// Above this a floating type lacks some whole numbers, and two labels may have become one.
double exact_to(rflow::dtype type) {
  return type == rflow::dtype::f16    ? 0x1p11
         : type == rflow::dtype::bf16 ? 0x1p8
         : type == rflow::dtype::f32  ? 0x1p24
                                      : 0x1p53;
}

/// The elements in row-major order, as text.
class spelling {
 public:
  spelling(std::string const& source, rflow::tensor const& x) : source_(source), x_(x) {
    using rflow::dtype;
    if (x.type == dtype::u64 || rflow::is_viewable(x.type)) return;
    if (x.type != dtype::boolean && (x.type < dtype::u8 || x.type > dtype::i64))
      throw unusable(source,
                     "integers, booleans, whole numbers as floats, or strings expected, found " +
                         x.description());
    integers_ = x.integers();
  }

  std::string operator()(std::ptrdiff_t i) const {
    if (x_.type == rflow::dtype::boolean)
      return integers_[static_cast<std::size_t>(i)] ? "True" : "False";
    if (!integers_.empty()) return std::to_string(integers_[static_cast<std::size_t>(i)]);
    std::ptrdiff_t const at = offset_of(x_, i);
    if (x_.type == rflow::dtype::u64) return std::to_string(x_.elements<std::uint64_t>()[at]);
    double const value = real_at(x_, at);
    if (std::isnan(value)) return "nan";
    if (std::abs(value) > exact_to(x_.type))
      throw unusable(source_,
                     "token " + std::to_string(i) + ": " + number(value, 17) + " in " +
                         std::string(to_string(x_.type)) +
                         ", which lacks whole numbers of that size: save labels as integers");
    if (value == std::trunc(value)) return std::to_string(static_cast<std::int64_t>(value));
    return number(value, 17);
  }

 private:
  std::string const& source_;
  rflow::tensor const& x_;
  std::vector<std::int64_t> integers_;
};

/// How a capture holds its tokens.
struct token_layout {
  std::ptrdiff_t tokens, batch;
};

void read_array(rflow::tensor const& x, token_layout const& of, cells& out) {
  std::ptrdiff_t const tokens = of.tokens;
  if (x.rank() == 0)
    throw unusable(out.source, "one label a token expected, found " + x.description());
  collector to(out);
  std::ptrdiff_t const count = x.size(), last = x.shape.back();
  bool const by_batch =
      (x.rank() == 2 && count == tokens) || (x.rank() == 3 && last > 0 && count / last == tokens);
  if (of.batch > 1 && by_batch && x.shape[0] != of.batch)
    throw unusable(out.source, "the axes " + std::to_string(of.batch) + " x " +
                                   std::to_string(tokens / of.batch) +
                                   " of the capture expected, found " + x.description());
  for (std::ptrdiff_t const n : x.shape)
    if (x.rank() > 1) join(out.shape, " x ", std::to_string(n));
  if (!out.shape.empty()) out.shape += " = ";
  spelling const text(out.source, x);
  if (x.rank() == 1 || last < 2 || count / last != tokens) {
    for (std::ptrdiff_t i = 0; i < count; ++i) to.add(text(i));
    return;
  }
  for (std::ptrdiff_t token = 0; token < tokens; ++token) {
    std::ptrdiff_t ones = 0, which = 0;
    for (std::ptrdiff_t c = 0; c < last; ++c) {
      std::string const value = text(token * last + c);
      if (value == "1" || value == "True") {
        ++ones, which = c;
      } else if (value != "0" && value != "False") {
        throw unusable(out.source, "token " + std::to_string(token) + ": " + value + " among its " +
                                       std::to_string(last) +
                                       " values, where one 1 and zeros name its class (scores: "
                                       "save x.argmax(-1) instead)");
      }
    }
    if (ones > 1)
      throw unusable(out.source, "token " + std::to_string(token) + ": " + std::to_string(ones) +
                                     " ones among its " + std::to_string(last) +
                                     " values; a token has one class");
    to.add(ones == 0 ? "" : std::to_string(which));
  }
}

/// NumPy's strings, which npy_file does not read: |S7 has bytes, <U7 code points of 32 bits, both with
/// zeros behind. The header is taken only as NumPy writes it.
/// (numpy/lib/format.py, "Format Version 1.0"; numpy.dtype, "Array-protocol type strings")
struct string_array {
  char kind = 'S';
  std::ptrdiff_t width = 0, count = 1;  // characters of a string; strings
  std::vector<std::ptrdiff_t> shape;
  std::string_view data;
};

std::optional<string_array> strings_of(std::string_view file) {
  constexpr std::size_t begin = 10;
  if (file.size() < begin || file.substr(6, 2) != std::string_view("\x01\0", 2))
    return std::nullopt;
  auto const byte = [&](std::size_t i) { return std::size_t{static_cast<unsigned char>(file[i])}; };
  std::size_t const size = byte(8) | byte(9) << 8;
  if (size > file.size() - begin) return std::nullopt;
  std::string_view header = file.substr(begin, size);
  string_array out;
  auto const take = [&](std::string_view text) {
    bool const there = header.starts_with(text);
    if (there) header.remove_prefix(text.size());
    return there;
  };
  auto const take_number = [&](std::ptrdiff_t& n) {
    auto const [end, error] = std::from_chars(header.data(), header.data() + header.size(), n);
    if (error != std::errc{} || n < 0) return false;
    header.remove_prefix(static_cast<std::size_t>(end - header.data()));
    return true;
  };
  if (!take("{'descr': '")) return std::nullopt;
  if (take("<U") || take("=U"))
    out.kind = 'U';
  else if (!take("|S"))
    return std::nullopt;
  if (!take_number(out.width) || !take("', 'fortran_order': False, 'shape': ("))
    return std::nullopt;
  std::ptrdiff_t const item = out.kind == 'U' ? 4 : 1;
  std::ptrdiff_t bytes = item;
  auto const grow = [](std::ptrdiff_t& n, std::ptrdiff_t by) {
    if (by != 0 && n > PTRDIFF_MAX / by) return false;
    n *= by;
    return true;
  };
  if (!grow(bytes, out.width)) return std::nullopt;
  for (std::ptrdiff_t n = 0; take_number(n);) {
    if (!grow(out.count, n) || !grow(bytes, n)) return std::nullopt;
    out.shape.push_back(n);
    if (!take(",")) break;
    take(" ");
  }
  if (out.shape.empty() || !take("), }")) return std::nullopt;
  out.data = file.substr(begin + size);
  // A width of 0 is that of empty strings: nothing is stored, however many there are said to be.
  if (out.width == 0 || std::ssize(out.data) != bytes) return std::nullopt;
  return out;
}

/// A code point as UTF-8; a surrogate or too large a number becomes what is not UTF-8.
void append_code_point(std::uint32_t c, std::string& to) {
  auto const put = [&](std::uint32_t byte) { to += static_cast<char>(byte); };
  if (c < 0x80) return put(c);
  if (c > 0x10ffff) return put(0xff);
  if (c < 0x800) return put(0xc0 | c >> 6), put(0x80 | (c & 0x3f));
  if (c < 0x10000)
    put(0xe0 | c >> 12);
  else
    put(0xf0 | c >> 18), put(0x80 | (c >> 12 & 0x3f));
  put(0x80 | (c >> 6 & 0x3f));
  put(0x80 | (c & 0x3f));
}

void read_strings(string_array const& x, cells& out) {
  collector to(out);
  for (std::ptrdiff_t const n : x.shape)
    if (x.shape.size() > 1) join(out.shape, " x ", std::to_string(n));
  if (!out.shape.empty()) out.shape += " = ";
  std::size_t const item = x.kind == 'U' ? 4 : 1, width = static_cast<std::size_t>(x.width) * item;
  for (std::size_t i = 0; i < static_cast<std::size_t>(x.count); ++i) {
    std::string_view const one = x.data.substr(i * width, width);
    std::string text;
    if (x.kind == 'S') {
      text = one;
    } else {
      for (std::size_t k = 0; k < width; k += 4) {
        std::uint32_t c = 0;
        std::memcpy(&c, one.data() + k, 4);
        append_code_point(c, text);
      }
    }
    text.resize(text.find_last_not_of('\0') + 1);
    to.add(text);
  }
}

void read_npy(rflow::mapped_file file, std::string_view bytes, token_layout const& of, cells& out) {
  if (auto const strings = strings_of(bytes)) return read_strings(*strings, out);
  try {
    rflow::npy_file const array(std::move(file));
    read_array(array.array(), of, out);
  } catch (rflow::format_error const& error) {
    std::string why = reason_of(error, out.source);
    if (why.find("Python objects") != std::string::npos) why += "; save labels.astype(str) instead";
    throw unusable(out.source, why);
  }
}

// ---- where they are -----------------------------------------------------------------------------

void read_safetensors(rflow::mapped_file file, token_layout const& of, column const& which,
                      cells& out) {
  rflow::safetensors_file const tensors(std::move(file));
  std::vector<std::string> const names = tensors.names();
  std::string name = which.asked;
  if (name.empty())
    for (std::string_view const usual : which.usual)
      if (name.empty() && tensors.contains(usual)) name = usual;
  if (name.empty() && names.size() == 1) name = names.front();
  if (name.empty() || !tensors.contains(name))
    throw unusable(out.source, "no tensor called " +
                                   in_quotes(name.empty() ? which.usual[0] : name) + "; " +
                                   which.option + " says which of " + listed(names));
  read_array(tensors[name], of, out);
}

}  // namespace

std::string in_quotes(std::string_view cell) {
  std::string text = utf8(cell.substr(0, 40));
  return "'" + one_line(text) + (cell.size() > 40 ? "…'" : "'");
}

std::string cells::place(std::size_t token) const {
  std::string out;
  std::size_t begin = 0;
  for (part const& one : parts)
    if (one.begin <= token) out = one.source + ", ", begin = one.begin;
  return out + (lines.empty() || lines[token] == 0 ? "token " + std::to_string(token - begin)
                                                   : "line " + std::to_string(lines[token]));
}

cells joined(std::vector<cells> const& files) {
  if (files.size() == 1) return files.front();
  cells out;
  out.source = files.front().source + " and " + std::to_string(files.size() - 1) + " more";
  out.heading = files.front().heading;
  std::map<std::string_view, std::size_t> places;
  for (cells const& file : files) {
    out.parts.push_back({file.source, out.of_token.size()});
    std::vector<std::size_t> here;  // places of its distinct cells in all
    for (std::string const& cell : file.distinct) {
      auto const [found, added] = places.emplace(cell, out.distinct.size());
      if (added) out.distinct.push_back(cell);
      here.push_back(found->second);
    }
    for (std::size_t const k : file.of_token) out.of_token.push_back(here[k]);
    out.lines.insert(out.lines.end(), file.lines.begin(), file.lines.end());
    out.lines.resize(out.of_token.size());
    out.blank_lines += file.blank_lines;
  }
  return out;
}

bool is_tensor(std::string const& named, capture const& c) { return c.tensor(named).has_value(); }

cells read_cells(std::string const& named, capture const& c, std::ptrdiff_t tokens,
                 column const& which) {
  cells out;
  out.source = named;
  std::ptrdiff_t const rows = std::ssize(c.sites.sequences) - 1;  // a batch axis, if there was one
  token_layout const of{tokens, rows > 0 && tokens == c.sites.tokens() ? rows : 1};
  std::error_code ignored;
  bool const is_file =
      std::filesystem::exists(named, ignored) && !std::filesystem::is_directory(named, ignored);
  try {
    if (auto const tensor = c.tensor(named)) {
      if (is_file)
        throw unusable(named,
                       "a file, and a tensor of " + c.path + " too; ./" + named + " is the file");
      out.source = c.path + ": " + in_quotes(named);
      read_array(*tensor, of, out);
      return out;
    }
    rflow::mapped_file file(named);
    std::string_view const bytes{reinterpret_cast<char const*>(file.bytes().data()),
                                 file.bytes().size()};
    std::string const kind = lower(std::filesystem::path(named).extension().string());
    if (bytes.starts_with("\x93NUMPY") || kind == ".npy")
      read_npy(std::move(file), bytes, of, out);
    else if (kind == ".safetensors")
      read_safetensors(std::move(file), of, which, out);
    else
      read_text(bytes, which, out);
    return out;
  } catch (unusable const&) {
    throw;
  } catch (std::bad_alloc const&) {
    throw;
  } catch (std::system_error const& error) {
    bool const missing = error.code() == std::errc::no_such_file_or_directory;
    throw unusable(named, reason_of(error, named) +
                              (missing ? ", and " + c.path + " has no tensor of that name" : ""));
  } catch (std::exception const& error) {
    throw unusable(out.source, reason_of(error, named));
  }
}

}  // namespace report
