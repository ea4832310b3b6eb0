// SPDX-License-Identifier: Apache-2.0
#pragma once

// The flow of a model while it runs: rows are pushed site by site as an inference engine makes
// them, and only the last two rows of each token under way are kept. For activations that are at
// hand as a whole, flow() does the same with fewer words.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <rflow/cka.hpp>
#include <rflow/default.hpp>
#include <rflow/flow.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// What a monitor does with more tokens under way than reserve() made room for.
enum class when_full {
  allocate,  ///< makes room
  refuse,    ///< refuses the push, by name
};

/// What a monitor is to compute, and of which tokens.
struct monitor_options {
  normalization normalize = normalization::none;  ///< of St1, St2 and the path
  std::ptrdiff_t skip_first = 0;  ///< tokens left out at the start of each sequence (BOS, sinks)
  when_full on_full = when_full::allocate;  ///< beyond what reserve() made room for
  bool cka = false;                         ///< linear minibatch CKA of all pairs of sites
  std::ptrdiff_t cka_batch = 256;  ///< tokens of a batch; it ends with its sequence, if not before
};

/// Figures of each sequence by itself: their mean and spread over sequences. A sequence in which a
/// figure has no answer does not count there.
struct sequence_figures {
  running_stat st1;                       ///< layer-local
  running_stat st2;                       ///< layer-global
  running_stat path_energy;               ///< Σ‖Δ_l‖²
  running_stat path_length;               ///< Σ‖Δ_l‖
  std::vector<running_stat> inter_token;  ///< S
  std::vector<running_stat> adjacent;     ///< S − 1: mean cosine
  std::vector<running_stat> steps;        ///< S − 1
  std::vector<running_stat> curvature;    ///< S − 2
  std::vector<running_stat> rms_norm;     ///< S
  std::vector<running_stat> cka;          ///< S × S: minibatch CKA; empty if not asked for

  sequence_figures() = default;
  /// Of no sequences.
  explicit sequence_figures(std::ptrdiff_t sites, bool with_cka = false) {
    auto const s = static_cast<std::size_t>(sites);
    inter_token.resize(s);
    rms_norm.resize(s);
    adjacent.resize(s - 1);
    steps.resize(s - 1);
    curvature.resize(s > 2 ? s - 2 : 0);
    cka.resize(with_cka ? s * s : 0);
  }

  /// Adds one sequence. Does not allocate.
  void add(flow_moments const& m, normalization by) {
    if (!(m.tokens > 0)) return;
    detail::square_factor const factor = detail::variance_factor(m, by);
    auto const count = [](running_stat& to, measured const& x) {
      if (x.ok()) to.add(x);
    };
    for (std::size_t l = 0; l < rms_norm.size(); ++l) {
      count(inter_token[l], detail::mean_pair_cosine(m, static_cast<std::ptrdiff_t>(l)));
      count(rms_norm[l], detail::rms_norm(m, l));
    }
    for (std::size_t l = 0; l < steps.size(); ++l) {
      if (detail::finite_sites(m, l, l + 1) && m.cosine[l].count > 0)
        adjacent[l].add(m.cosine[l].mean);
      count(steps[l], detail::step_of(m, l, factor));
    }
    for (std::size_t l = 0; l < curvature.size(); ++l)
      count(curvature[l], detail::curvature_of(m, l));
    detail::chain_figures const whole = detail::chain_of(m, factor);
    count(st1, whole.st1), count(st2, whole.st2);
    count(path_energy, whole.path_energy), count(path_length, whole.path_length);
  }

  /// Adds the CKA of one sequence.
  void add(minibatch_moments const& m) {
    for (std::size_t i = 0; i < cka.size(); ++i) {
      auto const at = static_cast<std::ptrdiff_t>(i);
      measured const value = minibatch_cka(m, at / m.sites, at % m.sites);
      if (value.ok()) cka[i].add(value.value);
    }
  }

  /// Adds other sequences.
  void merge(sequence_figures const& other) {
    visit(other, [](running_stat& mine, running_stat const& its) { mine.merge(its); });
  }

  /// Calls f(mine, its) for every figure of this and of another of as many sites.
  template <class Other, class F>
  void visit(Other& other, F const& f) {
    f(st1, other.st1), f(st2, other.st2);
    f(path_energy, other.path_energy), f(path_length, other.path_length);
    auto const each = [&](auto& mine, auto& its) {
      for (std::size_t i = 0; i < mine.size(); ++i) f(mine[i], its[i]);
    };
    each(inter_token, other.inter_token), each(rms_norm, other.rms_norm);
    each(adjacent, other.adjacent), each(steps, other.steps);
    each(curvature, other.curvature), each(cka, other.cka);
  }
};

