// SPDX-License-Identifier: Apache-2.0
#include "cases.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace oracle {

namespace {

std::string text_of(char const* format, double x) {
  char line[64];
  std::snprintf(line, sizeof line, format, x);
  return line;
}

double stored(dtype t, double x) {
  switch (t) {
    case dtype::f64: return x;
    case dtype::f32: return static_cast<double>(static_cast<float>(x));
    case dtype::half:
      return static_cast<double>(static_cast<float>(rflow::f16::nearest(static_cast<float>(x))));
    case dtype::brain:
      return static_cast<double>(static_cast<float>(rflow::bf16::nearest(static_cast<float>(x))));
  }
  return 0;
}
double limit(dtype t) { return t == dtype::f64 ? 1e306 : t == dtype::half ? 6e4 : 1e38; }

/// One site's values.
std::vector<double> draw_site(chance_source& r, std::size_t n, std::size_t d, cause const& shared,
                              double part) {
  std::vector<double> x(n * d), map(shared.rank * d);
  for (double& v : map) v = r.bell();
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < d; ++j) {
      double v = r.bell();
      if (part > 0)
        for (std::size_t k = 0; k < shared.rank; ++k)
          v += part * shared.z[i * shared.rank + k] * map[k * d + j];
      x[i * d + j] = v;
    }
  return x;
}

/// A layer in which something is missing. Its name.
char const* degenerate(chance_source& r, std::vector<double>& x, std::size_t n, std::size_t d) {
  auto const copy = [&](std::size_t from, std::size_t to) {
    std::copy_n(x.begin() + static_cast<std::ptrdiff_t>(from * d), d,
                x.begin() + static_cast<std::ptrdiff_t>(to * d));
  };
  switch (r.below(14)) {
    case 0:  // all tokens alike
      for (std::size_t i = 1; i < n; ++i) copy(0, i);
      return "constant";
    case 1: {  // all but one
      std::size_t const other = r.below(n);
      std::size_t const base = (other + 1) % n;
      for (std::size_t i = 0; i < n; ++i)
        if (i != other) copy(base, i);
      return "all alike but one";
    }
    case 2:  // rank one
      for (std::size_t i = 1; i < n; ++i) {
        double const c = r.bell();
        for (std::size_t j = 0; j < d; ++j) x[i * d + j] = c * x[j];
      }
      return "rank one";
    case 3: {  // few different tokens
      std::size_t const kinds = r.from(2, 4);
      for (std::size_t i = kinds; i < n; ++i) copy(r.below(kinds), i);
      return "copies";
    }
    case 4:  // some zero rows
      for (std::size_t i = 0; i < n; ++i)
        if (r.happens(0.3)) std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(i * d), d, 0.0);
      return "zero rows";
    case 5:  // nothing but one row
      std::fill(x.begin() + static_cast<std::ptrdiff_t>(d), x.end(), 0.0);
      return "one row not zero";
    case 6: std::fill(x.begin(), x.end(), 0.0); return "zero";
    case 7:  // unit vectors: all distances alike where n ≤ d
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < d; ++j) x[i * d + j] = j == i % d ? 1 : 0;
      return "unit vectors";
    case 8:  // x and −x
      for (std::size_t i = 1; i < n; i += 2)
        for (std::size_t j = 0; j < d; ++j) x[i * d + j] = -x[(i - 1) * d + j];
      return "opposites";
    case 9:
      for (double& v : x) v = std::round(v);
      return "integers";
    case 10:  // half the tokens alike
      for (std::size_t i = n / 2 + 1; i < n; ++i) copy(n / 2, i);
      return "half alike";
    case 11: {  // nearly alike
      double const size = r.decade(-12, -1);
      for (std::size_t i = 1; i < n; ++i)
        for (std::size_t j = 0; j < d; ++j) x[i * d + j] = x[j] + size * r.bell();
      return "nearly alike";
    }
    case 12: {  // two groups far apart
      double const far = r.decade(1, 6);
      for (std::size_t i = 0; i < n / 2; ++i)
        for (std::size_t j = 0; j < d; ++j) x[i * d + j] += far;
      return "two groups";
    }
    default:  // a token's features all the same value
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 1; j < d; ++j) x[i * d + j] = x[i * d];
      return "equal features";
  }
}

}  // namespace

