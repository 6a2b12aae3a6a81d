"""Latency on a GPU, beside the released algorithm in eager PyTorch on the same one: `python -m benchmarks.gpu`.

It measures every backend that loads here, at full size and several numbers of rows. Each reproduces its model's probe
in every row, now or when it was first loaded here. One stream takes turns with the released algorithm, which runs in
float32 with random weights of its own. Its audio encoder is left out, and ours is not. Its first frame is its best
case: each later one costs more.

A row `hop` is one launch, from audio and noise in host memory to vertices there, `total` a frame's share of it.
Variants: `resident` leaves the vertices on the device, `back-to-back` is the mean of launches that are queued together,
`no-fold` has the head's steps unrolled. `batch-N` is one launch of N rows. `batch-N-step` is a step of
`Talker.batch(N)`, with the host's work for every stream.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_runs import IN_FLIGHT, SEED, hops, opened, profiled, queued, steps
from benchmarks.latency_rows import GPU_SYSTEMS, RELEASED, Row, hardware, hop_rows, summary, table, versions
from benchmarks.latency_runs import hop_times
from benchmarks.latency_subject import CACHE, FAILURES, complain, exported, settings_of, speech
from benchmarks.latency_targets import Target
from benchmarks.latency_targets import table as targets_table
from benchmarks.released import Released, Seconds
from streamtalk import StreamTalkError, Talker
from streamtalk.backends.cuda.driver import open_driver
from streamtalk.backends.probe import measure, read_probe
from streamtalk.rows import Backend
from streamtalk_export.checkpoint import random_model
from streamtalk_export.config import load_config
from streamtalk_export.hubert import hubert_config
from streamtalk_export.sampler import sampler_table

SCHEMA = 1
SAMPLED = (0, 30, 60, 120, 269)
"""Frames of the released streaming path."""
ROUNDS, LEAST_FRAMES = 6, 24
MOST_PROBED = 32
STEP_S = 2.0
"""Audio of every stream of a batch."""
STEPS = re.compile(r"batch-(\d+)-step")
"""Variants that are steps of a batch."""
TARGETS = {
    "hop p50": 1.9,
    "hop p99": 2.7,
    "times faster than the released first frame": 15.0,
    "streams without a late step": 500.0,
}
"""For an NVIDIA H200 at VOCASET's size, hop 4, history and decode window 60, 2 s of context; times are in milliseconds.
A hop's are those of four frames of .3 ms (p99 .5) and an audio encoder's run of .7 ms.
"""


@dataclass
class Result:
    """Results of a run."""

    rows: list[Row] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    """Vertex errors of the probe against the float32 graphs on the CPU, and the allowed ones, in the vertices' unit."""
    launches: list[dict[str, Any]] = field(default_factory=list)
    """CUDA calls and device work of one hop."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that every figure of a preset depends on."""
    skipped: dict[str, str] = field(default_factory=dict)
    gpu: str = ""

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = list(targets(self.rows))
        return {
            "schema": SCHEMA,
            "gpu": self.gpu,
            "hardware": hardware(),
            "versions": versions(),
            "settings": self.settings,
            "skipped": self.skipped,
            "parity": self.parity,
            "launches": self.launches,
            "rows": [asdict(row) for row in self.rows],
            "targets": [{**asdict(target), "met": target.met} for target in found],
        }


class Eager:
    """The released algorithm on the GPU, with random weights and features."""

    def __init__(self, preset: str) -> None:
        config = load_config(preset)
        model = random_model(config, hubert_config(None), SEED).eval().cuda()
        generator = torch.Generator().manual_seed(SEED)

        def rows(count: int, width: int) -> torch.Tensor:
            return torch.randn(count, width, generator=generator).cuda()

        count, p = SAMPLED[-1] + 1, config.predictor
        table = sampler_table(config.schedule, config.steps, config.sampler)
        features, noise = rows(count, p.audio_encode_dim), rows(count, p.vq_dim)
        self._released = Released(model, table, features, noise, rows(count + 1, p.vq_dim))

    def frame(self, i: int) -> Seconds:
        """Seconds by stage of frame `i` of the streaming path."""
        return self._released.streaming_frame(i)[1]


def folder_of(preset: str, variant: str, options: Sequence[str], models: Path | None) -> Path | None:
    """An export of this variant from `models`, or None where that has none; without `models` it is exported."""
    if models is None:
        return exported(preset, CACHE.expanduser(), variant, options)
    folder = models / f"{preset}-{variant}"
    return folder if (folder / "manifest.json").exists() else None


def loaded(folder: Path, wanted: Sequence[str], label: str, result: Result) -> Iterator[Talker]:
    """The export on every GPU backend that works; reasons of the others go to `result`.

    Callers let go of one before they ask for the next, which takes as much memory again.
    """
    for name in wanted:
        talker: Talker | None = None
        try:
            talker = Talker.load(folder, name)
        except StreamTalkError as error:
            result.skipped[f"{name}, {label}"] = str(error).replace(str(folder), "this export")
        if talker is None:
            gc.collect()  # what failed may hold much of the GPU's memory, until its error is gone
            continue
        for candidate, reason in talker.choice.passed_over.items():  # preferred to the one taken
            result.skipped[f"{candidate}, {label}"] = reason.replace(str(folder), "this export")
        result.settings.setdefault(label.partition(",")[0], settings_of(talker.manifest))
        print(f"{label}, {talker.choice.backend.description}", file=sys.stderr, flush=True)
        yield talker
        del talker
        gc.collect()


