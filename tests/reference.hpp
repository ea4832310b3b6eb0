// SPDX-License-Identifier: Apache-2.0
#pragma once

// Definitions, written out as slowly as they read, in double: what the tests hold the library
// against. Nothing here is shared with include/.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <rflow/view.hpp>

namespace reference {

using matrix = std::vector<std::vector<double>>;  // [token][feature]
using stack = std::vector<matrix>;                // [site][token][feature]

inline double dot(std::vector<double> const& a, std::vector<double> const& b) {
  double sum = 0;
  for (std::size_t j = 0; j < a.size(); ++j) sum += a[j] * b[j];
  return sum;
}
inline double cosine(std::vector<double> const& a, std::vector<double> const& b) {
  return dot(a, b) / std::sqrt(dot(a, a)) / std::sqrt(dot(b, b));
}
inline bool zero(std::vector<double> const& a) { return dot(a, a) == 0; }
inline matrix minus(matrix const& a, matrix const& b) {
  matrix out = a;
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t j = 0; j < a[i].size(); ++j) out[i][j] -= b[i][j];
  return out;
}
inline double inner(matrix const& a, matrix const& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += dot(a[i], b[i]);
  return sum;
}

/// Mean cosine over all pairs of different non-zero rows of the same sequence.
inline double inter_token(matrix const& x, std::vector<std::size_t> const& sequence = {}) {
  double sum = 0, pairs = 0;
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j) {
      if (i == j || zero(x[i]) || zero(x[j])) continue;
      if (!sequence.empty() && sequence[i] != sequence[j]) continue;
      sum += cosine(x[i], x[j]);
      pairs += 1;
    }
  return sum / pairs;
}

/// Σ_l ‖X_l − X̄‖².
inline double spread(stack const& s) {
  matrix mean = s[0];
  for (auto& row : mean)
    for (double& v : row) v = 0;
  for (matrix const& x : s)
    for (std::size_t i = 0; i < x.size(); ++i)
      for (std::size_t j = 0; j < x[i].size(); ++j)
        mean[i][j] += x[i][j] / static_cast<double>(s.size());
  double sum = 0;
  for (matrix const& x : s) {
    matrix const away = minus(x, mean);
    sum += inner(away, away);
  }
  return sum;
}

// ---- the flow of a chain in long double, whose range squares of doubles do not leave -------------

struct chain_figures {
  std::vector<long double> inter_token, rms_norm;  // S; NaN where there is none
  std::vector<std::vector<long double>> adjacent;  // S − 1 × n: NaN for a zero row
  std::vector<std::vector<long double>> norms;     // S × n
  std::vector<long double> steps, curvature;       // S − 1, S − 2
  long double st1, st2, path_energy, path_length;
};

/// Everything flow() says about finite tokens of one sequence, from its definitions. Angles by the
/// two legs of the triangle: ‖a‖ b and ‖b‖ a differ by 2 sin(θ/2) of their length.
inline chain_figures exact_chain(stack const& x) {
  using real = long double;
  using row = std::vector<real>;
  auto const inner = [](row const& a, row const& b) {
    real sum = 0;
    for (std::size_t j = 0; j < a.size(); ++j) sum += a[j] * b[j];
    return sum;
  };
  std::size_t const sites = x.size(), n = x[0].size(), d = x[0][0].size();
  auto const missing = std::numeric_limits<real>::quiet_NaN();
  auto const at = [&](std::size_t l, std::size_t t) { return row(x[l][t].begin(), x[l][t].end()); };
  auto const step = [&](std::size_t l, std::size_t t) {  // from site l
    row out = at(l + 1, t);
    for (std::size_t j = 0; j < d; ++j) out[j] -= static_cast<real>(x[l][t][j]);
    return out;
  };
  chain_figures out;
  for (std::size_t l = 0; l < sites; ++l) {
    row sum(d), norms(n);
    real m = 0, squares = 0;
    for (std::size_t t = 0; t < n; ++t) {
      row const r = at(l, t);
      norms[t] = std::sqrt(inner(r, r));
      squares += norms[t] * norms[t];
      if (norms[t] == 0) continue;
      m += 1;
      for (std::size_t j = 0; j < d; ++j) sum[j] += r[j] / norms[t];
    }
    out.inter_token.push_back(m < 2 ? missing : (inner(sum, sum) - m) / (m * (m - 1)));
    out.rms_norm.push_back(std::sqrt(squares / static_cast<real>(n)));
    out.norms.push_back(norms);
  }
  out.path_energy = out.path_length = 0;
  for (std::size_t l = 0; l + 1 < sites; ++l) {
    row cosines(n);
    real squares = 0;
    for (std::size_t t = 0; t < n; ++t) {
      real const both = out.norms[l][t] * out.norms[l + 1][t];
      cosines[t] = both > 0 ? inner(at(l, t), at(l + 1, t)) / both : missing;
      squares += inner(step(l, t), step(l, t));
    }
    out.adjacent.push_back(cosines);
    out.steps.push_back(std::sqrt(squares));
    out.path_energy += squares;
    out.path_length += out.steps.back();
  }
  for (std::size_t l = 0; l + 2 < sites; ++l) {
    real apart = 0, together = 0;
    for (std::size_t t = 0; t < n; ++t) {
      row const b = step(l, t), a = step(l + 1, t);
      for (std::size_t j = 0; j < d; ++j) {
        real const u = a[j] / out.steps[l + 1], v = b[j] / out.steps[l];
        apart += (u - v) * (u - v);
        together += (u + v) * (u + v);
      }
    }
    out.curvature.push_back(2 * std::atan2(std::sqrt(apart), std::sqrt(together)));
  }
  real spread = 0;
  for (std::size_t t = 0; t < n; ++t)
    for (std::size_t j = 0; j < d; ++j) {
      real mean = 0;
      for (std::size_t l = 0; l < sites; ++l)
        mean += (static_cast<real>(x[l][t][j]) - static_cast<real>(x[0][t][j])) /
                static_cast<real>(sites);
      for (std::size_t l = 0; l < sites; ++l) {
        real const away = static_cast<real>(x[l][t][j]) - static_cast<real>(x[0][t][j]) - mean;
        spread += away * away;
      }
    }
  out.st2 = std::sqrt(spread / static_cast<real>(sites));
  out.st1 = sites > 1 ? std::sqrt(out.path_energy / static_cast<real>(sites - 1)) : missing;
  return out;
}

