// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the theory says, statement by statement, and what simulation finds.

#include <rflow/poincare.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>
#include <numbers>
#include <string>
#include <vector>

#include "monte_carlo.hpp"

namespace validation {

inline constexpr integer batches = 256;
inline constexpr integer look_rows = integer{1}
                                     << 28;  // of a stream, between samples of one question
inline constexpr integer pilot_rows = integer{1} << 31;  // where a pilot's begin
inline constexpr int gap_looks = 7;                      // at most at whether a gap shrinks

struct settings {
  std::uint64_t seed = 1;
  integer draws = 4096;          // sequences per parameter set, at least
  integer most_draws = 1 << 21;  // in one sample: what is not decided then stays so
  integer sets = 20;
  double wrong_by = 0;  // share by which closed forms are spoilt, to see that it shows
  rflow::detail::team& team;
  std::function<void(double)> done;  // told of multiply-adds
  decision_rule rule;

  /// What is judged at most with so many parameter sets: 12 constants and a bound a set; of three
  /// layers whether two gaps are below half of another, on both sides, at every look.
  static std::size_t tests(integer sets) {
    return static_cast<std::size_t>(sets) * (13 + 3 * 2 * 2 * gap_looks);
  }

  /// Batches of some hundred rows.
  sampling sample(integer draws_wanted) const {
    return {team, batches,
            std::max<integer>(1, (std::min(draws_wanted, most_draws) + batches - 1) / batches)};
  }
  /// Draws for the standard error that decides, given a sample's; a little more, since its is a guess.
  integer enough(sampling const& seen, double relative_error) const {
    double const times =
        1.2 * std::pow(relative_error / rule.enough(), 2) * static_cast<double>(seen.draws());
    return std::clamp(static_cast<integer>(std::min(times, 1e15)), draws,
                      std::max(draws, most_draws));
  }
  /// Draws until the worst relative error decides or the ceiling is reached. Each sample is new and the
  /// last alone is judged, so that looking often makes nothing look better.
  /// measure(sample, first row) → estimates; worst(estimates) → relative error.
  template <class Measure, class Worst>
  auto decide(integer first_draws, Measure const& measure, Worst const& worst) const {
    integer wanted = first_draws;
    for (integer look = 0;; ++look) {
      sampling const s = sample(wanted);
      auto seen = measure(s, look * look_rows);
      double const error = worst(seen);
      // With this ceiling, more looks than a stream has room for do not happen.
      if (error <= rule.enough() || s.draws() >= most_draws || look == 6) return seen;
      wanted = std::max(enough(s, error), s.draws() + s.draws() / 4);
    }
  }
  std::uint64_t seed_of(int statement, integer set) const {
    return seed * 1000003 + static_cast<std::uint64_t>(statement) * 1009 +
           static_cast<std::uint64_t>(set);
  }
};

struct work {  // of one thread
  matrix z, x, update, other, after;
  transformer::buffers t;
  mamba::buffers m;
};

inline extent random_extent(drawer& draw) {
  extent n;
  n.tokens = draw.whole(4, 24);
  n.features = draw.whole(6, 24);
  n.hidden = draw.whole(8, 64);
  n.channels = draw.whole(8, 40);
  n.taps = draw.whole(1, 4);
  n.states = draw.whole(1, 8);
  return n;
}

inline std::string describe(extent const& n, bool is_mamba, double s) {
  char text[160];
  if (is_mamba)
    std::snprintf(text, sizeof text, "N=%td d=%td e=%td K=%td s=%.3g", n.tokens, n.features,
                  n.channels, n.taps, s);
  else
    std::snprintf(text, sizeof text, "N=%td d=%td m=%td s=%.3g", n.tokens, n.features, n.hidden, s);
  return text;
}

enum class layer { full_attention, causal_attention, mamba };
inline char const* name_of(layer l) {
  return l == layer::full_attention     ? "transformer"
         : l == layer::causal_attention ? "causal transformer"
                                        : "mamba";
}

inline void update_of(transformer const& f, form as, matrix const& x, work& w, matrix& y) {
  f(as, x, w.t, y);
}
inline void update_of(mamba const& f, form as, matrix const& x, work& w, matrix& y) {
  f(as, x, w.m, y);
}

// ---- (a) the closed forms -----------------------------------------------------------------------

template <class Layer>
void moments(settings const& ask, Layer const& f, inputs const& x, double s, integer tokens,
             std::string const& kind, std::string const& where, std::vector<check>& out) {
  rflow::update_moments const closed = f.closed_form(x.covariance(s));
  row mean(static_cast<integer>(closed.mean.size()));
  for (integer j = 0; j < mean.size(); ++j)
    mean(j) = static_cast<float>(closed.mean[static_cast<std::size_t>(j)]);

  auto const measure = [&](sampling const& sample, integer first) {
    std::vector<work> works(static_cast<std::size_t>(ask.team.size()));
    auto const seen = sample.run(3, [&](integer b, int thread, double* values) {
      work& w = works[static_cast<std::size_t>(thread)];
      integer const rows = sample.per_batch * tokens;
      x.draw(first + b * rows, rows, s, w.z, w.x);
      update_of(f, form::linear, w.x, w, w.update);
      auto const count = static_cast<double>(sample.per_batch);
      values[0] = st2_square(w.x, w.update, w.after) / count;
      values[1] =
          static_cast<double>((w.update * mean.transpose()).sum()) / count;  // ‖μ‖² on average
      values[2] = static_cast<double>((w.update.rowwise() - mean).squaredNorm()) / count;
    });
    ask.done(static_cast<double>(sample.draws()) * (f.cost() + x.cost(tokens)));
    return seen;
  };
  double const values[] = {closed.expected_st2_square(), closed.mean_square, closed.trace};
  auto const worst = [&](std::vector<estimate> const& seen) {
    double largest = 0;
    for (std::size_t q = 0; q < 3; ++q) largest = std::max(largest, seen[q].error / values[q]);
    return largest;
  };
  // A pilot on draws of its own says how many are needed.
  sampling const pilot = ask.sample(ask.draws / 4);
  auto const seen =
      ask.decide(ask.enough(pilot, worst(measure(pilot, pilot_rows))), measure, worst);

  double const spoilt = 1 + ask.wrong_by;
  auto const add = [&](char const* statement, char const* quantity, double closed_form,
                       estimate const& e) {
    out.push_back({statement, kind + ": " + quantity, where, closed_form * spoilt, e, closed_form});
  };
  bool const is_mamba = kind == name_of(layer::mamba);
  add("proposition 1", "E[St2^2]", closed.expected_st2_square(), seen[0]);
  add(is_mamba ? "theorem 3" : "theorem 1", "|mu|^2", closed.mean_square, seen[1]);
  add(is_mamba ? "theorem 4" : "theorem 2", "tr Cov", closed.trace, seen[2]);
}

/// E[St2²], ‖μ‖² and tr Σ of all layers on random parameter sets.
/// @return whether the contractive bound held on every Mamba layer
inline verdict closed_forms(settings const& ask, std::vector<check>& out) {
  verdict bounded = verdict::held;
  for (layer const kind : {layer::full_attention, layer::causal_attention, layer::mamba})
    for (integer set = 0; set < ask.sets; ++set) {
      std::uint64_t const seed = ask.seed_of(static_cast<int>(kind), set);
      drawer draw(seed);
      extent const n = random_extent(draw);
      double const s = std::pow(4.0, static_cast<double>(draw.whole(-2, 1)));
      inputs const x(draw, n.features, seed, 1u << 20);
      std::string const where =
          "seed " + std::to_string(seed) + ", " + describe(n, kind == layer::mamba, s);
      if (kind == layer::mamba) {
        mamba const f(draw, n);
        moments(ask, f, x, s, n.tokens, name_of(kind), where, out);
        estimate const trace = out.back().seen;
        bounded = worse_of(bounded,
                           ask.rule.positive({f.bound(x.covariance(s)) - trace.mean, trace.error}));
      } else {
        transformer const f(draw, n, kind == layer::causal_attention);
        moments(ask, f, x, s, n.tokens, name_of(kind), where, out);
      }
    }
  return bounded;
}

// ---- (b) what linearising costs -----------------------------------------------------------------

struct gap {
  std::string kind;
  std::vector<double> s;
  std::vector<double>
      relative;  // (E[St2²] of the real layer − that of the linear one) / the latter
  verdict shrinks = verdict::held;
  std::string where = {};  // the set that is worst
  double margin = 1e300;   // there, in standard errors
};

/// Relative gaps at some s from the same draws: batch by batch what they are made of.
struct gap_sample {
  std::vector<double> values;  // batches × scales × (linear, real)
  std::size_t scales;

