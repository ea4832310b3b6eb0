// SPDX-License-Identifier: Apache-2.0
// DLPack: every check against a struct that breaks it, ownership counted on every path, four
// families of structs (DLPack 1.x both kinds, nanobind's, Debian's header where it is installed).
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <rflow/dlpack.hpp>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <rflow/cka.hpp>
#include <rflow/flow.hpp>
#include <rflow/runtime.hpp>

#include "files.hpp"

#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#define HAS_DEBIANS_DLPACK 1
#endif

#if defined(__SANITIZE_ADDRESS__)
#define UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define UNDER_ASAN 1
#endif
#endif

namespace {

// ---- stand-ins: the members and their types as the originals have them --------------------------

namespace one {  // DLPack 1.x
enum device_kind : std::int32_t { cpu = 1, cuda = 2, cuda_host = 3, metal = 8, rocm_host = 11 };
struct device {
  device_kind device_type;
  std::int32_t device_id;
};
struct data_type {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct tensor {
  void* data;
  one::device device;
  std::int32_t ndim;
  data_type dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct legacy {
  tensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(legacy* self);
};
struct pack_version {
  std::uint32_t major, minor;
};
struct versioned {
  pack_version version;
  void* manager_ctx;
  void (*deleter)(versioned* self);
  std::uint64_t flags;
  tensor dl_tensor;
};
}  // namespace one

namespace nano {  // nanobind's own structs
struct device {
  std::int32_t device_type = 0, device_id = 0;
};
struct data_type {
  std::uint8_t code = 0, bits = 0;
  std::uint16_t lanes = 0;
};
struct tensor {
  void* data = nullptr;
  nano::device device;
  std::int32_t ndim = 0;
  data_type dtype;
  std::int64_t *shape = nullptr, *strides = nullptr;
  std::uint64_t byte_offset = 0;
};
struct legacy {
  tensor dltensor;
  void* manager_ctx;
  void (*deleter)(legacy*);
};
struct versioned {
  one::pack_version version;
  void* manager_ctx;
  void (*deleter)(versioned*);
  std::uint64_t flags = 0;
  tensor dltensor;
};
}  // namespace nano

static_assert(rflow::dlpack_tensor<one::tensor> && rflow::dlpack_tensor<nano::tensor>);
static_assert(rflow::dlpack_managed<one::legacy> && rflow::dlpack_managed<one::versioned>);
static_assert(rflow::dlpack_managed<nano::legacy> && rflow::dlpack_managed<nano::versioned>);
static_assert(!rflow::dlpack_tensor<one::legacy> && !rflow::dlpack_managed<one::tensor>);
static_assert(!rflow::dlpack_source<std::vector<float>> && !rflow::dlpack_source<int>);

using shape = std::vector<std::int64_t>;

/// Values and a DLTensor that looks at them.
template <class Tensor = one::tensor, class T = float>
struct array {
  std::vector<T> values;
  shape extents, steps;
  Tensor t{};

