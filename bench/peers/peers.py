# SPDX-License-Identifier: Apache-2.0
"""One peer, in a process of its own: peers.py PEER FILE THREADS.

Reads requests, one a line of JSON ({"task": ..., "sites": [...]}), and answers each with a line: seconds,
the values, and the peak of memory beyond what was there before (the input, the imports)."""

import json
import os
import statistics
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import cases

warnings.filterwarnings("ignore")


class NotOffered(Exception):
    """The peer has no such thing; the text says what is missing."""


class Input:
    """The activations as this peer takes them. Nothing is copied."""

    def __init__(self, stack, labels, threads, seeds=cases.SEEDS, epochs=cases.EPOCHS):
        self.stack, self.labels, self.threads = stack, labels, threads
        self.seeds, self.epochs = seeds, epochs
        self.half = stack.dtype == np.uint16

    def small(self):
        """Enough to bring a package's code into memory."""
        stack = np.ascontiguousarray(self.stack[:3, :64, :64])
        return Input(stack, np.arange(64) % cases.CLASSES, self.threads, 1, 2)

    def as_numpy(self):
        if self.half:
            raise NotOffered("no bf16")
        return self.stack

    def as_torch(self):
        import torch

        torch.set_num_threads(self.threads)
        t = torch.from_numpy(self.stack)
        return t.view(torch.bfloat16) if self.half else t


# ---- modules for packages that want to hook some ---------------------------------------------------


def emitting_model(layers):
    """A model whose modules "0", "1", … put out the saved activations, whatever comes in."""
    import torch

    class Emit(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, x):
            return self.values

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sites = torch.nn.ModuleList(Emit(x) for x in layers)

        def forward(self, x):
            for site in self.sites:
                site(x)

    return Model(), [f"sites.{i}" for i in range(len(layers))]


def one_batch(tokens):
    import torch

    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(tokens)), batch_size=tokens)


# ---- CKA -------------------------------------------------------------------------------------------


def torch_cka(given, task, sites):
    if task != "cka debiased":
        raise NotOffered("debiased only")
    import torch_cka as package

    x = given.as_torch()
    batch = one_batch(x.shape[1])

    def work():  # a new model each time, for the package leaves its hooks behind
        model, names = emitting_model([x[i] for i in sites])
        cka = package.CKA(model, model, "a", "b", names, names, device="cpu")
        cka.compare(batch)
        return cka.export()["CKA"]

    return work


def pytorch_cka(given, task, sites):
    if task != "cka debiased":
        raise NotOffered("debiased only")
    from cka import compute_cka

    x = given.as_torch()
    model, names = emitting_model([x[i] for i in sites])
    batch = one_batch(x.shape[1])
    return lambda: compute_cka(model, model, batch, layers=names, device="cpu", progress=False)[0]


def ckatorch(given, task, sites):
    x = given.as_torch()
    if task == "cka debiased":
        import ckatorch as package

        batch = one_batch(x.shape[1])

        def work():  # it takes batches of sets of tokens: this is one set; and it leaves its hooks behind
            model, names = emitting_model([x[i][None] for i in sites])
            return package.CKA(model, model, names)(batch, epochs=1)

        return work
    from ckatorch.core import cka_base

    return lambda: [[cka_base(x[i], x[j], "linear", False) for j in sites] for i in sites]


def repsim(given, task, sites):
    import repsim as package

    layers = [given.as_numpy()[i] for i in sites]
    return lambda: package.cka(layers, "linear", "song" if task == "cka debiased" else "gretton")


def centred(k, debiased):
    """Kornblith's centring of a Gram matrix, from the formulas."""
    n = len(k)
    if debiased:
        np.fill_diagonal(k, 0)
        mean = k.sum(0, dtype=np.float64) / (n - 2)
        mean -= mean.sum() / (2 * (n - 1))
    else:
        mean = k.mean(0, dtype=np.float64)
        mean -= mean.mean() / 2
    k -= mean[:, None]
    k -= mean[None, :]
    if debiased:
        np.fill_diagonal(k, 0)
    return k


def numpy_each_pair(given, task, sites):
    x, debiased = given.as_numpy(), task == "cka debiased"

    def pair(a, b):
        k, l = centred(a @ a.T, debiased), centred(b @ b.T, debiased)
        return k.ravel() @ l.ravel() / (np.linalg.norm(k) * np.linalg.norm(l))

    return lambda: [[pair(x[i], x[j]) for j in sites] for i in sites]


def numpy_each_once(given, task, sites):
    x, debiased = [given.as_numpy()[i] for i in sites], task == "cka debiased"

    def work():
        rows = np.stack([centred(a @ a.T, debiased).ravel() for a in x])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows @ rows.T

    return work


# ---- cosines ---------------------------------------------------------------------------------------


def without_diagonal(similarity):
    n = len(similarity)
    return (similarity.sum() - similarity.trace()) / (n * (n - 1))


def torch_cosines(given, task, sites):
    import torch

    x = given.as_torch()
    if task == "adjacent":
        cosine = torch.nn.functional.cosine_similarity
        return lambda: [cosine(a, b, dim=1).mean() for a, b in zip(x[:-1], x[1:])]

    def one(a):
        unit = torch.nn.functional.normalize(a, dim=1)
        return without_diagonal((unit @ unit.T).float())

    return lambda: [one(a) for a in x]


