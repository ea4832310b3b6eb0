#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reference numbers for examples/data/smollm2-135m.safetensors, by definition and not by the library's formulas.

Every quantity is computed in float64 from the stored bf16 values, in the slowest form that follows its
definition: double loops over tokens, explicit n x n kernel matrices and H = I - 11'/n, an eigenvalue solver for
the path graph. Where the result rests on a formula that could itself be wrong, a second form is computed and the
two must agree, or the script stops. It needs numpy and nothing else.

    python3 tests/reference/smollm2_reference.py [capture.safetensors [output.json]]

Conventions of the output, all of it twice, for all tokens ("all_tokens") and without the first ("skip_first_1"):

  sites          embed, block.1 ... block.30, final_norm. The chain is all but final_norm: adjacent cosine, St1,
                 St2, path, steps, curvature and bounds leave final_norm out; the other tables include it.
  adjacent       mean and population standard deviation (divided by n) over tokens of cos(x_l, x_l+1);
                 "tokens" says which rows the per-token values belong to, counted in the stored file.
  variance       one entry per normalisation; the factor multiplies every squared quantity, its root the lengths:
                 none 1, per_token 1/N, per_element 1/(N d), relative 1/mean over the chain of ||X_l||^2.
  curvature      angle in radians between the whole matrices D_l-1 and D_l, D_l = X_l+1 - X_l; L - 1 values.
  cka            rows and columns in the order of "sites"; chance is the exact mean of the biased value over all
                 pairings of the tokens.
  rbf            sigma^2 = median of all n^2 squared distances, zero diagonal included, mean of the two central
                 values when their number is even.
