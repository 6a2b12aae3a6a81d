"""Stage 2: audio to latents, with the decoder tuned along. `python -m streamtalk_training.stage2 --help`.

Teacher forcing teaches a model to copy its history and to ignore the sound: neighbouring latents are that
alike. So there is none. At first the history is blank, which leaves nothing but sound to learn from; then it is
the model's own prediction from a blank history, with noise (two passes, as in Mihaylova and Martins, "Scheduled
sampling for transformers", 2019), so that hours of rollout stay as good as the first second.

At the sampler's first step a latent of many dimensions still shines through the noise of training, while
generation starts from noise alone. So the sampler's few steps are unrolled and its result is what the losses on
motion see (after Lin et al., "Common diffusion noise schedules are flawed", 2023); the usual loss at random t
stays beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamtalk_export.config import ModelConfig
from streamtalk_export.sampler import alphas_cumprod
from streamtalk_training import runs
from streamtalk_training.dataset import Crops, MelData, MotionData, crops, features_at_frames, mel_data
from streamtalk_training.motion import MotionSpace, lip_gap_loss
from streamtalk_training.setup import Setup, add_setup_options, setup_from
from streamtalk_training.stage1 import reconstruction_loss, window_length
from streamtalk_training.talker import Talker, newest_frames


class Student(nn.Module):
    """The talker, and a linear map from audio features straight to motion [K]: a hint for the audio encoder,
    whose own gradient has a long way to go at first. It is dropped after training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.talker = Talker(config)
        self.hint = nn.Linear(config.audio.width, config.vq.n_vert)


@dataclass(frozen=True)
class Stage2:
    """How long and how hard to train, and what is done to the history."""

    steps: int = 3000
    batch: int = 16
    frames: int = 64
    windows: int = 8  # pairs of neighbouring frames decoded in each crop
    peak_rate: float = 1e-3
    encoder_rate: float = 1.5  # of the rate, for the audio encoder
    talker_start: float = 0.23  # share of the run before which only the hint trains the audio encoder
    history_start: float = 0.53  # before which there is no history to copy at all
    decoder_start: float = 0.67  # after which the decoder is tuned along
    blind_share: float = 0.15  # of the crops after that
    history_noise: float = 0.5  # largest deviation, in units of a latent's
    seed: int = 0


