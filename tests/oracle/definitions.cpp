// SPDX-License-Identifier: Apache-2.0
#include "definitions.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace oracle {

namespace {

constexpr double unit_roundoff = 1.1102230246251565e-16;
constexpr double missing = std::numeric_limits<double>::quiet_NaN();

int exponent_of(double x) {
  int e = 0;
  std::frexp(x, &e);
  return x == 0 ? 0 : e;
}
double largest(double const* x, std::size_t count) {
  double m = 0;
  for (std::size_t i = 0; i < count; ++i) m = std::max(m, std::abs(x[i]));
  return m;
}
number number_of(twofold x, int e) {
  int const own = exponent_of(x.hi);
  return {static_cast<double>(scaled(x, -own)), e + own};
}
/// √(x · 2^e).
number root_of(twofold x, int e) {
  if (e % 2 != 0) x = scaled(x, 1), e -= 1;
  int own = exponent_of(x.hi);
  own += own % 2;
  return number_of(root(scaled(x, -own)), (e + own) / 2);
}

/// Two arrays of doubles.
struct twofolds {
  std::vector<double> hi, lo;

  explicit twofolds(std::size_t count = 0) : hi(count), lo(count) {}
  twofold at(std::size_t i) const { return {hi[i], lo[i]}; }
  void set(std::size_t i, twofold x) { hi[i] = x.hi, lo[i] = x.lo; }
  void add(std::size_t i, twofold x) { set(i, at(i) + x); }
  std::size_t size() const { return hi.size(); }
};
twofold inner(twofolds const& a, twofolds const& b) {
  return dot(a.hi.data(), a.lo.data(), b.hi.data(), b.lo.data(), a.size());
}
twofold inner(twofolds const& a, std::size_t i, twofolds const& b, std::size_t j, std::size_t n) {
  return dot(a.hi.data() + i, a.lo.data() + i, b.hi.data() + j, b.lo.data() + j, n);
}

/// Columns of a site less their means, times 2^−unit: features one after the other, or tokens.
struct centred {
  std::size_t n, d;
  int unit = 0;
  twofolds columns;

  explicit centred(site const& s) : n(s.n), d(s.d), columns(s.n * s.d) {
    int const first = exponent_of(largest(s.x.data(), s.x.size()));
    double peak = 0;
    for (std::size_t j = 0; j < d; ++j) {
      double* const h = columns.hi.data() + j * n;
      double* const l = columns.lo.data() + j * n;
      // From the first token's value on, which is exact: an offset would take digits from the mean.
      twofold mean;
      for (std::size_t i = 0; i < n; ++i) {
        twofold const x = sum_of(std::ldexp(s.x[i * d + j], -first), -std::ldexp(s.x[j], -first));
        h[i] = x.hi, l[i] = x.lo;
        mean += x;
      }
      mean = mean / twofold(static_cast<double>(n));
      bool const constant = std::all_of(h, h + n, [](double v) { return v == 0; });
      for (std::size_t i = 0; i < n; ++i) {
        twofold const x = constant ? twofold() : twofold(h[i], l[i]) - mean;
        h[i] = x.hi, l[i] = x.lo;
        peak = std::max(peak, std::abs(x.hi));
      }
    }
    int const second = exponent_of(peak);
    unit = first + second;
    for (std::size_t i = 0; i < columns.size(); ++i) columns.set(i, scaled(columns.at(i), -second));
  }

  twofolds rows() const {
    twofolds out(n * d);
    for (std::size_t j = 0; j < d; ++j)
      for (std::size_t i = 0; i < n; ++i) out.set(i * d + j, columns.at(j * n + i));
    return out;
  }
};

std::size_t pairs_of(std::size_t n) { return n * (n - 1) / 2; }

/// A kernel matrix up to a constant: its upper triangle row by row, and its diagonal.
struct kernel_matrix {
  std::size_t n;
  twofolds upper, diagonal;

  explicit kernel_matrix(std::size_t tokens)
      : n(tokens), upper(tokens > 0 ? pairs_of(tokens) : 0), diagonal(tokens) {}

