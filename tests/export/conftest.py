from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from streamtalk_export.cli import main
from tests.export.golden import NAMES, Driver, Golden, load_golden

COVERS_CLIP = 100
"""History and decode window that cover every golden clip (95 frames and the start latent)."""


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Golden, str], Driver]:
    """Exports a golden checkpoint through the command line, once for each preset and sampler."""

    @cache
    def export(folder: Path, sampler: str) -> Driver:
        root = tmp_path_factory.mktemp("export")
        template = root / "template.npy"
        with np.load(folder / "golden.npz") as arrays:
            np.save(template, arrays["template"])
        golden = load_golden(folder.name)
        window = str(COVERS_CLIP)
        arguments = [*golden.arguments, "--template", str(template), "--out", str(root / "model")]
        arguments += ["--history", window, "--decode-window", window, "--sampler", sampler, "--batch", "3"]
        assert main(arguments) == 0
        return Driver(root / "model")

    return lambda golden, sampler: export(golden.folder, sampler)
