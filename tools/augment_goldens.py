#!/usr/bin/env python3
"""Writes tests/augment/goldens.safetensors: what Pillow, torchvision and timm make of two small pictures.

    pip install torch torchvision timm pillow safetensors
    python tools/augment_goldens.py

`rgb` and `grey` are the pictures. `<picture>/<operation>/<parameter>` is the result of one operation,
`<picture>/box/...` of RandomResizedCrop at a given box, `<picture>/cut/...` of DeiT III's simple random crop at a given
place and of Resize + CenterCrop. `crops/...` are deciles of what RandomResizedCrop draws, `boxes` what it falls back to,
`rand/...` counts, means and deviations of what timm's RandAugment applies.
"""

import math
import pathlib
import random

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from safetensors.numpy import save_file
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

OUT = pathlib.Path(__file__).parent.parent / "tests/augment/goldens.safetensors"
BICUBIC = InterpolationMode.BICUBIC
# 255 times the ImageNet mean, as timm's create_transform fills.
FILL = {"rgb": (124, 116, 104), "grey": 124}


def picture(height, width, channels, seed):
    """Waves, an edge, a flat patch and some noise, over most of the range."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    layers = []
    for channel in range(channels):
        wave = 118 + 70 * np.sin(0.31 * x + 0.7 * channel) * np.cos(0.23 * y - channel)
        wave += 45 * (x + 2 * y > width) + noise.normal(0, 9, (height, width))
        wave[4:9, 3:12] = 30 + 60 * channel
        layers.append(wave)
    return np.clip(np.stack(layers, -1), 6, 249).astype(np.uint8)


def operations(name, image):
    """(operation, parameter, result)"""
    def timm(op, *args):
        kwargs = dict(fillcolor=FILL[name], resample=Image.Resampling.BICUBIC)
        return NAME_TO_OP[op](image, *args, **kwargs)

    yield "grayscale", 0, transforms.Grayscale(len(image.getbands()))(image)
    for threshold in (0, 77, 128, 256):
        yield "solarize", threshold, ImageOps.solarize(image, threshold)
    for radius in (0.1, 0.47, 0.8, 1.0, 1.37, 1.9, 2.0, 7.5):
        yield "gaussian_blur", radius, image.filter(ImageFilter.GaussianBlur(radius))
    for factor in (0.1, 0.7, 0.93, 1.0, 1.3, 1.9):
        yield "brightness", factor, F.adjust_brightness(image, factor)
        yield "contrast", factor, F.adjust_contrast(image, factor)
        yield "saturation", factor, F.adjust_saturation(image, factor)
        yield "sharpness", factor, timm("SharpnessIncreasing", factor)
    yield "autocontrast", 0, timm("AutoContrast")
    yield "equalize", 0, timm("Equalize")
    yield "invert", 0, timm("Invert")
    for bits in (1, 2, 4):
        yield "posterize", bits, timm("PosterizeIncreasing", bits)
    for add in (0, 41, 110):
        yield "solarize_add", add, timm("SolarizeAdd", add)
    for degrees in (27.3, -27.3, 0.6):
        yield "rotate", degrees, timm("Rotate", degrees)
    for factor in (0.27, -0.1):
        yield "shear_x", factor, timm("ShearX", factor)
        yield "shear_y", factor, timm("ShearY", factor)
    for share in (0.405, -0.13):
        yield "translate_x", share, timm("TranslateXRel", share)
        yield "translate_y", share, timm("TranslateYRel", share)


def frames(image):
    """(name, result)"""
    width, height = image.size
    for top, left, h, w, out_h, out_w in ((0, 0, height, width, 16, 16), (3, 5, 17, 21, 24, 24), (5, 2, 20, 9, 32, 16)):
        resized = F.resized_crop(image, top, left, h, w, (out_h, out_w), BICUBIC)
        yield f"box/{top},{left},{h},{w},{out_h},{out_w}", resized
    for size, padding, i, j in ((16, 4, 0, 0), (16, 4, 8, 10), (24, 4, 5, 1), (48, 4, 7, 12)):
        # As augment.py chains them; the place is given instead of drawn.
        resized = F.resize(image, size, BICUBIC)
        padded = F.pad(resized, padding, padding_mode="reflect")
        yield (f"cut/{resized.height},{resized.width},{i - padding},{j - padding},{size}", F.crop(padded, i, j, size, size))
    for size, ratio in ((16, 0.875), (24, 1.0)):
        pipeline = transforms.Compose(
            [transforms.Resize(int(size / ratio), BICUBIC), transforms.CenterCrop(size)]
        )
        yield f"center/{size},{ratio}", pipeline(image)


def crop_deciles(height, width, draws=40_000):
    image = Image.new("L", (width, height))
    params = [transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(draws)]
    top, left, h, w = np.array(params, dtype=np.float64).T
    figures = [h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width]
    return np.stack([np.quantile(figure, np.linspace(0.1, 0.9, 9)) for figure in figures])


def rand_figures(text, draws=60_000):
    """Of each operation: how often an image meets it, and the mean and deviation of its first argument."""
    transform = rand_augment_transform(text, dict(img_mean=FILL["rgb"], interpolation=Image.Resampling.BICUBIC))
    seen = {op.name: [] for op in transform.ops}
    for op in transform.ops:
        op.aug_fn = lambda image, *args, name=op.name, **kwargs: seen[name].append(args[0] if args else 0.0)
    for _ in range(draws):
        transform(None)
    names = sorted(seen)
    return np.array([[len(seen[n]) / draws, np.mean(seen[n]), np.std(seen[n])] for n in names])


def main():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    out = {"rgb": picture(25, 29, 3, 1), "grey": picture(17, 15, 1, 2)}
    for name in ("rgb", "grey"):
        image = Image.fromarray(out[name].squeeze())
        shaped = lambda result: np.asarray(result).reshape(result.height, result.width, -1)
        for operation, parameter, result in operations(name, image):
            out[f"{name}/{operation}/{parameter}"] = shaped(result)
        for frame, result in frames(image) if name == "rgb" else ():
            out[f"{name}/{frame}"] = shaped(result)
    for height, width in ((300, 400), (224, 224), (90, 400)):
        out[f"crops/{height},{width}"] = crop_deciles(height, width)
    boxes = []
    for height, width in ((10, 1000), (1000, 10), (7, 300)):
        # No box of 90 % of such an image has an allowed shape.
        image = Image.new("L", (width, height))
        box = transforms.RandomResizedCrop.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))
        boxes.append([height, width, *box])
    out["boxes"] = np.array(boxes, dtype=np.int64)
    for text in ("rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.8-inc1"):
        out[f"rand/{text}"] = rand_figures(text)
    save_file({name: np.ascontiguousarray(value) for name, value in sorted(out.items())}, OUT)
    print(f"{len(out)} tensors, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
