"""Rows say what was measured and what was not; nothing is timed where the vertices differ."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from benchmarks import latency, latency_subject
from benchmarks.latency_rows import STAGES, document, summary, table

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
    *("max_ms", "first_frame_ms", "rtf", "late", "peak_rss_mb"),
}


def test_a_row_counts_late_frames_and_scales_them() -> None:
    seconds = np.full(100, 0.002)
    seconds[:2] = 0.05  # beyond a frame's time of 1/30 s
    row = summary("p", "s", "", 10.0, "total", seconds, fps=30, frames=300, extrapolated=True)
    assert (row.late, row.frames, row.extrapolated) == (6, 300, True)
    assert (row.first_frame_ms, row.p50_ms, row.max_ms) == (50.0, 2.0, 50.0)
    assert row.rtf == pytest.approx((2 * 0.05 + 98 * 0.002) / 100 * 30, rel=1e-4)


def test_the_document_has_the_schema() -> None:
    row = summary("p", "s", "", 1.0, STAGES[0], [0.001])
    made = json.loads(json.dumps(document({}, {}, [row])))
    assert set(made) == {"schema", "hardware", "versions", "settings", "skipped", "rows"}
    assert set(made["rows"][0]) == KEYS
    assert made["rows"][0]["rtf"] is None  # of one stage it would mean nothing
    assert "1.00" in table([row])


def test_what_lies_beyond_the_timed_frames_is_marked_and_grows() -> None:
    def took(i: int) -> dict[str, float]:
        return dict.fromkeys(("condition_predictor", "diffusion_head", "vq_decoder"), 0.01 + 1e-4 * i)

    theirs = {i: [took(i)] for i in (0, 60, 120)}
    within = latency.released_rows("p", 4.0, 120, 30, theirs, 0.0)
    beyond = latency.released_rows("p", 20.0, 600, 30, theirs, 0.0)
    assert not any(row.extrapolated for row in within)
    assert all(row.extrapolated for row in beyond)
    assert beyond[-1].max_ms == pytest.approx(3 * 1e3 * took(599)["vq_decoder"], rel=1e-3)


def test_a_hop_s_encoder_is_spread_over_its_frames() -> None:
    seconds = np.array([0.5, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(latency.amortised(seconds, 4), [0.2] * 4 + [0.3] * 4)


def test_nothing_is_timed_where_the_vertices_differ(
    bundled: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_weights(*given: object) -> latency_subject.Subject:
        found = latency_subject.subject(*given)  # type: ignore[arg-type]
        found.model.diff_ar_network.vq_latent_map.weight.data.mul_(1.5)
        return dataclasses.replace(found)

    monkeypatch.setattr(latency, "subject", other_weights)
    assert latency.main(["--quick", "--engine", str(bundled)]) == 1
    said = capsys.readouterr()
    assert "nothing was timed" in said.err
    assert said.out == ""
