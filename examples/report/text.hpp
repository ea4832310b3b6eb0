// SPDX-License-Identifier: Apache-2.0
#pragma once

// Numbers and names as text: short for people, escaped for HTML.

#include <rflow/view.hpp>

#include <string>
#include <string_view>

namespace report {

/// A number of `digits` significant digits: "0.05", "8.7e+06"; "nan" if it is none.
std::string number(double x, int digits = 3);

/// The same for HTML, with a true minus and powers of ten set as such.
std::string html_number(double x, int digits = 3);

/// The value, or the status in words where there is none.
std::string number(rflow::measured x, int digits = 3);
std::string html_number(rflow::measured x, int digits = 3);

/// Appends an item to a list: after the separator, unless it is the first.
void join(std::string& list, std::string_view separator, std::string_view item);

/// One thing or many: "1 token", "2 tokens".
std::string plural(std::ptrdiff_t n, std::string const& thing);

/// Text with & < > " ' replaced by entities, control characters by spaces, and what is not UTF-8 by
/// U+FFFD.
std::string html(std::string_view text);

/// On one line of a terminal: no control characters, whatever a file's name holds.
std::string one_line(std::string_view text);

/// Valid UTF-8, for JSON: broken bytes become U+FFFD.
std::string utf8(std::string_view text);

/// Why there is no value, for readers.
std::string_view explain(rflow::status why);

}  // namespace report
