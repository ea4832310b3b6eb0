// SPDX-License-Identifier: Apache-2.0
#pragma once

// Gram moments of many layers on the CPU: the kernel matrix of every site is formed once, tile by
// tile, and all pairs of sites are multiplied from those tiles. Not a public interface: on_cpu in
// eigen.hpp and on_blas in blas.hpp call it.
//
//     for each site                           column means, norms of the centred rows, a scale
//     for each macro tile (I, J), I ≥ J       a square of tokens, as large as memory allows
//       for each site p
//         for each range of features          shared panels: centred, widened, packed
//           for each block of the tile        one task: 192 × 256 inner products, kept in L2
//             for each depth block, column strip, row strip
//               micro-kernel                  48 × 8 inner products in registers (AVX-512 floats)
//               at the last depth             G = kernel(inner product), sums per token
//       products += 2 · (tile buffer, S rows) · (the same)ᵀ
//
// Only entries below the diagonal are formed; the rest of a tile on the diagonal is exactly zero.
// Every sum has its own place and is added up in a fixed order, and sizes depend on the shape and
// the memory bound alone: the result is the same to the last bit for any number of threads.
//
// Two costs that are easy to miss shape the code. Panels are written past the caches: storing to a
// line that another core has read is ten times slower where cores do not share a cache. And the
// columns of a panel are an odd number of cache lines apart, or L1 could not hold a strip of them.

#include <Eigen/Core>
#include <unsupported/Eigen/FFT>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <rflow/moments.hpp>
#include <rflow/numerics.hpp>
#include <rflow/statistics.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

using integer = std::ptrdiff_t;

constexpr integer ceil_div(integer a, integer b) { return (a + b - 1) / b; }
constexpr integer round_up(integer a, integer b) { return ceil_div(a, b) * b; }

/// Memory aligned to cache lines, left as it comes.
template <class T>
class aligned_array {
  static_assert(std::is_trivial_v<T>);

 public:
  aligned_array() = default;
  explicit aligned_array(integer count)
      : data_(static_cast<T*>(::operator new(bytes(count), alignment)), release) {}
  aligned_array(integer count, T value) : aligned_array(count) {
    std::fill_n(data_.get(), count, value);
  }
  T* data() { return data_.get(); }
  T const* data() const { return data_.get(); }
  T& operator[](integer i) { return data_.get()[i]; }
  T const& operator[](integer i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t alignment{128};
  static std::size_t bytes(integer count) { return static_cast<std::size_t>(count) * sizeof(T); }
  static void release(T* p) { ::operator delete(p, alignment); }

  std::unique_ptr<T, void (*)(T*)> data_{nullptr, release};
};

// ---- what a caller may choose -------------------------------------------------------------------

struct gram_options {
  crew workers{};
  std::size_t memory_bound = std::size_t{256} << 20;  ///< bytes beyond input and result
  gram_path path = gram_path::automatic;
  bool significance = false;  ///< what p-values over shuffled tokens need, too
  work_share share{};
  bool shifts = false;  ///< what p-values over shifted tokens need, too; and the other ones
};

/// Multiply-adds of the two paths.
struct gram_cost {
  double gram, feature;
};

/// @param widths  d of each site
inline gram_cost count_operations(integer tokens, std::vector<integer> const& widths) {
  double const n = static_cast<double>(tokens), sites = static_cast<double>(widths.size());
  double total = 0;
  for (integer const d : widths) total += static_cast<double>(d);
  return {n * n / 2 * (total + sites * (sites + 1) / 2), total * total / 2 * n};
}

// ---- where the numbers come from ----------------------------------------------------------------

/// A site of any type and layout: copies a block of it, widened to C, into rows ld apart.
template <class C>
struct panel_source {
  void const* self = nullptr;
  void (*load)(void const* self, integer row, integer rows, integer col, integer cols, C* to,
               integer ld) = nullptr;
  integer cols = 0;

  void operator()(integer row, integer rows, integer col, integer count, C* to, integer ld) const {
    load(self, row, rows, col, count, to, ld);
  }
};

/// A view, seen through a list of selected rows if there is one.
template <class T>
struct site_rows {
  view<T> x;
  integer const* selected = nullptr;

  T const* row(integer i) const { return x.data + (selected ? selected[i] : i) * x.row_stride; }
};

/// Widens a contiguous row. Fixed trip counts vectorise at -O2 as well.
template <class C, class T>
void widen(T const* from, integer count, C* to) {
  if constexpr (std::is_same_v<C, T>) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
  } else {
    integer i = 0;
    for (; i + 32 <= count; i += 32)
      for (integer k = 0; k < 32; ++k) to[i + k] = static_cast<C>(static_cast<float>(from[i + k]));
    for (; i < count; ++i) to[i] = static_cast<C>(static_cast<float>(from[i]));
  }
}
inline void widen(double const* from, integer count, float* to) {
  for (integer i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

/// The panel_source of a site; `site` must outlive it.
template <class C, class T>
panel_source<C> source_of(site_rows<T> const& site) {
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& s = *static_cast<site_rows<T> const*>(self);
    integer const step = s.x.col_stride;
    if (step == 1) {
      for (integer i = row; i < row + rows; ++i) {
        widen(s.row(i) + col, cols, to + (i - row) * ld);
        if (s.selected || i + rows >= s.x.rows) continue;
        T const* const next = s.row(i + rows) + col;  // most likely wanted next: into L2
        for (integer k = 0; k < cols; k += integer{64 / sizeof(T)})
          __builtin_prefetch(next + k, 0, 2);
      }
    } else if (!s.selected && std::abs(step) > std::abs(s.x.row_stride)) {
      for (integer k = 0; k < cols; ++k)  // column-major: walk along its columns
        for (integer i = 0; i < rows; ++i) to[i * ld + k] = static_cast<C>(s.x(row + i, col + k));
    } else {
      for (integer i = 0; i < rows; ++i)
        for (integer k = 0; k < cols; ++k)
          to[i * ld + k] = static_cast<C>(s.row(row + i)[(col + k) * step]);
    }
  };
  return {&site, load, site.x.cols};
}

// ---- the micro-kernel ---------------------------------------------------------------------------

template <class C>
using packet_t = typename Eigen::internal::packet_traits<C>::type;

template <class C>
inline constexpr integer lanes_v = Eigen::internal::packet_traits<C>::size;

/// f(0), …, f(Count − 1) written out, so that arrays indexed by them stay in registers at any -O.
template <integer Count, class F>
EIGEN_ALWAYS_INLINE void unrolled(F const& f) {
  [&]<integer... Each>(std::integer_sequence<integer, Each...>) __attribute__((always_inline)) {
    (f(Each), ...);
  }
  (std::make_integer_sequence<integer, Count>{});
}

/// Inner products of a strip of rows with a strip of columns, in registers.
///
/// Rows are packed side by side, depth by depth, and loaded as packets. Columns lie one after the
/// other and are read value by value: broadcasting costs nothing, so they need no interleaving.
///
/// A template over what machines differ in, so that the tile of each can be tested on any of them.
/// @tparam Packet     the vector type of a scalar type
/// @tparam Registers  how many of them fit the machine's registers
template <template <class> class Packet, integer Registers>
struct register_product {
  static constexpr bool many_registers = Registers >= 32;

  static constexpr bool wide(std::size_t bytes) { return bytes > 16; }

  /// Row packets × columns of the register tile: 3 × 8 accumulators where there are 32 registers,
  /// 3 × 4 of 16; with packets of 16 bytes 4 × 4 and 2 × 4. Whole column strips fit a row strip.
  template <class C>
  static constexpr integer packets = wide(sizeof(Packet<C>)) ? 3
                                     : many_registers        ? 4
                                                             : 2;
  template <class C>
  static constexpr integer lanes = Eigen::internal::unpacket_traits<Packet<C>>::size;
  template <class C>
  static constexpr integer rows = packets<C>* lanes<C>;
  template <class C>
  static constexpr integer cols = std::gcd(rows<C>,
                                           many_registers&& wide(sizeof(Packet<C>)) ? 8 : 4);

  /// Depth of a block in cache lines: a column strip of it stays in L1, a few row strips in L2.
  /// Odd, for columns that are a power of two apart fight for the same few sets of L1.
  static constexpr integer depth_lines = 33;
  /// Row strips and columns of one task.
  static constexpr integer block_strips = 4, block_cols = 256;

  /// out = (accumulate ? out : 0) + rows · colsᵀ, a column after the other, without the first
  /// `above` rows: those are not needed. `next`, the columns of the call to come, is prefetched.
  template <class C>
  static void multiply(C const* a, C const* b, integer depth, bool accumulate, integer above,
                       C const* next, C* out) {
    skip<0>(a, b, depth, accumulate, above, next, out);
  }

 private:
  /// Leaves out the packets that are wholly among the first `above` rows, First of them at least and
  /// all but one at most: a case for each number of packets, however many there are.
  template <integer First, class C>
  EIGEN_ALWAYS_INLINE static void skip(C const* a, C const* b, integer depth, bool accumulate,
                                       integer above, C const* next, C* out) {
    if constexpr (First + 1 < packets<C>)
      if (above >= (First + 1) * lanes<C>)
        return skip<First + 1>(a, b, depth, accumulate, above, next, out);
    strip<First>(a, b, depth, accumulate, next, out);
  }

  /// Without the first First packets of rows.
  template <integer First, class C>
  static void strip(C const* a, C const* b, integer depth, bool accumulate, C const* next, C* out) {
    using namespace Eigen::internal;
    using P = Packet<C>;
    constexpr integer N = cols<C>, W = lanes<C>, all = packets<C>, R = all - First;
    if (!accumulate)
      unrolled<N>([&](integer j) __attribute__((always_inline)) {
        unrolled<First>([&](integer r) __attribute__((always_inline)) {
          pstore(out + (j * all + r) * W, pset1<P>(C(0)));
        });
      });
    a += First * W;
    out += First * W;
    P sum[R * N];
    unrolled<N>([&](integer j) __attribute__((always_inline)) {
      unrolled<R>([&](integer r) __attribute__((always_inline)) {
        sum[j * R + r] = pset1<P>(C(0));
        prefetch(out + (j * all + r) * W);
      });
    });
    for (integer k = 0; k < depth; ++k, a += all * W) {
      P x[R];
      prefetch(next + k * N);
      unrolled<R>([&](integer r) __attribute__((always_inline)) {
        x[r] = pload<P>(a + r * W);
        prefetch(a + (32 * all + r) * W);
      });
      unrolled<N>([&](integer j) __attribute__((always_inline)) {
        P const y = pset1<P>(b[j * depth + k]);
        unrolled<R>([&](integer r) __attribute__((always_inline)) {
          sum[j * R + r] = pmadd(x[r], y, sum[j * R + r]);
        });
      });
    }
    unrolled<N>([&](integer j) __attribute__((always_inline)) {
      unrolled<R>([&](integer r) __attribute__((always_inline)) {
        C* const o = out + (j * all + r) * W;
        pstore(o, accumulate ? padd(pload<P>(o), sum[j * R + r]) : sum[j * R + r]);
      });
    });
  }
};

/// The product for this machine.
using packed_product = register_product<packet_t, EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS>;

// ---- preparation: means, norms, scale -----------------------------------------------------------

/// A site, ready for its tiles. Centred, scaled values are (x·scale + minus_high) + minus_low: the
/// centre in two parts, so that subtracting it is as exact as C allows. The scale is a power of two
/// that brings the largest norm to about 1, so that nothing over- or underflows later on.
template <class C>
struct prepared_site {
  panel_source<C> source;
  C scale = 1;                  // 0 if the site is constant
  aligned_array<C> minus_high;  // d, padded with zeros to whole packets
  aligned_array<C> minus_low;
  double trace = 0, furthest = 0;  // Σ a_i and the largest
  std::vector<double> norms;       // n: a_i = ‖x_i − centre‖² · scale²
  std::vector<double> row_sums;  // n: Σ_{j≠i} ⟨x_i − c, x_j − c⟩ · scale²; empty about the mean
  position non_finite;
  bool unclear = false;  // constant as far as means in C tell; double may tell more

  /// Kernel values of scaled data times 2^exponent() are those of the data.
  int exponent() const { return scale > 0 ? -2 * std::ilogb(static_cast<double>(scale)) : 0; }
  /// The scale, or 1 of a site that has none.
  double some_scale() const { return scale > 0 ? static_cast<double>(scale) : 1; }

  /// ‖x_i − x_j‖² · scale² from the values themselves: exact where two tokens are close to each
  /// other and far from the centre.
  double distance(integer i, integer j) const {
    constexpr integer chunk = 256;
    C x[chunk], y[chunk];
    double sum = 0;
    for (integer k = 0; k < source.cols; k += chunk) {
      integer const cols = (std::min)(chunk, source.cols - k);
      source(i, 1, k, cols, x, chunk);
      source(j, 1, k, cols, y, chunk);
      for (integer c = 0; c < cols; ++c) {
        double const s = static_cast<double>(scale);
        double const apart = static_cast<double>(x[c]) * s - static_cast<double>(y[c]) * s;
        sum += apart * apart;
      }
    }
    return sum;
  }

  /// Centred, scaled values of a block of rows, filled up with zeros to whole packets of columns.
  void fetch(integer row, integer rows, integer col, integer cols, C* to, integer ld) const {
    using namespace Eigen::internal;
    using P = packet_t<C>;
    source(row, rows, col, cols, to, ld);
    integer const padded = round_up(cols, lanes_v<C>);
    P const s = pset1<P>(scale);
    for (integer i = 0; i < rows; ++i) {
      C* const x = to + i * ld;
      for (integer k = cols; k < padded; ++k) x[k] = C(0);
      for (integer k = 0; k < padded; k += lanes_v<C>) {
        P const high = ploadu<P>(minus_high.data() + col + k);
        P const low = ploadu<P>(minus_low.data() + col + k);
        pstoreu(x + k, padd(pmadd(ploadu<P>(x + k), s, high), low));
      }
    }
  }
};

template <class C>
void load_zeros(void const*, integer, integer rows, integer, integer cols, C* to, integer ld) {
  for (integer i = 0; i < rows; ++i) std::fill_n(to + i * ld, cols, C(0));
}

/// Columns that are summed together: more than a compiler unrolls, so that it vectorises instead, and a
/// fixed number, so that it does at -O2.
inline constexpr integer sum_step = 32;

/// Adds four rows, `ld` apart, times 2^exponent to sums in double; `count` is a multiple of sum_step. An
/// exponent is for doubles whose sum is too large: applied by a function call, which -ffast-math
/// cannot put behind the sum.
template <class C>
void add_rows(C const* x, integer ld, integer count, int exponent, double* sums) {
  auto const add = [&](auto const& widen) {
    for (integer k = 0; k < count; k += sum_step) {
      double four[sum_step];  // sums may lie where a compiler thinks x does
      for (integer m = 0; m < sum_step; ++m) {
        C const* const at = x + k + m;
        four[m] = (widen(at[0]) + widen(at[ld])) + (widen(at[2 * ld]) + widen(at[3 * ld]));
      }
      for (integer m = 0; m < sum_step; ++m) sums[k + m] += four[m];
    }
  };
  if (exponent == 0)
    add([](C value) { return static_cast<double>(value); });
  else
    add([&](C value) { return std::ldexp(static_cast<double>(value), exponent); });
}

/// The largest |x|, lane by lane.
template <class P, class C>
P largest_of(C const* x, integer count, P largest) {
  using namespace Eigen::internal;
  for (integer k = 0; k < count; k += lanes_v<C>) largest = pmax(largest, pabs(ploadu<P>(x + k)));
  return largest;
}

/// sums = the column sums of x · 2^exponent over a slice of rows; returns the largest |x|. There is room for
/// a few sums more than columns.
template <class C>
double add_columns(panel_source<C> const& x, integer row, integer rows, int exponent,
                   double* sums) {
  constexpr integer chunk = 1024;
  alignas(128) C raw[4 * chunk];
  auto largest = Eigen::internal::pset1<packet_t<C>>(C(0));
  std::fill_n(sums, round_up(x.cols, sum_step), 0.);
  for (integer i = row; i < row + rows; i += 4) {
    integer const count = (std::min<integer>)(4, row + rows - i);
    if (count < 4 || i == row) std::fill_n(raw, 4 * chunk, C(0));
    for (integer k = 0; k < x.cols; k += chunk) {
      integer const cols = (std::min)(chunk, x.cols - k), padded = round_up(cols, sum_step);
      x(i, count, k, cols, raw, chunk);
      for (integer r = 0; r < 4; ++r)
        std::fill(raw + r * chunk + cols, raw + r * chunk + padded, C(0));
      add_rows(raw, chunk, padded, exponent, sums + k);
      for (integer r = 0; r < 4; ++r) largest = largest_of(raw + r * chunk, padded, largest);
    }
  }
  return static_cast<double>(Eigen::internal::predux_max(largest));
}

/// ‖·‖² of the rows of a block: packets in C over a few terms, double beyond.
template <class C>
void add_norms(C const* x, integer rows, integer cols, integer ld, double* norms) {
  using namespace Eigen::internal;
  using P = packet_t<C>;
  constexpr integer W = lanes_v<C>;
  for (integer i = 0; i < rows; ++i, x += ld) {
    double wide[W] = {};
    alignas(128) C narrow[W];
    for (integer k = 0; k < cols; k += 8 * W) {
      P sum = pset1<P>(C(0));
      for (integer m = k; m < (std::min)(cols, k + 8 * W); m += W) {
        P const y = ploadu<P>(x + m);
        sum = pmadd(y, y, sum);
      }
      pstore(narrow, sum);
      for (integer w = 0; w < W; ++w) wide[w] += static_cast<double>(narrow[w]);
    }
    for (double const w : wide) norms[i] += w;
  }
}

/// The first NaN or infinity of a site, if there is one.
template <class C>
position find_non_finite(panel_source<C> const& x, integer tokens) {
  constexpr integer chunk = 512;
  C raw[chunk];
  for (integer i = 0; i < tokens; ++i)
    for (integer k0 = 0; k0 < x.cols; k0 += chunk) {
      integer const cols = (std::min)(chunk, x.cols - k0);
      x(i, 1, k0, cols, raw, chunk);
      for (integer k = 0; k < cols; ++k)
        if (!is_finite(raw[k])) return {i, k0 + k};
    }
  return {};
}

/// Column means of x · 2^exponent (false if one is not finite) and the largest |x|.
template <class C>
bool find_means(team& threads, panel_source<C> const& x, integer tokens, int exponent,
                std::vector<double>& means, double& largest) {
  integer const slice = (std::max<integer>)(16, round_up(ceil_div(tokens, 32), 4));
  integer const slices = ceil_div(tokens, slice), d = x.cols, ld = round_up(d, sum_step);
  aligned_array<double> sums(slices * ld), most(slices);
  threads.run(slices, [&](integer s) {
    integer const row = s * slice;
    most[s] = add_columns(x, row, (std::min)(slice, tokens - row), exponent, sums.data() + s * ld);
  });
  means.assign(static_cast<std::size_t>(d), 0.);
  for (integer s = 0; s < slices; ++s)
    for (integer k = 0; k < d; ++k) means.data()[k] += sums[s * ld + k];
  bool finite = true;
  for (double& mean : means) {
    finite = finite && is_finite(mean);
    mean /= static_cast<double>(tokens);
  }
  largest = *std::max_element(most.data(), most.data() + slices);
  return finite;
}

/// 2^e with e kept where C has normal numbers to spare.
template <class C>
double power_of_two(int e) {
  constexpr int limit = std::numeric_limits<C>::max_exponent - 8;
  return std::ldexp(1., std::clamp(e, -limit, limit));
}

/// x times a power of two, in this order even with -ffast-math: x may be the largest of numbers.
inline double scaled(double x, double power) { return std::ldexp(x, std::ilogb(power)); }

/// Calls f(row, rows, col, cols, x, ld) with blocks of the centred values of a site, a task a group of
/// rows; columns are filled up to whole packets.
template <class C, class F>
void each_block(team& threads, prepared_site<C> const& site, integer tokens, F const& f) {
  constexpr integer group = 16, rows_at_once = 4, chunk = 1024;
  threads.run(ceil_div(tokens, group), [&](integer g) {
    alignas(128) C x[rows_at_once * chunk];
    integer const end = (std::min)((g + 1) * group, tokens), d = site.source.cols;
    for (integer row = g * group; row < end; row += rows_at_once)
      for (integer k = 0; k < d; k += chunk) {
        integer const rows = (std::min)(rows_at_once, end - row), cols = (std::min)(chunk, d - k);
        site.fetch(row, rows, k, cols, x, chunk);
        f(row, rows, k, round_up(cols, lanes_v<C>), x, chunk);
      }
  });
}

/// The centred values of a site, which must outlive it.
template <class C>
panel_source<C> centred_source(prepared_site<C> const& site) {
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& of = *static_cast<prepared_site<C> const*>(self);
    constexpr integer chunk = 1024;
    alignas(128) C x[chunk + lanes_v<C>];  // fetch() fills up whole packets
    for (integer i = 0; i < rows; ++i)
      for (integer k = 0; k < cols; k += chunk) {
        integer const count = (std::min)(chunk, cols - k);
        of.fetch(row + i, 1, col + k, count, x, chunk);
        std::copy_n(x, count, to + i * ld + k);
      }
  };
  return {&site, load, site.source.cols};
}

