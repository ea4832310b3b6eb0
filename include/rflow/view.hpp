// SPDX-License-Identifier: Apache-2.0
#pragma once

// The vocabulary of rflow: what activations look like (view, layer_stack, adapt), what an answer
// looks like (measured, status), and what can go wrong (format_error). Standard library only.
//
// A row is a token, a column is a hidden feature, a site is one representation in the residual
// stream: the embedding output or the raw output of a block. Nothing here owns or copies
// activations; whoever made them keeps them alive.

// Before anything that an older standard stumbles over.
static_assert(
    __cplusplus >= 202002L,
    "rflow: C++20 is needed: compile with -std=c++20, or in CMake link rflow::rflow, which "
    "asks for it");
// With exceptions switched off the macro is undefined: the compiler rejects this line, and prints it.
static_assert(__cpp_exceptions, "rflow: it throws exceptions: compile without -fno-exceptions");

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

// Functors shared by g++ and nvcc need the annotation; it is gone again at the end of the file.
#ifdef __CUDACC__
#define RFLOW_HD __host__ __device__
#else
#define RFLOW_HD
#endif

namespace rflow {

inline constexpr struct { int major, minor, patch; } version{0, 1, 0};

// ---- memory spaces ------------------------------------------------------------------------------

/// Memory that the CPU can read. Part of a view's type, so that mixing spaces does not compile.
struct host_memory {};
/// Memory that a CUDA device can read.
struct device_memory {};

// ---- scalars ------------------------------------------------------------------------------------

/// IEEE 754 binary16, as stored. Converts to float exactly; every metric widens it first.
struct f16 {
  std::uint16_t bits;  ///< sign, 5 bits of exponent, 10 of fraction

  /// The exact value as float; NaN and infinity are kept. Integer steps and one exact subtraction,
  /// so that it vectorises and subnormals survive flush-to-zero.
  RFLOW_HD constexpr operator float() const {
    std::uint32_t const magnitude = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
    std::uint32_t const sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    std::uint32_t const normal = magnitude + (112u << 23);
    std::uint32_t const special = magnitude + (224u << 23);
    std::uint32_t const subnormal = __builtin_bit_cast(
        std::uint32_t, __builtin_bit_cast(float, magnitude + (113u << 23)) - 0x1p-14f);
    std::uint32_t const value = magnitude < (1u << 23)       ? subnormal
                                : magnitude >= (0x1fu << 23) ? special
                                                             : normal;
    return __builtin_bit_cast(float, value | sign);
  }

  /// The nearest binary16, ties to even; too large becomes infinity.
  static constexpr f16 nearest(float x) {
    std::uint32_t const in = std::bit_cast<std::uint32_t>(x);
    auto const sign = static_cast<std::uint16_t>((in >> 16) & 0x8000u);
    std::uint32_t const magnitude = in & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {
      // Below 2^-14 the spacing is 2^-24: adding 2^-1 rounds to it in float arithmetic.
      float const rounded = std::bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(rounded) & 0x7ffu))};
    }
    std::uint32_t const odd = (magnitude >> 13) & 1u;
    std::uint32_t const rounded = magnitude - (112u << 23) + 0xfffu + odd;
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
  }
};

/// bfloat16: the upper half of a float, as stored.
struct bf16 {
  std::uint16_t bits;  ///< sign, 8 bits of exponent, 7 of fraction

  /// The exact value as float.
  RFLOW_HD constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }

  /// The nearest bfloat16, ties to even.
  static constexpr bf16 nearest(float x) {
    std::uint32_t const in = std::bit_cast<std::uint32_t>(x);
    if ((in & 0x7fffffffu) > 0x7f800000u)
      return {static_cast<std::uint16_t>((in >> 16) | 0x40u)};  // keep it a NaN
    return {static_cast<std::uint16_t>((in + 0x7fffu + ((in >> 16) & 1u)) >> 16)};
  }
};

namespace detail {

/// A type of another library that may hold the bits of a 16-bit float.
template <class Other>
concept sixteen_bits = sizeof(Other) == 2 && std::is_trivially_copyable_v<Other> &&
                       (!std::is_integral_v<Other> || std::same_as<Other, std::uint16_t>);

}  // namespace detail

