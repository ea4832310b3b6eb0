// SPDX-License-Identifier: Apache-2.0
#pragma once

// Softmax regressions on the CPU, several side by side on the same features. Not a public interface:
// the backends on the CPU call it, through host.hpp.
//
//     for each strip of tokens        one task: X packed, logits = X · weights in L2, then softmax,
//                                     losses, residuals (the only thing that is written)
//     for each strip of features      one task: X packed, gradient = Xᵀ · residuals in L2, then Adam
//
// A task owns its strip of the result and walks the depth in order, so there is nothing to add up
// over threads but a few sums per strip, in the order of the strips: the result is the same to the
// last bit for any number of threads. Features are read as stored, twice an epoch, and are centred
// and widened while they are packed.
//
// Weights are kept multiplied by rho_s, and biases take what the shift contributes, so that every
// problem sees the same x̃; see softmax_frames.hpp.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include <rflow/detail/cpu/centre.hpp>
#include <rflow/detail/cpu/packet.hpp>
#include <rflow/detail/cpu/panel.hpp>
#include <rflow/detail/cpu/product.hpp>
#include <rflow/detail/cpu/softmax_frames.hpp>
#include <rflow/detail/cpu/tile.hpp>
#include <rflow/softmax_problem.hpp>
#include <rflow/threads.hpp>
#include <rflow/view.hpp>

namespace rflow::detail {

// Packets are builtin vector types, whose attributes g++ reports as lost in template arguments.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

/// The regressions of one site. `problem` must outlive it.
template <class C, class Product = packed_product>
class softmax_engine {
  static constexpr integer R = Product::template rows<C>, N = Product::template cols<C>;
  static constexpr integer W = lanes_v<C>, packets = R / W;
  static constexpr integer D = Product::depth_lines * integer{64 / sizeof(C)};  // depth of a block
  static constexpr integer group = 2;                                           // strips of a task
  static constexpr integer cache = integer{8} << 20;  // bytes that sites may share side by side
  static_assert(D % R == 0 && D % depth_unit<C> == 0);
  using P = packet_t<C>;
  using frames = softmax_frames<C, R>;
  using frame = typename frames::frame;
  // Up to here, and with an epsilon from there, squares of gradients may be squares in C.
  static constexpr double largest_plain = std::is_same_v<C, double> ? 0x1p500 : 0x1p60;
  static constexpr double least_epsilon = std::is_same_v<C, double> ? 1e-140 : 1e-11;
  static constexpr C least_exponent = std::is_same_v<C, double> ? C(-708) : C(-87);

 public:
  softmax_engine(crew of, panel_source<C> const& source, integer tokens,
                 softmax_problem const& problem)
      : threads_(of),
        problem_(problem),
        tokens_(tokens),
        width_(source.cols),
        columns_(problem.classes * problem.problems),
        padded_(round_up(columns_, N)),
        token_strips_(ceil_div(tokens, R)),
        feature_strips_(ceil_div(width_, R)),
        frames_(threads_, source, tokens, problem),
        scratch_(size(threads_.size())) {
    if (why() != status::ok || needs_double()) return;
    weights_ = aligned_array<C>(round_up(width_, depth_unit<C>) * padded_, C(0));
    residuals_ = aligned_array<C>(round_up(tokens, depth_unit<C>) * padded_, C(0));
    bias_.assign(size(columns_), 0.);
    offset_ = aligned_array<C>(padded_, C(0));
    token_sums_ = aligned_array<double>(token_strips_ * columns_);
    feature_sums_ = aligned_array<double>(feature_strips_ * columns_);
    outcomes_.resize(size(token_strips_ * problem_.problems));
    predictions_.resize(size(tokens * problem_.problems));
  }

  /// Whether several sites had better run at once, a thread each, than one on all threads.
  static bool side_by_side(integer sites, integer tokens, integer width,
                           softmax_problem const& problem, int threads) {
    if (sites == 1 || threads == 1) return false;
    integer const tasks = ceil_div((std::min)(tokens, width), group * R);
    integer const values = (3 * width + tokens) * problem.classes * problem.problems;
    return tasks < 4 * threads || values * integer{sizeof(C)} * threads <= cache;
  }

