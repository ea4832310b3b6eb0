// SPDX-License-Identifier: Apache-2.0
#include <rflow/cpu.hpp>
#include <rflow/eigen.hpp>

#include <array>
#include <bit>
#include <cstring>
#include <random>

#include <doctest/doctest.h>

#include <rflow/cka.hpp>
#include <rflow/cosine.hpp>
#include <rflow/flow.hpp>

#include "reference.hpp"

using doctest::Approx;
using rflow::bf16;
using rflow::f16;

namespace {

using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The view must look at the very elements of x.
template <class X>
void look_at_same_elements(X const& x) {
  auto const v = rflow::as_view(x);
  REQUIRE(v.rows == x.rows());
  REQUIRE(v.cols == x.cols());
  for (Eigen::Index i = 0; i < x.rows(); ++i)
    for (Eigen::Index j = 0; j < x.cols(); ++j)
      CHECK(static_cast<void const*>(&v(i, j)) == static_cast<void const*>(&x.coeffRef(i, j)));
}

template <class T>
void check_widening() {
  using chunk = rflow::detail::chunk<T>;
  using P = rflow::detail::packet_t<float>;
  int wrong = 0;
  for (unsigned first = 0; first < 0x10000; first += static_cast<unsigned>(chunk::width)) {
    T values[chunk::width];
    for (std::ptrdiff_t j = 0; j < chunk::width; ++j)
      values[j].bits = static_cast<std::uint16_t>(first + static_cast<unsigned>(j));
    chunk const loaded = rflow::detail::load_chunk<T>(values);
    alignas(64) float wide[chunk::width];
    for (std::ptrdiff_t p = 0; p < chunk::packets; ++p)
      Eigen::internal::pstoreu<float, P>(wide + p * chunk::lanes, loaded.at[p]);
    for (std::ptrdiff_t j = 0; j < chunk::width; ++j) {
      float const expected = values[j], found = wide[rflow::detail::place_of<T>(j)];
      // A signalling NaN may come out quiet.
      wrong += std::bit_cast<std::uint32_t>(found) != std::bit_cast<std::uint32_t>(expected) &&
               !(std::isnan(found) && std::isnan(expected));
    }
  }
  CHECK(wrong == 0);
}

template <class T>
std::vector<unsigned char> bytes_of(std::vector<T> const& values) {
  std::vector<unsigned char> out(values.size() * sizeof(T));
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}

/// Products of pairs, relative to those with themselves, and tables.
void check_same_moments(rflow::gram_moments const& a, rflow::gram_moments const& b, double within) {
  REQUIRE(a.sites == b.sites);
  REQUIRE(a.tokens == b.tokens);
  CHECK(a.whole());
  CHECK(a.epsilon == b.epsilon);
  CHECK(a.exponent == b.exponent);
  CHECK(a.path == b.path);
  CHECK(a.sigma == b.sigma);
  for (std::ptrdiff_t p = 0; p < a.sites; ++p) {
    auto const s = static_cast<std::size_t>(p);
    CHECK(a.why[s] == b.why[s]);
    CHECK(a.non_finite[s].token == b.non_finite[s].token);
    if (a.why[s] == rflow::status::non_finite) continue;
    CHECK(a.square_sum[s] == Approx(b.square_sum[s]).epsilon(100 * within));
    for (std::ptrdiff_t q = 0; q < a.sites; ++q)
      if (a.why[static_cast<std::size_t>(q)] != rflow::status::non_finite)
        CHECK(std::abs(a.product(p, q) - b.product(p, q)) <=
              within * std::sqrt(b.product(p, p) * b.product(q, q)));
  }
  auto const check_sums = [&](std::vector<double> const& x, std::vector<double> const& y) {
    REQUIRE(x.size() == y.size());
    double largest = 0;
    for (double const value : y)
      largest = std::max(largest, std::isfinite(value) ? std::abs(value) : 0);
    for (std::size_t i = 0; i < x.size(); ++i)
      CHECK((std::abs(x[i] - y[i]) <= within * largest || (std::isnan(x[i]) && std::isnan(y[i]))));
  };
  check_sums(a.row_sums, b.row_sums);
  check_sums(a.squares, b.squares);
  check_sums(a.cubes, b.cubes);
  check_sums(a.triangles, b.triangles);
  check_sums(a.diagonal, b.diagonal);
}

}  // namespace

