"""The corpus: `python -m streamtalk_training.corpus --hours 9 --out CACHE --debian FOLDER`.

A plan of clips, made from the seed alone, is cut into shards; each shard is rendered in a fresh process
(see `espeak.say` for why) and appears whole, so an interrupted run goes on where it stopped, and the same seed
gives the same bytes from any number of processes. Test clips are spoken by voices, and say sentences, that
training never meets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from streamtalk_training import espeak, festival, flite, neural, pico, runs, sounds, statistical
from streamtalk_training.clips import SAMPLE_RATE, TRAINED_SOUND_S, Clip, ClipSpec, Speak, render
from streamtalk_training.espeak import Utterance
from streamtalk_training.foreign import foreign_sentence, invented_sentence
from streamtalk_training.sentences import generated_sentences, split_of, wordnet_sentences
from streamtalk_training.visemes import Phone, UnknownPhoneError, tables
from streamtalk_training.voices import (
    FESTIVAL_VOICES,
    FLITE_MEAN_PITCH_HZ,
    FOREIGN_ACCENTS,
    PICO_VOICES,
    TEST_ACCENTS,
    TEST_FLITE_VOICE,
    TEST_VARIANTS,
    TRAIN_ACCENTS,
    TRAIN_FLITE_VOICES,
    TRAIN_VARIANTS,
    Engines,
    find_engines,
)

CORPUS_VERSION = 6
"""Raised whenever the same specs would give other clips: shards of before are then refused."""
CLIPS_PER_SHARD = 64
CHARACTERS_A_SECOND = 15.0  # of speech at the usual pace: turns hours into a number of clips
PAUSES_A_CLIP_S = 1.8
SOUND_SHARE = 0.22  # of the clips: no speech at all
FOREIGN_SHARE = 0.06  # of the speaking clips, as the shares below
FLITE_SHARE = 0.27  # where flite is at hand
FESTIVAL_SHARE = 0.11  # where festival is at hand
ABROAD_SHARE = 0.04  # where festival has its voices of other languages
PICO_SHARE = 0.12  # where Pico is at hand; one sentence in four is not to be aligned, and left out
NEURAL_SHARE = 0.3  # where the neural voices are at hand
HIBARI_SHARE = 0.35  # of their clips; Kokoro, the slow one, speaks the others
STATISTICAL_SHARE = 0.3  # of the corpus's hours, beyond them, where statistical voices are at hand
MIXED_SHARE = 0.4  # of their clips: two voices in one
WARPED_SHARE = 0.6
WARPS = (0.86, 1.18)
RICH_SHARE = 0.15  # of the clips say sentences full of what lips show best, or models hear worst
RICHEST = 0.2  # of the sentences count as rich
TEST_HOURS = 0.09
PLAN_FILE = "plan.json"
Shards = dict[str, list[list[ClipSpec]]]
SOUNDS_EACH = 6  # clips of every kind in the `sounds` split
EVALUATED_SOUNDS = ("silence", "white", "pink", "music", "hum")
_WEAK_SOUNDS = re.compile(r"f|v|w|oo|sh|th|ph|p|b|m", re.IGNORECASE)


@dataclass(frozen=True)
class CorpusPlan:
    """What to render: hours of training clips, by which engines, and of clips that are held out."""

    hours: float
    seed: int = 0
    fps: float = 30.0
    engines: Engines = field(default_factory=Engines)
    test_hours: float = TEST_HOURS


def planned_clips(plan: CorpusPlan) -> dict[str, list[ClipSpec]]:
    """Specs by split: `train`, `valid`, `test`, `sounds` (mouth shut) and, with flite, `awb` (a recorded voice
    that training never hears)."""
    if plan.engines.wordnet is not None:
        sentences = wordnet_sentences(plan.engines.wordnet)
    else:
        sentences = generated_sentences(max(200, int(plan.hours * 1500)), plan.seed)
    by_split = {name: [s for s in sentences if split_of(s) == name] for name in ("train", "valid", "test")}
    specs = {
        "train": list(_training(by_split["train"], plan)),
        "valid": list(_held_out("valid", by_split["valid"], plan)),
        "test": list(_held_out("test", by_split["test"], plan)),
        "sounds": [
            ClipSpec(index, plan.seed + 1, "sounds", kind, (), False, plan.fps)
            for index, kind in enumerate(EVALUATED_SOUNDS * SOUNDS_EACH)
        ],
    }
    if plan.engines.flite is not None:
        specs["awb"] = [replace(spec, engine="flite", voice=TEST_FLITE_VOICE) for spec in specs["test"]]
    return specs


def _training(sentences: Sequence[str], plan: CorpusPlan) -> Iterator[ClipSpec]:
    chooser = random.Random(f"{plan.seed} train")
    plenty = _endless(sentences, chooser)
    rich = _endless(_richest(sentences), chooser)
    seconds, index = 0.0, 0
    more = STATISTICAL_SHARE * plan.hours if plan.engines.statistical is not None else 0.0
    while seconds < (plan.hours + more) * 3600:
        beyond = seconds >= plan.hours * 3600  # so that what came before is the same with and without them
        if not beyond and chooser.random() < SOUND_SHARE:
            (kind,) = chooser.choices(list(sounds.SHARES), list(sounds.SHARES.values()))
            yield ClipSpec(index, plan.seed, "sounds", kind, (), True, plan.fps)
            seconds += sum(TRAINED_SOUND_S) / 2
            index += 1
            continue
        engine, voice = _statistical_voice(chooser) if beyond else _training_voice(chooser, plan.engines)
        language = voice.partition("+")[0]
        source = rich if chooser.random() < RICH_SHARE else plenty
        count = chooser.choice((1, 1, 2, 3))
        if voice in festival.ABROAD:
            said = tuple(invented_sentence(festival.ABROAD[voice], chooser) for _ in range(count))
        elif language in FOREIGN_ACCENTS:
            said = tuple(foreign_sentence(language, chooser) for _ in range(count))
        else:
            said = tuple(next(source) for _ in range(count))
        pace = chooser.lognormvariate(0, 0.16)
        warp = chooser.uniform(*WARPS) if chooser.random() < WARPED_SHARE else 1.0
        yield ClipSpec(index, plan.seed, engine, voice, said, True, plan.fps, pace, warp)
        seconds += sum(map(len, said)) / CHARACTERS_A_SECOND / (pace * warp) + PAUSES_A_CLIP_S
        index += 1


def _training_voice(chooser: random.Random, engines: Engines) -> tuple[str, str]:
    variant = chooser.choice(TRAIN_VARIANTS)
    suffix = "+" + variant if variant else ""
    draw = chooser.random()
    if draw < FOREIGN_SHARE:
        return "espeak", chooser.choice(FOREIGN_ACCENTS) + suffix
    if draw < FOREIGN_SHARE + FLITE_SHARE:
        if engines.flite is not None:
            return "flite", chooser.choice(TRAIN_FLITE_VOICES)
    elif draw < FOREIGN_SHARE + FLITE_SHARE + ABROAD_SHARE and engines.abroad is not None:
        return "festival", chooser.choice(list(festival.ABROAD))
    if draw > 1 - FESTIVAL_SHARE:
        if engines.festival is not None:
            return "festival", chooser.choice(FESTIVAL_VOICES)
    elif draw > 1 - FESTIVAL_SHARE - PICO_SHARE and engines.pico is not None:
        return "pico", chooser.choice(PICO_VOICES)
    elif draw > 1 - FESTIVAL_SHARE - PICO_SHARE - NEURAL_SHARE and engines.neural:
        return "neural", _neural_voice(chooser, engines)
    return "espeak", chooser.choice(TRAIN_ACCENTS) + suffix


def _statistical_voice(chooser: random.Random) -> tuple[str, str]:
    first, second = chooser.sample(statistical.VOICES, 2)
    mixed = chooser.random() < MIXED_SHARE
    return "statistical", f"{first}+{second}:{chooser.randrange(10, 60)}" if mixed else first


def _neural_voice(chooser: random.Random, engines: Engines) -> str:
    if chooser.random() < HIBARI_SHARE:
        return neural.HIBARI
    first, second = chooser.sample(neural.JAPANESE if engines.english is None else neural.ENGLISH, 2)
    return f"{first}+{second}:{chooser.randrange(60)}"


def _held_out(split: str, sentences: Sequence[str], plan: CorpusPlan) -> Iterator[ClipSpec]:
    chooser = random.Random(f"{plan.seed} {split}")
    plenty = _endless(sentences, chooser)
    seconds, index = 0.0, 0
    while seconds < plan.test_hours * 3600:
        said = tuple(next(plenty) for _ in range(chooser.choice((1, 1, 2))))
        voice = f"{chooser.choice(TEST_ACCENTS)}+{chooser.choice(TEST_VARIANTS)}"
        pace = chooser.uniform(0.9, 1.15)
        yield ClipSpec(index, plan.seed, "espeak", voice, said, False, plan.fps, pace)
        seconds += sum(map(len, said)) / CHARACTERS_A_SECOND / pace + PAUSES_A_CLIP_S
        index += 1


def _endless(sentences: Sequence[str], chooser: random.Random) -> Iterator[str]:
    order = list(sentences)
    if not order:
        raise ValueError("no sentences to say: expected some of every split")
    while True:
        chooser.shuffle(order)
        yield from order


def _richest(sentences: Sequence[str]) -> list[str]:
    """The fifth of `sentences` with most bilabials, f, v, w, th, sh and oo to a letter, in their own order."""
    share = {text: len(_WEAK_SOUNDS.findall(text)) / len(text) for text in sentences}
    least = sorted(share.values())[int((1 - RICHEST) * (len(share) - 1))]
    return [text for text in sentences if share[text] >= least]


def make(plan: CorpusPlan, out: Path, processes: int = 2) -> None:
    """Render every shard that `out` still lacks. Raises ValueError where `out` holds another plan's corpus."""
    out.mkdir(parents=True, exist_ok=True)
    shards = shards_of(planned_clips(plan))
    stamp(plan, shards, out)
    jobs = {
        _shard_path(out, split, index): specs
        for split, parts in shards.items()
        for index, specs in enumerate(parts)
    }
    tasks = [(path, specs, plan.engines) for path, specs in jobs.items() if not path.exists()]
    if plan.engines.neural:
        neural.put_together()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with get_context("spawn").Pool(processes, maxtasksperchild=1) as pool, Progress(*columns) as progress:
        bar = progress.add_task("shards", total=len(jobs), completed=len(jobs) - len(tasks))
        hours = 0.0
        for seconds in pool.imap_unordered(_render_shard, tasks, chunksize=1):
            hours += seconds / 3600
            progress.update(bar, advance=1, description=f"shards ({hours:.2f} h made)")


