"""Engines, built on a machine without a GPU: TensorRT-RTX where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from streamtalk import BackendError, Talker
from streamtalk.engine_file import check_engines, read_rtx_header
from streamtalk.manifest import FILE_NAME, Graph, read_manifest, sha256_of
from streamtalk_export import engines
from streamtalk_export.cli import main
from streamtalk_export.engines import FAMILIES, Builder
from streamtalk_export.engines import main as add
from streamtalk_export.errors import ExportError
from streamtalk_export.onnx_file import write_reduced
from tests.export.golden import DATA, NAMES, Driver, load_golden

RTX = "tensorrt_rtx"
GRAPHS = (
    "audio_encoder",
    "audio_encoder_offline",
    "condition_predictor",
    "diffusion_head",
    "vq_decoder",
    "frame",
)
SMALL = ["--config", str(DATA / "vocaset_small" / "config.yaml")]
SMALL += ["--hubert-config", str(DATA / "vocaset_small" / "hubert_config.json"), "--random-weights", "3"]


@pytest.fixture(scope="session")
def builder() -> Builder:
    pytest.importorskip(RTX, reason="tensorrt-rtx is not installed")
    return Builder(RTX)


@pytest.fixture(scope="session", params=["bundled", *NAMES])
def model(request: pytest.FixtureRequest, exported: Callable[..., Driver]) -> Path:
    if request.param == "bundled":
        directory: Path = request.getfixturevalue("bundled")
        return directory
    return exported(load_golden(request.param), "ddim_legacy").directory


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_builds_in_float16(name: str, model: Path, builder: Builder, tmp_path: Path) -> None:
    source = read_manifest(model).graphs[name]
    for file in source.files:
        shutil.copy(model / file, tmp_path)
    graph = write_reduced(tmp_path, source, "fp16")
    engine = builder.build(tmp_path, f"{name}.fp16", graph)
    assert (engine.graph, engine.precision, engine.backend) == (name, "fp16", RTX)
    assert (engine.compute_capability, engine.tensorrt_version) == ("any", builder.version)
    assert ("user_allocation" in engine.flags) == (name != "audio_encoder_offline")  # can be captured
    assert engine.sha256 == sha256_of(tmp_path / engine.file)
    assert read_rtx_header(tmp_path / engine.file).version == builder.version
    assert {path.name for path in tmp_path.iterdir()} == {*source.files, *graph.files, engine.file}


@pytest.fixture(scope="session")
def built(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole way through the command line, for two generations of cards."""
    del builder
    out = tmp_path_factory.mktemp("built") / "model"
    arguments = [*SMALL, "--out", str(out), "--history", "4", "--precision", "fp16"]
    assert main([*arguments, "--targets", f"onnx,{RTX}", "--compute-capability", "120,75"]) == 0
    return out


def test_the_command_line_writes_engines_certificate_and_probe(built: Path) -> None:
    manifest = read_manifest(built)
    assert {engine.graph for engine in manifest.engines} == set(GRAPHS)
    for engine in manifest.engines:
        assert (engine.precision, engine.compute_capability) == ("fp16", "75,120")
        assert engine.graph_sha256 == manifest.graphs[f"{engine.graph}.fp16"].sha256
    lines = {line.quantity: line for line in manifest.parity if line.subject == "frame.fp16"}
    for name in ("vertex_error_p99_mm", "vertex_error_max_mm"):
        line = lines[name]
        assert line.frames == 900
        assert line.bound is not None
        assert line.measured <= line.bound
    assert manifest.probe is not None
    check_engines(built, manifest, RTX)
    # The float32 graphs are still what the CPU runs.
    assert Talker.load(built, "onnxruntime-cpu").backend == "onnxruntime-cpu"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def swap(path: Path) -> None:
    shutil.copy(path.with_name(f"audio_encoder.fp16.{RTX}.engine"), path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, "is not the file that was exported"),
        (flip, "is not the file that was exported"),
        (swap, "is not the file that was exported"),
        (lambda path: path.write_bytes(b""), "is not the file that was exported"),
        (Path.unlink, "is missing"),
        (lambda path: path.rename(path.with_suffix(".old")), "is missing"),
    ],
)
def test_damaged_engines_are_refused_without_a_gpu(
    damage: Callable[[Path], Any], sentence: str, built: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(built, tmp_path / "model")
    damage(copy / f"frame.fp16.{RTX}.engine")
    with pytest.raises(BackendError, match=sentence):
        Talker.load(copy, RTX)
    # `auto` says so and goes on to what does not need them.
    choice = Talker.load(copy).choice
    assert sentence in choice.passed_over[RTX]


def test_foreign_files_under_a_matching_hash_are_refused(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "model")
    file = copy / f"frame.fp16.{RTX}.engine"
    whole = file.read_bytes()
    for content, sentence in (
        (b"ftrt" + whole[4:], "is no TensorRT-RTX engine"),
        (whole[:-10], "it was cut off"),
        (whole[:24] + bytes([1, 0, 0, 0]) + whole[28:], r"was built by TensorRT-RTX 1\.0\.0\.0"),
    ):
        file.write_bytes(content)
        manifest = read_manifest(copy)
        listed = tuple(
            msgspec.structs.replace(e, sha256=sha256_of(file)) if e.file == file.name else e
            for e in manifest.engines
        )
        manifest = msgspec.structs.replace(manifest, engines=listed)
        (copy / FILE_NAME).write_bytes(msgspec.json.encode(manifest))
        with pytest.raises(BackendError, match=sentence):
            Talker.load(copy, RTX)


def test_engines_can_be_added_to_an_exported_model(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "model")
    before = read_manifest(copy)
    (copy / FILE_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(before, engines=())))
    assert engines.main([str(copy), "--targets", RTX]) == 0
    after = read_manifest(copy)
    assert {engine.file for engine in after.engines} == {engine.file for engine in before.engines}
    assert {engine.compute_capability for engine in after.engines} == {"any"}
    check_engines(copy, after, RTX)


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


