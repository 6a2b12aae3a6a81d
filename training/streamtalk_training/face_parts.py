"""Made-up parts of the head: eyeballs, dental arches, brow cards. Lengths in decimetres, colours sRGB 0..255.

MakeHuman's own helper eyes and teeth are 70-quad stand-ins; these replace them in the same place and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamtalk_training.face_mesh import Floats, Ints, smoothstep, triangulate

Colour = tuple[float, float, float]

PUPIL: Colour = (16, 12, 12)
IRIS: Colour = (92, 66, 44)
LIMBUS: Colour = (46, 33, 25)
SCLERA: Colour = (232, 226, 221)
SCLERA_EDGE: Colour = (196, 168, 160)
ENAMEL: Colour = (236, 228, 212)
ENAMEL_NECK: Colour = (216, 200, 176)
ENAMEL_BACK: Colour = (96, 78, 66)
GUM: Colour = (158, 82, 80)
GUM_DEEP: Colour = (92, 40, 40)


@dataclass(frozen=True)
class Part:
    """A mesh of its own: `points` [V, 3] float64, `faces` [F, 3] int64, `colors` [V, 3] float64."""

    points: Floats
    faces: Ints
    colors: Floats


def join(parts: list[Part]) -> Part:
    """One part made of several, in their order."""
    starts = np.cumsum([0] + [len(p.points) for p in parts])
    return Part(
        np.concatenate([p.points for p in parts]),
        np.concatenate([p.faces + start for p, start in zip(parts, starts, strict=False)]),
        np.concatenate([p.colors for p in parts]),
    )


def grid_faces(rows: int, columns: int, closed: bool = False) -> Ints:
    """Triangles of a grid of vertices numbered row by row; `closed` joins the last column to the first."""
    row, column = np.meshgrid(np.arange(rows - 1), np.arange(columns - (not closed)), indexing="ij")
    after = (column + 1) % columns
    quads = np.stack(
        [
            row * columns + column,
            (row + 1) * columns + column,
            (row + 1) * columns + after,
            row * columns + after,
        ],
        axis=-1,
    )
    return triangulate(quads.reshape(-1, 4))


# Angle from the gaze axis in degrees and colour of each ring; close pairs of rings make crisp borders.
EYE_RINGS: tuple[tuple[float, Colour], ...] = (
    (9.0, PUPIL),
    (10.0, IRIS),
    (19.0, IRIS),
    (23.0, LIMBUS),
    (24.5, SCLERA),
    (40.0, SCLERA),
    (62.0, SCLERA_EDGE),
    (95.0, SCLERA_EDGE),
    (140.0, SCLERA_EDGE),
)


def eyeball(centre: Floats, radius: float, segments: int = 20) -> Part:
    """A sphere that looks along +z, with pupil, iris and limbus as rings of vertices."""
    turn = np.arange(segments) * (2 * np.pi / segments)
    rings = [
        np.stack([s * np.cos(turn), s * np.sin(turn), np.full(segments, np.cos(a))], axis=1)
        for a, s in ((np.radians(angle), np.sin(np.radians(angle))) for angle, _ in EYE_RINGS)
    ]
    count = len(rings) * segments
    points = np.concatenate([*rings, [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]])
    around, ahead = np.arange(segments), (np.arange(segments) + 1) % segments
    last = count - segments
    faces = np.concatenate(
        [
            np.stack([np.full(segments, count), around, ahead], axis=1),
            grid_faces(len(rings), segments, closed=True),
            np.stack([np.full(segments, count + 1), last + ahead, last + around], axis=1),
        ]
    )
    colors = np.repeat([colour for _, colour in EYE_RINGS], segments, axis=0)
    return Part(centre + radius * points, faces, np.concatenate([colors, [PUPIL, SCLERA_EDGE]]))


@dataclass(frozen=True)
class Arch:
    """A dental arch: half an ellipse in the x, z plane, teeth from the middle outwards on both sides."""

    half_width: float
    front: float  # z of the incisors
    back: float  # z of the ellipse's centre
    bite: float  # y of the biting edges
    rise: float  # how much higher (y) the edges lie at the back
    up: float  # +1: crowns grow upwards from the bite (upper teeth); -1: downwards
    widths: tuple[float, ...]
    heights: tuple[float, ...]

    def place(self, arc: Floats, inward: Floats, height: Floats) -> Floats:
        """Points at signed `arc` along the arch from its middle, `inward` of its face, `height` over the bite."""
        table = np.linspace(0.0, np.pi / 2, 200)
        depth = self.front - self.back
        curve = np.stack([self.half_width * np.sin(table), depth * np.cos(table)], axis=1)
        length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
        angle = np.interp(np.abs(arc), length, table) * np.sign(arc)
        x, z = self.half_width * np.sin(angle), depth * np.cos(angle)
        outward = np.stack([x / self.half_width**2, z / depth**2], axis=-1)
        outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
        y = self.bite + self.rise * (1 - np.cos(angle)) + self.up * height
        return np.stack([x - inward * outward[..., 0], y, self.back + z - inward * outward[..., 1]], axis=-1)


UPPER_ARCH = Arch(
    half_width=0.325,
    front=1.368,
    back=0.90,
    bite=6.664,
    rise=0.045,
    up=1.0,
    widths=(0.086, 0.067, 0.077, 0.070, 0.068, 0.100),
    heights=(0.098, 0.086, 0.096, 0.082, 0.076, 0.072),
)
LOWER_ARCH = Arch(
    half_width=0.305,
    front=1.338,
    back=0.90,
    bite=6.688,
    rise=0.045,
    up=-1.0,
    widths=(0.054, 0.060, 0.070, 0.071, 0.073, 0.110),
    heights=(0.084, 0.086, 0.094, 0.082, 0.076, 0.070),
)

# Across a tooth: share of the half width, how far the face steps back, how much the edge is rounded off.
TOOTH_COLUMNS = ((-0.97, 0.012, 0.010), (-0.60, 0.0, 0.001), (0.60, 0.0, 0.001), (0.97, 0.012, 0.010))


def dental_arch(arch: Arch) -> Part:
    """Twelve rounded crowns that stand in a strip of gum, darker the deeper in the mouth."""
    side = np.cumsum([0.0, *arch.widths])
    teeth = []
    for k, (width, height) in enumerate(zip(arch.widths, arch.heights, strict=True)):
        for sign in (1.0, -1.0):
            teeth.append(_tooth(arch, sign * (side[k] + side[k + 1]) / 2, width / 2, height))
    whole = join([*teeth, _gum(arch, float(side[-1]))])
    shade = 0.2 + 0.8 * smoothstep(whole.points[:, 2], arch.back + 0.1, arch.front - 0.03)
    return Part(whole.points, whole.faces, whole.colors * shade[:, None])


def _tooth(arch: Arch, middle: float, half_width: float, height: float) -> Part:
    share, inset, rounding = np.array(TOOTH_COLUMNS).T
    rows = [  # height, inward, colour; from the neck over the face and the edge to the back
        (np.full(4, height * 1.12), inset + 0.014, ENAMEL_NECK),
        (np.full(4, height * 0.80), inset + 0.001, ENAMEL),
        (np.full(4, height * 0.35), inset - 0.002, ENAMEL),
        (0.004 + rounding, inset + 0.003, ENAMEL),
        (0.002 + rounding, inset + 0.022, ENAMEL),
        (np.full(4, height * 0.75), inset * 0 + 0.060, ENAMEL_BACK),
    ]
    narrowing = (0.80, 0.96, 1.0, 0.97, 0.90, 0.72)
    points = np.concatenate(
        [
            arch.place(middle + half_width * narrow * share, inward, up)
            for (up, inward, _), narrow in zip(rows, narrowing, strict=True)
        ]
    )
    faces = grid_faces(len(rows), len(share))
    colors = np.repeat([colour for *_, colour in rows], len(share), axis=0)
    return Part(points, faces if arch.up > 0 else faces[:, ::-1], colors)


def _gum(arch: Arch, reach: float, columns: int = 25) -> Part:
    arc = np.linspace(-reach, reach, columns)
    side = np.cumsum([0.0, *arch.widths])
    nearest = np.clip(np.searchsorted(side, np.abs(arc), side="right") - 1, 0, len(arch.widths) - 1)
    crown = np.array(arch.heights)[nearest]
    rows = [
        (crown * 0 + 0.185, 0.020, GUM_DEEP),
        (crown * 1.25, -0.006, GUM),
        (crown * 0.92, 0.004, GUM),
        (crown * 0.70, 0.045, GUM_DEEP),
    ]
    points = np.concatenate([arch.place(arc, np.full(columns, inward), up) for up, inward, _ in rows])
    faces = grid_faces(len(rows), columns)
    colors = np.repeat([colour for *_, colour in rows], columns, axis=0)
    return Part(points, faces if arch.up > 0 else faces[:, ::-1], colors)


# Down the middle of a brow, in the neutral head's x and y from the nose outwards, and its half height.
BROW_LINE = np.array(
    [
        (0.095, 7.512, 0.010),
        (0.125, 7.517, 0.022),
        (0.200, 7.531, 0.025),
        (0.280, 7.544, 0.022),
        (0.350, 7.548, 0.018),
        (0.420, 7.535, 0.011),
        (0.475, 7.512, 0.002),
    ]
)
BROW_ROWS = (-1.0, -0.5, 0.5, 1.0)  # across, in half heights
BROW_LIFT = (0.002, 0.006, 0.006, 0.002)  # over the skin
BROW_STRENGTH = (0.25, 1.0, 1.0, 0.25)  # of the brow's colour over the skin's
BROW_COLUMNS = 15


def brow_card(side: float) -> tuple[Floats, Ints]:
    """Where the vertices of a brow lie in x, y [rows * columns, 2], and its faces; `side` is +1 left, -1 right."""
    x = np.linspace(BROW_LINE[0, 0], BROW_LINE[-1, 0], BROW_COLUMNS)
    middle, half = (np.interp(x, BROW_LINE[:, 0], BROW_LINE[:, k]) for k in (1, 2))
    xy = np.concatenate([np.stack([side * x, middle + row * half], axis=1) for row in BROW_ROWS])
    faces = grid_faces(len(BROW_ROWS), BROW_COLUMNS)
    return xy, faces[:, ::-1] if side > 0 else faces


def brow_strength() -> Floats:
    """How much a brow covers the skin's colour [rows, columns]: less at its edges and towards the nose."""
    along = np.interp(
        np.arange(BROW_COLUMNS), (0, 2, BROW_COLUMNS - 4, BROW_COLUMNS - 1), (0.2, 0.95, 1.0, 0.5)
    )
    return np.array(BROW_STRENGTH)[:, None] * along
