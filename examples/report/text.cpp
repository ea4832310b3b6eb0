// SPDX-License-Identifier: Apache-2.0
#include "text.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace report {

std::string number(double x, int digits) {
  if (std::isnan(x)) return "nan";
  char text[64];
  std::snprintf(text, sizeof text, "%.*g", digits, x);
  // %g turns to powers of ten as soon as the digits run out; people read 23848 more easily.
  if (double const size = std::abs(x);
      size >= 1 && size < 1e5 && std::string_view(text).find('e') != std::string_view::npos)
    std::snprintf(text, sizeof text, "%.0f", x);
  return text;
}

std::string html_number(double x, int digits) {
  if (std::isnan(x)) return "–";
  std::string text = number(x, digits);
  std::string power;
  if (auto const e = text.find('e'); e != std::string::npos) {
    power = std::to_string(std::atoi(text.c_str() + e + 1));
    text.resize(e);
  }
  auto const with_minus = [](std::string s) { return s[0] == '-' ? "−" + s.substr(1) : s; };
  text = with_minus(text);
  return power.empty() ? text : text + "×10<sup>" + with_minus(power) + "</sup>";
}

std::string number(rflow::measured x, int digits) {
  return x.ok() ? number(x.value, digits) : std::string(rflow::to_string(x.why));
}

std::string html_number(rflow::measured x, int digits) {
  if (x.ok()) return html_number(x.value, digits);
  return "<span class=\"none\" title=\"" + html(explain(x.why)) + "\">" +
         std::string(rflow::to_string(x.why)) + "</span>";
}

void join(std::string& list, std::string_view separator, std::string_view item) {
  if (!list.empty()) list += separator;
  list += item;
}

std::string plural(std::ptrdiff_t n, std::string const& thing) {
  return std::to_string(n) + " " + thing + (n == 1 ? "" : "s");
}

std::string utf8(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    auto const byte = [&](std::size_t k) { return static_cast<unsigned char>(text[k]); };
    unsigned const lead = byte(i);
    std::size_t const length = lead < 0x80                   ? 1
                               : lead >= 0xc2 && lead < 0xe0 ? 2
                               : lead >= 0xe0 && lead < 0xf0 ? 3
                               : lead >= 0xf0 && lead < 0xf5 ? 4
                                                             : 0;
    bool valid = length > 0 && i + length <= text.size();
    for (std::size_t k = 1; valid && k < length; ++k) valid = (byte(i + k) & 0xc0) == 0x80;
    if (valid && length == 3) {  // neither overlong nor a surrogate
      valid = !(lead == 0xe0 && byte(i + 1) < 0xa0) && !(lead == 0xed && byte(i + 1) >= 0xa0);
    } else if (valid && length == 4) {
      valid = !(lead == 0xf0 && byte(i + 1) < 0x90) && !(lead == 0xf4 && byte(i + 1) >= 0x90);
    }
    if (valid)
      out += text.substr(i, length);
    else
      out += "\xef\xbf\xbd";
    i += valid ? length : 1;
  }
  return out;
}

std::string html(std::string_view text) {
  std::string out;
  for (char const c : utf8(text)) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out += static_cast<unsigned char>(c) < ' ' || c == '\x7f' ? ' ' : c;
    }
  }
  return out;
}

std::string one_line(std::string_view text) {
  std::string out;
  for (char const c : text) out += static_cast<unsigned char>(c) < ' ' || c == '\x7f' ? '?' : c;
  return out;
}

std::string_view explain(rflow::status why) {
  using rflow::status;
  switch (why) {
    case status::ok: return "";
    case status::too_few_rows: return "there are fewer tokens than it takes";
    case status::too_few_sites: return "there are fewer sites than it takes";
    case status::zero_rows: return "too few tokens have a representation other than zero";
    case status::constant_layer: return "all tokens have the same representation";
    case status::ill_conditioned:
      return "rounding leaves fewer digits than are promised, even with products in double";
    case status::zero_step: return "a layer equals the one before it, so the step has no direction";
    case status::zero_bandwidth: return "the median distance between tokens is 0";
    case status::non_finite: return "the data hold a NaN or an infinity";
    case status::diverged: return "the training ended in numbers that are not finite";
    case status::out_of_range: return "the squares of the values leave the range of double";
    case status::not_requested: return "not computed";
    case status::dependent_tokens:
      return "neighbouring tokens resemble each other too far for so few of them";
    case status::different_widths: return "sites of several widths have no common space";
  }
  return "unknown";
}

}  // namespace report
