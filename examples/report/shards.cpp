// SPDX-License-Identifier: Apache-2.0
#include "shards.hpp"

#include <rflow/cka.hpp>
#include <rflow/monitor.hpp>
#include <rflow/safetensors.hpp>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cinttypes>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <thread>

#include "../common/leftovers.hpp"
#include "labels.hpp"
#include "memory.hpp"
#include "text.hpp"

namespace report {
namespace {

using rflow::measured;
using rflow::status;

constexpr std::ptrdiff_t tokens_at_once = 2048;

/// What a shard is known by before it is read.
struct shard {
  std::string path;
  token_choice tokens;
  std::string identity;  // size and time of last change
};

struct plan {
  std::vector<shard> shards;
  std::string label, dtype;
  std::map<std::string, std::string> metadata;
  std::vector<std::string> sites, notes;
  std::vector<double> positions;
  bool embedding = true;
  double copied_most = 0, copied_all = 0;  // bytes that reading copies: of one shard, of all
  std::ptrdiff_t width = 0;
  rflow::dtype type{};
  token_choice all;                        // of all shards, one after the other
  double probe_cost = 0, probe_bytes = 0;  // of rank 0, which trains them
};

std::string identity_of(std::string const& path) {
  struct ::stat facts {};
  if (::stat(path.c_str(), &facts) != 0) return "gone";
  return std::to_string(facts.st_size) + " bytes of " + std::to_string(facts.st_mtim.tv_sec) + "." +
         std::to_string(facts.st_mtim.tv_nsec);
}

/// Opens every shard for a moment: all must hold the same sites.
plan plan_of(options const& asked) {
  plan out;
  token_rules rules(asked);
  bool alike = true;
  std::ptrdiff_t with_notes = 0;
  for (std::string const& input : asked.inputs) {
    capture const c = load(input, asked);
    if (!c.sites.one_width())
      throw unusable(input, "its sites differ in width, which --shards does not read");
    if (out.shards.empty()) {
      out.label = c.label;
      out.metadata = c.metadata;
      out.sites = c.sites.names();
      out.positions = c.positions();
      out.embedding = c.sites.layer(0) == 0;
      out.width = c.sites.width();
      out.type = c.sites.type();
      out.dtype = to_string(out.type);
    } else if (c.sites.names() != out.sites || c.sites.width() != out.width ||
               c.sites.type() != out.type) {
      auto const shape = [](std::size_t sites, std::ptrdiff_t width, std::string_view type) {
        return std::to_string(sites) + " sites x " + std::to_string(width) + " features, " +
               std::string(type);
      };
      throw unusable(input,
                     "not a shard of the same model: " +
                         shape(c.sites.chain.size(), c.sites.width(), to_string(c.sites.type())) +
                         ", but " + asked.inputs.front() + " has " +
                         shape(out.sites.size(), out.width, out.dtype) +
                         (c.sites.chain.size() == out.sites.size() ? " (or other names)" : ""));
    }
    out.copied_most = std::max(out.copied_most, c.copied());
    out.copied_all += c.copied();
    with_notes += c.notes.empty() ? 0 : 1;
    if (out.notes.empty())
      for (std::string const& text : c.notes) out.notes.push_back(input + ": " + text);
    out.shards.push_back({input, rules.next(c), identity_of(input)});
    out.all.append(out.shards.back().tokens);
    alike = alike && out.shards.back().tokens.stored == out.shards.front().tokens.stored;
  }
  require_no_layers(asked.inputs, out.sites.size(), alike);
  rules.finish(out.shards.front().path, out.all);
  if (with_notes > 1)
    out.notes.push_back("the like holds for " + plural(with_notes - 1, "other file"));
  return out;
}

// ---- checkpoints --------------------------------------------------------------------------------

struct progress_made {
  std::size_t shard = 0, sequence = 0;  // where to go on
};

std::string checkpoint_path(options const& asked, workers const& all) {
  return asked.checkpoint + (all.size() > 1 ? "." + std::to_string(all.rank()) : "");
}

/// Removes what killed runs left of a checkpoint that they were writing.
void remove_unfinished(std::string const& checkpoint) {
  common::leftovers(checkpoint, ".tmp-", common::is_writers_name,
                    [](std::filesystem::path const& left) {
                      std::error_code ignored;
                      if (std::filesystem::is_regular_file(std::filesystem::symlink_status(left)))
                        std::filesystem::remove(left, ignored);
                    });
}

/// A checksum of all that a checkpoint says: FNV-1a, 64 bits (Fowler, Noll, Vo,
/// draft-eastlake-fnv). Each step is one to one, so that no change of a single byte goes unseen.
std::string checksum(std::string_view of, std::string_view shard, std::string_view sequence,
                     std::span<double const> numbers) {
  std::uint64_t sum = 0xcbf29ce484222325u;
  auto const add = [&](void const* data, std::size_t size) {
    auto const* const bytes = static_cast<unsigned char const*>(data);
    for (std::size_t i = 0; i < size; ++i) sum = (sum ^ bytes[i]) * 0x100000001b3u;
  };
  for (std::string_view const text : {of, shard, sequence}) {
    std::size_t const length = text.size();  // else "1", "23" would be "12", "3"
    add(&length, sizeof length);
    add(text.data(), length);
  }
  add(numbers.data(), numbers.size_bytes());
  char text[17];
  std::snprintf(text, sizeof text, "%016" PRIx64, sum);
  return text;
}

/// All that the numbers in a checkpoint depend on.
std::string fingerprint(plan const& p, options const& asked, workers const& all) {
  std::string out = "rank " + std::to_string(all.rank()) + " of " + std::to_string(all.size()) +
                    "; " + std::string(to_string(asked.normalize)) +
                    (asked.minibatch_cka ? ", batch " + std::to_string(asked.cka_batch) : "") +
                    "; " + p.dtype + ", " + std::to_string(p.width) + " features";
  for (std::string const& site : p.sites) out += ", " + site;
  for (shard const& s : p.shards) {
    // Masks may be in other files, so the tokens themselves are what counts.
    std::vector<double> numbers;
    for (token_run const& run : s.tokens.runs)
      for (std::ptrdiff_t const x : {run.begin, run.end}) numbers.push_back(static_cast<double>(x));
    numbers.insert(numbers.end(), s.tokens.offsets.begin(), s.tokens.offsets.end());
    out += "; " + s.path + ": " + s.identity + ", tokens " + checksum("", "", "", numbers);
  }
  return out;
}

constexpr char const* checkpoint_version = "2";

void save(std::string const& path, std::string const& of, progress_made const& done,
          rflow::monitor_moments const& m) {
  std::vector<double> const numbers = rflow::to_numbers(m);
  std::string const shard = std::to_string(done.shard), sequence = std::to_string(done.sequence);
  rflow::tensor const tensors[] = {
      rflow::as_tensor("moments", numbers, {static_cast<std::ptrdiff_t>(numbers.size())})};
  rflow::write_safetensors(path, tensors,
                           {{"rflow_checkpoint", checkpoint_version},
                            {"of", of},
                            {"shard", shard},
                            {"sequence", sequence},
                            {"checksum", checksum(of, shard, sequence, numbers)}});
}

/// @param m  of the right shape; takes over what is in the file
progress_made restore(std::string const& path, std::string const& of, rflow::monitor_moments& m) {
  try {
    rflow::safetensors_file const file(path);
    auto const& said = file.metadata();
    auto const text = [&](char const* key) {
      auto const found = said.find(key);
      return found == said.end() ? std::string() : found->second;
    };
    if (text("rflow_checkpoint").empty() || !file.contains("moments"))
      throw unusable(path, "not a checkpoint of this program; nothing was read");
    if (text("rflow_checkpoint") == "1")
      throw unusable(path,
                     "the checkpoint is of an earlier version of this program; delete it to start "
                     "anew");
    rflow::tensor const x = file["moments"];
    std::span<double const> const numbers(x.elements<double>(), static_cast<std::size_t>(x.size()));
    if (text("rflow_checkpoint") != checkpoint_version ||
        text("checksum") != checksum(text("of"), text("shard"), text("sequence"), numbers))
      throw std::runtime_error("its checksum is of other contents");
    if (text("of") != of)
      throw unusable(path,
                     "the checkpoint is of other shards, options or ranks; give another name, "
                     "or delete it to start anew");
    rflow::from_numbers(m, numbers);
    return {std::stoul(text("shard")), std::stoul(text("sequence"))};
  } catch (unusable const&) {
    throw;
  } catch (std::bad_alloc const&) {
    throw;
  } catch (std::exception const& error) {
    throw unusable(path, "the checkpoint is damaged (" + reason_of(error, path) +
                             "); delete it to start anew");
  }
}

// ---- the pass -----------------------------------------------------------------------------------

int threads_of(options const& asked, workers const& all) {
  if (asked.threads > 0) return asked.threads;
  int const here = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, here / all.size());
}

/// Multiply-adds a token, of the pass that streams.
double cost_of_token(plan const& p, options const& asked) {
  double const s = static_cast<double>(p.sites.size()), d = static_cast<double>(p.width);
  return s * d * (10 + (asked.minibatch_cka ? static_cast<double>(asked.cka_batch) / 2 : 0));
}

/// Multiply-adds of full CKA with one kernel, by the cheaper way if there are two.
double cost_of_full_cka(plan const& p, bool linear) {
  double const s = static_cast<double>(p.sites.size()), d = static_cast<double>(p.width);
  double const n = static_cast<double>(p.all.used), tiles = s * n * n * (d + s) / 2;
  return linear ? std::min(tiles, s * d * s * d * n / 2) : tiles;
}

/// Multiply-adds of one process: streaming, then full CKA if asked for.
struct work {
  double stream = 0, linear = 0, rbf = 0, probes = 0;

