"""The stored probe: a short stream that a backend must reproduce on a device before it is used there.

TensorRT has shipped kernels that are silently wrong, so an engine whose file is right may still compute something
else on this GPU. A pass is remembered, keyed by everything that the result depends on.
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

from streamtalk.backends.disk_cache import cache_directory, locked, replace_file
from streamtalk.errors import BackendError, ModelError, OutputError
from streamtalk.model import Manifest, Precision, verified
from streamtalk.rows import Backend, Float32

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


def require_probe(backend: Backend, directory: Path, manifest: Manifest, rows: int = 1) -> None:
    """Raise BackendError unless `backend` reproduces the model's probe on its device, now or before.

    `backend.fingerprint` is the key of what is remembered; it must cover the graph of so many rows. Raises
    BackendError also where the model has no probe, ModelError where that is damaged.
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
        # Under the lock: of many processes that start together one runs the probe and the others read.
        with locked(folder / f"{key}.lock"):
            if not _remembered(passed):
                p99, worst = _reproduced(backend, manifest, probe, rows)
                result = {"fingerprint": backend.fingerprint, "p99": p99, "max": worst}
                replace_file(passed, json.dumps(result).encode())
    except OutputError:
        # A folder that cannot be written, as on a read-only device: the probe runs at every start.
        _reproduced(backend, manifest, probe, rows)


def _reproduced(backend: Backend, manifest: Manifest, probe: ProbeData, rows: int) -> tuple[float, float]:
    """Vertex errors of the probe, within their limits. Raises BackendError."""
    p99, worst = measure(backend, manifest, probe, rows)
    limits = probe.limits[backend.precision]
    # Negated: a NaN fails.
    if not (p99 <= limits.p99 and worst <= limits.max):
        raise BackendError(
            f"{backend.description} does not reproduce the model: vertex error p99 {p99:.3g}, max {worst:.3g}; "
            f"allowed are {limits.p99:.3g} and {limits.max:.3g}. It is not used. Another version of the "
            "library or driver may compute it right."
        )
    return p99, worst


def measure(backend: Backend, manifest: Manifest, probe: ProbeData, rows: int = 1) -> tuple[float, float]:
    """Vertex error of the probe's stream, run in every row at once: its 99th percentile and its maximum, each vertex
    in the row that is farthest off.
    """
    hop, every = manifest.hop, np.ones(rows, np.bool_)
    noise = np.zeros((len(probe.pcm) * hop, manifest.latent_width), np.float32)
    noise[: len(probe.noise)] = probe.noise
    stored = {int(frame): place for place, frame in enumerate(probe.frames)}
    errors = np.empty(probe.expected.shape[:2])
    group = backend.rows(rows, probe.start_latent)
    try:
        for row in range(rows):
            group.start(row, probe.style, probe.template)
        for first, window in zip(range(0, len(noise), hop), probe.pcm, strict=True):
            group.inputs["pcm"][:] = window
            group.inputs["noise"][:] = noise[first : first + hop]
            group.launch(every)
            vertices = group.vertices()
            for frame in stored.keys() & range(first, first + hop):
                got = vertices[:, frame - first, probe.vertices].astype(np.float64)
                expected = probe.expected[stored[frame]]
                # Not fmax, which passes over a NaN.
                errors[stored[frame]] = np.linalg.norm(got - expected, axis=-1).max(axis=0)
            group.advance(every)
    finally:
        group.close()
    return float(np.quantile(errors, QUANTILE)), float(errors.max())


def _remembered(file: Path) -> bool:
    try:
        return "fingerprint" in json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
