// SPDX-License-Identifier: Apache-2.0
// The report program from outside: exit status, the line on stderr, what is left behind, and
// metrics.json against its schema and against numbers that were computed independently.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <rflow/npy.hpp>
#include <rflow/safetensors.hpp>

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "../program.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string const source = RFLOW_SOURCE_DIR;
std::string const capture = source + "/examples/data/smollm2-135m.safetensors";
std::string const encoder = source + "/examples/data/all-minilm-l6-v2.safetensors";

using program::folder;
using program::outcome;
using program::read;

outcome run(folder const& where, std::vector<std::string> const& arguments,
            char const* path = nullptr) {
  return program::run(RFLOW_REPORT, where, arguments, path);
}
void check_refused(folder const& where, std::vector<std::string> const& arguments,
                   std::vector<std::string> const& texts, char const* path = nullptr) {
  program::check_refused(RFLOW_REPORT, where, arguments, texts, path);
}

// ---- captures to try ----------------------------------------------------------------------------

/// Named n × d arrays of pseudo-random floats.
struct sites {
  std::map<std::string, std::vector<float>> values;
  std::map<std::string, std::vector<std::ptrdiff_t>> shapes;

  sites(int blocks, std::ptrdiff_t n, std::ptrdiff_t d, unsigned seed = 1) {
    for (int l = 0; l <= blocks; ++l)
      add(l == 0 ? "embed" : "block." + std::to_string(l), n, d, seed);
  }
  void add(std::string const& name, std::ptrdiff_t n, std::ptrdiff_t d, unsigned seed = 1) {
    std::uint32_t state =
        seed * 2654435761u + static_cast<std::uint32_t>(values.size()) * 40503u + 1u;
    auto& x = values[name];
    x.resize(static_cast<std::size_t>(n * d));
    for (float& v : x) {
      state = state * 1664525u + 1013904223u;
      v = static_cast<float>(state >> 8) / 16777216.0f - 0.5f;
    }
    shapes[name] = {n, d};
  }
  void write(std::string const& path,
             std::map<std::string, std::string> const& metadata = {}) const {
    std::vector<rflow::tensor> tensors;
    for (auto const& [name, x] : values)
      tensors.push_back(rflow::as_tensor(name, x, shapes.at(name)));
    rflow::write_safetensors(path, tensors, metadata);
  }
};

// ---- JSON Schema, as far as ours goes -----------------------------------------------------------

class schema {
 public:
  explicit schema(json root) : root_(std::move(root)) {}

  std::string errors(json const& x) const { return errors(x, root_, "metrics.json"); }

 private:
  static bool is(json const& x, std::string const& type) {
    if (type == "integer") return x.is_number_integer();
    if (type == "number") return x.is_number();
    return type == (x.is_object()    ? "object"
                    : x.is_array()   ? "array"
                    : x.is_string()  ? "string"
                    : x.is_boolean() ? "boolean"
                    : x.is_null()    ? "null"
                                     : "number");
  }

  std::string errors(json const& x, json const& rule, std::string const& at) const {
    std::string out;
    auto const complain = [&](std::string const& what) { out += at + ": " + what + "\n"; };
    for (auto const& [key, value] : rule.items()) {
      if (key == "$ref") {
        out += errors(x, root_.at(json::json_pointer(value.get<std::string>().substr(1))), at);
      } else if (key == "type") {
        bool any = false;
        for (json const& type : value.is_array() ? value : json::array({value}))
          any = any || is(x, type);
        if (!any) complain("is no " + value.dump());
      } else if (key == "enum") {
        if (std::find(value.begin(), value.end(), x) == value.end())
          complain(x.dump() + " is not allowed");
      } else if (key == "const") {
        if (x != value) complain("is not " + value.dump());
      } else if (key == "minimum") {
        if (x.is_number() && x < value) complain("is below " + value.dump());
      } else if (key == "maximum") {
        if (x.is_number() && x > value) complain("is above " + value.dump());
      } else if (key == "minItems") {
        if (x.is_array() && x.size() < value) complain("has too few items");
      } else if (key == "maxItems") {
        if (x.is_array() && x.size() > value) complain("has too many items");
      } else if (key == "required") {
        for (json const& name : value)
          if (x.is_object() && !x.contains(name)) complain("lacks " + name.dump());
      } else if (key == "properties") {
        for (auto const& [name, sub] : value.items())
          if (x.is_object() && x.contains(name)) out += errors(x.at(name), sub, at + "/" + name);
      } else if (key == "additionalProperties") {
        json const& members = x.is_object() ? x : nothing_;
        for (auto const& [name, member] : members.items()) {
          if (rule.contains("properties") && rule.at("properties").contains(name)) continue;
          if (value == false)
            complain("has an unknown field " + name);
          else if (value.is_object())
            out += errors(member, value, at + "/" + name);
        }
      } else if (key == "items") {
        for (std::size_t i = 0; x.is_array() && i < x.size(); ++i)
          out += errors(x[i], value, at + "/" + std::to_string(i));
      } else if (key == "oneOf") {
        int fits = 0;
        for (json const& choice : value) fits += errors(x, choice, at).empty() ? 1 : 0;
        if (fits != 1) complain("fits " + std::to_string(fits) + " of the alternatives");
      } else if (key != "$schema" && key != "$id" && key != "$defs" && key != "title" &&
                 key != "description") {
        complain("the schema's keyword " + key + " is unknown to this test");
      }
    }
    return out;
  }

  json root_, nothing_ = json::object();
};

json metrics(fs::path const& report) {
  json const out = json::parse(read(report / "metrics.json"));
  schema const rules(json::parse(read(source + "/docs/metrics.schema.json")));
  CHECK(rules.errors(out) == "");
  return out;
}

/// A page that loads nothing.
void check_page(fs::path const& report) {
  std::string const page = read(report / "report.html");
  CHECK(page.starts_with("<!doctype html>"));
  CHECK(page.find("</html>") != std::string::npos);
  for (char const* text : {"src=\"", "http://", "https://", "@import", "<link", "url("}) {
    CAPTURE(text);
    CHECK(page.find(text) == std::string::npos);
  }
}

// ---- agreement with independent numbers ---------------------------------------------------------

struct comparison {
  double worst = 0;
  std::string where;
  std::size_t numbers = 0;

  void number(json const& ours, json const& theirs, std::string const& at, double scale = 0) {
    REQUIRE_MESSAGE(ours.is_number(), at);
    double const a = ours, b = theirs;
    double const error = std::abs(a - b) / std::max({std::abs(b), scale, 1e-300});
    ++numbers;
    if (error > worst) worst = error, where = at;
  }
  /// Series of cosines and CKA have scale 1: an error of 1e-5 there is absolute.
  void list(json const& ours, json const& theirs, std::string const& at, double scale = 0) {
    REQUIRE_MESSAGE(ours.size() == theirs.size(), at);
    for (std::size_t i = 0; i < ours.size(); ++i) {
      std::string const here = at + "/" + std::to_string(i);
      if (theirs[i].is_array())
        list(ours[i], theirs[i], here, scale);
      else
        number(ours[i], theirs[i], here, scale);
    }
  }
};

