"""Cost on devices that nobody here has: `python -m benchmarks.budget` predicts it, and says so.

Operations and bytes of every graph are counted from the ONNX itself; a roofline over NVIDIA's published figures
turns them into milliseconds a hop; and the same roofline, calibrated on this processor, is compared with what the
graphs take here. `--engine DIR` counts an exported model; `--config bundled vocaset biwi` traces graphs of these
presets with random weights, for every hop, history and decode window that is asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import onnx

from benchmarks.budget_count import Count, count, count_model
from benchmarks.budget_measure import Calibration, Check, check
from benchmarks.budget_model import Prediction, Setup, catalogue, predict
from benchmarks.budget_report import markdown
from benchmarks.latency_rows import GPU_SYSTEMS, batch_of, hardware
from streamtalk import StreamTalkError, UsageError
from streamtalk.model import Manifest, hop_name, read_manifest
from streamtalk_export.errors import ExportError
from streamtalk_export.half import to_half

OFFLINE_S = 9
"""Seconds of audio that the offline encoder is counted for."""
BATCHES = (1, 4, 8)
HOPS = (1, 2, 4, 8)
HISTORIES = (30,)
DECODE_WINDOWS = (8, 16)
SCHEMA = 1


@dataclass
class Budget:
    """One model: its graphs in float32, the settings predicted, and the check on this processor."""

    name: str
    setup: Setup
    counts: list[Count]
    half: list[Count]
    predictions: list[Prediction]
    calibration: Calibration | None = None
    checks: list[Check] = field(default_factory=list)
    device: str = ""
    device_checks: list[Check] = field(default_factory=list)
    """Measurements on a real `device`, beside the predictions for it."""


def of_engine(directory: Path, batches: Sequence[int], measure: bool) -> Budget:
    """The budget of an exported model. Raises StreamTalkError."""
    m: Manifest = read_manifest(directory)
    paths = {name: directory / graph.file for name, graph in m.graphs.items() if graph.precision == "fp32"}
    streaming = {name: path for name, path in paths.items() if not name.endswith("_offline")}
    counts = {name: count(path, {"samples": OFFLINE_S * m.sample_rate}) for name, path in paths.items()}
    half = {name: _half(onnx.load(path), name) for name, path in streaming.items()}
    setup = Setup(m.hop, m.history, m.decode_window, 1)
    setups = [setup, *(replace(setup, batch=batch) for batch in (*m.row_counts, *(batches or BATCHES)))]
    predictions = _predictions(setups, lambda s: half.get(hop_name(s.batch)) or half["hop"].batched(s.batch))
    budget = Budget(m.name, setup, list(counts.values()), list(half.values()), predictions)
    _check(budget, {name: (path, counts[name]) for name, path in streaming.items()}, measure)
    return budget


def of_config(
    config: str,
    hops: Sequence[int],
    histories: Sequence[int],
    decode_windows: Sequence[int],
    batches: Sequence[int],
    measure: bool,
) -> Budget:
    """The budget of a preset or YAML file, traced here. Raises ExportError and StreamTalkError."""
    from benchmarks.budget_trace import Tracer

    tracer = Tracer(config, _say)
    default = tracer.default
    # One setting at a time: their effects add up, and a full grid is a table that nobody reads.
    setups = [
        default,
        *(replace(default, hop=hop) for hop in hops),
        *(replace(default, history=history) for history in histories),
        *(replace(default, decode_window=window) for window in decode_windows),
        *(replace(default, batch=batch) for batch in batches),
    ]
    graphs: dict[str, onnx.ModelProto] = {**tracer.stages(default), "hop": tracer.hop(default)}
    counts = {name: count_model(graph, name) for name, graph in graphs.items()}
    half = {name: _half(graph, name) for name, graph in graphs.items()}
    known = {default: half["hop"]}

    def counted(setup: Setup) -> Count:
        one = replace(setup, batch=1)
        if one not in known:
            known[one] = _half(tracer.hop(one), "hop")
        return known[one].batched(setup.batch)

    predictions = _predictions(setups, counted)
    budget = Budget(tracer.name, default, list(counts.values()), list(half.values()), predictions)
    _check(budget, {name: (graph, counts[name]) for name, graph in graphs.items()}, measure)
    return budget


def _half(graph: onnx.ModelProto, name: str) -> Count:
    """The count of a graph's float16 form, which is what a GPU would run."""
    return count_model(to_half(graph), name)


def _predictions(setups: Iterable[Setup], counted: Callable[[Setup], Count]) -> list[Prediction]:
    devices = catalogue().devices
    return [
        predict(device, setup, hop)
        for setup in dict.fromkeys(setups)
        for hop in (counted(setup),)
        for device in devices
    ]


def _check(budget: Budget, graphs: Mapping[str, tuple[Path | onnx.ModelProto, Count]], measure: bool) -> None:
    if measure:
        _say(f"{budget.name}: measuring on this processor")
        budget.calibration, budget.checks = check(graphs)


