"""Mesh surgery on small meshes: loops, cuts, caps, projections and rigid fits. Units are the caller's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def triangulate(quads: Ints) -> Ints:
    """Split quads [Q, 4] into triangles [2Q, 3] of the same winding."""
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def vertex_normals(points: Floats, faces: Ints) -> Floats:
    """Area-weighted unit normals [V, 3]; zero where a vertex belongs to no face."""
    corners = points[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(points)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], face_normals)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)


def edge_loop(quads: Ints, first: int, second: int) -> list[int]:
    """The closed loop of edges that goes straight on from `first` to `second` through vertices of valence 4.

    Raises:
        ValueError: the walk meets an irregular vertex before it closes.
    """
    around: dict[int, list[list[int]]] = {}
    for quad in quads.tolist():
        for vertex in quad:
            around.setdefault(vertex, []).append(quad)
    loop = [first, second]
    while True:
        previous, current = loop[-2:]
        beside = {v for quad in around[current] if previous in quad for v in quad}
        ahead = {
            quad[(quad.index(current) + step) % 4] for quad in around[current] for step in (1, -1)
        } - beside
        if len(ahead) != 1 or len(around[current]) != 4:
            raise ValueError(
                f"edge loop from {first} to {second} does not close: it stops at vertex {current}"
            )
        (following,) = ahead
        if following == first:
            return loop
        loop.append(following)


@dataclass(frozen=True)
class Cut:
    """A mesh cut along the zero line of a field.

    New vertex ``V + i`` lies at ``(1 - t[i]) * points[edges[i, 0]] + t[i] * points[edges[i, 1]]``.
    """

    below: Ints  # [Fb, 3] where the field is negative
    above: Ints  # [Fa, 3]
    edges: Ints  # [K, 2]
    t: Floats  # [K]


def cut(faces: Ints, field: Floats, sliver: float = 0.08) -> Cut:
    """Cut triangles [F, 3] along the zero line of a field [V] given at their vertices.

    `sliver` keeps cuts that share of an edge away from its ends, so that no needle triangles arise.
    """
    positive = field >= 0
    count = positive[faces].sum(1)
    mixed = faces[(count == 1) | (count == 2)]
    sides = np.concatenate([mixed[:, [0, 1]], mixed[:, [1, 2]], mixed[:, [2, 0]]])
    crossing = np.sort(sides[positive[sides[:, 0]] != positive[sides[:, 1]]], axis=1)
    edges = np.unique(crossing, axis=0).reshape(-1, 2)
    a, b = field[edges[:, 0]], field[edges[:, 1]]
    t = np.clip(a / (a - b), sliver, 1 - sliver)
    fresh = {(int(i), int(j)): len(field) + k for k, (i, j) in enumerate(edges)}
    parts: dict[bool, list[list[int]]] = {False: [], True: []}
    for triangle in mixed.tolist():
        signs = [bool(positive[v]) for v in triangle]
        lone = next(k for k in range(3) if signs.count(signs[k]) == 1)
        tip, left, right = (triangle[(lone + k) % 3] for k in range(3))
        near = fresh[min(tip, left), max(tip, left)]
        far = fresh[min(tip, right), max(tip, right)]
        parts[signs[lone]].append([tip, near, far])
        parts[not signs[lone]] += [[near, left, right], [near, right, far]]
    below = np.concatenate([faces[count == 0], np.array(parts[False], np.int64).reshape(-1, 3)])
    above = np.concatenate([faces[count == 3], np.array(parts[True], np.int64).reshape(-1, 3)])
    return Cut(below, above, edges, t)


def boundary_loops(faces: Ints) -> list[list[int]]:
    """The open borders of a mesh as vertex loops, each running against its faces (so that a cap fits on)."""
    directed = {(int(a), int(b)) for f in faces for a, b in ((f[0], f[1]), (f[1], f[2]), (f[2], f[0]))}
    following = {b: a for a, b in sorted(directed) if (b, a) not in directed}
    loops = []
    while following:
        loop = [min(following)]
        while (vertex := following.pop(loop[-1])) != loop[0]:
            loop.append(vertex)
        loops.append(loop)
    return loops


def project_along_z(xy: Floats, points: Floats, faces: Ints) -> tuple[Ints, Floats]:
    """Where lines along z through `xy` [P, 2] meet the mesh foremost: corners and their weights, both [P, 3].

    Raises:
        ValueError: a line misses the mesh.
    """
    a, b, c = (points[faces[:, k], :2] for k in range(3))
    area = _cross(b - a, c - a)
    usable = np.abs(area) > 1e-12
    corners, weights = [], []
    for p in xy:
        raw = np.stack([_cross(b - p, c - p), _cross(c - p, a - p), _cross(a - p, b - p)], axis=1)
        shares = raw / np.where(usable, area, 1.0)[:, None]
        inside = usable & (shares >= -1e-9).all(1)
        if not inside.any():
            raise ValueError(f"no surface at x, y = {p}")
        depth = np.where(inside, (shares * points[faces, 2]).sum(1), -np.inf)
        hit = int(np.argmax(depth))
        corners.append(faces[hit])
        weights.append(shares[hit])
    return np.array(corners), np.array(weights)


def project_from(origin: Floats, directions: Floats, points: Floats, faces: Ints) -> tuple[Ints, Floats]:
    """Where rays from `origin` [3] along `directions` [P, 3] first meet the mesh: corners and weights, both [P, 3].

    Moeller and Trumbore, "Fast, minimum storage ray/triangle intersection", J. Graphics Tools 2(1) (1997).

    Raises:
        ValueError: a ray misses the mesh.
    """
    a, b, c = (points[faces[:, k]] for k in range(3))
    first, second, back = b - a, c - a, origin - a
    turned = np.cross(back, first)
    corners, weights = [], []
    for direction in directions:
        across = np.cross(direction, second)
        scale = (first * across).sum(1)
        safe = np.where(np.abs(scale) > 1e-12, scale, np.inf)
        u, v, t = (back * across).sum(1) / safe, turned @ direction / safe, (second * turned).sum(1) / safe
        hit = (np.abs(scale) > 1e-12) & (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9) & (t > 1e-9)
        if not hit.any():
            raise ValueError(f"no surface along {direction} from {origin}")
        nearest = int(np.argmin(np.where(hit, t, np.inf)))
        corners.append(faces[nearest])
        weights.append([1 - u[nearest] - v[nearest], u[nearest], v[nearest]])
    return np.array(corners), np.array(weights)


def _cross(u: Floats, v: Floats) -> Floats:
    return np.asarray(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])


def rigid_fit(points: Floats, moved: Floats) -> tuple[Floats, Floats]:
    """Rotation R [3, 3] and translation t [3] that best carry `points` to `moved` [P, 3].

    ``moved = points @ R.T + t``.
    Kabsch, "A solution for the best rotation to relate two sets of vectors", Acta Cryst. A32 (1976).
    """
    centre, target = points.mean(0), moved.mean(0)
    u, _, vt = np.linalg.svd((points - centre).T @ (moved - target))
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(vt.T @ u.T))])
    rotation = vt.T @ flip @ u.T
    return rotation, target - rotation @ centre


def fit_sphere(points: Floats) -> tuple[Floats, float]:
    """Least-squares centre [3] and radius of points [P, 3] on a sphere."""
    system = np.concatenate([2 * points, np.ones((len(points), 1))], axis=1)
    solution = np.linalg.lstsq(system, (points**2).sum(1), rcond=None)[0]
    centre = solution[:3]
    return centre, float(np.sqrt(solution[3] + centre @ centre))


def smoothstep(x: Floats, low: float, high: float) -> Floats:
    """0 at `low` and before, 1 at `high` and beyond, a cubic between; `high` may be the smaller one."""
    s = np.clip((x - low) / (high - low), 0.0, 1.0)
    return np.asarray(s * s * (3 - 2 * s))
