// SPDX-License-Identifier: Apache-2.0
#include "outliers.hpp"

#include <algorithm>
#include <limits>
#include <map>

namespace report {
namespace {

using rflow::measured;

/// Of a copy; 0 if there are none.
double median_of(std::vector<double> x) {
  if (x.empty()) return 0;
  auto const middle = x.begin() + std::ssize(x) / 2;
  std::nth_element(x.begin(), middle, x.end());
  if (x.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(x.begin(), middle)) / 2;
}

bool differ(measured a, measured b, double by) {
  return a.ok() && b.ok() && std::abs(a.value - b.value) > by;
}

}  // namespace

outlier_facts find_outliers(std::vector<std::vector<double>> const& norms) {
  outlier_facts out;
  for (std::vector<double> const& site : norms) {
    auto& group = out.groups.emplace_back();
    double const median = median_of(site);
    bool const finite =
        std::all_of(site.begin(), site.end(), [](double x) { return std::isfinite(x); });
    if (!finite) {
      out.norm_share.push_back(rflow::status::non_finite);
      continue;
    }
    std::ptrdiff_t const n = std::ssize(site);
    if (median > 0 && n >= outlier_facts::least)
      for (std::ptrdiff_t i = 0; i < n; ++i)
        if (site[static_cast<std::size_t>(i)] > outlier_facts::factor * median) group.push_back(i);
    if (static_cast<double>(group.size()) > outlier_facts::most * static_cast<double>(n))
      group.clear();
    double const largest = site.empty() ? 0 : *std::max_element(site.begin(), site.end());
    double all = 0, mine = 0;
    for (double const x : site) all += (x / largest) * (x / largest);
    for (std::ptrdiff_t const i : group) {
      double const x = site[static_cast<std::size_t>(i)] / largest;
      mine += x * x;
    }
    out.norm_share.push_back(largest > 0 ? measured(mine / all)
                                         : measured(rflow::status::zero_rows));
  }
  out.kernel_share.assign(norms.size(), rflow::status::not_requested);
  return out;
}

void choose_outliers(outlier_facts& o, std::vector<std::vector<double>> const& norms) {
  std::map<std::ptrdiff_t, double> ratios;
  for (std::size_t l = 0; l < o.groups.size(); ++l) {
    measured const kernel = o.kernel_share[l], norm = o.norm_share[l];
    bool const holds_much = (kernel.ok() && kernel.value > outlier_facts::looked_at) ||
                            (norm.ok() && norm.value > outlier_facts::looked_at);
    if (o.groups[l].empty() || !holds_much) continue;
    o.sites.push_back(l);
    double const median = median_of(norms[l]);
    for (std::ptrdiff_t const i : o.groups[l]) {
      double& ratio = ratios[i];
      ratio = std::max(ratio, norms[l][static_cast<std::size_t>(i)] / median);
    }
    o.matter = o.matter || (kernel.ok() && kernel.value > outlier_facts::large) ||
               (norm.ok() && norm.value > outlier_facts::large);
  }
  for (auto const& [token, ratio] : ratios) o.tokens.push_back({token, ratio});
}

bool changes_much(outlier_facts const& o) {
  if (!o.with || !o.without) return false;
  headline const &a = *o.with, &b = *o.without;
  constexpr double cosine = 0.1, factor = 1.25;
  auto const scaled = [](measured x, measured y) {
    return x.ok() && y.ok() && (x.value > factor * y.value || y.value > factor * x.value);
  };
  bool out = scaled(a.st1, b.st1) || scaled(a.st2, b.st2);
  auto const compare = [&](std::vector<measured> const& x, std::vector<measured> const& y) {
    for (std::size_t l = 0; l < x.size() && l < y.size(); ++l)
      out = out || differ(x[l], y[l], cosine);
  };
  compare(a.inter_token, b.inter_token);
  for (auto const which : {&headline::debiased, &headline::biased}) {
    compare((a.*which).adjacent, (b.*which).adjacent);
    out = out || differ((a.*which).first_to_last, (b.*which).first_to_last, cosine);
  }
  return out;
}

}  // namespace report
