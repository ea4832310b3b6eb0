// SPDX-License-Identifier: Apache-2.0
#pragma once

// Boost's progress display on a terminal, for work that takes a while. Without Boost there is none.

#include <unistd.h>

#include <iostream>
#include <memory>

#if __has_include(<boost/timer/progress_display.hpp>)
#include <boost/timer/progress_display.hpp>
#define RFLOW_PROGRESS 1
#endif

namespace common {

class progress_bar {
 public:
  explicit progress_bar(bool wanted) : wanted_(wanted && ::isatty(STDERR_FILENO) == 1) {}

  /// Multiply-adds done, of how many.
  void operator()(double done, double total) {
    static_cast<void>(done), static_cast<void>(total);
#ifdef RFLOW_PROGRESS
    if (!wanted_ || total < long_work) return;
    constexpr unsigned long steps = 1000;
    if (bar_ == nullptr) bar_ = std::make_unique<boost::timer::progress_display>(steps, std::cerr);
    auto const at = static_cast<unsigned long>(done / total * static_cast<double>(steps));
    if (at > bar_->count()) *bar_ += at - bar_->count();
#endif
  }

 private:
  static constexpr double long_work = 5e10;  // some seconds

  bool wanted_;
#ifdef RFLOW_PROGRESS
  std::unique_ptr<boost::timer::progress_display> bar_;
#endif
};

}  // namespace common
