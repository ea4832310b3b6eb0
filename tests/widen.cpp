// SPDX-License-Identifier: Apache-2.0
// Widening: every value of the small types, layouts, sites of several types.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <rflow/npy.hpp>
#include <rflow/sites.hpp>
#include <rflow/widen.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.hpp"

namespace {

using files::contains;
using files::error_of;
using rflow::dtype;

/// A 2-D tensor of those bytes.
rflow::tensor of_bytes(std::vector<std::uint8_t> const& bytes, dtype type) {
  auto x = rflow::as_tensor("x", bytes, {1, static_cast<std::ptrdiff_t>(bytes.size())});
  x.type = type;
  return x;
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

std::vector<std::uint8_t> every_byte() {
  std::vector<std::uint8_t> out(256);
  std::iota(out.begin(), out.end(), std::uint8_t{0});
  return out;
}

}  // namespace

TEST_CASE("every 8-bit float has the value that its format defines") {
  struct format {
    dtype type;
    int fraction_bits, bias;
    std::vector<unsigned> nan;
    std::vector<unsigned> infinite;
  };
  for (format const& f : std::vector<format>{
           {dtype::f8_e4m3, 3, 7, {0x7f, 0xff}, {}},
           {dtype::f8_e5m2, 2, 15, {0x7d, 0x7e, 0x7f, 0xfd, 0xfe, 0xff}, {0x7c, 0xfc}},
           {dtype::f8_e4m3fnuz, 3, 8, {0x80}, {}},
           {dtype::f8_e5m2fnuz, 2, 16, {0x80}, {}}}) {
    CAPTURE(to_string(f.type));
    std::vector<std::uint8_t> const bytes = every_byte();
    auto const wide = rflow::widen(of_bytes(bytes, f.type), dtype::f32);
    auto const wider = rflow::widen(of_bytes(bytes, f.type), dtype::f64);
    for (unsigned b = 0; b < 256; ++b) {
      int const exponent = static_cast<int>(b & 0x7f) >> f.fraction_bits;
      double const fraction = std::ldexp(b & ((1u << f.fraction_bits) - 1), -f.fraction_bits);
      double expected = exponent == 0 ? std::ldexp(fraction, 1 - f.bias)
                                      : std::ldexp(1 + fraction, exponent - f.bias);
      auto const one_of = [&](std::vector<unsigned> const& all) {
        return std::find(all.begin(), all.end(), b) != all.end();
      };
      if (one_of(f.infinite)) expected = std::numeric_limits<double>::infinity();
      if (one_of(f.nan)) expected = std::numeric_limits<double>::quiet_NaN();
      if ((b & 0x80) != 0) expected = -expected;
      CAPTURE(b);
      CHECK(same(wide.array.as<float>()(0, static_cast<std::ptrdiff_t>(b)), expected));
      CHECK(same(wider.array.as<double>()(0, static_cast<std::ptrdiff_t>(b)), expected));
    }
  }
}

TEST_CASE("and the value that ml_dtypes gives it") {
  for (std::string const name :
       {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}) {
    CAPTURE(name);
    rflow::npy_file const bits(files::fixture(name + ".npy")),
        values(files::fixture(name + "_as_f4.npy"));
    auto x = bits.array();
    x.type = name == "float8_e4m3fn"     ? dtype::f8_e4m3
             : name == "float8_e5m2"     ? dtype::f8_e5m2
             : name == "float8_e4m3fnuz" ? dtype::f8_e4m3fnuz
                                         : dtype::f8_e5m2fnuz;
    auto const wide = rflow::widen(x, dtype::f32);
    auto const ours = wide.array.as<float>(), theirs = values.array().as<float>();
    REQUIRE(ours.rows == 16);
    for (std::ptrdiff_t i = 0; i < 16; ++i)
      for (std::ptrdiff_t j = 0; j < 16; ++j) CHECK(same(ours(i, j), theirs(i, j)));
  }
}

TEST_CASE("every half widens exactly") {
  std::vector<rflow::f16> halves(65536);
  std::vector<rflow::bf16> brains(65536);
  for (std::size_t i = 0; i < 65536; ++i)
    halves[i].bits = brains[i].bits = static_cast<std::uint16_t>(i);
  auto const h = rflow::widen(rflow::as_tensor("h", halves, {256, 256}), dtype::f64);
  auto const b = rflow::widen(rflow::as_tensor("b", brains, {256, 256}), dtype::f32);
  bool all = true;
  for (std::ptrdiff_t i = 0; i < 65536; ++i) {
    auto const k = static_cast<std::size_t>(i);
    all = all && same(h.array.elements<double>()[i], float(halves[k])) &&
          same(b.array.elements<float>()[i], float(brains[k]));
  }
  CHECK(all);
}

TEST_CASE("any strides become row-major") {
  std::vector<rflow::bf16> values(12);
  for (std::size_t i = 0; i < 12; ++i) values[i] = rflow::bf16::nearest(static_cast<float>(i));
  rflow::view<rflow::bf16> const columns(values.data(), 3, 4, 1, 3);
  auto const wide = rflow::widen(rflow::as_tensor("x", columns), dtype::f32);
  CHECK(wide.array.name == "x");
  CHECK(wide.array.strides == std::vector<std::ptrdiff_t>{4, 1});
  for (std::ptrdiff_t i = 0; i < 3; ++i)
    for (std::ptrdiff_t j = 0; j < 4; ++j)
      CHECK(wide.array.as<float>()(i, j) == float(columns(i, j)));
  std::vector<rflow::bf16> const none;
  CHECK(rflow::widen(rflow::as_tensor("x", none, {0, 3}), dtype::f32).array.as<float>().rows == 0);
}

TEST_CASE("what cannot be widened is refused") {
  auto const error = [](rflow::tensor const& x, dtype to) {
    return error_of<std::invalid_argument>([&] { rflow::widen(x, to); });
  };
  std::vector<double> const doubles(6);
  std::vector<float> const floats(6);
  std::vector<std::int32_t> const integers(6);
  std::vector<std::uint8_t> const bytes(6);
  CHECK(contains(error(rflow::as_tensor("x", doubles, {6}), dtype::f32), "f64 [6]"));
  CHECK(contains(error(rflow::as_tensor("x", integers, {6}), dtype::f32), "i32 [6]"));
  CHECK(contains(error(rflow::as_tensor("x", floats, {6}), dtype::f16), "f32 [6]"));
  CHECK(contains(error(of_bytes(bytes, dtype::f8_e8m0), dtype::f32), "f8_e8m0"));
  // A copy of more than 2^63 bytes, of an array that has none.
  auto endless = of_bytes({}, dtype::f8_e4m3);
  endless.shape = {0, std::ptrdiff_t{1} << 59};
  CHECK(contains(error(endless, dtype::f64), "too large to copy"));
}

TEST_CASE("tensors are brought to one type") {
  std::vector<float> const f(6, 1.5f);
  std::vector<rflow::bf16> const b(6, rflow::bf16::nearest(2.5f));
  std::vector<rflow::f16> const h(6, rflow::f16::nearest(3.5f));
  std::vector<double> const d(6, 0.1);
  std::vector<std::uint8_t> const e(6, 0x38);  // 1 in e4m3
  auto const one = [](rflow::widening const& w, std::vector<rflow::tensor> const& all, dtype type) {
    CHECK(w.to == type);
    for (rflow::tensor const& x : all) CHECK(x.type == type);
  };
  auto const bring = [](std::vector<rflow::tensor>& all) {
    std::vector<rflow::tensor*> pointers = {nullptr};
    for (rflow::tensor& x : all) pointers.push_back(&x);
    return rflow::widen_to_one(pointers);
  };
  auto const F = rflow::as_tensor("f", f, {2, 3}), B = rflow::as_tensor("b", b, {2, 3}),
             H = rflow::as_tensor("h", h, {2, 3}), D = rflow::as_tensor("d", d, {2, 3});
  auto E = rflow::as_tensor("e", e, {2, 3});
  E.type = dtype::f8_e4m3;

  SUBCASE("nothing happens to those of one type") {
    for (rflow::tensor const& x : {F, B, H, D}) {
      std::vector<rflow::tensor> all = {x, x};
      auto const w = bring(all);
      CHECK_FALSE(w.happened());
      CHECK(w.bytes == 0);
      one(w, all, x.type);
      CHECK(all[1].data == x.data);
    }
    std::vector<rflow::tensor> none;
    CHECK_FALSE(bring(none).happened());
  }
  SUBCASE("f32 stays where it is") {
    std::vector<rflow::tensor> all = {F, B, H, B};
    auto const w = bring(all);
    one(w, all, dtype::f32);
    CHECK(all[0].data == F.data);
    CHECK(all[1].as<float>()(1, 2) == 2.5f);
    CHECK(all[2].as<float>()(1, 2) == 3.5f);
    CHECK(w.bytes == 3 * 24);
    CHECK(w.description() ==
          "1 f16, 2 bf16 and 1 f32, read as f32 (widened exactly, copies of 1 KiB)");
  }
  SUBCASE("the two halves meet in f32") {
    std::vector<rflow::tensor> all = {H, B};
    one(bring(all), all, dtype::f32);
  }
  SUBCASE("one f64 takes all with it") {
    std::vector<rflow::tensor> all = {F, D, E};
    auto const w = bring(all);
    one(w, all, dtype::f64);
    CHECK(all[0].as<double>()(0, 0) == 1.5);
    CHECK(all[1].as<double>()(0, 0) == 0.1);
    CHECK(all[2].as<double>()(0, 0) == 1);
  }
  SUBCASE("8-bit floats alone become f32") {
    std::vector<rflow::tensor> all = {E, E};
    auto const w = bring(all);
    one(w, all, dtype::f32);
    CHECK(w.happened());
    CHECK(w.description() == "2 f8_e4m3, read as f32 (widened exactly, copies of 1 KiB)");
  }
  SUBCASE("nothing changes if one is no activation's") {
    std::vector<std::int64_t> const labels(6);
    std::vector<rflow::tensor> all = {F, B, rflow::as_tensor("y", labels, {2, 3})};
    CHECK(contains(error_of<std::invalid_argument>([&] { bring(all); }), "'y', i64 [2, 3]"));
    CHECK(all[1].data == B.data);
    CHECK(all[1].type == dtype::bf16);
  }
}

TEST_CASE("an array of 8-bit floats is split into sites of f32") {
  rflow::npy_file const file(files::fixture("float8_e5m2.npy"));
  auto x = file.array();
  x.shape = {4, 8, 8};
  x.strides = {64, 8, 1};
  auto const sites = rflow::split_sites(x);
  CHECK(sites.type() == dtype::f32);
  CHECK(sites.widened.happened());
  auto const copy = sites;                        // shares the widened values
  CHECK(copy.stack<float>()[0](7, 3) == 0.875f);  // bits 0x3b
  CHECK(copy.stack<float>()[0].data == sites.stack<float>()[0].data);
}

TEST_CASE("sites of several types are found as one") {
  files::scratch const dir;
  std::vector<float> const embed = {1, 2, 3, 4, 5, 6};
  std::vector<rflow::f16> const block(6, rflow::f16::nearest(0.25f));
  std::vector<double> const norm(6, 0.1);
  rflow::write_npy(dir / "embed.npy", embed, {2, 3});
  rflow::write_npy(dir / "block.1.npy", block, {2, 3});
  {
    rflow::npy_directory folder(dir.path());
    auto const sites = rflow::find_sites(folder);
    CHECK(sites.type() == dtype::f32);
    CHECK(sites.stack<float>()[1](1, 2) == 0.25f);
    CHECK(sites.stack<float>()[0].data == folder["embed"].as<float>().data);
    CHECK(sites.widened.found == std::map<dtype, int>{{dtype::f16, 1}, {dtype::f32, 1}});
  }
  // The final norm has a say too: it is measured with the chain.
  rflow::write_npy(dir / "final_norm.npy", norm, {2, 3});
  rflow::npy_directory folder(dir.path());
  auto const sites = rflow::find_sites(folder);
  CHECK(sites.type() == dtype::f64);
  CHECK(sites.final_norm->as<double>()(0, 0) == 0.1);
  CHECK(sites.chain[0].as<double>()(1, 2) == 6);
}
