"""Sessions of onnxruntime on a GPU, with an onnxruntime and a GPU that stand in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streamtalk.backends.cuda import onnxruntime as gpu_onnxruntime
from streamtalk.backends.cuda.buffers import Plan
from streamtalk.backends.cuda.driver import open_driver
from streamtalk.backends.cuda.onnxruntime import SEARCHES, CudaSession
from streamtalk.errors import BackendError, ModelError
from streamtalk.model import graph_key, read_manifest
from tests.runtime.backends.cuda.fake import PRIMARY, FakeCuda
from tests.runtime.backends.cuda.libraries import GpuSession, OnnxRuntimeGpu

Open = Callable[[OnnxRuntimeGpu], CudaSession]


@pytest.fixture
def opened(directory: Path, cuda: FakeCuda) -> Open:
    """Makes a session of the toy's hop graph."""
    del cuda
    return lambda runtime: CudaSession(
        runtime, directory, read_manifest(directory).graphs["hop"], open_driver()
    )


def test_the_fastest_kernels_are_taken_where_they_exist(opened: Open, cuda: FakeCuda) -> None:
    runtime = OnnxRuntimeGpu(cuda)
    session = opened(runtime)
    assert runtime.searched == [session.search] == [SEARCHES[0]]
    assert session.captured
    assert cuda.handles == [session.stream]
    assert not cuda.device


def test_settings_that_change_the_numbers(opened: Open, cuda: FakeCuda) -> None:
    """TF32 has float16's mantissa; LayerNorm of a sum is in float32 in strict mode alone."""
    runtime = OnnxRuntimeGpu(cuda)
    session = opened(runtime)
    (settings,) = runtime.settings
    assert settings["use_tf32"] == "0"
    assert settings["enable_skip_layer_norm_strict_mode"] == "1"
    assert (settings["device_id"], settings["user_compute_stream"]) == ("0", str(int(session.stream)))


def test_a_list_without_a_kernel_gives_way_to_the_next(opened: Open, cuda: FakeCuda) -> None:
    runtime = OnnxRuntimeGpu(cuda, SEARCHES[:2])
    session = opened(runtime)
    assert runtime.searched == list(SEARCHES)
    assert session.search == SEARCHES[2]


def test_a_graph_that_cannot_be_captured_runs_kernel_by_kernel(opened: Open, cuda: FakeCuda) -> None:
    runtime = OnnxRuntimeGpu(cuda, graphs=False)
    session = opened(runtime)
    assert runtime.captured == [True, True, True, False]
    # A capture that a failure left open would fail the next.
    assert cuda.count_calls("cudaStreamEndCapture") == {"cudaStreamEndCapture": 3}
    assert cuda.last_error == 0
    assert (session.search, session.captured) == (SEARCHES[0], False)
    # A session that failed has given its memory back before another takes as much, without waiting for the collector.
    assert runtime.alive_before == [0, 0, 0, 0]
    assert sum(made() is not None for made in runtime.made) == 1


def test_a_capture_that_another_thread_spoilt_is_made_again(opened: Open, cuda: FakeCuda) -> None:
    """Its session captures in CUDA's global mode: any thread that allocates meanwhile ends that."""
    runtime = OnnxRuntimeGpu(cuda, spoilt=1)
    session = opened(runtime)
    assert (runtime.captured, session.search, session.captured) == ([True], SEARCHES[0], True)
    driver = session.driver
    plan = Plan.of((*session.graph.inputs, *session.graph.outputs))
    base, stream = driver.device_memory(plan.total), driver.stream()
    driver.clear(base, plan.total, stream)
    addresses = plan.addresses(base)
    runtime.spoilt = 1
    session.bind(addresses, stream)
    runtime.spoilt = 2
    with pytest.raises(BackendError, match="stream is capturing"):
        session.bind(addresses, stream)


def test_a_graph_that_is_neither_captured_nor_in_the_first_list_runs_from_another(
    opened: Open, cuda: FakeCuda
) -> None:
    runtime = OnnxRuntimeGpu(cuda, SEARCHES[:1], graphs=False)
    session = opened(runtime)
    assert runtime.captured == [True, True, True, False, False]
    assert (session.search, session.captured) == (SEARCHES[1], False)


def test_a_release_that_does_not_capture_is_not_asked_to(opened: Open, cuda: FakeCuda) -> None:
    runtime = OnnxRuntimeGpu(cuda, SEARCHES)
    runtime.__version__ = "1.30.0"
    with pytest.raises(BackendError):
        opened(runtime)
    assert runtime.captured == [False] * len(SEARCHES)


def test_a_graph_that_no_list_can_run_leaves_nothing(opened: Open, cuda: FakeCuda) -> None:
    runtime = OnnxRuntimeGpu(cuda, SEARCHES)
    with pytest.raises(BackendError, match="no valid engine configs of HEURISTIC"):
        opened(runtime)
    assert cuda.nothing_left()
    assert not any(made() for made in runtime.made)