/// Calls f(double&) for every number of the figures (see to_numbers).
template <class F>
void each_number(sequence_figures& m, F const& f) {
  m.visit(m, [&](running_stat& s, running_stat&) { each_number(s, f); });
}

/// What a monitor knows of the sequences that were ended. Adds over sequences, shards and ranks.
struct monitor_moments {
  std::ptrdiff_t sites = 0;      ///< S
  std::ptrdiff_t width = 0;      ///< d
  std::ptrdiff_t sequences = 0;  ///< that were ended
  std::ptrdiff_t tokens = 0;     ///< that were pushed, masked ones too
  flow_moments flow;             ///< without unit sums: no sequence is open
  sequence_figures figures;      ///< of each sequence by itself
  minibatch_moments cka;         ///< of 0 sites if not asked for

  monitor_moments() = default;
  /// Of no sequences.
  monitor_moments(std::ptrdiff_t site_count, std::ptrdiff_t hidden, bool with_cka)
      : sites(site_count),
        width(hidden),
        flow(site_count, 0),
        figures(site_count, with_cka),
        cka(with_cka ? site_count : 0) {
    flow.width = hidden;
  }

  /// @throws std::invalid_argument if the shapes differ, or CKA is in one of the two only
  void merge(monitor_moments const& other) {
    auto const shape = [](monitor_moments const& m) {
      return std::to_string(m.sites) + " sites x " + std::to_string(m.width) +
             (m.cka.sites > 0 ? " with CKA" : "");
    };
    if (sites != other.sites || width != other.width || cka.sites != other.cka.sites)
      detail::reject("rflow::monitor_moments::merge", shape(*this) + " and " + shape(other));
    constexpr std::ptrdiff_t most = (std::numeric_limits<std::ptrdiff_t>::max)();
    if (other.tokens < 0 || other.sequences < 0 || other.tokens > most - tokens ||
        other.sequences > most - sequences)
      detail::reject("rflow::monitor_moments::merge", std::to_string(tokens) + " and " +
                                                          std::to_string(other.tokens) +
                                                          " tokens: not a number of tokens");
    flow.merge(other.flow, tokens);
    figures.merge(other.figures);
    cka.merge(other.cka);
    sequences += other.sequences;
    tokens += other.tokens;
  }
};

template <class F>
void each_number(monitor_moments& m, F const& f) {
  for (std::ptrdiff_t* const x : {&m.sequences, &m.tokens}) {
    auto number = static_cast<double>(*x);
    f(number);
    *x = static_cast<std::ptrdiff_t>(number);
  }
  each_number(m.flow, f);
  each_number(m.figures, f);
  each_number(m.cka, f);
}

/// What a monitor has seen, both ways of reading many sequences side by side.
struct monitor_report {
  std::ptrdiff_t sequences = 0;   ///< that were ended
  flow_report pooled;             ///< over all tokens of all sequences; cosines within sequences
  sequence_figures per_sequence;  ///< each sequence by itself: mean and spread over sequences
  cka_accumulator<> cka;  ///< over all batches of all sequences; of 0 sites if not asked for
};

/// Reports on moments, wherever they came from. Positions of NaN count the tokens of all sequences.
inline monitor_report report_of(monitor_moments const& m, normalization by = normalization::none) {
  monitor_report out;
  out.sequences = m.sequences;
  out.pooled = report_of(m.flow, by);
  out.per_sequence = m.figures;
  out.cka.merge(m.cka);
  return out;
}

