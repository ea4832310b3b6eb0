// SPDX-License-Identifier: Apache-2.0
// report.html: one file, nothing loaded from elsewhere.

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "page.hpp"
#include "palette.hpp"
#include "text.hpp"
#include "write.hpp"

namespace report {
namespace {

using nlohmann::json;
using rflow::measured;

std::string fixed(double x, int decimals = 2) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, x);
  return text;
}

std::string figure(std::string const& title, std::string const& body, std::string const& caption,
                   bool full = false) {
  return std::string("<figure") + (full ? " class=\"full\"" : "") + ">\n<h3>" + title + "</h3>\n" +
         body + "<figcaption>" + caption + "</figcaption>\n</figure>\n";
}

std::string model_name(result const& r, std::size_t k) {
  std::string const swatch =
      r.models.size() > 1 ? std::string("<i class=\"swatch ") + (k == 0 ? "a" : "b") + "\"></i>"
                          : "";
  return swatch + html(r.models[k].label);
}

// ---- header, warnings, summary ------------------------------------------------------------------

std::string facts_line(model_result const& m) {
  std::string out = plural(m.blocks(), "block") + " · " + plural(m.flow.tokens, "token");
  if (!m.tokens.all())
    out += " (of " + std::to_string(m.tokens.stored) +
           "; left out: " + html(list_of(m.tokens.reasons)) + ")";
  if (m.tokens.sequences() > 1) out += " in " + plural(m.tokens.sequences(), "sequence");
  return out + " · " + plural(m.flow.width, "feature") + " · " + m.dtype;
}

std::string header(result const& r) {
  std::string title, facts;
  for (std::size_t k = 0; k < r.models.size(); ++k) {
    title += (k == 0 ? "" : " <span class=\"vs\">and</span> ") + model_name(r, k);
    facts += "<p>" + (r.models.size() > 1 ? model_name(r, k) + ": " : "") +
             facts_line(r.models[k]) + "</p>\n";
  }
  return "<header>\n<p class=\"kind\">Representation flow</p>\n<h1>" + title + "</h1>\n" + facts +
         "</header>\n";
}

/// A note as HTML, with options and their values on one line.
std::string note(std::string const& text) {
  std::string out;
  std::size_t at = 0;
  for (std::size_t dash; (dash = text.find(" --", at)) != std::string::npos;) {
    std::size_t end = std::min(text.find_first_of(" :,;.", dash + 1), text.size());
    // A value that follows: a number, ranges of tokens, a name.
    if (end < text.size() && text[end] == ' ') {
      std::size_t const stop = std::min(text.find_first_of(" ;", end + 1), text.size());
      std::string const value = text.substr(end + 1, stop - end - 1);
      bool const said = text.compare(dash, 12, " --sequences") == 0 ||
                        (!value.empty() && value.front() >= '0' && value.front() <= '9');
      if (said) end = stop;
    }
    std::size_t const last = text[end - 1] == ',' ? end - 1 : end;
    out += html(text.substr(at, dash - at)) + " <code>" +
           html(text.substr(dash + 1, last - dash - 1)) + "</code>";
    at = last;
  }
  return out + html(text.substr(at));
}

std::string warnings(result const& r) {
  std::string items;
  for (std::size_t k = 0; k < r.models.size(); ++k)
    for (warning const& w : r.models[k].warnings)
      items +=
          "<li>" + (r.models.size() > 1 ? model_name(r, k) + ": " : "") + note(w.text) + ".</li>\n";
  if (items.empty()) return "";
  return "<section class=\"notes\">\n<h2>Before you read the numbers</h2>\n<ul>\n" + items +
         "</ul>\n</section>\n";
}

struct summary_row {
  char const* name;
  std::function<std::string(model_result const&)> value;
  std::string what;
};

std::string with_square(measured x) {
  if (!x.ok()) return html_number(x);
  return html_number(x) + " <small>squared " + html_number(finite(x * x)) + "</small>";
}

std::string cka_ends(model_result const& m, std::string const& kernel, estimator e) {
  for (cka_result const& c : m.cka)
    if (c.kernel == kernel) return html_number(c.grid(e).at(0, m.steps()));
  return "–";
}

