"""Batches: every voice gives the frames that it gives alone, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from streamtalk.backends.slots import encoder_runs, stretches

from streamtalk import AudioError, BackendError, SpeakerError, StreamError, Talker, UsageError
from streamtalk.backends import Choice, LaneState
from streamtalk.backends.onnxruntime import CpuSlots
from streamtalk.batch import Batch, BatchStream
from tests.runtime.toy import Toy, speech

Array = npt.NDArray[Any]
SECOND = 16000
SLOTS = 3
ROUNDING = 2e-6
"""Largest difference between slots, and between engines of the same weights and other batch sizes, float32: matrix
kernels take rows in blocks, and add up the last ones in another order. What a slot's neighbours hold changes no
bit. Vertices of the toy are below 8, where a float32 step is 5e-7; observed 0.
"""
PARITY = 1e-5  # float32 graphs against a float64 reference, as for streams


@dataclass(frozen=True)
class Part:
    """What one voice says: `n` samples made from `seed`, in pushes of at most `chunk`."""

    speaker: str
    seed: int
    n: int
    chunk: int

    @property
    def pcm(self) -> Array:
        return speech(self.n, self.seed)


CAST = (
    Part("ada", 1, 2 * SECOND, 160),
    Part("bo", 2, SECOND // 3, 5000),
    Part("cy", 3, SECOND + 77, 777),
    Part("ada", 4, 100, 50),  # too short for a frame
    Part("bo", 1, SECOND, 1600),  # the first one's seed, another face
    Part("cy", 6, SECOND // 2, 20000),
    Part("ada", 1, 2 * SECOND, 3000),  # the first one's twin, cut otherwise
)


@pytest.fixture(scope="module")
def many(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Talker:
    """The toy of `talker`, for three voices."""
    return Talker.load(toy.with_(batch=SLOTS).write(tmp_path_factory.mktemp("many")), threads=1)


def drain(batch: Batch) -> Iterator[tuple[BatchStream, Array]]:
    """All frames that are due, copied."""
    while made := batch.step():
        for stream, frame in made:
            yield stream, frame.vertices.copy()


def alone(talker: Talker, part: Part, slot: int = 0) -> Array:
    """The part's frames from this slot of a batch that nobody else uses."""
    with talker.batch() as batch:
        stream = [batch.open(part.speaker, seed=part.seed) for _ in range(slot + 1)][slot]
        stream.push(part.pcm)
        stream.flush()
        return np.array([vertices for _, vertices in drain(batch)]).reshape(-1, talker.manifest.n_vertices, 3)