  double value(std::size_t batch, std::size_t scale, std::size_t which) const {
    return values[(batch * scales + scale) * 2 + which];
  }
  std::size_t count() const { return values.size() / (2 * scales); }
  double mean(std::size_t scale, std::size_t which) const {
    return estimate_of(count(), [&](std::size_t b) { return value(b, scale, which); }).mean;
  }
  double gap(std::size_t scale) const { return mean(scale, 1) / mean(scale, 0) - 1; }

  /// a · gap(i) + b · gap(j), with the error that their common draws leave (to first order).
  estimate combined(double a, std::size_t i, double b, std::size_t j) const {
    auto const part = [&](double factor, std::size_t scale, std::size_t batch, double ratio,
                          double linear) {
      return factor * (value(batch, scale, 1) - ratio * value(batch, scale, 0)) / linear;
    };
    double const at_i = mean(i, 0), at_j = mean(j, 0), gap_i = gap(i), gap_j = gap(j);
    estimate const spread = estimate_of(count(), [&](std::size_t batch) {
      return part(a, i, batch, 1 + gap_i, at_i) + part(b, j, batch, 1 + gap_j, at_j);
    });
    return {a * gap_i + b * gap_j, spread.error};
  }
};

/// The gap by s, mean over parameter sets, the same draws on both sides; and whether every layer's
/// shrinks with s, which selection's need not.
inline void linearisation_gaps(settings const& ask, std::vector<gap>& out) {
  std::vector<double> const scales{1, 1 / 4.0, 1 / 16.0, 1 / 64.0, 1 / 256.0};
  for (int kind = 0; kind < 4; ++kind) {
    gap mean{kind == 3 ? "mamba, selective" : name_of(static_cast<layer>(kind)), scales,
             std::vector<double>(scales.size())};
    for (integer set = 0; set < ask.sets; ++set) {
      std::uint64_t const seed = ask.seed_of(10 + kind, set);
      drawer draw(seed);
      extent const n = random_extent(draw);
      inputs const x(draw, n.features, seed, 1u << 20);
      transformer const t(draw, n, kind == 1, 0);
      mamba const m(draw, n);
      std::vector<work> works(static_cast<std::size_t>(ask.team.size()));
      auto const measure = [&](sampling const& sample, integer first) {
        gap_sample seen{sample.values(2 * scales.size(),
                                      [&](integer b, int thread, double* values) {
                                        work& w = works[static_cast<std::size_t>(thread)];
                                        integer const rows = sample.per_batch * n.tokens;
                                        for (double const s : scales) {
                                          // X and −X: what is odd in X cancels instead of averaging out.
                                          x.draw(first + b * rows, rows, s, w.z, w.other);
                                          w.x.resize(2 * rows, n.features);
                                          w.x << w.other, -w.other;
                                          if (kind < 2) {
                                            t(form::linear, w.x, w.t, w.update);
                                            t(form::real, w.x, w.t, w.other);
                                          } else {
                                            m(form::linear, w.x, w.m, w.update);
                                            m(form::real, w.x, w.m, w.other, kind == 3);
                                          }
                                          *values++ = st2_square(w.x, w.update, w.after);
                                          *values++ = st2_square(w.x, w.other, w.after);
                                        }
                                      }),
                        scales.size()};
        ask.done(static_cast<double>(sample.draws() * static_cast<integer>(scales.size())) * 4 *
                 (kind < 2 ? t.cost() : m.cost()));
        return seen;
      };
      integer draws = std::max<integer>(batches, ask.draws / 4);
      for (int look = 0;; ++look, draws *= 4) {
        sampling const sample = ask.sample(draws);
        gap_sample const seen = measure(sample, look * look_rows);
        // To first order the gap is in proportion to s: a quarter of s leaves less than half of it.
        verdict here = verdict::held;
        double margin = 1e300;
        for (std::size_t i = 3; i < scales.size() && kind < 3; ++i)
          for (double const side : {1., -1.}) {
            estimate const less = seen.combined(seen.gap(i - 1) > 0 ? 0.5 : -0.5, i - 1, side, i);
            here = worse_of(here, ask.rule.positive(less));
            margin = std::min(margin, less.mean / less.error);
          }
        if (here == verdict::not_decided && look + 1 < gap_looks && sample.draws() < ask.most_draws)
          continue;
        mean.shrinks = worse_of(mean.shrinks, here);
        if (margin < mean.margin) {
          mean.margin = margin;
          mean.where = "seed " + std::to_string(seed) + ", " + describe(n, kind > 1, 1);
        }
        for (std::size_t i = 0; i < scales.size(); ++i)
          mean.relative[i] += seen.gap(i) / static_cast<double>(ask.sets);
        break;
      }
    }
    out.push_back(mean);
  }
}

// ---- (c) the threshold --------------------------------------------------------------------------

/// One pair of layers, seen at any input variance with the same draws.
struct pair_of_layers {
  extent n;
  inputs x;
  transformer t;
  mamba m;

