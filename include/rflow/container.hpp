// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tells by its first bytes what a file is, whatever it is called, and what to do with one that rflow
// does not read.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

namespace rflow {

/// What a file is.
enum class container : std::uint8_t {
  unknown,
  empty,
  npy,
  npz,
  safetensors,
  index,  ///< JSON that says which file holds which tensor of a safetensors file in parts
  // not read:
  torch,         ///< PyTorch's zip
  torch_legacy,  ///< PyTorch's pickle, before 1.6
  pickle,
  zip,
  hdf5,
  gguf,
  arrow_file,  ///< also Feather, version 2
  arrow_stream,
  feather,  ///< version 1
  parquet,
  gzip,
  bzip2,
  xz,
  zstd,
  lz4,
  tar,
  matlab,
  sqlite,
  lfs_pointer,
  html,
  json,
  text,
};

namespace detail {

struct container_facts {
  std::string_view name;  ///< with its article
  std::string_view cure;  ///< FILE stands for the path; empty if there is none
};

constexpr container_facts facts_of(container what) {
  switch (what) {
    case container::empty: return {"empty", ""};
    case container::npy: return {"a .npy file", ""};
    case container::npz: return {"a .npz file", ""};
    case container::safetensors: return {"a safetensors file", ""};
    case container::index: return {"the index of a safetensors file in parts", ""};
    case container::torch:
    case container::torch_legacy:
      return {"a PyTorch file (.pt, .pth)",
              "save it as safetensors (a dictionary or list of tensors): python3 -c \"import sys, "
              "torch; from safetensors.torch import save_file; f = sys.argv[1]; x = torch.load(f, "
              "map_location='cpu'); x = x if isinstance(x, dict) else {f'hidden_states.{i}': t for "
              "i, t in enumerate(x)}; save_file({str(k): t.clone().contiguous() for k, t in "
              "x.items() if isinstance(t, torch.Tensor)}, f + '.safetensors')\" FILE"};
    case container::pickle:
      return {"a Python pickle",
              "if you trust it, save it as .npz (a dictionary or list of arrays): python3 -c "
              "\"import sys, pickle, numpy as np; f = sys.argv[1]; x = pickle.load(open(f, 'rb')); "
              "x = x if isinstance(x, dict) else {f'hidden_states.{i}': t for i, t in "
              "enumerate(x)}; np.savez(f + '.npz', **{str(k): np.asarray(t) for k, t in "
              "x.items()})\" FILE"};
    case container::zip: return {"a zip archive without .npy files", "unpack it: unzip FILE"};
    case container::hdf5:
      return {"an HDF5 file",
              "save its data sets as .npz: python3 -c \"import sys, h5py, numpy as np; f = "
              "sys.argv[1]; d = {}; h5py.File(f).visititems(lambda n, x: d.update({n.replace('/', "
              "'.'): x[()]}) if isinstance(x, h5py.Dataset) else None); np.savez(f + '.npz', "
              "**d)\" FILE"};
    case container::gguf:
      return {"a GGUF file (a model's weights, as a rule, and not activations)",
              "if it holds activations, save them as .npz: python3 -c \"import sys, numpy as np; "
              "from gguf import GGUFReader, dequantize; f = sys.argv[1]; np.savez(f + '.npz', "
              "**{t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(f).tensors})\" "
              "FILE"};
    case container::arrow_file:
      return {"an Arrow or Feather file",
              "save its columns as .npz: python3 -c \"import sys, pyarrow as pa, numpy as np; f = "
              "sys.argv[1]; t = pa.ipc.open_file(f).read_all(); d = {c: np.array(t[c].to_pylist()) "
              "for c in t.column_names}; np.savez(f + '.npz', **d)\" FILE"};
    case container::arrow_stream:
      return {"an Arrow stream",
              "save its columns as .npz: python3 -c \"import sys, pyarrow as pa, numpy as np; f = "
              "sys.argv[1]; t = pa.ipc.open_stream(f).read_all(); d = {c: "
              "np.array(t[c].to_pylist()) for c in t.column_names}; np.savez(f + '.npz', **d)\" "
              "FILE"};
    case container::feather:
      return {"a Feather file",
              "save its columns as .npz: python3 -c \"import sys, pyarrow.feather as pf, numpy as "
              "np; f = sys.argv[1]; t = pf.read_table(f); d = {c: np.array(t[c].to_pylist()) for c "
              "in t.column_names}; np.savez(f + '.npz', **d)\" FILE"};
    case container::parquet:
      return {"a Parquet file",
              "save its columns as .npz: python3 -c \"import sys, pyarrow.parquet as pq, numpy as "
              "np; f = sys.argv[1]; t = pq.ParquetFile(f).read(); d = {c: "
              "np.array(t[c].to_pylist()) for c in t.column_names}; np.savez(f + '.npz', **d)\" "
              "FILE"};
    case container::gzip: return {"compressed (gzip)", "unpack it: gzip -dc FILE > FILE.plain"};
    case container::bzip2: return {"compressed (bzip2)", "unpack it: bzip2 -dc FILE > FILE.plain"};
    case container::xz: return {"compressed (xz)", "unpack it: xz -dc FILE > FILE.plain"};
    case container::zstd:
      return {"compressed (Zstandard)", "unpack it: zstd -dc FILE > FILE.plain"};
    case container::lz4: return {"compressed (lz4)", "unpack it: lz4 -dc FILE > FILE.plain"};
    case container::tar: return {"a tar archive", "unpack it: tar -xf FILE"};
    case container::matlab:
      return {"a MATLAB file",
              "save its arrays as .npz: python3 -c \"import sys, scipy.io, numpy as np; f = "
              "sys.argv[1]; np.savez(f + '.npz', **{k: x for k, x in scipy.io.loadmat(f).items() "
              "if k[0] != '_'})\" FILE"};
    case container::sqlite: return {"an SQLite database", ""};
    case container::lfs_pointer:
      return {"a Git LFS pointer, and not the file itself",
              "fetch it: git lfs pull, in its repository"};
    case container::html:
      return {"a web page",
              "the download brought an error, a login or a preview: take the link to the raw file"};
    case container::json: return {"JSON text", ""};
    case container::text:
      return {"text",
              "save each site's numbers, a token a line, as .npy, all in one folder: python3 -c "
              "\"import sys, numpy as np; f = sys.argv[1]; s = open(f).read(); "
              "np.save(f.rsplit('.', 1)[0] + '.npy', np.loadtxt(f, delimiter=',' if ',' in s else "
              "None, ndmin=2))\" FILE"};
    default: return {"of no kind that is known", ""};
  }
}

/// A path as a shell takes it; FILE if it has characters that garble a line.
inline std::string quoted_for_shell(std::string_view path) {
  bool plain = !path.empty() && path.front() != '-';
  for (char const c : path) {
    if ((c >= 0 && c < ' ') || c == '\x7f') return "FILE";
    plain = plain && ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                      std::string_view("/._-+,=@%:").find(c) != std::string_view::npos);
  }
  if (plain) return std::string(path);
  std::string out = path.starts_with('-') ? "'./" : "'";
  for (char const c : path) c == '\'' ? out += "'\\''" : out += c;
  return out + "'";
}

inline bool looks_like_text(std::string_view start) {
  return std::all_of(start.begin(), start.end(), [](char c) {
    auto const byte = static_cast<unsigned char>(c);
    return byte >= ' ' ? byte != 0x7f : c == '\t' || c == '\n' || c == '\r' || c == '\f';
  });
}

/// Of a zip archive: what the name of its first member, or the directory at its end, says.
inline container kind_of_zip(std::string_view all) {
  if (all.size() >= 30) {
    auto const byte = [&](std::size_t i) {
      return std::size_t{static_cast<unsigned char>(all[i])};
    };
    std::string_view const first = all.substr(30).substr(0, byte(26) | byte(27) << 8);
    if (first.ends_with(".npy")) return container::npz;
    if (first.ends_with("/data.pkl")) return container::torch;
  }
  std::string_view const end = all.substr(all.size() - (std::min<std::size_t>)(all.size(), 65536));
  if (end.find("/data.pkl") != std::string_view::npos) return container::torch;
  bool const nothing_in_it = all.starts_with("PK\5\6");
  return nothing_in_it || end.find(".npy") != std::string_view::npos ? container::npz
                                                                     : container::zip;
}

}  // namespace detail