void check_reference(json const& ours, json const& theirs, std::string const& normalization,
                     fs::path const& report) {
  json const& m = ours.at("models").at(0);
  comparison c;
  CHECK(m.at("tokens").at("used") == theirs.at("tokens"));

  json inter = m.at("inter_token_cosine").at("values");
  inter.push_back(m.at("final_norm").at("inter_token_cosine").at("value"));
  c.list(inter, theirs.at("inter_token"), "inter_token", 1);
  c.list(m.at("adjacent_cosine").at("mean").at("values"), theirs.at("adjacent").at("mean"),
         "adjacent mean", 1);
  c.list(m.at("adjacent_cosine").at("stddev").at("values"), theirs.at("adjacent").at("stddev"),
         "adjacent stddev", 1);

  json const &v = m.at("variance"), &w = theirs.at("variance").at(normalization);
  CHECK(v.at("normalization") == normalization);
  for (char const* name :
       {"factor", "st1", "st1_squared", "st2", "st2_squared", "path_energy", "path_length"})
    c.number(v.at(name).at("value"), w.at(name), name);
  double const chain = static_cast<double>(m.at("sites").size());
  c.number(v.at("st2_squared_lower").at("value").get<double>() * chain, w.at("spread_lower"),
           "lower bound");
  c.number(v.at("st2_squared_upper").at("value").get<double>() * chain, w.at("spread_upper"),
           "upper bound");
  c.list(v.at("steps").at("values"), w.at("steps"), "steps");
  c.list(v.at("curvature").at("values"), theirs.at("curvature"), "curvature", 1);

  for (std::size_t k = 0; k < 2; ++k) {
    json const& cka = m.at("cka").at(k);
    std::string const kernel = cka.at("kernel");
    json const& reference = theirs.at("cka_" + kernel);
    for (char const* name : {"debiased", "biased"})
      c.list(cka.at(name).at("values"), reference.at(name), kernel + " " + name, 1);
    c.list(cka.at("biased").at("chance"), reference.at("chance"), kernel + " chance", 1);
  }
  c.list(m.at("cka").at(1).at("sigma").at("values"), theirs.at("rbf_sigma"), "sigma");

  // cka.npy is the main estimator's table under the linear kernel; adjacent.npy has every token.
  rflow::npy_file const table(report / "cka.npy");
  double const* const cells = table.array().elements<double>();
  json const& debiased = theirs.at("cka_linear").at("debiased");
  REQUIRE(table.array().shape ==
          std::vector<std::ptrdiff_t>(2, static_cast<std::ptrdiff_t>(debiased.size())));
  for (std::size_t i = 0; i < debiased.size(); ++i)
    for (std::size_t j = 0; j < debiased.size(); ++j)
      c.number(cells[i * debiased.size() + j], debiased[i][j], "cka.npy", 1);

  rflow::npy_file const tokens(report / "adjacent.npy");
  double const* const cosines = tokens.array().elements<double>();
  json const& rows = theirs.at("adjacent").at("tokens");
  auto const skipped = theirs.at("skip_first").get<std::size_t>(),
             used = theirs.at("tokens").get<std::size_t>();
  for (std::size_t l = 0; l < theirs.at("adjacent").at("per_token").size(); ++l)
    for (std::size_t t = 0; t < rows.size(); ++t)
      c.number(cosines[l * used + rows[t].get<std::size_t>() - skipped],
               theirs.at("adjacent").at("per_token")[l][t], "adjacent.npy", 1);

  MESSAGE(c.numbers << " numbers, largest difference " << c.worst << " at " << c.where);
  CHECK(c.numbers > 6000);
  CHECK(c.worst < 1e-5);
}

}  // namespace

TEST_CASE("the numbers for the shipped capture are those of an independent computation") {
  json const reference = json::parse(read(source + "/tests/reference/smollm2_reference.json"));
  for (char const* normalization : {"per_element", "none", "per_token", "relative"})
    for (int const skip : {0, 1}) {
      CAPTURE(normalization);
      CAPTURE(skip);
      folder const work;
      outcome const o = run(work, {capture, "-o", "r", "--no-plots", "--skip-first",
                                   std::to_string(skip), "--normalization", normalization});
      CAPTURE(o.err);
      REQUIRE(o.status == 0);
      json const m = metrics(work.path / "r");
      CHECK(m.at("models").at(0).at("token_hash") == reference.at("token_hash"));
      check_reference(m, reference.at(skip == 0 ? "all_tokens" : "skip_first_1"), normalization,
                      work.path / "r");
    }
}

TEST_CASE("a report is complete, opens without a network, and says where it is") {
  folder const work;
  outcome const o = run(work, {capture});
  CAPTURE(o.err);
  REQUIRE(o.status == 0);
  CHECK(o.err.empty());
  CHECK(o.out.find("smollm2-135m-report/report.html") != std::string::npos);
  CHECK(work.names() == std::vector<std::string>{"smollm2-135m-report"});
  fs::path const report = work.path / "smollm2-135m-report";
  for (char const* name :
       {"report.html", "metrics.json", "sites.csv", "blocks.csv", "cka.npy", "adjacent.npy"}) {
    CAPTURE(name);
    CHECK(fs::file_size(report / name) > 0);
  }
  check_page(report);
  std::string const page = read(report / "report.html");
  std::size_t figures = 0;
  for (std::size_t at = 0; (at = page.find("<svg class=\"plot\"", at)) != std::string::npos; ++at)
    ++figures;
  CHECK(figures == 8);
  CHECK(page.find("gnuplot_svg") == std::string::npos);

  json const m = metrics(report);
  CHECK(m.at("schema_version") == "2.2");
  CHECK(m.at("comparison").is_null());
  // The attention sink is pointed out.
  CHECK(m.at("models").at(0).at("warnings").dump().find("--skip-first 1") != std::string::npos);

  // One line a site and one a block, each with as many fields as its first line names.
  for (auto const& [name, lines] :
       std::map<std::string, long>{{"sites.csv", 33}, {"blocks.csv", 31}}) {
    std::string const text = read(report / name);
    CHECK(std::count(text.begin(), text.end(), '\n') == lines);
    std::string const first = text.substr(0, text.find('\n'));
    CHECK(std::count(text.begin(), text.end(), ',') ==
          lines * std::count(first.begin(), first.end(), ','));
  }
}

TEST_CASE("the same bytes for every number of threads") {
  folder const work;
  for (char const* threads : {"1", "2", "3"})
    REQUIRE(run(work, {capture, "-o", threads, "--threads", threads}).status == 0);
  for (auto const& entry : fs::directory_iterator(work.path / "1")) {
    CAPTURE(entry.path().filename().string());
    CHECK(read(entry.path()) == read(work.path / "2" / entry.path().filename()));
    CHECK(read(entry.path()) == read(work.path / "3" / entry.path().filename()));
  }
}

TEST_CASE("p-values of CKA, for those who ask") {
  folder const work;
  sites x(3, 40, 6);
  x.write(work / "x.safetensors");
  REQUIRE(run(work, {"x.safetensors", "-o", "without", "--no-plots"}).status == 0);
  REQUIRE(run(work, {"x.safetensors", "-o", "with", "--no-plots", "--significance"}).status == 0);
  json const without = json::parse(read(work / "without/metrics.json"));
  json const with = json::parse(read(work / "with/metrics.json"));
  for (json const& cka : without["models"][0]["cka"]) CHECK_FALSE(cka.contains("significance"));
  REQUIRE(with["models"][0]["cka"].size() == 2);
  for (json const& cka : with["models"][0]["cka"]) {
    auto const& s = cka["significance"];
    std::size_t const sites = cka["rows"].size();
    REQUIRE(s["p_value"].size() == sites);
    for (std::size_t i = 0; i < sites; ++i)
      for (std::size_t j = 0; j < sites; ++j) {
        CHECK((s["status"][i][j] == "ok" || s["status"][i][j] == "ill_conditioned"));
        REQUIRE(s["p_value"][i][j].is_number() == (s["status"][i][j] == "ok"));
        if (s["p_value"][i][j].is_number()) {
          CHECK(s["p_value"][i][j].get<double>() > 0);
          CHECK(s["p_value"][i][j].get<double>() <= 1);
        }
        // In standard deviations: over the root of 2 / (n (n − 3)).
        CHECK(s["score"][i][j].get<double>() ==
              doctest::Approx(cka["debiased"]["values"][i][j].get<double>() *
                              std::sqrt(40.0 * 37 / 2)));
      }
    if (s["status"][0][0] == "ok") CHECK(s["p_value"][0][0].get<double>() < 1e-3);
  }
  CHECK(read(work / "with/report.html").find("\"p\":[") != std::string::npos);
  CHECK(read(work / "without/report.html").find("\"p\":[") == std::string::npos);
}

TEST_CASE("p-values over shifted tokens say what the least is, and none is shown as 0") {
  folder const work;
  sites x(3, 40, 6);
  x.write(work / "x.safetensors");
  REQUIRE(run(work, {"x.safetensors", "-o", "out", "--no-plots", "--shifts"}).status == 0);
  json const report = json::parse(read(work / "out/metrics.json"));
  for (json const& cka : report["models"][0]["cka"]) {
    json const& s = cka["shift_significance"];
    CHECK(s["least"] == 1 / 40.0);
    for (std::size_t i = 0; i < cka["rows"].size(); ++i)
      for (std::size_t j = 0; j < cka["rows"].size(); ++j) {
        CHECK((s["status"][i][j] == "ok" || s["status"][i][j] == "dependent_tokens"));
        CHECK(s["p_value"][i][j].is_null() == (s["status"][i][j] != "ok"));
        if (s["status"][i][j] == "ok") CHECK(s["p_value"][i][j].get<double>() >= 1 / 40.0);
      }
    if (s["status"][0][0] == "ok") CHECK(s["p_value"][0][0] == 1 / 40.0);
  }
  std::string const page = read(work / "out/report.html");
  CHECK(page.find("\"shift_p\":[\"") != std::string::npos);
  CHECK(page.find("p over shifted tokens") != std::string::npos);
  for (std::string const name : {"\"p\":[", "\"shift_p\":["})
    for (auto at = page.find(name); at != std::string::npos; at = page.find(name, at + 1)) {
      std::string const values = page.substr(at, page.find(']', at) - at);
      CHECK(values.find("\"0\"") == std::string::npos);
      CHECK(values.find("\"0.0\"") == std::string::npos);
    }
}

