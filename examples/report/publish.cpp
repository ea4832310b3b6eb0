// SPDX-License-Identifier: Apache-2.0
#include "publish.hpp"

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace report {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(fs::path const& path, std::string const& why) {
  throw std::runtime_error(path.string() + ": " + why);
}

/// Interrupts wait until the folder has its name or is gone.
class uninterrupted {
 public:
  uninterrupted() {
    ::sigset_t signals;
    ::sigemptyset(&signals);
    for (int const s : {SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&signals, s);
    ::pthread_sigmask(SIG_BLOCK, &signals, &before_);
  }
  ~uninterrupted() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  uninterrupted(uninterrupted const&) = delete;
  uninterrupted& operator=(uninterrupted const&) = delete;

 private:
  ::sigset_t before_{};
};

/// "a/b/" and "a/b" are one folder.
fs::path without_slash(fs::path target) {
  target = target.lexically_normal();
  return target.has_filename() ? target : target.parent_path();
}

/// A name beside the target that nothing has.
fs::path beside(fs::path const& target, char const* what) {
  fs::path out = target;
  out += std::string(what) + std::to_string(::getpid());
  return out;
}

void make_folder(fs::path const& folder, fs::path const& target) {
  if (::mkdir(folder.c_str(), 0777) != 0)
    fail(target, std::string("cannot be made: ") + std::strerror(errno));
}

}  // namespace

void check_target(fs::path const& asked, bool replace) {
  fs::path const target = without_slash(asked);
  std::error_code error;
  if (target.filename() == "." || target.filename() == ".." || !target.has_filename())
    fail(asked, "give the report a folder of its own");
  fs::file_status const there = fs::status(target, error);
  if (fs::exists(there) && !fs::is_directory(there)) fail(target, "is there and not a folder");
  if (fs::exists(there) && !replace && !fs::is_empty(target, error))
    fail(target, "is there and not empty; --force replaces it");
  fs::path const trial = beside(target, ".tmp-");
  uninterrupted const guard;
  make_folder(trial, target);
  ::rmdir(trial.c_str());
}

void publish(fs::path const& asked, bool replace,
             std::function<void(fs::path const&)> const& write) {
  fs::path const target = without_slash(asked);
  fs::path const fresh = beside(target, ".tmp-"), old = beside(target, ".old-");
  uninterrupted const guard;
  make_folder(fresh, target);
  std::error_code ignored;
  bool moved_away = false;
  try {
    write(fresh);
    if (fs::exists(target) && (replace || fs::is_empty(target))) {
      fs::rename(target, old);
      moved_away = true;
    }
    fs::rename(fresh, target);
  } catch (...) {
    fs::remove_all(fresh, ignored);
    if (moved_away) fs::rename(old, target, ignored);
    throw;
  }
  if (moved_away) fs::remove_all(old, ignored);
}

}  // namespace report
