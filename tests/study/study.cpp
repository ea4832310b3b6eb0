// SPDX-License-Identifier: Apache-2.0
// The study program from outside: exit status, the line on stderr, what is left behind.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <rflow/npy.hpp>
#include <rflow/safetensors.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "../program.hpp"

namespace {

using nlohmann::json;
using program::folder;
using program::outcome;
using program::read;

std::string const references = std::string(RFLOW_SOURCE_DIR) + "/tests/reference/models/";

outcome run(folder const& where, std::vector<std::string> const& arguments,
            char const* path = nullptr) {
  return program::run(RFLOW_STUDY, where, arguments, path);
}
void check_refused(folder const& where, std::vector<std::string> const& arguments,
                   std::vector<std::string> const& texts) {
  program::check_refused(RFLOW_STUDY, where, arguments, texts);
}

}  // namespace

TEST_CASE("random: every combination once, in JSON, CSV and HTML") {
  folder where;
  outcome const o =
      run(where, {"random",    "-m",      "pythia-2.8b", "-m",  "mamba2-130m", "-s",  "gaussian",
                  "-s",        "kaiming", "--depth",     "0.1", "--width",     "0.1", "-n",
                  "40",        "--seeds", "2",           "-c",  "no_norm",     "-c",  "embedding_2",
                  "--threads", "2",       "-q",          "-o",  "out"});
  CHECK(o.err == "");
  CHECK(o.status == 0);
  json const study = json::parse(read(where / "out/study.json"));
  CHECK(study["runs"].size() == 2 * 2 * 3 * 2);
  for (json const& r : study["runs"]) {
    CAPTURE(r["model"]);
    auto const blocks = r["blocks"].get<std::size_t>();
    CHECK(blocks == (r["model"] == "pythia-2.8b" ? 3 : 2));
    CHECK(r["inter_token"].size() == blocks + 1);
    CHECK(r["inter_token_of_updates"].size() == blocks);
    CHECK(std::abs(r["inter_token"][0].get<double>()) < 0.05);  // drawn embeddings
    CHECK(r["st2"] > 0);
    CHECK(r["share_of_peak"] > 0);
    if (r["control"] == "embedding_2") continue;
    CHECK(r["seed"] >= 1);
  }
  std::string const runs = read(where / "out/runs.csv"), sites = read(where / "out/sites.csv");
  CHECK(std::count(runs.begin(), runs.end(), '\n') == 1 + 24);
  CHECK(std::count(sites.begin(), sites.end(), '\n') == 1 + 12 * (4 + 3));
  std::string const page = read(where / "out/report.html");
  CHECK(page.find("kaiming, no_norm") != std::string::npos);
  CHECK(page.find("<svg class=\"plot\"") != std::string::npos);
}

TEST_CASE("random: the same seed gives the same figures, another seed others") {
  folder where;
  auto const figures = [&](std::string const& seed, std::string const& threads) {
    outcome const o =
        run(where,
            {"random", "-m", "mamba-2.8b", "-s",      "xavier", "--depth",      "0.05", "--width",
             "0.05",   "-n", "33",         "--seeds", "1",      "--first-seed", seed,   "--threads",
             threads,  "-q", "--no-plots", "-o",      "out",    "--force"});
    REQUIRE(o.status == 0);
    return json::parse(read(where / "out/study.json"))["runs"][0]["inter_token"];
  };
  json const one = figures("1", "1");
  CHECK(one == figures("1", "3"));
  CHECK(one != figures("2", "1"));
}

TEST_CASE("random: a published configuration, and given tokens") {
  folder where;
  std::vector<std::int64_t> const ids{1, 5, 3, 36, 0, 2};
  rflow::write_npy(where / "ids.npy", ids, {6});
  outcome const o =
      run(where, {"random", "-m", references + "mamba_plain", "-s", "mamba_ssm", "--ids", "ids.npy",
                  "--seeds", "1", "-q", "--no-plots", "-o", "out"});
  CHECK(o.err == "");
  json const r = json::parse(read(where / "out/study.json"))["runs"][0];
  CHECK(r["tokens"] == 6);
  CHECK(r["hidden"] == 40);
  CHECK(r["model"] == "mamba_plain");
}

