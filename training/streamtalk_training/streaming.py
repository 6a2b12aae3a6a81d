"""The model as it ships: exported, run by the runtime, and reduced frame by frame to what is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamtalk import Frame, ModelError, Talker, model
from streamtalk_export import cli as export_cli
from streamtalk_training import metrics
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.face import Face, pose

Floats = NDArray[np.float32]
Block = tuple[Floats, Floats]  # vertices [L, V, 3] and ARKit weights [L, 52] of some frames

PUSH_SAMPLES = 1600
BLOCK_FRAMES = 256  # so that an hour of vertices never lies in memory
BLINK_SHAPES = ("eyeBlinkLeft", "eyeBlinkRight")


def exported(model: Path, cache: Path) -> Path:
    """The engine folder of a model folder (`model.safetensors`, `config.yaml`, `face.npz`), exported to
    `cache` unless it is there already, made by the same exporter. Raises ExportError and OSError."""
    parts = {name: model / name for name in ("model.safetensors", "config.yaml", "face.npz")}
    out = cache / "engines" / engine_key(parts.values())[:16]
    if not (out / "manifest.json").exists():
        face = str(parts["face.npz"])
        wanted = ["--checkpoint", str(parts["model.safetensors"]), "--config", str(parts["config.yaml"])]
        export_cli.run(
            export_cli.parser().parse_args([*wanted, "--template", face, "--faces", face, "--out", str(out)])
        )
    return out


def engine_key(files: Iterable[Path]) -> str:
    """A hash of all that an export depends on: the model's files, the exporter and its version, and the runtime's
    manifest. An export of yesterday's exporter is not what ships today."""
    package = Path(export_cli.__file__).parent
    key = hashlib.sha256(version("streamtalk").encode())
    for path in (*files, *sorted(package.rglob("*.py")), Path(model.__file__)):
        key.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return key.hexdigest()


@dataclass(frozen=True)
class Track:
    """Some frames of a face, reduced: L frames, P lip pairs, k lip and m upper-face vertices; metres.

    `upper` are squared displacements from rest; `lip_moves` and `face_moves` mean distances that lip vertices
    and all vertices went since the frame before (0 at first). Blinks are taken out of `face_moves`. `farthest` is
    how far from rest any vertex of the whole face stands, nan where one is no number.
    """

    weights: Floats  # [L, 52]
    gaps: Floats  # [L, P]
    lips: Floats  # [L, k, 3]
    upper: Floats  # [L, m]
    lip_moves: Floats  # [L]
    face_moves: Floats  # [L]
    farthest: Floats  # [L]

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, frames: slice) -> Track:
        return Track(*(getattr(self, field.name)[frames] for field in fields(self)))


def end_to_end(tracks: Iterable[Track]) -> Track:
    """Tracks one after another."""
    parts = list(tracks)
    return Track(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Track)))


@dataclass(frozen=True)
class Reader:
    """Reduces frames of `face` to tracks, the model's and the labels' in the same way."""

    face: Face

    def labelled(self, weights: Floats, speaker: int) -> Track:
        """The track of ARKit weights [L, 52]."""
        cuts = range(0, len(weights), BLOCK_FRAMES)
        parts = (weights[cut : cut + BLOCK_FRAMES] for cut in cuts)
        return end_to_end(self.tracks(((pose(self.face, part, speaker), part) for part in parts), speaker))

    def streamed(self, talker: Talker, pcm: Floats, speaker: int, seed: int = 0) -> Track:
        """The track that the runtime makes of `pcm` [n]."""
        return end_to_end(self.tracks(blocks(frames_of(talker, pcm, speaker, seed)), speaker))

    def tracks(self, motion: Iterable[Block], speaker: int) -> Iterator[Track]:
        """The track of each block in a row of them."""
        rest = self.face.templates[speaker]
        before: Block | None = None
        for vertices, weights in motion:
            last = (vertices[:1], weights[:1]) if before is None else before
            steps = np.diff(vertices, axis=0, prepend=last[0])
            turns = np.diff(weights, axis=0, prepend=last[1])
            before = vertices[-1:], weights[-1:]
            away = np.square(vertices - rest).sum(-1)
            yield Track(
                weights,
                metrics.lip_gaps(vertices, self.face.lip_pairs),
                vertices[:, self.face.lips],
                away[:, self.face.upper_face],
                np.linalg.norm(steps[:, self.face.lips], axis=-1).mean(1),
                self._unblinking(steps, turns),
                np.sqrt(away.max(1)),
            )

    def _unblinking(self, steps: Floats, turns: Floats) -> Floats:
        """Mean length [L] of vertex steps [L, V, 3], less what the blink shapes' steps [L, 52] did."""
        columns = [ARKIT_INDEX[name] for name in BLINK_SHAPES]
        blinks = turns[:, columns]
        moved = np.flatnonzero(blinks.any(axis=1))
        lids = self.face.blendshapes[columns].astype(np.float32)
        steps[moved] -= np.tensordot(blinks[moved], lids, axes=1)
        return np.asarray(np.linalg.norm(steps, axis=-1).mean(1), np.float32)


def frames_of(talker: Talker, pcm: Floats, speaker: int, seed: int) -> Iterator[Frame]:
    """Frames of a fresh stream that hears `pcm` [n] and its end."""
    with talker.open(speaker, seed=seed) as stream:
        for start in range(0, len(pcm), PUSH_SAMPLES):
            yield from stream.push(pcm[start : start + PUSH_SAMPLES])
        yield from stream.flush()


def blocks(frames: Iterable[Frame]) -> Iterator[Block]:
    """Copies of the frames, up to `BLOCK_FRAMES` together."""
    vertices: list[Floats] = []
    weights: list[Floats] = []
    for frame in frames:
        if frame.blendshapes is None:
            raise ModelError("This engine has no blendshapes: export it again, with the face that has them.")
        vertices.append(frame.vertices.copy())
        weights.append(frame.blendshapes.copy())
        if len(vertices) == BLOCK_FRAMES:
            yield np.stack(vertices), np.stack(weights)
            vertices, weights = [], []
    if vertices:
        yield np.stack(vertices), np.stack(weights)
