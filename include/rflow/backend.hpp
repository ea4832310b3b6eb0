// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a backend provides: the concepts, and the sentences for what it cannot.

#include <concepts>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <rflow/moments.hpp>
#include <rflow/softmax_problem.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A backend: a value that says where the large work runs, and does it.
///
///     on.flow(stack, sink)         flow_moments, every sequence closed
///     on.gram(kernel, stacks...)   gram_moments of the sites of all stacks, in order
///
/// `on.reads<Memory>` says which memory spaces it can be given. Results are on the host when the
/// call returns. A NaN or infinity is noted per site and never spoils another site.
template <class On, class Memory>
concept backend_for = std::remove_cvref_t<On>::template reads<Memory>&& requires(
    On const& on, layer_stack<float, Memory> const& stack, flow_sink const& sink) {
  { on.flow(stack, sink) } -> std::same_as<flow_moments>;
  { on.gram(linear{}, stack) } -> std::same_as<gram_moments>;
};

/// Softmax regressions of one site, with features and weights where the backend is.
///
///     why(), non_finite()       nothing else may be called unless why() is ok
///     mean(), deviation()       problems × d, over the training part; empty if not standardised.
///                               A constant feature has deviation 0 and weight 0
///     load(w), store(w)         weights from and to the host; load() forgets the moments of Adam
///     step(by)                  one step of Adam; the sums are those of the weights before it
///     evaluate()                the sums of the weights as they are
///     predictions()             problems × n: classes found by the last evaluate()
///     gradient(w)               writes the gradient of the mean training losses; sums as in step()
template <class X>
concept softmax_regression = requires(X& x, X const& constant, softmax_weights& w, adam const& by) {
  { constant.why() } -> std::same_as<status>;
  { constant.non_finite() } -> std::same_as<position>;
  constant.mean();
  constant.deviation();
  x.load(w);
  constant.store(w);
  { x.step(by) } -> std::same_as<softmax_sums>;
  { x.evaluate() } -> std::same_as<softmax_sums>;
  { x.gradient(w) } -> std::same_as<softmax_sums>;
  constant.predictions();
};

namespace detail {

/// Takes any softmax regression: what a backend's softmax() is asked with in the concept below.
struct any_visit {
  template <class Regression>
  requires softmax_regression<Regression>
  void operator()(std::ptrdiff_t, Regression&) const {}
};

}  // namespace detail

/// A backend for probes:
///
///     on.softmax(stack, problem, visit)
///
/// calls visit(site, regression) for every site, several at once where that is faster.
template <class On, class Memory>
concept softmax_backend_for = std::remove_cvref_t<On>::template reads<Memory>&& requires(
    On const& on, layer_stack<float, Memory> const& stack, softmax_problem const& problem) {
  on.softmax(stack, problem, detail::any_visit{});
};

namespace detail {

template <class On, class... X>
constexpr void require_readable() {
  static_assert((backend_for<On, memory_of<X>> && ...),
                "rflow: this backend cannot read where the activations live. Copy them to its "
                "memory first, or leave the backend out to get the right one");
}

template <class X, class Y>
constexpr void require_same_memory() {
  static_assert(std::same_as<memory_of<X>, memory_of<Y>>,
                "rflow: the two sets of activations live in different memory spaces. Copy one of "
                "them to where the other lives");
}

[[noreturn]] inline void throw_non_finite(char const* where, char const* layer, position at) {
  throw std::domain_error(std::string(where) + ": NaN or infinity in layer " + layer + ", token " +
                          std::to_string(at.token) + ", feature " + std::to_string(at.feature));
}

template <class T, class Memory>
void require_one_width(char const* where, layer_stack<T, Memory> const& stack) {
  for (std::ptrdiff_t l = 1; l < stack.sites(); ++l)
    if (stack[l].cols != stack.width())
      reject(where, "site " + std::to_string(l) + " has " + std::to_string(stack[l].cols) +
                        " features, site 0 has " + std::to_string(stack.width()));
}

}  // namespace detail

}  // namespace rflow
