"""Whole training steps beside torch.compile: of recipes with a class token timm's ViT, of those with attention pooling a
packed ViT on varlen attention, or a plain one where all images are of one size.

Both sides train in bf16 with f32 weights and AdamW, one batch a step, over the same few batches of random pixels
in host memory, which are copied to the GPU while the step before runs. The ragged batches are ours: their images,
positions and padding are handed over. Time is by the wall clock over steps in a row, the median of some runs.
"""

import statistics
import sys
import time

from .library import Training

RECIPES = ("vit-b16", "navit-b16")
GIB = 1 << 30
CLASSES, BATCHES, RATE = 1000, 4, 1e-4
RUNS, STEPS = 5, 8
# Sequences that padding is cut into, so that none is long.
PADDING = 8


def varlen_attention():
    """(name, function over packed q, k, v [T, H, Dh], starts and the longest length)."""
    reasons = []
    try:
        from torch.nn.attention.varlen import varlen_attn

        return "torch varlen", lambda q, k, v, starts, longest: varlen_attn(
            q, k, v, starts, starts, longest, longest
        )
    except ImportError as reason:
        reasons.append(str(reason))
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            function = __import__(module).flash_attn_varlen_func
        except (ImportError, AttributeError) as reason:
            reasons.append(str(reason))
            continue

        def attend(q, k, v, starts, longest, function=function):
            out = function(q, k, v, starts, starts, longest, longest)
            return out[0] if isinstance(out, tuple) else out

        return module, attend
    raise RuntimeError(f"no varlen attention: {'; '.join(reasons)}")


def packed_batch(torch, training, at):
    """Arguments of PackedNaViT, and classes and weight of every slot."""
    described = training.described
    budget, slots = described["recipe"]["packing"]["tokens"], described["slots"]
    starts, positions = training.batch(at)
    images, live = len(starts) - 1, starts[-1]
    lengths = torch.tensor(starts).diff()
    image = torch.full((budget,), slots)
    image[:live] = torch.arange(images).repeat_interleave(lengths)
    # The rest of the slots are empty, and what follows is padding.
    padding = [live + (budget - live) * (i + 1) // PADDING for i in range(PADDING)]
    starts = torch.tensor(starts + [live] * (slots - images) + padding, dtype=torch.int32)
    patches = torch.randint(256, (budget, described["patch_dim"]), dtype=torch.uint8)
    patches[live:] = 0
    weights = (torch.arange(slots) < images).float()
    inputs = (patches, torch.tensor(positions, dtype=torch.int32), image, starts)
    return inputs, torch.randint(CLASSES, (slots,)), weights, images, live


def plain_batch(torch, training, at):
    """Patches [B, S, P] of squares, and classes and weights."""
    starts, _ = training.batch(at)
    images = len(starts) - 1
    patches = starts[1] - training.described["recipe"]["model"]["class_token"]
    pixels = torch.randint(256, (images, patches, training.described["patch_dim"]), dtype=torch.uint8)
    return (pixels,), torch.randint(CLASSES, (images,)), torch.ones(images), images, starts[-1]


def timm_vit(torch, described):
    """timm's own network behind the u8 images of `plain_batch`; none where timm is not installed."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        return None
    recipe = described["recipe"]
    model = recipe["model"]

    class Timm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.side = recipe["resolution"]["max"]
            self.vit = VisionTransformer(
                img_size=self.side, patch_size=model["patch"], embed_dim=described["width"],
                depth=described["depth"], num_heads=described["heads"],
                mlp_ratio=described["mlp"] / described["width"], num_classes=CLASSES,
                drop_path_rate=model["drop_path"],
            )
            for name in ("mean", "std"):
                values = 255 * torch.tensor(recipe["data"][name]).view(1, -1, 1, 1)
                self.register_buffer(name, values, persistent=False)

        def forward(self, patches):
            # As many pixels as the image has: random ones need no order.
            images = patches.view(len(patches), 3, self.side, self.side)
            return self.vit((images.float() - self.mean) / self.std)

    return Timm()


def network(torch, training, at_most):
    """(what it is called, network, batch function) of the recipe."""
    from .models import PackedNaViT, PlainViT

    described = training.described
    pooled = described["recipe"]["model"]["pool"] == "map"
    starts, _ = training.batch(0)
    if pooled and len({b - a for a, b in zip(starts, starts[1:])}) == 1:
        return "plain ViT, MAP head", PlainViT(described, CLASSES, starts[1]), plain_batch
    if pooled:
        name, varlen = varlen_attention()
        return f"packed ViT, {name}", PackedNaViT(described, CLASSES, varlen, at_most), packed_batch
    found = timm_vit(torch, described)
    if found is not None:
        return "timm VisionTransformer", found, plain_batch
    patches = training.batch(0)[0][1] - 1
    return "plain ViT (timm is not installed)", PlainViT(described, CLASSES, patches), plain_batch


def optimiser(torch, model, train):
    """AdamW with the recipe's groups: matrices decay, the head by its own rate."""
    groups = {}
    for name, param in model.named_parameters():
        decay = 0.0
        if name.endswith("weight") and param.ndim >= 2:
            head = "head." in name and train["head_weight_decay"] >= 0
            decay = train["head_weight_decay"] if head else train["weight_decay"]
        groups.setdefault(decay, []).append(param)
    groups = [{"params": params, "weight_decay": decay} for decay, params in groups.items()]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=RATE, betas=(train["beta1"], train["beta2"]), eps=train["eps"], fused=fused)


