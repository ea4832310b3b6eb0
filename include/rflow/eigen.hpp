// SPDX-License-Identifier: Apache-2.0
#pragma once

// on_cpu: the default backend. Reads each activation once for the flow moments and builds each
// Gram tile once for the Gram moments, on threads of its own. Also lets every Eigen object that has
// storage be passed where activations are expected.
//
// Results are the same, bit for bit, for every number of threads: work is cut by the shape of the
// data alone and sums are added in a fixed order.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <Eigen/Core>

// Before anything that an older Eigen does not have.
static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0),
              "rflow: Eigen 3.4 or newer is needed: put its directory first among the include "
              "directories, or set Eigen3_DIR for CMake");

#include <rflow/gram.hpp>
#include <rflow/moments.hpp>
#include <rflow/softmax.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow {

// ---- Eigen objects as activations ---------------------------------------------------------------

namespace detail {

/// Eigen's 16-bit types have the same bits as ours.
template <class Scalar>
struct from_eigen {
  using type = Scalar;
};
template <>
struct from_eigen<Eigen::half> {
  using type = f16;
};
template <>
struct from_eigen<Eigen::bfloat16> {
  using type = bf16;
};

template <class X>
concept eigen_object = std::is_base_of_v<Eigen::EigenBase<X>, X>;

/// Maps, blocks and the like are gone at the end of a statement, what they look at is not. A Ref to
/// const may have a copy of its own.
template <class X>
struct eigen_lifetime {
  static constexpr bool borrowed = true;
};
template <class X>
requires std::is_base_of_v<Eigen::PlainObjectBase<X>, X>
struct eigen_lifetime<X> {
};
template <class X, int Options, class Stride>
struct eigen_lifetime<Eigen::Ref<X const, Options, Stride>> {};

template <class X>
inline constexpr bool eigen_has_storage = (Eigen::internal::traits<X>::Flags &
                                           Eigen::DirectAccessBit) != 0;

}  // namespace detail

/// Matrices, maps, refs and blocks of either storage order; rows are tokens.
template <detail::eigen_object X>
struct adapt<X> : detail::eigen_lifetime<X> {
  static_assert(detail::eigen_has_storage<X>,
                "rflow: this Eigen expression has no storage to look at. Evaluate it first: "
                "Eigen::MatrixXf x = expression;");
  using type = typename detail::from_eigen<typename X::Scalar>::type;  ///< ours for the scalar

  /// The elements where they are.
  static view<type> as_view(X const& x) {
    return {reinterpret_cast<type const*>(x.data()), x.rows(), x.cols(), x.rowStride(),
            x.colStride()};
  }
};

// ---- the flow pass ------------------------------------------------------------------------------

namespace detail {

// Packets are builtin vector types, whose attributes g++ reports as lost in template arguments.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace packet = Eigen::internal;

template <class C>
using packet_of = typename packet::packet_traits<C>::type;
template <class C>
inline constexpr std::ptrdiff_t lanes_of = packet::packet_traits<C>::size;

/// As many features as one load brings: 16-bit features come two to a lane, hence two packets.
template <class T>
struct chunk {
  static constexpr std::ptrdiff_t lanes = lanes_of<compute_t<T>>;
  static constexpr std::ptrdiff_t packets = sizeof(T) == 2 && lanes > 1 ? 2 : 1;
  static constexpr std::ptrdiff_t width = packets * lanes;

  packet_of<compute_t<T>> at[packets];
};

/// Lanes whose upper half holds a 16-bit value, as float.
template <class T, class P, class Int>
P widened_lanes(Int const& upper_half) {
  if constexpr (std::same_as<T, bf16>) {
    return packet::preinterpret<P>(upper_half);
  } else {
    // As f16 does it: sign apart, rebias the exponent as an integer. A subnormal becomes normal by
    // one exact subtraction of normal floats, so that it survives flush-to-zero; what was infinite
    // or NaN then stands at 2^16 or above and gets its exponent bits back.
    auto const constant = [](std::int32_t x) { return packet::pset1<Int>(x); };
    auto const number = [](float x) { return packet::pset1<P>(x); };
    Int const sign = packet::pand(upper_half, constant((std::numeric_limits<int>::min)()));
    Int const magnitude =
        packet::plogical_shift_right<3>(packet::pand(upper_half, constant(0x7fff0000)));
    P const normal = packet::preinterpret<P>(packet::padd(magnitude, constant(112 << 23)));
    P const subnormal = packet::psub(
        packet::preinterpret<P>(packet::padd(magnitude, constant(113 << 23))), number(0x1p-14f));
    P const value = packet::pselect(packet::pcmp_lt(normal, number(0x1p-14f)), subnormal, normal);
    P const special = packet::pand(packet::pcmp_le(number(65536.0f), value),
                                   number(std::numeric_limits<float>::infinity()));
    return packet::por(packet::por(value, special), packet::preinterpret<P>(sign));
  }
}

/// Whether the instruction set widens f16 by itself. It does so exactly, subnormals too, whatever is
/// flushed to zero.
template <class T, class P>
inline constexpr bool widens = std::same_as<T, f16>&& requires(P const& x) {
  _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_castps_si512(x)));
};

/// A chunk widened to compute_t<T>. 16-bit features may come out permuted, the same way for every
/// row: inner products do not care, and place_of() says which is which.
template <class T>
chunk<T> load_chunk(T const* from) {
  using P = packet_of<compute_t<T>>;
  if constexpr (widens<T, P>) {
    P const both = packet::ploadu<P>(reinterpret_cast<float const*>(from));
    return {{_mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_castps_si512(both))),
             _mm512_cvtph_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(both), 1))}};
  } else if constexpr (chunk<T>::packets == 2) {
    using Int = typename packet::unpacket_traits<P>::integer_packet;
    Int const both = packet::ploadu<Int>(reinterpret_cast<std::int32_t const*>(from));
    Int const upper = packet::pset1<Int>(static_cast<std::int32_t>(0xffff0000u));
    P const low = widened_lanes<T, P, Int>(packet::plogical_shift_left<16>(both));
    P const high = widened_lanes<T, P, Int>(packet::pand(both, upper));
    constexpr bool low_first = std::endian::native == std::endian::little;
    return {{low_first ? low : high, low_first ? high : low}};
  } else if constexpr (std::same_as<T, compute_t<T>>) {
    return {{packet::ploadu<P>(from)}};
  } else {
    return {{static_cast<P>(*from)}};
  }
}

/// Where feature j stands in a row read by load_chunk.
template <class T>
std::ptrdiff_t place_of(std::ptrdiff_t j) {
  if constexpr (chunk<T>::packets == 1 || widens<T, packet_of<compute_t<T>>>) return j;
  std::ptrdiff_t const within = j % chunk<T>::width;
  return j - within + within % 2 * chunk<T>::lanes + within / 2;
}

/// Sums of unit vectors of a sequence that is not over yet, S × padded, features in their places.
struct open_sequence {
  // padded × S, site after site, whatever EIGEN_DEFAULT_TO_ROW_MAJOR says
  Eigen::Array<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor> sum;
  std::vector<double> units;  // S: number of terms

  open_sequence(std::ptrdiff_t sites, std::ptrdiff_t padded)
      : sum(decltype(sum)::Zero(padded, sites)), units(static_cast<std::size_t>(sites)) {}

  void clear() {
    sum.setZero();
    std::fill(units.begin(), units.end(), 0.0);
  }
  void add(open_sequence const& more) {
    sum += more.sum;
    for (std::size_t l = 0; l < units.size(); ++l) units[l] += more.units[l];
  }
  void close(flow_moments& m) {
    for (std::size_t l = 0; l < units.size(); ++l)
      m.end_sequence(l, sum.col(static_cast<Eigen::Index>(l)).square().sum(), units[l]);
    clear();
  }
};

/// Inner products of one row of the chain with the rows before it.
struct chain_products {
  double norm2 = 0;  // ‖x‖²
  double dot = 0;    // ⟨x, p⟩, p the row before
  double step2 = 0;  // ‖x − p‖²
  double turn = 0;   // ⟨x − p, p − q⟩, q the row before p
  double away2 = 0;  // ‖x − mean of the rows before‖²; that mean is p less what p is off it
};

/// A row as far as it is off the mean of those before it is off the new mean by this share.
template <class C>
C share_off(std::ptrdiff_t rows_before) {
  return static_cast<C>(rows_before) / static_cast<C>(rows_before + 1);
}

/// Whether squares of C neither overflow nor lose their last bits in a row of this squared norm.
template <class C>
bool in_range(double norm2) {
  constexpr bool narrow = std::same_as<C, float>;
  // Through memory: with -ffast-math a compiler may believe that no sum is a NaN.
  double const volatile kept = norm2;
  double const x = kept;
  return is_finite(x) && x > (narrow ? 1e-18 : 1e-270) && x < (narrow ? 1e30 : 1e290);
}

// ---- rows whose squares are not for C: in double, each in units of its own ----------------------

