// SPDX-License-Identifier: Apache-2.0
#include "../workers.hpp"

namespace report {
namespace {

class alone : public workers {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void together(std::function<void()> const& f) override { f(); }
  void merge(rflow::monitor_moments&) override {}
  void merge(rflow::gram_moments&) override {}
};

}  // namespace

std::unique_ptr<workers> join_workers(int&, char**&) { return std::make_unique<alone>(); }

}  // namespace report
