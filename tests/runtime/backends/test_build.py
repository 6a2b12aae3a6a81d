"""Engines, built on a machine without a GPU: by TensorRT-RTX where it is installed."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from streamtalk import BackendError, MissingDependencyError, ModelError, OutputError, Talker, UsageError
from streamtalk.app.cli import main
from streamtalk.backends.build import BACKENDS, Builder, build_engines, check_builder, installed_backend
from streamtalk.backends.cuda import tensorrt
from streamtalk.backends.disk_cache import exclusive
from streamtalk.backends.engine_file import read_rtx_header
from streamtalk.model import Graph, Manifest, Tensor, read_manifest, sha256_of, verified, write_manifest
from tests.runtime.toy import Toy

RTX = "tensorrt_rtx"
HOPS = {"hop", "hop_b3"}


@pytest.fixture(scope="session")
def builder() -> Builder:
    pytest.importorskip(RTX, reason="tensorrt-rtx is not installed")
    return Builder(RTX)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Locks go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMTALK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose hop graphs are listed at both precisions. Its float16 graphs are the others under their names."""
    directory = Toy(rows=(1, 3)).write(tmp_path_factory.mktemp("both") / "model")
    manifest = read_manifest(directory)
    graphs = dict(manifest.graphs)
    for key, graph in manifest.graphs.items():
        file = f"{key}.fp16.onnx"
        shutil.copy(directory / graph.file, directory / file)
        weights = {name: digest for name, digest in graph.files.items() if name != graph.file}
        files = {file: sha256_of(directory / file), **weights}
        graphs[f"{key}.fp16"] = msgspec.structs.replace(graph, file=file, files=files, precision="fp16")
    write_manifest(directory, msgspec.structs.replace(manifest, graphs=graphs))
    return directory


