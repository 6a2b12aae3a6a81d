"""The audio that a stream accepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.errors import AudioError

LARGEST = 2.0**15
"""16-bit samples that nobody scaled still pass; what overflows inside a model does not."""
FLOAT32 = np.dtype(np.float32)
Samples = npt.NDArray[np.float32]


def accepted(pcm: npt.ArrayLike, rate: int) -> Samples:
    """`pcm` as finite mono float32 [n], full scale 1.0; float64 is cast. Raises AudioError."""
    # What callers mostly bring comes first: this runs for every frame, just after a model has emptied the caches.
    if isinstance(pcm, np.ndarray) and pcm.dtype == FLOAT32 and pcm.ndim == 1:
        samples: Samples = pcm
    else:
        samples = _converted(pcm, rate)
    require_sound(samples)
    return samples


def _converted(pcm: npt.ArrayLike, rate: int) -> Samples:
    wanted = f"Expected float32 (or float64) mono samples [n] at {rate} Hz, full scale 1.0"
    try:
        array: npt.NDArray[Any] = np.asarray(pcm)
    except ValueError as error:
        raise AudioError(f"{wanted}; got something that is no array ({error}).") from error
    if array.dtype.kind == "i":
        full_scale = 2.0 ** (8 * array.dtype.itemsize - 1)
        raise AudioError(f"{wanted}; got {array.dtype}. Convert: `pcm.astype(numpy.float32) / {full_scale}`.")
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise AudioError(f"{wanted}; got {array.dtype}.")
    if array.ndim != 1:
        raise AudioError(f"{wanted}; got shape {list(array.shape)}. Average the channels and flatten.")
    with np.errstate(over="ignore"):  # reported by the caller, as infinite
        return array.astype(np.float32, copy=False)


def require_sound(samples: npt.NDArray[Any], source: str = "Audio", offset: int = 0) -> None:
    """Raise AudioError naming the first sample that is no number or beyond all reason.

    `samples[0]` is sample `offset` of the `source`. One NaN would stay in a stream's state for good.
    """
    if not samples.size or (
        np.maximum.reduce(samples) <= LARGEST and np.minimum.reduce(samples) >= -LARGEST  # false for NaN
    ):
        return
    first = int(np.argmin(np.abs(samples) <= LARGEST))
    value = samples[first]
    what = "not a number" if np.isnan(value) else "infinite" if np.isinf(value) else f"{value:.3g}"
    raise AudioError(
        f"{source}: sample {offset + first} is {what}; expected finite samples, full scale 1.0. Mend the source."
    )
