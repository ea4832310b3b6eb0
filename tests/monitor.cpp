// SPDX-License-Identifier: Apache-2.0
#include <rflow/monitor.hpp>

#include <cstring>
#include <limits>
#include <random>

#include <doctest/doctest.h>

#include "exact.hpp"
#include "reference.hpp"

using doctest::Approx;
using rflow::status;

namespace {

template <class T>
struct sample {
  reference::stack x;
  std::vector<T> values;

  sample(std::mt19937& bits, std::size_t sites, std::size_t tokens, std::size_t width)
      : x(reference::random_stack(bits, sites, tokens, width)), values(reference::pack<T>(x)) {}

  rflow::layer_stack<T> stack() const { return reference::stack_of(values, x); }
  std::ptrdiff_t sites() const { return stack().sites(); }
  std::ptrdiff_t tokens() const { return stack().all_tokens(); }
  rflow::view<T> rows(std::ptrdiff_t site, std::ptrdiff_t first, std::ptrdiff_t count) const {
    rflow::view<T> const all = stack()[site];
    return {all.data + first * all.row_stride, count, all.cols, all.row_stride, all.col_stride};
  }
};

enum class order { by_micro_batch, by_site, any };

/// Pushes tokens begin … end of the sample as one sequence in random chunks.
template <class T>
void push_sequence(rflow::flow_monitor<T>& monitor, sample<T> const& s, std::ptrdiff_t begin,
                   std::ptrdiff_t end, order by, std::mt19937& bits, std::ptrdiff_t longest = 40,
                   std::vector<std::uint8_t> const& keep = {}) {
  auto const sites = s.sites(), tokens = end - begin;
  std::vector<std::ptrdiff_t> had(static_cast<std::size_t>(sites), 0);
  auto const push = [&](std::ptrdiff_t l, std::ptrdiff_t count) {
    auto& first = had[static_cast<std::size_t>(l)];
    std::span<std::uint8_t const> mask;
    if (!keep.empty()) mask = {keep.data() + begin + first, static_cast<std::size_t>(count)};
    REQUIRE(monitor.push(l, first, s.rows(l, begin + first, count), mask));
    first += count;
  };
  auto const chunk = [&](std::ptrdiff_t left) {
    return std::min<std::ptrdiff_t>(left, 1 + static_cast<std::ptrdiff_t>(bits()) % longest);
  };
  if (by == order::by_micro_batch) {
    for (std::ptrdiff_t done = 0; done < tokens;) {
      std::ptrdiff_t const count = chunk(tokens - done);
      for (std::ptrdiff_t l = 0; l < sites; ++l) push(l, count);
      done += count;
    }
  } else if (by == order::by_site) {
    for (std::ptrdiff_t l = 0; l < sites; ++l)
      while (had[static_cast<std::size_t>(l)] < tokens)
        push(l, chunk(tokens - had[static_cast<std::size_t>(l)]));
  } else {
    while (had.back() < tokens) {
      auto const l = static_cast<std::ptrdiff_t>(bits() % had.size());
      std::ptrdiff_t const most = l == 0 ? tokens : had[static_cast<std::size_t>(l - 1)];
      std::ptrdiff_t const left = most - had[static_cast<std::size_t>(l)];
      if (left > 0) push(l, chunk(left));
    }
  }
}

void check_same(rflow::measured const& a, rflow::measured const& b, double within) {
  CHECK(a.why == b.why);
  if (a.ok() && b.ok())
    CHECK(std::abs(a.value - b.value) <= within * std::max(1.0, std::abs(b.value)));
}

void check_same(rflow::running_stat const& a, rflow::running_stat const& b, double within) {
  CHECK(a.count == b.count);
  CHECK(std::abs(a.mean - b.mean) <= within * std::max(1.0, std::abs(b.mean)));
  CHECK(std::abs(a.stddev() - b.stddev()) <= std::sqrt(within) * std::max(1.0, std::abs(b.mean)));
}

void check_same(rflow::flow_report const& a, rflow::flow_report const& b, double within) {
  REQUIRE(a.sites == b.sites);
  CHECK(a.tokens == b.tokens);
  CHECK(a.width == b.width);
  CHECK(a.zero_rows == b.zero_rows);
  for (std::size_t l = 0; l < a.inter_token.size(); ++l) {
    check_same(a.inter_token[l], b.inter_token[l], within);
    check_same(a.rms_norm[l], b.rms_norm[l], within);
    check_same(a.per_sequence[l], b.per_sequence[l], within);
    CHECK(a.non_finite[l].token == b.non_finite[l].token);
    CHECK(a.non_finite[l].feature == b.non_finite[l].feature);
  }
  for (std::size_t l = 0; l < a.adjacent.size(); ++l) {
    check_same(a.adjacent[l].mean, b.adjacent[l].mean, within);
    check_same(a.adjacent[l].stddev, b.adjacent[l].stddev, std::sqrt(within));
    CHECK(a.adjacent[l].left_out == b.adjacent[l].left_out);
    check_same(a.variance.steps[l], b.variance.steps[l], within);
  }
  for (std::size_t l = 0; l < a.variance.curvature.size(); ++l)
    check_same(a.variance.curvature[l], b.variance.curvature[l], 10 * within);
  check_same(a.variance.st1, b.variance.st1, within);
  check_same(a.variance.st2, b.variance.st2, within);
  check_same(a.variance.path_energy, b.variance.path_energy, within);
  check_same(a.variance.path_length, b.variance.path_length, within);
  check_same(a.variance.factor, b.variance.factor, within);
}

/// What is asked of a sum in the products' type: rows are summed in the same order by both.
template <class T>
inline constexpr double within = std::same_as<T, double> ? 1e-12 : 2e-6;

}  // namespace