  status why() const {
    if (non_finite().found()) return status::non_finite;
    return frames_.varies() ? status::ok : status::constant_layer;
  }
  position non_finite() const { return frames_.non_finite(); }

  /// Whether no centre suits all problems in C: then nothing else here may be called.
  bool needs_double() const { return !std::is_same_v<C, double> && frames_.outlying(); }

  std::vector<double> const& mean() const { return frames_.mean(); }
  std::vector<double> const& deviation() const { return frames_.deviation(); }

  void load(softmax_weights const& w) {
    steps_ = 0;
    bias_ = w.bias;
    bias_first_.assign(bias_.size(), 0.);
    bias_second_.assign(bias_.size(), 0.);
    threads_.run(feature_strips_, [&](integer strip) {
      alignas(128) C x[R];
      for (integer k = 0; k < columns_; ++k) {
        frame const f = frames_.of(k / problem_.classes, strip);
        std::fill_n(x, R, C(0));
        for (integer i = 0; i < (std::min)(R, width_ - strip * R); ++i)
          x[i] = static_cast<C>(w.values.data()[k * width_ + strip * R + i] *
                                static_cast<double>(f.rho[i]));
        C* const to = weights_at(strip, k);
        for (integer r = 0; r < packets_of(strip, width_); ++r)
          packet::pstore(to + r * W, packet::pload<P>(x + r * W));
        feature_sums_[strip * columns_ + k] = shifted(f.shift, to, packets_of(strip, width_));
      }
    });
    find_offsets();
  }

  void store(softmax_weights& w) const {
    w.bias = bias_;
    w.values.resize(size(columns_ * width_));
    for (integer k = 0; k < columns_; ++k)
      for (integer j = 0; j < width_; ++j) {
        frame const f = frames_.of(k / problem_.classes, j / R);
        double const rho = static_cast<double>(f.rho[j % R]);
        w.values.data()[k * width_ + j] =
            rho > 0 ? static_cast<double>(weights_at(j / R, k)[j % R]) / rho : 0.;
      }
  }

  softmax_sums evaluate() { return forward(false); }

  softmax_sums step(adam const& by) {
    if (steps_ == 0) careful_ = wide() || by.epsilon < least_epsilon;
    softmax_sums sums = forward(true);
    if (steps_++ == 0) {
      first_moment_ = aligned_array<C>(feature_strips_ * padded_ * R, C(0));
      second_moment_ = aligned_array<C>(feature_strips_ * padded_ * R, C(0));
    }
    double const t = static_cast<double>(steps_);
    double const rate = by.learning_rate / (1 - std::pow(by.beta1, t));
    double const root = 1 / std::sqrt(1 - std::pow(by.beta2, t));
    backward([&](integer strip, C const* g) {
      if (careful_)
        update_carefully(strip, g, by, rate, root);
      else
        update(strip, g, by, rate, root);
    });
    for (integer k = 0; k < columns_; ++k) {
      auto const i = size(k);
      double const g = bias_gradient_[i];
      double& m = bias_first_[i];
      double& v = bias_second_[i];
      m += (g - m) * (1 - by.beta1);
      v = v * by.beta2 + (1 - by.beta2) * g * g;
      bias_[i] -= rate * m / (std::sqrt(v) * root + by.epsilon);
    }
    find_offsets();
    return sums;
  }

  softmax_sums gradient(softmax_weights& out) {
    softmax_sums sums = forward(true);
    out.bias = bias_gradient_;
    out.values.resize(size(columns_ * width_));
    backward([&](integer strip, C const* g) {
      for (integer k = 0; k < columns_; ++k) {
        frame const f = frames_.of(k / problem_.classes, strip);
        for (integer i = 0; i < (std::min)(R, width_ - strip * R); ++i)
          out.values.data()[k * width_ + strip * R + i] =
              (static_cast<double>(g[k * R + i]) -
               static_cast<double>(f.shift[i]) * bias_gradient_[size(k)]) *
              static_cast<double>(f.rho[i]);
      }
    });
    return sums;
  }

  /// problems × n: the classes found by the last evaluate().
  std::vector<std::int32_t> const& predictions() const { return predictions_; }

 private:
  /// What one token strip finds of one problem.
  struct outcome {
    double loss[2] = {}, correct[2] = {};
  };
  struct scratch {
    panel<C> x;
    aligned_array<C> out;
  };

