// SPDX-License-Identifier: Apache-2.0
#pragma once

// What this machine can do, measured in the same run as whatever is compared with it: the rate of
// fp32 multiply-adds out of registers, and the rate of reading a buffer far larger than the caches.
// Both use the vector width that the translation unit was compiled for (the benches print flags).

#include <Eigen/Core>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

#include <unistd.h>

#include <rflow/threads.hpp>

namespace rflow::bench {

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

namespace detail {

using packet = Eigen::internal::packet_traits<float>::type;
inline constexpr std::ptrdiff_t lanes = Eigen::internal::packet_traits<float>::size;

// Twelve independent chains: enough for two units of latency five. Named, so that no compiler puts
// them into an array in memory, and all different, so that none merges them.
EIGEN_DONT_INLINE inline float multiply_adds(std::ptrdiff_t rounds, float start) {
  using namespace Eigen::internal;
  packet const m = pset1<packet>(start), s = pset1<packet>(1 - start);
  auto const from = [start](int chain) { return pset1<packet>(start + static_cast<float>(chain)); };
  packet a = from(0), b = from(1), c = from(2), d = from(3), e = from(4), f = from(5);
  packet g = from(6), h = from(7), i = from(8), j = from(9), k = from(10), l = from(11);
  for (std::ptrdiff_t r = 0; r < rounds; ++r) {
    a = pmadd(m, s, a), b = pmadd(m, s, b), c = pmadd(m, s, c), d = pmadd(m, s, d);
    e = pmadd(m, s, e), f = pmadd(m, s, f), g = pmadd(m, s, g), h = pmadd(m, s, h);
    i = pmadd(m, s, i), j = pmadd(m, s, j), k = pmadd(m, s, k), l = pmadd(m, s, l);
  }
  a = padd(padd(padd(a, b), padd(c, d)), padd(padd(e, f), padd(g, h)));
  return predux(padd(a, padd(padd(i, j), padd(k, l))));
}

EIGEN_DONT_INLINE inline float sum(float const* x, std::ptrdiff_t count) {
  using namespace Eigen::internal;
  packet a = pset1<packet>(0.f), b = a, c = a, d = a;
  for (std::ptrdiff_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    a = padd(a, ploadu<packet>(x + i)), b = padd(b, ploadu<packet>(x + i + lanes));
    c = padd(c, ploadu<packet>(x + i + 2 * lanes)), d = padd(d, ploadu<packet>(x + i + 3 * lanes));
  }
  return predux(padd(padd(a, b), padd(c, d)));
}

}  // namespace detail

/// fp32 flop/s (a multiply-add is two) of `threads` threads together; the best of `repeats` short
/// runs of about ten milliseconds each.
inline double fma_peak(rflow::detail::team& team, int repeats = 5) {
  std::ptrdiff_t const threads = team.size(), rounds = 1'500'000;
  std::vector<float> keep(static_cast<std::size_t>(16 * threads));
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    double const t0 = seconds();
    team.run(threads, [&](std::ptrdiff_t i) {
      keep[static_cast<std::size_t>(16 * i)] = detail::multiply_adds(rounds, 0.999f);
    });
    double const flops = 2. * 12. * static_cast<double>(detail::lanes * rounds * threads);
    best = std::max(best, flops / (seconds() - t0));
  }
  float volatile used = keep[0];
  static_cast<void>(used);
  return best;
}

inline double fma_peak(int threads, int repeats = 5) {
  rflow::detail::team team(threads);
  return fma_peak(team, repeats);
}

/// Bytes of the last-level cache, or 64 MiB where the system does not say.
inline std::size_t last_level_cache() {
  long const bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? static_cast<std::size_t>(bytes) : std::size_t{64} << 20;
}

/// Bytes per second at which `threads` threads together sum a float buffer of at least four times
/// the last-level cache; the best of `repeats` passes.
inline double read_bandwidth(rflow::detail::team& team, int repeats = 5) {
  std::size_t const bytes = std::max(4 * last_level_cache(), std::size_t{256} << 20);
  std::vector<float> const x(bytes / sizeof(float), 1.f);
  std::ptrdiff_t const threads = team.size();
  std::ptrdiff_t const share = static_cast<std::ptrdiff_t>(x.size()) / threads;
  std::vector<float> keep(static_cast<std::size_t>(16 * threads));
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    double const t0 = seconds();
    team.run(threads, [&](std::ptrdiff_t i) {
      keep[static_cast<std::size_t>(16 * i)] = detail::sum(x.data() + i * share, share);
    });
    best = std::max(best, static_cast<double>(bytes) / (seconds() - t0));
  }
  float volatile used = keep[0];
  static_cast<void>(used);
  return best;
}

inline double read_bandwidth(int threads, int repeats = 5) {
  rflow::detail::team team(threads);
  return read_bandwidth(team, repeats);
}

}  // namespace rflow::bench
