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

inline constexpr integer most_draws = 1 << 18;

struct settings {
  std::uint64_t seed = 1;
  integer draws = 4096;  // sequences per parameter set, at least
  integer sets = 20;
  double wrong_by = 0;  // share by which closed forms are spoilt, to see that it shows
  rflow::detail::team& team;
  std::function<void(double)> done;  // told of multiply-adds

  /// Batches of some hundred rows.
  sampling sample(integer draws_wanted) const {
    integer const batches = 256;
    return {team, batches, std::max<integer>(1, (draws_wanted + batches - 1) / batches)};
  }
  /// Draws for a relative standard error of 0.45 %, given that of a pilot: then 5 % is eleven of them.
  integer enough(sampling const& pilot, double relative_error) const {
    double const times = std::pow(relative_error / 0.0045, 2) * static_cast<double>(pilot.draws());
    return std::clamp(static_cast<integer>(times), draws, std::max(draws, most_draws));
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
  // A pilot on draws of its own says how many are needed.
  sampling const pilot = ask.sample(ask.draws / 4);
  auto const rough = measure(pilot, integer{1} << 31);
  double worst = 0;
  for (std::size_t q = 0; q < 3; ++q) worst = std::max(worst, rough[q].error / values[q]);
  auto const seen = measure(ask.sample(ask.enough(pilot, worst)), 0);

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
inline bool closed_forms(settings const& ask, std::vector<check>& out) {
  bool bounded = true;
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
        bounded = bounded && f.bound(x.covariance(s)) >= out.back().seen.mean;
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
};

/// The gap by s, mean over parameter sets, the same draws on both sides.
/// @return whether every layer's gap shrinks with s; selection's need not
inline bool linearisation_gaps(settings const& ask, std::vector<gap>& out) {
  bool shrink = true;
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
      sampling const sample = ask.sample(ask.draws / 4);
      std::vector<work> works(static_cast<std::size_t>(ask.team.size()));
      std::vector<double> relative;
      for (double const s : scales) {
        auto const seen = sample.run(2, [&](integer b, int thread, double* values) {
          work& w = works[static_cast<std::size_t>(thread)];
          // X and −X: what is odd in X cancels instead of averaging out.
          integer const rows = sample.per_batch * n.tokens;
          x.draw(b * rows, rows, s, w.z, w.other);
          w.x.resize(2 * rows, n.features);
          w.x << w.other, -w.other;
          if (kind < 2) {
            t(form::linear, w.x, w.t, w.update);
            t(form::real, w.x, w.t, w.other);
          } else {
            m(form::linear, w.x, w.m, w.update);
            m(form::real, w.x, w.m, w.other, kind == 3);
          }
          values[0] = st2_square(w.x, w.update, w.after);
          values[1] = st2_square(w.x, w.other, w.after);
        });
        relative.push_back(seen[1].mean / seen[0].mean - 1);
        ask.done(static_cast<double>(sample.draws()) * 4 * (kind < 2 ? t.cost() : m.cost()));
      }
      // To first order the gap is in proportion to s.
      for (std::size_t i = 3; i < scales.size() && kind < 3; ++i)
        shrink = shrink && std::abs(relative[i]) < 0.5 * std::abs(relative[i - 1]);
      for (std::size_t i = 0; i < scales.size(); ++i)
        mean.relative[i] += relative[i] / static_cast<double>(ask.sets);
    }
    out.push_back(mean);
  }
  return shrink;
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
  std::vector<estimate> st2(settings const& ask, sampling const& sample, double s) const {
    std::vector<work> works(static_cast<std::size_t>(ask.team.size()));
    auto const seen = sample.run(3, [&](integer b, int thread, double* values) {
      work& w = works[static_cast<std::size_t>(thread)];
      integer const rows = sample.per_batch * n.tokens;
      x.draw(b * rows, rows, s, w.z, w.x);
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
    // Coarsely to find the place with a sixteenth of the draws, then with as many as are needed.
    sampling const coarse = ask.sample(ask.draws / 4);
    auto const difference = [&](sampling const& how, double s) { return pair.st2(ask, how, s)[2]; };
    auto const bisect = [&](sampling const& how, double& low, double& high, int steps) {
      for (int i = 0; i < steps; ++i) {
        double const middle = std::sqrt(low * high);
        (difference(how, middle).mean > 0 ? low : high) = middle;
      }
    };
    /// What a standard error of the difference is in s.
    auto const error_at = [&](sampling const& how, double s) {
      double const width = 0.05 * s;
      return difference(how, s).error * 2 * width /
             std::abs(difference(how, s + width).mean - difference(how, s - width).mean);
    };
    double low = 1, high = 1;
    while (difference(coarse, high).mean > 0) high *= 2;
    while (difference(coarse, low).mean <= 0) low /= 2;
    bisect(coarse, low, high, 6);
    double const rough = error_at(coarse, low);
    sampling const sample = ask.sample(ask.enough(coarse, rough / low));
    low -= 5 * rough, high += 5 * rough;
    bisect(sample, low, high, 6);
    double const found = (low + high) / 2;
    double const closed = pair.closed_threshold();
    // What is left of the bracket is uncertainty too.
    double const error = std::hypot(error_at(sample, found), (high - low) / 2);
    out.push_back({"theorem 5",
                   "s*",
                   "seed " + std::to_string(seed) + ", " + describe(n, true, 1),
                   closed * (1 + ask.wrong_by),
                   {found, error},
                   closed});
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
      sampling const sample = ask.sample(std::max<integer>(ask.draws, 32768));
      std::vector<work> works(static_cast<std::size_t>(ask.team.size()));
      std::vector<double> worst(static_cast<std::size_t>(sample.batches));
      auto const seen = sample.run(2, [&](integer b, int thread, double* values) {
        work& w = works[static_cast<std::size_t>(thread)];
        integer const rows = sample.per_batch * n.tokens;
        x.draw(b * rows, rows, 1, w.z, w.x);
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
      largest = std::max(largest, *std::max_element(worst.begin(), worst.end()));
      double const deviation = std::sqrt(seen[1].mean);
      out.push_back({"propositions 2, 3",
                     std::string(causal ? "causal " : "") + "attention: mean along a direction",
                     "seed " + std::to_string(seed) + ", " + describe(n, false, 1),
                     deviation * ask.wrong_by, seen[0], deviation});
      ask.done(static_cast<double>(sample.draws()) * 2 * t.cost());
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
