"""Eight-bit weights written into an ONNX graph, for CPUs: large products run in integers, all else is float32.

Dynamic quantisation, in the operators that onnxruntime fuses: at export each column of a weight gets a scale and a
zero point, at run time each product's input does. Weights are unsigned: processors without VNNI saturate the sums
of signed ones. An input's scale is one for its whole batch, so these graphs serve one voice each: voices of a batch
would hear of each other.

The audio encoder is left alone: HuBERT's size with random weights put its features off by 13 % of their deviation over
time, and vertices by a third of the motion. Of what is rounded the decoder costs most (7 % at the 99th percentile,
random weights), then the predictor (3 %).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.convolutions import is_linear
from streamtalk_export.half import islands, rebuild

GRAPHS = ("condition_predictor", "diffusion_head", "vq_decoder", "frame")
"""What is written in 8 bits."""
SMALLEST = 1 << 14
"""Weights of fewer elements stay float32: rounding their input costs more than they do."""
LEVELS = 255

Node = Any
"""An onnx.NodeProto."""


def to_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose large products with a weight have it in 8 bits, with the same inputs and outputs.

    Products that feed a statistic or the sampler's result stay float32, as they do in float16. Raises ExportError.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    converter = _Converter({tensor.name: tensor for tensor in result.graph.initializer})
    kept = islands(result.graph)
    for node in list(result.graph.node):
        if node.output[0] in kept or not converter.large_product(node):
            converter.nodes.append(node)
        else:
            converter.convert(node)
    rebuild(result, converter.nodes, converter.weights, "int8")
    return result


class _Converter:
    """One pass over the nodes in order. An input that several products share is rounded once."""

    def __init__(self, weights: dict[str, onnx.TensorProto]) -> None:
        self.weights = weights
        self.nodes: list[Node] = []
        self.rounded: set[str] = set()

    def large_product(self, node: Node) -> bool:
        """Whether `node` is a linear layer or a MatMul by a matrix that is large enough."""
        if node.op_type != "MatMul" and not is_linear(node):
            return False
        weight = self.weights.get(node.input[1])
        return weight is not None and len(weight.dims) == 2 and int(np.prod(weight.dims)) >= SMALLEST

    def convert(self, node: Node) -> None:
        """x W + b as (round(x) - zero) (round(W) - zeros) in integers, times both scales, + b."""
        x, weight, *bias = node.input
        (y,) = node.output
        if x not in self.rounded:
            self.rounded.add(x)
            self._add("DynamicQuantizeLinear", [x], f"{x}_int8", f"{x}_scale", f"{x}_zero")
        by = f"{weight}_int8"
        if by not in self.weights:
            values = numpy_helper.to_array(self.weights[weight])
            self._constants(by, *rounded(values.T if node.op_type == "Gemm" else values))
        self._add("MatMulInteger", [f"{x}_int8", by, f"{x}_zero", f"{by}_zero"], f"{y}_sum")
        self.nodes.append(helper.make_node("Cast", [f"{y}_sum"], [f"{y}_float"], to=TensorProto.FLOAT))
        self._add("Mul", [f"{x}_scale", f"{by}_scale"], f"{y}_scale_of")
        self._add("Mul", [f"{y}_float", f"{y}_scale_of"], f"{y}_product" if bias else y)
        if bias:
            self._add("Add", [f"{y}_product", *bias], y)

    def _add(self, kind: str, inputs: list[str], *outputs: str) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs))

    def _constants(self, name: str, values: Any, scales: Any, zeros: Any) -> None:
        for tensor, array in ((name, values), (f"{name}_scale", scales), (f"{name}_zero", zeros)):
            self.weights[tensor] = numpy_helper.from_array(array, tensor)


def rounded(
    weight: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """A weight [K, N] in 8 bits, and scale and zero point [N] of its columns: (values - zero) * scale is the weight."""
    low, high = np.minimum(weight.min(0), 0.0), np.maximum(weight.max(0), 0.0)
    scale = ((high - low) / LEVELS).astype(np.float32)
    scale[scale == 0] = 1.0  # a column of zeros
    zero = np.round(-low / scale)
    values = np.clip(np.round(weight / scale) + zero, 0, LEVELS)
    return values.astype(np.uint8), scale, zero.astype(np.uint8)
