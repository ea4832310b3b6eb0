# SPDX-License-Identifier: Apache-2.0
# rflow::blas: a BLAS with its C interface. BLA_VENDOR chooses among those installed, as CMake's
# FindBLAS has it; RFLOW_CBLAS_INCLUDE_DIR says where its cblas.h is, if that is not found.
if(NOT TARGET rflow_blas_library)
  find_package(BLAS QUIET)
  find_path(RFLOW_CBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas blis mkl)
  mark_as_advanced(RFLOW_CBLAS_INCLUDE_DIR)
  if(BLAS_FOUND AND RFLOW_CBLAS_INCLUDE_DIR)
    add_library(rflow_blas_library INTERFACE IMPORTED GLOBAL)
    target_include_directories(rflow_blas_library SYSTEM INTERFACE ${RFLOW_CBLAS_INCLUDE_DIR})
    target_link_libraries(rflow_blas_library INTERFACE BLAS::BLAS ${CMAKE_DL_LIBS})
  endif()
endif()
if(TARGET rflow_blas_library)
  set(rflow_blas_FOUND TRUE)
else()
  set(rflow_blas_FOUND FALSE)
  set(rflow_blas_NOT_FOUND_MESSAGE
      "rflow::blas needs a BLAS and its cblas.h (Debian: libopenblas-dev)")
endif()
