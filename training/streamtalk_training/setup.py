"""What every command needs: the configuration, the face, and clips on disk."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from streamtalk_export.config import ModelConfig, load_config
from streamtalk_training.clips import Clip
from streamtalk_training.corpus import load_split
from streamtalk_training.dataset import MotionData, motion_data
from streamtalk_training.face import Face, load_face
from streamtalk_training.motion import MotionSpace, motion_space

MOUTH_SHAPES = (
    *("jawOpen", "mouthClose", "mouthPressLeft", "mouthPressRight", "mouthStretchLeft", "mouthStretchRight"),
    *("mouthSmileLeft", "mouthSmileRight", "mouthUpperUpLeft", "mouthUpperUpRight", "mouthPucker"),
    *("mouthFunnel", "mouthRollLower", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthRollUpper"),
    *("mouthShrugLower", "tongueOut"),
)
IDLE_SHAPES = ("eyeBlinkLeft", "eyeBlinkRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight")
GAIN_STEP = 0.06  # speakers differ in how far they move their mouths: 1, 1.06, .94, 1.12, ...


@dataclass(frozen=True)
class Setup:
    """A configuration cut down to the motion space of its face, and where clips lie."""

    config: ModelConfig
    face: Face
    corpus: Path
    idle: bool

    @cached_property
    def space(self) -> MotionSpace:
        return face_space(self.face)

    @cached_property
    def gains(self) -> list[float]:
        return speaker_gains(len(self.face.templates))

    def clips(self, split: str) -> list[Clip]:
        return load_split(self.corpus, split)

    def motion(self, split: str) -> MotionData:
        return motion_data(self.clips(split), self.space, self.gains, self.idle)


def face_space(face: Face) -> MotionSpace:
    """The motion space of all shapes that the corpus moves."""
    return motion_space(
        (*MOUTH_SHAPES, *IDLE_SHAPES),
        [str(name) for name in face.blendshape_names],
        face.blendshapes,
        face.lips,
        face.lip_pairs,
    )


def speaker_gains(speakers: int) -> list[float]:
    """How far each speaker moves the mouth, around 1: the style that the style vectors carry."""
    return [float(1 + GAIN_STEP * ((i + 1) // 2) * (-1) ** (i + 1)) for i in range(speakers)]


def narrowed(config: ModelConfig, space: MotionSpace) -> ModelConfig:
    """`config` with motion coordinates in place of vertices."""
    return msgspec.structs.replace(config, vq=msgspec.structs.replace(config.vq, n_vert=space.width))


def add_setup_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("models/bundled/config.yaml"))
    parser.add_argument("--face", type=Path, default=Path("models/bundled/face.npz"))
    parser.add_argument("--corpus", type=Path, required=True, help="what streamtalk_training.corpus made")
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the training run, resumed if it exists"
    )
    parser.add_argument("--idle", action="store_true", help="blinks and brows too")


def setup_from(options: argparse.Namespace) -> Setup:
    face = load_face(options.face)
    config = load_config(options.config)
    return Setup(narrowed(config, face_space(face)), face, options.corpus, options.idle)
