// SPDX-License-Identifier: Apache-2.0

// The register tile of every machine, on this one: packets of each width, few and many registers, every
// number of packets above the diagonal, against sums written out in double.

#include <Eigen/Core>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

/// Stands in for a vector register of Width lanes.
template <class C, int Width>
struct lanes {
  C at[Width];

  lanes() = default;
  lanes(C const& all) {
    for (C& x : at) x = all;
  }
  static lanes load(C const* from) {
    lanes out;
    for (int i = 0; i < Width; ++i) out.at[i] = from[i];
    return out;
  }
  void store(C* to) const {
    for (int i = 0; i < Width; ++i) to[i] = at[i];
  }
  friend lanes operator+(lanes const& a, lanes const& b) {
    lanes sum;
    for (int i = 0; i < Width; ++i) sum.at[i] = a.at[i] + b.at[i];
    return sum;
  }
  friend lanes operator*(lanes const& a, lanes const& b) {
    lanes product;
    for (int i = 0; i < Width; ++i) product.at[i] = a.at[i] * b.at[i];
    return product;
  }
};

}  // namespace

// What Eigen's own templates for any type do not do: they would load and store one value.
namespace Eigen::internal {

template <class C, int Width>
struct unpacket_traits<lanes<C, Width>> {
  using type = C;
  static constexpr int size = Width;
};

#define RFLOW_STAND_IN(C, Width)                                                          \
  template <>                                                                             \
  [[maybe_unused]] lanes<C, Width> pload<lanes<C, Width>>(C const* from) {                \
    return lanes<C, Width>::load(from);                                                   \
  }                                                                                       \
  template <>                                                                             \
  [[maybe_unused]] void pstore<C, lanes<C, Width>>(C * to, lanes<C, Width> const& from) { \
    from.store(to);                                                                       \
  }
RFLOW_STAND_IN(float, 2)
RFLOW_STAND_IN(float, 4)
RFLOW_STAND_IN(float, 8)
RFLOW_STAND_IN(float, 16)
RFLOW_STAND_IN(float, 32)
RFLOW_STAND_IN(double, 1)
RFLOW_STAND_IN(double, 2)
RFLOW_STAND_IN(double, 4)
RFLOW_STAND_IN(double, 8)
RFLOW_STAND_IN(double, 16)
#undef RFLOW_STAND_IN

}  // namespace Eigen::internal

#include <rflow/detail/cpu/gram.hpp>

#include <doctest/doctest.h>

namespace {

namespace engine = rflow::detail;
using engine::integer;

std::size_t at(integer i) { return static_cast<std::size_t>(i); }

template <int Bytes>
struct stand_ins {
  template <class C>
  using packet = lanes<C, Bytes / int{sizeof(C)}>;
};

/// As Eigen has it without a vector unit, or for a type that the unit does not know.
template <class C>
using scalar_packet = C;

/// This machine's packets, halved until they have at most Lanes.
template <int Lanes>
struct at_most {
  template <class C>
  using packet = typename Eigen::internal::find_best_packet<C, Lanes>::type;
};

/// How far a sum of so many products may be from the exact one, relative to the sum of their sizes.
template <class C>
double rounding(integer terms) {
  return static_cast<double>(terms + 2) * static_cast<double>(std::numeric_limits<C>::epsilon());
}

/// One call against sums in double: entries from row `above` on, zeros in whole packets before it, and
/// nothing beside the tile.
template <class Product, class C>
void check_tile(std::mt19937& g, integer depth, integer above, bool accumulate) {
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  constexpr integer W = Product::template lanes<C>, guard = 64;
  std::normal_distribution<double> normal;
  auto const some = [&](C& x) { x = static_cast<C>(normal(g)); };
  engine::aligned_array<C> a(R * depth), b(N * depth), out(R * N + 2 * guard);
  for (integer i = 0; i < R * depth; ++i) some(a[i]);
  for (integer i = 0; i < N * depth; ++i) some(b[i]);
  for (integer i = 0; i < R * N + 2 * guard; ++i) some(out[i]);
  std::vector<C> const before(out.data(), out.data() + R * N + 2 * guard);
  Product::multiply(a.data(), b.data(), depth, accumulate, above, b.data(), out.data() + guard);

  integer const skipped = above > 0 ? above / W * W : 0;
  integer wrong = 0;
  for (integer i = 0; i < guard; ++i) {
    wrong += out[i] != before[at(i)];
    wrong += out[R * N + guard + i] != before[at(R * N + guard + i)];
  }
  for (integer j = 0; j < N; ++j)
    for (integer i = 0; i < R; ++i) {
      integer const place = guard + j * R + i;
      double const had = accumulate ? static_cast<double>(before[at(place)]) : 0;
      double sum = had, size = std::abs(had);
      for (integer k = 0; k < depth && i >= skipped; ++k) {
        double const term =
            static_cast<double>(a[k * R + i]) * static_cast<double>(b[j * depth + k]);
        sum += term;
        size += std::abs(term);
      }
      // Written so that a NaN is wrong, too.
      double const error = std::abs(static_cast<double>(out[place]) - sum);
      wrong += !(error <= (i < skipped ? 0 : rounding<C>(depth) * size));
    }
  INFO("packets of " << W << ", tile " << R << " x " << N << ", depth " << depth << ", above "
                     << above << ", accumulate " << accumulate);
  CHECK(wrong == 0);
}

template <class Product, class C>
void check_product(std::mt19937& g) {
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static_assert(R % N == 0 && R % Product::template lanes<C> == 0);
  static_assert(R == Product::template packets<C> * Product::template lanes<C>);
  for (integer const depth : {1, 7, 40})
    for (integer above = -N; above < R; ++above)
      for (bool const accumulate : {false, true})
        check_tile<Product, C>(g, depth, above, accumulate);
}

/// Fewer than 16 registers make the tile of 16, more than 32 that of 32.
template <template <class> class Packet, class C>
void check_registers(std::mt19937& g) {
  check_product<engine::register_product<Packet, 16>, C>(g);
  check_product<engine::register_product<Packet, 32>, C>(g);
}

using rows = std::vector<std::vector<double>>;

/// Σ_{i≠j} of the products of two matrices, of which the first may be U-centred.
double off_diagonal(rows const& x, rows const& y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j)
      if (i != j) sum += x[i][j] * y[i][j];
  return sum;
}

