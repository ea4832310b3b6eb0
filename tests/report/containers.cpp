// SPDX-License-Identifier: Apache-2.0
// What the report program does with files of any kind: it goes by the content, reads what it can, and
// says of the rest what it is and what to do.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <rflow/npy.hpp>
#include <rflow/safetensors.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "../program.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using program::folder;

constexpr std::ptrdiff_t tokens = 24, width = 16, sites = 4;

/// Drawn numbers of a chain, site after site, that every type of the tests holds exactly: multiples
/// of 1/8 below 2.
std::vector<float> drawn() {
  std::vector<float> out;
  std::uint32_t state = 1;
  for (std::ptrdiff_t i = 0; i < sites * tokens * width; ++i) {
    state = state * 1664525u + 1013904223u;
    out.push_back(static_cast<float>(static_cast<int>(state >> 27) - 16) / 8);
  }
  return out;
}

std::string name_of(std::ptrdiff_t site) {
  return site == 0 ? "embed" : "block." + std::to_string(site);
}

/// Sites in float. They look at numbers.
std::vector<rflow::tensor> all_sites(std::vector<float> const& numbers) {
  std::vector<rflow::tensor> out;
  for (std::ptrdiff_t l = 0; l < sites; ++l)
    out.push_back(rflow::as_tensor(
        name_of(l), rflow::view(numbers.data() + l * tokens * width, tokens, width)));
  return out;
}

void write(fs::path const& path, std::string const& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string little(std::uint64_t n, int bytes) {
  std::string out;
  for (; bytes > 0; --bytes, n >>= 8) out += static_cast<char>(n & 0xff);
  return out;
}

/// A zip archive of files that are there, stored.
std::string zip_of(folder const& from, std::vector<std::string> const& names) {
  std::string out, directory;
  for (std::string const& name : names) {
    std::string const data = program::read(from / name);
    std::uint32_t c = 0xffffffffu;
    for (char const byte : data) {
      c ^= static_cast<unsigned char>(byte);
      for (int bit = 0; bit < 8; ++bit) c = (c & 1) != 0 ? c >> 1 ^ 0xedb88320u : c >> 1;
    }
    std::string const facts = little(20, 2) + little(0, 8) + little(~c, 4) +
                              little(data.size(), 4) + little(data.size(), 4) +
                              little(name.size(), 2) + little(0, 2);
    directory += "PK\1\2" + little(20, 2) + facts + little(0, 10) + little(out.size(), 4) + name;
    out += "PK\3\4" + facts + name + data;
  }
  std::uint64_t const begin = out.size();
  return out + directory + "PK\5\6" + little(0, 4) + little(names.size(), 2) +
         little(names.size(), 2) + little(directory.size(), 4) + little(begin, 4) + little(0, 2);
}

struct report {
  program::outcome o;
  json numbers;

  bool says(std::string const& text) const { return o.out.find(text) != std::string::npos; }
  double st1() const { return numbers.at("models").at(0).at("variance").at("st1").at("value"); }
  std::string dtype() const { return numbers.at("models").at(0).at("dtype"); }
  std::vector<std::string> notes() const {
    std::vector<std::string> out;
    for (json const& w : numbers.at("models").at(0).at("warnings")) out.push_back(w["text"]);
    return out;
  }
};

report report_of(folder const& where, std::vector<std::string> arguments) {
  arguments.insert(arguments.end(), {"--no-plots", "--force", "--output", "out"});
  report out{program::run(RFLOW_REPORT, where, arguments), {}};
  CAPTURE(out.o.err);
  REQUIRE(out.o.status == 0);
  out.numbers = json::parse(program::read(where / "out/metrics.json"));
  return out;
}

void refused(folder const& where, std::vector<std::string> const& arguments,
             std::vector<std::string> const& texts) {
  program::check_refused(RFLOW_REPORT, where, arguments, texts);
}

bool any_of(std::vector<std::string> const& all, std::string const& text) {
  for (std::string const& one : all)
    if (one.find(text) != std::string::npos) return true;
  return false;
}

}  // namespace

