"""Float16 graphs: where it is written, and what it costs over a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from streamtalk.model import Manifest
from streamtalk_export import half, reduced_certificate
from streamtalk_export.drive import Probe
from streamtalk_export.half import hold_roundings, to_convolutions, to_half
from streamtalk_export.reduced_certificate import (
    BOUNDS,
    PROBE_DRAWS,
    PROBE_SHARE,
    certify_reduced,
    make_probe,
)
from tests.export.golden import Array, Driver, Golden
from tests.export.reduced import with_reduced

SECONDS = 4
"""Of the streams here; every export with --precision fp16 runs 30 s."""

Exported = Callable[[Golden, str], Driver]


@pytest.fixture(scope="session")
def bundled_half(
    bundled: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest, dict[str, Array]]:
    return with_reduced(bundled, tmp_path_factory.mktemp("half") / "model", "fp16")


def products(model: onnx.ModelProto) -> dict[str, set[str]]:
    """Names of the weights of products, by the type they are stored in."""
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    found: dict[str, set[str]] = {"half": set(), "float": set()}
    for node in model.graph.node:
        if node.op_type in half.PRODUCTS:
            for name in node.input:
                if kinds.get(name) == TensorProto.FLOAT16:
                    found["half"].add(name)
                elif kinds.get(name) == TensorProto.FLOAT:
                    found["float"].add(name)
    return found


def test_islands_of_the_released_presets(golden: Golden, exported: Exported) -> None:
    """The table of the design: what stays float32. The decoder's convolution is a product whose weight the tracer
    names.
    """
    directory = exported(golden, "ddim").directory

    def kept(name: str) -> set[str]:
        model = to_half(onnx.load(directory / f"{name}.onnx"))
        sizes = {t.name: t.dims for t in model.graph.initializer}
        found = products(model)["float"]
        return {"convolution" if sizes[n][0] == 5 * sizes[n][-1] else n for n in found}

    first = {"encoder.hubert.feature_extractor.conv_layers.0.conv.weight"}
    assert kept("audio_encoder") == kept("audio_encoder_offline") == first
    head = {"affine.weight", "affine.bias"}
    assert kept("diffusion_head") == head
    assert kept("vq_decoder") == {"convolution"}
    assert kept("condition_predictor") == set()
    assert kept("frame") == {f"head.{name}" for name in head} | {"convolution"}


def test_islands_of_the_bundled_model(bundled: Path) -> None:
    encoder = products(to_half(onnx.load(bundled / "audio_encoder.onnx")))
    assert encoder["float"] == {"encoder.basis", "encoder.filters"}
    frame = products(to_half(onnx.load(bundled / "frame.onnx")))
    # Every step's last map: what the sampler adds up.
    assert frame["float"] == {"head.network.latent_vq_map.weight", "head.network.latent_vq_map.bias"}
    assert len(frame["half"]) > 20


def test_normalisations_softmax_and_sums_are_float32(bundled: Path) -> None:
    model = to_half(onnx.load(bundled / "frame.onnx"))
    known = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.output, *known.input)}
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceSum", "Erf", "Sigmoid"):
            assert kinds[node.output[0]] == TensorProto.FLOAT, node.name
    adds = [n for n in model.graph.node if n.op_type == "Add" and "vertices" in n.output[0]]
    assert all(kinds[n.output[0]] == TensorProto.FLOAT for n in adds)


def test_no_float32_product_of_matrices_is_left_for_turing(
    golden: Golden, exported: Exported, bundled: Path
) -> None:
    """TensorRT-RTX compiles none there; float32 islands become convolutions."""
    for directory in (bundled, exported(golden, "ddim").directory):
        for name in ("audio_encoder", "condition_predictor", "diffusion_head", "vq_decoder", "frame"):
            model = to_convolutions(to_half(onnx.load(directory / f"{name}.onnx")))
            known = onnx.shape_inference.infer_shapes(model).graph
            kinds = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.output)}
            left = [n for n in model.graph.node if n.op_type in ("Gemm", "MatMul")]
            assert all(kinds[n.output[0]] == TensorProto.FLOAT16 for n in left)


def ran(model: onnx.ModelProto, seed: int = 0) -> list[Array]:
    """Outputs for random inputs."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    feeds: dict[str, Array] = {
        i.name: (rng.standard_normal(i.shape) if "float" in i.type else np.ones(i.shape)).astype(
            kinds[i.type]
        )
        for i in session.get_inputs()
    }
    outputs: list[Array] = session.run(None, feeds)
    return outputs


def test_convolutions_for_turing_are_the_same_sums(golden: Golden, exported: Exported) -> None:
    for name, convolutions in (("diffusion_head", 1), ("vq_decoder", 1)):
        model = to_half(onnx.load(exported(golden, "ddim").directory / f"{name}.onnx"))
        wide = to_convolutions(model)
        assert "Conv" not in [n.op_type for n in model.graph.node]
        assert [n.op_type for n in wide.graph.node].count("Conv") == convolutions
        for got, want in zip(ran(wide), ran(model), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("taps", "pads"), [(4, [2, 2]), (34, [16, 17]), (17, [0, 0])])
def test_a_grouped_convolution_is_a_product(taps: int, pads: list[int], biased: bool) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 40])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 9, 41 + sum(pads) - taps])
    weights = np.random.default_rng(1).standard_normal((9, 2, taps)).astype(np.float16).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w", "b"][: 3 if biased else 2], ["y"], group=3, pads=pads)
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(weights[:, 0, 0], "b")]
    graph = helper.make_graph([node], "g", [x], [y], constants[: 2 if biased else 1])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    halved = to_half(model)
    assert "Conv" not in [n.op_type for n in halved.graph.node]
    (got,), (want,) = ran(halved), ran(model)
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_the_boundary_is_unchanged(golden: Golden, exported: Exported) -> None:
    driver = exported(golden, "ddim")
    for graph in driver.manifest.graphs.values():
        before = onnx.load(driver.directory / graph.file)
        after = to_half(before)
        assert list(after.graph.input) == list(before.graph.input)
        assert list(after.graph.output) == list(before.graph.output)
        assert before == onnx.load(driver.directory / graph.file)


