// SPDX-License-Identifier: Apache-2.0
#pragma once

// From ggml and llama.cpp: ggml_tensor, matched by its members. Axes are counted from the fastest
// (ne[0] is the hidden width, ne[1] the tokens) and strides in bytes. In a cb_eval callback the
// data are valid until it returns: measure there, with flow_monitor, or copy.

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <rflow/runtime.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A struct with the members of ggml_tensor. Needs ggml.h and ggml-backend.h (llama.h brings both).
template <class X>
concept ggml_tensor_like = requires(X const& t) {
  static_cast<int>(t.type);
  std::string_view(ggml_type_name(t.type));
  static_cast<std::ptrdiff_t>(t.ne[3]);
  static_cast<std::size_t>(t.nb[3]);
  static_cast<void const*>(t.data);
  static_cast<bool>(ggml_backend_buffer_is_host(t.buffer));
};

namespace detail {

template <ggml_tensor_like X>
foreign_array describe_ggml(char const* where, X const* t) {
  foreign_array a;
  a.where = where;
  a.shape_field = "ne";
  a.stride_field = "nb";
  a.reversed = a.byte_units = true;
  if (t == nullptr) a.fail("the tensor is NULL");
  switch (static_cast<int>(t->type)) {
    case 0: a.type = element::f32; break;
    case 1: a.type = element::f16; break;
    case 28: a.type = element::f64; break;
    case 30: a.type = element::bf16; break;
    default: break;
  }
  a.type_name = ggml_type_name(t->type);
  // Without a buffer the data are in the memory of a ggml_context.
  a.on_host = t->buffer == nullptr || ggml_backend_buffer_is_host(t->buffer);
  if (!a.on_host) a.place = "a device (copy them with ggml_backend_tensor_get)";
  a.set_rank(4);
  for (int i = 0; i < 4; ++i) a.set_shape(i, t->ne[3 - i]);
  if (a.type == element::none) return a;  // strides of packed types count blocks
  for (int i = 0; i < 4; ++i) a.set_stride(i, t->nb[3 - i]);
  a.data = t->data;
  return a;
}

}  // namespace detail

/// The n × d view of a tensor, tokens in rows: n = ne[1], d = ne[0]. Nothing is copied: in a
/// callback the view is valid until the callback returns, else as long as the tensor's buffer.
///
/// @tparam T  float, double, f16 or bf16: what type has to say
/// @param  t  ne[2] and ne[3] are 1. Views and permuted tensors keep their strides
/// @throws std::invalid_argument that names the member and its value, if t is NULL; type is not T
///         (quantised types among them); the buffer is not host memory; ne[2] or ne[3] is not 1; an
///         extent is less than 1 or all of them more than memory can hold; a stride nb is 0, no
///         multiple of the element or reaches too far; data is NULL or not aligned to the element
/// @note   O(1); allocates nothing unless it throws. Exceptions must not leave a C callback
template <class T, ggml_tensor_like X>
view<T> from_ggml(X const* t) {
  return detail::view_of<T, host_memory>(detail::describe_ggml("rflow::from_ggml", t));
}

/// The layers of a tensor of ne = hidden, tokens, sites, 1 (or hidden, tokens, 1, sites). Otherwise
/// as from_ggml.
template <class T, ggml_tensor_like X>
layer_stack<T> stack_from_ggml(X const* t) {
  detail::foreign_array a = detail::describe_ggml("rflow::stack_from_ggml", t);
  if (a.shape[0] == 1) std::swap(a.shape[0], a.shape[1]), std::swap(a.stride[0], a.stride[1]);
  return detail::stack_of<T, host_memory>(std::move(a));
}

/// Calls f with the view of a tensor of whatever type: view<f16>, view<bf16>, view<float> or
/// view<double>. All four calls must return the same type.
/// @throws std::invalid_argument as from_ggml, and if the type is another; what f throws
template <ggml_tensor_like X, class Function>
auto visit(X const* t, Function&& f) {
  return detail::visit_view<host_memory>(detail::describe_ggml("rflow::visit", t),
                                         std::forward<Function>(f));
}

/// The site of a tensor in llama.cpp's graphs, by its name.
///
/// @param  name  ggml_tensor::name
/// @return 0 for the token embedding ("embd", in older versions "inp_embd"), i + 1 for what leaves
///         block i ("l_out-i", i from 0), −1 for all others
/// @note   The embedding is what enters the first block only in models that neither scale it nor add
///         positions to it. The rows of the last block are those whose outputs were asked for:
///         set batch.logits of every token, or the site falls short
constexpr std::ptrdiff_t llama_site(std::string_view name) noexcept {
  if (name == "embd" || name == "inp_embd") return 0;
  constexpr std::string_view block = "l_out-";
  if (name.size() <= block.size() || name.size() > block.size() + 6 ||
      name.substr(0, block.size()) != block)
    return -1;
  std::ptrdiff_t index = 0;
  for (char const c : name.substr(block.size())) {
    if (c < '0' || c > '9') return -1;
    index = 10 * index + (c - '0');
  }
  return index + 1;
}

}  // namespace rflow
