"""Pictures of a latency benchmark: `python -m benchmarks.latency_plot RESULT.json PICTURE.png`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.latency_rows import CPU, OFFLINE, PARTS, RELEASED, Document

COLOURS = {CPU: "C0", RELEASED: "C3", OFFLINE: "C1"}


def plot(document: Document, path: Path) -> None:
    """Draw frame time over audio length, the spread of our hops, and where a frame's time goes, a row a preset.

    Raises OSError.
    """
    from matplotlib.figure import Figure

    rows = document["rows"]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    figure = Figure(figsize=(15, 4.2 * len(presets)), layout="constrained")
    hardware = document["hardware"]
    figure.suptitle(f"{hardware['cpu']}, {hardware['cores']} cores", fontsize=10)
    for (over, spread, parts), preset in zip(
        figure.subplots(len(presets), 3, squeeze=False), presets, strict=True
    ):
        own = [row for row in rows if row["preset"] == preset]
        _over_length(over, own, 1e3 / document["settings"][preset]["fps"])
        over.set_title(f"{preset}: a frame, whole", fontsize=9)
        _histogram(spread, [h for h in document["histograms"] if h["preset"] == preset])
        _breakdown(parts, own)
    figure.savefig(path, dpi=100)


def _over_length(axes: Any, rows: list[dict[str, Any]], frame_ms: float) -> None:
    totals = [row for row in rows if row["stage"] == "total" and not row["variant"]]
    for number, system in enumerate(dict.fromkeys(row["system"] for row in totals)):
        found = [row for row in totals if row["system"] == system]
        colour = COLOURS.get(system, f"C{4 + number}")
        lengths = [row["audio_s"] for row in found]
        axes.plot(lengths, [row["p50_ms"] for row in found], "-", color=colour, label=f"{system} p50")
        axes.plot(lengths, [row["p99_ms"] for row in found], ":", color=colour, label="p99")
        for row in found:
            face = "none" if row["extrapolated"] else colour
            axes.plot(row["audio_s"], row["p50_ms"], "o", color=colour, markerfacecolor=face, markersize=5)
    axes.axhline(frame_ms, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="audio, s (hollow: extrapolated)",
        ylabel="ms a frame (dashed: its time)",
    )
    lengths = sorted({row["audio_s"] for row in totals})
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths], fontsize=7)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=7, loc="center right")


def _histogram(axes: Any, found: list[dict[str, Any]]) -> None:
    for histogram in found:
        edges, counts = histogram["edges_ms"], histogram["counts"]
        axes.stairs(counts, edges, fill=True, alpha=0.6, label=f"{histogram['system']}, {sum(counts)} hops")
    axes.set(yscale="log", xlabel="ms a hop", ylabel="hops")
    axes.set_title("the spread of our hops", fontsize=9)
    if found:
        axes.legend(fontsize=7)


def _breakdown(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Ours, and the released streaming path at its slowest measured frame."""
    timed = [r for r in rows if r["system"] == RELEASED and not r["extrapolated"] and not r["variant"]]
    last = max((row["audio_s"] for row in timed), default=0.0)
    bars = {
        "ours": {r["stage"]: r["p50_ms"] for r in rows if r["audio_s"] == 0.0 and _ours(r)},
        f"{RELEASED},\nlast of {last:g} s": {r["stage"]: r["max_ms"] for r in timed if r["audio_s"] == last},
    }
    names = []
    for place, (name, stages) in enumerate(bars.items()):
        whole, left = sum(stages.get(part, 0.0) for part in PARTS), 0.0
        names.append(f"{name}\n{whole:.3g} ms")
        for number, part in enumerate(PARTS):
            share = stages.get(part, 0.0) / whole if whole else 0.0
            axes.barh(place, share, left=left, color=f"C{number}", label=None if place else part)
            left += share
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.set(xlabel="share of a frame's time", ylim=(-0.6, len(bars) + 0.2))
    axes.set_title("where a frame's time goes", fontsize=9)
    axes.legend(fontsize=7, loc="upper center", ncols=2)


def _ours(row: dict[str, Any]) -> bool:
    return not row["variant"] and not str(row["system"]).startswith("released")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_plot", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    plot(json.loads(options.result.read_text(encoding="utf-8")), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
