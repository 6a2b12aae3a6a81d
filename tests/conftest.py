from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, exported."""
    from streamtalk_export.cli import main

    out = tmp_path_factory.mktemp("bundled") / "model"
    assert main(["--out", str(out)]) == 0
    return out
