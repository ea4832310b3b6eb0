// SPDX-License-Identifier: Apache-2.0
#include <rflow/mpi.hpp>

#include <rflow/cka.hpp>
#include <rflow/monitor.hpp>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <random>

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "../reference.hpp"

using doctest::Approx;

namespace {

rflow::mpi_team* team = nullptr;

/// Whether all ranks hold the same bits.
bool same_everywhere(std::vector<double> const& mine) {
  std::vector<double> first = mine;
  MPI_Bcast(first.data(), static_cast<int>(first.size()), MPI_DOUBLE, 0, MPI_COMM_WORLD);
  return std::memcmp(first.data(), mine.data(), mine.size() * sizeof(double)) == 0;
}

}  // namespace

TEST_CASE("all ranks end with the moments of all sequences") {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);  // the same data on every rank, of which each takes a part
    std::size_t const sites = 1 + bits() % 6, width = 1 + bits() % 40;
    std::ptrdiff_t const sequences = 1 + static_cast<std::ptrdiff_t>(bits() % 9);
    rflow::monitor_options const options{.skip_first = 1, .cka = true, .cka_batch = 8};
    auto const s = static_cast<std::ptrdiff_t>(sites), d = static_cast<std::ptrdiff_t>(width);
    rflow::flow_monitor<float> whole(s, d, options), part(s, d, options);
    for (std::ptrdiff_t q = 0; q < sequences; ++q) {
      reference::stack x = reference::random_stack(bits, sites, 5 + bits() % 30, width);
      std::vector<float> const values = reference::pack<float>(x);
      rflow::layer_stack<float> const stack = reference::stack_of(values, x);
      for (auto* const m : {&whole, &part}) {
        if (m == &part && q * team->size() / sequences != team->rank()) continue;
        for (std::ptrdiff_t l = 0; l < s; ++l) REQUIRE(m->push(l, 0, stack[l]));
        REQUIRE(m->end_sequence());
      }
    }
    rflow::monitor_moments merged = part.moments();
    team->allreduce(merged);
    std::vector<double> const a = rflow::to_numbers(merged), b = rflow::to_numbers(whole.moments());
    CHECK(same_everywhere(a));
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i)
      CHECK(std::abs(a[i] - b[i]) <= 1e-12 * std::max(1.0, std::abs(b[i])));
    rflow::monitor_report const x = rflow::report_of(merged), y = whole.report();
    CHECK(x.sequences == sequences);
    CHECK(x.pooled.inter_token[0].value == Approx(y.pooled.inter_token[0].value).epsilon(1e-12));
    if (sites > 1)
      CHECK(x.pooled.variance.st1.value == Approx(y.pooled.variance.st1.value).epsilon(1e-12));
    CHECK(x.cka.batches() == y.cka.batches());

    rflow::flow_moments flow = part.moments().flow;
    team->allreduce(flow);
    CHECK(flow.spread == merged.flow.spread);
    rflow::minibatch_moments cka = part.moments().cka;
    team->allreduce(cka);
    CHECK(cka.sums == merged.cka.sums);
  }
}

TEST_CASE("full CKA: each rank forms its share of the products") {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    CAPTURE(seed);
    std::mt19937 bits(seed);
    reference::stack x =
        reference::random_stack(bits, 1 + bits() % 4, 5 + bits() % 500, 1 + bits() % 30);
    std::vector<double> const values = reference::pack<double>(x);
    rflow::layer_stack<double> const stack = reference::stack_of(values, x);
    rflow::on_cpu const mine{
        .threads = 1, .significance = seed < 3, .share = {team->rank(), team->size()}};
    auto const check = [&](auto const& kernel) {
      rflow::gram_moments m = mine.gram(kernel, stack);
      team->allreduce(m);
      CHECK(same_everywhere(rflow::to_numbers(m)));
      rflow::cka_table const a = rflow::cka_matrix(m), b = rflow::cka_matrix(stack, kernel);
      for (std::ptrdiff_t p = 0; p < a.rows(); ++p)
        for (std::ptrdiff_t q = 0; q < a.cols(); ++q)
          CHECK(std::abs(a(p, q).value - b(p, q).value) < 1e-12);
      if (!mine.significance) return;
      rflow::on_cpu const alone{.threads = 1, .significance = true};
      rflow::measured const p = a.p_value(0, 0);
      rflow::measured const right = rflow::cka_matrix(alone.gram(kernel, stack)).p_value(0, 0);
      CHECK(p.why == right.why);
      if (right.ok()) CHECK(p.value == Approx(right.value));
    };
    check(rflow::linear{});
    check(rflow::rbf{});
  }
}

