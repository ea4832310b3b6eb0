// SPDX-License-Identifier: Apache-2.0
#pragma once

// How far CKA might have come out otherwise on other tokens of the same kind: a delete-block
// jackknife over runs of neighbouring tokens. It speaks of the tokens alone, not of other models or
// seeds, and needs runs several times as long as tokens resemble each other: that is measured.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <rflow/cka.hpp>
#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/statistics.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A table of CKA with its spread.
///
/// Intervals cover, in about 95 of 100 cases, what CKA tends to with ever more tokens of the same
/// process; for unrelated layers that is 0. Where n is too short for that, they are not given.
struct cka_intervals {
  cka_table table;                        ///< CKA of all tokens
  std::ptrdiff_t blocks = 0;              ///< of tokens, each left out once
  std::vector<measured> standard_errors;  ///< rows × cols, row-major; see standard_error()
  std::vector<measured> centres;          ///< the same of centre()
  std::vector<double> row_dependence;     ///< see dependence()
  std::vector<double> col_dependence;     ///< the same of the columns' sites

  /// √((B − 1)/B Σ_b (θ_b − θ̄)²), θ_b the CKA without block b; 0 on the diagonal. The status of the
  /// cell, or of the first θ_b that has none; dependent_tokens where a block is shorter than
  /// 3 dependence() of either site.
  measured standard_error(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return standard_errors[static_cast<std::size_t>(i * table.cols() + j)];
  }
  /// Bθ − (B − 1)θ̄, without the bias of order 1/n that neighbours give: where they resemble each
  /// other, CKA of unrelated layers is above 0, debiased or not.
  measured centre(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return centres[static_cast<std::size_t>(i * table.cols() + j)];
  }
  /// The ends of the 95 % interval: the centre ± t standard errors, t of Student's distribution of
  /// B − 1 degrees of freedom. They may lie outside of what CKA can be: nothing is clamped.
  measured low(std::ptrdiff_t i, std::ptrdiff_t j) const { return end(i, j, -1); }
  /// See low().
  measured high(std::ptrdiff_t i, std::ptrdiff_t j) const { return end(i, j, 1); }

  /// How many tokens are worth one independent one, as measured: 1 + 2 Σ_k √a_k, a_k the debiased
  /// linear CKA of a site's tokens with those k later, less what halves of the tokens have: about ρ²
  /// where tokens are correlated by ρ. Summed up to where it is lost in noise; infinite if that is
  /// not within n/4 tokens.
  double dependence(std::ptrdiff_t row) const {
    return row_dependence[static_cast<std::size_t>(row)];
  }

 private:
  measured end(std::ptrdiff_t i, std::ptrdiff_t j, double sign) const;
};

