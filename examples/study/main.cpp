// SPDX-License-Identifier: Apache-2.0
// rflow_study: the paper's experiments from weights, or from a seed.

#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>

#include "../report/text.hpp"
#include "study.hpp"

namespace {

using namespace study;

void add_setting(CLI::App& command, setting& s, std::string const& output) {
  s.output = output;
  command.add_option("-o,--output", s.output, "Folder for the results")->default_str(output);
  command.add_flag("--force", s.force, "Replace that folder if it is there");
  command.add_flag("-q,--quiet", s.quiet, "No progress; errors only");
  command.add_flag("!--no-plots", s.plots, "Leave out the figures that need gnuplot");
  command.add_option("--threads", s.threads, "Threads; 0 is as many as the machine has")
      ->check(CLI::Range(0, 4096).description(""))
      ->default_str("0");
}

std::function<int()> add_random(CLI::App& app, random_options& o) {
  CLI::App& c = *app.add_subcommand(
      "random", "Random weights: how alike tokens become, by scheme, control and seed");
  o.models = {"gpt-neo-2.7b", "pythia-2.8b", "mamba-2.8b", "mamba2-2.7b", "mamba2-130m"};
  o.schemes = {"gaussian", "xavier", "kaiming"};
  add_setting(c, o, "random-study");
  c.add_option("-m,--model", o.models,
               "gpt-neo-2.7b, pythia-2.8b, mamba-2.8b, mamba2-2.7b, mamba2-130m, or a config.json; "
               "all five if not given");
  c.add_option(
      "-s,--scheme", o.schemes,
      "gaussian, xavier, xavier_uniform, kaiming, kaiming_uniform, transformers (what that "
      "package does), mamba_ssm; the first, second and fourth if not given");
  c.add_option("-c,--control", o.controls,
               "Besides the plain run: no_norm, random_affine, embedding_FACTOR");
  c.add_option("--stddev", o.stddev, "Of the Gaussian scheme")
      ->check(CLI::PositiveNumber)
      ->default_str("0.02");
  c.add_option("--seeds", o.seeds, "Seeds for each combination")
      ->check(CLI::Range(1, 100000).description(""))
      ->default_str("3");
  c.add_option("--first-seed", o.first_seed, "The first of them")->default_str("1");
  c.add_option("-n,--tokens", o.tokens, "Context length")
      ->check(CLI::Range(2, 1 << 24).description(""))
      ->default_str("2048");
  c.add_option("--depth", o.depth, "Fraction of the model's blocks")
      ->check(CLI::Range(1e-6, 16.0).description(""))
      ->default_str("1");
  c.add_option("--width", o.width, "Fraction of the model's heads, hence of its hidden size")
      ->check(CLI::Range(1e-6, 16.0).description(""))
      ->default_str("1");
  c.add_option("--ids", o.ids, "Token ids (.npy) instead of random ones");
  return [&o] { return random(o); };
}

std::function<int()> add_checkpoint(CLI::App& app, checkpoint_options& o) {
  CLI::App& c =
      *app.add_subcommand("checkpoint", "One or two checkpoints over given tokens: the report");
  add_setting(c, o, "checkpoint-report");
  c.add_option("folder", o.folders, "Checkpoints in Hugging Face's layout (safetensors)")
      ->required()
      ->expected(1, 2);
  c.add_option("--ids", o.ids, "Token ids: a .npy file of one axis")->required();
  c.add_option("--against-random", o.against, "Compare with random weights by this scheme");
  c.add_option("--seed", o.seed, "Of the random weights")->default_str("1");
  c.add_flag("--plain-norms", o.plain_norms, "Norms of the checkpoint at gain 1 and shift 0");
  return [&o] { return checkpoint(o); };
}

std::function<int()> add_probe(CLI::App& app, probe_options& o) {
  CLI::App& c = *app.add_subcommand(
      "probe", "Where is the answer? Softmax probes on the last token of many prompts, by layer");
  add_setting(c, o, "probe-study");
  c.add_option("folder", o.folders, "Checkpoints in Hugging Face's layout (safetensors)")
      ->required();
  c.add_option("-p,--prompts", o.prompts, "Prompt files (safetensors: ids, offsets, gold, group)")
      ->required();
  c.add_option("--against-random", o.against, "The same with random weights by this scheme, too");
  c.add_option("--seed", o.seed, "Of the random weights")->default_str("1");
  c.add_option("--seeds", o.seeds, "Splits and starts of the probes")
      ->check(CLI::Range(1, 1000).description(""))
      ->default_str("5");
  c.add_option("--epochs", o.epochs, "Steps of full-batch Adam")
      ->check(CLI::Range(1, 1000000).description(""))
      ->default_str("150");
  c.add_option("--rate", o.rate, "Its learning rate")
      ->check(CLI::PositiveNumber)
      ->default_str("0.05");
  c.add_option("--label", o.label,
               "What to find: gold (the position of the answer), or another tensor of the prompt "
               "files, such as answer")
      ->default_str("gold");
  c.add_option("--validation", o.validation, "Fraction of the contexts held out")
      ->check(CLI::Range(0.0, 0.95).description(""))
      ->default_str("0.2");
  return [&o] { return probe(o); };
}

std::function<int()> add_kvpr(CLI::App& app, kvpr_options& o) {
  CLI::App& c = *app.add_subcommand("kvpr", "Prompts of key-value retrieval, with labels");
  c.add_option("output", o.output, "JSON lines, or a prompt file with --integers")->required();
  c.add_option("--contexts", o.prompts, "Contexts; each is asked with gold at every position")
      ->check(CLI::Range(1, 10000000).description(""))
      ->default_str("1000");
  c.add_option("--pairs", o.pairs, "Pairs of a context")
      ->check(CLI::Range(2, 1000000).description(""))
      ->default_str("75");
  c.add_option("--gold", o.gold,
               "Positions of the pair that is asked for, from 0; all if not given");
  c.add_option("--seed", o.seed)->default_str("1");
  c.add_flag("--query-first", o.query_first, "The key stands before the pairs, too");
  c.add_flag("--integers", o.integers,
             "Token ids, as the small models of models/train are trained on");
  c.add_option("--keys", o.keys, "With --integers: tokens 1 to KEYS are keys")
      ->check(CLI::Range(2, 1000000).description(""))
      ->default_str("32");
  c.add_option("--values", o.values, "With --integers: as many values after them")
      ->check(CLI::Range(1, 1000000).description(""))
      ->default_str("32");
  return [&o] { return kvpr(o); };
}

std::function<int()> add_mdqa(CLI::App& app, mdqa_options& o) {
  CLI::App& c = *app.add_subcommand(
      "mdqa", "Prompts of multi-document question answering from lost-in-the-middle's JSON lines");
  c.add_option("input", o.input, "JSON lines with question, answers and ctxs")->required();
  c.add_option("output", o.output, "JSON lines with prompt, label, gold_index, context, answers")
      ->required();
  c.add_option("--documents", o.documents, "Documents a prompt; all if not given")
      ->check(CLI::Range(0, 100000).description(""));
  c.add_option("--gold", o.gold, "Positions of the gold document, from 0; all if not given");
  return [&o] { return mdqa(o); };
}

int run(int argc, char** argv) {
  CLI::App app(
      "The experiments of representation-flow studies: random weights, checkpoints, probes.",
      "rflow_study");
  app.require_subcommand(1);
  random_options random_asked;
  checkpoint_options checkpoint_asked;
  probe_options probe_asked;
  kvpr_options kvpr_asked;
  mdqa_options mdqa_asked;
  std::vector<std::function<int()>> commands;
  commands.push_back(add_random(app, random_asked));
  commands.push_back(add_checkpoint(app, checkpoint_asked));
  commands.push_back(add_probe(app, probe_asked));
  commands.push_back(add_kvpr(app, kvpr_asked));
  commands.push_back(add_mdqa(app, mdqa_asked));
  app.footer("Exit status: 0 done, 1 nothing written (the reason is on stderr).");
  try {
    app.parse(argc, argv);
  } catch (CLI::Success const& asked) {
    return app.exit(asked);
  } catch (CLI::ParseError const& error) {
    throw std::invalid_argument(std::string(error.what()) + " (see rflow_study --help)");
  }
  auto const all = app.get_subcommands({});
  for (std::size_t i = 0; i < all.size(); ++i)
    if (all[i]->parsed()) return commands[i]();
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (std::exception const& error) {
    std::string what = error.what();
    for (std::string const prefix : {"rflow::", "models::"})  // the user knows no functions
      if (what.starts_with(prefix))
        if (auto const end = what.find(": "); end != std::string::npos) what.erase(0, end + 2);
    std::string const text = "rflow_study: " + report::one_line(what) + "\n";
    std::fwrite(text.data(), 1, text.size(), stderr);
    return 1;
  }
}
