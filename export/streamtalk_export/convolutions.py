"""Convolutions as products of matrices, and products as convolutions, the same sums: no library is good at both."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Node = Any
"""An onnx.NodeProto."""
Weights = dict[str, onnx.TensorProto]
SIDE_BY_SIDE = 16
"""Taps of a convolution that are laid side by side at most: the memory they take."""


def is_linear(node: Node) -> bool:
    """Whether the node is a Gemm as a linear layer has it: x W^T + b."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    return node.op_type == "Gemm" and {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **given} == wanted


def tap_blocks(taps: int) -> tuple[int, int]:
    """How many taps lie side by side, and how many blocks of them make a kernel of `taps`."""
    block = next(n for n in range(SIDE_BY_SIDE, 0, -1) if taps % n == 0)
    return block, taps // block


def side_by_side(kernels: Any, groups: int) -> Any:
    """Kernels [G O, C, taps] of a convolution as the right side of a product, [G, block C, blocks O]."""
    block, blocks = tap_blocks(kernels.shape[2])
    split = kernels.reshape(groups, -1, kernels.shape[1], blocks, block)
    return split.transpose(0, 4, 2, 3, 1).reshape(groups, block * kernels.shape[1], -1)


def as_product(node: Node, weights: Weights, length: int) -> list[Node]:
    """A convolution over `length` samples as a product of matrices; `node` itself where its steps are not one apart.

    The taps lie side by side; more than `SIDE_BY_SIDE` of them are summed in blocks of so many, whose sums are shifted
    against each other. New constants go to `weights`.
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
    block, blocks = tap_blocks(taps)
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
    value = put("MatMul", value, constant("side_by_side", side_by_side(kernels, groups), weight))
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


def as_convolution(node: Node, weights: Weights) -> list[Node]:
    """A float32 product with a weight as a convolution of width 1; `node` itself where it is none. New constants go to
    `weights`.
    """

    def is_weight(name: str, *first: int) -> bool:
        found = weights.get(name)
        return (
            found is not None and found.data_type == TensorProto.FLOAT and list(found.dims[:-2]) == [*first]
        )

    def kernel(name: str, values: Any) -> str:
        weights.setdefault(f"{name}_pointwise", numpy_helper.from_array(values, f"{name}_pointwise"))
        return f"{name}_pointwise"

    if node.op_type not in ("Gemm", "MatMul"):
        return [node]
    x, weight, *bias = node.input
    (output,) = node.output
    if node.op_type == "Gemm":
        if not is_weight(weight) or not is_linear(node):
            return [node]
        axis = "pointwise_axis"
        weights.setdefault(axis, numpy_helper.from_array(np.array([2]), axis))
        wide = kernel(weight, numpy_helper.to_array(weights[weight])[:, :, None])
        return [
            helper.make_node("Unsqueeze", [x, axis], [f"{output}_wide"]),
            helper.make_node("Conv", [f"{output}_wide", wide, *bias], [f"{output}_narrow"]),
            helper.make_node("Squeeze", [f"{output}_narrow", axis], [output]),
        ]
    if is_weight(weight):
        # [B, T, K] times [K, N], the only product of a tensor of three axes that stays float32: the decoder's.
        columns = np.ascontiguousarray(numpy_helper.to_array(weights[weight]).T[:, :, None])
        return [
            helper.make_node("Transpose", [x], [f"{output}_wide"], perm=[0, 2, 1]),
            helper.make_node("Conv", [f"{output}_wide", kernel(weight, columns)], [f"{output}_narrow"]),
            helper.make_node("Transpose", [f"{output}_narrow"], [output], perm=[0, 2, 1]),
        ]
    if is_weight(x):
        # [N, K] times [B, K, T], the only product whose left side is a weight.
        rows = kernel(x, numpy_helper.to_array(weights[x])[:, :, None])
        return [helper.make_node("Conv", [weight, rows], [output])]
    return [node]
