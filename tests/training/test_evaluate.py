"""What `evaluate` puts together: sources that may be missing, labels of alignments, figures ready for JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamtalk import Frame
from streamtalk_training import comparison, evaluate
from streamtalk_training.comparison import film
from streamtalk_training.evaluate import Extent, Sources, alignment_repeatability, worst_by_kind
from streamtalk_training.face import pose
from streamtalk_training.real_speech import Spoken
from streamtalk_training.scores import Speech
from streamtalk_training.streaming import Reader
from streamtalk_training.visemes import Phone
from tests.training.tiny_face import tiny_face, weights_of

FACE = tiny_face()
READER = Reader(FACE)


def spoken(late_s: float = 0.0) -> Spoken:
    phones = tuple(
        Phone(0.3 * n + late_s, 0.3 * n + 0.15 + late_s, "am"[n % 2], ("AA", "PBM")[n % 2])
        for n in range(1, 9)
    )
    return Spoken("made up", np.zeros(48000, np.float32), phones)


def test_missing_sources_are_said_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = evaluate.read_sources(tmp_path, tmp_path, 30.0, Extent())
    said = capsys.readouterr().err
    assert not sources.splits and not sources.known and not sources.twice
    for name in ("test", "awb", "real"):
        assert f"split {name} is left out" in said
    assert set(sources.sounds) >= {"silence", "music, made up"}


def test_no_speech_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no speech"):
        evaluate.measured(READER, None, Sources({}, {}, {}, (), ()), Extent())  # type: ignore[arg-type]


def test_alignments_that_agree_repeat_and_others_do_not() -> None:
    same = alignment_repeatability(READER, [(spoken(), spoken().phones)], 30.0)
    off = alignment_repeatability(READER, [(spoken(), spoken(late_s=0.1).phones)], 30.0)
    assert same["correlation_jaw"] == pytest.approx(1.0)
    assert isinstance(off["correlation_jaw"], float) and off["correlation_jaw"] < 0.7
    assert alignment_repeatability(READER, [], 30.0) == {"clips": 0}


def test_sounds_are_judged_by_their_worst() -> None:
    def figures(closed: float, motion: float) -> dict[str, float]:
        return {"closed": closed, "lip_motion": motion}

    worst = worst_by_kind(
        {
            "silence": figures(1, 0),
            "white noise -20 dB": figures(1, 0.2),
            "pink, corpus 3": figures(0.5, 0.1),
            "music, made up": figures(0.9, 0.3),
            "music, corpus 4": figures(0.8, 0.1),
        }
    )
    assert worst == {"silence": figures(1, 0), "noise": figures(0.5, 0.2), "music": figures(0.8, 0.3)}


def test_figures_are_rounded_and_stay_json() -> None:
    figures = {"a": 0.123456, "b": float("nan"), "c": [1.00001, 2], "d": {"e": "text", "f": True}}
    assert evaluate.rounded(figures) == {"a": 0.1235, "b": None, "c": [1.0, 2], "d": {"e": "text", "f": True}}
    json.dumps(evaluate.rounded(figures), allow_nan=False)


def test_a_partial_evaluation_replaces_no_published_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "report"

    def goes(absent: list[str], out: Path | None = None, quick: bool = False) -> Path:
        options = argparse.Namespace(model=model, report=elsewhere, out=out, quick=quick)
        return evaluate.destination(options, absent)

    assert goes([]) == model / "evaluation.json"
    assert goes([], quick=True) == elsewhere / "evaluation.json"
    assert capsys.readouterr().err == ""
    assert goes(["awb", "real"]) == elsewhere / "evaluation.json"
    assert "awb, real" in capsys.readouterr().err
    assert goes(["real"], out=model / "x" / ".." / "evaluation.json") == elsewhere / "evaluation.json"
    assert goes(["real"], out=tmp_path / "mine.json") == tmp_path / "mine.json"


def test_a_model_that_is_not_there_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--model", str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert "face.npz" in capsys.readouterr().err


def test_the_film_has_both_faces_and_the_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    weights = weights_of(jawOpen=np.linspace(0, 1, 15))

    class FakeTalker:
        fps = 30

    def frames(*_: object, **__: object) -> Iterator[Frame]:
        for index, row in enumerate(weights):
            yield Frame(index, index / 30, pose(FACE, row, 0), lambda _, row=row: row)

    monkeypatch.setattr(comparison, "SIDE_PX", 64)
    monkeypatch.setattr(comparison, "frames_of", frames)
    speech = Speech("", np.zeros(8100, np.float32), (), weights)  # a little more than 15 frames
    film(FACE, FakeTalker(), {"awb": speech}, 1.0, tmp_path / "x.mp4")  # type: ignore[arg-type]
    with av.open(str(tmp_path / "x.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.width, video.height) == (128, 64)
        assert sum(1 for _ in container.decode(video)) == 15
        assert audio.rate == 16000
