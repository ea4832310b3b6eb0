// SPDX-License-Identifier: Apache-2.0
// rflow_random_init: how alike tokens become in stacks of random blocks at the theory's scale, by
// initialiser, for transformer, Mamba and hybrid stacks, with the controls that tell causes apart.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <rflow/cosine.hpp>

#include <array>
#include <cmath>
#include <cstdio>
#include <exception>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../common/files.hpp"
#include "../common/gnuplot.hpp"
#include "../common/progress_bar.hpp"
#include "../theory_validation/layers.hpp"

namespace {

using validation::drawer;
using validation::form;
using validation::integer;
using validation::matrix;

struct options {
  std::uint64_t seed = 1;
  integer blocks = 16, tokens = 64, width = 96, seeds = 5;
  int threads = 0;
  std::string output;
  bool plots = true, quiet = false;
};

struct named_scheme {
  char const* name;
  validation::scheme how;
};
named_scheme const schemes[] = {
    {"gaussian 0.02", [](rflow::fans const&) { return rflow::gaussian(0.02); }},
    {"truncated 0.02",
     [](rflow::fans const&) { return rflow::truncated_normal(0.02, -0.04, 0.04); }},
    {"xavier uniform", [](rflow::fans const& f) { return rflow::xavier_uniform(f); }},
    {"xavier normal", [](rflow::fans const& f) { return rflow::xavier_normal(f); }},
    {"kaiming uniform", [](rflow::fans const& f) { return rflow::kaiming_uniform(f); }},
    {"kaiming normal", [](rflow::fans const& f) { return rflow::kaiming_normal(f); }},
    {"pytorch default", [](rflow::fans const& f) { return rflow::pytorch_default(f.in); }},
};

enum class stack { transformer, mamba, mamba_first, attention_first };
constexpr std::array stacks{stack::transformer, stack::mamba, stack::mamba_first,
                            stack::attention_first};
char const* name_of(stack s) {
  return s == stack::transformer   ? "transformer"
         : s == stack::mamba       ? "mamba"
         : s == stack::mamba_first ? "mamba, then attention"
                                   : "attention, then mamba";
}
bool is_attention(stack s, integer block, integer blocks) {
  bool const early = block < blocks / 2;
  return s == stack::transformer || (s == stack::mamba_first && !early) ||
         (s == stack::attention_first && early);
}

/// What is changed to tell causes apart.
struct control {
  char const* name;
  bool normalise = true, affine = false;
  double embedding = 1;
};
control const controls[] = {
    {"none"},
    {"no normalisation", false},
    {"affine drawn", true, true},  // gain N(1, 0.2²), shift N(0, 0.2²); elsewhere 1 and 0
    {"embedding x 0.5", true, false, 0.5},
    {"embedding x 2", true, false, 2},
};

/// Inter-token cosine of every site, and of every update.
struct profile {
  std::vector<double> sites, updates;
};

/// x ← x + f(norm(x)), block after block; the blocks are those of the theory with softmax, GELU,
/// SiLU and selection in place, causal, biases zero.
profile run(options const& o, stack kind, validation::scheme how, control const& c,
            std::uint64_t seed) {
  validation::extent const n{.tokens = o.tokens,
                             .features = o.width,
                             .hidden = 4 * o.width,
                             .channels = 2 * o.width,
                             .taps = 4,
                             .states = 16};
  drawer draw(seed, how), plain(seed + (std::uint64_t{1} << 40));
  matrix x = plain(o.tokens, o.width, rflow::gaussian(0.02 * c.embedding)), normed, update;
  validation::transformer::buffers attention_work;
  validation::mamba::buffers mamba_work;
  auto const cosine = [](matrix const& m) {
    // Sites without normalisation may overflow: that is an answer too.
    return m.allFinite() ? rflow::inter_token_cosine(m, rflow::on_cpu{.threads = 1}).value
                         : std::nan("");
  };

  profile out;
  out.sites.push_back(cosine(x));
  for (integer block = 0; block < o.blocks; ++block) {
    bool const attention = is_attention(kind, block, o.blocks);
    normed = x;
    if (c.normalise) {
      if (attention) normed.colwise() -= normed.rowwise().mean().eval();  // LayerNorm; else RMSNorm
      for (integer t = 0; t < normed.rows(); ++t)
        normed.row(t) /=
            std::sqrt(normed.row(t).squaredNorm() / static_cast<float>(o.width) + 1e-5f);
      if (c.affine) {
        normed *= (plain(1, o.width, rflow::gaussian(0.2)).array() + 1).matrix().asDiagonal();
        normed.rowwise() += plain(1, o.width, rflow::gaussian(0.2)).row(0);
      }
    }
    if (attention) {
      validation::transformer const f(draw, n, true, 0);
      f(form::real, normed, attention_work, update);
    } else {
      validation::mamba f(draw, n);
      f.skip.setOnes();
      f(form::real, normed, mamba_work, update, true);
    }
    x += update;
    out.updates.push_back(cosine(update));
    out.sites.push_back(cosine(x));
  }
  return out;
}

struct summary {
  std::vector<double> mean, spread;  // over seeds
};
summary summarise(std::vector<std::vector<double>> const& runs) {
  summary out;
  auto const n = static_cast<double>(runs.size());
  for (std::size_t l = 0; l < runs.front().size(); ++l) {
    double sum = 0, squares = 0;
    for (auto const& r : runs) sum += r[l];
    for (auto const& r : runs) squares += (r[l] - sum / n) * (r[l] - sum / n);
    out.mean.push_back(sum / n);
    out.spread.push_back(n > 1 ? std::sqrt(squares / (n - 1)) : 0);
  }
  return out;
}

struct result {
  stack kind;
  std::string scheme;
  std::string changed;
  summary sites, updates;
};

std::vector<result> study(options const& o) {
  struct job {
    stack kind;
    named_scheme const* how;
    control const* changed;
    std::vector<profile> runs;
  };
  std::vector<job> jobs;
  for (control const& c : controls)
    for (named_scheme const& s : schemes)
      for (stack const kind : stacks)
        jobs.push_back({kind, &s, &c, std::vector<profile>(static_cast<std::size_t>(o.seeds))});

  int const threads = o.threads > 0
                          ? o.threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  rflow::detail::team team(threads);
  common::progress_bar bar(!o.quiet);
  double const cost = 5e10 / static_cast<double>(jobs.size());  // long enough for a bar
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    job& work = jobs[j];
    team.run(o.seeds, [&](std::ptrdiff_t i) {
      work.runs[static_cast<std::size_t>(i)] = run(o, work.kind, work.how->how, *work.changed,
                                                   o.seed * 1000 + static_cast<std::uint64_t>(i));
    });
    bar(cost * static_cast<double>(j + 1), cost * static_cast<double>(jobs.size()));
  }
  std::vector<result> out;
  for (job const& j : jobs) {
    std::vector<std::vector<double>> sites, updates;
    for (profile const& p : j.runs) sites.push_back(p.sites), updates.push_back(p.updates);
    out.push_back({j.kind, j.how->name, j.changed->name, summarise(sites), summarise(updates)});
  }
  return out;
}