def interrupted(talker: Talker, slots: type, where: str, monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """The first two parts' frames while Ctrl-C ends every third call of the method `where` of `slots`."""
    original: Any = getattr(slots, where)
    calls = 0

    def cut_short(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*arguments)
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(slots, where, cut_short)
    with talker.batch() as batch:
        streams = [batch.open(part.speaker, seed=part.seed) for part in CAST[:2]]
        frames: dict[BatchStream, list[Array]] = {stream: [] for stream in streams}
        for stream, part in zip(streams, CAST, strict=False):
            stream.push(part.pcm)
            stream.flush()
        while not all(stream.finished for stream in streams):
            try:
                made = batch.step()
            except KeyboardInterrupt:
                continue
            for stream, frame in made:
                frames[stream].append(frame.vertices.copy())
    assert calls > 3
    return [np.array(frames[stream]) for stream in streams]


def by_itself(talker: Talker, part: Part) -> Array:
    """The part's frames from `Talker.open`."""
    with talker.open(part.speaker, seed=part.seed) as stream:
        frames = [frame.vertices.copy() for frame in stream.push(part.pcm)]
        frames += [frame.vertices.copy() for frame in stream.flush()]
        return np.array(frames).reshape(-1, talker.manifest.n_vertices, 3)


def play(talker: Talker, cast: tuple[Part, ...], seed: int) -> list[tuple[int, Array]]:
    """Slot and frames of every part where all share the slots at random: each enters when a slot is free and it
    pleases, pushes or starves, is read now and then, and leaves when it has ended.
    """
    rng = np.random.default_rng(seed)
    frames: list[list[Array]] = [[] for _ in cast]
    slots = [0 for _ in cast]
    waiting = list(range(len(cast)))
    on_stage: dict[BatchStream, tuple[int, int]] = {}  # the part, and how much of it was pushed
    with talker.batch() as batch:
        while waiting or on_stage:
            if waiting and batch.free and rng.random() < 0.3:
                i = waiting.pop(int(rng.integers(len(waiting))))
                stream = batch.open(cast[i].speaker, seed=cast[i].seed)
                slots[i] = stream.slot
                on_stage[stream] = (i, 0)
            for stream, (i, done) in list(on_stage.items()):
                part = cast[i]
                if stream.finished:
                    stream.close()
                    del on_stage[stream]
                elif done < part.n and rng.random() < 0.6:
                    n = int(rng.integers(part.chunk + 1))
                    stream.push(part.pcm[done : done + n])
                    on_stage[stream] = (i, done + n)
                elif done >= part.n and not stream.stats().pending_frames and rng.random() < 0.5:
                    stream.flush()
            for _ in range(int(rng.integers(4))):
                for stream, frame in batch.step():
                    i, _ = on_stage[stream]
                    assert frame.index == len(frames[i])
                    frames[i].append(frame.vertices.copy())
    V = talker.manifest.n_vertices
    return [(slot, np.array(f).reshape(-1, V, 3)) for slot, f in zip(slots, frames, strict=True)]


TOYS = {
    "plain": Toy(),
    "hop 1": Toy(hop=1),
    "hop 5, 29 fps": Toy(hop=5, fps=29, window_samples=4000, context_samples=320),
    "windows with gaps": Toy(hop=6, window_samples=700, context_samples=0),
    "decode window of one": Toy(decode_window=1),
    "an encoder for two": Toy(hop=3, window_samples=3000, encoder_batch=2),
    "an encoder for one": Toy(encoder_batch=1),
}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS.keys())
def test_a_voice_among_others_gives_the_frames_it_gives_alone(toy: Toy, tmp_path: Path) -> None:
    many = Talker.load(toy.with_(batch=SLOTS).write(tmp_path / "many"), threads=1)
    one = Talker.load(toy.with_(encoder_batch=None).write(tmp_path / "one"), threads=1)
    for seed in (1, 2):
        for part, (slot, got) in zip(CAST, play(many, CAST, seed), strict=True):
            assert len(got) == part.n * toy.fps // SECOND
            np.testing.assert_array_equal(got, alone(many, part, slot))
            np.testing.assert_allclose(got, by_itself(one, part), rtol=0, atol=ROUNDING)


def slots_of(mask: str) -> Array:
    return np.array([c == "x" for c in mask], np.bool_)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("", []),
        ("...", []),
        ("xxx", [(0, 0, 3)]),
        (".xx.x", [(0, 1, 2), (2, 4, 1)]),
        ("x..x", [(0, 0, 1), (1, 3, 1)]),
    ],
)
def test_stretches(mask: str, expected: list[tuple[int, int, int]]) -> None:
    assert list(stretches(np.flatnonzero(slots_of(mask)))) == expected


@pytest.mark.parametrize(
    ("mask", "rows", "expected"),
    [
        ("....", 4, []),
        (".xx.x", 5, [[(1, 1, 2), (4, 4, 1)]]),  # rows of their own
        (".xx.x", 4, [[(1, 0, 2), (4, 2, 1)]]),
        (".xxx.x", 2, [[(1, 0, 2)], [(3, 0, 1), (5, 1, 1)]]),
        ("xxx", 1, [[(0, 0, 1)], [(1, 0, 1)], [(2, 0, 1)]]),
    ],
)
def test_what_each_run_of_the_encoder_hears(
    mask: str, rows: int, expected: list[list[tuple[int, int, int]]]
) -> None:
    assert list(encoder_runs(slots_of(mask), rows)) == expected