/// Σ f(j) over j < n, in sums that do not wait for each other.
template <class F>
double sum_over(std::ptrdiff_t n, F const& f) {
  constexpr std::ptrdiff_t lanes = 8;
  double part[lanes] = {};
  std::ptrdiff_t j = 0;
  for (; j + lanes <= n; j += lanes)
    for (std::ptrdiff_t k = 0; k < lanes; ++k) part[k] += f(j + k);
  for (; j < n; ++j) part[0] += f(j);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

/// The largest |f(j)|.
template <class F>
double largest_of(std::ptrdiff_t n, F const& f) {
  double most = 0;
  for (std::ptrdiff_t j = 0; j < n; ++j) most = (std::max)(most, std::abs(f(j)));
  return most;
}

/// The features of a row.
template <class T>
struct row_values {
  T const* at;
  std::ptrdiff_t stride = 1;

  double operator()(std::ptrdiff_t j) const { return static_cast<double>(at[j * stride]); }
};

/// x − p, or half of it.
template <class X, class P>
struct row_difference {
  X x;
  P p;
  double part = 1;

  double operator()(std::ptrdiff_t j) const { return x(j) * part - p(j) * part; }
};

/// Values in units of 2^exponent.
template <class F>
struct in_units {
  F values;
  std::ptrdiff_t size;
  int exponent = 0;
  double power = 1, rest = 1;  // 2^−exponent in two factors: one may be out of range

  double operator()(std::ptrdiff_t j) const { return values(j) * power * rest; }
  double square() const {
    return sum_over(size, [&](std::ptrdiff_t j) {
      double const x = (*this)(j);
      return x * x;
    });
  }
  void set(int e) {
    exponent = e;
    power = std::ldexp(1., -(e / 2));
    rest = std::ldexp(1., e / 2 - e);
  }
};

/// In units in which the largest of n values, of this size, is between 1 and 2.
template <class F>
in_units<F> in_units_of(double most, std::ptrdiff_t n, F const& f) {
  in_units<F> out{f, n};
  out.set(most > 0 ? std::ilogb(most) : 0);
  return out;
}
template <class F>
in_units<F> in_own_units(std::ptrdiff_t n, F const& f) {
  return in_units_of(largest_of(n, f), n, f);
}
/// x − p in such units, also where the difference itself has no double.
template <class X, class P>
in_units<row_difference<X, P>> step_in_own_units(std::ptrdiff_t n, X const& x, P const& p) {
  row_difference<X, P> const whole{x, p}, by_half{x, p, 0.5};
  double const most = largest_of(n, whole);
  if (is_finite(most)) return in_units_of(most, n, whole);
  auto out = in_own_units(n, by_half);
  out.exponent += 1;
  return out;
}

template <class A, class B>
double inner_product(A const& a, B const& b) {
  return sum_over(a.size, [&](std::ptrdiff_t j) { return a(j) * b(j); });
}

/// How the steps b and a of one token lie to each other, by a second look at them: what is across b
/// is measured, not left over from squares that nearly cancel.
template <class A, class B>
turn_sum turn_of(A const& a, B const& b) {
  double const b2 = b.square(), c = b2 > 0 ? inner_product(a, b) / b2 : 0;
  turn_sum out;
  out.add(b2, c, sum_over(a.size, [&](std::ptrdiff_t j) {
            double const rest = a(j) - c * b(j);
            return rest * rest;
          }));
  out.before = b.exponent;
  out.after = a.exponent;
  out.settle();
  return out;
}

/// Adds one token to a turn_sum by its products ‖a‖², ⟨a, b⟩ and ‖b‖² in C. Where the steps are so
/// nearly parallel that the part of a across b is a small difference of those, by again().
template <class Again>
void add_turn(turn_sum& to, double a2, double ab, double b2, Again const& again) {
  double const c = b2 > 0 ? ab / b2 : 0;
  if (c * ab > 0.75 * a2)
    to.merge(again());
  else
    to.add(b2, c, a2 - c * ab);
}

/// Walks tokens through the chain, for the part of the moments that is asked for. What each row of
/// activations needs of the rows before it (two of them, and how far the last is off the mean so
/// far, which unlike that mean is no larger than the steps) is fetched from cache
/// once for several sites: with the sums of `Sites` sites in registers, four sites cost little more
/// than the read of their rows from memory.
template <class T>
class flow_walker {
 public:
  using C = compute_t<T>;
  using P = packet_of<C>;

  /// Tokens that walk together, so that unit sums are touched once for all of them.
  static constexpr std::ptrdiff_t group = 4;

  /// Places in a row: the width, rounded up to whole chunks.
  std::ptrdiff_t padded() const { return padded_; }

  flow_walker(layer_stack<T> const& stack, flow_sink const& sink)
      : stack_(stack),
        sink_(sink),
        sites_(stack.sites()),
        width_(stack.width()),
        body_(width_ / chunk<T>::width * chunk<T>::width),
        padded_(body_ + (body_ < width_ ? chunk<T>::width : 0)),
        rows_(count(group * sites_)),
        tails_(count(group * sites_ * chunk<T>::width)),
        gathered_(needs_gather() ? count(group * ring * width_) : 0),
        absent_(count(padded_)),
        off_(group * padded_),
        units_(sites_ * padded_),
        zeros_(Eigen::Array<C, Eigen::Dynamic, 1>::Zero(padded_)),
        products_(count(group * sites_)),
        sequence_(sites_, padded_),
        head_(0, 0) {
    units_.setZero();
  }

  /// Walks tokens begin … end of those that count. `boundaries` are the ends of sequences.
  void walk(std::ptrdiff_t begin, std::ptrdiff_t end,
            std::vector<std::ptrdiff_t> const& boundaries) {
    auto boundary = std::lower_bound(boundaries.begin(), boundaries.end(), begin + 1);
    for (std::ptrdiff_t i = begin; i < end;) {
      std::ptrdiff_t const tokens = (std::min)({group, end - i, *boundary - i});
      walk_group(i, tokens);
      i += tokens;
      for (; boundary != boundaries.end() && *boundary == i; ++boundary) end_sequence();
    }
    flush();
  }

  /// Appends what walk() has seen to the tokens before it, of which `open` is the last sequence, and
  /// forgets it.
  void append_to(flow_moments& total, open_sequence& open) {
    if (has_boundary_) {
      open.add(head_);
      open.close(total);
    }
    open.add(sequence_);
    total.merge(moments_);
    moments_ = flow_moments(sites_, 0);
    sequence_.clear();
    has_boundary_ = false;
  }

 private:
  static constexpr std::ptrdiff_t ring = 8;  // gathered rows kept of a token: more than four + two

  static std::size_t count(std::ptrdiff_t n) { return static_cast<std::size_t>(n); }

  void walk_group(std::ptrdiff_t first, std::ptrdiff_t tokens) {
    first_ = first;
    tokens_ = tokens;
    // Sums of four sites fit 32 vector registers, unless two packets go side by side.
    constexpr bool many = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 && chunk<T>::packets == 1;
    constexpr std::ptrdiff_t most = many ? 4 : 2;
    std::ptrdiff_t l = 0;
    if (sink_.part == flow_part::inter_token) {
      for (; l < sites_; ++l) walk_sites<flow_part::inter_token, 1>(l);
    } else if (sink_.part == flow_part::adjacent) {
      for (; l + 2 <= sites_; l += 2) walk_sites<flow_part::adjacent, 2>(l);
      if (l < sites_) walk_sites<flow_part::adjacent, 1>(l);
    } else {
      if constexpr (most == 4)
        for (; l + 4 <= sites_; l += 4) walk_sites<flow_part::all, 4>(l);
      for (; l + 2 <= sites_; l += 2) walk_sites<flow_part::all, 2>(l);
      if (l < sites_) walk_sites<flow_part::all, 1>(l);
    }
    for (std::ptrdiff_t k = 0; k < tokens; ++k) {
      bool ordinary = true;
      for (l = 0; l < sites_; ++l) ordinary = ordinary && is_ordinary(k, l);
      if (ordinary)
        add_products(k, moments_);
      else
        rescue(k, moments_);
    }
    moments_.tokens += static_cast<double>(tokens);
    pending_ += tokens;
    if (pending_ >= 64) flush();
  }

  /// Moves the unit sums of the last tokens on. Sums in C are short; those of a sequence are double.
  void flush() {
    if (pending_ == 0) return;
    double* const to = sequence_.sum.data();
    C* const from = units_.data();
    for (std::ptrdiff_t j = 0; j < units_.size(); ++j) to[j] += static_cast<double>(from[j]);
    units_.setZero();
    pending_ = 0;
  }

  /// The first sequence to end may have begun before these tokens: kept for append_to.
  void end_sequence() {
    flush();
    if (has_boundary_) return sequence_.close(moments_);
    has_boundary_ = true;
    head_ = sequence_;
    sequence_.clear();
  }

  /// Whether the products in C of a row are good ones.
  bool is_ordinary(std::ptrdiff_t k, std::ptrdiff_t l) {
    chain_products const& r = product(k, l);
    if (!in_range<C>(r.norm2)) return false;
    if (l == 0 || !with_chain() || in_range<C>(r.step2)) return true;
    auto const x = values(k, l), p = values(k, l - 1);
    return x.stride == 1 && p.stride == 1 &&
           std::memcmp(x.at, p.at, count(width_) * sizeof(T)) == 0;
  }

  bool with_units() const { return sink_.part != flow_part::adjacent; }
  bool with_chain() const { return sink_.part == flow_part::all; }

  bool needs_gather() const {
    for (std::ptrdiff_t l = 0; l < sites_; ++l)
      if (stack_[l].col_stride != 1) return true;
    return false;
  }

  /// A row where it lies.
  row_values<T> values(std::ptrdiff_t k, std::ptrdiff_t site) const {
    view<T> const& x = stack_[site];
    return {x.data + stack_.token(first_ + k) * x.row_stride, x.col_stride};
  }
  T const*& row(std::ptrdiff_t k, std::ptrdiff_t site) { return rows_[count(k * sites_ + site)]; }
  T* tail(std::ptrdiff_t k, std::ptrdiff_t site) {
    return tails_.data() + (k * sites_ + site) * chunk<T>::width;
  }
  chain_products& product(std::ptrdiff_t k, std::ptrdiff_t site) {
    return products_[count(k * sites_ + site)];
  }

  /// Finds the dense row of a token at a site and its zero-padded tail.
  void take_row(std::ptrdiff_t k, std::ptrdiff_t site) {
    view<T> const& x = stack_[site];
    T const* from = x.data + stack_.token(first_ + k) * x.row_stride;
    if (x.col_stride != 1) {
      T* const dense = gathered_.data() + (k * ring + site % ring) * width_;
      for (std::ptrdiff_t j = 0; j < width_; ++j) dense[j] = from[j * x.col_stride];
      from = dense;
    }
    row(k, site) = from;
    std::copy(from + body_, from + width_, tail(k, site));
  }

  template <flow_part Part, std::ptrdiff_t Sites>
  void walk_sites(std::ptrdiff_t site) {
    for (std::ptrdiff_t k = 0; k < tokens_; ++k) {
      for (std::ptrdiff_t s = 0; s < Sites; ++s) {
        take_row(k, site + s);
        product(k, site + s) = {};
      }
      std::ptrdiff_t const p = (std::max<std::ptrdiff_t>)(site - 1, 0);
      std::ptrdiff_t const q = (std::max<std::ptrdiff_t>)(site - 2, 0);
      chain_products* const to = &product(k, site);
      C* const off = off_.data() + k * padded_;
      C const* const off_before = site == 0 ? zeros_.data() : off;
      constexpr std::ptrdiff_t block =
          64 * chunk<T>::width;  // features summed in C, then in double
      T const* next[Sites];
      for (std::ptrdiff_t s = 0; s < Sites; ++s) next[s] = wanted_next(k, site + Sites + s);
      for (std::ptrdiff_t j = 0; j < body_; j += block)
        add_chunks<Part, Sites>(&row(k, site), next, row(k, p), row(k, q), j,
                                (std::min)(body_, j + block), off_before, off, site, to);
      if (body_ < padded_) {
        T const* tails[Sites];
        for (std::ptrdiff_t s = 0; s < Sites; ++s) tails[s] = tail(k, site + s);
        add_chunks<Part, Sites>(tails, tails, tail(k, p), tail(k, q), 0, chunk<T>::width,
                                off_before + body_, off + body_, site, to);
      }
    }
    if constexpr (Part != flow_part::adjacent)
      for (std::ptrdiff_t s = 0; s < Sites; ++s) add_units(site + s);
  }

  /// The row that will be read after this one, as far as it can be told: the same token some sites
  /// on, or the next group's at the first sites.
  T const* wanted_next(std::ptrdiff_t k, std::ptrdiff_t site) const {
    std::ptrdiff_t i = first_ + k;
    if (site >= sites_) {
      site -= sites_;
      i += group;
    }
    if (site >= sites_ || i >= stack_.size()) return stack_[0].data;
    return stack_[site].data + stack_.token(i) * stack_[site].row_stride;
  }

  /// Features begin … end of `Sites` rows x[0], x[1], … whose predecessors are p and q. The same
  /// features of the rows in `next` are asked for from memory, where many rows go side by side.
  template <flow_part Part, std::ptrdiff_t Sites>
  static void add_chunks(T const* const* x, T const* const* next, T const* p, T const* q,
                         std::ptrdiff_t begin, std::ptrdiff_t end, C const* off_before, C* off,
                         std::ptrdiff_t site, chain_products* to) {
    constexpr bool chain = Part == flow_part::all, pairs = Part != flow_part::inter_token;
    struct site_sums {
      P norm2, dot, step2, turn, away2, weight;
      T const *x, *next;
    };
    site_sums sums[Sites];
    P const zero = packet::pset1<P>(C(0));
    for (std::ptrdiff_t s = 0; s < Sites; ++s)
      sums[s] = {zero, zero,   zero, zero, zero, packet::pset1<P>(share_off<C>(site + s)),
                 x[s], next[s]};
    for (std::ptrdiff_t j = begin; j < end; j += chunk<T>::width) {
      chunk<T> before, step_before, off_mean;
      if constexpr (pairs) before = load_chunk(p + j);
      if constexpr (chain) {
        step_before = load_chunk(q + j);
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i) {
          step_before.at[i] = packet::psub(before.at[i], step_before.at[i]);
          off_mean.at[i] = packet::ploadu<P>(off_before + j + i * chunk<T>::lanes);
        }
      }
      auto const add = [&](site_sums& sum) {
        chunk<T> const here = load_chunk(sum.x + j);
        if constexpr (chain) __builtin_prefetch(sum.next + j, 0, 2);  // into L2: L1 is full
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i) {
          sum.norm2 = packet::pmadd(here.at[i], here.at[i], sum.norm2);
          if constexpr (pairs) sum.dot = packet::pmadd(here.at[i], before.at[i], sum.dot);
          if constexpr (chain) {
            P const step = packet::psub(here.at[i], before.at[i]);
            P const away = packet::padd(step, off_mean.at[i]);
            sum.step2 = packet::pmadd(step, step, sum.step2);
            sum.turn = packet::pmadd(step, step_before.at[i], sum.turn);
            sum.away2 = packet::pmadd(away, away, sum.away2);
            off_mean.at[i] = packet::pmul(away, sum.weight);
            step_before.at[i] = step;
          }
          if constexpr (pairs) before.at[i] = here.at[i];
        }
      };
      // Written out, because a loop over sites may leave the sums in memory.
      add(sums[0]);
      if constexpr (Sites > 1) add(sums[1]);
      if constexpr (Sites > 2) add(sums[2]), add(sums[3]);
      if constexpr (chain)
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
          packet::pstoreu(off + j + i * chunk<T>::lanes, off_mean.at[i]);
    }
    for (std::ptrdiff_t s = 0; s < Sites; ++s) {
      to[s].norm2 += static_cast<double>(packet::predux(sums[s].norm2));
      if constexpr (pairs) to[s].dot += static_cast<double>(packet::predux(sums[s].dot));
      if constexpr (!chain) continue;
      to[s].step2 += static_cast<double>(packet::predux(sums[s].step2));
      to[s].turn += static_cast<double>(packet::predux(sums[s].turn));
      to[s].away2 += static_cast<double>(packet::predux(sums[s].away2));
    }
  }

  /// Adds the unit vectors of the group's rows at one site.
  void add_units(std::ptrdiff_t site) {
    T const *rows[group], *tails[group];
    P scale[group];
    for (std::ptrdiff_t k = 0; k < group; ++k) {
      bool const counts = k < tokens_ && in_range<C>(product(k, site).norm2);
      rows[k] = counts ? row(k, site) : absent_.data();
      tails[k] = counts ? tail(k, site) : absent_.data();
      scale[k] =
          packet::pset1<P>(counts ? static_cast<C>(1 / std::sqrt(product(k, site).norm2)) : 0);
    }
    C* const units = units_.data() + site * padded_;
    add_scaled(rows, scale, 0, body_, units);
    if (body_ < padded_) add_scaled(tails, scale, 0, chunk<T>::width, units + body_);
  }

  static void add_scaled(T const* const (&rows)[group], P const (&scale)[group],
                         std::ptrdiff_t begin, std::ptrdiff_t end, C* to) {
    for (std::ptrdiff_t j = begin; j < end; j += chunk<T>::width) {
      chunk<T> sum;
      for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
        sum.at[i] = packet::ploadu<P>(to + j + i * chunk<T>::lanes);
      for (std::ptrdiff_t k = 0; k < group; ++k) {
        chunk<T> const x = load_chunk(rows[k] + j);
        for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
          sum.at[i] = packet::pmadd(x.at[i], scale[k], sum.at[i]);
      }
      for (std::ptrdiff_t i = 0; i < chunk<T>::packets; ++i)
        packet::pstoreu(to + j + i * chunk<T>::lanes, sum.at[i]);
    }
  }

  void add_products(std::ptrdiff_t k, flow_moments& m) {
    double norm = 0;
    for (std::ptrdiff_t l = 0; l < sites_; ++l) {
      auto const s = count(l);
      chain_products const& r = product(k, l);
      double const norm_before = norm;
      norm = std::sqrt(r.norm2);
      m.squares[s] += r.norm2;
      sequence_.units[s] += with_units() ? 1 : 0;
      note_norm(l, first_ + k, norm);
      if (l == 0) continue;
      note_cosine(l - 1, first_ + k, r.dot / (norm * norm_before), m);
      if (!with_chain()) continue;
      m.spread += r.away2 * (static_cast<double>(l) / static_cast<double>(l + 1));
      m.steps[s - 1] += r.step2;
      if (l > 1)
        add_turn(m.turns[s - 2], r.step2, r.turn, product(k, l - 1).step2,
                 [&] { return turn_again(k, l); });
    }
  }

  /// How steps l − 1 and l of a token lie to each other, from the rows themselves.
  turn_sum turn_again(std::ptrdiff_t k, std::ptrdiff_t l) const {
    using step = row_difference<row_values<T>, row_values<T>>;
    row_values<T> const x = values(k, l), p = values(k, l - 1), q = values(k, l - 2);
    return turn_of(in_units<step>{{x, p}, width_}, in_units<step>{{p, q}, width_});
  }

  /// A row in units of its own.
  struct careful_row {
    in_units<row_values<T>> x;
    double square = 0;
    std::ptrdiff_t bad = 0;  // first feature that is not finite, or the width

    careful_row(row_values<T> const& values, std::ptrdiff_t width) : x{values, width} {
      while (bad < width && is_finite(values(bad))) ++bad;
      if (!finite()) return;
      x = in_own_units(width, values);
      square = x.square();
    }
    bool finite() const { return bad == x.size; }
  };

  /// The same for a token with a row that is zero, not finite, or too large or small to be squared
  /// in C, or such a step: in double, in units of its own, and each site kept apart from one that
  /// has no value.
  void rescue(std::ptrdiff_t k, flow_moments& m) {
    std::ptrdiff_t const i = first_ + k;
    double const missing = std::numeric_limits<double>::quiet_NaN();
    std::vector<careful_row> rows;
    for (std::ptrdiff_t l = 0; l < sites_; ++l) rows.emplace_back(values(k, l), width_);
    auto const step = [&](std::size_t s) {
      return step_in_own_units(width_, rows[s].x.values, rows[s - 1].x.values);
    };
    for (std::ptrdiff_t l = 0; l < sites_; ++l) {
      auto const s = count(l);
      careful_row const& here = rows[s];
      if (!here.finite()) {
        if (!m.non_finite[s].found()) m.non_finite[s] = {stack_.token(i), here.bad};
        note_norm(l, i, missing);
        if (l > 0) note_cosine(l - 1, i, missing, m);
        continue;
      }
      double const norm = std::sqrt(here.square);
      m.squares[s] += square_sum::of(here.square, here.x.exponent);
      note_norm(l, i, std::ldexp(norm, here.x.exponent));
      bool const added = in_range<C>(product(k, l).norm2);  // by add_units
      if (here.square > 0 || added) {
        sequence_.units[s] += with_units() ? 1 : 0;
        for (std::ptrdiff_t j = 0; with_units() && !added && j < width_; ++j)
          sequence_.sum(place_of<T>(j), l) += here.x(j) / norm;
      } else {
        m.zero_rows[s] += 1;
      }
      if (l == 0) continue;
      careful_row const& before = rows[s - 1];
      bool const both = before.finite() && here.square > 0 && before.square > 0;
      note_cosine(
          l - 1, i,
          both ? inner_product(here.x, before.x) / norm / std::sqrt(before.square) : missing, m);
      if (!with_chain() || !before.finite()) continue;
      auto const a = step(s);
      m.steps[s - 1] += square_sum::of(a.square(), a.exponent);
      if (l > 1 && rows[s - 2].finite()) m.turns[s - 2].merge(turn_of(a, step(s - 1)));
    }
    if (with_chain()) m.spread += spread_of(rows);
  }

  /// Σ_l ‖x_l − mean‖² of a token, from differences to its first row.
  square_sum spread_of(std::vector<careful_row> const& rows) const {
    for (careful_row const& r : rows)
      if (!r.finite()) return 0;  // there is no St2
    using difference = row_difference<row_values<T>, row_values<T>>;
    auto const largest = [&](double part) {
      double most = 0;
      for (careful_row const& r : rows)
        most = (std::max)(most, largest_of(width_, difference{r.x.values, rows[0].x.values, part}));
      return most;
    };
    double part = 1, most = largest(part);
    if (!is_finite(most)) part = 0.5, most = largest(part);
    if (!(most > 0)) return 0;
    std::vector<double> mean(count(width_));
    double sum = 0;
    for (std::size_t l = 0; l < rows.size(); ++l) {
      in_units<difference> move{{rows[l].x.values, rows[0].x.values, part}, width_};
      move.set(std::ilogb(most));
      auto const seen = static_cast<double>(l);
      double away2 = 0;
      for (std::ptrdiff_t j = 0; j < width_; ++j) {
        double const away = move(j) - mean[count(j)];
        away2 += away * away;
        mean[count(j)] += away / (seen + 1);
      }
      sum += away2 * (seen / (seen + 1));
    }
    return square_sum::of(sum, std::ilogb(most) + (part < 1 ? 1 : 0));
  }

  void note_norm(std::ptrdiff_t site, std::ptrdiff_t i, double value) const {
    if (sink_.norm != nullptr) sink_.norm[site * stack_.size() + i] = value;
  }

  /// Pairs with a zero row have no cosine: NaN for the token, left out of the mean.
  void note_cosine(std::ptrdiff_t pair, std::ptrdiff_t i, double value, flow_moments& m) const {
    if (sink_.part == flow_part::inter_token) return;
    if (sink_.cosine != nullptr) sink_.cosine[pair * stack_.size() + i] = value;
    if (is_finite(value)) m.cosine[count(pair)].add(value);
  }

  layer_stack<T> const& stack_;
  flow_sink const& sink_;
  std::ptrdiff_t sites_, width_;
  std::ptrdiff_t body_, padded_;  // features in whole chunks; the same with the tail's chunk
  std::ptrdiff_t first_ = 0, tokens_ = 0;  // the present group
  std::ptrdiff_t pending_ = 0;             // tokens in units_
  std::vector<T const*> rows_;             // group × S: dense rows of the group
  std::vector<T> tails_;                   // group × S × chunk: what is left of each, zero-padded
  std::vector<T> gathered_;                // group × ring × d, where features are strided
  std::vector<T> absent_;                  // zeros, for rows that do not take part
  Eigen::Array<C, Eigen::Dynamic, 1> off_;  // group × padded: how far the last row is off the mean
  Eigen::Array<C, Eigen::Dynamic, 1> units_;  // S × padded: unit vectors of the pending tokens
  Eigen::Array<C, Eigen::Dynamic, 1> zeros_;  // padded: the same before the first row
  std::vector<chain_products> products_;      // group × S
  flow_moments moments_{sites_, 0};           // of width 0: unit sums are kept below
  open_sequence sequence_;                    // the sequence under way
  open_sequence head_;                        // the one under way before these tokens
  bool has_boundary_ = false;
};