/// Another library's binary16 where it lies, without a copy: _Float16, __half, Eigen::half, or bits in
/// std::uint16_t.
///
///     rflow::view(rflow::as_f16(pointer), tokens, hidden)
template <detail::sixteen_bits Other>
requires(!std::same_as<Other, bf16>) f16 const* as_f16(Other const* values) noexcept {
  return reinterpret_cast<f16 const*>(values);
}

/// The same for bfloat16: __bf16, __nv_bfloat16, Eigen::bfloat16, or bits in std::uint16_t.
template <detail::sixteen_bits Other>
requires(!std::same_as<Other, f16>) bf16 const* as_bf16(Other const* values) noexcept {
  return reinterpret_cast<bf16 const*>(values);
}

/// What activations may be stored as.
template <class T>
concept scalar = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, f16> ||
    std::same_as<T, bf16>;

/// What products of T are formed in: double for double, float for the rest. Sums over tokens and
/// every statistic are double whatever T is.
template <scalar T>
using compute_t = std::conditional_t<std::same_as<T, double>, double, float>;

// ---- answers ------------------------------------------------------------------------------------

/// Why a value is not a number.
enum class status : std::uint8_t {
  ok,
  too_few_rows,    ///< fewer tokens than the estimator needs
  too_few_sites,   ///< a chain of one site has no steps
  zero_rows,       ///< too few rows with a non-zero norm, so no direction to compare
  constant_layer,  ///< all tokens have the same representation (to rounding)
  ill_conditioned,  ///< rounding leaves fewer digits than are promised, even with products in double;
                    ///< p over shuffled tokens: too many of them outweigh the others
  zero_step,        ///< a layer equals the one before it (to rounding): the path has no direction
  zero_bandwidth,    ///< the median distance is 0, so an RBF kernel has no scale
  non_finite,        ///< the data hold a NaN or an infinity
  out_of_range,      ///< a figure that double does not have: scale the data
  diverged,          ///< an optimisation ended in numbers that are not finite
  not_requested,     ///< the option that would compute it is off
  dependent_tokens,  ///< neighbouring tokens resemble each other too far for so few of them
  different_widths,  ///< sites of several widths have no difference and no cosine
};

/// The reason in words, for reports.
constexpr std::string_view to_string(status why) {
  switch (why) {
    case status::ok: return "ok";
    case status::too_few_rows: return "too_few_rows";
    case status::too_few_sites: return "too_few_sites";
    case status::zero_rows: return "zero_rows";
    case status::constant_layer: return "constant_layer";
    case status::ill_conditioned: return "ill_conditioned";
    case status::zero_step: return "zero_step";
    case status::zero_bandwidth: return "zero_bandwidth";
    case status::non_finite: return "non_finite";
    case status::out_of_range: return "out_of_range";
    case status::diverged: return "diverged";
    case status::not_requested: return "not_requested";
    case status::dependent_tokens: return "dependent_tokens";
    case status::different_widths: return "different_widths";
  }
  return "unknown";
}

/// A scalar result. `value` is NaN exactly when `why` is not ok.
struct measured {
  double value = std::numeric_limits<double>::quiet_NaN();  ///< NaN if there is none
  status why = status::not_requested;                       ///< ok, or why there is none

  constexpr measured() = default;
  /// There is a value.
  constexpr measured(double x) : value(x), why(status::ok) {}
  /// There is none, for this reason.
  constexpr measured(status reason) : why(reason) {}

  /// The value, or NaN.
  constexpr operator double() const { return value; }
  /// Whether there is a value.
  constexpr bool ok() const { return why == status::ok; }
};

/// Where the first NaN or infinity of a site stands.
struct position {
  std::ptrdiff_t token = -1;    ///< row, from 0; −1 if there is none
  std::ptrdiff_t feature = -1;  ///< column

  /// Whether there is one.
  constexpr bool found() const { return token >= 0; }
};

