"""Snapshots: to the bit from anywhere in a hop, in any process; nothing but StreamError for what is damaged."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk import Snapshot, Stream, StreamError, Talker
from streamtalk.rows import RowState
from streamtalk.snapshot import DIGEST_BYTES, LARGEST, MAGIC, SIZE_BYTES
from tests.runtime.drive import NOTHING, SECOND, Array, kept, same
from tests.runtime.toy import Toy, speech

HOP, ROWS = 4, 3
PCM = speech(SECOND + 700)
OTHER_ROWS = 2e-5
"""Between graphs of different numbers of rows, whose kernels may add up in another order; observed 0."""
POINTS = {
    "new": (0, False),
    "mid-hop": (5, False),
    "last frame of a hop": (7, False),
    "between hops": (8, False),
    "all that is ready": (99, False),
    "flushed": (0, True),
    "flushed, in the last hop": (29, True),
    "finished": (99, True),
}
"""Frames that were read, and whether the audio had ended."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Toy(hop=HOP, window_samples=4000, rows=(ROWS,)).write(
        tmp_path_factory.mktemp("snapshots") / "engine"
    )


@pytest.fixture(scope="module")
def talker(folder: Path) -> Talker:
    return Talker.load(folder, threads=1)


def played(talker: Talker, read: int, ended: bool) -> Stream:
    """A stream of which so many frames were read."""
    stream = talker.open("bo", seed=4)
    frames = stream.push(PCM)
    if ended:
        frames = stream.flush()
    for _ in zip(range(read), frames, strict=False):
        pass
    return stream


def rest(stream: Stream) -> Array:
    """All frames that are left of a stream that was restored."""
    frames = kept(stream.push(NOTHING)) if not stream.state().ended else []
    return np.array(frames + kept(stream.flush())).reshape(-1, 4, 3)


def expected(talker: Talker, stream: Stream) -> Array:
    """The frames that are left of `played`."""
    with talker.open("bo", seed=4) as whole:
        frames = kept(whole.push(PCM)) + kept(whole.flush())
    return np.array(frames[stream.stats().frames :]).reshape(-1, 4, 3)


@pytest.mark.parametrize(("read", "ended"), POINTS.values(), ids=POINTS.keys())
def test_streams_go_back_and_on_elsewhere(talker: Talker, read: int, ended: bool) -> None:
    stream, other = played(talker, read, ended), talker.open("bo", seed=4)
    kept(other.push(speech(5000, 9)))
    snapshot, frames, figures = stream.state(), expected(talker, stream), stream.stats()
    for target in (stream, other, other):
        target.restore(snapshot)
        assert same(target.state(), snapshot)
        assert (target.stats().frames, target.stats().pending_frames) == (
            figures.frames,
            figures.pending_frames,
        )
        np.testing.assert_array_equal(rest(target), frames)
        assert target.finished


def test_a_snapshot_between_two_windows_holds_no_audio(tmp_path: Path) -> None:
    gaps = Talker.load(Toy(hop=6, window_samples=700, context_samples=0).write(tmp_path), threads=1)
    stream, other = gaps.open(seed=4), gaps.open(seed=4)
    kept(stream.push(PCM[:3200]))
    snapshot = Snapshot.from_bytes(stream.state().to_bytes())
    assert (snapshot.pcm.size, snapshot.samples, snapshot.frame) == (0, 3200, 6)
    other.restore(snapshot)
    np.testing.assert_array_equal(kept(other.push(PCM[3200:])), kept(stream.push(PCM[3200:])))


def test_restoring_ends_iterators_and_keeps_audio_that_was_queued(talker: Talker) -> None:
    stream = played(talker, 3, False)
    snapshot = stream.state()
    before = stream.push(speech(100, 5))
    stream.restore(snapshot)
    assert kept(before) == []
    assert stream.stats().samples == len(PCM)


GO_ON = """
import sys
from pathlib import Path
import numpy as np
from streamtalk import Snapshot, Talker

talker, folder = Talker.load(sys.argv[1], threads=1), Path(sys.argv[2])
for path in sorted(folder.glob("*.one")):
    with talker.open("bo", seed=4) as stream:
        snapshot = Snapshot.from_bytes(path.read_bytes())
        stream.restore(snapshot)
        frames = [] if snapshot.ended else [f.vertices.copy() for f in stream.push(np.zeros(0, np.float32))]
        frames += [f.vertices.copy() for f in stream.flush()]
        np.save(path.with_suffix(".npy"), np.array(frames).reshape(-1, 4, 3))
        path.with_suffix(".end").write_bytes(stream.state().to_bytes())
with talker.batch() as batch:
    batch.open()
    stream = batch.open("bo", seed=4)
    stream.restore(Snapshot.from_bytes((folder / "batch").read_bytes()))
    stream.flush()
    frames = [frame.vertices.copy() for frames in iter(batch.step, []) for _, made in frames for frame in made]
    np.save(folder / "batch.npy", frames)
"""


