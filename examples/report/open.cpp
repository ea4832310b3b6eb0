// SPDX-License-Identifier: Apache-2.0
#include "open.hpp"

#include <rflow/container.hpp>
#include <rflow/safetensors.hpp>
#include <rflow/sharded_safetensors.hpp>

#include <concepts>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace report {
namespace {

namespace fs = std::filesystem;
using rflow::container;

/// What the readers have in common.
template <class File>
class named_tensors : public opened {
 public:
  explicit named_tensors(File file) : file_(std::move(file)) {}
  std::string const& path() const override { return file_.path(); }
  std::vector<std::string> names() const override { return file_.names(); }
  bool contains(std::string_view name) const override { return file_.contains(name); }
  rflow::tensor operator[](std::string_view name) override { return file_[name]; }
  std::map<std::string, std::string> metadata() const override {
    if constexpr (requires { file_.metadata(); })
      return {file_.metadata().begin(), file_.metadata().end()};
    else
      return {};
  }
  bool is_numpy() const override {
    return !requires { std::declval<File&>().metadata(); };
  }
  /// In a .npz little is aligned.
  bool copies() const override { return std::same_as<File, rflow::npz_file>; }

 private:
  File file_;
};

class single_array : public opened {
 public:
  explicit single_array(rflow::npy_file file) : file_(std::move(file)) {}
  std::string const& path() const override { return file_.path(); }
  std::vector<std::string> names() const override { return {file_.array().name}; }
  bool contains(std::string_view name) const override { return name == file_.array().name; }
  rflow::tensor operator[](std::string_view) override { return file_.array(); }
  bool is_numpy() const override { return true; }
  bool is_single_array() const override { return true; }

 private:
  rflow::npy_file file_;
};

template <class File>
std::unique_ptr<opened> hold(File file) {
  return std::make_unique<named_tensors<File>>(std::move(file));
}

std::unique_ptr<opened> open_folder(std::string const& path, rflow::reinterpret bits) {
  if (rflow::sharded_safetensors::is_one(path)) return hold(rflow::sharded_safetensors(path));
  rflow::npy_directory folder(path, bits);
  if (!folder.names().empty()) return hold(std::move(folder));
  std::size_t tensors = 0;
  std::string zarr, last;
  for (auto const& entry : fs::directory_iterator(path)) {
    std::string const name = entry.path().filename().string();
    if (name == ".zgroup" || name == ".zarray" || name == "zarr.json") zarr = name;
    if (entry.path().extension() == ".safetensors") ++tensors, last = entry.path().string();
  }
  if (!zarr.empty())
    throw std::runtime_error(
        "a Zarr store, which is not read: save its arrays as .npz with numpy.savez");
  if (tensors > 0)
    throw std::runtime_error("no .npy file and no .safetensors.index.json in this folder, but " +
                             std::to_string(tensors) + " .safetensors: give " +
                             (tensors == 1 ? last
                                           : "one of them, or --shards with all if they are "
                                             "shards of tokens"));
  throw std::runtime_error("no .npy file in this folder");
}

/// What a file of that name is taken for.
container expected_of(fs::path const& path) {
  std::string const suffix = path.extension().string();
  if (suffix == ".npy") return container::npy;
  if (suffix == ".npz") return container::npz;
  if (suffix == ".safetensors") return container::safetensors;
  return container::unknown;  // no promise
}

std::unique_ptr<opened> open_file(std::string const& path, rflow::reinterpret bits, bool alone) {
  rflow::mapped_file file(path);
  container const what = rflow::recognize(file.bytes());
  container const promised = expected_of(path);
  std::unique_ptr<opened> out;
  switch (what) {
    case container::npy:
      out = std::make_unique<single_array>(rflow::npy_file(std::move(file), bits));
      break;
    case container::npz: {
      rflow::npz_file archive(std::move(file), inflater_here(), bits);
      if (archive.size() == 0) throw std::runtime_error("no array in this .npz");
      out = hold(std::move(archive));
      break;
    }
    case container::safetensors:
      if (!alone && rflow::sharded_safetensors::is_one(path))
        out = hold(rflow::sharded_safetensors(path));
      else
        out = hold(rflow::safetensors_file(std::move(file)));
      break;
    case container::index: out = hold(rflow::sharded_safetensors(path)); break;
    case container::empty: throw std::runtime_error("the file is empty");
    case container::unknown:
      // The reader that its name promises says best what is wrong with it.
      if (promised == container::npy) rflow::npy_file(std::move(file), bits);
      if (promised == container::npz) rflow::npz_file(std::move(file));
      if (promised == container::safetensors) rflow::safetensors_file(std::move(file));
      throw std::runtime_error("neither a safetensors file nor a .npy nor a .npz");
    default: {
      std::string const cure = rflow::cure_of(what, path);
      throw std::runtime_error(to_string(what) + ", which is not read" +
                               (cure.empty() ? "" : "; " + cure));
    }
  }
  if (promised != container::unknown && promised != what)
    out->notes.push_back("the file is " + to_string(what) + ", whatever it is called (" +
                         fs::path(path).extension().string() + "), and was read as that");
  return out;
}

/// The path of a part without its number.
std::string without_number(std::string path) {
  std::size_t const end = path.rfind("-of-");
  std::size_t begin = end;
  while (begin > 0 && path[begin - 1] >= '0' && path[begin - 1] <= '9') --begin;
  return path.erase(begin, end - begin);
}

}  // namespace

bool are_parts_of_one(std::string const& a, std::string const& b) {
  auto const is_part = [](std::string const& path) {
    return fs::path(path).extension() == ".safetensors" && rflow::sharded_safetensors::is_one(path);
  };
  return is_part(a) && is_part(b) &&
         without_number(fs::path(a).lexically_normal().string()) ==
             without_number(fs::path(b).lexically_normal().string());
}

std::unique_ptr<opened> open_input(std::string const& path, rflow::reinterpret bits, bool alone) {
  std::error_code ignored;
  return fs::is_directory(path, ignored) ? open_folder(path, bits) : open_file(path, bits, alone);
}

}  // namespace report