/// What a file is, by its content.
/// Cost: the first 4096 bytes are looked at; of a zip archive also the last 65,536, of JSON all.
/// @param  bytes  the whole file
inline container recognize(std::span<std::byte const> bytes) {
  using namespace std::string_view_literals;
  std::string_view const all(reinterpret_cast<char const*>(bytes.data()), bytes.size());
  std::string_view const start = all.substr(0, 4096);
  if (start.empty()) return container::empty;
  if (start.size() > 8) {
    // A safetensors file: the size of its header, and the header, which is JSON. It comes first
    // because the size may begin like anything.
    std::uint64_t size = 0;
    std::memcpy(&size, start.data(), 8);
    auto const first = start.find_first_not_of(" \t\r\n", 8);
    if (size <= 100'000'000 && first != std::string_view::npos && start[first] == '{')
      return container::safetensors;
  }
  struct magic {
    std::string_view bytes;
    container what;
  };
  constexpr magic known[] = {
      {"\x93NUMPY"sv, container::npy},
      {"\x89HDF\r\n\x1a\n"sv, container::hdf5},
      {"GGUF"sv, container::gguf},
      {"ARROW1\0\0"sv, container::arrow_file},
      {"FEA1"sv, container::feather},
      {"PAR1"sv, container::parquet},
      {"\x1f\x8b\x08"sv, container::gzip},
      {"BZh"sv, container::bzip2},
      {"\xfd"
       "7zXZ\0"sv,
       container::xz},
      {"\x28\xb5\x2f\xfd"sv, container::zstd},
      {"\x04\x22\x4d\x18"sv, container::lz4},
      {"MATLAB 5.0 MAT-file"sv, container::matlab},
      {"SQLite format 3\0"sv, container::sqlite},
      {"version https://git-lfs.github.com/spec/"sv, container::lfs_pointer},
      // PyTorch's magic number as a pickle of its own, in protocol 2.
      {"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"sv, container::torch_legacy},
  };
  for (magic const& m : known)
    if (start.starts_with(m.bytes)) return m.what;
  if (start.starts_with("PK\3\4") || start.starts_with("PK\5\6")) return detail::kind_of_zip(all);
  if (start.size() > 262 && start.substr(257, 5) == "ustar") return container::tar;
  if (start.size() > 8 && start.starts_with("\xff\xff\xff\xff"sv)) {
    // An Arrow stream: the size of its schema follows, in eights.
    std::uint32_t size = 0;
    std::memcpy(&size, start.data() + 4, 4);
    if (size > 0 && size % 8 == 0 && size < all.size()) return container::arrow_stream;
  }
  if (start.size() > 2 && start[0] == '\x80' && start[1] >= 2 && start[1] <= 5)
    return container::pickle;

  std::string_view words = start;
  if (words.starts_with("\xef\xbb\xbf")) words.remove_prefix(3);
  auto const first = words.find_first_not_of(" \t\r\n\f");
  words.remove_prefix((std::min)(first, words.size()));
  std::string low(words.substr(0, 16));
  for (char& c : low)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  for (std::string_view const tag : {"<!doctype", "<html", "<head", "<?xml", "<body"})
    if (low.starts_with(tag)) return container::html;
  if (low.starts_with('{') && detail::looks_like_text(start))
    return all.find("\"weight_map\"") != std::string_view::npos ? container::index
                                                                : container::json;
  return detail::looks_like_text(start) ? container::text : container::unknown;
}

/// Its name with an article, for messages: "a PyTorch file (.pt, .pth)".
inline std::string to_string(container what) { return std::string(detail::facts_of(what).name); }

/// What to do with a file that rflow does not read, in one line, with its path where the line needs it;
/// empty if there is nothing to say.
inline std::string cure_of(container what, std::string_view path) {
  std::string out(detail::facts_of(what).cure);
  std::string const file = detail::quoted_for_shell(path);
  for (std::size_t at = 0; (at = out.find("FILE", at)) != std::string::npos; at += file.size())
    out.replace(at, 4, file);
  return out;
}

namespace detail {

/// ", but a .npz file", ", but a web page: the download …", for the message of a reader that was
/// given something else; empty if nothing is known.
inline std::string but(std::span<std::byte const> bytes, std::string_view path) {
  container const what = recognize(bytes);
  if (what == container::unknown || what == container::empty) return "";
  std::string const cure = cure_of(what, path);
  return ", but " + to_string(what) + (cure.empty() ? "" : ": " + cure);
}

}  // namespace detail
}  // namespace rflow
