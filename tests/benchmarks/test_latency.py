"""Rows say what was measured and what was not; nothing is timed where the vertices differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from benchmarks import latency, latency_plot, latency_runs, latency_subject
from benchmarks.latency_rows import CPU, STAGES, Histogram, hop_rows, summary, table
from benchmarks.latency_targets import targets

from streamtalk import Talker
from tests.runtime.toy import Toy

TOY = Toy()
THEIRS = {"condition_predictor": 0.01, "diffusion_head": 0.02, "vq_decoder": 0.03}
KEYS = {
    *(
        "preset",
        "system",
        "variant",
        "audio_s",
        "stage",
        "extrapolated",
        "frames",
        "p50_ms",
        "p95_ms",
        "p99_ms",
    ),
    *("max_ms", "first_frame_ms", "rtf", "late", "peak_rss_mb", "delay_s"),
}


def test_a_row_counts_late_frames_and_scales_them() -> None:
    seconds = np.full(100, 0.002)
    seconds[:2] = 0.05  # beyond a frame's time of 1/30 s
    row = summary("p", "s", "", 10.0, "total", seconds, fps=30, extrapolated=True).lasting(300, 95.5)
    assert (row.late, row.frames, row.extrapolated, row.peak_rss_mb) == (6, 300, True, 95.5)
    assert (row.first_frame_ms, row.p50_ms, row.max_ms) == (50.0, 2.0, 50.0)
    assert row.rtf == pytest.approx((2 * 0.05 + 98 * 0.002) / 100 * 30, rel=1e-4)


def test_the_document_has_the_schema() -> None:
    row = summary("p", "s", "", 1.0, STAGES[0], [0.001])
    made = json.loads(json.dumps(latency.Result([row]).document()))
    asked = {"schema", "hardware", "versions", "rows"}
    assert set(made) == asked | {"settings", "skipped", "histograms", "targets"}
    assert set(made["rows"][0]) == KEYS
    assert made["rows"][0]["rtf"] is None  # of one stage it would mean nothing
    assert "1.00" in table([row])


def result_of(preset: str, p50_s: float) -> latency.Result:
    row = summary(preset, CPU, "", 1.0, "total", [p50_s])
    return latency.Result([row], overhead_ms={preset: 0.1}, settings={preset: {"hop": 1}})


def test_presets_can_be_measured_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(result_of("vocaset", 0.5).document()))
    both = latency.added(latency.result_to_add_to(path), result_of("bundled", 0.001).document())
    path.write_text(json.dumps(both))
    newer = latency.added(latency.result_to_add_to(path), result_of("vocaset", 0.25).document())
    assert [(row["preset"], row["p50_ms"]) for row in newer["rows"]] == [("bundled", 1), ("vocaset", 250)]
    assert list(newer["settings"]) == ["bundled", "vocaset"]
    assert [target["name"].partition(":")[0] for target in newer["targets"]] == ["bundled", "vocaset"]


@pytest.mark.parametrize("key", ["schema", "hardware", "versions"])
def test_another_machine_s_figures_are_not_added_to(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({**result_of("vocaset", 0.5).document(), key: {"cpu": "another"}}))
    assert latency.main(["--presets", "bundled", "--json", str(path), "--add"]) == 2
    assert f"has another {key}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_what_is_no_result_is_not_added_to(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latency.json"
    if content is not None:
        path.write_text(content)
    assert latency.main(["--presets", "bundled", "--json", str(path), "--add"]) == 2
    assert str(path) in capsys.readouterr().err


def test_targets_are_read_off_the_rows() -> None:
    """300 times is 3 s against 10 ms; a decoder of 18 ms against 10 is not twice as fast."""
    own = [
        summary("vocaset", CPU, "", 0.0, stage, [seconds])
        for stage, seconds in (
            ("condition_predictor", 0.008),
            ("diffusion_head", 0.002),
            ("vq_decoder", 0.010),
        )
    ]
    theirs = [
        summary("vocaset", "released-streaming", "", 9.0, stage, [0.1, 1.5])
        for stage in ("condition_predictor", "diffusion_head")
    ]
    window = summary("vocaset", "released-streaming", "whole-window", 0.0, "vq_decoder", [0.018])
    one_thread = summary("bundled", CPU, "threads-1", 9.0, "total", np.full(100, 0.011), fps=30)
    found = targets([*own, *theirs, window, one_thread], {"bundled": 0.19})
    assert [round(target.measured, 4) for target in found] == [300.0, 1.8, 11.0, 0.19]
    assert [target.met for target in found] == [True, False, False, True]
    assert "**no**" in found[1].line

    biwi = targets([replace(row, preset="biwi") for row in (*own, *theirs, window)], {})
    assert [(round(target.measured, 4), target.met) for target in biwi] == [(300.0, None), (1.8, None)]
    assert "no" not in biwi[1].line


class Slow:
    """A backend whose launches take `seconds(hop)` beside their work."""

    def __init__(self, backend: Any, seconds: Callable[[int], float]) -> None:
        self.backend = backend
        self.seconds = seconds

    def rows(self, *given: Any) -> Any:
        rows = self.backend.rows(*given)
        launch = rows.launch

        def slow(active: Any) -> None:
            sleep(self.seconds(rows.frames[0] // TOY.hop))
            launch(active)

        rows.launch = slow
        return rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


def slowed(talker: Talker, seconds: Callable[[int], float]) -> Talker:
    return replace(talker, choice=replace(talker.choice, backend=Slow(talker.choice.backend, seconds)))


def test_the_runtime_s_own_time_excludes_its_backend(talker: Talker) -> None:
    slow = slowed(talker, lambda _: 0.003)
    assert np.median(latency_runs.hop_times(slow, 40)) > 0.003
    assert np.median(latency_runs.overhead(slow, 40)) < 0.002


def test_every_hop_is_compared_with_its_own_time_in_the_backend(talker: Talker) -> None:
    own = latency_runs.overhead(slowed(talker, lambda hop: 0.002 * hop), 13)
    assert len(own) == 7  # which is rounded up to whole hops
    assert own.min() > 0  # a neighbour's time is off by 2 ms


def test_a_hop_has_a_latency_and_each_frame_its_share(talker: Talker) -> None:
    m = talker.manifest
    seconds = np.array([0.08, 0.01, 0.05, 0.02])
    hop, frame = hop_rows("p", CPU, "", 9.0, seconds, m)
    assert (hop.stage, hop.max_ms, hop.rtf) == ("hop", 80.0, None)
    assert (frame.stage, frame.max_ms, frame.first_frame_ms) == ("total", 40.0, 80.0)
    assert frame.rtf == pytest.approx(seconds.mean() / (m.hop / m.fps), rel=1e-4)
    assert frame.lasting(8, None).late == 2  # both of the hop that took longer than its 67 ms
    assert hop.delay_s == frame.delay_s == pytest.approx(talker.delay_s, abs=1e-4)


def test_pictures_are_drawn_from_the_document(tmp_path: Path) -> None:
    rows = [summary("bundled", CPU, "", audio_s, "total", [0.002] * 9, fps=30) for audio_s in (3.0, 9.0)]
    rows += [summary("bundled", CPU, "", 0.0, stage, [0.001]) for stage in STAGES]
    rows += latency.released_rows("bundled", 9.0, 270, 30, {0: [THEIRS], 269: [THEIRS]}, 0.01)
    histogram = Histogram.of("bundled", CPU, 9.0, [0.001, 0.002, 0.002])
    assert sum(histogram.counts) == 3
    result = latency.Result(rows, [histogram], settings={"bundled": {"fps": 30}})
    written, picture = tmp_path / "result.json", tmp_path / "picture.png"
    written.write_text(json.dumps(result.document()))
    assert latency_plot.main([str(written), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_lies_beyond_the_timed_frames_is_marked_and_grows() -> None:
    def took(i: int) -> dict[str, float]:
        return dict.fromkeys(("condition_predictor", "diffusion_head", "vq_decoder"), 0.01 + 1e-4 * i)

    theirs = {i: [took(i)] for i in (0, 60, 120)}
    within = latency.released_rows("p", 4.0, 120, 30, theirs, 0.0)
    beyond = latency.released_rows("p", 20.0, 600, 30, theirs, 0.0)
    assert not any(row.extrapolated for row in within)
    assert all(row.extrapolated for row in beyond)
    assert beyond[-1].max_ms == pytest.approx(3 * 1e3 * took(599)["vq_decoder"], rel=1e-3)


def test_nothing_is_timed_where_the_vertices_differ(
    bundled: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_weights(*given: object) -> latency_subject.Subject:
        found = latency_subject.subject(*given)  # type: ignore[arg-type]
        found.model.diff_ar_network.vq_latent_map.weight.data.mul_(1.5)
        return replace(found)

    monkeypatch.setattr(latency, "subject", other_weights)
    assert latency.main(["--quick", "--engine", str(bundled)]) == 1
    printed = capsys.readouterr()
    assert "nothing was timed" in printed.err
    assert printed.out == ""