def loss_of(torch, train, logits, classes, weights):
    if train["loss"] == "sigmoid":
        targets = torch.nn.functional.one_hot(classes, CLASSES).float()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").sum(1)
    else:
        losses = torch.nn.functional.cross_entropy(
            logits.float(), classes, reduction="none", label_smoothing=train["label_smoothing"]
        )
    return (losses * weights).sum() / weights.sum()


class Theirs:
    """A training in PyTorch."""

    def __init__(self, torch, model, train, batches, mode, device="cuda"):
        self.torch, self.train, self.batches, self.device = torch, train, batches, device
        self.model = model.to(device).train()
        self.optimiser = optimiser(torch, model, train)

        def forward(inputs, classes, weights):
            with torch.autocast(device, torch.bfloat16):
                logits = self.model(*inputs)
            return loss_of(torch, train, logits, classes, weights)

        self.forward = torch.compile(forward, mode=mode, dynamic=False) if mode else forward
        self.cuda = device == "cuda"
        self.copies = torch.cuda.Stream() if self.cuda else None
        self.queued, self.ahead = 0, None

    def copied(self, at):
        """The batch on its way to the device."""
        inputs, classes, weights, _, _ = self.batches[at % len(self.batches)]
        move = lambda x: x.to(self.device, non_blocking=True)  # noqa: E731
        if not self.cuda:
            return tuple(map(move, inputs)), move(classes), move(weights)
        with self.torch.cuda.stream(self.copies):
            return tuple(map(move, inputs)), move(classes), move(weights)

    def step(self):
        current = self.ahead or self.copied(self.queued)
        if self.cuda:
            here = self.torch.cuda.current_stream()
            here.wait_stream(self.copies)
            for tensor in (*current[0], *current[1:]):
                tensor.record_stream(here)
        self.queued += 1
        self.ahead = self.copied(self.queued)
        loss = self.forward(*current)
        loss.backward()
        if self.train["clip"] > 0:
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train["clip"])
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, steps):
        """Seconds a step, and the last loss."""
        self.torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        self.torch.cuda.synchronize()
        return (time.perf_counter() - begun) / steps, float(loss)


def measure_theirs(torch, model, training, batches, mode):
    """(seconds a step, first loss, bytes at the peak)."""
    torch.cuda.reset_peak_memory_stats()
    theirs = Theirs(torch, model, training["recipe"]["train"], batches, mode)
    first = float(theirs.step())
    theirs.run(3)
    runs = [theirs.run(STEPS) for _ in range(RUNS)]
    if not all(abs(loss) < 1e6 for _, loss in runs):
        raise RuntimeError(f"the loss of PyTorch's training went to {runs[-1][1]}")
    return statistics.median(seconds for seconds, _ in runs), first, torch.cuda.max_memory_allocated()


