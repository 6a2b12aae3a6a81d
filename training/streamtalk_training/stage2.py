"""Stage 2: audio to latents, with the decoder tuned along. `python -m streamtalk_training.stage2 --help`.

Mouth. Teacher forcing teaches a model to copy its history and to ignore the sound: neighbouring latents are
that alike. So there is none. At first the mouth's history is blank, which leaves nothing but sound to learn
from; then it is the model's own prediction from a blank history, with noise (two passes, as in Mihaylova and
Martins, "Scheduled sampling for transformers", 2019), so that hours of rollout stay as good as the first second.
Its losses are errors, so lips follow the sound and not the noise.

Upper face. Blinks and brows hardly follow from sound: a mean of them is a half-shut eye. They are drawn. The
loss is the energy score of two draws (Gneiting and Raftery, "Strictly proper scoring rules", 2007), whose minimum is
the true distribution given history and sound. The history is the true one, disturbed as a stream's would be: with
noise, with an offset that lasts, or by what the model itself drew for each frame after a true past. Noise that
averages out within the window taught nothing about coming back: a stream left the faces it knew at its first blink.

Neither half of a true latent may tell of the other half of the face: see `apart`.

The sampler's few steps are unrolled from pure noise, in training as in a stream: at its first step a latent of
many dimensions still shines through the noise that a random t would leave (Lin et al., "Common diffusion noise
schedules are flawed", 2023).
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk_export.config import ModelConfig, load_config
from streamtalk_training import runs
from streamtalk_training.dataset import Crops, MelData, MotionData, crops, frame_features, mel_data
from streamtalk_training.hearing import disturbed
from streamtalk_training.motion import READINGS, MotionSpace, control_readings, lip_gap_loss, sealing
from streamtalk_training.setup import (
    RECORDED_NOTE,
    Setup,
    add_setup_options,
    narrowed,
    recorded_asked_for,
    setup_from,
)
from streamtalk_training.shipped import alike, calmed, grown, redrawn, unpacked
from streamtalk_training.stage1 import reconstruction_loss, window_length
from streamtalk_training.talker import Talker, mouth_latents, newest_frames
from streamtalk_training.validate import Validation, scores, streamed
from streamtalk_training.visemes import tables

VALIDATE_EVERY = 500
NEW_HINT_STEPS = 300
CONTINUED_RATE = 0.6  # of the peak rate, for a run that goes on from another's weights
SLOW = ("jaw", "round", "funnel", "spread", "upper up")
"""Readings that move slowly in speech, and flicker where only their errors of place are trained."""


class Student(nn.Module):
    """The talker, and a linear map from audio features straight to motion [K], the lips' seal [1] and the viseme
    that sounds [23]: a hint for the audio encoder, whose own gradient has a long way to go at first. What sounds
    is told apart more sharply by its name than by its looks: /d/ and /b/ differ in a few frames of two shapes.
    It is dropped after training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.talker = Talker(config)
        self.sizes = (config.vq.n_vert, 1, len(tables().viseme_targets))
        self.hint = nn.Linear(config.audio.width, sum(self.sizes))

    def hinted(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Motion [..., K], seal [...] and logits of visemes [..., 23] out of features [..., A], in float32."""
        motion, seal, visemes = self.hint(features).float().split(self.sizes, dim=-1)
        return motion, seal[..., 0], visemes


@dataclass(frozen=True)
class Stage2:
    """How long and how hard to train, and what is done to the history."""

    steps: int = 14000
    batch: int = 16
    hint_batch: int = 32
    frames: int = 64
    windows: int = 8  # pairs of neighbouring frames decoded in each crop
    peak_rate: float = 1e-3
    encoder_rate: float = 1.5  # of the rate, for the audio encoder
    talker_start: float = 0.45  # share of the run before which only the hint trains the audio encoder
    history_start: float = 0.7  # before which there is no history of the mouth to copy at all
    decoder_start: float = 0.7  # after which the decoder is tuned along
    exact_start: float = 0.85  # after which features are computed at each frame's own time
    disturbed_from: float = 0.3  # share of the run until which the disturbances of hearing grow
    control_weight: float = 1.5
    seal_weight: float = 6.0  # of the lips' seal, 0 to 1
    closure_weight: float = 2.0  # so much more does a closure's seal count than an open mouth's
    viseme_weight: float = 0.4  # of the hint's viseme, in nats
    gap_weight: float = 4.0  # of the lips' gap, besides its share in the error of motion
    shut_weight: float = 8.0  # of the gap's error where lips meet, see `lip_gap_loss`
    speed_weight: float = 4.0  # keeps neighbouring frames from flickering
    steady_weight: float = 0.3  # the same of the controls that move slowly, each in units of its own speed
    blind_share: float = 0.15  # of the crops after history_start
    history_noise: float = 0.5  # largest deviation, in units of a latent's
    history_offset: float = 0.4  # the same, of what lasts over a crop of the upper face
    offset_share: float = 0.3  # of the crops, and as many again whose upper face is the model's own
    hint_first: float = 0.0  # share before which the audio encoder stays as it is, and a new hint learns
    bfloat16: bool = False  # matrix products
    seed: int = 0

    def continuing(self, hint_share: float = 0.0, new_hint_steps: int = 0) -> Stage2:
        """This plan, for a run that goes on from another's weights: the hint alone for `hint_share` of it, and then
        all that comes on along the way at once. Where the hint itself is new, the first `new_hint_steps` are its own.
        """
        hint_first = min(new_hint_steps / self.steps, 1.0)
        hint_share = max(hint_share, hint_first)
        return replace(
            self,
            hint_first=hint_first,
            peak_rate=CONTINUED_RATE * self.peak_rate,
            talker_start=hint_share,
            history_start=hint_share,
            decoder_start=hint_share,
            exact_start=hint_share,
            disturbed_from=0.0,
        )


def energy_score(first: Tensor, second: Tensor, true: Tensor) -> Tensor:
    """The energy score of two draws [..., C] against what came true, per square root of C."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(-1).add(1e-6).sqrt()

    spread = distance(first, second)
    score = 0.5 * (distance(first, true) + distance(second, true)) - 0.5 * spread
    return score.mean() / true.shape[-1] ** 0.5


def seal_error(found: Tensor, true: Tensor, closure_weight: float) -> Tensor:
    """Mean squared error of seals, 0 to 1, each `1 + closure_weight * true` times."""
    return ((found - true).square() * (1 + closure_weight * true)).mean()


def control_map(space: MotionSpace, coordinates: Tensor) -> Tensor:
    """[K, n]: mouth controls of coordinates, each in units of its deviation in `coordinates` [N, K]."""
    readings = torch.from_numpy(space.to_weights.T @ control_readings(space.names))
    deviation = (coordinates @ readings).std(0)
    return readings / deviation.clamp(min=1e-3)


def speed_map(space: MotionSpace, coordinates: Tensor) -> Tensor:
    """[K, 5]: what changes of coordinates do to `SLOW` controls, each in units of the deviation of its changes
    from row to row of `coordinates` [N, K]."""
    slow = [list(READINGS).index(name) for name in SLOW]
    return control_map(space, coordinates.diff(dim=0))[:, slow]


def stage2_loss(
    student: Student,
    space: MotionSpace,
    controls: Tensor,
    speeds: Tensor,
    batch: Crops,
    plan: Stage2,
    progress: float,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch and its parts; `progress` 0..1 decides about the history, `controls` and `speeds`
    are what `control_map` and `speed_map` gave."""
    random, generator = runs.generators(plan.seed + 1, step)
    device = batch.motion.device

    def noise(*shape: int) -> Tensor:  # drawn on the CPU: the same on every device
        return torch.randn(shape, generator=generator).to(device)

    talker = student.talker
    network, frames = talker.diff_ar_network, batch.motion.shape[1] - 1
    size, lips, mouth = len(batch.motion), mouth_latents(talker.config), space.mouth
    with runs.products(device, plan.bfloat16):
        grown = min(progress / plan.disturbed_from, 1.0) if plan.disturbed_from else 1.0
        heard = disturbed(batch.mel, generator, grown)
        features = frame_features(talker.audio_encoder, heard, frames)
        hinted, seal, visemes = student.hinted(features)
    hinted, sought = _mouth(hinted, mouth), _mouth(batch.motion[:, 1:], mouth)
    hint = reconstruction_loss(space, hinted, sought)
    hint = hint + plan.seal_weight * seal_error(seal, sealing(space, sought), plan.closure_weight)
    hint = hint + plan.viseme_weight * F.cross_entropy(visemes.flatten(0, 1), batch.visemes.flatten())
    missed = hinted - sought
    hint = hint + plan.control_weight * (missed @ controls).square().mean()
    hint = hint + plan.steady_weight * (missed.diff(dim=1) @ speeds).square().mean()
    if progress < plan.talker_start:
        return hint, {"hint": float(hint.detach())}
    with torch.no_grad(), runs.products(device, plan.bfloat16):
        latents = apart(talker, batch.motion, mouth)
        if batch.upper.shape[-1]:
            latents[..., lips:] = batch.upper
        latents[batch.at_start, 0] = talker.autoencoder.start_latent()
    style = network.obj_vector(batch.speaker)
    position = torch.from_numpy(random.integers(0, network.config.period, size)).to(device)
    seen = talker.config.window_size

    shake = plan.history_noise * torch.rand(size, 1, 1, generator=generator).to(device)
    nothing = talker.autoencoder.start_latent().expand(size, frames, -1)[..., :lips]
    disturbance = shake * noise(size, frames, latents.shape[2] - lips)
    kind = torch.rand(size, 1, 1, generator=generator).to(device)
    lasting = plan.history_offset * torch.rand(size, 1, 1, generator=generator).to(device)
    offset = lasting * noise(size, 1, latents.shape[2] - lips) * (kind < plan.offset_share)
    brows = latents[:, :-1, lips:] + disturbance + offset
    past = torch.cat([nothing, brows], -1)
    with runs.products(device, plan.bfloat16):
        if progress >= plan.history_start:
            with torch.no_grad():
                condition = network.conditions(past, features, style, position, seen)
                predicted = network.sample(noise(*latents[:, 1:].shape), condition, talker.sampler)
            blind = torch.rand(size, 1, 1, generator=generator) < plan.blind_share
            own = torch.cat([latents[:, :1], predicted.float()[:, :-1]], 1)
            lips_own = own[..., :lips] + shake * noise(*nothing.shape)
            lips_own = torch.where(blind.to(device), nothing, lips_own)
            brows_own = torch.where(kind > 1 - plan.offset_share, own[..., lips:] + disturbance, brows)
            past = torch.cat([lips_own, brows_own], -1)
        condition = network.conditions(past, features, style, position, seen)
        drawn = network.sample(noise(2, *latents[:, 1:].shape), condition, talker.sampler)
    wanted = latents[:, 1:]
    first, second = drawn.float()

    window = window_length(random, talker.decode_window)
    starts = torch.randint(window - 1, frames, (size, plan.windows), generator=generator)
    ends = torch.cat([starts, starts + 1], 1).to(device)
    mixed = torch.cat([first[..., :lips], wanted[..., lips:]], -1)  # a drawn blink need not be the true one
    with runs.products(device, plan.bfloat16):
        history = torch.cat([latents[:, :1], mixed], 1)
        decoded = newest_frames(talker.autoencoder.decoder, history, ends, window).float()
    true = batch.motion[torch.arange(size, device=device)[:, None], ends]
    movement = decoded[:, plan.windows :] - decoded[:, : plan.windows]
    true_movement = true[:, plan.windows :] - true[:, : plan.windows]
    parts = {
        "latent": (drawn[..., :lips].float() - wanted[..., :lips]).square().mean(),
        "energy": energy_score(first[..., lips:], second[..., lips:], wanted[..., lips:]),
        "motion": 2 * reconstruction_loss(space, decoded, true),
        "gap": plan.gap_weight * lip_gap_loss(space, decoded, true, plan.shut_weight),
        "controls": plan.control_weight * ((decoded - true) @ controls).square().mean(),
        "seal": plan.seal_weight
        * seal_error(sealing(space, decoded), sealing(space, true), plan.closure_weight),
        "hint": 0.5 * hint,
        "speed": plan.speed_weight * (movement - true_movement).abs().mean(),
        "steady": plan.steady_weight * ((movement - true_movement) @ speeds).square().mean(),
    }
    values = {name: float(part.detach()) for name, part in parts.items()}
    return sum(parts.values(), torch.zeros((), device=device)), values


def apart(talker: Talker, motion: Tensor, mouth: int) -> Tensor:
    """Latents [B, T, C] of motion [B, T, K] in which the mouth's know nothing of the upper face, nor the upper
    face's of the mouth: each half is encoded with the other at rest.

    Stage 1's decoder looks for the mouth in the mouth's latents alone, but its encoder leaves a trace of it in the
    upper face's: a two-hundredth of their variance, of frames to come as well. That was enough for the history of
    the upper face to tell what the mouth would do, and for the decoder, tuned on true latents, to read closures
    there. In a stream these latents are drawn, and the lips trembled with them.
    """
    lips, still = mouth_latents(talker.config), _mouth(motion, mouth)
    of_mouth, of_upper = talker.autoencoder.encoder(torch.cat([still, motion - still])).float().chunk(2)
    return torch.cat([of_mouth[..., :lips], of_upper[..., lips:]], -1)


def _mouth(motion: Tensor, mouth: int) -> Tensor:
    """Motion [..., K] with the upper face at rest."""
    return torch.cat([motion[..., :mouth], torch.zeros_like(motion[..., mouth:])], -1)


def train(
    config: ModelConfig,
    space: MotionSpace,
    motion: MotionData,
    mel: MelData,
    autoencoder: dict[str, Tensor],
    plan: Stage2,
    folder: Path,
    until: int | None = None,
    validation: Validation | None = None,
    begin: Student | None = None,
) -> Talker:
    """Train (or go on training) in `folder`, to step `until` or the plan's end, and return the talker.

    `autoencoder` is stage 1's state dict; its encoder and codes stay as they are. `begin` is another run's student,
    which this run trains on, with stage 1's autoencoder in it again.
    """
    torch.manual_seed(plan.seed)
    student = Student(config) if begin is None else begin
    talker = student.talker
    talker.autoencoder.load_state_dict(autoencoder)
    talker.autoencoder.encoder.requires_grad_(False)
    talker.autoencoder.quantize.requires_grad_(False)
    ear = [*talker.audio_encoder.parameters(), *student.hint.parameters()]
    mouth = [*talker.autoencoder.decoder.parameters(), *talker.diff_ar_network.parameters()]
    groups: list[dict[str, Any]] = [{"params": ear, "scale": plan.encoder_rate}, {"params": mouth}]
    run = runs.start(folder, student, plan.peak_rate, groups, plan)
    controls = control_map(space, motion.coordinates).to(runs.device())
    speeds = speed_map(space, motion.coordinates).to(runs.device())
    last = min(until or plan.steps, plan.steps)
    while run.step < last:
        random = np.random.default_rng([plan.seed, run.step])
        progress = run.step / plan.steps
        exact = progress >= plan.exact_start
        encoder = talker.audio_encoder
        size = plan.batch if progress >= plan.talker_start else plan.hint_batch
        batch = crops(motion, mel, encoder, size, plan.frames, random, every_phase=exact)
        talker.autoencoder.decoder.requires_grad_(progress >= plan.decoder_start)
        encoder.requires_grad_(progress >= plan.hint_first)
        device = runs.device()
        loss, values = stage2_loss(
            student, space, controls, speeds, batch.to(device), plan, progress, run.step
        )
        runs.update(run, loss, runs.learning_rate(run.step, plan.steps, plan.peak_rate))
        if run.step % 50 == 0 or run.step == last:
            run.log(**values)
        if run.step % 250 == 0:
            run.save()
        if validation is not None and run.step % VALIDATE_EVERY == 0 and progress >= plan.talker_start:
            run.log(**scores(space, *streamed(talker, validation), config.fps))
    run.save()
    return talker


def main(arguments: Sequence[str] | None = None) -> None:
    if recorded_asked_for(arguments):
        from streamtalk_training import release_recipe  # imports transformers, which takes seconds

        release_recipe.stage2(arguments)
        return
    parser = argparse.ArgumentParser(
        prog="python -m streamtalk_training.stage2", description=__doc__, epilog=RECORDED_NOTE
    )
    add_setup_options(parser)
    parser.add_argument("--steps", type=int, default=Stage2.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--closure-weight",
        type=float,
        default=Stage2.closure_weight,
        metavar="W",
        help="so much more does an error of the lips' seal count where they are sealed (default: %(default)g)",
    )
    parser.add_argument(
        "--shut-weight",
        type=float,
        default=Stage2.shut_weight,
        metavar="W",
        help="so much more does an error of the lips' gap count where they meet (default: %(default)g)",
    )
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors that have it")
    parser.add_argument(
        "--begin",
        type=Path,
        metavar="STATE",
        help="stage2/state.pt of another run, whose weights to begin with: all that comes on in the course of a run "
        "is on from the start, and the decoder is stage 1's again. Or a folder with a packed model.safetensors, as is "
        "models/bundled: the lips learn on, and stage 1 is not needed. The config's audio encoder may be larger "
        "(dilations, expansion, stem_width) than what is begun with: what is new adds nothing at first",
    )
    parser.add_argument(
        "--hint-share",
        type=float,
        default=0.0,
        metavar="S",
        help="with --begin: share of the run that trains the audio encoder alone, three times as fast a step "
        "(default: 0)",
    )
    parser.add_argument(
        "--upper",
        type=Path,
        metavar="FOLDER",
        help="with --begin FOLDER: another packed talker, which draws the upper face (default: the one begun with)",
    )
    parser.add_argument(
        "--blinks",
        type=float,
        metavar="N",
        help="with --begin FOLDER: draw clips such that these faces blink N times a minute (default: as they come, "
        "and then the run blinks more than what it learns from: 22 times on 18, for instance)",
    )
    options = parser.parse_args(arguments)
    if not (options.begin and options.begin.is_dir()) and (options.upper or options.blinks):
        parser.error("--upper and --blinks go with --begin FOLDER, of a packed talker")
    if not 0 <= options.hint_share < 1:
        parser.error("--hint-share must be at least 0 and below 1")
    if options.hint_share and options.begin is None:
        parser.error("--hint-share goes with --begin: a run from nothing has its own")
    with runs.one_sentence():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Stage 2 as the parsed options say. Raises OSError and ValueError where something needed is missing."""
    setup: Setup = setup_from(options)
    packed = None
    if options.begin is not None and options.begin.is_dir():
        upper = packed = unpacked(options.begin, setup.config, setup.maps)
        if options.upper:
            own = narrowed(load_config(options.upper / "config.yaml"), setup.space)
            upper = unpacked(options.upper, own, setup.maps)
            if not alike(upper, packed):
                raise ValueError(
                    f"{options.upper} hears other sound than {options.begin}, or has other latents"
                )
        codes = {name: value.clone() for name, value in packed.autoencoder.state_dict().items()}
    else:
        codes = finished_stage1(options.run / "stage1" / "state.pt")
    encoder = Talker(setup.config).audio_encoder
    clips = setup.clips("train")
    motion = setup.motion(clips)
    mel = mel_data((clip.pcm for clip in clips), encoder)
    del clips  # gigabytes, and all that training needs of them is made
    held_out = setup.clips("valid")
    validation = Validation(setup.motion(held_out), mel_data((clip.pcm for clip in held_out), encoder))
    del held_out
    plan = Stage2(
        options.steps,
        closure_weight=options.closure_weight,
        shut_weight=options.shut_weight,
        bfloat16=options.bfloat16,
        seed=options.seed,
    )
    begin = None
    if packed is not None:
        drawing = options.upper or options.begin
        print(f"{drawing} draws the upper face of {len(motion.speakers)} clips: minutes", file=sys.stderr)
        motion = redrawn(upper, setup.space, motion, mel, options.seed)
        if options.blinks:
            motion = calmed(motion, setup.space, options.blinks)
        plan, begin = plan.continuing(options.hint_share, NEW_HINT_STEPS), Student(setup.config)
        begin.talker = packed
    elif options.begin is not None:
        plan, begin = plan.continuing(options.hint_share), student_of(options.begin, setup.config)
    given = (setup.config, setup.space, motion, mel, codes, plan, options.run / "stage2")
    train(*given, validation=validation, begin=begin)


def student_of(path: Path, config: ModelConfig) -> Student:
    """The student in a run's state, its audio encoder `grown` where `config`'s is larger. Raises FileNotFoundError
    without a state, ValueError where it is not `config`'s."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path} to begin with")
    student = Student(config)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        student.load_state_dict(grown(state, student))
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no stage 2 of this model: {error}") from error
    return student


def finished_stage1(path: Path) -> dict[str, Tensor]:
    """Stage 1's state dict. Raises FileNotFoundError without one, ValueError where the stage is not done."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: run python -m streamtalk_training.stage1 with the same --run first"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    planned = state["plan"]["steps"] if "plan" in state else state["step"]  # older states tell no plan
    if state["step"] < planned:
        raise ValueError(
            f"{path} is at step {state['step']} of {planned}: "
            "run python -m streamtalk_training.stage1 with the same --run to its end first"
        )
    model: dict[str, Tensor] = state["model"]
    return model


if __name__ == "__main__":
    main()
