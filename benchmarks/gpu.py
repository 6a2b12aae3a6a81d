"""Latency on a GPU, beside the released algorithm in eager PyTorch on the same one: `python -m benchmarks.gpu`.

Every backend that loads here, at full size and several batches, by stage and whole. Each has reproduced its model's
probe in every slot, now or when it was first loaded here. At batch 1 the systems take turns. The released algorithm
runs in float32 with random weights of its own; its first frame is its best case: each later one costs more.

`frame` is a turn of all slots, from noise in host memory to vertices there, without the encoder. Variants: `resident`
leaves the vertices on the device, `hop-start` is the encoder and a hop's first frame one after the other, which a live
stream waits for, `back-to-back` the mean of runs that are queued together, `no-fold` the head's steps unrolled.
`batch-N` are N voices in one launch; `step` adds the host's work for every voice, and the encoder in the step that
begins the hops of all, or `staggered`, of some, which is then every step.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_runs import IN_FLIGHT, SEED, StageRun, hops, opened, profiled, stage_engine, steps, turns
from benchmarks.latency_rows import GPU_SYSTEMS, PARTS, RELEASED, Row, hardware, summary, table, versions
from benchmarks.latency_runs import amortised, frame_times
from benchmarks.latency_subject import CACHE, FAILURES, complain, exported, settings_of, speech
from benchmarks.latency_targets import Target
from benchmarks.latency_targets import table as targets_table
from benchmarks.released import Released, Seconds, timed
from streamtalk import StreamTalkError, Talker
from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.driver import open_driver
from streamtalk.backends.probe import measure, read_probe
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
"""Audio that every voice of a batch hears."""
HOP = 4
"""Of HuBERT's presets."""
STEPS = re.compile(r"batch-\d+-step-staggered")
"""Rows of voices that began when they began, as those of a server do."""
TARGETS = {
    "frame p50": 0.3,
    "frame p99": 0.5,
    "audio encoder p50": 0.7,
    "times faster than the released first frame": 15.0,
    "voices at hop 4 without a late step": 500.0,
}
"""For an NVIDIA H200 at VOCASET's size, history and decode window 60, 2 s of context; milliseconds where no unit is."""


@dataclass
class Result:
    """All that a run found."""

    rows: list[Row] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    """Vertex errors of the probe against the float32 graphs on the CPU, in the vertices' unit, and what is allowed."""
    launches: list[dict[str, Any]] = field(default_factory=list)
    """CUDA calls and device work of one hop, encoder included, and of one frame."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What every figure of a preset depends on."""
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
        self.model = random_model(config, hubert_config(None), SEED).eval().cuda()
        generator = torch.Generator().manual_seed(SEED)

        def rows(count: int, width: int) -> torch.Tensor:
            return torch.randn(count, width, generator=generator).cuda()

        count, p = SAMPLED[-1] + 1, config.predictor
        table = sampler_table(config.schedule, config.steps, config.sampler)
        features, noise = rows(count, p.audio_encode_dim), rows(count, p.vq_dim)
        self.released = Released(self.model, table, features, noise, rows(count + 1, p.vq_dim))
        self.fps = config.fps

    def frame(self, i: int) -> Seconds:
        """Seconds by stage of frame `i` of the streaming path."""
        return self.released.streaming_frame(i)[1]

    def encoder(self, audio_s: float) -> float:
        """Seconds to hear a clip at once."""
        pcm = torch.from_numpy(speech(audio_s)).cuda()
        with self.released.noise.device:
            return timed(lambda: self.model.offline_features(pcm))[1]


def folder_of(preset: str, variant: str, options: Sequence[str], models: Path | None) -> Path | None:
    """An export of this variant from `models`, or None where that has none; without `models` it is exported."""
    if models is None:
        return exported(preset, CACHE.expanduser(), variant, options)
    folder = models / f"{preset}-{variant}"
    return folder if (folder / "manifest.json").exists() else None


