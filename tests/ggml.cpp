// SPDX-License-Identifier: Apache-2.0
// from_ggml on a stand-in with the members of ggml_tensor. examples/runtimes/llamacpp compiles and
// runs the same header against llama.cpp.
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <numeric>
#include <rflow/ggml.hpp>
#include <rflow/monitor.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include <rflow/flow.hpp>

#include "files.hpp"

namespace stand_in {

// The names and numbers of ggml.
enum ggml_type { F32 = 0, F16 = 1, Q4_1 = 3, I32 = 26, F64 = 28, BF16 = 30 };
inline char const* ggml_type_name(ggml_type type) {
  return type == F32 ? "f32" : type == Q4_1 ? "q4_1" : type == I32 ? "i32" : "16 or 64 bits";
}
struct ggml_backend_buffer {
  bool host;
};
inline bool ggml_backend_buffer_is_host(ggml_backend_buffer* buffer) { return buffer->host; }

struct ggml_tensor {
  ggml_type type = F32;
  ggml_backend_buffer* buffer = nullptr;
  std::int64_t ne[4] = {1, 1, 1, 1};
  std::size_t nb[4] = {4, 4, 4, 4};
  void* data = nullptr;
  char name[64] = "";
};

}  // namespace stand_in

namespace {

using stand_in::ggml_tensor;
static_assert(rflow::ggml_tensor_like<ggml_tensor> && !rflow::ggml_tensor_like<int>);

struct array {
  std::vector<float> values;
  stand_in::ggml_backend_buffer buffer{true};
  ggml_tensor t;

  explicit array(std::vector<std::int64_t> ne) {
    std::size_t count = 1;
    for (std::size_t i = 0; i < 4; ++i) {
      t.nb[i] = 4 * count;
      if (i < ne.size()) t.ne[i] = ne[i];
      count *= static_cast<std::size_t>(t.ne[i]);
    }
    values.resize(count < 4096 ? count : 1);
    std::iota(values.begin(), values.end(), 0.0f);
    t.data = values.data();
    t.buffer = &buffer;
  }
  array(array const&) = delete;
};

template <class Break>
void refused(Break&& breaks, std::string const& message, std::vector<std::int64_t> ne = {4, 3}) {
  array a(std::move(ne));
  breaks(a.t);
  std::string const text =
      files::error_of<std::invalid_argument>([&] { rflow::from_ggml<float>(&a.t); });
  CAPTURE(text);
  CHECK(files::contains(text, "rflow::from_ggml: " + message));
}

}  // namespace

TEST_CASE("ne counts from the fastest axis: hidden, then tokens") {
  array a({4, 3});
  auto const x = rflow::from_ggml<float>(&a.t);
  CHECK(x.data == a.values.data());
  CHECK(x.rows == 3);
  CHECK(x.cols == 4);
  CHECK(x(2, 1) == 9.0f);
  a.t.buffer = nullptr;  // in the memory of a ggml_context
  CHECK(rflow::from_ggml<float>(&a.t).data == a.values.data());
}

TEST_CASE("views and transposed tensors keep their strides, which are bytes") {
  array a({6, 5});
  a.t.ne[0] = 4;  // a view of the first four features
  auto const view = rflow::from_ggml<float>(&a.t);
  CHECK(view.row_stride == 6);
  CHECK(view(4, 3) == 27.0f);
  std::swap(a.t.ne[0], a.t.ne[1]);
  std::swap(a.t.nb[0], a.t.nb[1]);
  CHECK(rflow::from_ggml<float>(&a.t)(3, 4) == 27.0f);
}

TEST_CASE("layers in the third or fourth axis make a stack") {
  array a({6, 4, 3}), b({6, 4, 1, 3});
  CHECK(rflow::stack_from_ggml<float>(&a.t)[2](3, 5) == 71.0f);
  CHECK(rflow::stack_from_ggml<float>(&b.t)[2](3, 5) == 71.0f);
  CHECK(rflow::stack_from_ggml<float>(&a.t).sites() == 3);
  array both({6, 4, 2, 3});
  CHECK_THROWS_AS(rflow::stack_from_ggml<float>(&both.t), std::invalid_argument);
}

