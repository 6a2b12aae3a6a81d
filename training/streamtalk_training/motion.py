"""Face motion in few numbers: the coordinates that the networks are trained in.

A blendshape face moves linearly in its weights, so a motion of 3V coordinates has no more dimensions than the
shapes in use. Training runs on K such coordinates, chosen so that a plain squared error of coordinates IS the
lip-weighted squared error of all vertices (plus a small share for the weights themselves, lest the small
shapes drown). The mouth's coordinates come first and depend on the mouth's shapes alone, the upper face's
follow, then the clock, which moves nothing: see `dataset.blink_clock`. A trained decoder is widened to 3V exactly,
onto any face that carries the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamtalk_training.coarticulation import HIDDEN_JAW

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

LIP_WEIGHT = 12.0  # of a lip vertex's squared error against any other's
NEARLY_SHUT_M, SHUT_M = 0.003, 0.001
SCALE = 10.0  # brings the coordinates of speech to about unit size, which optimisers expect
BROW_EMPHASIS = 6.0  # brows hardly pass a weight of .2, and would be lost beside blinks of 1
WEIGHT_SHARE = 0.02  # of the mean shape's size: how much an ARKit weight counts besides the vertices it moves


@dataclass(frozen=True)
class MotionSpace:
    """Maps between n ARKit weights and K coordinates, of which the mouth has the first `mouth`.

    `names` are the n shapes in use, the mouth's first. `to_coordinates` [K, n], `to_weights` [n, K].
    `gap_shapes` [n, P, 3] are the vectors, in metres, by which the shapes pull the P lip pairs apart.
    """

    names: tuple[str, ...]
    mouth: int
    to_coordinates: Floats
    to_weights: Floats
    gap_shapes: Floats

    @property
    def width(self) -> int:
        return self.to_coordinates.shape[0]

    @property
    def clock(self) -> int:
        """The coordinate that moves nothing."""
        return len(self.names)

    def save(self, path: Path) -> None:
        """Keep the space beside the weights trained in it: they mean nothing in another one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **vars(self))

    @staticmethod
    def load(path: Path) -> MotionSpace:
        with np.load(path) as stored:
            names = tuple(str(name) for name in stored["names"])
            maps = (stored[name] for name in ("to_coordinates", "to_weights", "gap_shapes"))
            return MotionSpace(names, int(stored["mouth"]), *maps)