/// high + low += x, as if exact. With -ffast-math low stays 0.
/// @see Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B
inline void add_in_two(double x, double& high, double& low) {
  double const sum = high + x, part = sum - high;
  low += (high - (sum - part)) + (x - part);
  high = sum;
}

/// Moves the centre of a site from the mean to the mean of the tokens whose norms are at most `limit`.
template <class C>
void centre_among(team& threads, prepared_site<C>& site, integer tokens, double limit) {
  struct part {  // the closer tokens alone, centred at the mean so far
    prepared_site<C> const* site;
    std::vector<integer> closer;
  };
  part const from{&site, [&] {
                    std::vector<integer> closer;
                    for (integer i = 0; i < tokens; ++i)
                      if (site.norms.data()[i] <= limit) closer.push_back(i);
                    return closer;
                  }()};
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& p = *static_cast<part const*>(self);
    constexpr integer chunk = 1024;
    alignas(128) C x[chunk + lanes_v<C>];  // fetch() fills up whole packets
    for (integer i = 0; i < rows; ++i)
      for (integer k = 0; k < cols; k += chunk) {
        integer const count = (std::min)(chunk, cols - k);
        p.site->fetch(p.closer.data()[row + i], 1, col + k, count, x, chunk);
        std::copy_n(x, count, to + i * ld + k);
      }
  };
  integer const d = site.source.cols, closer = static_cast<integer>(from.closer.size());
  std::vector<double> moved;
  double ignored;
  find_means(threads, panel_source<C>{&from, load, d}, closer, 0, moved, ignored);
  for (integer k = 0; k < d; ++k) {
    double const high = static_cast<double>(site.minus_high[k]);
    double const low = static_cast<double>(site.minus_low[k]) - moved.data()[k];
    site.minus_high[k] = static_cast<C>(high + low);
    site.minus_low[k] = static_cast<C>((high - static_cast<double>(site.minus_high[k])) + low);
  }
  // The sums of the values as they are rounded now: what the rows of the kernel matrix add up to. In two
  // parts, for of a token far out only the others' are left.
  constexpr integer columns = 256;
  std::vector<double> high(static_cast<std::size_t>(d)), low(high.size());
  threads.run(ceil_div(d, columns), [&](integer part) {
    alignas(128) C x[columns + lanes_v<C>];
    integer const k = part * columns, count = (std::min)(columns, d - k);
    for (integer i = 0; i < tokens; ++i) {
      site.fetch(i, 1, k, count, x, columns);
      for (integer c = 0; c < count; ++c)
        add_in_two(static_cast<double>(x[c]), high.data()[k + c], low.data()[k + c]);
    }
  });
  std::fill(site.norms.begin(), site.norms.end(), 0.);
  site.row_sums.assign(static_cast<std::size_t>(tokens), 0.);
  each_block(threads, site, tokens,
             [&](integer row, integer rows, integer k, integer cols, C const* x, integer ld) {
               add_norms(x, rows, cols, ld, site.norms.data() + row);
               for (integer i = 0; i < rows; ++i) {
                 double sum = 0;
                 for (integer c = 0; c < (std::min)(cols, d - k); ++c) {
                   double const value = static_cast<double>(x[i * ld + c]);
                   sum += value * ((high.data()[k + c] - value) + low.data()[k + c]);
                 }
                 site.row_sums.data()[row + i] += sum;
               }
             });
}

/// @param  about_mean  centre at the mean even if tokens far out drag it along
template <class C>
prepared_site<C> prepare(team& threads, panel_source<C> const& source, integer tokens,
                         bool about_mean = true) {
  prepared_site<C> site;
  site.source = source;
  integer const d = source.cols;
  site.norms.assign(static_cast<std::size_t>(tokens), 0.);
  site.minus_high = aligned_array<C>(round_up(d, lanes_v<C>) + lanes_v<C>, C(0));
  site.minus_low = aligned_array<C>(round_up(d, lanes_v<C>) + lanes_v<C>, C(0));
  auto const drop = [&] {  // a site of zeros
    site.scale = 0;
    site.source.load = load_zeros<C>;
    std::fill_n(site.minus_high.data(), d, C(0));
    std::fill_n(site.minus_low.data(), d, C(0));
  };

  std::vector<double> means;
  double largest = 0;
  int down = 0;
  if (!find_means(threads, source, tokens, down, means, largest)) {
    site.non_finite = find_non_finite(source, tokens);
    if (site.non_finite.found()) {
      drop();
      return site;
    }
    down = -64;  // finite doubles whose sum is not
    find_means(threads, source, tokens, down, means, largest);
  }

  // A first scale, by which the centred values are at most 2 or so: their norms are safe in C.
  if (!(largest > 0)) {
    drop();
    return site;
  }
  double scale = power_of_two<C>(-std::ilogb(largest) - 1);
  for (integer k = 0; k < d; ++k) {
    double const mean = std::ldexp(means.data()[k], std::ilogb(scale) - down);
    site.minus_high[k] = static_cast<C>(-mean);
    site.minus_low[k] = static_cast<C>(-mean - static_cast<double>(site.minus_high[k]));
  }
  site.scale = static_cast<C>(scale);
  if constexpr (std::is_same_v<C, double>) {
    // Sums of values far from the origin have lost digits: what is left of the means goes, too.
    double ignored;
    find_means(threads, centred_source(site), tokens, 0, means, ignored);
    for (integer k = 0; k < d; ++k) site.minus_low[k] -= means.data()[k];
  }
  each_block(threads, site, tokens,
             [&](integer row, integer rows, integer, integer cols, C const* x, integer ld) {
               add_norms(x, rows, cols, ld, site.norms.data() + row);
             });

  // What the rounding of the means alone may leave is a constant site, not a signal.
  double const rounding = rounding_of_means<C>(tokens) * scaled(largest, scale);
  double norm = 0;
  for (double const a : site.norms) site.trace += a, norm = (std::max)(norm, a);
  if (norm <= rounding * rounding * static_cast<double>(d)) {
    site.unclear = !std::is_same_v<C, double> && norm > 0;
    std::fill(site.norms.begin(), site.norms.end(), 0.);
    drop();
    return site;
  }
  std::vector<double> scratch;
  if (double const limit = centre_limit(site.norms, site.trace, norm, scratch);
      !about_mean && is_finite(limit)) {
    centre_among(threads, site, tokens, limit);
    norm = *std::max_element(site.norms.begin(), site.norms.end());
  }
  double const wanted = scale * std::ldexp(1., -std::ilogb(norm) / 2);
  double const most = power_of_two<C>(std::numeric_limits<C>::max_exponent - std::ilogb(largest));
  double const final_scale = (std::max)(
      (std::min)((std::min)(wanted, most), power_of_two<C>(1 << 20)), power_of_two<C>(-(1 << 20)));
  double const rescale = final_scale / scale;
  for (integer k = 0; k < d; ++k) {
    site.minus_high[k] = static_cast<C>(static_cast<double>(site.minus_high[k]) * rescale);
    site.minus_low[k] = static_cast<C>(static_cast<double>(site.minus_low[k]) * rescale);
  }
  site.trace = 0;
  for (double& a : site.norms) site.trace += a *= rescale * rescale;
  site.furthest = norm * rescale * rescale;
  for (double& r : site.row_sums) r *= rescale * rescale;
  site.scale = static_cast<C>(final_scale);
  return site;
}

// ---- kernels ------------------------------------------------------------------------------------
//
// kernel.bind<C>(p, site) returns what turns inner products of site p into G:
//
//     C token(i), C removed(i)   two numbers per token: G_ij + removed(i) + removed(j) is k(x_i, x_j) of features
//                                centred at their mean
//     P operator()(P k, P ti, P tj, P removed)   G from the inner product, the tokens' numbers and the sum
//                                of their removed ones
//     double diagonal(i)         G_ii
//     double rounding, floor     what rounding makes of ‖G‖_F, and of ‖U‖²_F beyond that
//     int exponent               G · 2^exponent is in units of the data
//     static constexpr bool row_sums   false if they vanish
//     double rounding_of(Σ k²)         that of ‖G‖_F once the entries are known, where it depends on them
//     static constexpr bool repairs    whether it has, for entries that inner products lose,
//     bool outlying(), bool lost(k, ti, tj), double repair(i, j)

template <class C>
inline constexpr double unit_roundoff = static_cast<double>(std::numeric_limits<C>::epsilon()) / 2;

/// U_ij = K_ij − u_i − u_j, the U-centred linear kernel: its row sums without the diagonal are 0.
struct linear_kernel {
  static constexpr bool about_mean = false;

  template <class C>
  struct bound {
    static constexpr bool row_sums = false, repairs = false;
    int exponent;
    double rounding, floor;
    std::vector<double> const* norms;
    u_centring by;

    C token(integer i) const { return static_cast<C>(by.shift.data()[i]); }
    C removed(integer i) const { return static_cast<C>(by.removed.data()[i]); }
    double diagonal(integer i) const { return norms->data()[i] - 2 * by.shift.data()[i]; }
    template <class P>
    P operator()(P const& k, P const& ti, P const& tj, P const&) const {
      return Eigen::internal::psub(k, Eigen::internal::padd(ti, tj));
    }
  };

  template <class C>
  bound<C> bind(integer, prepared_site<C> const& site) const {
    u_centring by;
    by.fit(site.norms, site.row_sums, site.source.cols, unit_roundoff<C>);
    double const rounding = by.rounding, floor = by.floor;
    return {site.exponent(), rounding, floor, &site.norms, std::move(by)};
  }
};

/// exp(−‖x_i − x_j‖² / 2σ²) − c_i − c_j, with c_i + c_j near the mean of a row: little cancels later.
struct rbf_kernel {
  static constexpr bool about_mean = false;
  std::vector<double> sigma;  // one a site

  template <class C>
  struct bound {
    static constexpr bool row_sums = true, repairs = true;
    static constexpr int exponent = 0;
    prepared_site<C> const* site;
    double sigma, rate, typical = 0, rounding = 0, floor = 0, furthest = 0;

    /// The exponent is a difference of sums: what they may be, times the kernel's value.
    static constexpr double limit = std::is_same_v<C, double> ? 4096 : 4;

