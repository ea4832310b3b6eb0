// SPDX-License-Identifier: Apache-2.0
// The entry points of CUDA's runtime and of cuBLAS that cuda.cuh uses, on the CPU. Device memory is
// host memory, filled with NaN; copies and products check that what they touch is where they say.
// Work is done when it is asked for: the order of streams is not shown by this, arithmetic, layouts,
// arguments and error handling are.
#include "standin.hpp"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include <Eigen/Core>

#include <cublas_v2.h>
#include <cuda_runtime.h>

// ---- lanes --------------------------------------------------------------------------------------

namespace standin {
namespace {

constexpr int lanes = 32;
constexpr std::size_t stack_bytes = std::size_t{256} << 10;

struct lane_state {
  ucontext_t start;
  jmp_buf at;
  bool started, done;
  int turn;
  std::vector<char> stack;
};

lane_state lane[lanes];
jmp_buf scheduler;
ucontext_t home;
int current = 0;
unsigned first_thread = 0;
std::function<void()> const* work = nullptr;
double mail[2][lanes];

void enter() {
  (*work)();
  lane[current].done = true;
  _longjmp(scheduler, 1);
}

void run_warp() {
  for (lane_state& l : lane) {
    l.started = l.done = false;
    l.turn = 0;
  }
  for (bool left = true; left;) {
    left = false;
    for (current = 0; current < lanes; ++current) {
      lane_state& l = lane[current];
      if (l.done) continue;
      left = true;
      threadIdx.x = first_thread + static_cast<unsigned>(current);
      if (_setjmp(scheduler) != 0) continue;
      if (l.started) _longjmp(l.at, 1);
      l.started = true;
      l.stack.resize(stack_bytes);
      getcontext(&l.start);
      l.start.uc_stack.ss_sp = l.stack.data();
      l.start.uc_stack.ss_size = l.stack.size();
      l.start.uc_link = nullptr;
      makecontext(&l.start, enter, 0);
      swapcontext(&home, &l.start);
    }
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, std::function<void()> const& thread) {
  work = &thread;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (first_thread = 0; first_thread < block.x; first_thread += lanes) run_warp();
}

void meet() {
  if (_setjmp(lane[current].at) == 0) _longjmp(scheduler, 1);
}

double& mailbox(int which, int turn) { return mail[turn][which]; }
int& turn() { return lane[current].turn; }

// ---- faults and what is alive -------------------------------------------------------------------

namespace {

int failing_call = 0, call_count = 0, handles = 0;
std::map<std::byte*, std::size_t> device_blocks, pinned_blocks;

bool fault() {
  ++call_count;
  return call_count == failing_call;
}

/// Whether bytes from p on lie in one block.
bool within(std::map<std::byte*, std::size_t> const& blocks, void const* p, std::size_t bytes) {
  auto* const at = static_cast<std::byte*>(const_cast<void*>(p));
  auto block = blocks.upper_bound(at);
  if (block == blocks.begin()) return false;
  --block;
  return at + bytes <= block->first + block->second;
}
bool on_device(void const* p, std::size_t bytes) { return within(device_blocks, p, bytes); }

// A block ends where no memory is, and stays without memory after its life: whoever writes past the
// end or too late is stopped there.
constexpr std::size_t page = 4096, alignment = 256;
std::size_t pages_of(std::size_t bytes) { return (bytes + page - 1) / page * page; }

cudaError_t allocate(std::map<std::byte*, std::size_t>& blocks, void** p, std::size_t bytes) {
  void* const memory = mmap(nullptr, pages_of(bytes) + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
  auto* const end = static_cast<std::byte*>(memory) + pages_of(bytes);
  mprotect(end, page, PROT_NONE);
  auto* const data = end - (bytes + alignment - 1) / alignment * alignment;
  std::memset(data, 0xff, bytes);
  blocks[data] = bytes;
  *p = data;
  return cudaSuccess;
}
cudaError_t release(std::map<std::byte*, std::size_t>& blocks, void* p) {
  if (p == nullptr) return cudaSuccess;
  auto const block = blocks.find(static_cast<std::byte*>(p));
  if (block == blocks.end()) return cudaErrorInvalidValue;
  std::size_t const used = (block->second + alignment - 1) / alignment * alignment;
  std::byte* const begin = block->first + used - pages_of(block->second);
  mmap(begin, pages_of(block->second), PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  blocks.erase(block);
  return cudaSuccess;
}

template <class Handle>
void make(Handle* h) {
  *h = reinterpret_cast<Handle>(static_cast<std::uintptr_t>(++handles + 4096));
}
template <class Handle>
cudaError_t destroy(Handle h) {
  if (h == nullptr) return cudaErrorInvalidResourceHandle;
  --handles;
  return cudaSuccess;
}

}  // namespace

cudaError_t cuda_fault() { return fault() ? cudaErrorLaunchFailure : cudaSuccess; }
void fail_at(int k) {
  failing_call = k;
  call_count = 0;
}
int calls() { return call_count; }
int alive() { return handles + static_cast<int>(device_blocks.size() + pinned_blocks.size()); }

}  // namespace standin

// ---- CUDA's runtime -----------------------------------------------------------------------------

using standin::fault;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  if (fault()) return cudaErrorInitializationError;
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (fault()) return cudaErrorInitializationError;
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
char const* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheStandIn"; }
char const* cudaGetErrorString(cudaError_t) { return "the stand-in was told to fail"; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  if (fault()) return cudaErrorMemoryAllocation;
  if (flags != cudaStreamNonBlocking) return cudaErrorInvalidValue;
  standin::make(s);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) { return standin::destroy(s); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (fault()) return cudaErrorLaunchFailure;
  return s != nullptr ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  if (fault()) return cudaErrorLaunchFailure;
  return s != nullptr && e != nullptr ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  if (fault()) return cudaErrorMemoryAllocation;
  standin::make(e);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) { return standin::destroy(e); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  if (fault()) return cudaErrorLaunchFailure;
  return s != nullptr && e != nullptr ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  if (fault()) return cudaErrorLaunchFailure;
  return e != nullptr ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* p, cudaMemPoolProps const*) {
  if (fault()) return cudaErrorMemoryAllocation;
  standin::make(p);
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t p) { return standin::destroy(p); }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return fault() ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaMallocFromPoolAsync(void** p, std::size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t stream) {
  if (fault()) return cudaErrorMemoryAllocation;
  if (pool == nullptr || stream == nullptr) return cudaErrorInvalidValue;
  return standin::allocate(standin::device_blocks, p, bytes);
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
  return standin::release(standin::device_blocks, p);
}
cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  if (fault()) return cudaErrorMemoryAllocation;
  return standin::allocate(standin::device_blocks, p, bytes);
}
cudaError_t cudaFree(void* p) { return standin::release(standin::device_blocks, p); }
cudaError_t cudaMallocHost(void** p, std::size_t bytes) {
  if (fault()) return cudaErrorMemoryAllocation;
  return standin::allocate(standin::pinned_blocks, p, bytes);
}
cudaError_t cudaFreeHost(void* p) { return standin::release(standin::pinned_blocks, p); }

cudaError_t cudaMemcpy(void* to, void const* from, std::size_t bytes, cudaMemcpyKind kind) {
  if (fault()) return cudaErrorLaunchFailure;
  bool const right = kind == cudaMemcpyHostToDevice
                         ? standin::on_device(to, bytes) && !standin::on_device(from, 1)
                         : standin::on_device(from, bytes) && !standin::on_device(to, 1);
  if (!right) return cudaErrorInvalidValue;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, void const* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return stream != nullptr ? cudaMemcpy(to, from, bytes, kind) : cudaErrorInvalidResourceHandle;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  if (fault()) return cudaErrorLaunchFailure;
  if (stream == nullptr || !standin::on_device(to, bytes)) return cudaErrorInvalidValue;
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, void const* p) {
  if (fault()) return cudaErrorInvalidValue;
  *out = {};
  out->type = standin::on_device(p, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

}  // extern "C"

// ---- cuBLAS -------------------------------------------------------------------------------------

namespace {

/// op(x), column-major, as BLAS defines it.
template <class C>
using matrix = Eigen::Matrix<C, Eigen::Dynamic, Eigen::Dynamic>;

template <class C>
bool readable(C const* x, int rows, int cols, int ld) {
  if (ld < std::max(1, rows)) return false;
  if (rows == 0 || cols == 0) return true;
  auto const last = static_cast<std::size_t>(cols - 1) * static_cast<std::size_t>(ld) +
                    static_cast<std::size_t>(rows);
  return standin::on_device(x, last * sizeof(C));
}

template <class C>
matrix<C> operand(cublasOperation_t op, C const* x, int rows, int cols, int ld) {
  bool const flip = op != CUBLAS_OP_N;
  Eigen::Map<matrix<C> const, 0, Eigen::OuterStride<>> const stored(
      x, flip ? cols : rows, flip ? rows : cols, Eigen::OuterStride<>(ld));
  return flip ? matrix<C>(stored.transpose()) : matrix<C>(stored);
}

template <class C>
cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                    int n, int k, C const* alpha, C const* a, int lda, C const* b, int ldb,
                    C const* beta, C* c, int ldc) {
  if (fault()) return CUBLAS_STATUS_EXECUTION_FAILED;
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  bool const fits = m >= 0 && n >= 0 && k >= 0 &&
                    readable(a, op_a == CUBLAS_OP_N ? m : k, op_a == CUBLAS_OP_N ? k : m, lda) &&
                    readable(b, op_b == CUBLAS_OP_N ? k : n, op_b == CUBLAS_OP_N ? n : k, ldb) &&
                    readable(c, m, n, ldc);
  if (!fits) return CUBLAS_STATUS_INVALID_VALUE;
  matrix<C> const product = *alpha * (operand(op_a, a, m, k, lda) * operand(op_b, b, k, n, ldb));
  Eigen::Map<matrix<C>, 0, Eigen::OuterStride<>> out(c, m, n, Eigen::OuterStride<>(ldc));
  if (*beta == C(0))
    out = product;  // what was there is not read
  else
    out = *beta * matrix<C>(out) + product;
  return CUBLAS_STATUS_SUCCESS;
}

template <class C>
cublasStatus_t syrk(cublasHandle_t handle, cublasFillMode_t fill, cublasOperation_t op, int n,
                    int k, C const* alpha, C const* a, int lda, C const* beta, C* c, int ldc) {
  if (fault()) return CUBLAS_STATUS_EXECUTION_FAILED;
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (n < 0 || k < 0 || !readable(c, n, n, ldc) ||
      !readable(a, op == CUBLAS_OP_N ? n : k, op == CUBLAS_OP_N ? k : n, lda))
    return CUBLAS_STATUS_INVALID_VALUE;
  matrix<C> const x = operand(op, a, n, k, lda);
  matrix<C> const product = *alpha * (x * x.transpose());
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < n; ++i) {
      if (fill == CUBLAS_FILL_MODE_LOWER ? i < j : i > j) continue;  // the other half stays
      C& to = c[static_cast<std::ptrdiff_t>(j) * ldc + i];
      to = product(i, j) + (*beta == C(0) ? C(0) : *beta * to);
    }
  return CUBLAS_STATUS_SUCCESS;
}

template <class C>
cublasStatus_t batched(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                       int n, int k, C const* alpha, C const* a, int lda, long long step_a,
                       C const* b, int ldb, long long step_b, C const* beta, C* c, int ldc,
                       long long step_c, int count) {
  for (int i = 0; i < count; ++i)
    if (cublasStatus_t const s = gemm(handle, op_a, op_b, m, n, k, alpha, a + i * step_a, lda,
                                      b + i * step_b, ldb, beta, c + i * step_c, ldc);
        s != CUBLAS_STATUS_SUCCESS)
      return s;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t* h) {
  if (fault()) return CUBLAS_STATUS_ALLOC_FAILED;
  standin::make(h);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t h) {
  return standin::destroy(h) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
  if (fault()) return CUBLAS_STATUS_INTERNAL_ERROR;
  return h != nullptr && s != nullptr ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void* p, std::size_t bytes) {
  if (fault()) return CUBLAS_STATUS_INTERNAL_ERROR;
  if (h == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  return standin::on_device(p, bytes) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) {
  return fault() ? CUBLAS_STATUS_INTERNAL_ERROR : CUBLAS_STATUS_SUCCESS;
}
char const* cublasGetStatusName(cublasStatus_t) { return "CUBLAS_STATUS_OF_THE_STAND_IN"; }
char const* cublasGetStatusString(cublasStatus_t) { return "the stand-in was told to fail"; }

cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                              int n, int k, float const* alpha, float const* a, int lda,
                              float const* b, int ldb, float const* beta, float* c, int ldc) {
  return gemm(h, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
cublasStatus_t cublasDgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                              int n, int k, double const* alpha, double const* a, int lda,
                              double const* b, int ldb, double const* beta, double* c, int ldc) {
  return gemm(h, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
cublasStatus_t cublasSsyrk_v2(cublasHandle_t h, cublasFillMode_t f, cublasOperation_t t, int n,
                              int k, float const* alpha, float const* a, int lda, float const* beta,
                              float* c, int ldc) {
  return syrk(h, f, t, n, k, alpha, a, lda, beta, c, ldc);
}
cublasStatus_t cublasDsyrk_v2(cublasHandle_t h, cublasFillMode_t f, cublasOperation_t t, int n,
                              int k, double const* alpha, double const* a, int lda,
                              double const* beta, double* c, int ldc) {
  return syrk(h, f, t, n, k, alpha, a, lda, beta, c, ldc);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta,
                                         cublasOperation_t tb, int m, int n, int k,
                                         float const* alpha, float const* a, int lda,
                                         long long step_a, float const* b, int ldb,
                                         long long step_b, float const* beta, float* c, int ldc,
                                         long long step_c, int count) {
  return batched(h, ta, tb, m, n, k, alpha, a, lda, step_a, b, ldb, step_b, beta, c, ldc, step_c,
                 count);
}
cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta,
                                         cublasOperation_t tb, int m, int n, int k,
                                         double const* alpha, double const* a, int lda,
                                         long long step_a, double const* b, int ldb,
                                         long long step_b, double const* beta, double* c, int ldc,
                                         long long step_c, int count) {
  return batched(h, ta, tb, m, n, k, alpha, a, lda, step_a, b, ldb, step_b, beta, c, ldc, step_c,
                 count);
}

}  // extern "C"
