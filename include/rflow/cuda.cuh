// SPDX-License-Identifier: Apache-2.0
#pragma once

// on_cuda: the moments on a GPU, on a stream of yours, with products through cuBLAS. It reads device
// memory where it lies, and host memory through pinned buffers while the GPU works. For .cu files;
// needs no compiler flag but -std=c++20.
//
// Half-precision activations are widened while they are centred: what cuBLAS multiplies is centred
// float, because products of raw bf16 values would cancel where the mean is large.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/system/cuda/execution_policy.h>

#include <rflow/detail/cuda/passes.cuh>
#include <rflow/moments.hpp>
#include <rflow/view.hpp>

namespace rflow {

/// What CUDA or cuBLAS reported: the call, the library's name for the error, its code and its text.
class cuda_error : public std::runtime_error {
 public:
  /// @param call  what was called, with what matters of its arguments
  /// @param name  the library's name for the error
  /// @param code  its code
  /// @param text  its text
  cuda_error(std::string const& call, std::string const& name, int code, std::string const& text)
      : std::runtime_error("rflow::on_cuda: " + call + ": " + name + " (" + std::to_string(code) +
                           "): " + text),
        code_(code) {}

  /// The library's code.
  int code() const noexcept { return code_; }

 private:
  int code_;
};

namespace detail {

inline void check(cudaError_t error, std::string const& call) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // else the next call would report it again
  throw cuda_error(call, cudaGetErrorName(error), static_cast<int>(error),
                   cudaGetErrorString(error));
}
inline void check(cublasStatus_t error, std::string const& call) {
  if (error != CUBLAS_STATUS_SUCCESS)
    throw cuda_error(call, cublasGetStatusName(error), static_cast<int>(error),
                     cublasGetStatusString(error));
}

// ---- kernels ------------------------------------------------------------------------------------

/// The group of a GPU: a warp, whose lanes read neighbours in memory.
struct warp {
  static constexpr int size = 32;
  static constexpr int held = 16;   // features of a row that a lane holds at once
  static constexpr int tokens = 8;  // rows that are read before the first is used

  __device__ int lane() const { return static_cast<int>(threadIdx.x) % size; }
  template <class V>
  __device__ V sum(V x) const {
    for (int distance = size / 2; distance > 0; distance /= 2)
      x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  }
  __device__ double max(double x) const {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      double const other = __shfl_xor_sync(0xffffffffu, x, distance);
      x = x < other ? other : x;
    }
    return x;
  }
  __device__ void sync() const { __syncwarp(); }
};

inline constexpr unsigned warps_per_block = 4;

/// One warp an item, and on to the next.
template <class F>
__attribute__((visibility("hidden"))) __global__ void run_warps(std::ptrdiff_t count, F f) {
  std::ptrdiff_t const step = static_cast<std::ptrdiff_t>(gridDim.x) * warps_per_block;
  std::ptrdiff_t i = static_cast<std::ptrdiff_t>(blockIdx.x) * warps_per_block +
                     static_cast<std::ptrdiff_t>(threadIdx.x) / warp::size;
  for (; i < count; i += step) f(i, warp{});
}

/// Keeps instantiations of Thrust's templates inside this library.
template <class F>
struct __attribute__((visibility("hidden"))) hidden {
  F f;

  __device__ void operator()(std::ptrdiff_t i) const { f(i); }
};

// ---- what the runtime owns ----------------------------------------------------------------------

