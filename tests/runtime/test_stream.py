"""Streams: parity with an independent reference, and the same frames however the audio is cut."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from streamtalk import AudioError, SpeakerError, StreamError, Talker, UsageError
from tests.runtime.drive import NOTHING, SECOND, Array, CtrlC, kept, same, whole
from tests.runtime.toy import Toy, speech

PARITY = 1e-5  # float32 graphs against a float64 reference; observed 6e-7


LINES_BEHIND = 4
"""Lines between a frame's count and its reader: Ctrl-C there loses the frame, and nothing else."""


def noise_for(n: int) -> Array:
    return np.random.default_rng(5).standard_normal((n, 3)).astype(np.float32)


TOYS = {
    "plain": Toy(),
    "hop 1": Toy(hop=1),
    "hop 5, wide": Toy(hop=5, window_samples=4000, context_samples=320),
    "25 fps": Toy(fps=25, period=25),
    "29 fps does not divide": Toy(fps=29, hop=3, window_samples=3000),
    "window shorter than its hop": Toy(hop=4, window_samples=1000, context_samples=640),
    "windows with gaps": Toy(hop=6, window_samples=700, context_samples=0),
    "decode window of one": Toy(decode_window=1),
    "no mesh": Toy(faces=False),
}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS.keys())
def test_frames_equal_the_reference_whole_and_in_chunks(toy: Toy, tmp_path: Path) -> None:
    talker = Talker.load(toy.write(tmp_path), threads=1)
    pcm, noise = speech(2 * SECOND + 123), noise_for(70)
    expected = toy.reference(pcm, noise, speaker=1)
    with talker.open("bo", noise=noise) as stream:
        got = whole(stream, pcm)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=PARITY)
        stream.reset()
        np.testing.assert_array_equal(whole(stream, pcm, 777), got)


def test_frames_say_what_they_are(talker: Talker) -> None:
    with talker.open() as stream:
        for i, frame in enumerate(stream.push(speech(SECOND))):
            assert (frame.index, frame.time_s) == (i, i / 30)
            assert frame.vertices.shape == (4, 3)
            assert frame.vertices.dtype == np.float32
            assert not frame.vertices.flags.writeable
        assert stream.delay_s == talker.delay_s == (2400 - 960) / 16000
        assert not stream.finished


def test_one_sample_and_random_pushes_are_bit_identical(talker: Talker) -> None:
    pcm = speech(5000)
    stream = talker.open(seed=3)
    expected = whole(stream, pcm)
    final = stream.state()
    rng = np.random.default_rng(0)
    cuts: list[Callable[[], int]] = [lambda: 1, lambda: int(rng.integers(0, 900)), lambda: 160]
    for cut in cuts:
        stream.reset()
        frames, i = [], 0
        while i < len(pcm):
            n = cut()
            frames += kept(stream.push(pcm[i : i + n]))
            i += n
        frames += kept(stream.flush())
        np.testing.assert_array_equal(np.array(frames), expected)
        assert stream.finished
        assert same(stream.state(), final)


@pytest.mark.parametrize("n", [0, 1, 533, 534, 1067, 1600, 2399, 2400, 2401, SECOND])
def test_n_samples_yield_n_fps_over_rate_frames(talker: Talker, n: int) -> None:
    with talker.open() as stream:
        assert len(whole(stream, speech(n))) == n * 30 // 16000


def test_frames_come_as_soon_as_their_audio_is_there(talker: Talker) -> None:
    with talker.open() as stream:
        pcm = speech(SECOND)
        needed = round(talker.delay_s * 16000)
        assert kept(stream.push(pcm[: needed - 1])) == []
        assert len(kept(stream.push(pcm[needed - 1 : needed]))) == 2  # one hop


def test_reading_is_what_computes(talker: Talker) -> None:
    with talker.open() as stream:
        frames = stream.push(speech(SECOND))
        assert stream.stats().frames == 0
        assert stream.stats().pending_frames == 28
        next(frames)
        assert (stream.stats().frames, stream.stats().pending_frames) == (1, 27)
        first = stream.stats()
        assert 0 < first.compute_s == first.latency_ms.max / 1e3  # one hop, of which one frame was read
        next(frames)
        assert stream.stats().compute_s == first.compute_s


def test_the_audio_is_copied_at_the_call(talker: Talker) -> None:
    pcm = speech(SECOND)
    with talker.open() as stream:
        expected = whole(stream, pcm.copy())
        stream.reset()
        frames = stream.push(pcm)
        pcm[:] = 0
        np.testing.assert_array_equal(np.array(kept(frames) + kept(stream.flush())), expected)


def test_unread_frames_come_with_the_next_call(talker: Talker) -> None:
    pcm = speech(SECOND)
    with talker.open() as stream:
        expected = whole(stream, pcm)
        stream.reset()
        unread = stream.push(pcm[:8000])
        first = [next(unread).vertices.copy()]
        stream.push(pcm[8000:12000])  # none read at all
        rest = kept(stream.push(pcm[12000:])) + kept(unread) + kept(stream.flush())
        np.testing.assert_array_equal(np.array(first + rest), expected)


