// SPDX-License-Identifier: Apache-2.0
#pragma once

// Runs a program as its users do, in a folder of its own, and sees what it leaves behind.

#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace program {

namespace fs = std::filesystem;

inline std::string read(fs::path const& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE_MESSAGE(in.good(), path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

/// An empty folder, gone at the end.
struct folder {
  fs::path path;

  folder() {
    std::string name = (fs::temp_directory_path() / "rflow-program-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~folder() {
    std::error_code ignored;
    fs::permissions(path, fs::perms::owner_all, ignored);
    fs::remove_all(path, ignored);
  }
  folder(folder const&) = delete;
  folder& operator=(folder const&) = delete;

  std::string operator/(std::string const& name) const { return (path / name).string(); }
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (auto const& entry : fs::directory_iterator(path)) out.push_back(entry.path().filename());
    std::sort(out.begin(), out.end());
    return out;
  }
};

struct outcome {
  int status;
  std::string out, err;
};

/// Runs a program in a folder, without a shell.
/// @param path  PATH, if it is to differ
inline outcome run(char const* name, folder const& where, std::vector<std::string> arguments,
                   char const* path = nullptr) {
  folder const results;
  arguments.insert(arguments.begin(), name);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::string const out = results / "out", err = results / "err";
  ::pid_t const child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int const to_out = ::open(out.c_str(), O_WRONLY | O_CREAT, 0600);
    int const to_err = ::open(err.c_str(), O_WRONLY | O_CREAT, 0600);
    if (::dup2(to_out, 1) < 0 || ::dup2(to_err, 2) < 0 || ::chdir(where.path.c_str()) != 0 ||
        (path != nullptr && ::setenv("PATH", path, 1) != 0))
      ::_exit(126);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  int state = 0;
  REQUIRE(::waitpid(child, &state, 0) == child);
  REQUIRE(WIFEXITED(state));
  return {WEXITSTATUS(state), read(out), read(err)};
}

/// One line on stderr that begins with the program's name and holds each text; nothing left behind.
inline void check_refused(char const* name, folder const& where,
                          std::vector<std::string> const& arguments,
                          std::vector<std::string> const& texts, char const* path = nullptr) {
  std::vector<std::string> const before = where.names();
  outcome const o = run(name, where, arguments, path);
  CAPTURE(o.err);
  CHECK(o.status == 1);
  CHECK(o.out.empty());
  CHECK(o.err.starts_with(fs::path(name).filename().string() + ": "));
  CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
  CHECK(o.err.find("rflow::") == std::string::npos);
  for (std::string const& text : texts) {
    CAPTURE(text);
    CHECK(o.err.find(text) != std::string::npos);
  }
  CHECK(where.names() == before);
}

}  // namespace program
