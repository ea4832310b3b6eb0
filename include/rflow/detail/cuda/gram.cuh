// SPDX-License-Identifier: Apache-2.0
#pragma once

// The Gram pass on a device.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>

#include <rflow/detail/cuda/centre.cuh>
#include <rflow/detail/cuda/kernels.cuh>
#include <rflow/detail/cuda/tile.cuh>
#include <rflow/detail/numerics.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

/// 2^e with e kept where C has normal numbers to spare.
template <class C>
double power_of_two(int e) {
  constexpr int limit = std::numeric_limits<C>::max_exponent - 8;
  return std::ldexp(1., std::clamp(e, -limit, limit));
}

/// The median of squared distances; 0 of none. All pairs have m zeros of the diagonal among them,
/// and every other distance twice.
template <class C>
double median(std::vector<C>& distances, integer m, rbf::median convention) {
  bool const all = convention == rbf::median::all_pairs;
  integer const size = all ? m * m : static_cast<integer>(distances.size());
  if (m < 2) return 0;
  auto const at = [&](integer k) {
    if (all) k = k < m ? -1 : (k - m) / 2;
    if (k < 0) return 0.;
    std::nth_element(distances.begin(), distances.begin() + k, distances.end());
    return static_cast<double>(distances[size_of(k)]);
  };
  double const low = at((size - 1) / 2);
  return (low + at(size / 2)) / 2;
}

/// The Gram moments of the sites of several sources, with C for products.
template <class Device, class C, class... Sources>
class gram_pass {
  using group = typename Device::group;

  struct places {
    integer side, slice_columns;
    arena::place<double> totals, sums, largest, norms, squares, row_sums, row_parts, col_parts,
        pairs;
    arena::place<column_facts> facts;
    arena::place<integer> bad;
    arena::place<double> kernel_rows;
    arena::place<C> high, low, token, removed, rows, cols, tiles, slices, sample;
  };

 public:
  template <class... Stacks>
  gram_pass(char const* where, Device& on, std::size_t memory_bound, bool sampled,
            Stacks const&... stacks)
      : on_(on),
        sources_(on.source(stacks, memory_, memory_bound / sizeof...(stacks))...),
        tokens_(std::get<0>(std::tie(stacks...)).size()) {
    auto const add = [&](auto const& source) {
      for (integer l = 0; l < source.sites(); ++l) {
        sites_.push_back({source.cols(l), total_cols_});
        total_cols_ += padded(source.cols(l));
        widest_ = std::max(widest_, source.cols(l));
      }
    };
    std::apply([&](auto const&... source) { (add(source), ...); }, sources_);
    chunks_ = ceil_div(widest_, integer{group::size});
    depth_ = round_up(std::min<integer>(widest_, Device::panel_bytes / integer{sizeof(C)}),
                      Device::template depth_multiple<C>);
    choose_side(where, memory_bound, sampled);
  }