def diffusion_loss(talker: Talker, condition: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    """MSE of x0 at one random t a sequence, for latents [B, L, C] under conditions [B, L, E]."""
    alphas = torch.from_numpy(alphas_cumprod(talker.config.schedule)).float()
    t = torch.randint(len(alphas), (len(latents),), generator=generator)
    alpha = alphas[t][:, None, None].to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    t = t.to(latents.device)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    network = talker.diff_ar_network
    return (network.denoise(noisy, condition, network.time_emb(t)[:, None]) - latents).square().mean()


def stage2_loss(
    student: Student, space: MotionSpace, batch: Crops, plan: Stage2, progress: float, step: int
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch and its parts; `progress` 0..1 decides about the history."""
    random, generator = runs.generators(plan.seed + 1, step)
    device = batch.motion.device

    def noise(*shape: int) -> Tensor:  # drawn on the CPU: the same on every device
        return torch.randn(shape, generator=generator).to(device)

    talker = student.talker
    network, frames = talker.diff_ar_network, batch.motion.shape[1] - 1
    size = len(batch.motion)
    features = talker.audio_encoder.from_log_mel(batch.mel)
    features = features_at_frames(features, frames, talker.config.fps)
    hint = reconstruction_loss(space, student.hint(features), batch.motion[:, 1:])
    if progress < plan.talker_start:
        return hint, {"hint": float(hint.detach())}
    with torch.no_grad():
        latents = talker.autoencoder.encode(batch.motion)[0]
        latents[batch.at_start, 0] = talker.autoencoder.start_latent()
    style = network.obj_vector(batch.speaker)
    position = torch.from_numpy(random.integers(0, network.config.period, size))

    seen = talker.config.window_size
    nothing = talker.autoencoder.start_latent().expand(size, frames, -1)
    past = nothing
    if progress >= plan.history_start:
        with torch.no_grad():
            condition = network.conditions(nothing, features, style, position, seen)
            predicted = network.sample(noise(*nothing.shape), condition, talker.sampler)
            blind = torch.rand(size, 1, 1, generator=generator) < plan.blind_share
            spread = plan.history_noise * torch.rand(size, 1, 1, generator=generator).to(device)
            own = torch.cat([latents[:, :1], predicted[:, :-1]], 1) + spread * noise(*nothing.shape)
            past = torch.where(blind.to(device), nothing, own)
    condition = network.conditions(past, features, style, position, seen)
    wanted = latents[:, 1:]
    clean = network.sample(noise(*wanted.shape), condition, talker.sampler)

    window = window_length(random, talker.decode_window)
    first = torch.randint(window - 1, frames, (size, plan.windows), generator=generator)
    ends = torch.cat([first, first + 1], 1).to(device)
    history = torch.cat([latents[:, :1], clean], 1)
    decoded = newest_frames(talker.autoencoder.decoder, history, ends, window)
    true = batch.motion[torch.arange(size, device=device)[:, None], ends]
    movement = decoded[:, plan.windows :] - decoded[:, : plan.windows]
    true_movement = true[:, plan.windows :] - true[:, : plan.windows]
    parts = {
        "latent": (clean - wanted).square().mean(),
        "diffusion": 0.3 * diffusion_loss(talker, condition, wanted, generator),
        "motion": 2 * reconstruction_loss(space, decoded, true),
        "hint": hint,
        "speed": (movement - true_movement).abs().mean(),
    }
    values = {name: float(part.detach()) for name, part in parts.items()}
    values["gap_mm"] = 10 * float(lip_gap_loss(space, decoded.detach(), true))
    return sum(parts.values(), torch.zeros((), device=device)), values


def train(
    config: ModelConfig,
    space: MotionSpace,
    motion: MotionData,
    mel: MelData,
    autoencoder: dict[str, Tensor],
    plan: Stage2,
    folder: Path,
    until: int | None = None,
) -> Talker:
    """Train (or go on training) in `folder`, to step `until` or the plan's end, and return the talker.

    `autoencoder` is stage 1's state dict; its encoder and codes stay as they are.
    """
    torch.manual_seed(plan.seed)
    student = Student(config)
    talker = student.talker
    talker.autoencoder.load_state_dict(autoencoder)
    talker.autoencoder.encoder.requires_grad_(False)
    talker.autoencoder.quantize.requires_grad_(False)
    ear = [*talker.audio_encoder.parameters(), *student.hint.parameters()]
    mouth = [*talker.autoencoder.decoder.parameters(), *talker.diff_ar_network.parameters()]
    groups: list[dict[str, Any]] = [{"params": ear, "scale": plan.encoder_rate}, {"params": mouth}]
    run = runs.start(folder, student, plan.peak_rate, groups)
    last = min(until or plan.steps, plan.steps)
    while run.step < last:
        random = np.random.default_rng([plan.seed, run.step])
        batch = crops(motion, mel, talker.audio_encoder, plan.batch, plan.frames, random, config.fps).to(
            runs.device()
        )
        talker.autoencoder.decoder.requires_grad_(run.step >= plan.decoder_start * plan.steps)
        loss, values = stage2_loss(student, space, batch, plan, run.step / plan.steps, run.step)
        runs.update(run, loss, runs.learning_rate(run.step, plan.steps, plan.peak_rate))
        if run.step % 50 == 0 or run.step == last:
            run.log(**values)
        if run.step % 250 == 0:
            run.save()
    run.save()
    return talker


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.stage2", description=__doc__)
    add_setup_options(parser)
    parser.add_argument("--steps", type=int, default=Stage2.steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    setup: Setup = setup_from(options)
    clips = setup.clips("train")
    stage1 = torch.load(options.run / "stage1" / "state.pt", weights_only=True)["model"]
    mel = mel_data((clip.pcm for clip in clips), Talker(setup.config).audio_encoder)
    motion = setup.motion("train")
    plan = Stage2(options.steps, seed=options.seed)
    train(setup.config, setup.space, motion, mel, stage1, plan, options.run / "stage2")


if __name__ == "__main__":
    main()
