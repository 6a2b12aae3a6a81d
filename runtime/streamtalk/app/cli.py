"""The command line: `streamtalk run` (which `run_mic.py` is), `build`, `devices` and `doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy.typing as npt

from streamtalk.app.audio.devices import input_devices, listing, portaudio
from streamtalk.app.audio.microphone import Microphone
from streamtalk.app.audio.raw import FORMATS
from streamtalk.app.audio.sources import FileSource, RawSource, Source
from streamtalk.app.doctor import as_text, examine, verdict
from streamtalk.app.output import Output
from streamtalk.app.output.background import Background
from streamtalk.app.output.film import ContactSheetOutput, Face, LiveOutput, VideoOutput
from streamtalk.app.output.npz import NpzOutput
from streamtalk.app.progress import progress, say
from streamtalk.app.run import Report, Run
from streamtalk.app.status import StatusLine
from streamtalk.backends import AUTO
from streamtalk.errors import AudioError, OutputError, SpeakerError, StreamTalkError, UsageError
from streamtalk.identity import Speaker, SpeakerId
from streamtalk.signals import ended_by_signals
from streamtalk.talker import Talker

DEFAULT_ENGINE = Path("engines/bundled")
BAD_INPUT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Argument errors as UsageError: one sentence like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `streamtalk`. Returns the exit code: 0, 2 for bad input, 130 for a cut file."""
    parser = _Parser("streamtalk", description="Talking 3D faces from audio, at a constant latency.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    run = commands.add_parser("run", help="audio in, frames out", description=_RUN)
    _add_run_arguments(run)
    run.set_defaults(action=_run)
    build = commands.add_parser("build", help="build TensorRT engines on this machine", description=_BUILD)
    _add_build_arguments(build)
    build.set_defaults(action=_build)
    devices = commands.add_parser("devices", help="list sound input devices")
    devices.set_defaults(action=_devices)
    doctor = commands.add_parser("doctor", help="what is installed, what a model runs on, what to do")
    doctor.add_argument(
        "--engine", type=Path, default=DEFAULT_ENGINE, metavar="DIR", help="what to try (%(default)s)"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    doctor.set_defaults(action=_doctor)
    return _guarded(parser, argv)


def run_mic(argv: Sequence[str] | None = None, *, engine: Path = DEFAULT_ENGINE) -> int:
    """The script `run_mic.py`, whose default model is `engine`. Returns the exit code, as `main` does."""
    parser = _Parser("run_mic.py", description=_RUN)
    _add_run_arguments(parser)
    parser.set_defaults(engine=engine)
    parser.set_defaults(action=_run)
    return _guarded(parser, argv)


_RUN = (
    "Listen to a microphone, a file or stdin and animate a face. A status line goes to stderr; Ctrl-C ends "
    "and keeps what was made."
)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--engine",
        type=Path,
        default=DEFAULT_ENGINE,
        metavar="DIR",
        help="what export.py wrote (%(default)s)",
    )
    add("--backend", default=AUTO, help="%(default)s takes the first that works")
    add("--threads", type=int, metavar="N", help="CPU threads of a model run (the cores, at most 4)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wav", type=Path, metavar="FILE", help="a sound file, in real time or --fast")
    source.add_argument("--device", metavar="ID", help="a microphone's number or name (the default one)")
    source.add_argument("--stdin", action="store_true", help="raw mono samples at the model's rate")
    source.add_argument("--list-devices", action="store_true", help="list microphones and exit")
    add("--stdin-format", choices=sorted(FORMATS), default="s16le", help="of --stdin (%(default)s)")
    add("--speaker", metavar="WHO", help="a name, a number or a blend such as ada=.7,bo=.3 (the first)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the noise: the same seed, the same frames (%(default)s)",
    )
    add("--fast", action="store_true", help="do not wait for real time")
    add(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="x.npz or x.mp4; may be repeated",
    )
    add("--contact-sheet", type=Path, metavar="FILE", help="a PNG of frames of the whole run")
    add("--view", action="store_true", help="show the face live on a local page")
    add("--json", action="store_true", help="print one JSON object on stdout at the end")


_BUILD = (
    "Build the TensorRT engines of an exported model. TensorRT builds on the GPU that will run them; TensorRT-RTX "
    "needs no GPU. The engines take their places together; until then the directory stays as it is."
)


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="what export.py wrote")
    add(
        "--backend",
        choices=("tensorrt", "tensorrt_rtx"),
        help="which library builds (tensorrt where it is installed, else tensorrt_rtx)",
    )
    add("--precision", choices=("fp32", "fp16"), help="of the graphs (fp16 where the model has it)")
    add(
        "--compute-capability",
        type=_compute_capabilities,
        default=(),
        metavar="LIST",
        help="GPUs that tensorrt_rtx builds for, such as 86,89,120 (all that it knows)",
    )
    add(
        "--graph", nargs="+", metavar="NAME", help="graphs of the manifest to build instead of the hop graphs"
    )


