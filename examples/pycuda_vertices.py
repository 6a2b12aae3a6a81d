"""Vertices from the model to a kernel of PyCUDA's without a copy and without a wait of the host.

    pip install 'streamtalk[cuda]' pycuda        # and TensorRT or onnxruntime-gpu; PyCUDA compiles with nvcc
    python examples/pycuda_vertices.py --wav speech.wav

The kernel stands for a renderer: it turns the face and writes it to a buffer of its own. Everything happens in the
context that PyCUDA made current; the runtime makes no second one.
"""

from __future__ import annotations

import argparse
import sys
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamtalk import StreamTalkError, Talker

TURN = """
__global__ void turn(const float *in, float *out, int n, float angle)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float x = in[3 * i], z = in[3 * i + 2], c = cosf(angle), s = sinf(angle);
    out[3 * i] = c * x + s * z;
    out[3 * i + 1] = in[3 * i + 1];
    out[3 * i + 2] = c * z - s * x;
}
"""
BLOCK = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Turn every frame of a file; prints the last one's size."""
    parser = argparse.ArgumentParser(description="Hand vertices to PyCUDA on the GPU.")
    parser.add_argument("--engine", type=Path, default=Path("engines/bundled"), metavar="DIR")
    parser.add_argument("--wav", type=Path, required=True, metavar="FILE", help="16 kHz, mono, 16 bits")
    arguments = parser.parse_args(argv)
    try:
        # The primary context, which onnxruntime insists on; TensorRT works in any that is current.
        import pycuda.autoprimaryctx  # noqa: F401 (importing it makes the context)
        import pycuda.driver as cuda
        from pycuda.compiler import SourceModule
    except ImportError as error:
        print(f"This example needs PyCUDA: pip install pycuda. ({error})", file=sys.stderr)
        return 2
    try:
        pcm = read(arguments.wav)
        talker = Talker.load(arguments.engine, download=False)
    except (StreamTalkError, OSError, EOFError, ValueError, wave.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    turn = SourceModule(TURN).get_function("turn")
    mine = cuda.Stream()
    n = talker.manifest.n_vertices
    turned = cuda.mem_alloc(12 * n)
    frames = 0
    with talker.open() as stream:
        stream.push(pcm)
        for frame in stream.flush():
            # `GPUArray(vertices.shape, vertices.dtype, gpudata=vertices.address)` is the same memory as an array.
            vertices = stream.device_vertices
            vertices.acquire_on(mine.handle)
            turn(
                np.uintp(vertices.address),
                turned,
                np.int32(n),
                np.float32(0.3 * np.sin(2 * np.pi * frame.time_s / 4)),
                block=(BLOCK, 1, 1),
                grid=(-(-n // BLOCK), 1),
                stream=mine,
            )
            vertices.release_on(mine.handle)
            frames += 1
        mine.synchronize()
    if frames:
        face = np.empty((n, 3), np.float32)
        cuda.memcpy_dtoh(face, turned)
        print(f"{frames} frames on {talker.backend}; the last one is {np.ptp(face, axis=0)} in size")
    return 0


def read(path: Path) -> NDArray[np.float32]:
    """Samples [n] of a file of 16 kHz, mono, 16 bits. Raises ValueError."""
    with wave.open(str(path), "rb") as file:
        found = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
        if found != (16000, 1, 16):
            raise ValueError(
                f"{path} has {found[0]} Hz, {found[1]} channels, {found[2]} bits; expected 16000, 1, 16."
            )
        stored = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return np.asarray(stored / 32768, np.float32)


if __name__ == "__main__":
    sys.exit(main())
