// SPDX-License-Identifier: Apache-2.0
#include <rflow/view.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <list>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/eigen.hpp>
#include <rflow/measured.hpp>
#include <rflow/moments.hpp>
#include <rflow/scalar.hpp>

using rflow::bf16;
using rflow::f16;
using rflow::layer_stack;
using rflow::view;

namespace {

struct format {
  int exponent_bits, mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int special() const { return (1 << exponent_bits) - 1; }

  /// What IEEE 754 says the bits mean.
  double value(unsigned bits) const {
    int const mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
    int const exponent = static_cast<int>(bits >> mantissa_bits) & special();
    double const sign = (bits >> (exponent_bits + mantissa_bits)) != 0 ? -1 : 1;
    if (exponent == special())
      return mantissa == 0 ? sign * std::numeric_limits<double>::infinity()
                           : std::numeric_limits<double>::quiet_NaN();
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias() - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias() - mantissa_bits);
  }
};

template <class T>
constexpr format format_of{};
template <>
constexpr format format_of<f16>{5, 10};
template <>
constexpr format format_of<bf16>{8, 7};

constexpr unsigned sign_bit = 0x8000;

template <class T>
T from_bits(unsigned bits) {
  return T{static_cast<std::uint16_t>(bits)};
}

/// A tensor of someone else's, and the lines that make the library read it.
struct foreign_tensor {
  std::vector<double> values;
  std::ptrdiff_t tokens, features;
};

}  // namespace

template <>
struct rflow::adapt<foreign_tensor> {
  static view<double> as_view(foreign_tensor const& x) { return {x.values, x.tokens, x.features}; }
};

