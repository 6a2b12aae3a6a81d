"""What every command needs: the configuration, the motion space, and clips on disk."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from streamtalk_export.config import ModelConfig, load_config
from streamtalk_training.clips import Clip
from streamtalk_training.corpus import load_split
from streamtalk_training.dataset import MotionData, motion_data
from streamtalk_training.face import Face, load_face
from streamtalk_training.motion import FaceMaps, MotionSpace, face_maps, motion_space

MOUTH_SHAPES = (
    *("jawOpen", "mouthClose", "mouthPressLeft", "mouthPressRight", "mouthStretchLeft", "mouthStretchRight"),
    *("mouthSmileLeft", "mouthSmileRight", "mouthUpperUpLeft", "mouthUpperUpRight", "mouthPucker"),
    *("mouthFunnel", "mouthRollLower", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthRollUpper"),
    *("mouthShrugLower", "tongueOut"),
)
UPPER_SHAPES = (
    *("eyeBlinkLeft", "eyeBlinkRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight"),
    *("browDownLeft", "browDownRight"),
)
RECORDED_NOTE = "On VOCASET or BIWI instead: --layout vocaset|biwi --data DIR; see --layout vocaset --help."
GAIN_STEP = 0.06  # speakers differ in how far they move their mouths: 1, 1.06, .94, 1.12, ...


@dataclass(frozen=True)
class Setup:
    """A configuration cut down to its motion space, how that moves the face, and where clips lie."""

    config: ModelConfig
    space: MotionSpace
    maps: FaceMaps
    speakers: int
    corpus: Path

    @cached_property
    def gains(self) -> list[float]:
        return speaker_gains(self.speakers)

    def clips(self, split: str) -> list[Clip]:
        return load_split(self.corpus, split)

    def motion(self, clips: list[Clip]) -> MotionData:
        return motion_data(clips, self.space, self.gains)


def face_space(face: Face) -> MotionSpace:
    """The motion space of all shapes that the model moves."""
    names = [str(name) for name in face.blendshape_names]
    return motion_space(MOUTH_SHAPES, UPPER_SHAPES, names, face.blendshapes, face.lips, face.lip_pairs)


def maps_of(face: Face, space: MotionSpace) -> FaceMaps:
    """How `space` moves `face`."""
    return face_maps(space, [str(name) for name in face.blendshape_names], face.blendshapes)


def kept_space(run: Path, face: Face) -> MotionSpace:
    """The space of the run in folder `run`: the one it began with, else that of `face`, kept from now on.

    A face may be mended while a model trains; what the weights mean must not change with it.
    """
    path = run / "space.npz"
    if not path.exists():
        face_space(face).save(path)
    return MotionSpace.load(path)


def speaker_gains(speakers: int) -> list[float]:
    """How far each speaker moves the mouth, around 1: the style that the style vectors carry."""
    return [float(1 + GAIN_STEP * ((i + 1) // 2) * (-1) ** (i + 1)) for i in range(speakers)]


def narrowed(config: ModelConfig, space: MotionSpace) -> ModelConfig:
    """`config` with motion coordinates in place of vertices."""
    return msgspec.structs.replace(config, vq=msgspec.structs.replace(config.vq, n_vert=space.width))


def recorded_asked_for(arguments: Sequence[str] | None) -> bool:
    """Whether a command line (None: this process's) turns to recorded faces."""
    words = sys.argv[1:] if arguments is None else arguments
    return any(word.partition("=")[0] == "--layout" for word in words)


def add_setup_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("models/bundled/config.yaml"))
    parser.add_argument("--face", type=Path, default=Path("models/bundled/face.npz"))
    parser.add_argument("--corpus", type=Path, required=True, help="what streamtalk_training.corpus made")
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the training run, resumed if it exists"
    )


def setup_from(options: argparse.Namespace) -> Setup:
    face = load_face(options.face)
    space = kept_space(options.run, face)
    config = narrowed(load_config(options.config), space)
    return Setup(config, space, maps_of(face, space), len(face.templates), options.corpus)
