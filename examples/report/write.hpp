// SPDX-License-Identifier: Apache-2.0
#pragma once

// The files of a report. Each is made in memory first, so that whatever fails, fails before the
// folder is touched.

#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "measure.hpp"
#include "options.hpp"

namespace report {

/// Version of the layout of metrics.json (docs/metrics.schema.json). The first number changes when a
/// field is removed or changes its meaning, the second when one is added.
inline constexpr char const* schema_version = "2.2";

std::string version_text();

/// Indented, but with arrays of plain values on one line.
std::string json_text(nlohmann::ordered_json const& x);

/// Quoted for a CSV file. What a spreadsheet would take for a formula, because it begins with = + − @, a
/// tab or the end of a line, gets an apostrophe before it.
std::string csv_text(std::string const& text);

std::string metrics_json(result const& r, options const& asked);

/// File name and text of every CSV.
std::map<std::string, std::string> csv_files(result const& r);

/// An array for write_npy.
struct array {
  std::vector<double> values;
  std::vector<std::ptrdiff_t> shape;
};
/// File name and values of every .npy: CKA under the main estimator, linear kernel unless only RBF
/// was asked for; adjacent cosines of every token.
std::map<std::string, array> npy_files(result const& r, options const& asked);

/// Writes them into a folder.
void write_files(std::filesystem::path const& folder,
                 std::map<std::string, std::string> const& texts,
                 std::map<std::string, array> const& arrays);

/// A figure made by gnuplot, ready to stand inside HTML.
using figures = std::map<std::string, std::string>;
/// @throws std::runtime_error if gnuplot is missing or fails
figures plot(result const& r, options const& asked);

/// A page in the report's style: `main` inside, `scripts` after it. The title is HTML.
std::string html_page(std::string const& title, std::string const& program, std::string const& main,
                      std::string const& scripts = "");

std::string report_html(result const& r, options const& asked, figures const& plots,
                        std::vector<std::string> const& files);

/// What is printed at the end.
std::string summary(result const& r, options const& asked);

/// Makes all of the files, puts them into asked.output and says where they are.
void publish_report(options const& asked, result const& measured);

}  // namespace report
