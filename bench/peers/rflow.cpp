// SPDX-License-Identifier: Apache-2.0

// rflow's side of the comparison: rflow_bench_peers FILE THREADS EPOCHS SEEDS LEARNING_RATE SHORT.
// Reads one task a line and answers with one line of JSON: seconds (the median over repetitions that
// take SHORT seconds together), values, and the peak of memory beyond what was there before.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <rflow/rflow.hpp>
#include <rflow/safetensors.hpp>
#include <rflow/sites.hpp>

#include "../floor.hpp"

namespace {

using values = std::vector<double>;

/// A line of /proc/self/status, in bytes.
std::int64_t status(std::string const& field) {
  std::ifstream lines("/proc/self/status");
  for (std::string line; std::getline(lines, line);)
    if (line.starts_with(field + ":")) return 1024 * std::stoll(line.substr(field.size() + 1));
  return 0;
}

std::vector<values> rows(rflow::cka_table const& table) {
  std::vector<values> out;
  for (std::ptrdiff_t i = 0; i < table.rows(); ++i) {
    out.emplace_back();
    for (std::ptrdiff_t j = 0; j < table.cols(); ++j) out.back().push_back(table(i, j));
  }
  return out;
}

/// What the processor does: multiply-adds and bytes read, a second.
nlohmann::json floor(int threads) {
  return {rflow::bench::fma_peak(threads), rflow::bench::read_bandwidth(threads)};
}

template <class T>
nlohmann::json answer(std::string const& task, rflow::layer_stack<T> const& stack,
                      std::span<std::int64_t const> labels, rflow::probe_options const& options,
                      rflow::on_cpu const& on) {
  if (task == "floor") return floor(on.thread_count());
  if (task == "cka debiased")
    return rows(rflow::cka_matrix(stack, rflow::linear{}, rflow::debiased{}, on));
  if (task == "cka biased")
    return rows(rflow::cka_matrix(stack, rflow::linear{}, rflow::biased{}, on));
  values out;
  if (task == "inter-token")
    for (std::ptrdiff_t l = 0; l < stack.sites(); ++l)
      out.push_back(rflow::inter_token_cosine(stack[l], on));
  else if (task == "adjacent")
    for (std::ptrdiff_t l = 0; l + 1 < stack.sites(); ++l)
      out.push_back(rflow::adjacent_cosine(stack[l], stack[l + 1], on).mean);
  else if (task == "flow")
    for (rflow::measured const& cosine : rflow::flow(stack, {}, on).inter_token)
      out.push_back(cosine);
  else if (task == "probe")
    out.push_back(rflow::probe(stack[stack.sites() / 2], labels, options, on).train_loss.mean);
  else
    throw std::invalid_argument("no such task: " + task);
  return out;
}

/// Touches every page, so that reading the file is not measured.
void read_through(rflow::tensor const& x) {
  unsigned char volatile sink = 0;
  for (rflow::tensor const& site : rflow::split_sites(x).chain) {
    std::span const bytes(reinterpret_cast<unsigned char const*>(site.data),
                          static_cast<std::size_t>(site.size()) * rflow::bits(site.type) / 8);
    for (std::size_t i = 0; i < bytes.size(); i += 4096) sink = bytes[i];
  }
  static_cast<void>(sink);
}

int serve(char** argv) {
  rflow::safetensors_file const file(argv[1]);
  rflow::on_cpu const on{.threads = std::stoi(argv[2])};
  rflow::tensor const activations = file["activations"], labels = file["labels"];
  std::span const y(reinterpret_cast<std::int64_t const*>(labels.data),
                    static_cast<std::size_t>(labels.shape[0]));
  // All tokens train from zero weights, so that one loss is right for everybody.
  rflow::probe_options const options{.epochs = std::stoi(argv[3]),
                                     .learning_rate = std::stod(argv[5]),
                                     .seeds = std::stoi(argv[4]),
                                     .validation_fraction = 0,
                                     .initial_weights = rflow::weights::zero{}};
  double const enough = std::stod(argv[6]);
  read_through(activations);
  rflow::site_set const sites = rflow::split_sites(activations);
  auto const work = [&](std::string const& task) {
    return sites.type() == rflow::dtype::bf16
               ? answer(task, sites.stack<rflow::bf16>(), y, options, on)
               : answer(task, sites.stack<float>(), y, options, on);
  };
  for (std::string task; std::getline(std::cin, task);) {
    nlohmann::json reply;
    try {
      std::ofstream("/proc/self/clear_refs") << "5";  // the peak starts from here
      std::int64_t const before = status("VmRSS");
      values seconds;
      for (double spent = 0; seconds.empty() || spent < enough; spent += seconds.back()) {
        double const start = rflow::bench::seconds();
        reply["values"] = work(task);
        seconds.push_back(rflow::bench::seconds() - start);
      }
      std::sort(seconds.begin(), seconds.end());
      std::size_t const n = seconds.size();
      reply["seconds"] = (seconds[(n - 1) / 2] + seconds[n / 2]) / 2;
      reply["bytes"] = status("VmHWM") - before;
    } catch (std::exception const& error) {
      reply = {{"failed", error.what()}};
    }
    std::cout << reply << std::endl;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--build") {
    std::cout << nlohmann::json{{"compiler", RFLOW_BENCH_COMPILER}, {"flags", RFLOW_BENCH_FLAGS}}
              << std::endl;
    return 0;
  }
  if (argc != 7) {
    std::cerr << "usage: rflow_bench_peers FILE THREADS EPOCHS SEEDS LEARNING_RATE SHORT\n";
    return 64;
  }
  try {
    return serve(argv);
  } catch (std::exception const& error) {
    std::cerr << "rflow_bench_peers: " << error.what() << '\n';
    return 1;
  }
}
