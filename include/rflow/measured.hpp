// SPDX-License-Identifier: Apache-2.0
#pragma once

// What an answer looks like: a number, or the reason why there is none.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

namespace rflow {

/// Why a value is not a number.
enum class status : std::uint8_t {
  ok,
  too_few_rows,    ///< fewer tokens than the estimator needs
  too_few_sites,   ///< a chain of one site has no steps
  zero_rows,       ///< too few rows with a non-zero norm, so no direction to compare
  constant_layer,  ///< all tokens have the same representation (to rounding)
  ill_conditioned,  ///< rounding leaves fewer digits than are promised, even with products in double;
                    ///< p over shuffled tokens: too many of them outweigh the others
  zero_step,        ///< a layer equals the one before it (to rounding): the path has no direction
  zero_bandwidth,    ///< the median distance is 0, so an RBF kernel has no scale
  non_finite,        ///< the data hold a NaN or an infinity
  out_of_range,      ///< a figure that double does not have: scale the data
  diverged,          ///< an optimisation ended in numbers that are not finite
  not_requested,     ///< the option that would compute it is off
  dependent_tokens,  ///< neighbouring tokens resemble each other too far for so few of them
  different_widths,  ///< sites of several widths have no difference and no cosine
};

/// The reason in words, for reports.
constexpr std::string_view to_string(status why) {
  switch (why) {
    case status::ok: return "ok";
    case status::too_few_rows: return "too_few_rows";
    case status::too_few_sites: return "too_few_sites";
    case status::zero_rows: return "zero_rows";
    case status::constant_layer: return "constant_layer";
    case status::ill_conditioned: return "ill_conditioned";
    case status::zero_step: return "zero_step";
    case status::zero_bandwidth: return "zero_bandwidth";
    case status::non_finite: return "non_finite";
    case status::out_of_range: return "out_of_range";
    case status::diverged: return "diverged";
    case status::not_requested: return "not_requested";
    case status::dependent_tokens: return "dependent_tokens";
    case status::different_widths: return "different_widths";
  }
  return "unknown";
}

/// A scalar result. `value` is NaN exactly when `why` is not ok.
struct measured {
  double value = std::numeric_limits<double>::quiet_NaN();  ///< NaN if there is none
  status why = status::not_requested;                       ///< ok, or why there is none

  constexpr measured() = default;
  /// There is a value.
  constexpr measured(double x) : value(x), why(status::ok) {}
  /// There is none, for this reason.
  constexpr measured(status reason) : why(reason) {}

  /// The value, or NaN.
  constexpr operator double() const { return value; }
  /// Whether there is a value.
  constexpr bool ok() const { return why == status::ok; }
};

/// Where the first NaN or infinity of a site stands.
struct position {
  std::ptrdiff_t token = -1;    ///< row, from 0; −1 if there is none
  std::ptrdiff_t feature = -1;  ///< column

  /// Whether there is one.
  constexpr bool found() const { return token >= 0; }
};

/// A file that breaks the rules of its format. The text names the file, the byte offset and the
/// rule.
class format_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;

  /// @param file  its name
  /// @param byte  offset at which the rule is broken
  /// @param rule  what is wrong there
  format_error(std::string const& file, std::uint64_t byte, std::string const& rule)
      : std::runtime_error(file + ": byte " + std::to_string(byte) + ": " + rule) {}
};

}  // namespace rflow
