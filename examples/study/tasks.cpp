// SPDX-License-Identifier: Apache-2.0
// Prompts of the two retrieval tasks, with labels: the position of what is asked for.
//
// Text goes to JSON lines {prompt, label, gold_index, context, answers}; models/tokenise.py turns them
// into token ids with a model's tokenizer. Integer prompts are token ids already. Both end as one
// safetensors file: ids, offsets, gold, group (see probe.cpp).

#include <rflow/init.hpp>
#include <rflow/safetensors.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <string>

#include "study.hpp"

namespace study {
namespace {

using json = nlohmann::ordered_json;
using integer = std::ptrdiff_t;

/// A sequence of random numbers: a stream of its own for each context.
class random_stream {
 public:
  random_stream(std::uint64_t seed, std::uint32_t stream) : seed_(seed), stream_(stream) {}

  std::uint32_t word() {
    if (at_ % 4 == 0) words_ = rflow::philox({at_ / 4, 0, stream_, 0x6b767072}, seed_);
    return words_[at_++ % 4];
  }
  /// Even on [0, n).
  std::uint64_t below(std::uint64_t n) {
    std::uint64_t const wide = std::uint64_t{word()} << 32 | word();
    return wide % n;  // n is far below 2⁶⁴: the remainder's bias is beyond notice
  }
  /// A version 4 UUID.
  std::string uuid() {
    std::array<std::uint32_t, 4> w{word(), word(), word(), word()};
    w[1] = (w[1] & 0xffff0fffu) | 0x4000u;
    w[2] = (w[2] & 0x3fffffffu) | 0x80000000u;
    char text[40];
    std::snprintf(text, sizeof text, "%08x-%04x-%04x-%04x-%04x%08x", w[0], w[1] >> 16,
                  w[1] & 0xffff, w[2] >> 16, w[2] & 0xffff, w[3]);
    return text;
  }
  template <class T>
  void shuffle(std::vector<T>& x) {
    for (std::size_t i = x.size(); i > 1; --i) std::swap(x[i - 1], x[below(i)]);
  }

 private:
  std::uint64_t seed_;
  std::uint32_t stream_, at_ = 0;
  std::array<std::uint32_t, 4> words_{};
};

/// The positions that gold takes, each a class: those asked for, or all.
std::vector<integer> positions(std::vector<integer> const& asked, integer count) {
  std::vector<integer> out = asked;
  if (out.empty()) {
    out.resize(static_cast<std::size_t>(count));
    std::iota(out.begin(), out.end(), 0);
  }
  for (integer const p : out)
    if (p < 0 || p >= count)
      throw std::invalid_argument("--gold " + std::to_string(p) + ": positions are 0 to " +
                                  std::to_string(count - 1));
  return out;
}

void write_text(std::string const& path, std::string const& text) {
  rflow::atomic_writer out(path);
  out.write(text);
  out.commit();
}

std::string kv_prompt(std::vector<std::pair<std::string, std::string>> const& pairs,
                      std::string const& key, bool query_first) {
  std::string out = "Find the value that belongs to the given key in this JSON object.\n\n";
  if (query_first) out += "Key: \"" + key + "\"\n\n";
  out += "JSON data:\n";
  for (std::size_t i = 0; i < pairs.size(); ++i)
    out += (i == 0 ? "{\"" : " \"") + pairs[i].first + "\": \"" + pairs[i].second + "\"" +
           (i + 1 < pairs.size() ? ",\n" : "}\n");
  return out + "\nKey: \"" + key + "\"\nCorresponding value:";
}

}  // namespace

int kvpr(kvpr_options const& asked) {
  std::vector<integer> const gold = positions(asked.gold, asked.pairs);
  if (!asked.integers) {
    std::string lines;
    for (int context = 0; context < asked.prompts; ++context) {
      random_stream random(asked.seed, static_cast<std::uint32_t>(context));
      std::vector<std::pair<std::string, std::string>> pairs;
      for (int i = 0; i < asked.pairs; ++i) pairs.emplace_back(random.uuid(), random.uuid());
      auto const wanted = pairs[random.below(pairs.size())];
      std::erase(pairs, wanted);
      for (std::size_t label = 0; label < gold.size(); ++label) {
        auto moved = pairs;
        moved.insert(moved.begin() + gold[label], wanted);
        json const line = {{"prompt", kv_prompt(moved, wanted.first, asked.query_first)},
                           {"label", label},
                           {"gold_index", gold[label]},
                           {"context", context},
                           {"answers", {wanted.second}}};
        lines += line.dump() + "\n";
      }
    }
    write_text(asked.output, lines);
    return 0;
  }

  if (asked.pairs > asked.keys)
    throw std::invalid_argument("--pairs " + std::to_string(asked.pairs) + ": there are " +
                                std::to_string(asked.keys) + " keys");
  std::vector<std::int64_t> ids, offsets{0}, labels, groups, answers;
  for (int context = 0; context < asked.prompts; ++context) {
    random_stream random(asked.seed, static_cast<std::uint32_t>(context));
    std::vector<std::int64_t> keys(static_cast<std::size_t>(asked.keys)), values;
    std::iota(keys.begin(), keys.end(), 1);
    random.shuffle(keys);
    keys.resize(static_cast<std::size_t>(asked.pairs));
    for (int i = 0; i < asked.pairs; ++i)
      values.push_back(
          1 + asked.keys +
          static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(asked.values))));
    for (std::size_t label = 0; label < gold.size(); ++label) {
      // The same pairs, with the one that is asked for moved to where it belongs.
      auto k = keys, v = values;
      auto const to = static_cast<std::size_t>(gold[label]);
      std::rotate(k.begin(), k.begin() + 1, k.begin() + static_cast<integer>(to) + 1);
      std::rotate(v.begin(), v.begin() + 1, v.begin() + static_cast<integer>(to) + 1);
      for (std::size_t i = 0; i < k.size(); ++i) ids.push_back(k[i]), ids.push_back(v[i]);
      ids.push_back(keys.front());
      offsets.push_back(static_cast<std::int64_t>(ids.size()));
      labels.push_back(static_cast<std::int64_t>(label));
      groups.push_back(context);
      answers.push_back(values.front());
    }
  }
  auto const column = [](char const* name, std::vector<std::int64_t> const& x) {
    return rflow::tensor{name,
                         rflow::dtype::i64,
                         {static_cast<integer>(x.size())},
                         {1},
                         reinterpret_cast<std::byte const*>(x.data())};
  };
  std::vector<rflow::tensor> const tensors{column("ids", ids), column("offsets", offsets),
                                           column("gold", labels), column("group", groups),
                                           column("answer", answers)};
  rflow::write_safetensors(asked.output, tensors,
                           {{"task", "kvpr"}, {"pairs", std::to_string(asked.pairs)}});
  return 0;
}

