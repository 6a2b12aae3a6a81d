"""How well a talker talks: `python -m streamtalk_training.evaluate --help`.

What ships is what is measured: the model is exported, and the runtime streams every clip through the engine. One
table tells each target from what came of it; JSON, plots, a film (labels left, model right) and the figures of
the model card say the rest. Sources that are missing are named and left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtalk import StreamTalkError, Talker
from streamtalk_export.errors import ExportError
from streamtalk_training import report, stress
from streamtalk_training.aligner import aligned, aligner_installed, known, words
from streamtalk_training.clips import SAMPLE_RATE, Clip, frame_count, with_silences
from streamtalk_training.coarticulation import Style, arkit_weights, mouth_controls
from streamtalk_training.comparison import film
from streamtalk_training.corpus import load_split
from streamtalk_training.face import load_face
from streamtalk_training.face_source import DEFAULT_CACHE
from streamtalk_training.real_speech import RecordingsError, Spoken, load_recordings
from streamtalk_training.scores import Figures, Pair, Speech, agreement, pairs, speech_scores, split_scores
from streamtalk_training.setup import RECORDED_NOTE, recorded_asked_for
from streamtalk_training.streaming import Reader, exported
from streamtalk_training.targets import lacking, verdicts
from streamtalk_training.visemes import Phone

Floats = NDArray[np.float32]

SYNTHETIC_SPLITS = ("test", "awb")
SOUNDS_SPLIT = "sounds"
FILM_S = 8.0  # of each split


@dataclass(frozen=True)
class Extent:
    """How much is measured: clips of each split and recorded prompts (None: all), passes of the loop."""

    clips: int | None = None
    prompts: int | None = None
    passes: int = 30


QUICK = Extent(clips=8, prompts=40, passes=3)


@dataclass(frozen=True)
class Sources:
    """Speech by split, sounds by name, how the recordings came out, and what alignment is tried on: clips whose
    phones are known anyway, and recordings aligned twice."""

    splits: Mapping[str, Sequence[Speech]]
    sounds: Mapping[str, Floats]
    recordings: Mapping[str, object]
    known: Sequence[Clip]
    twice: Sequence[tuple[Spoken, Sequence[Phone]]]


def from_clip(clip: Clip) -> Speech:
    """A clip of the corpus, labelled from its engine's own phone times."""
    return Speech(f"{clip.spec.voice} {clip.spec.index}", clip.pcm, clip.phones, clip.weights, clip.idle)


def rule_labels(phones: Sequence[Phone], samples: int, fps: float) -> Floats:
    """ARKit weights [L, 52] that the rules give `phones`, by the canonical talker."""
    times_s = np.arange(frame_count(samples, fps)) / fps
    return arkit_weights(mouth_controls(phones, times_s, Style()), Style())


def read_sources(corpus: Path, debian: Path, fps: float, extent: Extent) -> Sources:
    """All that there is to listen to; what is missing is said on stderr and left out."""
    splits: dict[str, list[Speech]] = {}
    sounds = stress.sounds(debian)
    awb: list[Clip] = []
    for name in (*SYNTHETIC_SPLITS, SOUNDS_SPLIT):
        try:
            clips = load_split(corpus, name)[: extent.clips]
        except FileNotFoundError as error:
            say(f"split {name} is left out: {error}")
            continue
        if name == SOUNDS_SPLIT:
            for kind in dict.fromkeys(clip.spec.voice for clip in clips):
                each = [clip.pcm for clip in clips if clip.spec.voice == kind]
                sounds[f"{kind}, corpus"] = np.concatenate(each)
        else:
            spoken = [clip for clip in clips if clip.spec.engine != "sounds"]
            splits[name] = [from_clip(clip) for clip in spoken]
            awb = spoken if name == "awb" and aligner_installed() else awb
    found: dict[str, object] = {}
    twice: Sequence[tuple[Spoken, Sequence[Phone]]] = ()
    try:
        recordings = load_recordings(debian, extent.prompts)
    except RecordingsError as error:
        say(f"split real is left out: {error}")
    else:
        splits["real"] = [aligned_speech(clip, fps) for clip in recordings.clips]
        twice = recordings.twice
        found = {"prompts": recordings.prompts, "left_out": recordings.dropped}
    return Sources(splits, sounds, found, awb, twice)


