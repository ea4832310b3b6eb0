// SPDX-License-Identifier: Apache-2.0
#include "publish.hpp"

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <stdexcept>

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

/// Throws unless the folder may be made or replaced: whatever it holds can be made again.
void require_expendable(fs::path const& asked, fs::path const& target, bool replace,
                        std::vector<std::string> const& inputs) {
  if (fs::is_symlink(fs::symlink_status(target)))
    fail(asked, "is a link to something that is not there");
  if (fs::exists(target) && !fs::is_directory(target)) fail(asked, "is there and not a folder");
  if (holds(target, fs::current_path()))
    fail(asked, "holds the present folder; give the report a folder of its own");
  for (fs::path const input : inputs)
    // A link in the folder is an input, too, wherever it leads.
    for (fs::path const& place :
         {real(input), real(fs::absolute(input).parent_path()) / input.filename()})
      if (holds(target, place)) fail(asked, "holds the input " + input.string());
  if (!fs::exists(target) || fs::is_empty(target)) return;
  for (auto const& entry : fs::directory_iterator(target))
    if (std::string const name = entry.path().filename().string();
        !is_report_file(name) || !fs::is_regular_file(entry.symlink_status()))
      fail(asked, "holds " + name + ", which is not a report's; give the report another folder");
  if (!replace) fail(asked, "holds a report; --force replaces it");
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
    fs::path const trial = beside(target, ".tmp-");
    make_folder(trial, asked);
    ::rmdir(trial.c_str());
  } catch (fs::filesystem_error const& error) {
    fail(asked, error.code().message());
  }
}

void publish(fs::path const& asked, bool replace, std::vector<std::string> const& inputs,
             std::function<void(fs::path const&)> const& write) {
  fs::path const target = real(asked);
  fs::path const fresh = beside(target, ".tmp-"), old = beside(target, ".old-");
  uninterrupted const guard;
  make_folder(fresh, asked);
  std::error_code ignored;
  bool moved_away = false;
  try {
    write(fresh);
    require_expendable(asked, target, replace, inputs);  // again: measuring takes its time
    if (fs::exists(target)) {
      fs::rename(target, old);
      moved_away = true;
    }
    fs::rename(fresh, target);
  } catch (...) {
    fs::remove_all(fresh, ignored);
    if (moved_away) fs::rename(old, target, ignored);
    throw;
  }
  if (!moved_away) return;
  // Nothing but what reports hold is ever removed.
  std::vector<fs::path> files;
  for (auto const& entry : fs::directory_iterator(old, ignored)) files.push_back(entry.path());
  for (fs::path const& file : files)
    if (is_report_file(file.filename().string())) fs::remove(file, ignored);
  fs::remove(old, ignored);
}

}  // namespace report
