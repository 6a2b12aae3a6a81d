"""Where frames go: files, films and pages. Each takes frames as they come and finishes what it has when
closed.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.stream import Frame


class Output(Protocol):
    """Takes a run's audio and frames. All raise OutputError where they cannot write on."""

    def audio(self, samples: npt.NDArray[np.float32]) -> None:
        """The mono samples [n] that are about to be pushed."""

    def frame(self, frame: Frame) -> None:
        """The next frame; its vertices are copied or used before this returns."""

    def close(self) -> None:
        """Finish with what came so far, also after an error. Without a frame nothing appears."""
