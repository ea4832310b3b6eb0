// SPDX-License-Identifier: Apache-2.0
#pragma once

// Softmax probes: how much of a label can be read off each layer by a linear map? Accuracy on held-out
// tokens says where information is linearly accessible; it does not say that the model uses it, and a
// probe with many features and few tokens finds patterns in anything, so compare with `chance` and
// with probes on shuffled labels.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <queue>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <rflow/default.hpp>
#include <rflow/init.hpp>  // the weights and the splits that a seed names
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

// ---- what a caller may choose -------------------------------------------------------------------

/// Where probes start from.
namespace weights {

/// Independent values in ±1/√d, weights and biases, as PyTorch's Linear; other ones for each seed.
struct uniform {};

/// All zero.
struct zero {};

/// The same ones for every seed; they act on the features as given, standardised or not.
struct given {
  std::vector<double> values;  ///< classes × d, row-major, as the weight of PyTorch's Linear
  std::vector<double> bias;    ///< classes, or none for zeros

  /// @param row_major  classes × d
  /// @param biases     classes, or none
  given(std::vector<double> row_major, std::vector<double> biases)
      : values(std::move(row_major)), bias(std::move(biases)) {}

  /// @param matrix  classes × d: an Eigen matrix, a view, …
  /// @param biases  classes, or none
  template <activations X>
  explicit given(X const& matrix, std::vector<double> biases = {}) : bias(std::move(biases)) {
    auto const x = as_view(matrix);
    for (std::ptrdiff_t c = 0; c < x.rows; ++c)
      for (std::ptrdiff_t j = 0; j < x.cols; ++j) values.push_back(static_cast<double>(x(c, j)));
  }
};

}  // namespace weights

/// How tokens are drawn for validation.
enum class split {
  stratified,  ///< from each class its share, by largest remainders; one is always trained on. What
               ///< small classes cannot give the others do, from each as large a part
  shuffled,    ///< from all tokens alike
};

/// What a probe does. The default is full-batch Adam on the mean cross-entropy, 150 epochs, five
/// seeds; a seed sets the split and the initial weights.
struct probe_options {
  std::ptrdiff_t classes = 0;        ///< 0: the largest label and one more
  int epochs = 150;                  ///< updates, each from all training tokens
  double learning_rate = 0.05;       ///< of Adam
  double beta1 = 0.9;                ///< of Adam
  double beta2 = 0.999;              ///< of Adam
  double epsilon = 1e-8;             ///< of Adam
  double weight_decay = 0;           ///< times the weights (not the biases), added to the gradient
  int seeds = 5;                     ///< splits and starts
  std::uint64_t first_seed = 0;      ///< the others follow it
  double validation_fraction = 0.2;  ///< 0: train on all, no validation
  rflow::split split = rflow::split::stratified;  ///< how validation tokens are drawn
  std::vector<std::int64_t> groups =
      {};  ///< one a token (a document, a context): tokens of a group
           ///< are never on both sides of a split; split is then
           ///< over whole groups, without regard to classes
  /// Tokens to train and to validate on, for every seed, instead of a fraction; if only one is given,
  /// all other tokens are the other part.
  std::vector<std::ptrdiff_t> training = {};
  std::vector<std::ptrdiff_t> validation = {};  ///< see training
  bool standardize = false;   ///< features to mean 0 and deviation 1 over the training part
  bool keep_weights = false;  ///< probe_layers: keep classes · d weights a seed and layer
  /// Where a seed starts.
  std::variant<weights::uniform, weights::zero, weights::given> initial_weights =
      weights::uniform{};
};

// ---- results ------------------------------------------------------------------------------------

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

// ---- splits and random numbers ------------------------------------------------------------------