    double number(integer i) const { return site->norms.data()[i] * rate / 2; }
    C token(integer i) const { return static_cast<C>(number(i)); }
    /// Half of the kernel of two typical tokens apart; 0 − that for one that is far from all.
    double common_part(integer i) const {
      return std::exp(-number(i) - typical) - std::exp(-2 * typical) / 2;
    }
    C removed(integer i) const { return static_cast<C>(common_part(i)); }
    double diagonal(integer i) const { return 1 - 2 * static_cast<double>(removed(i)); }

    bool outlying() const { return 2 * furthest > limit; }
    bool lost(double k, double ti, double tj) const {
      double const sum = ti + tj;
      return sum > limit &&
             k * rate - sum + 64 * unit_roundoff<C> * sum > std::log(limit) - std::log(sum);
    }
    double repair(integer i, integer j) const {
      return std::exp(-site->distance(i, j) / sigma / sigma / 2);
    }
    /// With the entries known: ‖K‖² without the diagonal. The exponent's rounding is relative to them.
    double rounding_of(double square_sum) const {
      double const n = static_cast<double>(site->norms.size());
      double const lost = (std::min)(2 * typical, limit);
      return unit_roundoff<C> / 2 * std::sqrt(n * (n - 1) + lost * lost * square_sum);
    }
    template <class P>
    P operator()(P const& k, P const& ti, P const& tj, P const& removed) const {
      using namespace Eigen::internal;
      P const power = psub(pmul(k, pset1<P>(static_cast<C>(rate))), padd(ti, tj));
      return psub(pexp(pmin(power, pset1<P>(C(0)))), removed);
    }
  };

  template <class C>
  bound<C> bind(integer p, prepared_site<C> const& site) const {
    double const s = sigma[static_cast<std::size_t>(p)] * site.some_scale();
    // a_i ≤ 4: exponents are finite. With a σ for which this is too little they are below that of 0
    // all the same, but for pairs that are repaired.
    constexpr double most = std::is_same_v<C, double> ? 1e300 : 1e36;
    bound<C> b{&site, s > 0 ? s : 1, (std::min)(1 / s / s, most)};
    double const n = static_cast<double>(site.norms.size());
    b.typical = median_of(site.norms) * b.rate / 2;
    b.furthest = *std::max_element(site.norms.begin(), site.norms.end()) * b.rate / 2;
    double const lost = (std::min)(2 * b.typical, b.limit);
    b.rounding = unit_roundoff<C> / 2 * std::sqrt(n * (n - 1) * (1 + lost * lost));
    return b;
  }
};

/// Any function f(⟨x, y⟩, ‖x‖², ‖y‖²) of centred features, in double, value by value.
template <class F>
struct function_kernel {
  static constexpr bool about_mean = true;
  F f;

  template <class C>
  struct bound {
    static constexpr bool row_sums = true, repairs = false;
    static constexpr int exponent = 0;
    F const& f;
    std::vector<double> const* norms;
    double factor, centre, rounding = 0, floor = 0;

    double value(double k, double a, double b) const {
      return static_cast<double>(f(k * factor, a * factor, b * factor));
    }
    C token(integer i) const { return static_cast<C>(norms->data()[i]); }
    C removed(integer) const { return static_cast<C>(centre / 2); }
    double diagonal(integer i) const {
      double const a = norms->data()[i];
      return value(a, a, a) - 2 * static_cast<double>(removed(0));
    }
    template <class P>
    P operator()(P const& k, P const& ti, P const& tj, P const& removed) const {
      using namespace Eigen::internal;
      C x[4][lanes_v<C>];
      pstoreu(x[0], k), pstoreu(x[1], ti), pstoreu(x[2], tj), pstoreu(x[3], removed);
      for (integer w = 0; w < lanes_v<C>; ++w)
        x[0][w] = static_cast<C>(value(static_cast<double>(x[0][w]), static_cast<double>(x[1][w]),
                                       static_cast<double>(x[2][w])) -
                                 static_cast<double>(x[3][w]));
      return ploadu<P>(x[0]);
    }
  };

  template <class C>
  bound<C> bind(integer, prepared_site<C> const& site) const {
    double trace = 0;
    std::vector<double> values;
    for (double const a : site.norms) trace += a;
    double const unit = std::ldexp(1., site.exponent());
    double const typical = trace / static_cast<double>(site.norms.size()) * unit;
    double const centre = static_cast<double>(f(0., typical, typical));
    bound<C> b{f, &site.norms, unit, is_finite(centre) ? centre : 0};
    for (double const a : site.norms) values.push_back(std::abs(b.value(a, a, a)));
    b.rounding =
        unit_roundoff<C> * std::sqrt(sum_of_pairs(values));  // |k(x, y)|² ≤ k(x, x) k(y, y)
    return b;
  }
};

// ---- panels -------------------------------------------------------------------------------------

/// Depths of a block are filled up to whole packets and whole cache lines.
template <class C>
inline constexpr integer depth_unit = (std::max<integer>)(lanes_v<C>, 64 / sizeof(C));

/// Cuts `depth` into blocks of about the same size, of an odd number of lines, at most `most`.
template <class C>
integer depth_of_block(integer depth, integer most) {
  integer const line = 64 / sizeof(C), lines = ceil_div(depth, line);
  for (integer blocks = ceil_div(lines, most);; ++blocks) {
    integer const block = ceil_div(lines, blocks) | 1;
    integer const last = lines - (blocks - 1) * block;
    if (last > 0 && last % 32 != 0) return round_up(block * line, depth_unit<C>);
    if (block == 1) return depth_unit<C>;
  }
}

/// A store past the caches, where the instruction set has one. Threads share panels: storing into
/// lines that another core has read, an ordinary store waits for that core (ten times slower where
/// cores do not share a cache).
template <class C, class P>
EIGEN_ALWAYS_INLINE void stream(C* to, P const& x) {
  if constexpr (requires { _mm512_stream_ps(to, x); })
    _mm512_stream_ps(to, x);
  else if constexpr (requires { _mm512_stream_pd(to, x); })
    _mm512_stream_pd(to, x);
  else if constexpr (requires { _mm256_stream_ps(to, x); })
    _mm256_stream_ps(to, x);
  else if constexpr (requires { _mm256_stream_pd(to, x); })
    _mm256_stream_pd(to, x);
  else if constexpr (requires { _mm_stream_ps(to, x); })
    _mm_stream_ps(to, x);
  else if constexpr (requires { _mm_stream_pd(to, x); })
    _mm_stream_pd(to, x);
  else
    Eigen::internal::pstore(to, x);
}

/// Copies whole packets, past the caches if others will read them.
template <class C>
void copy_packets(C const* from, integer count, bool shared, C* to) {
  using namespace Eigen::internal;
  using P = packet_t<C>;
  if (shared)
    for (integer k = 0; k < count; k += lanes_v<C>) stream(to + k, P(pload<P>(from + k)));
  else
    for (integer k = 0; k < count; k += lanes_v<C>) pstore(to + k, pload<P>(from + k));
}

/// Depths of one step of work, in blocks of `block`; the last block is shorter.
struct depth_range {
  integer first, count, block;

  integer blocks() const { return ceil_div(count, block); }
  integer size(integer b) const { return (std::min)(block, count - b * block); }
};

/// Part of a site's rows, packed. Block b of the depths starts at b · block · rows.
template <class C>
struct panel {
  aligned_array<C> values;
  integer rows = 0;

  C* block(integer b, depth_range const& k) { return values.data() + b * k.block * rows; }
  C const* block(integer b, depth_range const& k) const {
    return values.data() + b * k.block * rows;
  }
};

/// At most four lanes: larger transposes gain nothing here.
template <class C>
using small_packet_t = typename Eigen::internal::find_best_packet<C, 4>::type;
template <class C>
inline constexpr integer small_lanes = (std::min<integer>)(4, lanes_v<C>);

/// to = fromᵀ, a square of packets of the type of the first argument.
template <class P, class C>
void transpose(P const&, C const* from, integer from_ld, C* to, integer to_ld) {
  using namespace Eigen::internal;
  constexpr int W = unpacket_traits<P>::size;
  PacketBlock<P, W> square;
  for (int w = 0; w < W; ++w) square.packet[w] = pload<P>(from + w * from_ld);
  if constexpr (W > 1) ptranspose(square);
  for (int w = 0; w < W; ++w) pstore(to + w * to_ld, square.packet[w]);
}

/// Packs one strip of rows (strip · R to (strip + 1) · R of the panels), the first `available` of
/// which exist: side by side for `rows`, one after the other for `cols`. Either may be absent.
/// Missing rows are zeros, and so are depths beyond the end.
///
/// Goes along a few rows at a time, as many as fill cache lines of the panel: long runs of input
/// for the hardware to prefetch, whole lines for the stores.
template <class Product, class C, class Fetch>
void pack_strip(Fetch const& fetch, integer row, integer available, integer strip,
                depth_range const& k, bool shared, panel<C>* rows, panel<C>* cols) {
  constexpr integer R = Product::template rows<C>, W = lanes_v<C>, S = small_lanes<C>;
  constexpr integer line = 64 / sizeof(C), chunk = 1024 / sizeof(C);
  constexpr integer G = R % line == 0 && line % W == 0 ? line : R;
  alignas(128) C x[G * chunk], side_by_side[G * chunk];
  for (integer i = 0; i < R; i += G) {
    integer const here = std::clamp<integer>(available - i, 0, G);
    std::fill(x + here * chunk, x + G * chunk, C(0));
    for (integer b = 0; b < k.blocks(); ++b) {
      integer const size = k.size(b), depth = round_up(size, depth_unit<C>);
      for (integer c = 0; c < size; c += chunk) {
        integer const count = (std::min)(chunk, size - c), padded = round_up(count, depth_unit<C>);
        if (here > 0) fetch(row + i, here, k.first + b * k.block + c, count, x, chunk);
        for (integer r = 0; r < here && padded > count; ++r)
          std::fill(x + r * chunk + count, x + r * chunk + padded, C(0));
        for (integer r = 0; r < G && cols; ++r)
          copy_packets(x + r * chunk, padded, shared,
                       cols->block(b, k) + (strip * R + i + r) * depth + c);
        if (!rows) continue;
        for (integer m = 0; m < padded; m += S)
          for (integer r = 0; r < G; r += S)
            transpose(Eigen::internal::pset1<small_packet_t<C>>(C(0)), x + r * chunk + m, chunk,
                      side_by_side + m * G + r, G);
        C* const to = rows->block(b, k) + strip * R * depth + c * R + i;
        if constexpr (G == R)
          copy_packets(side_by_side, padded * R, shared, to);
        else
          for (integer m = 0; m < padded; ++m)
            copy_packets(side_by_side + m * G, G, shared, to + m * R);
      }
    }
  }
  if (shared) std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores need one
}

// ---- tiles --------------------------------------------------------------------------------------

/// One task: strips of rows times strips of columns. Micro tiles wholly above the diagonal are left
/// out; the others follow each other in the tile buffer, from `first` on.
struct block {
  integer row, rows, col, cols, first, sums;
};

/// A macro tile and its blocks; `area` values of the buffer, `sums` doubles of sums per token.
struct tile {
  integer row, rows, col, cols;
  bool lower;
  std::vector<block> blocks = {};
  integer area = 0, sums = 0;

  bool diagonal() const { return row == col; }

  /// The blocks whose middle is in a range of the area, moved together.
  tile part(integer low, integer high) const {
    tile out{row, rows, col, cols, lower};
    for (std::size_t k = 0; k < blocks.size(); ++k) {
      bool const last = k + 1 == blocks.size();
      integer const end = last ? area : blocks[k + 1].first;
      integer const middle = blocks[k].first + (end - blocks[k].first) / 2;
      if (middle < low || middle >= high) continue;
      block b = blocks[k];
      b.first = out.area;
      b.sums = out.sums;
      out.area += end - blocks[k].first;
      out.sums += (last ? sums : blocks[k + 1].sums) - blocks[k].sums;
      out.blocks.push_back(b);
    }
    return out;
  }
};

template <class Product, class C>
struct tiling {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static_assert(R % N == 0 && R % lanes_v<C> == 0);

  /// Whether a micro tile has an entry below the diagonal.
  static bool below(integer i, integer j) { return i + R - 1 > j; }

  /// Calls f(i, j, position in the buffer) for the micro tiles of a block, column strips outermost.
  template <class F>
  static integer each(block const& b, bool lower, F const& f) {
    integer at = b.first;
    for (integer j = b.col; j < b.col + b.cols; j += N)
      for (integer i = b.row; i < b.row + b.rows; i += R)
        if (!lower || below(i, j)) {
          f(i, j, at);
          at += R * N;
        }
    return at;
  }

  /// @param sums_of  how many doubles of sums a block needs
  template <class F>
  static tile plan(integer row, integer rows, integer col, integer cols, bool lower,
                   F const& sums_of) {
    tile t{row, rows, col, cols, lower};
    integer const height = Product::block_strips * R, width = Product::block_cols;
    for (integer i = 0; i < rows; i += height)
      for (integer j = 0; j < cols; j += width) {
        block b{row + i, (std::min)(height, rows - i), col + j, (std::min)(width, cols - j), t.area,
                t.sums};
        integer const end = each(b, lower, [](integer, integer, integer) {});
        if (end == t.area) continue;
        t.area = end;
        t.sums += sums_of(b);
        t.blocks.push_back(b);
      }
    return t;
  }
};

/// Calls f(tile) for this share of all tiles in plan(f), of which there may be many: one range of
/// their blocks, so that most tiles are whole and shares differ by a block at most.
template <class Plan, class F>
void each_of_share(work_share share, Plan const& plan, F const& f) {
  if (share.of == 1) return plan(f);
  integer total = 0, before = 0;
  plan([&](tile const& t) { total += t.area; });
  integer const low = total / share.of * share.index + total % share.of * share.index / share.of;
  integer const next = share.index + 1;
  integer const high = total / share.of * next + total % share.of * next / share.of;
  plan([&](tile const& t) {
    if (before < high && before + t.area > low) {
      tile const mine = t.part(low - before, high - before);
      if (!mine.blocks.empty()) f(mine);
    }
    before += t.area;
  });
}

/// Packing of a tile's panels as tasks: a few strips in a row, first of rows, then of columns (on
/// the diagonal the same strips serve both). Few enough tasks that a thread's prefetches pay off.
/// Strips that no block of the tile needs are left out.
template <class Product, class C>
class packing {
  static constexpr integer R = Product::template rows<C>, group = Product::block_strips * R;

 public:
  /// @param end     rows that exist
  /// @param shared  with other threads
  packing(tile const& t, integer end, bool shared) : t_(t), end_(end), shared_(shared) {
    auto const needed = [&](integer block::*first, integer block::*count, integer from) {
      return std::any_of(t.blocks.begin(), t.blocks.end(), [&](block const& b) {
        return b.*first < from + group && from < b.*first + b.*count;
      });
    };
    for (integer at = 0; at < t.rows; at += group)
      if (needed(&block::row, &block::rows, t.row + at) ||
          (t.diagonal() && needed(&block::col, &block::cols, t.row + at)))
        tasks_.push_back({true, at});
    for (integer at = 0; at < t.cols && !t.diagonal(); at += group)
      if (needed(&block::col, &block::cols, t.col + at)) tasks_.push_back({false, at});
  }

  integer tasks() const { return static_cast<integer>(tasks_.size()); }

