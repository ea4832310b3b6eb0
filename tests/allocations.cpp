// SPDX-License-Identifier: Apache-2.0

// What must not allocate: a program of its own, because it replaces operator new.

#include <rflow/monitor.hpp>

#include <atomic>
#include <cstdlib>
#include <new>
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include "reference.hpp"

#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

namespace {
std::atomic<long> allocations{0};
void* counted(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  if (void* const p = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment))
    return p;
  throw std::bad_alloc();
}
}  // namespace
void* operator new(std::size_t bytes) { return counted(bytes, 16); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

TEST_CASE_TEMPLATE("a monitor allocates nothing after reserve", T, float, double, rflow::bf16) {
  std::mt19937 bits(9);
  std::ptrdiff_t const sites = 4, tokens = 100, width = 130;
  reference::stack x = reference::random_stack(bits, 4, 100, 130);
  x[1][3][5] = x[1][7][2] * 1e30;  // the rare paths too
  x[2][9].assign(130, 0.0);
  x[2][20] = x[1][20];  // a step of 0, and one whose square has no float
  x[3][20] = x[2][20];
  x[3][20][0] += x[3][20][0] * 1e-7;
  for (std::size_t j = 0; j < 130; ++j) x[3][21][j] = 2 * x[2][21][j] - x[1][21][j];  // straight on
  std::vector<T> const values = reference::pack<T>(x);
  auto const rows = [&](std::ptrdiff_t site, std::ptrdiff_t first, std::ptrdiff_t count) {
    return rflow::view<T>(values.data() + (site * tokens + first) * width, count, width);
  };
  rflow::flow_monitor<T> monitor(
      sites, width, {.on_full = rflow::when_full::refuse, .cka = true, .cka_batch = 24},
      rflow::on_cpu{.threads = 2});
  monitor.reserve(64);
  long const before = allocations;
  for (int sequence = 0; sequence < 3; ++sequence) {
    for (std::ptrdiff_t first = 0; first < tokens; first += 50)
      for (std::ptrdiff_t l = 0; l < sites; ++l) monitor.push(l, first, rows(l, first, 50));
    monitor.end_sequence();
  }
  monitor.push(0, 7, rows(0, 0, 1));  // refused
  long const after = allocations;
  CHECK(after == before);
  CHECK(!monitor.error().empty());
  monitor.clear_error();
  CHECK(monitor.report().sequences == 3);
  CHECK(allocations > after);  // they are counted
}
