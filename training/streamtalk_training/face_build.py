"""Builds the bundled head from MakeHuman's mesh: identities, mends, skin, and the parts that move beside it.

Every vertex of the skin is a fixed mixture of source vertices, so identities and face shapes come along by one
sparse product. Decimetres until the end.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from streamtalk_training import face_parts as parts
from streamtalk_training.face_mends import (
    LID_MIDDLE,
    LIP_PAIRS,
    MOUTH_CORNERS,
    lid_rings,
    mend_shapes,
    mouth_rings,
    seal_lips,
    steps_inwards,
)
from streamtalk_training.face_mesh import Floats, Ints, fit_sphere, follow, rigid_fit, smoothstep, triangulate
from streamtalk_training.face_skin import cut_skin, neck_height, skin_colors
from streamtalk_training.face_source import Source

METRES_PER_UNIT = 0.1
YOUNG = tuple(
    f"{people}-{sex}-young" for people in ("african", "asian", "caucasian") for sex in ("female", "male")
)

# Identities: which young macro targets are mixed evenly, and what is added to them.
IDENTITIES: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "ada": (YOUNG, {}),
    "ben": (
        tuple(name for name in YOUNG if "-male" in name),
        {"head/head-square": 0.35, "chin/chin-width-incr": 0.4, "nose/nose-scale-horiz-incr": 0.3},
    ),
    "cleo": (
        tuple(name for name in YOUNG if "-female" in name),
        {"head/head-oval": 0.5, "mouth/mouth-lowerlip-volume-incr": 0.4},
    ),
    "dan": (
        YOUNG,
        {
            "head/head-round": 0.7,
            "nose/nose-hump-incr": 0.5,
            "chin/chin-prominent-incr": 0.5,
            "nose/nose-scale-vert-incr": 0.3,
        },
    ),
}

TONGUE = (168, 80, 80)
TONGUE_ROOT = (36, 12, 14)
TONGUE_FLOOR = 6.53
TONGUE_HEIGHT = 0.62  # as made it fills the mouth up to the palate and hides the upper teeth
TONGUE_REST = np.array([0.0, 0.025, -0.055])
TONGUE_SINKS = 0.16  # its back, under jawOpen: turned rigidly with the jaw it would rise before the throat
TONGUE_OUT = np.array([0.0, 0.13, 0.42])


@dataclass(frozen=True)
class Head:
    """A finished head in metres; shapes as in `streamtalk_training.face.Face`."""

    templates: Floats
    faces: Ints
    colors: Floats
    deltas: Floats
    lip_pairs: Ints
    mouth_corners: Ints
    lids: Ints
    lips: Ints
    upper_face: Ints


def log(message: str) -> None:
    """Progress, on stderr."""
    print(f"face: {message}", file=sys.stderr)


def build_head(source: Source, shape_names: tuple[str, ...]) -> Head:
    """Make the head with face shapes `shape_names` and all `IDENTITIES`."""
    log("reading identities and face shapes")
    templates = np.stack([identity(source, *recipe) for recipe in IDENTITIES.values()])
    deltas = np.stack([source.shape(name) for name in shape_names])
    body = source.quads["body"]
    mouth, lids = mouth_rings(source), lid_rings(source)

    log("mending lips and lids")
    templates = np.stack([seal_lips(points, mouth) for points in templates])
    deltas = mend_shapes(templates[0], deltas, shape_names, mouth, lids)

    log("cutting the skin")
    socket = [steps_inwards(body, rings[0], rings[-1]) for rings in lids.values()]
    skin = cut_skin(source, templates[0], hidden=[v for steps in socket for v, n in steps.items() if n > 3])
    colors = skin.painted(skin_colors(source, templates[0], mouth, list(lids.values())))
    still = smoothstep(neck_height(skin.weights @ templates[0]), 0.0, 0.3)[:, None]

    log("adding eyes, teeth, tongue")
    extra = [
        *(eye_part(source, templates, deltas, group) for group in ("helper-l-eye", "helper-r-eye")),
        upper_teeth(source, templates, len(deltas)),
        lower_teeth(source, templates, deltas),
        tongue(source, templates, deltas, shape_names),
    ]
    shaped = np.stack([skin.shaped(points, triangulate(body)) for points in templates])
    origins = np.stack([head_centre(source, points) for points in templates])
    starts = np.cumsum([skin.weights.shape[0]] + [len(part.colors) for part in extra])
    place = {int(v): k for k, v in enumerate(skin.origin) if v >= 0}
    indices = np.vectorize(place.__getitem__, otypes=[np.int64])
    rest = shaped[0]
    eye_height = float(rest[indices(lids["Left"][0])][:, 1].mean())
    upper = (rest[:, 1] > eye_height - 0.12) & (rest[:, 2] > 0.75) & (skin.origin >= 0)
    upper[skin.hair] = False
    upper &= ~np.isin(skin.origin, [v for steps in socket for v in steps])
    return Head(
        templates=(np.concatenate([shaped, *(p.templates for p in extra)], axis=1) - origins[:, None])
        * METRES_PER_UNIT,
        faces=np.concatenate([skin.faces, *(p.faces + s for p, s in zip(extra, starts, strict=False))]),
        colors=np.concatenate([colors, *(p.colors for p in extra)]),
        deltas=np.concatenate(
            [np.stack([skin.weights @ delta for delta in deltas]) * still, *(p.deltas for p in extra)], axis=1
        )
        * METRES_PER_UNIT,
        lip_pairs=indices([[mouth[0][a], mouth[0][b]] for a, b in LIP_PAIRS]),
        mouth_corners=indices([mouth[0][k] for k in MOUTH_CORNERS]),
        lids=indices([[rings[0][LID_MIDDLE], rings[0][15 - LID_MIDDLE]] for rings in lids.values()]),
        lips=np.sort(indices([v for ring, loop in mouth.items() if 0 <= ring <= 5 for v in loop])),
        upper_face=np.flatnonzero(upper),
    )


def identity(source: Source, macros: tuple[str, ...], details: dict[str, float]) -> Floats:
    """The whole body [N, 3] of an even mix of macro targets with details on top."""
    mix = sum((source.target(f"macrodetails/{name}") for name in macros), np.zeros_like(source.points))
    added = sum((w * source.target(name) for name, w in details.items()), np.zeros_like(source.points))
    return np.asarray(source.points + mix / len(macros) + added)


def head_centre(source: Source, points: Floats) -> Floats:
    """The point between the ears [3]: mean of the vertices by how much the ear-size targets move them."""
    pull = sum(
        (np.linalg.norm(source.target(f"ears/{s}-ear-scale-incr"), axis=1) for s in "lr"),
        np.zeros(len(points)),
    )
    centre = pull @ points / pull.sum()
    return np.asarray(centre * (0, 1, 1))


@dataclass(frozen=True)
class MovingPart:
    """A part beside the skin with its identities and face shapes."""

    templates: Floats  # [n, V, 3]
    faces: Ints
    colors: Floats
    deltas: Floats  # [S, V, 3]


def eye_part(source: Source, templates: Floats, deltas: Floats, group: str) -> MovingPart:
    """An eyeball where the helper eye is, turning about its centre by the rotation found in the helper's shapes."""
    helper = source.vertices_of(group)
    balls = [parts.eyeball(*fit_sphere(points[helper])) for points in templates]
    rest = templates[0][helper]
    centre = fit_sphere(rest)[0]
    turned = np.zeros((len(deltas), len(balls[0].points), 3))
    for k, delta in enumerate(deltas[:, helper]):
        if np.abs(delta).max() > 0:
            rotation, _ = rigid_fit(rest, rest + delta)
            turned[k] = (balls[0].points - centre) @ (rotation - np.eye(3)).T
    return MovingPart(np.stack([b.points for b in balls]), balls[0].faces, balls[0].colors, turned)