// ---- equal to the batch -------------------------------------------------------------------------

TEST_CASE_TEMPLATE("a monitor gives what flow gives, whatever the chunks", T, float, double,
                   rflow::f16, rflow::bf16) {
  for (unsigned seed = 1; seed <= 30; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    std::size_t const sites = 1 + bits() % 9, tokens = 2 + bits() % 120, width = 1 + bits() % 150;
    CAPTURE(sites);
    CAPTURE(tokens);
    CAPTURE(width);
    sample<T> const s(bits, sites, tokens, width);
    for (order const by : {order::by_micro_batch, order::by_site, order::any}) {
      rflow::flow_monitor<T> monitor(s.sites(), static_cast<std::ptrdiff_t>(width));
      push_sequence(monitor, s, 0, s.tokens(), by, bits, 60);
      REQUIRE(monitor.end_sequence());
      rflow::monitor_report const r = monitor.report();
      CHECK(r.sequences == 1);
      check_same(r.pooled, rflow::flow(s.stack()), within<T>);
    }
  }
}

TEST_CASE_TEMPLATE("a monitor is exact however far its data are from 1", T, float, double,
                   rflow::bf16) {
  for (unsigned seed = 1; seed <= 80; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    constexpr bool wide = std::same_as<T, double>;
    reference::stack x = reference::hard_stack(bits, wide ? 290 : 30, wide ? 1e13 : 1e4);
    std::vector<T> const values = reference::pack<T>(x);
    rflow::layer_stack<T> const stack = reference::stack_of(values, x);
    rflow::flow_monitor<T> monitor(stack.sites(), stack.width());
    std::ptrdiff_t const half = stack.size() / 2;
    for (auto const& [first, count] :
         {std::pair{std::ptrdiff_t{0}, half}, {half, stack.size() - half}})
      for (std::ptrdiff_t l = 0; count > 0 && l < stack.sites(); ++l) {
        rflow::view<T> const all = stack[l];
        REQUIRE(monitor.push(l, first,
                             rflow::view<T>(all.data + first * all.row_stride, count, all.cols)));
      }
    REQUIRE(monitor.end_sequence());
    rflow::monitor_report const r = monitor.report();
    reference::check_exact<T>(r.pooled, reference::exact_chain(x));

    // One sequence: its figures are those of all, and count where those have an answer.
    auto const same = [](rflow::running_stat const& one, rflow::measured const& all) {
      CHECK(one.count == (all.ok() ? 1 : 0));
      if (all.ok()) CHECK(one.mean == Approx(all.value).epsilon(1e-13));
    };
    rflow::layer_variance const& v = r.pooled.variance;
    same(r.per_sequence.st1, v.st1), same(r.per_sequence.st2, v.st2);
    same(r.per_sequence.path_energy, v.path_energy);
    same(r.per_sequence.path_length, v.path_length);
    for (std::size_t l = 0; l < v.steps.size(); ++l) {
      same(r.per_sequence.steps[l], v.steps[l]);
      same(r.per_sequence.adjacent[l], r.pooled.adjacent[l].mean);
    }
    for (std::size_t l = 0; l < v.curvature.size(); ++l)
      same(r.per_sequence.curvature[l], v.curvature[l]);
    for (std::size_t l = 0; l < r.pooled.rms_norm.size(); ++l) {
      same(r.per_sequence.rms_norm[l], r.pooled.rms_norm[l]);
      same(r.per_sequence.inter_token[l], r.pooled.inter_token[l]);
    }
  }
}

TEST_CASE_TEMPLATE("how a monitor's rows are cut hardly matters", T, float, rflow::bf16) {
  std::mt19937 bits(2);
  sample<T> const s(bits, 5, 333, 70);
  rflow::flow_monitor<T> whole(5, 70);
  for (std::ptrdiff_t l = 0; l < 5; ++l) REQUIRE(whole.push(l, 0, s.rows(l, 0, 333)));
  REQUIRE(whole.end_sequence());
  for (int repeat = 0; repeat < 5; ++repeat) {
    rflow::flow_monitor<T> cut(5, 70);
    push_sequence(cut, s, 0, 333, order::any, bits);
    REQUIRE(cut.end_sequence());
    check_same(cut.report().pooled, whole.report().pooled, 1e-13);
  }
}