TEST_CASE("Eigen objects with storage are looked at, not copied") {
  Eigen::MatrixXf columns = Eigen::MatrixXf::Random(6, 4);
  row_major rows = row_major::Random(6, 4);
  look_at_same_elements(columns);
  look_at_same_elements(rows);
  Eigen::Matrix<double, 3, 5> fixed = Eigen::Matrix<double, 3, 5>::Random();
  look_at_same_elements(fixed);
  Eigen::VectorXf vector = Eigen::VectorXf::Random(7);  // 7 tokens of width 1
  look_at_same_elements(vector);
  Eigen::RowVectorXf row = Eigen::RowVectorXf::Random(7);  // 1 token of width 7
  look_at_same_elements(row);
  Eigen::ArrayXXd array = Eigen::ArrayXXd::Random(4, 4);
  look_at_same_elements(array);

  using strides = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  std::vector<float> memory(200);
  Eigen::Map<Eigen::MatrixXf, 0, strides> const map(memory.data(), 5, 3, strides(20, 2));
  look_at_same_elements(map);
  Eigen::Map<row_major, 0, strides> const row_map(memory.data(), 5, 3, strides(20, 2));
  look_at_same_elements(row_map);
  CHECK(rflow::as_view(row_map).row_stride == 20);
  CHECK(rflow::as_view(row_map).col_stride == 2);
  Eigen::Map<row_major, 0, strides> const backwards(memory.data() + 199, 5, 3, strides(-3, -1));
  look_at_same_elements(backwards);
  Eigen::Map<row_major const> const constant(memory.data(), 5, 3);
  look_at_same_elements(constant);

  Eigen::Ref<Eigen::MatrixXf> ref(columns);
  look_at_same_elements(ref);
  Eigen::Ref<Eigen::MatrixXf const> const const_ref(columns);
  CHECK(rflow::as_view(const_ref).data == columns.data());
  look_at_same_elements(columns.block(1, 1, 4, 2));
  look_at_same_elements(rows.middleCols(1, 2));
  look_at_same_elements(rows.bottomRows(3).leftCols(2));
  look_at_same_elements(columns.row(2));
}

TEST_CASE("a transposed matrix has the storage of the matrix") {
  Eigen::MatrixXf x = Eigen::MatrixXf::Random(3, 8);
  auto const t = x.transpose();
  rflow::view<float> const v = rflow::as_view(t);
  CHECK(v.data == x.data());
  CHECK(v.rows == 8);
  CHECK(v.row_stride == 3);
  CHECK(v.col_stride == 1);
  CHECK(rflow::inter_token_cosine(t) == rflow::inter_token_cosine(row_major(x.transpose())));
  CHECK(rflow::as_view(x.array()).data == x.data());
}

TEST_CASE("Eigen's 16-bit types have the bits of ours") {
  static_assert(std::same_as<rflow::scalar_of<Eigen::Matrix<Eigen::half, 2, 2>>, f16>);
  static_assert(std::same_as<rflow::scalar_of<Eigen::Matrix<Eigen::bfloat16, 2, 2>>, bf16>);
  std::mt19937 bits(2);
  std::normal_distribution<float> normal;
  using half_matrix = Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic>;
  using bfloat_matrix = Eigen::Matrix<Eigen::bfloat16, Eigen::Dynamic, Eigen::Dynamic>;
  half_matrix h(9, 37);
  bfloat_matrix b(9, 37);
  int wrong = 0;
  for (Eigen::Index i = 0; i < h.rows(); ++i)
    for (Eigen::Index j = 0; j < h.cols(); ++j) {
      float const x = normal(bits) * std::exp(4 * normal(bits));
      h(i, j) = Eigen::half(x);
      b(i, j) = Eigen::bfloat16(x);
      wrong += rflow::as_view(h)(i, j).bits != f16::nearest(x).bits;
      wrong += rflow::as_view(b)(i, j).bits != bf16::nearest(x).bits;
      wrong += static_cast<float>(rflow::as_view(h)(i, j)) != static_cast<float>(h(i, j));
    }
  CHECK(wrong == 0);
  Eigen::MatrixXd const wide = h.cast<double>();
  CHECK(std::abs(rflow::inter_token_cosine(h) - rflow::inter_token_cosine(wide)) < 1e-6);
  CHECK(std::abs(rflow::cka(h, wide) - 1) < 1e-6);
}

