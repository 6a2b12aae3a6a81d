"""Backends by name, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamtalk.backends import onnxruntime_cpu, onnxruntime_cuda, tensorrt
from streamtalk.backends.contract import check_manifest
from streamtalk.backends.protocol import Backend, Lane, LaneState
from streamtalk.errors import BackendError, MissingDependencyError, ModelError, UsageError
from streamtalk.identity import Identity
from streamtalk.manifest import Manifest
from streamtalk.trust import trust

__all__ = ["AUTO", "Backend", "Choice", "Lane", "LaneState", "Options", "available", "choose"]

AUTO = "auto"
MOST_THREADS = 64
"""A mistyped number of threads must not take the machine down."""


@dataclass(frozen=True)
class Options:
    """What a caller may set. `threads`: CPU threads of one graph run; None means the machine's cores, at
    most 4.
    """

    threads: int | None = None

    def cpu_threads(self) -> int:
        """The number of CPU threads to use. Raises UsageError."""
        if self.threads is None:
            return min(4, _usable_cores())
        if not isinstance(self.threads, int) or not 1 <= self.threads <= MOST_THREADS:
            raise UsageError(f"`threads` must be 1 to {MOST_THREADS}; got {self.threads!r}.")
        return self.threads


@dataclass(frozen=True)
class Choice:
    """The backend taken, and why those before it in the order of preference were not: `{name: reason}`."""

    backend: Backend
    passed_over: dict[str, str]


Loader = Callable[[Path, Manifest, Options], Backend]


def _load_onnxruntime_cpu(directory: Path, manifest: Manifest, options: Options) -> Backend:
    return onnxruntime_cpu.OnnxRuntimeCpu(directory, manifest, options.cpu_threads())


def _load_onnxruntime_cuda(directory: Path, manifest: Manifest, _: Options) -> Backend:
    return onnxruntime_cuda.OnnxRuntimeCuda(directory, manifest)


def _load_tensorrt(directory: Path, manifest: Manifest, _: Options) -> Backend:
    return tensorrt.TensorRt(tensorrt.CLASSIC, directory, manifest)


def _load_tensorrt_rtx(directory: Path, manifest: Manifest, _: Options) -> Backend:
    return tensorrt.TensorRt(tensorrt.RTX, directory, manifest)


# In order of preference: `auto` takes the first that works.
LOADERS: dict[str, Loader] = {
    tensorrt.CLASSIC: _load_tensorrt,
    tensorrt.RTX: _load_tensorrt_rtx,
    onnxruntime_cuda.NAME: _load_onnxruntime_cuda,
    onnxruntime_cpu.NAME: _load_onnxruntime_cpu,
}


def available() -> tuple[str, ...]:
    """Names that `choose` accepts, besides `auto`."""
    return tuple(LOADERS)


def choose(name: str, directory: Path, manifest: Manifest, identity: Identity, options: Options) -> Choice:
    """Load the backend `name`, or for `auto` the first that works.

    Each is tried with one hop and one frame of silence: what fails there is not taken, and the first frame
    of a stream costs what the others cost. On a GPU it must also reproduce the model's probe. Raises
    UsageError, ModelError, BackendError or MissingDependencyError.
    """
    if name not in (AUTO, *LOADERS):
        raise UsageError(f"No backend {name!r} in this version. There are: {', '.join((AUTO, *LOADERS))}.")
    check_manifest(manifest)
    if name != AUTO:
        return Choice(_load(name, directory, manifest, identity, options), {})
    passed_over: dict[str, str] = {}
    for candidate in LOADERS:
        try:
            return Choice(_load(candidate, directory, manifest, identity, options), passed_over)
        except (BackendError, MissingDependencyError) as error:
            passed_over[candidate] = str(error)
    reasons = " ".join(f"{candidate}: {reason}" for candidate, reason in passed_over.items())
    raise BackendError(f"No backend can run this model here. {reasons}")


def _load(name: str, directory: Path, manifest: Manifest, identity: Identity, options: Options) -> Backend:
    backend = LOADERS[name](directory, manifest, options)
    lane = backend.lane(identity.styles[0], identity.templates[0], identity.start_latent)
    try:
        lane.encode()
        lane.frame(0)
        finite = bool(np.isfinite(lane.vertices()).all())
    finally:
        lane.close()
    if not finite:
        # On a GPU it is that device's kernels that are wrong; elsewhere the graphs themselves.
        kind = ModelError if backend.fingerprint is None else BackendError
        raise kind(f"{directory} gives vertices that are not finite on {name}. Export again.")
    if backend.fingerprint is not None:
        trust(backend, directory, manifest)
    return backend


def _usable_cores() -> int:
    # A container's or `taskset`'s share, where the platform can tell.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
