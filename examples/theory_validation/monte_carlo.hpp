// SPDX-License-Identifier: Apache-2.0
#pragma once

// Means over many draws with their standard errors, and checks of them as one family.

#include <rflow/eigen.hpp>
#include <rflow/threads.hpp>
#include <rflow/variance.hpp>

#include <cmath>
#include <string>
#include <vector>

#include "layers.hpp"

namespace validation {

/// A mean over batches, and its standard error.
struct estimate {
  double mean = 0, error = 0;
};

/// Batches of whole sequences, each with a place of its own for results: the same for any number of
/// threads.
struct sampling {
  rflow::detail::team& team;
  integer batches, per_batch;  // sequences in a batch

  integer draws() const { return batches * per_batch; }

  /// Calls f(batch, thread, values) for every batch; f sets `quantities` values.
  template <class F>
  std::vector<estimate> run(std::size_t quantities, F const& f) const {
    std::vector<double> values(quantities * static_cast<std::size_t>(batches));
    team.run(batches, [&](std::ptrdiff_t b, int thread) {
      f(b, thread, values.data() + quantities * static_cast<std::size_t>(b));
    });
    auto const n = static_cast<double>(batches);
    std::vector<estimate> out(quantities);
    for (std::size_t q = 0; q < quantities; ++q) {
      for (std::size_t i = q; i < values.size(); i += quantities) out[q].mean += values[i] / n;
      double squares = 0;
      for (std::size_t i = q; i < values.size(); i += quantities)
        squares += (values[i] - out[q].mean) * (values[i] - out[q].mean);
      out[q].error = std::sqrt(squares / (n - 1) / n);
    }
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
      0;  // what 1 % and 5 % are taken of: the closed form, or a standard deviation where it is 0

  double z() const { return (seen.mean - closed_form) / seen.error; }
  double relative_error() const { return seen.error / scale; }
  /// Sees a closed form that is wrong by this share, from either side.
  bool notices(double share, double bound) const {
    double const off = share * scale;
    return std::abs(seen.mean - closed_form - off) > bound * seen.error &&
           std::abs(seen.mean - closed_form + off) > bound * seen.error;
  }
};

/// |z| that one of `count` checks exceeds by chance with probability 1e-6: Bonferroni's bound for
/// Student's t (Fisher's expansion).
inline double family_bound(std::size_t count, integer batches) {
  double low = 0, high = 20;
  for (int i = 0; i < 100; ++i) {
    double const middle = (low + high) / 2;
    (std::erfc(middle / std::sqrt(2.0)) * static_cast<double>(count) > 1e-6 ? low : high) = middle;
  }
  return high + (high * high * high + high) / (4 * static_cast<double>(batches - 1));
}

}  // namespace validation
