"""Graphs for onnxruntime on a GPU: float16, in its own operators (domain `com.microsoft`).

onnxruntime launches a kernel for almost every node, and a hop of small tensors is mostly launches. So attention, GELU
and the sum before a LayerNorm become one operator each, and everything between two float16 products is float16: a cast
is a kernel here, which it is not in TensorRT. Statistics of a signal stay float32, see `half.islands`. So do predictor
and head: they multiply one row a stream, where float32 costs little, and a stream feeds their roundings back for ever.

The rewriting works on the float32 graph and is exact. It finds operators by what they compute, never by name, and
leaves alone what it does not find. The library's own optimizer (onnxruntime.transformers 1.32) finds no attention in
a hop graph, whose queries, keys and values are one product: it leaves 716 nodes of VOCASET's 829, this module 467.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.convolutions import Node
from streamtalk_export.graphs import MASKED
from streamtalk_export.half import PREDICTOR, known_shapes, parts, write_half

DOMAIN = "com.microsoft"
OPERATORS = frozenset("Attention BiasGelu Gelu SkipLayerNormalization".split())
TILE = 8
"""onnxruntime's attention in one kernel wants a masked window to be a multiple of it."""
PERMUTATIONS = [[2, 0, 3, 1, 4], [0, 1, 3, 2], [0, 2, 1, 3]]
"""Orders of axes in attention: [B, T, 3, H, d] to [3, B, H, T, d], k to [B, H, d, T], [B, H, T, d] to [B, T, H, d]."""


def for_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float16 copy of a float32 hop graph in onnxruntime's operators, with the same inputs and outputs.

    Raises ExportError.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    known = known_shapes(model)
    fuse(result, known)
    write_half(result, known, kept=parts(result.graph)[PREDICTOR], dense=True)
    return result


def fuse(model: onnx.ModelProto, known: Any) -> None:
    """Rewrite a float32 graph in onnxruntime's operators; `known`, with its types and shapes, gets the new tensors."""
    graph = _Graph(model.graph, known)
    for operator, rewrite in (
        ("Softmax", _attention),
        ("Mul", _gelu),
        ("LayerNormalization", _normalised_sum),
    ):
        for node in [node for node in graph.nodes if node.op_type == operator]:
            rewrite(graph, node)
        graph.drop_unread()
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(graph.nodes)
    model.graph.initializer.extend(graph.weights.values())
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