std::string summary_table(result const& r, options const& asked) {
  std::string const by = asked.normalize == rflow::normalization::none
                             ? std::string("summed over tokens and features")
                         : asked.normalize == rflow::normalization::per_token ? "per token"
                         : asked.normalize == rflow::normalization::per_element
                             ? "per token and feature"
                             : "relative to the mean square of a layer";
  std::vector<summary_row> rows{
      {"Inter-token cosine",
       [](model_result const& m) {
         return html_number(m.flow.inter_token.front()) + " → " +
                html_number(m.flow.inter_token.back()) + " <small>" +
                (m.embedding ? "embedding" : "first block") + " → last block</small>";
       },
       "1: all tokens point the same way; 0: they are spread out"},
      {"&emsp;after the final norm",
       [](model_result const& m) {
         return m.has_final_norm() ? html_number(m.final_inter_token)
                                   : std::string("<small>none in the file</small>");
       },
       "not part of the chain: in no other row of this table"},
      {"Adjacent cosine, mean",
       [](model_result const& m) {
         auto const [mean, count] = m.adjacent_mean();
         if (count == 0 || count == m.flow.adjacent.size()) return html_number(mean);
         return html_number(mean) + " <small>over " + std::to_string(count) + " of " +
                plural(m.steps(), "block") + "</small>";
       },
       "over blocks; 1: blocks do not turn tokens"},
      {"&emsp;least",
       [](model_result const& m) {
         std::size_t least = 0;
         auto const& pairs = m.flow.adjacent;
         for (std::size_t l = 0; l < pairs.size(); ++l)
           if (pairs[l].mean.ok() && (!pairs[least].mean.ok() || pairs[l].mean < pairs[least].mean))
             least = l;
         return pairs.empty() ? html_number(m.adjacent_mean().first)
                              : html_number(pairs[least].mean) + " <small>" + html(m.sites[least]) +
                                    " → " + html(m.sites[least + 1]) + "</small>";
       },
       "the block that turns tokens most"},
      {"St1, layer-local", [](model_result const& m) { return with_square(m.flow.variance.st1); },
       "root mean square change from one layer to the next, " + by},
      {"St2, layer-global", [](model_result const& m) { return with_square(m.flow.variance.st2); },
       "root mean square distance from the mean over layers, " + by},
      {"&emsp;Poincaré interval",
       [](model_result const& m) {
         if (!m.flow.variance.path_energy.ok()) return html_number(m.flow.variance.path_energy);
         return html_number(finite(std::sqrt(m.st2_squared_bounds().lower))) + " … " +
                html_number(finite(std::sqrt(m.st2_squared_bounds().upper)));
       },
       "where St2 must lie, given the path energy alone"},
      {"Path energy",
       [](model_result const& m) { return html_number(m.flow.variance.path_energy, 4); },
       "sum of squared steps, " + by},
      {"Path length",
       [](model_result const& m) { return html_number(m.flow.variance.path_length, 4); },
       "sum of steps, in the unit of St1"},
  };
  std::string const name(to_string(asked.main_estimator));
  if (std::any_of(r.models.begin(), r.models.end(),
                  [](model_result const& m) { return m.in_sequences(); })) {
    auto const row = [&](char const* title, rflow::running_stat rflow::sequence_figures::*which) {
      rows.push_back({title,
                      [which](model_result const& m) {
                        rflow::running_stat const& s = m.per_sequence.*which;
                        return m.in_sequences() && s.count > 0
                                   ? html_number(finite(s.mean)) + " ± " +
                                         html_number(finite(s.stddev()))
                                   : std::string("–");
                      },
                      "each sequence by itself: mean and standard deviation over sequences"});
    };
    row("St1 per sequence", &rflow::sequence_figures::st1);
    row("St2 per sequence", &rflow::sequence_figures::st2);
    row("Path length per sequence", &rflow::sequence_figures::path_length);
  }
  if (asked.linear)
    rows.push_back(
        {"Linear CKA, first to last layer",
         [&](model_result const& m) { return cka_ends(m, "linear", asked.main_estimator); },
         name + "; 1: the same geometry of tokens"});
  if (asked.rbf)
    rows.push_back({"RBF CKA, first to last layer",
                    [&](model_result const& m) { return cka_ends(m, "rbf", asked.main_estimator); },
                    name + ", bandwidth " + html_number(asked.rbf_fraction) +
                        " × root of the median squared distance"});

  std::string out = "<section>\n<h2>Summary</h2>\n<div class=\"scroll\"><table>\n";
  if (r.models.size() > 1) {
    out += "<thead><tr><th></th>";
    for (std::size_t k = 0; k < r.models.size(); ++k) out += "<th>" + model_name(r, k) + "</th>";
    out += "<th></th></tr></thead>\n";
  }
  out += "<tbody>\n";
  for (summary_row const& row : rows) {
    out += std::string("<tr><th>") + row.name + "</th>";
    for (model_result const& m : r.models) out += "<td class=\"value\">" + row.value(m) + "</td>";
    out += "<td class=\"what\">" + row.what + "</td></tr>\n";
  }
  out += "</tbody>\n</table></div>\n";
  if (r.order) {
    std::string const a = html(r.models[0].label), b = html(r.models[1].label);
    out += "<p style=\"margin:12px 0 0\">Ordering of St2² by path energies alone: " +
           (*r.order == rflow::ordering::certified_greater ? a + " is certainly greater than " + b
            : *r.order == rflow::ordering::certified_less
                ? a + " is certainly less than " + b
                : "undecided. That is usual: the certificate needs a very wide gap; compare the "
                  "measured St2") +
           ".</p>\n";
  }
  return out + "</section>\n";
}

