"""The optional packages of the viewer, imported where they are asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from streamtalk.errors import MissingDependencyError


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises MissingDependencyError, which says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {module.partition('.')[0]}, which does not import here ({error}). "
            "Install it with: pip install 'streamtalk[viewer]'"
        ) from error