namespace detail {

/// Puts the values into an order of chance, the same on every platform. Streams 0 and 1 are the
/// matrices of the initial weights and biases.
template <class V>
void shuffle(std::uint64_t seed, std::uint32_t stream, std::vector<V>& values) {
  for (std::size_t i = values.size(); i > 1; --i) {
    auto const words = philox({static_cast<std::uint32_t>(i), 0, stream, 0}, seed);
    double const uniform = (words[0] + words[1] * 0x1p-32) * 0x1p-32 * (1 - 0x1p-52);
    std::swap(values[i - 1], values[static_cast<std::size_t>(uniform * static_cast<double>(i))]);
  }
}

/// The tokens of several stacks, one stack after the other, counted as those of one.
class joined_tokens {
 public:
  template <class T, class Memory>
  explicit joined_tokens(std::vector<layer_stack<T, Memory>> const& stacks) {
    for (auto const& stack : stacks) {
      for (std::ptrdiff_t i = 0; i < stack.size(); ++i) rows_.push_back(all_ + stack.token(i));
      all_ += stack.all_tokens();
    }
  }
  std::ptrdiff_t all_tokens() const { return all_; }
  std::ptrdiff_t size() const { return static_cast<std::ptrdiff_t>(rows_.size()); }
  std::ptrdiff_t token(std::ptrdiff_t i) const { return rows_[static_cast<std::size_t>(i)]; }

 private:
  std::ptrdiff_t all_ = 0;
  std::vector<std::ptrdiff_t> rows_;
};

/// Labels of the tokens that count, and who validates: what is the same for all sites.
class probe_plan {
 public:
  /// @param stack  a layer_stack, or joined_tokens
  template <class Stack, class Labels>
  probe_plan(char const* where, Stack const& stack, Labels const& labels,
             probe_options const& options)
      : where_(where), options_(options) {
    check_options();
    auto const all =
        static_cast<std::ptrdiff_t>(std::distance(std::begin(labels), std::end(labels)));
    if (all != stack.all_tokens())
      reject(where,
             std::to_string(all) + " labels for " + std::to_string(stack.all_tokens()) + " tokens");
    problem.problems = options.seeds;
    problem.standardize = options.standardize;
    read_labels(stack, labels);
    split_all(stack);
    require_examples();
  }

  softmax_problem problem;

  std::ptrdiff_t tokens() const { return static_cast<std::ptrdiff_t>(problem.labels.size()); }
  bool validates() const { return listed() || options_.validation_fraction > 0; }

  /// Tokens of a seed to train on, or to validate on.
  std::ptrdiff_t count(std::ptrdiff_t p, std::uint8_t part) const {
    auto const first = problem.parts.begin() + p * tokens();
    return std::count(first, first + tokens(), part);
  }
  /// Tokens to validate on: what is asked for, and what the seed has that has fewest.
  std::ptrdiff_t validation_asked() const {
    return listed() ? count(0, softmax_problem::validate) : wanted();
  }
  std::ptrdiff_t validation_tokens() const {
    std::ptrdiff_t fewest = tokens();
    for (std::ptrdiff_t p = 0; p < problem.problems; ++p)
      fewest = (std::min)(fewest, count(p, softmax_problem::validate));
    return fewest;
  }

  /// Share of the commonest class.
  double chance() const {
    return static_cast<double>(*std::max_element(sizes_.begin(), sizes_.end())) /
           static_cast<double>(tokens());
  }

  /// Where the probes of all seeds start, as they see the features.
  softmax_weights initial(std::ptrdiff_t width, std::vector<double> const& mean,
                          std::vector<double> const& deviation) const {
    softmax_weights w;
    if (auto const* given = std::get_if<weights::given>(&options_.initial_weights)) {
      for (std::ptrdiff_t p = 0; p < problem.problems; ++p)
        see_weights(given->values, given->bias, p, width, mean, deviation, w);
      return w;
    }
    std::size_t const columns = size(problem.classes * problem.problems);
    w.values.resize(columns * size(width));
    w.bias.resize(columns);
    if (std::holds_alternative<weights::uniform>(options_.initial_weights)) draw_weights(width, w);
    return w;
  }

  /// Appends weights for features as they are given, turned into what seed p sees. Without biases
  /// they are 0.
  void see_weights(std::vector<double> const& values, std::vector<double> const& biases,
                   std::ptrdiff_t p, std::ptrdiff_t width, std::vector<double> const& mean,
                   std::vector<double> const& deviation, softmax_weights& to) const {
    std::size_t const d = size(width);
    for (std::size_t c = 0; c < size(problem.classes); ++c) {
      double bias = biases.empty() ? 0 : biases[c];
      for (std::size_t j = 0; j < d; ++j) {
        double value = values[c * d + j];
        if (!mean.empty()) {
          bias += value * mean[size(p) * d + j];
          value *= deviation[size(p) * d + j];
        }
        to.values.push_back(value);
      }
      to.bias.push_back(bias);
    }
  }