TEST_CASE("the same bits for any number of threads") {
  std::mt19937 bits(4);
  sample<float> const s(bits, 4, 600, 33);
  auto const run = [&](int threads) {
    rflow::flow_monitor<float> monitor(4, 33, {}, rflow::on_cpu{.threads = threads});
    for (std::ptrdiff_t l = 0; l < 4; ++l) REQUIRE(monitor.push(l, 0, s.rows(l, 0, 600)));
    REQUIRE(monitor.end_sequence());
    return monitor.moments().flow;
  };
  rflow::flow_moments const one = run(1);
  for (int const threads : {2, 3, 16}) {
    rflow::flow_moments const many = run(threads);
    std::vector<double> const a = rflow::to_numbers(one), b = rflow::to_numbers(many);
    REQUIRE(a.size() == b.size());
    CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
  }
}

TEST_CASE("rows may lie anyhow in memory") {
  std::mt19937 bits(6);
  sample<float> const s(bits, 4, 21, 37);
  rflow::layer_stack<float> const across(s.values.data(), {37, 21, 4},
                                         rflow::stack_strides{1, 37, 21 * 37});
  // What were features are the sites now, and the other way round: strides of 21 · 37 features.
  rflow::flow_monitor<float> monitor(37, 4);
  for (std::ptrdiff_t l = 0; l < 37; ++l) REQUIRE(monitor.push(l, 0, across[l]));
  REQUIRE(monitor.end_sequence());
  check_same(monitor.report().pooled, rflow::flow(across), 2e-6);
}

// ---- many sequences -----------------------------------------------------------------------------

TEST_CASE_TEMPLATE("sequences, masks and skipped tokens as in a stack", T, float, double) {
  for (unsigned seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    sample<T> const s(bits, 1 + bits() % 6, 90 + bits() % 60, 1 + bits() % 40);
    std::vector<std::ptrdiff_t> offsets{0};
    while (offsets.back() < s.tokens())
      offsets.push_back(std::min<std::ptrdiff_t>(
          s.tokens(), offsets.back() + 1 + static_cast<std::ptrdiff_t>(bits() % 40)));
    std::ptrdiff_t const skip = static_cast<std::ptrdiff_t>(bits() % 3);
    std::vector<std::uint8_t> keep(static_cast<std::size_t>(s.tokens()));
    for (auto& k : keep) k = bits() % 5 != 0;
    std::vector<std::uint8_t> mask = keep;
    for (std::ptrdiff_t const at : offsets)
      for (std::ptrdiff_t i = at; i < std::min(s.tokens(), at + skip); ++i)
        mask[static_cast<std::size_t>(i)] = 0;
    rflow::monitor_options const options{.normalize = rflow::normalization::per_token,
                                         .skip_first = skip};
    std::ptrdiff_t const width = s.stack().width();
    rflow::flow_monitor<T> monitor(s.sites(), width, options);
    rflow::flow_monitor<T> halves[] = {rflow::flow_monitor<T>(s.sites(), width, options),
                                       rflow::flow_monitor<T>(s.sites(), width, options)};
    rflow::sequence_figures expected(s.sites());
    std::size_t const sequences = offsets.size() - 1;
    for (std::size_t q = 0; q < sequences; ++q) {
      auto& half = halves[2 * q < sequences ? 0 : 1];
      for (auto* const m : {&monitor, &half}) {
        push_sequence(*m, s, offsets[q], offsets[q + 1], order::any, bits, 17, keep);
        REQUIRE(m->end_sequence());
      }
      std::vector<bool> only(static_cast<std::size_t>(s.tokens()));
      for (std::ptrdiff_t i = offsets[q]; i < offsets[q + 1]; ++i)
        only[static_cast<std::size_t>(i)] = mask[static_cast<std::size_t>(i)];
      rflow::flow_report const alone =
          rflow::flow(s.stack().tokens(only), {.normalize = options.normalize});
      auto const add = [](rflow::running_stat& to, rflow::measured const& x) {
        if (x.ok()) to.add(x.value);
      };
      add(expected.st1, alone.variance.st1);
      add(expected.st2, alone.variance.st2);
      add(expected.path_energy, alone.variance.path_energy);
      add(expected.path_length, alone.variance.path_length);
      for (std::size_t l = 0; l < alone.inter_token.size(); ++l) {
        add(expected.inter_token[l], alone.inter_token[l]);
        add(expected.rms_norm[l], alone.rms_norm[l]);
      }
      for (std::size_t l = 0; l < alone.adjacent.size(); ++l) {
        add(expected.adjacent[l], alone.adjacent[l].mean);
        add(expected.steps[l], alone.variance.steps[l]);
      }
      for (std::size_t l = 0; l < alone.variance.curvature.size(); ++l)
        add(expected.curvature[l], alone.variance.curvature[l]);
    }
    halves[0].merge(halves[1]);
    for (auto const* const m : {&monitor, &halves[0]}) {
      rflow::monitor_report r = m->report();
      CHECK(r.sequences == static_cast<std::ptrdiff_t>(sequences));
      check_same(
          r.pooled,
          rflow::flow(s.stack().tokens(mask).sequences(offsets), {.normalize = options.normalize}),
          within<T>);
      r.per_sequence.visit(expected,
                           [](rflow::running_stat const& a, rflow::running_stat const& b) {
                             check_same(a, b, 10 * within<T>);
                           });
    }
  }
}