/// Makes a device the current one for a while.
class device_scope {
 public:
  explicit device_scope(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device >= 0 && device != before_) {
      check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
      changed_ = true;
    }
  }
  ~device_scope() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  device_scope(device_scope const&) = delete;
  device_scope& operator=(device_scope const&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// Something that the runtime makes and destroys.
template <class Handle, auto Destroy>
class owned {
 public:
  owned() = default;
  owned(owned const&) = delete;
  owned& operator=(owned const&) = delete;
  ~owned() {
    if (handle_ != nullptr) static_cast<void>(Destroy(handle_));
  }

  Handle release() { return std::exchange(handle_, nullptr); }

  template <class Make>
  Handle get(Make const& make) {
    if (handle_ == nullptr) make(&handle_);
    return handle_;
  }

 private:
  Handle handle_ = nullptr;
};

struct unpin {
  void operator()(std::byte* p) const { static_cast<void>(cudaFreeHost(p)); }
};

/// What brings one stack from host memory: two pinned buffers, and events that say who may use them.
/// Stacks of one call do not share it: their buffers are of different sizes and in flight at once.
class staging {
 public:
  cudaEvent_t event(int which) {
    return events_[which].get([](cudaEvent_t* e) {
      check(cudaEventCreateWithFlags(e, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    });
  }
  std::byte* pinned(int which, std::size_t bytes) {
    if (bytes_[which] < bytes) {
      pinned_[which].reset();
      bytes_[which] = 0;
      void* p = nullptr;
      check(cudaMallocHost(&p, bytes), "cudaMallocHost of " + std::to_string(bytes) + " bytes");
      pinned_[which].reset(static_cast<std::byte*>(p));
      bytes_[which] = bytes;
    }
    return pinned_[which].get();
  }

 private:
  owned<cudaEvent_t, cudaEventDestroy> events_[5];
  std::unique_ptr<std::byte, unpin> pinned_[2];
  std::size_t bytes_[2] = {};
};

/// What calls with the same on_cuda share: streams, events, a pool of memory, a cuBLAS handle and
/// pinned buffers. All are made when first wanted.
class cuda_context {
 public:
  std::mutex mutex;  // one call at a time

  cudaStream_t stream() { return make_stream(stream_); }
  cudaStream_t copies() { return make_stream(copies_); }
  /// For the which-th stack in host memory of a call.
  detail::staging& staging(std::size_t which) {
    while (stagings_.size() <= which) stagings_.push_back(std::make_unique<detail::staging>());
    return *stagings_[which];
  }
  cublasHandle_t blas() {
    return blas_.get([](cublasHandle_t* h) { check(cublasCreate(h), "cublasCreate"); });
  }

  /// cuBLAS would ask for memory of its own, device-wide, at the first product on a stream. The size
  /// is what its documentation recommends for the largest GPUs.
  static constexpr std::size_t workspace_bytes = std::size_t{32} << 20;
  void* workspace() {
    return workspace_.get([this](void** p) {
      void* fresh = nullptr;
      check(cudaMallocFromPoolAsync(&fresh, workspace_bytes, pool(), copies()),
            "cudaMallocFromPoolAsync of " + std::to_string(workspace_bytes) +
                " bytes (on_cuda::memory_bound does not count cuBLAS's workspace)");
      *p = fresh;
      check(cudaStreamSynchronize(copies()), "cudaStreamSynchronize");
    });
  }

  /// A pool that keeps what is given back, so that the next call finds it.
  cudaMemPool_t pool() {
    return pool_.get([](cudaMemPool_t* p) {
      cudaMemPoolProps properties{};
      properties.allocType = cudaMemAllocationTypePinned;
      properties.location.type = cudaMemLocationTypeDevice;
      check(cudaGetDevice(&properties.location.id), "cudaGetDevice");
      owned<cudaMemPool_t, cudaMemPoolDestroy> fresh;
      cudaMemPool_t const made = fresh.get(
          [&](cudaMemPool_t* q) { check(cudaMemPoolCreate(q, &properties), "cudaMemPoolCreate"); });
      std::uint64_t keep = std::numeric_limits<std::uint64_t>::max();
      check(cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &keep),
            "cudaMemPoolSetAttribute");
      *p = fresh.release();
    });
  }

 private:
  using owned_stream = owned<cudaStream_t, cudaStreamDestroy>;

  static cudaStream_t make_stream(owned_stream& s) {
    return s.get([](cudaStream_t* out) {
      check(cudaStreamCreateWithFlags(out, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    });
  }

  /// Every call has waited for its stream, so nothing uses the memory any more.
  static cudaError_t free_now(void* p) { return cudaFreeAsync(p, cudaStreamPerThread); }

  owned<cudaMemPool_t, cudaMemPoolDestroy> pool_;
  owned<void*, free_now> workspace_;
  owned_stream stream_, copies_;
  std::vector<std::unique_ptr<detail::staging>> stagings_;
  owned<cublasHandle_t, cublasDestroy> blas_;
};

// ---- host memory --------------------------------------------------------------------------------

/// Brings rows from host memory: packed into one of two pinned buffers, copied on a stream of its
/// own while the GPU works on what the other brought.
template <class T>
class __attribute__((visibility("hidden"))) staged_source {
  using integer = std::ptrdiff_t;
  static constexpr int used = 0, ready = 2, settled = 4;  // events; two, two, one

 public:
  using scalar = T;

  /// @param bytes  of a buffer, if a row of every site fits; at most 32 MiB
  staged_source(staging& own, cudaStream_t copies, cudaStream_t stream, layer_stack<T> const& stack,
                passes::arena& memory, std::size_t bytes)
      : own_(own), copies_(copies), stream_(stream), stack_(stack) {
    integer widest = 0;
    for (integer l = 0; l < sites(); ++l) {
      total_ += cols(l);
      widest = std::max(widest, cols(l));
    }
    integer const least = std::max(total_, widest * passes::sample_size(stack.size()));
    integer const all = stack.size() * total_;
    std::size_t const most = std::min(bytes, std::size_t{32} << 20) / sizeof(T);
    buffer_ = std::max(least, std::min(all, static_cast<integer>(most)));
    for (auto& place : buffers_) place = memory.reserve<T>(buffer_);
    for (auto& place : tables_) place = memory.reserve<passes::token_rows<T>>(sites());
  }
  staged_source(staged_source&&) = default;  // moved before start() only
  ~staged_source() {
    // Else the stream of the call has waited for every copy.
    if (device_[0] != nullptr && std::uncaught_exceptions() > exceptions_)
      static_cast<void>(cudaStreamSynchronize(copies_));
  }

  template <class Device>
  void start(Device&, passes::arena const& memory) {
    for (int k = 0; k < 2; ++k) {
      device_[k] = memory[buffers_[k]];
      table_[k] = memory[tables_[k]];
      pinned_[k] = reinterpret_cast<T*>(own_.pinned(k, passes::size_of(buffer_) * sizeof(T)));
    }
    // The copies' stream may not write before the memory is there.
    check(cudaEventRecord(own_.event(settled), stream_), "cudaEventRecord");
    check(cudaStreamWaitEvent(copies_, own_.event(settled), 0), "cudaStreamWaitEvent");
  }

  integer sites() const { return stack_.sites(); }
  integer cols(integer site) const { return stack_[site].cols; }
  integer most_rows(integer tokens) const {
    integer most = tokens;
    for (integer l = 0; l < sites(); ++l) most = std::min(most, buffer_ / cols(l));
    return most;
  }
  integer most_slab(integer tokens) const { return std::min(tokens, buffer_ / total_); }

  passes::slab_rows<T> slab(integer first, integer count) {
    int const k = take();
    std::vector<passes::token_rows<T>> rows;
    integer at = 0;
    for (integer l = 0; l < sites(); ++l) {
      pack(
          l, count, [&](integer i) { return first + i; }, pinned_[k] + at);
      rows.push_back(dense(device_[k] + at, cols(l)));
      at += count * cols(l);
    }
    send(k, at);
    check(cudaMemcpyAsync(table_[k], rows.data(), rows.size() * sizeof(rows[0]),
                          cudaMemcpyHostToDevice, stream_),
          "cudaMemcpyAsync");
    return {table_[k], 0};
  }
  passes::token_rows<T> rows(integer site, integer first, integer count) {
    return bring(site, count, [&](integer i) { return first + i; });
  }
  passes::token_rows<T> sample(integer site) {
    integer const n = stack_.size(), m = passes::sample_size(n);
    return bring(site, m, [&](integer i) { return i * n / m; });
  }
  void release() {
    for (; taken_ > 0; --taken_) {
      int const k = (next_ + 2 - taken_) % 2;
      check(cudaEventRecord(own_.event(used + k), stream_), "cudaEventRecord");
    }
  }

 private:
  static passes::token_rows<T> dense(T const* data, integer cols) {
    return {data, cols, 1, cols, nullptr};
  }

  /// The next buffer, once nothing uses it.
  int take() {
    int const k = next_;
    next_ = 1 - next_;
    ++taken_;
    check(cudaEventSynchronize(own_.event(used + k)), "cudaEventSynchronize");
    return k;
  }

  template <class Token>
  void pack(integer site, integer count, Token const& token, T* to) const {
    view<T> const& x = stack_[site];
    for (integer i = 0; i < count; ++i, to += x.cols) {
      T const* const from = x.data + stack_.token(token(i)) * x.row_stride;
      if (x.col_stride == 1)
        std::copy_n(from, x.cols, to);
      else
        for (integer j = 0; j < x.cols; ++j) to[j] = from[j * x.col_stride];
    }
  }

  void send(int k, integer count) {
    check(cudaMemcpyAsync(device_[k], pinned_[k], passes::size_of(count) * sizeof(T),
                          cudaMemcpyHostToDevice, copies_),
          "cudaMemcpyAsync");
    check(cudaEventRecord(own_.event(ready + k), copies_), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream_, own_.event(ready + k), 0), "cudaStreamWaitEvent");
  }

  template <class Token>
  passes::token_rows<T> bring(integer site, integer count, Token const& token) {
    int const k = take();
    pack(site, count, token, pinned_[k]);
    send(k, count * cols(site));
    return dense(device_[k], cols(site));
  }

  staging& own_;
  cudaStream_t copies_, stream_;
  layer_stack<T> const& stack_;
  integer total_ = 0, buffer_ = 0;
  passes::arena::place<T> buffers_[2];
  passes::arena::place<passes::token_rows<T>> tables_[2];
  T *device_[2] = {}, *pinned_[2] = {};
  passes::token_rows<T>* table_[2] = {};
  int next_ = 0, taken_ = 0, exceptions_ = std::uncaught_exceptions();
};

// ---- the device ---------------------------------------------------------------------------------

/// A stream of a GPU, for one call.
class __attribute__((visibility("hidden"))) cuda_device {
  using integer = std::ptrdiff_t;

 public:
  using group = warp;

  static constexpr integer column_slices = 64;
  static constexpr integer panel_bytes = integer{64} << 10;
  static constexpr integer most_side = 8192;
  template <class C>
  static constexpr integer side_multiple = 64;
  template <class C>
  static constexpr integer depth_multiple = 16;

  cuda_device(cuda_context& context, cudaStream_t stream, bool tf32)
      : context_(context), stream_(stream != nullptr ? stream : context.stream()), tf32_(tf32) {}

  /// Memory of the context's pool. Given back in the order of the stream.
  class memory {
   public:
    memory(cuda_context& context, cudaStream_t stream, std::size_t bytes) : stream_(stream) {
      cudaError_t const error = cudaMallocFromPoolAsync(&data_, bytes, context.pool(), stream);
      check(error, "cudaMallocFromPoolAsync of " + std::to_string(bytes) +
                       " bytes (on_cuda::memory_bound limits them)");
    }
    ~memory() { static_cast<void>(cudaFreeAsync(data_, stream_)); }
    memory(memory const&) = delete;
    memory& operator=(memory const&) = delete;

    std::byte* data() const { return static_cast<std::byte*>(data_); }

   private:
    void* data_ = nullptr;
    cudaStream_t stream_;
  };

  memory allocate(std::size_t bytes) { return memory(context_, stream_, bytes); }

  template <class F>
  void each_index(integer count, F const& f) {
    thrust::for_each_n(thrust::cuda::par_nosync.on(stream_), thrust::counting_iterator<integer>(0),
                       count, hidden<F>{f});
  }
  template <class F>
  void each_group(integer count, F const& f) {
    if (count == 0) return;
    integer const blocks = passes::ceil_div(count, integer{warps_per_block});
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min<integer>(blocks, 1 << 20)));
    config.blockDim = dim3(warps_per_block * warp::size);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, run_warps<F>, count, f), "cudaLaunchKernelEx");
  }

  template <class V>
  void upload(V const* from, integer count, V* to) {
    copy(from, count * integer{sizeof(V)}, to, cudaMemcpyHostToDevice);
  }
  template <class V>
  void download(V const* from, integer count, V* to) {
    copy(from, count * integer{sizeof(V)}, to, cudaMemcpyDeviceToHost);
  }
  template <class V>
  void zero(V* to, integer count) {
    check(cudaMemsetAsync(to, 0, passes::size_of(count) * sizeof(V), stream_), "cudaMemsetAsync");
  }
  void wait() { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

  template <class T>
  passes::direct_source<T> source(layer_stack<T, device_memory> const& stack, passes::arena& places,
                                  std::size_t) {
    return {stack, places};
  }
  template <class T>
  staged_source<T> source(layer_stack<T, host_memory> const& stack, passes::arena& places,
                          std::size_t memory_bound) {
    return {
        context_.staging(staged_++), context_.copies(), stream_, stack, places, memory_bound / 8};
  }

  /// out(i, j) = Σ_k rows(i, k) cols(j, k). Panels are row-major, which BLAS calls transposed.
  template <class C>
  void product(C const* rows, C const* cols, integer side, integer depth, bool accumulate,
               bool lower, C* out) {
    int const n = static_cast<int>(side), k = static_cast<int>(depth);
    C const one = 1, start = accumulate ? C(1) : C(0);
    cublasHandle_t const handle = blas();
    if constexpr (std::same_as<C, float>) {
      if (lower)
        check(cublasSsyrk(handle, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_T, n, k, &one, rows, k, &start,
                          out, n),
              "cublasSsyrk");
      else
        check(cublasSgemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, n, n, k, &one, rows, k, cols, k, &start,
                          out, n),
              "cublasSgemm");
    } else {
      if (lower)
        check(cublasDsyrk(handle, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_T, n, k, &one, rows, k, &start,
                          out, n),
              "cublasDsyrk");
      else
        check(cublasDgemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, n, n, k, &one, rows, k, cols, k, &start,
                          out, n),
              "cublasDgemm");
    }
  }

  /// Products of all pairs of sites, slice by slice of their tiles.
  template <class C>
  void pair_products(C const* tiles, integer sites, integer area, integer slice, C* out) {
    int const s = static_cast<int>(sites), k = static_cast<int>(slice);
    int const stride = static_cast<int>(area), slices = static_cast<int>(area / slice);
    C const one = 1, nothing = 0;
    cublasHandle_t const handle = blas();
    if constexpr (std::same_as<C, float>)
      check(cublasSgemmStridedBatched(handle, CUBLAS_OP_T, CUBLAS_OP_N, s, s, k, &one, tiles,
                                      stride, slice, tiles, stride, slice, &nothing, out, s,
                                      sites * sites, slices),
            "cublasSgemmStridedBatched");
    else
      check(cublasDgemmStridedBatched(handle, CUBLAS_OP_T, CUBLAS_OP_N, s, s, k, &one, tiles,
                                      stride, slice, tiles, stride, slice, &nothing, out, s,
                                      sites * sites, slices),
            "cublasDgemmStridedBatched");
  }

 private:
  void copy(void const* from, integer bytes, void* to, cudaMemcpyKind kind) {
    if (bytes > 0)
      check(cudaMemcpyAsync(to, from, passes::size_of(bytes), kind, stream_), "cudaMemcpyAsync");
  }

  cublasHandle_t blas() {
    cublasHandle_t const handle = context_.blas();
    check(cublasSetStream(handle, stream_), "cublasSetStream");
    check(cublasSetWorkspace(handle, context_.workspace(), cuda_context::workspace_bytes),
          "cublasSetWorkspace");  // setting a stream forgets it
    check(cublasSetMathMode(handle, tf32_ ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_DEFAULT_MATH),
          "cublasSetMathMode");
    return handle;
  }

  cuda_context& context_;
  cudaStream_t stream_;
  bool tf32_;
  std::size_t staged_ = 0;  // stacks in host memory so far
};

}  // namespace detail