// ---- the same, site by site ---------------------------------------------------------------------

/// A chain that arrives site by site: keeps of each token under way its last two rows and how far
/// the last is off the mean of all so far, in numbered slots, and adds to the flow moments as rows
/// come.
template <class T>
class chain_stream {
 public:
  using C = compute_t<T>;
  using P = packet_of<C>;

  chain_stream(std::ptrdiff_t width, int threads)
      : width_(width),
        body_(width / chunk<T>::width * chunk<T>::width),
        padded_(body_ + (body_ < width ? chunk<T>::width : 0)),
        team_(std::make_unique<team>(threads)) {
    for (part& p : parts_) {
      p.units.resize(count(padded_));
      p.tails.resize(count(together * chunk<T>::width));
      p.gathered.resize(count(together * width_));
    }
  }

  /// Places in a row of unit sums: features in their places, up to whole chunks.
  std::ptrdiff_t padded() const { return padded_; }
  std::ptrdiff_t capacity() const { return static_cast<std::ptrdiff_t>(slots_.size()); }
  team& threads() { return *team_; }

  /// Room for this many tokens under way. Those in slots first, first + 1, … (`live` of them, modulo
  /// the old capacity) go to the slots 0, 1, …
  void resize(std::ptrdiff_t tokens, std::ptrdiff_t first = 0, std::ptrdiff_t live = 0) {
    aligned_array<T> rows[2] = {aligned_array<T>(tokens * padded_),
                                aligned_array<T>(tokens * padded_)};
    aligned_array<C> off(tokens * padded_);
    aligned_array<double> steps(tokens * blocks());
    std::vector<slot> fresh(count(tokens));
    for (std::ptrdiff_t i = 0; i < live; ++i) {
      std::ptrdiff_t const from = (first + i) % capacity();
      for (int k = 0; k < 2; ++k)
        std::copy_n(rows_[k].data() + from * padded_, padded_, rows[k].data() + i * padded_);
      std::copy_n(off_.data() + from * padded_, padded_, off.data() + i * padded_);
      std::copy_n(steps_.data() + from * blocks(), blocks(), steps.data() + i * blocks());
      fresh[count(i)] = slots_[count(from)];
    }
    for (int k = 0; k < 2; ++k) rows_[k] = std::move(rows[k]);
    off_ = std::move(off);
    steps_ = std::move(steps);
    slots_ = std::move(fresh);
  }

