"""Mends what MakeHuman's face lacks for talking, on the whole body's vertices, where its edge loops are intact.

Decimetres. A closed mouth is what speech needs most: as made, the lips rest a hairline apart, and shapes of closed
lips slide one past the other.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from streamtalk_training.face_mesh import Floats, Ints, edge_loop, smoothstep
from streamtalk_training.face_source import Source

Rings = dict[
    int, list[int]
]  # edge loops by their place around an opening: 0 its margin, > 0 outwards, < 0 inwards

# Upper midline vertices of MakeHuman's loops around the mouth, from the lips' contact line outwards and
# inwards. Each loop has 38 vertices; index 0 is the upper midline, index 19 the lower one.
MOUTH_RINGS = {0: 520, 1: 474, 2: 468, 3: 509, 4: 467, 5: 466, 6: 455, -1: 537, -2: 554, -3: 571}
SEAM_PAIRS = (
    (0, 19), (2, 18), (4, 17), (6, 16), (8, 15), (9, 14), (10, 13),
    (36, 20), (34, 21), (32, 22), (30, 23), (29, 24), (28, 25),
)  # fmt: skip
LIP_PAIRS = ((34, 21), (36, 20), (0, 19), (2, 18), (4, 17))
MOUTH_CORNERS = (11, 27)
# Shapes of closed lips: as made, they slide one lip's contact line 1 to 3 mm past the other's.
LIPS_TOGETHER = (
    "mouthPress", "mouthSmile", "mouthFrown", "mouthDimple", "mouthStretch", "mouthPucker", "mouthLeft",
    "mouthRight", "cheekPuff", "cheekSquint", "noseSneer",
)  # fmt: skip
FUNNEL_OPENING = 0.6  # as made, a full funnel parts the lips by 14 mm with the jaw closed

# The left eye's loops around its opening: margin of the lid, then outwards (+) and towards the eyeball (-).
# They have 28 vertices; upper index i lies over lower index 15 - i.
LID_RINGS = {0: 6784, 1: 11466, 2: 6786, 3: 6788, -1: 13353}
LID_FALLOFF = {0: 1.0, 1: 0.95, 2: 0.85, 3: 0.5, -1: 0.95}
LID_UPPER = (25, 26, 27, 0, 1, 2, 3, 4)
LID_MIDDLE = 1

LOBE = np.array([0.72, 6.95, 0.55])  # where the left ear lobe meets the jaw
LOBE_REACH = 0.22
LOBE_PASSES = 6


def mouth_rings(source: Source) -> Rings:
    """The loops around the mouth."""
    body = source.quads["body"]
    return {
        ring: edge_loop(body, start, _neighbour(source, start, outwards=1.0))
        for ring, start in MOUTH_RINGS.items()
    }


def lid_rings(source: Source) -> dict[str, Rings]:
    """The loops around the eyes, by ARKit's name of the side."""
    body = source.quads["body"]
    left = {
        ring: edge_loop(body, start, _neighbour(source, start, outwards=-1.0))
        for ring, start in LID_RINGS.items()
    }
    opposite = cKDTree(source.points).query(source.points * (-1, 1, 1))[1]
    return {"Left": left, "Right": {ring: [int(opposite[v]) for v in loop] for ring, loop in left.items()}}


def mend_shapes(
    rest: Floats, deltas: Floats, shape_names: tuple[str, ...], mouth: Rings, lids: dict[str, Rings]
) -> Floats:
    """Face shapes [S, N, 3] mended for the resting face `rest` [N, 3], whose lips must be sealed already.

    Shapes of closed lips keep them together, mouthClose undoes jawOpen exactly at the lips, a blink just closes.
    """
    mended = deltas.copy()
    for k, name in enumerate(shape_names):
        if name.startswith(LIPS_TOGETHER):
            mended[k] = seal_lips(rest + deltas[k], mouth) - rest
    funnel = shape_names.index("mouthFunnel")
    together = seal_lips(rest + deltas[funnel], mouth) - rest
    mended[funnel] += (1 - FUNNEL_OPENING) * (together - deltas[funnel])
    jaw = rest + deltas[shape_names.index("jawOpen")]
    close = shape_names.index("mouthClose")
    mended[close] = seal_lips(jaw + deltas[close], mouth) - jaw
    for side, rings in lids.items():
        blink = shape_names.index(f"eyeBlink{side}")
        mended[blink] = close_lids(rest, deltas[blink], rings)
    return mended


