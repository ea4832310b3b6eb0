// SPDX-License-Identifier: Apache-2.0
// Curves and the token heat map of a report.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>

#include "figure.hpp"
#include "palette.hpp"
#include "text.hpp"
#include "write.hpp"

namespace report {
namespace {

using rflow::measured;

/// "1, 2, 5, 10": round numbers inside an interval of positive numbers, about eight at most.
std::string logarithmic_ticks(double low, double high) {
  int const decades = static_cast<int>(std::ceil(std::log10(high / low)));
  int const every = std::max(1, decades / 6);
  std::string out;
  for (int e = static_cast<int>(std::floor(std::log10(low))); e <= std::log10(high); ++e)
    for (int const m : {1, 2, 5})
      if (double const x = m * std::pow(10.0, e);
          x >= low && x <= high && (decades < 4 || (m == 1 && e % every == 0)))
        join(out, ", ", std::string("'") + number(x) + "' " + digits(x));
  if (double const middle = std::sqrt(low * high); out.empty())
    out = "'" + number(middle) + "' " + digits(middle);
  return out;
}

/// Text of a point: which model, which site, which value.
std::string point_text(result const& r, model_result const& m, std::string const& site,
                       std::string const& value) {
  return (r.models.size() > 1 ? html(m.label) + ", " : "") + html(site) + ": " + value;
}

std::string value_text(measured x) {
  std::string out = number(x, 4);
  return out[0] == '-' ? "−" + out.substr(1) : out;
}

/// Adjacent cosines, blocks × tokens; tokens next to each other share a column if there are many.
/// None of shards, whose tokens are not kept.
struct token_map {
  std::ptrdiff_t rows, columns;
  std::vector<double> values;  // rows × columns; NaN where there is none

  explicit token_map(model_result const& m)
      : rows(m.blocks()), columns(m.shards ? 0 : std::min<std::ptrdiff_t>(m.flow.tokens, 2048)) {
    std::ptrdiff_t const n = m.flow.tokens;
    for (auto const& block : m.flow.adjacent)
      for (std::ptrdiff_t c = 0; c < columns; ++c) {
        double sum = 0, count = 0;
        for (std::ptrdiff_t t = n * c / columns; t < n * (c + 1) / columns; ++t)
          if (double const x = block.per_token[static_cast<std::size_t>(t)]; std::isfinite(x))
            sum += x, ++count;
        values.push_back(sum / count);
      }
  }

