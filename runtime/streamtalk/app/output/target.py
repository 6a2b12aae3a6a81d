"""Checking an output path before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from streamtalk.errors import OutputError


def writable(path: Path) -> Path:
    """`path` with links followed, if a file can be made there or replaced. Raises OutputError."""
    target = path.resolve()
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {folder}. Make it first.")
    if target.exists() and not target.is_file():
        raise OutputError(f"{path} is not a regular file and will not be replaced. Name a file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: no permission for the folder {folder}.")
    return target


def partial(target: Path) -> Path:
    """Where the file grows until it is whole."""
    return target.with_name(target.name + ".part")
