"""Limits of the lips on a voice: `python -m streamtalk_training.limits --help`.

Correlations with the labels, control by control, of two readouts that are fitted to the voice itself (four folds over
its clips), to compare with the model, which was not trained on it:

- `features`: a linear map from the model's audio features, two frames around. Where it is no better than the model, the
  audio encoder is the limit, and neither predictor, head, codes nor decoder.
- `sound`: a small network on log-mel power, 150 ms back and 90 ms ahead. Its correlation is certainly in the sound and
  in the labels: below it, more or other voices would help; at it, only more lookahead or better labels.

With `--jitter` instead, trembling in sustained vowels (`metrics.tremble`): the energy of each shape, and of frames
by their distance from the vowel's nearer end, beside the labels' own. With `--flite` instead, closures of the
voices that it learned from, beside one that it was not trained on: all on the same sentences, new to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from streamtalk import StreamTalkError
from streamtalk import Talker as RuntimeTalker
from streamtalk.backends.onnxruntime import NAME as CPU
from streamtalk.model import read_manifest
from streamtalk_export.config import SAMPLE_RATE, load_config
from streamtalk_export.errors import ExportError
from streamtalk_export.excerpt import Excerpt
from streamtalk_export.mel import MelEncoder
from streamtalk_export.parity import Stages, read_identity
from streamtalk_training import metrics
from streamtalk_training.clips import render
from streamtalk_training.coarticulation import controls_from_weights
from streamtalk_training.corpus import TEST_HOURS, CorpusPlan, planned_clips, speaker
from streamtalk_training.evaluate import QUICK, Extent, from_clip, read_sources
from streamtalk_training.face import Face, load_face
from streamtalk_training.face_source import DEFAULT_CACHE
from streamtalk_training.scores import Pair, Speech, agreement, pairs, speech_scores
from streamtalk_training.streaming import Reader, exported
from streamtalk_training.talker import Talker
from streamtalk_training.visemes import tables
from streamtalk_training.voices import TEST_FLITE_VOICE, TRAIN_FLITE_VOICES, Engines, find_engines

Floats = NDArray[np.float32]
Fitted = Callable[[Floats], Floats]

FOLDS = 4
AROUND = 2  # frames on either side
RIDGE = 0.01  # of the features' mean variance
MEL_BACK, MEL_AHEAD, MEL_HOP = 15, 9, 160
EPOCHS, BATCH = 25, 256
MOST_TREMBLING = 8  # shapes that the table shows


def encoder_features(folder: Path, pcm: Floats) -> Floats:
    """Audio features [L, A] of `pcm` [n], as the runtime computes them."""
    manifest = read_manifest(folder)
    identity = read_identity(folder, manifest)
    stages = Stages(folder, manifest, identity["start_latent"])
    frames = manifest.clock.frames_in(len(pcm))
    padded = np.pad(pcm, (0, manifest.window_samples))  # silence for the last frames' lookahead
    excerpt = replace(Excerpt.make(manifest, frames, identity), pcm=padded)
    windows = (excerpt.window(manifest, first) for first in range(0, frames, manifest.hop))
    features = [stages.run("audio_encoder", pcm=window)[0] for window in windows]
    return np.asarray(np.concatenate(features)[:frames], np.float32)


def log_mel(encoder: MelEncoder, pcm: Floats, frames: int, fps: float) -> Floats:
    """Log-mel power around each of `frames` frames: [L, bins * (MEL_BACK + 1 + MEL_AHEAD)]."""
    padded = torch.from_numpy(np.pad(pcm, SAMPLE_RATE))[None]
    mel = encoder.log_mel(padded)[0].T.numpy()
    middle = np.round((np.arange(frames) * SAMPLE_RATE / fps + SAMPLE_RATE - 200) / MEL_HOP).astype(int)
    return np.stack([mel[middle + k] for k in range(-MEL_BACK, MEL_AHEAD + 1)], 1).reshape(frames, -1)


def neighbours(features: Floats) -> Floats:
    """[L, A] as [L, A * (2 * AROUND + 1) + 1]: frames around, and a constant."""
    padded = np.pad(features, ((AROUND, AROUND), (0, 0)), mode="edge")
    parts = [padded[k : k + len(features)] for k in range(2 * AROUND + 1)]
    return np.concatenate([*parts, np.ones((len(features), 1), np.float32)], 1)


def linear(inputs: Floats, wanted: Floats) -> Fitted:
    """Ridge regression of `wanted` [L, n] on `inputs` [L, m]."""
    a, b = inputs.astype(np.float64), wanted.astype(np.float64)
    ridge = RIDGE * len(a) * float(a.var(0).mean()) * np.eye(a.shape[1])
    weights = np.linalg.solve(a.T @ a + ridge, a.T @ b).astype(np.float32)
    return lambda x: x @ weights


def network(inputs: Floats, wanted: Floats) -> Fitted:
    """Two hidden layers with dropout, from `inputs` [L, m] to `wanted` [L, n]; seeded."""
    torch.manual_seed(0)
    mean, deviation, unit = inputs.mean(0), inputs.std(0) + 1e-3, wanted.std(0) + 1e-6
    x, y = torch.from_numpy((inputs - mean) / deviation), torch.from_numpy(wanted / unit)
    net = nn.Sequential(
        *(nn.Dropout(0.2), nn.Linear(x.shape[1], 256), nn.ReLU()),
        *(nn.Dropout(0.4), nn.Linear(256, 128), nn.ReLU()),
        *(nn.Dropout(0.3), nn.Linear(128, y.shape[1])),
    )
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.03)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(x)), BATCH):
            noisy = x[rows] + 0.2 * torch.randn_like(x[rows])
            loss = (net(noisy) - y[rows]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        decay.step()
    net.eval()

    def fitted(heard: Floats) -> Floats:
        with torch.no_grad():
            return np.asarray(net(torch.from_numpy((heard - mean) / deviation)).numpy() * unit, np.float32)

    return fitted


def cross_fitted(
    inputs: Sequence[Floats], wanted: Sequence[Floats], fit: Callable[[Floats, Floats], Fitted]
) -> list[float]:
    """Correlation of each column of `wanted` with what a readout, fitted to the other folds' clips, makes of it."""
    made: list[Floats] = [np.empty(0, np.float32)] * len(inputs)
    folds = min(FOLDS, len(inputs))
    for fold in range(folds):
        others = [index for index in range(len(inputs)) if index % folds != fold]
        fitted = fit(np.concatenate([inputs[i] for i in others]), np.concatenate([wanted[i] for i in others]))
        for index in range(fold, len(inputs), folds):
            made[index] = fitted(inputs[index])
    got, true = np.concatenate(made), np.concatenate(wanted)
    return [float(np.corrcoef(got[:, k], true[:, k])[0, 1]) for k in range(true.shape[1])]


