// SPDX-License-Identifier: Apache-2.0
#pragma once

// From DLPack, the struct by which PyTorch, JAX, CuPy, TensorFlow, TVM and NumPy hand each other
// arrays; and back, for results. The structs are matched by their members, so any version of
// dlpack.h, and structs that only look like it, will do; none is included.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <rflow/runtime.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A struct with the members of DLTensor, DLPack 0.5 and later.
template <class X>
concept dlpack_tensor = requires(X const& x) {
  { x.data } -> std::convertible_to<void const*>;
  static_cast<std::int32_t>(x.device.device_type);
  { x.device.device_id } -> std::convertible_to<std::int32_t>;
  { x.ndim } -> std::convertible_to<std::int32_t>;
  { x.dtype.code } -> std::convertible_to<int>;
  { x.dtype.bits } -> std::convertible_to<int>;
  { x.dtype.lanes } -> std::convertible_to<int>;
  { x.shape } -> std::convertible_to<std::int64_t const*>;
  { x.strides } -> std::convertible_to<std::int64_t const*>;
  { x.byte_offset } -> std::convertible_to<std::uint64_t>;
};

namespace detail {

// nanobind names the member without the underscore.
template <class M>
requires requires(M& m) { m.dl_tensor; }
constexpr auto& dlpack_inner(M& m) { return m.dl_tensor; }
template <class M>
requires requires(M& m) { m.dltensor; }
constexpr auto& dlpack_inner(M& m) { return m.dltensor; }

}  // namespace detail

/// A struct with the members of DLManagedTensor or of DLManagedTensorVersioned.
template <class M>
concept dlpack_managed = requires(M& m) {
  requires dlpack_tensor<std::remove_cvref_t<decltype(detail::dlpack_inner(m))>>;
  m.manager_ctx;
  m.deleter(&m);
};

namespace detail {

template <class M>
concept dlpack_versioned = dlpack_managed<M> && requires(M const& m) {
  m.version.major;
  m.version.minor;
  m.flags;
};

inline std::string dlpack_type_name(int code, int bits, int lanes) {
  char const* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  std::string name = code >= 0 && code < 7 ? kinds[code] : "code " + std::to_string(code) + " of ";
  name += std::to_string(bits);
  return lanes == 1 ? name : name + " x " + std::to_string(lanes) + " lanes";
}

inline std::string dlpack_device_name(int type, int id) {
  char const* const names[] = {"?",      "CPU",       "CUDA",      "CUDA host",    "OpenCL",
                               "?",      "?",         "Vulkan",    "Metal",        "VPI",
                               "ROCm",   "ROCm host", "extension", "CUDA managed", "oneAPI",
                               "WebGPU", "Hexagon",   "MAIA"};
  bool const known = type > 0 && type < static_cast<int>(std::size(names)) && *names[type] != '?';
  return (known ? names[type] : "device type " + std::to_string(type)) + " " + std::to_string(id);
}

template <dlpack_tensor X>
foreign_array describe_dlpack(char const* where, X const& x) {
  foreign_array a;
  a.where = where;
  a.type_field = "dtype";
  int const code = x.dtype.code, bits = x.dtype.bits, lanes = x.dtype.lanes;
  if (lanes == 1) {
    if (code == 2) a.type = bits == 16 ? element::f16 : bits == 32 ? element::f32 : a.type;
    if (code == 2 && bits == 64) a.type = element::f64;
    if (code == 4 && bits == 16) a.type = element::bf16;
  }
  if (a.type == element::none)
    a.type_name = dlpack_type_name(code, bits, lanes);
  else
    a.type_name = to_string(a.type);

  auto const device = static_cast<std::int32_t>(x.device.device_type);
  bool const pinned = device == 3, managed = device == 13;
  a.on_host = device == 1 || pinned || managed || device == 11;
  a.on_device = device == 2 || pinned || managed;
  if (device != 1) a.place = dlpack_device_name(device, x.device.device_id);

  a.set_rank(x.ndim);
  if (x.shape == nullptr) a.fail("shape is NULL for " + std::to_string(x.ndim) + " axes");
  a.dense = x.strides == nullptr;
  for (int i = 0; i < a.rank; ++i) {
    a.set_shape(i, x.shape[i]);
    if (!a.dense) a.set_stride(i, x.strides[i]);
  }
  if (!std::in_range<std::ptrdiff_t>(x.byte_offset))
    a.fail("byte_offset is " + std::to_string(x.byte_offset) + ", more than memory can hold");
  if (x.data != nullptr) a.data = static_cast<std::byte const*>(x.data) + x.byte_offset;
  return a;
}

/// The version can be read whatever it is; the tensor only if the major one is known.
template <class M>
void require_dlpack_version(char const* where, M const& m) {
  if constexpr (dlpack_versioned<M>)
    if (m.version.major != 1)
      reject(where, "version is " + std::to_string(m.version.major) + "." +
                        std::to_string(m.version.minor) + ", 1.x expected");
}

template <dlpack_managed M>
foreign_array describe_dlpack(char const* where, M const& m) {
  require_dlpack_version(where, m);
  return describe_dlpack(where, dlpack_inner(m));
}

}  // namespace detail