TEST_CASE("a discarded sequence leaves no trace") {
  std::mt19937 bits(8);
  sample<float> const s(bits, 3, 50, 20);
  rflow::flow_monitor<float> monitor(3, 20), plain(3, 20);
  REQUIRE(monitor.push(0, 0, s.rows(0, 30, 20)));
  REQUIRE(monitor.push(1, 0, s.rows(1, 30, 7)));
  monitor.discard_sequence();
  for (auto* const m : {&monitor, &plain}) {
    push_sequence(*m, s, 0, 50, order::by_site, bits, 1000);
    REQUIRE(m->end_sequence());
  }
  CHECK(monitor.report().pooled.variance.st1.value == plain.report().pooled.variance.st1.value);
  CHECK(monitor.report().pooled.inter_token[2].value == plain.report().pooled.inter_token[2].value);
}

// ---- minibatch CKA ------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("CKA of a monitor is that of the same batches", T, float, double, rflow::f16,
                   rflow::bf16) {
  for (unsigned seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    sample<T> const s(bits, 1 + bits() % 6, 60 + bits() % 90, 1 + bits() % 70);
    std::ptrdiff_t const batch = 4 + static_cast<std::ptrdiff_t>(bits() % 60);
    CAPTURE(batch);
    std::vector<std::ptrdiff_t> offsets{0};
    while (offsets.back() < s.tokens())
      offsets.push_back(std::min<std::ptrdiff_t>(
          s.tokens(), offsets.back() + 1 + static_cast<std::ptrdiff_t>(bits() % 90)));
    bool const masked = seed % 3 == 0;
    std::vector<std::uint8_t> keep(static_cast<std::size_t>(s.tokens()), 1);
    for (auto& k : keep) k = !masked || bits() % 4 != 0;

    rflow::cka_accumulator<> expected;
    rflow::sequence_figures figures(s.sites(), true);
    for (std::size_t q = 0; q + 1 < offsets.size(); ++q) {
      rflow::cka_accumulator<> alone;
      for (std::ptrdiff_t b = offsets[q]; b < offsets[q + 1]; b += batch) {
        std::vector<bool> only(static_cast<std::size_t>(s.tokens()));
        for (std::ptrdiff_t i = b; i < std::min(b + batch, offsets[q + 1]); ++i)
          only[static_cast<std::size_t>(i)] = keep[static_cast<std::size_t>(i)];
        alone.add(s.stack().tokens(only));
      }
      figures.add(alone.moments());
      expected.merge(alone);
    }
    for (order const by : {order::by_micro_batch, order::by_site, order::any}) {
      rflow::flow_monitor<T> monitor(s.sites(), s.stack().width(),
                                     {.cka = true, .cka_batch = batch},
                                     rflow::on_cpu{.threads = 3});
      for (std::size_t q = 0; q + 1 < offsets.size(); ++q) {
        push_sequence(monitor, s, offsets[q], offsets[q + 1], by, bits,
                      1 + static_cast<std::ptrdiff_t>(bits() % 150),
                      masked ? keep : std::vector<std::uint8_t>{});
        REQUIRE(monitor.end_sequence());
      }
      rflow::monitor_report r = monitor.report();
      CHECK(r.cka.sites() == expected.sites());
      CHECK(r.cka.batches() == expected.batches());
      CHECK(r.cka.tokens() == expected.tokens());
      CHECK(r.cka.left_out() == expected.left_out());
      double const close = std::same_as<T, double> ? 1e-11 : 1e-5;
      for (std::ptrdiff_t p = 0; p < s.sites(); ++p)
        for (std::ptrdiff_t q = 0; q < s.sites(); ++q)
          check_same(r.cka(p, q), expected(p, q), close);
      for (std::size_t i = 0; i < figures.cka.size(); ++i)
        check_same(r.per_sequence.cka[i], figures.cka[i], 10 * close);
    }
  }
}

