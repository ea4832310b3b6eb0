// SPDX-License-Identifier: Apache-2.0
#include <rflow/threads.hpp>

#include <atomic>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <doctest/doctest.h>

using rflow::detail::team;

TEST_CASE("every task runs once, whatever the number of threads and tasks") {
  for (int const threads : {1, 2, 5}) {
    team t(threads);
    CHECK(t.size() == threads);
    for (std::ptrdiff_t const count : {0, 1, 2, 7, 1000}) {
      CAPTURE(threads);
      CAPTURE(count);
      std::vector<int> runs(static_cast<std::size_t>(count));
      std::atomic<int> strangers{0};
      t.run(count, [&](std::ptrdiff_t i, int thread) {
        ++runs[static_cast<std::size_t>(i)];
        if (thread < 0 || thread >= threads) ++strangers;
      });
      CHECK(std::accumulate(runs.begin(), runs.end(), 0) == count);
      for (int const r : runs) CHECK(r == 1);
      CHECK(strangers == 0);
    }
  }
}

TEST_CASE("the exception of the lowest task reaches the caller, and the team works on") {
  for (int const threads : {1, 3}) {
    team t(threads);
    for (int round = 0; round < 20; ++round) {
      CHECK_THROWS_WITH_AS(t.run(100,
                                 [](std::ptrdiff_t i) {
                                   if (i >= 5) throw std::runtime_error(std::to_string(i));
                                 }),
                           "5", std::runtime_error);
      std::atomic<std::ptrdiff_t> sum{0};
      t.run(10, [&](std::ptrdiff_t i) { sum += i; });
      CHECK(sum == 45);
    }
  }
}

TEST_CASE("what tasks wrote is seen after run") {
  team t(4);
  std::vector<double> values(64);
  for (int round = 1; round <= 200; ++round) {
    t.run(64, [&](std::ptrdiff_t i) { values[static_cast<std::size_t>(i)] += 1; });
    CHECK(std::accumulate(values.begin(), values.end(), 0.0) == 64.0 * round);
  }
}
