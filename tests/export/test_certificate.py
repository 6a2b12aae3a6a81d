"""What the certificate judges in a closed loop, and what frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk.model import Parity
from streamtalk_export import export_model as exporter
from streamtalk_export.certificate import MaxError
from streamtalk_export.cli import main
from streamtalk_export.drive import Graphs
from tests.small_model import TINY

OFF = 0.1
"""What a graph of the head that is wrong may be off."""


def certificate(head: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Parity]:
    """The largest errors of a small talker whose exported head is `OFF` in every number, by what they are of."""
    right = Graphs.run

    def wrong(graphs: Graphs, name: str, **inputs: Any) -> list[Any]:
        outputs = right(graphs, name, **inputs)
        return [outputs[0] + np.float32(OFF)] if name == "diffusion_head" else outputs

    monkeypatch.setattr(Graphs, "run", wrong)
    judged: list[Parity] = []
    monkeypatch.setattr(exporter, "_enforce", judged.extend)
    file = folder / "config.yaml"
    file.write_text(TINY.replace("head: residual_mlp", f"head: {head}"), encoding="utf-8")
    assert main(["--config", str(file), "--random-weights", "0", "--out", str(folder / "model")]) == 0
    names = {"max_abs_error": "", "closed_loop_max_abs_error": " in a closed loop"}
    return {line.subject + names[line.quantity]: line for line in judged if line.quantity in names}


def _held(line: Parity) -> bool:
    assert line.bound is not None
    return line.measured <= line.bound


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_is_no_small_error(place: int) -> None:
    error = MaxError()
    for at in range(2):
        error.add(np.array([np.nan if at == place else 1.0]), np.ones(1))
    assert not error.line("frame").measured <= 1e9


def test_a_head_that_draws_is_judged_from_the_models_own_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a blink hangs by a hair roundings grow from frame to frame, and both streams are right. A head that is
    wrong is still found, by itself."""
    lines = certificate("residual_mlp", tmp_path, monkeypatch)
    assert not _held(lines["diffusion_head"])
    assert lines["diffusion_head"].measured == pytest.approx(OFF, rel=1e-3)
    assert _held(lines["condition_predictor"])
    assert lines["frame in a closed loop"].bound is None


def test_a_folded_head_is_judged_in_a_closed_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = certificate("linear", tmp_path, monkeypatch)
    assert not _held(lines["diffusion_head"])
    assert not _held(lines["condition_predictor"])
    assert "frame in a closed loop" not in lines
