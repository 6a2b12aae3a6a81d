"""Recorded talking faces in the release's folder layout: a licensed copy of VOCASET or BIWI, or anything like it.

    DIR/vertices_npy/<subject>_<sentence>.npy   [T, 3V] (or [T, V, 3]), at the data set's own frame rate
    DIR/wav/<subject>_<sentence>.wav            any rate, any number of channels
    DIR/templates.pkl                           pickled dict: subject to neutral vertices [V, 3] (or [3V])

A sentence's number is the number that ends its file's name: `sentence07`, `e07` and `07` are all sentence 7.
Vertices stay on disk until a clip is asked for: BIWI's are 6 GB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import soxr
import yaml
from numpy.typing import NDArray
from scipy.io import wavfile

from streamtalk_export.config import SAMPLE_RATE, SPEAKERS, ModelConfig
from streamtalk_export.errors import ExportError
from streamtalk_export.templates import read_pickle, read_templates

Floats = NDArray[np.float32]

SHORTEST_FRAMES = 2  # below it there is no movement


class RecordedDataError(ExportError):
    """A data set that lacks files, or whose files do not fit the layout or the configuration."""


@dataclass(frozen=True)
class Split:
    """Which sentences of which subjects; subjects of `train` are in one-hot order."""

    subjects: tuple[str, ...]
    sentences: frozenset[int]


@dataclass(frozen=True)
class Layout:
    """A data set's stored frame rate and its splits; those called `test...` are evaluated."""

    stored_fps: int
    splits: Mapping[str, Split]


def _numbers(first: int, last: int) -> frozenset[int]:
    return frozenset(range(first, last + 1))


_VOCASET_VAL = ("FaceTalk_170811_03275_TA", "FaceTalk_170908_03277_TA")
_VOCASET_TEST = ("FaceTalk_170809_00138_TA", "FaceTalk_170731_00024_TA")
_BIWI_UNSEEN = ("F1", "F5", "F6", "F7", "F8", "M1", "M2", "M6")

LAYOUTS = {
    "vocaset": Layout(
        stored_fps=60,
        splits={
            "train": Split(SPEAKERS["vocaset"], _numbers(1, 40)),
            "val": Split(_VOCASET_VAL, _numbers(21, 40)),
            "test": Split(_VOCASET_TEST, _numbers(21, 40)),
        },
    ),
    "biwi": Layout(
        stored_fps=25,
        splits={
            "train": Split(SPEAKERS["biwi"], _numbers(1, 32)),
            "val": Split(SPEAKERS["biwi"], _numbers(33, 36)),
            "test_a": Split(SPEAKERS["biwi"], _numbers(37, 40)),
            "test_b": Split(_BIWI_UNSEEN, _numbers(37, 40)),
        },
    ),
}
"""The splits that FaceFormer (Fan et al. 2022) introduced and papers since compare on."""


class _SplitEntry(msgspec.Struct, forbid_unknown_fields=True):
    subjects: tuple[str, ...]
    sentences: int | str


def read_splits(path: Path) -> dict[str, Split]:
    """Splits from YAML: `train: {subjects: [a, b], sentences: 1-30}`, and so on. Raises RecordedDataError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = msgspec.convert(document, dict[str, _SplitEntry])
        splits = {name: Split(e.subjects, _sentences(str(e.sentences))) for name, e in entries.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError, ValueError) as error:
        raise RecordedDataError(
            f"{path} names no splits: {error}. Expected lines such as "
            "`train: {subjects: [ann, bob], sentences: 1-30}`."
        ) from error
    if "train" not in splits or not any(name.startswith("test") for name in splits):
        raise RecordedDataError(
            f"{path} names {', '.join(splits) or 'nothing'}; expected `train`, at least one `test...` and, "
            "where there is one, `val`."
        )
    return splits


def _sentences(text: str) -> frozenset[int]:
    """`1-30`, `7` or `1-4,9` as numbers."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers |= _numbers(int(first), int(last or first))
    return frozenset(numbers)


@dataclass(frozen=True)
class Recording:
    """One clip on disk."""

    subject: str
    sentence: int
    vertices: Path
    wav: Path

    @property
    def name(self) -> str:
        return self.vertices.stem


@dataclass(frozen=True)
class RecordedSet:
    """A checked data set. `speakers` are the training subjects in one-hot order; `templates` are [3V] each;
    every `stride`-th stored frame is taken; `unpaired` names files without their partner, which are left out."""

    folder: Path
    config: ModelConfig
    speakers: tuple[str, ...]
    templates: Mapping[str, Floats]
    splits: Mapping[str, tuple[Recording, ...]]
    stride: int
    unpaired: tuple[str, ...]

    def motion(self, recording: Recording) -> Floats:
        """Vertex offsets from the subject's template: [L, 3V] at the configuration's frame rate."""
        stored = np.load(recording.vertices, mmap_mode="r")
        vertices = np.asarray(stored[:: self.stride], np.float32).reshape(-1, self.config.vq.n_vert)
        if not np.isfinite(vertices).all():
            raise RecordedDataError(f"{recording.vertices} holds values that are not finite.")
        return vertices - self.templates[recording.subject]

    def pcm(self, recording: Recording) -> Floats:
        """The clip's sound as mono [n] at 16 kHz."""
        return read_wav(recording.wav)


