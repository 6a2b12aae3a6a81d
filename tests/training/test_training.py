"""Both stages on a made-up corpus: they learn, they resume exactly, and what they train is what is streamed."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from streamtalk_export.mel import MelEncoder
from streamtalk_training import runs, stage1, stage2
from streamtalk_training.dataset import MotionData, clip_mel, crops, features_at_frames, mel_data, motion_data
from streamtalk_training.evaluate import load_talker, streamed_motion
from streamtalk_training.motion import lip_gap_vectors, widened
from streamtalk_training.pack import checkpoint
from streamtalk_training.talker import Talker, decoded_stream, rollout
from tests.training.tiny import GAINS, LIP_PAIRS, USED, VERTICES, tiny_clips, tiny_config, tiny_space

SPACE = tiny_space()
CONFIG = tiny_config(SPACE)
STAGE1 = stage1.Stage1(steps=40, batch=4, frames=12, windows=4)
STAGE2 = stage2.Stage2(steps=6, batch=3, frames=12, windows=3)
SAME_SUM = 2e-5  # the same sums in another order, in float32


@pytest.fixture(scope="module")
def motion() -> MotionData:
    return motion_data(tiny_clips(), SPACE, GAINS, idle=False)


@pytest.fixture(scope="module")
def autoencoder(motion: MotionData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("stage1")
    return stage1.train(CONFIG, SPACE, motion, STAGE1, folder).state_dict()


def random_talker() -> Talker:
    torch.manual_seed(0)
    return Talker(CONFIG).eval()


def test_stage1_learns_and_logs(motion: MotionData, tmp_path: Path) -> None:
    plan = stage1.Stage1(steps=100, batch=4, frames=12, windows=4)
    stage1.train(CONFIG, SPACE, motion, plan, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_stage1_resumed_equals_uninterrupted(motion: MotionData, tmp_path: Path) -> None:
    whole = stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path / "whole").state_dict()
    stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path / "cut", until=17)
    again = stage1.train(CONFIG, SPACE, motion, STAGE1, tmp_path / "cut").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_stage2_resumed_equals_uninterrupted(
    motion: MotionData, autoencoder: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    mel = mel_data((clip.pcm for clip in tiny_clips()), MelEncoder(CONFIG.audio))
    whole = stage2.train(CONFIG, SPACE, motion, mel, autoencoder, STAGE2, tmp_path / "whole").state_dict()
    stage2.train(CONFIG, SPACE, motion, mel, autoencoder, STAGE2, tmp_path / "cut", until=3)
    again = stage2.train(CONFIG, SPACE, motion, mel, autoencoder, STAGE2, tmp_path / "cut").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    frozen = [name for name in autoencoder if name.startswith(("encoder.", "quantize."))]
    for name in frozen:
        torch.testing.assert_close(whole[f"autoencoder.{name}"], autoencoder[name], rtol=0, atol=0)


def test_cached_rollout_equals_the_predictor_as_trained() -> None:
    talker = random_talker()
    features, noise = torch.randn(2, 30, 16), torch.randn(2, 30, 8)
    speaker = torch.tensor([0, 1])
    latents = rollout(talker, features, speaker, noise)  # 30 frames: the window of 8 slides
    network = talker.diff_ar_network
    past = torch.cat([talker.autoencoder.start_latent().expand(2, 1, -1), latents[:, :-1]], 1)
    condition = network.conditions(past, features, network.obj_vector(speaker), history=CONFIG.window_size)
    again = network.sample(noise, condition, talker.sampler)
    torch.testing.assert_close(again, latents, rtol=SAME_SUM, atol=SAME_SUM)


def test_streamed_decoding_hears_the_last_latents_alone() -> None:
    talker = random_talker()
    latents = torch.randn(1, 9, 8)
    motion = decoded_stream(talker, latents)
    history = torch.cat([talker.autoencoder.start_latent()[None, None], latents], 1)
    for frame in (0, 1, 2, 8):
        seen = history[:, max(0, frame + 2 - talker.decode_window) : frame + 2]
        alone = talker.autoencoder.decoder(seen)[:, -1]
        torch.testing.assert_close(motion[:, frame], alone, rtol=SAME_SUM, atol=SAME_SUM)


def test_features_of_a_clip_equal_those_of_a_window() -> None:
    encoder = MelEncoder(CONFIG.audio)
    pcm = 0.1 * torch.randn(1, 16000)
    whole = encoder.from_log_mel(clip_mel(pcm, encoder))
    padded = torch.nn.functional.pad(pcm, (encoder.past_samples, 16000))
    for feature in (0, 7, 50):
        window = padded[:, 320 * feature : 320 * feature + encoder.receptive_field]
        torch.testing.assert_close(encoder(window)[:, 0], whole[:, feature], rtol=SAME_SUM, atol=SAME_SUM)


def test_crops_pair_motion_with_its_sound(motion: MotionData) -> None:
    encoder = MelEncoder(CONFIG.audio)
    clips = tiny_clips()
    mel = mel_data((clip.pcm for clip in clips), encoder)
    batch = crops(motion, mel, encoder, 8, 12, np.random.default_rng(0))
    features = features_at_frames(encoder.from_log_mel(batch.mel), 12, 30)
    wholes = [
        features_at_frames(encoder.from_log_mel(clip_mel(torch.from_numpy(clip.pcm)[None], encoder)), 60, 30)[
            0
        ]
        for clip in clips
    ]
    half_precision = 2e-2  # mel frames are kept as float16
    for row in range(8):
        found = [
            (clip, frame)
            for clip in range(len(clips))
            for frame in range(49)
            if torch.equal(motion.coordinates[60 * clip + frame :][:12], batch.motion[row, 1:])
        ]
        assert any(
            (features[row] - wholes[clip][frame : frame + 12]).abs().max() < half_precision
            for clip, frame in found
        )
        if batch.at_start[row]:
            assert batch.motion[row, 0].abs().max() == 0


def test_coordinates_are_another_spelling_of_weights() -> None:
    weights = np.random.default_rng(0).uniform(0, 1, (5, len(USED))).astype(np.float32)
    coordinates = weights @ SPACE.to_coordinates.T
    np.testing.assert_allclose(coordinates @ SPACE.to_weights.T, weights, atol=1e-5)
    offsets = coordinates @ SPACE.expand.T
    np.testing.assert_allclose(offsets @ SPACE.reduce.T, coordinates, atol=1e-4)
    vertices = offsets.reshape(5, VERTICES, 3)
    across = vertices[:, LIP_PAIRS[:, 0]] - vertices[:, LIP_PAIRS[:, 1]]
    np.testing.assert_allclose(lip_gap_vectors(SPACE, torch.from_numpy(coordinates)), across, atol=1e-6)


def test_a_widened_model_is_the_same_model() -> None:
    model = random_talker().autoencoder
    wide_config = msgspec.structs.replace(CONFIG.vq, n_vert=3 * VERTICES)
    wide = type(model)(wide_config)
    wide.load_state_dict(widened(model.state_dict(), SPACE))
    coordinates = torch.randn(1, 6, len(USED)) @ torch.from_numpy(SPACE.to_coordinates.T)
    expand = torch.from_numpy(SPACE.expand)
    torch.testing.assert_close(
        wide.encoder(coordinates @ expand.T), model.encoder(coordinates), rtol=0, atol=1e-4
    )
    latents = torch.randn(1, 6, 8)
    torch.testing.assert_close(wide.decoder(latents), model.decoder(latents) @ expand.T, rtol=0, atol=1e-5)


def test_a_packed_talker_still_talks() -> None:
    talker = random_talker()
    wide_vq = msgspec.structs.replace(CONFIG.vq, n_vert=3 * VERTICES)
    state = checkpoint(talker, SPACE)
    assert {value.dtype for value in state.values()} == {torch.float16}
    again = load_talker(msgspec.structs.replace(CONFIG, vq=wide_vq), SPACE, state)
    pcm = [clip.pcm for clip in tiny_clips(2)]
    before = streamed_motion(talker, pcm, [60, 45], [0, 1])
    after = streamed_motion(again, pcm, [60, 45], [0, 1])
    assert [len(rows) for rows in after] == [60, 45]
    half_precision = 3e-2  # of weights, through a rollout of 60 frames with random weights
    used = slice(len(USED))  # the rest is padding
    np.testing.assert_allclose(after[0][:, used], before[0][:, used], atol=half_precision)


def test_the_rate_warms_up_and_decays() -> None:
    rates = [runs.learning_rate(step, 1000, 1.0) for step in (0, 99, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.51, 0.02])