TEST_CASE("two models side by side") {
  folder const work;
  SUBCASE("of different tokens: no table between them, unless it is asked for") {
    REQUIRE(run(work, {capture, encoder, "-o", "r"}).status == 0);
    json const m = metrics(work.path / "r");
    check_page(work.path / "r");
    CHECK(m.at("models").size() == 2);
    CHECK(m.at("comparison").at("same_tokens") == false);
    CHECK(m.at("comparison").at("why_not").get<std::string>().find("hashes differ") !=
          std::string::npos);
    CHECK(m.at("comparison").at("cka").empty());
    for (char const* name : {"cka-1.npy", "cka-2.npy", "adjacent-1.npy", "adjacent-2.npy"})
      CHECK(fs::exists(work.path / "r" / name));
    CHECK_FALSE(fs::exists(work.path / "r" / "cka-cross.npy"));
    fs::remove_all(work.path / "r");
    check_refused(work, {capture, encoder, "-o", "r", "--cross-cka"},
                  {capture, encoder, "token hashes differ"});
  }
  SUBCASE("of the same tokens: depths and widths may differ") {
    sites const a(3, 20, 8), b(2, 20, 5, 7);
    a.write(work / "a.safetensors", {{"token_hash", "x"}, {"model", "A <b>&amp;"}});
    b.write(work / "b.safetensors", {{"token_hash", "x"}});
    REQUIRE(run(work, {"a.safetensors", "b.safetensors", "--cross-cka"}).status == 0);
    json const m = metrics(work.path / "a-vs-b-report");
    json const& table = m.at("comparison").at("cka").at(0);
    CHECK(table.at("debiased").at("values").size() == 4);
    CHECK(table.at("debiased").at("values").at(0).size() == 3);
    CHECK(fs::exists(work.path / "a-vs-b-report" / "cka-cross.npy"));
    std::string const page = read(work.path / "a-vs-b-report" / "report.html");
    CHECK(page.find("A <b>") == std::string::npos);
    CHECK(page.find("A &lt;b&gt;&amp;amp;") != std::string::npos);

    // A model's own table does not depend on its company.
    REQUIRE(run(work, {"a.safetensors", "-o", "alone", "-q"}).status == 0);
    json const alone = metrics(work.path / "alone");
    comparison c;
    c.list(m.at("models").at(0).at("cka").at(0).at("debiased").at("values"),
           alone.at("models").at(0).at("cka").at(0).at("debiased").at("values"), "alone", 1);
    CHECK(c.worst < 1e-6);
  }
  SUBCASE("a file that does not name its tokens") {
    sites const a(1, 9, 4);
    a.write(work / "a.safetensors", {{"token_hash", "x"}});
    a.write(work / "b.safetensors");
    check_refused(work, {"a.safetensors", "b.safetensors", "--cross-cka"},
                  {"b.safetensors does not say"});
  }
  SUBCASE("of one name: told apart, or named by the user") {
    sites const a(2, 9, 4);
    a.write(work / "a.safetensors", {{"model", "twin"}});
    a.write(work / "b.safetensors", {{"model", "twin"}});
    auto const names = [&](std::vector<std::string> arguments) {
      for (char const* word :
           {"a.safetensors", "b.safetensors", "-o", "r", "--force", "--no-plots"})
        arguments.push_back(word);
      REQUIRE(run(work, arguments).status == 0);
      json const m = metrics(work.path / "r").at("models");
      return std::vector<json>{m.at(0).at("name"), m.at(1).at("name")};
    };
    CHECK(names({}) == std::vector<json>{"twin (1)", "twin (2)"});
    CHECK(names({"--name", "left", "--name", "right"}) == std::vector<json>{"left", "right"});
  }
  SUBCASE("have one scale of colours in the maps of their tokens") {
    sites a(2, 9, 4);
    for (char const* name : {"block.1", "block.2"}) a.values[name] = a.values["embed"];
    a.write(work / "a.safetensors");  // all its cosines are 1
    sites(2, 9, 4, 5).write(work / "b.safetensors");
    auto const scales = [&](std::vector<std::string> arguments) {
      for (char const* word : {"-o", "r", "--force"}) arguments.push_back(word);
      REQUIRE(run(work, arguments).status == 0);
      std::string const page = read(work.path / "r" / "report.html");
      std::string const mark = "<div class=\"ramp\"><span>";
      std::vector<std::string> out;
      for (std::size_t at = 0; (at = page.find(mark, at)) != std::string::npos; ++at)
        out.push_back(page.substr(at + mark.size(), page.find("</span>", at) - at - mark.size()));
      return out;
    };
    std::string const high = scales({"a.safetensors"}).front(),
                      low = scales({"b.safetensors"}).front();
    CHECK(high != low);
    std::vector<std::string> const both = scales({"a.safetensors", "b.safetensors"});
    CHECK(both.at(0) == low);
    CHECK(both.at(1) == low);
  }
  SUBCASE("hashes that agree over different numbers of tokens") {
    sites(1, 9, 4).write(work / "a.safetensors", {{"token_hash", "x"}});
    sites(1, 8, 4).write(work / "b.safetensors", {{"token_hash", "x"}});
    check_refused(work, {"a.safetensors", "b.safetensors", "--cross-cka"}, {"9 tokens", "8"});
    CHECK(run(work, {"a.safetensors", "b.safetensors", "--no-plots"}).status == 0);
  }
}

TEST_CASE("other ways to hold activations") {
  folder const work;
  sites const x(2, 12, 6);
  x.write(work / "x.safetensors");
  REQUIRE(run(work, {"x.safetensors", "--no-plots"}).status == 0);
  json expected = metrics(work.path / "x-report").at("models").at(0);
  std::string path;
  std::vector<std::string> options{"--no-plots", "-o", "r"};
  SUBCASE("a folder of .npy") {
    fs::create_directory(work.path / "x");
    for (auto const& [name, values] : x.values)
      rflow::write_npy(work.path / "x" / (name + ".npy"), values, {12, 6});
    path = "x/";
  }
  SUBCASE("one .npy with three axes") {
    std::vector<float> all;
    for (char const* name : {"embed", "block.1", "block.2"})
      all.insert(all.end(), x.values.at(name).begin(), x.values.at(name).end());
    rflow::write_npy(work.path / "x.npy", all, {3, 12, 6});
    path = "x.npy";
  }
  SUBCASE("other names") {
    sites other(0, 12, 6);
    other.values = {{"emb", x.values.at("embed")},
                    {"h.0.out", x.values.at("block.1")},
                    {"h.1.out", x.values.at("block.2")}};
    other.shapes = {{"emb", {12, 6}}, {"h.0.out", {12, 6}}, {"h.1.out", {12, 6}}};
    other.write(work / "y.safetensors");
    path = "y.safetensors";
    for (char const* word :
         {"--pattern-embed", "emb", "--pattern-block", "h.{}.out", "--first-block", "0"})
      options.push_back(word);
  }
  options.insert(options.begin(), path);
  outcome const o = run(work, options);
  CAPTURE(o.err);
  REQUIRE(o.status == 0);
  json const found = metrics(work.path / "r").at("models").at(0);
  for (char const* name : {"inter_token_cosine", "adjacent_cosine", "variance"})
    CHECK(found.at(name) == expected.at(name));
  CHECK(found.at("cka").at(0).at("debiased") == expected.at("cka").at(0).at("debiased"));
}

