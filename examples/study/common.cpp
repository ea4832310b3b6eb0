// SPDX-License-Identifier: Apache-2.0
#include <rflow/npy.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <thread>

#include "../report/publish.hpp"
#include "../report/text.hpp"
#include "../report/write.hpp"
#include "study.hpp"

namespace study {

namespace fs = std::filesystem;

models::architecture find_model(std::string const& name) {
  if (name == "gpt-neo-2.7b") return models::gpt_neo::config{};
  if (name == "pythia-2.8b") return models::gpt_neox::config{};
  if (name == "mamba-2.8b") return models::mamba::config{};
  if (name == "mamba2-2.7b") return models::mamba2::config{};
  if (name == "mamba2-130m")
    return models::mamba2::config{.layers = 24, .hidden = 768, .heads = 24};
  std::error_code ignored;
  if (fs::is_directory(name, ignored)) return models::read_config(fs::path(name) / "config.json");
  if (fs::exists(name, ignored)) return models::read_config(name);
  throw std::invalid_argument(
      "model '" + name +
      "': neither gpt-neo-2.7b, pythia-2.8b, mamba-2.8b, mamba2-2.7b or mamba2-130m, nor a "
      "config.json or a folder with one");
}

std::string label_of(std::string const& name) {
  fs::path path = fs::path(name).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  if (path.filename() == "config.json" && path.has_parent_path()) path = path.parent_path();
  return path.filename().string();
}

models::scheme find_scheme(std::string const& name) {
  std::string known;
  for (auto const& [word, scheme] : models::scheme_names) {
    if (name == word) return scheme;
    known += (known.empty() ? "" : ", ") + std::string(word);
  }
  throw std::invalid_argument("scheme '" + name + "' is none of " + known);
}

std::vector<std::int64_t> read_ids(std::string const& path) {
  rflow::npy_file const file(path);
  if (file.array().rank() != 1)
    throw std::invalid_argument(path + ": one axis of token ids expected, found " +
                                file.array().description());
  return file.array().integers();
}

void publish(setting const& asked, std::vector<std::string> const& inputs,
             std::map<std::string, std::string> const& texts) {
  report::publish(asked.output, asked.force, inputs,
                  [&](fs::path const& folder) { report::write_files(folder, texts, {}); });
  if (!asked.quiet)
    std::printf("report: %s\n",
                report::one_line((fs::path(asked.output) / "report.html").string()).c_str());
}

int thread_count(int asked) {
  return asked > 0 ? asked : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace study