/// A file that breaks the rules of its format. The text names the file, the byte offset and the
/// rule.
class format_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;

  /// @param file  its name
  /// @param byte  offset at which the rule is broken
  /// @param rule  what is wrong there
  format_error(std::string const& file, std::uint64_t byte, std::string const& rule)
      : std::runtime_error(file + ": byte " + std::to_string(byte) + ": " + rule) {}
};

// ---- views --------------------------------------------------------------------------------------

/// A number of tokens, features or sites, or a stride: any integer, also between braces, where the
/// size of a container would not become a signed number by itself. What a std::ptrdiff_t does not
/// hold is negative, and refused wherever it is used.
struct extent {
  std::ptrdiff_t value = 0;  ///< the number

  constexpr extent() = default;
  /// From any integer.
  template <class Integer>
  requires std::is_convertible_v<Integer, std::ptrdiff_t> &&
      (!std::is_floating_point_v<Integer>)constexpr extent(Integer x)
      : value(static_cast<std::ptrdiff_t>(x)) {}

  /// The number.
  constexpr operator std::ptrdiff_t() const { return value; }
};

namespace detail {

/// A container that dies at the end of the statement, and its elements with it. Of what a forwarding
/// reference deduces: lvalues deduce a reference.
template <class Container>
concept owning_temporary_container =
    !std::is_lvalue_reference_v<Container> &&
    !std::ranges::enable_borrowed_range<std::remove_cvref_t<Container>>;

/// Does not compile, and says what to do.
template <class X>
struct refuse_temporary {
  static_assert(sizeof(X) == 0,
                "rflow: a view owns nothing, and this temporary dies at the end of the statement. "
                "Keep it in a variable, and look at that");
};

}  // namespace detail

template <class T, class Memory = host_memory>
struct view;

namespace detail {

template <class T, class Memory>
void take_view(view<T, Memory> const&);
template <class X>
concept no_view = !requires(X const& x) {
  take_view(x);
};

/// Does not compile, and says what to do.
template <class X>
struct refuse_alone {
  static_assert(sizeof(X) == 0,
                "rflow: a view takes extents: write rflow::view(x, tokens, hidden), with x a "
                "pointer or a contiguous container; or rflow::as_view(x) for an Eigen matrix");
};

}  // namespace detail

/// n × d activations, tokens in rows. Never owns, never copies.
///
/// Strides count elements and may be anything, zero and negative included. A view is as valid as
/// the memory it looks at.
template <class T, class Memory>
struct view {
  static_assert(scalar<T>,
                "rflow: activations are float, double, rflow::f16 or rflow::bf16. A 16-bit type of "
                "another library: look at rflow::as_f16(pointer) or rflow::as_bf16(pointer)");

  T const* data = nullptr;        ///< the first feature of the first token
  std::ptrdiff_t rows = 0;        ///< n tokens
  std::ptrdiff_t cols = 0;        ///< d features
  std::ptrdiff_t row_stride = 0;  ///< from token to token, in elements
  std::ptrdiff_t col_stride = 1;  ///< from feature to feature

  constexpr view() = default;

  /// Tokens one after the other (row-major, dense).
  constexpr view(T const* p, extent n, extent d) : data(p), rows(n), cols(d), row_stride(d) {}

  /// With any strides, in elements.
  constexpr view(T const* p, extent n, extent d, extent between_rows, extent between_cols = 1)
      : data(p), rows(n), cols(d), row_stride(between_rows), col_stride(between_cols) {}

  /// A std::vector, std::span or other contiguous container that holds n × d values, row-major.
  /// @throws std::invalid_argument if it holds another number of values
  template <class Container>
  requires requires(Container const& c) {
    { c.data() } -> std::convertible_to<T const*>;
    { c.size() } -> std::convertible_to<std::size_t>;
  }
  constexpr view(Container const& values, extent n, extent d) : view(values.data(), n, d) {
    if (n < 0 || d < 0 || (d > 0 && n > (std::numeric_limits<std::ptrdiff_t>::max)() / d) ||
        static_cast<std::size_t>(n * d) != values.size())
      throw std::invalid_argument("rflow::view: " + std::to_string(values.size()) +
                                  " values do not make " + std::to_string(n) + " x " +
                                  std::to_string(d));
  }

