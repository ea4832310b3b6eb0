// SPDX-License-Identifier: Apache-2.0
#include "labels.hpp"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <map>
#include <optional>
#include <string_view>
#include <system_error>

#include "text.hpp"

namespace report {
namespace {

/// What cells are.
struct meaning {
  enum { left_out, missing, word, number } kind = word;
  std::int64_t value = 0;  // of a number
};

/// A cell in decimal digits, with or without a point and a power of ten.
struct decimal {
  bool is_number = false;
  std::optional<std::int64_t> whole;  // its value, exactly, if that is whole and fits
};

decimal decimal_of(std::string_view text) {
  auto const digit = [&] { return !text.empty() && text.front() >= '0' && text.front() <= '9'; };
  auto const take = [&](char c) {
    bool const there = !text.empty() && text.front() == c;
    if (there) text.remove_prefix(1);
    return there;
  };
  bool const negative = take('-');
  if (!negative) take('+');
  std::string digits;
  std::ptrdiff_t power = 0, seen = 0;
  for (; digit(); text.remove_prefix(1), ++seen) digits += text.front();
  if (take('.'))
    for (; digit(); text.remove_prefix(1), ++seen, --power) digits += text.front();
  if (seen == 0) return {};
  if (take('e') || take('E')) {
    bool const below = take('-');
    if (!below) take('+');
    if (!digit()) return {};
    std::ptrdiff_t e = 0;
    for (; digit(); text.remove_prefix(1))
      e = std::min<std::ptrdiff_t>(10 * e + (text.front() - '0'), 1 << 30);
    power += below ? -e : e;
  }
  if (!text.empty()) return {};
  digits.erase(0, digits.find_first_not_of('0'));
  if (digits.empty()) return {true, 0};
  for (; power < 0 && !digits.empty() && digits.back() == '0'; ++power) digits.pop_back();
  if (power < 0 || power + std::ssize(digits) > 19) return {true, std::nullopt};
  digits.append(static_cast<std::size_t>(power), '0');
  if (negative) digits.insert(0, 1, '-');
  std::int64_t value = 0;
  auto const [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc{}) return {true, std::nullopt};
  return {true, value};
}

bool is_nan(std::string_view cell) {
  constexpr std::string_view spellings[] = {"nan", "NaN", "NAN", "-nan", "-NaN"};
  return std::find(std::begin(spellings), std::end(spellings), cell) != std::end(spellings);
}

/// Whether a cell says that there is no value, as pandas and NumPy write it.
bool is_missing(std::string_view cell) {
  constexpr std::string_view spellings[] = {"",     "NA",   "N/A",  "n/a",  "#N/A",
                                            "<NA>", "None", "NULL", "null", "NaT"};
  return is_nan(cell) ||
         std::find(std::begin(spellings), std::end(spellings), cell) != std::end(spellings);
}

/// Whether two cells are one: as they are written, or by value.
bool same(std::string_view a, std::string_view b) {
  if (a == b || (is_nan(a) && is_nan(b))) return true;
  auto const x = decimal_of(a).whole, y = decimal_of(b).whole;
  return x && y && *x == *y;
}

/// "--ignore-label NOUN": an option with a cell, as a shell takes it; without the cell if that would be
/// long or garbled.
std::string option_with(std::string const& option, std::string const& cell) {
  auto const control = [](char c) { return static_cast<unsigned char>(c) < ' ' || c == '\x7f'; };
  if (cell.size() > 40 || std::any_of(cell.begin(), cell.end(), control)) return option;
  auto const plain = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
           static_cast<unsigned char>(c) >= 0x80 || std::string_view("-_.+/:").find(c) < 6;
  };
  std::string text;
  for (char const c : cell) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  if (cell.empty() || !std::all_of(cell.begin(), cell.end(), plain)) text = "'" + text + "'";
  return option + (cell.starts_with('-') ? "=" : " ") + text;
}

/// Whether a cell is several numbers with white space between.
bool several_numbers(std::string_view cell) {
  std::size_t count = 0;
  while (!cell.empty()) {
    std::size_t const end = std::min(cell.find_first_of(" \t"), cell.size());
    if (end > 0 && !decimal_of(cell.substr(0, end)).is_number) return false;
    count += end > 0;
    cell.remove_prefix(std::min(end + 1, cell.size()));
  }
  return count > 1;
}

constexpr std::size_t longest_name = 256;

/// Cells into places in `names`.
class reader {
 public:
  reader(labelling& to, options const& asked, role what)
      : to_(to), what_(what), option_(what == role::classes ? "--label-column" : "--group-column") {
    std::vector<std::string> const& all = to.read.distinct;
    first_.assign(all.size(), to.read.of_token.size());
    for (std::size_t i = to.read.of_token.size(); i-- > 0;) first_[to.read.of_token[i]] = i;
    if (what == role::classes) ignored_ = asked.ignored_labels();
    std::vector<bool> used(ignored_.size());
    for (std::size_t k = 0; k < all.size(); ++k) cells_.push_back(meaning_of(k, used));
    for (std::size_t i = 0; i < used.size(); ++i)
      if (!used[i] && i < asked.ignore_labels.size())
        to.notes.push_back(to.read.source + ": no token has the label " + in_quotes(ignored_[i]) +
                           " of --ignore-label");
  }

