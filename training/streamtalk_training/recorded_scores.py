"""LVE, FDD and MOD on recorded faces, by the release's own test procedure.

It is the offline way of generating (`generate_offline` of the exporter) but for four things: a window of 60
latents whatever the configuration says; a start latent that is token 0 of encoding [0; the TRUE motion]; features
stretched to the true motion's length; and an unseen speaker's figures averaged over all training identities.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamtalk_export.checkpoint import load_model
from streamtalk_export.graphs import diffusion_head
from streamtalk_export.model import TalkerModel
from streamtalk_export.sampler import sampler_table
from streamtalk_export.templates import read_pickle
from streamtalk_training import metrics, runs
from streamtalk_training.recorded import RecordedDataError, RecordedSet, Recording
from streamtalk_training.recorded_setup import hubert_from, layout_parser, open_data, refusals
from streamtalk_training.release_recipe import MODEL_FILE, after_stillness, clip_features, motion_of

Indices = NDArray[np.int64]

TEST_WINDOW = 60  # latents; the release's `window_size` serves training and validation alone

LIP_PAIRS: dict[int, tuple[tuple[int, int], ...]] = {
    5023: ((2865, 2907), (2866, 2938), (3546, 3504), (1751, 1849), (1750, 1804)),  # FLAME
    23370: ((366, 21538), (12773, 10665), (21688, 22962), (10235, 21152), (10117, 14028)),  # BIWI
}
"""Upper and lower vertex of five lip openings, by the mesh's number of vertices."""


@dataclass(frozen=True)
class Regions:
    """Vertices [n] of lips and upper face; `lip_pairs` [P, 2], or None where nobody names them."""

    lips: Indices
    upper_face: Indices
    lip_pairs: Indices | None


def read_regions(folder: Path, layout: str, n_vertices: int) -> Regions:
    """Regions beside the data or in its `regions/`: `FLAME_masks.pkl` (vocaset), `lve.txt` and `fdd.txt` (biwi).

    Lip pairs are those of FLAME and BIWI; for another mesh, of `lip_pairs.txt` (an upper and a lower vertex a
    line) where there is one. Raises RecordedDataError that lists everything missing.
    """
    needed = ("FLAME_masks.pkl",) if layout == "vocaset" else ("lve.txt", "fdd.txt")
    found = {name: _find(folder, name) for name in needed}
    files = {name: path for name, path in found.items() if path is not None}
    if missing := [name for name in needed if name not in files]:
        raise RecordedDataError(f"no {' and no '.join(missing)} in {folder} or {folder / 'regions'}.")
    if layout == "vocaset":
        masks = read_pickle(files["FLAME_masks.pkl"])
        if absent := {"lips", "forehead", "eye_region"} - masks.keys():
            raise RecordedDataError(f"{files['FLAME_masks.pkl']} has no {', '.join(sorted(absent))}.")
        lips = np.asarray(masks["lips"]).reshape(-1)
        upper = np.union1d(masks["forehead"], masks["eye_region"])
    else:
        lips, upper = _integers(files["lve.txt"]), _integers(files["fdd.txt"])
    pairs: Indices | None = None
    if n_vertices in LIP_PAIRS:
        pairs = np.array(LIP_PAIRS[n_vertices], np.int64)
    elif (path := _find(folder, "lip_pairs.txt")) is not None:
        pairs = _integers(path).reshape(-1, 2)
    regions = Regions(lips.astype(np.int64), upper.astype(np.int64), pairs)
    for name in ("lips", "upper_face", "lip_pairs"):
        rows: Indices | None = getattr(regions, name)
        if rows is not None and not (rows.size and rows.min() >= 0 and rows.max() < n_vertices):
            raise RecordedDataError(f"{folder}: `{name}` is empty or names vertices beyond {n_vertices}.")
    return regions


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / "regions" / name) if path.is_file()), None)


def _integers(path: Path) -> Indices:
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
        return np.array([int(word) for word in words], np.int64)
    except ValueError as error:
        raise RecordedDataError(f"{path} is no list of vertex numbers: {error}") from error


@torch.no_grad()
def latents_as_tested(
    model: TalkerModel,
    head: nn.Module,
    features: Tensor,
    start: Tensor,
    styles: Tensor,
    generator: torch.Generator,
    window: int = TEST_WINDOW,
) -> Tensor:
    """Latents [B, L, C] of features [1, L, A] for styles [B, E] after `start` [C], with the same noise for all.

    Every frame denoises the last `window` latents anew, in place; positions begin at the window's first.
    """
    network = model.diff_ar_network
    frames = features.shape[1]
    latents = start.repeat(len(styles), frames + 1, 1)
    for newest in range(1, frames + 1):
        first = max(newest - window, 0)
        past = latents[:, first:newest]
        conditions = network.conditions(past, features[:, first:newest], styles)
        noise = torch.randn(past.shape[1:], generator=generator).to(past.device)
        latents[:, first + 1 : newest + 1] = head(noise.expand_as(past), conditions)
    return latents[:, 1:]


@dataclass(frozen=True)
class Figures:
    """Of one clip, in the data set's units (squared for LVE and FDD)."""

    lve: float
    fdd: float
    mod: float | None