  /// Whether the token in a slot counts; to be said before its first row comes.
  void set_counts(std::ptrdiff_t at, bool counts) {
    slots_[count(at)] = slot{};
    slots_[count(at)].counts = counts;
  }
  bool counts(std::ptrdiff_t at) const { return slots_[count(at)].counts; }

  /// Takes rows row … row + tokens of x as the rows of `site` for the slots from `at` on. `token` is
  /// the number of the first, for positions. Unit sums in m have padded() places a site.
  void walk(view<T> const& x, std::ptrdiff_t row, std::ptrdiff_t tokens, std::ptrdiff_t site,
            std::ptrdiff_t at, std::ptrdiff_t token, flow_moments& m) {
    // As many slices as the shape gives, not as there are threads: sums stay the same.
    std::ptrdiff_t const slices = std::clamp<std::ptrdiff_t>(tokens / 32, 1, most_slices);
    double* const units = m.unit_sum.data() + site * padded_;
    team_->run(slices, [&](std::ptrdiff_t s) {
      part& mine = parts_[count(s)];
      mine.sums = {};
      if (slices > 1) std::fill(mine.units.begin(), mine.units.end(), 0.0);
      std::ptrdiff_t const begin = tokens * s / slices, end = tokens * (s + 1) / slices;
      for (std::ptrdiff_t i = begin; i < end; ++i)
        take_row(mine, x, row + i, end - i, site, at + i, token + i,
                 slices > 1 ? mine.units.data() : units);
      advance_all(mine, slices > 1 ? mine.units.data() : units);
    });
    auto const l = count(site);
    for (std::ptrdiff_t s = 0; s < slices; ++s) {
      site_sums const& sums = parts_[count(s)].sums;
      m.squares[l] += sums.squares;
      m.zero_rows[l] += sums.zero_rows;
      m.units[l] += sums.units;
      m.spread += sums.spread;
      if (site == 0) m.tokens += sums.tokens;
      if (site > 0) {
        m.steps[l - 1] += sums.steps;
        m.cosine[l - 1].merge(sums.cosine);
      }
      if (site > 1) m.turns[l - 2].merge(sums.turns);
      if (!m.non_finite[l].found()) m.non_finite[l] = sums.non_finite;
      if (slices > 1)
        for (std::ptrdiff_t j = 0; j < padded_; ++j) units[j] += parts_[count(s)].units[count(j)];
    }
  }

 private:
  // Rows that advance together: as many as have their sums in registers.
  static constexpr std::ptrdiff_t together = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 ? 4 : 2;
  static constexpr std::ptrdiff_t most_slices = 16;

  /// A token under way.
  struct slot {
    double norm2 = 0;  // of its last row
    int unit = 0;      // how far it is off its mean is in units of 2^unit
    bool counts = true;
    bool ordinary = true;                    // every row so far can be squared in C
    bool has_last = false, has_two = false;  // whether the last row, and the one before, are finite
  };

  struct site_sums {
    double tokens = 0, zero_rows = 0, units = 0;
    square_sum squares, steps, spread;
    turn_sum turns;
    running_stat cosine;
    position non_finite;
  };

  /// A row on its way: where it is and what it is measured against.
  struct moving_row {
    T const *x, *last;  // features in one piece; the row of the site before
    T* to;              // the row of the site before that, whose place this one takes
    C* off;
    double* steps;  // ‖·‖² of the last step over each block of features
    C scale;        // 1 / ‖x‖
  };