def limits(folder: Path, encoder: MelEncoder, clips: Sequence[Speech], fps: float) -> dict[str, list[float]]:
    """Correlation by control of each readout, on one voice's clips. Raises ValueError for fewer than two."""
    if len(clips) < 2:
        raise ValueError(f"{len(clips)} clips: a readout is fitted to some and tried on others")
    controls = [controls_from_weights(clip.weights) for clip in clips]
    features = [encoder_features(folder, clip.pcm) for clip in clips]
    wanted = [c[: len(f)] for c, f in zip(controls, features, strict=True)]
    mels = [log_mel(encoder, clip.pcm, len(w), fps) for clip, w in zip(clips, wanted, strict=True)]
    return {
        "features": cross_fitted([neighbours(f) for f in features], wanted, linear),
        "sound": cross_fitted(mels, wanted, network),
    }


def trembling_shapes(pairs: Sequence[Pair], face: Face, fps: float) -> tuple[Floats, Floats]:
    """Energy (m^2) above 6 Hz that each of the 52 shapes alone gives the lips in sustained vowels: of the model and
    of the labels, [52] each."""
    reach = np.sqrt(np.square(face.blendshapes[:, face.lips].astype(np.float32)).sum(-1).mean(1))
    energies = np.zeros((2, len(reach)), np.float32)
    for pair in pairs:
        frames = metrics.sustained_frames(len(pair.predicted), pair.speech.phones, fps)
        for side, track in enumerate((pair.predicted, pair.true)):
            moved = (track.weights * reach)[:, None]
            energies[side] += [metrics.tremble(moved[..., [i]], frames, fps) for i in range(len(reach))]
    return energies[0], energies[1]


def trembling_depths(pairs: Sequence[Pair], fps: float) -> list[tuple[int, float, float]]:
    """Whole frames from the nearer end of a sustained vowel, and the RMS (m) of what is faster than 6 Hz in the lips
    there, of the model and of the labels."""
    found: dict[int, list[float]] = {}
    for pair in pairs:
        depth = np.full(len(pair.predicted), -1)
        for phone in metrics.sustained(pair.speech.phones):
            start, end = phone.start_s * fps, phone.end_s * fps
            frames = np.arange(int(np.ceil(start)), min(int(end) + 1, len(depth)))
            depth[frames] = np.minimum(frames - start, end - frames).astype(int)
        for steps in set(depth[depth >= 0].tolist()):
            row = found.setdefault(steps, [0.0, 0.0, 0.0])
            row[0] += int((depth == steps).sum())
            for side, track in enumerate((pair.predicted, pair.true)):
                row[1 + side] += metrics.tremble(track.lips, depth == steps, fps)
    return [
        (steps, float(np.sqrt(ours / count)), float(np.sqrt(labels / count)))
        for steps, (count, ours, labels) in sorted(found.items())
    ]