TEST_CASE("unusable input: one line, status 1, nothing left") {
  folder const work;
  sites x(3, 12, 6);
  SUBCASE("no such file") {
    check_refused(work, {"none.safetensors"}, {"none.safetensors: ", "No such file"});
  }
  SUBCASE("an empty file") {
    std::ofstream(work / "x.safetensors").flush();
    check_refused(work, {"x.safetensors"}, {"x.safetensors: ", "empty"});
  }
  SUBCASE("a truncated file") {
    x.write(work / "x.safetensors");
    fs::resize_file(work / "x.safetensors", fs::file_size(work / "x.safetensors") - 5);
    check_refused(work, {"x.safetensors"}, {"x.safetensors: byte ", "ends"});
  }
  SUBCASE("a header that lies about its length") {
    x.write(work / "x.safetensors");
    std::string bytes = read(work / "x.safetensors");
    bytes[6] = '\x7f';
    std::ofstream(work / "x.safetensors", std::ios::binary) << bytes;
    check_refused(work, {"x.safetensors"}, {"x.safetensors: byte 0", "header"});
  }
  SUBCASE("a header that lies about a shape") {
    x.write(work / "x.safetensors");
    std::string bytes = read(work / "x.safetensors");
    bytes.replace(bytes.find("[12,6]"), 6, "[13,6]");
    std::ofstream(work / "x.safetensors", std::ios::binary) << bytes;
    check_refused(work, {"x.safetensors"}, {"x.safetensors: byte ", "[13, 6]"});
  }
  SUBCASE("a site missing in the middle") {
    x.values.erase("block.2");
    x.write(work / "x.safetensors");
    check_refused(work, {"x.safetensors"}, {"x.safetensors: ", "block.2 is missing"});
  }
  SUBCASE("no blocks") {
    for (char const* name : {"block.1", "block.2", "block.3"}) x.values.erase(name);
    x.write(work / "x.safetensors");
    check_refused(
        work, {"x.safetensors"},
        {"x.safetensors: ", "no sites by a known name: embed is there", "--pattern-block"});
  }
  SUBCASE("a folder with names of its own") {
    fs::create_directory(work.path / "x");
    for (char const* name : {"x/a.0.npy", "x/a.1.npy"})
      rflow::write_npy(work.path / name, x.values.at("embed"), {12, 6});
    check_refused(work, {"x"},
                  {"x: no sites by a known name: a.0, a.1 are there", "--pattern-block"});
    check_refused(work, {"x", "--pattern-block", "a.{}", "--first-block", "1"},
                  {"a.0 is there, but blocks count from 1", "--first-block 0"});
  }
  SUBCASE("an array of other axes or elements") {
    rflow::write_npy(work.path / "flat.npy", x.values.at("embed"), {12, 6});
    check_refused(work, {"flat.npy"}, {"f32 [12, 6]: one site, tokens x hidden", "--axes"});
    rflow::write_npy(work.path / "ids.npy", std::vector<std::int64_t>(8), {2, 2, 2});
    check_refused(work, {"ids.npy"}, {"i64 [2, 2, 2]", "integers have no scale"});
    rflow::write_npy(work.path / "half.npy", std::vector<std::uint16_t>(8), {2, 2, 2});
    check_refused(work, {"half.npy"}, {"u16 [2, 2, 2]", "--npy-bits"});
  }
  SUBCASE("different numbers of tokens") {
    x.add("block.3", 11, 6);
    x.write(work / "x.safetensors");
    check_refused(work, {"x.safetensors"}, {"x.safetensors: ", "block.3", "[11, 6]", "[12, 6]"});
  }
  SUBCASE("no tokens at all") {
    sites(2, 0, 6).write(work / "x.safetensors");
    check_refused(work, {"x.safetensors"}, {"x.safetensors: ", "[0, 6]"});
  }
  SUBCASE("an empty folder") {
    fs::create_directory(work.path / "x");
    check_refused(work, {"x"}, {"x: ", "npy"});
  }
  SUBCASE("a broken file in a folder") {
    fs::create_directory(work.path / "x");
    for (auto const& [name, values] : x.values)
      rflow::write_npy(work.path / "x" / (name + ".npy"), values, {12, 6});
    fs::resize_file(work.path / "x" / "block.2.npy", 100);
    check_refused(work, {"x"}, {"x/block.2.npy: byte "});
  }
  SUBCASE("a file of another kind, with a name that garbles terminals") {
    std::ofstream(work / "a\nb\x1b.pt")
        << "PK\x03\x04 this is a zip archive, not a safetensors file";
    check_refused(work, {"a\nb\x1b.pt"}, {"a?b?.pt: "});
  }
  SUBCASE("nothing left after --skip-first") {
    x.write(work / "x.safetensors");
    check_refused(work, {"x.safetensors", "--skip-first", "12"},
                  {"x.safetensors: ", "--skip-first 12", "12 tokens"});
  }
  SUBCASE("the second of two") {
    x.write(work / "x.safetensors");
    check_refused(work, {"x.safetensors", "none.safetensors"}, {"none.safetensors: "});
  }
}

TEST_CASE("a wrong command line: one line, status 1") {
  folder const work;
  sites(2, 12, 6).write(work / "x.safetensors");
  check_refused(work, {}, {"input is required"});
  check_refused(work, {"x.safetensors", "--nonsense"}, {"--nonsense"});
  check_refused(work, {"x.safetensors", "x.safetensors", "x.safetensors"},
                {"one or two captures expected, not 3", "--help"});
  check_refused(work, {"x.safetensors", "--normalization", "softly"},
                {"--normalization", "softly"});
  check_refused(work, {"x.safetensors", "--kernel", "cubic"}, {"--kernel", "cubic"});
  check_refused(work, {"x.safetensors", "--estimator", "good"}, {"--estimator", "good"});
  for (char const* option : {"--skip-first", "--first-block"})
    for (std::string const value : {"-1", "1.5", "two", "99999999999999999999"})
      check_refused(work, {"x.safetensors", option, value},
                    {option, "a whole number, 0 or more, expected, found " + value});
  check_refused(work, {"x.safetensors", "--name", "a", "--name", "b"},
                {"--name", "2 names for 1 model"});
  check_refused(work, {"x.safetensors", "--name", ""}, {"--name"});
  check_refused(work, {"x.safetensors", "--rbf-fraction", "0"}, {"--rbf-fraction"});
  check_refused(work, {"x.safetensors", "--rbf-fraction", "nan"}, {"--rbf-fraction"});
  check_refused(work, {"x.safetensors", "--pattern-block", "block"}, {"--pattern-block", "{}"});
  check_refused(work, {"x.safetensors", "--cross-cka"}, {"--cross-cka", "two"});
  CHECK(run(work, {"--version"}).out.starts_with("rflow_report "));
  CHECK(run(work, {"--help"}).out.find("--skip-first") != std::string::npos);
}

TEST_CASE(
    "layers without an answer: a warning and status 0; with --strict 2, and the report is there") {
  folder const work;
  sites x(4, 16, 6);
  std::string expected, site = "block.2";
  float const nan = std::numeric_limits<float>::quiet_NaN(),
              infinity = std::numeric_limits<float>::infinity();
  SUBCASE("NaN") {
    x.values["block.2"][3 * 6 + 4] = nan;
    expected = "first at token 3, feature 4";
  }
  SUBCASE("infinity") {
    x.values["block.2"][5 * 6] = -infinity;
    expected = "first at token 5, feature 0";
  }
  SUBCASE("NaN in the final norm") {
    x.add("final_norm", 16, 6);
    x.values["final_norm"][2] = nan;
    expected = "first at token 0, feature 2";
    site = "final_norm";
  }
  SUBCASE("a constant layer") {
    std::fill(x.values["block.2"].begin(), x.values["block.2"].end(), 1.5f);
    expected = "constant_layer";
  }
  SUBCASE("a layer of zeros") {
    std::fill(x.values["block.2"].begin(), x.values["block.2"].end(), 0.0f);
    expected = "zero_rows";
  }
  SUBCASE("a layer equal to the one before") {
    x.values["block.2"] = x.values["block.1"];
    expected = "zero_step";
  }
  SUBCASE("a single token") {
    x = sites(4, 1, 6);
    expected = "too_few_rows";
    site = "embed";
  }
  SUBCASE("everything is NaN") {
    for (auto& [name, values] : x.values) std::fill(values.begin(), values.end(), nan);
    expected = "first at token 0, feature 0";
  }
  x.write(work / "x.safetensors");
  outcome const o = run(work, {"x.safetensors", "-o", "r"});
  CAPTURE(o.err);
  CHECK(o.status == 0);
  CHECK(o.out.find(expected) != std::string::npos);
  json const m = metrics(work.path / "r").at("models").at(0);
  bool found = false;
  for (json const& w : m.at("warnings")) {
    std::string const text = w.at("text");
    found = found || (w.at("kind") == "no_answer" && text.find(expected) != std::string::npos &&
                      text.find(site) != std::string::npos);
  }
  CAPTURE(m.at("warnings").dump(1));
  CHECK(found);
  check_page(work.path / "r");

  outcome const strict = run(work, {"x.safetensors", "-o", "s", "--strict", "-q"});
  CHECK(strict.status == 2);
  CHECK(strict.out.empty());
  CHECK(fs::exists(work.path / "s" / "report.html"));
}