  /// A container that dies at the end of the statement: does not compile, and says so.
  template <detail::owning_temporary_container Container>
  requires requires(Container const& c) {
    { c.data() } -> std::convertible_to<T const*>;
  }
  constexpr view(Container&&, extent, extent) {
    static_cast<void>(detail::refuse_temporary<Container>{});
  }

  /// Anything alone: does not compile, and says what to write.
  template <class X>
  requires detail::no_view<X>
  explicit constexpr view(X const&) { static_cast<void>(sizeof(detail::refuse_alone<X>)); }

  /// One element; not checked.
  RFLOW_HD constexpr T const& operator()(std::ptrdiff_t token, std::ptrdiff_t feature) const {
    return data[token * row_stride + feature * col_stride];
  }
};

template <class X>
requires detail::no_view<X> view(X const&)
->view<float>;
template <class T>
view(T const*, extent, extent) -> view<T>;
template <class T>
view(T*, extent, extent) -> view<T>;
template <class T>
view(T const*, extent, extent, extent, extent) -> view<T>;
template <class T>
view(T*, extent, extent, extent, extent) -> view<T>;
template <class Container>
view(Container const&, extent, extent)
    -> view<std::remove_cvref_t<decltype(*std::declval<Container const&>().data())>>;

/// How a foreign container becomes a view. Declared, not defined: specialise it with one static
/// member, `view<T, Memory> as_view(Container const&)`, and every metric accepts the container.
/// Add `static constexpr bool borrowed = true` if the container does not own its elements.
template <class Container>
struct adapt;

/// A view is its own view.
template <class T, class Memory>
struct adapt<view<T, Memory>> {
  static constexpr bool borrowed = true;  ///< it outlives the object it was made from
  /// x itself.
  static constexpr view<T, Memory> as_view(view<T, Memory> const& x) { return x; }
};

/// Anything with an adapt<> specialisation: views, and with eigen.hpp every Eigen object that has
/// storage (matrices, maps, refs, blocks). An Eigen expression has none: evaluate it first.
template <class X>
concept activations = requires(std::remove_cvref_t<X> const& x) {
  {adapt<std::remove_cvref_t<X>>::as_view(x).data};
};

