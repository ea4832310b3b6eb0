// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the converters of dlpack.hpp, torch.hpp, onnxruntime.hpp, ggml.hpp and openvino.hpp share:
// each says in one form what its runtime says about an array, and one set of checks makes it a view
// or a stack. Include those headers, not this one.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <rflow/view.hpp>

namespace rflow::detail {

/// The element types that become views; none is anything else.
enum class element : std::uint8_t { f16, bf16, f32, f64, none };

template <scalar T>
inline constexpr element element_as = std::is_same_v<T, f16>     ? element::f16
                                      : std::is_same_v<T, bf16>  ? element::bf16
                                      : std::is_same_v<T, float> ? element::f32
                                                                 : element::f64;

constexpr char const* to_string(element type) {
  switch (type) {
    case element::f16: return "f16";
    case element::bf16: return "bf16";
    case element::f32: return "f32";
    case element::f64: return "f64";
    case element::none: break;
  }
  return "none";
}

/// An array as a runtime describes it. Nothing is allocated for names of up to 15 characters, so
/// that a valid array can be viewed in a callback.
struct foreign_array {
  static constexpr int most_axes = 4;

  char const* where = "";           // the function that the user called
  char const* type_field = "type";  // the runtime's own names, for messages
  char const* shape_field = "shape";
  char const* stride_field = "strides";
  bool reversed = false;    // the runtime counts axes from the fastest
  bool byte_units = false;  // strides are in bytes

  void const* data = nullptr;  // the first element
  element type = element::none;
  std::string type_name;
  bool on_host = true, on_device = false;  // who can read it
  std::string place = "CPU";
  bool dense = false;  // no strides: the last axis is the fastest
  int rank = 0;
  std::ptrdiff_t shape[most_axes] = {}, stride[most_axes] = {};

  std::string field(char const* name, int axis) const {
    return std::string(name) + "[" + std::to_string(reversed ? rank - 1 - axis : axis) + "]";
  }

  [[noreturn]] void fail(std::string const& what) const { reject(where, what); }

