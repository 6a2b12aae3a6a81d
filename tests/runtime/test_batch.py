"""Batches: every stream gives the frames that it gives alone, in few launches, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk import AudioError, BackendError, SpeakerError, Stream, StreamError, Talker, UsageError
from streamtalk.backends.onnxruntime import CpuRows
from streamtalk.batch import Batch
from tests.runtime.drive import NOTHING, SECOND, Array, CtrlC, chunks, kept, same, whole
from tests.runtime.toy import Toy, speech

HOP, ROWS = 4, 3
TOY = Toy(hop=HOP, window_samples=4000, rows=(ROWS,))
OTHER_ROWS = 2e-5
"""Between graphs of different numbers of rows, whose kernels may add up in another order; observed 0. Between rows of
one graph there is no difference.
"""
PARITY = 1e-5  # float32 graphs against a float64 reference, as for streams


@dataclass(frozen=True)
class Part:
    """What one stream is given: `n` samples made from `seed`, in pushes of at most `chunk`."""

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
    Part("bo", 7, SECOND, 320),
)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    return Talker.load(TOY.write(tmp_path_factory.mktemp("many")), threads=1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of active rows of every launch of several."""
    counts: list[int] = []
    launch = CpuRows.launch

    def counted(rows: CpuRows, active: Any) -> None:
        if active.size == ROWS:
            counts.append(int(active.sum()))
        launch(rows, active)

    monkeypatch.setattr(CpuRows, "launch", counted)
    return counts


def drain(batch: Batch, tick: int | None = None) -> Iterator[tuple[Stream, Array]]:
    """Copies of the vertices of all frames that are due."""
    while made := batch.step(tick):
        for stream, frames in made:
            for frame in frames:
                yield stream, frame.vertices.copy()


def alone(talker: Talker, part: Part, row: int = 0) -> Array:
    """The part's frames from this row of a launch that nobody else uses."""
    with talker.batch() as batch:
        stream = [batch.open(part.speaker, seed=part.seed) for _ in range(row + 1)][row]
        stream.push(part.pcm)
        stream.flush()
        return np.array([vertices for _, vertices in drain(batch)]).reshape(-1, *stream.template.shape)


def by_itself(talker: Talker, part: Part) -> Array:
    """The part's frames from `Talker.open`."""
    with talker.open(part.speaker, seed=part.seed) as stream:
        return whole(stream, part.pcm)


def play(talker: Talker, cast: tuple[Part, ...], seed: int, size: int, ticks: bool) -> list[Array]:
    """Frames of every part where all share the rows at random: each enters when a row is free and it pleases, pushes or
    pauses, is stepped now and then, and leaves when it has ended.
    """
    rng = np.random.default_rng(seed)
    frames: list[list[Array]] = [[] for _ in cast]
    waiting, tick = list(range(len(cast))), 0
    playing: dict[Stream, tuple[int, int]] = {}  # the part, and how much of it was pushed
    with talker.batch(size) as batch:
        while waiting or playing:
            if waiting and batch.free and rng.random() < 0.3:
                i = waiting.pop(int(rng.integers(len(waiting))))
                playing[batch.open(cast[i].speaker, seed=cast[i].seed)] = (i, 0)
            for stream, (i, done) in list(playing.items()):
                part = cast[i]
                if stream.finished:
                    stream.close()
                    del playing[stream]
                elif done < part.n and rng.random() < 0.6:
                    n = int(rng.integers(part.chunk + 1))
                    stream.push(part.pcm[done : done + n])
                    playing[stream] = (i, done + n)
                elif done >= part.n and not stream.stats().pending_frames and rng.random() < 0.5:
                    stream.flush()
            tick += int(rng.integers(4))
            for _ in range(int(rng.integers(4))):
                for stream, made in batch.step(tick if ticks else None):
                    i, _ = playing[stream]
                    assert [frame.index for frame in made] == [
                        *range(len(frames[i]), len(frames[i]) + len(made))
                    ]
                    frames[i] += kept(made)
    return [np.array(part).reshape(-1, talker.manifest.n_vertices, 3) for part in frames]


