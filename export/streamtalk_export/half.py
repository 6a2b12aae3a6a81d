"""Float16 written into an ONNX graph, with float32 kept where float16 is not safe.

TensorRT 11 and TensorRT-RTX are strongly typed: a tensor has the type that the graph gives it. So this module
decides, node by node, and the boundary of the graph stays float32.

Products (Gemm, MatMul, Conv) are float16, and what only moves their results. All else is float32: it costs a
fused kernel nothing, and each of its roundings would add up. Products that stay float32 are found by what they
feed, not by their names: see `islands`.

The islands were measured over 8 s of closed loop, vertex error p99 and maximum. Bundled model, in mm: .0024 and
.0074; without those that feed a statistic .057 and .31; without the sampler's .0024 and .0069. VOCASET's preset at
small size with random weights, in percent of the RMS motion: .35 and .69; .43 and .79; .41 and .73.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.errors import ExportError

PRODUCTS = frozenset(("Gemm", "MatMul", "Conv"))
MOVES = frozenset(
    "Reshape Transpose Slice Split Squeeze Unsqueeze Gather Concat Expand Flatten Identity Relu".split()
)
"""Operators that are exact in any type: they take the type of their data."""
STATISTICS = frozenset("InstanceNormalization ReduceMean ReduceSum Pow Log".split())
"""What measures a signal over time. After a division by a small deviation (InstanceNorm's gain reaches 300) the
rounding of its input would be heard; a power spectrum squares its range out of float16's."""
STOPS = frozenset(("LayerNormalization", "Softmax")) | PRODUCTS
"""Where the search for what a product feeds ends: these bring their input back to the order of 1."""
FED_BACK = frozenset(("latent", "latents_out"))
"""Outputs of the sampler. Its last products stay float32: a stream feeds them back for ever."""
LARGEST = 65504.0
SIDE_BY_SIDE = 16
"""Taps of a convolution that are laid side by side at most: the memory they take."""
LINEAR = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
"""Attributes of a Gemm that is a linear layer."""

Node = Any
"""An onnx.NodeProto."""


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with float16 inside and the same inputs and outputs. Raises ExportError."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    converter = _Converter(result)
    for node in list(result.graph.node):
        converter.convert(node)
    rebuild(result, converter.nodes, converter.weights, "float16")
    return result


def rebuild(
    model: onnx.ModelProto, nodes: list[Node], weights: dict[str, onnx.TensorProto], kind: str
) -> None:
    """Give `model` these nodes and those of the weights that are read. Raises ExportError, which names the `kind`,
    where that makes no valid graph."""
    graph = model.graph
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for name, tensor in weights.items() if name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.ClearField("value_info")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{graph.name}: the {kind} graph is not valid: {error}") from error


class _Converter:
    """One pass over the nodes in order. `types` holds every float tensor's type so far."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.types: dict[str, int] = {
            value.name: TensorProto.FLOAT
            for value in graph.input
            if value.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self.floats = _tensors_of(model, TensorProto.FLOAT)
        self.lengths = _lengths(model)
        self.outputs = {value.name for value in graph.output}
        self.nodes: list[Node] = []
        self.casts: dict[tuple[str, int], str] = {}
        self.islands = islands(graph)
        self.fresh = ""
        """What the node before this one made, if it multiplied a weight."""

    def convert(self, node: Node) -> None:
        wanted = TensorProto.FLOAT16 if self._is_half(node) else TensorProto.FLOAT
        for place, name in enumerate(node.input):
            if name in self.floats:
                node.input[place] = self._as(name, wanted)
        # A graph's output keeps its name and is float32, whatever computes it.
        renamed: list[tuple[str, str]] = []
        for place, name in enumerate(node.output):
            if name not in self.floats:
                continue
            self.types[name] = wanted
            if wanted == TensorProto.FLOAT16 and name in self.outputs:
                node.output[place] = half = f"{name}_half"
                self.types[half] = wanted
                self.floats.add(half)
                renamed.append((half, name))
        self.nodes.extend(self._as_product(node, "half" if wanted == TensorProto.FLOAT16 else "float"))
        # Attention scores, which multiply no weight, do not count.
        weighted = node.op_type in PRODUCTS and any(name in self.weights for name in node.input)
        self.fresh = node.output[0] if weighted else ""
        for half, name in renamed:
            self.nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
            self.types[name] = TensorProto.FLOAT

    def _as_product(self, node: Node, kind: str) -> list[Node]:
        """A convolution with steps of one as a product of matrices, where onnxruntime's cuDNN has nothing good for it:
        float32 ones (180 us for the decoder's on an H200), and grouped ones in float16, of which its heuristics know
        none as wide as HuBERT's (128 taps, 16 groups; seen with cuDNN 9.19).

        The taps lie side by side; more than `SIDE_BY_SIDE` of them are summed in blocks of so many, whose sums are
        shifted against each other.
        """
        if node.op_type != "Conv" or node.input[1].removesuffix("_half") not in self.weights:
            return [node]
        x, weight, *bias = node.input
        kernels = numpy_helper.to_array(self.weights[weight])
        settings: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        groups, pads = settings.get("group", 1), settings.get("pads", [0, 0])
        length = self.lengths.get(x.removesuffix(f"_{kind}"))
        plain = settings.get("strides", [1]) == [1] and settings.get("dilations", [1]) == [1]
        wanted = groups == 1 if kind == "float" else groups > 1
        if kernels.ndim != 3 or kernels.shape[2] == 1 or not (plain and wanted) or length is None:
            return [node]
        (output,) = node.output
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
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
            return name

        def shaped(name: str, value: str, *sizes: int) -> str:
            return put("Reshape", value, constant(name, np.array([-1, *sizes])))

        value = x
        if any(pads):
            value = put("Pad", value, constant("pads", np.array([0, 0, pads[0], 0, 0, pads[1]])))
        value = shaped("split", value, groups, channels, padded)
        value = put("Transpose", value, perm=[0, 1, 3, 2])
        value = put(
            "Gather", value, constant("taps", np.add.outer(np.arange(sums), np.arange(block))), axis=2
        )
        value = shaped("rows", value, groups, sums, block * channels)
        value = put("MatMul", value, constant("side_by_side", side_by_side(kernels, groups), weight))
        if blocks > 1:
            value = shaped("sums", value, groups, sums * blocks, outputs)
            starts = np.add.outer(np.arange(made), block * np.arange(blocks)) * blocks + np.arange(blocks)
            value = put("Gather", value, constant("starts", starts), axis=2)
            value = put("ReduceSum", value, constant("blocks", np.array([3])), keepdims=0)
        if bias:
            value = put(
                "Add",
                value,
                constant("bias", numpy_helper.to_array(self.weights[bias[0]]).reshape(groups, 1, -1)),
            )
        value = put("Transpose", value, perm=[0, 1, 3, 2])
        return [
            *nodes,
            helper.make_node(
                "Reshape", [value, constant("joined", np.array([-1, groups * outputs, made]))], [output]
            ),
        ]

    def _is_half(self, node: Node) -> bool:
        data = [name for name in node.input if name in self.floats and name not in self.weights]
        halves = [self.types.get(name) == TensorProto.FLOAT16 for name in data]
        if node.op_type in PRODUCTS:
            weights = [self.weights[name] for name in node.input if name in self.weights]
            return node.output[0] not in self.islands and all(map(_fits, weights))
        if node.op_type in MOVES:
            return bool(halves) and all(halves)
        # A bias that follows its product; a residual sum has two activations and is float32.
        return node.op_type == "Add" and len(data) == 1 and all(halves) and data[0] == self.fresh

    def _as(self, name: str, wanted: int) -> str:
        """The tensor `name` in the wanted type, cast once however many read it."""
        have = self.types.get(name, TensorProto.FLOAT)
        if have == wanted:
            return name
        if (name, wanted) not in self.casts:
            cast = f"{name}_{'half' if wanted == TensorProto.FLOAT16 else 'float'}"
            if name in self.weights:
                values = numpy_helper.to_array(self.weights[name]).astype(np.float16)
                self.weights[cast] = numpy_helper.from_array(values, cast)
            else:
                self.nodes.append(helper.make_node("Cast", [name], [cast], to=wanted))
            self.casts[name, wanted] = cast
            self.floats.add(cast)
            self.types[cast] = wanted
        return self.casts[name, wanted]


def tap_blocks(taps: int) -> tuple[int, int]:
    """How many taps lie side by side, and how many blocks of them make a kernel of `taps`."""
    whole = [n for n in range(1, SIDE_BY_SIDE + 1) if taps % n == 0]
    return whole[-1], taps // whole[-1]


def side_by_side(kernels: Any, groups: int) -> Any:
    """Kernels [G O, C, taps] of a convolution as the right side of a product, [G, block C, blocks O]."""
    block, blocks = tap_blocks(kernels.shape[2])
    split = kernels.reshape(groups, -1, kernels.shape[1], blocks, block)
    return split.transpose(0, 4, 2, 3, 1).reshape(groups, block * kernels.shape[1], -1)


def to_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose float32 products with a weight are convolutions of width 1, the same sums.

    TensorRT-RTX compiles float32 convolutions for Turing (7.5), but no float32 products of matrices.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in result.graph.initializer}

    def constant(name: str, values: Any) -> str:
        weights.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def kernel(name: str) -> str:
        return constant(f"{name}_pointwise", numpy_helper.to_array(weights[name])[:, :, None])

    def float32(name: str) -> bool:
        return name in weights and weights[name].data_type == TensorProto.FLOAT

    def converted(node: Node) -> list[Node]:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **settings}
        if node.op_type == "Gemm" and float32(node.input[1]) and plain == LINEAR:
            x, weight, *bias = node.input
            (output,) = node.output
            axis = constant("pointwise_axis", np.array([2]))
            return [
                helper.make_node("Unsqueeze", [x, axis], [f"{output}_wide"]),
                helper.make_node("Conv", [f"{output}_wide", kernel(weight), *bias], [f"{output}_narrow"]),
                helper.make_node("Squeeze", [f"{output}_narrow", axis], [output]),
            ]
        if (
            node.op_type == "MatMul"
            and float32(node.input[1])
            and list(weights[node.input[1]].dims[:-2]) == [1]
        ):
            # [B, 1, T, K] times [1, K, N], which `_as_product` makes.
            x, weight = node.input
            (output,) = node.output
            kernel_name = constant(
                f"{weight}_pointwise",
                np.swapaxes(numpy_helper.to_array(weights[weight]), 1, 2)[0, :, :, None, None],
            )
            return [
                helper.make_node("Transpose", [x], [f"{output}_wide"], perm=[0, 3, 1, 2]),
                helper.make_node("Conv", [f"{output}_wide", kernel_name], [f"{output}_narrow"]),
                helper.make_node("Transpose", [f"{output}_narrow"], [output], perm=[0, 2, 3, 1]),
            ]
        if node.op_type == "MatMul" and float32(node.input[0]) and len(weights[node.input[0]].dims) == 2:
            # [N, K] times [B, K, T], the only product whose left side is a weight.
            return [helper.make_node("Conv", [node.input[1], kernel(node.input[0])], list(node.output))]
        return [node]

    nodes = [new for node in list(result.graph.node) for new in converted(node)]
    rebuild(result, nodes, weights, "pointwise")
    return result


def islands(graph: Any) -> set[str]:
    """Outputs of the products that stay float32: those that feed a statistic or the sampler's result."""
    readers: dict[str, list[Node]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    def sensitive(name: str, seen: set[str]) -> bool:
        if name in seen:
            return False
        seen.add(name)
        if name in FED_BACK:
            return True
        for node in readers[name]:
            if node.op_type in STATISTICS:
                return True
            if node.op_type not in STOPS and any(sensitive(out, seen) for out in node.output):
                return True
        return False

    return {
        node.output[0] for node in graph.node if node.op_type in PRODUCTS and sensitive(node.output[0], set())
    }


def hold_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that rounds to float16 in onnxruntime on a CPU wherever `model` says float16.

    That runtime computes float16 products in float32 and then drops every pair of casts between them, even with
    optimisation off: a float16 graph is checked there with nothing rounded but its weights. An operator that it
    runs in float16 itself, behind each product, keeps the roundings (measured: the bundled encoder's error is
    9e-4 with them and 7e-5 without).
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    halves = _tensors_of(model, TensorProto.FLOAT16)
    nodes: list[Node] = []
    for node in list(result.graph.node):
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in halves and node.op_type not in MOVES:
                node.output[place] = raw = f"{name}_raw"
                nodes.append(helper.make_node("Max", [raw, raw], [name]))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.ClearField("value_info")
    return result


def _tensors_of(model: onnx.ModelProto, kind: int) -> set[str]:
    """Names of all tensors of a graph that have the element type `kind`."""
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values: Iterable[Any] = (*known.input, *known.output, *known.value_info)
    names = {v.name for v in values if v.type.tensor_type.elem_type == kind}
    return names | {t.name for t in model.graph.initializer if t.data_type == kind}


def _lengths(model: onnx.ModelProto) -> dict[str, int]:
    """The last axis of every tensor of three, where it is known."""
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*known.input, *known.value_info)}
    return {name: dims[2].dim_value for name, dims in shapes.items() if len(dims) == 3 and dims[2].dim_value}


def _fits(tensor: onnx.TensorProto) -> bool:
    return bool(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0) <= LARGEST)
