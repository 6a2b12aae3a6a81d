"""Sounds that are not speech, and what is done to sounds that are."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamtalk_training import augment, music, soundfont, sounds
from streamtalk_training.clips import ClipSpec, render
from streamtalk_training.corpus import speaker
from streamtalk_training.voices import Engines

RATE = 16000
SPEAK = speaker([], Engines())
HARSH = augment.Chance(
    reverb=1,
    equaliser=1,
    band=1,
    noise=1,
    babble=1,
    background=1,
    clipping=1,
    codec=1,
    dropout=0,
    snr_db=(30, 40),
    background_snr_db=(25, 30),
)
MOST_SHIFT_S = 0.01  # a click may smear over a room, never move


def tiny_font(path: Path) -> Path:
    """A SoundFont with one looped and one unlooped sample, and a sung one."""
    wave = (20000 * np.sin(2 * np.pi * np.arange(2000) / 50)).astype("<i2").tobytes()
    headers = b"".join(
        struct.pack("<20sIIIIIBbHH", name, 0, 2000, *loop, 22050, 60, 0, 0, 1)
        for name, loop in ((b"Flute", (1000, 1500)), (b"Drum", (0, 2000)), (b"Aahs C4", (1000, 1500)))
    )
    body = b"smpl" + struct.pack("<I", len(wave)) + wave + b"shdr" + struct.pack("<I", len(headers)) + headers
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body) + 4) + b"sfbk" + body)
    return path


@pytest.mark.parametrize("kind", [*sounds.SHARES, "pink"])
def test_every_sound_has_unit_power_and_repeats(kind: str) -> None:
    once, again = (sounds.sound(kind, 2 * RATE, np.random.default_rng(1)) for _ in range(2))
    other = sounds.sound(kind, 2 * RATE, np.random.default_rng(2))
    assert once.shape == (2 * RATE,)
    assert np.isfinite(once).all()
    if kind == "silence":
        assert not once.any()
        return
    assert np.sqrt(np.mean(once**2)) == pytest.approx(1)
    assert not np.array_equal(once, other)
    if kind != "babble":  # within one process espeak-ng's noise runs on
        np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize(("slope", "decibels"), [(0.0, 0.0), (0.5, -3.0), (1.0, -6.0)])
def test_noise_has_its_colour(slope: float, decibels: float) -> None:
    noise = sounds.coloured_noise(60 * RATE, np.random.default_rng(0), slope)
    power = np.abs(np.fft.rfft(noise)) ** 2
    hertz = np.fft.rfftfreq(len(noise), 1 / RATE)
    octave = [10 * np.log10(power[(hertz > low) & (hertz < 1.1 * low)].mean()) for low in (500, 1000, 2000)]
    assert np.diff(octave) == pytest.approx(decibels, abs=0.3)


def test_music_plays_in_many_timbres(tmp_path: Path) -> None:
    font = tiny_font(tmp_path / "tiny.sf2")
    bright = []
    for seed in range(12):
        song = music.song(2 * RATE, np.random.default_rng(seed), font if seed % 2 else None)
        assert np.isfinite(song).all()
        power = np.abs(np.fft.rfft(song)) ** 2
        bright.append(float(np.fft.rfftfreq(len(song), 1 / RATE) @ power / power.sum()))
    assert max(bright) > 3 * min(bright)


def test_a_font_gives_notes_at_any_pitch(tmp_path: Path) -> None:
    flute, drum = soundfont.samples(tiny_font(tmp_path / "tiny.sf2"))
    assert (flute.name, flute.loop, drum.name, drum.loop) == ("Flute", (1000, 1500), "Drum", None)
    long = soundfont.note(flute, RATE, RATE, 2.0)
    assert np.abs(np.fft.rfft(long)).argmax() == pytest.approx(2 * 22050 / 50, abs=2)
    assert not soundfont.note(drum, RATE, RATE, 1.0)[2000:].any()
    with pytest.raises(ValueError, match="no SoundFont 2 file"):
        (tmp_path / "not.sf2").write_bytes(b"MThd")
        soundfont.samples(tmp_path / "not.sf2")


@pytest.mark.parametrize("kind", sounds.SHARES)
def test_sounds_keep_the_mouth_shut(kind: str) -> None:
    for index, varied in enumerate((True, False)):
        clip = render(ClipSpec(index, 3, "sounds", kind, (), varied), SPEAK)
        assert clip.weights.max() == 0
        assert clip.weights.shape == clip.idle.shape == (len(clip.pcm) * 30 // RATE, 52)
        if kind == "babble":
            assert np.sqrt(np.mean(clip.pcm**2)) < 10 ** ((sounds.LOUDEST_BABBLE_DB + 3) / 20)


def test_augmentation_keeps_time_and_bounds() -> None:
    burst = np.zeros(RATE, np.float32)
    burst[4000:4400] = np.random.default_rng(0).standard_normal(400) / 10
    for seed in range(12):
        heard = augment.augmented(burst, RATE, np.random.default_rng(seed), HARSH)
        assert heard.shape == burst.shape
        assert np.abs(heard).max() <= 1
        loudest = int(np.convolve(heard**2, np.ones(400), "valid").argmax())
        assert abs(loudest - 4000) < MOST_SHIFT_S * RATE


def test_clean_clips_are_only_set_to_a_level() -> None:
    pcm = np.sin(np.arange(8000) / 10).astype(np.float32)
    heard = augment.augmented(pcm, RATE, np.random.default_rng(0), augment.CLEAN)
    np.testing.assert_allclose(heard / heard.std(), pcm / pcm.std(), atol=1e-4)
    assert -26 <= 20 * np.log10(heard.std()) <= -20


def test_dropouts_fall_into_pauses_only() -> None:
    pcm = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    heard = augment.augmented(
        pcm, RATE, np.random.default_rng(0), replace(augment.CLEAN, dropout=1.0), [(0.1, 0.2)]
    )
    assert not heard[1600:3200].any()
    assert np.count_nonzero(heard == 0) < 1610
