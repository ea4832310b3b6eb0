// SPDX-License-Identifier: Apache-2.0
// from_onnxruntime on a stand-in with the members of Ort::Value. examples/runtimes/onnxruntime
// compiles the same header against ONNX Runtime, where its headers are found.
#include <doctest/doctest.h>

#include <cstdint>
#include <numeric>
#include <rflow/onnxruntime.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <rflow/flow.hpp>

#include "files.hpp"

namespace {

// The names and numbers of ONNX Runtime.
enum ElementType { FLOAT = 1, INT64 = 7, STRING = 8, FLOAT16 = 10, DOUBLE = 11, BFLOAT16 = 16 };
enum DeviceType { CPU = 0, GPU = 1 };

/// Ort::Value is move-only and its accessors return by value.
struct Value {
  struct ShapeInfo {
    Value const* of;
    std::vector<std::int64_t> GetShape() const { return of->shape; }
    ElementType GetElementType() const { return of->type; }
  };
  struct MemoryInfo {
    Value const* of;
    DeviceType GetDeviceType() const { return of->device; }
    std::string GetAllocatorName() const { return of->allocator; }
  };

  std::vector<std::int64_t> shape;
  std::vector<float> data;
  ElementType type = FLOAT;
  DeviceType device = CPU;
  std::string allocator = "Cpu";
  bool tensor = true, null = false;

  explicit Value(std::vector<std::int64_t> extents) : shape(std::move(extents)) {
    std::size_t count = 1;
    for (auto const n : shape) count *= static_cast<std::size_t>(n);
    data.resize(count < 4096 ? count : 0);
    std::iota(data.begin(), data.end(), 0.0f);
  }
  Value(Value&&) = default;
  Value& operator=(Value&&) = default;

  bool IsTensor() const { return tensor; }
  ShapeInfo GetTensorTypeAndShapeInfo() const {
    if (!tensor) throw std::runtime_error("asked a sequence for its shape");
    return {this};
  }
  MemoryInfo GetTensorMemoryInfo() const { return {this}; }
  void const* GetTensorRawData() const { return null ? nullptr : data.data(); }
};

static_assert(rflow::ort_value<Value> && !rflow::ort_value<std::vector<float>>);

template <class T>
concept viewable_rvalue = requires(T v) {
  rflow::from_onnxruntime<float>(std::move(v));
};
static_assert(!viewable_rvalue<Value>);

template <class Break>
void refused(Break&& breaks, std::string const& message, std::vector<std::int64_t> shape = {3, 4}) {
  Value v(std::move(shape));
  breaks(v);
  std::string const text =
      files::error_of<std::invalid_argument>([&] { rflow::from_onnxruntime<float>(v); });
  CAPTURE(text);
  CHECK(files::contains(text, "rflow::from_onnxruntime: " + message));
}

}  // namespace

TEST_CASE("a value becomes a view of its memory") {
  Value const v({1, 3, 4});
  auto const x = rflow::from_onnxruntime<float>(v);
  CHECK(x.data == v.data.data());
  CHECK(x.rows == 3);
  CHECK(x.cols == 4);
  CHECK(x(2, 1) == 9.0f);
}

TEST_CASE("a stack from one value or from what a session returns") {
  Value const all({3, 4, 6});
  CHECK(rflow::stack_from_onnxruntime<float>(all)[2](3, 5) == 71.0f);
  std::vector<Value> outputs;
  for (int i = 0; i < 4; ++i) outputs.emplace_back(std::vector<std::int64_t>{1, 4, 6});
  auto const stack = rflow::stack_from_onnxruntime<float>(outputs);
  CHECK(stack.sites() == 4);
  CHECK(stack[3].data == outputs[3].data.data());
  std::span<Value const> const hidden(outputs.data() + 1, 3);  // the first may be logits
  CHECK(rflow::stack_from_onnxruntime<float>(hidden, {"embed", "block.1", "block.2"})[0].data ==
        outputs[1].data.data());
  CHECK(rflow::flow(stack).variance.st1.value == 0.0);
}

TEST_CASE("16-bit and double values") {
  Value v({2, 2});
  v.type = FLOAT16;
  CHECK(rflow::visit(
      v, [](auto const& x) { return std::is_same_v<rflow::scalar_of<decltype(x)>, rflow::f16>; }));
  v.type = BFLOAT16;
  CHECK(rflow::visit(
      v, [](auto const& x) { return std::is_same_v<rflow::scalar_of<decltype(x)>, rflow::bf16>; }));
  v.type = DOUBLE;
  CHECK(rflow::visit(v, [](auto const& x) { return sizeof(*x.data); }) == 8);
}

TEST_CASE("what cannot be viewed is refused by name and value") {
  refused([](Value& v) { v.tensor = false; }, "the value is no tensor");
  refused([](Value& v) { v.type = FLOAT16; }, "element type is f16, f32 expected");
  refused([](Value& v) { v.type = INT64; },
          "element type is ONNXTensorElementDataType 7, f32 expected");
  refused([](Value& v) { v.type = STRING; }, "element type is ONNXTensorElementDataType 8");
  refused([](Value& v) { v.device = GPU, v.allocator = "Cuda"; }, "the data live on Cuda");
  refused([](Value& v) { v.null = true; }, "data is NULL for 3 x 4 elements");
  refused([](Value&) {}, "an array of 0 axes", {});
  refused([](Value&) {}, "shape[0] is 0", {0, 4});
  refused([](Value&) {}, "shape[0] is -1", {-1, 4});  // a dimension nobody fixed
  refused([](Value&) {}, "shape[0] is 2, 1 expected", {2, 3, 4});
  refused([](Value&) {}, "4611686018427387904 x 8 elements are more than memory can hold",
          {std::int64_t{1} << 62, 8});
}

TEST_CASE("memory of CUDA becomes a device view, pinned memory a host view") {
  Value v({3, 4});
  v.allocator = "CudaPinned";
  CHECK(rflow::from_onnxruntime<float>(v).data == v.data.data());
  v.device = GPU;
  v.allocator = "DML";
  CHECK_THROWS_AS((rflow::from_onnxruntime<float, rflow::device_memory>(v)), std::invalid_argument);
  v.allocator = "Cuda";
  CHECK(rflow::from_onnxruntime<float, rflow::device_memory>(v).data == v.data.data());
}
