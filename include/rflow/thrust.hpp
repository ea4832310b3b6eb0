// SPDX-License-Identifier: Apache-2.0
#pragma once

// on_thrust<System>: on_cpu on the threads of one of Thrust's host systems (OpenMP, TBB, serial), for
// programs whose threads are theirs already. The same passes give the same moments, bit for bit.
//
// A plain C++ compiler has to be told not to look for CUDA: define THRUST_HOST_SYSTEM and
// THRUST_DEVICE_SYSTEM as the CMake target rflow::thrust does.

#include <concepts>
#include <cstddef>

#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/system/cpp/execution_policy.h>
#include <thrust/system/omp/execution_policy.h>

#include <rflow/eigen.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// Thrust's serial system.
struct thrust_cpp {
  /// One thread.
  static auto policy() { return thrust::cpp::par; }
};
/// Thrust's OpenMP system; needs -fopenmp.
struct thrust_omp {
  /// OpenMP's threads.
  static auto policy() { return thrust::omp::par; }
};

namespace detail {

struct thrust_worker {
  void (*part)(void* job, int worker);
  void* job;

  void operator()(int worker) const { part(job, worker); }
};

/// Workers are the items of one parallel algorithm. They take tasks in ascending order, so it does
/// not matter how many of them a system runs side by side.
template <class System>
void launch_by_thrust(int workers, void (*part)(void* job, int worker), void* job) {
  thrust::for_each_n(System::policy(), thrust::counting_iterator<int>(0), workers,
                     thrust_worker{part, job});
}

}  // namespace detail

/// Runs on a device system of Thrust in host memory.
///
/// @tparam System  thrust_cpp, thrust_omp, or any type with a static policy(), such as
///                 `struct tbb { static auto policy() { return thrust::tbb::par; } };`
template <class System>
struct on_thrust {
  int threads = 0;  ///< at most; 0: as many as the machine has. The system may run fewer
  std::size_t memory_bound = std::size_t{256} << 20;  ///< bytes of scratch for Gram tiles
  gram_path path = gram_path::automatic;              ///< how linear Gram moments come about

  /// Host memory only.
  template <class Memory>
  static constexpr bool reads = std::same_as<Memory, host_memory>;

  /// @note  as on_cpu::flow
  template <class T>
  flow_moments flow(layer_stack<T> const& stack, flow_sink const& sink = {}) const {
    return detail::host_flow("rflow::on_thrust::flow", workers(), stack, sink);
  }

  /// @note   as on_cpu::gram
  /// @throws as on_cpu::gram
  template <class Kernel, class... T>
  gram_moments gram(Kernel const& kernel, layer_stack<T> const&... stacks) const {
    detail::gram_options const options{workers(), memory_bound, path};
    return detail::host_gram<detail::packed_product>("rflow::on_thrust::gram", kernel, options,
                                                     stacks...);
  }

  /// @note   as on_cpu::softmax
  /// @throws as on_cpu::softmax
  template <class T, class Visit>
  void softmax(layer_stack<T> const& stack, softmax_problem const& problem,
               Visit const& visit) const {
    detail::host_softmax("rflow::on_thrust::softmax", workers(), stack, problem, visit);
  }

 private:
  detail::crew workers() const {
    return {detail::threads_or_all(threads), &detail::launch_by_thrust<System>};
  }
};

}  // namespace rflow
