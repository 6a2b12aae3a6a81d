"""Films: in step, whole at the end, kept when things go wrong."""

import signal
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamtalk.errors import AudioError, MissingDependencyError, OutputError, UsageError
from streamtalk.viewer import video
from streamtalk.viewer.video import VideoWriter, contact_sheet

av = pytest.importorskip("av")

SIZE = (64, 48)
RATE = 16_000
FLASH_FRAME, BEEP_S = 20, 0.05

ONSET_TOLERANCE_S = 0.002
"""AAC smears an onset by some samples. One frame at 60 fps is 17 ms, the encoder's priming 64 ms."""

GROWTH_BYTES = 100_000
"""Index and packets of 30 s more of film, without its pictures (9 kB each)."""

WHOLE_FRAMES = 30
"""In the whole seconds of noise film that fit into the disk of FILLS_THE_DISK."""

KEEPS_WRITING = """
import sys, numpy as np
from streamtalk.viewer.video import VideoWriter
writer = VideoWriter(sys.argv[1], 30, (64, 48), audio_rate=None)
noise = np.random.default_rng(0)
for number in range(100_000):
    writer.write(noise.integers(0, 255, (48, 64, 3)).astype(np.uint8))
    if number == 150:
        print("ready", flush=True)
"""

FILLS_THE_DISK = """
import resource, sys, numpy as np
from streamtalk.errors import OutputError
from streamtalk.viewer.video import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0)
try:
    with VideoWriter(sys.argv[1], 30, (64, 48), audio_rate=None) as writer:
        for _ in range(3000):
            writer.write(noise.integers(0, 255, (48, 64, 3)).astype(np.uint8))
except OutputError as error:
    print(error)
"""


def plain(level: int) -> NDArray[np.uint8]:
    return np.full((SIZE[1], SIZE[0], 3), level, np.uint8)


def film(writer: VideoWriter, frames: int, fps: float, with_audio: bool = True) -> None:
    """Black and silent but for one white frame, at which a beep starts."""
    start = round(FLASH_FRAME * RATE / fps)
    for number in range(frames):
        writer.write(plain(255 if number == FLASH_FRAME else 0))
        if with_audio:
            sample = np.arange(round(number * RATE / fps), round((number + 1) * RATE / fps))
            on = (sample >= start) & (sample < start + BEEP_S * RATE)
            writer.write_audio((0.8 * on * np.sin(sample * 0.7)).astype(np.float32))


def pictures(path: Path) -> list[tuple[float, float]]:
    """Time and mean level of each frame of a file."""
    with av.open(str(path)) as container:
        return [(float(f.time), float(f.to_ndarray(format="gray").mean())) for f in container.decode(video=0)]


def sound(path: Path) -> NDArray[np.float32]:
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        assert frames[0].time == 0
        return np.concatenate([frame.to_ndarray()[0] for frame in frames])


@pytest.mark.parametrize("fps", [25, 30, 60])
def test_sound_and_picture_start_together_and_stay_together(tmp_path: Path, fps: int) -> None:
    path = tmp_path / "film.mp4"
    with VideoWriter(path, fps, SIZE) as writer:
        film(writer, 60, fps)
        assert not path.exists()
    shown = pictures(path)
    np.testing.assert_allclose([time for time, _ in shown], np.arange(60) / fps, atol=1e-4)
    assert [number for number, (_, level) in enumerate(shown) if level > 128] == [FLASH_FRAME]
    heard = sound(path)
    onset = int(np.flatnonzero(np.abs(heard) > 0.2)[0])
    assert onset / RATE == pytest.approx(FLASH_FRAME / fps, abs=ONSET_TOLERANCE_S)
    assert len(heard) / RATE == pytest.approx(60 / fps, abs=1024 / RATE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("codec", [codec for codec, _ in video.VIDEO_CODECS])
def test_each_codec_writes_a_silent_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    path = tmp_path / "film.mp4"
    better = [entry for entry in video.VIDEO_CODECS if entry[0] == codec]
    monkeypatch.setattr(video, "VIDEO_CODECS", (("not_built_in", {}), *better))
    with VideoWriter(path, 30, SIZE, audio_rate=None) as writer:
        film(writer, 30, 30, with_audio=False)
        with pytest.raises(UsageError, match="without sound"):
            writer.write_audio(np.zeros(10, np.float32))
    assert len(pictures(path)) == 30
    with av.open(str(path)) as container:
        assert codec.endswith("264") == (container.streams.video[0].codec_context.name == "h264")
        assert not container.streams.audio


@pytest.mark.parametrize("movflags", video.MOVFLAGS)
def test_older_ffmpeg_falls_back_to_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, movflags: str
) -> None:
    path = tmp_path / "film.mp4"
    monkeypatch.setattr(video, "MOVFLAGS", ("no_such_flag", movflags))
    with VideoWriter(path, 30, SIZE) as writer:
        film(writer, 40, 30)
    assert len(pictures(path)) == 40
    assert np.abs(sound(path)).max() > 0.5