  /// Row sums, without the diagonal.
  twofolds row_sums() const {
    twofolds out(n);
    std::size_t k = 0;
    for (std::size_t i = 0; i < n; ++i) {
      twofold mine = out.at(i);
      for (std::size_t j = i + 1; j < n; ++j, ++k) {
        twofold const g = upper.at(k);
        mine += g;
        out.add(j, g);
      }
      out.set(i, mine);
    }
    return out;
  }
  /// U of Székely and Rizzo; n ≥ 4.
  kernel_matrix u_centred() const {
    kernel_matrix out(n);
    auto const count = static_cast<double>(n);
    twofolds rows = row_sums();
    twofold total;
    for (std::size_t i = 0; i < n; ++i) total += rows.at(i);
    total = total / twofold((count - 1) * (count - 2));
    for (std::size_t i = 0; i < n; ++i) rows.set(i, rows.at(i) / twofold(count - 2));
    std::size_t k = 0;
    for (std::size_t i = 0; i < n; ++i) {
      twofold const mine = total - rows.at(i);
      for (std::size_t j = i + 1; j < n; ++j, ++k)
        out.upper.set(k, upper.at(k) + mine - rows.at(j));
    }
    return out;
  }
  /// HKH.
  kernel_matrix h_centred() const {
    kernel_matrix out(n);
    auto const count = static_cast<double>(n);
    twofolds rows = row_sums();
    twofold total;
    for (std::size_t i = 0; i < n; ++i) {
      rows.add(i, diagonal.at(i));
      total += rows.at(i);
    }
    total = total / twofold(count * count);
    for (std::size_t i = 0; i < n; ++i) rows.set(i, rows.at(i) / twofold(count));
    std::size_t k = 0;
    for (std::size_t i = 0; i < n; ++i) {
      twofold const mine = total - rows.at(i);
      out.diagonal.set(i, diagonal.at(i) + mine - rows.at(i));
      for (std::size_t j = i + 1; j < n; ++j, ++k)
        out.upper.set(k, upper.at(k) + mine - rows.at(j));
    }
    return out;
  }
};

twofold product(kernel_matrix const& a, kernel_matrix const& b) {
  return twofold(2) * inner(a.upper, b.upper) + inner(a.diagonal, b.diagonal);
}

kernel_matrix linear_kernel(centred const& x) {
  kernel_matrix out(x.n);
  twofolds const rows = x.rows();
  std::size_t k = 0;
  for (std::size_t i = 0; i < x.n; ++i) {
    out.diagonal.set(i, inner(rows, i * x.d, rows, i * x.d, x.d));
    for (std::size_t j = i + 1; j < x.n; ++j, ++k)
      out.upper.set(k, inner(rows, i * x.d, rows, j * x.d, x.d));
  }
  return out;
}

/// From Σ_j K̃_ij² of each token.
void find_share(alignment& out, std::size_t p, std::vector<double> const& squares) {
  double total = 0;
  for (double const s : squares) total += s;
  out.off_diagonal[p] = std::sqrt(total);
  for (std::size_t i = 0; i < out.n; ++i)
    out.share[p * out.n + i] = total > 0 ? 2 * squares[i] / total : missing;
}

/// All that the kernel matrices say.
void align(alignment& out, std::vector<kernel_matrix> const& kernels) {
  std::size_t const s = out.sites;
  std::vector<kernel_matrix> h, u;
  for (kernel_matrix const& k : kernels) {
    h.push_back(k.h_centred());
    twofold trace;
    for (std::size_t i = 0; i < out.n; ++i) trace += h.back().diagonal.at(i);
    out.trace.push_back(trace);
    if (out.n >= 4) u.push_back(k.u_centred());
  }
  for (std::size_t p = 0; p < s; ++p)
    for (std::size_t q = 0; q < s; ++q) {
      if (q < p) {
        out.biased[p * s + q] = out.biased[q * s + p];
        out.debiased[p * s + q] = out.debiased[q * s + p];
        continue;
      }
      out.biased[p * s + q] = product(h[p], h[q]);
      if (out.n >= 4) out.debiased[p * s + q] = product(u[p], u[q]);
    }
}

void find_errors(alignment& out, std::vector<double> const& entries) {
  for (std::size_t p = 0; p < out.sites; ++p) {
    double const u = std::sqrt(std::max(0.0, out.at(out.debiased, p, p).hi));
    double const h = std::sqrt(std::max(0.0, out.at(out.biased, p, p).hi));
    out.gram_error.push_back(unit_roundoff * entries[p] / u);
    out.share_error.push_back(unit_roundoff * entries[p] / out.off_diagonal[p]);
    out.biased_gram_error.push_back(unit_roundoff * entries[p] / h);
  }
}

alignment blank(std::vector<site> const& sites) {
  alignment out;
  out.sites = sites.size();
  out.n = sites[0].n;
  out.biased.resize(out.sites * out.sites);
  out.debiased.resize(out.sites * out.sites);
  out.share.resize(out.sites * out.n);
  out.off_diagonal.resize(out.sites);
  return out;
}

/// ‖XᵀY‖² and what follows from it.
void align_features(alignment& out, std::vector<centred> const& x) {
  std::size_t const n = out.n, s = out.sites;
  auto const count = static_cast<double>(n);
  std::vector<twofolds> norms;
  std::vector<twofold> totals;
  for (centred const& c : x) {
    twofolds a(n);
    for (std::size_t j = 0; j < c.d; ++j)
      for (std::size_t i = 0; i < n; ++i) {
        twofold const v = c.columns.at(j * n + i);
        a.add(i, v * v);
      }
    twofold total;
    for (std::size_t i = 0; i < n; ++i) total += a.at(i);
    norms.push_back(std::move(a));
    totals.push_back(total);
    out.trace.push_back(total);
  }
  for (std::size_t p = 0; p < s; ++p)
    for (std::size_t q = p; q < s; ++q) {
      twofold square;
      twofolds own(p == q ? x[p].d * x[p].d : 0);
      for (std::size_t a = 0; a < x[p].d; ++a)
        for (std::size_t b = p == q ? a : 0; b < x[q].d; ++b) {
          twofold const c = inner(x[p].columns, a * n, x[q].columns, b * n, n);
          square += c * c * twofold(p == q && a != b ? 2 : 1);
          if (p == q) own.set(a * x[p].d + b, c), own.set(b * x[p].d + a, c);
        }
      twofold const both = inner(norms[p], norms[q]);
      out.biased[p * s + q] = out.biased[q * s + p] = square;
      if (n >= 4)
        out.debiased[p * s + q] = out.debiased[q * s + p] =
            square - both * (twofold(count) / twofold(count - 2)) +
            totals[p] * totals[q] / twofold((count - 1) * (count - 2));
      if (p != q) continue;
      std::vector<double> rows(n);  // Σ_j K_ij² = x_iᵀ (XᵀX) x_i
      twofolds quadratic(n);
      for (std::size_t a = 0; a < x[p].d; ++a) {
        twofolds image(n);
        for (std::size_t b = 0; b < x[p].d; ++b)
          for (std::size_t i = 0; i < n; ++i)
            image.add(i, x[p].columns.at(b * n + i) * own.at(a * x[p].d + b));
        for (std::size_t i = 0; i < n; ++i)
          quadratic.add(i, x[p].columns.at(a * n + i) * image.at(i));
      }
      for (std::size_t i = 0; i < n; ++i)
        rows[i] =
            std::max(0.0, static_cast<double>(quadratic.at(i) - norms[p].at(i) * norms[p].at(i)));
      find_share(out, p, rows);
    }
}

}  // namespace

