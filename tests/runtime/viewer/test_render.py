"""Both renderers, alone and against each other."""

import logging
import sys
import tracemalloc
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from streamtalk.errors import BackendError, MissingDependencyError, ModelError, UsageError
from streamtalk.viewer.camera import FILL, Camera
from streamtalk.viewer.light import backdrop, light_table
from streamtalk.viewer.render import Renderer, open_renderer
from tests.runtime.viewer.shapes import sphere

SIZE = (160, 160)
MEAN_DIFFERENCE = 0.6
"""Levels of 255, over the picture. The two differ in where an edge's samples lie and in texture filtering."""

EDGE_LEVELS, EDGE_SHARE = 24, 0.02
"""Only pixels on edges may differ by more than this many levels, and at 160 px they are few."""

GROWTH_BYTES = 50_000
"""Interpreter noise. One frame's temporaries are several megabytes."""

Backend = Literal["gl", "software"]


def draw(
    vertices: NDArray[np.float32],
    faces: NDArray[np.int32] | None,
    colors: NDArray[np.uint8] | None = None,
    backend: Backend = "software",
    yaw_deg: float = 0.0,
) -> NDArray[np.uint8]:
    with open_or_skip(vertices, faces, colors, backend, yaw_deg) as renderer:
        picture: NDArray[np.uint8] = renderer.render(vertices).copy()
        return picture


def open_or_skip(
    vertices: NDArray[np.float32],
    faces: NDArray[np.int32] | None,
    colors: NDArray[np.uint8] | None = None,
    backend: Backend = "software",
    yaw_deg: float = 0.0,
) -> Renderer:
    try:
        return open_renderer(vertices, faces, colors, size=SIZE, backend=backend, yaw_deg=yaw_deg)
    except (BackendError, MissingDependencyError) as error:
        pytest.skip(str(error))


