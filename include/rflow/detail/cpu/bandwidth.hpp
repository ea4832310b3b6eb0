// SPDX-License-Identifier: Apache-2.0
#pragma once

// The bandwidth of an RBF kernel: the median distance between a site's tokens.

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include <rflow/detail/cpu/centre.hpp>
#include <rflow/detail/cpu/inner.hpp>
#include <rflow/moments.hpp>

namespace rflow::detail {

/// The median of the squared distances between a site's tokens, scaled: exact for up to 512 tokens,
/// above that over 512 evenly strided ones.
template <class Product, class C>
double median_distance(prepared_site<C> const& site, integer tokens, rbf::median convention) {
  integer const m = (std::min<integer>)(tokens, 512), d = site.source.cols;
  if (m < 2) return 0;
  auto const row = [&](integer i) { return i * tokens / m; };
  auto const fetch = [&](integer r, integer rows, integer col, integer cols, C* to, integer ld) {
    for (integer i = 0; i < rows; ++i) site.fetch(row(r + i), 1, col, cols, to + i * ld, ld);
  };
  constexpr integer R = Product::template rows<C>;
  std::vector<double> distances;
  distances.reserve(static_cast<std::size_t>(m * (m - 1) / 2));

  // Where two tokens are far closer to each other than to the centre, their inner product has lost
  // the distance.
  constexpr double limit = std::is_same_v<C, double> ? 4096 : 8;
  auto const collect = [&](integer i0, integer j0, C const* g) {
    for (integer j = j0; j < j0 + Product::template cols<C>; ++j, g += R)
      for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, m); ++i) {
        double const norms = site.norms.data()[row(i)] + site.norms.data()[row(j)];
        double const distance = norms - 2 * static_cast<double>(g[i - i0]);
        distances.push_back(limit * distance > norms ? distance : site.distance(row(i), row(j)));
      }
  };
  inner_products<Product, C>(fetch, m, d, collect);

  // All pairs: m zeros of the diagonal, then every distance twice.
  bool const all = convention == rbf::median::all_pairs;
  integer const count = static_cast<integer>(distances.size());
  integer const size = all ? m * m : count;
  auto const at = [&](integer k) {
    if (all) k = k < m ? -1 : (k - m) / 2;
    if (k < 0) return 0.;
    std::nth_element(distances.begin(), distances.begin() + k, distances.end());
    return distances[static_cast<std::size_t>(k)];
  };
  double const low = at((size - 1) / 2);
  return (low + at(size / 2)) / 2;
}

}  // namespace rflow::detail
