"""Cuts the mended body to a head and colours it. Decimetres; colours sRGB 0..255."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, vstack

from streamtalk_training import face_parts as parts
from streamtalk_training.face_hair import hair_height
from streamtalk_training.face_identities import Palette
from streamtalk_training.face_mends import LID_UPPER, Rings, steps_inwards
from streamtalk_training.face_mesh import (
    Floats,
    Ints,
    boundary_loops,
    cut,
    project_along_z,
    smoothstep,
    triangulate,
    vertex_normals,
)
from streamtalk_training.face_source import Source

INNER_LIP = (112, 44, 46)
MOUTH = (40, 12, 14)
THROAT = (14, 5, 6)
LID_LINE = (58, 38, 32)
SHADE_IN_NOSTRIL = 0.42
NECK_BASE_SHADE = 0.55
SCALP = (0.02, 0.14)  # heights over the hairline between which the skin turns to the colour of hair

VERMILION = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 0.9, 6: 0.25, -1: 1.0, -2: 0.7}


@dataclass(frozen=True)
class Skin:
    """The cut skin as mixtures of source vertices."""

    weights: csr_matrix  # [V, N]
    faces: Ints  # [F, 3]
    lift: Floats  # [V] off the surface, along the normal
    origin: Ints  # [V] the source vertex that this is, -1 where it is a mixture or a double
    brows: Ints  # left, then right, row by row
    cap: Ints
    rim: Ints  # round the neck's end, the cap's rim too

    def shaped(self, points: Floats, body: Ints) -> Floats:
        """The skin [V, 3] of an identity given as the whole body [N, 3], ended by a plane."""
        normals = self.weights @ vertex_normals(points, body)
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        shaped = np.asarray(self.weights @ points + self.lift[:, None] * normals)
        shaped[self.cap, 1] -= neck_height(shaped[self.cap])
        shaped[self.rim, 1] -= neck_height(shaped[self.rim])
        return shaped

    def painted(self, body: Floats, palette: Palette) -> Floats:
        """Colours [V, 3] of the skin with brows and the neck's end over those of the body [N, 3]."""
        colors = np.asarray(self.weights @ body)
        strength = np.tile(parts.brow_strength().ravel(), 2)[:, None]
        colors[self.brows] += strength * (np.array(palette.brow) - colors[self.brows])
        colors[self.cap] = NECK_BASE_SHADE * np.array(palette.skin)
        return colors


def neck_height(points: Floats) -> Floats:
    """Distance [V] over the plane that ends the neck, lower in front than behind as on a bust."""
    return np.asarray(points[:, 1] + 0.30 * (points[:, 2] - 0.40) - 5.93)


