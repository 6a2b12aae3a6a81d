"""The corpus: `python -m streamtalk_training.corpus --hours 2 --out CACHE`.

A plan of clips, made from the seed alone, is cut into shards; each shard is rendered in a fresh process
(see `espeak.say` for why) and appears whole, so an interrupted run goes on where it stopped. Test clips are
spoken by voices, and say sentences, that training never meets.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from streamtalk_training import flite
from streamtalk_training.clips import SAMPLE_RATE, Clip, ClipSpec, Speak, render
from streamtalk_training.espeak import Utterance
from streamtalk_training.sentences import generated_sentences, split_of, wordnet_sentences
from streamtalk_training.visemes import Phone, tables

CLIPS_PER_SHARD = 64
CHARACTERS_A_SECOND = 14.0  # of speech at the usual pace: turns hours into a number of clips
PAUSES_A_CLIP_S = 1.8
SOUND_CLIP_S = 4.0
SOUND_SHARE = 0.06  # of the clips: no speech at all
FLITE_SHARE = 0.35  # of the clips, where flite is at hand
TEST_HOURS = 0.12

TRAIN_ACCENTS = ("en-us", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan")
TEST_ACCENTS = ("en-us-nyc", "en-gb-x-gbcwmd")
TRAIN_VARIANTS = (
    *("", "", "f1", "f2", "f3", "f4", "m1", "m2", "m3", "m5", "m6", "m7", "m8", "klatt", "klatt2", "klatt5"),
    *(
        "Alicia",
        "Andrea",
        "Annie",
        "Denis",
        "Gene",
        "Lee",
        "Marco",
        "Mike",
        "Reed",
        "adam",
        "anika",
        "belinda",
    ),
    *(
        "benjamin",
        "caleb",
        "david",
        "ed",
        "edward",
        "grandma",
        "gustave",
        "ian",
        "iven",
        "john",
        "kaukovalta",
    ),
    *("linda", "michel", "norbert", "paul", "quincy", "robert", "steph2", "travis", "victor", "whisper"),
)
TEST_VARIANTS = ("f5", "m4", "klatt3", "steph", "max", "Alex", "aunty", "zac")
TRAIN_FLITE_VOICES = ("slt", "rms", "kal16")
TEST_FLITE_VOICE = "awb"


@dataclass(frozen=True)
class CorpusPlan:
    """What to render: hours of training speech, and where text and flite are found (None: do without)."""

    hours: float
    seed: int = 0
    fps: float = 30.0
    wordnet: Path | None = None
    flite_program: Path | None = None


def planned_clips(plan: CorpusPlan) -> dict[str, list[ClipSpec]]:
    """Specs by split: `train`, `valid`, `test` and, with flite, `awb` (a recorded voice never trained on)."""
    if plan.wordnet is not None:
        sentences = wordnet_sentences(plan.wordnet)
    else:
        sentences = generated_sentences(max(200, int(plan.hours * 1500)), plan.seed)
    wanted = {"train": plan.hours, "valid": TEST_HOURS / 2, "test": TEST_HOURS}
    specs = {
        split: list(_specs(split, [s for s in sentences if split_of(s) == split], hours, plan))
        for split, hours in wanted.items()
    }
    if plan.flite_program is not None:
        specs["awb"] = [
            replace(spec, engine="flite", voice=TEST_FLITE_VOICE)
            for spec in specs["test"]
            if spec.engine == "espeak"
        ]
    return specs


def _specs(split: str, sentences: Sequence[str], hours: float, plan: CorpusPlan) -> Iterator[ClipSpec]:
    chooser = random.Random(f"{plan.seed} {split}")
    order = list(sentences)
    chooser.shuffle(order)
    varied = split == "train"
    accents, variants = (TRAIN_ACCENTS, TRAIN_VARIANTS) if varied else (TEST_ACCENTS, TEST_VARIANTS)
    seconds, index, position = 0.0, 0, 0
    while seconds < hours * 3600 and order:
        said: tuple[str, ...] = ()
        engine, voice = "sounds", ""
        if chooser.random() < SOUND_SHARE:
            seconds += SOUND_CLIP_S
        else:
            count = chooser.choice((1, 1, 2))
            said = tuple(order[(position + step) % len(order)] for step in range(count))
            position += count
            seconds += sum(map(len, said)) / CHARACTERS_A_SECOND + PAUSES_A_CLIP_S
            variant = chooser.choice(variants)
            engine, voice = "espeak", chooser.choice(accents) + ("+" + variant if variant else "")
            if varied and plan.flite_program is not None and chooser.random() < FLITE_SHARE:
                engine, voice = "flite", chooser.choice(TRAIN_FLITE_VOICES)
        yield ClipSpec(index, plan.seed, engine, voice, said, varied, plan.fps)
        index += 1


def make(plan: CorpusPlan, out: Path, processes: int = 2) -> None:
    """Render every shard that `out` still lacks, and print a line for each."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = {
        **asdict(plan),
        "wordnet": plan.wordnet is not None,
        "flite_program": plan.flite_program is not None,
    }
    stamp = out / "plan.json"
    if stamp.exists() and json.loads(stamp.read_text()) != wanted:
        raise ValueError(f"{out} holds another corpus ({stamp.read_text()}): choose another --out")
    stamp.write_text(json.dumps(wanted))
    jobs = {
        out / split / f"{start // CLIPS_PER_SHARD:05d}.npz": specs[start : start + CLIPS_PER_SHARD]
        for split, specs in planned_clips(plan).items()
        for start in range(0, len(specs), CLIPS_PER_SHARD)
    }
    todo = {path: specs for path, specs in jobs.items() if not path.exists()}
    print(f"{len(jobs) - len(todo)} of {len(jobs)} shards are there already", flush=True)
    tasks = [(path, specs, plan.flite_program) for path, specs in todo.items()]
    with get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for count, (path, seconds) in enumerate(pool.imap_unordered(_render_shard, tasks, chunksize=1), 1):
            print(f"{count}/{len(todo)} {path.relative_to(out)} {seconds / 60:.1f} min", flush=True)