  array(shape extent, shape step = {}) : extents(std::move(extent)), steps(std::move(step)) {
    std::size_t count = 1;
    for (auto const n : extents) count *= static_cast<std::size_t>(std::max<std::int64_t>(n, 1));
    values.resize(std::min<std::size_t>(count, 4096));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = T(static_cast<float>(i));
    t.data = values.data();
    t.device.device_type = static_cast<decltype(t.device.device_type)>(1);
    t.ndim = static_cast<std::int32_t>(extents.size());
    t.dtype = {2, 8 * sizeof(T), 1};
    t.shape = extents.data();
    t.strides = steps.empty() ? nullptr : steps.data();
  }
  array(array const&) = delete;
};

using files::contains;

template <class Function>
std::string error_of(Function&& f) {
  return files::error_of<std::invalid_argument>(f);
}

/// The bad tensor is refused by every door, by the member's name and its value.
template <class Break>
void refused(Break&& breaks, std::string const& message, shape extent = {3, 4}, shape step = {}) {
  array<> a(std::move(extent), std::move(step));
  breaks(a.t);
  CAPTURE(message);
  for (std::string const& text : {error_of([&] { rflow::from_dlpack<float>(a.t); }),
                                  error_of([&] { rflow::stack_from_dlpack<float>(a.t); })}) {
    CAPTURE(text);
    CHECK(contains(text, message));
    CHECK(contains(text, "from_dlpack: "));
  }
}

}  // namespace

TEST_CASE("a dense tensor becomes a view of the same memory") {
  array<> a({3, 4});
  auto const x = rflow::from_dlpack<float>(a.t);
  CHECK(x.data == a.values.data());
  CHECK(x.rows == 3);
  CHECK(x.cols == 4);
  CHECK(x.row_stride == 4);
  CHECK(x.col_stride == 1);
  CHECK(x(2, 1) == 9.0f);
}

TEST_CASE("byte_offset moves the first element") {
  array<> a({2, 4});
  a.t.byte_offset = 4 * sizeof(float);
  a.extents[0] = 1;
  CHECK(rflow::from_dlpack<float>(a.t).data == a.values.data() + 4);
}

TEST_CASE("random shapes and strides: each element where DLPack says it is") {
  std::mt19937 random(std::random_device{}());
  auto const seed = random();
  CAPTURE(seed);
  random.seed(seed);
  auto const below = [&random](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<unsigned>(n));
  };
  for (int trial = 0; trial < 200; ++trial) {
    std::int64_t const sites = 1 + below(4), n = 1 + below(6), d = 1 + below(6), gap = 1 + below(2);
    // Six orders of axes, with gaps between neighbours along the fastest.
    std::array<int, 3> order{0, 1, 2};
    std::shuffle(order.begin(), order.end(), random);
    shape const extent{sites, n, d};
    shape step(3);
    std::int64_t span = gap;
    for (int const axis : order) {
      step[static_cast<std::size_t>(axis)] = span;
      span *= extent[static_cast<std::size_t>(axis)];
    }
    array<> a({sites, n, d * gap}, {});
    a.extents = extent;
    a.steps = step;
    a.t.shape = a.extents.data();
    a.t.strides = a.steps.data();
    for (std::size_t i = 0; i < 3; ++i)  // producers may leave anything for an axis of length 1
      if (extent[i] == 1) a.steps[i] = std::array<std::int64_t, 4>{0, 1, -7, 1 << 30}[random() % 4];

    auto const stack = rflow::stack_from_dlpack<float>(a.t);
    REQUIRE(stack.sites() == sites);
    for (std::int64_t l = 0; l < sites; ++l)
      for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < d; ++j) {
          auto const at = static_cast<std::size_t>(l * step[0] + i * step[1] + j * step[2]);
          REQUIRE(&stack[l](i, j) == &a.values[at]);
        }
    if (sites == 1) REQUIRE(&rflow::from_dlpack<float>(a.t)(n - 1, 0) == &stack[0](n - 1, 0));
  }
}

TEST_CASE("f16, bf16 and double by their names only") {
  array<one::tensor, double> wide({2, 2});
  CHECK(rflow::from_dlpack<double>(wide.t)(1, 1) == 3.0);
  CHECK(
      contains(error_of([&] { rflow::from_dlpack<float>(wide.t); }), "dtype is f64, f32 expected"));
  std::vector<std::uint16_t> bits{0x3c00, 0x4000, 0x4200, 0x4400};
  array<> half({2, 2});
  half.t.data = bits.data();
  half.t.dtype = {2, 16, 1};
  CHECK(float{rflow::from_dlpack<rflow::f16>(half.t)(1, 1)} == 4.0f);
  half.t.dtype = {4, 16, 1};
  CHECK(float{rflow::from_dlpack<rflow::bf16>(half.t)(0, 1)} == 2.0f);
  CHECK(contains(error_of([&] { rflow::from_dlpack<rflow::f16>(half.t); }),
                 "dtype is bf16, f16 expected"));
}

TEST_CASE("a batch of one is squeezed, a larger one refused") {
  array<> a({1, 1, 3, 4});
  CHECK(rflow::from_dlpack<float>(a.t).rows == 3);
  array<> batch({2, 3, 4});
  CHECK(error_of([&] { rflow::from_dlpack<float>(batch.t); }) ==
        "rflow::from_dlpack: shape[0] is 2, 1 expected ahead of tokens x hidden (take one of a "
        "batch at a time)");
  CHECK(rflow::stack_from_dlpack<float>(batch.t)[1](2, 3) == 23.0f);
  array<> layers({5, 1, 3, 4});
  CHECK(rflow::stack_from_dlpack<float>(layers.t)[4](2, 3) == 59.0f);
  array<> both({5, 2, 3, 4});
  CHECK(contains(error_of([&] { rflow::stack_from_dlpack<float>(both.t); }), "shape[1] is 2"));
  array<> flat({3, 4});
  CHECK(contains(error_of([&] { rflow::stack_from_dlpack<float>(flat.t); }), "2 axes"));
}

