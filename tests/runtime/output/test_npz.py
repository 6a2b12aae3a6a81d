"""The spooled .npz: what numpy reads back, and what a full disk leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from streamtalk import Frame, OutputError
from streamtalk.output.npz import NpzOutput

FACES = np.array([[0, 1, 2]], np.int32)


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
        np.testing.assert_array_equal(data["faces"], FACES)
        assert data["fps"] == 30
    assert zipfile.ZipFile(path).testzip() is None
    assert list(tmp_path.iterdir()) == [path]


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
from streamtalk.output.npz import NpzOutput

limit, n_vertices = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a file may not grow beyond: a disk that is full
written, said = 0, []
output = NpzOutput(Path(sys.argv[1]), n_vertices, 30, np.zeros((100, 3), np.int32))
try:
    while True:
        output.frame(Frame(written, written / 30, np.full((n_vertices, 3), written, np.float32)))
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
    vertices = np.load(path)["vertices"]
    index_frames = -(-(4096 + 1200 + 8 * result["written"]) // (n_vertices * 12))
    assert result["written"] - index_frames <= len(vertices) <= result["written"]
    np.testing.assert_array_equal(vertices[:, 0, 0], np.arange(len(vertices)))
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
