// SPDX-License-Identifier: Apache-2.0
#pragma once

// The four architectures behind one function: a configuration, a weight source, tokens, and a
// listener that is called with each site.
//
//     models::architecture model = models::read_config("pythia-2.8b/config.json");
//     models::checkpoint weights("pythia-2.8b");
//     models::require(model, weights);
//     models::forward(model, weights, tokens, {.threads = 2}, [](models::site const& s, auto x) {…});
//
// One block's weights are in memory at a time.

#include <rflow/view.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "checkpoint.hpp"
#include "config.hpp"
#include "gpt_neo.hpp"
#include "gpt_neox.hpp"
#include "layers.hpp"
#include "mamba.hpp"
#include "mamba2.hpp"
#include "weights.hpp"

namespace models {

namespace detail {

inline gpt_neo build(gpt_neo::config const& c) { return gpt_neo(c); }
inline gpt_neox build(gpt_neox::config const& c) { return gpt_neox(c); }
inline mamba build(mamba::config const& c) { return mamba(c); }
inline mamba2 build(mamba2::config const& c) { return mamba2(c); }

}  // namespace detail

/// Calls f with a model of this architecture.
template <class F>
auto with_model(architecture const& a, F&& f) {
  return std::visit(
      [&](auto const& config) {
        auto model = detail::build(config);
        return f(model);
      },
      a);
}

inline std::string name_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return std::string(m.name); });
}
inline integer blocks_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return m.layers(); });
}
inline integer hidden_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return m.hidden(); });
}
inline integer vocabulary_of(architecture const& a) {
  return with_model(a, [](auto const& m) { return m.vocabulary(); });
}

/// Every parameter, in the order in which a forward pass needs them; the head last but optional.
inline std::vector<parameter> parameters(architecture const& a) {
  return with_model(a, [](auto& m) {
    std::vector<parameter> out;
    m.outer(lister(out));
    for (integer i = 0; i < m.layers(); ++i) m.block(i, lister(out));
    return out;
  });
}

/// Weights of all blocks: what every token is multiplied with.
inline double block_parameters(architecture const& a) {
  return with_model(a, [](auto& m) {
    std::vector<parameter> all;
    for (integer i = 0; i < m.layers(); ++i) m.block(i, lister(all));
    double count = 0;
    for (parameter const& p : all) count += static_cast<double>(p.size());
    return count;
  });
}

/// Checks a checkpoint against an architecture.
/// @throws unusable_checkpoint naming the tensor that is missing, extra, misshaped or of another type
inline void require(architecture const& a, checkpoint& weights) {
  with_model(a, [&](auto const& m) {
    weights.require(parameters(a), [&](std::string const& name) { return m.ignored(name); });
  });
}

// ---- the forward pass ---------------------------------------------------------------------------

struct site {
  integer index;   // 0: embed; 1 … blocks: block.i, raw; blocks + 1: final_norm
  integer blocks;  // of the model

  bool is_final_norm() const { return index > blocks; }
  std::string name() const {
    return index == 0 ? "embed" : is_final_norm() ? "final_norm" : "block." + std::to_string(index);
  }
};

struct forward_options {
  team& threads;
  controls control{};
};

/// Where the time of a forward pass went, in seconds.
struct timing {
  double weights = 0, blocks = 0;
};

/// Runs the model and calls listen(site, view<float>) with the residual stream of all tokens; the
/// view is valid during the call.
/// @throws std::invalid_argument naming the token if an id is not in the vocabulary or a sequence
///         is longer than the model has positions; what the source throws
template <class Listen>
timing forward(architecture const& a, weight_source const& source, batch const& tokens,
               forward_options const& how, Listen&& listen) {
  timing spent;
  with_model(a, [&](auto& model) {
    if (tokens.tokens() == 0) rflow::detail::reject("models::forward", "no tokens");
    for (integer t = 0; t < tokens.tokens(); ++t)
      if (std::int64_t const id = tokens.ids[static_cast<std::size_t>(t)];
          id < 0 || id >= model.vocabulary())
        rflow::detail::reject("models::forward", "token " + std::to_string(t) + " has the id " +
                                                     std::to_string(id) + "; the vocabulary has " +
                                                     std::to_string(model.vocabulary()));
    if (model.positions() > 0 && tokens.longest() > model.positions())
      rflow::detail::reject("models::forward", "a sequence of " + std::to_string(tokens.longest()) +
                                                   " tokens; the model has " +
                                                   std::to_string(model.positions()) +
                                                   " positions");

    auto const now = [] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
          .count();
    };
    run const r{how.threads, tokens, tokens.positions(), how.control};
    loader const load(how.threads, source);
    integer const blocks = model.layers();
    matrix h(tokens.tokens(), model.hidden());
    auto const tell = [&](integer index, matrix const& x) {
      listen(site{index, blocks}, rflow::view<float>(x.data(), x.rows(), x.cols()));
    };
    model.embed(r, source, h);
    if (how.control.embedding_scale != 1) h *= how.control.embedding_scale;
    tell(0, h);
    for (integer i = 0; i < blocks; ++i) {
      double const t0 = now();
      model.block(i, load);
      double const t1 = now();
      model.apply(i, r, h);
      spent.weights += t1 - t0;
      spent.blocks += now() - t1;
      tell(i + 1, h);
    }
    model.outer(load);
    matrix last;
    model.final_norm(r, h, last);
    tell(blocks + 1, last);
  });
  return spent;
}

}  // namespace models
