"""Per-frame latency of an exported model across audio lengths: `python -m benchmarks.latency`.

Streams each length as fast as it goes after a warm-up and prints a markdown table; `--json FILE` keeps the rows.
Latency is the whole frame with the audio encoder, without reading, rendering or writing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from streamtalk import StreamTalkError, Talker

WARM_UP_S = 2.0


@dataclass(frozen=True)
class Row:
    """One length of audio."""

    audio_s: float
    frames: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    first_frame_ms: float
    rtf: float


def measure(talker: Talker, audio_s: float) -> Row:
    """Stream `audio_s` seconds of noise in pushes of one frame's audio."""
    rng = np.random.default_rng(0)
    pcm = (0.05 * rng.standard_normal(round(audio_s * talker.sample_rate))).astype(np.float32)
    chunk = talker.sample_rate // talker.fps
    with talker.open() as stream:
        for _ in stream.push(pcm[: round(WARM_UP_S * talker.sample_rate)]):
            pass
        stream.reset()
        first_frame_ms = 0.0
        began = perf_counter()
        for start in range(0, len(pcm), chunk):
            for _ in stream.push(pcm[start : start + chunk]):
                first_frame_ms = first_frame_ms or stream.stats().latency_ms.max
        for _ in stream.flush():
            pass
        wall_s = perf_counter() - began
        stats = stream.stats()
    ms = stats.latency_ms
    return Row(audio_s, stats.frames, ms.p50, ms.p95, ms.p99, ms.max, first_frame_ms, wall_s / audio_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, default=Path("engines/bundled"))
    parser.add_argument("--seconds", type=float, nargs="+", default=[3, 9, 27, 60])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        talker = Talker.load(arguments.engine, threads=arguments.threads)
    except StreamTalkError as error:
        print(error, file=sys.stderr)
        return 2
    m = talker.manifest
    print(
        f"{m.name} on {talker.choice.backend.description}; hop {m.hop}, context {m.context_samples / 16000:g} s, "
        f"history {m.history}, decode window {m.decode_window}, {m.steps} steps\n"
    )
    print("| audio s | frames | p50 ms | p95 | p99 | max | first frame | real-time factor |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for seconds in arguments.seconds:
        row = measure(talker, seconds)
        rows.append(asdict(row))
        print(
            f"| {row.audio_s:g} | {row.frames} | {row.p50_ms:.2f} | {row.p95_ms:.2f} | {row.p99_ms:.2f} | "
            f"{row.max_ms:.2f} | {row.first_frame_ms:.2f} | {row.rtf:.3f} |"
        )
    if arguments.json:
        document = {"machine": platform.machine(), "python": platform.python_version(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
