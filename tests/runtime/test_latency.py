"""The histogram against exact percentiles."""

from __future__ import annotations

import numpy as np
import pytest

from streamtalk.latency import Latency, LatencyHistogram

BIN_ERROR = 0.006  # half a bin of 1 %


@pytest.mark.parametrize("scale_ms", [0.02, 3.0, 400.0])
def test_percentiles_are_within_half_a_bin(scale_ms: float) -> None:
    values = np.random.default_rng(0).lognormal(np.log(scale_ms), 0.5, 20_000)
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(float(value))
    summary = histogram.summary()
    for q, got in ((50, summary.p50), (95, summary.p95), (99, summary.p99)):
        assert got == pytest.approx(np.percentile(values, q, method="inverted_cdf"), rel=BIN_ERROR)
    assert summary.max == values.max()
    assert summary.mean == pytest.approx(values.mean())
    assert histogram.total_ms == pytest.approx(values.sum())


def test_extremes_and_nothing() -> None:
    histogram = LatencyHistogram()
    assert histogram.summary() == Latency(0, 0, 0, 0, 0)
    for value in (0.0, 1e-9, 1e12):
        histogram.add(value)
    assert histogram.summary().max == 1e12
    histogram.clear()
    assert histogram.n == 0
    assert histogram.summary() == Latency(0, 0, 0, 0, 0)


def test_one_value_is_its_own_percentile() -> None:
    histogram = LatencyHistogram()
    histogram.add(5.0)
    assert histogram.summary().p99 <= 5.0
    assert histogram.summary().p50 == pytest.approx(5.0, rel=BIN_ERROR)
