"""Latency across audio lengths, beside the released algorithm: `python -m benchmarks.latency`.

Ours is streamed by the runtime, one frame's audio a push. A row `hop` is the latency of a launch, `total` its share of
each of the hop's frames; `delay_s` is the audio that a frame waits for, its hop and the lookahead. Stages are runs of
their graphs. The released algorithm runs in eager PyTorch with the same weights, features and noise. Systems take
turns, ratios come from the same run, and nothing is timed before both gave the same vertices. Not counted: reading,
rendering, writing.

The released streaming path costs more with every frame: some frames are timed, a line through them stands for the
others (attention grows faster than that), and lengths beyond the last timed frame are marked with `*`. Ours costs the
same for every hop: at most `--most-frames` frames are timed, with full windows, and longer lengths are marked as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.latency_ablations import WITHOUT, naive_runs, variant_rows
from benchmarks.latency_plot import plot
from benchmarks.latency_rows import (
    CPU,
    OFFLINE,
    PARTS,
    RELEASED,
    SCHEMA,
    WHOLE_WINDOW,
    Document,
    Histogram,
    Row,
    hardware,
    hop_rows,
    summary,
    table,
    versions,
)
from benchmarks.latency_runs import hop_times, overhead, stage_runs
from benchmarks.latency_subject import (
    CACHE,
    FAILURES,
    ROOT,
    Subject,
    baseline,
    check_parity,
    complain,
    settings_of,
    speech,
    subject,
)
from benchmarks.latency_targets import table as targets_table
from benchmarks.latency_targets import targets
from benchmarks.released import Released, Seconds
from streamtalk import StreamTalkError, Talker, UsageError
from streamtalk.backends import Options, available

PRESETS = ("bundled", "vocaset", "biwi")
SECONDS = (3.0, 9.0, 15.0, 21.0, 27.0, 60.0, 600.0, 3600.0)
SAMPLED = (0, 30, 60, 120, 200, 269)
"""Frames of the released streaming path that are timed: 269 is the last of 9 s at 30 fps."""
ROUNDS, REPEATS = 3, 8
FULL_SIZE_FRAMES = 270
"""Frames of ours at full size that are timed: more would take minutes and show the same."""
_RELEASED_MEMORY = """
import sys
from pathlib import Path
from benchmarks.latency_rows import peak_mb
from benchmarks.latency_subject import baseline, subject
preset, folder, frames = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
base = baseline(subject(preset, Path(), folder), frames)
base.streaming_frame(frames - 1) if sys.argv[4] == "streaming" else base.decoding(frames)
print(peak_mb())
"""
_OUR_MEMORY = """
import sys, numpy, streamtalk
from benchmarks.latency_rows import peak_mb
with streamtalk.Talker.load(sys.argv[1], sys.argv[2]).open() as stream:
    for _ in stream.push(numpy.zeros(48000, numpy.float32)): pass
print(peak_mb())
"""


@dataclass
class Result:
    """Results of a run."""

    rows: list[Row] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    overhead_ms: dict[str, float] = field(default_factory=dict)
    """Median time of the runtime beside its backend, a frame, by preset."""
    settings: dict[str, object] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Backends that were not measured, and why."""

    def document(self) -> dict[str, object]:
        """Ready for JSON."""
        found = targets(self.rows, self.overhead_ms)
        return {
            "schema": SCHEMA,
            "hardware": hardware(),
            "versions": versions(),
            "settings": self.settings,
            "skipped": self.skipped,
            "rows": [asdict(row) for row in self.rows],
            "histograms": [asdict(histogram) for histogram in self.histograms],
            "targets": [{**asdict(target), "met": target.met} for target in found],
        }