TEST_CASE("bad input is one line, and nothing is left behind") {
  folder where;
  std::vector<std::int64_t> const ids{1, 50000000};
  rflow::write_npy(where / "ids.npy", ids, {2});
  check_refused(where, {}, {"subcommand"});
  check_refused(where, {"random", "-m", "gpt-9"}, {"model 'gpt-9'"});
  check_refused(where, {"random", "-s", "glorot"}, {"scheme 'glorot'"});
  check_refused(where, {"random", "-c", "embedding_x"}, {"control 'embedding_x'"});
  check_refused(where, {"random", "-m", "mamba2-130m", "--ids", "none.npy"}, {"none.npy"});
  check_refused(where, {"random", "-m", "mamba2-130m", "--depth", "0.01", "--ids", "ids.npy"},
                {"token 1 has the id 50000000"});
  check_refused(where, {"random", "--tokens", "1"}, {"--tokens"});
}

TEST_CASE("kvpr: prompts of text and of integers, gold where it was asked for") {
  folder where;
  REQUIRE(run(where, {"kvpr", "text.jsonl", "--contexts", "3", "--pairs", "5", "--gold", "0", "4"})
              .status == 0);
  std::istringstream lines(read(where / "text.jsonl"));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    json const x = json::parse(line);
    std::string const prompt = x["prompt"], answer = x["answers"][0];
    CHECK(x["context"] == count / 2);
    CHECK(x["label"] == count % 2);
    CHECK(x["gold_index"] == (count % 2 == 0 ? 0 : 4));
    std::size_t const at = prompt.find(answer);
    REQUIRE(at != std::string::npos);
    CHECK(std::count(prompt.begin() + static_cast<std::ptrdiff_t>(prompt.find('{')),
                     prompt.begin() + static_cast<std::ptrdiff_t>(at),
                     '\n') == x["gold_index"].get<int>());
    CHECK(std::count(prompt.begin(), prompt.end(), ':') == 1 + 5 + 1 + 1);
  }
  CHECK(count == 6);

  REQUIRE(run(where, {"kvpr", "ids.st", "--integers", "--contexts", "4", "--pairs", "6"}).status ==
          0);
  rflow::safetensors_file const file(where / "ids.st");
  auto const ids = file["ids"].integers(), gold = file["gold"].integers(),
             offsets = file["offsets"].integers(), answers = file["answer"].integers(),
             groups = file["group"].integers();
  CHECK(gold.size() == 24);
  CHECK(offsets.size() == 25);
  for (std::size_t k = 0; k < gold.size(); ++k) {
    auto const begin = static_cast<std::size_t>(offsets[k]);
    CHECK(offsets[k + 1] - offsets[k] == 13);
    CHECK(groups[k] == static_cast<std::int64_t>(k / 6));
    auto const pair = begin + 2 * static_cast<std::size_t>(gold[k]);
    CHECK(ids[pair] == ids[begin + 12]);  // the key that is asked for
    CHECK(ids[pair + 1] == answers[k]);
    for (std::size_t i = 0; i < 6; ++i) {
      CHECK(ids[begin + 2 * i] <= 32);
      CHECK(ids[begin + 2 * i + 1] > 32);
    }
  }
  check_refused(where, {"kvpr", "x", "--integers", "--pairs", "40"}, {"--pairs 40"});
  check_refused(where, {"kvpr", "x", "--pairs", "3", "--gold", "3"}, {"positions are 0 to 2"});
}

TEST_CASE("mdqa: the gold document where it was asked for") {
  folder where;
  json line = {{"question", "Who?"}, {"answers", {"nobody"}}, {"ctxs", json::array()}};
  for (int i = 0; i < 4; ++i)
    line["ctxs"].push_back({{"title", "t" + std::to_string(i)},
                            {"text", "x" + std::to_string(i)},
                            {"isgold", i == 2}});
  std::ofstream(where / "in.jsonl") << line << "\n";
  REQUIRE(run(where, {"mdqa", "in.jsonl", "out.jsonl", "--documents", "3", "--gold", "0", "2"})
              .status == 0);
  std::istringstream lines(read(where / "out.jsonl"));
  std::string text;
  REQUIRE(std::getline(lines, text));
  std::string prompt = json::parse(text)["prompt"];
  CHECK(prompt.find("Document [1](Title: t2) x2\nDocument [2](Title: t0) x0\nDocument [3]") !=
        std::string::npos);
  CHECK(prompt.ends_with("\n\nQuestion: Who?\nAnswer:"));
  REQUIRE(std::getline(lines, text));
  prompt = json::parse(text)["prompt"];
  CHECK(prompt.find("Document [3](Title: t2) x2\n\n") != std::string::npos);
  CHECK(prompt.find("t3") == std::string::npos);
  CHECK(!std::getline(lines, text));

  check_refused(where, {"mdqa", "in.jsonl", "x", "--documents", "5"}, {"in.jsonl, line 1"});
  line["ctxs"][2].erase("isgold");
  std::ofstream(where / "bad.jsonl") << line << "\n";
  check_refused(where, {"mdqa", "bad.jsonl", "x"}, {"bad.jsonl, line 1: no gold document"});
}