TEST_CASE("vector loads widen every 16-bit pattern as the scalar conversion does") {
  check_widening<f16>();
  check_widening<bf16>();
}

#ifdef __SSE__
TEST_CASE("half-precision subnormals survive a thread that flushes to zero") {
  unsigned const before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040u);  // flush results, read denormals as zero
  check_widening<f16>();
  __builtin_ia32_ldmxcsr(before);
}
#endif

TEST_CASE_TEMPLATE("loads of 16-bit features may permute them, and the permutation is complete", T,
                   f16, bf16, float, double) {
  constexpr std::ptrdiff_t width = rflow::detail::chunk<T>::width;
  std::vector<int> seen(static_cast<std::size_t>(3 * width));
  for (std::ptrdiff_t j = 0; j < 3 * width; ++j) {
    std::ptrdiff_t const place = rflow::detail::place_of<T>(j);
    REQUIRE(place / width == j / width);
    ++seen[static_cast<std::size_t>(place)];
  }
  CHECK(std::count(seen.begin(), seen.end(), 1) == 3 * width);
}

TEST_CASE_TEMPLATE("no feature is lost at any width", T, float, double, f16, bf16) {
  // One feature carries everything: unit sums must put it back where it came from.
  for (std::ptrdiff_t d = 1; d <= 70; ++d) {
    int wrong = 0;
    for (std::ptrdiff_t hot = 0; hot < d; ++hot) {
      std::vector<T> values(static_cast<std::size_t>(3 * d), reference::stored<T>(0));
      for (std::ptrdiff_t i = 0; i < 3; ++i)
        values[static_cast<std::size_t>(i * d + hot)] = reference::stored<T>(i == 2 ? -2 : 2);
      rflow::flow_report const r =
          rflow::flow(rflow::layer_stack<T>(values.data(), {1, 3, d}), {}, rflow::on_cpu{1});
      wrong += std::abs(r.inter_token[0] - (1.0 - 1.0 - 1.0) / 3) > 1e-6;
      rflow::flow_moments const m =
          rflow::on_cpu{1}.flow(rflow::layer_stack<T>(values.data(), {1, 3, d}));
      wrong += m.squares[0] != 12;
    }
    CAPTURE(d);
    CHECK(wrong == 0);
  }
}

TEST_CASE("half-precision subnormals count as what they are") {
  std::mt19937 bits(8);
  std::size_t const n = 12, d = 45;
  reference::matrix x(n, std::vector<double>(d));
  for (auto& row : x)
    for (double& v : row)
      v = static_cast<double>(
          static_cast<float>(f16{static_cast<std::uint16_t>((bits() & 0x83ffu))}));  // exponent 0
  std::vector<f16> const values = reference::pack<f16>(x);
  CHECK(std::abs(rflow::inter_token_cosine(rflow::view(values, n, d)) - reference::inter_token(x)) <
        1e-6);
}

TEST_CASE_TEMPLATE("a NaN or infinity is found at every place of a row", T, float, double, f16,
                   bf16) {
  for (double const poison :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity()})
    for (std::ptrdiff_t const d : {1, 31, 32, 33, 67}) {
      CAPTURE(d);
      for (std::ptrdiff_t at = 0; at < d; ++at) {
        std::vector<T> values(static_cast<std::size_t>(5 * d), reference::stored<T>(1));
        values[static_cast<std::size_t>(3 * d + at)] = reference::stored<T>(poison);
        rflow::layer_stack<T> const stack(values.data(), {1, 5, d});
        rflow::position const flow = rflow::on_cpu{1}.flow(stack).non_finite[0];
        rflow::position const gram = rflow::on_cpu{1}.gram(rflow::linear{}, stack).non_finite[0];
        if (flow.token != 3 || flow.feature != at || gram.token != 3 || gram.feature != at) {
          CAPTURE(at);
          CHECK(flow.token == 3);
          CHECK(flow.feature == at);
          CHECK(gram.token == 3);
          CHECK(gram.feature == at);
        }
      }
    }
}