TEST_CASE_TEMPLATE("every 16-bit pattern widens to the value that its format defines", T, f16,
                   bf16) {
  int wrong = 0;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    float const wide = from_bits<T>(bits);
    double const expected = format_of<T>.value(bits);
    if (std::isnan(expected))
      wrong += !std::isnan(wide);
    else
      wrong += static_cast<double>(wide) != expected;
    wrong += std::signbit(wide) != ((bits & sign_bit) != 0);
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("narrowing rounds to nearest, ties to even", T, f16, bf16) {
  format const& f = format_of<T>;
  unsigned const infinity = static_cast<unsigned>(f.special()) << f.mantissa_bits;
  int wrong = 0;
  for (unsigned bits = 0; bits < infinity; ++bits) {
    // Above the largest finite value, the next one stands where it would if the range went on.
    double const here = f.value(bits);
    double const next = bits + 1 < infinity ? f.value(bits + 1) : here + (here - f.value(bits - 1));
    auto const middle = static_cast<float>((here + next) / 2);
    float const inf = std::numeric_limits<float>::infinity();
    unsigned const even = bits % 2 == 0 ? bits : bits + 1;
    for (unsigned const sign : {0u, sign_bit}) {
      float const s = sign == 0 ? 1.0f : -1.0f;
      wrong += T::nearest(s * static_cast<float>(here)).bits != (bits | sign);
      wrong += T::nearest(s * middle).bits != (even | sign);
      wrong += T::nearest(s * std::nextafter(middle, 0.0f)).bits != (bits | sign);
      wrong += T::nearest(s * std::nextafter(middle, inf)).bits != ((bits + 1) | sign);
    }
  }
  CHECK(wrong == 0);
  CHECK(T::nearest(std::numeric_limits<float>::infinity()).bits == infinity);
  CHECK(T::nearest(-std::numeric_limits<float>::infinity()).bits == (infinity | sign_bit));
  CHECK(T::nearest(std::numeric_limits<float>::max()).bits == infinity);
  CHECK(T::nearest(std::numeric_limits<float>::denorm_min()).bits == 0);
  CHECK(T::nearest(-0.0f).bits == sign_bit);
}

TEST_CASE_TEMPLATE("narrowing random floats leaves no value that is nearer", T, f16, bf16) {
  format const& f = format_of<T>;
  unsigned const largest = (static_cast<unsigned>(f.special()) << f.mantissa_bits) - 1;
  std::mt19937 bits(4);
  int wrong = 0;
  for (int i = 0; i < 2'000'000; ++i) {
    auto const x = std::bit_cast<float>(static_cast<std::uint32_t>(bits()));
    unsigned const got = T::nearest(x).bits;
    if (std::isnan(x)) {
      wrong += !std::isnan(f.value(got));
      continue;
    }
    wrong += std::signbit(x) != ((got & sign_bit) != 0);
    unsigned const magnitude = got & ~sign_bit;
    if (magnitude > largest) continue;  // the border to infinity is in the test above
    double const error = std::abs(static_cast<double>(x) - f.value(got));
    for (unsigned const other : {got + 1, got - 1})
      if ((other & ~sign_bit) <= largest && ((other ^ got) & sign_bit) == 0)
        wrong += std::abs(static_cast<double>(x) - f.value(other)) < error;
  }
  CHECK(wrong == 0);
}

TEST_CASE("a NaN stays a NaN whatever its payload") {
  // Payloads in the low bits alone would be cut off and leave an infinity.
  for (std::uint32_t const payload : {0x1u, 0x2000u, 0x8000u, 0x400000u, 0x7fffffu})
    for (std::uint32_t const sign : {0u, 0x80000000u}) {
      auto const x = std::bit_cast<float>(sign | 0x7f800000u | payload);
      CHECK(std::isnan(format_of<f16>.value(f16::nearest(x).bits)));
      CHECK(std::isnan(format_of<bf16>.value(bf16::nearest(x).bits)));
    }
}

TEST_CASE("conversions are usable in constant expressions") {
  static_assert(static_cast<float>(f16{0x3c00}) == 1.0f);
  static_assert(static_cast<float>(f16{0x0001}) == 0x1p-24f);
  static_assert(static_cast<float>(bf16{0x3f80}) == 1.0f);
  static_assert(f16::nearest(65519.0f).bits == 0x7bff);
  static_assert(f16::nearest(65520.0f).bits == 0x7c00);
  static_assert(bf16::nearest(1.0f).bits == 0x3f80);
  static_assert(sizeof(f16) == 2 && sizeof(bf16) == 2);
}

TEST_CASE("a view looks at pointers, vectors, spans and arrays without copying") {
  std::vector<float> values{1, 2, 3, 4, 5, 6};
  view const a(values, 2, 3);
  static_assert(std::same_as<decltype(a), view<float> const>);
  CHECK(a.data == values.data());
  CHECK(a.rows == 2);
  CHECK(a.cols == 3);
  CHECK(a.row_stride == 3);
  CHECK(a.col_stride == 1);
  CHECK(a(1, 0) == 4);

  view const b(values.data(), 3, 2);
  CHECK(b(2, 1) == 6);
  view const c(std::span<float const>(values), 3, 2);
  static_assert(std::same_as<decltype(c), view<float> const>);
  CHECK(c.data == values.data());
  std::array<double, 4> const four{1, 2, 3, 4};
  view const d(four, 2, 2);
  static_assert(std::same_as<decltype(d), view<double> const>);
  CHECK(d.data == four.data());

  view const transposed(values.data(), 3, 2, 1, 3);
  CHECK(transposed(0, 1) == 4);
  CHECK(transposed(2, 0) == 3);
  view const backwards(values.data() + 5, 2, 3, -3, -1);
  CHECK(backwards(0, 0) == 6);
  CHECK(backwards(1, 2) == 1);
  view const same_row(values.data(), 4, 3, 0, 1);
  CHECK(same_row(3, 2) == 3);
  CHECK(rflow::as_view(transposed).row_stride == 1);
}

TEST_CASE("a container of another size is refused with both sizes") {
  std::vector<float> const values(6);
  CHECK_THROWS_WITH_AS(view(values, 2, 4), "rflow::view: 6 values do not make 2 x 4",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(view(values, -2, -3), "rflow::view: 6 values do not make -2 x -3",
                       std::invalid_argument);
  // A product that wraps around to 6 must not pass.
  std::ptrdiff_t const big = std::numeric_limits<std::ptrdiff_t>::max() / 2 + 4;
  CHECK_THROWS_AS(view(values, big, 2), std::invalid_argument);
  std::vector<float> const none;
  CHECK_NOTHROW(view(none, 0, 7));
}

TEST_CASE("a foreign container takes one specialisation") {
  foreign_tensor const x{{1, 2, 3, 4, 5, 6}, 3, 2};
  static_assert(rflow::activations<foreign_tensor>);
  static_assert(std::same_as<rflow::scalar_of<foreign_tensor>, double>);
  CHECK(rflow::as_view(x).data == x.values.data());
  std::vector<foreign_tensor> const layers{x, x};
  layer_stack const stack(layers);
  static_assert(std::same_as<decltype(stack), layer_stack<double> const>);
  CHECK(stack[1](2, 1) == 6);
}

TEST_CASE("concepts say what is accepted") {
  using rflow::activations;
  static_assert(activations<view<float>>);
  static_assert(activations<view<bf16, rflow::device_memory> const&>);
  static_assert(activations<Eigen::MatrixXf>);
  static_assert(!activations<std::vector<float>>);
  static_assert(!activations<std::list<float>>);
  static_assert(!activations<float const*>);
  static_assert(!activations<int>);
  static_assert(rflow::scalar<f16> && rflow::scalar<double>);
  static_assert(!rflow::scalar<int> && !rflow::scalar<long double>);
  static_assert(std::same_as<rflow::compute_t<bf16>, float>);
  static_assert(std::same_as<rflow::compute_t<double>, double>);
  static_assert(rflow::backend_for<rflow::on_cpu, rflow::host_memory>);
  static_assert(!rflow::backend_for<rflow::on_cpu, rflow::device_memory>);
  static_assert(!rflow::backend_for<int, rflow::host_memory>);
  static_assert(std::same_as<rflow::default_backend_t<rflow::host_memory>, rflow::on_cpu>);
}

TEST_CASE("a stack is built from any range of activations") {
  std::vector<Eigen::MatrixXf> columns{Eigen::MatrixXf::Random(5, 3),
                                       Eigen::MatrixXf::Random(5, 4)};
  layer_stack const a(columns);
  static_assert(std::same_as<decltype(a), layer_stack<float> const>);
  CHECK(a.sites() == 2);
  CHECK(a.width() == 3);
  CHECK(a[1].cols == 4);
  CHECK(a[0].data == columns[0].data());
  CHECK(a[0].col_stride == 5);
  CHECK(a[1](4, 3) == columns[1](4, 3));

  using row_major = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  std::array<row_major, 2> const rows{row_major::Random(4, 3), row_major::Random(4, 3)};
  layer_stack const b(rows);
  static_assert(std::same_as<decltype(b), layer_stack<double> const>);
  CHECK(b[1].data == rows[1].data());
  CHECK(b[1].row_stride == 3);

  std::list<Eigen::Map<Eigen::MatrixXf>> maps;
  for (auto& m : columns) maps.emplace_back(m.data(), m.rows(), m.cols());
  layer_stack const c(maps);
  CHECK(c[1].data == columns[1].data());

  std::vector<Eigen::Ref<Eigen::MatrixXf const>> refs(columns.begin(), columns.end());
  layer_stack const d(refs);
  CHECK(d[0].data == columns[0].data());

  std::vector<Eigen::Block<Eigen::MatrixXf>> blocks;
  for (auto& m : columns) blocks.push_back(m.block(1, 1, 3, 2));
  layer_stack const e(blocks);
  CHECK(e[1](0, 0) == columns[1](1, 1));
  CHECK(e[1].col_stride == 5);

  std::vector<float> const dense(12);
  layer_stack const f(std::vector<view<float>>{view(dense, 3, 4), view(dense, 3, 4)});
  CHECK(f[1].data == dense.data());
  layer_stack<float> const g{view(dense, 3, 4), view(dense, 3, 4), view(dense, 3, 4)};
  CHECK(g.sites() == 3);
  Eigen::MatrixXf plain[2] = {columns[0], columns[0]};
  CHECK(layer_stack<float>(plain)[1].data == plain[1].data());
}

TEST_CASE("a stack never looks at matrices that are about to die") {
  using matrices = std::vector<Eigen::MatrixXf>;
  static_assert(std::is_constructible_v<layer_stack<float>, matrices&>);
  static_assert(std::is_constructible_v<layer_stack<float>, matrices const&>);
  static_assert(!std::is_constructible_v<layer_stack<float>, matrices>);
  static_assert(!std::is_constructible_v<layer_stack<float>, matrices const>);
  static_assert(!std::is_constructible_v<layer_stack<float>, matrices, std::vector<std::string>>);
  static_assert(!std::is_constructible_v<layer_stack<double>, std::array<foreign_tensor, 2>>);
  // Views outlive the range that holds them.
  static_assert(std::is_constructible_v<layer_stack<float>, std::vector<view<float>>>);
  // Another element type is another stack.
  static_assert(!std::is_constructible_v<layer_stack<double>, matrices&>);
  // Tokens in rows of one matrix are one site, not a range of sites.
  static_assert(!std::is_constructible_v<layer_stack<float>, Eigen::MatrixXf&>);
}

TEST_CASE("a three-dimensional array is read in each order of its axes") {
  std::ptrdiff_t const s = 3, n = 4, d = 5;
  using rflow::axes;
  struct order {
    axes which;
    int slowest, middle;  // 0 site, 1 token, 2 feature
  };
  for (order const& o :
       {order{axes::sites_tokens_hidden, 0, 1}, order{axes::sites_hidden_tokens, 0, 2},
        order{axes::tokens_sites_hidden, 1, 0}, order{axes::tokens_hidden_sites, 1, 2},
        order{axes::hidden_sites_tokens, 2, 0}, order{axes::hidden_tokens_sites, 2, 1}}) {
    std::array<std::ptrdiff_t, 3> const extent{s, n, d};
    auto const fastest = static_cast<std::size_t>(3 - o.slowest - o.middle);
    std::vector<double> values;
    std::array<std::ptrdiff_t, 3> at{};
    auto& i = at[static_cast<std::size_t>(o.slowest)];
    auto& j = at[static_cast<std::size_t>(o.middle)];
    auto& k = at[fastest];
    for (i = 0; i < extent[static_cast<std::size_t>(o.slowest)]; ++i)
      for (j = 0; j < extent[static_cast<std::size_t>(o.middle)]; ++j)
        for (k = 0; k < extent[fastest]; ++k)
          values.push_back(static_cast<double>(100 * at[0] + 10 * at[1] + at[2]));
    layer_stack const stack(values.data(), rflow::stack_shape{s, n, d}, o.which);
    static_assert(std::same_as<decltype(stack), layer_stack<double> const>);
    REQUIRE(stack.sites() == s);
    REQUIRE(stack.size() == n);
    REQUIRE(stack.width() == d);
    int wrong = 0;
    for (std::ptrdiff_t l = 0; l < s; ++l)
      for (std::ptrdiff_t t = 0; t < n; ++t)
        for (std::ptrdiff_t f = 0; f < d; ++f)
          wrong += stack[l](t, f) != static_cast<double>(100 * l + 10 * t + f);
    CHECK(wrong == 0);
  }
  std::vector<float> const values(60);
  layer_stack const plain(values.data(), rflow::stack_shape{3, 4, 5});
  CHECK(plain[2].data == values.data() + 40);
  layer_stack const strided(values.data(), rflow::stack_shape{2, 2, 5},
                            rflow::stack_strides{40, 10, 1});
  CHECK(strided[1].data == values.data() + 40);
  CHECK(strided[1].row_stride == 10);
}

TEST_CASE("stacks that make no sense are refused with both sizes") {
  std::vector<float> const values(60);
  view<float> const a(values.data(), 3, 4), b(values.data(), 5, 4), empty(values.data(), 0, 4);
  auto const build = [](std::vector<view<float>> const& layers,
                        std::vector<std::string> names = {}) {
    return layer_stack<float>(layers, std::move(names));
  };
  CHECK_THROWS_WITH_AS(build({}), "rflow::layer_stack: no sites", std::invalid_argument);
  CHECK_THROWS_WITH_AS(build({a, a, b}), "rflow::layer_stack: site 2 has 5 tokens, site 0 has 3",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(build({a, empty}),
                       "rflow::layer_stack: activations are empty: 0 tokens x 4 features",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(build({a, a}, {"embed"}), "rflow::layer_stack: 1 names for 2 sites",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(build({view<float>(nullptr, 3, 4)}),
                       "rflow::layer_stack: activations have no data (null pointer)",
                       std::invalid_argument);
  float const* const none = nullptr;
  CHECK_THROWS_AS(layer_stack(none, rflow::stack_shape{2, 3, 4}), std::invalid_argument);
  CHECK_THROWS_WITH_AS(layer_stack(values.data(), rflow::stack_shape{3, 4, 0}),
                       "rflow::layer_stack: a shape of 3 sites x 4 tokens x 0 features",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(layer_stack(values.data(), rflow::stack_shape{-1, 3, 4}),
                       "rflow::layer_stack: negative number of sites", std::invalid_argument);
  CHECK_THROWS_AS(layer_stack(values.data(), rflow::stack_shape{0, 3, 4}), std::invalid_argument);
  CHECK_THROWS_WITH_AS(layer_stack(values.data(), rflow::stack_shape{2, 3, -4}),
                       "rflow::layer_stack: activations are empty: 3 tokens x -4 features",
                       std::invalid_argument);
}

TEST_CASE("sites have names or numbers") {
  std::vector<float> const values(12);
  std::vector<view<float>> const layers(2, view(values, 3, 4));
  CHECK(layer_stack(layers).name(1) == "1");
  layer_stack const named(layers, {"embed", "block.1"});
  CHECK(named.name(0) == "embed");
  CHECK(named.name(1) == "block.1");
  CHECK(named.tokens(std::vector{1, 0, 1}).name(1) == "block.1");
}

TEST_CASE("masks choose tokens and narrow one another") {
  std::vector<float> const values(12);
  layer_stack const stack(values.data(), rflow::stack_shape{2, 6, 1});
  CHECK_FALSE(stack.masked());
  CHECK(stack.selection().empty());
  CHECK(stack.size() == 6);
  CHECK(stack.token(4) == 4);

  layer_stack const some = stack.tokens(std::vector<bool>{true, false, true, true, false, true});
  CHECK(some.masked());
  CHECK(some.size() == 4);
  CHECK(some.all_tokens() == 6);
  CHECK(some.token(1) == 2);
  CHECK(some.token(3) == 5);
  CHECK(stack.size() == 6);

  // A second mask counts tokens of the whole, not of what the first left.
  layer_stack const fewer = some.tokens(std::array<int, 6>{0, 1, 1, 0, 1, 1});
  REQUIRE(fewer.size() == 2);
  CHECK(fewer.token(0) == 2);
  CHECK(fewer.token(1) == 5);
  CHECK(some.tokens(std::vector<char>(6, 0)).size() == 0);
  CHECK(some.tokens(std::vector<char>(6, 0)).masked());

  Eigen::Array<bool, Eigen::Dynamic, 1> eigen_mask(6);
  eigen_mask << true, true, false, false, false, false;
  CHECK(stack.tokens(eigen_mask).size() == 2);
  CHECK(stack.tokens(std::vector<double>{0.5, 0, 0, 0, 0, 1}).size() == 2);

  for (std::size_t const length : {0u, 4u, 7u})
    CHECK_THROWS_WITH_AS(
        static_cast<void>(some.tokens(std::vector<int>(length))),
        ("rflow::layer_stack: a mask of " + std::to_string(length) + " values for 6 tokens")
            .c_str(),
        std::invalid_argument);
}

TEST_CASE("sequence boundaries count the tokens that are left") {
  using list = std::vector<std::ptrdiff_t>;
  std::vector<float> const values(10);
  layer_stack const stack(values.data(), rflow::stack_shape{1, 10, 1});
  CHECK(stack.boundaries() == list{0, 10});
  CHECK(stack.sequences({0, 4, 4, 10}).boundaries() == list{0, 4, 4, 10});

  std::vector<int> const mask{0, 1, 0, 1, 1, 0, 0, 0, 1, 1};
  CHECK(stack.tokens(mask).boundaries() == list{0, 5});
  CHECK(stack.tokens(mask).sequences({0, 4, 5, 8, 10}).boundaries() == list{0, 2, 3, 3, 5});
  CHECK(stack.sequences({0, 4, 5, 8, 10}).tokens(mask).boundaries() == list{0, 2, 3, 3, 5});
  CHECK(stack.sequences({0, 1, 10}).tokens(std::vector<int>(10)).boundaries() == list{0, 0, 0});
}

TEST_CASE("offsets that are no partition are refused") {
  std::vector<float> const values(10);
  layer_stack const stack(values.data(), rflow::stack_shape{1, 10, 1});
  using list = std::vector<std::ptrdiff_t>;
  for (list const& offsets :
       {list{}, list{0}, list{0, 9}, list{1, 10}, list{0, 5, 4, 10}, list{0, 11}, list{0, -1, 10}})
    CHECK_THROWS_WITH_AS(
        static_cast<void>(stack.sequences(offsets)),
        "rflow::layer_stack: sequence offsets must ascend from 0 to 10 (the number of tokens)",
        std::invalid_argument);
}

TEST_CASE("a measured value is a number or a reason") {
  using rflow::measured;
  using rflow::status;
  measured const none;
  CHECK(std::isnan(none.value));
  CHECK(none.why == status::not_requested);
  CHECK_FALSE(none.ok());
  measured const number = 0.5;
  CHECK(number.ok());
  CHECK(number * 2 == 1.0);
  measured const reason = status::constant_layer;
  CHECK(std::isnan(static_cast<double>(reason)));
  CHECK(reason.why == status::constant_layer);
  static_assert(std::is_convertible_v<measured, double>);
}

TEST_CASE("every status has its own name") {
  using enum rflow::status;
  CHECK(to_string(ok) == "ok");
  CHECK(to_string(too_few_rows) == "too_few_rows");
  CHECK(to_string(too_few_sites) == "too_few_sites");
  CHECK(to_string(zero_rows) == "zero_rows");
  CHECK(to_string(constant_layer) == "constant_layer");
  CHECK(to_string(zero_step) == "zero_step");
  CHECK(to_string(zero_bandwidth) == "zero_bandwidth");
  CHECK(to_string(non_finite) == "non_finite");
  CHECK(to_string(not_requested) == "not_requested");
  CHECK(to_string(static_cast<rflow::status>(250)) == "unknown");
}

TEST_CASE("a format error names file, byte and rule") {
  rflow::format_error const e("model.npy", 12, "header is cut off");
  CHECK(std::string(e.what()) == "model.npy: byte 12: header is cut off");
}

TEST_CASE("16-bit floats of other types are looked at where they are") {
  std::vector<std::uint16_t> const halves{0x3c00, 0xc000, 0x7bff}, brains{0x3f80, 0xc000, 0x7f7f};
  view const h(rflow::as_f16(halves.data()), 1, halves.size());
  view const b(rflow::as_bf16(brains.data()), 1, brains.size());
  static_assert(std::same_as<decltype(h), view<rflow::f16> const>);
  static_assert(std::same_as<decltype(b), view<rflow::bf16> const>);
  CHECK(static_cast<void const*>(h.data) == halves.data());
  CHECK(static_cast<void const*>(b.data) == brains.data());
  CHECK(static_cast<float>(h(0, 0)) == 1);
  CHECK(static_cast<float>(h(0, 1)) == -2);
  CHECK(static_cast<float>(h(0, 2)) == 65504);
  CHECK(static_cast<float>(b(0, 0)) == 1);
  CHECK(static_cast<float>(b(0, 1)) == -2);
  CHECK(static_cast<float>(b(0, 2)) == 0x1.fep127f);
}
