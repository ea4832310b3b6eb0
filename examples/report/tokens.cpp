// SPDX-License-Identifier: Apache-2.0
#include "tokens.hpp"

#include <rflow/widen.hpp>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <variant>

#include "text.hpp"

namespace report {
namespace {

// Keys that the field's tools use.
constexpr char const* own_mask = "attention_mask";                             // 1: a token
constexpr char const* own_special_mask = "special_tokens_mask";                // 1: none
constexpr char const* offered_masks[] = {"mask", "input_mask", "token_mask"};  // unsaid whose
constexpr char const* own_offsets[] = {"sequences", "cu_seqlens"};
constexpr char const* own_positions = "position_ids";

/// The values of a tensor, with what the user can do if it has none.
std::vector<std::int64_t> integers(capture const& c, rflow::tensor const& x,
                                   std::string const& cure) {
  try {
    return x.integers();
  } catch (std::invalid_argument const& error) {
    throw unusable(c.path, reason_of(error, c.path) + cure);
  }
}

std::ptrdiff_t batch_of(capture const& c) {
  return c.sites.sequences.empty() ? 1 : std::ssize(c.sites.sequences) - 1;
}

/// One value a token, of shape tokens or batch × tokens.
bool has_token_shape(capture const& c, rflow::tensor const& x) {
  std::ptrdiff_t const batch = batch_of(c);
  return x.size() == c.sites.tokens() && (x.rank() == 1 || x.rank() == 2) &&
         (x.rank() == 1 || batch == 1 || x.shape[0] == batch);
}
void require_token_shape(capture const& c, rflow::tensor const& x, std::string const& cure) {
  std::ptrdiff_t const n = c.sites.tokens(), batch = batch_of(c);
  if (!has_token_shape(c, x))
    throw unusable(c.path,
                   "one value a token expected, " +
                       (batch > 1 ? std::to_string(batch) + " x " + std::to_string(n / batch)
                                  : std::to_string(n)) +
                       ", found " + x.description() + cure);
}

bool marks_special(std::string const& name) { return name == own_special_mask; }

bool is_integral(rflow::dtype type) {
  return type == rflow::dtype::boolean || (type >= rflow::dtype::u8 && type <= rflow::dtype::i64);
}

/// The values of a mask, 0 or 1 in integers, booleans or floats, row-major.
/// @throws std::invalid_argument saying what else is there
std::vector<std::int64_t> zeros_and_ones(std::string const& name, rflow::tensor const& x) {
  std::string const expected = std::string("; 0 or 1 expected, where 1 ") +
                               (marks_special(name) ? "leaves a token out" : "keeps a token");
  auto const require = [&](auto value, std::size_t i) {
    if (value != 0 && value != 1)
      throw std::invalid_argument("the mask '" + name + "' holds " +
                                  (std::is_integral_v<decltype(value)>
                                       ? std::to_string(value)
                                       : number(static_cast<double>(value))) +
                                  " at token " + std::to_string(i) + expected);
  };
  std::vector<std::int64_t> out;
  if (is_integral(x.type)) {
    out = x.integers();
    for (std::size_t i = 0; i < out.size(); ++i) require(out[i], i);
  } else if (rflow::is_activation(x.type)) {
    rflow::widened_tensor const wide = rflow::widen(x, rflow::dtype::f64);
    double const* const values = wide.array.elements<double>();
    for (std::ptrdiff_t i = 0; i < x.size(); ++i) {
      require(values[i], static_cast<std::size_t>(i));
      out.push_back(values[i] == 1 ? 1 : 0);
    }
  } else {
    throw std::invalid_argument("a mask is " + x.description() + expected);
  }
  return out;
}

/// Where sequences begin, from Q + 1 ascending offsets.
std::vector<std::ptrdiff_t> sequences_of_offsets(capture const& c, rflow::tensor const& x,
                                                 std::string const& cure) {
  if (x.rank() != 1)
    throw unusable(c.path, "one axis of offsets expected, found " + x.description() + cure);
  std::vector<std::int64_t> const values = integers(c, x, cure);
  std::vector<std::ptrdiff_t> out(values.begin(), values.end());
  std::ptrdiff_t const n = c.sites.tokens();
  if (out.size() < 2 || out.front() != 0 || out.back() != n ||
      !std::is_sorted(out.begin(), out.end()))
    throw unusable(c.path, "the tensor '" + x.name + "' does not ascend from 0 to its " +
                               plural(n, "token") + ", as offsets of sequences do (0 … " +
                               std::to_string(n) + ")" + cure);
  return out;
}

/// Where sequences begin, from a number at each token that counts: positions start anew, numbers of
/// documents change. A token that does not count belongs to the sequence before it.
std::vector<std::ptrdiff_t> sequences_of_values(std::vector<std::int64_t> const& values,
                                                std::vector<bool> const& kept, bool positions) {
  std::vector<std::ptrdiff_t> out{0};
  std::optional<std::int64_t> last;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!kept[i]) continue;
    if (last && (positions ? values[i] <= *last : values[i] != *last))
      out.push_back(static_cast<std::ptrdiff_t>(i));
    last = values[i];
  }
  out.push_back(std::ssize(values));
  return out;
}