TEST_CASE_TEMPLATE("the input stays as it was", T, float, double, f16, bf16) {
  std::mt19937 bits(6);
  reference::stack x = reference::random_stack(bits, 4, 37, 53);
  std::vector<T> const values = reference::pack<T>(x);
  std::vector<unsigned char> const before = bytes_of(values);
  auto const stack = reference::stack_of(values, x);
  static_cast<void>(rflow::flow(stack, {.per_token = true}));
  static_cast<void>(rflow::cka_matrix(stack));
  static_cast<void>(rflow::cka(stack[0], stack[3]));
  static_cast<void>(rflow::adjacent_cosine(stack[0], stack[1]));
  CHECK(bytes_of(values) == before);
}

TEST_CASE("layouts of Eigen give the same figures") {
  Eigen::MatrixXd const x = Eigen::MatrixXd::Random(23, 41), y = Eigen::MatrixXd::Random(23, 41);
  Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> const xr = x, yr = y;
  CHECK(rflow::adjacent_cosine(x, yr).mean ==
        Approx(rflow::adjacent_cosine(xr, y).mean).epsilon(1e-14));
  CHECK(rflow::cka(x, y) == Approx(rflow::cka(xr, yr)).epsilon(1e-13));
  Eigen::MatrixXd big = Eigen::MatrixXd::Random(50, 90);
  big.block(3, 5, 23, 41) = x;
  CHECK(rflow::cka(big.block(3, 5, 23, 41), y) == Approx(rflow::cka(x, y)).epsilon(1e-13));
  CHECK(rflow::inter_token_cosine(big.block(3, 5, 23, 41)) ==
        Approx(rflow::inter_token_cosine(x)).epsilon(1e-13));
}

TEST_CASE_TEMPLATE("shares of the products add to the whole, whatever is cut", T, float, double,
                   bf16) {
  double const within = std::same_as<T, double> ? 1e-12 : 1e-6;
  for (unsigned seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const sites = 1 + bits() % 4, tokens = 2 + bits() % 700, width = 1 + bits() % 60;
    CAPTURE(sites);
    CAPTURE(tokens);
    CAPTURE(width);
    reference::stack x = reference::random_stack(bits, sites, tokens, width);
    if (seed % 4 == 1) x[0] = reference::matrix(tokens, std::vector<double>(width, 2.5));
    if (seed % 4 == 2) x.back()[tokens / 2][0] = std::numeric_limits<double>::quiet_NaN();
    std::vector<T> const values = reference::pack<T>(x);
    auto const stack = reference::stack_of(values, x);
    int const shares = 1 + static_cast<int>(bits() % 5);
    CAPTURE(shares);
    auto const check = [&](auto const& kernel, rflow::on_cpu on) {
      on.threads = 1 + static_cast<int>(bits() % 3);
      rflow::gram_moments const whole = on.gram(kernel, stack);
      on.share = {shares - 1, shares};
      rflow::gram_moments sum = on.gram(kernel, stack);
      for (on.share.index = 0; on.share.index + 1 < shares; ++on.share.index) {
        CHECK(std::count(sum.shares.begin(), sum.shares.end(), 1) == 1 + on.share.index);
        CHECK_THROWS_AS(rflow::cka_matrix(sum), std::invalid_argument);
        sum.merge(on.gram(kernel, stack));
      }
      check_same_moments(sum, whole, within);
      if (shares > 1) CHECK_THROWS_AS(sum.merge(on.gram(kernel, stack)), std::invalid_argument);
    };
    std::size_t const small = std::size_t{1} << 21;  // several tiles
    check(rflow::linear{}, {.path = rflow::gram_path::gram});
    check(rflow::linear{}, {.memory_bound = small, .path = rflow::gram_path::gram});
    check(rflow::linear{}, {.memory_bound = small, .path = rflow::gram_path::feature});
    check(rflow::rbf{}, {.memory_bound = small});
    check([](double k, double, double) { return k * k; }, {});
    if (tokens <= 300) check(rflow::rbf{}, {.significance = true});
  }
}

