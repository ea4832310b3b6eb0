// SPDX-License-Identifier: Apache-2.0
#include <rflow/mpi.hpp>

#include <optional>

#include "../workers.hpp"

namespace report {
namespace {

class ranks : public workers {
 public:
  ranks(int& argc, char**& argv) {
    MPI_Init(&argc, &argv);
    team_.emplace();
  }
  ~ranks() override {
    team_.reset();
    MPI_Finalize();
  }
  int rank() const override { return team_->rank(); }
  int size() const override { return team_->size(); }
  void together(std::function<void()> const& f) override { team_->together(f); }
  void merge(rflow::monitor_moments& m) override { team_->allreduce(m); }
  void merge(rflow::gram_moments& m) override { team_->allreduce(m); }

 private:
  std::optional<rflow::mpi_team> team_;
};

}  // namespace

std::unique_ptr<workers> join_workers(int& argc, char**& argv) {
  return std::make_unique<ranks>(argc, argv);
}

}  // namespace report