TEST_CASE("every check names the member and its value") {
  using t = one::tensor;
  refused([](t& x) { x.dtype.lanes = 4; }, "dtype is float32 x 4 lanes, f32 expected");
  refused([](t& x) { x.dtype.lanes = 0; }, "dtype is float32 x 0 lanes");
  refused([](t& x) { x.dtype = {0, 32, 1}; }, "dtype is int32");
  refused([](t& x) { x.dtype = {5, 64, 1}; }, "dtype is complex64");
  refused([](t& x) { x.dtype = {2, 8, 1}; }, "dtype is float8");
  refused([](t& x) { x.dtype = {17, 4, 1}; }, "dtype is code 17 of 4");
  refused([](t& x) { x.device = {one::cuda, 1}; }, "the data live on CUDA 1");
  refused([](t& x) { x.device = {one::metal, 0}; }, "the data live on Metal 0");
  refused([](t& x) { x.device.device_type = static_cast<one::device_kind>(99); },
          "the data live on device type 99 0");
  refused([](t& x) { x.device.device_type = static_cast<one::device_kind>(-1); }, "device type -1");
  for (std::int32_t const rank : {-1, 0, 1, 5, (std::numeric_limits<std::int32_t>::max)()})
    refused([rank](t& x) { x.ndim = rank; }, "an array of " + std::to_string(rank) + " axes");
  refused([](t& x) { x.shape = nullptr; }, "shape is NULL");
  refused([](t&) {}, "shape[0] is 0", {0, 4});
  refused([](t&) {}, "shape[1] is -4", {3, -4});
  refused([](t&) {}, "strides[0] is 0, a positive one expected for 3 elements", {3, 4}, {0, 1});
  refused([](t&) {}, "strides[1] is -1", {3, 4}, {4, -1});
  refused([](t& x) { x.data = nullptr; }, "data is NULL for 3 x 4 elements");
  refused([](t& x) { x.byte_offset = 2; }, "not aligned to the element's 4 bytes");
  refused([](t& x) { x.byte_offset = ~std::uint64_t{0}; }, "byte_offset is 18446744073709551615");
  std::int64_t const big = (std::numeric_limits<std::int64_t>::max)();
  refused([](t&) {}, "more than memory can hold", {big, 4});
  refused([](t&) {}, "more than memory can hold",
          {1, std::int64_t{1} << 31, std::int64_t{1} << 31});
  refused([](t&) {}, "more than memory can hold", {1, 1, big / 2});
  refused([](t&) {}, "too far for 3 elements", {3, 4}, {big / 4, 1});
  refused([](t&) {}, "too far for 3 elements", {3, 2}, {big / 10, big / 8});
}

TEST_CASE("which device can be read from where") {
  array<> a({3, 4});
  struct {
    int type;
    bool host, device;
  } const devices[] = {{1, true, false},   {2, false, true},  {3, true, true},  {4, false, false},
                       {10, false, false}, {11, true, false}, {13, true, true}, {14, false, false}};
  for (auto const& d : devices) {
    CAPTURE(d.type);
    a.t.device.device_type = static_cast<one::device_kind>(d.type);
    bool const host = error_of([&] { rflow::from_dlpack<float>(a.t); }) == "nothing thrown";
    bool const device =
        error_of([&] {
          static_assert(
              std::is_same_v<decltype(rflow::from_dlpack<float, rflow::device_memory>(a.t)),
                             rflow::view<float, rflow::device_memory>>);
          rflow::from_dlpack<float, rflow::device_memory>(a.t);
        }) == "nothing thrown";
    CHECK(host == d.host);
    CHECK(device == d.device);
  }
}

TEST_CASE("visit calls with the type that is there") {
  array<one::tensor, double> wide({2, 3});
  auto const name = [](auto const& x) {
    using T = rflow::scalar_of<decltype(x)>;
    REQUIRE(x.rows == 2);
    return std::is_same_v<T, double>        ? 'd'
           : std::is_same_v<T, float>       ? 'f'
           : std::is_same_v<T, rflow::f16>  ? 'h'
           : std::is_same_v<T, rflow::bf16> ? 'b'
                                            : '?';
  };
  CHECK(rflow::visit(wide.t, name) == 'd');
  wide.t.dtype = {2, 32, 1};
  CHECK(rflow::visit(wide.t, name) == 'f');
  wide.t.dtype = {2, 16, 1};
  CHECK(rflow::visit(wide.t, name) == 'h');
  wide.t.dtype = {4, 16, 1};
  CHECK(rflow::visit(wide.t, name) == 'b');
  wide.t.dtype = {1, 8, 1};
  CHECK(error_of([&] { rflow::visit(wide.t, name); }) ==
        "rflow::visit: dtype is uint8; f16, bf16, f32 or f64 expected");
}

