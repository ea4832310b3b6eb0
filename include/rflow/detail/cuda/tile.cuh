// SPDX-License-Identifier: Apache-2.0
#pragma once

// A tile of a kernel matrix on a device: its entries, their sums.

#include <cuda_runtime.h>

#include <rflow/detail/cuda/memory.cuh>

namespace rflow::detail::passes {

/// A square of tokens: rows row …, columns col …; row ≥ col. Entry (i, j) of its buffer is at
/// j · side + i: column-major, as BLAS has it.
struct tile {
  integer row, rows, col, cols, side;

  __host__ __device__ bool diagonal() const { return row == col; }
};

inline constexpr integer tile_columns = 64;  // columns of one item of finish_tile

/// Turns inner products into G, zeroes what is not below the diagonal, and leaves sums over parts of
/// rows and columns. An item is a strip of rows, one a lane, over some columns.
template <class Entry, class C>
struct finish_tile {
  tile at;
  Entry entry;
  C const *ti, *tj;  // the numbers of the tile's row and column tokens
  C const *ri, *rj;  // and what was removed for them
  C* g;
  double *row_parts, *col_parts;  // column blocks × side; strips × side: squares, then plain sums

  template <class Group>
  __host__ __device__ void operator()(integer item, Group group) const {
    integer const strips = ceil_div(at.side, integer{Group::size});
    integer const blocks = ceil_div(at.side, tile_columns);
    integer const s = item % strips, b = item / strips;
    integer const i = s * Group::size + group.lane(), first = b * tile_columns;
    bool const held = i < at.side;
    C square = 0, sum = 0;
    for (integer j = first; j < smaller(at.side, first + tile_columns); ++j) {
      C* const here = g + j * at.side + i;
      bool const counts = i < at.rows && j < at.cols && (!at.diagonal() || i > j);
      C const removed = counts ? ri[i] + rj[j] : C(0);
      C const value = counts ? entry(*here, ti[i], tj[j], removed) : C(0);
      if (held) *here = value;
      C const of_kernel = (value + removed) * (value + removed);
      square += of_kernel;
      C const col_square = group.sum(of_kernel);
      if (group.lane() == 0) col_parts[s * at.side + j] = static_cast<double>(col_square);
      if constexpr (Entry::row_sums) {
        sum += value;
        C const col_sum = group.sum(value);
        if (group.lane() == 0) col_parts[(strips + s) * at.side + j] = static_cast<double>(col_sum);
      }
    }
    if (!held) return;
    row_parts[b * at.side + i] = static_cast<double>(square);
    if constexpr (Entry::row_sums) row_parts[(blocks + b) * at.side + i] = static_cast<double>(sum);
  }
};

/// Adds the parts that finish_tile left to the sums of each token. An item is a token of the tile,
/// first as a row, then as a column.
template <bool RowSums>
struct fold_tile {
  tile at;
  integer strips, blocks;
  double const *row_parts, *col_parts;
  double *squares, *row_sums;  // of all tokens

  __host__ __device__ void operator()(integer k) const {
    add(k, at.rows, at.row, blocks, row_parts);
    add(k, at.cols, at.col, strips, col_parts);
  }

 private:
  __host__ __device__ void add(integer k, integer count, integer first, integer parts,
                               double const* from) const {
    if (k >= count) return;
    double square = 0, sum = 0;
    for (integer p = 0; p < parts; ++p) {
      square += from[p * at.side + k];
      if constexpr (RowSums) sum += from[(parts + p) * at.side + k];
    }
    squares[first + k] += square;
    if constexpr (RowSums) row_sums[first + k] += sum;
  }
};

/// Adds the products of slices to those of all pairs of sites.
template <class C>
struct fold_pairs {
  C const* slices;
  integer count, pairs;
  double* out;

  __host__ __device__ void operator()(integer k) const {
    double sum = 0;
    for (integer s = 0; s < count; ++s) sum += static_cast<double>(slices[s * pairs + k]);
    out[k] += sum;
  }
};

}  // namespace rflow::detail::passes
