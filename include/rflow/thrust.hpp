// SPDX-License-Identifier: Apache-2.0
#pragma once

// on_thrust<System>: the moments on a device system of Thrust: OpenMP, TBB or serial, with any C++
// compiler. Products go through Eigen. It is the code that on_cuda runs on a GPU, so it shows on the
// CPU what that code computes; on_cpu is the faster of the two.
//
// A plain C++ compiler has to be told not to look for CUDA: define THRUST_HOST_SYSTEM and
// THRUST_DEVICE_SYSTEM as the CMake target rflow::thrust does.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include <Eigen/Core>

#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/system/cpp/execution_policy.h>
#include <thrust/system/omp/execution_policy.h>

#include <rflow/moments.hpp>
#include <rflow/passes.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// Thrust's serial system.
struct thrust_cpp {
  static auto policy() { return thrust::cpp::par; }
};
/// Thrust's OpenMP system; needs -fopenmp.
struct thrust_omp {
  static auto policy() { return thrust::omp::par; }
};

namespace detail {

template <class F>
struct with_one_lane {
  F f;

  void operator()(std::ptrdiff_t i) const { f(i, passes::one_lane{}); }
};

/// Products of panels in blocks, each a product of Eigen's, shared out by Thrust. Eigen's parallel
/// entry point is avoided: threads are Thrust's.
template <class C>
struct product_of_block {
  using integer = std::ptrdiff_t;
  static constexpr integer block = 256;

  C const *rows, *cols;
  integer side, depth;
  bool accumulate, lower;
  C* out;

  static integer blocks(integer side, bool lower) {
    integer const count = passes::ceil_div(side, block);
    return lower ? count * (count + 1) / 2 : count * count;
  }

  void operator()(integer item) const {
    integer const count = passes::ceil_div(side, block);
    integer i = item % count, j = item / count;
    if (lower)  // the item-th block on or below the diagonal, row after row
      for (i = 0, j = item; j > i; j -= ++i) continue;
    i *= block, j *= block;
    multiply(i, std::min(block, side - i), j, std::min(block, side - j));
  }

 private:
  void multiply(integer i, integer height, integer j, integer width) const {
    C* const to = out + j * side + i;
    if (!accumulate)
      for (integer k = 0; k < width; ++k) std::fill_n(to + k * side, height, C(0));
    using namespace Eigen::internal;
    gemm_blocking_space<Eigen::ColMajor, C, C, Eigen::Dynamic, Eigen::Dynamic, Eigen::Dynamic>
        blocking(height, width, depth, 1, true);
    general_matrix_matrix_product<integer, C, Eigen::RowMajor, false, C, Eigen::ColMajor, false,
                                  Eigen::ColMajor, 1>::run(height, width, depth, rows + i * depth,
                                                           depth, cols + j * depth, depth, to, 1,
                                                           side, C(1), blocking, nullptr);
  }
};

/// The products of all pairs of sites over one slice of their tiles.
template <class C>
struct pairs_of_slice {
  using integer = std::ptrdiff_t;

  C const* tiles;
  integer sites, stride, slice;
  C* out;

  void operator()(integer item) const {
    C const* const from = tiles + item * slice;
    C* const to = out + item * sites * sites;
    std::fill_n(to, sites * sites, C(0));
    using namespace Eigen::internal;
    gemm_blocking_space<Eigen::ColMajor, C, C, Eigen::Dynamic, Eigen::Dynamic, Eigen::Dynamic>
        blocking(sites, sites, slice, 1, true);
    general_matrix_matrix_product<integer, C, Eigen::RowMajor, false, C, Eigen::ColMajor, false,
                                  Eigen::ColMajor, 1>::run(sites, sites, slice, from, stride, from,
                                                           stride, to, 1, sites, C(1), blocking,
                                                           nullptr);
  }
};

/// A device system of Thrust whose memory is the host's.
template <class System>
class thrust_device {
  using integer = std::ptrdiff_t;
  static constexpr std::align_val_t alignment{256};

 public:
  using group = passes::one_lane;

  static constexpr integer flow_bytes = integer{8} << 20;  // rows of a slab: they stay in cache
  static constexpr integer least_slab = 4;
  static constexpr integer column_slices = 32;
  static constexpr integer panel_bytes = 2048;  // depth of a panel
  static constexpr integer most_side = 1536;
  template <class C>
  static constexpr integer side_multiple = 64;
  template <class C>
  static constexpr integer depth_multiple = 16;

  class memory {
   public:
    explicit memory(std::size_t bytes)
        : data_(static_cast<std::byte*>(::operator new(bytes, alignment)), release) {}
    std::byte* data() const { return data_.get(); }

   private:
    static void release(std::byte* p) { ::operator delete(p, alignment); }
    std::unique_ptr<std::byte, void (*)(std::byte*)> data_;
  };

  memory allocate(std::size_t bytes) { return memory(bytes); }

  template <class F>
  void each_index(integer count, F const& f) {
    thrust::for_each_n(System::policy(), thrust::counting_iterator<integer>(0), count, f);
  }
  template <class F>
  void each_group(integer count, F const& f) {
    each_index(count, with_one_lane<F>{f});
  }

  template <class V>
  void upload(V const* from, integer count, V* to) {
    std::copy_n(from, count, to);
  }
  template <class V>
  void download(V const* from, integer count, V* to) {
    std::copy_n(from, count, to);
  }
  template <class V>
  void zero(V* to, integer count) {
    std::fill_n(to, count, V(0));
  }
  void wait() {}

  template <class T>
  passes::direct_source<T> source(layer_stack<T> const& stack, passes::arena& places) {
    return {stack, places};
  }

  template <class C>
  void product(C const* rows, C const* cols, integer side, integer depth, bool accumulate,
               bool lower, C* out) {
    using task = product_of_block<C>;
    each_index(task::blocks(side, lower), task{rows, cols, side, depth, accumulate, lower, out});
  }
  template <class C>
  void pair_products(C const* tiles, integer sites, integer area, integer slice, C* out) {
    each_index(area / slice, pairs_of_slice<C>{tiles, sites, area, slice, out});
  }
};

}  // namespace detail

/// Runs on a device system of Thrust in host memory.
///
/// @tparam System  thrust_cpp, thrust_omp, or any type with a static policy(), such as
///                 `struct tbb { static auto policy() { return thrust::tbb::par; } };`
template <class System>
struct on_thrust {
  std::size_t memory_bound = std::size_t{256} << 20;  ///< bytes of scratch
  gram_path path = gram_path::automatic;              ///< automatic always takes kernel matrices

  template <class Memory>
  static constexpr bool reads = std::same_as<Memory, host_memory>;

  /// @note  O(S n d) time, one read from main memory
  template <class T>
  flow_moments flow(layer_stack<T> const& stack, flow_sink const& sink = {}) const {
    detail::thrust_device<System> device;
    return detail::passes::flow(device, stack, sink, memory_bound);
  }

  /// @note  S n² d multiply-adds. A kernel of yours must not throw
  /// @throws std::invalid_argument if the stacks differ in tokens, the memory bound is too small for
  ///         one tile (the text says what is needed), or path is gram_path::feature
  template <class Kernel, class... T>
  gram_moments gram(Kernel const& kernel, layer_stack<T> const&... stacks) const {
    constexpr char const* where = "rflow::on_thrust::gram";
    detail::passes::require_tiles(where, path);
    detail::thrust_device<System> device;
    return detail::passes::gram(where, device, memory_bound, kernel, stacks...);
  }
};

}  // namespace rflow
