// SPDX-License-Identifier: Apache-2.0
// The suite of all backends on a device system of Thrust; the build says which.
#include <rflow/thrust.hpp>

#include <stdexcept>

#include RFLOW_SYSTEM_HEADER

struct tested_system {
  static auto policy() { return thrust::RFLOW_SYSTEM::par; }
};

#define RFLOW_BACKENDS rflow::on_thrust<tested_system>
#include "../backends.hpp"

TEST_CASE("a kernel of one's own") {
  backends::sample<float> const s(3, 3, 50, 17);
  backends::check_same(rflow::on_thrust<tested_system>{}.gram(backends::polynomial{}, s.stack),
                       rflow::on_cpu{}.gram(backends::polynomial{}, s.stack), 1e-5);
}

TEST_CASE_TEMPLATE("the same bits as on_cpu, whatever the number of threads", T, float, double,
                   rflow::bf16) {
  backends::sample<T> const s(4, 5, 300, 67);
  rflow::flow_moments const flow = rflow::on_cpu{.threads = 3}.flow(s.stack);
  rflow::gram_moments const gram = rflow::on_cpu{.threads = 3}.gram(rflow::rbf{}, s.stack);
  for (int const threads : {0, 1, 2, 5}) {
    CAPTURE(threads);
    rflow::on_thrust<tested_system> const on{.threads = threads};
    CHECK(on.flow(s.stack).squares == flow.squares);
    CHECK(on.flow(s.stack).pair_cosines == flow.pair_cosines);
    CHECK(on.flow(s.stack).steps == flow.steps);
    CHECK(on.gram(rflow::rbf{}, s.stack).products == gram.products);
    CHECK(on.gram(rflow::rbf{}, s.stack).row_sums == gram.row_sums);
  }
}

TEST_CASE("an exception leaves the threads of others") {
  backends::sample<float> const s(3, 3, 50, 17);
  rflow::on_thrust<tested_system> const on;
  auto const kernel = [](double, double, double) -> double {
    throw std::runtime_error("no kernel");
  };
  CHECK_THROWS_WITH_AS(on.gram(kernel, s.stack), "no kernel", std::runtime_error);
}
