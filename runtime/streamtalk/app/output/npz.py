"""Frames into one .npz, straight to disk: memory stays flat and the disk holds the vertices once.

An .npz is a zip of .npy files, and both state their sizes in front. So room for the headers is left at the
start, vertices are appended raw behind it, and the headers are written over that room at the end. Blendshapes,
a few hundredths of that, wait in a nameless file and are copied behind the vertices.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt

from streamtalk.app.output.target import partial, writable
from streamtalk.errors import OutputError, UsageError
from streamtalk.stream import Frame

MEMBER = "vertices.npy"
NPY_HEADER_BYTES = 128
"""A multiple of 64, as the format asks for; the shape of any array [L, V, 3] fits."""
DIRECTORY_BYTES = 4096
"""More than the zip's own headers and directory take."""
BLOCK_BYTES = 1 << 20


class NpzOutput:
    """Writes `vertices` [L, V, 3] float32, `time_s` [L] float64, `fps` and the arrays `still` to an .npz; with
    `blendshape_names` [n] also those and `blendshapes` [L, n] float32.

    It grows as `NAME.part` and takes its name when closed. On a full disk the last frames make room for the
    index, and the file is finished with the rest. Raises OutputError.
    """

    def __init__(
        self,
        path: Path,
        n_vertices: int,
        fps: int,
        still: Mapping[str, npt.NDArray[Any]],
        blendshape_names: Sequence[str] = (),
    ) -> None:
        self._path = path
        self._target = writable(path)
        self._partial = partial(self._target)
        self._n_vertices = n_vertices
        self._fps = fps
        self._n_weights = len(blendshape_names)
        self._still = dict(still)
        if blendshape_names:
            self._still["blendshape_names"] = np.array(blendshape_names)
        self._frames = 0
        self._info = ZipInfo(MEMBER)
        self._info.compress_type = ZIP_STORED
        self._info.CRC = 0  # until it is known
        self._data_start = len(self._info.FileHeader(zip64=True)) + NPY_HEADER_BYTES
        try:
            self._file = self._partial.open("w+b", buffering=0)
            self._file.write(bytes(self._data_start))
            self._weights = tempfile.TemporaryFile(buffering=0, dir=self._target.parent)  # noqa: SIM115
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise self._failed(error, "Free some space, or name another file.") from error

    def audio(self, samples: npt.NDArray[np.float32]) -> None:
        """An .npz holds no sound."""

    def frame(self, frame: Frame) -> None:
        """Append a frame. Raises UsageError if it lacks the blendshapes that were announced."""
        weights = frame.blendshapes
        if self._n_weights and (weights is None or weights.shape != (self._n_weights,)):
            raise UsageError(f"{self._path}: expected {self._n_weights} blendshapes a frame; got {weights}.")
        try:
            _write_all(self._file, np.ascontiguousarray(frame.vertices).data)
            if self._n_weights and weights is not None:
                _write_all(self._weights, weights.data)
        except OSError as error:
            raise self._failed(error, "What fits is kept.") from error
        self._frames += 1

    def close(self) -> None:
        """Write headers and index and give the file its name. Closing twice is fine."""
        if self._file.closed:
            return
        try:
            with self._weights:
                self._complete()
        except OSError as error:
            with suppress(OSError):
                self._file.close()
            then = f"The frames are in {self._partial}, raw float32 from byte {self._data_start} on."
            raise self._failed(error, then) from error

    def _complete(self) -> None:
        if self._frames == 0:
            self._file.close()
            self._partial.unlink()
            return
        try:
            self._finish()
        except OSError:
            # No room even for the index: frames make room for it, as few as will do.
            self._frames -= min(self._frames - 1, -(-self._index_bytes // self._frame_bytes))
            self._finish()
        self._file.close()
        self._partial.replace(self._target)

    @property
    def _frame_bytes(self) -> int:
        return self._n_vertices * 3 * 4

    @property
    def _index_bytes(self) -> int:
        """At most what comes after the frames."""
        still = sum(array.nbytes for array in self._still.values())
        return DIRECTORY_BYTES + still + self._frames * (8 + self._weights_bytes)

    @property
    def _weights_bytes(self) -> int:
        return self._n_weights * 4

    def _finish(self) -> None:
        end = self._data_start + self._frames * self._frame_bytes
        self._file.truncate(end)
        header = self._npy_header()
        self._file.seek(self._data_start)
        checksum = zlib.crc32(header)
        while block := self._file.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
        info = self._info
        info.header_offset = 0
        info.CRC = checksum
        info.file_size = info.compress_size = len(header) + end - self._data_start
        self._file.seek(0)
        _write_all(self._file, info.FileHeader(zip64=True) + header)
        others: dict[str, npt.ArrayLike] = {
            "time_s": np.arange(self._frames) / self._fps,
            "fps": np.int64(self._fps),
            **self._still,
        }
        # Mode "w" appends where the file stands and truncates nothing; "a" would look for an index in the
        # frames.
        with self._partial.open("r+b") as file:
            file.seek(end)
            with ZipFile(file, "w", ZIP_STORED) as archive:
                archive.infolist().append(info)
                for name, array in others.items():
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
                if self._n_weights:
                    self._copy_weights(archive)

    def _copy_weights(self, archive: ZipFile) -> None:
        shape, end = (self._frames, self._n_weights), self._frames * self._weights_bytes
        self._weights.seek(0)
        with archive.open("blendshapes.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for first in range(0, end, BLOCK_BYTES):
                member.write(self._weights.read(min(BLOCK_BYTES, end - first)))

    def _npy_header(self) -> bytes:
        shape = (self._frames, self._n_vertices, 3)
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        body = text.ljust(NPY_HEADER_BYTES - 11) + "\n"
        return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body.encode("ascii")

    def _failed(self, error: OSError, then: str) -> OutputError:
        return OutputError(f"{self._path} cannot be written: {error.strerror}. {then}")


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write everything: a raw file may take less at a time, and takes the first part of what no longer
    fits.
    """
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]