  /// Products of a row with those before it. Blocks of features whose products in C will not do are
  /// looked at again, and kept apart.
  struct row_products {
    double dot = 0, away2 = 0;
    double step2 = 0, turn = 0, before2 = 0;  // ‖a‖², ⟨a, b⟩, ‖b‖² of this step and the one before
    square_sum step_again;
    turn_sum turn_again;
  };

  /// What one slice of a push works with.
  struct part {
    site_sums sums;
    std::vector<double> units;
    std::vector<T> tails, gathered;
    // Rows that wait until there are enough of them.
    moving_row waiting[together];
    slot* whose[together];
    double norm2[together];
    std::ptrdiff_t waiting_count = 0, site = 0;
    std::ptrdiff_t next_x = 0, next_row = 0;  // from those to the rows that will be wanted next
  };

  static std::size_t count(std::ptrdiff_t n) { return static_cast<std::size_t>(n); }

  /// Where the row of a site is kept, as long as that is one of the last two.
  T* place(std::ptrdiff_t site, std::ptrdiff_t at) {
    return rows_[(site + 2) % 2].data() + at * padded_;
  }

  /// Takes one row in, the first of `left` of a slice.
  void take_row(part& mine, view<T> const& x, std::ptrdiff_t row, std::ptrdiff_t left,
                std::ptrdiff_t site, std::ptrdiff_t at, std::ptrdiff_t token, double* units) {
    slot& s = slots_[count(at)];
    if (!s.counts) return;
    std::ptrdiff_t const k = mine.waiting_count;
    T const* from = x.data + row * x.row_stride;
    if (x.col_stride != 1) {
      T* const dense = mine.gathered.data() + k * width_;
      for (std::ptrdiff_t j = 0; j < width_; ++j) dense[j] = from[j * x.col_stride];
      from = dense;
    }
    T* const tail = mine.tails.data() + k * chunk<T>::width;
    std::copy(from + body_, from + width_, tail);
    mine.sums.tokens += 1;
    double const norm2 = add_squares(from, body_) + add_squares(tail, padded_ - body_);
    s.ordinary = s.ordinary && in_range<C>(norm2);
    if (!s.ordinary) return rescue(s, from, site, at, token, units, mine.sums);

    mine.waiting[k] = {from,
                       place(site - 1, at),
                       place(site, at),
                       off_.data() + at * padded_,
                       steps_.data() + at * blocks(),
                       static_cast<C>(1 / std::sqrt(norm2))};
    std::ptrdiff_t const ahead = left > together ? together : 0;
    mine.next_x = x.col_stride == 1 ? ahead * x.row_stride : 0;
    mine.next_row = ahead * padded_;
    mine.whose[k] = &s;
    mine.norm2[k] = norm2;
    mine.site = site;
    if (++mine.waiting_count < together) return;
    mine.waiting_count = 0;
    advance<together>(mine, 0, units);
  }

  /// The rows that still wait.
  void advance_all(part& mine, double* units) {
    for (std::ptrdiff_t k = 0; k < mine.waiting_count; ++k) advance<1>(mine, k, units);
    mine.waiting_count = 0;
  }

  /// Moves ordinary rows on by one site.
  template <std::ptrdiff_t Rows>
  void advance(part& mine, std::ptrdiff_t first, double* units) {
    moving_row const* const rows = mine.waiting + first;
    row_products r[Rows];
    auto const go = [&]<int Before>(std::integral_constant<int, Before>) {
      advance_places<Rows, Before>(rows, body_, mine.next_x, mine.next_row, mine.site, units, r);
      if (body_ == padded_) return;
      moving_row tails[Rows];
      for (std::ptrdiff_t k = 0; k < Rows; ++k)
        tails[k] = {mine.tails.data() + (first + k) * chunk<T>::width,
                    rows[k].last + body_,
                    rows[k].to + body_,
                    rows[k].off + body_,
                    rows[k].steps + ceil_div(body_, block),
                    rows[k].scale};
      advance_places<Rows, Before>(tails, padded_ - body_, 0, 0, mine.site, units + body_, r);
    };
    if (mine.site == 0)
      go(std::integral_constant<int, 0>{});
    else if (mine.site == 1)
      go(std::integral_constant<int, 1>{});
    else
      go(std::integral_constant<int, 2>{});
    for (std::ptrdiff_t k = 0; k < Rows; ++k)
      add_products(*mine.whose[first + k], rows[k], r[k], mine.norm2[first + k], mine.site,
                   mine.sums);
  }

  void add_products(slot& s, moving_row const& row, row_products const& r, double norm2,
                    std::ptrdiff_t site, site_sums& sums) {
    sums.squares += norm2;
    sums.units += 1;
    if (site > 0) {
      double const cosine = r.dot / (std::sqrt(norm2) * std::sqrt(s.norm2));
      if (is_finite(cosine)) sums.cosine.add(cosine);
      double const share = share_off<double>(site);
      if (in_range<C>(r.away2)) {
        sums.spread += r.away2 * share;
      } else {
        auto const off = in_own_units(
            width_, [&](std::ptrdiff_t j) { return static_cast<double>(row.off[place_of<T>(j)]); });
        sums.spread += square_sum::of(off.square() / share, off.exponent);
      }
      sums.steps += r.step2;
      sums.steps += r.step_again;
    }
    if (site > 1) {
      double const c = r.before2 > 0 ? r.turn / r.before2 : 0;
      sums.turns.add(r.before2, c, r.step2 - c * r.turn);
      sums.turns.merge(r.turn_again);
    }
    s.norm2 = norm2;
    s.has_two = s.has_last;
    s.has_last = true;
  }

  static bool far_from_straight(double a2, double ab, double b2) {
    if constexpr (std::same_as<C, float>) return ab * ab < 0.75 * (a2 * b2);
    return ab * (ab / b2) < 0.75 * a2;  // squares of squares may leave the range of double
  }

  /// Adds the step of a row, and how it lies to the one before, over some features, from products in
  /// C if they are good. What is across a step adds up over features as it does over tokens.
  static void add_step(moving_row const& row, std::ptrdiff_t begin, std::ptrdiff_t end,
                       bool has_two, double a2, double ab, row_products& to) {
    double const b2 = std::exchange(row.steps[begin / block], a2);
    if (in_range<C>(a2) && (!has_two || (in_range<C>(b2) && far_from_straight(a2, ab, b2)))) {
      to.step2 += a2;
      if (has_two) to.turn += ab, to.before2 += b2;
      return;
    }
    look_again(row, begin, end, has_two, to);
  }

  /// Kept out of the loop that calls it, whose registers it would take.
  [[gnu::noinline]] static void look_again(moving_row const& row, std::ptrdiff_t begin,
                                           std::ptrdiff_t end, bool has_two, row_products& to) {
    row_values<T> const x{row.x + begin}, p{row.last + begin}, q{row.to + begin};
    auto const a = step_in_own_units(end - begin, x, p);
    to.step_again += square_sum::of(a.square(), a.exponent);
    if (has_two) to.turn_again.merge(turn_of(a, step_in_own_units(end - begin, p, q)));
  }

  static constexpr std::ptrdiff_t block = 64 * chunk<T>::width;  // summed in C, then in double
  std::ptrdiff_t blocks() const { return ceil_div(body_, block) + 1; }

  [[gnu::noinline]] static double add_squares(T const* x, std::ptrdiff_t places) {
    constexpr std::ptrdiff_t chains = 4;  // sums that do not wait for each other
    double total = 0;
    for (std::ptrdiff_t j = 0; j < places; j += block) {
      P sums[chains];
      for (P& sum : sums) sum = packet::pset1<P>(C(0));
      std::ptrdiff_t const end = (std::min)(places, j + block);
      std::ptrdiff_t i = j;
      auto const add = [&](P& sum) {
        chunk<T> const here = load_chunk(x + i);
        for (std::ptrdiff_t c = 0; c < chunk<T>::packets; ++c)
          sum = packet::pmadd(here.at[c], here.at[c], sum);
        i += chunk<T>::width;
      };
      while (i + chains * chunk<T>::width <= end)
        add(sums[0]), add(sums[1]), add(sums[2]), add(sums[3]);
      while (i < end) add(sums[0]);
      for (P const& sum : sums) total += static_cast<double>(packet::predux(sum));
    }
    return total;
  }

  /// Sums over a block of features, as the loop keeps them.
  template <std::ptrdiff_t Rows>
  struct loop_sums {
    P dot[Rows], step2[Rows], turn[Rows], away2[Rows];
  };

