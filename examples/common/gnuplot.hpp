// SPDX-License-Identifier: Apache-2.0
#pragma once

// gnuplot as a function from a script to what it draws. Script, drawing and complaints pass through
// files without a name, so nothing is left behind and no path enters a script.

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

extern char** environ;

namespace common {

/// What gnuplot writes on its standard output, given a script that sets an SVG terminal.
/// @throws std::runtime_error if gnuplot is missing or fails, with its first words
inline std::string gnuplot(std::string const& script) {
  struct closer {
    void operator()(std::FILE* f) const { std::fclose(f); }
  };
  using scratch = std::unique_ptr<std::FILE, closer>;
  auto const system_failure = [](int error) {
    throw std::system_error(error, std::generic_category(), "gnuplot");
  };
  std::array<scratch, 3> streams;  // of the child: in, out, err
  for (scratch& s : streams)
    if (s.reset(std::tmpfile()); !s) system_failure(errno);
  if (std::fputs(script.c_str(), streams[0].get()) < 0 || std::fflush(streams[0].get()) != 0)
    system_failure(errno);
  std::rewind(streams[0].get());

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  for (int fd = 0; fd < 3; ++fd)
    ::posix_spawn_file_actions_adddup2(&actions,
                                       ::fileno(streams[static_cast<std::size_t>(fd)].get()), fd);
  std::string words[] = {"gnuplot", "-d", "-"};
  char* const arguments[] = {words[0].data(), words[1].data(), words[2].data(), nullptr};
  ::pid_t child = 0;
  int const error = ::posix_spawnp(&child, arguments[0], &actions, nullptr, arguments, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error == ENOENT)
    throw std::runtime_error(
        "gnuplot is not on the PATH: install it (Debian: gnuplot-nox), or use --no-plots");
  if (error != 0) system_failure(error);
  int state = 0;
  while (::waitpid(child, &state, 0) < 0)
    if (errno != EINTR) system_failure(errno);

  auto const text_of = [](std::FILE* f) {
    std::string out;
    std::rewind(f);
    for (int c = std::fgetc(f); c != EOF; c = std::fgetc(f)) out += static_cast<char>(c);
    return out;
  };
  std::string const drawing = text_of(streams[1].get());
  if (!WIFEXITED(state) || WEXITSTATUS(state) != 0 || drawing.find("</svg>") == std::string::npos)
    throw std::runtime_error("gnuplot failed: " + text_of(streams[2].get()).substr(0, 300));
  return drawing;
}

}  // namespace common
