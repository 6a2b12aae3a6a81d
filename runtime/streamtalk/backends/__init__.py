"""Backends by name, and the choice among them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from streamtalk.errors import BackendError, MissingDependencyError, ModelError, UsageError
from streamtalk.identity import Identity
from streamtalk.model import Manifest, Precision, is_hop
from streamtalk.rows import Backend, check_hop_graphs

__all__ = ["AUTO", "Choice", "Options", "available", "choose"]

AUTO = "auto"
MOST_THREADS = 64
"""A mistyped number of threads must not take the machine down."""


@dataclass(frozen=True)
class Candidate:
    """A backend at a precision. `module` has the function `load(directory, manifest, precision, threads)`.

    `engines`: whether it needs engines that were built for it.
    """

    backend: str
    precision: Precision
    module: str
    engines: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether this is what all others are held against."""
        return self.module == "streamtalk.backends.onnxruntime"


CANDIDATES = (
    Candidate("tensorrt", "fp16", "streamtalk.backends.cuda.classic", engines=True),
    Candidate("tensorrt", "fp32", "streamtalk.backends.cuda.classic", engines=True),
    Candidate("tensorrt_rtx", "fp16", "streamtalk.backends.cuda.rtx", engines=True),
    Candidate("tensorrt_rtx", "fp32", "streamtalk.backends.cuda.rtx", engines=True),
    Candidate("onnxruntime-cuda", "fp16", "streamtalk.backends.cuda.onnxruntime"),
    Candidate("onnxruntime-cuda", "fp32", "streamtalk.backends.cuda.onnxruntime"),
    Candidate("onnxruntime-cpu", "fp32", "streamtalk.backends.onnxruntime"),
)
"""In order of preference: what is asked for, or all for `auto`, is tried from the first on."""


@dataclass(frozen=True)
class Options:
    """What a caller may set. `threads`: CPU threads of one graph run; None means the machine's cores, at most 4.
    `download`: whether vertices come to the host; False needs a GPU backend.
    """

    threads: int | None = None
    download: bool = True

    def cpu_threads(self) -> int:
        """The number of CPU threads to use. Raises UsageError."""
        if self.threads is None:
            affinity = getattr(os, "sched_getaffinity", None)  # a container's or `taskset`'s share
            return min(4, len(affinity(0)) if affinity else os.cpu_count() or 1)
        if not isinstance(self.threads, int) or not 1 <= self.threads <= MOST_THREADS:
            raise UsageError(f"`threads` must be 1 to {MOST_THREADS}; got {self.threads!r}.")
        return self.threads


@dataclass(frozen=True)
class Choice:
    """The backend taken, and why those before it in the order of preference were not.

    `passed_over` maps a backend's name and precision, such as `tensorrt fp16`, to the reason. `first_hop_s` is the
    time from the start of loading to the first hop's vertices, without the probe that a GPU must pass once.
    """

    backend: Backend
    passed_over: dict[str, str] = field(default_factory=dict)
    first_hop_s: float = 0.0


def available() -> tuple[str, ...]:
    """Names that `choose` accepts, besides `auto`."""
    return tuple(dict.fromkeys(candidate.backend for candidate in CANDIDATES))


def choose(name: str, directory: Path, manifest: Manifest, identity: Identity, options: Options) -> Choice:
    """Load the first candidate of the backend `name`, or of all for `auto`, that works.

    Each is tried with a hop of silence, so that the first hop of a stream costs what the others cost. On a GPU it must
    also reproduce the model's probe. Raises UsageError, ModelError, BackendError or MissingDependencyError.
    """
    if name not in (AUTO, *available()):
        raise UsageError(
            f"No backend {name!r} in this version. There are: {', '.join((AUTO, *available()))}."
        )
    check_hop_graphs(manifest)
    failures: dict[str, Exception] = {}
    for candidate in _candidates(name, manifest):
        try:
            choice = _load(candidate, directory, manifest, identity, options)
        except (BackendError, MissingDependencyError, ModelError) as error:
            # Wrong files of the reference are wrong for every backend; an engine's own are one reason to pass it over.
            if candidate.is_reference and isinstance(error, ModelError):
                raise
            # Without its traceback, which would keep the failed backend's memory.
            failures[f"{candidate.backend} {candidate.precision}"] = error.with_traceback(None)
        else:
            return replace(choice, passed_over={what: str(error) for what, error in failures.items()})
    reasons = {str(error): error for error in failures.values()}
    if name != AUTO and len(reasons) == 1:
        raise next(iter(reasons.values()))
    reasons_by_candidate = " ".join(f"{what}: {error}" for what, error in failures.items())
    raise BackendError(f"No backend can run this model here. {reasons_by_candidate}")


def _candidates(name: str, manifest: Manifest) -> Iterator[Candidate]:
    """Candidates of a backend, or of all, whose precision was exported or, where it needs engines, built.

    A backend without any of its engines is tried once: its loader says how to build them.
    """
    exported = {graph.precision for key, graph in manifest.graphs.items() if is_hop(key)}
    built = {(engine.backend, engine.precision) for engine in manifest.engines}
    missing: set[str] = set()
    for candidate in CANDIDATES:
        backend = candidate.backend
        if name not in (AUTO, backend):
            continue
        if not candidate.engines:
            if candidate.precision in exported:
                yield candidate
        elif (backend, candidate.precision) in built:
            yield candidate
        elif backend not in missing and not any(other == backend for other, _ in built):
            missing.add(backend)
            yield candidate


def _load(
    candidate: Candidate, directory: Path, manifest: Manifest, identity: Identity, options: Options
) -> Choice:
    began = perf_counter()
    module = importlib.import_module(candidate.module)
    backend: Backend = module.load(directory, manifest, candidate.precision, options.cpu_threads())
    rows = backend.rows(1, identity.start_latent)
    try:
        rows.start(0, identity.styles[0], identity.templates[0])
        rows.launch(np.ones(1, np.bool_))
        finite = bool(np.isfinite(rows.vertices()).all())
        first_hop_s = perf_counter() - began
    finally:
        rows.close()
    if not finite:
        # On a GPU it is that device's kernels that are wrong; elsewhere the graphs themselves.
        kind = ModelError if backend.fingerprint is None else BackendError
        raise kind(f"{directory} gives vertices that are not finite on {candidate.backend}. Export again.")
    if backend.fingerprint is not None:
        from streamtalk.backends.probe import require_probe

        require_probe(backend, directory, manifest)
    return Choice(backend if options.download else backend.on_device(), first_hop_s=first_hop_s)
