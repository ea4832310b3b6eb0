# SPDX-License-Identifier: Apache-2.0
# What every example here needs: rflow itself, from this tree, and from the files of a capture.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
if(NOT TARGET rflow::rflow)
  set(RFLOW_SAFETENSORS ON)
  add_subdirectory(${CMAKE_CURRENT_LIST_DIR}/../.. rflow)
endif()

# rflow_runtime(<target> <source> <libraries>...)
function(rflow_runtime target source)
  add_executable(${target} ${source})
  target_link_libraries(${target} PRIVATE rflow::rflow rflow::safetensors ${ARGN})
  target_compile_options(${target} PRIVATE -Wall -Wextra)
endfunction()
