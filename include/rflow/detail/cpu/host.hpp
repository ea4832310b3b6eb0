// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the CPU's backends call: the passes over stacks in host memory.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <rflow/backend.hpp>
#include <rflow/detail/cpu/chain.hpp>
#include <rflow/detail/cpu/gram.hpp>
#include <rflow/detail/cpu/rows.hpp>
#include <rflow/detail/cpu/softmax.hpp>
#include <rflow/detail/cpu/walk.hpp>
#include <rflow/detail/numerics.hpp>
#include <rflow/moments.hpp>
#include <rflow/softmax_problem.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// The flow moments of a stack in host memory.
template <class T>
flow_moments host_flow(char const* where, crew of, layer_stack<T> const& stack,
                       flow_sink const& sink) {
  require_one_width(where, stack);
  std::ptrdiff_t const n = stack.size();
  using walker = flow_walker<T>;
  flow_moments total(stack.sites(), 0);
  // All sequences are closed: their unit sums are 0.
  auto const widened = [&] {
    total.width = stack.width();
    total.unit_sum.assign(static_cast<std::size_t>(total.sites * total.width), 0.0);
    return std::move(total);
  };
  if (n == 0) return widened();
  // As many slices as the shape gives, not as there are threads: sums stay the same.
  std::ptrdiff_t const slices = std::clamp<std::ptrdiff_t>(n / (4 * walker::group), 1, 16);
  std::vector<std::ptrdiff_t> const boundaries = stack.boundaries();
  of = of.sized_for(static_cast<double>(stack.sites() * n) * static_cast<double>(stack.width()),
                    1 << 20);
  of.threads = (std::min)(of.threads, static_cast<int>(slices));
  team workers(of);
  std::vector<std::unique_ptr<walker>> walkers(static_cast<std::size_t>(workers.size()));
  std::unique_ptr<open_sequence> open;
  turnstile turns;
  workers.run(slices, [&](std::ptrdiff_t s, int thread) {
    turnstile::pass const pass(turns, s);
    auto& mine = walkers[static_cast<std::size_t>(thread)];
    if (!mine) mine = std::make_unique<walker>(stack, sink);
    mine->walk(n * s / slices, n * (s + 1) / slices, boundaries);
    pass.wait();
    if (!open) open = std::make_unique<open_sequence>(stack.sites(), mine->padded());
    mine->append_to(total, *open);
  });
  return widened();
}

/// One model, in one stack or in several that hold its tokens one after the other.
template <class T>
std::span<layer_stack<T> const> parts_of(layer_stack<T> const& stack) {
  return {&stack, 1};
}
template <class T>
std::span<layer_stack<T> const> parts_of(std::vector<layer_stack<T>> const& stacks) {
  return stacks;
}

template <class T>
T element_of(std::span<layer_stack<T> const>);  // for its type

/// Sites of stacks, as the engine reads them.
template <class C>
class host_sites {
 public:
  explicit host_sites(char const* where) : where_(where) {}

  template <class T>
  void add(std::span<layer_stack<T> const> parts) {
    if (parts.empty()) reject(where_, "no stacks");
    std::vector<std::ptrdiff_t> ends;
    for (layer_stack<T> const& part : parts) {
      require_same_sites(parts.front(), part);
      ends.push_back((ends.empty() ? 0 : ends.back()) + part.size());
    }
    if (!sources.empty() && ends.back() != tokens)
      reject(where_, "the stacks have " + std::to_string(tokens) + " and " +
                         std::to_string(ends.back()) + " tokens");
    tokens = ends.back();
    for (std::ptrdiff_t l = 0; l < parts.front().sites(); ++l) {
      joined_rows<T> site{{}, ends};
      for (layer_stack<T> const& part : parts)
        site.parts.push_back({part[l], part.masked() ? part.selection().data() : nullptr});
      if (parts.size() == 1)
        keep(site.parts.front());
      else
        keep(std::move(site));
    }
    auto const stored = [parts, ends](std::ptrdiff_t token) {
      std::ptrdiff_t before = 0;
      auto const part = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), token) -
                                                 ends.begin());
      for (std::size_t k = 0; k < part; ++k) before += parts[k].all_tokens();
      return before + parts[part].token(token - (part == 0 ? 0 : ends[part - 1]));
    };
    stored_.resize(sources.size(), stored);
  }

  /// Where a token that counts is stored, of all tokens of its stacks.
  std::ptrdiff_t stored_token(std::size_t site, std::ptrdiff_t token) const {
    return stored_[site](token);
  }

  std::vector<panel_source<C>> sources;
  std::ptrdiff_t tokens = 0;

 private:
  template <class T>
  void require_same_sites(layer_stack<T> const& first, layer_stack<T> const& part) const {
    if (part.sites() != first.sites())
      reject(where_, "stacks of one model have " + std::to_string(first.sites()) + " and " +
                         std::to_string(part.sites()) + " sites");
    for (std::ptrdiff_t l = 0; l < first.sites(); ++l)
      if (part[l].cols != first[l].cols)
        reject(where_, "site " + std::to_string(l) + " of one model has " +
                           std::to_string(first[l].cols) + " features in one stack, " +
                           std::to_string(part[l].cols) + " in another");
  }

  template <class Site>
  void keep(Site site) {
    auto owned = std::make_shared<Site const>(std::move(site));
    sources.push_back(source_of<C>(*owned));
    rows_.push_back(std::move(owned));
  }

  char const* where_;
  std::vector<std::shared_ptr<void const>> rows_;
  std::vector<std::function<std::ptrdiff_t(std::ptrdiff_t)>> stored_;  // one a site
};

