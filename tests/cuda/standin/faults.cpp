// SPDX-License-Identifier: Apache-2.0
// Every call of CUDA and cuBLAS fails once: each failure is an exception with the library's code and
// text, and nothing that was made stays behind.
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/moments.hpp>

#include "../device.hpp"
#include "standin.hpp"

namespace {

template <class Run>
void fail_each_call(Run const& run) {
  standin::fail_at(0);
  run();
  int const calls = standin::calls();
  CHECK(calls > 20);
  CHECK(standin::alive() == 0);
  for (int k = 1; k <= calls; ++k) {
    CAPTURE(k);
    standin::fail_at(k);
    std::string text;
    try {
      run();
    } catch (std::runtime_error const& e) {
      text = e.what();
    }
    CHECK(text.find("rflow::on_cuda: c") == 0);
    CHECK(text.find("told to fail") != std::string::npos);
    if (text.find("FromPool") != std::string::npos)
      CHECK(text.find("on_cuda::memory_bound") != std::string::npos);
    CHECK(standin::alive() == 0);
  }
  standin::fail_at(0);
}

}  // namespace

TEST_CASE("each call that fails is an exception, and nothing leaks") {
  std::mt19937 bits(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(3 * 9 * 5);
  for (float& v : values) v = normal(bits);
  rflow::layer_stack<float> const stack(values.data(), {3, 9, 5});
  fail_each_call([&] { device::staged{}.flow(stack); });
  fail_each_call([&] { device::staged{}.gram(rflow::linear{}, stack); });
  fail_each_call([&] { device::staged{}.gram(rflow::rbf{}, stack); });
  fail_each_call([&] { device::staged{}.gram(rflow::linear{}, stack, stack); });
  fail_each_call([&] { device::resident{}.flow(stack); });
  fail_each_call([&] { device::resident{}.gram(rflow::linear{}, stack); });
}