TEST_CASE("a single token") {
  folder const work;
  sites(4, 1, 6).write(work / "x.safetensors");
  REQUIRE(run(work, {"x.safetensors", "-o", "r"}).status == 0);
  // Its CKA is missing for want of tokens, not because a token equals itself.
  json const tables = metrics(work.path / "r").at("models").at(0).at("cka");
  for (json const& table : tables)
    for (char const* by : {"debiased", "biased"})
      for (json const& row : table.at(by).at("status"))
        for (json const& why : row) CHECK(why == "too_few_rows");
  json const& rbf = tables.at(1);
  for (json const& sigma : rbf.at("sigma").at("values")) CHECK(sigma.is_null());
  for (json const& why : rbf.at("sigma").at("status")) CHECK(why == "too_few_rows");
  // Its column of the heat map is drawn.
  std::string const page = read(work.path / "r" / "report.html");
  CHECK(page.find("<image ") != std::string::npos);
}

TEST_CASE("a single site, a single block") {
  folder const work;
  std::vector<float> const x = sites(0, 12, 6).values.at("embed");
  rflow::write_npy(work.path / "x.npy", x, {1, 12, 6});
  outcome const o = run(work, {"x.npy", "-o", "r"});
  CHECK(o.status == 0);
  CHECK(o.out.find("adjacent cosine, mean         too_few_sites\n") != std::string::npos);
  check_page(work.path / "r");
  sites(1, 12, 6).write(work / "y.safetensors");
  CHECK(run(work, {"y.safetensors", "-o", "s"}).status == 0);
  CHECK(read(work.path / "s" / "report.html").find("<image ") != std::string::npos);
}

TEST_CASE("notes of one kind are one note") {
  folder const work;
  sites x(6, 12, 6);
  for (char const* name : {"block.2", "block.3", "block.4"})
    std::fill(x.values[name].begin(), x.values[name].end(), 0.0f);
  x.write(work / "x.safetensors");
  std::string const out = run(work, {"x.safetensors", "--no-plots"}).out;
  CHECK(out.find("block.2 … block.4: 12 tokens of zeros") != std::string::npos);
  CHECK(out.find("block.3: 12 tokens") == std::string::npos);
}

TEST_CASE("a bad layer leaves the others as they were") {
  folder const work;
  sites x(4, 16, 6);
  x.write(work / "good.safetensors");
  x.values["block.2"][7] = std::numeric_limits<float>::quiet_NaN();
  x.write(work / "bad.safetensors");
  for (char const* name : {"good", "bad"})
    REQUIRE(
        run(work, {std::string(name) + ".safetensors", "-o", name, "--no-plots", "-q"}).status ==
        0);
  json const good = metrics(work.path / "good").at("models").at(0),
             bad = metrics(work.path / "bad").at("models").at(0);
  for (std::size_t i = 0; i < 5; ++i)
    for (std::size_t j = 0; j < 5; ++j) {
      json const& cell = bad.at("cka").at(0).at("debiased").at("values").at(i).at(j);
      if (i == 2 || j == 2)
        CHECK(cell.is_null());
      else
        CHECK(cell.get<double>() ==
              doctest::Approx(
                  good.at("cka").at(0).at("debiased").at("values").at(i).at(j).get<double>())
                  .epsilon(1e-6));
    }
  // What a site without a value would have is null, too.
  for (json const& table : bad.at("cka")) {
    json const& share = table.at("top_token_share");
    bool const linear = table.at("kernel") == "linear";
    CHECK(share.at("values").at(2).is_null());
    CHECK(share.at("status").at(2) == "non_finite");
    CHECK(share.at("token").at(2).is_null());
    CHECK(share.at("token").at(1).is_number());
    if (!linear) {
      CHECK(table.at("sigma").at("values").at(2).is_null());
      CHECK(table.at("sigma").at("status").at(2) == "non_finite");
      CHECK(table.at("sigma").at("values").at(1).is_number());
    }
  }
  std::string const csv = read(work.path / "bad" / "sites.csv");
  CHECK(csv.find("\"block.2\",0.5,,non_finite,,0,,,\n") != std::string::npos);
  // Means over what is left say so.
  CHECK(run(work, {"bad.safetensors", "-o", "t", "--no-plots"}).out.find(" over 2 of 4 blocks\n") !=
        std::string::npos);
  CHECK(read(work.path / "t" / "report.html").find("over 2 of 4 blocks") != std::string::npos);
  CHECK(read(work.path / "good" / "report.html").find("of 4 blocks") == std::string::npos);
  CHECK(bad.at("inter_token_cosine").at("status") == json({"ok", "ok", "non_finite", "ok", "ok"}));
  CHECK(bad.at("variance").at("st2").at("status") == "non_finite");
}

// ---- probes -------------------------------------------------------------------------------------

TEST_CASE("labels add a probe of every layer, from whatever file they come") {
  folder const work;
  sites x(3, 40, 6);
  x.add("final_norm", 40, 6, 9);
  std::vector<std::int64_t> labels;
  std::string lines, header = "class\n", columns = "token,label,group\r\n";
  for (int i = 0; i < 40; ++i) {
    int const label = i % 3 == 0 ? 2 : i % 2;
    labels.push_back(label);
    // Put the label into one layer, where it can be read off.
    x.values["block.2"][static_cast<std::size_t>(6 * i + label)] += 30;
    lines += std::to_string(label) + "\n";
    columns +=
        std::to_string(i) + "," + std::to_string(label) + ", " + std::to_string(i / 4) + "\r\n";
  }
  x.write(work / "x.safetensors");
  rflow::write_npy(work.path / "y.npy", labels, {40});
  std::ofstream(work.path / "lines.txt") << lines;
  std::ofstream(work.path / "header.csv") << header << lines;
  std::ofstream(work.path / "columns.csv") << columns;
  json first;
  for (char const* file : {"y.npy", "lines.txt", "header.csv", "columns.csv"}) {
    CAPTURE(file);
    outcome const o = run(work, {"x.safetensors", "-o", "r", "--force", "--labels", file});
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    CHECK(o.out.find("in block.2, chance 0.35") != std::string::npos);
    json const m = metrics(work.path / "r");
    json probe = m.at("models").at(0).at("probe");
    CHECK(probe.at("labels").get<std::string>().starts_with(file));
    probe.erase("labels");
    if (first.is_null()) first = probe;
    CHECK(probe == first);
    CHECK(m.at("options").at("probe").at("labels") == file);
    CHECK(m.at("options").at("probe").at("groups").is_null());
  }
  CHECK(first.at("classes") == 3);
  CHECK(first.at("rows") == json({"embed", "block.1", "block.2", "block.3", "final_norm"}));
  CHECK(first.at("best") == "block.2");
  CHECK(first.at("chance").at("value") == 0.35);
  json const& accuracy = first.at("accuracy").at("mean").at("values");
  CHECK(accuracy.at(2).get<double>() > 0.9);
  CHECK(accuracy.at(0).get<double>() < 0.8);
  CHECK(first.at("drop").at("value") ==
        doctest::Approx(accuracy.at(2).get<double>() - accuracy.at(4).get<double>()));
  std::string const page = read(work.path / "r" / "report.html");
  CHECK(page.find("Accuracy by layer") != std::string::npos);
  CHECK(page.find("<b>Shows</b> the mean accuracy on held-out tokens") != std::string::npos);
  std::string const table = read(work.path / "r" / "sites.csv");
  CHECK(table.find(",probe_accuracy,probe_spread,probe_train_accuracy,probe_loss\n") !=
        std::string::npos);
  CHECK(table.find("," + accuracy.at(2).dump() + ",") != std::string::npos);

  // Groups, other settings, and a first token left out of labels as well.
  outcome const o =
      run(work, {"x.safetensors", "-o", "g", "--labels", "columns.csv", "--label-groups",
                 "columns.csv", "--probe-seeds", "2", "--probe-epochs", "20", "--probe-standardize",
                 "--skip-first", "4", "--no-plots"});
  CAPTURE(o.err);
  REQUIRE(o.status == 0);
  json const m = metrics(work.path / "g");
  CHECK(m.at("options").at("probe") == json({{"labels", "columns.csv"},
                                             {"label_column", nullptr},
                                             {"ignored", {"-100"}},
                                             {"groups", "columns.csv"},
                                             {"group_column", nullptr},
                                             {"seeds", 2},
                                             {"epochs", 20},
                                             {"standardize", true},
                                             {"validation_fraction", 0.2}}));
  CHECK(m.at("models").at(0).at("probe") != first);

  // Without labels nothing of this is there.
  REQUIRE(run(work, {"x.safetensors", "-o", "n"}).status == 0);
  CHECK(metrics(work.path / "n").at("models").at(0).at("probe").is_null());
  CHECK(read(work.path / "n" / "report.html").find("labels be read off") == std::string::npos);
}

