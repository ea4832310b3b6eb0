// SPDX-License-Identifier: Apache-2.0
// The random-initialisation study: models at any scale, schemes, controls, seeds. Each run streams
// through a flow_monitor; nothing but one block's weights and three layers of activations is kept.

#include <bench/floor.hpp>
#include <rflow/flow.hpp>
#include <rflow/init.hpp>
#include <rflow/monitor.hpp>

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
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

struct control {
  std::string name = "plain";
  bool normalise = true;
  double affine = 0;
  float embedding_scale = 1;
};

control find_control(std::string const& name) {
  if (name == "no_norm") return {name, false};
  if (name == "random_affine") return {name, true, 0.5};
  std::string const prefix = "embedding_";
  if (name.starts_with(prefix)) {
    std::size_t used = 0;
    float scale = 0;
    try {
      scale = std::stof(name.substr(prefix.size()), &used);
    } catch (std::exception const&) {
      used = 0;
    }
    if (used == name.size() - prefix.size() && scale > 0 && std::isfinite(scale))
      return {name, true, 0, scale};
  }
  throw std::invalid_argument("control '" + name +
                              "' is none of no_norm, random_affine, embedding_FACTOR");
}

/// The model with fractions of its blocks and of its hidden size; heads keep their width.
models::architecture scaled(models::architecture const& a, double depth, double width) {
  auto const part = [](integer n, double fraction) {
    return std::max<integer>(1, std::lround(static_cast<double>(n) * fraction));
  };
  models::architecture out = a;
  std::visit(
      [&](auto& c) {
        using config = std::decay_t<decltype(c)>;
        c.layers = part(c.layers, depth);
        if (width == 1) return;
        if constexpr (std::is_same_v<config, models::mamba::config>) {
          integer const expand = c.inner / c.hidden;
          c.hidden = 16 * part(c.hidden / 16, width);
          c.inner = expand * c.hidden;
          c.rank = (c.hidden + 15) / 16;
        } else {
          integer const heads = part(c.heads, width), before = c.hidden;
          c.hidden = c.hidden / c.heads * heads;
          if constexpr (std::is_same_v<config, models::mamba2::config>) {
            if (before % c.heads != 0 || heads % c.groups != 0)
              throw std::invalid_argument("--width: the heads of this model cannot be divided so");
          } else {
            c.inner = c.inner / before * c.hidden;
          }
          c.heads = heads;
        }
      },
      out);
  if (auto* const neo = std::get_if<models::gpt_neo::config>(&out))
    if (!neo->local.empty()) neo->local.resize(static_cast<std::size_t>(neo->layers));
  return out;
}

/// Room for a context: learned positions are drawn like everything else.
void make_room(models::architecture& a, integer tokens) {
  std::visit(
      [&](auto& c) {
        if constexpr (requires { c.positions; }) c.positions = std::max(c.positions, tokens);
      },
      a);
}

struct run_result {
  std::string model, scheme, control;
  std::uint64_t seed = 0;
  integer blocks = 0, hidden = 0, tokens = 0;
  bool state_space = false;
  rflow::flow_report flow;
  std::vector<measured> updates;  // inter-token cosine of block outputs minus inputs
  measured final_norm = rflow::status::not_requested;
  double seconds = 0, weights_seconds = 0, flops = 0;

  double position(std::size_t site) const {
    return static_cast<double>(site) / static_cast<double>(blocks);
  }
};

measured cosine_of(models::matrix const& x, rflow::on_cpu const& on) {
  std::vector<rflow::view<float>> const one{rflow::view<float>(x.data(), x.rows(), x.cols())};
  return rflow::flow(rflow::layer_stack<float>(one), {}, on).inter_token.front();
}

std::vector<std::int64_t> draw_ids(std::uint64_t seed, integer tokens, integer vocabulary) {
  std::vector<double> u(static_cast<std::size_t>(tokens));
  rflow::draw(rflow::uniform(0, 1), {seed, 0xffffffffu}, u.data(), 1, tokens, tokens, 1, 1);
  std::vector<std::int64_t> ids;
  for (double const x : u)
    ids.push_back(std::clamp<std::int64_t>(
        static_cast<std::int64_t>(x * static_cast<double>(vocabulary)), 0, vocabulary - 1));
  return ids;
}