namespace detail {

/// What a pointer points to, an array or a range holds.
template <class X>
struct held {
  using type = void;
};
template <class X>
requires std::is_pointer_v<X>
struct held<X> {
  using type = std::remove_cv_t<std::remove_pointer_t<X>>;
};
template <class X>
requires std::is_array_v<X>
struct held<X> {
  using type = std::remove_cv_t<std::remove_all_extents_t<X>>;
};
template <class X>
requires(!std::is_array_v<X>) && requires(X const& x) { *std::begin(x); }
struct held<X> {
  using type = std::remove_cvref_t<decltype(*std::begin(std::declval<X const&>()))>;
};
template <class X>
using held_t = typename held<X>::type;

template <class X>
concept stack_like = requires(X const& x) {
  typename X::scalar;
  typename X::memory;
  x.sites();
};
template <class X>
concept rows_of_their_own = !scalar<held_t<X>> && scalar<held_t<held_t<X>>>;
template <class X>
concept other_numbers = std::is_arithmetic_v<held_t<X>> ||
    (sizeof(std::conditional_t<std::is_void_v<held_t<X>>, long, held_t<X>>) == 2 &&
     std::is_trivially_copyable_v<held_t<X>>);

/// Why X is no activations, and what to write instead: exactly one of these fails. Every metric comes
/// here, through as_view.
template <class X>
struct refuse_argument {
  static constexpr bool numbers = scalar<held_t<X>>, rows = rows_of_their_own<X>,
                        layers = activations<held_t<X>>, stack = stack_like<X>,
                        others = !numbers && !rows && !layers && other_numbers<X>;
  static_assert(!numbers,
                "rflow: numbers alone do not say how many tokens they make. Write "
                "rflow::view(x, tokens, hidden), with x a pointer or a contiguous container; rows "
                "that are not dense: rflow::view(pointer, tokens, hidden, row_stride, col_stride)");
  static_assert(!rows,
                "rflow: rows in containers of their own are not one array. Put them into one "
                "container, row after row, and write rflow::view(values, tokens, hidden)");
  static_assert(!layers,
                "rflow: this takes one layer. Write layers[i]; or, for a metric of many layers "
                "(flow, variance, cka_matrix, probe_layers), rflow::layer_stack(layers)");
  static_assert(!stack,
                "rflow: this takes one layer. Write stack[site]; metrics of many layers are flow, "
                "variance, cka_matrix, cka_jackknife and probe_layers");
  static_assert(
      !others,
      "rflow: activations are float, double, rflow::f16 or rflow::bf16. Write "
      "rflow::view(rflow::as_f16(pointer), tokens, hidden), or as_bf16, for 16-bit floats "
      "of another type; integers have no scale: make floats of them");
  static_assert(numbers || rows || layers || stack || others,
                "rflow: these are no activations. Write rflow::view(pointer, tokens, hidden) of "
                "their memory, or specialise rflow::adapt for their type");
};

/// An object that owns its elements and dies at the end of the statement.
template <class X>
concept owning_activations = !std::is_lvalue_reference_v<X> && activations<X> && !requires {
  adapt<std::remove_cvref_t<X>>::borrowed;
};

/// The type of x's view; for what is no activations that of what it holds, so that the error about it
/// is the only one.
template <class X>
struct viewed {
  using type = view<std::conditional_t<scalar<held_t<X>>, held_t<X>, float>>;
};
template <activations X>
struct viewed<X> {
  using type = decltype(adapt<X>::as_view(std::declval<X const&>()));
};
template <class X>
using viewed_t = typename viewed<std::remove_cvref_t<X>>::type;

}  // namespace detail

/// The view of x.
template <activations X>
constexpr detail::viewed_t<X> as_view(X const& x) {
  return adapt<X>::as_view(x);
}

/// What is no activations: does not compile, and the message says what to write.
template <class X>
requires(!activations<X>) detail::viewed_t<X> as_view(X const&) {
  static_cast<void>(sizeof(detail::refuse_argument<X>));
  return {};
}

/// The view of an object that dies at the end of the statement: does not compile, and says so.
template <detail::owning_activations X>
constexpr detail::viewed_t<X> as_view(X&& x) {
  static_cast<void>(sizeof(detail::refuse_temporary<X>));
  return adapt<std::remove_cvref_t<X>>::as_view(x);
}

namespace detail {

template <class V>
struct view_traits;
template <class T, class Memory>
struct view_traits<view<T, Memory>> {
  using scalar = T;       ///< what activations are stored as
  using memory = Memory;  ///< where they live
};

template <class X>
using traits_of = view_traits<viewed_t<X>>;

template <class X>
struct memory_space {
  using type = host_memory;
};
template <activations X>
struct memory_space<X> {
  using type = typename traits_of<X>::memory;
};

[[noreturn]] inline void reject(char const* where, std::string const& what) {
  throw std::invalid_argument(std::string(where) + ": " + what);
}

/// Throws std::invalid_argument unless x has rows, columns and data.
template <class T, class Memory>
void require_shape(char const* where, view<T, Memory> const& x) {
  if (x.rows <= 0 || x.cols <= 0)
    reject(where, "activations are empty: " + std::to_string(x.rows) + " tokens x " +
                      std::to_string(x.cols) + " features");
  if (x.data == nullptr) reject(where, "activations have no data (null pointer)");
}

}  // namespace detail

template <class Range>
using element_of = std::remove_cvref_t<decltype(*std::begin(std::declval<Range&>()))>;

template <activations X>
using scalar_of = typename detail::traits_of<X>::scalar;
/// The memory space of X; host for what is no activations at all, so that the error is about that.
template <class X>
using memory_of = typename detail::memory_space<X>::type;

