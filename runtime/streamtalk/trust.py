"""The stored probe: a short stream that a backend must reproduce on a device before it is trusted there.

TensorRT has shipped kernels that are silently wrong, so an engine whose file is right may still compute something
else on this GPU. What passed is remembered, keyed by everything that the result depends on.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamtalk.backends.protocol import Backend, Float32
from streamtalk.backends.slots import SlotBackend
from streamtalk.cache import cache_directory, locked, replace_file
from streamtalk.errors import BackendError, ModelError, OutputError
from streamtalk.manifest import Manifest, Precision, verified

STORED_FRAMES = 16
"""Frames whose vertices are kept, from the first to one past the filling of both windows."""
STORED_VERTICES = 512
QUANTILE = 0.99


@dataclass(frozen=True)
class Limits:
    """Largest allowed vertex error, in the unit of the vertices: its 99th percentile and its maximum."""

    p99: float
    max: float


@dataclass(frozen=True)
class ProbeData:
    """Inputs and expected outputs of L frames.

    pcm [hops, window_samples], noise [L, C], style [E], start_latent [C], template [V, 3]; of the frames `frames` [F]
    and vertices `vertices` [S] the float32 graphs gave `expected` [F, S, 3].
    """

    pcm: Float32
    noise: Float32
    style: Float32
    start_latent: Float32
    template: Float32
    frames: npt.NDArray[np.int64]
    vertices: npt.NDArray[np.int64]
    expected: Float32
    limits: Mapping[Precision, Limits]

    def save(self, file: Path) -> None:
        """Write it as a compressed archive."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        limits = {f"limits_{name}": np.array([of.p99, of.max]) for name, of in self.limits.items()}
        np.savez_compressed(file, allow_pickle=False, **arrays, **limits)


_ARRAYS = ("pcm", "noise", "style", "start_latent", "template", "frames", "vertices", "expected")


def read_probe(directory: Path, manifest: Manifest) -> ProbeData | None:
    """The model's probe, or None where it has none. Raises ModelError."""
    if manifest.probe is None:
        return None
    path = verified(directory, manifest.probe.file, manifest.probe.sha256)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _ARRAYS}
            pairs = {name: archive[f"limits_{name}"].tolist() for name in ("fp16", "fp32")}
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is not a probe of this version ({error}). Export again.") from error
    limits: dict[Precision, Limits] = {"fp16": Limits(*pairs["fp16"]), "fp32": Limits(*pairs["fp32"])}
    return ProbeData(**arrays, limits=limits)


def trust(backend: Backend, directory: Path, manifest: Manifest) -> None:
    """Make sure that `backend` has reproduced the model's probe on its device, now or before.

    `backend.fingerprint` keys the memory. Raises BackendError where the probe is missing or missed, ModelError
    where it is damaged.
    """
    probe = read_probe(directory, manifest)
    if probe is None or manifest.probe is None:
        raise BackendError(
            f"{directory} has no probe to check {backend.name} with on this device. Export again."
        )
    key = hashlib.sha256(f"{backend.fingerprint}\n{manifest.probe.sha256}".encode()).hexdigest()
    folder = cache_directory() / "probes"
    passed = folder / f"{key}.json"
    try:
        # Under the lock, so that of many processes that start together one runs the probe and the others read.
        with locked(folder / f"{key}.lock"):
            if not _remembered(passed):
                p99, worst = _reproduced(backend, manifest, probe)
                result = {"fingerprint": backend.fingerprint, "p99": p99, "max": worst}
                replace_file(passed, json.dumps(result).encode())
    except OutputError:
        # A folder that cannot be written, as on a read-only device: the probe runs at every start.
        _reproduced(backend, manifest, probe)


def _reproduced(backend: Backend, manifest: Manifest, probe: ProbeData) -> tuple[float, float]:
    """Vertex errors of the probe, within their limits. Raises BackendError."""
    if not isinstance(backend, SlotBackend):
        raise BackendError(f"{backend.name} has no slots to run the probe in.")
    p99, worst = measure(backend, manifest, probe)
    limits = probe.limits[backend.precision]
    # Negated: a NaN fails.
    if not (p99 <= limits.p99 and worst <= limits.max):
        raise BackendError(
            f"{backend.description} does not reproduce the model: vertex error p99 {p99:.3g}, max {worst:.3g}; "
            f"allowed are {limits.p99:.3g} and {limits.max:.3g}. It is not used. Another version of the "
            "library or driver may compute it right."
        )
    return p99, worst


def measure(backend: SlotBackend, manifest: Manifest, probe: ProbeData) -> tuple[float, float]:
    """Vertex error of the probe's stream, run in every slot at once: its 99th percentile and its maximum, each vertex
    in the slot that is farthest off.
    """
    slots = backend.slots(probe.start_latent)
    stored = {int(frame): place for place, frame in enumerate(probe.frames)}
    errors = np.empty(probe.expected.shape[:2])
    every = np.ones(manifest.batch, np.bool_)
    try:
        for slot in range(manifest.batch):
            slots.start(slot, probe.style, probe.template)
        for index, noise in enumerate(probe.noise):
            if index % manifest.hop == 0:
                slots.pcm[:] = probe.pcm[index // manifest.hop]
                slots.encode(every)
            slots.noise[:] = noise
            slots.frame(index, np.full(manifest.batch, index), every)
            if index in stored:
                place = stored[index]
                got = slots.vertices()[:, probe.vertices].astype(np.float64)
                # Not fmax, which passes over a NaN.
                errors[place] = np.linalg.norm(got - probe.expected[place], axis=-1).max(axis=0)
    finally:
        slots.close()
    return float(np.quantile(errors, QUANTILE)), float(errors.max())


def _remembered(file: Path) -> bool:
    try:
        return "fingerprint" in json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
