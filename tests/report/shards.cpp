// SPDX-License-Identifier: Apache-2.0
// The report program on one model in many files: the numbers of one pass over all of them, whatever
// happens on the way.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <rflow/cka.hpp>
#include <rflow/flow.hpp>
#include <rflow/safetensors.hpp>

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../program.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

using program::folder;
using program::read;

::pid_t start(folder const& where, std::vector<std::string> arguments, std::string const& err) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  ::pid_t const child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int const to_err = ::open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    int const to_out = ::open("/dev/null", O_WRONLY);
    if (::dup2(to_out, 1) < 0 || ::dup2(to_err, 2) < 0 || ::chdir(where.path.c_str()) != 0 ||
        ::setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1) != 0 ||
        ::setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1) != 0 ||
        ::setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 1) != 0 ||
        ::setenv("ASAN_OPTIONS", "detect_leaks=0", 1) != 0)
      ::_exit(126);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  return child;
}

/// Whether memory is counted as usual; under a sanitizer a limit on it ends the program at once.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool plain_memory = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool plain_memory = false;
#else
constexpr bool plain_memory = true;
#endif
#else
constexpr bool plain_memory = true;
#endif

struct outcome {
  int status;  // -1: killed
  std::string err;
};

/// Waits, but not for ever: a program that hangs is ended, and the test fails.
outcome wait_for(::pid_t child, std::string const& err) {
  int state = 0;
  for (int look = 0; look < 30000; ++look) {
    if (::waitpid(child, &state, WNOHANG) == child)
      return {WIFEXITED(state) ? WEXITSTATUS(state) : -1, read(err)};
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  ::kill(child, SIGKILL);
  ::waitpid(child, &state, 0);
  FAIL("the program hangs");
  return {-1, ""};
}

outcome run(folder const& where, std::vector<std::string> arguments) {
  folder const results;
  arguments.insert(arguments.begin(), RFLOW_REPORT);
  std::string const err = results / "err";
  return wait_for(start(where, arguments, err), err);
}

/// A model of 4 sites × 24 features in shards of random lengths, and all of it as one stack.
struct model {
  static constexpr std::ptrdiff_t width = 24;
  std::vector<std::vector<float>> values{4};  // sites × (tokens · width)
  std::vector<std::ptrdiff_t> offsets{0};     // of sequences
  std::vector<std::string> names;             // of the shards

  model(folder const& where, unsigned seed, std::size_t shards, std::size_t longest = 700,
        bool many_sequences = false) {
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    for (std::size_t k = 0; k < shards; ++k) {
      std::size_t const tokens = 5 + bits() % longest;
      auto const n = static_cast<std::ptrdiff_t>(tokens);
      std::vector<std::vector<float>> part(4, std::vector<float>(tokens * 24));
      for (std::size_t i = 0; i < tokens * 24; ++i) {
        float x = normal(bits) + 0.5f;
        for (auto& site : part) site[i] = x, x += 0.4f * normal(bits);
      }
      std::vector<rflow::tensor> tensors;
      for (std::size_t l = 0; l < 4; ++l) {
        tensors.push_back(
            rflow::as_tensor(l == 0 ? "embed" : "block." + std::to_string(l), part[l], {n, width}));
        values[l].insert(values[l].end(), part[l].begin(), part[l].end());
      }
      std::vector<std::int64_t> cuts{0, n};
      if (many_sequences) cuts = {0, n / 3, n / 2, n};
      if (many_sequences) tensors.push_back(rflow::as_tensor("sequences", cuts, {4}));
      std::ptrdiff_t const before = offsets.back();
      for (std::size_t q = 1; q < cuts.size(); ++q) offsets.push_back(before + cuts[q]);
      names.push_back("part-" + std::to_string(k) + ".safetensors");
      rflow::write_safetensors(where / names.back(), tensors);
    }
  }

  std::ptrdiff_t tokens() const { return offsets.back(); }
  rflow::layer_stack<float> stack() const {
    std::vector<rflow::view<float>> views;
    for (auto const& site : values) views.emplace_back(site.data(), tokens(), width);
    return rflow::layer_stack<float>(views).sequences(offsets);
  }
  std::vector<std::string> arguments(std::vector<std::string> more) const {
    std::vector<std::string> out{"--shards", "--no-plots", "--quiet"};
    out.insert(out.end(), more.begin(), more.end());
    out.insert(out.end(), names.begin(), names.end());
    return out;
  }
};

/// Kills runs until one leaves a checkpoint behind, with no report.
void leave_checkpoint(folder const& here, model const& m) {
  std::vector<std::string> arguments =
      m.arguments({"-o", "out", "--checkpoint", "state", "--checkpoint-seconds", "0"});
  arguments.insert(arguments.begin(), RFLOW_REPORT);
  for (int attempt = 0; attempt < 200 && !fs::exists(here / "state"); ++attempt) {
    fs::remove_all(here / "out");
    ::pid_t const child = start(here, arguments, here / "err");
    for (int i = 0; i < 2000 && !fs::exists(here / "state") && !fs::exists(here / "out"); ++i)
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
  }
  fs::remove_all(here / "out");
  fs::remove(here / "err");
  REQUIRE(fs::exists(here / "state"));
  for (auto const& name : here.names())  // what a killed program was writing
    if (name.find(".tmp-") != std::string::npos) fs::remove_all(here / name);
}

/// Every number of two reports, to a relative 1e-12, those of CKA to `cka`; the rest equal.
[[maybe_unused]] void check_close(json const& a, json const& b, double cka = 1e-12,
                                  std::string const& where = "") {
  CAPTURE(where);
  REQUIRE(a.type() == b.type());
  if (a.is_number_float()) {
    double const within = where.find("/cka/") == std::string::npos ? 1e-12 : cka;
    CHECK(std::abs(a.get<double>() - b.get<double>()) <=
          within * std::max(1.0, std::abs(b.get<double>())));
  } else if (a.is_structured()) {
    REQUIRE(a.size() == b.size());
    for (auto const& [key, value] : a.items())
      check_close(value, a.is_array() ? b.at(std::stoul(key)) : b.at(key), cka, where + "/" + key);
  } else {
    CHECK(a == b);
  }
}

}  // namespace

