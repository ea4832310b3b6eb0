// SPDX-License-Identifier: Apache-2.0
// The oracle on on_thrust, on Thrust's sequential system.
#include <rflow/thrust.hpp>

#include "oracle.hpp"

int main(int argc, char** argv) {
  return oracle::run<rflow::on_thrust<rflow::thrust_cpp>>(argc, argv, "on_thrust");
}
