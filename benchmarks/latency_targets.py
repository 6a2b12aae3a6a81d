"""Targets of a latency benchmark, read off its rows: every ratio comes from one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.latency_rows import CPU, ONE_THREAD, RELEASED, WHOLE_WINDOW, Row

CLIP_S = 9.0
"""The clip whose last frame the released streaming path is compared on: 269 at 30 fps."""
BOUNDED = "vocaset"
"""The preset whose ratios are held to a bound; others' are stated."""
SMALL_RATIO, DECODER_RATIO = 300.0, 2.0
BUNDLED_P99_MS, OVERHEAD_MS = 10.0, 0.2


@dataclass(frozen=True)
class Target:
    """A measured value and its bound, None where it has none; `at_least` gives the bound's direction."""

    name: str
    measured: float
    bound: float | None
    at_least: bool
    unit: str

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Target:
        """Read one from a result's JSON, which also says whether it was met."""
        return cls(**{name: value for name, value in fields.items() if name != "met"})

    @property
    def met(self) -> bool | None:
        """None where there is no bound."""
        if self.bound is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def line(self) -> str:
        bound, met = "", ""
        if self.bound is not None:
            bound = f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.unit}"
            met = "yes" if self.met else "**no**"
        return f"| {self.name} | {self.measured:.3g} {self.unit} | {bound} | {met} |"


def targets(rows: Sequence[Row], overhead_ms: dict[str, float]) -> list[Target]:
    """Every target whose rows are there; `overhead_ms` is the runtime's own median, by preset."""
    return [*_released(rows), *_bundled(rows, overhead_ms)]


def _released(rows: Sequence[Row]) -> Iterator[Target]:
    """Full size, against the released algorithm; the bundled model is too small for such ratios."""
    for preset in dict.fromkeys(row.preset for row in rows if row.preset != "bundled"):
        least, least_decoder = (SMALL_RATIO, DECODER_RATIO) if preset == BOUNDED else (None, None)
        wanted = (preset, CPU, "", 0.0)
        own = {r.stage: r.p50_ms for r in rows if (r.preset, r.system, r.variant, r.audio_s) == wanted}
        last = {
            r.stage: r.max_ms
            for r in rows
            if (r.preset, r.system, r.audio_s, r.extrapolated) == (preset, RELEASED, CLIP_S, False)
        }
        if last and own:
            released = last["condition_predictor"] + last["diffusion_head"]
            ratio = released / (own["condition_predictor"] + own["diffusion_head"])
            name = f"{preset}: predictor and head, {RELEASED} at the last frame of {CLIP_S:g} s against ours"
            yield Target(name, ratio, least, True, "times")
        for row in rows:
            if (row.preset, row.system, row.variant) == (preset, RELEASED, WHOLE_WINDOW) and own:
                name = f"{preset}: decoder, eager PyTorch on the whole decode window against ours"
                yield Target(name, row.p50_ms / own["vq_decoder"], least_decoder, True, "times")


def _bundled(rows: Sequence[Row], overhead_ms: dict[str, float]) -> Iterator[Target]:
    for row in rows:
        if (row.preset, row.variant, row.stage) == ("bundled", ONE_THREAD, "total"):
            yield Target("bundled: p99 of a frame on one thread", row.p99_ms, BUNDLED_P99_MS, False, "ms")
    for preset, measured in overhead_ms.items():
        yield Target(
            f"{preset}: the runtime's own time beside its backend's", measured, OVERHEAD_MS, False, "ms"
        )


def table(found: Sequence[Target]) -> str:
    """Targets as markdown."""
    return "\n".join(["| target | measured | bound | met |", "|---|---|---|---|", *(t.line for t in found)])
