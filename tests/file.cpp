// SPDX-License-Identifier: Apache-2.0
// Mapped files and files that appear complete or not at all.
#include <rflow/file.hpp>

#include <sys/stat.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <rflow/npy.hpp>

#include "files.hpp"

using files::contains;
using files::error_of;
using bytes = std::string;

TEST_CASE("files that cannot be opened are named") {
  files::scratch const dir;
  auto const error = [&](std::filesystem::path const& path) {
    return error_of<std::system_error>([&] { rflow::mapped_file{path}; });
  };
  CHECK(contains(error(dir / "nowhere.npy"), "nowhere.npy: No such file"));
  CHECK(contains(error(dir.path()), "Is a directory"));
  REQUIRE(::mkfifo((dir / "pipe").c_str(), 0600) == 0);
  CHECK(contains(error(dir / "pipe"), "not a regular file"));  // and does not wait for a writer
  CHECK(contains(error("/dev/zero"), "not a regular file"));
  files::write(dir / "empty.npy", "");
  CHECK(contains(error_of<rflow::format_error>([&] { rflow::npy_file{dir / "empty.npy"}; }),
                 "empty.npy: byte 0: the file is empty"));
}

TEST_CASE("moved files stay mapped") {
  rflow::mapped_file a(files::fixture("f4.npy"));
  auto const* const data = a.bytes().data();
  rflow::mapped_file b = std::move(a);
  CHECK(b.bytes().data() == data);
  rflow::mapped_file c(files::fixture("f8.npy"));
  c = std::move(b);
  CHECK(c.bytes().data() == data);
  CHECK(c.bytes()[1] == std::byte{'N'});
}

TEST_CASE("aligned copies are made once, from any thread") {
  files::memory const memory(bytes(1000, 'x'));
  auto const file = memory.file();
  std::atomic<int> different{0};
  auto const* const first = file.aligned(1, 64, 8);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (std::size_t i = 1; i < 100; ++i) {
        auto const* const p = file.aligned(i, 64, 8);
        if (*p != std::byte{'x'} || (i == 1 && p != first)) ++different;
      }
    });
  for (auto& t : threads) t.join();
  CHECK(different == 0);
}

TEST_CASE("a file appears complete or not at all") {
  files::scratch const dir;
  auto const target = dir / "out.bin";
  SUBCASE("committed") {
    rflow::atomic_writer out(target);
    out.write("abc");
    CHECK_FALSE(std::filesystem::exists(target));
    out.commit();
    CHECK(files::read(target) == "abc");
    CHECK(contains(error_of<std::system_error>([&] { out.write("d"); }), "after commit"));
    CHECK(contains(error_of<std::system_error>([&] { out.commit(); }), "committed twice"));
    CHECK(dir.count() == 1);
  }
  SUBCASE("abandoned by an exception: the old file stays") {
    files::write(target, "old");
    try {
      rflow::atomic_writer out(target);
      out.write("half");
      CHECK(dir.count() == 2);
      throw 1;
    } catch (int) {
    }
    CHECK(files::read(target) == "old");
    CHECK(dir.count() == 1);
  }
  SUBCASE("two writers of one path do not meet") {
    rflow::atomic_writer a(target), b(target);
    a.write("a");
    b.write("b");
    a.commit();
    b.commit();
    CHECK(files::read(target) == "b");
    CHECK(dir.count() == 1);
  }
  SUBCASE("the rename fails") {
    rflow::atomic_writer out(target);
    out.write("abc");
    std::filesystem::create_directory(target);
    CHECK(contains(error_of<std::system_error>([&] { out.commit(); }), "out.bin"));
  }
  SUBCASE("no such directory") {
    CHECK(contains(error_of<std::system_error>([&] { rflow::atomic_writer{dir / "no/out.bin"}; }),
                   "no/out.bin: No such file"));
    CHECK(contains(error_of<std::system_error>(
                       [&] { rflow::write_npy(dir / "no/x.npy", std::vector<float>(1), {1}); }),
                   "no/x.npy"));
    CHECK(dir.count() == 0);
  }
  SUBCASE("a target that is no regular file stays") {
    CHECK(contains(error_of<std::system_error>([] { rflow::atomic_writer{"/dev/null"}; }),
                   "not a regular file"));
    CHECK(contains(error_of<std::system_error>([&] { rflow::atomic_writer{dir.path()}; }),
                   "not a regular file"));
  }
  SUBCASE("a mapping of the old file stays valid") {
    files::write(target, "old");
    rflow::mapped_file const old(target);
    rflow::atomic_writer out(target);
    out.commit();
    CHECK(old.bytes()[0] == std::byte{'o'});
    CHECK(files::read(target).empty());
  }
  if (std::filesystem::is_directory(target)) CHECK(dir.count() == 1);
}
