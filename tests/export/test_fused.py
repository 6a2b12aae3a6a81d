"""Hop graphs in onnxruntime's own operators: the same sums in fewer nodes, and what float16 costs them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.fused import DOMAIN, OPERATORS, for_onnxruntime, fuse
from streamtalk_export.half import PREDICTOR, hold_roundings, known_shapes, parts
from tests.export.test_half import HOPS, TOLERANCE, WINDOW, errors, hop_graph, ran, weights_of

EXACT = 2e-6
"""Of the largest value: float32 sums in another order."""
PADDED = [(*case, WINDOW) for case in HOPS]
CASES = [*PADDED, ("vocaset_small", 4, 2, 8)]
"""Models, frames a hop, rows and windows. Windows of 6 are padded to 8."""


@pytest.fixture(params=CASES, ids=lambda case: "{}-hop{}-rows{}-window{}".format(*case))
def graph(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return hop_graph(*request.param)


def fused_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The rewriting alone, in float32."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    fuse(result, known_shapes(model))
    return result


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_the_same_sums(graph: onnx.ModelProto) -> None:
    assert max(errors(ran(fused_only(graph)), ran(graph)).values()) <= EXACT


def test_what_is_fused(graph: onnx.ModelProto) -> None:
    """Every attention that makes queries, keys and values in one product, every GELU, every LayerNorm of a sum."""
    plain, fused = operators(graph), operators(fused_only(graph))
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known_shapes(graph).value_info
    }
    softmaxes = [shapes[node.output[0]] for node in graph.graph.node if node.op_type == "Softmax"]
    whole = sum(len(shape) == 4 and shape[2] == shape[3] for shape in softmaxes)
    assert fused["Attention"] == whole > 0
    assert fused["Softmax"] == len(softmaxes) - whole
    assert not fused["Erf"]
    assert plain["Erf"] == fused["Gelu"] + fused["BiasGelu"]
    made = {node.output[0]: node for node in graph.graph.node}
    weights = {tensor.name for tensor in graph.graph.initializer}
    above = [made[node.input[0]] for node in graph.graph.node if node.op_type == "LayerNormalization"]
    sums = sum(node.op_type == "Add" and not weights.intersection(node.input) for node in above)
    assert fused["SkipLayerNormalization"] == sums > 0
    assert fused["LayerNormalization"] == plain["LayerNormalization"] - sums


def test_float16_costs_a_few_roundings(graph: onnx.ModelProto) -> None:
    """Frames and state; that they differ at all shows that the roundings were held."""
    found = errors(ran(hold_roundings(for_onnxruntime(graph))), ran(graph))
    assert set(found) == {"vertices", "kv_cache_out", "latents_out"}
    assert max(found.values()) <= TOLERANCE
    assert min(found.values()) > 0


def test_predictor_and_head_are_float32(graph: onnx.ModelProto) -> None:
    model = for_onnxruntime(graph)
    kept = parts(graph.graph)[PREDICTOR]
    assert weights_of(model, TensorProto.FLOAT, kept)
    assert not weights_of(model, TensorProto.FLOAT16, kept)
    assert len(weights_of(model, TensorProto.FLOAT16)) > 10
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert TensorProto.FLOAT16 not in {kinds.get(name) for name in kept}


def test_the_boundary_is_unchanged(graph: onnx.ModelProto) -> None:
    before = onnx.ModelProto.FromString(graph.SerializeToString())
    after = for_onnxruntime(graph)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert {node.op_type for node in after.graph.node if node.domain == DOMAIN} <= OPERATORS
    assert DOMAIN in {entry.domain for entry in after.opset_import}
    assert graph == before


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_another_attention_stays_as_it_is(order: tuple[int, ...]) -> None:
    """The operator takes queries, keys and values from one product in this order."""
    T, H, d = 6, 2, 4
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((H * d, 3 * H * d)).astype(np.float32),
        "heads": np.array([1, T, 3, H, d]),
        "whole": np.array([1, T, H * d]),
        **{f"at{i}": np.array([i]) for i in range(4)},
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["joined"]),
        helper.make_node("Reshape", ["joined", "heads"], ["split"]),
        helper.make_node("Transpose", ["split"], ["turned"], perm=[2, 0, 3, 1, 4]),
    ]
    for name, place in zip("qkv", order, strict=True):
        nodes += [
            helper.make_node("Slice", ["turned", f"at{place}", f"at{place + 1}", "at0"], [f"{name}1"]),
            helper.make_node("Squeeze", [f"{name}1", "at0"], [name]),
        ]
    nodes += [
        helper.make_node("Transpose", ["k"], ["keys"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "keys"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["merged"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["merged", "whole"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, T, H * d]) for n in "xy")
    weights = [numpy_helper.from_array(values, name) for name, values in arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], weights),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    fused = fused_only(model)
    assert operators(fused)["Attention"] == (order == (0, 1, 2))
    assert operators(fused)["Softmax"] == (order != (0, 1, 2))
    assert max(errors(ran(fused), ran(model)).values()) <= EXACT
