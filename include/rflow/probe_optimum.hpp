// SPDX-License-Identifier: Apache-2.0
#pragma once

// How far a trained probe is from the best linear map: continues it with L-BFGS to the minimum of its
// training loss plus a small ridge. A fixed number of epochs may stop anywhere short of that; the
// gap in loss says how far, the gap in accuracy whether it matters. Needs LBFGS++.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include <LBFGS.h>

#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/probe.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// How the optimum is looked for.
struct optimum_options {
  double ridge = 1e-3;  ///< λ of λ/2 ‖W‖², biases left out; on standardised features if they are.
                        ///< scikit-learn's C is 1/(λ n)
  double tolerance = 1e-6;    ///< on the norm of the gradient, all seeds together
  int max_iterations = 2000;  ///< of L-BFGS
};

/// The optimum of one seed's training loss plus ridge, and what its tokens say there.
struct seed_optimum {
  measured objective;            ///< mean training loss + ridge
  measured train_loss;           ///< without the ridge
  measured validation_loss;      ///< likewise
  measured train_accuracy;       ///< in [0, 1]
  measured validation_accuracy;  ///< in [0, 1]
  std::vector<double> weight;    ///< classes × d, for features as given
  std::vector<double> bias;      ///< classes
};

/// A probe beside its optimum.
struct probe_optimum {
  status why = status::ok;          ///< why nothing has a value, or ok
  std::vector<seed_optimum> seeds;  ///< each by itself
  bool converged = false;           ///< to the tolerance
  int evaluations = 0;              ///< of loss and gradient
  measured gradient_norm;           ///< where it ended; out_of_range above the largest double
  /// Loss + ridge of the probe less the optimum's: the distance, at least 0 to the rounding of the
  /// probe's loss.
  over_seeds objective_gap;
  over_seeds loss_gap;  ///< the same without the ridge; below 0 where the ridge holds it back
  over_seeds train_accuracy_gap;       ///< the optimum's less the probe's
  over_seeds validation_accuracy_gap;  ///< likewise
};

namespace detail {

/// Σ over problems of mean training loss + λ/2 ‖W‖², for LBFGS++. Keeps the best point it has seen:
/// a line search that gives up may leave a worse one.
template <class Regression>
class penalised_loss {
 public:
  using vector = Eigen::VectorXd;

  penalised_loss(Regression& regression, double ridge) : regression_(regression), ridge_(ridge) {}

  double operator()(vector const& x, vector& gradient) {
    unpack(x, at_);
    regression_.load(at_);
    softmax_sums const sums = regression_.gradient(slope_);
    double loss = 0;
    for (std::size_t p = 0; p < sums.loss[0].size(); ++p)
      loss += sums.loss[0][p] / sums.count[0][p];
    double squares = 0;
    for (std::size_t i = 0; i < at_.values.size(); ++i) {
      squares += at_.values[i] * at_.values[i];
      slope_.values[i] += ridge_ * at_.values[i];
    }
    loss += ridge_ / 2 * squares;
    pack(slope_, gradient);
    ++evaluations;
    if (evaluations == 1 || loss < best_loss) {
      best_loss = loss;
      best = x;
      gradient_norm = gradient.stableNorm();
    }
    return loss;
  }

  static void pack(softmax_weights const& from, vector& to) {
    auto const values = static_cast<Eigen::Index>(from.values.size());
    to.resize(values + static_cast<Eigen::Index>(from.bias.size()));
    std::copy(from.values.begin(), from.values.end(), to.data());
    std::copy(from.bias.begin(), from.bias.end(), to.data() + values);
  }
  void unpack(vector const& from, softmax_weights& to) const {
    auto const values = static_cast<std::ptrdiff_t>(to.values.size());
    std::copy(from.data(), from.data() + values, to.values.begin());
    std::copy(from.data() + values, from.data() + from.size(), to.bias.begin());
  }
  void start(softmax_weights w, vector& x) {
    at_ = std::move(w);
    pack(at_, x);
  }
  softmax_weights const& at(vector const& x) {
    unpack(x, at_);
    return at_;
  }

  vector best;
  double best_loss = 0, gradient_norm = 0;
  int evaluations = 0;