TOYS = {
    "hop 4": TOY,
    "hop 1": Toy(hop=1),
    "hop 5, 29 fps": Toy(hop=5, fps=29, window_samples=4000, context_samples=320),
    "windows with gaps": Toy(hop=6, window_samples=700, context_samples=0),
    "decode window of one": Toy(decode_window=1),
}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS.keys())
def test_a_stream_among_others_gives_the_frames_it_gives_alone(toy: Toy, tmp_path: Path) -> None:
    talker = Talker.load(toy.with_(rows=(ROWS,)).write(tmp_path), threads=1)
    for seed, size, ticks in ((1, 3, False), (2, 7, False), (3, 7, True), (4, 12, True)):
        for part, got in zip(CAST, play(talker, CAST, seed, size, ticks), strict=True):
            assert len(got) == part.n * toy.fps // SECOND
            np.testing.assert_array_equal(got, alone(talker, part))
            np.testing.assert_allclose(got, by_itself(talker, part), rtol=0, atol=OTHER_ROWS)


def test_every_row_gives_the_same_frames(many: Talker) -> None:
    for row in range(1, ROWS):
        np.testing.assert_array_equal(alone(many, CAST[2], row), alone(many, CAST[2]))


def test_frames_equal_the_reference(many: Talker) -> None:
    noise = np.random.default_rng(5).standard_normal((3, 60, 3)).astype(np.float32)
    with many.batch() as batch:
        streams = [batch.open(i, noise=noise[i]) for i in range(3)]
        frames: dict[Stream, list[Array]] = {stream: [] for stream in streams}
        for i, stream in enumerate(streams):
            stream.push(speech(SECOND + 5000 * i, i))
            stream.flush()
        for stream, vertices in drain(batch):
            frames[stream].append(vertices)
    for i, stream in enumerate(streams):
        expected = TOY.reference(speech(SECOND + 5000 * i, i), noise[i], speaker=i)
        np.testing.assert_allclose(np.array(frames[stream]), expected, rtol=0, atol=PARITY)


def test_a_model_of_one_row_makes_batches_too(talker: Talker) -> None:
    np.testing.assert_array_equal(alone(talker, CAST[0]), by_itself(talker, CAST[0]))
    for got, part in zip(play(talker, CAST, 1, 3, True), CAST, strict=True):
        np.testing.assert_array_equal(got, by_itself(talker, part))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_starving_stream_keeps_its_state_to_the_bit(many: Talker, steps: int) -> None:
    pcm = CAST[0].pcm
    with many.batch() as batch:
        starving, other = batch.open("ada", seed=1), batch.open("bo", seed=9)
        starving.push(pcm[:8000])
        got = [vertices for _, vertices in drain(batch)]
        before = starving.state()
        other.push(speech(SECOND))
        for _ in range(steps):
            assert [stream for stream, _ in batch.step()] == [other]
        assert same(starving.state(), before)
        assert before.frame == before.index == len(got)
        starving.push(pcm[8000:])
        starving.flush()
        got += [vertices for stream, vertices in drain(batch) if stream is starving]
    np.testing.assert_array_equal(np.array(got), alone(many, CAST[0]))


def test_a_late_stream_delays_nobody(many: Talker) -> None:
    needed = round(many.delay_s * SECOND)
    with many.batch() as batch:
        prompt, late = batch.open(seed=1), batch.open(seed=2)
        assert batch.step() == []
        late.push(speech(needed - 1))  # one sample short of a hop
        prompt.push(speech(needed))
        ((stream, frames),) = batch.step()
        assert stream is prompt
        assert [(f.index, f.time_s) for f in frames] == [(i, i / many.fps) for i in range(HOP)]
        assert batch.step() == []
        late.push(speech(1))
        assert [stream for stream, _ in batch.step()] == [late]
        prompt.push(speech(2 * SECOND))
        late.push(speech(2 * SECOND))
        assert [stream for stream, _ in batch.step()] == [prompt, late]


def test_frames_are_views_with_their_own_blendshapes(many: Talker) -> None:
    with many.batch() as batch:
        streams = [batch.open(i, seed=i) for i in range(ROWS)]
        for stream in streams:
            stream.push(speech(SECOND))
        made = batch.step()
        for i, (_, frames) in enumerate(made):
            with many.open(i, seed=i) as single:
                for frame, expected in zip(frames, single.push(speech(SECOND)), strict=False):
                    np.testing.assert_allclose(frame.vertices, expected.vertices, rtol=0, atol=OTHER_ROWS)
                    assert frame.blendshapes is not None
                    assert expected.blendshapes is not None
                    # The toy's solver multiplies by up to 10.
                    np.testing.assert_allclose(
                        frame.blendshapes, expected.blendshapes, rtol=0, atol=50 * OTHER_ROWS
                    )
                    assert not frame.vertices.flags.writeable
                    assert not frame.blendshapes.flags.writeable
        held = made[0][1][0].vertices
        before = held.copy()
        ((_, frames), *_) = batch.step()
        assert np.shares_memory(frames[0].vertices, held)
        assert not np.array_equal(held, before)


