"""Graphs for onnxruntime on a GPU: its own operators in place of what TensorRT fuses by itself.

onnxruntime launches a kernel for almost every node, and a frame of small tensors is mostly launches. So attention,
the sum before a LayerNorm and GELU are one operator each (domain `com.microsoft`), and all that lies between two
float16 products is float16 too: here a cast is a kernel, which it is not in TensorRT. What measures a signal stays
float32, see `half.islands`, and so does all that a stream feeds back: predictor and head multiply one row a voice,
where float32 costs little, and their roundings would add up for ever.

The rewriting works on the float32 graph and is exact; operators are found by what they compute, never by name. What is
not found stays as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from streamtalk_export.convolutions import Node, is_linear
from streamtalk_export.half import convert

DOMAIN = "com.microsoft"
OPERATORS = frozenset("Attention BiasGelu Gelu SkipLayerNormalization".split())
TILE = 8
"""onnxruntime's attention in one kernel wants a biased window to be a multiple of it."""
MASKED = -1e4


def to_fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a float32 graph, fused and in float16, with the same inputs and outputs. Raises ExportError."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return convert(result, known, fuse(result, known))


def fuse(model: onnx.ModelProto, known: Any) -> dict[str, int]:
    """Rewrite a float32 graph in place, whose tensors are `known` by type and shape; those that it adds are, by type,
    afterwards. Returns the types of tensors that those who read them decide.
    """
    fusion = _Fusion(model, known)
    fusion.run()
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return fusion.types


