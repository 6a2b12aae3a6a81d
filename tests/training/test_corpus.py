"""The plan, the shards and the promise that a seed gives the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamtalk_training import corpus, festival, neural, statistical
from streamtalk_training.clips import Clip, ClipSpec, render
from streamtalk_training.sentences import generated_sentences, split_of
from streamtalk_training.statistical import Statistical
from streamtalk_training.voices import (
    FOREIGN_ACCENTS,
    TEST_ACCENTS,
    TEST_FLITE_VOICE,
    TEST_VARIANTS,
    TRAIN_ACCENTS,
    TRAIN_FLITE_VOICES,
    TRAIN_VARIANTS,
    Engines,
    find_engines,
)

SPEAK = corpus.speaker([], Engines())
FESTIVAL = festival.Festival(Path("festival"), Path("data"), None)
ALL_ENGINES = Engines(
    flite=Path("flite"), festival=FESTIVAL, pico=Path("py_nanotts"), abroad=FESTIVAL, neural=True
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> corpus.CorpusPlan:
    """A plan of a few clips, in shards of two."""
    specs = corpus.planned_clips(corpus.CorpusPlan(hours=0.02, seed=4))
    few = {"train": specs["train"][:4], "sounds": specs["sounds"][:2]}
    monkeypatch.setattr(corpus, "planned_clips", lambda _: few)
    monkeypatch.setattr(corpus, "CLIPS_PER_SHARD", 2)
    return corpus.CorpusPlan(hours=0.02, seed=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


def test_a_seed_gives_the_same_bytes_however_it_is_rendered(tmp_path: Path, small: corpus.CorpusPlan) -> None:
    corpus.make(small, tmp_path / "one", processes=1)
    corpus.make(small, tmp_path / "two", processes=2)
    once = contents(tmp_path / "one")
    assert set(once) == {"train/00000.npz", "train/00001.npz", "sounds/00000.npz"}
    assert contents(tmp_path / "two") == once

    (tmp_path / "one" / "train" / "00000.npz").unlink()
    untouched = tmp_path / "one" / "train" / "00001.npz"
    made_ns = untouched.stat().st_mtime_ns
    corpus.make(small, tmp_path / "one", processes=1)
    assert contents(tmp_path / "one") == once
    assert untouched.stat().st_mtime_ns == made_ns


def test_another_plan_needs_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "planned_clips", lambda _: {})
    corpus.make(corpus.CorpusPlan(hours=0.02, seed=4), tmp_path, processes=1)
    with pytest.raises(ValueError, match="holds another corpus"):
        corpus.make(corpus.CorpusPlan(hours=0.02, seed=5), tmp_path, processes=1)


def test_shards_of_older_code_are_refused(
    tmp_path: Path, small: corpus.CorpusPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = corpus.planned_clips(small)
    corpus.stamp(small, corpus.shards_of(specs), tmp_path)
    corpus.stamp(small, corpus.shards_of(specs), tmp_path)
    other = {**specs, "train": specs["train"][::-1]}
    with pytest.raises(ValueError, match="holds another corpus"):
        corpus.stamp(small, corpus.shards_of(other), tmp_path)
    monkeypatch.setattr(corpus, "CORPUS_VERSION", corpus.CORPUS_VERSION + 1)
    with pytest.raises(ValueError, match="holds another corpus"):
        corpus.stamp(small, corpus.shards_of(specs), tmp_path)


def test_only_the_plan_s_shards_are_read(tmp_path: Path) -> None:
    clips = [render(ClipSpec(index, 3, "sounds", "hum", (), False), SPEAK) for index in range(3)]
    for index, clip in enumerate(clips):
        corpus.save_shard(tmp_path / "sounds" / f"{index:05d}.npz", [clip])
    assert len(corpus.load_split(tmp_path, "sounds")) == 3  # an older corpus, whose plan counts no shards
    plan = tmp_path / corpus.PLAN_FILE
    plan.write_text(json.dumps({"shards": {"sounds": 2}}))
    assert [clip.spec.index for clip in corpus.load_split(tmp_path, "sounds")] == [0, 1]
    plan.write_text(json.dumps({"shards": {"sounds": 4}}))
    with pytest.raises(FileNotFoundError, match="lacks 1 of 4 shards"):
        corpus.load_split(tmp_path, "sounds")


def test_the_command_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / corpus.PLAN_FILE).write_text("{}")
    with pytest.raises(SystemExit) as ended:
        corpus.main(["--hours", "0.02", "--out", str(tmp_path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "holds another corpus" in said


def test_a_split_that_was_not_made_is_missed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"streamtalk_training\.corpus"):
        corpus.load_split(tmp_path, "train")


def test_a_shard_returns_what_it_was_given(tmp_path: Path) -> None:
    said = ("Bob put the copper pump up by the stamp.",)
    specs = [
        ClipSpec(0, 3, "espeak", "en-us+f3", said, True, pace=1.1, warp=0.9),
        ClipSpec(1, 3, "sounds", "hum", (), True),
    ]
    clips: list[Clip] = [render(spec, SPEAK) for spec in specs]
    corpus.save_shard(tmp_path / "train" / "00000.npz", clips)
    for before, after in zip(clips, corpus.load_split(tmp_path, "train"), strict=True):
        assert after.spec == before.spec
        np.testing.assert_allclose(after.pcm, before.pcm, atol=1 / 32767)
        np.testing.assert_allclose(after.weights, before.weights, atol=1e-3)
        assert [p.name for p in after.phones] == [p.name for p in before.phones]


def test_splits_share_neither_voices_nor_sentences() -> None:
    plan = corpus.CorpusPlan(hours=0.2, engines=ALL_ENGINES)
    specs = corpus.planned_clips(plan)
    assert specs == corpus.planned_clips(plan)
    assert specs["train"] != corpus.planned_clips(corpus.CorpusPlan(0.2, 1, engines=ALL_ENGINES))["train"]
    voices = {split: {s.voice for s in found if s.engine != "sounds"} for split, found in specs.items()}
    said = {split: {text for s in found for text in s.sentences} for split, found in specs.items()}
    assert not voices["train"] & (voices["test"] | voices["awb"])
    assert voices["awb"] == {TEST_FLITE_VOICE}
    for split in ("test", "valid", "awb"):
        assert not said["train"] & said[split]
        assert all(not spec.varied and spec.warp == 1 for spec in specs[split])
    assert {split_of(text) for text in said["test"] | said["awb"]} == {"test"}
    sounding = Counter(spec.voice for spec in specs["sounds"])
    assert sounding == dict.fromkeys(corpus.EVALUATED_SOUNDS, corpus.SOUNDS_EACH)


def test_held_out_voices_are_in_no_training_list() -> None:
    assert not {*TEST_ACCENTS} & {*TRAIN_ACCENTS, *FOREIGN_ACCENTS}
    assert not {*TEST_VARIANTS} & {*TRAIN_VARIANTS}
    assert TEST_FLITE_VOICE not in TRAIN_FLITE_VOICES


def test_training_is_as_mixed_as_planned() -> None:
    train = corpus.planned_clips(corpus.CorpusPlan(hours=6, engines=ALL_ENGINES))["train"]
    speaking = [spec for spec in train if spec.engine != "sounds"]
    share = 0.03  # about three standard errors of a share among 3,000 clips

    def portion(found: list[ClipSpec], among: list[ClipSpec]) -> float:
        return len(found) / len(among)

    silent = [spec for spec in train if spec.engine == "sounds"]
    foreign = [spec for spec in speaking if spec.voice.partition("+")[0] in FOREIGN_ACCENTS]
    by_flite = [spec for spec in speaking if spec.engine == "flite"]
    by_pico = [spec for spec in speaking if spec.engine == "pico"]
    by_neural = [spec for spec in speaking if spec.engine == "neural"]
    abroad = [spec for spec in speaking if spec.voice in festival.ABROAD]
    warped = [spec for spec in speaking if spec.warp != 1]
    mixed = {name for spec in by_neural for name in spec.voice.partition(":")[0].split("+")}
    assert mixed == {neural.HIBARI, *neural.JAPANESE}
    english = replace(ALL_ENGINES, english=Path("voices"))
    others = corpus.planned_clips(corpus.CorpusPlan(hours=6, engines=english))["train"]
    mixed = {n for s in others if s.engine == "neural" for n in s.voice.partition(":")[0].split("+")}
    assert mixed == {neural.HIBARI, *neural.ENGLISH}
    assert portion(silent, train) == pytest.approx(corpus.SOUND_SHARE, abs=share)
    assert portion(abroad, speaking) == pytest.approx(corpus.ABROAD_SHARE, abs=share)
    assert {spec.voice for spec in abroad} == set(festival.ABROAD)
    assert portion(foreign, speaking) == pytest.approx(corpus.FOREIGN_SHARE, abs=share)
    assert portion(by_flite, speaking) == pytest.approx(corpus.FLITE_SHARE, abs=share)
    assert portion(by_pico, speaking) == pytest.approx(corpus.PICO_SHARE, abs=share)
    assert portion(by_neural, speaking) == pytest.approx(corpus.NEURAL_SHARE, abs=share)
    assert portion(warped, speaking) == pytest.approx(corpus.WARPED_SHARE, abs=share)
    assert all(corpus.WARPS[0] <= spec.warp <= corpus.WARPS[1] for spec in warped)


def test_statistical_voices_come_on_top_and_change_nothing_else() -> None:
    with_them = replace(ALL_ENGINES, statistical=Statistical(Path("hts_engine"), Path("voices"), FESTIVAL))
    before = corpus.planned_clips(corpus.CorpusPlan(hours=3, engines=ALL_ENGINES))
    after = corpus.planned_clips(corpus.CorpusPlan(hours=3, engines=with_them))
    count = len(before["train"])
    assert after["train"][:count] == before["train"]
    assert {name: after[name] for name in after if name != "train"} == {
        name: before[name] for name in before if name != "train"
    }
    more = after["train"][count:]
    assert {spec.engine for spec in more} == {"statistical"}
    assert [spec.index for spec in more] == list(range(count, count + len(more)))
    names = {name for spec in more for name in spec.voice.partition(":")[0].split("+")}
    assert names == set(statistical.VOICES)
    mixed = sum("+" in spec.voice for spec in more) / len(more)
    assert mixed == pytest.approx(corpus.MIXED_SHARE, abs=0.1)
    # a speaking clip is longer than one of noise, so they are fewer than the share of the hours
    assert 0.6 * corpus.STATISTICAL_SHARE * count < len(more) < 1.1 * corpus.STATISTICAL_SHARE * count


def test_engines_that_are_not_there_are_done_without(tmp_path: Path) -> None:
    found = find_engines(tmp_path).found()
    assert (found["wordnet"], found["festival"], found["soundfont"]) == (False, False, False)


def test_generated_sentences_repeat_with_their_seed() -> None:
    assert generated_sentences(50, 1) == generated_sentences(50, 1) != generated_sentences(50, 2)
