// SPDX-License-Identifier: Apache-2.0
// From which layer can one read where the answer is? Many prompts run through a model; the last
// token's vector at each site is collected and a softmax regression finds the position of gold in it.
// The same run gives the flow within the prompts, so that context lengths can be compared.
//
// A prompt file is safetensors: ids (all tokens, one prompt after the other), offsets (where each
// begins, and the end), gold (its class) or another tensor of whole numbers that is asked for, such as
// answer, group (prompts of one context: never on both sides of a split). Metadata "task" and "pairs" or "documents" are shown.

#include <rflow/monitor.hpp>
#include <rflow/probe.hpp>
#include <rflow/safetensors.hpp>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "../report/figure.hpp"
#include "../report/publish.hpp"
#include "../report/text.hpp"
#include "../report/write.hpp"
#include "study.hpp"

namespace study {
namespace {

using json = nlohmann::ordered_json;
using models::integer;
using rflow::measured;

struct prompts {
  std::string label;
  models::batch tokens;
  std::vector<std::int64_t> gold, group;

  prompts(std::string const& path, std::string const& label_tensor) {
    rflow::safetensors_file const file(path);
    tokens.ids = file["ids"].integers();
    std::vector<std::int64_t> const offsets = file["offsets"].integers();
    tokens.offsets.assign(offsets.begin(), offsets.end());
    gold = file[label_tensor].integers();
    if (label_tensor != "gold") {  // any numbers: the classes are those that occur
      std::vector<std::int64_t> classes = gold;
      std::sort(classes.begin(), classes.end());
      classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
      for (std::int64_t& x : gold)
        x = std::lower_bound(classes.begin(), classes.end(), x) - classes.begin();
    }
    group = file["group"].integers();
    auto const fail = [&](std::string const& why) {
      throw std::invalid_argument(path + ": " + why);
    };
    if (tokens.offsets.size() < 2 || tokens.offsets.front() != 0 ||
        tokens.offsets.back() != tokens.tokens())
      fail("offsets do not go from 0 to the " + std::to_string(tokens.tokens()) + " ids");
    for (integer s = 0; s < tokens.sequences(); ++s)
      if (tokens.length(s) < 1) fail("prompt " + std::to_string(s) + " is empty");
    if (gold.size() != group.size() || static_cast<integer>(gold.size()) != tokens.sequences())
      fail(std::to_string(tokens.sequences()) + " prompts, " + std::to_string(gold.size()) +
           " labels, " + std::to_string(group.size()) + " groups");
    auto const& metadata = file.metadata();
    for (char const* key : {"task", "pairs", "documents"})
      if (auto const found = metadata.find(key); found != metadata.end())
        label += (label.empty() ? "" : " ") + found->second;
    if (label.empty()) label = label_of(path);
    if (label_tensor != "gold") label += ", " + label_tensor;
  }
};

struct outcome {
  std::string model, task;
  integer prompts = 0, classes = 0, blocks = 0;
  double mean_tokens = 0;
  rflow::layer_probes probes;
  rflow::probe_result final_norm;
  rflow::monitor_report flow;