@pytest.mark.parametrize("read", [0, 1, 2, 3])  # none; in mid-hop; a whole hop
def test_a_reset_stream_equals_a_new_one(talker: Talker, read: int) -> None:
    pcm = speech(SECOND, 1)
    used = talker.open("cy", seed=9)
    before = used.push(speech(SECOND, 2))
    for _ in range(read):
        next(before)
    used.reset()
    new = talker.open("cy", seed=9)
    assert used.stats() == new.stats()
    assert same(used.state(), new.state())
    used.push(pcm)
    assert kept(before) == []  # what was not read went with the reset, and its iterator too
    expected = whole(new, pcm)
    for _ in range(2):
        used.reset()
        np.testing.assert_array_equal(whole(used, pcm), expected)


@pytest.mark.parametrize(
    "toy", [Toy(), Toy(hop=1), Toy(hop=5, window_samples=4000)], ids=lambda toy: f"hop {toy.hop}"
)
def test_a_hop_that_ctrl_c_ends_anywhere_is_computed_again(toy: Toy, tmp_path: Path) -> None:
    talker = Talker.load(toy.write(tmp_path), threads=1)
    pcm = speech(2 * SECOND)
    with talker.open(seed=4) as clean, talker.open(seed=4) as stream:
        expected = kept(clean.push(pcm))
        stream.push(pcm)
        ctrl_c, got = CtrlC(), dict[int, Array]()
        while stream.stats().pending_frames:
            before = stream.stats().frames
            try:
                frame = ctrl_c(lambda: next(stream.push(NOTHING)))
            except KeyboardInterrupt:
                assert before <= stream.stats().frames <= before + 1
            else:
                assert frame.index == before == stream.stats().frames - 1
                got[frame.index] = frame.vertices.copy()
        assert ctrl_c.ended > 500
        for index, vertices in got.items():
            np.testing.assert_array_equal(vertices, expected[index])
        # Those missing were ended behind the line that counts them as handed out.
        assert len(expected) - len(got) <= LINES_BEHIND * ctrl_c.sweeps
        assert same(stream.state(), clean.state())
        np.testing.assert_array_equal(kept(stream.flush()), kept(clean.flush()))


def test_two_streams_do_not_touch_each_other(talker: Talker) -> None:
    a_pcm, b_pcm = speech(SECOND, 1), speech(SECOND, 2)
    a_alone, b_alone = whole(talker.open(0, seed=1), a_pcm), whole(talker.open(1, seed=2), b_pcm)
    a, b = talker.open(0, seed=1), talker.open(1, seed=2)
    a_frames: list[Array] = []
    b_frames: list[Array] = []
    for i in range(0, SECOND, 1000):
        a_frames += kept(a.push(a_pcm[i : i + 1000]))
        b_frames += kept(b.push(b_pcm[i : i + 1000]))
    np.testing.assert_array_equal(np.array(a_frames + kept(a.flush())), a_alone)
    np.testing.assert_array_equal(np.array(b_frames + kept(b.flush())), b_alone)


def test_streams_run_in_threads(talker: Talker) -> None:
    expected = [whole(talker.open(seed=i), speech(SECOND, i)) for i in range(4)]
    got: dict[int, Array] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: whole(talker.open(seed=i), speech(SECOND, i))}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_array_equal(got[i], expected[i])