  /// Sets the rank, after which axes can be set.
  template <class Int>
  void set_rank(Int n) {
    if (std::cmp_less(n, 2) || std::cmp_greater(n, most_axes))
      fail("an array of " + std::to_string(n) + " axes; 2 to " + std::to_string(int{most_axes}) +
           " expected");
    rank = static_cast<int>(n);
  }
  template <class Int>
  void set_shape(int axis, Int n) {
    if (!std::in_range<std::ptrdiff_t>(n) || std::cmp_less_equal(n, 0))
      fail(field(shape_field, axis) + " is " + std::to_string(n) + ", at least 1 expected");
    shape[axis] = static_cast<std::ptrdiff_t>(n);
  }
  template <class Int>
  void set_stride(int axis, Int n) {
    if (shape[axis] == 1) return;  // never used, and some runtimes leave anything there
    if (!std::in_range<std::ptrdiff_t>(n) || std::cmp_less_equal(n, 0))
      fail(field(stride_field, axis) + " is " + std::to_string(n) +
           ", a positive one expected for " + std::to_string(shape[axis]) +
           " elements (make it contiguous first)");
    stride[axis] = static_cast<std::ptrdiff_t>(n);
  }
};

/// a · b in a, or false on overflow. Neither is negative.
constexpr bool scale(std::ptrdiff_t& a, std::ptrdiff_t b) {
  if (b != 0 && a > (std::numeric_limits<std::ptrdiff_t>::max)() / b) return false;
  a *= b;
  return true;
}

/// Every check that does not depend on what the axes mean; strides come out in elements, those of
/// axes of length 1 as 0.
template <class T, class Memory>
void require_readable(foreign_array& a) {
  static_assert(std::is_same_v<Memory, host_memory> || std::is_same_v<Memory, device_memory>);
  if (a.type != element_as<T>)
    a.fail(std::string(a.type_field) + " is " + a.type_name + ", " + to_string(element_as<T>) +
           " expected");
  bool const host = std::is_same_v<Memory, host_memory>;
  if (!(host ? a.on_host : a.on_device))
    a.fail("the data live on " + a.place + ", " +
           (host ? "memory that the host can read expected (for CUDA memory ask for a view in "
                   "device_memory)"
                 : "CUDA memory expected"));

  constexpr std::ptrdiff_t size = sizeof(T);
  auto const in_shape = [&a] {
    std::string text;
    for (int i = 0; i < a.rank; ++i) text += (i == 0 ? "" : " x ") + std::to_string(a.shape[i]);
    return text;
  };
  std::ptrdiff_t bytes = size;
  for (int i = 0; i < a.rank; ++i)
    if (!scale(bytes, a.shape[i])) a.fail(in_shape() + " elements are more than memory can hold");

  std::ptrdiff_t step = 1, last = 0;  // last: the last element's distance from the first, in bytes
  for (int i = a.rank - 1; i >= 0; --i) {
    std::ptrdiff_t& stride = a.stride[i];
    if (a.shape[i] == 1) {
      stride = 0;
    } else if (a.dense) {
      stride = step;
      step *= a.shape[i];
    } else {
      if (a.byte_units && stride % size != 0)
        a.fail(a.field(a.stride_field, i) + " is " + std::to_string(stride) +
               " bytes, no multiple of the element's " + std::to_string(size));
      std::ptrdiff_t const given = stride;
      std::ptrdiff_t reach = a.byte_units ? stride : size;
      if (a.byte_units) stride /= size;
      if ((!a.byte_units && !scale(reach, stride)) || !scale(reach, a.shape[i] - 1) ||
          reach > (std::numeric_limits<std::ptrdiff_t>::max)() - size - last)
        a.fail(a.field(a.stride_field, i) + " is " + std::to_string(given) + ", too far for " +
               std::to_string(a.shape[i]) + " elements");
      last += reach;
    }
  }

  if (a.data == nullptr) a.fail("data is NULL for " + in_shape() + " elements");
  if (reinterpret_cast<std::uintptr_t>(a.data) % alignof(T) != 0)
    a.fail("data is not aligned to the element's " + std::to_string(alignof(T)) + " bytes");
}

/// n × d from the last two axes; those ahead of them (a batch) have length 1.
template <class T, class Memory>
view<T, Memory> view_of(foreign_array a) {
  require_readable<T, Memory>(a);
  int const rows = a.rank - 2, cols = a.rank - 1;
  for (int i = 0; i < rows; ++i)
    if (a.shape[i] != 1)
      a.fail(a.field(a.shape_field, i) + " is " + std::to_string(a.shape[i]) +
             ", 1 expected ahead of tokens x hidden (take one of a batch at a time)");
  return {static_cast<T const*>(a.data), a.shape[rows], a.shape[cols], a.stride[rows],
          a.stride[cols]};
}

/// Sites × tokens × hidden, or sites × 1 × tokens × hidden.
template <class T, class Memory>
layer_stack<T, Memory> stack_of(foreign_array a) {
  require_readable<T, Memory>(a);
  if (a.rank < 3) a.fail("an array of 2 axes; sites x tokens x hidden expected");
  if (a.rank == 4 && a.shape[1] != 1)
    a.fail(a.field(a.shape_field, 1) + " is " + std::to_string(a.shape[1]) +
           ", 1 expected between sites and tokens (take one of a batch at a time)");
  int const rows = a.rank - 2, cols = a.rank - 1;
  return layer_stack<T, Memory>(static_cast<T const*>(a.data),
                                stack_shape{a.shape[0], a.shape[rows], a.shape[cols]},
                                stack_strides{a.stride[0], a.stride[rows], a.stride[cols]});
}

/// Calls f with the view, whatever the type.
template <class Memory, class Function>
auto visit_view(foreign_array a, Function&& f) {
  switch (a.type) {
    case element::f16: return f(view_of<f16, Memory>(std::move(a)));
    case element::bf16: return f(view_of<bf16, Memory>(std::move(a)));
    case element::f32: return f(view_of<float, Memory>(std::move(a)));
    case element::f64: return f(view_of<double, Memory>(std::move(a)));
    case element::none: break;
  }
  a.fail(std::string(a.type_field) + " is " + a.type_name + "; f16, bf16, f32 or f64 expected");
}

/// A stack from a range of a runtime's tensors, one a site; to_view makes each a view.
template <class T, class Memory, class Range, class ToView>
layer_stack<T, Memory> stack_of_range(Range const& tensors, std::vector<std::string> names,
                                      ToView&& to_view) {
  std::vector<view<T, Memory>> views;
  for (auto const& tensor : tensors) views.push_back(to_view(tensor));
  return layer_stack<T, Memory>(views, std::move(names));
}

}  // namespace rflow::detail
