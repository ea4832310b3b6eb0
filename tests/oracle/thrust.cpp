// SPDX-License-Identifier: Apache-2.0
// The oracle on on_thrust, on Thrust's sequential system.
#include <rflow/thrust.hpp>

#include <thrust/system/cpp/execution_policy.h>

#include "oracle.hpp"

struct sequential {
  static auto policy() { return thrust::cpp::par; }
};

int main(int argc, char** argv) {
  return oracle::run<rflow::on_thrust<sequential>>(argc, argv, "on_thrust");
}
