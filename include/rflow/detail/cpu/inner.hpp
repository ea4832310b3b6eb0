// SPDX-License-Identifier: Apache-2.0
#pragma once

// All inner products of a few rows, in one thread.

#include <algorithm>
#include <cstddef>

#include <rflow/detail/cpu/product.hpp>
#include <rflow/detail/cpu/tile.hpp>

namespace rflow::detail {

/// All inner products of m rows of `depth` values, below the diagonal, in one thread: collect(i, j, g)
/// sees each micro tile once. Beside it, m²/2 values of memory.
template <class Product, class C, class Fetch, class Collect>
void inner_products(Fetch const& fetch, integer m, integer depth, Collect const& collect) {
  constexpr integer R = Product::template rows<C>, step = 128;
  tile const t = tiling<Product, C>::plan(0, m, 0, m, true, [](block const&) { return 0; });
  panel<C> rows{aligned_array<C>(round_up(m, R) * step), round_up(m, R)};
  panel<C> cols{aligned_array<C>(round_up(m, R) * step), round_up(m, R)};
  aligned_array<C> products(t.area);
  for (integer k = 0; k < depth; k += step) {
    depth_range const range{k, (std::min)(step, depth - k), step};
    for (integer s = 0; s < ceil_div(m, R); ++s)
      pack_strip<Product, C>(fetch, s * R, (std::min)(R, m - s * R), s, range, false, &rows, &cols);
    for (block const& b : t.blocks)
      multiply_block<Product>(t, b, rows, cols, range, k == 0, k + step >= depth, products.data(),
                              collect);
  }
}

}  // namespace rflow::detail
