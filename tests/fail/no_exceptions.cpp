// expect: rflow: it throws exceptions: compile without -fno-exceptions
// first: rflow: it throws exceptions: compile without -fno-exceptions
// flags: -fno-exceptions
// SPDX-License-Identifier: Apache-2.0
// Engines are often built so. Every throw is an error then; this comes first.
#include <rflow/rflow.hpp>