BAD_AUDIO: dict[str, tuple[Any, str]] = {
    "nan": (np.array([0, 0, np.nan, np.nan], np.float32), "sample 2 is not a number"),
    "inf": (np.array([0, -np.inf], np.float32), "sample 1 is infinite"),
    "absurd": (np.array([0, 1e30], np.float32), "sample 1 is 1e[+]30"),
    "beyond float32": (np.array([1e300]), "sample 0 is infinite"),
    "int16": (np.zeros(5, np.int16), r"int16.*astype\(numpy.float32\) / 32768.0"),
    "uint8": (np.zeros(5, np.uint8), "uint8"),
    "half": (np.zeros(5, np.float16), "float16"),
    "complex": (np.zeros(5, np.complex64), "complex64"),
    "stereo": (np.zeros((5, 2), np.float32), r"\[5, 2\]"),
    "scalar": (np.float32(0), r"shape \[\]"),
    "ragged": ([[1.0], [1.0, 2.0]], "no array"),
    "text": ("audio.wav", "<U9"),
    "none": (None, "object"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_AUDIO.values(), ids=BAD_AUDIO.keys())
def test_bad_audio_is_refused_before_it_does_harm(talker: Talker, bad: Any, message: str) -> None:
    pcm = speech(SECOND)
    with talker.open() as stream:
        expected = whole(stream, pcm)
        stream.reset()
        frames = kept(stream.push(pcm[:9000]))
        with pytest.raises(AudioError, match=message):
            stream.push(bad)
        frames += kept(stream.push(pcm[9000:])) + kept(stream.flush())
        np.testing.assert_array_equal(np.array(frames), expected)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_floats_of_other_layouts_are_the_same_audio(talker: Talker, dtype: str) -> None:
    pcm = speech(SECOND)
    np.testing.assert_array_equal(whole(talker.open(), pcm.astype(dtype)), whole(talker.open(), pcm))
    np.testing.assert_array_equal(whole(talker.open(), np.repeat(pcm, 2)[::2]), whole(talker.open(), pcm))


def test_after_flush_only_reset(talker: Talker) -> None:
    stream = talker.open()
    stream.push(speech(SECOND))
    stream.flush()
    refused: list[Callable[[], object]] = [
        lambda: stream.push(speech(1)),
        stream.flush,
        stream.reset,
        stream.state,
    ]
    for call in refused[:2]:
        with pytest.raises(StreamError, match="reset"):
            call()
    stream.reset()
    assert len(kept(stream.push(speech(SECOND)))) == 28
    stream.close()
    stream.close()
    for call in refused:
        with pytest.raises(StreamError, match="closed"):
            call()
    assert stream.stats().frames == 28


def test_frames_of_a_closed_stream_are_an_error_not_an_empty_loop(talker: Talker) -> None:
    with talker.open() as stream:
        frames = stream.push(speech(SECOND))
    with pytest.raises(StreamError, match="closed"):
        next(frames)


def test_every_choice_matters(talker: Talker) -> None:
    pcm = speech(SECOND)
    base = whole(talker.open("ada", seed=0), pcm)
    for other in (talker.open("bo"), talker.open("ada", seed=1), talker.open(template=np.zeros((4, 3)))):
        assert np.abs(whole(other, pcm) - base).max() > 0.01
    for equal in (talker.open(), talker.open(0), talker.open({"ada": 1}), talker.open({0: 0.5, "bo": 0})):
        np.testing.assert_array_equal(whole(equal, pcm), base)


def test_a_blend_mixes_styles_and_faces(toy: Toy, talker: Talker) -> None:
    pcm, noise = speech(SECOND), noise_for(30)
    weights = np.array([0.7, 0, 0.3])
    identity = toy.identity
    expected = toy.reference(
        pcm,
        noise,
        style=np.tensordot(weights, identity["styles"], 1),
        template=np.tensordot(weights, identity["templates"], 1),
    )
    stream = talker.open({"ada": 1.4, 2: 0.6}, noise=noise)  # divided by their sum
    np.testing.assert_allclose(whole(stream, pcm), expected, atol=PARITY)


def test_template_and_noise_of_ones_own(toy: Toy, talker: Talker) -> None:
    pcm, noise = speech(SECOND), noise_for(30)
    template = np.arange(12.0).reshape(4, 3)
    expected = toy.reference(pcm, noise, template=template)
    for source in (noise, lambda frame: noise[frame]):
        stream = talker.open(template=template, noise=source)
        np.testing.assert_allclose(whole(stream, pcm), expected, atol=PARITY)
        np.testing.assert_array_equal(stream.template, template)


def test_noise_that_runs_out_leaves_the_stream_where_it_was(talker: Talker) -> None:
    stream = talker.open(noise=noise_for(5))
    frames = []
    with pytest.raises(UsageError, match="5 rows and frame 5"):
        for frame in stream.push(speech(SECOND)):
            frames.append(frame.vertices.copy())
    assert len(frames) == stream.stats().frames == 4  # whole hops
    with pytest.raises(UsageError, match="5 rows and frame 5"):
        next(stream.flush())
    assert stream.stats().frames == 4


@pytest.mark.parametrize(
    ("speaker", "message"),
    [
        ("zoe", "'zoe'.*ada, bo, cy"),
        (3, "No speaker 3"),
        (-1, "No speaker -1"),
        (True, "True"),
        (1.5, "1.5"),
        ({}, "at least one"),
        ({"ada": 0}, "at least one"),
        ({"ada": -1, "bo": 2}, "at least 0"),
        ({"ada": float("nan")}, "at least 0"),
        ({"zoe": 1}, "zoe"),
    ],
)
def test_the_refusal_of_a_speaker_names_those_there_are(talker: Talker, speaker: Any, message: str) -> None:
    with pytest.raises(SpeakerError, match=message):
        talker.open(speaker)


@pytest.mark.parametrize("template", [np.zeros((5, 3)), np.full((4, 3), np.nan), np.zeros(13), [[1], [2, 3]]])
def test_a_template_must_fit(talker: Talker, template: npt.ArrayLike) -> None:
    with pytest.raises(UsageError, match=r"`template` must be \[4, 3\]"):
        talker.open(template=template)


def test_a_talker_describes_its_model(talker: Talker, tmp_path: Path) -> None:
    assert talker.speakers == ("ada", "bo", "cy")
    assert (talker.fps, talker.sample_rate, talker.backend) == (30, 16000, "onnxruntime-cpu")
    assert talker.faces.shape == (2, 3)
    assert talker.colors is not None
    np.testing.assert_array_equal(talker.colors_of(), talker.colors)
    assert not talker.faces.flags.writeable
    bare = Talker.load(Toy(faces=False).write(tmp_path), threads=1)
    assert bare.colors is None
    assert bare.faces.shape == (0, 3)
