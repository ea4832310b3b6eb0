// SPDX-License-Identifier: Apache-2.0
// on_blas: the CKA tests and the suite of all backends on it, and what is its own.
#include <rflow/blas.hpp>

#define RFLOW_BACKEND rflow::on_blas
#include "../cka.cpp"

#define RFLOW_BACKENDS rflow::on_blas
#define RFLOW_TIGHT_BOUND 3200 << 10
#include "../backends.hpp"

#include <cmath>
#include <random>
#include <thread>
#include <vector>

namespace {

int (*const blas_threads)() = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT,
                                                                "openblas_get_num_threads"));
void (*const set_blas_threads)(int) =
    reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "openblas_set_num_threads"));

}  // namespace

TEST_CASE("more tokens than one product takes: on_cpu's table, and the same bits for any threads") {
  for (std::size_t const tokens : {std::size_t{1024}, std::size_t{1500}, std::size_t{2100}}) {
    CAPTURE(tokens);
    backends::sample<float> const s(17, 3, tokens, 70);
    rflow::on_cpu const cpu{.path = rflow::gram_path::gram};
    for (auto const path : {rflow::gram_path::gram, rflow::gram_path::feature})
      for (std::size_t const bound : {std::size_t{20} << 20, std::size_t{256} << 20}) {
        auto const run = [&](int threads) {
          return rflow::on_blas{threads, bound, path}.gram(rflow::linear{}, s.stack);
        };
        rflow::gram_moments const one = run(1);
        backends::check_same(one, cpu.gram(rflow::linear{}, s.stack), 1e-5);
        for (int const threads : {2, 3, 5}) {
          rflow::gram_moments const more = run(threads);
          CHECK(more.products == one.products);
          CHECK(more.row_sums == one.row_sums);
          CHECK(more.squares == one.squares);
        }
      }
  }
}

TEST_CASE("equal terms beside a large one: no long sums in float, however large the tiles") {
  // Two tokens far out and first: their pair is the first term, and what it leaves by U-centring in
  // all others is nearly equal.
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (std::ptrdiff_t const tokens : {70, 93, 120, 600}) {
    CAPTURE(tokens);
    std::ptrdiff_t const widths[] = {4, 29};
    std::vector<float> narrow[2];
    std::vector<double> wide[2];
    std::vector<rflow::view<float>> sites;
    std::vector<rflow::view<double>> same;
    for (std::size_t l = 0; l < 2; ++l) {
      for (std::ptrdiff_t i = 0; i < tokens * widths[l]; ++i)
        narrow[l].push_back(normal(random) * (i < 2 * widths[l] ? 1e4f : 1.f));
      wide[l].assign(narrow[l].begin(), narrow[l].end());
      sites.emplace_back(narrow[l].data(), tokens, widths[l]);
      same.emplace_back(wide[l].data(), tokens, widths[l]);
    }
    rflow::gram_path const path = rflow::gram_path::gram;
    auto const found = rflow::cka_matrix(rflow::layer_stack<float>(sites), rflow::linear{},
                                         rflow::debiased{}, rflow::on_blas{.path = path});
    auto const right = rflow::cka_matrix(rflow::layer_stack<double>(same), rflow::linear{},
                                         rflow::debiased{}, rflow::on_cpu{.path = path});
    CHECK(std::abs(found(0, 1).value - right(0, 1).value) < 2e-6);
  }
}

TEST_CASE("how many threads BLAS has is the program's affair, and no digit's") {
  if (blas_threads == nullptr || set_blas_threads == nullptr) return;  // another BLAS
  backends::sample<float> const s(18, 3, 1100, 90);
  rflow::on_blas const on{.threads = 2, .path = rflow::gram_path::gram};
  int const before = blas_threads();
  std::vector<double> first;
  for (int const threads : {1, 2, 4}) {
    set_blas_threads(threads);
    rflow::gram_moments const m = on.gram(rflow::linear{}, s.stack);
    CHECK(blas_threads() == threads);
    if (first.empty()) first = m.products;
    CHECK(m.products == first);
  }
  // Calls from several threads at once: the last one puts it back.
  std::vector<std::thread> callers;
  std::vector<std::vector<double>> results(4);
  for (auto& result : results)
    callers.emplace_back([&] { result = on.gram(rflow::linear{}, s.stack).products; });
  for (auto& caller : callers) caller.join();
  for (auto const& result : results) CHECK(result == first);
  CHECK(blas_threads() == 4);
  CHECK_THROWS_AS((rflow::on_blas{.memory_bound = 100, .path = rflow::gram_path::gram}.gram(
                      rflow::linear{}, s.stack)),
                  std::invalid_argument);
  CHECK(blas_threads() == 4);
  set_blas_threads(before);
}
