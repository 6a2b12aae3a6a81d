"""ARKit weights of frames, by their definition; the file that they come from, and every way to refuse it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streamtalk import ModelError, Talker
from streamtalk.blendshapes import WeightSolver
from streamtalk.model import FILE_NAME, Asset, read_manifest, sha256_of
from tests.runtime.toy import SHAPES, Array, Toy, speech

TOLERANCE = 1e-6
"""Sums of six products in float32 against float64; measured below 3e-7."""
PCM = speech(32000)


def collected(talker: Talker, chunk: int = len(PCM), **options: Any) -> tuple[Array, Array, Array]:
    """Vertices [L, V, 3], weights [L, n] and template [V, 3] of a stream."""
    vertices, weights = [], []
    with talker.open(**options) as stream:
        for first in range(0, len(PCM), chunk):
            for frame in stream.push(PCM[first : first + chunk]):
                assert frame.blendshapes is not None
                vertices.append(frame.vertices.copy())
                weights.append(frame.blendshapes.copy())
    return np.array(vertices), np.array(weights), stream.template


@pytest.mark.parametrize("options", [{}, {"speaker": {"ada": 0.5, "cy": 0.5}}, {"template": np.ones((4, 3))}])
def test_weights_are_the_clipped_solution(talker: Talker, toy: Toy, options: dict[str, Any]) -> None:
    vertices, weights, template = collected(talker, **options)
    offsets = (vertices.astype(np.float64) - template)[:, toy.blendshapes["vertices"]].reshape(-1, 6)
    wanted = np.clip(offsets @ toy.blendshapes["solver"].T, 0, 1)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, wanted, rtol=0, atol=TOLERANCE)
    assert (wanted[:, [0, 2]] == 0).any()  # the toy's motion reaches both ends
    assert (wanted[:, [0, 2]] == 1).any()
    assert not weights[:, 1].any()


def test_cutting_the_audio_changes_no_bit(talker: Talker) -> None:
    np.testing.assert_array_equal(collected(talker)[1], collected(talker, chunk=997)[1])


def test_weights_are_views_that_the_next_hop_overwrites(talker: Talker, toy: Toy) -> None:
    with talker.open() as stream:
        frames = [frame for _, frame in zip(range(toy.hop + 1), stream.push(PCM), strict=False)]
        first, second, third = (frame.blendshapes for frame in frames)
    assert first is third  # found by now, of the next hop's vertices
    assert first is not second
    assert first is not None
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_weights_are_found_when_they_are_asked_for(talker: Talker, toy: Toy) -> None:
    with talker.open() as stream:
        frames = stream.push(PCM)
        first = next(frames)
        assert isinstance(first.solver, WeightSolver)
        wanted = first.solver(first.vertices).copy()
        first.solver(first.vertices + 1)  # another face in the shared buffer
        np.testing.assert_array_equal(first.blendshapes, wanted)
        for _ in range(toy.hop):
            next(frames)
        assert first.blendshapes is first.blendshapes  # found once, whatever the vertices are by now


def test_streams_do_not_share_weights(talker: Talker) -> None:
    with talker.open() as one, talker.open() as other:
        (a, *_), (b, *_) = one.push(PCM), other.push(PCM)
        assert a.blendshapes is not None
        assert b.blendshapes is not None
        assert not np.shares_memory(a.blendshapes, b.blendshapes)


def test_names_are_the_faces(talker: Talker) -> None:
    assert talker.blendshape_names == SHAPES


def test_a_face_without_shapes_has_no_weights(toy: Toy, tmp_path: Path) -> None:
    talker = Talker.load(toy.with_(shapes=False).write(tmp_path / "plain"))
    assert talker.blendshape_names == ()
    with talker.open() as stream:
        assert all(frame.blendshapes is None for frame in stream.push(PCM))


def test_a_manifest_from_before_blendshapes_loads(toy: Toy, tmp_path: Path) -> None:
    directory = toy.with_(shapes=False).write(tmp_path / "old")
    path = directory / FILE_NAME
    content = msgspec.json.decode(path.read_bytes())
    del content["blendshapes"]
    path.write_bytes(msgspec.json.encode(content))
    assert Talker.load(directory).blendshapes is None
    content["blendshape_files"] = {}
    path.write_bytes(msgspec.json.encode(content))
    with pytest.raises(ModelError, match="blendshape_files"):
        Talker.load(directory)


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "copy"))


def relisted(directory: Path, **changes: str) -> None:
    """Make the manifest list the blendshapes as they lie there, or as `changes` say."""
    manifest = read_manifest(directory)
    digest = sha256_of(directory / "blendshapes.npz")
    asset = Asset(**{"file": "blendshapes.npz", "sha256": digest, **changes})
    changed = msgspec.structs.replace(manifest, blendshapes=asset)
    (directory / FILE_NAME).write_bytes(msgspec.json.encode(changed))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(_flip, "is not the file that was exported"), (Path.unlink, "is missing; the manifest lists it")],
)
def test_a_damaged_file_is_refused(copy: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(copy / "blendshapes.npz")
    with pytest.raises(ModelError, match=sentence):
        Talker.load(copy)


def test_a_file_outside_the_directory_is_refused(copy: Path) -> None:
    relisted(copy, file="../blendshapes.npz")
    with pytest.raises(ModelError, match="points outside"):
        Talker.load(copy)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"solver": None}, "cannot be read"),
        ({"names": None}, "cannot be read"),
        ({"names": np.array(["a", {}, "c"], object)}, "cannot be read"),
        ({"names": np.array(["a", "a", "c"])}, r"expected distinct `names` \[n\]"),
        ({"solver": np.zeros((3, 5), np.float32)}, r"got 3 names, \[2\] and \[3, 5\]"),
        ({"solver": np.full((3, 6), np.nan, np.float32)}, "not finite"),
        ({"vertices": np.array([0, 4])}, "point outside the 4 vertices"),
        ({"vertices": np.array([-1, 2])}, "point outside the 4 vertices"),
    ],
)
def test_a_file_must_fit_the_model(copy: Path, toy: Toy, changes: dict[str, Any], sentence: str) -> None:
    arrays: dict[str, Any] = {k: v for k, v in {**toy.blendshapes, **changes}.items() if v is not None}
    np.savez(copy / "blendshapes.npz", **arrays)
    relisted(copy)
    with pytest.raises(ModelError, match=sentence):
        Talker.load(copy)


def test_anything_else_that_is_no_archive_is_refused(copy: Path) -> None:
    (copy / "blendshapes.npz").write_bytes(b"no archive")
    relisted(copy)
    with pytest.raises(ModelError, match="cannot be read"):
        Talker.load(copy)
