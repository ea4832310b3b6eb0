// SPDX-License-Identifier: Apache-2.0
#include <rflow/threads.hpp>

#include <algorithm>
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

namespace {

/// A runtime that has one thread and starts the last worker first.
void launch_backwards(int workers, void (*part)(void* job, int worker), void* job) {
  while (workers-- > 0) part(job, workers);
}

}  // namespace

TEST_CASE("a team of borrowed threads: the same tasks, the same exceptions") {
  team t(rflow::detail::crew{3, &launch_backwards});
  CHECK(t.size() == 3);
  std::vector<std::ptrdiff_t> order;
  t.run(10, [&](std::ptrdiff_t i) { order.push_back(i); });
  CHECK(order == std::vector<std::ptrdiff_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  CHECK_THROWS_WITH_AS(t.run(10,
                             [](std::ptrdiff_t i) {
                               if (i >= 4) throw std::runtime_error(std::to_string(i));
                             }),
                       "4", std::runtime_error);
}

TEST_CASE("a crew has the threads that were asked for, else those that the work pays for") {
  using rflow::detail::crew;
  int const most = rflow::detail::threads_or_all(0);
  CHECK(crew{3}.sized_for(1, 1000).threads == 3);
  CHECK(crew{0}.sized_for(0, 1000).threads == 1);
  CHECK(crew{0}.sized_for(1999, 1000).threads == 1);
  CHECK(crew{0}.sized_for(2000, 1000).threads == std::min(2, most));
  CHECK(crew{0}.sized_for(1e300, 1000).threads == most);
  bool const same = crew{0, &launch_backwards}.sized_for(1, 1000).launch == &launch_backwards;
  CHECK(same);
}
