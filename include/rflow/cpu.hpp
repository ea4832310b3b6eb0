// SPDX-License-Identifier: Apache-2.0
#pragma once

// on_cpu: the default backend. Reads each activation once for the flow moments and builds each
// Gram tile once for the Gram moments, on threads of its own.
//
// Results are the same, bit for bit, for every number of threads: work is cut by the shape of the
// data alone and sums are added in a fixed order.

#include <concepts>
#include <cstddef>
#include <vector>

#include <Eigen/Core>

// Before anything that an older Eigen does not have.
static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0),
              "rflow: Eigen 3.4 or newer is needed: put its directory first among the include "
              "directories, or set Eigen3_DIR for CMake");

#include <rflow/detail/cpu/batch_stream.hpp>
#include <rflow/detail/cpu/host.hpp>
#include <rflow/detail/cpu/stream.hpp>
#include <rflow/moments.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// Runs on the CPU, with Eigen's vector instructions and threads of its own.
struct on_cpu {
  int threads = 0;  ///< so many; 0: as many as the machine has and the work pays for
  std::size_t memory_bound = std::size_t{256} << 20;  ///< bytes of scratch for Gram tiles
  gram_path path = gram_path::automatic;              ///< how linear Gram moments come about
  bool significance = false;  ///< also what cka_table::p_value needs: n² (d + n) operations a site
  work_share share = {};      ///< gram() does this part of the products; see gram_moments::merge
  bool shifts = false;        ///< significance, and what cka_table::shift_p_value needs: see there

  /// Host memory only.
  template <class Memory>
  static constexpr bool reads = std::same_as<Memory, host_memory>;
  /// What flow_monitor runs on: rows on their way through the chain.
  template <class T>
  using chain_stream = detail::chain_stream<T>;
  /// What flow_monitor runs on: batches for CKA.
  template <class T>
  using batch_stream = detail::batch_stream<T>;

  /// How many threads that is at most; probes and flow_monitor take so many.
  int thread_count() const { return detail::threads_or_all(threads); }

  /// @note  O(S n d) time, one read; 16·S·d doubles of memory
  template <class T>
  flow_moments flow(layer_stack<T> const& stack, flow_sink const& sink = {}) const {
    return detail::host_flow("rflow::on_cpu::flow", {threads}, stack, sink);
  }

  /// @note  S n² d multiply-adds, or (Σd)² n / 2 when those are fewer and the kernel is linear
  /// @throws std::invalid_argument if the stacks differ in tokens, the memory bound is too small
  ///         for one tile (the text says what is needed), or share.index is not
  ///         in [0, share.of)
  template <class Kernel, class... T>
  gram_moments gram(Kernel const& kernel, layer_stack<T> const&... stacks) const {
    return gram_of(kernel, stacks...);
  }

  /// The same for models whose tokens are in several stacks, one after the other: files too large
  /// for one. Stacks of one model have the same sites.
  template <class Kernel, class... T>
  gram_moments gram(Kernel const& kernel, std::vector<layer_stack<T>> const&... models) const {
    return gram_of(kernel, models...);
  }

  /// Softmax regressions of every site; see softmax_backend_for. Sites run side by side where one
  /// alone is too small for all threads, else one after the other.
  /// @note   4·n·d·columns operations a step; weights, two moments and one residual per token and
  ///         column of memory, for each site that runs
  /// @throws std::invalid_argument if the problem has another number of tokens than the stack
  template <class T, class Visit>
  void softmax(layer_stack<T> const& stack, softmax_problem const& problem,
               Visit const& visit) const {
    detail::host_softmax("rflow::on_cpu::softmax", {thread_count()}, stack, problem, visit);
  }

  /// The same for tokens in several stacks with the same sites, one after the other.
  template <class T, class Visit>
  void softmax(std::vector<layer_stack<T>> const& stacks, softmax_problem const& problem,
               Visit const& visit) const {
    detail::host_softmax("rflow::on_cpu::softmax", {thread_count()}, stacks, problem, visit);
  }

 private:
  template <class Kernel, class... Models>
  gram_moments gram_of(Kernel const& kernel, Models const&... models) const {
    detail::gram_options const options{{threads}, memory_bound, path, significance, share, shifts};
    return detail::host_gram<detail::packed_product>("rflow::on_cpu::gram", kernel, options,
                                                     models...);
  }
};

/// What lives in host memory is measured on the CPU.
template <>
struct default_backend<host_memory> {
  using type = on_cpu;  ///< the backend
};

}  // namespace rflow