  static std::size_t size(integer count) { return static_cast<std::size_t>(count); }

  /// Whether features are so large that their squares leave the range of C.
  bool wide() const { return !problem_.standardize && frames_.largest() > largest_plain; }

  // ---- places -----------------------------------------------------------------------------------

  /// Packets of a strip that its block has room for. Whole strips end where blocks do, but for the
  /// last block, which is filled up to the depth unit alone.
  static integer packets_of(integer strip, integer depth) {
    integer const first = strip * R / D * D;
    integer const size = round_up((std::min)(D, depth - first), depth_unit<C>);
    return (std::min)(packets, (first + size - strip * R) / W);
  }
  /// Values i of a strip of column k, in panels whose blocks of depth D hold column after column.
  static integer place(integer strip, integer k, integer depth, integer columns) {
    integer const block = strip * R / D;
    integer const size = round_up((std::min)(D, depth - block * D), depth_unit<C>);
    return block * D * columns + k * size + strip * R - block * D;
  }
  C* weights_at(integer strip, integer k) {
    return weights_.data() + place(strip, k, width_, padded_);
  }
  C const* weights_at(integer strip, integer k) const {
    return weights_.data() + place(strip, k, width_, padded_);
  }
  scratch& scratch_of(int thread) {
    scratch& s = scratch_[size(thread)];
    if (s.out.data() == nullptr) {
      s.x = {aligned_array<C>(group * R * D), group * R};
      s.out = aligned_array<C>(group * R * padded_);
    }
    return s;
  }

  // ---- products ---------------------------------------------------------------------------------

  /// out[strip][column][R] of up to `group` strips = packed strips · panelᵀ over `depth`.
  /// pack(first, count) fills the scratch with the strips over some depths.
  template <class Pack>
  void multiply(integer strips, integer depth, C const* columns, scratch& s, Pack const& pack) {
    for (integer first = 0; first < depth; first += D) {
      integer const count = (std::min)(D, depth - first);
      integer const size = round_up(count, depth_unit<C>);
      pack(first, count);
      C const* const block = columns + first * padded_;
      for (integer k = 0; k < padded_; k += N)
        for (integer g = 0; g < strips; ++g) {
          bool const turn = g + 1 == strips && k + N < padded_;
          Product::multiply(s.x.values.data() + g * R * size, block + k * size, size, first > 0, 0,
                            block + (turn ? k + N : k) * size,
                            s.out.data() + (g * padded_ + k) * R);
        }
    }
  }

  /// Copies the packets of a strip to where all threads will read them.
  static void publish(C const* from, integer count, bool shared, C* to) {
    copy_packets(from, count * W, shared, to);
  }

  softmax_sums forward(bool residuals) {
    threads_.run(ceil_div(token_strips_, group), [&](integer task, int thread) {
      scratch& s = scratch_of(thread);
      integer const first = task * group;
      integer const strips = (std::min)(group, token_strips_ - first);
      multiply(strips, width_, weights_.data(), s, [&](integer from, integer count) {
        for (integer g = 0; g < strips; ++g)
          pack_strip<Product, C>([&](auto... where) { frames_.fetch(where...); }, (first + g) * R,
                                 (std::min)(R, tokens_ - (first + g) * R), g,
                                 depth_range{from, count, D}, false, &s.x, nullptr);
      });
      for (integer g = 0; g < strips; ++g)
        finish_tokens(first + g, s.out.data() + g * padded_ * R, residuals);
    });
    softmax_sums sums(problem_.problems);
    for (integer strip = 0; strip < token_strips_; ++strip)
      for (integer p = 0; p < problem_.problems; ++p) {
        outcome const& o = outcomes_[size(strip * problem_.problems + p)];
        for (std::size_t part = 0; part < 2; ++part) {
          sums.loss[part][size(p)] += o.loss[part];
          sums.correct[part][size(p)] += o.correct[part];
        }
      }
    for (std::size_t part = 0; part < 2; ++part)
      for (integer p = 0; p < problem_.problems; ++p)
        sums.count[part][size(p)] = frames_.count(p, part);
    if (residuals) add_strips(token_sums_, token_strips_, bias_gradient_);
    return sums;
  }