def table(rows):
    lines = [
        "## Training steps", "",
        "One batch a step, forward, backward, AdamW. Tokens are those of images; TFLOP/s are model FLOPs.", "",
        "| recipe | tokens | images | ours, ms | ours, tokens/s | ours, TFLOP/s | ours, GiB | beside | compiled with "
        "| ms | tokens/s | GiB | theirs / ours in ms |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = f"| {row['recipe']} | {row['tokens']:.0f} | {row['images']:.0f} "
        cells += f"| {1e3 * row['ours']:.2f} | {row['tokens'] / row['ours']:.0f} "
        cells += f"| {row['flops'] / row['ours'] / 1e12:.1f} | {row['memory'] / GIB:.2f} | {row['peer']} | {row['mode']} "
        if row["theirs"]:
            cells += f"| {1e3 * row['theirs']:.2f} | {row['tokens'] / row['theirs']:.0f} "
            cells += f"| {row['theirs_memory'] / GIB:.2f} | {row['theirs'] / row['ours']:.2f} |"
        else:
            cells += "| not measured | | | |"
        lines.append(cells)
    return "\n".join(lines) + "\n"


def compare(torch, library, options, write):
    """Measures every recipe, with settings of its own behind its name, and hands the table to `write` as it grows."""
    rows, failures = [], []
    for recipe in options.recipes or RECIPES:
        try:
            compare_recipe(torch, library, recipe, options, rows, write)
        except RuntimeError as reason:
            failures.append(f"{recipe}: {str(reason).splitlines()[0]}")
            print(failures[-1], file=sys.stderr)
        torch.cuda.empty_cache()
    if failures:
        raise RuntimeError("; ".join(failures))


def compare_recipe(torch, library, recipe, options, rows, write):
    torch.cuda.empty_cache()
    base, *sets = recipe.split()
    training = Training(library, base, options.sets + sets, CLASSES, BATCHES)
    try:
        runs = sorted((training.run(STEPS) for _ in range(RUNS)), key=lambda run: run.seconds)
        run = runs[RUNS // 2]
        longest = max(
            b - a for at in range(BATCHES) for starts in [training.batch(at)[0]] for a, b in zip(starts, starts[1:])
        )
        name, model, batch = network(torch, training, longest)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        batches = [batch(torch, training, at) for at in range(BATCHES)]
        described = training.described
    finally:
        training.close()
    if batch is packed_batch:
        padding = max(described["recipe"]["packing"]["tokens"] - live for *_, live in batches)
        model.longest = max(longest, -(-padding // PADDING) + 1)
    pinned = lambda x: x.pin_memory()  # noqa: E731
    batches = [(tuple(map(pinned, i)), pinned(c), pinned(w), n, t) for i, c, w, n, t in batches]
    row = {"recipe": recipe, "peer": name, "ours": run.seconds / STEPS}
    row |= {"tokens": run.tokens / STEPS, "images": run.images / STEPS, "flops": run.flops / STEPS}
    row |= {"memory": described["memory_bytes"]}
    print(f"{recipe}: ours {1e3 * row['ours']:.2f} ms, loss {run.first_loss:.3f}", file=sys.stderr, flush=True)
    for mode in options.modes:
        found = {**row, "mode": mode, "theirs": None}
        rows.append(found)
        write(table(rows))
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        model.load_state_dict(weights)
        try:
            found["theirs"], first, found["theirs_memory"] = measure_theirs(torch, model, described, batches, mode)
        except Exception as reason:  # What a compiler throws has no common kind.
            print(f"{recipe} with {mode}: {str(reason).splitlines()[0]}", file=sys.stderr, flush=True)
            continue
        finally:
            model.to("cpu")
        write(table(rows))
        print(f"{recipe}, {mode}: {1e3 * found['theirs']:.2f} ms, loss {first:.3f}", file=sys.stderr, flush=True)
        if not abs(first - run.first_loss) <= 0.05 * run.first_loss:
            raise RuntimeError(f"{recipe} begins at a loss of {run.first_loss:.3f} and {first:.3f} in PyTorch")