def test_a_row_is_used_again_as_if_it_were_new(many: Talker) -> None:
    with many.batch() as fresh, many.batch() as batch:
        new = fresh.open("cy")
        for _ in range(2):  # closed and reset after an odd and an even number of launches
            stream = batch.open("bo", seed=5)
            stream.push(speech(SECOND))
            for _ in range(5):
                batch.step()
            stream.reset()
            assert same(stream.state(), new.state())
            assert stream.stats() == new.stats()
            stream.push(speech(SECOND))
            batch.step()
            stream.close()
            with batch.open("cy") as again:
                assert same(again.state(), new.state())
                assert again.stats() == new.stats()
        for part in CAST[:3]:
            with batch.open(part.speaker, seed=part.seed) as stream:
                stream.push(part.pcm)
                stream.flush()
                np.testing.assert_array_equal(np.array([v for _, v in drain(batch)]), alone(many, part))
                assert stream.finished


def test_closing_in_the_middle_leaves_the_others_alone(many: Talker) -> None:
    part, leaver = CAST[0], CAST[2]
    with many.batch() as batch:
        gone, stays = (batch.open(p.speaker, seed=p.seed) for p in (leaver, part))
        gone.push(leaver.pcm)
        stays.push(part.pcm)
        got = [
            vertices
            for _ in range(3)
            for stream, made in batch.step()
            for vertices in kept(made)
            if stream is stays
        ]
        gone.close()
        gone.close()
        figures = gone.stats()
        newcomer = batch.open("bo")
        newcomer.push(speech(SECOND))
        stays.flush()
        got += [vertices for stream, vertices in drain(batch) if stream is stays]
        assert gone.stats() == figures
        assert figures.frames == 3 * HOP
        gone.close()  # again: not the newcomer
        assert set(batch.streams) == {newcomer, stays}
    np.testing.assert_array_equal(np.array(got), alone(many, part))


@pytest.mark.parametrize(("size", "groups"), [(None, 1), (1, 1), (2, 1), (3, 1), (4, 2), (10, 4)])
def test_a_batch_has_the_groups_that_hold_its_streams(many: Talker, size: int | None, groups: int) -> None:
    with many.batch(size) as batch:
        assert (batch.size, batch.free, batch.streams) == (size or ROWS, size or ROWS, ())
        assert len(batch._groups) == groups
        assert len(batch._groups[0].streams) == (1 if size == 1 else ROWS)
        streams = {batch.open() for _ in range(batch.size)}
        assert set(batch.streams) == streams
        with pytest.raises(StreamError, match=r"Expected a free row, got a batch.*close one first"):
            batch.open()
        streams.pop().close()
        assert batch.free == 1
        batch.open()
        assert batch.free == 0


@pytest.mark.parametrize("size", [0, -1, 5000, True, 2.0, "3"])
def test_a_batch_is_of_a_number_of_streams(many: Talker, size: Any) -> None:
    with pytest.raises(UsageError, match="`streams` must be 1 to 4096"):
        many.batch(size)


def test_a_refused_stream_takes_no_row(many: Talker) -> None:
    with many.batch() as batch:
        with pytest.raises(SpeakerError, match="zoe"):
            batch.open("zoe")
        with pytest.raises(UsageError, match="seed"):
            batch.open(seed=-1)
        with pytest.raises(UsageError, match="template"):
            batch.open(template=np.zeros(5))
        assert batch.free == ROWS


def test_a_closed_or_flushed_stream_says_so(many: Talker) -> None:
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
    for call in (batch.step, batch.open):
        with pytest.raises(StreamError, match="This batch is closed"):
            call()
    with pytest.raises(StreamError, match="This stream is closed"):
        stream.push(speech(1))
    assert stream.stats().samples == SECOND


