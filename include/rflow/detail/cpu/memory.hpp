// SPDX-License-Identifier: Apache-2.0
#pragma once

// Memory aligned to cache lines, and the sizes that fit it.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

namespace rflow::detail {

using integer = std::ptrdiff_t;

constexpr integer ceil_div(integer a, integer b) { return (a + b - 1) / b; }
constexpr integer round_up(integer a, integer b) { return ceil_div(a, b) * b; }

/// Memory aligned to cache lines, left as it comes.
template <class T>
class aligned_array {
  static_assert(std::is_trivial_v<T>);

 public:
  aligned_array() = default;
  explicit aligned_array(integer count)
      : data_(static_cast<T*>(::operator new(bytes(count), alignment)), release) {}
  aligned_array(integer count, T value) : aligned_array(count) {
    std::fill_n(data_.get(), count, value);
  }
  T* data() { return data_.get(); }
  T const* data() const { return data_.get(); }
  T& operator[](integer i) { return data_.get()[i]; }
  T const& operator[](integer i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t alignment{128};
  static std::size_t bytes(integer count) { return static_cast<std::size_t>(count) * sizeof(T); }
  static void release(T* p) { ::operator delete(p, alignment); }

  std::unique_ptr<T, void (*)(T*)> data_{nullptr, release};
};

}  // namespace rflow::detail
