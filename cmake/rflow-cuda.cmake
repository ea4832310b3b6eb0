# SPDX-License-Identifier: Apache-2.0
# rflow::cuda: a CUDA toolkit with cuBLAS. CMake before 3.26 does not know C++20 for nvcc.
if(NOT TARGET rflow_cuda_toolkit)
  find_package(CUDAToolkit 12 QUIET)
  if(CUDAToolkit_FOUND AND TARGET CUDA::cublas)
    add_library(rflow_cuda_toolkit INTERFACE IMPORTED GLOBAL)
    target_link_libraries(rflow_cuda_toolkit INTERFACE CUDA::cublas)
    target_compile_options(rflow_cuda_toolkit INTERFACE
      $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:-std=c++20>)
    target_compile_definitions(rflow_cuda_toolkit INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:EIGEN_NO_CUDA>)
  endif()
endif()
if(TARGET rflow_cuda_toolkit)
  set(rflow_cuda_FOUND TRUE)
else()
  set(rflow_cuda_FOUND FALSE)
  set(rflow_cuda_NOT_FOUND_MESSAGE "rflow::cuda needs a CUDA toolkit, 12 or newer, with cuBLAS")
endif()
