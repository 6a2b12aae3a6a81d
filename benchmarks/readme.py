"""Figures of README.md and docs/gpu.md from the committed results: `python -m benchmarks.readme` rewrites the text
between their markers; `--check` exits with 1 where that would change it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_page
from benchmarks.latency_rows import CPU, OFFLINE, ONE_THREAD, RELEASED, Document
from benchmarks.latency_targets import Target
from benchmarks.latency_targets import table as targets_table

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULT = HERE / "results" / "latency.json"
GPU_PAGE = HERE.parent / "docs" / "gpu.md"
GPU_RESULTS = tuple(HERE / "results" / f"gpu-h200-{preset}.json" for preset in ("vocaset", "biwi"))
SHOWN_S = (3.0, 9.0, 27.0, 60.0, 600.0, 3600.0)
SYSTEMS = (CPU, RELEASED, OFFLINE)


def section(document: Document) -> str:
    """Markdown of a result of `benchmarks.latency`."""
    hardware, versions = document["hardware"], document["versions"]
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, onnxruntime {versions['onnxruntime']}, PyTorch "
        f"{versions['torch'].partition('+')[0]}. Milliseconds a frame,",
        "audio encoder included; `*` marks what was extrapolated.",
    ]
    for preset, settings in document["settings"].items():
        rows = [row for row in document["rows"] if row["preset"] == preset]
        lines += ["", f"**{preset}** ({_settings(settings)})", "", *_lengths(rows)]
        lines[-1] += _hops(rows)
    lines += ["", targets_table([Target.of(fields) for fields in document["targets"]])]
    return "\n".join(lines) + "\n"


def _settings(settings: dict[str, Any]) -> str:
    return (
        f"{settings['fps']} fps, hop {settings['hop']}, {settings['context_s']:g} s of context, history "
        f"{settings['history']}, decode window {settings['decode_window']}, {settings['steps']} steps, delay "
        f"{settings['delay_s']:.3g} s"
    )


def _lengths(rows: list[dict[str, Any]]) -> list[str]:
    totals = [row for row in rows if row["stage"] == "total"]
    ours = {row["audio_s"]: row for row in totals if (row["system"], row["variant"]) == (CPU, "")}
    lines = [
        "| audio | ours: p50 | p99 | max | real-time factor | released, streaming: p50 | max | released, offline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for audio_s, own in ours.items():
        if audio_s not in SHOWN_S:
            continue
        others = {row["system"]: row for row in totals if row["audio_s"] == audio_s and not row["variant"]}
        streaming, offline = others[RELEASED], others[OFFLINE]
        cells = [
            _length(audio_s),
            *(_ms(own, key) for key in ("p50_ms", "p99_ms", "max_ms")),
            f"{own['rtf']:.2g}",
            *(_ms(streaming, key) for key in ("p50_ms", "max_ms")),
            _ms(offline, "p50_ms"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    memory = {row["system"]: row["peak_rss_mb"] for row in totals if row["peak_rss_mb"] is not None}
    said = ", ".join(f"{system} {memory[system]:.0f}" for system in SYSTEMS if system in memory)
    one = [row for row in totals if row["variant"] == ONE_THREAD]
    lines += [
        "",
        f"Peak memory in MB: {said}."
        + "".join(f" On one thread: p99 {row['p99_ms']:.1f} ms." for row in one),
    ]
    return lines


def _hops(rows: list[dict[str, Any]]) -> str:
    """A sentence for the hop of the longest length that was measured whole, and for each other hop."""
    hops = [row for row in rows if row["stage"] == "hop" and row["audio_s"] and row["system"] == CPU]
    own = [row for row in hops if not row["variant"] and not row["extrapolated"]][-1:]
    others = [row for row in hops if str(row["variant"]).startswith("hop-")]
    frames = {
        (row["variant"], row["audio_s"]): row
        for row in rows
        if row["stage"] == "total" and row["system"] == CPU
    }
    return "".join(
        f" {row['variant'] or 'A hop'}: p50 {row['p50_ms']:.3g} ms, p99 {row['p99_ms']:.3g} ms, real-time factor "
        f"{frames[row['variant'], row['audio_s']]['rtf']:.2g}, delay {row['delay_s']:.3g} s."
        for row in (*own, *others)
    )


def _length(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 60 else f"{seconds / 60:g} min"


def _ms(row: dict[str, Any], key: str) -> str:
    figure = f"{row[key]:.3g}" if row[key] < 1000 else f"{row[key]:.0f}"
    return figure + "*" if row["extrapolated"] else figure


def written(page: str, name: str, text: str) -> str:
    """`page` with `text` between its markers `name`. Raises ValueError where they are missing."""
    between = re.compile(rf"(<!-- {name} -->\n).*(<!-- end of {name} -->)", re.DOTALL)
    made, count = between.subn(lambda match: match[1] + text + match[2], page)
    if count != 1:
        raise ValueError(f"the page needs one <!-- {name} --> and one <!-- end of {name} -->")
    return made


def pages() -> list[tuple[Path, str, str]]:
    """What is written: the page, the name of its markers, the text between them."""
    gpu = gpu_page.section([json.loads(path.read_text(encoding="utf-8")) for path in GPU_RESULTS])
    latency = section(json.loads(RESULT.read_text(encoding="utf-8")))
    return [(README, "latency", latency), (GPU_PAGE, "measured", gpu)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    changed = False
    for path, name, text in pages():
        before = path.read_text(encoding="utf-8")
        after = written(before, name, text)
        changed |= after != before
        if not options.check:
            path.write_text(after, encoding="utf-8")
    return int(changed and options.check)


if __name__ == "__main__":
    sys.exit(main())