  void read() {
    std::size_t words = 0, numbers = 0, word = 0, number = 0;
    for (std::size_t k = cells_.size(); k-- > 0;) {
      if (cells_[k].kind == meaning::word) ++words, word = k;
      if (cells_[k].kind == meaning::number) ++numbers, number = k;
    }
    bool const mixed = words > 0 && numbers > 0;
    if (mixed && what_ == role::classes) refuse_mixed(words, word, number);
    if (mixed)
      for (meaning& m : cells_)
        if (m.kind == meaning::number) m.kind = meaning::word;
    std::vector<std::int64_t> places(cells_.size(), labelling::left_out);
    for (std::size_t k = 0; k < cells_.size(); ++k)
      if (cells_[k].kind == meaning::missing) places[k] = labelling::missing;
    if (numbers > 0 && !mixed)
      place_numbers(places);
    else
      place_words(places);
    to_.of_token.reserve(to_.read.of_token.size());
    for (std::size_t const k : to_.read.of_token) to_.of_token.push_back(places[k]);
  }

 private:
  std::string const& cell(std::size_t k) const { return to_.read.distinct[k]; }
  std::string at(std::size_t k) const { return to_.read.place(first_[k]) + ": "; }
  unusable wrong(std::size_t k, std::string const& why) const {
    return unusable(to_.read.source, at(k) + in_quotes(cell(k)) + why);
  }

  meaning meaning_of(std::size_t k, std::vector<bool>& used) const {
    bool left_out = false;
    for (std::size_t i = 0; i < ignored_.size(); ++i)
      if (same(cell(k), ignored_[i])) used[i] = left_out = true;
    if (left_out) return {meaning::left_out};
    if (is_missing(cell(k))) return {meaning::missing};
    decimal const x = decimal_of(cell(k));
    if (x.whole) return {meaning::number, *x.whole};
    if (what_ == role::groups) return {meaning::word};
    if (x.is_number && cell(k).find_first_of(".eE") == std::string::npos)
      throw wrong(k, ": an integer expected that fits 64 bits; write such names as words (c" +
                         std::string("123)"));
    if (x.is_number)
      throw wrong(k,
                  ": an integer expected, or a word; classes are no measurements (put values into "
                  "bins, or write ratings as words)");
    if (several_numbers(cell(k)))
      throw wrong(k,
                  ": several numbers; one label a line expected, or columns with commas, tabs or "
                  "semicolons between");
    if (cell(k).size() > longest_name)
      throw wrong(k, " is a label of " + std::to_string(cell(k).size()) + " bytes, more than " +
                         std::to_string(longest_name) + " (text instead of labels?)");
    return {meaning::word};
  }

  [[noreturn]] void refuse_mixed(std::size_t words, std::size_t word, std::size_t number) const {
    std::string const other = " is a word, " + in_quotes(cell(number)) + " in " +
                              to_.read.place(first_[number]) + " a number";
    if (words == 1 && first_[word] == 0 && to_.read.heading.empty() && !to_.read.lines.empty())
      throw wrong(word,
                  other + "; if it is the column's name: " + option_with(option_, cell(word)));
    throw wrong(word, other + "; " + option_with("--ignore-label", cell(word)) +
                          " leaves its tokens out, classes that are meant need to be all words or "
                          "all numbers");
  }