def measure(
    given: Subject, lengths: Sequence[float], most_frames: int, ablations: bool, cache: Path, result: Result
) -> None:
    """Measure one preset, into `result`. Raises ParityError, ExportError and StreamTalkError."""
    fps = given.manifest.fps
    sampled = [i for i in SAMPLED if i < max(lengths) * fps]
    base = baseline(given, sampled[-1] + 1)
    print(f"{given.preset}: same vertices to {check_parity(given, base):.1e} of the motion", file=sys.stderr)
    talkers: dict[str, Talker] = {}
    for backend in available():
        try:
            talkers[backend] = Talker.load(given.folder, backend)
        except StreamTalkError as error:
            result.skipped[backend] = str(error).replace(str(given.folder), "this export")

    theirs, offline_s = stages(given, base, sampled, ablations, result)
    encoder_s = encoder(given, sampled[-1] + 1)
    peaks = {
        RELEASED: peak_rss_mb(_RELEASED_MEMORY, given.preset, given.folder, sampled[-1] + 1, "streaming"),
        OFFLINE: peak_rss_mb(_RELEASED_MEMORY, given.preset, given.folder, sampled[-1] + 1, "offline"),
        **{backend: peak_rss_mb(_OUR_MEMORY, given.folder, backend) for backend in talkers},
    }
    # The longest length that is measured whole shows most.
    longest_s = max((s for s in lengths if s * fps <= most_frames), default=lengths[0])
    for audio_s in lengths:
        frames = int(audio_s * fps)
        for backend, talker in talkers.items():
            took, beyond = hop_times(talker, min(frames, most_frames)), frames > most_frames
            rows = hop_rows(given.preset, backend, "", audio_s, took, given.manifest, extrapolated=beyond)
            result.rows += [row.lasting(frames, peaks[backend]) for row in rows]
            if audio_s == longest_s:
                result.histograms.append(Histogram.of(given.preset, backend, audio_s, took))
        result.rows += released_rows(given.preset, audio_s, frames, fps, theirs, encoder_s, peaks[RELEASED])
        whole = np.full(frames, encoder_s + offline_s)
        beyond = frames > sampled[-1] + 1
        row = summary(given.preset, OFFLINE, "", audio_s, "total", whole, extrapolated=beyond, fps=fps)
        last_ms = round(1e3 * float(whole.sum()), 4)  # nothing is there before everything is
        result.rows.append(replace(row.lasting(frames, peaks[OFFLINE]), first_frame_ms=last_ms))
    if CPU in talkers:
        own = overhead(talkers[CPU], min(int(max(lengths) * fps), most_frames))
        result.overhead_ms[given.preset] = round(1e3 * float(np.median(own)) / given.manifest.hop, 4)
    if ablations:
        result.rows += variant_rows(given, min(9 * fps, most_frames), ROUNDS, cache)


def stages(
    given: Subject, base: Released, sampled: Sequence[int], ablations: bool, result: Result
) -> tuple[dict[int, list[Seconds]], float]:
    """Time single graphs of ours, and of `ablations`, in turns with single frames of the released algorithm.

    Our rows go to `result`; returns the released streaming path's seconds, by frame, and seconds a frame of the offline
    path without its encoder.
    """
    m, threads = given.manifest, Options().cpu_threads()
    runs = {(name, ""): run for name, run in stage_runs(given.folder, m, threads).items()}
    if ablations:
        naive = naive_runs(given, threads)
        runs |= {(stage, WITHOUT[stage]): run for stage, run in naive.items()}
    ours: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    theirs: dict[int, list[Seconds]] = {i: [] for i in sampled}
    offline: list[Seconds] = []
    window: list[float] = []
    for run in runs.values():
        run()
    base.streaming_frame(0)
    for _ in range(ROUNDS):
        for i in sampled:
            theirs[i].append(base.streaming_frame(i)[1])
            for key, run in runs.items():
                ours[key] += [run() for _ in range(REPEATS)]
            if m.decode_window <= len(base.noise):
                window.append(base.decoding(m.decode_window))
        offline.append(base.offline_frame(sampled[-1], given.model.config.window_size))
    decoding_s = base.decoding(sampled[-1] + 1) / (sampled[-1] + 1)

    for (stage, variant), seconds in ours.items():
        share = m.hop if stage == "audio_encoder" else 1
        result.rows.append(summary(given.preset, CPU, variant, 0.0, stage, np.array(seconds) / share))
    if window:
        result.rows.append(summary(given.preset, RELEASED, WHOLE_WINDOW, 0.0, "vq_decoder", window))
    denoising_s = sum(float(np.median([row[stage] for row in offline])) for stage in offline[0])
    return theirs, decoding_s + denoising_s


def encoder(given: Subject, frames: int) -> float:
    """Seconds a frame of the released audio encoder, which encodes a clip of `frames` at once."""
    pcm = torch.from_numpy(speech(frames / given.manifest.fps))
    began = perf_counter()
    given.model.offline_features(pcm)
    return (perf_counter() - began) / frames


