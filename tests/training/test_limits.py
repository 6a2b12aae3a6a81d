"""Readouts that are fitted to a voice: held-out clips only, and nothing found where nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtalk_training import limits
from streamtalk_training.espeak import Utterance
from streamtalk_training.face import load_face
from streamtalk_training.scores import Pair, Speech
from streamtalk_training.streaming import Track
from streamtalk_training.visemes import Phone
from streamtalk_training.voices import Engines

BUNDLED = Path(__file__).parents[2] / "models" / "bundled"

CLIPS, FRAMES = 6, 200
RANDOM = 0.2  # correlation of 1,200 frames with what has nothing to do with them, many times its deviation


def made_up(mixed: bool) -> tuple[list[limits.Floats], list[limits.Floats]]:
    """Inputs [FRAMES, 4] of each clip, and two targets: a mixture of them and a product, or noise."""
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((FRAMES, 4)).astype(np.float32) for _ in range(CLIPS)]
    noise = [random.standard_normal((FRAMES, 2)).astype(np.float32) for _ in range(CLIPS)]
    true = [np.stack([x[:, 0] - x[:, 1], np.abs(x[:, 2])], 1) for x in inputs]
    return inputs, true if mixed else noise


def test_a_linear_readout_finds_what_is_linear() -> None:
    straight, bent = limits.cross_fitted(*made_up(True), limits.linear)
    assert straight > 0.99
    assert abs(bent) < RANDOM


def test_a_network_finds_what_is_bent() -> None:
    straight, bent = limits.cross_fitted(*made_up(True), limits.network)
    assert min(straight, bent) > 0.7


@pytest.mark.parametrize("fit", [limits.linear, limits.network])
def test_what_is_not_there_is_not_found(fit: object) -> None:
    # A readout tried on frames that it was fitted to would find noise as well.
    assert max(map(abs, limits.cross_fitted(*made_up(False), fit))) < RANDOM  # type: ignore[arg-type]


def test_neighbours_stand_beside_each_frame() -> None:
    features = np.arange(10, dtype=np.float32)[:, None]
    rows = limits.neighbours(features)
    np.testing.assert_array_equal(rows[5], [3, 4, 5, 6, 7, 1])
    np.testing.assert_array_equal(rows[0], [0, 0, 0, 1, 2, 1])


def test_the_command_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limits.main(["--model", str(tmp_path), "--corpus", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("limits: ") and said.count("\n") == 1


def test_closures_of_flite_want_flite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert limits.main(["--debian", str(tmp_path), "--flite", "awb"]) == 2
    assert capsys.readouterr().err == "limits: flite was not found: see --debian\n"


def test_other_voices_say_the_same_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []

    def spoken(_program: Path, text: str, voice: str, *_: object) -> Utterance:
        said.append((voice, text))
        return Utterance(np.zeros(16000, np.float32), 16000, (Phone(0.2, 0.3, "m", "PBM"),))

    monkeypatch.setattr("streamtalk_training.flite.say", spoken)
    unmade = Engines(flite=Path("flite"))
    slt, awb = (limits.flite_speeches(unmade, voice, 2) for voice in ("slt", "awb"))
    texts = {voice: [text for each, text in said if each == voice] for voice in ("slt", "awb")}
    assert texts["slt"] == texts["awb"] != []
    assert len(slt) == len(awb) == 2 and all(speech.phones for speech in slt)
    few, many = list[str](), list[str]()
    for told, hours in ((few, 0.01), (many, 0.03)):
        said.clear()
        limits.flite_speeches(unmade, "awb", hours=hours)
        told += [text for _, text in said]
    assert many[: len(few)] == few and len(many) > 2 * len(few) > 0


def vowel_pair(hertz: float, shape: int) -> Pair:
    """Ten seconds in which the model's `shape` and lips go up and down, and the labels' stand; a vowel of 1 s."""
    frames = 300
    wave = np.cos(2 * np.pi * hertz * np.arange(frames) / 30).astype(np.float32)

    def track(moves: np.ndarray) -> Track:
        weights, lips = np.zeros((frames, 52), np.float32), np.zeros((frames, 2, 3), np.float32)
        weights[:, shape], lips[..., 1] = moves, 1e-3 * moves[:, None]
        return Track(weights, lips[..., 0], lips, lips[..., 0], *(weights[:, 0],) * 3)

    phones = (Phone(4.0, 5.0, "AA", "AA"), Phone(6.0, 6.05, "AA", "AA"))
    speech = Speech("made up", np.zeros(160000, np.float32), phones, np.zeros((frames, 52), np.float32))
    return Pair(speech, 0, track(wave), track(0.1 * wave))


def test_the_shape_that_trembles_is_named() -> None:
    face = load_face(BUNDLED / "face.npz")
    shape = list(face.blendshape_names).index("mouthPucker")
    ours, labels = limits.trembling_shapes([vowel_pair(10, shape)], face, 30.0)
    assert np.argmax(ours) == shape and ours.sum() == ours[shape] > 0
    assert ours[shape] / labels[shape] == pytest.approx(100, rel=0.01)
    slow, _ = limits.trembling_shapes([vowel_pair(2, shape)], face, 30.0)
    assert slow[shape] < 0.01 * ours[shape]


def test_trembling_is_told_by_its_place_in_the_vowel() -> None:
    rows = limits.trembling_depths([vowel_pair(15, 0)], 30.0)  # up, down, up, down
    assert [steps for steps, _, _ in rows] == list(range(16))
    for _, ours, labels in rows:
        assert ours == pytest.approx(1e-3, rel=0.01)
        assert ours / labels == pytest.approx(10, rel=0.01)
