"""A film of two faces side by side: what the labels ask for, and what the model does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamtalk import Talker
from streamtalk.viewer import VideoWriter, open_renderer
from streamtalk_training.clips import SAMPLE_RATE
from streamtalk_training.face import Face, pose
from streamtalk_training.scores import Speech
from streamtalk_training.setup import speaker_gains
from streamtalk_training.streaming import frames_of

SIDE_PX = 512


def film(face: Face, talker: Talker, speeches: Mapping[str, Speech], seconds: float, path: Path) -> None:
    """Write an mp4 of the first `seconds` of each clip with its sound: labels left, model right.

    Raises OutputError and MissingDependencyError as `VideoWriter` does.
    """
    identities = len(face.templates)
    gains = speaker_gains(identities)
    samples = round(seconds * SAMPLE_RATE)
    writer = VideoWriter(path, talker.fps, (2 * SIDE_PX, SIDE_PX), SAMPLE_RATE)
    try:
        for number, speech in enumerate(speeches.values()):
            speaker = number % identities
            pcm = speech.pcm[:samples]
            pcm = pcm[: len(pcm) * talker.fps // SAMPLE_RATE * SAMPLE_RATE // talker.fps]
            writer.write_audio(pcm)
            template = face.templates[speaker]
            colors = face.identity_colors[speaker]
            with open_renderer(template, face.faces, colors, size=(SIDE_PX, SIDE_PX)) as renderer:
                for frame in frames_of(talker, pcm, speaker, seed=0):
                    weights = speech.weights[frame.index] * np.float32(gains[speaker])
                    if speech.idle is not None:
                        weights = np.clip(weights + speech.idle[frame.index], 0, 1)
                    left: NDArray[np.uint8] = renderer.render(pose(face, weights, speaker)).copy()
                    writer.write(np.hstack([left, renderer.render(frame.vertices)]))
    finally:
        writer.close()
