"""Recorded faces in the release's layout: what is read, what is chosen, and how a wanting copy is refused."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soxr
from scipy.io import wavfile

from streamtalk_export.config import PRESETS, ModelConfig, load_config, parse_config
from streamtalk_export.errors import ExportError
from streamtalk_training.recorded import (
    LAYOUTS,
    RecordedDataError,
    RecordedSet,
    open_recorded,
    read_splits,
    read_wav,
)
from tests.training import made_up

PCM_STEP = 1 / 32768
SUBJECTS = made_up.SUBJECTS["vocaset"]


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.write_data(tmp_path_factory.mktemp(layout) / "data", layout)


def config_for(layout: str) -> ModelConfig:
    return parse_config(made_up.config_document(layout), "made up")


def opened(folder: Path, layout: str, settings: Path, config: ModelConfig | None = None) -> RecordedSet:
    made_up.write_settings(settings, layout)
    splits = read_splits(settings / "subjects.yaml")
    return open_recorded(LAYOUTS[layout], folder, config or config_for(layout), splits)


def test_clips_are_read_at_the_frame_rate_of_the_model(layout: str, source: Path, tmp_path: Path) -> None:
    data = opened(source, layout, tmp_path)
    clip = data.splits["train"][0]
    stored = np.load(clip.vertices)
    assert len(stored) == made_up.SECONDS * made_up.STORED_FPS[layout]
    motion = data.motion(clip)
    assert motion.shape == (made_up.SECONDS * made_up.FPS[layout], 3 * made_up.VERTICES)
    assert motion.dtype == np.float32
    wanted = stored[:: made_up.STORED_FPS[layout] // made_up.FPS[layout]] - data.templates[clip.subject]
    np.testing.assert_array_equal(motion, wanted)
    assert np.abs(motion).max() > made_up.OPENING / 10  # offsets, and they move
    assert len(data.pcm(clip)) == made_up.SECONDS * 16000


def test_splits_choose_subjects_and_sentences(layout: str, source: Path, tmp_path: Path) -> None:
    data = opened(source, layout, tmp_path)
    ann, bob, cyd = made_up.SUBJECTS[layout]
    assert data.speakers == (ann, bob)
    chosen = {name: [(r.subject, r.sentence) for r in clips] for name, clips in data.splits.items()}
    assert sorted(chosen["train"]) == [(who, number) for who in (ann, bob) for number in (1, 2, 3)]
    assert chosen["test_b"] == [(cyd, 1), (cyd, 4)]
    assert chosen["val"] == chosen["test_a"]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_papers_splits(name: str) -> None:
    splits = LAYOUTS[name].splits
    assert len(splits["train"].subjects) == PRESETS[name].predictor.id_dim
    unseen = {"vocaset": "test", "biwi": "test_b"}[name]
    assert not set(splits[unseen].subjects) & set(splits["train"].subjects)
    everyone = {subject for split in splits.values() for subject in split.subjects}
    assert len(everyone) == {"vocaset": 12, "biwi": 14}[name]


def test_wav_kinds(tmp_path: Path) -> None:
    tone = 0.5 * np.sin(np.arange(16000) * 0.1)
    stored = {
        "int16": np.round(tone * 32768).astype(np.int16),
        "int32": np.round(tone * 2**31).astype(np.int32),
        "float32": tone.astype(np.float32),
        "stereo": np.stack([tone, tone], 1).astype(np.float32),
    }
    for name, values in stored.items():
        wavfile.write(tmp_path / f"{name}.wav", 16000, values)
        np.testing.assert_allclose(read_wav(tmp_path / f"{name}.wav"), tone, atol=PCM_STEP)
    wavfile.write(tmp_path / "fast.wav", 48000, stored["float32"])
    np.testing.assert_allclose(
        read_wav(tmp_path / "fast.wav"),
        soxr.resample(stored["float32"], 48000, 16000),
        atol=PCM_STEP,
    )
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(RecordedDataError, match="not a readable WAV"):
        read_wav(tmp_path / "text.wav")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return made_up.write_data(tmp_path / "data", "vocaset")


def test_everything_missing_is_told_at_once(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "wav")
    templates = pickle.loads((copy / "templates.pkl").read_bytes())
    del templates[SUBJECTS[2]]
    (copy / "templates.pkl").write_bytes(pickle.dumps(templates))
    np.save(copy / "vertices_npy" / f"{SUBJECTS[0]}_sentence01.npy", np.zeros((8, 3), np.float32))
    with pytest.raises(RecordedDataError) as caught:
        opened(copy, "vocaset", tmp_path / "settings")
    told = str(caught.value)
    for part in (
        "no wav in",
        f"templates.pkl has no {SUBJECTS[2]}",
        f"`train` has no clip (vertices and sound) of {SUBJECTS[0]}, {SUBJECTS[1]}",
        f"`test_b` has no clip (vertices and sound) of {SUBJECTS[2]}",
        "--subjects FILE",
    ):
        assert part in told


def test_vertices_of_another_mesh_are_named(copy: Path, tmp_path: Path) -> None:
    name = f"{SUBJECTS[0]}_sentence01.npy"
    np.save(copy / "vertices_npy" / name, np.zeros((8, 3), np.float32))
    with pytest.raises(RecordedDataError, match=rf"{name} is \[8, 3\] .* wants \[T, 180\]"):
        opened(copy, "vocaset", tmp_path / "settings")


def test_a_file_without_its_partner_is_left_out(copy: Path, tmp_path: Path) -> None:
    (copy / "wav" / f"{SUBJECTS[0]}_sentence02.wav").unlink()
    data = opened(copy, "vocaset", tmp_path / "settings")
    assert data.unpaired == (f"vertices_npy/{SUBJECTS[0]}_sentence02.npy",)
    assert len(data.splits["train"]) == 5


def test_a_configuration_that_does_not_fit(copy: Path, tmp_path: Path) -> None:
    config = config_for("vocaset")
    predictor = msgspec.structs.replace(config.predictor, id_dim=5)
    audio = msgspec.structs.replace(config.audio, fps=25)
    wrong = msgspec.structs.replace(config, predictor=predictor, audio=audio)
    with pytest.raises(RecordedDataError) as caught:
        opened(copy, "vocaset", tmp_path / "settings", wrong)
    assert "names 2 subjects and the configuration has id_dim 5" in str(caught.value)
    assert "stores 60 frames a second and the configuration wants 25" in str(caught.value)


def test_the_papers_subjects_are_looked_for_by_default(copy: Path) -> None:
    with pytest.raises(RecordedDataError, match=r"(?s)FaceTalk_170728_03272_TA.*--subjects FILE"):
        open_recorded(LAYOUTS["vocaset"], copy, config_for("vocaset"))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1",)


def test_a_pickle_that_runs_code_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "templates.pkl").write_bytes(pickle.dumps({SUBJECTS[0]: Evil()}))
    with pytest.raises(ExportError, match="only numpy arrays are admitted"):
        opened(copy, "vocaset", tmp_path / "settings")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {subjects: [a], sentences: 1-x}", "names no splits"),
        ("train: {people: [a]}", "names no splits"),
        ("[1]", "names no splits"),
        ("train: {subjects: [a], sentences: 1-2}", "expected `train`, at least one `test"),
    ],
)
def test_splits_that_cannot_be(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "subjects.yaml").write_text(text)
    with pytest.raises(RecordedDataError, match=sentence):
        read_splits(tmp_path / "subjects.yaml")


def test_the_made_up_configuration_is_a_file_too(tmp_path: Path) -> None:
    made_up.write_settings(tmp_path, "biwi")
    assert load_config(tmp_path / "config.yaml") == config_for("biwi")