rows centred_kernel(std::vector<double> x, integer n, integer d) {
  for (integer k = 0; k < d; ++k) {
    double mean = 0;
    for (integer i = 0; i < n; ++i) mean += x[at(i * d + k)] / static_cast<double>(n);
    for (integer i = 0; i < n; ++i) x[at(i * d + k)] -= mean;
  }
  rows kernel(at(n), std::vector<double>(at(n)));
  for (integer i = 0; i < n; ++i)
    for (integer j = 0; j < n; ++j)
      for (integer k = 0; k < d; ++k) kernel[at(i)][at(j)] += x[at(i * d + k)] * x[at(j * d + k)];
  return kernel;
}

/// Σ of the squares that cancel in ‖XᵀY‖² − Σ a b: the scale of what the feature path rounds.
double scale_of(rows const& kernel) {
  double sum = 0;
  for (auto const& row : kernel)
    for (double const x : row) sum += x * x;
  return sum;
}

/// The sum of squares of the U-centred kernel: its off-diagonal entries, with row sums of zero.
double u_centred_norm(rows kernel) {
  double const n = static_cast<double>(kernel.size());
  double trace = 0;
  for (std::size_t i = 0; i < kernel.size(); ++i) trace += kernel[i][i];
  rows const k = kernel;
  for (std::size_t i = 0; i < kernel.size(); ++i)
    for (std::size_t j = 0; j < kernel.size(); ++j)
      kernel[i][j] += (k[i][i] + k[j][j]) / (n - 2) - trace / ((n - 1) * (n - 2));
  return off_diagonal(kernel, kernel);
}

/// Gram moments by both paths with the register tile of another machine, where whole packets of this
/// one fill it.
template <class Product, class C>
int check_engine(std::mt19937& g) {
  if constexpr (Product::template rows<C> % engine::lanes_v<C> != 0) {
    return 0;
  } else {
    double const tolerance = std::same_as<C, double> ? 1e-12 : 4e-6;
    for (auto const& shape : {std::pair<integer, integer>{4, 3}, {200, 67}, {64, 32}, {131, 150}}) {
      integer const n = shape.first, d = shape.second;
      std::normal_distribution<double> normal;
      std::vector<C> x(at(n * d));
      for (C& v : x) v = static_cast<C>(normal(g));
      engine::site_rows<C> const site{rflow::view<C>(x.data(), n, d), nullptr};
      rows const kernel = centred_kernel({x.begin(), x.end()}, n, d);
      auto const product = [&](rflow::gram_path path) {
        engine::gram_options options;
        options.path = path;
        rflow::gram_moments const m = engine::gram<C, engine::linear_kernel, Product>(
            {engine::source_of<C>(site)}, n, engine::linear_kernel{}, options);
        return m.u_product(0, 0);
      };
      INFO("tile " << Product::template rows<C> << " x " << Product::template cols<C> << ", n " << n
                   << ", d " << d);
      double const norm = u_centred_norm(kernel);
      CHECK(std::abs(product(rflow::gram_path::gram) - norm) <= tolerance * norm);
      CHECK(std::abs(product(rflow::gram_path::feature) - norm) <= tolerance * scale_of(kernel));
    }
    return 1;
  }
}

template <template <class> class Packet, class C>
int check_engines(std::mt19937& g) {
  return check_engine<engine::register_product<Packet, 16>, C>(g) +
         check_engine<engine::register_product<Packet, 32>, C>(g);
}

}  // namespace

TEST_CASE_TEMPLATE("product: the register tile of every machine, in stand-ins", C, float, double) {
  std::mt19937 g(1);
  check_registers<scalar_packet, C>(g);
  check_registers<stand_ins<8>::packet, C>(g);
  check_registers<stand_ins<16>::packet, C>(g);
  check_registers<stand_ins<32>::packet, C>(g);
  check_registers<stand_ins<64>::packet, C>(g);
  check_registers<stand_ins<128>::packet, C>(g);
}

TEST_CASE_TEMPLATE("product: the register tile with this machine's packets", C, float, double) {
  std::mt19937 g(2);
  check_product<engine::packed_product, C>(g);
  check_registers<engine::packet_t, C>(g);
  check_registers<at_most<8>::packet, C>(g);
  check_registers<at_most<4>::packet, C>(g);
  check_registers<at_most<2>::packet, C>(g);
}

TEST_CASE_TEMPLATE("product: Gram moments with the register tile of other machines", C, float,
                   double) {
  std::mt19937 g(3);
  int engines = check_engine<engine::packed_product, C>(g);
  engines += check_engines<engine::packet_t, C>(g);
  engines += check_engines<stand_ins<16>::packet, C>(g);
  engines += check_engines<stand_ins<32>::packet, C>(g);
  engines += check_engines<stand_ins<64>::packet, C>(g);
  CHECK(engines >= 3);
}
