// SPDX-License-Identifier: Apache-2.0
// How far apart are the first and the last layer of a model, and do its tokens point the same way?
#include <rflow/rflow.hpp>
#include <rflow/safetensors.hpp>
#include <rflow/sites.hpp>

#include <cstdio>

int main(int count, char** arguments) try {
  rflow::safetensors_file file(count > 1 ? arguments[1] : "examples/data/smollm2-135m.safetensors");
  rflow::layer_stack const layers = rflow::find_sites(file).stack<rflow::bf16>();
  rflow::flow_report const flow = rflow::flow(layers);
  rflow::measured const cka = rflow::cka(layers[0], layers[layers.sites() - 1]);

  std::printf("tokens alike: %.3f in the embedding, %.3f after the last block\n",
              flow.inter_token.front().value, flow.inter_token.back().value);
  std::printf("same geometry in both: %.3f (1: yes, 0: what chance gives)\n", cka.value);
} catch (std::exception const& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
