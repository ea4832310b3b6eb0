// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random data: what a case is made of depends on its seed and its number alone.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <rflow/view.hpp>

#include "definitions.hpp"

namespace oracle {

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a few lines, the same on every platform.
class chance_source {
 public:
  chance_source(std::uint64_t seed, std::uint64_t number)
      : state_(mixed(seed * 0x9e3779b97f4a7c15u + 1) ^ mixed(number + 0x632be59bd9b4e019u)) {}

  std::uint64_t bits() { return mixed(state_ += 0x9e3779b97f4a7c15u); }
  /// In [0, 1), all 53 bits.
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double between(double a, double b) { return a + (b - a) * uniform(); }
  bool happens(double p) { return uniform() < p; }
  /// 0 … count − 1.
  std::size_t below(std::size_t count) {
    return static_cast<std::size_t>(uniform() * static_cast<double>(count));
  }
  std::size_t from(std::size_t a, std::size_t b) { return a + below(b - a + 1); }
  template <class V>
  V of(std::initializer_list<V> values) {
    return *(values.begin() + static_cast<std::ptrdiff_t>(below(values.size())));
  }
  /// 10^u.
  double decade(double a, double b) { return std::pow(10.0, between(a, b)); }
  /// Bell-shaped, deviation 1: four uniforms.
  double bell() {
    double sum = -2;  // in this order with every compiler
    for (int i = 0; i < 4; ++i) sum += uniform();
    return sum * 1.7320508075688772;
  }

 private:
  static std::uint64_t mixed(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint64_t state_;
};

enum class dtype { f32, f64, half, brain };
inline char const* name_of(dtype t) {
  switch (t) {
    case dtype::f32: return "float";
    case dtype::f64: return "double";
    case dtype::half: return "f16";
    case dtype::brain: return "bf16";
  }
  return "";
}
template <class T>
inline constexpr dtype dtype_of = std::same_as<T, float>        ? dtype::f32
                                  : std::same_as<T, double>     ? dtype::f64
                                  : std::same_as<T, rflow::f16> ? dtype::half
                                                                : dtype::brain;

/// What is unusual about the data.
struct oddities {
  bool massive = false, offset = false, scale = false, degenerate = false;

  std::string name() const {
    int const count = massive + offset + scale + degenerate;
    if (count == 0) return "plain";
    if (count > 1) return massive ? "massive, more" : "several";
    return massive ? "massive" : offset ? "offset" : scale ? "scale" : "degenerate";
  }
};

/// What a model is asked to look like.
struct recipe {
  dtype type = dtype::f32;
  std::size_t n = 0;
  std::vector<std::size_t> widths;  // one a site
  bool chain = false;               // a walk over sites of one width
  bool extreme = true;              // the oddities below
};

struct model {
  std::vector<site> sites;  // as stored
  oddities odd;
  std::string text;  // what was done, in a few words
};

/// A hidden cause that several models share, so that their CKA is not about 0.
struct cause {
  std::size_t rank = 0;
  std::vector<double> z;  // n × rank
};
cause draw_cause(chance_source& r, std::size_t n);
model draw_model(chance_source& r, recipe const& by, cause const& shared);

/// How many tokens: the mix is stated in oracle.hpp.
std::size_t draw_tokens(chance_source& r);
std::size_t draw_width(chance_source& r, std::size_t n);

}  // namespace oracle
