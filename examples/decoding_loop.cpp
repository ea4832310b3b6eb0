// SPDX-License-Identifier: Apache-2.0
// Watch a model while it writes: one row a site and token, as the engine makes them, and none is kept.
#include <rflow/monitor.hpp>
#include <rflow/safetensors.hpp>
#include <rflow/sites.hpp>

#include <cstdio>

// Stands for the engine: decodes one token and hands each site's row to a callback.
template <class Callback>
void decode(rflow::layer_stack<rflow::bf16> const& model, std::ptrdiff_t token, Callback callback) {
  for (std::ptrdiff_t l = 0; l < model.sites(); ++l)
    callback(l, rflow::view(&model[l](token, 0), 1, model.width()));
}

int main(int count, char** arguments) {
  rflow::safetensors_file file(count > 1 ? arguments[1] : "examples/data/smollm2-135m.safetensors");
  rflow::layer_stack const model = rflow::find_sites(file).stack<rflow::bf16>();

  // The first token is an attention sink. One thread, for the engine has its own.
  rflow::flow_monitor<rflow::bf16> monitor(model.sites(), model.width(),
                                           {.skip_first = 1, .cka = true, .cka_batch = 64},
                                           rflow::on_cpu{.threads = 1});
  monitor.reserve(1);  // tokens under way; from here on nothing is allocated
  for (std::ptrdiff_t token = 0; token < model.size(); ++token)
    decode(model, token, [&](std::ptrdiff_t site, rflow::view<rflow::bf16> row) noexcept {
      monitor.push(site, token, row);
    });
  monitor.end_sequence();

  rflow::monitor_report const r =
      monitor.report();  // throws what push() had to refuse, if anything
  std::printf("tokens alike: %.3f at first, %.3f at last\n", r.pooled.inter_token.front().value,
              r.pooled.inter_token.back().value);
  std::printf("same geometry in both: %.3f\n", r.cka(0, model.sites() - 1).value);
}
