// SPDX-License-Identifier: Apache-2.0
// rflow_theory_validation: the closed forms of <rflow/theory.hpp> against simulation. Exit status 0 if
// everything held, 2 if something did not, 1 if the command line or a file was at fault.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

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
  integer draws = 4096, sets = 20;
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
  return o;
}

/// Everything that was found, and whether all of it held.
struct findings {
  std::vector<check> checks;
  std::vector<gap> gaps;
  poincare_result chains;
  curves picture;
  double bound = 0, oddness = 0;
  bool contractive = false, gaps_shrink = false;

  bool agrees(check const& c) const { return std::abs(c.z()) < bound; }
  bool powerful(check const& c) const {
    return c.relative_error() <= 0.01 && c.notices(0.05, bound);
  }
  bool held() const {
    for (check const& c : checks)
      if (!agrees(c) || !powerful(c)) return false;
    return contractive && gaps_shrink && chains.outside == 0 && chains.farthest < 1e-10 &&
           oddness < 1e-5;
  }
};

findings examine(settings const& ask) {
  findings f;
  f.contractive = closed_forms(ask, f.checks);
  f.oddness = oddness(ask, f.checks);
  thresholds(ask, f.checks);
  f.gaps_shrink = linearisation_gaps(ask, f.gaps);
  f.chains = poincare(ask);
  f.picture = st2_by_variance(ask);
  f.bound = family_bound(f.checks.size(), ask.sample(1).batches);
  return f;
}

// ---- text ---------------------------------------------------------------------------------------

constexpr char const* verdict(bool good) { return good ? "held" : "FAILED"; }

std::string line(check const& c, findings const& f) {
  char text[200];
  std::snprintf(text, sizeof text, "%-18s %-41s %12.6g %12.6g %9.2g %6.2f  %s\n",
                c.statement.c_str(), c.quantity.c_str(), c.closed_form, c.seen.mean, c.seen.error,
                c.z(),
                !f.agrees(c)     ? "FAILED"
                : !f.powerful(c) ? "too few draws"
                                 : "held");
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
      bool const this_fails = !f.agrees(*c) || !f.powerful(*c),
                 that_fails = !f.agrees(*worst) || !f.powerful(*worst);
      if (this_fails != that_fails ? this_fails : std::abs(c->z()) > std::abs(worst->z()))
        worst = c;
      error = std::max(error, c->relative_error());
    }
    if (!o.table) {
      std::printf("%s", line(*worst, f).c_str());
      std::printf("  the worst of %zu sets: %s; standard errors up to %.2f %%\n",
                  groups[name].size(), worst->where.c_str(), 100 * error);
    }
  }
  std::printf(
      "%zu checks as one family: |z| < %.2f; each has to notice a constant that is 5 %% wrong\n\n",
      f.checks.size(), f.bound);
  std::printf("contractive bound on tr Cov of every mamba layer: %s\n", verdict(f.contractive));
  std::printf("attention is odd: |A(X) + A(-X)| at most %.1g of |A(X)|: %s\n", f.oddness,
              verdict(f.oddness < 1e-5));
  std::printf(
      "Poincare bounds: %td of %td chains outside: %s; extremal chains within %.1g of them: %s\n",
      f.chains.outside, f.chains.chains, verdict(f.chains.outside == 0), f.chains.farthest,
      verdict(f.chains.farthest < 1e-10));
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
              verdict(f.gaps_shrink));
  std::printf("\n%s in %.1f s, %.1f G multiply-adds/s; seed %llu\n",
              f.held() ? "all held" : "NOT all held", seconds, multiply_adds / seconds / 1e9,
              static_cast<unsigned long long>(o.seed));
}

// ---- files --------------------------------------------------------------------------------------

std::string json(findings const& f, options const& o) {
  nlohmann::ordered_json out;
  out["seed"] = o.seed, out["draws"] = o.draws, out["sets"] = o.sets, out["wrong_by"] = o.wrong_by;
  out["held"] = f.held(), out["family_bound"] = f.bound;
  for (check const& c : f.checks)
    out["checks"].push_back({{"statement", c.statement},
                             {"quantity", c.quantity},
                             {"parameters", c.where},
                             {"closed_form", c.closed_form},
                             {"simulated", c.seen.mean},
                             {"standard_error", c.seen.error},
                             {"z", c.z()},
                             {"agrees", f.agrees(c)},
                             {"notices_5_percent", f.powerful(c)}});
  for (gap const& g : f.gaps)
    out["linearisation_gaps"].push_back({{"layer", g.kind}, {"s", g.s}, {"relative", g.relative}});
  out["linearisation_gaps_shrink"] = f.gaps_shrink;
  out["contractive_bound_held"] = f.contractive;
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
  std::string out = "statement,quantity,parameters,closed_form,simulated,standard_error,z\n";
  for (check const& c : f.checks) {
    char numbers[120];
    std::snprintf(numbers, sizeof numbers, ",%.9g,%.9g,%.3g,%.3f\n", c.closed_form, c.seen.mean,
                  c.seen.error, c.z());
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
      .sets = o.sets,
      .wrong_by = o.wrong_by,
      .team = team,
      .done = [&](double more) { bar(std::min(multiply_adds += more, expected), expected); }};
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
  return f.held() ? 0 : 2;
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
