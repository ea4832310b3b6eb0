// SPDX-License-Identifier: Apache-2.0
// rflow_report: how representations flow through a model, from a file of activations to a page.

#include <cstdio>
#include <exception>
#include <string>

#include "load.hpp"
#include "measure.hpp"
#include "options.hpp"
#include "progress_bar.hpp"
#include "publish.hpp"
#include "text.hpp"
#include "write.hpp"

namespace {

using namespace report;

int run(options const& asked) {
  check_target(asked.output, asked.force, asked.inputs);
  std::vector<capture> captures;
  for (std::string const& input : asked.inputs) captures.push_back(load(input, asked));

  progress_bar bar(!asked.quiet);
  result const measured =
      measure(captures, asked, [&](double done, double total) { bar(done, total); });
  figures const plots = asked.plots ? plot(measured, asked) : figures{};

  std::map<std::string, std::string> texts = csv_files(measured);
  texts["metrics.json"] = metrics_json(measured, asked);
  std::map<std::string, array> const arrays = npy_files(measured, asked);
  std::vector<std::string> names;
  for (auto const& [name, text] : texts) names.push_back(name);
  for (auto const& [name, values] : arrays) names.push_back(name);
  texts["report.html"] = report_html(measured, asked, plots, names);

  publish(asked.output, asked.force, asked.inputs,
          [&](std::filesystem::path const& folder) { write_files(folder, texts, arrays); });

  if (!asked.quiet) {
    std::string const page = (std::filesystem::path(asked.output) / "report.html").string();
    std::string const text = summary(measured, asked) + "report: " + one_line(page) + "\n";
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
  return asked.strict && !measured.all_answered() ? 2 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    auto const asked = report::parse(argc, argv);
    return asked ? run(*asked) : 0;
  } catch (std::exception const& error) {
    std::string const text = "rflow_report: " + report::one_line(error.what()) + "\n";
    std::fwrite(text.data(), 1, text.size(), stderr);
    return 1;
  }
}