def _shard_path(folder: Path, split: str, index: int) -> Path:
    return folder / split / f"{index:05d}.npz"


def shards_of(planned: Mapping[str, list[ClipSpec]]) -> Shards:
    """The specs of each split, cut into shards."""
    return {
        split: [specs[start : start + CLIPS_PER_SHARD] for start in range(0, len(specs), CLIPS_PER_SHARD)]
        for split, specs in planned.items()
    }


def stamp(plan: CorpusPlan, shards: Shards, out: Path) -> None:
    """Write into `out` what tells its corpus from others: the plan, every clip that came of it, and the code's
    version. Raises ValueError where `out` is another's."""
    specs = {split: [[asdict(spec) for spec in part] for part in parts] for split, parts in shards.items()}
    wanted = {
        "hours": plan.hours,
        "seed": plan.seed,
        "fps": plan.fps,
        "engines": plan.engines.found(),
        "version": CORPUS_VERSION,
        "clips_sha256": hashlib.sha256(json.dumps(specs, sort_keys=True).encode()).hexdigest(),
        "shards": {split: len(parts) for split, parts in shards.items()},
    }
    path = out / PLAN_FILE
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ValueError(f"{out} holds another corpus ({path.read_text()}): choose another --out")
    path.write_text(json.dumps(wanted))


