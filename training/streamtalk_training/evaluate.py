"""How well a trained talker talks: `python -m streamtalk_training.evaluate --help`.

Every clip is streamed as at run time (silence before its first sample, cached history, newest frame of the
last D latents) and compared with the labels of its phones. Each figure comes with that of the labels
themselves, a ceiling, and with that of a control which hears another clip's audio, a floor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamtalk_export.checkpoint import read_state
from streamtalk_export.config import ModelConfig, load_config
from streamtalk_training import metrics
from streamtalk_training.clips import Clip
from streamtalk_training.coarticulation import ARKIT_INDEX, controls_from_weights
from streamtalk_training.corpus import load_split
from streamtalk_training.dataset import clip_mel, features_at_frames
from streamtalk_training.face import ARKIT_NAMES, Face, load_face, pose
from streamtalk_training.motion import MotionSpace
from streamtalk_training.setup import face_space, narrowed, speaker_gains
from streamtalk_training.talker import Talker, decoded_stream, rollout
from streamtalk_training.visemes import SILENCE, tables

Floats = NDArray[np.float32]
CLIPS_AT_ONCE = 64


@dataclass(frozen=True)
class Motion:
    """One clip as ARKit weights [L, 52]: what the model did, and what the labels ask of its speaker."""

    clip: Clip
    speaker: int
    predicted: Floats
    true: Floats


def load_talker(config: ModelConfig, space: MotionSpace, state: Mapping[str, Tensor]) -> Talker:
    """A talker over motion coordinates from a checkpoint over vertices: `motion.widened` undone."""
    narrow = {name: value.float() for name, value in state.items()}
    first, last = "autoencoder.encoder.vertice_mapping.0.weight", "autoencoder.decoder.vertice_map_reverse"
    narrow[first] = narrow[first] @ torch.from_numpy(space.expand)
    for part in ("weight", "bias"):
        narrow[f"{last}.{part}"] = torch.from_numpy(space.reduce) @ narrow[f"{last}.{part}"]
    talker = Talker(narrowed(config, space)).eval()
    talker.load_state_dict(narrow)
    return talker


@torch.no_grad()
def streamed_motion(
    talker: Talker, pcm: Sequence[Floats], frames: Sequence[int], speakers: Sequence[int], seed: int = 0
) -> list[Floats]:
    """Coordinates [L, K] of each clip, streamed; clips run side by side, padded with silence."""
    longest = max(map(len, pcm))
    padded = torch.from_numpy(np.stack([np.pad(sound, (0, longest - len(sound))) for sound in pcm]))
    features = talker.audio_encoder.from_log_mel(clip_mel(padded, talker.audio_encoder))
    features = features_at_frames(features, max(frames), talker.config.fps)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, max(frames), talker.config.predictor.vq_dim, generator=generator)
    latents = rollout(talker, features, torch.tensor(speakers), noise.expand(len(pcm), -1, -1))
    motion = decoded_stream(talker, latents).numpy()
    return [row[:count] for row, count in zip(motion, frames, strict=True)]


def arkit_motion(space: MotionSpace, coordinates: Floats) -> Floats:
    """ARKit weights [L, 52] of coordinates [L, K]."""
    weights = np.zeros((len(coordinates), len(ARKIT_NAMES)), np.float32)
    weights[:, [ARKIT_INDEX[name] for name in space.names]] = coordinates @ space.to_weights.T
    return weights


def motions(
    talker: Talker,
    space: MotionSpace,
    clips: Sequence[Clip],
    speakers: int,
    shuffled: bool = False,
    seed: int = 0,
) -> list[Motion]:
    """All clips streamed, speakers in turn. `shuffled` clips hear their neighbour's audio instead."""
    gains = speaker_gains(speakers)
    done: list[Motion] = []
    order = sorted(range(len(clips)), key=lambda index: len(clips[index].pcm))  # little padding in a batch
    for start in range(0, len(order), CLIPS_AT_ONCE):
        chosen = order[start : start + CLIPS_AT_ONCE]
        heard = [chosen[(place + shuffled) % len(chosen)] for place in range(len(chosen))]
        who = [index % speakers for index in chosen]
        pcm = [clips[index].pcm for index in heard]
        frames = [len(clips[index].weights) for index in chosen]
        for index, speaker, coordinates in zip(
            chosen, who, streamed_motion(talker, pcm, frames, who, seed), strict=True
        ):
            wanted = clips[index].weights * np.float32(gains[speaker])
            done.append(Motion(clips[index], speaker, arkit_motion(space, coordinates), wanted))
    return done


def speech_scores(
    face: Face, clips: Sequence[Motion], fps: float, predicted: bool = True
) -> dict[str, float]:
    """Closures, false closures and f/v rolls of predictions, or (`predicted` false) of the labels."""
    recall, false, roll = [], [], []
    names = tables().controls
    for motion in clips:
        weights = motion.predicted if predicted else motion.true
        gaps = metrics.lip_gaps(pose(face, weights, motion.speaker), face.lip_pairs)
        closed = metrics.closed_frames(gaps)
        recall.append(metrics.closure_recall(closed, motion.clip.phones, fps))
        false.append(metrics.false_closures(closed, motion.clip.phones, fps))
        lip_roll = controls_from_weights(weights)[:, names.index("fv")]
        roll.append(metrics.roll_rate(lip_roll, motion.clip.phones, fps))
    pools = {"closure_recall": recall, "false_closures": false, "fv_roll": roll}
    return {name: metrics.pooled(shares).value for name, shares in pools.items()}


