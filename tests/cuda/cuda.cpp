// SPDX-License-Identifier: Apache-2.0
// The suite of all backends on on_cuda, over host memory and over device memory. Compiled without
// nvcc; on_cpu is in here, on_cuda in device.cu.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "device.hpp"

#define RFLOW_BACKENDS device::staged, device::resident
#define DOCTEST_CONFIG_IMPLEMENT
#include "../backends.hpp"

TEST_CASE("a pointer that lies about its space is caught") {
  CHECK_THROWS_AS(device::lie_about_space(), std::invalid_argument);
  CHECK_THROWS_AS(device::lie_about_device(), std::invalid_argument);
}

TEST_CASE("what lives on the device is measured there, with no backend named") {
  constexpr std::ptrdiff_t n = 40, d = 12;
  backends::sample<float> const s(12, 2, n, d);
  auto const x = s.stack[0], y = s.stack[1];
  double const cosine = rflow::inter_token_cosine(x), cka = rflow::cka(x, y);
  for (auto const measure : {device::of_views, device::of_dlpack, device::of_containers}) {
    device::answers const a = measure(s.values.data(), n, d);
    CHECK(a.cosine == doctest::Approx(cosine).epsilon(1e-5));
    CHECK(a.cka == doctest::Approx(cka).epsilon(1e-5));
  }
}

TEST_CASE("a device that there is not") {
  CHECK_THROWS_WITH_AS(device::wrong_ordinal(), doctest::Contains("cudaSetDevice(1000)"),
                       std::runtime_error);
}

TEST_CASE_TEMPLATE("the flow pass keeps to its memory bound, or says what it takes", On,
                   RFLOW_BACKENDS) {
  backends::sample<float> const s(7, 4, 700, 33);
  On on;
  on.memory_bound = 256 << 10;  // of about 1 MiB that all tokens at once would take
  rflow::on_cpu const cpu;
  backends::check_same(rflow::flow(s.stack, {}, on), rflow::flow(s.stack, {}, cpu), 1e-5);
  on.memory_bound = 1000;
  CHECK_THROWS_WITH_AS(on.flow(s.stack),
                       doctest::Contains("a memory bound of 1000 bytes is below the"),
                       std::invalid_argument);
}

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  std::string why_not;
  if (device::count(why_not) == 0) {
    std::printf("skipped: %u test cases on a GPU, for there is none (%s)\n",
                static_cast<unsigned>(doctest::detail::getRegisteredTests().size()),
                why_not.c_str());
    return 77;
  }
  return context.run();
}
