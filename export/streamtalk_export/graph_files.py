"""Graphs in files: traced at opset 18, IR 10, in operators that TensorRT 10.3 parses, with the weights in one file.

All graphs of a precision share one external-data file, in which each tensor lies once, whatever its name.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import msgspec
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from streamtalk.model import Graph, Precision, sha256_of
from streamtalk.model import Tensor as TensorInfo
from streamtalk_export.errors import ExportError

OPSET = 18
HALF = 0.5
IR_VERSION = 10
EXTERNAL_BYTES = 1024
"""Constants from this size on go to the file of weights."""
PAGE, PAGED_BYTES, ALIGNMENT = 4096, 1 << 20, 64
"""Boundaries that tensors begin on in it: large ones on a page, so that loaders can map them."""

DYNAMIC_MINIMUM = 3200
"""Smallest size the tracer may assume for a dynamic axis, samples of audio: enough for a few features."""

# Operators of the exported graphs that TensorRT 10.3's parser lists as supported.
OPERATORS = frozenset(
    """Add And Cast Clip Concat Constant Conv Cos Div Equal Erf Exp Expand Flatten Floor Gather GatherND Gemm Greater
    GreaterOrEqual Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log MatMul Max
    Min Mul Neg Not Or Pad Pow Range Reciprocal ReduceMean ReduceSum Relu Reshape Resize Shape Sigmoid Sin Slice
    Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where""".split()
)


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    name: str,
    dynamic: dict[str, dict[int, str]] | None = None,
) -> onnx.ModelProto:
    """Trace `module` with example `inputs` (named, in order).

    `dynamic` names axes of unknown size by input. Raises ExportError where an operator is out of bounds.
    """
    shapes = None
    if dynamic:
        shapes = tuple(
            {
                axis: torch.export.Dim(label, min=DYNAMIC_MINIMUM)
                for axis, label in dynamic.get(key, {}).items()
            }
            for key in inputs
        )
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            # Distinct objects: the tracer merges inputs that are the same tensor.
            tuple(value.clone() for value in inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
        )
    if program is None:
        raise ExportError(f"Tracing {name} gave no graph.")
    model = program.model_proto
    _anonymise(model)
    _scale_last(model)
    check_graph(model, name)
    return model


class GraphFiles:
    """Graphs of one precision in a directory, under construction: their ONNX files and the weights that they share."""

    def __init__(self, directory: Path, precision: Precision) -> None:
        self._directory, self._precision = directory, precision
        self._weights = directory / f"weights.{precision}.bin"
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0
        self._graphs: dict[str, Graph] = {}

    def save(self, key: str, model: onnx.ModelProto) -> None:
        """Write a checked graph, whose large weights are taken out of `model`; `key` is as in the manifest."""
        with self._weights.open("ab") as file:
            for tensor in model.graph.initializer:
                content = tensor.raw_data
                if len(content) >= EXTERNAL_BYTES:
                    self._put_outside(tensor, content, file)
        path = self._directory / f"{key}.onnx"
        path.write_bytes(model.SerializeToString())
        self._graphs[key] = Graph(
            file=path.name,
            files={path.name: sha256_of(path)},
            precision=self._precision,
            operators="onnxruntime" if any(entry.domain for entry in model.opset_import) else "onnx",
            inputs=tuple(_describe(value) for value in model.graph.input),
            outputs=tuple(_describe(value) for value in model.graph.output),
        )

    def finished(self) -> dict[str, Graph]:
        """Entries of the manifest, once all graphs are written."""
        shared = {self._weights.name: sha256_of(self._weights)} if self._end else {}
        return {
            key: msgspec.structs.replace(graph, files=graph.files | shared)
            for key, graph in self._graphs.items()
        }

    def _put_outside(self, tensor: onnx.TensorProto, content: bytes, file: IO[bytes]) -> None:
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            padding = -self._end % (PAGE if len(content) >= PAGED_BYTES else ALIGNMENT)
            file.write(bytes(padding) + content)
            self._places[digest] = self._end + padding, len(content)
            self._end += padding + len(content)
        offset, length = self._places[digest]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for name, value in (("location", self._weights.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=name, value=str(value))


def _anonymise(model: onnx.ModelProto) -> None:
    """Drop the tracer's notes: they hold paths of the exporting machine, which also change every hash."""
    for holder in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del holder.metadata_props[:]
        holder.doc_string = ""
    for item in (*model.graph.value_info, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def _scale_last(model: onnx.ModelProto) -> None:
    """Write GELU as `x * (1 + erf(x / sqrt(2))) * 0.5`, the form that onnxruntime makes one kernel of; the tracer
    halves the sum before it is multiplied by x. Halving is exact: nothing changes but subnormal numbers.
    """
    nodes = {output: node for node in model.graph.node for output in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    halves = {
        tensor.name
        for tensor in model.graph.initializer
        if not tensor.dims and float(numpy_helper.to_array(tensor)) == HALF
    }
    for last in model.graph.node:
        for x, halved in (last.input, reversed(last.input)) if last.op_type == "Mul" else ():
            first = nodes.get(halved)
            if first is None or first.op_type != "Mul" or readers[halved] > 1 or first.input[0] not in halves:
                continue
            half, added = first.input
            above = nodes.get(added)
            erf = nodes.get(above.input[0]) if above is not None and above.op_type == "Add" else None
            if erf is None or erf.op_type != "Erf":
                continue
            first.input[:] = [x, added]
            last.input[:] = [halved, half]
            break


def check_graph(model: onnx.ModelProto, name: str) -> None:
    """Raise ExportError unless every consumer of standard graphs can read this one."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions != {"": OPSET} or model.ir_version != IR_VERSION or model.functions:
        raise ExportError(
            f"{name} came out as opset {versions}, IR {model.ir_version}; expected opset {OPSET}, IR "
            f"{IR_VERSION}. Use the versions of torch and onnxscript in constraints.txt."
        )
    foreign = sorted({node.op_type for node in model.graph.node} - OPERATORS)
    if foreign:
        raise ExportError(f"{name} uses {', '.join(foreign)}, which TensorRT 10.3 is not known to parse.")


def _describe(value: onnx.ValueInfoProto) -> TensorInfo:
    kinds = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.INT64: "int64",
        onnx.TensorProto.BOOL: "bool",
    }
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return TensorInfo(value.name, kinds[tensor.elem_type], shape)  # type: ignore[arg-type]
