# SPDX-License-Identifier: Apache-2.0
# rflow::optimum: L-BFGS from LBFGS++, which is headers on Eigen and has no CMake package in Debian.
if(NOT TARGET rflow_lbfgspp)
  find_path(rflow_LBFGSPP_INCLUDE_DIR LBFGS.h)
  mark_as_advanced(rflow_LBFGSPP_INCLUDE_DIR)
  if(EXISTS "${rflow_LBFGSPP_INCLUDE_DIR}/LBFGS.h")  # the cache remembers what has gone since
    add_library(rflow_lbfgspp INTERFACE IMPORTED GLOBAL)
    target_include_directories(rflow_lbfgspp SYSTEM INTERFACE ${rflow_LBFGSPP_INCLUDE_DIR})
  endif()
endif()
if(TARGET rflow_lbfgspp)
  set(rflow_optimum_FOUND TRUE)
else()
  set(rflow_optimum_FOUND FALSE)
  set(rflow_optimum_NOT_FOUND_MESSAGE "rflow::optimum needs LBFGS++ (Debian: liblbfgspp-dev)")
endif()
