# SPDX-License-Identifier: Apache-2.0
# rflow::safetensors: the header of a safetensors file is JSON.
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json 3.11 QUIET CONFIG)
endif()
if(TARGET nlohmann_json::nlohmann_json)
  set(rflow_safetensors_FOUND TRUE)
else()
  set(rflow_safetensors_FOUND FALSE)
  set(rflow_safetensors_NOT_FOUND_MESSAGE
      "rflow::safetensors needs nlohmann-json 3.11 or newer (Debian: nlohmann-json3-dev)")
endif()
