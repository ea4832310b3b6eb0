# SPDX-License-Identifier: Apache-2.0
# rflow::mpi: an MPI library; the C interface is all it takes.
if(NOT TARGET MPI::MPI_CXX)
  set(MPI_CXX_SKIP_MPICXX TRUE)
  find_package(MPI QUIET COMPONENTS CXX)
endif()
if(TARGET MPI::MPI_CXX)
  set(rflow_mpi_FOUND TRUE)
else()
  set(rflow_mpi_FOUND FALSE)
  set(rflow_mpi_NOT_FOUND_MESSAGE "rflow::mpi needs MPI (Debian: libopenmpi-dev, openmpi-bin)")
endif()
