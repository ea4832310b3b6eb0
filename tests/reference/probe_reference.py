# SPDX-License-Identifier: Apache-2.0
"""Loss curves of PyTorch's nn.Linear + Adam, and optima of scikit-learn's LogisticRegression, on data
that tests/probe.cpp makes by the same formulas.

usage: python probe_reference.py > probe_reference.json      (torch, numpy, scikit-learn)
"""
import json
import sys

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression

N, D, C, EPOCHS = 120, 17, 4, 150
i, j, c = np.arange(N)[:, None], np.arange(D)[None, :], np.arange(C)[:, None]
X = 3 + np.sin(0.7 * i + 1.3 * j) + 0.5 * np.cos(0.37 * i * (j + 1)) + 0.3 * (j % C == i % C)
Y = np.where(np.arange(N) % 7 == 0, np.arange(N) // 7 % C, np.arange(N) % C)
W = 0.2 * np.sin(1 + 3 * c + 0.7 * j)
B = 0.1 * np.cos(np.arange(C))
VALIDATE = np.arange(N) % 5 == 2


def curve(dtype, standardize=False, weight_decay=0.0):
    x = torch.tensor(X, dtype=dtype)
    y = torch.tensor(Y)
    train, held = torch.tensor(~VALIDATE), torch.tensor(VALIDATE)
    if standardize:
        x = (x - x[train].mean(0)) / x[train].std(0, unbiased=False)
    model = torch.nn.Linear(D, C, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(W))
        model.bias.copy_(torch.tensor(B))
    adam = torch.optim.Adam([{"params": [model.weight], "weight_decay": weight_decay},
                             {"params": [model.bias]}], lr=0.05)
    out = {"train_loss": [], "validation_loss": [], "validation_correct": []}
    for epoch in range(EPOCHS + 1):
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits[train], y[train])
        out["train_loss"].append(loss.item())
        out["validation_loss"].append(
            torch.nn.functional.cross_entropy(logits[held], y[held]).item())
        out["validation_correct"].append(int((logits[held].argmax(1) == y[held]).sum()))
        if epoch < EPOCHS:
            adam.zero_grad()
            loss.backward()
            adam.step()
    out["weight"] = model.weight.detach().double().numpy().tolist()
    out["bias"] = model.bias.detach().double().numpy().tolist()
    return out


def optimum(ridge):
    """Minimum of the mean loss + ridge/2 |W|^2, biases free; scikit-learn sums losses instead."""
    x, y = X[~VALIDATE], Y[~VALIDATE]
    model = LogisticRegression(C=1 / (ridge * len(x)), solver="newton-cg", tol=1e-13, max_iter=100000)
    model.fit(x, y)
    p = model.predict_proba(x)
    return {"ridge": ridge, "weight": model.coef_.tolist(),
            "mean_loss": float(-np.log(p[np.arange(len(y)), y]).mean()),
            "objective": float(-np.log(p[np.arange(len(y)), y]).mean()
                               + ridge / 2 * (model.coef_ ** 2).sum()),
            "validation_accuracy": float(model.score(X[VALIDATE], Y[VALIDATE]))}


json.dump({
    "versions": {"torch": torch.__version__.split("+")[0], "numpy": np.__version__,
                 "scikit-learn": sklearn.__version__, "python": sys.version.split()[0]},
    "double": curve(torch.float64),
    "double_standardized": curve(torch.float64, standardize=True),
    "double_decay": curve(torch.float64, weight_decay=0.01),
    "float": curve(torch.float32),
    "optimum": [optimum(0.1), optimum(0.001)],
}, sys.stdout, indent=1)
print()