TEST_CASE("a layer without a probe is a warning, and nothing to --strict's liking") {
  folder const work;
  sites x(2, 40, 6);
  std::fill(x.values["block.1"].begin(), x.values["block.1"].end(), 1.f);
  x.write(work / "x.safetensors");
  std::string lines;
  for (int i = 0; i < 40; ++i) lines += std::to_string(i % 2) + "\n";
  std::ofstream(work.path / "y.txt") << lines;
  outcome const o = run(work, {"x.safetensors", "--labels", "y.txt", "--strict", "--no-plots"});
  CHECK(o.status == 2);
  CHECK(o.out.find("block.1: no probe accuracy") != std::string::npos);
  json const probe = metrics(work.path / "x-report").at("models").at(0).at("probe");
  CHECK(probe.at("accuracy").at("mean").at("status") == json({"ok", "constant_layer", "ok"}));
}

TEST_CASE("labels that cannot be used: one line, status 1, nothing left") {
  folder const work;
  sites(2, 6, 4).write(work / "x.safetensors");
  auto const refused = [&](std::string const& text, std::vector<std::string> const& why,
                           char const* file = "y.csv") {
    std::ofstream(work.path / file, std::ios::binary) << text;
    std::vector<std::string> texts = why;
    texts.push_back(file);
    check_refused(work, {"x.safetensors", "--labels", file}, texts);
  };
  refused("0\n1\n0\n", {"3 labels for 6 tokens"});
  refused("0\n1\n0\n1\n0\n1.5\n", {"line 6", "an integer expected"});
  refused("0\n1\n\n1\n0\n1\n", {"5 labels for 6 tokens", "1 blank line"});
  refused("a,b\n0,1\n", {"line 1", "2 columns, none called label"});
  refused("a,label\n0,1\n1\n", {"line 3", "1 value where there were 2"});
  refused("0\n99999999999999999999\n", {"line 2", "an integer expected"});
  refused("", {"0 labels for 6 tokens"});
  refused("0\n0\n0\n0\n0\n0\n", {"1 class ('0')"});
  refused("0\n1\n2\n3\n4\n5\n", {"6 classes of the 6 tokens"});
  refused("\x93NUMPY", {"y.npy"}, "y.npy");
  rflow::write_npy(work.path / "f.npy", std::vector<float>(6), {6});
  check_refused(work, {"x.safetensors", "--labels", "f.npy"}, {"f.npy"});
  rflow::write_npy(work.path / "two.npy", std::vector<std::int32_t>(6), {3, 2});
  check_refused(work, {"x.safetensors", "--labels", "two.npy"}, {"two.npy", "1 class ('0')"});
  check_refused(work, {"x.safetensors", "--labels", "none.csv"}, {"none.csv"});
  check_refused(work, {"x.safetensors", "--probe-seeds", "3"}, {"--labels"});
  check_refused(work, {"x.safetensors", "--probe-standardize"}, {"--labels"});
}

TEST_CASE("labels: what is a header, and which file is to blame") {
  folder const work;
  sites(2, 6, 4).write(work / "x.safetensors");
  std::string const six = "0\n1\n0\n1\n0\n1\n";
  auto const write = [&](std::string const& text, char const* file = "y.csv") {
    std::ofstream(work.path / file, std::ios::binary) << text;
  };
  auto const options = [](std::vector<std::string> more = {}) {
    std::vector<std::string> out{"x.safetensors", "-q", "--no-plots", "--labels", "y.csv"};
    out.insert(out.end(), more.begin(), more.end());
    return out;
  };
  // One line too many, which would be dropped if it were a header.
  for (std::string const first :
       {"1.5", "true", "-", "0x1", "O", "l", "99999999999999999999", "#", "--", "Klasse"}) {
    CAPTURE(first);
    write(first + "\n" + six);
    check_refused(work, options(), {"y.csv: line 1: '" + first + "'"});
  }
  for (std::string const first : {"nan", "NaN", "None", "NA", "null", "1e3", "+1"}) {
    CAPTURE(first);
    write(first + "\n" + six);
    check_refused(work, options(), {"y.csv: 7 labels for 6 tokens"});
  }
  for (std::string const first : {"label", "class", "Class", "\"class\"", "label\r"}) {
    CAPTURE(first);
    write(first + "\n" + six);
    CHECK(run(work, options({"-o", "r", "--force"})).status == 0);
  }
  write("\xef\xbb\xbf" + six);  // a byte order mark is no part of a label
  CHECK(run(work, options({"-o", "r", "--force"})).status == 0);
  fs::remove_all(work.path / "r");
  write(six);
  write("0\n1\n", "g.csv");
  check_refused(work, options({"--label-groups", "g.csv"}), {"g.csv: 2 groups for 6 tokens"});
  write("0\n0\n0\n0\n0\n0\n", "g.csv");
  check_refused(work, options({"--label-groups", "g.csv"}), {"g.csv: ", "group"});
  write("0,1\nsome\n", "g.csv");
  check_refused(work, options({"--label-groups", "g.csv"}), {"g.csv: line 1"});
}

TEST_CASE("a loop of links names the input, not the folder of the report") {
  folder const work;
  sites(2, 6, 4).write(work / "x.safetensors");
  fs::create_symlink("loop", work.path / "loop");
  check_refused(work, {"loop", "-o", "r"}, {"rflow_report: loop: Too many levels"});
  check_refused(work, {"x.safetensors", "--labels", "loop", "-o", "r"},
                {"rflow_report: loop: Too many levels"});
  check_refused(work, {"x.safetensors", "-o", "loop"}, {"rflow_report: loop: Too many levels"});
}

TEST_CASE("numbers on the command line are decimal, finite and in range") {
  folder const work;
  sites(2, 12, 6).write(work / "x.safetensors");
  std::vector<std::string> const nonsense{
      "nan",  "inf",   "-inf", "-1", "1e400", "99999999999999999999",
      "0x10", "1_000", "",     " 5", "five",  "5 "};
  for (std::string const option :
       {"--skip-first", "--first-block", "--probe-seeds", "--probe-epochs", "--cka-batch",
        "--memory-limit", "--threads", "--checkpoint-seconds", "--rbf-fraction"})
    for (std::string const& value : nonsense) {
      CAPTURE(option);
      CAPTURE(value);
      bool const whole = option != "--checkpoint-seconds" && option != "--rbf-fraction";
      if (!whole && value == "99999999999999999999") continue;
      check_refused(work, {"x.safetensors", "--shards", option, value, "-o", "r"},
                    {option + ": a ", "number", "expected, found " + value});
    }
  for (std::string const option : {"--skip-first", "--first-block"})
    check_refused(work, {"x.safetensors", option, "9223372036854775807"}, {option, "expected"});
  check_refused(work, {"x.safetensors", "--threads", "4097"}, {"--threads", "0 to 4096"});
  // Not octal.
  REQUIRE(run(work, {"x.safetensors", "--skip-first", "010", "-o", "r", "--no-plots"}).status == 0);
  CHECK(metrics(work.path / "r").at("models").at(0).at("tokens").at("used") == 2);
}