  work(plan const& p, options const& asked, workers const& all) {
    double const ranks = all.size();
    probes = all.rank() == 0 ? p.probe_cost : 0;
    stream = cost_of_token(p, asked) * static_cast<double>(p.all.used) / ranks;
    if (asked.minibatch_cka) return;
    if (asked.linear) linear = cost_of_full_cka(p, true) / ranks;
    if (asked.rbf) rbf = cost_of_full_cka(p, false) / ranks;
  }
  double total() const { return stream + linear + rbf + probes; }
};

/// The moments of shards first … last − 1.
template <class T>
rflow::monitor_moments stream(plan const& p, std::size_t first, std::size_t last,
                              options const& asked, workers const& all, progress const& tell) {
  auto const sites = static_cast<std::ptrdiff_t>(p.sites.size());
  rflow::flow_monitor<T> monitor(
      sites, p.width,
      {.normalize = asked.normalize, .cka = asked.minibatch_cka, .cka_batch = asked.cka_batch},
      rflow::on_cpu{.threads = threads_of(asked, all)});
  std::ptrdiff_t longest = 1;
  for (std::size_t i = first; i < last; ++i) longest = std::max(longest, p.shards[i].tokens.used);
  monitor.reserve(std::min(longest, tokens_at_once));

  std::string const of = asked.checkpoint.empty() ? "" : fingerprint(p, asked, all);
  std::string const keep = asked.checkpoint.empty() ? "" : checkpoint_path(asked, all);
  progress_made done{first, 0};
  std::error_code ignored;
  if (!keep.empty() && std::filesystem::exists(keep, ignored)) {
    rflow::monitor_moments m(sites, p.width, asked.minibatch_cka);
    done = restore(keep, of, m);
    if (done.shard < first || done.shard > last)
      throw unusable(keep, "the checkpoint is damaged (no shard " + std::to_string(done.shard) +
                               "); delete it to start anew");
    monitor.merge(m);
    remove_unfinished(keep);
  }
  auto saved = std::chrono::steady_clock::now();
  auto const save_if_due = [&](progress_made const& now, bool at_end) {
    std::chrono::duration<double> const since = std::chrono::steady_clock::now() - saved;
    if (keep.empty() || (!at_end && since.count() < asked.checkpoint_seconds)) return;
    save(keep, of, now, monitor.moments());
    saved = std::chrono::steady_clock::now();
  };

  work const costs(p, asked, all);
  double mine = 0, so_far = 0;
  for (std::size_t i = first; i < last; ++i) mine += static_cast<double>(p.shards[i].tokens.stored);
  for (std::size_t i = first; i < done.shard; ++i)
    so_far += static_cast<double>(p.shards[i].tokens.stored);
  for (; done.shard < last; done = {done.shard + 1, 0}) {
    capture const c = load(p.shards[done.shard].path, asked);
    token_choice const& chosen = p.shards[done.shard].tokens;
    std::vector<std::ptrdiff_t> const& offsets = chosen.offsets;
    rflow::layer_stack<T> const stack = c.sites.stack<T>();
    if (stack.sites() != sites || stack.width() != p.width || stack.all_tokens() != chosen.stored)
      throw unusable(c.path, "changed while the report was made");
    if (done.sequence >= offsets.size())
      throw unusable(keep, "the checkpoint is damaged (no sequence " +
                               std::to_string(done.sequence) + " in " + c.path +
                               "); delete it to start anew");
    so_far += static_cast<double>(offsets[done.sequence]);
    for (; done.sequence + 1 < offsets.size(); ++done.sequence) {
      std::ptrdiff_t const begin = offsets[done.sequence], end = offsets[done.sequence + 1];
      // Only tokens that count are pushed: batches of minibatch CKA are of those.
      std::ptrdiff_t pushed = 0;
      auto run = std::partition_point(chosen.runs.begin(), chosen.runs.end(),
                                      [&](token_run const& r) { return r.end <= begin; });
      for (; run != chosen.runs.end() && run->begin < end; ++run) {
        std::ptrdiff_t const stop = std::min(run->end, end);
        for (std::ptrdiff_t at = std::max(run->begin, begin); at < stop; at += tokens_at_once) {
          std::ptrdiff_t const count = std::min(tokens_at_once, stop - at);
          for (std::ptrdiff_t l = 0; l < sites; ++l) {
            rflow::view<T> const x = stack[l];
            monitor.push(l, pushed,
                         rflow::view<T>(x.data + at * x.row_stride, count, x.cols, x.row_stride,
                                        x.col_stride));
          }
          pushed += count;
          tell(costs.stream * (so_far + static_cast<double>(at + count - begin)) / mine,
               costs.total());
        }
      }
      so_far += static_cast<double>(end - begin);
      monitor.end_sequence();
      if (!monitor.error().empty()) throw unusable(c.path, std::string(monitor.error()));
      save_if_due({done.shard, done.sequence + 1}, false);
    }
  }
  save_if_due(done, true);
  return monitor.moments();
}

/// f(); what it lacks of memory is said of the file.
template <class F>
void short_of_memory(plan const& p, F const& f) {
  try {
    f();
  } catch (std::bad_alloc const&) {
    throw unusable(p.shards.front().path, "out of memory");
  }
}

// ---- CKA over all tokens ------------------------------------------------------------------------

/// Every shard at once, mapped, with the tokens that count.
template <class T>
struct all_tokens {
  std::vector<capture> captures;
  std::vector<rflow::layer_stack<T>> stacks;

