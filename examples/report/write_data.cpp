// SPDX-License-Identifier: Apache-2.0
// metrics.json, the CSV files and the arrays.

#include <rflow/npy.hpp>

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "publish.hpp"
#include "text.hpp"
#include "write.hpp"

namespace report {
namespace {

using json = nlohmann::ordered_json;
using rflow::measured;

json value_of(measured x) {
  x = finite(x);
  return x.ok() ? json(x.value) : json();
}

json scalar(measured x) { return {{"value", value_of(x)}, {"status", to_string(finite(x).why)}}; }

json series(std::vector<measured> const& xs) {
  json values = json::array(), statuses = json::array();
  for (measured const x : xs) {
    values.push_back(value_of(x));
    statuses.push_back(to_string(x.why));
  }
  return {{"values", std::move(values)}, {"status", std::move(statuses)}};
}

measured square(measured x) { return x.ok() ? measured(x.value * x.value) : x; }

/// Text that print() takes as it is. Tables of many sites are kept so: as JSON values a cell would
/// take ten times the memory.
json as_text(std::string const& text, bool one_line) {
  std::vector<std::uint8_t> bytes(text.begin(), text.end());
  return one_line ? json::binary(std::move(bytes), 1) : json::binary(std::move(bytes));
}

/// cell(i, j) in rows, a line each.
template <class F>
json table(std::ptrdiff_t rows, std::ptrdiff_t cols, F const& cell) {
  std::string out;
  for (std::ptrdiff_t i = 0; i < rows; ++i) {
    json row = json::array();
    for (std::ptrdiff_t j = 0; j < cols; ++j) row.push_back(cell(i, j));
    out += row.dump() + "\n";
  }
  return as_text(out, false);
}

json grid(cka_grid const& g) {
  using at = std::ptrdiff_t;
  return {
      {"values", table(g.rows, g.cols, [&](at i, at j) { return value_of(g.at(i, j)); })},
      {"status",
       table(g.rows, g.cols, [&](at i, at j) { return json(to_string(g.at(i, j).why)); })},
      {"chance", table(g.rows, g.cols, [&](at i, at j) { return value_of(g.chance_at(i, j)); })}};
}

/// One value a cell, in rows; null where there is none.
json table(std::vector<measured> const& values, std::ptrdiff_t cols) {
  return table(std::ssize(values) / cols, cols, [&](std::ptrdiff_t i, std::ptrdiff_t j) {
    return value_of(values[static_cast<std::size_t>(i * cols + j)]);
  });
}

json cka(cka_result const& c, options const& asked, std::vector<std::string> const& rows,
         std::vector<std::string> const& cols) {
  json out;
  out["kernel"] = c.kernel;
  out["fraction"] = c.kernel == "rbf" ? json(asked.rbf_fraction) : json();
  out["rows"] = rows;
  out["columns"] = cols;
  out["debiased"] = grid(c.debiased);
  out["biased"] = grid(c.biased);
  out["sigma"] = series(c.sigma);
  json share = series(c.top_share), tokens = json::array();
  for (std::ptrdiff_t const token : c.top_token) tokens.push_back(token < 0 ? json() : json(token));
  share["token"] = std::move(tokens);
  out["top_token_share"] = std::move(share);
  if (!c.p_value.empty())
    out["significance"] = {
        {"score", table(c.score, c.debiased.cols)},
        {"p_value", table(c.p_value, c.debiased.cols)},
        {"status", table(c.debiased.rows, c.debiased.cols, [&](std::ptrdiff_t i, std::ptrdiff_t j) {
           return json(to_string(c.p_value[static_cast<std::size_t>(i * c.debiased.cols + j)].why));
         })}};
  if (!c.shift_p_value.empty()) {
    json statuses = json::array();
    for (std::size_t k = 0; k < c.shift_p_value.size(); ++k) {
      if (k % static_cast<std::size_t>(c.debiased.cols) == 0) statuses.push_back(json::array());
      statuses.back().push_back(to_string(c.shift_p_value[k].why));
    }
    out["shift_significance"] = {{"least", 1 / static_cast<double>(c.tokens)},
                                 {"p_value", table(c.shift_p_value, c.debiased.cols)},
                                 {"status", std::move(statuses)}};
  }
  return out;
}

std::vector<std::string> utf8(std::vector<std::string> names) {
  for (std::string& name : names) name = report::utf8(name);
  return names;
}

json probe(rflow::layer_probes const& p, probe_classes const& c,
           std::vector<std::string> const& sites) {
  auto const both = [&](rflow::over_seeds rflow::probe_result::*which) {
    std::vector<measured> mean, spread;
    for (rflow::probe_result const& layer : p.layers) {
      mean.push_back((layer.*which).mean);
      spread.push_back((layer.*which).spread);
    }
    return json{{"mean", series(mean)}, {"spread", series(spread)}};
  };
  return {{"classes", p.layers.front().classes},
          {"labels", report::utf8(c.from)},
          {"class_names", c.names},
          {"class_tokens", c.tokens},
          {"left_out", c.left_out},
          {"chance", scalar(p.chance)},
          {"rows", sites},
          {"accuracy", both(&rflow::probe_result::validation_accuracy)},
          {"train_accuracy", both(&rflow::probe_result::train_accuracy)},
          {"loss", both(&rflow::probe_result::validation_loss)},
          {"train_loss", both(&rflow::probe_result::train_loss)},
          {"mean_distance", both(&rflow::probe_result::mean_distance)},
          {"best", p.best < 0 ? json() : json(sites[static_cast<std::size_t>(p.best)])},
          {"drop", scalar(p.drop)}};
}

json over_sequences(rflow::running_stat const& s) {
  return {{"mean", s.count > 0 ? value_of(s.mean) : json()},
          {"stddev", s.count > 0 ? value_of(s.stddev()) : json()},
          {"sequences", static_cast<std::ptrdiff_t>(s.count)}};
}

json over_sequences(std::vector<rflow::running_stat> const& stats) {
  json mean = json::array(), stddev = json::array(), count = json::array();
  for (rflow::running_stat const& s : stats) {
    mean.push_back(s.count > 0 ? value_of(s.mean) : json());
    stddev.push_back(s.count > 0 ? value_of(s.stddev()) : json());
    count.push_back(static_cast<std::ptrdiff_t>(s.count));
  }
  return {{"mean", as_text(mean.dump(), true)},
          {"stddev", as_text(stddev.dump(), true)},
          {"sequences", as_text(count.dump(), true)}};
}

/// Each sequence by itself; the CKA of those of minibatch CKA alone.
json per_sequence(rflow::sequence_figures const& figures) {
  return {{"inter_token_cosine", over_sequences(figures.inter_token)},
          {"adjacent_cosine", over_sequences(figures.adjacent)},
          {"rms_norm", over_sequences(figures.rms_norm)},
          {"st1", over_sequences(figures.st1)},
          {"st2", over_sequences(figures.st2)},
          {"path_energy", over_sequences(figures.path_energy)},
          {"path_length", over_sequences(figures.path_length)},
          {"steps", over_sequences(figures.steps)},
          {"curvature", over_sequences(figures.curvature)}};
}

json shards(model_result const& m, options const& asked) {
  shard_facts const& s = *m.shards;
  std::vector<std::string> files;
  for (std::string const& path : asked.inputs) files.push_back(report::utf8(path));
  json pairs = json::array();  // of minibatch CKA alone
  std::vector<rflow::running_stat> const& cka = m.per_sequence.cka;
  std::size_t const sites = m.sites.size();
  for (std::size_t i = 0; i < sites && !cka.empty(); ++i)
    pairs.push_back(over_sequences({cka.begin() + static_cast<std::ptrdiff_t>(i * sites),
                                    cka.begin() + static_cast<std::ptrdiff_t>((i + 1) * sites)}));
  json by_sequence = per_sequence(m.per_sequence);
  by_sequence["cka"] = std::move(pairs);
  return {{"files", files},
          {"sequences", m.tokens.sequences()},
          {"cka", asked.minibatch_cka ? json{{"estimator", "minibatch"},
                                             {"batch", asked.cka_batch},
                                             {"batches", s.batches},
                                             {"left_out", s.left_out}}
                                      : json()},
          {"per_sequence", std::move(by_sequence)}};
}

json tokens(model_result const& m, options const& asked) {
  json reasons = json::array();
  for (left_out const& r : m.tokens.reasons)
    reasons.push_back({{"why", report::utf8(r.why)}, {"tokens", r.tokens}});
  return {{"stored", m.tokens.stored},
          {"skip_first", asked.skip_first},
          {"used", m.flow.tokens},
          {"left_out", std::move(reasons)}};
}

json sequences(model_result const& m) {
  return {{"count", m.tokens.sequences()},
          {"from",
           m.tokens.sequences_from.empty() ? json() : json(report::utf8(m.tokens.sequences_from))},
          {"per_sequence", m.in_sequences() ? per_sequence(m.per_sequence) : json()}};
}

json headline_numbers(headline const& h) {
  auto const cka = [](headline_cka const& c) {
    return json{{"first_to_last", scalar(c.first_to_last)}, {"adjacent", series(c.adjacent)}};
  };
  return {
      {"tokens", h.tokens},
      {"inter_token_cosine", series(h.inter_token)},
      {"st1", scalar(h.st1)},
      {"st2", scalar(h.st2)},
      {"cka", {{"kernel", h.kernel}, {"debiased", cka(h.debiased)}, {"biased", cka(h.biased)}}}};
}

json outliers(outlier_facts const& o, std::vector<std::string> const& sites) {
  json counts = json::array(), numbers = json::array(), ratios = json::array(),
       where = json::array();
  for (auto const& group : o.groups) counts.push_back(group.size());
  for (outlier const& x : o.tokens) {
    numbers.push_back(x.token);
    ratios.push_back(value_of(x.ratio));
  }
  for (std::size_t const l : o.sites) where.push_back(sites[l]);
  return {{"factor", outlier_facts::factor},
          {"count", std::move(counts)},
          {"norm_share", series(o.norm_share)},
          {"kernel_share", series(o.kernel_share)},
          {"tokens", std::move(numbers)},
          {"ratio", std::move(ratios)},
          {"sites", std::move(where)},
          {"matter", o.matter},
          {"with", o.with ? headline_numbers(*o.with) : json()},
          {"without", o.without ? headline_numbers(*o.without) : json()}};
}

json model(model_result const& m, options const& asked) {
  json out;
  out["name"] = report::utf8(m.label);
  out["file"] = report::utf8(m.path);
  out["dtype"] = m.dtype;
  json metadata = json::object();
  for (auto const& [key, value] : m.metadata) metadata[report::utf8(key)] = report::utf8(value);
  out["metadata"] = std::move(metadata);
  out["token_hash"] = m.token_hash.empty() ? json() : json(report::utf8(m.token_hash));
  out["tokens"] = tokens(m, asked);
  out["hidden"] = m.flow.width;
  out["blocks"] = m.blocks();
  out["sites"] = utf8(m.sites);
  json positions = json::array();
  for (std::size_t l = 0; l < m.sites.size(); ++l) positions.push_back(m.position(l));
  out["positions"] = std::move(positions);

  rflow::flow_report const& f = m.flow;
  out["inter_token_cosine"] = series(f.inter_token);
  std::vector<measured> mean, stddev;
  json left_out = json::array();
  for (auto const& pair : f.adjacent) {
    mean.push_back(pair.mean);
    stddev.push_back(pair.stddev);
    left_out.push_back(pair.left_out);
  }
  out["adjacent_cosine"] = {
      {"mean", series(mean)}, {"stddev", series(stddev)}, {"left_out", left_out}};
  out["rms_norm"] = series(f.rms_norm);
  out["zero_rows"] = f.zero_rows;

  rflow::layer_variance const& v = f.variance;
  rflow::bounds const bounds = m.st2_squared_bounds();
  out["variance"] = {{"normalization", to_string(v.by)},
                     {"factor", scalar(v.factor)},
                     {"st1", scalar(v.st1)},
                     {"st1_squared", scalar(square(v.st1))},
                     {"st2", scalar(v.st2)},
                     {"st2_squared", scalar(square(v.st2))},
                     {"st2_squared_lower", scalar(bounds.lower)},
                     {"st2_squared_upper", scalar(bounds.upper)},
                     {"path_energy", scalar(v.path_energy)},
                     {"path_length", scalar(v.path_length)},
                     {"steps", series(v.steps)},
                     {"curvature", series(v.curvature)}};
  out["final_norm"] = json();
  if (m.has_final_norm())
    out["final_norm"] = {{"site", report::utf8(m.final_norm_name)},
                         {"inter_token_cosine", scalar(m.final_inter_token)}};
  json tables = json::array();
  for (cka_result const& c : m.cka)
    tables.push_back(cka(c, asked, utf8(m.cka_sites()), utf8(m.cka_sites())));
  out["cka"] = std::move(tables);
  out["sequences"] = sequences(m);
  out["outliers"] = m.outliers ? outliers(*m.outliers, utf8(m.sites)) : json();
  out["shards"] = m.shards ? shards(m, asked) : json();
  out["probe"] = m.probes ? probe(*m.probes, *m.classes, utf8(m.cka_sites())) : json();
  json warnings = json::array();
  for (warning const& w : m.warnings)
    warnings.push_back(
        {{"kind", w.no_answer ? "no_answer" : "advice"}, {"text", report::utf8(w.text)}});
  out["warnings"] = std::move(warnings);
  return out;
}

/// All digits; empty where there is no value.
std::string csv_number(measured x) { return finite(x).ok() ? json(x.value).dump() : ""; }

/// Indented, but with arrays of plain values on one line; binary values are text.
void print(json const& x, std::size_t indent, std::string& out) {
  auto const plain = [](json const& v) { return !v.is_structured() || v.empty(); };
  std::string line(indent + 3, ' ');
  line[0] = '\n';
  if (x.is_binary()) {
    auto const& bytes = x.get_binary();
    std::string_view text(reinterpret_cast<char const*>(bytes.data()), bytes.size());
    if (bytes.has_subtype()) {
      out += text;
      return;
    }
    out += '[';
    for (char const* comma = ""; !text.empty(); comma = ",") {
      std::size_t const end = text.find('\n');
      out.append(comma).append(line).append(text.substr(0, end));
      text.remove_prefix(end + 1);
    }
    out.append(bytes.empty() ? std::string() : line.substr(0, indent + 1)) += ']';
    return;
  }
  if (plain(x) || (x.is_array() && std::all_of(x.begin(), x.end(), plain))) {
    out += x.dump();
    return;
  }
  bool first = true;
  out += x.is_array() ? "[" : "{";
  for (auto const& [key, value] : x.items()) {
    if (!first) out += ',';
    out += line;
    if (x.is_object()) out += json(key).dump() + ": ";
    print(value, indent + 2, out);
    first = false;
  }
  out += line.substr(0, indent + 1);
  out += x.is_array() ? ']' : '}';
}

}  // namespace

std::string json_text(json const& x) {
  std::string out;
  print(x, 0, out);
  return out + "\n";
}

std::string csv_text(std::string const& text) {
  std::string out = "\"";
  // Spreadsheets compute what begins so; an apostrophe before it makes it text.
  if (!text.empty() && std::string_view("=+-@\t\r\n").find(text.front()) != std::string_view::npos)
    out += '\'';
  for (char const c : report::utf8(text)) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}

std::string version_text() {
  return std::to_string(rflow::version.major) + "." + std::to_string(rflow::version.minor) + "." +
         std::to_string(rflow::version.patch);
}

std::string metrics_json(result const& r, options const& asked) {
  json out;
  out["schema"] = "rflow-metrics";
  out["schema_version"] = schema_version;
  out["program"] = {{"name", "rflow_report"}, {"version", version_text()}};
  json kernels = json::array();
  if (asked.linear) kernels.push_back("linear");
  if (asked.rbf) kernels.push_back("rbf");
  json masks = json::array();
  for (std::string const& mask : asked.masks) masks.push_back(report::utf8(mask));
  auto const text_or_null = [](std::string const& text) {
    return text.empty() ? json() : json(report::utf8(text));
  };
  out["options"] = {{"skip_first", asked.skip_first},
                    {"skip_last", asked.skip_last},
                    {"tokens", text_or_null(asked.tokens_text)},
                    {"masks", std::move(masks)},
                    {"own_masks", asked.own_masks},
                    {"sequences", text_or_null(asked.sequences)},
                    {"normalization", to_string(asked.normalize)},
                    {"estimator", to_string(asked.main_estimator)},
                    {"kernels", kernels},
                    {"rbf_fraction", asked.rbf_fraction}};
  out["options"]["probe"] = json();
  auto const files = [](std::vector<std::string> const& names) {
    return names.empty()       ? json()
           : names.size() == 1 ? json(report::utf8(names[0]))
                               : json(utf8(names));
  };
  auto const text = [](std::string const& x) { return x.empty() ? json() : json(report::utf8(x)); };
  if (!asked.labels.empty())
    out["options"]["probe"] = {{"labels", files(asked.labels)},
                               {"label_column", text(asked.label_column)},
                               {"ignored", utf8(asked.ignored_labels())},
                               {"groups", files(asked.label_groups)},
                               {"group_column", text(asked.group_column)},
                               {"seeds", asked.probe_seeds},
                               {"epochs", asked.probe_epochs},
                               {"standardize", asked.probe_standardize},
                               {"validation_fraction", rflow::probe_options{}.validation_fraction}};
  json models = json::array();
  for (model_result const& m : r.models) models.push_back(model(m, asked));
  out["models"] = std::move(models);
  out["comparison"] = json();
  if (r.models.size() == 2) {
    json tables = json::array();
    for (cka_result const& c : r.cross)
      tables.push_back(cka(c, asked, utf8(r.models[0].cka_sites()), utf8(r.models[1].cka_sites())));
    json order;
    if (r.order)
      order = *r.order == rflow::ordering::certified_greater ? "certified_greater"
              : *r.order == rflow::ordering::certified_less  ? "certified_less"
                                                             : "undecided";
    out["comparison"] = {{"same_tokens", !r.cross.empty()},
                         {"why_not", r.cross.empty() ? json(report::utf8(r.why_no_cross)) : json()},
                         {"st2_order", order},
                         {"cka", tables}};
  }
  return json_text(out);
}

std::map<std::string, std::string> csv_files(result const& r) {
  std::string const comma = ",";
  std::string sites = "model,site,position,inter_token_cosine,status,rms_norm,zero_rows";
  std::string blocks =
      "model,from,to,position,adjacent_cosine_mean,adjacent_cosine_stddev,left_out,step,curvature,"
      "status,curvature_status\n";
  bool linear = false, rbf = false;
  for (cka_result const& c : r.models.front().cka) (c.kernel == "linear" ? linear : rbf) = true;
  if (linear) sites += ",top_token,top_token_share";
  if (rbf) sites += ",rbf_sigma";
  bool const probes = r.models.front().probes.has_value();
  if (probes) sites += ",probe_accuracy,probe_spread,probe_train_accuracy,probe_loss";
  sites += "\n";
  for (model_result const& m : r.models) {
    std::string const name = csv_text(m.label);
    std::vector<std::string> const all = m.cka_sites();
    for (std::size_t l = 0; l < all.size(); ++l) {
      bool const chain = l < m.sites.size();
      measured const inter = chain ? m.flow.inter_token[l] : m.final_inter_token;
      sites += name + "," + csv_text(all[l]) + "," + (chain ? csv_number(m.position(l)) : "") +
               "," + csv_number(inter) + "," + std::string(to_string(inter.why)) + "," +
               (chain ? csv_number(m.flow.rms_norm[l]) : "") + "," +
               (chain ? std::to_string(m.flow.zero_rows[l]) : "");
      for (cka_result const& c : m.cka)
        sites += c.kernel == "linear"
                     ? comma + (c.top_token[l] < 0 ? "" : std::to_string(c.top_token[l])) + comma +
                           csv_number(c.top_share[l])
                     : comma + csv_number(c.sigma[l]);
      if (probes) {
        rflow::probe_result const& p = m.probes->layers[l];
        sites += comma + csv_number(p.validation_accuracy.mean) + comma +
                 csv_number(p.validation_accuracy.spread) + comma +
                 csv_number(p.train_accuracy.mean) + comma + csv_number(p.validation_loss.mean);
      }
      sites += "\n";
    }
    for (std::size_t l = 0; l + 1 < m.sites.size(); ++l) {
      auto const& pair = m.flow.adjacent[l];
      auto const& v = m.flow.variance;
      // The first block has no step before its own.
      measured const turn = l > 0 ? v.curvature[l - 1] : measured(rflow::status::too_few_sites);
      blocks += name + "," + csv_text(m.sites[l]) + "," + csv_text(m.sites[l + 1]) + "," +
                csv_number(m.position(l + 1)) + "," + csv_number(pair.mean) + "," +
                csv_number(pair.stddev) + "," + std::to_string(pair.left_out) + "," +
                csv_number(v.steps[l]) + "," + csv_number(turn) + "," +
                std::string(to_string(pair.mean.why)) + "," + std::string(to_string(turn.why)) +
                "\n";
    }
  }
  return {{"sites.csv", sites}, {"blocks.csv", blocks}};
}

std::map<std::string, array> npy_files(result const& r, options const& asked) {
  auto const table = [&](cka_result const& c) {
    cka_grid const& g = c.grid(asked.main_estimator);
    array out{{}, {g.rows, g.cols}};
    for (measured const x : g.value) out.values.push_back(x.value);
    return out;
  };
  std::map<std::string, array> out;
  for (std::size_t k = 0; k < r.models.size(); ++k) {
    model_result const& m = r.models[k];
    std::string which;
    if (r.models.size() > 1) which.append("-").append(std::to_string(k + 1));
    if (!m.cka.empty()) out["cka" + which + ".npy"] = table(m.cka.front());
    array cosines{{}, {static_cast<std::ptrdiff_t>(m.flow.adjacent.size()), m.flow.tokens}};
    for (auto const& pair : m.flow.adjacent)
      cosines.values.insert(cosines.values.end(), pair.per_token.begin(), pair.per_token.end());
    if (!m.flow.adjacent.empty() && !m.shards)
      out["adjacent" + which + ".npy"] = std::move(cosines);
  }
  if (!r.cross.empty()) out["cka-cross.npy"] = table(r.cross.front());
  return out;
}

void write_files(std::filesystem::path const& folder,
                 std::map<std::string, std::string> const& texts,
                 std::map<std::string, array> const& arrays) {
  auto const require_known = [](std::string const& name) {  // else --force would not replace it
    if (!is_report_file(name)) throw std::logic_error(name + ": is_report_file does not know it");
  };
  for (auto const& [name, text] : texts) {
    require_known(name);
    rflow::atomic_writer out(folder / name);
    out.write(text);
    out.commit();
  }
  for (auto const& [name, x] : arrays) {
    require_known(name);
    rflow::write_npy(folder / name, x.values, x.shape);
  }
}

}  // namespace report
