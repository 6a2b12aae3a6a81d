"""A model on a fake GPU: which engines are loaded, when, and what they must reproduce first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import numpy as np
import pytest

from streamtalk import BackendError, Talker
from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.engine import DeviceEngine
from streamtalk.backends.probe import require_probe
from streamtalk.model import FILE_NAME, read_manifest
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.runtime.backends.cuda.libraries import StubEngine
from tests.runtime.toy import Toy, speech
from tests.tensorrt_api import plain

Load = Callable[..., CudaBackend]
START = Toy().identity["start_latent"]


def stub(backend: CudaBackend, rows: int) -> StubEngine:
    engine: Any = backend.engines[rows]
    found: StubEngine = plain(engine.engine)
    return found


def changed(backend: CudaBackend, change: Callable[[StubEngine], Any]) -> CudaBackend:
    """The backend with engines that are changed when they are loaded."""

    def load(rows: int) -> Any:
        engine: Any = backend.load(rows)
        change(plain(engine.engine))
        return engine

    return replace(backend, load=load)


@pytest.mark.parametrize("kind", ["tensorrt", "onnxruntime"])
def test_engines_are_loaded_when_they_are_first_asked_for(kind: str, directory: Path, load: Load) -> None:
    backend = load(directory, kind)
    assert set(backend.engines) == {1}
    rows = [backend.rows(count, START) for count in (3, 1, 3)]
    assert [len(group.frames) for group in rows] == [3, 1, 3]
    assert set(backend.engines) == {1, 3}
    resident = backend.on_device()
    assert resident.engine(3) is backend.engines[3]
    assert resident.rows(3, START).vertices().shape == (3, 2, 0, 3)


def test_threads_that_ask_at_once_load_once(directory: Path, load: Load) -> None:
    made: list[int] = []
    backend = load(directory)

    def load_rows(rows: int) -> DeviceEngine:
        made.append(rows)
        return backend.load(rows)

    counted = replace(backend, load=load_rows)
    threads = [Thread(target=counted.engine, args=(3,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [3]


def test_more_rows_must_reproduce_the_probe_first(directory: Path, load: Load, cuda: FakeCuda) -> None:
    """They are other kernels than those of one row; an engine that is wrong in its last row alone is found out."""
    backend = load(directory)
    require_probe(backend, directory, backend.manifest)
    wrong = changed(backend, lambda engine: setattr(engine, "wrong", 0.01))
    for _ in range(2):
        with pytest.raises(BackendError, match="does not reproduce the model"):
            wrong.rows(3, START)
    assert set(wrong.engines) == {1}
    assert cuda.nothing_left()
    backend.rows(3, START)
    assert stub(backend, 3).ran >= 6


def test_a_probe_of_more_rows_is_remembered_too(directory: Path, load: Load, cache: Path) -> None:
    first, second = load(directory), load(directory)
    first.rows(3, START)
    assert len(list((cache / "probes").glob("*.json"))) == 1
    ran = stub(first, 3).ran
    second.rows(3, START)
    assert stub(second, 3).ran == 2 < ran  # a run to warm up each side


def test_a_number_of_rows_without_an_engine(directory: Path, load: Load) -> None:
    backend = load(directory)
    with pytest.raises(
        BackendError, match=r"No tensorrt engine of `hop_b2` .*streamtalk build .* --backend tensorrt"
    ):
        backend.rows(2, START)
    with pytest.raises(BackendError, match=r"no fp32 hop graph of 2 rows .*--batch 2"):
        load(directory, "onnxruntime").rows(2, START)


def test_an_engine_of_more_rows_may_be_missing(directory: Path, load: Load) -> None:
    backend = load(directory)
    manifest = read_manifest(directory)
    one = tuple(engine for engine in manifest.engines if engine.graph == "hop")
    (directory / FILE_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, engines=one)))
    assert backend.rows(1, START).frames.shape == (1,)


def played(talker: Talker) -> Any:
    with talker.open("bo", seed=11) as stream:
        frames = [f.vertices.copy() for part in np.array_split(speech(20001), 7) for f in stream.push(part)]
        return np.array(frames + [f.vertices.copy() for f in stream.flush()])


@pytest.mark.parametrize("kind", ["tensorrt", "onnxruntime"])
def test_a_whole_stream_is_the_cpus(kind: str, directory: Path, load: Load, cuda: FakeCuda) -> None:
    load(directory, kind)
    gpu = Talker.load(directory, {"tensorrt": "tensorrt"}.get(kind, "onnxruntime-cuda"))
    cuda.stack.clear()
    got = played(gpu)
    assert len(got) == 20001 * 30 // 16000
    np.testing.assert_array_equal(got, played(Talker.load(directory, "onnxruntime-cpu", threads=1)))
    assert not cuda.device


@pytest.mark.parametrize("download", [True, False])
def test_a_stream_has_device_vertices(download: bool, directory: Path, load: Load) -> None:
    load(directory)
    gpu = Talker.load(directory, "tensorrt", download=download)
    cpu = Talker.load(directory, "onnxruntime-cpu", threads=1)
    with gpu.open() as stream, cpu.open() as host:
        for mine, theirs in zip(stream.push(speech(8000)), host.push(speech(8000)), strict=True):
            assert mine.vertices.shape == ((4, 3) if download else (0, 3))
            np.testing.assert_array_equal(stream.device_vertices.on_host(), theirs.vertices)
        with pytest.raises(BackendError, match="only where a GPU makes them"):
            _ = host.device_vertices
    with pytest.raises(BackendError, match="download=False needs a GPU backend"):
        Talker.load(directory, "onnxruntime-cpu", download=False)
