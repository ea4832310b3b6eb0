# SPDX-License-Identifier: Apache-2.0
"""Holds the oracle's reference (definitions.cpp) against 120 decimal digits.

    rflow_oracle_reference [cases] | python3 verify.py

Standard library only. Every result of the reference has to be within 1e-14 of its scale, and there has to
be one exactly where the self term is not 0.
"""
import json
import sys
from decimal import Decimal, getcontext

getcontext().prec = 120
getcontext().Emax, getcontext().Emin = 10**6, -(10**6)
LIMIT = 1e-14
worst, failed, compared = {}, 0, 0


def exact(text):
    return +Decimal(float.fromhex(text))  # rounded to the context's digits


def number(pair):
    return exact(pair[0]) * Decimal(2) ** pair[1]


def dot(a, b):
    return sum((x * y for x, y in zip(a, b)), Decimal(0))


def held(case, what, got, want, scale=Decimal(1)):
    """got against want, either of them None where there is no value."""
    global failed, compared
    compared += 1
    if (got is None) != (want is None):
        failed += 1
        print(f"case {case['case']} ({case['text']}): {what}: {got and float(got)} for {want and float(want)}")
        return
    if want is None:
        return
    error = abs(got - want)
    error = float(error / scale) if scale else (0.0 if error == 0 else float("inf"))
    worst[what] = max(worst.get(what, 0.0), error)
    if error > LIMIT:
        failed += 1
        print(f"case {case['case']} ({case['text']}): {what}: {float(got)} for {float(want)}: off by {error:.1e}")


def value(text):
    return None if text == "nan" else exact(text)


def u_centred(k):
    n = len(k)
    rows = [sum(k[i][j] for j in range(n) if j != i) for i in range(n)]
    total = sum(rows)
    return [
        [
            k[i][j] - rows[i] / (n - 2) - rows[j] / (n - 2) + total / ((n - 1) * (n - 2)) if i != j else k[i][j] * 0
            for j in range(n)
        ]
        for i in range(n)
    ]


def h_centred(k):
    n = len(k)
    rows = [sum(row) / n for row in k]
    total = sum(rows) / n
    return [[k[i][j] - rows[i] - rows[j] + total for j in range(n)] for i in range(n)]


def inner(a, b):
    return sum(x * y for r, s in zip(a, b) for x, y in zip(r, s))


def trace_of(k):
    n = len(k)
    return sum(k[i][i] for i in range(n)) - sum(v for row in k for v in row) / n


def alignment(case, name, kernels, zero):
    """Both estimators of kernel matrices; `zero` tells a self term that is 0."""
    got, n, s = case[name], case["n"], len(kernels)
    h = [h_centred(k) for k in kernels]
    u = [u_centred(k) for k in kernels] if n >= 4 else None
    for which, of in (("biased", h), ("debiased", u)):
        if of is None:
            continue
        self_terms = [inner(a, a) for a in of]
        for p in range(s):
            for q in range(s):
                want = None
                if not zero(self_terms[p], kernels[p]) and not zero(self_terms[q], kernels[q]):
                    norms = self_terms[p].sqrt() * self_terms[q].sqrt()
                    want = inner(of[p], of[q]) / norms
                    if which == "biased":
                        traces = [sum(of[x][i][i] for i in range(n)) for x in (p, q)]
                        chance = traces[0] * traces[1] / (n - 1) / norms
                        held(case, name + " chance", value(got["chance"][p * s + q]), chance)
                if name == "feature" and want is not None:
                    # It subtracts what is not far from (tr K)²: linear_alignment() does not take it there.
                    traces = [sum(h[x][i][i] for i in range(n)) for x in (p, q)]
                    if any(self_terms[x] < traces[y] ** 2 * Decimal("1e-16") for y, x in enumerate((p, q))):
                        continue
                elif name == "feature":
                    continue
                held(case, name + " " + which, value(got[which][p * s + q]), want)


def shares(case, name, kernels):
    n = case["n"]
    for p, k in enumerate(kernels):
        squares = [sum(k[i][j] ** 2 for j in range(n) if j != i) for i in range(n)]
        total = sum(squares)
        if total == 0:
            continue
        for i in range(n):
            held(case, name + " share", value(case[name]["share"][p * n + i]), 2 * squares[i] / total)


def acos(c, sine):
    """atan2(sine, c) of a unit pair, by the series of the arc tangent after halving the angle."""
    if c < 0:
        return 2 * acos(Decimal(0), Decimal(1)) - acos(-c, sine)
    x, y, halvings = c, sine, 0
    while y > x / 64:
        norm = (x * x + y * y).sqrt()
        x, halvings = x + norm, halvings + 1
    t, term, total, k = y / x, y / x, y / x, 1
    while term and abs(term) > Decimal(10) ** -60:
        term *= -t * t
        k += 2
        total += term / k
    return total * 2**halvings


