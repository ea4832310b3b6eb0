// SPDX-License-Identifier: Apache-2.0
#pragma once

// Runs the library on captures. Everything that is written afterwards comes from these structs.

#include <rflow/flow.hpp>
#include <rflow/monitor.hpp>
#include <rflow/poincare.hpp>
#include <rflow/probe.hpp>

#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "load.hpp"
#include "options.hpp"
#include "outliers.hpp"
#include "tokens.hpp"

namespace report {

/// CKA of sites against sites under one estimator.
struct cka_grid {
  std::ptrdiff_t rows = 0, cols = 0;
  std::vector<rflow::measured> value, chance;  // row-major

  rflow::measured at(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return value[static_cast<std::size_t>(i * cols + j)];
  }
  rflow::measured chance_at(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return chance[static_cast<std::size_t>(i * cols + j)];
  }
};

/// CKA under one kernel.
struct cka_result {
  std::string kernel;  // "linear" or "rbf"
  cka_grid debiased, biased;
  std::vector<rflow::measured> sigma;      // per row
  std::vector<rflow::measured> top_share;  // per row: share of the top token in the kernel matrix
  std::vector<std::ptrdiff_t> top_token;   // per row: that token, counted in the file; -1 if none
  std::vector<rflow::measured> score = {}, p_value = {};  // row-major; empty unless asked for
  std::vector<rflow::measured> shift_p_value = {};        // the same
  std::ptrdiff_t tokens = 0;                              // that counted

  cka_grid const& grid(estimator e) const { return e == estimator::debiased ? debiased : biased; }
};

struct warning {
  bool no_answer;    // a value is missing, which --strict does not forgive; else advice
  std::string text;  // begins with the site or sites
};

/// What is known besides of a model that was read in shards.
struct shard_facts {
  std::ptrdiff_t files = 0;
  std::ptrdiff_t batches = 0, left_out = 0;  // of minibatch CKA
  double memory_bound = 0, memory_peak = 0;  // bytes beside the mapped files: stated, measured
};

/// What the probes tell apart.
struct probe_classes {
  std::string from;                    // file, or tensor, and column
  std::vector<std::string> names;      // in order
  std::vector<std::ptrdiff_t> tokens;  // of each
  std::ptrdiff_t left_out = 0;         // tokens without a class, in all other metrics
  std::ptrdiff_t used() const {
    return std::accumulate(tokens.begin(), tokens.end(), std::ptrdiff_t{0});
  }
};

struct model_result {
  std::string path, label, dtype, token_hash;
  std::map<std::string, std::string> metadata;
  std::vector<std::string> sites;  // of the chain
  std::vector<double> positions;   // l/L of each; empty: evenly from 0 to 1
  bool embedding = true;           // the chain begins with it; else with a block
  std::string final_norm_name;     // empty if there is none
  token_choice tokens;
  rflow::flow_report flow;                    // pools the tokens of all sequences
  rflow::sequence_figures per_sequence;       // each sequence by itself: mean and spread
  rflow::measured final_inter_token;          // not_requested if there is none
  std::vector<cka_result> cka;                // rows and columns: the chain, then the final norm
  std::optional<rflow::layer_probes> probes;  // sites: the chain, then the final norm
  std::optional<probe_classes> classes;       // that they tell apart
  std::optional<shard_facts> shards;          // if it was read in shards
  std::optional<outlier_facts> outliers;      // unless it was
  std::vector<warning> warnings;

  /// From site to site of the chain.
  std::ptrdiff_t steps() const { return static_cast<std::ptrdiff_t>(sites.size()) - 1; }
  std::ptrdiff_t blocks() const { return steps() + (embedding ? 0 : 1); }
  /// Whether per_sequence says more than flow.
  bool in_sequences() const { return shards || tokens.offsets.size() > 2; }
  bool has_final_norm() const { return !final_norm_name.empty(); }
  std::vector<std::string> cka_sites() const {
    std::vector<std::string> out = sites;
    if (has_final_norm()) out.push_back(final_norm_name);
    return out;
  }
  /// Normalised layer index l/L of a site of the chain.
  double position(std::size_t site) const {
    if (!positions.empty()) return positions[site];
    return steps() > 0 ? static_cast<double>(site) / static_cast<double>(steps()) : 0;
  }
  /// Mean of the adjacent cosines over the blocks that have one; and how many have.
  std::pair<rflow::measured, std::size_t> adjacent_mean() const {
    double sum = 0;
    std::size_t count = 0;
    for (auto const& pair : flow.adjacent)
      if (pair.mean.ok()) sum += pair.mean, ++count;
    if (count > 0) return {sum / static_cast<double>(count), count};
    return {flow.adjacent.empty() ? rflow::status::too_few_sites : flow.adjacent.front().mean.why,
            0};
  }
  /// Bounds on St2² from the path energy alone.
  rflow::bounds st2_squared_bounds() const {
    auto const s = static_cast<double>(sites.size());
    auto const of = [&](rflow::measured x) { return x.ok() ? rflow::measured(x / s) : x; };
    return {of(flow.spread_bounds.lower), of(flow.spread_bounds.upper)};
  }
};

struct result {
  std::vector<model_result> models;
  std::vector<cka_result> cross;         // rows: the first model's sites; columns: the second's
  std::string why_no_cross;              // two models whose layers are not compared
  std::optional<rflow::ordering> order;  // of the two St2, from path energies alone

  bool all_answered() const {
    for (model_result const& m : models)
      for (warning const& w : m.warnings)
        if (w.no_answer) return false;
    return true;
  }
};

/// Multiply-adds so far and in all.
using progress = std::function<void(double done, double total)>;

/// Which of two models has the larger St2, if their path energies tell.
void find_order(result& of);

/// @throws unusable if the captures cannot be compared though --cross-cka asks for it, or masks,
///         sequences or labels do not fit
result measure(std::vector<capture> const& captures, options const& asked, progress const& tell);

/// Both estimators' tables of all sites of one model.
/// @param stored  where a token that counts stands in the file
cka_result cka_of(std::string const& kernel, rflow::gram_moments const& m,
                  std::function<std::ptrdiff_t(std::ptrdiff_t)> const& stored);

/// How the probes are trained.
/// @param groups  of the tokens, or none
rflow::probe_options training_of(options const& asked, std::vector<std::int64_t> groups);

/// What is said to be a value and is none has left the range of double.
rflow::measured finite(rflow::measured x);

/// Holds every value to that, and every cosine of a pair of layers without a mean.
void require_finite(model_result& m);
void require_finite(cka_result& c);

/// Notes what has no answer, and what to be careful with.
/// @param final_norm  of one site; looked at only if the model has a final norm
void add_warnings(model_result& m, rflow::flow_report const& final_norm, options const& asked);

}  // namespace report
