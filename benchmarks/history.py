"""The guard's ratios over time: `python -m benchmarks.history PICTURE.png`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.guard import HISTORY, LEAST_SPEEDUP, MOST_RUNTIME


def plot(history: Path, picture: Path) -> None:
    """Draw both ratios, a colour a processor. Raises OSError, and ValueError where a line is no record."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines() if line.strip()]
    figure = Figure(figsize=(10, 6), layout="constrained")
    bounds = {"speedup": LEAST_SPEEDUP, "runtime": MOST_RUNTIME}
    titles = {"speedup": "times faster than the released path", "runtime": "a stream's hop over its graph"}
    for axes, (name, bound) in zip(figure.subplots(2, 1, sharex=True), bounds.items(), strict=True):
        for cpu in dict.fromkeys(record["cpu"] for record in records):
            found = [(i, record[name]) for i, record in enumerate(records) if record["cpu"] == cpu]
            axes.plot(*zip(*found, strict=True), "o", label=cpu)
        axes.axhline(bound, color="grey", linestyle="--", linewidth=0.8)
        axes.set_ylabel(titles[name])
        axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(records)), [record["commit"] for record in records], rotation=60, fontsize=7)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--history", type=Path, default=HISTORY, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        plot(options.history, options.picture)
    except (OSError, ValueError, KeyError) as error:
        print(f"history: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