def check(case):
    n, d, s = case["n"], case["d"], case["sites"]
    flat = [exact(t) for t in case["x"]]
    sites = [[flat[(l * n + i) * d : (l * n + i + 1) * d] for i in range(n)] for l in range(s)]
    if n >= 2:
        linear, plain = [], []
        for x in sites:
            means = [sum(row[j] for row in x) / n for j in range(d)]
            centred = [[v - m for v, m in zip(row, means)] for row in x]
            linear.append([[dot(a, b) for b in centred] for a in centred])
        for name in ("gram", "feature", "linear"):
            alignment(case, name, linear, lambda self_term, k: self_term <= Decimal("1e-58") * trace_of(k) ** 2)
            shares(case, name, linear)
        rbf = []
        for l, x in enumerate(sites):
            distances = [[dot(z, z) for z in ([u - v for u, v in zip(a, b)] for b in x)] for a in x]
            some = sorted(distances[i][j] for i in range(n) for j in range(n) if case["all_pairs"] or i < j)
            m = len(some)
            median = some[m // 2] if m % 2 else (some[m // 2 - 1] + some[m // 2]) / 2
            held(case, "median", number(case["medians"][l]), median, median)
            sigma2 = number(case["sigma2"][l])
            rbf.append([[(max(Decimal(-3000), -v / (2 * sigma2))).exp() for v in row] for row in distances])
        alignment(case, "rbf", rbf, lambda self_term, k: self_term < Decimal("1e-52") * n * n)
        shares(case, "rbf", rbf)

    if "kernel" in case:
        by, noise, own = exact(case["by"][0]), {}, []
        for k in linear:
            t = [[by * v for v in row] for row in k]
            own.append([[(1 + v) ** 2 for v in row] for row in t])
            noise[id(own[-1])] = sum(own[-1][i][i] for i in range(n)) ** 2
        alignment(case, "kernel", own, lambda self_term, k: self_term < Decimal("1e-58") * noise[id(k)])
        shares(case, "kernel", own)

    norms = [[dot(row, row).sqrt() for row in x] for x in sites]
    parts = [range(0, case["cut"]), range(case["cut"], n)]
    for l, x in enumerate(sites):
        total = sum(dot(row, row) for row in x)
        held(case, "squares", number(case["squares"][l]), total, total)
        unit = [[v / r for v in row] if r else None for row, r in zip(x, norms[l])]
        cosines = [
            sum(a * b for a, b in zip(unit[i], unit[j]))
            for part in parts for i in part for j in part if i != j and unit[i] and unit[j]
        ]
        want = sum(cosines) / len(cosines) if cosines else None
        held(case, "inter-token", value(case["inter_token"][l]), want)
        if l + 1 == s:
            continue
        pair = [
            dot(a, b) / r / q for a, b, r, q in zip(x, sites[l + 1], norms[l], norms[l + 1]) if r and q
        ]
        if pair:
            mean = sum(pair) / len(pair)
            held(case, "adjacent", value(case["adjacent"][l]), mean)
            deviation = (sum((c - mean) ** 2 for c in pair) / len(pair)).sqrt()
            held(case, "adjacent stddev", value(case["adjacent_stddev"][l]), deviation)
    steps = [[b - a for r, t in zip(sites[l], sites[l + 1]) for a, b in zip(r, t)] for l in range(s - 1)]
    squares = [dot(z, z) for z in steps]
    for l in range(s - 1):
        held(case, "step", number(case["steps"][l]), squares[l], squares[l])
    for l in range(s - 2):
        got = value(case["curvature"][l])
        if not squares[l] or not squares[l + 1]:
            held(case, "curvature", got, None)
            continue
        c = dot(steps[l], steps[l + 1])
        both = squares[l] * squares[l + 1]
        held(case, "curvature", got, acos(c, max(Decimal(0), both - c * c).sqrt()))
    if s > 1:
        means = [[sum(x[i][j] for x in sites) / s for j in range(d)] for i in range(n)]
        spread = sum((v - m) ** 2 for x in sites for row, mean in zip(x, means) for v, m in zip(row, mean))
        energy, length = sum(squares), sum(q.sqrt() for q in squares)
        for name, got, want in zip(("energy", "length", "spread"), case["totals"], (energy, length, spread)):
            held(case, name, number(got), want, want)


count = 0
for line in sys.stdin:
    check(json.loads(line))
    count += 1
for what in sorted(worst):
    print(f"{what:20} largest error {worst[what]:.1e}")
print(f"{count} cases, {compared} results, {failed} failures")
sys.exit(1 if failed or count == 0 else 0)