def quads(*depths: float) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Squares that face the viewer, each at a depth."""
    square = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32) * 0.1
    vertices = np.concatenate([square + np.array([0, 0, z], np.float32) for z in depths])
    faces = np.concatenate([np.array([[0, 1, 2], [0, 2, 3]], np.int32) + 4 * i for i in range(len(depths))])
    return vertices, faces


@pytest.mark.parametrize("yaw_deg", [0.0, 30.0])
@pytest.mark.parametrize("solid", [True, False])
def test_software_draws_what_gl_draws(yaw_deg: float, solid: bool) -> None:
    vertices, faces = sphere()
    colors = (160 + 90 * np.sin(vertices * 60)).astype(np.uint8)
    pictures = [
        draw(vertices, faces if solid else None, colors if solid else None, backend, yaw_deg).astype(int)
        for backend in ("gl", "software")
    ]
    difference = np.abs(pictures[0] - pictures[1])
    points = 1 if solid else 8  # points are all edge: round in size on one, square samples on the other
    assert difference.mean() < MEAN_DIFFERENCE * points
    assert (difference.max(axis=-1) > EDGE_LEVELS).mean() < EDGE_SHARE * points
    assert pictures[0].std() > 20  # there is something to compare


@pytest.mark.parametrize("backend", ["gl", "software"])
def test_a_sphere_fills_the_frame_and_nothing_else(backend: Backend) -> None:
    vertices, faces = sphere(bump=0)
    picture = draw(vertices, faces, backend=backend)
    wall = backdrop(SIZE)
    changed = (picture != wall).any(axis=-1)
    rows = np.flatnonzero(changed.any(axis=1))
    assert rows[-1] - rows[0] + 1 == pytest.approx(FILL * SIZE[1], abs=3)
    disc = np.pi * (FILL * SIZE[1] / 2) ** 2
    assert changed.sum() == pytest.approx(disc, rel=0.03)
    np.testing.assert_array_equal(picture[0], wall[0])


@pytest.mark.parametrize("backend", ["gl", "software"])
def test_up_is_up_and_the_viewers_right_is_right(backend: Backend) -> None:
    vertices, faces = sphere(bump=0)
    colors = np.full(vertices.shape, 60, np.uint8)
    colors[vertices[:, 1] > 0, 0] = 255
    colors[vertices[:, 0] > 0, 2] = 255
    picture = draw(vertices, faces, colors, backend).astype(int)
    half = SIZE[0] // 2
    red, blue = picture[..., 0], picture[..., 2]
    assert red[half - 30, half - 30] > red[half + 30, half - 30] + 50
    assert blue[half - 30, half + 30] > blue[half - 30, half - 30] + 50


@pytest.mark.parametrize("backend", ["gl", "software"])
@pytest.mark.parametrize("front_first", [True, False])
def test_the_nearest_surface_is_seen(backend: Backend, front_first: bool) -> None:
    vertices, faces = quads(0.05, -0.05) if front_first else quads(-0.05, 0.05)
    colors = np.zeros((8, 3), np.uint8)
    colors[:4, 0 if front_first else 1] = 200
    colors[4:, 1 if front_first else 0] = 200
    red, green, _ = draw(vertices, faces, colors, backend)[SIZE[1] // 2, SIZE[0] // 2]
    assert red > 100 > green


@pytest.mark.parametrize("backend", ["gl", "software"])
def test_the_inside_of_an_open_mesh_is_in_shadow(backend: Backend) -> None:
    vertices, faces = sphere(bump=0)
    front = vertices[faces].mean(axis=1)[:, 2] > 0.03
    closed = draw(vertices, faces, backend=backend)[SIZE[1] // 2, SIZE[0] // 2]
    opened = draw(vertices, faces[~front], backend=backend)[SIZE[1] // 2, SIZE[0] // 2]
    assert (opened.astype(int) < closed.astype(int) - 40).all()


def test_triangles_leave_no_cracks() -> None:
    vertices, faces = sphere(bump=0)
    picture = draw(vertices, faces, np.full(vertices.shape, 255, np.uint8))
    y, x = np.indices(SIZE)
    disc = (x - SIZE[0] / 2) ** 2 + (y - SIZE[1] / 2) ** 2 < (0.8 * FILL * SIZE[1] / 2) ** 2
    assert picture[disc].min() > backdrop(SIZE).max()


@pytest.mark.parametrize("backend", ["gl", "software"])
def test_vertices_that_are_not_finite_or_behind_the_eye_cost_only_their_triangles(backend: Backend) -> None:
    vertices, faces = sphere()
    with open_or_skip(vertices, faces, backend=backend) as renderer:
        good = renderer.render(vertices).copy().astype(int)
        broken = vertices.copy()
        broken[700:703] = [[np.nan] * 3, [np.inf] * 3, [0, 0, 1e6]]
        got = renderer.render(broken).astype(int)
        assert (np.abs(got - good).max(axis=-1) > EDGE_LEVELS).mean() < 0.25
        np.testing.assert_array_equal(renderer.render(vertices).astype(int), good)


def test_pictures_reuse_one_buffer_and_memory_stays_flat() -> None:
    vertices, faces = sphere()
    with open_renderer(vertices, faces, size=SIZE, backend="software") as renderer:
        first = renderer.render(vertices)
        assert renderer.render(vertices) is first
        tracemalloc.start()
        try:
            renderer.render(vertices)
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(5):
                renderer.render(vertices)
            assert tracemalloc.get_traced_memory()[0] - before < GROWTH_BYTES
        finally:
            tracemalloc.stop()


def test_two_gl_renderers_share_a_thread() -> None:
    vertices, faces = sphere()
    red = np.tile(np.array([200, 0, 0], np.uint8), (len(vertices), 1))
    with open_or_skip(vertices, faces, red, "gl") as one, open_or_skip(vertices, faces, None, "gl") as two:
        alone = one.render(vertices).copy()
        two.render(vertices)
        np.testing.assert_array_equal(one.render(vertices), alone)


@pytest.mark.parametrize("size", [(160, 160), (90, 200), (200, 90)])
@pytest.mark.parametrize("yaw_deg", [0.0, 40.0])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_camera_frames_a_face_of_any_unit(size: tuple[int, int], yaw_deg: float, scale: float) -> None:
    template = sphere()[0] * np.float32(scale)
    camera = Camera.portrait(template, size, yaw_deg)
    clip = np.c_[template, np.ones(len(template))] @ camera.matrix.T.astype(np.float64)
    reach = np.abs(clip[:, :2] / clip[:, 3:]).max()
    assert reach == pytest.approx(FILL, abs=1e-3)
    assert (np.abs(clip[:, 2] / clip[:, 3]) < 1).all()


def test_light_comes_from_the_upper_left_and_skin_is_never_black() -> None:
    table = light_table(65)
    assert table[12, 16].sum() > table[52, 32].sum() > 0
    assert table.min() > 0.03


def test_auto_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "moderngl", None)
    vertices, faces = sphere()
    with caplog.at_level(logging.WARNING), open_renderer(vertices, faces) as renderer:
        assert renderer.name == "software"
    assert "streamtalk[viewer]" in caplog.text
    with pytest.raises(MissingDependencyError, match=r"streamtalk\[viewer\]"):
        open_renderer(vertices, faces, backend="gl")


def test_gl_without_a_driver_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    moderngl = pytest.importorskip("moderngl")

    def refuse(**_: object) -> None:
        raise Exception("cannot load libEGL.so")  # as glcontext does

    monkeypatch.setattr(moderngl, "create_context", refuse)
    vertices, faces = sphere()
    with pytest.raises(BackendError, match="cannot load libEGL"):
        open_renderer(vertices, faces, backend="gl")
    assert open_renderer(vertices, faces).name == "software"


def test_bad_requests_are_refused() -> None:
    vertices, faces = sphere()
    with pytest.raises(UsageError, match="8 x 512"):
        open_renderer(vertices, faces, size=(8, 512))
    with pytest.raises(UsageError, match="vulkan"):
        open_renderer(vertices, faces, backend="vulkan")  # type: ignore[arg-type]
    with (
        open_renderer(vertices, faces, size=SIZE, backend="software") as renderer,
        pytest.raises(ModelError, match=r"\(7, 3\)"),
    ):
        renderer.render(np.zeros((7, 3)))
