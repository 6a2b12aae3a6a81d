"""The probe: what a device must reproduce before its engines are used, and what is remembered of it."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streamtalk import BackendError, ModelError, Talker
from streamtalk.backends import disk_cache
from streamtalk.backends.cuda import onnxruntime as gpu_onnxruntime
from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.onnxruntime import CpuBackend
from streamtalk.backends.probe import measure, read_probe, require_probe
from streamtalk.model import FILE_NAME, Asset, Manifest, Precision, graph_key, read_manifest, sha256_of
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.runtime.backends.cuda.libraries import StubEngine, load_gpu
from tests.runtime.backends.probes import FRAMES, add_probe
from tests.runtime.toy import Toy
from tests.tensorrt_api import plain

HOPS = -(-FRAMES // Toy().hop)


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "probes"


@pytest.fixture
def model(engine: Path, toy: Toy, tmp_path: Path) -> Path:
    directory = shutil.copytree(engine, tmp_path / "model")
    add_probe(directory, toy)
    return directory


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def gpu(model: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    return load_gpu(cuda, model, monkeypatch)


def launches(cuda: FakeCuda) -> int:
    count = cuda.count_calls("cudaGraphLaunch")["cudaGraphLaunch"]
    cuda.calls.clear()
    return count


def test_what_passes_is_remembered(gpu: CudaBackend, cuda: FakeCuda, model: Path, memory: Path) -> None:
    require_probe(gpu, model, gpu.manifest)
    assert launches(cuda) == HOPS
    require_probe(gpu, model, gpu.manifest)
    assert launches(cuda) == 0
    (result,) = memory.glob("*.json")
    assert json.loads(result.read_bytes())["fingerprint"] == gpu.fingerprint
    assert cuda.nothing_left()


def test_another_library_driver_or_device_is_another_question(
    gpu: CudaBackend, cuda: FakeCuda, model: Path
) -> None:
    require_probe(gpu, model, gpu.manifest)
    launches(cuda)
    require_probe(replace(gpu, fingerprint="another driver"), model, gpu.manifest)
    assert launches(cuda) == HOPS


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_memory_is_measured_again(
    content: bytes, gpu: CudaBackend, cuda: FakeCuda, model: Path, memory: Path
) -> None:
    require_probe(gpu, model, gpu.manifest)
    launches(cuda)
    (result,) = memory.glob("*.json")
    result.write_bytes(content)
    require_probe(gpu, model, gpu.manifest)
    assert launches(cuda) == HOPS


@pytest.mark.parametrize("shift", [1e-5, np.nan])
def test_what_misses_is_refused_every_time(
    shift: float, gpu: CudaBackend, model: Path, toy: Toy, memory: Path
) -> None:
    manifest = add_probe(model, toy, shift)
    for _ in range(2):
        with pytest.raises(
            BackendError, match=r"tensorrt 10\.3\.0.* does not reproduce the model: vertex error p99"
        ):
            require_probe(gpu, model, manifest)
    assert not list(memory.glob("*.json"))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_measure_is_the_largest_distance(rows: int, tmp_path: Path) -> None:
    toy = Toy(rows=(1, 3))
    model = toy.write(tmp_path / "model")
    manifest = add_probe(model, toy, 0.25)
    probe = read_probe(model, manifest)
    assert probe is not None
    p99, largest = measure(CpuBackend(model, manifest, 1), manifest, probe, rows)
    assert p99 == pytest.approx(0.25 * 3**0.5, rel=1e-5)
    assert largest == pytest.approx(0.25 * 3**0.5, rel=1e-5)


def test_a_missing_or_damaged_probe(gpu: CudaBackend, model: Path) -> None:
    without = msgspec.structs.replace(gpu.manifest, probe=None)
    with pytest.raises(BackendError, match="has no probe"):
        require_probe(gpu, model, without)
    file = model / "probe.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="is not the file that was exported"):
        require_probe(gpu, model, gpu.manifest)
    file.write_bytes(b"PK")
    asset = Asset(file="probe.npz", sha256=sha256_of(file))
    with pytest.raises(ModelError, match="is not a probe of this version"):
        require_probe(gpu, model, msgspec.structs.replace(gpu.manifest, probe=asset))


def test_a_memory_that_cannot_be_written_costs_a_probe_at_every_start(
    gpu: CudaBackend, cuda: FakeCuda, model: Path, memory: Path
) -> None:
    memory.parent.parent.mkdir(exist_ok=True)
    memory.parent.touch()
    for _ in range(2):
        require_probe(gpu, model, gpu.manifest)
        assert launches(cuda) == HOPS


def test_a_memory_that_cannot_be_locked_costs_a_probe(
    gpu: CudaBackend, cuda: FakeCuda, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr(disk_cache, "_lock", fails)
    require_probe(gpu, model, gpu.manifest)
    assert launches(cuda) == HOPS


def test_auto_falls_to_the_next_backend(model: Path, toy: Toy, gpu: CudaBackend) -> None:
    assert Talker.load(model).backend == gpu.name == "tensorrt"
    add_probe(model, toy, 1e-4)
    choice = Talker.load(model).choice
    assert choice.backend.name == "onnxruntime-cpu"
    assert "does not reproduce the model" in choice.passed_over["tensorrt fp32"]
    with pytest.raises(BackendError, match="does not reproduce the model"):
        Talker.load(model, "tensorrt")


def test_a_precision_that_is_computed_wrong_is_passed_over_and_let_go(
    model: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = read_manifest(model)
    half = {graph_key("hop", "fp16"): msgspec.structs.replace(m.graphs["hop"], precision="fp16")}
    (model / FILE_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(m, graphs=m.graphs | half)))
    made: list[weakref.ref[CudaBackend]] = []

    def card(directory: Path, _: Manifest, precision: Precision, __: int) -> CudaBackend:
        assert not any(backend() for backend in made)
        backend = load_gpu(cuda, directory, monkeypatch)
        if precision == "fp16":
            stub(backend).wrong = 0.01
        backend = replace(backend, fingerprint=precision, precision=precision)
        made.append(weakref.ref(backend))
        return backend

    monkeypatch.setattr(gpu_onnxruntime, "load", card)
    gc.disable()  # it goes with its error, not some time later
    try:
        choice = Talker.load(model, "onnxruntime-cuda").choice
    finally:
        gc.enable()
    assert choice.backend.fingerprint == "fp32"
    assert "does not reproduce the model" in choice.passed_over["onnxruntime-cuda fp16"]


def stub(backend: CudaBackend) -> StubEngine:
    engine: Any = backend.engines[1]
    found: StubEngine = plain(engine.engine)
    return found