  /// Products of features begin … end of rows with those of the row before (at Before ≥ 1) and of the
  /// one before that (at Before = 2); and their unit vectors, added in double, so that it
  /// hardly matters how tokens were grouped. All in one loop: a row comes from memory, and what it
  /// meets from the outer caches, while others are worked on. Without calls, and by itself, or sums would not stay in registers.
  template <std::ptrdiff_t Rows, int Before>
  [[gnu::noinline]] static void advance_block(moving_row const* rows, std::ptrdiff_t begin,
                                              std::ptrdiff_t end, std::ptrdiff_t next_x,
                                              std::ptrdiff_t next_row, C share, double* units,
                                              loop_sums<Rows>& sums) {
    constexpr std::ptrdiff_t width = chunk<T>::width, lanes = chunk<T>::lanes;
    // Vectors of the compiler's: Eigen cannot widen packets, and as a loop this is not vectorised.
    typedef C narrow __attribute__((vector_size(lanes * sizeof(C))));
    typedef double wide __attribute__((vector_size(lanes * sizeof(double))));
    P const weight = packet::pset1<P>(share);
    moving_row row[Rows];
    std::copy_n(rows, Rows, row);
    P dot[Rows], step2[Rows], turn[Rows], away2[Rows];
    unrolled<Rows>([&](std::ptrdiff_t k) __attribute__((always_inline)) {
      dot[k] = step2[k] = turn[k] = away2[k] = packet::pset1<P>(C(0));
    });
    for (std::ptrdiff_t i = begin; i < end; i += width) {
      wide sum[chunk<T>::packets];
      std::memcpy(sum, units + i, sizeof(sum));
      unrolled<Rows>([&](std::ptrdiff_t k) __attribute__((always_inline)) {
        chunk<T> const here = load_chunk(row[k].x + i);
        chunk<T> before{}, two_before{};
        if constexpr (Before > 0) before = load_chunk(row[k].last + i);
        if constexpr (Before > 1) two_before = load_chunk(static_cast<T const*>(row[k].to + i));
        __builtin_prefetch(row[k].x + (i + next_x), 0, 2);
        if constexpr (Before > 0) __builtin_prefetch(row[k].last + (i + next_row), 0, 2);
        if constexpr (Before > 1) __builtin_prefetch(row[k].to + (i + next_row), 0, 2);
        P const scale = packet::pset1<P>(row[k].scale);
        for (std::ptrdiff_t c = 0; c < chunk<T>::packets; ++c) {
          C* const off = row[k].off + i + c * lanes;
          if constexpr (Before == 0) {
            packet::pstore(off, packet::pset1<P>(C(0)));
          } else {
            __builtin_prefetch(off + next_row, 0, 2);
            P const change = packet::psub(here.at[c], before.at[c]);
            P const away = packet::padd(change, packet::pload<P>(off));
            dot[k] = packet::pmadd(here.at[c], before.at[c], dot[k]);
            step2[k] = packet::pmadd(change, change, step2[k]);
            away2[k] = packet::pmadd(away, away, away2[k]);
            packet::pstore(off, packet::pmul(away, weight));
            if constexpr (Before > 1)
              turn[k] =
                  packet::pmadd(change, packet::psub(before.at[c], two_before.at[c]), turn[k]);
          }
          P const unit = packet::pmul(here.at[c], scale);
          sum[c] += __builtin_convertvector(std::bit_cast<narrow>(unit), wide);
        }
      });
      std::memcpy(units + i, sum, sizeof(sum));
    }
    unrolled<Rows>([&](std::ptrdiff_t k) __attribute__((always_inline)) {
      sums.dot[k] = dot[k];
      sums.step2[k] = step2[k];
      sums.turn[k] = turn[k];
      sums.away2[k] = away2[k];
    });
  }

  /// Moves `places` features of rows on, block by block. Each row then takes the place of the one two
  /// sites before.
  template <std::ptrdiff_t Rows, int Before>
  static void advance_places(moving_row const* rows, std::ptrdiff_t places, std::ptrdiff_t next_x,
                             std::ptrdiff_t next_row, std::ptrdiff_t site, double* units,
                             row_products* r) {
    for (std::ptrdiff_t j = 0; j < places; j += block) {
      loop_sums<Rows> sums;
      std::ptrdiff_t const end = (std::min)(places, j + block);
      advance_block<Rows, Before>(rows, j, end, next_x, next_row, share_off<C>(site), units, sums);
      for (std::ptrdiff_t k = 0; k < Rows; ++k) {
        r[k].dot += static_cast<double>(packet::predux(sums.dot[k]));
        r[k].away2 += static_cast<double>(packet::predux(sums.away2[k]));
        if constexpr (Before > 0)
          add_step(rows[k], j, end, Before > 1, static_cast<double>(packet::predux(sums.step2[k])),
                   static_cast<double>(packet::predux(sums.turn[k])), r[k]);
        std::memcpy(rows[k].to + j, rows[k].x + j, count(end - j) * sizeof(T));
      }
    }
  }

  /// A row of a token that cannot do with squares in C: this row or an earlier one is zero, not
  /// finite, or too large or too small. In double, in units of its own.
  void rescue(slot& s, T const* x, std::ptrdiff_t site, std::ptrdiff_t at, std::ptrdiff_t token,
              double* units, site_sums& sums) {
    row_values<T> const here{x}, last{place(site - 1, at)}, two_before{place(site - 2, at)};
    for (std::ptrdiff_t j = 0; j < width_; ++j)
      if (!is_finite(here(j))) {
        if (!sums.non_finite.found()) sums.non_finite = {token, j};
        s.has_two = s.has_last;
        s.has_last = false;
        return;
      }
    auto const own = in_own_units(width_, here);
    double const square = own.square(), norm = std::sqrt(square);
    sums.squares += square_sum::of(square, own.exponent);
    if (square > 0) {
      sums.units += 1;
      for (std::ptrdiff_t j = 0; j < width_; ++j) units[place_of<T>(j)] += own(j) / norm;
    } else {
      sums.zero_rows += 1;
    }
    if (s.has_last) {
      auto const its = in_own_units(width_, last);
      double const square_before = its.square();
      if (square > 0 && square_before > 0)
        sums.cosine.add(inner_product(own, its) / norm / std::sqrt(square_before));
      auto const a = step_in_own_units(width_, here, last);
      sums.steps += square_sum::of(a.square(), a.exponent);
      if (s.has_two) sums.turns.merge(turn_of(a, step_in_own_units(width_, last, two_before)));
    }
    move_off(s, here, last, off_.data() + at * padded_, site, sums);
    std::copy_n(x, width_, place(site, at));
    s.has_two = s.has_last;
    s.has_last = true;
  }

  /// Adds a row to the spread, and moves on how far its token is off the mean, in units of its own.
  /// Without a row before there is no such mean: it is the first, or no St2 is to come.
  void move_off(slot& s, row_values<T> const& x, row_values<T> const& last, C* off,
                std::ptrdiff_t site, site_sums& sums) const {
    if (!s.has_last) {
      std::fill_n(off, padded_, C(0));
      s.unit = 0;
      return;
    }
    double whole = 1;  // or half of everything, where the whole has no double
    auto const away = [&](std::ptrdiff_t j) {
      return x(j) * whole - last(j) * whole +
             static_cast<double>(off[place_of<T>(j)]) * std::ldexp(whole, s.unit);
    };
    double most =
        s.unit < 1000 ? largest_of(width_, away) : std::numeric_limits<double>::infinity();
    if (!is_finite(most)) whole = 0.5, most = largest_of(width_, away);
    int const unit = most > 0 ? std::ilogb(most) : 0;
    double const share = share_off<double>(site);
    double square = 0;
    for (std::ptrdiff_t j = 0; j < width_; ++j) {
      double const value = std::ldexp(away(j), -unit);
      square += value * value;
      off[place_of<T>(j)] = static_cast<C>(value * share);
    }
    s.unit = unit + (whole < 1 ? 1 : 0);
    sums.spread += square_sum::of(square * share, s.unit);
  }

  std::ptrdiff_t width_, body_, padded_;
  std::unique_ptr<team> team_;
  aligned_array<T> rows_[2];     // capacity × padded: rows of the last even and the last odd site
  aligned_array<C> off_;         // capacity × padded, features in their places
  aligned_array<double> steps_;  // capacity × blocks
  std::vector<slot> slots_;      // capacity
  part parts_[most_slices];
};

#pragma GCC diagnostic pop

/// Minibatch CKA of a chain that arrives site by site. The kernel of each batch is formed when its
/// last row has come and kept (half of it, in C) until all sites have it; rows are kept of batches
/// only that a chunk leaves unfinished. A batch never goes across the end of a sequence.
template <class T>
class batch_stream {
  using C = compute_t<T>;
  using engine = batch_engine<packed_product, C>;

 public:
  /// @param batch  tokens of a batch; 0: no CKA is wanted
  batch_stream(std::ptrdiff_t sites, std::ptrdiff_t width, std::ptrdiff_t batch, team& threads)
      : sites_(sites), width_(width), batch_(batch), team_(&threads) {
    if (batch == 0) return;
    for (int i = 0; i < threads.size(); ++i) {
      engines_.emplace_back(width, batch);
      chosen_.emplace_back(count(batch));
    }
    kept_ = aligned_array<T>(sites * batch * width);
    filled_.resize(count(sites));
    products_ = aligned_array<double>(sites * sites);
    multiply_.emplace(sites);
  }

  /// Room for the batches of this many tokens under way. Those of `live` tokens from `first` on, of the
  /// open sequence, are kept.
  void resize(std::ptrdiff_t tokens, std::ptrdiff_t first = 0, std::ptrdiff_t live = 0) {
    if (batch_ == 0) return;
    std::ptrdiff_t const places = ceil_div(tokens, batch_) + 1;
    aligned_array<C> kernels(places * sites_ * stride());
    std::vector<typename engine::summary> summaries(count(places * sites_));
    std::vector<std::ptrdiff_t> sizes(count(places));
    for (std::ptrdiff_t b = first / batch_; live > 0 && b <= (first + live - 1) / batch_; ++b) {
      std::ptrdiff_t const from = b % slots_, to = b % places;
      std::copy_n(kernel(from, 0), sites_ * stride(), kernels.data() + to * sites_ * stride());
      std::copy_n(summaries_.begin() + from * sites_, sites_, summaries.begin() + to * sites_);
      sizes[count(to)] = sizes_[count(from)];
    }
    kernels_ = std::move(kernels);
    summaries_ = std::move(summaries);
    sizes_ = std::move(sizes);
    slots_ = places;
  }

  /// Takes rows row … row + tokens of x, of tokens `token` … of the open sequence. keep(i) says
  /// whether the i-th of them counts.
  template <class Keep>
  void walk(view<T> const& x, std::ptrdiff_t row, std::ptrdiff_t tokens, std::ptrdiff_t site,
            std::ptrdiff_t token, Keep const& keep, minibatch_moments& m) {
    if (batch_ == 0) return;
    std::ptrdiff_t const end = token + tokens;
    std::ptrdiff_t const first_whole = (std::min)(round_up(token, batch_), end);
    std::ptrdiff_t const whole = (std::max<std::ptrdiff_t>)(0, end / batch_ - first_whole / batch_);
    auto const put = [&](std::ptrdiff_t from, std::ptrdiff_t to) {
      for (std::ptrdiff_t t = from; t < to; ++t)
        if (keep(t - token)) put_away(x, row + t - token, site);
    };
    if (first_whole > token) {
      put(token, first_whole);
      if (first_whole % batch_ == 0) finish_kept(site, first_whole / batch_ - 1, m);
    }
    if (whole > 0) {
      std::ptrdiff_t const b0 = first_whole / batch_;
      team_->run(whole, [&](std::ptrdiff_t i, int thread) {
        auto& chosen = chosen_[count(thread)];
        std::ptrdiff_t const begin = (b0 + i) * batch_ - token;
        std::ptrdiff_t n = 0;
        for (std::ptrdiff_t k = begin; k < begin + batch_; ++k)
          if (keep(k)) chosen[count(n++)] = row + k;
        bool const all = n == batch_;
        view<T> y = x;
        if (all) {
          y.data += (row + begin) * x.row_stride;
          y.rows = batch_;
        }
        fill(thread, b0 + i, site, {y, all ? nullptr : chosen.data()}, n);
      });
      for (std::ptrdiff_t i = 0; i < whole && site + 1 == sites_; ++i) reduce(b0 + i, m);
    }
    put(first_whole + whole * batch_, end);
  }