TEST_CASE("one capture in every container gives the same report") {
  folder const dir;
  std::vector<float> const numbers = drawn();
  std::vector<rflow::tensor> const all = all_sites(numbers);
  rflow::write_safetensors(dir / "one.safetensors", all);
  report const expected = report_of(dir, {"one.safetensors"});
  CHECK(expected.notes().empty());
  auto const same = [&](std::vector<std::string> const& arguments) {
    CAPTURE(arguments.front());
    report const r = report_of(dir, arguments);
    CHECK(r.st1() == expected.st1());
    CHECK(r.numbers.at("models").at(0).at("cka") == expected.numbers.at("models").at(0).at("cka"));
    return r;
  };

  // .npz, and what is wrongly called
  fs::create_directory(dir / "parts");
  std::vector<std::string> names;
  for (rflow::tensor const& x : all) {
    rflow::write_npy(dir / (x.name + ".npy"), x);
    names.push_back(x.name + ".npy");
  }
  write(dir / "one.npz", zip_of(dir, names));
  CHECK(same({"one.npz"}).notes().empty());
  fs::copy(dir / "one.npz", dir / "zip.npy");
  report const called_npy = same({"zip.npy"});
  CHECK(any_of(called_npy.notes(), "the file is a .npz file, whatever it is called (.npy)"));
  CHECK(
      called_npy.says("note: the file is a .npz file, whatever it is called (.npy), and was read"));
  fs::copy(dir / "one.safetensors", dir / "st.npz");
  CHECK(any_of(same({"st.npz"}).notes(), "the file is a safetensors file, whatever it is called"));
  rflow::write_npy(dir / "stack.safetensors", numbers, {sites, tokens, width});
  CHECK(any_of(same({"stack.safetensors"}).notes(), "the file is a .npy file, whatever"));
  fs::copy(dir / "one.safetensors", dir / "noname");
  CHECK(same({"noname"}).notes().empty());  // no suffix, no promise
  report const shard = report_of(dir, {"one.npz", "--shards", "--cka", "full"});
  CHECK(std::abs(shard.st1() - expected.st1()) <= 1e-9 * expected.st1());

  // in parts
  rflow::write_safetensors(dir / "parts/m-00001-of-00002.safetensors",
                           std::vector<rflow::tensor>{all[0], all[1]});
  rflow::write_safetensors(dir / "parts/m-00002-of-00002.safetensors",
                           std::vector<rflow::tensor>{all[2], all[3]});
  write(dir / "parts/m.safetensors.index.json",
        R"({"weight_map": {"embed": "m-00001-of-00002.safetensors",
            "block.1": "m-00001-of-00002.safetensors", "block.2": "m-00002-of-00002.safetensors",
            "block.3": "m-00002-of-00002.safetensors"}})");
  for (auto const* input :
       {"parts", "parts/m.safetensors.index.json", "parts/m-00001-of-00002.safetensors",
        "parts/m-00002-of-00002.safetensors"})
    CHECK(same({input}).notes().empty());
  refused(dir, {"parts/m-00002-of-00002.safetensors", "./parts/m-00001-of-00002.safetensors"},
          {"a part of the same file as parts/m-00002", "give one of them"});
  fs::remove(dir / "parts/m-00002-of-00002.safetensors");
  refused(dir, {"parts/m-00001-of-00002.safetensors"},
          {"parts/m-00002-of-00002.safetensors: No such file"});
  refused(dir, {"parts"}, {"parts/m-00002-of-00002.safetensors: No such file"});
}

TEST_CASE("shards of tokens may be called like parts of a file") {
  folder const dir;
  std::vector<float> const numbers = drawn();
  for (auto const* name : {"t-00001-of-00002.safetensors", "t-00002-of-00002.safetensors"})
    rflow::write_safetensors(dir / name, all_sites(numbers));
  report const r =
      report_of(dir, {"--shards", "t-00001-of-00002.safetensors", "t-00002-of-00002.safetensors"});
  CHECK(r.numbers.at("models").at(0).at("shards").at("files").size() == 2);
  refused(dir, {"t-00001-of-00002.safetensors"},
          {"'block.1' is in", "t-00001-of-00002.safetensors too", "--shards"});
}

TEST_CASE("sites of several types are widened, and the report says so") {
  folder const dir;
  std::vector<float> const numbers = drawn();
  std::vector<rflow::tensor> all = all_sites(numbers);
  rflow::write_safetensors(dir / "f32.safetensors", all);
  double const expected = report_of(dir, {"f32.safetensors"}).st1();

  std::vector<rflow::bf16> brains;
  std::vector<rflow::f16> halves;
  std::vector<double> doubles;
  for (float const x : numbers) {
    brains.push_back(rflow::bf16::nearest(x));
    halves.push_back(rflow::f16::nearest(x));
    doubles.push_back(x);
  }
  auto const take = [&](std::ptrdiff_t site, auto const& values) {
    auto const n = static_cast<std::size_t>(site);
    all[n] = rflow::as_tensor(name_of(site),
                              rflow::view(values.data() + site * tokens * width, tokens, width));
  };
  take(1, brains);
  take(2, brains);
  take(3, halves);
  rflow::write_safetensors(dir / "mixed.safetensors", all);
  report const mixed = report_of(dir, {"mixed.safetensors"});
  CHECK(mixed.st1() == expected);
  CHECK(mixed.dtype() == "f32");
  CHECK(
      any_of(mixed.notes(),
             "the file stores its sites as 1 f16, 2 bf16 and 1 f32, read as f32 (widened exactly"));
  CHECK(mixed.says("note: the file stores its sites as 1 f16"));
  CHECK(program::read(dir / "out/report.html").find("stores its sites as") != std::string::npos);
  report const shards = report_of(dir, {"--shards", "mixed.safetensors", "f32.safetensors"});
  CHECK(any_of(shards.notes(), "mixed.safetensors: the file stores its sites as"));
  CHECK_FALSE(any_of(shards.notes(), "other file"));
  take(3, doubles);
  rflow::write_safetensors(dir / "wide.safetensors", all);
  report const wide = report_of(dir, {"wide.safetensors"});
  CHECK(std::abs(wide.st1() - expected) <= 1e-6 * expected);
  CHECK(wide.dtype() == "f64");
}

