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
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.latency_rows import Row, document, summary, table
from benchmarks.released import Released
from streamtalk import StreamTalkError, Talker
from streamtalk.backends import available
from streamtalk.manifest import Manifest
from streamtalk_export import cli as export_cli
from streamtalk_export.checkpoint import load_model, random_model
from streamtalk_export.config import load_config
from streamtalk_export.drive import Graphs
from streamtalk_export.errors import ExportError
from streamtalk_export.hubert import hubert_config
from streamtalk_export.model import TalkerModel, stream_frames
from streamtalk_export.sampler import sampler_table

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path("~/.cache/streamtalk/benchmarks")
PRESETS = ("bundled", "vocaset", "biwi")
SEED = 0  # of the random weights
SECONDS = (3.0, 9.0, 15.0, 27.0, 60.0, 600.0, 3600.0)
PARITY_FRAMES = 6
PARITY = 1e-3
"""Largest difference of a vertex, as a share of the largest offset: float32 summed in another order, fed back."""
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


class ParityError(Exception):
    """Two systems that should give the same vertices do not."""


@dataclass(frozen=True)
class Subject:
    """A preset: its engine folder and the same model in torch."""

    preset: str
    folder: Path
    model: TalkerModel
    manifest: Manifest


def subject(preset: str, cache: Path, engine: Path | None = None) -> Subject:
    """Export `preset` unless `cache` has it. Raises ExportError and StreamTalkError."""
    folder = engine or exported(preset, cache, "", [])
    config = load_config(ROOT / "models/bundled/config.yaml" if preset == "bundled" else preset)
    hubert = hubert_config(None) if config.audio.kind == "hubert" else None
    if preset == "bundled":
        model = load_model(config, hubert, ROOT / "models/bundled/model.safetensors")
    else:
        model = random_model(config, hubert, SEED)
    manifest = Talker.load(folder, backend="onnxruntime-cpu").manifest
    return Subject(preset, folder, model.eval(), manifest)


def exported(preset: str, cache: Path, variant: str, options: Sequence[str]) -> Path:
    """The engine folder of a preset's variant, exported where it is not there or of other weights."""
    out = cache / f"{preset}{'-' + variant if variant else ''}"
    given = [] if preset == "bundled" else ["--config", preset, "--random-weights", str(SEED)]
    if preset == "bundled" or not (out / "manifest.json").exists():
        export_cli.run(export_cli.parser().parse_args([*given, *options, "--out", str(out)]))
    return out


def speech(seconds: float) -> npt.NDArray[np.float32]:
    """The demo clip again and again: [n] at 16 kHz."""
    with wave.open(str(ROOT / "models/bundled/demo.wav"), "rb") as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32768)
    return np.resize(pcm, round(seconds * 16000))


def baseline(given: Subject, frames: int) -> Released:
    """The released algorithm on `frames` frames of the same speech; latents are random, which no time depends on."""
    m, generator = given.manifest, torch.Generator().manual_seed(SEED)
    features = given.model.offline_features(torch.from_numpy(speech(frames / m.fps + 1)))[:frames]
    noise = torch.randn(frames, m.latent_width, generator=generator)
    latents = torch.randn(frames + 1, m.latent_width, generator=generator)
    table_ = sampler_table(given.model.config.schedule, m.steps, m.sampler)
    return Released(given.model, table_, features, noise, latents)


def check_parity(given: Subject, base: Released) -> float:
    """The graphs' vertices against the released algorithm's, over the first frames; returns the worst share.

    Raises ParityError.
    """
    m, graphs = given.manifest, Graphs(given.folder, given.manifest)
    with np.load(given.folder / m.identity) as identity:
        style, start = identity["styles"][0], identity["start_latent"]
    cache = np.zeros((m.layers, 2, m.heads, m.history, m.condition_width // m.heads), np.float32)
    latents = np.zeros((m.decode_window, m.latent_width), np.float32)
    latents[-1] = start
    template = np.zeros(3 * m.n_vertices, np.float32)
    worst = largest = 0.0
    frames = list(
        stream_frames(
            given.model, base.features[:PARITY_FRAMES], base.noise, 0, base.table, m.history, m.decode_window
        )
    )
    ours_latents = torch.cat(
        [given.model.autoencoder.start_latent()[None], torch.stack([f[1] for f in frames])]
    )
    mine = Released(given.model, base.table, base.features, base.noise, ours_latents)
    for i in range(PARITY_FRAMES):
        vertices, cache, latents = graphs.run(
            "frame",
            audio_feature=base.features[i].numpy(),
            noise=base.noise[i].numpy(),
            style=style,
            position=np.array(i % m.period),
            valid_frames=np.array(i),
            valid_latents=np.array(i + 1),
            template=template,
            kv_cache=cache,
            latents=latents,
            active=np.array(True),
        )
        # The release's decoder also sees the start latent, as ours does while the window has room.
        wanted = mine.streaming_frame(i)[0].numpy().reshape(-1, 3)
        worst = max(worst, float(np.abs(vertices - wanted).max()))
        largest = max(largest, float(np.abs(wanted).max()))
    if not worst <= PARITY * largest:
        raise ParityError(
            f"{given.preset}: graphs and released algorithm differ by {worst / largest:.1e} of the motion "
            f"(bound {PARITY:.0e}): nothing was timed."
        )
    return worst / largest


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
        constant = {stage: float(np.median([row[stage] for row in offline])) for stage in offline[0]}
        constant["vq_decoder"] = decoding_s
        whole = np.full(frames, sum(constant.values()) + encoder_s)
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