/// The flow of S sites of a model as it runs. Memory O(n d) for n tokens under way; with CKA, for
/// batches of b tokens, another S·b·n/2 values of T's compute type, and S·b·d values of T where chunks
/// do not end at the ends of batches.
///
///     rflow::flow_monitor monitor(33, 2560);
///     …in the engine's callback:  monitor.push(site, first_token, rows);
///     …after each sequence:       monitor.end_sequence();
///     rflow::monitor_report const r = monitor.report();
///
/// Rows come in chunks of any size, for each site from token 0 of its sequence on and without gaps,
/// and at no site before they came at the one before it: an engine may push all sites of one
/// micro-batch and then of the next, or the whole sequence site by site. Tokens that the first site
/// has seen and the last has not are under way.
///
/// push(), end_sequence() and discard_sequence() throw nothing, so that they can be called from a C
/// callback, and allocate nothing once reserve() has made room. What they refuse changes nothing; the
/// first refusal is kept, and report() throws it. One thread at a time may use a monitor; several
/// monitors (one a thread, one a sequence of a batch) merge. They move, threads and an open sequence
/// included; one that was moved from can be assigned to or destroyed, nothing else.
///
/// A child of fork() has none of the monitor's threads: make a new monitor there, or one with
/// on_cpu{.threads = 1} before. To use, or to destroy, one with threads in the child does not return.
///
/// @tparam T   element type of the rows: float, double, f16 or bf16
/// @tparam On  where it runs; on_cpu{.threads = 1} leaves the engine's cores alone
template <class T = float, class On = default_backend_t<host_memory>>
class flow_monitor {
 public:
  /// @param  sites  S, in the order of the residual stream: embedding and raw blocks
  /// @param  width  d, the same at every site
  /// @param  options  what to compute, and of which tokens
  /// @param  on     where it runs
  /// @throws std::invalid_argument if sites, width or an option is out of range, or they take more
  ///         than an address space together; std::bad_alloc if memory is short
  explicit flow_monitor(std::ptrdiff_t sites, std::ptrdiff_t width,
                        monitor_options const& options = {}, On const& on = {})
      : sites_(require_positive(sites, "sites")),
        width_(require_sizes(sites, width, options)),
        options_(options),
        chain_(width, on.thread_count()),
        batches_(sites, width, batch_of(options), chain_.threads()),
        next_(static_cast<std::size_t>(sites)),
        blank_(sites, chain_.padded()),
        open_(blank_),
        blank_cka_(options.cka ? sites : 0),
        open_cka_(blank_cka_),
        closed_(sites, width, options.cka) {
    if (options.skip_first < 0)
      detail::reject(name_of_class, "skip_first is " + std::to_string(options.skip_first));
  }

  /// S.
  std::ptrdiff_t sites() const { return sites_; }
  /// d.
  std::ptrdiff_t width() const { return width_; }

  /// Makes room for this many tokens under way: those of a micro-batch if all sites of one are pushed
  /// before the next, of a whole sequence if site follows site.
  /// @throws std::invalid_argument if it is not positive, or more than an address space holds;
  ///         std::bad_alloc if memory is short
  void reserve(std::ptrdiff_t max_tokens) {
    require_positive(max_tokens, "tokens to reserve");
    if (max_tokens > chain_.capacity()) make_room(max_tokens);
  }

  /// Takes the rows of one site for tokens first_token, first_token + 1, … of the open sequence.
  ///
  /// @param  site         0 to S − 1
  /// @param  first_token  how many tokens of this sequence the site has had before
  /// @param  rows         n × d activations; may be overwritten when this returns
  /// @param  keep         one value a row, the same at every site: 0 leaves the token out (padding).
  ///                      Empty keeps all
  /// @return false if refused: see error()
  /// @note   O(n d): the rows are read once, what is kept of their tokens is read and written once
  template <class X>
  bool push(std::ptrdiff_t site, std::ptrdiff_t first_token, X const& rows,
            std::span<std::uint8_t const> keep = {}) noexcept {
    auto const x = as_view(rows);
    static_assert(std::same_as<decltype(x), view<T> const>,
                  "rflow: this monitor takes rows in host memory of the element type it was made "
                  "for: flow_monitor<rflow::bf16> for bf16");
    if (!accepts(site, first_token, x, keep)) return false;
    std::ptrdiff_t const end = first_token + x.rows;
    try {
      if (low() == high()) origin_ = low();
      if (end - low() > capacity()) make_room((std::max)(end - low(), 2 * capacity()));
    } catch (std::exception const& error) {
      return refuse("no memory for %td tokens under way: %s", end - low(), error.what());
    }
    for (std::ptrdiff_t token = first_token; token < end;) {
      std::ptrdiff_t const at = (token - origin_) % capacity();
      std::ptrdiff_t const count = (std::min)(end - token, capacity() - at);
      for (std::ptrdiff_t i = 0; site == 0 && i < count; ++i)
        chain_.set_counts(at + i, counts(token + i, token + i - first_token, keep));
      chain_.walk(x, token - first_token, count, site, at, token, open_);
      token += count;
    }
    batches_.walk(
        x, 0, x.rows, site, first_token,
        [&](std::ptrdiff_t i) { return counts(first_token + i, i, keep); }, open_cka_);
    next_[static_cast<std::size_t>(site)] = end;
    return true;
  }

  /// Rows by pointer and count: does not compile, and says what to write.
  template <class Value, class... Counts>
  requires(sizeof...(Counts) > 0 && (std::is_convertible_v<Counts, extent> &&
                                     ...)) bool push(std::ptrdiff_t, std::ptrdiff_t, Value const*,
                                                     Counts...) noexcept {
    static_cast<void>(sizeof(detail::refuse_argument<Value const*>));
    return false;
  }

