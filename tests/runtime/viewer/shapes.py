"""Generated meshes to draw."""

import numpy as np
from numpy.typing import NDArray

RADIUS = 0.1


def sphere(
    bump: float = 0.06, rows: int = 40, columns: int = 80
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """A closed sphere with bumps of a share `bump` of its radius: vertices [V, 3], faces [F, 3] wound outward."""
    polar = np.linspace(0, np.pi, rows)[:, None]
    around = np.linspace(0, 2 * np.pi, columns, endpoint=False)[None]
    radius = RADIUS * (1 + bump * np.sin(6 * polar) * np.cos(5 * around))
    x = radius * np.sin(polar) * np.sin(around)
    y = radius * np.cos(polar)
    z = radius * np.sin(polar) * np.cos(around)
    vertices = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)
    upper = np.arange(rows - 1)[:, None] * columns
    here = np.arange(columns)[None]
    there = (here + 1) % columns
    lower = upper + columns
    left = np.stack([upper + here, lower + here, lower + there], axis=-1)
    right = np.stack([upper + here, lower + there, upper + there], axis=-1)
    return vertices, np.concatenate([left, right]).reshape(-1, 3).astype(np.int32)
