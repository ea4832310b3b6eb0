// SPDX-License-Identifier: Apache-2.0
// rflow_report: how representations flow through a model, from a file of activations to a page.

#include <cstdio>
#include <exception>
#include <string>

#include "../common/progress_bar.hpp"
#include "load.hpp"
#include "measure.hpp"
#include "options.hpp"
#include "publish.hpp"
#include "shards.hpp"
#include "text.hpp"
#include "workers.hpp"
#include "write.hpp"

namespace {

using namespace report;

/// Writes the report and says where it is.
void publish_report(options const& asked, result const& measured) {
  figures const plots = asked.plots ? plot(measured, asked) : figures{};

  std::map<std::string, std::string> texts = csv_files(measured);
  texts["metrics.json"] = metrics_json(measured, asked);
  std::map<std::string, array> const arrays = npy_files(measured, asked);
  std::vector<std::string> names;
  for (auto const& [name, text] : texts) names.push_back(name);
  for (auto const& [name, values] : arrays) names.push_back(name);
  texts["report.html"] = report_html(measured, asked, plots, names);

  publish(asked.output, asked.force, asked.files_read(),
          [&](std::filesystem::path const& folder) { write_files(folder, texts, arrays); });

  if (!asked.quiet) {
    std::string const page = (std::filesystem::path(asked.output) / "report.html").string();
    std::string const text = summary(measured, asked) + "report: " + one_line(page) + "\n";
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
}

int run(options const& asked, workers& all) {
  if (all.size() > 1 && !asked.shards)
    throw std::invalid_argument("several ranks share shards only: --shards");
  bool const speaks = all.rank() == 0;
  limit_memory(asked);
  all.together([&] {
    if (speaks) check_target(asked.output, asked.force, asked.files_read());
  });
  common::progress_bar bar(speaks && !asked.quiet);
  auto const tell = [&](double done, double total) { bar(done, total); };
  result measured;
  if (asked.shards) {
    measured = measure_shards(asked, all, tell);
    if (!asked.names.empty()) measured.models.front().label = asked.names.front();
  } else {
    std::vector<capture> const captures = load_all(asked);
    measured = measure(captures, asked, tell);
  }
  all.together([&] {
    if (speaks) publish_report(asked, measured);
  });
  forget_checkpoint(asked, all);
  return asked.strict && !measured.all_answered() ? 2 : 0;
}

void complain(std::exception const& error) {
  std::string const text = "rflow_report: " + one_line(error.what()) + "\n";
  std::fwrite(text.data(), 1, text.size(), stderr);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    auto const all = report::join_workers(argc, argv);
    try {
      auto const asked = report::parse(argc, argv);
      return asked ? run(*asked, *all) : 0;
    } catch (std::exception const& error) {
      complain(error);
      return 1;
    }
  } catch (std::exception const& error) {
    complain(error);
    return 1;
  }
}