run_result run_once(models::architecture const& a, models::drawing const& drawing, control const& c,
                    models::batch const& tokens, models::team& threads) {
  run_result out;
  out.control = c.name;
  out.seed = drawing.seed;
  out.blocks = models::blocks_of(a);
  out.hidden = models::hidden_of(a);
  out.tokens = tokens.tokens();
  out.state_space = models::name_of(a).starts_with("mamba");
  out.flops = 2 * models::block_parameters(a) * static_cast<double>(out.tokens);

  rflow::on_cpu const on{.threads = threads.size()};
  rflow::flow_monitor monitor(out.blocks + 1, out.hidden,
                              {.normalize = rflow::normalization::per_element}, on);
  monitor.reserve(out.tokens);
  models::matrix before, update;
  models::drawn_weights const weights(a, drawing);
  double const start = rflow::bench::seconds();
  models::timing const spent = models::forward(
      a, weights, tokens, {threads, {c.normalise, c.embedding_scale}},
      [&](models::site const& site, rflow::view<float> const& x) {
        Eigen::Map<models::matrix const> const now(x.data, x.rows, x.cols);
        if (site.is_final_norm()) {
          out.final_norm = cosine_of(now, on);
          return;
        }
        monitor.push(site.index, 0, x);
        if (site.index > 0) {
          update.resize(now.rows(), now.cols());
          models::over_rows(threads, now.rows(), [&](integer first, integer last) {
            update.middleRows(first, last - first) =
                now.middleRows(first, last - first) - before.middleRows(first, last - first);
          });
          out.updates.push_back(cosine_of(update, on));
        }
        before = now;
      });
  out.seconds = rflow::bench::seconds() - start;
  out.weights_seconds = spent.weights;
  monitor.end_sequence();
  out.flow = monitor.report().pooled;
  return out;
}

// ---- what comes out -----------------------------------------------------------------------------

json value_of(measured x) { return x.ok() && std::isfinite(x.value) ? json(x.value) : json(); }
json values_of(std::vector<measured> const& xs) {
  json out = json::array();
  for (measured const x : xs) out.push_back(value_of(x));
  return out;
}
std::string csv_value(measured x) { return x.ok() ? json(x.value).dump() : ""; }

struct machine {
  double peak = 0;  // fp32 flop/s of the threads used
  int threads = 0;
};

json to_json(run_result const& r, machine const& m) {
  std::vector<measured> adjacent;
  for (auto const& pair : r.flow.adjacent) adjacent.push_back(pair.mean);
  auto const& v = r.flow.variance;
  return {{"model", report::utf8(r.model)},
          {"kind", r.state_space ? "state_space" : "transformer"},
          {"scheme", r.scheme},
          {"control", r.control},
          {"seed", r.seed},
          {"blocks", r.blocks},
          {"hidden", r.hidden},
          {"tokens", r.tokens},
          {"inter_token", values_of(r.flow.inter_token)},
          {"inter_token_of_updates", values_of(r.updates)},
          {"inter_token_final_norm", value_of(r.final_norm)},
          {"adjacent_cosine", values_of(adjacent)},
          {"rms_norm", values_of(r.flow.rms_norm)},
          {"normalization", to_string(v.by)},
          {"st1", value_of(v.st1)},
          {"st2", value_of(v.st2)},
          {"st2_over_st1", v.st1.ok() && v.st2.ok() ? json(v.st2 / v.st1) : json()},
          {"seconds", r.seconds},
          {"seconds_for_weights", r.weights_seconds},
          {"flops", r.flops},
          {"share_of_peak", r.flops / r.seconds / m.peak}};
}

double memory_gib() {
  ::rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / (1 << 20);
}

using group_key = std::pair<std::string, std::string>;  // scheme, control

/// Runs of one model that differ in their seed.
using seeds = std::vector<run_result const*>;

std::map<group_key, std::vector<std::pair<std::string, seeds>>> grouped(
    std::vector<run_result> const& runs) {
  std::map<group_key, std::vector<std::pair<std::string, seeds>>> out;
  for (run_result const& r : runs) {
    auto& group = out[{r.scheme, r.control}];
    auto at = std::find_if(group.begin(), group.end(),
                           [&](auto const& entry) { return entry.first == r.model; });
    if (at == group.end()) at = group.insert(group.end(), {r.model, {}});
    at->second.push_back(&r);
  }
  return out;
}