def test_frames_come_from_steps_alone(many: Talker) -> None:
    with many.batch() as batch:
        stream = batch.open("ada", seed=1)
        for frames in (stream.push(CAST[0].pcm), stream.flush()):
            with pytest.raises(StreamError, match=r"its frames come from `Batch.step`"):
                next(frames)
        np.testing.assert_array_equal(np.array([v for _, v in drain(batch)]), alone(many, CAST[0]))


def test_bad_audio_harms_neither_the_stream_nor_the_others(many: Talker) -> None:
    with many.batch() as batch:
        streams = [batch.open(part.speaker, seed=part.seed) for part in CAST[:2]]
        frames: dict[Stream, list[Array]] = {stream: [] for stream in streams}
        for stream, part in zip(streams, CAST, strict=False):
            stream.push(part.pcm)
            with pytest.raises(AudioError, match="not a number"):
                stream.push(np.array([np.nan], np.float32))
            stream.flush()
        for stream, vertices in drain(batch):
            frames[stream].append(vertices)
    for stream, part in zip(streams, CAST, strict=False):
        np.testing.assert_array_equal(np.array(frames[stream]), alone(many, part))


def test_noise_that_fails_is_named_and_costs_the_others_nothing(many: Talker) -> None:
    part = CAST[0]
    with many.batch() as batch:
        sound = batch.open(part.speaker, seed=part.seed)
        failing = batch.open(noise=np.zeros((6, 3), np.float32))
        for stream in (sound, failing):
            stream.push(part.pcm)
            stream.flush()
        got = [vertices for stream, made in batch.step() for vertices in kept(made) if stream is sound]
        for _ in range(2):
            with pytest.raises(
                StreamError, match=r"`batch.streams\[1\]` failed in .* frame 4 .*6 rows and frame 6"
            ):
                batch.step()
        assert batch.streams[1] is failing
        failing.close()
        got += [vertices for _, vertices in drain(batch)]
    np.testing.assert_array_equal(np.array(got), alone(many, part))