 private:
  Regression& regression_;
  double ridge_;
  softmax_weights at_, slope_;
};

/// Weights of a probe's seeds, as each seed sees the features.
inline softmax_weights weights_of(probe_plan const& plan, probe_result const& found,
                                  std::vector<double> const& mean,
                                  std::vector<double> const& deviation) {
  softmax_weights w;
  for (std::size_t p = 0; p < found.seeds.size(); ++p)
    plan.see_weights(found.seeds[p].weight, found.seeds[p].bias, static_cast<std::ptrdiff_t>(p),
                     found.width, mean, deviation, w);
  return w;
}

template <class Regression>
probe_optimum find_optimum(probe_plan const& plan, probe_result const& found,
                           optimum_options const& by, Regression& regression) {
  probe_optimum out;
  out.why = regression.why();
  if (out.why == status::ok && !found.train_loss.mean.ok()) out.why = found.train_loss.mean.why;
  if (out.why != status::ok) {
    for (over_seeds* s :
         {&out.objective_gap, &out.loss_gap, &out.train_accuracy_gap, &out.validation_accuracy_gap})
      *s = {out.why, out.why};
    return out;
  }
  LBFGSpp::LBFGSParam<double> parameters;
  parameters.epsilon = by.tolerance;
  parameters.epsilon_rel = 0;
  parameters.max_iterations = by.max_iterations;
  parameters.max_linesearch = 60;
  LBFGSpp::LBFGSSolver<double, LBFGSpp::LineSearchBracketing> solver(parameters);
  penalised_loss<Regression> loss(regression, by.ridge);
  Eigen::VectorXd x;
  softmax_weights const first = weights_of(plan, found, regression.mean(), regression.deviation());
  loss.start(first, x);
  double value = 0;
  try {
    solver.minimize(loss, x, value);
  } catch (std::exception const&) {
    // The line search sees no more descent: the end of the road, or of the numbers' precision.
  }
  softmax_weights const& w = loss.at(loss.best);
  regression.load(w);
  softmax_sums const sums = regression.evaluate();
  out.evaluations = loss.evaluations;
  out.gradient_norm =
      is_finite(loss.gradient_norm) ? measured(loss.gradient_norm) : measured(status::out_of_range);
  out.converged = loss.gradient_norm <= by.tolerance;

  status const unvalidated = plan.validates() ? status::too_few_rows : status::not_requested;
  std::vector<measured> objective_gap, loss_gap, train_gap, validation_gap;
  auto const less = [](measured const& a, measured const& b) {
    return a.ok() && b.ok() ? measured(a.value - b.value) : a.ok() ? b : a;
  };
  for (std::size_t p = 0; p < found.seeds.size(); ++p) {
    auto const problem = static_cast<std::ptrdiff_t>(p);
    probe_seed seed;
    plan.give_weights(w, problem, found.width, regression.mean(), regression.deviation(), seed);
    seed_optimum here;
    auto const mean = [&](std::vector<double> const* sum, std::size_t part) {
      return ratio(sum[part][p], sums.count[part][p], unvalidated);
    };
    here.train_loss = mean(sums.loss, 0);
    here.validation_loss = mean(sums.loss, 1);
    here.train_accuracy = mean(sums.correct, 0);
    here.validation_accuracy = mean(sums.correct, 1);
    auto const penalised = [&](measured loss_of, softmax_weights const& at) {
      std::size_t const values = seed.weight.size();
      double squares = 0;
      for (std::size_t i = 0; i < values; ++i)
        squares += at.values[p * values + i] * at.values[p * values + i];
      double const objective = loss_of.value + by.ridge / 2 * squares;
      return !loss_of.ok()          ? loss_of
             : is_finite(objective) ? measured(objective)
                                    : measured(status::out_of_range);
    };
    here.objective = penalised(here.train_loss, w);
    objective_gap.push_back(
        less(penalised(found.seeds[p].train_loss.back(), first), here.objective));
    here.weight = std::move(seed.weight);
    here.bias = std::move(seed.bias);
    loss_gap.push_back(less(found.seeds[p].train_loss.back(), here.train_loss));
    train_gap.push_back(less(here.train_accuracy, found.seeds[p].train_accuracy.back()));
    validation_gap.push_back(
        less(here.validation_accuracy, found.seeds[p].validation_accuracy.back()));
    out.seeds.push_back(std::move(here));
  }
  out.objective_gap = summary(objective_gap);
  out.loss_gap = summary(loss_gap);
  out.train_accuracy_gap = summary(train_gap);
  out.validation_accuracy_gap = summary(validation_gap);
  return out;
}

inline void check_found(char const* where, probe_plan const& plan, std::ptrdiff_t width,
                        probe_result const& found) {
  if (found.why != status::ok) return;
  bool fits = found.classes == plan.problem.classes && found.width == width &&
              static_cast<std::ptrdiff_t>(found.seeds.size()) == plan.problem.problems;
  for (probe_seed const& seed : found.seeds)
    fits = fits && static_cast<std::ptrdiff_t>(seed.weight.size()) == found.classes * width;
  if (!fits)
    reject(where, "the probe has " + std::to_string(found.seeds.size()) + " seeds, " +
                      std::to_string(found.classes) + " classes x " + std::to_string(found.width) +
                      " features" +
                      (found.seeds.empty() || found.seeds[0].weight.empty()
                           ? " and no weights (keep_weights)"
                           : "") +
                      ", the options and activations say " + std::to_string(plan.problem.problems) +
                      ", " + std::to_string(plan.problem.classes) + " x " + std::to_string(width));
}

}  // namespace detail