  /// Ends the open sequence: its tokens pair with none that come later, and token numbers start at 0
  /// again. Without an open sequence it does nothing.
  /// @return false if refused: a site has had fewer tokens than the first. Push them, or discard
  bool end_sequence() noexcept {
    for (std::ptrdiff_t l = 1; l < sites_; ++l)
      if (next(l) != high())
        return refuse("the sequence cannot end: site %td has had %td of %td tokens", l, next(l),
                      high());
    if (high() == 0) return true;
    open_.end_sequence();
    open_.width = width_;  // its unit sums are 0 now, and not among those of closed_
    closed_.figures.add(open_, options_.normalize);
    closed_.flow.merge(open_, closed_.tokens);
    batches_.end_sequence(high(), open_cka_);
    closed_.figures.add(open_cka_);
    closed_.cka.merge(open_cka_);
    closed_.tokens += high();
    ++closed_.sequences;
    discard_sequence();
    return true;
  }

  /// Forgets what was pushed since the last sequence ended.
  void discard_sequence() noexcept {
    open_ = blank_;  // as large already
    open_cka_ = blank_cka_;
    batches_.discard();
    std::fill(next_.begin(), next_.end(), 0);
    origin_ = 0;
  }

  /// What was refused first, in words; empty if nothing was.
  std::string_view error() const noexcept { return error_.data(); }
  /// Forgets it: what was refused has left no trace in the figures.
  void clear_error() noexcept { error_[0] = '\0'; }

  /// Adds the sequences that another monitor has ended.
  /// @throws std::invalid_argument if it has another shape, other options, an open sequence or an
  ///         error
  void merge(flow_monitor const& other) {
    constexpr char const* where = "rflow::flow_monitor::merge";
    if (sites_ != other.sites_ || width_ != other.width_)
      detail::reject(where, std::to_string(sites_) + " sites x " + std::to_string(width_) +
                                " and " + std::to_string(other.sites_) + " sites x " +
                                std::to_string(other.width_));
    if (options_.normalize != other.options_.normalize ||
        options_.skip_first != other.options_.skip_first ||
        batch_of(options_) != batch_of(other.options_))
      detail::reject(where, "the two were made with different options");
    if (other.high() > 0)
      detail::reject(where, "the other one's sequence of " + std::to_string(other.high()) +
                                " tokens has not ended");
    if (!other.error().empty()) throw std::invalid_argument(std::string(other.error()));
    closed_.merge(other.closed_);
  }

  /// The same of moments that were sent or stored.
  /// @throws std::invalid_argument if they have another shape
  void merge(monitor_moments const& other) { closed_.merge(other); }

  /// The moments of the sequences ended so far.
  monitor_moments const& moments() const { return closed_; }

  /// Everything about the sequences ended so far.
  /// @throws std::invalid_argument what was refused first, if anything was
  monitor_report report() const {
    if (!error().empty()) throw std::invalid_argument(std::string(error()));
    return report_of(closed_, options_.normalize);
  }

 private:
  static constexpr char const* name_of_class = "rflow::flow_monitor";

  static std::ptrdiff_t require_positive(std::ptrdiff_t value, char const* what) {
    if (value < 1) detail::reject(name_of_class, std::to_string(value) + " " + what);
    return value;
  }

  /// @param bytes  about so many, as a double: products of sizes have no integer
  static void require_space(double bytes, std::string const& what) {
    if (bytes > 0x1p47) detail::reject(name_of_class, what + ": more than an address space holds");
  }

  static std::ptrdiff_t require_sizes(std::ptrdiff_t sites, std::ptrdiff_t width,
                                      monitor_options const& options) {
    require_positive(width, "features");
    auto const s = static_cast<double>(sites), d = static_cast<double>(width),
               b = static_cast<double>(batch_of(options));
    double const sums = (s + 64) * d * sizeof(double) + s * sizeof(flow_moments);
    double const batches = b > 0 ? s * s * sizeof(running_stat) + s * b * (b + d) * sizeof(T) : 0;
    require_space(sums + batches,
                  std::to_string(sites) + " sites x " + std::to_string(width) + " features" +
                      (b > 0 ? " in batches of " + std::to_string(options.cka_batch) + " tokens"
                             : std::string()));
    return width;
  }

  static std::ptrdiff_t batch_of(monitor_options const& options) {
    if (!options.cka) return 0;
    if (options.cka_batch < debiased::minimum_tokens)
      detail::reject(name_of_class, "a batch of " + std::to_string(options.cka_batch) +
                                        " tokens, but CKA needs " +
                                        std::to_string(debiased::minimum_tokens));
    return options.cka_batch;
  }