rflow::running_stat over_seeds(seeds const& s,
                               std::vector<measured> const& (*of)(run_result const&),
                               std::size_t at) {
  rflow::running_stat out;
  for (run_result const* const r : s)
    if (measured const x = of(*r)[at]; x.ok()) out.add(x.value);
  return out;
}
std::vector<measured> const& states(run_result const& r) { return r.flow.inter_token; }
std::vector<measured> const& updates(run_result const& r) { return r.updates; }

/// The smallest l/L from which on the mean inter-token cosine stays above a half.
std::string homogeneous_from(seeds const& s) {
  std::size_t const sites = s.front()->flow.inter_token.size();
  std::size_t from = sites;
  for (std::size_t l = sites; l-- > 0;) {
    auto const x = over_seeds(s, states, l);
    if (!(x.count > 0 && x.mean > 0.5)) break;
    from = l;
  }
  return from == sites ? "never" : report::html_number(s.front()->position(from), 2);
}

char const swatches[] = "abcdef";

std::string legend(std::vector<std::string> const& models) {
  std::string out = "<p>";
  for (std::size_t k = 0; k < models.size(); ++k)
    out += std::string("<i class=\"swatch ") + swatches[k % 6] + "\"></i>" +
           report::html(models[k]) + " &nbsp; ";
  return out + "</p>\n";
}

std::string curves(std::vector<std::pair<std::string, seeds>> const& group,
                   std::vector<std::string> const& models, bool of_updates) {
  report::figure f(of_updates ? "Inter-token cosine of updates" : "Inter-token cosine",
                   report::half_width, 300);
  bool any = false;
  for (auto const& [model, s] : group) {
    auto const k =
        static_cast<std::size_t>(std::find(models.begin(), models.end(), model) - models.begin());
    report::role const& colour = report::series_ink[k % 6];
    std::string band, rows;
    std::size_t const count =
        of_updates ? s.front()->updates.size() : s.front()->flow.inter_token.size();
    for (std::size_t l = 0; l < count; ++l) {
      auto const x = over_seeds(s, of_updates ? updates : states, l);
      if (!(x.count > 0)) {
        rows += "\n", band += "\n";
        continue;
      }
      std::string const at = report::digits(s.front()->position(of_updates ? l + 1 : l)) + " ";
      band += at + report::digits(x.mean - x.stddev()) + " " + report::digits(x.mean + x.stddev()) +
              "\n";
      rows += at + report::digits(x.mean) + " " +
              f.point(report::html(model) + ", block " + std::to_string(of_updates ? l + 1 : l) +
                      ": " + report::number(x.mean, 4) + " ± " + report::number(x.stddev(), 2)) +
              "\n";
    }
    if (rows.find(' ') == std::string::npos) continue;
    any = true;
    f.draw(f.data(band) + " using 1:2:3 with filledcurves fs solid 0.18 noborder fc rgb '" +
           colour.script + "'");
    f.curve(rows, colour);
  }
  f.set("xrange [-0.02:1.02]");
  f.set("yrange [-0.1:1.05]");
  f.axis_label('x', "layer l/L");
  f.axis_label('y', of_updates ? "mean cosine between updates" : "mean cosine between tokens");
  return any ? f.render() : "";
}

