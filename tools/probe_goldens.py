#!/usr/bin/env python3
"""Linear models on frozen features, computed in f64 with numpy: tests/golden/probe.safetensors.

The ridge regression is that of big_vision's `fewshot_lsr` as its comments print it, with the constant column of 100 in the
matrix; the logistic regression is plain SGD with momentum. Needs numpy and safetensors.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLASSES, WIDTH = 4, 7
LR, EPOCHS, BATCH, MOMENTUM = 0.3, 3, 8, 0.9

rng = np.random.default_rng(0)
out = {}


def features(images):
    # Of unlike size, so that it matters that they are standardised; as f32, which is what the crate reads.
    return (rng.normal(size=(images, WIDTH)) * np.geomspace(0.1, 10, WIDTH) + 3).astype(np.float32)


def standardised(x, of):
    of = of.astype(np.float64)
    return (x.astype(np.float64) - of.mean(0)) / (of.std(0) + 1e-5)


def with_bias(x):
    return np.pad(x, ((0, 0), (0, 1)), constant_values=100.0)


others = out["others"] = features(6)
for case, images in [("many", 30), ("few", 5)]:
    x = out[f"{case}.features"] = features(images)
    labels = np.arange(images) % CLASSES
    x[:, 0] += labels
    out[f"{case}.labels"] = labels.astype(np.float32)
    a, y = with_bias(standardised(x, x)), 2.0 * np.eye(CLASSES)[labels] - 1.0
    for l2 in [1, 1024]:
        w = np.linalg.solve(a.T @ a + l2 * np.eye(WIDTH + 1), a.T @ y)
        out[f"{case}.scores {l2}"] = with_bias(standardised(others, x)) @ w

x, labels = standardised(out["many.features"], out["many.features"]), out["many.labels"].astype(int)
images = len(x)
orders = [rng.permutation(images) for _ in range(EPOCHS)]
w, b = np.zeros((CLASSES, WIDTH)), np.zeros(CLASSES)
vw, vb = np.zeros_like(w), np.zeros_like(b)
steps, step, losses = EPOCHS * -(-images // BATCH), 0, []
for order in orders:
    loss = 0.0
    for start in range(0, images, BATCH):
        rows = order[start : start + BATCH]
        logits = x[rows] @ w.T + b
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        loss -= log_p[np.arange(len(rows)), labels[rows]].sum()
        g = (np.exp(log_p) - np.eye(CLASSES)[labels[rows]]) / len(rows)
        vw, vb = MOMENTUM * vw + g.T @ x[rows], MOMENTUM * vb + g.sum(0)
        lr = LR * 0.5 * (1 + np.cos(np.pi * step / steps))
        w, b, step = w - lr * vw, b - lr * vb, step + 1
    losses.append(loss / images)
out["orders"] = np.array(orders)
out["probe.weights"], out["probe.bias"], out["probe.losses"] = w, b, np.array(losses)
out["probe.logits"] = standardised(others, out["many.features"]) @ w.T + b

path = Path(__file__).parent.parent / "tests/golden/probe.safetensors"
save_file({name: np.ascontiguousarray(value, dtype=np.float32) for name, value in out.items()}, path)
