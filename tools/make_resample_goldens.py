#!/usr/bin/env python3
"""Writes tests/position/resample.safetensors: position tables resampled by the libraries that the filters are from.

    pip install torch==2.15.0 timm==1.0.31 transformers==5.23.0 scipy==1.17.1 safetensors numpy
    python tools/make_resample_goldens.py

One table of 7x7 rows and 2 columns, `table`, is resampled to several grids by every filter of a recipe:
`bicubic 5x9` is [5 * 9, 2]. All in f64, but for transformers, whose model code resamples in f32. The kernel `patch` of a
patch embedding of 5x5 pixels is resized by timm's pseudo-inverse: `patch bicubic 7` is [2, 3, 7, 7].
"""

from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from transformers import Dinov2Config, SiglipVisionConfig, ViTConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings

SIDE, WIDTH, PATCH = 7, 2, 4
GRIDS = [(7, 7), (4, 4), (16, 16), (5, 9), (7, 3), (3, 7), (1, 1), (1, 8), (9, 14)]


def interpolate(table, grid, **how):
    out = F.interpolate(table.T.reshape(1, WIDTH, SIDE, SIDE), mode=how.pop("mode", "bicubic"), **how)
    assert out.shape[-2:] == grid
    return out.reshape(WIDTH, -1).T


def zoom(table, grid):
    """big_vision's `resample_posemb`."""
    factors = (grid[0] / SIDE, grid[1] / SIDE, 1)
    out = scipy.ndimage.zoom(table.reshape(SIDE, SIDE, WIDTH).numpy(), factors, order=1)
    return torch.from_numpy(out).reshape(-1, WIDTH)


def offset(table, grid):
    """DINOv2's `interpolate_pos_encoding` with `interpolate_offset=0.1`."""
    if grid == (SIDE, SIDE):
        return table
    factors = tuple((side + 0.1) / SIDE for side in grid)
    return interpolate(table, grid, scale_factor=factors)


FILTERS = {
    "linear": lambda t, g: interpolate(t, g, size=g, mode="bilinear"),
    "linear-align-corners": lambda t, g: interpolate(t, g, size=g, mode="bilinear", align_corners=True),
    "linear-align-corners (scipy)": zoom,
    "bilinear": lambda t, g: interpolate(t, g, size=g, mode="bilinear", antialias=True),
    "bicubic": lambda t, g: interpolate(t, g, size=g, antialias=True),
    "bicubic (timm)": lambda t, g: resample_abs_pos_embed(t[None], list(g), num_prefix_tokens=0)[0],
    "bicubic-no-antialias": lambda t, g: interpolate(t, g, size=g),
    "bicubic-offset": offset,
}


def of_transformers(table, grid):
    """The three models that resample in the same way, as a check of it."""
    size = {"hidden_size": WIDTH, "num_attention_heads": 1, "image_size": SIDE * PATCH, "patch_size": PATCH}
    x = torch.zeros(1, grid[0] * grid[1] + 1, WIDTH)
    for kind, config in [(ViTEmbeddings, ViTConfig(**size)), (Dinov2Embeddings, Dinov2Config(**size))]:
        model = kind(config)
        model.position_embeddings.data[0, 1:] = table
        yield model.interpolate_pos_encoding(x, grid[0] * PATCH, grid[1] * PATCH)[0, 1:]
    model = SiglipVisionEmbeddings(SiglipVisionConfig(**size))
    model.position_embedding.weight.data[:] = table
    yield model.interpolate_pos_encoding(x[:, 1:], grid[0] * PATCH, grid[1] * PATCH)[0]


@torch.no_grad()
def main():
    torch.manual_seed(3)
    table = torch.randn(SIDE * SIDE, WIDTH).double()
    tensors = {"table": table}
    for grid in GRIDS:
        for name, resample in FILTERS.items():
            tensors[f"{name} {grid[0]}x{grid[1]}"] = resample(table, grid)
        for other in of_transformers(table, grid):
            difference = (other - tensors[f"bicubic-no-antialias {grid[0]}x{grid[1]}"]).abs().max()
            assert difference < 1e-5, f"transformers at {grid}: {difference}"
    kernel = torch.randn(WIDTH, 3, 5, 5)
    tensors["patch"] = kernel
    for mode in ("bicubic", "bilinear"):
        for side in (3, 4, 7, 10):
            tensors[f"patch {mode} {side}"] = resample_patch_embed(kernel, [side, side], interpolation=mode)
    path = Path(__file__).resolve().parent.parent / "tests" / "position" / "resample.safetensors"
    save_file({name: np.ascontiguousarray(value.double().numpy()) for name, value in tensors.items()}, path)
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes")


main()
