// SPDX-License-Identifier: Apache-2.0
// The flow of a model in ONNX Runtime, whose sites are the graph's outputs after the first
// (../export.py adds them), each 1 x tokens x hidden.
//
// usage: rflow_onnxruntime MODEL.onnx IDS.txt [CAPTURE.safetensors TOLERANCE]
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <rflow/onnxruntime.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../flow_table.hpp"

static_assert(rflow::ort_value<Ort::Value>);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == 1 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == 10 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE == 11 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == 16 && OrtMemoryInfoDeviceType_CPU == 0);

namespace {

void require(bool holds, char const* what) {
  if (!holds) throw std::logic_error(std::string("broken promise: ") + what);
}

template <class T>
Ort::Value tensor_on(std::vector<T>& values, std::vector<std::int64_t> const& shape,
                     ONNXTensorElementDataType type) {
  auto const memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor(memory, values.data(), values.size() * sizeof(T), shape.data(),
                                  shape.size(), type);
}

/// No copy, 16-bit types, and what is refused.
void check_conversions(Ort::Value const& output) {
  require(rflow::from_onnxruntime<float>(output).data == output.GetTensorData<float>(),
          "from_onnxruntime copies nothing");
  std::vector<std::uint16_t> bits(8, 0x3c00);
  auto const half = tensor_on(bits, {2, 4}, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  auto const x = rflow::from_onnxruntime<rflow::f16>(half);
  require(float{x(1, 3)} == 1.0f && static_cast<void const*>(x.data) == bits.data(), "f16");
  auto const brain = tensor_on(bits, {2, 4}, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
  require(float{rflow::from_onnxruntime<rflow::bf16>(brain)(1, 3)} == 0.0078125f, "bf16");
  std::vector<float> values(24);
  constexpr auto f32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  std::vector<std::int64_t> labels(4);
  std::vector<Ort::Value> bad;
  bad.push_back(tensor_on(labels, {2, 2}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
  bad.push_back(tensor_on(values, {24}, f32));
  bad.push_back(tensor_on(values, {2, 3, 4}, f32));
  for (Ort::Value const& value : bad) {
    bool refused = false;
    try {
      rflow::from_onnxruntime<float>(value);
    } catch (std::invalid_argument const&) {
      refused = true;
    }
    require(refused, "what cannot be viewed is refused");
  }
}

int run(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: rflow_onnxruntime MODEL.onnx IDS.txt [CAPTURE TOLERANCE]\n");
    return 2;
  }
  std::ifstream in(arguments[2]);
  std::vector<std::int64_t> ids{std::istream_iterator<std::int64_t>(in), {}};
  if (ids.empty()) throw std::runtime_error(std::string(arguments[2]) + ": no token ids");

  Ort::Env const env(ORT_LOGGING_LEVEL_ERROR, "rflow");
  Ort::Session session(env, arguments[1], Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<Ort::AllocatedStringPtr> held;
  std::vector<char const*> names;
  for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
    held.push_back(session.GetOutputNameAllocated(i, allocator));
    names.push_back(held.back().get());
  }
  auto const input_name = session.GetInputNameAllocated(0, allocator);
  char const* const input = input_name.get();

  // These lines are all it takes.
  Ort::Value const tokens = tensor_on(ids, {1, static_cast<std::int64_t>(ids.size())},
                                      ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
  std::vector<Ort::Value> const outputs =
      session.Run(Ort::RunOptions(), &input, &tokens, 1, names.data(), names.size());
  std::span<Ort::Value const> const sites = std::span(outputs).subspan(1);  // the first: last state
  rflow::layer_stack<float> const layers = rflow::stack_from_onnxruntime<float>(sites);
  rflow::flow_report const report = rflow::flow(layers);

  check_conversions(outputs.back());
  runtimes::print(report);
  return count > 4 && !runtimes::agrees(report, arguments[3], std::stod(arguments[4])) ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) try {
  return run(count, arguments);
} catch (std::exception const& e) {
  std::fprintf(stderr, "rflow_onnxruntime: error: %s\n", e.what());
  return 1;
}
