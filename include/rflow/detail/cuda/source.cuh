// SPDX-License-Identifier: Apache-2.0
#pragma once

// Where a pass on a device reads rows from.

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <rflow/detail/cuda/memory.cuh>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

/// Rows of one site, seen through a list of selected rows if there is one.
template <class T>
struct token_rows {
  T const* data = nullptr;
  integer row_stride = 0, col_stride = 1, cols = 0;
  integer const* selected = nullptr;

  __host__ __device__ T const* row(integer i) const {
    return data + (selected != nullptr ? selected[i] : i) * row_stride;
  }
  token_rows from(integer first) const {
    token_rows out = *this;
    if (selected != nullptr)
      out.selected += first;
    else
      out.data += first * row_stride;
    return out;
  }
};

/// The rows of all sites; token t of a slab is row first + t.
template <class T>
struct slab_rows {
  token_rows<T> const* sites;
  integer first;
};

/// Tokens whose distances give a median.
inline integer sample_size(integer tokens) { return std::min<integer>(tokens, 512); }

/// Reads rows where they lie.
template <class T>
class direct_source {
 public:
  using scalar = T;

  template <class Memory>
  direct_source(layer_stack<T, Memory> const& stack, arena& memory)
      : selection_(stack.selection().begin(), stack.selection().end()) {
    for (integer l = 0; l < stack.sites(); ++l) {
      auto const& x = stack[l];
      rows_.push_back({x.data, x.row_stride, x.col_stride, x.cols, nullptr});
    }
    for (integer i = 0; i < sample_size(stack.size()); ++i)
      sample_.push_back(stack.token(i * stack.size() / sample_size(stack.size())));
    rows_at_ = memory.reserve<token_rows<T>>(sites());
    selection_at_ = memory.reserve<integer>(static_cast<integer>(selection_.size()));
    sample_at_ = memory.reserve<integer>(static_cast<integer>(sample_.size()));
    masked_ = stack.masked();
  }

  template <class Device>
  void start(Device& on, arena const& memory) {
    if (masked_)
      for (auto& site : rows_) site.selected = memory[selection_at_];
    on.upload(selection_.data(), static_cast<integer>(selection_.size()), memory[selection_at_]);
    on.upload(rows_.data(), sites(), memory[rows_at_]);
    on.upload(sample_.data(), static_cast<integer>(sample_.size()), memory[sample_at_]);
    on_device_ = memory[rows_at_];
    sample_on_device_ = memory[sample_at_];
  }

  integer sites() const { return static_cast<integer>(rows_.size()); }
  integer cols(integer site) const { return rows_[size_of(site)].cols; }

  /// How many rows of a site, or of all of them, may be asked for at once.
  integer most_rows(integer tokens) const { return tokens; }
  integer most_slab(integer tokens) const { return tokens; }

  /// Rows first … first + count − 1 of all sites, or of one.
  slab_rows<T> slab(integer first, integer) { return {on_device_, first}; }
  token_rows<T> rows(integer site, integer first, integer) {
    return rows_[size_of(site)].from(first);
  }
  /// Up to 512 evenly strided rows, for a median.
  token_rows<T> sample(integer site) {
    token_rows<T> out = rows_[size_of(site)];
    out.selected = sample_on_device_;
    return out;
  }
  /// What was asked for last is no longer needed once the work enqueued so far is done.
  void release() {}

 private:
  std::vector<token_rows<T>> rows_;
  std::vector<integer> selection_, sample_;
  bool masked_ = false;
  arena::place<token_rows<T>> rows_at_;
  arena::place<integer> selection_at_, sample_at_;
  token_rows<T> const* on_device_ = nullptr;
  integer const* sample_on_device_ = nullptr;
};

/// Widens up to Count · Group::size features of a row: a lane's k-th is from + k · size + lane. What
/// there is not is zero, and is looked at too, so that all stay in registers.
template <class C, int Count, class Group, class T>
__host__ __device__ void load(token_rows<T> const& x, T const* row, integer from, Group g,
                              C (&to)[Count]) {
  integer const left = x.cols - from - g.lane();
  integer const here = smaller(Count, left > 0 ? ceil_div(left, Group::size) : 0);
  T const* const at = row + (from + g.lane()) * x.col_stride;
  for (integer k = 0; k < Count; ++k)
    to[k] = k < here ? static_cast<C>(at[k * Group::size * x.col_stride]) : C(0);
}

/// What a device reads a stack by.
template <class Device, class Stack>
using source_of = decltype(std::declval<Device&>().source(std::declval<Stack const&>(),
                                                          std::declval<arena&>(), std::size_t{}));

}  // namespace rflow::detail::passes
