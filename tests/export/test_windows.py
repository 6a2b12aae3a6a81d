"""Audio windows: their arithmetic, silence, and the features of a window against those of the whole clip."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from streamtalk.model import Clock
from streamtalk_export.config import AudioEncoderConfig, ConfigError, ModelConfig
from streamtalk_export.excerpt import babble
from streamtalk_export.hubert import HubertEncoder
from streamtalk_export.mel import MelEncoder
from streamtalk_export.windows import StreamingEncoder, audio_window, positions
from tests.export.golden import Golden, load_golden

FLOAT_ROUNDING = 2e-5
"""float32 features of the same samples, computed in windows of other lengths."""


@pytest.fixture(scope="module")
def mel() -> MelEncoder:
    torch.manual_seed(0)
    return MelEncoder(AudioEncoderConfig(fps=30)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_golden("vocaset_small").config


def test_delay_is_the_windows_end_minus_the_first_frame() -> None:
    window = Clock(16000, 30, 4, context_samples=32000, lookahead_samples=3200)
    assert window.window_samples == 32000 + 1600 + 3200
    assert window.delay_s == pytest.approx(0.3)
    assert positions(window) == pytest.approx([100, 100 + 5 / 3, 100 + 10 / 3, 105])


def test_windows_that_cannot_work(mel: MelEncoder, config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"context of 0\.100 s is shorter than"):
        audio_window(config, mel, 1, 0.1, None)
    with pytest.raises(
        ConfigError, match=r"lookahead of 20 ms is too short: at hop 1 the last frame needs 75\.0 ms"
    ):
        audio_window(config, mel, 1, None, 20)
    with pytest.raises(ConfigError, match="covers all that the mel encoder reads"):
        MelEncoder(AudioEncoderConfig(fps=30, lookahead_ms=700))


@pytest.mark.parametrize("hop", [1, 2, 3, 5])
def test_every_window_holds_the_features_it_reads(mel: MelEncoder, config: ModelConfig, hop: int) -> None:
    window = audio_window(config, mel, hop, None, None)
    features = StreamingEncoder(mel, window, 1e-3)(torch.zeros(2, window.window_samples))
    assert features.shape == (2, hop, 128)


def streamed(encoder: StreamingEncoder, window: Clock, pcm: Tensor, frames: int) -> Tensor:
    padded = torch.nn.functional.pad(pcm, (window.context_samples, window.window_samples))
    out = []
    for first in range(0, frames, window.hop):
        start = window.window_start(first) + window.context_samples
        out.append(encoder(padded[None, start : start + window.window_samples])[0])
    return torch.cat(out)[:frames]


@pytest.mark.parametrize("hop", [3, 6])
def test_mel_stream_is_the_whole_clip(mel: MelEncoder, config: ModelConfig, hop: int) -> None:
    """At 30 fps hops of 3 start on the feature grid: the stream reads what one pass over the clip gives."""
    pcm = torch.from_numpy(babble(2.0))
    window = audio_window(config, mel, hop, None, None)
    got = streamed(StreamingEncoder(mel, window, 1e-3), window, pcm, 60)
    features = mel(torch.nn.functional.pad(pcm[None], (mel.past_samples, mel.receptive_field)))[0]
    position = torch.arange(60) * 50 / 30
    low = position.floor().long()
    want = features[low] + (position - low)[:, None] * (features[low + 1] - features[low])
    torch.testing.assert_close(got, want, rtol=0, atol=FLOAT_ROUNDING)


def test_mel_silence_is_exactly_silent(mel: MelEncoder) -> None:
    assert not mel.log_mel(torch.zeros(1, 16000)).any()


def test_quiet_noise_is_not_amplified(golden: Golden) -> None:
    """HuBERT normalises any level away: without the gate, noise at -100 dB looks like speech."""
    encoder, config = deepcopy(golden.model.audio_encoder), golden.config
    assert isinstance(encoder, HubertEncoder)
    # A trained GroupNorm has a bias. Without one, silence is all zeros and the next LayerNorm blows up any trace.
    torch.manual_seed(0)
    torch.nn.init.normal_(encoder.hubert.feature_extractor.conv_layers[0].layer_norm.bias, std=0.3)
    window = audio_window(config, encoder, 4, None, None)
    gated = StreamingEncoder(encoder, window, config.audio.level_floor)
    open_gate = StreamingEncoder(encoder, window, 1e-12)
    voice = torch.from_numpy(babble(window.window_samples / 16000))[None]
    silence = torch.zeros_like(voice)

    def distance(pcm: Tensor, module: StreamingEncoder) -> float:
        return float((module(pcm) - open_gate(silence)).square().mean().sqrt())

    quiet = voice * (1e-5 / voice.std())
    assert distance(quiet, open_gate) > 0.5 * distance(voice, gated)
    assert distance(quiet, gated) < 0.1 * distance(voice, gated)
    # A gain of 1 from the floor up: ordinary levels are untouched.
    assert torch.equal(gated(voice), open_gate(voice))


def test_the_graphs_encoder_is_the_models(golden: Golden) -> None:
    """One product for queries, keys and values, and only the tokens that are read: the same features."""
    encoder = load_golden(
        golden.folder.name
    ).model.audio_encoder  # fused below, and copies share their classes
    assert isinstance(encoder, HubertEncoder)
    window = audio_window(golden.config, encoder, 4, None, None)
    pcm = torch.from_numpy(babble(window.window_samples / 16000))[None]
    streaming = StreamingEncoder(encoder, window, 1e-4)
    with torch.no_grad():
        features = encoder(pcm, 1e-4)
        position = torch.tensor(positions(window))
        low = position.floor().long()
        want = features[:, low] + (position - low)[:, None] * (
            features[:, position.ceil().long()] - features[:, low]
        )
        torch.testing.assert_close(streaming(pcm), want, rtol=0, atol=FLOAT_ROUNDING)
        encoder.fuse()
        torch.testing.assert_close(encoder(pcm, 1e-4), features, rtol=0, atol=FLOAT_ROUNDING)
        torch.testing.assert_close(streaming(pcm), want, rtol=0, atol=FLOAT_ROUNDING)


def test_dc_offset_is_not_a_level(golden: Golden) -> None:
    encoder = golden.model.audio_encoder
    window = audio_window(golden.config, encoder, 4, None, None)
    gated = StreamingEncoder(encoder, window, golden.config.audio.level_floor)
    silence = torch.zeros(1, window.window_samples)
    np.testing.assert_allclose(gated(silence + 0.25), gated(silence), atol=FLOAT_ROUNDING)
