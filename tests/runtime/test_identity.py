"""Whose colours are drawn: a speaker's own, a blend's mean, and one set for all in older files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from streamtalk import SpeakerError
from streamtalk.identity import Identity, read_identity
from streamtalk.model import sha256_of
from tests.runtime.toy import Toy


def read(toy: Toy, directory: Path, **changes: npt.NDArray[Any] | None) -> Identity:
    """The toy's identity through a file in which arrays are replaced, or left out where None."""
    arrays: dict[str, Any] = {k: v for k, v in {**toy.identity, **changes}.items() if v is not None}
    path = directory / toy.manifest.identity
    np.savez(path, **arrays)
    return read_identity(directory, msgspec.structs.replace(toy.manifest, identity_sha256=sha256_of(path)))


def test_speakers_have_their_own_colours(toy: Toy, tmp_path: Path) -> None:
    identity, paint = read(toy, tmp_path), toy.identity["identity_colors"]
    assert len({colors.tobytes() for colors in paint}) == len(paint)
    np.testing.assert_array_equal(identity.colors_of(None), paint[0], strict=True)
    np.testing.assert_array_equal(identity.colors_of("cy"), paint[2], strict=True)
    np.testing.assert_array_equal(identity.colors_of(1), paint[1], strict=True)
    with pytest.raises(SpeakerError, match="zoe"):
        identity.colors_of("zoe")


def test_a_blend_has_the_mean_colours(toy: Toy, tmp_path: Path) -> None:
    paint = np.zeros_like(toy.identity["identity_colors"])
    paint[0], paint[2] = 255, 100
    colors = read(toy, tmp_path, identity_colors=paint).colors_of({"ada": 1, "bo": 1, "cy": 2})
    assert colors is not None
    np.testing.assert_array_equal(colors, np.full_like(paint[0], 114), strict=True)  # 63.75 + 0 + 50
    assert not colors.flags.writeable


@pytest.mark.parametrize("speaker", [None, "bo", {"ada": 1, "cy": 1}])
def test_older_files_have_one_set_for_all(toy: Toy, tmp_path: Path, speaker: Any) -> None:
    identity = read(toy, tmp_path, identity_colors=None)
    assert identity.speaker_colors is None
    np.testing.assert_array_equal(identity.colors_of(speaker), toy.identity["colors"], strict=True)
    assert read(toy, tmp_path, identity_colors=None, colors=None).colors_of(speaker) is None
