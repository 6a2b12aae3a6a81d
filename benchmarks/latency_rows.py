"""Rows of a latency benchmark, their summary, and the table."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.backends import available
from streamtalk.backends import onnxruntime as cpu
from streamtalk.model import Manifest

SCHEMA = 1
PARTS = ("audio_encoder", "condition_predictor", "diffusion_head", "vq_decoder")
STAGES = (*PARTS, "hop", "total")
"""Parts of a frame; `hop` is one launch, from its audio to its vertices; `total` is the cost of a frame, a hop's share.
"""
CPU, RELEASED, OFFLINE = cpu.NAME, "released-streaming", "released-offline"
"""Systems; our other backends have their own names as well."""
GPU_SYSTEMS = tuple(name for name in available() if name != CPU)
ONE_THREAD, NO_CACHE, WHOLE_WINDOW = "threads-1", "no-cache", "whole-window"
"""Variants that other modules look for. A released decoder's `WHOLE_WINDOW` is one decode window of ours, not the clip.
"""
Document = dict[str, Any]
"""A result as JSON has it."""
BATCH = re.compile(r"batch-(\d+)")
PACKAGES = ("streamtalk", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Row:
    """One stage of one system on one length of audio; None where a column has no meaning. `delay_s` is the audio that
    a frame waits for.
    """

    preset: str
    system: str
    variant: str
    audio_s: float
    stage: str
    extrapolated: bool
    frames: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    first_frame_ms: float | None = None
    rtf: float | None = None
    late: int | None = None
    peak_rss_mb: float | None = None
    delay_s: float | None = None

    def lasting(self, frames: int, peak_rss_mb: float | None) -> Row:
        """The same for a length of `frames`, of which these were measured: late ones are scaled up."""
        late = None if self.late is None else round(self.late / self.frames * frames)
        return replace(self, frames=frames, late=late, peak_rss_mb=peak_rss_mb)


def summary(
    preset: str,
    system: str,
    variant: str,
    audio_s: float,
    stage: str,
    seconds: npt.ArrayLike,
    *,
    extrapolated: bool = False,
    fps: int | None = None,
) -> Row:
    """A row of the `seconds` [n] that frames took, the first frame's first.

    With `fps` these are whole frames: they have a real-time factor, and are late where they take longer than a frame's
    time.
    """
    ms = 1e3 * np.asarray(seconds, np.float64)
    p50, p95, p99 = (round(float(v), 4) for v in np.percentile(ms, (50, 95, 99)))
    whole: dict[str, float | int] = {}
    if fps is not None:
        whole = {
            "first_frame_ms": round(float(ms[0]), 4),
            "rtf": round(float(ms.mean()) * fps / 1e3, 5),
            "late": int((ms > 1e3 / fps).sum()),
        }
    columns = (preset, system, variant, audio_s, stage, extrapolated, len(ms), p50, p95, p99)
    return Row(*columns, round(float(ms.max()), 4), **whole)  # type: ignore[arg-type]


def hop_rows(
    preset: str,
    system: str,
    variant: str,
    audio_s: float,
    seconds: npt.NDArray[np.float64],
    m: Manifest,
    *,
    extrapolated: bool = False,
) -> tuple[Row, Row]:
    """Two rows of the `seconds` [n] that whole hops took: their latency, and the cost of a frame.

    A hop that takes longer than its frames last makes all of them late.
    """
    columns = (preset, system, variant, audio_s)
    hop = summary(*columns, "hop", seconds, extrapolated=extrapolated)
    frame = summary(*columns, "total", seconds / m.hop, extrapolated=extrapolated, fps=m.fps)
    first_ms = round(1e3 * float(seconds[0]), 4)  # nothing is there before the hop is
    delay_s = round(m.clock.delay_s, 4)
    return replace(hop, delay_s=delay_s), replace(frame, first_frame_ms=first_ms, delay_s=delay_s)


@dataclass(frozen=True)
class Histogram:
    """Number of hops of one system by their latency."""

    preset: str
    system: str
    audio_s: float
    edges_ms: list[float]
    counts: list[int]

    @classmethod
    def of(cls, preset: str, system: str, audio_s: float, seconds: npt.ArrayLike) -> Histogram:
        """Count the `seconds` [n] that hops took, in 50 bins from 0 to the slowest."""
        ms = 1e3 * np.asarray(seconds, np.float64)
        counts, edges = np.histogram(ms, 50, (0.0, float(ms.max())))
        return cls(preset, system, audio_s, np.round(edges, 4).tolist(), counts.tolist())


def batch_of(variant: str) -> int | None:
    """Rows of a launch of the default, or of `batch-N`; None for any other variant."""
    found = BATCH.fullmatch(variant)
    return int(found[1]) if found else None if variant else 1


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def hardware() -> dict[str, object]:
    """The machine that measured."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "memory_gb": round(pages / 1e9, 1),
    }


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak is inherited from the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def versions() -> dict[str, str]:
    """Python and the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[Row]) -> str:
    """Rows as markdown; `*` marks what was extrapolated."""
    lines = [
        "| preset | system | variant | audio s | stage | frames | p50 ms | p95 | p99 | max | first | rtf | late | MB "
        "| delay s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        star = "*" if r.extrapolated else ""
        cells = [r.preset, r.system, r.variant, f"{r.audio_s:g}", r.stage, f"{r.frames}{star}"]
        cells += [f"{v:.2f}" for v in (r.p50_ms, r.p95_ms, r.p99_ms, r.max_ms)]
        more = (r.first_frame_ms, r.rtf, r.late, r.peak_rss_mb, r.delay_s)
        cells += ["" if v is None else f"{v:.3g}" for v in more]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
