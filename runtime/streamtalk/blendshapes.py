"""ARKit weights of a frame: which weights of the face's shapes give its vertices.

The last layer of the decoder is linear, so a few vertices determine all others. The exporter multiplies that and
the least squares over all vertices out into one small matrix; here it is applied. No state is kept, so weights
are as smooth as the vertices, and a frame's are the same however one got there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from streamtalk.errors import ModelError
from streamtalk.model import Manifest, verified

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Blendshapes:
    """The contents of the blendshapes file; arrays are read-only.

    `names` [n] (Apple's 52, in Apple's order), `vertices` [m] int64: those that are looked at, `solver`
    [n, 3m] float32: weights from their offsets (x, y, z of the first, ...). Rows of shapes that the model
    cannot make are 0.
    """

    names: tuple[str, ...]
    vertices: npt.NDArray[np.int64]
    solver: Float32


class WeightSolver:
    """Weights of one stream's frames, in buffers that are reused. `template` [V, 3] is the face at rest."""

    def __init__(self, shapes: Blendshapes, template: Float32) -> None:
        self._vertices = shapes.vertices
        self._solver = shapes.solver
        self._rest = np.ascontiguousarray(template[shapes.vertices], np.float32)
        self._offsets = np.empty_like(self._rest)
        self._flat_offsets = self._offsets.reshape(-1)
        self._weights = np.zeros(len(shapes.names), np.float32)
        self._view: Float32 = self._weights.view()
        self._view.flags.writeable = False

    def __call__(self, vertices: Float32) -> Float32:
        """Weights [n] in [0, 1] of `vertices` [V, 3]: a read-only view that the next call overwrites."""
        # mode="clip" writes straight to `out`; the indices were checked when they were read.
        np.take(vertices, self._vertices, axis=0, out=self._offsets, mode="clip")
        np.subtract(self._offsets, self._rest, out=self._offsets)
        # Not `dot`: BLAS would wake threads for a product of this size, and they would take the model's cores.
        np.einsum("ij,j->i", self._solver, self._flat_offsets, out=self._weights)
        np.maximum(self._weights, 0, out=self._weights)
        np.minimum(self._weights, 1, out=self._weights)
        return self._view


def read_blendshapes(directory: Path, manifest: Manifest) -> Blendshapes | None:
    """Read and check the blendshapes file that `manifest` lists; None where it lists none. Raises ModelError."""
    if manifest.blendshapes is None:
        return None
    path = verified(directory, manifest.blendshapes.file, manifest.blendshapes.sha256)
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = tuple(str(name) for name in archive["names"])
            vertices = archive["vertices"].astype(np.int64)
            solver = np.ascontiguousarray(archive["solver"], np.float32)
    except (KeyError, ValueError, TypeError, OSError, EOFError, BadZipFile) as error:
        raise ModelError(f"{path} cannot be read ({error}). Export again.") from error
    if vertices.ndim != 1 or solver.shape != (len(names), 3 * vertices.size) or len(set(names)) != len(names):
        raise ModelError(
            f"{path}: expected distinct `names` [n], `vertices` [m] and `solver` [n, 3m]; got "
            f"{len(set(names))} names, {list(vertices.shape)} and {list(solver.shape)}. Export again."
        )
    if vertices.size and not 0 <= vertices.min() <= vertices.max() < manifest.n_vertices:
        raise ModelError(
            f"{path}: `vertices` point outside the {manifest.n_vertices} vertices. Export again."
        )
    if not np.isfinite(solver).all():
        raise ModelError(f"{path}: `solver` holds values that are not finite. Export again.")
    vertices.flags.writeable = solver.flags.writeable = False
    return Blendshapes(names, vertices, solver)