  all_tokens(plan const& p, options const& asked) {
    for (shard const& s : p.shards) {
      if (s.tokens.used == 0) continue;
      captures.push_back(load(s.path, asked));
      rflow::layer_stack<T> const stack = captures.back().sites.template stack<T>();
      if (stack.all_tokens() != s.tokens.stored)
        throw unusable(s.path, "changed while the report was made");
      stacks.push_back(counted(stack, s.tokens));
    }
  }
};

/// Scratch of Gram products; what p-values take for one site's kernel matrix is about 6 n² bytes.
std::size_t scratch_bytes(plan const& p, options const& asked) {
  std::size_t const tiles = rflow::on_cpu{}.memory_bound;
  if (!asked.significance) return tiles;
  double const n = static_cast<double>(p.all.used), c = p.type == rflow::dtype::f64 ? 8 : 4;
  return std::max(tiles, static_cast<std::size_t>(c * n * (1.5 * n + 512)));
}

/// This process's share of the Gram products, in a few pieces so that it can tell how far it is.
template <class T, class Kernel>
rflow::gram_moments share_of_products(plan const& p, all_tokens<T> const& tokens,
                                      Kernel const& kernel, options const& asked,
                                      workers const& all, std::function<void(double)> const& tell) {
  // Each piece looks at all tokens once more, which is little beside the products of so many.
  std::ptrdiff_t const n = p.all.used;
  int const pieces = static_cast<int>(std::clamp<std::ptrdiff_t>(n / (16384 * all.size()), 1, 8));
  rflow::on_cpu on{.threads = threads_of(asked, all),
                   .memory_bound = scratch_bytes(p, asked),
                   .significance = asked.significance};
  rflow::gram_moments sum;
  for (int k = 0; k < pieces; ++k) {
    on.share = {all.rank() * pieces + k, all.size() * pieces};
    rflow::gram_moments part = on.gram(kernel, tokens.stacks);
    if (k == 0)
      sum = std::move(part);
    else
      sum.merge(part);
    tell((k + 1.0) / pieces);
  }
  return sum;
}

/// CKA over all tokens of all shards; every process forms its share of the products.
template <class T>
std::vector<cka_result> full_cka(plan const& p, options const& asked, workers& all,
                                 progress const& tell) {
  std::optional<all_tokens<T>> tokens;
  all.together([&] { tokens.emplace(p, asked); });
  work const costs(p, asked, all);
  auto const stored = [&](std::ptrdiff_t token) { return p.all.stored_token(token); };
  std::vector<cka_result> out;
  double before = costs.stream;
  auto const add = [&](char const* name, auto const& kernel, double cost) {
    rflow::gram_moments m;
    all.together([&] {
      short_of_memory(p, [&] {
        m = share_of_products(p, *tokens, kernel, asked, all,
                              [&](double done) { tell(before + cost * done, costs.total()); });
      });
    });
    before += cost;
    all.merge(m);
    out.push_back(cka_of(name, m, stored));
  };
  if (asked.linear) add("linear", rflow::linear{}, costs.linear);
  if (asked.rbf) add("rbf", rflow::rbf{.fraction = asked.rbf_fraction}, costs.rbf);
  return out;
}

// ---- probes over all tokens ---------------------------------------------------------------------

/// The shards, mapped, all at once.
std::vector<capture> all_shards(plan const& p, options const& asked) {
  std::vector<capture> out;
  for (shard const& s : p.shards) {
    out.push_back(load(s.path, asked));
    if (out.back().sites.tokens() != s.tokens.stored)
      throw unusable(s.path, "changed while the report was made");
  }
  return out;
}

/// Reads the labels of all tokens, and adds to the plan what the probes will take.
probe_labels labels_of(plan& p, options const& asked, workers const& all) {
  std::vector<capture> const shards = all_shards(p, asked);
  std::vector<token_choice> chosen;
  for (shard const& s : p.shards) chosen.push_back(s.tokens);
  labelling const labels = read_labels(asked.labels, shards, chosen, asked, role::classes);
  std::optional<labelling> groups;
  if (!asked.label_groups.empty())
    groups = read_labels(asked.label_groups, shards, chosen, asked, role::groups);
  probe_labels out =
      labels_of(plural(std::ssize(p.shards), "shard"), p.all, labels, groups ? &*groups : nullptr);
  double const stored = static_cast<double>(p.all.stored);
  auto const cells = [&](labelling const& l) {
    return 80 * stored + 400 * static_cast<double>(l.read.distinct.size());
  };
  p.probe_bytes = bytes_of_probes(out, p.sites.size(), p.width, asked, threads_of(asked, all)) +
                  cells(labels) + (groups ? cells(*groups) : 0);
  p.probe_cost = 2 * static_cast<double>(p.sites.size()) * static_cast<double>(p.width) *
                 static_cast<double>(p.all.used) * static_cast<double>(out.names.size()) *
                 asked.probe_seeds * asked.probe_epochs;
  return out;
}

/// Probes over the tokens of all shards, on this process alone.
template <class T>
rflow::layer_probes probes_of(plan const& p, probe_labels const& labels, options const& asked,
                              workers const& all) {
  std::vector<capture> const shards = all_shards(p, asked);
  std::vector<rflow::layer_stack<T>> stacks;
  std::vector<std::int64_t> label, group;
  std::ptrdiff_t begin = 0;
  for (capture const& c : shards) {
    std::ptrdiff_t const end = begin + c.sites.tokens();
    std::vector<bool> const mask(labels.mask.begin() + begin, labels.mask.begin() + end);
    if (std::find(mask.begin(), mask.end(), true) != mask.end()) {
      stacks.push_back(c.sites.template stack<T>().tokens(mask));
      label.insert(label.end(), labels.label.begin() + begin, labels.label.begin() + end);
      if (!labels.group.empty())
        group.insert(group.end(), labels.group.begin() + begin, labels.group.begin() + end);
    }
    begin = end;
  }
  try {
    return rflow::probe_layers(stacks, label, training_of(asked, std::move(group)),
                               rflow::on_cpu{.threads = threads_of(asked, all)});
  } catch (std::invalid_argument const& error) {
    throw blame(error, labels, asked.labels.front(),
                asked.label_groups.empty() ? "" : asked.label_groups.front());
  }
}

/// What minibatch CKA knows: one kernel, one estimator, no token.
cka_result minibatch_result(rflow::minibatch_moments const& m) {
  cka_grid grid{m.sites, m.sites, {}, {}};
  for (std::ptrdiff_t i = 0; i < m.sites; ++i)
    for (std::ptrdiff_t j = 0; j < m.sites; ++j) {
      measured const x = rflow::minibatch_cka(m, i, j);
      grid.value.push_back(x);
      grid.chance.push_back(x.ok() ? measured(0.0) : x);
    }
  auto const none = [](std::size_t n) { return std::vector<measured>(n, status::not_requested); };
  auto const sites = static_cast<std::size_t>(m.sites);
  std::size_t const cells = grid.value.size();
  return {"linear",    std::move(grid), {m.sites, m.sites, none(cells), none(cells)},
          none(sites), none(sites),     std::vector<std::ptrdiff_t>(sites, -1)};
}

/// What is held beside the mapped files, for the text that states it.
double bytes_needed(plan const& p, options const& asked, workers const& all) {
  double const s = static_cast<double>(p.sites.size()), d = static_cast<double>(p.width);
  std::ptrdiff_t longest = 1;
  for (shard const& one : p.shards) longest = std::max(longest, one.tokens.used);
  double const batch = static_cast<double>(asked.cka_batch);
  double const n = static_cast<double>(std::min(longest, tokens_at_once));
  double const c = p.type == rflow::dtype::f64 ? 8 : 4;
  double const t = static_cast<double>(rflow::bits(p.type)) / 8;
  double const rows = n * d * (2 * t + c);  // two rows, the mean
  double const choice = 48 * static_cast<double>(p.all.runs.size() + p.all.offsets.size());
  double const fixed = rows + choice + p.probe_bytes + 8 * s * (3 * d + 8 * s) + 32e6 +
                       bytes_of_tables(s, asked) + bytes_of_threads(threads_of(asked, all)) +
                       (asked.minibatch_cka ? p.copied_most : p.copied_all);
  if (!asked.minibatch_cka) {
    // Scratch; norms, sums per token of a share and of all, and of one rank at a time on the way.
    double const sums = 10 + (all.size() > 1 ? 16 : 0);
    return fixed + static_cast<double>(scratch_bytes(p, asked)) +
           8 * s * static_cast<double>(p.all.used) * sums;
  }
  double const kernels = s * (n / batch + 2) * batch * batch / 2 * c * 1.05;
  double const unfinished = s * batch * d * t;  // rows of short batches
  double const engines = threads_of(asked, all) * c * (batch * d + 3 * batch * 600);
  return fixed + kernels + unfinished + engines;
}

/// f in the type of the activations.
template <class F>
auto in_type(plan const& p, F const& f) {
  switch (p.type) {
    case rflow::dtype::f16: return f(rflow::f16{});
    case rflow::dtype::bf16: return f(rflow::bf16{});
    case rflow::dtype::f64: return f(double{});
    default: return f(float{});
  }
}

/// Looks at this process's memory until it goes out of scope. Its thread needs none of its own.
class memory_watch {
 public:
  explicit memory_watch(double& peak) : peak_(peak) {
    try {
      thread_ = std::thread([this]() noexcept {
        std::unique_lock lock(mutex_);
        do look();
        while (!over_.wait_for(lock, std::chrono::milliseconds(20), [this] { return done_; }));
      });
    } catch (std::system_error const&) {
      // No thread to be had: the look at the end has to do.
    }
  }
  ~memory_watch() {
    {
      std::lock_guard const lock(mutex_);
      look();
      done_ = true;
    }
    over_.notify_one();
    if (thread_.joinable()) thread_.join();
  }
  memory_watch(memory_watch const&) = delete;
  memory_watch& operator=(memory_watch const&) = delete;