// ---- outliers -----------------------------------------------------------------------------------

/// Headline numbers with and without outlying tokens, where there are some that hold much.
std::string outlier_section(result const& r, options const& asked) {
  std::string out;
  for (std::size_t k = 0; k < r.models.size(); ++k) {
    model_result const& m = r.models[k];
    if (!m.outliers || !m.outliers->without) continue;
    outlier_facts const& o = *m.outliers;
    headline const &with = *o.with, &without = *o.without;
    std::string rows;
    auto const row = [&](std::string const& name, measured a, measured b) {
      rows += "<tr><th>" + name + "</th><td class=\"value\">" + html_number(a) +
              "</td><td class=\"value\">" + html_number(b) + "</td></tr>\n";
    };
    row("Inter-token cosine, " + html(m.sites.front()), with.inter_token.front(),
        without.inter_token.front());
    row("Inter-token cosine, " + html(m.sites.back()), with.inter_token.back(),
        without.inter_token.back());
    row("St1", with.st1, without.st1);
    row("St2", with.st2, without.st2);
    headline_cka const &cka = with.cka(asked.main_estimator),
                       &rest = without.cka(asked.main_estimator);
    std::string const kernel = with.kernel == "rbf" ? "RBF CKA, " : "Linear CKA, ";
    row(kernel + "first to last", cka.first_to_last, rest.first_to_last);
    // Of many pairs those that change most, in the order of layers.
    constexpr std::size_t most = 12;
    std::vector<std::size_t> pairs;
    for (std::size_t l = 0; l < cka.adjacent.size(); ++l) pairs.push_back(l);
    auto const change = [&](std::size_t l) {
      measured const a = cka.adjacent[l], b = rest.adjacent[l];
      return a.ok() && b.ok() ? std::abs(a.value - b.value) : 0.0;
    };
    bool const some = pairs.size() > most;
    if (some) {
      std::stable_sort(pairs.begin(), pairs.end(),
                       [&](std::size_t a, std::size_t b) { return change(a) > change(b); });
      pairs.resize(most);
      std::sort(pairs.begin(), pairs.end());
    }
    for (std::size_t const l : pairs)
      row(kernel + html(m.sites[l]) + " to " + html(m.sites[l + 1]), cka.adjacent[l],
          rest.adjacent[l]);
    std::string list;
    for (std::size_t i = 0; i < std::min<std::size_t>(o.tokens.size(), 50); ++i)
      join(list, ", ",
           std::to_string(o.tokens[i].token) + " (" + html_number(o.tokens[i].ratio) + ")");
    if (o.tokens.size() > 50) list += " …";
    out += (r.models.size() > 1 ? "<h3>" + model_name(r, k) + "</h3>\n" : "") + "<p>" +
           plural(std::ssize(o.tokens), "token") +
           " with norms, or distances from the mean token, of more than " +
           html_number(outlier_facts::factor) +
           " times the median of a site, by how many times in parentheses: " + list +
           "</p>\n<div class=\"scroll\"><table>\n<thead><tr><th></th><th>with them</th>"
           "<th>without</th></tr></thead>\n<tbody>\n" +
           rows + "</tbody>\n</table></div>\n" +
           (some ? "<p>Of pairs of neighbouring sites, those that change most; metrics.json has "
                   "all.</p>\n"
                 : "");
  }
  if (out.empty()) return "";
  return "<section>\n<h2>With and without outlying tokens</h2>\n" + out + "</section>\n";
}

// ---- CKA ----------------------------------------------------------------------------------------

constexpr std::ptrdiff_t most_mapped = 500;  // sites; a page of a million cells opens in no browser
constexpr double norm_gap = 0.5;             // cells between the chain and the final norm

/// Where a site stands on an axis of a heat map, in cells.
double place(std::ptrdiff_t i, std::ptrdiff_t count, double gap) {
  return static_cast<double>(i) + (i == count - 1 ? gap : 0);
}

struct axis {
  std::ptrdiff_t count;
  double gap;  // before the last site, if that is the final norm
  std::string title;

  double length() const { return static_cast<double>(count) + gap; }
  std::ptrdiff_t chain() const { return gap > 0 ? count - 1 : count; }
};

