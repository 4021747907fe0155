#!/usr/bin/env python3
"""Makes a Markdown page of tables that `cargo bench` wrote.

    python tools/bench_page.py --title "Training steps" target/criterion/step.csv > benches/results/gpu-step.md

What a file says of the machine stands above its table once. Rows whose `share` of the whole is below 1 % are left
out.
"""

import argparse
import csv
import pathlib
import sys

# Of the machine and not of what was measured.
MACHINE = ("device", "driver", "samples", "sets", "mma_tflop_per_s", "copy_gb_per_s")


def page_of(path):
    """The part of a page for one file; nothing where it is not there or has no rows."""
    if not path.exists():
        return ""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return ""
    rows_told = [row for row in rows if float(row.get("share") or 1) >= 0.01]
    columns = list(rows[0])
    same = [c for c in columns if c in MACHINE and len({row[c] for row in rows}) == 1]
    varying = [c for c in columns if c not in same]
    lines = [f"## {path.stem}", ""]
    told = [f"{c} {rows[0][c]}" for c in same if rows[0][c]]
    lines += [", ".join(told) + ".", ""] if told else []
    lines += ["| " + " | ".join(varying) + " |", "|" + "---|" * len(varying)]
    lines += ["| " + " | ".join(row[c] for c in varying) + " |" for row in rows_told]
    if len(rows_told) < len(rows):
        lines += ["", f"{len(rows) - len(rows_told)} rows below 1 % are left out."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=pathlib.Path, help="CSV files")
    parser.add_argument("--title", required=True)
    parser.add_argument("--machine", type=pathlib.Path, help="text that describes the machine")
    parser.add_argument("--command", help="what made the tables")
    args = parser.parse_args()
    parts = [part for part in map(page_of, args.tables) if part]
    if not parts:
        sys.exit("bench_page: nothing was measured")
    head = f"# {args.title}\n"
    if args.command:
        head += f"\n`{args.command}`\n"
    if args.machine:
        head += f"\n```\n{args.machine.read_text().strip()}\n```\n"
    print("\n".join([head, *parts]), end="")


if __name__ == "__main__":
    main()
