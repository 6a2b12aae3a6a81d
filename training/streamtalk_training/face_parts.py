"""Made-up parts of the head: eyeballs, dental arches, brow cards. Lengths in decimetres, colours sRGB 0..255.

MakeHuman's own helper eyes and teeth are 70-quad stand-ins; these replace them in the same place and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamtalk_training.face_identities import Colour
from streamtalk_training.face_mesh import Floats, Ints, smoothstep, triangulate

PUPIL: Colour = (10, 8, 8)
SCLERA: Colour = (218, 210, 205)
SCLERA_EDGE: Colour = (190, 150, 140)
CATCH_LIGHT: Colour = (255, 255, 255)
ENAMEL: Colour = (236, 228, 212)
ENAMEL_NECK: Colour = (216, 200, 176)
ENAMEL_BACK: Colour = (54, 36, 32)
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


# Angle from the gaze axis in degrees of each ring; close pairs of rings make crisp borders.
EYE_RINGS_DEG = (8.5, 9.5, 12.5, 16.5, 19.5, 22.0, 23.5, 30.0, 42.0, 60.0, 90.0)
EYE_SEGMENTS = 28
# Share of the iris's colour at 9.5 to 22 degrees: a light collar round the pupil, a dark rim.
IRIS_SHADES = np.array([(9.5, 0.75), (12.5, 1.35), (16.5, 1.05), (19.5, 0.75), (22.0, 0.30)])
CATCH_LIGHT_AT = np.array([-0.15, 0.125, 0.98])  # between the key light and the viewer, on the cornea
CATCH_LIGHT_DEG = 3.0
CATCH_LIGHT_RADIUS = 1.012  # of the eyeball's: on its tear film


def eye_directions() -> Floats:
    """Unit directions [V, 3] of an eyeball's vertices: rings from the gaze outwards, then front and back pole."""
    turn = np.arange(EYE_SEGMENTS) * (2 * np.pi / EYE_SEGMENTS)
    rings = [
        np.stack([s * np.cos(turn), s * np.sin(turn), np.full(EYE_SEGMENTS, np.cos(a))], axis=1)
        for a, s in ((np.radians(angle), np.sin(np.radians(angle))) for angle in EYE_RINGS_DEG)
    ]
    return np.concatenate([*rings, [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]])


def eye_colors(iris: Colour) -> Floats:
    """Colours [V, 3] of an eyeball: fibres in the iris, light that gathers low in it, the upper lid's shadow."""
    at = eye_directions()
    angle = np.degrees(np.arccos(np.clip(at[:, 2], -1, 1)))
    turn = np.arctan2(at[:, 1], at[:, 0])
    white = smoothstep(angle, 35.0, 65.0)[:, None]
    colors = np.array(SCLERA) + white * (np.array(SCLERA_EDGE) - SCLERA)
    fibres = 1 + 0.16 * np.sin(13 * turn) + 0.10 * np.sin(5 * turn + 1) + 0.08 * np.sin(11 * turn + 2)
    gathered = 1 - 0.30 * at[:, 1] / np.sin(np.radians(22.0))
    shade = np.interp(angle, IRIS_SHADES[:, 0], IRIS_SHADES[:, 1]) * fibres * gathered
    inside = angle < 23.0
    colors[inside] = np.clip(shade[inside, None] * np.array(iris), 0, 255)
    colors[angle < 9.0] = PUPIL
    lid = 0.65 * smoothstep(at[:, 1], 0.05, 0.34)[:, None]
    return np.asarray(colors * (1 - lid))


def eyeball(centre: Floats, radius: float) -> Part:
    """A brown-eyed sphere that looks along +z."""
    count = len(EYE_RINGS_DEG) * EYE_SEGMENTS
    around, ahead = np.arange(EYE_SEGMENTS), (np.arange(EYE_SEGMENTS) + 1) % EYE_SEGMENTS
    last = count - EYE_SEGMENTS
    faces = np.concatenate(
        [
            np.stack([np.full(EYE_SEGMENTS, count), around, ahead], axis=1),
            grid_faces(len(EYE_RINGS_DEG), EYE_SEGMENTS, closed=True),
            np.stack([np.full(EYE_SEGMENTS, count + 1), last + ahead, last + around], axis=1),
        ]
    )
    return Part(centre + radius * eye_directions(), faces, eye_colors((104, 72, 46)))


