// SPDX-License-Identifier: Apache-2.0
#pragma once

// How the problems of a softmax regression see one site's features.
//
// The features of problem s are (x̃ − shift_s)·rho_s, where x̃ is the common centred, scaled value.
// Tokens that are only validated on must not cost the others digits: scales come from the tokens that
// are trained on, and so does a feature's centre where the mean of all tokens lies far from theirs.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <rflow/detail/cpu/centre.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/rows.hpp>
#include <rflow/softmax_problem.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

/// Features as all problems share them: x̃ = x·scale + minus_high + minus_low, in powers of two and
/// centres of their own.
template <class C>
struct shared_features {
  panel_source<C> source;
  aligned_array<C> scale, minus_high, minus_low;  // d, padded with zeros to whole packets

  explicit shared_features(panel_source<C> const& x) : source(x) {
    integer const room = round_up(x.cols, lanes_v<C>) + lanes_v<C>;
    for (aligned_array<C>* to : {&scale, &minus_high, &minus_low})
      *to = aligned_array<C>(room, C(0));
  }

  /// x̃ of a block of rows, filled up to whole packets of columns.
  void fetch(integer row, integer rows, integer col, integer cols, C* to, integer ld) const {
    using namespace packet;
    using P = packet_t<C>;
    source(row, rows, col, cols, to, ld);
    integer const padded = round_up(cols, lanes_v<C>);
    for (integer i = 0; i < rows; ++i) {
      C* const x = to + i * ld;
      for (integer k = cols; k < padded; ++k) x[k] = C(0);
      for (integer k = 0; k < padded; k += lanes_v<C>) {
        P const by = ploadu<P>(scale.data() + col + k);
        P const high = ploadu<P>(minus_high.data() + col + k);
        P const low = ploadu<P>(minus_low.data() + col + k);
        pstoreu(x + k, padd(pmadd(ploadu<P>(x + k), by, high), low));
      }
    }
  }
};

/// The shifts and factors of all problems for strips of R features. `problem` must outlive it.
template <class C, integer R>
class softmax_frames {
 public:
  /// How a problem sees the features of a strip.
  struct frame {
    C const *shift, *rho;
  };

  softmax_frames(team& threads, panel_source<C> const& source, integer tokens,
                 softmax_problem const& problem)
      : problem_(problem),
        site_(source),
        tokens_(tokens),
        width_(source.cols),
        strips_(ceil_div(width_, R)),
        counts_(size(2 * problem.problems)) {
    for (integer p = 0; p < problem.problems; ++p)
      for (integer t = 0; t < tokens; ++t)
        for (std::uint8_t const part : {softmax_problem::train, softmax_problem::validate})
          counts_[size(2 * p + part - 1)] += problem_.part(p, t) == part;
    find(threads);
  }

  /// x̃ of a block of rows, filled up to whole packets of columns.
  void fetch(integer row, integer rows, integer col, integer cols, C* to, integer ld) const {
    site_.fetch(row, rows, col, cols, to, ld);
  }
  frame of(integer problem, integer strip) const {
    integer const at = (problem_.standardize ? problem * strips_ + strip : strip) * R;
    return {shift_.data() + at, rho_.data() + at};
  }
  /// How many tokens a problem trains on (0) or validates on (1).
  double count(integer problem, std::size_t part) const {
    return counts_[size(2 * problem) + part];
  }

  position non_finite() const { return non_finite_; }
  /// Whether a feature varies over the tokens that are trained on.
  bool varies() const { return varies_; }
  /// Whether a feature has no centre for all problems.
  bool outlying() const { return outlying_; }
  /// The largest |x| of those that are trained on.
  double largest() const { return largest_; }
  /// problems × d, if standardised.
  std::vector<double> const& mean() const { return mean_; }
  std::vector<double> const& deviation() const { return deviation_; }

 private:
  static std::size_t size(integer count) { return static_cast<std::size_t>(count); }

  /// What a strip of features was found to be.
  struct finding {
    bool finite = true, varies = false, outlying = false;
    double largest = 0;  // of those trained on
  };
  /// Whether a token is trained on by no problem, by some, or by all.
  enum class training : std::uint8_t { none, some, all };