TEST_CASE("CKA of merged monitors is that of one") {
  std::mt19937 bits(3);
  sample<double> const s(bits, 4, 90, 12);
  rflow::monitor_options const options{.cka = true, .cka_batch = 16};
  rflow::flow_monitor<double> one(4, 12, options), a(4, 12, options), b(4, 12, options);
  for (std::ptrdiff_t first = 0; first < 90; first += 30)
    for (auto* const m : {&one, first < 60 ? &a : &b}) {
      push_sequence(*m, s, first, first + 30, order::any, bits);
      REQUIRE(m->end_sequence());
    }
  a.merge(b);
  rflow::monitor_report const whole = one.report(), merged = a.report();
  CHECK(merged.cka.batches() == 6);
  CHECK(merged.cka(0, 3) == Approx(whole.cka(0, 3).value).epsilon(1e-13));
  CHECK(merged.per_sequence.cka[3].mean == Approx(whole.per_sequence.cka[3].mean).epsilon(1e-13));
  rflow::flow_monitor<double> without(4, 12), other(4, 12, {.cka = true, .cka_batch = 17});
  CHECK_THROWS_AS(a.merge(without), std::invalid_argument);
  CHECK_THROWS_AS(a.merge(other), std::invalid_argument);
  CHECK_THROWS_WITH_AS(rflow::flow_monitor<double>(4, 12, {.cka = true, .cka_batch = 3}),
                       "rflow::flow_monitor: a batch of 3 tokens, but CKA needs 4",
                       std::invalid_argument);
  CHECK(without.report().cka.sites() == 0);
  CHECK(without.report().cka(0, 1).why == status::too_few_rows);
}

TEST_CASE("CKA of a monitor does not care for the scale of doubles") {
  std::mt19937 bits(15);
  sample<double> s(bits, 3, 50, 11);
  rflow::monitor_options const options{.cka = true, .cka_batch = 16};
  auto const cka = [&](double scale) {
    std::vector<double> scaled = s.values;
    for (double& v : scaled) v *= scale;
    rflow::flow_monitor<double> monitor(3, 11, options);
    for (std::ptrdiff_t l = 0; l < 3; ++l)
      REQUIRE(monitor.push(l, 0, rflow::view<double>(scaled.data() + l * 550, 50, 11)));
    REQUIRE(monitor.end_sequence());
    return monitor.report().cka(0, 2).value;
  };
  double const base = cka(1);
  for (double const scale : {1e-140, 1e-100, 1e-30, 1e30, 1e100, 1e140})
    CHECK(cka(scale) == Approx(base).epsilon(1e-12));
}

TEST_CASE("moments survive as numbers") {
  std::mt19937 bits(13);
  sample<float> const s(bits, 4, 60, 9);
  rflow::monitor_options const options{.cka = true, .cka_batch = 16};
  rflow::flow_monitor<float> monitor(4, 9, options), restored(4, 9, options);
  for (std::ptrdiff_t first = 0; first < 60; first += 20) {
    push_sequence(monitor, s, first, first + 20, order::by_site, bits);
    REQUIRE(monitor.end_sequence());
  }
  std::vector<double> const numbers = rflow::to_numbers(monitor.moments());
  rflow::monitor_moments copy(4, 9, true);
  rflow::from_numbers(copy, numbers);
  CHECK(rflow::to_numbers(copy) == numbers);
  restored.merge(copy);
  CHECK(rflow::to_numbers(restored.moments()) == numbers);
  CHECK(restored.report().cka(1, 2).value == monitor.report().cka(1, 2).value);
  rflow::monitor_moments other(3, 9, true), plain(4, 9, false);
  CHECK_THROWS_AS(rflow::from_numbers(other, numbers), std::invalid_argument);
  CHECK_THROWS_WITH_AS(restored.merge(plain),
                       "rflow::monitor_moments::merge: 4 sites x 9 with CKA and 4 sites x 9",
                       std::invalid_argument);
}

TEST_CASE("a constant site and a NaN keep their status in CKA and spoil no other") {
  std::mt19937 bits(5);
  sample<float> s(bits, 4, 40, 10);
  for (auto& row : s.x[1]) row = s.x[1][0];
  s.x[2][17][3] = std::numeric_limits<double>::quiet_NaN();
  s.values = reference::pack<float>(s.x);
  rflow::flow_monitor<float> monitor(4, 10, {.cka = true, .cka_batch = 16});
  push_sequence(monitor, s, 0, 40, order::any, bits);
  REQUIRE(monitor.end_sequence());
  rflow::cka_accumulator<> const cka = monitor.report().cka;
  CHECK(cka(0, 1).why == status::constant_layer);
  CHECK(cka(2, 3).why == status::non_finite);
  rflow::cka_accumulator<> expected;
  for (std::ptrdiff_t b = 0; b < 40; b += 16) {
    std::vector<rflow::view<float>> ends{s.rows(0, b, std::min<std::ptrdiff_t>(16, 40 - b)),
                                         s.rows(3, b, std::min<std::ptrdiff_t>(16, 40 - b))};
    expected.add(rflow::layer_stack<float>(ends));
  }
  check_same(cka(0, 3), expected(0, 1), 1e-5);
}

// ---- rows without an answer ---------------------------------------------------------------------