  /// The other way: the weights of seed p for features as they are given.
  void give_weights(softmax_weights const& w, std::ptrdiff_t p, std::ptrdiff_t width,
                    std::vector<double> const& mean, std::vector<double> const& deviation,
                    probe_seed& to) const {
    std::size_t const classes = size(problem.classes), d = size(width);
    to.weight.resize(classes * d);
    to.bias.resize(classes);
    for (std::size_t c = 0; c < classes; ++c) {
      std::size_t const column = size(p) * classes + c;
      to.bias[c] = w.bias[column];
      for (std::size_t j = 0; j < d; ++j) {
        double value = w.values[column * d + j];
        if (!deviation.empty()) {
          std::size_t const at = size(p) * d + j;
          value = deviation[at] > 0 ? value / deviation[at] : 0;
          to.bias[c] -= value * mean[at];
        }
        to.weight[c * d + j] = value;
      }
    }
  }

  void check_given(std::ptrdiff_t width) const {
    auto const* given = std::get_if<weights::given>(&options_.initial_weights);
    if (given == nullptr) return;
    if (given->values.size() != size(problem.classes * width) ||
        (!given->bias.empty() && given->bias.size() != size(problem.classes)))
      reject(where_, std::to_string(given->values.size()) + " initial weights and " +
                         std::to_string(given->bias.size()) + " biases for " +
                         std::to_string(problem.classes) + " classes x " + std::to_string(width) +
                         " features");
    for (auto const* values : {&given->values, &given->bias})
      for (double const x : *values)
        if (!is_finite(x)) reject(where_, "an initial weight or bias is NaN or infinite");
  }

 private:
  static std::size_t size(std::ptrdiff_t n) { return static_cast<std::size_t>(n); }

  bool listed() const { return !options_.validation.empty() || !options_.training.empty(); }
  std::ptrdiff_t wanted() const {
    return static_cast<std::ptrdiff_t>(
        std::llround(options_.validation_fraction * static_cast<double>(tokens())));
  }

  void check_options() const {
    if (options_.seeds < 1) reject(where_, std::to_string(options_.seeds) + " seeds");
    if (options_.epochs < 0) reject(where_, std::to_string(options_.epochs) + " epochs");
    if (!(options_.validation_fraction >= 0 && options_.validation_fraction < 1))
      reject(where_, "a validation fraction of " + std::to_string(options_.validation_fraction) +
                         " is not in [0, 1)");
    for (double const x : {options_.learning_rate, options_.weight_decay, options_.epsilon})
      if (!is_finite(x))
        reject(where_, "the learning rate, weight decay and epsilon must be finite");
    if (!(options_.learning_rate > 0) || !(options_.weight_decay >= 0) ||
        !(options_.beta1 >= 0 && options_.beta1 < 1) ||
        !(options_.beta2 >= 0 && options_.beta2 < 1) || !(options_.epsilon > 0))
      reject(where_,
             "the learning rate and epsilon must be above 0, weight decay at least 0, both "
             "betas in [0, 1)");
  }