// ---- ownership ----------------------------------------------------------------------------------

namespace {

int deleted = 0;

/// What a producer hands over: on the heap, with a deleter that frees it and counts.
template <class M>
M* produce(std::vector<float>& values, shape& extent) {
  auto* m = new M{};
  auto& t = rflow::detail::dlpack_inner(*m);
  t.data = values.data();
  t.device.device_type = static_cast<std::remove_cvref_t<decltype(t.device.device_type)>>(1);
  t.ndim = static_cast<int>(extent.size());
  t.dtype.code = 2;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = extent.data();
  m->deleter = [](M* self) {
    ++deleted;
    delete self;
  };
  if constexpr (requires { m->version; }) m->version = {1, 1};
  return m;
}

template <class M>
void ownership() {
  std::vector<float> values(12);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  shape extent{3, 4};

  deleted = 0;
  {
    auto owner = rflow::take_dlpack(produce<M>(values, extent));
    auto const x = rflow::from_dlpack<float>(owner);
    CHECK(x.data == values.data());
    CHECK(x(2, 3) == 11.0f);
    CHECK(rflow::visit(owner, [](auto const& v) { return v.rows; }) == 3);
    auto moved = std::move(owner);
    CHECK(rflow::from_dlpack<float>(moved).data == values.data());
    CHECK(deleted == 0);
  }
  CHECK(deleted == 1);

  {  // assigning over an owner runs the deleter of what it held
    auto owner = rflow::take_dlpack(produce<M>(values, extent));
    owner = rflow::take_dlpack(produce<M>(values, extent));
    CHECK(deleted == 2);
  }
  CHECK(deleted == 3);

  // a check that throws
  auto const misuse = [&] {
    auto const owner = rflow::take_dlpack(produce<M>(values, extent));
    rflow::from_dlpack<double>(owner);
  };
  CHECK(contains(error_of(misuse), "dtype is f32, f64 expected"));
  CHECK(deleted == 4);

  // looking takes nothing over
  M* const lent = produce<M>(values, extent);
  CHECK(rflow::from_dlpack<float>(*lent).data == values.data());
  CHECK(deleted == 4);
  lent->deleter(lent);

  // a producer may give no deleter
  M* const forever = produce<M>(values, extent);
  forever->deleter = nullptr;
  { auto const owner = rflow::take_dlpack(forever); }
  delete forever;
  CHECK(deleted == 5);

  CHECK(error_of([] { rflow::take_dlpack(static_cast<M*>(nullptr)); }) ==
        "rflow::take_dlpack: the managed tensor is NULL");

  if constexpr (requires(M m) { m.version; }) {
    M* const newer = produce<M>(values, extent);
    newer->version = {2, 0};
    CHECK(contains(error_of([&] { rflow::from_dlpack<float>(*newer); }), "version is 2.0"));
    CHECK(deleted == 5);
    CHECK(error_of([&] { rflow::take_dlpack(newer); }) ==
          "rflow::take_dlpack: version is 2.0, 1.x expected");
    CHECK(deleted == 6);
    M* const minor = produce<M>(values, extent);
    minor->version = {1, 99};
    minor->flags = 7;  // read-only, copied, padded: nothing to us
    CHECK(rflow::from_dlpack<float>(rflow::take_dlpack(minor).managed()).rows == 3);
    CHECK(deleted == 7);
  }
}

}  // namespace

TEST_CASE("the deleter runs exactly once: DLManagedTensor") { ownership<one::legacy>(); }
TEST_CASE("the deleter runs exactly once: DLManagedTensorVersioned") {
  ownership<one::versioned>();
}
TEST_CASE("the deleter runs exactly once: nanobind's structs") {
  ownership<nano::legacy>();
  ownership<nano::versioned>();
}
#ifdef HAS_DEBIANS_DLPACK
TEST_CASE("the deleter runs exactly once: Debian's dlpack.h") {
  static_assert(rflow::dlpack_tensor<DLTensor> && rflow::dlpack_managed<DLManagedTensor>);
  ownership<DLManagedTensor>();
  static_assert(kDLCPU == 1 && kDLCUDA == 2 && kDLCUDAHost == 3 && kDLROCMHost == 11 &&
                kDLCUDAManaged == 13 && kDLFloat == 2 && kDLBfloat == 4);
}
#endif

