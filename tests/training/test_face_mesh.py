"""The geometry that makes the bundled head, on tiny made-up meshes, and the parsers of its source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamtalk_training.face_mesh import (
    boundary_loops,
    cut,
    edge_loop,
    fit_sphere,
    project_along_z,
    project_from,
    rigid_fit,
    smoothstep,
    triangulate,
    vertex_normals,
)
from streamtalk_training.face_parts import LOWER_ARCH, UPPER_ARCH, Arch, dental_arch, eyeball, grid_faces
from streamtalk_training.face_skin import hollowness
from streamtalk_training.face_source import FaceSourceError, check_sha256, parse_obj, parse_target

EXACT = 1e-12  # float64 geometry of unit size


# Source files


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(FaceSourceError, match="expected 00"):
        check_sha256(path, "00")


def test_obj_groups_and_target_lines() -> None:
    points, quads = parse_obj(
        "# head\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 .5\ng body\nf 1/9 2/8 3/7 4/6\ng eye\nf 4 3 2 1\n"
    )
    np.testing.assert_array_equal(points, [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.5]])
    assert {name: q.tolist() for name, q in quads.items()} == {"body": [[0, 1, 2, 3]], "eye": [[3, 2, 1, 0]]}
    np.testing.assert_array_equal(parse_target("# x\n2 0 -.5 1\n", 3), [[0, 0, 0], [0, 0, 0], [0, -0.5, 1]])


# Geometry on tiny meshes


def sheet(rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A flat grid of quads in x, y that faces +z."""
    y, x = np.meshgrid(np.arange(rows, dtype=float), np.arange(columns, dtype=float), indexing="ij")
    row, column = np.meshgrid(np.arange(rows - 1), np.arange(columns - 1), indexing="ij")
    first = (row * columns + column).ravel()
    quads = np.stack([first, first + 1, first + columns + 1, first + columns], axis=1)
    return np.stack([x.ravel(), y.ravel(), 0 * x.ravel()], axis=1), quads


def area(points: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    """Signed area seen from +z of each triangle."""
    a, b, c = (points[faces[:, k], :2] for k in range(3))
    u, v = b - a, c - a
    return np.asarray((u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]) / 2)


def test_cut_splits_a_sheet_and_keeps_winding_and_area() -> None:
    points, quads = sheet(4, 4)
    faces = triangulate(quads)
    halves = cut(faces, points[:, 0] - 1.4, sliver=0.01)
    a, b = points[halves.edges[:, 0]], points[halves.edges[:, 1]]
    fresh = a + halves.t[:, None] * (b - a)
    np.testing.assert_allclose(fresh[:, 0], 1.4, atol=EXACT)
    extended = np.concatenate([points, fresh])
    for half, expected in ((halves.below, 1.4 * 3), (halves.above, 1.6 * 3)):
        areas = area(extended, half)
        assert areas.min() > 0
        assert areas.sum() == pytest.approx(expected, abs=EXACT)


def test_cut_keeps_off_the_ends_of_edges() -> None:
    points, quads = sheet(2, 3)
    halves = cut(triangulate(quads), points[:, 0] - 1e-9, sliver=0.1)
    assert halves.t.min() == pytest.approx(0.1)


def test_cut_leaves_a_mesh_on_one_side_alone() -> None:
    points, quads = sheet(3, 3)
    halves = cut(triangulate(quads), points[:, 0] + 1)
    assert (len(halves.below), len(halves.above), len(halves.edges)) == (0, 8, 0)


def test_boundary_runs_so_that_a_cap_fits() -> None:
    points, quads = sheet(3, 3)
    faces = triangulate(quads)
    (loop,) = boundary_loops(faces)
    assert sorted(loop) == [0, 1, 2, 3, 5, 6, 7, 8]
    cap = np.array([[loop[k], loop[(k + 1) % 8], 9] for k in range(8)])
    assert boundary_loops(np.concatenate([faces, cap])) == []
    assert area(np.concatenate([points, [[1.0, 1.0, -1.0]]]), cap).max() < 0, "the cap faces the other way"


def test_edge_loop_goes_round_a_tube_and_stops_at_an_irregular_vertex() -> None:
    around = np.arange(6)
    tube = np.concatenate(
        [
            np.stack(
                [
                    6 * r + around,
                    6 * r + (around + 1) % 6,
                    6 * (r + 1) + (around + 1) % 6,
                    6 * (r + 1) + around,
                ],
                1,
            )
            for r in range(2)
        ]
    )
    assert edge_loop(tube, 6, 7) == [6, 7, 8, 9, 10, 11]
    assert edge_loop(tube, 6, 11) == [6, 11, 10, 9, 8, 7]
    with pytest.raises(ValueError, match="does not close"):
        edge_loop(tube, 6, 0)


