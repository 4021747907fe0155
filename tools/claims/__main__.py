#!/usr/bin/env python3
"""The papers' claims at the scale at hand: trains the arms of each question with several seeds and writes a page with the
accuracies, their spread, and what they cost. Runs that are there are not made again, those that were cut off go on.

    python tools/claims --photos caltech101 --cifar10 cifar10 --write benches/results

Needs the release binary (cargo build --release) and the standard library."""

import argparse
import os
import pathlib
import shlex
import statistics

from questions import QUESTIONS
from runs import cost_of, cpu_name, evaluate, table, train


def folder(name):
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def steps_of(arm, steps):
    return max(1, round(arm.share * steps))


def run_of(args, question, arm, seed):
    """The finished run of an arm, after those that it begins with or learns from."""
    steps = steps_of(arm, args.steps or question.steps)
    sets = [f"train.steps={steps}", f"train.seed={seed}", "train.eval_every=0", *args.sets, *arm.sets]
    if not any(s.startswith("train.warmup=") for s in [*args.sets, *arm.sets]):
        sets.append(f"train.warmup={max(1, steps // 20)}")
    arguments = [question.recipe, "--data", str(args.data[question.data])]
    for other, what in [(arm.init, "init"), (arm.teacher, "teacher")]:
        if not other:
            continue
        before = next(candidate for candidate in question.arms if candidate.name == other)
        checkpoint = run_of(args, question, before, seed) / "last.safetensors"
        if what == "init":
            arguments += ["--init", str(checkpoint)]
        else:
            sets.append(f"distill.teacher={checkpoint}")
    for assignment in sets:
        arguments += ["--set", assignment]
    return train(args.binary, args.runs / question.name, f"{folder(arm.name)}-seed{seed}", arguments)


def mean(values, digits):
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def row(args, question, arm):
    runs = [run_of(args, question, arm, seed) for seed in args.seeds]
    found = [evaluate(args.binary, run, question.resolutions) for run in runs]
    cells = [mean([100 * lines[r]["top1"] for lines in found], 1) for r in question.resolutions]
    costs = [cost_of(args.binary, run) for run in runs]
    if arm.init:
        before = next(candidate for candidate in question.arms if candidate.name == arm.init)
        for cost, seed in zip(costs, args.seeds):
            first = cost_of(args.binary, run_of(args, question, before, seed))
            known = cost["minutes"] is not None and first["minutes"] is not None
            cost["minutes"] = cost["minutes"] + first["minutes"] if known else None
            cost["tflop"] += first["tflop"]
    def of(key, digits):
        known = [cost[key] for cost in costs if cost[key] is not None]
        return f"{statistics.mean(known):.{digits}f}" if known else "–"

    return [arm.name, *cells, of("tflop", 1), of("minutes", 1), of("mib", 0)]


def page(args, question):
    rows = [row(args, question, arm) for arm in question.arms]
    header = ["", *(f"top-1 % at {r}" for r in question.resolutions), "model TFLOP", "core minutes", "MiB"]
    steps, seeds = args.steps or question.steps, args.seeds
    settings = [[arm.name, f"`{' '.join(arm.sets)}`" if arm.sets else ""] for arm in question.arms]
    told = "mean and standard deviation of seeds" if len(seeds) > 1 else "seed"
    also = "".join(f" --set {shlex.quote(assignment)}" for assignment in args.sets)
    other = "".join(f"; {arm.name}: {steps_of(arm, steps)}" for arm in question.arms if arm.share != 1.0)
    return f"""# {question.title}

{question.claim}

Recipe `{question.recipe}`, {steps} steps{other}; {told} {", ".join(map(str, seeds))}; accuracy of the last checkpoint on the
validation images of `{args.data[question.data].name}`. Minutes of a core's time are those of the whole process, data and the
last evaluation included; they and model FLOPs are without those of a teacher's training. Memory is what `--dry-run` plans for the
row's own stage, without decoded images that are kept. {cpu_name()}, {os.cpu_count()} threads.

Command: `python tools/claims --only {question.name} --{question.data} DATA --steps {steps} --seeds {",".join(map(str, seeds))}{also}`

{table(header, rows)}

{table(["", "settings over the recipe"], settings)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=pathlib.Path, help="photographs in classes, such as Caltech-101")
    parser.add_argument("--cifar10", type=pathlib.Path, help="CIFAR-10 in its binary files")
    parser.add_argument("--only", help=f"some of {', '.join(question.name for question in QUESTIONS)}, with commas between")
    parser.add_argument("--steps", type=int, help="steps of an arm, those of each question where not given")
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--set", dest="sets", action="append", default=[], help="key=value under those of all arms")
    parser.add_argument("--binary", default="target/release/trencadis")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/claims"))
    parser.add_argument("--write", type=pathlib.Path, help="folder for a page claims-NAME.md a question; printed otherwise")
    args = parser.parse_args()
    args.data = {"photos": args.photos, "cifar10": args.cifar10}
    if any(assignment.split("=")[0] in ("train.steps", "train.seed") for assignment in args.sets):
        parser.error("give --steps and --seeds instead of --set train.steps and train.seed")
    asked = args.only.split(",") if args.only else [question.name for question in QUESTIONS]
    unknown = set(asked) - {question.name for question in QUESTIONS}
    if unknown:
        parser.error(f"no question is called {', '.join(sorted(unknown))}")
    for question in QUESTIONS:
        if question.name not in asked:
            continue
        if args.data[question.data] is None:
            print(f"{question.name}: skipped, give --{question.data}")
            continue
        text = page(args, question)
        if args.write:
            (args.write / f"claims-{question.name}.md").write_text(text)
            print(f"{args.write}/claims-{question.name}.md is written")
        else:
            print(text)


if __name__ == "__main__":
    main()
