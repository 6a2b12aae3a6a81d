"""The release's test procedure: how it differs from offline generation, and where regions come from."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from streamtalk_export.checkpoint import random_model
from streamtalk_export.config import parse_config
from streamtalk_export.graphs import diffusion_head
from streamtalk_export.hubert import hubert_config, resample_offline
from streamtalk_export.model import TalkerModel, generate_offline
from streamtalk_export.sampler import SamplerTable, sampler_table
from streamtalk_training import recorded_scores
from streamtalk_training.recorded import LAYOUTS, RecordedDataError, RecordedSet, open_recorded, read_splits
from streamtalk_training.recorded_scores import (
    Figures,
    Regions,
    averaged,
    clip_latents,
    figures,
    latents_as_tested,
    read_regions,
    score,
)
from tests.training import made_up

FOLDED = 1e-4
"""Folded steps are the unrolled ones up to float32's rounding over 50 steps, 64 frames in a row."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RecordedSet:
    root = tmp_path_factory.mktemp("scores")
    made_up.write_data(root / "data", "biwi")
    made_up.write_settings(root / "settings", "biwi")
    config = parse_config(made_up.config_document("biwi"), "made up")
    splits = read_splits(root / "settings" / "subjects.yaml")
    return open_recorded(LAYOUTS["biwi"], root / "data", config, splits)


@pytest.fixture(scope="module")
def model(data: RecordedSet) -> TalkerModel:
    hubert = hubert_config(data.folder.parent / "settings" / "hubert_config.json")
    return random_model(data.config, hubert, 1)


@pytest.fixture(scope="module")
def table_(data: RecordedSet) -> SamplerTable:
    return sampler_table(data.config.schedule, data.config.steps, "ddim")


@pytest.fixture(scope="module")
def head(model: TalkerModel, table_: SamplerTable) -> torch.nn.Module:
    return diffusion_head(model.diff_ar_network, table_, fold=True)


@pytest.mark.parametrize("window", [60, 8])
def test_with_the_offline_start_it_is_offline_generation(
    model: TalkerModel, head: torch.nn.Module, table_: SamplerTable, window: int
) -> None:
    frames, width = window + 4, model.config.predictor.vq_dim
    features = torch.randn(frames, model.config.predictor.audio_encode_dim)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(min(i + 1, window), width, generator=generator) for i in range(frames)]
    zeros = torch.zeros(model.config.vq.n_vert)
    expected = generate_offline(model, features, torch.cat(rows), 1, table_, zeros, window)
    latents = latents_as_tested(
        model,
        head,
        features[None],
        model.autoencoder.start_latent(),
        model.diff_ar_network.obj_vector.weight,
        torch.Generator().manual_seed(3),
        window,
    )
    torch.testing.assert_close(latents[1], expected.latents, rtol=0, atol=FOLDED)


def test_a_clip_starts_from_its_true_motion_and_has_its_length(
    data: RecordedSet,
    model: TalkerModel,
    head: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, torch.Tensor] = {}

    def spy(_model: object, _head: object, features: torch.Tensor, start: torch.Tensor, *_: object) -> None:
        given.update(features=features, start=start)

    monkeypatch.setattr(recorded_scores, "latents_as_tested", spy)
    clip = data.splits["test_a"][0]
    clip_latents(data, model, head, clip, torch.Generator())
    motion = torch.from_numpy(data.motion(clip))
    still_first = torch.cat([torch.zeros_like(motion[:1]), motion])
    start = model.autoencoder.encode(still_first[None])[0][0, 0]
    torch.testing.assert_close(given["start"], start, rtol=0, atol=0)
    assert not torch.equal(start, model.autoencoder.start_latent())
    features = model.audio_encoder(torch.from_numpy(data.pcm(clip))[None])
    stretched = resample_offline(features, len(motion))
    assert stretched.shape[1] != features.shape[1]
    torch.testing.assert_close(given["features"], stretched, rtol=0, atol=0)


