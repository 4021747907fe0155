#!/usr/bin/env python3
"""Two questions on a folder of photographs (made for Caltech-101), answered by training small NaViTs.

1. Native aspect ratio against squares: the same model, the same number of tokens per image.
2. Extrapolation of position embeddings: trained at sampled resolutions, evaluated in and outside their range.

Writes a Markdown page with both tables. Needs the release binary (cargo build --release) and the standard library.
"""

import argparse
import json
import os
import pathlib
import subprocess
import time

from claims.runs import cpu_name, lines_of, recipe_of, table

POSITIONS = {
    "factorized absolute (+)": ["coordinate='absolute'", "combination='sum'"],
    "factorized fractional (+)": ["coordinate='fractional'", "combination='sum'"],
    "learned 2-D absolute": ["coordinate='absolute'", "combination='joint'"],
    "Fourier fractional": ["basis='fourier'", "coordinate='fractional'"],
}
FIRST = next(iter(POSITIONS))


def wanted(args, sets):
    """What tells a run of these arguments from others: keys of its recipe.toml, as (section, key): value."""
    data = str(pathlib.Path(args.data).absolute())  # As runs store it; a final slash does not count.
    values = {("data", "path"): data, ("train", "steps"): args.steps, ("train", "seed"): args.seed}
    for assignment in sets:
        key, value = assignment.split("=", 1)
        section, _, key = key.rpartition(".")
        values[section, key] = value.strip("'")
    return values


def value_of(recipe, section, key):
    for name in section.split("."):
        recipe = recipe.get(name, {})
    value = recipe.get(key)
    return str(pathlib.Path(value)) if (section, key) == ("data", "path") and value else value


def steps_done(run):
    """The step of the last line of a run's metrics; 0 where there is none."""
    lines = lines_of(run)
    return lines[-1].get("step", 0) if lines else 0


def train(args, name, sets):
    """The folder of a finished run with these settings: one that is there, one that is resumed, or a new one."""
    out = args.runs / name
    values = wanted(args, sets)
    for run in sorted(out.glob("run-*"), reverse=True):
        recipe = recipe_of(run)
        if any(value_of(recipe, *key) != value for key, value in values.items()):
            continue
        if steps_done(run) >= args.steps:
            return run
        if (run / "last.safetensors").exists():
            subprocess.run([args.binary, "train", "--resume", str(run)], check=True)
            return run
    before = set(out.glob("run-*"))
    command = [args.binary, "train", args.recipe, "--data", args.data, "--name", "run", "--out", str(out)]
    for assignment in [f"train.steps={args.steps}", f"train.seed={args.seed}", *sets]:
        command += ["--set", assignment]
    subprocess.run(command, check=True)
    return max(set(out.glob("run-*")) - before)


def evaluate(args, run, resolutions):
    """Top-1 accuracy and tokens per image of the last checkpoint, by resolution."""
    command = [args.binary, "eval", str(run / "last.safetensors"), "--json"]
    command += ["--resolution", ",".join(str(r) for r in resolutions)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line["resolution"]: line for line in map(json.loads, lines)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder or tar shards of the images")
    parser.add_argument("--binary", default="target/release/trencadis")
    parser.add_argument("--recipe", default="photos")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolutions", default="48,64,96,128,160,192,224,288")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/caltech101"))
    parser.add_argument("--write", type=pathlib.Path, help="Markdown file to write; printed otherwise")
    args = parser.parse_args()
    resolutions = [int(r) for r in args.resolutions.split(",")]
    percent = lambda line: f"{100 * line['top1']:.1f}"
    begun = time.time()

    sets = {FIRST: [f"model.position.{s}" for s in POSITIONS[FIRST]]}
    native = evaluate(args, train(args, "native", sets[FIRST]), resolutions)
    square = evaluate(args, train(args, "square", [*sets[FIRST], "resolution.aspect='square'"]), resolutions)
    shapes = table(
        ["resolution", "tokens an image, native", "native aspect ratio", "tokens an image, square", "square"],
        [
            [
                str(r),
                f"{native[r]['tokens_per_image']:.1f}",
                percent(native[r]),
                f"{square[r]['tokens_per_image']:.1f}",
                percent(square[r]),
            ]
            for r in resolutions
        ],
    )
    rows = [[FIRST, *(percent(native[r]) for r in resolutions)]]
    for name in list(POSITIONS)[1:]:
        folder = "position-" + "-".join(c for c in name.lower().split() if c.isalnum())
        run = train(args, folder, [f"model.position.{s}" for s in POSITIONS[name]])
        done = evaluate(args, run, resolutions)
        rows.append([name, *(percent(done[r]) for r in resolutions)])
    positions = table(["position embedding", *map(str, resolutions)], rows)

    bounds = recipe_of(args.runs / "native" / "run-1").get("resolution", {})
    low, high = bounds.get("min"), bounds.get("max")
    page = f"""# Caltech-101 from scratch

Recipe `{args.recipe}`, {args.steps} steps, seed {args.seed}, one run each; top-1 accuracy in % of the last
checkpoint on the validation images. Resolution R is an area of R² pixels; training sampled
it from {low} to {high}. {cpu_name()}, {os.cpu_count()} threads.

Command: `tools/caltech101.py DATA --steps {args.steps} --seed {args.seed}`

## Native aspect ratio against squares, at equal tokens

{shapes}

## Position embeddings in and outside the training range

{positions}
"""
    if args.write:
        args.write.write_text(page)
        print(f"{args.write} written after {(time.time() - begun) / 60:.0f} minutes")
    else:
        print(page)


if __name__ == "__main__":
    main()
