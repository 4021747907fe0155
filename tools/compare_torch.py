#!/usr/bin/env python3
"""Training throughput of same-shaped networks on this CPU: PyTorch's and this crate's.

    pip install torch==2.15.0 vit-pytorch==1.26.11 timm==1.0.31 numpy
    python tools/compare_torch.py [--shape Ti] [--steps 3] [--bf16] [--write benches/results/cpu-step.md]

Every network runs in its own process, f32, on all cores: forward, softmax cross-entropy over 1000
classes, backward, AdamW. With --bf16 PyTorch's run under autocast to bf16, and this crate's with train.matmul=bf16; a CPU
with AMX has units for it. With --rounds N all networks run N times in turn and the best of each counts, on a machine that
others use too. The ragged networks see the same images: resolution uniform in [64, 256], aspect
1:2 to 2:1, patch 16, about 4096 tokens a step, in memory before the clock starts. Only patches of images
count as tokens, not padding. One step warms up.

This crate's numbers come from a command that prints one JSON line for each network:
{"model": "navit-ti16", "tokens_per_s": 1234.5, "peak_rss_mib": 678.9}. `--ours` names the command; the
words {shape}, {steps}, {tokens} and {matmul} in it are replaced.

    python tools/compare_torch.py --gpu [--only steps] [--quick] [--write benches/results/gpu-torch.md]

compares on a GPU instead, in one process: whole training steps with torch.compile, products with cuBLAS, packed
attention with cuDNN, torch's varlen attention, FlashAttention 3 (pip install fa3-fwd) and 4 (pip install flash-attn-4
'nvidia-cutlass-dsl[cu13]'), and what this project set itself beside them. See torch_gpu.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {"Ti": (192, 12, 768, 3), "S": (384, 12, 1536, 6), "B": (768, 12, 3072, 12)}
PATCH, CLASSES, SEED = 16, 1000, 0
OURS = " && ".join(
    f"cargo bench -q --bench step -- --json --model {model} --shape {{shape}} --steps {{steps}} --tokens {{tokens}} "
    "--matmul {matmul}"
    for model in ("navit", "vit")
)


def grids(tokens, rng):
    """Patch grids of one step: as many images as fit."""
    out, used = [], 0
    while True:
        side = rng.uniform(64, 256)
        aspect = math.exp(rng.uniform(-math.log(2), math.log(2)))
        h = max(1, round(side * math.sqrt(aspect) / PATCH))
        w = max(1, round(side / math.sqrt(aspect) / PATCH))
        if used + h * w > tokens:
            return out
        out.append((h, w))
        used += h * w


def navit(shape):
    from vit_pytorch.na_vit import NaViT

    width, depth, mlp, heads = SHAPES[shape]
    return NaViT(
        image_size=64 * PATCH, patch_size=PATCH, num_classes=CLASSES, dim=width, depth=depth, heads=heads,
        mlp_dim=mlp, dim_head=width // heads,
    )


def naflex(shape):
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    width, depth, mlp, heads = SHAPES[shape]
    cfg = NaFlexVitCfg(
        patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width, qk_norm=True,
        pos_embed="factorized", pos_embed_grid_size=(16, 16), global_pool="map",
    )
    return NaFlexVit(cfg, num_classes=CLASSES)


def vit(shape):
    from timm.models.vision_transformer import VisionTransformer

    width, depth, mlp, heads = SHAPES[shape]
    return VisionTransformer(
        patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width, num_classes=CLASSES
    )


def padded(images):
    """timm's batch: one image a row, padded to the longest."""
    import torch

    longest = max(x.shape[1] * x.shape[2] // PATCH**2 for x in images)
    patches = torch.zeros(len(images), longest, PATCH * PATCH * 3)
    coord = torch.zeros(len(images), longest, 2, dtype=torch.long)
    valid = torch.zeros(len(images), longest, dtype=torch.bool)
    for i, x in enumerate(images):
        h, w = x.shape[1] // PATCH, x.shape[2] // PATCH
        flat = x.reshape(3, h, PATCH, w, PATCH).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        patches[i, : h * w] = flat
        coord[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, : h * w] = True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def squares(images):
    import torch

    return torch.stack(images)


# Name: what the table calls it, network, batch of images -> arguments of the network, whether images are ragged.
PEERS = {
    "navit": ("vit-pytorch NaViT, packed (group_images)", navit, lambda x: ((x,), {"group_images": True}), True),
    "naflex": ("timm NaFlexVit, padded", naflex, lambda x: ((padded(x),), {}), True),
    "vit": ("timm VisionTransformer, 224 x 224 squares", vit, lambda x: ((squares(x),), {}), False),
}


def child(name, shape, steps, tokens, bf16):
    import random

    import torch

    torch.manual_seed(SEED)
    torch.set_num_threads(os.cpu_count())
    rng = random.Random(SEED)
    _, build, arguments, ragged = PEERS[name]
    side = 224 // PATCH
    batches, counts = [], []
    for _ in range(steps + 1):
        step_grids = grids(tokens, rng) if ragged else [(side, side)] * (tokens // side**2)
        images = [torch.randn(3, h * PATCH, w * PATCH) for h, w in step_grids]
        batches.append((images, torch.randint(CLASSES, (len(images),))))
        counts.append(sum(h * w for h, w in step_grids))
    model = build(shape).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    for i, (images, classes) in enumerate(batches):
        if i == 1:
            start = time.perf_counter()
        args, kwargs = arguments(images)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(*args, **kwargs)
        loss = torch.nn.functional.cross_entropy(logits.float(), classes)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"model": name, "tokens_per_s": sum(counts[1:]) / seconds, "peak_rss_mib": peak}))


