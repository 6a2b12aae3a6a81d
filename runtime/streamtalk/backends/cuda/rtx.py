"""Engines of TensorRT-RTX."""

from __future__ import annotations

from functools import partial

from streamtalk.backends.cuda.tensorrt import load_engines

load = partial(load_engines, "tensorrt_rtx")