TEST_CASE_TEMPLATE("zero rows, NaN and extreme rows as in flow", T, float, double, rflow::bf16) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    sample<T> s(bits, 2 + bits() % 6, 30, 1 + bits() % 70);
    double const size = std::same_as<T, double> ? 1e140 : 1e25;
    double const extreme = bits() % 2 == 0 ? size : 1 / size;
    for (int hit = 0; hit < 6; ++hit) {
      std::size_t const l = bits() % s.x.size(), i = bits() % 30;
      std::size_t const kind = bits() % 3;
      for (double& v : s.x[l][i]) v *= kind == 0 ? 0 : kind == 1 ? extreme : 1;
      if (kind == 2)
        s.x[l][i][bits() % s.x[l][i].size()] = bits() % 2 == 0
                                                   ? std::numeric_limits<double>::infinity()
                                                   : std::numeric_limits<double>::quiet_NaN();
    }
    s.values = reference::pack<T>(s.x);
    for (order const by : {order::by_micro_batch, order::by_site}) {
      rflow::flow_monitor<T> monitor(s.sites(), s.stack().width());
      push_sequence(monitor, s, 0, 30, by, bits);
      REQUIRE(monitor.end_sequence());
      check_same(monitor.report().pooled, rflow::flow(s.stack()), 10 * within<T>);
    }
  }
}

TEST_CASE("the position of a NaN counts the tokens of earlier sequences") {
  std::vector<float> x(12, 1.0f);
  rflow::flow_monitor<float> monitor(2, 3);
  auto const sequence = [&] {
    for (std::ptrdiff_t l = 0; l < 2; ++l)
      REQUIRE(monitor.push(l, 0, rflow::view<float>(x.data(), 4, 3)));
    REQUIRE(monitor.end_sequence());
  };
  sequence();
  x[7] = std::numeric_limits<float>::quiet_NaN();
  sequence();
  CHECK(monitor.report().pooled.non_finite[1].token == 6);
  CHECK(monitor.report().pooled.non_finite[1].feature == 1);
}

TEST_CASE("nothing pushed is a report without answers") {
  rflow::flow_monitor<float> monitor(3, 4);
  CHECK(monitor.end_sequence());
  rflow::monitor_report const r = monitor.report();
  CHECK(r.sequences == 0);
  CHECK(r.pooled.tokens == 0);
  CHECK(r.pooled.variance.st1.why == status::too_few_rows);
  CHECK(r.per_sequence.st1.count == 0);
}

// ---- in a callback ------------------------------------------------------------------------------

TEST_CASE("more tokens under way than reserved: refused by name, or room is made") {
  std::mt19937 bits(10);
  sample<float> const s(bits, 3, 40, 9);
  rflow::flow_monitor<float> strict(3, 9, {.on_full = rflow::when_full::refuse});
  CHECK_FALSE(strict.push(0, 0, s.rows(0, 0, 1)));
  CHECK(strict.error() == "rflow::flow_monitor: 1 tokens under way, but room for 0: reserve more");
  strict.clear_error();
  strict.reserve(16);
  // Many sequences of any length fit as long as no more than 16 are under way.
  push_sequence(strict, s, 0, 40, order::by_micro_batch, bits, 16);
  REQUIRE(strict.end_sequence());
  REQUIRE(strict.push(0, 0, s.rows(0, 0, 16)));
  CHECK_FALSE(strict.push(0, 16, s.rows(0, 16, 1)));
  CHECK(strict.error() ==
        "rflow::flow_monitor: 17 tokens under way, but room for 16: reserve more");
  strict.clear_error();
  for (std::ptrdiff_t l = 1; l < 3; ++l) REQUIRE(strict.push(l, 0, s.rows(l, 0, 16)));
  REQUIRE(strict.end_sequence());

  rflow::flow_monitor<float> growing(3, 9);
  growing.reserve(4);
  push_sequence(growing, s, 0, 40, order::any, bits, 7);  // grows with tokens under way
  REQUIRE(growing.end_sequence());
  check_same(growing.report().pooled, rflow::flow(s.stack()), 2e-6);
  CHECK_THROWS_AS(growing.reserve(0), std::invalid_argument);
}

// ---- misuse -------------------------------------------------------------------------------------