  rflow::over_seeds const& last() const { return probes.accuracy(blocks); }
};

outcome measure(models::architecture const& a, models::weight_source const& source,
                prompts const& p, probe_options const& asked, models::team& threads) {
  constexpr integer chunk_tokens = 8192;
  outcome out;
  out.task = p.label;
  out.prompts = p.tokens.sequences();
  out.blocks = models::blocks_of(a);
  out.mean_tokens = static_cast<double>(p.tokens.tokens()) / static_cast<double>(out.prompts);
  integer const hidden = models::hidden_of(a);
  rflow::on_cpu const on{.threads = threads.size()}, alone{.threads = 1};
  rflow::monitor_options const monitoring{.normalize = rflow::normalization::per_element};
  using monitor = rflow::flow_monitor<float, rflow::on_cpu>;
  monitor total(out.blocks + 1, hidden, monitoring, alone);

  // sites × prompts × hidden, the final norm last
  std::vector<models::matrix> last(static_cast<std::size_t>(out.blocks) + 2,
                                   models::matrix(out.prompts, hidden));
  for (integer first = 0; first < out.prompts;) {
    integer end = first + 1;
    while (end < out.prompts &&
           p.tokens.offsets[static_cast<std::size_t>(end) + 1] - p.tokens.first(first) <=
               chunk_tokens)
      ++end;
    models::batch part;
    part.offsets = {0};
    for (integer s = first; s < end; ++s) {
      auto const begin = p.tokens.ids.begin() + p.tokens.first(s);
      part.ids.insert(part.ids.end(), begin, begin + p.tokens.length(s));
      part.offsets.push_back(part.tokens());
    }
    std::vector<std::unique_ptr<monitor>> each;
    for (integer s = first; s < end; ++s)
      each.push_back(std::make_unique<monitor>(out.blocks + 1, hidden, monitoring, alone));
    try {
      models::forward(a, source, part, {threads}, [&](models::site const& s, auto const& x) {
        Eigen::Map<models::matrix const> const rows(x.data, x.rows, x.cols);
        threads.run(end - first, [&](integer i) {
          last[static_cast<std::size_t>(s.index)].row(first + i) = rows.row(part.first(i + 1) - 1);
          if (!s.is_final_norm())
            each[static_cast<std::size_t>(i)]->push(
                s.index, 0,
                rflow::view<float>(rows.row(part.first(i)).data(), part.length(i), hidden));
        });
      });
    } catch (std::invalid_argument const& error) {
      throw std::invalid_argument(std::string(error.what()) + " (prompts " + std::to_string(first) +
                                  " to " + std::to_string(end - 1) + " of " + p.label + ")");
    }
    for (auto const& m : each) {
      m->end_sequence();
      total.merge(*m);
    }
    first = end;
  }
  out.flow = total.report();

  rflow::probe_options options;
  options.epochs = asked.epochs;
  options.learning_rate = asked.rate;
  options.seeds = asked.seeds;
  options.validation_fraction = asked.validation;
  options.groups = p.group;
  std::vector<rflow::view<float>> chain;
  std::vector<std::string> names;
  for (integer l = 0; l <= out.blocks; ++l) {
    auto const& x = last[static_cast<std::size_t>(l)];
    chain.emplace_back(x.data(), x.rows(), x.cols());
    names.push_back(models::site{l, out.blocks}.name());
  }
  out.probes = rflow::probe_layers(rflow::layer_stack<float>(chain, names), p.gold, options, on);
  std::vector<rflow::view<float>> const norm{
      {last.back().data(), last.back().rows(), last.back().cols()}};
  out.final_norm =
      rflow::probe_layers(rflow::layer_stack<float>(norm), p.gold, options, on).layers.front();
  out.classes = out.final_norm.classes;
  return out;
}

json value_of(measured x) { return x.ok() ? json(x.value) : json(); }
json pair_of(rflow::over_seeds const& x) {
  return {{"mean", value_of(x.mean)}, {"spread", value_of(x.spread)}};
}
json stat_of(rflow::running_stat const& x) {
  return x.count > 0 ? json{{"mean", x.mean}, {"spread", x.stddev()}} : json();
}

rflow::over_seeds const& norm_accuracy(outcome const& o) {
  return o.final_norm.validation_accuracy.mean.why == rflow::status::not_requested
             ? o.final_norm.train_accuracy
             : o.final_norm.validation_accuracy;
}

json to_json(outcome const& o) {
  json accuracy = json::array(), inter = json::array(), adjacent = json::array();
  for (integer l = 0; l <= o.blocks; ++l) {
    accuracy.push_back(pair_of(o.probes.accuracy(l)));
    inter.push_back(stat_of(o.flow.per_sequence.inter_token[static_cast<std::size_t>(l)]));
    if (l < o.blocks)
      adjacent.push_back(stat_of(o.flow.per_sequence.adjacent[static_cast<std::size_t>(l)]));
  }
  return {{"model", report::utf8(o.model)},
          {"task", report::utf8(o.task)},
          {"prompts", o.prompts},
          {"mean_tokens", o.mean_tokens},
          {"classes", o.classes},
          {"chance", value_of(o.probes.chance)},
          {"best_site", o.probes.best},
          {"best", o.probes.best < 0 ? json() : pair_of(o.probes.accuracy(o.probes.best))},
          {"last", pair_of(o.last())},
          {"drop", value_of(o.probes.drop)},
          {"final_norm", pair_of(norm_accuracy(o))},
          {"accuracy", accuracy},
          {"inter_token", inter},
          {"adjacent_cosine", adjacent},
          {"st1", stat_of(o.flow.per_sequence.st1)},
          {"st2", stat_of(o.flow.per_sequence.st2)}};
}

std::string percent(measured x) {
  return x.ok() ? report::html_number(100 * x.value, 3) : report::html_number(x);
}

std::string page(std::vector<outcome> const& all, probe_options const& asked) {
  std::string main =
      "<header>\n<p class=\"kind\">Representation flow</p>\n<h1>Where is the answer?</h1>\n"
      "<p>Softmax probes on the last token, layer by layer; accuracy on held-out contexts in per "
      "cent, mean over " +
      report::plural(asked.seeds, "seed") +
      ".</p>\n</header>\n<section>\n<h2>Best layer and last</h2>\n" +
      "<div class=\"scroll\"><table>\n<thead><tr><th>model</th><th>task</th><th>tokens</th>"
      "<th>chance</th><th>best layer</th><th>accuracy there</th><th>last block</th>"
      "<th>drop</th><th>after the final norm</th><th>St1</th><th>St2</th></tr></thead>\n<tbody>\n";
  for (outcome const& o : all) {
    auto const stat = [](rflow::running_stat const& x) {
      return x.count > 0 ? report::html_number(x.mean) : std::string("–");
    };
    main +=
        "<tr><th>" + report::html(o.model) + "</th><td>" + report::html(o.task) + "</td><td>" +
        report::html_number(o.mean_tokens) + "</td><td>" + percent(o.probes.chance) + "</td><td>" +
        (o.probes.best < 0
             ? std::string("–")
             : std::to_string(o.probes.best) + " of " + std::to_string(o.blocks) +
                   "</td><td class=\"value\">" + percent(o.probes.accuracy(o.probes.best).mean)) +
        "</td><td>" + percent(o.last().mean) + "</td><td>" + percent(o.probes.drop) + "</td><td>" +
        percent(norm_accuracy(o).mean) + "</td><td>" + stat(o.flow.per_sequence.st1) + "</td><td>" +
        stat(o.flow.per_sequence.st2) + "</td></tr>\n";
  }
  main += "</tbody>\n</table></div>\n</section>\n";
  if (asked.plots) {
    std::vector<std::string> tasks;
    for (outcome const& o : all)
      if (std::find(tasks.begin(), tasks.end(), o.task) == tasks.end()) tasks.push_back(o.task);
    for (std::string const& task : tasks) {
      std::string legend, charts;
      for (int const what : {0, 1}) {
        report::figure f(what == 0 ? "Probe accuracy by layer" : "Inter-token cosine by layer",
                         report::half_width, 300);
        bool any = false;
        std::size_t k = 0;
        for (outcome const& o : all) {
          if (o.task != task) continue;
          std::string rows;
          for (integer l = 0; l <= o.blocks; ++l) {
            auto const& inter = o.flow.per_sequence.inter_token[static_cast<std::size_t>(l)];
            measured const x = what == 0         ? o.probes.accuracy(l).mean
                               : inter.count > 0 ? measured(inter.mean)
                                                 : measured(rflow::status::too_few_rows);
            double const at = static_cast<double>(l) / static_cast<double>(o.blocks);
            rows += x.ok() ? report::digits(at) + " " + report::digits(x) + " " +
                                 f.point(report::html(o.model) + ", " +
                                         models::site{l, o.blocks}.name() + ": " +
                                         report::number(x, 4)) +
                                 "\n"
                           : "\n";
          }
          if (what == 0)
            legend += std::string("<i class=\"swatch ") + "abcdef"[k % 6] + "\"></i>" +
                      report::html(o.model) + " &nbsp; ";
          if (rows.find(' ') != std::string::npos)
            f.curve(rows, report::series_ink[k % 6]), any = true;
          ++k;
        }
        f.set("xrange [-0.02:1.02]");
        f.set(what == 0 ? "yrange [0:1.02]" : "yrange [*:1.02]");
        f.axis_label('x', "layer l/L");
        f.axis_label('y', what == 0 ? "accuracy" : "mean cosine between tokens");
        if (any) charts += "<figure>" + f.render() + "</figure>\n";
      }
      main += "<section>\n<h2>" + report::html(task) + "</h2>\n<p>" + legend +
              "</p>\n<div class=\"pair\">" + charts + "</div>\n</section>\n";
    }
  }
  main += "<footer>Made by rflow_study: table.csv and study.json hold the numbers.</footer>\n";
  return report::html_page("Representation flow: probes", "rflow_study", main);
}

std::string table(std::vector<outcome> const& all) {
  std::string out = "model,task,prompts,mean_tokens,site,position,accuracy,spread,inter_token\n";
  auto const number = [](measured x) { return x.ok() ? json(x.value).dump() : ""; };
  for (outcome const& o : all)
    for (integer l = 0; l <= o.blocks + 1; ++l) {
      rflow::over_seeds const& x = l <= o.blocks ? o.probes.accuracy(l) : norm_accuracy(o);
      out += report::csv_text(o.model) + "," + report::csv_text(o.task) + "," +
             std::to_string(o.prompts) + "," + json(o.mean_tokens).dump() + "," +
             models::site{l, o.blocks}.name() + "," +
             (l <= o.blocks ? json(static_cast<double>(l) / static_cast<double>(o.blocks)).dump()
                            : "") +
             "," + number(x.mean) + "," + number(x.spread) + "," +
             (l <= o.blocks
                  ? json(o.flow.per_sequence.inter_token[static_cast<std::size_t>(l)].mean).dump()
                  : "") +
             "\n";
    }
  return out;
}

}  // namespace

int probe(probe_options const& asked) {
  std::vector<std::string> inputs = asked.folders;
  inputs.insert(inputs.end(), asked.prompts.begin(), asked.prompts.end());
  report::check_target(asked.output, asked.force, inputs);
  std::vector<prompts> tasks;
  for (std::string const& path : asked.prompts) tasks.emplace_back(path, asked.label);
  models::team threads(thread_count(asked.threads));
  std::vector<outcome> all;
  auto const add = [&](std::string const& label, models::architecture const& a,
                       models::weight_source const& source) {
    for (prompts const& p : tasks) {
      all.push_back(measure(a, source, p, asked, threads));
      all.back().model = label;
      if (!asked.quiet)
        std::fprintf(stderr, "%s, %s: best layer %td of %td, drop %s\n",
                     report::one_line(label).c_str(), report::one_line(p.label).c_str(),
                     all.back().probes.best, all.back().blocks,
                     report::number(all.back().probes.drop).c_str());
    }
  };
  for (std::string const& folder : asked.folders) {
    models::architecture const a = find_model(folder);
    models::checkpoint weights(folder);
    models::require(a, weights);
    add(label_of(folder), a, weights);
    if (!asked.against.empty())
      add(label_of(folder) + ", random (" + asked.against + ")", a,
          models::drawn_weights(a, {find_scheme(asked.against), asked.seed}));
  }
  json data;
  data["schema"] = "rflow-probe-study";
  data["schema_version"] = "1.0";
  data["program"] = {{"name", "rflow_study"}, {"version", report::version_text()}};
  data["options"] = {{"epochs", asked.epochs},
                     {"learning_rate", asked.rate},
                     {"seeds", asked.seeds},
                     {"validation_fraction", asked.validation},
                     {"label", asked.label}};
  data["runs"] = json::array();
  for (outcome const& o : all) data["runs"].push_back(to_json(o));
  std::map<std::string, std::string> const texts{{"study.json", report::json_text(data)},
                                                 {"table.csv", table(all)},
                                                 {"report.html", page(all, asked)}};
  publish(asked, inputs, texts);
  return 0;
}

}  // namespace study
