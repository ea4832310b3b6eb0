// SPDX-License-Identifier: Apache-2.0
// Any bytes at all are a .npz file that opens, whose arrays can be read or are refused in words; and
// are of some kind. Each input is opened as it is, and with checksums that fit, so that the fuzzer
// gets past them.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <rflow/container.hpp>
#include <rflow/inflate.hpp>
#include <rflow/npz.hpp>
#include <rflow/sites.hpp>
#include <span>
#include <stdexcept>
#include <vector>

#include <zlib.h>

namespace {

void read(rflow::tensor const& x) {
  unsigned sum = 0;
  std::ptrdiff_t elements = 0;
  std::size_t const item = bits(x.type) / 8;
  rflow::detail::for_each_run(x, [&](std::byte const* run, std::ptrdiff_t n) {
    elements += n;
    for (std::byte const b : std::span(run, static_cast<std::size_t>(n) * item))
      sum += std::to_integer<unsigned>(b);
  });
  volatile unsigned const used = sum;
  static_cast<void>(used);
  if (elements != x.size()) std::abort();
}

void open(std::span<std::byte const> bytes) {
  if (to_string(rflow::recognize(bytes)).empty()) std::abort();
  try {
    rflow::npz_file file(rflow::mapped_file::borrow(bytes, "fuzz"), rflow::zlib_inflate);
    for (std::string const& name : file.names()) {
      try {
        read(file[name]);
      } catch (rflow::format_error const&) {
      } catch (std::invalid_argument const&) {
      }
    }
    rflow::visit(rflow::find_sites(file), [](auto const& stack) { return stack.sites(); });
  } catch (rflow::format_error const&) {
  } catch (std::invalid_argument const&) {
  }
}

/// The archive with the checksum of each stored member as it should be.
std::vector<std::byte> mended(std::span<std::byte const> bytes) {
  std::vector<std::byte> out(bytes.begin(), bytes.end());
  auto const number = [&](std::size_t at, std::size_t width) {
    std::size_t value = 0;
    if (at <= out.size() && out.size() - at >= width) std::memcpy(&value, out.data() + at, width);
    return value;
  };
  for (std::size_t at = 0; at + 46 <= out.size(); ++at) {
    if (number(at, 4) != 0x02014b50) continue;
    std::size_t const header = number(at + 42, 4), size = number(at + 20, 4);
    std::size_t const data = header + 30 + number(header + 26, 2) + number(header + 28, 2);
    if (data > out.size() || size > out.size() - data) continue;
    auto const sum = static_cast<std::uint32_t>(
        ::crc32_z(0, reinterpret_cast<::Bytef const*>(out.data() + data), size));
    std::memcpy(out.data() + at + 16, &sum, 4);
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  auto const bytes = std::as_bytes(std::span(data, size));
  open(bytes);
  open(mended(bytes));
  return 0;
}
