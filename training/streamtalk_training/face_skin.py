"""Cuts the mended body to a head and colours it. Decimetres; colours sRGB 0..255."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, vstack

from streamtalk_training import face_parts as parts
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

SKIN = (214, 164, 138)
BLUSH = (205, 138, 118)
LIP = (184, 104, 97)
INNER_LIP = (120, 50, 52)
MOUTH = (44, 14, 16)
THROAT = (18, 6, 8)
HAIR = (58, 43, 35)
BROW = (74, 55, 45)
LID_LINE = (70, 46, 38)
NOSTRIL = (96, 52, 44)
NECK_BASE = (120, 88, 74)

VERMILION = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 0.9, 6: 0.25, -1: 1.0, -2: 0.7}


@dataclass(frozen=True)
class Skin:
    """The cut skin as mixtures of source vertices."""

    weights: csr_matrix  # [V, N]
    faces: Ints  # [F, 3]
    lift: Floats  # [V] off the surface, along the normal
    origin: Ints  # [V] the source vertex that this is, -1 where it is a mixture or a double
    hair: Ints
    brows: Ints  # left, then right, row by row
    cap: Ints

    def shaped(self, points: Floats, body: Ints) -> Floats:
        """The skin [V, 3] of an identity given as the whole body [N, 3]."""
        normals = self.weights @ vertex_normals(points, body)
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        return np.asarray(self.weights @ points + self.lift[:, None] * normals)

    def painted(self, body: Floats) -> Floats:
        """Colours [V, 3] of the skin with hair, brows and the neck's end over those of the body [N, 3]."""
        colors = np.asarray(self.weights @ body)
        colors[self.hair] = HAIR
        strength = np.tile(parts.brow_strength().ravel(), 2)[:, None]
        colors[self.brows] += strength * (np.array(BROW) - colors[self.brows])
        colors[self.cap] = NECK_BASE
        return colors


def neck_height(points: Floats) -> Floats:
    """Distance [V] over the plane that ends the neck, lower in front than behind as on a bust."""
    return np.asarray(points[:, 1] + 0.30 * (points[:, 2] - 0.40) - 5.93)


HAIRLINE = np.array(  # degrees round from the face, height
    [(0, 8.00), (20, 7.98), (35, 7.91), (48, 7.79), (58, 7.68), (66, 7.58), (71, 7.52), (74, 7.39),
     (78, 7.35), (81, 7.43), (87, 7.46), (98, 7.46), (104, 7.38), (112, 7.12), (122, 6.94), (140, 6.86),
     (180, 6.82)]
)  # fmt: skip


def hair_height(points: Floats) -> Floats:
    """Height [V] over the hairline of the neutral head."""
    angle = np.degrees(np.arctan2(np.abs(points[:, 0]), points[:, 2] - 0.40))
    return np.asarray(points[:, 1] - np.interp(angle, HAIRLINE[:, 0], HAIRLINE[:, 1]))


def cut_skin(source: Source, points: Floats, hidden: list[int]) -> Skin:
    """Cut the body to a head at the neck, close it, cut it again along the hairline, lay brows on it.

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

    at = weights @ points
    grown = hair_height(at)
    hairline = cut(neck.above, grown)
    fresh = weights.shape[0] + np.arange(len(hairline.edges))
    rows = _mixed_rows(weights, hairline.edges, hairline.t)
    weights = vstack([weights, rows, rows]).tocsr()
    double = np.arange(weights.shape[0])
    double[fresh] += len(fresh)
    scalp = double[hairline.above]
    lift = np.zeros(weights.shape[0])
    lift[: len(grown)] = np.where(grown > 0, 0.012 + 0.075 * smoothstep(grown, 0.0, 0.45), 0.0)
    hair = np.unique(scalp)
    lift[np.setdiff1d(np.arange(len(lift)), hair)] = 0.0

    bare = np.concatenate([hairline.below, cap_faces])
    brow_faces = []
    at = weights @ points
    for side in (1.0, -1.0):
        xy, card = parts.brow_card(side)
        corners, shares = project_along_z(xy, at, hairline.below)
        brow_faces.append(card + weights.shape[0])
        count = np.repeat(np.arange(len(xy)), 3)
        mix = csr_matrix((shares.ravel(), (count, corners.ravel())), shape=(len(xy), weights.shape[0]))
        weights = vstack([weights, mix @ weights]).tocsr()
        lift = np.append(lift, np.repeat(parts.BROW_LIFT, len(xy) // len(parts.BROW_LIFT)))
    everything = np.concatenate([bare, scalp, *brow_faces])
    used, compact = np.unique(everything, return_inverse=True)
    origin = np.where(used < len(points), used, -1)
    return Skin(
        weights=weights[used],
        faces=compact.reshape(-1, 3),
        lift=lift[used],
        origin=origin,
        hair=np.flatnonzero(np.isin(used, hair)),
        brows=np.flatnonzero(np.isin(used, brow_faces)),
        cap=np.flatnonzero(np.isin(used, cap)),
    )


def _identity_rows(count: int) -> csr_matrix:
    every = np.arange(count)
    return csr_matrix((np.ones(count), (every, every)), shape=(count, count))


def _mixed_rows(weights: csr_matrix, edges: Ints, t: Floats) -> csr_matrix:
    every = np.repeat(np.arange(len(edges)), 2)
    shares = np.stack([1 - t, t], axis=1).ravel()
    return csr_matrix((shares, (every, edges.ravel())), shape=(len(edges), weights.shape[0])) @ weights


def skin_colors(source: Source, points: Floats, mouth: Rings, lids: list[Rings]) -> Floats:
    """Colours [N, 3] of the body's vertices: skin, blush, lips, the dark of the mouth, lines of the lids."""
    body = source.quads["body"]
    colors = np.tile(np.array(SKIN, float), (len(points), 1))
    for centre, radius, strength in (
        ((0.42, 6.98, 1.25), 0.26, 0.55),
        ((-0.42, 6.98, 1.25), 0.26, 0.55),
        ((0.0, 6.95, 1.58), 0.14, 0.5),
        ((0.72, 7.25, 0.50), 0.28, 0.6),
        ((-0.72, 7.25, 0.50), 0.28, 0.6),
    ):
        near = np.exp(-(((points - centre) / radius) ** 2).sum(1))[:, None] * strength
        colors += near * (np.array(BLUSH) - colors)
    colors *= 1 - 0.8 * smoothstep(hollowness(points, body), 0.12, 0.6)[:, None]  # light that does not get in
    colors[nostrils(points, body)] = NOSTRIL
    for ring, strength in VERMILION.items():
        if ring >= 0:
            colors[mouth[ring]] += strength * (np.array(LIP) - colors[mouth[ring]])
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