TEST_CASE("what cannot be right is refused, named, and changes nothing") {
  std::mt19937 bits(11);
  sample<float> const s(bits, 3, 30, 8);
  rflow::flow_monitor<float> monitor(3, 8), plain(3, 8);
  auto const refused = [&](bool done, std::string const& why) {
    CHECK_FALSE(done);
    CHECK(std::string(monitor.error()) == "rflow::flow_monitor: " + why);
    CHECK_THROWS_WITH_AS(monitor.report(), ("rflow::flow_monitor: " + why).c_str(),
                         std::invalid_argument);
    monitor.clear_error();
  };
  REQUIRE(monitor.push(0, 0, s.rows(0, 0, 10)));
  refused(monitor.push(0, 0, s.rows(0, 0, 10)), "site 0: tokens 0 to 9 were pushed before");
  refused(monitor.push(0, 5, s.rows(0, 5, 10)),
          "site 0: tokens 5 to 14 overlap with the 10 pushed before");
  refused(monitor.push(0, 12, s.rows(0, 12, 2)), "site 0: token 12 is out of order, 10 is next");
  refused(monitor.push(0, -1, s.rows(0, 0, 2)),
          "site 0: tokens -1 to 0 overlap with the 10 pushed before");
  refused(monitor.push(2, 0, s.rows(2, 0, 1)), "site 2: token 0 is out of order, site 1 has had 0");
  refused(monitor.push(1, 0, s.rows(1, 0, 11)),
          "site 1: token 10 is out of order, site 0 has had 10");
  refused(monitor.push(3, 0, s.rows(0, 0, 1)), "site 3, but there are 3 sites");
  refused(monitor.push(-1, 0, s.rows(0, 0, 1)), "site -1, but there are 3 sites");
  refused(monitor.push(1, 0, rflow::view<float>(s.values.data(), 2, 7)),
          "site 1: rows of 7 features, not 8");
  refused(monitor.push(1, 0, rflow::view<float>(s.values.data(), 0, 8)),
          "site 1: a chunk of 0 rows without data");
  refused(monitor.push(1, 0, rflow::view<float>(nullptr, 1, 8)),
          "site 1: a chunk of 1 rows without data");
  std::vector<std::uint8_t> const mask{1, 0};
  refused(monitor.push(1, 0, s.rows(1, 0, 3), mask), "site 1: a mask of 2 values for 3 rows");
  refused(monitor.push(1, 0, s.rows(1, 0, 2), mask),
          "site 1: token 1 is masked differently than at site 0");
  REQUIRE(monitor.push(1, 0, s.rows(1, 0, 10)));
  refused(monitor.end_sequence(), "the sequence cannot end: site 2 has had 0 of 10 tokens");
  REQUIRE(monitor.push(2, 0, s.rows(2, 0, 4)));
  refused(monitor.end_sequence(), "the sequence cannot end: site 2 has had 4 of 10 tokens");
  REQUIRE(monitor.push(2, 4, s.rows(2, 4, 6)));
  REQUIRE(monitor.end_sequence());
  push_sequence(plain, s, 0, 10, order::by_site, bits, 1000);
  REQUIRE(plain.end_sequence());
  check_same(monitor.report().pooled, plain.report().pooled, 1e-13);

  CHECK_FALSE(monitor.push(7, 0, s.rows(0, 0, 1)));
  CHECK_FALSE(monitor.push(8, 0, s.rows(0, 0, 1)));
  CHECK(monitor.error() == "rflow::flow_monitor: site 7, but there are 3 sites");  // the first
}

TEST_CASE("sizes beyond any memory are refused by name, not tried") {
  constexpr std::ptrdiff_t most = std::numeric_limits<std::ptrdiff_t>::max();
  using monitor = rflow::flow_monitor<float>;
  for (std::ptrdiff_t const huge : {std::ptrdiff_t{1} << 48, most / 8, most - 1, most}) {
    CAPTURE(huge);
    CHECK_THROWS_AS(monitor(huge, 8), std::invalid_argument);
    CHECK_THROWS_AS(monitor(3, huge), std::invalid_argument);
    CHECK_THROWS_AS(monitor(huge, huge), std::invalid_argument);
    CHECK_THROWS_AS(monitor(huge, 1, {.cka = true}), std::invalid_argument);
    CHECK_THROWS_AS(monitor(3, 8, {.cka = true, .cka_batch = huge}), std::invalid_argument);
    monitor plain(3, 8), with_cka(3, 8, {.cka = true});
    CHECK_THROWS_AS(plain.reserve(huge), std::invalid_argument);
    CHECK_THROWS_AS(with_cka.reserve(huge), std::invalid_argument);
    std::vector<float> const row(8, 1.0f);
    CHECK_FALSE(plain.push(0, 0, rflow::view<float>(row.data(), huge, 8, 0)));
    CHECK(plain.error().find("more than an address space holds") != std::string_view::npos);
  }
  CHECK_THROWS_WITH_AS(monitor(3, 8, {.cka = true, .cka_batch = 3000000000}),
                       "rflow::flow_monitor: 3 sites x 8 features in batches of 3000000000 tokens: "
                       "more than an address space holds",
                       std::invalid_argument);
}

TEST_CASE("numbers of tokens at the end of their range") {
  constexpr std::ptrdiff_t most = std::numeric_limits<std::ptrdiff_t>::max();
  std::vector<float> const rows(80, 1.0f);
  rflow::flow_monitor<float> monitor(3, 8);
  CHECK_FALSE(monitor.push(0, most - 3, rflow::view<float>(rows.data(), 10, 8)));
  CHECK(monitor.error() ==
        "rflow::flow_monitor: site 0: 10 rows from token 9223372036854775804 on "
        "are too many to count");
  monitor.clear_error();
  CHECK_FALSE(monitor.push(0, most - 10, rflow::view<float>(rows.data(), 10, 8)));
  CHECK(monitor.error().find("is out of order, 0 is next") != std::string_view::npos);
  monitor.clear_error();
  CHECK_FALSE(monitor.push(0, std::numeric_limits<std::ptrdiff_t>::min(),
                           rflow::view<float>(rows.data(), 10, 8)));
  monitor.clear_error();
  rflow::monitor_moments a = monitor.moments(), b = a;
  a.tokens = most - 1;
  b.tokens = 2;
  CHECK_THROWS_AS(a.merge(b), std::invalid_argument);
  b.tokens = -1;
  CHECK_THROWS_AS(a.merge(b), std::invalid_argument);
}