def _compute_capabilities(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 86,89, got {text}") from error


def _guarded(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run a command; an error that a person can fix is a sentence on stderr and exit code 2."""
    try:
        arguments = parser.parse_args(argv)
        action: Callable[[argparse.Namespace], int] = arguments.action
        return action(arguments)
    except (StreamTalkError, OSError) as error:
        say(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


def _devices(_arguments: argparse.Namespace) -> int:
    _print(listing(input_devices(portaudio())))
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from streamtalk.backends.build import build_engines, installed_backend

    try:
        with ended_by_signals() as check:

            def working(text: str) -> AbstractContextManager[None]:
                check()
                return progress(text)

            build_engines(
                arguments.directory,
                arguments.backend or installed_backend(),
                arguments.precision,
                arguments.compute_capability,
                arguments.graph,
                say,
                working,
            )
    except KeyboardInterrupt:
        say(f"interrupted; {arguments.directory} holds a whole set of engines. Run it again for new ones.")
        return INTERRUPTED
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    findings = []
    for finding in examine(arguments.engine):
        findings.append(finding)
        if not arguments.json:
            _print(as_text(finding))
    runs, sentence = verdict(arguments.engine, findings)
    if arguments.json:
        _print(json.dumps({"runs": runs, "verdict": sentence, "findings": [asdict(f) for f in findings]}))
    else:
        _print(f"\n{sentence}")
    return 0 if runs else BAD_INPUT


def _run(arguments: argparse.Namespace) -> int:
    if arguments.list_devices:
        return _devices(arguments)
    if arguments.fast and not (arguments.wav or arguments.stdin):
        raise UsageError("--fast needs --wav or --stdin: a microphone cannot go faster than real time.")
    targets = [*arguments.out, *([arguments.contact_sheet] if arguments.contact_sheet else [])]
    if len({path.resolve() for path in targets}) < len(targets):
        raise UsageError("Two outputs have the same name; give each its own.")
    with progress(f"Loading {arguments.engine}"):
        talker = Talker.load(arguments.engine, arguments.backend, threads=arguments.threads)
    for name, reason in talker.choice.passed_over.items():
        backend = name.split()[0]
        if backend == talker.backend or any(engine.backend == backend for engine in talker.manifest.engines):
            say(f"{name} was passed over for {talker.choice.backend.description}: {reason}")
    with ExitStack() as stack:
        speaker = _speaker(arguments.speaker, talker.speakers)
        stream = stack.enter_context(talker.open(speaker, seed=arguments.seed))
        face = Face(stream.template, talker.faces, talker.colors_of(speaker), talker.fps, talker.sample_rate)
        source = _source(arguments, talker, stack)
        run = Run(talker, stream, source, _outputs(arguments, talker, face, stack))
        status = StatusLine()
        try:
            failure = run.play(status)
        finally:
            status.finish(run)
        report = run.report()
    _warn(run, report, source)
    if arguments.json and report.frames:
        _print(json.dumps({**asdict(report), **_labels(arguments, source)}))
    if failure is not None:
        raise failure
    return INTERRUPTED if report.interrupted and not source.live else 0


def _source(arguments: argparse.Namespace, talker: Talker, stack: ExitStack) -> Source:
    if arguments.wav:
        return FileSource(arguments.wav, talker.sample_rate, arguments.fast)
    if arguments.stdin:
        if sys.stdin is None:
            raise AudioError("--stdin: there is no standard input; pipe samples into it.")
        return RawSource(sys.stdin.buffer, arguments.stdin_format, talker.sample_rate, arguments.fast)
    wanted = arguments.device
    device = int(wanted) if wanted is not None and wanted.isdecimal() else wanted
    microphone = Microphone(portaudio(), device, talker.sample_rate)
    stack.callback(microphone.close)
    say(f"Listening to {microphone.label}; Ctrl-C ends.")
    return microphone


def _outputs(arguments: argparse.Namespace, talker: Talker, face: Face, stack: ExitStack) -> list[Output]:
    outputs: list[Output] = []

    def add(output: Output) -> None:
        stack.callback(output.close)  # for the case that the next one cannot be opened
        outputs.append(output)

    for path in arguments.out:
        if path.suffix == ".npz":
            still: dict[str, npt.NDArray[Any]] = {
                "faces": face.faces,
                "template": face.template,
                **talker.landmarks,
            }
            if face.colors is not None:
                still["colors"] = face.colors
            add(NpzOutput(path, talker.manifest.n_vertices, talker.fps, still, talker.blendshape_names))
        elif path.suffix == ".mp4":
            add(Background(partial(VideoOutput, path, face)))
        else:
            raise OutputError(
                f"--out {path}: the name must end in .npz (vertices) or .mp4 (film with sound)."
            )
    if arguments.contact_sheet:
        if arguments.contact_sheet.suffix != ".png":
            raise OutputError(f"--contact-sheet {arguments.contact_sheet}: the name must end in .png.")
        add(ContactSheetOutput(arguments.contact_sheet, face))
    if arguments.view:
        live = LiveOutput(face)
        say(f"The face is at {live.url}")
        add(live)
    return outputs


def _speaker(text: str | None, known: tuple[str, ...]) -> Speaker:
    """`--speaker`: a name, else an index, else `name=weight,...`. Names are tried first, whatever they look
    like.
    """
    if text is None or text in known:
        return text
    if "=" not in text:
        return int(text) if text.isdecimal() else text
    blend: dict[SpeakerId, float] = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        try:
            blend[int(name) if name.isdecimal() and name not in known else name] = float(weight)
        except ValueError as error:
            raise SpeakerError(
                f"--speaker {text}: {part!r} is not NAME=WEIGHT, such as {known[0]}=.7."
            ) from error
    return blend


def _labels(arguments: argparse.Namespace, source: Source) -> dict[str, object]:
    return {
        "source": source.label,
        "engine": str(arguments.engine),
        "seed": arguments.seed,
        "out": [str(path) for path in arguments.out],
    }


def _warn(run: Run, report: Report, source: Source) -> None:
    if run.clips:
        say(f"warning: {100 * report.clipped_share:.1f} % of the samples clip; turn the input gain down.")
    if report.overflows:
        say(f"warning: {source.label} overflowed {report.overflows} times; audio was lost.")
    if report.reconnects:
        say(f"warning: {source.label} was gone and came back {report.reconnects} times.")


def _print(text: str) -> None:
    """Print to stdout. Raises OutputError if nobody reads it any more or it cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Or the interpreter tries again at its exit and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise OutputError(f"stdout cannot be written: {error.strerror}.") from error
