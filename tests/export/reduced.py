"""Exported models with graphs of a lower precision beside the float32 ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from streamtalk.model import FILE_NAME, Manifest, Precision, graph_key, read_manifest
from streamtalk_export.onnx_file import write_reduced
from tests.export.golden import Array


def with_reduced(
    source: Path, target: Path, precision: Precision, names: Iterable[str] | None = None
) -> tuple[Path, Manifest, dict[str, Array]]:
    """A copy of an exported model with the graphs `names` (default: all) at a precision as well; its manifest and its
    identities."""
    shutil.copytree(source, target)
    manifest = read_manifest(target)
    made = {
        graph_key(name, precision): write_reduced(target, manifest.graphs[name], precision)
        for name in names or manifest.graphs
    }
    manifest = msgspec.structs.replace(manifest, graphs={**manifest.graphs, **made})
    (target / FILE_NAME).write_bytes(msgspec.json.encode(manifest))
    with np.load(target / manifest.identity) as identity:
        return target, manifest, dict(identity)
