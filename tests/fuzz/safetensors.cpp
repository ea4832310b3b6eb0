// SPDX-License-Identifier: Apache-2.0
// Any bytes at all are a safetensors file that opens, whose tensors fill its data exactly and can be
// read, or a format_error. Each input is opened as it is, and with a header length that fits, so
// that the fuzzer gets past the first eight bytes; and as an index of a file in parts.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <rflow/sharded_safetensors.hpp>
#include <rflow/sites.hpp>
#include <span>
#include <stdexcept>
#include <vector>

namespace {

void open(std::span<std::byte const> bytes) {
  try {
    rflow::safetensors_file const file(rflow::mapped_file::borrow(bytes, "fuzz"));
    std::uint64_t header = 0;
    std::memcpy(&header, bytes.data(), 8);
    std::uint64_t total = 0;
    unsigned sum = 0;
    for (std::string const& name : file.names()) {
      rflow::tensor const x = file[name];
      auto const size = static_cast<std::size_t>(x.size()) * bits(x.type) / 8;
      for (std::byte const b : std::span(x.data, size)) sum += std::to_integer<unsigned>(b);
      total += size;
    }
    volatile unsigned const used = sum;
    static_cast<void>(used);
    if (8 + header + total != bytes.size()) std::abort();
    try {
      rflow::visit(rflow::find_sites(file), [](auto const& stack) { return stack.sites(); });
    } catch (std::invalid_argument const&) {
    }
  } catch (rflow::format_error const&) {
  }
}

void read_as_index(std::uint8_t const* data, std::size_t size) {
  try {
    rflow::detail::weight_map map("fuzz");
    nlohmann::json::sax_parse(data, data + size, &map);
    for (auto const& [name, file] : map.files) rflow::detail::stays_below(file);
  } catch (rflow::format_error const&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  auto const bytes = std::as_bytes(std::span(data, size));
  open(bytes);
  if (size > 0) read_as_index(data, size);
  if (size < 8) return 0;
  // The header ends with the last brace.
  std::vector<std::byte> mended(bytes.begin(), bytes.end());
  std::uint64_t header = size - 8;
  while (header > 0 && mended[7 + header] != std::byte{'}'}) --header;
  std::memcpy(mended.data(), &header, 8);
  open(mended);
  return 0;
}