def _flite_speaker(program: Path) -> Speak:
    def speak(text: str, voice: str, pace: float) -> Utterance:
        return flite.say(program, text, voice, 1 / pace)

    return speak


def _render_shard(task: tuple[Path, Sequence[ClipSpec], Path | None]) -> tuple[Path, float]:
    path, specs, flite_program = task
    speak = None if flite_program is None else _flite_speaker(flite_program)
    clips = [render(spec, speak) for spec in specs]
    save_shard(path, clips)
    return path, sum(len(clip.pcm) for clip in clips) / SAMPLE_RATE


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
    """All clips of one split. Raises FileNotFoundError where none were made."""
    paths = sorted((folder / split).glob("*.npz"))
    if not paths:
        raise FileNotFoundError(f"{folder / split} holds no shards: run python -m streamtalk_training.corpus")
    return [clip for path in paths for clip in load_shard(path)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.corpus", description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0, help="training speech to make")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--debian",
        type=Path,
        default=Path("/"),
        help="where wordnet-base and flite were installed or unpacked",
    )
    options = parser.parse_args(arguments)
    wordnet: Path | None = options.debian / "usr" / "share" / "wordnet"
    if wordnet is not None and not (wordnet / "data.noun").exists():
        print(f"no WordNet in {wordnet} (Debian package wordnet-base): generated sentences will do")
        wordnet = None
    program = flite.find_flite(options.debian)
    if program is None:
        print("no flite (Debian packages flite, libflite1): espeak-ng alone will do, and no awb test split")
    plan = CorpusPlan(options.hours, options.seed, options.fps, wordnet, program)
    make(plan, options.out, options.processes)


if __name__ == "__main__":
    main()
