// SPDX-License-Identifier: Apache-2.0
#include "device.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <rflow/cka.hpp>
#include <rflow/cosine.hpp>
#include <rflow/cuda.cuh>
#include <rflow/detail/cuda/passes.cuh>
#include <rflow/dlpack.hpp>

namespace device {
namespace {

using rflow::device_memory, rflow::layer_stack, rflow::view;

/// Everything that a stack's views can reach, copied to the device; and the same stack there.
template <class T>
class copied {
 public:
  explicit copied(layer_stack<T> const& stack) {
    std::vector<view<T, device_memory>> views;
    for (std::ptrdiff_t l = 0; l < stack.sites(); ++l) {
      view<T> const& x = stack[l];
      std::ptrdiff_t const last_row = (x.rows - 1) * x.row_stride;
      std::ptrdiff_t const last_col = (x.cols - 1) * x.col_stride;
      std::ptrdiff_t const low =
          std::min<std::ptrdiff_t>(last_row, 0) + std::min<std::ptrdiff_t>(last_col, 0);
      std::ptrdiff_t const high =
          std::max<std::ptrdiff_t>(last_row, 0) + std::max<std::ptrdiff_t>(last_col, 0);
      auto const bytes = static_cast<std::size_t>(high - low + 1) * sizeof(T);
      void* p = nullptr;
      rflow::detail::check(cudaMalloc(&p, bytes), "cudaMalloc");
      owned_.emplace_back(p);
      rflow::detail::check(cudaMemcpy(p, x.data + low, bytes, cudaMemcpyHostToDevice),
                           "cudaMemcpy");
      views.push_back(rflow::checked_device_view(static_cast<T const*>(p) - low, x.rows, x.cols,
                                                 x.row_stride, x.col_stride));
    }
    stack_.push_back(layer_stack<T, device_memory>(views));
    if (stack.masked()) {
      std::vector<bool> keep(static_cast<std::size_t>(stack.all_tokens()));
      for (std::ptrdiff_t const t : stack.selection()) keep[static_cast<std::size_t>(t)] = true;
      stack_.push_back(stack_.back().tokens(keep));
    }
    std::vector<std::ptrdiff_t> offsets;
    for (std::ptrdiff_t const b : stack.boundaries())
      offsets.push_back(b < stack.size() ? stack.token(b) : stack.all_tokens());
    offsets.front() = 0;
    stack_.push_back(stack_.back().sequences(offsets));
  }

  layer_stack<T, device_memory> const& stack() const { return stack_.back(); }

 private:
  struct free {
    void operator()(void* p) const { static_cast<void>(cudaFree(p)); }
  };
  std::vector<layer_stack<T, device_memory>> stack_;
  std::vector<std::unique_ptr<void, free>> owned_;
};

/// What dlpack.h calls DLTensor.
struct tensor {
  struct {
    std::int32_t device_type, device_id;
  } device;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  void const* data;
  std::int32_t ndim;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
tensor cuda_tensor(float const* data, std::int64_t (&shape)[3]) {
  return {{2, 0}, {2, 32, 1}, data, 3, shape, nullptr, 0};
}

/// What thrust::device_vector is to a reader.
struct container {
  struct pointer {
    float const* p;
    float const* get() const { return p; }
  } at;
  std::size_t count;

