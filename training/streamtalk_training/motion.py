"""Face motion in few numbers: the coordinates that the networks are trained in.

A blendshape face moves linearly in its weights, so a motion of 3V coordinates has no more dimensions than the
shapes in use. Training runs on K such coordinates, chosen so that a plain squared error of coordinates IS the
lip-weighted squared error of all vertices (plus a small share for the weights themselves, lest the small
shapes drown); a trained model is then widened exactly to 3V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

LIP_WEIGHT = 12.0  # of a lip vertex's squared error against any other's
NEARLY_SHUT_M = 0.003
SCALE = 10.0  # brings the coordinates of speech to about unit size, which optimisers expect
WEIGHT_SHARE = 0.02  # of the mean shape's size: how much an ARKit weight counts besides the vertices it moves


@dataclass(frozen=True)
class MotionSpace:
    """Maps between ARKit weights [n], coordinates [K] and vertex offsets [3V, metres].

    `to_coordinates` [K, n], `to_weights` [n, K], `expand` [3V, K], `reduce` [K, 3V]; `names` are the n shapes
    in use. `gap_shapes` [n, P, 3] are the vectors, in metres, by which they pull the P lip pairs apart.
    """

    names: tuple[str, ...]
    to_coordinates: Floats
    to_weights: Floats
    expand: Floats
    reduce: Floats
    gap_shapes: Floats

    @property
    def width(self) -> int:
        return self.to_coordinates.shape[0]


def motion_space(
    names: Sequence[str],
    blendshape_names: Sequence[str],
    blendshapes: NDArray[np.floating],
    lips: NDArray[np.integer],
    lip_pairs: NDArray[np.integer],
) -> MotionSpace:
    """The space of the shapes `names` out of blendshapes [52, V, 3], with lip vertices [m] and lip pairs
    [P, 2] (upper, lower).

    K is n rounded up to a multiple of three, since the model's config counts vertices. Raises KeyError for a
    shape that the face lacks.
    """
    missing = set(names) - set(blendshape_names)
    if missing:
        raise KeyError(f"the face has no shapes {sorted(missing)}; it has {sorted(blendshape_names)}")
    chosen = np.asarray(blendshapes, np.float64)[[list(blendshape_names).index(name) for name in names]]
    shapes = chosen.reshape(len(names), -1)  # [n, 3V]
    importance = np.ones(chosen.shape[1])
    importance[lips] = LIP_WEIGHT
    metric = (shapes * np.repeat(importance, 3)) @ shapes.T
    metric += np.eye(len(names)) * WEIGHT_SHARE * np.trace(metric) / len(names)
    metric /= np.trace(metric) / len(names)
    eigenvalues, eigenvectors = np.linalg.eigh(metric)
    width = -(-len(names) // 3) * 3
    to_coordinates = np.zeros((width, len(names)))
    to_coordinates[: len(names)] = SCALE * (eigenvectors * np.sqrt(eigenvalues)).T[::-1]
    to_weights = np.linalg.pinv(to_coordinates)
    upper, lower = lip_pairs[:, 0], lip_pairs[:, 1]
    parts = (
        to_coordinates,
        to_weights,
        shapes.T @ to_weights,
        to_coordinates @ np.linalg.pinv(shapes.T),
        chosen[:, upper] - chosen[:, lower],
    )
    return MotionSpace(tuple(names), *(np.ascontiguousarray(part, np.float32) for part in parts))


def lip_gap_vectors(space: MotionSpace, coordinates: Tensor) -> Tensor:
    """How far motion [..., K] pulls the lip pairs apart: vectors [..., P, 3] in metres."""
    to_gaps = torch.from_numpy(np.einsum("nk,npd->kpd", space.to_weights, space.gap_shapes)).to(coordinates)
    return torch.einsum("...k,kpd->...pd", coordinates, to_gaps)


def lip_gap_loss(space: MotionSpace, predicted: Tensor, true: Tensor) -> Tensor:
    """Mean length of the error across the lip pairs, in units of 10 mm, of coordinates [..., K].

    Errors count up to five times where the lips are nearly shut: a millimetre decides a closure there, and
    nothing in an open mouth.
    """
    wanted = lip_gap_vectors(space, true)
    error = lip_gap_vectors(space, predicted) - wanted
    weight = 1 + 4 * torch.exp(-wanted.square().sum(-1).sqrt() / NEARLY_SHUT_M)
    return (error.square().sum(-1).add(1e-10).sqrt() * weight).mean() / 0.01


def widened(state: dict[str, Tensor], space: MotionSpace) -> dict[str, Tensor]:
    """A VQ-VAE's state dict, trained on coordinates [K], turned into the one over vertices [3V]: no error.

    Only the first map of the encoder and the last of the decoder touch motion, and both are linear.
    """
    expand, reduce = torch.from_numpy(space.expand), torch.from_numpy(space.reduce)
    wide = dict(state)
    first = "encoder.vertice_mapping.0.weight"
    last = "decoder.vertice_map_reverse"
    wide[first] = state[first] @ reduce
    wide[f"{last}.weight"] = expand @ state[f"{last}.weight"]
    wide[f"{last}.bias"] = expand @ state[f"{last}.bias"]
    return wide
