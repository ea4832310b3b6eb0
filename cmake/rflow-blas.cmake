# SPDX-License-Identifier: Apache-2.0
# rflow::blas: a BLAS with its C interface. BLA_VENDOR chooses among those installed, as CMake's
# FindBLAS has it; RFLOW_CBLAS_INCLUDE_DIR says where its cblas.h is, if that is not found.
if(NOT TARGET rflow_blas_library)
  find_package(BLAS QUIET)
  find_path(RFLOW_CBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas blis mkl)
  mark_as_advanced(RFLOW_CBLAS_INCLUDE_DIR)
  set(rflow_blas_FOUND FALSE)
  if(BLAS_FOUND AND EXISTS "${RFLOW_CBLAS_INCLUDE_DIR}/cblas.h")
    # Not every BLAS has the C interface, and a cache remembers what has gone since: a program decides, but for a
    # library that the project builds itself.
    get_target_property(rflow_blas_imported BLAS::BLAS IMPORTED)
    if(rflow_blas_imported)
      if(NOT TARGET rflow_cblas_header)
        add_library(rflow_cblas_header INTERFACE IMPORTED)
      endif()
      set_target_properties(rflow_cblas_header PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${RFLOW_CBLAS_INCLUDE_DIR}")
      try_compile(rflow_blas_FOUND
        SOURCE_FROM_CONTENT cblas.cpp "#include <cblas.h>\nint main() { return cblas_ddot(0, nullptr, 1, nullptr, 1) != 0; }\n"
        LINK_LIBRARIES BLAS::BLAS rflow_cblas_header
        NO_CACHE)
    else()
      set(rflow_blas_FOUND TRUE)
    endif()
  endif()
  if(rflow_blas_FOUND)
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