bool holds_positions(std::string const& name) { return name.find("position") != std::string::npos; }

constexpr char const* without_sequences = "; --sequences none leaves it out of account";

/// The same, where the user may have meant a number at each token.
std::string without_offsets(capture const& c, rflow::tensor const& x) {
  bool const number_a_token = has_token_shape(c, x) && x.size() > 1 && is_integral(x.type);
  return (number_a_token
              ? "; --sequences " + x.name + " takes it for the number of each token's sequence"
              : "") +
         std::string(without_sequences);
}

/// What --sequences names: offsets, or a number at each token.
std::vector<std::ptrdiff_t> named_sequences(capture const& c, std::string const& name,
                                            std::vector<bool> const& kept) {
  std::optional<rflow::tensor> const x = c.tensor(name);
  std::ptrdiff_t const n = c.sites.tokens();
  if (!x) throw unusable(c.path, "--sequences: no tensor '" + name + "' in it");
  if (x->size() != n || n < 2 || holds_positions(name)) {
    if (!holds_positions(name)) return sequences_of_offsets(c, *x, "");
    require_token_shape(c, *x, "");
    return sequences_of_values(integers(c, *x, ""), kept, true);
  }
  std::vector<std::int64_t> const values = integers(c, *x, "");
  if (x->rank() == 1 && values.front() == 0 && values.back() == n &&
      std::is_sorted(values.begin(), values.end()))
    return sequences_of_offsets(c, *x, "");
  require_token_shape(c, *x, "");
  return sequences_of_values(values, kept, false);
}

struct sequences_found {
  std::vector<std::ptrdiff_t> offsets;
  std::string from;
};

