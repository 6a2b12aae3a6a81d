"""The builder's path for classic TensorRT, which cannot be installed without a GPU: a library that stands in, and that
speaks as one of its versions.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from streamtalk import BackendError
from streamtalk.manifest import Graph, Tensor, sha256_of
from streamtalk_export import engines
from streamtalk_export.engines import Builder
from streamtalk_export.errors import ExportError
from tests.tensorrt_api import CLASSIC, Api

PCM = Tensor("pcm", "float32", (1, "samples"))
POSITION = Tensor("position", "int64", (1,))
FEATURES = Tensor("audio_features", "float32", (1, 4, 6))
GRAPH = Graph(
    file="g.onnx", files={"g.onnx": "0" * 64}, precision="fp16", inputs=(PCM, POSITION), outputs=(FEATURES,)
)
PLAN = b"a plan of classic TensorRT"


class Kind(Enum):
    FLOAT = 0
    INT64 = 1
    BOOL = 2
    HALF = 3


def node(tensor: Tensor, kind: Kind) -> Any:
    shape = tuple(-1 if isinstance(n, str) else n for n in tensor.shape)
    return SimpleNamespace(name=tensor.name, dtype=kind, shape=shape)


class Library(ModuleType):
    """A version's interface as far as a build uses it, recording what it is told."""

    def __init__(
        self, key: str = "tensorrt 10.3.0", plan: bytes | None = PLAN, errors: int = 0, typed: bool = True
    ) -> None:
        api = Api(key)
        super().__init__(api.name)
        library = self
        self.__version__ = api.version
        self.told: list[Any] = []
        self.measured: list[bytes] = []
        self.broken = False
        self.inputs = [node(PCM, Kind.FLOAT), node(POSITION, Kind.INT64)]
        self.outputs = [node(FEATURES, Kind.FLOAT)]
        self.DataType = Kind
        self.NetworkDefinitionCreationFlag = SimpleNamespace()
        if typed:
            assert hasattr(api.enumeration("NetworkDefinitionCreationFlag"), "STRONGLY_TYPED")
            self.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
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
                library.told.append(("clear", flag))

            def add_optimization_profile(self, profile: Any) -> None:
                library.told.append(("profile", profile.shapes))

        class Profile:
            def __init__(self) -> None:
                self.shapes: dict[str, Any] = {}

            def set_shape(self, name: str, *shapes: Any) -> None:
                self.shapes[name] = shapes

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
                library.told.append(("network", flags))
                return SimpleNamespace(
                    num_inputs=len(library.inputs),
                    num_outputs=len(library.outputs),
                    get_input=library.inputs.__getitem__,
                    get_output=library.outputs.__getitem__,
                )

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, *_: Any) -> bytes | None:
                if plan is None:
                    self.logger.log(Logger.Severity.ERROR, "Could not find any implementation for node 7.")
                return plan

        self.ILogger = Logger
        self.OnnxParser = lambda network, logger: api.speak("OnnxParser", Parser(network, logger))
        self.Builder = lambda logger: api.speak("Builder", TheBuilder(logger))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / "g.onnx").write_bytes(b"a graph")
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    device = SimpleNamespace(compute_capability=87, description="Orin")
    monkeypatch.setattr(engines, "open_driver", lambda: device)

    def install(library: Library) -> Builder:
        monkeypatch.setitem(sys.modules, "tensorrt", library)
        return Builder("tensorrt")

    return install


@pytest.mark.parametrize("key", CLASSIC)
def test_an_engine_for_this_device(key: str, use: Any, tmp_path: Path) -> None:
    library = Library(key)
    engine = use(library).build(tmp_path, "g.fp16", GRAPH)
    assert (engine.graph, engine.file) == ("g", "g.tensorrt.engine")
    assert (engine.compute_capability, engine.tensorrt_version) == ("87", key.split()[1])
    assert (tmp_path / engine.file).read_bytes() == PLAN
    assert engine.sha256 == sha256_of(tmp_path / engine.file)
    assert library.told == [
        ("network", 2),
        ("clear", library.BuilderFlag.TF32),
        ("profile", {"pcm": ((1, 3200), (1, 32000), (1, 960000))}),
    ]


def test_a_version_that_knows_no_other_typing(use: Any, tmp_path: Path) -> None:
    library = Library(typed=False)
    use(library).build(tmp_path, "g.fp16", GRAPH)
    assert library.told[0] == ("network", 0)


@pytest.mark.parametrize("key", CLASSIC)
@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        ({"errors": 2}, "cannot parse g.onnx: node 0: no importer for operator Det. node 1: no importer"),
        ({"plan": None}, "cannot build g.onnx: Could not find any implementation for node 7."),
    ],
)
def test_the_librarys_own_words(
    key: str, problem: dict[str, Any], sentence: str, use: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        use(Library(key, **problem)).build(tmp_path, "g.fp16", GRAPH)
    assert sentence in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.onnx"]


def test_a_network_that_is_not_the_graph_is_refused(use: Any, tmp_path: Path) -> None:
    library = Library()
    library.outputs[0].dtype = Kind.HALF
    with pytest.raises(ExportError, match=r"read the outputs of g\.onnx as .*HALF.*the manifest says"):
        use(library).build(tmp_path, "g.fp16", GRAPH)


def test_without_a_gpu(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise BackendError("This machine has no NVIDIA GPU that CUDA can see.")

    monkeypatch.setattr(engines, "open_driver", none)
    with pytest.raises(ExportError, match="no NVIDIA GPU"):
        use(Library()).build(tmp_path, "g.fp16", GRAPH)


def test_it_builds_for_the_gpu_at_hand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", Library())
    with pytest.raises(ExportError, match="is for tensorrt_rtx"):
        Builder("tensorrt", (86,))


@pytest.mark.parametrize("key", CLASSIC)
def test_what_was_measured_is_kept(key: str, use: Any, tmp_path: Path) -> None:
    library = Library(key)
    for _ in range(2):
        use(library).build(tmp_path, "g.fp16", GRAPH)
    assert library.measured == [b"", b"+"]
    (file,) = (tmp_path / "cache" / "timings").iterdir()
    assert file.read_bytes() == b"++"
    library.__version__ = "12.0.0"
    use(library).build(tmp_path, "g.fp16", GRAPH)
    assert library.measured == [b"", b"+", b""]


def test_what_another_gpu_measured_is_not_used(use: Any, tmp_path: Path) -> None:
    library = Library()
    use(library).build(tmp_path, "g.fp16", GRAPH)
    (file,) = (tmp_path / "cache" / "timings").iterdir()
    file.write_bytes(b"foreign")
    library.measured.clear()
    use(library).build(tmp_path, "g.fp16", GRAPH)
    assert library.measured == [b"foreign", b""]
    assert file.read_bytes() == b"+"


def test_timings_that_cannot_be_kept_cost_nothing_else(use: Any, tmp_path: Path) -> None:
    library = Library()
    (tmp_path / "cache").touch()
    use(library).build(tmp_path, "g.fp16", GRAPH)
    library.broken = True
    engine = use(library).build(tmp_path, "g.fp16", GRAPH)
    assert (tmp_path / engine.file).read_bytes() == PLAN