def test_another_process_goes_on_to_the_bit(talker: Talker, folder: Path, tmp_path: Path) -> None:
    streams = {name: played(talker, *point) for name, point in POINTS.items()}
    for name, stream in streams.items():
        (tmp_path / f"{name}.one").write_bytes(stream.state().to_bytes())
    with talker.batch() as batch:
        stream = batch.open("bo", seed=4)
        stream.push(PCM)
        batch.step()
        (tmp_path / "batch").write_bytes(stream.state().to_bytes())
        stream.flush()
        in_batch = [frame.vertices.copy() for ((_, made),) in iter(batch.step, []) for frame in made]
    command = [sys.executable, "-c", GO_ON, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, stream in streams.items():
        np.testing.assert_array_equal(
            np.load(tmp_path / f"{name}.npy"), expected(talker, stream), err_msg=name
        )
        snapshot = stream.state()
        stream.restore(snapshot)
        rest(stream)
        assert (tmp_path / f"{name}.end").read_bytes() == stream.state().to_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "batch.npy"), in_batch)


@pytest.mark.parametrize(("read", "ended"), POINTS.values(), ids=POINTS.keys())
def test_streams_move_between_numbers_of_rows(talker: Talker, read: int, ended: bool) -> None:
    single = played(talker, read, ended)
    frames = expected(talker, single)
    with talker.batch() as batch:
        busy = batch.open()
        busy.push(speech(SECOND))
        batch.step()  # an odd number of launches
        first, second = (batch.open("bo", seed=4) for _ in range(2))
        first.restore(single.state())
        busy.push(speech(SECOND))
        made = batch.step()
        got = [frame.vertices.copy() for stream, part in made for frame in part if stream is first]
        second.restore(Snapshot.from_bytes(first.state().to_bytes()))
        single.restore(first.state())
        if not ended:
            first.flush()
            second.flush()
        parts = dict[Stream, list[Array]]({first: [], second: [], busy: []})
        for made in iter(batch.step, []):
            for stream, part in made:
                parts[stream] += kept(part)
        assert first.finished
        np.testing.assert_array_equal(parts[first], parts[second])
        np.testing.assert_allclose(
            np.array(got + parts[first]).reshape(-1, 4, 3), frames, rtol=0, atol=OTHER_ROWS
        )
    tail = rest(single)
    np.testing.assert_allclose(tail, frames[len(frames) - len(tail) :], rtol=0, atol=OTHER_ROWS)


@pytest.mark.parametrize(
    "sizes",
    [{"history": 6}, {"decode_window": 4}, {"window_samples": 4320}, {"hop": 2, "window_samples": 3000}],
)
def test_a_snapshot_of_another_model_changes_nothing(
    talker: Talker, tmp_path: Path, sizes: dict[str, int]
) -> None:
    toy = Toy(hop=HOP, window_samples=4000).with_(**sizes)
    foreign = Talker.load(toy.write(tmp_path / "other"), threads=1).open()
    kept(foreign.push(PCM))
    stream = played(talker, 6, False)
    with talker.batch() as batch:
        for target in (stream, batch.open()):
            before = target.state()
            with pytest.raises(StreamError, match="of another model or export"):
                target.restore(foreign.state())
            assert same(target.state(), before)
    np.testing.assert_array_equal(rest(stream), expected(talker, played(talker, 6, False)))


@pytest.mark.parametrize(
    "changes",
    [
        {"frame": 3},
        {"frame": 8},
        {"index": 4 + HOP},
        {"index": 3},
        {"index": 5, "frame": 12},
        {"samples": len(PCM) + 1},
        {"samples": 100},
        {"ended": True, "samples": 300},
        {"ended": True, "frame": 36, "index": 31, "pcm": NOTHING},
        {"pcm": PCM[:100]},
        {"row": RowState(np.zeros((2, 2, 2, 5, 2), np.float32), np.zeros((4, 3), np.float32))},
    ],
)
def test_counts_and_sizes_of_no_stream_are_refused(talker: Talker, changes: dict[str, Any]) -> None:
    stream = played(talker, 6, False)
    snapshot = stream.state()
    with pytest.raises(StreamError, match="Expected"):
        stream.restore(replace(snapshot, **changes))
    assert same(stream.state(), snapshot)


def sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def damaged(blob: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Damage of every kind; the SHA-256 of all but the first three is right."""
    content = blob[:-DIGEST_BYTES]
    start = len(MAGIC) + SIZE_BYTES
    end = start + int.from_bytes(content[len(MAGIC) : start], "little")
    header, arrays = json.loads(content[start:end]), content[end:]

    def flipped(part: bytes) -> bytes:
        changed = bytearray(part)
        for _ in range(int(rng.integers(1, 4))):
            changed[rng.integers(len(part))] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    def with_header(text: bytes, size: int | None = None) -> bytes:
        count = len(text) if size is None else size
        return sealed(MAGIC + count.to_bytes(SIZE_BYTES, "little") + text + arrays)

    at = int(rng.integers(len(blob)))
    yield flipped(blob)
    yield blob[:at]
    yield blob[:at] + rng.bytes(int(rng.integers(1, 50))) + blob[at:]
    yield with_header(flipped(content[start:end]))
    yield with_header(content[start:end], int(rng.integers(2**32)))
    name = str(rng.choice(list(header)))
    numbers = (-1, 0, 1, HOP, 2**31, LARGEST - 1, LARGEST, 2**64, 10**30, 1e300)
    number: Any = numbers[rng.integers(len(numbers))]
    if isinstance(header[name], int) and rng.random() < 0.5:
        number = header[name] + int(rng.integers(-2 * HOP, 2 * HOP))
    if isinstance(header[name], list) and rng.random() < 0.7:
        shape = header[name]
        shape[rng.integers(len(shape))] = number
        number = shape if rng.random() < 0.8 else [*shape, 1]
    yield with_header(json.dumps({**header, name: number}).encode())
    yield with_header(json.dumps({**header, str(number): 1}).encode())
    yield sealed(content[:end] + flipped(arrays))
    values = np.frombuffer(arrays, "<f4").copy()
    values[rng.integers(len(values))] = (np.nan, np.inf, -np.inf, 3e38)[rng.integers(4)]
    yield sealed(content[:end] + values.tobytes())
    yield sealed(content[: int(rng.integers(len(content)))])


UNSEALED = 3
DAMAGED = 10_000


def test_damage_is_a_stream_error_and_nothing_else(talker: Talker) -> None:
    rng = np.random.default_rng(0)
    blobs = [played(talker, *point).state().to_bytes() for point in POINTS.values()]
    kinds = len(list(damaged(blobs[0], rng)))
    stream, refused, restored = talker.open("bo", seed=4), 0, 0
    for i in range(DAMAGED // kinds):
        blob = blobs[i % len(blobs)]
        for kind, bad in enumerate(damaged(blob, rng)):
            try:
                snapshot = Snapshot.from_bytes(bad)
                if kind < UNSEALED:
                    assert snapshot.to_bytes() == blob
                stream.restore(snapshot)
            except StreamError:
                refused += 1
                continue
            restored += 1
            assert same(stream.state(), snapshot)
            with np.errstate(all="ignore"):
                kept(zip_first(stream, 2 * HOP))
    assert refused + restored == DAMAGED // kinds * kinds
    assert min(refused, restored) > DAMAGED // 20
    stream.reset()
    np.testing.assert_array_equal(kept(stream.push(PCM)), kept(talker.open("bo", seed=4).push(PCM)))


def zip_first(stream: Stream, n: int) -> Iterator[Any]:
    """At most the next `n` frames of a stream that was restored."""
    frames = stream.flush() if stream.state().ended else stream.push(NOTHING)
    return (frame for _, frame in zip(range(n), frames, strict=False))


def test_bytes_are_read_and_not_run(talker: Talker) -> None:
    snapshot = played(talker, 5, False).state()
    blob = snapshot.to_bytes()
    sizes = snapshot.pcm.size + snapshot.row.kv_cache.size + snapshot.row.latents.size
    assert len(blob) < 4 * sizes + 500
    for form in (blob, bytearray(blob), memoryview(blob)):
        assert same(Snapshot.from_bytes(bytes(form)), snapshot)
    for other in (
        b"",
        b"x",
        MAGIC,
        pickle.dumps({"model": snapshot.model}),
        sealed(MAGIC),
        sealed(MAGIC + b"\xff" * 9),
    ):
        with pytest.raises(StreamError, match="Expected"):
            Snapshot.from_bytes(other)
