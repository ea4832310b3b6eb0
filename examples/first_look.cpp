// SPDX-License-Identifier: Apache-2.0
// How far apart are the first and the last layer of a model, and do its tokens point the same way?
#include <rflow/rflow.hpp>
#include <rflow/safetensors.hpp>
#include <rflow/sites.hpp>

#include <cstdio>

int main(int count, char** arguments) {
  rflow::safetensors_file file(count > 1 ? arguments[1] : "examples/data/smollm2-135m.safetensors");
  rflow::layer_stack const layers = rflow::find_sites(file).stack<rflow::bf16>();

  rflow::flow_report const flow = rflow::flow(layers);
  rflow::cka_table const cka = rflow::cka_matrix(layers);
  std::ptrdiff_t const last = layers.sites() - 1;

  std::printf("tokens alike: %.3f in %s, %.3f in %s\n", flow.inter_token.front().value,
              layers.name(0).c_str(), flow.inter_token.back().value, layers.name(last).c_str());
  std::printf("same geometry in both: %.3f (1: yes, 0: what chance gives)\n", cka(0, last).value);
}
