"""What every command needs under `--layout`: its options, the data set, HuBERT's settings, and how it refuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import HubertConfig

from streamtalk_export.config import ModelConfig, load_config
from streamtalk_export.errors import ExportError
from streamtalk_export.hubert import hubert_config
from streamtalk_training.recorded import (
    LAYOUTS,
    RecordedDataError,
    RecordedSet,
    listed,
    open_recorded,
    read_splits,
)


def layout_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The options of `python -m streamtalk_training.<command> --layout ...` that all commands share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m streamtalk_training.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layout", choices=sorted(LAYOUTS), required=True, help="how --data is kept")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="holds vertices_npy/, wav/ and templates.pkl"
    )
    parser.add_argument("--config", metavar="FILE|vocaset|biwi", help="default: the layout's")
    parser.add_argument("--subjects", type=Path, metavar="FILE", help="YAML: other splits than the papers'")
    parser.add_argument("--hubert-config", type=Path, metavar="FILE", help="config.json of another size")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def add_training_options(parser: argparse.ArgumentParser, steps: int, peak_rate: float) -> None:
    """Options of both stages, with one stage's defaults."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="resumed if it exists")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=1, help="clips a step")
    parser.add_argument("--peak-rate", type=float, default=peak_rate, help="of learning")


def open_data(options: argparse.Namespace) -> RecordedSet:
    """The data set that the options name; files without their partner are told on stderr."""
    splits = None if options.subjects is None else read_splits(options.subjects)
    config = load_config(options.config or options.layout)
    data = open_recorded(LAYOUTS[options.layout], options.data, config, splits)
    if data.unpaired:
        print(f"left out, for want of vertices or sound: {listed(data.unpaired)}", file=sys.stderr)
    return data


def hubert_from(config: ModelConfig, settings: Path | None, weights: Path | None) -> HubertConfig | None:
    """HuBERT's settings, of a folder of weights where none are given; None for a model with the mel encoder."""
    if config.audio.kind != "hubert":
        return None
    if settings is None and weights is not None and (weights / "config.json").is_file():
        settings = weights / "config.json"
    hubert = hubert_config(settings)
    if hubert.hidden_size != config.predictor.audio_encode_dim:
        raise RecordedDataError(
            f"audio_encode_dim is {config.predictor.audio_encode_dim}, HuBERT's hidden_size "
            f"{hubert.hidden_size}; give the matching --hubert-config."
        )
    return hubert


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the command with a sentence and exit code 2 where the data or the options do not serve."""
    try:
        yield
    except (ExportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
