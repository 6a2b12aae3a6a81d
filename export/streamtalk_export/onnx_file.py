"""Tracing a module into an ONNX file: opset 18, IR 10, operators that TensorRT 10.3 parses."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from streamtalk.manifest import Graph, Precision, sha256_of
from streamtalk.manifest import Tensor as TensorInfo
from streamtalk_export.eight_bit import to_int8
from streamtalk_export.errors import ExportError
from streamtalk_export.fused import OPERATORS as FUSED_OPERATORS
from streamtalk_export.fused import to_fused
from streamtalk_export.half import to_half

OPSET = 18
HALF = 0.5
IR_VERSION = 10
EXTERNAL_DATA_BYTES = 64 << 20
"""Weights above this go to a file beside the graph, which loaders can map instead of parse."""

DYNAMIC_MINIMUM = 3200
"""Smallest size the tracer may assume for a dynamic axis, samples of audio: enough for a few features."""

# Operators of the exported graphs that TensorRT 10.3's parser lists as supported.
OPERATORS = frozenset(
    """Add And Cast Clip Concat Constant Conv Cos Div Equal Erf Exp Expand Flatten Floor Gather GatherND Gemm Greater
    GreaterOrEqual Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log MatMul Max
    Min Mul Neg Not Or Pad Pow Range Reciprocal ReduceMean ReduceSum Relu Reshape Resize Shape Sigmoid Sin Slice
    Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where""".split()
)


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    path: Path,
    dynamic: dict[str, dict[int, str]] | None = None,
) -> Graph:
    """Trace `module` with example `inputs` (named, in order) into `path`; returns its manifest entry.

    `dynamic` names axes of unknown size by input. Raises ExportError where an operator is out of bounds.
    """
    shapes = None
    if dynamic:
        shapes = tuple(
            {axis: torch.export.Dim(name, min=DYNAMIC_MINIMUM) for axis, name in dynamic.get(key, {}).items()}
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
        raise ExportError(f"Tracing {path.name} gave no graph.")
    model = program.model_proto
    _anonymise(model)
    _scale_last(model)
    _check(model, path.name)
    return save_graph(model, path, "fp32")


def write_reduced(directory: Path, graph: Graph, precision: Precision, exact: bool = False) -> Graph:
    """Write an exported graph at a lower precision beside it, or under that name as it is where `exact`; returns its
    manifest entry. Raises ExportError.
    """
    path = directory / graph.file
    model = onnx.load(path)
    return save_graph(
        model if exact else _reduced(model, precision, path.name),
        path.with_suffix(f".{precision}.onnx"),
        precision,
    )


def _reduced(model: onnx.ModelProto, precision: Precision, name: str) -> onnx.ModelProto:
    if precision == "int8":
        return to_int8(model)
    if precision == "fused":
        model = to_fused(model)
        _check_operators(model, name, OPERATORS | FUSED_OPERATORS, "onnxruntime is not known to have")
        return model
    model = to_half(model)
    _check(model, name)
    return model


def save_graph(model: onnx.ModelProto, path: Path, precision: Precision) -> Graph:
    """Save a checked graph, large weights beside it; returns its manifest entry."""
    data = path.name + ".data"
    external = sum(len(t.raw_data) for t in model.graph.initializer) > EXTERNAL_DATA_BYTES
    onnx.save(model, path, save_as_external_data=external, location=data, size_threshold=1024)
    names = [path.name, data] if external else [path.name]
    return Graph(
        file=path.name,
        files={name: sha256_of(path.parent / name) for name in names},
        precision=precision,
        inputs=tuple(_describe(value) for value in model.graph.input),
        outputs=tuple(_describe(value) for value in model.graph.output),
    )


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


def _check(model: onnx.ModelProto, name: str) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions != {"": OPSET} or model.ir_version != IR_VERSION or model.functions:
        raise ExportError(
            f"{name} came out as opset {versions}, IR {model.ir_version}; expected opset {OPSET}, IR "
            f"{IR_VERSION}. Use the versions of torch and onnxscript in constraints.txt."
        )
    _check_operators(model, name, OPERATORS, "TensorRT 10.3 is not known to parse")


def _check_operators(model: onnx.ModelProto, name: str, known: frozenset[str], complaint: str) -> None:
    foreign = sorted({node.op_type for node in model.graph.node} - known)
    if foreign:
        raise ExportError(f"{name} uses {', '.join(foreign)}, which {complaint}.")


def _describe(value: onnx.ValueInfoProto) -> TensorInfo:
    kinds = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.INT64: "int64",
        onnx.TensorProto.BOOL: "bool",
    }
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return TensorInfo(value.name, kinds[tensor.elem_type], shape)  # type: ignore[arg-type]
