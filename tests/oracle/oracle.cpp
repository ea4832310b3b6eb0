// SPDX-License-Identifier: Apache-2.0
// The oracle on on_cpu.
#include "oracle.hpp"

int main(int argc, char** argv) { return oracle::run<rflow::on_cpu>(argc, argv, "on_cpu"); }