def compare(budgets: Sequence[Budget], paths: Iterable[Path], device: str) -> None:
    """Put the hops that `benchmarks.gpu --json` measured on `device` beside the predictions for as many rows. Raises
    UsageError.
    """
    if device not in (names := [d.name for d in catalogue().devices]):
        raise UsageError(f"--device {device}: there are {', '.join(names)}.")
    for path in paths:
        try:
            measured = json.loads(path.read_text(encoding="utf-8"))
            for budget in budgets:
                _same_settings(budget, measured.get("settings", {}).get(budget.name), path)
                found = [*_checks_of(budget, measured["rows"], device)]
                budget.device, budget.device_checks = device, [*budget.device_checks, *found]
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"--measured {path} is not what benchmarks.gpu --json writes.") from error
    if not any(budget.device_checks for budget in budgets):
        models = ", ".join(budget.name for budget in budgets)
        raise UsageError(f"--measured has no hops of {models} on a GPU ({', '.join(GPU_SYSTEMS)}).")


def _same_settings(budget: Budget, settings: dict[str, Any] | None, path: Path) -> None:
    """Raise UsageError unless both are of the same hop and windows."""
    for name in ("hop", "history", "decode_window") if settings else ():
        got, want = settings[name], getattr(budget.setup, name)  # type: ignore[index]
        if got != want:
            raise UsageError(f"--measured {path}: {budget.name} was measured with {name} {got}, not {want}.")


def _checks_of(budget: Budget, rows: Iterable[dict[str, Any]], device: str) -> Iterator[Check]:
    known = {p.setup: p for p in budget.predictions if p.device == device}
    for row in rows:
        batch = batch_of(row["variant"])
        if row["preset"] != budget.name or row["system"] not in GPU_SYSTEMS or batch is None:
            continue
        predicted = known.get(replace(budget.setup, batch=batch))
        if predicted and row["stage"] == "hop":
            yield Check(f"hop, rows {batch} ({row['system']})", predicted.hop_ms, row["p50_ms"])


def document(budgets: Sequence[Budget]) -> dict[str, object]:
    """Contents of the file of `--json`."""
    return {
        "schema": SCHEMA,
        "prediction": True,
        "hardware": hardware(),
        "devices": json.loads(_devices()),
        "models": [
            {
                "model": b.name,
                "setup": asdict(b.setup),
                "graphs": {"fp32": [_figures(c) for c in b.counts], "fp16": [_figures(c) for c in b.half]},
                "predictions": [{**asdict(p), "frame_ms": p.frame_ms} for p in b.predictions],
                "calibration": asdict(b.calibration) if b.calibration else None,
                "checks": [{**asdict(c), "error": c.error} for c in b.checks],
                "device": b.device,
                "device_checks": [{**asdict(c), "error": c.error} for c in b.device_checks],
            }
            for b in budgets
        ],
    }


def _devices() -> bytes:
    return msgspec.json.encode(catalogue())


def _figures(c: Count) -> dict[str, object]:
    sums = {name: c.total(name) for name in ("macs", "ops", "weight_bytes", "read_bytes", "write_bytes")}
    return {
        "graph": c.name,
        "nodes": c.nodes,
        "kernels": len(c.kernels),
        **sums,
        "state_bytes": c.state_bytes,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Count, predict, check and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.budget", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--engine", type=Path, default=Path("engines/bundled"), metavar="DIR", help="an exported model"
    )
    which.add_argument("--config", nargs="+", metavar="NAME", help="bundled, vocaset, biwi or YAML files")
    count_ = partial(add, type=_positive, nargs="+", metavar="N")
    count_("--hop", help=f"with --config; frames of a hop (the default and {HOPS})")
    count_("--history", help=f"with --config; frames remembered (the default and {HISTORIES})")
    count_("--decode-window", help=f"with --config; latents decoded (the default and {DECODE_WINDOWS})")
    count_("--batch", help=f"rows of a launch ({BATCHES})")
    add("--no-measure", action="store_true", help="leave out the check on this processor")
    add(
        "--measured",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="what benchmarks.gpu --json measured on --device, to compare",
    )
    add("--device", metavar="NAME", help="of --measured, as in the tables")
    add("--json", type=Path, metavar="FILE", help="all figures")
    add("--write", type=Path, metavar="FILE", help="the tables, such as docs/budget.md")
    arguments = parser.parse_args(argv)
    measure = not arguments.no_measure
    try:
        if arguments.config:
            budgets = [
                of_config(
                    config,
                    arguments.hop or HOPS,
                    arguments.history or HISTORIES,
                    arguments.decode_window or DECODE_WINDOWS,
                    arguments.batch or BATCHES,
                    measure,
                )
                for config in arguments.config
            ]
        elif arguments.hop or arguments.history or arguments.decode_window:
            raise UsageError("An exported model has the hop and windows it has; for others: --config.")
        else:
            budgets = [of_engine(arguments.engine, arguments.batch or (), measure)]
        if bool(arguments.measured) != bool(arguments.device):
            raise UsageError("--measured and --device go together.")
        if arguments.measured:
            compare(budgets, arguments.measured, arguments.device)
        text = markdown(budgets, catalogue(), " ".join(sys.argv[1:] if argv is None else argv))
        print(text)
        if arguments.json:
            arguments.json.write_text(json.dumps(document(budgets), indent=1) + "\n", encoding="utf-8")
        if arguments.write:
            arguments.write.write_text(text, encoding="utf-8")
    except (StreamTalkError, ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
