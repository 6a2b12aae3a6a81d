"""What a latency benchmark says: rows, their summary, and the table."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt

SCHEMA = 1
STAGES = ("audio_encoder", "condition_predictor", "diffusion_head", "vq_decoder", "frame", "total")
PACKAGES = ("streamtalk", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Row:
    """One stage of one system on one length of audio; None where a column has no meaning."""

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
    frames: int | None = None,
    peak_rss_mb: float | None = None,
) -> Row:
    """A row of the `seconds` [n] that frames took, the first frame's first.

    With `fps` it is a whole frame: it has a real-time factor, and is late where it takes longer than a frame's
    time. `frames` is the length's own number where fewer were measured: late ones are then scaled up.
    """
    ms = 1e3 * np.asarray(seconds, np.float64)
    p50, p95, p99 = (round(float(v), 4) for v in np.percentile(ms, (50, 95, 99)))
    count = len(ms) if frames is None else frames
    whole: dict[str, float | int | None] = {}
    if fps is not None:
        late = float((ms > 1e3 / fps).mean())
        whole = {
            "first_frame_ms": round(float(ms[0]), 4),
            "rtf": round(float(ms.mean()) * fps / 1e3, 5),
            "late": round(late * count),
            "peak_rss_mb": peak_rss_mb,
        }
    columns = (preset, system, variant, audio_s, stage, extrapolated, count, p50, p95, p99)
    return Row(*columns, round(float(ms.max()), 4), **whole)  # type: ignore[arg-type]


def document(settings: dict[str, object], skipped: dict[str, str], rows: Sequence[Row]) -> dict[str, object]:
    """The whole result, ready for JSON."""
    return {
        "schema": SCHEMA,
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "skipped": skipped,
        "rows": [asdict(row) for row in rows],
    }


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
        "| preset | system | variant | audio s | stage | frames | p50 ms | p95 | p99 | max | first | rtf | late | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        star = "*" if r.extrapolated else ""
        cells = [r.preset, r.system, r.variant, f"{r.audio_s:g}", r.stage, f"{r.frames}{star}"]
        cells += [f"{v:.2f}" for v in (r.p50_ms, r.p95_ms, r.p99_ms, r.max_ms)]
        cells += ["" if v is None else f"{v:.3g}" for v in (r.first_frame_ms, r.rtf, r.late, r.peak_rss_mb)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
