"""The release's own training on recorded faces: stage 1 (VQ-VAE), then stage 2 (audio to latents).

StreamingTalker (arXiv 2511.14223): whole clips for the VQ-VAE, crops of W frames with teacher forcing after it.
`stage1` and `stage2` are what the commands of those names run under `--layout`; what they leave in RUN/stage2 is
`model.safetensors`, in the release's naming, and `templates.npz`, for `export.py --checkpoint` and `--template`.

HuBERT is fine-tuned as it will be run, without the dropout and the masking of its pre-training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import HubertConfig

from streamtalk_export.checkpoint import load_state, read_state
from streamtalk_export.config import ModelConfig
from streamtalk_export.hubert import HubertEncoder, resample_offline
from streamtalk_export.model import TalkerModel
from streamtalk_export.sampler import alphas_cumprod
from streamtalk_export.vqvae import VQAutoencoder
from streamtalk_training import runs
from streamtalk_training.recorded import RecordedDataError, RecordedSet, Recording
from streamtalk_training.recorded_setup import (
    add_training_options,
    hubert_from,
    layout_parser,
    open_data,
    refusals,
)

REPORT_EVERY = 50
SAVE_EVERY = 500
VALIDATION_CLIPS = 8
MODEL_FILE = "model.safetensors"
TEMPLATES_FILE = "templates.npz"
Loss = tuple[Tensor, dict[str, float]]
"""A scalar and its parts."""


@dataclass(frozen=True)
class ReleaseStage1:
    """How long and how hard to train the VQ-VAE, on `batch` whole clips a step."""

    steps: int = 60_000
    batch: int = 1
    peak_rate: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class ReleaseStage2:
    """How long and how hard to train predictor, head and HuBERT, on a crop of each of `batch` clips a step."""

    steps: int = 60_000
    batch: int = 1
    peak_rate: float = 1e-4
    finetune_decoder: bool = False
    """The release does for BIWI alone."""
    seed: int = 0


def train_stage1(
    data: RecordedSet, plan: ReleaseStage1, folder: Path, until: int | None = None
) -> VQAutoencoder:
    """Train (or go on training) in `folder`, to step `until` or the plan's end, and return the VQ-VAE."""
    torch.manual_seed(plan.seed)
    model = VQAutoencoder(data.config.vq)
    run = runs.start(folder, model, plan.peak_rate, plan=plan)

    def loss_of(recording: Recording, *_: object) -> Loss:
        return stage1_loss(model, motion_of(data, recording))

    def saved() -> None:
        log_validation(run, [stage1_values(model, data, r) for r in validation_clips(data)])

    _train(run, data, plan, plan.seed, until, loss_of, saved)
    return model


def _train(
    run: runs.Run,
    data: RecordedSet,
    plan: ReleaseStage1 | ReleaseStage2,
    seed: int,
    until: int | None,
    loss_of: Callable[[Recording, np.random.Generator, torch.Generator], Loss],
    saved: Callable[[], None],
) -> None:
    """Steps of whole batches to `until` or the plan's end; `saved` is called whenever the state was."""
    since: list[dict[str, float]] = []
    last = min(until or plan.steps, plan.steps)
    while run.step < last:
        random, generator = runs.generators(seed, run.step)
        # Dropout draws from torch's own generator.
        torch.manual_seed(int(random.integers(2**62)))
        loss = torch.zeros((), device=runs.device())
        for recording in chosen(data, plan.batch, random):
            part, values = loss_of(recording, random, generator)
            loss = loss + part / plan.batch
            since.append(values)
        runs.update(run, loss, runs.learning_rate(run.step, plan.steps, plan.peak_rate))
        if run.step % REPORT_EVERY == 0 or run.step == last:
            run.log(**mean_values(since))
            since = []
        if run.step % SAVE_EVERY == 0 or run.step == last:
            run.save()
            saved()


def stage1_loss(model: VQAutoencoder, motion: Tensor) -> Loss:
    """L1 reconstruction, codebook and 0.25 commitment of one whole clip [1, L, 3V], and the parts."""
    decoded, codes = model(motion)
    reconstruction = F.l1_loss(decoded, motion)
    return reconstruction + codes, {"l1": float(reconstruction.detach()), "codes": float(codes.detach())}


@torch.no_grad()
def stage1_values(model: VQAutoencoder, data: RecordedSet, recording: Recording) -> dict[str, float]:
    return stage1_loss(model, motion_of(data, recording))[1]


