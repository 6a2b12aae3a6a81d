"""The exported stage graphs, driven frame by frame through onnxruntime, against the golden vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from streamtalk.model import sha256_of
from streamtalk_export.graph_files import IR_VERSION, OPERATORS, OPSET
from tests.export.golden import Array, Driver, Golden

TOLERANCE = 2e-5
"""Vertices, latents and conditions over all frames; measured below 1e-5."""
FEATURE_TOLERANCE = 1e-4
"""Offline audio features."""

Exported = Callable[[Golden, str], Driver]
samplers = pytest.mark.parametrize("sampler", ["ddim", "ddim_legacy"])


def close(got: Array, want: Array, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, strict=True)


def style_of(golden: Golden) -> Array:
    return golden.model.diff_ar_network.obj_vector.weight[int(golden["speaker"])].numpy()


@samplers
def test_stages(golden: Golden, exported: Exported, sampler: str) -> None:
    driver = exported(golden, sampler)
    m = driver.manifest
    predictor = driver.zeros("condition_predictor")
    predictor["style"][:] = style_of(golden)
    latents = driver.zeros("vq_decoder")["latents"]
    latents[:, -1] = golden["start_latent"]
    for i, feature in enumerate(golden["features_offline"]):
        predictor["audio_feature"][:] = feature
        predictor["previous_latent"] = latents[:, -1]
        predictor["position"][:] = i % m.period
        predictor["valid_frames"][:] = min(i, m.history)
        out = driver.run("condition_predictor", **predictor)
        predictor["kv_cache"] = out["kv_cache_out"]
        close(out["condition"][0], golden[f"grow_{sampler}_conditions"][i])
        noise = golden["noise"][None, i]
        latent = driver.run("diffusion_head", noise=noise, condition=out["condition"])["latent"]
        close(latent[0], golden[f"grow_{sampler}_latents"][i])
        latents = np.concatenate([latents[:, 1:], latent[:, None]], axis=1)
        seen = np.array([min(i + 2, m.decode_window)])
        template = golden["template"][None]
        vertices = driver.run("vq_decoder", latents=latents, valid_latents=seen, template=template)[
            "vertices"
        ]
        close(vertices.reshape(-1), golden[f"grow_{sampler}_vertices"][i])


def test_offline_features(golden: Golden, exported: Exported) -> None:
    driver = exported(golden, "ddim")
    got = driver.run("audio_encoder_offline", pcm=golden["pcm"][None])["audio_features"]
    close(got[0], golden["features_offline"], FEATURE_TOLERANCE)
    # Another length, so that nothing of the traced example has stuck.
    shorter = driver.run("audio_encoder_offline", pcm=golden["pcm"][None, :20000])["audio_features"]
    features = (20000 - 400) // 320 + 1
    assert shorter.shape[1] == features * golden.config.fps // 50


def test_window_that_has_filled(golden: Golden, exported: Exported) -> None:
    """A decode window full of latents is the release's decoder on those latents."""
    import torch

    driver = exported(golden, "ddim")
    D = driver.manifest.decode_window
    latents = (
        np.random.default_rng(2).standard_normal((1, D, driver.manifest.latent_width)).astype(np.float32)
    )
    template = golden["template"][None]
    got = driver.run("vq_decoder", latents=latents, valid_latents=np.array([D]), template=template)[
        "vertices"
    ]
    with torch.no_grad():
        want = golden.model.autoencoder.decoder(torch.from_numpy(latents))[0, -1].numpy()
    close(got.reshape(-1), template[0] + want)


def test_contract_of_every_graph(golden: Golden, exported: Exported) -> None:
    driver = exported(golden, "ddim")
    stages = {"audio_encoder", "condition_predictor", "diffusion_head", "vq_decoder"}
    assert set(driver.manifest.graphs) == stages | {"hop", "hop_b3", "audio_encoder_offline"}
    for name, graph in driver.manifest.graphs.items():
        model = onnx.load(driver.directory / graph.file)
        onnx.checker.check_model(model, full_check=True)
        assert (model.ir_version, model.opset_import[0].version) == (IR_VERSION, OPSET)
        assert {node.op_type for node in model.graph.node} <= OPERATORS
        assert graph.files == {file: sha256_of(driver.directory / file) for file in graph.files}
        static = all(isinstance(size, int) for tensor in graph.inputs for size in tensor.shape)
        assert static == (name != "audio_encoder_offline")


