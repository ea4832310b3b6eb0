// SPDX-License-Identifier: Apache-2.0
#pragma once

// Means over many draws with their standard errors.

#include <rflow/eigen.hpp>
#include <rflow/threads.hpp>
#include <rflow/variance.hpp>

#include <cmath>
#include <string>
#include <vector>

#include "decision.hpp"
#include "layers.hpp"

namespace validation {

/// A mean and its standard error of some values.
template <class Value>
estimate estimate_of(std::size_t count, Value const& value) {
  auto const n = static_cast<double>(count);
  estimate out;
  for (std::size_t i = 0; i < count; ++i) out.mean += value(i) / n;
  double squares = 0;
  for (std::size_t i = 0; i < count; ++i) squares += (value(i) - out.mean) * (value(i) - out.mean);
  out.error = std::sqrt(squares / (n - 1) / n);
  return out;
}

/// Batches of whole sequences, each with a place of its own for results: the same for any number of
/// threads.
struct sampling {
  rflow::detail::team& team;
  integer batches, per_batch;  // sequences in a batch

  integer draws() const { return batches * per_batch; }

  /// Calls f(batch, thread, values) for every batch; f sets `quantities` values.
  template <class F>
  std::vector<double> values(std::size_t quantities, F const& f) const {
    std::vector<double> out(quantities * static_cast<std::size_t>(batches));
    team.run(batches, [&](std::ptrdiff_t b, int thread) {
      f(b, thread, out.data() + quantities * static_cast<std::size_t>(b));
    });
    return out;
  }
  template <class F>
  std::vector<estimate> run(std::size_t quantities, F const& f) const {
    auto const all = values(quantities, f);
    std::vector<estimate> out;
    for (std::size_t q = 0; q < quantities; ++q)
      out.push_back(estimate_of(static_cast<std::size_t>(batches),
                                [&](std::size_t i) { return all[i * quantities + q]; }));
    return out;
  }
};

/// St2² of X, X + f(X), without normalisation: the library's metric, summed over the sequences.
inline double st2_square(matrix const& x, matrix const& update, matrix& after) {
  after = x + update;
  rflow::layer_stack const chain{rflow::as_view(x), rflow::as_view(after)};
  double const st2 =
      rflow::variance(chain, rflow::normalization::none, rflow::on_cpu{.threads = 1}).st2;
  return st2 * st2;
}

/// One number that theory predicts and simulation estimates.
struct check {
  std::string statement, quantity, where;
  double closed_form = 0;
  estimate seen;
  double scale =
      0;  // what 5 % are taken of: the closed form, or a standard deviation where it is 0

  double z() const { return (seen.mean - closed_form) / seen.error; }
  double relative_error() const { return seen.error / scale; }
  verdict judged(decision_rule const& by) const { return by.equal(seen, closed_form, scale); }
};

}  // namespace validation