TEST_CASE("shards give the numbers of all tokens in one") {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    CAPTURE(seed);
    folder const here;
    // The last seed has shards longer than what is read at once.
    model const m(here, seed, seed == 4 ? 2 : 5, seed == 4 ? 6000 : 700, seed % 2 == 0);
    outcome const o = run(here, m.arguments({"-o", "out", "--cka-batch", "64"}));
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    json const report = json::parse(read(here / "out/metrics.json")).at("models")[0];
    rflow::flow_report const f =
        rflow::flow(m.stack(), {.normalize = rflow::normalization::per_element});
    auto const close = [](json const& a, double b) {
      CHECK(std::abs(a.get<double>() - b) <= 1e-6 * std::max(1.0, std::abs(b)));
    };
    CHECK(report.at("tokens").at("used") == f.tokens);
    close(report.at("variance").at("st1").at("value"), f.variance.st1);
    close(report.at("variance").at("st2").at("value"), f.variance.st2);
    rflow::cka_accumulator<> cka;
    rflow::running_stat st1;
    for (std::size_t q = 0; q + 1 < m.offsets.size(); ++q) {
      auto const part = [&](std::ptrdiff_t from, std::ptrdiff_t to) {
        std::vector<rflow::view<float>> views;
        for (auto const& site : m.values)
          views.emplace_back(site.data() + from * model::width, to - from, model::width);
        return rflow::layer_stack<float>(views);
      };
      if (m.offsets[q] == m.offsets[q + 1]) continue;
      for (std::ptrdiff_t b = m.offsets[q]; b < m.offsets[q + 1]; b += 64)
        cka.add(part(b, std::min(b + 64, m.offsets[q + 1])));
      st1.add(
          rflow::variance(part(m.offsets[q], m.offsets[q + 1]), rflow::normalization::per_element)
              .st1);
    }
    for (std::size_t p = 0; p < 4; ++p) {
      close(report.at("inter_token_cosine").at("values")[p], f.inter_token[p]);
      for (std::size_t q = 0; q < 4; ++q)
        CHECK(std::abs(report.at("cka")[0].at("debiased").at("values")[p][q].get<double>() -
                       cka(static_cast<std::ptrdiff_t>(p), static_cast<std::ptrdiff_t>(q)).value) <
              1e-5);
    }
    json const& shards = report.at("shards");
    CHECK(shards.at("cka").at("batches") == cka.batches());
    CHECK(shards.at("cka").at("left_out") == cka.left_out());
    close(shards.at("per_sequence").at("st1").at("mean"), st1.mean);
    close(shards.at("per_sequence").at("st1").at("stddev"), st1.stddev());
    CHECK(shards.at("per_sequence").at("st1").at("sequences") == st1.count);
  }
}

