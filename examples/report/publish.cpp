// SPDX-License-Identifier: Apache-2.0
#include "publish.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <new>
#include <optional>
#include <stdexcept>

#include "../common/leftovers.hpp"

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

/// Where a path leads, all links followed; it need not be there. "a/b/" and "a/b" are one folder.
fs::path real(fs::path const& path) {
  fs::path const out = fs::weakly_canonical(fs::absolute(path));
  return out.has_filename() ? out : out.parent_path();
}

/// Whether a path is the folder or lies in it; both as real() gives them.
bool holds(fs::path const& folder, fs::path const& path) {
  return std::mismatch(folder.begin(), folder.end(), path.begin(), path.end()).first ==
         folder.end();
}

/// Where an input is, and where the link to it is: in a folder that is replaced, either is lost.
std::vector<fs::path> places(fs::path const& input) {
  try {
    return {real(input), real(fs::absolute(input).parent_path()) / input.filename()};
  } catch (fs::filesystem_error const& error) {
    fail(input, error.code().message());
  }
}

/// Throws unless the folder may be made or replaced: whatever it holds can be made again.
void require_expendable(fs::path const& asked, fs::path const& target, bool replace,
                        std::vector<std::string> const& inputs) {
  if (fs::is_symlink(fs::symlink_status(target)))
    fail(asked, "is a link to something that is not there");
  if (fs::exists(target) && !fs::is_directory(target)) fail(asked, "is there and not a folder");
  if (holds(target, fs::current_path()))
    fail(asked, "holds the present folder; give the report a folder of its own");
  for (fs::path const input : inputs)
    for (fs::path const& place : places(input))
      if (holds(target, place)) fail(asked, "holds the input " + input.string());
  if (!fs::exists(target) || fs::is_empty(target)) return;
  for (auto const& entry : fs::directory_iterator(target))
    if (std::string const name = entry.path().filename().string();
        !is_report_file(name) || !fs::is_regular_file(entry.symlink_status()))
      fail(asked, "holds " + name + ", which is not a report's; give the report another folder");
  if (!replace) fail(asked, "holds a report; --force replaces it");
}

/// Removes a folder with what reports hold. With anything else in it, it stays.
void remove_report(fs::path const& folder) {
  std::error_code ignored;
  std::vector<fs::path> files;
  for (auto const& entry : fs::directory_iterator(folder, ignored)) files.push_back(entry.path());
  for (fs::path const& file : files) {
    std::string const name = file.filename().string();
    // A writer that was killed leaves FILE.tmp-… behind.
    if (is_report_file(name) || is_report_file(name.substr(0, name.find(".tmp-"))))
      fs::remove(file, ignored);
  }
  fs::remove(folder, ignored);
}

/// A new folder beside the target, locked as long as this lives, so that no other run takes it for
/// one that was left behind.
class fresh_folder {
 public:
  /// @param asked  for the message
  fresh_folder(fs::path const& target, fs::path const& asked) {
    for (int attempt = 0;; ++attempt) {
      path = target;
      path += ".tmp-" + common::random_name();
      if (::mkdir(path.c_str(), 0777) == 0) break;
      if (errno != EEXIST || attempt == 100)
        fail(asked, std::string("cannot be made: ") + std::strerror(errno));
    }
    lock_.emplace(path);
  }
  ~fresh_folder() {
    try {
      if (!path.empty()) remove_report(path);
    } catch (std::bad_alloc const&) {
      // the next run removes it
    }
  }
  fresh_folder(fresh_folder const&) = delete;
  fresh_folder& operator=(fresh_folder const&) = delete;

  fs::path path;  // empty: nothing is left to remove

 private:
  std::optional<common::lock> lock_;
};

/// Whether the two folders have changed names, in one call. Not every system and file system can.
bool exchange(fs::path const& a, fs::path const& b) {
#ifdef RENAME_EXCHANGE
  if (::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP)
    throw fs::filesystem_error("", a, b, std::error_code(errno, std::generic_category()));
#else
  static_cast<void>(a), static_cast<void>(b);
#endif
  return false;
}

/// Gives the fresh folder the target's name. What was there is left under the fresh one's, or gone.
void put_in_place(fresh_folder& fresh, fs::path const& target) {
  if (fs::is_directory(target) && !fs::is_empty(target)) {
    if (exchange(fresh.path, target)) return;  // and is removed with it
    // Two steps: between them neither has its name, but both are there.
    fs::path old = target;
    old += ".old-" + common::random_name();
    fs::rename(target, old);
    try {
      fs::rename(fresh.path, target);
    } catch (...) {
      std::error_code ignored;
      fs::rename(old, target, ignored);
      throw;
    }
    fresh.path = old;
    return;
  }
  fs::rename(fresh.path, target);  // also in place of an empty folder
  fresh.path.clear();
}

/// Removes what runs that were killed left beside the target. An earlier report that was on its way
/// stays if nothing stands in its place.
void remove_leftovers(fs::path const& target) {
  common::leftovers(target, ".tmp-", common::is_random_name, remove_report);
  std::error_code ignored;
  if (fs::is_directory(target, ignored))
    common::leftovers(target, ".old-", common::is_random_name, remove_report);
}

}  // namespace

bool is_report_file(std::string_view name) {
  constexpr std::string_view names[] = {
      "report.html",    "metrics.json", "sites.csv",     "blocks.csv",   "cka.npy",
      "cka-1.npy",      "cka-2.npy",    "cka-cross.npy", "adjacent.npy", "adjacent-1.npy",
      "adjacent-2.npy", "study.json",   "runs.csv",      "table.csv"};
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

void check_target(fs::path const& asked, bool replace, std::vector<std::string> const& inputs) {
  try {
    fs::path const target = real(asked);
    require_expendable(asked, target, replace, inputs);
    uninterrupted const guard;
    fresh_folder const trial(target, asked);
  } catch (fs::filesystem_error const& error) {
    fail(asked, error.code().message());
  }
}

void publish(fs::path const& asked, bool replace, std::vector<std::string> const& inputs,
             std::function<void(fs::path const&)> const& write) {
  try {
    fs::path const target = real(asked);
    uninterrupted const guard;
    {
      fresh_folder fresh(target, asked);
      write(fresh.path);
      require_expendable(asked, target, replace, inputs);  // again: measuring takes its time
      put_in_place(fresh, target);
    }
    try {
      remove_leftovers(target);
    } catch (std::bad_alloc const&) {
      // there is a report; the next run removes them
    }
  } catch (fs::filesystem_error const& error) {
    fail(asked, error.code().message());
  }
}

}  // namespace report
