// SPDX-License-Identifier: Apache-2.0
#pragma once

// Where the numbers come from: the rows of a site, of any type and layout, widened block by block.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <vector>

#include <rflow/detail/cpu/memory.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// A site of any type and layout: copies a block of it, widened to C, into rows ld apart.
template <class C>
struct panel_source {
  void const* self = nullptr;
  void (*load)(void const* self, integer row, integer rows, integer col, integer cols, C* to,
               integer ld) = nullptr;
  integer cols = 0;

  void operator()(integer row, integer rows, integer col, integer count, C* to, integer ld) const {
    load(self, row, rows, col, count, to, ld);
  }
};

/// A view, seen through a list of selected rows if there is one.
template <class T>
struct site_rows {
  view<T> x;
  integer const* selected = nullptr;

  T const* row(integer i) const { return x.data + (selected ? selected[i] : i) * x.row_stride; }
};

/// Widens a contiguous row. Fixed trip counts vectorise at -O2 as well.
template <class C, class T>
void widen(T const* from, integer count, C* to) {
  if constexpr (std::is_same_v<C, T>) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
  } else {
    integer i = 0;
    for (; i + 32 <= count; i += 32)
      for (integer k = 0; k < 32; ++k) to[i + k] = static_cast<C>(static_cast<float>(from[i + k]));
    for (; i < count; ++i) to[i] = static_cast<C>(static_cast<float>(from[i]));
  }
}
inline void widen(double const* from, integer count, float* to) {
  for (integer i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

/// The panel_source of a site; `site` must outlive it.
template <class C, class T>
panel_source<C> source_of(site_rows<T> const& site) {
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& s = *static_cast<site_rows<T> const*>(self);
    integer const step = s.x.col_stride;
    if (step == 1) {
      for (integer i = row; i < row + rows; ++i) {
        widen(s.row(i) + col, cols, to + (i - row) * ld);
        if (s.selected || i + rows >= s.x.rows) continue;
        T const* const next = s.row(i + rows) + col;  // most likely wanted next: into L2
        for (integer k = 0; k < cols; k += integer{64 / sizeof(T)})
          __builtin_prefetch(next + k, 0, 2);
      }
    } else if (!s.selected && std::abs(step) > std::abs(s.x.row_stride)) {
      for (integer k = 0; k < cols; ++k)  // column-major: walk along its columns
        for (integer i = 0; i < rows; ++i) to[i * ld + k] = static_cast<C>(s.x(row + i, col + k));
    } else {
      for (integer i = 0; i < rows; ++i)
        for (integer k = 0; k < cols; ++k)
          to[i * ld + k] = static_cast<C>(s.row(row + i)[(col + k) * step]);
    }
  };
  return {&site, load, site.x.cols};
}

/// The rows of one site in several stacks, one after the other.
template <class T>
struct joined_rows {
  std::vector<site_rows<T>> parts;
  std::vector<integer> ends;  // tokens up to the end of each part
};

/// The panel_source of such a site; `site` must outlive it.
template <class C, class T>
panel_source<C> source_of(joined_rows<T> const& site) {
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& s = *static_cast<joined_rows<T> const*>(self);
    auto const first = std::upper_bound(s.ends.begin(), s.ends.end(), row);
    for (auto k = static_cast<std::size_t>(first - s.ends.begin()); rows > 0; ++k) {
      integer const begin = k == 0 ? 0 : s.ends[k - 1], here = (std::min)(rows, s.ends[k] - row);
      source_of<C>(s.parts[k])(row - begin, here, col, cols, to, ld);
      row += here;
      rows -= here;
      to += here * ld;
    }
  };
  return {&site, load, site.parts.front().x.cols};
}

}  // namespace rflow::detail