/// The Gram moments of the sites of several models, with products in C.
template <class C, class Product, class Kernel, class... Models>
gram_moments host_gram_in(char const* where, Kernel const& kernel, gram_options const& options,
                          Models const&... models) {
  host_sites<C> sites(where);
  (sites.add(parts_of(models)), ...);
  auto const& sources = sites.sources;
  std::ptrdiff_t const tokens = sites.tokens;
  if (tokens == 0) return gram_moments(static_cast<std::ptrdiff_t>(sources.size()), 0);

  gram_moments m;
  if constexpr (std::same_as<Kernel, linear>) {
    m = gram<C, linear_kernel, Product>(sources, tokens, linear_kernel{}, options);
  } else if constexpr (std::same_as<Kernel, rbf>) {
    require_bandwidths(where, kernel, static_cast<std::ptrdiff_t>(sources.size()));
    m = gram_rbf<C, Product>(sources, tokens, kernel, options);
  } else {
    static_assert(pair_kernel<Kernel>,
                  "rflow: a kernel is linear, rbf, or a function object "
                  "k(inner product, squared norm, squared norm) -> double");
    m = gram<C, function_kernel<Kernel>, Product>(sources, tokens, {kernel}, options);
  }
  if (std::same_as<Kernel, linear> && tokens < 3 && options.share.index == 0)
    for (std::size_t i = 0; i < m.diagonal.size(); ++i)  // too few to U-centre: G = K, whose rows
      m.row_sums[i] = -m.diagonal[i];                    // sum to 0
  for (std::size_t p = 0; p < sources.size(); ++p)
    if (position& at = m.non_finite[p]; at.found()) at.token = sites.stored_token(p, at.token);
  m.epsilon = unit_roundoff<C>;
  return m;
}

/// The Gram moments of the sites of several models, with the product of a backend. Each is a
/// layer_stack, or a vector of them that hold its tokens one after the other.
///
/// Products are in float unless a stack is double. Where the sums then show that rounding would
/// be seen in a CKA, everything is done again in double; and by kernel matrices, if that is not enough
/// and the path is free. A share cannot see all of the sums, so its products stay as they are.
template <class Product, class Kernel, class... Models>
gram_moments host_gram(char const* where, Kernel const& kernel, gram_options const& options,
                       Models const&... models) {
  constexpr bool wide = (std::same_as<decltype(element_of(parts_of(models))), double> || ...);
  work_share const share = options.share;
  if (share.of < 1 || share.index < 0 || share.index >= share.of)
    reject(where,
           "share " + std::to_string(share.index) + " (from 0) of " + std::to_string(share.of));
  auto const in_double = [&](gram_options const& by) {
    return host_gram_in<double, Product>(where, kernel, by, models...);
  };
  auto const accurate = [&](gram_moments m) {
    m.accuracy = wide ? wide_accuracy : narrow_accuracy;
    return m;
  };
  gram_moments m;
  if constexpr (wide) {
    m = accurate(in_double(options));
  } else {
    m = accurate(host_gram_in<float, Product>(where, kernel, options, models...));
    if (share.of == 1 && !m.resolved()) m = accurate(in_double(options));
  }
  if (share.of == 1 && m.path == gram_path::feature && options.path == gram_path::automatic &&
      !m.resolved()) {
    gram_options by = options;
    by.path = gram_path::gram;
    m = accurate(in_double(by));
  }
  m.shares.assign(static_cast<std::size_t>(share.of), 0);
  m.shares[static_cast<std::size_t>(share.index)] = 1;
  return m;
}

template <class C, class T, class Visit>
void host_softmax_in(char const* where, crew of, std::span<layer_stack<T> const> parts,
                     softmax_problem const& problem, Visit const& visit) {
  using engine = softmax_engine<C>;
  host_sites<C> sites(where);
  sites.add(parts);
  host_sites<double> wide(where);
  if constexpr (!std::same_as<C, double>) wide.add(parts);
  std::ptrdiff_t width = 0;
  for (auto const& source : sites.sources) width = (std::max)(width, source.cols);
  auto const count = static_cast<std::ptrdiff_t>(sites.sources.size());
  bool const side_by_side = engine::side_by_side(count, sites.tokens, width, problem, of.threads);
  team threads(side_by_side ? of : crew{});
  threads.run(count, [&](std::ptrdiff_t l) {
    auto const site = static_cast<std::size_t>(l);
    crew const mine = side_by_side ? crew{} : of;
    engine regression(mine, sites.sources[site], sites.tokens, problem);
    if constexpr (!std::same_as<C, double>)
      if (regression.needs_double()) {
        softmax_engine<double> exact(mine, wide.sources[site], sites.tokens, problem);
        return visit(l, exact);
      }
    visit(l, regression);
  });
}

/// Softmax regressions of all sites of a stack in host memory, or of several with the same sites that
/// hold their tokens one after the other.
template <class Stacks, class Visit>
void host_softmax(char const* where, crew of, Stacks const& stacks, softmax_problem const& problem,
                  Visit const& visit) {
  auto const parts = parts_of(stacks);
  using T = decltype(element_of(parts));
  auto const labels = static_cast<std::ptrdiff_t>(problem.labels.size());
  std::ptrdiff_t tokens = 0;
  for (layer_stack<T> const& part : parts) tokens += part.size();
  if (labels != tokens || labels == 0 ||
      problem.parts.size() != problem.labels.size() * static_cast<std::size_t>(problem.problems))
    reject(where, std::to_string(labels) + " labels and " + std::to_string(problem.parts.size()) +
                      " parts in " + std::to_string(problem.problems) + " problems for " +
                      std::to_string(tokens) + " tokens");
  if constexpr (!std::same_as<T, double>)
    if (problem.in_double) return host_softmax_in<double>(where, of, parts, problem, visit);
  host_softmax_in<compute_t<T>>(where, of, parts, problem, visit);
}

}  // namespace rflow::detail