cause draw_cause(chance_source& r, std::size_t n) {
  cause out;
  out.rank = r.from(1, 3);
  out.z.resize(n * out.rank);
  for (double& v : out.z) v = r.bell();
  return out;
}

std::size_t draw_tokens(chance_source& r) {
  double const u = r.uniform();
  if (u < 0.17) return r.from(1, 5);
  if (u < 0.61) return r.from(6, 24);
  if (u < 0.785) return r.from(25, 64);
  if (u < 0.855) return r.from(65, 160);
  if (u < 0.875) return r.from(161, 511);
  if (u < 0.93) return r.from(512, 515);
  if (u < 0.985) return r.from(516, 800);
  if (u < 0.997) return r.of<std::size_t>({1000, 1024, 1100, 1500, 2048});
  return r.of<std::size_t>({5000, 20000});
}

std::size_t draw_width(chance_source& r, std::size_t n) {
  double const u = r.uniform();
  if (n > 2048) return r.from(1, 4);
  if (n >= 512) {
    if (u < 0.15) return 1;
    if (u < 0.75) return r.from(2, 8);
    return u < 0.97 ? r.from(9, 20) : r.from(21, 48);
  }
  if (u < 0.12) return 1;
  if (u < 0.50) return r.from(2, 8);
  if (u < 0.85 || n > 160) return r.from(9, 33);
  if (u < 0.98 || n > 40) return r.from(34, 100);
  if (n > 12) return r.from(101, 200);
  return n <= 6 && u > 0.997 ? r.from(4000, 6000) : r.from(101, 900);
}

