"""What both training stages share: a resumable state on disk, a log, a schedule.

Every random choice of step s comes from generators seeded with (seed, s), so a resumed run equals an
uninterrupted one and nothing but weights, optimiser and step needs saving.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass
class Run:
    """A stage's folder: `state.pt` (weights, optimiser, step, plan) and `log.jsonl` (a line a report).

    `plan` is what the stage trains by, field by field: a run goes on under the plan that it began with.
    """

    folder: Path
    model: nn.Module
    optimiser: Optimizer
    plan: Mapping[str, Any] | None = None
    step: int = 0
    elapsed_s: float = 0.0
    started_s: float = field(default_factory=time.monotonic)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.elapsed_s, self.started_s = self.spent_s(), time.monotonic()
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        if self.plan is not None:
            state["plan"] = dict(self.plan)
        whole = self.folder / "state.pt"
        partial = whole.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(whole)

    def resume(self) -> bool:
        """Take up what `save` left, if anything; what was logged after that is logged again.

        Raises ValueError where it was left under another plan.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            self._forget_later_rows()
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        if self.plan is not None and "plan" in state:
            _refuse_another_plan(path, state["plan"], self.plan)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self._forget_later_rows()
        return True

    def _forget_later_rows(self) -> None:
        """Drop what was logged past `step`, or half written as the process ended."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return

        def kept(line: str) -> bool:
            try:
                return bool(json.loads(line)["step"] <= self.step)
            except ValueError:
                return False

        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(filter(kept, lines)), encoding="utf-8")
        partial.replace(path)

    def spent_s(self) -> float:
        return self.elapsed_s + time.monotonic() - self.started_s

    def log(self, **values: float) -> None:
        """Append one JSON line and print it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row: dict[str, Any] = {"step": self.step, "elapsed_s": round(self.spent_s(), 1)}
        row.update({name: float(f"{value:.5g}") for name, value in values.items()})
        line = json.dumps(row)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products(device: torch.device, bfloat16: bool) -> torch.autocast:
    """Matrix products within are in bfloat16 if so asked: several times faster on processors that have it.

    Losses belong outside.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def start(
    folder: Path,
    model: nn.Module,
    learning_rate: float,
    groups: Sequence[dict[str, Any]] | None = None,
    plan: DataclassInstance | None = None,
) -> Run:
    """A run in `folder`, resumed where it holds one; the model moves to `device()`.

    `groups` are AdamW's parameter groups (default: everything), whose `scale` multiplies their rate. `plan` is
    kept with the state: raises ValueError where `folder` holds a run under another one.
    """
    torch.set_flush_denormal(True)  # codes that die out leave gradients so small that processors crawl
    model.to(device())
    trained = model.parameters() if groups is None else groups
    run = Run(folder, model, AdamW(trained, learning_rate, (0.9, 0.98), weight_decay=0.01))
    run.plan = None if plan is None else asdict(plan)
    run.resume()
    return run


def _refuse_another_plan(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = [n for n in sorted({*kept, *wanted}) if kept.get(n, "unset") != wanted.get(n, "unset")]
    if names:
        differing = ", ".join(
            f"{n} was {kept.get(n, 'unset')} and is now {wanted.get(n, 'unset')}" for n in names
        )
        raise ValueError(
            f"{path} was trained under another plan ({differing}): give the options that it began with, "
            "or another folder"
        )


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the command with one sentence on stderr and exit code 2 where what it needs is missing or does not
    serve."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        # KeyError prints the repr of its argument.
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2) from error


def update(run: Run, loss: Tensor, learning_rate: float, clip: float = 1.0) -> None:
    """One optimiser step on `loss` at `learning_rate`, with the gradient's norm clipped."""
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    run.optimiser.step()
    run.step += 1


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 100, hold: float = 0.6) -> float:
    """Linear warm-up, the peak until the share `hold` of the run, then a cosine to 2 % of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step / steps - hold) / (1 - hold)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))))


def generators(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """The randomness of one step."""
    return np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 1_000_003 + step)
