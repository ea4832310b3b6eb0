// SPDX-License-Identifier: Apache-2.0
#pragma once

// The preparation of a site on a device: its means, the norms of its rows, its panels.

#include <cuda_runtime.h>

#include <rflow/detail/cuda/source.cuh>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

/// Column sums of x · pre over slices of tokens. An item is a column a lane over one slice.
template <class T, class C>
struct sum_columns {
  token_rows<T> x;
  integer tokens, slice;
  double pre;
  double* sums;     // slices × cols
  double* largest;  // slices × chunks: largest finite |x|

  template <class Group>
  __host__ __device__ void operator()(integer item, Group g) const {
    integer const chunks = ceil_div(x.cols, integer{Group::size});
    integer const s = item / chunks, j = item % chunks * Group::size + g.lane();
    integer const last = smaller(tokens, (s + 1) * slice);
    bool const counts = j < x.cols;
    double sum = 0;
    C most = 0;
    for (integer t = s * slice; counts && t < last; t += Group::tokens) {
      C here[Group::tokens];  // read before the first is used
      for (int u = 0; u < Group::tokens; ++u)
        here[u] = t + u < last ? static_cast<C>(x.row(t + u)[j * x.col_stride]) : C(0);
      for (int u = 0; u < Group::tokens; ++u) {
        C const size = here[u] < 0 ? -here[u] : here[u];
        most = most < size ? size : most;
        sum += pre * static_cast<double>(here[u]);
      }
    }
    if (counts) sums[s * x.cols + j] = sum;
    double const all = g.max(static_cast<double>(most));
    if (g.lane() == 0) largest[item] = all;
  }
};

/// What is known of a block of columns after sum_columns.
struct column_facts {
  double largest;
  bool finite;
};

/// Adds the sums over slices to those of the whole site. An item is a column a lane.
struct fold_columns {
  integer cols, slices, chunks;
  double const *sums, *largest;
  double* total;        // cols
  column_facts* facts;  // chunks

  template <class Group>
  __host__ __device__ void operator()(integer chunk, Group g) const {
    double bad = 0, most = facts[chunk].largest;
    integer const j = chunk * Group::size + g.lane();
    if (j < cols) {
      double sum = total[j];
      for (integer s = 0; s < slices; ++s) sum += sums[s * cols + j];
      if (!is_finite(sum)) bad = 1;
      total[j] = sum;
    }
    for (integer s = g.lane(); s < slices; s += Group::size)
      most = most < largest[s * chunks + chunk] ? largest[s * chunks + chunk] : most;
    bad = g.max(bad);
    most = g.max(most);
    if (g.lane() == 0) facts[chunk] = {most, bad == 0 && facts[chunk].finite};
  }
};

/// First feature of every token that is NaN or infinite, −1 if there is none.
template <class T>
struct find_bad {
  token_rows<T> x;
  integer* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    T const* const row = x.row(t);
    double first = 0;  // counted from the end
    for (integer j = g.lane(); j < x.cols && first == 0; j += Group::size)
      if (!is_finite(static_cast<double>(row[j * x.col_stride])))
        first = static_cast<double>(x.cols - j);
    first = g.max(first);
    if (g.lane() == 0) out[t] = first > 0 ? x.cols - static_cast<integer>(first) : -1;
  }
};

/// Centred, scaled values: (x · scale + minus_high) + minus_low. The mean is in two parts, so that
/// subtracting it is as exact as C allows; the scale is a power of two.
template <class C>
struct centring {
  C scale;
  C const *minus_high, *minus_low;

  __host__ __device__ C operator()(C x, integer j) const {
    return (x * scale + minus_high[j]) + minus_low[j];
  }
};

template <class C>
struct set_means {
  double const* total;
  double factor;  // from a column's sum to its scaled mean
  C *minus_high, *minus_low;

  __host__ __device__ void operator()(integer j) const {
    double const mean = total[j] * factor;
    C const high = static_cast<C>(-mean);
    minus_high[j] = high;
    minus_low[j] = static_cast<C>(-mean - static_cast<double>(high));
  }
};

/// Moves centres by `factor` times sums of centred values.
template <class C>
struct move_centres {
  double const* total;
  double factor;
  C *minus_high, *minus_low;

