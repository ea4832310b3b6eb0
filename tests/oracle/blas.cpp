// SPDX-License-Identifier: Apache-2.0
// The oracle on on_blas.
#include <rflow/blas.hpp>

#include "oracle.hpp"

int main(int argc, char** argv) { return oracle::run<rflow::on_blas>(argc, argv, "on_blas"); }