namespace detail {

/// Keeps every token that counts but those of block b of `blocks`.
template <class T, class Memory>
layer_stack<T, Memory> without_block(layer_stack<T, Memory> const& stack, std::ptrdiff_t b,
                                     std::ptrdiff_t blocks) {
  std::vector<bool> keep(static_cast<std::size_t>(stack.all_tokens()));
  std::ptrdiff_t const n = stack.size(), begin = n * b / blocks, end = n * (b + 1) / blocks;
  for (std::ptrdiff_t i = 0; i < n; ++i)
    if (i < begin || i >= end) keep[static_cast<std::size_t>(stack.token(i))] = true;
  return stack.tokens(keep);
}

/// Blocks are to be so many times as long as dependence().
inline constexpr double block_per_dependence = 3;

/// See cka_intervals::dependence.
template <class T, class Memory, class On>
std::vector<double> find_dependence(layer_stack<T, Memory> const& stack, On const& on) {
  std::ptrdiff_t const n = stack.size();
  auto const sites = static_cast<std::size_t>(stack.sites());
  std::vector<double> out(sites, 1), last(sites);
  std::vector<char> open(sites, 1);
  auto const part = [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
    std::vector<bool> keep(static_cast<std::size_t>(stack.all_tokens()));
    for (std::ptrdiff_t i = begin; i < end; ++i)
      keep[static_cast<std::size_t>(stack.token(i))] = true;
    return stack.tokens(keep);
  };
  // Dependent tokens have a CKA above 0 however far apart they are, in inverse proportion to their
  // number: what half of them have with the other half.
  std::vector<double> outlying(sites);
  if (n / 2 >= debiased::minimum_tokens) {
    cka_table const halves =
        cka_matrix(part(0, n / 2), part(n / 2, n / 2 * 2), linear{}, debiased{}, on);
    for (std::size_t p = 0; p < sites; ++p) {
      auto const at = static_cast<std::ptrdiff_t>(p);
      if (halves.status(at, at) == status::ok)
        outlying[p] = std::clamp<double>(halves(at, at), 0, 1) / 2;
    }
  }
  // Of independent tokens a_k has the standard deviation √2/n.
  double const noise = 0.05 + 3 * std::sqrt(2.0) / static_cast<double>(n);
  for (std::ptrdiff_t lag = 1; std::find(open.begin(), open.end(), 1) != open.end(); lag *= 2) {
    if (lag > 1 && lag > n / 4) {
      for (std::size_t p = 0; p < sites; ++p)
        if (open[p]) out[p] = std::numeric_limits<double>::infinity();
      break;
    }
    cka_table const later = cka_matrix(part(0, n - lag), part(lag, n), linear{}, debiased{}, on);
    for (std::size_t p = 0; p < sites; ++p) {
      if (!open[p]) continue;
      auto const at = static_cast<std::ptrdiff_t>(p);
      measured const a = later(at, at);
      double const nearby = a.ok() ? (a - outlying[p]) / (1 - outlying[p]) : 0;
      double const r = std::sqrt((std::max)(nearby, 0.0));
      bool const lost = nearby < noise;
      // Between lags a straight line, whose ends count half each.
      if (lag > 1)
        out[p] += (last[p] + r) * static_cast<double>(lag) / 2 + r - last[p];
      else if (!lost)
        out[p] += 2 * r;
      last[p] = r;
      open[p] = !lost;
    }
  }
  return out;
}

/// `measure(b, B)` is the table without block b of B; of all tokens if b is −1.
/// @param  blocks     0: to be chosen
/// @param  rows, cols  find_dependence of the sites
template <class Measure>
cka_intervals jackknife(char const* where, std::ptrdiff_t tokens, std::ptrdiff_t blocks,
                        std::vector<double> rows, std::vector<double> cols,
                        Measure const& measure) {
  double const n = static_cast<double>(tokens);
  if (blocks == 0) {
    double longest = 1;
    for (auto const* all : {&rows, &cols})
      for (double const x : *all)
        if (block_per_dependence * 5 * x <= n) longest = (std::max)(longest, x);
    blocks = static_cast<std::ptrdiff_t>(std::clamp(n / (block_per_dependence * longest), 5., 10.));
  }
  if (blocks < 5 || blocks > tokens)
    reject(where, std::to_string(blocks) + " blocks of " + std::to_string(tokens) +
                      " tokens; it takes at least 5, and a token in each");
  cka_intervals out{measure(-1, blocks), blocks, {}, {}, std::move(rows), std::move(cols)};
  std::vector<cka_table> without;
  for (std::ptrdiff_t b = 0; b < blocks; ++b) without.push_back(measure(b, blocks));
  double const b = static_cast<double>(blocks);
  for (std::ptrdiff_t i = 0; i < out.table.rows(); ++i)
    for (std::ptrdiff_t j = 0; j < out.table.cols(); ++j) {
      running_stat values;
      status why = out.table.status(i, j);
      for (cka_table const& t : without) {
        if (why == status::ok) why = t.status(i, j);
        if (why == status::ok) values.add(t(i, j));
      }
      double const dependence = (std::max)(out.row_dependence[static_cast<std::size_t>(i)],
                                           out.col_dependence[static_cast<std::size_t>(j)]);
      if (why == status::ok && n / b < block_per_dependence * dependence && dependence > 1)
        why = status::dependent_tokens;
      bool const ok = why == status::ok;
      out.standard_errors.push_back(ok ? measured(std::sqrt((b - 1) / b * values.m2))
                                       : measured(why));
      out.centres.push_back(
          ok ? measured(out.table(i, j) + (b - 1) * (out.table(i, j) - values.mean))
             : measured(why));
    }
  return out;
}

}  // namespace detail

