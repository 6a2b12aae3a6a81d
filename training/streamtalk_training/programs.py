"""Programs of Debian packages that were unpacked and not installed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def with_libraries(libraries: Iterable[Path]) -> dict[str, str]:
    """The environment for a program that needs the shared `libraries`, wherever they were unpacked; with none of them
    it is this process's own."""
    folders = sorted({str(path.parent) for path in libraries})
    if not folders:
        return dict(os.environ)
    return {**os.environ, "LD_LIBRARY_PATH": ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])}