def loaded(
    folder: Path, wanted: Sequence[str], label: str, result: Result
) -> Iterator[tuple[Talker, CudaBackend]]:
    """The export on every GPU backend that works; reasons of the others go to `result`.

    Whoever asks lets go of one before it asks for the next, which takes as much memory again.
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
        for form, reason in talker.choice.passed_over.items():  # graphs that it would rather have run
            result.skipped[f"{form}, {label}"] = reason.replace(str(folder), "this export")
        backend = talker.choice.backend
        assert isinstance(backend, CudaBackend)
        result.settings.setdefault(label.partition(",")[0], settings_of(talker.manifest))
        result.parity.append(
            {
                "model": label,
                "backend": name,
                "precision": backend.precision,
                **errors(folder, talker, backend),
                "first_frame_s": round(talker.choice.first_frame_s, 3),
                "encoder_batch": talker.manifest.encoder_batch,
            }
        )
        print(f"{label}, {backend.description}: {result.parity[-1]}", file=sys.stderr, flush=True)
        yield talker, backend
        del talker, backend
        gc.collect()


@contextmanager
def noted(what: str, result: Result) -> Iterator[None]:
    """Go on after what does not work, such as a batch that does not fit into memory; its words go to `result`."""
    try:
        yield
    except (StreamTalkError, torch.OutOfMemoryError) as error:
        result.skipped[what] = str(error)


def errors(folder: Path, talker: Talker, backend: CudaBackend) -> dict[str, float]:
    """Vertex errors of the probe, which loading made sure of already; of large batches what is allowed alone."""
    probe = read_probe(folder, talker.manifest)
    assert probe is not None
    allowed = probe.limits[backend.precision]
    found = {"allowed_p99": allowed.p99, "allowed_max": allowed.max}
    if talker.manifest.batch > MOST_PROBED:
        return found
    p99, worst = measure(backend, talker.manifest, probe)
    return {"p99": p99, "max": worst, **found}


def one_voice(
    preset: str,
    folder: Path,
    talker: Talker,
    backend: CudaBackend,
    eager: Eager | None,
    frames: int,
    result: Result,
) -> None:
    """Frames in turns with the released algorithm, a hop's start, vertices that stay, stages."""
    m, name = talker.manifest, backend.name

    def add(stage: str, variant: str, seconds: Any, **more: Any) -> None:
        result.rows.append(summary(preset, name, variant, 0.0, stage, seconds, **more))

    theirs: dict[int, list[Seconds]] = {i: [] for i in SAMPLED}
    encoder_s: list[float] = []
    with opened(talker) as slots:
        list(turns(slots, m, m.history))
        if eager:
            for i in SAMPLED:
                eager.frame(i)
            eager.encoder(m.window_samples / m.sample_rate)
        ours: list[float] = []
        for _ in range(ROUNDS):
            ours += turns(slots, m, frames // ROUNDS)
            for i in SAMPLED if eager else ():
                assert eager
                theirs[i].append(eager.frame(i))
            if eager:
                encoder_s.append(eager.encoder(m.window_samples / m.sample_rate))
        add("frame", "", ours, fps=m.fps)
        add("frame", "hop-start", list(hops(slots, m, frames // m.hop)), fps=m.fps)
    for i, rows in theirs.items():
        if rows:
            whole = [sum(row.values()) for row in rows]
            for stage in rows[0]:
                each = [row[stage] for row in rows]
                result.rows.append(summary(preset, RELEASED, f"frame-{i}", 0.0, stage, each))
            result.rows.append(summary(preset, RELEASED, f"frame-{i}", 0.0, "frame", whole, fps=m.fps))
    if encoder_s:
        result.rows.append(summary(preset, RELEASED, "one-window", 0.0, "audio_encoder", encoder_s))
    resident = replace(talker, choice=replace(talker.choice, backend=replace(backend, download=False)))
    with opened(resident) as slots:
        waiting: Any = slots
        list(turns(slots, m, m.history, waiting.device_vertices.wait))
        add("frame", "resident", list(turns(slots, m, frames, waiting.device_vertices.wait)), fps=m.fps)
    stages(preset, "", folder, backend, PARTS, frames, result)


def launches(preset: str, talker: Talker, result: Result) -> None:
    """What a hop and a frame launch; after all timing, for a profiler stays attached and may slow what comes later."""
    every, index = np.ones(1, np.bool_), np.zeros(1, np.int64)
    with opened(talker) as slots:

        def hop() -> None:
            slots.encode(every)
            frame()

        def frame() -> None:
            slots.frame(0, index, every)
            slots.vertices()

        hop()
        for said, run in (("a hop's first frame", hop), ("a frame", frame)):
            calls = profiled(run)
            result.launches.append({"model": preset, "backend": talker.backend, "of": said, "calls": calls})


def long_stream(preset: str, talker: Talker, minutes: float, result: Result) -> None:
    """Whole frames of a stream of so many minutes, as fast as they come. The encoder's run is spread over its hop, but
    for what is late and what took longest: there it counts where it falls.
    """
    if minutes:
        took = frame_times(talker, round(60 * minutes * talker.fps))
        own = preset, talker.backend, "", 60 * minutes, "total"
        whole = summary(*own, took, fps=talker.fps)
        row = summary(*own, amortised(took, talker.manifest.hop), fps=talker.fps)
        result.rows.append(replace(row, late=whole.late, max_ms=whole.max_ms))


def stages(
    preset: str,
    variant: str,
    folder: Path,
    backend: CudaBackend,
    names: Sequence[str],
    frames: int,
    result: Result,
) -> None:
    """Single graphs; an encoder's row is a run, not its share of a frame."""
    for stage in names:
        what = f"{backend.name}, {preset} {variant} {stage}"
        try:
            engine = stage_engine(folder, backend, stage)
        except (StreamTalkError, KeyError) as error:
            result.skipped[what] = str(error)[:300]
            continue
        with noted(what, result), closing(StageRun(backend.driver, engine, backend.manifest)) as run:
            for _ in range(20):
                run()
            alone = [run() for _ in range(frames)]
            queued = [run(IN_FLIGHT) for _ in range(max(frames // IN_FLIGHT, 5))]
            queued_name = "-".join(filter(None, (variant, "back-to-back")))
            result.rows.append(summary(preset, backend.name, variant, 0.0, stage, alone))
            result.rows.append(summary(preset, backend.name, queued_name, 0.0, stage, queued))


def many_voices(
    preset: str, talker: Talker, backend: CudaBackend, folder: Path, frames: int, result: Result
) -> None:
    """Turns of a full batch, its encoder, and steps with the host's work."""
    m, variant = talker.manifest, f"batch-{talker.manifest.batch}"

    def add(stage: str, of: str, seconds: Any) -> None:
        result.rows.append(summary(preset, backend.name, of, 0.0, stage, seconds, fps=m.fps))

    with opened(talker) as slots:
        list(turns(slots, m, 2 * m.hop))
        add("frame", variant, list(turns(slots, m, frames)))
        add("frame", f"{variant}-hop-start", list(hops(slots, m, max(frames // m.hop, 3))))
    for said, staggered in (("step", False), ("step-staggered", True)):
        took = np.array(list(steps(talker, speech(STEP_S), staggered)))[2 * m.hop :]
        add("total", f"{variant}-{said}", took)
    windows = f"windows-{m.encoder_batch}"
    stages(preset, windows, folder, backend, ("audio_encoder",), max(frames // 8, 5), result)


def without_fold(preset: str, folder: Path, backends: Sequence[str], frames: int, result: Result) -> None:
    """Frames and head of an export whose head takes its steps one by one."""
    for talker, backend in loaded(folder, backends, f"{preset}, no fold", result):
        with opened(talker) as slots:
            list(turns(slots, talker.manifest, 2 * talker.manifest.hop))
            took = list(turns(slots, talker.manifest, frames))
        result.rows.append(summary(preset, backend.name, "no-fold", 0.0, "frame", took, fps=talker.fps))
        stages(preset, "no-fold", folder, backend, ("diffusion_head",), frames, result)
        del talker, backend


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """What issue and rows have in common, for every backend at VOCASET's size."""

    def of(system: str, variant: str, stage: str) -> Row | None:
        found = [
            r for r in rows if (r.preset, r.system, r.variant, r.stage) == ("vocaset", system, variant, stage)
        ]
        return found[-1] if found else None

    def beside(frame: Row) -> Row | None:
        """The released first frame that took turns with `frame`: the next in the order of measuring."""
        later = rows[rows.index(frame) :]
        own = ("vocaset", RELEASED, "frame-0", "frame")
        return next((r for r in later if (r.preset, r.system, r.variant, r.stage) == own), None)

    for system in dict.fromkeys(row.system for row in rows if row.system != RELEASED):
        frame, encoder = of(system, "", "frame"), of(system, "", "audio_encoder")
        measured: dict[str, float] = {}
        if frame:
            measured |= {"frame p50": frame.p50_ms, "frame p99": frame.p99_ms}
        if encoder:
            measured["audio encoder p50"] = encoder.p50_ms
        if frame and (released := beside(frame)):
            measured["times faster than the released first frame"] = released.p50_ms / frame.p50_ms
        steps_of = [
            r for r in rows if (r.preset, r.system) == ("vocaset", system) and STEPS.fullmatch(r.variant)
        ]
        if steps_of:
            kept = [int(r.variant.split("-")[1]) for r in steps_of if not r.late]
            measured["voices at hop 4 without a late step"] = max(kept, default=0)
        for name, value in measured.items():
            times = TARGETS[name] >= 10
            yield Target(f"{system}: {name}", value, TARGETS[name], times, "" if times else "ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 2 where something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--presets", nargs="+", choices=("vocaset", "biwi"), default=["vocaset"])
    add("--batches", type=int, nargs="+", default=[1, 8])
    add("--backends", nargs="+", choices=GPU_SYSTEMS, default=list(GPU_SYSTEMS))
    add("--frames", type=int, default=600, help="timed at batch 1; fewer at larger ones")
    add("--minutes", type=float, default=10.0, help="of audio through one stream, 0 to leave it out")
    add(
        "--models",
        type=Path,
        metavar="DIR",
        help="exports named PRESET-batch-N and PRESET-no-fold, else made here",
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
    targets_of = ["--precision", "fp16", "--targets", ",".join(["onnx", *built])]
    singles: dict[str, Path] = {}
    gc.disable()
    try:
        result.gpu = open_driver().description
        for preset in options.presets:
            eager = None if options.no_eager else Eager(preset)
            for batch in options.batches:
                # As many windows as have a hop due when voices are spread over it evenly.
                windows = -(-batch // HOP)
                given = [*targets_of, "--batch", str(batch), "--encoder-batch", str(windows)]
                folder = folder_of(preset, f"batch-{batch}", given, options.models)
                if folder is None:
                    result.skipped[f"{preset}, batch {batch}"] = "there is no such export"
                    continue
                if batch == 1:
                    singles[preset] = folder
                for talker, backend in loaded(folder, options.backends, f"{preset}, batch {batch}", result):
                    with noted(f"{backend.name}, {preset}, batch {batch}, midway", result):
                        if batch == 1:
                            one_voice(preset, folder, talker, backend, eager, options.frames, result)
                            save()
                            long_stream(preset, talker, options.minutes, result)
                        else:
                            many_voices(
                                preset, talker, backend, folder, max(options.frames // batch, 24), result
                            )
                    save()
                    del talker, backend
            unfolded = folder_of(preset, "no-fold", [*targets_of, "--no-fold"], options.models)
            if unfolded:
                with noted(f"{preset}, no fold", result):
                    without_fold(preset, unfolded, options.backends, options.frames // 2, result)
            else:
                result.skipped[f"{preset}, no fold"] = "there is no such export"
            save()
        for preset, folder in singles.items():
            for name in dict.fromkeys(
                r.system for r in result.rows if r.preset == preset and r.system != RELEASED
            ):
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