def read_wav(path: Path) -> Floats:
    """A WAV file as mono [n] at 16 kHz, full scale 1. Raises RecordedDataError."""
    try:
        rate, stored = wavfile.read(path)
    except (OSError, ValueError) as error:
        raise RecordedDataError(f"{path} is not a readable WAV file: {error}") from error
    pcm = np.asarray(stored, np.float64)
    if stored.dtype == np.uint8:
        pcm = (pcm - 128) / 128
    elif stored.dtype.kind == "i":
        pcm /= -float(np.iinfo(stored.dtype).min)
    if pcm.ndim == 2:
        pcm = pcm.mean(1)
    if len(pcm) == 0 or not np.isfinite(pcm).all():
        raise RecordedDataError(f"{path} is empty or holds values that are not finite.")
    if rate != SAMPLE_RATE:
        pcm = soxr.resample(pcm, rate, SAMPLE_RATE)
    return np.asarray(pcm, np.float32)


def open_recorded(
    layout: Layout, folder: Path, config: ModelConfig, splits: Mapping[str, Split] | None = None
) -> RecordedSet:
    """Check the data set in `folder` and return it; `splits` replace the layout's own.

    Raises RecordedDataError that lists everything that is missing or does not fit, all at once.
    """
    splits = splits or layout.splits
    problems: list[str] = []
    if layout.stored_fps % config.fps:
        problems.append(
            f"the layout stores {layout.stored_fps} frames a second and the configuration wants {config.fps}, "
            "no whole part of it"
        )
    speakers = splits["train"].subjects
    if len(speakers) != config.predictor.id_dim:
        problems.append(
            f"`train` names {len(speakers)} subjects and the configuration has id_dim {config.predictor.id_dim}"
        )
    problems += [
        f"no {wanted.relative_to(folder)} in {folder}"
        for wanted in (folder / "vertices_npy", folder / "wav", folder / "templates.pkl")
        if not wanted.exists()
    ]
    subjects = list(dict.fromkeys(subject for split in splits.values() for subject in split.subjects))
    templates: dict[str, Floats] = {}
    if (folder / "templates.pkl").exists():
        try:
            templates = _templates(folder / "templates.pkl", subjects, config.n_vertices)
        except ExportError as error:
            problems.append(str(error))
        else:
            if missing := [subject for subject in subjects if subject not in templates]:
                problems.append(f"templates.pkl has no {listed(missing)}")
    stride = max(layout.stored_fps // config.fps, 1)
    recordings, unpaired = _recordings(folder)
    problems += _misfits(recordings, subjects, stride, config.vq.n_vert)
    chosen: dict[str, tuple[Recording, ...]] = {}
    for name, split in splits.items():
        chosen[name] = tuple(
            r for r in recordings if r.subject in split.subjects and r.sentence in split.sentences
        )
        found = {recording.subject for recording in chosen[name]}
        if absent := [subject for subject in split.subjects if subject not in found]:
            problems.append(f"`{name}` has no clip (vertices and sound) of {listed(absent)}")
    if problems:
        raise RecordedDataError(
            f"{folder} cannot be used:\n  " + "\n  ".join(problems) + "\nOther subjects and sentences than "
            "the layout's are named with --subjects FILE."
        )
    return RecordedSet(folder, config, speakers, templates, chosen, stride, unpaired)


def _templates(path: Path, subjects: Sequence[str], n_vertices: int) -> dict[str, Floats]:
    """Templates [3V] of those `subjects` that the pickle holds."""
    held = read_pickle(path)
    known = [subject for subject in subjects if subject in held]
    if not known:
        return {}
    faces = read_templates(path, n_vertices, len(known), known).vertices
    return {subject: face.reshape(-1) for subject, face in zip(known, faces, strict=True)}


def _recordings(folder: Path) -> tuple[list[Recording], tuple[str, ...]]:
    """All clips that have both files, in the order of their names, and the names of files that do not."""
    vertices = {path.stem: path for path in sorted((folder / "vertices_npy").glob("*.npy"))}
    sounds = {path.stem: path for path in sorted((folder / "wav").glob("*.wav"))}
    recordings, unpaired = [], [f"wav/{name}.wav" for name in sounds if name not in vertices]
    for name, path in vertices.items():
        named = re.fullmatch(r"(.+)_\D*(\d+)", name)
        if name not in sounds:
            unpaired.append(f"vertices_npy/{name}.npy")
        elif named is not None:
            recordings.append(Recording(named[1], int(named[2]), path, sounds[name]))
    return recordings, tuple(unpaired)


def _misfits(recordings: Iterable[Recording], subjects: Sequence[str], stride: int, width: int) -> list[str]:
    """What is wrong with the vertex files of `subjects`, from their headers alone."""
    problems = []
    for recording in recordings:
        if recording.subject not in subjects:
            continue
        path = Path(recording.vertices.parent.name) / recording.vertices.name
        try:
            stored = np.load(recording.vertices, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            problems.append(f"{path} is not a readable array: {error}")
            continue
        shape, kind = list(stored.shape), stored.dtype
        if kind.kind != "f" or len(shape) not in (2, 3) or int(np.prod(shape[1:])) != width:
            problems.append(f"{path} is {shape} ({kind}); the configuration wants [T, {width}] floats")
        elif -(-shape[0] // stride) < SHORTEST_FRAMES:
            problems.append(f"{path} holds {shape[0]} frames; expected at least {stride * SHORTEST_FRAMES}")
    return problems if len(problems) <= 8 else [*problems[:8], f"and {len(problems) - 8} more such files"]


def listed(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
