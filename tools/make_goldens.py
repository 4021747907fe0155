#!/usr/bin/env python3
"""Writes tests/golden: small networks of other implementations with their results.

    pip install torch==2.15.0 vit-pytorch==1.26.11 timm==1.0.31 transformers==5.23.0 safetensors numpy
    python tools/make_goldens.py [families | rope]

`families` writes the cases of `golden_families.py` alone, `rope` those of `golden_rope.py`.

Every case is a folder with `weights.safetensors` (the implementation's own names), `config.toml` (what a
recipe must say beyond the shapes) and `expected.safetensors` (`logits` and, where the implementation
gives them, `features`). All cases read the same `images.safetensors` (`image.0`, ...; f32 [C, H, W]).

All parameters are drawn anew so that each of them moves the logits: default initialisations hide
whole blocks behind a LayerScale of 1e-5. Results are computed in f64 from the f32 weights, so the
tests measure this crate's rounding alone. One image is nearly constant, which shows a wrong epsilon.
"""

import math
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent / "tests" / "golden"
PATCH, DIM, DEPTH, HEADS, CLASSES = 4, 32, 2, 2, 6
GRIDS = [(4, 8), (8, 3), (5, 5), (1, 8), (2, 2)]


def make_images():
    g = torch.Generator().manual_seed(7)
    images = [torch.randn(3, h * PATCH, w * PATCH, generator=g) for h, w in GRIDS]
    images[-1] = 0.3 + 0.004 * images[-1]
    return images


