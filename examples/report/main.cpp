// SPDX-License-Identifier: Apache-2.0
// rflow_report: how representations flow through a model, from a file of activations to a page.

#include <unistd.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "../common/cut_short.hpp"
#include "../common/progress_bar.hpp"
#include "load.hpp"
#include "measure.hpp"
#include "options.hpp"
#include "publish.hpp"
#include "shards.hpp"
#include "workers.hpp"
#include "write.hpp"

namespace {

using namespace report;

/// What is asked of the second model's shards.
options of_second(options const& asked) {
  options out = asked;
  out.inputs = asked.against;
  if (!out.checkpoint.empty()) out.checkpoint += ".against";
  return out;
}

/// Puts the second model beside the first.
void add_second(result& first, result const& second) {
  first.models.push_back(second.models.front());
  if (first.models[0].label == first.models[1].label)
    for (std::size_t k = 0; k < 2; ++k) first.models[k].label += " (" + std::to_string(k + 1) + ")";
  first.why_no_cross = "layers of two models are compared where each is in one file";
  find_order(first);
}

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
  options const second = of_second(asked);
  if (asked.shards) {
    double const models = asked.against.empty() ? 1 : 2;
    measured =
        measure_shards(asked, all, [&](double done, double total) { tell(done, models * total); });
    if (!asked.against.empty())
      add_second(measured, measure_shards(second, all, [&](double done, double total) {
                   tell(total + done, models * total);
                 }));
    for (std::size_t k = 0; k < asked.names.size(); ++k) measured.models[k].label = asked.names[k];
  } else {
    std::vector<capture> const captures = load_all(asked);
    measured = measure(captures, asked, tell);
  }
  all.together([&] {
    if (speaks) publish_report(asked, measured);
  });
  forget_checkpoint(asked, all);
  if (!asked.against.empty()) forget_checkpoint(second, all);
  return asked.strict && !measured.all_answered() ? 2 : 0;
}

/// One line on stderr, without memory of its own: there may be none.
void complain(char const* text) noexcept {
  common::detail::line_on_stderr line;
  line.add("rflow_report: ");
  line.add(text);
  line.write();
}
void complain(std::exception const& error) noexcept {
  bool const short_of_memory = dynamic_cast<std::bad_alloc const*>(&error) != nullptr ||
                               dynamic_cast<std::length_error const*>(&error) != nullptr;
  complain(short_of_memory ? "out of memory" : error.what());
}

/// Where an exception cannot be caught: memory that runs out in a destructor of the JSON library, say.
[[noreturn]] void give_up() noexcept {
  try {
    if (std::exception_ptr const error = std::current_exception()) std::rethrow_exception(error);
    complain("out of memory");
  } catch (std::exception const& error) {
    complain(error);
  } catch (...) {
    complain("an error without a name");
  }
  ::_exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  std::set_terminate(&give_up);
  common::tell_if_cut_short("rflow_report");
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
