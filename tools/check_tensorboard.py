"""Reads the TensorBoard events of a run with TensorBoard's own reader and compares them with metrics.jsonl.

    python tools/check_tensorboard.py runs/digits-1

Needs the package `tensorboard`. Every scalar must agree with the metric line of its step to f32
precision; after a resumed run no step may occur twice.
"""

import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def main():
    run = Path(sys.argv[1])
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        sys.exit(f"{run}: TensorBoard finds no scalars")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_kind = {}
    for line in lines:
        by_kind.setdefault(line["kind"], {})[line["step"]] = line

    compared = 0
    for tag in tags:
        scalars = events.Scalars(tag)
        steps = [scalar.step for scalar in scalars]
        if steps != sorted(set(steps)):
            sys.exit(f"{run}: the steps of {tag} repeat or fall: {steps}")
        kind, field = tag.split("/", 1)
        for scalar in scalars:
            line = by_kind.get(kind, {}).get(scalar.step, {})
            if field in line:
                expected = math.nan if line[field] is None else f32(line[field])
                same = expected == scalar.value or (math.isnan(expected) and not math.isfinite(scalar.value))
                if not same:
                    sys.exit(f"{run}: {tag} at step {scalar.step} is {scalar.value}, metrics.jsonl has {expected}")
                compared += 1
    if not compared:
        sys.exit(f"{run}: no scalar has a counterpart in metrics.jsonl")
    print(f"{run}: {len(tags)} tags, {compared} scalars agree with metrics.jsonl")


if __name__ == "__main__":
    main()
