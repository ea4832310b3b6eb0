// SPDX-License-Identifier: Apache-2.0
// The flow of a model in OpenVINO: what enters and leaves its blocks becomes outputs by add_output()
// before the model is compiled.
//
// usage: rflow_openvino                                        a random model built here
//        rflow_openvino MODEL.xml IDS.txt [CAPTURE.safetensors TOLERANCE]
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <openvino/openvino.hpp>
#include <openvino/opsets/opset8.hpp>
#include <random>
#include <regex>
#include <rflow/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "../flow_table.hpp"

static_assert(rflow::openvino_tensor<ov::Tensor>);

namespace {

void require(bool holds, char const* what) {
  if (!holds) throw std::logic_error(std::string("broken promise: ") + what);
}

using node_ptr = std::shared_ptr<ov::Node>;

/// Token ids to a residual stream: blocks of x + W₂ gelu(W₁ x), named as an exported model's are.
std::shared_ptr<ov::Model> random_model(std::size_t vocabulary, std::size_t width, int depth) {
  namespace op = ov::opset8;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  auto const weight = [&](std::size_t rows, std::size_t cols, float scale) {
    std::vector<float> values(rows * cols);
    for (float& v : values) v = scale * normal(random);
    return op::Constant::create(ov::element::f32, {rows, cols}, values);
  };
  auto const ids = std::make_shared<op::Parameter>(ov::element::i64, ov::PartialShape{1, -1});
  node_ptr x = std::make_shared<op::Gather>(weight(vocabulary, width, 1), ids,
                                            op::Constant::create(ov::element::i64, {}, {0}));
  x->set_friendly_name("embed_tokens");
  for (int i = 0; i < depth; ++i) {
    auto const up = std::make_shared<op::MatMul>(x, weight(width, 4 * width, 0.1f));
    auto const down = std::make_shared<op::MatMul>(std::make_shared<op::Gelu>(up),
                                                   weight(4 * width, width, 0.05f));
    x = std::make_shared<op::Add>(x, down);
    x->set_friendly_name("layers." + std::to_string(i) + "/aten::add/Add");
  }
  return std::make_shared<ov::Model>(ov::OutputVector{std::make_shared<op::Tanh>(x)},
                                     ov::ParameterVector{ids});
}

/// Makes outputs of what the embedding and each block leave: the last addition directly in
/// "layers.i", by the names of models exported from PyTorch. Returns their number.
std::size_t add_site_outputs(ov::Model& model) {
  std::regex const block(".*layers\\.([0-9]+)/aten::add_?/Add(_[0-9]+)?");
  std::map<int, ov::Output<ov::Node>> blocks;
  ov::Output<ov::Node> embedding;
  for (node_ptr const& node : model.get_ordered_ops()) {
    std::string const& name = node->get_friendly_name();
    std::smatch match;
    if (std::regex_match(name, match, block)) blocks[std::stoi(match[1])] = node->output(0);
    if (node->get_type_info().name == std::string("Gather") &&
        name.find("embed_tokens") != std::string::npos)
      embedding = node->output(0);
  }
  if (!embedding.get_node() || blocks.empty() ||
      blocks.rbegin()->first + 1 != static_cast<int>(blocks.size()))
    throw std::runtime_error("the graph has no embed_tokens, layers.0, layers.1, ...");
  model.add_output(embedding);
  for (auto const& [index, output] : blocks) model.add_output(output);
  return blocks.size() + 1;
}

/// No copy, strided regions, and what is refused.
void check_conversions(ov::Tensor const& t) {
  require(rflow::from_openvino<float>(t).data == t.data(), "from_openvino copies nothing");
  ov::Tensor const part(t, {0, 1, 2}, {1, 3, 6});
  auto const x = rflow::from_openvino<float>(part);
  require(x.rows == 2 && x.cols == 4 && &x(1, 1) == &rflow::from_openvino<float>(t)(2, 3),
          "a region of interest");
  std::vector<std::uint16_t> bits(8, 0x3c00);
  ov::Tensor const half(ov::element::f16, {2, 4}, bits.data());
  require(float{rflow::from_openvino<rflow::f16>(half)(1, 3)} == 1.0f, "f16");
  ov::Tensor const brain(ov::element::bf16, {2, 4}, bits.data());
  require(float{rflow::from_openvino<rflow::bf16>(brain)(1, 3)} == 0.0078125f, "bf16");
  ov::Tensor const bad[] = {ov::Tensor(),
                            half,
                            ov::Tensor(ov::element::i64, {2, 2}),
                            ov::Tensor(ov::element::u4, {2, 2}),
                            ov::Tensor(ov::element::f32, {3}),
                            ov::Tensor(ov::element::f32, {2, 3, 4}),
                            ov::Tensor(ov::element::f32, {0, 4})};
  for (ov::Tensor const& tensor : bad) {
    bool refused = false;
    try {
      rflow::from_openvino<float>(tensor);
    } catch (std::invalid_argument const&) {
      refused = true;
    }
    require(refused, "what cannot be viewed is refused");
  }
}

int run(int count, char** arguments) {
  ov::Core core;
  std::shared_ptr<ov::Model> model;
  std::vector<std::int64_t> ids;
  if (count > 2) {
    model = core.read_model(arguments[1]);
    std::ifstream in(arguments[2]);
    ids.assign(std::istream_iterator<std::int64_t>(in), {});
    if (ids.empty()) throw std::runtime_error(std::string(arguments[2]) + ": no token ids");
  } else {
    model = random_model(1000, 64, 6);
    for (int i = 0; i < 128; ++i) ids.push_back(i * 37 % 1000);
  }
  std::size_t const before = model->outputs().size(), sites = add_site_outputs(*model);

  // These lines are all it takes; without the hint a plugin may compute in 16 bits.
  ov::InferRequest request =
      core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32))
          .create_infer_request();
  request.set_input_tensor(ov::Tensor(ov::element::i64, {1, ids.size()}, ids.data()));
  request.infer();
  std::vector<ov::Tensor> hidden;  // shared handles on the request's memory
  for (std::size_t l = 0; l < sites; ++l) hidden.push_back(request.get_output_tensor(before + l));
  rflow::layer_stack<float> const layers = rflow::stack_from_openvino<float>(hidden);
  rflow::flow_report const report = rflow::flow(layers);

  check_conversions(hidden.back());
  runtimes::print(report);
  return count > 4 && !runtimes::agrees(report, arguments[3], std::stod(arguments[4])) ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) try {
  return run(count, arguments);
} catch (std::exception const& e) {
  std::fprintf(stderr, "rflow_openvino: error: %s\n", e.what());
  return 1;
}
