"""ARKit weights out of vertices: the solver that an exported model carries.

A model moves its face within the span of its decoder's last, linear map. Which of the face's shapes lie in that
span is read off the weights, so nothing needs to know what a model was trained on; and a few vertices determine a
motion of few dimensions, so a frame's least squares over ALL vertices becomes one small matrix for those few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamtalk.model import Parity
from streamtalk_export.errors import ExportError
from streamtalk_export.vqvae import VQDecoder

Doubles = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

# Apple's order: https://developer.apple.com/documentation/arkit/arfaceanchor/blendshapelocation
ARKIT_NAMES = tuple(
    "eyeBlinkLeft eyeLookDownLeft eyeLookInLeft eyeLookOutLeft eyeLookUpLeft eyeSquintLeft eyeWideLeft "
    "eyeBlinkRight eyeLookDownRight eyeLookInRight eyeLookOutRight eyeLookUpRight eyeSquintRight eyeWideRight "
    "jawForward jawLeft jawRight jawOpen mouthClose mouthFunnel mouthPucker mouthLeft mouthRight "
    "mouthSmileLeft mouthSmileRight mouthFrownLeft mouthFrownRight mouthDimpleLeft mouthDimpleRight "
    "mouthStretchLeft mouthStretchRight mouthRollLower mouthRollUpper mouthShrugLower mouthShrugUpper "
    "mouthPressLeft mouthPressRight mouthLowerDownLeft mouthLowerDownRight mouthUpperUpLeft mouthUpperUpRight "
    "browDownLeft browDownRight browInnerUp browOuterUpLeft browOuterUpRight cheekPuff cheekSquintLeft "
    "cheekSquintRight noseSneerLeft noseSneerRight tongueOut".split()
)

RANK_TOLERANCE = 1e-3
"""Directions of the last map weaker than this against the strongest are rounding (fp16 weights leave 1e-4)."""
IN_SPAN = 0.02
"""Largest share of a shape, in length, outside the model's span for the model to count as able to make it. Of the
bundled model's shapes those it was trained on have .004 at most, the nearest other .18."""
EXPLAINED = 0.05
"""Largest share of the model's span, in length, outside the shapes in it for these to be all that moves."""
RIDGE = 1e-3
"""What a weight costs beside the error: this share of its shape's length. Shapes that nearly cancel (jawOpen and
mouthClose) then share a motion rather than fight over it; what it costs known weights is tested."""
SPENT = 1e-20
"""A squared length of a coordinate's row in an orthonormal span: rounding."""
LEAST_VERTICES = 96
"""Looked at per frame, or as many as the motion has dimensions: 3 equations and more for each."""


@dataclass(frozen=True)
class WeightMatrix:
    """Weights [52] = `solver` [52, 3m] times the offsets of `vertices` [m], then clipped to [0, 1].

    `shapes` [52, V, 3] are the deltas that the weights belong to, `active` the names of those that are solved
    for; the others' rows are 0.
    """

    shapes: Float32
    vertices: npt.NDArray[np.int32]
    solver: Float32
    active: tuple[str, ...]

    def weights(self, offsets: Doubles) -> Doubles:
        """Clipped weights [L, 52] of offsets [L, V, 3]."""
        seen = offsets[:, self.vertices].reshape(len(offsets), -1)
        return np.clip(seen @ self.solver.T.astype(np.float64), 0.0, 1.0)

    def save(self, path: Path) -> None:
        """Write the file that the runtime reads."""
        np.savez(path, names=np.array(ARKIT_NAMES), vertices=self.vertices, solver=self.solver)

    def error(self, offsets: Doubles, metres_per_unit: float) -> list[Parity]:
        """How far vertices rebuilt from the clipped weights lie from the model's own: offsets [L, V, 3]."""
        made = np.tensordot(self.weights(offsets), self.shapes, 1)
        distance_mm = np.linalg.norm(made - offsets, axis=-1) * 1000 * metres_per_unit
        figures = {
            "rebuilt_vertices_max_mm": float(distance_mm.max()),
            "rebuilt_vertices_rms_mm": float(np.sqrt(np.square(distance_mm).mean())),
        }
        return [
            Parity(graph="blendshapes", measure=name, frames=len(offsets), value=value, bound=None)
            for name, value in figures.items()
        ]