/// A chain that is hard on sums of squares, of one of a few kinds: far from the origin, straight,
/// standing still, or with rows and features of very different size. `decades` is how far a type
/// reaches either way.
inline stack hard_stack(std::mt19937& bits, double decades, double most_offset) {
  std::normal_distribution<double> normal;
  auto const pick = [&](std::size_t count) { return bits() % count; };
  auto const between = [&](double reach) {
    return reach * (2 * static_cast<double>(bits()) / 4294967295.0 - 1);
  };
  auto const power = [&](double exponent) {
    return std::pow(10.0, std::max(-decades, std::min(exponent, decades)));
  };
  std::size_t const sites = pick(4) == 0 ? 33 : 1 + pick(7);
  std::size_t const tokens = 1 + pick(pick(3) == 0 ? 150 : 12), width = 1 + pick(90);
  std::size_t const kind = pick(6), rows = pick(3);
  double const offset = pick(2) == 0 ? most_offset * power(between(1) - 1) : 0;
  double const all = pick(2) == 0 ? between(decades) : 0;
  double const small = pick(2) == 0 ? std::pow(10.0, between(3) - 3) : 1;
  std::vector<double> pace(sites);
  for (double& p : pace) p = kind == 1 ? 1 : normal(bits);
  stack out(sites, matrix(tokens, std::vector<double>(width)));
  for (std::size_t t = 0; t < tokens; ++t) {
    double const token = rows == 1 ? between(decades) : 0;
    std::vector<double> of_row(sites);
    for (double& r : of_row) r = rows == 2 ? between(decades) : 0;
    for (std::size_t j = 0; j < width; ++j) {
      double const feature = kind == 4 ? between(decades) : 0;
      double value = kind == 5 ? 0.1 : normal(bits);
      double const direction = normal(bits);
      for (std::size_t l = 0; l < sites; ++l) {
        double const step = kind <= 1                  ? pace[l] * direction
                            : kind == 2 && pick(3) > 0 ? 0
                                                       : normal(bits);
        if (l > 0 && kind != 5) value += small * step;
        out[l][t][j] = (value + offset) * power(token + feature + all + of_row[l]);
      }
    }
  }
  if (pick(4) == 0)
    for (double& v : out[pick(sites)][pick(tokens)]) v = 0;
  return out;
}

// ---- kernels and HSIC, by their definitions -----------------------------------------------------

inline matrix linear_kernel(matrix const& x) {
  matrix k(x.size(), std::vector<double>(x.size()));
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j) k[i][j] = dot(x[i], x[j]);
  return k;
}

inline double squared_distance(std::vector<double> const& a, std::vector<double> const& b) {
  double sum = 0;
  for (std::size_t j = 0; j < a.size(); ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
  return sum;
}

inline double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  std::size_t const n = v.size();
  return n % 2 == 1 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

/// Median of squared distances: all n² of them, or each pair once.
inline double median_distance(matrix const& x, bool all_pairs = true) {
  std::vector<double> distances;
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j)
      if (all_pairs || i < j) distances.push_back(squared_distance(x[i], x[j]));
  return median(distances);
}

inline matrix rbf_kernel(matrix const& x, double sigma) {
  matrix k(x.size(), std::vector<double>(x.size()));
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j)
      k[i][j] = std::exp(-squared_distance(x[i], x[j]) / (2 * sigma * sigma));
  return k;
}