/// @param kept   what masks leave
/// @param rows   of a mask, if it says which tokens belong together
/// @param notes  takes the offer to read positions as sequences
sequences_found find_sequences(capture const& c, options const& asked,
                               std::vector<bool> const& kept, sequences_found const& rows,
                               std::vector<std::string>& notes) {
  std::ptrdiff_t const n = c.sites.tokens();
  if (asked.sequences == "none") return {{0, n}, ""};
  if (!asked.sequences.empty()) return {named_sequences(c, asked.sequences, kept), asked.sequences};
  sequences_found out{{0, n}, ""};
  bool weak = true;  // offsets in the file say more than axes do
  if (!c.sites.sequences.empty())
    out = {c.sites.sequences, "batch"};
  else if (!rows.offsets.empty())
    out = rows;
  for (char const* const name : own_offsets) {
    std::optional<rflow::tensor> const x = c.tensor(name);
    if (!x) continue;
    std::vector<std::ptrdiff_t> offsets = sequences_of_offsets(c, *x, without_offsets(c, *x));
    if (!weak && offsets != out.offsets)
      throw unusable(c.path, std::string("its tensors '") + out.from + "' and '" + name +
                                 "' differ; --sequences " + out.from + " or --sequences " + name +
                                 " says which");
    if (weak) out = {std::move(offsets), name};
    weak = false;
  }
  if (!weak) return out;

  // Offered, not taken: positions may start anew for other reasons.
  std::optional<rflow::tensor> const x = c.tensor(own_positions);
  if (!x || x->size() != n || (x->rank() != 1 && x->rank() != 2) ||
      (x->type != rflow::dtype::i64 && x->type != rflow::dtype::i32))
    return out;
  std::vector<std::ptrdiff_t> const anew =
      sequences_of_values(integers(c, *x, without_sequences), kept, true);
  // A row of a batch may begin with tokens that do not count.
  auto const first_kept = [&](std::ptrdiff_t token) {
    return std::find(kept.begin() + token, kept.end(), true) - kept.begin();
  };
  std::vector<std::ptrdiff_t> known;
  for (std::ptrdiff_t const offset : out.offsets)
    known.push_back(offset == 0 ? 0 : first_kept(offset));
  std::ptrdiff_t const unknown =
      std::count_if(anew.begin(), anew.end(), [&](std::ptrdiff_t offset) {
        return std::find(known.begin(), known.end(), offset) == known.end();
      });
  if (unknown > 0)
    notes.push_back(
        "its position_ids start anew at " + plural(unknown, "token") +
        " within what is taken for one sequence: --sequences position_ids takes them for "
        "starts of sequences, --sequences none says that they are not");
  return out;
}

}  // namespace

// ---- what is known of a choice ------------------------------------------------------------------

std::ptrdiff_t token_choice::sequences() const {
  std::ptrdiff_t out = 0;
  auto run = runs.begin();
  for (std::size_t q = 1; q < offsets.size(); ++q) {
    while (run != runs.end() && run->end <= offsets[q - 1]) ++run;
    if (run != runs.end() && std::max(run->begin, offsets[q - 1]) < offsets[q]) ++out;
  }
  return out;
}

std::ptrdiff_t token_choice::stored_token(std::ptrdiff_t i) const {
  auto const after = std::upper_bound(
      runs.begin(), runs.end(), i,
      [](std::ptrdiff_t token, token_run const& run) { return token < run.before; });
  return std::prev(after)->begin + (i - std::prev(after)->before);
}

bool token_choice::begins_sequence(std::ptrdiff_t token) const {
  auto const sequence = std::prev(std::upper_bound(offsets.begin(), offsets.end(), token));
  auto const run =
      std::find_if(runs.begin(), runs.end(), [&](token_run const& r) { return r.end > *sequence; });
  return run != runs.end() && std::max(run->begin, *sequence) == token;
}

std::vector<bool> token_choice::mask() const {
  std::vector<bool> out(static_cast<std::size_t>(stored));
  for (token_run const& run : runs) std::fill(out.begin() + run.begin, out.begin() + run.end, true);
  return out;
}

bool token_choice::same_tokens(token_choice const& other) const {
  return stored == other.stored &&
         std::equal(runs.begin(), runs.end(), other.runs.begin(), other.runs.end(),
                    [](token_run const& a, token_run const& b) {
                      return a.begin == b.begin && a.end == b.end;
                    });
}

void token_choice::append(token_choice const& next) {
  for (token_run const& run : next.runs)
    runs.push_back({run.begin + stored, run.end + stored, run.before + used});
  if (offsets.empty()) offsets = {0};
  for (std::size_t q = 1; q < next.offsets.size(); ++q) offsets.push_back(next.offsets[q] + stored);
  for (left_out const& more : next.reasons) {
    auto const same = std::find_if(reasons.begin(), reasons.end(),
                                   [&](left_out const& r) { return r.why == more.why; });
    if (same == reasons.end())
      reasons.push_back(more);
    else
      same->tokens += more.tokens;
  }
  for (std::string const& note : next.notes)
    if (std::find(notes.begin(), notes.end(), note) == notes.end()) notes.push_back(note);
  if (sequences_from.empty()) sequences_from = next.sequences_from;
  stored += next.stored;
  used += next.used;
}