TEST_CASE("whatever is written is finite, or says why there is no value") {
  folder const work;
  unsigned seed = 0;
  // What says ok has a value, and what has a value says ok.
  std::function<void(json const&, json const&, std::string const&)> const check_pair =
      [&](json const& value, json const& status, std::string const& at) {
        CAPTURE(at);
        if (status.is_string()) {
          CHECK((status == "ok") == value.is_number());
          return;
        }
        REQUIRE(value.size() == status.size());
        for (std::size_t i = 0; i < status.size(); ++i)
          check_pair(value[i], status[i], at + "/" + std::to_string(i));
      };
  std::function<void(json const&, std::string const&)> const check_all =
      [&](json const& x, std::string const& at) {
        if (x.is_object() && x.contains("status"))
          check_pair(x.contains("value") ? x.at("value") : x.at("values"), x.at("status"), at);
        if (x.is_number_float()) CHECK(std::isfinite(x.get<double>()));
        if (x.is_structured())
          for (auto const& [key, member] : x.items()) check_all(member, at + "/" + key);
      };
  for (double const scale : {1e-300, 1e-160, 1e-100, 1e-77, 1e77, 1e100, 1e150, 1e153, 1e160, 1e200,
                             1e300, 1e307, 1.7e308})
    for (bool const positive : {false, true}) {
      CAPTURE(scale);
      CAPTURE(positive);
      std::mt19937 bits(++seed);
      CAPTURE(seed);
      std::uniform_real_distribution<double> draw(positive ? 0.5 : -1.0, 1.0);
      std::map<std::string, std::vector<double>> values;
      std::vector<rflow::tensor> tensors;
      for (char const* name : {"embed", "block.1", "block.2", "final_norm"}) {
        auto& x = values[name];
        for (int i = 0; i < 12 * 40; ++i) x.push_back(scale * draw(bits));
        tensors.push_back(rflow::as_tensor(name, x, {12, 40}));
      }
      rflow::write_safetensors(work / "x.safetensors", tensors);
      for (std::string const normalization : {"none", "per_element"})
        for (std::string const shards : {"--no-plots", "--shards"}) {
          CAPTURE(normalization);
          CAPTURE(shards);
          outcome const o = run(work, {"x.safetensors", "-o", "r", "--force", "--no-plots", shards,
                                       "--normalization", normalization});
          CAPTURE(o.err);
          REQUIRE(o.status == 0);
          check_all(metrics(work.path / "r"), "");
          for (auto const& entry : fs::directory_iterator(work.path / "r")) {
            CAPTURE(entry.path().string());
            if (entry.path().extension() == ".csv") {
              std::string const text = read(entry.path());
              for (char const* word : {"null", "inf,", "nan"})
                CHECK(text.find(word) == std::string::npos);
            }
            if (entry.path().extension() != ".npy") continue;
            rflow::npy_file const file(entry.path());
            double const* const x = file.array().elements<double>();
            for (std::ptrdiff_t i = 0; i < file.array().size(); ++i)
              CHECK((std::isnan(x[i]) || std::abs(x[i]) <= 1 + 1e-6));
          }
          CHECK(o.out.find(" inf") == std::string::npos);
          CHECK(read(work.path / "r/report.html").find(">inf") == std::string::npos);
        }
    }
}

TEST_CASE("names are text, to spreadsheets and to screen readers") {
  folder const work;
  sites const a(2, 12, 6);
  std::map<std::string, std::string> const names{
      {"=1+1", "\"'=1+1\""},   {"+1", "\"'+1\""},
      {"-1", "\"'-1\""},       {"@SUM(A1)", "\"'@SUM(A1)\""},
      {"\t=1", "\"'\t=1\""},   {"\r=1", "\"'\r=1\""},
      {"a=1", "\"a=1\""},      {"say \"=1\"", "\"say \"\"=1\"\"\""},
      {"a,b\nc", "\"a,b\nc\""}};
  for (auto const& pair : names) {
    std::string const &name = pair.first, &cell = pair.second;
    CAPTURE(name);
    a.write(work / "a.safetensors", {{"model", name}});
    REQUIRE(run(work, {"a.safetensors", "-o", "r", "--force", "--no-plots"}).status == 0);
    for (char const* file : {"r/sites.csv", "r/blocks.csv"})
      CHECK(read(work / file).find("\n" + cell + ",\"embed\",") != std::string::npos);
  }
  // Two models, whose names are marked with colours for the eye.
  a.write(work / "a.safetensors", {{"model", "A <b> & \"c\""}, {"token_hash", "x"}});
  a.write(work / "b.safetensors", {{"model", "B"}, {"token_hash", "x"}});
  REQUIRE(run(work, {"a.safetensors", "b.safetensors", "-o", "r", "--force"}).status == 0);
  std::string const page = read(work / "r/report.html"), mark = "aria-label=\"";
  int labels = 0, named = 0;
  for (std::size_t at = 0; (at = page.find(mark, at)) != std::string::npos; ++labels) {
    at += mark.size();
    std::string const label = page.substr(at, page.find('"', at) - at);
    CAPTURE(label);
    for (char const* markup : {"<", ">", "&lt;i", "&amp;lt;", "&amp;quot;", "swatch"})
      CHECK(label.find(markup) == std::string::npos);
    named += label.find("A &lt;b&gt; &amp; &quot;c&quot;") != std::string::npos;
  }
  CHECK(labels > 10);
  CHECK(named == 8);  // two kernels, two estimators: its own and those between
}

TEST_CASE("an input that is cut short while it is read: one line that names it, status 1") {
  folder const work;
  sites(2, 6000, 64).write(work / "x.safetensors");
  std::string const whole = read(work / "x.safetensors");
  for (std::string const mode : {"--no-plots", "--shards"}) {
    CAPTURE(mode);
    std::ofstream(work / "x.safetensors", std::ios::binary) << whole;
    folder const results;
    std::string const err = results / "err";
    ::pid_t const child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      int const to_err = ::open(err.c_str(), O_WRONLY | O_CREAT, 0600);
      if (::dup2(to_err, 2) < 0 || ::chdir(work.path.c_str()) != 0) ::_exit(126);
      if (mode == "--shards")
        ::execl(RFLOW_REPORT, RFLOW_REPORT, "x.safetensors", "-q", "--no-plots", "--shards",
                "--cka", "full", "-o", "r", nullptr);
      ::execl(RFLOW_REPORT, RFLOW_REPORT, "x.safetensors", "-q", "--no-plots", "-o", "r", nullptr);
      ::_exit(127);
    }
    // As soon as it is mapped the program waits, and the file ends after its header.
    std::string const maps = "/proc/" + std::to_string(child) + "/maps";
    for (int look = 0; look < 100000; ++look) {
      std::ifstream in(maps);
      std::string const text{std::istreambuf_iterator<char>(in), {}};
      if (text.find("/x.safetensors") != std::string::npos) break;
      ::usleep(50);
    }
    ::kill(child, SIGSTOP);
    ::usleep(20000);
    fs::resize_file(work / "x.safetensors", 8192);
    ::kill(child, SIGCONT);
    int state = 0;
    REQUIRE(::waitpid(child, &state, 0) == child);
    std::string const said = read(err);
    CAPTURE(said);
    CHECK(WIFEXITED(state));
    CHECK(WEXITSTATUS(state) == 1);
    CHECK(std::count(said.begin(), said.end(), '\n') == 1);
    CHECK(said.starts_with("rflow_report: "));
    // Shards are opened twice: the second time the file may be too short already.
    bool const known = mode == "--shards" && said.find("x.safetensors: byte ") != std::string::npos;
    bool const told = said.ends_with("/x.safetensors: cut short while it was read\n");
    CHECK((known || told));
    CHECK(work.names() == std::vector<std::string>{"x.safetensors"});
  }
}

TEST_CASE("more sites than memory can hold the tables of: refused before anything is measured") {
  folder const work;
  // More than twice what this machine has, at 100 bytes for each pair of sites.
  double const bytes = 2 * static_cast<double>(::sysconf(_SC_PHYS_PAGES)) *
                       static_cast<double>(::sysconf(_SC_PAGESIZE));
  auto const count = static_cast<std::ptrdiff_t>(std::sqrt(bytes / 100));
  std::vector<float> const x(static_cast<std::size_t>(count), 1.0f);
  rflow::write_npy(work.path / "x.npy", x, {count, 1, 1});
  check_refused(work, {"x.npy", "-o", "r", "--axes", "sth"},
                {"x.npy: needs about ", " MiB", "this machine has "});
  check_refused(work, {"x.npy", "-o", "r", "--axes", "sth", "--shards"},
                {"x.npy: needs about ", " MiB", "this machine has "});
  check_refused(work, {"x.npy", "-o", "r", "--axes", "sth", "--shards", "--memory-limit", "4000"},
                {"x.npy: needs about ", " MiB", "--memory-limit is 4000"});
}

