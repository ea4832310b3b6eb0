// SPDX-License-Identifier: Apache-2.0
// The benchmark of the CKA matrix on on_blas.
#include <rflow/blas.hpp>

#define RFLOW_BENCH_BACKEND rflow::on_blas
#include "cka.cpp"
