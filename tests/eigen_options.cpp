// SPDX-License-Identifier: Apache-2.0
// Compiled with options of Eigen's that a program may set, the other way round than usual (CMakeLists.txt says
// which): matrices by rows, memory without alignment, fresh matrices full of NaN.
#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/cka.hpp>
#include <rflow/flow.hpp>

#include "reference.hpp"

namespace {

static_assert(Eigen::MatrixXd::IsRowMajor);
static_assert(EIGEN_MAX_ALIGN_BYTES == 0);

template <class T>
void check_flow(unsigned seed) {
  INFO("seed " << seed);
  std::mt19937 bits(seed);
  std::size_t const tokens = 9 + seed, width = 5 + 4 * seed;
  reference::stack x = reference::random_stack(bits, 5, tokens, width);
  std::vector<T> const values = reference::pack<T>(x);
  double const within = reference::tolerance<T>;
  rflow::flow_report const r = rflow::flow(reference::stack_of(values, x));
  for (std::size_t l = 0; l < x.size(); ++l)
    CHECK(std::abs(r.inter_token[l] - reference::inter_token(x[l])) < within);
  double energy = 0;
  for (std::size_t l = 1; l < x.size(); ++l) {
    reference::matrix const step = reference::minus(x[l], x[l - 1]);
    energy += reference::inner(step, step);
  }
  CHECK(r.variance.path_energy == doctest::Approx(energy).epsilon(within));
  CHECK(r.variance.st2 ==
        doctest::Approx(std::sqrt(reference::spread(x) / static_cast<double>(x.size())))
            .epsilon(within));
}

template <class T>
void check_cka(unsigned seed) {
  INFO("seed " << seed);
  std::mt19937 bits(seed);
  reference::stack x = reference::random_stack(bits, 3, 20 + 7 * seed, 6 + seed);
  std::vector<T> const values = reference::pack<T>(x);
  for (auto const path : {rflow::gram_path::gram, rflow::gram_path::feature}) {
    rflow::on_cpu const on{.path = path};
    rflow::cka_table const table =
        rflow::cka_matrix(reference::stack_of(values, x), rflow::linear{}, rflow::debiased{}, on);
    for (std::size_t p = 0; p < x.size(); ++p)
      for (std::size_t q = 0; q < p; ++q)
        CHECK(std::abs(table(static_cast<std::ptrdiff_t>(p), static_cast<std::ptrdiff_t>(q)) -
                       reference::cka(reference::linear_kernel(x[p]),
                                      reference::linear_kernel(x[q]), reference::hsic_debiased)) <
              10 * reference::tolerance<T>);
  }
}

}  // namespace

TEST_CASE("Eigen's options change no flow report") {
  for (unsigned seed = 1; seed <= 8; ++seed) {
    check_flow<float>(seed);
    check_flow<double>(seed);
    check_flow<rflow::bf16>(seed);
    check_flow<rflow::f16>(seed);
  }
}

TEST_CASE("Eigen's options change no CKA") {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    check_cka<float>(seed);
    check_cka<double>(seed);
  }
}
