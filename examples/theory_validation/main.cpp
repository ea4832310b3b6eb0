// SPDX-License-Identifier: Apache-2.0
// rflow_theory_validation: the closed forms of <rflow/theory.hpp> against simulation. Exit status 0 if
// everything held, 2 if something did not, 3 if nothing failed but something could not be decided with the
// draws allowed, 1 if the command line or a file was at fault.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
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
#include "statements.hpp"

namespace {

using namespace validation;

struct options {
  std::uint64_t seed = 1;
  integer draws = 4096, most_draws = 1 << 21, sets = 20;
  double wrong_by = 0;
  int threads = 0;
  std::string output;
  bool plots = true, table = false, quiet = false;
};

std::optional<options> parse(int argc, char** argv) {
  CLI::App app(
      "Holds the closed forms of one-layer transformer and Mamba blocks against simulation.");
  options o;
  bool no_plots = false;
  app.add_option("--seed", o.seed, "of parameters and draws")->capture_default_str();
  app.add_option("--draws", o.draws,
                 "sequences per parameter set, at least; more are drawn where precision needs them")
      ->capture_default_str()
      ->check(CLI::Range(256, 1 << 24));
  app.add_option("--most-draws", o.most_draws,
                 "ceiling of a sample; what needs more is not decided")
      ->capture_default_str()
      ->check(CLI::Range(256, 1 << 22));
  app.add_option("--sets", o.sets, "random parameter sets per statement")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  app.add_option("--wrong-by", o.wrong_by,
                 "spoil every closed form by this share: the program has to notice")
      ->check(CLI::Range(-0.5, 0.5));
  app.add_option("--threads", o.threads, "0: as many as the machine has; results are the same")
      ->check(CLI::Range(0, 1024));
  app.add_option("--output", o.output,
                 "folder for validation.json, checks.csv and st2.svg; none by default");
  app.add_flag("--no-plots", no_plots, "do not run gnuplot");
  app.add_flag("--table", o.table, "print every check, not the worst of each kind");
  app.add_flag("--quiet", o.quiet, "print nothing but errors");
  try {
    app.parse(argc, argv);
  } catch (CLI::ParseError const& e) {
    if (e.get_exit_code() == 0) {
      app.exit(e);
      return std::nullopt;
    }
    throw std::invalid_argument(e.what());
  }
  o.plots = !no_plots;
  o.most_draws = std::max(o.most_draws, o.draws);
  return o;
}

/// Everything that was found, and whether all of it held.
struct findings {
  decision_rule rule;
  std::vector<check> checks = {};
  std::vector<gap> gaps = {};
  poincare_result chains = {};
  curves picture = {};
  double oddness = 0;
  verdict contractive = verdict::held;

