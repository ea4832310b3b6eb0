// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a program says when an input is cut short while it reads it through a mapping. The system sends
// SIGBUS then, which without a handler ends the program in silence.

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace common {

namespace detail {

inline char const* cut_short_program = "";

/// One line on stderr, put together without memory of its own: a handler may call next to nothing.
class line_on_stderr {
 public:
  void add(char c) {
    if (size_ + 1 < sizeof text_) text_[size_++] = static_cast<unsigned char>(c) < ' ' ? '?' : c;
  }
  void add(char const* text) {
    while (*text != '\0') add(*text++);
  }
  void write() {
    text_[size_] = '\n';
    static_cast<void>(!::write(STDERR_FILENO, text_, size_ + 1));
  }

 private:
  char text_[4608];
  std::size_t size_ = 0;
};

/// Adds the name of the file that is mapped at an address, as /proc/self/maps has it: lines of
/// "from-to rights offset device inode  path".
inline bool add_file_at(std::uintptr_t address, line_on_stderr& line) {
  int const maps = ::open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (maps < 0) return false;
  std::uintptr_t bounds[2] = {0, 0};
  int bound = 0;  // which is being read; 2: both have been
  bool inside = false, named = false, done = false;
  char block[4096];
  for (::ssize_t n; !done && (n = ::read(maps, block, sizeof block)) > 0;)
    for (::ssize_t i = 0; !done && i < n; ++i) {
      char const c = block[i];
      if (c == '\n') {
        done = inside;
        bounds[0] = bounds[1] = 0;
        bound = 0;
      } else if (bound < 2) {
        int const digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit >= 0)
          bounds[bound] = bounds[bound] * 16 + static_cast<std::uintptr_t>(digit);
        else
          ++bound;
        if (bound == 2) inside = bounds[0] <= address && address < bounds[1];
      } else if (inside) {
        named = named || c == '/';
        if (named) line.add(c);
      }
    }
  ::close(maps);
  return named;
}

inline void on_cut_short(int, ::siginfo_t* about, void*) {
  if (about->si_code != BUS_ADRERR) {  // something else: as without a handler
    ::signal(SIGBUS, SIG_DFL);
    return;
  }
  line_on_stderr line;
  line.add(cut_short_program);
  line.add(": ");
  if (!add_file_at(reinterpret_cast<std::uintptr_t>(about->si_addr), line)) line.add("an input");
  line.add(": cut short while it was read");
  line.write();
  ::_exit(1);
}

}  // namespace detail

/// From now on a mapped file that is cut short ends the program with one line that names it, and status
/// 1. The program must have nothing half-written while it reads its inputs.
/// @param program  its name; kept, not copied
inline void tell_if_cut_short(char const* program) {
  detail::cut_short_program = program;
  struct ::sigaction action {};
  action.sa_sigaction = &detail::on_cut_short;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGBUS, &action, nullptr);
}

}  // namespace common