@contextmanager
def noted(what: str, result: Result) -> Iterator[None]:
    """Go on after an error, such as rows that do not fit into memory; its message goes to `result`."""
    try:
        yield
    except (StreamTalkError, torch.OutOfMemoryError) as error:
        result.skipped[what] = str(error)


def parity(preset: str, folder: Path, talker: Talker, rows: int) -> dict[str, Any]:
    """Vertex errors of the probe, which loading made sure of already; of many rows the allowed ones alone."""
    backend: Backend = talker.choice.backend
    probe = read_probe(folder, talker.manifest)
    assert probe is not None
    allowed = probe.limits[backend.precision]
    found = {
        "model": f"{preset}, batch {rows}",
        "backend": backend.name,
        "precision": backend.precision,
        "first_hop_s": round(talker.choice.first_hop_s, 3),
        "allowed_p99": allowed.p99,
        "allowed_max": allowed.max,
    }
    if rows > MOST_PROBED:
        return found
    p99, worst = measure(backend, talker.manifest, probe, rows)
    return {**found, "p99": p99, "max": worst}


def one_stream(preset: str, talker: Talker, eager: Eager | None, frames: int, result: Result) -> None:
    """Hops in turns with the released algorithm's frames, hops whose vertices stay, hops that are queued."""
    m, backend = talker.manifest, talker.choice.backend
    count, warm_up = frames // m.hop, 2 + m.history // m.hop

    def add(variant: str, seconds: Any) -> None:
        result.rows += hop_rows(preset, backend.name, variant, 0.0, np.array(list(seconds)), m)

    theirs: dict[int, list[Seconds]] = {i: [] for i in SAMPLED if eager}
    with opened(talker, 1) as (rows, every):
        list(hops(rows, every, warm_up))
        for i in theirs:
            assert eager
            eager.frame(i)
        ours: list[float] = []
        for _ in range(ROUNDS):
            ours += hops(rows, every, max(count // ROUNDS, 1))
            for i, found in theirs.items():
                assert eager
                found.append(eager.frame(i))
        add("", ours)
        add("back-to-back", queued(rows, every, max(count // IN_FLIGHT, 5)))
    for i, found in theirs.items():
        for stage in found[0]:
            each = [row[stage] for row in found]
            result.rows.append(summary(preset, RELEASED, f"frame-{i}", 0.0, stage, each))
        whole = [sum(row.values()) for row in found]
        result.rows.append(summary(preset, RELEASED, f"frame-{i}", 0.0, "frame", whole, fps=m.fps))
    resident = replace(talker, choice=replace(talker.choice, backend=backend.on_device()))
    with opened(resident, 1) as (rows, every):
        on_device: Any = rows
        list(hops(rows, every, warm_up, on_device.device_vertices.wait))
        add("resident", hops(rows, every, count, on_device.device_vertices.wait))


def launches(preset: str, talker: Talker, result: Result) -> None:
    """Count the launches of a hop; after all timing, for a profiler stays attached and may slow what comes later."""
    with opened(talker, 1) as (rows, every):

        def hop() -> None:
            rows.launch(every)
            rows.vertices()

        hop()
        calls = profiled(hop)
    result.launches.append({"model": preset, "backend": talker.backend, "of": "a hop", "calls": calls})


def long_stream(preset: str, talker: Talker, minutes: float, result: Result) -> None:
    """Hops of a stream of so many minutes, as fast as they come."""
    if minutes:
        took = hop_times(talker, round(60 * minutes * talker.fps))
        rows = hop_rows(preset, talker.backend, "", 60 * minutes, took, talker.manifest)
        result.rows += [row.lasting(len(took) * talker.manifest.hop, None) for row in rows]


def many_streams(preset: str, talker: Talker, rows: int, frames: int, result: Result) -> None:
    """Launches of many rows, and steps of as many streams; of the most rows steps of `hop` groups as well."""
    m, name = talker.manifest, talker.backend
    with opened(talker, rows) as (group, every):
        list(hops(group, every, 3))
        took = np.array(list(hops(group, every, max(frames // m.hop, 5))))
    result.rows += hop_rows(preset, name, f"batch-{rows}", 0.0, took, m)
    for streams in (rows, rows * m.hop) if rows == m.row_counts[-1] and m.hop > 1 else (rows,):
        step_times = list(steps(talker, streams, speech(STEP_S + talker.delay_s)))[2:]
        row = summary(preset, name, f"batch-{streams}-step", 0.0, "total", step_times, fps=m.fps)
        result.rows.append(row)


def without_fold(preset: str, folder: Path, backends: Sequence[str], frames: int, result: Result) -> None:
    """Hops of an export whose head takes its steps one by one."""
    for talker in loaded(folder, backends, f"{preset}, no fold", result):
        m = talker.manifest
        with opened(talker, 1) as (rows, every):
            list(hops(rows, every, 3))
            took = np.array(list(hops(rows, every, frames // m.hop)))
        result.rows += hop_rows(preset, talker.backend, "no-fold", 0.0, took, m)
        del talker


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """Targets whose rows are there, for every backend at VOCASET's size."""

    def of(system: str, variant: str, stage: str, rows: Sequence[Row] = rows) -> list[Row]:
        wanted = ("vocaset", system, variant, stage)
        return [r for r in rows if (r.preset, r.system, r.variant, r.stage) == wanted and not r.audio_s]

    for system in dict.fromkeys(row.system for row in rows if row.system != RELEASED):
        measured: dict[str, float] = {}
        for hop in of(system, "", "hop")[-1:]:
            measured |= {"hop p50": hop.p50_ms, "hop p99": hop.p99_ms}
        for frame in of(system, "", "total")[-1:]:
            # The released first frame that took turns with it: the next in the order of measuring.
            for released in of(RELEASED, "frame-0", "frame", rows[rows.index(frame) :])[:1]:
                measured["times faster than the released first frame"] = released.p50_ms / frame.p50_ms
        own = [r for r in rows if (r.preset, r.system) == ("vocaset", system)]
        found = [(int(step[1]), r.late) for r in own if (step := STEPS.fullmatch(r.variant))]
        if found:
            measured["streams without a late step"] = max((n for n, late in found if not late), default=0)
        for name, value in measured.items():
            times = TARGETS[name] >= 10
            yield Target(f"{system}: {name}", value, TARGETS[name], times, "" if times else "ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 2 where something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--presets", nargs="+", choices=("vocaset", "biwi"), default=["vocaset"])
    add("--batches", type=int, nargs="+", default=[8], help="numbers of rows beside one (%(default)s)")
    add("--backends", nargs="+", choices=GPU_SYSTEMS, default=list(GPU_SYSTEMS))
    add("--frames", type=int, default=600, help="timed of one stream; fewer of many")
    add("--minutes", type=float, default=10.0, help="of audio through one stream, 0 to leave it out")
    add(
        "--models",
        type=Path,
        metavar="DIR",
        help="exports named PRESET-rows and PRESET-no-fold, else made here",
    )
    add("--no-eager", action="store_true", help="without the released algorithm")
    add("--json", type=Path, metavar="FILE", help="all figures, written as they come")
    options = parser.parse_args(arguments)
    if options.frames < LEAST_FRAMES:
        parser.error(f"--frames must be at least {LEAST_FRAMES}")
    if not options.no_eager and not torch.cuda.is_available():
        parser.error(
            "this torch has no CUDA to run the released algorithm on: install one that has, or --no-eager"
        )
    result = Result()

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(result.document(), indent=1) + "\n", encoding="utf-8")

    built = [name for name in options.backends if name.startswith("tensorrt") and find_spec(name)]
    settings = ["--precision", "fp16", "--targets", ",".join(["onnx", *built])]
    batches = ["--batch", *map(str, options.batches)]
    gc.disable()
    try:
        result.gpu = open_driver().description
        folders: dict[str, Path] = {}
        for preset in options.presets:
            eager = None if options.no_eager else Eager(preset)
            folder = folder_of(preset, "rows", [*settings, *batches], options.models)
            if folder is None:
                result.skipped[preset] = "there is no such export"
                continue
            folders[preset] = folder
            for talker in loaded(folder, options.backends, preset, result):
                label = f"{talker.backend}, {preset}"
                with noted(label, result):
                    result.parity.append(parity(preset, folder, talker, 1))
                    one_stream(preset, talker, eager, options.frames, result)
                    save()
                    long_stream(preset, talker, options.minutes, result)
                for rows in talker.manifest.row_counts[1:]:
                    with noted(f"{label}, {rows} rows", result):
                        result.parity.append(parity(preset, folder, talker, rows))
                        many_streams(preset, talker, rows, max(options.frames // rows, LEAST_FRAMES), result)
                    save()
                del talker
            unfolded = folder_of(preset, "no-fold", [*settings, "--no-fold"], options.models)
            if unfolded:
                with noted(f"{preset}, no fold", result):
                    without_fold(preset, unfolded, options.backends, options.frames // 2, result)
            else:
                result.skipped[f"{preset}, no fold"] = "there is no such export"
            save()
        for preset, folder in folders.items():
            own = (row.system for row in result.rows if row.preset == preset and row.system != RELEASED)
            for name in dict.fromkeys(own):
                with noted(f"{name}, {preset}, launches", result):
                    launches(preset, Talker.load(folder, name), result)
                gc.collect()  # before the next takes as much memory
        save()
    except FAILURES as error:
        return complain("gpu", error)
    finally:
        gc.enable()
    print(table(result.rows))
    print(targets_table(list(targets(result.rows))))
    for what, reason in result.skipped.items():
        print(f"skipped {what}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
