// SPDX-License-Identifier: Apache-2.0
#pragma once

// Widens tensors to what the passes compute on: 8-bit floats have no view, and the sites of one model
// need one type. Widening is exact; it copies.

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <rflow/file.hpp>

namespace rflow {

/// Whether values of this type can be activations: those of views, and the 8-bit floats with a sign.
constexpr bool is_activation(dtype type) {
  return is_viewable(type) || type == dtype::f8_e4m3 || type == dtype::f8_e5m2 ||
         type == dtype::f8_e4m3fnuz || type == dtype::f8_e5m2fnuz;
}

namespace detail {

/// An 8-bit float: sign, exponent, fraction. Its exponent of all ones is that of an infinity and of
/// NaN (ieee), an ordinary one where only the fraction of all ones is NaN (fn), or an ordinary one
/// where minus zero is the only NaN (fnuz).
struct small_float {
  int fraction_bits, bias;
  enum { ieee, fn, fnuz } kind;
};

/// E4M3 and E5M2 as in Micikevicius et al. 2022, arXiv:2209.05433, Table 1; the fnuz variants as in
/// Noune et al. 2022, arXiv:2206.02915.
constexpr small_float small_float_of(dtype type) {
  switch (type) {
    case dtype::f8_e5m2: return {2, 15, small_float::ieee};
    case dtype::f8_e4m3fnuz: return {3, 8, small_float::fnuz};
    case dtype::f8_e5m2fnuz: return {2, 16, small_float::fnuz};
    default: return {3, 7, small_float::fn};
  }
}

/// The exact value of those bits.
constexpr float value_of(small_float format, std::uint8_t bits) {
  int const magnitude = bits & 0x7f;
  int const exponent = magnitude >> format.fraction_bits;
  int const fraction = magnitude & ((1 << format.fraction_bits) - 1);
  int const top = 0x7f >> format.fraction_bits;
  bool const negative = (bits & 0x80) != 0;
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  if (format.kind == small_float::ieee && exponent == top) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    return fraction != 0 ? nan : negative ? -infinity : infinity;
  }
  if (format.kind == small_float::fn && magnitude == 0x7f) return nan;
  if (format.kind == small_float::fnuz && bits == 0x80) return nan;
  // The significand is an integer; a float of that exponent scales it.
  int const significand = exponent == 0 ? fraction : fraction + (1 << format.fraction_bits);
  int const power = (std::max)(exponent, 1) - format.bias - format.fraction_bits;
  float const scale = std::bit_cast<float>(static_cast<std::uint32_t>(power + 127) << 23);
  float const value = static_cast<float>(significand) * scale;
  return negative ? -value : value;
}

constexpr std::array<float, 256> values_of(dtype type) {
  std::array<float, 256> out{};
  for (unsigned i = 0; i < 256; ++i)
    out[i] = value_of(small_float_of(type), static_cast<std::uint8_t>(i));
  return out;
}

template <class To, class From, class Value>
void widen_values(tensor const& x, To* to, Value&& value) {
  for_each_run(x, [&](std::byte const* run, std::ptrdiff_t n) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
      From from;
      std::memcpy(&from, run + static_cast<std::size_t>(i) * sizeof(From), sizeof(From));
      *to++ = static_cast<To>(value(from));
    }
  });
}

template <class To>
void widen_into(tensor const& x, To* to) {
  auto const as_it_is = [](auto v) { return v; };
  switch (x.type) {
    case dtype::f16: return widen_values<To, f16>(x, to, [](f16 v) { return float(v); });
    case dtype::bf16: return widen_values<To, bf16>(x, to, [](bf16 v) { return float(v); });
    case dtype::f32: return widen_values<To, float>(x, to, as_it_is);
    case dtype::f64: return widen_values<To, double>(x, to, as_it_is);
    default: break;
  }
  std::array<float, 256> const table = values_of(x.type);
  widen_values<To, std::uint8_t>(x, to, [&](std::uint8_t v) { return table[v]; });
}

}  // namespace detail

/// A dense copy of a tensor in another type.
struct widened_tensor {
  tensor array;                         ///< looks at memory
  std::shared_ptr<std::byte[]> memory;  ///< the elements, row-major
};

