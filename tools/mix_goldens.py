#!/usr/bin/env python3
"""Writes tests/mix/timm.safetensors: images mixed by timm's `Mixup`, their targets, and torch's losses on them.

    pip install torch==2.15.0 timm==1.0.31 safetensors numpy
    python tools/mix_goldens.py

Eight images of 3x13x20 are mixed with the one at the mirrored place (mode `elem`), half of them by CutMix, with λ and the
centres of the boxes given. `pixels` and `mixed` are 0..255, `mixed` as timm computes it, in floats and not rounded.
`targets s` are the mixed targets with label smoothing s; `binarised` is what DeiT III makes of `targets 0.0`.
Gradients are those by the logits.
"""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.numpy import save_file
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy

IMAGES, CHANNELS, HEIGHT, WIDTH, CLASSES = 8, 3, 13, 20, 6
SHARES = [0.3, 0.75, 0.999, 0.05, 1.0, 0.5, 0.0, 0.62]
CUT = [False, True, True, False, False, True, True, True]
CENTRES = [(0, 0), (6, 10), (3, 3), (0, 0), (0, 0), (0, 19), (12, 0), (5, 1)]
# Images 0 and 7 are of one class, and 3 and 4.
LABELS = [0, 5, 2, 4, 4, 1, 3, 0]


def mix(pixels, smoothing):
    mixup = Mixup(mode="elem", label_smoothing=smoothing, num_classes=CLASSES)
    mixup._params_per_elem = lambda size: (np.array(SHARES, dtype=np.float32), np.array(CUT))
    drawn = iter([axis for centre, cut in zip(CENTRES, CUT) if cut for axis in centre])
    with patch("numpy.random.randint", lambda low, high, size=None: next(drawn)):
        return mixup(pixels.clone(), torch.tensor(LABELS))


def loss_of(logits, loss):
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    value.backward()
    return value.detach().numpy().reshape(1), logits.grad.numpy()


def main():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, CHANNELS, HEIGHT, WIDTH), generator=generator).float()
    out = {
        "pixels": pixels.numpy(),
        "labels": np.array(LABELS, dtype=np.float32),
        "shares": np.array(SHARES, dtype=np.float32),
        "cut": np.array(CUT, dtype=np.float32),
        "centres": np.array(CENTRES, dtype=np.float32),
    }
    for smoothing in [0.0, 0.1]:
        mixed, targets = mix(pixels, smoothing)
        out["mixed"] = mixed.numpy()
        out[f"targets {smoothing}"] = targets.numpy()
    soft = torch.from_numpy(out["targets 0.0"])
    binarised = soft.gt(0.0).to(soft.dtype)  # facebookresearch/deit, engine.py
    out["binarised"] = binarised.numpy()
    logits = 3 * torch.randn(IMAGES, CLASSES, generator=generator)
    out["logits"] = logits.numpy()
    bce = torch.nn.BCEWithLogitsLoss()
    out["bce"], out["bce gradient"] = loss_of(logits, lambda z: bce(z, binarised))
    smoothed = torch.from_numpy(out["targets 0.1"])
    soft_ce = SoftTargetCrossEntropy()
    out["softmax"], out["softmax gradient"] = loss_of(logits, lambda z: soft_ce(z, smoothed))
    # Distillation: the KL divergence from a teacher, of which the gradient is that of the cross-entropy.
    teacher = 2 * torch.randn(IMAGES, CLASSES, generator=generator)
    out["teacher"] = teacher.numpy()
    for temperature, name in [(1.0, "kl"), (2.5, "kl 2.5")]:
        kl = lambda z, t=temperature: t * t * torch.nn.functional.kl_div(
            torch.log_softmax(z / t, -1), torch.log_softmax(teacher / t, -1), reduction="batchmean", log_target=True
        )
        out[name], out[f"{name} gradient"] = loss_of(logits, kl)
    path = Path(__file__).parent.parent / "tests" / "mix" / "timm.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in out.items()}, path)


if __name__ == "__main__":
    main()
