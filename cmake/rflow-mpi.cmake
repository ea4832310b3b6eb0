# SPDX-License-Identifier: Apache-2.0
# rflow::mpi: an MPI library; the C interface is all it takes. A target MPI::MPI_CXX of the project's own is taken as
# it is. FindMPI makes one also where it found nothing: MPI_CXX_FOUND tells, and a mark on the target those who ask
# again from elsewhere.
if(NOT TARGET MPI::MPI_CXX)
  # FindMPI ends in an error over folders that are not there: those that its cache remembers of an MPI that has gone
  # since, and those of a wrapper that came without headers (Debian: openmpi-bin without libopenmpi-dev).
  foreach(rflow_dir IN LISTS MPI_CXX_COMPILER_INCLUDE_DIRS MPI_CXX_HEADER_DIR)
    if(rflow_dir AND NOT IS_DIRECTORY "${rflow_dir}")
      foreach(rflow_stale COMPILER COMPILER_INCLUDE_DIRS HEADER_DIR LIB_NAMES)
        unset(MPI_CXX_${rflow_stale} CACHE)
      endforeach()
    endif()
  endforeach()
  find_program(rflow_mpi_wrapper NAMES ${MPI_CXX_COMPILER} mpicxx mpic++ mpiCC HINTS ${MPI_HOME} ENV MPI_HOME
               PATH_SUFFIXES bin NO_CACHE)
  if(UNIX AND rflow_mpi_wrapper)
    execute_process(COMMAND ${CMAKE_COMMAND} -E echo "#include <mpi.h>" COMMAND ${rflow_mpi_wrapper} -E -x c++ -
                    RESULT_VARIABLE rflow_mpi_wrapper_fails OUTPUT_QUIET ERROR_QUIET)
    if(rflow_mpi_wrapper_fails)
      set(MPI_SKIP_COMPILER_WRAPPER TRUE)
    endif()
  endif()
  set(MPI_CXX_SKIP_MPICXX TRUE)
  find_package(MPI QUIET COMPONENTS CXX)
  set(rflow_mpi_FOUND FALSE)
  if(MPI_CXX_FOUND)
    # It remembers that a program compiled, too, so it is asked again.
    try_compile(rflow_mpi_FOUND
      SOURCE_FROM_CONTENT mpi.cpp "#include <mpi.h>\nint main() { return MPI_Finalize(); }\n"
      LINK_LIBRARIES MPI::MPI_CXX
      NO_CACHE)
  endif()
  if(TARGET MPI::MPI_CXX AND NOT rflow_mpi_FOUND)
    set_property(TARGET MPI::MPI_CXX PROPERTY rflow_hollow TRUE)
  endif()
else()
  get_target_property(rflow_mpi_hollow MPI::MPI_CXX rflow_hollow)
  if(rflow_mpi_hollow OR (DEFINED MPI_CXX_FOUND AND NOT MPI_CXX_FOUND))
    set(rflow_mpi_FOUND FALSE)
  else()
    set(rflow_mpi_FOUND TRUE)
  endif()
endif()
set(rflow_mpi_NOT_FOUND_MESSAGE "rflow::mpi needs MPI (Debian: libopenmpi-dev, openmpi-bin)")