TEST_CASE("probe: layers of a checkpoint, beside random weights") {
  folder where;
  REQUIRE(run(where, {"kvpr", "p.st", "--integers", "--contexts", "12", "--pairs", "3", "--keys",
                      "16", "--values", "16"})
              .status == 0);
  outcome const o =
      run(where, {"probe", references + "mamba_plain", "-p", "p.st", "--seeds", "2", "--epochs",
                  "20", "--against-random", "transformers", "--threads", "2", "-q", "-o", "out"});
  CHECK(o.err == "");
  REQUIRE(o.status == 0);
  json const study = json::parse(read(where / "out/study.json"));
  REQUIRE(study["runs"].size() == 2);
  for (json const& r : study["runs"]) {
    CHECK(r["prompts"] == 36);
    CHECK(r["classes"] == 3);
    CHECK(r["mean_tokens"] == 7);
    CHECK(r["accuracy"].size() == 3);
    CHECK(r["chance"].get<double>() == doctest::Approx(1 / 3.0));
    // The last token is the key: its embedding says nothing about where it stood before.
    CHECK(r["accuracy"][0]["mean"].get<double>() < 0.7);
    CHECK(r["inter_token"].size() == 3);
    CHECK(r["st2"]["mean"] > 0);
  }
  CHECK(read(where / "out/report.html").find("mamba_plain, random (transformers)") !=
        std::string::npos);
  check_refused(where, {"probe", references + "mamba_plain", "-p", "none.st"}, {"none.st"});
  check_refused(where, {"probe", references + "mamba_plain", "-p", "p.st", "--label", "nothing"},
                {"nothing"});
}

TEST_CASE("probe: a trained model knows the answer after its last layers, a random one nowhere") {
  folder where;
  REQUIRE(run(where, {"kvpr", "p.st", "--integers", "--contexts", "200", "--pairs", "8", "--keys",
                      "16", "--values", "16"})
              .status == 0);
  std::string const trained = std::string(RFLOW_SOURCE_DIR) + "/examples/models/trained/";
  outcome const o =
      run(where, {"probe", trained + "gpt-neox", trained + "mamba", "-p", "p.st", "--seeds", "1",
                  "--against-random", "transformers", "--label", "answer", "-q", "-o", "out"});
  CHECK(o.err == "");
  REQUIRE(o.status == 0);
  json const runs = json::parse(read(where / "out/study.json"))["runs"];
  REQUIRE(runs.size() == 4);
  for (json const& r : runs) {
    CAPTURE(r["model"].get<std::string>());
    CHECK(r["classes"] == 16);
    bool const random = r["model"].get<std::string>().find("random") != std::string::npos;
    if (random)
      CHECK(r["best"]["mean"].get<double>() < 0.6);
    else
      CHECK(r["final_norm"]["mean"].get<double>() > 0.95);
    CHECK(r["accuracy"][0]["mean"].get<double>() < 0.3);
  }
}

TEST_CASE("checkpoint: the full report, one model or two") {
  folder where;
  std::vector<std::int64_t> ids;
  for (int i = 0; i < 20; ++i) ids.push_back(i * 7 % 37);
  rflow::write_npy(where / "ids.npy", ids, {20});
  outcome const o =
      run(where, {"checkpoint", references + "neox_sequential", "--ids", "ids.npy",
                  "--against-random", "gaussian", "--threads", "2", "-q", "-o", "out"});
  CHECK(o.err == "");
  REQUIRE(o.status == 0);
  json const report = json::parse(read(where / "out/metrics.json"));
  REQUIRE(report["models"].size() == 2);
  CHECK(report["comparison"]["same_tokens"] == true);
  CHECK(report["models"][0]["blocks"] == 2);
  CHECK(report["models"][0]["final_norm"].is_object());
  check_refused(where,
                {"checkpoint", references + "mamba_plain", references + "neo_windows",
                 "--against-random", "gaussian", "--ids", "ids.npy", "-o", "x"},
                {"one model, or on two"});
  check_refused(where, {"checkpoint", references + "none", "--ids", "ids.npy", "-o", "x"},
                {"none"});
}