 private:
  void look() { peak_ = std::max(peak_, static_cast<double>(anonymous_memory())); }

  double& peak_;
  std::mutex mutex_;
  std::condition_variable over_;
  bool done_ = false;
  std::thread thread_;
};

/// Limits the memory of this process (RLIMIT_DATA), if asked for.
void limit_memory(options const& asked) {
  if (asked.memory_limit == 0) return;
  ::rlimit limit{};
  limit.rlim_cur = limit.rlim_max = static_cast<::rlim_t>(asked.memory_limit) << 20;
  if (::setrlimit(RLIMIT_DATA, &limit) != 0)
    throw std::invalid_argument("--memory-limit: " + std::string(std::strerror(errno)));
}

}  // namespace

std::size_t anonymous_memory() {
  // Without memory of its own: it is asked for while there may be none left.
  int const file = ::open("/proc/self/status", O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  char text[8192];
  ::ssize_t const size = ::read(file, text, sizeof text);
  ::close(file);
  std::string_view const all(text, size > 0 ? static_cast<std::size_t>(size) : 0);
  constexpr std::string_view name = "RssAnon:";
  std::size_t at = all.find(name);
  if (at == std::string_view::npos) return 0;
  at = std::min(all.find_first_not_of(" \t", at + name.size()), all.size());
  std::size_t kib = 0;
  std::from_chars(all.data() + at, all.data() + all.size(), kib);
  return kib * 1024;
}

result measure_shards(options const& asked, workers& all, progress const& tell) {
  plan p;
  rflow::monitor_moments m;
  std::optional<probe_labels> labels;
  double peak = 0;
  std::optional<memory_watch> watch;
  auto const tell_first = [&](double done, double total) {
    if (all.rank() == 0) tell(done, total);
  };
  all.together([&] {
    p = plan_of(asked);
    if (!asked.labels.empty()) labels = labels_of(p, asked, all);
    require_memory(p.shards.front().path, bytes_needed(p, asked, all), asked);
    limit_memory(asked);
    watch.emplace(peak);
    auto const ranks = static_cast<std::size_t>(all.size()),
               rank = static_cast<std::size_t>(all.rank());
    std::size_t const count = p.shards.size();
    short_of_memory(p, [&] {
      m = in_type(p, [&]<class T>(T) {
        return stream<T>(p, count * rank / ranks, count * (rank + 1) / ranks, asked, all,
                         tell_first);
      });
    });
  });
  all.merge(m);
  for (rflow::position& at : m.flow.non_finite)  // counted among the tokens that were pushed
    if (at.found()) at.token = p.all.stored_token(at.token);

  result out;
  model_result model;
  model.path = asked.inputs.front();
  model.label = p.label;
  model.metadata = p.metadata;
  model.metadata.erase("token_hash");  // of one shard
  model.dtype = p.dtype;
  model.sites = p.sites;
  model.positions = p.positions;
  model.embedding = p.embedding;
  model.tokens = p.all;
  model.per_sequence = m.figures;
  model.flow = rflow::report_of(m.flow, asked.normalize);
  if (asked.minibatch_cka)
    model.cka.push_back(minibatch_result(m.cka));
  else
    model.cka = in_type(p, [&]<class T>(T) { return full_cka<T>(p, asked, all, tell_first); });
  if (labels) {
    all.together([&] {
      if (all.rank() != 0) return;  // which makes the report
      short_of_memory(p, [&] {
        model.probes = in_type(
            p, [&]<class T>(T) { return std::optional(probes_of<T>(p, *labels, asked, all)); });
      });
      double const total = work(p, asked, all).total();
      tell(total, total);
    });
    model.classes = probe_classes{labels->from, labels->names, labels->tokens, labels->left_out};
    for (std::string const& text : labels->notes) model.warnings.push_back({false, text});
  }
  watch.reset();
  model.shards = shard_facts{static_cast<std::ptrdiff_t>(p.shards.size()), m.cka.batches,
                             m.cka.left_out, bytes_needed(p, asked, all), peak};
  require_finite(model);
  for (std::string const& text : p.notes) model.warnings.push_back({false, text});
  add_warnings(model, {}, asked);
  if (p.all.used >= outlier_facts::least)
    model.warnings.push_back(
        {false, "groups of outlying tokens are looked for in single files only, without --shards"});
  if (asked.minibatch_cka)
    model.warnings.push_back(
        {false,
         "CKA is minibatch CKA over " + std::to_string(m.cka.batches) + " batches of up to " +
             std::to_string(asked.cka_batch) +
             " tokens: another estimator than CKA over all tokens at once, though close to it"});
  out.models.push_back(std::move(model));
  return out;
}

void forget_checkpoint(options const& asked, workers const& all) {
  if (asked.checkpoint.empty()) return;
  try {
    std::string const path = checkpoint_path(asked, all);
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
    remove_unfinished(path);
  } catch (std::bad_alloc const&) {
    // It stays. There is a report, and that counts.
  }
}

}  // namespace report
