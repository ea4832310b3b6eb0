// SPDX-License-Identifier: Apache-2.0
#pragma once

// A small team of threads that shares out numbered tasks. The library owns its threads, so that
// nothing depends on the consumer's OpenMP flags and ThreadSanitizer sees every hand-over; or it borrows
// those of a runtime that the program has already.
//
// Tasks go to whichever thread is free. A result must therefore depend on the task's number only:
// write it to a place of its own and add such places up in their order afterwards.

static_assert(
    __cplusplus >= 202002L,
    "rflow: C++20 is needed: compile with -std=c++20, or in CMake link rflow::rflow, which "
    "asks for it");
// With exceptions switched off the macro is undefined: the compiler rejects this line, and prints it.
static_assert(__cpp_exceptions, "rflow: it throws exceptions: compile without -fno-exceptions");

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace rflow::detail {

/// Somebody else's threads: calls part(job, worker) for every worker in [0, workers), in any order and
/// side by side or not, and returns when all have returned.
using launcher = void (*)(int workers, void (*part)(void* job, int worker), void* job);

inline int threads_or_all(int threads) {
  return threads > 0 ? threads
                     : (std::max)(1, static_cast<int>(std::thread::hardware_concurrency()));
}

/// Whose threads do the work, and how many at most.
struct crew {
  int threads = 1;            // 0: as many as the work pays for
  launcher launch = nullptr;  // null: threads of our own

  /// The crew for so much work, of which a thread should have `least` or more: about 0.3 ms, because
  /// it takes some 0.05 ms to start and to end one. Results do not depend on it.
  crew sized_for(double work, double least) const {
    if (threads > 0) return *this;
    if (work < 2 * least) return {1, launch};  // asking the system takes longer than small work
    return {(std::min)(static_cast<int>((std::min)(work / least, 1e6)), threads_or_all(0)), launch};
  }
};

class team {
 public:
  /// Starts threads − 1 threads; the caller of run() is the last one. If the system grants fewer,
  /// the team is smaller: results do not depend on its size.
  explicit team(int threads) : team(crew{threads}) {}
  explicit team(crew of) : crew_(of) {
    if (crew_.launch != nullptr) return;
    try {
      for (int id = 1; id < crew_.threads; ++id) workers_.emplace_back([this, id] { serve(id); });
    } catch (std::system_error const&) {
      // out of threads: carry on with those that started
    } catch (...) {
      stop();
      throw;
    }
  }
  ~team() { stop(); }
  team(team const&) = delete;
  team& operator=(team const&) = delete;

  int size() const noexcept {
    return crew_.launch != nullptr ? (std::max)(1, crew_.threads)
                                   : static_cast<int>(workers_.size()) + 1;
  }

  /// Calls f(i), or f(i, thread) with 0 ≤ thread < size(), for every i in [0, count) and returns
  /// when all are done. Tasks start in the order of their numbers. After an exception no further
  /// task starts, and the exception of the lowest task is rethrown here: the one that a plain loop
  /// would have thrown. Not to be called from inside f, nor from two threads at once.
  template <class F>
  void run(std::ptrdiff_t count, F&& f) {
    using callee = std::remove_reference_t<F>;
    job work{[](void const* self, std::ptrdiff_t i, int thread) {
               auto& g = *static_cast<callee*>(const_cast<void*>(self));
               if constexpr (std::is_invocable_v<callee&, std::ptrdiff_t, int>) {
                 g(i, thread);
               } else {
                 static_cast<void>(thread);
                 g(i);
               }
             },
             std::addressof(f), count};
    if (size() == 1 || count <= 1) {
      for (std::ptrdiff_t i = 0; i < count; ++i) work.call(work.self, i, 0);
      return;
    }
    if (crew_.launch != nullptr) {
      crew_.launch(
          static_cast<int>((std::min<std::ptrdiff_t>)(size(), count)),
          [](void* self, int worker) { static_cast<job*>(self)->take_part(worker); }, &work);
      if (work.error) std::rethrow_exception(work.error);
      return;
    }
    {
      std::lock_guard lock(mutex_);
      job_ = &work;
      busy_ = workers_.size();
      ++round_;
    }
    start_.notify_all();
    work.take_part(0);
    wait_briefly([this] { return busy_.load(std::memory_order_relaxed) == 0; });
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [this] { return busy_.load(std::memory_order_relaxed) == 0; });
    if (work.error) std::rethrow_exception(work.error);
  }

 private:
  struct job {
    void (*call)(void const*, std::ptrdiff_t, int);
    void const* self;
    std::ptrdiff_t count;
    std::atomic<std::ptrdiff_t> next{0};
    std::mutex mutex{};
    std::exception_ptr error{};
    std::ptrdiff_t error_at = (std::numeric_limits<std::ptrdiff_t>::max)();

    void take_part(int thread) noexcept {
      for (;;) {
        std::ptrdiff_t const i = next.fetch_add(1, std::memory_order_relaxed);
        if (i >= count) return;
        try {
          call(self, i, thread);
        } catch (...) {
          std::lock_guard lock(mutex);
          if (i < error_at) {
            error_at = i;
            error = std::current_exception();
          }
          next.store(count, std::memory_order_relaxed);
        }
      }
    }
  };

  /// Looks a few times before the caller goes to sleep: the next run() is often microseconds away,
  /// less than it takes to wake up. The mutex still orders everything.
  template <class Ready>
  static void wait_briefly(Ready const& ready) {
    for (int i = 0; i < 4000 && !ready(); ++i) {
    }
  }

  void serve(int thread) {
    std::size_t seen = 0;
    for (;;) {
      job* work = nullptr;
      wait_briefly([&] { return round_.load(std::memory_order_relaxed) != seen; });
      {
        std::unique_lock lock(mutex_);
        start_.wait(lock, [&] { return stopping_ || round_ != seen; });
        if (stopping_) return;
        seen = round_;
        work = job_;
      }
      work->take_part(thread);
      std::lock_guard lock(mutex_);
      if (--busy_ == 0) finished_.notify_one();
    }
  }

  void stop() noexcept {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
  }

  crew crew_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable finished_;
  job* job_ = nullptr;
  std::atomic<std::size_t> busy_{0};  // both change under the mutex only
  std::atomic<std::size_t> round_{0};
  bool stopping_ = false;
  std::vector<std::thread> workers_;  // last: the threads use everything above
};

/// Lets the tasks of a run through one at a time, in the order of their numbers.
class turnstile {
 public:
  /// Held by task `number` while it runs; the next one may go when it is destroyed.
  class pass {
   public:
    pass(turnstile& gate, std::ptrdiff_t number) : gate_(gate), number_(number) {}
    ~pass() {
      wait();  // also after an exception: tasks leave in order, whatever happens to them
      gate_.next_.store(number_ + 1);
      gate_.next_.notify_all();
    }
    pass(pass const&) = delete;
    pass& operator=(pass const&) = delete;

    /// Returns when all tasks of lower numbers are over.
    void wait() const noexcept {
      for (std::ptrdiff_t at = gate_.next_.load(); at < number_; at = gate_.next_.load())
        gate_.next_.wait(at);
    }

   private:
    turnstile& gate_;
    std::ptrdiff_t number_;
  };

 private:
  std::atomic<std::ptrdiff_t> next_{0};
};

}  // namespace rflow::detail