def test_every_slot_gives_the_same_frames(many: Talker) -> None:
    expected = alone(many, CAST[2])
    for slot in range(1, SLOTS):
        np.testing.assert_allclose(alone(many, CAST[2], slot), expected, rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(by_itself(many, CAST[2]), expected)  # `open` on an engine of many


def test_frames_equal_the_reference(toy: Toy, many: Talker) -> None:
    noise = np.random.default_rng(5).standard_normal((3, 60, 3)).astype(np.float32)
    with many.batch() as batch:
        streams = [batch.open(i, noise=noise[i]) for i in range(3)]
        frames: dict[BatchStream, list[Array]] = {stream: [] for stream in streams}
        for i, stream in enumerate(streams):
            stream.push(speech(SECOND + 5000 * i, i))
            stream.flush()
        for stream, vertices in drain(batch):
            frames[stream].append(vertices)
    for i, stream in enumerate(streams):
        expected = toy.reference(speech(SECOND + 5000 * i, i), noise[i], speaker=i)
        np.testing.assert_allclose(np.array(frames[stream]), expected, rtol=0, atol=PARITY)


def test_an_engine_of_one_is_a_batch_of_one(talker: Talker) -> None:
    np.testing.assert_array_equal(alone(talker, CAST[0]), by_itself(talker, CAST[0]))


def same(a: LaneState, b: LaneState) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("features", "kv_cache", "latents"))


@pytest.mark.parametrize("turns", [1, 2, 7])
def test_a_starving_voice_keeps_its_state_to_the_bit(many: Talker, turns: int) -> None:
    expected = alone(many, CAST[0])
    pcm = CAST[0].pcm
    with many.batch() as batch:
        starving, other = batch.open("ada", seed=1), batch.open("bo", seed=9)
        starving.push(pcm[:8000])
        got = [vertices for _, vertices in drain(batch)]
        before = starving.state()
        other.push(speech(SECOND))
        for _ in range(turns):
            assert [stream for stream, _ in batch.step()] == [other]
        after = starving.state()
        assert same(before.lane, after.lane)
        assert after.stream.frame == before.stream.frame == len(got)
        starving.push(pcm[8000:])
        starving.flush()
        got += [vertices for stream, vertices in drain(batch) if stream is starving]
    np.testing.assert_array_equal(np.array(got), expected)


def test_a_late_voice_delays_nobody(many: Talker) -> None:
    needed = round(many.delay_s * SECOND)
    with many.batch() as batch:
        prompt, late = batch.open(seed=1), batch.open(seed=2)
        assert batch.step() == []
        late.push(speech(needed - 1))  # one sample short of a hop
        prompt.push(speech(needed))
        for index in range(many.manifest.hop):
            (pair,) = batch.step()
            assert pair[0] is prompt
            assert (pair[1].index, pair[1].time_s) == (index, index / many.fps)
        assert batch.step() == []
        late.push(speech(1))
        assert [stream for stream, _ in batch.step()] == [late]
        prompt.push(speech(2 * SECOND))
        late.push(speech(2 * SECOND))
        assert [stream for stream, _ in batch.step()] == [prompt, late]  # at different places in their hops


def test_frames_are_views_with_their_own_blendshapes(many: Talker, talker: Talker) -> None:
    with many.batch() as batch:
        streams = [batch.open(i, seed=i) for i in range(SLOTS)]
        for stream in streams:
            stream.push(speech(SECOND))
        made = batch.step()
        for i, (_, frame) in enumerate(made):
            with talker.open(i, seed=i) as single:
                expected = next(single.push(speech(SECOND)))
                np.testing.assert_allclose(frame.vertices, expected.vertices, rtol=0, atol=ROUNDING)
                assert frame.blendshapes is not None
                assert expected.blendshapes is not None
                # The toy's solver multiplies by up to 10.
                np.testing.assert_allclose(
                    frame.blendshapes, expected.blendshapes, rtol=0, atol=50 * ROUNDING
                )
                assert not frame.vertices.flags.writeable
                assert not frame.blendshapes.flags.writeable
        held = made[0][1].vertices
        before = held.copy()
        ((_, frame), *_) = batch.step()
        assert np.shares_memory(frame.vertices, held)
        assert not np.array_equal(held, before)


