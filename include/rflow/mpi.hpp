// SPDX-License-Identifier: Apache-2.0
#pragma once

// Moments merged across the processes of an MPI program: each rank reads tokens of its own, and all
// end with the moments of all tokens. A rank that fails takes the others along with an error that
// says which and why, instead of leaving them waiting.

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// What MPI says went wrong.
class mpi_error : public std::runtime_error {
 public:
  /// @param call  of which function
  /// @param code  what it returned
  mpi_error(char const* call, int code)
      : std::runtime_error(std::string(call) + ": " + text_of(code)), code_(code) {}
  /// MPI's code.
  int code() const noexcept { return code_; }

 private:
  static std::string text_of(int code) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return {text, static_cast<std::size_t>(length)};
  }
  int code_;
};

/// The ranks of a communicator. Every member function but rank() and size() is collective: all ranks
/// call it, in the same order.
class mpi_team {
 public:
  /// Collective. The program calls MPI_Init before and MPI_Finalize after the life of this.
  /// @throws mpi_error if MPI fails
  explicit mpi_team(MPI_Comm of = MPI_COMM_WORLD) {
    check("MPI_Comm_dup", MPI_Comm_dup(of, &ranks_));
    check("MPI_Comm_set_errhandler", MPI_Comm_set_errhandler(ranks_, MPI_ERRORS_RETURN));
    check("MPI_Comm_rank", MPI_Comm_rank(ranks_, &rank_));
    check("MPI_Comm_size", MPI_Comm_size(ranks_, &size_));
  }
  ~mpi_team() { MPI_Comm_free(&ranks_); }
  mpi_team(mpi_team const&) = delete;
  mpi_team& operator=(mpi_team const&) = delete;

  /// Of this process, from 0.
  int rank() const noexcept { return rank_; }
  /// How many there are.
  int size() const noexcept { return size_; }

  /// Calls f() and returns when every rank has done so. f itself is not collective.
  /// @throws std::runtime_error on every rank if f threw on any: which rank it was, and its text.
  ///         With one rank, whatever f throws
  template <class F>
  void together(F&& f) const {
    std::string error;
    bool failed = false;
    if (size_ == 1) return static_cast<void>(std::forward<F>(f)());
    try {
      std::forward<F>(f)();
    } catch (std::exception const& e) {
      failed = true;
      error = e.what();
    } catch (...) {
      failed = true;
      error = "unknown error";
    }
    std::vector<int> const all = gather(failed ? 1 : 0);
    auto const first = std::find(all.begin(), all.end(), 1);
    if (first == all.end()) return;
    int const from = static_cast<int>(first - all.begin());
    std::array<char, 1024> text{};
    error.copy(text.data(), text.size() - 1);
    check("MPI_Bcast",
          MPI_Bcast(text.data(), static_cast<int>(text.size()), MPI_CHAR, from, ranks_));
    throw std::runtime_error("rank " + std::to_string(from) + ": " + text.data());
  }

  /// Replaces the moments of each rank by those of all, merged in the order of ranks: the same bits
  /// on every rank.
  ///
  /// @param  m  flow_moments, minibatch_moments, monitor_moments, gram_moments of which each rank
  ///            holds a share (on_cpu{.share = {rank, size}}), or anything with merge() and
  ///            each_number(); all ranks hold the same shape
  /// @throws std::runtime_error on every rank if shapes differ or memory is short on one; what
  ///         merge() throws, also on every rank, and then m is spoilt; mpi_error if MPI fails
  /// @note   one broadcast a rank; three more times the numbers of m in memory, however many ranks
  template <class Moments>
  void allreduce(Moments& m) const {
    std::vector<double> const shapes = gather_shapes(m);
    for (std::size_t r = 1; r < static_cast<std::size_t>(size_); ++r)
      for (std::size_t k = 0; k < 3; ++k)
        if (shapes[3 * r + k] != shapes[k])
          throw std::runtime_error("rflow::mpi_team::allreduce: rank 0 has " + shape(shapes, 0) +
                                   ", rank " + std::to_string(r) + " has " + shape(shapes, r));
    if (shapes[2] == 0 || size_ == 1) return;
    std::vector<double> mine, other;
    Moments part;
    together([&] {
      mine = to_numbers(m);
      other.resize(mine.size());
      part = m;
    });
    for (int r = 0; r < size_; ++r) {
      std::vector<double>& numbers = r == rank_ ? mine : other;
      broadcast(numbers, r);
      from_numbers(r == 0 ? m : part, numbers);
      if (r > 0) m.merge(part);
    }
  }

 private:
  static void check(char const* call, int code) {
    if (code != MPI_SUCCESS) throw mpi_error(call, code);
  }

  template <class Moments>
  static double width_of(Moments const& m) {
    if constexpr (requires { m.width; })
      return static_cast<double>(m.width);
    else
      return 0;
  }
  static std::string shape(std::vector<double> const& shapes, std::size_t rank) {
    auto const whole = [&](std::size_t k) {
      return std::to_string(static_cast<std::ptrdiff_t>(shapes[3 * rank + k]));
    };
    return whole(0) + " sites x " + whole(1) + " (" + whole(2) + " numbers)";
  }

  std::vector<int> gather(int mine) const {
    std::vector<int> all(static_cast<std::size_t>(size_));
    check("MPI_Allgather", MPI_Allgather(&mine, 1, MPI_INT, all.data(), 1, MPI_INT, ranks_));
    return all;
  }
  template <class Moments>
  std::vector<double> gather_shapes(Moments& m) const {
    double numbers = 0;
    each_number(m, [&](double&) { ++numbers; });
    double const mine[3] = {static_cast<double>(m.sites), width_of(m), numbers};
    std::vector<double> all(3 * static_cast<std::size_t>(size_));
    check("MPI_Allgather", MPI_Allgather(mine, 3, MPI_DOUBLE, all.data(), 3, MPI_DOUBLE, ranks_));
    return all;
  }
  void broadcast(std::vector<double>& numbers, int from) const {
    // MPI counts in int: larger vectors go in pieces.
    constexpr std::size_t most = std::size_t{1} << 24;
    for (std::size_t at = 0; at < numbers.size(); at += most) {
      std::size_t const count = (std::min)(most, numbers.size() - at);
      check("MPI_Bcast",
            MPI_Bcast(numbers.data() + at, static_cast<int>(count), MPI_DOUBLE, from, ranks_));
    }
  }

  MPI_Comm ranks_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
};

}  // namespace rflow
