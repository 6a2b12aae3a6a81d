"""Targets judge both ways, and the card says what the JSON says."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path

import pytest

from streamtalk_training import evaluate, report
from streamtalk_training.targets import Target, Verdict, lacking, targets, verdicts
from streamtalk_training.visemes import tables

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target("", (), least=0.9), 0.9, True),
        (Target("", (), least=0.9), 0.899, False),
        (Target("", (), most=0.04), 0.04, True),
        (Target("", (), most=0.04), 0.041, False),
        (Target("", (), 15, 20), 17, True),
        (Target("", (), 15, 20), 0, False),
        (Target("", (), 15, 20), 21, False),
        (Target("", (), least=0.9), float("nan"), False),
        (Target("", (), most=0.3), float("nan"), False),
    ],
)
def test_targets_judge_both_ways(target: Target, value: float, met: bool) -> None:
    assert Verdict(target, value).met is met


def test_a_target_says_what_it_wants() -> None:
    wanted = [t.wanted for t in (Target("", (), least=0.9), Target("", (), most=3), Target("", (), 15, 20))]
    assert wanted == ["≥ 0.9", "≤ 3", "15 to 20"]


def evaluation(recall: float = 0.95) -> dict[str, object]:
    figures = dict.fromkeys(("closure_recall", "false_closures", "fv_roll"), 0.5)
    figures |= {f"correlation_{name}": 0.5 for name in tables().controls}
    split = {
        "clips": 3,
        "minutes": 1.0,
        "model": figures | {"closure_recall": recall, "lag_frames": 0.0},
        "labels": figures,
        "control": figures,
        "pauses": {"gap_p95_mm": 0.1, "gap_max_mm": 0.2, "lip_speed_mm_s": 0.3},
        "aperture_mm": {"AA": 7.0, "PBM": 0.5},
    }
    made: dict[str, object] = {
        "splits": {"awb": split},
        "sounds": {"silence": {"gap_p95_mm": 0.1, "closed": 1.0, "lip_motion": 0.0, "face_motion": 0.0}},
        "recordings": {"prompts": 7, "left_out": {"short": 2}},
        "alignment_ceiling": {"clips": 3, "left_out": 0, **figures},
        "alignment_repeatability": {"clips": 0},
        "loop": {"by_pass": {"gap_mean": [1.0, 2.0, 2.0]}},
    }
    made["targets"] = evaluate.rounded(evaluate.judged(made))
    return made


def test_what_was_not_measured_is_a_target_missed() -> None:
    found = {v.target.name: v for v in verdicts(evaluation())}
    assert found["awb: closure recall"].met
    assert not found["awb: false closures"].met
    assert len(found) == len(list(targets()))
    for name in ("real: closure recall", "blinks a minute", "loop: exploded"):
        assert isnan(found[name].value) and not found[name].met
    assert not {v.target.name: v for v in verdicts(evaluation(0.5))}["awb: closure recall"].met


def test_what_was_never_heard_is_named() -> None:
    assert lacking(evaluation()) == ["real", "silence", "noise", "music", "hum"]
    whole = {
        "splits": {"awb": {}, "real": {}},
        "sounds_worst": dict.fromkeys(("silence", "noise", "music", "hum")),
    }
    assert lacking(whole) == []


def test_the_card_counts_what_was_not_measured() -> None:
    made = evaluation()
    figures = report.card_figures(made)
    judged = made["targets"]
    assert isinstance(judged, list)
    met = [t for t in judged if t["met"]]
    asked = [t for t in judged if not t["own"]]
    assert 0 < len(asked) < len(judged) == len(list(targets()))
    counts = f"{len(met)} of {len(judged)} targets are met; without the project's own bounds (†), "
    assert figures.startswith(counts + f"{sum(t['met'] for t in asked)} of {len(asked)}.")
    assert "| real: closure recall | not measured | ≥ 0.88 | **no** |" in figures
    assert "| blinks a minute † | not measured | 15 to 20 | **no** |" in figures


def test_the_card_knows_own_bounds_that_the_json_does_not_mark() -> None:
    marked, unmarked = evaluation(), evaluation()
    judged = unmarked["targets"]
    assert isinstance(judged, list)
    for target in judged:
        del target["own"]
    assert report.card_figures(unmarked) == report.card_figures(marked)


def test_pauses_that_were_not_there_are_no_figure() -> None:
    made = evaluation()
    assert isinstance(made["splits"], dict)
    made["splits"]["awb"]["pauses"] = {"gap_p95_mm": None, "gap_max_mm": None, "lip_speed_mm_s": None}
    assert "the lips stand (not measured) apart" in report.card_figures(made)


def test_the_card_changes_between_its_markers_alone() -> None:
    card = f"# Title\n{report.BEGIN}\nold\n{report.END}\nend\n"
    once = report.with_figures(card, evaluation())
    assert once.startswith(f"# Title\n{report.BEGIN}\n") and once.endswith(f"{report.END}\nend\n")
    assert "old" not in once
    assert "| awb: closure recall | 0.95 | ≥ 0.92 | yes |" in once
    assert "| awb: false closures | 0.5 | ≤ 0.04 | **no** |" in once
    assert report.with_figures(once, evaluation()) == once
    assert report.with_figures(once, evaluation(0.5)) != once


@pytest.mark.parametrize("card", ["no markers", report.BEGIN, report.END])
def test_a_card_without_markers_is_refused(card: str) -> None:
    with pytest.raises(report.CardError, match="figures"):
        report.with_figures(card, evaluation())


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    report.plot(evaluation(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_what_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(verdicts(evaluation()))
    lines = capsys.readouterr().out.splitlines()
    assert any("awb: closure recall" in line and "yes" in line for line in lines)
    assert any("awb: false closures" in line and " no" in line for line in lines)
    assert any("blinks a minute †" in line and "not measured" in line and " no" in line for line in lines)


def test_the_bundled_card_agrees_with_its_json() -> None:
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    figures = json.loads((BUNDLED / "evaluation.json").read_text(encoding="utf-8"))
    assert report.with_figures(card, figures) == card
