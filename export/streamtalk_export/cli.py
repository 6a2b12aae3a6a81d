"""`python export.py`: the command line of the exporter."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from streamtalk import StreamTalkError, check_builder, ended_by_signals
from streamtalk.model import Manifest, sha256_of
from streamtalk_export.checkpoint import load_model, random_model
from streamtalk_export.config import PRESETS, SPEAKERS, ModelConfig, load_config
from streamtalk_export.errors import ExportError
from streamtalk_export.export_model import Identities, Settings, export_model
from streamtalk_export.hubert import hubert_config
from streamtalk_export.templates import Mesh, read_faces, read_templates

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "bundled"
TARGETS = ("onnx", "tensorrt", "tensorrt_rtx")
BUNDLED_ROWS = (8,)
MOST = 4096
"""Largest number of frames, steps and rows. Tables of the predictor grow with the square of its history."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="export.py",
        description="Export a StreamingTalker checkpoint to ONNX. Without arguments: the bundled model.",
    )
    weights = p.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help=".ckpt, .pt or .safetensors")
    weights.add_argument(
        "--random-weights",
        type=_seed,
        metavar="SEED",
        help="no checkpoint: seeded random weights, for benchmarks",
    )
    p.add_argument(
        "--config", metavar="FILE|vocaset|biwi", help="a preset, or a YAML file of the release's schema"
    )
    p.add_argument(
        "--hubert-config", type=Path, metavar="FILE", help="config.json of another HuBERT-base size"
    )
    p.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help="neutral faces: .npy, .npz, .pkl, .obj, .ply (default: zeros)",
    )
    p.add_argument("--faces", type=Path, metavar="FILE", help="triangles: .npz, .npy, .obj, .ply")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: engines/NAME")
    _add_stream_options(p)
    return p


def _add_stream_options(p: argparse.ArgumentParser) -> None:
    """Options that trade delay, cost and accuracy, and those of what is built."""
    p.add_argument("--history", type=_count, metavar="N", help="frames the predictor remembers")
    p.add_argument(
        "--decode-window", type=_count, metavar="N", help="latents the decoder sees (default: history)"
    )
    p.add_argument(
        "--hop", type=_count, metavar="N", help="frames that one window of audio serves, computed together"
    )
    p.add_argument("--audio-context", type=_amount, metavar="S", help="seconds of past audio in a window")
    p.add_argument(
        "--lookahead", type=_amount, metavar="MS", help="milliseconds of audio after a hop's last frame"
    )
    p.add_argument("--steps", type=_count, metavar="N", help="denoising steps")
    p.add_argument("--sampler", choices=("ddim", "ddim_legacy"))
    p.add_argument(
        "--batch",
        type=_count,
        nargs="+",
        metavar="N",
        help="rows of further hop graphs, for many streams in one launch (default: the bundled model's 8)",
    )
    p.add_argument(
        "--no-fold", action="store_true", help="unroll a linear head's steps instead of folding them"
    )
    p.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="fp16 writes float16 hop graphs as well, and builds the engines from them",
    )
    p.add_argument("--targets", default="onnx", metavar="LIST", help=f"{', '.join(TARGETS)}: what to build")
    p.add_argument(
        "--compute-capability",
        type=_capabilities,
        default=(),
        metavar="LIST",
        help="GPUs that tensorrt_rtx builds for, such as 86,89,120 (default: all that it knows)",
    )


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text} must be 1 to {MOST}")
    return value