  template <class Fetch>
  void operator()(integer task, Fetch const& fetch, depth_range const& k, panel<C>& rows,
                  panel<C>& cols) const {
    auto const [of_rows, from] = tasks_[static_cast<std::size_t>(task)];
    integer const origin = of_rows ? t_.row : t_.col, count = of_rows ? t_.rows : t_.cols;
    for (integer at = from; at < (std::min)(count, from + group); at += R)
      pack_strip<Product, C>(fetch, origin + at, (std::min)(R, end_ - origin - at), at / R, k,
                             shared_, of_rows ? &rows : nullptr,
                             !of_rows || t_.diagonal() ? &cols : nullptr);
  }

 private:
  struct strips {
    bool of_rows;
    integer from;
  };

  tile const& t_;
  integer end_;
  bool shared_;
  std::vector<strips> tasks_;
};

/// All micro tiles of a block over the depths of one step; `finish` sees each at the last depth.
template <class Product, class C, class Finish>
void multiply_block(tile const& t, block const& b, panel<C> const& rows, panel<C> const& cols,
                    depth_range const& k, bool first, bool last, C* buffer, Finish const& finish) {
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  for (integer d = 0; d < k.blocks(); ++d) {
    integer const depth = round_up(k.size(d), depth_unit<C>);
    C const* const x = rows.block(d, k) - t.row * depth;
    C const* const y = cols.block(d, k) - t.col * depth;
    bool const start = first && d == 0, end = last && d + 1 == k.blocks();
    tiling<Product, C>::each(b, t.lower, [&](integer i, integer j, integer at) {
      bool const turn = i + R >= b.row + b.rows;  // the next one is of the next strip of columns
      Product::multiply(x + i * depth, y + j * depth, depth, !start, t.lower ? j - i : 0,
                        y + (turn ? j + N : j) * depth, buffer + at);
      if (end) finish(i, j, buffer + at);
    });
  }
}

/// Where the sums of one block go: squares of its rows and columns, then their plain sums.
struct block_sums {
  double *row_squares, *col_squares, *row_sums, *col_sums;
};

/// The entries of a tile whose inner products have lost them, NaN elsewhere: pairs of tokens that are close
/// to each other and far from the centre. Returns whether there are any.
template <class Product, class C, class Bound>
bool repairs_of(Bound const& kernel, C const* token, C const* removed, integer i0, integer j0,
                integer n, C const* g, C* entries) {
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  bool any = false;
  for (integer j = j0; j < (std::min)(j0 + N, n); ++j)
    for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i) {
      integer const at = (j - j0) * R + i - i0;
      if (!kernel.lost(static_cast<double>(g[at]), static_cast<double>(token[i]),
                       static_cast<double>(token[j])))
        continue;
      if (!any) std::fill_n(entries, R * N, std::numeric_limits<C>::quiet_NaN());
      any = true;
      entries[at] = static_cast<C>(kernel.repair(i, j) - (static_cast<double>(removed[i]) +
                                                          static_cast<double>(removed[j])));
    }
  return any;
}

/// Turns inner products into G, zeroes what is not below the diagonal, adds up sums per token: of G, and
/// squares of the kernel matrix.
template <class Product, class C, class Bound>
void finish_tile(Bound const& kernel, C const* token, C const* removed, integer i0, integer j0,
                 integer n, C* g, block_sums const& to) {
  using namespace Eigen::internal;
  using P = packet_t<C>;
  constexpr integer W = lanes_v<C>, R = Product::template rows<C>, N = Product::template cols<C>;
  constexpr integer packets = R / W;
  std::vector<C> repaired;
  if constexpr (Bound::repairs)
    if (kernel.outlying()) {
      repaired.resize(R * N);
      if (!repairs_of<Product>(kernel, token, removed, i0, j0, n, g, repaired.data()))
        repaired.clear();
    }
  for (integer j = 0; j < N; ++j) {
    P const tj = pset1<P>(token[j0 + j]), of_col = pset1<P>(removed[j0 + j]);
    for (integer r = 0; r < packets; ++r) {
      C* const x = g + j * R + r * W;
      pstore(x, kernel(P(pload<P>(x)), P(ploadu<P>(token + i0 + r * W)), tj,
                       P(padd(ploadu<P>(removed + i0 + r * W), of_col))));
    }
  }
  for (std::size_t k = 0; k < repaired.size(); ++k)
    if (is_finite(repaired[k])) g[k] = repaired[k];
  if (i0 < j0 + N || i0 + R > n)
    for (integer j = 0; j < N; ++j)
      for (integer i = 0; i < R; ++i)
        if (i0 + i <= j0 + j || i0 + i >= n) g[j * R + i] = C(0);

  P squares[packets], sums[packets];
  for (integer r = 0; r < packets; ++r) squares[r] = sums[r] = pset1<P>(C(0));
  bool const whole = i0 >= j0 + N && i0 + R <= n;
  alignas(128) C kept[R];  // of a column, without what is not there
  for (integer j = 0; j < N; ++j) {
    P square = pset1<P>(C(0)), sum = square;
    P const of_col = pset1<P>(removed[j0 + j]);
    if (!whole)
      for (integer i = 0; i < R; ++i) {
        C const k = g[j * R + i] + (removed[i0 + i] + removed[j0 + j]);
        kept[i] = i0 + i > j0 + j && i0 + i < n ? k : C(0);
      }
    for (integer r = 0; r < packets; ++r) {
      P const x = pload<P>(g + j * R + r * W);
      P const k =
          whole ? padd(x, padd(ploadu<P>(removed + i0 + r * W), of_col)) : pload<P>(kept + r * W);
      square = pmadd(k, k, square);
      squares[r] = pmadd(k, k, squares[r]);
      if constexpr (Bound::row_sums) sum = padd(sum, x), sums[r] = padd(sums[r], x);
    }
    to.col_squares[j] += static_cast<double>(predux(square));
    if constexpr (Bound::row_sums) to.col_sums[j] += static_cast<double>(predux(sum));
  }
  alignas(128) C narrow[R];
  for (integer r = 0; r < packets; ++r) pstore(narrow + r * W, squares[r]);
  for (integer i = 0; i < R; ++i) to.row_squares[i] += static_cast<double>(narrow[i]);
  if constexpr (Bound::row_sums) {
    for (integer r = 0; r < packets; ++r) pstore(narrow + r * W, sums[r]);
    for (integer i = 0; i < R; ++i) to.row_sums[i] += static_cast<double>(narrow[i]);
  }
}

// ---- all pairs of sites -------------------------------------------------------------------------

/// The products of all pairs of rows of a buffer: inner products along contiguous rows, in register
/// blocks of 4 × 4 or 4 × 2 packets of partial sums. No packing: the rows are used as they lie.
template <class C>
class row_products {
  static constexpr integer W = lanes_v<C>, R = 4, N = packed_product::many_registers ? 4 : 2;
  // Terms before partial sums go over to double, 512 a lane of floats: beside one large term, equal
  // small ones are all rounded the same way.
  static constexpr integer longest = 512 * static_cast<integer>(lanes_v<float>);

 public:
  /// @param most  terms before partial sums go over to double, a multiple of W
  explicit row_products(integer rows, integer most = longest)
      : rows_(rows),
        flush_((std::min)(most, longest)),
        chunk_(std::clamp<integer>(8192 / rows / 64 * 64, 64, 1024)),
        partial_(ceil_div(rows, R) * ceil_div(rows, N) * R * N * W) {}

  /// out[p · rows + q] = Σ x_p x_q for q ≤ p over `count` columns, a multiple of W.
  void operator()(C const* x, integer ld, integer count, double* out) {
    std::fill_n(out, rows_ * rows_, 0.);
    for (integer c = 0; c < count; c += flush_) {
      integer const part = (std::min)(flush_, count - c);
      for (integer k = 0; k < part; k += chunk_)
        each_block([&](integer p, integer q, C* sums) {
          multiply(x + c + k, ld, p, q, (std::min)(chunk_, part - k), k > 0, sums);
        });
      each_block([&](integer p, integer q, C const* sums) {
        for (integer r = 0; r < R; ++r)
          for (integer s = 0; s < N; ++s, sums += W)
            if (p + r < rows_ && q + s < rows_) {
              double total = 0;
              for (integer w = 0; w < W; ++w) total += static_cast<double>(sums[w]);
              out[(p + r) * rows_ + q + s] += total;
            }
      });
    }
  }

 private:
  template <class F>
  void each_block(F const& f) {
    C* sums = partial_.data();
    for (integer p = 0; p < rows_; p += R)
      for (integer q = 0; q < (std::min)(rows_, p + R); q += N, sums += R * N * W) f(p, q, sums);
  }

  void multiply(C const* x, integer ld, integer p, integer q, integer count, bool accumulate,
                C* sums) const {
    using namespace Eigen::internal;
    using P = packet_t<C>;
    C const *a[R], *b[N];
    for (integer r = 0; r < R; ++r) a[r] = x + (std::min)(p + r, rows_ - 1) * ld;
    for (integer s = 0; s < N; ++s) b[s] = x + (std::min)(q + s, rows_ - 1) * ld;
    P sum[R][N];
    for (integer r = 0; r < R; ++r)
      for (integer s = 0; s < N; ++s)
        sum[r][s] = accumulate ? pload<P>(sums + (r * N + s) * W) : pset1<P>(C(0));
    for (integer k = 0; k < count; k += W) {
      P y[N];
      for (integer s = 0; s < N; ++s) y[s] = pload<P>(b[s] + k);
      for (integer r = 0; r < R; ++r) {
        P const v = pload<P>(a[r] + k);
        for (integer s = 0; s < N; ++s) sum[r][s] = pmadd(v, y[s], sum[r][s]);
      }
    }
    for (integer r = 0; r < R; ++r)
      for (integer s = 0; s < N; ++s) pstore(sums + (r * N + s) * W, sum[r][s]);
  }

  integer rows_, flush_, chunk_;
  aligned_array<C> partial_;
};

/// Fills in the other half of the products, goes over to units of the data, and writes NaN where
/// the data are not finite.
template <class C>
void deliver(std::vector<prepared_site<C>> const& sites, std::vector<int> const& exponents,
             gram_moments& m) {
  std::vector<double> units(sites.size());
  for (integer p = 0; p < m.sites; ++p) {
    auto const& site = sites[static_cast<std::size_t>(p)];
    m.non_finite.data()[p] = site.non_finite;
    if (!(site.scale > 0))
      m.why.data()[p] = site.unclear ? status::ill_conditioned : status::constant_layer;
    if (site.non_finite.found()) {
      m.why.data()[p] = status::non_finite;
    }
    int const exponent = exponents.data()[p];
    if (std::abs(exponent) > 200) m.exponent.data()[p] = exponent;  // else products leave the range
    double const unit = site.non_finite.found() ? std::numeric_limits<double>::quiet_NaN()
                                                : std::ldexp(1., exponent - m.exponent.data()[p]);
    units.data()[p] = unit;
    for (integer q = 0; q <= p; ++q) {
      double const product = m.products.data()[p * m.sites + q] * unit * units.data()[q];
      m.products.data()[p * m.sites + q] = m.products.data()[q * m.sites + p] = product;
    }
    for (integer i = p * m.tokens; i < (p + 1) * m.tokens; ++i) {
      m.row_sums.data()[i] *= unit;
      m.diagonal.data()[i] *= unit;
      if (!m.squares.empty()) m.squares.data()[i] *= unit * unit;
    }
    m.square_sum.data()[p] *= unit * unit;
    m.entry_rounding.data()[p] *=
        site.scale > 0 ? std::abs(unit) : 0;  // equal tokens: nothing is lost
    m.sum_rounding.data()[p] *= site.scale > 0 ? unit * unit : 0;
  }
}

// ---- the engine ---------------------------------------------------------------------------------

[[noreturn]] inline void reject_bound(double bound, double smallest) {
  throw std::invalid_argument("rflow: a memory bound of " + std::to_string(std::llround(bound)) +
                              " bytes is below the " + std::to_string(std::llround(smallest)) +
                              " bytes of the smallest tile");
}

/// Sizes, from the shape and the memory bound alone.
struct gram_sizes {
  integer side;         // tokens along a macro tile
  integer depth;        // features of a step
  integer depth_block;  // features of a block
  integer slices;       // of the tile buffer, for the product of all pairs
};

template <class Product, class C>
class gram_engine {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  using tiles = tiling<Product, C>;

 public:
  gram_engine(team& threads, std::vector<prepared_site<C>> const& sites, integer tokens,
              std::size_t memory_bound, work_share share = {})
      : threads_(threads),
        tokens_(tokens),
        site_count_(static_cast<integer>(sites.size())),
        sites_(sites),
        share_(share),
        sizes_(choose_sizes(static_cast<double>(memory_bound))) {}

  gram_sizes const& sizes() const { return sizes_; }

  /// @param  shifts  S × n: what is subtracted from the entries of each token besides; or nothing
  template <class Kernel>
  gram_moments operator()(Kernel const& kernel, std::vector<double> const& shifts = {}) {
    using bound = decltype(kernel.template bind<C>(0, sites_[0]));
    std::vector<bound> kernels;
    std::vector<per_token> token;
    gram_moments m(site_count_, tokens_);
    m.squares.resize(m.diagonal.size());
    for (integer p = 0; p < site_count_; ++p) {
      kernels.push_back(kernel.template bind<C>(p, sites_[static_cast<std::size_t>(p)]));
      bound const& k = kernels.back();
      m.entry_rounding.data()[p] = k.rounding;
      m.sum_rounding.data()[p] = k.floor;
      integer const room = round_up(tokens_, R) + R + N;
      token.push_back({aligned_array<C>(room, C(0)), aligned_array<C>(room, C(0))});
      for (integer i = 0; i < tokens_; ++i) {
        token.back().number[i] = k.token(i);
        C const removed = k.removed(i);
        double diagonal = k.diagonal(i);
        token.back().removed[i] = removed;
        if (!shifts.empty()) {
          C const more =
              static_cast<C>(static_cast<double>(removed) + shifts.data()[p * tokens_ + i]);
          token.back().removed[i] = more;
          diagonal -= 2 * (static_cast<double>(more) - static_cast<double>(removed));
        }
        m.diagonal.data()[p * tokens_ + i] = diagonal;
      }
    }
    allocate<bound::row_sums>();
    auto const tiles_of_all = [&](auto const& f) {
      integer const side = sizes_.side;
      for (integer row = 0; row < tokens_; row += side)
        for (integer col = 0; col <= row; col += side)
          f(plan<bound::row_sums>(row, (std::min)(side, tokens_ - row), col,
                                  (std::min)(side, tokens_ - col)));
    };
    each_of_share(share_, tiles_of_all, [&](tile const& t) {
      fill(t, kernels, token);
      reduce<bound::row_sums>(t, m);
    });
    for (double& x : m.products) x *= 2;
    for (integer p = 0; p < site_count_; ++p)
      for (integer i = 0; i < tokens_; ++i)
        m.square_sum.data()[p] += m.squares.data()[p * tokens_ + i];
    if constexpr (requires(bound const& k) { k.rounding_of(0.); })
      for (integer p = 0; p < site_count_ && share_.of == 1; ++p)
        m.entry_rounding.data()[p] =
            kernels[static_cast<std::size_t>(p)].rounding_of(m.square_sum.data()[p]);
    std::vector<int> exponents;
    for (auto const& k : kernels) exponents.push_back(k.exponent);
    deliver(sites_, exponents, m);
    return m;
  }

 private:
  struct per_token {
    aligned_array<C> number, removed;
  };
  struct step {
    integer site;
    depth_range k;
    bool first, last;
  };

  double bytes(integer side, integer depth) const {
    double const s = static_cast<double>(site_count_), c = sizeof(C);
    double const b = static_cast<double>(round_up(side, R));
    double const area = side < tokens_ ? b * (b + N) : b * (b + R + N) / 2;
    double const blocks = 1 / static_cast<double>(Product::block_cols) +
                          1 / static_cast<double>(Product::block_strips * R);
    double const sums = s * 2 * (b * b * blocks + 2 * b) * sizeof(double);
    return s * area * c + 4 * b * static_cast<double>(depth) * c + sums;
  }

