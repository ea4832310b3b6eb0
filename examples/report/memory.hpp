// SPDX-License-Identifier: Apache-2.0
#pragma once

// How much memory a report takes, and whether there is as much: told before anything is measured.

#include <cstddef>
#include <string>

#include "options.hpp"

namespace report {

/// Bytes that the tables of one model and the texts made of them take at most, from measurements: they
/// grow with the square of the number of sites.
double bytes_of_tables(double sites, options const& asked);

/// Bytes that so many threads take of the memory that RLIMIT_DATA counts: their stacks, and a heap each.
double bytes_of_threads(int threads);

/// @param file     the input to blame
/// @param needed   bytes beside the mapped files
/// @throws unusable if --memory-limit, a limit on the process or the machine has less
void require_memory(std::string const& file, double needed, options const& asked);

}  // namespace report