  /// Runs everything. make_facts(site, norms, row sums, sigma) gives the kernel of a site once its norms are
  /// known, make_entry(site, sigma) what devices need of it.
  template <class MakeFacts, class MakeEntry>
  gram_moments operator()(MakeFacts const& make_facts, MakeEntry const& make_entry,
                          rbf const* bandwidth = nullptr) {
    auto const owner = on_.allocate(memory_.bytes());
    memory_.settle(owner.data());
    std::apply([&](auto&... source) { (source.start(on_, memory_), ...); }, sources_);
    prepare();

    gram_moments m(count(), tokens_);
    if (bandwidth != nullptr) m.sigma = sigmas(*bandwidth);
    using entry = decltype(make_entry(site_facts{}, 0.));
    std::vector<entry> entries;
    std::vector<kernel_facts> kernels;
    std::vector<C> token(size_of(count() * padded_tokens())), removed(token.size());
    for (integer p = 0; p < count(); ++p) {
      site_facts const& s = sites_[size_of(p)];
      double const sigma = m.sigma.empty() ? 0 : m.sigma[size_of(p)];
      auto const of = [&](std::vector<double> const& all) {
        return std::span<double const>(all).subspan(size_of(p * tokens_), size_of(tokens_));
      };
      entries.push_back(make_entry(s, sigma));
      kernels.push_back(make_facts(
          s, of(norms_), s.about_mean ? std::span<double const>{} : of(kernel_rows_), sigma));
      kernel_facts const& k = kernels.back();
      m.entry_rounding[size_of(p)] = k.rounding;
      m.sum_rounding[size_of(p)] = k.floor;
      for (integer i = 0; i < tokens_; ++i) {
        token[size_of(p * padded_tokens() + i)] = static_cast<C>(k.number[size_of(i)]);
        removed[size_of(p * padded_tokens() + i)] = static_cast<C>(k.removed[size_of(i)]);
        m.diagonal[size_of(p * tokens_ + i)] = k.diagonal[size_of(i)];
      }
    }
    on_.upload(token.data(), static_cast<integer>(token.size()), memory_[at_.token]);
    on_.upload(removed.data(), static_cast<integer>(removed.size()), memory_[at_.removed]);
    on_.zero(memory_[at_.pairs], count() * count());
    on_.zero(memory_[at_.squares], count() * tokens_);
    on_.zero(memory_[at_.row_sums], count() * tokens_);
    for (integer row = 0; row < tokens_; row += at_.side)
      for (integer col = 0; col <= row; col += at_.side)
        add({row, std::min(at_.side, tokens_ - row), col, std::min(at_.side, tokens_ - col),
             at_.side},
            entries);
    m.squares.resize(m.diagonal.size());
    on_.download(memory_[at_.pairs], count() * count(), m.products.data());
    on_.download(memory_[at_.squares], count() * tokens_, m.squares.data());
    on_.download(memory_[at_.row_sums], count() * tokens_, m.row_sums.data());
    on_.wait();
    m.epsilon = static_cast<double>(std::numeric_limits<C>::epsilon()) / 2;
    deliver(kernels, m);
    return m;
  }

  /// Whether products of C may have lost entries that the moments do not tell of.
  bool lost() const { return lost_; }

 private:
  integer count() const { return static_cast<integer>(sites_.size()); }
  /// Columns that a group may look at: the mean of those that are not there is zero.
  static integer padded(integer cols) { return round_up(cols, integer{group::size} * group::held); }
  integer padded_tokens() const { return round_up(tokens_, at_.side); }
  static integer slice_columns(integer side) {
    integer columns = 1;
    while (2 * columns * side <= 4096 && side % (2 * columns) == 0) columns *= 2;
    return columns;
  }

  // ---- memory

  places reserve(arena& memory, integer side, bool sampled) const {
    places at{};
    integer const n = tokens_, s = count(), columns = slice_columns(side);
    integer const strips = ceil_div(side, integer{group::size});
    at.side = side;
    at.slice_columns = columns;
    at.totals = memory.reserve<double>(total_cols_);
    at.facts = memory.reserve<column_facts>(s * chunks_);
    at.sums = memory.reserve<double>(Device::column_slices * widest_);
    at.largest = memory.reserve<double>(Device::column_slices * chunks_);
    at.bad = memory.reserve<integer>(n);
    at.norms = memory.reserve<double>(s * n);
    at.kernel_rows = memory.reserve<double>(s * n);
    at.squares = memory.reserve<double>(s * n);
    at.row_sums = memory.reserve<double>(s * n);
    at.row_parts = memory.reserve<double>(2 * ceil_div(side, tile_columns) * side);
    at.col_parts = memory.reserve<double>(2 * strips * side);
    at.pairs = memory.reserve<double>(s * s);
    at.high = memory.reserve<C>(total_cols_);
    at.low = memory.reserve<C>(total_cols_);
    at.token = memory.reserve<C>(s * round_up(n, side));
    at.removed = memory.reserve<C>(s * round_up(n, side));
    integer const widest_side =  // the rows' panel holds the sample, too
        sampled ? std::max(side, sample_side()) : side;
    at.rows = memory.reserve<C>(widest_side * depth_);
    at.cols = memory.reserve<C>(side * depth_);
    at.tiles = memory.reserve<C>(s * side * side);
    at.slices = memory.reserve<C>(side / columns * s * s);
    at.sample = memory.reserve<C>(sampled ? sample_side() * sample_side() : 0);
    return at;
  }