TEST_CASE("an open sequence of several ranks is one sequence") {
  rflow::flow_moments m(2, 3);
  m.units = {1, 1};
  m.unit_sum = {1, 0, 0, 1, 0, 0};  // the same direction on every rank
  m.tokens = 1;
  team->allreduce(m);
  m.end_sequence();
  double const n = team->size();
  CHECK(m.tokens == n);
  CHECK(m.pair_cosines[0] == Approx(n * (n - 1)));
}

TEST_CASE("what one rank throws, every rank throws") {
  if (team->size() == 1) {
    CHECK_THROWS_AS(team->together([] { throw std::domain_error("plain"); }), std::domain_error);
    return;
  }
  int const failing = team->size() - 1;
  CHECK_THROWS_WITH_AS(
      team->together([&] {
        if (team->rank() == failing) throw std::domain_error("no such shard: b.safetensors");
      }),
      ("rank " + std::to_string(failing) + ": no such shard: b.safetensors").c_str(),
      std::runtime_error);
  CHECK_THROWS_WITH_AS(team->together([] { throw 3; }), "rank 0: unknown error",
                       std::runtime_error);
  std::string const endless(5000, 'x');
  CHECK_THROWS_AS(team->together([&] { throw std::domain_error(endless); }), std::runtime_error);
  int ran = 0;
  team->together([&] { ++ran; });  // and it works afterwards
  CHECK(ran == 1);
}

TEST_CASE("shapes that differ between ranks") {
  if (team->size() == 1) return;
  rflow::flow_moments m(team->rank() == 1 ? 3 : 2, 5);
  auto const numbers = [](std::ptrdiff_t sites) {
    return std::to_string(rflow::to_numbers(rflow::flow_moments(sites, 5)).size());
  };
  std::string const expected = "rflow::mpi_team::allreduce: rank 0 has 2 sites x 5 (" + numbers(2) +
                               " numbers), rank 1 has 3 sites x 5 (" + numbers(3) + " numbers)";
  CHECK_THROWS_WITH_AS(team->allreduce(m), expected.c_str(), std::runtime_error);
  rflow::minibatch_moments none(team->rank() == 0 ? 0 : 4);
  CHECK_THROWS_AS(team->allreduce(none), std::runtime_error);
}

TEST_CASE("MPI's own errors have its code and text") {
  CHECK_THROWS_AS(throw rflow::mpi_error("MPI_Allgather", MPI_ERR_COMM), rflow::mpi_error);
  rflow::mpi_error const error("MPI_Allgather", MPI_ERR_COMM);
  CHECK(error.code() == MPI_ERR_COMM);
  CHECK(std::string(error.what()).starts_with("MPI_Allgather: "));
  CHECK(std::string(error.what()).size() > 20);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int failed = 0;
  {
    rflow::mpi_team ranks;
    team = &ranks;
    std::string const end = argc > 1 ? argv[1] : "";
    if (ranks.rank() == 1 && end == "killed") std::raise(SIGKILL);
    if (ranks.rank() == 1 && end == "leaves") std::_Exit(3);
    failed = doctest::Context(argc, argv).run();
    team = nullptr;
  }
  MPI_Finalize();
  return failed;
}