// ---- the backend --------------------------------------------------------------------------------

namespace detail {

template <class First, class... Rest>
constexpr void require_one_memory() {
  static_assert((std::same_as<First, Rest> && ...),
                "rflow: the stacks live in different memory spaces. Copy one of them to where the "
                "other lives");
}

}  // namespace detail

/// Runs on a GPU. Results are on the host when a call returns: it has waited for its own stream, and
/// for nothing else. Data that another stream is still writing has to be waited for before.
///
/// Keep one on_cuda for many calls: its copies share a cuBLAS handle, a pool of device memory and
/// pinned buffers, all made when first wanted. Calls that share them take turns.
struct __attribute__((visibility("hidden"))) on_cuda {
  cudaStream_t stream = nullptr;  ///< null: a stream of its own
  int device = -1;                ///< −1: the current one
  std::size_t memory_bound = std::size_t{1}
                             << 30;       ///< bytes of device memory, beside cuBLAS's 32 MiB
  bool tf32 = false;                      ///< let tensor cores round products to 11 bits
  gram_path path = gram_path::automatic;  ///< automatic always takes kernel matrices
  std::shared_ptr<detail::cuda_context> context = std::make_shared<detail::cuda_context>();

  template <class Memory>
  static constexpr bool reads =
      std::same_as<Memory, device_memory> || std::same_as<Memory, host_memory>;

