"""A guard against slower code: `python -m benchmarks.guard` times ours and the released path in turns and compares the
ratios with bounds; it exits with 1 where one is broken. `--history` appends the result to a file that
`python -m benchmarks.history` plots.

It takes ratios because no two machines are equally fast or equally busy. The bounds are wide for the same reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.latency import encoder
from benchmarks.latency_rows import CPU, hardware
from benchmarks.latency_runs import hop_times, stage_runs
from benchmarks.latency_subject import CACHE, FAILURES, ROOT, baseline, check_parity, complain, subject
from streamtalk import Talker
from streamtalk.backends import Options

HISTORY = Path(__file__).parent / "results" / "history.jsonl"
FRAME = 120
"""The released streaming path's frame that is timed: its 5th second."""
ROUNDS, REPEATS = 9, 10
LEAST_SPEEDUP = 4.0  # about half of what 2 cores give
MOST_RUNTIME = 1.8  # 1.3 there


@dataclass(frozen=True)
class Ratios:
    """`speedup`: a frame of the released streaming path over ours, audio encoders included. `runtime`: a hop of a
    stream over a run of the hop graph. `frame_ms`: a frame's share of that run.
    """

    speedup: float
    runtime: float
    frame_ms: float

    def broken(self) -> list[str]:
        """Sentences about the bounds that do not hold."""
        found = []
        if not self.speedup >= LEAST_SPEEDUP:
            found.append(
                f"only {self.speedup:.1f} times faster than the released path; at least {LEAST_SPEEDUP:g}"
            )
        if not self.runtime <= MOST_RUNTIME:
            found.append(f"a stream's hop takes {self.runtime:.2f} times its graph; at most {MOST_RUNTIME:g}")
        return found


def measure(cache: Path, engine: Path | None) -> Ratios:
    """Time the bundled model. Raises ParityError, ExportError and StreamTalkError."""
    threads = Options().cpu_threads()
    torch.set_num_threads(threads)
    given = subject("bundled", cache, engine)
    base = baseline(given, FRAME + 1)
    check_parity(given, base)
    run = stage_runs(given.folder, given.manifest, threads)["hop"]
    talker, hop = Talker.load(given.folder, CPU), given.manifest.hop
    run()
    base.streaming_frame(FRAME)
    speedups, shares, frames = [], [], []
    for _ in range(ROUNDS):
        theirs = sum(base.streaming_frame(FRAME)[1].values()) + encoder(given, FRAME + 1)
        ours = median(run() for _ in range(REPEATS))
        speedups.append(theirs * hop / ours)
        shares.append(float(np.median(hop_times(talker, REPEATS * hop))) / ours)
        frames.append(ours / hop)
    return Ratios(round(median(speedups), 2), round(median(shares), 3), round(1e3 * median(frames), 4))


def record(ratios: Ratios) -> dict[str, object]:
    """One line of the history."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": hardware()["cpu"],
        **vars(ratios),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compare and note; returns the exit code: 1 where it became slower, 2 where it cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument(
        "--engine", type=Path, help="an export of the bundled model (default: exported to --cache)"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument(
        "--history", type=Path, nargs="?", const=HISTORY, metavar="FILE", help=f"default {HISTORY.name}"
    )
    options = parser.parse_args(arguments)
    try:
        ratios = measure(options.cache.expanduser(), options.engine)
        if options.history:
            with options.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record(ratios)) + "\n")
    except FAILURES as error:
        return complain("guard", error)
    print(
        f"a frame: {ratios.frame_ms:.2f} ms, {ratios.speedup:.1f} times faster than the released path (at least "
        f"{LEAST_SPEEDUP:g}); a stream's hop takes {ratios.runtime:.2f} times its graph (at most {MOST_RUNTIME:g})"
    )
    for sentence in ratios.broken():
        print(f"slower: {sentence}", file=sys.stderr)
    return int(bool(ratios.broken()))


if __name__ == "__main__":
    sys.exit(main())
