"""Frames and speech into one mp4, spooled to disk as they come."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamtalk.errors import AudioError, OutputError, UsageError
from streamtalk.viewer.extras import require

if TYPE_CHECKING:
    from io import FileIO

log = logging.getLogger(__name__)

VIDEO_CODECS: tuple[tuple[str, dict[str, str]], ...] = (
    # No B-frames: presentation order is coding order, so a killed process costs the last second and no more.
    ("libx264", {"preset": "veryfast", "crf": "19", "bf": "0"}),
    ("mpeg4", {"qscale": "3", "bf": "0"}),
)
"""Best first. Builds of FFmpeg without GPL parts lack x264."""

KEYFRAME_S = 1
"""Seconds between keyframes, at which a fragment goes to disk: what a power cut can cost."""

MOVFLAGS = ("hybrid_fragmented+delay_moov", "frag_keyframe+empty_moov+delay_moov")
"""How the file survives a kill: as fragments that play as they are. The first turns them into a plain mp4 at
the end (FFmpeg 7.1 on). With `delay_moov` the header tells how AAC primes; else pictures start 64 ms off."""

AUDIO_BIT_RATE = 64_000

AUDIO_LAG_S = 10
"""Pictures wait in memory for their sound this long, since the file holds both in order."""


class VideoWriter:
    """Writes H.264 and AAC to an mp4. Frame 0 belongs to audio time 0, frame i to i / fps.

    The file is written as `NAME.part` and takes its name when it is closed, after an exception too. If the
    process is killed the `.part` stays and plays up to its last second. Pictures and sound may be written in any
    interleaving; sound that lags by more than AUDIO_LAG_S is given up for silence, as the file waits for it.
    Memory stays flat but for the index of the mp4, about 10 MB an hour.

    size: (width, height), even numbers. audio_rate: Hz, or None for a silent film.
    Raises OutputError for a path that cannot be written or a full disk, UsageError for a bad fps or size, and
    MissingDependencyError without PyAV.
    """

    def __init__(
        self,
        path: Path | str,
        fps: float | Fraction,
        size: tuple[int, int],
        audio_rate: int | None = 16_000,
    ) -> None:
        av = require("av", "Writing video")
        width, height = size
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise UsageError(
                f"H.264 needs an even width and height; got {width} x {height}. Render at another size."
            )
        if not 1 <= fps <= 240:
            raise UsageError(f"A video runs at 1 to 240 frames a second; got {fps}.")
        self.path = Path(path)
        self.size = size
        self.frames = 0
        self.samples = 0
        self._sounded_s = Fraction(0)  # what the encoder has, silence that stood in included
        self._partial = self.path.with_name(self.path.name + ".part")
        self._closed = False
        self._av = av
        self._ffmpeg_error: type[Exception] = av.error.FFmpegError
        try:
            self._file: FileIO | Any = self._partial.open("w+b")
        except OSError as error:
            raise OutputError(
                f"The video {self.path} cannot be written: {error.strerror}. Choose a folder that exists "
                "and that you may write to."
            ) from error
        try:
            self._open_container(Fraction(fps).limit_denominator(1001), audio_rate)
        except BaseException:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            raise

    def write(self, image: NDArray[np.uint8]) -> None:
        """Append one picture [height, width, 3] uint8 sRGB."""
        width, height = self.size
        picture = np.asarray(image)
        if picture.shape != (height, width, 3) or picture.dtype != np.uint8:
            raise UsageError(
                f"Pictures of this video are uint8 ({height}, {width}, 3); "
                f"got {picture.dtype} {picture.shape}. Open the renderer and the writer with the same size."
            )
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = self.frames
        frame.time_base = self._video_tick
        self._encode(self._video, frame)
        self.frames += 1
        if self._audio is not None and self.frames * self._video_tick > AUDIO_LAG_S + self._sounded_s:
            self._sound(np.zeros(self._audio_rate, np.float32))

    def write_audio(self, pcm: ArrayLike) -> None:
        """Append mono samples [n] float32 in -1 to 1, any n."""
        if self._audio is None:
            raise UsageError("This video was opened without sound. Open it with audio_rate to write speech.")
        samples = np.ascontiguousarray(pcm, np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise AudioError(f"The sound of a video is mono, finite samples [n]; got shape {samples.shape}.")
        late = int(self._sounded_s * self._audio_rate) - self.samples
        self.samples += len(samples)
        self._sound(samples[late:])

    def close(self) -> None:
        """Finish the file and give it its name. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            for stream in filter(None, (self._video, self._audio)):
                # A stream that was never written has nothing to flush, and some encoders refuse to.
                if self.frames if stream is self._video else self._sounded_s:
                    self._container.mux(stream.encode(None))
            self._container.close()
            self._file.close()
            self._partial.replace(self.path)
        except (OSError, self._ffmpeg_error) as error:
            with suppress(OSError, self._ffmpeg_error):
                self._container.close()
            with suppress(OSError):
                self._file.close()
            raise self._lost(error) from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except OutputError as second:  # the first error is the one to raise
            if not isinstance(error, OutputError):
                log.error("%s", second)

    def _open_container(self, rate: Fraction, audio_rate: int | None) -> None:
        av = self._av
        codec, settings = _first_codec(av)
        for flags in MOVFLAGS:
            options = {"movflags": flags, "flush_packets": "1"}
            self._container = av.open(self._file, "w", format="mp4", options=options)
            self._video = self._container.add_stream(codec, rate=rate, options=settings)
            self._video.width, self._video.height = self.size
            self._video.pix_fmt = "yuv420p"
            self._video_tick = 1 / rate
            self._video.codec_context.time_base = self._video_tick
            self._video.codec_context.gop_size = max(1, round(rate * KEYFRAME_S))
            self._audio = None
            if audio_rate is not None:
                self._audio = self._container.add_stream("aac", rate=audio_rate, layout="mono")
                self._audio.codec_context.bit_rate = AUDIO_BIT_RATE
                self._audio_rate = audio_rate
            try:
                self._container.start_encoding()
                return
            except (OSError, ValueError, self._ffmpeg_error) as error:
                self._file.seek(0)
                self._file.truncate()
                failure = error
        raise OutputError(
            f"No mp4 could be begun with {codec} at {rate} fps and sound at {audio_rate} Hz: {failure}. "
            "Try 16000 or 48000 Hz."
        ) from failure

    def _sound(self, samples: NDArray[np.float32]) -> None:
        if not len(samples):
            return
        frame = self._av.AudioFrame.from_ndarray(samples[None, :], format="fltp", layout="mono")
        frame.sample_rate = self._audio_rate
        frame.pts = int(self._sounded_s * self._audio_rate)
        frame.time_base = Fraction(1, self._audio_rate)
        self._encode(self._audio, frame)
        self._sounded_s += Fraction(len(samples), self._audio_rate)

    def _encode(self, stream: Any, frame: Any) -> None:
        if self._closed:
            raise OutputError(f"The video {self.path} is finished. Open another to write more.")
        try:
            self._container.mux(stream.encode(frame))
            self._file.flush()  # a whole fragment is on its way to disk, whatever happens to the process
        except (OSError, self._ffmpeg_error) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or error
        return OutputError(
            f"The video {self.path} could not be finished: {reason}. What was written is in {self._partial} "
            "and plays as far as it goes. Free some space and run again."
        )