  /// Rough nanoseconds that depend on the side of a tile. Larger tiles pack each row less often,
  /// but each page of the buffer has to be had from the system once.
  double overhead(integer side, double features) const {
    double const n = static_cast<double>(tokens_), b = static_cast<double>(side);
    double const bytes = static_cast<double>(site_count_) * b * b * sizeof(C);
    return 0.5 * bytes * (side < tokens_ ? 1 : 0.5) + 0.7 * features * n * n / b;
  }

  gram_sizes choose_sizes(double memory_bound) const {
    integer widest = 1;
    double features = 0;
    for (auto const& site : sites_) {
      widest = (std::max)(widest, site.source.cols);
      features += static_cast<double>(site.source.cols);
    }
    gram_sizes z{};
    z.depth_block = depth_of_block<C>(widest, Product::depth_lines);
    integer const blocks = ceil_div(widest, z.depth_block);
    double best = (std::numeric_limits<double>::max)(), needed = 0;
    for (integer count = 1, last = 0; last != R; ++count) {
      integer const side = round_up(ceil_div(tokens_, count), R);
      if (side == last) continue;
      last = side;
      integer const strip = side * z.depth_block * integer{sizeof(C)};
      integer const depth = z.depth_block * std::clamp<integer>(panel_bytes / strip, 1, blocks);
      needed = bytes(side, depth);
      if (needed > memory_bound || overhead(side, features) > best) continue;
      best = overhead(side, features);
      z.side = side;
      z.depth = depth;
    }
    if (z.side == 0) reject_bound(memory_bound, needed);
    integer const pairs = site_count_ * site_count_ * integer{sizeof(double)};
    z.slices = std::clamp<integer>((integer{4} << 20) / pairs, 8, 64);
    return z;
  }

  template <bool RowSums>
  static tile plan(integer row, integer rows, integer col, integer cols) {
    return tiles::plan(row, rows, col, cols, true, [](block const& b) {
      return (RowSums ? 2 : 1) * (round_up(b.rows, R) + round_up(b.cols, N));
    });
  }

  template <bool RowSums>
  void allocate() {
    integer const side = sizes_.side;
    tile const whole =
        side < tokens_ ? plan<RowSums>(side, side, 0, side) : plan<RowSums>(0, tokens_, 0, tokens_);
    stride_ = whole.area;
    sums_stride_ = whole.sums;
    buffer_ = aligned_array<C>(site_count_ * stride_);
    sums_ = aligned_array<double>(site_count_ * sums_stride_);
    for (int k = 0; k < 2; ++k) {
      rows_[k].values = aligned_array<C>(side * (sizes_.depth + depth_unit<C>));
      cols_[k].values = aligned_array<C>(side * (sizes_.depth + depth_unit<C>));
      rows_[k].rows = cols_[k].rows = side;
    }
    slice_products_ = aligned_array<double>(sizes_.slices * site_count_ * site_count_);
  }

  std::vector<step> steps() const {
    std::vector<step> all;
    for (integer p = 0; p < site_count_; ++p) {
      integer const d = sites_[static_cast<std::size_t>(p)].source.cols;
      for (integer k = 0; k < d; k += sizes_.depth) {
        integer const count = (std::min)(sizes_.depth, d - k);
        all.push_back({p, {k, count, sizes_.depth_block}, k == 0, k + count == d});
      }
    }
    return all;
  }

  /// Fills the buffer with G of every site. Panels of the next step are packed along with the
  /// products of this one: no thread waits while another packs.
  template <class Bound>
  void fill(tile const& t, std::vector<Bound> const& kernels, std::vector<per_token> const& token) {
    std::vector<step> const all = steps();
    integer const blocks = static_cast<integer>(t.blocks.size());
    packing<Product, C> const panels{t, tokens_, threads_.size() > 1};
    auto const pack = [&](integer s, integer task) {
      step const& now = all[static_cast<std::size_t>(s)];
      auto const& site = sites_[static_cast<std::size_t>(now.site)];
      panels(
          task, [&](auto... where) { site.fetch(where...); }, now.k, rows_[s % 2], cols_[s % 2]);
    };
    auto const multiply = [&](integer s, integer which) {
      step const& now = all[static_cast<std::size_t>(s)];
      auto const p = static_cast<std::size_t>(now.site);
      block const& b = t.blocks[static_cast<std::size_t>(which)];
      integer const height = round_up(b.rows, R), width = round_up(b.cols, N);
      double* const sums = sums_.data() + now.site * sums_stride_ + b.sums;
      if (now.first) std::fill_n(sums, (Bound::row_sums ? 2 : 1) * (height + width), 0.);
      multiply_block<Product>(t, b, rows_[s % 2], cols_[s % 2], now.k, now.first, now.last,
                              buffer_.data() + now.site * stride_, [&](integer i, integer j, C* g) {
                                double* const r = sums + (i - b.row);
                                double* const c = sums + height + (j - b.col);
                                integer const plain = Bound::row_sums ? height + width : 0;
                                finish_tile<Product>(kernels[p], token[p].number.data(),
                                                     token[p].removed.data(), i, j, tokens_, g,
                                                     block_sums{r, c, r + plain, c + plain});
                              });
    };
    integer const count = static_cast<integer>(all.size());
    threads_.run(panels.tasks(), [&](integer i) { pack(0, i); });
    for (integer s = 0; s < count; ++s) {
      integer const ahead = s + 1 < count ? panels.tasks() : 0;
      threads_.run(blocks + ahead, [&](integer i) {  // the short tasks last
        if (i < blocks)
          multiply(s, i);
        else
          pack(s + 1, i - blocks);
      });
    }
  }

  /// Adds the tile's products of all pairs and its sums per token to the moments.
  template <bool RowSums>
  void reduce(tile const& t, gram_moments& m) {
    integer const part = ceil_div(t.area, sizes_.slices), slice = round_up(part, R * N);
    // As short as with the smallest micro tiles, however large the product's are.
    constexpr integer tile_area = packed_product::rows<C> * packed_product::cols<C>;
    integer const most = round_up(part, tile_area);
    integer const slices = ceil_div(t.area, slice), pairs = site_count_ * site_count_;
    threads_.run(slices + site_count_, [&](integer i) {
      if (i < slices) {
        row_products<C> multiply(site_count_, most);
        multiply(buffer_.data() + i * slice, stride_, (std::min)(slice, t.area - i * slice),
                 slice_products_.data() + i * pairs);
      } else {
        add_sums<RowSums>(t, i - slices, m);
      }
    });
    for (integer s = 0; s < slices; ++s)
      for (integer k = 0; k < pairs; ++k) m.products.data()[k] += slice_products_[s * pairs + k];
  }

  template <bool RowSums>
  void add_sums(tile const& t, integer p, gram_moments& m) const {
    double* const squares = m.squares.data() + p * tokens_;
    double* const row_sums = m.row_sums.data() + p * tokens_;
    for (block const& b : t.blocks) {
      double const* from = sums_.data() + p * sums_stride_ + b.sums;
      auto const add = [&](double* to, integer count, integer padded) {
        for (integer i = 0; i < count; ++i) to[i] += from[i];
        from += padded;
      };
      add(squares + b.row, b.rows, round_up(b.rows, R));
      add(squares + b.col, b.cols, round_up(b.cols, N));
      if constexpr (RowSums) {
        add(row_sums + b.row, b.rows, round_up(b.rows, R));
        add(row_sums + b.col, b.cols, round_up(b.cols, N));
      }
    }
  }

  static constexpr integer panel_bytes = integer{6} << 20;  // of one of four panels

  team& threads_;
  integer tokens_, site_count_;
  std::vector<prepared_site<C>> const& sites_;
  work_share share_;
  gram_sizes sizes_;
  integer stride_ = 0, sums_stride_ = 0;
  aligned_array<C> buffer_;
  aligned_array<double> sums_, slice_products_;
  panel<C> rows_[2], cols_[2];
};

// ---- the feature path ---------------------------------------------------------------------------

/// Linear moments from d × d cross-covariances, for many tokens and few features:
/// Σ_{i≠j} K^p_ij K^q_ij = ‖X_pᵀ X_q‖² − Σ_i a_i b_i. The rows of a tile are features of all sites,
/// one after the other; the depth of the products is tokens.
///
/// A token far out would be most of both terms and cancel: such tokens are left out of the
/// cross-covariances, and their pairs are added one by one, in double.
template <class Product, class C>
class feature_engine {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static constexpr integer W = lanes_v<C>;
  using tiles = tiling<Product, C>;

 public:
  feature_engine(team& threads, std::vector<prepared_site<C>> const& sites, integer tokens,
                 std::size_t memory_bound, work_share share = {})
      : threads_(threads), sites_(sites), tokens_(tokens), share_(share) {
    starts_.push_back(0);
    for (integer p = 0; p < static_cast<integer>(sites.size()); ++p) {
      integer const d = sites[static_cast<std::size_t>(p)].source.cols;
      starts_.push_back(starts_.back() + d);
      owner_.insert(owner_.end(), static_cast<std::size_t>(d), p);
    }
    depth_ = depth_of_block<C>(tokens, Product::depth_lines);
    side_ = round_up((std::min<integer>)(features(), 1536), R);
    double const bound = static_cast<double>(memory_bound);
    auto const bytes = [&] {
      return static_cast<double>((side_ + 4 * depth_) * side_ * integer{sizeof(C)});
    };
    while (side_ > R && bytes() > bound) side_ = (std::max)(R, side_ / 2 / R * R);
    if (bytes() > bound) reject_bound(bound, bytes());
    find_far();
  }

  gram_moments operator()() {
    gram_moments m(static_cast<integer>(sites_.size()), tokens_);
    m.path = rflow::gram_path::feature;
    buffer_ = aligned_array<C>(side_ * round_up(side_, N));
    for (int k = 0; k < 2; ++k) {
      rows_[k] = {aligned_array<C>(side_ * depth_), side_};
      cols_[k] = {aligned_array<C>(side_ * depth_), side_};
    }
    auto const tiles_of_all = [&](auto const& f) {
      for (integer row = 0; row < features(); row += side_)
        for (integer col = 0; col <= row; col += side_)
          f(tiles::plan(row, (std::min)(side_, features() - row), col,
                        (std::min)(side_, features() - col), true, [&](block const& b) {
                          return 2 * sites_of(b.row, b.rows).count * sites_of(b.col, b.cols).count;
                        }));
    };
    bool const first = share_.index == 0;
    find_furthest();
    bool const plain =
        far_.empty() && candidates_ == 1 &&
        std::all_of(sites_.begin(), sites_.end(), [](auto const& x) { return x.row_sums.empty(); });
    each_of_share(share_, tiles_of_all, [&](tile const& t) { add_tile(t, m); });
    m.squares.resize(m.diagonal.size());
    if (first && !plain) add_far(m);
    std::vector<int> exponents;
    for (integer p = 0; p < m.sites; ++p) {
      auto const& site = sites_[static_cast<std::size_t>(p)];
      auto const& a = site.norms;
      std::copy(a.begin(), a.end(), m.diagonal.begin() + p * tokens_);
      if (first) {  // what the tiles have too much, once
        for (integer q = 0; q <= p; ++q) m.products.data()[p * m.sites + q] -= diagonals(p, q);
        for (integer i = 0; i < tokens_; ++i)
          if (!is_far(i)) m.row_sums.data()[p * tokens_ + i] = row_sum(p, i);
      }
      if (plain) {  // Σ_j K_mj² = x_mᵀ(XᵀX)x_m − a_m² of the furthest token
        integer const token = furthest(p, 0);
        double const of_it = a.data()[token];
        m.squares.data()[p * tokens_ + token] = quadratic_.data()[p] - (first ? of_it * of_it : 0);
      }
      m.square_sum.data()[p] = m.products.data()[p * m.sites + p] + (first ? about_the_mean(p) : 0);
      double const growth = 1 + std::sqrt(static_cast<double>(tokens_) / (1 << 18));
      m.entry_rounding.data()[p] = unit_roundoff<C> / 2 * std::sqrt(sum_of_pairs(a));
      m.sum_rounding.data()[p] = 4 * unit_roundoff<C> * growth * diagonals(p, p) +
                                 u_centring::floor_of(site.trace, a.size());
      exponents.push_back(site.exponent());
    }
    deliver(sites_, exponents, m);
    return m;
  }

 private:
  struct site_range {
    integer first, count;
  };

  integer features() const { return starts_.back(); }
  std::vector<double> const& norms(integer p) const {
    return sites_[static_cast<std::size_t>(p)].norms;
  }
  double row_sum(integer p, integer i) const {
    auto const& site = sites_[static_cast<std::size_t>(p)];
    return site.row_sums.empty() ? -site.norms.data()[i] : site.row_sums.data()[i];
  }
  /// ⟨x_i − centre, Σ_j (x_j − centre)⟩: 0 about the mean.
  double lean(integer p, integer i) const { return row_sum(p, i) + norms(p).data()[i]; }

  /// Tokens ten times as far out as others, in any site: the furthest, as many as cost little.
  void find_far() {
    std::vector<double> how_far(static_cast<std::size_t>(tokens_));
    for (auto const& site : sites_) {
      if (!has_outlier(site.trace, site.furthest, how_far.size())) continue;
      double const middle = median_of(site.norms);
      for (std::size_t i = 0; i < how_far.size(); ++i)
        if (site.norms[i] > 100 * middle)
          how_far[i] = (std::max)(how_far[i], site.norms[i] / (std::max)(middle, 1e-300));
    }
    for (integer i = 0; i < tokens_; ++i)
      if (how_far.data()[i] > 0) far_.push_back(i);
    integer const most = std::clamp<integer>(features() / 32, 16, 64);
    if (static_cast<integer>(far_.size()) > most) {
      std::nth_element(far_.begin(), far_.begin() + most, far_.end(), [&](integer i, integer j) {
        double const a = how_far.data()[i], b = how_far.data()[j];
        return a > b || (a == b && i < j);
      });
      far_.resize(static_cast<std::size_t>(most));
      std::sort(far_.begin(), far_.end());
    }
  }
  /// The tokens whose share of the kernel matrix is looked at, by site: that with the largest norm, and its
  /// features; where tokens are far out the largest few, for one of those may pair better with the others.
  void find_furthest() {
    constexpr integer most = 16;
    furthest_.clear();
    candidates_ = 1;
    features_of_it_ = aligned_array<double>(features());
    quadratic_.assign(sites_.size(), 0.);
    std::vector<integer> order(static_cast<std::size_t>(tokens_));
    for (integer p = 0; p < static_cast<integer>(sites_.size()); ++p) {
      auto const& site = sites_[static_cast<std::size_t>(p)];
      double const* const a = site.norms.data();
      integer const wanted =
          has_outlier(site.trace, site.furthest, order.size()) ? (std::min)(most, tokens_) : 1;
      std::iota(order.begin(), order.end(), integer{0});
      std::partial_sort(
          order.begin(), order.begin() + wanted, order.end(),
          [&](integer i, integer j) { return a[i] > a[j] || (a[i] == a[j] && i < j); });
      furthest_.emplace_back(order.begin(), order.begin() + wanted);
      candidates_ = (std::max)(candidates_, wanted);
      constexpr integer chunk = 1024;
      alignas(128) C x[chunk + W];
      integer const d = starts_.data()[p + 1] - starts_.data()[p];
      for (integer k = 0; k < d; k += chunk) {
        integer const cols = (std::min)(chunk, d - k);
        site.fetch(furthest(p, 0), 1, k, cols, x, chunk);
        for (integer c = 0; c < cols; ++c)
          features_of_it_[starts_.data()[p] + k + c] = static_cast<double>(x[c]);
      }
    }
  }
  /// The r-th of them; −1 if the site has fewer.
  integer furthest(integer p, integer r) const {
    auto const& of = furthest_[static_cast<std::size_t>(p)];
    return r < static_cast<integer>(of.size()) ? of.data()[r] : -1;
  }
  bool is_far(integer token) const { return std::binary_search(far_.begin(), far_.end(), token); }

