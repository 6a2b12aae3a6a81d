"""The budget as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from benchmarks.budget_count import Count
from benchmarks.budget_measure import Calibration, Check
from benchmarks.budget_model import COMPUTE_SHARE, MEMORY_SHARE, RATES, SAFE, Catalogue, Prediction, Setup
from benchmarks.latency_rows import markdown as markdown_table

HEAD = f"""# What it should cost on other devices

**These are predictions, not measurements.** No figure on this page except those under "Checked" was taken on a
device. `{{command}}` wrote it.

Operations and bytes are counted from the exported graphs, operator by operator; pointwise operators run in the kernel
before them. A kernel takes the longer of two times: its arithmetic at {COMPUTE_SHARE:.0%} of the device's published
dense rate (products in float16 with float32 sums, all else in float32), or its memory traffic at {MEMORY_SHARE:.0%} of
the published bandwidth, nothing kept in a cache between two kernels; plus the cost of a launch in a captured CUDA
graph. A run of a graph adds the host's share. The two shares, the launch and the host are assumptions; the rest is
published.
Rendering, and whatever else shares the device, come on top.

A hop is one launch: the audio encoder and all of the hop's frames. A frame costs its share of a hop. A rate is met
(**bold**) when a hop fits into its frames' time with a headroom of {SAFE:g} or more; a headroom between 1 and {SAFE:g}
is no promise ("tight"); below 1 it is missed.
"""


ON_A_GPU = """A prediction joins pointwise operators to the kernel before them, as TensorRT does, and gives products the
share of the peak above. onnxruntime ran graphs of its own, in which attention, GELU and the sum before a LayerNorm are
one kernel each and most other operators kernels of their own. This page does not say where an error comes from.
"""


class Budget(Protocol):
    """What is shown of a model."""

    name: str
    setup: Setup
    counts: list[Count]
    half: list[Count]
    predictions: list[Prediction]
    calibration: Calibration | None
    checks: list[Check]
    device: str
    device_checks: list[Check]


def markdown(budgets: Sequence[Budget], catalogue: Catalogue, arguments: str) -> str:
    """The whole page."""
    parts = [HEAD.format(command=f"python -m benchmarks.budget {arguments}".strip()), *_devices(catalogue)]
    for budget in budgets:
        parts += [f"## {budget.name}: {budget.setup.label}\n", *_counts(budget), *_predictions(budget)]
        parts += _checks(budget)
    return "\n".join(parts).rstrip("\n") + "\n"


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    return markdown_table(head.split("|"), ([str(cell) for cell in row] for row in rows))


def _devices(catalogue: Catalogue) -> list[str]:
    rows = (
        (
            d.name,
            f"{d.fp16_tflops:g}",
            f"{d.fp32_tflops:g}",
            f"{d.memory_gb_s:g}",
            f"{d.launch_us:g}",
            f"{d.host_us:g}",
        )
        for d in catalogue.devices
    )
    used: dict[str, list[str]] = {}
    for device in catalogue.devices:
        used.setdefault(device.source, []).append(device.name)
    sources = "\n".join(f"- {', '.join(names)}: {catalogue.sources[key]}" for key, names in used.items())
    head = "device|float16 TFLOPS|float32 TFLOPS|memory GB/s|launch us (assumed)|host us (assumed)"
    return ["## Devices\n", _table(head, rows), f"{catalogue.note}\n", f"Per NVIDIA's pages:\n\n{sources}\n"]


def _counts(budget: Budget) -> list[str]:
    rows = [
        (
            f"{c.name}{suffix}",
            str(c.nodes),
            str(len(c.kernels)),
            f"{c.total('macs') / 1e6:.2f}",
            f"{c.total('ops') / 1e6:.2f}",
            f"{c.total('weight_bytes') / 1e6:.2f}",
            f"{c.activation_bytes / 1e6:.2f}",
            f"{c.state_bytes / 1e6:.2f}",
        )
        for counts, suffix in ((budget.counts, ""), (budget.half, " (float16)"))
        for c in counts
    ]
    head = "graph|nodes|kernels|million MACs|million other operations|weights read MB|activations MB|of which state MB"
    return [
        "Counted from the graphs (one run; weights once for each kernel that reads them):\n",
        _table(head, rows),
    ]


def _predictions(budget: Budget) -> list[str]:
    own = [p for p in budget.predictions if p.setup == budget.setup]
    rows = (
        (
            p.device,
            *(f"{ms:.2f}" for ms in (p.hop_ms, p.frame_ms)),
            *(_mark(p, fps) for fps in RATES),
        )
        for p in own
    )
    head = "device|hop ms|frame ms|" + "|".join(f"headroom at {fps} fps" for fps in RATES)
    setups = list(dict.fromkeys(p.setup for p in budget.predictions))
    by_setup = {(p.setup, p.device): p for p in budget.predictions}
    devices = [p.device for p in own]
    grid = (
        (
            str(s.hop),
            str(s.history),
            str(s.decode_window),
            str(s.batch),
            *(_cell(by_setup[s, device]) for device in devices),
        )
        for s in setups
    )
    return [
        "Predicted:\n",
        _table(head, rows),
        "Predicted hop in ms for other settings (bold: 30 fps with the headroom; ~: tight; x: missed):\n",
        _table("|".join(("hop", "history", "decode window", "rows", *devices)), grid),
    ]


def _mark(p: Prediction, fps: int) -> str:
    headroom = p.headroom(fps)
    if headroom >= SAFE:
        return f"**{headroom:.1f}**"
    return f"{headroom:.1f} tight" if headroom >= 1 else f"{headroom:.1f} missed"


def _cell(p: Prediction) -> str:
    headroom = p.headroom(30)
    mark = f"{p.hop_ms:.2f}"
    return f"**{mark}**" if headroom >= SAFE else f"{mark} ~" if headroom >= 1 else f"{mark} x"


def _checks(budget: Budget) -> list[str]:
    parts = []
    if budget.calibration is not None:
        c = budget.calibration
        speeds = ", ".join(
            f"{size} MB {c.bytes[size] / 1e9:.1f} ({c.copy_bytes[size] / 1e9:.1f})" for size in c.bytes
        )
        parts += [
            "### Checked here\n",
            "The same counts (float32) and the same formula on the processor that wrote this page, with rates measured "
            f"on it in the same minutes: products {c.flops / 1e9:.0f} GFLOP/s, other operations {c.ops / 1e9:.2f} G/s, "
            f"a node of 8 x 8 {1e6 * c.launch_s:.1f} us, a graph of one {1e6 * c.host_s:.0f} us; GB/s of a product of "
            f"one row, in brackets of a copy, by footprint: {speeds}. Processor time of one thread, the best run.\n",
            _errors(budget.checks),
        ]
    if budget.device_checks:
        parts += [f"### Checked on {budget.device}\n", ON_A_GPU, _errors(budget.device_checks)]
    else:
        parts += ["Not checked on a GPU: the error on one is not known.\n"]
    return parts


def _errors(checks: Sequence[Check]) -> str:
    rows = (
        (k.graph, f"{k.predicted_ms:.3f}", f"{k.measured_ms:.3f}", f"{100 * k.error:+.0f} %") for k in checks
    )
    return _table("graph|predicted ms|measured ms|error of the prediction", rows)
