"""Engines of classic TensorRT."""

from __future__ import annotations

from functools import partial

from streamtalk.backends.cuda.tensorrt import load_engines

load = partial(load_engines, "tensorrt")