TEST_CASE("full CKA of shards pairs all tokens of all shards that count") {
  for (unsigned seed = 1; seed <= 3; ++seed) {
    CAPTURE(seed);
    folder const here;
    model const m(here, seed, 4, 400, seed == 2);
    outcome const o = run(here, m.arguments({"-o", "out", "--cka", "full", "--skip-first", "2",
                                             "--kernel", "both", "--significance"}));
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    json const report = json::parse(read(here / "out/metrics.json")).at("models")[0];
    std::vector<bool> counts(static_cast<std::size_t>(m.tokens()), true);
    for (std::size_t q = 0; q + 1 < m.offsets.size(); ++q)
      for (std::ptrdiff_t i = m.offsets[q]; i < std::min(m.offsets[q] + 2, m.offsets[q + 1]); ++i)
        counts[static_cast<std::size_t>(i)] = false;
    rflow::layer_stack<float> const stack = m.stack().tokens(counts);
    CHECK(report.at("tokens").at("used") == stack.size());
    CHECK(report.at("shards").at("cka").is_null());
    rflow::on_cpu const on{.significance = true};
    auto const check = [&](json const& table, rflow::gram_moments const& moments) {
      auto const debiased = rflow::cka_matrix(moments, rflow::debiased{});
      auto const biased = rflow::cka_matrix(moments, rflow::biased{});
      for (std::ptrdiff_t p = 0; p < 4; ++p) {
        auto const i = static_cast<std::size_t>(p);
        for (std::ptrdiff_t q = 0; q < 4; ++q) {
          auto const j = static_cast<std::size_t>(q);
          auto const close = [&](json const& x, double y) {
            CHECK(std::abs(x[i][j].get<double>() - y) < 1e-6 * std::max(1.0, std::abs(y)));
          };
          close(table.at("debiased").at("values"), debiased(p, q));
          close(table.at("biased").at("values"), biased(p, q));
          close(table.at("significance").at("score"), debiased.score(p, q));
          json const& significance = table.at("significance");
          CHECK(significance.at("status")[i][j] == rflow::to_string(debiased.p_value(p, q).why));
          if (debiased.p_value(p, q).ok())
            close(significance.at("p_value"), debiased.p_value(p, q));
        }
        std::ptrdiff_t const top = debiased.top_token(p);
        json const& told = table.at("top_token_share").at("token")[i];
        if (top < 0)  // the feature path knows of none
          CHECK(told.is_null());
        else
          CHECK(told == stack.selection()[static_cast<std::size_t>(top)]);
      }
    };
    REQUIRE(report.at("cka").size() == 2);
    check(report.at("cka")[0], on.gram(rflow::linear{}, stack));
    check(report.at("cka")[1], on.gram(rflow::rbf{}, stack));
  }
}

TEST_CASE("full CKA of so many tokens that it goes in pieces") {
  folder const here;
  model const m(here, 3, 6, 30000);
  REQUIRE(m.tokens() > 2 * 16384);
  outcome const o = run(here, m.arguments({"-o", "out", "--cka", "full", "--kernel", "linear"}));
  CAPTURE(o.err);
  REQUIRE(o.status == 0);
  json const report = json::parse(read(here / "out/metrics.json")).at("models")[0];
  rflow::cka_table const t = rflow::cka_matrix(m.stack());
  for (std::ptrdiff_t p = 0; p < 4; ++p)
    for (std::ptrdiff_t q = 0; q < 4; ++q)
      CHECK(std::abs(report.at("cka")[0]
                         .at("debiased")
                         .at("values")[static_cast<std::size_t>(p)][static_cast<std::size_t>(q)]
                         .get<double>() -
                     t(p, q)) < 1e-6);
}

