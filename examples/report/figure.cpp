// SPDX-License-Identifier: Apache-2.0
// gnuplot reads its script from, and writes to, files without a name.

#include "figure.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>

#include "text.hpp"

extern char** environ;

namespace report {
namespace {

// ---- running gnuplot ----------------------------------------------------------------------------

struct close_file {
  void operator()(std::FILE* f) const { std::fclose(f); }
};
using scratch = std::unique_ptr<std::FILE, close_file>;

scratch make_scratch() {
  scratch file(std::tmpfile());
  if (!file) throw std::runtime_error(std::string("no temporary file: ") + std::strerror(errno));
  return file;
}

std::string contents(std::FILE* file) {
  std::string out;
  std::rewind(file);
  char block[1 << 16];
  while (std::size_t const n = std::fread(block, 1, sizeof block, file)) out.append(block, n);
  return out;
}

/// What gnuplot writes on its standard output, given a script.
std::string run_gnuplot(std::string const& script) {
  scratch const in = make_scratch(), out = make_scratch(), err = make_scratch();
  if (std::fwrite(script.data(), 1, script.size(), in.get()) != script.size() ||
      std::fflush(in.get()) != 0 || std::fseek(in.get(), 0, SEEK_SET) != 0)
    throw std::runtime_error(std::string("gnuplot's script: ") + std::strerror(errno));

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, ::fileno(in.get()), STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, ::fileno(out.get()), STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, ::fileno(err.get()), STDERR_FILENO);
  char program[] = "gnuplot", defaults[] = "-d", from_stdin[] = "-";
  char* const arguments[] = {program, defaults, from_stdin, nullptr};
  ::pid_t child = 0;
  int const error = ::posix_spawnp(&child, program, &actions, nullptr, arguments, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error == ENOENT)
    throw std::runtime_error(
        "gnuplot is not on the PATH: install it (Debian: gnuplot-nox), or use --no-plots");
  if (error != 0) throw std::runtime_error(std::string("gnuplot: ") + std::strerror(error));
  int state = 0;
  while (::waitpid(child, &state, 0) < 0)
    if (errno != EINTR) throw std::runtime_error(std::string("gnuplot: ") + std::strerror(errno));

  std::string svg = contents(out.get());
  if (!WIFEXITED(state) || WEXITSTATUS(state) != 0 || svg.find("</svg>") == std::string::npos) {
    std::string why = contents(err.get());
    if (auto const start = why.find_first_not_of(" \n"); start != std::string::npos)
      why.erase(0, start);
    std::string const how = WIFSIGNALED(state) ? "signal " + std::to_string(WTERMSIG(state))
                                               : "status " + std::to_string(WEXITSTATUS(state));
    throw std::runtime_error("gnuplot failed with " + how +
                             (why.empty() ? "" : ": " + one_line(why.substr(0, 300))));
  }
  return svg;
}

// ---- gnuplot's SVG as a part of a page ----------------------------------------------------------

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
}

std::string between(std::string const& text, std::string_view before, std::string_view after) {
  auto const begin = text.find(before);
  if (begin == std::string::npos) return "";
  auto const end = text.find(after, begin + before.size());
  return end == std::string::npos ? ""
                                  : text.substr(begin + before.size(), end - begin - before.size());
}

/// gnuplot's SVG with the page's colours and fonts, without ids, and with the texts of points: point k
/// carries the label "k", whose text is hover[k].
std::string inline_svg(std::string const& svg, std::string const& label,
                       std::vector<std::string> const& hover) {
  std::string out;
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < svg.size();) {
    std::size_t const end = std::min(svg.find('\n', at), svg.size());
    lines.push_back(svg.substr(at, end - at));
    at = end + 1;
  }
  bool inside = false, in_defs = false;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    std::string& line = lines[i];
    if (line.starts_with("<g id=\"gnuplot_canvas\"")) {
      inside = true;
      line = "<g>";
    }
    if (line.find("<defs>") != std::string::npos) in_defs = true;
    bool const skip = !inside || in_defs;
    if (line.find("</defs>") != std::string::npos) in_defs = false;
    if (skip || line.empty() || line.starts_with("<rect x=\"0\" y=\"0\"")) continue;
    if (line.starts_with("<g fill=") && i + 1 < lines.size() && lines[i + 1] == "</g>") {
      ++i;  // an empty group
      continue;
    }
    if (line.find("id=\"gnuplot_plot_") != std::string::npos) line = "<g>";
    if (line.find("showHypertext") != std::string::npos) {
      std::string const key = between(line, "evt,'", "')");
      line = "<g class=\"point\"><title>" + hover.at(std::stoul(key)) + "</title>";
    }
    out += line + "\n";
  }
  auto const paint = [&](role const& r) {
    int const level = static_cast<int>(std::strtol(r.script + 5, nullptr, 16));
    char spaced[40], tight[40];
    std::snprintf(spaced, sizeof spaced, "rgb(%3d, %3d, %3d)", level, level, level);
    std::snprintf(tight, sizeof tight, "rgb(%d,%d,%d)", level, level, level);
    replace_all(out, spaced, r.page);
    replace_all(out, tight, r.page);
  };
  for (role const& r : {ink, text_ink, grid_ink, hole_ink}) paint(r);
  for (role const& r : series_ink) paint(r);
  replace_all(out, " color='var(", " fill='var(");  // of points
  replace_all(out, " font-family=\"sans\"", "");
  replace_all(out, " stroke-linecap=\"butt\" stroke-linejoin=\"miter\"", "");
  replace_all(out, "color=\"black\" stroke=\"currentColor\"", "stroke=\"var(--ink)\"");
  replace_all(out, "color=\"gray\" stroke=\"currentColor\"", "stroke=\"var(--line)\"");
  return "<svg class=\"plot\" role=\"img\" aria-label=\"" + html(label) + "\" viewBox=\"" +
         between(svg, "viewBox=\"", "\"") + "\">\n" + out;  // the closing tag is gnuplot's
}

}  // namespace

std::string digits(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", x);
  return text;
}

std::string figure::render() const {
  std::string all = script_ + "plot ";
  for (std::size_t i = 0; i < plots_.size(); ++i) all += (i == 0 ? "" : ", \\\n  ") + plots_[i];
  return inline_svg(run_gnuplot(all + "\n"), label_, hover_);
}

}  // namespace report