twofold expm1(twofold x) {
  struct table {
    twofold power[65], log2;

    table() {
      for (int j = 0; j <= 64; ++j) {  // e^(−j/64) by its series
        twofold const y = twofold(-j) / twofold(64);
        twofold term(1), sum(1);
        for (int k = 1; k < 40; ++k) sum += term = term * y / twofold(k);
        power[j] = sum;
      }
      twofold sum;  // ln 2 = Σ 1/(k 2^k)
      for (int k = 110; k >= 1; --k) sum += twofold(std::ldexp(1.0, -k)) / twofold(k);
      log2 = sum;
    }
  };
  static table const t;
  if (x.hi < -800) return twofold(-1);
  int const k = static_cast<int>(std::floor(-x.hi / 0.6931471805599453));
  twofold const r = x + twofold(k) * t.log2;  // in (−ln 2, 0], or a rounding outside
  int const j = std::clamp(static_cast<int>(std::lround(-r.hi * 64)), 0, 64);
  twofold const y = r + twofold(j) / twofold(64);
  static constexpr double inverse[] = {1.0 / 120,      1.0 / 720,      1.0 / 5040,
                                       1.0 / 40320,    1.0 / 362880,   1.0 / 3628800,
                                       1.0 / 39916800, 1.0 / 479001600};
  double tail = 0;
  for (int m = 7; m > 0; --m) tail = (tail + inverse[m]) * y.hi;
  static twofold const third = twofold(1) / twofold(6), fourth = twofold(1) / twofold(24),
                       fifth = twofold(1) / twofold(120);
  twofold p = fifth + twofold(tail);
  p = fourth + p * y;
  p = third + p * y;
  p = twofold(0.5) + p * y;
  p = twofold(1) + p * y;
  p = p * y;  // e^y − 1
  if (k == 0 && j == 0) return p;
  twofold const power = scaled(t.power[j], -k);
  return (power - twofold(1)) + power * p;
}