def test_unseen_speakers_borrow_every_training_identity(
    data: RecordedSet, model: TalkerModel, head: torch.nn.Module
) -> None:
    seen = clip_latents(data, model, head, data.splits["test_a"][0], torch.Generator())
    unseen = clip_latents(data, model, head, data.splits["test_b"][0], torch.Generator())
    assert (len(seen), len(unseen)) == (1, len(data.speakers))
    assert not torch.equal(unseen[0], unseen[1])


def test_an_unseen_speakers_figures_are_the_mean_over_identities(
    data: RecordedSet, model: TalkerModel
) -> None:
    regions = read_regions(data.folder, "biwi", made_up.VERTICES)
    together = score(data, model, regions, "test_b").model
    # The same clips told to be of each training subject, one after the other, on their own template.
    each = []
    for speaker in data.speakers:
        clips = data.splits["test_b"]
        templates = dict.fromkeys(data.speakers, data.templates[clips[0].subject])
        alike = tuple(replace(clip, subject=speaker) for clip in clips)
        posed = replace(data, templates=templates, splits={"test_b": alike})
        each.append(score(posed, model, regions, "test_b").model)
    for name, value in together.items():
        assert value == pytest.approx(np.mean([row[name] for row in each]), rel=1e-4, abs=1e-6)


def test_figures_by_hand() -> None:
    template = np.zeros((6, 3), np.float32)
    true = np.zeros((2, 6, 3), np.float32)
    true[1, 3, 1] = 2  # an upper-face vertex: squared displacement 0, then 4, deviation 2
    predicted = np.zeros_like(true)
    predicted[0, 0, 0] = 3  # a lip vertex 3 off in one of two frames, and its pair that far apart
    regions = Regions(np.array([0, 1]), np.array([2, 3]), np.array([[0, 1]]))
    found = figures(predicted, true, template, regions)
    assert found == Figures(lve=4.5, fdd=1.0, mod=1.5)
    assert figures(predicted, true, template, replace(regions, lip_pairs=None)).mod is None


def test_longer_clips_count_more_but_for_fdd() -> None:
    rows = [(30, Figures(1.0, 1.0, 1.0)), (90, Figures(5.0, 5.0, 5.0))]
    assert averaged(rows) == {"lve": 4.0, "fdd": 3.0, "mod": 4.0}
    assert "mod" not in averaged([*rows, (1, Figures(0.0, 0.0, None))])


def test_regions_of_both_layouts(tmp_path: Path) -> None:
    for layout in sorted(LAYOUTS):
        folder = made_up.write_data(tmp_path / layout, layout)
        regions = read_regions(folder, layout, made_up.VERTICES)
        np.testing.assert_array_equal(regions.lips, made_up.LIPS)
        np.testing.assert_array_equal(regions.upper_face, made_up.UPPER_FACE)  # the masks overlap
        assert regions.lip_pairs is not None
        np.testing.assert_array_equal(regions.lip_pairs, made_up.LIPS.reshape(-1, 2))
        (folder / "lip_pairs.txt").unlink()
        assert read_regions(folder, layout, made_up.VERTICES).lip_pairs is None
        published = read_regions(folder, layout, 5023).lip_pairs
        assert published is not None
        assert published[0].tolist() == [2865, 2907]


def test_regions_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RecordedDataError, match=r"no lve\.txt and no fdd\.txt in"):
        read_regions(tmp_path, "biwi", 10)
    with pytest.raises(RecordedDataError, match=r"no FLAME_masks\.pkl in"):
        read_regions(tmp_path, "vocaset", 10)
    (tmp_path / "FLAME_masks.pkl").write_bytes(pickle.dumps({"lips": np.arange(3)}))
    with pytest.raises(RecordedDataError, match="has no eye_region, forehead"):
        read_regions(tmp_path, "vocaset", 10)
    (tmp_path / "lve.txt").write_text("1, 2, 30")
    (tmp_path / "fdd.txt").write_text("4 5\n6")
    with pytest.raises(RecordedDataError, match="`lips` is empty or names vertices beyond 10"):
        read_regions(tmp_path, "biwi", 10)
    (tmp_path / "lve.txt").write_text("1, two")
    with pytest.raises(RecordedDataError, match="no list of vertex numbers"):
        read_regions(tmp_path, "biwi", 10)
