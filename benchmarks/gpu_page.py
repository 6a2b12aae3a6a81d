"""Results of `benchmarks.gpu` as markdown for docs/gpu.md.

It reads rows of frames and audio encoders as well, from before both were one launch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.latency_rows import BATCH, RELEASED, Document, markdown
from benchmarks.latency_targets import Target
from benchmarks.latency_targets import table as targets_table

FIRST, LAST = "frame-0", "frame-269"
"""Frames of the released streaming path that are shown."""
WINDOWS = re.compile(r"(?:windows|batch)-(\d+)")
"""Runs of an audio encoder: windows that each of them encoded."""
MANY = 100
"""Measurements below which a 99th percentile is the slowest one."""


class Preset:
    """Rows of one preset on one of our backends, beside the released algorithm's."""

    def __init__(self, name: str, system: str, document: Document) -> None:
        self.name, self.system = name, system
        rows = [row for row in document["rows"] if row["preset"] == name]
        own = [r for r in rows if r["system"] == system]
        # Of the released algorithm's the first from here on: those that took turns with this backend.
        beside = [r for r in rows[rows.index(own[0]) :] if r["system"] == RELEASED]
        ordered = [*reversed(beside), *own]
        self._rows = {(r["system"], r["variant"], r["stage"], r["audio_s"] > 0): r for r in ordered}
        self.batches = sorted({int(found[1]) for r in own if (found := BATCH.match(r["variant"]))})
        runs = (WINDOWS.fullmatch(r["variant"]) for r in own if r["stage"] == "audio_encoder")
        self.encoders = sorted({int(run[1]): run[0] for run in runs if run}.items())
        self._parity = {p["model"]: p for p in document["parity"] if p["backend"] == system}
        self._launches = {
            item["of"]: item["calls"]
            for item in document["launches"]
            if (item["model"], item["backend"]) == (name, system)
        }

    def row(self, variant: str, stage: str, system: str = "", long: bool = False) -> dict[str, Any] | None:
        """One row, None where it was not measured."""
        return self._rows.get((system or self.system, variant, stage, long))

    def one_stream(self) -> Iterator[tuple[str, str]]:
        """Labels and figures of a single stream; empty where one was not measured."""
        yield "a hop", _ms(self.row("", "hop"))
        yield "a frame's share of it", _ms(self.row("", "total"))
        yield "a hop that stays on the device", _ms(self.row("resident", "hop"))
        yield "a hop whose head takes its steps one by one", _ms(self.row("no-fold", "hop"))
        yield "a frame", _ms(self.row("", "frame"))
        yield "a frame that stays on the device", _ms(self.row("resident", "frame"))
        yield "a run of the audio encoder", _ms(self.row("", "audio_encoder"))
        yield "a hop's first frame, encoder and all", _ms(self.row("hop-start", "frame"))
        whole = self.row("", "total", long=True)
        if whole:
            minutes = f"{whole['audio_s'] / 60:g} min of audio: {whole['late']} of {whole['frames']} late"
            yield "a frame of a stream, its hop's share", f"{_ms(whole)}; {minutes}"
        for variant, said in ((FIRST, "first frame"), (LAST, "frame 269")):
            yield f"eager PyTorch, {said}", _ms(self.row(variant, "frame", RELEASED))
        own, released = self.row("", "total") or self.row("", "frame"), self.row(FIRST, "frame", RELEASED)
        if own and released:
            yield "its first frame against ours", f"{released['p50_ms'] / own['p50_ms']:.1f} times"
        for of in ("a hop", "a frame"):
            calls = self._launches.get(of, {})
            launches = sum(n for name, n in calls.items() if name.startswith("cudaGraphLaunch"))
            copies = sum(n for name, n in calls.items() if name.startswith("on the device: Mem"))
            kernels = calls.get("on the device: kernels", 0)
            counts = f"{launches}; {copies}, {kernels}" if calls else ""
            yield f"{of}'s graph launches; copies and kernels on the device", counts
        parity = self._parity.get(f"{self.name}, batch 1")
        if parity:
            shares = [100 * parity[key] / parity[f"allowed_{key}"] for key in ("p99", "max")]
            yield "the probe's error, of what is allowed", " and ".join(f"{share:.0f} %" for share in shares)

    def many_streams(self) -> Iterator[list[str]]:
        """A table row for each number of rows or streams."""
        for batch in self.batches:
            variant = f"batch-{batch}"
            cells = [self.name, str(batch), *(_ms(self.row(variant, stage)) for stage in ("hop", "frame"))]
            for steps in ("step", "step-staggered"):
                row = self.row(f"{variant}-{steps}", "total")
                cells.append(f"{_ms(row)}, {row['late']} of {row['frames']} late" if row else "")
            yield cells

    def encoder(self) -> Iterator[list[str]]:
        """A table row for each number of windows that a run of the encoder encoded."""
        for windows, variant in self.encoders:
            yield [self.name, str(windows), _ms(self.row(variant, "audio_encoder"))]


def section(documents: Sequence[Document]) -> str:
    """Figures of the page, of one GPU."""
    presets = [
        Preset(name, system, document)
        for document in documents
        for name in document["settings"]
        for system in dict.fromkeys(row["system"] for row in document["rows"] if row["system"] != RELEASED)
    ]
    document = documents[0]
    versions = document["versions"]
    libraries = [
        f"{name} {versions[name]}" for name in ("onnxruntime-gpu", "tensorrt", "torch") if name in versions
    ]
    lines = [f"{document['gpu']}; {', '.join(libraries)}. Milliseconds, p50 (p99 of {MANY} or more).", ""]
    figures = [{label: figure for label, figure in preset.one_stream() if figure} for preset in presets]
    head = ["one stream", *(f"{preset.name}, `{preset.system}`" for preset in presets)]
    labels = dict.fromkeys(label for column in figures for label in column)
    lines.append(
        markdown(head, ([label, *(column.get(label, "") for column in figures)] for label in labels))
    )
    head = [
        "many streams",
        "rows",
        "a hop of all",
        "a frame of all",
        "a step",
        "a step, hops spread",
    ]
    lines += _table(head, [row for preset in presets for row in preset.many_streams()])
    head = ["the audio encoder", "windows a run", "a run"]
    lines += _table(head, [row for preset in presets for row in preset.encoder()])
    targets = [Target.of(fields) for document in documents for fields in document["targets"]]
    return "\n".join([*lines, targets_table(targets)]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table without its empty columns; nothing without rows."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [markdown([head[i] for i in kept], ([row[i] for i in kept] for row in rows))] if rows else []


def _ms(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['p50_ms']:.2f}" + (f" ({row['p99_ms']:.2f})" if row["frames"] >= MANY else "")
