"""Cost of a graph, counted from the ONNX itself: operations, bytes and kernels, operator by operator.

A product (MatMul, Gemm, Conv), a normalisation, softmax, reduction or copy is a kernel. Pointwise operators, and
those that only pick or turn elements, run in the kernel before them, as TensorRT and onnxruntime fuse them; views cost
nothing. A kernel reads its weights and what other kernels left in memory, each tensor once, and writes what others
or the caller will read. An operator that is not in these lists is an error, never a zero.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with onnx

from streamtalk import StreamTalkError

PRODUCTS = frozenset(("MatMul", "Gemm", "Conv"))
PER_INPUT = {
    "Softmax": 5,
    "LayerNormalization": 7,
    "InstanceNormalization": 7,
    "ReduceSum": 1,
    "ReduceMean": 1,
}
"""Operations for each element read: kernels of their own."""
COPIES = frozenset(("Concat", "Pad"))
"""Kernels that compute nothing."""
VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"))
PICKS = frozenset(("Slice", "Split", "Gather", "GatherND"))
"""These read what they put out, not all that they are given."""
MOVES = frozenset(("Transpose", "Expand", "Cast"))
POINTWISE = frozenset(
    """Add Sub Mul Div Neg Pow Sqrt Reciprocal Exp Log Erf Sigmoid Tanh Relu LeakyRelu Clip Min Max Cos Sin Floor Not
    And Or Equal Greater GreaterOrEqual Less LessOrEqual Where Range Resize Mod""".split()
)
"""One operation for each element put out, whatever it is."""
SHAPES = frozenset(("Shape", "Constant"))
KNOWN = PRODUCTS | set(PER_INPUT) | COPIES | VIEWS | PICKS | MOVES | POINTWISE | SHAPES


class CountError(StreamTalkError, ValueError):
    """A graph that cannot be counted."""


@dataclass
class Kernel:
    """One launch. `macs` are multiply-accumulates of products, `ops` all other arithmetic; `half` says whether
    its products are in float16. Bytes are of weights, and of tensors read and written.
    """

    op: str
    macs: int = 0
    ops: int = 0
    half: bool = False
    weight_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0


@dataclass(frozen=True)
class Count:
    """A graph's kernels in order. `state_bytes` are the inputs that come back as `NAME_out`: a part of the reads
    and, once more, of the writes.
    """

    name: str
    kernels: tuple[Kernel, ...]
    nodes: int
    state_bytes: int

    def total(self, field: str) -> int:
        """Sum of one figure of the kernels."""
        return sum(getattr(kernel, field) for kernel in self.kernels)

    @property
    def activation_bytes(self) -> int:
        """Read and written, without the weights."""
        return self.total("read_bytes") + self.total("write_bytes")

    def batched(self, factor: int) -> Count:
        """The same graph for `factor` times as many rows. Exact, for every tensor that is no weight has an axis of
        rows: a test compares it with graphs that were exported so.
        """
        scaled = ("macs", "ops", "read_bytes", "write_bytes")
        kernels = (replace(k, **{name: factor * getattr(k, name) for name in scaled}) for k in self.kernels)
        return replace(self, kernels=tuple(kernels), state_bytes=factor * self.state_bytes)


@dataclass(frozen=True)
class Info:
    """A tensor's shape and the bytes of one element."""

    shape: tuple[int, ...]
    item_bytes: int
    half: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.item_bytes


