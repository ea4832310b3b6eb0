// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random weights as models are initialised with them, and random activations: any block of any
// matrix, drawn alone or in parallel, always the same values. "Random" is no description of a model:
// name the scheme, for they differ by an order of magnitude.
//
// Element (i, j) of a matrix is a function of (seed, matrix, i, j) alone: of Philox4x32-10, a counter
// in, 128 bits out. So values depend neither on the number of threads, nor on the order of drawing,
// nor on the extent of the matrix. Uniform values are the same bits on every platform. Normal values
// come from polynomials of this file, not from libm, evaluated in double and rounded to float: two
// platforms differ only where that rounding is a near-tie, by one unit in the last place.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>  // std::sqrt of fans, std::erfc for what a truncation leaves
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <type_traits>

#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow {

// ---- what is drawn ------------------------------------------------------------------------------

/// Independent draws from one distribution. Made by the functions below; the members are what they
/// come to.
struct initializer {
  /// Of which family.
  enum class law { uniform, normal, truncated_normal };

  law shape = law::normal;  ///< the family
  float scale = 1;   ///< normal: standard deviation before truncation; uniform: half the width
  float centre = 0;  ///< uniform: the middle
  float low = 0;     ///< truncated normal: no value lies below
  float high = 0;    ///< truncated normal: no value lies above
};

/// Inputs that one output sums over, outputs that one input goes to.
struct fans {
  double in;   ///< at least 1 where an initialiser divides by it
  double out;  ///< likewise
};

/// Which of the two Kaiming's rule divides by: in keeps the size of activations, out of gradients.
enum class fan_mode { in, out };

/// √2: the gain for layers followed by a ReLU. Linear layers and SiLU or GELU at small inputs: 1 and 2.
inline constexpr double relu_gain = 1.41421356237309504880;

namespace detail {

inline constexpr double largest_float = 3.4028234663852886e38;
/// No normal drawn here is larger: √(−2 ln 2⁻³³) is 6.764.
inline constexpr double largest_normal = 6.765;

inline float positive(char const* where, char const* what, double x) {
  if (!(x <= largest_float) || !(static_cast<float>(x) > 0))
    reject(where, std::string(what) + " is " + std::to_string(x) + ", not a positive float");
  return static_cast<float>(x);
}

/// The standard deviation of normals that are all finite floats.
inline float deviation(char const* where, double x) {
  float const rounded = positive(where, "stddev", x);
  if (x * largest_normal > largest_float)
    reject(where, "stddev is " + std::to_string(x) + ": " + std::to_string(largest_normal) +
                      " of them are beyond float");
  return rounded;
}

inline double fan_of(char const* where, fans const& f, fan_mode mode) {
  double const fan = mode == fan_mode::in ? f.in : f.out;
  if (!(fan >= 1))
    reject(where, "a fan of " + std::to_string(fan) + " (in " + std::to_string(f.in) + ", out " +
                      std::to_string(f.out) + ")");
  return fan;
}

}  // namespace detail

/// N(0, stddev²). GPT-2, GPT-Neo and GPT-NeoX as Hugging Face draws them: 0.02 for every matrix.
/// @throws std::invalid_argument unless stddev > 0 and below 5e37: further out a draw may be infinite
inline initializer gaussian(double stddev) {
  return {initializer::law::normal, detail::deviation("rflow::gaussian", stddev)};
}

/// U(low, high). Ends and width are rounded to float.
/// @throws std::invalid_argument unless low < high and both are within float
inline initializer uniform(double low, double high) {
  constexpr char const* where = "rflow::uniform";
  for (double const end : {low, high})
    if (!(std::abs(end) <= detail::largest_float))
      detail::reject(where, "the end " + std::to_string(end) + " is no finite float");
  return {initializer::law::uniform,
          detail::positive(where, "half of high - low", (high - low) / 2),
          static_cast<float>((low + high) / 2)};
}

/// N(0, stddev²) under the condition low ≤ x ≤ high. The bounds are absolute, as in PyTorch's
/// trunc_normal_, not multiples of stddev; the standard deviation of what is left is smaller.
/// @throws std::invalid_argument unless stddev > 0 and below 5e37, and the bounds leave at least a
///         twentieth; a bound may be infinite
inline initializer truncated_normal(double stddev, double low, double high) {
  constexpr char const* where = "rflow::truncated_normal";
  float const scale = detail::deviation(where, stddev);
  double const left =
      (std::erfc(low / (stddev * relu_gain)) - std::erfc(high / (stddev * relu_gain))) / 2;
  if (!(left >= 0.05))
    detail::reject(where, "[" + std::to_string(low) + ", " + std::to_string(high) + "] leaves " +
                              std::to_string(100 * left) + " % of a normal of stddev " +
                              std::to_string(stddev) + ", less than 5 %");
  auto const end = [](double x) {
    return static_cast<float>(std::clamp(x, -detail::largest_float, detail::largest_float));
  };
  return {initializer::law::truncated_normal, scale, 0, end(low), end(high)};
}