def _render_shard(task: tuple[Path, Sequence[ClipSpec], Engines]) -> float:
    """Render one shard and return its length in seconds."""
    path, specs, engines = task
    speak = speaker(specs, engines)
    clips = [render(spec, speak, engines.soundfont) for spec in specs]
    save_shard(path, clips)
    return sum(len(clip.pcm) for clip in clips) / SAMPLE_RATE


def speaker(specs: Sequence[ClipSpec], engines: Engines) -> Speak:
    """What speaks for `specs`: festival says, or reads to statistical voices, all of its sentences at once; the others
    are said one by one."""
    lines = [
        festival.Line(text, spec.voice, 1 / spec.pace)
        for spec in specs
        if spec.engine == "festival"
        for text in spec.sentences
    ]
    spoken: dict[festival.Line, Utterance | UnknownPhoneError] = {}
    if lines:
        if engines.festival is None:
            raise ValueError("a clip asks for festival, and none was found")
        spoken = dict(zip(lines, festival.say_all(engines.festival, lines), strict=True))
    read = [text for spec in specs if spec.engine == "statistical" for text in spec.sentences]
    labels: dict[str, str] = {}
    if engines.statistical is not None:
        labels = dict(zip(read, festival.full_context(engines.statistical.reader, read), strict=True))

    def speak(spec: ClipSpec, text: str, generator: np.random.Generator) -> Utterance:
        if spec.engine == "festival":
            said = spoken[festival.Line(text, spec.voice, 1 / spec.pace)]
            if isinstance(said, UnknownPhoneError):
                raise said
            return said
        if spec.engine == "flite":
            if engines.flite is None:
                raise ValueError("a clip asks for flite, and none was found")
            pitch_hz: float | None = None
            if spec.varied:
                pitch_hz = FLITE_MEAN_PITCH_HZ[spec.voice] * float(np.exp(generator.normal(0, 0.15)))
            return flite.say(engines.flite, text, spec.voice, 1 / spec.pace, pitch_hz)
        if spec.engine == "statistical":
            if engines.statistical is None:
                raise ValueError("a clip asks for statistical voices, and none were found")
            manner = statistical.Manner(spec.voice, spec.pace)
            if spec.varied:
                manner = statistical.varied(manner, generator)
            return statistical.say(engines.statistical, labels[text], manner)
        if spec.engine == "pico":
            raised = float(np.exp(generator.normal(0, 0.12))) if spec.varied else 1.0
            return pico.say(text, spec.voice, spec.pace, raised)
        if spec.engine == "neural":
            return neural.say(text, spec.voice, spec.pace, engines.english)
        pitch, pitch_range = generator.integers(15, 85), generator.integers(25, 80)
        return espeak.say(text, spec.voice, round(165 * spec.pace), int(pitch), int(pitch_range))

    return speak