  /// @note   reads device memory twice: norms first, then sums of unit vectors
  /// @throws std::invalid_argument if the memory bound is too small for the sites; cuda_error with
  ///         the library's code and text
  template <class T, class Memory>
  flow_moments flow(layer_stack<T, Memory> const& stack, flow_sink const& sink = {}) const {
    std::scoped_lock const turn(context->mutex);
    detail::device_scope const scope(device);
    detail::cuda_device on(*context, stream, tf32);
    return detail::passes::flow("rflow::on_cuda::flow", on, stack, sink, memory_bound);
  }

  /// Kernels are linear{} and rbf{}.
  /// @note   S n² d multiply-adds. Host memory is read four times or more
  /// @throws std::invalid_argument if the stacks differ in tokens, the memory bound is too small for
  ///         one tile, or path is gram_path::feature; cuda_error with the library's code and text
  template <class Kernel, class... T, class... Memory>
  gram_moments gram(Kernel const& kernel, layer_stack<T, Memory> const&... stacks) const {
    detail::require_one_memory<Memory...>();
    static_assert(std::same_as<Kernel, linear> || std::same_as<Kernel, rbf>,
                  "rflow: on_cuda has the kernels linear and rbf; one of yours runs on on_cpu");
    constexpr char const* where = "rflow::on_cuda::gram";
    detail::passes::require_tiles(where, path);
    std::scoped_lock const turn(context->mutex);
    detail::device_scope const scope(device);
    detail::cuda_device on(*context, stream, tf32);
    gram_moments m = detail::passes::gram(where, on, memory_bound, tf32, kernel, stacks...);
    if (tf32 && m.epsilon > 0x1p-30) {  // products of float
      for (double& x : m.entry_rounding) x *= 0x1p-11 / m.epsilon;
      m.epsilon = 0x1p-11;
      m.accuracy = 1e-2;
    }
    return m;
  }
};

