"""Builds the bundled head from MakeHuman's mesh: identities, mends, skin, and the parts that move beside it.

Every vertex of the skin is a fixed mixture of source vertices, so identities and face shapes come along by one
sparse product. Decimetres until the end.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from streamtalk_training import face_hair as hair
from streamtalk_training import face_parts as parts
from streamtalk_training.face_hair import hair_height
from streamtalk_training.face_identities import IDENTITIES, Identity
from streamtalk_training.face_mends import (
    LID_MIDDLE,
    LIP_PAIRS,
    MOUTH_CORNERS,
    Rings,
    lid_rings,
    match_lids,
    mend_shapes,
    mouth_rings,
    round_lobes,
    seal_lips,
    steps_inwards,
)
from streamtalk_training.face_mesh import Floats, Ints, fit_sphere, rigid_fit, smoothstep, triangulate
from streamtalk_training.face_skin import cut_skin, neck_height, skin_colors
from streamtalk_training.face_source import Source

METRES_PER_UNIT = 0.1
EYES = np.array([0.0, 7.356, 1.18])
MOUTH = np.array([0.0, 6.682, 1.455])  # where the lips meet in front of the arches as face_parts lays them
NECK_BLEND = 0.7  # over the neck's end, where everyone's neck passes into the first one's
# Shapes that belong to the resting face: as made, the upper lids cut the pupils and the mouth looks sullen.
AT_REST = {"eyeWide": 0.2, "mouthSmile": 0.16}
LASH_VERTICES = (4, 3, 2, 1, 0, 27, 26, 25, 24, 23, 22)  # of the lid's margin, from the nose outwards
LASH_COLUMNS = 31
LASH = np.array([0.006, 0.018, 0.026])  # outwards, up, forwards
LASH_UNDER_BLINK = np.array([0.0, -0.032, 0.0])
LASH_COLOUR = (30, 21, 19)

TONGUE = (168, 80, 80)
TONGUE_ROOT = (36, 12, 14)
TONGUE_FLOOR = 6.53
TONGUE_HEIGHT = 0.62  # as made it fills the mouth up to the palate and hides the upper teeth
TONGUE_REST = np.array([0.0, 0.025, -0.055])
TONGUE_SINKS = 0.16  # its back, under jawOpen: turned rigidly with the jaw it would rise before the throat
TONGUE_OUT = np.array([0.0, 0.06, 0.42])


@dataclass(frozen=True)
class Head:
    """A finished head in metres; shapes as in `streamtalk_training.face.Face`."""

    templates: Floats
    faces: Ints
    colors: Floats  # [n, V, 3]
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
    recipes = list(IDENTITIES.values())
    templates = np.stack([identity(source, recipe) for recipe in recipes])
    deltas = np.stack([source.shape(name) for name in shape_names])
    body = source.quads["body"]
    mouth, lids = mouth_rings(source), lid_rings(source)

    log("mending lips and lids")
    for name, weight in AT_REST.items():
        for side in ("Left", "Right"):
            templates += weight * deltas[shape_names.index(name + side)]
    templates = np.stack([round_lobes(points, body) for points in templates])
    templates = match_necks(match_lids(np.stack([seal_lips(points, mouth) for points in templates]), lids))
    deltas = mend_shapes(templates[0], deltas, shape_names, mouth, lids)

    log("cutting the skin")
    socket = [steps_inwards(body, rings[0], rings[-1]) for rings in lids.values()]
    skin = cut_skin(source, templates[0], hidden=[v for steps in socket for v, n in steps.items() if n > 3])
    shaped = np.stack([skin.shaped(points, triangulate(body)) for points in templates])
    colors = np.stack(
        [
            skin.painted(
                skin_colors(source, templates[0], mouth, list(lids.values()), recipe.palette), recipe.palette
            )
            for recipe in recipes
        ]
    )
    still = smoothstep(neck_height(shaped[0]), 0.0, 0.3)[:, None]
    moved = np.stack([skin.weights @ delta for delta in deltas]) * still

    mouths = templates[:, [mouth[0][0], mouth[0][19]]].mean(1) - MOUTH
    log("adding eyes, teeth, tongue, hair")
    extra = [
        *(
            part
            for group in ("helper-l-eye", "helper-r-eye")
            for part in eye_parts(source, templates, deltas, group)
        ),
        upper_teeth(mouths, len(deltas)),
        lower_teeth(source, templates, mouths, deltas),
        tongue(source, templates, mouths, deltas, shape_names),
        hair_part(shaped, skin.faces, moved),
        *(lashes(templates, deltas, shape_names, side, rings) for side, rings in lids.items()),
    ]
    origins = np.stack([head_centre(source, points) for points in templates])
    starts = np.cumsum([skin.weights.shape[0]] + [p.templates.shape[1] for p in extra])
    place = {int(v): k for k, v in enumerate(skin.origin) if v >= 0}
    indices = np.vectorize(place.__getitem__, otypes=[np.int64])
    rest = shaped[0]
    eye_height = float(rest[indices(lids["Left"][0])][:, 1].mean())
    upper = (rest[:, 1] > eye_height - 0.12) & (rest[:, 2] > 0.75) & (skin.origin >= 0)
    upper &= hair_height(rest) < 0
    upper &= ~np.isin(skin.origin, [v for steps in socket for v in steps])
    return Head(
        templates=(np.concatenate([shaped, *(p.templates for p in extra)], axis=1) - origins[:, None])
        * METRES_PER_UNIT,
        faces=np.concatenate([skin.faces, *(p.faces + s for p, s in zip(extra, starts, strict=False))]),
        colors=np.concatenate([colors, *(p.colors for p in extra)], axis=1),
        deltas=np.concatenate([moved, *(p.deltas for p in extra)], axis=1) * METRES_PER_UNIT,
        lip_pairs=indices([[mouth[0][a], mouth[0][b]] for a, b in LIP_PAIRS]),
        mouth_corners=indices([mouth[0][k] for k in MOUTH_CORNERS]),
        lids=indices([[rings[0][LID_MIDDLE], rings[0][15 - LID_MIDDLE]] for rings in lids.values()]),
        lips=np.sort(indices([v for ring, loop in mouth.items() if 0 <= ring <= 5 for v in loop])),
        upper_face=np.flatnonzero(upper),
    )


def identity(source: Source, recipe: Identity) -> Floats:
    """The whole body [N, 3] of a recipe, moved so that its eyes lie at `EYES`: people differ in height."""
    points = source.points.copy()
    for name, share in recipe.macros.items():
        points += share * source.target(f"macrodetails/{name}")
    for name, weight in recipe.details.items():
        points += weight * source.target(name)
    eyes = [points[source.vertices_of(f"helper-{side}-eye")].mean(0) for side in "lr"]
    return np.asarray(points + (EYES - np.mean(eyes, axis=0)) * (0, 1, 1))


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
    colors: Floats  # [n, V, 3]
    deltas: Floats  # [S, V, 3]


def eye_parts(source: Source, templates: Floats, deltas: Floats, group: str) -> tuple[MovingPart, MovingPart]:
    """An eyeball where the helper eye is, turning by the rotation found in its shapes; and its catch-light."""
    helper = source.vertices_of(group)
    fits = [fit_sphere(points[helper]) for points in templates]
    balls = [parts.eyeball(*fit) for fit in fits]
    rest, centre = templates[0][helper], fits[0][0]
    turned = np.zeros((len(deltas), len(balls[0].points), 3))
    for k, delta in enumerate(deltas[:, helper]):
        if np.abs(delta).max() > 0:
            rotation, _ = rigid_fit(rest, rest + delta)
            turned[k] = (balls[0].points - centre) @ (rotation - np.eye(3)).T
    colors = np.stack([parts.eye_colors(recipe.palette.iris) for recipe in IDENTITIES.values()])
    ball = MovingPart(np.stack([b.points for b in balls]), balls[0].faces, colors, turned)
    lights = [parts.catch_light(*fit) for fit in fits]
    still = np.zeros((len(deltas), len(lights[0].points), 3))
    glint = MovingPart(
        np.stack([p.points for p in lights]), lights[0].faces, np.stack([p.colors for p in lights]), still
    )
    return ball, glint


def lashes(
    templates: Floats, deltas: Floats, shape_names: tuple[str, ...], side: str, lids: Rings
) -> MovingPart:
    """A ragged fringe along the upper lid, which points forwards, and down under a blink."""
    margin = np.array(lids[0])[list(LASH_VERTICES)]
    steps = np.linspace(0, len(margin) - 1, LASH_COLUMNS)
    first = np.minimum(steps.astype(int), len(margin) - 2)
    share = (steps - first)[:, None]

    def between(field: Floats) -> Floats:
        """`field` [..., N, 3] along the margin [..., LASH_COLUMNS, 3]."""
        return np.asarray(
            (1 - share) * field[..., margin[first], :] + share * field[..., margin[first + 1], :]
        )

    root, root_moved = between(templates), between(deltas)
    outward = 1 if side == "Left" else -1
    ragged = np.where(np.arange(LASH_COLUMNS) % 2, 0.82, 1.0) * (0.55 + 0.45 * np.sin(np.pi * steps / 10))
    middle = root.mean(1, keepdims=True)
    splay = (root - middle) * (0.25, 0, 0) + LASH * (outward, 1, 1)
    length = np.array([recipe.lashes for recipe in IDENTITIES.values()])[:, None, None]
    tip = root + length * ragged[:, None] * splay
    tip_moved = root_moved.copy()
    tip_moved[shape_names.index(f"eyeBlink{side}")] += ragged[:, None] * LASH_UNDER_BLINK
    faces = parts.grid_faces(2, LASH_COLUMNS)
    colors = np.tile(np.array(LASH_COLOUR, float), (2 * LASH_COLUMNS, 1))
    return MovingPart(
        np.concatenate([root, tip], axis=1),
        faces if side == "Left" else faces[:, ::-1],
        everyone(colors),
        np.concatenate([root_moved, tip_moved], axis=1),
    )


def hair_part(shaped: Floats, faces: Ints, moved: Floats) -> MovingPart:
    """Everyone's hair over everyone's skin `shaped` [n, V, 3], following the shapes of the skin."""
    grown, colors = [], []
    for seed, (skin, recipe) in enumerate(zip(shaped, IDENTITIES.values(), strict=True)):
        sheet = hair.comb(skin, faces, recipe.haircut)
        grown.append(hair.grow(skin, faces, sheet, recipe.haircut, seed))
        colors.append(hair.strand_colors(recipe.haircut, recipe.palette, seed))
    first = hair.comb(shaped[0], faces, next(iter(IDENTITIES.values())).haircut)
    return MovingPart(np.stack(grown), hair.sheet_faces(), np.stack(colors), hair.follow_skin(first, moved))


def everyone(colors: Floats) -> Floats:
    """Colours [V, 3] that all identities share, as [n, V, 3]."""
    return np.repeat(colors[None], len(IDENTITIES), axis=0)


def match_necks(templates: Floats) -> Floats:
    """Identities [n, N, 3] that end in the first one's neck, so that one plane cuts and closes them all."""
    own = smoothstep(neck_height(templates[0]), 0.0, NECK_BLEND)[:, None]
    return np.asarray(templates[0] + own * (templates - templates[0]))


