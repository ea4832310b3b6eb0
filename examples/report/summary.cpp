// SPDX-License-Identifier: Apache-2.0
// What is printed at the end.

#include <algorithm>
#include <cmath>

#include "shards.hpp"
#include "text.hpp"
#include "write.hpp"

namespace report {
namespace {

using rflow::measured;

std::string padded(std::string text, std::size_t width) {
  // Names may hold characters of several bytes, of which each but the first is 10xxxxxx.
  auto const columns = static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
  return columns < width ? text + std::string(width - columns, ' ') : text + " ";
}

}  // namespace

std::string summary(result const& r, options const& asked) {
  std::vector<std::pair<std::string, std::vector<std::string>>> rows;
  auto const row = [&](std::string const& name, auto&& value) {
    std::vector<std::string> values;
    for (model_result const& m : r.models) values.push_back(value(m));
    rows.emplace_back(name, std::move(values));
  };
  row("", [](model_result const& m) { return one_line(m.label).substr(0, 40); });
  row("blocks x tokens x features", [](model_result const& m) {
    return std::to_string(m.blocks()) + " x " + std::to_string(m.flow.tokens) + " x " +
           std::to_string(m.flow.width) + ", " + m.dtype;
  });
  bool const left_out = std::any_of(r.models.begin(), r.models.end(),
                                    [](model_result const& m) { return !m.tokens.all(); });
  if (left_out)
    row("  tokens left out", [](model_result const& m) {
      return m.tokens.all()
                 ? std::string("-")
                 : one_line(list_of(m.tokens.reasons)) + ", of " + std::to_string(m.tokens.stored);
    });
  bool const sequences = std::any_of(r.models.begin(), r.models.end(),
                                     [](model_result const& m) { return m.in_sequences(); });
  if (sequences)
    row("sequences", [](model_result const& m) {
      return std::to_string(m.tokens.sequences()) +
             (m.tokens.sequences_from.empty() ? "" : ", by " + one_line(m.tokens.sequences_from));
    });
  row("inter-token cosine", [](model_result const& m) {
    return number(m.flow.inter_token.front()) + " -> " + number(m.flow.inter_token.back());
  });
  row("  after the final norm", [](model_result const& m) {
    return m.has_final_norm() ? number(m.final_inter_token) : std::string("-");
  });
  row("adjacent cosine, mean", [](model_result const& m) {
    auto const [mean, count] = m.adjacent_mean();
    std::size_t const all = m.flow.adjacent.size();
    return number(mean) + (count == 0 || count == all ? std::string()
                                                      : " over " + std::to_string(count) + " of " +
                                                            plural(m.steps(), "block"));
  });
  std::string const by = " (" + std::string(to_string(asked.normalize)) + ")";
  row("St1" + by, [](model_result const& m) { return number(m.flow.variance.st1); });
  row("St2" + by, [](model_result const& m) { return number(m.flow.variance.st2); });
  row("  Poincare interval", [](model_result const& m) {
    if (!m.flow.variance.path_energy.ok()) return number(m.flow.variance.path_energy);
    return number(finite(std::sqrt(m.st2_squared_bounds().lower))) + " ... " +
           number(finite(std::sqrt(m.st2_squared_bounds().upper)));
  });
  row("path energy" + by,
      [](model_result const& m) { return number(m.flow.variance.path_energy, 4); });
  for (std::size_t c = 0; c < r.models.front().cka.size(); ++c)
    row(r.models.front().cka[c].kernel + " CKA, first to last", [&](model_result const& m) {
      return number(m.cka[c].grid(asked.main_estimator).at(0, m.steps()));
    });

  if (!asked.labels.empty())
    row("probe accuracy, best layer", [](model_result const& m) {
      rflow::layer_probes const& p = *m.probes;
      return p.best < 0 ? std::string("-")
                        : number(p.accuracy(p.best).mean) + " in " +
                              one_line(m.cka_sites()[static_cast<std::size_t>(p.best)]) +
                              ", chance " + number(p.chance);
    });
  if (!asked.labels.empty())
    row("probe classes, tokens", [](model_result const& m) {
      std::ptrdiff_t const ignored = m.classes->left_out;
      return std::to_string(m.classes->names.size()) + ", " + std::to_string(m.classes->used()) +
             (ignored > 0 ? " (" + std::to_string(ignored) + " left out)" : "");
    });

  if (sequences) {
    auto const row_of = [&](std::string const& name,
                            rflow::running_stat rflow::sequence_figures::*which) {
      row(name, [=](model_result const& m) {
        rflow::running_stat const& s = m.per_sequence.*which;
        return m.in_sequences() && s.count > 0
                   ? number(finite(s.mean)) + " +- " + number(finite(s.stddev()))
                   : std::string("-");
      });
    };
    row_of("St1 per sequence", &rflow::sequence_figures::st1);
    row_of("St2 per sequence", &rflow::sequence_figures::st2);
  }
  if (asked.shards) {
    row("shards", [](model_result const& m) { return std::to_string(m.shards->files); });
    row("memory beside the files", [](model_result const& m) {
      return "at most " + number(m.shards->memory_bound / 1048576, 4) + " MiB; was " +
             // The texts of the report are still there.
             number(
                 std::max(m.shards->memory_peak, static_cast<double>(anonymous_memory())) / 1048576,
                 4);
    });
  }

  std::string out;
  for (auto const& [name, values] : rows) {
    std::string line = padded(name, 30);
    for (std::string const& value : values) line += padded(value, 28);
    out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  if (r.models.size() > 1 && r.cross.empty())
    out += "layers not compared across models: " + one_line(r.why_no_cross) + "\n";
  for (model_result const& m : r.models)
    for (warning const& w : m.warnings)
      out += "note: " + (r.models.size() > 1 ? one_line(m.label) + ": " : "") + one_line(w.text) +
             "\n";
  return out;
}

}  // namespace report
