// SPDX-License-Identifier: Apache-2.0
#pragma once

// Gram moments of many layers on the CPU: the kernel matrix of every site is formed once, tile by
// tile, and all pairs of sites are multiplied from those tiles. Not a public interface: the
// backends on the CPU call it, through host.hpp.
//
//     for each site                           column means, norms of the centred rows, a scale
//     for each macro tile (I, J), I ≥ J       a square of tokens, as large as memory allows
//       for each site p
//         for each range of features          shared panels: centred, widened, packed
//           for each block of the tile        one task: 192 × 256 inner products, kept in L2
//             for each depth block, column strip, row strip
//               micro-kernel                  48 × 8 inner products in registers (AVX-512 floats)
//               at the last depth             G = kernel(inner product), sums per token
//       products += 2 · (tile buffer, S rows) · (the same)ᵀ
//
// Only entries below the diagonal are formed; the rest of a tile on the diagonal is exactly zero.
// Every sum has its own place and is added up in a fixed order, and sizes depend on the shape and
// the memory bound alone: the result is the same to the last bit for any number of threads.

#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include <rflow/detail/cpu/bandwidth.hpp>
#include <rflow/detail/cpu/cross.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/row_means.hpp>
#include <rflow/detail/cpu/third_moments.hpp>
#include <rflow/detail/cpu/tiles.hpp>
#include <rflow/moments.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

template <class C>
gram_cost count_operations(integer tokens, std::vector<panel_source<C>> const& sources) {
  std::vector<integer> widths;
  for (auto const& source : sources) widths.push_back(source.cols);
  return count_operations(tokens, widths);
}

/// Whether linear moments take the feature path.
inline bool by_features(gram_cost const& cost, gram_path path) {
  return path == gram_path::automatic ? cost.feature < cost.gram : path == gram_path::feature;
}

/// The threads for so many multiply-adds and, if wanted, those of third moments. A thread does 16
/// million of them in 0.3 ms with AVX-512.
template <class C>
crew crew_for(double operations, std::vector<panel_source<C>> const& sources, integer tokens,
              gram_options const& options) {
  double const n = static_cast<double>(tokens), sites = static_cast<double>(sources.size());
  if (options.significance || options.shifts)
    operations += count_operations(tokens, sources).gram + sites * n * n * n / 2;
  return options.workers.sized_for(operations / options.share.of,
                                   static_cast<double>(lanes_v<C>) * (1 << 20));
}

/// The Gram moments of all sites over the same tokens (at least one), for linear_kernel,
/// rbf_kernel or function_kernel.
template <class C, class Kernel, class Product = packed_product>
gram_moments gram(std::vector<panel_source<C>> const& sources, integer tokens, Kernel const& kernel,
                  gram_options const& options) {
  if (sources.empty()) return gram_moments(0, tokens);
  bool features = false;
  double operations = std::numeric_limits<double>::infinity();  // of somebody's function: unknown
  if constexpr (std::is_same_v<Kernel, linear_kernel>) {
    gram_cost const cost = count_operations(tokens, sources);
    features = by_features(cost, options.path);
    operations = features ? cost.feature : cost.gram;
  }
  team threads(crew_for(operations, sources, tokens, options));
  auto const sites = prepare_all(threads, sources, tokens, Kernel::about_mean);
  gram_moments m;  // the engines are gone before third moments take their memory
  if (features)
    m = feature_engine<Product, C>(threads, sites, tokens, options.memory_bound, options.share)();
  else
    m = [&] {
      gram_engine<Product, C> engine(threads, sites, tokens, options.memory_bound, options.share);
      return about_row_means<C>(engine, kernel, options.share);
    }();
  return with_third_moments<Product>(threads, sites, kernel, options, std::move(m));
}

/// The same for an RBF kernel: with the σ given, or from the medians of this data.
template <class C, class Product = packed_product>
gram_moments gram_rbf(std::vector<panel_source<C>> const& sources, integer tokens,
                      rbf const& kernel, gram_options const& options) {
  if (sources.empty()) return gram_moments(0, tokens);
  double const pairs = static_cast<double>(tokens) * static_cast<double>(tokens) / 2;
  double const exponentials = 64 * pairs * static_cast<double>(sources.size());
  team threads(
      crew_for(count_operations(tokens, sources).gram + exponentials, sources, tokens, options));
  auto const sites = prepare_all(threads, sources, tokens, rbf_kernel::about_mean);
  rbf_kernel k{kernel.sigma};
  if (k.sigma.empty()) {
    k.sigma.resize(sites.size());
    threads.run(static_cast<integer>(sites.size()), [&](integer p) {
      auto const& site = sites[static_cast<std::size_t>(p)];
      double const median = median_distance<Product>(site, tokens, kernel.convention);
      k.sigma.data()[p] = kernel.fraction * std::sqrt(median) / site.some_scale();
    });
  }
  gram_moments m = [&] {
    gram_engine<Product, C> engine(threads, sites, tokens, options.memory_bound, options.share);
    return about_row_means<C>(engine, k, options.share);
  }();
  m = with_third_moments<Product>(threads, sites, k, options, std::move(m));
  for (std::size_t p = 0; p < sites.size(); ++p)
    if (!(k.sigma[p] > 0) && m.why[p] == status::ok) m.why[p] = status::zero_bandwidth;
  m.sigma = std::move(k.sigma);
  return m;
}

}  // namespace rflow::detail