std::string heat_map(cka_grid const& g, axis const& rows, axis const& cols,
                     std::string const& table, std::string const& css_class,
                     std::string const& label) {  // plain text
  double const left = 44, bottom = 44, top = 6, right = 14, room = 500 - left - right;
  double const shorter = std::min(rows.length(), cols.length());  // has room for its title
  double const cell =
      std::min(std::max(44.0, 150 / shorter), room / std::max(rows.length(), cols.length()));
  double const width = left + right + cell * cols.length(),
               height = top + bottom + cell * rows.length();
  std::string out = "<svg class=\"heat " + css_class + "\" role=\"img\" aria-label=\"" +
                    html(label) + "\" data-table=\"" + table +
                    "\" style=\"max-width:" + fixed(width * 1.04, 0) + "px\" viewBox=\"0 0 " +
                    fixed(width, 0) + " " + fixed(height, 0) + "\">\n";
  out += "<g class=\"cells\" shape-rendering=\"crispEdges\" transform=\"translate(" + fixed(left) +
         " " + fixed(top + cell * rows.length()) + ") scale(" + fixed(cell, 4) + " -" +
         fixed(cell, 4) + ")\">\n";
  for (std::ptrdiff_t i = 0; i < g.rows; ++i) {
    for (std::ptrdiff_t j = 0; j < g.cols; ++j) {
      measured const x = g.at(i, j);
      out += "<path d=\"M" + number(place(j, g.cols, cols.gap), 6) + " " +
             number(place(i, g.rows, rows.gap), 6) + "h1v1h-1z\" " +
             (x.ok() ? "fill=\"" + hex(colour(x)) + "\"" : std::string("class=\"hole\"")) + "/>";
    }
    out += "\n";
  }
  out += "<rect class=\"mark\" width=\"1\" height=\"1\" display=\"none\"/>\n</g>\n";

  auto const ticks = [&](axis const& a, bool horizontal) {
    std::ptrdiff_t step = 1;
    for (std::ptrdiff_t const s : {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000})
      if (step = s; a.chain() / s <= 9) break;
    auto const tick = [&](std::ptrdiff_t i, std::string const& text) {
      double const at = cell * (place(i, a.count, a.gap) + 0.5);
      double const x = horizontal ? left + at : left - 7;
      double const y =
          horizontal ? top + cell * rows.length() + 17 : top + cell * rows.length() - at + 4;
      out += "<text x=\"" + fixed(x, 1) + "\" y=\"" + fixed(y, 1) + "\" text-anchor=\"" +
             (horizontal ? "middle" : "end") + "\">" + text + "</text>";
    };
    for (std::ptrdiff_t i = 0; i < a.chain(); i += step)
      if (a.gap == 0 || cell * static_cast<double>(a.chain() - i) > (horizontal ? 26 : 14))
        tick(i, std::to_string(i));
    if (a.gap > 0) tick(a.count - 1, "norm");
    double const middle = cell * a.length() / 2;
    out += horizontal ? "<text x=\"" + fixed(left + middle, 1) + "\" y=\"" + fixed(height - 5, 1) +
                            "\" text-anchor=\"middle\">" + a.title + "</text>\n"
                      : "<text transform=\"translate(12 " + fixed(top + middle, 1) +
                            ") rotate(-90)\" text-anchor=\"middle\">" + a.title + "</text>\n";
  };
  ticks(cols, true);
  ticks(rows, false);
  return out + "</svg>\n";
}

json rounded(measured x) { return x.ok() ? json(std::round(x.value * 1e4) / 1e4) : json(); }

json grid_data(cka_grid const& g) {
  json values = json::array(), chances = json::array(), statuses = json::object();
  for (std::ptrdiff_t i = 0; i < g.rows; ++i) {
    json value_row = json::array(), chance_row = json::array();
    for (std::ptrdiff_t j = 0; j < g.cols; ++j) {
      value_row.push_back(rounded(g.at(i, j)));
      chance_row.push_back(rounded(g.chance_at(i, j)));
      if (!g.at(i, j).ok())
        statuses[std::to_string(i) + "," + std::to_string(j)] = to_string(g.at(i, j).why);
    }
    values.push_back(std::move(value_row));
    chances.push_back(std::move(chance_row));
  }
  return {{"value", values}, {"chance", chances}, {"status", statuses}};
}

std::string layer_text(model_result const& m) {
  return m.embedding ? "layer (0: embedding)" : "layer (0: " + html(m.sites.front()) + ")";
}