  integer sample_side() const {
    return round_up(sample_size(tokens_), Device::template side_multiple<C>);
  }

  void choose_side(char const* where, std::size_t memory_bound, bool sampled) {
    constexpr integer multiple = Device::template side_multiple<C>;
    for (integer cuts = 1;; ++cuts) {
      integer const side = round_up(ceil_div(tokens_, cuts), multiple);
      arena trial = memory_;
      places const at = reserve(trial, side, sampled);
      if (side <= round_up(most_rows(), multiple) && side <= Device::most_side &&
          trial.bytes() <= memory_bound) {
        memory_ = trial;
        at_ = at;
        return;
      }
      if (side == multiple)
        reject(where, "a memory bound of " + std::to_string(memory_bound) + " bytes is below the " +
                          std::to_string(trial.bytes()) + " bytes of the smallest tile");
    }
  }

  integer most_rows() const {
    integer most = tokens_;
    std::apply(
        [&](auto const&... source) { ((most = std::min(most, source.most_rows(tokens_))), ...); },
        sources_);
    return most;
  }

  // ---- preparation

  template <class F>
  void with_source(integer p, F const& f) {
    auto const visit = [&](auto& source) {
      if (p >= 0 && p < source.sites()) f(source, p);
      p -= source.sites();
    };
    std::apply([&](auto&... source) { (visit(source), ...); }, sources_);
  }

  /// f(rows, first, count) over all tokens of a site, in as many parts as its source needs.
  template <class F>
  void each_part(integer p, F const& f) {
    with_source(p, [&](auto& source, integer local) {
      integer const most = source.most_rows(tokens_);
      for (integer first = 0; first < tokens_; first += most) {
        integer const count = std::min(most, tokens_ - first);
        f(source.rows(local, first, count), first, count);
        source.release();
      }
    });
  }

  void add_columns(integer p) {
    site_facts const& s = sites_[size_of(p)];
    integer const chunks = ceil_div(s.cols, integer{group::size});
    on_.zero(memory_[at_.totals] + s.first_col, padded(s.cols));
    column_facts* const facts = memory_[at_.facts] + p * chunks_;
    std::vector<column_facts> const none(size_of(chunks_), {0, true});
    on_.upload(none.data(), chunks_, facts);
    each_part(p, [&]<class T>(token_rows<T> const& x, integer, integer rows) {
      integer const slice = round_up(ceil_div(rows, Device::column_slices), 4);
      integer const slices = ceil_div(rows, slice);
      on_.each_group(slices * chunks, sum_columns<T, C>{x, rows, slice, s.pre, memory_[at_.sums],
                                                        memory_[at_.largest]});
      on_.each_group(chunks,
                     fold_columns{s.cols, slices, chunks, memory_[at_.sums], memory_[at_.largest],
                                  memory_[at_.totals] + s.first_col, facts});
    });
  }

  /// Reads back what is known of the columns; returns whether all their sums are finite.
  std::vector<bool> read_facts() {
    std::vector<column_facts> facts(size_of(count() * chunks_));
    on_.download(memory_[at_.facts], static_cast<integer>(facts.size()), facts.data());
    on_.wait();
    std::vector<bool> finite(sites_.size(), true);
    for (std::size_t i = 0; i < facts.size(); ++i) {
      std::size_t const p = i / size_of(chunks_);
      sites_[p].largest = std::max(sites_[p].largest, facts[i].largest);
      finite[p] = finite[p] && facts[i].finite;
    }
    return finite;
  }

