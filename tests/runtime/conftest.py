"""Toy models on disk, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamtalk import Talker
from tests.runtime.toy import Toy


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="session")
def engine(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy") / "engine")


@pytest.fixture(scope="session")
def talker(engine: Path) -> Talker:
    return Talker.load(engine, threads=1)
