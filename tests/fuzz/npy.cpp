// SPDX-License-Identifier: Apache-2.0
// Any bytes at all are a .npy file that opens, with all its elements readable, or a format_error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <rflow/npy.hpp>
#include <rflow/sites.hpp>
#include <span>
#include <stdexcept>

namespace {

/// Reads every element; the address sanitizer watches.
void read(rflow::tensor const& x) {
  if (x.strides.size() != x.shape.size()) std::abort();
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
  auto const tolerate = [](auto&& f) {
    try {
      f();
    } catch (std::invalid_argument const&) {
    }
  };
  tolerate([&] { rflow::visit(x, [](auto const& v) { return v.rows; }); });
  tolerate([&] { static_cast<void>(x.integers()); });
  tolerate([&] { rflow::split_sites(x); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  auto const bytes = std::as_bytes(std::span(data, size));
  for (auto const as : {rflow::reinterpret::nothing, rflow::reinterpret::as_bf16}) {
    try {
      rflow::npy_file const file(rflow::mapped_file::borrow(bytes, "fuzz"), as);
      read(file.array());
    } catch (rflow::format_error const&) {
    } catch (std::invalid_argument const&) {
      if (as == rflow::reinterpret::nothing) throw;
    }
  }
  return 0;
}