@pytest.mark.parametrize("ticks", [False, True])
def test_a_step_that_ctrl_c_ends_anywhere_is_done_again(many: Talker, ticks: bool) -> None:
    """With pauses, after which streams move between groups."""
    parts = [Part(name, seed, SECOND // 2, 0) for seed, name in enumerate(("ada", "bo", "cy", "ada", "bo"))]
    ctrl_c, rng, tick, lost = CtrlC(), np.random.default_rng(0), 0, 0
    with many.batch(8) as batch:
        streams = {batch.open(part.speaker, seed=part.seed): part for part in parts}
        got: dict[Stream, dict[int, Array]] = {stream: {} for stream in streams}
        pushed = dict.fromkeys(streams, 0)
        while not all(stream.finished for stream in streams):
            tick += 1
            for stream, part in streams.items():
                if rng.random() < 0.5 and pushed[stream] < part.n:
                    n = int(rng.integers(2000))
                    stream.push(part.pcm[pushed[stream] : pushed[stream] + n])
                    pushed[stream] += n
                    if pushed[stream] >= part.n:
                        stream.flush()
            made: Any = True
            while made:
                before = {stream: stream.stats().frames for stream in streams}
                try:
                    made = ctrl_c(partial(batch.step, tick if ticks else None))
                except KeyboardInterrupt:
                    counted = [stream.stats().frames - before[stream] for stream in streams]
                    assert all(0 <= n <= HOP for n in counted)
                    lost += any(counted)
                    continue
                for stream, frames in made:
                    assert frames[0].index == before[stream]
                    got[stream].update({frame.index: frame.vertices.copy() for frame in frames})
        assert set(batch.streams) == set(streams)
        assert ctrl_c.ended > 1000
        for stream, part in streams.items():
            expected = alone(many, part)
            for index, vertices in got[stream].items():
                np.testing.assert_array_equal(vertices, expected[index])
        # A launch is lost where Ctrl-C comes between its count and its reader, which is one line.
        assert lost <= ctrl_c.sweeps
        assert sum(map(len, got.values())) > 20


def test_figures_are_a_streams_own(many: Talker) -> None:
    with many.batch() as batch:
        busy, idle = batch.open(), batch.open()
        busy.push(speech(SECOND))
        idle.push(speech(100))
        for _ in range(2):
            batch.step()
        figures = busy.stats()
        assert (figures.frames, figures.samples, figures.pending_frames) == (2 * HOP, SECOND, 20)
        assert 0 < figures.latency_ms.p50 <= figures.latency_ms.max
        assert (idle.stats().frames, idle.stats().samples, idle.stats().compute_s) == (0, 100, 0)
        assert busy.delay_s == many.delay_s
        np.testing.assert_array_equal(idle.template, many.identity.templates[0])
        with pytest.raises(BackendError, match="computes on the CPU"):
            _ = batch.device_vertices
        with pytest.raises(BackendError, match="computes on the CPU"):
            _ = busy.device_vertices


@dataclass
class Caller:
    """One who talks to a batch in real time: audio from tick `start` on, `talks` of it silent where it is False."""

    start: int
    chunk_s: float
    talks: Callable[[float], bool] = bool


@dataclass
class Live:
    """What came of it: frames by caller, and each hop's wait beyond what the stream said."""

    frames: list[list[Array]]
    excess_s: list[float]


def live(talker: Talker, size: int, callers: list[Caller], seconds: float, ticks: bool) -> Live:
    """Play callers on a batch in simulated time, in which launches take none; pushes come in whole chunks."""
    fps, result = talker.fps, Live([[] for _ in callers], [])
    with talker.batch(size) as batch:
        streams: dict[Stream, tuple[int, int, list[float]]] = {}
        for tick in range(round(seconds * fps)):
            now = tick / fps
            for i, caller in enumerate(callers):
                if tick == caller.start:
                    streams[batch.open(i % 3, seed=i)] = (i, tick, [])
            for stream, (i, start, arrivals) in streams.items():
                chunk_s, pcm = callers[i].chunk_s, speech(round(seconds * SECOND), i)
                while (arrival := start / fps + (len(arrivals) + 1) * chunk_s) <= now + 1e-9:
                    n = round(chunk_s * SECOND)
                    if callers[i].talks(arrival):
                        done = stream.stats().samples
                        stream.push(pcm[done : done + n])
                    arrivals.append(arrival)
            while made := batch.step(tick if ticks else None):
                for stream, frames in made:
                    i, start, _ = streams[stream]
                    result.frames[i] += kept(frames)
                    allowed = stream.delay_s + callers[i].chunk_s + 1 / fps
                    result.excess_s.append(now - start / fps - frames[0].time_s - allowed)
    for i, part in enumerate(result.frames):
        with talker.open(i % 3, seed=i) as single:
            expected = kept(single.push(speech(round(seconds * SECOND), i)))
        np.testing.assert_allclose(part, expected[: len(part)], rtol=0, atol=OTHER_ROWS)
    return result


SECONDS = 4.0
HOPS = round(SECONDS * 30 / HOP)


@pytest.mark.parametrize("chunk_s", [0.02, 0.1])
@pytest.mark.parametrize("ticks", [False, True])
def test_streams_that_start_together_share_launches(
    many: Talker, launches: list[int], chunk_s: float, ticks: bool
) -> None:
    result = live(many, 12, [Caller(0, chunk_s) for _ in range(7)], SECONDS, ticks)
    assert max(result.excess_s) <= 1e-6
    assert all(len(frames) > 30 * (SECONDS - 0.5) for frames in result.frames)
    assert len(launches) <= 3 * HOPS  # 7 streams in rows of 3
    assert sum(launches) == sum(len(frames) for frames in result.frames) / HOP


@pytest.mark.parametrize("chunk_s", [0.02, 0.1])
@pytest.mark.parametrize("ticks", [False, True])
@pytest.mark.parametrize("size", [9, 12, 24])
def test_streams_of_all_phases_wait_less_than_a_hop(
    many: Talker, launches: list[int], chunk_s: float, ticks: bool, size: int
) -> None:
    callers = [Caller(start, chunk_s) for start in (0, 1, 1, 2, 3, 5, 7, 10, 14)]
    result = live(many, size, callers, SECONDS, ticks)
    assert max(result.excess_s) <= 1e-6
    assert all(len(frames) > 30 * (SECONDS - 1.1) for frames in result.frames)
    # Less than one a tick where there is room to move, and a few until then; one for each stream would be 9 a hop.
    assert len(launches) <= (HOP + 1 if ticks or size > 9 else 7) * HOPS


@pytest.mark.parametrize("chunk_s", [0.02, 0.1])
@pytest.mark.parametrize("ticks", [False, True])
def test_a_talking_minority_shares_launches(
    many: Talker, launches: list[int], chunk_s: float, ticks: bool
) -> None:
    """All rows but one are taken; after a second all streams pause, and after another one three go on."""

    def talks(i: int, now: float) -> bool:
        return now < 1 or (now > 2 and i % 4 == 0)

    callers = [Caller(0, chunk_s, partial(talks, i)) for i in range(11)]
    result = live(many, 12, callers, SECONDS, ticks)
    assert len(launches) <= 4 * 30 // HOP + 2 * 30 // HOP + 3
    assert all(len(result.frames[i]) > 60 for i in range(0, 11, 4))


@pytest.mark.parametrize("ticks", [False, True])
def test_streams_that_pause_come_back_in_place(many: Talker, launches: list[int], ticks: bool) -> None:
    def talks(i: int, now: float) -> bool:
        return (1.7 * now + 0.31 * i) % 1 < 0.6

    callers = [Caller(2 * i, 0.02, partial(talks, i)) for i in range(8)]
    result = live(many, 12, callers, 2 * SECONDS, ticks)
    assert all(len(frames) > 100 for frames in result.frames)
    assert len(launches) <= HOP * 2 * HOPS


def test_the_wait_counts_in_the_delay(many: Talker) -> None:
    needed = -(-round(many.delay_s * SECOND) * 30 // SECOND)
    with many.batch(12) as batch:  # four groups, one for each phase
        assert batch.step(10) == []
        streams = [batch.open(seed=i) for i in range(12)]
        waits = [round((stream.delay_s - many.delay_s) * 30) for stream in streams]
        assert waits == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert [made for tick in range(11, 10 + needed) for made in batch.step(tick)] == []
        for stream in streams:
            stream.push(speech(SECOND // 4))
        for wait in range(HOP):
            made = batch.step(10 + needed + wait)
            assert [stream for stream, _ in made] == streams[3 * wait : 3 * wait + 3]
            assert batch.step(10 + needed + wait) == []
            assert [s.delay_s for s, _ in made] == [many.delay_s + wait / 30] * 3
    with many.batch(12) as batch:  # nobody waits for a tick that never comes
        assert [batch.open().delay_s for _ in range(12)] == [many.delay_s] * 12


def test_a_stream_that_moves_goes_on_to_the_bit(many: Talker) -> None:
    part = CAST[0]
    with many.batch(12) as batch:
        mover, other = batch.open(part.speaker, seed=part.seed), batch.open()
        got, places, tick = [], set(), 0
        for i, pcm in enumerate(chunks(part.pcm, 2500)):
            tick += 3 + i % 4
            mover.push(pcm)
            other.push(speech(700, i))
            for t in range(tick, tick + HOP):
                got += [vertices for stream, vertices in drain(batch, t) if stream is mover]
                places.add(id(mover._at[0]))
            tick += HOP
        mover.flush()
        got += [vertices for stream, vertices in drain(batch) if stream is mover]
        assert len(places) > 2
    np.testing.assert_array_equal(np.array(got), alone(many, part))


def test_ticks_that_are_left_out_starve_nobody(many: Talker) -> None:
    with many.batch(12) as batch:
        streams = [batch.open(seed=i) for i in range(12)]
        for tick in range(0, 10 * HOP, HOP):  # always of one phase
            for stream in streams:
                stream.push(speech(HOP * SECOND // 30 + 1))
            for _ in drain(batch, tick):
                pass
        assert all(stream.stats().frames >= 7 * HOP for stream in streams)


@pytest.mark.parametrize("tick", [None, 0])
def test_seconds_in_a_queue_starve_nobody(many: Talker, tick: int | None) -> None:
    with many.batch(18) as batch:  # two groups of phase 0
        streams = [batch.open(seed=i) for i in range(18)]
        for stream in streams[:ROWS]:
            stream.push(speech(10 * SECOND))
        batch.step(tick)
        for stream in streams[ROWS:]:
            stream.push(speech(SECOND // 2))
        reached: set[Stream] = set()
        for _ in range(6 if tick is None else 2):
            reached.update(stream for stream, _ in batch.step(tick))
        assert len(reached) == (18 if tick is None else 6)


def test_pushing_nothing_changes_nothing(many: Talker) -> None:
    with many.batch() as batch:
        stream = batch.open()
        before = stream.state()
        stream.push(NOTHING)
        assert batch.step() == []
        assert same(stream.state(), before)
