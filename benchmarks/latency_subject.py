"""Subjects of `benchmarks.latency`: a preset as graphs and as the same model in torch, held against each other."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.released import Released
from streamtalk import StreamTalkError, Talker
from streamtalk.app.audio.files import read_mono
from streamtalk.model import Manifest, read_manifest, sha256_of
from streamtalk_export import cli as export_cli
from streamtalk_export.checkpoint import load_model, random_model
from streamtalk_export.config import load_config
from streamtalk_export.errors import ExportError
from streamtalk_export.excerpt import Excerpt
from streamtalk_export.hubert import hubert_config
from streamtalk_export.model import TalkerModel, stream_frames
from streamtalk_export.parity import CPU, Stages, certify_hop, missed, read_identity
from streamtalk_export.sampler import sampler_table

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "models" / "bundled"
CACHE = Path("~/.cache/streamtalk/benchmarks")
SEED = 0  # of the random weights
PARITY_FRAMES = 6
PARITY = 1e-3
"""Largest difference of a vertex, as a share of the largest offset: float32 summed in another order, fed back."""


class ParityError(Exception):
    """Raised where two systems that should give the same vertices do not."""


FAILURES = (ParityError, ExportError, StreamTalkError, OSError)
"""Errors that end a benchmark, see `complain`."""


def complain(command: str, error: Exception) -> int:
    """Print the error that ended `command`; returns its exit code: 1 where parity failed, 2 where something needed is
    missing.
    """
    if isinstance(error, ParityError):
        print(error, file=sys.stderr)
        return 1
    print(f"{command}: {error}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class Subject:
    """A preset: its model directory and the same model in torch."""

    preset: str
    folder: Path
    model: TalkerModel
    manifest: Manifest


def subject(preset: str, cache: Path, engine: Path | None = None) -> Subject:
    """Export `preset` unless `cache` has it. Raises ExportError and StreamTalkError."""
    folder = engine or exported(preset, cache, "", [])
    config = load_config(BUNDLED / "config.yaml" if preset == "bundled" else preset)
    hubert = hubert_config(None) if config.audio.kind == "hubert" else None
    if preset == "bundled":
        model = load_model(config, hubert, BUNDLED / "model.safetensors")
    else:
        model = random_model(config, hubert, SEED)
    return Subject(preset, folder, model.eval(), read_manifest(folder))


def exported(preset: str, cache: Path, variant: str, options: Sequence[str]) -> Path:
    """Return the model directory of a preset's variant, exported unless `cache` has it of this exporter."""
    name = f"{preset}-{variant}" if variant else preset
    out = cache / f"{name}@{_key(preset, options)}"
    given = [] if preset == "bundled" else ["--config", preset, "--random-weights", str(SEED)]
    if not (out / "manifest.json").exists():
        for old in cache.glob(f"{name}@*"):
            shutil.rmtree(old)
        export_cli.run(export_cli.parser().parse_args([*given, *options, "--out", str(out)]))
    return out


def _key(preset: str, options: Sequence[str]) -> str:
    """A short hash of all that an export depends on here."""
    sources = sorted(Path(export_cli.__file__).parent.glob("*.py"))
    weights = [BUNDLED / name for name in ("model.safetensors", "config.yaml", "face.npz")]
    hashes = [sha256_of(path) for path in (*sources, *(weights if preset == "bundled" else ()))]
    return hashlib.sha256(" ".join([*hashes, *options]).encode()).hexdigest()[:8]


def settings_of(m: Manifest) -> dict[str, object]:
    """Settings that every figure of a model depends on."""
    return {
        "hop": m.hop,
        "context_s": m.context_samples / m.sample_rate,
        "history": m.history,
        "decode_window": m.decode_window,
        "steps": m.steps,
        "delay_s": round(m.clock.delay_s, 4),
        "fps": m.fps,
    }


def speech(seconds: float) -> npt.NDArray[np.float32]:
    """The demo clip again and again: [n] at 16 kHz."""
    pcm = np.concatenate(list(read_mono(BUNDLED / "demo.wav", 16000, 1.0)))
    return np.resize(pcm, round(seconds * 16000))


def baseline(given: Subject, frames: int) -> Released:
    """The released algorithm on `frames` frames of the same speech; latents are random, which no time depends on."""
    m, generator = given.manifest, torch.Generator().manual_seed(SEED)
    features = given.model.offline_features(torch.from_numpy(speech(frames / m.fps + 1)))[:frames]
    noise = torch.randn(frames, m.latent_width, generator=generator)
    latents = torch.randn(frames + 1, m.latent_width, generator=generator)
    table = sampler_table(given.model.config.schedule, m.steps, m.sampler)
    return Released(given.model, table, features, noise, latents)


def check_parity(given: Subject, base: Released) -> float:
    """Compare the stages' vertices with the released algorithm's over the first frames, and the hop graph with the
    stages; returns the first comparison's worst share of the motion.

    Raises ParityError.
    """
    m = given.manifest
    identity = read_identity(given.folder, m)
    excerpt = Excerpt.make(m, PARITY_FRAMES, identity)
    stages = Stages(given.folder, m, identity["start_latent"])
    wrong = missed(certify_hop(stages, m, Talker.load(given.folder, CPU), excerpt, PARITY_FRAMES))
    if wrong:
        raise ParityError(
            f"{given.preset}: the hop graph differs from its stages ({wrong}): nothing was timed."
        )
    stages.begin()
    still = replace(excerpt, noise=base.noise.numpy(), template=np.zeros((m.n_vertices, 3), np.float32))
    features = base.features[:PARITY_FRAMES]
    made = stream_frames(
        given.model, features, base.noise, base.speaker, base.table, m.history, m.decode_window
    )
    latents = [given.model.autoencoder.start_latent(), *(latent for _, latent, _ in made)]
    released = replace(base, latents=torch.stack(latents))
    worst = largest = 0.0
    for i, feature in enumerate(features.numpy()):
        _, _, vertices = stages.next(feature, still)
        wanted = released.streaming_frame(i)[0].numpy().reshape(-1, 3)
        worst = max(worst, float(np.abs(vertices - wanted).max()))
        largest = max(largest, float(np.abs(wanted).max()))
    if not worst <= PARITY * largest:
        raise ParityError(
            f"{given.preset}: the stages and the released algorithm differ by {worst / largest:.1e} of the motion "
            f"(bound {PARITY:.0e}): nothing was timed."
        )
    return worst / largest
