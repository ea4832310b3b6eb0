// SPDX-License-Identifier: Apache-2.0
#pragma once

// Minibatch CKA of a chain that arrives site by site.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <rflow/detail/cpu/batch.hpp>
#include <rflow/detail/cpu/memory.hpp>
#include <rflow/detail/cpu/pairs.hpp>
#include <rflow/detail/cpu/rows.hpp>
#include <rflow/detail/numerics.hpp>
#include <rflow/moments.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

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

}  // namespace rflow::detail