std::string list_of(std::vector<left_out> const& reasons) {
  std::string out;
  for (left_out const& r : reasons) join(out, ", ", std::to_string(r.tokens) + " by " + r.why);
  return out;
}

// ---- the rules ----------------------------------------------------------------------------------

token_choice token_rules::next(capture const& c) {
  std::ptrdiff_t const n = c.sites.tokens();
  token_choice out;
  out.stored = n;
  std::vector<bool> kept(static_cast<std::size_t>(n), true);
  auto const leave_out = [&](std::string const& why, auto const& drops) {
    std::ptrdiff_t count = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
      auto const at = static_cast<std::size_t>(i);
      if (kept[at] && drops(i)) kept[at] = false, ++count;
    }
    if (count > 0) out.reasons.push_back({why, count});
  };

  sequences_found rows;
  auto const apply = [&](std::string const& name, rflow::tensor const& x, std::string const& cure) {
    require_token_shape(c, x, cure);
    std::vector<std::int64_t> values;
    try {
      values = zeros_and_ones(name, x);
    } catch (std::invalid_argument const& error) {
      throw unusable(c.path, reason_of(error, c.path) + cure);
    }
    if (rows.offsets.empty() && x.rank() == 2 && x.shape[0] > 1) {
      rows.from = name;
      for (std::ptrdiff_t i = 0; i <= n; i += x.shape[1]) rows.offsets.push_back(i);
    }
    std::int64_t const drop = marks_special(name) ? 1 : 0;
    leave_out(name, [&](std::ptrdiff_t i) { return values[static_cast<std::size_t>(i)] == drop; });
  };
  if (asked_->own_masks)
    for (char const* const name : {own_mask, own_special_mask})
      if (std::optional<rflow::tensor> const x = c.tensor(name))
        apply(name, *x, "; --no-mask leaves it out of account");
  for (std::string const& name : asked_->masks) {
    if (std::optional<rflow::tensor> const x = c.tensor(name)) {
      apply(name, *x, "");
      continue;
    }
    auto found = files_.find(name);
    if (found == files_.end()) {
      std::error_code ignored;
      if (!std::filesystem::is_regular_file(name, ignored))
        throw unusable(c.path, "--mask: no tensor '" + name + "' in it, and no file of that name");
      try {
        rflow::npy_file const file(name);
        // Over several shards it has the tokens of all; else its axes are those of the capture.
        if (file.array().rank() == 2 && file.array().size() == n)
          require_token_shape(c, file.array(), "");
        found = files_.emplace(name, zeros_and_ones(name, file.array())).first;
      } catch (std::bad_alloc const&) {
        throw;
      } catch (unusable const&) {
        throw;
      } catch (std::exception const& error) {
        throw unusable(name, reason_of(error, name));
      }
    }
    std::vector<std::int64_t> const& values = found->second;
    std::ptrdiff_t const there = std::ssize(values);
    if (there - before_ < n)
      throw unusable(name, "a mask of " + plural(there, "value") + " for " +
                               std::to_string(before_ + n) + " tokens" +
                               (before_ > 0 ? " or more" : "") + " in " + c.path);
    std::int64_t const drop = marks_special(std::filesystem::path(name).stem().string()) ? 1 : 0;
    leave_out("--mask " + name, [&](std::ptrdiff_t i) {
      return values[static_cast<std::size_t>(before_ + i)] == drop;
    });
  }

  // Offered, not taken: such names do not say what 0 means.
  if (asked_->own_masks)
    for (char const* const name : offered_masks) {
      auto const& named = asked_->masks;
      if (std::find(named.begin(), named.end(), name) != named.end()) continue;
      try {
        std::optional<rflow::tensor> const x = c.tensor(name);
        if (!x || !has_token_shape(c, *x)) continue;
        std::vector<std::int64_t> const values = zeros_and_ones(name, *x);
        bool there[2] = {false, false};  // among the tokens that count
        for (std::size_t i = 0; i < values.size(); ++i)
          if (kept[i]) there[values[i]] = true;
        if (there[0] && there[1])
          out.notes.push_back(std::string("its tensor '") + name +
                              "' is 0 at some tokens and 1 at others, and was not used: --mask " +
                              name + " leaves the tokens out where it is 0");
      } catch (std::invalid_argument const&) {  // no mask
      } catch (rflow::format_error const&) {    // a file of a folder that nobody asked for
      }
    }

  sequences_found sequences = find_sequences(c, *asked_, kept, rows, out.notes);
  out.offsets = std::move(sequences.offsets);
  out.sequences_from = std::move(sequences.from);

  // First and last of what masks leave of each sequence.
  std::vector<bool> const masked = kept;
  auto const ends = [&](std::ptrdiff_t count, bool first) {
    std::vector<bool> drop(static_cast<std::size_t>(n));
    for (std::size_t q = 0; q + 1 < out.offsets.size(); ++q) {
      std::ptrdiff_t left = count;
      for (std::ptrdiff_t k = 0; k < out.offsets[q + 1] - out.offsets[q] && left > 0; ++k) {
        auto const at =
            static_cast<std::size_t>(first ? out.offsets[q] + k : out.offsets[q + 1] - 1 - k);
        if (masked[at]) drop[at] = true, --left;
      }
    }
    leave_out((first ? "--skip-first " : "--skip-last ") + std::to_string(count),
              [&](std::ptrdiff_t i) { return drop[static_cast<std::size_t>(i)]; });
  };
  if (asked_->skip_first > 0) ends(asked_->skip_first, true);
  if (asked_->skip_last > 0) ends(asked_->skip_last, false);
  if (!asked_->tokens.empty()) {
    std::vector<bool> chosen(static_cast<std::size_t>(n));
    for (auto const& [begin, end] : asked_->tokens) {
      std::ptrdiff_t const from = std::clamp<std::ptrdiff_t>(begin - before_, 0, n);
      std::ptrdiff_t const to = std::clamp<std::ptrdiff_t>(end - before_, 0, n);
      if (from < to) std::fill(chosen.begin() + from, chosen.begin() + to, true);
    }
    leave_out("--tokens", [&](std::ptrdiff_t i) { return !chosen[static_cast<std::size_t>(i)]; });
  }

  for (std::ptrdiff_t i = 0; i < n; ++i) {
    if (!kept[static_cast<std::size_t>(i)]) continue;
    if (out.runs.empty() || out.runs.back().end != i) out.runs.push_back({i, i, out.used});
    out.runs.back().end = i + 1;
    ++out.used;
  }
  before_ += n;
  return out;
}