  /// Ends the sequence of this many tokens: its last batch may be a short one.
  void end_sequence(std::ptrdiff_t tokens, minibatch_moments& m) {
    if (batch_ == 0 || tokens % batch_ == 0) return;
    for (std::ptrdiff_t l = 0; l < sites_; ++l) finish_kept(l, tokens / batch_, m);
  }

  void discard() { std::fill(filled_.begin(), filled_.end(), 0); }

 private:
  static std::size_t count(std::ptrdiff_t n) { return static_cast<std::size_t>(n); }
  std::ptrdiff_t stride() const { return engine::room(batch_); }
  C* kernel(std::ptrdiff_t slot, std::ptrdiff_t site) {
    return kernels_.data() + (slot * sites_ + site) * stride();
  }

  void put_away(view<T> const& x, std::ptrdiff_t row, std::ptrdiff_t site) {
    T const* const from = x.data + row * x.row_stride;
    T* const to = kept_.data() + (site * batch_ + filled_[count(site)]++) * width_;
    if (x.col_stride == 1)
      std::copy_n(from, width_, to);
    else
      for (std::ptrdiff_t j = 0; j < width_; ++j) to[j] = from[j * x.col_stride];
  }

  void finish_kept(std::ptrdiff_t site, std::ptrdiff_t b, minibatch_moments& m) {
    std::ptrdiff_t& n = filled_[count(site)];
    fill(0, b, site, {{kept_.data() + site * batch_ * width_, batch_, width_}, nullptr}, n);
    n = 0;
    if (site + 1 == sites_) reduce(b, m);
  }

  void fill(int thread, std::ptrdiff_t b, std::ptrdiff_t site, site_rows<T> const& rows,
            std::ptrdiff_t n) {
    std::ptrdiff_t const slot = b % slots_;
    sizes_[count(slot)] = n;
    if (n >= 4)
      summaries_[count(slot * sites_ + site)] =
          engines_[count(thread)](source_of<C>(rows), n, kernel(slot, site));
  }

  /// Adds the products of all pairs of sites of a batch that every site has.
  void reduce(std::ptrdiff_t b, minibatch_moments& m) {
    std::ptrdiff_t const slot = b % slots_, n = sizes_[count(slot)];
    if (n < 4) {
      ++m.left_out;
      return;
    }
    (*multiply_)(kernel(slot, 0), stride(), engine::room(n), products_.data());
    auto const* const of = summaries_.data() + slot * sites_;
    // In units of the data, but for data whose fourth powers leave the range of double.
    auto const apart = [&](std::ptrdiff_t p) {
      return std::abs(of[p].exponent) > 200 ? of[p].exponent : 0;
    };
    for (std::ptrdiff_t p = 0; p < sites_; ++p)
      if (products_[p * sites_ + p] != 0 || of[p].rounding != 0 || of[p].floor != 0)
        m.raise(p, apart(p));
    auto const raised = [&](std::ptrdiff_t p) { return of[p].exponent - m.exponent[count(p)]; };
    for (std::ptrdiff_t p = 0; p < sites_; ++p) {
      double const self = 2 * products_[p * sites_ + p];
      double const sums = 2 * unit_roundoff<C> * self + of[p].floor;
      double const entries = of[p].rounding;
      m.rounding[count(p)] += std::ldexp(entries * entries + of[p].floor / 16, 2 * raised(p));
      m.error[count(p)] += std::ldexp((std::max)(entries * std::sqrt(self), sums), 2 * raised(p));
      if (of[p].why == status::non_finite) m.why[count(p)] = status::non_finite;
      for (std::ptrdiff_t q = 0; q <= p; ++q) {
        double const sum = std::ldexp(2 * products_[p * sites_ + q], raised(p) + raised(q));
        m.sums[count(p * sites_ + q)] += sum;
        if (q < p) m.sums[count(q * sites_ + p)] += sum;
      }
    }
    m.accuracy = std::is_same_v<C, double> ? wide_accuracy : narrow_accuracy;
    m.tokens += n;
    ++m.batches;
  }

  std::ptrdiff_t sites_, width_, batch_, slots_ = 0;
  team* team_;
  std::vector<engine> engines_;                      // one a thread
  std::vector<std::vector<std::ptrdiff_t>> chosen_;  // one a thread: rows of a batch that count
  aligned_array<T> kept_;                            // S × batch × d: rows of unfinished batches
  std::vector<std::ptrdiff_t> filled_;               // S: how many of them
  aligned_array<C> kernels_;                         // slots × S × half a kernel
  std::vector<typename engine::summary> summaries_;  // slots × S
  std::vector<std::ptrdiff_t> sizes_;                // slots: tokens that count
  aligned_array<double> products_;                   // S × S
  std::optional<row_products<C>> multiply_;
};

}  // namespace detail

// ---- the backend --------------------------------------------------------------------------------

namespace detail {

/// The flow moments of a stack in host memory.
template <class T>
flow_moments host_flow(char const* where, crew of, layer_stack<T> const& stack,
                       flow_sink const& sink) {
  require_one_width(where, stack);
  std::ptrdiff_t const n = stack.size();
  using walker = flow_walker<T>;
  flow_moments total(stack.sites(), 0);
  // All sequences are closed: their unit sums are 0.
  auto const widened = [&] {
    total.width = stack.width();
    total.unit_sum.assign(static_cast<std::size_t>(total.sites * total.width), 0.0);
    return std::move(total);
  };
  if (n == 0) return widened();
  // As many slices as the shape gives, not as there are threads: sums stay the same.
  std::ptrdiff_t const slices = std::clamp<std::ptrdiff_t>(n / (4 * walker::group), 1, 16);
  std::vector<std::ptrdiff_t> const boundaries = stack.boundaries();
  of = of.sized_for(static_cast<double>(stack.sites() * n) * static_cast<double>(stack.width()),
                    1 << 20);
  of.threads = (std::min)(of.threads, static_cast<int>(slices));
  team workers(of);
  std::vector<std::unique_ptr<walker>> walkers(static_cast<std::size_t>(workers.size()));
  std::unique_ptr<open_sequence> open;
  turnstile turns;
  workers.run(slices, [&](std::ptrdiff_t s, int thread) {
    turnstile::pass const pass(turns, s);
    auto& mine = walkers[static_cast<std::size_t>(thread)];
    if (!mine) mine = std::make_unique<walker>(stack, sink);
    mine->walk(n * s / slices, n * (s + 1) / slices, boundaries);
    pass.wait();
    if (!open) open = std::make_unique<open_sequence>(stack.sites(), mine->padded());
    mine->append_to(total, *open);
  });
  return widened();
}

/// One model, in one stack or in several that hold its tokens one after the other.
template <class T>
std::span<layer_stack<T> const> parts_of(layer_stack<T> const& stack) {
  return {&stack, 1};
}
template <class T>
std::span<layer_stack<T> const> parts_of(std::vector<layer_stack<T>> const& stacks) {
  return stacks;
}

template <class T>
T element_of(std::span<layer_stack<T> const>);  // for its type

/// Sites of stacks, as the engine reads them.
template <class C>
class host_sites {
 public:
  explicit host_sites(char const* where) : where_(where) {}

  template <class T>
  void add(std::span<layer_stack<T> const> parts) {
    if (parts.empty()) reject(where_, "no stacks");
    std::vector<std::ptrdiff_t> ends;
    for (layer_stack<T> const& part : parts) {
      require_same_sites(parts.front(), part);
      ends.push_back((ends.empty() ? 0 : ends.back()) + part.size());
    }
    if (!sources.empty() && ends.back() != tokens)
      reject(where_, "the stacks have " + std::to_string(tokens) + " and " +
                         std::to_string(ends.back()) + " tokens");
    tokens = ends.back();
    for (std::ptrdiff_t l = 0; l < parts.front().sites(); ++l) {
      joined_rows<T> site{{}, ends};
      for (layer_stack<T> const& part : parts)
        site.parts.push_back({part[l], part.masked() ? part.selection().data() : nullptr});
      if (parts.size() == 1)
        keep(site.parts.front());
      else
        keep(std::move(site));
    }
    auto const stored = [parts, ends](std::ptrdiff_t token) {
      std::ptrdiff_t before = 0;
      auto const part = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), token) -
                                                 ends.begin());
      for (std::size_t k = 0; k < part; ++k) before += parts[k].all_tokens();
      return before + parts[part].token(token - (part == 0 ? 0 : ends[part - 1]));
    };
    stored_.resize(sources.size(), stored);
  }

  /// Where a token that counts is stored, of all tokens of its stacks.
  std::ptrdiff_t stored_token(std::size_t site, std::ptrdiff_t token) const {
    return stored_[site](token);
  }

  std::vector<panel_source<C>> sources;
  std::ptrdiff_t tokens = 0;

 private:
  template <class T>
  void require_same_sites(layer_stack<T> const& first, layer_stack<T> const& part) const {
    if (part.sites() != first.sites())
      reject(where_, "stacks of one model have " + std::to_string(first.sites()) + " and " +
                         std::to_string(part.sites()) + " sites");
    for (std::ptrdiff_t l = 0; l < first.sites(); ++l)
      if (part[l].cols != first[l].cols)
        reject(where_, "site " + std::to_string(l) + " of one model has " +
                           std::to_string(first[l].cols) + " features in one stack, " +
                           std::to_string(part[l].cols) + " in another");
  }

  template <class Site>
  void keep(Site site) {
    auto owned = std::make_shared<Site const>(std::move(site));
    sources.push_back(source_of<C>(*owned));
    rows_.push_back(std::move(owned));
  }

  char const* where_;
  std::vector<std::shared_ptr<void const>> rows_;
  std::vector<std::function<std::ptrdiff_t(std::ptrdiff_t)>> stored_;  // one a site
};

