// SPDX-License-Identifier: Apache-2.0
// What a file is, by its content.
#include <doctest/doctest.h>

#include <cstdint>
#include <rflow/container.hpp>
#include <rflow/npy.hpp>
#include <rflow/npz.hpp>
#include <rflow/safetensors.hpp>
#include <string>
#include <vector>

#include "files.hpp"

namespace {

using files::contains;
using rflow::container;

container kind(std::string const& content) {
  files::memory const memory(content);
  return rflow::recognize(memory.bytes);
}

template <std::size_t N>
std::string raw(char const (&text)[N]) {
  return std::string(text, N - 1);
}

/// The local header of a zip member of that name.
std::string zip_of(std::string const& name) {
  return "PK\3\4" + std::string(22, '\0') + static_cast<char>(name.size()) + std::string(3, '\0') +
         name + std::string(100, 'x');
}

}  // namespace

TEST_CASE("files are known by their content") {
  std::string const zeros(600, '\0');
  std::string tar(600, '\0');
  tar.replace(0, 5, "a.txt").replace(257, 5, "ustar");
  struct example {
    std::string content;
    container what;
  };
  for (example const& e : std::vector<example>{
           {"", container::empty},
           {files::read(files::fixture("f4.npy")), container::npy},
           {files::read(files::fixture("stored.npz")), container::npz},
           {files::read(files::fixture("deflated.npz")), container::npz},
           {files::read(files::fixture("all.safetensors")), container::safetensors},
           {raw("\2\0\0\0\0\0\0\0{}"), container::safetensors},
           {raw("\x1f\x8b\x08\0\0\0\0\0{") + zeros, container::safetensors},  // a header's size
           {raw("\4\0\0\0\0\0\0\0  {}"), container::safetensors},
           {raw("PK\5\6") + std::string(18, '\0'), container::npz},  // an empty one
           {zip_of("archive/data.pkl"), container::torch},
           {zip_of("x/byteorder") + "x/data.pkl", container::torch},
           {zip_of("document.xml"), container::zip},
           {raw("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.") + zeros,
            container::torch_legacy},
           {raw("\x80\x04\x95\x0c\0\0\0\0\0\0\0}"), container::pickle},
           {raw("\x80\x02}q\0."), container::pickle},
           {raw("\x89HDF\r\n\x1a\n") + zeros, container::hdf5},
           {"GGUF" + zeros, container::gguf},
           {raw("ARROW1\0\0") + zeros, container::arrow_file},
           {raw("\xff\xff\xff\xff\x08\0\0\0") + zeros, container::arrow_stream},
           {"FEA1" + zeros, container::feather},
           {"PAR1" + zeros, container::parquet},
           {raw("\x1f\x8b\x08\0") + zeros, container::gzip},
           {"BZh91AY" + zeros, container::bzip2},
           {raw("\xfd\x37zXZ\0") + zeros, container::xz},
           {raw("\x28\xb5\x2f\xfd") + zeros, container::zstd},
           {raw("\x04\x22\x4d\x18") + zeros, container::lz4},
           {tar, container::tar},
           {"MATLAB 5.0 MAT-file, Platform" + zeros, container::matlab},
           {raw("SQLite format 3\0") + zeros, container::sqlite},
           {"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            container::lfs_pointer},
           {"<!DOCTYPE html>\n<html>", container::html},
           {"\n  <HTML lang=\"en\">", container::html},
           {"\xef\xbb\xbf<html>", container::html},
           {"<?xml version=\"1.0\"?><Error/>", container::html},
           {"{\"a\": 1}", container::json},
           {"{\"metadata\": {}, \"weight_map\": {}}", container::index},
           {"1.5,2.5\n3,4\n", container::text},
           {"hello", container::text},
           {"na\xc3\xafve", container::text},
           {zeros, container::unknown},
           {raw("\1\2\3\4\5\6\7\10\11\12"), container::unknown},
       }) {
    CAPTURE(e.content.substr(0, 40));
    CHECK(to_string(kind(e.content)) == to_string(e.what));
    CHECK(kind(e.content) == e.what);
  }
}

TEST_CASE("every beginning of a file is of some kind") {
  for (auto const* name : {"f4.npy", "stored.npz", "all.safetensors", "object.npy"}) {
    std::string const whole = files::read(files::fixture(name));
    for (std::size_t n = 0; n < whole.size(); ++n)
      CHECK_FALSE(to_string(kind(whole.substr(0, n))).empty());
  }
}

TEST_CASE("cures name the file as a shell takes it") {
  CHECK(contains(cure_of(container::gzip, "a/b-1.gz"), "gzip -dc a/b-1.gz > a/b-1.gz.plain"));
  CHECK(contains(cure_of(container::tar, "it's here.tar"), "tar -xf 'it'\\''s here.tar'"));
  CHECK(contains(cure_of(container::tar, "$(x).tar"), "tar -xf '$(x).tar'"));
  CHECK(contains(cure_of(container::tar, "-x.tar"), "tar -xf './-x.tar'"));
  CHECK(contains(cure_of(container::tar, "a\nb.tar"), "tar -xf FILE"));
  CHECK(contains(cure_of(container::tar, "FILE.tar"), "tar -xf FILE.tar"));
  CHECK(contains(cure_of(container::lfs_pointer, "x"), "git lfs pull"));
  CHECK(cure_of(container::npy, "x").empty());
  for (int i = 0; i <= static_cast<int>(container::text); ++i) {
    auto const what = static_cast<container>(i);
    CHECK_FALSE(to_string(what).empty());
    CHECK_FALSE(contains(cure_of(what, "x"), "\n"));
  }
}

TEST_CASE("readers name what they were given instead") {
  files::memory const pointer("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  files::memory const page("<!doctype html><html><body>Not found</body></html>");
  files::memory const npy(files::read(files::fixture("f4.npy")));
  auto const error = [](auto&& open) { return files::error_of<rflow::format_error>(open); };
  CHECK(
      contains(error([&] { rflow::safetensors_file(pointer.file()); }),
               "not a safetensors file, but a Git LFS pointer, and not the file itself: fetch it: "
               "git lfs pull"));
  CHECK(contains(error([&] { rflow::npy_file(page.file()); }), "not a .npy file, but a web page"));
  CHECK(contains(error([&] { rflow::npz_file(npy.file()); }), "not a .npz file, but a .npy file"));
  CHECK(contains(error([&] { rflow::safetensors_file(npy.file()); }), "but a .npy file"));
}