def train_stage2(
    data: RecordedSet,
    model: TalkerModel,
    plan: ReleaseStage2,
    folder: Path,
    until: int | None = None,
) -> TalkerModel:
    """Train (or go on training) `model`, whose autoencoder is stage 1's, in `folder`, to step `until` or the
    plan's end; write `model.safetensors` and `templates.npz` there and return the model.

    HuBERT's convolutions, the VQ encoder and the codes stay as they are, and so does the decoder unless the
    plan says otherwise.
    """
    model.train()
    model.autoencoder.requires_grad_(False)
    model.autoencoder.decoder.requires_grad_(plan.finetune_decoder)
    if isinstance(model.audio_encoder, HubertEncoder):
        model.audio_encoder.hubert.feature_extractor.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run = runs.start(folder, model, plan.peak_rate, [{"params": trained}], plan)

    def loss_of(recording: Recording, random: np.random.Generator, generator: torch.Generator) -> Loss:
        return stage2_loss(model, data, recording, random, generator)

    def saved() -> None:
        write_model(model, data, folder)
        log_validation(run, stage2_validation(model, data))

    _train(run, data, plan, plan.seed + 1, until, loss_of, saved)
    return model


def stage2_loss(
    model: TalkerModel,
    data: RecordedSet,
    recording: Recording,
    random: np.random.Generator,
    generator: torch.Generator,
) -> Loss:
    """The loss of one crop of W frames (the whole clip where it is shorter), and its parts.

    The encoder sees [0; crop], so that token 0 is the start; every token is predicted from the true ones before
    it, with one random t for all.
    """
    network, autoencoder, window = model.diff_ar_network, model.autoencoder, model.config.window_size
    motion = motion_of(data, recording)  # [1, L, 3V]
    features = clip_features(model, data, recording, motion.shape[1])
    first = int(random.integers(max(motion.shape[1] - window, 0) + 1))
    crop, features = motion[:, first : first + window], features[:, first : first + window]
    with torch.no_grad():
        latents = autoencoder.encode(after_stillness(crop))[0]
    past, wanted = latents[:, :-1], latents[:, 1:]
    speaker = style_of(data, recording)
    condition = network.conditions(past, features, network.obj_vector.weight[speaker][None])

    alphas = torch.from_numpy(alphas_cumprod(model.config.schedule)).float()
    t = torch.randint(len(alphas), (1,), generator=generator)
    alpha = alphas[t].to(motion.device)
    noise = torch.randn(wanted.shape, generator=generator).to(motion.device)
    noisy = alpha.sqrt() * wanted + (1 - alpha).sqrt() * noise
    clean = network.denoise(noisy, condition, network.time_emb(t.to(motion.device))[:, None])

    decoded = autoencoder.decoder(clean)
    parts = {
        "latent": F.mse_loss(clean, wanted),
        "vertices": F.mse_loss(decoded, crop),
        "speed": F.mse_loss(decoded.diff(dim=1), crop.diff(dim=1)),
    }
    values = {name: float(part.detach()) for name, part in parts.items()}
    return torch.stack(list(parts.values())).sum(), values


@torch.no_grad()
def stage2_validation(model: TalkerModel, data: RecordedSet) -> list[dict[str, float]]:
    """Parts of the loss on validation clips, at the same crops, times and noise whenever it is asked."""
    model.eval()
    rows = []
    for index, recording in enumerate(validation_clips(data)):
        random, generator = runs.generators(0, index)
        rows.append(stage2_loss(model, data, recording, random, generator)[1])
    model.train()
    return rows


def motion_of(data: RecordedSet, recording: Recording) -> Tensor:
    """Vertex offsets [1, L, 3V] on the device."""
    return torch.from_numpy(data.motion(recording))[None].to(runs.device())


def clip_features(model: TalkerModel, data: RecordedSet, recording: Recording, frames: int) -> Tensor:
    """Audio features of the whole clip, stretched to its `frames`: [1, frames, A]."""
    pcm = torch.from_numpy(data.pcm(recording))
    needed = model.audio_encoder.receptive_field
    if len(pcm) < needed:
        raise RecordedDataError(f"{recording.wav} lasts {len(pcm)} samples at 16 kHz; expected {needed}.")
    return resample_offline(model.audio_encoder(pcm[None].to(runs.device())), frames)


def after_stillness(motion: Tensor) -> Tensor:
    """[0; motion] of [1, L, 3V]: the frame without motion makes the start latent."""
    return torch.cat([torch.zeros_like(motion[:, :1]), motion], 1)


def style_of(data: RecordedSet, recording: Recording) -> int:
    """The one-hot index of the clip's subject; an unseen one borrows one by the sentence's number."""
    if recording.subject in data.speakers:
        return data.speakers.index(recording.subject)
    return recording.sentence % len(data.speakers)


