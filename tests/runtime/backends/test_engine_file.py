"""Which engine fits, and why one does not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from streamtalk import BackendError
from streamtalk.backends.engine_file import RTX, check_engines, find_engines
from streamtalk.model import Engine, Manifest, Precision, graph_key, read_manifest

NAMES = ("audio_encoder", "frame")


def listed(manifest: Manifest, precision: Precision, **other: str) -> tuple[Engine, ...]:
    return tuple(
        msgspec.structs.replace(
            Engine(
                graph=name,
                file=f"{name}.{precision}.engine",
                sha256="0" * 64,
                backend=RTX,
                precision=precision,
                tensorrt_version="1.7.1.116",
                compute_capability="any",
                graph_sha256=manifest.graphs[graph_key(name, precision)].sha256,
            ),
            **other,
        )
        for name in NAMES
    )


@pytest.fixture
def manifest(engine: Path) -> Manifest:
    """A toy with graphs of both precisions, and engines of both."""
    m = read_manifest(engine)
    half = {
        f"{name}.fp16": msgspec.structs.replace(g, precision="fp16", files={f"{name}.fp16.onnx": "1" * 64})
        for name, g in m.graphs.items()
    }
    m = msgspec.structs.replace(m, graphs={**m.graphs, **half})
    return msgspec.structs.replace(m, engines=listed(m, "fp32") + listed(m, "fp16"))


def test_engines_of_one_precision(manifest: Manifest) -> None:
    fits = find_engines(Path(), manifest, NAMES, RTX, "1.7.1.116", 86, "fp16")
    assert {name: fit.engine.file for name, fit in fits.items()} == {
        "audio_encoder": "audio_encoder.fp16.engine",
        "frame": "frame.fp16.engine",
    }
    assert fits["frame"].graph is manifest.graphs["frame.fp16"]


def test_one_precision_serves_both_graphs(manifest: Manifest) -> None:
    lacking = tuple(e for e in manifest.engines if e.file != "frame.fp16.engine")
    lacks = msgspec.structs.replace(manifest, engines=lacking)
    with pytest.raises(BackendError, match="some are missing"):
        find_engines(Path(), lacks, NAMES, RTX, "1.7.1.116", 86, "fp16")
    fits = find_engines(Path(), lacks, NAMES, RTX, "1.7.1.116", 86, "fp32")
    assert {fit.engine.precision for fit in fits.values()} == {"fp32"}


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"tensorrt_version": "1.6.0.0"}, r"built by version 1\.6\.0\.0, installed is 1\.7\.1\.116"),
        ({"compute_capability": "75,120"}, "for compute capability 75,120, the GPU has 86"),
        ({"graph_sha256": "2" * 64}, "is stale: it was built from another graph"),
        ({"graph": "vq_decoder"}, "some are missing"),
    ],
)
def test_misfits_are_named(other: dict[str, str], sentence: str, manifest: Manifest) -> None:
    engines = listed(manifest, "fp16", **other)
    with pytest.raises(BackendError, match=sentence):
        find_engines(
            Path(),
            msgspec.structs.replace(manifest, engines=engines),
            NAMES,
            RTX,
            "1.7.1.116",
            86,
            "fp16",
        )


def test_engines_for_some_cards_fit_those(manifest: Manifest) -> None:
    engines = listed(manifest, "fp16", compute_capability="75,86")
    m = msgspec.structs.replace(manifest, engines=engines)
    assert set(find_engines(Path(), m, NAMES, RTX, "1.7.1.116", 75, "fp16")) == set(NAMES)


def test_a_model_without_engines_says_how_to_build_them(engine: Path) -> None:
    with pytest.raises(BackendError, match=r"export\.py --targets onnx,tensorrt_rtx --precision fp16"):
        check_engines(engine, read_manifest(engine), RTX)


def test_a_model_with_graphs_for_them_needs_no_export(engine: Path, manifest: Manifest) -> None:
    with pytest.raises(BackendError, match=r"python -m streamtalk_export\.engines .* --targets tensorrt`"):
        check_engines(engine, msgspec.structs.replace(manifest, engines=()), "tensorrt")


def test_a_graphs_hash_covers_its_external_data(engine: Path) -> None:
    graph = read_manifest(engine).graphs["frame"]
    assert set(graph.files) == {"frame.onnx", "frame.onnx.data"}
    for name in graph.files:
        other = msgspec.structs.replace(graph, files={**graph.files, name: "0" * 64})
        assert other.sha256 != graph.sha256