  pointer data() const { return at; }
  std::size_t size() const { return count; }
};

answers measure(view<float, device_memory> const& x, view<float, device_memory> const& y) {
  return {rflow::inter_token_cosine(x), rflow::cka(x, y)};
}

rflow::on_cuda backend(std::size_t memory_bound) {
  rflow::on_cuda on;
  on.memory_bound = memory_bound;
  return on;
}

}  // namespace

int count(std::string& why_not) {
  int devices = 0;
  cudaError_t const error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) why_not = cudaGetErrorString(error);
  return error == cudaSuccess ? devices : 0;
}

template <class T>
rflow::flow_moments staged::flow(layer_stack<T> const& stack, rflow::flow_sink const& sink) const {
  return backend(memory_bound).flow(stack, sink);
}
template <class Kernel, class... T>
rflow::gram_moments staged::gram(Kernel const& kernel, layer_stack<T> const&... stacks) const {
  return backend(memory_bound).gram(kernel, stacks...);
}
template <class T>
rflow::flow_moments resident::flow(layer_stack<T> const& stack,
                                   rflow::flow_sink const& sink) const {
  return backend(memory_bound).flow(copied<T>(stack).stack(), sink);
}
template <class Kernel, class... T>
rflow::gram_moments resident::gram(Kernel const& kernel, layer_stack<T> const&... stacks) const {
  return backend(memory_bound).gram(kernel, copied<T>(stacks).stack()...);
}

answers of_views(float const* values, std::ptrdiff_t n, std::ptrdiff_t d) {
  copied<float> const on_device(layer_stack<float>(values, {1, 2 * n, d}));
  float const* const data = on_device.stack()[0].data;
  return measure(rflow::checked_device_view(data, n, d),
                 rflow::checked_device_view(data + n * d, n, d));
}
answers of_dlpack(float const* values, std::ptrdiff_t n, std::ptrdiff_t d) {
  copied<float> const on_device(layer_stack<float>(values, {1, 2 * n, d}));
  std::int64_t shape[3] = {2, n, d};
  auto const stack =
      rflow::stack_from_dlpack<float, device_memory>(cuda_tensor(on_device.stack()[0].data, shape));
  return measure(rflow::checked_device_view(stack[0]), rflow::checked_device_view(stack[1]));
}
answers of_containers(float const* values, std::ptrdiff_t n, std::ptrdiff_t d) {
  copied<float> const on_device(layer_stack<float>(values, {1, 2 * n, d}));
  auto const layer = [&](std::ptrdiff_t l) {
    container const c{{on_device.stack()[0].data + l * n * d}, static_cast<std::size_t>(n * d)};
    return rflow::checked_device_view(c, n, d);
  };
  return measure(layer(0), layer(1));
}
void lie_about_device() {
  float const on_the_host[4] = {};
  std::int64_t shape[3] = {1, 2, 2};
  static_cast<void>(rflow::checked_device_view(
      rflow::stack_from_dlpack<float, device_memory>(cuda_tensor(on_the_host, shape))[0]));
}
void lie_about_space() {
  float const on_the_host[4] = {};
  static_cast<void>(rflow::checked_device_view(on_the_host, 2, 2));
}
void wrong_ordinal() {
  float const values[4] = {};
  rflow::on_cuda on;
  on.device = 1000;
  on.flow(layer_stack<float>(values, {1, 2, 2}));
}

// ---- what the tests use -------------------------------------------------------------------------

using rflow::bf16, rflow::f16, rflow::flow_moments, rflow::flow_sink, rflow::gram_moments,
    rflow::linear, rflow::rbf;

#define FLOW(On)                                                                      \
  template flow_moments On::flow(layer_stack<float> const&, flow_sink const&) const;  \
  template flow_moments On::flow(layer_stack<double> const&, flow_sink const&) const; \
  template flow_moments On::flow(layer_stack<f16> const&, flow_sink const&) const;    \
  template flow_moments On::flow(layer_stack<bf16> const&, flow_sink const&) const;
#define GRAM(On, Kernel)                                                                          \
  template gram_moments On::gram(Kernel const&, layer_stack<float> const&) const;                 \
  template gram_moments On::gram(Kernel const&, layer_stack<double> const&) const;                \
  template gram_moments On::gram(Kernel const&, layer_stack<f16> const&) const;                   \
  template gram_moments On::gram(Kernel const&, layer_stack<bf16> const&) const;                  \
  template gram_moments On::gram(Kernel const&, layer_stack<double> const&,                       \
                                 layer_stack<double> const&) const;                               \
  template gram_moments On::gram(Kernel const&, layer_stack<float> const&,                        \
                                 layer_stack<float> const&) const;                                \
  template gram_moments On::gram(Kernel const&, layer_stack<f16> const&, layer_stack<f16> const&) \
      const;                                                                                      \
  template gram_moments On::gram(Kernel const&, layer_stack<bf16> const&,                         \
                                 layer_stack<bf16> const&) const;                                 \
  template gram_moments On::gram(Kernel const&, layer_stack<float> const&,                        \
                                 layer_stack<bf16> const&) const;
FLOW(staged)
FLOW(resident)
GRAM(staged, linear)
GRAM(staged, rbf)
GRAM(resident, linear)
GRAM(resident, rbf)

}  // namespace device
