"""Model configuration in the release's YAML schema, plus the few keys that the bundled model adds.

Only what shapes the model is read. Sections about logging, data or optimisation are ignored; an unknown key
within a section that is read is refused, since it could change the model silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from streamtalk_export.errors import ExportError

Sampler = Literal["ddim", "ddim_legacy"]
Count = Annotated[int, msgspec.Meta(ge=1)]

SAMPLE_RATE = 16000
FEATURE_RATE = 50
STRIDE = SAMPLE_RATE // FEATURE_RATE
"""Samples that both audio encoders step from feature to feature."""


class ConfigError(ExportError):
    """A configuration that names something unknown, leaves something out or contradicts itself."""


class AudioEncoderConfig(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"fps": "hidden_fps", "kind": "type"},
):
    """HuBERT as released, or the small streaming-safe mel encoder of the bundled model.

    `expansion` is how many times wider than `width` its blocks are within, `stem_width` how many nonlinear units read
    the mel frames beside the linear stem.
    """

    fps: Count
    kind: Literal["hubert", "mel"] = "hubert"
    mel_bins: Count = 64
    width: Count = 128
    dilations: tuple[Count, ...] = (1, 2, 4, 6)
    expansion: Count = 2
    stem_width: Annotated[int, msgspec.Meta(ge=0)] = 0
    lookahead_ms: Count = 80
    level_floor: Annotated[float, msgspec.Meta(gt=0)] = 1e-3


class PredictorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Condition predictor and diffusion head (`diff_ar_network`).

    `noise_from` is ours: the numbers of a latent before it are denoised from 0 and so follow the sound alone, the
    others are drawn. The release draws all of them.
    """

    vq_dim: Count
    latent_dim: Count
    audio_encode_dim: Count
    id_dim: Count
    feedforward_dim: Count
    period: Count = 30
    n_heads: Count = 4
    num_layers: Count = 1
    dropout: float = 0.1
    activation: Literal["relu", "gelu"] = "relu"
    head: Literal["linear", "residual_mlp"] = "linear"
    num_res_blocks: Count = 3
    noise_from: Annotated[int, msgspec.Meta(ge=0)] = 0


class VQConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """VQ-VAE (`autoencoder`). `n_vert` is 3V as in the release.

    Two keys are ours. `instance_norm`: InstanceNorm over the window removes the absolute pose, so the bundled
    model does without. `latent_linear`: whether Linear maps stand between latents and hidden width. The
    release has them for BIWI alone, whatever the sizes; a checkpoint's keys tell, and None means where
    the sizes differ.
    """

    n_vert: Count
    n_embed: Count
    zquant_dim: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    face_quan_num: Count
    neg: float = 0.2
    instance_norm: bool = True
    latent_linear: bool | None = None

    @property
    def has_latent_linear(self) -> bool:
        return self.latent_width != self.hidden_size if self.latent_linear is None else self.latent_linear

    @property
    def latent_width(self) -> int:
        """C: codes a frame times code width."""
        return self.face_quan_num * self.zquant_dim


class ScheduleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The noise schedule of training and inference."""

    num_train_timesteps: Count = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    set_alpha_to_one: bool = False
    steps_offset: int = 1


class StreamConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the model is meant to be streamed. The exporter's options override it; None means its default."""

    hop: Count | None = None
    context_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    lookahead_ms: Annotated[float, msgspec.Meta(ge=0)] | None = None
    decode_window: Annotated[int, msgspec.Meta(ge=2)] | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that determines graphs and shapes, checkpoint aside."""

    name: str
    window_size: Count
    audio: AudioEncoderConfig
    predictor: PredictorConfig
    vq: VQConfig
    schedule: ScheduleConfig = ScheduleConfig()
    steps: Count = 50
    sampler: Sampler = "ddim_legacy"
    stream: StreamConfig = StreamConfig()

    @property
    def fps(self) -> int:
        return self.audio.fps

    @property
    def n_vertices(self) -> int:
        return self.vq.n_vert // 3

    def __post_init__(self) -> None:
        p, vq, audio = self.predictor, self.vq, self.audio
        rules = {
            f"VAE.n_vert counts coordinates (3V); {vq.n_vert} is no multiple of 3": vq.n_vert % 3 == 0,
            f"DIFF_AR_DEC.vq_dim {p.vq_dim} must be face_quan_num * zquant_dim = {vq.latent_width}": (
                vq.latent_width == p.vq_dim
            ),
            f"DIFF_AR_DEC.noise_from {p.noise_from} must not pass vq_dim {p.vq_dim}": p.noise_from
            <= p.vq_dim,
            f"latent_dim {p.latent_dim} must divide by n_heads {p.n_heads}": p.latent_dim % p.n_heads == 0,
            f"hidden_size {vq.hidden_size} must divide by num_attention_heads {vq.num_attention_heads}": (
                vq.hidden_size % vq.num_attention_heads == 0
            ),
            "hidden_size and latent_dim must be even (sine and cosine columns)": (
                vq.hidden_size % 2 == 0 and p.latent_dim % 2 == 0
            ),
            f"audio_encode_dim {p.audio_encode_dim} must be the mel encoder's width {audio.width}": (
                audio.kind != "mel" or audio.width == p.audio_encode_dim
            ),
        }
        for sentence, holds in rules.items():
            if not holds:
                raise ConfigError(f"{self.name}: {sentence}.")


# Keys of the release that shape nothing here, with the one value allowed where it matters.
_ANY = object()
_INERT: dict[str, dict[str, object]] = {
    "AUDIO_ENCODER": {"audio_fps": FEATURE_RATE, "model_name_or_path": _ANY, "freeze": _ANY},
    "DIFF_AR_DEC": {"max_seq_len": _ANY, "window_size": _ANY},
    "VAE": {"pretrained": _ANY, "window_size": _ANY, "quant_factor": 0, "INaffine": False},
    "SCHEDULER": {"clip_sample": False, "prediction_type": "sample"},
    "STREAM": {},
    "MODEL": {"TYPE": _ANY, "finetune_dec": _ANY, "eta": 0, "NOISE_SCHEDULER": _ANY},
}
_SECTIONS = {
    "AUDIO_ENCODER": "audio",
    "DIFF_AR_DEC": "predictor",
    "VAE": "vq",
    "SCHEDULER": "schedule",
    "STREAM": "stream",
    "num_inference_timesteps": "steps",
    "window_size": "window_size",
    "sampler": "sampler",
}


def _without_inert(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    inert = _INERT[section]
    for key, wanted in inert.items():
        if key in values and wanted is not _ANY and values[key] != wanted:
            raise ConfigError(f"{section}.{key} is {values[key]!r}; only {wanted!r} is supported.")
    return {key: value for key, value in values.items() if key not in inert}


def parse_config(document: Mapping[str, Any], name: str) -> ModelConfig:
    """Turn a parsed YAML document of the release's schema into a ModelConfig. Raises ConfigError."""
    model = document.get("MODEL")
    if not isinstance(model, Mapping):
        raise ConfigError(f"{name}: no MODEL section.")
    dataset = document.get("DATASET")
    label = dataset.get("NAME", name) if isinstance(dataset, Mapping) else name
    fields: dict[str, Any] = {"name": str(label)}
    for key, value in _without_inert("MODEL", model).items():
        if key not in _SECTIONS:
            raise ConfigError(f"{name}: MODEL.{key} is unknown; known: {', '.join(_SECTIONS)}.")
        fields[_SECTIONS[key]] = _without_inert(key, value) if isinstance(value, Mapping) else value
    if label == "biwi" and isinstance(fields.get("vq"), dict):
        fields["vq"].setdefault("latent_linear", True)
    try:
        return msgspec.convert(fields, type=ModelConfig)
    except msgspec.ValidationError as error:
        # msgspec wraps what __post_init__ raises; its own sentences name the field after our attribute.
        text = str(error)
        for key, attribute in _SECTIONS.items():
            text = text.replace(f"`$.{attribute}", f"`MODEL.{key}")
        raise ConfigError(f"{name}: {text}") from error


_VQ_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 1536,
}
PRESETS: dict[str, ModelConfig] = {
    "vocaset": ModelConfig(
        name="vocaset",
        window_size=60,
        audio=AudioEncoderConfig(fps=30),
        predictor=PredictorConfig(
            vq_dim=1024,
            latent_dim=768,
            audio_encode_dim=768,
            id_dim=8,
            feedforward_dim=1024,
            period=30,
            num_layers=2,
            dropout=0.2,
        ),
        vq=VQConfig(n_vert=15069, n_embed=256, zquant_dim=64, face_quan_num=16, **_VQ_LARGE),
    ),
    "biwi": ModelConfig(
        name="biwi",
        window_size=120,
        audio=AudioEncoderConfig(fps=25),
        predictor=PredictorConfig(
            vq_dim=1024,
            latent_dim=1024,
            audio_encode_dim=768,
            id_dim=6,
            feedforward_dim=2048,
            period=25,
            num_layers=2,
            activation="gelu",
        ),
        vq=VQConfig(
            n_vert=70110, n_embed=512, zquant_dim=128, face_quan_num=8, latent_linear=True, **_VQ_LARGE
        ),
    ),
}
SPEAKERS: dict[str, tuple[str, ...]] = {
    "vocaset": tuple(
        f"FaceTalk_{name}_TA"
        for name in (
            "170728_03272",
            "170904_00128",
            "170725_00137",
            "170915_00223",
            "170811_03274",
            "170913_03279",
            "170904_03276",
            "170912_03278",
        )
    ),
    "biwi": ("F2", "F3", "F4", "M3", "M4", "M5"),
}
"""Training identities in one-hot order: checkpoints do not carry these names."""


def load_config(source: str | Path) -> ModelConfig:
    """A preset by name, or a YAML file in the release's schema. Raises ConfigError."""
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{source} is neither a file nor a preset ({', '.join(PRESETS)}).")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path}: expected a mapping with a MODEL section.")
    return parse_config(document, path.stem)