void token_rules::finish(std::string const& path, token_choice const& all) const {
  for (auto const& [name, values] : files_)
    if (std::ssize(values) != all.stored)
      throw unusable(name, "a mask of " + plural(std::ssize(values), "value") + " for " +
                               plural(all.stored, "token") + " in " + path);
  for (auto const& [begin, end] : asked_->tokens)
    if (begin >= all.stored || (end != options::to_the_end && end > all.stored))
      throw unusable(path, "--tokens " + asked_->tokens_text + ": there are " +
                               plural(all.stored, "token") + ", counted from 0");
  if (all.used > 0) return;
  std::string why;
  for (left_out const& r : all.reasons) join(why, ", ", r.why);
  bool const own = asked_->own_masks &&
                   std::any_of(all.reasons.begin(), all.reasons.end(), [](left_out const& r) {
                     return r.why == own_mask || r.why == own_special_mask;
                   });
  throw unusable(path, why + (all.reasons.size() == 1 ? " leaves" : " leave") + " none of its " +
                           plural(all.stored, "token") +
                           (own ? "; --no-mask leaves the file's masks out of account" : ""));
}

token_choice choose_tokens(capture const& c, options const& asked) {
  token_rules rules(asked);
  token_choice out = rules.next(c);
  rules.finish(c.path, out);
  return out;
}

}  // namespace report