def seal_lips(points: Floats, mouth: Rings) -> Floats:
    """Bring the lips' contact lines together in `points` [N, 3], so that a resting mouth is closed.

    Paired vertices meet half way; the upper ones between them come to lie on the line between the meeting
    points. The loops beside follow the contact line and fade out.
    """
    seam = np.array(mouth[0])
    move = np.zeros((len(seam), 3))
    for upper, lower in SEAM_PAIRS:
        half = (points[seam[lower]] - points[seam[upper]]) / 2
        move[upper], move[lower] = half, -half
    met = points[seam] + move
    for between in (1, 3, 5, 7):
        for k, step in ((between, 1), (38 - between, -1)):
            a, b = met[(k - step) % 38], met[(k + step) % 38]
            share = np.clip((points[seam[k], 0] - a[0]) / (b[0] - a[0]), 0.1, 0.9)
            move[k] = a + share * (b - a) - points[seam[k]]
    sealed = points.copy()
    for ring, loop in mouth.items():
        fade = 1.0 - abs(ring) / (5.0 if ring > 0 else 4.0)
        if fade > 0:
            sealed[loop] += fade * move
    return sealed


def close_lids(points: Floats, delta: Floats, lids: Rings) -> Floats:
    """Mend a blink [N, 3] that drives the upper lid 3 mm past the lower one, so that the margins just meet.

    The shape is scaled by what each place across the eye needs; what is left at the margin goes into the loops
    there.
    """
    margin = np.array(lids[0])
    upper = np.array(LID_UPPER)
    above, below = margin[upper], margin[(15 - upper) % 28]
    need = (points[below] - points[above])[:, 1]
    have = (delta[above] - delta[below])[:, 1]
    order = np.argsort(points[above, 0])
    factor = np.interp(points[:, 0], points[above, 0][order], (need / have)[order])
    mended = delta * factor[:, None]
    move = np.zeros((28, 3))
    move[upper] = points[below] + mended[below] - points[above] - mended[above]
    for ring, loop in lids.items():
        mended[loop] += LID_FALLOFF[ring] * move
    return mended


def match_lids(templates: Floats, lids: dict[str, Rings]) -> Floats:
    """Identities [n, N, 3] whose lids stand as far apart as the first one's, since all share one blink."""
    matched = templates.copy()
    upper = np.array(LID_UPPER)
    lower = (15 - upper) % 28
    for rings in lids.values():
        margin = np.array(rings[0])
        apart = templates[:, margin[upper]] - templates[:, margin[lower]]
        move = np.zeros((len(templates), 28, 3))
        move[:, upper] = (apart[:1] - apart) / 2
        move[:, lower] = -move[:, upper]
        for ring, loop in rings.items():
            matched[:, loop] += LID_FALLOFF[ring] * move
    return matched


def round_lobes(points: Floats, quads: Ints) -> Floats:
    """Round off the ear lobes of `points` [N, 3], which as made end in a step over the jaw."""
    near = np.linalg.norm(np.abs(points) - LOBE, axis=1) < LOBE_REACH
    near &= np.isin(np.arange(len(points)), quads)
    edges = np.concatenate([quads[:, [k, (k + 1) % 4]] for k in range(4)])
    edges = edges[near[edges].any(1)]
    count = np.zeros(len(points))
    for side in (0, 1):
        np.add.at(count, edges[:, side], 1)
    fade = smoothstep(np.linalg.norm(np.abs(points) - LOBE, axis=1), LOBE_REACH, 0.5 * LOBE_REACH)[near, None]
    rounded = points.copy()
    for _ in range(LOBE_PASSES):
        total = np.zeros_like(points)
        np.add.at(total, edges[:, 0], rounded[edges[:, 1]])
        np.add.at(total, edges[:, 1], rounded[edges[:, 0]])
        rounded[near] += 0.5 * fade * (total[near] / count[near, None] - rounded[near])
    return rounded


def steps_inwards(quads: Ints, border: list[int], first: list[int]) -> dict[int, int]:
    """Edge steps from the loop `first` to every vertex that it reaches without crossing the loop `border`."""
    beside: dict[int, set[int]] = {}
    for quad in quads.tolist():
        for k in range(4):
            beside.setdefault(quad[k], set()).update((quad[k - 1], quad[(k + 1) % 4]))
    steps = dict.fromkeys(first, 0)
    front, closed = list(first), set(border)
    while front:
        following = sorted({v for u in front for v in beside[u]} - closed - steps.keys())
        steps.update(dict.fromkeys(following, steps[front[0]] + 1))
        front = following
    return steps


def _neighbour(source: Source, start: int, outwards: float) -> int:
    """The neighbour of `start` farthest from the nose (`outwards` +1) or nearest to it (-1); of two, the left one."""
    body = source.quads["body"]
    rows, at = np.nonzero(body == start)
    beside = np.unique(np.concatenate([body[rows, (at + 1) % 4], body[rows, (at - 1) % 4]]))
    x = source.points[beside, 0]
    return int(beside[np.argmax(outwards * np.abs(x) + 1e-6 * x)])
