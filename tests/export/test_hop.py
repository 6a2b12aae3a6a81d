"""The hop graph against the composition of the stage graphs: rows, windows that fill and forget, inactive rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from streamtalk.model import read_manifest
from streamtalk_export.cli import main
from tests.export.golden import Array, Driver, Golden

TOLERANCE = 2e-5
"""The issue's bound, absolute; measured below 1e-5."""
FRAMES = 300

Exported = Callable[[Golden, str], Driver]


class Rows:
    """Streams that start at different times, by stage graphs one by one and by a hop graph together."""

    def __init__(self, driver: Driver, graph: str, seed: int = 0) -> None:
        self.driver, self.graph = driver, graph
        m = self.m = driver.manifest
        self.inputs = driver.zeros(graph)
        self.count = len(self.inputs["active"])
        self.rng = np.random.default_rng(seed)
        with np.load(driver.directory / "identity.npz") as identity:
            self.inputs["latents"][:, -1] = identity["start_latent"]
        for name in ("style", "template"):
            self.inputs[name][:] = self.rng.standard_normal(self.inputs[name].shape)
        self.states = [
            {name: self.inputs[name][row : row + 1].copy() for name in ("kv_cache", "latents")}
            for row in range(self.count)
        ]
        self.frames = np.zeros(self.count, int)
        self.period, self.hop = m.period, m.hop

    def step(self, active: Array) -> float:
        """Run a hop of the rows in `active` in both ways; returns the largest difference. Rows that rest must keep
        their state to the bit.
        """
        m, inputs = self.m, self.inputs
        for name in ("pcm", "noise"):
            inputs[name][:] = self.rng.standard_normal(inputs[name].shape) * (0.1 if name == "pcm" else 1.0)
        inputs["active"][:] = active
        for name, counts in self.counters(self.frames).items():
            inputs[name][:] = counts
        out = self.driver.run(self.graph, **inputs)
        worst = 0.0
        for row in range(self.count):
            if not active[row]:
                for name in ("kv_cache", "latents"):
                    assert np.array_equal(out[f"{name}_out"][row], inputs[name][row])
                continue
            want = self.by_stages(row)
            pairs = [(out["vertices"][row], want)]
            pairs += [(out[f"{name}_out"][row], self.states[row][name][0]) for name in self.states[row]]
            worst = max(worst, *(float(np.abs(got - wanted).max()) for got, wanted in pairs))
        self.frames += m.hop * active
        inputs["kv_cache"], inputs["latents"] = out["kv_cache_out"], out["latents_out"]
        return worst

    def counters(self, frames: Array) -> dict[str, Array]:
        m = self.m
        return {
            "position": frames % m.period,
            "valid_frames": np.minimum(frames, m.history),
            "valid_latents": np.minimum(frames + 1, m.decode_window),
        }

    def by_stages(self, row: int) -> Array:
        """Vertices [hop, V, 3] of a row, frame by frame."""
        run, state = self.driver.run, self.states[row]
        one = {name: value[row : row + 1] for name, value in self.inputs.items()}
        features = run("audio_encoder", pcm=one["pcm"])["audio_features"]
        vertices = []
        for place in range(self.hop):
            counts = self.counters(self.frames[row : row + 1] + place)
            made = run(
                "condition_predictor",
                audio_feature=features[:, place],
                previous_latent=state["latents"][:, -1],
                style=one["style"],
                position=counts["position"],
                kv_cache=state["kv_cache"],
                valid_frames=counts["valid_frames"],
            )
            latent = run("diffusion_head", noise=one["noise"][:, place], condition=made["condition"])[
                "latent"
            ]
            state["kv_cache"] = made["kv_cache_out"]
            state["latents"] = np.concatenate([state["latents"][:, 1:], latent[:, None]], axis=1)
            valid = np.minimum(counts["valid_latents"] + 1, self.m.decode_window)
            template = one["template"]
            out = run("vq_decoder", latents=state["latents"], valid_latents=valid, template=template)
            vertices.append(out["vertices"][0])
        return np.stack(vertices)


