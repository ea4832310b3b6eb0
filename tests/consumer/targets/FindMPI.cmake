# SPDX-License-Identifier: Apache-2.0
# As CMake's own where there is no MPI: the target, and that it was not found.
if(NOT TARGET MPI::MPI_CXX)
  add_library(MPI::MPI_CXX INTERFACE IMPORTED)
  set_property(TARGET MPI::MPI_CXX PROPERTY INTERFACE_INCLUDE_DIRECTORIES "")
endif()
set(MPI_CXX_FOUND FALSE)
set(MPI_FOUND FALSE)