def test_sound_that_never_comes_still_makes_a_film(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with VideoWriter(path, 30, SIZE) as writer:
        film(writer, 30, 30, with_audio=False)
    assert len(pictures(path)) == 30


def test_sound_that_comes_too_late_leaves_silence_and_keeps_step(tmp_path: Path) -> None:
    path, fps, late_s = tmp_path / "film.mp4", 10, 15
    with VideoWriter(path, fps, SIZE) as writer:
        for _ in range(late_s * fps):
            writer.write(plain(0))
        assert (tmp_path / "film.mp4.part").stat().st_size > 0  # no picture waits for ever
        writer.write_audio(np.full(late_s * RATE, 0.5, np.float32) * np.sin(np.arange(late_s * RATE) * 0.7))
    heard = np.abs(sound(path))
    given_up = late_s - video.AUDIO_LAG_S
    assert heard[: (given_up - 1) * RATE].max() < 0.01
    assert heard[(given_up + 1) * RATE :].max() > 0.4
    assert len(heard) / RATE == pytest.approx(late_s, abs=1024 / RATE)


def test_an_exception_finishes_the_film_and_is_the_one_seen(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 30, SIZE) as writer:
        film(writer, 30, 30)
        raise KeyboardInterrupt
    assert len(pictures(path)) == 30


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_leaves_a_film_that_plays(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPS_WRITING, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not path.exists()
    assert len(pictures(tmp_path / "film.mp4.part")) >= 90


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_is_a_sentence_and_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    done = subprocess.run(
        [sys.executable, "-c", FILLS_THE_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert "film.mp4.part" in done.stdout
    assert not path.exists()
    frames = 0
    with (
        av.open(str(tmp_path / "film.mp4.part")) as container,
        suppress(av.error.InvalidDataError),  # the packet at which the disk was full
    ):
        for _ in container.decode(video=0):
            frames += 1
    assert frames >= WHOLE_FRAMES


def test_a_path_that_cannot_be_written_is_refused_before_the_first_frame(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        VideoWriter(tmp_path / "missing" / "film.mp4", 30, SIZE)
    with pytest.raises(OutputError, match="missing"):
        contact_sheet([plain(0)], [0.0], tmp_path / "missing" / "sheet.png")


@pytest.mark.parametrize(
    ("fps", "size", "said"), [(30, (63, 48), "63 x 48"), (0, SIZE, "got 0"), (float("nan"), SIZE, "got nan")]
)
def test_films_that_cannot_be_are_refused(
    tmp_path: Path, fps: float, size: tuple[int, int], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        VideoWriter(tmp_path / "film.mp4", fps, size)
    assert not list(tmp_path.iterdir())


def test_an_audio_rate_that_aac_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="12345"):
        VideoWriter(tmp_path / "film.mp4", 30, SIZE, audio_rate=12345)
    assert not list(tmp_path.iterdir())


def test_wrong_frames_and_sound_are_refused_and_the_film_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with VideoWriter(path, 30, SIZE) as writer:
        with pytest.raises(UsageError, match=r"\(48, 64, 3\)"):
            writer.write(np.zeros((64, 48, 3), np.uint8))
        with pytest.raises(AudioError, match="mono"):
            writer.write_audio(np.zeros((2, 10), np.float32))
        with pytest.raises(AudioError, match="finite"):
            writer.write_audio(np.array([np.nan], np.float32))
        writer.write_audio(np.zeros(0, np.float32))
        film(writer, 5, 30)
    assert len(pictures(path)) == 5
    with pytest.raises(OutputError, match="finished"):
        writer.write(plain(0))


def test_memory_stays_flat(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "film.mp4", 30, SIZE) as writer:
        film(writer, 90, 30)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            film(writer, 900, 30)
            assert tracemalloc.get_traced_memory()[0] - before < GROWTH_BYTES
        finally:
            tracemalloc.stop()


def test_without_pyav_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'streamtalk\[viewer\]'"):
        VideoWriter(tmp_path / "film.mp4", 30, SIZE)
    with pytest.raises(MissingDependencyError, match=r"PIL.*pip install 'streamtalk\[viewer\]'"):
        contact_sheet([plain(0)], [0.0], tmp_path / "sheet.png")


def test_a_contact_sheet_has_its_pictures_in_rows(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "sheet.png"
    contact_sheet([plain(40 * number) for number in range(5)], [0.5 * n for n in range(5)], path, columns=3)
    sheet = np.asarray(image.open(path))
    assert sheet.shape == (2 * SIZE[1], 3 * SIZE[0], 3)
    assert [int(sheet[2 + SIZE[1] * (n // 3), 2 + SIZE[0] * (n % 3), 0]) for n in range(5)] == [
        0,
        40,
        80,
        120,
        160,
    ]
    assert sheet[SIZE[1] // 2 : SIZE[1], : SIZE[0]].max() > 200  # its label
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match="2 times"):
        contact_sheet([plain(0)], [0.0, 1.0], path)
