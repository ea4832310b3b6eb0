// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "text.hpp"

namespace report {
namespace {

/// "a-report", "a-vs-b-report".
std::string default_output(std::vector<std::string> const& inputs) {
  std::string out;
  for (std::string const& input : inputs) {
    std::filesystem::path path = std::filesystem::path(input).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();  // "captures/"
    std::error_code ignored;
    std::string name = std::filesystem::is_directory(path, ignored) ? path.filename().string()
                                                                    : path.stem().string();
    if (name.empty() || name == "." || name == "..") name = "input";
    out += (out.empty() ? "" : "-vs-") + name;
  }
  return out + "-report";
}

constexpr std::ptrdiff_t most_counted = std::ptrdiff_t{1} << 60;  // sums of two still fit

/// A whole number in decimal digits, from least to most. CLI11 alone would take 010 for 8 and 0x10 for
/// 16, so the text is written anew.
CLI::Validator whole_number(std::ptrdiff_t least, std::ptrdiff_t most = most_counted) {
  return CLI::Validator(
      [=](std::string& text) -> std::string {
        std::ptrdiff_t count = -1;
        auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
        if (error == std::errc{} && end == text.data() + text.size() && count >= least &&
            count <= most) {
          text = std::to_string(count);
          return "";
        }
        std::string const range =
            most == most_counted ? ", " + std::to_string(least) + " or more,"
                                 : " from " + std::to_string(least) + " to " + std::to_string(most);
        return "a whole number" + range + " expected, found " + text;
      },
      "");
}

/// A finite number in decimal digits: above 0, or 0 too.
CLI::Validator number_text(bool zero_too) {
  return CLI::Validator(
      [=](std::string& text) -> std::string {
        double x = -1;
        auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
        if (error == std::errc{} && end == text.data() + text.size() && std::isfinite(x) &&
            (x > 0 || (x == 0 && zero_too)))
          return "";
        return std::string("a number ") + (zero_too ? "of 0 or more" : "above 0") +
               " expected, found " + text;
      },
      "");
}

/// "3:200,250": half-open ranges and single tokens, counted from 0.
std::vector<std::pair<std::ptrdiff_t, std::ptrdiff_t>> token_ranges(std::string const& text) {
  std::vector<std::pair<std::ptrdiff_t, std::ptrdiff_t>> out;
  auto const refuse = [&](std::string const& part) {
    throw std::invalid_argument("--tokens: ranges such as 3:200,250 expected, found '" + part +
                                "'");
  };
  std::string_view rest = text;
  for (bool more = true; more;) {
    std::size_t const comma = rest.find(',');
    std::string const part(rest.substr(0, comma));
    more = comma != std::string_view::npos;
    if (more) rest.remove_prefix(comma + 1);
    std::size_t const colon = part.find(':');
    auto const number = [&](std::string_view digits) {
      std::ptrdiff_t x = -1;
      auto const [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), x);
      if (error != std::errc{} || end != digits.data() + digits.size() || x < 0 || x > most_counted)
        refuse(part);
      return x;
    };
    std::string_view const all = part, left = all.substr(0, colon);
    std::ptrdiff_t const begin = colon == 0 ? 0 : number(left);
    std::ptrdiff_t end = begin + 1;
    if (colon != std::string::npos)
      end = colon + 1 == part.size() ? options::to_the_end : number(all.substr(colon + 1));
    if (begin >= end) refuse(part);
    out.emplace_back(begin, end);
  }
  return out;
}

/// An option that takes one of a few words.
class choice {
 public:
  choice(CLI::App& app, char const* name, std::string description,
         std::vector<std::string> const& words, char const* usual, char const* group = "Metrics")
      : word_(std::make_unique<std::string>(usual)) {
    for (std::string const& word : words)
      description += (&word == &words.front() ? "" : ", ") + word;
    CLI::Option* const option = app.add_option(name, *word_, description)
                                    ->check(CLI::IsMember(words).description(""))
                                    ->type_name("WORD")
                                    ->group(group);
    if (*usual != 0) option->default_str(usual);
  }
  bool is(std::string_view word) const { return *word_ == word; }

