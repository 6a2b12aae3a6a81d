"""Draws the bundled face's poses on one labelled sheet: ``python -m streamtalk_training.pose_sheet``.

Visemes are posed by the same tables that label the training speech, so the sheet shows what a label looks like.
Needs Pillow, and draws through OpenGL or, without it, in software.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from streamtalk.errors import StreamTalkError
from streamtalk.viewer.render import open_renderer
from streamtalk_training.coarticulation import ARKIT_INDEX, Style, arkit_weights
from streamtalk_training.face import Face, FaceFileError, load_face, pose
from streamtalk_training.visemes import tables

VISEMES = ("AA", "IY", "UW", "OW", "PBM", "FV", "SH", "L")
EXPRESSIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "blink": {"eyeBlinkLeft": 1.0, "eyeBlinkRight": 1.0},
    "brows": {"browInnerUp": 0.8, "browOuterUpLeft": 0.6, "browOuterUpRight": 0.6},
    "smile": {
        f"{shape}{side}": weight
        for shape, weight in (
            ("mouthSmile", 0.65),
            ("mouthDimple", 0.20),
            ("mouthUpperUp", 0.20),
            ("mouthLowerDown", 0.10),
            ("cheekSquint", 0.45),
            ("eyeSquint", 0.25),
        )
        for side in ("Left", "Right")
    },
}
POSES = ("neutral", *VISEMES, "blink", "smile", "brows")
YAWS_DEG = (0.0, 35.0)
TILE_PX = 360
COLUMNS = 4  # poses a row, each from both angles
LABEL_PX = 20
QUALITY = 90  # of the JPEG


def pose_weights(name: str) -> NDArray[np.float32]:
    """ARKit weights [52] of one of `POSES`.

    Raises:
        KeyError: the name is neither a viseme nor an expression.
    """
    if name in EXPRESSIONS:
        weights = np.zeros(len(ARKIT_INDEX), np.float32)
        for shape, weight in EXPRESSIONS[name].items():
            weights[ARKIT_INDEX[shape]] = weight
        return weights
    rules = tables()
    targets = rules.viseme_targets[name]
    controls = np.array([[targets.get(control, 0.0) for control in rules.controls]], np.float32)
    return np.asarray(arkit_weights(controls, Style())[0])


def tiles(face: Face, identity: int, poses: Sequence[str], yaw_deg: float) -> list[Image.Image]:
    """One square picture of `identity` for each of `poses`."""
    with open_renderer(
        face.templates[identity],
        face.faces,
        face.identity_colors[identity],
        size=(TILE_PX, TILE_PX),
        yaw_deg=yaw_deg,
    ) as renderer:
        return [
            Image.fromarray(renderer.render(pose(face, pose_weights(name), identity)).copy())
            for name in poses
        ]


def pose_sheet(face: Face) -> Image.Image:
    """All poses of the first identity from both angles; then all identities at rest."""
    views = [tiles(face, 0, POSES, yaw) for yaw in YAWS_DEG]
    names = [str(name) for name in face.speaker_names]
    people = [[tiles(face, k, ("neutral",), yaw)[0] for k in range(len(names))] for yaw in YAWS_DEG]
    cells = list(zip(POSES, *views, strict=True))
    cells += list(zip(names, *people, strict=True))

    step = len(YAWS_DEG) * TILE_PX
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * step, rows * TILE_PX))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LABEL_PX)
    for k, (name, *pictures) in enumerate(cells):
        x, y = (k % COLUMNS) * step, (k // COLUMNS) * TILE_PX
        for view, picture in enumerate(pictures):
            sheet.paste(picture, (x + view * TILE_PX, y))
        draw.text((x + LABEL_PX // 2, y + LABEL_PX // 2), name, fill="white", font=font)
    return sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sheet; exit code 2 and one sentence if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m streamtalk_training.pose_sheet", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--face", type=Path, default=Path("models/bundled/face.npz"))
    parser.add_argument("--out", type=Path, default=Path("docs/face_poses.jpg"))
    options = parser.parse_args(arguments)
    try:
        sheet = pose_sheet(load_face(options.face))
    except (FaceFileError, FileNotFoundError, StreamTalkError) as error:
        print(f"pose_sheet: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out, quality=QUALITY)
    print(f"pose_sheet: {options.out}: {sheet.width} x {sheet.height} pixels", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