  /// Σ a_i b_i over the tokens that the cross-covariances have.
  double diagonals(integer p, integer q) const {
    double sum = 0;
    if (far_.empty()) {
      double const *const a = norms(p).data(), *const b = norms(q).data();
      for (integer i = 0; i < tokens_; ++i) sum += a[i] * b[i];
      return sum;
    }
    for (integer i = 0, next = 0; i < tokens_; ++i)
      if (next < static_cast<integer>(far_.size()) && far_.data()[next] == i)
        ++next;
      else
        sum += norms(p).data()[i] * norms(q).data()[i];
    return sum;
  }

  /// What ‖K̃‖² has more if features are centred at their mean.
  double about_the_mean(integer p) const {
    double const n = static_cast<double>(tokens_);
    if (sites_[static_cast<std::size_t>(p)].row_sums.empty()) return 0;
    double leaning = 0, squares = 0, more = 0;
    for (integer i = 0; i < tokens_; ++i) {
      leaning += lean(p, i);
      squares += lean(p, i) * lean(p, i);
    }
    for (integer i = 0; i < tokens_; ++i) {
      double const a = norms(p).data()[i];
      double const b = a - 2 * lean(p, i) / n + leaning / n / n;
      more += (a - b) * (a + b);
    }
    return more - 2 * squares / n + leaning / n * (leaning / n);
  }

  /// ⟨x, y⟩ of `count` values, a multiple of four packets.
  template <class D>
  static D inner_product(D const* x, D const* y, integer count) {
    using namespace Eigen::internal;
    using P = packet_t<D>;
    constexpr integer L = lanes_v<D>;
    P sum[2] = {pset1<P>(D(0)), pset1<P>(D(0))};
    for (integer k = 0; k < count; k += 2 * L)
      for (integer u = 0; u < 2; ++u)
        sum[u] = pmadd(pload<P>(x + k + u * L), pload<P>(y + k + u * L), sum[u]);
    return predux(padd(sum[0], sum[1]));
  }

  /// Adds the pairs of the tokens far out, and sums of squares of these and of the furthest of a site.
  void add_far(gram_moments& m) {
    integer const count = m.sites, outlying = static_cast<integer>(far_.size()),
                  rows = outlying + candidates_;
    integer widest = 0;
    for (auto const& site : sites_) widest = (std::max)(widest, site.source.cols);
    integer const ld = round_up(widest, 4 * W);
    auto const fetch_rows = [&](integer p, integer token, integer tokens, C* to) {
      constexpr integer chunk = 1024;
      auto const& site = sites_[static_cast<std::size_t>(p)];
      for (integer k = 0; k < site.source.cols; k += chunk)
        site.fetch(token, tokens, k, (std::min)(chunk, site.source.cols - k), to + k, ld);
    };

    aligned_array<C> outer(count * candidates_ * ld, C(0));  // of each site: its furthest tokens
    aligned_array<double> outer_far(count * outlying * ld, 0.);  // and those far out
    auto const token_of = [&](integer p, integer r) {
      return r < outlying ? far_.data()[r] : furthest(p, r - outlying);
    };
    std::vector<double> leaning(sites_.size());
    threads_.run(count, [&](integer p) {
      for (integer i = 0; i < tokens_ && !sites_[static_cast<std::size_t>(p)].row_sums.empty(); ++i)
        leaning.data()[p] += lean(p, i);
      aligned_array<C> row(ld, C(0));
      for (integer r = 0; r < outlying; ++r) {
        fetch_rows(p, far_.data()[r], 1, row.data());
        for (integer k = 0; k < ld; ++k)
          outer_far[(p * outlying + r) * ld + k] = static_cast<double>(row[k]);
      }
      for (integer r = 0; r < candidates_ && furthest(p, r) >= 0; ++r)
        fetch_rows(p, furthest(p, r), 1, outer.data() + (p * candidates_ + r) * ld);
    });

    // Fixed slices of tokens, added up in order.
    constexpr integer group = 8;
    integer const slices = std::clamp<integer>(tokens_ / 64, 1, 64);
    integer const sums = count * count + 2 * count * rows;
    aligned_array<double> parts(slices * sums, 0.);
    double const n = static_cast<double>(tokens_);
    threads_.run(slices, [&](integer s) {
      aligned_array<C> x(group * ld, C(0));
      aligned_array<double> wide(ld), k(group * count * rows);
      double* const products = parts.data() + s * sums;
      double* const squares = products + count * count;
      double* const plain = squares + count * rows;
      integer const end = (s + 1) * tokens_ / slices;
      for (integer from = s * tokens_ / slices; from < end; from += group) {
        integer const here = (std::min)(group, end - from);
        for (integer p = 0; p < count; ++p) {
          fetch_rows(p, from, here, x.data());
          bool const about_mean = sites_[static_cast<std::size_t>(p)].row_sums.empty();
          integer const used = round_up(sites_[static_cast<std::size_t>(p)].source.cols, 4 * W);
          for (integer g = 0; g < here; ++g) {
            C const* const row = x.data() + g * ld;
            std::fill(
                x.data() + g * ld + round_up(sites_[static_cast<std::size_t>(p)].source.cols, W),
                x.data() + g * ld + used, C(0));
            for (integer k0 = 0; k0 < used && outlying > 0; ++k0)
              wide[k0] = static_cast<double>(row[k0]);
            for (integer r = 0; r < rows; ++r) {
              integer const i = from + g, token = token_of(p, r);
              if (token < 0) break;
              double const inner =
                  token == i ? 0
                  : r < outlying
                      ? inner_product(wide.data(), outer_far.data() + (p * outlying + r) * ld, used)
                      : static_cast<double>(inner_product(
                            row, outer.data() + (p * candidates_ + r - outlying) * ld, used));
              double const centred = about_mean ? inner
                                                : inner - (lean(p, i) + lean(p, token)) / n +
                                                      leaning.data()[p] / n / n;
              k[(g * count + p) * rows + r] = inner;
              plain[p * rows + r] += inner;
              squares[p * rows + r] += token == i ? 0 : centred * centred;
            }
          }
        }
        for (integer g = 0; g < here && outlying > 0; ++g) {
          double const weight = is_far(from + g) ? 1 : 2;
          double const* const of = k.data() + g * count * rows;
          for (integer p = 0; p < count; ++p)
            for (integer q = 0; q <= p; ++q) {
              double sum = 0;
              for (integer r = 0; r < outlying; ++r) sum += of[p * rows + r] * of[q * rows + r];
              products[p * count + q] += weight * sum;
            }
        }
      }
    });
    for (integer s = 0; s < slices; ++s) {
      double const* const part = parts.data() + s * sums;
      for (integer k = 0; k < count * count; ++k) m.products.data()[k] += part[k];
      for (integer p = 0; p < count; ++p)
        for (integer r = 0; r < rows; ++r) {
          integer const token = token_of(p, r);
          if (token < 0) break;
          integer const at = p * tokens_ + token, from = count * count + p * rows + r;
          if (r < outlying || !is_far(token)) m.squares.data()[at] += part[from];
          if (r < outlying) m.row_sums.data()[at] += part[from + count * rows];
        }
    }
  }

  site_range sites_of(integer feature, integer count) const {
    integer const first = owner_.data()[feature];
    return {first, owner_.data()[feature + count - 1] - first + 1};
  }

  /// Features in rows, tokens in columns.
  void fetch(integer feature, integer count, integer token, integer tokens, C* to,
             integer ld) const {
    constexpr integer S = small_lanes<C>, chunk = 64;
    alignas(128) C x[chunk * W];
    std::fill_n(x, chunk * W, C(0));
    for (integer f = feature; f < feature + count;) {
      integer const p = owner_.data()[f];
      integer const end = (std::min)((std::min)(f + W, feature + count), starts_.data()[p + 1]);
      for (integer t = 0; t < tokens; t += chunk) {
        integer const here = (std::min)(chunk, tokens - t);
        std::fill(x + here * W, x + chunk * W, C(0));
        sites_[static_cast<std::size_t>(p)].fetch(token + t, here, f - starts_.data()[p], end - f,
                                                  x, W);
        for (auto at = std::lower_bound(far_.begin(), far_.end(), token + t);
             at != far_.end() && *at < token + t + here; ++at)
          std::fill_n(x + (*at - token - t) * W, W, C(0));
        C* const row = to + (f - feature) * ld + t;
        if (end - f == W) {
          for (integer i = 0; i < W; i += S)
            for (integer k = 0; k < round_up(here, S); k += S)
              transpose(Eigen::internal::pset1<small_packet_t<C>>(C(0)), x + k * W + i, W,
                        row + i * ld + k, ld);
        } else {
          for (integer i = 0; i < end - f; ++i)
            for (integer k = 0; k < here; ++k) row[i * ld + k] = x[k * W + i];
        }
        for (integer i = 0; i < end - f; ++i)
          for (integer k = here; t + k < round_up(tokens, W); ++k) row[i * ld + k] = C(0);
      }
      f = end;
    }
  }

  void add_tile(tile const& t, gram_moments& m) {
    integer const blocks = static_cast<integer>(t.blocks.size());
    integer const steps = ceil_div(tokens_, depth_);
    aligned_array<double> sums(t.sums, 0.);
    auto const range = [&](integer s) {
      return depth_range{s * depth_, (std::min)(depth_, tokens_ - s * depth_), depth_};
    };
    packing<Product, C> const panels{t, features(), threads_.size() > 1};
    auto const pack = [&](integer s, integer task) {
      panels(
          task, [&](auto... where) { fetch(where...); }, range(s), rows_[s % 2], cols_[s % 2]);
    };
    auto const multiply = [&](integer s, block const& b) {
      multiply_block<Product>(
          t, b, rows_[s % 2], cols_[s % 2], range(s), s == 0, s + 1 == steps, buffer_.data(),
          [&](integer i, integer j, C const* g) { add_squares(b, i, j, g, sums.data() + b.sums); });
    };
    threads_.run(panels.tasks(), [&](integer i) { pack(0, i); });
    for (integer s = 0; s < steps; ++s) {
      integer const ahead = s + 1 < steps ? panels.tasks() : 0;
      threads_.run(blocks + ahead, [&](integer i) {
        if (i < blocks)
          multiply(s, t.blocks[static_cast<std::size_t>(i)]);
        else
          pack(s + 1, i - blocks);
      });
    }
    for (block const& b : t.blocks) {
      site_range const p = sites_of(b.row, b.rows), q = sites_of(b.col, b.cols);
      for (integer i = 0; i < p.count; ++i)
        for (integer j = 0; j < q.count; ++j)
          if (p.first + i >= q.first + j)
            m.products.data()[(p.first + i) * m.sites + q.first + j] +=
                sums[b.sums + i * q.count + j];
      for (integer i = 0; i < p.count; ++i)
        if (integer const j = p.first + i - q.first; j >= 0 && j < q.count)
          quadratic_.data()[p.first + i] += sums[b.sums + (p.count + i) * q.count + j];
    }
  }

  /// Squares of a micro tile, by the sites of its row and column, and then x_mᵀ(XᵀX)x_m of the furthest
  /// token of a site. Entries above the diagonal are left out; within one site the others count twice.
  void add_squares(block const& b, integer i0, integer j0, C const* g, double* sums) const {
    site_range const p = sites_of(b.row, b.rows), q = sites_of(b.col, b.cols);
    integer const last = b.row + b.rows;
    for (integer j = j0; j < (std::min)(j0 + N, b.col + b.cols); ++j, g += R) {
      integer const of_col = owner_.data()[j];
      for (integer i = (std::max)(i0, j); i < (std::min)(i0 + R, last);) {
        integer const of_row = owner_.data()[i];
        integer const end = (std::min)((std::min)(i0 + R, last), starts_.data()[of_row + 1]);
        double sum = 0, diagonal = 0, along = 0;
        double const* const furthest = features_of_it_.data();
        if (i == j) {
          double const x = static_cast<double>(g[i - i0]);
          diagonal = x * x;
          along = x * furthest[i] / 2;
          ++i;
        }
        if (of_row == of_col)
          for (integer k = i; k < end; ++k) along += static_cast<double>(g[k - i0]) * furthest[k];
        for (; i < end; ++i) {
          double const x = static_cast<double>(g[i - i0]);
          sum += x * x;
        }
        integer const at = (of_row - p.first) * q.count + of_col - q.first;
        sums[at] += (of_row == of_col ? 2 : 1) * sum + diagonal;
        sums[p.count * q.count + at] += 2 * along * furthest[j];
      }
    }
  }

  team& threads_;
  std::vector<prepared_site<C>> const& sites_;
  integer tokens_, depth_ = 0, side_ = 0;
  work_share share_;
  std::vector<integer> starts_, owner_;  // first feature of each site; site of each feature
  std::vector<integer> far_;             // tokens left out of the cross-covariances, in order
  std::vector<std::vector<integer>> furthest_;  // S: the tokens with the largest norms
  integer candidates_ = 1;                      // most of them at a site
  std::vector<double> quadratic_;               // S: x_mᵀ(XᵀX)x_m of it
  aligned_array<double> features_of_it_;
  aligned_array<C> buffer_;
  panel<C> rows_[2], cols_[2];
};

// ---- one matrix at a time -----------------------------------------------------------------------

/// All inner products of m rows of `depth` values, below the diagonal, in one thread: collect(i, j, g)
/// sees each micro tile once. Beside it, m²/2 values of memory.
template <class Product, class C, class Fetch, class Collect>
void inner_products(Fetch const& fetch, integer m, integer depth, Collect const& collect) {
  constexpr integer R = Product::template rows<C>, step = 128;
  tile const t = tiling<Product, C>::plan(0, m, 0, m, true, [](block const&) { return 0; });
  panel<C> rows{aligned_array<C>(round_up(m, R) * step), round_up(m, R)};
  panel<C> cols{aligned_array<C>(round_up(m, R) * step), round_up(m, R)};
  aligned_array<C> products(t.area);
  for (integer k = 0; k < depth; k += step) {
    depth_range const range{k, (std::min)(step, depth - k), step};
    for (integer s = 0; s < ceil_div(m, R); ++s)
      pack_strip<Product, C>(fetch, s * R, (std::min)(R, m - s * R), s, range, false, &rows, &cols);
    for (block const& b : t.blocks)
      multiply_block<Product>(t, b, rows, cols, range, k == 0, k + step >= depth, products.data(),
                              collect);
  }
}

struct third_moments {
  double cubes, triangles;  // Σ U_ij³ and tr U³, over ‖U‖³
};

/// What shuffled_tail and all_orders_tail need of U, n × n, in units of its norm.
/// @param squares          n: Σ_j U_ij²
/// @param numbers, heavy    shuffle_numbers and (pins + 1) × n are written; n × n and no numbers for
///                         at most few_tokens
template <class C>
void find_shuffles(integer n, C const* u, double norm, double const* squares,
                   third_moments const& third, double* numbers, double* heavy) {
  if (!(norm > 0) || !is_finite(norm)) return;  // a site without an answer
  auto const row = [&](integer a, double* out) {
    for (integer i = 0; i < n; ++i) out[i] = static_cast<double>(u[a * n + i]) / norm;
  };
  if (n <= few_tokens) {
    for (integer i = 0; i < n; ++i) row(i, heavy + i * n);
    return;
  }
  auto const times = [&](double const* x, double* out) {
    std::fill_n(out, n, 0.);
    for (integer j = 0; j < n; ++j)  // symmetric: columns are rows
      for (integer i = 0; i < n; ++i) out[i] += x[j] / norm * static_cast<double>(u[j * n + i]);
  };
  std::vector<double> relative(squares, squares + n);
  for (double& x : relative) x = x / norm / norm;
  shuffle_moments const found =
      find_shuffle_moments(n, relative.data(), third.cubes, third.triangles, row, times, heavy);
  std::memcpy(numbers, &found, sizeof found);
}

