// SPDX-License-Identifier: Apache-2.0
#pragma once

// What was compared, how far it was off, and what failed.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <tuple>

#include <rflow/view.hpp>

namespace oracle {

using rflow::measured;
using rflow::status;

/// A set of statuses; what else there is by name is in the last bit.
using statuses = std::uint32_t;
constexpr statuses bit(status s) { return statuses{1} << static_cast<unsigned>(s); }
/// Where rounding has eaten the self term: the data leave too few digits.
inline bool is_ill(status s) { return rflow::to_string(s) == "ill_conditioned"; }
inline constexpr statuses ill = statuses{1} << 31;
inline constexpr statuses ok = bit(status::ok);

class record {
 public:
  bool verbose = false;
  std::uint64_t seed = 0, number = 0;
  std::string program, story, type, condition;  // of the case under way
  bool large = false;
  std::uint64_t cases = 0, cells = 0, failures = 0, failed_cases = 0, ill_cases = 0,
                large_cases = 0;
  std::map<std::string, std::uint64_t> topics;

  void begin(std::uint64_t k) {
    number = k;
    case_failed_ = case_ill_ = false;
    ++cases;
  }
  void end() {
    failed_cases += case_failed_;
    ill_cases += case_ill_;
    large_cases += large;
  }

  /// A result of a quantity. It is right if it is ok and within `ceiling` of what is expected, in units of
  /// `unit`; or not ok, for a reason that is among those allowed.
  void check(char const* quantity, measured const& got, double expected, double unit,
             double ceiling, statuses allowed, std::string const& where) {
    row& r = rows_[{quantity, type, condition}];
    ++r.cells;
    ++cells;
    if (verbose)
      std::printf("  %s %s: %s %.17g, expected %.17g\n", quantity, where.c_str(),
                  std::string(to_string(got.why)).c_str(), got.value, expected);
    if (!got.ok()) {
      bool const by_name = is_ill(got.why);
      ++r.without[std::string(to_string(got.why))];
      if (by_name || got.why == status::constant_layer) case_ill_ |= (allowed & ok) != 0;
      if (((by_name ? ill : bit(got.why)) & allowed) == 0) {
        char text[160];
        std::snprintf(text, sizeof text, "status %s, expected %.10g",
                      std::string(to_string(got.why)).c_str(), expected);
        fail(r, quantity, where,
             (allowed & ok) != 0 ? text
                                 : "status " + std::string(to_string(got.why)) + " is another");
      } else if (!std::isnan(got.value)) {
        fail(r, quantity, where, "a status with a value");
      }
      return;
    }
    char text[200];
    if ((allowed & ok) == 0) {
      std::snprintf(text, sizeof text, "ok with %.10g where there is no value", got.value);
      return fail(r, quantity, where, text);
    }
    double const error = got.value == expected ? 0 : std::abs(got.value - expected) / unit;
    if (error > r.worst) r.worst = error, r.worst_case = number;
    r.ceiling = ceiling;
    if (!(error <= ceiling)) {
      std::snprintf(text, sizeof text, "ok with %.12g, expected %.12g (off by %.1e, allowed %.0e)",
                    got.value, expected, error, ceiling);
      fail(r, quantity, where, text);
    }
  }
  /// Something that holds or does not.
  void require(char const* quantity, bool holds, std::string const& where,
               std::string const& what) {
    row& r = rows_[{quantity, type, condition}];
    ++r.cells;
    ++cells;
    if (!holds) fail(r, quantity, where, what);
  }

  void print() const {
    std::printf("%-18s %-10s %-14s %9s %9s %8s %7s %8s  %s\n", "quantity", "type", "condition",
                "cells", "largest", "allowed", "failed", "e.g.", "without a value");
    for (auto const& [key, r] : rows_) {
      std::string rest;
      for (auto const& [why, count] : r.without)
        rest += (rest.empty() ? "" : ", ") + std::to_string(count) + " " + why;
      std::printf("%-18s %-10s %-14s %9llu %9.1e %8.0e %7llu %8llu  %s\n", std::get<0>(key).c_str(),
                  std::get<1>(key).c_str(), std::get<2>(key).c_str(),
                  static_cast<unsigned long long>(r.cells), r.worst, r.ceiling,
                  static_cast<unsigned long long>(r.failed),
                  static_cast<unsigned long long>(r.failed > 0 ? r.first_failed : r.worst_case),
                  rest.c_str());
    }
  }

  /// Largest errors by quantity, over all conditions: for docs/numerics.md.
  void print_markdown() const {
    char const* const types[] = {"double", "float", "f16", "bf16"};
    std::map<std::string, std::map<std::string, row>> by_quantity;
    for (auto const& [key, r] : rows_) {
      row& sum = by_quantity[std::get<0>(key)][std::get<1>(key)];
      sum.cells += r.cells;
      sum.failed += r.failed;
      sum.worst = std::max(sum.worst, r.worst);
      sum.ceiling = std::max(sum.ceiling, r.ceiling);
    }
    std::printf(
        "| | allowed | float | f16 | bf16 | allowed, double | double | results |\n"
        "|---|---|---|---|---|---|---|---|\n");
    for (auto& [quantity, of] : by_quantity) {
      std::uint64_t results = 0;
      double narrow = 0;
      for (char const* const t : types) {
        results += of[t].cells;
        if (std::string(t) != "double") narrow = std::max(narrow, of[t].ceiling);
      }
      if (narrow == 0 && of["double"].ceiling == 0) continue;  // something that holds or does not
      std::printf("| %s | %.0e | %.0e | %.0e | %.0e | %.0e | %.0e | %llu |\n", quantity.c_str(),
                  narrow, of["float"].worst, of["f16"].worst, of["bf16"].worst,
                  of["double"].ceiling, of["double"].worst,
                  static_cast<unsigned long long>(results));
    }
  }

 private:
  struct row {
    std::uint64_t cells = 0, failed = 0, worst_case = 0, first_failed = 0, shown = 0,
                  shown_case = ~std::uint64_t{0};
    double worst = 0, ceiling = 0;
    std::map<std::string, std::uint64_t> without;
  };

  void fail(row& r, char const* quantity, std::string const& where, std::string const& what) {
    ++failures;
    if (r.failed++ == 0) r.first_failed = number;
    case_failed_ = true;
    if (!verbose && (r.shown >= 3 || r.shown_case == number)) return;
    ++r.shown;
    r.shown_case = number;
    std::printf("FAILED %s %s: %s\n  %s --seed %llu --case %llu   %s\n", quantity, where.c_str(),
                what.c_str(), program.c_str(), static_cast<unsigned long long>(seed),
                static_cast<unsigned long long>(number), story.c_str());
  }

  std::map<std::tuple<std::string, std::string, std::string>, row> rows_;
  bool case_failed_ = false, case_ill_ = false;
};

}  // namespace oracle
