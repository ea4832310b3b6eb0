// SPDX-License-Identifier: Apache-2.0
#pragma once

// One model in many files, read one after the other and never as a whole: moments of a sequence at a
// time, in bounded memory, shared among processes, and kept in a checkpoint file meanwhile.

#include <cstddef>

#include "measure.hpp"
#include "options.hpp"
#include "workers.hpp"

namespace report {

/// Anonymous memory of this process now, in bytes; 0 where the system does not say.
std::size_t anonymous_memory();

/// @throws unusable on every rank if a shard or the checkpoint cannot be used on any, or the memory
///         limit will not do; std::invalid_argument if the system refuses it
result measure_shards(options const& asked, workers& all, progress const& tell);

/// Removes the checkpoint of this process, once there is a report.
void forget_checkpoint(options const& asked, workers const& all);

}  // namespace report
