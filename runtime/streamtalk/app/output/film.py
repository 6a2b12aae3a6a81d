"""Frames as pictures: an mp4 with sound, a contact sheet, a live page. The viewer does the drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamtalk.app.output.target import writable
from streamtalk.stream import Frame
from streamtalk.viewer import LiveView, VideoWriter, contact_sheet, open_renderer
from streamtalk.viewer.extras import require

Float32 = npt.NDArray[np.float32]
SIDE_PX = 512
SHEET_PICTURES = 12


@dataclass(frozen=True)
class Face:
    """What is drawn: `template` [V, 3], `faces` [F, 3], F = 0 for points, `colors` [V, 3] or None; its rates."""

    template: Float32
    faces: npt.NDArray[np.int32]
    colors: npt.NDArray[np.uint8] | None
    fps: int
    sample_rate: int


class VideoOutput:
    """An mp4 of the rendered face with the audio. Nothing appears before the first frame."""

    def __init__(self, path: Path, face: Face) -> None:
        require("av", "Writing video")  # now, and not at the first frame
        self._target = writable(path)
        self._fps = face.fps
        self._rate = face.sample_rate
        self._renderer = open_renderer(face.template, face.faces, face.colors, size=(SIDE_PX, SIDE_PX))
        self._writer: VideoWriter | None = None
        self._early: list[Float32] = []

    def audio(self, samples: Float32) -> None:
        """Write sound; before the first frame, which it must not wait for longer than the delay, hold it."""
        if self._writer is None:
            self._early.append(samples.copy())
        else:
            self._writer.write_audio(samples)

    def frame(self, frame: Frame) -> None:
        """Draw and write a frame."""
        if self._writer is None:
            self._writer = VideoWriter(self._target, self._fps, (SIDE_PX, SIDE_PX), self._rate)
            for samples in self._early:
                self._writer.write_audio(samples)
            self._early.clear()
        self._writer.write(self._renderer.render(frame.vertices))

    def close(self) -> None:
        """Finish the film."""
        self._renderer.close()
        if self._writer is not None:
            self._writer.close()


class ContactSheetOutput:
    """A PNG of up to 12 frames spread over the run, whose length nobody knows beforehand."""

    def __init__(self, path: Path, face: Face) -> None:
        require("PIL.Image", "Writing a contact sheet")  # now, and not at the end
        self._target = writable(path)
        self._renderer = open_renderer(
            face.template, face.faces, face.colors, size=(SIDE_PX // 2, SIDE_PX // 2)
        )
        self._kept: list[tuple[float, Float32]] = []
        self._every = 1

    def audio(self, samples: Float32) -> None:
        """A picture holds no sound."""

    def frame(self, frame: Frame) -> None:
        """Keep every n-th frame, and double n whenever twice too many are kept."""
        if frame.index % self._every == 0:
            self._kept.append((frame.time_s, frame.vertices.copy()))
            if len(self._kept) == 4 * SHEET_PICTURES:
                self._kept = self._kept[::2]
                self._every *= 2

    def close(self) -> None:
        """Draw what is kept, evenly spread."""
        kept, self._kept = self._kept, []
        with self._renderer as renderer:
            if kept:
                n = min(SHEET_PICTURES, len(kept))
                chosen = [kept[round(i * (len(kept) - 1) / max(1, n - 1))] for i in range(n)]
                pictures = [renderer.render(vertices).copy() for _, vertices in chosen]
                contact_sheet(pictures, [time_s for time_s, _ in chosen], self._target)


class LiveOutput:
    """The live page; a slow browser delays nothing."""

    def __init__(self, face: Face) -> None:
        self._view = LiveView(face.faces, face.colors, face.template, face.fps)
        self.url: str = self._view.url

    def audio(self, samples: Float32) -> None:
        """The page is silent."""

    def frame(self, frame: Frame) -> None:
        """Show the frame."""
        self._view.show(frame.index, frame.time_s, frame.vertices)

    def close(self) -> None:
        """Stop serving."""
        self._view.close()
