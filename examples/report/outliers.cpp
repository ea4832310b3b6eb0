// SPDX-License-Identifier: Apache-2.0
#include "outliers.hpp"

#include <algorithm>
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

/// Tokens of more than factor times the median; none if they are too many.
std::vector<outlier> beyond_median(std::vector<double> const& norms) {
  std::vector<outlier> out;
  bool const finite =
      std::all_of(norms.begin(), norms.end(), [](double x) { return std::isfinite(x); });
  double const median = finite ? median_of(norms) : 0;
  if (!(median > 0) || std::ssize(norms) < outlier_facts::least) return out;
  for (std::size_t i = 0; i < norms.size(); ++i)
    if (norms[i] > outlier_facts::factor * median)
      out.push_back({static_cast<std::ptrdiff_t>(i), norms[i] / median});
  double const share = static_cast<double>(out.size()) / static_cast<double>(norms.size());
  return share > outlier_facts::most ? std::vector<outlier>{} : out;
}

/// The tokens of both, each with the greater ratio.
std::vector<outlier> joined(std::vector<outlier> const& a, std::vector<outlier> const& b) {
  std::map<std::ptrdiff_t, double> ratios;
  for (auto const* const group : {&a, &b})
    for (outlier const& x : *group) ratios[x.token] = std::max(ratios[x.token], x.ratio);
  std::vector<outlier> out;
  for (auto const& [token, ratio] : ratios) out.push_back({token, ratio});
  return out;
}

measured share_of_squares(std::vector<double> const& norms, std::vector<outlier> const& group) {
  double largest = 0;
  for (double const x : norms) {
    if (!std::isfinite(x)) return rflow::status::non_finite;
    largest = std::max(largest, x);
  }
  if (!(largest > 0)) return rflow::status::zero_rows;
  auto const square = [&](double x) { return (x / largest) * (x / largest); };
  double all = 0, mine = 0;
  for (double const x : norms) all += square(x);
  for (outlier const& x : group) mine += square(norms[static_cast<std::size_t>(x.token)]);
  return mine / all;
}

bool differ(measured a, measured b, double by) {
  return a.ok() && b.ok() && std::abs(a.value - b.value) > by;
}

}  // namespace

outlier_facts find_outliers(std::vector<std::vector<double>> const& norms) {
  outlier_facts out;
  for (std::vector<double> const& site : norms) {
    out.groups.push_back(beyond_median(site));
    out.norm_share.push_back(share_of_squares(site, out.groups.back()));
  }
  out.kernel_share.assign(norms.size(), rflow::status::not_requested);
  return out;
}

void add_far_from_mean(outlier_facts& o, std::size_t l, std::vector<double> const& norms,
                       rflow::gram_moments const& m, std::ptrdiff_t site) {
  if (m.why[static_cast<std::size_t>(site)] != rflow::status::ok) return;
  // The diagonal of HKH holds squared distances from the mean.
  auto const n = static_cast<std::size_t>(m.tokens);
  double const* const diagonal = m.diagonal.data() + static_cast<std::size_t>(site) * n;
  double const* const rows = m.row_sums.data() + static_cast<std::size_t>(site) * n;
  double const count = static_cast<double>(n);
  double total = 0;
  for (std::size_t i = 0; i < n; ++i) total += rows[i] + diagonal[i];
  std::vector<double> distances;
  for (std::size_t i = 0; i < n; ++i) {
    double const square = diagonal[i] - 2 * (rows[i] + diagonal[i]) / count + total / count / count;
    distances.push_back(std::sqrt(std::max(square, 0.0)));
  }
  std::vector<outlier> const both = joined(o.groups[l], beyond_median(distances));
  if (static_cast<double>(both.size()) > outlier_facts::most * count) return;
  o.groups[l] = both;
  o.norm_share[l] = share_of_squares(norms, both);
}

void choose_outliers(outlier_facts& o) {
  for (std::size_t l = 0; l < o.groups.size(); ++l) {
    measured const kernel = o.kernel_share[l], norm = o.norm_share[l];
    auto const holds = [&](double share) {
      return (kernel.ok() && kernel.value > share) || (norm.ok() && norm.value > share);
    };
    if (o.groups[l].empty() || !holds(outlier_facts::looked_at)) continue;
    o.sites.push_back(l);
    o.tokens = joined(o.tokens, o.groups[l]);
    o.matter = o.matter || holds(outlier_facts::large);
  }
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
