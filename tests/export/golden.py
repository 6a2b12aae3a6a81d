"""Access to the golden vectors and a driver for exported graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from streamtalk.model import Manifest, read_manifest
from streamtalk_export.checkpoint import load_model
from streamtalk_export.config import ModelConfig, load_config
from streamtalk_export.hubert import hubert_config
from streamtalk_export.model import TalkerModel

Array = npt.NDArray[Any]
DATA = Path(__file__).parents[1] / "data"
NAMES = ("vocaset_small", "biwi_small")


@dataclass(frozen=True)
class Golden:
    """One folder of golden vectors with its model."""

    folder: Path
    arrays: dict[str, Array]
    config: ModelConfig
    model: TalkerModel

    def __getitem__(self, key: str) -> Array:
        return self.arrays[key]

    @property
    def arguments(self) -> list[str]:
        """Command line of the exporter for this checkpoint."""
        f = self.folder
        return [
            *("--checkpoint", str(f / "checkpoint.ckpt"), "--config", str(f / "config.yaml")),
            *("--hubert-config", str(f / "hubert_config.json")),
        ]


def load_golden(name: str) -> Golden:
    folder = DATA / name
    config = load_config(folder / "config.yaml")
    with np.load(folder / "golden.npz") as archive:
        arrays = dict(archive)
    model = load_model(config, hubert_config(folder / "hubert_config.json"), folder / "checkpoint.ckpt")
    return Golden(folder, arrays, config, model)


class Driver:
    """Runs the graphs of an exported directory by name, as somebody without this project's runtime would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, **inputs: Array) -> dict[str, Array]:
        if graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._sessions[graph] = onnxruntime.InferenceSession(
                str(self.directory / f"{graph}.onnx"), options, providers=["CPUExecutionProvider"]
            )
        session = self._sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    def zeros(self, graph: str) -> dict[str, Array]:
        """Zero inputs of a graph's shapes and dtypes."""
        return {t.name: np.zeros(t.shape, t.dtype) for t in self.manifest.graphs[graph].inputs}  # type: ignore[arg-type]