TEST_CASE("killed at random points and started again, the numbers are the same") {
  folder const here;
  model const m(here, 7, 12, 3000, true);
  REQUIRE(run(here, m.arguments({"-o", "whole"})).status == 0);
  std::mt19937 bits(11);
  std::vector<std::string> arguments = m.arguments(
      {"-o", "resumed", "--checkpoint", "state", "--checkpoint-seconds", "0", "--threads", "1"});
  arguments.insert(arguments.begin(), RFLOW_REPORT);
  int killed = 0, resumed = 0;
  for (int attempt = 0; attempt < 60 && !fs::exists(here / "resumed"); ++attempt) {
    resumed += fs::exists(here / "state");
    ::pid_t const child = start(here, arguments, here / "err");
    // Longer and longer, so that it ends.
    std::this_thread::sleep_for(
        std::chrono::milliseconds(5 + bits() % static_cast<unsigned>(20 + 20 * attempt)));
    ::kill(child, SIGKILL);
    int state = 0;
    REQUIRE(::waitpid(child, &state, 0) == child);
    killed += WIFSIGNALED(state);
    CAPTURE(read(here / "err"));
    if (WIFEXITED(state)) CHECK(WEXITSTATUS(state) == 0);
  }
  CHECK(killed > 0);
  CHECK(resumed > 0);
  if (!fs::exists(here / "resumed")) {
    outcome const o = wait_for(start(here, arguments, here / "err"), here / "err");
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
  }
  CHECK(read(here / "resumed/metrics.json") == read(here / "whole/metrics.json"));
  CHECK_FALSE(fs::exists(here / "state"));
}

