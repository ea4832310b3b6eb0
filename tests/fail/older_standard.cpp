// expect: rflow: C++20 is needed: compile with -std=c++20
// first: rflow: C++20 is needed: compile with -std=c++20
// flags: -std=c++17
// SPDX-License-Identifier: Apache-2.0
// Compilers default to older standards. What follows from it fills pages; this comes first.
#include <rflow/rflow.hpp>