@pytest.fixture(scope="session")
def built(builder: Builder, both: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole way through the command line, for two generations of cards."""
    del builder
    directory = shutil.copytree(both, tmp_path_factory.mktemp("built") / "model")
    assert main(["build", str(directory), "--backend", RTX, "--compute-capability", "120,86"]) == 0
    return directory


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "model")


def state(directory: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in directory.iterdir()}


def change(directory: Path, **fields: Any) -> Manifest:
    manifest = msgspec.structs.replace(read_manifest(directory), **fields)
    write_manifest(directory, manifest)
    return manifest


def check_engines(directory: Path, manifest: Manifest) -> None:
    """Compare every engine file with the manifest, and its header with the library."""
    for engine in manifest.engines:
        assert (
            read_rtx_header(verified(directory, engine.file, engine.sha256)).version
            == engine.tensorrt_version
        )


def test_every_hop_graph_is_built(built: Path, both: Path, builder: Builder) -> None:
    manifest = read_manifest(built)
    assert {engine.graph for engine in manifest.engines} == HOPS
    for engine in manifest.engines:
        assert (engine.backend, engine.precision, engine.compute_capability) == (RTX, "fp16", "86,120")
        assert engine.tensorrt_version == builder.version
        assert engine.graph_sha256 == manifest.graphs[f"{engine.graph}.fp16"].sha256
        assert engine.flags == ("no_tf32", "strongly_typed", "user_allocation")
    files = {path.name for path in both.iterdir()} | {engine.file for engine in manifest.engines}
    assert {path.name for path in built.iterdir()} == files
    check_engines(built, manifest)
    # The float32 graphs are still what the CPU runs.
    assert Talker.load(built, "onnxruntime-cpu").backend == "onnxruntime-cpu"


def test_a_line_for_each_engine(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(copy), "--backend", RTX]) == 0
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert [line.split()[0] for line in lines] == [f"{name}.fp16.{RTX}.engine" for name in sorted(HOPS)]
    assert all(line.split()[2::2] == ["MB", "s"] for line in lines)
    assert not output.out


def test_engines_of_another_precision_are_added(copy: Path) -> None:
    before = read_manifest(copy).engines
    began: list[str] = []

    def working(text: str) -> Any:
        began.append(text)
        return threading.Lock()

    after = build_engines(copy, RTX, "fp32", graphs=None, working=working)
    assert began == [f"Building {name}.onnx for {RTX}" for name in sorted(HOPS)]
    assert after == read_manifest(copy)
    assert after.engines[: len(before)] == before
    assert [engine.precision for engine in after.engines] == ["fp16", "fp16", "fp32", "fp32"]
    assert {engine.compute_capability for engine in after.engines[2:]} == {"any"}
    assert len({engine.file for engine in after.engines}) == 4
    check_engines(copy, after)


def test_a_model_without_float16_is_built_in_float32(builder: Builder, tmp_path: Path) -> None:
    del builder
    directory = Toy().write(tmp_path / "model")
    (engine,) = build_engines(directory, RTX).engines
    assert (engine.graph, engine.precision) == ("hop", "fp32")
    with pytest.raises(ModelError, match=r"has no fp16 hop graphs.*--precision fp16 first"):
        build_engines(directory, RTX, "fp16")


def test_graphs_by_name(copy: Path) -> None:
    change(copy, engines=())
    assert main(["build", str(copy), "--backend", RTX, "--graph", "hop_b3", "hop.fp16"]) == 0
    engines = read_manifest(copy).engines
    assert [(engine.graph, engine.precision) for engine in engines] == [("hop_b3", "fp32"), ("hop", "fp16")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--graph", "hop_b4"], "has no graph hop_b4. It has: hop, hop_b3"),
        (["--graph", "hop", "--precision", "fp16"], "Graph hop is fp32, not fp16"),
        (["--graph", "hop.fp16.onnxruntime"], "no TensorRT parses. Build hop.fp16."),
        (["--graph", "any_length"], "takes inputs of any length"),
        (["--compute-capability", "86,x"], "expected numbers such as 86,89, got 86,x"),
        (["--compute-capability", "86,42"], "--compute-capability 42"),
        (["--backend", "onnxruntime"], "invalid choice: 'onnxruntime'"),
    ],
)
def test_refusals(
    arguments: list[str], sentence: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(copy)
    graph = manifest.graphs["hop.fp16"]
    foreign = msgspec.structs.replace(graph, operators="onnxruntime")
    dynamic = msgspec.structs.replace(graph, inputs=(Tensor("pcm", "float32", (1, "samples")),))
    change(copy, graphs={**manifest.graphs, "hop.fp16.onnxruntime": foreign, "any_length": dynamic})
    before = state(copy)
    assert main(["build", str(copy), "--backend", RTX, *arguments]) == 2
    assert sentence in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert state(copy) == before


def test_graphs_for_onnxruntime_alone_are_not_built(copy: Path) -> None:
    manifest = read_manifest(copy)
    foreign = msgspec.structs.replace(manifest.graphs["hop.fp16"], operators="onnxruntime")
    change(copy, engines=(), graphs={**manifest.graphs, "hop.fp16.onnxruntime": foreign})
    assert {engine.graph for engine in build_engines(copy, RTX).engines} == HOPS


def test_an_unknown_backend_is_a_sentence(both: Path) -> None:
    with pytest.raises(UsageError, match="'onnxruntime'; expected tensorrt or tensorrt_rtx"):
        build_engines(both, "onnxruntime")


def test_weights_that_changed_build_nothing(copy: Path) -> None:
    flip(copy / "weights.fp32.bin")
    before = state(copy)
    with pytest.raises(ModelError, match=r"weights\.fp32\.bin is not the file that was exported"):
        build_engines(copy, RTX)
    assert state(copy) == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def broken_graph(directory: Path) -> Graph:
    """A valid ONNX file with an operator that no TensorRT parses."""
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "xy")
    node = onnx.helper.make_node("Det", ["z"], ["y"])
    reshape = onnx.helper.make_node("Reshape", ["x", "s"], ["z"])
    shape = onnx.numpy_helper.from_array(np.array([1, 2, 2]), "s")
    graph = onnx.helper.make_graph([reshape, node], "g", [x], [y], [shape])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), directory / "g.onnx"
    )
    return Graph(file="g.onnx", files={}, precision="fp32", inputs=(), outputs=())


def test_the_parsers_own_message(builder: Builder, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot parse g\.onnx: .*Det"):
        builder.build(tmp_path, "g", broken_graph(tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch, both: Path) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt, "importlib", SimpleNamespace(import_module=absent))
    before = state(both)
    for backend in BACKENDS:
        for start in (lambda name: build_engines(both, name), check_builder):
            with pytest.raises(MissingDependencyError, match=f"^{backend} needs the package .*pip install"):
                start(backend)
    assert state(both) == before


def test_the_installed_library_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    assert installed_backend() == "tensorrt"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert installed_backend() == RTX


@pytest.mark.parametrize(
    ("problem", "code", "sentence"),
    [
        (BackendError("no room for the second"), 2, "no room for the second"),
        (KeyboardInterrupt(), 130, "interrupted; "),
        (signal.SIGTERM, 130, "interrupted; "),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_a_build_that_does_not_end_leaves_the_engines_that_were(
    problem: BaseException | signal.Signals,
    code: int,
    sentence: str,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, build, builds = state(copy), Builder.build, 0

    def second_fails(*arguments: Any) -> Any:
        nonlocal builds
        builds += 1
        if builds == 2:
            if isinstance(problem, signal.Signals):
                signal.raise_signal(problem)
            else:
                raise problem
        return build(*arguments)

    monkeypatch.setattr(Builder, "build", second_fails)
    assert main(["build", str(copy), "--backend", RTX]) == code
    assert sentence in capsys.readouterr().err
    assert builds == 2
    assert state(copy) == before


def test_a_builder_that_fails_says_why(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Builder, *_: Any) -> Any:
        return self._call(lambda: self.logger.messages.append("no tactic was found"), "cannot build hop.onnx")

    before = state(copy)
    monkeypatch.setattr(Builder, "build", fails)
    assert main(["build", str(copy), "--backend", RTX]) == 2
    error = capsys.readouterr().err
    assert f"{RTX} " in error
    assert "cannot build hop.onnx: no tactic was found" in error
    assert state(copy) == before


def test_engines_that_were_replaced_or_damaged_are_no_longer_listed(copy: Path) -> None:
    manifest = read_manifest(copy)
    gone = msgspec.structs.replace(manifest.engines[0], file="gone.engine", precision="fp32")
    renamed = msgspec.structs.replace(manifest.engines[1], file=f"old.{RTX}.engine")
    shutil.copy(copy / manifest.engines[1].file, copy / renamed.file)
    (copy / ".engines.killed").mkdir()
    change(copy, engines=(*manifest.engines, gone, renamed))
    assert main(["build", str(copy), "--backend", RTX]) == 0
    after = read_manifest(copy)
    assert sorted(e.file for e in after.engines) == sorted(e.file for e in manifest.engines)
    check_engines(copy, after)
    assert not list(copy.glob(".*"))


@pytest.mark.parametrize("file", ["../other.onnx", "hop.onnx"])
def test_a_graph_without_a_hash_builds_nothing(
    file: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(copy)
    graph = msgspec.structs.replace(manifest.graphs["hop.fp16"], file=file)
    change(copy, graphs={**manifest.graphs, "hop.fp16": graph})
    before = state(copy)
    assert main(["build", str(copy), "--backend", RTX]) == 2
    assert f"gives no SHA-256 for {file}" in capsys.readouterr().err
    assert state(copy) == before


def test_a_folder_that_cannot_be_followed_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for directory in (tmp_path / "loop", tmp_path / ("x" * 300), tmp_path / "none"):
        assert main(["build", str(directory), "--backend", RTX]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        with pytest.raises((ModelError, OutputError)):
            build_engines(directory, RTX)


def test_two_builds_of_one_directory_wait_for_each_other(copy: Path) -> None:
    began = threading.Event()

    def working(_: str) -> Any:
        began.set()
        return threading.Lock()

    thread = threading.Thread(target=build_engines, args=(copy, RTX), kwargs={"working": working})
    with exclusive(copy):
        thread.start()
        assert not began.wait(0.5)
    thread.join()
    assert began.is_set()


def test_a_directory_that_is_being_written_takes_no_lock(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy.parent / "file").touch()
    monkeypatch.setenv("STREAMTALK_CACHE", str(copy.parent / "file"))
    with pytest.raises(OutputError, match="STREAMTALK_CACHE"):
        build_engines(copy, RTX)
    assert build_engines(copy, RTX, lock=False) == read_manifest(copy)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda whole: b"ftrt" + whole[4:], "wrote no valid engine: .* is no TensorRT-RTX engine"),
        (lambda whole: whole[:-10], "wrote no valid engine: .* it was cut off"),
        (lambda whole: whole[:24] + bytes([1, 0, 0, 0]) + whole[28:], r"says TensorRT-RTX 1\.0\.0\.0"),
        (lambda whole: whole.replace(b"kv_cache_out", b"kv_cache_on_"), "does not name kv_cache_out"),
    ],
)
def test_an_engine_that_does_not_say_what_it_should_is_refused(
    damage: Callable[[bytes], bytes], sentence: str, copy: Path, builder: Builder, tmp_path: Path
) -> None:
    graph = read_manifest(copy).graphs["hop.fp16"]
    whole = (copy / f"hop.fp16.{RTX}.engine").read_bytes()
    file = tmp_path / "damaged.engine"
    file.write_bytes(whole)
    builder._check_plan(file, graph)
    file.write_bytes(damage(whole))
    with pytest.raises(BackendError, match=sentence):
        builder._check_plan(file, graph)