"""

import json
import math
import os
import struct
import sys

import numpy as np


def read_safetensors(path):
    """Return (metadata, {name: float64 array})."""
    with open(path, "rb") as file:
        raw = file.read()
    (length,) = struct.unpack_from("<Q", raw, 0)
    header = json.loads(raw[8:8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            # A bf16 is the upper half of the float32 with the same value.
            values = (np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw[begin:end], {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry["dtype"]])
        tensors[name] = values.astype(np.float64).reshape(entry["shape"])
    return metadata, tensors


def agree(a, b, tolerance, what):
    scale = max(abs(a), abs(b), 1e-300)
    if not abs(a - b) <= tolerance * scale:
        raise SystemExit(f"two forms of {what} disagree: {a!r} and {b!r}")


def cosine(a, b):
    return math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))


def inter_token_cosine(x):
    n = len(x)
    return math.fsum(cosine(x[i], x[j]) for i in range(n) for j in range(i)) * 2 / (n * (n - 1))


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def squared_norm(x):
    return math.fsum((x * x).ravel())


def chain_numbers(chain):
    """Everything that only the residual chain has."""
    count, (n, d) = len(chain), chain[0].shape
    deltas = [chain[l + 1] - chain[l] for l in range(count - 1)]
    energies = [squared_norm(delta) for delta in deltas]
    energy = math.fsum(energies)
    middle = sum(chain) / count
    spread = math.fsum(squared_norm(x - middle) for x in chain)
    # The same by pairs, without the mean layer.
    pairs = math.fsum(squared_norm(chain[i] - chain[j]) for i in range(count) for j in range(i)) / count
    agree(spread, pairs, 1e-12, "the spread about the mean layer")

    laplacian = np.zeros((count, count))
    for l in range(count - 1):
        step = np.zeros(count)
        step[l], step[l + 1] = -1, 1
        laplacian += np.outer(step, step)
    eigenvalues = np.linalg.eigvalsh(laplacian)
    smallest, largest = float(eigenvalues[1]), float(eigenvalues[-1])

    curvature = []
    for before, after in zip(deltas, deltas[1:]):
        a, b = before / math.sqrt(squared_norm(before)), after / math.sqrt(squared_norm(after))
        curvature.append(math.acos(max(-1.0, min(1.0, math.fsum((a * b).ravel())))))
        # Half-angle form, accurate where acos is not.
        agree(curvature[-1], 2 * math.atan2(math.sqrt(squared_norm(a - b)), math.sqrt(squared_norm(a + b))),
              1e-9, "curvature")

    factors = {"none": 1.0, "per_token": 1 / n, "per_element": 1 / (n * d),
               "relative": 1 / mean(squared_norm(x) for x in chain)}
    variance = {}
    for name, factor in factors.items():
        root = math.sqrt(factor)
        st1_squared, st2_squared = factor * energy / (count - 1), factor * spread / count
        steps = [root * math.sqrt(e) for e in energies]
        variance[name] = {
            "factor": factor,
            "st1": math.sqrt(st1_squared), "st1_squared": st1_squared,
            "st2": math.sqrt(st2_squared), "st2_squared": st2_squared,
            "path_energy": factor * energy,
            "path_length": math.fsum(steps),
            "steps": steps,
            "spread": factor * spread,
            "spread_lower": factor * energy / largest,
            "spread_upper": factor * energy / smallest,
        }
        assert variance[name]["spread_lower"] <= variance[name]["spread"] <= variance[name]["spread_upper"]
    return {"variance": variance, "curvature": curvature,
            "lambda_smallest": smallest, "lambda_largest": largest}


def adjacent(chain, first):
    n = len(chain[0])
    shown = sorted({0, 1, n // 2, n - 1})
    table = {"tokens": [t + first for t in shown], "mean": [], "stddev": [], "per_token": []}
    for x, y in zip(chain, chain[1:]):
        values = [cosine(x[t], y[t]) for t in range(n)]
        centre = mean(values)
        table["mean"].append(centre)
        table["stddev"].append(math.sqrt(mean((v - centre) ** 2 for v in values)))
        table["per_token"].append([values[t] for t in shown])
    return table


def linear_gram(x):
    # Centring the features moves neither estimator (checked on one pair below) and spares the digits
    # that a large mean would take.
    x = x - x.mean(axis=0)
    return x @ x.T


def squared_distances(x):
    n = len(x)
    result = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            difference = x[i] - x[j]
            result[i, j] = difference @ difference
    return result


def rbf_gram(x):
    distances = squared_distances(x)
    ordered = sorted(distances.ravel().tolist())
    size = len(ordered)
    median = ordered[size // 2] if size % 2 else (ordered[size // 2 - 1] + ordered[size // 2]) / 2
    return np.exp(-distances / (2 * median)), math.sqrt(median)


def u_centred(k):
    n = len(k)
    off = k.copy()
    np.fill_diagonal(off, 0)
    rows = off.sum(axis=1) / (n - 2)
    total = off.sum() / ((n - 1) * (n - 2))
    u = off - rows[:, None] - rows[None, :] + total
    np.fill_diagonal(u, 0)
    return u


def hsic_song(k, l):
    """Song et al.'s estimator as printed, from kernels without their diagonals."""
    n = len(k)
    k, l = k.copy(), l.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    return (np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (k @ l).sum()) / (n * (n - 3))


def permutation_mean(k, l):
    """Mean over all pairings p of sum_ij k_ij l_p(i)p(j), by where (p(i), p(j)) can fall."""
    n = len(k)
    diagonal_k, diagonal_l = np.trace(k), np.trace(l)
    return (diagonal_k * diagonal_l / n
            + (k.sum() - diagonal_k) * (l.sum() - diagonal_l) / (n * (n - 1)))