def chosen(data: RecordedSet, count: int, random: np.random.Generator) -> list[Recording]:
    train = data.splits["train"]
    return [train[i] for i in random.integers(len(train), size=count)]


def validation_clips(data: RecordedSet) -> tuple[Recording, ...]:
    """A few clips of `val`, spread over it; none where the data set has no such split."""
    clips = data.splits.get("val", ())
    return clips[:: max(len(clips) // VALIDATION_CLIPS, 1)][:VALIDATION_CLIPS]


def mean_values(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def log_validation(run: runs.Run, rows: list[dict[str, float]]) -> None:
    if rows:
        run.log(**{f"val_{name}": value for name, value in mean_values(rows).items()})


def write_model(model: TalkerModel, data: RecordedSet, folder: Path) -> None:
    """`model.safetensors` under the release's prefixes, and the speakers' `templates.npz`."""
    state = {
        f"{prefix}.{name}": tensor.detach().cpu().contiguous()
        for prefix, module in model.parts().items()
        for name, tensor in module.state_dict().items()
    }
    partial = folder / "model.partial"
    save_file(state, partial)
    partial.chmod(0o644)  # safetensors writes for the owner alone
    partial.replace(folder / MODEL_FILE)
    faces = np.stack([data.templates[speaker].reshape(-1, 3) for speaker in data.speakers])
    np.savez(folder / TEMPLATES_FILE, templates=faces, speaker_names=np.array(data.speakers))


def untrained_model(
    config: ModelConfig, hubert: HubertConfig | None, autoencoder: dict[str, Tensor], seed: int
) -> TalkerModel:
    """The model that stage 2 starts from: `autoencoder` is stage 1's state dict.

    Raises RecordedDataError where that is of another configuration.
    """
    torch.manual_seed(seed)
    model = TalkerModel(config, hubert)
    try:
        model.autoencoder.load_state_dict(autoencoder)
    except RuntimeError as error:
        raise RecordedDataError(f"Stage 1 was run with another configuration: {error}") from error
    return model


def load_hubert(model: TalkerModel, path: Path) -> None:
    """HuBERT's pretrained weights from a transformers folder or a state dict file, under any usual prefix.

    Raises CheckpointError for a file that is not this HuBERT.
    """
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((path / name for name in names if (path / name).is_file()), path / names[0])
    given = read_state(file if path.is_dir() else path)
    for prefix in ("audio_encoder.", "hubert."):
        if any(name.startswith(prefix) for name in given):
            given = {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}
    own = {
        f"{prefix}.{name}": tensor
        for prefix, module in model.parts().items()
        for name, tensor in module.state_dict().items()
        if prefix != "audio_encoder"
    }
    load_state(model, own | {f"audio_encoder.{name}": value for name, value in given.items()}, str(path))


def stage1(arguments: Sequence[str] | None = None) -> None:
    """`python -m streamtalk_training.stage1 --layout ...`"""
    parser = layout_parser("stage1", __doc__)
    add_training_options(parser, ReleaseStage1.steps, ReleaseStage1.peak_rate)
    options = parser.parse_args(arguments)
    with refusals():
        plan = ReleaseStage1(options.steps, options.batch, options.peak_rate, options.seed)
        train_stage1(open_data(options), plan, options.run / "stage1")


def stage2(arguments: Sequence[str] | None = None) -> None:
    """`python -m streamtalk_training.stage2 --layout ...`, after stage 1 in the same --run."""
    parser = layout_parser("stage2", __doc__)
    add_training_options(parser, ReleaseStage2.steps, ReleaseStage2.peak_rate)
    parser.add_argument("--hubert", type=Path, metavar="DIR|FILE", help="HuBERT's pretrained weights")
    options = parser.parse_args(arguments)
    with refusals():
        data = open_data(options)
        hubert = hubert_from(data.config, options.hubert_config, options.hubert)
        codes = options.run / "stage1" / "state.pt"
        if not codes.is_file():
            raise RecordedDataError(f"No {codes}; run stage 1 with the same --run first.")
        autoencoder = torch.load(codes, map_location="cpu", weights_only=True)["model"]
        model = untrained_model(data.config, hubert, autoencoder, options.seed)
        if options.hubert is not None:
            load_hubert(model, options.hubert)
        elif hubert is not None:
            print("HuBERT starts from random weights: give --hubert for pretrained ones.", file=sys.stderr)
        tuned = options.layout == "biwi"
        plan = ReleaseStage2(options.steps, options.batch, options.peak_rate, tuned, options.seed)
        train_stage2(data, model, plan, options.run / "stage2")