TEST_CASE("16-bit types") {
  std::vector<std::uint16_t> bits{0x3c00, 0x4000, 0x4200, 0x4400};
  ggml_tensor t;
  t.data = bits.data();
  t.ne[0] = t.ne[1] = 2;
  t.nb[0] = 2, t.nb[1] = 4, t.nb[2] = t.nb[3] = 8;
  t.type = stand_in::F16;
  CHECK(float{rflow::from_ggml<rflow::f16>(&t)(1, 1)} == 4.0f);
  t.type = stand_in::BF16;
  CHECK(rflow::visit(&t, [](auto const& x) { return static_cast<double>(x(0, 1)); }) == 2.0);
}

TEST_CASE("what cannot be viewed is refused by name and value") {
  CHECK(files::error_of<std::invalid_argument>([] {
          rflow::from_ggml<float>(static_cast<ggml_tensor*>(nullptr));
        }) == "rflow::from_ggml: the tensor is NULL");
  refused([](ggml_tensor& t) { t.type = stand_in::Q4_1; }, "type is q4_1, f32 expected");
  refused([](ggml_tensor& t) { t.type = stand_in::I32; }, "type is i32, f32 expected");
  refused([](ggml_tensor& t) { t.data = nullptr; }, "data is NULL for 1 x 1 x 3 x 4 elements");
  refused([](ggml_tensor&) {}, "ne[2] is 2, 1 expected ahead of tokens x hidden", {4, 3, 2});
  refused([](ggml_tensor&) {}, "ne[3] is 2, 1 expected ahead of tokens x hidden", {4, 3, 1, 2});
  refused([](ggml_tensor& t) { t.ne[1] = 0; }, "ne[1] is 0");
  refused([](ggml_tensor& t) { t.ne[0] = -4; }, "ne[0] is -4");
  refused([](ggml_tensor& t) { t.nb[1] = 0; }, "nb[1] is 0");
  refused([](ggml_tensor& t) { t.nb[1] = 18; }, "nb[1] is 18 bytes, no multiple");
  refused([](ggml_tensor& t) { t.nb[1] = ~std::size_t{0}; }, "nb[1] is 18446744073709551615");
  refused([](ggml_tensor& t) { t.ne[1] = t.ne[0] = std::int64_t{1} << 31; },

          "1 x 1 x 2147483648 x 2147483648 elements are more than memory can hold");
  array a({4, 3});
  a.buffer.host = false;
  CHECK(files::contains(
      files::error_of<std::invalid_argument>([&] { rflow::from_ggml<float>(&a.t); }),
      "the data live on a device (copy them with ggml_backend_tensor_get)"));
}

TEST_CASE("sites by llama.cpp's names") {
  CHECK(rflow::llama_site("embd") == 0);
  CHECK(rflow::llama_site("inp_embd") == 0);
  CHECK(rflow::llama_site("l_out-0") == 1);
  CHECK(rflow::llama_site("l_out-29") == 30);
  for (char const* other :
       {"", "l_out", "l_out-", "l_out-1x", "l_out--1", "xl_out-1", "l_out-1 ", "embd_norm",
        "attn_norm-3", "result_norm", "l_out-99999999999999999999"})
    CHECK(rflow::llama_site(other) == -1);
  static_assert(noexcept(rflow::llama_site("")));
}

TEST_CASE("a monitor in a callback sees what a stack of the same tensors gives") {
  constexpr std::ptrdiff_t sites = 3, tokens = 10, hidden = 8, ubatch = 4;
  std::vector<float> all(sites * tokens * hidden);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<float>((i * 7919) % 101) - 50;
  rflow::flow_monitor<float> monitor(sites, hidden);
  for (std::ptrdiff_t first = 0; first < tokens; first += ubatch)
    for (std::ptrdiff_t l = 0; l < sites; ++l) {
      ggml_tensor t;
      std::string const name = l == 0 ? "embd" : "l_out-" + std::to_string(l - 1);
      name.copy(t.name, sizeof t.name - 1);
      t.ne[0] = hidden;
      t.ne[1] = std::min(ubatch, tokens - first);
      t.nb[1] = sizeof(float) * hidden;
      t.data = all.data() + (l * tokens + first) * hidden;
      REQUIRE(monitor.push(rflow::llama_site(t.name), first, rflow::from_ggml<float>(&t)));
    }
  REQUIRE(monitor.end_sequence());
  auto const want =
      rflow::flow(rflow::layer_stack<float>(all.data(), rflow::stack_shape{sites, tokens, hidden}));
  auto const got = monitor.report().pooled;
  CHECK(got.variance.st1.value == doctest::Approx(want.variance.st1.value).epsilon(1e-12));
  CHECK(got.adjacent[1].mean == doctest::Approx(want.adjacent[1].mean).epsilon(1e-12));
}