def cka_tables(grams):
    n, count = len(grams[0]), len(grams)
    h = np.eye(n) - np.ones((n, n)) / n
    centred = [h @ k @ h for k in grams]
    u = [u_centred(k) for k in grams]
    biased, debiased, chance = (np.zeros((count, count)) for _ in range(3))
    for i in range(count):
        for j in range(count):
            norms = math.sqrt((centred[i] ** 2).sum() * (centred[j] ** 2).sum())
            biased[i, j] = np.trace(grams[i] @ h @ grams[j] @ h) / norms
            debiased[i, j] = (u[i] * u[j]).sum() / math.sqrt((u[i] ** 2).sum() * (u[j] ** 2).sum())
            chance[i, j] = permutation_mean(centred[i], centred[j]) / norms
            if j <= i:
                song = hsic_song(grams[i], grams[j]) / math.sqrt(
                    hsic_song(grams[i], grams[i]) * hsic_song(grams[j], grams[j]))
                if abs(song - debiased[i, j]) > 1e-9:
                    raise SystemExit(f"two forms of debiased CKA disagree at ({i}, {j})")
                closed = (np.trace(h @ grams[i]) * np.trace(h @ grams[j])) / ((n - 1) * norms)
                agree(closed, chance[i, j], 1e-9, f"chance at ({i}, {j})")
    return {"biased": biased.tolist(), "debiased": debiased.tolist(), "chance": chance.tolist()}


def measure(sites, first):
    """All numbers with the first `first` tokens left out."""
    names = list(sites)
    data = [sites[name][first:] for name in names]
    chain = [x for name, x in zip(names, data) if name != "final_norm"]

    linear = [linear_gram(x) for x in data]
    raw = [x @ x.T for x in data[:2]]
    agree(hsic_song(raw[0], raw[1]), hsic_song(linear[0], linear[1]), 1e-6, "HSIC with and without centring")
    rbf, sigmas = zip(*(rbf_gram(x) for x in data))

    norms = [[math.sqrt(squared_norm(row)) for row in x] for x in data]
    return {
        "skip_first": first,
        "tokens": len(data[0]),
        "mean_token_norm": [mean(row) for row in norms],
        "max_token_norm": [max(row) for row in norms],
        "max_token_norm_at": [first + row.index(max(row)) for row in norms],
        "frobenius_norm": [math.sqrt(squared_norm(x)) for x in data],
        "inter_token": [inter_token_cosine(x) for x in data],
        "adjacent": adjacent(chain, first),
        **chain_numbers(chain),
        "cka_linear": cka_tables(linear),
        "rbf_sigma": list(sigmas),
        "cka_rbf": cka_tables(rbf),
    }


def main(argv):
    here = os.path.dirname(os.path.abspath(__file__))
    source = argv[1] if len(argv) > 1 else os.path.join(here, "../../examples/data/smollm2-135m.safetensors")
    target = argv[2] if len(argv) > 2 else os.path.join(here, "smollm2_reference.json")
    metadata, tensors = read_safetensors(source)
    names = ["embed"] + [f"block.{i}" for i in range(1, int(metadata["layers"]) + 1)]
    names += ["final_norm"] if "final_norm" in tensors else []
    sites = {name: tensors[name] for name in names}
    result = {
        "source": os.path.basename(source),
        "token_hash": metadata["token_hash"],
        "stddev": "population",
        "sites": names,
        "hidden": sites["embed"].shape[1],
        "all_tokens": measure(sites, 0),
        "skip_first_1": measure(sites, 1),
    }
    # repr of a double, which json uses, gives back the same double.
    with open(target, "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(block(key, value, 1) for key, value in result.items()) + "\n}\n")


def block(key, value, depth):
    """One line per list of numbers and per matrix row: readable, and a diff shows which value moved."""
    pad = " " * depth
    if isinstance(value, dict):
        inner = ",\n".join(block(k, v, depth + 1) for k, v in value.items())
        return f"{pad}{json.dumps(key)}: {{\n{inner}\n{pad}}}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        rows = ",\n".join(pad + " " + json.dumps(row) for row in value)
        return f"{pad}{json.dumps(key)}: [\n{rows}\n{pad}]"
    return f"{pad}{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"


if __name__ == "__main__":
    main(sys.argv)