class _Graph:
    """A float32 graph under rewriting: its nodes in order, and the makers and readers of its tensors."""

    def __init__(self, graph: Any, known: Any) -> None:
        self.nodes: list[Node] = list(graph.node)
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = [value.name for value in graph.output]
        self.known = known
        values = (*known.input, *known.output, *known.value_info)
        self.shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        self.squares: dict[str, str] = {}
        """Attention biases [B, 1, T, T] by the masks [B, 1, 1, T] that they repeat."""
        self.drop_unread()

    def drop_unread(self) -> None:
        """Drop the nodes that no output needs, and note again who makes and who reads a tensor."""
        wanted, kept = set(self.outputs), list[Node]()
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.made = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def maker(self, name: str, operator: str) -> Node | None:
        """The node that makes the tensor `name`, if it is this operator."""
        node = self.made.get(name)
        return node if node is not None and node.op_type == operator else None

    def chain(self, name: str, *operators: str) -> list[Node]:
        """The nodes that lead to the tensor `name`, each by its first input, last one first. Empty if they are others
        than `operators`.
        """
        nodes: list[Node] = []
        for operator in operators:
            node = self.maker(name, operator)
            if node is None:
                return []
            nodes.append(node)
            name = node.input[0]
        return nodes

    def reader(self, name: str, operator: str) -> Node | None:
        """The only node that reads the tensor `name`, if it is this operator."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None

    def array(self, name: str) -> Any:
        """Values of the weight `name`."""
        return numpy_helper.to_array(self.weights[name])

    def is_number(self, name: str, number: float) -> bool:
        """Whether the tensor `name` is a constant of this value."""
        values = self.array(name) if name in self.weights else np.empty(0)
        return values.size == 1 and abs(float(values.item()) - number) < 1e-6

    def biased(self, name: str) -> tuple[str, str] | None:
        """The tensor and the bias [h] that the tensor `name` is the sum of."""
        added = self.maker(name, "Add")
        for value, bias in (added.input, reversed(added.input)) if added is not None else ():
            if bias in self.weights and len(self.weights[bias].dims) == 1:
                return value, bias
        return None

    def constant(self, name: str, values: Any) -> str:
        """Add a weight; returns its name."""
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def insert(self, operator: str, name: str, *constants: str) -> str:
        """Add a node behind the one that makes the tensor `name`; returns its result."""
        result = f"{name}_{operator.lower()}"
        node = helper.make_node(operator, [name, *constants], [result])
        place = next(i for i, maker in enumerate(self.nodes) if name in maker.output)
        self.nodes.insert(place + 1, node)
        self.made[result] = node
        self.known.value_info.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, None))
        return result

    def pad(self, name: str, pads: list[int], value: float = 0.0) -> str:
        """Let every reader of the tensor `name` read it padded; returns the padded tensor."""
        readers = self.readers[name]
        constants = {"pads": np.array(pads), "padding": np.array(value, np.float32)}
        padded = self.insert("Pad", name, *(self.constant(f"{name}_{k}", v) for k, v in constants.items()))
        for node in readers:
            node.input[:] = [padded if read == name else read for read in node.input]
        self.readers[padded] = readers
        self.shapes[padded] = self.shapes[name]  # as of all that follow: equal shapes stay equal
        return padded


def _attention(graph: _Graph, softmax: Node) -> None:
    """Make `softmax(q k + mask) v` one Attention, with the product that gives q, k and v."""
    added = graph.maker(softmax.input[0], "Add")
    scores = graph.maker(added.input[0] if added else softmax.input[0], "MatMul")
    keys = scores and graph.maker(scores.input[1], "Transpose")
    mixed = graph.reader(softmax.output[0], "MatMul")
    merged = mixed and graph.reader(mixed.output[0], "Transpose")
    last = merged and graph.reader(merged.output[0], "Reshape")
    if scores is None or keys is None or mixed is None or last is None:
        return
    found = [
        graph.chain(name, "Squeeze", "Slice", "Transpose", "Reshape")
        for name in (scores.input[0], keys.input[0], mixed.input[1])
    ]
    if not all(found) or [graph.array(part.input[1]).tolist() for _, part, *_ in found] != [[0], [1], [2]]:
        return
    split, *others = (nodes[-1] for nodes in found)
    joined = _joined(graph, split.input[0])
    permutations = [_perm(node) for node in (found[0][2], keys, merged)]
    if joined is None or any(other is not split for other in others) or permutations != PERMUTATIONS:
        return
    tokens, weight, bias = joined
    inputs = [
        tokens,
        graph.constant(f"{last.output[0]}_qkv", weight),
        graph.constant(f"{last.output[0]}_qkv_bias", bias),
    ]
    batch, length, _, heads, _ = graph.shapes[split.output[0]]
    if added:
        mask = added.input[1]
        if mask not in graph.squares and graph.shapes.get(mask) != [batch, 1, 1, length]:
            return
        inputs += ["", "", _square(graph, mask, tokens)]
    own = helper.make_node("Attention", inputs, last.output, domain=DOMAIN, num_heads=heads, scale=1.0)
    last.CopyFrom(own)


def _joined(graph: _Graph, name: str) -> tuple[str, Any, Any] | None:
    """Tokens [B, T, h], weight [h, 3 h] and bias [3 h] of the product `name` for queries, keys and values."""
    product, flat = graph.chain(name, "Gemm", "Reshape") or (graph.maker(name, "MatMul"), None)
    if product is None or product.input[1] not in graph.weights:
        return None
    weight = graph.array(product.input[1])
    if flat is not None:  # as a linear layer has it, over the tokens of all rows
        weight = weight.T
    bias = graph.array(product.input[2]) if len(product.input) > 2 else np.zeros(weight.shape[1], np.float32)
    return (flat or product).input[0], weight, bias


def _square(graph: _Graph, mask: str, tokens: str) -> str:
    """The attention bias [B, 1, T, T] that repeats a mask [B, 1, 1, T], made once for all blocks.

    Where T is no multiple of `TILE`, masked tokens go before all others: the one-kernel attention saves far more than
    they cost.
    """
    if mask not in graph.squares:
        batch, _, _, length = graph.shapes[mask]
        front = -length % TILE
        if front:
            normalised = graph.maker(tokens, "LayerNormalization")
            graph.pad(normalised.input[0] if normalised else tokens, [0, front, 0, 0, 0, 0])
            mask = graph.pad(mask, [0, 0, 0, front, 0, 0, 0, 0], MASKED)
        shape = graph.constant(f"{mask}_square", np.array([batch, 1, front + length, front + length]))
        graph.squares[mask] = graph.insert("Expand", mask, shape)
    return graph.squares[mask]


def _gelu(graph: _Graph, last: Node) -> None:
    """Make `x (1 + erf(x / sqrt 2)) / 2`, as `graph_files` writes it, one Gelu, or one BiasGelu with a bias of x."""
    doubled = graph.maker(last.input[0], "Mul")
    chain = doubled and graph.chain(doubled.input[1], "Add", "Erf", "Div")
    if not doubled or not chain or chain[-1].input[0] != doubled.input[0]:
        return
    numbers = ((last, 0.5), (chain[0], 1.0), (chain[-1], 2**0.5))
    if not all(graph.is_number(node.input[1], number) for node, number in numbers):
        return
    inputs = graph.biased(doubled.input[0])
    own = ("BiasGelu", list(inputs)) if inputs else ("Gelu", [doubled.input[0]])
    last.CopyFrom(helper.make_node(*own, last.output, domain=DOMAIN))


def _normalised_sum(graph: _Graph, norm: Node) -> None:
    """Make a sum of two tensors and its LayerNorm one SkipLayerNormalization, with the bias that one of them ends with.

    It takes the place of the sum, which others may read before the norm.
    """
    total = graph.maker(norm.input[0], "Add")
    shapes = [graph.shapes.get(name) for name in total.input] if total else []
    if total is None or shapes[0] is None or shapes[0] != shapes[1]:
        return
    inputs, bias = list(total.input), list[str]()
    for other, value in (total.input, reversed(total.input)):
        if taken := _without_bias(graph, value):
            inputs, bias = [other, taken[0]], [taken[1]]
            break
    outputs = [norm.output[0]]
    if len(graph.readers[total.output[0]]) > 1:
        outputs += ["", "", total.output[0]]
    (epsilon,) = (a.f for a in norm.attribute if a.name == "epsilon")
    own = [*inputs, *norm.input[1:], *bias]
    total.CopyFrom(helper.make_node("SkipLayerNormalization", own, outputs, domain=DOMAIN, epsilon=epsilon))
    graph.nodes = [node for node in graph.nodes if node is not norm]


def _without_bias(graph: _Graph, name: str) -> tuple[str, str] | None:
    """The tensor `name`, which one node reads, without the bias that it ends with, and that bias."""
    if len(graph.readers[name]) > 1:
        return None
    product = graph.maker(name, "Gemm")
    if product is not None and len(product.input) == 3:
        bias = product.input.pop()
        return name, bias
    return graph.biased(name)


def _perm(node: Node) -> list[int]:
    """The order of axes of a Transpose."""
    return next(list(a.ints) for a in node.attribute if a.name == "perm")
