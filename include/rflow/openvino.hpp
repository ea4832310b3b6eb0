// SPDX-License-Identifier: Apache-2.0
#pragma once

// From OpenVINO: ov::Tensor, matched by its members. Hidden states become outputs by
// model->add_output() before compiling; ask the plugin for f32 (ov::hint::inference_precision), or
// it may compute in 16 bits what it returns in 32.

#include <cstddef>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include <rflow/runtime.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A handle with the members of ov::Tensor.
template <class X>
concept openvino_tensor = requires(X const& t) {
  static_cast<bool>(t);
  std::string(t.get_element_type().get_type_name());
  static_cast<std::size_t>(t.get_shape().size());
  static_cast<std::size_t>(t.get_shape()[0]);
  static_cast<std::size_t>(t.get_strides()[0]);
  static_cast<void const*>(t.data());
};

namespace detail {

template <openvino_tensor X>
foreign_array describe_openvino(char const* where, X const& t) {
  foreign_array a;
  a.where = where;
  a.type_field = "element type";
  a.byte_units = true;
  if (!t) a.fail("the tensor is empty");
  // By name, because the numbers of the enumeration have changed between versions.
  a.type_name = std::string(t.get_element_type().get_type_name());
  for (element const type : {element::f16, element::bf16, element::f32, element::f64})
    if (a.type_name == to_string(type)) a.type = type;

  auto const& shape = t.get_shape();
  a.set_rank(shape.size());
  for (int i = 0; i < a.rank; ++i) a.set_shape(i, shape[static_cast<std::size_t>(i)]);
  if (a.type == element::none) return a;  // strides of packed types cannot be asked for
  auto const& strides = t.get_strides();
  for (int i = 0; i < a.rank; ++i) a.set_stride(i, strides[static_cast<std::size_t>(i)]);
  try {
    a.data = t.data();
  } catch (std::exception const& e) {  // a remote tensor
    a.fail(std::string("the tensor has no data for the host: ") + e.what());
  }
  return a;
}

}  // namespace detail

/// The n × d view of a tensor, tokens in rows. Nothing is copied: the view is valid as long as the
/// tensor is; that of an inference request is written again by its next inference.
///
/// @tparam T  float, double, f16 or bf16: what the element type has to say
/// @param  t  2 axes, tokens × hidden; or up to 4, those ahead of these two of length 1. A region of
///            interest keeps its strides
/// @throws std::invalid_argument that names the member and its value, if the tensor is empty or
///         remote (on a GPU: copy_to() a host tensor); the element type is not T; there are fewer
///         than 2 or more than 4 axes, or an axis ahead of the last two is longer than 1; an extent
///         is 0 or all of them more than memory can hold; a stride is 0, no multiple of the element
///         or reaches too far; the data pointer is null or not aligned to the element
/// @note   O(1), but for shape and strides, which are std::vectors
template <class T, openvino_tensor X>
view<T> from_openvino(X const& t) {
  return detail::view_of<T, host_memory>(detail::describe_openvino("rflow::from_openvino", t));
}

/// Tensors that die at the end of the statement: keep them in a variable first.
template <class T, openvino_tensor X>
view<T> from_openvino(X const&&) = delete;

/// The layers of a tensor of 3 axes, sites × tokens × hidden, or of 4 with a batch of 1 after the
/// sites. Otherwise as from_openvino.
template <class T, openvino_tensor X>
layer_stack<T> stack_from_openvino(X const& t) {
  return detail::stack_of<T, host_memory>(
      detail::describe_openvino("rflow::stack_from_openvino", t));
}
template <class T, openvino_tensor X>
layer_stack<T> stack_from_openvino(X const&&) = delete;

/// The layers of a list of tensors, one a site, each as from_openvino takes it. The list has to
/// outlive the stack.
/// @throws std::invalid_argument as from_openvino and layer_stack
template <class T, class Range>
requires openvino_tensor<element_of<Range>> layer_stack<T> stack_from_openvino(
    Range const& tensors, std::vector<std::string> names = {}) {
  return detail::stack_of_range<T, host_memory>(tensors, std::move(names), [](auto const& t) {
    return detail::view_of<T, host_memory>(
        detail::describe_openvino("rflow::stack_from_openvino", t));
  });
}
template <class T, class Range>
requires openvino_tensor<element_of<Range>> layer_stack<T> stack_from_openvino(
    Range const&&, std::vector<std::string> = {})
= delete;

/// Calls f with the view of a tensor of whatever type: view<f16>, view<bf16>, view<float> or
/// view<double>. All four calls must return the same type.
/// @throws std::invalid_argument as from_openvino, and if the type is another; what f throws
template <openvino_tensor X, class Function>
auto visit(X const& t, Function&& f) {
  return detail::visit_view<host_memory>(detail::describe_openvino("rflow::visit", t),
                                         std::forward<Function>(f));
}

}  // namespace rflow
