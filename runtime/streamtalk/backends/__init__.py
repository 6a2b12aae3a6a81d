"""Backends by name, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from streamtalk.backends import onnxruntime_cpu, onnxruntime_cuda, tensorrt
from streamtalk.backends.contract import check_manifest
from streamtalk.backends.protocol import Backend, Lane, LaneState
from streamtalk.cuda.backend import CudaBackend
from streamtalk.engine_file import PRECISIONS
from streamtalk.errors import BackendError, MissingDependencyError, ModelError, UsageError
from streamtalk.identity import Identity
from streamtalk.manifest import FRAME, Manifest, Precision, graph_key
from streamtalk.trust import trust

__all__ = ["AUTO", "Backend", "Choice", "Lane", "LaneState", "Options", "available", "choose"]

AUTO = "auto"
REFERENCE = onnxruntime_cpu.NAME
MOST_THREADS = 64
"""A mistyped number of threads must not take the machine down."""


@dataclass(frozen=True)
class Options:
    """What a caller may set. `threads`: CPU threads of one graph run; None means the machine's cores, at
    most 4. `download`: whether vertices come to the host; False needs a GPU backend.
    """

    threads: int | None = None
    download: bool = True

    def cpu_threads(self) -> int:
        """The number of CPU threads to use. Raises UsageError."""
        if self.threads is None:
            return min(4, _usable_cores())
        if not isinstance(self.threads, int) or not 1 <= self.threads <= MOST_THREADS:
            raise UsageError(f"`threads` must be 1 to {MOST_THREADS}; got {self.threads!r}.")
        return self.threads


@dataclass(frozen=True)
class Choice:
    """The backend taken, and why those before it in the order of preference were not: `{name: reason}`. Where the one
    taken failed with graphs or engines that it prefers, their precision follows its name: `onnxruntime-cuda fused`.

    `first_frame_s` is how long what was taken took to its first frame: the libraries, the engines, what they
    compile at their first run. The probe that a GPU must pass on its very first load comes on top.
    """

    backend: Backend
    passed_over: dict[str, str] = field(default_factory=dict)
    first_frame_s: float = 0.0


Loader = Callable[[Path, Manifest, Options, Precision], Backend]


def _load_onnxruntime_cpu(directory: Path, manifest: Manifest, options: Options, _: Precision) -> Backend:
    if not options.download:
        raise BackendError(
            f"{onnxruntime_cpu.NAME} makes vertices in host memory: download=False needs a GPU backend."
        )
    return onnxruntime_cpu.OnnxRuntimeCpu(directory, manifest, options.cpu_threads())


def _load_onnxruntime_cuda(directory: Path, manifest: Manifest, _: Options, form: Precision) -> Backend:
    return onnxruntime_cuda.load(directory, manifest, form)


def _load_tensorrt(directory: Path, manifest: Manifest, _: Options, form: Precision) -> Backend:
    return tensorrt.load(tensorrt.CLASSIC, directory, manifest, form)


def _load_tensorrt_rtx(directory: Path, manifest: Manifest, _: Options, form: Precision) -> Backend:
    return tensorrt.load(tensorrt.RTX, directory, manifest, form)


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
    of a stream costs what the others cost. On a GPU it must also reproduce the model's probe: with the graphs
    or engines that it prefers, or else the next. Raises UsageError, ModelError, BackendError or
    MissingDependencyError.
    """
    if name not in (AUTO, *LOADERS):
        raise UsageError(f"No backend {name!r} in this version. There are: {', '.join((AUTO, *LOADERS))}.")
    check_manifest(manifest)
    passed_over: dict[str, str] = {}
    for candidate in LOADERS if name == AUTO else (name,):
        try:
            choice = _best(candidate, directory, manifest, identity, options)
            return replace(choice, passed_over=passed_over | choice.passed_over)
        except (BackendError, MissingDependencyError, ModelError) as error:
            # Wrong files of the reference are wrong for every backend; an engine's own are one reason to pass it over.
            if name != AUTO or (candidate == REFERENCE and isinstance(error, ModelError)):
                raise
            passed_over[candidate] = str(error)
    reasons = " ".join(f"{candidate}: {reason}" for candidate, reason in passed_over.items())
    raise BackendError(f"No backend can run this model here. {reasons}")


def _best(name: str, directory: Path, manifest: Manifest, identity: Identity, options: Options) -> Choice:
    """Load a backend with the first precision that works: what one GPU refuses or computes wrong in float16 it may well
    do in float32, and still faster than a CPU.
    """
    failed: dict[str, str] = {}
    for form in _forms(name, manifest):
        try:
            choice = _load(name, form, directory, manifest, identity, options)
            return replace(choice, passed_over={f"{name} {before}": why for before, why in failed.items()})
        except (BackendError, MissingDependencyError, ModelError) as error:
            if not failed and not isinstance(error, BackendError):
                raise
            again = str(error) in failed.values()
            failed[form] = str(error)
            if again or not isinstance(error, BackendError):
                break  # it is no matter of precision
    reasons = set(failed.values())
    said = (f"{form}: {reason}" for form, reason in failed.items())
    raise BackendError(reasons.pop() if len(reasons) == 1 else " ".join(said))


def _forms(name: str, manifest: Manifest) -> list[Precision]:
    """The precisions that a backend may run, in the order in which it takes them; of engines those that were built."""
    if name == onnxruntime_cuda.NAME:
        return [form for form in onnxruntime_cuda.FORMS if graph_key(FRAME, form) in manifest.graphs]
    built = {engine.precision for engine in manifest.engines if engine.backend == name}
    return [precision for precision in PRECISIONS if precision in built] or ["fp32"]


def _load(
    name: str,
    form: Precision,
    directory: Path,
    manifest: Manifest,
    identity: Identity,
    options: Options,
) -> Choice:
    began = perf_counter()
    backend = LOADERS[name](directory, manifest, options, form)
    lane = backend.lane(identity.styles[0], identity.templates[0], identity.start_latent)
    try:
        lane.encode()
        lane.frame(0)
        finite = bool(np.isfinite(lane.vertices()).all())
        first_frame_s = perf_counter() - began
    finally:
        lane.close()
    if not finite:
        # On a GPU it is that device's kernels that are wrong; elsewhere the graphs themselves.
        kind = ModelError if backend.fingerprint is None else BackendError
        raise kind(f"{directory} gives vertices that are not finite on {name}. Export again.")
    if backend.fingerprint is not None:
        trust(backend, directory, manifest)
    if not options.download and isinstance(backend, CudaBackend):
        backend = replace(backend, download=False)
    return Choice(backend, first_frame_s=first_frame_s)


def _usable_cores() -> int:
    # A container's or `taskset`'s share, where the platform can tell.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