TEST_CASE("shares of many tiles: no block twice, none missing, no share much larger") {
  using engine = rflow::detail::tiling<rflow::detail::packed_product, float>;
  std::ptrdiff_t const tokens = 9000, side = 1488;  // 28 tiles of up to 48 blocks
  auto const plan = [&](auto const& f) {
    for (std::ptrdiff_t row = 0; row < tokens; row += side)
      for (std::ptrdiff_t col = 0; col <= row; col += side)
        f(engine::plan(row, std::min(side, tokens - row), col, std::min(side, tokens - col), true,
                       [](rflow::detail::block const&) { return 3; }));
  };
  using place = std::pair<std::ptrdiff_t, std::ptrdiff_t>;
  std::vector<place> all;
  std::ptrdiff_t total = 0;
  constexpr std::ptrdiff_t largest_block = 4 * engine::R * 256;
  plan([&](rflow::detail::tile const& t) {
    for (auto const& b : t.blocks) all.emplace_back(b.row, b.col);
    total += t.area;
  });
  for (int const shares : {1, 2, 3, 16, 64, 5000}) {
    CAPTURE(shares);
    std::vector<place> seen;
    for (int k = 0; k < shares; ++k) {
      std::ptrdiff_t area = 0;
      rflow::detail::each_of_share({k, shares}, plan, [&](rflow::detail::tile const& t) {
        CHECK(!t.blocks.empty());
        CHECK(t.sums == 3 * static_cast<std::ptrdiff_t>(t.blocks.size()));
        area += t.area;
        std::ptrdiff_t at = 0;
        for (auto const& b : t.blocks) {
          CHECK(b.first == at);
          at = engine::each(b, t.lower, [](auto...) {});
          seen.emplace_back(b.row, b.col);
        }
        CHECK(at == t.area);
      });
      CHECK(std::abs(area - total / shares) <= 2 * largest_block);
    }
    std::sort(seen.begin(), seen.end());
    std::sort(all.begin(), all.end());
    CHECK(seen == all);
  }
}

TEST_CASE("a share that does not exist, and shares of other work") {
  row_major const x = row_major::Random(30, 5), y = row_major::Random(31, 5);
  std::vector<row_major> const one{x}, other{y};
  rflow::layer_stack const stack(one);
  for (rflow::work_share const share :
       {rflow::work_share{2, 2}, rflow::work_share{-1, 2}, rflow::work_share{0, 0}})
    CHECK_THROWS_AS((rflow::on_cpu{.share = share}.gram(rflow::linear{}, stack)),
                    std::invalid_argument);
  auto const half = [&](rflow::on_cpu on, auto const& kernel, auto const& of) {
    on.share = {0, 2};
    return on.gram(kernel, of);
  };
  rflow::gram_moments const first = half({.path = rflow::gram_path::gram}, rflow::linear{}, stack);
  std::vector<row_major> const same_shape{row_major::Random(30, 5)};
  for (rflow::gram_moments const &wrong :
       {half({}, rflow::linear{}, rflow::layer_stack(other)), half({}, rflow::rbf{}, stack),
        half({.path = rflow::gram_path::gram}, rflow::linear{}, rflow::layer_stack(same_shape)),
        half(
            {}, [](double k, double, double) { return k * k; }, stack),
        first,  // that one again
        half({.path = rflow::gram_path::feature}, rflow::linear{}, stack),
        half({.path = rflow::gram_path::gram, .significance = true}, rflow::linear{}, stack),
        rflow::on_cpu{}.gram(rflow::linear{}, stack)}) {
    rflow::gram_moments sum = first;
    CHECK_THROWS_AS(sum.merge(wrong), std::invalid_argument);
    CHECK(sum.products == first.products);  // as it was
  }
  CHECK_THROWS_WITH_AS(rflow::cka_matrix(first),
                       "rflow::cka_table: moments of 1 of 2 shares of the work: merge the others "
                       "first",
                       std::invalid_argument);
  rflow::cka_accumulator<> sums;
  CHECK_THROWS_AS(sums.add(first), std::invalid_argument);
}

