// SPDX-License-Identifier: Apache-2.0
// A report takes the place of an earlier one whole or not at all, at whatever system call the program
// is killed; and what killed programs leave behind is in nobody's way.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "../../examples/common/leftovers.hpp"
#include "../../examples/report/publish.hpp"
#include "../program.hpp"

namespace {

namespace fs = std::filesystem;
using program::folder;
using program::read;

constexpr char const* files[] = {"report.html", "metrics.json", "sites.csv", "cka.npy"};

void publish(fs::path const& target, std::string const& text) {
  report::publish(target, true, {}, [&](fs::path const& inside) {
    for (char const* name : files) std::ofstream(inside / name) << text << name;
  });
}

/// What every file of a report says; empty if one is missing or says something else.
std::string said(fs::path const& target) {
  std::string out;
  for (char const* name : files) {
    if (!fs::exists(target / name)) return "";
    std::string const text = read(target / name);
    std::string const what = text.substr(0, text.find(name));
    if (text != what + name || (!out.empty() && what != out)) return "";
    out = what;
  }
  return out;
}

/// The system as it is without an exchange of names: renameat2 with that flag fails.
bool forbid_exchange() {
  ::sock_filter steps[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat2, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[4])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, RENAME_EXCHANGE, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  ::sock_fprog program{static_cast<unsigned short>(std::size(steps)), steps};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

/// Publishes in a process that is killed before or after its system call of that number.
/// @return whether it came to that call
bool publish_killed(fs::path const& target, std::string const& text, int call, bool exchanges) {
  ::pid_t const child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) ::_exit(3);
    ::raise(SIGSTOP);
    if (!exchanges && !forbid_exchange()) ::_exit(4);
    try {
      publish(target, text);
    } catch (...) {
      ::_exit(5);
    }
    ::_exit(0);
  }
  int state = 0;
  REQUIRE(::waitpid(child, &state, 0) == child);
  REQUIRE(WIFSTOPPED(state));  // else it may not be traced
  for (int i = 0; i < call; ++i) {
    REQUIRE(::ptrace(PTRACE_SYSCALL, child, nullptr, nullptr) == 0);
    REQUIRE(::waitpid(child, &state, 0) == child);
    if (WIFEXITED(state)) {
      CHECK(WEXITSTATUS(state) == 0);
      return false;
    }
    REQUIRE(WIFSTOPPED(state));
    REQUIRE(WSTOPSIG(state) == SIGTRAP);
  }
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, &state, 0) == child);
  return true;
}

}  // namespace

TEST_CASE("killed at any system call, there is the old report or the new one") {
  folder const here;
  fs::path const target = here.path / "r";
  int old_ones = 0, new_ones = 0;
  publish(target, "0 ");
  for (int call = 1;; ++call) {
    CAPTURE(call);
    std::string const before = said(target), next = std::to_string(call) + " ";
    bool const killed = publish_killed(target, next, call, true);
    std::string const found = said(target);
    REQUIRE_MESSAGE((found == before || found == next), found);
    (found == next ? new_ones : old_ones) += killed;
    if (!killed) break;
  }
  CHECK(old_ones > 10);
  CHECK(new_ones > 3);
  publish(target, "last ");
  CHECK(said(target) == "last ");
  CHECK(here.names() == std::vector<std::string>{"r"});
}

TEST_CASE("where names cannot be exchanged, no report is lost") {
  folder const here;
  fs::path const target = here.path / "r";
  publish(target, "0 ");
  for (int call = 1;; ++call) {
    CAPTURE(call);
    std::string const before = said(target), next = std::to_string(call) + " ";
    bool const killed = publish_killed(target, next, call, false);
    // Between two names there is no r, but the earlier report is there in full.
    std::vector<std::string> reports;
    for (std::string const& name : here.names())
      if (std::string const what = said(here.path / name); !what.empty()) reports.push_back(what);
    CHECK(std::find_if(reports.begin(), reports.end(), [&](std::string const& r) {
            return r == before || r == next;
          }) != reports.end());
    if (!killed) {
      CHECK(said(target) == next);
      break;
    }
    if (!fs::exists(target)) publish(target, "again ");
  }
  publish(target, "last ");
  CHECK(said(target) == "last ");
  CHECK(here.names() == std::vector<std::string>{"r"});
}

TEST_CASE("what was left behind, and what looks like it, is in nobody's way") {
  folder const here;
  fs::path const target = here.path / "r";
  std::string const pid = std::to_string(::getpid());
  // Of an earlier version, by process number; of others; one that is at work.
  for (std::string const& name :
       {"r.tmp-" + pid, "r.old-" + pid, std::string("r.tmp-mine"), std::string("r.tmp-abcdefgh"),
        std::string("r.tmp-01234567"), std::string("r.tmp-89abcdef")}) {
    fs::create_directory(here.path / name);
    std::ofstream(here.path / name / "report.html") << name;
  }
  std::ofstream(here.path / "r.tmp-89abcdef" / "thesis.tex") << "mine";
  common::lock const at_work(here.path / "r.tmp-01234567");
  REQUIRE(at_work.held());
  report::check_target(target, false, {});
  publish(target, "new ");
  CHECK(said(target) == "new ");
  std::vector<std::string> expected{
      "r", "r.old-" + pid, "r.tmp-01234567", "r.tmp-" + pid, "r.tmp-89abcdef", "r.tmp-mine"};
  std::sort(expected.begin(), expected.end());
  CHECK(here.names() == expected);
  CHECK(fs::exists(here.path / "r.tmp-01234567/report.html"));
  CHECK(read(here.path / "r.tmp-89abcdef/thesis.tex") == "mine");
}
