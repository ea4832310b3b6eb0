// SPDX-License-Identifier: Apache-2.0
#pragma once

// How far CKA might have come out otherwise on other tokens of the same kind: a delete-block
// jackknife over runs of neighbouring tokens. It speaks of the tokens alone, not of other models or
// seeds, and needs blocks longer than tokens depend on one another.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <rflow/cka.hpp>
#include <rflow/default.hpp>
#include <rflow/moments.hpp>
#include <rflow/statistics.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// A table of CKA with its spread. Intervals hold the value that more tokens of the same kind would
/// give in about 95 of 100 cases.
struct cka_intervals {
  cka_table table;                        ///< CKA of all tokens
  std::ptrdiff_t blocks = 0;              ///< of tokens, each left out once
  std::vector<measured> standard_errors;  ///< rows × cols, row-major; see standard_error()

  /// √((B − 1)/B Σ_b (θ_b − θ̄)²), θ_b the CKA without block b; 0 on the diagonal. The status of the
  /// cell, or of the first θ_b that has none.
  measured standard_error(std::ptrdiff_t i, std::ptrdiff_t j) const {
    return standard_errors[static_cast<std::size_t>(i * table.cols() + j)];
  }
  /// The ends of the 95 % interval: the value ± t standard errors, t of Student's distribution of
  /// B − 1 degrees of freedom. They may lie outside of what CKA can be: nothing is clamped.
  measured low(std::ptrdiff_t i, std::ptrdiff_t j) const { return end(i, j, -1); }
  /// See low().
  measured high(std::ptrdiff_t i, std::ptrdiff_t j) const { return end(i, j, 1); }

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

/// `measure(b)` is the table without block b; of all tokens if b is −1.
template <class Measure>
cka_intervals jackknife(char const* where, std::ptrdiff_t tokens, std::ptrdiff_t blocks,
                        Measure const& measure) {
  if (blocks < 5 || blocks > tokens)
    reject(where, std::to_string(blocks) + " blocks of " + std::to_string(tokens) +
                      " tokens; it takes at least 5, and a token in each");
  cka_intervals out{measure(-1), blocks, {}};
  std::vector<cka_table> without;
  for (std::ptrdiff_t b = 0; b < blocks; ++b) without.push_back(measure(b));
  for (std::ptrdiff_t i = 0; i < out.table.rows(); ++i)
    for (std::ptrdiff_t j = 0; j < out.table.cols(); ++j) {
      running_stat values;
      status why = out.table.status(i, j);
      for (cka_table const& t : without) {
        if (why == status::ok) why = t.status(i, j);
        if (why == status::ok) values.add(t(i, j));
      }
      double const b = static_cast<double>(blocks);
      out.standard_errors.push_back(why == status::ok ? measured(std::sqrt((b - 1) / b * values.m2))
                                                      : measured(why));
    }
  return out;
}

}  // namespace detail

inline measured cka_intervals::end(std::ptrdiff_t i, std::ptrdiff_t j, double sign) const {
  measured const error = standard_error(i, j);
  if (!error.ok()) return error;
  return table(i, j) + sign * detail::student_975(static_cast<double>(blocks - 1)) * error;
}

/// CKA of every pair of sites of one model, with 95 % intervals.
///
/// The tokens that count are cut into runs of neighbours; CKA is taken without each in turn. What
/// this approximates: the spread of CKA over other sequences of tokens of the same length from the
/// same source, where tokens further apart than a block do not depend on one another. It knows nothing
/// of the bias that all of them share, and is poor where a few tokens decide the value
/// (cka_table::top_token_share), or close to 1, where the distribution is lopsided.
///
/// @param  stack   S sites over the same n tokens; masks of the stack hold
/// @param  blocks  B, 5 … n; each about n/B tokens. Longer blocks allow for more dependence, more of
///                 them give a steadier error
/// @param  kernel, by, on  as for cka_matrix. With rbf{} each table takes σ from its own tokens
/// @return S × S values with standard errors
/// @throws std::invalid_argument if blocks are fewer than 5 or more than tokens; as cka_matrix
/// @note   B + 1 times the cost of cka_matrix
/// @see    Künsch, Annals of Statistics 1989, section 2
template <class T, class Memory, class Kernel = linear, estimator Estimator = debiased,
          class On = default_backend_t<Memory>>
cka_intervals cka_jackknife(layer_stack<T, Memory> const& stack, std::ptrdiff_t blocks = 10,
                            Kernel const& kernel = {}, Estimator by = {}, On const& on = {}) {
  return detail::jackknife("rflow::cka_jackknife", stack.size(), blocks, [&](std::ptrdiff_t b) {
    return cka_matrix(b < 0 ? stack : detail::without_block(stack, b, blocks), kernel, by, on);
  });
}

/// The same for the sites of two models over the same tokens: rows from the first, columns from the
/// second.
/// @throws std::invalid_argument if the stacks differ in tokens; as above
template <class T, class U, class Memory, class Kernel = linear, estimator Estimator = debiased,
          class On = default_backend_t<Memory>>
cka_intervals cka_jackknife(layer_stack<T, Memory> const& a, layer_stack<U, Memory> const& b,
                            std::ptrdiff_t blocks = 10, Kernel const& kernel = {},
                            Estimator by = {}, On const& on = {}) {
  constexpr char const* where = "rflow::cka_jackknife";
  if (a.size() != b.size())
    detail::reject(where, "the stacks have " + std::to_string(a.size()) + " and " +
                              std::to_string(b.size()) + " tokens");
  return detail::jackknife(where, a.size(), blocks, [&](std::ptrdiff_t block) {
    return block < 0 ? cka_matrix(a, b, kernel, by, on)
                     : cka_matrix(detail::without_block(a, block, blocks),
                                  detail::without_block(b, block, blocks), kernel, by, on);
  });
}

}  // namespace rflow
