"""espeak-ng, the clips made from it, and shards on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtalk_training import augment, corpus, espeak
from streamtalk_training.clips import Clip, ClipSpec, render, with_silences
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.idle import idle_weights
from streamtalk_training.sentences import generated_sentences, split_of
from streamtalk_training.visemes import Phone


def spec(engine: str = "espeak", varied: bool = True, index: int = 0) -> ClipSpec:
    said = ("Bob put the copper pump up by the stamp.",) if engine == "espeak" else ()
    return ClipSpec(index, 3, engine, "en-us+f3", said, varied)


def test_espeak_gives_speech_and_phones_in_order() -> None:
    spoken = espeak.say("Bob put the pump up.", "en-us")
    assert spoken.sample_rate == 22050
    assert 0.5 < len(spoken.pcm) / spoken.sample_rate < 4
    assert [p.viseme for p in spoken.phones[:3]] == ["PBM", "AA", "PBM"]
    for before, after in zip(spoken.phones, spoken.phones[1:], strict=False):
        assert before.start_s < before.end_s <= after.start_s + 1e-9


def test_a_voiceless_stop_starts_with_its_closure() -> None:
    spoken = espeak.say("a copper pump", "en-us")
    stops = [p for p in spoken.phones if p.name == "p"]
    assert len(stops) == 3
    for stop in stops:
        start = round(stop.start_s * spoken.sample_rate)
        opening = np.abs(spoken.pcm[start : start + spoken.sample_rate // 66])  # 15 ms
        assert opening.max() < 0.05 * np.abs(spoken.pcm).max()
        assert 0.04 < stop.end_s - stop.start_s < 0.09


def test_unknown_voices_are_named() -> None:
    with pytest.raises(ValueError, match="no voice 'xx-none'"):
        espeak.say("hello", "xx-none")


def test_a_clip_fits_together() -> None:
    clip = render(spec())
    assert clip.weights.shape == clip.idle.shape == (len(clip.pcm) * 30 // 16000, 52)
    assert np.abs(clip.pcm).max() <= 1
    assert clip.phones[0].start_s == 0
    assert clip.phones[-1].end_s == pytest.approx(len(clip.pcm) / 16000, abs=1e-3)
    assert clip.weights[:, ARKIT_INDEX["jawOpen"]].max() > 0.1


def test_sounds_keep_the_mouth_shut() -> None:
    for index in range(8):
        clip = render(spec("sounds", index=index))
        assert clip.weights.max() == 0


def test_gaps_become_silence() -> None:
    filled = with_silences([Phone(0.2, 0.3, "a", "AA"), Phone(0.5, 0.6, "a", "AA")], 1.0)
    assert [p.viseme for p in filled] == ["SIL", "AA", "SIL", "AA", "SIL"]
    assert [p.start_s for p in filled[1:]] == [p.end_s for p in filled[:-1]]


def test_idle_motion_never_touches_the_mouth() -> None:
    random = np.random.default_rng(0)
    idle = idle_weights(900, 30, random.uniform(0, 1, 900).astype(np.float32), random)
    moving = {name for name, column in ARKIT_INDEX.items() if idle[:, column].any()}
    assert moving == {"eyeBlinkLeft", "eyeBlinkRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight"}
    shut = idle[:, ARKIT_INDEX["eyeBlinkLeft"]] > 0.5
    blinks = int((shut[1:] & ~shut[:-1]).sum())
    assert 4 <= blinks <= 15  # half a minute at 15 to 20 a minute


def test_augmentation_keeps_time_and_bounds() -> None:
    click = np.zeros(8000, np.float32)
    click[4000:4400] = 0.5
    always = augment.Chance(reverb=1, equaliser=1, band=1, noise=1, snr_db=(30, 40))
    heard = augment.augmented(click, 16000, np.random.default_rng(0), always)
    assert heard.shape == click.shape
    assert np.abs(heard).max() <= 1
    loudest = int(np.convolve(heard**2, np.ones(400), "valid").argmax())
    assert abs(loudest - 4000) < 160  # 10 ms


def test_a_shard_returns_what_it_was_given(tmp_path: Path) -> None:
    clips: list[Clip] = [render(spec(index=0)), render(spec("sounds", index=1))]
    corpus.save_shard(tmp_path / "train" / "00000.npz", clips)
    for before, after in zip(clips, corpus.load_split(tmp_path, "train"), strict=True):
        assert after.spec == before.spec
        np.testing.assert_allclose(after.pcm, before.pcm, atol=1 / 32767)
        np.testing.assert_allclose(after.weights, before.weights, atol=1e-3)
        assert [p.name for p in after.phones] == [p.name for p in before.phones]


def test_splits_share_neither_voices_nor_sentences() -> None:
    plan = corpus.CorpusPlan(hours=0.2)
    specs = corpus.planned_clips(plan)
    assert specs == corpus.planned_clips(plan)
    voices = {split: {s.voice for s in found if s.engine == "espeak"} for split, found in specs.items()}
    said = {split: {text for s in found for text in s.sentences} for split, found in specs.items()}
    assert not voices["train"] & voices["test"]
    assert not said["train"] & said["test"]
    assert {split_of(text) for text in said["test"]} == {"test"}


def test_generated_sentences_repeat_with_their_seed() -> None:
    assert generated_sentences(50, 1) == generated_sentences(50, 1) != generated_sentences(50, 2)
