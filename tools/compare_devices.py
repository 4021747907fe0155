#!/usr/bin/env python3
"""Trains one recipe from one seed on two devices and compares their curves.

    python tools/compare_devices.py digits
    python tools/compare_devices.py data/caltech101 --steps 500 --write benches/results/gpu-caltech101.md

The first argument is a recipe, or a folder of images, which the recipe `photos` is then for. Both devices see the same
batches, weights and random decisions, but one computes in f32 and the other in bf16: rounding of one part in 500 changes
the first steps by about as much, and from there the runs part as those of chaotic systems do. What must agree is what
is learned. The tolerance: the mean loss of the last tenth of the steps within 3 % (and 0.02, which is what counts
where the loss nears 0), and the final validation accuracy within 1.5 points, about the standard error of a
few hundred images.

Prints a Markdown page, --write also keeps it with a plot beside it. Status 1: the devices disagree, or a training
failed. Needs the release binary (cargo build --release) and the standard library.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

LOSS_SHARE, LOSS, ACCURACY = 0.03, 0.02, 0.015
WINDOW, ROWS = 20, 12
COLOURS = ("#1f77b4", "#d62728")


def train(args, device, folder):
    """What a training on the device wrote: (loss of each step, validation accuracy by step, seconds a step)."""
    command = [str(args.binary), "train"]
    path = pathlib.Path(args.what)
    if path.exists() and path.suffix != ".toml":
        command += ["--data", args.what]
    else:
        command.append(args.what)
    command += ["--device", device, "--out", str(folder), "--name", "run"]
    every = -(-args.steps // ROWS)
    every_step = ["train.log_every=1", f"train.steps={args.steps}", f"train.eval_every={every}"]
    for setting in [*args.sets, *every_step, f"train.seed={args.seed}"]:
        command += ["--set", setting]
    print(" ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (metrics,) = folder.glob("run-*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    losses = [math.nan if line["loss"] is None else line["loss"] for line in steps]
    seconds = sorted(line["seconds"] for line in steps)[len(steps) // 2]
    return losses, {line["step"]: line["top1"] for line in lines if line["kind"] == "eval"}, seconds


def running(losses):
    """Means over a window that ends with each step."""
    return [sum(losses[max(0, i + 1 - WINDOW) : i + 1]) / min(WINDOW, i + 1) for i in range(len(losses))]


def last_tenth(losses):
    count = max(1, len(losses) // 10)
    return sum(losses[-count:]) / count


def verdict(runs):
    """(sentences, whether the devices agree)."""
    (losses, accuracies, _), (others, other_accuracies, _) = runs
    if len(losses) != len(others) or not all(map(math.isfinite, losses + others)):
        return ["One of the trainings ended early or met a loss that is not finite."], False
    one, two = last_tenth(losses), last_tenth(others)
    allowed = LOSS_SHARE * one + LOSS
    agree = abs(two - one) <= allowed
    apart, step = max((abs(a - b), i + 1) for i, (a, b) in enumerate(zip(running(losses), running(others))))
    told = [
        f"Mean loss of the last tenth of the steps: {one:.4f} and {two:.4f}, {abs(two - one):.4f} apart; allowed are "
        f"{100 * LOSS_SHARE:.0f} % and {LOSS}: {allowed:.4f}.",
        f"Largest difference of the running means over {WINDOW} steps: {apart:.4f}, at step {step}.",
    ]
    if accuracies and other_accuracies:
        one, two = (points[max(points)] for points in (accuracies, other_accuracies))
        # A thousandth of a point is rounding of these very numbers.
        agree &= abs(two - one) <= ACCURACY + 1e-5
        told.insert(1, f"Final validation accuracy: {100 * one:.2f} % and {100 * two:.2f} %, "
                       f"{100 * abs(two - one):.2f} points apart; allowed are {100 * ACCURACY:.1f}.")
    told.append("The devices agree." if agree else "**The devices disagree.**")
    return told, agree


def table(devices, runs):
    """A dozen steps: running mean of the loss, and validation accuracy where there is one."""
    steps = sorted(runs[0][1]) or [len(runs[0][0])]
    means = [running(losses) for losses, _, _ in runs]
    lines = [
        "| step | " + " | ".join(f"loss, {device}" for device in devices) + " | "
        + " | ".join(f"validation, {device}" for device in devices) + " |",
        "|" + "---:|" * 5,
    ]
    for step in steps:
        losses = [f"{mean[step - 1]:.4f}" if step <= len(mean) else "" for mean in means]
        shares = [f"{100 * run[1][step]:.2f} %" if step in run[1] else "" for run in runs]
        lines.append(f"| {step} | " + " | ".join(losses + shares) + " |")
    return "\n".join(lines)


def plot(devices, runs):
    """The running means as SVG."""
    means = [running(losses) for losses, _, _ in runs]
    finite = [value for mean in means for value in mean if math.isfinite(value)] or [1.0]
    low, high, count = min(finite), max(finite), max(map(len, means))
    x = lambda i: 40 + 540 * i / max(1, count - 1)  # noqa: E731
    y = lambda value: 280 - 260 * (value - low) / (high - low or 1)  # noqa: E731
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 320" font-family="sans-serif" font-size="12">',
             '<rect width="600" height="320" fill="white"/>',
             f'<text x="4" y="24">{high:.2f}</text><text x="4" y="284">{low:.2f}</text>',
             f'<text x="40" y="310">loss, mean over {WINDOW} of {count} steps</text>']
    for i, (device, mean) in enumerate(zip(devices, means)):
        points = " ".join(f"{x(j):.1f},{y(value):.1f}" for j, value in enumerate(mean) if math.isfinite(value))
        parts.append(f'<polyline fill="none" stroke="{COLOURS[i]}" stroke-width="1.2" points="{points}"/>')
        parts.append(f'<text x="480" y="{30 + 18 * i}" fill="{COLOURS[i]}">{device}</text>')
    return "\n".join([*parts, "</svg>", ""])


def devices_of(text):
    devices = text.split(",")
    if len(devices) != 2:
        raise argparse.ArgumentTypeError("name two devices, such as cpu,cuda")
    return devices


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="recipe, or folder of images")
    parser.add_argument("--devices", type=devices_of, default=["cpu", "cuda"], help="cpu,cuda unless told otherwise")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="as of trencadis train")
    parser.add_argument("--binary", type=pathlib.Path, default=pathlib.Path("target/release/trencadis"))
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE.md", help="Markdown page; the plot goes beside it")
    args = parser.parse_args()
    args.binary = args.binary.absolute()
    runs = []
    # The second first: where there is no such device, that is told at once.
    for device in reversed(args.devices):
        with tempfile.TemporaryDirectory() as folder:
            try:
                runs.insert(0, train(args, device, pathlib.Path(folder)))
            except subprocess.CalledProcessError as reason:
                sys.exit(f"compare_devices: the training on {device} failed with status {reason.returncode}")
            except OSError as reason:
                sys.exit(f"compare_devices: {reason}")
    told, agree = verdict(runs)
    described = subprocess.run([args.binary, "inspect", "device"], capture_output=True, text=True).stdout.strip()
    sets = "".join(f" --set {setting}" for setting in args.sets)
    one, two = args.devices
    page = (
        f"# {pathlib.Path(args.what).name} on {one} and on {two}\n\n"
        f"`tools/compare_devices.py {pathlib.Path(args.what).name} --devices {one},{two} --steps {args.steps} --seed "
        f"{args.seed}{sets}`; losses are running means over {WINDOW} steps; median seconds a step: "
        f"{runs[0][2]:.4f} and {runs[1][2]:.4f}.\n\n{table(args.devices, runs)}\n\n" + "\n".join(told) + "\n"
    )
    if described:
        page += f"\n```\n{described}\n```\n"
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        picture = args.write.with_suffix(".svg")
        picture.write_text(plot(args.devices, runs))
        page += f"\n![losses]({picture.name})\n"
        args.write.write_text(page)
    print(page)
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