/// Xavier (Glorot) uniform: U(±gain √(6 / (in + out))).
/// @see Glorot, Bengio, AISTATS 2010
inline initializer xavier_uniform(fans const& f, double gain = 1) {
  double const both = detail::fan_of("rflow::xavier_uniform", f, fan_mode::in) +
                      detail::fan_of("rflow::xavier_uniform", f, fan_mode::out);
  double const bound = gain * std::sqrt(6 / both);
  return uniform(-bound, bound);
}

/// Xavier (Glorot) normal: standard deviation gain √(2 / (in + out)).
/// @see Glorot, Bengio, AISTATS 2010
inline initializer xavier_normal(fans const& f, double gain = 1) {
  double const both = detail::fan_of("rflow::xavier_normal", f, fan_mode::in) +
                      detail::fan_of("rflow::xavier_normal", f, fan_mode::out);
  return gaussian(gain * std::sqrt(2 / both));
}

/// Kaiming (He) uniform: U(±gain √(3 / fan)).
/// @see He, Zhang, Ren, Sun, ICCV 2015
inline initializer kaiming_uniform(fans const& f, fan_mode mode = fan_mode::in,
                                   double gain = relu_gain) {
  double const bound = gain * std::sqrt(3 / detail::fan_of("rflow::kaiming_uniform", f, mode));
  return uniform(-bound, bound);
}

/// Kaiming (He) normal: standard deviation gain / √fan.
/// @see He, Zhang, Ren, Sun, ICCV 2015
inline initializer kaiming_normal(fans const& f, fan_mode mode = fan_mode::in,
                                  double gain = relu_gain) {
  return gaussian(gain / std::sqrt(detail::fan_of("rflow::kaiming_normal", f, mode)));
}

/// What PyTorch gives the weights and biases of Linear and of convolutions: U(±1/√in). For a
/// depthwise convolution `in` is its number of taps. Mamba's projections keep it.
inline initializer pytorch_default(double fan_in) {
  return kaiming_uniform({fan_in, fan_in}, fan_mode::in, 1 / std::sqrt(3.0));
}

/// N(0, (stddev/√(k L))²): for the matrices that write into the residual stream of L blocks with k
/// such matrices each. GPT-2 has k = 2 and stddev = 0.02; Mamba divides by √L.
/// @throws std::invalid_argument unless all three are positive
inline initializer depth_scaled_normal(double stddev, std::ptrdiff_t blocks, int per_block = 2) {
  double const writers = static_cast<double>(blocks) * per_block;
  if (!(writers >= 1) || blocks < 1)
    detail::reject("rflow::depth_scaled_normal", std::to_string(blocks) + " blocks with " +
                                                     std::to_string(per_block) + " matrices each");
  return gaussian(stddev / std::sqrt(writers));
}

// ---- where from ---------------------------------------------------------------------------------

/// Where in the sea of random numbers a block lies: its first element is (row, col) of the given
/// matrix. Blocks of one matrix fit together; different matrices, and different seeds, are
/// independent.
struct random_origin {
  std::uint64_t seed = 0;    ///< Philox's key
  std::uint32_t matrix = 0;  ///< which of the seed's matrices
  std::ptrdiff_t row = 0;    ///< below 2³²
  std::ptrdiff_t col = 0;    ///< below 2³⁴
};

/// Philox4x32-10: 128 random bits for each counter and key.
/// @see Salmon, Moraes, Dror, Shaw, SC 2011
constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> const& counter,
                                              std::uint64_t key) {
  std::uint32_t a = counter[0], b = counter[1], c = counter[2], d = counter[3];
  auto k = static_cast<std::uint32_t>(key), l = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    std::uint64_t const p = std::uint64_t{0xD2511F53u} * a, q = std::uint64_t{0xCD9E8D57u} * c;
    a = static_cast<std::uint32_t>(q >> 32) ^ b ^ k;
    b = static_cast<std::uint32_t>(q);
    c = static_cast<std::uint32_t>(p >> 32) ^ d ^ l;
    d = static_cast<std::uint32_t>(p);
    k += 0x9E3779B9u;
    l += 0xBB67AE85u;
  }
  return {a, b, c, d};
}

