"""Batches of a real, small model: streams in rows of three against streams by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamtalk import Talker
from tests.runtime.test_batch import OTHER_ROWS, ROWS, Part, alone, by_itself, play

pytest.importorskip("torch")

FOLDER = Path(__file__).parents[1] / "data" / "vocaset_small"
CAST = (
    Part("0", 1, 16000, 640),
    Part("1", 2, 9000, 3000),
    Part("2", 3, 20001, 999),
    Part("0", 4, 12000, 160),
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    from streamtalk_export.cli import main

    out = tmp_path_factory.mktemp("golden") / "model"
    arguments = ["--checkpoint", str(FOLDER / "checkpoint.ckpt"), "--config", str(FOLDER / "config.yaml")]
    arguments += ["--hubert-config", str(FOLDER / "hubert_config.json"), "--out", str(out)]
    arguments += ["--history", "8", "--decode-window", "6", "--hop", "3", "--batch", str(ROWS)]
    assert main(arguments) == 0
    return Talker.load(out, "onnxruntime-cpu", threads=1)


def test_rows_give_what_single_streams_give(talker: Talker) -> None:
    assert talker.manifest.row_counts == (1, ROWS)
    cast = tuple(replace(part, speaker=talker.speakers[int(part.speaker)]) for part in CAST)
    for seed, size, ticks in ((1, 3, False), (2, 4, True)):
        for part, got in zip(cast, play(talker, cast, seed, size, ticks), strict=True):
            assert len(got) == part.n * talker.fps // talker.sample_rate
            np.testing.assert_array_equal(got, alone(talker, part))
            np.testing.assert_array_equal(got, alone(talker, part, ROWS - 1))
            np.testing.assert_allclose(got, by_itself(talker, part), rtol=0, atol=OTHER_ROWS)
            assert np.ptp(got, axis=0).max() > 0.1  # it moves
