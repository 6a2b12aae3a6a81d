"""Who can speak: the speakers' styles and faces of a model, and blends of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from streamtalk.errors import ModelError, SpeakerError
from streamtalk.model import LANDMARKS, Manifest, verified

Float32 = npt.NDArray[np.float32]
Colors: TypeAlias = npt.NDArray[np.uint8]
SpeakerId: TypeAlias = "str | int"
Speaker: TypeAlias = "SpeakerId | Mapping[SpeakerId, float] | None"


@dataclass(frozen=True)
class Identity:
    """The contents of `identity.npz`; arrays are read-only.

    `styles` [n, E], `templates` [n, V, 3] and `start_latent` [C] are float32; `faces` [F, 3] int32, F = 0
    where the model has no mesh; `colors` [V, 3] uint8 sRGB or None, and `speaker_colors` [n, V, 3] or None
    where all look alike. `landmarks` maps those of `streamtalk.model.LANDMARKS` that the face names to int32
    vertex numbers.
    """

    names: tuple[str, ...]
    styles: Float32
    templates: Float32
    start_latent: Float32
    faces: npt.NDArray[np.int32]
    colors: Colors | None
    speaker_colors: Colors | None = None
    landmarks: Mapping[str, npt.NDArray[np.int32]] = field(default_factory=dict)

    def blend(self, speaker: Speaker) -> tuple[Float32, Float32]:
        """Style [E] and template [V, 3] of a name, an index, or `{name or index: weight}`. None is speaker 0.

        Weights are at least 0 and are divided by their sum. Raises SpeakerError.
        """
        if not isinstance(speaker, Mapping):
            index = 0 if speaker is None else self._index(speaker)
            return self.styles[index], self.templates[index]
        weights = self._weights(speaker)
        style = np.tensordot(weights, self.styles, 1)
        template = np.tensordot(weights, self.templates, 1)
        return style.astype(np.float32), template.astype(np.float32)

    def colors_of(self, speaker: Speaker) -> Colors | None:
        """Colours [V, 3] of a speaker as for `blend`, whose sRGB values are averaged; `colors` where all look
        alike. Raises SpeakerError.
        """
        if self.speaker_colors is None:
            return self.colors
        if isinstance(speaker, Mapping):
            mean = np.tensordot(self._weights(speaker), self.speaker_colors, 1)
            return _frozen(np.rint(mean).astype(np.uint8))
        colors: Colors = self.speaker_colors[0 if speaker is None else self._index(speaker)]
        return colors

    def _weights(self, speaker: Mapping[SpeakerId, float]) -> npt.NDArray[np.float64]:
        """Weights [n] of a blend, which add up to 1."""
        weights = np.zeros(len(self.names), np.float64)
        for name, weight in speaker.items():
            if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
                raise SpeakerError(
                    f"The weight of speaker {name!r} must be a number of at least 0; got {weight!r}."
                )
            weights[self._index(name)] += weight
        if weights.sum() <= 0:
            raise SpeakerError("A blend of speakers needs at least one weight above 0.")
        weights /= weights.sum()
        return weights

    def _index(self, speaker: SpeakerId) -> int:
        known = f"This model knows {', '.join(self.names)} (0 to {len(self.names) - 1})."
        if isinstance(speaker, str):
            if speaker not in self.names:
                raise SpeakerError(f"No speaker {speaker!r}. {known}")
            return self.names.index(speaker)
        if isinstance(speaker, bool) or not isinstance(speaker, (int, np.integer)):
            raise SpeakerError(f"A speaker is a name, an index or a blend of them; got {speaker!r}. {known}")
        if not 0 <= speaker < len(self.names):
            raise SpeakerError(f"No speaker {speaker}. {known}")
        return int(speaker)


def read_identity(directory: Path, manifest: Manifest) -> Identity:
    """Read and check the identity file that `manifest` lists. Raises ModelError."""
    path = verified(directory, manifest.identity, manifest.identity_sha256)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ModelError(f"{path} cannot be read ({error}). Export again.") from error

    names = tuple(str(name) for name in _array(arrays, "speaker_names", path))
    n, n_vertices = len(names), manifest.n_vertices
    if n == 0 or len(set(names)) != n:
        raise ModelError(
            f"{path}: `speaker_names` must be distinct and at least one; it holds {list(names)}."
        )
    faces = _array(arrays, "faces", path)
    if faces.size and (faces.min() < 0 or faces.max() >= n_vertices):
        raise ModelError(f"{path}: `faces` point outside the {n_vertices} vertices. Export again.")
    return Identity(
        names=names,
        styles=_shaped(arrays, "styles", (n, manifest.condition_width), path),
        templates=_shaped(arrays, "templates", (n, n_vertices, 3), path),
        start_latent=_shaped(arrays, "start_latent", (manifest.latent_width,), path),
        faces=_frozen(faces.reshape(-1, 3).astype(np.int32)),
        colors=_colors(arrays, "colors", (n_vertices, 3), path),
        speaker_colors=_colors(arrays, "identity_colors", (n, n_vertices, 3), path),
        landmarks={
            name: _vertex_numbers(arrays[name], name, n_vertices, path)
            for name in LANDMARKS
            if name in arrays
        },
    )


def _colors(arrays: dict[str, Any], name: str, shape: tuple[int, ...], path: Path) -> Colors | None:
    """uint8 sRGB of `shape`; None where the file has none."""
    array = arrays.get(name)
    if array is None or array.size == 0:
        return None
    return _frozen(_checked(array, name, shape, path).astype(np.uint8))


def _vertex_numbers(array: npt.NDArray[Any], name: str, n_vertices: int, path: Path) -> npt.NDArray[np.int32]:
    inside = array.dtype.kind in "iu" and (array.size == 0 or 0 <= array.min() <= array.max() < n_vertices)
    if not inside:
        raise ModelError(f"{path}: `{name}` must be numbers of the {n_vertices} vertices. Export again.")
    return _frozen(array.astype(np.int32))


def _array(arrays: dict[str, Any], name: str, path: Path) -> npt.NDArray[Any]:
    if name not in arrays:
        raise ModelError(f"{path} has no array `{name}`; it holds {sorted(arrays)}. Export again.")
    return np.asarray(arrays[name])


def _checked(array: npt.NDArray[Any], name: str, shape: tuple[int, ...], path: Path) -> npt.NDArray[Any]:
    if array.shape != shape:
        raise ModelError(f"{path}: `{name}` has shape {list(array.shape)}, the manifest says {list(shape)}.")
    return array


def _shaped(arrays: dict[str, Any], name: str, shape: tuple[int, ...], path: Path) -> Float32:
    array = _checked(_array(arrays, name, path), name, shape, path).astype(np.float32)
    if not np.isfinite(array).all():
        raise ModelError(f"{path}: `{name}` holds values that are not finite. Export again.")
    return np.ascontiguousarray(_frozen(array))


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array
