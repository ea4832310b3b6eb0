# SPDX-License-Identifier: Apache-2.0
# rflow::thrust: Thrust's headers, from a CUDA toolkit or from Debian's libthrust-dev. Which of
# Thrust's systems a program uses is its own affair: OpenMP needs -fopenmp, TBB its library.
if(NOT TARGET rflow_thrust_headers)
  find_package(Thrust QUIET CONFIG HINTS ENV CUDA_PATH ENV CUDA_HOME /usr/local/cuda
               PATH_SUFFIXES lib64/cmake/thrust)
endif()
if(Thrust_FOUND OR TARGET rflow_thrust_headers)
  set(rflow_thrust_FOUND TRUE)
  if(NOT TARGET rflow_thrust_headers)
    add_library(rflow_thrust_headers INTERFACE IMPORTED GLOBAL)
    get_target_property(rflow_thrust_include Thrust::Thrust INTERFACE_INCLUDE_DIRECTORIES)
    target_include_directories(rflow_thrust_headers SYSTEM INTERFACE ${rflow_thrust_include})
    # Else a plain C++ compiler looks for CUDA; under nvcc these macros would break Thrust.
    target_compile_definitions(rflow_thrust_headers INTERFACE
      $<$<COMPILE_LANGUAGE:CXX>:THRUST_HOST_SYSTEM=THRUST_HOST_SYSTEM_CPP>
      $<$<COMPILE_LANGUAGE:CXX>:THRUST_DEVICE_SYSTEM=THRUST_DEVICE_SYSTEM_CPP>)
  endif()
else()
  set(rflow_thrust_FOUND FALSE)
  set(rflow_thrust_NOT_FOUND_MESSAGE
      "rflow::thrust needs Thrust (a CUDA toolkit, or Debian's libthrust-dev)")
endif()
