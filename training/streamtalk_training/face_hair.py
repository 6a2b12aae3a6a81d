"""Combs hair over a head: strands from a parting, as two sheets of vertices, left and right.

A column of a sheet is one strand, so relief and colour run along the hair. The first column frames the forehead,
the last one lies on the middle of the back. Decimetres; colours sRGB 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from streamtalk_training.face_identities import Haircut, Palette
from streamtalk_training.face_mesh import Floats, Ints, project_from, smoothstep, vertex_normals
from streamtalk_training.face_parts import grid_faces

COLUMNS, SCALP_ROWS, HANGING_ROWS = 54, 10, 5
ROWS = SCALP_ROWS + HANGING_ROWS
FADE_COLUMNS, FADE_ROWS = 4.0, 0.45  # how far into a sheet thin hair shows skin
CENTRE = np.array([0.0, 7.45, 0.42])  # within the skull: hair lies where lines from here leave it
AXIS_Z = 0.40  # the upright axis that HAIRLINE's angles go round
TEMPLE_DEG, NAPE_DEG = 73.0, 180.0
FRAME_DEG = 52.0  # where hanging hair begins: in front of the ears
FRAME_TUCK = 0.18  # how much nearer to the cheeks it hangs there, so that the ears hide behind it
LEAVE_HEIGHT = 7.50  # where hanging hair leaves the skull, and below its own line at the temples
CROWN = np.array([0.03, 0.78, -0.55])  # direction from CENTRE
HANGING_RADII = (0.95, 0.98)  # x and z half widths of hanging hair, which clears the ears

HAIRLINE = np.array(  # degrees round from the face, height
    [(0, 7.95), (20, 7.93), (35, 7.87), (48, 7.77), (58, 7.67), (66, 7.58), (71, 7.52), (74, 7.45),
     (78, 7.42), (81, 7.50), (87, 7.54), (98, 7.54), (104, 7.47), (112, 7.20), (122, 6.94), (140, 6.86),
     (180, 6.82)]
)  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """Where the strands of both sides leave the skull of one head."""

    corners: Ints  # [V, 3] skin vertices under each vertex
    shares: Floats  # [V, 3]

    def rows_on(self, count: int) -> csr_matrix:
        """The same as a matrix [V, count] over skin vertices."""
        row = np.repeat(np.arange(len(self.corners)), 3)
        return csr_matrix(
            (self.shares.ravel(), (row, self.corners.ravel())), shape=(len(self.corners), count)
        )


def hair_height(points: Floats) -> Floats:
    """Height [V] over the hairline of the neutral head."""
    angle = np.degrees(np.arctan2(np.abs(points[:, 0]), points[:, 2] - AXIS_Z))
    return np.asarray(points[:, 1] - np.interp(angle, HAIRLINE[:, 0], HAIRLINE[:, 1]))


def comb(points: Floats, faces: Ints, cut: Haircut) -> Sheet:
    """Lay strands over the skin `points` [V, 3]; rows below the hairline stay at its height."""
    part = slerp(
        _toward(points, faces, np.array([cut.part_deg]), HAIRLINE[:1, 1])[0],
        CROWN / np.linalg.norm(CROWN),
        np.linspace(0, 1, COLUMNS),
    )
    along = np.minimum(np.arange(ROWS) / (SCALP_ROWS - 1), 1.0)
    directions = []
    for side in (1.0, -1.0):
        angles = falls_at(cut)
        height = np.interp(angles, HAIRLINE[:, 0], HAIRLINE[:, 1])
        if cut.hangs:
            height = np.maximum(height - 0.06, LEAVE_HEIGHT)
        ends = _toward(points, faces, side * angles, height)
        directions += [
            np.stack([slerp(part[k], ends[k], along) for k in range(COLUMNS)], axis=1).reshape(-1, 3)
        ]
    return Sheet(*project_from(CENTRE, np.concatenate(directions), points, faces))


def falls_at(cut: Haircut) -> Floats:
    """Where each strand of a side ends, in degrees round from the face [COLUMNS]."""
    return np.linspace(FRAME_DEG if cut.hangs else TEMPLE_DEG, NAPE_DEG, COLUMNS)


def _toward(points: Floats, faces: Ints, angles_deg: Floats, height: Floats) -> Floats:
    """Unit directions [P, 3] from CENTRE to the skin at `angles_deg` (signed, left positive) and `height` [P]."""
    turn = np.radians(angles_deg)
    level = np.stack([np.sin(turn), np.zeros_like(turn), np.cos(turn)], axis=1)
    met = []
    for direction, y in zip(level, height, strict=True):
        origin = np.array([0.0, y, AXIS_Z])
        corners, shares = project_from(origin, direction[None], points, faces)
        met.append((shares[0] @ points[corners[0]]) - CENTRE)
    out = np.array(met)
    return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True))


def slerp(a: Floats, b: Floats, share: Floats) -> Floats:
    """Unit vectors [P, 3] on the great circle from `a` to `b` [3] at `share` [P]."""
    angle = np.arccos(np.clip(a @ b, -1, 1))
    return np.asarray(
        (np.sin((1 - share) * angle)[:, None] * a + np.sin(share * angle)[:, None] * b) / np.sin(angle)
    )


def clumps(seed: int) -> Floats:
    """How far each vertex of both sheets stands out, about -1..1 [2, ROWS, COLUMNS]: smooth along the strands.

    Nothing stands out on the last column, where the sheets meet.
    """
    random = np.random.default_rng(seed)
    row, column = np.meshgrid(np.arange(ROWS) / ROWS, np.arange(float(COLUMNS)), indexing="ij")
    sheets = []
    for _ in range(2):
        wander = 1.5 * np.sin(2.2 * row + random.uniform(0, 6))
        total = np.zeros_like(row)
        for period, weight in ((2.6, 0.40), (3.9, 0.6), (6.3, 0.45), (11.0, 0.3)):
            total += weight * np.sin(2 * np.pi * (column + wander) / period + random.uniform(0, 6))
        sheets.append(total * smoothstep(column, COLUMNS - 1.0, COLUMNS - 4.0))
    return np.stack(sheets)


def grow(points: Floats, faces: Ints, sheet: Sheet, cut: Haircut, seed: int) -> Floats:
    """Hair [V, 3] of one identity over its skin `points`."""
    mix = sheet.rows_on(len(points))
    normals = mix @ vertex_normals(points, faces)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    skin = (mix @ points).reshape(2, ROWS, COLUMNS, 3)
    normals = normals.reshape(2, ROWS, COLUMNS, 3)
    s = (np.minimum(np.arange(ROWS), SCALP_ROWS - 1) / (SCALP_ROWS - 1))[None, :, None]
    u = np.linspace(0, 1, COLUMNS)[None, None, :]
    relief = clumps(seed)

    framing = 0.30 + 0.70 * smoothstep(u, 0.0, 0.09)
    parted = smoothstep(s, 0.0, 0.22)
    thickness = cut.top + (cut.sides - cut.top) * smoothstep(s, 0.35, 1.0)
    lift = 0.010 + thickness * framing * parted + cut.clump * relief * parted * np.sqrt(framing)
    grown = skin + np.maximum(lift, 0.008)[..., None] * normals

    below = np.arange(HANGING_ROWS) + 1.0
    edge = grown[:, SCALP_ROWS - 1 : SCALP_ROWS]
    if cut.hangs:
        angle = np.radians(falls_at(cut))
        share = (below / HANGING_ROWS)[None, :, None]
        spread = 1 - 0.10 * smoothstep(share, 0.55, 1.0) + 0.014 * relief[:, SCALP_ROWS:]
        spread = spread * (1 - FRAME_TUCK * smoothstep(np.cos(angle), 0.2, 0.6))
        side = np.array([1.0, -1.0])[:, None, None]
        out = np.stack(
            [
                side * HANGING_RADII[0] * np.sin(angle) * spread,
                np.zeros_like(spread),
                AXIS_Z + HANGING_RADII[1] * np.cos(angle) * spread,
            ],
            axis=-1,
        )
        ragged = cut.tips + 0.05 * relief[:, -1:] + 0.10 * smoothstep(np.cos(angle), -0.3, 0.3)
        height = edge[..., 1] + share * (ragged - edge[..., 1])
        leave = smoothstep(share, -0.15, 0.45)[..., None]
        grown[:, SCALP_ROWS:] = edge + leave * (out - edge)
        grown[:, SCALP_ROWS:, :, 1] = height
        for _ in range(2):  # no kink where the strands leave the skull
            grown[:, 4:-1] = (grown[:, 3:-2] + 2 * grown[:, 4:-1] + grown[:, 5:]) / 4
    else:  # the rest of the sheet is tucked into the head, where it closes the edge
        inwards = CENTRE * (1, 0, 1) - edge * (1, 0, 1)
        inwards /= np.linalg.norm(inwards, axis=-1, keepdims=True)
        grown[:, SCALP_ROWS:] = edge + (0.02 * below)[None, :, None, None] * inwards
    return np.asarray(grown.reshape(-1, 3))


def strand_colors(cut: Haircut, palette: Palette, seed: int) -> Floats:
    """Colours [V, 3]: darker in the hollows and at the parting, a sheen round the head, faded into the skin."""
    relief = clumps(seed)
    row = np.arange(ROWS)[None, :, None] / (SCALP_ROWS - 1)
    column = np.arange(float(COLUMNS))[None, None, :]
    fine = np.random.default_rng(seed + 1).uniform(-0.14, 0.14, (2, 1, COLUMNS))
    sheen = 0.28 * np.exp(-(((row - 0.50) / 0.18) ** 2)) + 0.15 * np.exp(-(((row - 1.25) / 0.2) ** 2))
    shade = 0.92 + 0.20 * relief + fine + sheen * (1 + 0.5 * relief) - 0.30 * np.exp(-((row / 0.12) ** 2))
    colors = np.clip(shade, 0.4, 1.7)[..., None] * np.array(palette.hair)
    thin = cut.fade * np.maximum(smoothstep(column, FADE_COLUMNS, 0.0), smoothstep(row, 1.0 - FADE_ROWS, 1.0))
    colors += thin[..., None] * (np.array(palette.skin) - colors)
    return np.asarray(colors.reshape(-1, 3))


def sheet_faces() -> Ints:
    """Triangles of both sheets, wound to be seen from outside."""
    left = grid_faces(ROWS, COLUMNS)
    return np.concatenate([left, left[:, ::-1] + ROWS * COLUMNS])


def follow_skin(sheet: Sheet, deltas: Floats) -> Floats:
    """Deltas [S, V, 3] of hair under those of the skin [S, V_skin, 3]; hanging hair stays more and more."""
    keep = np.ones((2, ROWS, COLUMNS))
    keep[:, SCALP_ROWS:] = np.linspace(0.8, 0.0, HANGING_ROWS)[None, :, None]
    mix = sheet.rows_on(deltas.shape[1])
    return np.stack([keep.reshape(-1, 1) * (mix @ delta) for delta in deltas])
