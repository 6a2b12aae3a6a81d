"""Frames are reduced the same way wherever they are cut, and blinks are no motion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from streamtalk import Frame, ModelError, model
from streamtalk_export import cli
from streamtalk_training import streaming
from streamtalk_training.face import pose
from streamtalk_training.streaming import Reader, Track, blocks, end_to_end, exported
from tests.training.tiny_face import tiny_face, weights_of

FACE = tiny_face()
SAME_SUM = 1e-6  # metres, of float32 sums and float16 shapes
LENGTH = 50


def moving() -> np.ndarray:
    random = np.random.default_rng(0)
    return weights_of(jawOpen=random.random(LENGTH), eyeBlinkLeft=random.random(LENGTH))


@pytest.mark.parametrize("cut", [1, 7, 49])
def test_blocks_leave_no_seam(cut: int) -> None:
    weights = moving()
    vertices = pose(FACE, weights, 1)
    reader = Reader(FACE)
    whole = end_to_end(reader.tracks([(vertices, weights)], 1))
    parts = [(vertices[at : at + cut], weights[at : at + cut]) for at in range(0, LENGTH, cut)]
    again = end_to_end(reader.tracks(parts, 1))
    assert len(again) == LENGTH
    for field in fields(Track):
        np.testing.assert_allclose(getattr(again, field.name), getattr(whole, field.name), atol=SAME_SUM)


def test_blinks_are_no_motion_and_lips_are() -> None:
    steps = np.linspace(0, 1, LENGTH)
    still = Reader(FACE).labelled(weights_of(eyeBlinkLeft=steps, eyeBlinkRight=steps), 0)
    assert still.face_moves.max() < SAME_SUM
    assert still.lip_moves.max() == 0
    assert still.upper[-1].max() == pytest.approx(0.02**2, rel=1e-2)  # the lid did go down
    opening = Reader(FACE).labelled(weights_of(jawOpen=steps), 0)
    assert opening.lip_moves[1:] == pytest.approx(0.02 / (LENGTH - 1) / 2, rel=1e-2)  # half of the lips move
    assert opening.gaps[-1] == pytest.approx(0.02, rel=1e-2)


@pytest.mark.parametrize("vertex", range(len(FACE.templates[0])))
def test_the_farthest_vertex_is_any_of_the_face(vertex: int) -> None:
    """Not only those of the lips; and what is no number is not passed over."""
    vertices = pose(FACE, weights_of(jawOpen=np.zeros(3)), 1)
    vertices[1, vertex] += (0.3, 0.4, 0)
    vertices[2, vertex, 1] = np.nan
    track = end_to_end(Reader(FACE).tracks([(vertices, weights_of(jawOpen=np.zeros(3)))], 1))
    assert track.farthest[:2] == pytest.approx([0, 0.5], abs=SAME_SUM)
    assert np.isnan(track.farthest[2])


def test_frames_are_copied_from_their_reused_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_FRAMES", 4)
    vertices, weights = np.zeros((9, 3), np.float32), np.zeros(52, np.float32)

    def frames() -> Iterator[Frame]:
        for index in range(10):
            vertices[:] = weights[:] = index
            yield Frame(index, index / 30, vertices, lambda _: weights)

    made = list(blocks(frames()))
    assert [len(part) for part, _ in made] == [4, 4, 2]
    assert np.concatenate([part[:, 0, 0] for part, _ in made]).tolist() == list(range(10))
    assert np.concatenate([part[:, 51] for _, part in made]).tolist() == list(range(10))


def test_an_engine_without_shapes_is_refused() -> None:
    with pytest.raises(ModelError, match="blendshapes"):
        list(blocks([Frame(0, 0.0, np.zeros((9, 3), np.float32), None)]))


def test_an_export_is_made_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.yaml", "face.npz"):
        (folder / name).write_bytes(name.encode())
    made: list[Path] = []

    def export(arguments: object) -> None:
        out = arguments.out  # type: ignore[attr-defined]
        out.mkdir(parents=True)
        (out / "manifest.json").write_text("{}")
        made.append(out)

    monkeypatch.setattr(cli, "run", export)
    first = exported(folder, tmp_path)
    assert exported(folder, tmp_path) == first and made == [first]
    (folder / "face.npz").write_bytes(b"another face")
    assert exported(folder, tmp_path) != first and len(made) == 2


def test_an_engine_of_another_exporter_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "streamtalk_export"
    package.mkdir()
    for name in ("cli.py", "graphs.py"):
        (package / name).write_text(name)
    runtime = tmp_path / "model.py"
    runtime.write_text("schema = 1")
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    monkeypatch.setattr(model, "__file__", str(runtime))
    keys = [streaming.engine_key([])]
    assert streaming.engine_key([]) == keys[0]
    (package / "graphs.py").write_text("changed")
    keys.append(streaming.engine_key([]))
    runtime.write_text("schema = 2")
    keys.append(streaming.engine_key([]))
    monkeypatch.setattr(streaming, "version", lambda _: "another")
    keys.append(streaming.engine_key([]))
    assert len(set(keys)) == 4