def motion_space(
    mouth_names: Sequence[str],
    upper_names: Sequence[str],
    blendshape_names: Sequence[str],
    blendshapes: NDArray[np.floating],
    lips: NDArray[np.integer],
    lip_pairs: NDArray[np.integer],
) -> MotionSpace:
    """The space of two disjoint groups of shapes out of blendshapes [52, V, 3], with lip vertices [m] and lip
    pairs [P, 2] (upper, lower).

    K is n + 1 rounded up to a multiple of three, since the model's config counts vertices. Raises KeyError for a
    shape that the face lacks.
    """
    names = (*mouth_names, *upper_names)
    chosen = _shapes(names, blendshape_names, blendshapes)
    emphasis = np.array([BROW_EMPHASIS if name.startswith("brow") else 1.0 for name in names])
    felt = chosen * emphasis[:, None, None]
    width = -(-(len(names) + 1) // 3) * 3
    to_coordinates = np.zeros((width, len(names)))
    for group in (slice(0, len(mouth_names)), slice(len(mouth_names), len(names))):
        if group.start < group.stop:
            to_coordinates[group, group] = _principal_map(felt[group], lips)
    to_weights = np.linalg.pinv(to_coordinates)
    gap_shapes = chosen[:, lip_pairs[:, 0]] - chosen[:, lip_pairs[:, 1]]
    maps = (np.ascontiguousarray(part, np.float32) for part in (to_coordinates, to_weights, gap_shapes))
    return MotionSpace(names, len(mouth_names), *maps)


def _shapes(names: Sequence[str], face_names: Sequence[str], blendshapes: NDArray[np.floating]) -> Doubles:
    missing = set(names) - set(face_names)
    if missing:
        raise KeyError(f"the face has no shapes {sorted(missing)}; it has {sorted(face_names)}")
    order = list(face_names)
    return np.asarray(blendshapes, np.float64)[[order.index(name) for name in names]]


def _principal_map(shapes: Doubles, lips: NDArray[np.integer]) -> Doubles:
    """[m, m]: from weights of shapes [m, V, 3] to coordinates whose squared sum is the weighted error."""
    importance = np.ones(shapes.shape[1])
    importance[lips] = LIP_WEIGHT
    flat = shapes.reshape(len(shapes), -1)
    metric = (flat * np.repeat(importance, 3)) @ flat.T
    metric += np.eye(len(flat)) * WEIGHT_SHARE * np.trace(metric) / len(flat)
    metric /= np.trace(metric) / len(flat)
    eigenvalues, eigenvectors = np.linalg.eigh(metric)
    return np.asarray(SCALE * (eigenvectors * np.sqrt(eigenvalues)).T[::-1])


def lip_gap_vectors(space: MotionSpace, coordinates: Tensor) -> Tensor:
    """How far motion [..., K] pulls the lip pairs apart: vectors [..., P, 3] in metres."""
    to_gaps = torch.from_numpy(np.einsum("nk,npd->kpd", space.to_weights, space.gap_shapes)).to(coordinates)
    return torch.einsum("...k,kpd->...pd", coordinates, to_gaps)


def lip_gap_loss(space: MotionSpace, predicted: Tensor, true: Tensor, shut_weight: float = 0.0) -> Tensor:
    """Mean length of the error across the lip pairs, in units of 10 mm, of coordinates [..., K].

    Errors count up to five times where the lips are nearly shut: a millimetre decides a closure there, and
    nothing in an open mouth. Where they meet errors count `shut_weight` times more: lips that may have to close do.
    """
    wanted = lip_gap_vectors(space, true)
    error = lip_gap_vectors(space, predicted) - wanted
    gap = wanted.square().sum(-1).sqrt()
    weight = 1 + 4 * torch.exp(-gap / NEARLY_SHUT_M) + shut_weight * torch.exp(-gap / SHUT_M)
    return (error.square().sum(-1).add(1e-10).sqrt() * weight).mean() / 0.01


READINGS: dict[str, dict[str, float]] = {
    "jaw": {"jawOpen": 1},
    "closing": {"mouthClose": 1},
    "press": {"mouthPressLeft": 1, "mouthPressRight": 1},
    "round": {"mouthPucker": 1},
    "funnel": {"mouthFunnel": 1},
    "spread": {"mouthStretchLeft": 1, "mouthStretchRight": 1},
    "upper up": {"mouthUpperUpLeft": 1, "mouthUpperUpRight": 1},
    "lower down": {"mouthLowerDownLeft": 1, "mouthLowerDownRight": 1},
    "f/v": {"mouthRollLower": 1, "mouthPressLeft": -0.1, "mouthPressRight": -0.1},
    "tongue": {"tongueOut": 1},
}
"""What the mouth does in ten linear readings of ARKit weights, up to scale; compare
`coarticulation.controls_from_weights`, whose `close` is a ratio."""


def control_readings(names: Sequence[str]) -> Floats:
    """[n, 10]: from weights of the shapes `names` to `READINGS`; a shape that is not there counts nothing."""
    columns = [[shares.get(name, 0.0) for name in names] for shares in READINGS.values()]
    return np.array(columns, np.float32).T


def sealing(space: MotionSpace, coordinates: Tensor) -> Tensor:
    """How far the lips are sealed in motion [..., K]: `coarticulation.controls_from_weights`' `close`, 0 to 1.

    It is a ratio, which the linear readings above miss: a `mouthClose` of .002 is next to nothing beside an open
    jaw, and a tenth of a closure where the jaw rests. 0 everywhere in a space without the two shapes.
    """
    if not {"jawOpen", "mouthClose"} <= set(space.names):
        return torch.zeros_like(coordinates[..., 0])
    rows = torch.from_numpy(space.to_weights).to(coordinates)
    jaw, closing = (coordinates @ rows[space.names.index(name)] for name in ("jawOpen", "mouthClose"))
    return (closing / jaw.clamp(min=HIDDEN_JAW)).clamp(0, 1)


@dataclass(frozen=True)
class FaceMaps:
    """`expand` [3V, K] turns coordinates into vertex offsets in metres on one face, `reduce` [K, 3V] back."""

    expand: Floats
    reduce: Floats


def face_maps(
    space: MotionSpace, blendshape_names: Sequence[str], blendshapes: NDArray[np.floating]
) -> FaceMaps:
    """How `space` moves a face with shapes [52, V, 3]. Raises KeyError for a shape that the face lacks."""
    flat = _shapes(space.names, blendshape_names, blendshapes).reshape(len(space.names), -1).T  # [3V, n]
    expand, reduce = flat @ space.to_weights, space.to_coordinates @ np.linalg.pinv(flat)
    return FaceMaps(np.ascontiguousarray(expand, np.float32), np.ascontiguousarray(reduce, np.float32))


def widened(state: dict[str, Tensor], maps: FaceMaps) -> dict[str, Tensor]:
    """A VQ-VAE's state dict, trained on coordinates [K], turned into the one over vertices [3V].

    Only the first map of the encoder and the last of the decoder touch motion, and both are linear, so decoder and
    start latent stay exact. The encoder no longer hears the clock, which vertices do not show.
    """
    return _translated(state, maps.reduce, maps.expand)


def unwidened(state: dict[str, Tensor], maps: FaceMaps) -> dict[str, Tensor]:
    """A VQ-VAE's state dict over vertices [3V], as `widened` made it, turned back into one over coordinates [K].

    The clock is lost, in the encoder and in the decoder: vertices do not show it.
    """
    return _translated(state, maps.expand, maps.reduce)


def _translated(state: dict[str, Tensor], heard: Floats, shown: Floats) -> dict[str, Tensor]:
    """`state` over m numbers a frame in place of n: `heard` [n, m] maps what comes in, `shown` [m, n] what goes out."""
    first, last = "encoder.vertice_mapping.0.weight", "decoder.vertice_map_reverse"
    translated = dict(state)
    translated[first] = state[first] @ torch.from_numpy(heard)
    for name in (f"{last}.weight", f"{last}.bias"):
        translated[name] = torch.from_numpy(shown) @ state[name]
    return translated
