"""Rows on a GPU of host memory: the same frames and states as the CPU backend's, bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk import BackendError
from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.rows import CudaRows
from streamtalk.backends.onnxruntime import CpuBackend
from streamtalk.model import read_manifest
from streamtalk.rows import Float32, Mask, Rows
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.runtime.backends.probes import add_probe
from tests.runtime.toy import Toy
from tests.tensorrt_api import plain

HOPS = 19
"""Past the filling of the toy's windows, and an odd number."""
Load = Callable[..., CudaBackend]
kinds = pytest.mark.parametrize("kind", ["tensorrt", "onnxruntime"])


def opened(backend: Any, toy: Toy, count: int, start: bool = True) -> Any:
    identity = toy.identity
    rows = backend.rows(count, identity["start_latent"])
    for row in range(count if start else 0):
        rows.start(row, identity["styles"][row], identity["templates"][row])
    return rows


def on_the_cpu(directory: Path, toy: Toy, count: int) -> Rows:
    rows: Rows = opened(CpuBackend(directory, read_manifest(directory), 1), toy, count)
    return rows


def hop(rows: Rows, number: int, active: Mask, seed: int = 5) -> None:
    """Launch a hop whose inputs depend on `number` alone."""
    rng = np.random.default_rng([seed, number])
    for array in rows.inputs.values():
        array[:] = rng.standard_normal(array.shape)
    rows.launch(active)
    for array in rows.inputs.values():
        array[:] = np.nan  # the caller may reuse its buffers at once


def play(rows: Rows, first: int = 0, last: int = HOPS, seed: int = 5) -> Float32:
    """Vertices [n, B, hop, V, 3] of hops in which every row is active."""
    every, made = np.ones(len(rows.frames), np.bool_), []
    for number in range(first, last):
        hop(rows, number, every, seed)
        made.append(rows.vertices().copy())
        rows.advance(every)
    return np.array(made)


def assert_same_state(a: Rows, b: Rows) -> None:
    assert np.array_equal(a.frames, b.frames)
    for row in range(len(a.frames)):
        got, want = a.state(row), b.state(row)
        np.testing.assert_array_equal(got.kv_cache, want.kv_cache)
        np.testing.assert_array_equal(got.latents, want.latents)


@pytest.mark.parametrize("eager", [(), (True,), (True,) * 100], ids=["late", "a session at once", "at once"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3], ids="hop {}".format)
@kinds
def test_frames_and_states_are_the_cpus(
    kind: str, n: int, count: int, eager: tuple[bool, ...], cuda: FakeCuda, load: Load, tmp_path: Path
) -> None:
    """Rows pause, start again and are reset at random; some hops are read by nobody."""
    toy = Toy(rows=(1, 3), hop=n, window_samples=4000)
    directory = toy.write(tmp_path / "model")
    add_probe(directory, toy)
    cuda.eager = eager
    gpu, cpu = opened(load(directory, kind), toy, count), on_the_cpu(directory, toy, count)
    rng = np.random.default_rng(1)
    for number in range(HOPS):
        active = rng.random(count) < 0.7
        if number % 7 == 6:
            row = int(rng.integers(count))
            for rows in (gpu, cpu):
                rows.reset(row)
                assert not rows.inputs["pcm"][row].any()
                assert not rows.inputs["noise"][row].any()
        for rows in (gpu, cpu):
            hop(rows, number, active)
        if number % 4 != 3:
            got, want = gpu.vertices(), cpu.vertices()
            assert got.shape == (count, n, toy.n_vertices, 3)
            np.testing.assert_array_equal(got[active], want[active])
        for rows in (gpu, cpu):
            rows.advance(active)
        if number in (9, 10):
            assert_same_state(gpu, cpu)
    assert_same_state(gpu, cpu)
    gpu.close()
    assert not cuda.device


def test_a_row_that_is_not_active_keeps_its_state(directory: Path, load: Load) -> None:
    toy = Toy(rows=(1, 3))
    rows = opened(load(directory), toy, 3)
    play(rows, 0, 3)
    before = rows.state(1)
    active = np.array([True, False, True])
    for number in range(3, 6):  # both sides
        hop(rows, number, active)
        rows.advance(active)
        np.testing.assert_array_equal(rows.state(1).kv_cache, before.kv_cache)
        np.testing.assert_array_equal(rows.state(1).latents, before.latents)
    assert rows.frames.tolist() == [12, 6, 12]