  __host__ __device__ void operator()(integer j) const {
    double const high = static_cast<double>(minus_high[j]);
    double const low = static_cast<double>(minus_low[j]) - total[j] * factor;
    C const moved = static_cast<C>(high + low);
    minus_high[j] = moved;
    minus_low[j] = static_cast<C>((high - static_cast<double>(moved)) + low);
  }
};

template <class C>
struct scale_centres {
  C factor;
  C *minus_high, *minus_low;

  __host__ __device__ void operator()(integer j) const {
    minus_high[j] *= factor;
    minus_low[j] *= factor;
  }
};

/// Column sums of centred values over slices of tokens, of those whose norms are at most `limit`. An item
/// is a column a lane over one slice.
template <class T, class C>
struct sum_centred {
  token_rows<T> x;
  integer tokens, slice;
  centring<C> centre;
  double const* norms;
  double limit;
  double* sums;  // slices × cols

  template <class Group>
  __host__ __device__ void operator()(integer item, Group g) const {
    integer const chunks = ceil_div(x.cols, integer{Group::size});
    integer const s = item / chunks, j = item % chunks * Group::size + g.lane();
    integer const last = smaller(tokens, (s + 1) * slice);
    double sum = 0;
    for (integer t = s * slice; j < x.cols && t < last; ++t)
      if (norms[t] <= limit)
        sum += static_cast<double>(centre(static_cast<C>(x.row(t)[j * x.col_stride]), j));
    if (j < x.cols) sums[s * x.cols + j] = sum;
  }
};

/// Adds sums over slices to those of all.
struct fold_sums {
  integer cols, slices;
  double const* sums;
  double* total;

  __host__ __device__ void operator()(integer j) const {
    for (integer s = 0; s < slices; ++s) total[j] += sums[s * cols + j];
  }
};

/// Σ_{j≠i} ⟨x_i, x_j⟩ of centred rows, from their sum. An item is a token.
template <class T, class C>
struct centred_row_sums {
  token_rows<T> x;
  centring<C> centre;
  double const* total;
  double* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    T const* const row = x.row(t);
    double sum = 0;
    for (integer j = g.lane(); j < x.cols; j += Group::size) {
      double const value = static_cast<double>(centre(static_cast<C>(row[j * x.col_stride]), j));
      sum += value * (total[j] - value);
    }
    sum = g.sum(sum);
    if (g.lane() == 0) out[t] = sum;
  }
};

/// ‖·‖² of centred rows: in C over a few terms, in double beyond. An item is a token.
template <class T, class C>
struct centred_norms {
  token_rows<T> x;
  centring<C> centre;
  double* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    constexpr integer block = Group::size * Group::held;
    double sum = 0;
    for (integer from = 0; from < x.cols; from += block) {
      C here[Group::held];
      load(x, x.row(t), from, g, here);
      C part = 0;
      for (integer k = 0; k < Group::held; ++k) {
        C const value = centre(here[k], from + k * Group::size + g.lane());
        part += value * value;
      }
      sum += static_cast<double>(part);
    }
    sum = g.sum(sum);
    if (g.lane() == 0) out[t] = sum;
  }
};

/// Features first … first + depth − 1 of some tokens, centred, row after row. What there is not is
/// zero. An item is a token.
template <class T, class C>
struct fill_panel {
  token_rows<T> x;
  integer tokens, first, depth;
  centring<C> centre;
  C* out;

  template <class Group>
  __host__ __device__ void operator()(integer t, Group g) const {
    C* const to = out + t * depth;
    integer const here = t < tokens ? smaller(depth, x.cols - first) : 0;
    T const* const row = x.row(t < tokens ? t : 0) + first * x.col_stride;
    if (x.col_stride == 1)
      for (integer k = g.lane(); k < here; k += Group::size)
        to[k] = centre(static_cast<C>(row[k]), first + k);
    else
      for (integer k = g.lane(); k < here; k += Group::size)
        to[k] = centre(static_cast<C>(row[k * x.col_stride]), first + k);
    for (integer k = here + g.lane(); k < depth; k += Group::size) to[k] = C(0);
  }
};

}  // namespace rflow::detail::passes
