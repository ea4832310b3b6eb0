// SPDX-License-Identifier: Apache-2.0
#pragma once

// One figure, drawn by gnuplot's SVG terminal, with the colours and fonts of the page it stands in.
// gnuplot gets numbers only: names never enter a script.

#include <string>
#include <utility>
#include <vector>

namespace report {

// Colours by role. In scripts they are near-blacks that stand for the page's variables.
struct role {
  char const* script;
  char const* page;
};
inline constexpr role ink{"#010101", "var(--ink)"}, text_ink{"#020202", "var(--soft)"},
    grid_ink{"#030303", "var(--line)"}, hole_ink{"#0a0a0a", "var(--hole)"};
inline constexpr role series_ink[] = {{"#040404", "var(--a)"}, {"#050505", "var(--b)"},
                                      {"#060606", "var(--c)"}, {"#070707", "var(--d)"},
                                      {"#080808", "var(--e)"}, {"#090909", "var(--f)"}};

/// A number for gnuplot.
std::string digits(double x);

inline constexpr int half_width = 500;

/// One figure under construction: settings, data, what to plot, texts of its points.
class figure {
 public:
  figure(std::string label, int width, int height) : label_(std::move(label)) {
    script_ = "set terminal svg noenhanced font 'sans,13' size " + std::to_string(width) + "," +
              std::to_string(height) + "\n" +
              "set encoding utf8\nunset key\nunset colorbox\nset border 3 lc rgb '" + ink.script +
              "'\nset tics nomirror scale 0.5 textcolor rgb '" + text_ink.script +
              "'\nset grid ytics lt 1 lw 1 lc rgb '" + grid_ink.script + "'\n";
  }

  void set(std::string const& line) { script_ += "set " + line + "\n"; }
  void axis_label(char axis, std::string const& text) {  // text is ours, never the user's
    set(std::string(1, axis) + "label '" + text + "' textcolor rgb '" + text_ink.script + "'");
  }
  std::string point(std::string text) {
    hover_.push_back(std::move(text));
    return std::to_string(hover_.size() - 1);
  }
  /// A block of data, whose name is returned.
  std::string data(std::string const& rows) {
    std::string const name = "$d" + std::to_string(++blocks_);
    script_ += name + " << end_of_data\n" + rows + "end_of_data\n";
    return name;
  }
  void draw(std::string const& what) { plots_.push_back(what); }

  /// A curve with points that show their text.
  void curve(std::string const& rows, role const& colour, char const* point_type = "7") {
    std::string const name = data(rows);
    draw(name + " using 1:2 with lines lw 2 lc rgb '" + colour.script + "'");
    draw(name + " using 1:2:3 with labels hypertext point pt " + point_type + " ps 0.65 lc rgb '" +
         colour.script + "'");
  }

  /// The figure as a part of a page.
  /// @throws std::runtime_error if gnuplot is missing or fails
  std::string render() const;

 private:
  std::string label_, script_;
  std::vector<std::string> plots_, hover_;
  int blocks_ = 0;
};

}  // namespace report