@kinds
def test_a_hop_is_one_launch_and_takes_no_memory(
    kind: str, directory: Path, cuda: FakeCuda, load: Load
) -> None:
    rows = opened(load(directory, kind), Toy(), 1)
    cuda.calls.clear()
    play(rows, 0, 10)
    captured = kind == "tensorrt"
    assert cuda.count_calls("cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync") == {
        "cudaGraphLaunch": 10 * captured,
        "cudaMemcpyAsync": 20 * (not captured),  # an upload and a download; onnxruntime captures by itself
        "cudaMemsetAsync": 0,
    }
    assert not any(name.endswith(("Malloc", "Alloc", "CreateWithFlags")) for name, *_ in cuda.calls)


def test_a_captured_hop_is_an_upload_the_graph_and_a_download(
    directory: Path, cuda: FakeCuda, load: Load
) -> None:
    rows = opened(load(directory), Toy(rows=(1, 3)), 3)
    graphs = [made for made in cuda.handles if hasattr(made, "work")]
    assert [len(graph.work) for graph in graphs] == [3, 3]
    rows.close()


def test_all_memory_is_cleared_before_a_graph_reads_it(directory: Path, cuda: FakeCuda, load: Load) -> None:
    backend = load(directory)
    rows = opened(backend, Toy(), 1, start=False)
    ((base, block),) = cuda.device.items()
    cleared = [call for call in cuda.calls if call[0] == "cudaMemsetAsync"]
    assert cleared == [("cudaMemsetAsync", base, 0, len(block), rows._stream)]
    assert not rows.state(0).kv_cache.any()


@pytest.mark.parametrize("function", ["cudaEventSynchronize", "cudaGraphLaunch", "cudaEventRecord"])
@pytest.mark.parametrize("number", [6, 7])
def test_a_launch_that_was_interrupted_is_made_again(
    number: int, function: str, directory: Path, cuda: FakeCuda, load: Load
) -> None:
    toy = Toy(rows=(1, 3))
    gpu, cpu = opened(load(directory), toy, 3), on_the_cpu(directory, toy, 3)
    want = play(cpu)
    np.testing.assert_array_equal(play(gpu, 0, number), want[:number])
    cuda.failures[function] = 4
    with pytest.raises(BackendError, match=f"{function} failed: error 4 of the runtime"):
        hop(gpu, 99, np.array([True, False, True]))  # other inputs, other rows
    del cuda.failures[function]
    np.testing.assert_array_equal(play(gpu, number), want[number:])
    assert_same_state(gpu, cpu)


def test_a_hop_is_made_again_until_it_counts(directory: Path, load: Load) -> None:
    toy = Toy()
    gpu = opened(load(directory), toy, 1)
    play(gpu, 0, 3)
    one = np.ones(1, np.bool_)
    made = []
    for _ in range(3):
        hop(gpu, 3, one)
        made.append(gpu.vertices().copy())
    assert all(np.array_equal(vertices, made[0]) for vertices in made)
    gpu.advance(one)
    hop(gpu, 3, one)
    assert not np.array_equal(gpu.vertices(), made[0])


@pytest.mark.parametrize("at", [1, 6, 7])
def test_a_state_moves_between_backends_and_rows(at: int, directory: Path, load: Load) -> None:
    toy = Toy(rows=(1, 3))
    cpu = on_the_cpu(directory, toy, 1)
    whole = play(cpu)
    cpu.reset(0)
    play(cpu, 0, at)
    gpu = opened(load(directory), toy, 1)
    play(gpu, 0, 4, seed=9)
    gpu.restore(0, at * toy.hop, cpu.state(0))
    assert_same_state(gpu, cpu)
    np.testing.assert_array_equal(play(gpu, at), whole[at:])
    cpu.restore(0, HOPS * toy.hop, gpu.state(0))
    assert_same_state(gpu, cpu)


def test_rows_share_nothing_but_the_engine(directory: Path, load: Load) -> None:
    backend, toy = load(directory), Toy()
    alone = play(opened(backend, toy, 1))
    a, b = opened(backend, toy, 1), opened(backend, toy, 1)
    mixed = []
    for number in range(HOPS):
        mixed.append(play(a, number, number + 1)[0])
        play(b, number, number + 1, seed=9)
    np.testing.assert_array_equal(np.array(mixed), alone)


def test_without_a_download_the_host_runs_two_hops_ahead(directory: Path, cuda: FakeCuda, load: Load) -> None:
    backend: Any = load(directory).on_device()
    gpu, one = opened(backend, Toy(), 1), np.ones(1, np.bool_)
    want = play(on_the_cpu(directory, Toy(), 1), 0, 4)
    engine = plain(backend.engine(1).engine)
    engine.ran = 0
    cuda.calls.clear()
    for number, done in enumerate((0, 0, 1, 2)):
        hop(gpu, number, one)
        assert gpu.vertices().shape == (1, 2, 0, 3)
        assert engine.ran == done  # the block that launch - 2 uploaded is written again
        gpu.advance(one)
    np.testing.assert_array_equal(gpu.device_vertices.on_host(), want[-1])
    assert cuda.count_calls("cudaMemcpyAsync") == {"cudaMemcpyAsync": 1}  # for `on_host`
    gpu.close()
    assert cuda.nothing_left()