def _capabilities(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} must be numbers such as 86,120") from error


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < 3600:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0, and less than 3600")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} must be 0 to 2^63 - 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the exporter; returns the exit code. Problems are one sentence on stderr and code 2."""
    arguments = parser().parse_args(argv)
    try:
        began = time.perf_counter()
        with ended_by_signals() as check:
            out, manifest = run(arguments, check)
    except KeyboardInterrupt:
        print("export.py: interrupted; nothing was written.", file=sys.stderr)
        return 130
    except (ExportError, StreamTalkError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("export.py: not enough memory for a model of this size.", file=sys.stderr)
        return 2
    print(certificate_table(manifest))
    print(f"\n{manifest.name} is in {out}  ({time.perf_counter() - began:.0f} s)")
    return 0


def run(arguments: argparse.Namespace, check: Callable[[], None] = lambda: None) -> tuple[Path, Manifest]:
    """Export as the parsed arguments say; returns the directory and its manifest. `check` is called before each step,
    and may end it by what it raises. Raises ExportError.
    """
    bundled = all(getattr(arguments, name) is None for name in ("checkpoint", "random_weights", "config"))
    targets = _checked(arguments, bundled)
    config = load_config(BUNDLED / "config.yaml" if bundled else arguments.config)
    hubert = hubert_config(arguments.hubert_config) if config.audio.kind == "hubert" else None
    if hubert is not None and hubert.hidden_size != config.predictor.audio_encode_dim:
        raise ExportError(
            f"audio_encode_dim is {config.predictor.audio_encode_dim}, HuBERT's hidden_size {hubert.hidden_size}; "
            "give the matching --hubert-config."
        )
    checkpoint = BUNDLED / "model.safetensors" if bundled else arguments.checkpoint
    if checkpoint is None:
        model = random_model(config, hubert, arguments.random_weights)
        digest = f"random-weights-{arguments.random_weights}"
    else:
        model = load_model(config, hubert, checkpoint)
        digest = sha256_of(checkpoint)
    face = BUNDLED / "face.npz" if bundled else None
    identities = read_identities(config, arguments.template or face, arguments.faces or face)
    out = arguments.out or ROOT / "engines" / ("bundled" if bundled else Path(config.name).name or "model")
    settings = Settings(
        history=arguments.history,
        decode_window=arguments.decode_window,
        hop=arguments.hop,
        context_s=arguments.audio_context,
        lookahead_ms=arguments.lookahead,
        steps=arguments.steps,
        sampler=arguments.sampler,
        batch=tuple(arguments.batch or (BUNDLED_ROWS if bundled else ())),
        fold=not arguments.no_fold,
        precision=arguments.precision,
        targets=tuple(sorted(targets)),
        compute_capabilities=arguments.compute_capability,
    )

    def say(line: str) -> None:
        check()
        print(line, file=sys.stderr, flush=True)

    return out, export_model(model, identities, out, settings, digest, say)


def _checked(arguments: argparse.Namespace, bundled: bool) -> set[str]:
    """The engines to build, once options that contradict each other were refused. Raises ExportError."""
    if bundled and not (BUNDLED / "model.safetensors").is_file():
        raise ExportError(
            f"No bundled model in {BUNDLED}; give --config with --checkpoint or --random-weights."
        )
    targets = {name.strip() for name in arguments.targets.split(",") if name.strip()}
    if unknown := targets.difference(TARGETS):
        raise ExportError(f"--targets {', '.join(sorted(unknown))} is unknown; known: {', '.join(TARGETS)}.")
    targets.discard("onnx")
    for target in sorted(targets):
        check_builder(target, arguments.compute_capability)
    if arguments.compute_capability and not targets:
        raise ExportError("--compute-capability is for engines; add --targets tensorrt_rtx.")
    if not bundled and arguments.config is None:
        raise ExportError(
            f"--config is needed with a checkpoint: a YAML file, or one of {', '.join(PRESETS)}."
        )
    if arguments.checkpoint is None and arguments.random_weights is None and not bundled:
        raise ExportError(f"--config {arguments.config} needs --checkpoint FILE or --random-weights SEED.")
    return targets


def read_identities(config: ModelConfig, template: Path | None, faces: Path | None) -> Identities:
    """Names, neutral faces and mesh for a configuration; zeros and no mesh where no file is given."""
    n, V = config.predictor.id_dim, config.n_vertices
    known = SPEAKERS.get(config.name, ())
    names = known if len(known) == n else ()
    vertices = np.zeros((1, V, 3), np.float32)
    if template is not None:
        read = read_templates(template, V, n, names)
        vertices = read.vertices
        names = read.names if len(read.names) == n else names
        if len(vertices) not in (1, n):
            raise ExportError(f"{template} holds {len(vertices)} faces; the model has {n} speakers.")
    mesh = Mesh(np.empty((0, 3), np.int32), np.empty((0, 3), np.uint8), {}, None)
    if faces is not None:
        mesh = read_faces(faces, V)
    return Identities(
        speaker_names=names or tuple(f"speaker{i}" for i in range(n)),
        templates=vertices,
        mesh=mesh,
    )


def certificate_table(manifest: Manifest) -> str:
    """The parity certificate as text."""
    rows = [
        f"{p.graph:22} {p.measure:44} {p.frames:4} frames  {p.value:9.2e}"
        + ("" if p.bound is None else f"  (bound {p.bound:.1e})")
        for p in manifest.parity
    ]
    return "\n".join(rows)