def upper_teeth(mouths: Floats, shapes: int) -> MovingPart:
    """The upper arch, fast to the skull; `mouths` [n, 3] is how far each mouth lies from MOUTH."""
    arch = parts.dental_arch(parts.UPPER_ARCH)
    placed = arch.points + mouths[:, None]
    return MovingPart(placed, arch.faces, everyone(arch.colors), np.zeros((shapes, *arch.points.shape)))


def jaw_motion(source: Source, rest: Floats, delta: Floats, points: Floats) -> Floats:
    """Deltas of `points` [P, 3] that move rigidly with the lower teeth under the face shape `delta` [N, 3]."""
    helper = source.vertices_of("helper-lower-teeth")
    if (
        np.linalg.norm(delta[helper], axis=1).min() < 0.01
    ):  # noise of a tenth of a millimetre is no motion of the jaw
        return np.zeros_like(points)
    rotation, translation = rigid_fit(rest[helper], rest[helper] + delta[helper])
    return points @ rotation.T + translation - points


def lower_teeth(source: Source, templates: Floats, mouths: Floats, deltas: Floats) -> MovingPart:
    """The lower arch, fast to the jaw."""
    arch = parts.dental_arch(parts.LOWER_ARCH)
    placed = arch.points + mouths[:, None]
    moved = np.stack([jaw_motion(source, templates[0], delta, placed[0]) for delta in deltas])
    return MovingPart(placed, arch.faces, everyone(arch.colors), moved)


