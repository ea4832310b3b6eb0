# SPDX-License-Identifier: Apache-2.0
"""The activations that everyone is given, and what they should make of them: in float64, by numpy."""

import json
import pathlib

import numpy as np

CASES = {
    "minilm": (7, 90, 384),  # the capture in examples/data
    "deep": (33, 2048, 2560),
    "long": (13, 4096, 768),
    "medium": (25, 512, 1024),
}
CLASSES = 10
EPOCHS = 150
SEEDS = 5
LEARNING_RATE = 1e-3
SHORT = 0.3  # seconds: shorter work is repeated until they are over, and the median counts
CAPTURE = pathlib.Path(__file__).parents[2] / "examples/data/all-minilm-l6-v2.safetensors"

NUMPY = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "I64": np.dtype("<i8")}


def load(path):
    """The tensors of a safetensors file, mapped; bf16 as its bits. Shared by all who map it."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            out[name] = np.memmap(
                path, NUMPY[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
            )
    return out


def save(path, tensors):
    """tensors: name -> (type, array), widest type first so that all data are aligned."""
    header, at = {}, 0
    for name, (kind, array) in tensors.items():
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).data)
    partial.rename(path)


def to_bf16(x):
    """To the nearest, ties to even; x is finite."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def widened(stack):
    """One site in float64."""
    return (from_bf16(stack) if stack.dtype == np.uint16 else stack).astype(np.float64)


def residual_stream(sites, tokens, width):
    """A chain like a model's: each site adds to the one before; the features have a 1/k spectrum, a
    common offset, and in three coordinates an offset of 30 deviations, as language models do."""
    draw = np.random.default_rng(1)
    scale = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    scale *= np.sqrt(width / np.sum(scale**2))
    offset = draw.standard_normal(width, np.float32)
    offset[draw.choice(width, 3, replace=False)] = 30
    x = draw.standard_normal((tokens, width), np.float32) * draw.permutation(scale) + offset
    out = np.empty((sites, tokens, width), np.float32)
    for site in range(sites):
        out[site] = x
        x = x + np.float32(0.3) * draw.standard_normal((tokens, width), np.float32) * draw.permutation(scale)
    return out


def make(case, kind, folder):
    """The file of a case: "activations" (sites x tokens x width) and "labels" (tokens)."""
    path = folder / f"{case}-{kind}.safetensors"
    if path.exists():
        return path
    sites, tokens, width = CASES[case]
    if case == "minilm":
        file = load(CAPTURE)
        bits = np.stack([file["embed"]] + [file[f"block.{i}"] for i in range(1, sites)])
        values = from_bf16(bits)
    else:
        values = residual_stream(sites, tokens, width)
    x = values[sites // 2] - values[sites // 2].mean(0)
    directions = np.random.default_rng(2).standard_normal((width, CLASSES), np.float32)
    labels = (x @ directions).argmax(1).astype(np.int64)
    stored = ("F32", values) if kind == "fp32" else ("BF16", to_bf16(values))
    save(path, {"labels": ("I64", labels), "activations": stored})
    return path


# ---- float64 ---------------------------------------------------------------------------------------


def cka(stack, debiased):
    sites, n, _ = stack.shape
    rows = np.empty((sites, n * n))
    for site in range(sites):
        x = widened(stack[site])
        x -= x.mean(0)
        k = x @ x.T
        if debiased:
            np.fill_diagonal(k, 0)
            mean = k.sum(0) / (n - 2)
            mean -= mean.sum() / (2 * (n - 1))
            k -= mean[:, None]
            k -= mean[None, :]
            np.fill_diagonal(k, 0)
        rows[site] = k.ravel() / np.linalg.norm(k)
    return rows @ rows.T


def unit_rows(x):
    x = widened(x)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inter_token(stack):
    n = stack.shape[1]
    return np.array([(np.sum(unit_rows(x).sum(0) ** 2) - n) / (n * (n - 1)) for x in stack])


def adjacent(stack):
    pairs = zip(stack[:-1], stack[1:])
    return np.array([np.sum(unit_rows(x) * unit_rows(y), axis=1).mean() for x, y in pairs])


def probe(x, labels):
    """The mean cross-entropy after the last epoch: full-batch Adam from zero weights, as PyTorch's."""
    x = widened(x)
    x = np.hstack([x, np.ones((len(x), 1))])
    truth = np.eye(CLASSES)[labels]
    w, m, v = (np.zeros((x.shape[1], CLASSES)) for _ in range(3))
    for epoch in range(1, EPOCHS + 2):
        z = x @ w
        z -= z.max(1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        loss = -np.sum(log_p * truth) / len(x)
        if epoch > EPOCHS:
            return np.array([loss])
        g = x.T @ (np.exp(log_p) - truth) / len(x)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        w -= LEARNING_RATE * (m / (1 - 0.9**epoch)) / (np.sqrt(v / (1 - 0.999**epoch)) + 1e-8)


def references(path, tasks):
    """task -> float64 values, kept beside the file."""
    kept = path.with_suffix(".npz")
    out = dict(np.load(kept)) if kept.exists() else {}
    tensors = load(path)
    stack, labels = tensors["activations"], tensors["labels"]
    work = {
        "cka debiased": lambda: cka(stack, True),
        "cka biased": lambda: cka(stack, False),
        "inter-token": lambda: inter_token(stack),
        "adjacent": lambda: adjacent(stack),
        "probe": lambda: probe(stack[len(stack) // 2], labels),
    }
    missing = [task for task in tasks if task not in out]
    for task in missing:
        out[task] = work[task]()
    if missing:
        np.savez(kept, **out)
    return out
