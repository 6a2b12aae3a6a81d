"""What the certificate compares in a closed loop, what hop by hop, and what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk.model import Parity
from streamtalk_export import export_model as exporter
from streamtalk_export.cli import main
from streamtalk_export.parity import Stages, Worst
from tests.small_model import TINY

OFF = 0.1
"""What a graph that is wrong is off."""


def certificate(
    head: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str, broken: str = "diffusion_head"
) -> dict[tuple[str, str], Parity]:
    """Lines of a small talker's certificate, by graph and measure; a stage graph is `OFF` in every number."""
    right = Stages.run

    def wrong(stages: Stages, name: str, **inputs: Any) -> list[Any]:
        first, *rest = right(stages, name, **inputs)
        return [first + np.float32(OFF * (name == broken)), *rest]

    monkeypatch.setattr(Stages, "run", wrong)
    found: list[Parity] = []
    monkeypatch.setattr(exporter, "require_parity", lambda lines, _: found.extend(lines))
    file = folder / "config.yaml"
    file.write_text(TINY.replace("head: residual_mlp", f"head: {head}"), encoding="utf-8")
    arguments = ["--config", str(file), "--random-weights", "0", "--out", str(folder / "model"), *options]
    assert main(arguments) == 0
    return {(line.graph, line.measure): line for line in found}


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_is_no_small_error(place: int) -> None:
    error = Worst()
    for at in range(2):
        error.add(np.array([np.nan if at == place else 1.0]), np.ones(1))
    assert error.line("hop").missed


def test_a_head_that_draws_is_compared_from_the_models_own_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a blink hangs by a hair roundings grow from frame to frame, and both streams are right. A head that is
    wrong is still found, by itself.
    """
    lines = certificate("residual_mlp", tmp_path, monkeypatch)
    assert lines["diffusion_head", "max_abs_error"].missed
    assert lines["diffusion_head", "max_abs_error"].value == pytest.approx(OFF, rel=1e-3)
    assert not lines["condition_predictor", "max_abs_error"].missed
    assert lines["hop", "max_abs_error"].missed


def test_a_folded_head_is_compared_in_a_closed_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = certificate("linear", tmp_path, monkeypatch)
    assert lines["diffusion_head", "max_abs_error"].missed
    assert lines["condition_predictor", "max_abs_error"].missed
    assert lines["hop", "max_abs_error_of_state"].missed


@pytest.mark.parametrize("stage", ["audio_encoder", "vq_decoder"])
def test_a_stage_that_is_wrong_is_found_twice(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = certificate("linear", tmp_path, monkeypatch, "--hop", "3", broken=stage)
    assert lines[stage, "max_abs_error"].missed
    assert lines["hop", "max_abs_error"].missed
