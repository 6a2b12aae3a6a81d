"""Models for which float16 is too coarse: the export refuses them, names the part, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from streamtalk_export import half, parity
from streamtalk_export.cli import main
from streamtalk_export.half import DECODER, ENCODER, parts
from tests.small_model import TINY


@pytest.mark.parametrize("part", [ENCODER, DECODER])
def test_float16_that_misses_its_bound_is_refused(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest float16 weight of one part is nothing."""
    right = half.write_half

    def wrong(model: onnx.ModelProto, *given: object, **settings: object) -> None:
        tensors = parts(model.graph)[part]
        right(model, *given, **settings)  # type: ignore[arg-type]
        read = {name for node in model.graph.node if node.output[0] in tensors for name in node.input}
        found = [
            t for t in model.graph.initializer if t.name in read and t.data_type == onnx.TensorProto.FLOAT16
        ]
        for weight in sorted(found, key=lambda tensor: len(tensor.raw_data))[-1:]:
            weight.CopyFrom(
                numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(weight)), weight.name)
            )

    monkeypatch.setattr(half, "write_half", wrong)
    monkeypatch.setattr(parity, "HALF_S", 3)
    config = tmp_path / "config.yaml"
    config.write_text(TINY, encoding="utf-8")
    arguments = ["--config", str(config), "--random-weights", "0", "--precision", "fp16"]
    assert main([*arguments, "--out", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert "float16 is too coarse" in said
    assert "--precision fp32" in said
    assert f"too coarse for this model's {part}:" in said
    assert list(tmp_path.iterdir()) == [config]
