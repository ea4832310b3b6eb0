// SPDX-License-Identifier: Apache-2.0
#pragma once

// From ONNX Runtime: Ort::Value, matched by its members. The runtime returns graph outputs only:
// export the model with its hidden states as outputs, or add the names of intermediate tensors to
// the graph's outputs before loading it.

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <rflow/runtime.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A handle with the members of Ort::Value, ONNX Runtime 1.13 and later.
template <class X>
concept ort_value = requires(X const& v) {
  static_cast<bool>(v.IsTensor());
  static_cast<std::size_t>(v.GetTensorTypeAndShapeInfo().GetShape().size());
  static_cast<std::ptrdiff_t>(v.GetTensorTypeAndShapeInfo().GetShape()[0]);
  static_cast<int>(v.GetTensorTypeAndShapeInfo().GetElementType());
  static_cast<int>(v.GetTensorMemoryInfo().GetDeviceType());
  std::string(v.GetTensorMemoryInfo().GetAllocatorName());
  static_cast<void const*>(v.GetTensorRawData());
};

namespace detail {

template <ort_value X>
foreign_array describe_ort(char const* where, X const& v) {
  foreign_array a;
  a.where = where;
  a.type_field = "element type";
  if (!v.IsTensor()) a.fail("the value is no tensor");
  auto const info = v.GetTensorTypeAndShapeInfo();
  int const type = static_cast<int>(info.GetElementType());
  switch (type) {
    case 1: a.type = element::f32; break;
    case 10: a.type = element::f16; break;
    case 11: a.type = element::f64; break;
    case 16: a.type = element::bf16; break;
    default: a.type_name = "ONNXTensorElementDataType " + std::to_string(type);
  }
  if (a.type != element::none) a.type_name = to_string(a.type);

  auto const memory = v.GetTensorMemoryInfo();
  a.on_host = static_cast<int>(memory.GetDeviceType()) == 0;
  a.place = std::string(memory.GetAllocatorName());
  a.on_device = !a.on_host && a.place == "Cuda";

  auto const shape = info.GetShape();
  a.set_rank(shape.size());
  for (int i = 0; i < a.rank; ++i) a.set_shape(i, shape[static_cast<std::size_t>(i)]);
  a.dense = true;  // always: the interface has no strides
  a.data = v.GetTensorRawData();
  return a;
}

}  // namespace detail

/// The n × d view of a value, tokens in rows. Nothing is copied: the view is valid as long as the
/// value is, or the buffer that the value was made on.
///
/// @tparam T       float, double, f16 or bf16: what the element type has to say
/// @tparam Memory  host_memory: a CPU device (pinned memory included); device_memory: an allocator
///                 named "Cuda", after synchronising with the run
/// @param  v  2 axes, tokens × hidden; or up to 4, those ahead of these two of length 1
/// @throws std::invalid_argument that names the member and its value, if v is no tensor; the
///         element type is not T; the memory is another; there are fewer than 2 or more than 4
///         axes, or an axis ahead of the last two is longer than 1; an extent is less than 1 or all
///         of them more than memory can hold; the data pointer is null or not aligned to the
///         element. What the runtime throws of its own passes through
/// @note   O(1), but for the shape, which the runtime returns in a std::vector
template <class T, class Memory = host_memory, ort_value X>
view<T, Memory> from_onnxruntime(X const& v) {
  return detail::view_of<T, Memory>(detail::describe_ort("rflow::from_onnxruntime", v));
}

/// Values that die at the end of the statement: keep them in a variable first.
template <class T, class Memory = host_memory, ort_value X>
view<T, Memory> from_onnxruntime(X const&&) = delete;

/// The layers of a value of 3 axes, sites × tokens × hidden, or of 4 with a batch of 1 after the
/// sites. Otherwise as from_onnxruntime.
template <class T, class Memory = host_memory, ort_value X>
layer_stack<T, Memory> stack_from_onnxruntime(X const& v) {
  return detail::stack_of<T, Memory>(detail::describe_ort("rflow::stack_from_onnxruntime", v));
}
template <class T, class Memory = host_memory, ort_value X>
layer_stack<T, Memory> stack_from_onnxruntime(X const&&) = delete;

/// The layers of a list of values, one a site, each as from_onnxruntime takes it: what
/// Ort::Session::Run returned, or a std::span of it. The list has to outlive the stack.
/// @throws std::invalid_argument as from_onnxruntime and layer_stack
template <class T, class Memory = host_memory, class Range>
requires ort_value<element_of<Range>> layer_stack<T, Memory> stack_from_onnxruntime(
    Range const& values, std::vector<std::string> names = {}) {
  return detail::stack_of_range<T, Memory>(values, std::move(names), [](auto const& v) {
    return detail::view_of<T, Memory>(detail::describe_ort("rflow::stack_from_onnxruntime", v));
  });
}
template <class T, class Memory = host_memory, class Range>
requires ort_value<element_of<Range>> layer_stack<T, Memory> stack_from_onnxruntime(
    Range const&&, std::vector<std::string> = {})
= delete;

/// Calls f with the view of a value of whatever type: view<f16>, view<bf16>, view<float> or
/// view<double>. All four calls must return the same type.
/// @throws std::invalid_argument as from_onnxruntime, and if the type is another; what f throws
template <class Memory = host_memory, ort_value X, class Function>
auto visit(X const& v, Function&& f) {
  return detail::visit_view<Memory>(detail::describe_ort("rflow::visit", v),
                                    std::forward<Function>(f));
}

}  // namespace rflow
