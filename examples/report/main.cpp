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

int run(options const& asked, workers& all) {
  if (all.size() > 1 && !asked.shards)
    throw std::invalid_argument("several ranks share shards only: --shards");
  bool const speaks = all.rank() == 0;
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