def save_shard(path: Path, clips: Sequence[Clip]) -> None:
    """Write clips to one npz, atomically: arrays end to end, with the offsets where each clip begins."""
    visemes = list(tables().viseme_targets)
    phones = [phone for clip in clips for phone in clip.phones]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    with partial_path.open("wb") as file:
        np.savez(
            file,
            pcm=np.concatenate([np.round(clip.pcm * 32767).astype(np.int16) for clip in clips]),
            pcm_offsets=np.cumsum([0, *(len(clip.pcm) for clip in clips)]),
            weights=np.concatenate([clip.weights for clip in clips]).astype(np.float16),
            idle=np.concatenate([clip.idle for clip in clips]).astype(np.float16),
            frame_offsets=np.cumsum([0, *(len(clip.weights) for clip in clips)]),
            phone_times_s=np.array([(p.start_s, p.end_s) for p in phones], np.float32).reshape(-1, 2),
            phone_visemes=np.array([visemes.index(p.viseme) for p in phones], np.int16),
            phone_names=np.array([p.name for p in phones], np.str_),
            phone_offsets=np.cumsum([0, *(len(clip.phones) for clip in clips)]),
            specs=np.array(json.dumps([asdict(clip.spec) for clip in clips])),
        )
    partial_path.replace(path)


def load_shard(path: Path) -> list[Clip]:
    """The clips that `save_shard` wrote."""
    visemes = list(tables().viseme_targets)
    with np.load(path) as stored:
        part = {name: stored[name] for name in stored.files}

    def rows(offsets: str, index: int) -> slice:
        return slice(int(part[offsets][index]), int(part[offsets][index + 1]))

    clips = []
    for index, fields in enumerate(json.loads(str(part["specs"]))):
        spec = ClipSpec(**{**fields, "sentences": tuple(fields["sentences"])})
        frame, phone = rows("frame_offsets", index), rows("phone_offsets", index)
        labelled = zip(
            part["phone_times_s"][phone],
            part["phone_visemes"][phone],
            part["phone_names"][phone],
            strict=True,
        )
        clips.append(
            Clip(
                spec,
                part["pcm"][rows("pcm_offsets", index)].astype(np.float32) / 32767,
                part["weights"][frame].astype(np.float32),
                part["idle"][frame].astype(np.float32),
                tuple(Phone(float(t[0]), float(t[1]), str(n), visemes[v]) for t, v, n in labelled),
            )
        )
    return clips


def load_split(folder: Path, split: str) -> list[Clip]:
    """All clips of one split: of the shards that the plan counts, or of every shard where an older corpus's
    plan counts none. Raises FileNotFoundError where they were not made, or not all."""
    plan = folder / PLAN_FILE
    counts = json.loads(plan.read_text()).get("shards") if plan.exists() else None
    if counts is None:
        paths = sorted((folder / split).glob("*.npz"))
    else:
        paths = [_shard_path(folder, split, index) for index in range(counts.get(split, 0))]
    if not any(path.exists() for path in paths):
        raise FileNotFoundError(f"{folder / split} holds no shards: run python -m streamtalk_training.corpus")
    missing = sum(not path.exists() for path in paths)
    if missing:
        raise FileNotFoundError(
            f"{folder / split} lacks {missing} of {len(paths)} shards: run python -m streamtalk_training.corpus "
            "again, with the same options, to make the rest"
        )
    return [clip for path in paths for clip in load_shard(path)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.corpus", description=__doc__)
    parser.add_argument("--hours", type=float, default=9.0, help="training clips to make")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--debian",
        type=Path,
        default=Path("/"),
        help="where wordnet-base, flite, festival, htsengine and timgm6mb-soundfont were installed or unpacked",
    )
    options = parser.parse_args(arguments)
    with runs.one_sentence():
        engines = find_engines(options.debian)
        for name, found in engines.found().items():
            if not found:
                print(f"no {name} below {options.debian}: the corpus does without it")
        make(CorpusPlan(options.hours, options.seed, options.fps, engines), options.out, options.processes)


if __name__ == "__main__":
    main()