/// The backend a metric runs on when none is given: specialised in eigen.hpp for host memory, in
/// cuda.cuh for device memory.
template <class Memory>
struct default_backend {
  static_assert(sizeof(Memory) == 0,
                "rflow: no backend is included for this memory space. Host memory: include "
                "<rflow/eigen.hpp>, or call it from a .cpp. Device memory: include "
                "<rflow/cuda.cuh> and call it from a .cu");
};
template <class Memory>
using default_backend_t = typename default_backend<Memory>::type;

// ---- stacks of layers ---------------------------------------------------------------------------

/// Extents of a three-dimensional array of activations.
struct stack_shape {
  extent sites;   ///< S
  extent tokens;  ///< n
  extent hidden;  ///< d
};

/// Distances in elements between neighbours along each axis.
struct stack_strides {
  extent site;    ///< along S
  extent token;   ///< along n
  extent hidden;  ///< along d
};

/// Order of the axes in memory, slowest first.
enum class axes {
  sites_tokens_hidden,
  sites_hidden_tokens,
  tokens_sites_hidden,
  tokens_hidden_sites,
  hidden_sites_tokens,
  hidden_tokens_sites,
};

namespace detail {

/// A range of layers of T. Of what are no activations as well: as_view says what is wrong with them.
template <class Range, class T, class Memory>
concept sites_of = requires(Range const& r) {
  std::begin(r);
  requires std::same_as<viewed_t<element_of<Range>>, view<T, Memory>> ||
      !activations<element_of<Range>>;
};

/// A temporary that owns layers.
template <class Range>
concept owning_temporary = !std::is_lvalue_reference_v<Range> && !activations<Range> &&
                           activations<element_of<Range>> && !requires {
  adapt<element_of<Range>>::borrowed;
};

}  // namespace detail

/// The sites of one model over the same tokens, in the order of the residual stream.
///
/// Holds views and, if asked for, which tokens count and where sequences begin; never the
/// activations. Sites may differ in width, not in tokens. Construct it from any range of
/// activations (`layer_stack st(std::vector<Eigen::MatrixXf>)`) or from one 3-D array.
template <class T, class Memory = host_memory>
class layer_stack {
 public:
  using scalar = T;       ///< what activations are stored as
  using memory = Memory;  ///< where they live

  /// @param layers  a range of views, Eigen matrices or other activations, all of element type T
  /// @param names   one name a site, or none
  /// @throws std::invalid_argument if there are no sites, a site is empty, token counts disagree or
  ///         the number of names is not the number of sites
  template <class Range>
  requires(!activations<Range>) && detail::sites_of<Range, T, Memory> explicit layer_stack(
                                       Range const& layers, std::vector<std::string> names = {})
      : names_(std::move(names)) {
    for (auto const& layer : layers) sites_.push_back(as_view(layer));
    validate();
  }

  /// Layers that die at the end of the statement. (Compilers show the line with the cure.)
  template <detail::owning_temporary Range>
  explicit layer_stack(Range&&, std::vector<std::string> = {}) = delete;  // keep them in a variable

  /// The same from views, one a site.
  layer_stack(std::initializer_list<view<T, Memory>> layers) : sites_(layers) { validate(); }

  /// One dense array in the given axis order.
  layer_stack(T const* data, stack_shape shape, axes order = axes::sites_tokens_hidden)
      : layer_stack(data, shape, dense_strides(shape, order)) {}

  /// One array with any strides.
  layer_stack(T const* data, stack_shape shape, stack_strides strides) {
    if (shape.sites < 0) detail::reject(name_of_class, "negative number of sites");
    if (shape.hidden == 0)  // perhaps two extents were given
      detail::reject(name_of_class, "a shape of " + std::to_string(shape.sites) + " sites x " +
                                        std::to_string(shape.tokens) + " tokens x 0 features");
    for (std::ptrdiff_t l = 0; l < shape.sites; ++l)
      sites_.emplace_back(data == nullptr ? nullptr : data + l * strides.site, shape.tokens,
                          shape.hidden, strides.token, strides.hidden);
    validate();
  }