/// A managed tensor that was taken over: its deleter runs once, when this object dies.
///
///     auto owner = rflow::take_dlpack(managed);
///     auto x = rflow::from_dlpack<float>(owner);     // valid as long as owner
template <dlpack_managed M>
class dlpack_owner {
 public:
  /// Takes over; not null.
  explicit dlpack_owner(M* managed) : managed_(managed) {}

  /// The managed struct, still owned by this object.
  M const& managed() const { return *managed_; }

 private:
  struct call_deleter {
    void operator()(M* m) const {
      if (m->deleter != nullptr) m->deleter(m);
    }
  };
  std::unique_ptr<M, call_deleter> managed_;
};

/// Takes over a managed tensor, legacy or versioned: whatever happens from here on, its deleter
/// runs once. In Python's protocol rename the capsule to "used_dltensor" before.
/// @param  managed  what a producer made
/// @throws std::invalid_argument if managed is NULL, or its major version is not 1 (after calling
///         the deleter, which is all that may be done with it)
template <dlpack_managed M>
dlpack_owner<M> take_dlpack(M* managed) {
  if (managed == nullptr) detail::reject("rflow::take_dlpack", "the managed tensor is NULL");
  dlpack_owner<M> owner(managed);
  detail::require_dlpack_version("rflow::take_dlpack", owner.managed());
  return owner;
}

namespace detail {

template <class M>
foreign_array describe_dlpack(char const* where, dlpack_owner<M> const& owner) {
  return describe_dlpack(where, owner.managed());
}

}  // namespace detail

/// What from_dlpack takes: a DLTensor, a managed tensor of either kind (neither is taken over), or
/// what take_dlpack returned.
template <class X>
concept dlpack_source = requires(X const& x) {
  { detail::describe_dlpack("", x) } -> std::same_as<detail::foreign_array>;
};

/// The n × d view of a DLPack tensor, tokens in rows. Nothing is copied: the view is valid as long
/// as the tensor is, that is until its deleter has run.
///
/// @tparam T       float, double, f16 or bf16: what dtype has to say
/// @tparam Memory  host_memory: the device has to be CPU, CUDA host (pinned), ROCm host or CUDA
///                 managed; device_memory: CUDA, CUDA host or CUDA managed. A struct carries no
///                 stream: synchronise with the producer's work first
/// @param  x  2 axes, tokens × hidden; or up to 4, those ahead of these two of length 1
/// @throws std::invalid_argument that names the member and its value, if
///         - dtype is not T, or lanes is not 1;
///         - the device is not one of those above;
///         - ndim is not 2 to 4, or an axis ahead of the last two is longer than 1;
///         - shape is NULL, or an extent is less than 1;
///         - elements or strides reach further than std::ptrdiff_t counts bytes;
///         - a stride is zero (a broadcast) or negative; any will do for an axis of length 1, and
///           NULL means dense, last axis fastest;
///         - data is NULL, or data + byte_offset is not aligned to the element;
///         - the major version of a versioned struct is not 1
/// @note   no allocation, O(1)
template <class T, class Memory = host_memory, dlpack_source X>
view<T, Memory> from_dlpack(X const& x) {
  return detail::view_of<T, Memory>(detail::describe_dlpack("rflow::from_dlpack", x));
}

/// Owners that die at the end of the statement: keep them in a variable first.
template <class T, class Memory = host_memory, class M>
view<T, Memory> from_dlpack(dlpack_owner<M>&&) = delete;

/// The layers of a DLPack tensor of 3 axes, sites × tokens × hidden, or of 4 with a batch of 1 after
/// the sites. Otherwise as from_dlpack.
template <class T, class Memory = host_memory, dlpack_source X>
layer_stack<T, Memory> stack_from_dlpack(X const& x) {
  return detail::stack_of<T, Memory>(detail::describe_dlpack("rflow::stack_from_dlpack", x));
}
template <class T, class Memory = host_memory, class M>
layer_stack<T, Memory> stack_from_dlpack(dlpack_owner<M>&&) = delete;