TEST_CASE("shards and checkpoints that cannot be used: one line, status 1, nothing half-written") {
  folder const here;
  model const m(here, 3, 3);
  auto const refused = [&](std::vector<std::string> const& arguments,
                           std::vector<std::string> const& texts) {
    std::vector<std::string> const before = here.names();
    outcome const o = run(here, arguments);
    CAPTURE(o.err);
    CHECK(o.status == 1);
    CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
    for (std::string const& text : texts) CHECK(o.err.find(text) != std::string::npos);
    CHECK(here.names() == before);
  };
  SUBCASE("a shard of another width") {
    std::vector<float> const x(10 * 25, 1.0f);
    std::vector<rflow::tensor> tensors;
    for (int l = 0; l < 4; ++l)
      tensors.push_back(
          rflow::as_tensor(l == 0 ? "embed" : "block." + std::to_string(l), x, {10, 25}));
    rflow::write_safetensors(here / "other.safetensors", tensors);
    refused(m.arguments({"other.safetensors", "-o", "out"}), {"not a shard of the same model"});
  }
  SUBCASE("a shard that is not there, or cut short") {
    refused(m.arguments({"-o", "out", "none.safetensors"}), {"none.safetensors"});
    std::string const whole = read(here / m.names[1]);
    std::ofstream(here / m.names[1], std::ios::binary) << whole.substr(0, whole.size() - 100);
    refused(m.arguments({"-o", "out"}), {m.names[1]});
  }
  SUBCASE("sequences that do not fit") {
    std::vector<float> const x(10 * 24, 1.0f);
    std::vector<std::int64_t> const cuts{0, 12};
    std::vector<rflow::tensor> tensors{rflow::as_tensor("sequences", cuts, {2})};
    for (int l = 0; l < 4; ++l)
      tensors.push_back(
          rflow::as_tensor(l == 0 ? "embed" : "block." + std::to_string(l), x, {10, 24}));
    rflow::write_safetensors(here / "cuts.safetensors", tensors);
    refused(m.arguments({"cuts.safetensors", "-o", "out"}), {"cuts.safetensors", "sequences"});
  }
  SUBCASE("sequences that are no list of integers") {
    std::vector<float> const x(10 * 24, 1.0f), cuts{0, 10};
    std::vector<std::int64_t> const square{0, 2, 5, 10};
    for (bool const floats : {true, false}) {
      std::vector<rflow::tensor> tensors{floats ? rflow::as_tensor("sequences", cuts, {2})
                                                : rflow::as_tensor("sequences", square, {2, 2})};
      for (int l = 0; l < 4; ++l)
        tensors.push_back(
            rflow::as_tensor(l == 0 ? "embed" : "block." + std::to_string(l), x, {10, 24}));
      rflow::write_safetensors(here / "cuts.safetensors", tensors);
      refused(m.arguments({"cuts.safetensors", "-o", "out"}),
              {"rflow_report: cuts.safetensors: ", "'sequences'", "expected"});
    }
  }
  SUBCASE("a checkpoint cut short, of something else, of other options") {
    std::ofstream(here / "state", std::ios::binary) << "no checkpoint";
    refused(m.arguments({"-o", "out", "--checkpoint", "state"}), {"state", "damaged"});
    fs::remove(here / "state");
    leave_checkpoint(here, m);
    refused(m.arguments({"-o", "out", "--checkpoint", "state", "--skip-first", "1"}),
            {"state", "other shards, options or ranks"});
    std::string const whole = read(here / "state");
    for (std::size_t const size :
         {std::size_t{0}, std::size_t{7}, whole.size() / 2, whole.size() - 1}) {
      std::ofstream(here / "state", std::ios::binary) << whole.substr(0, size);
      refused(m.arguments({"-o", "out", "--checkpoint", "state"}), {"state", "damaged"});
    }
  }
  SUBCASE("a memory limit that will not do") {
    refused(m.arguments({"-o", "out", "--memory-limit", "16"}), {"--memory-limit is 16"});
  }
  SUBCASE("options that do not go together") {
    refused(m.arguments({"-o", "out", "--kernel", "rbf"}), {"linear kernel only"});
    refused(m.arguments({"-o", "out", "--significance"}), {"no p-values"});
    refused(m.arguments({"-o", "out", "--cka", "full", "--shifts"}), {"--shifts"});
    refused(m.arguments({"-o", "out", "--cka", "full", "--cka-batch", "64"}), {"--cka minibatch"});
    refused({m.names[0], "-o", "out", "--cka", "full"}, {"need --shards"});
    refused(m.arguments({"-o", "out", "--cross-cka"}), {"--cross-cka"});
    refused({m.names[0], m.names[1], m.names[2], "-o", "out"}, {"one or two captures"});
    refused({m.names[0], "-o", "out", "--checkpoint", "x"}, {"need --shards"});
  }
}

TEST_CASE("a flipped bit anywhere in a checkpoint is refused, or changes nothing") {
  folder const here;
  model const m(here, 21, 3, 60, true);
  REQUIRE(run(here, m.arguments({"-o", "whole"})).status == 0);
  std::string const expected = read(here / "whole/metrics.json");
  leave_checkpoint(here, m);
  std::string const whole = read(here / "state");
  std::uint64_t header = 0;
  std::memcpy(&header, whole.data(), 8);
  std::size_t const data = 8 + static_cast<std::size_t>(header);
  REQUIRE(whole.size() > data + 800);
  std::vector<std::size_t> places;
  for (std::size_t at = 0; at < 8; ++at) places.push_back(at);
  for (std::size_t k = 0; k < 70; ++k) places.push_back(8 + k * (data - 8) / 70);
  for (std::size_t k = 0; k < 70; ++k) places.push_back(data + k * (whole.size() - data) / 70);
  for (std::size_t k = 1; k <= 8; ++k)
    places.push_back(data - k), places.push_back(whole.size() - k);
  unsigned const seed = 23;
  CAPTURE(seed);
  std::mt19937 bits(seed);
  int refused = 0;
  for (std::size_t const at : places) {
    std::string flipped = whole;
    flipped[at] = static_cast<char>(flipped[at] ^ (1 << bits() % 8));
    std::ofstream(here / "state", std::ios::binary) << flipped;
    outcome const o = run(here, m.arguments({"-o", "out", "--checkpoint", "state"}));
    CAPTURE(at);
    CAPTURE(o.err);
    if (o.status == 0) {
      CHECK(read(here / "out/metrics.json") == expected);
      fs::remove_all(here / "out");
      continue;
    }
    ++refused;
    CHECK(o.status == 1);
    CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
    CHECK((o.err.find("state: the checkpoint is damaged") != std::string::npos ||
           o.err.find("state: not a checkpoint") != std::string::npos));
    CHECK_FALSE(fs::exists(here / "out"));
    if (at >= data) CHECK(o.err.find("checksum") != std::string::npos);
  }
  CHECK(refused > 140);
  std::ofstream(here / "state", std::ios::binary) << whole;
  REQUIRE(run(here, m.arguments({"-o", "out", "--checkpoint", "state"})).status == 0);
  CHECK(read(here / "out/metrics.json") == expected);
}

