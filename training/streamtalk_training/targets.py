"""What the bundled talker is meant to reach, and whether it does: every target, those missed too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isnan

FRAME = 1.0  # of lag
CONTROL_MOST = 0.15


@dataclass(frozen=True)
class Target:
    """`name` for people; `path` to the figure in an evaluation; it must lie within `least` and `most`.

    `own`: a bound that the project chose itself, beyond those it was asked to meet.
    """

    name: str
    path: tuple[str, ...]
    least: float | None = None
    most: float | None = None
    own: bool = False

    @property
    def wanted(self) -> str:
        """As people write it: "≥ 0.92", "≤ 0.04", "15 to 20"."""
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: nan where nothing was."""

    target: Target
    value: float

    @property
    def met(self) -> bool:
        """False for nan: what cannot be measured was not reached."""
        low, high = self.target.least, self.target.most
        if isnan(self.value):
            return False
        return (low is None or self.value >= low) and (high is None or self.value <= high)


def verdicts(evaluation: Mapping[str, object]) -> list[Verdict]:
    """Every target, also those whose figure `evaluation` does not hold: leaving them out would flatter."""
    found = []
    for target in targets():
        value: object = evaluation
        for name in target.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        found.append(Verdict(target, float(value) if isinstance(value, (int, float)) else float("nan")))
    return found


def lacking(evaluation: Mapping[str, object]) -> list[str]:
    """The splits and kinds of sound that targets ask for and `evaluation` never heard."""
    absent: dict[str, None] = {}
    for group, name, *_ in (target.path for target in targets()):
        held = evaluation.get(group)
        if group in {"splits", "sounds_worst"} and not (isinstance(held, Mapping) and name in held):
            absent[name] = None
    return list(absent)


def targets() -> Iterator[Target]:
    """All targets, by split and then those of the stress tests."""
    correlations = {
        "awb": {"jaw": 0.82, "close": 0.82, "spread": 0.78, "round": 0.65, "funnel": 0.65},
        "real": {"jaw": 0.72, "close": 0.68, "spread": 0.68, "round": 0.45, "funnel": 0.45},
    }
    shares = {"awb": (0.92, 0.04, 0.85), "real": (0.88, 0.08, 0.70)}
    for split, (recall, false, roll) in shares.items():
        model = ("splits", split, "model")
        yield Target(f"{split}: closure recall", (*model, "closure_recall"), least=recall)
        yield Target(f"{split}: false closures", (*model, "false_closures"), most=false)
        for control, least in correlations[split].items():
            yield Target(f"{split}: correlation, {control}", (*model, f"correlation_{control}"), least=least)
        yield Target(f"{split}: f/v roll rate", (*model, "fv_roll"), least=roll)
        yield Target(f"{split}: lag in frames", (*model, "lag_frames"), -FRAME, FRAME)
        yield Target(
            f"{split}: largest correlation of the control",
            ("splits", split, "control_largest"),
            most=CONTROL_MOST,
        )
        yield Target(f"{split}: jitter against the labels'", (*model, "jitter"), most=1.5)
        yield Target(
            f"{split}: apertures in order", ("splits", split, "aperture_in_order"), least=1, own=True
        )
    for kind in ("silence", "noise", "music", "hum"):
        worst, unasked = ("sounds_worst", kind), kind == "hum"
        yield Target(f"{kind}: frames with a closed mouth", (*worst, "closed"), least=0.99, own=unasked)
        yield Target(f"{kind}: lip motion against speech's", (*worst, "lip_motion"), most=0.03, own=unasked)
        yield Target(f"{kind}: face motion against speech's", (*worst, "face_motion"), most=0.03, own=unasked)
    yield Target("loop: largest change of lip statistics", ("loop", "largest_change"), most=0.05)
    yield Target("loop: frozen lip vertices", ("loop", "frozen"), most=0)
    yield Target("loop: exploded", ("loop", "exploded"), most=0)
    yield Target("blinks a minute", ("seeds", "blinks_per_minute"), 15, 20, own=True)
    yield Target("two seeds: blinks shared", ("seeds", "blinks_shared"), most=0.3, own=True)
    yield Target("two seeds: correlation of brows", ("seeds", "brows_correlation"), most=0.3, own=True)
    yield Target("two seeds: frames whose closure agrees", ("seeds", "closures_agree"), least=0.97, own=True)
    yield Target("two seeds: correlation of lips", ("seeds", "lips_correlation"), least=0.95, own=True)