/// Both estimators of one kernel, one of them shown; adds the numbers to `data`. The title is HTML,
/// the label plain text.
std::string cka_figure(cka_result const& c, model_result const& a, model_result const& b,
                       bool crossed, std::string const& title, std::string const& label,
                       json& data) {
  if (std::max(c.debiased.rows, c.debiased.cols) > most_mapped)
    return figure(title, "",
                  plural(c.debiased.rows, "site") + " × " + std::to_string(c.debiased.cols) +
                      ": more than this page can show. All values stand in metrics.json.");
  std::string const key = "t" + std::to_string(data.size());
  double const row_gap = a.has_final_norm() ? norm_gap : 0,
               col_gap = b.has_final_norm() ? norm_gap : 0;
  json entry{{"debiased", grid_data(c.debiased)},
             {"biased", grid_data(c.biased)},
             {"row_gap", row_gap},
             {"col_gap", col_gap}};
  entry["rows"] = json::array();
  entry["cols"] = json::array();
  for (std::string const& name : a.cka_sites()) entry["rows"].push_back(utf8(name));
  for (std::string const& name : b.cka_sites()) entry["cols"].push_back(utf8(name));
  bool const rbf = c.kernel == "rbf";
  if (rbf) {
    entry["sigma"] = json::array();
    for (measured const s : c.sigma) entry["sigma"].push_back(rounded(s));
  }
  if (!c.p_value.empty()) {
    entry["p"] = json::array();
    for (measured const p : c.p_value)  // never 0: the least is 1/n!, as far as a double goes
      entry["p"].push_back(!p.ok()            ? json("none (" + std::string(to_string(p.why)) + ")")
                           : p.value < 1e-300 ? json("< 1e-300")
                                              : json(number(p.value, 3)));
  }
  if (!c.shift_p_value.empty()) {
    entry["shift_p"] = json::array();
    std::string const least = "1/" + std::to_string(c.tokens);
    for (measured const p : c.shift_p_value)
      entry["shift_p"].push_back(
          !p.ok() ? json("none (" + std::string(to_string(p.why)) + ")")
          : p.value * static_cast<double>(c.tokens) < 1.5
              ? json(least + ", the least there can be")
              : json(number(p.value, 3) + " (the least there can be: " + least + ")"));
  }
  data[key] = std::move(entry);

  axis const rows{c.debiased.rows, row_gap, crossed ? "layer of " + html(a.label) : layer_text(a)};
  axis const cols{c.debiased.cols, col_gap, crossed ? "layer of " + html(b.label) : layer_text(b)};
  std::string body;
  for (estimator const e : {estimator::debiased, estimator::biased})
    body += heat_map(c.grid(e), rows, cols, key, std::string(to_string(e)),
                     label + ", " + std::string(to_string(e)));
  body += legend("≤ 0", "1", "no value");

  double most_chance = 0;
  for (measured const x : c.biased.chance)
    if (x.ok()) most_chance = std::max(most_chance, x.value);
  std::string caption =
      rbf ? "<b>Shows</b> whether the same tokens are near neighbours in two layers (Gaussian "
            "kernel). "
            "<b>Do not trust</b> biased values with a small bandwidth or few tokens: they tend to "
            "1."
          : "<b>Shows</b> whether two layers arrange the tokens alike, up to rotation and scale. "
            "<b>Do not trust</b> it where one token rules the kernel (see Share of one token), nor "
            "biased values near their chance level";
  if (!rbf)
    caption += most_chance > 0 ? ", here up to " + html_number(most_chance) + "." : ".";
  else if (most_chance > 0)
    caption += " Chance alone gives the biased value up to " + html_number(most_chance) + ".";
  return figure(title, body, caption);
}

std::string kernel_name(std::string const& kernel) {
  return kernel == "rbf" ? "RBF kernel" : "Linear kernel";
}

