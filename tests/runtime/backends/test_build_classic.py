"""Builds by classic TensorRT, which cannot be installed without a GPU: a stand-in with the interface of one version."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from streamtalk import BackendError, ModelError, UsageError
from streamtalk.backends import build
from streamtalk.backends.build import Builder
from streamtalk.model import Graph, Tensor, sha256_of
from tests.tensorrt_api import CLASSIC, Api

PCM = Tensor("pcm", "float32", (1, 3200))
POSITION = Tensor("position", "int64", (1,))
VERTICES = Tensor("vertices", "float32", (1, 4, 6, 3))
GRAPH = Graph(
    file="hop.fp16.onnx",
    files={"hop.fp16.onnx": "0" * 64},
    precision="fp16",
    inputs=(PCM, POSITION),
    outputs=(VERTICES,),
)
PLAN = b"a plan of classic TensorRT"


class Kind(Enum):
    FLOAT = 0
    INT64 = 1
    BOOL = 2
    HALF = 3


def node(tensor: Tensor, kind: Kind) -> Any:
    return SimpleNamespace(name=tensor.name, dtype=kind, shape=tensor.shape)


class Library(ModuleType):
    """A version's interface as far as a build uses it. `calls` records its settings."""

    def __init__(self, key: str = "tensorrt 10.3.0", plan: bytes | None = PLAN, errors: int = 0) -> None:
        api = Api(key)
        super().__init__(api.name)
        library = self
        self.__version__ = api.version
        self.calls: list[Any] = []
        self.measured: list[bytes] = []
        self.broken = False
        self.inputs = [node(PCM, Kind.FLOAT), node(POSITION, Kind.INT64)]
        self.outputs = [node(VERTICES, Kind.FLOAT)]
        self.DataType = Kind
        assert hasattr(api.enumeration("NetworkDefinitionCreationFlag"), "STRONGLY_TYPED")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.BuilderFlag = api.enumeration("BuilderFlag")

        class Logger:
            Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING")

        class Timings:
            def __init__(self, content: bytes) -> None:
                self.content = content

            def serialize(self) -> bytes:
                return self.content + b"+"

        class Config:
            timings: Timings

            def create_timing_cache(self, content: bytes) -> Timings:
                library.measured.append(content)
                if library.broken:
                    raise RuntimeError("no timings today")
                return Timings(content)

            def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
                assert not ignore_mismatch
                self.timings = cache
                return not cache.content.startswith(b"foreign")

            def get_timing_cache(self) -> Timings:
                return self.timings

            def clear_flag(self, flag: int) -> None:
                library.calls.append(("clear", flag))

            def __setattr__(self, name: str, value: Any) -> None:
                if name != "timings":
                    library.calls.append((name, value))
                super().__setattr__(name, value)

        class Parser:
            num_errors = errors

            def __init__(self, *_: Any) -> None:
                pass

            def parse_from_file(self, path: str) -> bool:
                assert Path(path).is_file()
                return not errors

            def get_error(self, i: int) -> str:
                return f"node {i}: no importer for operator Det."

        class TheBuilder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def create_network(self, flags: int) -> Any:
                library.calls.append(("network", flags))
                return SimpleNamespace(
                    num_inputs=len(library.inputs),
                    num_outputs=len(library.outputs),
                    get_input=library.inputs.__getitem__,
                    get_output=library.outputs.__getitem__,
                )

            def create_builder_config(self) -> Config:
                return Config()

            def build_serialized_network(self, *_: Any) -> bytes | None:
                if plan is None:
                    self.logger.log(Logger.Severity.ERROR, "Could not find any implementation for node 7.")
                return plan

        self.ILogger = Logger
        self.OnnxParser = lambda network, logger: api.speak("OnnxParser", Parser(network, logger))
        self.Builder = lambda logger: api.speak("Builder", TheBuilder(logger))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / GRAPH.file).write_bytes(b"a graph")
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    device = SimpleNamespace(compute_capability=87, description="Orin")
    monkeypatch.setattr(build, "open_driver", lambda: device)

    def install(library: Library) -> Builder:
        monkeypatch.setitem(sys.modules, "tensorrt", library)
        return Builder("tensorrt")

    return install


@pytest.mark.parametrize("key", CLASSIC)
def test_an_engine_for_this_device(key: str, use: Any, tmp_path: Path) -> None:
    library = Library(key)
    engine = use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    assert (engine.graph, engine.file) == ("hop", "hop.fp16.tensorrt.engine")
    assert (engine.compute_capability, engine.tensorrt_version) == ("87", key.split()[1])
    assert (tmp_path / engine.file).read_bytes() == PLAN
    assert engine.sha256 == sha256_of(tmp_path / engine.file)
    assert library.calls == [
        ("network", 2),
        ("clear", library.BuilderFlag.TF32),
        ("max_aux_streams", 0),
    ]
    assert engine.flags == ("no_tf32", "strongly_typed")


@pytest.mark.parametrize("key", CLASSIC)
@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (
            {"errors": 2},
            "cannot parse hop.fp16.onnx: node 0: no importer for operator Det. node 1: no importer",
        ),
        ({"plan": None}, "cannot build hop.fp16.onnx: Could not find any implementation for node 7."),
    ],
)
def test_the_librarys_own_message(
    key: str, problem: dict[str, Any], sentence: str, use: Any, tmp_path: Path
) -> None:
    with pytest.raises(BackendError) as caught:
        use(Library(key, **problem)).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    assert sentence in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [GRAPH.file]


def test_a_network_that_is_not_the_graph_is_refused(use: Any, tmp_path: Path) -> None:
    library = Library()
    library.outputs[0].dtype = Kind.HALF
    with pytest.raises(ModelError, match=r"read the outputs of hop\.fp16\.onnx as .*HALF.*the manifest says"):
        use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)


def test_without_a_gpu(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise BackendError("This machine has no NVIDIA GPU that CUDA can see.")

    monkeypatch.setattr(build, "open_driver", none)
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        use(Library()).build(tmp_path, "hop.fp16", GRAPH, tmp_path)


def test_it_builds_for_the_gpu_at_hand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", Library())
    with pytest.raises(UsageError, match="is for tensorrt_rtx"):
        Builder("tensorrt", (86,))


@pytest.mark.parametrize("key", CLASSIC)
def test_what_was_measured_is_kept(key: str, use: Any, tmp_path: Path) -> None:
    library = Library(key)
    for _ in range(2):
        use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    assert library.measured == [b"", b"+"]
    (file,) = (tmp_path / "cache" / "timings").iterdir()
    assert file.read_bytes() == b"++"
    library.__version__ = "12.0.0"
    use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    assert library.measured == [b"", b"+", b""]


def test_what_another_gpu_measured_is_not_used(use: Any, tmp_path: Path) -> None:
    library = Library()
    use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    (file,) = (tmp_path / "cache" / "timings").iterdir()
    file.write_bytes(b"foreign")
    library.measured.clear()
    use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    assert library.measured == [b"foreign", b""]
    assert file.read_bytes() == b"+"


def test_timings_that_cannot_be_kept_cost_nothing_else(use: Any, tmp_path: Path) -> None:
    library = Library()
    (tmp_path / "cache").touch()
    use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    library.broken = True
    engine = use(library).build(tmp_path, "hop.fp16", GRAPH, tmp_path)
    assert (tmp_path / engine.file).read_bytes() == PLAN
