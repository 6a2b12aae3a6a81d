"""Graphs in onnxruntime's own operators: the same sums in fewer nodes, and what float16 costs over a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from benchmarks.budget_trace import Tracer
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.fused import DOMAIN, OPERATORS, fuse, to_fused
from streamtalk_export.reduced_certificate import BOUNDS, certify_reduced
from tests.export.golden import Driver, Golden
from tests.export.reduced import with_reduced
from tests.export.test_half import SECONDS, products, ran
from tests.small_model import TINY

Exported = Callable[[Golden, str], Driver]
GRAPHS = ("audio_encoder", "frame")


def fused_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The rewriting alone, in float32."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    fuse(result, onnx.shape_inference.infer_shapes(model, strict_mode=True).graph)
    result.graph.ClearField("value_info")
    return result


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def same(model: onnx.ModelProto) -> None:
    for got, want in zip(ran(fused_only(model)), ran(model), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6 * max(1.0, float(np.abs(want).max())))


def test_presets_are_the_same_sums(golden: Golden, exported: Exported) -> None:
    driver = exported(golden, "ddim")
    for name in GRAPHS:
        same(onnx.load(driver.directory / f"{name}.onnx"))


def test_the_bundled_model_is_the_same_sums(bundled: Path) -> None:
    for name in GRAPHS:
        same(onnx.load(bundled / f"{name}.onnx"))


def test_a_batch_is_the_same_sums(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY, encoding="utf-8")
    for window in (6, 8):  # one that is padded, one that is not
        model = onnx.load(Tracer(str(config), tmp_path).frame(5, window, 3))
        assert operators(fused_only(model))["Attention"] == 1
        same(model)


def test_what_is_fused(golden: Golden, exported: Exported) -> None:
    """Every attention over a window, every GELU, and every LayerNorm of a sum."""
    directory = exported(golden, "ddim").directory
    for name, whole_windows in (("audio_encoder", 0), ("frame", 1)):
        before = onnx.load(directory / f"{name}.onnx")
        plain, fused = operators(before), operators(to_fused(before))
        assert not fused["Erf"] and plain["Erf"] == fused["Gelu"] + fused["BiasGelu"]
        # The predictor reads a cache, and the decoder's last block one token.
        others = 3 * whole_windows
        assert fused["Attention"] == plain["Softmax"] - others > 0
        assert fused["Softmax"] == others
        assert fused["LayerNormalization"] == 1
        assert fused["SkipLayerNormalization"] == plain["LayerNormalization"] - 1
        assert fused["Cast"] <= 4


def test_the_boundary_is_unchanged(golden: Golden, exported: Exported) -> None:
    directory = exported(golden, "ddim").directory
    for name in GRAPHS:
        before = onnx.load(directory / f"{name}.onnx")
        after = to_fused(before)
        assert list(after.graph.input) == list(before.graph.input)
        assert list(after.graph.output) == list(before.graph.output)
        own = {node.op_type for node in after.graph.node if node.domain == DOMAIN}
        assert own <= OPERATORS
        assert before == onnx.load(directory / f"{name}.onnx")


def test_what_is_fed_back_is_float32(bundled: Path, golden: Golden, exported: Exported) -> None:
    """Predictor and head to the bit; of the decoder the convolution before a statistic, where it has one."""
    for directory, convolutions in ((bundled, 0), (exported(golden, "ddim").directory, 1)):
        before = onnx.load(directory / "frame.onnx")
        found = products(to_fused(before))
        fed_back = {n for n in products(before)["float"] if n.startswith(("predictor.", "head."))}
        assert {n for n in fed_back if n.endswith("weight")} <= found["float"]
        assert len(found["float"] - fed_back) == convolutions
        assert len(found["half"]) > 10
        exact, rounded = (ran(model) for model in (before, to_fused(before)))
        names = [value.name for value in before.graph.output]
        for name, want, got in zip(names, exact, rounded, strict=True):
            if name != "vertices":
                np.testing.assert_allclose(got, want, atol=5e-6 * max(1.0, float(np.abs(want).max())))


def test_a_preset_stream(golden: Golden, exported: Exported, tmp_path: Path) -> None:
    source = exported(golden, "ddim").directory
    directory, manifest, identity = with_reduced(source, tmp_path / "m", "fused", GRAPHS)
    p99, largest, motion = certify_reduced(directory, manifest, identity, ["fused"], SECONDS)
    limits = BOUNDS["fused"].limits_mm(motion.measured)
    assert p99.subject == "frame.fused"
    assert 0 < p99.measured <= limits.p99
    assert largest.measured <= limits.max


def test_the_bundled_stream(bundled: Path, tmp_path: Path) -> None:
    made = with_reduced(bundled, tmp_path / "m", "fused", GRAPHS)
    p99, largest, _, *closed_loop = certify_reduced(*made, ["fused"], SECONDS)
    assert 0 < p99.measured <= BOUNDS["fused"].p99_mm
    assert largest.measured <= BOUNDS["fused"].max_mm
    assert [line.bound for line in closed_loop] == [None, None]


@pytest.mark.parametrize("scaled_by", ["a number", "a row"])
def test_another_attention_stays_as_it_is(scaled_by: str) -> None:
    """One whose scores are scaled key by key, and one whose keys come from elsewhere: the operator does neither."""
    T, h = 6, 8
    rng = np.random.default_rng(0)

    def constant(name: str, values: object) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(values), name)

    weights = [
        *(constant(n, rng.standard_normal((h, h)).astype(np.float32)) for n in ("wq", "wk", "wv")),
        constant("heads", np.array([1, T, 2, h // 2])),
        constant("whole", np.array([1, T, h])),
        constant("scale", np.float32(0.5) if scaled_by == "a number" else rng.random(T).astype(np.float32)),
    ]
    keys_of = "other" if scaled_by == "a number" else "x"
    nodes = []
    for name, of, perm in (("q", "x", [0, 2, 1, 3]), ("k", keys_of, [0, 2, 3, 1]), ("v", "x", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", [of, f"w{name}"], [f"{name}0"]),
            helper.make_node("Reshape", [f"{name}0", "heads"], [f"{name}1"]),
            helper.make_node("Transpose", [f"{name}1"], [f"{name}2"], perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q2", "k2"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v2"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["merged"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["merged", "whole"], ["y"]),
    ]
    tokens = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, T, h]) for n in ("x", "other", "y")]
    graph = helper.make_graph(nodes, "g", tokens[:2], tokens[2:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert operators(fused_only(model)) == operators(model)
    same(model)