std::string page(std::vector<run_result> const& runs, random_options const& asked, machine const& m,
                 std::vector<std::string> const& files) {
  std::vector<std::string> models;
  for (run_result const& r : runs)
    if (std::find(models.begin(), models.end(), r.model) == models.end()) models.push_back(r.model);
  std::string main =
      "<header>\n<p class=\"kind\">Representation flow</p>\n<h1>Random initialisation</h1>\n<p>" +
      report::plural(static_cast<std::ptrdiff_t>(models.size()), "model") + " · " +
      report::plural(runs.front().tokens, "token") + " · " + report::plural(asked.seeds, "seed") +
      " · mean and spread over seeds</p>\n</header>\n";
  for (auto const& [key, group] : grouped(runs)) {
    main += "<section>\n<h2>" + report::html(key.first) +
            (key.first == "gaussian" ? ", σ = " + report::html_number(asked.stddev) : "") +
            (key.second == "plain" ? "" : ", " + report::html(key.second)) + "</h2>\n" +
            legend(models);
    if (asked.plots) {
      main += "<div class=\"pair\">";
      for (bool const of_updates : {false, true})
        main += "<figure>\n<h3>" +
                std::string(of_updates ? "Updates of blocks" : "Residual stream") + "</h3>\n" +
                curves(group, models, of_updates) + "</figure>\n";
      main += "</div>\n";
    }
    main +=
        "<div class=\"scroll\"><table>\n<thead><tr><th>model</th><th>blocks × hidden</th>"
        "<th>inter-token cosine at l/L = 0</th><th>0.25</th><th>0.5</th><th>1</th>"
        "<th>above 0.5 from l/L</th><th>St1</th><th>St2</th></tr></thead>\n<tbody>\n";
    for (auto const& [model, s] : group) {
      run_result const& r = *s.front();
      main += "<tr><th>" + report::html(model) + "</th><td>" + std::to_string(r.blocks) + " × " +
              std::to_string(r.hidden) + "</td>";
      for (double const at : {0.0, 0.25, 0.5, 1.0}) {
        auto const l = static_cast<std::size_t>(std::lround(at * static_cast<double>(r.blocks)));
        auto const x = over_seeds(s, states, l);
        main += "<td>" +
                (x.count > 0 ? report::html_number(x.mean) + " <small>± " +
                                   report::html_number(x.stddev(), 1) + "</small>"
                             : report::html_number(r.flow.inter_token[l])) +
                "</td>";
      }
      rflow::running_stat st1, st2;
      for (run_result const* const each : s) {
        if (each->flow.variance.st1.ok()) st1.add(each->flow.variance.st1);
        if (each->flow.variance.st2.ok()) st2.add(each->flow.variance.st2);
      }
      main += "<td>" + homogeneous_from(s) + "</td>";
      for (auto const& x : {st1, st2})
        main += "<td>" + (x.count > 0 ? report::html_number(x.mean) : "–") + "</td>";
      main += "</tr>\n";
    }
    main += "</tbody>\n</table></div>\n</section>\n";
  }
  double flops = 0, seconds = 0, weights = 0;
  for (run_result const& r : runs)
    flops += r.flops, seconds += r.seconds, weights += r.weights_seconds;
  std::string links;
  for (std::string const& file : files)
    report::join(links, ", ", "<a href=\"" + file + "\">" + file + "</a>");
  main += "<section>\n<h2>How it was run</h2>\n<p>Token ids: " +
          (asked.ids.empty() ? "drawn uniformly from the vocabulary with each seed"
                             : report::html(asked.ids)) +
          ". St1 and St2 per token and feature. Biases 0, norms 1 and 0 unless a control says "
          "otherwise. " +
          report::html_number(flops / seconds * 1e-9) + " Gflop/s with " +
          report::plural(m.threads, "thread") + ", " +
          report::html_number(flops / seconds / m.peak) + " of the multiply-add peak; " +
          report::html_number(100 * weights / seconds, 2) +
          " % of the time went into drawing weights; " + report::html_number(memory_gib()) +
          " GiB at most.</p>\n<p>" + links + "</p>\n</section>\n" +
          "<footer>Made by rflow_study. What was found stands in docs/reproduction.md of "
          "rflow.</footer>\n";
  return report::html_page("Representation flow: random initialisation", "rflow_study", main);
}