def alignment_ceiling(reader: Reader, clips: Sequence[Clip], fps: float) -> dict[str, object]:
    """What alignment alone costs: labels with a synthesiser's own phone times, as if a model had made them, against
    labels of the phones that the aligner of `real` finds in the same sound.

    No model can be expected to do better on aligned recordings.
    """
    found: list[Pair] = []
    left_out = 0
    for clip in clips:
        said = words(" ".join(clip.spec.sentences))
        phones = aligned(clip.pcm, said) if said and all(map(known, said)) else None
        if phones is None:
            left_out += 1
            continue
        speech = aligned_speech(Spoken(clip.spec.voice, clip.pcm, phones), fps)
        found.append(Pair(speech, 0, reader.labelled(clip.weights, 0), reader.labelled(speech.weights, 0)))
    return {"clips": len(found), "left_out": left_out, **ceiling_scores(found, fps)}


def alignment_repeatability(
    reader: Reader, twice: Sequence[tuple[Spoken, Sequence[Phone]]], fps: float
) -> dict[str, object]:
    """Labels of recordings against labels of the same recordings aligned again, warped: how far an aligner's
    labels of a real voice agree with themselves."""
    found: list[Pair] = []
    for spoken, phones in twice:
        first = aligned_speech(spoken, fps)
        second = aligned_speech(replace(spoken, phones=tuple(phones)), fps)
        tracks = (reader.labelled(speech.weights, 0) for speech in (second, first))
        found.append(Pair(first, 0, *tracks))
    return {"clips": len(found), **ceiling_scores(found, fps)}


def aligned_speech(spoken: Spoken, fps: float) -> Speech:
    """Speech whose pauses the phones leave out, with the rules' labels."""
    phones = tuple(with_silences(list(spoken.phones), len(spoken.pcm) / SAMPLE_RATE))
    return Speech(spoken.name, spoken.pcm, phones, rule_labels(phones, len(spoken.pcm), fps))


def ceiling_scores(found: Sequence[Pair], fps: float) -> Figures:
    return speech_scores(found, fps) | agreement(found) if found else {}


def measured(reader: Reader, talker: Talker, sources: Sources, extent: Extent) -> dict[str, object]:
    """All figures, ready for JSON. Raises ValueError without any speech."""
    if not sources.splits:
        raise ValueError("there is no speech to evaluate on: make a corpus or get the recordings first")
    fps = float(talker.fps)
    streamed: dict[str, list[Pair]] = {}
    splits: dict[str, object] = {}
    for name, speeches in sources.splits.items():
        say(f"{name}: {sum(len(speech.pcm) for speech in speeches) / SAMPLE_RATE / 60:.1f} minutes")
        streamed[name] = pairs(reader, talker, speeches)
        splits[name] = split_scores(reader.face, streamed[name], fps)
    # The unseen recorded voice where there is one: what "speech" means below.
    speech = streamed.get("awb") or next(iter(streamed.values()))
    heard = [pair.speech.pcm for pair in speech]
    say(f"{len(sources.sounds)} sounds without speech, a minute {extent.passes} times, two seeds")
    sounds = stress.sound_scores(reader, talker, sources.sounds, speech)
    passes = list(stress.loop_passes(reader, talker, stress.stretch(heard, stress.LOOP_S), extent.passes))
    long = stress.stretch(heard, stress.SEEDS_S)
    seeds = [reader.streamed(talker, long, speaker=0, seed=seed) for seed in (0, 1)]
    return {
        "engine": {
            "checkpoint_sha256": talker.manifest.checkpoint_sha256,
            "delay_s": talker.delay_s,
            "fps": talker.fps,
        },
        "splits": splits,
        "recordings": dict(sources.recordings),
        "alignment_ceiling": alignment_ceiling(reader, sources.known, fps),
        "alignment_repeatability": alignment_repeatability(reader, sources.twice, fps),
        "sounds": sounds,
        "sounds_worst": worst_by_kind(sounds),
        "loop": stress.loop_scores(passes),
        "seeds": stress.seed_scores(seeds[0], seeds[1], fps),
    }