  void place_numbers(std::vector<std::int64_t>& places) {
    std::map<std::int64_t, std::vector<std::size_t>> values;
    for (std::size_t k = 0; k < cells_.size(); ++k)
      if (cells_[k].kind == meaning::number) values[cells_[k].value].push_back(k);
    bool told = false;
    for (auto const& [value, which] : values) {
      for (std::size_t const k : which) places[k] = std::ssize(to_.names);
      to_.names.push_back(std::to_string(value));
      if (which.size() > 1 && !std::exchange(told, true))
        to_.notes.push_back(to_.read.source + ": " + in_quotes(cell(which[0])) + " (" +
                            to_.read.place(first_[which[0]]) + ") and " +
                            in_quotes(cell(which[1])) + " (" + to_.read.place(first_[which[1]]) +
                            ") are the same number, so the same " +
                            (what_ == role::classes ? "class" : "group"));
    }
  }

  void place_words(std::vector<std::int64_t>& places) {
    std::map<std::string_view, std::size_t> words;
    for (std::size_t k = 0; k < cells_.size(); ++k)
      if (cells_[k].kind == meaning::word) words.emplace(cell(k), k);
    for (auto const& [name, k] : words) {
      places[k] = std::ssize(to_.names);
      to_.names.emplace_back(name);
    }
  }

  labelling& to_;
  role what_;
  std::string option_;
  std::vector<std::string> ignored_;
  std::vector<std::size_t> first_;  // token of each distinct cell
  std::vector<meaning> cells_;
};

/// What may explain a number of labels other than that of tokens.
std::string why_not_as_many(cells const& read, token_choice const& chosen,
                            std::string const& option) {
  auto const there = std::ssize(read.of_token), tokens = chosen.stored;
  if (there == chosen.used)
    return "; as many as count, but one is expected for every token of the file, those left out "
           "too";
  std::string out;
  if (there == tokens + 1 && read.heading.empty() && !read.lines.empty()) {
    std::string const& first = read.distinct[read.of_token.front()];
    bool const digits = first.find_first_not_of("0123456789") == std::string::npos;
    out = "; if " + read.place(0) + " (" + in_quotes(first) + ") is the column's name, " +
          (digits ? "call it label" : option_with(option, first) + " says so");
  }
  if (there + 1 == tokens && !read.heading.empty())
    out = "; line 1 (" + in_quotes(read.heading) +
          ") was taken for the column's name: if it is a label, put a line with the name above it";
  if (read.blank_lines > 0 && there < tokens)
    out += "; " + plural(read.blank_lines, "blank line") +
           " between them passed over (\"\" is an empty label)";
  return out;
}

void require_as_many(std::string const& model, token_choice const& chosen, cells const& read,
                     role what) {
  if (std::ssize(read.of_token) == chosen.stored) return;
  bool const classes = what == role::classes;
  throw unusable(read.source,
                 read.shape + plural(std::ssize(read.of_token), classes ? "label" : "group") +
                     " for " + plural(chosen.stored, "token") + " in " + model +
                     why_not_as_many(read, chosen, classes ? "--label-column" : "--group-column"));
}

column column_of(options const& asked, role what) {
  if (what == role::classes)
    return {asked.label_column,
            {"label", "labels", "class", "target", "category", "tag"},
            "--label-column"};
  return {asked.group_column, {"group", "groups", "document", "doc", "context"}, "--group-column"};
}

labelling understood(cells read, options const& asked, role what) {
  labelling out;
  out.read = std::move(read);
  reader(out, asked, what).read();
  return out;
}

}  // namespace

labelling read_labels(std::string const& named, capture const& c, options const& asked, role what) {
  return understood(read_cells(named, c, c.sites.tokens(), column_of(asked, what)), asked, what);
}

labelling read_labels(std::vector<std::string> const& named, std::vector<capture> const& shards,
                      std::vector<token_choice> const& chosen, options const& asked, role what) {
  column const which = column_of(asked, what);
  if (named.size() == 1 && !is_tensor(named.front(), shards.front())) {
    std::ptrdiff_t all = 0;
    for (token_choice const& one : chosen) all += one.stored;
    return understood(read_cells(named.front(), shards.front(), all, which), asked, what);
  }
  std::vector<cells> files;
  for (std::size_t k = 0; k < shards.size(); ++k) {
    std::string const& name = named[named.size() > 1 ? k : 0];
    files.push_back(read_cells(name, shards[k], chosen[k].stored, which));
    require_as_many(shards[k].path, chosen[k], files.back(), what);
  }
  return understood(joined(files), asked, what);
}