def test_projection_hits_the_foremost_surface() -> None:
    points, quads = sheet(2, 2)
    back = points + np.array([0, 0, -1])
    faces = triangulate(quads)
    both, doubled = np.concatenate([back, points + np.array([0, 0, 2])]), np.concatenate([faces, faces + 4])
    corners, shares = project_along_z(np.array([[0.25, 0.5]]), both, doubled)
    np.testing.assert_allclose((shares[..., None] * both[corners]).sum(1), [[0.25, 0.5, 2.0]], atol=EXACT)
    with pytest.raises(ValueError, match="no surface"):
        project_along_z(np.array([[2.0, 2.0]]), both, doubled)


def test_rays_meet_the_nearest_surface() -> None:
    points, quads = sheet(2, 2)
    faces = triangulate(quads)
    both = np.concatenate([points + np.array([0, 0, 2]), points + np.array([0, 0, 5])])
    origin = np.array([0.3, 0.4, 0.0])
    corners, shares = project_from(
        origin, np.array([[0.0, 0.0, 1.0]]), both, np.concatenate([faces + 4, faces])
    )
    np.testing.assert_allclose((shares[..., None] * both[corners]).sum(1), [[0.3, 0.4, 2.0]], atol=EXACT)
    with pytest.raises(ValueError, match="no surface"):
        project_from(origin, np.array([[0.0, 0.0, -1.0]]), both, faces)


def test_rigid_fit_finds_a_turn_and_not_a_mirror() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(9, 3))
    c, s = np.cos(0.4), np.sin(0.4)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    rotation, translation = rigid_fit(points, points @ turn.T + (1, 2, 3))
    np.testing.assert_allclose(rotation, turn, atol=EXACT)
    np.testing.assert_allclose(translation, (1, 2, 3), atol=EXACT)
    mirrored, _ = rigid_fit(points, points * (-1, 1, 1))
    assert np.linalg.det(mirrored) == pytest.approx(1.0)


def test_normals_point_out_and_hollows_are_positive() -> None:
    points, quads = sheet(3, 3)
    np.testing.assert_allclose(vertex_normals(points, triangulate(quads)), [[0, 0, 1]] * 9, atol=EXACT)
    points[4, 2] = -0.5
    assert hollowness(points, quads)[4] > 0.3
    points[4, 2] = 0.5
    assert hollowness(points, quads)[4] < -0.3


def test_smoothstep_runs_either_way() -> None:
    x = np.array([-1.0, 0.0, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(smoothstep(x, 0.0, 1.0), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(smoothstep(x, 1.0, 0.0), [1, 1, 0.5, 0, 0])


def test_grid_faces_close_round() -> None:
    assert len(grid_faces(3, 4)) == 2 * 2 * 3
    assert len(grid_faces(3, 4, closed=True)) == 2 * 2 * 4
    (first, second) = boundary_loops(grid_faces(3, 4, closed=True))
    assert (len(first), len(second)) == (4, 4)


def test_an_eyeball_is_a_closed_sphere_that_faces_out() -> None:
    centre = np.array([1.0, 2.0, 3.0])
    ball = eyeball(centre, 2.0)
    assert boundary_loops(ball.faces) == []
    found, radius = fit_sphere(ball.points)
    np.testing.assert_allclose(found, centre, atol=1e-9)
    assert radius == pytest.approx(2.0)
    normals = vertex_normals(ball.points, ball.faces)
    assert ((ball.points - centre) * normals).sum(1).min() > 0


@pytest.mark.parametrize("arch", [UPPER_ARCH, LOWER_ARCH])
def test_teeth_face_outwards_on_both_sides(arch: Arch) -> None:
    teeth = dental_arch(arch)
    flipped = {tuple(p) for p in (teeth.points * (-1, 1, 1)).round(9).tolist()}
    mirrored = {tuple(p) for p in (teeth.points + 0.0).round(9).tolist()}
    assert {(x + 0.0, y, z) for x, y, z in flipped} == mirrored, "left and right are alike"
    normals = vertex_normals(teeth.points, teeth.faces)
    front = teeth.points[:, 2] > teeth.points[:, 2].max() - 0.004
    assert normals[front, 2].min() > 0