TEST_CASE("where the report goes") {
  folder const work;
  sites(2, 12, 6).write(work / "x.safetensors");
  SUBCASE("an earlier report is replaced only with --force") {
    REQUIRE(run(work, {"x.safetensors", "-o", "r", "--no-plots"}).status == 0);
    std::ofstream(work / "r/report.html") << "old";
    check_refused(work, {"x.safetensors", "-o", "r", "--no-plots"}, {"r: ", "--force"});
    CHECK(read(work / "r/report.html") == "old");
    CHECK(run(work, {"x.safetensors", "-o", "r/", "--no-plots", "--force"}).status == 0);
    check_page(work.path / "r");
    CHECK(work.names() == std::vector<std::string>{"r", "x.safetensors"});
  }
  SUBCASE("whatever a report can hold, --force can replace") {
    sites(2, 12, 6).write(work / "a.safetensors", {{"token_hash", "x"}});
    for (int i = 0; i < 2; ++i)
      CHECK(run(work, {"a.safetensors", "a.safetensors", "-o", "r", "--force", "-q"}).status == 0);
    CHECK(run(work, {"a.safetensors", "-o", "r", "--force", "-q"}).status == 0);
    CHECK_FALSE(fs::exists(work / "r/cka-cross.npy"));
  }
  SUBCASE("a folder with anything else is not replaced, not even with --force") {
    REQUIRE(run(work, {"x.safetensors", "-o", "r", "--no-plots"}).status == 0);
    std::string name = "thesis.tex";
    SUBCASE("a file") { std::ofstream(work / "r/thesis.tex") << "mine"; }
    SUBCASE("a hidden file") { std::ofstream(work / ("r/" + (name = ".notes"))) << "mine"; }
    SUBCASE("a folder") { fs::create_directory(work.path / "r/thesis.tex"); }
    SUBCASE("a folder that is called like a file of ours") {
      fs::remove(work.path / "r/cka.npy");
      fs::create_directory(work.path / "r" / (name = "cka.npy"));
    }
    SUBCASE("a link that is called like a file of ours") {
      fs::remove(work.path / "r/cka.npy");
      fs::create_symlink("../x.safetensors", work.path / "r" / (name = "cka.npy"));
    }
    check_refused(work, {"x.safetensors", "-o", "r", "--no-plots", "--force"},
                  {"r: holds " + name + ", which is not a report's"});
    CHECK(fs::exists(fs::symlink_status(work.path / "r" / name)));
    CHECK(fs::exists(work.path / "r/report.html"));
  }
  SUBCASE("nor one that holds an input, or is one") {
    fs::create_directories(work.path / "deep/x");
    std::vector<std::string> files;
    for (auto const& [name, values] : sites(1, 12, 6).values) {
      rflow::write_npy(work.path / "deep/x" / (name + ".npy"), values, {12, 6});
      files.push_back(name + ".npy");
    }
    fs::create_directory_symlink("deep/x", work.path / "link");
    fs::create_directory(work.path / "r");
    fs::create_symlink("../x.safetensors", work.path / "r/cka.npy");
    for (char const* to : {"deep", "deep/x", "deep/x/", "deep/../deep/x/.", "link"}) {
      CAPTURE(to);
      check_refused(work, {"deep/x", "-o", to, "--force"}, {"holds the input deep/x"});
      check_refused(work, {"link", "-o", to, "--force"}, {"holds the input link"});
    }
    check_refused(work, {"r/cka.npy", "-o", "r", "--force"}, {"holds the input r/cka.npy"});
    check_refused(work, {"x.safetensors", "--labels", "r/cka.npy", "-o", "r", "--force"},
                  {"holds the input r/cka.npy"});
    for (std::string const& name : files) CHECK(fs::exists(work.path / "deep/x" / name));
    // An empty folder counts, too: it would be gone when the time comes to read it.
    fs::create_directory(work.path / "empty");
    check_refused(work, {"empty", "-o", "empty"}, {"holds the input empty"});
    // Inside a folder that is an input there is room.
    CHECK(run(work, {"deep/x", "-o", "deep/x/r", "--no-plots"}).status == 0);
  }
  SUBCASE("nor the present folder or one above it, by whatever name") {
    std::string const up = "../../" + work.path.parent_path().filename().string();
    for (std::string const& to : {std::string("."), std::string(".."), std::string("/"), up,
                                  work.path.string(), "../" + work.path.filename().string()}) {
      CAPTURE(to);
      check_refused(work, {"x.safetensors", "-o", to, "--force"},
                    {"holds the present folder", "folder of its own"});
    }
    CHECK(fs::exists(work / "x.safetensors"));
  }
  SUBCASE("a link is followed") {
    fs::create_directory(work.path / "real");
    fs::create_directory_symlink("real", work.path / "link");
    for (char const* to : {"link", "link/"})
      CHECK(run(work, {"x.safetensors", "-o", to, "--no-plots", "--force"}).status == 0);
    CHECK(fs::is_symlink(work.path / "link"));
    CHECK(fs::exists(work / "real/report.html"));
    CHECK(work.names() == std::vector<std::string>{"link", "real", "x.safetensors"});
    std::ofstream(work / "real/thesis.tex") << "mine";
    check_refused(work, {"x.safetensors", "-o", "link", "--force"}, {"link: holds thesis.tex"});
    fs::create_symlink("nowhere", work.path / "broken");
    check_refused(work, {"x.safetensors", "-o", "broken", "--force"}, {"broken: is a link"});
  }
  SUBCASE("no name at all") {
    check_refused(work, {"x.safetensors", "-o", ""}, {"--output: ", "expected"});
  }
  SUBCASE("an empty folder is taken") {
    fs::create_directory(work.path / "r");
    CHECK(run(work, {"x.safetensors", "-o", "r", "--no-plots"}).status == 0);
    CHECK(fs::exists(work / "r/report.html"));
  }
  SUBCASE("a file is not") {
    check_refused(work, {"x.safetensors", "-o", "x.safetensors", "--force"},
                  {"x.safetensors: ", "not a folder"});
    CHECK(fs::is_regular_file(work / "x.safetensors"));
  }
  SUBCASE("a parent that is not there") {
    check_refused(work, {"x.safetensors", "-o", "none/r"}, {"none/r: ", "No such file"});
  }
  SUBCASE("a parent that cannot be written to") {
    check_refused(work, {"x.safetensors", "-o", "/proc/r"}, {"/proc/r: cannot be made"});
  }
  SUBCASE("bad input does not touch what was there") {
    fs::create_directory(work.path / "r");
    std::ofstream(work / "r/report.html") << "mine";
    check_refused(work, {"none.safetensors", "-o", "r", "--force"}, {"none.safetensors"});
    CHECK(read(work / "r/report.html") == "mine");
  }
}

TEST_CASE("gnuplot") {
  folder const work;
  sites(2, 12, 6).write(work / "x.safetensors");
  SUBCASE("missing: an error that says what to do") {
    check_refused(work, {"x.safetensors"}, {"gnuplot is not on the PATH", "--no-plots"},
                  "/nowhere");
    CHECK(run(work, {"x.safetensors", "--no-plots"}, "/nowhere").status == 0);
    check_page(work.path / "x-report");
  }
  SUBCASE("failing: its words and no report") {
    folder const tools;
    std::ofstream(tools / "gnuplot") << "#!/bin/sh\necho 'out of ink' >&2\nexit 3\n";
    fs::permissions(tools / "gnuplot", fs::perms::owner_all);
    check_refused(work, {"x.safetensors"}, {"gnuplot failed with status 3", "out of ink"},
                  tools.path.c_str());
  }
  SUBCASE("silent: status 0 without a figure is a failure, too") {
    folder const tools;
    std::ofstream(tools / "gnuplot") << "#!/bin/sh\nexit 0\n";
    fs::permissions(tools / "gnuplot", fs::perms::owner_all);
    check_refused(work, {"x.safetensors"}, {"gnuplot failed"}, tools.path.c_str());
  }
}

TEST_CASE("many tokens are binned in the heat map, not in the numbers") {
  folder const work;
  sites(2, 5000, 3).write(work / "x.safetensors");
  REQUIRE(run(work, {"x.safetensors", "--kernel", "linear"}).status == 0);
  CHECK(read(work / "x-report/report.html").find("5000 tokens in 2048 columns") !=
        std::string::npos);
  CHECK(rflow::npy_file(work / "x-report/adjacent.npy").array().shape ==
        std::vector<std::ptrdiff_t>{2, 5000});
}