  template <class Finish>
  void backward(Finish const& finish) {
    threads_.run(ceil_div(feature_strips_, group), [&](integer task, int thread) {
      scratch& s = scratch_of(thread);
      integer const first = task * group;
      integer const strips = (std::min)(group, feature_strips_ - first);
      multiply(strips, tokens_, residuals_.data(), s, [&](integer from, integer count) {
        integer const depth = round_up(count, depth_unit<C>);
        constexpr integer rows = 16;  // read together, so that lines shared by strips are read once
        for (integer t = 0; t < count; t += rows)
          for (integer g = 0; g < strips; ++g)
            pack_features(first + g, from + t, (std::min)(rows, count - t),
                          s.x.values.data() + (g * depth + t) * R);
        for (integer g = 0; g < strips; ++g)
          std::fill_n(s.x.values.data() + (g * depth + count) * R, (depth - count) * R, C(0));
      });
      for (integer g = 0; g < strips; ++g) finish(first + g, s.out.data() + g * padded_ * R);
      std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores need one
    });
  }

  /// R features of some tokens side by side, token after token.
  void pack_features(integer strip, integer token, integer count, C* to) const {
    integer const cols = (std::min)(R, width_ - strip * R), there = round_up(cols, W);
    frames_.fetch(token, count, strip * R, cols, to, R);
    for (integer t = 0; t < count && there < R; ++t)
      std::fill(to + t * R + there, to + (t + 1) * R, C(0));
  }

  /// sums[column] = Σ over strips, in their order.
  void add_strips(aligned_array<double> const& from, integer strips, std::vector<double>& sums) {
    sums.assign(size(columns_), 0.);
    for (integer s = 0; s < strips; ++s)
      for (integer k = 0; k < columns_; ++k) sums.data()[k] += from[s * columns_ + k];
  }

  // ---- a strip of tokens: logits → losses and residuals -----------------------------------------

  void finish_tokens(integer strip, C* z, bool residuals) {
    using namespace packet;
    integer const first = strip * R, here = (std::min)(R, tokens_ - first);
    for (integer p = 0; p < problem_.problems; ++p) {
      outcome& out = outcomes_[size(strip * problem_.problems + p)];
      out = {};
      alignas(128) C weight[R] = {}, best[R], at[R], total[R], picked[R], size_of_all[R];
      C* const mine = z + p * problem_.classes * R;
      double const count = frames_.count(p, 0);
      for (integer i = 0; i < here; ++i)
        if (problem_.part(p, first + i) == softmax_problem::train)
          weight[i] = static_cast<C>(1 / count);
      for (integer r = 0; r < packets; ++r)
        find_largest(mine + r * W, offset_.data() + p * problem_.classes, best + r * W, at + r * W,
                     size_of_all + r * W);
      for (integer i = 0; i < here; ++i) picked[i] = mine[label(first + i) * R + i];
      for (integer r = 0; r < packets; ++r) exponentiate(mine + r * W, best + r * W, total + r * W);
      for (integer i = 0; i < here; ++i) {
        std::uint8_t const part = problem_.part(p, first + i);
        auto const found = static_cast<std::int32_t>(at[i]);
        if (!residuals) predictions_.data()[p * tokens_ + first + i] = found;
        if (part == softmax_problem::neither) continue;
        // A logit that is not finite must not pass for a prediction.
        double const loss =
            is_finite(size_of_all[i])
                ? std::log(static_cast<double>(total[i])) -
                      (static_cast<double>(picked[i]) - static_cast<double>(best[i]))
                : std::numeric_limits<double>::quiet_NaN();
        out.loss[part - 1] += loss;
        out.correct[part - 1] += found == label(first + i);
      }
      if (!residuals) continue;
      for (integer r = 0; r < packets; ++r) {
        P const factor = pdiv(pload<P>(weight + r * W), pload<P>(total + r * W));
        for (integer c = 0; c < problem_.classes; ++c)
          pstore(mine + c * R + r * W, pmul(pload<P>(mine + c * R + r * W), factor));
      }
      for (integer i = 0; i < here; ++i) mine[label(first + i) * R + i] -= weight[i];
      for (integer c = 0; c < problem_.classes; ++c) {
        P sum = pset1<P>(C(0));
        for (integer r = 0; r < packets; ++r) sum = padd(sum, pload<P>(mine + c * R + r * W));
        token_sums_[strip * columns_ + p * problem_.classes + c] = static_cast<double>(predux(sum));
      }
    }
    if (!residuals) return;
    std::fill(z + columns_ * R, z + padded_ * R, C(0));
    integer const there = packets_of(strip, tokens_);
    for (integer k = 0; k < padded_; ++k)
      publish(z + k * R, there, threads_.size() > 1,
              residuals_.data() + place(strip, k, tokens_, padded_));
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores need one
  }

