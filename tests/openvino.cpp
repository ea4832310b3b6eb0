// SPDX-License-Identifier: Apache-2.0
// from_openvino on a stand-in with the members of ov::Tensor. examples/runtimes/openvino compiles
// and runs the same header against OpenVINO.
#include <doctest/doctest.h>

#include <memory>
#include <numeric>
#include <rflow/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include <rflow/flow.hpp>

#include "files.hpp"

namespace {

struct ElementType {
  std::string name;
  std::string get_type_name() const { return name; }
};

/// A shared handle; strides in bytes; a remote tensor throws when asked for data.
struct Tensor {
  std::shared_ptr<std::vector<float>> data_;
  std::vector<std::size_t> shape_, strides_;
  ElementType type_{"f32"};
  bool remote = false, null = false;
  std::size_t offset = 0;  // bytes

  Tensor() = default;
  explicit Tensor(std::vector<std::size_t> shape) : shape_(std::move(shape)) {
    strides_.resize(shape_.size());
    std::size_t step = sizeof(float);
    for (std::size_t i = shape_.size(); i-- > 0; step *= shape_[i]) strides_[i] = step;
    data_ = std::make_shared<std::vector<float>>(step / sizeof(float) < 4096 ? step / sizeof(float)
                                                                             : 1);
    std::iota(data_->begin(), data_->end(), 0.0f);
  }

  explicit operator bool() const noexcept { return data_ != nullptr; }
  ElementType const& get_element_type() const { return type_; }
  std::vector<std::size_t> const& get_shape() const { return shape_; }
  std::vector<std::size_t> get_strides() const {
    if (type_.name == "u4") throw std::runtime_error("strides of u4");
    return strides_;
  }
  void const* data() const {
    if (remote) throw std::runtime_error("a remote tensor");
    return null ? nullptr : reinterpret_cast<char const*>(data_->data()) + offset;
  }
};

static_assert(rflow::openvino_tensor<Tensor> && !rflow::openvino_tensor<std::vector<float>>);

template <class T>
concept viewable_rvalue = requires(T t) {
  rflow::from_openvino<float>(std::move(t));
};
static_assert(!viewable_rvalue<Tensor>);

template <class Break>
void refused(Break&& breaks, std::string const& message, std::vector<std::size_t> shape = {3, 4}) {
  Tensor t(std::move(shape));
  breaks(t);
  std::string const text =
      files::error_of<std::invalid_argument>([&] { rflow::from_openvino<float>(t); });
  CAPTURE(text);
  CHECK(files::contains(text, "rflow::from_openvino: " + message));
}

}  // namespace

TEST_CASE("a tensor becomes a view of its memory") {
  Tensor const t({1, 3, 4});
  auto const x = rflow::from_openvino<float>(t);
  CHECK(x.data == t.data_->data());
  CHECK(x.rows == 3);
  CHECK(x(2, 1) == 9.0f);
}

TEST_CASE("a region of interest keeps its strides, which are bytes") {
  Tensor t({5, 8});
  t.shape_ = {2, 3};
  t.offset = 9 * sizeof(float);
  auto const x = rflow::from_openvino<float>(t);
  CHECK(x.row_stride == 8);
  CHECK(x(1, 2) == 9.0f + 8 + 2);
}

TEST_CASE("a stack from one tensor or from a list") {
  Tensor const all({3, 4, 6});
  CHECK(rflow::stack_from_openvino<float>(all)[2](3, 5) == 71.0f);
  std::vector<Tensor> const list{Tensor({1, 4, 6}), Tensor({1, 4, 6})};
  auto const stack = rflow::stack_from_openvino<float>(list, {"embed", "block.1"});
  CHECK(stack[1].data == list[1].data_->data());
  CHECK(rflow::flow(stack).variance.st1.value == 0.0);
}

TEST_CASE("types by their names") {
  Tensor t({2, 4});
  auto const is = [&t](std::string const& name, std::size_t size, auto const& same) {
    t.type_.name = name;
    t.strides_ = {4 * size, size};
    t.shape_ = {1, 2};
    return rflow::visit(t, same);
  };
  CHECK(is("f16", 2, [](auto const& x) {
    return std::is_same_v<rflow::scalar_of<decltype(x)>, rflow::f16>;
  }));
  CHECK(is("bf16", 2, [](auto const& x) {
    return std::is_same_v<rflow::scalar_of<decltype(x)>, rflow::bf16>;
  }));
  CHECK(is("f64", 8, [](auto const& x) { return sizeof(*x.data) == 8; }));
  CHECK_THROWS_AS(is("f8e4m3", 1, [](auto const&) { return true; }), std::invalid_argument);
}

TEST_CASE("what cannot be viewed is refused by name and value") {
  CHECK(files::error_of<std::invalid_argument>([] {
          Tensor const empty;
          rflow::from_openvino<float>(empty);
        }) == "rflow::from_openvino: the tensor is empty");
  refused([](Tensor& t) { t.remote = true; },
          "the tensor has no data for the host: a remote tensor");
  refused([](Tensor& t) { t.type_.name = "bf16"; }, "element type is bf16, f32 expected");
  refused([](Tensor& t) { t.type_.name = "u4"; }, "element type is u4, f32 expected");
  refused([](Tensor&) {}, "an array of 1 axes", {4});
  refused([](Tensor&) {}, "shape[0] is 0", {0, 4});
  refused([](Tensor&) {}, "shape[0] is 2, 1 expected", {2, 3, 4});
  refused([](Tensor&) {}, "shape[0] is 18446744073709551615", {~std::size_t{0}, 4});
  refused([](Tensor& t) { t.strides_[0] = 0; }, "strides[0] is 0");
  refused([](Tensor& t) { t.strides_[0] = 18; },
          "strides[0] is 18 bytes, no multiple of the element's 4");
  refused([](Tensor& t) { t.strides_[0] = std::size_t{1} << 62; },
          "strides[0] is 4611686018427387904, too far for 3 elements");
  refused([](Tensor& t) { t.null = true; }, "data is NULL");
  refused([](Tensor& t) { t.offset = 1; }, "data is not aligned to the element's 4 bytes");
}