TEST_CASE("8-bit floats, in safetensors and in .npy") {
  folder const dir;
  // Every number of the test in e4m3 and e5m2: sign, exponent, two bits of fraction.
  std::vector<float> numbers = drawn();
  std::vector<std::uint8_t> e4m3, e5m2;
  for (float& x : numbers) {
    int exponent = 0;
    float const fraction = std::frexp(std::abs(x), &exponent);  // in [0.5, 1)
    int const quarter = static_cast<int>(fraction * 8) - 4;     // two bits, cut
    x = x == 0 ? 0 : std::copysign(std::ldexp(static_cast<float>(4 + quarter) / 8, exponent), x);
    int const sign = std::signbit(x) ? 0x80 : 0;
    e4m3.push_back(
        static_cast<std::uint8_t>(x == 0 ? 0 : sign | (exponent - 1 + 7) << 3 | quarter << 1));
    e5m2.push_back(
        static_cast<std::uint8_t>(x == 0 ? 0 : sign | (exponent - 1 + 15) << 2 | quarter));
  }
  std::vector<rflow::tensor> all = all_sites(numbers);
  rflow::write_safetensors(dir / "f32.safetensors", all);
  double const expected = report_of(dir, {"f32.safetensors"}).st1();

  for (auto const& [bytes, type] :
       {std::pair(&e4m3, rflow::dtype::f8_e4m3), std::pair(&e5m2, rflow::dtype::f8_e5m2)}) {
    std::vector<rflow::tensor> eight;
    for (std::ptrdiff_t l = 0; l < sites; ++l) {
      auto x = rflow::as_tensor(name_of(l), *bytes, {sites * tokens, width});
      x.type = type;
      x.shape = {tokens, width};
      x.data += l * tokens * width;
      eight.push_back(x);
    }
    rflow::write_safetensors(dir / "f8.safetensors", eight);
    report const r = report_of(dir, {"f8.safetensors"});
    CHECK(r.st1() == expected);
    CHECK(any_of(r.notes(), "as 4 " + std::string(to_string(type)) + ", read as f32"));
  }

  // As numpy.save writes arrays of ml_dtypes: e5m2 has a name, e4m3 has none.
  auto const save = [&](std::string const& name, std::string const& descr,
                        std::string const& data) {
    std::string const header =
        "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (4, 24, 16), }\n";
    write(dir / name,
          "\x93NUMPY\1" + std::string(1, '\0') + little(header.size(), 2) + header + data);
  };
  std::string const four(e4m3.begin(), e4m3.end()), five(e5m2.begin(), e5m2.end());
  save("e5m2.npy", "<f1", five);
  save("e4m3.npy", "<V1", four);
  save("bytes.npy", "|u1", four);
  save("named.npy", "float8_e4m3fn", four);
  CHECK(report_of(dir, {"e5m2.npy"}).st1() == expected);
  CHECK(report_of(dir, {"named.npy"}).st1() == expected);
  for (auto const* name : {"e4m3.npy", "bytes.npy"}) {
    refused(dir, {name}, {"8-bit floats", "--npy-bits"});
    CHECK(report_of(dir, {name, "--npy-bits", "f8_e4m3"}).st1() == expected);
  }
  refused(dir, {"e4m3.npy", "--npy-bits", "bf16"}, {"only 16-bit integers", "raw8"});
  std::string brains;
  for (float const x : numbers) brains += little(rflow::bf16::nearest(x).bits, 2);
  save("v2.npy", "<V2", brains);
  save("bfloat16.npy", "bfloat16", brains);
  refused(dir, {"v2.npy"}, {"--npy-bits"});
  CHECK(report_of(dir, {"v2.npy", "--npy-bits", "bf16"}).st1() == expected);
  CHECK(report_of(dir, {"bfloat16.npy"}).st1() == expected);
}

