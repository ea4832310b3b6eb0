// SPDX-License-Identifier: Apache-2.0
#pragma once

// The commands of rflow_study. Each takes what the user asked for, and either leaves complete files
// behind or throws with one line of text.

#include <models/drawn.hpp>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace study {

/// Where results go, and how they are made; common to the commands that measure.
struct setting {
  std::string output;
  bool force = false, quiet = false, plots = true;
  int threads = 0;
};

struct random_options : setting {
  std::vector<std::string> models, schemes;
  std::vector<std::string> controls;  // no_norm, random_affine, embedding_0.5, …
  double stddev = 0.02;
  int seeds = 3;
  std::uint64_t first_seed = 1;
  std::ptrdiff_t tokens = 2048;
  double depth = 1, width = 1;  // fractions of the model's blocks and hidden size
  std::string ids;              // .npy; empty: drawn from the seed
};
int random(random_options const& asked);

struct checkpoint_options : setting {
  std::vector<std::string> folders;
  std::string ids;
  std::string against;  // a scheme: compare with random weights of the same architecture
  std::uint64_t seed = 1;
  bool plain_norms = false;
};
int checkpoint(checkpoint_options const& asked);

struct probe_options : setting {
  std::vector<std::string> folders, prompts;
  std::string against;
  std::uint64_t seed = 1;
  int epochs = 150, seeds = 5;
  double rate = 0.05, validation = 0.2;
  std::string label = "gold";  // the tensor of the prompt files that is the class
};
int probe(probe_options const& asked);

struct kvpr_options {
  std::string output;
  int prompts = 1000, pairs = 75;
  std::uint64_t seed = 1;
  bool integers = false;       // token ids for a model trained on integers instead of text
  int keys = 32, values = 32;  // tokens 1 … keys, and the values after them
  std::vector<std::ptrdiff_t> gold;
  bool query_first = false;
};
int kvpr(kvpr_options const& asked);

struct mdqa_options {
  std::string input, output;
  int documents = 0;  // 0: all of them
  std::vector<std::ptrdiff_t> gold;
};
int mdqa(mdqa_options const& asked);

// ---- shared -------------------------------------------------------------------------------------

/// One of the paper's five models by name, or the config.json (or its folder) at that path.
/// @throws std::invalid_argument or models::unusable_checkpoint
models::architecture find_model(std::string const& name);

/// The name to show for it.
std::string label_of(std::string const& name);

/// @throws std::invalid_argument naming the word
models::scheme find_scheme(std::string const& name);

/// Token ids of a .npy file of one axis.
std::vector<std::int64_t> read_ids(std::string const& path);

/// Writes texts by file name into the asked folder, all or none, and says where the report is.
/// @throws what report::publish throws
void publish(setting const& asked, std::vector<std::string> const& inputs,
             std::map<std::string, std::string> const& texts);

/// Threads to use: those asked for, or what the machine has.
int thread_count(int asked);

}  // namespace study