/// Continues the probes of a stack to their optima, in double.
///
/// @param  stack, labels, options  as given to probe_layers(), with keep_weights
/// @param  found                   what it returned
/// @param  by                      ridge, tolerance
/// @return for each site the optimum of each seed and the gaps to it. `converged` is false if the
///         gradient could not be brought below the tolerance. A site without an answer has its status
/// @throws std::invalid_argument if `found` does not belong to the other arguments, or `by` is no
///         search
/// @note   An evaluation costs twice an epoch (products are in fp64). 12 copies of the weights in fp64
/// @see    Liu, Nocedal, "On the limited memory BFGS method", 1989
template <class T, class Memory, class Labels, class On = default_backend_t<Memory>>
std::vector<probe_optimum> probe_optima(layer_stack<T, Memory> const& stack, Labels const& labels,
                                        probe_options const& options, layer_probes const& found,
                                        optimum_options const& by = {}, On const& on = {}) {
  static_assert(softmax_backend_for<On, Memory>,
                "rflow: this backend cannot read where the stack lives, or has no probes");
  constexpr char const* where = "rflow::probe_optima";
  detail::probe_plan plan(where, stack, labels, options);
  if (!(by.ridge >= 0) || !detail::is_finite(by.ridge) || !(by.tolerance > 0) ||
      !detail::is_finite(by.tolerance) || by.max_iterations < 1)
    detail::reject(where,
                   "the ridge must be at least 0, the tolerance above it, both finite, with at "
                   "least one iteration");
  plan.problem.in_double = true;
  if (static_cast<std::ptrdiff_t>(found.layers.size()) != stack.sites())
    detail::reject(where, std::to_string(found.layers.size()) + " probes for " +
                              std::to_string(stack.sites()) + " sites");
  for (std::ptrdiff_t l = 0; l < stack.sites(); ++l)
    detail::check_found(where, plan, stack[l].cols, found.layers[static_cast<std::size_t>(l)]);
  std::vector<probe_optimum> out(found.layers.size());
  on.softmax(stack, plan.problem, [&](std::ptrdiff_t l, auto& regression) {
    out[static_cast<std::size_t>(l)] =
        detail::find_optimum(plan, found.layers[static_cast<std::size_t>(l)], by, regression);
  });
  return out;
}

template <detail::no_stack X, class... More>
std::vector<probe_optimum> probe_optima(X const&, More const&...) {
  static_cast<void>(sizeof(detail::refuse_stackless<X>));
  return {};
}

/// The same for one set of activations and what probe() returned.
template <class X, class Labels, class On = default_backend_t<memory_of<X>>>
probe_optimum optimum_of(X const& x, Labels const& labels, probe_options const& options,
                         probe_result const& found, optimum_options const& by = {},
                         On const& on = {}) {
  auto const v = as_view(x);
  layer_probes one;
  one.layers.push_back(found);
  return std::move(probe_optima(layer_stack{v}, labels, options, one, by, on)[0]);
}

}  // namespace rflow
