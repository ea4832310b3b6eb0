# SPDX-License-Identifier: Apache-2.0
# No instantiation with on_cuda is among the symbols that LIBRARY exports.
execute_process(COMMAND ${NM} --dynamic --defined-only --demangle ${LIBRARY}
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
if(NOT symbols MATCHES "rflow_test_shared")
  message(FATAL_ERROR "nm shows nothing of ${LIBRARY}:\n${symbols}")
endif()
string(REGEX MATCHALL "[^\n]*(on_cuda|cuda_device|run_warps|staged_source)[^\n]*" leaks "${symbols}")
if(leaks)
  list(JOIN leaks "\n" leaks)
  message(FATAL_ERROR "exported:\n${leaks}")
endif()
