"""A guard that lets a slower runtime pass is none; a README that says other than was measured is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import gpu_page, guard, history, readme
from benchmarks.guard import LEAST_SPEEDUP, MOST_RUNTIME, Ratios

FINE = Ratios(2 * LEAST_SPEEDUP, 1.1, 2.0)


@pytest.mark.parametrize(
    ("ratios", "broken"),
    [
        (FINE, 0),
        (Ratios(0.9 * LEAST_SPEEDUP, 1.1, 2.0), 1),
        (Ratios(2 * LEAST_SPEEDUP, 1.1 * MOST_RUNTIME, 2.0), 1),
        (Ratios(np.nan, np.nan, np.nan), 2),
    ],
)
def test_each_bound_is_kept(ratios: Ratios, broken: int) -> None:
    assert len(ratios.broken()) == broken


def test_the_guard_fails_and_notes_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Ratios(1.0, 1.1, 40.0)
    file, picture = tmp_path / "history.jsonl", tmp_path / "history.png"
    for ratios, code in ((FINE, 0), (slow, 1)):
        monkeypatch.setattr(guard, "measure", lambda *_, found=ratios: found)
        assert guard.main(["--history", str(file)]) == code
    assert "slower: only 1.0 times" in capsys.readouterr().err
    assert [json.loads(line)["speedup"] for line in file.read_text().splitlines()] == [FINE.speedup, 1.0]
    assert history.main([str(picture), "--history", str(file)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_broken_history_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text("no record\n")
    assert history.main([str(tmp_path / "p.png"), "--history", str(file)]) == 2
    assert capsys.readouterr().err.startswith("history: ")


def test_an_engine_that_is_none_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.main(["--engine", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("guard: ")


def test_the_readme_says_what_was_measured() -> None:
    assert readme.main(["--check"]) == 0, "run python -m benchmarks.readme"


def test_pages_with_other_figures_are_found() -> None:
    document = json.loads(readme.RESULT.read_text())
    for row in document["rows"]:
        if row["stage"] == "total" and row["audio_s"] == 9.0:
            row["p99_ms"] += 1.0
    text = readme.README.read_text()
    assert readme.written(text, "latency", readme.section(document)) != text
    documents = [json.loads(path.read_text()) for path in readme.GPU_RESULTS]
    documents[1]["rows"][0]["p50_ms"] += 1.0
    text = readme.GPU_PAGE.read_text()
    assert readme.written(text, "measured", gpu_page.section(documents)) != text
    with pytest.raises(ValueError, match="latency"):
        readme.written("no markers", "latency", "")
