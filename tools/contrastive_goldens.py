"""Writes tests/contrastive/torch.safetensors: contrastive losses of pairs of images and texts and their gradients, by
PyTorch in float64.

`python tools/contrastive_goldens.py`
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

PAIRS, WIDTH, LOSS_SCALE = 67, 12, 0.125
OUT = Path(__file__).parent.parent / "tests/contrastive/torch.safetensors"


def losses(kind, images, texts, scale, bias):
    """Loss of each pair: CLIP's mean of both directions, or SigLIP's sum over the texts of an image."""
    logits = scale.exp() * F.normalize(images) @ F.normalize(texts).T + bias
    pairs = torch.arange(len(logits))
    if kind == "softmax":
        directions = [F.cross_entropy(x, pairs, reduction="none") for x in (logits, logits.T)]
        return sum(directions) / 2
    return -F.logsigmoid(logits * (2 * torch.eye(len(logits), dtype=logits.dtype) - 1)).sum(1)


def main():
    torch.manual_seed(0)
    texts = torch.randn(PAIRS, WIDTH)
    images = 0.7 * texts + torch.randn(PAIRS, WIDTH)
    weights = torch.ones(PAIRS)
    weights[::5] = 0.5
    weights[3::7] = 0
    tensors = {"images": images, "texts": texts, "weights": weights}
    counted = weights != 0
    for kind, scale, bias in (("softmax", 2.5, 0.0), ("sigmoid", 2.0, -3.0)):
        leaves = [x.double().requires_grad_() for x in (images, texts, torch.tensor(scale), torch.tensor(bias))]
        per_pair = torch.zeros(PAIRS, dtype=torch.float64)
        of_counted = losses(kind, leaves[0][counted], leaves[1][counted], *leaves[2:])
        per_pair = per_pair.masked_scatter(counted, of_counted) * weights.double()
        (LOSS_SCALE * per_pair.sum()).backward()
        tensors[f"{kind}.parameters"] = torch.tensor([scale, bias])
        tensors[f"{kind}.per_pair"] = per_pair.detach().float()
        for name, leaf in zip(("dimages", "dtexts", "dscale", "dbias"), leaves):
            tensors[f"{kind}.{name}"] = leaf.grad.float().reshape(-1)
    save_file(tensors, OUT)


main()