inline measured cka_intervals::end(std::ptrdiff_t i, std::ptrdiff_t j, double sign) const {
  measured const error = standard_error(i, j);
  if (!error.ok()) return error;
  return centre(i, j) + sign * detail::student_975(static_cast<double>(blocks - 1)) * error;
}

/// CKA of every pair of sites of one model, with 95 % intervals.
///
/// The tokens that count are cut into runs of neighbours; CKA is taken without each in turn. What
/// this approximates: the spread of CKA over other sequences of tokens of the same length from the
/// same source, about what CKA tends to with ever more of them. It is poor where a few tokens decide
/// the value (cka_table::top_token_share; they hide, too, how tokens depend on one another), or
/// close to 1, where the distribution is lopsided.
///
/// @param  stack   S sites over the same n tokens; masks of the stack hold
/// @param  blocks  B, 5 … n; each about n/B tokens. 0: at most 10, and as many as leave each 3 times
///                 as long as tokens depend on one another
/// @param  kernel, by, on  as for cka_matrix. With rbf{} each table takes σ from its own tokens
/// @return S × S values with standard errors; dependent_tokens where blocks are too short for how
///         long tokens depend on one another
/// @throws std::invalid_argument if blocks are fewer than 5 or more than tokens; as cka_matrix
/// @note   B + 1 times the cost of cka_matrix, and 1 to log₂(n/4) linear tables of 2S sites that measure the
///         dependence
/// @see    Künsch, Annals of Statistics 1989, section 2
template <class T, class Memory, class Kernel = linear, estimator Estimator = debiased,
          class On = default_backend_t<Memory>>
cka_intervals cka_jackknife(layer_stack<T, Memory> const& stack, std::ptrdiff_t blocks = 0,
                            Kernel const& kernel = {}, Estimator by = {}, On const& on = {}) {
  std::vector<double> const dependence = detail::find_dependence(stack, on);
  return detail::jackknife("rflow::cka_jackknife", stack.size(), blocks, dependence, dependence,
                           [&](std::ptrdiff_t b, std::ptrdiff_t of) {
                             return cka_matrix(b < 0 ? stack : detail::without_block(stack, b, of),
                                               kernel, by, on);
                           });
}

/// The same for the sites of two models over the same tokens: rows from the first, columns from the
/// second.
/// @throws std::invalid_argument if the stacks differ in tokens; as above
template <class T, class U, class Memory, class Kernel = linear, estimator Estimator = debiased,
          class On = default_backend_t<Memory>>
cka_intervals cka_jackknife(layer_stack<T, Memory> const& a, layer_stack<U, Memory> const& b,
                            std::ptrdiff_t blocks = 0, Kernel const& kernel = {}, Estimator by = {},
                            On const& on = {}) {
  constexpr char const* where = "rflow::cka_jackknife";
  if (a.size() != b.size())
    detail::reject(where, "the stacks have " + std::to_string(a.size()) + " and " +
                              std::to_string(b.size()) + " tokens");
  return detail::jackknife(
      where, a.size(), blocks, detail::find_dependence(a, on), detail::find_dependence(b, on),
      [&](std::ptrdiff_t block, std::ptrdiff_t of) {
        return block < 0 ? cka_matrix(a, b, kernel, by, on)
                         : cka_matrix(detail::without_block(a, block, of),
                                      detail::without_block(b, block, of), kernel, by, on);
      });
}

template <detail::no_stack X, class... More>
cka_intervals cka_jackknife(X const&, More const&...) {
  static_cast<void>(sizeof(detail::refuse_stackless<X>));
  return {};
}

}  // namespace rflow
