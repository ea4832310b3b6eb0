// SPDX-License-Identifier: Apache-2.0
#pragma once

// on_blas: on_cpu with its Gram products through CBLAS (OpenBLAS, BLIS, MKL). It has larger tiles than
// on_cpu, so it pays off from a few hundred tokens on.
//
// Threads stay the library's own; each asks BLAS for one block at a time, so BLAS has to work in the
// thread that calls it. OpenBLAS and MKL are told so for as long as a call lasts. BLIS does so by
// itself, unless BLIS_NUM_THREADS says otherwise. Of another BLAS take the sequential variety.

#include <cblas.h>
#include <dlfcn.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <mutex>
#include <type_traits>

#include <rflow/detail/cpu/host.hpp>
#include <rflow/detail/cpu/memory.hpp>
#include <rflow/eigen.hpp>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

namespace detail {

/// While one of these exists, BLAS works in the calling thread. How many threads it takes else is
/// the program's affair: the last one puts that back.
class sequential_blas {
 public:
  sequential_blas() {
    shared& s = instance();
    std::lock_guard const lock(s.mutex);
    if (s.users++ > 0) return;
    for (library& l : s.libraries)
      if (l.present()) {
        l.before = l.get();
        l.set(1);
      }
  }
  ~sequential_blas() {
    shared& s = instance();
    std::lock_guard const lock(s.mutex);
    if (--s.users > 0) return;
    for (library& l : s.libraries)
      if (l.present()) l.set(l.before);
  }
  sequential_blas(sequential_blas const&) = delete;
  sequential_blas& operator=(sequential_blas const&) = delete;

 private:
  /// A BLAS's own functions, looked up in the running program: which BLAS it has may be settled as
  /// late as when it starts.
  struct library {
    int (*get)();
    void (*set)(int);
    int before = 1;

    library(char const* get_name, char const* set_name)
        : get(reinterpret_cast<int (*)()>(::dlsym(RTLD_DEFAULT, get_name))),
          set(reinterpret_cast<void (*)(int)>(::dlsym(RTLD_DEFAULT, set_name))) {}
    bool present() const { return get != nullptr && set != nullptr; }
  };

  struct shared {
    std::mutex mutex;
    int users = 0;
    library libraries[2] = {{"openblas_get_num_threads", "openblas_set_num_threads"},
                            {"MKL_Get_Max_Threads", "MKL_Set_Num_Threads"}};
  };
  static shared& instance() {
    static shared s;
    return s;
  }
};

/// What the Gram engine asks of a product (see packed_product), by ?gemm. BLAS packs both sides once
/// more for each call, so only large products are fast: a fifth of the time is packing at 256 × 256.
template <integer Side>
struct blas_product {
  template <class C>
  static constexpr integer rows = Side;
  template <class C>
  static constexpr integer cols = Side;
  static constexpr integer depth_lines = 65;
  static constexpr integer block_strips = 1, block_cols = Side;

  template <class C>
  static void multiply(C const* a, C const* b, integer depth, bool accumulate, integer above,
                       C const*, C* out) {
    constexpr integer R = rows<C>, N = cols<C>;
    if (above <= -N) return gemm(a, b, R, N, depth, accumulate, out);  // wholly below the diagonal
    for (integer j = 0; j < N; j += strip) {
      integer const first = std::clamp<integer>((above + j) / strip * strip, 0, R);
      C* const column = out + j * R;
      if (!accumulate)
        for (integer k = j; k < j + strip; ++k) std::fill_n(out + k * R, first, C(0));
      if (first < R)
        gemm(a + first, b + j * depth, R - first, strip, depth, accumulate, column + first);
    }
  }

 private:
  static constexpr integer strip = 64;  // columns of the products on the diagonal

  /// rows × cols of the product of a strip of rows<C> rows and of columns one after the other.
  template <class C>
  static void gemm(C const* a, C const* b, integer height, integer width, integer depth,
                   bool accumulate, C* out) {
    auto const i = [](integer x) { return static_cast<int>(x); };
    auto const go = [&](auto multiply) {
      multiply(CblasColMajor, CblasNoTrans, CblasNoTrans, i(height), i(width), i(depth), C(1), a,
               i(rows<C>), b, i(depth), accumulate ? C(1) : C(0), out, i(rows<C>));
    };
    if constexpr (std::is_same_v<C, float>)
      go(cblas_sgemm);
    else
      go(cblas_dgemm);
  }
};

}  // namespace detail

/// Runs on the CPU, with the products of Gram matrices by BLAS and the rest as on_cpu does it. The
/// same results, bit for bit, for every number of threads; other last digits than on_cpu.
struct on_blas {
  int threads = 0;  ///< so many; 0: as many as the machine has and the work pays for
  std::size_t memory_bound = std::size_t{256} << 20;  ///< bytes of scratch, without BLAS's own
  gram_path path = gram_path::automatic;              ///< how linear Gram moments come about
  bool significance = false;  ///< also what cka_table::p_value needs: n² (d + n) operations a site
  bool shifts = false;        ///< significance, and what cka_table::shift_p_value needs: see there

  /// Host memory only.
  template <class Memory>
  static constexpr bool reads = std::same_as<Memory, host_memory>;
  /// As on_cpu has it.
  template <class T>
  using chain_stream = on_cpu::chain_stream<T>;
  /// As on_cpu has it.
  template <class T>
  using batch_stream = on_cpu::batch_stream<T>;

  /// How many threads that is at most; probes and flow_monitor take so many.
  int thread_count() const { return detail::threads_or_all(threads); }

  /// @note  on_cpu's: there is no product in it
  template <class T>
  flow_moments flow(layer_stack<T> const& stack, flow_sink const& sink = {}) const {
    return detail::host_flow("rflow::on_blas::flow", {threads}, stack, sink);
  }

  /// @note  S n² d multiply-adds, or (Σd)² n / 2 when those are fewer and the kernel is linear
  /// @throws std::invalid_argument if the stacks differ in tokens, or the memory bound is too small
  ///         for one tile (the text says what is needed)
  template <class Kernel, class... T>
  gram_moments gram(Kernel const& kernel, layer_stack<T> const&... stacks) const {
    detail::sequential_blas const alone;
    detail::gram_options const options{{threads}, memory_bound, path, significance, {}, shifts};
    auto const gram = [&](auto product) {
      return detail::host_gram<decltype(product)>("rflow::on_blas::gram", kernel, options,
                                                  stacks...);
    };
    // From the shape and the bound alone, as everything that could show in a last digit.
    constexpr std::ptrdiff_t side = 512;
    bool const many = ((stacks.size() >= 2 * side) && ...);
    double const tile =
        2.0 * side * side * sizeof(double) * static_cast<double>((stacks.sites() + ...));
    return many && tile < static_cast<double>(memory_bound) ? gram(detail::blas_product<side>{})
                                                            : gram(detail::blas_product<128>{});
  }

  /// on_cpu's.
  template <class T, class Visit>
  void softmax(layer_stack<T> const& stack, softmax_problem const& problem,
               Visit const& visit) const {
    detail::host_softmax("rflow::on_blas::softmax", {thread_count()}, stack, problem, visit);
  }
};

}  // namespace rflow
