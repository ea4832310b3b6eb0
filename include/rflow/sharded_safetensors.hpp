// SPDX-License-Identifier: Apache-2.0
#pragma once

// From safetensors in parts: an index and its files, or files numbered -00001-of-00002, read as one.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <rflow/file.hpp>
#include <rflow/safetensors.hpp>

namespace rflow {

/// A safetensors file in parts, read as one: what large checkpoints come as. Each tensor lies whole in
/// one part.
class sharded_safetensors {
 public:
  /// Opens and validates all parts; reads none of the data.
  /// @param  path  an index (NAME.safetensors.index.json, or .json at least: its weight_map says which file holds which
  ///               tensor; other tensors are left alone), a folder that holds one, or a part called
  ///               NAME-00001-of-00002.safetensors, whose siblings are found
  /// @throws std::system_error naming the part that is missing or cannot be opened;
  ///         format_error if the index or a part is malformed, if the index names a file outside its
  ///         folder, if a tensor is not in the part that it names, or if without an index two parts
  ///         have tensors of one name; std::invalid_argument if path is nothing of these
  explicit sharded_safetensors(std::filesystem::path const& path);

  /// Whether the path is one that the constructor takes: looks at names only.
  static bool is_one(std::filesystem::path const& path) {
    return index_of(path) || is_part(path.filename().string());
  }

  /// Names of the tensors in alphabetical order.
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    out.reserve(where_.size());
    for (auto const& [name, part] : where_) out.push_back(name);
    return out;
  }
  /// Whether there is a tensor of that name.
  bool contains(std::string_view name) const { return where_.find(name) != where_.end(); }
  /// Number of tensors.
  std::size_t size() const { return where_.size(); }
  /// Number of files.
  std::size_t parts() const { return parts_.size(); }

  /// A tensor; valid as long as this object. As safetensors_file's.
  /// @throws std::invalid_argument if there is no such tensor
  tensor operator[](std::string_view name) const {
    auto const found = where_.find(name);
    if (found == where_.end())
      detail::reject("rflow::sharded_safetensors",
                     path_ + " has no tensor '" + detail::printable(name) + "'");
    return parts_[found->second][name];
  }

  /// The free-form strings of all parts, but for keys on which they disagree.
  std::map<std::string, std::string, std::less<>> const& metadata() const { return metadata_; }

  /// The path it was opened by.
  std::string const& path() const { return path_; }

 private:
  static std::optional<std::filesystem::path> index_of(std::filesystem::path const& path);
  static bool is_part(std::string const& name);
  std::size_t add(std::filesystem::path const& part);
  void read_index(std::filesystem::path const& index);
  void find_siblings(std::filesystem::path const& part);

  std::string path_;
  std::vector<safetensors_file> parts_;
  std::map<std::string, std::size_t, std::less<>> where_;  // which part holds it
  std::map<std::string, std::string, std::less<>> metadata_;
  std::set<std::string, std::less<>> contradicted_;
};

// ---- implementation -----------------------------------------------------------------------------

namespace detail {

/// Takes an index's weight_map event by event, so that repeated names are seen. The members are those
/// of nlohmann's SAX interface.
class weight_map {
 public:
  std::map<std::string, std::string, std::less<>> files;  // of each tensor
  bool found = false;

  explicit weight_map(std::string path) : path_(std::move(path)) {}

  bool null() { return other(); }
  bool boolean(bool) { return other(); }
  bool number_integer(std::int64_t) { return other(); }
  bool number_unsigned(std::uint64_t) { return other(); }
  bool number_float(double, std::string const&) { return other(); }
  bool binary(std::vector<std::uint8_t>&) { return other(); }
  bool string(std::string& text) {
    if (!inside_ || depth_ != 2) return other();
    file_->second = std::move(text);
    return true;
  }
  bool start_object(std::size_t) {
    if (inside_) return other();
    if (++depth_ == 2 && is_next_) inside_ = found = true;
    return true;
  }
  bool key(std::string& name) {
    if (inside_) {
      auto const [at, is_new] = files.try_emplace(std::move(name));
      if (!is_new) fail("tensor '" + printable(at->first) + "' appears twice in weight_map");
      file_ = &*at;
    } else if (depth_ == 1) {
      is_next_ = name == "weight_map";
      if (is_next_ && found) fail("weight_map appears twice");
    }
    return true;
  }
  bool end_object() {
    inside_ = false;
    --depth_;
    return true;
  }
  bool start_array(std::size_t) {
    if (inside_) return other();
    ++depth_;
    return true;
  }
  bool end_array() {
    --depth_;
    return true;
  }
  bool parse_error(std::size_t at, std::string const&, nlohmann::json::exception const&) {
    throw format_error(path_, at == 0 ? 0 : at - 1, "the index is not UTF-8 JSON");
  }

 private:
  [[noreturn]] void fail(std::string const& rule) const { throw format_error(path_, 0, rule); }
  bool other() const {
    if (inside_) fail("weight_map names something else than a file");
    if (depth_ == 1 && is_next_) fail("weight_map is no object");
    return true;
  }

