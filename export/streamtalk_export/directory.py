"""Model directories that take their place whole, or leave what was there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from streamtalk import OutputError, exclusive, signals_after
from streamtalk.model import FILE_NAME
from streamtalk_export.errors import ExportError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` when the block ends well, and vanishes when it does not. Raises ExportError."""
    try:
        out = out.resolve()  # a link stays, and what it points to is replaced
        if out.exists() and not (_is_export(out) or (out.is_dir() and not any(out.iterdir()))):
            raise ExportError(f"{out} exists and is not an exported model; name another --out or remove it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"Cannot write to {out.parent}: {error.strerror}.") from error
    except RuntimeError as error:  # of a loop of links, before Python 3.13
        raise ExportError(f"Cannot write to {out}: {error}.") from error
    try:
        yield building
        building.chmod(0o755)
        with ExitStack() as stack:
            with suppress(OutputError):  # nowhere to lock: two at once may then see each other's
                stack.enter_context(exclusive(out))
            _take_place(building, out)
    except OSError as error:
        raise ExportError(f"Writing {out} failed: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_export(directory: Path) -> bool:
    """Whether a folder holds a manifest of ours, of whatever version: other programs have files of that name."""
    try:
        found = json.loads((directory / FILE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"schema", "graphs", "checkpoint_sha256"} <= found.keys()


def _take_place(building: Path, out: Path) -> None:
    """Rename a folder to `out`, and remove what was there; or leave all as it is. Raises OSError."""
    if not out.exists():
        building.replace(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    with signals_after():
        try:
            out.replace(old)
        except OSError:
            old.rmdir()
            raise
        try:
            building.replace(out)
        except OSError:
            old.replace(out)
            raise
    shutil.rmtree(old, ignore_errors=True)
