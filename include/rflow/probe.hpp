// SPDX-License-Identifier: Apache-2.0
#pragma once

// Softmax probes: how much of a label can be read off each layer by a linear map? Accuracy on held-out
// tokens says where information is linearly accessible; it does not say that the model uses it, and a
// probe with many features and few tokens finds patterns in anything, so compare with `chance` and
// with probes on shuffled labels.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include <rflow/backend.hpp>
#include <rflow/default.hpp>
#include <rflow/detail/probe_plan.hpp>
#include <rflow/moments.hpp>
#include <rflow/probe_options.hpp>
#include <rflow/probe_result.hpp>
#include <rflow/softmax_problem.hpp>
#include <rflow/view.hpp>

namespace rflow {

namespace detail {

inline measured ratio(double sum, double count, status missing) {
  if (!(count > 0)) return missing;
  return is_finite(sum) ? measured(sum / count) : measured(status::diverged);
}

inline over_seeds summary(std::vector<measured> const& values) {
  over_seeds out;
  double largest = 0;
  for (measured const& x : values) {
    if (!x.ok()) return {x.why, x.why};
    largest = (std::max)(largest, std::abs(x.value));
  }
  // By a power of two, so that no square leaves the range of double.
  int const exponent = largest > 0 ? std::ilogb(largest) : 0;
  running_stat stat;
  for (measured const& x : values) stat.add(std::ldexp(x.value, -exponent));
  out.mean = std::ldexp(stat.mean, exponent);
  out.spread = status::too_few_rows;
  if (stat.count > 1) {
    double const spread = std::ldexp(std::sqrt(stat.m2 / (stat.count - 1)), exponent);
    out.spread = is_finite(spread) ? measured(spread) : measured(status::out_of_range);
  }
  return out;
}

inline void note_epoch(softmax_sums const& sums, status unvalidated, probe_result& out) {
  for (std::size_t p = 0; p < out.seeds.size(); ++p) {
    probe_seed& seed = out.seeds[p];
    auto const add = [&](std::size_t part, std::vector<measured>& loss,
                         std::vector<measured>& accuracy) {
      loss.push_back(ratio(sums.loss[part][p], sums.count[part][p], unvalidated));
      // Where a logit is not finite, which one is largest means nothing.
      accuracy.push_back(loss.back().why == status::diverged
                             ? loss.back()
                             : ratio(sums.correct[part][p], sums.count[part][p], unvalidated));
    };
    add(0, seed.train_loss, seed.train_accuracy);
    add(1, seed.validation_loss, seed.validation_accuracy);
  }
}

inline void note_predictions(softmax_problem const& problem, std::ptrdiff_t p,
                             std::int32_t const* found, status unvalidated, probe_seed& seed) {
  auto const classes = static_cast<std::size_t>(problem.classes);
  seed.confusion.assign(classes * classes, 0);
  double distance = 0, count = 0;
  for (std::size_t i = 0; i < problem.labels.size(); ++i) {
    if (problem.part(p, static_cast<std::ptrdiff_t>(i)) != softmax_problem::validate) continue;
    ++seed.confusion[static_cast<std::size_t>(problem.labels[i]) * classes +
                     static_cast<std::size_t>(found[i])];
    distance += std::abs(found[i] - problem.labels[i]);
    count += 1;
  }
  bool const diverged = seed.validation_loss.back().why == status::diverged;
  if (diverged) seed.confusion.assign(classes * classes, 0);
  seed.mean_distance = diverged ? measured(status::diverged) : ratio(distance, count, unvalidated);
  for (std::size_t c = 0; c < classes; ++c) {
    auto const row = seed.confusion.begin() + static_cast<std::ptrdiff_t>(c * classes);
    auto const all =
        std::accumulate(row, row + static_cast<std::ptrdiff_t>(classes), std::ptrdiff_t{0});
    seed.class_accuracy.push_back(
        diverged ? measured(status::diverged)
                 : ratio(static_cast<double>(seed.confusion[c * classes + c]),
                         static_cast<double>(all), count > 0 ? status::too_few_rows : unvalidated));
  }
}

/// Trains all seeds of one site.
template <class Regression>
probe_result run_probe(probe_plan const& plan, probe_options const& options, std::ptrdiff_t width,
                       bool keep_weights, Regression& regression) {
  probe_result out;
  out.why = regression.why();
  out.non_finite = regression.non_finite();
  out.classes = plan.problem.classes;
  out.tokens = plan.tokens();
  out.width = width;
  out.chance = plan.chance();
  out.validation_asked = plan.validation_asked();
  if (out.why != status::ok) {
    for (over_seeds* s : {&out.train_loss, &out.validation_loss, &out.train_accuracy,
                          &out.validation_accuracy, &out.mean_distance})
      *s = {out.why, out.why};
    return out;
  }
  status const unvalidated = plan.validates() ? status::too_few_rows : status::not_requested;
  out.seeds.resize(static_cast<std::size_t>(options.seeds));
  regression.load(plan.initial(width, regression.mean(), regression.deviation()));
  adam const by{options.learning_rate, options.beta1, options.beta2, options.epsilon,
                options.weight_decay};
  for (int e = 0; e < options.epochs; ++e) note_epoch(regression.step(by), unvalidated, out);
  note_epoch(regression.evaluate(), unvalidated, out);

  softmax_weights w;
  if (keep_weights) regression.store(w);
  std::vector<measured> train_loss, validation_loss, train_accuracy, validation_accuracy, distance;
  for (std::size_t p = 0; p < out.seeds.size(); ++p) {
    probe_seed& seed = out.seeds[p];
    auto const problem = static_cast<std::ptrdiff_t>(p);
    seed.training_tokens = plan.count(problem, softmax_problem::train);
    seed.validation_tokens = plan.count(problem, softmax_problem::validate);
    note_predictions(plan.problem, problem,
                     regression.predictions().data() + problem * plan.tokens(), unvalidated, seed);
    if (keep_weights)
      plan.give_weights(w, problem, width, regression.mean(), regression.deviation(), seed);
    train_loss.push_back(seed.train_loss.back());
    validation_loss.push_back(seed.validation_loss.back());
    train_accuracy.push_back(seed.train_accuracy.back());
    validation_accuracy.push_back(seed.validation_accuracy.back());
    distance.push_back(seed.mean_distance);
  }
  out.train_loss = summary(train_loss);
  out.validation_loss = summary(validation_loss);
  out.train_accuracy = summary(train_accuracy);
  out.validation_accuracy = summary(validation_accuracy);
  out.mean_distance = summary(distance);
  return out;
}

}  // namespace detail

// ---- the probes ---------------------------------------------------------------------------------

namespace detail {

/// @param stacks  what the backend reads: one, or several with the sites of `first`
/// @param tokens  of them: all_tokens(), size(), token(i)
template <class Stacks, class First, class Tokens, class Labels, class On>
layer_probes probe_sites(char const* where, Stacks const& stacks, First const& first,
                         Tokens const& tokens, Labels const& labels, probe_options const& options,
                         On const& on) {
  probe_plan const plan(where, tokens, labels, options);
  for (std::ptrdiff_t l = 0; l < first.sites(); ++l) plan.check_given(first[l].cols);
  layer_probes out;
  out.chance = plan.chance();
  out.validation_asked = plan.validation_asked();
  out.validation_tokens = plan.validation_tokens();
  out.layers.resize(static_cast<std::size_t>(first.sites()));
  on.softmax(stacks, plan.problem, [&](std::ptrdiff_t l, auto& regression) {
    out.layers[static_cast<std::size_t>(l)] =
        run_probe(plan, options, first[l].cols, options.keep_weights, regression);
  });
  for (std::ptrdiff_t l = 0; l < first.sites(); ++l) {
    position& at = out.layers[static_cast<std::size_t>(l)].non_finite;
    if (at.found()) at.token = tokens.token(at.token);
    out.names.push_back(first.name(l));
    measured const here = out.accuracy(l).mean;
    if (here.ok() && (out.best < 0 || here > out.accuracy(out.best).mean)) out.best = l;
  }
  measured const last = out.accuracy(first.sites() - 1).mean;
  if (out.best >= 0 && last.ok())
    out.drop = out.accuracy(out.best).mean - last;
  else
    out.drop = out.best < 0 ? out.accuracy(0).mean.why : last.why;
  return out;
}

}  // namespace detail

/// Softmax regression with bias from activations to labels, for several seeds at once.
///
///     min over W, b of −Σ_i log softmax(W x_i + b)[y_i] / n     full batch, Adam
///
/// @param  x        n × d activations, tokens in rows
/// @param  labels   n integers in [0, classes)
/// @param  options  split, seeds, epochs, learning rate, standardisation, initial weights
/// @param  on       where to run; by default where x lives
/// @return curves, accuracies, confusion and weights of each seed, means and spreads over seeds.
///         Activations constant over what is trained on: status constant_layer. A run whose logits leave the range of numbers:
///         status diverged. Without validation: its fields have status not_requested
/// @throws std::invalid_argument if labels are out of range or of another number than tokens, a class
///         has no token to train on, there are fewer than 2 classes or more than tokens, or the
///         options contradict themselves or are not finite; std::domain_error on NaN or infinity in x
/// @note   4·n·d·classes·seeds operations an epoch. Beyond x: 3·d + n values per class and seed.
///         Products and weights in fp32 (fp64 for double), sums over tokens in fp64
/// @see    Alain, Bengio, "Understanding intermediate layers using linear classifier probes", 2016
template <class X, class Labels, class On = default_backend_t<memory_of<X>>>
probe_result probe(X const& x, Labels const& labels, probe_options const& options = {},
                   On const& on = {}) {
  static_assert(softmax_backend_for<On, memory_of<X>>,
                "rflow: this backend cannot read where the activations live, or has no probes");
  constexpr char const* where = "rflow::probe";
  auto const v = as_view(x);
  detail::require_shape(where, v);
  layer_stack const stack{v};
  detail::probe_plan const plan(where, stack, labels, options);
  plan.check_given(v.cols);
  probe_result out;
  on.softmax(stack, plan.problem, [&](std::ptrdiff_t, auto& regression) {
    out = detail::run_probe(plan, options, v.cols, true, regression);
  });
  if (out.non_finite.found()) detail::throw_non_finite(where, "x", out.non_finite);
  return out;
}

/// Probes of every site of a stack.
///
/// @param  stack    S sites of n × d activations; widths may differ. Masked tokens take no part
/// @param  labels   one integer a token of the views, masked ones included (theirs are not looked at)
/// @param  options  as for probe(); keep_weights keeps classes · d weights a seed and site
/// @param  on       where to run; by default where the stack lives
/// @return a probe_result a site, all with the same splits and seeds; the best site, and how much of
///         its accuracy the last site has lost. A site without an answer (constant, not finite) has
///         its status, the rest stays right
/// @throws std::invalid_argument as probe()
/// @note   S times the cost of probe(); small sites run side by side
template <class T, class Memory, class Labels, class On = default_backend_t<Memory>>
layer_probes probe_layers(layer_stack<T, Memory> const& stack, Labels const& labels,
                          probe_options const& options = {}, On const& on = {}) {
  static_assert(softmax_backend_for<On, Memory>,
                "rflow: this backend cannot read where the stack lives, or has no probes");
  return detail::probe_sites("rflow::probe_layers", stack, stack, stack, labels, options, on);
}

/// The same for tokens in several stacks, one after the other: files too large for one. Splits are
/// over the tokens of all stacks.
///
/// @param  labels  one integer a token of all stacks
/// @throws std::invalid_argument also if there are no stacks, or they differ in sites or widths
template <class T, class Memory, class Labels, class On = default_backend_t<Memory>>
layer_probes probe_layers(std::vector<layer_stack<T, Memory>> const& stacks, Labels const& labels,
                          probe_options const& options = {}, On const& on = {}) requires requires {
  on.softmax(stacks, softmax_problem{}, detail::any_visit{});
}  // on_cpu does
{
  if (stacks.empty()) detail::reject("rflow::probe_layers", "no stacks");
  return detail::probe_sites("rflow::probe_layers", stacks, stacks.front(),
                             detail::joined_tokens(stacks), labels, options, on);
}

template <detail::no_stack X, class... More>
layer_probes probe_layers(X const&, More const&...) {
  static_cast<void>(sizeof(detail::refuse_stackless<X>));
  return {};
}

}  // namespace rflow
