// SPDX-License-Identifier: Apache-2.0
// The flow of a model in LibTorch, two ways, since the C++ frontend has no forward hooks: a
// TorchScript module that returns its hidden states, and a torch::nn model whose own loop keeps
// them.
//
// usage: rflow_libtorch                                        a random model written in C++
//        rflow_libtorch MODEL.pt IDS.txt [CAPTURE.safetensors TOLERANCE]
#include <ATen/DLConvertor.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <rflow/dlpack.hpp>
#include <rflow/torch.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "../flow_table.hpp"

static_assert(rflow::torch_tensor<at::Tensor> && rflow::dlpack_managed<DLManagedTensor>);
static_assert(static_cast<int>(at::kHalf) == 5 && static_cast<int>(at::kFloat) == 6 &&
              static_cast<int>(at::kDouble) == 7 && static_cast<int>(at::kBFloat16) == 15);
static_assert(static_cast<int>(at::kStrided) == 0 && static_cast<int>(at::kCPU) == 0 &&
              static_cast<int>(at::kCUDA) == 1);

namespace {

/// A block with a residual stream; attention is left to the reader.
struct BlockImpl : torch::nn::Module {
  torch::nn::LayerNorm norm;
  torch::nn::Linear up, down;
  explicit BlockImpl(std::int64_t width)
      : norm(register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))),
        up(register_module("up", torch::nn::Linear(width, 4 * width))),
        down(register_module("down", torch::nn::Linear(4 * width, width))) {}
  at::Tensor forward(at::Tensor const& x) { return x + down(torch::gelu(up(norm(x)))); }
};
TORCH_MODULE(Block);

struct Model : torch::nn::Module {
  torch::nn::Embedding embed;
  std::vector<Block> blocks;
  Model(std::int64_t vocabulary, std::int64_t width, int depth)
      : embed(register_module("embed", torch::nn::Embedding(vocabulary, width))) {
    for (int i = 0; i < depth; ++i)
      blocks.push_back(register_module("block" + std::to_string(i), Block(width)));
  }
  /// Hidden states: what the embedding and each block leave.
  std::vector<at::Tensor> forward(at::Tensor const& ids) {
    std::vector<at::Tensor> hidden{embed(ids)};
    for (Block& block : blocks) hidden.push_back(block(hidden.back()));
    return hidden;
  }
};

/// What a module returns as a tuple or list of tensors.
std::vector<at::Tensor> hidden_states(torch::jit::Module& model, at::Tensor const& ids) {
  c10::IValue const out = model.forward({ids});
  if (out.isTensorList()) return out.toTensorVector();
  std::vector<at::Tensor> hidden;
  for (c10::IValue const& value : out.toTuple()->elements()) hidden.push_back(value.toTensor());
  return hidden;
}

at::Tensor read_ids(char const* path) {
  std::ifstream in(path);
  std::vector<std::int64_t> const ids{std::istream_iterator<std::int64_t>(in), {}};
  if (ids.empty()) throw std::runtime_error(std::string(path) + ": no token ids");
  return torch::tensor(ids).unsqueeze(0);
}

void require(bool holds, char const* what) {
  if (!holds) throw std::logic_error(std::string("broken promise: ") + what);
}

/// No copy on any way in; and what is refused.
void check_conversions(std::vector<at::Tensor> const& hidden) {
  at::Tensor const& h = hidden.back();
  auto const x = rflow::from_torch<float>(h);
  require(x.data == h.const_data_ptr<float>(), "from_torch copies nothing");
  auto const owner = rflow::take_dlpack(at::toDLPack(h));
  require(rflow::from_dlpack<float>(owner).data == x.data, "from_dlpack copies nothing");
  at::Tensor const turned = h[0].t(), part = h.slice(1, 1, 3).slice(2, 2, 6);
  require(rflow::from_torch<float>(turned)(2, 1) == turned[2][1].item<float>(), "transposed");
  require(rflow::from_torch<float>(part)(1, 3) == part[0][1][3].item<float>(), "sliced");
  at::Tensor const half = h.to(at::kHalf), brain = h.to(at::kBFloat16);
  require(float{rflow::from_torch<rflow::f16>(half)(1, 2)} == half[0][1][2].item<float>(), "f16");
  require(float{rflow::from_torch<rflow::bf16>(brain)(1, 2)} == brain[0][1][2].item<float>(),
          "bf16");
  at::Tensor const stacked = torch::stack(hidden);
  require(
      rflow::stack_from_torch<float>(stacked).sites() == static_cast<std::ptrdiff_t>(hidden.size()),
      "a stacked tensor");
  at::Tensor const bad[] = {at::Tensor(),
                            h[0].to_sparse(),
                            h.to(at::kInt),
                            h.expand({2, -1, -1}),
                            h[0][0].expand({3, -1}),
                            at::empty({3, 4}, at::kMeta),
                            h[0][0]};
  for (at::Tensor const& tensor : bad) {
    bool refused = false;
    try {
      rflow::from_torch<float>(tensor);
    } catch (std::invalid_argument const&) {
      refused = true;
    }
    require(refused, "what cannot be viewed is refused");
  }

  // A result as a tensor of LibTorch, without a copy; it dies with the tensor.
  rflow::flow_report const report = rflow::flow(rflow::stack_from_torch<float>(hidden));
  DLManagedTensor* const handed = rflow::to_dlpack<DLManagedTensor>(report.inter_token);
  void const* const where = handed->dl_tensor.data;
  at::Tensor const result = at::fromDLPack(handed);
  require(result.const_data_ptr() == where && result.size(0) == report.sites, "to_dlpack");
}

int run(int count, char** arguments) {
  c10::InferenceMode const guard;
  std::vector<at::Tensor> hidden;
  if (count > 2) {
    torch::jit::Module model = torch::jit::load(arguments[1]);
    model.eval();
    hidden = hidden_states(model, read_ids(arguments[2]));
  } else {
    torch::manual_seed(1);
    Model model(1000, 64, 6);
    hidden = model.forward(torch::randint(1000, {1, 128}));
  }
  check_conversions(hidden);

  // These lines are all it takes.
  rflow::layer_stack<float> const layers = rflow::stack_from_torch<float>(hidden);
  rflow::flow_report const report = rflow::flow(layers);
  runtimes::print(report);
  return count > 4 && !runtimes::agrees(report, arguments[3], std::stod(arguments[4])) ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) try {
  return run(count, arguments);
} catch (std::exception const& e) {
  std::fprintf(stderr, "rflow_libtorch: error: %s\n", e.what());
  return 1;
}
