// SPDX-License-Identifier: Apache-2.0
#pragma once

// From LibTorch: at::Tensor (torch::Tensor), matched by its members. The C++ frontend has no
// forward hooks: let the model return its hidden states, and remember that the last of Hugging
// Face's list has passed the final norm.

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <rflow/runtime.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A handle with the members of at::Tensor, LibTorch 1.13 and later.
template <class X>
concept torch_tensor = requires(X const& t) {
  static_cast<bool>(t.defined());
  static_cast<int>(t.scalar_type());
  static_cast<int>(t.layout());
  static_cast<int>(t.device().type());
  static_cast<int>(t.device().index());
  static_cast<std::ptrdiff_t>(t.sizes().size());
  static_cast<std::ptrdiff_t>(t.sizes()[0]);
  static_cast<std::ptrdiff_t>(t.strides()[0]);
  static_cast<bool>(t.is_neg());
  t.data_ptr();
};

namespace detail {

template <torch_tensor X>
foreign_array describe_torch(char const* where, X const& t) {
  foreign_array a;
  a.where = where;
  a.type_field = "scalar_type";
  a.shape_field = "sizes";
  if (!t.defined()) a.fail("the tensor is undefined");
  if (int const layout = static_cast<int>(t.layout()); layout != 0)
    a.fail("layout is " + std::to_string(layout) + ", 0 (strided) expected: use to_dense()");
  if (t.is_neg()) a.fail("the tensor is a negative view: use resolve_neg()");
  int const type = static_cast<int>(t.scalar_type());
  switch (type) {
    case 5: a.type = element::f16; break;
    case 6: a.type = element::f32; break;
    case 7: a.type = element::f64; break;
    case 15: a.type = element::bf16; break;
    default: a.type_name = "c10::ScalarType " + std::to_string(type);
  }
  if (a.type != element::none) a.type_name = to_string(a.type);

  int const device = static_cast<int>(t.device().type());
  a.on_host = device == 0;
  a.on_device = device == 1;
  if (device != 0)
    a.place = (device == 1 ? "CUDA" : "c10::DeviceType " + std::to_string(device)) + " " +
              std::to_string(static_cast<int>(t.device().index()));

  auto const sizes = t.sizes();
  auto const strides = t.strides();
  a.set_rank(sizes.size());
  for (int i = 0; i < a.rank; ++i) {
    auto const axis = static_cast<std::size_t>(i);
    a.set_shape(i, sizes[axis]);
    a.set_stride(i, strides[axis]);
  }
  // data_ptr() of a lazy copy makes the copy.
  if constexpr (requires { t.const_data_ptr(); })
    a.data = t.const_data_ptr();
  else
    a.data = t.data_ptr();
  return a;
}

}  // namespace detail

/// The n × d view of a tensor, tokens in rows. Nothing is copied: the view is valid as long as the
/// tensor's storage is, that is while any handle to it lives, and sees what is later written there.
///
/// @tparam T       float (kFloat), double (kDouble), f16 (kHalf) or bf16 (kBFloat16)
/// @tparam Memory  host_memory: device CPU; device_memory: device CUDA, after synchronising with
///                 the stream that computes the tensor
/// @param  t  2 axes, tokens × hidden; or up to 4, those ahead of these two of length 1
/// @throws std::invalid_argument that names the member and its value, if the tensor is undefined,
///         not strided (sparse, MKL-DNN) or lazily negated; scalar_type is not T; the device is
///         another; there are fewer than 2 or more than 4 axes, or an axis ahead of the last two is
///         longer than 1; a size is less than 1; a stride is zero (expand()) or negative, or
///         reaches too far; the data pointer is null or not aligned to the element
/// @note   O(1). A tensor that requires grad can be viewed; run the model under a
///         c10::InferenceMode guard anyway
template <class T, class Memory = host_memory, torch_tensor X>
view<T, Memory> from_torch(X const& t) {
  return detail::view_of<T, Memory>(detail::describe_torch("rflow::from_torch", t));
}

/// Handles that die at the end of the statement: keep them in a variable first.
template <class T, class Memory = host_memory, torch_tensor X>
view<T, Memory> from_torch(X const&&) = delete;

/// The layers of a tensor of 3 axes, sites × tokens × hidden, or of 4 with a batch of 1 after the
/// sites, as torch::stack() makes of hidden states. Otherwise as from_torch.
template <class T, class Memory = host_memory, torch_tensor X>
layer_stack<T, Memory> stack_from_torch(X const& t) {
  return detail::stack_of<T, Memory>(detail::describe_torch("rflow::stack_from_torch", t));
}
template <class T, class Memory = host_memory, torch_tensor X>
layer_stack<T, Memory> stack_from_torch(X const&&) = delete;

/// The layers of a list of tensors, one a site, each as from_torch takes it: a
/// std::vector<at::Tensor> of hidden states. The list has to outlive the stack.
/// @throws std::invalid_argument as from_torch and layer_stack
template <class T, class Memory = host_memory, class Range>
requires torch_tensor<element_of<Range>> layer_stack<T, Memory> stack_from_torch(
    Range const& tensors, std::vector<std::string> names = {}) {
  return detail::stack_of_range<T, Memory>(tensors, std::move(names), [](auto const& t) {
    return detail::view_of<T, Memory>(detail::describe_torch("rflow::stack_from_torch", t));
  });
}
template <class T, class Memory = host_memory, class Range>
requires torch_tensor<element_of<Range>> layer_stack<T, Memory> stack_from_torch(
    Range const&&, std::vector<std::string> = {})
= delete;

/// Calls f with the view of a tensor of whatever type: view<f16>, view<bf16>, view<float> or
/// view<double>. All four calls must return the same type.
/// @throws std::invalid_argument as from_torch, and if the type is another; what f throws
template <class Memory = host_memory, torch_tensor X, class Function>
auto visit(X const& t, Function&& f) {
  return detail::visit_view<Memory>(detail::describe_torch("rflow::visit", t),
                                    std::forward<Function>(f));
}

}  // namespace rflow