int mdqa(mdqa_options const& asked) {
  std::ifstream in(asked.input, std::ios::binary);
  if (!in) throw std::invalid_argument(asked.input + ": cannot be opened");
  std::string text, lines;
  for (int number = 1; std::getline(in, text); ++number) {
    auto const fail = [&](std::string const& why) {
      throw std::invalid_argument(asked.input + ", line " + std::to_string(number) + ": " + why);
    };
    json const line = json::parse(text, nullptr, false);
    auto const is_text = [](json const& x, char const* key) {
      return x.is_object() && x.contains(key) && x[key].is_string();
    };
    if (!is_text(line, "question") || !line.contains("ctxs") || !line["ctxs"].is_array())
      fail("no question, or no ctxs");
    std::vector<std::pair<std::string, std::string>> others;
    std::pair<std::string, std::string> gold;
    bool has_gold = false;
    for (json const& document : line["ctxs"]) {
      if (!is_text(document, "title") || !is_text(document, "text"))
        fail("a document without title or text");
      std::pair<std::string, std::string> d{document["title"], document["text"]};
      if (document.value("isgold", false)) {
        if (has_gold) fail("two gold documents");
        gold = d, has_gold = true;
      } else {
        others.push_back(d);
      }
    }
    if (!has_gold) fail("no gold document");
    if (asked.documents > 0) {
      if (static_cast<std::size_t>(asked.documents) > others.size() + 1)
        fail("only " + std::to_string(others.size() + 1) + " documents");
      others.resize(static_cast<std::size_t>(asked.documents) - 1);
    }
    auto const where = positions(asked.gold, static_cast<integer>(others.size()) + 1);
    for (std::size_t label = 0; label < where.size(); ++label) {
      auto documents = others;
      documents.insert(documents.begin() + where[label], gold);
      std::string prompt =
          "Answer the question well, using only these search results, some of which may have "
          "nothing to do with it.\n\n";
      for (std::size_t i = 0; i < documents.size(); ++i)
        prompt += "Document [" + std::to_string(i + 1) + "](Title: " + documents[i].first + ") " +
                  documents[i].second + "\n";
      prompt += "\nQuestion: " + line["question"].get<std::string>() + "\nAnswer:";
      json const out = {{"prompt", prompt},
                        {"label", label},
                        {"gold_index", where[label]},
                        {"context", number - 1},
                        {"answers", line.value("answers", json::array())}};
      lines += out.dump() + "\n";
    }
  }
  if (lines.empty()) throw std::invalid_argument(asked.input + ": no lines");
  write_text(asked.output, lines);
  return 0;
}

}  // namespace study