def test_weights_beyond_float16_stay_float32() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy")
    for largest, kind in ((60000.0, TensorProto.FLOAT16), (70000.0, TensorProto.FLOAT)):
        weight = numpy_helper.from_array(np.full((2, 2), largest, np.float32), "w")
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        model = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
        assert {t.data_type for t in model.graph.initializer} == {kind}


def test_roundings_are_held() -> None:
    """onnxruntime on a CPU drops casts in pairs; without the hold this test's product would not be rounded."""
    import onnxruntime

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) / 3, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    values = np.array([[1.0001, 0.333333, 3.14159, 1000.4]], np.float32)
    third = np.float32(np.float16(1 / 3))
    want = (values.astype(np.float16).astype(np.float32) * third).astype(np.float16)

    def run(model: Any) -> Array:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        result: Array = session.run(None, {"x": values})[0]
        return result

    assert np.array_equal(run(hold_roundings(model)), want.astype(np.float32))
    assert not np.array_equal(run(model), want.astype(np.float32))


def test_the_bundled_stream_in_float16(bundled_half: tuple[Path, Manifest, dict[str, Array]]) -> None:
    """From the same state: a blink that hangs by a hair may come frames apart in closed loops."""
    p99, largest, motion, *closed_loop = certify_reduced(*bundled_half, ["fp16"], SECONDS)
    bounds = BOUNDS["fp16"]
    assert (p99.bound, largest.bound) == (bounds.p99_mm, bounds.max_mm) == (0.05, 0.2)
    assert 0 < p99.measured <= bounds.p99_mm
    assert p99.measured <= largest.measured <= bounds.max_mm
    # RMS over all of the head: bounds that a still face would meet say nothing.
    assert motion.measured > 2 * bounds.max_mm
    assert p99.frames == SECONDS * 30
    assert [line.bound for line in closed_loop] == [None, None]
    # The state's own errors come on top there. They may cancel others within so few frames: it is another figure, and
    # not always a larger one.
    assert closed_loop[1].measured > closed_loop[0].measured > 0
    assert closed_loop[1].measured != p99.measured


def test_the_probe_is_one_that_float16_follows(bundled_half: tuple[Path, Manifest, dict[str, Array]]) -> None:
    """With room to spare on the CPU, by the bound that the certificate measured."""
    directory, manifest, identity = bundled_half
    probe = make_probe(*bundled_half, ["fp16"], rms_motion_mm=10.0)
    unit_mm = 1000 * manifest.metres_per_unit
    assert (probe.limits["fp16"].p99 * unit_mm, probe.limits["fp16"].max * unit_mm) == pytest.approx(
        (0.1, 0.4)
    )
    drawn = Probe.make(manifest, len(probe.noise) / manifest.fps, identity, speech=True)
    share = reduced_certificate._share_of_limits(directory, manifest, "fp16", drawn, probe)
    assert 0 < share <= PROBE_SHARE
    # Another's noise is another's motion, and not what the stored vertices show.
    other = Probe.make(manifest, len(probe.noise) / manifest.fps, identity, speech=True, seed=1)
    assert reduced_certificate._share_of_limits(directory, manifest, "fp16", other, probe) > 2 * share


@pytest.mark.parametrize(
    ("shares", "taken"),
    [
        ([0.4], 0),
        ([0.9, np.inf, 0.5], 2),
        ([0.9, 0.8, 0.6, 0.7], 2),
    ],
)
def test_a_probe_that_float16_does_not_follow_gives_way_to_the_next(
    shares: list[float],
    taken: int,
    bundled_half: tuple[Path, Manifest, dict[str, Array]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, manifest, identity = bundled_half
    found = iter(shares)
    monkeypatch.setattr(reduced_certificate, "_share_of_limits", lambda *_: next(found))
    probe = make_probe(*bundled_half, ["fp16"], rms_motion_mm=1.0)
    want = Probe.make(manifest, len(probe.noise) / manifest.fps, identity, speech=True, seed=taken)
    np.testing.assert_array_equal(probe.noise, want.noise)
    assert not list(found) and len(shares) <= PROBE_DRAWS


def test_a_preset_stream_in_float16(golden: Golden, exported: Exported, tmp_path: Path) -> None:
    p99, largest, motion = certify_reduced(
        *with_reduced(exported(golden, "ddim").directory, tmp_path / "m", "fp16"), ["fp16"], SECONDS
    )
    limits = BOUNDS["fp16"].limits_mm(motion.measured)
    assert (p99.bound, largest.bound) == (limits.p99, limits.max)
    assert p99.measured <= limits.p99
    assert largest.measured <= limits.max


WORSE = 5.0
"""What leaving the islands out must cost at least; measured: 24 times."""


def test_islands_earn_their_keep(
    bundled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundled_half: tuple[Path, Manifest, dict[str, Array]],
) -> None:
    """Without the islands the bundled stream is measurably worse."""
    with_islands = certify_reduced(*bundled_half, ["fp16"], SECONDS)[0].measured
    monkeypatch.setattr(half, "STATISTICS", frozenset())
    without = certify_reduced(*with_reduced(bundled, tmp_path / "m", "fp16"), ["fp16"], SECONDS)[0].measured
    # Negated: a spectrum that overflows gives NaN.
    assert not without <= WORSE * with_islands