/// Shifted products of all pairs of sites, Σ_ij U_ij V_{i+s,j+s} modulo n for all s: correlations
/// along the diagonals of U and V, which are products of their Fourier transforms.
class shifted_products {
 public:
  shifted_products(integer n, integer sites)
      : n_(n),
        sites_(sites),
        signals_((n / 2 + 1) / 2),
        spectra_(static_cast<std::size_t>(n * sites * signals_)) {}

  /// What that takes of memory.
  static double bytes(integer n, integer sites) {
    double const tokens = static_cast<double>(n), s = static_cast<double>(sites);
    return 8 * tokens * (s * (tokens / 4 + 1) + s * s) + 8 * tokens * s * s;
  }

  /// Takes over a site's U / norm. Diagonals k and n − k of U hold the same numbers: half of them
  /// do, two in one complex signal.
  template <class C>
  void add(integer site, C const* u, double norm) {
    using complex = std::complex<double>;
    Eigen::FFT<double> transform;
    std::vector<complex> in(static_cast<std::size_t>(n_)), out(in.size());
    for (integer m = 0; m < signals_; ++m) {
      auto const entry = [&](integer k, integer i) {
        if (2 * k > n_) return 0.;
        double const weight = 2 * k == n_ ? 1 : 1.4142135623730951;
        return weight * static_cast<double>(u[i * n_ + (i + k) % n_]) / norm;
      };
      for (integer i = 0; i < n_; ++i)
        in.data()[i] = complex(entry(2 * m + 1, i), entry(2 * m + 2, i));
      transform.fwd(out.data(), in.data(), static_cast<int>(n_));
      for (integer f = 0; f < n_; ++f)
        spectra_.data()[(site * n_ + f) * signals_ + m] = std::complex<float>(out.data()[f]);
    }
  }

  /// sites × sites × n.
  std::vector<double> operator()(team& threads) const {
    using matrix = Eigen::Matrix<std::complex<float>, Eigen::Dynamic, Eigen::Dynamic>;
    std::vector<std::complex<float>> products(static_cast<std::size_t>(n_ * sites_ * sites_));
    threads.run(n_, [&](integer f) {
      Eigen::Map<matrix const, 0, Eigen::OuterStride<>> const x(
          spectra_.data() + f * signals_, signals_, sites_, Eigen::OuterStride<>(n_ * signals_));
      for (integer p = 0; p < sites_; ++p)
        for (integer q = 0; q <= p; ++q)
          products.data()[(p * sites_ + q) * n_ + f] = x.col(p).dot(x.col(q));
    });
    std::vector<double> out(static_cast<std::size_t>(n_ * sites_ * sites_));
    threads.run(sites_, [&](integer p) {
      Eigen::FFT<double> transform;
      std::vector<std::complex<double>> in(static_cast<std::size_t>(n_)), back(in.size());
      for (integer q = 0; q <= p; ++q) {
        std::copy_n(products.data() + (p * sites_ + q) * n_, n_, in.data());
        transform.inv(back.data(), in.data(), static_cast<int>(n_));
        for (integer s = 0; s < n_; ++s) {
          double const t = back.data()[s].real();
          out.data()[(p * sites_ + q) * n_ + s] = t;
          out.data()[(q * sites_ + p) * n_ + (n_ - s) % n_] = t;
        }
      }
    });
    return out;
  }

 private:
  integer n_, sites_, signals_;
  std::vector<std::complex<float>> spectra_;
};

/// Of the U-centred kernel matrix of one site, which is formed whole.
/// @param numbers, heavy  as find_shuffles writes them
template <class Product, class C, class Bound>
third_moments find_third_moments(integer index, prepared_site<C> const& site, Bound const& kernel,
                                 double* numbers, double* heavy, shifted_products* shifted) {
  using namespace Eigen::internal;
  using P = packet_t<C>;
  constexpr integer R = Product::template rows<C>, N = Product::template cols<C>, W = lanes_v<C>;
  integer const n = static_cast<integer>(site.norms.size());
  aligned_array<C> u(n * n, C(0)), token(round_up(n, R) + R + N, C(0));
  aligned_array<C> removed(round_up(n, R) + R + N, C(0));
  for (integer i = 0; i < n; ++i) token[i] = kernel.token(i), removed[i] = kernel.removed(i);
  std::vector<double> shift(static_cast<std::size_t>(n));
  double total = 0;
  auto const form = [&](integer i0, integer j0, C const* g) {
    alignas(128) C column[R];
    for (integer j = j0; j < (std::min)(j0 + N, n); ++j, g += R) {
      for (integer r = 0; r < R; r += W)
        pstore(
            column + r,
            kernel(P(pload<P>(g + r)), P(ploadu<P>(token.data() + i0 + r)), P(pset1<P>(token[j])),
                   P(padd(ploadu<P>(removed.data() + i0 + r), pset1<P>(removed[j])))));
      if constexpr (Bound::repairs)
        for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n) && kernel.outlying(); ++i)
          if (kernel.lost(static_cast<double>(g[i - i0]), kernel.number(i), kernel.number(j)))
            column[i - i0] =
                static_cast<C>(kernel.repair(i, j) -
                               (static_cast<double>(removed[i]) + static_cast<double>(removed[j])));
      for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i) {
        u[i * n + j] = column[i - i0];
        shift.data()[i] += static_cast<double>(column[i - i0]);
        shift.data()[j] += static_cast<double>(column[i - i0]);
      }
    }
  };
  inner_products<Product, C>([&](auto... where) { site.fetch(where...); }, n, site.source.cols,
                             form);
  double const count = static_cast<double>(n);
  for (double& s : shift) {
    total += s;
    s /= count - 2;
  }
  double const offset = total / ((count - 1) * (count - 2));
  double squares = 0, cubes = 0, triangles = 0;
  std::vector<double> row_squares(static_cast<std::size_t>(n));
  for (integer i = 0; i < n; ++i)
    for (integer j = 0; j < i; ++j) {
      double const x =
          static_cast<double>(u[i * n + j]) - shift.data()[i] - shift.data()[j] + offset;
      squares += 2 * x * x;
      row_squares.data()[i] += x * x;
      row_squares.data()[j] += x * x;
      cubes += 2 * x * x * x;
      u[i * n + j] = u[j * n + i] = static_cast<C>(x);
    }
  auto const rows_of_u = [&](integer row, integer rows, integer col, integer cols, C* to,
                             integer ld) {
    for (integer i = 0; i < rows; ++i)
      std::copy_n(u.data() + (row + i) * n + col, cols, to + i * ld);
  };
  inner_products<Product, C>(rows_of_u, n, n, [&](integer i0, integer j0, C const* g) {
    for (integer j = j0; j < (std::min)(j0 + N, n); ++j, g += R)
      for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i)
        triangles += 2 * static_cast<double>(u[i * n + j]) * static_cast<double>(g[i - i0]);
  });
  double const norm = std::sqrt(squares);
  third_moments const found{cubes / norm / norm / norm, triangles / norm / norm / norm};
  find_shuffles(n, u.data(), norm, row_squares.data(), found, numbers, heavy);
  if (shifted) shifted->add(index, u.data(), norm > 0 && is_finite(norm) ? norm : 1);
  return found;
}

/// Adds third moments, if asked for. Sites run side by side, as many as memory holds.
/// @throws std::invalid_argument if the bound does not hold one kernel matrix and a half
template <class Product, class C, class Kernel>
gram_moments with_third_moments(team& threads, std::vector<prepared_site<C>> const& sites,
                                Kernel const& kernel, gram_options const& options, gram_moments m) {
  if (!(options.significance || options.shifts) || m.tokens < 4) return m;
  if (options.shifts && options.share.of > 1)
    throw std::invalid_argument("rflow: shifted tokens are not compared in shares of the work");
  double const n = static_cast<double>(m.tokens), bound = static_cast<double>(options.memory_bound);
  double const bytes = sizeof(C) * n * (1.5 * n + 2 * 128 + Product::template rows<C>);
  double const spectra = options.shifts ? shifted_products::bytes(m.tokens, m.sites) : 0;
  if (bytes + spectra > bound)
    throw std::invalid_argument("rflow: a memory bound of " + std::to_string(options.memory_bound) +
                                " bytes is below the " +
                                std::to_string(std::llround(bytes + spectra)) + " bytes that " +
                                (options.shifts ? "shifts take" : "significance takes") + " for " +
                                std::to_string(m.tokens) + " tokens");
  std::optional<shifted_products> shifted;
  if (options.shifts) shifted.emplace(m.tokens, m.sites);
  integer const at_once = static_cast<integer>((std::min)((bound - spectra) / bytes, 1e6));
  m.cubes.resize(sites.size());
  m.triangles.resize(sites.size());
  bool const few = m.tokens <= few_tokens;
  integer const numbers = few ? 0 : static_cast<integer>(shuffle_numbers);
  integer const rows = m.tokens * (few ? m.tokens : static_cast<integer>(pins) + 1);
  m.shuffles.resize(sites.size() * static_cast<std::size_t>(numbers));
  m.heavy_rows.resize(sites.size() * static_cast<std::size_t>(rows));
  integer const first = options.share.index, step = options.share.of;
  integer const mine = first < m.sites ? ceil_div(m.sites - first, step) : 0;
  for (integer done = 0; done < mine; done += at_once)
    threads.run((std::min)(at_once, mine - done), [&](integer i) {
      integer const site = first + (done + i) * step;
      auto const p = static_cast<std::size_t>(site);
      third_moments const t = find_third_moments<Product>(
          site, sites[p], kernel.template bind<C>(site, sites[p]),
          m.shuffles.data() + site * numbers, m.heavy_rows.data() + site * rows,
          shifted ? &*shifted : nullptr);
      m.cubes[p] = t.cubes;
      m.triangles[p] = t.triangles;
    });
  if (shifted) m.shifts = (*shifted)(threads);
  return m;
}

// ---- the bandwidth ------------------------------------------------------------------------------

/// The median of the squared distances between a site's tokens, scaled: exact for up to 512 tokens,
/// above that over 512 evenly strided ones.
template <class Product, class C>
double median_distance(prepared_site<C> const& site, integer tokens, rbf::median convention) {
  integer const m = (std::min<integer>)(tokens, 512), d = site.source.cols;
  if (m < 2) return 0;
  auto const row = [&](integer i) { return i * tokens / m; };
  auto const fetch = [&](integer r, integer rows, integer col, integer cols, C* to, integer ld) {
    for (integer i = 0; i < rows; ++i) site.fetch(row(r + i), 1, col, cols, to + i * ld, ld);
  };
  constexpr integer R = Product::template rows<C>;
  std::vector<double> distances;
  distances.reserve(static_cast<std::size_t>(m * (m - 1) / 2));

  // Where two tokens are far closer to each other than to the centre, their inner product has lost
  // the distance.
  constexpr double limit = std::is_same_v<C, double> ? 4096 : 8;
  auto const collect = [&](integer i0, integer j0, C const* g) {
    for (integer j = j0; j < j0 + Product::template cols<C>; ++j, g += R)
      for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, m); ++i) {
        double const norms = site.norms.data()[row(i)] + site.norms.data()[row(j)];
        double const distance = norms - 2 * static_cast<double>(g[i - i0]);
        distances.push_back(limit * distance > norms ? distance : site.distance(row(i), row(j)));
      }
  };
  inner_products<Product, C>(fetch, m, d, collect);

  // All pairs: m zeros of the diagonal, then every distance twice.
  bool const all = convention == rbf::median::all_pairs;
  integer const count = static_cast<integer>(distances.size());
  integer const size = all ? m * m : count;
  auto const at = [&](integer k) {
    if (all) k = k < m ? -1 : (k - m) / 2;
    if (k < 0) return 0.;
    std::nth_element(distances.begin(), distances.begin() + k, distances.end());
    return distances[static_cast<std::size_t>(k)];
  };
  double const low = at((size - 1) / 2);
  return (low + at(size / 2)) / 2;
}

// ---- one site at a time -------------------------------------------------------------------------

/// The U-centred linear kernel of one batch of one site, for those who see sites one after the other
/// (see batch_stream). All memory is had at construction.
template <class Product, class C>
class batch_engine {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static constexpr integer W = lanes_v<C>;

 public:
  /// What is left of a site's batch, beside the kernel's entries.
  struct summary {
    double rounding = 0;  // what rounding makes of ‖U‖_F, in the entries' units
    double floor = 0;     // and of ‖U‖²_F beyond that
    int exponent = 0;     // entries times 2^exponent are in units of the data
    status why = status::ok;
  };

  /// Entries below the diagonal of n tokens, and room for them in whole packets.
  static integer entries(integer n) { return n * (n - 1) / 2; }
  static integer room(integer n) { return round_up(entries(n), 8 * W); }

  batch_engine(integer width, integer most)
      : width_(width),
        ld_(round_up(width, sum_step)),
        block_(depth_of_block<C>(width, Product::depth_lines)),
        tile_(tiling<Product, C>::plan(0, most, 0, most, true, [](block const&) { return 0; })),
        x_(round_up(most, 4) * ld_),
        high_(ld_),
        low_(ld_),
        products_(tile_.area),
        rows_{aligned_array<C>(round_up(most, R) * block_, C(0)), round_up(most, R)},
        cols_{aligned_array<C>(round_up(most, R) * block_, C(0)), round_up(most, R)},
        means_(static_cast<std::size_t>(ld_)),
        norms_(static_cast<std::size_t>(round_up(most, R) + R)),
        row_sums_(norms_.size()),
        scratch_(norms_.size()),
        wide_(ld_) {
    by_.shift.reserve(norms_.size());
    by_.removed.reserve(norms_.size());
  }

  /// Writes U_ij of the first n rows, i > j, row after row, and zeros up to room(n).
  /// @param n  from 4 to the number of tokens given at construction
  summary operator()(panel_source<C> const& source, integer n, C* out) {
    summary s = centre(source, n);
    if (s.why != status::ok) {
      std::fill_n(out, room(n), C(0));
      return s;
    }
    fit(n, unit_roundoff<C>);
    multiply(n, out);
    std::fill(out + entries(n), out + room(n), C(0));
    if constexpr (!std::is_same_v<C, double>)
      if (double const norm = norm_of(out, n); by_.rounding > narrow_accuracy * norm)
        multiply_in_double(source, n, out);
    s.rounding = by_.rounding;
    s.floor = by_.floor;
    return s;
  }

 private:
  std::span<double const> first(std::vector<double> const& values, integer n) const {
    return {values.data(), static_cast<std::size_t>(n)};
  }
  void fit(integer n, double unit) {
    by_.fit(first(norms_, n), robust_ ? first(row_sums_, n) : std::span<double const>{}, width_,
            unit);
  }
  static double norm_of(C const* u, integer n) {
    double sum = 0;
    for (integer k = 0; k < entries(n); ++k)
      sum += 2 * static_cast<double>(u[k]) * static_cast<double>(u[k]);
    return std::sqrt(sum);
  }

