"""A trained talker as files: `python -m streamtalk_training.pack --run RUN --out model.safetensors`.

The weights are widened from motion coordinates to the vertices of a face, and kept in half precision. Of several runs,
each begun with the weights of the one before, the mean is packed (Wortsman et al., "Model soups", ICML 2022). With
`--contrast` the packed talker hears spectra sharper than they are: see `sharpened`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from streamtalk_export.config import ModelConfig, load_config
from streamtalk_training import runs
from streamtalk_training.face import Face, load_face
from streamtalk_training.motion import FaceMaps, widened
from streamtalk_training.setup import face_space, kept_space, maps_of, narrowed
from streamtalk_training.shipped import WEIGHTS, unpacked
from streamtalk_training.talker import Talker

CONTRAST_BINS = 25  # of the mel axis, on average over which spectra are smooth
STATE = Path("stage2", "state.pt")
STEMS = ("audio_encoder.stem.weight", "audio_encoder.fine.conv.weight")  # not every encoder has the fine one
TALKER = "talker."  # how stage 2's student names the talker in it

HEADER = """\
# The bundled talker, in the release's schema. Keys of our own: type and the mel encoder's, head,
# num_res_blocks, noise_from, instance_norm, STREAM, sampler. n_vert and id_dim follow face.npz.
"""

ARCHITECTURE: dict[str, Any] = {
    "DATASET": {"NAME": "bundled"},
    "MODEL": {
        "AUDIO_ENCODER": {
            "type": "mel",
            "hidden_fps": 30,
            "mel_bins": 64,
            "width": 128,
            "dilations": [1, 2, 4, 4, 1, 1],
            "expansion": 3,
            "stem_width": 256,
            "lookahead_ms": 100,
            "level_floor": 3e-4,
        },
        "DIFF_AR_DEC": {
            "vq_dim": 64,
            "latent_dim": 128,
            "audio_encode_dim": 128,
            "feedforward_dim": 256,
            "period": 30,
            "n_heads": 4,
            "num_layers": 2,
            "dropout": 0.0,
            "activation": "gelu",
            "head": "residual_mlp",
            "num_res_blocks": 2,
            "noise_from": 48,  # the mouth's share: lips follow the sound, blinks and brows are drawn
        },
        "VAE": {
            "n_embed": 256,
            "zquant_dim": 8,
            "face_quan_num": 8,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "instance_norm": False,
        },
        "STREAM": {"hop": 1, "decode_window": 8},
        "num_inference_timesteps": 4,
        "window_size": 32,
        "sampler": "ddim",
    },
}


def write_config(path: Path, face: Face) -> None:
    """The bundled architecture with the sizes of `face`."""
    model = dict(ARCHITECTURE["MODEL"])
    model["DIFF_AR_DEC"] = {**model["DIFF_AR_DEC"], "id_dim": len(face.templates)}
    model["VAE"] = {**model["VAE"], "n_vert": int(face.vertices.size)}
    document = {**ARCHITECTURE, "MODEL": model}
    path.write_text(
        HEADER + yaml.safe_dump(document, sort_keys=False, default_flow_style=None), encoding="utf-8"
    )


def checkpoint(talker: Talker, maps: FaceMaps) -> dict[str, Tensor]:
    """The state dict of the release's naming, over vertices and in half precision."""
    prefix = "autoencoder."
    state = talker.state_dict()
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state.update({prefix + name: value for name, value in widened(own, maps).items()})
    return {name: value.detach().to(torch.float16).contiguous() for name, value in state.items()}


def trained(run: Path, config: ModelConfig, maps: FaceMaps) -> dict[str, Tensor]:
    """The talker's weights that stage 2 left in `run`, or that are packed there. Raises FileNotFoundError where there
    are none, ValueError where they are packed and not of `config`."""
    state = run / STATE
    if state.is_file():
        weights: dict[str, Tensor] = torch.load(state, map_location="cpu", weights_only=True)["model"]
        return {
            name.removeprefix(TALKER): value for name, value in weights.items() if name.startswith(TALKER)
        }
    if (run / WEIGHTS).is_file():
        return unpacked(run, config, maps).state_dict()
    raise FileNotFoundError(f"no {state}: run python -m streamtalk_training.stage2 with the same --run first")


def mean(states: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Each weight's mean by `shares`, which add up to 1; what is no float is the last state's. Raises ValueError where
    the states are not of one architecture, or the shares not one a state.
    """
    if len(shares) != len(states) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"{len(states)} runs need as many shares that add up to 1, not {list(shares)}")
    last = states[-1]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(other != shapes[-1] for other in shapes):
        raise ValueError("runs of different architectures have no mean")
    return {
        name: sum((share * state[name] for share, state in zip(shares, states, strict=True)), torch.zeros(()))
        if value.is_floating_point()
        else value
        for name, value in last.items()
    }


def sharpening(bins: int, contrast: float) -> Tensor:
    """[bins, bins]: from log-mel frames to such as stand `contrast` times as far from their mean over `CONTRAST_BINS`
    bins around; the first and the last bin go on beyond the axis. What is below 1 undoes its reciprocal."""
    if contrast < 1:
        return torch.linalg.inv(sharpening(bins, 1 / contrast))
    reach = CONTRAST_BINS // 2
    around = (torch.arange(bins)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, bins - 1)
    smooth = torch.zeros(bins, bins).scatter_add_(1, around, torch.full(around.shape, 1 / CONTRAST_BINS))
    return contrast * torch.eye(bins) + (1 - contrast) * smooth


def sharpened(state: dict[str, Tensor], contrast: float) -> dict[str, Tensor]:
    """A talker's weights whose audio encoder hears every log-mel frame through `sharpening`.

    The two stems are all that hears them, and what they do first is linear: so the map goes into their weights, and
    costs nothing.
    """
    spectra = sharpening(state[STEMS[0]].shape[1], contrast)
    heard = {name: torch.einsum("abk,bc->ack", state[name], spectra) for name in STEMS if name in state}
    return state | heard


def pack(talker: Talker, maps: FaceMaps, path: Path) -> None:
    """Write `path` (.safetensors), whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(checkpoint(talker, maps), partial)
    partial.chmod(0o644)  # safetensors writes for the owner alone
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.pack", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("models/bundled/config.yaml"))
    parser.add_argument("--face", type=Path, default=Path("models/bundled/face.npz"))
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        nargs="+",
        help="folder with stage2 in it, or with a packed talker, such as models/bundled; of several, the mean",
    )
    parser.add_argument(
        "--share", type=float, nargs="+", help="each run's weight in the mean, adding up to 1 (equal ones)"
    )
    parser.add_argument(
        "--contrast",
        type=float,
        default=1.0,
        metavar="C",
        help="how much farther from its smooth shape every spectrum is heard than it is, on top of what a packed "
        "talker hears so already, which 1 / C undoes (default: as it is)",
    )
    parser.add_argument("--out", type=Path, default=Path("models/bundled/model.safetensors"))
    options = parser.parse_args(arguments)
    if not options.contrast > 0:
        parser.error("--contrast must be above 0")
    with runs.one_sentence():
        face = load_face(options.face)
        last = options.run[-1]
        space = kept_space(last, face) if (last / STATE).is_file() else face_space(face)
        config, maps = narrowed(load_config(options.config), space), maps_of(face, space)
        shares = options.share or [1 / len(options.run)] * len(options.run)
        talker = Talker(config)
        weights = mean([trained(run, config, maps) for run in options.run], shares)
        talker.load_state_dict(sharpened(weights, options.contrast))
        pack(talker, maps, options.out)


if __name__ == "__main__":
    main()