def test_a_slot_is_used_again_as_if_it_were_new(many: Talker) -> None:
    with many.batch() as fresh, many.batch() as batch:
        expected = fresh.open("cy").state()
        for _ in range(2):  # closed and reset after an odd and an even number of turns
            stream = batch.open("bo", seed=5)
            stream.push(speech(SECOND))
            for _ in range(9):
                batch.step()
            stream.reset()
            assert same(stream.state().lane, expected.lane)
            assert stream.stats() == fresh.streams[0].stats()
            stream.push(speech(SECOND))
            batch.step()
            stream.close()
            again = batch.open("cy")
            assert again.slot == stream.slot
            assert same(again.state().lane, expected.lane)
            assert again.stats() == fresh.streams[0].stats()
            again.close()
        for part in CAST[:3]:
            stream = batch.open(part.speaker, seed=part.seed)
            stream.push(part.pcm)
            stream.flush()
            np.testing.assert_array_equal(np.array([v for _, v in drain(batch)]), alone(many, part))
            assert stream.finished
            stream.close()


def test_closing_in_the_middle_leaves_the_others_alone(many: Talker) -> None:
    part, leaver = CAST[0], CAST[2]
    with many.batch() as batch:
        gone, stays = (batch.open(p.speaker, seed=p.seed) for p in (leaver, part))
        for stream, of in ((gone, leaver), (stays, part)):
            stream.push(of.pcm)
        got = []
        for stream, frame in [pair for _ in range(11) for pair in batch.step()]:
            assert stream in (gone, stays)
            if stream is stays and frame.index == 10:
                got.append(frame.vertices.copy())
        gone.close()
        gone.close()
        figures = gone.stats()
        newcomer = batch.open("bo")
        newcomer.push(speech(SECOND))
        stays.flush()
        got += [vertices for stream, vertices in drain(batch) if stream is stays]
        assert gone.stats() == figures
        assert figures.frames == 11
        gone.close()  # again: not the newcomer
        assert batch.streams == (newcomer, stays)
    np.testing.assert_array_equal(np.array(got), alone(many, part, slot=1)[10:])


def test_more_voices_than_slots_are_refused(many: Talker) -> None:
    with many.batch() as batch:
        streams = [batch.open() for _ in range(SLOTS)]
        assert (batch.size, batch.free, batch.streams) == (SLOTS, 0, tuple(streams))
        with pytest.raises(
            StreamError, match=r"All 3 slots of this batch are taken: close a stream.*--batch"
        ):
            batch.open()
        streams[1].close()
        assert batch.free == 1
        assert batch.open().slot == 1


def test_a_refused_voice_takes_no_slot(many: Talker) -> None:
    with many.batch() as batch:
        with pytest.raises(SpeakerError, match="zoe"):
            batch.open("zoe")
        with pytest.raises(UsageError, match="seed"):
            batch.open(seed=-1)
        with pytest.raises(UsageError, match="template"):
            batch.open(template=np.zeros(5))
        assert batch.free == SLOTS


def test_what_is_closed_or_flushed_says_so(many: Talker) -> None:
    batch = many.batch()
    stream, other = batch.open(), batch.open()
    stream.push(speech(SECOND))
    stream.flush()
    assert not stream.finished
    ended: list[Callable[[], object]] = [stream.flush, lambda: stream.push(speech(1))]
    for call in ended:
        with pytest.raises(StreamError, match="reset"):
            call()
    other.close()
    refused: list[Callable[[], object]] = [
        other.flush,
        other.reset,
        other.state,
        lambda: other.push(speech(1)),
    ]
    for call in refused:
        with pytest.raises(StreamError, match="This stream is closed"):
            call()
    batch.close()
    batch.close()
    with pytest.raises(StreamError, match="This batch is closed"):
        batch.step()
    with pytest.raises(StreamError, match="This batch is closed"):
        batch.open()
    with pytest.raises(StreamError, match="This stream is closed"):
        stream.push(speech(1))
    assert stream.stats().samples == SECOND


def test_bad_audio_harms_neither_the_voice_nor_the_others(many: Talker) -> None:
    with many.batch() as batch:
        streams = [batch.open(part.speaker, seed=part.seed) for part in CAST[:2]]
        frames: dict[BatchStream, list[Array]] = {stream: [] for stream in streams}
        for stream, part in zip(streams, CAST, strict=False):
            stream.push(part.pcm)
            with pytest.raises(AudioError, match="not a number"):
                stream.push(np.array([np.nan], np.float32))
            stream.flush()
        for stream, vertices in drain(batch):
            frames[stream].append(vertices)
    for stream, part in zip(streams, CAST, strict=False):
        np.testing.assert_array_equal(np.array(frames[stream]), alone(many, part, stream.slot))