  std::ptrdiff_t next(std::ptrdiff_t site) const { return next_[static_cast<std::size_t>(site)]; }
  std::ptrdiff_t high() const { return next_.front(); }
  std::ptrdiff_t low() const { return next_.back(); }
  std::ptrdiff_t capacity() const { return chain_.capacity(); }

  void make_room(std::ptrdiff_t tokens) {
    auto const t = static_cast<double>(tokens), s = static_cast<double>(sites_),
               b = static_cast<double>(batch_of(options_));
    require_space(t * (static_cast<double>(width_) * sizeof(double) + s * b * sizeof(T)),
                  "room for " + std::to_string(tokens) + " tokens under way");
    chain_.resize(tokens, capacity() > 0 ? (low() - origin_) % capacity() : 0, high() - low());
    batches_.resize(tokens, low(), high() - low());
    origin_ = low();
  }

  bool counts(std::ptrdiff_t token, std::ptrdiff_t row, std::span<std::uint8_t const> keep) const {
    return token >= options_.skip_first && (keep.empty() || keep[static_cast<std::size_t>(row)]);
  }

  bool accepts(std::ptrdiff_t site, std::ptrdiff_t first, view<T> const& x,
               std::span<std::uint8_t const> keep) noexcept {
    if (site < 0 || site >= sites_)
      return refuse("site %td, but there are %td sites", site, sites_);
    if (x.rows < 1 || x.data == nullptr)
      return refuse("site %td: a chunk of %td rows without data", site, x.rows);
    if (x.cols != width_)
      return refuse("site %td: rows of %td features, not %td", site, x.cols, width_);
    if (!keep.empty() && static_cast<std::ptrdiff_t>(keep.size()) != x.rows)
      return refuse("site %td: a mask of %td values for %td rows", site,
                    static_cast<std::ptrdiff_t>(keep.size()), x.rows);
    if (first > (std::numeric_limits<std::ptrdiff_t>::max)() - x.rows)
      return refuse("site %td: %td rows from token %td on are too many to count", site, x.rows,
                    first);
    std::ptrdiff_t const end = first + x.rows, had = next(site);
    if (first >= 0 && end <= had)
      return refuse("site %td: tokens %td to %td were pushed before", site, first, end - 1);
    if (first < had)
      return refuse("site %td: tokens %td to %td overlap with the %td pushed before", site, first,
                    end - 1, had);
    if (first > had)
      return refuse("site %td: token %td is out of order, %td is next", site, first, had);
    if (site > 0 && end > next(site - 1))
      return refuse("site %td: token %td is out of order, site %td has had %td", site, end - 1,
                    site - 1, next(site - 1));
    if (end - low() > capacity() && options_.on_full == when_full::refuse)
      return refuse("%td tokens under way, but room for %td: reserve more", end - low(),
                    capacity());
    for (std::ptrdiff_t i = 0; site > 0 && i < x.rows; ++i)
      if (chain_.counts((first + i - origin_) % capacity()) != counts(first + i, i, keep))
        return refuse("site %td: token %td is masked differently than at site 0", site, first + i);
    return true;
  }

  /// Keeps the first refusal. Returns false.
  template <class... Values>
  bool refuse(char const* format, Values... values) noexcept {
    if (error_[0] != '\0') return false;
    int const length = std::snprintf(error_.data(), error_.size(), "%s: ", name_of_class);
    auto const begin = static_cast<std::size_t>(length);
    std::snprintf(error_.data() + begin, error_.size() - begin, format, values...);
    return false;
  }

  std::ptrdiff_t sites_, width_;
  monitor_options options_;
  typename On::template chain_stream<T> chain_;
  typename On::template batch_stream<T> batches_;
  std::vector<std::ptrdiff_t> next_;  // S: how many tokens of the open sequence a site has had
  std::ptrdiff_t origin_ = 0;         // the token in slot 0, or one that was
  flow_moments blank_, open_;         // of the open sequence; unit sums have the chain's places
  minibatch_moments blank_cka_, open_cka_;
  monitor_moments closed_;
  std::array<char, 256> error_{};
};

flow_monitor(std::ptrdiff_t, std::ptrdiff_t)->flow_monitor<>;
flow_monitor(std::ptrdiff_t, std::ptrdiff_t, monitor_options const&)->flow_monitor<>;
template <class On>
flow_monitor(std::ptrdiff_t, std::ptrdiff_t, monitor_options const&, On const&)
    -> flow_monitor<float, On>;

}  // namespace rflow
