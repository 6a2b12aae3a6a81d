"""Probes of toy models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from streamtalk.backends.onnxruntime import CpuBackend
from streamtalk.backends.probe import Limits, ProbeData
from streamtalk.model import FILE_NAME, Asset, Manifest, read_manifest, sha256_of
from tests.runtime.toy import Toy

FRAMES = 11
"""No multiple of the toy's hop."""
PEAK = Limits(p99=1e-6, max=1e-6)


def add_probe(directory: Path, toy: Toy, shift: float = 0.0) -> Manifest:
    """Give a toy model a probe of its own frames, moved by `shift`."""
    m, rng, identity = read_manifest(directory), np.random.default_rng(3), toy.identity
    probe = ProbeData(
        pcm=rng.standard_normal((-(-FRAMES // m.hop), m.window_samples)).astype(np.float32),
        noise=rng.standard_normal((FRAMES, m.latent_width)).astype(np.float32),
        style=identity["styles"][0],
        start_latent=identity["start_latent"],
        template=identity["templates"][0],
        frames=np.array([0, 5, FRAMES - 1]),
        vertices=np.array([0, 3]),
        expected=np.zeros((3, 2, 3), np.float32),
        limits={"fp16": PEAK, "fp32": PEAK},
    )
    rows, one = CpuBackend(directory, m, 1).rows(1, probe.start_latent), np.ones(1, np.bool_)
    rows.start(0, probe.style, probe.template)
    frames = []
    for first, window in zip(range(0, FRAMES, m.hop), probe.pcm, strict=True):
        noise = probe.noise[first : first + m.hop]
        rows.inputs["pcm"][0], rows.inputs["noise"][0, : len(noise)] = window, noise
        rows.launch(one)
        frames += list(rows.vertices()[0].copy())
        rows.advance(one)
    probe.expected[:] = np.array(frames)[np.ix_(probe.frames, probe.vertices)] + shift
    arrays: dict[str, Any] = {key: value for key, value in vars(probe).items() if key != "limits"}
    arrays |= {f"limits_{precision}": [peak.p99, peak.max] for precision, peak in probe.limits.items()}
    np.savez_compressed(directory / "probe.npz", **arrays)
    asset = Asset(file="probe.npz", sha256=sha256_of(directory / "probe.npz"))
    m = msgspec.structs.replace(m, probe=asset)
    (directory / FILE_NAME).write_bytes(msgspec.json.encode(m))
    return m