def test_noise_that_fails_is_named_and_costs_the_others_nothing(many: Talker) -> None:
    part = CAST[0]
    with many.batch() as batch:
        sound = batch.open(part.speaker, seed=part.seed)
        failing = batch.open(noise=np.zeros((4, 3), np.float32))
        for stream in (sound, failing):
            stream.push(part.pcm)
            stream.flush()
        got = [frame.vertices.copy() for _ in range(4) for s, frame in batch.step() if s is sound]
        for _ in range(2):
            with pytest.raises(StreamError, match=r"stream in slot 1 failed at its frame 4.*4 rows"):
                batch.step()
        failing.close()
        got += [vertices for _, vertices in drain(batch)]
    np.testing.assert_array_equal(np.array(got), alone(many, part))


@pytest.mark.parametrize("where", ["encode", "frame", "vertices"])
def test_an_interrupted_step_is_simply_done_again(
    many: Talker, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(many, part, slot) for slot, part in enumerate(CAST[:2])]
    for got, want in zip(interrupted(many, CpuSlots, where, monkeypatch), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_interrupt_between_the_runs_of_a_small_encoder(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker = Talker.load(toy.with_(batch=SLOTS, encoder_batch=1).write(tmp_path), threads=1)
    expected = [alone(talker, part) for part in CAST[:2]]
    calls = 0

    def cut_short(due: Any, rows: int) -> Iterator[Any]:
        nonlocal calls
        for parts in encoder_runs(due, rows):
            calls += 1
            if calls % 3 == 0:
                raise KeyboardInterrupt
            yield parts

    monkeypatch.setattr("streamtalk.backends.onnxruntime.encoder_runs", cut_short)
    for got, want in zip(interrupted(talker, CpuSlots, "vertices", monkeypatch), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert calls > 6


def test_a_voice_moves_between_slots_and_streams(many: Talker) -> None:
    part = CAST[0]
    expected = alone(many, part)
    with many.batch() as batch, many.open(part.speaker, seed=part.seed) as single:
        for _ in zip(range(7), single.push(part.pcm), strict=False):  # in the middle of a hop
            pass
        snapshot = single.state()
        with batch.open() as first:
            first.push(speech(SECOND))
            batch.step()  # an odd turn: the sides no longer follow the frame's parity
        batch.open().push(speech(SECOND))  # is encoded while the other is in mid-hop
        stream = batch.open(part.speaker, seed=part.seed)
        stream.restore(snapshot)
        stream.flush()
        got = [vertices for s, vertices in drain(batch) if s is stream]
        np.testing.assert_allclose(np.array(got), expected[7:], rtol=0, atol=ROUNDING)
        stream.restore(snapshot)
        batch.step()
        single.restore(stream.state())
        rest = [frame.vertices.copy() for frame in single.flush()]
        np.testing.assert_allclose(np.array(rest), expected[8:], rtol=0, atol=ROUNDING)


def test_a_snapshot_of_another_model_is_refused(many: Talker, tmp_path: Path) -> None:
    foreign = Talker.load(Toy(history=6).write(tmp_path / "other")).open()
    with many.batch() as batch:
        stream = batch.open()
        with pytest.raises(StreamError, match=r"of another model: its kv_cache are \[2, 2, 2, 6, 2\], here"):
            stream.restore(foreign.state())


def test_figures_are_a_streams_own(many: Talker) -> None:
    with many.batch() as batch:
        busy, idle = batch.open(), batch.open()
        busy.push(speech(SECOND))
        idle.push(speech(100))
        for _ in range(5):
            batch.step()
        figures = busy.stats()
        assert (figures.frames, figures.samples, figures.pending_frames) == (5, SECOND, 23)
        assert 0 < figures.latency_ms.p50 <= figures.latency_ms.max
        assert (idle.stats().frames, idle.stats().samples, idle.stats().compute_s) == (0, 100, 0)
        assert busy.delay_s == many.delay_s
        np.testing.assert_array_equal(idle.template, many.identity.templates[0])


def test_a_backend_without_slots_says_what_to_do(talker: Talker) -> None:
    backend: Any = SimpleNamespace(name="abacus")
    with pytest.raises(BackendError, match=r"abacus runs one voice a launch.*onnxruntime-cpu"):
        replace(talker, choice=Choice(backend)).batch()