@pytest.fixture(scope="module")
def small(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """A golden checkpoint with windows that fill within the test."""
    out = tmp_path_factory.mktemp("hop") / "model"
    options = "--history 13 --decode-window 9 --batch 3".split()
    assert main([*golden.arguments, *options, "--out", str(out)]) == 0
    return Driver(out)


@pytest.mark.parametrize("graph", ["hop", "hop_b3"])
def test_hops_are_their_frames(small: Driver, graph: str) -> None:
    """Rows start one after the other and rest now and then; both windows fill and forget."""
    rows = Rows(small, graph)
    hops = FRAMES // rows.hop
    worst = 0.0
    for hop in range(hops):
        started = hop >= 2 * np.arange(rows.count)
        resting = (hop + np.arange(rows.count)) % 7 == 0
        worst = max(worst, rows.step(started & (~resting | (rows.count == 1))))
    assert rows.frames[0] > 2 * max(small.manifest.history, small.manifest.decode_window)
    assert worst <= TOLERANCE


@pytest.mark.parametrize("sizes", ["--hop 1", "--hop 3 --history 1 --decode-window 2", "--hop 8 --history 5"])
def test_windows_shorter_than_a_hop(golden: Golden, sizes: str, tmp_path: Path) -> None:
    assert main([*golden.arguments, *sizes.split(), "--out", str(tmp_path / "model")]) == 0
    rows = Rows(Driver(tmp_path / "model"), "hop")
    assert max(rows.step(np.ones(1, bool)) for _ in range(40 // rows.hop)) <= TOLERANCE


def test_the_bundled_hop_is_its_stages(bundled: Path) -> None:
    """Its head draws events: each hop starts from the state that the stages left."""
    rows = Rows(Driver(bundled), "hop_b8")
    for hop in range(FRAMES // 10):
        assert rows.step(np.arange(8) % 3 != hop % 3) <= TOLERANCE
        for row, state in enumerate(rows.states):
            for name, value in state.items():
                rows.inputs[name][row] = value[0]


def test_empty_places_of_the_state_do_not_matter(golden: Golden, exported: Exported) -> None:
    driver = exported(golden, "ddim")
    rng = np.random.default_rng(1)
    inputs = driver.zeros("hop")
    for name in ("noise", "pcm", "style"):
        inputs[name][:] = rng.standard_normal(inputs[name].shape)
    inputs["active"][:], inputs["valid_frames"][:], inputs["valid_latents"][:] = True, 3, 4
    clean = driver.run("hop", **inputs)["vertices"]
    inputs["kv_cache"][..., :-3, :] = 7.0
    inputs["latents"][:, :-4] = -5.0
    np.testing.assert_allclose(driver.run("hop", **inputs)["vertices"], clean, rtol=0, atol=1e-6)
    inputs["kv_cache"][..., -3, :] = 7.0
    assert np.abs(driver.run("hop", **inputs)["vertices"] - clean).max() > 1e-4


def test_a_row_is_the_same_whoever_its_neighbours_are(golden: Golden, exported: Exported) -> None:
    driver = exported(golden, "ddim")
    rng = np.random.default_rng(0)
    inputs = driver.zeros("hop_b3")
    drawn = ("kv_cache", "latents", "noise", "pcm", "style", "template")
    for name in drawn:
        inputs[name][:] = rng.standard_normal(inputs[name].shape)
    inputs["active"][:] = [True, False, True]
    inputs["valid_frames"][:], inputs["valid_latents"][:] = [3, 8, 5], [4, 8, 6]
    before = driver.run("hop_b3", **inputs)
    for name in drawn:
        inputs[name][1:] = rng.standard_normal(inputs[name][1:].shape)
    after = driver.run("hop_b3", **inputs)
    for name in ("vertices", "kv_cache_out", "latents_out"):
        assert np.array_equal(after[name][0], before[name][0])
    assert np.abs(after["vertices"][2] - before["vertices"][2]).max() > 1e-3


def test_graphs_share_their_weights(golden: Golden, exported: Exported) -> None:
    """Each tensor lies once in the file of weights, whatever the number of graphs; small ones are in the graphs."""
    driver = exported(golden, "ddim")
    manifest, places = read_manifest(driver.directory), {}
    for graph in manifest.graphs.values():
        model = onnx.load(driver.directory / graph.file, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.external_data:
                entry = {item.key: item.value for item in tensor.external_data}
                places[int(entry["offset"])] = int(entry["length"])
                assert entry["location"] == "weights.fp32.bin"
                assert entry["location"] in graph.files
    content = (driver.directory / "weights.fp32.bin").read_bytes()
    distinct = {content[start : start + length] for start, length in places.items()}
    assert len(distinct) == len(places)
    assert len(content) <= 1.05 * sum(places.values())
