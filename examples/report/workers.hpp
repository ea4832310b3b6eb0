// SPDX-License-Identifier: Apache-2.0
#pragma once

// The processes that share the shards: this one alone, or the ranks of an MPI program. Which, is
// decided by the source that is linked: ranks/alone.cpp or ranks/mpi.cpp.

#include <rflow/monitor.hpp>

#include <functional>
#include <memory>

namespace report {

class workers {
 public:
  virtual ~workers() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Runs f here; if it throws in any process, every process throws.
  virtual void together(std::function<void()> const& f) = 0;
  /// The moments of all processes, in the order of ranks.
  virtual void merge(rflow::monitor_moments& m) = 0;
  virtual void merge(rflow::gram_moments& m) = 0;
};

/// To be called once, before anything else; what it returns must live until the program ends.
std::unique_ptr<workers> join_workers(int& argc, char**& argv);

}  // namespace report