def test_a_capture_that_fails_leaves_rows_that_are_right(directory: Path, cuda: FakeCuda, load: Load) -> None:
    backend, toy = load(directory), Toy()
    want = play(on_the_cpu(directory, toy, 1))
    for function in ("cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload"):
        cuda.failures[function] = 901
        with pytest.warns(RuntimeWarning, match=f"No CUDA graph, so frames take longer: {function} failed"):
            gpu = opened(backend, toy, 1)
        assert cuda.last_error == 0
        del cuda.failures[function]
        cuda.calls.clear()
        np.testing.assert_array_equal(play(gpu), want)
        assert cuda.count_calls("cudaGraphLaunch", "cudaMemcpyAsync") == {
            "cudaGraphLaunch": 0,
            "cudaMemcpyAsync": 2 * HOPS,
        }
        gpu.close()
        assert cuda.nothing_left()
    gpu = opened(backend, toy, 1)
    play(gpu, 0, 1)
    assert cuda.count_calls("cudaGraphLaunch") == {"cudaGraphLaunch": 1}


@kinds
def test_close_gives_everything_back(kind: str, directory: Path, cuda: FakeCuda, load: Load) -> None:
    backend = load(directory, kind)
    before = list(cuda.handles)  # a session of onnxruntime keeps its stream
    rows = opened(backend, Toy(), 1)
    hop(rows, 0, np.ones(1, np.bool_))
    assert cuda.in_flight()
    rows.close()
    rows.close()
    assert not cuda.device
    assert cuda.handles == before
    with pytest.raises(BackendError, match="These rows are closed"):
        rows.launch(np.ones(1, np.bool_))


@pytest.mark.parametrize(
    "function",
    [
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaStreamCreateWithFlags",
        "cudaEventCreateWithFlags",
        "cudaMemsetAsync",
    ],
)
def test_an_open_that_fails_gives_everything_back(
    function: str, directory: Path, cuda: FakeCuda, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, real = load(directory), getattr(FakeCuda, function)
    rows = opened(backend, Toy(), 1, start=False)
    names = [name for name, *_ in cuda.calls]
    calls = names[: names.index("cudaMemsetAsync") + 1].count(function)  # those after it are drains
    rows.close()
    assert calls
    for failing in range(calls):
        count = iter(range(calls))

        def fails(self: FakeCuda, *arguments: Any, count: Any = count, failing: int = failing) -> Any:
            return (2, None) if next(count) == failing else real(self, *arguments)

        fails.__name__ = function

        monkeypatch.setattr(FakeCuda, function, fails)
        with pytest.raises(BackendError, match=function):
            opened(backend, Toy(), 1, start=False)
        monkeypatch.setattr(FakeCuda, function, real)
        assert cuda.nothing_left()


def test_an_engine_that_cannot_be_bound_leaves_nothing(directory: Path, cuda: FakeCuda, load: Load) -> None:
    backend: Any = load(directory)
    plain(backend.engine(1).engine).room = False
    with pytest.raises(BackendError, match="no room for another stream"):
        opened(backend, Toy(), 1)
    assert cuda.nothing_left()


def test_a_failure_to_give_back_keeps_nothing_else(directory: Path, cuda: FakeCuda, load: Load) -> None:
    rows = opened(load(directory), Toy(), 1)
    left = [handle for handle in cuda.handles if hasattr(handle, "ready")]
    cuda.failures["cudaGraphExecDestroy"] = 700
    with pytest.raises(BackendError, match="cudaGraphExecDestroy failed: error 700"):
        rows.close()
    assert cuda.handles == left
    assert not cuda.device
    rows.close()


@kinds
def test_closed_rows_are_gone_without_the_collector(
    kind: str, directory: Path, cuda: FakeCuda, load: Load
) -> None:
    before = len(cuda.pinned)
    rows: CudaRows = opened(load(directory, kind), Toy(), 1)
    assert len(cuda.pinned) > before
    gone = weakref.ref(rows)
    rows.close()
    gc.disable()
    try:
        del rows
        assert gone() is None
        assert len(cuda.pinned) == before
    finally:
        gc.enable()


def test_a_frame_that_is_read_after_close_is_old(directory: Path, cuda: FakeCuda, load: Load) -> None:
    rows = opened(load(directory), Toy(), 1)
    want = play(rows, 0, 1)[0]
    vertices = rows.vertices()
    assert not vertices.flags.writeable
    rows.close()
    del rows
    np.testing.assert_array_equal(vertices, want)
    assert len(cuda.pinned) == 1
