// SPDX-License-Identifier: Apache-2.0
#include "measure.hpp"

#include <rflow/cka.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

#include "labels.hpp"
#include "memory.hpp"
#include "text.hpp"
#include "widths.hpp"

namespace report {
namespace {

using rflow::layer_stack;
using rflow::measured;
using rflow::status;

/// Calls f with a stack in the type of the capture: the chain, or the chain and the final norm.
template <class F>
auto with_stack(capture const& c, token_choice const& chosen, bool final_norm, F&& f) {
  rflow::site_set sites = c.sites;
  if (final_norm && sites.final_norm) sites.chain.push_back(*sites.final_norm);
  return rflow::visit(
      sites, [&]<class T>(layer_stack<T> const& stack) { return f(counted(stack, chosen)); });
}

/// One sequence after the other, each read once, as rflow::flow_monitor does it for rows that stream.
/// @param per_token  whether to keep cosines and norms of each token
template <class T>
chain_flow flow_of_one_width(layer_stack<T> const& stack, rflow::normalization by, bool per_token,
                             rflow::on_cpu const& on) {
  std::ptrdiff_t const sites = stack.sites(), n = stack.size();
  auto const count = [](std::ptrdiff_t x) { return static_cast<std::size_t>(x); };
  rflow::flow_moments sum(sites, stack.width());
  chain_flow out{{}, rflow::sequence_figures(sites)};
  std::vector<std::vector<double>> norms, cosines;
  if (per_token) {
    norms.assign(count(sites), std::vector<double>(count(n)));
    cosines.assign(count(sites - 1), std::vector<double>(count(n)));
  }
  std::vector<double> norm, cosine;
  std::vector<std::ptrdiff_t> const ends = stack.boundaries();
  for (std::size_t q = 0; q + 1 < ends.size(); ++q) {
    std::ptrdiff_t const begin = ends[q], size = ends[q + 1] - begin;
    if (size == 0) continue;
    // Its rows, from the first that counts to the last.
    std::ptrdiff_t const row = stack.token(begin), rows = stack.token(ends[q + 1] - 1) + 1 - row;
    std::vector<rflow::view<T>> views;
    for (std::ptrdiff_t l = 0; l < sites; ++l) {
      rflow::view<T> const& x = stack[l];
      views.emplace_back(x.data + row * x.row_stride, rows, x.cols, x.row_stride, x.col_stride);
    }
    layer_stack<T> part(views);
    if (rows != size) {
      std::vector<bool> keep(count(rows));
      for (std::ptrdiff_t i = begin; i < ends[q + 1]; ++i) keep[count(stack.token(i) - row)] = true;
      part = part.tokens(keep);
    }
    rflow::flow_sink sink;
    if (per_token) {
      norm.resize(count(sites * size));
      cosine.resize(count((sites - 1) * size));
      sink.norm = norm.data();
      sink.cosine = cosine.data();
    }
    rflow::flow_moments const m = on.flow(part, sink);
    out.per_sequence.add(m, by);
    sum.merge(m, row);
    for (std::ptrdiff_t l = 0; l < sites && per_token; ++l) {
      std::copy_n(norm.begin() + l * size, size, norms[count(l)].begin() + begin);
      if (l + 1 < sites)
        std::copy_n(cosine.begin() + l * size, size, cosines[count(l)].begin() + begin);
    }
  }
  out.pooled = rflow::report_of(sum, by);
  out.pooled.norms = std::move(norms);
  for (std::size_t l = 0; l < cosines.size(); ++l)
    out.pooled.adjacent[l].per_token = std::move(cosines[l]);
  return out;
}

template <class T>
chain_flow flow_of(layer_stack<T> const& stack, rflow::normalization by, bool per_token,
                   rflow::on_cpu const& on) {
  return flow_of_widths(stack, by, per_token, [&](layer_stack<T> const& run) {
    return flow_of_one_width(run, by, per_token, on);
  });
}

cka_grid part_of(rflow::cka_table const& table, std::ptrdiff_t row, std::ptrdiff_t rows,
                 std::ptrdiff_t col, std::ptrdiff_t cols) {
  cka_grid out{rows, cols, {}, {}};
  for (std::ptrdiff_t i = row; i < row + rows; ++i)
    for (std::ptrdiff_t j = col; j < col + cols; ++j) {
      out.value.push_back(table(i, j));
      out.chance.push_back(table.chance(i, j));
    }
  return out;
}

/// Rows and columns of both estimators' tables, with what is known of the rows' sites.
cka_result part_of(std::string const& kernel, rflow::cka_table const& debiased,
                   rflow::cka_table const& biased, std::ptrdiff_t row, std::ptrdiff_t rows,
                   std::ptrdiff_t col, std::ptrdiff_t cols,
                   std::function<std::ptrdiff_t(std::ptrdiff_t)> const& stored) {
  cka_result out;
  out.kernel = kernel;
  out.tokens = debiased.tokens();
  out.debiased = part_of(debiased, row, rows, col, cols);
  out.biased = part_of(biased, row, rows, col, cols);
  for (std::ptrdiff_t i = row; i < row + rows; ++i)
    for (std::ptrdiff_t j = col; j < col + cols; ++j)
      if (debiased.p_value(i, j).why != status::not_requested) {
        out.score.push_back(debiased.score(i, j));
        out.p_value.push_back(debiased.p_value(i, j));
        if (debiased.shift_p_value(i, j).why != status::not_requested)
          out.shift_p_value.push_back(debiased.shift_p_value(i, j));
      }
  for (std::ptrdiff_t i = row; i < row + rows; ++i) {
    out.sigma.push_back(debiased.sigma(i));
    out.top_share.push_back(debiased.top_token_share(i));
    std::ptrdiff_t const token = debiased.top_token(i);
    out.top_token.push_back(token < 0 ? -1 : stored(token));
  }
  return out;
}

/// Multiply-adds of the passes, for the progress bar.
struct cost {
  double flow = 0, gram = 0;

