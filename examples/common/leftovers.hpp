// SPDX-License-Identifier: Apache-2.0
#pragma once

// Temporary files and folders beside the place they are made for: names that nothing else has, and
// what killed programs left behind. Who is at work holds a lock, which the system drops with its
// owner; process numbers would not do, because those of two containers are the same.

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace common {

/// Eight random letters and digits.
inline std::string random_name() {
  constexpr char letters[] = "0123456789abcdefghijklmnopqrstuvwxyz";
  std::random_device bits;
  std::string out;
  for (int i = 0; i < 8; ++i) out += letters[bits() % 36];
  return out;
}

/// A file or folder that nobody else has locked, locked.
class lock {
 public:
  explicit lock(std::filesystem::path const& path)
      : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW)),
        held_(fd_ >= 0 && ::flock(fd_, LOCK_EX | LOCK_NB) == 0) {}
  ~lock() {
    if (fd_ >= 0) ::close(fd_);
  }
  lock(lock const&) = delete;
  lock& operator=(lock const&) = delete;

  bool held() const { return held_; }

 private:
  int fd_;
  bool held_;
};

/// Whether random_name() could have given it.
inline bool is_random_name(std::string_view text) {
  return text.size() == 8 &&
         text.find_first_not_of("0123456789abcdefghijklmnopqrstuvwxyz") == std::string_view::npos;
}

/// Whether an atomic_writer could have given it to its temporary, after ".tmp-": two numbers.
inline bool is_writers_name(std::string_view text) {
  auto const number = [](std::string_view part) {
    return !part.empty() && part.find_first_not_of("0123456789") == std::string_view::npos;
  };
  std::size_t const dash = text.find('-');
  return dash != std::string_view::npos && number(text.substr(0, dash)) &&
         number(text.substr(dash + 1));
}

/// Calls remove for every neighbour of the path whose name is its name, the mark and a text that
/// fits, and whose maker is gone. Errors are passed over: it is no harm if something stays.
inline void leftovers(std::filesystem::path const& path, std::string const& mark,
                      bool (*fits)(std::string_view),
                      std::function<void(std::filesystem::path const&)> const& remove) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  fs::path folder = path.parent_path();
  if (folder.empty()) folder = ".";
  std::string const prefix = path.filename().string() + mark;
  std::vector<fs::path> found;
  for (fs::directory_iterator entry(folder, ignored), end; !ignored && entry != end;
       entry.increment(ignored)) {
    std::string const name = entry->path().filename().string();
    if (name.starts_with(prefix) && fits(std::string_view(name).substr(prefix.size())))
      found.push_back(entry->path());
  }
  for (fs::path const& left : found)
    if (lock const mine(left); mine.held()) remove(left);
}

}  // namespace common