  /// Scales and centres of the features, and what makes them each problem's: its mean and deviation
  /// over its training part, if asked for.
  void find(team& threads) {
    integer const frames = problem_.standardize ? problem_.problems : 1;
    shift_ = aligned_array<C>(frames * strips_ * R, C(0));
    rho_ = aligned_array<C>(frames * strips_ * R, C(0));
    if (problem_.standardize) {
      mean_.resize(size(frames * width_));
      deviation_.resize(size(frames * width_));
    }
    std::vector<training> use(size(tokens_));
    for (integer t = 0; t < tokens_; ++t) {
      integer by = 0;
      for (integer p = 0; p < problem_.problems; ++p)
        by += problem_.part(p, t) == softmax_problem::train;
      use[size(t)] = by == 0                  ? training::none
                     : by < problem_.problems ? training::some
                                              : training::all;
    }
    std::vector<finding> findings(size(strips_));
    threads.run(strips_, [&](integer strip) { findings[size(strip)] = find_frame(strip, use); });
    bool finite = true;
    for (finding const& f : findings) {
      finite = finite && f.finite;
      varies_ = varies_ || f.varies;
      outlying_ = outlying_ || f.outlying;
      largest_ = (std::max)(largest_, f.largest);
    }
    if (!finite) non_finite_ = find_non_finite(site_.source, tokens_);
  }

  /// visit(token, x) for all tokens; x holds a strip's features in double, times a power of two each.
  template <class Visit>
  void each_token(integer strip, double const* power, Visit const& visit) const {
    constexpr integer at_once = 16;  // rows, so that lines shared by them are read once
    integer const cols = (std::min)(R, width_ - strip * R);
    alignas(128) C x[at_once * R] = {};
    double wide[R];
    for (integer t = 0; t < tokens_; t += at_once) {
      integer const rows = (std::min)(at_once, tokens_ - t);
      site_.source(t, rows, strip * R, cols, x, R);
      for (integer r = 0; r < rows; ++r) {
        for (integer i = 0; i < R; ++i) wide[i] = static_cast<double>(x[r * R + i]) * power[i];
        visit(t + r, wide);
      }
    }
  }