def motion_scores(face: Face, clips: Sequence[Motion]) -> dict[str, float]:
    """LVE and FDD in mm^2, MOD in mm, control correlations over all clips, and the jaw's lag in frames."""
    lve, fdd, mod = [], [], []
    for motion in clips:
        predicted, true = (pose(face, w, motion.speaker) for w in (motion.predicted, motion.true))
        lve.append(metrics.lip_vertex_error(predicted, true, face.lips) * 1e6)
        template = face.templates[motion.speaker]
        fdd.append(metrics.face_dynamics_deviation(predicted, true, template, face.upper_face) * 1e6)
        mod.append(metrics.mouth_opening_difference(predicted, true, face.lip_pairs) * 1e3)
    predicted = np.concatenate([controls_from_weights(motion.predicted) for motion in clips])
    true = np.concatenate([controls_from_weights(motion.true) for motion in clips])
    scores = {"lve_mm2": float(np.mean(lve)), "fdd_mm2": float(np.mean(fdd)), "mod_mm": float(np.mean(mod))}
    for column, name in enumerate(tables().controls):
        scores[f"correlation_{name}"] = metrics.correlation(predicted[:, column], true[:, column])
    scores["lag_frames"] = metrics.lag_frames(predicted[:, 0], true[:, 0])
    return scores


def silence_scores(face: Face, clips: Sequence[Motion], fps: float) -> dict[str, float]:
    """What the mouth does at least .3 s from any speech: gaps in mm, mean speed of the lips in mm/s."""
    gaps, speeds = [0.0], [0.0]
    for motion in clips:
        times_s = np.arange(len(motion.true)) / fps
        quiet = np.ones(len(times_s), bool)
        for phone in motion.clip.phones:
            if phone.viseme != SILENCE:
                quiet &= (times_s < phone.start_s - 0.3) | (times_s > phone.end_s + 0.3)
        vertices = pose(face, motion.predicted, motion.speaker)
        gap = metrics.lip_gaps(vertices, face.lip_pairs).max(1)
        speed = np.linalg.norm(np.diff(vertices[:, face.lips], axis=0), axis=-1).mean(1) * fps
        gaps += gap[quiet].tolist()
        speeds += speed[quiet[1:] & quiet[:-1]].tolist()
    return {
        "gap_p95_mm": float(np.percentile(gaps, 95)) * 1e3,
        "gap_max_mm": float(np.max(gaps)) * 1e3,
        "lip_speed_mm_s": float(np.mean(speeds)) * 1e3,
    }


def aperture_by_viseme(face: Face, clips: Sequence[Motion], fps: float) -> dict[str, float]:
    """Mean lip gap in mm in the middle of each viseme that the order AA > EH > IY > SZ > PBM names."""
    found: dict[str, list[float]] = {name: [] for name in ("AA", "EH", "IY", "SZ", "PBM")}
    for motion in clips:
        gaps = metrics.lip_gaps(pose(face, motion.predicted, motion.speaker), face.lip_pairs).mean(1)
        for phone in motion.clip.phones:
            middle = round((phone.start_s + phone.end_s) / 2 * fps)
            if phone.viseme in found and middle < len(gaps):
                found[phone.viseme].append(float(gaps[middle]))
    return {name: float(np.mean(values)) * 1e3 for name, values in found.items() if values}


def evaluate(talker: Talker, face: Face, space: MotionSpace, clips: Sequence[Clip]) -> dict[str, object]:
    """All figures of one split, ready for JSON."""
    fps = talker.config.fps
    spoken = [clip for clip in clips if clip.spec.engine != "sounds"]
    speakers = len(face.templates)
    streamed = motions(talker, space, spoken, speakers)
    control = motions(talker, space, spoken, speakers, shuffled=True)
    sounds = [clip for clip in clips if clip.spec.engine == "sounds"]
    quiet = motions(talker, space, sounds, speakers) if sounds else []
    return {
        "clips": len(spoken),
        "minutes": sum(len(clip.pcm) for clip in spoken) / 16000 / 60,
        "model": speech_scores(face, streamed, fps) | motion_scores(face, streamed),
        "labels": speech_scores(face, streamed, fps, predicted=False),
        "shuffled_audio": speech_scores(face, control, fps) | motion_scores(face, control),
        "silence": silence_scores(face, streamed, fps),
        "sounds": silence_scores(face, quiet, fps),
        "aperture_mm": aperture_by_viseme(face, streamed, fps),
    }


def rounded(figures: object) -> object:
    """`figures` with floats to four digits: what is written down should not pretend to more."""
    if isinstance(figures, Mapping):
        return {name: rounded(value) for name, value in figures.items()}
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/bundled"))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--splits", default="test,awb", help="comma-separated; those that exist are used")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the configuration's)")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    config = load_config(options.model / "config.yaml")
    if options.steps:
        config = msgspec.structs.replace(config, steps=options.steps)
    face = load_face(options.model / "face.npz")
    space = face_space(face)
    talker = load_talker(config, space, read_state(options.model / "model.safetensors"))
    figures = {
        split: evaluate(talker, face, space, load_split(options.corpus, split))
        for split in options.splits.split(",")
        if (options.corpus / split).exists()
    }
    text = json.dumps(rounded(figures), indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
