# SPDX-License-Identifier: Apache-2.0
include(CMakeFindDependencyMacro)
find_dependency(rflow 0.1)
include("${CMAKE_CURRENT_LIST_DIR}/alignment-targets.cmake")