def released_rows(
    preset: str,
    audio_s: float,
    frames: int,
    fps: int,
    theirs: dict[int, list[Seconds]],
    encoder_s: float,
    peak_mb: float | None = None,
) -> list[Row]:
    """The released streaming path on one length: every frame read off a line through those that were timed."""
    at = np.array(sorted(theirs), np.float64)
    total, beyond = np.full(frames, encoder_s), bool(frames > at[-1] + 1)
    rows = [summary(preset, RELEASED, "", audio_s, "audio_encoder", total, extrapolated=beyond)]
    for stage in PARTS[1:]:
        medians = [float(np.median([row[stage] for row in theirs[int(i)]])) for i in at]
        slope, level = np.polyfit(at, medians, 1) if len(at) > 1 else (0.0, medians[0])
        curve = np.maximum(level + max(slope, 0.0) * np.arange(frames), min(medians))
        total = total + curve
        rows.append(summary(preset, RELEASED, "", audio_s, stage, curve, extrapolated=beyond))
    whole = summary(preset, RELEASED, "", audio_s, "total", total, extrapolated=beyond, fps=fps)
    return [*rows, whole.lasting(frames, peak_mb)]


def peak_rss_mb(script: str, *arguments: object) -> float | None:
    """Peak memory in MB of a process that runs `script`; None where it fails."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return round(float(done.stdout.split()[-1]), 1) if done.returncode == 0 else None


def result_to_add_to(path: Path) -> Document:
    """Read an earlier result of this machine and these versions. Raises OSError, and UsageError where it is none."""
    try:
        earlier: Document = json.loads(path.read_text(encoding="utf-8"))
        found = {key: earlier[key] for key in ("schema", "hardware", "versions")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no result of this benchmark ({error}). Leave --add out.") from error
    for key, now in (("schema", SCHEMA), ("hardware", hardware()), ("versions", versions())):
        if found[key] != now:
            raise UsageError(f"{path} has another {key} ({found[key]}; now {now}). Leave --add out.")
    return earlier


def added(earlier: Document, document: Document) -> Document:
    """Put `document` beside the other presets of an earlier one: every ratio still comes from one run."""
    presets = document["settings"]

    def kept(key: str, preset: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
        """Items of every preset, in the order of `PRESETS`; the newer of two."""
        items = [item for item in earlier[key] if preset(item) not in presets] + document[key]
        return sorted(items, key=lambda item: PRESETS.index(preset(item)))

    settings = {**earlier["settings"], **presets}
    return {
        **document,
        "settings": {name: settings[name] for name in PRESETS if name in settings},
        "rows": kept("rows", lambda row: str(row["preset"])),
        "histograms": kept("histograms", lambda histogram: str(histogram["preset"])),
        "targets": kept("targets", lambda target: str(target["name"]).partition(":")[0]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 1 where parity fails, 2 where something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    add = parser.add_argument
    add("--presets", nargs="+", choices=PRESETS, default=["bundled", "vocaset"])
    add("--seconds", type=float, nargs="+", default=list(SECONDS), help="lengths of audio")
    add("--engine", type=Path, help="an export of the one preset, of the preset's weights")
    add("--most-frames", type=int, default=1800, help="frames of ours that are timed a length (bundled)")
    add("--no-ablations", action="store_true", help="at full size they take minutes of exporting")
    add("--quick", action="store_true", help="the bundled model on 3 and 9 s, without ablations")
    add("--cache", type=Path, default=CACHE, help="where exports are kept")
    add("--json", type=Path, metavar="FILE", help="all figures")
    add("--add", action="store_true", help="keep the other presets of the FILE of --json")
    add("--plot", type=Path, metavar="FILE", help="pictures of them")
    options = parser.parse_args(arguments)
    if options.quick:
        options.presets, options.seconds, options.no_ablations = ["bundled"], [3.0, 9.0], True
    if options.engine and len(options.presets) != 1:
        parser.error("--engine is an export of one preset: give --presets with that one")
    if options.add and not options.json:
        parser.error("--add adds to the FILE of --json: give both")
    torch.set_num_threads(Options().cpu_threads())
    result = Result()
    cache = options.cache.expanduser()
    gc.disable()  # a collection between two frames is no frame's cost
    try:
        earlier = result_to_add_to(options.json) if options.add else None
        for preset in options.presets:
            given = subject(preset, cache, options.engine)
            result.settings[preset] = settings_of(given.manifest)
            most = options.most_frames if preset == "bundled" else min(options.most_frames, FULL_SIZE_FRAMES)
            measure(given, sorted(options.seconds), most, not options.no_ablations, cache, result)
            gc.collect()
        document = result.document()
        if earlier:
            document = added(earlier, document)
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if options.plot:
            plot(document, options.plot)
    except FAILURES as error:
        return complain("latency", error)
    finally:
        gc.enable()
    print(table(result.rows))
    print(targets_table(targets(result.rows, result.overhead_ms)))
    for backend, reason in result.skipped.items():
        print(f"skipped {backend}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