model draw_model(chance_source& r, recipe const& by, cause const& shared) {
  model out;
  std::size_t const n = by.n, s = by.widths.size();
  auto const note = [&](std::string const& what) {
    out.text += (out.text.empty() ? "" : ", ") + what;
  };
  double const part = r.happens(0.8) ? r.decade(-1.5, 1) : 0;
  std::vector<std::vector<double>> x;
  double const wander = r.happens(0.7) ? r.between(0.05, 1.5) : r.decade(-7, -1);
  bool const straight = by.chain && r.happens(0.1);
  if (straight) note("straight");
  if (by.chain && wander < 0.05) note(text_of("steps of %.1e", wander));
  std::vector<double> direction;
  for (std::size_t l = 0; l < s; ++l) {
    std::size_t const d = by.widths[l];
    if (!by.chain || l == 0) {
      x.push_back(draw_site(r, n, d, shared, part));
      continue;
    }
    x.push_back(x.back());
    if (!straight || l == 1) {
      direction.resize(n * d);
      for (double& v : direction) v = wander * r.bell();
    }
    double const length = straight && r.happens(0.5) ? r.between(0.2, 3) : 1;
    for (std::size_t i = 0; i < n * d; ++i) x[l][i] += length * direction[i];
  }
  auto const& width = by.widths;

  // So many tokens that U by tokens would take too long: nothing that features cannot tell.
  bool const extreme = by.extreme && n <= 2048;
  if (extreme && r.happens(0.2)) {  // token norms differ
    double const spread = r.happens(0.7) ? 1 : 4;
    note("norms");
    for (std::size_t i = 0; i < n; ++i) {
      double const size = std::exp(spread * r.bell());
      for (std::size_t l = 0; l < s; ++l)
        for (std::size_t j = 0; j < width[l]; ++j) x[l][i * width[l] + j] *= size;
    }
  }
  if (extreme && r.happens(0.15)) {  // a few coordinates far larger than the others
    double const size = r.decade(1, 4);
    note(text_of("a feature x %.0f", size));
    for (std::size_t l = 0; l < s; ++l) {
      std::size_t const j = r.below(width[l]);
      for (std::size_t i = 0; i < n; ++i) x[l][i * width[l] + j] *= size;
    }
  }
  if (extreme && r.happens(0.22)) {
    out.odd.degenerate = true;
    if (by.chain && s > 1 && r.happens(0.3)) {
      std::size_t const l = r.from(1, s - 1);
      x[l] = x[l - 1];
      note("a layer twice");
    } else {
      bool const all = r.happens(0.25);
      std::size_t const one = r.below(s);
      char const* what = "";
      for (std::size_t l = 0; l < s; ++l)
        if (all || l == one) what = degenerate(r, x[l], n, width[l]);
      note(std::string(what) + (all ? " and such" : " at " + std::to_string(one)));
    }
  }
  if (extreme && r.happens(0.25)) {
    out.odd.massive = true;
    std::size_t const count = r.happens(0.7) ? 1 : r.from(2, 3);
    double const size = r.decade(1, 7);
    bool const all = r.happens(0.7), some_features = r.happens(0.3);
    note(text_of("massive x %.1e", size) + (count > 1 ? " several" : "") +
         (some_features ? " features" : ""));
    std::size_t const only = r.below(s);
    for (std::size_t k = 0; k < count; ++k) {
      std::size_t const i = k == 0 && r.happens(0.5) ? 0 : r.below(n);
      for (std::size_t l = 0; l < s; ++l) {
        if (!all && l != only) continue;
        for (std::size_t j = 0; j < width[l]; ++j)
          if (!some_features || j < 2) x[l][i * width[l] + j] *= size;
      }
    }
  }
  if (extreme && r.happens(0.25)) {
    out.odd.offset = true;
    double const most = by.type == dtype::f64 ? 13 : by.type == dtype::f32 ? 5 : 2.5;
    double const size = r.decade(0, most);
    bool const same = r.happens(0.4), every = r.happens(0.8);
    note(text_of("offset %.1e", size));
    for (std::size_t l = 0; l < s; ++l)
      for (std::size_t j = 0; j < width[l]; ++j) {
        double const c =
            same ? size : size * (by.chain ? 1 - 2.0 * static_cast<double>(j % 2) : r.bell());
        if (every || j == 0)
          for (std::size_t i = 0; i < n; ++i) x[l][i * width[l] + j] += c;
      }
  }
  if (extreme && r.happens(0.2)) {
    out.odd.scale = true;
    double const most = by.type == dtype::f64 ? 300 : by.type == dtype::half ? 3 : 34;
    bool const apart = r.happens(0.15);
    double size = r.decade(-most, most);
    note(text_of(apart ? "scale %.0e and others" : "scale %.0e", size));
    for (std::size_t l = 0; l < s; ++l) {
      if (apart) size = r.decade(-most, most);
      double peak = 1;
      for (double const v : x[l]) peak = std::max(peak, std::abs(v));
      for (double& v : x[l]) v *= std::min(size, 1e307 / peak);
    }
    bool const wide = by.type == dtype::f64;
    if ((wide || by.type == dtype::f32) && r.happens(0.1)) {  // rows that are worlds apart
      note("a row far smaller");
      std::size_t const i = r.below(n), l = r.below(s);
      for (std::size_t j = 0; j < width[l]; ++j) x[l][i * width[l] + j] *= wide ? 1e-170 : 1e-28;
    }
  }
  for (std::size_t l = 0; l < s; ++l) {
    double peak = 0;
    for (double const v : x[l]) peak = std::max(peak, std::abs(v));
    double const fit = peak > limit(by.type) ? limit(by.type) / 2 / peak : 1;
    site stored_site{n, width[l], {}};
    stored_site.x.reserve(x[l].size());
    for (double const v : x[l]) stored_site.x.push_back(stored(by.type, v * fit));
    out.sites.push_back(std::move(stored_site));
  }
  return out;
}

}  // namespace oracle
