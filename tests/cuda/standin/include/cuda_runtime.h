// SPDX-License-Identifier: Apache-2.0
#pragma once

// Stands in for CUDA's C++ runtime: kernels run on the CPU, warp by warp, each lane on a stack of
// its own. A lane runs until it meets a warp-wide operation; then the next one does. The C functions
// of the runtime are in standin.cpp.

#include <cuda_runtime_api.h>

#include <functional>

#undef __global__
#undef __device__
#define __global__
#define __device__

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

namespace standin {

/// The error that this call is to report, if a test wants it to fail.
cudaError_t cuda_fault();

/// Runs a thread's work for every thread of a grid.
void run_grid(dim3 grid, dim3 block, std::function<void()> const& thread);

/// Waits for all 32 lanes of the warp.
void meet();

/// Where a lane leaves a value for the others; two, used in turns.
double& mailbox(int lane, int turn);
int& turn();

}  // namespace standin

inline void __syncwarp() { standin::meet(); }

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  int const lane = static_cast<int>(threadIdx.x) % 32, turn = standin::turn() ^= 1;
  standin::mailbox(lane, turn) = static_cast<double>(value);
  standin::meet();
  return static_cast<V>(standin::mailbox(lane ^ mask, turn));
}

template <class... Parameter, class... Argument>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, void (*kernel)(Parameter...),
                               Argument&&... arguments) {
  if (cudaError_t const fault = standin::cuda_fault(); fault != cudaSuccess) return fault;
  if (config->gridDim.x == 0 || config->blockDim.x % 32 != 0 || config->blockDim.x > 1024)
    return cudaErrorInvalidConfiguration;
  standin::run_grid(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
