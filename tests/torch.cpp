// SPDX-License-Identifier: Apache-2.0
// from_torch on a stand-in with the members of at::Tensor. examples/runtimes/libtorch compiles and
// runs the same header against LibTorch.
#include <doctest/doctest.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <rflow/torch.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include <rflow/flow.hpp>

#include "files.hpp"

namespace {

// The names and numbers of LibTorch.
enum class ScalarType : std::int8_t {
  Byte,
  Long = 4,
  Half,
  Float,
  Double,
  QInt8 = 12,
  BFloat16 = 15
};
enum class DeviceType : std::int8_t { CPU, CUDA, MPS = 13, Meta };
enum class Layout : std::int8_t { Strided, Sparse };
struct Device {
  DeviceType type_ = DeviceType::CPU;
  std::int8_t index_ = -1;
  DeviceType type() const { return type_; }
  std::int8_t index() const { return index_; }
};
struct IntArrayRef {
  std::int64_t const* data;
  std::size_t length;
  std::size_t size() const { return length; }
  std::int64_t const& operator[](std::size_t i) const { return data[i]; }
};

/// A handle on shared storage. A lazy copy is made by data_ptr() and not by const_data_ptr().
struct Tensor {
  std::shared_ptr<std::vector<float>> storage;
  std::vector<std::int64_t> sizes_, strides_;
  ScalarType type_ = ScalarType::Float;
  Device device_;
  Layout layout_ = Layout::Strided;
  bool negative = false;
  std::int64_t offset = 0;

  Tensor() = default;
  explicit Tensor(std::vector<std::int64_t> sizes) : sizes_(std::move(sizes)) {
    std::int64_t step = 1;
    strides_.resize(sizes_.size());
    for (std::size_t i = sizes_.size(); i-- > 0; step *= sizes_[i]) strides_[i] = step;
    storage = std::make_shared<std::vector<float>>(static_cast<std::size_t>(step));
    std::iota(storage->begin(), storage->end(), 0.0f);
  }

  bool defined() const { return storage != nullptr; }
  ScalarType scalar_type() const { return type_; }
  Device device() const { return device_; }
  Layout layout() const { return layout_; }
  bool is_neg() const { return negative; }
  IntArrayRef sizes() const { return {sizes_.data(), sizes_.size()}; }
  IntArrayRef strides() const {
    if (layout_ != Layout::Strided) throw std::runtime_error("sparse tensors have no strides");
    return {strides_.data(), strides_.size()};
  }
  void const* const_data_ptr() const { return storage->data() + offset; }
  void* data_ptr() const { throw std::logic_error("data_ptr() would copy a lazy copy"); }
};

/// LibTorch 1.13 has no const_data_ptr().
struct OldTensor {
  Tensor t;
  bool defined() const { return t.defined(); }
  ScalarType scalar_type() const { return t.scalar_type(); }
  Device device() const { return t.device(); }
  Layout layout() const { return t.layout(); }
  bool is_neg() const { return false; }
  IntArrayRef sizes() const { return t.sizes(); }
  IntArrayRef strides() const { return t.strides(); }
  void* data_ptr() const { return t.storage->data(); }
};

static_assert(rflow::torch_tensor<Tensor> && rflow::torch_tensor<OldTensor>);
static_assert(!rflow::torch_tensor<std::vector<float>>);

template <class T>
concept viewable_rvalue = requires(T t) {
  rflow::from_torch<float>(std::move(t));
};
static_assert(!viewable_rvalue<Tensor>);

template <class Break>
void refused(Break&& breaks, std::string const& message, std::vector<std::int64_t> sizes = {3, 4}) {
  Tensor t(std::move(sizes));
  breaks(t);
  std::string const text =
      files::error_of<std::invalid_argument>([&] { rflow::from_torch<float>(t); });
  CAPTURE(text);
  CHECK(files::contains(text, "rflow::from_torch: " + message));
}

}  // namespace

TEST_CASE("a tensor becomes a view of its storage") {
  Tensor t({3, 4});
  auto const x = rflow::from_torch<float>(t);
  CHECK(x.data == t.storage->data());
  CHECK(x.rows == 3);
  CHECK(x.cols == 4);
  CHECK(x(1, 2) == 6.0f);
  OldTensor const old{t};
  CHECK(rflow::from_torch<float>(old).data == t.storage->data());
}

