"""Float16 written into an ONNX graph, with float32 kept where float16 is not safe.

TensorRT 11 and TensorRT-RTX are strongly typed: a tensor has the type that the graph gives it. So this module
decides, node by node. The inputs and outputs of the graph stay float32.

`to_half` makes products (Gemm, MatMul, Conv) float16, the operators that only move their results, and the sums inside
a product or with its bias. Everything else is float32: that costs a fused kernel nothing, and each of its roundings
would add to the error. Some products stay float32 too. The converter finds them by the nodes that read them, not by
their names: see `islands`. onnxruntime does not fuse like that, and each cast is one more kernel there: with `dense`,
which `streamtalk_export.fused` uses, everything between two products is float16 as well.

The islands were measured over 8 s of closed loop, vertex error p99 and maximum. Bundled model, in mm: .0024 and
.0074; without those that feed a statistic .057 and .31; without the sampler's .0024 and .0069. VOCASET's preset at
small size with random weights, in percent of the RMS motion: .35 and .69; .43 and .79; .41 and .73.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.convolutions import Node, as_product
from streamtalk_export.errors import ExportError

PRODUCTS = frozenset(("Gemm", "MatMul", "Conv"))
MOVES = frozenset(
    "Reshape Transpose Slice Split Squeeze Unsqueeze Gather Concat Expand Flatten Identity Pad Relu".split()
)
"""Operators that are exact in any type: they take the type of their data."""
STATISTICS = frozenset("InstanceNormalization ReduceMean ReduceSum Pow Log".split())
"""Operators that measure a signal over time. A division by a small deviation magnifies the rounding of its input
(InstanceNorm's gain reaches 300); the values of a power spectrum leave float16's range."""
FUSED = frozenset("Attention BiasGelu Gelu LayerNormalization SkipLayerNormalization".split())
"""onnxruntime's kernels that read and write float16 and compute in float32, GELU's erf aside."""
STOPS = frozenset(("LayerNormalization", "SkipLayerNormalization", "Attention", "Softmax")) | PRODUCTS
"""Operators where the search for readers of a product ends: their results are of the order of 1 again."""
SAMPLED = frozenset(("latent", "latents_out"))
"""Outputs of the sampler. Its last products stay float32: a stream feeds them back for ever."""
STATE = frozenset(("latents_out", "kv_cache_out"))
ENCODER, PREDICTOR, DECODER = PARTS = ("audio encoder", "condition predictor and head", "decoder")
LARGEST = float(np.finfo(np.float16).max)


def to_half(model: onnx.ModelProto, part: str | None = None) -> onnx.ModelProto:
    """Return a copy of `model` with float16 inside and the same inputs and outputs.

    `part`, one of `PARTS`, is the only part of a hop graph to convert; None converts everything. Raises ExportError.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    made = parts(model.graph)
    others = (names for name, names in made.items() if part not in (None, name))
    write_half(result, known_shapes(model), kept=set().union(*others))
    return result


def coarsest_part(model: onnx.ModelProto, error: Callable[[onnx.ModelProto], float]) -> str:
    """Return the one of `PARTS` of a hop graph that has the largest `error`, or NaN, when it alone is float16."""
    return max(PARTS, key=lambda part: float(np.nan_to_num(error(to_half(model, part)), nan=np.inf)))


def parts(graph: Any) -> dict[str, set[str]]:
    """Tensors of a hop graph by the one of `PARTS` that computes them."""
    makers = {name: node for node in graph.node for name in node.output}
    later = {value.name for value in graph.input if value.name != "pcm"}
    bridge: list[str] = []
    for node in graph.node:
        if later.intersection(node.input):
            later.update(node.output)
            bridge += [name for name in node.input if name in makers and name not in later]
    # Cross-attention reads the audio alone, too: one product of the features, the last before the other inputs.
    while bridge:
        node = makers[bridge.pop()]
        if node.op_type in MOVES | PRODUCTS:
            later.update(node.output)
        if node.op_type in MOVES:
            bridge.append(node.input[0])
    needed = set(STATE)
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    made = set(makers)
    return {ENCODER: made - later, PREDICTOR: made & later & needed, DECODER: made & later - needed}


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
        if name in SAMPLED:
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


def write_half(model: onnx.ModelProto, known: Any, kept: AbstractSet[str], dense: bool = False) -> None:
    """Write float16 into `model`. Raises ExportError.

    `known` is a graph with the types and shapes of the tensors, where a standard gives them. The tensors `kept` stay
    float32. `dense` is for onnxruntime, see above; the model then states the type of every tensor itself, since no
    standard gives those of onnxruntime's own operators.
    """
    graph = model.graph
    converter = _Converter(graph, known, kept, dense)
    for node in list(graph.node):
        converter.convert(node)
    read = {name for node in converter.nodes for name in node.input} | {value.name for value in graph.output}
    weights = [tensor for name, tensor in converter.weights.items() if name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(converter.nodes)
    graph.initializer.extend(weights)
    if dense:
        made = {name for node in converter.nodes for name in node.output} - {
            value.name for value in graph.output
        }
        types = ((name, kind) for name, kind in converter.types.items() if name in made)
        graph.value_info.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in types)
    try:
        onnx.checker.check_model(model, full_check=not dense)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{graph.name}: the float16 graph is not valid: {error}") from error


class _Converter:
    """One pass over the nodes in order. `types` holds the types of the float tensors so far."""

    def __init__(self, graph: Any, known: Any, kept: AbstractSet[str], dense: bool) -> None:
        self.kept, self.dense = kept, dense
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
        self.normalised: set[str] = set()
        """Results of InstanceNormalization: of the order of 1 again."""
        self.fresh = ""
        """Output of the node before this one, if that multiplies a weight."""

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
        if node.op_type == "InstanceNormalization":
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
        if node.output[0] in self.kept:
            return False
        data = [name for name in node.input if name in self.floats and name not in self.weights]
        halves = [self.types.get(name) == TensorProto.FLOAT16 for name in data]
        weights = [self.weights[name] for name in node.input if name in self.weights]
        all_half = bool(halves) and all(halves)
        if node.op_type in PRODUCTS:
            # Dense: to cast one of two activations costs more than a float16 product saves.
            mixed = self.dense and not weights and not all_half
            return node.output[0] not in self.islands and not mixed and all(map(_fits, weights))
        if self.dense and node.op_type == "Gather" and not data:
            return all(map(_is_exact, weights))
        if node.op_type in MOVES:
            return all_half
        if self.dense and node.op_type in FUSED:
            return all(map(_fits, weights))
        if self.dense and node.op_type not in STATISTICS:
            return (all_half or not self.normalised.isdisjoint(data)) and all(map(_fits, weights))
        # A bias that follows its product; a residual sum has two activations and is float32.
        return node.op_type == "Add" and len(data) == 1 and all_half and data[0] == self.fresh

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


def hold_roundings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that rounds to float16 in onnxruntime on a CPU wherever `model` says float16.

    That runtime computes float16 products in float32 and then drops every pair of casts between them, even with
    optimisation off: of a float16 graph it would round the weights alone. An operator that it runs in float16 itself,
    behind each product, keeps the roundings. Measured: the bundled encoder's error is 9e-4 with them and 7e-5 without.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    known = onnx.shape_inference.infer_shapes(model).graph
    halves = _tensors_of(known, TensorProto.FLOAT16)
    nodes: list[Node] = []
    for node in list(result.graph.node):
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in halves and node.op_type not in MOVES:
                node.output[place] = raw = f"{name}_raw"
                nodes.append(helper.make_node("Max", [raw, raw], [name]))
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.node.extend(nodes)
    return result


def known_shapes(model: onnx.ModelProto) -> Any:
    """The graph of a model of standard operators, with the type and shape of every tensor."""
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


def _is_exact(tensor: onnx.TensorProto) -> bool:
    """Whether float16 holds every number of a table."""
    values = numpy_helper.to_array(tensor)
    return _fits(tensor) and np.array_equal(values, values.astype(np.float16))