TEST_CASE("monitors of different kind do not merge") {
  rflow::flow_monitor<float> a(3, 8), b(3, 9), c(2, 8), open(3, 8), failed(3, 8);
  rflow::flow_monitor<float> other(3, 8, {.skip_first = 1});
  CHECK_THROWS_WITH_AS(a.merge(b), "rflow::flow_monitor::merge: 3 sites x 8 and 3 sites x 9",
                       std::invalid_argument);
  CHECK_THROWS_AS(a.merge(c), std::invalid_argument);
  CHECK_THROWS_AS(a.merge(other), std::invalid_argument);
  std::vector<float> const x(8, 1.0f);
  REQUIRE(open.push(0, 0, rflow::view<float>(x.data(), 1, 8)));
  CHECK_THROWS_WITH_AS(
      a.merge(open),
      "rflow::flow_monitor::merge: the other one's sequence of 1 tokens has not ended",
      std::invalid_argument);
  CHECK_FALSE(failed.push(5, 0, rflow::view<float>(x.data(), 1, 8)));
  CHECK_THROWS_AS(a.merge(failed), std::invalid_argument);
  CHECK_THROWS_AS(rflow::flow_monitor<float>(0, 8), std::invalid_argument);
  CHECK_THROWS_AS(rflow::flow_monitor<float>(3, -1), std::invalid_argument);
  CHECK_THROWS_AS(rflow::flow_monitor<float>(3, 8, {.skip_first = -1}), std::invalid_argument);
}

TEST_CASE("a monitor moves with its threads and what is under way") {
  static_assert(std::is_nothrow_move_constructible_v<rflow::flow_monitor<float>>);
  static_assert(std::is_nothrow_move_assignable_v<rflow::flow_monitor<float>>);
  std::mt19937 bits(7);
  sample<float> const s(bits, 3, 40, 21);
  rflow::on_cpu const on{.threads = 3};
  rflow::monitor_options const options{.cka = true, .cka_batch = 16};
  rflow::flow_monitor<float> still(3, 21, options, on), first(3, 21, options, on);
  for (std::ptrdiff_t l = 0; l < 3; ++l) REQUIRE(still.push(l, 0, s.rows(l, 0, 40)));
  REQUIRE(still.end_sequence());
  for (std::ptrdiff_t l = 0; l < 3; ++l) REQUIRE(first.push(l, 0, s.rows(l, 0, 25)));
  rflow::flow_monitor<float> second(std::move(first));
  for (std::ptrdiff_t l = 0; l < 3; ++l) REQUIRE(second.push(l, 25, s.rows(l, 25, 15)));
  first = std::move(second);  // what was moved from can be assigned to
  REQUIRE(first.end_sequence());
  for (std::ptrdiff_t l = 0; l < 3; ++l)
    CHECK(first.report().pooled.inter_token[static_cast<std::size_t>(l)].value ==
          Approx(still.report().pooled.inter_token[static_cast<std::size_t>(l)].value));
  CHECK(first.report().pooled.variance.st2.value ==
        Approx(still.report().pooled.variance.st2.value));
  CHECK(first.report().cka(0, 2).value == Approx(still.report().cka(0, 2).value));
}

TEST_CASE("one monitor for each live sequence, merged when it ends") {
  std::mt19937 bits(8);
  sample<float> const s(bits, 3, 30, 9);
  rflow::on_cpu const on{.threads = 1};
  std::vector<rflow::flow_monitor<float, rflow::on_cpu>> live;  // moves as it grows
  rflow::flow_monitor<float, rflow::on_cpu> total(3, 9, {}, on), in_turn(3, 9, {}, on);
  for (int q = 0; q < 3; ++q) live.emplace_back(3, 9, rflow::monitor_options{}, on);
  for (std::ptrdiff_t step = 0; step < 10; ++step)  // a token of each sequence in turn
    for (std::ptrdiff_t q = 0; q < 3; ++q)
      for (std::ptrdiff_t l = 0; l < 3; ++l)
        REQUIRE(live[static_cast<std::size_t>(q)].push(l, step, s.rows(l, 10 * q + step, 1)));
  for (; !live.empty(); live.pop_back()) {
    REQUIRE(live.back().end_sequence());
    total.merge(live.back());
  }
  for (std::ptrdiff_t q = 0; q < 3; ++q) {
    for (std::ptrdiff_t l = 0; l < 3; ++l) REQUIRE(in_turn.push(l, 0, s.rows(l, 10 * q, 10)));
    REQUIRE(in_turn.end_sequence());
  }
  CHECK(total.report().sequences == 3);
  for (std::size_t l = 0; l < 3; ++l)
    CHECK(total.report().pooled.inter_token[l].value ==
          Approx(in_turn.report().pooled.inter_token[l].value));
  CHECK(total.report().pooled.variance.st1.value ==
        Approx(in_turn.report().pooled.variance.st1.value));
}