def test_the_parsers_own_words(builder: Builder, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot parse g\.onnx: .*Det"):
        builder.build(tmp_path, "g", broken_graph(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_a_build_that_fails_leaves_no_model(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del builder

    def fails(self: Builder, *_: Any) -> Any:
        self.logger.words.append("no tactic was found")
        return self._made(lambda: None, "cannot build frame.onnx")

    monkeypatch.setattr(Builder, "build", fails)
    assert main([*SMALL, "--out", str(tmp_path / "m"), "--history", "4", "--targets", RTX]) == 2
    assert "tensorrt_rtx" in (error := capsys.readouterr().err)
    assert "cannot build frame.onnx: " in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--targets", RTX, "--compute-capability", "86,42"], "--compute-capability 42"),
        (["--compute-capability", "86"], "add --targets tensorrt_rtx"),
    ],
)
def test_refusals(
    arguments: list[str], sentence: str, builder: Builder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    del builder
    assert main([*SMALL, "--out", str(tmp_path / "m"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(engines, "importlib", SimpleNamespace(import_module=absent))
    for target in FAMILIES:
        with pytest.raises(ExportError, match=f"needs the package {target}: .*pip install"):
            Builder(target)


def test_a_manifest_without_half_graphs_says_so(bundled: Path) -> None:
    with pytest.raises(ExportError, match="export it with --precision fp16 first"):
        engines.add_engines(bundled, [RTX], "fp16")


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "model")


def state(directory: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("problem", "code", "sentence"),
    [
        (ExportError("no room for the third"), 2, "no room for the third"),
        (KeyboardInterrupt(), 130, "interrupted; the engines are those that were there"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_a_build_that_does_not_end_leaves_the_engines_that_were(
    problem: BaseException,
    code: int,
    sentence: str,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, build, builds = state(copy), Builder.build, 0

    def third_fails(*arguments: Any) -> Any:
        nonlocal builds
        builds += 1
        if builds == 3:
            raise problem
        return build(*arguments)

    monkeypatch.setattr(Builder, "build", third_fails)
    assert add([str(copy), "--targets", RTX]) == code
    assert sentence in capsys.readouterr().err
    assert builds == 3
    assert state(copy) == before


def test_engines_that_were_replaced_or_damaged_are_no_longer_listed(copy: Path) -> None:
    manifest = read_manifest(copy)
    gone = msgspec.structs.replace(manifest.engines[0], file="gone.engine", precision="fp32")
    renamed = msgspec.structs.replace(manifest.engines[1], file=f"old.{RTX}.engine")
    shutil.copy(copy / manifest.engines[1].file, copy / renamed.file)
    (copy / ".engines.killed").mkdir()
    engines = (*manifest.engines, gone, renamed)
    (copy / FILE_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, engines=engines)))
    assert add([str(copy), "--targets", f"{RTX},{RTX}"]) == 0
    after = read_manifest(copy)
    assert sorted(e.file for e in after.engines) == sorted(e.file for e in manifest.engines)
    check_engines(copy, after, RTX)
    assert not list(copy.glob(".*"))


@pytest.mark.parametrize("file", ["../other.onnx", "frame.onnx"])
def test_a_graph_without_a_hash_builds_nothing(
    file: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(copy)
    graph = msgspec.structs.replace(manifest.graphs["frame.fp16"], file=file)
    changed = msgspec.structs.replace(manifest, graphs={**manifest.graphs, "frame.fp16": graph})
    (copy / FILE_NAME).write_bytes(msgspec.json.encode(changed))
    before = state(copy)
    assert add([str(copy), "--targets", RTX]) == 2
    assert f"gives no SHA-256 for {file}" in capsys.readouterr().err
    assert state(copy) == before


def test_a_folder_that_cannot_be_followed_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for directory in (tmp_path / "loop", tmp_path / ("x" * 300), tmp_path / "none"):
        assert add([str(directory), "--targets", RTX]) == 2
        error = capsys.readouterr().err
        assert error.startswith("streamtalk_export.engines: ") and "Traceback" not in error


def test_a_damaged_engine_of_another_precision_is_another_matter(copy: Path) -> None:
    manifest = read_manifest(copy)
    others = tuple(
        msgspec.structs.replace(e, file=f"32.{e.file}", precision="fp32") for e in manifest.engines
    )
    both = msgspec.structs.replace(manifest, engines=manifest.engines + others)
    check_engines(copy, both, RTX, "fp16")
    with pytest.raises(BackendError, match="is missing"):
        check_engines(copy, both, RTX, "fp32")