  template <class Stack, class Labels>
  void read_labels(Stack const& stack, Labels const& labels) {
    std::vector<std::int64_t> all;
    for (auto const& label : labels) {
      static_assert(std::integral<std::remove_cvref_t<decltype(label)>>,
                    "rflow: labels are integers from 0 to classes - 1");
      if (!std::in_range<std::int32_t>(label))
        reject(where_, "label " + std::to_string(label) + " of token " +
                           std::to_string(all.size()) + " is out of range");
      all.push_back(static_cast<std::int64_t>(label));
    }
    problem.classes = options_.classes;
    for (std::ptrdiff_t i = 0; i < stack.size() && options_.classes == 0; ++i)
      problem.classes =
          (std::max)(problem.classes, static_cast<std::ptrdiff_t>(all[size(stack.token(i))]) + 1);
    if (options_.classes < 0 || problem.classes < 2)
      reject(where_, std::to_string(problem.classes) + " classes; a probe tells at least 2 apart");
    if (problem.classes > stack.size())
      reject(where_, std::to_string(problem.classes) + " classes for " +
                         std::to_string(stack.size()) + " tokens");
    sizes_.resize(size(problem.classes));
    for (std::ptrdiff_t i = 0; i < stack.size(); ++i) {
      std::int64_t const label = all[size(stack.token(i))];
      if (label < 0 || label >= problem.classes)
        reject(where_, "label " + std::to_string(label) + " of token " +
                           std::to_string(stack.token(i)) + " is not in [0, " +
                           std::to_string(problem.classes) + ")");
      problem.labels.push_back(static_cast<std::int32_t>(label));
      ++sizes_[size(label)];
    }
  }

  template <class Stack>
  void split_all(Stack const& stack) {
    problem.parts.assign(problem.labels.size() * size(options_.seeds), softmax_problem::train);
    if (!options_.groups.empty() &&
        static_cast<std::ptrdiff_t>(options_.groups.size()) != stack.all_tokens())
      reject(where_, std::to_string(options_.groups.size()) + " groups for " +
                         std::to_string(stack.all_tokens()) + " tokens");
    for (std::ptrdiff_t p = 0; p < options_.seeds; ++p) {
      std::uint8_t* const parts = problem.parts.data() + p * tokens();
      if (listed())
        split_as_listed(stack, parts);
      else if (options_.validation_fraction > 0)
        split_by_chance(stack, p, parts);
    }
  }

  template <class Stack>
  void split_as_listed(Stack const& stack, std::uint8_t* parts) const {
    std::vector<std::uint8_t> rows(size(stack.all_tokens()),
                                   options_.training.empty()     ? softmax_problem::train
                                   : options_.validation.empty() ? softmax_problem::validate
                                                                 : softmax_problem::neither);
    std::vector<bool> seen(rows.size());
    auto const mark = [&](std::vector<std::ptrdiff_t> const& list, std::uint8_t part) {
      for (std::ptrdiff_t const row : list) {
        if (row < 0 || row >= stack.all_tokens())
          reject(where_, "token " + std::to_string(row) + " is listed for a part, there are " +
                             std::to_string(stack.all_tokens()));
        if (seen[size(row)])
          reject(where_, "token " + std::to_string(row) + " is listed twice in the split");
        seen[size(row)] = true;
        rows[size(row)] = part;
      }
    };
    mark(options_.training, softmax_problem::train);
    mark(options_.validation, softmax_problem::validate);
    std::map<std::int64_t, std::uint8_t> side;
    for (std::ptrdiff_t i = 0; i < tokens(); ++i) {
      std::uint8_t const part = parts[i] = rows[size(stack.token(i))];
      if (options_.groups.empty() || part == softmax_problem::neither) continue;
      std::int64_t const group = options_.groups[size(stack.token(i))];
      if (!side.emplace(group, part).second && side[group] != part)
        reject(where_, "group " + std::to_string(group) + " is on both sides of the split");
    }
  }

