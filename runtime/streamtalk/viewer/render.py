"""Pictures of a face: the GPU where it can be had, numpy where it cannot."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamtalk.errors import BackendError, MissingDependencyError, UsageError
from streamtalk.viewer.camera import Camera
from streamtalk.viewer.gl import GLRenderer
from streamtalk.viewer.mesh import Mesh
from streamtalk.viewer.software import SoftwareRenderer

log = logging.getLogger(__name__)

SIDE_PX = (16, 4096)
"""Smallest and largest width or height: a larger one is a slip, and asks for gigabytes."""


class Renderer(Protocol):
    """Draws frames of one mesh from one camera. Use it from the thread that opened it."""

    @property
    def name(self) -> str:
        """What draws: "gl (llvmpipe ...)" or "software"."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""

    def render(self, vertices: ArrayLike) -> NDArray[np.uint8]:
        """Draw `vertices` [V, 3] as [height, width, 3] uint8 sRGB: a reused buffer, copy it to keep."""

    def close(self) -> None:
        """Give back what the renderer holds. Safe to call twice."""

    def __enter__(self) -> Renderer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_renderer(
    template: ArrayLike,
    faces: ArrayLike | None = None,
    colors: ArrayLike | None = None,
    *,
    size: tuple[int, int] = (512, 512),
    backend: Literal["auto", "gl", "software"] = "auto",
    yaw_deg: float = 0.0,
) -> Renderer:
    """Open a renderer whose camera frames `template` [V, 3] (y up, z to the viewer, any unit).

    faces: [F, 3] integers; None or empty draws points. colors: [V, 3] uint8 sRGB; None is clay. size: width,
    height. `auto` takes GL and falls back to software with a logged sentence that says why.
    Raises ModelError for arrays that do not belong together, UsageError for a bad size or backend, and, for
    `gl` alone, BackendError or MissingDependencyError.
    """
    width, height = size
    if not all(SIDE_PX[0] <= side <= SIDE_PX[1] for side in (width, height)):
        raise UsageError(
            f"A picture is {SIDE_PX[0]} to {SIDE_PX[1]} pixels wide and high; got {width} x {height}. "
            "Choose another size."
        )
    if backend not in ("auto", "gl", "software"):
        raise UsageError(f"A renderer is auto, gl or software; got {backend!r}.")
    mesh = Mesh.check(template, faces, colors)
    camera = Camera.portrait(mesh.template, size, yaw_deg)
    if backend != "software":
        try:
            return GLRenderer(mesh, camera)
        except (BackendError, MissingDependencyError) as error:
            if backend == "gl":
                raise
            log.warning("Drawing in software, which is slower: %s", error)
    return SoftwareRenderer(mesh, camera)
