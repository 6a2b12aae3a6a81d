"""Microphone, file or stdin in, talking face out. `python run_mic.py --help`; also `streamtalk run`."""

import sys
from pathlib import Path

from streamtalk.app.cli import run_mic

if __name__ == "__main__":
    sys.exit(run_mic(engine=Path(__file__).parent / "engines" / "bundled"))