double at(std::vector<double> const& x, double share) {
  return x[static_cast<std::size_t>(std::lround(share * static_cast<double>(x.size() - 1)))];
}

void print(std::vector<result> const& all, options const& o) {
  std::string heading;
  for (result const& r : all) {
    if (r.changed != heading) {
      heading = r.changed;
      std::printf("\ncontrol: %s\n%-22s %-16s %8s %8s %8s %8s %8s %9s\n", heading.c_str(), "stack",
                  "initialiser", "embed", "block 1", "l/L=1/4", "l/L=1/2", "l/L=1", "last upd.");
    }
    std::printf("%-22s %-16s %8.3f %8.3f %8.3f %8.3f %8.3f %9.3f  +- %.3f\n", name_of(r.kind),
                r.scheme.c_str(), r.sites.mean[0], r.sites.mean[1], at(r.sites.mean, 0.25),
                at(r.sites.mean, 0.5), r.sites.mean.back(), r.updates.mean.back(),
                r.sites.spread.back());
  }
  std::printf(
      "\nmean inter-token cosine over %td seeds from %llu; +-: standard deviation over seeds at "
      "l/L=1\n",
      o.seeds, static_cast<unsigned long long>(o.seed));
}

std::string csv(std::vector<result> const& all) {
  std::string out = "control,stack,initialiser,of,index,mean,stddev\n";
  for (result const& r : all)
    for (bool const updates : {false, true}) {
      summary const& s = updates ? r.updates : r.sites;
      for (std::size_t l = 0; l < s.mean.size(); ++l) {
        char text[200];
        std::snprintf(text, sizeof text, "%s,\"%s\",%s,%s,%.6f,%.6f,%.6f\n", r.changed.c_str(),
                      name_of(r.kind), r.scheme.c_str(), updates ? "update" : "site",
                      static_cast<double>(l) / static_cast<double>(s.mean.size() - 1), s.mean[l],
                      s.spread[l]);
        out += text;
      }
    }
  return out;
}