  std::string path_;
  std::size_t depth_ = 0;
  bool is_next_ = false, inside_ = false;
  std::pair<std::string const, std::string>* file_ = nullptr;
};

/// Whether a name in an index stays below its folder. Links are followed: caches are made of them.
inline bool stays_below(std::string const& name) {
  std::filesystem::path const path(name);
  if (name.empty() || name.find('\0') != std::string::npos || path.is_absolute()) return false;
  return std::none_of(path.begin(), path.end(),
                      [](std::filesystem::path const& step) { return step == ".."; });
}

/// NAME-00001-of-00002.safetensors, taken apart.
struct part_name {
  std::string before;  // "NAME-"
  std::size_t digits = 0, count = 0;
};
inline std::optional<part_name> part_name_of(std::string const& name) {
  constexpr std::string_view suffix = ".safetensors", middle = "-of-";
  if (!name.ends_with(suffix)) return std::nullopt;
  std::string_view const stem = std::string_view(name).substr(0, name.size() - suffix.size());
  auto const digits_at_end = [](std::string_view text) {
    auto const last = text.find_last_not_of("0123456789");
    return text.substr(last == std::string_view::npos ? 0 : last + 1);
  };
  std::string_view const count = digits_at_end(stem);
  std::string_view const front = stem.substr(0, stem.size() - count.size());
  if (!front.ends_with(middle)) return std::nullopt;
  std::string_view const number = digits_at_end(front.substr(0, front.size() - middle.size()));
  // The digits are as many; six of them bound what a name can ask for.
  if (number.size() != count.size() || count.empty() || count.size() > 6) return std::nullopt;
  part_name out{name.substr(0, front.size() - middle.size() - number.size()), count.size(), 0};
  std::size_t which = 0;
  for (char const c : number) which = 10 * which + static_cast<std::size_t>(c - '0');
  for (char const c : count) out.count = 10 * out.count + static_cast<std::size_t>(c - '0');
  if (which == 0 || which > out.count) return std::nullopt;
  return out;
}

}  // namespace detail

inline bool sharded_safetensors::is_part(std::string const& name) {
  return detail::part_name_of(name).has_value();
}

inline std::optional<std::filesystem::path> sharded_safetensors::index_of(
    std::filesystem::path const& path) {
  constexpr std::string_view suffix = ".safetensors.index.json";
  if (path.extension() == ".json") return path;
  std::error_code ignored;
  std::optional<std::filesystem::path> out;
  if (std::filesystem::is_directory(path, ignored))
    for (auto const& entry : std::filesystem::directory_iterator(path, ignored))
      if (entry.path().filename().string().ends_with(suffix) &&
          (!out || entry.path() < *out))  // the same one each time
        out = entry.path();
  return out;
}

inline sharded_safetensors::sharded_safetensors(std::filesystem::path const& path)
    : path_(path.string()) {
  if (auto const index = index_of(path))
    read_index(*index);
  else if (is_part(path.filename().string()))
    find_siblings(path);
  else
    detail::reject("rflow::sharded_safetensors",
                   path_ +
                       ": an index (.safetensors.index.json), a folder with one, or a part "
                       "(-00001-of-00002.safetensors) expected");
}

inline std::size_t sharded_safetensors::add(std::filesystem::path const& part) {
  parts_.emplace_back(part);
  for (auto const& [key, value] : parts_.back().metadata()) {
    if (contradicted_.find(key) != contradicted_.end()) continue;
    auto const [found, is_new] = metadata_.try_emplace(key, value);
    if (is_new || found->second == value) continue;
    contradicted_.insert(key);
    metadata_.erase(found);
  }
  return parts_.size() - 1;
}

inline void sharded_safetensors::read_index(std::filesystem::path const& index) {
  mapped_file const file(index);
  std::string_view const text(reinterpret_cast<char const*>(file.bytes().data()),
                              file.bytes().size());
  if (text.empty()) throw format_error(file.path(), 0, "the file is empty");
  if (text.size() > detail::safetensors_header_limit)
    throw format_error(file.path(), 0, "an index of more than 100000000 bytes");
  detail::weight_map map(file.path());
  nlohmann::json::sax_parse(text.begin(), text.end(), &map);
  if (!map.found) throw format_error(file.path(), 0, "the index has no weight_map");
  std::map<std::string, std::size_t, std::less<>> opened;
  for (auto const& [name, part] : map.files) {
    if (!detail::stays_below(part))
      throw format_error(file.path(), 0,
                         "'" + detail::printable(name) + "' is in '" + detail::printable(part) +
                             "', which is not a file below the index's folder");
    auto const [found, is_new] = opened.try_emplace(part);
    if (is_new) found->second = add(index.parent_path() / part);
    if (!parts_[found->second].contains(name))
      throw format_error(file.path(), 0,
                         "'" + detail::printable(name) + "' is not in " + detail::printable(part) +
                             ", where the index has it");
    where_[name] = found->second;
  }
}

inline void sharded_safetensors::find_siblings(std::filesystem::path const& part) {
  detail::part_name const name = *detail::part_name_of(part.filename().string());
  auto const digits = [&](std::size_t n) {
    std::string const text = std::to_string(n);
    return std::string(name.digits - text.size(), '0') + text;
  };
  for (std::size_t i = 1; i <= name.count; ++i) {
    std::size_t const which = add(part.parent_path() / (name.before + digits(i) + "-of-" +
                                                        digits(name.count) + ".safetensors"));
    for (std::string const& tensor : parts_[which].names())
      if (auto const [found, is_new] = where_.try_emplace(tensor, which); !is_new)
        throw format_error(parts_[which].path(), 0,
                           "'" + detail::printable(tensor) + "' is in " +
                               parts_[found->second].path() +
                               " too: these are not parts of one file");
  }
}

}  // namespace rflow
