from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk_export.errors import ExportError
from streamtalk_export.templates import read_faces, read_templates

V = 5
WRONG_COLORS = [
    ("colors", np.zeros((V - 1, 3), np.uint8)),
    ("colors", np.zeros((V, 3))),
    ("colors", np.full((V, 3), 256)),
    ("identity_colors", np.zeros((V, 3), np.uint8)),
    ("identity_colors", np.full((2, V, 3), -1)),
]
FACE = np.arange(3 * V, dtype=np.float64).reshape(V, 3)


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_arrays_archives_and_meshes(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", FACE.reshape(-1))
    np.savez(tmp_path / "two.npz", templates=np.stack([FACE, FACE + 1]), speaker_names=["a", "b"])
    (tmp_path / "m.obj").write_text("".join(f"v {x} {y} {z}\n" for x, y, z in FACE) + "f 1 2 3\nf 3 4 5\n")
    assert np.array_equal(read_templates(tmp_path / "flat.npy", V, 2, ()).vertices, FACE[None])
    two = read_templates(tmp_path / "two.npz", V, 2, ())
    assert two.names == ("a", "b")
    assert np.array_equal(two.vertices[1], FACE + 1)
    assert np.array_equal(read_templates(tmp_path / "m.obj", V, 2, ()).vertices, FACE[None])
    mesh = read_faces(tmp_path / "m.obj", V)
    assert mesh.faces.tolist() == [[0, 1, 2], [2, 3, 4]]
    assert mesh.colors.shape == (0, 3)
    assert (mesh.landmarks, mesh.shapes, mesh.identity_colors) == ({}, None, None)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_templates_by_speaker(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "templates.pkl"
    path.write_bytes(pickle.dumps({"x": FACE + 2, "b": FACE + 1, "a": FACE}, protocol))
    read = read_templates(path, V, 2, ("a", "b"))
    assert read.names == ("a", "b")
    assert np.array_equal(read.vertices, np.stack([FACE, FACE + 1]))
    with pytest.raises(ExportError, match="holds 3 faces"):
        read_templates(path, V, 2, ("a", "z"))


def test_a_file_that_names_as_many_faces_as_speakers(tmp_path: Path) -> None:
    path = tmp_path / "templates.pkl"
    path.write_bytes(pickle.dumps({"x": FACE + 2, "b": FACE}))
    read = read_templates(path, V, 2, ())
    assert read.names == ("x", "b")
    assert np.array_equal(read.vertices, np.stack([FACE + 2, FACE]))


@pytest.mark.parametrize("name", ["t.npz", "t.npy", "t.pkl", "t.obj", "t.stl"])
def test_damaged_files_are_a_sentence(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole"
    np.savez(whole.with_suffix(".npz"), templates=FACE)
    whole.write_bytes(pickle.dumps({"a": FACE}))
    good = whole.with_suffix(".npz").read_bytes() if name == "t.npz" else whole.read_bytes()
    for _ in range(40):
        damaged = bytearray(good[: rng.integers(1, len(good))])
        damaged[rng.integers(len(damaged))] ^= int(rng.integers(1, 256))
        (tmp_path / name).write_bytes(damaged)
        with suppress(ExportError):
            read_templates(tmp_path / name, V, 1, ())


def test_malicious_templates_do_not_run(tmp_path: Path) -> None:
    target, path = tmp_path / "owned", tmp_path / "templates.pkl"
    path.write_bytes(pickle.dumps({"a": _Payload(target)}))
    with pytest.raises(ExportError, match="only numpy arrays are admitted"):
        read_templates(path, V, 1, ("a",))
    assert not target.exists()
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([_Payload(target)], dtype=object), allow_pickle=True)
    with pytest.raises(ExportError, match="not a readable numpy file"):
        read_templates(objects, V, 2, ())
    assert not target.exists()


def test_wrong_sizes(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", FACE[:4])
    np.save(tmp_path / "nan.npy", FACE * np.nan)
    np.save(tmp_path / "f.npy", np.array([[0, 1, V]]))
    with pytest.raises(ExportError, match=r"shape \[4, 3\].*expected 5 vertices"):
        read_templates(tmp_path / "t.npy", V, 2, ())
    with pytest.raises(ExportError, match="not finite"):
        read_templates(tmp_path / "nan.npy", V, 2, ())
    with pytest.raises(ExportError, match="index vertices 0 to 5; the model has 5"):
        read_faces(tmp_path / "f.npy", V)
    for name, colors in WRONG_COLORS:
        arrays: dict[str, Any] = {"faces": [[0, 1, 2]], name: colors}
        np.savez(tmp_path / "f.npz", **arrays)
        with pytest.raises(ExportError, match=f" {name} of shape .* integers of 0 to 255"):
            read_faces(tmp_path / "f.npz", V)
    with pytest.raises(ExportError, match="No template at"):
        read_templates(tmp_path / "none.npy", V, 2, ())
