// SPDX-License-Identifier: Apache-2.0
#pragma once

// x Wᵀ for many rows x against weights that are packed once, on the library's threads and its
// register kernel. Sizes of tasks depend on shapes alone: the result is the same to the last bit
// for any number of threads.

#include <rflow/detail/cpu/memory.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/product.hpp>
#include <rflow/threads.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace models {

using integer = std::ptrdiff_t;
/// Tokens in rows.
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using vector = Eigen::VectorXf;
using row_map = Eigen::Map<matrix const, Eigen::Unaligned, Eigen::OuterStride<>>;
using rflow::detail::team;

namespace detail {

using kernel = rflow::detail::packed_product;
using rflow::detail::aligned_array;
using rflow::detail::ceil_div;
using rflow::detail::round_up;

inline constexpr integer lanes = rflow::detail::lanes_v<float>;
inline constexpr integer strip = kernel::rows<float>;   // outputs in registers
inline constexpr integer column = kernel::cols<float>;  // tokens in registers
inline constexpr integer line = 16;                     // floats
inline constexpr integer depth_block = kernel::depth_lines * line;
inline constexpr integer block_strips = kernel::block_strips;
inline constexpr integer block_tokens = kernel::block_cols;

/// Depth with its padding: the last block, too, is an odd number of cache lines.
constexpr integer padded_depth(integer depth) {
  integer const whole = depth / depth_block * depth_block;
  integer const rest = ceil_div(depth - whole, line);
  return whole + (rest == 0 ? 0 : (rest | 1) * line);
}

/// A buffer that grows and is then used again.
class buffer {
 public:
  float* reserve(integer count) {
    if (count > capacity_) data_ = aligned_array<float>(capacity_ = count);
    return data_.data();
  }
  float* data() { return data_.data(); }
  float const* data() const { return data_.data(); }

 private:
  integer capacity_ = 0;
  aligned_array<float> data_;
};

}  // namespace detail

/// The rows of x packed for products; made once for several weights that see the same x.
class packed_rows {
 public:
  /// @param x  tokens × in
  void pack(team& threads, row_map const& x) {
    using namespace detail;
    rows_ = x.rows();
    depth_ = x.cols();
    integer const padded_rows = round_up(rows_, column), padded = padded_depth(depth_);
    float* const to = buffer_.reserve(padded_rows * padded);
    threads.run(ceil_div(padded_rows, block_tokens), [&](integer block) {
      integer const first = block * block_tokens;
      integer const last = std::min(first + block_tokens, padded_rows);
      for (integer k = 0; k < padded; k += depth_block) {
        integer const depth = std::min(depth_block, padded - k);
        integer const real = std::clamp<integer>(depth_ - k, 0, depth);
        for (integer t = first; t < last; ++t) {
          float* const out = to + k * padded_rows + t * depth;
          integer const present = t < rows_ ? real : 0;
          if (present > 0) std::copy_n(x.data() + t * x.outerStride() + k, present, out);
          std::fill(out + present, out + depth, 0.f);
        }
      }
    });
  }
  integer rows() const { return rows_; }
  integer depth() const { return depth_; }

  /// Tokens from `t` on at depths from `k` on, one token after the other.
  float const* at(integer t, integer k) const {
    using namespace detail;
    integer const depth = std::min(depth_block, padded_depth(depth_) - k);
    return buffer_.data() + k * round_up(rows_, column) + t * depth;
  }

 private:
  integer rows_ = 0, depth_ = 0;
  detail::buffer buffer_;
};

/// Weights of shape out × in, in the kernel's layout.
class packed_weight {
 public:
  void resize(integer out, integer in) {
    out_ = out;
    in_ = in;
    buffer_.reserve(detail::round_up(out, detail::strip) * detail::padded_depth(in));
  }
  integer out() const { return out_; }
  integer in() const { return in_; }

  /// Rows are packed in groups of this many; groups may be packed at the same time.
  static constexpr integer group = detail::strip;

  /// Packs `count` rows from row `first`, a multiple of group; count is group, or what is left.
  void pack(integer first, integer count, float const* rows) {
    using namespace detail;
    integer const padded = padded_depth(in_);
    float* const to = buffer_.data() + first * padded;
    constexpr integer tile = 16;  // depths at a time: whole cache lines of each row
    for (integer k = 0; k < padded; k += tile) {
      integer const real = std::clamp<integer>(in_ - k, 0, tile);
      for (integer r = 0; r < strip; ++r)
        for (integer i = 0; i < tile; ++i)
          to[(k + i) * strip + r] = r < count && i < real ? rows[r * in_ + k + i] : 0.f;
    }
  }
  float const* at(integer row, integer k) const {
    return buffer_.data() + row * detail::padded_depth(in_) + k * detail::strip;
  }

 private:
  integer out_ = 0, in_ = 0;
  detail::buffer buffer_;
};

/// Calls store(token, first output, count, values) with pieces of x Wᵀ, each piece once.
template <class Store>
void multiply(team& threads, packed_rows const& x, packed_weight const& w, Store const& store) {
  using namespace detail;
  integer const padded = padded_depth(w.in()), tokens = x.rows();
  integer const token_blocks = ceil_div(tokens, block_tokens);
  integer const strips = ceil_div(w.out(), strip);
  integer const strip_blocks = ceil_div(strips, block_strips);
  // Blocks of tokens are the faster index: a block of weights serves them all while it is in cache.
  threads.run(strip_blocks * token_blocks, [&](integer task) {
    thread_local aligned_array<float> tiles(block_strips * strip * block_tokens);
    integer const s0 = task / token_blocks * block_strips;
    integer const s1 = std::min(s0 + block_strips, strips);
    integer const t0 = task % token_blocks * block_tokens;
    integer const t1 = std::min(t0 + block_tokens, round_up(tokens, column));
    auto const tile = [&](integer t, integer s) {
      return tiles.data() + ((t - t0) * block_strips + (s - s0) * column) * strip;
    };
    for (integer k = 0; k < padded; k += depth_block) {
      integer const depth = std::min(depth_block, padded - k);
      for (integer t = t0; t < t1; t += column) {
        float const* const tokens_here = x.at(t, k);
        float const* const next = t + column < t1 ? x.at(t + column, k) : tokens_here;
        for (integer s = s0; s < s1; ++s)
          kernel::multiply(w.at(s * strip, k), tokens_here, depth, k > 0, 0, next, tile(t, s));
      }
    }
    for (integer t = t0; t < std::min(t1, tokens); ++t)
      for (integer s = s0; s < s1; ++s)
        store(t, s * strip, std::min(strip, w.out() - s * strip),
              tile(t / column * column, s) + t % column * strip);
  });
}

/// A linear layer: weights and perhaps a bias.
struct linear {
  packed_weight weight;
  vector bias;  // out, or empty

  /// y ← x Wᵀ + b, or y ← y + x Wᵀ + b
  void operator()(team& threads, packed_rows const& x, Eigen::Ref<matrix> y,
                  bool add = false) const {
    float const* const b = bias.size() > 0 ? bias.data() : nullptr;
    multiply(threads, x, weight, [&](integer t, integer first, integer count, float const* value) {
      float* const out = y.data() + t * y.outerStride() + first;
      using piece = Eigen::Map<Eigen::ArrayXf>;
      using values = Eigen::Map<Eigen::ArrayXf const>;
      piece to(out, count);
      if (add)
        to += values(value, count);
      else
        to = values(value, count);
      if (b != nullptr) to += values(b + first, count);
    });
  }
};

}  // namespace models