def test_onnxruntime_makes_one_kernel_of_gelu(golden: Golden, exported: Exported, tmp_path: Path) -> None:
    driver = exported(golden, "ddim")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    for name in ("audio_encoder", "vq_decoder", "hop"):
        graph = driver.directory / f"{name}.onnx"
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        before = [n.op_type for n in onnx.load(graph).graph.node]
        after = [
            n.op_type for n in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
        ]
        assert "Erf" not in after
        assert after.count("Gelu") + after.count("BiasGelu") == before.count("Erf") > 0


def test_names_shapes_and_types(golden: Golden, exported: Exported) -> None:
    """The table of the design, written out."""
    c, m = golden.config, exported(golden, "ddim").manifest
    A, C, E = c.predictor.audio_encode_dim, c.predictor.vq_dim, c.predictor.latent_dim
    V, H, W, D = c.n_vertices, c.predictor.n_heads, m.history, m.decode_window
    cache, latents = (1, 2, 2, H, W, E // H), (1, D, C)
    want: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
        "audio_encoder": ({"pcm": (1, m.window_samples)}, {"audio_features": (1, m.hop, A)}),
        "condition_predictor": (
            {
                "audio_feature": (1, A),
                "previous_latent": (1, C),
                "style": (1, E),
                "position": (1,),
                "kv_cache": cache,
                "valid_frames": (1,),
            },
            {"condition": (1, E), "kv_cache_out": cache},
        ),
        "diffusion_head": ({"noise": (1, C), "condition": (1, E)}, {"latent": (1, C)}),
        "vq_decoder": (
            {"latents": latents, "valid_latents": (1,), "template": (1, 3 * V)},
            {"vertices": (1, V, 3)},
        ),
    }
    for rows, name in ((1, "hop"), (3, "hop_b3")):
        cache, latents = (rows, *cache[1:]), (rows, *latents[1:])
        want[name] = (
            {
                "pcm": (rows, m.window_samples),
                "noise": (rows, m.hop, C),
                "style": (rows, E),
                "template": (rows, 3 * V),
                "position": (rows,),
                "valid_frames": (rows,),
                "valid_latents": (rows,),
                "kv_cache": cache,
                "latents": latents,
                "active": (rows,),
            },
            {"vertices": (rows, m.hop, V, 3), "kv_cache_out": cache, "latents_out": latents},
        )
    types = {"position": "int64", "valid_frames": "int64", "valid_latents": "int64", "active": "bool"}
    for name, (inputs, outputs) in want.items():
        graph = m.graphs[name]
        assert {t.name: t.shape for t in graph.inputs} == inputs
        assert {t.name: t.shape for t in graph.outputs} == outputs
        assert all(t.dtype == types.get(t.name, "float32") for t in (*graph.inputs, *graph.outputs))
    offline = m.graphs["audio_encoder_offline"]
    assert (offline.inputs[0].name, offline.inputs[0].shape[0]) == ("pcm", 1)
    assert (offline.outputs[0].name, offline.outputs[0].shape[2]) == ("audio_features", A)


def test_more_valid_latents_than_slots_are_all_of_them(golden: Golden, exported: Exported) -> None:
    driver = exported(golden, "ddim")
    D = driver.manifest.decode_window
    inputs = driver.zeros("vq_decoder")
    inputs["latents"][:] = np.random.default_rng(3).standard_normal(inputs["latents"].shape)
    full, beyond = (
        driver.run("vq_decoder", **{**inputs, "valid_latents": np.array([n])})["vertices"] for n in (D, D + 9)
    )
    assert np.array_equal(full, beyond)


def test_certificate_holds(golden: Golden, exported: Exported) -> None:
    parity = exported(golden, "ddim").manifest.parity
    gated = [line for line in parity if line.bound is not None]
    assert {line.graph for line in gated} == set(exported(golden, "ddim").manifest.graphs)
    assert not any(line.missed for line in gated)
    assert any("streaming_vs_offline" in line.measure for line in parity)