  template <class Stack>
  void split_by_chance(Stack const& stack, std::ptrdiff_t p, std::uint8_t* parts) const {
    std::uint64_t const seed = options_.first_seed + static_cast<std::uint64_t>(p);
    std::ptrdiff_t const wanted = this->wanted();
    if (wanted < 1 || wanted >= tokens())
      reject(where_, "a validation fraction of " + std::to_string(options_.validation_fraction) +
                         " of " + std::to_string(tokens()) + " tokens leaves one part empty");
    if (!options_.groups.empty()) return split_groups(stack, seed, wanted, parts);

    // Quotas by largest remainder; one class holds all tokens where they are only shuffled.
    bool const by_class = options_.split == split::stratified;
    std::vector<std::vector<std::ptrdiff_t>> members(by_class ? size(problem.classes) : 1);
    std::vector<std::ptrdiff_t> order(size(tokens()));
    std::iota(order.begin(), order.end(), 0);
    shuffle(seed, 2, order);
    for (std::ptrdiff_t const i : order)
      members[by_class ? size(problem.labels[size(i)]) : 0].push_back(i);
    std::vector<std::ptrdiff_t> quota;
    std::vector<double> remainder;
    std::ptrdiff_t given = 0;
    for (auto const& m : members) {
      double const share = static_cast<double>(wanted) * static_cast<double>(m.size()) /
                           static_cast<double>(tokens());
      quota.push_back((std::min)(static_cast<std::ptrdiff_t>(share),
                                 static_cast<std::ptrdiff_t>(m.size()) - 1));
      remainder.push_back(share - static_cast<double>(quota.back()));
      given += quota.back();
    }
    std::vector<std::size_t> classes(members.size());
    std::iota(classes.begin(), classes.end(), std::size_t{0});
    shuffle(seed, 3, classes);
    std::stable_sort(classes.begin(), classes.end(),
                     [&](std::size_t a, std::size_t b) { return remainder[a] > remainder[b]; });
    auto const room = [&](std::size_t c) {
      return quota[c] + 1 < static_cast<std::ptrdiff_t>(members[c].size());
    };
    for (std::size_t const c : classes)
      if (given < wanted && room(c)) {
        ++quota[c];
        ++given;
      }
    if (given < wanted) {
      // Classes too small for their share: the next token is of the class that then has the
      // smallest part held out, of equals the first in the order of chance.
      using entry = std::pair<double, std::size_t>;
      std::priority_queue<entry, std::vector<entry>, std::greater<>> next;
      auto const offer = [&](std::size_t at) {
        std::size_t const c = classes[at];
        if (room(c))
          next.push(
              {static_cast<double>(quota[c] + 1) / static_cast<double>(members[c].size()), at});
      };
      for (std::size_t at = 0; at < classes.size(); ++at) offer(at);
      for (; given < wanted && !next.empty(); ++given) {
        std::size_t const at = next.top().second;
        next.pop();
        ++quota[classes[at]];
        offer(at);
      }
    }
    for (std::size_t c = 0; c < members.size(); ++c)
      for (std::ptrdiff_t i = 0; i < quota[c]; ++i)
        parts[members[c][size(i)]] = softmax_problem::validate;
  }

  /// Whole groups in an order of chance, each that brings the number of tokens nearer.
  template <class Stack>
  void split_groups(Stack const& stack, std::uint64_t seed, std::ptrdiff_t wanted,
                    std::uint8_t* parts) const {
    std::map<std::int64_t, std::vector<std::ptrdiff_t>> members;
    for (std::ptrdiff_t i = 0; i < tokens(); ++i)
      members[options_.groups[size(stack.token(i))]].push_back(i);
    std::vector<std::int64_t> order;
    for (auto const& group : members) order.push_back(group.first);
    shuffle(seed, 2, order);
    std::ptrdiff_t taken = 0;
    for (std::int64_t const group : order) {
      auto const count = static_cast<std::ptrdiff_t>(members[group].size());
      if (std::abs(taken + count - wanted) >= std::abs(taken - wanted)) continue;
      for (std::ptrdiff_t const i : members[group]) parts[i] = softmax_problem::validate;
      taken += count;
    }
    if (taken == 0)
      reject(where_, "no group of " + std::to_string(order.size()) + " fits into " +
                         std::to_string(wanted) + " tokens to validate on");
  }

  void require_examples() const {
    for (std::ptrdiff_t p = 0; p < problem.problems; ++p) {
      std::vector<std::ptrdiff_t> examples(size(problem.classes));
      for (std::ptrdiff_t i = 0; i < tokens(); ++i)
        if (problem.part(p, i) == softmax_problem::train) ++examples[size(problem.labels[size(i)])];
      for (std::ptrdiff_t c = 0; c < problem.classes; ++c)
        if (examples[size(c)] == 0)
          reject(where_, "class " + std::to_string(c) + " of " + std::to_string(problem.classes) +
                             " has no token to train on with seed " +
                             std::to_string(options_.first_seed + static_cast<std::uint64_t>(p)) +
                             (sizes_[size(c)] > 0 ? ", all are held out" : ", nor any at all"));
    }
  }