std::string cka_section(result const& r, options const& asked, json& data) {
  std::string out =
      "<section>\n<h2>Do layers see the same geometry?</h2>\n"
      "<p>Centred kernel alignment (CKA) between every two sites. The debiased estimator is about "
      "0 for unrelated layers; the "
      "biased one, which papers often print, is pulled towards 1 when tokens are few. Point at a "
      "cell for its numbers and what chance alone gives.</p>\n";
  for (estimator const e : {estimator::debiased, estimator::biased}) {
    std::string const name(to_string(e));
    out += "<input class=\"switch\" type=\"radio\" name=\"estimator\" id=\"show-" + name + "\"" +
           (e == asked.main_estimator ? " checked" : "") + "><label for=\"show-" + name + "\">" +
           name + "</label>";
  }
  out += "\n<div class=\"grids\">\n";
  for (std::size_t k = 0; k < r.models.size(); ++k) {
    out += "<div class=\"pair\">\n";
    for (cka_result const& c : r.models[k].cka) {
      auto const of = [&](std::string const& name) {
        return (r.models.size() > 1 ? name + ", " : "") + kernel_name(c.kernel);
      };
      out += cka_figure(c, r.models[k], r.models[k], false, of(model_name(r, k)),
                        of(r.models[k].label), data);
    }
    out += "</div>\n";
  }
  if (!r.cross.empty()) {
    out += "<div class=\"pair\">\n";
    for (cka_result const& c : r.cross)
      out += cka_figure(c, r.models[0], r.models[1], true,
                        "Between the two models, " + kernel_name(c.kernel),
                        "CKA of " + r.models[0].label + " against " + r.models[1].label + ", " +
                            kernel_name(c.kernel),
                        data);
    out += "</div>\n";
  } else if (r.models.size() > 1) {
    out +=
        "<p style=\"color:var(--soft);margin:18px 0 0\">Layers of the two models are not compared "
        "with each other: " +
        html(r.why_no_cross) + ".</p>\n";
  }
  return out + "</div>\n</section>\n";
}

// ---- figures ------------------------------------------------------------------------------------

std::string plotted(figures const& plots, std::string const& name, std::string const& title,
                    std::string const& caption, bool full = false) {
  auto const found = plots.find(name);
  if (found == plots.end()) return "";
  return figure(title, found->second, caption, full);
}

std::string pair_of(std::string const& a, std::string const& b) {
  return a.empty() && b.empty() ? "" : "<div class=\"pair\">\n" + a + b + "</div>\n";
}

std::string token_section(result const& r, figures const& plots) {
  bool final_norm = false;
  for (model_result const& m : r.models) final_norm = final_norm || m.final_inter_token.ok();
  std::string body = pair_of(
      plotted(plots, "inter_token", "Inter-token cosine",
              std::string("<b>Shows</b> the mean cosine between two different tokens of a layer: a "
                          "rise means that tokens grow alike. ") +
                  (final_norm ? "The diamond is the final norm, which is not part of the chain. "
                              : "") +
                  "<b>Do not trust</b> it as a sign of lost information: one large common "
                  "direction raises it and takes nothing away."),
      plotted(plots, "adjacent", "Adjacent-layer cosine",
              "<b>Shows</b> how far each block turns a token: mean over tokens, band of one "
              "standard deviation. "
              "<b>Do not trust</b> it as a measure of work done: it is blind to norms, and the "
              "mean of cosines is not the cosine of mean activations."));
  for (std::size_t k = 0; k < r.models.size(); ++k)
    body += plotted(
        plots, "tokens_" + std::to_string(k),
        "The same for every token" +
            (r.models.size() > 1 ? ": " + model_name(r, k) : std::string()),
        "<b>Shows</b> the cosine of each token with itself one block earlier: columns that stand "
        "out are special tokens, rows special blocks. "
        "<b>Do not trust</b> single cells of nearly zero tokens, whose direction is rounding.",
        true);
  if (body.empty()) return "";
  return "<section>\n<h2>How do tokens move?</h2>\n<p>Directions only: cosines between tokens, and "
         "of each token with itself in the layer before.</p>\n" +
         body + "</section>\n";
}

/// The classes with their numbers of tokens, the first of very many; and what has none.
std::string classes_of(result const& r, std::size_t k) {
  constexpr std::size_t most = 40;
  probe_classes const& c = *r.models[k].classes;
  std::string out;
  for (std::size_t i = 0; i < std::min(most, c.names.size()); ++i)
    join(out, ", ", "<b>" + html(c.names[i]) + "</b> " + std::to_string(c.tokens[i]));
  if (c.names.size() > most)
    out += " and " + std::to_string(c.names.size() - most) + " more (<code>metrics.json</code>)";
  out = "<p>" + (r.models.size() > 1 ? model_name(r, k) + ": tokens" : std::string("Tokens")) +
        " of each class: " + out + ".";
  if (c.left_out > 0)
    out += " " + plural(c.left_out, "token") + " with a label of −100 or of " +
           "<code>--ignore-label</code> " + (c.left_out == 1 ? "is" : "are") +
           " left out of the probes, and only of them.";
  return out + "</p>\n";
}