  finding find_frame(integer strip, std::vector<training> const& use) {
    integer const cols = (std::min)(R, width_ - strip * R), problems = problem_.problems;
    finding found;
    double power[R], low[R], high[R], most[R] = {}, all[R] = {}, finite = 0;
    std::fill_n(power, R, 1.);
    std::fill_n(low, R, (std::numeric_limits<double>::max)());
    std::fill_n(high, R, std::numeric_limits<double>::lowest());
    each_token(strip, power, [&](integer t, double const* x) {
      for (integer i = 0; i < R; ++i) finite += x[i] * 0x1p-64;
      for (integer i = 0; i < R; ++i) most[i] = (std::max)(most[i], std::abs(x[i]));
      if (use[size(t)] == training::none) return;
      for (integer i = 0; i < R; ++i) low[i] = (std::min)(low[i], x[i]);
      for (integer i = 0; i < R; ++i) high[i] = (std::max)(high[i], x[i]);
    });
    found.finite = is_finite(finite);
    if (!found.finite) return found;

    // What is trained on comes to 1 or so; what is not stays in range.
    constexpr int top = std::numeric_limits<C>::max_exponent;
    constexpr int room = std::is_same_v<C, double> ? 64 : 8;  // sums of doubles are doubles
    for (integer i = 0; i < cols; ++i) {
      double const trained = (std::max)(std::abs(low[i]), std::abs(high[i]));
      found.largest = (std::max)(found.largest, trained);
      // A feature whose values are alike to the rounding of what made them tells nothing apart.
      found.varies = found.varies || high[i] / 2 - low[i] / 2 >
                                         32 * std::numeric_limits<double>::epsilon() * trained;
      int exponent = trained > 0 ? -std::ilogb(trained) - 1 : 0;
      if (most[i] > 0) exponent = (std::min)(exponent, top - room - std::ilogb(most[i]));
      power[i] = std::ldexp(1., std::clamp(exponent, 8 - top, top - 38));
    }

    std::vector<double> sums(size(problems * R)), squares(size(problems * R));
    each_token(strip, power, [&](integer t, double const* x) {
      for (integer i = 0; i < R; ++i) all[i] += x[i];
      for (integer p = 0; p < problems; ++p) {
        if (problem_.part(p, t) != softmax_problem::train) continue;
        double *const sum = sums.data() + p * R, *const square = squares.data() + p * R;
        for (integer i = 0; i < R; ++i) sum[i] += x[i];
        for (integer i = 0; i < R; ++i) square[i] += x[i] * x[i];
      }
    });
    for (double& x : all) x /= static_cast<double>(tokens_);
    for (integer k = 0; k < problems * R; ++k) {
      double const n = counts_[size(2 * (k / R))];
      sums[size(k)] /= n;
      squares[size(k)] /= n;
    }
    if (problem_.standardize) find_deviations(strip, power, sums, squares);

    // The mean of all tokens is the centre, unless it lies so far from those of a problem that
    // their digits would go. Features as they are given may stay where they are, as they do where the
    // mean is that of a few; others take the mean of what all problems train on, which none of them
    // is far from.
    bool outlying[R] = {}, some = false;
    double nearer[R] = {};
    if (!problem_.standardize)
      each_token(strip, power, [&](integer, double const* x) {
        for (integer i = 0; i < R; ++i) nearer[i] += std::abs(x[i] - all[i]) < std::abs(x[i]);
      });
    for (integer i = 0; i < cols; ++i) {
      if (!problem_.standardize) outlying[i] = 4 * nearer[i] < static_cast<double>(tokens_);
      for (integer p = 0; p < problems; ++p) {
        double const spread = std::sqrt(squares[size(p * R + i)]);
        outlying[i] = outlying[i] || ((spread > 0 || !problem_.standardize) &&
                                      std::abs(all[i] - sums[size(p * R + i)]) > 8 * spread);
      }
      if (outlying[i]) all[i] = 0;
      some = some || outlying[i];
    }
    if (some && problem_.standardize) {
      double common[R] = {}, count = 0;
      each_token(strip, power, [&](integer t, double const* x) {
        if (use[size(t)] != training::all) return;
        count += 1;
        for (integer i = 0; i < R; ++i) common[i] += x[i];
      });
      found.outlying = count == 0;
      for (integer i = 0; i < R && count > 0; ++i)
        if (outlying[i]) all[i] = common[i] / count;
    }

    for (integer i = 0; i < cols; ++i) {
      integer const j = strip * R + i;
      site_.scale[j] = static_cast<C>(power[i]);
      site_.minus_high[j] = static_cast<C>(-all[i]);
      site_.minus_low[j] = static_cast<C>(-all[i] - static_cast<double>(site_.minus_high[j]));
      double const subtracted =
          static_cast<double>(site_.minus_high[j]) + static_cast<double>(site_.minus_low[j]);
      if (!problem_.standardize) {
        shift_[j] = static_cast<C>(subtracted);
        rho_[j] = static_cast<C>(1 / power[i]);
      }
      for (integer p = 0; p < problems && problem_.standardize; ++p) {
        integer const at = (p * strips_ + strip) * R + i;
        double const mean = sums[size(p * R + i)];
        double const deviation = std::sqrt(squares[size(p * R + i)]);
        shift_[at] = static_cast<C>(mean + subtracted);
        rho_[at] = deviation > 0 ? static_cast<C>(1 / deviation) : C(0);
        mean_[size(p * width_ + j)] = mean / power[i];
        deviation_[size(p * width_ + j)] = deviation / power[i];
      }
    }
    return found;
  }

  /// Means to the last digits and variances, 0 for a feature that is constant to rounding.
  void find_deviations(integer strip, double const* power, std::vector<double>& means,
                       std::vector<double>& variances) const {
    std::vector<double> left(means.size());
    std::fill(variances.begin(), variances.end(), 0.);
    each_token(strip, power, [&](integer t, double const* x) {
      for (integer p = 0; p < problem_.problems; ++p) {
        if (problem_.part(p, t) != softmax_problem::train) continue;
        double const* const mean = means.data() + p * R;
        double *const sum = left.data() + p * R, *const square = variances.data() + p * R;
        for (integer i = 0; i < R; ++i) {
          double const y = x[i] - mean[i];
          sum[i] += y;
          square[i] += y * y;
        }
      }
    });
    for (std::size_t k = 0; k < means.size(); ++k) {
      double const n = counts_[2 * (k / static_cast<std::size_t>(R))];
      double const more = left[k] / n, rounding = 32 * std::numeric_limits<double>::epsilon();
      double const variance = variances[k] / n - more * more;
      means[k] += more;
      variances[k] = variance > rounding * rounding * means[k] * means[k] ? variance : 0;
    }
  }

  softmax_problem const& problem_;
  shared_features<C> site_;
  integer tokens_, width_, strips_;
  std::vector<double> counts_;            // problems × 2: tokens to train on, to validate on
  std::vector<double> mean_, deviation_;  // problems × d, if standardised
  aligned_array<C> shift_, rho_;          // frames × d
  double largest_ = 0;
  position non_finite_;
  bool varies_ = false, outlying_ = false;
};

}  // namespace rflow::detail
