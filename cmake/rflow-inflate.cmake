# SPDX-License-Identifier: Apache-2.0
# rflow::inflate: zlib, for compressed .npz files.
if(NOT TARGET rflow_zlib)
  if(NOT TARGET ZLIB::ZLIB)
    find_package(ZLIB QUIET)
  endif()
  set(rflow_inflate_FOUND FALSE)
  if(TARGET ZLIB::ZLIB)
    # A cache remembers what has gone since, and the library found may be another machine's: a program decides, but
    # for a library that the project builds itself.
    get_target_property(rflow_zlib_imported ZLIB::ZLIB IMPORTED)
    if(rflow_zlib_imported)
      try_compile(rflow_inflate_FOUND
        SOURCE_FROM_CONTENT inflate.cpp "#include <zlib.h>\nint main() { return zlibVersion()[0] == 0; }\n"
        LINK_LIBRARIES ZLIB::ZLIB
        NO_CACHE)
    else()
      set(rflow_inflate_FOUND TRUE)
    endif()
  endif()
  if(rflow_inflate_FOUND)
    add_library(rflow_zlib INTERFACE IMPORTED GLOBAL)
    target_link_libraries(rflow_zlib INTERFACE ZLIB::ZLIB)
  endif()
endif()
if(TARGET rflow_zlib)
  set(rflow_inflate_FOUND TRUE)
else()
  set(rflow_inflate_FOUND FALSE)
  set(rflow_inflate_NOT_FOUND_MESSAGE "rflow::inflate needs zlib (Debian: zlib1g-dev)")
endif()
