"""Runs of the program that are made once: trained or taken up again where they were left, then evaluated."""

import json
import os
import pathlib
import platform
import re
import subprocess
import tomllib


def recipe_of(run):
    """The resolved recipe of a run, or nothing where it has none."""
    try:
        with open(run / "recipe.toml", "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        return {}


def lines_of(run):
    """What a run has written to metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # The line being written when the run was ended.
            continue
    return found


def train(binary, out, name, arguments):
    """The folder of the finished run `name` of `train` with these arguments: one that is there, one that is resumed, or a new one."""
    run, asked = out / f"{name}-1", out / f"{name}.asked.json"
    if run.exists() and (not asked.exists() or json.loads(asked.read_text()) != arguments):
        raise SystemExit(f"{run} was made with other settings; delete it or choose another --runs")
    if (run / "cost.json").exists():
        return run
    if (run / "last.safetensors").exists():
        command = [binary, "train", "--resume", str(run)]
    else:
        if run.exists():
            raise SystemExit(f"{run} has no checkpoint; delete it")
        command = [binary, "train", *arguments, "--name", name, "--out", str(out)]
    out.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(arguments))
    resumed = run.exists()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    # What was used before a run was taken up again is not known.
    minutes = None if resumed else (usage.ru_utime + usage.ru_stime) / 60
    (run / "cost.json").write_text(json.dumps({"minutes": minutes}))
    return run


def planned_mib(binary, run):
    """The memory that the program plans for a run, decoded images that it keeps not counted."""
    arguments = json.loads((run.parent / f"{run.name.removesuffix('-1')}.asked.json").read_text())
    command = [binary, "train", "--dry-run", *arguments]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    amount, unit = re.search(r"^peak memory +([0-9.]+) ([MG]iB)", text, re.MULTILINE).groups()
    return float(amount) * {"MiB": 1, "GiB": 1024}[unit]


def cost_of(binary, run):
    """Model TFLOPs of a run's steps, minutes of a core's time (none of a run that was taken up again) and planned memory
    in MiB."""
    lines = [line for line in lines_of(run) if "flop" in line]
    steps = recipe_of(run)["train"]["steps"]
    mean = lambda key: sum(line[key] for line in lines) / max(len(lines), 1)
    minutes = json.loads((run / "cost.json").read_text())["minutes"]
    return {"tflop": mean("flop") * steps / 1e12, "minutes": minutes, "mib": planned_mib(binary, run)}


def evaluate(binary, run, resolutions, *more):
    """What `eval --json` says of the last checkpoint, by resolution; it is asked once."""
    kept = run / f"eval-{'-'.join(map(str, resolutions))}.json"
    if not kept.exists():
        command = [binary, "eval", str(run / "last.safetensors"), "--json", *more]
        command += ["--resolution", ",".join(map(str, resolutions))]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        kept.write_text(text)
    return {line["resolution"]: line for line in map(json.loads, kept.read_text().splitlines())}


def cpu_name():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] * len(header)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