namespace detail {

// 64 counters at a time, as arrays, so that every loop below is one that compilers vectorise.
inline constexpr int draw_lanes = 64;

struct draw_batch {
  alignas(64) std::uint32_t words[4][draw_lanes];
  alignas(64) float values[4 * draw_lanes];
};

/// The words of counters (group, row, matrix, attempt), which stand in words[0] and words[1].
inline void draw_words(draw_batch& at, std::uint64_t seed, std::uint32_t matrix,
                       std::uint32_t attempt) {
  for (int j = 0; j < draw_lanes; ++j) {
    auto const out = philox({at.words[0][j], at.words[1][j], matrix, attempt}, seed);
    at.words[0][j] = out[0], at.words[1][j] = out[1];
    at.words[2][j] = out[2], at.words[3][j] = out[3];
  }
}

/// Uniform on ±(2²⁴ − 1) of 2⁻²⁴, odd multiples: symmetric, never 0.
inline double centred(std::uint32_t word) {
  std::int32_t const steps = (static_cast<std::int32_t>(word) >> 8) * 2 + 1;
  return static_cast<double>(steps) * 0x1p-24;
}

/// scale · centred is exact in double, so that fused and separate arithmetic round alike.
inline void to_uniform(draw_batch& at, double scale, double centre) {
  for (int j = 0; j < draw_lanes; ++j)
    for (int w = 0; w < 4; ++w)
      at.values[4 * j + w] = static_cast<float>(centre + scale * centred(at.words[w][j]));
}

struct normal_pair {
  double first, second;
};

/// Two independent standard normals of two words, by Box and Muller's transform:
/// √(−2 ln u) (cos θ, sin θ), u = (radius + ½) 2⁻³², θ = 2π angle 2⁻³² − π/4 to the middle of a step.
///
/// Polynomials by Remez' algorithm: ln to 3e-14, sine to 5e-15, cosine to 7e-14, √ to 4e-11
/// relative, a thousandth of half a unit in the last place of the float they are rounded to.
inline normal_pair standard_normals(std::uint32_t radius, std::uint32_t angle) {
  // x = 2³² u = 2^(k − 16) m with m in [√½, √2): then ln m, with s = (m − 1)/(m + 1), is s times a
  // polynomial in s². Near u = 1, where ln u is small, m − 1 is exact.
  double const x =
      static_cast<double>(static_cast<std::int32_t>(radius ^ 0x80000000u)) + 2147483648.5;
  constexpr std::uint64_t origin = 0x3FE6A09E667F3BCDu - (std::uint64_t{16} << 52);
  std::uint64_t const bits = std::bit_cast<std::uint64_t>(x), k = (bits - origin) >> 52;
  double const m = std::bit_cast<double>(bits - (k << 52) + (std::uint64_t{16} << 52));
  double const exponent = std::bit_cast<double>(k | 0x4330000000000000u) - (0x1p52 + 48);
  double const s = (m - 1) / (m + 1), t = s * s;
  double const log_m =
      s * (0x1.fffffffffff10p+0 +
           t * (0x1.5555555672df4p-1 +
                t * (0x1.99999628a5c17p-2 +
                     t * (0x1.249439605398bp-2 +
                          t * (0x1.c6208cddf03f4p-3 + t * 0x1.919812ef9c078p-3)))));
  double const square = -2 * (exponent * 0x1.62e42fefa39efp-1 + log_m);

  // √, by Newton's iteration for its inverse: std::sqrt sets errno, which keeps compilers from
  // vectorising the loop.
  double y =
      std::bit_cast<double>(0x5FE6EB50C7B537A9u - (std::bit_cast<std::uint64_t>(square) >> 1));
  double const half = 0.5 * square;
  y = y * (1.5 - half * y * y);
  y = y * (1.5 - half * y * y);
  y = y * (1.5 - half * y * y);
  double const r = square * y;

  // A quarter turn by the upper two bits, an angle within ±π/4 by the others.
  std::int32_t const steps = static_cast<std::int32_t>((angle & 0x3fffffffu) * 2 + 1) - 0x40000000;
  double const a = static_cast<double>(steps) * 0x1p-30, b = a * a;
  double const sine = r * a *
                      (0x1.921fb54442cf8p-1 +
                       b * (-0x1.4abbce62577b9p-4 +
                            b * (0x1.466bc670fd11ap-9 +
                                 b * (-0x1.32d2c6298a206p-15 +
                                      b * (0x1.5071bed3bfed9p-22 - b * 0x1.dd4e53d505a29p-30)))));
  double const cosine =
      r * (0x1.ffffffffffdb1p-1 +
           b * (-0x1.3bd3cc9bd098ap-2 +
                b * (0x1.03c1f073cd29fp-6 +
                     b * (-0x1.55d3b9724fc1dp-12 +
                          b * (0x1.e1e761272b32ep-19 - b * 0x1.a0d8aa67491f7p-26)))));
  std::uint64_t const quarter = angle >> 30, odd = 0 - (quarter & 1);
  std::uint64_t const c = std::bit_cast<std::uint64_t>(cosine),
                      d = std::bit_cast<std::uint64_t>(sine);
  std::uint64_t const swap = (c ^ d) & odd;
  return {std::bit_cast<double>((c ^ swap) ^ (((quarter + 1) & 2) << 62)),
          std::bit_cast<double>((d ^ swap) ^ ((quarter & 2) << 62))};
}

inline void to_normal(draw_batch& at, double scale) {
  for (int pair = 0; pair < 2; ++pair)
    for (int j = 0; j < draw_lanes; ++j) {
      normal_pair const z = standard_normals(at.words[2 * pair][j], at.words[2 * pair + 1][j]);
      at.values[4 * j + 2 * pair] = static_cast<float>(scale * z.first);
      at.values[4 * j + 2 * pair + 1] = static_cast<float>(scale * z.second);
    }
}

/// Element (row, 4 group + word) of the first attempt that falls between the bounds.
inline float draw_again(initializer const& how, random_origin const& from, std::uint32_t group,
                        std::uint32_t row, int word) {
  for (std::uint32_t attempt = 1;; ++attempt) {
    auto const words = philox({group, row, from.matrix, attempt}, from.seed);
    normal_pair const z = standard_normals(words[word & 2 ? 2 : 0], words[word & 2 ? 3 : 1]);
    auto const value = static_cast<float>(how.scale * (word & 1 ? z.second : z.first));
    if (value >= how.low && value <= how.high) return value;
  }
}

/// No value drawn is larger.
inline double reach(initializer const& how) {
  double const scale = static_cast<double>(how.scale), normal = largest_normal * scale;
  if (how.shape == initializer::law::normal) return normal;
  if (how.shape == initializer::law::uniform)
    return std::abs(static_cast<double>(how.centre)) + scale * (1 - 0x1p-24);
  return (std::min)(normal, static_cast<double>((std::max)(std::abs(how.low), std::abs(how.high))));
}

template <scalar T>
T rounded_to(float x) {
  if constexpr (std::is_floating_point_v<T>)
    return x;
  else
    return T::nearest(x);
}

/// Where drawn values go.
template <scalar T>
struct draw_target {
  T* data;
  std::ptrdiff_t row_stride, col_stride;
};

/// Elements [row, row + rows) × [col, col + cols) of the matrix; out is where its first one goes.
template <scalar T>
void draw_tile(initializer const& how, random_origin const& from, draw_target<T> const& out,
               std::ptrdiff_t rows, std::ptrdiff_t cols) {
  draw_batch at;
  std::ptrdiff_t const first_group = from.col / 4,
                       groups = (from.col + cols - 1) / 4 - first_group + 1;
  std::ptrdiff_t const count = rows * groups;
  for (std::ptrdiff_t done = 0; done < count; done += draw_lanes) {
    std::ptrdiff_t row = done / groups, group = done % groups;
    for (int j = 0; j < draw_lanes; ++j) {  // lanes past the end draw what nobody keeps
      at.words[0][j] = static_cast<std::uint32_t>(first_group + group);
      at.words[1][j] = static_cast<std::uint32_t>(from.row + row);
      if (++group == groups) group = 0, ++row;
    }
    draw_words(at, from.seed, from.matrix, 0);
    if (how.shape == initializer::law::uniform)
      to_uniform(at, how.scale, how.centre);
    else
      to_normal(at, how.scale);

    row = done / groups, group = done % groups;
    for (std::ptrdiff_t lane = 0; lane < (std::min<std::ptrdiff_t>)(draw_lanes, count - done);) {
      // A run of groups of one row.
      std::ptrdiff_t const run =
          (std::min)({groups - group, draw_lanes - lane, count - done - lane});
      std::ptrdiff_t const from_col =
          (first_group + group) * 4 - from.col;  // below 0 in the first group
      std::ptrdiff_t const begin = (std::max<std::ptrdiff_t>)(from_col, 0);
      std::ptrdiff_t const end = (std::min)(from_col + 4 * run, cols);
      float* const values = at.values + 4 * lane;
      if (how.shape == initializer::law::truncated_normal)
        for (std::ptrdiff_t c = begin; c < end; ++c)
          if (!(values[c - from_col] >= how.low && values[c - from_col] <= how.high))
            values[c - from_col] = draw_again(
                how, from, static_cast<std::uint32_t>((from.col + c) / 4),
                static_cast<std::uint32_t>(from.row + row), static_cast<int>((from.col + c) % 4));
      T* const to = out.data + row * out.row_stride;
      if (out.col_stride == 1)
        for (std::ptrdiff_t c = begin; c < end; ++c) to[c] = rounded_to<T>(values[c - from_col]);
      else
        for (std::ptrdiff_t c = begin; c < end; ++c)
          to[c * out.col_stride] = rounded_to<T>(values[c - from_col]);
      lane += run;
      group = 0, ++row;
    }
  }
}

}  // namespace detail

