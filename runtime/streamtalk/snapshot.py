"""Snapshots: a stream's state before a hop, as a value and as bytes that any process can go on from."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import msgspec
import numpy as np

from streamtalk.audio_window import Clock, Samples
from streamtalk.errors import StreamError
from streamtalk.rows import RowState

MAGIC = b"StreamTalk snapshot 1\n"
SIZE_BYTES = 4
DIGEST_BYTES = 32
LARGEST = 2**53
"""Above every count of frames and samples, and every size."""


class _Header(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    model: str
    frame: int
    index: int
    samples: int
    ended: bool
    pcm: int
    kv_cache: tuple[int, int, int, int, int]
    latents: tuple[int, int]


@dataclass(frozen=True)
class Snapshot:
    """Everything that a stream remembers, on the host: see `Stream.state`.

    `model` is the model's `stream_model`; `frame` the first frame of the hop that comes next or is under way, `index`
    the next frame to hand out; `samples` were taken in all; `ended` is set by flush; `pcm` [n] float32 begins with that
    hop's window; `row` is the model's state before that hop.
    """

    model: str
    frame: int
    index: int
    samples: int
    ended: bool
    pcm: Samples
    row: RowState

    def to_bytes(self) -> bytes:
        """Encode for a file or another machine: a header, three arrays, and a SHA-256 of all before it."""
        arrays = (self.pcm, self.row.kv_cache, self.row.latents)
        header = msgspec.json.encode(
            _Header(
                model=self.model,
                frame=self.frame,
                index=self.index,
                samples=self.samples,
                ended=self.ended,
                pcm=self.pcm.size,
                kv_cache=self.row.kv_cache.shape,
                latents=self.row.latents.shape,
            )
        )
        size = len(header).to_bytes(SIZE_BYTES, "little")
        content = b"".join([MAGIC, size, header, *(a.astype("<f4", copy=False).tobytes() for a in arrays)])
        return content + hashlib.sha256(content).digest()

    @classmethod
    def from_bytes(cls, blob: bytes) -> Snapshot:
        """Decode `to_bytes`. Raises StreamError for anything that is not whole, finite and within bounds."""
        content, digest = bytes(blob[:-DIGEST_BYTES]), bytes(blob[-DIGEST_BYTES:])
        start = len(MAGIC) + SIZE_BYTES
        if not content.startswith(MAGIC) or len(content) < start:
            raise StreamError("Expected the bytes of a snapshot of this version, got something else.")
        if hashlib.sha256(content).digest() != digest:
            raise StreamError(
                "Expected a whole snapshot, got one that was damaged: its SHA-256 does not match."
            )
        end = start + int.from_bytes(content[len(MAGIC) : start], "little")
        try:
            header = msgspec.json.decode(content[start:end], type=_Header)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise StreamError(f"Expected a snapshot's header, got something else: {error}.") from error
        shapes = ((header.pcm,), header.kv_cache, header.latents)
        numbers = (header.frame, header.index, header.samples, header.pcm, *header.kv_cache, *header.latents)
        if not all(0 <= n < LARGEST for n in numbers) or 0 in (*header.kv_cache, *header.latents):
            raise StreamError(
                f"Expected counts and sizes below {LARGEST} in a snapshot, got {list(numbers)}."
            )
        if len(content) - end != 4 * sum(math.prod(shape) for shape in shapes):
            raise StreamError(
                f"Expected a snapshot of the sizes that its header says, got {len(blob)} bytes."
            )
        arrays = []
        for shape in shapes:
            arrays.append(
                np.frombuffer(content, "<f4", math.prod(shape), end).reshape(shape).astype(np.float32)
            )
            end += 4 * arrays[-1].size
        if not all(np.isfinite(array).all() for array in arrays):
            raise StreamError("Expected finite numbers in a snapshot, got others.")
        pcm, kv_cache, latents = arrays
        row = RowState(kv_cache, latents)
        return cls(header.model, header.frame, header.index, header.samples, header.ended, pcm, row)

    def require_fit(self, model: str, clock: Clock, row: RowState) -> None:
        """Raise StreamError unless a stream of this model, whose own state is `row`, can go on from here."""
        shapes = [[list(a.shape) for a in (r.kv_cache, r.latents)] for r in (self.row, row)]
        if self.model != model or shapes[0] != shapes[1]:
            raise StreamError(
                "Expected a snapshot of this model as it was exported here, got one of another model or export."
            )
        total = clock.frames_in(self.samples) if self.ended else clock.frames_ready(self.samples)
        handed = self.index - self.frame
        at_rest = self.ended and self.index == total and handed > -clock.hop
        in_place = 0 <= handed < clock.hop and self.index <= total
        kept = max(0, self.samples - clock.window_start(self.frame))
        if self.frame % clock.hop or not (in_place or at_rest) or self.pcm.size != kept:
            raise StreamError(
                f"Expected counts of one stream in a snapshot; got hop {self.frame}, frame {self.index}, "
                f"{self.samples} samples, {self.pcm.size} of them kept."
            )
