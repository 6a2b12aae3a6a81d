"""On a GPU: every backend against the CPU, batches, interoperation, launches. Skipped elsewhere, with the reason.

pytest -m gpu -rs
STREAMTALK_GPU_MODEL=DIR pytest -m gpu -rs      the same with a model, and engines, that another machine exported
                                                (`export.py --batch 3 --precision fp16 --targets onnx,tensorrt_rtx`)
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk import BackendError, MissingDependencyError, Talker
from streamtalk.backends.cuda import driver as cuda
from streamtalk.backends.probe import Limits, read_probe
from streamtalk.model import read_manifest
from tests.runtime.drive import same
from tests.runtime.test_batch import Part, alone, by_itself, play

pytest.importorskip("torch", reason="the models of these tests are exported here")

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).parents[1] / "data" / "vocaset_small"
ROWS = 3
BACKENDS = ("tensorrt", "tensorrt_rtx", "onnxruntime-cuda")
ENGINES = ("tensorrt", "tensorrt_rtx")
CAST = (
    Part("0", 1, 32000, 640),
    Part("1", 2, 9000, 3000),
    Part("2", 3, 20001, 999),
    Part("0", 4, 12000, 160),
)
DATA_CENTRE = (80, 90, 100, 103)
"""Compute capabilities that TensorRT-RTX may refuse: a fact to record rather than a fault."""


@pytest.fixture(scope="module", autouse=True)
def capability() -> int:
    """The GPU's; skips without one."""
    try:
        return cuda.open_driver().compute_capability
    except (BackendError, MissingDependencyError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model of one and three rows, with the engines of every TensorRT that is installed."""
    root = tmp_path_factory.mktemp("gpu")
    if given := os.environ.get("STREAMTALK_GPU_MODEL"):
        shutil.copytree(given, root / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STREAMTALK_CACHE", str(root / "cache"))
            yield root / "model"
        return
    from streamtalk_export.cli import main

    targets = ",".join(["onnx", *(name for name in ENGINES if find_spec(name))])
    arguments = ["--checkpoint", str(FOLDER / "checkpoint.ckpt"), "--config", str(FOLDER / "config.yaml")]
    arguments += ["--hubert-config", str(FOLDER / "hubert_config.json"), "--out", str(root / "model")]
    arguments += ["--history", "8", "--decode-window", "6", "--hop", "3", "--batch", str(ROWS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMTALK_CACHE", str(root / "cache"))
        assert main([*arguments, "--precision", "fp16", "--targets", targets]) == 0
        yield root / "model"


@pytest.fixture(scope="module")
def cpu(model: Path) -> Talker:
    return Talker.load(model, "onnxruntime-cpu", threads=2)


@pytest.fixture(scope="module", params=BACKENDS)
def name(request: pytest.FixtureRequest, model: Path, capability: int) -> str:
    """A backend that loads here, with the graphs or engines that it prefers; it has passed the probe."""
    backend: str = request.param
    if backend in ENGINES:
        pytest.importorskip(backend)
        if not any(engine.backend == backend for engine in read_manifest(model).engines):
            pytest.skip(f"the model that was given has no engines of {backend}")
    try:
        choice = Talker.load(model, backend).choice
    except MissingDependencyError as error:
        pytest.skip(str(error))
    except BackendError as error:
        if backend == "tensorrt_rtx" and capability in DATA_CENTRE:
            pytest.skip(str(error))
        raise
    assert not choice.passed_over
    return backend


@pytest.fixture
def gpu(model: Path, name: str) -> Any:
    return Talker.load(model, name)


@pytest.fixture
def cast(cpu: Talker) -> tuple[Part, ...]:
    return tuple(Part(cpu.speakers[int(p.speaker)], p.seed, p.n, p.chunk) for p in CAST)


@pytest.fixture
def limits(model: Path, cpu: Talker, gpu: Any) -> Limits:
    """What the certificate allows at this precision."""
    probe = read_probe(model, cpu.manifest)
    assert probe is not None
    return probe.limits[gpu.choice.backend.precision]


def test_a_stream_is_the_cpus(gpu: Any, cpu: Talker, cast: tuple[Part, ...], limits: Limits) -> None:
    for part in cast:
        error = np.linalg.norm(by_itself(gpu, part) - by_itself(cpu, part), axis=-1)
        assert np.quantile(error, 0.99) <= limits.p99
        assert error.max() <= limits.max


def test_the_first_hop_is_timed(gpu: Any) -> None:
    assert gpu.choice.first_hop_s > 0


@pytest.mark.parametrize(("size", "ticks"), [(ROWS, False), (2 * ROWS, True)])
def test_rows_give_what_they_give_alone(
    size: int, ticks: bool, gpu: Any, cpu: Talker, cast: tuple[Part, ...], limits: Limits
) -> None:
    for part, got in zip(cast, play(gpu, cast, seed=1, size=size, ticks=ticks), strict=True):
        np.testing.assert_array_equal(got, alone(gpu, part))
        error = np.linalg.norm(got - by_itself(cpu, part), axis=-1)
        assert np.quantile(error, 0.99) <= limits.p99
        assert error.max() <= limits.max


def test_every_row_gives_the_same_frames(gpu: Any, cast: tuple[Part, ...]) -> None:
    for row in range(1, ROWS):
        np.testing.assert_array_equal(alone(gpu, cast[1], row), alone(gpu, cast[1]))


def test_a_stream_goes_on_where_it_was(gpu: Any, cast: tuple[Part, ...]) -> None:
    part = cast[0]
    expected = by_itself(gpu, part)
    with gpu.open(part.speaker, seed=part.seed) as one, gpu.open(part.speaker, seed=part.seed) as other:
        for _ in zip(range(10), one.push(part.pcm), strict=False):  # in the middle of a hop
            pass
        other.push(part.pcm[:20000])
        snapshot = one.state()
        other.restore(snapshot)
        assert same(other.state(), snapshot)
        rest = [frame.vertices.copy() for frame in other.flush()]
    np.testing.assert_array_equal(np.array(rest), expected[10:])


def test_a_reset_is_a_new_stream(gpu: Any, cast: tuple[Part, ...]) -> None:
    part = cast[2]
    expected = by_itself(gpu, part)
    with gpu.open(part.speaker, seed=part.seed) as stream:
        for _ in zip(range(7), stream.push(part.pcm), strict=False):
            pass
        stream.reset()
        got = [frame.vertices.copy() for frame in stream.push(part.pcm)]
        got += [frame.vertices.copy() for frame in stream.flush()]
    np.testing.assert_array_equal(np.array(got), expected)


def test_streams_in_threads_of_their_own(gpu: Any, cast: tuple[Part, ...]) -> None:
    expected = [by_itself(gpu, part) for part in cast]
    got: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, part=part: got.update({i: by_itself(gpu, part)}))
        for i, part in enumerate(cast)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, frames in enumerate(expected):
        np.testing.assert_array_equal(got[i], frames)


def test_a_hop_is_one_launch(gpu: Any, cast: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    launch = cuda.Driver.launch

    def counted(self: Any, graph: Any, stream: Any) -> None:
        launched.append(graph)
        launch(self, graph, stream)

    monkeypatch.setattr(cuda.Driver, "launch", counted)
    hops = -(-len(by_itself(gpu, cast[0])) // gpu.manifest.hop)
    engine = gpu.choice.backend.engine(1)
    # onnxruntime replays graphs that it captured itself.
    assert len(launched) == (hops if engine.capturable else 0)
    assert engine.capturable == (gpu.backend != "onnxruntime-cuda")


def as_torch(vertices: Any) -> Any:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    by_dlpack = torch.from_dlpack(vertices)
    by_interface = torch.as_tensor(vertices, device="cuda")
    assert by_dlpack.data_ptr() == by_interface.data_ptr() == vertices.address
    return by_dlpack.cpu().numpy()


def as_cupy(vertices: Any) -> Any:
    cupy = pytest.importorskip("cupy")
    by_dlpack, by_interface = cupy.from_dlpack(vertices), cupy.asarray(vertices)
    assert by_dlpack.data.ptr == by_interface.data.ptr == vertices.address
    return by_interface.get()


def as_pycuda(vertices: Any) -> Any:
    pytest.importorskip("pycuda")
    importlib.import_module("pycuda.autoprimaryctx")
    array = importlib.import_module("pycuda.gpuarray").GPUArray
    vertices.wait()
    return array(vertices.shape, vertices.dtype, gpudata=vertices.address).get()


@pytest.mark.parametrize("take", [as_torch, as_cupy, as_pycuda])
def test_vertices_that_stay_on_the_device(
    take: Any, model: Path, name: str, gpu: Any, cast: tuple[Part, ...]
) -> None:
    part = cast[1]
    resident = Talker.load(model, name, download=False)
    expected = by_itself(gpu, part)
    with resident.open(part.speaker, seed=part.seed) as stream:
        stream.push(part.pcm)
        index = 0
        for _ in stream.flush():
            np.testing.assert_array_equal(take(stream.device_vertices), expected[index])
            index += 1
    assert index == len(expected)


def in_this_context(model: Path, name: str, part: Part) -> list[Any]:
    """Frames from this thread and from another; nothing of the backend is left."""
    talker: Any = Talker.load(model, name)
    assert not talker.choice.backend.driver.primary
    frames = [by_itself(talker, part)]
    thread = threading.Thread(target=lambda: frames.append(by_itself(talker, part)))
    thread.start()
    thread.join()
    return frames


def test_a_context_of_ones_own(model: Path, name: str, gpu: Any, cast: tuple[Part, ...]) -> None:
    """What PyCUDA's `autoinit` makes: a context that is not the primary one, current to one thread."""
    api = importlib.import_module("cuda.bindings.driver")
    expected = by_itself(gpu, cast[1])
    _, device = api.cuDeviceGet(0)
    try:
        error, context = api.cuCtxCreate(0, device)
    except TypeError:  # since cuda-bindings 13 with parameters before the flags
        error, context = api.cuCtxCreate(None, 0, device)
    assert int(error) == 0
    try:
        if name == "onnxruntime-cuda":
            with pytest.raises(BackendError, match="primary context"):
                Talker.load(model, name)
        else:
            for frames in in_this_context(model, name, cast[1]):
                np.testing.assert_array_equal(frames, expected)
        assert int(api.cuCtxGetCurrent()[1]) == int(context)
    finally:
        gc.collect()
        api.cuCtxDestroy(context)


def test_what_rtx_compiled_is_kept(gpu: Any, model: Path) -> None:
    if gpu.backend != "tensorrt_rtx":
        pytest.skip("TensorRT-RTX alone compiles at its first run")
    assert list((model.parent / "cache" / "compiled").iterdir())
