// SPDX-License-Identifier: Apache-2.0
// Small random cases with what definitions.cpp makes of them, a line of JSON each, numbers in
// hexadecimal: verify.py computes the same in fractions and with 90 decimal digits.
//
//     rflow_oracle_reference [cases] | python3 verify.py
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cases.hpp"

namespace {

void print(char const* name, std::vector<double> const& values) {
  std::printf(", \"%s\": [", name);
  for (std::size_t i = 0; i < values.size(); ++i)
    std::printf(std::isfinite(values[i]) ? "%s\"%a\"" : "%s\"nan\"", i > 0 ? ", " : "", values[i]);
  std::printf("]");
}
void print(char const* name, std::vector<oracle::number> const& values) {
  std::printf(", \"%s\": [", name);
  for (std::size_t i = 0; i < values.size(); ++i)
    std::printf("%s[\"%a\", %d]", i > 0 ? ", " : "", values[i].mantissa, values[i].exponent);
  std::printf("]");
}

/// CKA of both estimators with its own idea of whether there is a value.
void print(oracle::alignment const& a, char const* name) {
  std::vector<double> biased, debiased, chance;
  double const none = std::nan("");
  auto const has = [&](std::vector<oracle::twofold> const& m, std::size_t p) {
    return a.at(m, p, p).hi > a.debiased_noise[p];
  };
  for (std::size_t p = 0; p < a.sites; ++p)
    for (std::size_t q = 0; q < a.sites; ++q) {
      bool const one = a.n >= 2 && has(a.biased, p) && has(a.biased, q);
      bool const two = a.n >= 4 && has(a.debiased, p) && has(a.debiased, q);
      biased.push_back(one ? a.cka(a.biased, p, q) : none);
      chance.push_back(one ? a.chance(p, q) : none);
      debiased.push_back(two ? a.cka(a.debiased, p, q) : none);
    }
  std::printf(", \"%s\": {\"n\": %zu", name, a.n);
  print("biased", biased), print("debiased", debiased), print("chance", chance),
      print("share", a.share);
  std::printf("}");
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t const cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 300;
  for (std::uint64_t k = 0; k < cases; ++k) {
    oracle::chance_source r(77, k);
    std::size_t const n = r.from(1, 9), sites = r.from(1, 4),
                      width = r.happens(0.2) ? 1 : r.from(2, 6);
    auto const type = r.of({oracle::dtype::f32, oracle::dtype::f64, oracle::dtype::f64,
                            oracle::dtype::half, oracle::dtype::brain});
    oracle::recipe const by{type, n, std::vector<std::size_t>(sites, width), r.happens(0.5), true};
    oracle::model const m = oracle::draw_model(r, by, oracle::draw_cause(r, n));
    std::printf("{\"case\": %llu, \"text\": \"%s\", \"n\": %zu, \"d\": %zu, \"sites\": %zu",
                static_cast<unsigned long long>(k), m.text.c_str(), n, width, sites);
    std::vector<double> all;
    for (oracle::site const& s : m.sites) all.insert(all.end(), s.x.begin(), s.x.end());
    print("x", all);
    if (n >= 2) {
      print(oracle::linear_alignment(m.sites, oracle::form::gram), "gram");
      print(oracle::linear_alignment(m.sites, oracle::form::feature), "feature");
      print(oracle::linear_alignment(m.sites), "linear");
      bool const all_pairs = r.happens(0.5);
      double const fraction = r.decade(-1, 1.5);
      std::vector<oracle::number> medians, sigma2;
      for (oracle::site const& s : m.sites) {
        medians.push_back(oracle::median_distance(s, all_pairs));
        sigma2.push_back(
            medians.back().mantissa > 0
                ? oracle::number{medians.back().mantissa * fraction, medians.back().exponent}
                : oracle::number{1, 0});
      }
      std::printf(", \"all_pairs\": %s", all_pairs ? "true" : "false");
      print("medians", medians), print("sigma2", sigma2);
      print(oracle::rbf_alignment(m.sites, sigma2), "rbf");
    }
    double total = 0, factor = r.decade(-1, 1) * static_cast<double>(n);
    for (double const v : all) total += v * v;
    factor /= total;
    if (n >= 2 && total > 1e-290 && std::isfinite(total)) {
      print("by", std::vector<double>{factor});
      print(oracle::polynomial_alignment(m.sites, factor), "kernel");
    }
    std::size_t const cut = r.below(n + 1);
    oracle::flow_result const f = oracle::flow_by_definition(m.sites, {0, cut, n});
    std::printf(", \"cut\": %zu", cut);
    print("inter_token", f.inter_token), print("adjacent", f.adjacent);
    print("adjacent_stddev", f.adjacent_stddev), print("curvature", f.curvature);
    print("squares", f.squares), print("steps", f.steps);
    print("totals", std::vector<oracle::number>{f.energy, f.length, f.spread});
    std::printf("}\n");
  }
}
