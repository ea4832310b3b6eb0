// SPDX-License-Identifier: Apache-2.0
// The flow of a GGUF model while llama.cpp reads a text: a cb_eval callback pushes each block's
// output into a flow_monitor where it lies, and nothing is kept.
//
// usage: rflow_llamacpp MODEL.gguf TEXT [TOKENS [UBATCH [CAPTURE.safetensors TOLERANCE]]]
//        rflow_llamacpp MODEL.gguf TEXT TOKENS UBATCH --time RUNS
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <rflow/ggml.hpp>
#include <rflow/monitor.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../flow_table.hpp"

static_assert(rflow::ggml_tensor_like<ggml_tensor>);
static_assert(GGML_TYPE_F32 == 0 && GGML_TYPE_F16 == 1 && GGML_TYPE_F64 == 28 &&
              GGML_TYPE_BF16 == 30);

namespace {

int cores() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

/// What the callback works on.
struct measuring {
  rflow::flow_monitor<float> monitor;
  std::vector<std::ptrdiff_t> seen;  // tokens of each site so far
  bool measure = true;               // or only ask for the same tensors, to time what that costs
  std::string error;

  measuring(std::ptrdiff_t sites, std::ptrdiff_t width, std::ptrdiff_t ubatch, int threads)
      : monitor(sites, width, {}, rflow::on_cpu{.threads = threads}),
        seen(static_cast<std::size_t>(sites)) {
    monitor.reserve(ubatch);
  }
};

bool on_eval(ggml_tensor* t, bool ask, void* data) try {
  auto& m = *static_cast<measuring*>(data);
  std::ptrdiff_t const site = rflow::llama_site(t->name);
  if (ask || !m.measure) return !ask || site >= 0;
  auto const rows = rflow::from_ggml<float>(t);  // llama.cpp's own memory, until we return
  if (rows.data != t->data) throw std::logic_error("broken promise: from_ggml copies nothing");
  std::ptrdiff_t& seen = m.seen.at(static_cast<std::size_t>(site));
  if (m.monitor.push(site, seen, rows)) seen += rows.rows;
  return true;
} catch (std::exception const& e) {  // no exception may pass through a C callback
  static_cast<measuring*>(data)->error = e.what();
  return true;
}

using model_ptr = std::unique_ptr<llama_model, decltype(&llama_model_free)>;
using context_ptr = std::unique_ptr<llama_context, decltype(&llama_free)>;

std::vector<llama_token> tokenize(llama_model const* model, char const* path) {
  std::ifstream in(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(in), {}};
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  if (text.empty()) throw std::runtime_error(std::string(path) + ": no text");
  std::vector<llama_token> tokens(text.size() + 8);
  int const count =
      llama_tokenize(llama_model_get_vocab(model), text.data(), static_cast<int>(text.size()),
                     tokens.data(), static_cast<int>(tokens.size()), true, false);
  if (count <= 0) throw std::runtime_error(std::string(path) + ": no tokens");
  tokens.resize(static_cast<std::size_t>(count));
  return tokens;
}

/// One pass over the tokens, in ubatches of at most ubatch. Asks for the outputs of all of them:
/// llama.cpp drops all other rows within its last block.
double decode(llama_model* model, std::vector<llama_token> const& tokens, int ubatch,
              measuring* state) {
  llama_context_params p = llama_context_default_params();
  p.n_ctx = p.n_batch = static_cast<unsigned>(tokens.size());
  p.n_ubatch = static_cast<unsigned>(ubatch);
  p.n_threads = p.n_threads_batch = cores();
  p.type_k = p.type_v = GGML_TYPE_F32;  // an f16 cache changes the numbers
  p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  if (state != nullptr) {
    p.cb_eval = on_eval;
    p.cb_eval_user_data = state;
  }
  context_ptr const context(llama_init_from_model(model, p), &llama_free);
  if (!context) throw std::runtime_error("llama.cpp made no context");

  llama_batch batch = llama_batch_init(static_cast<int>(tokens.size()), 0, 1);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = static_cast<llama_pos>(i);
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = true;
  }
  batch.n_tokens = static_cast<int>(tokens.size());
  auto const start = std::chrono::steady_clock::now();
  int const failed = llama_decode(context.get(), batch);
  llama_synchronize(context.get());
  double const seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  llama_batch_free(batch);
  if (failed != 0) throw std::runtime_error("llama_decode returned " + std::to_string(failed));
  return seconds;
}

/// Medians of prompt processing without a callback, with one that only asks for the same tensors,
/// and with the monitor; the three take turns.
void time(llama_model* model, std::vector<llama_token> const& tokens, int ubatch, int runs) {
  std::ptrdiff_t const sites = llama_model_n_layer(model) + 1, width = llama_model_n_embd(model);
  std::vector<double> seconds[3];
  for (int run = 0; run <= runs; ++run)
    for (int which = 0; which < 3; ++which) {
      measuring state(sites, width, ubatch, cores());
      state.measure = which == 2;
      double const s = decode(model, tokens, ubatch, which == 0 ? nullptr : &state);
      if (run > 0) seconds[which].push_back(s);  // the first warms up
    }
  double median[3];
  char const* const names[] = {"no callback", "callback that returns true", "monitor"};
  for (int which = 0; which < 3; ++which) {
    std::sort(seconds[which].begin(), seconds[which].end());
    median[which] = seconds[which][seconds[which].size() / 2];
    std::printf("%-28s %8.2f ms (%.2f to %.2f)\n", names[which], 1e3 * median[which],
                1e3 * seconds[which].front(), 1e3 * seconds[which].back());
  }
  std::printf("the monitor adds %.1f %% to the callback, the callback %.1f %% to none\n",
              100 * (median[2] / median[1] - 1), 100 * (median[1] / median[0] - 1));
}

int run(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr,
                 "usage: rflow_llamacpp MODEL.gguf TEXT [TOKENS [UBATCH [CAPTURE "
                 "TOLERANCE | --time RUNS]]]\n");
    return 2;
  }
  llama_log_set(
      [](ggml_log_level level, char const* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  llama_model_params p = llama_model_default_params();
  p.n_gpu_layers = 0;  // from_ggml reads host memory
  model_ptr const model(llama_model_load_from_file(arguments[1], p), &llama_model_free);
  if (!model) throw std::runtime_error(std::string(arguments[1]) + ": llama.cpp cannot load it");

  std::vector<llama_token> tokens = tokenize(model.get(), arguments[2]);
  if (count > 3) tokens.resize(std::min(tokens.size(), std::stoul(arguments[3])));
  int const ubatch = count > 4 ? std::stoi(arguments[4]) : 512;
  if (count > 6 && std::string(arguments[5]) == "--time") {
    time(model.get(), tokens, ubatch, std::stoi(arguments[6]));
    return 0;
  }

  measuring state(llama_model_n_layer(model.get()) + 1, llama_model_n_embd(model.get()), ubatch,
                  cores());
  decode(model.get(), tokens, ubatch, &state);
  if (!state.error.empty()) throw std::runtime_error(state.error);
  state.monitor.end_sequence();
  rflow::flow_report const report = state.monitor.report().pooled;  // throws what push refused
  if (report.tokens != static_cast<std::ptrdiff_t>(tokens.size()))
    throw std::runtime_error("not every token came through every block");
  runtimes::print(report);
  return count > 6 && !runtimes::agrees(report, arguments[5], std::stod(arguments[6])) ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) try {
  return run(count, arguments);
} catch (std::exception const& e) {
  std::fprintf(stderr, "rflow_llamacpp: error: %s\n", e.what());
  return 1;
}