def rows_of(command, **kwargs):
    """The JSON lines that a command prints; none, with the reason on stderr, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{command if isinstance(command, str) else ' '.join(command)}: {last}", file=sys.stderr)
        return []
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows, options):
    import torch

    ours = [r for r in rows if r["ours"]]
    several = options.rounds > 1
    best = f", the best of {options.rounds} rounds in which all took turns" * several
    rounds = f" --rounds {options.rounds}" * several
    lines = [
        f"# Training step on a CPU: ViT-{options.shape}/16, {'bf16' if options.bf16 else 'f32'}",
        "",
        f"{cpu_name()}, {os.cpu_count()} threads, torch {torch.__version__}; {options.steps} steps of about "
        f"{options.tokens} tokens after one to warm up{best}; `python tools/compare_torch.py --shape {options.shape} "
        f"--steps {options.steps}{' --bf16' * options.bf16}{rounds}`.",
        "",
        "| network | tokens/s | peak memory, MiB |" + "".join(f" {r['model']} is |" for r in ours),
        "|---|---:|---:|" + "---:|" * len(ours),
    ]
    for row in rows:
        label = row["model"] if row["ours"] else PEERS[row["model"]][0]
        ratios = "".join(f" {o['tokens_per_s'] / row['tokens_per_s']:.2f}x |" for o in ours)
        lines.append(f"| {label} | {row['tokens_per_s']:.0f} | {row['peak_rss_mib']:.0f} |{ratios}")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Ti")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true", help="bf16 in matrix products")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each network, of which the best counts")
    parser.add_argument("--ours", default=OURS, help="command that prints this crate's JSON lines; empty for none")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--gpu", action="store_true", help="compare training steps and kernels on a GPU")
    gpu.add_argument("--library", type=Path, help="the built torch_bridge library, instead of building it")
    gpu.add_argument("--dry-run", action="store_true", help="check the library without GPU and PyTorch")
    gpu.add_argument(
        "--only", type=lambda text: text.split(","), default=["steps", "gemm", "attention"],
        help="parts, with commas: steps, gemm, attention",
    )
    gpu.add_argument("--quick", action="store_true", help="kernels at a few shapes alone")
    gpu.add_argument(
        "--modes", type=lambda text: text.split(","), default=["default", "max-autotune-no-cudagraphs"],
        help="of torch.compile, with commas, in turn",
    )
    gpu.add_argument(
        "--recipe", dest="recipes", action="append", default=[],
        help="recipe of the steps with settings of its own, such as 'vit-b16 model.shape=H model.patch=14'; may be "
        "repeated; without it vit-b16 and navit-b16",
    )
    gpu.add_argument("--set", dest="sets", action="append", default=[], help="key=value over all recipes of the steps")
    gpu.add_argument("--bits", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gpu:
        import torch_gpu

        unknown = set(options.only) - set(torch_gpu.PARTS)
        if unknown:
            parser.error(f"--only knows {', '.join(torch_gpu.PARTS)}, not {', '.join(sorted(unknown))}")
        torch_gpu.main(options)
        return
    if options.child:
        child(options.child, options.shape, options.steps, options.tokens, options.bf16)
        return
    words = {"shape": options.shape, "steps": options.steps, "tokens": options.tokens}
    ours = options.ours
    for word, value in (words | {"matmul": "bf16" if options.bf16 else "f32"}).items():
        ours = ours.replace("{" + word + "}", str(value))
    best = {}
    for _ in range(options.rounds):
        found = rows_of(ours, shell=True, cwd=Path(__file__).resolve().parent.parent) if ours else []
        found = [{**row, "ours": True} for row in found]
        for name in PEERS:
            command = [sys.executable, __file__, "--child", name, *["--bf16"] * options.bf16]
            command += [part for word, value in words.items() for part in (f"--{word}", str(value))]
            found += [{**row, "ours": False} for row in rows_of(command)]
        for row in found:
            known = best.get(row["model"])
            if known is None or row["tokens_per_s"] > known["tokens_per_s"]:
                best[row["model"]] = row
    rows = list(best.values())
    text = table(rows, options)
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)


if __name__ == "__main__":
    main()