  void draw_weights(std::ptrdiff_t width, softmax_weights& w) const {
    initializer const how = pytorch_default(static_cast<double>(width));
    std::ptrdiff_t const classes = problem.classes;
    for (std::ptrdiff_t p = 0; p < problem.problems; ++p) {
      std::uint64_t const seed = options_.first_seed + static_cast<std::uint64_t>(p);
      draw(how, {seed, 0}, w.values.data() + p * classes * width, classes, width, width, 1, 1);
      draw(how, {seed, 1}, w.bias.data() + p * classes, 1, classes, classes, 1, 1);
    }
  }

  char const* where_;
  probe_options options_;
  std::vector<std::ptrdiff_t> sizes_;  // tokens of each class
};

inline measured ratio(double sum, double count, status missing) {
  if (!(count > 0)) return missing;
  return is_finite(sum) ? measured(sum / count) : measured(status::diverged);
}

inline over_seeds summary(std::vector<measured> const& values) {
  over_seeds out;
  double largest = 0;
  for (measured const& x : values) {
    if (!x.ok()) return {x.why, x.why};
    largest = (std::max)(largest, std::abs(x.value));
  }
  // By a power of two, so that no square leaves the range of double.
  int const exponent = largest > 0 ? std::ilogb(largest) : 0;
  running_stat stat;
  for (measured const& x : values) stat.add(std::ldexp(x.value, -exponent));
  out.mean = std::ldexp(stat.mean, exponent);
  out.spread = status::too_few_rows;
  if (stat.count > 1) {
    double const spread = std::ldexp(std::sqrt(stat.m2 / (stat.count - 1)), exponent);
    out.spread = is_finite(spread) ? measured(spread) : measured(status::out_of_range);
  }
  return out;
}

inline void note_epoch(softmax_sums const& sums, status unvalidated, probe_result& out) {
  for (std::size_t p = 0; p < out.seeds.size(); ++p) {
    probe_seed& seed = out.seeds[p];
    auto const add = [&](std::size_t part, std::vector<measured>& loss,
                         std::vector<measured>& accuracy) {
      loss.push_back(ratio(sums.loss[part][p], sums.count[part][p], unvalidated));
      // Where a logit is not finite, which one is largest means nothing.
      accuracy.push_back(loss.back().why == status::diverged
                             ? loss.back()
                             : ratio(sums.correct[part][p], sums.count[part][p], unvalidated));
    };
    add(0, seed.train_loss, seed.train_accuracy);
    add(1, seed.validation_loss, seed.validation_accuracy);
  }
}

inline void note_predictions(softmax_problem const& problem, std::ptrdiff_t p,
                             std::int32_t const* found, status unvalidated, probe_seed& seed) {
  auto const classes = static_cast<std::size_t>(problem.classes);
  seed.confusion.assign(classes * classes, 0);
  double distance = 0, count = 0;
  for (std::size_t i = 0; i < problem.labels.size(); ++i) {
    if (problem.part(p, static_cast<std::ptrdiff_t>(i)) != softmax_problem::validate) continue;
    ++seed.confusion[static_cast<std::size_t>(problem.labels[i]) * classes +
                     static_cast<std::size_t>(found[i])];
    distance += std::abs(found[i] - problem.labels[i]);
    count += 1;
  }
  bool const diverged = seed.validation_loss.back().why == status::diverged;
  if (diverged) seed.confusion.assign(classes * classes, 0);
  seed.mean_distance = diverged ? measured(status::diverged) : ratio(distance, count, unvalidated);
  for (std::size_t c = 0; c < classes; ++c) {
    auto const row = seed.confusion.begin() + static_cast<std::ptrdiff_t>(c * classes);
    auto const all =
        std::accumulate(row, row + static_cast<std::ptrdiff_t>(classes), std::ptrdiff_t{0});
    seed.class_accuracy.push_back(
        diverged ? measured(status::diverged)
                 : ratio(static_cast<double>(seed.confusion[c * classes + c]),
                         static_cast<double>(all), count > 0 ? status::too_few_rows : unvalidated));
  }
}

/// Trains all seeds of one site.
template <class Regression>
probe_result run_probe(probe_plan const& plan, probe_options const& options, std::ptrdiff_t width,
                       bool keep_weights, Regression& regression) {
  probe_result out;
  out.why = regression.why();
  out.non_finite = regression.non_finite();
  out.classes = plan.problem.classes;
  out.tokens = plan.tokens();
  out.width = width;
  out.chance = plan.chance();
  out.validation_asked = plan.validation_asked();
  if (out.why != status::ok) {
    for (over_seeds* s : {&out.train_loss, &out.validation_loss, &out.train_accuracy,
                          &out.validation_accuracy, &out.mean_distance})
      *s = {out.why, out.why};
    return out;
  }
  status const unvalidated = plan.validates() ? status::too_few_rows : status::not_requested;
  out.seeds.resize(static_cast<std::size_t>(options.seeds));
  regression.load(plan.initial(width, regression.mean(), regression.deviation()));
  adam const by{options.learning_rate, options.beta1, options.beta2, options.epsilon,
                options.weight_decay};
  for (int e = 0; e < options.epochs; ++e) note_epoch(regression.step(by), unvalidated, out);
  note_epoch(regression.evaluate(), unvalidated, out);

  softmax_weights w;
  if (keep_weights) regression.store(w);
  std::vector<measured> train_loss, validation_loss, train_accuracy, validation_accuracy, distance;
  for (std::size_t p = 0; p < out.seeds.size(); ++p) {
    probe_seed& seed = out.seeds[p];
    auto const problem = static_cast<std::ptrdiff_t>(p);
    seed.training_tokens = plan.count(problem, softmax_problem::train);
    seed.validation_tokens = plan.count(problem, softmax_problem::validate);
    note_predictions(plan.problem, problem,
                     regression.predictions().data() + problem * plan.tokens(), unvalidated, seed);
    if (keep_weights)
      plan.give_weights(w, problem, width, regression.mean(), regression.deviation(), seed);
    train_loss.push_back(seed.train_loss.back());
    validation_loss.push_back(seed.validation_loss.back());
    train_accuracy.push_back(seed.train_accuracy.back());
    validation_accuracy.push_back(seed.validation_accuracy.back());
    distance.push_back(seed.mean_distance);
  }
  out.train_loss = summary(train_loss);
  out.validation_loss = summary(validation_loss);
  out.train_accuracy = summary(train_accuracy);
  out.validation_accuracy = summary(validation_accuracy);
  out.mean_distance = summary(distance);
  return out;
}

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

// ---- the probes ---------------------------------------------------------------------------------

namespace detail {

/// @param stacks  what the backend reads: one, or several with the sites of `first`
/// @param tokens  of them: all_tokens(), size(), token(i)
template <class Stacks, class First, class Tokens, class Labels, class On>
layer_probes probe_sites(char const* where, Stacks const& stacks, First const& first,
                         Tokens const& tokens, Labels const& labels, probe_options const& options,
                         On const& on) {
  probe_plan const plan(where, tokens, labels, options);
  for (std::ptrdiff_t l = 0; l < first.sites(); ++l) plan.check_given(first[l].cols);
  layer_probes out;
  out.chance = plan.chance();
  out.validation_asked = plan.validation_asked();
  out.validation_tokens = plan.validation_tokens();
  out.layers.resize(static_cast<std::size_t>(first.sites()));
  on.softmax(stacks, plan.problem, [&](std::ptrdiff_t l, auto& regression) {
    out.layers[static_cast<std::size_t>(l)] =
        run_probe(plan, options, first[l].cols, options.keep_weights, regression);
  });
  for (std::ptrdiff_t l = 0; l < first.sites(); ++l) {
    position& at = out.layers[static_cast<std::size_t>(l)].non_finite;
    if (at.found()) at.token = tokens.token(at.token);
    out.names.push_back(first.name(l));
    measured const here = out.accuracy(l).mean;
    if (here.ok() && (out.best < 0 || here > out.accuracy(out.best).mean)) out.best = l;
  }
  measured const last = out.accuracy(first.sites() - 1).mean;
  if (out.best >= 0 && last.ok())
    out.drop = out.accuracy(out.best).mean - last;
  else
    out.drop = out.best < 0 ? out.accuracy(0).mean.why : last.why;
  return out;
}

}  // namespace detail

/// Softmax regression with bias from activations to labels, for several seeds at once.
///
///     min over W, b of −Σ_i log softmax(W x_i + b)[y_i] / n     full batch, Adam
///
/// @param  x        n × d activations, tokens in rows
/// @param  labels   n integers in [0, classes)
/// @param  options  split, seeds, epochs, learning rate, standardisation, initial weights
/// @param  on       where to run; by default where x lives
/// @return curves, accuracies, confusion and weights of each seed, means and spreads over seeds.
///         Activations constant over what is trained on: status constant_layer. A run whose logits leave the range of numbers:
///         status diverged. Without validation: its fields have status not_requested
/// @throws std::invalid_argument if labels are out of range or of another number than tokens, a class
///         has no token to train on, there are fewer than 2 classes or more than tokens, or the
///         options contradict themselves or are not finite; std::domain_error on NaN or infinity in x
/// @note   4·n·d·classes·seeds operations an epoch. Beyond x: 3·d + n values per class and seed.
///         Products and weights in fp32 (fp64 for double), sums over tokens in fp64
/// @see    Alain, Bengio, "Understanding intermediate layers using linear classifier probes", 2016
template <class X, class Labels, class On = default_backend_t<memory_of<X>>>
probe_result probe(X const& x, Labels const& labels, probe_options const& options = {},
                   On const& on = {}) {
  static_assert(softmax_backend_for<On, memory_of<X>>,
                "rflow: this backend cannot read where the activations live, or has no probes");
  constexpr char const* where = "rflow::probe";
  auto const v = as_view(x);
  detail::require_shape(where, v);
  layer_stack const stack{v};
  detail::probe_plan const plan(where, stack, labels, options);
  plan.check_given(v.cols);
  probe_result out;
  on.softmax(stack, plan.problem, [&](std::ptrdiff_t, auto& regression) {
    out = detail::run_probe(plan, options, v.cols, true, regression);
  });
  if (out.non_finite.found()) detail::throw_non_finite(where, "x", out.non_finite);
  return out;
}

/// Probes of every site of a stack.
///
/// @param  stack    S sites of n × d activations; widths may differ. Masked tokens take no part
/// @param  labels   one integer a token of the views, masked ones included (theirs are not looked at)
/// @param  options  as for probe(); keep_weights keeps classes · d weights a seed and site
/// @param  on       where to run; by default where the stack lives
/// @return a probe_result a site, all with the same splits and seeds; the best site, and how much of
///         its accuracy the last site has lost. A site without an answer (constant, not finite) has
///         its status, the rest stays right
/// @throws std::invalid_argument as probe()
/// @note   S times the cost of probe(); small sites run side by side
template <class T, class Memory, class Labels, class On = default_backend_t<Memory>>
layer_probes probe_layers(layer_stack<T, Memory> const& stack, Labels const& labels,
                          probe_options const& options = {}, On const& on = {}) {
  static_assert(softmax_backend_for<On, Memory>,
                "rflow: this backend cannot read where the stack lives, or has no probes");
  return detail::probe_sites("rflow::probe_layers", stack, stack, stack, labels, options, on);
}

/// The same for tokens in several stacks, one after the other: files too large for one. Splits are
/// over the tokens of all stacks.
///
/// @param  labels  one integer a token of all stacks
/// @throws std::invalid_argument also if there are no stacks, or they differ in sites or widths
template <class T, class Memory, class Labels, class On = default_backend_t<Memory>>
layer_probes probe_layers(std::vector<layer_stack<T, Memory>> const& stacks, Labels const& labels,
                          probe_options const& options = {}, On const& on = {}) requires requires {
  on.softmax(stacks, softmax_problem{}, detail::any_visit{});
}  // on_cpu does
{
  if (stacks.empty()) detail::reject("rflow::probe_layers", "no stacks");
  return detail::probe_sites("rflow::probe_layers", stacks, stacks.front(),
                             detail::joined_tokens(stacks), labels, options, on);
}

template <detail::no_stack X, class... More>
layer_probes probe_layers(X const&, More const&...) {
  static_cast<void>(sizeof(detail::refuse_stackless<X>));
  return {};
}

}  // namespace rflow