def figures(
    predicted: metrics.Floats, true: metrics.Floats, template: metrics.Floats, regions: Regions
) -> Figures:
    """Figures of vertices [L, V, 3] on template [V, 3]."""
    pairs = regions.lip_pairs
    return Figures(
        metrics.lip_vertex_error(predicted, true, regions.lips),
        metrics.face_dynamics_deviation(predicted, true, template, regions.upper_face),
        None if pairs is None else metrics.mouth_opening_difference(predicted, true, pairs),
    )


def averaged(rows: list[tuple[int, Figures]]) -> dict[str, float]:
    """Means of (frames, figures): LVE and MOD over all frames, FDD over clips."""
    frames = [count for count, _ in rows]
    means = {
        "lve": float(np.average([row.lve for _, row in rows], weights=frames)),
        "fdd": float(np.mean([row.fdd for _, row in rows])),
    }
    openings = [row.mod for _, row in rows if row.mod is not None]
    if len(openings) == len(rows):
        means["mod"] = float(np.average(openings, weights=frames))
    return means


@dataclass(frozen=True)
class SplitScores:
    """Figures of one split, and those of a face that keeps still, which a model has to beat."""

    clips: int
    frames: int
    model: dict[str, float]
    still_face: dict[str, float]


def score(data: RecordedSet, model: TalkerModel, regions: Regions, split: str, seed: int = 0) -> SplitScores:
    """Figures of `model` on one split; the noise is seeded with (seed, clip)."""
    config = model.config
    table = sampler_table(config.schedule, config.steps, config.sampler)
    folds = config.predictor.head == "linear"
    head = diffusion_head(model.diff_ar_network.cpu(), table, folds).to(runs.device()).eval()
    model.to(runs.device()).eval()
    moving: list[tuple[int, Figures]] = []
    still: list[tuple[int, Figures]] = []
    for index, recording in enumerate(data.splits[split]):
        _, generator = runs.generators(seed, index)
        template = data.templates[recording.subject].reshape(-1, 3)
        truth = data.motion(recording).reshape(-1, *template.shape) + template
        frames = len(truth)
        for latents in clip_latents(data, model, head, recording, generator):
            # One identity at a time: BIWI's vertices are many.
            vertices = decoded(model, latents).reshape(truth.shape) + template
            moving.append((frames, figures(vertices, truth, template, regions)))
        unmoved = np.broadcast_to(template, truth.shape)
        still.append((frames, figures(unmoved, truth, template, regions)))
    total = sum(frames for frames, _ in still)
    return SplitScores(len(still), total, averaged(moving), averaged(still))


@torch.no_grad()
def decoded(model: TalkerModel, latents: Tensor) -> metrics.Floats:
    """Vertex offsets [L, 3V] of latents [L, C], the start left out."""
    return np.asarray(model.autoencoder.decoder(latents[None])[0].cpu().numpy(), np.float32)


@torch.no_grad()
def clip_latents(
    data: RecordedSet,
    model: TalkerModel,
    head: nn.Module,
    recording: Recording,
    generator: torch.Generator,
) -> Tensor:
    """Latents [B, L, C] of one clip: B is 1 for a training subject, all training identities for another."""
    motion = motion_of(data, recording)
    features = clip_features(model, data, recording, motion.shape[1])
    start = model.autoencoder.encode(after_stillness(motion))[0][0, 0]
    styles = model.diff_ar_network.obj_vector.weight
    if recording.subject in data.speakers:
        styles = styles[data.speakers.index(recording.subject)][None]
    return latents_as_tested(model, head, features, start, styles, generator)


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """`python -m streamtalk_training.evaluate --layout ...`: print the figures, write JSON to --out."""
    parser = layout_parser("evaluate", __doc__)
    model_of = parser.add_mutually_exclusive_group(required=True)
    model_of.add_argument(
        "--run", type=Path, metavar="DIR", help="a training run, for what stage 2 left there"
    )
    model_of.add_argument("--checkpoint", type=Path, metavar="FILE", help="any model of the release's kind")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the configuration's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write JSON")
    options = parser.parse_args(arguments)
    scores: dict[str, SplitScores] = {}
    with refusals():
        data = open_data(options)
        if options.steps is not None:
            data = replace(data, config=msgspec.structs.replace(data.config, steps=options.steps))
        regions = read_regions(data.folder, options.layout, data.config.n_vertices)
        checkpoint = options.checkpoint or options.run / "stage2" / MODEL_FILE
        model = load_model(data.config, hubert_from(data.config, options.hubert_config, None), checkpoint)
        for split in data.splits:
            if split.startswith("test"):
                scores[split] = score(data, model, regions, split, options.seed)
                print(table(split, scores[split]), flush=True)
    if options.out is not None:
        content = {split: asdict(row) for split, row in scores.items()}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(split: str, scores: SplitScores) -> str:
    """One split's figures as text."""
    rows = [f"{split}: {scores.clips} clips, {scores.frames} frames"]
    for name, means in (("model", scores.model), ("still face", scores.still_face)):
        rows.append(f"  {name:12}" + "".join(f"{key.upper():>6} {value:.4e}" for key, value in means.items()))
    return "\n".join(rows)