def upper_teeth(source: Source, templates: Floats, shapes: int) -> MovingPart:
    """The upper arch, fast to the skull."""
    helper = source.vertices_of("helper-upper-teeth")
    arch = parts.dental_arch(parts.UPPER_ARCH)
    placed = np.stack([follow(arch.points, templates[0][helper], points[helper]) for points in templates])
    return MovingPart(placed, arch.faces, arch.colors, np.zeros((shapes, *arch.points.shape)))


def jaw_motion(source: Source, rest: Floats, delta: Floats, points: Floats) -> Floats:
    """Deltas of `points` [P, 3] that move rigidly with the lower teeth under the face shape `delta` [N, 3]."""
    helper = source.vertices_of("helper-lower-teeth")
    if (
        np.linalg.norm(delta[helper], axis=1).min() < 0.01
    ):  # noise of a tenth of a millimetre is no motion of the jaw
        return np.zeros_like(points)
    rotation, translation = rigid_fit(rest[helper], rest[helper] + delta[helper])
    return points @ rotation.T + translation - points


def lower_teeth(source: Source, templates: Floats, deltas: Floats) -> MovingPart:
    """The lower arch, fast to the jaw."""
    helper = source.vertices_of("helper-lower-teeth")
    arch = parts.dental_arch(parts.LOWER_ARCH)
    placed = np.stack([follow(arch.points, templates[0][helper], points[helper]) for points in templates])
    moved = np.stack([jaw_motion(source, templates[0], delta, arch.points) for delta in deltas])
    return MovingPart(placed, arch.faces, arch.colors, moved)


def tongue(source: Source, templates: Floats, deltas: Floats, shape_names: tuple[str, ...]) -> MovingPart:
    """MakeHuman's tongue, laid behind the teeth, fast to the jaw; put out it stretches from its root."""
    quads = source.quads["helper-tongue"]
    helper = source.vertices_of("helper-tongue")
    faces = np.searchsorted(helper, triangulate(quads))
    placed = templates[:, helper]
    placed[..., 1] = TONGUE_FLOOR + TONGUE_HEIGHT * (placed[..., 1] - TONGUE_FLOOR)
    placed += TONGUE_REST
    rest = placed[0]
    moved = np.stack([jaw_motion(source, templates[0], delta, rest) for delta in deltas])
    back = smoothstep(rest[:, 2], 1.20, 0.75)
    moved[shape_names.index("jawOpen"), :, 1] -= TONGUE_SINKS * back
    forward = smoothstep(rest[:, 2], float(rest[:, 2].min()) + 0.15, float(rest[:, 2].max()))[:, None]
    moved[shape_names.index("tongueOut")] = forward * TONGUE_OUT
    colors = np.array(TONGUE_ROOT) + forward * (np.array(TONGUE, float) - TONGUE_ROOT)
    return MovingPart(placed, faces, colors, moved)