std::string probe_section(result const& r, options const& asked, figures const& plots) {
  if (asked.labels.empty()) return "";
  std::string rows, classes;
  for (std::size_t k = 0; k < r.models.size(); ++k) {
    classes += classes_of(r, k);
    model_result const& m = r.models[k];
    rflow::layer_probes const& p = *m.probes;
    std::vector<std::string> const sites = m.cka_sites();
    auto const cell = [](std::string const& text) { return "<td>" + text + "</td>"; };
    rows += "<tr><th>" + model_name(r, k) + "</th>" +
            cell(p.best < 0 ? "—"
                            : html(sites[static_cast<std::size_t>(p.best)]) + ", " +
                                  html_number(p.accuracy(p.best).mean)) +
            cell(html_number(p.drop)) + cell(html_number(p.chance)) +
            cell(std::to_string(p.layers.front().classes)) + "</tr>\n";
  }
  return "<section>\n<h2>Where can the labels be read off?</h2>\n<p>A softmax regression on each "
         "layer, trained on " +
         fixed(100 * (1 - rflow::probe_options{}.validation_fraction), 0) +
         " % of the tokens and tried on the rest; " + plural(asked.probe_seeds, "seed") + ", " +
         plural(asked.probe_epochs, "epoch") + ".</p>\n<div class=\"scroll\"><table>\n" +
         "<tr><th></th><th>Best layer</th><th>Drop to the last</th><th>Chance</th>"
         "<th>Classes</th></tr>\n" +
         rows + "</table></div>\n" + classes +
         plotted(
             plots, "probe", "Accuracy by layer",
             "<b>Shows</b> the mean accuracy on held-out tokens, band of one standard deviation "
             "over seeds; dotted, what always naming the commonest class attains. "
             "<b>Do not trust</b> it as a sign that the model uses what can be read off, nor "
             "where tokens of one document lie on both sides of the split "
             "(<code>--label-groups</code>).") +
         "</section>\n";
}

std::string path_section(options const& asked, figures const& plots) {
  std::string const by(to_string(asked.normalize));
  std::string interval =
      plotted(plots, "poincare", "St2 and its Poincaré interval",
              "<b>Shows</b> the measured St2 (dot) between the bounds that the path energy alone "
              "imposes (ends of the bar). "
              "<b>Do not trust</b> the interval to compare two models: it grows with depth, and is "
              "attained only by a path that swings once or zigzags.",
              true);
  std::string steps = pair_of(
      plotted(plots, "steps", "Step of each block",
              "<b>Shows</b> ‖X<sub>l+1</sub> − X<sub>l</sub>‖, normalisation " + by +
                  ". "
                  "<b>Do not trust</b> a lone spike before looking at Share of one token: one "
                  "token with massive activations can be all of it."),
      plotted(plots, "curvature", "Curvature",
              "<b>Shows</b> the angle between a block's step and the one before: 90° is "
              "unrelated, less carries on, more turns back. "
              "<b>Do not trust</b> it where a step is tiny."));
  std::string single = pair_of(
      plotted(plots, "norms", "Norm of a token",
              "<b>Shows</b> the root mean square norm over tokens, without normalisation. <b>Do "
              "not trust</b> it as a typical norm when one token is far from the rest."),
      plotted(plots, "top_share", "Share of one token",
              "<b>Shows</b> how much of the linear kernel matrix is due to pairs with its most "
              "extreme token. "
              "Near 1, that token decides linear CKA, St1 and St2: <b>do not trust</b> those "
              "there, and compare with the token left out (<code>--skip-first</code>)."));
  std::string const body = interval + steps + single;
  if (body.empty()) return "";
  return "<section>\n<h2>How far, and along what path?</h2>\n<p>Sums of squares over the chain, "
         "its first site to the last block, without the final norm.</p>\n" +
         body + "</section>\n";
}

