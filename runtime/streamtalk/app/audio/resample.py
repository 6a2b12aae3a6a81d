"""Any rate and channel count to mono at the model's rate; a stream in pieces equals the whole at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from streamtalk.errors import AudioError

Samples = npt.NDArray[np.float32]
LOWEST_RATE, HIGHEST_RATE = 1000, 768000


class Resampler:
    """Averages the channels and resamples with soxr (HQ). The same rate passes through untouched."""

    def __init__(self, in_rate: int, out_rate: int) -> None:
        if not LOWEST_RATE <= in_rate <= HIGHEST_RATE:
            raise AudioError(
                f"Audio at {in_rate} Hz cannot be used; expected {LOWEST_RATE} to {HIGHEST_RATE} Hz. "
                "Check the rate that its source states."
            )
        self._stream = None
        if in_rate != out_rate:
            # Here and not above: a kiosk at 16 kHz needs no soxr, and importing this module has no side
            # effects.
            import soxr

            self._stream = soxr.ResampleStream(in_rate, out_rate, 1, dtype="float32", quality="HQ")

    def push(self, samples: Samples) -> Samples:
        """[n, channels] in, mono [m] out; m differs from call to call."""
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
        return mono if self._stream is None else self._chunk(mono, last=False)

    def finish(self) -> Samples:
        """What the filter still holds: mono [m]."""
        return (
            np.zeros(0, np.float32)
            if self._stream is None
            else self._chunk(np.zeros(0, np.float32), last=True)
        )

    def _chunk(self, mono: Samples, last: bool) -> Samples:
        assert self._stream is not None
        return np.asarray(self._stream.resample_chunk(np.ascontiguousarray(mono), last=last), np.float32)
