// SPDX-License-Identifier: Apache-2.0
#include "memory.hpp"

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>

#include "load.hpp"
#include "text.hpp"

namespace report {
namespace {

constexpr double mib = 1048576, unlimited = std::numeric_limits<double>::infinity();

/// A number in a file of the system; infinite if there is none ("max").
double number_in(char const* path, char const* before = nullptr) {
  std::ifstream in(path);
  if (before != nullptr)
    for (std::string word; in >> word && word != before;) continue;
  double x = 0;
  return in >> x ? x : unlimited;
}

/// What the machine has, swap included, or what its container may take.
double machine_memory() {
  double const pages = static_cast<double>(::sysconf(_SC_PHYS_PAGES));
  double const swap = number_in("/proc/meminfo", "SwapTotal:") * 1024;
  double const all =
      pages * static_cast<double>(::sysconf(_SC_PAGESIZE)) + (swap < unlimited ? swap : 0);
  return std::min({all, number_in("/sys/fs/cgroup/memory.max"),
                   number_in("/sys/fs/cgroup/memory/memory.limit_in_bytes")});
}

template <class Resource>
double limit_on(Resource which) {
  ::rlimit limit{};
  if (::getrlimit(which, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return unlimited;
  return static_cast<double>(limit.rlim_cur);
}

}  // namespace

double bytes_of_tables(double sites, options const& asked) {
  // A cell: two estimators with value and chance, and as text; twice, as text grows. In the page it
  // is a path and numbers, up to the number of sites that a page shows.
  double const kernels = (asked.linear ? 1 : 0) + (asked.rbf ? 1 : 0);
  double const cell = 180 + 420 * kernels + (asked.significance ? 160 * kernels : 0);
  double const shown = std::min(sites, 500.0);
  return cell * sites * sites + 1000 * kernels * shown * shown;
}

double bytes_of_threads(int threads) {
  ::pthread_attr_t usual;
  std::size_t stack = std::size_t{8} << 20;
  if (::pthread_attr_init(&usual) == 0) {
    static_cast<void>(::pthread_attr_getstacksize(&usual, &stack));
    ::pthread_attr_destroy(&usual);
  }
  return threads * (static_cast<double>(stack) + 0.5 * mib);
}

void require_memory(std::string const& file, double needed, options const& asked) {
  auto const require = [&](double there, std::string const& what) {
    if (needed > there)
      throw unusable(file, "needs about " + number(needed / mib, 4) +
                               " MiB beside the mapped files, but " + what);
  };
  auto const number_of = [](double bytes) { return number(bytes / mib, 4) + " MiB"; };
  if (asked.memory_limit > 0)
    require(static_cast<double>(asked.memory_limit) * mib,
            "--memory-limit is " + std::to_string(asked.memory_limit));
  double const data = std::min(limit_on(RLIMIT_DATA), limit_on(RLIMIT_AS));
  require(data, "this process may take " + number_of(data));
  double const machine = machine_memory();
  require(machine, "this machine has " + number_of(machine));
}

}  // namespace report
