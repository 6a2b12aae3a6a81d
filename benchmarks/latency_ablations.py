"""Ours without one of its ideas at a time: other exports of the same model, and graphs that no export writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.latency_rows import CPU, NO_CACHE, ONE_THREAD, WHOLE_WINDOW, Row, hop_rows
from benchmarks.latency_runs import GraphRun, Seconds, hop_times
from benchmarks.latency_subject import PARITY, SEED, ParityError, Subject, exported
from streamtalk import Talker
from streamtalk_export.graph_files import trace
from streamtalk_export.network import DiffusionNetwork
from streamtalk_export.vqvae import VQDecoder

VARIANTS: Mapping[str, Mapping[str, list[str]]] = {
    "bundled": {
        ONE_THREAD: [],
        "hop-2": ["--hop", "2"],
        "hop-4": ["--hop", "4"],
        "history-64": ["--history", "64"],
        "decode-window-32": ["--decode-window", "32"],
    },
    "vocaset": {
        ONE_THREAD: [],
        "no-fold": ["--no-fold"],
        "hop-1": ["--hop", "1"],
        "hop-8": ["--hop", "8"],
        "decode-window-16": ["--decode-window", "16"],
    },
    "biwi": {ONE_THREAD: [], "decode-window-16": ["--decode-window", "16"]},
}
"""By preset: variants on whole hops, and the exporter's options for them. VOCASET's hop 8 runs in real time on two fast
cores, at the delay of a longer hop."""
WITHOUT = {"condition_predictor": NO_CACHE, "vq_decoder": WHOLE_WINDOW}
"""By stage: variants of that stage alone, see `naive_runs`."""


class WholeHistory(nn.Module):
    """The predictor without a cache: all of its window again for every frame."""

    def __init__(self, network: DiffusionNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, past: Tensor, audio: Tensor, style: Tensor) -> Tensor:
        """past [1, W, C], audio [1, W, A], style [1, E]; the newest condition [1, E]."""
        return self.network.conditions(past, audio, style)[:, -1]


class WholeWindow(nn.Module):
    """The decoder with every frame of its window, of which the newest is wanted."""

    def __init__(self, decoder: VQDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor, template: Tensor) -> Tensor:
        """latents [1, D, C], template [1, 3V]; all vertices [1, D, 3V]."""
        offsets: Tensor = self.decoder(latents)
        return template[:, None] + offsets


def naive_runs(given: Subject, threads: int) -> dict[str, GraphRun]:
    """The predictor without its cache and the decoder of whole windows, by stage, in onnxruntime.

    Raises ParityError where a graph differs from the torch that it was traced from.
    """
    m, model = given.manifest, given.model
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    modules: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        "condition_predictor": (
            WholeHistory(model.diff_ar_network),
            {
                "past": random(1, m.history, m.latent_width),
                "audio": random(1, m.history, m.audio_width),
                "style": random(1, m.condition_width),
            },
        ),
        "vq_decoder": (
            WholeWindow(model.autoencoder.decoder),
            {
                "latents": random(1, m.decode_window, m.latent_width),
                "template": random(1, 3 * m.n_vertices),
            },
        ),
    }
    runs = {}
    for stage, (module, inputs) in modules.items():
        graph = trace(module, inputs, ("made",), WITHOUT[stage]).SerializeToString()
        run = GraphRun(graph, {name: value.numpy() for name, value in inputs.items()}, threads)
        run()
        with torch.no_grad():
            wanted = module(*inputs.values()).numpy()
        difference = float(np.abs(run.outputs()[0] - wanted).max() / np.abs(wanted).max())
        if not difference <= PARITY:
            raise ParityError(
                f"{given.preset}: {WITHOUT[stage]} differs by {difference:.1e}; nothing was timed."
            )
        runs[stage] = run
    return runs


def variant_rows(given: Subject, frames: int, rounds: int, cache: Path) -> list[Row]:
    """Rows of variants of ours on one length, in turns with the default, whole hops."""
    folders = {"": given.folder}
    for name, options in VARIANTS[given.preset].items():
        folders[name] = exported(given.preset, cache, name, options) if options else given.folder
    talkers = {
        name: Talker.load(folder, CPU, threads=1 if name == ONE_THREAD else None)
        for name, folder in folders.items()
    }
    took: dict[str, list[Seconds]] = {name: [] for name in talkers}
    for _ in range(rounds):
        for name, talker in talkers.items():
            took[name].append(hop_times(talker, max(frames // rounds, 1)))
    rows: list[Row] = []
    for name, talker in talkers.items():
        if name:
            m, seconds = talker.manifest, np.concatenate(took[name])
            count = len(seconds) * m.hop
            own = hop_rows(given.preset, CPU, name, count / m.fps, seconds, m)
            rows += [row.lasting(count, None) for row in own]
    return rows