/// Widens a tensor of activations. Every value is kept exactly; NaN stays NaN.
/// Cost: one pass, and 4 or 8 bytes an element.
/// @param  x   any rank and strides
/// @param  to  f32, or f64
/// @throws std::invalid_argument if x holds no activations (is_activation), to is another type, x is
///         f64 and to is not, or the copy would have more than 2^63 bytes
inline widened_tensor widen(tensor const& x, dtype to) {
  char const* const where = "rflow::widen";
  if ((to != dtype::f32 && to != dtype::f64) || !is_activation(x.type) || bits(x.type) > bits(to))
    detail::reject(where, "a float that " + std::string(to_string(to)) +
                              " can hold expected, found " + x.description());
  auto const extent = detail::extent_of(x.shape, bits(to));
  if (!extent.ok) detail::reject(where, "too large to copy: " + x.description());
  auto const bytes = static_cast<std::size_t>(extent.bits / 8);
  widened_tensor out;
  // new[] of bytes aligns for double.
  out.memory = std::shared_ptr<std::byte[]>(new std::byte[(std::max<std::size_t>)(bytes, 1)]);
  out.array = {x.name, to, x.shape, detail::dense_strides(x.shape), out.memory.get()};
  if (to == dtype::f64)
    detail::widen_into(x, reinterpret_cast<double*>(out.memory.get()));
  else
    detail::widen_into(x, reinterpret_cast<float*>(out.memory.get()));
  return out;
}

/// What was widened to bring tensors to one type, and the copies, which have to live as long as the
/// tensors.
struct widening {
  dtype to = dtype::f32;       ///< what all have become
  std::map<dtype, int> found;  ///< how many there were of each type; empty if nothing was copied
  std::size_t bytes = 0;       ///< size of the copies
  std::vector<std::shared_ptr<std::byte[]>> copies;  ///< what the tensors point into

  /// Whether anything was copied.
  bool happened() const { return !found.empty(); }

  /// "3 bf16 and 1 f32, read as f32 (widened exactly, copies of 12 MiB)", for reports.
  std::string description() const {
    std::string text;
    std::size_t left = found.size();
    for (auto const& [type, count] : found) {
      text += std::to_string(count) + " " + std::string(rflow::to_string(type));
      if (--left > 0) text += left == 1 ? " and " : ", ";
    }
    std::size_t const kib = bytes / 1024 + (bytes % 1024 != 0);
    return text + ", read as " + std::string(rflow::to_string(to)) +
           " (widened exactly, copies of " +
           (kib < 10240 ? std::to_string(kib) + " KiB)" : std::to_string(kib / 1024) + " MiB)");
  }
};

/// Brings tensors to one type that views exist of, in place: nothing happens if all have the same
/// already; else those that are not f32 (f64, if any is) become copies of that type. Every value is
/// kept exactly.
/// Cost: where nothing is widened none; else 4 or 8 bytes for each element that is widened, so for a
/// capture in bf16 with one f32 tensor twice its size, for 8-bit floats four times.
/// @param  tensors  any shapes; null pointers are skipped
/// @throws std::invalid_argument naming the tensor if one is of a type that is no activation's, or of
///         more than 2^63 bytes when widened. The tensors are then as they were
inline widening widen_to_one(std::span<tensor* const> tensors) {
  widening out;
  for (tensor const* const x : tensors) {
    if (x == nullptr) continue;
    if (!is_activation(x->type))
      detail::reject("rflow::widen_to_one", "floating-point elements expected, found " +
                                                x->description() + detail::cure_of(x->type));
    ++out.found[x->type];
    if (x->type == dtype::f64) out.to = dtype::f64;
  }
  if (out.found.empty()) return out;
  if (out.found.size() == 1 && is_viewable(out.found.begin()->first)) {
    out.to = out.found.begin()->first;
    out.found.clear();
    return out;
  }
  std::vector<std::pair<tensor*, tensor>> made;
  for (tensor* const x : tensors) {
    if (x == nullptr || x->type == out.to) continue;
    widened_tensor copy = widen(*x, out.to);
    out.bytes += static_cast<std::size_t>(copy.array.size()) * (bits(out.to) / 8);
    out.copies.push_back(std::move(copy.memory));
    made.emplace_back(x, std::move(copy.array));
  }
  for (auto& [old, array] : made) *old = std::move(array);
  return out;
}

}  // namespace rflow