def test_it_is_quiet_while_it_tries_and_no_longer(opened: Open, cuda: FakeCuda) -> None:
    runtime = OnnxRuntimeGpu(cuda, SEARCHES[:1])
    opened(runtime)
    assert runtime.levels == [gpu_onnxruntime.FATAL, gpu_onnxruntime.WARNING]


def test_a_provider_that_does_not_start(
    opened: Open, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.runtime.backends.cuda.libraries.GpuSession.get_providers", lambda _: [])
    with pytest.raises(BackendError, match=r"cannot start CUDAExecutionProvider here.*streamtalk\[gpu\]"):
        opened(OnnxRuntimeGpu(cuda))


def test_files_that_are_not_the_manifests_are_not_loaded(
    opened: Open, directory: Path, cuda: FakeCuda
) -> None:
    (directory / "hop.onnx").write_bytes(b"other")
    with pytest.raises(ModelError, match="is not the file that was exported"):
        opened(runtime := OnnxRuntimeGpu(cuda))
    assert not runtime.settings
    assert cuda.nothing_left()


@pytest.mark.parametrize(("operators", "own"), [(("onnx",), False), (("onnx", "onnxruntime"), True)])
def test_half_precision_prefers_onnxruntimes_own_operators(
    operators: tuple[str, ...], own: bool, directory: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(directory)
    half: Any = {
        graph_key("hop", "fp16", kind): msgspec.structs.replace(
            manifest.graphs["hop"], precision="fp16", operators=kind
        )
        for kind in operators
    }
    manifest = msgspec.structs.replace(manifest, graphs={**manifest.graphs, **half})
    monkeypatch.setattr(gpu_onnxruntime, "_onnxruntime", lambda: OnnxRuntimeGpu(cuda))
    backend = gpu_onnxruntime.load(directory, manifest, "fp16", 1)
    assert backend.precision == "fp16"
    assert backend.engines[1].graph is half[graph_key("hop", "fp16", operators[-1])]
    assert ("its own operators" in backend.description) == own
    single = gpu_onnxruntime.load(directory, manifest, "fp32", 1)
    assert single.engines[1].graph is manifest.graphs["hop"]
    assert single.fingerprint != backend.fingerprint


def test_a_context_of_ones_own_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(stack=(22,))
    cuda.install(monkeypatch)
    monkeypatch.setattr(gpu_onnxruntime, "_onnxruntime", lambda: OnnxRuntimeGpu(cuda))
    with pytest.raises(BackendError, match="primary context only"):
        gpu_onnxruntime.load(directory, read_manifest(directory), "fp32", 1)


@pytest.mark.parametrize(
    ("version", "safe"), [("1.31.0", False), ("1.31.1", True), ("1.32.0", True), ("?", False)]
)
def test_releases_that_capture(version: str, safe: bool) -> None:
    assert gpu_onnxruntime.captures(version) == safe


def test_rows_of_one_session_wait_for_each_other(directory: Path, load: Any, cuda: FakeCuda) -> None:
    """The session's stream is shared: a run waits for its own upload, and each download for its run."""
    backend = load(directory, "onnxruntime")
    groups = [backend.rows(1, np.zeros(3, np.float32)) for _ in range(2)]
    one = np.ones(1, np.bool_)
    for number, rows in enumerate(groups):
        rows.inputs["pcm"][:] = 0.1 * number
        rows.launch(one)
    late = [rows.vertices().copy() for rows in groups]
    for number, rows in enumerate(groups):
        rows.inputs["pcm"][:] = 0.1 * number
        rows.launch(one)
        np.testing.assert_array_equal(rows.vertices(), late[number])
    assert not np.array_equal(*late)
    assert not cuda.in_flight()


def test_closed_rows_hold_no_captured_graph(directory: Path, load: Any) -> None:
    backend = load(directory, "onnxruntime")
    rows = backend.rows(1, np.zeros(3, np.float32))
    held = backend.engines[1].session.graphs
    assert len(held) == 2  # one for each side of the state
    rows.close()
    assert not held


def test_runs_of_two_threads_do_not_mix(
    directory: Path, load: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session's stream must hold a run's wait, the run and its mark in one piece."""
    backend, one, seen = load(directory, "onnxruntime"), np.ones(1, np.bool_), list[int]()
    groups = [backend.rows(1, np.zeros(3, np.float32)) for _ in range(2)]
    cuda.stack = [PRIMARY]  # of both threads: the fake has one stack for all
    threads = [threading.Thread(target=rows.launch, args=(one,)) for rows in groups]
    run = GpuSession.run_with_iobinding

    def slow(self: GpuSession, *arguments: Any) -> None:
        seen.append(1)
        if not threads[1].ident:
            threads[1].start()
            threads[1].join(0.1)  # it would be through by then, if it did not wait
        run(self, *arguments)
        seen.append(-1)

    monkeypatch.setattr(GpuSession, "run_with_iobinding", slow)
    threads[0].start()
    threads[0].join()
    threads[1].join()
    assert seen == [1, -1, 1, -1]
