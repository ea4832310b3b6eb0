// SPDX-License-Identifier: Apache-2.0
#pragma once

// The flow pass on a device.

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <rflow/detail/cuda/flow_sums.cuh>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow::detail::passes {

/// Tokens that go through the pass together, and the sequences that end among them.
struct slab {
  integer first, count, first_end, end_count, first_slice;
};

inline constexpr integer slice_tokens = 128;
inline constexpr integer slab_ends = 1024;

/// Cuts tokens into slabs of at most `most` tokens and slab_ends ends of sequences.
inline std::vector<slab> cut(integer tokens, integer most, std::vector<integer> const& ends) {
  std::vector<slab> out;
  integer first = 0, end = 0, slice = 0;
  while (first < tokens) {
    integer last = std::min(tokens, first + most), past = end;
    while (past < static_cast<integer>(ends.size()) && ends[size_of(past)] <= last) ++past;
    if (past - end > slab_ends) {
      past = end + slab_ends;
      last = ends[size_of(past - 1)];
    }
    out.push_back({first, last - first, end, past - end, slice});
    slice += ceil_div(last - first, slice_tokens);
    first = last;
    end = past;
  }
  return out;
}

/// Where the ends of sequences are that have tokens.
template <class T, class Memory>
std::vector<integer> sequence_ends(layer_stack<T, Memory> const& stack) {
  std::vector<integer> out;
  for (integer const b : stack.boundaries())
    if (b > 0 && (out.empty() || b > out.back())) out.push_back(b);
  return out;
}

template <class Device, class T, class Memory>
class flow_pass {
  using group = typename Device::group;

 public:
  flow_pass(char const* where, Device& on, layer_stack<T, Memory> const& stack,
            std::size_t memory_bound)
      : on_(on),
        source_(on.source(stack, memory_, memory_bound)),
        sites_(stack.sites()),
        width_(stack.width()),
        tokens_(stack.size()),
        chunks_(ceil_div(width_, integer{group::size})),
        ends_(sequence_ends(stack)) {
    integer const table = sites_ * integer{9 * sizeof(double)};
    integer const bound = static_cast<integer>(memory_bound) / 2;
    slab_tokens_ = std::min(source_.most_slab(tokens_), std::max<integer>(bound / table, 1));
    slabs_ = cut(tokens_, slab_tokens_, ends_);
    reserve();
    if (memory_.bytes() > memory_bound)
      reject(where, "a memory bound of " + std::to_string(memory_bound) + " bytes is below the " +
                        std::to_string(memory_.bytes()) + " that " + std::to_string(sites_) +
                        " sites x " + std::to_string(width_) + " take");
  }

  flow_moments operator()(flow_sink const& sink) {
    auto const owner = on_.allocate(memory_.bytes());
    memory_.settle(owner.data());
    source_.start(on_, memory_);
    on_.zero(memory_[open_], sites_ * width_ + sites_);
    std::vector<integer> relative = ends_;
    for (slab const& s : slabs_)
      for (integer e = 0; e < s.end_count; ++e) relative[size_of(s.first_end + e)] -= s.first;
    on_.upload(relative.data(), static_cast<integer>(relative.size()), memory_[ends_at_]);
    for (slab const& s : slabs_) add(s, sink);

    std::vector<slice_sums> sums(size_of(slices() * sites_));
    std::vector<double> norms(ends_.size() * size_of(sites_)), counts(norms.size());
    on_.download(memory_[sums_], static_cast<integer>(sums.size()), sums.data());
    on_.download(memory_[norms_], static_cast<integer>(norms.size()), norms.data());
    on_.download(memory_[counts_], static_cast<integer>(counts.size()), counts.data());
    on_.wait();
    return collect(sums, norms, counts);
  }

 private:
  integer slices() const {
    return slabs_.back().first_slice + ceil_div(slabs_.back().count, slice_tokens);
  }

  void reserve() {
    integer most_ends = 0;
    for (slab const& s : slabs_) most_ends = std::max(most_ends, s.end_count);
    for (auto& field : fields_) field = memory_.reserve<double>(sites_ * slab_tokens_);
    units_ = memory_.reserve<token_units>(sites_ * slab_tokens_);
    bad_ = memory_.reserve<integer>(sites_ * slab_tokens_);
    open_ = memory_.reserve<double>(sites_ * width_ + sites_);
    ends_at_ = memory_.reserve<integer>(static_cast<integer>(ends_.size()));
    norms_ = memory_.reserve<double>(static_cast<integer>(ends_.size()) * sites_);
    counts_ = memory_.reserve<double>(static_cast<integer>(ends_.size()) * sites_);
    parts_ = memory_.reserve<double>(most_ends * sites_ * chunks_);
    sums_ = memory_.reserve<slice_sums>(slices() * sites_);
  }

  void add(slab const& s, flow_sink const& sink) {
    double* f[7];
    for (std::size_t k = 0; k < 7; ++k) f[k] = memory_[fields_[k]];
    token_table const table{sites_, s.count,         f[0],         f[1], f[2], f[3], f[4], f[5],
                            f[6],   memory_[units_], memory_[bad_]};
    slab_rows<T> const x = source_.slab(s.first, s.count);
    integer const at = s.first_end * sites_;
    on_.each_group(s.count, walk_chain<T>{x, table});
    on_.each_group(
        sites_ * chunks_,
        add_units<T>{x, table, memory_[ends_at_] + s.first_end, s.end_count, memory_[open_],
                     memory_[open_] + sites_ * width_, memory_[parts_], memory_[counts_] + at});
    source_.release();
    if (s.end_count > 0)
      on_.each_index(s.end_count * sites_,
                     fold_norms{memory_[parts_], chunks_, memory_[norms_] + at});
    on_.each_group(ceil_div(s.count, slice_tokens) * sites_,
                   sum_tokens{table, slice_tokens, memory_[sums_] + s.first_slice * sites_});
    for (integer l = 0; l < sites_; ++l) {
      if (sink.norm != nullptr)
        on_.download(table.norm + l * s.count, s.count, sink.norm + l * tokens_ + s.first);
      if (sink.cosine != nullptr && l > 0)
        on_.download(table.cosine + l * s.count, s.count,
                     sink.cosine + (l - 1) * tokens_ + s.first);
    }
  }

  flow_moments collect(std::vector<slice_sums> const& sums, std::vector<double> const& norms,
                       std::vector<double> const& counts) const {
    flow_moments m(sites_, width_);
    m.tokens = static_cast<double>(tokens_);
    for (slab const& s : slabs_)
      for (integer k = 0; k < ceil_div(s.count, slice_tokens); ++k)
        for (integer l = 0; l < sites_; ++l)
          collect(sums[size_of((s.first_slice + k) * sites_ + l)], s.first, size_of(l), m);
    for (std::size_t i = 0; i < norms.size(); ++i)
      m.end_sequence(i % size_of(sites_), norms[i], counts[i]);
    return m;
  }

  static void collect(slice_sums const& s, integer first, std::size_t l, flow_moments& m) {
    m.squares[l] += square_sum::of(s.square, s.unit.square);
    m.zero_rows[l] += s.zero_rows;
    m.spread += square_sum::of(s.spread, s.unit.spread);
    if (s.bad_token >= 0 && !m.non_finite[l].found())
      m.non_finite[l] = {first + s.bad_token, s.bad_feature};
    if (l == 0) return;
    m.steps[l - 1] += square_sum::of(s.step2, s.unit.step);
    m.cosine[l - 1].merge({s.cosines, s.mean_cosine, s.m2_cosine});
    if (l > 1)
      m.turns[l - 2].merge({s.turn_weight, s.turn_mean, s.turn_away2, s.before_unit, s.unit.step});
  }

  Device& on_;
  arena memory_;
  source_of<Device, layer_stack<T, Memory>> source_;
  integer sites_, width_, tokens_, slab_tokens_ = 0, chunks_;
  std::vector<integer> ends_;
  std::vector<slab> slabs_;
  arena::place<double> fields_[7], open_, norms_, counts_, parts_;
  arena::place<token_units> units_;
  arena::place<integer> bad_, ends_at_;
  arena::place<slice_sums> sums_;
};

/// The flow moments of a stack. Asks for memory once; the number of launches does not depend on the
/// number of tokens as long as 72 bytes a token and site are within half the memory bound.
/// @throws std::invalid_argument if the memory bound is too small for the sites and their sequences
template <class Device, class T, class Memory>
flow_moments flow(char const* where, Device& on, layer_stack<T, Memory> const& stack,
                  flow_sink const& sink, std::size_t memory_bound) {
  if (stack.size() == 0) return flow_moments(stack.sites(), stack.width());
  flow_moments m = flow_pass<Device, T, Memory>(where, on, stack, memory_bound)(sink);
  for (position& at : m.non_finite)
    if (at.found()) at.token = stack.token(at.token);
  return m;
}

}  // namespace rflow::detail::passes
