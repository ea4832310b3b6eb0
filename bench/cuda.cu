// SPDX-License-Identifier: Apache-2.0
// The flow pass and the Gram pass on a GPU beside what the GPU can do, measured in the same run: a
// copy of the activations within the device's memory, and cuBLAS products of the shapes that the
// Gram pass needs. Says so and exits with 77 where there is no GPU.
//
// usage: rflow_bench_cuda [sites tokens width]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <rflow/cuda.cuh>

namespace {

using rflow::detail::check;
using integer = std::ptrdiff_t;

struct release {
  void operator()(float* p) const { static_cast<void>(cudaFree(p)); }
};
using array = std::unique_ptr<float, release>;

array make(integer count) {
  void* p = nullptr;
  check(cudaMalloc(&p, static_cast<std::size_t>(count) * sizeof(float)), "cudaMalloc");
  return array(static_cast<float*>(p));
}

/// Seconds of the best of some runs, by events on the stream; work that waits on the host is timed
/// with it.
template <class F>
double seconds(cudaStream_t stream, F const& run) {
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  double best = 1e9;
  for (int r = 0; r < 6; ++r) {  // the first one warms up
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    run();
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (r > 0) best = std::min(best, static_cast<double>(milliseconds) / 1000);
  }
  check(cudaEventDestroy(begin), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  return best;
}

/// Values in [−1, 1) that differ from site to site, without a random generator on the device.
std::vector<float> values(integer count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  unsigned state = 1;
  for (float& v : out) {
    state = state * 1664525u + 1013904223u;
    v = static_cast<float>(state >> 8) / 8388608.f - 1.f;
  }
  return out;
}

void measure(integer sites, integer tokens, integer width) {
  integer const count = sites * tokens * width;
  double const bytes = static_cast<double>(count) * sizeof(float);
  array const x = make(count), y = make(count), k = make(tokens * tokens);
  std::vector<float> const host = values(count);
  check(cudaMemcpy(x.get(), host.data(), host.size() * sizeof(float), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  rflow::on_cuda on;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  on.stream = stream;
  rflow::layer_stack<float, rflow::device_memory> const stack(x.get(), {sites, tokens, width});

  double const copy = seconds(stream, [&] {
    check(cudaMemcpyAsync(y.get(), x.get(), static_cast<std::size_t>(bytes),
                          cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
  });
  double const flow = seconds(stream, [&] { on.flow(stack); });
  std::printf("copy       %8.3f ms  %7.1f GB/s read and written\n", copy * 1e3,
              2 * bytes / copy / 1e9);
  std::printf("flow       %8.3f ms  %7.1f GB/s read (twice), %.2f of the copy's rate\n", flow * 1e3,
              2 * bytes / flow / 1e9, copy / flow);

  cublasHandle_t const blas = on.context->blas();
  check(cublasSetStream(blas, stream), "cublasSetStream");
  int const n = static_cast<int>(tokens), d = static_cast<int>(width);
  float const one = 1, nothing = 0;
  double const product = seconds(stream, [&] {
    check(cublasSsyrk(blas, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_T, n, d, &one, x.get(), d, &nothing,
                      k.get(), n),
          "cublasSsyrk");
  });
  double const gram = seconds(stream, [&] { on.gram(rflow::linear{}, stack); });
  double const work = static_cast<double>(sites) * static_cast<double>(tokens) *
                      static_cast<double>(tokens) * static_cast<double>(width);
  std::printf("products   %8.3f ms  %7.2f Tflop/s, one cublasSsyrk a site\n",
              product * static_cast<double>(sites) * 1e3,
              work / (product * static_cast<double>(sites)) / 1e12);
  std::printf("linear CKA %8.3f ms  %7.2f Tflop/s, %.2f of the products' rate\n", gram * 1e3,
              work / gram / 1e12, product * static_cast<double>(sites) / gram);
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaError_t const error = cudaGetDeviceCount(&devices);
      error != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU (%s)\n", cudaGetErrorString(error));
    return 77;
  }
  auto const argument = [&](int i, integer otherwise) {
    return argc > i ? static_cast<integer>(std::atoll(argv[i])) : otherwise;
  };
  measure(argument(1, 33), argument(2, 2048), argument(3, 2560));
}