  /// Extents without a shape: does not compile, and says what to write.
  template <class... Extents>
  requires(sizeof...(Extents) > 1 && (std::is_convertible_v<Extents, extent> && ...))
      layer_stack(T const*, Extents...) {
    static_assert(sizeof...(Extents) == 0,
                  "rflow: the extents of an array of layers have names: write "
                  "rflow::layer_stack(pointer, rflow::stack_shape{sites, tokens, hidden})");
  }

  /// The same stack with only some tokens: padding, BOS and attention sinks are left out of every
  /// metric. A mask on a masked stack narrows it further.
  /// @param mask  one value a token (of all, not of those left): non-zero or true keeps it
  /// @throws std::invalid_argument if mask has another length than there are tokens
  template <class Mask>
  [[nodiscard]] layer_stack tokens(Mask const& mask) const {
    std::vector<bool> keep;
    for (auto const& m : mask) keep.push_back(static_cast<bool>(m));
    if (static_cast<std::ptrdiff_t>(keep.size()) != all_tokens())
      detail::reject(name_of_class, "a mask of " + std::to_string(keep.size()) + " values for " +
                                        std::to_string(all_tokens()) + " tokens");
    layer_stack out = *this;
    out.masked_ = true;
    out.selection_.clear();
    for (std::ptrdiff_t i = 0; i < size(); ++i)
      if (keep[static_cast<std::size_t>(token(i))]) out.selection_.push_back(token(i));
    return out;
  }

  /// The same stack with tokens in sequences, so that inter-token pairs never cross from one
  /// sequence to another.
  /// @param offsets  Q + 1 ascending token indices: sequence q is [offsets[q], offsets[q+1]);
  ///                 the first is 0, the last the number of tokens
  /// @throws std::invalid_argument otherwise
  [[nodiscard]] layer_stack sequences(std::vector<std::ptrdiff_t> offsets) const {
    bool ordered = offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == all_tokens();
    for (std::size_t q = 1; ordered && q < offsets.size(); ++q)
      ordered = offsets[q - 1] <= offsets[q];
    if (!ordered)
      detail::reject(name_of_class, "sequence offsets must ascend from 0 to " +
                                        std::to_string(all_tokens()) + " (the number of tokens)");
    layer_stack out = *this;
    out.offsets_ = std::move(offsets);
    return out;
  }

  /// S.
  std::ptrdiff_t sites() const { return static_cast<std::ptrdiff_t>(sites_.size()); }
  /// The view of a site; not checked.
  view<T, Memory> const& operator[](std::ptrdiff_t site) const {
    return sites_[static_cast<std::size_t>(site)];
  }
  /// Hidden width of the first site.
  std::ptrdiff_t width() const { return sites_.front().cols; }
  /// Tokens in the views, masked ones included.
  std::ptrdiff_t all_tokens() const { return sites_.front().rows; }
  /// Tokens that count.
  std::ptrdiff_t size() const {
    return masked_ ? static_cast<std::ptrdiff_t>(selection_.size()) : all_tokens();
  }
  /// Row of the i-th token that counts.
  std::ptrdiff_t token(std::ptrdiff_t i) const {
    return masked_ ? selection_[static_cast<std::size_t>(i)] : i;
  }
  /// Rows of the tokens that count; empty if all do.
  std::span<std::ptrdiff_t const> selection() const { return selection_; }
  /// Whether tokens() was called: some tokens may not count.
  bool masked() const { return masked_; }

  /// Where sequences begin and end among the tokens that count: 0, …, size().
  std::vector<std::ptrdiff_t> boundaries() const {
    if (offsets_.empty()) return {0, size()};
    std::vector<std::ptrdiff_t> out;
    std::ptrdiff_t i = 0;
    for (std::ptrdiff_t const offset : offsets_) {
      if (!masked_) i = offset;
      while (i < size() && token(i) < offset) ++i;
      out.push_back(i);
    }
    return out;
  }

  /// The name given to a site, else its index.
  std::string name(std::ptrdiff_t site) const {
    return names_.empty() ? std::to_string(site) : names_[static_cast<std::size_t>(site)];
  }

