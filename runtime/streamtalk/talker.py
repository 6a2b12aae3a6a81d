"""A loaded model: shared, immutable, and the place where streams are opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from streamtalk.backends import AUTO, Choice, Options, choose
from streamtalk.blendshapes import Blendshapes, WeightSolver, read_blendshapes
from streamtalk.errors import UsageError
from streamtalk.identity import Identity, Speaker, read_identity
from streamtalk.model import Manifest, read_manifest
from streamtalk.noise import GivenNoise, NoiseFn, SeededNoise
from streamtalk.stream import Face, Stream

if TYPE_CHECKING:
    from streamtalk.batch import Batch

MOST_STREAMS = 4096
"""A mistyped number of streams must not take the machine down."""


@dataclass(frozen=True)
class Talker:
    """An exported model on a backend. Make one with `Talker.load` and keep it; it may serve many streams,
    each in its own thread.
    """

    manifest: Manifest
    identity: Identity
    choice: Choice
    blendshapes: Blendshapes | None = None

    @classmethod
    def load(
        cls,
        directory: str | Path,
        backend: str = AUTO,
        *,
        threads: int | None = None,
        download: bool = True,
    ) -> Talker:
        """Load what `export.py` wrote to `directory`, after every file's hash was checked.

        `backend` is a name (see `streamtalk.backends.available`) or "auto": the first that works. `threads`
        is the number of CPU threads of a graph run; None means the usable cores, at most 4.

        With `download` False, which takes a GPU backend, vertices stay where they are made: `device_vertices` of a
        stream or batch has them, `frame.vertices` is [0, 3], there are no blendshapes, and nobody waits for a frame:
        it is there when `device_vertices` says so.

        Raises ModelError (missing, corrupt or of another version), BackendError, MissingDependencyError,
        UsageError.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        identity = read_identity(directory, manifest)
        shapes = read_blendshapes(directory, manifest) if download else None
        choice = choose(backend, directory, manifest, identity, Options(threads, download))
        return cls(manifest, identity, choice, shapes)

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self.choice.backend.name

    @property
    def fps(self) -> int:
        """Animation frames a second."""
        return self.manifest.fps

    @property
    def sample_rate(self) -> int:
        """Audio samples a second that `Stream.push` expects."""
        return self.manifest.sample_rate

    @property
    def delay_s(self) -> float:
        """Seconds of audio that a frame of a stream by itself waits for beyond its own time."""
        return self.manifest.clock.delay_s

    @property
    def speakers(self) -> tuple[str, ...]:
        """Names of the speakers; their order gives the indices."""
        return self.identity.names

    @property
    def faces(self) -> npt.NDArray[np.int32]:
        """Triangles [F, 3] of the mesh; F = 0 where the model has none."""
        return self.identity.faces

    @property
    def colors(self) -> npt.NDArray[np.uint8] | None:
        """Colours of the vertices [V, 3], uint8 sRGB, or None: the first speaker's, and those for a `template`
        of one's own.
        """
        return self.identity.colors

    def colors_of(self, speaker: Speaker = None) -> npt.NDArray[np.uint8] | None:
        """Colours [V, 3] of a speaker as given to `open`; a blend's are the mean. Raises SpeakerError."""
        return self.identity.colors_of(speaker)

    @property
    def landmarks(self) -> Mapping[str, npt.NDArray[np.int32]]:
        """Vertex numbers by name: `lip_pairs` [n, 2] (inner upper and lower), `mouth_corners` [2], `lids`
        [2, 2]; empty where the face names none.
        """
        return self.identity.landmarks

    @property
    def blendshape_names(self) -> tuple[str, ...]:
        """Names of `Frame.blendshapes`, ARKit's 52 in Apple's order; empty where the face has no shapes."""
        return self.blendshapes.names if self.blendshapes else ()

    def open(
        self,
        speaker: Speaker = None,
        *,
        seed: int = 0,
        template: npt.ArrayLike | None = None,
        noise: npt.ArrayLike | NoiseFn | None = None,
    ) -> Stream:
        """Open a stream by itself: one row with its own state, preallocated.

        `speaker` is a name, an index or a blend `{name or index: weight}` of styles and faces; None is the
        first. `seed` (0 to 2^64 - 1) selects the noise: equal seeds give equal frames. `template` [V, 3]
        or [3V] replaces the speaker's face at rest. `noise` replaces the seeded noise: an array [L, C] whose row i
        drives frame i, or a callable `frame -> [C]`.

        Raises SpeakerError and UsageError.
        """
        m = self.manifest
        face = self._face(speaker, seed, template, noise)
        rows = self.choice.backend.rows(1, self.identity.start_latent)
        return Stream(m.stream_model, m.clock, face, rows, 0, None)

    def batch(self, streams: int | None = None) -> Batch:
        """Open a batch for so many streams; None is one launch of the most rows that were exported.

        Its launches have the fewest rows that hold all streams, or the most that were exported, in as many groups as
        that takes. Raises UsageError, and BackendError where the graph of that many rows cannot be loaded.
        """
        from streamtalk.batch import Batch  # which a stream by itself does not need

        m, exported = self.manifest, self.manifest.row_counts
        size = exported[-1] if streams is None else streams
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_STREAMS:
            raise UsageError(f"`streams` must be 1 to {MOST_STREAMS}; got {streams!r}.")
        rows_each = next((rows for rows in exported if rows >= size), exported[-1])
        groups = []
        try:
            for _ in range(-(-size // rows_each)):
                groups.append(self.choice.backend.rows(rows_each, self.identity.start_latent))
        except BaseException:
            for rows in groups:
                rows.close()
            raise
        return Batch(size, groups, rows_each, m.stream_model, m.clock, self._face)

    def _face(
        self,
        speaker: Speaker,
        seed: int,
        template: npt.ArrayLike | None,
        noise: npt.ArrayLike | NoiseFn | None,
    ) -> Face:
        """Make a face of the arguments of `open`."""
        m = self.manifest
        style, rest = self.identity.blend(speaker)
        if template is not None:
            rest = _template(template, m.n_vertices)
        source = SeededNoise(seed, m.latent_width) if noise is None else GivenNoise(noise, m.latent_width)
        shapes = self.blendshapes
        solvers = [WeightSolver(shapes, rest) if shapes else None for _ in range(m.hop)]
        return Face(style, rest, source, solvers)


def _template(values: npt.ArrayLike, n_vertices: int) -> npt.NDArray[np.float32]:
    """Vertices [V, 3], read-only, from [V, 3] or [3V]. Raises UsageError."""
    wanted = f"`template` must be [{n_vertices}, 3] finite numbers"
    try:
        face = np.array(values, np.float32)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{wanted}; got something else ({error}).") from error
    if face.shape not in ((n_vertices, 3), (3 * n_vertices,)) or not np.isfinite(face).all():
        raise UsageError(f"{wanted}; got shape {list(face.shape)}.")
    face = face.reshape(n_vertices, 3)
    face.flags.writeable = False
    return face