double alignment::cka(std::vector<twofold> const& m, std::size_t p, std::size_t q) const {
  return static_cast<double>(at(m, p, q) / (root(at(m, p, p)) * root(at(m, q, q))));
}

double alignment::chance(std::size_t p, std::size_t q) const {
  return static_cast<double>(trace[p] * trace[q] / twofold(static_cast<double>(n - 1)) /
                             (root(at(biased, p, p)) * root(at(biased, q, q))));
}

alignment linear_alignment(std::vector<site> const& sites, form by) {
  alignment out = blank(sites);
  auto const n = static_cast<double>(out.n);
  double width = 0;
  std::vector<centred> x;
  for (site const& s : sites) {
    x.emplace_back(s);
    width += static_cast<double>(s.d);
    out.unit.push_back(x.back().unit);
  }
  auto const count = static_cast<double>(out.sites);
  double const gram_cost = n * n / 2 * (width + 3 * count + count * count);
  double const feature_cost = n * width * width / 2 + 2 * n * width * width / count;
  bool const features = by == form::feature || (by == form::cheapest && feature_cost < gram_cost);
  bool enough = features;
  if (features) {
    align_features(out, x);
    // The subtraction above leaves 1e-31 tr²: where that is not far below ‖U‖², by U itself.
    for (std::size_t p = 0; p < out.sites; ++p) {
      double const scale = out.trace[p].hi * out.trace[p].hi;
      out.debiased_noise.push_back(1e-29 * scale);
      if (out.n >= 4 && !(out.at(out.debiased, p, p).hi > 1e-16 * scale)) enough = false;
    }
    if (by == form::feature) enough = true;
  }
  if (!enough) {
    if (features) {
      out = blank(sites);
      for (centred const& c : x) out.unit.push_back(c.unit);
    }
    std::vector<kernel_matrix> kernels;
    for (std::size_t p = 0; p < out.sites; ++p) {
      kernels.push_back(linear_kernel(x[p]));
      kernel_matrix const& k = kernels.back();
      std::vector<double> squares(out.n);
      std::size_t at = 0;
      for (std::size_t i = 0; i < out.n; ++i)
        for (std::size_t j = i + 1; j < out.n; ++j, ++at) {
          double const g = k.upper.hi[at];
          squares[i] += g * g;
          squares[j] += g * g;
        }
      find_share(out, p, squares);
    }
    align(out, kernels);
    for (std::size_t p = 0; p < out.sites; ++p)
      out.debiased_noise.push_back(1e-58 * out.trace[p].hi * out.trace[p].hi);
  }
  std::vector<double> entries;
  for (twofold const& t : out.trace) entries.push_back(t.hi);
  find_errors(out, entries);
  return out;
}

