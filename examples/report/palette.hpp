// SPDX-License-Identifier: Apache-2.0
#pragma once

// One colour ramp for every heat map: viridis, which is even in lightness and safe for colour-blind
// readers.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>

#include "text.hpp"

namespace report {

struct rgb {
  int r, g, b;
};

inline constexpr std::array<rgb, 9> ramp{{{68, 1, 84},
                                          {71, 45, 123},
                                          {59, 82, 139},
                                          {44, 114, 142},
                                          {33, 145, 140},
                                          {40, 174, 128},
                                          {94, 201, 98},
                                          {173, 220, 48},
                                          {253, 231, 37}}};

inline std::string hex(rgb c) {
  char text[8];
  std::snprintf(text, sizeof text, "#%02x%02x%02x", c.r & 255, c.g & 255, c.b & 255);
  return text;
}

/// Colour of x in [0, 1]; outside, that of the nearer end.
inline rgb colour(double x) {
  double const at = std::clamp(x, 0.0, 1.0) * (ramp.size() - 1);
  auto const i = std::min(static_cast<std::size_t>(at), ramp.size() - 2);
  double const f = at - static_cast<double>(i);
  auto const mix = [f](int a, int b) { return static_cast<int>(std::lround(a + f * (b - a))); };
  return {mix(ramp[i].r, ramp[i + 1].r), mix(ramp[i].g, ramp[i + 1].g),
          mix(ramp[i].b, ramp[i + 1].b)};
}

/// The ramp as a strip with its two ends named, in HTML.
inline std::string legend(std::string const& low, std::string const& high,
                          std::string const& what) {
  std::string stops;
  for (rgb const c : ramp) join(stops, ",", hex(c));
  return "<div class=\"ramp\"><span>" + low +
         "</span><i style=\"background:linear-gradient(to right," + stops + ")\"></i><span>" +
         high + "</span><b class=\"hole\"></b><span>" + what + "</span></div>\n";
}

}  // namespace report
