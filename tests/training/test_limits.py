"""Readouts that are fitted to a voice: held-out clips only, and nothing found where nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtalk_training import limits

CLIPS, FRAMES = 6, 200
RANDOM = 0.2  # correlation of 1,200 frames with what has nothing to do with them, many times its deviation


def made_up(mixed: bool) -> tuple[list[limits.Floats], list[limits.Floats]]:
    """Inputs [FRAMES, 4] of each clip, and two targets: a mixture of them and a product, or noise."""
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((FRAMES, 4)).astype(np.float32) for _ in range(CLIPS)]
    noise = [random.standard_normal((FRAMES, 2)).astype(np.float32) for _ in range(CLIPS)]
    true = [np.stack([x[:, 0] - x[:, 1], np.abs(x[:, 2])], 1) for x in inputs]
    return inputs, true if mixed else noise


def test_a_linear_readout_finds_what_is_linear() -> None:
    straight, bent = limits.cross_fitted(*made_up(True), limits.linear)
    assert straight > 0.99
    assert abs(bent) < RANDOM


def test_a_network_finds_what_is_bent() -> None:
    straight, bent = limits.cross_fitted(*made_up(True), limits.network)
    assert min(straight, bent) > 0.7


@pytest.mark.parametrize("fit", [limits.linear, limits.network])
def test_what_is_not_there_is_not_found(fit: object) -> None:
    # A readout tried on frames that it was fitted to would find noise as well.
    assert max(map(abs, limits.cross_fitted(*made_up(False), fit))) < RANDOM  # type: ignore[arg-type]


def test_neighbours_stand_beside_each_frame() -> None:
    features = np.arange(10, dtype=np.float32)[:, None]
    rows = limits.neighbours(features)
    np.testing.assert_array_equal(rows[5], [3, 4, 5, 6, 7, 1])
    np.testing.assert_array_equal(rows[0], [0, 0, 0, 1, 2, 1])


def test_the_command_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limits.main(["--model", str(tmp_path), "--corpus", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("limits: ") and said.count("\n") == 1
