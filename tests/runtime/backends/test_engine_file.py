"""Which engine fits, and why one does not."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import msgspec
import pytest

from streamtalk import BackendError, ModelError
from streamtalk.backends.engine_file import (
    RTX,
    Fit,
    find_engine,
    how_to_build,
    read_rtx_header,
    require_engines,
)
from streamtalk.model import Engine, Manifest, Precision, graph_key, hop_name, read_manifest
from tests.runtime.toy import Toy

VERSION = "1.7.1.116"


def listed(manifest: Manifest, precision: Precision, **other: str) -> tuple[Engine, ...]:
    return tuple(
        msgspec.structs.replace(
            Engine(
                graph=hop_name(rows),
                file=f"{hop_name(rows)}.{precision}.engine",
                sha256="0" * 64,
                backend=RTX,
                precision=precision,
                tensorrt_version=VERSION,
                compute_capability="any",
                graph_sha256=manifest.graphs[graph_key(hop_name(rows), precision)].sha256,
            ),
            **other,
        )
        for rows in manifest.row_counts
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A toy with graphs of one and three rows at both precisions, and an engine of each."""
    m = read_manifest(Toy(rows=(1, 3)).write(tmp_path / "model"))
    half = {
        f"{name}.fp16": msgspec.structs.replace(g, precision="fp16", files={f"{name}.fp16.onnx": "1" * 64})
        for name, g in m.graphs.items()
    }
    m = msgspec.structs.replace(m, graphs={**m.graphs, **half})
    return msgspec.structs.replace(m, engines=listed(m, "fp32") + listed(m, "fp16"))


def with_engines(manifest: Manifest, *engines: Engine) -> Manifest:
    return msgspec.structs.replace(manifest, engines=engines)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(("rows", "name"), [(1, "hop"), (3, "hop_b3")])
def test_the_engine_of_a_number_of_rows(
    rows: int, name: str, precision: Precision, manifest: Manifest
) -> None:
    fit = find_engine(Path("here"), manifest, rows, RTX, VERSION, 86, precision)
    assert fit.path == Path(f"here/{name}.{precision}.engine")
    assert fit.graph is manifest.graphs[graph_key(name, precision)]


def test_only_the_engine_that_is_asked_for_must_fit(manifest: Manifest) -> None:
    one, three = listed(manifest, "fp16")
    lacks = with_engines(manifest, one)
    assert find_engine(Path(), lacks, 1, RTX, VERSION, 86, "fp16").engine is one
    with pytest.raises(BackendError, match=r"No tensorrt_rtx engine of `hop_b3` .*it has none"):
        find_engine(Path(), lacks, 3, RTX, VERSION, 86, "fp16")
    stale = with_engines(manifest, one, msgspec.structs.replace(three, tensorrt_version="1.6.0.0"))
    assert find_engine(Path(), stale, 1, RTX, VERSION, 86, "fp16").engine is one


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"tensorrt_version": "1.6.0.0"}, r"built by version 1\.6\.0\.0, installed is 1\.7\.1\.116"),
        ({"compute_capability": "75,120"}, "for compute capability 75,120, the GPU has 86"),
        ({"graph_sha256": "2" * 64}, "is stale: it was built from another graph"),
        ({"graph": "vq_decoder"}, "it has none"),
        ({"backend": "tensorrt"}, "it has none"),
    ],
)
def test_misfits_are_named_with_the_command_that_builds(
    other: dict[str, str], sentence: str, manifest: Manifest
) -> None:
    engines = listed(manifest, "fp16", **other)
    with pytest.raises(
        BackendError, match=rf"{sentence}\. Build it here with `streamtalk build m --backend tensorrt_rtx`"
    ):
        find_engine(Path("m"), with_engines(manifest, *engines), 1, RTX, VERSION, 86, "fp16")


def test_an_engine_that_does_not_fit_hides_none_that_does(manifest: Manifest) -> None:
    other, mine = (listed(manifest, "fp16", compute_capability=of)[0] for of in ("75,120", "80,86"))
    for engines in ((other, mine), (mine, other)):
        fit = find_engine(Path(), with_engines(manifest, *engines), 1, RTX, VERSION, 86, "fp16")
        assert fit.engine is mine


def test_a_model_without_engines_says_how_to_build_them(manifest: Manifest) -> None:
    require_engines(Path("m"), manifest, RTX, "fp16")
    for lacks in (with_engines(manifest), with_engines(manifest, *listed(manifest, "fp32"))):
        with pytest.raises(BackendError, match="streamtalk build m --backend tensorrt_rtx`"):
            require_engines(Path("m"), lacks, RTX, "fp16")
    with pytest.raises(BackendError, match="holds no tensorrt engines"):
        require_engines(Path("m"), manifest, "tensorrt", "fp16")
    assert how_to_build(Path("my model"), RTX) == "streamtalk build 'my model' --backend tensorrt_rtx"


def test_a_file_is_read_once_and_must_be_the_manifests(manifest: Manifest, tmp_path: Path) -> None:
    path, content = tmp_path / "engine", b"a plan"
    (engine, _) = listed(manifest, "fp16", sha256=hashlib.sha256(content).hexdigest())
    fit = Fit(engine, manifest.graphs["hop.fp16"], path)
    path.write_bytes(content)
    assert fit.read() == content
    path.write_bytes(content + b"!")
    with pytest.raises(ModelError, match=r"is not the engine that was built.*Build it again"):
        fit.read()
    path.unlink()
    with pytest.raises(ModelError, match=r"Cannot read .*No such file.*Build it again"):
        fit.read()


def test_the_header_of_an_rtx_engine(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    head = b"vtrt" + bytes(12) + struct.pack("<Q", 100) + bytes((1, 7, 1, 116)) + bytes(36)
    path.write_bytes(head + bytes(36))
    assert read_rtx_header(path).version == VERSION
    path.write_bytes(head)
    with pytest.raises(ModelError, match="has 64 bytes, its header says 100: it was cut off"):
        read_rtx_header(path)
    path.write_bytes(b"ftrt" + bytes(96))
    with pytest.raises(ModelError, match="is no TensorRT-RTX engine"):
        read_rtx_header(path)


def test_a_graphs_hash_covers_its_weights(manifest: Manifest) -> None:
    graph = manifest.graphs["hop"]
    assert set(graph.files) == {"hop.onnx", "weights.fp32.bin"}
    for name in graph.files:
        other = msgspec.structs.replace(graph, files={**graph.files, name: "0" * 64})
        assert other.sha256 != graph.sha256