def torch_unit_sum(given, task, sites):
    """For those who know that the sum over pairs is the square of a sum."""
    import torch

    x, n = given.as_torch(), given.stack.shape[1]
    if task == "adjacent":
        raise NotOffered("the same")

    def one(a):
        unit = torch.nn.functional.normalize(a.float(), dim=1)
        return (unit.sum(0).square().sum() - n) / (n * (n - 1))

    return lambda: [one(a) for a in x]


def simsimd(given, task, sites):
    import simsimd as package

    x, kind = given.stack, "bfloat16" if given.half else "float32"
    if task == "adjacent":
        return lambda: [1 - np.asarray(package.cosine(a, b, kind)).mean() for a, b in zip(x[:-1], x[1:])]

    def one(a):
        return without_diagonal(1 - np.asarray(package.cdist(a, a, "cosine", threads=given.threads, dtype=kind)))

    return lambda: [one(a) for a in x]


def numkong(given, task, sites):
    import numkong as package

    x, kind = given.stack, "bfloat16" if given.half else "float32"
    layers = [package.from_pointer(a.ctypes.data, a.shape, kind, owner=a) for a in x]
    if task == "adjacent":
        return lambda: [1 - np.asarray(package.angular(a, b)).mean() for a, b in zip(layers[:-1], layers[1:])]
    n, pool = x.shape[1], ThreadPoolExecutor(given.threads)
    # The upper triangle is made row by row, so equal areas of it are given to the threads.
    cuts = [round(n * (1 - (1 - i / 16) ** 0.5)) for i in range(17)]

    def one(a):
        out = package.zeros((n, n), dtype="float32" if given.half else "float64")
        rows = zip(cuts[:-1], cuts[1:])
        list(pool.map(lambda r: package.angulars_symmetric(a, out=out, start_row=r[0], end_row=r[1]), rows))
        return 1 - 2 * np.triu(np.asarray(out), 1).sum() / (n * (n - 1))

    return lambda: [one(a) for a in layers]


# ---- probes: of the middle site, five of them ------------------------------------------------------


def torch_probe(given, task, sites):
    import torch

    stack = given.as_torch()
    x, y = stack[len(stack) // 2], torch.from_numpy(given.labels)

    def one():
        linear = torch.nn.Linear(x.shape[1], cases.CLASSES, dtype=x.dtype)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        adam = torch.optim.Adam(linear.parameters(), lr=cases.LEARNING_RATE)
        curve = []
        for epoch in range(given.epochs + 1):
            logits = linear(x)
            loss = torch.nn.functional.cross_entropy(logits, y)
            curve.append((loss.item(), (logits.argmax(1) == y).float().mean().item()))
            if epoch < given.epochs:
                adam.zero_grad()
                loss.backward()
                adam.step()
        return curve[-1][0]

    return lambda: [np.mean([one() for _ in range(given.seeds)])]


def scikit_learn(given, task, sites):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    stack = given.as_numpy()
    x, y = stack[len(stack) // 2], given.labels

    def work():
        for _ in range(given.seeds):
            model = LogisticRegression(C=np.inf, max_iter=given.epochs).fit(x, y)
        return [log_loss(y, model.predict_proba(x))]

    return work


# ---- the process -----------------------------------------------------------------------------------

PEERS = {
    "torch_cka": torch_cka,
    "pytorch-cka": pytorch_cka,
    "ckatorch": ckatorch,
    "repsim": repsim,
    "numpy, each pair": numpy_each_pair,
    "numpy, each Gram once": numpy_each_once,
    "PyTorch": torch_cosines,
    "PyTorch, sum of unit rows": torch_unit_sum,
    "SimSIMD": simsimd,
    "NumKong": numkong,
    "PyTorch, Linear and Adam": torch_probe,
    "scikit-learn, L-BFGS": scikit_learn,
}


def status(field):
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024


def numbers(values):
    """Of whatever type, nested or not, as JSON has them."""
    if isinstance(values, list):
        return [numbers(v) for v in values]
    return values.double().tolist() if hasattr(values, "double") else np.float64(values).tolist()


def answer(given, peer, request):
    try:
        work = PEERS[peer](given, request["task"], request["sites"])
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts from here
        before = status("VmRSS")
        seconds = []
        while not seconds or sum(seconds) < cases.SHORT:
            start = time.perf_counter()
            values = work()
            seconds.append(time.perf_counter() - start)
        peak = status("VmHWM") - before
        return {"seconds": statistics.median(seconds), "bytes": peak, "values": numbers(values)}
    except NotOffered as what:
        return {"failed": str(what)}
    except MemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # whatever a package throws is what the table says
        return {"failed": textwrap.shorten(f"{type(error).__name__}: {error}", 60, placeholder=" …")}


def main():
    peer, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out, sys.stdout = sys.stdout, open(os.devnull, "w")
    sys.stderr = open(os.devnull, "w")  # progress bars
    tensors = cases.load(path)
    given = Input(np.asarray(tensors["activations"]), np.asarray(tensors["labels"]), threads)
    for site in given.stack:
        site.max()  # so that the pages of the file are there
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        if number == 0:
            answer(given.small(), peer, request | {"sites": [0, 1]})
        print(json.dumps(answer(given, peer, request)), file=out, flush=True)


if __name__ == "__main__":
    main()