  std::int32_t label(integer token) const { return problem_.labels.data()[token]; }

  /// Adds the biases; the largest logit of each token, its class, and the sum of small parts of their
  /// sizes, which is finite if all are.
  void find_largest(C* z, C const* offset, C* best, C* at, C* sizes) const {
    using namespace packet;
    P largest = padd(pload<P>(z), pset1<P>(offset[0])), which = pset1<P>(C(0));
    P const part = pset1<P>(C(0x1p-32));
    P sum = pmul(pabs(largest), part);
    pstore(z, largest);
    for (integer c = 1; c < problem_.classes; ++c) {
      P const x = padd(pload<P>(z + c * R), pset1<P>(offset[c]));
      pstore(z + c * R, x);
      which = pselect(pcmp_lt(largest, x), pset1<P>(static_cast<C>(c)), which);
      largest = pmax(largest, x);
      sum = pmadd(pabs(x), part, sum);
    }
    pstore(best, largest);
    pstore(at, which);
    pstore(sizes, sum);
  }

  void exponentiate(C* z, C const* best, C* total) const {
    using namespace packet;
    P const largest = pload<P>(best);
    P sum = pset1<P>(C(0));
    for (integer c = 0; c < problem_.classes; ++c) {
      P const below = psub(pload<P>(z + c * R), largest);
      P e = pexp(below);
      // Where gradients are divided by their size, the least number must not stand for 0.
      if (careful_ || wide())
        e = pselect(pcmp_lt(below, pset1<P>(least_exponent)), pset1<P>(C(0)), e);
      pstore(z + c * R, e);
      sum = padd(sum, e);
    }
    pstore(total, sum);
  }

  // ---- a strip of features: gradient → weights --------------------------------------------------

  /// Σ shift · weights over a strip.
  static double shifted(C const* shift, C const* w, integer count) {
    using namespace packet;
    P sum = pset1<P>(C(0));
    for (integer r = 0; r < count; ++r)
      sum = pmadd(pload<P>(shift + r * W), pload<P>(w + r * W), sum);
    return static_cast<double>(predux(sum));
  }

  /// Adam on weights that carry the factor rho: the step carries it too.
  void update(integer strip, C const* g, adam const& by, double rate, double root) {
    using namespace packet;
    auto const all = [](double x) { return pset1<P>(static_cast<C>(x)); };
    P const keep2 = all(by.beta2), take1 = all(1 - by.beta1), take2 = all(1 - by.beta2);
    P const epsilon = all(by.epsilon), bias2 = all(root), decay = all(by.weight_decay);
    integer const count = packets_of(strip, width_);
    for (integer k = 0; k < columns_; ++k) {
      frame const f = frames_.of(k / problem_.classes, strip);
      P const residual = all(bias_gradient_.data()[k]);
      C* const w = weights_at(strip, k);
      C* const m = first_moment_.data() + (strip * padded_ + k) * R;
      C* const v = second_moment_.data() + (strip * padded_ + k) * R;
      alignas(128) C updated[R];
      for (integer r = 0; r < count; ++r) {
        integer const i = r * W;
        P const rho = pload<P>(f.rho + i), old = pload<P>(w + i);
        P d = pmul(psub(pload<P>(g + k * R + i), pmul(pload<P>(f.shift + i), residual)), rho);
        if (by.weight_decay != 0) {
          P const zero = pset1<P>(C(0)), none = pcmp_eq(rho, zero);
          d = pmadd(decay, pselect(none, zero, pdiv(old, rho)), d);
        }
        P first = pload<P>(m + i), second = pload<P>(v + i);
        first = pmadd(psub(d, first), take1, first);
        second = pmadd(second, keep2, pmul(pmul(d, d), take2));
        pstore(m + i, first);
        pstore(v + i, second);
        P const step = pdiv(pmul(first, all(rate)), pmadd(psqrt(second), bias2, epsilon));
        pstore(updated + i, psub(old, pmul(step, rho)));
      }
      feature_sums_[strip * columns_ + k] = shifted(f.shift, updated, count);
      publish(updated, count, threads_.size() > 1, w);
    }
  }

