"""Makes `tests/data/<name>/` from a folder of golden vectors: `python tests/data/trim.py GOLDEN_DIR`.

The vectors came from running the released StreamingTalker modules (Apache-2.0) at small sizes with seeded
random weights. Trimmed here: the position tables in the checkpoint, kept with two rows so that ignoring
them stays tested, and `input_values`, which follows from `pcm`.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch


def trim(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = torch.load(source / "checkpoint.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    for key, value in state.items():
        if key.endswith(".pe"):
            state[key] = value[:2].clone() if value.shape[1] == 1 else value[:, :2].clone()
    torch.save(checkpoint, target / "checkpoint.ckpt")
    vectors = {k: v for k, v in np.load(source / "golden.npz").items() if k != "input_values"}
    np.savez_compressed(target / "golden.npz", **vectors)
    for name in ("config.yaml", "hubert_config.json"):
        shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    for folder in ("vocaset_small", "biwi_small"):
        trim(Path(sys.argv[1]) / folder, Path(__file__).parent / folder)
