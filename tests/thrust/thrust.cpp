// SPDX-License-Identifier: Apache-2.0
// The suite of all backends on a device system of Thrust; the build says which.
#include <rflow/passes.hpp>
#include <rflow/thrust.hpp>

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

TEST_CASE("the feature path is refused by name") {
  backends::sample<float> const s(3, 3, 50, 17);
  rflow::on_thrust<tested_system> const on{.path = rflow::gram_path::feature};
  CHECK_THROWS_WITH_AS(on.gram(rflow::linear{}, s.stack),
                       "rflow::on_thrust::gram: gram_path::feature is for on_cpu; here moments "
                       "come from kernel matrices",
                       std::invalid_argument);
}