TEST_CASE("what is not read is named, with the cure") {
  folder const dir;
  std::string const zeros(600, '\0');
  std::string tar(600, '\0');
  tar.replace(0, 5, "a.txt").replace(257, 5, "ustar");
  struct example {
    std::string name, content;
    std::vector<std::string> texts;
  };
  std::string const torch_zip =
      "PK\3\4" + std::string(22, '\0') + '\x10' + std::string(3, '\0') + "archive/data.pkl" + zeros;
  for (example const& e : std::vector<example>{
           {"a.safetensors",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            {"a Git LFS pointer", "git lfs pull"}},
           {"a.npy",
            "<!DOCTYPE html><html><body>Sign in</body></html>",
            {"a web page", "raw file"}},
           {"a.pt", torch_zip, {"a PyTorch file", "safetensors.torch", "torch.load", " a.pt"}},
           {"a.safetensors", torch_zip, {"a PyTorch file", " a.safetensors"}},
           {"old.pth",
            "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19." + zeros,
            {"a PyTorch file", " old.pth"}},
           {"a.pkl", "\x80\x04\x95" + zeros, {"a Python pickle", "np.savez", "if you trust it"}},
           {"a.h5", "\x89HDF\r\n\x1a\n" + zeros, {"an HDF5 file", "h5py"}},
           {"a.gguf", "GGUF" + zeros, {"a GGUF file", "GGUFReader"}},
           {"a.arrow", "ARROW1" + zeros, {"an Arrow or Feather file", "open_file"}},
           {"b.arrow",
            std::string("\xff\xff\xff\xff\x08\0\0\0", 8) + zeros,
            {"an Arrow stream", "open_stream"}},
           {"a.parquet", "PAR1" + zeros, {"a Parquet file", "ParquetFile"}},
           {"a.npz.gz", "\x1f\x8b\x08" + zeros, {"gzip", "gzip -dc a.npz.gz > a.npz.gz.plain"}},
           {"a.zst", "\x28\xb5\x2f\xfd" + zeros, {"Zstandard", "zstd -dc"}},
           {"a.tar", tar, {"a tar archive", "tar -xf a.tar"}},
           {"a.csv", "1,2\n3,4\n", {"text", "np.loadtxt", "a.csv"}},
           {"a.json", "{\"a\": 1}", {"JSON text"}},
           {"empty.npz", "", {"the file is empty"}},
           {"a.bin", zeros, {"neither a safetensors file nor a .npy nor a .npz"}},
           {"noise.npy", zeros, {"wrong magic: not a .npy file"}},
           {"noise.npz", zeros, {"wrong magic: not a .npz file"}},
           {"none.npz", zip_of(dir, {}), {"no array in this .npz"}},
           {"x.docx",
            "PK\3\4" + std::string(22, '\0') + '\3' + std::string(3, '\0') + "doc" + zeros,
            {"a zip archive without .npy files"}},
       }) {
    CAPTURE(e.name);
    write(dir / e.name, e.content);
    refused(dir, {e.name}, e.texts);
    fs::remove(dir / e.name);
  }
}

TEST_CASE("folders") {
  folder const dir;
  fs::create_directory(dir / "f");
  refused(dir, {"f"}, {"no .npy file in this folder"});
  write(dir / "f/.zgroup", "{}");
  refused(dir, {"f"}, {"a Zarr store", "numpy.savez"});
  fs::remove(dir / "f/.zgroup");
  std::vector<float> const numbers = drawn();
  rflow::write_safetensors(dir / "f/model.safetensors", all_sites(numbers));
  refused(dir, {"f"}, {"1 .safetensors", "give f/model.safetensors"});
  report_of(dir, {"f/model.safetensors"});  // as it says
  rflow::write_safetensors(dir / "f/other.safetensors", all_sites(numbers));
  refused(dir, {"f"}, {"2 .safetensors", "--shards"});
  report_of(dir, {"--shards", "f/model.safetensors", "f/other.safetensors"});
}

TEST_CASE("compressed archives") {
  folder const dir;
  fs::copy(fs::path(RFLOW_SOURCE_DIR) / "tests/reference/files/deflated.npz", dir / "d.npz");
  auto const arguments = std::vector<std::string>{"d.npz", "--no-plots", "--force", "-o", "out"};
  program::outcome const o = program::run(RFLOW_REPORT, dir, arguments);
  CAPTURE(o.err);
  if (RFLOW_HAS_INFLATE)
    CHECK(o.status == 0);  // an embedding in f32 and a block in f64
  else
    CHECK(o.err.find(
              "is compressed, and there is no inflater in this program: build it where zlib") !=
          std::string::npos);
}
