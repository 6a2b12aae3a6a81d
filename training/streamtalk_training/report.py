"""Figures for people: the table on the terminal, the plot, and the figures of the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from streamtalk_training.targets import CONTROL_MOST, Verdict, targets
from streamtalk_training.visemes import tables

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
SPLIT_TITLES = {"test": "espeak-ng, held out", "awb": "flite awb, unseen voice", "real": "recorded speech"}
OWN = "†"  # marks a target that nobody but the project asked for
NOT_MEASURED = "not measured"
Evaluation = Mapping[str, Any]


class CardError(ValueError):
    """The model card has no place for figures."""


def print_table(verdicts: Iterable[Verdict]) -> None:
    """One table of all targets on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "measure", "measured", "target", "met", title="Evaluation", caption=f"{OWN} project's own bound"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for verdict in verdicts:
        met = "[green]yes" if verdict.met else "[red]no"
        value = NOT_MEASURED if isnan(verdict.value) else f"{verdict.value:.3g}"
        table.add_row(_marked(verdict.target.name, verdict.target.own), value, verdict.target.wanted, met)
    Console(width=100).print(table)


def card_figures(evaluation: Evaluation) -> str:
    """The Markdown of an evaluation as `evaluate` wrote it: targets first, then all splits."""
    judged = evaluation["targets"]
    own_names = {target.name for target in targets() if target.own}
    own = [t.get("own", t["name"] in own_names) for t in judged]
    asked = [t["met"] for t, ours in zip(judged, own, strict=True) if not ours]
    lines = [
        f"{sum(t['met'] for t in judged)} of {len(judged)} targets are met; "
        f"without the project's own bounds ({OWN}), {sum(asked)} of {len(asked)}.",
        "",
        *_table(
            ("measure", "measured", "target", "met"),
            (
                (
                    _marked(t["name"], ours),
                    _number(t["value"]) or NOT_MEASURED,
                    t["wanted"],
                    "yes" if t["met"] else "**no**",
                )
                for t, ours in zip(judged, own, strict=True)
            ),
        ),
        "",
        f"{OWN} project's own bound: not among the targets that the talker was asked to meet.",
    ]
    for name, split in evaluation["splits"].items():
        lines += [
            "",
            f"**{name}** ({SPLIT_TITLES[name]}): {split['clips']} clips, {split['minutes']:.1f} minutes.",
            "",
        ]
        model, labels, control = split["model"], split["labels"], split["control"]
        lines += _table(
            ("measure", "model", "labels themselves", "control: others' sound"),
            (
                (figure.replace("_", " "), *(_number(of.get(figure)) for of in (model, labels, control)))
                for figure in model
            ),
        )
        apertures = ", ".join(f"{viseme} {mm:.1f}" for viseme, mm in split["aperture_mm"].items())
        pauses = split["pauses"]
        lines += [
            "",
            f"Mean opening in mid-phone (mm): {apertures}. In pauses the lips stand {_mm(pauses['gap_p95_mm'])} "
            f"apart (95th percentile) and move at {_mm(pauses['lip_speed_mm_s'])}/s.",
        ]
    lines += [
        "",
        "Sounds without speech (10 s each, those of the corpus longer; motion as a share of speech's):",
        "",
    ]
    names = ("gap_p95_mm", "closed", "lip_motion", "face_motion")
    lines += _table(
        ("sound", "gap, mm (95th percentile)", "closed", "lip motion", "face motion"),
        ((sound, *(_number(of[name]) for name in names)) for sound, of in evaluation["sounds"].items()),
    )
    if evaluation["recordings"]:
        left_out = ", ".join(f"{n} {why}" for why, n in evaluation["recordings"]["left_out"].items())
        lines += ["", f"Recorded prompts used: {evaluation['recordings']['prompts']}; left out: {left_out}."]
    for figures, title in (
        (evaluation["alignment_ceiling"], "Labels from flite's own phone times against the aligner's (awb)"),
        (evaluation["alignment_repeatability"], "Labels of recorded speech aligned twice, once warped"),
    ):
        if figures["clips"]:
            lines += ["", f"{title}, {figures['clips']} clips: {_alignment(figures)}."]
    return "\n".join(lines)


def with_figures(card: str, evaluation: Evaluation) -> str:
    """`card` with the figures of `evaluation` between its markers. Raises CardError without markers."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CardError(f"the model card needs a line {BEGIN} and a line {END}, between which figures go")
    return f"{before}{BEGIN}\n{card_figures(evaluation)}\n{END}{after}"


def plot(evaluation: Evaluation, path: Path) -> None:
    """A PNG: correlations of every split, motion in sounds without speech, and the loop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10), layout="constrained")
    axes = figure.subplot_mosaic([["controls", "controls"], ["sounds", "loop"]])
    top, left, right = (axes[name] for name in ("controls", "sounds", "loop"))
    splits, shown = evaluation["splits"], tables().controls
    width = 0.8 / len(splits)
    for number, (name, split) in enumerate(splits.items()):
        places = [column + number * width for column in range(len(shown))]
        heights = [split["model"][f"correlation_{control}"] or 0 for control in shown]
        floors = [split["control"][f"correlation_{control}"] or 0 for control in shown]
        bars = top.bar(places, heights, width, label=f"{name} ({SPLIT_TITLES[name]})")
        top.bar(places, floors, width, color="black", label=None if number else "control: others' sound")
        for place, control in zip(places, shown, strict=True):
            least = _least(evaluation, f"{name}: correlation, {control}")
            if least is not None:
                top.hlines(least, place - width / 2, place + width / 2, color=bars[0].get_facecolor(), lw=3)
                top.hlines(least, place - width / 2, place + width / 2, color="black", lw=1)
    top.axhline(CONTROL_MOST, color="grey", lw=0.5, ls=":")
    top.set_xticks([column + width * (len(splits) - 1) / 2 for column in range(len(shown))], shown)
    top.set_title("Correlation with the labels (lines: targets)")
    top.legend(fontsize=8)

    sounds = evaluation["sounds"]
    left.barh(list(sounds), [100 * of["lip_motion"] for of in sounds.values()])
    left.axvline(3, color="black", lw=1)
    left.invert_yaxis()
    left.tick_params(labelsize=6)
    left.set_title("Lip motion, % of speech's (line: target)")

    for name, values in evaluation["loop"]["by_pass"].items():
        changes = [100 * (value / values[1] - 1) for value in values]
        right.plot(range(1, len(changes) + 1), changes, label=name)
    right.axhspan(-5, 5, color="grey", alpha=0.15)
    right.set_title("One minute looped: change from pass 2, %")
    right.set_xlabel("pass")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _least(evaluation: Evaluation, name: str) -> float | None:
    wanted = next((t["wanted"] for t in evaluation["targets"] if t["name"] == name), None)
    return None if wanted is None else float(wanted.removeprefix("≥ "))


def _alignment(figures: Mapping[str, Any]) -> str:
    names = (
        "closure_recall",
        "false_closures",
        "fv_roll",
        *(f"correlation_{name}" for name in tables().controls),
    )
    return ", ".join(f"{name.replace('_', ' ')} {_number(figures[name])}" for name in names)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _marked(name: str, own: bool) -> str:
    return f"{name} {OWN}" if own else name


def _mm(value: float | None) -> str:
    return f"({NOT_MEASURED})" if value is None else f"{value:.2f} mm"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
