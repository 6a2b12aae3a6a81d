"""Models for which float16 is too coarse: what an export leaves out, keeps in float32, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from streamtalk import Talker
from streamtalk.backends.engine_file import check_engines
from streamtalk.model import AUDIO_ENCODER, FRAME, read_manifest
from streamtalk_export import export_model as exporter
from streamtalk_export import onnx_file
from streamtalk_export import reduced_certificate as certificate
from streamtalk_export.cli import main
from streamtalk_export.half import to_half
from tests.export.test_cli import SMALL

Damage = Callable[[set[str]], None]


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates of 3 s in place of 30: what they find here is no matter of length."""
    monkeypatch.setattr(exporter, "certify_reduced", partial(certificate.certify_reduced, seconds=3))


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Damage:
    """Makes float16 graphs that have one of the outputs given wrong: their largest weight is nothing."""

    def install(outputs: set[str]) -> None:
        def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
            model = to_half(model)
            if outputs.intersection(value.name for value in model.graph.output):
                weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
                zeros = np.zeros_like(numpy_helper.to_array(weight))
                weight.CopyFrom(numpy_helper.from_array(zeros, weight.name))
            return model

        monkeypatch.setattr(onnx_file, "to_half", wrong)

    return install


def export(out: Path, *more: str) -> int:
    windows = ["--history", "4", "--decode-window", "4"]
    return main([*SMALL, *windows, "--precision", "fp16", "--out", str(out), *more])


def test_graphs_in_onnxruntimes_own_operators_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = certificate.Bounds(0, 0, 0, 0)
    monkeypatch.setattr(certificate, "BOUNDS", {**certificate.BOUNDS, "fused": nothing})
    assert export(tmp_path / "m", "--batch", "2") == 0
    assert "own operators miss their bound (frame.fused vertex_error_p99_mm" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "m")
    assert {graph.precision for graph in manifest.graphs.values()} == {"fp32", "fp16"}
    assert "frame.fp16" in {line.subject for line in manifest.parity}
    assert not any("fused" in line.subject for line in manifest.parity)
    listed = {name for graph in manifest.graphs.values() for name in graph.files}
    assert {path.name for path in (tmp_path / "m").glob("*.onnx*")} == listed


@pytest.mark.parametrize("batch", ["1", "2"])
def test_all_but_the_audio_encoder_stays_float32(
    batch: str,
    damage: Damage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 1000)  # so that weights lie beside the graphs
    damage({"vertices"})
    builds = batch == "1" and find_spec("tensorrt_rtx") is not None
    targets = "onnx,tensorrt_rtx" if builds else "onnx"
    assert export(tmp_path / "m", "--batch", batch, "--targets", targets) == 0
    assert "float16 misses its bound (frame.fp16 vertex_error_p99_mm" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "m")
    kinds = {
        name: {
            tensor.data_type for tensor in onnx.load(tmp_path / "m" / f"{name}.fp16.onnx").graph.initializer
        }
        for name in (AUDIO_ENCODER, FRAME, "vq_decoder", "diffusion_head", "condition_predictor")
    }
    assert [name for name, types in kinds.items() if onnx.TensorProto.FLOAT16 in types] == [AUDIO_ENCODER]
    assert manifest.float32_frames
    assert manifest.told("fp16") == "fp16, frames in fp32"
    # What was built is what was certified, and what was built before is gone.
    assert len(manifest.engines) == 6 * builds
    for engine in manifest.engines:
        check_engines(tmp_path / "m", manifest, "tensorrt_rtx")
        assert engine.graph_sha256 == manifest.graphs[f"{engine.graph}.fp16"].sha256
    # onnx would have added to the weights that were there.
    sizes = [(tmp_path / "m" / f"vq_decoder{kind}.onnx.data").stat().st_size for kind in ("", ".fp16")]
    assert sizes[0] == sizes[1]
    assert Talker.load(tmp_path / "m").backend == "onnxruntime-cpu"


def test_an_audio_encoder_that_is_too_coarse_is_refused(
    damage: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage({"audio_features"})
    assert export(tmp_path / "m") == 2
    assert (
        "The audio encoder too is too coarse in float16: frame.fp16 vertex_error_p99_mm"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
