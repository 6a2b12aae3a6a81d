"""The pose sheet shows what labels do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.pose_sheet import POSES, main, pose_weights


@pytest.mark.parametrize("name", POSES)
def test_every_pose_is_weights_in_range(name: str) -> None:
    weights = pose_weights(name)
    assert weights.shape == (len(ARKIT_INDEX),)
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert (weights.max() > 0) == (name != "neutral")


def test_visemes_come_from_the_label_tables() -> None:
    assert pose_weights("PBM")[ARKIT_INDEX["mouthClose"]] == pose_weights("PBM")[ARKIT_INDEX["jawOpen"]] > 0
    assert np.argmax(pose_weights("UW")) == ARKIT_INDEX["mouthPucker"]
    with pytest.raises(KeyError):
        pose_weights("XX")


def test_a_missing_face_is_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--face", str(tmp_path / "none.npz"), "--out", str(tmp_path / "sheet.jpg")]) == 2
    assert "none.npz" in capsys.readouterr().err
