"""Per-frame latency across audio lengths, beside the released algorithm: `python -m benchmarks.latency`.

Ours is streamed by the runtime, one frame's audio a push; stages are runs of their graphs. The released algorithm runs
in eager PyTorch with the same weights, features and noise. Systems take turns, ratios come from the same run, and
nothing is timed before both gave the same vertices. Not counted: reading, rendering, writing.

The released streaming path costs more with every frame: some frames are timed, a line through them stands for the
others (attention grows faster than that), and lengths beyond the last timed frame are marked with `*`. Ours costs the
same for every frame: at most `--most-frames` are timed, with full windows, and longer lengths are marked as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.latency_rows import Row, document, summary, table
from benchmarks.latency_subject import (
    SEED,
    ParityError,
    Subject,
    baseline,
    check_parity,
    exported,
    speech,
    subject,
)
from streamtalk import StreamTalkError, Talker
from streamtalk.backends import available
from streamtalk.manifest import Manifest
from streamtalk_export.drive import Graphs
from streamtalk_export.errors import ExportError

CACHE = Path("~/.cache/streamtalk/benchmarks")
PRESETS = ("bundled", "vocaset", "biwi")
SECONDS = (3.0, 9.0, 15.0, 27.0, 60.0, 600.0, 3600.0)
WARM_UP_FRAMES = 8
SAMPLED = (0, 30, 60, 120, 200, 269)
"""Frames of the released streaming path that are timed: 269 is the last of 9 s at 30 fps."""
ROUNDS = 3
VARIANTS: dict[str, dict[str, list[str]]] = {
    "bundled": {"threads-1": [], "hop-4": ["--hop", "4"], "decode-window-32": ["--decode-window", "32"]},
    "vocaset": {
        "threads-1": [],
        "no-fold": ["--no-fold"],
        "decode-window-16": ["--decode-window", "16"],
    },
    "biwi": {"threads-1": []},
}
Seconds = npt.NDArray[np.float64]


def streamed(talker: Talker, frames: int) -> Seconds:
    """Seconds of each of `frames` frames after warm-up, whole, in a stream of the runtime; the first is a new stream's
    first.
    """
    chunk = talker.sample_rate // talker.fps
    pcm = speech((frames + WARM_UP_FRAMES) / talker.fps + 2)
    took: list[float] = []
    with talker.open() as stream:
        for again in (False, True):
            stream.reset()
            wanted = frames if again else WARM_UP_FRAMES
            took.clear()
            for start in range(0, len(pcm), chunk):
                ready, since = stream.push(pcm[start : start + chunk]), perf_counter()
                for _ in ready:
                    now = perf_counter()
                    took.append(now - since)
                    since = now
                if len(took) >= wanted:
                    break
    return amortised(np.array(took[:frames]), talker.manifest.hop)


def amortised(seconds: Seconds, hop: int) -> Seconds:
    """The encoder's run, which falls on a hop's first frame, spread over the hop: each frame its hop's mean."""
    if hop == 1:
        return seconds
    whole = len(seconds) // hop * hop
    means = seconds[:whole].reshape(-1, hop).mean(1)
    return np.repeat(means, hop) if whole else seconds


