"""Where the face is seen from: a perspective camera that frames the template."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIELD_OF_VIEW_DEG = 20.0
"""Vertical. Narrow as a portrait lens is: a wide one swells the nose."""

FILL = 0.9
"""Share of the picture's height or width, whichever binds, that the resting face fills."""

CLIP = (0.3, 4.0)
"""Near and far planes as multiples of the distance: a moving jaw or a thrown vertex stays inside."""


@dataclass(frozen=True)
class Camera:
    """A view of a mesh. All matrices act on column vectors.

    rotation: [3, 3] float32 from world to camera axes. matrix: [4, 4] float32 from world to clip space, by
    OpenGL's convention: y up, depth -1 to 1.
    """

    size: tuple[int, int]
    rotation: NDArray[np.float32]
    matrix: NDArray[np.float32]

    @classmethod
    def portrait(cls, template: NDArray[np.float32], size: tuple[int, int], yaw_deg: float = 0.0) -> Camera:
        """Frame `template` [V, 3] in a picture of `size` (width, height).

        yaw_deg turns the head to the viewer's right; 30 is a three-quarter view.
        """
        width, height = size
        yaw = math.radians(yaw_deg)
        rotation = np.array(
            [[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]], np.float64
        )
        low, high = template.min(axis=0), template.max(axis=0)
        centre = (low + high).astype(np.float64) / 2
        turned = (template - centre) @ rotation.T
        tangent = np.tan(math.radians(FIELD_OF_VIEW_DEG) / 2) * np.array([width / height, 1.0])
        # A point at distance d projects to |x| / (d - z) / tangent, which must stay within FILL.
        needed = turned[:, 2:] + np.abs(turned[:, :2]) / (tangent * FILL)
        distance = max(float(needed.max()), 1e-6)

        near, far = (distance * ratio for ratio in CLIP)
        projection = np.zeros((4, 4))
        projection[0, 0], projection[1, 1] = 1 / tangent
        projection[2, 2:] = (far + near) / (near - far), 2 * far * near / (near - far)
        projection[3, 2] = -1
        view = np.eye(4)
        view[:3, :3] = rotation
        view[:3, 3] = -rotation @ centre - np.array([0, 0, distance])
        return cls(size, rotation.astype(np.float32), (projection @ view).astype(np.float32))