def cut_skin(source: Source, points: Floats, hidden: list[int]) -> Skin:
    """Cut the body to a head at the neck, close it, lay brows on it.

    Faces at `hidden` vertices (behind the eyeballs) are left out.
    """
    body = source.quads["body"]
    near = (points[:, 1] > 5.3) & (np.abs(points[:, 0]) < 1.3)
    near[hidden] = False
    faces = triangulate(body[near[body].all(1)])
    weights = _identity_rows(len(points))

    neck = cut(faces, neck_height(points))
    weights = vstack([weights, _mixed_rows(weights, neck.edges, neck.t)]).tocsr()
    ring = max(boundary_loops(neck.above), key=len)
    rim = np.arange(len(ring)) + weights.shape[0]
    centre = int(rim[-1]) + 1
    mean = csr_matrix(np.full((1, len(ring)), 1 / len(ring))) @ weights[ring]
    weights = vstack([weights, weights[ring], mean]).tocsr()
    cap_faces = np.stack([rim, np.roll(rim, -1), np.full(len(ring), centre)], axis=1)
    cap = np.append(rim, centre)

    lift = np.zeros(weights.shape[0])
    bare = np.concatenate([neck.above, cap_faces])
    brow_faces = []
    at = weights @ points
    for side in (1.0, -1.0):
        xy, card = parts.brow_card(side)
        corners, shares = project_along_z(xy, at, neck.above)
        brow_faces.append(card + weights.shape[0])
        count = np.repeat(np.arange(len(xy)), 3)
        mix = csr_matrix((shares.ravel(), (count, corners.ravel())), shape=(len(xy), weights.shape[0]))
        weights = vstack([weights, mix @ weights]).tocsr()
        lift = np.append(lift, np.repeat(parts.BROW_LIFT, len(xy) // len(parts.BROW_LIFT)))
    everything = np.concatenate([bare, *brow_faces])
    used, compact = np.unique(everything, return_inverse=True)
    origin = np.where(used < len(points), used, -1)
    return Skin(
        weights=weights[used],
        faces=compact.reshape(-1, 3),
        lift=lift[used],
        origin=origin,
        brows=np.flatnonzero(np.isin(used, brow_faces)),
        cap=np.flatnonzero(np.isin(used, cap)),
        rim=np.flatnonzero(np.isin(used, ring)),
    )


def _identity_rows(count: int) -> csr_matrix:
    every = np.arange(count)
    return csr_matrix((np.ones(count), (every, every)), shape=(count, count))


def _mixed_rows(weights: csr_matrix, edges: Ints, t: Floats) -> csr_matrix:
    every = np.repeat(np.arange(len(edges)), 2)
    shares = np.stack([1 - t, t], axis=1).ravel()
    return csr_matrix((shares, (every, edges.ravel())), shape=(len(edges), weights.shape[0])) @ weights


def skin_colors(source: Source, points: Floats, mouth: Rings, lids: list[Rings], palette: Palette) -> Floats:
    """Colours [N, 3] of the body's vertices: skin, blush, lips, the dark of the mouth, lines of the lids."""
    body = source.quads["body"]
    colors = np.tile(np.array(palette.skin, float), (len(points), 1))
    for centre, radius, strength in (
        ((0.42, 6.98, 1.25), 0.26, 0.55),
        ((-0.42, 6.98, 1.25), 0.26, 0.55),
        ((0.0, 6.95, 1.58), 0.14, 0.5),
        ((0.72, 7.25, 0.50), 0.28, 0.6),
        ((-0.72, 7.25, 0.50), 0.28, 0.6),
    ):
        near = np.exp(-(((points - centre) / radius) ** 2).sum(1))[:, None] * strength
        colors += near * (np.array(palette.blush) - colors)
    colors *= 1 - 0.6 * smoothstep(hollowness(points, body), 0.16, 0.7)[:, None]  # light that does not get in
    colors[nostrils(points, body)] = SHADE_IN_NOSTRIL * np.array(palette.skin)
    shadow = 0.9 * smoothstep(hair_height(points), *SCALP)[:, None]
    colors += shadow * (np.array(palette.hair) - colors)
    for ring, strength in VERMILION.items():
        if ring >= 0:
            colors[mouth[ring]] += strength * (np.array(palette.lip) - colors[mouth[ring]])
    inside = steps_inwards(body, mouth[0], mouth[-1])
    for vertex, step in inside.items():
        if step == 0:
            colors[vertex] = INNER_LIP
        else:
            colors[vertex] = np.array(MOUTH) + min((step - 1) / 5, 1.0) * (np.array(THROAT) - MOUTH)
    for rings in lids:
        for vertex in steps_inwards(body, rings[0], rings[-1]):
            colors[vertex] = LID_LINE
        for k in range(28):
            strong = 0.95 if k in LID_UPPER else 0.35
            for ring, fade in ((0, 1.0), (1, 0.6)):
                vertex = rings[ring][k]
                colors[vertex] += strong * fade * (np.array(LID_LINE) - colors[vertex])
    return colors


def nostrils(points: Floats, quads: Ints) -> Ints:
    """Vertices inside the nose: hidden from the front, from above and from the sides."""
    nose = (
        (np.abs(points[:, 0]) < 0.18) & (points[:, 1] > 6.84) & (points[:, 1] < 7.10) & (points[:, 2] > 1.2)
    )
    inside = np.intersect1d(np.flatnonzero(nose), quads)
    faces = triangulate(quads[nose[quads].any(1)])
    for axes, sign in (((0, 1, 2), 1), ((2, 0, 1), 1), ((1, 2, 0), 1), ((1, 2, 0), -1)):
        turned = sign * points[:, axes]
        corners, shares = project_along_z(turned[inside, :2], turned, faces)
        foremost = (shares * turned[corners, 2]).sum(1)
        inside = inside[foremost > turned[inside, 2] + 0.01]
    return inside


def hollowness(points: Floats, quads: Ints) -> Floats:
    """How far the neighbours of each vertex rise over it, by their mean distance [N]; negative on bulges."""
    edges = np.concatenate([quads[:, [k, (k + 1) % 4]] for k in range(4)])
    pull, count = np.zeros_like(points), np.zeros(len(points))
    length = np.zeros(len(points))
    for a, b in ((edges[:, 0], edges[:, 1]), (edges[:, 1], edges[:, 0])):
        step = points[b] - points[a]
        np.add.at(pull, a, step)
        np.add.at(length, a, np.linalg.norm(step, axis=1))
        np.add.at(count, a, 1)
    normals = vertex_normals(points, triangulate(quads))
    return np.asarray((pull * normals).sum(1) / np.maximum(length, 1e-9))