  position first_bad(integer p) {
    position out;
    std::vector<integer> bad(size_of(tokens_));
    each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
      on_.each_group(rows, find_bad<T>{x, memory_[at_.bad] + first});
    });
    on_.download(memory_[at_.bad], tokens_, bad.data());
    on_.wait();
    for (integer t = 0; t < tokens_ && !out.found(); ++t)
      if (bad[size_of(t)] >= 0) out = {t, bad[size_of(t)]};
    return out;
  }

  centring<C> centre(integer p) const {
    site_facts const& s = sites_[size_of(p)];
    return {static_cast<C>(s.scale), memory_[at_.high] + s.first_col,
            memory_[at_.low] + s.first_col};
  }

  void write_means(integer p) {
    site_facts const& s = sites_[size_of(p)];
    on_.each_index(padded(s.cols),
                   set_means<C>{memory_[at_.totals] + s.first_col,
                                s.scale / s.pre / static_cast<double>(tokens_),
                                memory_[at_.high] + s.first_col, memory_[at_.low] + s.first_col});
  }

  /// Column sums of centred values, of the tokens whose norms are at most `limit`, into totals.
  void sum_columns_of(integer p, double limit) {
    site_facts const& s = sites_[size_of(p)];
    double* const total = memory_[at_.totals] + s.first_col;
    on_.zero(total, padded(s.cols));
    each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
      integer const slice = round_up(ceil_div(rows, Device::column_slices), 4);
      integer const slices = ceil_div(rows, slice);
      on_.each_group(
          slices * ceil_div(s.cols, integer{group::size}),
          sum_centred<T, C>{x, rows, slice, centre(p), memory_[at_.norms] + p * tokens_ + first,
                            limit, memory_[at_.sums]});
      on_.each_index(s.cols, fold_sums{s.cols, slices, memory_[at_.sums], total});
    });
  }
  void move(integer p, double factor) {
    site_facts const& s = sites_[size_of(p)];
    on_.each_index(padded(s.cols), move_centres<C>{memory_[at_.totals] + s.first_col, factor,
                                                   memory_[at_.high] + s.first_col,
                                                   memory_[at_.low] + s.first_col});
  }
  void measure_norms(integer p) {
    each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
      on_.each_group(rows,
                     centred_norms<T, C>{x, centre(p), memory_[at_.norms] + p * tokens_ + first});
    });
  }
  void read_norms() {
    norms_.resize(size_of(count() * tokens_));
    kernel_rows_.resize(norms_.size());
    on_.download(memory_[at_.norms], static_cast<integer>(norms_.size()), norms_.data());
    on_.download(memory_[at_.kernel_rows], static_cast<integer>(norms_.size()),
                 kernel_rows_.data());
    on_.wait();
  }

  /// Centres sites with tokens far out at the mean of the closer ones; see centre_limit.
  void centre_among_closer() {
    bool any = false;
    std::vector<double> scratch;
    for (integer p = 0; p < count(); ++p) {
      site_facts& s = sites_[size_of(p)];
      auto const norms =
          std::span<double const>(norms_).subspan(size_of(p * tokens_), size_of(tokens_));
      double trace = 0, largest = 0;
      for (double const a : norms) trace += a, largest = std::max(largest, a);
      double const limit = centre_limit(norms, trace, largest, scratch);
      if (!(s.scale > 0) || constant(s, largest) || !is_finite(limit)) continue;
      double closer = 0;
      for (double const a : norms) closer += a <= limit;
      sum_columns_of(p, limit);
      move(p, 1 / closer);
      sum_columns_of(p, std::numeric_limits<double>::infinity());
      each_part(p, [&]<class T>(token_rows<T> const& x, integer first, integer rows) {
        on_.each_group(rows,
                       centred_row_sums<T, C>{x, centre(p), memory_[at_.totals] + s.first_col,
                                              memory_[at_.kernel_rows] + p * tokens_ + first});
      });
      measure_norms(p);
      s.about_mean = false;
      any = true;
    }
    if (any) read_norms();
  }

  /// What the rounding of the means alone may leave is a constant site, not a signal.
  bool constant(site_facts const& s, double norm) const {
    double const rounding = rounding_of_means<C>(tokens_) * s.largest * s.scale;
    return norm <= rounding * rounding * static_cast<double>(s.cols);
  }

  void prepare() {
    for (integer p = 0; p < count(); ++p) add_columns(p);
    std::vector<bool> finite = read_facts();
    bool again = false;
    for (integer p = 0; p < count(); ++p) {
      if (finite[size_of(p)]) continue;
      sites_[size_of(p)].bad = first_bad(p);
      if (sites_[size_of(p)].bad.found()) continue;
      sites_[size_of(p)].pre = std::ldexp(1., -64);  // finite doubles whose sum is not
      add_columns(p);
      again = true;
    }
    if (again) read_facts();

    // A first scale, by which centred values are at most 2 or so: their norms are safe in C.
    on_.zero(memory_[at_.norms], count() * tokens_);
    for (integer p = 0; p < count(); ++p) {
      site_facts& s = sites_[size_of(p)];
      if (s.bad.found() || !(s.largest > 0)) continue;
      s.scale = power_of_two<C>(-std::ilogb(s.largest) - 1);
      write_means(p);
      if constexpr (std::same_as<C, double>) {  // what is left of the means goes, too
        sum_columns_of(p, std::numeric_limits<double>::infinity());
        move(p, 1 / static_cast<double>(tokens_));
      }
      measure_norms(p);
    }
    on_.zero(memory_[at_.kernel_rows], count() * tokens_);
    read_norms();
    centre_among_closer();
    for (integer p = 0; p < count(); ++p) rescale(p);
  }

  /// Chooses the scale that brings the largest norm to about 1, and tells what is constant.
  void rescale(integer p) {
    site_facts& s = sites_[size_of(p)];
    if (!(s.scale > 0)) return;
    auto const norms = norms_.begin() + p * tokens_;
    double const norm = *std::max_element(norms, norms + tokens_);
    if (constant(s, norm)) {
      std::fill(norms, norms + tokens_, 0.);
      s.scale = 0;
      return;
    }
    double const wanted = s.scale * std::ldexp(1., -std::ilogb(norm) / 2);
    double const most =
        power_of_two<C>(std::numeric_limits<C>::max_exponent - std::ilogb(s.largest));
    double const scale = std::max(std::min(std::min(wanted, most), power_of_two<C>(1 << 20)),
                                  power_of_two<C>(-(1 << 20)));
    double const change = scale / s.scale;
    s.scale = scale;
    for (integer i = 0; i < tokens_; ++i) {
      norms[i] *= change * change;
      kernel_rows_[size_of(p * tokens_ + i)] *= change * change;
    }
    on_.each_index(padded(s.cols),
                   scale_centres<C>{static_cast<C>(change), memory_[at_.high] + s.first_col,
                                    memory_[at_.low] + s.first_col});
  }

  // ---- the bandwidth

  std::vector<double> sigmas(rbf const& kernel) {
    if (!kernel.sigma.empty()) return kernel.sigma;
    std::vector<double> out;
    for (integer p = 0; p < count(); ++p)
      out.push_back(kernel.fraction * std::sqrt(median_distance(p, kernel.convention)) /
                    (sites_[size_of(p)].scale > 0 ? sites_[size_of(p)].scale : 1));
    return out;
  }

  /// Of scaled data.
  double median_distance(integer p, rbf::median convention) {
    site_facts const& s = sites_[size_of(p)];
    integer const m = sample_size(tokens_), side = sample_side();
    if (!(s.scale > 0)) return 0;
    with_source(p, [&](auto& source, integer local) {
      multiply(s, source.sample(local), m, centre(p), memory_[at_.rows], side, true,
               memory_[at_.sample]);
      source.release();
    });
    std::vector<C> products(size_of(side * side)), distances;
    on_.download(memory_[at_.sample], side * side, products.data());
    on_.wait();
    // Below this share of the norms a distance is rounding: copies of a token are at distance 0.
    double const rounding = (8 + std::sqrt(static_cast<double>(s.cols))) *
                            static_cast<double>(std::numeric_limits<C>::epsilon());
    auto const norm = [&](integer i) { return norms_[size_of(p * tokens_ + i * tokens_ / m)]; };
    for (integer j = 0; j < m; ++j)
      for (integer i = j + 1; i < m; ++i) {
        double const both = norm(i) + norm(j);
        double const distance = both - 2 * static_cast<double>(products[size_of(j * side + i)]);
        constexpr double limit = std::same_as<C, double> ? 4096 : 8;
        lost_ = lost_ || !(limit * distance > both);  // far closer to each other than to the centre
        distances.push_back(distance > rounding * both ? static_cast<C>(distance) : C(0));
      }
    return median(distances, m, convention);
  }

  // ---- tiles

  /// Inner products of some rows with themselves, panel after panel.
  template <class T>
  void multiply(site_facts const& s, token_rows<T> const& x, integer rows,
                centring<C> const& centre, C* panel, integer side, bool lower, C* out) {
    for (integer k = 0; k < s.cols; k += depth_) {
      on_.each_group(side, fill_panel<T, C>{x, rows, k, depth_, centre, panel});
      on_.product(panel, panel, side, depth_, k > 0, lower, out);
    }
  }

  void multiply(integer p, tile const& t, C* out) {
    site_facts const& s = sites_[size_of(p)];
    if (!(s.scale > 0)) return on_.zero(out, t.side * t.side);
    with_source(p, [&](auto& source, integer local) {
      auto const x = source.rows(local, t.row, t.rows);
      if (t.diagonal()) {
        multiply(s, x, t.rows, centre(p), memory_[at_.rows], t.side, true, out);
        return source.release();
      }
      auto const y = source.rows(local, t.col, t.cols);
      using fill = fill_panel<typename std::remove_reference_t<decltype(source)>::scalar, C>;
      for (integer k = 0; k < s.cols; k += depth_) {
        on_.each_group(t.side, fill{x, t.rows, k, depth_, centre(p), memory_[at_.rows]});
        on_.each_group(t.side, fill{y, t.cols, k, depth_, centre(p), memory_[at_.cols]});
        on_.product(memory_[at_.rows], memory_[at_.cols], t.side, depth_, k > 0, false, out);
      }
      source.release();
    });
  }

  template <class Entry>
  void add(tile const& t, std::vector<Entry> const& entries) {
    integer const area = t.side * t.side, blocks = ceil_div(t.side, tile_columns);
    integer const strips = ceil_div(t.side, integer{group::size});
    for (integer p = 0; p < count(); ++p) {
      C* const g = memory_[at_.tiles] + p * area;
      C const* const token = memory_[at_.token] + p * padded_tokens();
      C const* const removed = memory_[at_.removed] + p * padded_tokens();
      multiply(p, t, g);
      on_.each_group(strips * blocks,
                     finish_tile<Entry, C>{t, entries[size_of(p)], token + t.row, token + t.col,
                                           removed + t.row, removed + t.col, g,
                                           memory_[at_.row_parts], memory_[at_.col_parts]});
      on_.each_index(t.side, fold_tile<Entry::row_sums>{t, strips, blocks, memory_[at_.row_parts],
                                                        memory_[at_.col_parts],
                                                        memory_[at_.squares] + p * tokens_,
                                                        memory_[at_.row_sums] + p * tokens_});
    }
    integer const slice = at_.slice_columns * t.side;
    on_.pair_products(memory_[at_.tiles], count(), area, slice, memory_[at_.slices]);
    on_.each_index(count() * count(), fold_pairs<C>{memory_[at_.slices], area / slice,
                                                    count() * count(), memory_[at_.pairs]});
  }

  /// Both halves, in units of the data; NaN where the data are not finite.
  void deliver(std::vector<kernel_facts> const& entries, gram_moments& m) const {
    std::vector<double> unit(sites_.size());
    for (std::size_t p = 0; p < unit.size(); ++p) {
      site_facts const& s = sites_[p];
      if (std::abs(entries[p].exponent) > 200) m.exponent[p] = entries[p].exponent;
      unit[p] = s.bad.found() ? missing : std::ldexp(1., entries[p].exponent - m.exponent[p]);
      m.non_finite[p] = s.bad;
      if (!(s.scale > 0)) m.why[p] = status::constant_layer;
      if (s.bad.found()) m.why[p] = status::non_finite;
      if (m.why[p] == status::ok && !m.sigma.empty() && !(m.sigma[p] > 0))
        m.why[p] = status::zero_bandwidth;
      for (std::size_t i = p * size_of(tokens_); i < (p + 1) * size_of(tokens_); ++i) {
        m.row_sums[i] *= unit[p];
        m.diagonal[i] *= unit[p];
        m.squares[i] *= unit[p] * unit[p];
        m.square_sum[p] += m.squares[i];
      }
      m.entry_rounding[p] *= unit[p];
      m.sum_rounding[p] *= unit[p] * unit[p];
      for (std::size_t q = 0; q <= p; ++q) {
        double const product = 2 * m.products[p * unit.size() + q] * unit[p] * unit[q];
        m.products[p * unit.size() + q] = m.products[q * unit.size() + p] = product;
      }
    }
  }

  Device& on_;
  arena memory_;
  std::tuple<Sources...> sources_;
  integer tokens_, total_cols_ = 0, widest_ = 1, chunks_ = 1, depth_ = 1;
  std::vector<site_facts> sites_;
  std::vector<double> norms_, kernel_rows_;
  bool lost_ = false;
  places at_{};
};