#ifdef UNDER_ASAN
TEST_CASE("a view read after the deleter ran is found by the address sanitizer") {
  // The rule is that a view lives no longer than its owner. This is what breaking it looks like.
  ::pid_t const child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::close(2);
    rflow::view<double> x;
    {
      auto const owner =
          rflow::take_dlpack(rflow::to_dlpack<one::legacy>(std::vector<double>(12, 1.0), {3, 4}));
      x = rflow::from_dlpack<double>(owner);
    }
    ::_exit(x(1, 1) == 1.0 ? 0 : 2);
  }
  int outcome = 0;
  REQUIRE(::waitpid(child, &outcome, 0) == child);
  CHECK(!(WIFEXITED(outcome) && (WEXITSTATUS(outcome) == 0 || WEXITSTATUS(outcome) == 2)));
}
#endif

// ---- results for others -------------------------------------------------------------------------

namespace {

template <class M>
void handed_over() {
  std::vector<double> values{1, 2, 3, 4, 5, 6};
  double const* const where = values.data();
  M* const m = rflow::to_dlpack<M>(std::move(values), {2, 3});
  auto const& t = rflow::detail::dlpack_inner(*m);
  CHECK(t.data == where);  // moved, not copied
  CHECK(static_cast<int>(t.device.device_type) == 1);
  CHECK(t.byte_offset == 0);
  CHECK(t.strides[0] == 3);
  CHECK(t.strides[1] == 1);
  CHECK(t.dtype.bits == 64);
  if constexpr (requires { m->version; }) CHECK(m->version.major == 1);
  auto const owner = rflow::take_dlpack(m);  // the consumer's part; leaks are the sanitizer's
  CHECK(rflow::from_dlpack<double>(owner)(1, 2) == 6.0);

  using rflow::status;
  auto const list = rflow::take_dlpack(
      rflow::to_dlpack<M>(std::vector<rflow::measured>{0.25, status::too_few_rows}));
  auto const& l = rflow::detail::dlpack_inner(list.managed());
  CHECK(l.ndim == 1);
  CHECK(l.shape[0] == 2);
  CHECK(static_cast<double*>(l.data)[0] == 0.25);
  CHECK(std::isnan(static_cast<double*>(l.data)[1]));
}

}  // namespace

TEST_CASE("results leave as managed tensors") {
  handed_over<one::legacy>();
  handed_over<one::versioned>();
  handed_over<nano::legacy>();
  handed_over<nano::versioned>();
#ifdef HAS_DEBIANS_DLPACK
  handed_over<DLManagedTensor>();
#endif
}

TEST_CASE("results in half precision say so") {
  auto const owner = rflow::take_dlpack(
      rflow::to_dlpack<one::legacy>(std::vector<rflow::bf16>{rflow::bf16::nearest(2.0f)}, {1, 1}));
  CHECK(float{rflow::from_dlpack<rflow::bf16>(owner)(0, 0)} == 2.0f);
}

TEST_CASE("values that do not make the shape are refused") {
  auto const make = [](std::size_t count, shape extent) {
    return error_of([&] {
      rflow::take_dlpack(
          rflow::to_dlpack<one::legacy>(std::vector<float>(count), std::move(extent)));
    });
  };
  CHECK(make(6, {2, 2}) == "rflow::to_dlpack: 6 values do not make 2 x 2");
  CHECK(contains(make(6, {-2, -3}), "-2 x -3"));
  CHECK(contains(make(0, {-1, 0}), "-1 x 0"));
  CHECK(contains(make(4, {std::int64_t{1} << 62, std::int64_t{1} << 62, 4}), "4 values"));
  CHECK(make(0, {5, 0}) == "nothing thrown");
  CHECK(make(1, {}) == "nothing thrown");
}

TEST_CASE("metrics on DLPack tensors are the metrics on their values") {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  array<> a({4, 30, 8});
  for (float& v : a.values) v = normal(random);
  auto const stack = rflow::stack_from_dlpack<float>(a.t);
  rflow::layer_stack<float> const plain(a.values.data(), rflow::stack_shape{4, 30, 8});
  auto const got = rflow::cka_matrix(stack), want = rflow::cka_matrix(plain);
  auto const owner = rflow::take_dlpack(rflow::to_dlpack<one::versioned>(got));
  auto const table = rflow::from_dlpack<double>(owner);
  for (std::ptrdiff_t i = 0; i < 4; ++i)
    for (std::ptrdiff_t j = 0; j < 4; ++j) CHECK(table(i, j) == double{want(i, j)});
  CHECK(rflow::flow(stack).variance.st1.value == rflow::flow(plain).variance.st1.value);
}