  void multiply(integer n, C* out) {
    auto const fetch = [&](integer row, integer rows, integer col, integer cols, C* to,
                           integer ld) {
      for (integer i = 0; i < rows; ++i)
        std::copy_n(x_.data() + (row + i) * ld_ + col, cols, to + i * ld);
    };
    auto const finish = [&](integer i0, integer j0, C const* g) {
      for (integer j = j0; j < (std::min)(j0 + N, n); ++j) {
        double const tj = by_.shift.data()[j];
        for (integer i = (std::max)(i0, j + 1); i < (std::min)(i0 + R, n); ++i)
          out[entries(i) + j] = static_cast<C>(static_cast<double>(g[(j - j0) * R + i - i0]) -
                                               (by_.shift.data()[i] + tj));
      }
    };
    for (integer k = 0; k < width_; k += block_) {
      depth_range const range{k, (std::min)(block_, width_ - k), block_};
      for (integer strip = 0; strip * R < n; ++strip)
        pack_strip<Product, C>(fetch, strip * R, (std::min)(R, n - strip * R), strip, range, false,
                               &rows_, &cols_);
      for (block const& b : tile_.blocks)
        if (b.row < n && b.col < n)
          multiply_block<Product>(tile_, b, rows_, cols_, range, k == 0, k + block_ >= width_,
                                  products_.data(), finish);
    }
  }

  /// The same with products in double, for what float cannot tell: without panels, and slow.
  void multiply_in_double(panel_source<C> const& source, integer n, C* out) {
    source(0, n, 0, width_, x_.data(), ld_);
    auto const value = [&](integer i, integer k) {
      return (static_cast<double>(x_[i * ld_ + k]) * scale_ + static_cast<double>(high_[k]) +
              static_cast<double>(low_[k])) *
             rescale_;
    };
    std::fill(means_.begin(), means_.end(), 0.);
    for (integer i = 0; i < n; ++i)
      for (integer k = 0; k < width_; ++k) means_.data()[k] += value(i, k);
    for (integer i = 0; i < n; ++i) {
      norms_.data()[i] = row_sums_.data()[i] = 0;
      for (integer k = 0; k < width_; ++k) {
        double const x = value(i, k);
        norms_.data()[i] += x * x;
        row_sums_.data()[i] += x * (means_.data()[k] - x);
      }
    }
    robust_ = true;
    fit(n, unit_roundoff<double>);
    for (integer i = 1; i < n; ++i) {
      for (integer k = 0; k < width_; ++k) wide_[k] = value(i, k);
      for (integer j = 0; j < i; ++j) {
        double sum[4] = {};
        for (integer k = 0; k < width_; ++k) sum[k % 4] += wide_[k] * value(j, k);
        out[entries(i) + j] = static_cast<C>((sum[0] + sum[1]) + (sum[2] + sum[3]) -
                                             (by_.shift.data()[i] + by_.shift.data()[j]));
      }
    }
  }
  /// Column means of the rows at hand, summed times 2^exponent; false if a sum is not finite.
  bool find_means(integer n, int exponent) {
    std::fill(means_.begin(), means_.end(), 0.);
    for (integer i = 0; i < n; i += 4)
      add_rows(x_.data() + i * ld_, ld_, ld_, exponent, means_.data());
    bool finite = true;
    for (double& mean : means_) {
      finite = finite && is_finite(mean);
      mean = std::ldexp(mean / static_cast<double>(n), -exponent);
    }
    return finite;
  }

  void load(panel_source<C> const& source, integer n) {
    source(0, n, 0, width_, x_.data(), ld_);
    for (integer i = 0; i < round_up(n, 4); ++i)
      std::fill(x_.data() + i * ld_ + (i < n ? width_ : 0), x_.data() + (i + 1) * ld_, C(0));
  }
  void subtract_centre(integer n) {
    using namespace Eigen::internal;
    using P = packet_t<C>;
    std::fill(norms_.begin(), norms_.end(), 0.);
    each_packet(n, [&](C* x, integer k) {
      P const s = pset1<P>(static_cast<C>(scale_));
      pstore(x,
             P(padd(pmadd(pload<P>(x), s, pload<P>(high_.data() + k)), pload<P>(low_.data() + k))));
    });
    add_norms(x_.data(), n, ld_, ld_, norms_.data());
  }
  /// Moves the centre to the mean of the tokens that are closer; see centre_among.
  void centre_among_closer(panel_source<C> const& source, integer n, double limit) {
    std::fill(means_.begin(), means_.end(), 0.);
    double closer = 0;
    for (integer i = 0; i < n; ++i)
      if (norms_.data()[i] <= limit) {
        ++closer;
        for (integer k = 0; k < width_; ++k)
          means_.data()[k] += static_cast<double>(x_[i * ld_ + k]);
      }
    for (integer k = 0; k < width_; ++k) {
      double const high = static_cast<double>(high_[k]);
      double const low = static_cast<double>(low_[k]) - means_.data()[k] / closer;
      high_[k] = static_cast<C>(high + low);
      low_[k] = static_cast<C>((high - static_cast<double>(high_[k])) + low);
    }
    load(source, n);
    subtract_centre(n);
    std::fill(means_.begin(), means_.end(), 0.);
    std::fill_n(wide_.data(), width_, 0.);
    for (integer i = 0; i < n; ++i)
      for (integer k = 0; k < width_; ++k)
        add_in_two(static_cast<double>(x_[i * ld_ + k]), means_.data()[k], wide_[k]);
    for (integer i = 0; i < n; ++i) {
      double sum = 0;
      for (integer k = 0; k < width_; ++k) {
        double const x = static_cast<double>(x_[i * ld_ + k]);
        sum += x * ((means_.data()[k] - x) + wide_[k]);
      }
      row_sums_.data()[i] = sum;
    }
  }

  /// Fills x_ with centred, scaled rows and norms_ with their squared norms; as prepare() does.
  summary centre(panel_source<C> const& source, integer n) {
    using namespace Eigen::internal;
    using P = packet_t<C>;
    robust_ = false;
    load(source, n);
    if (!find_means(n, 0)) {
      for (integer i = 0; i < n * ld_; ++i)
        if (!is_finite(x_[i])) return {0, 0, 0, status::non_finite};
      find_means(n, -64);  // finite doubles whose sum is not
    }
    double const largest =
        static_cast<double>(predux_max(largest_of(x_.data(), n * ld_, pset1<P>(C(0)))));
    if (!(largest > 0)) return {0, 0, 0, status::constant_layer};
    scale_ = power_of_two<C>(-std::ilogb(largest) - 1);
    for (integer k = 0; k < ld_; ++k) {
      double const mean = k < width_ ? means_.data()[k] * scale_ : 0;
      high_[k] = static_cast<C>(-mean);
      low_[k] = static_cast<C>(-mean - static_cast<double>(high_[k]));
    }
    if constexpr (std::is_same_v<C, double>) {  // what is left of the means goes, too
      subtract_centre(n);
      find_means(n, 0);
      for (integer k = 0; k < width_; ++k) low_[k] -= means_.data()[k];
      load(source, n);
    }
    subtract_centre(n);
    double const rounding = rounding_of_means<C>(n) * scaled(largest, scale_);
    double norm = *std::max_element(norms_.begin(), norms_.end());
    if (norm <= rounding * rounding * static_cast<double>(width_))
      return {0, 0, 0, status::constant_layer};
    double trace = 0;
    for (integer i = 0; i < n; ++i) trace += norms_.data()[i];
    if (double const limit = centre_limit(first(norms_, n), trace, norm, scratch_);
        is_finite(limit)) {
      centre_among_closer(source, n, limit);
      norm = *std::max_element(norms_.begin(), norms_.end());
      robust_ = true;
    }
    rescale_ = std::ldexp(1., -std::ilogb(norm) / 2);
    each_packet(n, [&](C* x, integer) {
      pstore(x, P(pmul(pload<P>(x), pset1<P>(static_cast<C>(rescale_)))));
    });
    for (auto* const of : {&norms_, &row_sums_})
      for (double& a : *of) a *= rescale_ * rescale_;
    return {0, 0, -2 * (std::ilogb(scale_) + std::ilogb(rescale_)), status::ok};
  }

  template <class F>
  void each_packet(integer n, F const& f) {
    for (integer i = 0; i < n; ++i)
      for (integer k = 0; k < ld_; k += W) f(x_.data() + i * ld_ + k, k);
  }

  integer width_, ld_, block_;
  tile tile_;
  aligned_array<C> x_, high_, low_, products_;
  panel<C> rows_, cols_;
  std::vector<double> means_, norms_, row_sums_, scratch_;
  aligned_array<double> wide_;  // a row, or what means_ has lost
  u_centring by_;
  double scale_ = 1, rescale_ = 1;
  bool robust_ = false;  // centred among the closer tokens: row_sums_ counts
};

// ---- tokens in several places -------------------------------------------------------------------

/// The rows of one site in several stacks, one after the other.
template <class T>
struct joined_rows {
  std::vector<site_rows<T>> parts;
  std::vector<integer> ends;  // tokens up to the end of each part
};

/// The panel_source of such a site; `site` must outlive it.
template <class C, class T>
panel_source<C> source_of(joined_rows<T> const& site) {
  auto const load = [](void const* self, integer row, integer rows, integer col, integer cols,
                       C* to, integer ld) {
    auto const& s = *static_cast<joined_rows<T> const*>(self);
    auto const first = std::upper_bound(s.ends.begin(), s.ends.end(), row);
    for (auto k = static_cast<std::size_t>(first - s.ends.begin()); rows > 0; ++k) {
      integer const begin = k == 0 ? 0 : s.ends[k - 1], here = (std::min)(rows, s.ends[k] - row);
      source_of<C>(s.parts[k])(row - begin, here, col, cols, to, ld);
      row += here;
      rows -= here;
      to += here * ld;
    }
  };
  return {&site, load, site.parts.front().x.cols};
}

// ---- entries about their own means --------------------------------------------------------------

/// Moments of a kernel whose entries hold constants that U-centring removes. Where these are so large that
/// sums of squares in double lose what they stand for, the entries are formed once more without them.
/// @tparam Engine  a gram_engine
template <class C, class Engine, class Kernel>
gram_moments about_row_means(Engine& engine, Kernel const& kernel, work_share share) {
  gram_moments m = engine(kernel);
  if constexpr (std::is_same_v<C, double> && !std::is_same_v<Kernel, linear_kernel>) {
    // With fewer than 4 tokens there is only biased CKA, which has the diagonal, too.
    double const n = static_cast<double>(m.tokens);
    bool const whole = m.tokens < 4;
    auto const row = [&](integer at) {
      return m.row_sums.data()[at] + (whole ? m.diagonal.data()[at] : 0);
    };
    bool lost = false;
    for (integer p = 0; p < m.sites && m.tokens >= 2 && share.of == 1; ++p) {
      double sum = m.product(p, p);
      for (integer i = p * m.tokens; i < (p + 1) * m.tokens && whole; ++i)
        sum += m.diagonal.data()[i] * m.diagonal.data()[i];
      double const self = whole ? m.h_product(p, p) : m.u_product(p, p);
      lost = lost || (m.why.data()[p] == status::ok && sum > 1e4 * self);
    }
    if (!lost) return m;
    double const rows = whole ? n : n - 2, all = whole ? n * n : (n - 1) * (n - 2);
    std::vector<double> shifts(m.row_sums.size());
    for (integer p = 0; p < m.sites; ++p) {
      double total = 0;
      for (integer i = p * m.tokens; i < (p + 1) * m.tokens; ++i) total += row(i);
      for (integer i = p * m.tokens; i < (p + 1) * m.tokens && is_finite(total); ++i)
        shifts.data()[i] = row(i) / rows - total / (2 * all);
    }
    m = engine(kernel, shifts);
  }
  return m;
}

// ---- what backends call -------------------------------------------------------------------------

template <class C>
std::vector<prepared_site<C>> prepare_all(team& threads,
                                          std::vector<panel_source<C>> const& sources,
                                          integer tokens, bool about_mean) {
  std::vector<prepared_site<C>> sites;
  for (auto const& source : sources) sites.push_back(prepare(threads, source, tokens, about_mean));
  return sites;
}

template <class C>
gram_cost count_operations(integer tokens, std::vector<panel_source<C>> const& sources) {
  std::vector<integer> widths;
  for (auto const& source : sources) widths.push_back(source.cols);
  return count_operations(tokens, widths);
}

/// Whether linear moments take the feature path.
inline bool by_features(gram_cost const& cost, gram_path path) {
  return path == gram_path::automatic ? cost.feature < cost.gram : path == gram_path::feature;
}

/// The threads for so many multiply-adds and, if wanted, those of third moments. A thread does 16
/// million of them in 0.3 ms with AVX-512.
template <class C>
crew crew_for(double operations, std::vector<panel_source<C>> const& sources, integer tokens,
              gram_options const& options) {
  double const n = static_cast<double>(tokens), sites = static_cast<double>(sources.size());
  if (options.significance || options.shifts)
    operations += count_operations(tokens, sources).gram + sites * n * n * n / 2;
  return options.workers.sized_for(operations / options.share.of,
                                   static_cast<double>(lanes_v<C>) * (1 << 20));
}

/// The Gram moments of all sites over the same tokens (at least one), for linear_kernel,
/// rbf_kernel or function_kernel.
template <class C, class Kernel, class Product = packed_product>
gram_moments gram(std::vector<panel_source<C>> const& sources, integer tokens, Kernel const& kernel,
                  gram_options const& options) {
  if (sources.empty()) return gram_moments(0, tokens);
  bool features = false;
  double operations = std::numeric_limits<double>::infinity();  // of somebody's function: unknown
  if constexpr (std::is_same_v<Kernel, linear_kernel>) {
    gram_cost const cost = count_operations(tokens, sources);
    features = by_features(cost, options.path);
    operations = features ? cost.feature : cost.gram;
  }
  team threads(crew_for(operations, sources, tokens, options));
  auto const sites = prepare_all(threads, sources, tokens, Kernel::about_mean);
  gram_moments m;  // the engines are gone before third moments take their memory
  if (features)
    m = feature_engine<Product, C>(threads, sites, tokens, options.memory_bound, options.share)();
  else
    m = [&] {
      gram_engine<Product, C> engine(threads, sites, tokens, options.memory_bound, options.share);
      return about_row_means<C>(engine, kernel, options.share);
    }();
  return with_third_moments<Product>(threads, sites, kernel, options, std::move(m));
}

/// The same for an RBF kernel: with the σ given, or from the medians of this data.
template <class C, class Product = packed_product>
gram_moments gram_rbf(std::vector<panel_source<C>> const& sources, integer tokens,
                      rbf const& kernel, gram_options const& options) {
  if (sources.empty()) return gram_moments(0, tokens);
  double const pairs = static_cast<double>(tokens) * static_cast<double>(tokens) / 2;
  double const exponentials = 64 * pairs * static_cast<double>(sources.size());
  team threads(
      crew_for(count_operations(tokens, sources).gram + exponentials, sources, tokens, options));
  auto const sites = prepare_all(threads, sources, tokens, rbf_kernel::about_mean);
  rbf_kernel k{kernel.sigma};
  if (k.sigma.empty()) {
    k.sigma.resize(sites.size());
    threads.run(static_cast<integer>(sites.size()), [&](integer p) {
      auto const& site = sites[static_cast<std::size_t>(p)];
      double const median = median_distance<Product>(site, tokens, kernel.convention);
      k.sigma.data()[p] = kernel.fraction * std::sqrt(median) / site.some_scale();
    });
  }
  gram_moments m = [&] {
    gram_engine<Product, C> engine(threads, sites, tokens, options.memory_bound, options.share);
    return about_row_means<C>(engine, k, options.share);
  }();
  m = with_third_moments<Product>(threads, sites, k, options, std::move(m));
  for (std::size_t p = 0; p < sites.size(); ++p)
    if (!(k.sigma[p] > 0) && m.why[p] == status::ok) m.why[p] = status::zero_bandwidth;
  m.sigma = std::move(k.sigma);
  return m;
}

}  // namespace rflow::detail