inline void require_tiles(char const* where, rflow::gram_path path) {
  if (path == rflow::gram_path::feature)
    reject(where, "gram_path::feature is for on_cpu; here moments come from kernel matrices");
}

/// The Gram moments of the sites of several stacks. Products are in float unless a stack is double; where
/// rounding would be seen in a CKA, everything is done again in double.
/// @param  rounded  products are rounded on purpose (TF32): they stay as they are
/// @throws std::invalid_argument if the stacks differ in tokens, bandwidths in number from sites, or
///         the memory bound is below the smallest tile
template <class Device, class Kernel, class... T, class... Memory>
gram_moments gram(char const* where, Device& on, std::size_t memory_bound, bool rounded,
                  Kernel const& kernel, layer_stack<T, Memory> const&... stacks) {
  integer const tokens = std::get<0>(std::tie(stacks...)).size();
  integer sites = 0;
  auto const check = [&](auto const& stack) {
    sites += stack.sites();
    if (stack.size() != tokens)
      reject(where, "the stacks have " + std::to_string(tokens) + " and " +
                        std::to_string(stack.size()) + " tokens");
  };
  (check(stacks), ...);
  if (tokens == 0) return gram_moments(sites, 0);

  if constexpr (std::same_as<Kernel, rbf>) require_bandwidths(where, kernel, sites);
  constexpr bool wide = (std::same_as<T, double> || ...);
  gram_moments m;
  bool lost = false;
  auto const run = [&]<class C>(C) {
    gram_pass<Device, C, source_of<Device, layer_stack<T, Memory>>...> pass(
        where, on, memory_bound, std::same_as<Kernel, rbf>, stacks...);
    if constexpr (std::same_as<Kernel, linear>) {
      m = pass(make_linear<C>{}, make_linear<C>{});
      if (tokens < 3)  // too few to U-centre: G = K, whose rows sum to 0
        for (std::size_t i = 0; i < m.diagonal.size(); ++i) m.row_sums[i] = -m.diagonal[i];
    } else {
      static_assert(std::same_as<Kernel, rbf>);
      m = pass(make_rbf<C>{}, make_rbf<C>{}, &kernel);
    }
    m.accuracy = wide ? wide_accuracy : narrow_accuracy;
    lost = pass.lost();
  };
  if constexpr (!wide) run(float{});
  if (wide || (!rounded && (lost || !m.resolved()))) run(double{});
  auto at = m.non_finite.begin();
  auto const in_the_data = [&](auto const& stack) {
    for (integer l = 0; l < stack.sites(); ++l, ++at)
      if (at->found()) at->token = stack.token(at->token);
  };
  (in_the_data(stacks), ...);
  return m;
}

}  // namespace rflow::detail::passes
