// SPDX-License-Identifier: Apache-2.0
// The oracle on on_cuda over host memory: on a GPU, or on the stand-ins for CUDA and cuBLAS.
#include "../cuda/device.hpp"
#include "oracle.hpp"

int main(int argc, char** argv) {
  std::string why_not;
  if (device::count(why_not) == 0) {
    std::printf("skipped: there is no GPU (%s)\n", why_not.c_str());
    return 77;
  }
  return oracle::run<device::staged, false>(argc, argv, "on_cuda");
}
