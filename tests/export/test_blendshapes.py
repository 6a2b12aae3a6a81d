"""Known ARKit weights through made-up decoders and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamtalk.model import LANDMARKS
from streamtalk_export.blendshapes import ARKIT_NAMES, WeightMatrix, weight_matrix
from streamtalk_export.cli import main
from streamtalk_export.config import VQConfig
from streamtalk_export.errors import ExportError
from streamtalk_export.templates import read_faces
from streamtalk_export.vqvae import VQDecoder
from tests.export.golden import Array, Driver, Golden
from tests.export.test_cli import GOLDEN, SMALL

ROUND_TRIP = 2e-3
"""What the ridge and fp16 weights of a decoder may take from a weight, a nearly collinear pair included;
measured .0016. On the bundled face .0003."""
PAIR = 0.05
"""Of its length: how far mouthClose is from the opposite of jawOpen, in the made-up face."""
V = 400
USED = ("jawOpen", "mouthClose", "mouthPucker", "eyeBlinkLeft", "browInnerUp", "tongueOut")


def face_shapes(seed: int = 0) -> Array:
    """Deltas [52, V, 3] of local bumps, a few millimetres each."""
    rng = np.random.default_rng(seed)
    where = rng.uniform(-1, 1, (V, 3))
    centres = rng.uniform(-1, 1, (52, 1, 3))
    bumps = np.exp(-(np.linalg.norm(where - centres, axis=-1) ** 2) / 0.3)
    shapes = 0.005 * bumps[..., None] * rng.standard_normal((52, 1, 3))
    jaw, close = ARKIT_NAMES.index("jawOpen"), ARKIT_NAMES.index("mouthClose")
    shapes[close] = PAIR * shapes[close] - shapes[jaw]
    return np.asarray(shapes, np.float32)


def decoder(motions: Array) -> VQDecoder:
    """One whose last layer mixes `motions` [r, V, 3] at random, rounded to fp16 as in small checkpoints."""
    made = VQDecoder(
        VQConfig(
            n_vert=3 * V,
            n_embed=4,
            zquant_dim=4,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            face_quan_num=2,
        )
    )
    mixing = np.random.default_rng(1).standard_normal((len(motions), 33))
    columns = (motions.reshape(len(motions), -1).T @ mixing).astype(np.float16).astype(np.float32)
    with torch.no_grad():
        made.vertice_map_reverse.weight.copy_(torch.from_numpy(columns[:, :32]))
        made.vertice_map_reverse.bias.copy_(torch.from_numpy(columns[:, 32]))
    return made


def numbers(names: tuple[str, ...]) -> list[int]:
    return [ARKIT_NAMES.index(name) for name in names]


def round_trip(matrix: WeightMatrix, names: tuple[str, ...]) -> tuple[Array, Array]:
    """Random weights [L, 52] of the named shapes, and what the solver makes of their vertices."""
    weights = np.zeros((300, 52))
    weights[:, numbers(names)] = np.random.default_rng(2).random((300, len(names)))
    return weights, matrix.weights(np.tensordot(weights, matrix.shapes.astype(np.float64), 1))


def test_known_weights_come_back() -> None:
    shapes = face_shapes()
    matrix = weight_matrix(shapes, decoder(shapes[numbers(USED)]))
    assert set(matrix.active) == set(USED)
    wanted, got = round_trip(matrix, USED)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=ROUND_TRIP)
    idle = [i for i, name in enumerate(ARKIT_NAMES) if name not in USED]
    assert not got[:, idle].any()
    assert not matrix.solver[idle].any()


def test_all_shapes_serve_a_decoder_that_knows_none() -> None:
    shapes = face_shapes()
    matrix = weight_matrix(shapes, decoder(face_shapes(seed=5)[:30]))
    assert matrix.active == ARKIT_NAMES
    error = {line.measure: line for line in matrix.error(0.01 * np.ones((2, V, 3)), metres_per_unit=0.5)}
    assert error["rebuilt_vertices_max_mm"].value > error["rebuilt_vertices_rms_mm"].value > 1


def test_the_error_is_that_of_the_rebuilt_vertices() -> None:
    shapes = face_shapes()
    matrix = weight_matrix(shapes, decoder(shapes[numbers(USED)]))
    offsets = -1.0 * shapes[numbers(("tongueOut",))].astype(np.float64)  # a weight of -1, clipped to 0
    size_mm = 1000 * np.linalg.norm(offsets[0], axis=-1)
    largest, rms = matrix.error(offsets, metres_per_unit=1.0)
    assert largest.value == pytest.approx(size_mm.max(), rel=0.02)
    assert rms.value == pytest.approx(np.sqrt(np.mean(size_mm**2)), rel=0.02)
    assert (largest.graph, largest.frames, largest.bound) == ("blendshapes", 1, None)


def test_a_decoder_that_does_not_move_gives_no_weights() -> None:
    matrix = weight_matrix(face_shapes(), decoder(np.zeros((1, V, 3))))
    assert not matrix.solver.any()


def write_face(path: Path, **changes: Any) -> Path:
    shapes = face_shapes()
    arrays: dict[str, Any] = {
        "faces": np.array([[0, 1, 2]]),
        "blendshapes": shapes,
        "blendshape_names": np.array(ARKIT_NAMES),
        "lip_pairs": np.array([[3, 4]]),
        **changes,
    }
    np.savez(path, **arrays)
    return path


def test_shapes_are_brought_into_apples_order(tmp_path: Path) -> None:
    shapes, order = face_shapes(), np.random.default_rng(3).permutation(52)[:40]
    names = [*(ARKIT_NAMES[i] for i in order), "vendorOwn"]
    deltas = np.concatenate([shapes[order], shapes[:1]]).astype(np.float16)
    path = write_face(tmp_path / "face.npz", blendshapes=deltas, blendshape_names=np.array(names))
    mesh = read_faces(path, V)
    assert mesh.shapes is not None
    np.testing.assert_array_equal(mesh.shapes[order], deltas[:40])
    assert not np.delete(mesh.shapes, order, axis=0).any()
    assert list(mesh.landmarks) == ["lip_pairs"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blendshapes": np.zeros((51, V, 3), np.float32)}, "expected [n, 400, 3] numbers and n"),
        ({"blendshapes": np.zeros((52, V, 3), np.int32)}, "expected [n, 400, 3] numbers and n"),
        ({"blendshapes": np.full((52, V, 3), np.inf)}, "not finite"),
        ({"blendshapes": np.zeros((52, V, 3))}, "not all 0"),
        ({"blendshape_names": np.array(["jawOpen"] * 52)}, "distinct ARKit names"),
        ({"blendshape_names": np.array([f"shape{i}" for i in range(52)])}, "got shape0, shape1"),
        ({"lip_pairs": np.array([[0, V]])}, "`lip_pairs` must be numbers of the 400 vertices"),
        ({"lids": np.array([0.5])}, "`lids` must be numbers"),
    ],
)
def test_faces_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExportError, match=re.escape(sentence)):
        read_faces(write_face(tmp_path / "face.npz", **changes), V)


def carried(driver: Driver) -> tuple[bool, int, bool, bool]:
    """Whether the manifest lists blendshapes, how many figures it states, whether file and landmarks are there."""
    stated = [line for line in driver.manifest.parity if line.graph == "blendshapes"]
    with np.load(driver.directory / "identity.npz") as identity:
        marked = set(LANDMARKS) <= set(identity.files)
    exists = (driver.directory / "blendshapes.npz").exists()
    return driver.manifest.blendshapes is not None, len(stated), exists, marked


def test_shapes_and_landmarks_reach_the_directory(tmp_path: Path) -> None:
    n = 93  # vertices of the small preset
    marks = {name: np.array([[0, 5]]) for name in LANDMARKS}
    face = write_face(tmp_path / "face.npz", blendshapes=face_shapes()[:, :n], **marks)
    out = tmp_path / "model"
    assert main([*SMALL, "--out", str(out), "--history", "4", "--faces", str(face)]) == 0
    assert carried(Driver(out)) == (True, 2, True, True)


def test_a_model_without_a_face_carries_none(exported: Callable[[Golden, str], Driver]) -> None:
    assert carried(exported(GOLDEN, "ddim")) == (False, 0, False, False)