/// The Gram moments of the sites of several models, with products in C.
template <class C, class Product, class Kernel, class... Models>
gram_moments host_gram_in(char const* where, Kernel const& kernel, gram_options const& options,
                          Models const&... models) {
  host_sites<C> sites(where);
  (sites.add(parts_of(models)), ...);
  auto const& sources = sites.sources;
  std::ptrdiff_t const tokens = sites.tokens;
  if (tokens == 0) return gram_moments(static_cast<std::ptrdiff_t>(sources.size()), 0);

  gram_moments m;
  if constexpr (std::same_as<Kernel, linear>) {
    m = gram<C, linear_kernel, Product>(sources, tokens, linear_kernel{}, options);
  } else if constexpr (std::same_as<Kernel, rbf>) {
    require_bandwidths(where, kernel, static_cast<std::ptrdiff_t>(sources.size()));
    m = gram_rbf<C, Product>(sources, tokens, kernel, options);
  } else {
    static_assert(pair_kernel<Kernel>,
                  "rflow: a kernel is linear, rbf, or a function object "
                  "k(inner product, squared norm, squared norm) -> double");
    m = gram<C, function_kernel<Kernel>, Product>(sources, tokens, {kernel}, options);
  }
  if (std::same_as<Kernel, linear> && tokens < 3 && options.share.index == 0)
    for (std::size_t i = 0; i < m.diagonal.size(); ++i)  // too few to U-centre: G = K, whose rows
      m.row_sums[i] = -m.diagonal[i];                    // sum to 0
  for (std::size_t p = 0; p < sources.size(); ++p)
    if (position& at = m.non_finite[p]; at.found()) at.token = sites.stored_token(p, at.token);
  m.epsilon = unit_roundoff<C>;
  return m;
}

/// The Gram moments of the sites of several models, with the product of a backend. Each is a
/// layer_stack, or a vector of them that hold its tokens one after the other.
///
/// Products are in float unless a stack is double. Where the sums then show that rounding would
/// be seen in a CKA, everything is done again in double; and by kernel matrices, if that is not enough
/// and the path is free. A share cannot see all of the sums, so its products stay as they are.
template <class Product, class Kernel, class... Models>
gram_moments host_gram(char const* where, Kernel const& kernel, gram_options const& options,
                       Models const&... models) {
  constexpr bool wide = (std::same_as<decltype(element_of(parts_of(models))), double> || ...);
  work_share const share = options.share;
  if (share.of < 1 || share.index < 0 || share.index >= share.of)
    reject(where,
           "share " + std::to_string(share.index) + " (from 0) of " + std::to_string(share.of));
  auto const in_double = [&](gram_options const& by) {
    return host_gram_in<double, Product>(where, kernel, by, models...);
  };
  auto const accurate = [&](gram_moments m) {
    m.accuracy = wide ? wide_accuracy : narrow_accuracy;
    return m;
  };
  gram_moments m;
  if constexpr (wide) {
    m = accurate(in_double(options));
  } else {
    m = accurate(host_gram_in<float, Product>(where, kernel, options, models...));
    if (share.of == 1 && !m.resolved()) m = accurate(in_double(options));
  }
  if (share.of == 1 && m.path == gram_path::feature && options.path == gram_path::automatic &&
      !m.resolved()) {
    gram_options by = options;
    by.path = gram_path::gram;
    m = accurate(in_double(by));
  }
  m.shares.assign(static_cast<std::size_t>(share.of), 0);
  m.shares[static_cast<std::size_t>(share.index)] = 1;
  return m;
}

template <class C, class T, class Visit>
void host_softmax_in(char const* where, crew of, std::span<layer_stack<T> const> parts,
                     softmax_problem const& problem, Visit const& visit) {
  using engine = softmax_engine<C>;
  host_sites<C> sites(where);
  sites.add(parts);
  host_sites<double> wide(where);
  if constexpr (!std::same_as<C, double>) wide.add(parts);
  std::ptrdiff_t width = 0;
  for (auto const& source : sites.sources) width = (std::max)(width, source.cols);
  auto const count = static_cast<std::ptrdiff_t>(sites.sources.size());
  bool const side_by_side = engine::side_by_side(count, sites.tokens, width, problem, of.threads);
  team threads(side_by_side ? of : crew{});
  threads.run(count, [&](std::ptrdiff_t l) {
    auto const site = static_cast<std::size_t>(l);
    crew const mine = side_by_side ? crew{} : of;
    engine regression(mine, sites.sources[site], sites.tokens, problem);
    if constexpr (!std::same_as<C, double>)
      if (regression.needs_double()) {
        softmax_engine<double> exact(mine, wide.sources[site], sites.tokens, problem);
        return visit(l, exact);
      }
    visit(l, regression);
  });
}

/// Softmax regressions of all sites of a stack in host memory, or of several with the same sites that
/// hold their tokens one after the other.
template <class Stacks, class Visit>
void host_softmax(char const* where, crew of, Stacks const& stacks, softmax_problem const& problem,
                  Visit const& visit) {
  auto const parts = parts_of(stacks);
  using T = decltype(element_of(parts));
  auto const labels = static_cast<std::ptrdiff_t>(problem.labels.size());
  std::ptrdiff_t tokens = 0;
  for (layer_stack<T> const& part : parts) tokens += part.size();
  if (labels != tokens || labels == 0 ||
      problem.parts.size() != problem.labels.size() * static_cast<std::size_t>(problem.problems))
    reject(where, std::to_string(labels) + " labels and " + std::to_string(problem.parts.size()) +
                      " parts in " + std::to_string(problem.problems) + " problems for " +
                      std::to_string(tokens) + " tokens");
  if constexpr (!std::same_as<T, double>)
    if (problem.in_double) return host_softmax_in<double>(where, of, parts, problem, visit);
  host_softmax_in<compute_t<T>>(where, of, parts, problem, visit);
}

}  // namespace detail

/// Runs on the CPU, with Eigen's vector instructions and threads of its own.
struct on_cpu {
  int threads = 0;  ///< so many; 0: as many as the machine has and the work pays for
  std::size_t memory_bound = std::size_t{256} << 20;  ///< bytes of scratch for Gram tiles
  gram_path path = gram_path::automatic;              ///< how linear Gram moments come about
  bool significance = false;  ///< also what cka_table::p_value needs: n² (d + n) operations a site
  work_share share = {};      ///< gram() does this part of the products; see gram_moments::merge
  bool shifts = false;        ///< significance, and what cka_table::shift_p_value needs: see there

  /// Host memory only.
  template <class Memory>
  static constexpr bool reads = std::same_as<Memory, host_memory>;
  /// What flow_monitor runs on: rows on their way through the chain.
  template <class T>
  using chain_stream = detail::chain_stream<T>;
  /// What flow_monitor runs on: batches for CKA.
  template <class T>
  using batch_stream = detail::batch_stream<T>;

  /// How many threads that is at most; probes and flow_monitor take so many.
  int thread_count() const { return detail::threads_or_all(threads); }

  /// @note  O(S n d) time, one read; 16·S·d doubles of memory
  template <class T>
  flow_moments flow(layer_stack<T> const& stack, flow_sink const& sink = {}) const {
    return detail::host_flow("rflow::on_cpu::flow", {threads}, stack, sink);
  }

  /// @note  S n² d multiply-adds, or (Σd)² n / 2 when those are fewer and the kernel is linear
  /// @throws std::invalid_argument if the stacks differ in tokens, the memory bound is too small
  ///         for one tile (the text says what is needed), or share.index is not
  ///         in [0, share.of)
  template <class Kernel, class... T>
  gram_moments gram(Kernel const& kernel, layer_stack<T> const&... stacks) const {
    return gram_of(kernel, stacks...);
  }

  /// The same for models whose tokens are in several stacks, one after the other: files too large
  /// for one. Stacks of one model have the same sites.
  template <class Kernel, class... T>
  gram_moments gram(Kernel const& kernel, std::vector<layer_stack<T>> const&... models) const {
    return gram_of(kernel, models...);
  }

  /// Softmax regressions of every site; see softmax_backend_for. Sites run side by side where one
  /// alone is too small for all threads, else one after the other.
  /// @note   4·n·d·columns operations a step; weights, two moments and one residual per token and
  ///         column of memory, for each site that runs
  /// @throws std::invalid_argument if the problem has another number of tokens than the stack
  template <class T, class Visit>
  void softmax(layer_stack<T> const& stack, softmax_problem const& problem,
               Visit const& visit) const {
    detail::host_softmax("rflow::on_cpu::softmax", {thread_count()}, stack, problem, visit);
  }

  /// The same for tokens in several stacks with the same sites, one after the other.
  template <class T, class Visit>
  void softmax(std::vector<layer_stack<T>> const& stacks, softmax_problem const& problem,
               Visit const& visit) const {
    detail::host_softmax("rflow::on_cpu::softmax", {thread_count()}, stacks, problem, visit);
  }

 private:
  template <class Kernel, class... Models>
  gram_moments gram_of(Kernel const& kernel, Models const&... models) const {
    detail::gram_options const options{{threads}, memory_bound, path, significance, share, shifts};
    return detail::host_gram<detail::packed_product>("rflow::on_cpu::gram", kernel, options,
                                                     models...);
  }
};

/// What lives in host memory is measured on the CPU.
template <>
struct default_backend<host_memory> {
  using type = on_cpu;  ///< the backend
};

}  // namespace rflow
