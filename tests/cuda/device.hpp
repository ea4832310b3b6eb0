// SPDX-License-Identifier: Apache-2.0
#pragma once

// on_cuda, seen from a .cpp that was compiled without nvcc and with on_cpu: device.cu holds the
// definitions for the types that the tests use.

#include <cstddef>
#include <string>

#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace device {

/// Devices there are; what CUDA says if it cannot tell.
int count(std::string& why_not);

/// on_cuda over host memory.
struct staged {
  std::size_t memory_bound = std::size_t{1} << 30;

  template <class Memory>
  static constexpr bool reads = std::same_as<Memory, rflow::host_memory>;

  template <class T>
  rflow::flow_moments flow(rflow::layer_stack<T> const& stack,
                           rflow::flow_sink const& sink = {}) const;
  template <class Kernel, class... T>
  rflow::gram_moments gram(Kernel const& kernel, rflow::layer_stack<T> const&... stacks) const;
};

/// on_cuda over device memory, to which each call copies its data.
struct resident : staged {
  template <class T>
  rflow::flow_moments flow(rflow::layer_stack<T> const& stack,
                           rflow::flow_sink const& sink = {}) const;
  template <class Kernel, class... T>
  rflow::gram_moments gram(Kernel const& kernel, rflow::layer_stack<T> const&... stacks) const;
};

/// Inter-token cosine and CKA of two layers of n × d on the device, no backend named: as views, as a
/// tensor of DLPack and as a container of Thrust's kind.
struct answers {
  double cosine, cka;
};
answers of_views(float const* two_layers, std::ptrdiff_t n, std::ptrdiff_t d);
answers of_dlpack(float const* two_layers, std::ptrdiff_t n, std::ptrdiff_t d);
answers of_containers(float const* two_layers, std::ptrdiff_t n, std::ptrdiff_t d);
/// A tensor of DLPack that says "CUDA" of memory of the host.
void lie_about_device();

/// Asks for a view of host memory as if it were the device's.
void lie_about_space();
/// Asks for a device that there is not.
void wrong_ordinal();

}  // namespace device