  // Exact but for rounding: there is nothing to decide.
  verdict odd() const { return oddness < 1e-5 ? verdict::held : verdict::not_held; }
  verdict inside() const { return chains.outside == 0 ? verdict::held : verdict::not_held; }
  verdict attained() const { return chains.farthest < 1e-10 ? verdict::held : verdict::not_held; }
  verdict gaps_shrink() const {
    verdict out = verdict::held;
    for (gap const& g : gaps) out = worse_of(out, g.shrinks);
    return out;
  }
  verdict all() const {
    verdict out = worse_of(contractive, gaps_shrink());
    for (verdict const v : {odd(), inside(), attained()}) out = worse_of(out, v);
    for (check const& c : checks) out = worse_of(out, c.judged(rule));
    return out;
  }
};

findings examine(settings const& ask) {
  findings f{.rule = ask.rule};
  f.contractive = closed_forms(ask, f.checks);
  f.oddness = oddness(ask, f.checks);
  thresholds(ask, f.checks);
  linearisation_gaps(ask, f.gaps);
  f.chains = poincare(ask);
  f.picture = st2_by_variance(ask);
  return f;
}

// ---- text ---------------------------------------------------------------------------------------

constexpr char const* text_of(verdict v) {
  return v == verdict::held ? "held" : v == verdict::not_held ? "FAILED" : "not decided";
}

std::string line(check const& c, findings const& f) {
  char text[200];
  std::snprintf(text, sizeof text, "%-18s %-41s %12.6g %12.6g %9.2g %6.2f  %s\n",
                c.statement.c_str(), c.quantity.c_str(), c.closed_form, c.seen.mean, c.seen.error,
                c.z(), text_of(c.judged(f.rule)));
  return text;
}

void print(findings const& f, options const& o, double seconds, double multiply_adds) {
  std::printf("%-18s %-41s %12s %12s %9s %6s\n", "statement", "quantity", "closed form",
              "simulated", "std.err.", "z");
  std::map<std::string, std::vector<check const*>> groups;
  std::vector<std::string> order;
  for (check const& c : f.checks) {
    auto& group = groups[c.statement + c.quantity];
    if (group.empty()) order.push_back(c.statement + c.quantity);
    group.push_back(&c);
  }
  for (std::string const& name : order) {
    check const* worst = groups[name].front();
    double error = 0;
    for (check const* c : groups[name]) {
      if (o.table) std::printf("%s", line(*c, f).c_str());
      verdict const here = c->judged(f.rule), there = worst->judged(f.rule);
      if (here != there ? here > there : std::abs(c->z()) > std::abs(worst->z())) worst = c;
      error = std::max(error, c->relative_error());
    }
    if (!o.table) {
      std::printf("%s", line(*worst, f).c_str());
      std::printf("  the worst of %zu sets: %s; standard errors up to %.2f %%\n",
                  groups[name].size(), worst->where.c_str(), 100 * error);
    }
  }
  std::printf(
      "one family of %zu tests at most, false alarms of all together %.0e: |z| < %.2f.\n"
      "A constant that is %.0f %% wrong is missed with probability %.0e: standard errors up to "
      "%.2f "
      "%%.\nWhat needs more than %td draws is not decided\n\n",
      settings::tests(o.sets), decision_rule::false_alarm, f.rule.bound, 100 * decision_rule::share,
      decision_rule::missed, 100 * f.rule.enough(), o.most_draws);
  std::printf("contractive bound on tr Cov of every mamba layer: %s\n", text_of(f.contractive));
  std::printf("attention is odd: |A(X) + A(-X)| at most %.1g of |A(X)|: %s\n", f.oddness,
              text_of(f.odd()));
  std::printf(
      "Poincare bounds: %td of %td chains outside: %s; extremal chains within %.1g of them: %s\n",
      f.chains.outside, f.chains.chains, text_of(f.inside()), f.chains.farthest,
      text_of(f.attained()));
  std::printf(
      "\nwhat linearising costs, (E[St2^2] real - linear)/linear, mean over sets, biases "
      "zero:\n%-22s",
      "s =");
  for (double const s : f.gaps.front().s) std::printf(" %8.4g", s);
  for (gap const& g : f.gaps) {
    std::printf("\n%-22s", g.kind.c_str());
    for (double const r : g.relative) std::printf(" %8.4f", r);
  }
  std::printf("\nshrinks with s, but for selection, whose B and C vanish with it: %s\n",
              text_of(f.gaps_shrink()));
  for (gap const& g : f.gaps)
    if (g.margin < 1e300)
      std::printf("  %s: %s, by %.1f standard errors in the worst of %td sets: %s\n",
                  g.kind.c_str(), text_of(g.shrinks), g.margin, o.sets, g.where.c_str());
  verdict const all = f.all();
  std::printf("\n%s in %.1f s, %.1f G multiply-adds/s; seed %llu\n",
              all == verdict::held          ? "all held"
              : all == verdict::not_decided ? "NOT all decided, none failed"
                                            : "NOT all held",
              seconds, multiply_adds / seconds / 1e9, static_cast<unsigned long long>(o.seed));
}

// ---- files --------------------------------------------------------------------------------------

std::string json(findings const& f, options const& o) {
  nlohmann::ordered_json out;
  out["seed"] = o.seed, out["draws"] = o.draws, out["sets"] = o.sets, out["wrong_by"] = o.wrong_by;
  out["most_draws"] = o.most_draws;
  out["verdict"] = text_of(f.all());
  out["family"] = {{"tests", settings::tests(o.sets)},
                   {"false_alarm", decision_rule::false_alarm},
                   {"bound", f.rule.bound},
                   {"share_noticed", decision_rule::share},
                   {"missed", decision_rule::missed},
                   {"largest_relative_error", f.rule.enough()}};
  for (check const& c : f.checks)
    out["checks"].push_back({{"statement", c.statement},
                             {"quantity", c.quantity},
                             {"parameters", c.where},
                             {"closed_form", c.closed_form},
                             {"simulated", c.seen.mean},
                             {"standard_error", c.seen.error},
                             {"z", c.z()},
                             {"verdict", text_of(c.judged(f.rule))}});
  for (gap const& g : f.gaps)
    out["linearisation_gaps"].push_back({{"layer", g.kind}, {"s", g.s}, {"relative", g.relative}});
  out["linearisation_gaps_shrink"] = text_of(f.gaps_shrink());
  out["contractive_bound"] = text_of(f.contractive);
  out["attention_oddness"] = f.oddness;
  out["poincare"] = {{"chains", f.chains.chains},
                     {"outside", f.chains.outside},
                     {"extremal_distance", f.chains.farthest}};
  out["curves"] = {{"parameters", f.picture.where}, {"threshold", f.picture.threshold}};
  for (curve_point const& p : f.picture.points)
    out["curves"]["points"].push_back({{"s", p.s},
                                       {"transformer", p.closed_transformer},
                                       {"mamba", p.closed_mamba},
                                       {"transformer_simulated", p.transformer.mean},
                                       {"transformer_error", p.transformer.error},
                                       {"mamba_simulated", p.mamba.mean},
                                       {"mamba_error", p.mamba.error}});
  return out.dump(1) + "\n";
}

std::string csv(findings const& f) {
  std::string out =
      "statement,quantity,parameters,closed_form,simulated,standard_error,z,verdict\n";
  for (check const& c : f.checks) {
    char numbers[120];
    std::snprintf(numbers, sizeof numbers, ",%.9g,%.9g,%.3g,%.3f,%s\n", c.closed_form, c.seen.mean,
                  c.seen.error, c.z(), text_of(c.judged(f.rule)));
    out += "\"" + c.statement + "\",\"" + c.quantity + "\",\"" + c.where + "\"" + numbers;
  }
  return out;
}

std::string plot(curves const& c) {
  std::string closed, simulated;
  for (curve_point const& p : c.points) {
    char text[160];
    std::snprintf(text, sizeof text, "%.9g %.9g %.9g\n", p.s, p.closed_transformer, p.closed_mamba);
    closed += text;
    std::snprintf(text, sizeof text, "%.9g %.9g %.9g %.9g %.9g\n", p.s, p.transformer.mean,
                  4 * p.transformer.error, p.mamba.mean, 4 * p.mamba.error);
    simulated += text;
  }
  char mark[200];
  std::snprintf(mark, sizeof mark,
                "set arrow from %.9g, graph 0 to %.9g, graph 1 nohead dt 2 lc rgb '#888888'\n"
                "set label 's* = %.4g' at %.9g, graph 0.96 offset 0.7,0 textcolor rgb '#555555'\n",
                c.threshold, c.threshold, c.threshold, c.threshold);
  return common::gnuplot(
      "set terminal svg noenhanced font 'sans,13' size 640,420 background 'white'\n"
      "set encoding utf8\nset logscale xy\nset key left top\nset border 3\nset tics nomirror\n"
      "set xlabel 'input variance s'\nset ylabel 'E[St2²]'\n$closed << end\n" +
      closed + "end\n$seen << end\n" + simulated + "end\n" + mark +
      "plot $closed using 1:2 with lines lw 2 lc rgb '#1f5fa8' title 'transformer layer', \\\n"
      " $closed using 1:3 with lines lw 2 lc rgb '#b3541e' title 'Mamba layer', \\\n"
      " $seen using 1:2:3 with yerrorbars pt 7 ps 0.4 lc rgb '#1f5fa8' title 'simulated, 4 "
      "standard errors', \\\n"
      " $seen using 1:4:5 with yerrorbars pt 7 ps 0.4 lc rgb '#b3541e' notitle\n");
}

int run(options const& o) {
  int const threads = o.threads > 0
                          ? o.threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  rflow::detail::team team(threads);
  common::progress_bar bar(!o.quiet);
  // The work depends on the parameters drawn; this is what the default sizes come to.
  double const expected = 7e9 * static_cast<double>(o.sets);
  double multiply_adds = 0;
  settings const ask{
      .seed = o.seed,
      .draws = o.draws,
      .most_draws = o.most_draws,
      .sets = o.sets,
      .wrong_by = o.wrong_by,
      .team = team,
      .done = [&](double more) { bar(std::min(multiply_adds += more, expected), expected); },
      .rule = decision_rule(settings::tests(o.sets), batches)};
  auto const start = std::chrono::steady_clock::now();
  findings const f = examine(ask);
  double const seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  bar(expected, expected);
  if (!o.quiet) print(f, o, seconds, multiply_adds);
  if (!o.output.empty()) {
    std::map<std::string, std::string> files{{"validation.json", json(f, o)},
                                             {"checks.csv", csv(f)}};
    if (o.plots) files["st2.svg"] = plot(f.picture);
    common::write_files(o.output, files);
  }
  return f.all() == verdict::held ? 0 : f.all() == verdict::not_held ? 2 : 3;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    auto const asked = parse(argc, argv);
    return asked ? run(*asked) : 0;
  } catch (std::exception const& error) {
    std::fprintf(stderr, "rflow_theory_validation: %s\n", error.what());
    return 1;
  }
}