/// Draws a block of a random matrix into memory of the caller.
///
/// @param  how      what is drawn
/// @param  from     seed, matrix, and the block's first row and column in it
/// @param  data     where element (0, 0) of the block goes; double holds the float drawn, f16 and
///                  bf16 the nearest to it
/// @param  rows, cols              extent of the block; nothing is drawn if either is 0
/// @param  row_stride, col_stride  in elements, as in view
/// @param  threads  0: as many as the machine has; values do not depend on it
/// @throws std::invalid_argument if an extent is negative, the block ends beyond row 2³² or column
///         2³⁴, or T is too narrow for what may be drawn
/// @note   one thread neither allocates nor starts threads
template <scalar T>
void draw(initializer const& how, random_origin const& from, T* data, std::ptrdiff_t rows,
          std::ptrdiff_t cols, std::ptrdiff_t row_stride, std::ptrdiff_t col_stride = 1,
          int threads = 0) {
  constexpr std::ptrdiff_t row_limit = std::ptrdiff_t{1} << 32, col_limit = std::ptrdiff_t{1} << 34;
  if (rows < 0 || cols < 0 || from.row < 0 || from.col < 0 || from.row > row_limit - rows ||
      from.col > col_limit - cols)
    detail::reject("rflow::draw", std::to_string(rows) + " x " + std::to_string(cols) + " from (" +
                                      std::to_string(from.row) + ", " + std::to_string(from.col) +
                                      ") is no block of a 2^32 x 2^34 matrix");
  double const reach = detail::reach(how);
  if (!(reach < 0x1.ffffffp127) ||  // rounds to a finite float
      !detail::is_finite(static_cast<float>(detail::rounded_to<T>(static_cast<float>(reach)))))
    detail::reject("rflow::draw", "values of up to " + std::to_string(reach) +
                                      " are beyond the type they are drawn into");
  if (rows == 0 || cols == 0) return;
  if (data == nullptr) detail::reject("rflow::draw", "no memory (null pointer)");

  // Tiles that stay in the first cache, also where columns are contiguous.
  constexpr std::ptrdiff_t tile_rows = 16, tile_cols = 4 * detail::draw_lanes;
  std::ptrdiff_t const high = (rows + tile_rows - 1) / tile_rows,
                       wide = (cols + tile_cols - 1) / tile_cols;
  auto const tile = [&](std::ptrdiff_t i) {
    std::ptrdiff_t const r = i / wide * tile_rows, c = i % wide * tile_cols;
    random_origin here = from;
    here.row += r, here.col += c;
    detail::draw_tile<T>(how, here,
                         {data + r * row_stride + c * col_stride, row_stride, col_stride},
                         (std::min)(tile_rows, rows - r), (std::min)(tile_cols, cols - c));
  };
  std::ptrdiff_t const team_size =
      (std::min<std::ptrdiff_t>)(detail::threads_or_all(threads),
                                 (high * wide + 7) / 8);  // a thread costs as much as a few tiles
  if (team_size <= 1) {
    for (std::ptrdiff_t i = 0; i < high * wide; ++i) tile(i);
  } else {
    detail::team(static_cast<int>(team_size)).run(high * wide, tile);
  }
}

/// The same into anything that is a view of its own memory: an Eigen matrix, map or block, whose
/// extent is the block's.
template <activations X>
requires(!std::is_const_v<X>) void draw(initializer const& how, random_origin const& from, X& out,
                                        int threads = 0) {
  static_assert(std::same_as<memory_of<X>, host_memory>, "rflow: draw writes host memory");
  static_assert(!std::same_as<X, view<scalar_of<X>>>,
                "rflow: a view is read-only: pass its memory to draw");
  auto const to = as_view(std::as_const(out));
  draw(how, from, const_cast<scalar_of<X>*>(to.data), to.rows, to.cols, to.row_stride,
       to.col_stride, threads);
}

}  // namespace rflow