def print_jitter(folder: Path, face: Face, splits: Mapping[str, Sequence[Speech]], fps: float) -> None:
    """Both tables of what trembles. Raises StreamTalkError."""
    reader, talker = Reader(face), RuntimeTalker.load(folder, CPU)
    for split, clips in splits.items():
        done = pairs(reader, talker, clips)
        ours, labels = trembling_shapes(done, face, fps)
        print(f"\n| {split}: shape | share of the model's | times the labels' |\n|---|---:|---:|")
        for index in np.argsort(-ours)[:MOST_TREMBLING]:
            name, times = (
                face.blendshape_names[index],
                ours[index] / max(labels[index], np.finfo(np.float32).tiny),
            )
            print(f"| {name} | {ours[index] / ours.sum():.2f} | {times:.1f} |")
        print(f"\n| {split}: frames from the vowel's end | model, mm | labels, mm |\n|---:|---:|---:|")
        for steps, model_m, labels_m in trembling_depths(done, fps):
            print(f"| {steps} | {1e3 * model_m:.3f} | {1e3 * labels_m:.3f} |", flush=True)


def flite_speeches(
    engines: Engines, voice: str, clips: int | None = None, hours: float = TEST_HOURS
) -> list[Speech]:
    """The sentences of the split `awb`, at most `clips` of them, spoken by another `voice` of flite. `hours` is how
    much they come to; the first are always the same.

    Raises FileNotFoundError without flite, and OSError where it does not speak.
    """
    if engines.flite is None:
        raise FileNotFoundError("flite was not found: see --debian")
    unvoiced = planned_clips(CorpusPlan(hours=0.0, engines=engines, test_hours=hours))["awb"][:clips]
    specs = [replace(spec, voice=voice) for spec in unvoiced]
    speak = speaker(specs, engines)
    return [from_clip(render(spec, speak, engines.soundfont)) for spec in specs]


def print_closures(folder: Path, face: Face, splits: Mapping[str, Sequence[Speech]], fps: float) -> None:
    """A row for each voice: what the closures came to, and of how many. Raises StreamTalkError."""
    reader, talker = Reader(face), RuntimeTalker.load(folder, CPU)
    print("| voice | /p b m/ | closure recall | false closures | labels' own | close |\n|---|" + "---:|" * 5)
    for voice, clips in splits.items():
        done = pairs(reader, talker, clips)
        ours = speech_scores(done, fps) | agreement(done)
        labels = speech_scores([replace(pair, predicted=pair.true) for pair in done], fps)
        bilabials = sum(phone.viseme == "PBM" for clip in clips for phone in clip.phones)
        figures = (
            ours["closure_recall"],
            ours["false_closures"],
            labels["false_closures"],
            ours["correlation_close"],
        )
        row = " | ".join(f"{value:.3f}" for value in figures)
        print(f"| {voice} | {bilabials} | {row} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; returns the exit code. Problems are one sentence on stderr and code 2."""
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.limits", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/bundled"))
    parser.add_argument("--corpus", type=Path, default=DEFAULT_CACHE / "corpus")
    parser.add_argument("--debian", type=Path, default=DEFAULT_CACHE / "debian")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--jitter", action="store_true", help="what trembles in sustained vowels")
    instead.add_argument(
        "--flite",
        nargs="+",
        choices=(TEST_FLITE_VOICE, *TRAIN_FLITE_VOICES),
        default=(),
        help="closures of these",
    )
    parser.add_argument(
        "--hours",
        type=float,
        default=TEST_HOURS,
        help="of sentences that each of these says; the first are those of `evaluate` (default: %(default)s, which are "
        "all of those)",
    )
    parser.add_argument("--quick", action="store_true", help="a few clips of each split")
    options = parser.parse_args(arguments)
    corpus, debian, cache = (getattr(options, n).expanduser() for n in ("corpus", "debian", "cache"))
    try:
        extent = QUICK if options.quick else Extent()
        engines = find_engines(debian) if options.flite else Engines()
        said = {voice: flite_speeches(engines, voice, extent.clips, options.hours) for voice in options.flite}
        config = load_config(options.model / "config.yaml")
        folder = exported(options.model, cache)
        fps = float(read_manifest(folder).fps)
        if said:
            print_closures(folder, load_face(options.model / "face.npz"), said, fps)
            return 0
        sources = read_sources(corpus, debian, fps, extent)
        if options.jitter:
            print_jitter(folder, load_face(options.model / "face.npz"), sources.splits, fps)
            return 0
        encoder = Talker(config).audio_encoder
        print("| split | readout | " + " | ".join(tables().controls) + " |")
        print("|---|---|" + "---|" * len(tables().controls))
        for split, clips in sources.splits.items():
            for readout, row in limits(folder, encoder, clips, fps).items():
                print(
                    f"| {split} | {readout} | " + " | ".join(f"{value:.3f}" for value in row) + " |",
                    flush=True,
                )
    except (ExportError, StreamTalkError, OSError, ValueError) as error:
        print(f"limits: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