alignment rbf_alignment(std::vector<site> const& sites, std::vector<number> const& sigma2) {
  alignment out = blank(sites);
  std::vector<kernel_matrix> kernels;
  std::vector<double> entries;
  for (std::size_t p = 0; p < out.sites; ++p) {
    site const& s = sites[p];
    int const e = exponent_of(largest(s.x.data(), s.x.size()));
    out.unit.push_back(0);  // an RBF kernel has none
    std::vector<double> x(s.x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::ldexp(s.x[i], -e);
    // −1/(2σ²), σ² in the same units
    number const& b = sigma2[p];
    double const square = std::ldexp(b.mantissa, std::clamp(b.exponent - 2 * e, -3000, 3000));
    twofold const factor = twofold(-0.5) / twofold(std::clamp(square, 1e-290, 1e290));
    kernels.emplace_back(out.n);
    kernel_matrix& k = kernels.back();
    std::vector<double> squares(out.n), norms(out.n);
    centred const c(s);
    for (std::size_t j = 0; j < c.d; ++j)
      for (std::size_t i = 0; i < c.n; ++i) {
        double const v = std::ldexp(c.columns.hi[j * c.n + i], c.unit - e);
        norms[i] += v * v;
      }
    double error = 0;
    std::size_t at = 0;
    for (std::size_t i = 0; i < out.n; ++i)
      for (std::size_t j = i + 1; j < out.n; ++j, ++at) {
        twofold const d2 = squared_distance(x.data() + i * s.d, x.data() + j * s.d, s.d);
        twofold const g = expm1(d2 * factor);
        k.upper.set(at, g);
        double const value = static_cast<double>(g + twofold(1));
        squares[i] += value * value;
        squares[j] += value * value;
        // A Gram path knows a distance to ε (‖x‖² + ‖y‖²), and an entry to ε.
        double const off = std::min(1.0, (norms[i] + norms[j]) * -factor.hi) * value + value + 1;
        error += 2 * off * off;
      }
    find_share(out, p, squares);
    entries.push_back(std::sqrt(error));
  }
  align(out, kernels);
  for (std::size_t p = 0; p < out.sites; ++p) {
    out.debiased_noise.push_back(1e-52 * static_cast<double>(out.n * out.n));
  }
  find_errors(out, entries);
  return out;
}

alignment polynomial_alignment(std::vector<site> const& sites, double by) {
  alignment out = blank(sites);
  std::vector<kernel_matrix> kernels;
  std::vector<double> entries;
  for (std::size_t p = 0; p < out.sites; ++p) {
    centred const c(sites[p]);
    kernels.push_back(linear_kernel(c));
    kernel_matrix& k = kernels.back();
    out.unit.push_back(0);
    twofold const factor(std::ldexp(by, 2 * c.unit));
    std::vector<double> squares(out.n), norms(out.n);
    for (std::size_t i = 0; i < out.n; ++i) norms[i] = k.diagonal.hi[i] * factor.hi;
    double error = 0;
    // (1 + t)² − 1
    auto const entry = [&](twofold xy) {
      twofold const t = xy * factor;
      return twofold(2) * t + t * t;
    };
    std::size_t at = 0;
    for (std::size_t i = 0; i < out.n; ++i) {
      k.diagonal.set(i, entry(k.diagonal.at(i)));
      error += (1 + norms[i]) * (1 + norms[i]);  // tr K
      for (std::size_t j = i + 1; j < out.n; ++j, ++at) {
        double const t = k.upper.hi[at] * factor.hi, value = (1 + t) * (1 + t);
        k.upper.set(at, entry(k.upper.at(at)));
        squares[i] += value * value;
        squares[j] += value * value;
      }
    }
    find_share(out, p, squares);
    entries.push_back(error);
  }
  align(out, kernels);
  for (std::size_t p = 0; p < out.sites; ++p)
    out.debiased_noise.push_back(1e-58 * entries[p] * entries[p]);
  find_errors(out, entries);
  return out;
}

number median_distance(site const& s, bool all_pairs) {
  std::size_t const m = std::min<std::size_t>(s.n, 512);
  int const e = exponent_of(largest(s.x.data(), s.x.size()));
  std::vector<double> x;
  for (std::size_t i = 0; i < m; ++i)
    for (std::size_t j = 0; j < s.d; ++j) x.push_back(std::ldexp(s.x[i * s.n / m * s.d + j], -e));
  std::vector<double> distances;
  for (std::size_t i = 0; i < m; ++i)
    for (std::size_t j = i + 1; j < m; ++j)
      distances.push_back(
          static_cast<double>(squared_distance(x.data() + i * s.d, x.data() + j * s.d, s.d)));
  if (distances.empty()) return {};
  // Ranks among all: zeros of the diagonal, then each distance twice.
  std::size_t const count = all_pairs ? m * m : distances.size();
  auto const ranked = [&](std::size_t rank) {
    if (all_pairs) {
      if (rank < m) return 0.0;
      rank = (rank - m) / 2;
    }
    auto const at = distances.begin() + static_cast<std::ptrdiff_t>(rank);
    std::nth_element(distances.begin(), at, distances.end());
    return *at;
  };
  double const median =
      count % 2 == 1 ? ranked(count / 2) : (ranked(count / 2 - 1) + ranked(count / 2)) / 2;
  return number_of(twofold(median), 2 * e);
}

flow_result flow_by_definition(std::vector<site> const& sites,
                               std::vector<std::size_t> const& bounds) {
  flow_result out;
  std::size_t const s = sites.size(), n = sites[0].n, d = sites[0].d;
  // Every row in units of its own.
  std::vector<twofolds> units;  // x/‖x‖
  std::vector<std::vector<char>> zero(s, std::vector<char>(n));
  std::vector<double> scaled_row(d), none(d);
  for (std::size_t l = 0; l < s; ++l) {
    units.emplace_back(n * d);
    out.norms.emplace_back(n);
    out.zero_rows.push_back(0);
    out.least_row.push_back(1e9);
    out.greatest_row.push_back(-1e9);
    int top = -100000;
    std::vector<twofold> squares(n);
    std::vector<int> exponents(n);
    for (std::size_t i = 0; i < n; ++i) {
      double const* const x = sites[l].row(i);
      double const peak = largest(x, d);
      if (peak == 0) {
        zero[l][i] = 1;
        ++out.zero_rows[l];
        continue;
      }
      int const e = exponents[i] = exponent_of(peak);
      for (std::size_t j = 0; j < d; ++j) scaled_row[j] = std::ldexp(x[j], -e);
      squares[i] = squared_distance(scaled_row.data(), none.data(), d);
      top = std::max(top, e);
      out.norms[l][i] = root_of(squares[i], 2 * e);
      double const log = 2 * out.norms[l][i].log2();
      out.least_row[l] = std::min(out.least_row[l], log);
      out.greatest_row[l] = std::max(out.greatest_row[l], log);
      twofold const inverse = twofold(1) / root(squares[i]);
      for (std::size_t j = 0; j < d; ++j) units[l].set(i * d + j, twofold(scaled_row[j]) * inverse);
    }
    twofold total;
    for (std::size_t i = 0; i < n; ++i)
      if (!zero[l][i]) total += scaled(squares[i], 2 * (exponents[i] - top));
    out.squares.push_back(number_of(total, 2 * std::max(top, -99999)));

    double count = 0, mean = 0, pairs = 0;
    twofold sum;
    std::vector<twofold> of_sequences;
    for (std::size_t q = 0; q + 1 < bounds.size(); ++q) {
      std::vector<twofold> direction(d);
      double m = 0;
      for (std::size_t i = bounds[q]; i < bounds[q + 1]; ++i) {
        if (zero[l][i]) continue;
        m += 1;
        for (std::size_t j = 0; j < d; ++j) direction[j] += units[l].at(i * d + j);
      }
      twofold norm2;
      for (twofold const& v : direction) norm2 += v * v;
      norm2 -= twofold(m);
      sum += norm2;
      pairs += m * (m - 1);
      if (m >= 2) of_sequences.push_back(norm2 / twofold(m * (m - 1)));
    }
    static_cast<void>(mean);
    count = static_cast<double>(of_sequences.size());
    twofold average, variance;
    for (twofold const& v : of_sequences) average += v / twofold(count);
    for (twofold const& v : of_sequences)
      variance += (v - average) * (v - average) / twofold(count);
    out.pairs.push_back(pairs);
    out.inter_token.push_back(pairs > 0 ? static_cast<double>(sum / twofold(pairs)) : missing);
    out.sequence_count.push_back(count);
    out.sequence_mean.push_back(static_cast<double>(average));
    out.sequence_stddev.push_back(static_cast<double>(root(variance)));
  }

  for (std::size_t l = 0; l + 1 < s; ++l) {
    std::vector<double> cosines(n, missing);
    std::vector<twofold> kept;
    for (std::size_t i = 0; i < n; ++i) {
      if (zero[l][i] || zero[l + 1][i]) continue;
      kept.push_back(inner(units[l], i * d, units[l + 1], i * d, d));
      cosines[i] = static_cast<double>(kept.back());
    }
    twofold average, variance;
    auto const count = static_cast<double>(kept.size());
    for (twofold const& v : kept) average += v / twofold(count);
    for (twofold const& v : kept) variance += (v - average) * (v - average) / twofold(count);
    out.adjacent.push_back(static_cast<double>(average));
    out.adjacent_stddev.push_back(static_cast<double>(root(variance)));
    out.adjacent_count.push_back(count);
    out.cosines.push_back(std::move(cosines));
  }

  // Steps, each in units of its own.
  std::vector<twofolds> steps;
  std::vector<int> step_unit;
  std::vector<twofold> step_square;
  int highest = -100000;
  for (std::size_t l = 0; l + 1 < s; ++l) {
    double const peak =
        std::max(largest(sites[l].x.data(), n * d), largest(sites[l + 1].x.data(), n * d));
    int const guard = exponent_of(peak) > 1000 ? 8 : 0;  // the difference may have no double
    twofolds step(n * d);
    double most = 0;
    for (std::size_t i = 0; i < n * d; ++i) {
      step.set(i,
               sum_of(std::ldexp(sites[l + 1].x[i], -guard), -std::ldexp(sites[l].x[i], -guard)));
      most = std::max(most, std::abs(step.hi[i]));
    }
    int const e = exponent_of(most);
    for (std::size_t i = 0; i < n * d; ++i) step.set(i, scaled(step.at(i), -e));
    step_square.push_back(inner(step, step));
    step_unit.push_back(e + guard);
    if (step_square.back().hi > 0) highest = std::max(highest, e + guard);
    out.steps.push_back(number_of(step_square.back(), 2 * (e + guard)));
    steps.push_back(std::move(step));
  }
  twofold energy, length;
  for (std::size_t l = 0; l < steps.size(); ++l) {
    if (!(step_square[l].hi > 0)) continue;
    energy += scaled(step_square[l], 2 * (step_unit[l] - highest));
    length += scaled(root(step_square[l]), step_unit[l] - highest);
  }
  out.energy = number_of(energy, 2 * std::max(highest, -99999));
  out.length = number_of(length, std::max(highest, -99999));
  for (std::size_t l = 0; l + 1 < steps.size(); ++l) {
    if (!(step_square[l].hi > 0) || !(step_square[l + 1].hi > 0)) {
      out.curvature.push_back(missing);
      continue;
    }
    twofold const c =
        inner(steps[l], steps[l + 1]) / (root(step_square[l]) * root(step_square[l + 1]));
    twofold const sine2 = (twofold(1) - c) * (twofold(1) + c);
    out.curvature.push_back(std::atan2(static_cast<double>(root(sine2)), static_cast<double>(c)));
  }

  double peak = 0;
  for (site const& x : sites) peak = std::max(peak, largest(x.x.data(), n * d));
  // About the first site, and in units of the largest distance from it.
  int const guard = exponent_of(peak) > 1000 ? 8 : 0;
  double most = 0;
  std::vector<twofolds> away;
  for (site const& x : sites) {
    away.emplace_back(n * d);
    for (std::size_t i = 0; i < n * d; ++i) {
      away.back().set(i, sum_of(std::ldexp(x.x[i], -guard), -std::ldexp(sites[0].x[i], -guard)));
      most = std::max(most, std::abs(away.back().hi[i]));
    }
  }
  int const e = exponent_of(most);
  twofold spread;
  for (std::size_t i = 0; i < n * d; ++i) {
    twofold mean;
    for (twofolds& a : away) {
      a.set(i, scaled(a.at(i), -e));
      mean += a.at(i);
    }
    mean = mean / twofold(static_cast<double>(s));
    for (twofolds const& a : away) spread += (a.at(i) - mean) * (a.at(i) - mean);
  }
  out.spread = number_of(spread, 2 * (e + guard));
  return out;
}

void path_eigenvalues(std::size_t sites, double& smallest, double& largest) {
  // 2 − 2 cos(πk/S) = 4 sin²(πk/2S)
  long double const angle = std::acos(-1.0L) / (2 * static_cast<long double>(sites));
  smallest = static_cast<double>(4 * std::sin(angle) * std::sin(angle));
  largest = static_cast<double>(4 * std::cos(angle) * std::cos(angle));
}

softmax_losses softmax_by_definition(site const& s, softmax_case const& c) {
  using real = long double;
  std::size_t const n = s.n, d = s.d, k = c.classes;
  real training = 0, validating = 0;
  for (char const t : c.trains) (t ? training : validating) += 1;
  std::vector<real> mean(d), scale(d, 1), x(n * d);
  if (c.standardize)
    for (std::size_t j = 0; j < d; ++j) {
      real square = 0;
      for (std::size_t i = 0; i < n; ++i)
        if (c.trains[i]) mean[j] += static_cast<real>(s.x[i * d + j]) / training;
      for (std::size_t i = 0; i < n; ++i) {
        real const v = static_cast<real>(s.x[i * d + j]) - mean[j];
        if (c.trains[i]) square += v * v / training;
      }
      scale[j] = square > 0 ? 1 / std::sqrt(square) : 0;
    }
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < d; ++j)
      x[i * d + j] = (static_cast<real>(s.x[i * d + j]) - mean[j]) * scale[j];
  // Weights act on the features as given: z = w·x + b = (w/scale)·x' + b + w·mean.
  std::size_t const parameters = k * d + k;
  std::vector<real> w(parameters), m(parameters), v(parameters), g(parameters);
  for (std::size_t a = 0; a < k; ++a) {
    w[k * d + a] = static_cast<real>(c.bias[a]);
    for (std::size_t j = 0; j < d; ++j) {
      real const given = static_cast<real>(c.weight[a * d + j]);
      w[a * d + j] = scale[j] > 0 ? given / scale[j] : 0;
      if (c.standardize && scale[j] > 0) w[k * d + a] += given * mean[j];
    }
  }
  softmax_losses out;
  for (int epoch = 0; epoch <= c.epochs; ++epoch) {
    real loss[2] = {};
    std::fill(g.begin(), g.end(), real(0));
    std::vector<real> z(k);
    for (std::size_t i = 0; i < n; ++i) {
      real top = -std::numeric_limits<real>::infinity(), total = 0;
      for (std::size_t a = 0; a < k; ++a) {
        z[a] = w[k * d + a];
        for (std::size_t j = 0; j < d; ++j) z[a] += w[a * d + j] * x[i * d + j];
        top = std::max(top, z[a]);
      }
      for (std::size_t a = 0; a < k; ++a) total += std::exp(z[a] - top);
      auto const y = static_cast<std::size_t>(c.labels[i]);
      real const mine = std::log(total) + top - z[y];
      loss[c.trains[i] ? 0 : 1] += mine;
      if (!c.trains[i]) continue;
      for (std::size_t a = 0; a < k; ++a) {
        real const residual = std::exp(z[a] - top) / total - (a == y ? 1 : 0);
        for (std::size_t j = 0; j < d; ++j) g[a * d + j] += residual * x[i * d + j] / training;
        g[k * d + a] += residual / training;
      }
    }
    out.train.push_back(static_cast<double>(loss[0] / training));
    out.validation.push_back(static_cast<double>(loss[1] / validating));
    if (epoch == c.epochs) break;
    auto const b1 = static_cast<real>(c.beta1), b2 = static_cast<real>(c.beta2);
    real const first = 1 - std::pow(b1, static_cast<real>(epoch + 1));
    real const second = 1 - std::pow(b2, static_cast<real>(epoch + 1));
    for (std::size_t i = 0; i < parameters; ++i) {
      if (i < k * d) g[i] += static_cast<real>(c.decay) * w[i];
      m[i] = b1 * m[i] + (1 - b1) * g[i];
      v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i];
      w[i] -= static_cast<real>(c.rate) * (m[i] / first) /
              (std::sqrt(v[i] / second) + static_cast<real>(c.epsilon));
    }
  }
  return out;
}

}  // namespace oracle