/// What lives on a device is measured there.
template <>
struct default_backend<device_memory> {
  using type = on_cuda;  ///< the backend
};

// ---- pointers that say where they point ---------------------------------------------------------

/// A view of device memory, after asking CUDA whether the pointer is one.
///
/// @param  row_stride, col_stride  in elements, as in view
/// @throws std::invalid_argument if the pointer is to host memory; cuda_error if CUDA cannot tell
template <class T>
view<T, device_memory> checked_device_view(T const* data, std::ptrdiff_t rows, std::ptrdiff_t cols,
                                           std::ptrdiff_t row_stride,
                                           std::ptrdiff_t col_stride = 1) {
  cudaPointerAttributes attributes{};
  detail::check(cudaPointerGetAttributes(&attributes, data), "cudaPointerGetAttributes");
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
    detail::reject("rflow::checked_device_view",
                   "the pointer is to host memory; call it without device_memory, or copy first");
  return {data, rows, cols, row_stride, col_stride};
}
template <class T>
view<T, device_memory> checked_device_view(T const* data, std::ptrdiff_t rows,
                                           std::ptrdiff_t cols) {
  return checked_device_view(data, rows, cols, cols);
}

/// The same of a view that says so already, such as one that came through DLPack.
template <class T>
view<T, device_memory> checked_device_view(view<T, device_memory> const& x) {
  return checked_device_view(x.data, x.rows, x.cols, x.row_stride, x.col_stride);
}

/// The same of a container whose data().get() is a device pointer, such as thrust::device_vector.
/// @throws std::invalid_argument if it holds another number of values
template <class Container>
requires requires(Container const& c) {
  *c.data().get();
  { c.size() } -> std::convertible_to<std::size_t>;
}
auto checked_device_view(Container const& values, std::ptrdiff_t rows, std::ptrdiff_t cols) {
  if (rows < 0 || cols < 0 || static_cast<std::size_t>(rows * cols) != values.size())
    detail::reject("rflow::checked_device_view", std::to_string(values.size()) +
                                                     " values do not make " + std::to_string(rows) +
                                                     " x " + std::to_string(cols));
  return checked_device_view(values.data().get(), rows, cols);
}

}  // namespace rflow