std::string json(std::vector<result> const& all, options const& o) {
  nlohmann::ordered_json out{{"seed", o.seed},
                             {"seeds", o.seeds},
                             {"blocks", o.blocks},
                             {"tokens", o.tokens},
                             {"width", o.width}};
  for (result const& r : all)
    out["results"].push_back(
        {{"control", r.changed},
         {"stack", name_of(r.kind)},
         {"initialiser", r.scheme},
         {"sites", {{"mean", r.sites.mean}, {"stddev", r.sites.spread}}},
         {"updates", {{"mean", r.updates.mean}, {"stddev", r.updates.spread}}}});
  return out.dump(1) + "\n";
}

/// One panel for each kind of stack, a curve for each initialiser, without controls.
std::string plot(std::vector<result> const& all) {
  constexpr std::array colours{"#1f5fa8", "#7aa6d8", "#b3541e", "#e0945f",
                               "#2c8a4b", "#86c79b", "#777777"};
  std::string data, panels;
  int block = 0;
  for (stack const kind : stacks) {
    std::string curves;
    for (result const& r : all) {
      if (r.kind != kind || r.changed != controls[0].name) continue;
      std::string const name = "$d" + std::to_string(block++);
      data += name + " << end\n";
      for (std::size_t l = 0; l < r.sites.mean.size(); ++l) {
        char text[80];
        std::snprintf(text, sizeof text, "%.6f %.6f %.6f\n",
                      static_cast<double>(l) / static_cast<double>(r.sites.mean.size() - 1),
                      r.sites.mean[l], r.sites.spread[l]);
        data += text;
      }
      data += "end\n";
      std::size_t const colour = static_cast<std::size_t>(block - 1) % colours.size();
      curves += (curves.empty() ? "plot " : ", ") + name + " using 1:2 with lines lw 2 lc rgb '" +
                colours[colour] + "' title '" + r.scheme + "'";
    }
    panels += std::string("set title '") + name_of(kind) + "'\n" + curves + "\nunset key\n";
  }
  return common::gnuplot(
      "set terminal svg noenhanced font 'sans,12' size 900,640 background 'white'\nset encoding "
      "utf8\n" +
      data +
      "set border 3\nset tics nomirror\nset yrange [-0.2:1.02]\nset xlabel 'l/L'\n"
      "set ylabel 'inter-token cosine'\nset key top right samplen 2\nset multiplot layout 2,2\n" +
      panels + "unset multiplot\n");
}

std::optional<options> parse(int argc, char** argv) {
  CLI::App app("How alike tokens become in stacks of random blocks, by initialiser.");
  options o;
  bool no_plots = false;
  app.add_option("--seed", o.seed, "of weights and embeddings")->capture_default_str();
  app.add_option("--seeds", o.seeds, "how many of them")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  app.add_option("--blocks", o.blocks, "L")->capture_default_str()->check(CLI::Range(1, 1000));
  app.add_option("--tokens", o.tokens, "N")->capture_default_str()->check(CLI::Range(2, 4096));
  app.add_option("--width", o.width, "d")->capture_default_str()->check(CLI::Range(2, 4096));
  app.add_option("--threads", o.threads, "0: as many as the machine has; results are the same")
      ->check(CLI::Range(0, 1024));
  app.add_option("--output", o.output,
                 "folder for random_init.csv, .json and .svg; none by default");
  app.add_flag("--no-plots", no_plots, "do not run gnuplot");
  app.add_flag("--quiet", o.quiet, "print nothing but errors");
  try {
    app.parse(argc, argv);
  } catch (CLI::ParseError const& e) {
    if (e.get_exit_code() != 0) throw std::invalid_argument(e.what());
    app.exit(e);
    return std::nullopt;
  }
  o.plots = !no_plots;
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    auto const asked = parse(argc, argv);
    if (!asked) return 0;
    std::vector<result> const all = study(*asked);
    if (!asked->quiet) print(all, *asked);
    if (!asked->output.empty()) {
      std::map<std::string, std::string> files{{"random_init.csv", csv(all)},
                                               {"random_init.json", json(all, *asked)}};
      if (asked->plots) files["random_init.svg"] = plot(all);
      common::write_files(asked->output, files);
    }
    return 0;
  } catch (std::exception const& error) {
    std::fprintf(stderr, "rflow_random_init: %s\n", error.what());
    return 1;
  }
}
