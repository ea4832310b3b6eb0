// SPDX-License-Identifier: Apache-2.0
#pragma once

// When simulation has decided a question: the rule that all checks share, and nothing else, so that it
// can be tested on numbers of known laws.
//
// An estimate is a mean over batches with its standard error. A statement is not held if an estimate
// contradicts it by `bound` standard errors, which of all tests of a run together happens by chance
// with probability `false_alarm` (Bonferroni; batch means taken as normal, their spread as estimated).
// It is held if nothing contradicts it and the standard error is so small that a constant that is
// wrong by `share` would have been contradicted but for a chance of `missed`. Else it is not decided.

#include <cmath>
#include <cstddef>

namespace validation {

/// A mean over batches, and its standard error.
struct estimate {
  double mean = 0, error = 0;
};

enum class verdict { held, not_decided, not_held };  // in the order of how bad that is

constexpr verdict worse_of(verdict a, verdict b) { return a > b ? a : b; }

/// |z| that a normal variable exceeds with this probability, on both sides together.
inline double two_sided_quantile(double probability) {
  double low = 0, high = 40;
  for (int i = 0; i < 200; ++i) {
    double const middle = (low + high) / 2;
    (std::erfc(middle / std::sqrt(2.0)) > probability ? low : high) = middle;
  }
  return high;
}

/// The rule of a family of tests.
struct decision_rule {
  static constexpr double false_alarm = 1e-6;  // of the whole family
  static constexpr double missed = 1e-6;       // of one constant that is wrong by the share
  static constexpr double share = 0.05;

  double bound;  // in standard errors
  double reach;  // of them, that the share has to be at least

  /// @param tests    estimates that are judged at most, every look at one counted
  /// @param batches  that each is a mean of
  decision_rule(std::size_t tests, std::ptrdiff_t batches) {
    // Fisher's expansion for Student's t.
    auto const student = [&](double z) {
      return z + (z * z * z + z) / (4 * static_cast<double>(batches - 1));
    };
    bound = student(two_sided_quantile(false_alarm / static_cast<double>(tests)));
    reach = bound + student(two_sided_quantile(2 * missed));
  }

  /// The largest standard error that decides, of what the share is taken of.
  double enough() const { return share / reach; }

  /// A constant: `scale` is what the share is taken of.
  verdict equal(estimate const& seen, double constant, double scale) const {
    if (!(std::abs(seen.mean - constant) < bound * seen.error)) return verdict::not_held;
    return seen.error <= enough() * std::abs(scale) ? verdict::held : verdict::not_decided;
  }
  /// That something is above 0.
  verdict positive(estimate const& seen) const {
    if (seen.mean > bound * seen.error) return verdict::held;
    return seen.mean < -bound * seen.error ? verdict::not_held : verdict::not_decided;
  }
};

}  // namespace validation