def worst_by_kind(sounds: Mapping[str, Figures]) -> dict[str, Figures]:
    """The worst of each figure over all sounds of a kind: silence, music, hum, and noise: all else."""
    kinds: dict[str, list[Figures]] = defaultdict(list)
    for name, figures in sounds.items():
        kind = next((kind for kind in ("silence", "music", "hum") if name.startswith(kind)), "noise")
        kinds[kind].append(figures)
    return {
        kind: {
            name: (min if name == "closed" else max)(figures[name] for figures in each) for name in each[0]
        }
        for kind, each in kinds.items()
    }


def judged(figures: Mapping[str, object]) -> list[dict[str, object]]:
    """Every target with what was measured, ready for JSON."""
    return [
        {
            "name": v.target.name,
            "wanted": v.target.wanted,
            "value": v.value,
            "met": v.met,
            "own": v.target.own,
        }
        for v in verdicts(figures)
    ]


def rounded(figures: Any) -> Any:
    """`figures` with floats to four digits: what is written down should not pretend to more; nan is null."""
    if isinstance(figures, Mapping):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    if isinstance(figures, float):
        return float(f"{figures:.4g}") if np.isfinite(figures) else None
    return figures


def destination(options: argparse.Namespace, absent: Sequence[str]) -> Path:
    """Where the JSON goes. A quick look, or one that lacks sources, is no figure to publish: beside the model it
    would replace the whole one, so it goes to --report."""
    out: Path = options.out or (options.report if options.quick else options.model) / "evaluation.json"
    if absent and out.resolve().parent == options.model.resolve():
        out = options.report / out.name
        say(
            f"the figures of {options.model} are left as they are, for lack of {', '.join(absent)}: see {out}"
        )
    return out


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code. Problems are one sentence on stderr and code 2."""
    if recorded_asked_for(arguments):
        from streamtalk_training import recorded_scores  # imports transformers, which takes seconds

        recorded_scores.evaluate(arguments)
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m streamtalk_training.evaluate", description=__doc__, epilog=RECORDED_NOTE
    )
    parser.add_argument("--model", type=Path, default=Path("models/bundled"), help="weights, config and face")
    parser.add_argument("--engine", type=Path, help="an export of that model (default: export it now)")
    parser.add_argument("--corpus", type=Path, default=DEFAULT_CACHE / "corpus")
    parser.add_argument(
        "--debian",
        type=Path,
        default=DEFAULT_CACHE / "debian",
        help="where the asterisk-core-sounds and asterisk-moh-opsound packages were unpacked",
    )
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where engines are kept")
    parser.add_argument(
        "--out",
        type=Path,
        help="the JSON (default: in --model, whose README.md then gets the figures too; of --quick, "
        "or where sources are missing, in --report)",
    )
    parser.add_argument(
        "--report", type=Path, default=DEFAULT_CACHE / "evaluation", help="folder of plots and the film"
    )
    parser.add_argument("--quick", action="store_true", help="a few clips of each split, in a minute")
    options = parser.parse_args(arguments)
    for name in ("corpus", "debian", "cache", "report"):
        setattr(options, name, getattr(options, name).expanduser())
    try:
        run(options)
    except (ExportError, StreamTalkError, OSError, ValueError) as error:
        say(f"evaluate: {error}")
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Evaluate as the parsed options say. Raises ExportError, StreamTalkError, OSError and ValueError."""
    extent = QUICK if options.quick else Extent()
    reader = Reader(load_face(options.model / "face.npz"))
    engine = options.engine or exported(options.model, options.cache)
    talker = Talker.load(engine, backend="onnxruntime-cpu", threads=1)
    sources = read_sources(options.corpus, options.debian, float(talker.fps), extent)
    figures = measured(reader, talker, sources, extent)
    report.print_table(verdicts(figures))
    evaluation = rounded(figures | {"targets": judged(figures)})
    options.report.mkdir(parents=True, exist_ok=True)
    out = destination(options, lacking(figures))
    out.write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    card = options.model / "README.md"
    if out.resolve().parent == options.model.resolve() and card.exists():
        card.write_text(report.with_figures(card.read_text(encoding="utf-8"), evaluation), encoding="utf-8")
    report.plot(evaluation, options.report / "evaluation.png")
    shown = {name: speeches[0] for name, speeches in sources.splits.items()}
    film(reader.face, talker, shown, FILM_S, options.report / "comparison.mp4")
    say(f"figures in {out}, plots and film in {options.report}")


if __name__ == "__main__":
    sys.exit(main())
