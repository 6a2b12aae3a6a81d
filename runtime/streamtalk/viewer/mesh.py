"""What is drawn: a mesh whose vertices move, and its smooth normals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamtalk.errors import ModelError

CLAY = (205, 182, 168)
"""sRGB colour of a mesh that comes without colours."""

SHORTEST = 1e-20
"""Below this a normal has no direction (degenerate triangles). Far under a square micrometre."""


@dataclass(frozen=True)
class Mesh:
    """A checked mesh. Y is up and Z comes towards the viewer, in any unit.

    template: [V, 3] float32, the face at rest. faces: [F, 3] int32, wound counter-clockwise seen from
    outside; F = 0 means a cloud of points. colors: [V, 3] uint8 sRGB.
    """

    template: NDArray[np.float32]
    faces: NDArray[np.int32]
    colors: NDArray[np.uint8]

    @classmethod
    def check(cls, template: ArrayLike, faces: ArrayLike | None, colors: ArrayLike | None) -> Mesh:
        """Build a mesh from arrays of any integer or float type, or raise ModelError.

        Faces that are wound the other way round are turned. Colours default to clay.
        """
        rest = np.ascontiguousarray(template, np.float32)
        if rest.ndim != 2 or rest.shape[1] != 3 or not len(rest) or not np.isfinite(rest).all():
            bad = int(rest.size - np.isfinite(rest).sum())
            raise ModelError(
                f"A face to draw needs a finite template [V, 3]; got {rest.shape} with {bad} NaN or inf. "
                "Pass the resting vertices that the frames belong to."
            )
        if faces is None or not np.size(faces):
            triangles = np.empty((0, 3), np.int32)
        else:
            given = np.asarray(faces)
            if given.ndim != 2 or given.shape[1] != 3 or given.dtype.kind not in "iu":
                raise ModelError(
                    f"Faces are integer triangles [F, 3]; got {given.dtype} {given.shape}. "
                    "Split polygons into triangles, or pass None to draw points."
                )
            if int(given.min()) < 0 or int(given.max()) >= len(rest):
                raise ModelError(
                    f"The faces name vertices {int(given.min())} to {int(given.max())}, the template has "
                    f"0 to {len(rest) - 1}. Pass the faces and the template of the same face."
                )
            triangles = _outward(rest, np.ascontiguousarray(given, np.int32))
        if colors is None:
            paint = np.broadcast_to(np.array(CLAY, np.uint8), rest.shape).copy()
        else:
            paint = np.ascontiguousarray(colors)
            if paint.shape != rest.shape or paint.dtype != np.uint8:
                raise ModelError(
                    f"Colours are uint8 {rest.shape}, one a vertex; got {paint.dtype} {paint.shape}. "
                    "Pass None for the default colour."
                )
        return cls(rest, triangles, paint)

    def frame(self, vertices: ArrayLike) -> NDArray[np.float32]:
        """One frame's vertices [V, 3] as contiguous float32 (no copy if they are), or ModelError."""
        array = np.ascontiguousarray(vertices, np.float32)
        if array.shape != self.template.shape:
            raise ModelError(
                f"This face has vertices {self.template.shape}; a frame came with {array.shape}. "
                "Open the viewer with the template of the model that makes the frames."
            )
        return array


class SmoothNormals:
    """Area-weighted vertex normals, computed into buffers that are allocated once.

    Without faces a vertex's normal points away from the centre of the cloud, which lights a head well enough.
    """

    def __init__(self, mesh: Mesh) -> None:
        count, triangles = len(mesh.template), len(mesh.faces)
        corners = mesh.faces.reshape(-1)
        order = np.argsort(corners, kind="stable")
        ordered = corners[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        # reduceat sums runs of equal vertices; vertices outside every face keep a normal of zero.
        self._starts = starts
        self._used = ordered[starts]
        self._corner_face = order // 3
        self._columns = np.ascontiguousarray(mesh.faces.T)
        self._corner = np.empty((3, triangles, 3), np.float32)
        self._face_normal = np.empty((triangles, 3), np.float32)
        self._product = np.empty(triangles, np.float32)
        self._gathered = np.empty((3 * triangles, 3), np.float32)
        self._normal = np.zeros((count, 3), np.float32)

    def __call__(self, vertices: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit normals [V, 3] float32 of `vertices` [V, 3]: a reused buffer. Zero where there is no normal."""
        with np.errstate(invalid="ignore", over="ignore"):
            self._sum(vertices)
            length = np.sqrt(np.einsum("vi,vi->v", self._normal, self._normal))
            self._normal /= np.maximum(length, SHORTEST)[:, None]
        # One vertex that is not a number would blind all its neighbours.
        return np.nan_to_num(self._normal, copy=False, nan=0, posinf=0, neginf=0)

    def _sum(self, vertices: NDArray[np.float32]) -> None:
        if len(self._face_normal):
            np.take(vertices, self._columns, axis=0, out=self._corner)
            origin, first, second = self._corner
            first -= origin
            second -= origin
            for axis in range(3):
                after, last = (axis + 1) % 3, (axis + 2) % 3
                across = self._face_normal[:, axis]
                np.multiply(first[:, after], second[:, last], out=across)
                np.multiply(first[:, last], second[:, after], out=self._product)
                across -= self._product
            np.take(self._face_normal, self._corner_face, axis=0, out=self._gathered)
            self._normal[self._used] = np.add.reduceat(self._gathered, self._starts, axis=0)
        else:
            np.subtract(vertices, vertices.mean(axis=0), out=self._normal)


def _outward(template: NDArray[np.float32], faces: NDArray[np.int32]) -> NDArray[np.int32]:
    """Wind the faces so that their normals point away from the middle, as a whole.

    Datasets disagree about winding. The test sums (face centre - middle) . normal, which is the volume of a
    closed head and stays positive for an open mask.
    """
    corner = template.astype(np.float64)[faces]
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    away = corner.mean(axis=1) - template.mean(axis=0)
    return faces if float((away * normal).sum()) >= 0 else np.ascontiguousarray(faces[:, ::-1])