std::string facts(result const& r, options const& asked, std::vector<std::string> const& files) {
  auto const row = [](std::string const& name, std::string const& value) {
    return value.empty() ? std::string() : "<tr><th>" + name + "</th><td>" + value + "</td></tr>\n";
  };
  std::string out = "<section>\n<h2>What was measured</h2>\n";
  for (std::size_t k = 0; k < r.models.size(); ++k) {
    model_result const& m = r.models[k];
    auto const metadata = [&](char const* key) {
      auto const found = m.metadata.find(key);
      return found == m.metadata.end() ? std::string() : html(found->second);
    };
    out +=
        "<h3 style=\"margin-top:12px\">" + model_name(r, k) + "</h3>\n<table class=\"facts\">\n" +
        row("File", "<code>" + html(m.path) + "</code>" +
                        (m.shards && m.shards->files > 1
                             ? " and " + plural(m.shards->files - 1, "further shard")
                             : "")) +
        row("Sequences",
            m.in_sequences()
                ? std::to_string(m.tokens.sequences()) +
                      (m.tokens.sequences_from.empty()
                           ? ""
                           : ", by <code>" + html(m.tokens.sequences_from) + "</code>") +
                      "; figures without &ldquo;per sequence&rdquo; pool the tokens of all, but "
                      "cosines between tokens are within sequences"
                : "") +
        row("Revision", metadata("revision")) + row("Architecture", metadata("architecture")) +
        row("Text",
            metadata("text_title") +
                (metadata("text_origin").empty() ? "" : " (" + metadata("text_origin") + ")")) +
        row("Token hash", m.token_hash.empty() ? "" : "<code>" + html(m.token_hash) + "</code>") +
        row("Sites", std::to_string(m.sites.size()) + " in the chain, " + html(m.sites.front()) +
                         (m.steps() > 0 ? " to " + html(m.sites.back()) : "") +
                         (m.has_final_norm() ? "; apart: " + html(m.final_norm_name)
                                             : "; no final norm in the file")) +
        row("Tokens",
            std::to_string(m.flow.tokens) + " of " + std::to_string(m.tokens.stored) +
                (m.tokens.all() ? ", none left out"
                                : "; left out of everything: " + html(list_of(m.tokens.reasons)))) +
        row("Features", std::to_string(m.flow.width)) + row("Stored as", m.dtype) +
        row("Captured with", metadata("captured_with")) + "</table>\n";
  }
  std::string kernels = asked.linear ? "linear" : "";
  if (asked.rbf)
    kernels += (kernels.empty() ? "" : ", ") + std::string("RBF with σ = ") +
               html_number(asked.rbf_fraction) +
               " × root of the median squared distance between tokens";
  std::string labels;
  for (model_result const& m : r.models)
    if (m.classes && (r.models.size() == 1 || asked.labels.size() > 1 || labels.empty()))
      join(labels, ", ", "<code>" + html(m.classes->from) + "</code>");
  std::string links;
  for (std::string const& file : files)
    links +=
        (links.empty() ? "" : ", ") + ("<a href=\"" + html(file) + "\">" + html(file) + "</a>");
  out += "<h3 style=\"margin-top:16px\">Settings</h3>\n<table class=\"facts\">\n" +
         row("Normalisation", std::string(to_string(asked.normalize)) +
                                  " (St1, St2, path, steps and bounds carry the same factor)") +
         row("CKA estimators",
             asked.minibatch_cka
                 ? "minibatch, debiased, batches of " + std::to_string(asked.cka_batch) + " tokens"
                 : "debiased and biased; " + std::string(to_string(asked.main_estimator)) +
                       " in the summary and in cka.npy") +
         row("CKA kernels", kernels) + row("Labels", labels) +
         row("Program", "rflow_report " + version_text() + ", metrics schema " + schema_version) +
         row("Files beside this one", links) + "</table>\n</section>\n";
  return out;
}

}  // namespace

std::string html_page(std::string const& title, std::string const& program, std::string const& main,
                      std::string const& scripts) {
  return "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
         "<meta name=\"generator\" content=\"" +
         program + " " + version_text() + "\">\n<title>" + title + "</title>\n<style>" +
         page_style +
         "</style>\n</head>\n<body>\n"
         // What gnuplot's points refer to; once for all figures.
         "<svg width=\"0\" height=\"0\" style=\"position:absolute\" aria-hidden=\"true\"><defs>"
         "<circle id=\"gpPt6\" r=\"1\"/><rect id=\"gpPt4\" x=\"-1\" y=\"-1\" width=\"2\" "
         "height=\"2\"/><path id=\"gpPt12\" d=\"M0-1.3 1.3 0 0 1.3-1.3 "
         "0z\"/></defs></svg>\n<main>\n" +
         main + "</main>\n" + scripts + "</body>\n</html>\n";
}

std::string report_html(result const& r, options const& asked, figures const& plots,
                        std::vector<std::string> const& files) {
  std::string title;
  for (model_result const& m : r.models) title += (title.empty() ? "" : " and ") + html(m.label);
  json data = json::object();
  std::string const cka = cka_section(r, asked, data);
  std::string numbers = data.dump();
  for (std::size_t at = 0; (at = numbers.find('<', at)) != std::string::npos;)
    numbers.replace(at, 1, "\\u003c");
  return html_page(
      "Representation flow: " + title, "rflow_report",
      header(r) + warnings(r) + summary_table(r, asked) + outlier_section(r, asked) +
          token_section(r, plots) + cka + path_section(asked, plots) +
          probe_section(r, asked, plots) + facts(r, asked, files) +
          "<footer>Made by rflow_report. What each figure means and where it comes from stands in "
          "docs/report.md of rflow.</footer>\n",
      "<div id=\"tip\" role=\"status\"></div>\n<script type=\"application/json\" id=\"cka-data\">" +
          numbers + "</script>\n<script>" + page_script + "</script>\n");
}

}  // namespace report