  pair_of_layers(drawer& draw, extent const& size, bool causal, std::uint64_t seed)
      : n(size), x(draw, size.features, seed, 1u << 20), t(draw, size, causal), m(draw, size) {}

  double closed_threshold() const {
    return rflow::threshold(t.closed_form(x.covariance()), m.closed_form(x.covariance()));
  }
  /// E[St2²] of the transformer, of the Mamba layer, and the difference.
  std::vector<estimate> st2(settings const& ask, sampling const& sample, double s,
                            integer first = 0) const {
    std::vector<work> works(static_cast<std::size_t>(ask.team.size()));
    auto const seen = sample.run(3, [&](integer b, int thread, double* values) {
      work& w = works[static_cast<std::size_t>(thread)];
      integer const rows = sample.per_batch * n.tokens;
      x.draw(first + b * rows, rows, s, w.z, w.x);
      t(form::linear, w.x, w.t, w.update);
      values[0] = st2_square(w.x, w.update, w.after) / static_cast<double>(sample.per_batch);
      m(form::linear, w.x, w.m, w.update);
      values[1] = st2_square(w.x, w.update, w.after) / static_cast<double>(sample.per_batch);
      values[2] = values[0] - values[1];
    });
    ask.done(static_cast<double>(sample.draws()) * (t.cost() + m.cost() + x.cost(n.tokens)));
    return seen;
  }
};

/// s* by bisection on simulated differences against the formula.
inline void thresholds(settings const& ask, std::vector<check>& out) {
  for (integer set = 0; set < ask.sets; ++set) {
    std::uint64_t const seed = ask.seed_of(20, set);
    drawer draw(seed);
    extent n = random_extent(draw);
    n.tokens = std::min<integer>(n.tokens, 12), n.hidden = std::min<integer>(n.hidden, 24);
    pair_of_layers const pair(draw, n, set % 2 == 1, seed);
    // Coarsely to find the place, with draws of its own, then with as many as are needed.
    sampling const coarse = ask.sample(ask.draws / 4);
    struct draws_from {
      sampling how;
      integer first;
    };
    auto const difference = [&](draws_from const& by, double s) {
      return pair.st2(ask, by.how, s, by.first)[2];
    };
    auto const bisect = [&](draws_from const& by, double& low, double& high, int steps) {
      for (int i = 0; i < steps; ++i) {
        double const middle = std::sqrt(low * high);
        (difference(by, middle).mean > 0 ? low : high) = middle;
      }
    };
    /// What a standard error of the difference is in s.
    auto const error_at = [&](draws_from const& by, double s) {
      double const width = 0.05 * s;
      return difference(by, s).error * 2 * width /
             std::abs(difference(by, s + width).mean - difference(by, s - width).mean);
    };
    draws_from const rough_draws{coarse, pilot_rows};
    double low = 1, high = 1;
    while (difference(rough_draws, high).mean > 0) high *= 2;
    while (difference(rough_draws, low).mean <= 0) low /= 2;
    bisect(rough_draws, low, high, 6);
    double const place = std::sqrt(low * high);
    double const rough = error_at(rough_draws, place) / place;
    auto const measure = [&](sampling const& how, integer first) {
      draws_from const by{how, first};
      // The rough place may be off: a bracket has the difference's two signs at its ends.
      double const factor = 1 + std::min(1., 4 * rough);
      double from = place / factor, to = place * factor;
      while (difference(by, from).mean <= 0) from /= factor;
      while (difference(by, to).mean > 0) to *= factor;
      bisect(by, from, to, 7);
      double const found = (from + to) / 2;
      // What is left of the bracket is uncertainty too.
      return estimate{found, std::hypot(error_at(by, found), (to - from) / 2)};
    };
    double const closed = pair.closed_threshold();
    estimate const seen = ask.decide(ask.enough(coarse, rough), measure,
                                     [&](estimate const& e) { return e.error / closed; });
    out.push_back({"theorem 5", "s*", "seed " + std::to_string(seed) + ", " + describe(n, true, 1),
                   closed * (1 + ask.wrong_by), seen, closed});
  }
}

// ---- (d) Poincaré -------------------------------------------------------------------------------

struct poincare_result {
  integer chains = 0, outside = 0;
  double farthest = 0;  // of the extremal chains from their bound, relative
};

inline poincare_result poincare(settings const& ask) {
  poincare_result out;
  drawer draw(ask.seed_of(30, 0));
  rflow::on_cpu const on{.threads = 1};
  auto const spread = [&](std::vector<wide> const& chain, double& energy) {
    auto const v = rflow::variance(rflow::layer_stack(chain), rflow::normalization::none, on);
    energy = v.path_energy;
    return v.st2 * v.st2 * static_cast<double>(chain.size());
  };
  for (integer i = 0; i < 10 * ask.sets; ++i) {
    integer const sites = draw.whole(2, 40), n = draw.whole(1, 8), d = draw.whole(1, 12);
    auto const momentum = static_cast<double>(draw.whole(-1, 1));  // alternating, free, drifting
    std::vector<wide> chain{draw(n, d, rflow::gaussian(1)).cast<double>()};
    wide step = wide::Zero(n, d);
    for (integer l = 1; l < sites; ++l) {
      step = 0.9 * momentum * step + draw(n, d, rflow::gaussian(1)).cast<double>();
      chain.push_back(chain.back() + step);
    }
    double energy = 0;
    double const seen = spread(chain, energy);
    rflow::bounds const b = rflow::poincare_bounds(energy, sites);
    ++out.chains;
    out.outside += !(seen >= b.lower * (1 - 1e-12) && seen <= b.upper * (1 + 1e-12));
  }
  for (integer sites = 2; sites <= 65; ++sites) {
    wide const direction = draw(4, 6, rflow::gaussian(1)).cast<double>();
    std::vector<wide> smooth, rough;
    for (integer l = 0; l < sites; ++l) {
      double const angle =
          std::numbers::pi * (static_cast<double>(l) + 0.5) / static_cast<double>(sites);
      smooth.push_back(std::cos(angle) * direction);
      rough.push_back((l % 2 == 0 ? 1 : -1) * std::sin(angle) * direction);
    }
    double energy = 0;
    double seen = spread(smooth, energy);
    out.farthest =
        std::max(out.farthest, std::abs(seen / rflow::poincare_bounds(energy, sites).upper - 1));
    seen = spread(rough, energy);
    out.farthest =
        std::max(out.farthest, std::abs(seen / rflow::poincare_bounds(energy, sites).lower - 1));
  }
  return out;
}

// ---- (e) attention is odd -----------------------------------------------------------------------

/// Largest |A(X) + A(−X)| over |A(X)|, softmax in place; and checks that E[A] = 0.
inline double oddness(settings const& ask, std::vector<check>& out) {
  double largest = 0;
  for (bool const causal : {false, true})
    for (integer set = 0; set < ask.sets; ++set) {
      std::uint64_t const seed = ask.seed_of(40 + causal, set);
      drawer draw(seed);
      extent n = random_extent(draw);
      n.tokens = std::min<integer>(n.tokens, 8), n.features = std::min<integer>(n.features, 8);
      inputs const x(draw, n.features, seed, 1u << 20);
      transformer const t(draw, n, causal);
      matrix const direction = draw(n.tokens, n.features, rflow::gaussian(1));
      std::vector<work> works(static_cast<std::size_t>(ask.team.size()));
      std::vector<double> worst(static_cast<std::size_t>(batches));
      auto const measure = [&](sampling const& sample, integer first) {
        ask.done(static_cast<double>(sample.draws()) * 2 * t.cost());
        return sample.run(2, [&](integer b, int thread, double* values) {
          work& w = works[static_cast<std::size_t>(thread)];
          integer const rows = sample.per_batch * n.tokens;
          x.draw(first + b * rows, rows, 1, w.z, w.x);
          t.attend(form::real, w.x, w.t, w.update);
          for (integer i = 0; i < sample.per_batch; ++i) {
            auto const along = static_cast<double>(
                w.update.middleRows(i * n.tokens, n.tokens).cwiseProduct(direction).sum());
            values[0] += along / static_cast<double>(sample.per_batch);
            values[1] += along * along / static_cast<double>(sample.per_batch);
          }
          if (b % 16 == 0) {
            w.x = -w.x;
            t.attend(form::real, w.x, w.t, w.other);
            worst[static_cast<std::size_t>(b)] = static_cast<double>(
                (w.update + w.other).cwiseAbs().maxCoeff() / w.update.cwiseAbs().maxCoeff());
          }
        });
      };
      // The error of a mean of n is the deviation over √n.
      auto const seen = ask.decide(
          std::max(ask.draws, static_cast<integer>(1.2 / std::pow(ask.rule.enough(), 2))), measure,
          [](std::vector<estimate> const& e) { return e[0].error / std::sqrt(e[1].mean); });
      largest = std::max(largest, *std::max_element(worst.begin(), worst.end()));
      double const deviation = std::sqrt(seen[1].mean);
      out.push_back({"propositions 2, 3",
                     std::string(causal ? "causal " : "") + "attention: mean along a direction",
                     "seed " + std::to_string(seed) + ", " + describe(n, false, 1),
                     deviation * ask.wrong_by, seen[0], deviation});
    }
  return largest;
}

// ---- the picture --------------------------------------------------------------------------------

struct curve_point {
  double s, closed_transformer, closed_mamba;
  estimate transformer, mamba;
};
struct curves {
  double threshold = 0;
  std::string where;
  std::vector<curve_point> points;
};

/// E[St2²] of one pair of layers by input variance, closed and simulated.
inline curves st2_by_variance(settings const& ask) {
  std::uint64_t const seed = ask.seed_of(50, 0);
  drawer draw(seed);
  pair_of_layers const pair(draw, {}, false, seed);
  curves out{pair.closed_threshold(),
             "seed " + std::to_string(seed) + ", " + describe(pair.n, true, 1),
             {}};
  for (int i = -8; i <= 8; ++i) {
    double const s = out.threshold * std::pow(2, i / 4.0);
    auto const seen = pair.st2(ask, ask.sample(ask.draws / 4), s);
    out.points.push_back({s, pair.t.closed_form(pair.x.covariance(s)).expected_st2_square(),
                          pair.m.closed_form(pair.x.covariance(s)).expected_st2_square(), seen[0],
                          seen[1]});
  }
  return out;
}

}  // namespace validation
