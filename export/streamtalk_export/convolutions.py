"""Grouped convolutions as products of matrices: the same sums, for libraries that have no fast kernel for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Node = Any
"""An onnx.NodeProto."""
Weights = dict[str, onnx.TensorProto]
SIDE_BY_SIDE = 16
"""Most taps of a convolution that are laid side by side: each one takes the memory of the input once more."""


def as_product(node: Node, weights: Weights, length: int) -> list[Node]:
    """Return nodes that compute the convolution `node` over `length` samples as a product of matrices.

    The taps lie side by side. More than `SIDE_BY_SIDE` of them are summed in blocks, whose sums are then shifted
    against each other. New constants go to `weights`. A convolution with strides or dilations comes back as it is.
    """
    x, weight, *bias = node.input
    (output,) = node.output
    kernels = numpy_helper.to_array(weights[weight])
    settings: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups, pads = settings.get("group", 1), settings.get("pads", [0, 0])
    plain = settings.get("strides", [1]) == [1] and settings.get("dilations", [1]) == [1]
    if kernels.ndim != 3 or kernels.shape[2] == 1 or not plain:
        return [node]
    outputs, channels, taps = len(kernels) // groups, kernels.shape[1], kernels.shape[2]
    block = next(n for n in range(SIDE_BY_SIDE, 0, -1) if taps % n == 0)
    blocks = taps // block
    split = kernels.reshape(groups, outputs, channels, blocks, block)
    matrix = split.transpose(0, 4, 2, 3, 1).reshape(groups, block * channels, blocks * outputs)
    padded = length + sum(pads)
    made, sums = padded - taps + 1, padded - block + 1
    nodes: list[Node] = []

    def put(operator: str, *inputs: str, **given: Any) -> str:
        name = f"{output}_{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [name], **given))
        return name

    def constant(name: str, values: Any, of: str = output) -> str:
        name = f"{of}_{name}"
        weights[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def shaped(name: str, value: str, *sizes: int) -> str:
        return put("Reshape", value, constant(name, np.array([-1, *sizes])))

    value = x
    if any(pads):
        value = put("Pad", value, constant("pads", np.array([0, 0, pads[0], 0, 0, pads[1]])))
    value = shaped("split", value, groups, channels, padded)
    value = put("Transpose", value, perm=[0, 1, 3, 2])
    starts = np.add.outer(np.arange(sums), np.arange(block))
    value = put("Gather", value, constant("taps", starts), axis=2)
    value = shaped("rows", value, groups, sums, block * channels)
    value = put("MatMul", value, constant("side_by_side", matrix, weight))
    if blocks > 1:
        value = shaped("sums", value, groups, sums * blocks, outputs)
        starts = np.add.outer(np.arange(made), block * np.arange(blocks)) * blocks + np.arange(blocks)
        value = put("Gather", value, constant("blocks", starts), axis=2)
        value = put("ReduceSum", value, constant("block_axis", np.array([3])), keepdims=0)
    if bias:
        row = numpy_helper.to_array(weights[bias[0]]).reshape(groups, 1, -1)
        value = put("Add", value, constant("bias", row))
    value = put("Transpose", value, perm=[0, 1, 3, 2])
    whole = constant("joined", np.array([-1, groups * outputs, made]))
    return [*nodes, helper.make_node("Reshape", [value, whole], [output])]