def stage_inputs(m: Manifest) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Inputs of every graph with all windows full."""
    rng = np.random.default_rng(SEED)
    made: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for name in ("audio_encoder", "condition_predictor", "diffusion_head", "vq_decoder", "frame"):
        inputs: dict[str, npt.NDArray[Any]] = {}
        for tensor in m.graphs[name].inputs:
            shape = tuple(int(n) for n in tensor.shape)[1:]
            full = {
                "valid_frames": m.history,
                "valid_latents": m.decode_window,
                "position": 0,
                "active": True,
            }
            if tensor.name in full:
                inputs[tensor.name] = np.array(full[tensor.name])
            else:
                inputs[tensor.name] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        made[name] = inputs
    return made


def peak_rss_mb(folder: Path, backend: str) -> float | None:
    """Peak memory in MB of a process that loads an engine and streams three seconds; None where unknown."""
    script = (
        "import sys, resource, numpy as np, streamtalk\n"
        "talker = streamtalk.Talker.load(sys.argv[1], sys.argv[2])\n"
        "with talker.open() as stream:\n"
        "    for _ in stream.push(np.zeros(48000, np.float32)): pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), backend], capture_output=True, text=True, check=False
    )
    return round(float(done.stdout), 1) if done.returncode == 0 else None


def measure(
    given: Subject,
    lengths: Sequence[float],
    most_frames: int,
    ablations: bool,
    cache: Path,
    skipped: dict[str, str],
) -> list[Row]:
    """All rows of one preset."""
    m, fps = given.manifest, given.manifest.fps
    sampled = [i for i in SAMPLED if i < max(lengths) * fps]
    base = baseline(given, sampled[-1] + 1)
    print(f"{given.preset}: same vertices to {check_parity(given, base):.1e} of the motion", file=sys.stderr)

    systems: dict[str, Talker] = {}
    for backend in available():
        try:
            systems[backend] = Talker.load(given.folder, backend)
        except StreamTalkError as error:
            skipped[backend] = str(error)
    # Stages, in turns: ours and the released frames.
    graphs, inputs = Graphs(given.folder, m), stage_inputs(m)
    ours: dict[str, list[float]] = {name: [] for name in inputs}
    theirs: dict[int, list[dict[str, float]]] = {i: [] for i in sampled}
    offline: list[dict[str, float]] = []
    window = given.model.config.window_size
    for name, tensors in inputs.items():
        graphs.run(name, **tensors)
    base.streaming_frame(0)
    for _ in range(ROUNDS):
        for i in sampled:
            theirs[i].append(base.streaming_frame(i)[1])
            for name, tensors in inputs.items():
                for _ in range(4):
                    began = perf_counter()
                    graphs.run(name, **tensors)
                    ours[name].append(perf_counter() - began)
        offline.append(base.offline_frame(sampled[-1], window))
    heard = torch.from_numpy(speech((sampled[-1] + 1) / fps))
    began = perf_counter()
    given.model.offline_features(heard)
    encoder_s = (perf_counter() - began) / (sampled[-1] + 1)
    decoding_s = base.decoding(sampled[-1] + 1) / (sampled[-1] + 1)

    offline_s = encoder_s + decoding_s
    offline_s += sum(float(np.median([row[stage] for row in offline])) for stage in offline[0])

    rows: list[Row] = []
    cpu = "onnxruntime-cpu"
    for name, seconds in ours.items():
        share = m.hop if name == "audio_encoder" else 1
        rows.append(summary(given.preset, cpu, "", 0.0, name, np.array(seconds) / share))
    for audio_s in lengths:
        frames = int(audio_s * fps)
        for backend, talker in systems.items():
            timed = streamed(talker, min(frames, most_frames))
            rss = peak_rss_mb(given.folder, backend) if audio_s == lengths[0] else None
            columns = (given.preset, backend, "", audio_s, "total", timed)
            rows.append(
                summary(*columns, extrapolated=frames > most_frames, fps=fps, frames=frames, peak_rss_mb=rss)
            )
        rows += released_rows(given.preset, audio_s, frames, fps, theirs, encoder_s)
        whole = np.full(frames, offline_s)
        beyond = frames > sampled[-1] + 1
        rows.append(
            summary(
                given.preset, "released-offline", "", audio_s, "total", whole, extrapolated=beyond, fps=fps
            )
        )
    if ablations:
        rows += ablation_rows(given, min(9 * fps, most_frames), cache)
    return rows


def released_rows(
    preset: str,
    audio_s: float,
    frames: int,
    fps: int,
    theirs: dict[int, list[dict[str, float]]],
    encoder_s: float,
) -> list[Row]:
    """The released streaming path on one length: every frame read off a line through those that were timed."""
    at = np.array(sorted(theirs), np.float64)
    rows, total = [], np.full(frames, encoder_s)
    beyond = bool(frames > at[-1] + 1)
    for stage in ("condition_predictor", "diffusion_head", "vq_decoder"):
        medians = [float(np.median([row[stage] for row in theirs[int(i)]])) for i in at]
        slope, level = np.polyfit(at, medians, 1) if len(at) > 1 else (0.0, medians[0])
        curve = np.maximum(level + max(slope, 0.0) * np.arange(frames), min(medians))
        total = total + curve
        rows.append(summary(preset, "released-streaming", "", audio_s, stage, curve, extrapolated=beyond))
    rows.append(
        summary(preset, "released-streaming", "", audio_s, "total", total, extrapolated=beyond, fps=fps)
    )
    return rows


def ablation_rows(given: Subject, frames: int, cache: Path) -> list[Row]:
    """Variants of ours on one length, in turns with the default."""
    folders = {"": given.folder}
    for name, options in VARIANTS[given.preset].items():
        folders[name] = exported(given.preset, cache, name, options) if options else given.folder
    talkers = {
        name: Talker.load(folder, "onnxruntime-cpu", threads=1 if name == "threads-1" else None)
        for name, folder in folders.items()
    }
    took: dict[str, list[Seconds]] = {name: [] for name in talkers}
    part = max(frames // ROUNDS, 1)
    for _ in range(ROUNDS):
        for name, talker in talkers.items():
            took[name].append(streamed(talker, part))
    fps = given.manifest.fps
    return [
        summary(given.preset, "onnxruntime-cpu", name, part / fps, "total", np.concatenate(parts), fps=fps)
        for name, parts in took.items()
        if name
    ]


def ratios(rows: Sequence[Row], preset: str) -> str:
    """How ours compares with the released streaming path at the last frame of 9 s, from the same run."""
    mine = {
        r.stage: r.p50_ms for r in rows if (r.preset, r.system, r.audio_s) == (preset, "onnxruntime-cpu", 0.0)
    }
    theirs = {
        r.stage: r.max_ms
        for r in rows
        if (r.preset, r.system, r.audio_s) == (preset, "released-streaming", 9.0) and not r.extrapolated
    }
    if not theirs:
        return f"{preset}: no 9 s among --seconds, so no ratio"
    small = mine["condition_predictor"] + mine["diffusion_head"]
    released = theirs["condition_predictor"] + theirs["diffusion_head"]
    decoder = theirs["vq_decoder"] / mine["vq_decoder"]
    return (
        f"{preset}: at the last frame of 9 s predictor and head {released / small:.0f} times below released-streaming "
        f"({small:.2f} against {released:.0f} ms), decoder {decoder:.1f} times"
    )


def settings_of(m: Manifest) -> dict[str, object]:
    return {
        "hop": m.hop,
        "context_s": m.context_samples / m.sample_rate,
        "history": m.history,
        "decode_window": m.decode_window,
        "steps": m.steps,
        "delay_s": (m.window_samples - m.context_samples) / m.sample_rate,
        "fps": m.fps,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 1 where parity fails, 2 where something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["bundled", "vocaset"])
    parser.add_argument("--seconds", type=float, nargs="+", default=list(SECONDS))
    parser.add_argument(
        "--engine", type=Path, help="an export of the one preset, its weights those of the preset"
    )
    parser.add_argument(
        "--most-frames", type=int, default=1800, help="of ours that are timed a length (bundled)"
    )
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the bundled model on 3 and 9 s: a minute")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where exports are kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.presets, options.seconds, options.no_ablations = ["bundled"], [3.0, 9.0], True
    torch.set_num_threads(2)
    gc.disable()  # a collection between two frames is no frame's cost
    rows: list[Row] = []
    settings: dict[str, object] = {}
    skipped: dict[str, str] = {}
    cache = options.cache.expanduser()
    try:
        for preset in options.presets:
            given = subject(preset, cache, options.engine)
            settings[preset] = settings_of(given.manifest)
            most = options.most_frames if preset == "bundled" else min(options.most_frames, 240)
            rows += measure(given, sorted(options.seconds), most, not options.no_ablations, cache, skipped)
            gc.collect()
    except ParityError as error:
        print(error, file=sys.stderr)
        return 1
    except (ExportError, StreamTalkError, OSError) as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    for preset in options.presets:
        print(ratios(rows, preset))
    for backend, reason in skipped.items():
        print(f"skipped {backend}: {reason}")
    if options.json:
        result = json.dumps(document(settings, skipped, rows), indent=1) + "\n"
        options.json.write_text(result, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