def catch_light(centre: Floats, radius: float, segments: int = 10) -> Part:
    """The key light's reflection: a bright disc on the cornea, which stays where it is when the eye turns."""
    towards = CATCH_LIGHT_AT / np.linalg.norm(CATCH_LIGHT_AT)
    right = np.cross([0.0, 1.0, 0.0], towards)
    right /= np.linalg.norm(right)
    up = np.cross(towards, right)
    turn = np.arange(segments) * (2 * np.pi / segments)
    disc = towards + np.tan(np.radians(CATCH_LIGHT_DEG)) * (
        np.cos(turn)[:, None] * right + np.sin(turn)[:, None] * up
    )
    points = np.concatenate([disc / np.linalg.norm(disc, axis=1, keepdims=True), towards[None]])
    around = np.arange(segments)
    faces = np.stack([around, (around + 1) % segments, np.full(segments, segments)], axis=1)
    colors = np.tile(np.array(CATCH_LIGHT, float), (segments + 1, 1))
    return Part(centre + CATCH_LIGHT_RADIUS * radius * points, faces, colors)


ARCH_EXPONENT = 2.6  # squarer than an ellipse: teeth fill the mouth's corners


@dataclass(frozen=True)
class Arch:
    """A dental arch: half a superellipse in the x, z plane, teeth from the middle outwards on both sides."""

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
        table = np.linspace(0.0, np.pi / 2, 400)
        depth, power = self.front - self.back, 2 / ARCH_EXPONENT
        curve = np.stack([self.half_width * np.sin(table) ** power, depth * np.cos(table) ** power], axis=1)
        length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
        angle = np.interp(np.abs(arc), length, table)
        x = self.half_width * np.sin(angle) ** power * np.sign(arc)
        z = depth * np.cos(angle) ** power
        outward = np.stack(
            [
                np.sign(x) * (np.abs(x) / self.half_width) ** (ARCH_EXPONENT - 1) / self.half_width,
                (z / depth) ** (ARCH_EXPONENT - 1) / depth,
            ],
            axis=-1,
        )
        outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
        y = self.bite + self.rise * (1 - z / depth) + self.up * height
        return np.stack([x - inward * outward[..., 0], y, self.back + z - inward * outward[..., 1]], axis=-1)


UPPER_ARCH = Arch(
    half_width=0.325,
    front=1.376,
    back=0.90,
    bite=6.652,
    rise=0.045,
    up=1.0,
    widths=(0.086, 0.067, 0.077, 0.070, 0.068, 0.100),
    heights=(0.098, 0.086, 0.096, 0.082, 0.076, 0.072),
)
LOWER_ARCH = Arch(
    half_width=0.305,
    front=1.350,
    back=0.90,
    bite=6.664,
    rise=0.045,
    up=-1.0,
    widths=(0.054, 0.060, 0.070, 0.071, 0.073),
    heights=(0.084, 0.086, 0.094, 0.082, 0.076),
)

# Across a tooth: share of the half width, how far the face steps back, how much the edge is rounded off.
TOOTH_COLUMNS = ((-0.97, 0.012, 0.010), (-0.60, 0.0, 0.001), (0.60, 0.0, 0.001), (0.97, 0.012, 0.010))


def dental_arch(arch: Arch) -> Part:
    """Rounded crowns that stand in a strip of gum, darker the deeper in the mouth."""
    side = np.cumsum([0.0, *arch.widths])
    teeth = []
    for k, (width, height) in enumerate(zip(arch.widths, arch.heights, strict=True)):
        for sign in (1.0, -1.0):
            teeth.append(_tooth(arch, sign * (side[k] + side[k + 1]) / 2, width / 2, height))
    whole = join([*teeth, _gum(arch, float(side[-1]))])
    shade = 0.08 + 0.92 * smoothstep(whole.points[:, 2], arch.back + 0.18, arch.front - 0.015)
    return Part(whole.points, whole.faces, whole.colors * shade[:, None])


def _tooth(arch: Arch, middle: float, half_width: float, height: float) -> Part:
    share, inset, rounding = np.array(TOOTH_COLUMNS).T
    rows = [  # height, inward, colour; from the neck over the face and the edge to the back
        (np.full(4, height * 1.12), inset + 0.014, ENAMEL_NECK),
        (np.full(4, height * 0.80), inset + 0.001, ENAMEL),
        (np.full(4, height * 0.35), inset - 0.002, ENAMEL),
        (0.004 + rounding, inset + 0.003, ENAMEL),
        (0.002 + rounding, inset + 0.016, ENAMEL_NECK),
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
