"""Rendering in numpy alone: a z-buffer rasteriser without loops over triangles or pixels.

Triangles are cut into spans (one row of one triangle), spans into samples, and the nearest triangle of a
sample is found by an unbuffered minimum over keys of (depth, triangle). A pixel has 2 x 2 samples. Only what
is visible is shaded: once a pixel inside the face, once a sample on its edges.
"""

from __future__ import annotations

from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamtalk.viewer.camera import Camera
from streamtalk.viewer.light import BACK_FACE, POINT_SHARE, backdrop, light_table, to_linear, to_srgb
from streamtalk.viewer.mesh import Mesh, SmoothNormals

GRID = 2
"""Samples of a pixel along each side."""

NOTHING = np.uint64(2**64 - 1)
"""Key of a sample that nothing covers: farther than any depth."""

EDGE_BITS = np.uint32(2**12)
"""A spread of depth within one pixel that makes it an edge, in float32 steps. A head is about 2^18 deep."""

TABLE_SIZE = 512
"""Texels of the light table. Finer than the GPU's, as it is read without filtering."""

ENCODE_STEPS = 4096
"""Entries of the sRGB table: under one 8-bit level apart in the darkest shadows."""

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]


class SoftwareRenderer:
    """Draws a mesh without a GPU, a driver or a package beyond numpy."""

    name = "software"

    def __init__(self, mesh: Mesh, camera: Camera) -> None:
        self.size = width, height = camera.size
        self._mesh = mesh
        self._camera = camera
        self._normals = SmoothNormals(mesh)
        self._albedo = np.ascontiguousarray(to_linear(mesh.colors).T)
        self._corners = np.ascontiguousarray(mesh.faces.T)
        self._light = light_table(TABLE_SIZE).reshape(-1, 3)
        linear = np.linspace(0, 1, ENCODE_STEPS)
        self._encode = np.rint(to_srgb(linear) * 255).astype(np.uint8)
        self._wall = backdrop(camera.size).reshape(-1, 3)
        self._picture = np.empty((height, width, 3), np.uint8)
        self._keys = np.empty(GRID * GRID * width * height, np.uint64)

    def render(self, vertices: ArrayLike) -> NDArray[np.uint8]:
        """Draw `vertices` [V, 3] as [height, width, 3] uint8 sRGB: a reused buffer, copy it to keep."""
        frame = self._mesh.frame(vertices)
        normals = self._camera.rotation @ self._normals(frame).T
        screen, seen = self._project(frame)
        self._keys.fill(NOTHING)
        if len(self._mesh.faces):
            primitives = _triangle_planes(screen, normals, self._albedo, self._corners)
            self._draw_triangles(screen, seen)
        else:
            primitives = _point_planes(screen, normals, self._albedo)
            self._draw_points(screen, seen)
        self._shade(primitives)
        return self._picture

    def close(self) -> None:
        """Nothing is held. Present so that renderers are alike."""

    def __enter__(self) -> SoftwareRenderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _project(self, frame: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Vertices [V, 3] as [3, V]: x, y in samples (y down), depth 0 to 1; and which the eye can see."""
        matrix = self._camera.matrix
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            clip = matrix[:, :3] @ frame.T + matrix[:, 3:]
            screen = clip[:3] / clip[3]
            width, height = self.size
            screen *= np.array([[width * GRID / 2], [-height * GRID / 2], [0.5]], np.float32)
            screen += np.array([[width * GRID / 2], [height * GRID / 2], [0.5]], np.float32)
            seen = np.isfinite(screen).all(axis=0) & (clip[3] > 0) & (screen[2] > 0) & (screen[2] < 1)
        return screen, seen

    def _draw_triangles(self, screen: Floats, seen: NDArray[np.bool_]) -> None:
        width, height = (GRID * side for side in self.size)
        corners = self._corners
        drawn = np.flatnonzero(seen[corners].all(axis=0))
        order = np.argsort(screen[1][corners[:, drawn]], axis=0)
        upper, middle, lower = np.take_along_axis(corners[:, drawn], order, axis=0)
        top, bottom = _first_centre(screen[1][upper], height), _first_centre(screen[1][lower], height)
        tall = bottom > top
        drawn, upper, middle, lower, top, bottom = (
            a[tall] for a in (drawn, upper, middle, lower, top, bottom)
        )

        # Spans. An edge is always walked from its upper end, so triangles that share it leave no crack.
        long = _edge(screen, upper, lower)
        above = _edge(screen, upper, middle)
        below = _edge(screen, middle, lower)
        rows = bottom - top
        triangle = np.repeat(np.arange(len(rows)), rows)
        row = np.arange(len(triangle)) + np.repeat(top - (np.cumsum(rows) - rows), rows)
        y = row.astype(np.float32) + np.float32(0.5)
        short = np.where(y >= screen[1][middle][triangle], below[:, triangle], above[:, triangle])
        x_long, z_long = _walk(long[:, triangle], y)
        x_short, z_short = _walk(short, y)
        left, right = np.minimum(x_long, x_short), np.maximum(x_long, x_short)
        start, stop = _first_centre(left, width), _first_centre(right, width)
        wide = np.flatnonzero(stop > start)
        triangle, row, start, stop = triangle[wide], row[wide], start[wide], stop[wide]
        x_long, z_long, x_short, z_short = x_long[wide], z_long[wide], x_short[wide], z_short[wide]

        # Samples. Sample centres lie between the ends, so depth is interpolated and never extrapolated.
        gradient = (z_short - z_long) / (x_short - x_long)
        depth_start = z_long + gradient * (start.astype(np.float32) + np.float32(0.5) - x_long)
        columns = stop - start
        before = np.cumsum(columns) - columns
        step = np.arange(columns.sum()) - np.repeat(before, columns)
        depth = np.repeat(gradient, columns)
        depth *= step.astype(np.float32)
        depth += np.repeat(depth_start, columns)
        step += np.repeat(row * width + start, columns)
        self._nearest(step, depth, np.repeat(drawn[triangle].astype(np.uint64), columns))

    def _draw_points(self, screen: Floats, seen: NDArray[np.bool_]) -> None:
        width, height = (GRID * side for side in self.size)
        side = max(GRID, round(height * POINT_SHARE))
        x, y = np.rint(screen[:2, seen] - np.float32(side / 2)).clip(-1, max(width, height)).astype(np.intp)
        across = np.arange(side)
        columns = np.broadcast_to((x[:, None] + across)[:, None, :], (len(x), side, side)).reshape(-1)
        rows = np.broadcast_to((y[:, None] + across)[:, :, None], (len(x), side, side)).reshape(-1)
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        point = np.repeat(np.flatnonzero(seen).astype(np.uint64), side * side)[inside]
        depth = np.repeat(screen[2, seen], side * side)[inside]
        self._nearest((rows * width + columns)[inside], depth, point)

    def _nearest(self, sample: Ints, depth: Floats, primitive: NDArray[np.uint64]) -> None:
        """Keep the nearest primitive of each sample. The bits of positive floats sort as the floats do."""
        keys = depth.view(np.uint32).astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= primitive
        np.minimum.at(self._keys, sample, keys)

    def _shade(self, primitives: Floats) -> None:
        width, height = self.size
        samples = self._keys.reshape(height, GRID, width, GRID)
        nearest, farthest = _over_pixels(np.minimum, samples), _over_pixels(np.maximum, samples)
        high = np.uint64(32)
        spread = (farthest >> high).astype(np.uint32) - (nearest >> high).astype(np.uint32)
        picture = self._picture.reshape(-1, 3)
        picture[:] = self._wall

        inner = np.flatnonzero((spread <= EDGE_BITS) & (nearest != NOTHING))
        y, x = np.divmod(inner, width)
        centre = np.float32(GRID / 2)
        picture[inner] = self._colors(primitives, nearest[inner], x * GRID + centre, y * GRID + centre)

        edge = np.flatnonzero(spread > EDGE_BITS)
        y, x = np.divmod(edge, width)
        total = np.zeros((len(edge), 3), np.uint16)
        for down in range(GRID):
            for right in range(GRID):
                keys = samples[y, down, x, right]
                hit = keys != NOTHING
                color = self._wall[edge]
                color[hit] = self._colors(
                    primitives, keys[hit], x[hit] * GRID + (right + 0.5), y[hit] * GRID + (down + 0.5)
                )
                total += color
        picture[edge] = (total + GRID * GRID // 2) // (GRID * GRID)

    def _colors(
        self, primitives: Floats, keys: NDArray[np.uint64], x: NDArray[np.floating], y: NDArray[np.floating]
    ) -> NDArray[np.uint8]:
        """sRGB [N, 3] uint8 of primitives `keys` [N] seen at sample coordinates `x`, `y` [N]."""
        index = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
        plane = primitives[:, index]
        right = x.astype(np.float32) - plane[0]
        down = y.astype(np.float32) - plane[1]
        first = np.clip(plane[2] * right + plane[3] * down, 0, 1)
        second = np.clip(plane[4] * right + plane[5] * down, 0, 1)
        value = plane[6:12]
        value += first * plane[12:18]
        value += second * plane[18:24]
        n, albedo = value[:3], value[3:]
        # A smooth normal may lean past the silhouette: the nearest that faces the viewer lights it.
        squared = n[0] ** 2 + n[1] ** 2 + np.maximum(n[2], 0) ** 2
        scale = np.float32((TABLE_SIZE - 1) / 2) / np.sqrt(np.maximum(squared, np.float32(1e-12)))
        middle = np.float32(TABLE_SIZE / 2)  # (N - 1) / 2, and a half to round
        column = (n[0] * scale + middle).astype(np.intp)
        line = (middle - n[1] * scale).astype(np.intp)
        linear = albedo.T * self._light[line * TABLE_SIZE + column]
        level = np.minimum(linear * np.float32(ENCODE_STEPS - 1), ENCODE_STEPS - 1).astype(np.intp)
        color: NDArray[np.uint8] = self._encode[level]
        return color


def _over_pixels(fold: np.ufunc, samples: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Fold keys [height, GRID, width, GRID] to pixels [height * width]. Whole planes at a time: `reduce` over
    short axes is ten times slower."""
    first, *others = (samples[:, down, :, right] for down in range(GRID) for right in range(GRID))
    folded = first.copy()
    for plane in others:
        fold(folded, plane, out=folded)
    pixels: NDArray[np.uint64] = folded.reshape(-1)
    return pixels


def _first_centre(position: Floats, limit: int) -> Ints:
    """Index of the first sample centre at or after `position`, within 0 to limit."""
    index: Ints = np.ceil(np.clip(position, -1, limit + 1) - np.float32(0.5)).clip(0, limit).astype(np.intp)
    return index


def _edge(screen: Floats, upper: NDArray[np.integer], lower: NDArray[np.integer]) -> Floats:
    """[5, T]: an edge's upper end (x, y, depth) and what x and depth gain per row."""
    start, end = screen[:, upper], screen[:, lower]
    change = end - start
    height = np.where(change[1] > 0, change[1], np.float32(1))
    return np.concatenate([start, change[::2] / height])


def _walk(edge: Floats, y: Floats) -> tuple[Floats, Floats]:
    """x and depth of edges [5, S] at heights `y` [S]."""
    down = y - edge[1]
    return edge[0] + down * edge[3], edge[2] + down * edge[4]


def _triangle_planes(screen: Floats, normals: Floats, albedo: Floats, corners: NDArray[np.int32]) -> Floats:
    """[24, F]: what it takes to shade a point of a triangle.

    Rows: corner 0 (x, y); gradients of the weights of corners 1 and 2 (2 x 2); normal and linear albedo at
    corner 0 (6); their change towards corner 1 (6) and towards corner 2 (6).
    """
    a, b, c = corners
    with np.errstate(invalid="ignore", over="ignore"):  # triangles that are not drawn may hold anything
        x, y = screen[0], screen[1]
        x1, y1, x2, y2 = x[b] - x[a], y[b] - y[a], x[c] - x[a], y[c] - y[a]
        area = x1 * y2 - x2 * y1
        inverse = np.float32(1) / np.where(area != 0, area, np.float32(np.inf))
        back = area > 0  # y is down here, so a front face turns clockwise
        value = np.concatenate([normals, albedo])
        value0 = value[:, a]
        planes = np.concatenate(
            [
                np.stack([x[a], y[a], y2 * inverse, -x2 * inverse, -y1 * inverse, x1 * inverse]),
                value0,
                value[:, b] - value0,
                value[:, c] - value0,
            ]
        )
        for first in (6, 12, 18):
            planes[first : first + 3, back] *= -1
            planes[first + 3 : first + 6, back] *= np.float32(BACK_FACE)
    return planes


def _point_planes(screen: Floats, normals: Floats, albedo: Floats) -> Floats:
    """[24, V]: as `_triangle_planes`, of points that are alike all over."""
    planes = np.zeros((24, screen.shape[1]), np.float32)
    planes[6:9] = normals
    planes[9:12] = albedo
    return planes
