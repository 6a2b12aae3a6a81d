"""A packed talker taken up again: `stage2 --begin models/bundled` trains on from the weights that ship.

What packing drops is made up for. The hint's linear map is new, and learns first, from an audio encoder that stays as
it is. The clock (`dataset.blink_clock`) is in no vertex, so the upper face's latents can no longer be encoded: instead
the packed talker itself, or one before it that had the clock, draws blinks and brows for every clip, and they take the
place of the corpus's. So training goes on for the lips alone, and the upper face learns to stay as it was. It does so
with an error, which adds up over runs: each blinked more than what it learned from. See `calmed`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamtalk_export.checkpoint import CheckpointError, read_state
from streamtalk_export.config import ModelConfig
from streamtalk_training.dataset import FPS, MelData, MotionData, frame_features
from streamtalk_training.metrics import blinks
from streamtalk_training.motion import FaceMaps, MotionSpace, unwidened
from streamtalk_training.talker import Talker, decoded_stream, mouth_latents, rollout
from streamtalk_training.validate import eyelids

WEIGHTS = "model.safetensors"
CLIPS_AT_ONCE = 48
HALF = 2e-3  # what packing rounds by, at most
CALMEST = 3.0  # logarithm of the largest share by which one blink more makes a clip rarer
DECODED_AT_ONCE = 8  # a frame's window is several frames: more of them leave a processor's cache
GROWING = re.compile(r"audio_encoder\.(blocks\.\d+|fine)\.")


def unpacked(folder: Path, config: ModelConfig, maps: FaceMaps) -> Talker:
    """The talker whose weights lie in `folder`, over the coordinates of `config`.

    Raises ValueError where they cannot be read or are not of `config`.
    """
    prefix, talker = "autoencoder.", Talker(config)
    try:
        state = {name: value.float() for name, value in read_state(folder / WEIGHTS).items()}
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state.update({prefix + name: value for name, value in unwidened(own, maps).items()})
        talker.load_state_dict(grown(state, talker))
    except (CheckpointError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder / WEIGHTS} is no talker of this model: {error}") from error
    return talker


def grown(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` with what `model`'s audio encoder has more of: blocks behind the others, units in a block, the fine stem.

    What is new keeps the values that it has in `model`, but for its way out, which is zero: it adds nothing until it is
    trained. Weights of which `model` has less, or which lie elsewhere, are left for `load_state_dict` to refuse.
    """
    whole = dict(state)
    for name, value in model.state_dict().items():
        if not GROWING.search(name):
            continue
        has = state.get(name, value[:0])
        if has.dim() == value.dim() and all(np.less_equal(has.shape, value.shape)):
            larger = torch.zeros_like(value) if ".out." in name else value.clone()
            larger[tuple(map(slice, has.shape))] = has
            whole[name] = larger
    return whole


@torch.no_grad()
def redrawn(talker: Talker, space: MotionSpace, motion: MotionData, mel: MelData, seed: int) -> MotionData:
    """`motion` with the upper face, its latents too, that `talker` draws on hearing `mel`, each clip from its start."""
    lips, width = mouth_latents(talker.config), talker.config.predictor.vq_dim
    coordinates = motion.coordinates.clone()
    upper = torch.empty(len(coordinates), width - lips)
    lengths = np.diff(motion.offsets)
    shortest_first = np.argsort(lengths, kind="stable")  # so that clips of a length stream together
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(lengths), CLIPS_AT_ONCE):
        clips = shortest_first[start : start + CLIPS_AT_ONCE]
        longest = int(lengths[clips[-1]])
        features = torch.nn.utils.rnn.pad_sequence(
            [_features(talker, mel, int(clip), int(lengths[clip])) for clip in clips], batch_first=True
        )
        speakers = torch.from_numpy(motion.speakers[clips])
        noise = torch.randn(len(clips), longest, width, generator=generator)
        latents = rollout(talker, features, speakers, noise)
        drawn = torch.cat([decoded_stream(talker, part) for part in torch.split(latents, DECODED_AT_ONCE)])
        for row, clip in enumerate(clips):
            rows = slice(int(motion.offsets[clip]), int(motion.offsets[clip + 1]))
            frames = int(lengths[clip])
            coordinates[rows, space.mouth :] = drawn[row, :frames, space.mouth :]
            upper[rows] = latents[row, :frames, lips:]
    return replace(motion, coordinates=coordinates, upper=upper)


def alike(drawing: Talker, learning: Talker) -> bool:
    """Whether one talker's upper face can be another's: both hear the same log-mel frames, and their codes agree.

    Latents mean what stage 1 made of them, so talkers of other stages 1 do not agree.
    """
    ears = [talker.audio_encoder for talker in (drawing, learning)]
    heard = [
        (ear.stem.weight.shape[1], ear.level_floor, ear.past_samples, ear.receptive_field) for ear in ears
    ]
    first, second = (talker.autoencoder.quantize.embedding.weight for talker in (drawing, learning))
    same = first.shape == second.shape and torch.allclose(first, second, rtol=HALF, atol=HALF)
    return heard[0] == heard[1] and same


def calmed(motion: MotionData, space: MotionSpace, blinks_per_minute: float) -> MotionData:
    """`motion` with clips that blink much drawn less often, so that what is drawn blinks so often in the mean.

    Each blink more than is usual divides a clip's `favour` by the same number, however long the clip. Raises
    ValueError where no such number is in reach.
    """
    lengths = np.diff(motion.offsets)
    clips = torch.split(motion.coordinates, lengths.tolist())
    blinked = np.array([len(blinks(eyelids(space, clip).numpy())) for clip in clips])
    minutes = lengths / FPS / 60

    def rate(favour: NDArray[np.float64]) -> float:
        return float((favour * blinked).sum() / (favour * minutes).sum())

    more = blinked - rate(motion.favour) * minutes
    least, most = -CALMEST, CALMEST  # of the logarithm of that number
    for _ in range(60):
        divisor = (least + most) / 2
        favour = motion.favour * np.exp(-divisor * more)
        least, most = (divisor, most) if rate(favour) > blinks_per_minute else (least, divisor)
    if abs(rate(favour) - blinks_per_minute) > 0.01 * blinks_per_minute:
        raise ValueError(
            f"these faces blink {rate(motion.favour):.1f} times a minute, which drawing some clips more often makes "
            f"{rate(favour):.1f} at the nearest, not {blinks_per_minute:g}"
        )
    return replace(motion, favour=favour)


def _features(talker: Talker, mel: MelData, clip: int, frames: int) -> Tensor:
    """Features [frames, A] of one clip, each at its frame's own time."""
    heard = mel.mel[:, int(mel.offsets[clip]) : int(mel.offsets[clip + 1])]
    return frame_features(talker.audio_encoder, heard.transpose(1, 2)[None].float(), frames)[0]
