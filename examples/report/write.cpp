// SPDX-License-Identifier: Apache-2.0
#include "write.hpp"

#include <cstdio>

#include "publish.hpp"
#include "text.hpp"

namespace report {

void publish_report(options const& asked, result const& measured) {
  figures const plots = asked.plots ? plot(measured, asked) : figures{};

  std::map<std::string, std::string> texts = csv_files(measured);
  texts["metrics.json"] = metrics_json(measured, asked);
  std::map<std::string, array> const arrays = npy_files(measured, asked);
  std::vector<std::string> names;
  for (auto const& [name, text] : texts) names.push_back(name);
  for (auto const& [name, values] : arrays) names.push_back(name);
  texts["report.html"] = report_html(measured, asked, plots, names);

  std::string told;
  if (!asked.quiet) {
    std::string const page = (std::filesystem::path(asked.output) / "report.html").string();
    told = summary(measured, asked) + "report: " + one_line(page) + "\n";
  }

  publish(asked.output, asked.force, asked.files_read(),
          [&](std::filesystem::path const& folder) { write_files(folder, texts, arrays); });
  std::fwrite(told.data(), 1, told.size(), stdout);
}

}  // namespace report
