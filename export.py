"""Export a checkpoint to ONNX: `python export.py`, or `python export.py --help`."""

import sys

from streamtalk_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