  /// The same where squares of gradients may leave the range of C: gradients are those of x̃, without
  /// rho, and the second moment is kept as its root.
  void update_carefully(integer strip, C const* g, adam const& by, double rate, double root) {
    using namespace packet;
    auto const all = [](double x) { return pset1<P>(static_cast<C>(x)); };
    P const keep2 = all(by.beta2), take1 = all(1 - by.beta1), take2 = all(1 - by.beta2);
    P const epsilon = all(by.epsilon), bias2 = all(root), decay = all(by.weight_decay);
    P const zero = pset1<P>(C(0)), least = pset1<P>((std::numeric_limits<C>::min)());
    integer const count = packets_of(strip, width_);
    for (integer k = 0; k < columns_; ++k) {
      frame const f = frames_.of(k / problem_.classes, strip);
      P const residual = all(bias_gradient_.data()[k]);
      C* const w = weights_at(strip, k);
      C* const m = first_moment_.data() + (strip * padded_ + k) * R;
      C* const v = second_moment_.data() + (strip * padded_ + k) * R;
      alignas(128) C updated[R];
      for (integer r = 0; r < count; ++r) {
        integer const i = r * W;
        P const rho = pload<P>(f.rho + i), old = pload<P>(w + i), none = pcmp_eq(rho, zero);
        P const by_rho = pdiv(pset1<P>(C(1)), pselect(none, pset1<P>(C(1)), rho));
        P d = psub(pload<P>(g + k * R + i), pmul(pload<P>(f.shift + i), residual));
        if (by.weight_decay != 0) d = pmadd(pmul(decay, by_rho), pmul(old, by_rho), d);
        d = pselect(none, zero, d);
        P const first = pmadd(psub(d, pload<P>(m + i)), take1, pload<P>(m + i));
        P const before = pload<P>(v + i), largest = pmax(pmax(before, pabs(d)), least);
        P const a = pdiv(before, largest), b = pdiv(d, largest);
        P const second = pmul(largest, psqrt(pmadd(pmul(a, a), keep2, pmul(pmul(b, b), take2))));
        pstore(m + i, first);
        pstore(v + i, second);
        P const size = pmax(pmadd(second, bias2, pmul(epsilon, by_rho)), least);
        pstore(updated + i, psub(old, pmul(pmul(pdiv(first, size), all(rate)), rho)));
      }
      feature_sums_[strip * columns_ + k] = shifted(f.shift, updated, count);
      publish(updated, count, threads_.size() > 1, w);
    }
  }

  /// What is added to the logits of x̃: the biases, and the weights' share of the shifts.
  void find_offsets() {
    std::vector<double> sums;
    add_strips(feature_sums_, feature_strips_, sums);
    for (integer k = 0; k < columns_; ++k)
      offset_[k] = static_cast<C>(bias_.data()[k] - sums.data()[k]);
  }

  team threads_;
  softmax_problem const& problem_;
  integer tokens_, width_, columns_, padded_, token_strips_, feature_strips_;
  frames frames_;
  aligned_array<C> weights_;                       // d × columns, times rho, in blocks of depth D
  aligned_array<C> residuals_;                     // n × columns, in blocks of depth D
  aligned_array<C> first_moment_, second_moment_;  // feature strips × columns × R
  aligned_array<C> offset_;                        // columns
  aligned_array<double> token_sums_, feature_sums_;                      // strips × columns
  std::vector<double> bias_, bias_gradient_, bias_first_, bias_second_;  // columns
  std::vector<outcome> outcomes_;                                        // token strips × problems
  std::vector<std::int32_t> predictions_;
  std::vector<scratch> scratch_;  // one a thread
  integer steps_ = 0;
  bool careful_ = false;  // with squares of gradients
};

#pragma GCC diagnostic pop

}  // namespace rflow::detail