def randomise(model, seed):
    """Draws every parameter so that it matters: gains around 1, LayerScale around 1/2, fan-in scaled matrices."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        module, leaf = ("." + name).split(".")[-2:]
        if module in ("ls", "ls1", "ls2") or leaf == "lambda1":
            value = 0.5 + 0.2 * noise
        elif "norm" in name and leaf == "weight" or leaf == "gamma" or p.dim() == 1 and leaf == "weight":
            value = 1 + 0.3 * noise
        elif leaf in ("bias", "mlp_bias", "in_proj_bias"):
            value = 0.3 * noise
        elif "pos_embed" in name or "position_embedding" in name or "token" in name:
            value = 0.7 * noise
        elif p.dim() >= 2 and leaf in ("weight", "in_proj_weight"):
            value = 1.2 * noise / math.sqrt(p[0].numel())
        else:
            value = noise
        p.data.copy_(value)
    return model.eval()


def write(case, model, config, logits, features=None, rename=lambda k: k):
    write_weights(case, {rename(k): v for k, v in model.state_dict().items()}, config, logits, features)


def write_weights(case, weights, config, logits, features=None):
    folder = ROOT / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({k: v.float().contiguous() for k, v in weights.items()}, folder / "weights.safetensors")
    expected = {"logits": logits} if logits is not None else {}
    if features is not None:
        expected["features"] = features
    save_file({k: v.float().contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    (folder / "config.toml").write_text(config.strip() + "\n")
    shown = logits if logits is not None else features
    print(f"{case:24} std {shown.std():.2f}  {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")


def vit_pytorch_cases(images):
    from vit_pytorch.na_vit import NaViT
    from vit_pytorch.na_vit_nested_tensor import NaViT as Nested

    size = dict(image_size=8 * PATCH, patch_size=PATCH, num_classes=CLASSES, dim=DIM, depth=DEPTH, mlp_dim=48)
    # Three heads of 16 are wider than the model: queries, keys and values need not have its width.
    model = randomise(NaViT(**size, heads=3, dim_head=16), 1).double()
    logits = model([images[:2], images[2:4], images[4:]])
    write("na_vit", model, 'description = "vit-pytorch na_vit, packed two by two"', logits)

    model = randomise(Nested(**size, heads=3, dim_head=16), 2).double()
    write("na_vit_nested", model, 'description = "vit-pytorch na_vit_nested_tensor"', model(images))


def one_by_one(model, images):
    """Logits and what the head sees, image by image."""
    out = [(model(x[None]), model.forward_head(model.forward_features(x[None]), pre_logits=True)) for x in images]
    return torch.cat([a for a, _ in out]), torch.cat([b for _, b in out])


def naflex_cases(images):
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    cases = {
        "naflex_gap": dict(global_pool="avg", fc_norm=True),
        "naflex_gap_qk_norm": dict(global_pool="avg", fc_norm=True, qk_norm=True, init_values=1e-5),
        "naflex_par_gap": dict(global_pool="avg", fc_norm=True, pos_embed_ar_preserving=True),
        "naflex_factorized": dict(global_pool="avg", fc_norm=True, pos_embed="factorized"),
        "naflex_parfac": dict(
            global_pool="avg", fc_norm=True, pos_embed="factorized", pos_embed_ar_preserving=True, reg_tokens=2
        ),
        "naflex_map": dict(global_pool="map", class_token=True, reg_tokens=1),
        "naflex_token": dict(global_pool="token", class_token=True, reg_tokens=1),
        "naflex_siglip": dict(global_pool="map", pos_embed_interp_mode="bilinear", act_layer="gelu_tanh"),
    }
    for seed, (case, options) in enumerate(cases.items(), 10):
        cfg = NaFlexVitCfg(
            patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0,
            pos_embed_grid_size=(5, 6), **options,
        )
        model = randomise(NaFlexVit(cfg, num_classes=CLASSES), seed).double()
        config = [f'description = "timm NaFlexVit: {case}"', "[model]", f"heads = {HEADS}", f"width = {DIM}"]
        if options.get("pos_embed_ar_preserving"):
            config.append('position = { coordinate = "fractional-aspect" }')
        if options.get("pos_embed_interp_mode") == "bilinear":
            config += ['gelu = "tanh"', 'position = { resample = "bilinear" }']
        logits, features = one_by_one(model, images)
        write(case, model, "\n".join(config), logits, features)


def plain_cases(images):
    from timm.layers import RmsNorm
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    base = dict(
        patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0, num_classes=CLASSES,
        dynamic_img_size=True,
    )
    rms = dict(block_fn=ParallelScalingBlock, norm_layer=RmsNorm, qkv_bias=False, qk_norm=True)
    fused = partial(ParallelScalingBlock, fuse_out_proj=True)
    cases = {
        "vit_cls": dict(img_size=5 * PATCH),
        "vit_reg_gap": dict(
            img_size=(4 * PATCH, 6 * PATCH), class_token=False, reg_tokens=2, no_embed_class=True, global_pool="avg"
        ),
        "deit3": dict(img_size=4 * PATCH, no_embed_class=True, init_values=1e-4),
        "vit_parallel": dict(img_size=4 * PATCH, no_embed_class=True, **rms),
        "vit_parallel_fused": dict(
            img_size=4 * PATCH, block_fn=fused, qkv_bias=True, init_values=1e-5, global_pool="avg", class_token=False
        ),
    }
    for seed, (case, options) in enumerate(cases.items(), 30):
        model = randomise(VisionTransformer(**base, **options), seed).double()
        config = [f'description = "timm VisionTransformer: {case}"', "[model]", f"heads = {HEADS}", f"width = {DIM}"]
        if case == "vit_reg_gap":
            config.append("position = { rows = 4, columns = 6 }")
        logits, features = one_by_one(model, images)

        def rename(key, deit=case == "deit3"):
            # The names of DeiT's own repository.
            return key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2") if deit else key

        write(case, model, "\n".join(config), logits, features, rename)


def siglip2_case(images):
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=DIM, intermediate_size=2 * DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        patch_size=PATCH, num_patches=25,
    )
    model = randomise(Siglip2VisionModel(config), 50).double()
    pooled = []
    for x in images:
        h, w = x.shape[1] // PATCH, x.shape[2] // PATCH
        patches = x.reshape(3, h, PATCH, w, PATCH).permute(1, 3, 2, 4, 0).reshape(1, h * w, -1)
        out = model(
            pixel_values=patches, pixel_attention_mask=torch.ones(1, h * w), spatial_shapes=torch.tensor([[h, w]])
        )
        pooled.append(out.pooler_output)
    text = f'description = "transformers Siglip2VisionModel"\n[model]\nheads = {HEADS}\nwidth = {DIM}'
    write("siglip2", model, text, None, torch.cat(pooled))


# ---------------------------------------------------------------------------------------------
# Training step: a ViT in plain PyTorch with this crate's semantics and names.


class Tiny:
    """Packed images are run one by one: attention never crosses images, so this is the same."""

    def __init__(self, kind):
        self.parallel = kind == "parallel"
        self.dim, self.heads, self.head_dim, self.mlp, self.depth = 16, 2, 8, 32, 2
        g = torch.Generator().manual_seed(90 + self.parallel)
        self.p = {}

        def add(name, *shape, around=0.0, std=None):
            std = std if std is not None else 1.0 / math.sqrt(shape[-1])
            self.p[name] = (around + std * torch.randn(*shape, generator=g)).double().requires_grad_()

        d, inner = self.dim, self.heads * self.head_dim
        gains = (self.head_dim if self.parallel else inner,)
        add("patch_embed.weight", d, 3 * PATCH * PATCH)
        add("patch_embed.bias", d, std=0.2)
        add("position.row", 8, d, std=0.5)
        add("position.column", 8, d, std=0.5)
        for n in range(self.depth):
            b = f"blocks.{n}."
            add(b + "norm1.gain", d, around=1, std=0.2)
            add(b + "attn.qkv.weight", 3 * inner, d)
            add(b + "attn.q_norm.gain", *gains, around=1, std=0.2)
            add(b + "attn.k_norm.gain", *gains, around=1, std=0.2)
            add(b + "attn.proj.weight", d, inner)
            if self.parallel:
                add(b + "scale1", d, around=0.5, std=0.1)
                add(b + "scale2", d, around=0.5, std=0.1)
            else:
                add(b + "norm2.gain", d, around=1, std=0.2)
            add(b + "mlp.fc1.weight", self.mlp, d)
            add(b + "mlp.fc1.bias", self.mlp, std=0.2)
            add(b + "mlp.fc2.weight", d, self.mlp)
            add(b + "mlp.fc2.bias", d, std=0.2)
        add("norm.gain", d, around=1, std=0.2)
        add("pool.query", 1, d, std=0.5)
        add("pool.q.weight", inner, d)
        add("pool.kv.weight", 2 * inner, d)
        add("pool.q_norm.gain", *gains, around=1, std=0.2)
        add("pool.k_norm.gain", *gains, around=1, std=0.2)
        add("pool.proj.weight", d, inner)
        if self.parallel:
            add("pool.norm_mlp.gain", d, around=1, std=0.2)
            add("pool.mlp.fc1.weight", self.mlp, d)
            add("pool.mlp.fc1.bias", self.mlp, std=0.2)
            add("pool.mlp.fc2.weight", d, self.mlp)
            add("pool.mlp.fc2.bias", d, std=0.2)
        add("head.weight", CLASSES, d)
        add("head.bias", CLASSES, std=0.2)
        # The tests start from f32 values.
        for p in self.p.values():
            p.data.copy_(p.data.float().double())

    def norm(self, x, name):
        gain = self.p[name + ".gain"]
        if self.parallel:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain
        return F.layer_norm(x, x.shape[-1:], gain, None, 1e-6)

    def attend(self, q, k, v, name):
        """q [m, inner], k and v [n, inner] -> [m, inner]."""
        split = lambda t: t.reshape(-1, self.heads, self.head_dim)
        rms = lambda t, g: split(t) * torch.rsqrt(split(t).square().mean(-1, keepdim=True) + 1e-6) * g.view(-1, self.head_dim)
        q = rms(q, self.p[name + "q_norm.gain"])
        k = rms(k, self.p[name + "k_norm.gain"])
        scores = torch.einsum("mhd,nhd->hmn", q, k) / math.sqrt(self.head_dim)
        return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), split(v)).flatten(1)

    def feed_forward(self, y, name):
        p = self.p
        hidden = F.gelu(F.linear(y, p[name + "fc1.weight"], p[name + "fc1.bias"]))
        return F.linear(hidden, p[name + "fc2.weight"], p[name + "fc2.bias"])

    def logits(self, image):
        p = self.p
        h, w = image.shape[1] // PATCH, image.shape[2] // PATCH
        patches = image.reshape(3, h, PATCH, w, PATCH).permute(1, 3, 0, 2, 4).reshape(h * w, -1)
        x = F.linear(patches, p["patch_embed.weight"], p["patch_embed.bias"])
        x = x + (p["position.row"][:h, None] + p["position.column"][None, :w]).reshape(h * w, -1)
        for n in range(self.depth):
            b = f"blocks.{n}."
            y = self.norm(x, b + "norm1")
            q, k, v = F.linear(y, p[b + "attn.qkv.weight"]).chunk(3, -1)
            attended = F.linear(self.attend(q, k, v, b + "attn."), p[b + "attn.proj.weight"])
            if self.parallel:
                x = x + p[b + "scale1"] * attended + p[b + "scale2"] * self.feed_forward(y, b + "mlp.")
            else:
                x = x + attended
                x = x + self.feed_forward(self.norm(x, b + "norm2"), b + "mlp.")
        x = self.norm(x, "norm")
        k, v = F.linear(x, p["pool.kv.weight"]).chunk(2, -1)
        q = F.linear(p["pool.query"], p["pool.q.weight"])
        z = F.linear(self.attend(q, k, v, "pool."), p["pool.proj.weight"])
        if self.parallel:
            z = z + self.feed_forward(self.norm(z, "pool.norm_mlp"), "pool.mlp.")
        return F.linear(z, p["head.weight"], p["head.bias"])[0]


TRAIN_CONFIG = """
description = "training step, {kind} blocks"
[model]
shape = ""
width = 16
depth = 2
mlp = 32
heads = 2
patch = 4
block = "{kind}"
{extra}
position = {{ rows = 8, columns = 8 }}
[data]
mean = [0.0]
std = [1.0]
flip = false
[resolution]
min = 4
max = 32
[packing]
tokens = 128
[train]
steps = 3
lr = 1e-2
schedule = "constant"
warmup = 0
weight_decay = 0.1
clip = 0.0
"""
PARALLEL = 'norm = "rmsnorm"\nqk_norm_per_head = false\nlayer_scale = 0.5\npool_mlp = true'


def train_step_cases(images):
    images = images[:4]
    classes = [3, 0, 5, 2]
    for kind in ("serial", "parallel"):
        model = Tiny(kind)
        # Matrices decay; gains, biases, positions, LayerScale and the pooling query do not.
        decays = lambda n: n.endswith(".weight")
        groups = [
            {"params": [p for n, p in model.p.items() if decays(n)], "weight_decay": 0.1},
            {"params": [p for n, p in model.p.items() if not decays(n)], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
        out = {"param." + n: p.detach().clone() for n, p in model.p.items()}
        losses = []
        for step in range(4):
            logits = torch.stack([model.logits(x) for x in images])
            loss = F.cross_entropy(logits, torch.tensor(classes))
            losses.append(loss.detach())
            optimiser.zero_grad()
            loss.backward()
            if step == 0:
                out["logits"] = logits.detach()
                out |= {"grad." + n: p.grad.clone() for n, p in model.p.items()}
            if step < 3:
                optimiser.step()
        # The loss before every one of three AdamW steps, and after the last.
        out["losses"] = torch.stack(losses)
        out["classes"] = torch.tensor(classes, dtype=torch.float64)
        out |= {"after." + n: p.detach() for n, p in model.p.items()}
        folder = ROOT / "train_step"
        folder.mkdir(exist_ok=True)
        save_file({k: v.float().contiguous() for k, v in out.items()}, folder / f"{kind}.safetensors")
        (folder / f"{kind}.toml").write_text(
            TRAIN_CONFIG.format(kind=kind, extra=PARALLEL if kind == "parallel" else "").strip() + "\n"
        )
        print(f"train_step/{kind:13} losses", *[f"{l:.4f}" for l in losses])


def main():
    torch.manual_seed(0)
    from golden_families import families
    from golden_rope import rotary

    parts = {"families": families, "rope": rotary}
    if sys.argv[1:]:
        with torch.no_grad():
            return parts[sys.argv[1]]([x.double() for x in make_images()])
    if ROOT.exists():
        shutil.rmtree(ROOT)
    ROOT.mkdir(parents=True)
    images = make_images()
    save_file({f"image.{i}": x for i, x in enumerate(images)}, ROOT / "images.safetensors")
    images = [x.double() for x in images]
    with torch.no_grad():
        vit_pytorch_cases(images)
        naflex_cases(images)
        plain_cases(images)
        siglip2_case(images)
        rotary(images)
        families(images)
    train_step_cases(images)
    total = sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file())
    print(f"{total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
