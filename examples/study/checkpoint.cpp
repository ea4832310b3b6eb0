// SPDX-License-Identifier: Apache-2.0
// One or two models over given tokens, and the full report on them. The second may be the first with
// random weights: what training has made of an architecture.

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

#include "../common/progress_bar.hpp"
#include "../report/measure.hpp"
#include "../report/publish.hpp"
#include "../report/text.hpp"
#include "../report/write.hpp"
#include "study.hpp"

namespace study {
namespace {

/// The sites of one model, in memory.
struct activations {
  std::vector<models::matrix> sites;
  report::capture capture;
};

std::string hash_of(std::vector<std::int64_t> const& ids) {
  std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, over the bytes of the ids
  for (std::int64_t const id : ids)
    for (int byte = 0; byte < 8; ++byte)
      hash = (hash ^ ((static_cast<std::uint64_t>(id) >> (8 * byte)) & 255)) * 0x100000001b3u;
  char text[32];
  std::snprintf(text, sizeof text, "fnv1a-%016llx", static_cast<unsigned long long>(hash));
  return text;
}

std::unique_ptr<activations> run(std::string const& path, std::string const& label,
                                 models::architecture const& a, models::weight_source const& source,
                                 std::vector<std::int64_t> const& ids, models::team& threads) {
  auto out = std::make_unique<activations>();
  out->sites.reserve(static_cast<std::size_t>(models::blocks_of(a)) + 2);
  report::capture& c = out->capture;
  c.path = path;
  c.label = label;
  c.metadata = {{"model", label},
                {"architecture", models::name_of(a)},
                {"captured_with", "rflow_study " + report::version_text()},
                {"token_hash", hash_of(ids)}};
  models::forward(
      a, source, models::batch::one(ids), {threads},
      [&](models::site const& s, rflow::view<float> const& x) {
        out->sites.emplace_back(Eigen::Map<models::matrix const>(x.data, x.rows, x.cols));
        rflow::tensor const t{s.name(),
                              rflow::dtype::f32,
                              {x.rows, x.cols},
                              {x.cols, 1},
                              reinterpret_cast<std::byte const*>(out->sites.back().data())};
        if (s.is_final_norm())
          c.sites.final_norm = t;
        else
          c.sites.chain.push_back(t);
      });
  return out;
}

}  // namespace

int checkpoint(checkpoint_options const& asked) {
  std::vector<std::string> inputs = asked.folders;
  inputs.push_back(asked.ids);
  report::check_target(asked.output, asked.force, inputs);
  if (asked.folders.size() + (asked.against.empty() ? 0 : 1) > 2)
    throw std::invalid_argument("a report is on one model, or on two side by side");
  std::vector<std::int64_t> const ids = read_ids(asked.ids);
  models::team threads(thread_count(asked.threads));

  std::vector<std::unique_ptr<activations>> models_run;
  for (std::string const& folder : asked.folders) {
    models::architecture const a = find_model(folder);
    models::checkpoint weights(folder);
    models::require(a, weights);
    models::plain_norms const plain(weights);
    models::weight_source const& source =
        asked.plain_norms ? static_cast<models::weight_source const&>(plain) : weights;
    models_run.push_back(run(folder, label_of(folder) + (asked.plain_norms ? ", norms reset" : ""),
                             a, source, ids, threads));
  }
  if (!asked.against.empty()) {
    models::architecture const a = find_model(asked.folders.front());
    models::drawn_weights const weights(a, {find_scheme(asked.against), asked.seed});
    models_run.push_back(run("seed " + std::to_string(asked.seed),
                             label_of(asked.folders.front()) + ", random (" + asked.against + ")",
                             a, weights, ids, threads));
  }

  report::options options;
  options.inputs = inputs;
  options.output = asked.output;
  options.force = asked.force;
  options.plots = asked.plots;
  options.quiet = asked.quiet;
  options.threads = threads.size();
  std::vector<report::capture> captures;
  for (auto& m : models_run) captures.push_back(std::move(m->capture));
  common::progress_bar bar(!asked.quiet);
  report::result const measured =
      report::measure(captures, options, [&](double done, double total) { bar(done, total); });
  report::publish_report(options, measured);
  return 0;
}

}  // namespace study
