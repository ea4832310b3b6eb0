# SPDX-License-Identifier: Apache-2.0
cmake_minimum_required(VERSION 3.25)

file(READ ${SOURCE}/CONTRIBUTING.md text)
file(REMOVE_RECURSE ${WORK})

# Writes the next block of C++ of the text to a file.
macro(write_next file)
  string(FIND "${text}" "```cpp\n" begin)
  if(begin EQUAL -1)
    message(FATAL_ERROR "CONTRIBUTING.md has no code left for ${file}")
  endif()
  math(EXPR begin "${begin} + 7")
  string(SUBSTRING "${text}" ${begin} -1 text)
  string(FIND "${text}" "```" end)
  string(SUBSTRING "${text}" 0 ${end} code)
  math(EXPR end "${end} + 3")
  string(SUBSTRING "${text}" ${end} -1 text)
  file(WRITE ${WORK}/${file} "${code}")
endmacro()

write_next(include/rflow/energy.hpp)
write_next(tests/energy.cpp)
write_next(include/rflow/mine.hpp)
write_next(tests/mine.cpp)

file(WRITE ${WORK}/CMakeLists.txt [[
cmake_minimum_required(VERSION 3.25)
project(walkthrough LANGUAGES CXX)
find_package(doctest REQUIRED CONFIG)
add_subdirectory(${RFLOW_SOURCE} rflow)
foreach(program energy mine)
  add_executable(${program} ${RFLOW_SOURCE}/tests/main.cpp tests/${program}.cpp)
  target_include_directories(${program} PRIVATE include ${RFLOW_SOURCE}/tests)
  target_link_libraries(${program} PRIVATE rflow::rflow doctest::doctest)
endforeach()
]])

macro(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endmacro()
run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${WORK} -B ${WORK}/build -DCMAKE_CXX_COMPILER=${COMPILER}
    "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wconversion -Wshadow -Werror" -DRFLOW_SOURCE=${SOURCE})
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/energy)
run(${WORK}/build/mine)