TEST_CASE("transposed, sliced and batched tensors keep their strides") {
  Tensor t({4, 6});
  std::swap(t.sizes_[0], t.sizes_[1]);
  std::swap(t.strides_[0], t.strides_[1]);
  CHECK(rflow::from_torch<float>(t)(5, 3) == 3.0f * 6 + 5);
  Tensor slice({4, 6});
  slice.sizes_ = {2, 3};
  slice.offset = 7;
  CHECK(rflow::from_torch<float>(slice)(1, 2) == 7.0f + 6 + 2);
  Tensor const batch({1, 4, 6});
  CHECK(rflow::from_torch<float>(batch).rows == 4);
  Tensor expanded({1, 4, 6});
  expanded.strides_[0] = 0;
  CHECK(rflow::from_torch<float>(expanded).rows == 4);
}

TEST_CASE("a stack from one tensor or from a list") {
  Tensor const all({3, 4, 6}), with_batch({3, 1, 4, 6});
  CHECK(rflow::stack_from_torch<float>(all)[2].data == all.storage->data() + 48);
  CHECK(rflow::stack_from_torch<float>(with_batch)[2](3, 5) == 71.0f);
  std::vector<Tensor> const hidden{Tensor({1, 4, 6}), Tensor({1, 4, 6})};
  auto const stack = rflow::stack_from_torch<float>(hidden, {"embed", "block.1"});
  CHECK(stack.sites() == 2);
  CHECK(stack[1].data == hidden[1].storage->data());
  CHECK(stack.name(1) == "block.1");
  CHECK(rflow::flow(stack).adjacent[0].mean == doctest::Approx(1.0));
  std::vector<Tensor> const uneven{Tensor({1, 4, 6}), Tensor({1, 5, 6})};
  CHECK_THROWS_AS(rflow::stack_from_torch<float>(uneven), std::invalid_argument);
}

TEST_CASE("visit calls with the type that is there") {
  Tensor t({2, 2});
  auto const size = [](auto const& x) { return sizeof(*x.data); };
  CHECK(rflow::visit(t, size) == 4);
  t.type_ = ScalarType::Half;
  CHECK(rflow::visit(
      t, [](auto const& x) { return std::is_same_v<rflow::scalar_of<decltype(x)>, rflow::f16>; }));
  t.type_ = ScalarType::BFloat16;
  CHECK(rflow::visit(
      t, [](auto const& x) { return std::is_same_v<rflow::scalar_of<decltype(x)>, rflow::bf16>; }));
  t.type_ = ScalarType::Double;
  CHECK(rflow::visit(t, size) == 8);
  t.type_ = ScalarType::Long;
  CHECK_THROWS_AS(rflow::visit(t, size), std::invalid_argument);
}

TEST_CASE("what cannot be viewed is refused by name and value") {
  refused([](Tensor& t) { t.storage = nullptr; }, "the tensor is undefined");
  refused([](Tensor& t) { t.layout_ = Layout::Sparse; }, "layout is 1, 0 (strided) expected");
  refused([](Tensor& t) { t.negative = true; }, "the tensor is a negative view");
  refused([](Tensor& t) { t.type_ = ScalarType::Half; }, "scalar_type is f16, f32 expected");
  refused([](Tensor& t) { t.type_ = ScalarType::QInt8; },
          "scalar_type is c10::ScalarType 12, f32 expected");
  refused([](Tensor& t) { t.device_ = {DeviceType::CUDA, 1}; }, "the data live on CUDA 1");
  refused(
      [](Tensor& t) {
        t.device_ = {DeviceType::MPS, 0};
      },
      "the data live on c10::DeviceType 13 0");
  refused([](Tensor& t) { t.device_ = {DeviceType::Meta, 0}; }, "the data live on");
  refused([](Tensor&) {}, "an array of 1 axes", {4});
  refused([](Tensor&) {}, "an array of 5 axes", {1, 1, 1, 2, 2});
  refused([](Tensor&) {}, "sizes[0] is 2, 1 expected ahead of tokens x hidden", {2, 3, 4});
  refused([](Tensor&) {}, "sizes[0] is 0", {0, 4});
  refused([](Tensor& t) { t.strides_[0] = 0; }, "strides[0] is 0, a positive one expected");
  refused([](Tensor& t) { t.strides_[1] = -1; }, "strides[1] is -1");
}

TEST_CASE("a CUDA tensor becomes a device view, a CPU tensor does not") {
  Tensor t({3, 4});
  CHECK_THROWS_AS((rflow::from_torch<float, rflow::device_memory>(t)), std::invalid_argument);
  t.device_ = {DeviceType::CUDA, 0};
  CHECK(rflow::from_torch<float, rflow::device_memory>(t).data == t.storage->data());
}