def contact_sheet(
    images: Sequence[NDArray[np.uint8]],
    times_s: Sequence[float],
    path: Path | str,
    columns: int = 4,
) -> None:
    """Write a PNG of pictures [height, width, 3] uint8 in rows of `columns`, each labelled with its time.

    The file appears whole or not at all. Raises UsageError for no pictures or a time missing, OutputError for
    a path that cannot be written, MissingDependencyError without Pillow.
    """
    image_module = require("PIL.Image", "Writing a contact sheet")
    draw_module = require("PIL.ImageDraw", "Writing a contact sheet")
    font_module = require("PIL.ImageFont", "Writing a contact sheet")
    if not images or len(images) != len(times_s) or columns < 1:
        raise UsageError(
            f"A contact sheet takes pictures, one time for each, and at least 1 column; got "
            f"{len(images)} pictures, {len(times_s)} times, {columns} columns."
        )
    height, width = images[0].shape[:2]
    across = min(columns, len(images))
    down = -(-len(images) // across)
    sheet = image_module.new("RGB", (across * width, down * height))
    draw = draw_module.Draw(sheet)
    font = font_module.load_default(size=max(10, height // 18))
    margin = max(4, height // 32)
    for number, (picture, time_s) in enumerate(zip(images, times_s, strict=True)):
        left, top = number % across * width, number // across * height
        sheet.paste(image_module.fromarray(np.ascontiguousarray(picture)), (left, top))
        draw.text(
            (left + margin, top + height - margin), f"{time_s:.2f} s", (235, 238, 242), font, anchor="ls"
        )
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        sheet.save(partial, format="PNG")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"The contact sheet {target} cannot be written: {error.strerror or error}. "
            "Choose a folder that exists and has space."
        ) from error


def _first_codec(av: Any) -> tuple[str, dict[str, str]]:
    """The best video encoder that this build of FFmpeg has."""
    for name, options in VIDEO_CODECS:
        try:
            av.codec.Codec(name, "w")
        except ValueError:
            continue
        if name != VIDEO_CODECS[0][0]:
            log.warning(
                "This build of FFmpeg has no %s; the video is coded with %s.", VIDEO_CODECS[0][0], name
            )
        return name, options
    raise OutputError(
        f"This build of FFmpeg has none of {', '.join(name for name, _ in VIDEO_CODECS)}. "
        "Install PyAV from PyPI: pip install --force-reinstall av"
    )
