"""Float16 written into an ONNX graph, with float32 kept where float16 is not safe.

TensorRT 11 and TensorRT-RTX are strongly typed: a tensor has the type that the graph gives it. So this module
decides, node by node, and the boundary of the graph stays float32.

Products (Gemm, MatMul, Conv) are float16, what only moves their results, and the sums that a product's own parts or
bias need. All else is float32: it costs a fused kernel nothing, and each of its roundings would add up. Products that
stay float32 are found by what they feed, not by their names: see `islands`. Where kernels are not fused, a cast is one
more: `streamtalk_export.fused` has float16 between the products as well, and float32 in all that is fed back.

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

from streamtalk_export.convolutions import Node, as_convolution, as_product
from streamtalk_export.errors import ExportError

PRODUCTS = frozenset(("Gemm", "MatMul", "Conv"))
MOVES = frozenset(
    "Reshape Transpose Slice Split Squeeze Unsqueeze Gather Concat Expand Flatten Identity Pad Relu".split()
)
"""Operators that are exact in any type: they take the type of their data."""
STATISTICS = frozenset("InstanceNormalization ReduceMean ReduceSum Pow Log".split())
"""What measures a signal over time. After a division by a small deviation (InstanceNorm's gain reaches 300) the
rounding of its input would be heard; a power spectrum squares its range out of float16's."""
FUSED = frozenset("Attention BiasGelu Gelu LayerNormalization SkipLayerNormalization".split())
"""What onnxruntime runs as one kernel that reads and writes float16, in float32 but for what GELU rounds on its way."""
STOPS = frozenset(("LayerNormalization", "SkipLayerNormalization", "Attention", "Softmax")) | PRODUCTS
"""Where the search for what a product feeds ends: these bring their input back to the order of 1."""
FED_BACK = frozenset(("latent", "latents_out"))
"""Outputs of the sampler. Its last products stay float32: a stream feeds them back for ever."""
LARGEST = 65504.0


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with float16 inside and the same inputs and outputs. Raises ExportError."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return convert(result, _shapes_known(model))


def convert(model: onnx.ModelProto, known: Any, fused: dict[str, int] | None = None) -> onnx.ModelProto:
    """Write float16 into `model`, of whose tensors `known` has types and shapes, as far as it has them. `fused` wants
    it as `streamtalk_export.fused` does, and holds the types of tensors that are decided. Raises ExportError.
    """
    converter = _Converter(model, known, fused)
    for node in list(model.graph.node):
        converter.convert(node)
    rebuild(model, converter.nodes, converter.weights, "float16", None if fused is None else converter.types)
    return model


def rebuild(
    model: onnx.ModelProto,
    nodes: list[Node],
    weights: dict[str, onnx.TensorProto],
    kind: str,
    types: dict[str, int] | None = None,
) -> None:
    """Give `model` these nodes and those of the weights that are read. Raises ExportError, which names the `kind`,
    where that makes no valid graph. The `types` of tensors are noted where no standard could tell them.
    """
    graph = model.graph
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for name, tensor in weights.items() if name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.ClearField("value_info")
    if types is not None:
        told = {value.name for value in (*graph.input, *graph.output)}
        made = [name for node in nodes for name in node.output if name in types and name not in told]
        graph.value_info.extend(helper.make_tensor_value_info(name, types[name], None) for name in made)
    try:
        onnx.checker.check_model(model, full_check=types is None)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{graph.name}: the {kind} graph is not valid: {error}") from error


class _Converter:
    """One pass over the nodes in order. `types` holds every float tensor's type so far."""

    def __init__(self, model: onnx.ModelProto, known: Any, fused: dict[str, int] | None) -> None:
        graph = model.graph
        self.fused = fused
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.types: dict[str, int] = {
            value.name: TensorProto.FLOAT
            for value in graph.input
            if value.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self.floats = _tensors_of(known, TensorProto.FLOAT) | _tensors_of(graph, TensorProto.FLOAT)
        self.lengths = _lengths(known)
        self.outputs = {value.name for value in graph.output}
        self.nodes: list[Node] = []
        self.casts: dict[tuple[str, int], str] = {}
        self.islands = islands(graph)
        self.fed_back = made_for(graph, FED_BACK) if fused is not None else set[str]()
        self.normalised: set[str] = set()
        """What a statistic has brought back to the order of 1, where the float16 of others may begin."""
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
        self.nodes.extend(self._written(node, wanted))
        if self.fused is not None and node.op_type == "InstanceNormalization":
            self.normalised.add(node.output[0])
        # Attention scores, which multiply no weight, do not count.
        weighted = node.op_type in PRODUCTS and any(name in self.weights for name in node.input)
        self.fresh = node.output[0] if weighted else ""
        for half, name in renamed:
            self.nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
            self.types[name] = TensorProto.FLOAT

    def _written(self, node: Node, wanted: int) -> list[Node]:
        """The node; a grouped float16 convolution as a product of matrices: the heuristics of onnxruntime's cuDNN know
        none as wide as HuBERT's (128 taps, 16 groups; seen with cuDNN 9.19).
        """
        grouped = node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
        length = self.lengths.get(node.input[0].removesuffix("_half"))
        if not grouped or wanted != TensorProto.FLOAT16 or length is None:
            return [node]
        return as_product(node, self.weights, length)

    def _is_half(self, node: Node) -> bool:
        data = [name for name in node.input if name in self.floats and name not in self.weights]
        halves = [self.types.get(name) == TensorProto.FLOAT16 for name in data]
        weights = [self.weights[name] for name in node.input if name in self.weights]
        if node.output[0] in self.fed_back:
            return False
        if node.op_type in PRODUCTS:
            # Where a cast costs more than it saves.
            mixed = self.fused is not None and not weights and not all(halves)
            return node.output[0] not in self.islands and not mixed and all(map(_fits, weights))
        if self.fused is not None and node.output[0] in self.fused:
            return self.fused[node.output[0]] == TensorProto.FLOAT16
        if self.fused is not None and node.op_type in FUSED:
            return all(map(_fits, weights))
        if node.op_type in MOVES:
            return bool(halves) and all(halves)
        if self.fused is not None and node.op_type not in STATISTICS:
            begins = any(name in self.normalised for name in data)
            return (begins or (bool(halves) and all(halves))) and all(map(_fits, weights))
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


def to_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose float32 products with a weight are convolutions of width 1, the same sums.

    TensorRT-RTX compiles float32 convolutions for Turing (7.5), but no float32 products of matrices.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    nodes = [new for node in list(result.graph.node) for new in as_convolution(node, weights)]
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


def made_for(graph: Any, outputs: Iterable[str]) -> set[str]:
    """Names of these outputs of a graph, and of all that is computed for them."""
    wanted = set(outputs)
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
    return wanted


def hold_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that rounds to float16 in onnxruntime on a CPU wherever `model` says float16.

    That runtime computes float16 products in float32 and then drops every pair of casts between them, even with
    optimisation off: a float16 graph is checked there with nothing rounded but its weights. An operator that it
    runs in float16 itself, behind each product, keeps the roundings (measured: the bundled encoder's error is
    9e-4 with them and 7e-5 without).
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    known = onnx.shape_inference.infer_shapes(model).graph  # what no standard knows, the graph notes itself
    halves = _tensors_of(known, TensorProto.FLOAT16)
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


def _shapes_known(model: onnx.ModelProto) -> Any:
    """The graph, with the type and shape of every tensor."""
    return onnx.shape_inference.infer_shapes(model, strict_mode=True).graph


def _tensors_of(graph: Any, kind: int) -> set[str]:
    """Names of all tensors of a graph that are known to have the element type `kind`."""
    values: Iterable[Any] = (*graph.input, *graph.output, *graph.value_info)
    names = {v.name for v in values if v.type.tensor_type.elem_type == kind}
    return names | {t.name for t in graph.initializer if t.data_type == kind}


def _lengths(graph: Any) -> dict[str, int]:
    """The last axis of every tensor of three, where it is known."""
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*graph.input, *graph.value_info)}
    return {name: dims[2].dim_value for name, dims in shapes.items() if len(dims) == 3 and dims[2].dim_value}


def _fits(tensor: onnx.TensorProto) -> bool:
    return bool(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0) <= LARGEST)