  /// Where the colours should begin: they are for the bulk of the values, 5 % may lie below. None
  /// if there is no value.
  std::optional<double> low() const {
    std::vector<double> shown;
    for (double const x : values)
      if (std::isfinite(x)) shown.push_back(x);
    if (shown.empty()) return std::nullopt;
    auto const nth = shown.begin() + std::ssize(shown) / 20;
    std::nth_element(shown.begin(), nth, shown.end());
    return std::clamp(std::floor(*nth * 10) / 10, -1.0, 0.9);
  }
};

/// Ticks on whole numbers, ten at most.
std::string whole_ticks(std::ptrdiff_t count) {
  std::ptrdiff_t step = 1;
  for (std::ptrdiff_t decade = 1; count / step > 10; decade *= 10)
    for (std::ptrdiff_t const part : {1, 2, 5})
      if (step = part * decade; count / step <= 10) break;
  return "0, " + std::to_string(step);
}

/// @param low  the end of the ramp, the same for all models
std::string draw(token_map const& map, std::ptrdiff_t n, token_choice const& chosen, double low) {
  std::ptrdiff_t const rows = map.rows, columns = map.columns;
  // gnuplot draws no image of a single row or column: such a cell is halved.
  std::ptrdiff_t const down = rows == 1 ? 2 : 1, across = columns == 1 ? 2 : 1;
  std::string matrix;
  for (std::ptrdiff_t i = 0; i < rows * down; ++i)
    for (std::ptrdiff_t j = 0; j < columns * across; ++j) {
      double const x = map.values[static_cast<std::size_t>(i / down * columns + j / across)];
      matrix += std::isfinite(x) ? digits(x) : "nan";
      matrix += j + 1 < columns * across ? ' ' : '\n';
    }

  int const height = std::clamp(static_cast<int>(rows) * 8, 110, 420) + 70;
  figure f("Cosine of each token with itself one layer before", 2 * half_width, height);
  std::string palette;
  for (std::size_t i = 0; i < ramp.size(); ++i)
    join(palette, ", ", std::to_string(i) + " '" + hex(ramp[i]) + "'");
  f.set("palette defined (" + palette + ")");
  f.set("cbrange [" + digits(low) + ":1]");
  f.set("tics out");
  f.set("lmargin 7");
  // Where there is no value the image is transparent.
  f.set(std::string(
            "object 1 rectangle from graph 0,0 to graph 1,1 behind fs solid noborder fc rgb '") +
        hole_ink.script + "'");
  double const step = static_cast<double>(n) / static_cast<double>(columns * across);
  bool const one_run = chosen.runs.size() == 1;  // else numbers of the file would have gaps
  double const first = one_run ? static_cast<double>(chosen.runs.front().begin) : 0;
  f.set("xrange [" + digits(first - 0.5) + ":" + digits(first + static_cast<double>(n) - 0.5) +
        "]");
  f.set("yrange [0.5:" + digits(static_cast<double>(rows) + 0.5) + "]");
  f.set("xtics " + whole_ticks(n));
  f.set("ytics " + whole_ticks(rows));
  f.axis_label('x', one_run ? "token" : "token, of those that count");
  f.axis_label('y', "block");
  f.draw(f.data(matrix) + " matrix using (" + digits(first) + " + ($1 + 0.5)*" + digits(step) +
         " - 0.5):(0.5 + ($2 + 0.5)/" + std::to_string(down) + "):3 with image");
  return "<div class=\"wide\">" + f.render() + "</div>" +
         legend("≤ " + html_number(low, 2), "1",
                "no value" + (columns < n ? "; " + plural(n, "token") + " in " +
                                                std::to_string(columns) + " columns, each a mean"
                                          : ""));
}

}  // namespace

figures plot(result const& r, options const& asked) {
  figures out;
  auto const colour = [](std::size_t k) -> role const& { return series_ink[k]; };

  {
    figure f("Inter-token cosine by normalised layer index", half_width, 300);
    bool any = false, final_norm = false;
    for (std::size_t k = 0; k < r.models.size(); ++k) {
      model_result const& m = r.models[k];
      std::string rows;
      for (std::size_t l = 0; l < m.sites.size(); ++l)
        if (measured const x = m.flow.inter_token[l]; x.ok()) {
          rows += digits(m.position(l)) + " " + digits(x) + " " +
                  f.point(point_text(r, m, m.sites[l], value_text(x))) + "\n";
        } else {
          rows += "\n";  // a gap
        }
      if (rows.find(' ') != std::string::npos) f.curve(rows, colour(k)), any = true;
      if (m.final_inter_token.ok()) {
        std::string const name = f.data(
            "1.09 " + digits(m.final_inter_token) + " " +
            f.point(point_text(r, m, m.final_norm_name, value_text(m.final_inter_token))) + "\n");
        f.draw(name + " using 1:2:3 with labels hypertext point pt 13 ps 0.8 lc rgb '" +
               colour(k).script + "'");
        any = final_norm = true;
      }
    }
    f.set(final_norm ? "xrange [-0.02:1.13]" : "xrange [-0.02:1.02]");
    if (final_norm)
      f.set("arrow from 1.045, graph 0 to 1.045, graph 1 nohead dt 3 lc rgb '" +
            std::string(grid_ink.script) + "'");
    f.set("xtics (0, 0.2, 0.4, 0.6, 0.8, 1" + std::string(final_norm ? ", 'norm' 1.09)" : ")"));
    f.axis_label('x', "layer l/L");
    f.axis_label('y', "mean cosine between tokens");
    if (any) out["inter_token"] = f.render();
  }

  {
    figure f("Cosine between adjacent layers", half_width, 300);
    bool any = false;
    for (std::size_t k = 0; k < r.models.size(); ++k) {
      model_result const& m = r.models[k];
      std::string band, rows;
      for (std::size_t l = 0; l < m.flow.adjacent.size(); ++l) {
        auto const& pair = m.flow.adjacent[l];
        if (!pair.mean.ok()) {
          band += "\n", rows += "\n";
          continue;
        }
        std::string const x = digits(m.position(l + 1)) + " ";
        band += x + digits(std::max(-1.0, pair.mean - pair.stddev)) + " " +
                digits(std::min(1.0, pair.mean + pair.stddev)) + "\n";
        rows += x + digits(pair.mean) + " " +
                f.point(point_text(r, m, m.sites[l] + " → " + m.sites[l + 1],
                                   value_text(pair.mean) + " ± " + value_text(pair.stddev))) +
                "\n";
      }
      if (rows.find(' ') == std::string::npos) continue;
      any = true;
      f.draw(f.data(band) + " using 1:2:3 with filledcurves fs solid 0.18 noborder fc rgb '" +
             colour(k).script + "'");
      f.curve(rows, colour(k));
    }
    f.set("xrange [-0.02:1.02]");
    f.axis_label('x', "layer l/L");
    f.axis_label('y', "cosine with the layer before");
    if (any) out["adjacent"] = f.render();
  }

  if (!asked.labels.empty()) {
    figure f("Accuracy of a softmax probe by layer", half_width, 300);
    bool any = false, final_norm = false;
    std::vector<double> chances;
    for (std::size_t k = 0; k < r.models.size(); ++k) {
      model_result const& m = r.models[k];
      std::vector<std::string> const names = m.cka_sites();
      std::string band, rows;
      for (std::size_t l = 0; l < names.size(); ++l) {
        rflow::over_seeds const& a = m.probes->accuracy(static_cast<std::ptrdiff_t>(l));
        bool const chain = l < m.sites.size();
        if (!a.mean.ok()) {
          if (chain) band += "\n", rows += "\n";
          continue;
        }
        double const spread = a.spread.ok() ? a.spread.value : 0;
        std::string const text =
            value_text(a.mean) + (a.spread.ok() ? " ± " + value_text(a.spread) : "");
        std::string const point = f.point(point_text(r, m, names[l], text));
        if (chain) {
          std::string const x = digits(m.position(l)) + " ";
          band += x + digits(std::max(0.0, a.mean - spread)) + " " +
                  digits(std::min(1.0, a.mean + spread)) + "\n";
          rows += x + digits(a.mean) + " " + point + "\n";
        } else {
          f.draw(f.data("1.09 " + digits(a.mean) + " " + point + "\n") +
                 " using 1:2:3 with labels hypertext point pt 13 ps 0.8 lc rgb '" +
                 colour(k).script + "'");
          any = final_norm = true;
        }
      }
      if (rows.find(' ') != std::string::npos) {
        any = true;
        f.draw(f.data(band) + " using 1:2:3 with filledcurves fs solid 0.18 noborder fc rgb '" +
               colour(k).script + "'");
        f.curve(rows, colour(k));
      }
      if (m.probes->chance.ok() &&
          std::find(chances.begin(), chances.end(), m.probes->chance.value) == chances.end())
        chances.push_back(m.probes->chance);
    }
    for (double const chance : chances)
      f.draw(f.data("-0.02 " + digits(chance) + "\n" + (final_norm ? "1.13 " : "1.02 ") +
                    digits(chance) + "\n") +
             " using 1:2 with lines dt 3 lw 1.5 lc rgb '" + text_ink.script + "'");
    f.set(final_norm ? "xrange [-0.02:1.13]" : "xrange [-0.02:1.02]");
    f.set("yrange [0:1.02]");
    f.set("xtics (0, 0.2, 0.4, 0.6, 0.8, 1" + std::string(final_norm ? ", 'norm' 1.09)" : ")"));
    f.axis_label('x', "layer l/L");
    f.axis_label('y', "accuracy on held-out tokens");
    if (any) out["probe"] = f.render();
  }

  {
    std::vector<token_map> maps;
    std::optional<double> low;
    for (model_result const& m : r.models)
      if (auto const own = maps.emplace_back(m).low(); own && (!low || *own < *low)) low = own;
    for (std::size_t k = 0; k < r.models.size(); ++k)
      if (maps[k].low())
        out["tokens_" + std::to_string(k)] =
            draw(maps[k], r.models[k].flow.tokens, r.models[k].tokens, *low);
  }

  {
    figure f("St2 inside its Poincaré interval", 720, r.models.size() > 1 ? 130 : 100);
    bool any = false;
    double least = 0, most = 0;
    for (std::size_t k = 0; k < r.models.size(); ++k) {
      model_result const& m = r.models[k];
      auto const& v = m.flow.variance;
      if (!v.st2.ok() || !v.path_energy.ok() || !(v.st2 > 0)) continue;
      double const low = std::sqrt(m.st2_squared_bounds().lower),
                   high = std::sqrt(m.st2_squared_bounds().upper);
      if (!std::isfinite(high)) continue;
      std::string const y = std::to_string(r.models.size() - k);
      std::string const who = r.models.size() > 1 ? html(m.label) + ", " : "";
      auto const end_text = [&](char const* what, double x) { return who + what + value_text(x); };
      std::string const ends =
          f.data(digits(low) + " " + y + " " + f.point(end_text("lower bound: ", low)) + "\n" +
                 digits(high) + " " + y + " " + f.point(end_text("upper bound: ", high)) + "\n");
      std::string const middle =
          f.data(digits(v.st2) + " " + y + " " + f.point(who + "St2: " + value_text(v.st2)) + "\n");
      f.draw(ends + " using 1:2 with lines lw 4 lc rgb '" + colour(k).script + "'");
      f.draw(ends + " using 1:2:3 with labels hypertext point pt 5 ps 0.5 lc rgb '" +
             colour(k).script + "'");
      f.draw(middle + " using 1:2:3 with labels hypertext point pt 7 ps 1 lc rgb '" +
             colour(k).script + "'");
      least = any ? std::min(least, low) : low;
      most = any ? std::max(most, high) : high;
      any = true;
    }
    if (any) {
      f.set("logscale x");
      f.set("xrange [" + digits(least / 1.3) + ":" + digits(most * 1.3) + "]");
      f.set("yrange [0.3:" + digits(static_cast<double>(r.models.size()) + 0.7) + "]");
      f.set("border 1");
      f.set("xtics (" + logarithmic_ticks(least / 1.3, most * 1.3) + ")");
      f.set("ytics ('' 0)");
      f.set("grid xtics noytics lt 1 lc rgb '" + std::string(grid_ink.script) + "'");
      f.axis_label('x', "St2, logarithmic");
      out["poincare"] = "<div class=\"strip\">" + f.render() + "</div>";
    }
  }

  /// A curve over sites or blocks for each model.
  auto const curves = [&](char const* name, char const* label, char const* axis, bool positive,
                          std::vector<std::string> const& settings, auto&& values_of) {
    figure f(label, half_width, 260);
    bool any = false;
    double least = 0, most = 0;
    for (std::size_t k = 0; k < r.models.size(); ++k) {
      std::string rows;
      for (auto const& [position, value, site, unit] : values_of(r.models[k])) {
        if (!value.ok()) {
          rows += "\n";
          continue;
        }
        rows += digits(position) + " " + digits(value) + " " +
                f.point(point_text(r, r.models[k], site, value_text(value) + unit)) + "\n";
        least = any ? std::min(least, value.value) : value.value;
        most = any ? std::max(most, value.value) : value.value;
        any = true;
      }
      if (rows.find(' ') != std::string::npos) f.curve(rows, colour(k));
    }
    if (!any) return;
    f.set("xrange [-0.02:1.02]");
    f.axis_label('x', "layer l/L");
    bool const logarithmic = positive && least > 0 && most > 20 * least;
    f.axis_label('y', std::string(axis) + (logarithmic ? ", logarithmic" : ""));
    if (logarithmic)
      f.set("logscale y");
    else if (positive)
      f.set("yrange [0:*]");
    for (std::string const& s : settings) f.set(s);
    out[name] = f.render();
  };
  struct item {
    double position;
    measured value;
    std::string site, unit;
  };

  curves("steps", "Length of the step that each block makes", "step", true, {},
         [](model_result const& m) {
           std::vector<item> items;
           for (std::size_t l = 0; l < m.flow.variance.steps.size(); ++l)
             items.push_back({m.position(l + 1), m.flow.variance.steps[l],
                              m.sites[l] + " → " + m.sites[l + 1], ""});
           return items;
         });
  curves("curvature", "Angle between consecutive steps", "angle, degrees", false,
         {"yrange [0:180]", "ytics 45"}, [](model_result const& m) {
           std::vector<item> items;
           for (std::size_t l = 0; l < m.flow.variance.curvature.size(); ++l) {
             measured angle = m.flow.variance.curvature[l];
             if (angle.ok()) angle.value *= 57.29577951308232;
             items.push_back({m.position(l + 1), angle, "at " + m.sites[l + 1], "°"});
           }
           return items;
         });
  curves("norms", "Root mean square norm of the tokens", "norm of a token", true, {},
         [](model_result const& m) {
           std::vector<item> items;
           for (std::size_t l = 0; l < m.sites.size(); ++l)
             items.push_back({m.position(l), m.flow.rms_norm[l], m.sites[l], ""});
           return items;
         });
  if (asked.linear)
    curves("top_share", "Share of one token in the kernel matrix", "share of one token", false,
           {"yrange [0:1]"}, [](model_result const& m) {
             std::vector<item> items;
             for (std::size_t l = 0; l < m.sites.size(); ++l)
               items.push_back({m.position(l), m.cka.front().top_share[l], m.sites[l],
                                " (token " + std::to_string(m.cka.front().top_token[l]) + ")"});
             return items;
           });
  return out;
}

}  // namespace report
