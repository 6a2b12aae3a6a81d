"""Curves of a training run: `python -m streamtalk_training.curves RUN/stage2`.

One panel a value that the run logged, over steps; smoothed where there are many points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SMOOTHING = 9  # points of the running mean


def logged(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by name from the run's log. Raises FileNotFoundError where there is none."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        step = row.pop("step")
        row.pop("elapsed_s")
        for name, value in row.items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return found


def plot(folder: Path) -> Path:
    """Write `curves.png` beside the log and return its path."""
    from matplotlib.figure import Figure

    curves = logged(folder)
    rows = -(-len(curves) // 4)
    figure = Figure(figsize=(14, 2.6 * rows), layout="constrained")
    panels = np.ravel(figure.subplots(rows, 4, squeeze=False))
    for panel, (name, (steps, values)) in zip(panels, curves.items(), strict=False):
        panel.plot(steps, values, color="0.8", linewidth=0.8)
        if len(values) > 2 * SMOOTHING:
            mean = np.convolve(values, np.full(SMOOTHING, 1 / SMOOTHING), "valid")
            panel.plot(steps[SMOOTHING // 2 : SMOOTHING // 2 + len(mean)], mean, color="C0")
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.curves", description=__doc__)
    parser.add_argument("run", type=Path, help="a stage's folder, with its log.jsonl")
    print(plot(parser.parse_args(arguments).run))


if __name__ == "__main__":
    main()