class _Fusion:
    """One rewriting of a float32 graph, in place; the tensors that it adds are `known` afterwards."""

    def __init__(self, model: onnx.ModelProto, known: Any) -> None:
        self.graph, self.known = model.graph, known
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        values = (*known.input, *known.output, *known.value_info)
        self.shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        self.nodes: list[Node] = list(self.graph.node)
        self.mask = self.masked_by = ""
        """The attention bias that all blocks share, once one was made, and what they have for it now."""
        self.types: dict[str, int] = {}
        """Of tensors that those who read them decide."""

    def run(self) -> None:
        """All fusions."""
        for find in (self._attention, self._gelu, self._normalised_sum, self._weighted_sum):
            self._index()
            for node in list(self.nodes):
                if self.made.get(node.output[0]) is node:
                    find(node)
                    self._index()
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(self.weights.values())

    def _index(self) -> None:
        """Drop what nobody reads, and note who makes and who reads a tensor."""
        wanted = {value.name for value in self.graph.output}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.made = {name: node for node in self.nodes for name in node.output}
        self.readers = Counter(name for node in self.nodes for name in node.input)
        self.readers.update(value.name for value in self.graph.output)

    def _by(self, name: str, *operators: str) -> Node | None:
        """What makes the tensor `name`, if it is one of these operators."""
        node = self.made.get(name)
        return node if node is not None and node.op_type in operators else None

    def _replace(self, old: Node, new: Node) -> None:
        self.nodes = [new if node is old else node for node in self.nodes]

    def _weight(self, name: str, values: Any) -> str:
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def _array(self, name: str) -> Any:
        return numpy_helper.to_array(self.weights[name])

    def _with_weight(self, node: Node) -> tuple[str, str] | None:
        """The activation and the weight of a node of two inputs, whichever comes first."""
        first, *rest = node.input
        if len(rest) != 1 or (first in self.weights) == (rest[0] in self.weights):
            return None
        return (rest[0], first) if first in self.weights else (first, rest[0])

    def _is(self, node: Node, number: float) -> bool:
        """Whether the second input of a node is this number."""
        given = self._array(node.input[1]) if node.input[1] in self.weights else np.empty(0)
        return given.size == 1 and abs(float(given.item()) - number) < 1e-6

    def _float(self, name: str) -> str:
        """A tensor that was not there before."""
        self.known.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        return name

    # Attention

    def _attention(self, softmax: Node) -> None:
        """`softmax(scale q k + mask) v` of one tensor's tokens: one operator, product with the weights included."""
        shape = self.shapes.get(softmax.output[0], [])
        if softmax.op_type != "Softmax" or len(shape) != 4 or shape[2] != shape[3]:
            return
        scores, mask, scale = self._scores(softmax.input[0])
        out = self._only_reader(softmax.output[0], "MatMul")
        merged = out and self._only_reader(out.output[0], "Transpose")
        last = merged and self._only_reader(merged.output[0], "Reshape")
        if scores is None or out is None or last is None or out.input[0] != softmax.output[0]:
            return
        operands = (*scores.input, out.input[1])
        found = [part for name in operands if (part := self._projection(name)) is not None]
        if len(found) != 3 or len({part[0] for part in found}) != 1:
            return
        tokens = found[0][0]
        batch, heads, length, _ = shape
        width = len(found[0][1]) // heads
        rows, columns = [batch, heads, length, width], [batch, heads, width, length]
        if [self.shapes.get(name) for name in operands] != [rows, columns, rows]:
            return
        if self.shapes.get(last.output[0]) != self.shapes.get(tokens) or _axis(softmax) not in (-1, 3):
            return
        if mask and not (mask == self.masked_by if self.mask else self._can_mask(mask, batch, length)):
            return
        weight = self._weight(f"{last.output[0]}_qkv", np.concatenate([part[1] for part in found], axis=1))
        bias = self._weight(f"{last.output[0]}_qkv_bias", np.concatenate([part[2] for part in found]))
        inputs = [tokens, weight, bias]
        if mask:
            if not self.mask:
                self.masked_by = self._make_mask(mask, tokens)
            inputs += ["", "", self.mask]
        self._replace(
            last,
            helper.make_node(
                "Attention", inputs, [last.output[0]], domain=DOMAIN, num_heads=heads, scale=float(scale)
            ),
        )

    def _scores(self, name: str) -> tuple[Node | None, str, float]:
        """The product of queries and keys behind a softmax, the mask that is added and the scale."""
        mask, scale = "", 1.0
        if (added := self._by(name, "Add")) is not None:
            name, mask = added.input
        if (scaled := self._by(name, "Mul")) is not None and (pair := self._with_weight(scaled)):
            name, factor = pair[0], self._array(pair[1])
            if factor.size != 1:
                return None, "", 1.0
            scale = float(factor)
        return self._by(name, "MatMul"), mask, scale

    def _projection(self, name: str) -> tuple[str, Any, Any] | None:
        """Tokens [B, T, h], weight [h, h] and bias [h] of what was split into heads behind the tensor `name`; a packed
        product of keys and values gives the part that is read.
        """
        part = None
        while (node := self._by(name, "Transpose", "Reshape", "Squeeze", "Slice")) is not None:
            if node.op_type == "Slice":
                part = int(self._array(node.input[1])[0])
            name = node.input[0]
        bias: Any = None
        if (added := self._by(name, "Add")) is not None and (pair := self._with_weight(added)):
            name, bias = pair[0], self._array(pair[1])
        product = self._by(name, "MatMul")
        if product is None or product.input[1] not in self.weights:
            return None
        weight = self._array(product.input[1])
        if part is not None:
            weight = weight[:, part * len(weight) :][:, : len(weight)]
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
            return None
        return product.input[0], weight, np.zeros(len(weight), np.float32) if bias is None else bias

    def _can_mask(self, mask: str, batch: int, length: int) -> bool:
        """Whether the tensor `mask` says of each voice's tokens whether they are seen."""
        return mask in self.made and self.shapes.get(mask) == [batch, 1, 1, length]

    def _make_mask(self, mask: str, tokens: str) -> str:
        """Bring the mask [B, 1, 1, T] of all blocks to what the operator wants, [B, 1, T, T]. Where T is no multiple
        of `TILE`, masked tokens stand before all others: the one-kernel attention is worth far more than they cost.
        Returns what the blocks add to their scores from then on.
        """
        maker = mask
        while (node := self._by(maker, "Transpose", "Unsqueeze", "Reshape")) is not None:
            maker = node.input[0]
        self.types[maker] = TensorProto.FLOAT16
        batch, length = self.shapes[mask][0], self.shapes[mask][3]
        front = -length % TILE
        if front:
            root = self._root(tokens)
            self._after(root, "Pad", self._weight(f"{root}_pads", np.array([0, front, 0, 0, 0, 0])))
            sides = self._weight(f"{mask}_pads", np.array([0, 0, 0, front, 0, 0, 0, 0]))
            mask = self._after(
                mask, "Pad", sides, self._weight(f"{mask}_value", np.array(MASKED, np.float32))
            )
        square = self._weight(f"{mask}_shape", np.array([batch, 1, length + front, length + front]))
        self.mask = self._float(f"{mask}_square")
        self._insert(mask, helper.make_node("Expand", [mask, square], [self.mask]))
        return mask

    def _after(self, name: str, operator: str, *more: str) -> str:
        """Let all readers of the tensor `name` read what the operator makes of it; returns that."""
        made = self._float(f"{name}_{operator.lower()}")
        self.shapes[made] = self.shapes[name]  # as all that follow are noted: what was alike still is
        for node in self.nodes:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = made
        self._insert(name, helper.make_node(operator, [name, *more], [made]))
        return made

    def _insert(self, name: str, node: Node) -> None:
        """Put a node behind the one that makes the tensor `name`."""
        place = next(i for i, maker in enumerate(self.nodes) if name in maker.output)
        self.nodes.insert(place + 1, node)

    def _root(self, tokens: str) -> str:
        """What the first block normalises: all tokens come from it."""
        normalised = self._by(tokens, "LayerNormalization")
        return tokens if normalised is None else normalised.input[0]

    def _only_reader(self, name: str, operator: str) -> Node | None:
        if self.readers[name] != 1:
            return None
        node = next((node for node in self.nodes if name in node.input), None)
        return node if node is not None and node.op_type == operator else None

    # GELU

    def _gelu(self, last: Node) -> None:
        """`x (1 + erf(x / sqrt 2)) / 2`, as `onnx_file` writes it, and the bias before it."""
        doubled = self._by(last.input[0], "Mul") if last.op_type == "Mul" else None
        added = doubled and self._by(doubled.input[1], "Add")
        erf = added and self._by(added.input[0], "Erf")
        scaled = erf and self._by(erf.input[0], "Div")
        if doubled is None or added is None or scaled is None or scaled.input[0] != doubled.input[0]:
            return
        if not (self._is(last, 0.5) and self._is(added, 1.0) and self._is(scaled, 2**0.5)):
            return
        x = doubled.input[0]
        biased = self._by(x, "Add")
        pair = biased and self._with_weight(biased)
        if pair and self._array(pair[1]).ndim == 1:
            fused = helper.make_node("BiasGelu", list(pair), [last.output[0]], domain=DOMAIN)
        else:
            fused = helper.make_node("Gelu", [x], [last.output[0]], domain=DOMAIN)
        self._replace(last, fused)

    # LayerNorm

    def _normalised_sum(self, norm: Node) -> None:
        """A sum of two tensors of tokens that is normalised, and the bias that one of them ends with."""
        if norm.op_type != "LayerNormalization" or len(norm.input) != 3 or _axis(norm) != -1:
            return
        total = self._by(norm.input[0], "Add")
        if total is None or any(name in self.weights for name in total.input):
            return
        shapes = [self.shapes.get(name) for name in total.input]
        if shapes[0] != shapes[1] or shapes[0] is None:
            return
        inputs = [*total.input, *norm.input[1:]]
        for product, other in (total.input, reversed(total.input)):
            if (taken := self._without_bias(product)) is not None:
                inputs = [other, taken[0], *norm.input[1:], taken[1]]
                break
        # In the sum's place: others may read it before the norm.
        wanted = [norm.output[0]]
        if self.readers[total.output[0]] > 1:
            wanted += ["", "", total.output[0]]
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        fused = helper.make_node("SkipLayerNormalization", inputs, wanted, domain=DOMAIN, epsilon=epsilon)
        self._replace(total, fused)
        self.nodes = [node for node in self.nodes if node is not norm]

    def _without_bias(self, name: str) -> tuple[str, str] | None:
        """The product behind a tensor that nobody else reads, and the bias [h] that is taken away from it."""
        if self.readers[name] != 1:
            return None
        node = self._by(name, "Add", "Gemm")
        if node is None:
            return None
        if node.op_type == "Add":
            pair = self._with_weight(node)
            return pair if pair and self._array(pair[1]).ndim == 1 else None
        if len(node.input) != 3 or not is_linear(node) or node.input[2] not in self.weights:
            return None
        bias = node.input.pop()
        return node.output[0], bias

    # Sums

    def _weighted_sum(self, total: Node) -> None:
        """A sum over tokens, each times its weight: a product of a row and a matrix."""
        weighted = self._by(total.input[0], "Mul") if total.op_type == "ReduceSum" else None
        if weighted is None or len(total.input) != 2 or total.input[1] not in self.weights:
            return
        x, share = weighted.input
        keeps = next((a.i for a in total.attribute if a.name == "keepdims"), 1)
        shape = self.shapes.get(x, [])
        if len(shape) != 3 or self.shapes.get(share) != [*shape[:2], 1] or shape[2] == 1:
            return
        if not keeps or self._array(total.input[1]).tolist() != [1]:
            return
        batch, length, _ = shape
        row = self._float(f"{total.output[0]}_row")
        flat = self._weight(f"{total.output[0]}_flat", np.array([batch, 1, length]))
        place = self.nodes.index(total)
        self.nodes[place : place + 1] = [
            helper.make_node("Reshape", [share, flat], [row]),
            helper.make_node("MatMul", [row, x], list(total.output)),
        ]


def _axis(node: Node) -> int:
    """The axis of a Softmax or a LayerNormalization."""
    return next((int(a.i) for a in node.attribute if a.name == "axis"), -1)
