// SPDX-License-Identifier: Apache-2.0
// The thread that looks at memory does so while there is none left: a program of its own, because it
// replaces operator new.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "../../examples/report/shards.hpp"

#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

namespace {
bool none_left = false;
}  // namespace
void* operator new(std::size_t bytes) {
  if (void* const p = none_left ? nullptr : std::malloc(bytes + 1)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

TEST_CASE("looking at memory takes none") {
  std::size_t const before = report::anonymous_memory();
  CHECK(before > 0);
  std::size_t const bytes = std::size_t{64} << 20;
  std::vector<char> large(bytes);
  std::memset(large.data(), 1, bytes);
  std::size_t found = 0;
  bool thrown = false, refused = false;
  none_left = true;
  try {
    found = report::anonymous_memory();
  } catch (std::bad_alloc const&) {
    thrown = true;
  }
  try {
    ::operator delete(::operator new(1));
  } catch (std::bad_alloc const&) {
    refused = true;
  }
  none_left = false;
  CHECK_FALSE(thrown);
  CHECK(refused);  // there was none
  CHECK(found >= before + bytes / 2);
}
