"""A face of nine vertices that speaks, blinks and can be measured."""

from __future__ import annotations

import numpy as np

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.face import Face

UPPER_LIP, LOWER_LIP, LID = (0, 2), (1, 3), 4


def tiny_face(identities: int = 2) -> Face:
    """`jawOpen` lowers the lower lip by 20 mm, `mouthClose` undoes it, `eyeBlink*` lower the lid by 10 mm and
    pull at vertex 8, which belongs to nothing."""
    shapes = np.zeros((len(ARKIT_NAMES), 9, 3), np.float16)
    shapes[ARKIT_INDEX["jawOpen"], LOWER_LIP, 1] = -0.02
    shapes[ARKIT_INDEX["mouthClose"], LOWER_LIP, 1] = 0.02
    for side in ("Left", "Right"):
        shapes[ARKIT_INDEX["eyeBlink" + side], (LID, 8), 1] = -0.01
    templates = np.zeros((identities, 9, 3), np.float32)
    templates[:, :, 0] = np.arange(9) * 0.01
    templates[:, 1::2, 0] = templates[:, 0:-1:2, 0]  # each lower lip below its upper lip
    grey = np.full((identities, 9, 3), 128, np.uint8)
    return Face(
        vertices=templates[0],
        faces=np.array([[0, 1, 2], [4, 5, 6]], np.int32),
        colors=grey[0],
        identity_colors=grey,
        templates=templates,
        speaker_names=np.array([f"s{i}" for i in range(identities)]),
        blendshapes=shapes,
        blendshape_names=np.array(ARKIT_NAMES),
        lip_pairs=np.array([[0, 1], [2, 3]], np.int32),
        mouth_corners=np.array([0, 2], np.int32),
        lids=np.array([[4, 5], [4, 5]], np.int32),
        lips=np.arange(4, dtype=np.int32),
        upper_face=np.array([4, 5], np.int32),
        licence=np.array("CC0-1.0"),
        provenance=np.array("made up"),
    )


def weights_of(**values: np.ndarray) -> np.ndarray:
    """ARKit weights [L, 52] with the named columns set."""
    length = len(next(iter(values.values())))
    weights = np.zeros((length, len(ARKIT_NAMES)), np.float32)
    for name, column in values.items():
        weights[:, ARKIT_INDEX[name]] = column
    return weights