  cost(capture const& c, token_choice const& chosen) {
    double const n = static_cast<double>(chosen.used);
    double const d = static_cast<double>(c.sites.width());
    double const sites = static_cast<double>(c.sites.chain.size() + 1);
    flow = 10 * sites * n * d;
    gram = sites * n * n * (d + sites) / 2;
  }
};

/// Completes the groups of outliers, and says what they hold of the linear kernel matrices.
/// @param first  of the model's sites in the moments
void add_kernel_shares(capture const& c, rflow::gram_moments const& m, std::ptrdiff_t first,
                       model_result& model) {
  outlier_facts& o = *model.outliers;
  with_stack(c, model.tokens, false, [&](auto const& stack) {
    for (std::ptrdiff_t l = 0; l < stack.sites(); ++l) {
      auto const s = static_cast<std::size_t>(l);
      add_far_from_mean(o, s, model.flow.norms[s], m, first + l);
      o.kernel_share[s] = finite(kernel_share(stack, l, o.groups[s], m, first + l));
    }
    return 0;
  });
}

/// Adds the CKA tables of the captures to their models, or of both together, with what is between.
template <class Kernel>
void add_cka(char const* name, Kernel const& kernel, std::vector<capture> const& captures,
             bool together, rflow::on_cpu const& on, result& out) {
  constexpr bool linear = std::same_as<Kernel, rflow::linear>;
  auto const stored = [&](std::size_t k) {
    return [&chosen = out.models[k].tokens](std::ptrdiff_t token) {
      return chosen.stored_token(token);
    };
  };
  auto const sites = [&](std::size_t k) {
    return static_cast<std::ptrdiff_t>(out.models[k].cka_sites().size());
  };
  if (together) {
    rflow::gram_moments const m =
        with_stack(captures[0], out.models[0].tokens, true, [&](auto const& a) {
          return with_stack(captures[1], out.models[1].tokens, true,
                            [&](auto const& b) { return on.gram(kernel, a, b); });
        });
    auto const debiased = rflow::cka_matrix(m, rflow::debiased{});
    auto const biased = rflow::cka_matrix(m, rflow::biased{});
    std::ptrdiff_t const a = sites(0), b = sites(1);
    out.models[0].cka.push_back(part_of(name, debiased, biased, 0, a, 0, a, stored(0)));
    out.models[1].cka.push_back(part_of(name, debiased, biased, a, b, a, b, stored(1)));
    out.cross.push_back(part_of(name, debiased, biased, 0, a, a, b, stored(0)));
    if (linear) add_kernel_shares(captures[0], m, 0, out.models[0]);
    if (linear) add_kernel_shares(captures[1], m, a, out.models[1]);
    return;
  }
  for (std::size_t k = 0; k < captures.size(); ++k) {
    rflow::gram_moments const m =
        with_stack(captures[k], out.models[k].tokens, true,
                   [&](auto const& stack) { return on.gram(kernel, stack); });
    out.models[k].cka.push_back(cka_of(name, m, stored(k)));
    if (linear) add_kernel_shares(captures[k], m, 0, out.models[k]);
  }
}

/// First to last and adjacent sites of a chain of so many.
headline_cka headline_of(cka_grid const& g, std::ptrdiff_t sites) {
  headline_cka out{g.at(0, sites - 1), {}};
  for (std::ptrdiff_t l = 0; l + 1 < sites; ++l) out.adjacent.push_back(g.at(l, l + 1));
  return out;
}

headline headline_of(rflow::flow_report const& f, cka_result const& c) {
  return {f.tokens,
          f.inter_token,
          f.variance.st1,
          f.variance.st2,
          c.kernel,
          headline_of(c.debiased, f.sites),
          headline_of(c.biased, f.sites)};
}

/// Headline numbers with outlying tokens and without, where they hold much: another pass over the rest.
void compare_without_outliers(capture const& c, options const& asked, rflow::on_cpu on,
                              model_result& m) {
  outlier_facts& o = *m.outliers;
  choose_outliers(o);
  auto const n = static_cast<std::size_t>(m.flow.tokens);
  bool const few =
      static_cast<double>(o.tokens.size()) <= outlier_facts::most * static_cast<double>(n);
  if (!o.tokens.empty() && few && !m.cka.empty()) {
    on.significance = on.shifts = false;
    with_stack(c, m.tokens, false, [&](auto const& stack) {
      std::vector<bool> keep = m.tokens.mask();
      for (outlier const& x : o.tokens)
        keep[static_cast<std::size_t>(stack.token(x.token))] = false;
      auto const rest = stack.tokens(keep);
      chain_flow flow = flow_of(rest, asked.normalize, false, on);
      auto const nowhere = [](std::ptrdiff_t token) { return token; };
      cka_result cka =
          asked.linear
              ? cka_of("linear", on.gram(rflow::linear{}, rest), nowhere)
              : cka_of("rbf", on.gram(rflow::rbf{.fraction = asked.rbf_fraction}, rest), nowhere);
      require_finite(cka);
      o.without = headline_of(flow.pooled, cka);
      return 0;
    });
    o.with = headline_of(m.flow, m.cka.front());
    for (headline* const h : {&*o.with, &*o.without}) {
      h->st1 = finite(h->st1), h->st2 = finite(h->st2);
      for (measured& x : h->inter_token) x = finite(x);
    }
    o.matter = o.matter || changes_much(o);
  }
  for (outlier& x : o.tokens) x.token = m.tokens.stored_token(x.token);
}

/// Of files for all captures, or one for each: the one for capture k.
std::string file_of(std::vector<std::string> const& files, std::size_t k) {
  return files[files.size() > 1 ? k : 0];
}

/// Labels of the tokens that count, from the files for capture k.
probe_labels labels_of(std::vector<capture> const& captures, std::size_t k,
                       token_choice const& chosen, options const& asked) {
  capture const& c = captures[k];
  labelling const labels = read_labels(file_of(asked.labels, k), c, asked, role::classes);
  std::optional<labelling> groups;
  if (!asked.label_groups.empty())
    groups = read_labels(file_of(asked.label_groups, k), c, asked, role::groups);
  return labels_of(c.path, chosen, labels, groups ? &*groups : nullptr);
}

rflow::layer_probes probes_of(std::vector<capture> const& captures, std::size_t k,
                              token_choice const& chosen, probe_labels const& labels,
                              options const& asked, rflow::on_cpu const& on) {
  try {
    return with_stack(captures[k], chosen, true, [&](auto const& stack) {
      return rflow::probe_layers(stack.tokens(labels.mask), labels.label,
                                 training_of(asked, labels.group), on);
    });
  } catch (std::invalid_argument const& error) {
    bool const grouped = !asked.label_groups.empty();
    throw blame(error, labels, file_of(asked.labels, k),
                grouped ? file_of(asked.label_groups, k) : "");
  }
}

/// What both files say of their tokens and differs; empty if nothing does.
std::string difference(capture const& a, capture const& b) {
  if (!a.token_hash().empty() && !b.token_hash().empty() && a.token_hash() != b.token_hash())
    return "the token hashes differ";
  if (!a.token_ids.empty() && !b.token_ids.empty() && a.token_ids != b.token_ids)
    return "the token ids differ";
  return "";
}

/// Why the layers of two captures cannot be compared token by token; empty if they can.
std::string why_not_comparable(capture const& a, capture const& b, bool same_tokens) {
  std::string const counts = a.path + " holds " + plural(a.sites.tokens(), "token") + " and " +
                             b.path + " " + std::to_string(b.sites.tokens());
  bool const alike = a.sites.tokens() == b.sites.tokens();
  if (same_tokens) return alike ? "" : "not the same tokens: " + counts;
  bool const hashes = !a.token_hash().empty() && !b.token_hash().empty();
  if (std::string const what = difference(a, b); !what.empty())
    return what + ": the two models did not see the same tokens";
  if (hashes && !alike) return "the token hashes agree, but " + counts;
  if (hashes || (!a.token_ids.empty() && !b.token_ids.empty())) return "";
  for (capture const* c : {&a, &b})
    if (c->token_hash().empty() && c->token_ids.empty())
      return c->path + " does not say which tokens it saw (no token_hash in its metadata, no " +
             "token_ids)" + (alike ? "; if they are the same, --same-tokens says so" : "");
  return "one file has a token hash, the other token ids" +
         std::string(alike ? "; if the tokens are the same, --same-tokens says so" : "");
}

/// "embed, block.3 … block.30": names of sites, runs shortened.
std::string list_sites(std::vector<std::string> const& names,
                       std::vector<std::size_t> const& which) {
  std::string out;
  for (std::size_t i = 0; i < which.size();) {
    std::size_t end = i + 1;
    while (end < which.size() && which[end] == which[end - 1] + 1) ++end;
    if (end - i < 3) end = i + 1;
    out += (out.empty() ? "" : ", ") + names[which[i]];
    if (end - i >= 3) out += " … " + names[which[end - 1]];
    i = end;
  }
  return out;
}

/// One warning for each quantity and reason, with the sites that lack it. Sites with a NaN or
/// infinity have a warning of their own, which speaks for all that follows from it.
void note_missing(std::string const& quantity, std::vector<measured> const& values,
                  std::vector<std::string> const& names, std::vector<warning>& out) {
  std::vector<std::pair<status, std::vector<std::size_t>>> groups;
  for (std::size_t i = 0; i < values.size(); ++i) {
    status const why = values[i].why;
    if (why == status::ok || why == status::not_requested || why == status::non_finite) continue;
    auto group =
        std::find_if(groups.begin(), groups.end(), [&](auto const& g) { return g.first == why; });
    if (group == groups.end()) group = groups.insert(groups.end(), {why, {}});
    group->second.push_back(i);
  }
  for (auto const& [why, which] : groups)
    out.push_back({true, list_sites(names, which) + ": no " + quantity + ", " +
                             std::string(explain(why)) + " (" + std::string(to_string(why)) + ")"});
}

void note_non_finite(std::vector<rflow::position> const& at, std::vector<std::string> const& names,
                     std::vector<warning>& out) {
  for (std::size_t l = 0; l < at.size(); ++l)
    if (at[l].found())
      out.push_back({true, names[l] + ": NaN or infinity, first at token " +
                               std::to_string(at[l].token) + ", feature " +
                               std::to_string(at[l].feature) +
                               "; whatever this site takes part in has no answer (non_finite)"});
}

/// "3, 17, 40" of tokens, shortened.
std::string list_tokens(std::vector<outlier> const& tokens) {
  constexpr std::size_t most = 20;
  std::string out;
  for (std::size_t i = 0; i < std::min(tokens.size(), most); ++i)
    join(out, ", ", std::to_string(tokens[i].token));
  return out + (tokens.size() > most ? " …" : "");
}

/// The ranges of --tokens that leave some tokens out, besides what is left out already.
std::string ranges_without(std::vector<outlier> const& tokens, std::ptrdiff_t stored,
                           options const& asked) {
  std::vector<bool> keep(static_cast<std::size_t>(stored), asked.tokens.empty());
  for (auto const& [begin, end] : asked.tokens)
    std::fill(keep.begin() + begin, keep.begin() + std::min(end, stored), true);
  for (outlier const& x : tokens) keep[static_cast<std::size_t>(x.token)] = false;
  std::string out;
  for (auto at = keep.begin(); (at = std::find(at, keep.end(), true)) != keep.end();) {
    auto const end = std::find(at, keep.end(), false);
    std::ptrdiff_t const first = at - keep.begin(), last = end - keep.begin();
    join(out, ",", std::to_string(first) + (last - first > 1 ? ":" + std::to_string(last) : ""));
    at = end;
  }
  return out;
}

/// A group of tokens that decides headline numbers; of one token there is a note already.
void note_outliers(model_result const& m, options const& asked, std::vector<warning>& out) {
  if (!m.outliers || !m.outliers->matter || m.outliers->tokens.size() < 2) return;
  outlier_facts const& o = *m.outliers;
  double least = o.tokens.front().ratio, largest = least, share = 0;
  for (outlier const& x : o.tokens)
    least = std::min(least, x.ratio), largest = std::max(largest, x.ratio);
  bool const linear = asked.linear;
  for (std::size_t const l : o.sites)
    if (measured const s = linear ? o.kernel_share[l] : o.norm_share[l]; s.ok())
      share = std::max(share, s.value);
  std::string text =
      list_sites(m.sites, o.sites) + ": " + plural(std::ssize(o.tokens), "token") +
      " with norms of " + number(least) + " to " + number(largest) +
      " times the median make up as much as " + number(100 * share) +
      (linear ? " % of the linear kernel matrix" : " % of the sum of squared norms") + ": " +
      list_tokens(o.tokens);
  if (o.with && o.without) {
    headline_cka const& with = o.with->cka(asked.main_estimator);
    headline_cka const& without = o.without->cka(asked.main_estimator);
    text += "; " + o.with->kernel + " CKA of " + m.sites.front() + " to " + m.sites.back() +
            " is " + number(with.first_to_last) + " with them, " + number(without.first_to_last) +
            " without";
    // The neighbours that change most speak for all.
    double largest_change = 0;
    std::size_t which = with.adjacent.size();
    for (std::size_t l = 0; l < with.adjacent.size(); ++l)
      if (measured const x = with.adjacent[l], y = without.adjacent[l];
          x.ok() && y.ok() && std::abs(x.value - y.value) > largest_change) {
        largest_change = std::abs(x.value - y.value);
        which = l;
      }
    if (which < with.adjacent.size() && with.adjacent.size() > 1)
      text += ", of " + m.sites[which] + " to " + m.sites[which + 1] + " " +
              number(with.adjacent[which]) + " and " + number(without.adjacent[which]);
  }
  constexpr std::size_t most_ranges = 20;
  if (o.tokens.size() <= most_ranges)
    text += "; --tokens " + ranges_without(o.tokens, m.tokens.stored, asked) +
            " leaves them out of everything";
  out.push_back({false, std::move(text)});
}

/// Names of what lies between neighbouring sites.
std::vector<std::string> pairs_of(std::vector<std::string> const& names, std::size_t count) {
  std::vector<std::string> out;
  for (std::size_t l = 0; l < count; ++l) out.push_back(names[l] + " → " + names[l + 1]);
  return out;
}

}  // namespace

rflow::probe_options training_of(options const& asked, std::vector<std::int64_t> groups) {
  return {.epochs = asked.probe_epochs,
          .seeds = asked.probe_seeds,
          .groups = std::move(groups),
          .standardize = asked.probe_standardize};
}

cka_result cka_of(std::string const& kernel, rflow::gram_moments const& m,
                  std::function<std::ptrdiff_t(std::ptrdiff_t)> const& stored) {
  return part_of(kernel, rflow::cka_matrix(m, rflow::debiased{}),
                 rflow::cka_matrix(m, rflow::biased{}), 0, m.sites, 0, m.sites, stored);
}

measured finite(measured x) {
  return x.ok() && !std::isfinite(x.value) ? measured(status::out_of_range) : x;
}

void require_finite(model_result& m) {
  auto const one = [](measured& x) { x = finite(x); };
  auto const all = [&](std::vector<measured>& xs) { std::for_each(xs.begin(), xs.end(), one); };
  rflow::layer_variance& v = m.flow.variance;
  for (measured* const x :
       {&v.st1, &v.st2, &v.path_energy, &v.path_length, &v.factor, &m.final_inter_token})
    one(*x);
  for (auto* const xs : {&v.steps, &v.curvature, &m.flow.inter_token, &m.flow.rms_norm}) all(*xs);
  for (rflow::adjacent_cosines& pair : m.flow.adjacent) {
    one(pair.mean), one(pair.stddev);
    double const missing = std::numeric_limits<double>::quiet_NaN();
    for (double& x : pair.per_token)
      if (!pair.mean.ok() || !std::isfinite(x)) x = missing;
  }
  for (cka_result& c : m.cka) require_finite(c);
  if (!m.probes) return;
  one(m.probes->chance), one(m.probes->drop);
  for (rflow::probe_result& p : m.probes->layers)
    for (rflow::over_seeds* const x : {&p.train_loss, &p.validation_loss, &p.train_accuracy,
                                       &p.validation_accuracy, &p.mean_distance})
      one(x->mean), one(x->spread);
}

void require_finite(cka_result& c) {
  for (auto* const xs : {&c.debiased.value, &c.debiased.chance, &c.biased.value, &c.biased.chance,
                         &c.sigma, &c.top_share, &c.score, &c.p_value})
    for (measured& x : *xs) x = finite(x);
}

void add_warnings(model_result& m, rflow::flow_report const& final_norm, options const& asked) {
  std::vector<std::string> const all = m.cka_sites();
  std::vector<warning>& out = m.warnings;
  rflow::flow_report const& f = m.flow;

  std::vector<rflow::position> non_finite = f.non_finite;
  std::vector<measured> inter_token = f.inter_token;
  std::vector<std::ptrdiff_t> zero_rows = f.zero_rows;
  if (m.has_final_norm()) {
    non_finite.push_back(final_norm.non_finite[0]);
    inter_token.push_back(final_norm.inter_token[0]);
    zero_rows.push_back(final_norm.zero_rows[0]);
  }
  for (std::string const& note : m.tokens.notes) out.push_back({false, note});
  note_non_finite(non_finite, all, out);
  note_missing("inter-token cosine", inter_token, all, out);

  std::vector<measured> adjacent;
  for (auto const& pair : f.adjacent) adjacent.push_back(pair.mean);
  note_missing("adjacent cosine", adjacent, pairs_of(m.sites, adjacent.size()), out);
  note_missing("step", f.variance.steps, pairs_of(m.sites, f.variance.steps.size()), out);
  std::vector<std::string> turns(m.sites.begin() + std::min<std::ptrdiff_t>(1, m.steps()),
                                 m.sites.end());
  note_missing("curvature", f.variance.curvature, turns, out);
  note_missing("St1", {f.variance.st1}, {"the chain"}, out);
  note_missing("St2", {f.variance.st2}, {"the chain"}, out);

  for (cka_result const& cka : m.cka)
    for (estimator const e : {estimator::debiased, estimator::biased}) {
      std::vector<measured> self;
      for (std::ptrdiff_t i = 0; i < cka.grid(e).rows; ++i) self.push_back(cka.grid(e).at(i, i));
      note_missing(cka.kernel + " CKA (" + std::string(to_string(e)) + ")", self, all, out);
    }

  if (m.probes) {
    std::vector<measured> accuracy;
    for (std::ptrdiff_t l = 0; l < static_cast<std::ptrdiff_t>(all.size()); ++l)
      accuracy.push_back(m.probes->accuracy(l).mean);
    note_missing("probe accuracy", accuracy, all, out);
    // Whole groups rarely come to the number asked for; a tenth less is still a share.
    std::ptrdiff_t const wanted = m.probes->validation_asked, there = m.probes->validation_tokens;
    if (10 * there < 9 * wanted)
      out.push_back(
          {false, "probes are validated on " + plural(there, "token") + " where " +
                      std::to_string(wanted) +
                      " were asked for: of each class one is always trained on, and groups "
                      "are kept whole"});
  }

  std::map<std::ptrdiff_t, std::vector<std::size_t>> with_zeros;  // sites with as many of them
  for (std::size_t l = 0; l < all.size(); ++l)
    if (zero_rows[l] > 0) with_zeros[zero_rows[l]].push_back(l);
  for (auto const& [count, which] : with_zeros)
    out.push_back({false, list_sites(all, which) + ": " + plural(count, "token") +
                              " of zeros, left out of the cosines; St1, St2 and CKA count them." +
                              (count < f.tokens ? " If they are padding, a mask (--mask) leaves "
                                                  "them out of everything"
                                                : "")});

  // Advice: one token that decides everything.
  struct rule {
    std::vector<std::size_t> sites;
    double largest = 0;
  };
  std::map<std::ptrdiff_t, rule> rules;
  constexpr std::ptrdiff_t few = 8;  // with fewer tokens each of them is a large share
  if (!m.cka.empty() && m.cka.front().kernel == "linear" && f.tokens >= few)
    for (std::size_t l = 0; l < all.size(); ++l)
      if (measured const share = m.cka.front().top_share[l]; share.ok() && share.value > 0.5) {
        rule& r = rules[m.cka.front().top_token[l]];
        r.sites.push_back(l);
        r.largest = std::max(r.largest, share.value);
      }
  for (auto const& [token, r] : rules) {
    // Following it has to leave out that token and nothing that is measured besides.
    bool const first = m.tokens.begins_sequence(token) && asked.tokens.empty();
    std::string const advice = first ? ". It may be an attention sink: compare with --skip-first " +
                                           std::to_string(asked.skip_first + 1)
                                     : "";
    out.push_back({false, list_sites(all, r.sites) + ": token " + std::to_string(token) +
                              " makes up more than half of the linear kernel matrix (up to " +
                              number(100 * r.largest) +
                              " %), so linear CKA there, and perhaps St1 " +
                              "and St2, speak of that token" + advice});
  }
  note_outliers(m, asked, out);
}

result measure(std::vector<capture> const& captures, options const& asked, progress const& tell) {
  rflow::on_cpu on{
      .threads = asked.threads, .significance = asked.significance, .shifts = asked.shifts};
  if (asked.shifts) {  // of cross tables: the sites of both models
    double n = 0, sites = 0;
    for (capture const& c : captures) {
      n = std::max(n, static_cast<double>(c.sites.tokens()));
      sites += static_cast<double>(c.sites.chain.size() + 1);
    }
    on.memory_bound += static_cast<std::size_t>(2 * n * n * (sites + 6) +
                                                16 * n * sites * (sites + 1) + 8 * 1024 * n);
  }
  result out;
  bool together = false;
  if (captures.size() == 2) {
    out.why_no_cross = why_not_comparable(captures[0], captures[1], asked.same_tokens);
    together = out.why_no_cross.empty();
    if (asked.cross_cka && !together)
      throw unusable(captures[0].path + ", " + captures[1].path,
                     "--cross-cka: " + out.why_no_cross);
  }

  std::vector<token_choice> chosen;
  for (capture const& c : captures) chosen.push_back(choose_tokens(c, asked));
  if (together && !chosen[0].same_tokens(chosen[1])) {
    together = false;
    out.why_no_cross =
        "masks leave out other tokens of " + captures[0].path + " than of " + captures[1].path;
    if (asked.cross_cka)
      throw unusable(captures[0].path + ", " + captures[1].path,
                     "--cross-cka: " + out.why_no_cross);
  }

  double needed = 0;
  for (capture const& c : captures) {
    double const sites = static_cast<double>(c.sites.chain.size() + 1);
    double const n = static_cast<double>(c.sites.tokens());
    // Between two models there are as many cells as in both of them.
    needed += (together ? 2 : 1) * bytes_of_tables(sites, asked) + 40 * sites * n;
  }
  require_memory(captures.front().path, needed + 32e6, asked);

  double total = 0, done = 0;
  int const kernels = (asked.linear ? 1 : 0) + (asked.rbf ? 1 : 0);
  double gram = 0;
  for (std::size_t k = 0; k < captures.size(); ++k) {
    cost const work(captures[k], chosen[k]);
    total += work.flow + kernels * work.gram;
    gram += work.gram;
  }
  // Read before anything that takes long: what is wrong with them is known at once.
  std::vector<probe_labels> labels;
  std::vector<double> probes;  // cost
  for (std::size_t k = 0; k < captures.size() && !asked.labels.empty(); ++k) {
    labels.push_back(labels_of(captures, k, chosen[k], asked));
    require_memory(file_of(asked.labels, k),
                   bytes_of_probes(labels.back(), captures[k].sites.chain.size() + 1,
                                   captures[k].sites.width(), asked, on.thread_count()),
                   asked);
    double const columns = static_cast<double>(labels.back().names.size()) * asked.probe_seeds;
    probes.push_back(2 * columns * asked.probe_epochs * cost(captures[k], chosen[k]).flow / 10);
    total += probes.back();
  }
  tell(0, total);

  std::vector<rflow::flow_report> final_norms;
  for (std::size_t k = 0; k < captures.size(); ++k) {
    capture const& c = captures[k];
    model_result m;
    m.path = c.path;
    m.label = c.label;
    m.dtype = to_string(c.sites.type());
    m.token_hash = c.token_hash();
    m.metadata = c.metadata;
    m.sites = c.sites.names();
    m.positions = c.positions();
    m.embedding = c.sites.layer(0) == 0;
    for (std::string const& note : c.notes) m.warnings.push_back({false, note});
    if (std::string const what = k == 1 ? difference(captures[0], c) : "";
        together && asked.same_tokens && !what.empty())
      m.warnings.push_back({false, what + "; compared on the word of --same-tokens"});
    m.tokens = chosen[k];
    chain_flow flow = with_stack(c, m.tokens, false, [&](auto const& stack) {
      return flow_of(stack, asked.normalize, true, on);
    });
    m.flow = std::move(flow.pooled);
    m.per_sequence = std::move(flow.per_sequence);
    m.outliers = find_outliers(m.flow.norms);
    final_norms.emplace_back();
    if (c.sites.final_norm) {
      m.final_norm_name = c.sites.final_norm->name;
      rflow::site_set alone;
      alone.chain.push_back(*c.sites.final_norm);
      capture const last{c.path, c.label, {}, {}, std::move(alone)};
      final_norms.back() = with_stack(last, m.tokens, false, [&](auto const& stack) {
        return flow_of(stack, rflow::normalization::none, false, on).pooled;
      });
      m.final_inter_token = final_norms.back().inter_token[0];
    }
    out.models.push_back(std::move(m));
    tell(done += cost(c, chosen[k]).flow, total);
  }

  if (asked.linear) {
    add_cka("linear", rflow::linear{}, captures, together, on, out);
    tell(done += gram, total);
  }
  if (asked.rbf) {
    add_cka("rbf", rflow::rbf{.fraction = asked.rbf_fraction}, captures, together, on, out);
    tell(done += gram, total);
  }

  for (std::size_t k = 0; k < labels.size(); ++k) {
    model_result& m = out.models[k];
    m.probes = probes_of(captures, k, chosen[k], labels[k], asked, on);
    m.classes =
        probe_classes{labels[k].from, labels[k].names, labels[k].tokens, labels[k].left_out};
    for (std::string const& text : labels[k].notes) m.warnings.push_back({false, text});
    tell(done += probes[k], total);
  }

  for (std::size_t k = 0; k < captures.size(); ++k)
    compare_without_outliers(captures[k], asked, on, out.models[k]);
  for (model_result& m : out.models) require_finite(m);
  for (cka_result& c : out.cross) require_finite(c);
  for (std::size_t k = 0; k < out.models.size(); ++k)
    add_warnings(out.models[k], final_norms[k], asked);
  find_order(out);
  return out;
}

void find_order(result& of) {
  if (of.models.size() != 2) return;
  rflow::flow_report const &a = of.models[0].flow, &b = of.models[1].flow;
  if (a.variance.path_energy.ok() && b.variance.path_energy.ok())
    of.order = rflow::order(a.variance.path_energy, a.sites, b.variance.path_energy, b.sites);
}

}  // namespace report
