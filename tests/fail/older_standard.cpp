// expect: rflow: C++20 is needed: compile with -std=c++20
// flags: -std=c++17
// flags: -fmax-errors=1
// SPDX-License-Identifier: Apache-2.0
// Compilers default to older standards. What follows from it fills pages; this comes first.
#include <rflow/cka.hpp>
