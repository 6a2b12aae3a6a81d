"""The spooled .npz: what numpy reads back, and what a full disk leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from streamtalk import Frame, OutputError, UsageError
from streamtalk.app.output.npz import NpzOutput

FACES = {"faces": np.array([[0, 1, 2]], np.int32)}
NAMES = ("jawOpen", "tongueOut")
ONE_FRAME_BYTES = 12_000


def frames(n: int, n_vertices: int = 5) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((n, n_vertices, 3)).astype(np.float32)


def write(path: Path, vertices: npt.NDArray[np.float32]) -> None:
    output = NpzOutput(path, vertices.shape[1], 30, FACES)
    for i, frame in enumerate(vertices):
        output.audio(np.zeros(10, np.float32))
        output.frame(Frame(i, i / 30, frame))
    output.close()
    output.close()


@pytest.mark.parametrize("n", [1, 2, 9, 10, 12345])
def test_numpy_reads_what_was_written(tmp_path: Path, n: int) -> None:
    path, vertices = tmp_path / "x.npz", frames(n)
    write(path, vertices)
    with np.load(path, allow_pickle=False) as data:
        assert sorted(data.files) == ["faces", "fps", "time_s", "vertices"]
        assert data["vertices"].dtype == np.float32
        np.testing.assert_array_equal(data["vertices"], vertices)
        np.testing.assert_array_equal(data["time_s"], np.arange(n) / 30)
        np.testing.assert_array_equal(data["faces"], FACES["faces"])
        assert data["fps"] == 30
    assert zipfile.ZipFile(path).testzip() is None
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("n", [1, 12345, 200_000])  # the last more than one block of weights
def test_blendshapes_lie_beside_the_vertices(tmp_path: Path, n: int) -> None:
    path, vertices = tmp_path / "x.npz", frames(n, 1)
    output = NpzOutput(path, 1, 30, FACES, NAMES)
    for i, frame in enumerate(vertices):
        output.frame(Frame(i, i / 30, frame, lambda vertices: vertices[0, :2]))
    assert len(list(tmp_path.iterdir())) == 1  # the spool has no name, so that no crash leaves it behind
    output.close()
    with np.load(path, allow_pickle=False) as data:
        np.testing.assert_array_equal(data["vertices"], vertices)
        np.testing.assert_array_equal(data["blendshapes"], vertices[:, 0, :2], strict=True)
        assert data["blendshape_names"].tolist() == list(NAMES)
    assert zipfile.ZipFile(path).testzip() is None


def test_memory_stays_flat(tmp_path: Path) -> None:
    output = NpzOutput(tmp_path / "x.npz", 1000, 30, FACES, NAMES)
    frame = Frame(0, 0.0, frames(1, 1000)[0], lambda vertices: vertices[0, :2])
    output.frame(frame)
    tracemalloc.start()
    try:
        for _ in range(2000):
            output.frame(frame)
        assert tracemalloc.get_traced_memory()[1] < ONE_FRAME_BYTES
    finally:
        tracemalloc.stop()
    output.close()


def test_a_frame_must_have_the_blendshapes_that_were_announced(tmp_path: Path) -> None:
    output = NpzOutput(tmp_path / "x.npz", 5, 30, FACES, NAMES)
    with pytest.raises(UsageError, match="expected 2 blendshapes a frame; got None"):
        output.frame(Frame(0, 0.0, frames(1)[0]))
    output.close()
    assert list(tmp_path.iterdir()) == []


def test_it_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"before")
    output = NpzOutput(path, 5, 30, FACES)
    output.frame(Frame(0, 0.0, frames(1)[0]))
    assert path.read_bytes() == b"before"
    output.close()
    assert np.load(path)["vertices"].shape == (1, 5, 3)


def test_no_frame_no_file(tmp_path: Path) -> None:
    NpzOutput(tmp_path / "x.npz", 5, 30, FACES).close()
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    write(tmp_path / "link.npz", frames(3))
    assert (tmp_path / "link.npz").is_symlink()
    assert np.load(tmp_path / "real.npz")["vertices"].shape == (3, 5, 3)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "x.npz").mkdir()
    (tmp_path / "full.npz").symlink_to("/dev/full")
    for path, message in (
        (tmp_path / "none" / "x.npz", "no folder"),
        (tmp_path / "x.npz", "not a regular file"),
        (tmp_path / "full.npz", "not a regular file"),
    ):
        with pytest.raises(OutputError, match=message):
            NpzOutput(path, 5, 30, FACES)
    assert Path("/dev/full").is_char_device()


FILL = """
import json, resource, sys
from pathlib import Path
import numpy as np
from streamtalk import Frame, OutputError
from streamtalk.app.output.npz import NpzOutput

limit, n_vertices = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a file may not grow beyond: a disk that is full
written, said = 0, []
still, names = {"faces": np.zeros((100, 3), np.int32)}, [f"shape{i}" for i in range(52)]
output = NpzOutput(Path(sys.argv[1]), n_vertices, 30, still, names)
try:
    while True:
        vertices = np.full((n_vertices, 3), written, np.float32)
        output.frame(Frame(written, written / 30, vertices, lambda vertices: np.full(52, vertices[0, 0])))
        written += 1
except OutputError as error:
    said.append(str(error))
try:
    output.close()
except OutputError as error:
    said.append(str(error))
print(json.dumps({"written": written, "said": said}))
"""


@pytest.mark.parametrize(("limit", "n_vertices"), [(300_000, 5), (300_000, 1000), (1_000_003, 5023)])
def test_a_full_disk_keeps_what_was_written(tmp_path: Path, limit: int, n_vertices: int) -> None:
    path = tmp_path / "x.npz"
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(path), str(limit), str(n_vertices)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["said"]) == 1
    assert "cannot be written" in result["said"][0]
    with np.load(path) as data:
        vertices, weights = data["vertices"], data["blendshapes"]
    index_bytes = 4096 + 1200 + 52 * 4 * len("shape10") + (8 + 52 * 4) * result["written"]
    index_frames = -(-index_bytes // (n_vertices * 12))
    assert result["written"] - index_frames <= len(vertices) <= result["written"]
    np.testing.assert_array_equal(vertices[:, 0, 0], np.arange(len(vertices)))
    np.testing.assert_array_equal(weights[:, 51], np.arange(len(vertices)))
    assert list(tmp_path.iterdir()) == [path]


def test_not_even_the_first_frame_fits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path / "x.npz"), "5000", "5023"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["written"] == 0
    assert list(tmp_path.iterdir()) == []
