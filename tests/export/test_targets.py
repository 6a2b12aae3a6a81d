"""`export.py --targets`: engines of an exported model, by TensorRT-RTX where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamtalk import BackendError
from streamtalk.backends.build import Builder, build_engines
from streamtalk.model import graph_key, hop_name, is_hop, read_manifest, verified
from streamtalk_export.cli import main
from tests.export.golden import DATA, NAMES

RTX = "tensorrt_rtx"
ROWS = 3


def arguments(name: str, out: Path) -> list[str]:
    """An export of the small model `name` with random weights."""
    hubert = ["--hubert-config", str(DATA / name / "hubert_config.json"), "--random-weights", "3"]
    return ["--config", str(DATA / name / "config.yaml"), *hubert, "--history", "4", "--out", str(out)]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    pytest.importorskip(RTX, reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole way through the command line, for two generations of cards."""
    out = tmp_path_factory.mktemp("built") / "model"
    targets = ["--targets", f"onnx,{RTX}", "--compute-capability", "120,86", "--precision", "fp16"]
    assert main([*arguments(request.param, out), "--batch", str(ROWS), *targets]) == 0
    return out


def test_the_command_line_writes_engines_certificate_and_probe(built: Path) -> None:
    manifest = read_manifest(built)
    assert {engine.graph for engine in manifest.engines} == {hop_name(1), hop_name(ROWS)}
    for engine in manifest.engines:
        assert (engine.backend, engine.precision, engine.compute_capability) == (RTX, "fp16", "86,120")
        verified(built, engine.file, engine.sha256)
        assert engine.graph_sha256 == manifest.graphs[graph_key(engine.graph, "fp16")].sha256
    lines = [line for line in manifest.parity if is_hop(line.graph) and "fp16" in line.graph]
    assert any(line.bound is not None for line in lines)
    assert not [line for line in lines if line.missed]
    assert manifest.probe is not None


def test_stage_graphs_build_on_request(built: Path) -> None:
    graphs = read_manifest(built).graphs
    keys = [
        key
        for key, graph in graphs.items()
        if graph.operators == "onnx" and not is_hop(key)
        if all(isinstance(n, int) for tensor in graph.inputs for n in tensor.shape)
    ]
    assert keys
    engines = build_engines(built, RTX, graphs=keys).engines
    assert {graph_key(engine.graph, engine.precision) for engine in engines} >= set(keys)


def test_a_build_that_fails_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise BackendError("tensorrt_rtx cannot build hop.onnx: no tactic was found")

    monkeypatch.setattr(Builder, "build", fails)
    assert main([*arguments(NAMES[0], tmp_path / "m"), "--targets", RTX]) == 2
    assert "cannot build hop.onnx: no tactic" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--targets", RTX, "--compute-capability", "86,42"], "--compute-capability 42"),
        (["--compute-capability", "86"], "add --targets tensorrt_rtx"),
    ],
)
def test_refusals(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments(NAMES[0], tmp_path / "m"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