TEST_CASE_TEMPLATE("tokens in several stacks are as tokens in one", T, float, double, f16) {
  for (unsigned seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const sites = 1 + bits() % 4, tokens = 4 + bits() % 200, width = 1 + bits() % 40;
    reference::stack x = reference::random_stack(bits, sites, tokens, width);
    std::vector<T> const values = reference::pack<T>(x);
    auto const whole = reference::stack_of(values, x);
    auto const n = static_cast<std::ptrdiff_t>(tokens);
    std::vector<rflow::layer_stack<T>> parts;
    bool const masked = bits() % 2 == 1;
    std::vector<bool> all_kept;
    for (std::ptrdiff_t at = 0; at < n;) {  // now and then an empty one
      std::ptrdiff_t const count = std::min<std::ptrdiff_t>(n - at, bits() % 70);
      std::vector<rflow::view<T>> views;
      for (std::ptrdiff_t l = 0; l < whole.sites(); ++l)
        views.push_back({whole[l].data + at * whole[l].row_stride, count, whole[l].cols,
                         whole[l].row_stride, whole[l].col_stride});
      rflow::layer_stack<T> part(views);
      std::vector<bool> kept;
      for (std::ptrdiff_t i = 0; i < count; ++i) kept.push_back(!masked || bits() % 4 > 0);
      all_kept.insert(all_kept.end(), kept.begin(), kept.end());
      parts.push_back(masked ? part.tokens(kept) : part);
      at += count;
    }
    auto const expected = masked ? whole.tokens(all_kept) : whole;
    for (rflow::on_cpu const& on : {rflow::on_cpu{.path = rflow::gram_path::gram},
                                    rflow::on_cpu{.path = rflow::gram_path::feature}}) {
      rflow::gram_moments const a = on.gram(rflow::linear{}, parts);
      rflow::gram_moments const b = on.gram(rflow::linear{}, expected);
      CHECK(a.products == b.products);  // the same bits
      CHECK(a.diagonal == b.diagonal);
    }
    CHECK(rflow::on_cpu{}.gram(rflow::rbf{}, parts).products ==
          rflow::on_cpu{}.gram(rflow::rbf{}, expected).products);
    rflow::cka_table const t = rflow::cka_matrix(parts), u = rflow::cka_matrix(expected);
    std::ptrdiff_t const last = whole.sites() - 1;
    CHECK(t.status(0, last) == u.status(0, last));
    rflow::gram_moments const two = rflow::on_cpu{}.gram(rflow::linear{}, parts, parts);
    CHECK(two.products == rflow::on_cpu{}.gram(rflow::linear{}, expected, expected).products);
  }
}

TEST_CASE("several stacks: a NaN is where it is stored, and what differs is an error") {
  row_major a = row_major::Random(6, 3), b = row_major::Random(5, 3),
            wide = row_major::Random(5, 4);
  b(3, 1) = std::numeric_limits<float>::quiet_NaN();
  std::vector<row_major> const first{a}, second{b}, other_width{wide}, more{a, a};
  using stacks = std::vector<rflow::layer_stack<float>>;
  rflow::layer_stack<float> const whole(first);
  stacks const both{whole.tokens(std::array{true, false, true, true, true, true}),
                    rflow::layer_stack(second)};
  rflow::cka_table const t = rflow::cka_matrix(both);
  CHECK(t.status(0, 0) == rflow::status::non_finite);
  CHECK(t.non_finite(0).token == 6 + 3);
  CHECK(t.non_finite(0).feature == 1);
  CHECK_THROWS_WITH_AS(rflow::cka_matrix(stacks{}), "rflow::on_cpu::gram: no stacks",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::cka_matrix(stacks{whole, rflow::layer_stack(other_width)}),
                       "rflow::on_cpu::gram: site 0 of one model has 3 features in one stack, 4 in "
                       "another",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::cka_matrix(stacks{whole, rflow::layer_stack(more)}),
                       "rflow::on_cpu::gram: stacks of one model have 1 and 2 sites",
                       std::invalid_argument);
}