TEST_CASE("with as much memory as it says it needs, many threads or not, there is a report") {
  if (!plain_memory) return;
  folder const here;
  model const m(here, 31, 3, 4000, true);
  for (std::string const cka : {"minibatch", "full"})
    for (std::string const threads : {"1", "8", "32"}) {
      CAPTURE(cka);
      CAPTURE(threads);
      auto const with = [&](std::string const& limit) {
        return run(here, m.arguments({"-o", "out", "--force", "--cka", cka, "--threads", threads,
                                      "--memory-limit", limit}));
      };
      std::string const refusal = with("16").err, before = "needs about ";
      CAPTURE(refusal);
      auto const at = refusal.find(before);
      REQUIRE(at != std::string::npos);
      double const needed = std::stod(refusal.substr(at + before.size()));
      for (int k = 0; k < 3; ++k) {
        outcome const o = with(std::to_string(static_cast<int>(needed) + 2));
        CAPTURE(o.err);
        CHECK(o.status == 0);
      }
    }
}

TEST_CASE("memory that runs out at any time: one line and status 1") {
  if (!plain_memory) return;
  folder const here;
  model const m(here, 32, 6, 3000, true);
  std::vector<std::string> arguments =
      m.arguments({"-o", "out", "--cka", "full", "--threads", "8"});
  arguments.insert(arguments.begin(), RFLOW_REPORT);
  unsigned const seed = 33;
  CAPTURE(seed);
  std::mt19937 bits(seed);
  int failed = 0;
  for (int k = 0; k < 40; ++k) {
    ::pid_t const child = start(here, arguments, here / "err");
    ::usleep(static_cast<::useconds_t>(bits() % 200000));
    ::rlimit const limit{::rlim_t{1} << 20, ::rlim_t{1} << 20};  // no more than it has
    ::prlimit(child, RLIMIT_DATA, &limit, nullptr);
    outcome const o = wait_for(child, here / "err");
    CAPTURE(o.err);
    if (o.status == 0) {
      fs::remove_all(here / "out");
      continue;
    }
    ++failed;
    CHECK(o.status == 1);
    CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
    CHECK(o.err.find("rflow_report: ") == 0);
    CHECK_FALSE(fs::exists(here / "out"));
    for (std::string const& name : here.names()) CHECK(name.find(".tmp-") == std::string::npos);
  }
  CHECK(failed > 5);
}

TEST_CASE("what killed runs left of a checkpoint goes with the run that takes it over") {
  folder const here;
  model const m(here, 22, 2, 60);
  leave_checkpoint(here, m);
  for (char const* name : {"state.tmp-123-1", "state.tmp-123-2", "state.tmp-mine", "other.tmp-1-1"})
    std::ofstream(here / name) << "half a checkpoint";
  // One that another run is writing.
  int const at_work = ::open((here / "state.tmp-123-2").c_str(), O_RDONLY);
  REQUIRE(::flock(at_work, LOCK_EX | LOCK_NB) == 0);
  REQUIRE(run(here, m.arguments({"-o", "out", "--checkpoint", "state"})).status == 0);
  ::close(at_work);
  CHECK_FALSE(fs::exists(here / "state"));
  CHECK_FALSE(fs::exists(here / "state.tmp-123-1"));
  for (char const* name : {"state.tmp-123-2", "state.tmp-mine", "other.tmp-1-1"})
    CHECK(fs::exists(here / name));
}