 private:
  std::unique_ptr<std::string> word_;  // CLI11 keeps its address
};

/// "sites,tokens,hidden" or "sth" as "sth".
std::string axes_of(std::string const& text) {
  std::string out;
  if (text.find(',') == std::string::npos) {
    out = text;
  } else {
    for (std::size_t at = 0; at <= text.size();) {
      std::size_t const end = std::min(text.find(',', at), text.size());
      std::string const word = text.substr(at, end - at);
      constexpr std::string_view words[] = {"sites", "batch", "tokens", "hidden"};
      auto const known = std::find(std::begin(words), std::end(words), word);
      out += word.size() == 1 ? word.front() : known == std::end(words) ? '?' : known->front();
      at = end + 1;
    }
  }
  std::string sorted = out;
  std::sort(sorted.begin(), sorted.end());
  if (sorted != "ht" && sorted != "bht" && sorted != "hst" && sorted != "bhst")
    throw CLI::ValidationError("--axes",
                               "tokens and hidden, with sites, batch or both, each once, "
                               "expected, found " +
                                   text);
  return out;
}

/// Letters to put in, leave out or change (Levenshtein).
std::size_t distance_of(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t corner = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      std::size_t const changed = corner + (a[i - 1] == b[j - 1] ? 0 : 1);
      corner = row[j];
      row[j] = std::min({changed, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

/// Names the option that is most like the first argument that should be one; else empty.
std::string suggestion(CLI::App const& app, int argc, char const* const* argv) {
  for (int i = 1; i < argc && std::string_view(argv[i]) != "--"; ++i) {
    std::string word = argv[i];
    if (!word.starts_with("--")) continue;
    word = word.substr(2, word.find('=') == std::string::npos ? word.npos : word.find('=') - 2);
    if (app.get_option_no_throw("--" + word) != nullptr) continue;
    std::string best;
    std::size_t least = std::max<std::size_t>(2, word.size() / 3) + 1;
    for (CLI::Option const* const option : app.get_options())
      for (std::string const& name : option->get_lnames()) {
        std::size_t distance = distance_of(word, name);
        if (word.size() > 2 && name.starts_with(word))
          distance = std::min<std::size_t>(2, distance);
        if (distance < least) least = distance, best = name;
      }
    if (!best.empty()) return "; did you mean --" + best + "?";
  }
  return "";
}

/// A second value of an option that takes one at a time was taken for an input.
void require_single_values(options const& o, int argc, char const* const* argv) {
  std::error_code ignored;
  auto const exists = [&](std::string const& path) {
    return std::filesystem::exists(path, ignored);
  };
  std::ptrdiff_t const inputs = std::count_if(o.inputs.begin(), o.inputs.end(), exists);
  std::ptrdiff_t const models = !o.shards           ? inputs
                                : o.against.empty() ? std::min<std::ptrdiff_t>(inputs, 1)
                                                    : 2;
  constexpr std::string_view one_each[] = {"--name", "--mask", "--labels", "--label-groups",
                                           "--ignore-label"};
  for (int i = 1; i + 2 < argc; ++i) {
    std::string const option = argv[i], first = argv[i + 1], second = argv[i + 2];
    if (std::find(std::begin(one_each), std::end(one_each), option) == std::end(one_each)) continue;
    if (second.starts_with('-') || exists(second) ||
        std::find(o.inputs.begin(), o.inputs.end(), second) == o.inputs.end())
      continue;
    // One model has one name, which may be of two words.
    std::string const cure = option == "--name" && models < 2
                                 ? " '" + first + " " + second + "'"
                                 : " " + first + " " + option + " " + second;
    if (models > 0)
      throw std::invalid_argument(option + " takes one value at a time, and '" + second +
                                  "' is no file: " + option + cure);
  }
}

}  // namespace

std::optional<options> parse(int argc, char const* const* argv) {
  options o;
  CLI::App app(
      "Measures how representations flow through the layers of a neural network, and writes\n"
      "report.html, metrics.json, CSV files and cka.npy into one folder.",
      "rflow_report");
  app.get_formatter()->column_width(34);
  app.set_version_flag("--version", "rflow_report " + std::to_string(rflow::version.major) + "." +
                                        std::to_string(rflow::version.minor) + "." +
                                        std::to_string(rflow::version.patch));

  app.add_option("input", o.inputs,
                 "One or two captures: a safetensors file (or one in parts) with one tensor per "
                 "site, a .npz or a folder of .npy files with one array per site, or one .npy with "
                 "axes sites, tokens, hidden")
      ->required()
      ->expected(1, 1 << 20)
      ->type_name("FILE");

  CLI::Option const* const output =
      app.add_option("-o,--output", o.output, "Folder for the report; default NAME-report")
          ->type_name("DIR")
          ->group("Output");
  app.add_flag("--force", o.force, "Replace the report in that folder")->group("Output");
  app.add_option(
         "--name", o.names,
         "What to call the model; for two models give it twice. Default: what the file says")
      ->allow_extra_args(false)
      ->type_name("NAME")
      ->group("Output");
  bool no_plots = false;
  app.add_flag("--no-plots", no_plots, "Leave out the figures that need gnuplot")->group("Output");
  app.add_flag("--strict", o.strict, "Exit with status 2 if a layer has no answer")
      ->group("Output");
  app.add_flag("-q,--quiet", o.quiet, "No summary, no progress; errors only")->group("Output");

  app.add_option("--skip-first", o.skip_first,
                 "Leave the first K tokens of each sequence out of every metric (BOS, attention "
                 "sinks), of those that masks leave")
      ->transform(whole_number(0))
      ->type_name("K")
      ->group("Tokens");
  app.add_option("--skip-last", o.skip_last, "The same for the last K")
      ->transform(whole_number(0))
      ->type_name("K")
      ->group("Tokens");
  CLI::Option const* const tokens =
      app.add_option(
             "--tokens", o.tokens_text,
             "Only these tokens of the file, counted from 0: ranges without their ends, and "
             "single ones, such as 3:200,250")
          ->type_name("RANGES")
          ->group("Tokens");
  app.add_option("--mask", o.masks,
                 "A tensor of the file, or a .npy: 0 leaves a token out, 1 keeps it. May be given "
                 "more than once, and holds besides the file's attention_mask and "
                 "special_tokens_mask (whose 1 leaves out)")
      ->allow_extra_args(false)
      ->type_name("NAME")
      ->group("Tokens");
  bool no_mask = false;
  app.add_flag("--no-mask", no_mask, "Do not use the file's attention_mask and special_tokens_mask")
      ->group("Tokens");
  app.add_option("--sequences", o.sequences,
                 "Tensor that says where sequences begin: offsets from 0 to the number of tokens, "
                 "positions that start anew, or a number at each token; none: all is one. Default: "
                 "the file's sequences or cu_seqlens, else a batch axis")
      ->type_name("NAME")
      ->group("Tokens");
  choice const normalization(app, "--normalization", "What St1, St2 and the path are divided by: ",
                             {"none", "per_token", "per_element", "relative"}, "per_element");
  choice const main_estimator(
      app, "--estimator",
      "CKA estimator shown first and saved in cka.npy: ", {"debiased", "biased"}, "debiased");
  choice const kernel(app, "--kernel", "CKA kernel: ", {"linear", "rbf", "both"}, "both");
  app.add_option("--rbf-fraction", o.rbf_fraction,
                 "RBF bandwidth: this times the root of the median squared distance")
      ->transform(number_text(false))
      ->default_str("1")
      ->type_name("F")
      ->group("Metrics");
  app.add_flag("--cross-cka", o.cross_cka,
               "Two captures: fail unless they saw the same tokens (default: compare their layers "
               "if they did)")
      ->group("Metrics");
  app.add_flag("--same-tokens", o.same_tokens,
               "Two captures: they saw the same tokens, though the files do not say so")
      ->group("Metrics");
  app.add_flag("--significance", o.significance,
               "CKA: p-values over shuffled tokens, without resampling (twice the time or more)")
      ->group("Metrics");
  app.add_flag(
         "--shifts", o.shifts,
         "CKA: besides, p-values over circular shifts of the tokens, which hold where "
         "neighbours resemble each other (2 n² bytes a site more; n a product of small primes "
         "is fast)")
      ->group("Metrics");
  app.add_option("--labels", o.labels,
                 "A class for each token, a word or a whole number: a .npy, a text file with one a "
                 "line or a column called label, or a tensor of the capture by its name. Adds "
                 "softmax probes of every layer. Two captures: one for both, or one each. Shards: "
                 "one for all tokens in their order, or one each")
      ->allow_extra_args(false)
      ->type_name("FILE")
      ->group("Probes");
  app.add_option("--label-column", o.label_column,
                 "Which column of the text: its name in the first line, or its number from 1 on")
      ->type_name("NAME")
      ->group("Probes");
  app.add_option("--ignore-label", o.ignore_labels,
                 "Leave tokens with this label out of the probes, besides -100 (other metrics keep "
                 "them); may be given several times")
      ->allow_extra_args(false)
      ->type_name("LABEL")
      ->group("Probes");
  app.add_option(
         "--label-groups", o.label_groups,
         "The same for the group (document, context) of each token: no group is trained and "
         "validated on (column group)")
      ->allow_extra_args(false)
      ->type_name("FILE")
      ->group("Probes");
  app.add_option("--group-column", o.group_column, "Which column holds the groups")
      ->type_name("NAME")
      ->group("Probes");
  app.add_option("--probe-seeds", o.probe_seeds, "Splits and starts of each probe")
      ->transform(whole_number(1, 1000))
      ->default_str("5")
      ->type_name("N")
      ->group("Probes");
  app.add_option("--probe-epochs", o.probe_epochs, "Steps of full-batch Adam")
      ->transform(whole_number(1, 1000000))
      ->default_str("150")
      ->type_name("N")
      ->group("Probes");
  app.add_flag("--probe-standardize", o.probe_standardize,
               "Features to mean 0 and deviation 1 over the tokens trained on")
      ->group("Probes");
  app.add_flag(
         "--shards", o.shards,
         "The inputs are shards of one model's tokens, as many as you like: read one after the "
         "other in bounded memory")
      ->group("Shards");
  app.add_option("--against", o.against,
                 "Shards of a second model, measured after the first and shown beside it")
      ->expected(1, 1 << 20)
      ->type_name("FILE")
      ->group("Shards");
  choice const over(
      app, "--cka",
      "Over batches of tokens as they are read, or over all pairs of tokens in a pass "
      "of its own: ",
      {"minibatch", "full"}, "minibatch", "Shards");
  CLI::Option const* const batch =
      app.add_option("--cka-batch", o.cka_batch, "Tokens of a batch of minibatch CKA")
          ->transform(whole_number(4, 65536))
          ->default_str("256")
          ->type_name("N")
          ->group("Shards");
  app.add_option("--checkpoint", o.checkpoint,
                 "Keep what was measured in this file meanwhile, and go on from it if it is there")
      ->type_name("FILE")
      ->group("Shards");
  app.add_option("--checkpoint-seconds", o.checkpoint_seconds,
                 "Time between two writings of it; a sequence is never cut")
      ->transform(number_text(true))
      ->default_str("30")
      ->type_name("S")
      ->group("Shards");
  app.add_option("--memory-limit", o.memory_limit,
                 "Have the system refuse more than this many MiB beside the mapped files")
      ->transform(whole_number(16, 1 << 30))
      ->type_name("MIB")
      ->group("Shards");
  app.add_option("--threads", o.threads, "Threads; 0 is as many as the machine has")
      ->transform(whole_number(0, 4096))
      ->default_str("0")
      ->type_name("N")
      ->group("Metrics");

  choice const names(
      app, "--names",
      "Whose names are recognised, where the options below say nothing; auto: those of "
      "many tools (docs/report.md). ",
      {"auto", "rflow"}, "auto", "Names in the file");
  app.add_option("--embed,--pattern-embed", o.pattern.embed,
                 "Name of the embedding output; none: the file has blocks only")
      ->type_name("NAME")
      ->group("Names in the file");
  app.add_option("--pattern-block", o.pattern.block, "Name of a block's output; {} is its number")
      ->type_name("NAME")
      ->group("Names in the file");
  app.add_option("--pattern-final-norm", o.pattern.final_norm,
                 "Name of the final norm's output; none: none of the file's")
      ->type_name("NAME")
      ->group("Names in the file");
  app.add_option("--first-block", o.pattern.first_block, "Number of the first block")
      ->transform(whole_number(0))
      ->type_name("N")
      ->group("Names in the file");
  app.add_flag("--subset", o.pattern.subset, "Blocks that are not there were left out on purpose")
      ->group("Names in the file");
  choice const last(app, "--last",
                    "What a list of states, or an array, ends with: ", {"norm", "block"}, "",
                    "Names in the file");
  app.add_option_function<std::string>(
         "--axes", [&o](std::string const& text) { o.pattern.axes = axes_of(text); },
         "Order of the axes of arrays, slowest first: sites,tokens,hidden or with batch, "
         "or the first letters (stbh)")
      ->type_name("AXES")
      ->group("Names in the file");
  app.add_option("--array", o.pattern.array, "With --axes: which array of a file holds all sites")
      ->type_name("NAME")
      ->group("Names in the file");
  choice const bits(app, "--npy-bits",
                    "What integers or nameless bytes (|V2, |V1) in .npy files really are: ",
                    {"f16", "bf16", "f8_e4m3", "f8_e5m2"}, "", "Names in the file");
  app.footer(
      "Exit status: 0 done, 1 no report (the reason is on stderr), 2 a layer without an answer and "
      "--strict.\nWhat the figures mean: docs/report.md.");

  try {
    app.parse(argc, argv);
  } catch (CLI::Success const& asked) {
    app.exit(asked);
    return std::nullopt;
  } catch (CLI::ParseError const& error) {
    throw std::invalid_argument(std::string(error.what()) + suggestion(app, argc, argv) +
                                " (see rflow_report --help)");
  }

  require_single_values(o, argc, argv);
  o.normalize = normalization.is("none")        ? rflow::normalization::none
                : normalization.is("per_token") ? rflow::normalization::per_token
                : normalization.is("relative")  ? rflow::normalization::relative
                                                : rflow::normalization::per_element;
  o.main_estimator = main_estimator.is("biased") ? estimator::biased : estimator::debiased;
  o.plots = !no_plots;
  o.own_masks = !no_mask;
  if (tokens->count() > 0) o.tokens = token_ranges(o.tokens_text);
  o.linear = !kernel.is("rbf");
  o.rbf = !kernel.is("linear");
  if (bits.is("f16")) o.bits = rflow::reinterpret::as_f16;
  if (bits.is("bf16")) o.bits = rflow::reinterpret::as_bf16;
  if (bits.is("f8_e4m3")) o.bits = rflow::reinterpret::as_f8_e4m3;
  if (bits.is("f8_e5m2")) o.bits = rflow::reinterpret::as_f8_e5m2;
  if (o.cross_cka && o.inputs.size() != 2)
    throw std::invalid_argument("--cross-cka needs two captures");
  o.pattern.own_names = names.is("rflow");
  if (last.is("norm")) o.pattern.last = rflow::list_end::norm;
  if (last.is("block")) o.pattern.last = rflow::list_end::block;
  for (auto* const name : {&o.pattern.embed, &o.pattern.final_norm})
    if (*name == "none") *name = "";
  if (!o.pattern.array.empty() && o.pattern.axes.find('s') == std::string::npos)
    throw std::invalid_argument("--array needs --axes with sites");
  if (o.same_tokens && o.inputs.size() != 2)
    throw std::invalid_argument("--same-tokens needs two captures");
  if (auto const mark = o.pattern.block.find("{}");
      !o.pattern.block.empty() &&
      (mark == std::string::npos || o.pattern.block.find("{}", mark + 2) != std::string::npos))
    throw std::invalid_argument("--pattern-block: '" + o.pattern.block + "' does not hold {} once");
  if (output->count() > 0 && o.output.empty())
    throw std::invalid_argument("--output: the name of a folder expected");
  if (o.labels.empty() &&
      (!o.label_groups.empty() || !o.label_column.empty() || !o.ignore_labels.empty() ||
       o.probe_standardize || app.count("--probe-seeds") > 0 || app.count("--probe-epochs") > 0))
    throw std::invalid_argument(
        "--label-groups, --label-column, --ignore-label and --probe-… need --labels");
  if (o.label_groups.empty() && !o.group_column.empty())
    throw std::invalid_argument("--group-column needs --label-groups");
  for (auto const& [option, files] :
       {std::pair{"--labels", &o.labels}, std::pair{"--label-groups", &o.label_groups}}) {
    if (files->size() > 1 && files->size() != o.inputs.size())
      throw std::invalid_argument(std::string(option) + ": one for all, or one for each of the " +
                                  plural(std::ssize(o.inputs), "capture") + ", expected, found " +
                                  std::to_string(files->size()));
    for (std::string const& file : *files)
      if (file.empty()) throw std::invalid_argument(std::string(option) + ": a name expected");
  }
  if (!o.shards && o.inputs.size() > 2)
    throw std::invalid_argument("one or two captures expected, not " +
                                std::to_string(o.inputs.size()) +
                                "; many files of one model: --shards (see rflow_report --help)");
  if (!o.against.empty() && !o.shards)
    throw std::invalid_argument("--against needs --shards; without, two captures are two models");
  if (!o.against.empty() && !o.labels.empty())
    throw std::invalid_argument("--labels goes with the shards of one model: without --against");
  std::ptrdiff_t const models = !o.shards ? std::ssize(o.inputs) : o.against.empty() ? 1 : 2;
  if (!o.names.empty() && std::ssize(o.names) != models)
    throw std::invalid_argument("--name: one for each model expected, found " +
                                plural(std::ssize(o.names), "name") + " for " +
                                plural(models, "model"));
  for (std::string const& name : o.names)
    if (name.empty()) throw std::invalid_argument("--name: a name expected");
  if (!o.shards &&
      (batch->count() > 0 || app.count("--cka") > 0 || !o.checkpoint.empty() || o.memory_limit > 0))
    throw std::invalid_argument(
        "--cka, --cka-batch, --checkpoint and --memory-limit need --shards");
  if (o.shards && o.cross_cka) throw std::invalid_argument("--shards does not go with --cross-cka");
  o.minibatch_cka = o.shards && over.is("minibatch");
  if (o.shards && o.shifts)
    throw std::invalid_argument(
        "--shifts is for captures in one file: shards have shares of the work");
  if (o.shards && !o.minibatch_cka && batch->count() > 0)
    throw std::invalid_argument("--cka-batch is for --cka minibatch");
  if (o.minibatch_cka) {
    if (app.count("--kernel") > 0 && !kernel.is("linear"))
      throw std::invalid_argument("minibatch CKA has the linear kernel only: --cka full");
    if (app.count("--estimator") > 0 && !main_estimator.is("debiased"))
      throw std::invalid_argument("minibatch CKA is debiased: --cka full");
    if (o.significance || o.shifts)
      throw std::invalid_argument("minibatch CKA has no p-values: --cka full");
    o.linear = true;
    o.rbf = false;
  }
  if (o.output.empty()) {
    std::vector<std::string> named = o.inputs;
    if (o.shards) {
      named.resize(1);
      if (!o.against.empty()) named.push_back(o.against.front());
    }
    o.output = default_output(named);
  }
  return o;
}

}  // namespace report
