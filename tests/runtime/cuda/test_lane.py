"""The GPU lane on a driver of host memory: the same frames as the CPU backend, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtalk.backends.onnxruntime_cpu import OnnxRuntimeCpu
from streamtalk.backends.protocol import Backend, Float32, Lane
from streamtalk.manifest import Manifest, read_manifest
from tests.runtime.cuda.fake import fake_gpu
from tests.runtime.toy import Toy

FRAMES = 23
"""Past the filling of the toy's windows, and no multiple of any hop."""

capturable = pytest.mark.parametrize("capturable", [True, False], ids=["captured", "not captured"])


def opened(backend: Backend, toy: Toy) -> Lane:
    identity = toy.identity
    return backend.lane(identity["styles"][1], identity["templates"][1], identity["start_latent"])


def play(lane: Lane, manifest: Manifest, first: int = 0, last: int = FRAMES, seed: int = 5) -> Float32:
    """Frames `first` to `last`, [n, V, 3]; inputs depend on the frame alone."""
    frames = []
    for index in range(first, last):
        rng = np.random.default_rng([seed, index])
        if index % manifest.hop == 0:
            lane.pcm[:] = rng.standard_normal(manifest.window_samples)
            lane.encode()
            # The caller may reuse its buffers at once.
            lane.pcm[:] = np.nan
        lane.noise[:] = rng.standard_normal(manifest.latent_width)
        lane.frame(index)
        lane.noise[:] = np.nan
        frames.append(lane.vertices().copy())
    return np.array(frames)


def same_state(a: Lane, b: Lane, index: int) -> bool:
    got, want = a.state(index), b.state(index)
    names = ("features", "kv_cache", "latents")
    return all(np.array_equal(getattr(got, name), getattr(want, name)) for name in names)


@capturable
@pytest.mark.parametrize(("hop", "batch"), [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_frames_and_state_are_the_cpu_backends_own(
    hop: int, batch: int, capturable: bool, tmp_path: Path
) -> None:
    toy = Toy(hop=hop, batch=batch, window_samples=2400 + -(-(hop - 1) * 16000 // 30))
    directory = toy.write(tmp_path / "engine")
    manifest = read_manifest(directory)
    gpu = opened(fake_gpu(directory, manifest, capturable), toy)
    cpu = opened(OnnxRuntimeCpu(directory, manifest, 1), toy)
    assert np.array_equal(play(gpu, manifest), play(cpu, manifest))
    assert same_state(gpu, cpu, FRAMES)
    cpu.reset()
    gpu.reset()
    assert same_state(gpu, cpu, 0)
    assert np.array_equal(play(gpu, manifest, seed=6), play(cpu, manifest, seed=6))


def test_a_frame_is_one_launch_and_takes_no_memory(engine: Path, toy: Toy) -> None:
    manifest = read_manifest(engine)
    backend = fake_gpu(engine, manifest)
    lane = opened(backend, toy)
    backend.driver.calls.clear()
    play(lane, manifest, 0, 10 * manifest.hop)
    # A hop is an upload of its window, a launch of the encoder, a copy of what it gave, and one of each row of that.
    calls = {name: backend.driver.calls.count(name) for name in set(backend.driver.calls)}
    hops = {"upload": 10, "copy": 10, "copy_rows": 10 * manifest.hop}
    assert calls == {"launch": 10 * (manifest.hop + 1), **hops}


@pytest.mark.parametrize("eager", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("hop", [1, 2])
def test_frames_that_nobody_reads_are_still_in_order(
    hop: int, eager: tuple[bool, bool], tmp_path: Path
) -> None:
    """Encoder and frame stream each as late or as early as CUDA may run them, the host never waiting."""
    toy = Toy(hop=hop)
    directory = toy.write(tmp_path / "engine")
    manifest = read_manifest(directory)
    gpu = fake_gpu(directory, manifest)
    gpu.driver.eager = eager
    lanes = [opened(backend, toy) for backend in (gpu, OnnxRuntimeCpu(directory, manifest, 1))]
    for lane in lanes:
        for index in range(FRAMES):
            rng = np.random.default_rng(index)
            if index % manifest.hop == 0:
                lane.pcm[:] = rng.standard_normal(manifest.window_samples)
                lane.encode()
            lane.noise[:] = rng.standard_normal(manifest.latent_width)
            lane.frame(index)
    assert np.array_equal(lanes[0].vertices(), lanes[1].vertices())
    assert same_state(lanes[0], lanes[1], FRAMES)


@pytest.mark.parametrize("at", [1, 6, 7])
def test_state_moves_between_backends(at: int, engine: Path, toy: Toy) -> None:
    manifest = read_manifest(engine)
    cpu = opened(OnnxRuntimeCpu(engine, manifest, 1), toy)
    whole = play(cpu, manifest)
    cpu.reset()
    play(cpu, manifest, 0, at)
    gpu = opened(fake_gpu(engine, manifest), toy)
    play(gpu, manifest, 0, at, seed=9)  # in the same place of a hop of its own
    gpu.restore(at, cpu.state(at))
    assert np.array_equal(play(gpu, manifest, at), whole[at:])


def test_voices_share_nothing_but_the_engine(engine: Path, toy: Toy) -> None:
    manifest = read_manifest(engine)
    backend = fake_gpu(engine, manifest)
    alone = play(opened(backend, toy), manifest)
    a, b = opened(backend, toy), opened(backend, toy)
    mixed = []
    for index in range(FRAMES):
        mixed.append(play(a, manifest, index, index + 1)[0])
        play(b, manifest, index, index + 1, seed=9)
    assert np.array_equal(np.array(mixed), alone)


def test_close_gives_everything_back(engine: Path, toy: Toy) -> None:
    backend = fake_gpu(engine, read_manifest(engine))
    lane = opened(backend, toy)
    lane.pcm[:] = 0.5
    lane.encode()
    lane.frame(0)
    lane.close()
    lane.close()
    assert backend.driver.memory == {}
    assert backend.driver.handles == []
    assert (backend.encoder.open_runs, backend.frame.open_runs) == (0, 0)


def test_an_open_that_fails_gives_everything_back(
    engine: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = fake_gpu(engine, read_manifest(engine))

    def full(*_: object) -> None:
        raise MemoryError("the card is full")

    monkeypatch.setattr(backend.frame, "bind", full)
    with pytest.raises(MemoryError, match="full"):
        opened(backend, toy)
    assert backend.driver.memory == {}
    assert backend.driver.handles == []
    assert backend.encoder.open_runs == 0
