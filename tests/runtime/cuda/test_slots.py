"""Batches on a GPU's slots, on a driver of host memory: every voice gives the frames that it gives alone on the CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest

from streamtalk import BackendError, Talker, backends
from streamtalk.backends.onnxruntime_cpu import OnnxRuntimeCpu
from streamtalk.backends.slots import Slots
from streamtalk.cuda.slots import CudaSlots
from streamtalk.manifest import Manifest, read_manifest
from streamtalk.trust import trust
from tests.runtime.cuda.fake import FakeDriver, FakeStream, fake_gpu
from tests.runtime.test_batch import CAST, SECOND, SLOTS, TOYS, alone, drain, interrupted, play, same
from tests.runtime.test_trust import add_probe
from tests.runtime.toy import Toy, speech

TURNS = 40


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Talker]:
    """Load a toy on the fake GPU or the CPU."""

    def loaded(toy: Toy, backend: str = "fake", capturable: bool = True, **options: Any) -> Talker:
        directory = tmp_path / str(hash(toy))
        if not directory.exists():
            toy.write(directory)
            add_probe(directory, toy)

        def fake(directory: Path, manifest: Manifest, *_: Any) -> Any:
            return fake_gpu(directory, manifest, capturable)

        cpu = {"onnxruntime-cpu": backends.LOADERS["onnxruntime-cpu"]}
        monkeypatch.setattr(backends, "LOADERS", {"fake": fake, **cpu})
        return Talker.load(directory, backend, threads=1, **options)

    return loaded


@pytest.mark.parametrize("capturable", [True, False], ids=["captured", "not captured"])
@pytest.mark.parametrize("name", TOYS)
def test_a_voice_among_others_gives_the_frames_it_gives_alone(
    name: str, capturable: bool, load: Callable[..., Talker]
) -> None:
    toy = TOYS[name].with_(batch=SLOTS)
    gpu, cpu = load(toy, capturable=capturable), load(toy, "onnxruntime-cpu")
    for part, (slot, got) in zip(CAST, play(gpu, CAST, seed=3), strict=True):
        assert len(got) == part.n * toy.fps // SECOND
        np.testing.assert_array_equal(got, alone(cpu, part, slot))


def test_a_voice_moves_between_slots_streams_and_backends(load: Callable[..., Talker]) -> None:
    part = CAST[0]
    gpu, cpu = (load(Toy(batch=SLOTS), name) for name in ("fake", "onnxruntime-cpu"))
    expected = alone(cpu, part)
    with gpu.batch() as batch, cpu.open(part.speaker, seed=part.seed) as single:
        for _ in zip(range(7), single.push(part.pcm), strict=False):  # in the middle of a hop
            pass
        snapshot = single.state()
        with batch.open() as first:
            first.push(speech(SECOND))
            batch.step()  # an odd turn: the sides no longer follow the frame's parity
        stream = batch.open(part.speaker, seed=part.seed)
        stream.restore(snapshot)
        assert same(stream.state().lane, snapshot.lane)
        batch.open().push(speech(SECOND))  # is encoded while the other is in mid-hop
        stream.flush()
        got = [vertices for s, vertices in drain(batch) if s is stream]
        assert np.array_equal(np.array(got), expected[7:])
        stream.restore(snapshot)
        batch.step()
        single.restore(stream.state())
        rest = [frame.vertices.copy() for frame in single.flush()]
        assert np.array_equal(np.array(rest), expected[8:])


def test_a_slot_is_used_again_as_if_it_were_new(load: Callable[..., Talker]) -> None:
    gpu, cpu = (load(Toy(batch=SLOTS), name) for name in ("fake", "onnxruntime-cpu"))
    with gpu.batch() as batch, cpu.batch() as fresh:
        other = batch.open("bo", seed=9)
        other.push(speech(2 * SECOND))
        for turns in (9, 4):  # reset and closed after an odd and an even number
            stream = batch.open("bo", seed=5)
            stream.push(speech(SECOND))
            for _ in range(turns):
                batch.step()
            stream.reset()
            new = fresh.open("cy")
            assert same(stream.state().lane, new.state().lane)
            stream.close()
            again = batch.open("cy")
            assert again.slot == stream.slot
            assert same(again.state().lane, new.state().lane)
            again.close()
            new.close()


def test_a_step_is_one_launch_and_takes_no_memory(load: Callable[..., Talker]) -> None:
    talker: Any = load(Toy(batch=SLOTS, hop=4, window_samples=4000))
    calls = talker.choice.backend.driver.calls
    with talker.batch() as batch:
        streams = [batch.open() for _ in range(SLOTS)]
        for stream in streams:
            stream.push(speech(SECOND))
        calls.clear()
        for _ in range(8):
            assert len(batch.step()) == SLOTS
        # Two hops for all at once; rows that lie together go together.
        counted = {name: calls.count(name) for name in set(calls)}
        assert counted == {"launch": 8 + 2, "upload": 2, "copy": 2, "copy_rows": 2 * 4}


def test_voices_whose_hops_begin_together_take_several_runs_of_a_small_encoder(
    load: Callable[..., Talker],
) -> None:
    talker: Any = load(Toy(batch=SLOTS, encoder_batch=2, hop=4, window_samples=4000))
    calls = talker.choice.backend.driver.calls
    with talker.batch() as batch:
        for _ in range(SLOTS):
            batch.open().push(speech(SECOND))
        calls.clear()
        for _ in range(4):
            assert len(batch.step()) == SLOTS
        assert {name: calls.count(name) for name in ("launch", "upload", "copy")} == {
            "launch": 4 + 2,
            "upload": 2,
            "copy": 2,
        }


@pytest.mark.parametrize("eager", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("encoder_batch", [SLOTS, 2])
def test_turns_that_nobody_reads_are_still_in_order(
    eager: tuple[bool, bool], encoder_batch: int, tmp_path: Path
) -> None:
    """Encoder and frame stream each as late or as early as CUDA may run them; slots that stop and go at random."""
    toy = Toy(batch=SLOTS, encoder_batch=encoder_batch, hop=3, window_samples=4000)
    directory = toy.write(tmp_path / "engine")
    manifest = read_manifest(directory)
    gpu = fake_gpu(directory, manifest)
    gpu.driver.eager = eager
    identity, rng = toy.identity, np.random.default_rng(1)
    pair: list[Slots] = [
        backend.slots(identity["start_latent"]) for backend in (gpu, OnnxRuntimeCpu(directory, manifest, 1))
    ]
    for slots in pair:
        for slot in range(SLOTS):
            slots.start(slot, identity["styles"][slot], identity["templates"][slot])
    frames = np.zeros(SLOTS, np.int64)
    for turn in range(TURNS):
        active = rng.random(SLOTS) < 0.7
        if turn % 11 == 10:
            slot = int(rng.integers(SLOTS))
            for slots in pair:
                slots.reset(slot)
            frames[slot] = 0
        due = active & (frames % manifest.hop == 0)
        pcm = rng.standard_normal(pair[0].pcm.shape)
        noise = rng.standard_normal(pair[0].noise.shape)
        for slots in pair:
            if due.any():
                slots.pcm[due] = pcm[due]
                slots.encode(due)
                slots.pcm[:] = np.nan  # the caller may reuse its buffers at once
            slots.noise[:] = noise
            slots.frame(turn, frames, active)
            slots.noise[:] = np.nan
            if turn % 4 == 3:
                got = [slots.vertices().copy() for slots in pair]
        frames += active
        if turn % 4 == 3:
            assert np.array_equal(got[0][active], got[1][active])
    for slot in range(SLOTS):
        assert same(pair[0].state(slot, TURNS), pair[1].state(slot, TURNS))
    pair[0].close()
    assert gpu.driver.memory == {}
    assert gpu.driver.handles == []


def test_the_next_hop_is_heard_while_frames_of_this_one_are_under_way(tmp_path: Path) -> None:
    """What the encoder waits for is the copy of its last output, not the frames that read it."""
    toy = Toy(hop=2)
    directory = toy.write(tmp_path / "engine")
    manifest = read_manifest(directory)
    gpu = fake_gpu(directory, manifest)
    gpu.driver.eager = (True, False)  # the encoder's stream runs at once, the frames' when it must
    identity = toy.identity
    pair: list[Any] = [
        backend.lane(identity["styles"][0], identity["templates"][0], identity["start_latent"])
        for backend in (gpu, OnnxRuntimeCpu(directory, manifest, 1))
    ]
    order: list[str] = []
    for name, engine in (("encoder", gpu.encoder), ("frame", gpu.frame)):
        engine.ran = lambda name=name: order.append(name)
    for lane in pair:
        for index in range(4):
            rng = np.random.default_rng(index)
            if index % manifest.hop == 0:
                lane.pcm[:] = rng.standard_normal(manifest.window_samples)
                lane.encode()
            lane.noise[:] = rng.standard_normal(manifest.latent_width)
            if index < 3:  # the host waits for the frame before last, whose noise it overwrites
                lane.frame(index)
    # Both hops were heard before any frame ran; the third frame forced the first.
    assert order[:3] == ["encoder", "encoder", "frame"]
    assert len([s for s in gpu.driver.handles if isinstance(s, FakeStream) and s.queue]) == 1
    for lane in pair:
        lane.frame(3)
    assert np.array_equal(pair[0].vertices(), pair[1].vertices())


@pytest.mark.parametrize("where", ["encode", "frame", "vertices", "_lay_out"])
def test_an_interrupted_step_is_simply_done_again(
    where: str, load: Callable[..., Talker], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = (load(Toy(batch=SLOTS), name) for name in ("fake", "onnxruntime-cpu"))
    expected = [alone(cpu, part, slot) for slot, part in enumerate(CAST[:2])]
    for got, want in zip(interrupted(gpu, CudaSlots, where, monkeypatch), expected, strict=True):
        assert np.array_equal(got, want)


def test_without_a_download_the_host_runs_two_turns_ahead(tmp_path: Path) -> None:
    toy = Toy()
    directory = toy.write(tmp_path / "engine")
    manifest = read_manifest(directory)
    gpu: Any = replace(fake_gpu(directory, manifest), download=False)
    identity = toy.identity
    lane = gpu.lane(identity["styles"][0], identity["templates"][0], identity["start_latent"])
    ran: list[str] = []
    gpu.frame.ran = lambda: ran.append("frame")
    lane.encode()
    for index, done in enumerate((0, 0, 1, 2)):
        lane.frame(index)
        assert lane.vertices().shape == (0, 3)
        assert len(ran) == done  # of the turns before: what turn - 2 uploaded from is written again
    lane.close()


def test_what_cannot_be_captured_runs_launch_by_launch(
    load: Callable[..., Talker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise BackendError("cudaStreamEndCapture failed: operation not permitted when stream is capturing.")

    gpu, cpu = (load(Toy(batch=SLOTS), name) for name in ("fake", "onnxruntime-cpu"))
    backend: Any = gpu.choice.backend
    backend.driver.calls.clear()
    monkeypatch.setattr(FakeDriver, "capture", refuses)
    with pytest.warns(
        RuntimeWarning, match="No CUDA graph, so frames take longer: cudaStreamEndCapture failed"
    ):
        played = play(gpu, CAST, seed=3)
    for part, (slot, got) in zip(CAST, played, strict=True):
        np.testing.assert_array_equal(got, alone(cpu, part, slot))
    assert "launch" not in backend.driver.calls
    monkeypatch.undo()
    with gpu.batch() as batch:
        batch.open().push(np.zeros(gpu.sample_rate, np.float32))
        batch.step()
    assert "launch" in backend.driver.calls


def test_what_fails_to_go_back_keeps_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    directory = toy.write(tmp_path / "engine")
    manifest = read_manifest(directory)
    gpu = fake_gpu(directory, manifest)
    slots = gpu.slots(toy.identity["start_latent"])
    gives_back = FakeDriver.discard

    def fails(self: FakeDriver, handles: list[Any]) -> None:
        gives_back(self, handles)
        raise BackendError("cudaGraphExecDestroy failed: the device is gone.")

    monkeypatch.setattr(FakeDriver, "discard", fails)
    with pytest.raises(BackendError, match="the device is gone"):
        slots.close()
    assert gpu.driver.memory == {}
    assert gpu.driver.handles == []
    slots.close()


@pytest.mark.parametrize("capturable", [True, False])
def test_what_was_given_back_is_gone_without_the_collector(capturable: bool, tmp_path: Path) -> None:
    toy = Toy()
    directory = toy.write(tmp_path / "engine")
    manifest = read_manifest(directory)
    slots: Any = fake_gpu(directory, manifest, capturable).slots(toy.identity["start_latent"])
    pinned = weakref.ref(slots._pinned_pcm_bytes.base)
    slots.close()
    with pytest.raises(BackendError, match="given back"):
        slots.frame(0, np.zeros(1, np.int64), np.ones(1, np.bool_))
    gc.disable()
    try:
        del slots
        assert pinned() is None
    finally:
        gc.enable()


def test_slots_that_differ_are_not_trusted(tmp_path: Path) -> None:
    """The probe runs in every slot: an engine that is wrong in the last one alone is found out."""
    toy = Toy(batch=SLOTS)
    directory = toy.write(tmp_path / "model")
    manifest = add_probe(directory, toy)
    gpu = fake_gpu(directory, manifest)
    trust(gpu, directory, manifest)
    gpu = replace(fake_gpu(directory, manifest), fingerprint="another")
    enqueue = FakeDriver.download

    def wrong(self: FakeDriver, target: Any, source: int, stream: Any) -> None:
        enqueue(self, target, source, stream)
        stream.put(lambda: target.view(np.float32).reshape(-1, 4, 3)[2:].__iadd__(0.01))

    gpu.driver.download = MethodType(wrong, gpu.driver)
    with pytest.raises(BackendError, match="does not reproduce the model"):
        trust(gpu, directory, manifest)
