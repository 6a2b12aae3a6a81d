"""The probe: what a device must reproduce before its engines are used, and what is remembered of it."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streamtalk import BackendError, ModelError, Talker, backends, cache
from streamtalk.backends.onnxruntime import OnnxRuntimeCpu
from streamtalk.model import FILE_NAME, Asset, Manifest, Precision, graph_key, read_manifest, sha256_of
from streamtalk.backends.probe import Limits, ProbeData, measure, read_probe, trust
from tests.runtime.backends.cuda.fake import fake_gpu
from tests.runtime.toy import Toy

FRAMES = 12
PEAK = Limits(p99=1e-6, max=1e-6)


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "probes"


def add_probe(directory: Path, toy: Toy, shift: float = 0.0) -> Manifest:
    """Give a toy model a probe of its own frames, moved by `shift`."""
    m, rng, identity = read_manifest(directory), np.random.default_rng(3), toy.identity
    probe = ProbeData(
        pcm=rng.standard_normal((-(-FRAMES // m.hop), m.window_samples)).astype(np.float32),
        noise=rng.standard_normal((FRAMES, m.latent_width)).astype(np.float32),
        style=identity["styles"][0],
        start_latent=identity["start_latent"],
        template=identity["templates"][0],
        frames=np.array([0, 5, FRAMES - 1]),
        vertices=np.array([0, 3]),
        expected=np.zeros((3, 2, 3), np.float32),
        limits={"fp16": PEAK, "fp32": PEAK},
    )
    lane = OnnxRuntimeCpu(directory, m, 1).lane(probe.style, probe.template, probe.start_latent)
    for index in range(FRAMES):
        if index % m.hop == 0:
            lane.pcm[:] = probe.pcm[index // m.hop]
            lane.encode()
        lane.noise[:] = probe.noise[index]
        lane.frame(index)
        if index in probe.frames:
            place = probe.frames.tolist().index(index)
            probe.expected[place] = lane.vertices()[probe.vertices] + shift
    probe.save(directory / "probe.npz")
    asset = Asset(file="probe.npz", sha256=sha256_of(directory / "probe.npz"))
    m = msgspec.structs.replace(m, probe=asset)
    (directory / FILE_NAME).write_bytes(msgspec.json.encode(m))
    return m


@pytest.fixture
def model(engine: Path, toy: Toy, tmp_path: Path) -> Path:
    directory = shutil.copytree(engine, tmp_path / "model")
    add_probe(directory, toy)
    return directory


@pytest.fixture
def gpu(model: Path) -> Iterator[Any]:
    yield fake_gpu(model, read_manifest(model))


def launches(gpu: Any) -> int:
    count: int = gpu.driver.calls.count("launch")
    gpu.driver.calls.clear()
    return count


def test_what_passes_is_remembered(gpu: Any, model: Path, memory: Path) -> None:
    trust(gpu, model, gpu.manifest)
    assert launches(gpu) >= FRAMES
    trust(gpu, model, gpu.manifest)
    assert launches(gpu) == 0
    (result,) = memory.glob("*.json")
    assert json.loads(result.read_bytes())["fingerprint"] == "fake 1"
    assert gpu.driver.memory == {}


def test_another_library_driver_or_device_is_another_question(gpu: Any, model: Path) -> None:
    trust(gpu, model, gpu.manifest)
    launches(gpu)
    trust(replace(gpu, fingerprint="fake 2"), model, gpu.manifest)
    assert launches(gpu) >= FRAMES


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_memory_is_measured_again(content: bytes, gpu: Any, model: Path, memory: Path) -> None:
    trust(gpu, model, gpu.manifest)
    launches(gpu)
    (result,) = memory.glob("*.json")
    result.write_bytes(content)
    trust(gpu, model, gpu.manifest)
    assert launches(gpu) >= FRAMES


@pytest.mark.parametrize("shift", [1e-5, np.nan])
def test_what_misses_is_refused_every_time(shift: float, model: Path, toy: Toy, memory: Path) -> None:
    gpu = fake_gpu(model, add_probe(model, toy, shift))
    for _ in range(2):
        with pytest.raises(BackendError, match=r"a fake GPU does not reproduce the model: vertex error p99"):
            trust(gpu, model, gpu.manifest)
    assert not list(memory.glob("*.json"))


def test_the_measure_is_the_largest_distance(model: Path, toy: Toy) -> None:
    manifest = add_probe(model, toy, 0.25)
    probe = read_probe(model, manifest)
    assert probe is not None
    p99, largest = measure(fake_gpu(model, manifest), manifest, probe)
    assert p99 == pytest.approx(0.25 * 3**0.5, rel=1e-5)
    assert largest == pytest.approx(0.25 * 3**0.5, rel=1e-5)


def test_a_missing_or_damaged_probe(gpu: Any, model: Path) -> None:
    without = msgspec.structs.replace(gpu.manifest, probe=None)
    with pytest.raises(BackendError, match="has no probe"):
        trust(gpu, model, without)
    file = model / "probe.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="is not the file that was exported"):
        trust(gpu, model, gpu.manifest)
    file.write_bytes(b"PK")
    asset = Asset(file="probe.npz", sha256=sha256_of(file))
    with pytest.raises(ModelError, match="is not a probe of this version"):
        trust(gpu, model, msgspec.structs.replace(gpu.manifest, probe=asset))


def test_a_memory_that_cannot_be_written_costs_a_probe_at_every_start(
    gpu: Any, model: Path, memory: Path
) -> None:
    memory.parent.parent.mkdir(exist_ok=True)
    memory.parent.touch()
    for _ in range(2):
        trust(gpu, model, gpu.manifest)
        assert launches(gpu) >= FRAMES


def test_a_memory_that_cannot_be_locked_costs_a_probe(
    gpu: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr(cache, "_lock", fails)
    trust(gpu, model, gpu.manifest)
    assert launches(gpu) >= FRAMES


def test_auto_falls_to_the_next_backend(model: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(directory: Path, manifest: Manifest, *_: Any) -> Any:
        return fake_gpu(directory, manifest)

    cpu = {"onnxruntime-cpu": backends.LOADERS["onnxruntime-cpu"]}
    monkeypatch.setattr(backends, "LOADERS", {"fake": fake, **cpu})
    assert Talker.load(model).backend == "fake"
    add_probe(model, toy, 1e-4)
    choice = Talker.load(model).choice
    assert choice.backend.name == "onnxruntime-cpu"
    assert "does not reproduce the model" in choice.passed_over["fake"]
    with pytest.raises(BackendError, match="does not reproduce the model"):
        Talker.load(model, "fake")


def test_a_precision_that_is_computed_wrong_is_passed_over_and_let_go(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = read_manifest(model)
    in_own = {
        graph_key(name, "fused"): msgspec.structs.replace(g, precision="fused")
        for name, g in m.graphs.items()
    }
    (model / FILE_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(m, graphs=m.graphs | in_own)))
    other = Toy(seed=1).write(tmp_path / "other")
    made: list[weakref.ref[Any]] = []

    def card(directory: Path, _: Manifest, __: Any, form: Precision) -> Any:
        assert not any(backend() for backend in made)
        source = other if form == "fused" else directory
        backend = replace(fake_gpu(source, read_manifest(source)), fingerprint=form)
        made.append(weakref.ref(backend))
        return backend

    monkeypatch.setattr(backends, "LOADERS", {"onnxruntime-cuda": card})
    gc.disable()  # it goes with its error, not some time later
    try:
        choice = Talker.load(model).choice
    finally:
        gc.enable()
    assert choice.backend.fingerprint == "fp32"
    assert "does not reproduce the model" in choice.passed_over["onnxruntime-cuda fused"]


def test_a_whole_stream_on_the_fake_gpu_is_the_cpus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(directory: Path, manifest: Manifest, *_: Any) -> Any:
        return fake_gpu(directory, manifest)

    cpu = {"onnxruntime-cpu": backends.LOADERS["onnxruntime-cpu"]}
    monkeypatch.setattr(backends, "LOADERS", {"fake": fake, **cpu})
    pcm = np.random.default_rng(0).uniform(-0.9, 0.9, 20001).astype(np.float32)
    played = []
    for name in ("fake", "onnxruntime-cpu"):
        talker = Talker.load(model, name, threads=1)
        with talker.open("bo", seed=11) as stream:
            frames = [frame.vertices.copy() for part in np.array_split(pcm, 7) for frame in stream.push(part)]
            frames += [frame.vertices.copy() for frame in stream.flush()]
        played.append(np.array(frames))
    assert len(played[0]) == 20001 * 30 // 16000
    assert np.array_equal(played[0], played[1])
