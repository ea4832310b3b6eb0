// SPDX-License-Identifier: Apache-2.0
#pragma once

// The plan of a probe: labels of the tokens that count, who validates, where each seed starts.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <numeric>
#include <queue>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <rflow/init.hpp>
#include <rflow/probe_options.hpp>
#include <rflow/probe_result.hpp>
#include <rflow/softmax_problem.hpp>
#include <rflow/view.hpp>

namespace rflow {

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

}  // namespace detail

}  // namespace rflow