TEST_CASE("shards of two models stand side by side, with the numbers of each by itself") {
  folder const here;
  model const m(here, 21, 3);
  fs::create_directory(here / "other");
  std::vector<std::string> other;
  {
    folder const there;
    model const second(there, 22, 2);
    for (std::string const& name : second.names) {
      fs::copy(there / name, here / ("other/" + name));
      other.push_back("other/" + name);
    }
  }
  auto const report = [&](std::string const& out, std::vector<std::string> more,
                          std::vector<std::string> const& of) {
    more.insert(more.end(), {"--shards", "--no-plots", "--quiet", "-o", out});
    more.insert(more.begin(), of.begin(), of.end());
    outcome const o = run(here, more);
    CAPTURE(o.err);
    REQUIRE(o.status == 0);
    return json::parse(read(here / (out + "/metrics.json")));
  };
  std::vector<std::string> against{"--against"};
  against.insert(against.end(), other.begin(), other.end());
  json const both = report("both", against, m.names), first = report("first", {}, m.names),
             second = report("second", {}, other);
  REQUIRE(both.at("models").size() == 2);
  std::vector<std::string> const names{both.at("models")[0].at("name"),
                                       both.at("models")[1].at("name")};
  CHECK(names[0] == "part-0 (1)");
  CHECK(names[1] == "part-0 (2)");
  for (char const* const key :
       {"tokens", "variance", "inter_token_cosine", "adjacent_cosine", "cka"}) {
    CAPTURE(key);
    CHECK(both.at("models")[0].at(key) == first.at("models")[0].at(key));
    CHECK(both.at("models")[1].at(key) == second.at("models")[0].at(key));
  }
  CHECK(run(here, {"part-0.safetensors", "-o", "x", "--against", "other/part-0.safetensors"})
            .err.find("--against needs --shards") != std::string::npos);
  CHECK_FALSE(fs::exists(here / "x"));
}

#ifdef RFLOW_REPORT_MPI
namespace {
std::vector<std::string> on_ranks(int ranks, std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(),
                   {RFLOW_MPIRUN, "-n", std::to_string(ranks), RFLOW_REPORT_MPI});
  return arguments;
}
}  // namespace

TEST_CASE("ranks give the numbers of one process") {
  folder const here;
  model const m(here, 5, 6, 900, true);
  for (std::string const cka : {"minibatch", "full"}) {
    CAPTURE(cka);
    REQUIRE(run(here, m.arguments({"-o", "alone-" + cka, "--cka", cka})).status == 0);
    for (int const ranks : {1, 2, 4, 8}) {  // 8: more ranks than shards
      CAPTURE(ranks);
      std::string const out = "on-" + std::to_string(ranks) + "-" + cka;
      outcome const o = wait_for(
          start(here, on_ranks(ranks, m.arguments({"-o", out, "--cka", cka, "--threads", "1"})),
                here / "err"),
          here / "err");
      CAPTURE(o.err);
      REQUIRE(o.status == 0);
      // Products are in float: which of them meet in a sum of floats depends on the ranks.
      check_close(json::parse(read(here / (out + "/metrics.json"))),
                  json::parse(read(here / ("alone-" + cka + "/metrics.json"))),
                  cka == "full" ? 1e-6 : 1e-12);
    }
  }
}

TEST_CASE("a rank that fails: an error on every rank, no report, no hang") {
  folder const here;
  model const m(here, 6, 4);
  std::ofstream(here / "state.2", std::ios::binary) << "no checkpoint of rank 2";
  std::vector<std::string> const before = here.names();
  outcome const o =
      wait_for(start(here, on_ranks(4, m.arguments({"-o", "out", "--checkpoint", "state"})),
                     "/tmp/rflow-shards-err-" + std::to_string(::getpid())),
               "/tmp/rflow-shards-err-" + std::to_string(::getpid()));
  fs::remove("/tmp/rflow-shards-err-" + std::to_string(::getpid()));
  CAPTURE(o.err);
  CHECK(o.status == 1);
  std::size_t said = 0;
  for (std::size_t at = 0;
       (at = o.err.find("rflow_report: rank 2: state.2: the checkpoint is damaged", at)) !=
       std::string::npos;
       ++at)
    ++said;
  CHECK(said == 4);
  CHECK_FALSE(fs::exists(here / "out"));
}
#endif