def tongue(
    source: Source, templates: Floats, mouths: Floats, deltas: Floats, shape_names: tuple[str, ...]
) -> MovingPart:
    """MakeHuman's tongue, laid behind the teeth, fast to the jaw; put out it stretches from its root."""
    quads = source.quads["helper-tongue"]
    helper = source.vertices_of("helper-tongue")
    faces = np.searchsorted(helper, triangulate(quads))
    placed = templates[:, helper]
    floor = TONGUE_FLOOR + mouths[:, None, 1]
    placed[..., 1] = floor + TONGUE_HEIGHT * (placed[..., 1] - floor)
    placed += TONGUE_REST
    rest = placed[0]
    moved = np.stack([jaw_motion(source, templates[0], delta, rest) for delta in deltas])
    back = smoothstep(rest[:, 2], 1.20, 0.75)
    moved[shape_names.index("jawOpen"), :, 1] -= TONGUE_SINKS * back
    forward = smoothstep(rest[:, 2], float(rest[:, 2].min()) + 0.15, float(rest[:, 2].max()))[:, None]
    moved[shape_names.index("tongueOut")] = forward * TONGUE_OUT
    colors = np.array(TONGUE_ROOT) + forward * (np.array(TONGUE, float) - TONGUE_ROOT)
    return MovingPart(placed, faces, everyone(colors), moved)
