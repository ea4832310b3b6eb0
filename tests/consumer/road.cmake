# SPDX-License-Identifier: Apache-2.0
cmake_minimum_required(VERSION 3.25)
set(here ${CMAKE_CURRENT_LIST_DIR})
set(werror "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror")
set(configure ${CMAKE_COMMAND} -G ${GENERATOR} -DCMAKE_CXX_COMPILER=${COMPILER} ${werror})

macro(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endmacro()

# Nothing of an embedded rflow may show up in the project that embeds it.
function(expect_invisible build)
  file(STRINGS ${build}/CMakeCache.txt entries REGEX "^[^#/]")
  list(FILTER entries EXCLUDE REGEX "^(ROAD:|(app|RFLOW|rflow|Eigen3|CMAKE|_CMAKE|FETCHCONTENT|FIND_PACKAGE)_)")
  if(entries)
    message(FATAL_ERROR "cache entries of an embedded rflow without its prefix: ${entries}")
  endif()
  execute_process(COMMAND ${CMAKE_COMMAND} --build ${build} --target help
                  OUTPUT_VARIABLE targets COMMAND_ERROR_IS_FATAL ANY)
  if(targets MATCHES "rflow_(tests|report|odr|bench)")
    message(FATAL_ERROR "tests, examples or benchmarks are built in an embedding project:\n${targets}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
if(ROAD STREQUAL "find_package")
  run(${CMAKE_COMMAND} --install ${RFLOW_BINARY} --prefix ${WORK}/prefix)
  run(${configure} -S ${here}/app -B ${WORK}/app -DROAD=find_package -DCMAKE_PREFIX_PATH=${WORK}/prefix)
  run(${CMAKE_COMMAND} --build ${WORK}/app)
  run(${WORK}/app/app)

elseif(ROAD STREQUAL "pkgconfig")
  find_program(PKG_CONFIG NAMES pkg-config pkgconf)
  if(NOT PKG_CONFIG)
    message("skipped: pkg-config was not found")
    return()
  endif()
  run(${CMAKE_COMMAND} --install ${RFLOW_BINARY} --prefix ${WORK}/prefix)
  file(RENAME ${WORK}/prefix ${WORK}/moved)  # a prefix in a package is not where it was built
  execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${WORK}/moved/share/pkgconfig
                  ${PKG_CONFIG} --cflags --libs rflow
                  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run(${COMPILER} -std=c++20 ${here}/app/app.cpp ${flags} -o ${WORK}/app)
  run(${WORK}/app)

elseif(ROAD STREQUAL "fetch" OR ROAD STREQUAL "subdirectory")
  run(${configure} -S ${here}/app -B ${WORK}/app -DROAD=${ROAD} -DRFLOW_SOURCE=${RFLOW_SOURCE})
  run(${CMAKE_COMMAND} --build ${WORK}/app)
  run(${WORK}/app/app)
  expect_invisible(${WORK}/app)

elseif(ROAD STREQUAL "exporting")
  # A library that embeds rflow and exports itself, and an application that finds only that library.
  run(${configure} -S ${here}/library -B ${WORK}/library -DRFLOW_SOURCE=${RFLOW_SOURCE})
  run(${CMAKE_COMMAND} --build ${WORK}/library)
  run(${CMAKE_COMMAND} --install ${WORK}/library --prefix ${WORK}/prefix)
  run(${configure} -S ${here}/app -B ${WORK}/app -DROAD=library -DCMAKE_PREFIX_PATH=${WORK}/prefix)
  run(${CMAKE_COMMAND} --build ${WORK}/app)
  run(${WORK}/app/app)

elseif(ROAD STREQUAL "own" OR ROAD STREQUAL "hollow")
  run(${configure} -S ${here}/targets -B ${WORK}/targets -DWHAT=${ROAD} -DRFLOW_SOURCE=${RFLOW_SOURCE})
else()
  message(FATAL_ERROR "no such road: ${ROAD}")
endif()