/// Calls f with the view of a DLPack tensor of whatever type: view<f16>, view<bf16>, view<float> or
/// view<double>. All four calls must return the same type.
/// @throws std::invalid_argument as from_dlpack, and if the type is another; what f throws
template <class Memory = host_memory, dlpack_source X, class Function>
auto visit(X const& x, Function&& f) {
  return detail::visit_view<Memory>(detail::describe_dlpack("rflow::visit", x),
                                    std::forward<Function>(f));
}

// ---- results for others -------------------------------------------------------------------------

/// Hands values over as a managed tensor, without copying them.
///
/// @tparam M       DLManagedTensor or DLManagedTensorVersioned, from the dlpack.h that you include
/// @param  values  row-major; float, double, f16 or bf16
/// @param  shape   extents, slowest first
/// @return a tensor on the CPU, with strides, byte_offset 0 and, if versioned, version 1.0. Whoever
///         receives it calls its deleter, which frees values and struct
/// @throws std::invalid_argument if the values do not make that shape
template <dlpack_managed M, scalar T>
M* to_dlpack(std::vector<T> values, std::vector<std::int64_t> shape) {
  std::size_t count = 1;
  bool fits = true;
  for (std::int64_t const n : shape) fits = fits && n >= 0;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) {
    count = 0;
  } else {
    for (std::int64_t const n : shape) {
      fits = fits && count <= values.size() / static_cast<std::size_t>(n);
      count *= static_cast<std::size_t>(n);
    }
  }
  if (!fits || count != values.size()) {
    std::string text;
    for (std::int64_t const n : shape) text += (text.empty() ? "" : " x ") + std::to_string(n);
    detail::reject("rflow::to_dlpack",
                   std::to_string(values.size()) + " values do not make " + text);
  }

  struct held {
    M managed{};
    std::vector<T> values;
    std::vector<std::int64_t> shape, strides;
  };
  auto owner = std::make_unique<held>();
  owner->values = std::move(values);
  owner->shape = std::move(shape);
  owner->strides.resize(owner->shape.size());
  std::int64_t step = 1;
  for (std::size_t i = owner->shape.size(); i-- > 0;) {
    owner->strides[i] = step;
    step *= owner->shape[i];
  }

  M& m = owner->managed;
  auto& t = detail::dlpack_inner(m);
  t.data = owner->values.data();
  t.device.device_type = static_cast<std::remove_cvref_t<decltype(t.device.device_type)>>(1);
  t.device.device_id = 0;
  t.ndim = static_cast<std::remove_cvref_t<decltype(t.ndim)>>(owner->shape.size());
  t.dtype.code = std::is_same_v<T, bf16> ? 4 : 2;
  t.dtype.bits = static_cast<std::uint8_t>(8 * sizeof(T));
  t.dtype.lanes = 1;
  t.shape = owner->shape.data();
  t.strides = owner->strides.data();
  t.byte_offset = 0;
  if constexpr (detail::dlpack_versioned<M>) {
    m.version.major = 1;
    m.version.minor = 0;
    m.flags = 0;
  }
  m.manager_ctx = owner.get();
  m.deleter = [](M* self) { delete static_cast<held*>(self->manager_ctx); };
  return &owner.release()->managed;
}

/// Hands over a list of results: one axis of doubles, NaN where there is no answer.
template <dlpack_managed M>
M* to_dlpack(std::vector<measured> const& results) {
  return to_dlpack<M>(std::vector<double>(results.begin(), results.end()),
                      {static_cast<std::int64_t>(results.size())});
}

/// Hands over a table of results, such as a cka_table: rows × columns of doubles.
template <dlpack_managed M, class Table>
requires requires(Table const& table) {
  { table.rows() } -> std::convertible_to<std::ptrdiff_t>;
  { table.cols() } -> std::convertible_to<std::ptrdiff_t>;
  { table(std::ptrdiff_t{}, std::ptrdiff_t{}) } -> std::convertible_to<double>;
}
M* to_dlpack(Table const& table) {
  std::vector<double> values;
  for (std::ptrdiff_t i = 0; i < table.rows(); ++i)
    for (std::ptrdiff_t j = 0; j < table.cols(); ++j)
      values.push_back(static_cast<double>(table(i, j)));
  return to_dlpack<M>(std::move(values), {table.rows(), table.cols()});
}

}  // namespace rflow