probe_labels labels_of(std::string const& model, token_choice const& chosen,
                       labelling const& labels, labelling const* groups) {
  require_as_many(model, chosen, labels.read, role::classes);
  if (groups != nullptr) require_as_many(model, chosen, groups->read, role::groups);
  probe_labels out;
  out.from = labels.read.source;
  if (!labels.read.heading.empty()) out.from += ", column " + in_quotes(labels.read.heading);
  out.notes = labels.notes;
  auto const all = labels.of_token.size();
  out.mask.assign(all, false);
  out.label.assign(all, 0);
  std::vector<std::ptrdiff_t> tokens(labels.names.size());
  auto const take = [&](std::size_t i) {
    std::int64_t const label = labels.of_token[i];
    auto const cell = [&](labelling const& l) { return l.read.distinct[l.read.of_token[i]]; };
    if (label == labelling::missing)
      throw unusable(labels.read.source, labels.read.place(i) + ": " + in_quotes(cell(labels)) +
                                             " is a missing value; " +
                                             option_with("--ignore-label", cell(labels)) +
                                             " leaves such tokens out of the probes");
    if (label == labelling::left_out) {
      ++out.left_out;
      return;
    }
    if (groups != nullptr && groups->of_token[i] < 0)
      throw unusable(groups->read.source, groups->read.place(i) + ": " + in_quotes(cell(*groups)) +
                                              " is a missing value; a token without a group needs "
                                              "one of its own");
    out.mask[i] = true;
    ++tokens[static_cast<std::size_t>(label)];
  };
  for (token_run const& run : chosen.runs)
    for (std::ptrdiff_t i = run.begin; i < run.end; ++i) take(static_cast<std::size_t>(i));

  std::vector<std::int64_t> place(tokens.size());
  for (std::size_t k = 0; k < tokens.size(); ++k) {
    place[k] = std::ssize(out.names);
    if (tokens[k] == 0) continue;
    out.names.push_back(labels.names[k]);
    out.tokens.push_back(tokens[k]);
  }
  for (std::size_t i = 0; i < all; ++i)
    if (out.mask[i]) out.label[i] = place[static_cast<std::size_t>(labels.of_token[i])];
  if (groups != nullptr) {
    out.group = groups->of_token;
    out.notes.insert(out.notes.end(), groups->notes.begin(), groups->notes.end());
  }

  std::ptrdiff_t const used = chosen.used - out.left_out, classes = std::ssize(out.names);
  std::string const of = " of the " + plural(used, "token") + " with a label";
  if (used == 0)
    throw unusable(labels.read.source, "no token is left: all " + plural(out.left_out, "label") +
                                           " that count are −100 or those of --ignore-label");
  if (classes < 2)
    throw unusable(labels.read.source, "1 class (" + in_quotes(out.names[0]) + ")" + of +
                                           ": a probe tells at least 2 apart");
  if (2 * classes > used)
    throw unusable(labels.read.source,
                   std::to_string(classes) + " classes" + of +
                       ", more than one for two: labels are classes, not measurements or ids (put "
                       "values into bins)");
  return out;
}

double bytes_of_probes(probe_labels const& labels, std::size_t sites, std::ptrdiff_t width,
                       options const& asked, int threads) {
  auto const classes = static_cast<double>(labels.names.size());
  double const n = static_cast<double>(labels.mask.size()), d = static_cast<double>(width);
  double const seeds = asked.probe_seeds, columns = classes * seeds + 64,
               l = static_cast<double>(sites);
  double const at_once = std::min(l, static_cast<double>(threads));
  // Weights with two moments, residuals, predictions; what is packed; curves and confusion.
  return at_once * (8 * (3 * d + n + 256) * columns + 4 * n * seeds) + 4e6 * threads +
         l * seeds * (8 * classes * classes + 64 * (asked.probe_epochs + 1.)) +
         n * (3 * seeds + 100);
}

unusable blame(std::exception const& error, probe_labels const& labels, std::string const& file,
               std::string const& groups) {
  std::string text = reason_of(error, file);
  bool const of_groups = !labels.group.empty() && text.find("group") != std::string::npos;
  constexpr std::string_view before = "class ";
  if (std::size_t const at = text.find(before); at != std::string::npos) {
    std::size_t number = 0;
    char const* const digits = text.data() + at + before.size();
    auto const [end, failed] = std::from_chars(digits, text.data() + text.size(), number);
    if (failed == std::errc{} && number < labels.names.size())
      text.replace(at + before.size(), static_cast<std::size_t>(end - digits),
                   in_quotes(labels.names[number]));
  }
  return unusable(of_groups ? groups : file, text);
}

}  // namespace report