/// HKH, H = I − 11ᵀ/n.
inline matrix centred(matrix k) {
  auto const n = static_cast<double>(k.size());
  std::vector<double> rows(k.size()), cols(k.size());
  double total = 0;
  for (std::size_t i = 0; i < k.size(); ++i)
    for (std::size_t j = 0; j < k.size(); ++j) {
      rows[i] += k[i][j] / n;
      cols[j] += k[i][j] / n;
      total += k[i][j] / n / n;
    }
  for (std::size_t i = 0; i < k.size(); ++i)
    for (std::size_t j = 0; j < k.size(); ++j) k[i][j] += total - rows[i] - cols[j];
  return k;
}

inline double hsic_biased(matrix const& k, matrix const& l) {
  return inner(centred(k), centred(l));
}

/// Song et al. 2012, equation 5, times n(n − 3). In long double: its terms cancel.
inline double hsic_debiased(matrix const& k, matrix const& l) {
  auto const n = static_cast<long double>(k.size());
  long double products = 0, total_k = 0, total_l = 0, rows = 0;
  for (std::size_t i = 0; i < k.size(); ++i) {
    long double row_k = 0, row_l = 0;
    for (std::size_t j = 0; j < k.size(); ++j) {
      if (i == j) continue;
      products += static_cast<long double>(k[i][j]) * l[i][j];
      row_k += k[i][j];
      row_l += l[i][j];
    }
    total_k += row_k;
    total_l += row_l;
    rows += row_k * row_l;
  }
  return static_cast<double>(products + total_k * total_l / ((n - 1) * (n - 2)) -
                             2 / (n - 2) * rows);
}

template <class Hsic>
double cka(matrix const& k, matrix const& l, Hsic hsic) {
  return hsic(k, l) / std::sqrt(hsic(k, k)) / std::sqrt(hsic(l, l));
}

// ---- data ---------------------------------------------------------------------------------------

/// numpy's RandomState(seed).randn, value by value.
class numpy_normal {
 public:
  explicit numpy_normal(std::uint32_t seed) : bits_(seed) {}

  double operator()() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    double x1, x2, r2;
    do {
      x1 = 2 * uniform() - 1;
      x2 = 2 * uniform() - 1;
      r2 = x1 * x1 + x2 * x2;
    } while (r2 >= 1 || r2 == 0);
    double const f = std::sqrt(-2 * std::log(r2) / r2);
    spare_ = f * x1;
    has_spare_ = true;
    return f * x2;
  }

 private:
  double uniform() {
    auto const high = static_cast<double>(bits_() >> 5), low = static_cast<double>(bits_() >> 6);
    return (high * 67108864 + low) / 9007199254740992;
  }

  std::mt19937 bits_;
  double spare_ = 0;
  bool has_spare_ = false;
};

/// X and Y of 100 × 10: X normal, Y = X + normal, seed 1337. The data of the published numbers.
inline std::pair<matrix, matrix> kornblith() {
  numpy_normal next(1337);
  matrix x(100, std::vector<double>(10)), y = x;
  for (auto& row : x)
    for (double& v : row) v = next();
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < 10; ++j) y[i][j] = next() + x[i][j];
  return {x, y};
}

/// A random walk over sites, with a mean and unequal token norms, so that no term vanishes.
inline stack random_stack(std::mt19937& bits, std::size_t sites, std::size_t tokens,
                          std::size_t width) {
  std::normal_distribution<double> normal;
  stack out(sites, matrix(tokens, std::vector<double>(width)));
  for (std::size_t i = 0; i < tokens; ++i) {
    double const size = std::exp(normal(bits));
    for (std::size_t j = 0; j < width; ++j) {
      double value = size * (normal(bits) + 0.5);
      for (std::size_t l = 0; l < sites; ++l) {
        out[l][i][j] = value;
        value += 0.3 * size * normal(bits);
      }
    }
  }
  return out;
}

template <class T>
T stored(double x) {
  if constexpr (std::same_as<T, rflow::f16> || std::same_as<T, rflow::bf16>)
    return T::nearest(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

/// Row-major values of type T, and x rounded to what they hold.
template <class T>
std::vector<T> pack(stack& x) {
  std::vector<T> out;
  for (matrix& site : x)
    for (auto& row : site)
      for (double& v : row) {
        out.push_back(stored<T>(v));
        v = static_cast<double>(out.back());
      }
  return out;
}
template <class T>
std::vector<T> pack(matrix& x) {
  stack s{x};
  std::vector<T> out = pack<T>(s);
  x = s[0];
  return out;
}

template <class T>
rflow::layer_stack<T> stack_of(std::vector<T> const& values, stack const& x) {
  return rflow::layer_stack<T>(values.data(), {static_cast<std::ptrdiff_t>(x.size()),
                                               static_cast<std::ptrdiff_t>(x[0].size()),
                                               static_cast<std::ptrdiff_t>(x[0][0].size())});
}

/// How far a result of type T may be from the reference, relative to its scale.
template <class T>
inline constexpr double tolerance = std::same_as<T, double> ? 1e-12 : 1e-5;

}  // namespace reference