std::map<std::string, std::string> tables(std::vector<run_result> const& runs, machine const& m) {
  std::string sites =
      "model,scheme,control,seed,site,position,inter_token_cosine,status,of_update,rms_norm\n";
  std::string all =
      "model,scheme,control,seed,blocks,hidden,tokens,st1,st2,final_norm_inter_token,seconds,"
      "seconds_for_weights,gflops,share_of_peak\n";
  for (run_result const& r : runs) {
    std::string const who = report::csv_text(r.model) + "," + r.scheme + "," + r.control + "," +
                            std::to_string(r.seed) + ",";
    for (std::size_t l = 0; l < r.flow.inter_token.size(); ++l) {
      measured const x = r.flow.inter_token[l];
      sites += who + (l == 0 ? "embed" : "block." + std::to_string(l)) + "," +
               json(r.position(l)).dump() + "," + csv_value(x) + "," +
               std::string(to_string(x.why)) + "," + (l > 0 ? csv_value(r.updates[l - 1]) : "") +
               "," + csv_value(r.flow.rms_norm[l]) + "\n";
    }
    all += who + std::to_string(r.blocks) + "," + std::to_string(r.hidden) + "," +
           std::to_string(r.tokens) + "," + csv_value(r.flow.variance.st1) + "," +
           csv_value(r.flow.variance.st2) + "," + csv_value(r.final_norm) + "," +
           json(r.seconds).dump() + "," + json(r.weights_seconds).dump() + "," +
           json(r.flops / r.seconds * 1e-9).dump() + "," +
           json(r.flops / r.seconds / m.peak).dump() + "\n";
  }
  return {{"sites.csv", sites}, {"runs.csv", all}};
}

}  // namespace

int random(random_options const& asked) {
  std::vector<std::string> inputs;
  if (!asked.ids.empty()) inputs.push_back(asked.ids);
  report::check_target(asked.output, asked.force, inputs);
  std::vector<std::pair<std::string, models::architecture>> chosen;
  for (std::string const& name : asked.models)
    chosen.emplace_back(label_of(name), scaled(find_model(name), asked.depth, asked.width));
  std::vector<std::pair<std::string, models::scheme>> schemes;
  for (std::string const& name : asked.schemes) schemes.emplace_back(name, find_scheme(name));
  std::vector<control> controls{control{}};
  for (std::string const& name : asked.controls) controls.push_back(find_control(name));
  std::vector<std::int64_t> const given =
      asked.ids.empty() ? std::vector<std::int64_t>{} : read_ids(asked.ids);

  models::team threads(thread_count(asked.threads));
  machine const m{rflow::bench::fma_peak(threads), threads.size()};
  std::vector<run_result> runs;
  for (auto& [label, architecture] : chosen) {
    make_room(architecture, given.empty() ? asked.tokens : static_cast<integer>(given.size()));
    for (auto const& [scheme_name, scheme] : schemes)
      for (control const& c : controls)
        for (int k = 0; k < asked.seeds; ++k) {
          std::uint64_t const seed = asked.first_seed + static_cast<std::uint64_t>(k);
          models::drawing const drawing{scheme, seed, asked.stddev, c.affine};
          auto const tokens = models::batch::one(
              given.empty() ? draw_ids(seed, asked.tokens, models::vocabulary_of(architecture))
                            : given);
          run_result r = run_once(architecture, drawing, c, tokens, threads);
          r.model = label;
          r.scheme = scheme_name;
          if (!asked.quiet)
            std::fprintf(stderr,
                         "%s, %s, %s, seed %llu: inter-token cosine %s → %s, %.1f s, %.2f of peak, "
                         "%.1f %% drawing\n",
                         report::one_line(label).c_str(), scheme_name.c_str(), c.name.c_str(),
                         static_cast<unsigned long long>(seed),
                         report::number(r.flow.inter_token.front()).c_str(),
                         report::number(r.flow.inter_token.back()).c_str(), r.seconds,
                         r.flops / r.seconds / m.peak, 100 * r.weights_seconds / r.seconds);
          runs.push_back(std::move(r));
        }
  }

  json data;
  data["schema"] = "rflow-random-study";
  data["schema_version"] = "1.0";
  data["program"] = {{"name", "rflow_study"}, {"version", report::version_text()}};
  data["options"] = {{"stddev", asked.stddev},
                     {"depth", asked.depth},
                     {"width", asked.width},
                     {"ids", asked.ids.empty() ? json() : json(report::utf8(asked.ids))}};
  data["machine"] = {{"threads", m.threads}, {"fma_peak", m.peak}, {"memory_gib", memory_gib()}};
  data["runs"] = json::array();
  for (run_result const& r : runs) data["runs"].push_back(to_json(r, m));
  std::map<std::string, std::string> texts = tables(runs, m);
  texts["study.json"] = report::json_text(data);
  std::vector<std::string> names;
  for (auto const& [name, text] : texts) names.push_back(name);
  texts["report.html"] = page(runs, asked, m, names);
  publish(asked, inputs, texts);
  return 0;
}

}  // namespace study
