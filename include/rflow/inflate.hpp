// SPDX-License-Identifier: Apache-2.0
#pragma once

// Makes compressed .npz files readable, with zlib (CMake target rflow::inflate):
// rflow::npz_file file(path, rflow::zlib_inflate).

#include <zlib.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <new>
#include <span>

namespace rflow {

/// Fills `out` from the raw deflate stream `in`. The inflater for npz_file.
/// @return false if the stream is broken, or if it does not end exactly where `in` and `out` do
/// @throws std::bad_alloc if zlib has no memory (some 40 KiB)
inline bool zlib_inflate(std::span<std::byte const> in, std::span<std::byte> out) {
  ::z_stream stream{};
  if (::inflateInit2(&stream, -MAX_WBITS) != Z_OK) throw std::bad_alloc();
  // zlib counts in unsigned int.
  constexpr std::size_t most = (std::numeric_limits<::uInt>::max)();
  ::Bytef none = 0;
  stream.next_in = const_cast<::Bytef*>(reinterpret_cast<::Bytef const*>(in.data()));
  stream.next_out = out.empty() ? &none : reinterpret_cast<::Bytef*>(out.data());
  std::size_t left_in = in.size(), left_out = out.size();
  int state = Z_OK;
  while (state == Z_OK) {
    auto const some_in = static_cast<::uInt>((std::min)(left_in, most));
    auto const some_out = static_cast<::uInt>((std::min)(left_out, most));
    stream.avail_in = some_in;
    stream.avail_out = some_out;
    state = ::inflate(&stream, Z_NO_FLUSH);
    left_in -= some_in - stream.avail_in;
    left_out -= some_out - stream.avail_out;
    // Z_OK without progress cannot be: zlib says Z_BUF_ERROR then.
  }
  ::inflateEnd(&stream);
  return state == Z_STREAM_END && left_in == 0 && left_out == 0;
}

}  // namespace rflow
