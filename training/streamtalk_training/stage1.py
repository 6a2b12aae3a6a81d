"""Stage 1: the VQ-VAE that turns motion into codes. `python -m streamtalk_training.stage1 --help`.

It is trained as it will be run: the encoder reads a crop, the decoder sees the last D latents alone and only
its newest frame counts; now and then fewer than D, as in a stream's first frames.

Mouth and upper face get codes of their own: the decoder is given the mouth's codes of one clip with the upper
face's of another, and must show the mouth of the one under the brows of the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamtalk_export.config import ModelConfig
from streamtalk_export.vqvae import VQAutoencoder
from streamtalk_training import runs
from streamtalk_training.dataset import MotionData, crops
from streamtalk_training.motion import MotionSpace, lip_gap_loss
from streamtalk_training.setup import RECORDED_NOTE, Setup, add_setup_options, recorded_asked_for, setup_from
from streamtalk_training.talker import mouth_latents, newest_frames

REVIVE_EVERY = 10  # steps: codes that nothing chose are moved to where latents are
LATENT_NOISE = 0.7
"""Largest deviation of the noise on latents, whose own is 1: a decoder that bears it is smooth, so that latents
guessed from sound, which are means over what they might be, decode to something sensible."""


@dataclass(frozen=True)
class Stage1:
    """How long and how hard to train."""

    steps: int = 2500
    batch: int = 16
    frames: int = 64
    windows: int = 16  # decoded ends in each crop
    peak_rate: float = 2e-3
    seed: int = 0


def window_length(random: np.random.Generator, longest: int) -> int:
    """D, or at one step in six a shorter window as at a stream's start (two latents at least)."""
    return longest if random.random() > 1 / 6 else int(random.integers(2, longest + 1))


def reconstruction_loss(space: MotionSpace, predicted: Tensor, true: Tensor) -> Tensor:
    """L1 of coordinates plus the error across the lips."""
    return (predicted - true).abs().mean() + lip_gap_loss(space, predicted, true)


def spread_loss(latents: Tensor) -> Tensor:
    """Holds latents [B, T, C] near zero mean and unit deviation: the diffusion's noise is of that size."""
    flat = latents.flatten(0, 1)
    return flat.mean(0).square().mean() + (flat.std(0) - 1).square().mean()


@torch.no_grad()
def revive(model: VQAutoencoder, motion: Tensor, generator: torch.Generator, everything: bool) -> int:
    """Move the codes that no latent of `motion` [B, T, K] chose (or every code) onto random latents; returns
    how many moved."""
    latents = model.encoder(motion)
    _, indices, _ = model.quantize(latents)
    book = model.quantize.embedding.weight
    moving = torch.bincount(indices.flatten(), minlength=len(book)) == 0
    if everything:
        moving = torch.ones_like(moving)
    candidates = latents.reshape(-1, book.shape[1])
    picks = torch.randint(len(candidates), (int(moving.sum()),), generator=generator)
    book[moving] = candidates[picks.to(motion.device)]
    return int(moving.sum())


def train(
    config: ModelConfig,
    space: MotionSpace,
    data: MotionData,
    plan: Stage1,
    folder: Path,
    until: int | None = None,
) -> VQAutoencoder:
    """Train (or go on training) in `folder`, to step `until` or the plan's end, and return the model."""
    torch.manual_seed(plan.seed)
    model = VQAutoencoder(config.vq)
    run = runs.start(folder, model, plan.peak_rate, plan=plan)
    longest = config.stream.decode_window or config.window_size
    continuous = plan.steps // 4  # steps without codes, so that latents spread before codes settle on them
    dead = 0
    last = min(until or plan.steps, plan.steps)
    while run.step < last:
        random, generator = runs.generators(plan.seed, run.step)
        motion = crops(data, None, None, plan.batch, plan.frames, random).motion.to(runs.device())
        if run.step < continuous:
            latents = model.encoder(motion)
            code_loss = 0.1 * spread_loss(latents)
        else:
            if run.step % REVIVE_EVERY == 0 and run.step < 0.7 * plan.steps:
                dead = revive(model, motion, generator, run.step < continuous + REVIVE_EVERY)
            latents, _, code_loss = model.encode(motion)
        other, mouth = torch.roll(latents, 1, 0), mouth_latents(config)
        latents = torch.cat([latents[..., :mouth], other[..., mouth:]], -1)
        both = torch.cat([motion[..., : space.mouth], torch.roll(motion, 1, 0)[..., space.mouth :]], -1)
        shake = LATENT_NOISE * torch.rand(plan.batch, 1, 1, generator=generator)
        latents = latents + (shake * torch.randn(latents.shape, generator=generator)).to(latents.device)
        window = window_length(random, longest)
        ends = torch.randint(window - 1, plan.frames + 1, (plan.batch, plan.windows), generator=generator)
        ends = ends.to(motion.device)
        decoded = newest_frames(model.decoder, latents, ends, window)
        wanted = both[torch.arange(plan.batch, device=motion.device)[:, None], ends]
        loss = reconstruction_loss(space, decoded, wanted)
        rate = runs.learning_rate(run.step, plan.steps, plan.peak_rate)
        runs.update(run, loss + code_loss, rate)
        if run.step % 50 == 0 or run.step == last:
            run.log(
                loss=float(loss.detach()),
                codes=float(code_loss.detach()),
                gap_mm=float(lip_gap_loss(space, decoded.detach(), wanted)) * 10,
                dead_codes=dead,
            )
        if run.step % 500 == 0:
            run.save()
    run.save()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    if recorded_asked_for(arguments):
        from streamtalk_training import release_recipe  # imports transformers, which takes seconds

        release_recipe.stage1(arguments)
        return
    parser = argparse.ArgumentParser(
        prog="python -m streamtalk_training.stage1", description=__doc__, epilog=RECORDED_NOTE
    )
    add_setup_options(parser)
    parser.add_argument("--steps", type=int, default=Stage1.steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with runs.one_sentence():
        setup: Setup = setup_from(options)
        data = setup.motion(setup.clips("train"))
        plan = Stage1(options.steps, seed=options.seed)
        train(setup.config, setup.space, data, plan, options.run / "stage1")


if __name__ == "__main__":
    main()