 private:
  static constexpr char const* name_of_class = "rflow::layer_stack";

  static stack_strides dense_strides(stack_shape const& s, axes order) {
    switch (order) {
      case axes::sites_tokens_hidden: return {s.tokens * s.hidden, s.hidden, 1};
      case axes::sites_hidden_tokens: return {s.tokens * s.hidden, 1, s.tokens};
      case axes::tokens_sites_hidden: return {s.hidden, s.sites * s.hidden, 1};
      case axes::tokens_hidden_sites: return {1, s.sites * s.hidden, s.sites};
      case axes::hidden_sites_tokens: return {s.tokens, 1, s.sites * s.tokens};
      case axes::hidden_tokens_sites: return {1, s.sites, s.sites * s.tokens};
    }
    detail::reject(name_of_class, "unknown axis order");
  }

  void validate() const {
    if (sites_.empty()) detail::reject(name_of_class, "no sites");
    for (std::size_t l = 0; l < sites_.size(); ++l) {
      detail::require_shape(name_of_class, sites_[l]);
      if (sites_[l].rows != sites_[0].rows)
        detail::reject(name_of_class, "site " + std::to_string(l) + " has " +
                                          std::to_string(sites_[l].rows) + " tokens, site 0 has " +
                                          std::to_string(sites_[0].rows));
    }
    if (!names_.empty() && names_.size() != sites_.size())
      detail::reject(name_of_class, std::to_string(names_.size()) + " names for " +
                                        std::to_string(sites_.size()) + " sites");
  }

  std::vector<view<T, Memory>> sites_;
  std::vector<std::string> names_;
  std::vector<std::ptrdiff_t> selection_, offsets_;
  bool masked_ = false;
};

template <class Range>
requires(!activations<Range>) layer_stack(Range const&)
->layer_stack<typename detail::traits_of<element_of<Range>>::scalar,
              typename detail::traits_of<element_of<Range>>::memory>;
template <class Range>
requires(!activations<Range>) layer_stack(Range const&, std::vector<std::string>)
->layer_stack<typename detail::traits_of<element_of<Range>>::scalar,
              typename detail::traits_of<element_of<Range>>::memory>;
template <class T, class Memory>
layer_stack(std::initializer_list<view<T, Memory>>) -> layer_stack<T, Memory>;
template <class T>
layer_stack(T const*, stack_shape) -> layer_stack<T>;
template <class T>
layer_stack(T const*, stack_shape, axes) -> layer_stack<T>;
template <class T>
layer_stack(T const*, stack_shape, stack_strides) -> layer_stack<T>;

namespace detail {

template <class T, class Memory>
void take_stack(layer_stack<T, Memory> const&);
/// What a metric of many layers cannot take.
template <class X>
concept no_stack = !requires(X const& x) {
  take_stack(x);
};

/// Does not compile, and says what to do.
template <no_stack X>
struct refuse_stackless {
  static constexpr bool one = activations<X>, layers = activations<held_t<X>>;
  static_assert(!layers,
                "rflow: a metric of many layers takes a stack of them. Wrap it: "
                "rflow::layer_stack(v), where v is the range of layers");
  static_assert(!one,
                "rflow: a metric of many layers takes a stack of them, not one layer. Write "
                "rflow::layer_stack(v), where v is a range of all layers");
  static_assert(layers || one,
                "rflow: a metric of many layers takes a stack of them. Write "
                "rflow::layer_stack(pointer, rflow::stack_shape{sites, tokens, hidden}) for one "
                "array, rflow::layer_stack(v) for a range v of views or Eigen matrices");
};

/// A NaN test on bits, so that it also holds in a translation unit built with -ffast-math.
RFLOW_HD constexpr bool is_finite(double x) {
  return (__builtin_bit_cast(std::uint64_t, x) & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}
RFLOW_HD constexpr bool is_finite(float x) {
  return (__builtin_bit_cast(std::uint32_t, x) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace detail
}  // namespace rflow

#undef RFLOW_HD