def arkit_shapes(names: Sequence[str], deltas: npt.NDArray[np.floating], where: Path) -> Float32:
    """A face file's shapes [n, V, 3] in Apple's order, [52, V, 3]: 0 for one that the file lacks, and without
    those that ARKit does not know. Raises ExportError where names are double or nothing is left.
    """
    known = {name: delta for name, delta in zip(names, deltas, strict=True) if name in ARKIT_NAMES}
    nothing = np.zeros(deltas.shape[1:], np.float32)
    shapes = np.stack([known.get(name, nothing) for name in ARKIT_NAMES]).astype(np.float32)
    if len(set(names)) < len(names) or not shapes.any():
        raise ExportError(
            f"{where}: expected shapes with distinct ARKit names such as jawOpen, not all 0; got "
            f"{', '.join(names[:4])} ..."
        )
    return shapes


def weight_matrix(shapes: Float32, decoder: VQDecoder) -> WeightMatrix:
    """The solver of `shapes` [52, V, 3] for the motions that `decoder` can make, whatever the face at rest.

    Only the shapes in the decoder's span are solved for. Where these do not make up its motions (a decoder
    trained on captured vertices), all shapes share them out.
    """
    last = decoder.vertice_map_reverse
    columns = np.column_stack([last.weight.detach().numpy(), last.bias.detach().numpy()]).astype(np.float64)
    span, strength = _span(columns)
    deltas = shapes.reshape(len(shapes), -1).astype(np.float64)
    lengths = np.linalg.norm(deltas, axis=1)
    outside = np.linalg.norm(deltas - (deltas @ span) @ span.T, axis=1)
    active = np.flatnonzero((lengths > 0) & (outside <= IN_SPAN * lengths))
    if not _explains(deltas[active], span * strength):
        active = np.flatnonzero(lengths > 0)
    chosen = deltas[active]
    cost = np.diag((RIDGE * lengths[active]) ** 2)
    all_vertices = np.linalg.solve(chosen @ chosen.T + cost, chosen)
    vertices = _telling_vertices(span, max(LEAST_VERTICES, span.shape[1]))
    rows = (3 * vertices[:, None] + np.arange(3)).reshape(-1)
    solver = np.zeros((len(deltas), len(rows)), np.float32)
    solver[active] = all_vertices @ span @ np.linalg.pinv(span[rows])
    return WeightMatrix(shapes, vertices.astype(np.int32), solver, tuple(ARKIT_NAMES[i] for i in active))


def _span(columns: Doubles) -> tuple[Doubles, Doubles]:
    """Orthonormal directions [3V, r] that `columns` [3V, k] move in, and how strongly [r]."""
    left, strength, _ = np.linalg.svd(columns, full_matrices=False)
    kept = strength > RANK_TOLERANCE * strength[0]
    return left[:, kept], strength[kept]


def _explains(deltas: Doubles, motions: Doubles) -> bool:
    """Whether shapes [n, 3V] make up `motions` [3V, r] but for EXPLAINED of them."""
    basis, _ = np.linalg.qr(deltas.T)
    left_over = motions - basis @ (basis.T @ motions)
    return bool(np.linalg.norm(left_over) <= EXPLAINED * np.linalg.norm(motions))


def _telling_vertices(span: Doubles, count: int) -> npt.NDArray[np.int64]:
    """At most `count` vertices from which a motion in `span` [3V, r] follows well, sorted.

    QR with column pivoting (Businger and Golub 1965) over the coordinates, again and again over those that are
    left: each pass takes r coordinates that tell the r directions apart.
    """
    left = span.copy()  # the coordinates of vertices that are not chosen yet
    chosen: set[int] = set()
    while len(chosen) < count and left.any():
        untold = left.copy()
        for _ in range(span.shape[1]):
            sizes = np.einsum("ir,ir->i", untold, untold)
            row = int(sizes.argmax())
            if sizes[row] <= SPENT or len(chosen) == count:
                break
            chosen.add(row // 3)
            direction = untold[row] / np.sqrt(sizes[row])
            untold -= np.outer(untold @ direction, direction)
        left.reshape(-1, 3, span.shape[1])[sorted(chosen)] = 0
        left[np.einsum("ir,ir->i", left, left) <= SPENT] = 0
    return np.array(sorted(chosen), np.int64)
