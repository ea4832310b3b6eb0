# SPDX-License-Identifier: Apache-2.0
execute_process(COMMAND ${program} 300 COMMAND ${python} ${CMAKE_CURRENT_LIST_DIR}/verify.py
                RESULTS_VARIABLE results)
foreach(result IN LISTS results)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "failed: ${results}")
  endif()
endforeach()
