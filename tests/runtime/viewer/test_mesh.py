"""Normals and checks of what is to be drawn."""

import numpy as np
import pytest

from streamtalk.errors import ModelError
from streamtalk.viewer.mesh import Mesh, SmoothNormals
from tests.runtime.viewer.shapes import sphere

NORMAL_TOLERANCE = 2e-5
"""Float32 sums of up to eighty faces around a pole, against float64."""


def test_normals_are_the_area_weighted_mean_of_their_faces() -> None:
    vertices, faces = sphere()
    expected = np.zeros(vertices.shape)
    for a, b, c in faces:
        corner = vertices.astype(np.float64)
        normal = np.cross(corner[b] - corner[a], corner[c] - corner[a])
        for vertex in (a, b, c):
            expected[vertex] += normal
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    got = SmoothNormals(Mesh.check(vertices, faces, None))(vertices)
    np.testing.assert_allclose(got, expected, atol=NORMAL_TOLERANCE)


def test_a_vertex_outside_every_face_has_no_normal() -> None:
    vertices, faces = sphere()
    alone = np.vstack([vertices, [[1, 1, 1]]]).astype(np.float32)
    got = SmoothNormals(Mesh.check(alone, faces, None))(alone)
    assert not got[-1].any()
    np.testing.assert_array_equal(got[:-1], SmoothNormals(Mesh.check(vertices, faces, None))(vertices))


def test_faces_wound_inward_are_turned() -> None:
    vertices, faces = sphere()
    inward = Mesh.check(vertices, faces[:, ::-1], None)
    np.testing.assert_array_equal(inward.faces, Mesh.check(vertices, faces, None).faces)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"template": np.zeros((4, 2))}, r"\[V, 3\]"),
        ({"template": np.full((4, 3), np.nan)}, "12 NaN or inf"),
        ({"faces": np.zeros((2, 4), np.int32)}, "integer triangles"),
        ({"faces": np.zeros((2, 3))}, "integer triangles"),
        ({"faces": np.array([[0, 1, 4]])}, "0 to 3"),
        ({"faces": np.array([[0, -1, 2]])}, "0 to 3"),
        ({"colors": np.zeros((3, 3), np.uint8)}, r"uint8 \(4, 3\)"),
        ({"colors": np.zeros((4, 3))}, "got float64"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change: dict[str, object], said: str) -> None:
    good: dict[str, object] = {
        "template": np.eye(4, 3),
        "faces": np.array([[0, 1, 2]]),
        "colors": np.zeros((4, 3), np.uint8),
    }
    Mesh.check(**good)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=said):
        Mesh.check(**(good | change))  # type: ignore[arg-type]