def count(path: Path, dimensions: Mapping[str, int] | None = None) -> Count:
    """Count the graph in `path`; `dimensions` gives the sizes of dynamic axes. External weights are not read.

    Raises CountError for operators or shapes that are not known.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise CountError(f"{path} is no ONNX graph that can be read.") from error
    return count_model(model, path.stem, dimensions)


def count_model(model: onnx.ModelProto, name: str, dimensions: Mapping[str, int] | None = None) -> Count:
    """Count a graph in memory, whose sizes are filled in. As `count`."""
    if unknown := sorted({node.op_type for node in model.graph.node} - KNOWN):
        raise CountError(
            f"{name} has operators that the counter does not know: {', '.join(unknown)}. A count without them "
            "would be too low; add them to budget_count.py."
        )
    return _Counter(model, _shapes(model, name, dimensions or {})).run(name)


class _Counter:
    """One pass over the nodes, which ONNX keeps in the order of execution."""

    def __init__(self, model: Any, tensors: Mapping[str, Info]) -> None:
        self._graph = model.graph
        self._tensors = tensors
        self._constant = {tensor.name for tensor in model.graph.initializer}
        self._kernels: list[Kernel] = []
        self._maker: dict[str, int] = {}
        """Index of the kernel that makes a tensor; none for inputs."""
        self._root: dict[str, str] = {}
        """The tensor that a view is of."""
        self._read: dict[int, set[str]] = {}
        self._written: set[str] = set()

    def run(self, name: str) -> Count:
        for node in self._graph.node:
            self._take(node)
        for output in self._graph.output:
            self._leaves(output.name)
        outputs = {output.name for output in self._graph.output}
        state = [value.name for value in self._graph.input if f"{value.name}_out" in outputs]
        nodes = sum(node.op_type not in VIEWS | SHAPES for node in self._graph.node)
        return Count(name, tuple(self._kernels), nodes, sum(self._tensors[name].bytes for name in state))

    def _take(self, node: Any) -> None:
        kind = node.op_type
        inputs = [name for name in node.input if name]
        if kind in SHAPES or all(name in self._constant for name in inputs):
            self._constant.update(node.output)  # folded when the graph is loaded
            return
        if kind in VIEWS:
            source, view = node.input[0], node.output[0]
            self._root[view] = self._root.get(source, source)
            if source in self._maker:
                self._maker[view] = self._maker[source]
            return
        index = self._kernel(kind, inputs)
        kernel = self._kernels[index]
        data = inputs[:1] if kind in PICKS | {"Expand", "Pad"} else inputs
        for name in data:
            self._reads(index, name, [o for o in node.output if o] if kind in PICKS else None)
        if kind in PICKS and len(inputs) > 1 and inputs[1] not in self._constant:
            self._reads(index, inputs[1], None)  # the indices of a Gather
        put_out = sum(self._tensors[name].size for name in node.output if name)
        if kind in PRODUCTS:
            kernel.macs += self._macs(node)
            kernel.half |= self._tensors[node.output[0]].half
            kernel.ops += put_out if kind != "MatMul" and len(inputs) > 2 else 0
        elif kind in PER_INPUT:
            kernel.ops += PER_INPUT[kind] * self._tensors[inputs[0]].size
        elif kind in POINTWISE:
            kernel.ops += put_out
        for name in node.output:
            if name:
                self._maker[name] = index

    def _kernel(self, kind: str, inputs: list[str]) -> int:
        """The kernel that this node runs in."""
        makers = [self._maker[name] for name in inputs if name in self._maker]
        if kind in PRODUCTS | set(PER_INPUT) | COPIES or not makers:
            self._kernels.append(Kernel(kind))
            return len(self._kernels) - 1
        # The latest: what it needs from the others is there by then.
        return max(makers)

    def _reads(self, index: int, name: str, picked: list[str] | None) -> None:
        """Note that kernel `index` reads a tensor, or only what it picks from it."""
        kernel, root = self._kernels[index], self._root.get(name, name)
        if self._maker.get(name) == index:
            return
        size = sum(self._tensors[p].bytes for p in picked) if picked else self._tensors[root].bytes
        seen = self._read.setdefault(index, set())
        if root in seen and not picked:
            return
        if not picked:
            seen.add(root)
        if name in self._constant and not picked:
            kernel.weight_bytes += size
        else:
            kernel.read_bytes += size  # a row of a table too: each row reads its own
            self._leaves(name)

    def _leaves(self, name: str) -> None:
        """Note that a tensor is read outside of the kernel that makes it."""
        root = self._root.get(name, name)
        if name in self._maker and root not in self._written:
            self._written.add(root)
            self._kernels[self._maker[name]].write_bytes += self._tensors[root].bytes

    def _macs(self, node: Any) -> int:
        first, second = (self._tensors[name].shape for name in node.input[:2])
        put_out = self._tensors[node.output[0]].size
        if node.op_type == "Conv":  # weights [out, in / groups, *kernel]
            return put_out * math.prod(second[1:])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        return put_out * (first[0] if attributes.get("transA") else first[-1])


def _shapes(model: Any, name: str, dimensions: Mapping[str, int]) -> dict[str, Info]:
    """Every tensor of a graph. Raises CountError where a shape is not known."""
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = _evaluated(axis.dim_param, dimensions, name)
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise CountError(f"{name}: {error}") from error
    tensors = {t.name: _info(tuple(t.dims), t.data_type) for t in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(axis.HasField("dim_value") for axis in kind.shape.dim):
            tensors[value.name] = _info(tuple(axis.dim_value for axis in kind.shape.dim), kind.elem_type)
    missing = [o for node in model.graph.node for o in node.output if o and o not in tensors]
    if missing:
        raise CountError(f"{name}: no shape is known for {', '.join(missing[:5])}.")
    return tensors


def _info(shape: tuple[int, ...], kind: int) -> Info:
    return Info(shape, onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize, kind == onnx.TensorProto.FLOAT16)


_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def _evaluated(text: str, dimensions: Mapping[str, int], name: str) -> int:
    """The size that the exporter wrote as a formula, such as `samples//320 + 24`. Raises CountError."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in dimensions:
            return dimensions[node.id]
        raise CountError(f"{name}: the size {text!r} is not known.")

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise CountError(f"{name}: the size {text!r} is not known.") from error
