// SPDX-License-Identifier: Apache-2.0
#pragma once

// What softmax probes give.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include <rflow/measured.hpp>

namespace rflow {

/// One split and one start. Curves have epochs + 1 values: [e] is after e updates. Loss is in nats.
struct probe_seed {
  std::ptrdiff_t training_tokens = 0;         ///< that this seed is trained on
  std::ptrdiff_t validation_tokens = 0;       ///< that it is validated on
  std::vector<measured> train_loss;           ///< mean over training tokens
  std::vector<measured> validation_loss;      ///< mean over validation tokens
  std::vector<measured> train_accuracy;       ///< in [0, 1]
  std::vector<measured> validation_accuracy;  ///< in [0, 1]
  std::vector<measured> class_accuracy;       ///< classes: validation tokens of a class found right
  std::vector<std::ptrdiff_t> confusion;  ///< classes × classes: validation tokens, true × found
  measured mean_distance;                 ///< mean |found − true|, for classes in an order
  std::vector<double> weight;             ///< classes × d: logits = weight · x + bias
  std::vector<double> bias;               ///< classes
};

/// Over seeds: the mean, and the standard deviation (n − 1), which one seed does not have.
struct over_seeds {
  measured mean;    ///< over seeds
  measured spread;  ///< too_few_rows of one seed; out_of_range above the largest double
};

/// Probes of one site.
struct probe_result {
  status why = status::ok;     ///< constant_layer or non_finite: nothing else has a value
  position non_finite;         ///< first NaN or infinity, if found()
  std::ptrdiff_t classes = 0;  ///< C
  std::ptrdiff_t tokens = 0;   ///< n
  std::ptrdiff_t width = 0;    ///< d
  /// Tokens to validate on that the options ask for; a seed may have fewer (classes of one token, whole
  /// groups).
  std::ptrdiff_t validation_asked = 0;
  std::vector<probe_seed> seeds;   ///< each by itself
  over_seeds train_loss;           ///< after the last epoch, as all of these
  over_seeds validation_loss;      ///< in nats
  over_seeds train_accuracy;       ///< in [0, 1]
  over_seeds validation_accuracy;  ///< in [0, 1]
  over_seeds mean_distance;        ///< mean |found − true| of validation tokens
  measured chance;                 ///< share of the commonest class: what a constant guess attains
};

/// Probes of every site of a stack, all with the same splits.
struct layer_probes {
  std::vector<probe_result> layers;  ///< S
  std::vector<std::string> names;    ///< S: of the sites
  measured chance;                   ///< share of the commonest class
  std::ptrdiff_t best = -1;  ///< site of the highest mean accuracy, the first of equals; −1 if none
  measured drop;             ///< that accuracy less the last site's
  std::ptrdiff_t validation_asked = 0;   ///< tokens to validate on that the options ask for
  std::ptrdiff_t validation_tokens = 0;  ///< those there are, of the seed that has fewest

  /// Mean accuracy of a site, on validation tokens; on training tokens where there are none.
  over_seeds const& accuracy(std::ptrdiff_t site) const {
    probe_result const& r = layers[static_cast<std::size_t>(site)];
    return r.validation_accuracy.mean.why == status::not_requested ? r.train_accuracy
                                                                   : r.validation_accuracy;
  }

  /// Site, accuracy and losses in columns, a line each, with the best site and chance below, and
  /// tokens to validate on where there are fewer than asked for.
  std::string table() const;
};

namespace detail {

/// x in a column of a table.
inline std::string column(measured const& x, std::size_t width) {
  std::string text(to_string(x.why));
  if (x.ok()) {
    double const thousandths = std::round(x.value * 1e4);
    text = std::to_string(thousandths / 1e4);
    text.resize(text.size() - 2);  // of six digits
  }
  return text.size() < width ? std::string(width - text.size(), ' ') + text : text;
}

}  // namespace detail

inline std::string layer_probes::table() const {
  std::size_t longest = 4;
  for (std::string const& name : names) longest = (std::max)(longest, name.size());
  auto const padded = [&](std::string name) {
    name.resize(longest, ' ');
    return name;
  };
  std::string out =
      padded("site") + "  accuracy    spread     train  val.loss  train.loss  mean|found-true|\n";
  for (std::size_t l = 0; l < layers.size(); ++l) {
    probe_result const& r = layers[l];
    over_seeds const& a = accuracy(static_cast<std::ptrdiff_t>(l));
    out += padded(names[l]) + detail::column(a.mean, 10) + detail::column(a.spread, 10) +
           detail::column(r.train_accuracy.mean, 10) + detail::column(r.validation_loss.mean, 10) +
           detail::column(r.train_loss.mean, 12) + detail::column(r.mean_distance.mean, 18) + "\n";
  }
  out += padded("chance").substr(0, (std::max)(longest, std::size_t{6})) +
         detail::column(chance, 10 - (longest < 6 ? 2 : 0)) + "\n";
  if (best >= 0)
    out += "best: " + names[static_cast<std::size_t>(best)] + ", drop to the last site" +
           detail::column(drop, 8) + "\n";
  if (validation_tokens < validation_asked)
    out += "validated on " + std::to_string(validation_tokens) + " tokens where " +
           std::to_string(validation_asked) + " were asked for\n";
  return out;
}

}  // namespace rflow
